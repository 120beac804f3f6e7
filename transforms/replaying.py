"""LoadPackets: archived packets where packaging would have made them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from schemas.avro.adaptation import PacketHead
from schemas.avro.batch_adaptation import adapt_packets
from schemas.avro.messages import Packet, packet_of
from schemas.avro.wire import PacketFormatError
from schemas.claim_check import write_blobs
from schemas.elements import DetectorVisit, FailureRecord, VisitPart
from schemas.packet_index import PacketReader, read_packet
from schemas.records import DIA_FORCED_SOURCE, DIA_OBJECT, DIA_SOURCE, SS_SOURCE, empty_records
from transforms.alert_columns import replayed_alerts
from transforms.cutouts import detector_account
from transforms.delivery import Delivery
from transforms.distribution import Shipment, send_full_streams
from transforms.failures import FAILED, failure_of, failure_part
from transforms.metrics import ALERTS_PACKAGED, BYTES_ACKNOWLEDGED, PACKETS_ACKNOWLEDGED
from transforms.packaging import alerts_part, packet_digest, packet_file
from transforms.sending import SendingFn

STAGE = "replaying"
_NO_ROWS = (
    empty_records(DIA_SOURCE, 0),
    empty_records(DIA_OBJECT, 0),
    empty_records(DIA_FORCED_SOURCE, 0),
    empty_records(SS_SOURCE, 0),
)


class ReplayResult(NamedTuple):
    """`good`: (visit, bytes) part of a visit for `GatherVisits`; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class _StoredPacket(NamedTuple):
    dia_source_id: int  # by the index
    file: str
    message: bytes
    packet: Packet


class _ReadPackets(NamedTuple):
    heads: list[PacketHead]
    messages: list[bytes]
    digests: list[str]
    table: pa.Table  # a row each
    n_moving: int


class LoadPackets(beam.PTransform):
    """Read the packets of each detector, keep them in the packet store, send them on every full stream.

    Input: DetectorVisit, VisitPart. Output `good`: (visit, bytes), thin columns and locations of a
    detector's packets, its account, and the parts as they came; `failed`: packets that could not be read
    or do not fit the columns that filters ask for. Order: as it comes; a duplicate gives the same again.
    Everything sent is acknowledged before the bundle ends. No state.
    """

    def __init__(self, index: str, delivery: Delivery) -> None:
        super().__init__()
        self.index = index
        self.delivery = delivery

    def expand(self, detectors: beam.PCollection) -> ReplayResult:
        outputs = detectors | "ReadPackets" >> beam.ParDo(_ReadPacketsFn(self.index, self.delivery)).with_output_types(
            tuple[int, bytes]
        ).with_outputs(FAILED, main="good")
        return ReplayResult(outputs.good, outputs[FAILED])


class _ReadPacketsFn(SendingFn):
    def __init__(self, index: str, delivery: Delivery) -> None:
        super().__init__(delivery.sink, delivery.deadline_s)
        self.index = index
        self.delivery = delivery

    def setup(self) -> None:
        super().setup()
        self.reader = PacketReader(Path(self.index))

    def process(self, element: DetectorVisit | VisitPart) -> Iterator[Any]:
        if isinstance(element, VisitPart):
            yield element.visit, element.part
        else:
            yield from self._replay(element)

    def finish_bundle(self) -> None:
        n_packets, n_bytes = self.flush()
        PACKETS_ACKNOWLEDGED.inc(n_packets)
        BYTES_ACKNOWLEDGED.inc(n_bytes)

    def _replay(self, element: DetectorVisit) -> Iterator[Any]:
        started_at, started = time.time(), time.perf_counter()
        visit, detector, to = element.visit.visit, element.detector, self.delivery
        stored, failures = self._stored(visit, detector)
        packets, misfits = adapted_packets(visit, detector, stored, to.filter_columns)
        for failure in failures + misfits:
            yield beam.pvalue.TaggedOutput(FAILED, failure)
            yield visit, failure_part(failure)
        ids = np.array([head.dia_source_id for head in packets.heads], dtype=np.int64)
        file_name = packet_file(visit, detector, ids)
        if len(ids):
            write_blobs(Path(to.packet_folder) / file_name, ids, [(message,) for message in packets.messages])
        thin = replayed_alerts(packets.heads, packets.table, file_name, packets.digests, to.filter_columns)
        shipment = Shipment()
        if self.sink is not None:
            send_full_streams(self.sink, to.streams, visit, thin, packets.messages, shipment)
            for failure in shipment.failures:
                yield beam.pvalue.TaggedOutput(FAILED, failure)
                yield visit, failure_part(failure)
        ALERTS_PACKAGED.inc(len(ids))
        seconds = {"replaying": time.perf_counter() - started}
        yield visit, alerts_part([detector], thin, _NO_ROWS, counts={}, seconds=seconds, shipped=shipment.counts())
        yield visit, detector_account(detector, len(ids), len(ids), started_at, ss_matches=packets.n_moving)

    def _stored(self, visit: int, detector: int) -> tuple[list[_StoredPacket], list[FailureRecord]]:
        """The packets of one exposure as they lie there."""
        stored: list[_StoredPacket] = []
        failures: list[FailureRecord] = []
        for dia_source_id, place in self.reader.places(visit, detector):
            try:
                message = read_packet(place)
                stored.append(_StoredPacket(dia_source_id, place.file, message, packet_of(message)))
            except (OSError, PacketFormatError) as error:
                failures.append(failure_of(error, STAGE, visit, detector, lost=f"packet {dia_source_id}"))
        return stored, failures


def adapted_packets(
    visit: int, detector: int, stored: Sequence[_StoredPacket], columns: frozenset[str]
) -> tuple[_ReadPackets, list[FailureRecord]]:
    """Those packets that can be read, are the ones of the index and fit the columns that filters ask for."""
    batch = adapt_packets([one.packet for one in stored], columns)
    heads: list[PacketHead] = []
    failures: list[FailureRecord] = []
    kept: list[int] = []
    for i, (one, head) in enumerate(zip(stored, batch.heads, strict=True)):
        if isinstance(head, PacketHead):
            if (head.dia_source_id, head.visit, head.detector) == (one.dia_source_id, visit, detector):
                heads.append(head)
                kept.append(i)
                continue
            head = PacketFormatError(f"{one.file} has changed: another packet lies there")
        failures.append(failure_of(head, STAGE, visit, detector, lost=f"packet {one.dia_source_id}"))
    is_kept = np.isin(batch.rows, kept)
    table = batch.table if is_kept.all() else batch.table.filter(pa.array(is_kept))
    messages = [stored[i].message for i in kept]
    digests = [packet_digest(stored[i].packet.body) for i in kept]
    return _ReadPackets(heads, messages, digests, table, int(batch.is_moving[is_kept].sum())), failures

"""LoadPackets: archived packets where packaging would have made them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from schemas.avro.adaptation import AdaptedPacket, adapt_packet, adapted_table
from schemas.avro.messages import packet_of
from schemas.avro.reading import decode_body
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
from transforms.packaging import alerts_part, packet_digest, packet_file

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


class _ReadPacket(NamedTuple):
    adapted: AdaptedPacket
    message: bytes
    digest: str


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


class _ReadPacketsFn(beam.DoFn):
    def __init__(self, index: str, delivery: Delivery) -> None:
        self.index = index
        self.delivery = delivery

    def setup(self) -> None:
        self.reader = PacketReader(Path(self.index))
        if self.delivery.sink is not None:
            self.delivery.sink.open()

    def teardown(self) -> None:
        if self.delivery.sink is not None:
            self.delivery.sink.close()

    def process(self, element: DetectorVisit | VisitPart) -> Iterator[Any]:
        if isinstance(element, VisitPart):
            yield element.visit, element.part
        else:
            yield from self._replay(element)

    def finish_bundle(self) -> None:
        if self.delivery.sink is not None:
            self.delivery.sink.flush(self.delivery.deadline_s)

    def _replay(self, element: DetectorVisit) -> Iterator[Any]:
        started_at, started = time.time(), time.perf_counter()
        visit, detector, to = element.visit.visit, element.detector, self.delivery
        packets, failures = self._packets(visit, detector)
        packets, table, misfits = self._fitting(visit, detector, packets)
        for failure in failures + misfits:
            yield beam.pvalue.TaggedOutput(FAILED, failure)
            yield visit, failure_part(failure)
        ids = np.array([packet.adapted.dia_source_id for packet in packets], dtype=np.int64)
        messages = [packet.message for packet in packets]
        file_name = packet_file(visit, detector, ids)
        if len(ids):
            write_blobs(Path(to.packet_folder) / file_name, ids, [(message,) for message in messages])
        digests = [packet.digest for packet in packets]
        adapted = [packet.adapted for packet in packets]
        thin = replayed_alerts(adapted, table, file_name, digests, to.filter_columns)
        shipment = Shipment()
        if to.sink is not None:
            send_full_streams(to.sink, to.streams, visit, thin, messages, shipment)
            for failure in shipment.failures:
                yield beam.pvalue.TaggedOutput(FAILED, failure)
                yield visit, failure_part(failure)
        seconds = {"replaying": time.perf_counter() - started}
        yield visit, alerts_part([detector], thin, _NO_ROWS, counts={}, seconds=seconds, shipped=shipment.counts())
        n_moving = sum(packet.adapted.record["ssSource"] is not None for packet in packets)
        yield visit, detector_account(detector, len(ids), len(ids), started_at, ss_matches=n_moving)

    def _packets(self, visit: int, detector: int) -> tuple[list[_ReadPacket], list[FailureRecord]]:
        """The packets of one exposure that can be read."""
        packets: list[_ReadPacket] = []
        failures: list[FailureRecord] = []
        for dia_source_id, place in self.reader.places(visit, detector):
            try:
                message = read_packet(place)
                packet = packet_of(message)
                adapted = adapt_packet(decode_body(packet.schema, packet.body))
                if (adapted.dia_source_id, adapted.visit, adapted.detector) != (dia_source_id, visit, detector):
                    raise PacketFormatError(f"{place.file} has changed: another packet lies there")
                packets.append(_ReadPacket(adapted, message, packet_digest(packet.body)))
            except (OSError, PacketFormatError) as error:
                failures.append(failure_of(error, STAGE, visit, detector, lost=f"packet {dia_source_id}"))
        return packets, failures

    def _fitting(
        self, visit: int, detector: int, packets: list[_ReadPacket]
    ) -> tuple[list[_ReadPacket], pa.Table, list[FailureRecord]]:
        """The packets that fit the columns filters ask for, and these; one by one only where they do not all fit."""
        failures: list[FailureRecord] = []
        try:
            return packets, self._table(packets), failures
        except PacketFormatError:
            fitting = []
        for packet in packets:
            try:
                self._table([packet])
                fitting.append(packet)
            except PacketFormatError as error:
                lost = f"packet {packet.adapted.dia_source_id}"
                failures.append(failure_of(error, STAGE, visit, detector, lost=lost))
        return fitting, self._table(fitting), failures

    def _table(self, packets: list[_ReadPacket]) -> pa.Table:
        return adapted_table([packet.adapted.record for packet in packets], self.delivery.filter_columns)

"""PackageAlerts: columns to finished packets, once; to the packet store and to the full streams."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue
from pydantic import Field
from pydantic.dataclasses import dataclass

from schemas.avro.encoding import AlertColumns, encode_packets
from schemas.avro.schema_versions import packet_schema
from schemas.avro.wire import wire_header
from schemas.claim_check import ClaimCheckError, read_blobs, write_blobs
from schemas.element_tables import ElementTable
from schemas.elements import AlertBatch, FailureRecord, VisitPart
from schemas.framing import pack, unpack
from schemas.records import DIA_SOURCE, concatenate_records, records_to_bytes
from transforms.alert_columns import thin_alerts
from transforms.delivery import Delivery
from transforms.distribution import Shipment, send_full_streams
from transforms.failures import FAILED, failure_of, failure_part
from transforms.metrics import ALERTS_PACKAGED, BYTES_ACKNOWLEDGED, PACKETS_ACKNOWLEDGED
from transforms.sending import SendingFn
from transforms.solar_system import element_table, orbit_records

STAGE = "packaging"
# Finished packets that are in memory at a time, and the first of which are sent before the next are made.
_ALERTS_AT_ONCE = 64
Cutouts = tuple[list[bytes | None], list[bytes | None], list[bytes | None]]  # difference, science, template


@dataclass(frozen=True)
class PackagingConfig:
    """Which packets are made.

    `sized_blocks`: see `encode_packets`; equal to LSST's to the byte only without.
    """

    schema_version: str = Field(default="11.0", pattern=r"^11\.[01]$")
    sized_blocks: bool = False
    delivery_deadline_s: float = Field(default=120.0, gt=0, le=3600)


class PackagingResult(NamedTuple):
    """`good`: (visit, bytes) part of a visit for `GatherVisits`; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class PackageAlerts(beam.PTransform):
    """Make packets, keep them in the packet store, send them on every full stream.

    `elements`: the night's orbits, from which `mpc_orbits` is filled, or None.

    Input: AlertBatch, VisitPart. Output `good`: (visit, bytes), the thin columns and locations of a batch,
    or the part as it came; `failed`: cutouts that could not be read (the alert goes without them, as all
    do where there is no cutout folder). Order: as it comes; a duplicate gives the same packets again.
    Everything sent is acknowledged before the bundle ends, and before its batches go on; what is not raises, so that
    nothing downstream counts it. No state.
    """

    def __init__(
        self, config: PackagingConfig, cutout_folder: str | None, delivery: Delivery, elements: str | None = None
    ) -> None:
        super().__init__()
        self.package = _PackageAlertsFn(config, cutout_folder, delivery, elements)

    def expand(self, batches: beam.PCollection) -> PackagingResult:
        outputs = batches | "EncodePackets" >> beam.ParDo(self.package).with_output_types(
            tuple[int, bytes]
        ).with_outputs(FAILED, main="good")
        return PackagingResult(outputs.good, outputs[FAILED])


class _PackageAlertsFn(SendingFn):
    def __init__(
        self, config: PackagingConfig, cutout_folder: str | None, delivery: Delivery, elements: str | None
    ) -> None:
        super().__init__(delivery.sink, delivery.deadline_s)
        self.config = config
        self.elements = elements
        self.cutout_folder = cutout_folder
        self.packet_folder = delivery.packet_folder
        self.streams = delivery.streams
        self.filter_columns = delivery.filter_columns

    def setup(self) -> None:
        super().setup()
        self.schema = packet_schema(self.config.schema_version)
        self.wire_header = wire_header(self.schema.schema_id)
        self.orbits = None if self.elements is None else element_table(self.elements)

    def start_bundle(self) -> None:
        self.unacknowledged: list[tuple[Timestamp, int, bytes]] = []

    def process(
        self, element: AlertBatch | VisitPart, timestamp: Timestamp = beam.DoFn.TimestampParam
    ) -> Iterator[Any]:
        if isinstance(element, VisitPart):
            yield element.visit, element.part
        else:
            yield from self._package(element, timestamp)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        n_packets, n_bytes = self.flush()
        PACKETS_ACKNOWLEDGED.inc(n_packets)
        BYTES_ACKNOWLEDGED.inc(n_bytes)
        at = time.time()
        for timestamp, visit, part in self.unacknowledged:
            yield WindowedValue((visit, acknowledged_part(part, at)), timestamp, (GlobalWindow(),))

    def _package(self, batch: AlertBatch, timestamp: Timestamp) -> Iterator[Any]:
        started_at, started = time.time(), time.perf_counter()
        visit = batch.context["visit"]
        tables = [thin_alerts(batch.part(0, 0), "", [], self.filter_columns)]
        shipment = Shipment()
        without_cutouts: Counter[FailureRecord] = Counter()
        unencoded: Counter[FailureRecord] = Counter()
        for start in range(0, len(batch.dia_sources), _ALERTS_AT_ONCE):
            alerts = batch.part(start, start + _ALERTS_AT_ONCE)
            cutouts, unread = self._cutouts(alerts)
            without_cutouts += unread
            try:
                columns = _alert_columns(alerts, cutouts, self.orbits)
                messages = encode_packets(
                    self.schema, columns, prefix=self.wire_header, sized_blocks=self.config.sized_blocks
                )
            except Exception as error:  # some alerts must not stop the others
                unencoded[failure_of(error, STAGE, visit, lost="")] += len(alerts.dia_sources)
            else:
                tables.append(self._hand_over(alerts, messages, shipment))
        # One record for the batch, with the sum: records of equal parts would be taken for repeats of one.
        cell = batch.context["cell"]
        failures = [replace(one, lost=f"cutouts of {n} alerts") for one, n in without_cutouts.items()]
        failures += [replace(one, lost=f"{n} alerts of sky cell {cell}") for one, n in unencoded.items()]
        for failure in failures + shipment.failures:
            yield beam.pvalue.TaggedOutput(FAILED, failure)
            yield visit, failure_part(failure)
        ALERTS_PACKAGED.inc(sum(len(table) for table in tables))
        seconds = time.perf_counter() - started
        part = visit_part(batch, pa.concat_tables(tables), seconds, shipment.counts(), started_at)
        self.unacknowledged.append((timestamp, visit, part))

    def _hand_over(self, alerts: AlertBatch, messages: list[bytes], shipment: Shipment) -> pa.Table:
        """Keep and send finished packets; their thin table."""
        ids = alerts.dia_sources["diaSourceId"]
        name = packet_file(alerts.context["visit"], alerts.context["cell"], ids)
        write_blobs(Path(self.packet_folder) / name, ids, [(message,) for message in messages])
        digests = [packet_digest(memoryview(message)[len(self.wire_header) :]) for message in messages]
        thin = thin_alerts(alerts, name, digests, self.filter_columns)
        if self.sink is not None:
            send_full_streams(self.sink, self.streams, alerts.context["visit"], thin, messages, shipment)
        return thin

    def _cutouts(self, batch: AlertBatch) -> tuple[Cutouts, Counter[FailureRecord]]:
        """Difference, science and template stamps of each alert, None where they cannot be had; and how many cannot."""
        n = len(batch.dia_sources)
        stamps: Cutouts = ([None] * n, [None] * n, [None] * n)
        unread: Counter[FailureRecord] = Counter()
        if self.cutout_folder is None:
            return stamps, unread
        for detector in np.unique(batch.dia_sources["detector"]):
            rows = np.flatnonzero(batch.dia_sources["detector"] == detector)
            path = cutout_file(self.cutout_folder, batch.context["visit"], int(detector))
            try:
                found = read_blobs(path, batch.dia_sources["diaSourceId"][rows])
            except ClaimCheckError as error:
                unread[failure_of(error, STAGE, batch.context["visit"], int(detector), lost="")] += len(rows)
                continue
            for row, blobs in zip(rows, found, strict=True):
                for index, blob in enumerate(blobs):
                    stamps[index][row] = blob or None
        return stamps, unread


def cutout_file(folder: str, visit: int, detector: int) -> Path:
    """Where the cutouts of one exposure wait."""
    return Path(folder) / str(visit) / f"{detector:03d}.cutouts"


def packet_file(visit: int, group: int, ids: np.ndarray) -> str:
    """Name of a group of packets in the packet store, a function of what is in it.

    `group` is what they were made from: the sky cell, or the detector of replayed ones.
    """
    digest = hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()[:12]
    return f"{visit}/{group}-{digest}.packets"


def packet_digest(body: bytes | memoryview) -> str:
    """SHA-256 of a packet body, hexadecimal."""
    return hashlib.sha256(body).hexdigest()


def _alert_columns(batch: AlertBatch, cutouts: Cutouts, orbits: ElementTable | None) -> AlertColumns:
    mpc_orbits, has_orbit = orbit_records(orbits, batch.dia_sources["ssObjectId"])
    return AlertColumns(
        dia_sources=batch.dia_sources,
        observation_reason=batch.context["observation_reason"],
        target_name=batch.context["target_name"],
        prv_dia_sources=batch.prv_dia_sources,
        prv_offsets=batch.prv_offsets,
        prv_forced=batch.prv_forced_sources,
        forced_offsets=batch.forced_offsets,
        dia_objects=batch.dia_objects,
        has_object=batch.dia_sources["diaObjectId"] != 0,
        ss_sources=batch.ss_sources,
        has_ss=batch.dia_sources["ssObjectId"] != 0,
        mpc_orbits=mpc_orbits,
        has_orbit=has_orbit,
        cutouts=cutouts,
    )


def visit_part(
    batch: AlertBatch,
    thin: pa.Table,
    seconds: float,
    shipped: dict[str, dict[str, int]],
    associated_at: float | None = None,
) -> bytes:
    """A batch as it travels to visit space: counts, thin columns, table rows; no packet bytes."""
    counts = {name: value for name, value in batch.counts.items() if name != "association_us"}
    has_ss = batch.dia_sources["ssObjectId"] != 0
    return alerts_part(
        [batch.context["cell"], batch.context["detectors"]],
        thin,
        (
            concatenate_records([batch.dia_sources, batch.unassociated], DIA_SOURCE),
            batch.object_states,
            batch.forced_sources,
            batch.ss_sources[has_ss],
        ),
        counts=counts,
        seconds={"association": batch.counts["association_us"] * 1e-6, "packaging": seconds},
        shipped=shipped,
        times={"fired_at": batch.fired_at, "associated_at": associated_at},
    )


def acknowledged_part(part: bytes, at: float) -> bytes:
    """The part of a batch that says when Kafka had its packets, UNIX time."""
    header, buffers = unpack(part)
    return pack({**header, "times": {**header["times"], "acknowledged_at": at}}, tuple(map(bytes, buffers)))


def alerts_part(
    group: list[Any],
    thin: pa.Table,
    tables: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    *,
    counts: dict[str, int],
    seconds: dict[str, float],
    shipped: dict[str, dict[str, int]],
    times: Mapping[str, float | None] = MappingProxyType({}),
) -> bytes:
    """The part of a visit that holds alerts.

    Parameters
    ----------
    group : tells this group of alerts from the others of the visit; JSON
    thin : table of `transforms.alert_columns.thin_schema`
    tables : rows for the archive: dia_sources, dia_objects, dia_forced_sources, ss_sources
    counts, seconds : for the ledger
    shipped : `Shipment.counts` of the full streams
    times : UNIX times, for `transforms.latency`
    """
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, thin.schema) as writer:
        writer.write_table(thin)
    header = {
        "kind": "alerts",
        "group": group,
        "counts": counts,
        "seconds": seconds,
        "shipped": shipped,
        "times": dict(times),
    }
    return pack(header, (stream.getvalue().to_pybytes(), *(records_to_bytes(rows) for rows in tables)))

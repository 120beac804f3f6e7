"""AccountVisits: the ledger, one record per visit: what came in, what went out, how late."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam

from schemas.claim_check import sweep_stores
from schemas.elements import VisitAlerts
from transforms.distribution import KafkaStream
from transforms.failures import write_bytes, write_lines
from transforms.metrics import VISITS_ACCOUNTED
from transforms.sending import AlertSink, SendingFn

STAGE = "accounting"
LEDGER_TOPIC = "alert-ledger"
# Pixels are wanted until their visit is closed, and again by a job that goes on from a checkpoint; packets for as
# long as late detectors can open a visit again (`transforms.filtering.VISIT_MEMORY_S`), and a day.
STORE_AGES_S = {"images": 6 * 3600.0, "cutouts": 6 * 3600.0, "packets": 3 * 86_400.0}
_SWEEP_INTERVAL_S = 600.0


class AccountVisits(beam.PTransform):
    """Write `folder/<visit>.json` when everything else of the visit is done.

    Input: VisitAlerts, filtered, distributed and archived. Output: the record as one JSON line. A
    revised visit rewrites its record whole. Everything counted as delivered was acknowledged or
    written before. No state.

    `store`, if given, is rid now and then of visits older than `STORE_AGES_S`.
    """

    def __init__(
        self,
        folder: str,
        *,
        streams: tuple[KafkaStream, ...],
        sink: AlertSink | None,
        delivery_deadline_s: float,
        store: str | None = None,
    ) -> None:
        super().__init__()
        self.account = _AccountFn(folder, streams, sink, delivery_deadline_s, store)

    def expand(self, visits: beam.PCollection) -> beam.PCollection:
        return visits | "WriteLedger" >> beam.ParDo(self.account).with_output_types(str)


class _AccountFn(SendingFn):
    def __init__(
        self,
        folder: str,
        streams: tuple[KafkaStream, ...],
        sink: AlertSink | None,
        delivery_deadline_s: float,
        store: str | None,
    ) -> None:
        super().__init__(sink, delivery_deadline_s)
        self.store = store
        self.folder = folder
        self.streams = streams

    def setup(self) -> None:
        super().setup()
        self.swept_at = time.monotonic()  # a job that goes on after a long pause first does what was left to do

    def process(self, visit: VisitAlerts) -> Iterator[str]:
        record = ledger_record(visit, self.streams if self.sink is not None else (), time.time())
        line = json.dumps(record, sort_keys=True)
        if self.sink is not None:
            self.sink.send(LEDGER_TOPIC, str(visit.visit).encode(), line.encode(), [])
            self.flush()
        write_bytes(Path(self.folder) / f"{visit.visit}.json", line.encode() + b"\n")
        if self.store is not None and time.monotonic() > self.swept_at + _SWEEP_INTERVAL_S:
            self.swept_at = time.monotonic()
            sweep_stores(Path(self.store), STORE_AGES_S)
        VISITS_ACCOUNTED.inc()
        yield line


def ledger_record(visit: VisitAlerts, streams: tuple[KafkaStream, ...], now: float) -> dict[str, Any]:
    """The ledger's record of a visit. `alerts_digest` is the SHA-256 of the packets' own, by diaSourceId."""
    summary = dict(visit.summary)
    started_at = summary.pop("started_at")
    digests = "".join(visit.alerts["packetDigest"].to_pylist())
    return {
        **summary,
        "alerts_digest": hashlib.sha256(digests.encode()).hexdigest(),
        "streams": {
            stream.topic: {"sent": len(visit.alerts) - summary["too_large"].get(stream.topic, 0)} for stream in streams
        },
        "failures": len(visit.failures),
        "latency_s": None if started_at is None else now - started_at,
    }


def finish_ledger(folder: Path) -> None:
    """Write `visits.jsonl`, the latest record of every visit in order of (midpoint, visit)."""
    records = [json.loads(path.read_text()) for path in folder.glob("[0-9]*.json")]
    records.sort(key=lambda record: (record["midpoint_mjd_tai"] or 0.0, record["visit"]))
    write_lines(folder / "visits.jsonl", [json.dumps(record, sort_keys=True).encode() for record in records])

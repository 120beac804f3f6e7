"""Failure records: how stages make them, and the stage that writes them down."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, TimerSpec, on_timer

from schemas.elements import FailureRecord, PassingElement, VisitPart
from schemas.framing import pack
from schemas.manifests import Visit
from transforms.metrics import FAILURES
from transforms.sending import AlertSink, SendingFn

FAILED = "failed"
FAILURES_TOPIC = "alert-failures"
NO_VISIT = 0
_LOG = logging.getLogger(__name__)


def failure_of(
    error: Exception, stage: str, visit: int | None, detector: int | None = None, *, lost: str
) -> FailureRecord:
    """A failure record of an exception."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return FailureRecord(visit, detector, stage, type(error).__name__, reason, lost)


def failure_line(record: FailureRecord) -> bytes:
    """One JSON line; equal records give equal lines."""
    return json.dumps(asdict(record), sort_keys=True).encode()


class StageFn(beam.DoFn):
    """A DoFn of detector space: works on its own elements and hands on every `PassingElement`.

    `stage` is its name in failure records.
    """

    stage: str

    def process(self, element: Any) -> Iterator[Any]:
        if isinstance(element, PassingElement):
            yield element
        else:
            yield from self.work(element)

    def work(self, element: Any) -> Iterator[Any]:
        """What the stage does with one element."""
        raise NotImplementedError


def failed_in(visit: Visit, record: FailureRecord) -> Iterator[Any]:
    """A failure on the way to visit space: to the stage's failed output, and as a part of its visit."""
    yield beam.pvalue.TaggedOutput(FAILED, record)
    yield VisitPart(visit.visit, visit.midpoint_mjd_tai, failure_part(record))


def failure_part(record: FailureRecord) -> bytes:
    """The part that says something of a visit failed."""
    return pack({"kind": "failure", "record": asdict(record)})


class CollectFailures(beam.PTransform):
    """Write the failure records of each visit to `folder/<visit>.jsonl`, and send them on the topic `alert-failures`.

    Input: FailureRecord. Output: the path of each file written. Key: visit (`NO_VISIT` for broken
    manifest lines, file `manifest.jsonl`). A repeated record is written once, and sent again only after a crash; a
    late one joins those in the file, which is written anew. State: the lines of a visit from when they come until
    the watermark passes it. Without a sink nothing is sent.
    """

    def __init__(self, folder: str, *, sink: AlertSink | None = None, delivery_deadline_s: float = 120.0) -> None:
        super().__init__()
        self.write = _WriteFailuresFn(folder, sink, delivery_deadline_s)

    def expand(self, records: beam.PCollection) -> beam.PCollection:
        return (
            records
            | "KeyFailuresByVisit" >> beam.Map(_keyed_line).with_output_types(tuple[int, bytes])
            | "WriteFailures" >> beam.ParDo(self.write).with_output_types(str)
        )


def _keyed_line(record: FailureRecord) -> tuple[int, bytes]:
    return (NO_VISIT if record.visit is None else record.visit, failure_line(record))


class _WriteFailuresFn(SendingFn):
    LINES = BagStateSpec("lines", BytesCoder())
    DUE = TimerSpec("failures_due", TimeDomain.WATERMARK)

    def __init__(self, folder: str, sink: AlertSink | None, delivery_deadline_s: float) -> None:
        super().__init__(sink, delivery_deadline_s)
        self.folder = folder

    def process(
        self,
        element: tuple[int, bytes],
        timestamp: beam.utils.timestamp.Timestamp = beam.DoFn.TimestampParam,
        lines: beam.transforms.userstate.AccumulatingRuntimeState = beam.DoFn.StateParam(LINES),
        due: beam.transforms.userstate.RuntimeTimer = beam.DoFn.TimerParam(DUE),
    ) -> None:
        lines.add(element[1])
        due.set(timestamp)

    @on_timer(DUE)
    def write(
        self,
        visit: int = beam.DoFn.KeyParam,
        lines: beam.transforms.userstate.AccumulatingRuntimeState = beam.DoFn.StateParam(LINES),
    ) -> Iterator[str]:
        fresh = {bytes(line) for line in lines.read()}
        if not fresh:
            return
        name = "manifest" if visit == NO_VISIT else str(visit)
        path = Path(self.folder) / f"{name}.jsonl"
        known = set(path.read_bytes().splitlines() if path.exists() else ())
        _tell(sorted(fresh - known))
        if self.sink is not None and fresh - known:
            for line in sorted(fresh - known):
                self.sink.send(FAILURES_TOPIC, str(visit).encode(), line, [])
            self.flush()
        write_lines(path, sorted(fresh | known))
        lines.clear()
        yield str(path)


def _tell(lines: list[bytes]) -> None:
    """Failure records that were not known before, to the log and to the metrics."""
    FAILURES.inc(len(lines))
    for line in lines:
        record = FailureRecord(**json.loads(line))
        about = {"stage": record.stage, "visit": record.visit, "detector": record.detector}
        _LOG.warning("%s: %s; lost: %s", record.error, record.reason, record.lost, extra=about)


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write lines to a file, atomically."""
    write_bytes(path, b"".join(line + b"\n" for line in lines))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    partial.write_bytes(content)
    partial.replace(path)


def decide_once(path: Path, content: bytes) -> bytes:
    """Write a file durably, unless it is there: of several workers the first decides. Returns what stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{threading.get_ident()}.{path.name}")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    with suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return path.read_bytes()

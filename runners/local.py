"""Runs the chain on Beam's in-process runner: claims the output folder, runs, closes the books."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from threadpoolctl import threadpool_limits

from pipelines.alert_production import AlertProduction, AlertProductionConfig
from runners.kafka import BrokerReader, BrokerReceipt, EmbeddedKafka, KafkaAlertSink, check_kafka
from schemas.avro.container import write_container
from schemas.avro.encodings import body_of_message
from schemas.avro.reading import packet_prefix
from schemas.avro.schema_versions import PacketSchema, packet_schema
from schemas.elements import FailureRecord
from schemas.manifests import ManifestError, read_manifest
from transforms.accounting import finish_ledger
from transforms.archiving import finish_object_tables
from transforms.association import read_history
from transforms.distribution import BrokerConfig
from transforms.failures import failure_line, write_bytes, write_lines
from transforms.filters.checking import CheckedFilter
from transforms.filters.definition import FilterProblem

EMBEDDED = "embedded"
NO_KAFKA = "none"
CLAIM = ".nightstream.json"
_READER_PATIENCE_S = 60.0


class OutputFolderError(ValueError):
    """The output folder belongs to something else."""


@dataclass(frozen=True)
class ProduceRequest:
    """What `nightstream produce` was asked for."""

    night: Path
    out: Path
    config: AlertProductionConfig
    brokers: tuple[BrokerConfig, ...]
    filters: tuple[CheckedFilter, ...]
    filter_problems: tuple[FilterProblem, ...] = ()
    history: tuple[Path, ...] = ()
    kafka: str = NO_KAFKA
    beam_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProduceResult:
    """How long it took, and what the embedded readers received."""

    seconds: float
    receipts: dict[str, BrokerReceipt]


def produce(
    request: ProduceRequest, progress: Callable[[int], contextlib.AbstractContextManager[object]]
) -> ProduceResult:
    """Run the whole chain on the local runner.

    Parameters
    ----------
    request : ProduceRequest
    progress : callable (n_visits) -> context manager
        Entered while the flow runs; watches the ledger.

    Raises
    ------
    ManifestError, OutputFolderError, FileNotFoundError, KafkaUnreachableError
        Before anything is written.
    RuntimeError
        The flow as a whole failed. The output folder can be given again: what was written stays good.
    """
    started = time.perf_counter()
    manifest = read_manifest(request.night)
    if not manifest.visits and not manifest.problems:
        raise ManifestError(f"{request.night}: visits.jsonl announces no visit")
    read_history(tuple(str(folder) for folder in request.history))
    claim_output(request)
    with contextlib.ExitStack() as stack:
        stack.enter_context(threadpool_limits(1))
        bootstrap = _bootstrap(request, stack)
        readers = _start_readers(request, bootstrap, stack) if request.kafka == EMBEDDED else {}
        with progress(len(manifest.visits)):
            _run(request, bootstrap)
        close_books(request)
        receipts = _stop_readers(request, readers)
    for folder in (".store", ".spool"):
        shutil.rmtree(request.out / folder, ignore_errors=True)
    return ProduceResult(time.perf_counter() - started, receipts)


def claim_output(request: ProduceRequest) -> None:
    """Mark the output folder as this input's; OutputFolderError if it is another's."""
    out = request.out
    claim = {"input": input_digest(request), "night": str(request.night)}
    path = out / CLAIM
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["input"] != claim["input"]:
            raise OutputFolderError(
                f"{out} holds the output of another input ({known['night']}): choose an empty folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise OutputFolderError(f"{out} is not empty and not an output folder of nightstream: choose an empty folder")
    write_bytes(path, json.dumps(claim, sort_keys=True).encode())


def input_digest(request: ProduceRequest) -> str:
    """SHA-256 over everything that decides what comes out; the order of manifest lines does not."""
    path = request.night if request.night.is_file() else request.night / "visits.jsonl"
    parts = [
        sorted(path.read_text(encoding="utf-8").splitlines()),
        asdict(request.config),
        [asdict(broker) for broker in request.brokers],
        [asdict(one.definition) for one in request.filters],
        [str(folder.resolve()) for folder in request.history],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def close_books(request: ProduceRequest) -> None:
    """What can only be written when the flow has ended."""
    finish_object_tables(request.out / "archive")
    finish_ledger(request.out / "ledger")
    if request.filter_problems:
        records = [
            FailureRecord(
                None,
                None,
                "filtering",
                "InvalidFilter",
                f"{problem.file}: {problem.key or 'file'}: {problem.reason}",
                "everything this filter would have passed",
            )
            for problem in request.filter_problems
        ]
        write_lines(request.out / "failures" / "filters.jsonl", [failure_line(record) for record in records])


def _bootstrap(request: ProduceRequest, stack: contextlib.ExitStack) -> str | None:
    if request.kafka == NO_KAFKA:
        return None
    if request.kafka == EMBEDDED:
        return stack.enter_context(EmbeddedKafka()).bootstrap
    check_kafka(request.kafka)
    return request.kafka


def _run(request: ProduceRequest, bootstrap: str | None) -> None:
    ephemerides = request.night / "ephemerides.parquet"
    production = AlertProduction(
        night=str(request.night),
        out=str(request.out),
        store=str(request.out / ".store"),
        config=request.config,
        brokers=request.brokers,
        filters=request.filters,
        ephemerides=str(ephemerides) if ephemerides.is_file() else None,
        history=tuple(str(folder) for folder in request.history),
        sink=None if bootstrap is None else KafkaAlertSink(bootstrap),
    )
    options = PipelineOptions(list(request.beam_options))
    with _quiet_beam():
        flow = beam.Pipeline(runner=FnApiRunner(), options=options)
        production.build(flow)
        flow.run().wait_until_finish()


@contextlib.contextmanager
def _quiet_beam() -> Iterator[None]:
    """Beam says a lot that is not for a person; errors still come through as exceptions."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _start_readers(
    request: ProduceRequest, bootstrap: str | None, stack: contextlib.ExitStack
) -> dict[str, tuple[BrokerConfig, BrokerReader]]:
    readers = {}
    for broker in request.brokers:
        if broker.sink == "kafka" and bootstrap is not None:
            reader = BrokerReader(
                broker.name, bootstrap, broker.kafka_topic, _VisitOf(broker.encoding), request.out / ".spool"
            )
            readers[broker.name] = (broker, stack.enter_context(reader))
    return readers


def _stop_readers(
    request: ProduceRequest, readers: dict[str, tuple[BrokerConfig, BrokerReader]]
) -> dict[str, BrokerReceipt]:
    delivered = delivered_per_broker(request.out)
    schema = packet_schema(request.config.packaging.schema_version)
    receipts = {}
    for name, (broker, reader) in readers.items():
        receipts[name] = reader.stop(delivered.get(name, 0), _READER_PATIENCE_S)
        reader.write(request.out / "brokers" / name, _ContainerOf(broker.encoding, schema))
    return receipts


def delivered_per_broker(out: Path) -> dict[str, int]:
    """Alerts that the ledger says each broker was sent."""
    totals: dict[str, int] = {}
    for line in (out / "ledger" / "visits.jsonl").read_text(encoding="utf-8").splitlines():
        for name, count in json.loads(line)["delivered"].items():
            totals[name] = totals.get(name, 0) + count
    return totals


@dataclass(frozen=True)
class _VisitOf:
    """The visit of a message, whatever its encoding."""

    encoding: str

    def __call__(self, value: bytes) -> int:
        return packet_prefix(body_of_message(self.encoding, value)).visit


@dataclass(frozen=True)
class _ContainerOf:
    """Writes messages as received into one Avro container."""

    encoding: str
    schema: PacketSchema

    def __call__(self, path: Path, values: Iterable[bytes]) -> None:
        write_container(path, self.schema, (body_of_message(self.encoding, value) for value in values))

"""Runs the chain on Beam's in-process runner: claims the output folder, runs, closes the books."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from threadpoolctl import threadpool_limits

from pipelines.alert_production import AlertProduction, AlertProductionConfig
from runners.kafka import BrokerReader, BrokerReceipt, EmbeddedKafka, KafkaAlertSink, check_kafka
from schemas.avro.container import write_container
from schemas.avro.encodings import body_of_message
from schemas.avro.reading import packet_prefix
from schemas.avro.schema_versions import PacketSchema, packet_schema
from schemas.elements import FailureRecord
from schemas.manifests import Manifest, ManifestError, manifest_lines, night_folder, read_manifest
from transforms.accounting import finish_ledger
from transforms.archiving import finish_object_tables
from transforms.association import read_history
from transforms.distribution import BrokerConfig
from transforms.failures import failure_line, failure_of, write_bytes, write_lines
from transforms.filters.checking import CheckedFilter
from transforms.filters.definition import FilterProblem
from transforms.solar_system import EphemeridesError, read_ephemerides

EMBEDDED = "embedded"
NO_KAFKA = "none"
CLAIM = ".nightstream.json"
_READER_PATIENCE_S = 60.0
_HEAD_BYTES = 32_768


Run = Callable[[AlertProduction], None]


class OutputFolderError(ValueError):
    """The output folder belongs to something else, or cannot be written."""


class HistoryError(ValueError):
    """A folder given as history that is none."""


class BeamOptionsError(ValueError):
    """Options behind `--` that Apache Beam does not know."""


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
    request: ProduceRequest,
    progress: Callable[[int], contextlib.AbstractContextManager[object]],
    engine: contextlib.AbstractContextManager[Run] | None = None,
) -> ProduceResult:
    """Run the whole chain.

    Parameters
    ----------
    request : ProduceRequest
    progress : callable (n_visits) -> context manager
        Entered while the flow runs; watches the ledger.
    engine : context manager of a Run
        Where it runs; None for the local runner.

    Raises
    ------
    ManifestError, OutputFolderError, HistoryError, BeamOptionsError, KafkaUnreachableError
        Before anything is written.
    RuntimeError
        The flow as a whole failed. The output folder can be given again: what was written stays good.
    """
    started = time.perf_counter()
    manifest = read_manifest(request.night)
    if not manifest.visits and not manifest.problems:
        raise ManifestError(f"{request.night}: visits.jsonl announces no visit")
    check_history(request)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(engine or local_engine(request.beam_options))
        stack.enter_context(threadpool_limits(1))
        bootstrap = _bootstrap(request, stack)
        claim_output(request, manifest)
        # What a broken-off run left is made again: it may be another release's.
        for folder in (".store", "brokers"):
            shutil.rmtree(request.out / folder, ignore_errors=True)
        ephemerides, problem = usable_ephemerides(request.night)
        readers = _start_readers(request, bootstrap, stack) if request.kafka == EMBEDDED else {}
        with progress(len(manifest.visits)):
            run(_production(request, bootstrap, ephemerides))
        close_books(request, () if problem is None else (problem,))
        check_books(request.out, manifest)
        receipts = _stop_readers(request, readers)
    for folder in (".store", ".spool"):
        shutil.rmtree(request.out / folder, ignore_errors=True)
    return ProduceResult(time.perf_counter() - started, receipts)


def check_history(request: ProduceRequest) -> None:
    """HistoryError unless every folder of the history is the output of another run."""
    for folder in request.history:
        if folder.resolve() == request.out.resolve():
            raise HistoryError(f"--history {folder} is the output folder of this run")
    try:
        read_history(tuple(str(folder) for folder in request.history))
    except (OSError, ValueError, KeyError) as error:
        raise HistoryError(f"--history {', '.join(str(folder) for folder in request.history)}: {error}") from error


def parsed_options(arguments: tuple[str, ...]) -> PipelineOptions:
    """The options behind `--`, unknown ones among them; BeamOptionsError for what is no option or a bad value."""
    if arguments and not arguments[0].startswith("-"):
        raise BeamOptionsError(f"unexpected {arguments[0]}: only options of Apache Beam follow `--`")
    with _argparse_raising():
        options = PipelineOptions(list(arguments))
        options.get_all_options()
    return options


def beam_options(
    arguments: tuple[str, ...], add_known: Callable[[argparse.ArgumentParser], None] | None = None
) -> PipelineOptions:
    """The options behind `--`; BeamOptionsError names those that neither Beam nor `add_known` knows."""
    options = parsed_options(arguments)
    with _argparse_raising():
        known = set(options.get_all_options(add_extra_args_fn=add_known))
        unknown = set(options.get_all_options(add_extra_args_fn=add_known, retain_unknown_options=True)) - known
    if options.view_as(DirectOptions).direct_running_mode == "multi_threading":
        raise BeamOptionsError("direct_running_mode=multi_threading loses elements of stateful stages in this Beam")
    if unknown:
        raise BeamOptionsError(f"unexpected {', '.join(sorted(unknown))}: only options of Apache Beam follow `--`")
    return options


@contextlib.contextmanager
def _argparse_raising() -> Iterator[None]:
    """Argparse ends the program at a bad value; here that is a BeamOptionsError."""
    with quiet_beam(), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except SystemExit as error:
            raise BeamOptionsError(f"Apache Beam: {said.getvalue().rpartition('error: ')[2].strip()}") from error


@contextlib.contextmanager
def local_engine(arguments: tuple[str, ...]) -> Iterator[Run]:
    """Beam's in-process runner, with the options behind `--`."""
    options = beam_options(arguments)

    def run(production: AlertProduction) -> None:
        with quiet_beam():
            flow = beam.Pipeline(runner=FnApiRunner(), options=options)
            production.build(flow)
            try:
                flow.run().wait_until_finish()
            except RuntimeError:
                raise
            except Exception as error:  # Beam passes on whatever a worker raised
                raise RuntimeError(f"{type(error).__name__}: {error}") from error

    yield run


def usable_ephemerides(night: Path) -> tuple[str | None, FailureRecord | None]:
    """The night's ephemerides; without them, or with broken ones, the night goes on."""
    path = night_folder(night) / "ephemerides.parquet"
    if not path.is_file():
        return None, None
    try:
        read_ephemerides(str(path))
    except EphemeridesError as error:
        return None, failure_of(error, "solar_system", None, lost="solar-system association of the night")
    return str(path), None


def claim_output(request: ProduceRequest, manifest: Manifest) -> None:
    """Mark the output folder as this input's; OutputFolderError if it is another's or cannot be written.

    Failure records of an earlier attempt go: this one writes its own.
    """
    out = request.out
    claim = {"input": input_digest(request, manifest), "night": str(request.night)}
    path = out / CLAIM
    try:
        if path.is_file():
            known = _read_claim(path)
            if known["input"] != claim["input"]:
                raise OutputFolderError(
                    f"{out} holds the output of another input ({known['night']}): choose an empty folder"
                )
        elif out.exists() and any(out.iterdir()):
            raise OutputFolderError(
                f"{out} is not empty and not an output folder of nightstream: choose an empty folder"
            )
        write_bytes(path, json.dumps(claim, sort_keys=True).encode())
        shutil.rmtree(out / "failures", ignore_errors=True)
    except OSError as error:
        raise OutputFolderError(f"{out} cannot be written: {error}") from error


def _read_claim(path: Path) -> dict[str, str]:
    try:
        claim = json.loads(path.read_text(encoding="utf-8"))
        return {"input": str(claim["input"]), "night": str(claim["night"])}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputFolderError(f"{path} is broken ({error}): choose an empty folder") from error


def input_digest(request: ProduceRequest, manifest: Manifest) -> str:
    """SHA-256 over everything that decides what comes out.

    The order of manifest lines does not, unless some cannot be used: of two that contradict each other
    the first stands. Of images the size and the beginning count: to read all of a night twice is too dear.
    """
    lines = manifest_lines(request.night)
    folder = night_folder(request.night)
    images = {path for visit in manifest.visits for one in visit.detectors for path in (one.science, one.template)}
    beside = [str(folder / "ephemerides.parquet")]
    parts = [
        lines if manifest.problems else sorted(lines),
        [_fingerprint(Path(path)) for path in sorted(path for path in images if path is not None) + beside],
        asdict(request.config),
        [asdict(broker) for broker in request.brokers],
        [asdict(one.definition) for one in request.filters],
        [_history_digest(folder) for folder in request.history],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _fingerprint(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            return f"{path.stat().st_size}-{hashlib.sha256(stream.read(_HEAD_BYTES)).hexdigest()}"
    except OSError:
        return None


def _history_digest(folder: Path) -> str:
    """What the folder was made from, or its name where it does not say."""
    path = folder / CLAIM
    return _read_claim(path)["input"] if path.is_file() else str(folder.resolve())


def close_books(request: ProduceRequest, problems: tuple[FailureRecord, ...] = ()) -> None:
    """What can only be written when the flow has ended; `problems` are those of the night as a whole."""
    finish_object_tables(request.out / "archive")
    finish_ledger(request.out / "ledger")
    left_out = tuple(
        FailureRecord(
            None,
            None,
            "filtering",
            "InvalidFilter",
            f"{problem.file}: {problem.key or 'file'}: {problem.reason}",
            "everything this filter would have passed",
        )
        for problem in request.filter_problems
    )
    for name, records in (("filters", left_out), ("night", problems)):
        if records:
            write_lines(request.out / "failures" / f"{name}.jsonl", [failure_line(record) for record in records])


def check_books(out: Path, manifest: Manifest) -> None:
    """RuntimeError unless the ledger knows every announced visit and what became of every source in it."""
    records = {}
    for line in (out / "ledger" / "visits.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["visit"]] = record
    missing = [visit.visit for visit in manifest.visits if visit.visit not in records]
    if missing:
        raise RuntimeError(f"the ledger has no record of {len(missing)} visits, the first is {missing[0]}")
    for visit, record in records.items():
        selected, alerts = record["dia_sources"]["selected"], record["alerts"]
        if selected != alerts + record["sources_without_object"] and not record["failures"]:
            raise RuntimeError(
                f"visit {visit}: {selected} sources were selected, but {alerts} became alerts and "
                f"{record['sources_without_object']} stayed without an object"
            )


def _bootstrap(request: ProduceRequest, stack: contextlib.ExitStack) -> str | None:
    if request.kafka == NO_KAFKA:
        return None
    if request.kafka == EMBEDDED:
        return stack.enter_context(EmbeddedKafka()).bootstrap
    check_kafka(request.kafka)
    return request.kafka


def _production(request: ProduceRequest, bootstrap: str | None, ephemerides: str | None) -> AlertProduction:
    return AlertProduction(
        night=str(request.night),
        out=str(request.out),
        store=str(request.out / ".store"),
        config=request.config,
        brokers=request.brokers,
        filters=request.filters,
        ephemerides=ephemerides,
        history=tuple(str(folder) for folder in request.history),
        sink=None if bootstrap is None else KafkaAlertSink(bootstrap),
    )


@contextlib.contextmanager
def quiet_beam() -> Iterator[None]:
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

"""One run of a pipeline: claims the output folder, starts Kafka and its readers, runs, closes the books."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from pipelines.alert_production import AlertProductionConfig
from runners.kafka import (
    BrokerReader,
    BrokerReceipt,
    EmbeddedKafka,
    KafkaAlertSink,
    KafkaSinkSettings,
    check_kafka,
    check_topics,
)
from runners.local import Dataflow, Run
from runners.output_folder import (
    SCRATCH,
    check_books,
    check_output,
    claim_output,
    clear_scratch,
    close_books,
    delivered_per_broker,
    digest_of,
    remove_scratch,
)
from schemas.avro.adaptation import adapt_packet
from schemas.avro.messages import is_json, packet_of, write_messages
from schemas.avro.reading import decode_body, decode_json, packet_prefix
from schemas.avro.schema_versions import PACKET_SCHEMA_IDS
from schemas.elements import FailureRecord
from schemas.manifests import Manifest
from transforms.accounting import LEDGER_TOPIC
from transforms.delivery import Delivery
from transforms.distribution import BrokerConfig, topic_sizes
from transforms.failures import FAILURES_TOPIC
from transforms.filters.checking import CheckedFilter
from transforms.filters.definition import FilterProblem

EMBEDDED = "embedded"
NO_KAFKA = "none"
_READER_PATIENCE_S = 60.0


@dataclass(frozen=True)
class RunRequest:
    """What `produce`, `associate` and `replay` are asked for alike. `login` is the path of a login to Kafka."""

    out: Path
    config: AlertProductionConfig
    brokers: tuple[BrokerConfig, ...]
    filters: tuple[CheckedFilter, ...]
    filter_problems: tuple[FilterProblem, ...] = ()
    kafka: str = NO_KAFKA
    login: str | None = None


@dataclass(frozen=True)
class Entry:
    """An entry into the chain, ready to run.

    Attributes
    ----------
    manifest : the visits to come
    dataflow : makes the pipeline, given who gets what
    brokers : those of the request, as they are served from this entry
    problems : what is wrong with the input as a whole; the run goes on without it
    """

    manifest: Manifest
    dataflow: Callable[[Delivery], Dataflow]
    brokers: tuple[BrokerConfig, ...]
    problems: tuple[FailureRecord, ...] = ()


@dataclass(frozen=True)
class RunInput:
    """What a run starts from.

    Attributes
    ----------
    source : its name, for messages
    digest_parts : all of it that decides what comes out
    enter : opens it, given a folder for files that the flow needs as long as it runs
    """

    source: str
    digest_parts: list[Any]
    enter: Callable[[Path], Entry]


@dataclass(frozen=True)
class RunResult:
    """How long it took, and what the embedded readers received."""

    seconds: float
    receipts: dict[str, BrokerReceipt]


def run_chain(
    request: RunRequest,
    given: RunInput,
    progress: Callable[[int], contextlib.AbstractContextManager[object]],
    engine: contextlib.AbstractContextManager[Run],
) -> RunResult:
    """Run the chain from one of its entries.

    Parameters
    ----------
    request : RunRequest
    given : RunInput
    progress : callable (n_visits) -> context manager
        Entered while the flow runs; watches the ledger.
    engine : context manager of a Run
        Where it runs.

    Raises
    ------
    ManifestError, OutputFolderError, BeamOptionsError, KafkaUnreachableError, KafkaLoginError, TopicError
        Before anything of an earlier output is touched.
    RuntimeError
        The flow as a whole failed. The output folder can be given again: what was written stays good.
    """
    started = time.perf_counter()
    out = request.out
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(engine)
        stack.enter_context(threadpool_limits(1))
        bootstrap = _bootstrap(request, stack)
        entry = claimed_entry(request, given, bootstrap)
        delivery = delivery_of(request, entry, bootstrap)
        readers = _start_readers(delivery, str(bootstrap), stack) if request.kafka == EMBEDDED else {}
        with progress(len(entry.manifest.visits)):
            run(entry.dataflow(delivery))
        close_books(out, request.filter_problems, entry.problems)
        check_books(out, entry.manifest)
        receipts = _stop_readers(out, readers)
    remove_scratch(out)
    return RunResult(time.perf_counter() - started, receipts)


def claimed_entry(request: RunRequest, given: RunInput, bootstrap: str | None) -> Entry:
    """The input opened for a run from its beginning, in a fresh scratch folder, and the output folder claimed for it.

    Nothing stays behind where it cannot be opened. Raises OutputFolderError, TopicError if the Kafka at `bootstrap`
    does not take what is to be sent, and what opening the input raises.
    """
    out, digest = request.out, run_digest(request, given)
    check_output(out, digest)
    clear_scratch(out)
    try:
        entry = entered(request, given, bootstrap)
    except BaseException:
        remove_scratch(out)
        with contextlib.suppress(OSError):
            out.rmdir()
        raise
    claim_output(out, given.source, digest)
    return entry


def entered(request: RunRequest, given: RunInput, bootstrap: str | None) -> Entry:
    """The input opened, with the scratch folder as it is; raises as `claimed_entry`."""
    entry = given.enter(request.out / SCRATCH[0])
    if bootstrap is not None:
        check_topics(bootstrap, request.login, {**topic_sizes(entry.brokers), LEDGER_TOPIC: 0, FAILURES_TOPIC: 0})
    return entry


def delivery_of(request: RunRequest, entry: Entry, bootstrap: str | None) -> Delivery:
    """Who gets what, with Kafka streams to `bootstrap` unless that is None."""
    return Delivery(
        out=str(request.out),
        store=str(request.out / SCRATCH[0]),
        brokers=entry.brokers,
        filters=request.filters,
        sink=None if bootstrap is None else _sink(bootstrap, request.login, entry.brokers),
        deadline_s=request.config.packaging.delivery_deadline_s,
    )


def run_digest(request: RunRequest, given: RunInput) -> str:
    """Digest of all that decides what comes out."""
    return digest_of(
        [
            *given.digest_parts,
            [
                asdict(request.config),
                [asdict(broker) for broker in request.brokers],
                [asdict(one.definition) for one in request.filters],
            ],
        ]
    )


def _bootstrap(request: RunRequest, stack: contextlib.ExitStack) -> str | None:
    if request.kafka == EMBEDDED:
        return stack.enter_context(EmbeddedKafka()).bootstrap
    return reached_kafka(request)


def reached_kafka(request: RunRequest) -> str | None:
    """The Kafka broker that streams are sent to, which has answered; None if they are not sent."""
    if request.kafka == NO_KAFKA:
        return None
    check_kafka(request.kafka, login=request.login)
    return request.kafka


def _sink(bootstrap: str, login: str | None, brokers: tuple[BrokerConfig, ...]) -> KafkaAlertSink:
    # A batch is a message to Kafka: none may be larger than the smallest topic takes.
    settings = KafkaSinkSettings()
    batch_bytes = min([settings.batch_bytes, *topic_sizes(brokers).values()])
    return KafkaAlertSink(bootstrap, replace(settings, batch_bytes=batch_bytes), login)


def _start_readers(delivery: Delivery, bootstrap: str, stack: contextlib.ExitStack) -> dict[str, BrokerReader]:
    spool = Path(delivery.out) / ".spool"
    return {
        broker.name: stack.enter_context(BrokerReader(broker.name, bootstrap, broker.kafka_topic, _visit_of, spool))
        for broker in delivery.brokers
        if broker.sink == "kafka"
    }


def _stop_readers(out: Path, readers: dict[str, BrokerReader]) -> dict[str, BrokerReceipt]:
    delivered = delivered_per_broker(out)
    receipts = {}
    for name, reader in readers.items():
        receipts[name] = reader.stop(delivered.get(name, 0), _READER_PATIENCE_S)
        reader.write(out / "brokers" / name, write_messages)
    return receipts


def _visit_of(message: bytes) -> int:
    """The visit of a message, whatever its encoding and survey."""
    if is_json(message):
        return int(decode_json(message)["visit"])
    packet = packet_of(message)
    if packet.schema.schema_id in PACKET_SCHEMA_IDS:
        return packet_prefix(packet.body).visit
    return adapt_packet(decode_body(packet.schema, packet.body)).visit

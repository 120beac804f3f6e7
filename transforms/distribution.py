"""DistributeAlerts: filtered streams and files, encodings, and what a sink has to promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import apache_beam as beam
import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from schemas.avro.messages import encoded, message_headers, write_messages
from schemas.claim_check import BlobFile
from schemas.elements import VisitAlerts
from transforms.failures import FAILED, failure_of

STAGE = "distribution"
FULL_STREAM = "full"
Encoding = Literal["rubin", "ocf"]
Headers = list[tuple[str, bytes]]


class AlertSink(Protocol):
    """Where messages go. Picklable; opened once per worker.

    `send` may return before delivery; `flush` returns only when everything sent was acknowledged and
    raises otherwise.
    """

    def open(self) -> None: ...

    def send(self, topic: str, key: bytes | None, value: bytes, headers: Headers) -> None: ...

    def flush(self, deadline_s: float) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class BrokerLimits:
    """What a broker may draw: its bandwidth quota, for whoever sets quotas on the Kafka broker."""

    bytes_per_second: int = Field(default=25_000_000, gt=0)


@dataclass(frozen=True)
class BrokerConfig:
    """One community broker: which stream it gets, how encoded, where to."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    stream: str = Field(default=FULL_STREAM, pattern=r"^(full|[a-z0-9][a-z0-9-]*\.[a-z0-9][a-z0-9-]*)$")
    encoding: Encoding = "rubin"
    sink: Literal["kafka", "files"] = "kafka"
    topic: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,200}$")
    limits: BrokerLimits = Field(default_factory=BrokerLimits)

    @model_validator(mode="after")
    def _topic_where_it_is_needed(self) -> BrokerConfig:
        if self.sink == "kafka" and self.stream == FULL_STREAM and self.topic is None:
            raise ValueError(f"broker {self.name}: a full stream to Kafka needs a topic")
        return self

    @property
    def kafka_topic(self) -> str:
        """The topic this broker reads."""
        return self.topic or filter_topic(self.stream)


class FullStream(NamedTuple):
    """A full stream on Kafka; brokers with the same topic share it."""

    topic: str
    encoding: Encoding


class DistributionResult(NamedTuple):
    """`good`: VisitAlerts with what was delivered; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


def filter_topic(stream: str) -> str:
    """Topic of a filtered stream `<owner>.<filter>`."""
    return "filter-" + stream.replace(".", "-", 1)


def full_streams(brokers: tuple[BrokerConfig, ...]) -> tuple[FullStream, ...]:
    """The distinct full streams that brokers read from Kafka.

    Raises
    ------
    ValueError
        One topic asked for in two encodings, or two streams on one topic.
    """
    streams: dict[str, tuple[str, Encoding]] = {}
    for broker in brokers:
        if broker.sink != "kafka":
            continue
        wanted = (broker.stream, broker.encoding)
        known = streams.setdefault(broker.kafka_topic, wanted)
        if known != wanted:
            raise ValueError(
                f"topic {broker.kafka_topic} is wanted as {known[0]} in {known[1]} and, by broker {broker.name}, "
                f"as {broker.stream} in {broker.encoding}: a topic holds one stream in one encoding"
            )
    return tuple(FullStream(topic, encoding) for topic, (stream, encoding) in streams.items() if stream == FULL_STREAM)


def send_full_streams(sink: AlertSink, streams: tuple[FullStream, ...], thin: pa.Table, messages: list[bytes]) -> None:
    """Send the packets of a thin table on every full stream, each in the stream's encoding.

    Key: the id of the object as text. Header `dia_source_id`: that of the packet, by which readers drop repeats.
    """
    ids, keys = thin["diaSourceId"].to_pylist(), thin["kafkaKey"].to_pylist()
    for stream in streams:
        for dia_source_id, key, message in zip(ids, keys, messages, strict=True):
            _send(sink, stream.topic, stream.encoding, dia_source_id, key, message)


def _send(sink: AlertSink, topic: str, encoding: str, dia_source_id: int, key: str, message: bytes) -> None:
    value = encoded(encoding, message)
    headers = [("dia_source_id", str(dia_source_id).encode()), *message_headers(value)]
    sink.send(topic, key.encode(), value, headers)


class DistributeAlerts(beam.PTransform):
    """Write file sinks and filter folders, send filtered streams.

    Input: VisitAlerts (filters done). Output `good`: the same with delivery counts in its summary;
    `failed`: a broker that could not be served (the others are). A revised visit rewrites its files
    and sends again only the rows of its new revision. Kafka deliveries are acknowledged before the
    element goes on. No state.
    """

    def __init__(
        self,
        brokers: tuple[BrokerConfig, ...],
        *,
        packet_folder: str,
        broker_folder: str,
        filter_folder: str,
        sink: AlertSink | None,
        delivery_deadline_s: float,
    ) -> None:
        super().__init__()
        self.distribute = _DistributeAlertsFn(
            brokers, packet_folder, broker_folder, filter_folder, sink, delivery_deadline_s
        )

    def expand(self, visits: beam.PCollection) -> DistributionResult:
        outputs = visits | "ServeBrokers" >> beam.ParDo(self.distribute).with_output_types(VisitAlerts).with_outputs(
            FAILED, main="good"
        )
        return DistributionResult(outputs.good, outputs[FAILED])


class _DistributeAlertsFn(beam.DoFn):
    def __init__(
        self,
        brokers: tuple[BrokerConfig, ...],
        packet_folder: str,
        broker_folder: str,
        filter_folder: str,
        sink: AlertSink | None,
        delivery_deadline_s: float,
    ) -> None:
        self.brokers = brokers
        self.packet_folder = packet_folder
        self.broker_folder = broker_folder
        self.filter_folder = filter_folder
        self.sink = sink
        self.delivery_deadline_s = delivery_deadline_s

    def setup(self) -> None:
        if self.sink is not None:
            self.sink.open()

    def teardown(self) -> None:
        if self.sink is not None:
            self.sink.close()

    def process(self, visit: VisitAlerts) -> Iterator[Any]:
        delivered: dict[str, int] = {}
        failures = []
        for name, ids in sorted(visit.passed.items()):
            try:
                self._write_packets(visit, np.sort(ids), Path(self.filter_folder) / name / f"{visit.visit}.avro")
            except (OSError, ValueError) as error:
                failures.append(failure_of(error, STAGE, visit.visit, lost=f"filter {name}: {len(ids)} packets"))
        sent_topics: set[str] = set()
        for broker in self.brokers:
            ids = _stream_ids(visit, broker.stream)
            try:
                delivered[broker.name] = self._serve(visit, broker, ids, sent_topics)
            except (OSError, ValueError) as error:  # delivery errors are others: they stop the bundle
                delivered[broker.name] = 0
                failures.append(failure_of(error, STAGE, visit.visit, lost=f"{len(ids)} packets to {broker.name}"))
        if self.sink is not None:
            self.sink.flush(self.delivery_deadline_s)
        yield from (beam.pvalue.TaggedOutput(FAILED, failure) for failure in failures)
        summary = {**visit.summary, "delivered": delivered}
        yield replace(visit, summary=summary, failures=visit.failures + tuple(failures))

    def _serve(self, visit: VisitAlerts, broker: BrokerConfig, ids: np.ndarray, sent_topics: set[str]) -> int:
        if broker.sink == "files":
            self._write_packets(visit, np.sort(ids), Path(self.broker_folder) / broker.name / f"{visit.visit}.avro")
            return len(ids)
        if self.sink is None:
            return 0
        # Full streams left with packaging; of filtered ones each topic is sent once.
        if broker.stream != FULL_STREAM and broker.kafka_topic not in sent_topics:
            sent_topics.add(broker.kafka_topic)
            self._send_filtered(self.sink, visit, broker, ids)
        return len(ids)

    def _send_filtered(self, sink: AlertSink, visit: VisitAlerts, broker: BrokerConfig, ids: np.ndarray) -> None:
        table = visit.alerts
        row_of = {int(key): row for row, key in enumerate(table["diaSourceId"].to_numpy())}
        rows = np.array([row_of[int(key)] for key in ids], dtype=np.int64)
        rows = rows[table["revision"].to_numpy()[rows] == visit.revision]
        keys = table["kafkaKey"].take(pa.array(rows)).to_pylist()
        fresh = table["diaSourceId"].to_numpy()[rows]
        messages = list(self._messages(visit, fresh))  # what cannot be read is known before the first is sent
        for dia_source_id, key, message in zip(fresh, keys, messages, strict=True):
            _send(sink, broker.kafka_topic, broker.encoding, int(dia_source_id), key, message)

    def _write_packets(self, visit: VisitAlerts, ids: np.ndarray, path: Path) -> None:
        if len(ids) == 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_messages(path, self._messages(visit, ids))

    def _messages(self, visit: VisitAlerts, ids: np.ndarray) -> Iterator[bytes]:
        return packet_messages(visit, ids, self.packet_folder)


def _stream_ids(visit: VisitAlerts, stream: str) -> np.ndarray:
    if stream == FULL_STREAM:
        return visit.alerts["diaSourceId"].to_numpy()
    return visit.passed.get(stream, np.empty(0, dtype=np.int64))


def packet_messages(visit: VisitAlerts, ids: np.ndarray, packet_folder: str) -> Iterator[bytes]:
    """Finished packets of a visit, as messages, from the packet store, in the order of `ids`, one at a time."""
    file_of = dict(zip(visit.alerts["diaSourceId"].to_pylist(), visit.alerts["packetFile"].to_pylist(), strict=True))
    files: dict[str, BlobFile] = {}
    for dia_source_id in ids.tolist():
        name = file_of[dia_source_id]
        if name not in files:
            files[name] = BlobFile(Path(packet_folder) / name)
        ((message,),) = files[name].read([dia_source_id])
        yield message

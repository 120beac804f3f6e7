"""DistributeAlerts: filtered streams and files, and their encodings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from schemas.avro.messages import JSON_THIN, message_headers, record_key, write_messages
from schemas.avro.trimming import fitting_value
from schemas.avro.wire import PacketFormatError
from schemas.claim_check import BlobFile
from schemas.elements import FailureRecord, VisitAlerts
from transforms.alert_columns import thin_json
from transforms.failures import FAILED, failure_of
from transforms.metrics import FILTERED_BYTES_ACKNOWLEDGED, FILTERED_PACKETS_ACKNOWLEDGED
from transforms.sending import AlertSink, SendingFn

STAGE = "distribution"
FULL_STREAM = "full"
ZTF_TOPIC = "ztf-alerts"  # of replayed packets of ZTF, on every full stream
Encoding = Literal["rubin", "ocf", "fink", "json-thin"]
# What Kafka counts of a message besides key and value: headers, lengths, the frame of its batch.
_RECORD_BYTES = 1000


@dataclass(frozen=True)
class BrokerLimits:
    """What a broker may draw, for whoever provisions the Kafka broker, and the largest message of its topic.

    Of brokers that share a topic the smallest `message_bytes` holds.
    """

    bytes_per_second: int = Field(default=25_000_000, gt=0)
    message_bytes: int = Field(default=5_000_000, ge=50_000, le=10_000_000)


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


class KafkaStream(NamedTuple):
    """A stream on Kafka, and the largest message of its topic; brokers with the same topic share it."""

    topic: str
    encoding: Encoding
    message_bytes: int


class Shipment:
    """What became of the messages of some alerts.

    Attributes
    ----------
    trimmed, too_large : by topic, how many lost part of their history, and how many could not be sent
    failures : those that could not be sent
    """

    def __init__(self) -> None:
        self.trimmed: Counter[str] = Counter()
        self.too_large: Counter[str] = Counter()
        self.failures: list[FailureRecord] = []

    @classmethod
    def resumed(cls, summary: Mapping[str, Any]) -> Shipment:
        """One that goes on counting from the counts in the summary of a visit."""
        shipment = cls()
        shipment.trimmed.update(summary["trimmed"])
        shipment.too_large.update(summary["too_large"])
        return shipment

    def counts(self) -> dict[str, dict[str, int]]:
        """Both counts by their names, as the summary of a visit keeps them."""
        return {"trimmed": dict(self.trimmed), "too_large": dict(self.too_large)}


class DistributionResult(NamedTuple):
    """`good`: VisitAlerts with what was delivered; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


def filter_topic(stream: str) -> str:
    """Topic of a filtered stream `<owner>.<filter>`."""
    return "filter-" + stream.replace(".", "-", 1)


def full_streams(brokers: tuple[BrokerConfig, ...]) -> tuple[KafkaStream, ...]:
    """The distinct full streams that brokers read from Kafka.

    Raises
    ------
    ValueError
        One topic asked for in two encodings, or two streams on one topic.
    """
    streams: dict[str, tuple[str, Encoding]] = {}
    sizes = topic_sizes(brokers)
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
    return tuple(
        KafkaStream(topic, encoding, sizes[topic])
        for topic, (stream, encoding) in streams.items()
        if stream == FULL_STREAM
    )


def topic_sizes(brokers: tuple[BrokerConfig, ...]) -> dict[str, int]:
    """The largest message of each Kafka topic that brokers read, in bytes."""
    sizes: dict[str, int] = {}
    for broker in brokers:
        if broker.sink == "kafka":
            size = broker.limits.message_bytes
            sizes[broker.kafka_topic] = min(size, sizes.get(broker.kafka_topic, size))
    return sizes


def send_full_streams(
    sink: AlertSink,
    streams: tuple[KafkaStream, ...],
    visit: int,
    thin: pa.Table,
    messages: list[bytes],
    shipment: Shipment,
) -> None:
    """Send the packets of a thin table on every full stream, each in the stream's encoding.

    Key: the id of the object as text, in `fink` the schema. Headers: `dia_source_id`, that of the packet, by which
    readers drop repeats; `trimmed`, what was left out of a packet that was too large, such as
    `prvDiaForcedSources=120`. What becomes of them is added to `shipment`.
    """
    ids, keys = thin["diaSourceId"].to_pylist(), thin["kafkaKey"].to_pylist()
    for stream in streams:
        sent = thin_json(thin) if stream.encoding == JSON_THIN else messages
        for dia_source_id, key, message in zip(ids, keys, sent, strict=True):
            _send(sink, stream, visit, dia_source_id, key, message, shipment)


def _send(
    sink: AlertSink | None,
    stream: KafkaStream,
    visit: int,
    dia_source_id: int,
    key: str,
    message: bytes,
    shipment: Shipment,
) -> None:
    record = record_key(stream.encoding, message, key)
    try:
        most = stream.message_bytes - len(record) - _RECORD_BYTES
        value, left_out = fitting_value(stream.encoding, message, most)
    except PacketFormatError as error:
        shipment.too_large[stream.topic] += 1
        lost = f"packet {dia_source_id} on topic {stream.topic}"
        shipment.failures.append(failure_of(error, STAGE, visit, lost=lost))
        return
    headers = [("dia_source_id", str(dia_source_id).encode()), *message_headers(value)]
    if left_out:
        shipment.trimmed[stream.topic] += 1
        headers.append(("trimmed", ",".join(f"{name}={n}" for name, n in left_out.items()).encode()))
    if sink is not None:
        sink.send(stream.topic, record, value, headers)


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


class _DistributeAlertsFn(SendingFn):
    def __init__(
        self,
        brokers: tuple[BrokerConfig, ...],
        packet_folder: str,
        broker_folder: str,
        filter_folder: str,
        sink: AlertSink | None,
        delivery_deadline_s: float,
    ) -> None:
        super().__init__(sink, delivery_deadline_s)
        self.brokers = brokers
        self.sizes = topic_sizes(brokers)
        self.packet_folder = packet_folder
        self.broker_folder = broker_folder
        self.filter_folder = filter_folder

    def process(self, visit: VisitAlerts) -> Iterator[Any]:
        delivered: dict[str, int] = {}
        failures = []
        for name, ids in sorted(visit.passed.items()):
            try:
                self._write_packets(visit, np.sort(ids), Path(self.filter_folder) / name / f"{visit.visit}.avro")
            except (OSError, ValueError) as error:
                failures.append(failure_of(error, STAGE, visit.visit, lost=f"filter {name}: {len(ids)} packets"))
        shipment = Shipment.resumed(visit.summary)
        sent_topics: set[str] = set()
        for broker in self.brokers:
            ids = _stream_ids(visit, broker.stream)
            try:
                delivered[broker.name] = self._serve(visit, broker, ids, sent_topics, shipment)
            except (OSError, ValueError) as error:  # delivery errors are others: they stop the bundle
                delivered[broker.name] = 0
                failures.append(failure_of(error, STAGE, visit.visit, lost=f"{len(ids)} packets to {broker.name}"))
        n_packets, n_bytes = self.flush()
        FILTERED_PACKETS_ACKNOWLEDGED.inc(n_packets)
        FILTERED_BYTES_ACKNOWLEDGED.inc(n_bytes)
        failures += shipment.failures
        yield from (beam.pvalue.TaggedOutput(FAILED, failure) for failure in failures)
        summary = {**visit.summary, **shipment.counts(), "delivered": delivered}
        yield replace(visit, summary=summary, failures=visit.failures + tuple(failures))

    def _serve(
        self, visit: VisitAlerts, broker: BrokerConfig, ids: np.ndarray, sent_topics: set[str], shipment: Shipment
    ) -> int:
        if broker.sink == "files":
            path = Path(self.broker_folder) / broker.name / f"{visit.visit}.avro"
            self._write_packets(visit, np.sort(ids), path, broker)
            return len(ids)
        if self.sink is None:
            return 0
        # Full streams left with packaging; of filtered ones each topic is sent once.
        if broker.stream != FULL_STREAM and broker.kafka_topic not in sent_topics:
            sent_topics.add(broker.kafka_topic)
            self._send_filtered(self.sink, visit, broker, ids, shipment)
        return len(ids) - shipment.too_large[broker.kafka_topic]

    def _send_filtered(
        self, sink: AlertSink, visit: VisitAlerts, broker: BrokerConfig, ids: np.ndarray, shipment: Shipment
    ) -> None:
        """Send what is new in this revision; what was sent before is only counted again."""
        stream = KafkaStream(broker.kafka_topic, broker.encoding, self.sizes[broker.kafka_topic])
        rows = _rows_of(ids, visit.alerts["diaSourceId"].to_numpy())
        is_new = visit.alerts["revision"].to_numpy()[rows] == visit.revision
        keys = visit.alerts["kafkaKey"].take(rows).to_pylist()
        messages = list(self._messages(visit, ids, broker))  # what cannot be read is known before the first is sent
        for new, dia_source_id, key, message in zip(is_new, ids.tolist(), keys, messages, strict=True):
            _send(sink if new else None, stream, visit.visit, dia_source_id, key, message, shipment)

    def _write_packets(
        self, visit: VisitAlerts, ids: np.ndarray, path: Path, broker: BrokerConfig | None = None
    ) -> None:
        if len(ids) == 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_messages(path, self._messages(visit, ids, broker))

    def _messages(self, visit: VisitAlerts, ids: np.ndarray, broker: BrokerConfig | None) -> Iterable[bytes]:
        """Messages in the order of `ids`: finished packets, or JSON for a broker that asks for that."""
        if broker is not None and broker.encoding == JSON_THIN:
            return _json_messages(visit, ids, broker.stream)
        return packet_messages(visit, ids, self.packet_folder)


def _stream_ids(visit: VisitAlerts, stream: str) -> np.ndarray:
    if stream == FULL_STREAM:
        return visit.alerts["diaSourceId"].to_numpy()
    return visit.passed.get(stream, np.empty(0, dtype=np.int64))


def _json_messages(visit: VisitAlerts, ids: np.ndarray, stream: str) -> list[bytes]:
    """Alerts of a stream as JSON in the order of `ids`, with the columns that its filter selects."""
    alerts = visit.alerts.take(_rows_of(ids, visit.alerts["diaSourceId"].to_numpy()))
    selected = visit.selected.get(stream)
    return thin_json(alerts, None if selected is None else selected.take(_rows_of(ids, visit.passed[stream])))


def _rows_of(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each id stands among others."""
    order = np.argsort(among)
    return order[np.searchsorted(among, ids, sorter=order)]


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

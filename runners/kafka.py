"""Kafka as the runners see it: where full packets are sent, and how the demo's brokers read them.

`KafkaAlertSink` sends finished packets to any Kafka broker. `EmbeddedKafka` is librdkafka's mock
cluster inside this process: real protocol and real clients, but it keeps only about 5 MB a
partition and drops the oldest silently. So each `BrokerReader` in the same process opens a window
on its topic, and a sink in this process never runs further ahead of the slowest reader than that
window: nothing that a reader still wants can be dropped.

confluent_kafka is imported where it is used, so that sinks pickle without it and start without it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from runners.kafka_login import client_settings
from schemas.manifests import LoggedMessage

DIA_SOURCE_ID_HEADER = "dia_source_id"

# The mock drops from 5 MiB a partition on. All unread bytes may lie in one partition, so the
# window over the whole topic stays below that, with room for record overheads.
_WINDOW_BYTES = 4_000_000
_WINDOW_PATIENCE_S = 20.0
# When one append pushes out all older batches of a partition, the mock loses the new one as well:
# batches to it stay well below what it keeps.
_EMBEDDED_BATCH_BYTES = 1_000_000
_MAX_MESSAGE_BYTES = 10_000_000
_LEADER_PATIENCE_S = 10.0


class KafkaUnreachableError(ConnectionError):
    """No Kafka broker answered at the address given, or it refused the login."""


class TopicError(RuntimeError):
    """A topic is missing and may not be made, takes smaller messages than are to be sent, or has lost their order."""


class DeliveryError(RuntimeError):
    """Messages were not acknowledged; the message says how many and why the first one failed."""


def check_kafka(bootstrap: str, timeout_s: float = 10.0, login: str | None = None) -> None:
    """Return when a Kafka broker answers at `bootstrap` ("HOST:PORT"), else KafkaUnreachableError."""
    _topic_partitions(bootstrap, None, timeout_s, login)


def check_topics(bootstrap: str, login: str | None, sizes: Mapping[str, int]) -> None:
    """Return when all topics are there and take messages of these sizes, in bytes.

    A topic that is missing is made by asking for it, where Kafka allows that. Sizes stay unchecked where the login
    may not see a topic's settings, and on the embedded cluster, which has none.

    Raises
    ------
    TopicError
        A topic is missing, or takes smaller messages only.
    KafkaUnreachableError
        Nobody answers.
    """
    if bootstrap in _EMBEDDED:
        return
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

    for topic in sizes:
        _topic_partitions(bootstrap, topic, 10.0, login)
    client = AdminClient(client_settings(bootstrap, login))
    asked = client.describe_configs([ConfigResource(ResourceType.TOPIC, topic) for topic in sizes])
    for resource, future in asked.items():
        try:
            most = int(future.result(10.0)["max.message.bytes"].value)
        except KafkaException:
            continue
        if most < sizes[resource.name]:
            raise TopicError(
                f"topic {resource.name} of {bootstrap} takes messages of {most:,} bytes, {sizes[resource.name]:,} are "
                "to be sent: raise its max.message.bytes (`nightstream kafka provision` does), or lower "
                "limits.message_bytes in brokers.yaml"
            )


def dia_source_id_header(dia_source_id: int) -> tuple[str, bytes]:
    """The header by which readers drop repeats: the id as decimal ASCII text."""
    return DIA_SOURCE_ID_HEADER, b"%d" % dia_source_id


# --- the embedded cluster -------------------------------------------------------------------


class EmbeddedKafka:
    """librdkafka's in-process mock cluster for as long as the `with` block lasts.

    Attributes
    ----------
    bootstrap : str
        "HOST:PORT" on the loopback interface; other processes can connect too, but only readers
        in this process are protected from the mock's short memory.
    """

    def __init__(self) -> None:
        self.bootstrap = ""
        self._cluster: Any = None

    def __enter__(self) -> EmbeddedKafka:
        from confluent_kafka import Producer

        self._cluster = Producer({"test.mock.num.brokers": 1, "log_level": 0})
        server = next(iter(self._cluster.list_topics(timeout=10).brokers.values()))
        self.bootstrap = f"{server.host}:{server.port}"
        _EMBEDDED.add(self.bootstrap)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _EMBEDDED.discard(self.bootstrap)
        with _WINDOWS_LOCK:
            for place in [place for place in _WINDOWS if place[0] == self.bootstrap]:
                del _WINDOWS[place]
        # The cluster lives and dies with the producer that owns it.
        self._cluster = None


class _Window:
    """How far sinks of this process may run ahead of the readers of one embedded topic."""

    def __init__(self) -> None:
        self._room = threading.Condition()
        self._sent_bytes = 0
        self._read_bytes: dict[int, int] = {}

    def join(self, reader: int) -> None:
        """Count a reader as having read everything sent so far: a new one, or one that lost some."""
        with self._room:
            self._read_bytes[reader] = self._sent_bytes
            self._room.notify_all()

    def leave(self, reader: int) -> None:
        with self._room:
            self._read_bytes.pop(reader, None)
            self._room.notify_all()

    def credit(self, reader: int, n_bytes: int) -> None:
        with self._room:
            if reader in self._read_bytes:
                self._read_bytes[reader] += n_bytes
                self._room.notify_all()

    def reserve(self, n_bytes: int, while_waiting: Callable[[], object]) -> None:
        """Take `n_bytes` of the window, waiting for room; a message wider than it goes alone."""
        with self._room:
            read_bytes = self._slowest_read_bytes()
            deadline = time.monotonic() + _WINDOW_PATIENCE_S
            while (unread := self._sent_bytes - self._slowest_read_bytes()) > 0 and unread + n_bytes > _WINDOW_BYTES:
                if self._slowest_read_bytes() > read_bytes:
                    read_bytes = self._slowest_read_bytes()
                    deadline = time.monotonic() + _WINDOW_PATIENCE_S
                elif time.monotonic() > deadline:
                    # A reader that stands still loses its protection (its receipt counts what
                    # it lost) rather than stopping the night.
                    del self._read_bytes[min(self._read_bytes, key=self._read_bytes.__getitem__)]
                    continue
                self._room.wait(0.05)
                while_waiting()
            self._sent_bytes += n_bytes

    def refund(self, n_bytes: int) -> None:
        with self._room:
            self._sent_bytes -= n_bytes
            self._room.notify_all()

    def _slowest_read_bytes(self) -> int:
        return min(self._read_bytes.values(), default=self._sent_bytes)


_EMBEDDED: set[str] = set()
_WINDOWS: dict[tuple[str, str], _Window] = {}
_WINDOWS_LOCK = threading.Lock()


def _open_window(bootstrap: str, topic: str) -> _Window | None:
    """The window of an embedded topic; None for a Kafka broker that keeps what it was sent."""
    if bootstrap not in _EMBEDDED:
        return None
    with _WINDOWS_LOCK:
        return _WINDOWS.setdefault((bootstrap, topic), _Window())


# --- sending --------------------------------------------------------------------------------


@dataclass(frozen=True)
class KafkaSinkSettings:
    """How a sink sends.

    Attributes
    ----------
    linger_ms : float
        How long a batch waits for company, [0, 1000].
    batch_bytes : int
        Largest batch, before compression; a topic refuses one beyond its largest message.
    compression : str
        lz4, zstd, snappy, gzip or none.
    queue_bytes : int
        Most that waits in the producer; beyond it `send` blocks (back-pressure).
    send_deadline_s : float
        How long `send` waits for room before it raises.
    """

    linger_ms: float = 20.0
    batch_bytes: int = 4_000_000
    compression: str = "lz4"
    queue_bytes: int = 64_000_000
    send_deadline_s: float = 60.0


class KafkaAlertSink:
    """Sends finished bytes, and knows whether all of them arrived.

    At least once: an idempotent producer never repeats or reorders by itself, a bundle that is
    tried again sends again, readers drop repeats by the `dia_source_id` header. Pickles as its
    configuration alone; the producer is opened at first use in the worker. Not for use by
    several threads at once.

    Parameters
    ----------
    bootstrap : str
        "HOST:PORT[,HOST:PORT...]".
    settings : KafkaSinkSettings
        Batching and deadlines.
    login : str or None
        Properties file with a user's login, read where the producer is opened.

    Attributes
    ----------
    delivered, delivered_bytes : int
        Messages acknowledged since the sink was opened, and the bytes of their values.
    """

    def __init__(self, bootstrap: str, settings: KafkaSinkSettings | None = None, login: str | None = None) -> None:
        self.bootstrap = bootstrap
        self.settings = settings or KafkaSinkSettings()
        self.login = login
        self.delivered = self.delivered_bytes = 0
        self._counted = (0, 0)
        self._producer: Any = None
        self._failed = 0
        self._fatal = False
        self._first_error: str | None = None
        self._server_error: str | None = None

    def __reduce__(self) -> tuple[type[KafkaAlertSink], tuple[str, KafkaSinkSettings, str | None]]:
        return KafkaAlertSink, (self.bootstrap, self.settings, self.login)

    def open(self) -> None:
        """Open the producer; does nothing when it is open."""
        if self._producer is not None:
            return
        from confluent_kafka import Producer

        settings = self.settings
        embedded = self.bootstrap in _EMBEDDED
        self._producer = Producer(
            {
                **client_settings(self.bootstrap, self.login),
                "enable.idempotence": True,
                "acks": "all",
                "compression.type": settings.compression,
                "linger.ms": settings.linger_ms,
                "batch.size": min(settings.batch_bytes, _EMBEDDED_BATCH_BYTES) if embedded else settings.batch_bytes,
                "message.max.bytes": _MAX_MESSAGE_BYTES,
                # Never given up by the client: the job's own deadline decides (see `flush`).
                "message.timeout.ms": 0,
                "queue.buffering.max.kbytes": max(1, settings.queue_bytes // 1024),
                "error_cb": self._on_server_error,
            }
        )

    def send(self, topic: str, key: bytes | None, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        """Hand one message over; it has arrived only when `flush` has returned.

        Raises
        ------
        DeliveryError
            The message is too large, the producer is broken, or no room came free within
            `send_deadline_s`. Messages sent before are not affected.
        """
        from confluent_kafka import KafkaException

        self.open()
        window = _WINDOWS.get((self.bootstrap, topic))
        n_bytes = len(key or b"") + len(value)
        if window is not None:
            window.reserve(n_bytes, while_waiting=lambda: self._producer.poll(0))
        try:
            self._produce(topic, key, value, headers)
        except (KafkaException, SystemError, DeliveryError) as error:
            if window is not None:
                window.refund(n_bytes)
            if isinstance(error, DeliveryError):
                raise
            if _is_fatal(error):
                self._abandon()
            raise DeliveryError(f"{len(value)} bytes for topic {topic} were refused: {error}") from error

    def flush(self, deadline_s: float = 60.0) -> tuple[int, int]:
        """Wait until everything sent has been acknowledged.

        Returns
        -------
        tuple of int
            Messages acknowledged since it returned last, and the bytes of their values.

        Raises
        ------
        DeliveryError
            Something was refused or not acknowledged within `deadline_s`. What still waited is
            dropped, and the next `send` starts afresh: the caller sends its bundle again.
        """
        if self._producer is None:
            return 0, 0
        try:
            waiting = self._producer.flush(deadline_s)
        except SystemError as error:  # of a callback that was entered with the client's own error pending
            with contextlib.suppress(SystemError):
                self._producer.poll(0)  # the broker's reason may wait behind it
            waiting, self._fatal = len(self._producer), True
            self._server_error = self._server_error or str(error.__cause__ or error)
        failed, first = self._failed, self._first_error
        if not waiting and not failed:
            return self._fresh_counts()
        if waiting:
            first = first or f"no answer within {deadline_s:g} s ({self._server_error or 'no error reported'})"
        if self._fatal:
            first = f"{self._server_error} ({first})"
        if waiting or self._fatal:
            self._abandon()
        self._failed, self._first_error = 0, None
        raise DeliveryError(
            f"{failed + waiting} messages were not acknowledged by {self.bootstrap} "
            f"({failed} refused, {waiting} unanswered, {self.delivered} delivered before); first error: {first}"
        )

    def close(self, deadline_s: float = 60.0) -> None:
        """Flush and let the producer go."""
        try:
            self.flush(deadline_s)
        finally:
            self._producer = None

    def _fresh_counts(self) -> tuple[int, int]:
        fresh = self.delivered - self._counted[0], self.delivered_bytes - self._counted[1]
        self._counted = self.delivered, self.delivered_bytes
        return fresh

    def _produce(self, topic: str, key: bytes | None, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        deadline = time.monotonic() + self.settings.send_deadline_s
        while True:
            try:
                self._producer.produce(topic, value, key, headers=headers, on_delivery=self._on_delivery)
            except BufferError:
                if time.monotonic() > deadline:
                    raise DeliveryError(
                        f"no room in the producer for {self.settings.send_deadline_s:g} s: {self.bootstrap} takes "
                        f"nothing ({self._server_error or 'no error reported'})"
                    ) from None
                self._producer.poll(0.1)
            else:
                self._producer.poll(0)
                return

    def _on_delivery(self, error: Any, message: Any) -> None:
        if error is None:
            self.delivered += 1
            self.delivered_bytes += len(message)
            return
        self._failed += 1
        if self._first_error is None:
            self._first_error = f"topic {message.topic()}: {error}"
        window = _WINDOWS.get((self.bootstrap, message.topic()))
        if window is not None:
            window.refund(_record_bytes(message))

    def _on_server_error(self, error: Any) -> None:
        self._server_error = str(error)
        self._fatal = self._fatal or error.fatal()

    def _abandon(self) -> None:
        """Drop what waits; a producer that is purged, or may not send any more, is of no use, so a new one follows."""
        self._producer.purge()
        with contextlib.suppress(SystemError):
            self._producer.poll(0)
        self._producer, self._fatal = None, False
        self._failed, self._first_error = 0, None


# --- reading --------------------------------------------------------------------------------


@dataclass(frozen=True)
class KafkaMessageLog:
    """The messages of a topic's first partition, by offset (`transforms.visit_stream.MessageLog`).

    Pickles as its address and the path of its login; the process keeps the consumer, which joins no group. Where
    Kafka is away, it waits.
    """

    bootstrap: str
    topic: str
    login: str | None = None

    def end(self) -> int:
        """The offset that the next message will have.

        Raises
        ------
        KafkaUnreachableError
            Nobody answers.
        TopicError
            Messages lie on other partitions: nothing says in which order.
        """
        from confluent_kafka import KafkaError, KafkaException, TopicPartition

        partitions = _topic_partitions(self.bootstrap, self.topic, 10.0, self.login)
        consumer = _asking_consumer(self.bootstrap, self.login)
        deadline = time.monotonic() + _LEADER_PATIENCE_S
        while True:
            try:
                ends = [
                    consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=10.0)[1]
                    for partition in partitions
                ]
                break
            except KafkaException as error:
                # The partitions of a topic made just now, or of a broker started just now, have no leader yet.
                leaderless = error.args[0].code() in (
                    KafkaError.NOT_LEADER_FOR_PARTITION,
                    KafkaError.LEADER_NOT_AVAILABLE,
                )
                if not leaderless or time.monotonic() > deadline:
                    reason = error.args[0].str()
                    raise KafkaUnreachableError(f"topic {self.topic} of {self.bootstrap}: {reason}") from error
                time.sleep(0.1)
        if any(ends[1:]):
            raise TopicError(f"topic {self.topic} has messages on several partitions: announce on the first")
        return int(ends[0])

    def first_since(self, written_at: float) -> int | None:
        """Offset of the first message written at this UNIX time or later; None if there is none.

        Raises
        ------
        KafkaUnreachableError
            Nobody answers.
        """
        from confluent_kafka import KafkaException, TopicPartition

        consumer = _asking_consumer(self.bootstrap, self.login)
        try:
            (found,) = consumer.offsets_for_times([TopicPartition(self.topic, 0, round(1000 * written_at))], timeout=10)
        except KafkaException as error:
            raise KafkaUnreachableError(f"topic {self.topic} of {self.bootstrap}: {error.args[0].str()}") from error
        return found.offset if found.offset >= 0 else None

    def append(self, messages: Iterable[bytes]) -> None:
        """Add messages and return when Kafka has them; DeliveryError where it takes none."""
        from confluent_kafka import KafkaException

        producer = _log_producer(self.bootstrap, self.login)
        errors: list[Any] = []
        for message in messages:
            try:
                producer.produce(self.topic, message, partition=0, on_delivery=lambda error, _: errors.append(error))
            except (KafkaException, BufferError) as error:  # too large, or the queue is full
                errors.append(error)
        waiting = producer.flush(60.0)
        refused = [error for error in errors if error is not None]
        if waiting or refused:
            producer.purge()
            _log_producer.cache_clear()
            raise DeliveryError(
                f"{waiting + len(refused)} messages for {self.topic} were not acknowledged: {refused[:1]}"
            )

    def read(self, offset: int, timeout_s: float) -> LoggedMessage | None:
        """The first message at `offset`, or the next one kept; None if none came in time."""
        from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, TopicPartition

        log = _log_consumer(self.bootstrap, self.topic, self.login)
        if log.next_offset != offset:
            log.consumer.assign([TopicPartition(self.topic, 0, offset)])
            log.next_offset = offset
        message = log.consumer.poll(timeout_s)
        if message is None or message.error() is not None:  # Kafka is away, or the topic not there yet
            return None
        log.next_offset = message.offset() + 1
        kind, written_ms = message.timestamp()
        written_at = None if kind == TIMESTAMP_NOT_AVAILABLE else written_ms / 1000.0
        return LoggedMessage(message.offset(), message.value() or b"", written_at)


class _LogConsumer:
    """A consumer, and the offset it is at."""

    def __init__(self, bootstrap: str, login: str | None) -> None:
        from confluent_kafka import Consumer

        settings = consumer_settings(bootstrap, "visits", from_beginning=True, login=login)
        self.consumer = Consumer({**settings, "enable.auto.commit": False, "fetch.wait.max.ms": 200})
        self.next_offset: int | None = None


@cache
def _log_producer(bootstrap: str, login: str | None) -> Any:
    """The process's producer of logs: a new one would hold its first message back for half a second."""
    from confluent_kafka import Producer

    return Producer({**client_settings(bootstrap, login), "enable.idempotence": True})


@cache
def _asking_consumer(bootstrap: str, login: str | None) -> Any:
    """The process's consumer for questions: to one that reads, each of them waits a fifth of a second for a fetch."""
    return _LogConsumer(bootstrap, login).consumer


@cache
def _log_consumer(bootstrap: str, topic: str, login: str | None) -> _LogConsumer:
    """The process's consumer of a topic: a source is unpickled at every turn."""
    return _LogConsumer(bootstrap, login)


@dataclass(frozen=True)
class BrokerReceipt:
    """What one reader got. `lost`: offsets the Kafka broker dropped before they were read."""

    received: int
    repeats: int
    contradictions: int
    malformed: int
    lost: int
    received_bytes: int
    first_problem: str | None


@dataclass(frozen=True)
class _Spooled:
    dia_source_id: int
    offset: int
    n_bytes: int


class BrokerReader:
    """One broker of the demo: reads a topic from before the first packet to after the last.

    A thread keeps pace with production; what it reads goes to a spool file (a night may be GBs) as
    messages that say their own schema, only ids and places stay in memory. Repeats are dropped by the
    `dia_source_id` header; one whose bytes differ from the first is a contradiction and counted as such.

    Parameters
    ----------
    broker : str
        The broker's name; prefix of its consumer group.
    bootstrap, topic : str
        What to read. The topic is created by asking for it where the Kafka broker allows that.
    visit_of : callable (message) -> int
        The visit a message belongs to.
    spool_folder : Path
        Where the spool file lies until `close`.
    """

    def __init__(
        self, broker: str, bootstrap: str, topic: str, visit_of: Callable[[bytes], int], spool_folder: Path
    ) -> None:
        self.broker = broker
        self.topic = topic
        self._bootstrap = bootstrap
        self._visit_of = visit_of
        self._spool_path = spool_folder / f".{broker}.{uuid.uuid4().hex}.spool"
        self._spool: IO[bytes] | None = None
        self._spool_bytes = 0
        self._visits: dict[int, list[_Spooled]] = {}
        self._by_id: dict[int, _Spooled] = {}
        self._next_offset: dict[int, int] = {}
        self._counts = {"repeats": 0, "contradictions": 0, "malformed": 0, "lost": 0}
        self._first_problem: str | None = None
        self._consumer: Any = None
        self._window: _Window | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._crash: Exception | None = None

    def __enter__(self) -> BrokerReader:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Return when the reader stands at the start of every partition of its topic."""
        from confluent_kafka import Consumer, TopicPartition

        partitions = _topic_partitions(self._bootstrap, self.topic, timeout_s=10.0)
        self._spool_path.parent.mkdir(parents=True, exist_ok=True)
        self._spool = self._spool_path.open("w+b")
        self._consumer = Consumer(
            consumer_settings(self._bootstrap, f"{self.broker}-{uuid.uuid4().hex}", from_beginning=True)
        )
        # Assigned rather than subscribed: one reader owns all partitions, and joining a group takes 3 s.
        self._next_offset = dict.fromkeys(partitions, 0)
        self._consumer.assign([TopicPartition(self.topic, partition, 0) for partition in partitions])
        self._window = _open_window(self._bootstrap, self.topic)
        if self._window is not None:
            self._window.join(id(self))
        self._thread = threading.Thread(target=self._run, name=f"reader of {self.broker}", daemon=True)
        self._thread.start()

    def stop(self, expected: int | None, timeout_s: float = 60.0) -> BrokerReceipt:
        """Read until `expected` different packets are here (None: until the topic's end), then stop.

        Raises
        ------
        RuntimeError
            The reading thread itself failed. Packets that did not come in time are no error:
            the receipt says how many came.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._crash is None and not self._is_complete(expected):
            time.sleep(0.02)
        self._halt()
        if self._crash is not None:
            raise RuntimeError(f"the reader of broker {self.broker} failed: {self._crash}") from self._crash
        return BrokerReceipt(
            received=len(self._by_id),
            received_bytes=self._spool_bytes,
            first_problem=self._first_problem,
            **self._counts,
        )

    def write(self, folder: Path, write_messages: Callable[[Path, Iterable[bytes]], object]) -> None:
        """Write `folder/<visit>.avro` (or `.jsonl`) for every visit received, in order of diaSourceId.

        Parameters
        ----------
        folder : Path
            The broker's folder.
        write_messages : callable (path, messages)
            Writes one file from messages as received; the file appears whole or not at all.
        """
        self._halt()
        folder.mkdir(parents=True, exist_ok=True)
        for visit, received in sorted(self._visits.items()):
            entries = sorted(received, key=lambda entry: entry.dia_source_id)
            write_messages(folder / f"{visit}.avro", (self._read_spooled(entry) for entry in entries))

    def close(self) -> None:
        """Stop, and remove the spool file."""
        self._halt()
        if self._spool is not None:
            self._spool.close()
            self._spool = None
            self._spool_path.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                # consume() alone would always wait its whole time-out for a full batch.
                first = self._consumer.poll(0.1)
                if first is not None:
                    self._take([first, *self._consumer.consume(500, 0)])
        except Exception as error:
            self._crash = error
        finally:
            # A reader that no longer reads must not hold the sinks back.
            if self._window is not None:
                self._window.leave(id(self))

    def _take(self, messages: list[Any]) -> None:
        n_bytes = 0
        for message in messages:
            if message.error() is not None:
                self._note("malformed", f"{message.error()}")
                continue
            n_bytes += _record_bytes(message)
            self._follow_offset(message.partition(), message.offset())
            self._keep(message)
        if self._window is not None:
            self._window.credit(id(self), n_bytes)

    def _follow_offset(self, partition: int, offset: int) -> None:
        missing = offset - self._next_offset.get(partition, offset)
        if missing > 0:
            self._note("lost", f"partition {partition}: offsets {offset - missing} to {offset - 1} were gone", missing)
            if self._window is not None:
                self._window.join(id(self))
        self._next_offset[partition] = offset + 1

    def _keep(self, message: Any) -> None:
        from schemas.avro.messages import message_of_record

        try:
            value = message_of_record(message.key(), message.value() or b"")
            dia_source_id = _dia_source_id(message.headers())
            first = self._by_id.get(dia_source_id)
            if first is not None:
                self._compare_repeat(first, value)
                return
            visit = self._visit_of(value)
        except Exception as error:  # visit_of is the caller's: whatever it raises costs this message only
            self._note("malformed", f"partition {message.partition()} offset {message.offset()}: {error}")
            return
        self._open_spool().write(value)
        entry = _Spooled(dia_source_id, self._spool_bytes, len(value))
        self._spool_bytes += len(value)
        self._visits.setdefault(visit, []).append(entry)
        self._by_id[dia_source_id] = entry

    def _compare_repeat(self, first: _Spooled, value: bytes) -> None:
        self._counts["repeats"] += 1
        if self._read_spooled(first) != value:
            self._note("contradictions", f"diaSourceId {first.dia_source_id} came twice with different bytes")

    def _read_spooled(self, entry: _Spooled) -> bytes:
        spool = self._open_spool()
        spool.flush()
        return os.pread(spool.fileno(), entry.n_bytes, entry.offset)

    def _open_spool(self) -> IO[bytes]:
        if self._spool is None:
            raise RuntimeError(f"the reader of broker {self.broker} is not open")
        return self._spool

    def _note(self, count: str, problem: str, n: int = 1) -> None:
        self._counts[count] += n
        self._first_problem = self._first_problem or problem

    def _is_complete(self, expected: int | None) -> bool:
        if expected is not None:
            return len(self._by_id) + self._counts["malformed"] >= expected
        return _at_end(self._bootstrap, self.topic, dict(self._next_offset))

    def _halt(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None


def consumer_settings(bootstrap: str, group: str, *, from_beginning: bool, login: str | None = None) -> dict[str, Any]:
    """Settings of a consumer of alert packets; offsets are stored by the caller, after the work."""
    return {
        **client_settings(bootstrap, login),
        "group.id": group,
        "auto.offset.reset": "earliest" if from_beginning else "latest",
        "enable.auto.offset.store": False,
        "fetch.message.max.bytes": 16_000_000,
        "fetch.max.bytes": 64_000_000,
        # The mock cluster answers an empty fetch only when this time is over, whatever came since.
        "fetch.wait.max.ms": 20,
        "fetch.error.backoff.ms": 20,
    }


def _is_fatal(error: Exception) -> bool:
    """Whether a producer can send nothing after this error; the client also throws SystemErrors then."""
    return isinstance(error, SystemError) or bool(error.args[0].fatal())


def _record_bytes(message: Any) -> int:
    return len(message.key() or b"") + len(message.value() or b"")


def _dia_source_id(headers: list[tuple[str, bytes | str | None]] | None) -> int:
    for name, value in headers or []:
        if name == DIA_SOURCE_ID_HEADER and value is not None:
            return int(value)
    raise ValueError(f"the header {DIA_SOURCE_ID_HEADER} is missing")


def _topic_partitions(bootstrap: str, topic: str | None, timeout_s: float, login: str | None = None) -> list[int]:
    """Partitions of a topic, which is created by being asked for; [] when no topic is named."""
    from confluent_kafka import KafkaError, KafkaException, Producer

    deadline = time.monotonic() + timeout_s
    said: list[Any] = []
    client = Producer({**client_settings(bootstrap, login), "error_cb": said.append})
    while True:
        remaining_s = deadline - time.monotonic()
        try:
            topics = client.list_topics(topic, timeout=max(remaining_s, 0.1)).topics
        except KafkaException as error:
            client.poll(0)  # what it was told meanwhile: a login refused shows nowhere else
            refused = [one.str() for one in said if one.code() == KafkaError._AUTHENTICATION]
            raise KafkaUnreachableError(
                f"{bootstrap} refused the login of {login}: {refused[0]}"
                if refused
                else f"no Kafka broker answered at {bootstrap} within {timeout_s:g} s: {error.args[0].str()}"
            ) from error
        if topic is None:
            return []
        found = topics[topic]
        if found.error is None and found.partitions:
            return sorted(found.partitions)
        forbidden = found.error is not None and found.error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
        if forbidden or remaining_s <= 0:
            raise TopicError(
                f"{bootstrap} has no topic {topic}, or not for this login: {found.error}; "
                "`nightstream kafka provision` makes topics and gives rights"
            )
        time.sleep(0.05)


def _at_end(bootstrap: str, topic: str, next_offset: dict[int, int]) -> bool:
    """Whether nothing lies at or beyond the offsets given, one per partition."""
    from confluent_kafka import Consumer, TopicPartition

    # A client of its own: asking through a consumer that another thread polls never returned.
    client = Consumer(consumer_settings(bootstrap, "watermarks", from_beginning=True))
    try:
        for partition, offset in next_offset.items():
            watermarks = client.get_watermark_offsets(TopicPartition(topic, partition), timeout=5.0)
            if watermarks is None or offset < watermarks[1]:
                return False
        return True
    finally:
        client.close()

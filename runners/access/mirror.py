"""A broker's stream copied to a Kafka of its own, by Kafka's MirrorMaker, in a process beside the flow.

It reads as that broker: with its login, its topics only, within its quota. What a remote that is slow or
away costs is this process's time and nobody else's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from runners.access.settings import MirrorConfig
from runners.cluster.kafka import fetched_libraries
from runners.cluster.processes import Service, running_pid, start, stop
from runners.cluster.settings import ClusterError, ClusterSettings
from runners.flink_setup import java_or_wheel
from runners.kafka import consumer_settings
from runners.kafka_login import client_settings, java_settings, write_secret

_SURVEY = "survey"
_COPIED_EVERY_MS = 5000
_MAX_MESSAGE_BYTES = 10_485_760
_TELL_EVERY_S = 5.0
_RESTART_AFTER_S = 5.0
_ANSWER_S = 2.0


def mirror_settings(
    broker: str, topics: Iterable[str], source: Mapping[str, str], target: Mapping[str, str]
) -> dict[str, str]:
    """MirrorMaker's configuration for one broker.

    Parameters
    ----------
    broker : its name, which is also that of its Kafka here
    topics : what is copied, under the same names
    source, target : how to connect to the survey's Kafka and to the broker's, for Java
    """
    flow = f"{_SURVEY}->{broker}"
    values = {
        "clusters": f"{_SURVEY}, {broker}",
        **{f"{_SURVEY}.{key}": value for key, value in source.items()},
        **{f"{broker}.{key}": value for key, value in target.items()},
        f"{flow}.enabled": "true",
        f"{flow}.topics": ", ".join(topics),
        "replication.policy.class": "org.apache.kafka.connect.mirror.IdentityReplicationPolicy",
        # As many copies as the remote makes by itself.
        "replication.factor": "-1",
        "config.storage.replication.factor": "-1",
        "offset.storage.replication.factor": "-1",
        "status.storage.replication.factor": "-1",
        "heartbeats.topic.replication.factor": "-1",
        # It may not write anything to the survey's Kafka, and need not.
        "emit.heartbeats.enabled": "false",
        "emit.checkpoints.enabled": "false",
        "emit.offset-syncs.enabled": "false",
        "sync.topic.acls.enabled": "false",
        "sync.topic.configs.enabled": "true",
        "refresh.topics.interval.seconds": "60",
        "tasks.max": "2",
        # Where a mirror that was killed begins again: it copies what came since a second time.
        f"{broker}.offset.flush.interval.ms": str(_COPIED_EVERY_MS),
        f"{_SURVEY}.consumer.auto.offset.reset": "earliest",
        f"{_SURVEY}.consumer.max.partition.fetch.bytes": str(_MAX_MESSAGE_BYTES),
        # Connect switches this off, and then a pause of the remote may repeat and reorder.
        f"{broker}.producer.enable.idempotence": "true",
        f"{broker}.producer.max.request.size": str(_MAX_MESSAGE_BYTES),
        f"{broker}.producer.compression.type": "lz4",
        f"{broker}.producer.batch.size": "1000000",
        f"{broker}.producer.linger.ms": "20",
    }
    return {key: str(value) for key, value in values.items()}


class Mirror:
    """Copies a broker's topics for as long as `run` lasts.

    Parameters
    ----------
    cluster : where files and logs lie, and the version of the jars
    broker, topics : who gets what
    bootstrap, login : the survey's Kafka, and the broker's login to it
    config : the broker's own Kafka
    """

    def __init__(
        self,
        cluster: ClusterSettings,
        broker: str,
        topics: tuple[str, ...],
        bootstrap: str,
        login: Path | None,
        config: MirrorConfig,
    ) -> None:
        self.cluster = cluster
        self.broker = broker
        self.topics = topics
        self.service = Service(f"mirror-{broker}", ())
        self._source = (bootstrap, login)
        self._target = (config.bootstrap, None if config.login is None else Path(config.login))
        self._progress = _Progress(broker, topics, self._source, self._target)

    def run(self, stopping: threading.Event, tell: Callable[[str], None]) -> None:
        """Copy until `stopping` is set; a MirrorMaker that ends is started again.

        Raises
        ------
        ClusterError, FlinkSetupError
            Java or the jars cannot be had, or another mirror of this broker runs.
        KafkaLoginError
            A login cannot be used.
        """
        with self._alone():
            command = self._command()
            try:
                while not stopping.is_set():
                    start(self.cluster, self.service, command)
                    self._watch(stopping, tell)
                    if not stopping.is_set():
                        tell(f"MirrorMaker ended (logs in {self.cluster.logs}); it starts again")
                        stopping.wait(_RESTART_AFTER_S)
            finally:
                stop(self.cluster, self.service)
                self._config.unlink(missing_ok=True)

    @property
    def _config(self) -> Path:
        return self.cluster.folder / "mirrors" / f"{self.broker}.properties"

    def _watch(self, stopping: threading.Event, tell: Callable[[str], None]) -> None:
        told = -_TELL_EVERY_S
        while running_pid(self.cluster, self.service) is not None and not stopping.wait(0.5):
            if time.monotonic() > told + _TELL_EVERY_S:
                tell(self._progress.line())
                told = time.monotonic()

    def _command(self) -> list[str]:
        java = java_or_wheel()
        libraries = fetched_libraries(self.cluster.kafka.version, java)
        values = mirror_settings(self.broker, self.topics, java_settings(*self._source), java_settings(*self._target))
        self._config.parent.mkdir(parents=True, exist_ok=True)
        write_secret(self._config, "".join(f"{key}={value}\n" for key, value in values.items()))
        logging = self._config.with_name("log4j2.properties")
        logging.write_text((resources.files("runners.config") / "kafka" / logging.name).read_text("utf-8"), "utf-8")
        options = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]
        options += [f"-Dlog4j2.configurationFile={logging}", "-cp", f"{libraries}/*"]
        return [str(java), *options, "org.apache.kafka.connect.mirror.MirrorMaker", str(self._config)]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        path = self.cluster.folder / "mirrors" / f".{self.broker}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ClusterError(f"a mirror of {self.broker} runs already") from None
            yield


class _Progress:
    """How far a mirror is: what it wrote down on the broker's Kafka, beside where the survey's topics end."""

    def __init__(
        self,
        broker: str,
        topics: tuple[str, ...],
        source: tuple[str, Path | None],
        target: tuple[str, Path | None],
    ) -> None:
        self._broker = broker
        self._topics = topics
        self._source = source
        self._target = target
        self._copied: dict[tuple[str, int], int] = {}
        self._ends: Any = None
        self._notes: Any = None

    def line(self) -> str:
        """One line for people."""
        from confluent_kafka import KafkaException

        try:
            self._read_notes()
        except KafkaException:
            return f"{self._broker}: its Kafka at {self._target[0]} does not answer"
        try:
            waiting = self._waiting()
        except KafkaException:
            return f"{self._broker}: the survey's Kafka at {self._source[0]} does not answer"
        return f"{self._broker}: {sum(self._copied.values()):,} messages copied, {waiting:,} to be copied"

    def _waiting(self) -> int:
        """Messages on the survey's topics that were not noted as copied."""
        from confluent_kafka import Consumer, TopicPartition

        if self._ends is None:
            self._ends = Consumer(self._consumer_settings(self._source))
        waiting = 0
        for topic in self._topics:
            for partition in self._ends.list_topics(topic, timeout=_ANSWER_S).topics[topic].partitions:
                first, end = self._ends.get_watermark_offsets(TopicPartition(topic, partition), timeout=_ANSWER_S)
                waiting += end - max(first, self._copied.get((topic, partition), 0))
        return waiting

    def _read_notes(self) -> None:
        """Kafka Connect notes, in a topic of its own, the last offset copied of each partition."""
        from confluent_kafka import Consumer, TopicPartition

        topic = f"mm2-offsets.{_SURVEY}.internal"
        if self._notes is None:
            notes = Consumer(self._consumer_settings(self._target))
            partitions = notes.list_topics(timeout=_ANSWER_S).topics.get(topic)
            if partitions is None:
                notes.close()
                return
            notes.assign([TopicPartition(topic, partition, 0) for partition in partitions.partitions])
            self._notes = notes
        self._notes.list_topics(topic, timeout=_ANSWER_S)  # raises where nobody answers
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and (messages := self._notes.consume(1000, 0.2)):
            for message in messages:
                if message.error() is None and message.value():
                    of = json.loads(message.key())[1]
                    self._copied[of["topic"], of["partition"]] = json.loads(message.value())["offset"] + 1

    @staticmethod
    def _consumer_settings(where: tuple[str, Path | None]) -> dict[str, Any]:
        bootstrap, login = where
        path = None if login is None else str(login)
        user = client_settings(bootstrap, path).get("sasl.username", _SURVEY)
        return {**consumer_settings(bootstrap, user, from_beginning=True, login=path), "enable.auto.commit": False}

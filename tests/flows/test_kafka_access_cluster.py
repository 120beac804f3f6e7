"""Rights, quotas and mirrors on real Kafka brokers: the survey's and that of a broker team. `make cluster-test`."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from test_cluster import free_ports, until

from runners.cli import main
from runners.cluster.kafka import admin_properties, kafka_service, kafka_up
from runners.cluster.processes import Service, running_pid, stop
from runners.cluster.settings import ClusterSettings, load_cluster_settings
from runners.kafka import (
    DeliveryError,
    KafkaAlertSink,
    KafkaMessageLog,
    KafkaSinkSettings,
    KafkaUnreachableError,
    TopicError,
    check_topics,
    consumer_settings,
)
from runners.kafka_login import client_settings, read_login
from runners.listening import KafkaRecord, TopicReadError, listen_topic

pytestmark = pytest.mark.cluster

TOPIC, OTHER_TOPIC, SMALL_TOPIC = "lsst-alerts-v11", "lsst-alerts-v11-ocf", "small"
SLOW, FAST, ELSEWHERE = "antares", "fink", "babamul"
PACKET_BYTES = 80_000
QUOTA = 25_000_000  # as shipped; one answer to a reader may hold 4 MB of each partition, so less would come in bursts
FLOW = 3_000_000  # bytes a second of the survey while readers are timed
SLOW_READS_S = 55
WINDOW_S = 3  # the seconds over which the Kafka of `cluster up` measures quotas
BROKERS: dict[str, Any] = {
    "kafka": {"partitions": 8, "replication": 1, "security": "SASL_PLAINTEXT"},
    "brokers": [
        {"name": SLOW, "topic": TOPIC, "limits": {"bytes_per_second": QUOTA}},
        {"name": FAST, "topic": TOPIC, "limits": {"bytes_per_second": 100_000_000}},
        {"name": ELSEWHERE, "topic": OTHER_TOPIC, "encoding": "ocf"},
        {"name": "small", "topic": SMALL_TOPIC, "encoding": "ocf", "limits": {"message_bytes": 1_000_000}},
    ],
}


@dataclass
class Survey:
    """The survey's Kafka as its operator sees it."""

    settings: ClusterSettings
    folder: Path

    @property
    def bootstrap(self) -> str:
        return self.settings.kafka.secured_bootstrap

    def login(self, user: str) -> str:
        return str(self.folder / "logins" / f"{user}.properties")

    def brokers(self, content: dict[str, Any]) -> str:
        path = self.folder / "brokers.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    def provision(self, *arguments: str, brokers: dict[str, Any] = BROKERS) -> list[str]:
        """The lines that the command prints."""
        where = ["--bootstrap", self.bootstrap, "--admin-config", str(admin_properties(self.settings))]
        files = ["--brokers", self.brokers(brokers), "--credentials", str(self.folder / "logins")]
        result = CliRunner().invoke(main, ["kafka", "provision", *where, *files, *arguments])
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    def sink(self, user: str = "nightstream", **settings: Any) -> KafkaAlertSink:
        return KafkaAlertSink(self.bootstrap, KafkaSinkSettings(**settings), self.login(user))

    def admin(self) -> Any:
        from confluent_kafka.admin import AdminClient

        return AdminClient(client_settings(self.bootstrap, str(admin_properties(self.settings))))


def own_kafka(folder: Path) -> Iterator[ClusterSettings]:
    """A Kafka broker in a folder and on ports of its own; it ends with what it keeps."""
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"kafka": {"port": free_ports(3)}}))
    settings = load_cluster_settings(folder)
    try:
        kafka_up(settings)
        yield settings
    finally:
        stop(settings, kafka_service(settings.kafka))
        shutil.rmtree(folder / "kafka" / "data", ignore_errors=True)


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survey]:
    for settings in own_kafka(tmp_path_factory.mktemp("survey")):
        one = Survey(settings, tmp_path_factory.mktemp("operator"))
        one.provision()
        yield one


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSettings]:
    yield from own_kafka(tmp_path_factory.mktemp("remote"))


def packet(number: int, n_bytes: int = PACKET_BYTES) -> bytes:
    return random.Random(number).randbytes(n_bytes)


def first_of(survey: Survey, user: str, topic: str, group: str | None = None, login: str | None = None) -> KafkaRecord:
    """The first message of a topic as a user reads it; raises what the user is told."""
    read = listen_topic(
        survey.bootstrap, topic, group=group, idle_timeout_s=20.0, limit=1, login=login or survey.login(user)
    )
    (record,) = read
    return record


# --- rights -----------------------------------------------------------------------------------


def test_provisioning_again_changes_nothing_and_no_password_is_shown(survey: Survey) -> None:
    users = (SLOW, FAST, ELSEWHERE, "small", "nightstream", "telescope")
    before = {user: Path(survey.login(user)).read_bytes() for user in users}
    assert {Path(survey.login(user)).stat().st_mode & 0o777 for user in users} == {0o600}
    assert survey.provision() == ["all is as wanted"]
    # Rotating shows the table as well; the password that no longer holds is refused, the others stay.
    old = survey.folder / "old.properties"
    old.write_bytes(before[FAST])
    lines = survey.provision("--rotate", FAST, "--dry-run")
    assert [line.split() for line in lines] == [["rotate", "user", FAST, "a", "new", "password"]]
    assert Path(survey.login(FAST)).read_bytes() == before[FAST]
    lines += survey.provision("--rotate", FAST)
    after = {user: Path(survey.login(user)).read_bytes() for user in users}
    assert [user for user in users if after[user] != before[user]] == [FAST]
    secrets = {read_login(Path(survey.login(user)))["sasl.password"] for user in users}
    assert len(secrets) == len(users)
    assert not any(secret in line for secret in secrets for line in lines)
    with pytest.raises(KafkaUnreachableError, match="refused the login"):
        first_of(survey, FAST, TOPIC, login=str(old))


def test_a_broker_reads_its_own_topic_as_its_own_group_and_all_else_is_refused(survey: Survey) -> None:
    sink = survey.sink()
    for topic in (TOPIC, OTHER_TOPIC):
        sink.send(topic, b"key", packet(0), [])
    sink.flush()
    assert first_of(survey, SLOW, TOPIC, f"{SLOW}-night").value == packet(0)
    with pytest.raises(TopicReadError, match="Topic authorization failed"):
        first_of(survey, SLOW, OTHER_TOPIC)
    with pytest.raises(TopicReadError, match="Group authorization failed"):
        first_of(survey, SLOW, TOPIC, f"{FAST}-night")
    anothers = survey.folder / "anothers.properties"
    text = Path(survey.login(SLOW)).read_text()
    password = read_login(Path(survey.login(FAST)))["sasl.password"]
    anothers.write_text("".join(f"{line}\n" for line in text.splitlines() if "sasl.password" not in line))
    with anothers.open("a") as file:
        file.write(f"sasl.password={password}\n")
    with pytest.raises(KafkaUnreachableError, match="refused the login"):
        first_of(survey, SLOW, TOPIC, login=str(anothers))


@pytest.mark.parametrize("topic", [TOPIC, "visits", "of-my-own"])
def test_a_broker_cannot_write(survey: Survey, topic: str) -> None:
    from confluent_kafka import Producer

    told: list[Any] = []
    # Not idempotent: else the refusal would be that of an id for the producer.
    producer = Producer(client_settings(survey.bootstrap, survey.login(SLOW)))
    producer.produce(topic, b"forged", on_delivery=lambda error, _: told.append(error and error.name()))
    producer.flush(20)
    assert told == ["TOPIC_AUTHORIZATION_FAILED"]
    sink = survey.sink(SLOW)
    with pytest.raises(DeliveryError, match="authorization failed"):
        sink.send(topic, None, b"forged", [])
        sink.flush(10)


def test_a_sink_goes_on_when_it_may_write_again(survey: Survey) -> None:
    login = Path(survey.login(SLOW))
    sink = survey.sink(SLOW)
    with pytest.raises(DeliveryError):
        sink.send(TOPIC, None, packet(0), [])
        sink.flush(10)
    text = login.read_text()
    login.write_text(Path(survey.login("nightstream")).read_text())  # who opens a producer reads the file again
    try:
        sink.send(TOPIC, None, packet(0), [])
        sink.flush(20)
    finally:
        login.write_text(text)
    assert sink.delivered == 1


def test_the_job_writes_alerts_and_can_neither_read_them_nor_announce(survey: Survey) -> None:
    telescope = KafkaMessageLog(survey.bootstrap, "visits", survey.login("telescope"))
    telescope.append([b"announced"])
    job = KafkaMessageLog(survey.bootstrap, "visits", survey.login("nightstream"))
    assert job.end() == 1
    until(lambda: (job.read(0, 1.0) or ())[:2] == (0, b"announced"), 20.0)
    with pytest.raises(DeliveryError, match="TOPIC_AUTHORIZATION_FAILED"):
        job.append([b"forged"])
    with pytest.raises(TopicReadError, match="authorization failed"):
        first_of(survey, "nightstream", TOPIC)


def test_a_topic_that_is_missing_or_takes_smaller_messages_is_told_at_the_start(survey: Survey) -> None:
    login = survey.login("nightstream")
    check_topics(survey.bootstrap, login, {TOPIC: 5_000_000, SMALL_TOPIC: 1_000_000, "alert-ledger": 0})
    with pytest.raises(TopicError, match=r"small of .* takes messages of 1,000,000 bytes, 1,000,001 are to be sent"):
        check_topics(survey.bootstrap, login, {TOPIC: 5_000_000, SMALL_TOPIC: 1_000_001})
    with pytest.raises(TopicError, match="has no topic nowhere, or not for this login"):
        check_topics(survey.bootstrap, login, {"nowhere": 1})


def test_batches_are_no_larger_than_the_smallest_topic_takes(survey: Survey) -> None:
    fitting = survey.sink(batch_bytes=1_000_000, linger_ms=200.0)
    for number in range(60):
        fitting.send(SMALL_TOPIC, b"one partition", packet(number), [])
    fitting.flush()
    assert fitting.delivered == 60
    wide = survey.sink(linger_ms=200.0)
    with pytest.raises(DeliveryError, match="MSG_SIZE_TOO_LARGE"):
        for number in range(60):
            wide.send(SMALL_TOPIC, b"one partition", packet(number), [])
        wide.flush()


def test_what_was_changed_by_hand_is_mended_and_a_broker_that_left_is_shut_out(survey: Survey) -> None:
    from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

    smaller = ConfigEntry("max.message.bytes", "70000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, OTHER_TOPIC, incremental_configs=[smaller])
    admin = survey.admin()
    for changed in admin.incremental_alter_configs([resource]).values():
        changed.result(20)
    without = {**BROKERS, "brokers": [one for one in BROKERS["brokers"] if one["name"] != "small"]}
    lines = survey.provision(brokers=without)
    assert " ".join(lines[0].split()) == f"alter topic {OTHER_TOPIC} max.message.bytes 70000 -> 5000000"
    revoked = [line.split()[2] for line in lines if line.startswith("revoke")]
    assert Counter(revoked) == {"small": 4, "nightstream": 3}
    assert lines[-1].startswith("done")
    with pytest.raises(TopicReadError, match="authorization failed"):
        first_of(survey, "small", SMALL_TOPIC)
    assert SMALL_TOPIC in admin.list_topics(timeout=10).topics
    survey.provision()
    sink = survey.sink()
    sink.send(SMALL_TOPIC, b"one partition", packet(0), [])
    sink.flush()
    assert first_of(survey, "small", SMALL_TOPIC).value == packet(0)


# --- quotas -----------------------------------------------------------------------------------


@dataclass
class Reader:
    """Reads a topic in a thread of its own, noting when each message came and how old it was."""

    survey: Survey
    user: str
    from_beginning: bool
    came: list[tuple[float, float, int]] = field(default_factory=list)

    def __enter__(self) -> Reader:
        self._stopping, self._ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        from confluent_kafka import Consumer

        # As a team would that sets nothing but its login and where to begin.
        consumer = Consumer(
            {
                **client_settings(self.survey.bootstrap, self.survey.login(self.user)),
                "group.id": f"{self.user}-{time.time_ns()}",
                "auto.offset.reset": "earliest" if self.from_beginning else "latest",
            }
        )
        consumer.subscribe([TOPIC], on_assign=lambda *_: self._ready.set())
        while not self._stopping.is_set():
            message = consumer.poll(0.2)
            if message is not None and message.error() is None:
                now = time.time()
                self.came.append((now, now - message.timestamp()[1] / 1000.0, len(message.value())))
        consumer.close()

    def lags_s(self, start: float, end: float) -> np.ndarray:
        return np.array([lag for when, lag, _ in self.came if start <= when < end])

    def rates(self, start: float, end: float, window_s: float) -> np.ndarray:
        """Bytes a second over every window that fits, a second apart."""
        when = np.array([one[0] for one in self.came])
        size = np.array([one[2] for one in self.came])
        starts = np.arange(start, end - window_s, 1.0)
        return np.array([size[(when >= one) & (when < one + window_s)].sum() / window_s for one in starts])


def test_a_throttled_broker_gets_its_quota_and_the_others_notice_nothing(survey: Survey) -> None:
    sink = survey.sink()
    backlog = SLOW_READS_S * QUOTA // PACKET_BYTES
    for number in range(backlog):
        sink.send(TOPIC, b"%d" % number, packet(number % 100), [])
    sink.flush()
    stopping = threading.Event()

    def flow() -> None:
        number, started = 0, time.monotonic()
        while not stopping.is_set():
            sink.send(TOPIC, b"%d" % number, packet(number % 100), [])
            number += 1
            time.sleep(max(0.0, started + number * PACKET_BYTES / FLOW - time.monotonic()))

    survey_flow = threading.Thread(target=flow)
    survey_flow.start()
    phases = {}
    try:
        with Reader(survey, FAST, from_beginning=False) as fast:
            time.sleep(3)
            phases["alone"] = (time.time(), time.time() + 30)
            time.sleep(30)
            with Reader(survey, SLOW, from_beginning=True) as slow:
                begun = time.time()
                until(lambda: slow.came, 30)
                phases["beside"] = (begun, begun + SLOW_READS_S)
                time.sleep(SLOW_READS_S)
            time.sleep(1)
            phases["alone again"] = (time.time(), time.time() + 30)
            time.sleep(30)
    finally:
        stopping.set()
        survey_flow.join()
    sink.flush()
    rates = slow.rates(begun + WINDOW_S, begun + SLOW_READS_S, 30.0) / QUOTA
    print(f"\nquota {QUOTA / 1e6:g} MB/s: {100 * rates.min():.1f} to {100 * rates.max():.1f} % of it over 30 s", end="")
    print(f" ({len(rates)} windows); first {WINDOW_S} s: ", end="")
    print(f"{100 * slow.rates(begun, begun + WINDOW_S + 0.5, WINDOW_S)[0] / QUOTA:.0f} %")
    p99 = {}
    for name, span in phases.items():
        lags = 1000 * fast.lags_s(*span)
        p99[name] = float(np.percentile(lags, 99))
        print(f"{FAST} {name:<12} {len(lags)} packets, lag p50 {np.median(lags):.0f} ms, p99 {p99[name]:.0f} ms")
    assert rates.min() > 0.80
    assert rates.max() < 1.05
    # Kafka holds an answer back for a second and more: a reader that had to wait for that would show it.
    assert p99["beside"] < max(p99["alone"], p99["alone again"]) + 250.0


# --- mirrors ----------------------------------------------------------------------------------


class RunningMirror:
    """`nightstream kafka mirror` as a process, and what it says."""

    def __init__(self, survey: Survey, remote: ClusterSettings) -> None:
        access = {**BROKERS["kafka"], "mirrors": {ELSEWHERE: {"bootstrap": remote.kafka.bootstrap}}}
        brokers = survey.brokers({**BROKERS, "kafka": access})
        command = [sys.executable, "-c", "from runners.cli import main; main()", "kafka", "mirror", ELSEWHERE]
        command += ["--bootstrap", survey.bootstrap, "--brokers", brokers, "--credentials", f"{survey.folder}/logins"]
        command += ["--folder", str(survey.settings.folder)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
        self.lines: list[str] = []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._reader = threading.Thread(target=lambda: self.lines.extend(self._process.stdout or ()))
        self._reader.start()

    def __enter__(self) -> RunningMirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        self._reader.join()
        return code

    def said(self, text: str) -> Callable[[], bool]:
        """Whether it said so since now."""
        before = len(self.lines)
        return lambda: any(text in line for line in self.lines[before:])


def all_of(bootstrap: str, topic: str, login: str | None = None) -> Counter[tuple[Any, bytes, Any]]:
    """Every message of a topic: key, value, headers; how often each is there."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer(consumer_settings(bootstrap, f"{ELSEWHERE}-all", from_beginning=True, login=login))
    found: Counter[tuple[Any, bytes, Any]] = Counter()
    for partition in consumer.list_topics(timeout=10).topics[topic].partitions:
        first, end = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
        consumer.assign([TopicPartition(topic, partition, first)])
        while first < end:
            message = consumer.poll(20)
            assert message is not None and message.error() is None
            found[message.key(), message.value(), tuple(message.headers() or ())] += 1
            first = message.offset() + 1
    consumer.close()
    return found


def topics_of(bootstrap: str, login: str | None = None) -> set[str]:
    from confluent_kafka.admin import AdminClient

    return set(AdminClient(client_settings(bootstrap, login)).list_topics(timeout=10).topics)


def send(survey: Survey, numbers: range, large: int | None = None) -> float:
    """Send packets to the mirrored topic; seconds until Kafka had all of them."""
    sink = survey.sink()
    values = [packet(number, 3_000_000 if number == large else PACKET_BYTES) for number in numbers]
    sink.open()
    started = time.perf_counter()
    for number, value in zip(numbers, values, strict=True):
        sink.send(OTHER_TOPIC, b"%d" % number, value, [("dia_source_id", b"%d" % number)])
    sink.flush()
    return time.perf_counter() - started


def test_a_mirror_copies_everything_once_and_goes_on_where_it_was(survey: Survey, remote: ClusterSettings) -> None:
    send(survey, range(1000, 2000), large=1500)
    login = survey.login(ELSEWHERE)
    started = time.monotonic()
    with RunningMirror(survey, remote) as mirror:
        count = sum(all_of(survey.bootstrap, OTHER_TOPIC, login).values())
        until(mirror.said(f"{count:,} messages copied, 0 to be copied"), 90)
        took = time.monotonic() - started
        send(survey, range(2000, 2100))
        until(mirror.said(f"{count + 100:,} messages copied, 0 to be copied"), 60)
        assert mirror.end() == 0
    assert running_pid(survey.settings, Service(f"mirror-{ELSEWHERE}", ())) is None
    send(survey, range(2100, 2200))
    with RunningMirror(survey, remote) as mirror:
        until(mirror.said(f"{count + 200:,} messages copied, 0 to be copied"), 90)
    sent = all_of(survey.bootstrap, OTHER_TOPIC, login)
    copied = all_of(remote.kafka.bootstrap, OTHER_TOPIC)
    print(f"\n{sum(copied.values())} messages copied, the first {count} noted as such after {took:.0f} s, ", end="")
    print(f"lost {len(sent - copied)}, repeated {sum((copied - sent).values())}")
    assert any(len(value) == 3_000_000 for _, value, _ in copied)
    assert copied == sent
    assert {name for name in topics_of(remote.kafka.bootstrap) if "alert" in name} == {OTHER_TOPIC}
    assert not list((survey.settings.folder / "mirrors").glob(f"*{ELSEWHERE}.properties"))  # it held a password


def test_a_dead_remote_does_not_slow_the_flow_and_gets_all_when_it_is_back(
    survey: Survey, remote: ClusterSettings
) -> None:
    rounds, per_round = 5, 400
    numbers = iter(range(10_000, 10_000 + 2 * rounds * per_round, per_round))
    before = [send(survey, range(first, first + per_round)) for first, _ in zip(numbers, range(rounds), strict=False)]
    pid = running_pid(remote, kafka_service(remote.kafka))
    assert pid is not None
    with RunningMirror(survey, remote) as mirror:
        until(mirror.said("0 to be copied"), 120)
        os.kill(pid, signal.SIGSTOP)
        try:
            until(mirror.said("does not answer"), 60)
            beside = [send(survey, range(first, first + per_round)) for first in numbers]
        finally:
            os.kill(pid, signal.SIGCONT)
        until(mirror.said(" 0 to be copied"), 180)
    megabytes = per_round * PACKET_BYTES / 1e6
    print(f"\nproducer: {megabytes / min(before):.0f} MB/s without a mirror, {megabytes / min(beside):.0f} ", end="")
    print(f"beside one whose remote stands still (best of {rounds})")
    sent = all_of(survey.bootstrap, OTHER_TOPIC, survey.login(ELSEWHERE))
    copied = all_of(remote.kafka.bootstrap, OTHER_TOPIC)
    print(f"{sum(copied.values())} messages at the remote, lost {len(sent - copied)}, ", end="")
    print(f"repeated {sum((copied - sent).values())}")
    assert not sent - copied
    assert len(copied) == len(sent)
    # A flow that waited for the remote would not have ended before it was back.
    assert min(beside) < 1.5 * min(before)

"""A real Kafka broker and a Flink cluster: what they keep and write while they are killed. `make cluster-test`.

Both run in a folder and on ports of their own, beside those that `make kafka-up` and `make flink-up` start.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.utils.timestamp import Duration
from own_cluster import PATIENCE_S, kill, own_cluster, until
from test_flink import digests, ledger, no_progress, produce

from pipelines.night_simulation import simulate_night
from runners.cluster.flink import (
    flink_down,
    flink_services,
    flink_up,
    job_manager,
    overview,
    rest,
    task_managers,
    worker_pool,
)
from runners.cluster.kafka import admin_properties, kafka_service, kafka_up
from runners.cluster.processes import is_listening, log_end, log_of, running_pid, stop
from runners.cluster.settings import ClusterSettings
from runners.configuration import load_brokers, load_checked_filters, load_production_config
from runners.entries import night_input
from runners.flink import flink_cluster_engine
from runners.flink_setup import FlinkSetupError
from runners.kafka import KafkaAlertSink, consumer_settings, dia_source_id_header
from runners.listening import listen_topic
from runners.local import local_engine
from runners.running import RunRequest, run_chain

pytestmark = pytest.mark.cluster

N_MESSAGES, MESSAGE_BYTES = 1000, 80_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSettings]:
    """The cluster's settings; whatever runs of it at the end is ended."""
    settings = own_cluster(tmp_path_factory.mktemp("cluster"), task_managers=2)
    yield settings
    flink_down(settings)
    stop(settings, kafka_service(settings.kafka))


@pytest.fixture(scope="module")
def kafka(cluster: ClusterSettings) -> ClusterSettings:
    assert kafka_up(cluster)
    return cluster


@pytest.fixture(scope="module")
def flink(cluster: ClusterSettings) -> ClusterSettings:
    assert flink_up(cluster)
    return cluster


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nights") / "night"
    simulate_night("tiny", folder, seed=20261122)
    return folder


@pytest.fixture(scope="module")
def local(night: Path) -> Path:
    out = night.parent / "local"
    produce(night, out, local_engine(()))
    return out


def processes_of(cluster: ClusterSettings) -> list[int]:
    """All processes that any service of the cluster started, found without our own functions."""
    mark = f"NIGHTSTREAM_CLUSTER={cluster.folder}/".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if any(entry.startswith(mark) for entry in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found


# --- Kafka ------------------------------------------------------------------------------------


def message(number: int) -> bytes:
    return random.Random(number).randbytes(MESSAGE_BYTES)


def test_kafka_keeps_what_it_acknowledged_when_it_is_killed(kafka: ClusterSettings) -> None:
    sink = KafkaAlertSink(kafka.kafka.bootstrap)
    for number in range(N_MESSAGES):
        sink.send("packets", b"%d" % number, message(number), [dia_source_id_header(number)])
    sink.flush()
    assert sink.delivered == N_MESSAGES
    kill(kafka, kafka_service(kafka.kafka))
    assert kafka_up(kafka)
    assert not kafka_up(kafka)
    read = listen_topic(kafka.kafka.bootstrap, "packets", idle_timeout_s=PATIENCE_S, limit=N_MESSAGES)
    assert sorted(one.value for one in read) == sorted(message(number) for number in range(N_MESSAGES))


def test_kafka_goes_on_for_a_sink_that_waits_while_it_restarts(kafka: ClusterSettings) -> None:
    sink = KafkaAlertSink(kafka.kafka.bootstrap)
    sink.send("restarted", None, b"before", [])
    sink.flush()
    kill(kafka, kafka_service(kafka.kafka))
    sink.send("restarted", None, b"after", [])
    restart = threading.Thread(target=kafka_up, args=(kafka,))
    restart.start()
    sink.flush(60)
    restart.join()
    read = listen_topic(kafka.kafka.bootstrap, "restarted", idle_timeout_s=PATIENCE_S, limit=2)
    assert sorted(one.value for one in read) == [b"after", b"before"]


def test_broker_teams_need_a_password_and_a_right_and_the_administrator_none(kafka: ClusterSettings) -> None:
    from confluent_kafka import Consumer, KafkaError
    from confluent_kafka.admin import (
        AclBinding,
        AclOperation,
        AclPermissionType,
        AdminClient,
        ResourcePatternType,
        ResourceType,
        ScramCredentialInfo,
        ScramMechanism,
        UserScramCredentialUpsertion,
    )

    sink = KafkaAlertSink(kafka.kafka.bootstrap)
    sink.send("for-antares", None, b"packet", [])
    sink.flush()
    text = admin_properties(kafka).read_text()
    assert admin_properties(kafka).stat().st_mode & 0o077 == 0
    admin_password = text.rpartition('password="')[2].partition('"')[0]

    def logged_in(user: str, password: str) -> dict[str, Any]:
        return {
            **consumer_settings(kafka.kafka.secured_bootstrap, f"{user}-readers", from_beginning=True),
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": password,
        }

    def read_by(user: str, password: str) -> bytes | int:
        """What the user reads, or the number of the error met first."""
        errors: list[int] = []
        consumer = Consumer({**logged_in(user, password), "error_cb": lambda error: errors.append(error.code())})
        consumer.subscribe(["for-antares"])
        deadline = time.monotonic() + 20.0
        try:
            while time.monotonic() < deadline:
                got = consumer.poll(0.1)
                refused = [code for code in errors if code == KafkaError._AUTHENTICATION]
                if refused:
                    return refused[0]
                if got is not None:
                    return got.value() if got.error() is None else got.error().code()
        finally:
            consumer.close()
        return KafkaError._TIMED_OUT

    # The administrator's own login makes the user: that listener is the one which asks who comes.
    admin = AdminClient(
        {
            key: value
            for key, value in logged_in("admin", admin_password).items()
            if "sasl" in key or key in ("bootstrap.servers", "security.protocol")
        }
    )
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    for done in admin.alter_user_scram_credentials([UserScramCredentialUpsertion("antares", info, b"right")]).values():
        done.result(30)
    assert read_by("antares", "wrong") == KafkaError._AUTHENTICATION
    assert read_by("antares", "right") in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)

    def allowed(kind: Any, name: str, pattern: Any) -> Any:
        return AclBinding(kind, name, pattern, "User:antares", "*", AclOperation.READ, AclPermissionType.ALLOW)

    rights = [
        allowed(ResourceType.TOPIC, "for-antares", ResourcePatternType.LITERAL),
        allowed(ResourceType.GROUP, "antares-", ResourcePatternType.PREFIXED),
    ]
    for granted in admin.create_acls(rights).values():
        granted.result(30)
    until(lambda: read_by("antares", "right") == b"packet")


# --- Flink ------------------------------------------------------------------------------------


def test_flink_has_a_slot_per_task_manager_and_is_started_once(flink: ClusterSettings) -> None:
    seen = overview(flink.flink)
    assert seen is not None
    assert (seen["taskmanagers"], seen["slots-total"]) == (2, 2)
    assert seen["flink-version"] == flink.flink.release
    assert not flink_up(flink)
    configured = {one["key"]: one["value"] for one in rest(flink.flink, "/jobmanager/config")}
    assert configured["state.backend.type"] == "rocksdb"
    assert configured["state.checkpoints.dir"] == (flink.folder / "flink" / "checkpoints").as_uri()


def test_an_endless_job_runs_checkpoints_and_keeps_them_when_it_is_cancelled(
    flink: ClusterSettings, tmp_path: Path
) -> None:
    settings, written = flink.flink, tmp_path / "written"
    asked = ("--externalized_checkpoints_enabled", "--retain_externalized_checkpoints_on_cancellation")
    arguments = ("--checkpointing_interval=1000", *asked)
    with flink_cluster_engine(arguments, lambda line: None, tmp_path / "ticks", flink.folder) as run:

        def until_cancelled() -> None:
            with contextlib.suppress(RuntimeError):
                run(Ticks(str(written)))

        runs = threading.Thread(target=until_cancelled)
    runs.start()
    until(lambda: jobs_named(flink, "ticks"))
    (job,) = jobs_named(flink, "ticks")
    until(lambda: written.exists() and len(written.read_text().split()) >= 5)

    def told() -> Any:
        return rest(settings, f"/jobs/{job['jid']}/checkpoints")

    until(lambda: told()["counts"]["completed"] >= 2)
    assert rest(settings, f"/jobs/{job['jid']}")["state"] == "RUNNING"
    config = rest(settings, f"/jobs/{job['jid']}/checkpoints/config")
    assert config["state_backend"] == "EmbeddedRocksDBStateBackend"
    assert config["externalization"] == {"enabled": True, "delete_on_cancellation": False}
    rest(settings, f"/jobs/{job['jid']}?mode=cancel", "PATCH")
    until(lambda: rest(settings, f"/jobs/{job['jid']}")["state"] == "CANCELED")
    runs.join(PATIENCE_S)
    kept = told()["latest"]["completed"]["external_path"].removeprefix("file:")
    assert (Path(kept) / "_metadata").is_file()


def jobs_named(cluster: ClusterSettings, name: str) -> list[dict[str, Any]]:
    return [job for job in rest(cluster.flink, "/jobs/overview")["jobs"] if name in job["name"]]


class Ticks:
    """A job that writes a line to a file every tenth of a second, for ever."""

    def __init__(self, path: str) -> None:
        self.path = path

    def build(self, flow: beam.Pipeline, *, spread: bool = False) -> None:
        path = self.path

        # All of it is defined here, so that it travels with the job: workers cannot import this module.
        class Restrictions(beam.RestrictionProvider):
            def initial_restriction(self, element: bytes) -> OffsetRange:
                return OffsetRange(0, 2**40)

            def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
                return OffsetRestrictionTracker(restriction)

            def restriction_size(self, element: bytes, restriction: OffsetRange) -> int:
                return 1

        restrictions = beam.DoFn.RestrictionParam(Restrictions())

        class Tick(beam.DoFn):
            @beam.DoFn.unbounded_per_element()
            def process(self, element: bytes, tracker: Any = restrictions) -> Iterator[int]:
                number = tracker.current_restriction().start
                if tracker.try_claim(number):
                    yield number
                    tracker.defer_remainder(Duration(0.1))

        def write(number: int) -> None:
            with open(path, "a") as file:
                file.write(f"{number}\n")

        flow | "Start" >> beam.Impulse() | "Tick" >> beam.ParDo(Tick()) | "Write" >> beam.Map(write)


def produce_on_cluster(night: Path, out: Path, cluster: ClusterSettings, kafka: str = "none") -> list[str]:
    """Produce a night on the cluster; returns what was announced."""
    announced: list[str] = []
    filters, problems = load_checked_filters(None)
    config, brokers = load_production_config(None), load_brokers(None)
    request = RunRequest(out, config, brokers, filters, problems, kafka)
    engine = flink_cluster_engine((), announced.append, out, cluster.folder)
    run_chain(request, night_input(night, request), no_progress, engine)
    return announced


def test_a_night_on_the_cluster_writes_the_local_runners_bytes_and_reaches_kafka_whole(
    flink: ClusterSettings, kafka: ClusterSettings, night: Path, local: Path, tmp_path: Path
) -> None:
    out = tmp_path / "whole"
    (line,) = produce_on_cluster(night, out, flink, kafka.kafka.bootstrap)
    assert f"cluster of Flink {flink.flink.release} with 2 slots" in line
    for folder in ("archive", "filters"):
        assert digests(out, folder) == digests(local, folder)
        assert len(digests(out, folder)) >= 3
    alerts = sum(visit["alerts"] for visit in ledger(out))
    assert alerts > 50
    bootstrap = kafka.kafka.bootstrap
    topic = "lsst-alerts-v11"
    packets = [one.value for one in listen_topic(bootstrap, topic, idle_timeout_s=5.0, limit=None)]
    assert len(set(packets)) == alerts
    assert [job["state"] for job in jobs_named(flink, "whole")] == ["FINISHED"]


def test_a_task_manager_and_a_worker_killed_in_the_night_change_nothing(
    flink: ClusterSettings, night: Path, local: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    failed: list[BaseException] = []

    def run() -> None:
        try:
            produce_on_cluster(night, out, flink)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: any((out / ".store" / "images").rglob("*")) or failed)  # detectors are in work
    refused = pytest.raises(FlinkSetupError, match="still writes to")
    with refused, flink_cluster_engine((), lambda line: None, out, flink.folder):
        pass
    kill(flink, task_managers(flink.flink)[1])
    assert flink_up(flink)
    thread.join(PATIENCE_S)
    assert not failed, log_end(log_of(flink, job_manager(flink.flink)))
    for folder in ("archive", "brokers", "filters"):
        assert digests(out, folder) == digests(local, folder)
    assert ledger(out) == ledger(local)


def test_workers_end_when_no_job_needs_them(flink: ClusterSettings) -> None:
    pool = running_pid(flink, worker_pool(flink.flink))
    until(lambda: not list_children(pool), 30.0)


def list_children(pid: int | None) -> list[str]:
    """The children of a process, whichever of its threads started them."""
    return [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def test_down_leaves_no_process_and_up_again_is_possible(flink: ClusterSettings) -> None:
    assert processes_of(flink)
    kill(flink, worker_pool(flink.flink))  # what it leaves behind is found as well
    flink_down(flink)
    stop(flink, kafka_service(flink.kafka))
    assert processes_of(flink) == []
    ports = [port for service in flink_services(flink.flink) for port in service.ports]
    assert not [port for port in ports if is_listening(port)]

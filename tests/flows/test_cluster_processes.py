"""What the cluster's commands do without Java: settings, configurations, processes, the pool of workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from apache_beam.portability.api import beam_fn_api_pb2
from click.testing import CliRunner

from runners.cli import main
from runners.cluster.flink import flink_configuration, flink_up
from runners.cluster.kafka import kafka_version_of, server_properties
from runners.cluster.processes import (
    Service,
    is_alive,
    is_listening,
    log_end,
    log_of,
    memory_mb,
    running_pid,
    start,
    stop,
    wait_until,
)
from runners.cluster.settings import ClusterError, ClusterSettings, load_cluster_settings
from runners.cluster.worker_pool import WorkerPool

SLEEPER = [sys.executable, "-S", "-c", "import time; print('slept', flush=True); time.sleep(600)"]
# Starts a child that ignores a polite end, says so, and waits with it.
STUBBORN_PARENT = """
import subprocess, sys
child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('child', flush=True); time.sleep(600)"
subprocess.run([sys.executable, "-S", "-c", child])
"""
PATIENCE_S = 20.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterSettings]:
    settings = load_cluster_settings(tmp_path / "cluster")
    settings.folder.mkdir()
    yield settings
    stop(settings, SERVICE)


SERVICE = Service("sleeper", ())


def until(fact: object, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not fact():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.02)


# --- settings ---------------------------------------------------------------------------------


def test_settings_in_the_folder_lie_over_the_shipped_ones(tmp_path: Path) -> None:
    shipped = load_cluster_settings(tmp_path)
    (tmp_path / "cluster.yaml").write_text("kafka: {port: 19092}\nflink: {task_managers: 3}\n")
    own = load_cluster_settings(tmp_path)
    assert own.kafka.bootstrap == "127.0.0.1:19092"
    assert own.kafka.secured_bootstrap == "127.0.0.1:19094"
    assert own.kafka.version == shipped.kafka.version
    assert own.flink.slots == 3
    assert shipped.flink.slots == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("kafka: {prot: 1}", "kafka.prot"),
        ("flink: {rest_port: 80}", "flink.rest_port"),
        ("zookeeper: {}", "zookeeper"),
        ("kafka: 9092", "kafka: expected"),
        ("[1]", "expected blocks"),
    ],
)
def test_settings_that_cannot_be_used_are_named_with_their_file(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ClusterError, match=f"cluster.yaml: .*{named}"):
        load_cluster_settings(tmp_path)


def test_kafka_listens_on_the_loopback_interface_only_and_only_the_job_is_let_in_unnamed(tmp_path: Path) -> None:
    kafka = load_cluster_settings(tmp_path).kafka
    values = dict(line.split("=", 1) for line in server_properties(kafka, tmp_path).splitlines())
    listeners = dict(one.split("://") for one in values["listeners"].split(","))
    assert {address.split(":")[0] for address in listeners.values()} == {"127.0.0.1"}
    protocols = dict(one.split(":") for one in values["listener.security.protocol.map"].split(","))
    assert protocols == {"JOB": "PLAINTEXT", "CONTROLLER": "PLAINTEXT", "TEAMS": "SASL_PLAINTEXT"}
    assert listeners["JOB"] == kafka.bootstrap
    assert listeners["TEAMS"] == kafka.secured_bootstrap
    assert values["super.users"] == "User:ANONYMOUS;User:admin"
    assert "allow.everyone.if.no.acl.found" not in values


def test_the_version_of_kafkas_jars_is_that_of_the_broker_itself(tmp_path: Path) -> None:
    assert kafka_version_of(tmp_path) is None
    for name in ("kafka-clients-4.2.0.jar", "kafka_2.13-4.3.1.jar"):
        (tmp_path / name).touch()
    assert kafka_version_of(tmp_path) == "4.3.1"


def test_flink_is_bound_to_the_loopback_interface_with_its_state_in_the_folder(tmp_path: Path) -> None:
    settings = load_cluster_settings(tmp_path).flink
    values = flink_configuration(settings, tmp_path, prometheus=False)
    bound = {key: value for key, value in values.items() if "bind" in key}
    assert len(bound) == 3
    assert set(bound.values()) == {"127.0.0.1"}
    assert values["state.checkpoints.dir"] == f"file://{tmp_path}/checkpoints"
    assert not [key for key in values if key.startswith("metrics.reporter.")]
    with_metrics = flink_configuration(settings, tmp_path, prometheus=True)
    assert with_metrics["metrics.reporter.prometheus.port"] == settings.prometheus_ports


def test_a_flink_of_another_minor_version_than_the_job_servers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("flink: {release: 1.20.5}\n")
    with pytest.raises(ClusterError, match=r"Flink 1\.20\.5 cannot run jobs of a job server for Flink 1\.19"):
        flink_up(load_cluster_settings(tmp_path))


# --- processes --------------------------------------------------------------------------------


def test_a_process_is_found_again_and_ended_with_its_children(cluster: ClusterSettings) -> None:
    pid = start(cluster, SERVICE, [*SLEEPER[:3], "import os, time; os.fork(); os.write(1, b'.'); time.sleep(600)"])
    until(lambda: log_of(cluster, SERVICE).read_text() == "..")
    assert memory_mb(cluster, SERVICE) > 0
    assert running_pid(cluster, SERVICE) == pid
    assert stop(cluster, SERVICE) == 2
    assert running_pid(cluster, SERVICE) is None
    assert not is_alive(pid)
    assert stop(cluster, SERVICE) == 0


def test_children_of_a_process_that_was_killed_are_ended_although_they_do_not_want_to(
    cluster: ClusterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runners.cluster.processes.STOP_PATIENCE_S", 0.3)
    pid = start(cluster, SERVICE, [sys.executable, "-S", "-c", STUBBORN_PARENT])
    until(lambda: "child" in log_of(cluster, SERVICE).read_text())
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid))
    assert running_pid(cluster, SERVICE) is None
    assert stop(cluster, SERVICE) == 1
    assert stop(cluster, SERVICE) == 0


def test_a_process_that_was_stopped_is_ended_as_well(cluster: ClusterSettings) -> None:
    pid = start(cluster, SERVICE, SLEEPER)
    os.kill(pid, signal.SIGSTOP)
    assert stop(cluster, SERVICE) == 1
    assert not is_alive(pid)


def test_another_program_with_the_number_in_the_pid_file_is_left_alone(cluster: ClusterSettings) -> None:
    with subprocess.Popen(SLEEPER, stdout=subprocess.DEVNULL) as stranger:
        (cluster.folder / "pids").mkdir()
        (cluster.folder / "pids" / "sleeper.pid").write_text(f"{stranger.pid}\n")
        assert running_pid(cluster, SERVICE) is None
        assert stop(cluster, SERVICE) == 0
        assert stranger.poll() is None
        stranger.kill()


def test_services_of_two_folders_do_not_know_each_other(cluster: ClusterSettings, tmp_path: Path) -> None:
    other = load_cluster_settings(tmp_path / "cluster2")
    start(cluster, SERVICE, SLEEPER)
    assert running_pid(other, SERVICE) is None
    assert stop(other, SERVICE) == 0
    assert running_pid(cluster, SERVICE) is not None


def test_a_port_that_another_program_holds_is_said_before_anything_is_started(cluster: ClusterSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"another program listens on 127.0.0.1:{port}.*cluster.yaml"):
            start(cluster, Service("sleeper", (port,)), SLEEPER)
    assert not is_listening(port)
    assert not log_of(cluster, SERVICE).exists()


def test_a_process_that_ends_while_it_starts_is_told_with_the_end_of_its_log(cluster: ClusterSettings) -> None:
    start(cluster, SERVICE, [sys.executable, "-S", "-c", "print('all went well'); raise SystemExit('no memory left')"])
    with pytest.raises(ClusterError, match=r"(?s)sleeper ended while it started; the end of .*sleeper\.log.*no memory"):
        wait_until(cluster, SERVICE, lambda: False, PATIENCE_S)


def test_a_process_that_is_never_ready_is_told_in_time(cluster: ClusterSettings) -> None:
    start(cluster, SERVICE, SLEEPER)
    until(lambda: "slept" in log_of(cluster, SERVICE).read_text())
    with pytest.raises(ClusterError, match=r"(?s)was not ready within 0\.2 s; the end of .*slept"):
        wait_until(cluster, SERVICE, lambda: False, 0.2)


def test_the_log_of_the_start_before_is_kept_and_only_the_end_is_quoted(cluster: ClusterSettings) -> None:
    start(cluster, SERVICE, [*SLEEPER[:3], "print(*range(1000), sep='\\n')"])
    until(lambda: running_pid(cluster, SERVICE) is None)
    log = log_of(cluster, SERVICE)
    assert "988" in log_end(log)
    assert "987" not in log_end(log)
    start(cluster, SERVICE, SLEEPER)
    assert log.with_name("sleeper.log.before").read_text().endswith("999\n")


DYING = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


# --- the pool of workers ----------------------------------------------------------------------


def test_a_worker_is_ended_when_the_one_who_asked_for_it_no_longer_listens_and_not_by_its_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("runners.cluster.worker_pool._WORKER", "import time; time.sleep(600)")
    pool = WorkerPool(tmp_path / "workers.json")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        for server in (one, other):  # two task managers give out the same id
            request = beam_fn_api_pb2.StartWorkerRequest(worker_id="1-1")
            request.control_endpoint.url = f"127.0.0.1:{server.getsockname()[1]}"
            assert not pool.StartWorker(request, None).error
        first, second = (worker.process for worker in pool._workers)
        pool.StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="1-1"), None)
        pool.sweep()
        assert (first.poll(), second.poll()) == (None, None)
        one.close()
        pool.sweep()
        assert first.poll() is not None
        assert second.poll() is None
    pool.sweep()
    assert second.poll() is not None
    assert not pool._workers


def test_a_worker_that_ends_by_itself_is_logged_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("runners.cluster.worker_pool._WORKER", DYING)
    pool = WorkerPool(tmp_path / "workers.json")
    request = beam_fn_api_pb2.StartWorkerRequest(worker_id="1-1")
    request.control_endpoint.url = "127.0.0.1:9"
    pool.StartWorker(request, None)
    process = pool._workers[0].process
    process.wait()
    pool.sweep()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"worker {process.pid} ended by itself, killed by SIGSEGV"
    ]


def test_a_worker_that_ends_before_its_task_manager_has_it_is_started_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("runners.cluster.worker_pool._WORKER", DYING)
    pool = WorkerPool(tmp_path / "workers.json")
    with socket.create_server(("127.0.0.1", 0)) as server:
        request = beam_fn_api_pb2.StartWorkerRequest(worker_id="1-1")
        request.control_endpoint.url = f"127.0.0.1:{server.getsockname()[1]}"
        pool.StartWorker(request, None)
        pids = set()
        for _ in range(100):
            if not pool._workers:
                break
            pids.add(pool._workers[0].process.pid)
            pool._workers[0].process.wait()
            pool.sweep()
    assert len(pids) == 5
    assert [record.levelname for record in caplog.records].count("WARNING") == 5
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_the_next_pool_starts_the_workers_again_that_are_still_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("runners.cluster.worker_pool._WORKER", "import time; time.sleep(600)")
    pool = WorkerPool(tmp_path / "workers.json")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        for server in (one, other):
            request = beam_fn_api_pb2.StartWorkerRequest(worker_id="1-1")
            request.control_endpoint.url = f"127.0.0.1:{server.getsockname()[1]}"
            pool.StartWorker(request, None)
        for worker in pool._workers:  # as they end with their pool
            worker.process.kill()
            worker.process.wait()
        other.close()
        following = WorkerPool(tmp_path / "workers.json")
        following.sweep()
        (started,) = following._workers
        assert started.control == f"127.0.0.1:{one.getsockname()[1]}"
        assert started.process.poll() is None
    following.sweep()
    assert started.process.poll() is not None
    assert not following._workers
    assert not WorkerPool(tmp_path / "workers.json")._workers


# --- the command ------------------------------------------------------------------------------


def test_status_of_a_cluster_that_is_not_up_says_so(tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["cluster", "status", "--folder", str(tmp_path), "--json"])
    assert told.exit_code == 0
    services = json.loads(told.stdout)["services"]
    assert {"kafka", "flink-job-manager", "beam-job-server", "python-worker-pool"} < set(services)
    assert {one["pid"] for one in services.values()} == {None}


def test_down_without_anything_up_ends_nothing(tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["cluster", "down", "--folder", str(tmp_path)])
    assert told.exit_code == 0
    assert told.stdout == "Flink: 0 processes ended\nKafka: 0 processes ended\n"


def test_the_embedded_kafka_is_refused_on_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "visits.jsonl").touch()
    arguments = ["produce", str(tmp_path), "--out", str(tmp_path / "out"), "--kafka", "embedded"]
    told = CliRunner().invoke(main, [*arguments, "--runner", "flink-cluster"])
    assert told.exit_code == 2
    assert "give HOST:PORT" in told.stderr

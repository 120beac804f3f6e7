"""Live jobs on a Flink cluster, from visits announced on a real Kafka broker to packets on it. `make cluster-test`."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import write_night
from test_cluster import free_ports, kill, until
from test_flink import digests

from runners.cli import main
from runners.cluster.flink import flink_down, flink_up, rest, worker_pool
from runners.cluster.kafka import kafka_service, kafka_up
from runners.cluster.processes import is_listening, stop
from runners.cluster.settings import ClusterSettings, load_cluster_settings
from runners.flink_operations import latest_saved, read_live_job
from runners.kafka import DIA_SOURCE_ID_HEADER, consumer_settings

pytestmark = pytest.mark.cluster
PATIENCE_S = 240.0
PROMETHEUS_PREFIX = "flink_taskmanager_job_task_operator_nightstream_"
FOLDERS = ("archive", "brokers", "filters")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSettings]:
    """Kafka, and Flink with two slots."""
    folder = tmp_path_factory.mktemp("cluster")
    port = free_ports(20)
    ports = {"rest_port": port, "rpc_port": port + 1, "job_server_port": port + 3, "worker_pool_port": port + 4}
    own = {
        "kafka": {"port": port + 5},
        "flink": {**ports, "prometheus_ports": f"{port + 10}-{port + 19}", "task_managers": 2},
    }
    (folder / "cluster.yaml").write_text(yaml.safe_dump(own))
    settings = load_cluster_settings(folder)
    try:
        kafka_up(settings)
        flink_up(settings)
        yield settings
    finally:
        flink_down(settings)
        stop(settings, kafka_service(settings.kafka))


@pytest.fixture(scope="module")
def night(two_nights: Path, visits: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_night(tmp_path_factory.mktemp("live") / "night", two_nights, visits[:4])


class Trial:
    """One run of the night with topics of its own."""

    def __init__(self, cluster: ClusterSettings, night: Path, folder: Path, name: str) -> None:
        self.cluster, self.night, self.out, self.name = cluster, night, folder / name, name
        self.bootstrap = cluster.kafka.bootstrap
        self.topics = [f"{name}-rubin", f"{name}-ocf"]
        self.brokers = folder / f"{name}.yaml"
        kafka = [
            {"name": encoding, "stream": "full", "encoding": encoding, "sink": "kafka", "topic": f"{name}-{encoding}"}
            for encoding in ("rubin", "ocf")
        ]
        mirror = {"name": "mirror", "stream": "demo.bright-new", "encoding": "rubin", "sink": "files"}
        self.brokers.write_text(yaml.safe_dump({"brokers": [*kafka, mirror]}))

    def run(self, *arguments: object) -> str:
        """Run a command; what it says on stdout."""
        result = CliRunner().invoke(main, [str(one) for one in arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout.strip()

    def asked(self) -> list[object]:
        return ["--out", self.out, "--kafka", self.bootstrap, "--brokers", self.brokers]

    def announce(self, night: Path | None = None) -> None:
        announced = night or self.night
        self.run("announce", announced, "--bootstrap", self.bootstrap, "--topic", f"{self.name}-visits", "--quiet")

    def submit(self, *more: object) -> str:
        given = ["--bootstrap", self.bootstrap, "--topic", f"{self.name}-visits", "--known-objects", self.night]
        cluster = ["--cluster", self.cluster.folder, "--checkpoint-interval", 2]
        return self.run("flink", "submit", *given, *self.asked(), *cluster, *more)

    def await_visits(self, count: int) -> None:
        until(lambda: len(list((self.out / "ledger").glob("[0-9]*.json"))) >= count, PATIENCE_S)

    def status(self) -> dict[str, Any]:
        return json.loads(self.run("flink", "status", self.out, "--json"))

    def packets(self) -> dict[str, dict[int, set[bytes]]]:
        """What lies on each topic, by its own name: all values of each diaSourceId."""
        return {topic.removeprefix(self.name): _packets(self.bootstrap, topic) for topic in self.topics}


def _packets(bootstrap: str, topic: str) -> dict[int, set[bytes]]:
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer(consumer_settings(bootstrap, "checkers", from_beginning=True))
    found: dict[int, set[bytes]] = {}
    try:
        for partition in consumer.list_topics(topic, timeout=10).topics[topic].partitions:
            place = TopicPartition(topic, partition, 0)
            end = consumer.get_watermark_offsets(place, timeout=10)[1]
            consumer.assign([place])
            offset = 0
            while offset < end:
                message = consumer.poll(10)
                assert message is not None and message.error() is None
                offset = message.offset() + 1
                dia_source_id = int(dict(message.headers())[DIA_SOURCE_ID_HEADER])
                found.setdefault(dia_source_id, set()).add(message.value())
    finally:
        consumer.close()
    return found


@pytest.fixture(scope="module")
def trial(cluster: ClusterSettings, night: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trial]:
    folder = tmp_path_factory.mktemp("out")
    return lambda name: Trial(cluster, night, folder, name)


@pytest.fixture(scope="module")
def local(trial: Callable[[str], Trial]) -> Trial:
    """The night by the local runner, sent to the same Kafka."""
    run = trial("local")
    run.run("produce", run.night, *run.asked(), "--quiet")
    return run


def assert_same(run: Trial, local: Trial) -> None:
    for folder in FOLDERS:
        assert digests(run.out, folder) == digests(local.out, folder)
        assert digests(local.out, folder)
    packets = run.packets()
    assert packets == local.packets()
    # No packet was sent in two forms, and all were.
    assert all(len(values) == 1 for topic in packets.values() for values in topic.values())
    assert [len(topic) for topic in packets.values()] == [run.status()["ledger"]["alerts"]] * 2


def _metrics(told: dict[str, Any]) -> dict[str, int]:
    """Our metrics of all stages, from what `flink status` tells."""
    return {name: value for stage in told["stages"] for name, value in stage["metrics"].items()}


def _on_prometheus(cluster: ClusterSettings) -> dict[str, float]:
    """The same as Prometheus gets them, over all processes."""
    first, last = map(int, cluster.flink.prometheus_ports.split("-"))
    found: dict[str, float] = {}
    for port in filter(is_listening, range(first, last + 1)):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        for name, value in re.findall(rf"^{PROMETHEUS_PREFIX}(\w+){{.*}} (\S+)$", "\n".join(lines), re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def assert_told_what_happens(run: Trial) -> None:
    """Metrics at the REST interface and for Prometheus with our names, and no lag once all is done."""
    told = run.status()
    ledger = [json.loads(path.read_text()) for path in (run.out / "ledger").glob("[0-9]*.json")]
    detectors = sum(record["detectors"]["expected"] for record in ledger)
    figures = {
        "announcements_read": detectors,
        "source_offset": detectors,
        "visits_open": 0,
        "visits_closed": 4,
        "visits_timed_out": 0,
        "detectors_subtracted": detectors,
        "dia_sources": sum(record["dia_sources"]["selected"] for record in ledger),
        "alerts_packaged": told["ledger"]["alerts"],
        "packets_acknowledged": 2 * told["ledger"]["alerts"],
        "filter_passes": sum(one["passed"] for record in ledger for one in record["filters"].values()),
        "filtered_packets_acknowledged": 0,
        "visits_accounted": 4,
    }
    assert {name: _metrics(told).get(name) for name in figures} == figures
    scraped = _on_prometheus(run.cluster)
    assert {name: scraped.get(name) for name in figures} == figures
    assert scraped["bytes_acknowledged"] == _metrics(told)["bytes_acknowledged"] > 10_000
    assert (told["source"]["behind"], told["event_time"]["behind_s"]) == (0, 0.0)
    assert told["event_time"]["newest_visit"] == max(record["visit"] for record in ledger)
    assert told["last_failure"] is None
    # Its processes log JSON lines, and what was done to the job stands beside them.
    lines = (run.cluster.logs / "commands.log").read_text().splitlines()
    assert [json.loads(line)["message"] for line in lines if str(run.out) in line] == ["submitted"]
    pool = (run.cluster.logs / "python-worker-pool.log").read_text()
    assert "started for the task manager at" in pool


@pytest.mark.parametrize("parallelism", [1, 2])
def test_a_live_night_gives_the_local_runners_bytes_at_any_parallelism(
    trial: Callable[[str], Trial], local: Trial, parallelism: int
) -> None:
    run = trial(f"slots{parallelism}")
    run.announce()
    job = run.submit("--parallelism", parallelism)
    run.run("flink", "watch", run.out, "--visits", 4)
    told = run.status()
    assert (told["job"], told["state"], told["restarts"]) == (job, "RUNNING", 0)
    assert told["ledger"]["visits"] == 4
    assert told["ledger"]["latency"]["alerts"] == told["ledger"]["alerts"]
    until(lambda: _metrics(run.status()).get("visits_accounted") == 4)
    assert_told_what_happens(run)
    run.run("flink", "cancel", run.out)
    run.run("flink", "close", run.out)
    assert_same(run, local)


def test_a_job_stopped_with_a_savepoint_goes_on_as_if_nothing_had_been(
    trial: Callable[[str], Trial], local: Trial, visits: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = trial("upgraded")
    first, rest_of_it = (
        write_night(tmp_path / name, run.night, records)
        for name, records in (("first", visits[:2]), ("rest", visits[2:4]))
    )
    run.announce(first)
    run.submit("--parallelism", 2)
    run.await_visits(2)
    saved = run.run("flink", "cancel", run.out, "--savepoint")
    assert run.status()["state"] == "CANCELED"
    # Other code comes with another worker pool.
    kill(run.cluster, worker_pool(run.cluster.flink))
    assert flink_up(run.cluster)
    run.announce(rest_of_it)
    until(lambda: rest(run.cluster.flink, "/overview")["slots-available"] == 2)
    run.run("flink", "resume", run.out)
    assert run.status()["restored"] == saved
    run.await_visits(4)
    # The visits before it were not worked on again.
    ledger = [json.loads(path.read_text()) for path in sorted((run.out / "ledger").glob("[0-9]*.json"))]
    assert [record["revision"] for record in ledger] == [0] * 4
    # And a job that is lost without a savepoint, from its newest checkpoint.
    until(lambda: run.status()["checkpoint"] is not None)
    run.run("flink", "cancel", run.out)
    until(lambda: rest(run.cluster.flink, "/overview")["slots-available"] == 2)
    assert latest_saved(read_live_job(run.out)) != saved
    run.run("flink", "resume", run.out, "--parallelism", 1)
    run.run("flink", "cancel", run.out)
    run.run("flink", "close", run.out)
    refused = CliRunner().invoke(main, ["flink", "resume", str(run.out)])
    assert refused.exit_code == 1
    assert "CLOSED" in refused.stderr
    assert_same(run, local)

"""Live jobs on a Flink cluster, from visits announced on a real Kafka broker to packets on it. `make cluster-test`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import Run, write_night
from own_cluster import kill, own_cluster, until
from test_flink import digests

import runners
from runners.cli import main
from runners.cluster.flink import flink_down, flink_up, rest, worker_pool
from runners.cluster.kafka import kafka_service, kafka_up
from runners.cluster.processes import is_listening, stop
from runners.cluster.settings import ClusterSettings
from runners.flink_operations import latest_saved, ledger_figures, read_live_job
from runners.kafka import DIA_SOURCE_ID_HEADER, KafkaMessageLog, consumer_settings
from schemas.manifests import announcements, read_manifest

pytestmark = pytest.mark.cluster
PATIENCE_S = 240.0
SLOTS = 4
PROMETHEUS_PREFIX = "flink_taskmanager_job_task_operator_nightstream_"
FOLDERS = ("archive", "brokers", "filters")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSettings]:
    """Kafka, and Flink with four slots."""
    settings = own_cluster(tmp_path_factory.mktemp("cluster"), task_managers=SLOTS)
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
    assert [len(topic) for topic in packets.values()] == [ledger_figures(run.out)["alerts"]] * 2


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


@pytest.mark.parametrize("parallelism", [1, 2, 4])
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


def test_a_night_on_the_embedded_flink_gives_the_local_runners_bytes(
    trial: Callable[[str], Trial], local: Trial
) -> None:
    run = trial("embedded")
    run.run("produce", run.night, *run.asked(), "--runner", "flink", "--quiet")
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
    until(lambda: rest(run.cluster.flink, "/overview")["slots-available"] == SLOTS)
    run.run("flink", "resume", run.out)
    assert run.status()["restored"] == saved
    run.await_visits(4)
    # The visits before it were not worked on again.
    ledger = [json.loads(path.read_text()) for path in sorted((run.out / "ledger").glob("[0-9]*.json"))]
    assert [record["revision"] for record in ledger] == [0] * 4
    # And a job that is lost without a savepoint, from its newest checkpoint.
    until(lambda: run.status()["checkpoint"] is not None)
    run.run("flink", "cancel", run.out)
    until(lambda: rest(run.cluster.flink, "/overview")["slots-available"] == SLOTS)
    assert latest_saved(read_live_job(run.out)) != saved
    run.run("flink", "resume", run.out, "--parallelism", 1)
    run.run("flink", "cancel", run.out)
    run.run("flink", "close", run.out)
    refused = CliRunner().invoke(main, ["flink", "resume", str(run.out)])
    assert refused.exit_code == 1
    assert "CLOSED" in refused.stderr
    assert_same(run, local)


# --- upgrades ---------------------------------------------------------------------------------

CHECKOUT = Path(runners.__file__).parents[1]
SAVEPOINT = Path(__file__).parents[1] / "golden" / "savepoint.tar.xz"  # of make_savepoint.py
_COMMAND = "import sys; from runners.cli import main; sys.exit(main(sys.argv[1:]))"
SAVED_MESSAGES = 5  # two visits of two detectors, and one of the third
# What a release may change: pixel work, the ledger, stages that keep nothing, fields of the position with defaults.
NEXT_RELEASE = (
    ("transforms/cutouts.py", "notes=exposure.notes", 'notes=(*exposure.notes, "of the next release")'),
    ("transforms/visit_stream.py", "    finished: bool = False\n", "    finished: bool = False\n    looked: int = 1\n"),
    (
        "pipelines/alert_production.py",
        "import VisitList\n",
        "import VisitList\nfrom schemas.elements import StageElement\n",
    ),
    (
        "pipelines/alert_production.py",
        "subtracted = admitted.good |",
        'subtracted = admitted.good | "Look" >> beam.Map(lambda one: one).with_output_types(StageElement) |',
    ),
)
# What it may not: the label of a stage that feeds one with state.
NO_RELEASE = (("transforms/association.py", '"SendToSkyCells"', '"SendToCells"'),)


def release(folder: Path, changes: Iterable[tuple[str, str, str]]) -> Path:
    """A copy of this checkout with other code: (file, what stands there once, what is to stand there)."""
    for package in ("pipelines", "runners", "schemas", "transforms"):
        shutil.copytree(CHECKOUT / package, folder / package)
    for fetched in (".cluster", ".flink"):
        (folder / fetched).symlink_to(CHECKOUT / fetched)
    for name, old, new in changes:
        text = (folder / name).read_text("utf-8")
        assert text.count(old) == 1
        (folder / name).write_text(text.replace(old, new), "utf-8")
    return folder


def of_release(tree: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command of a release, as a process of its own."""
    command = [sys.executable, "-c", _COMMAND, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done


def announced(night: Path) -> list[bytes]:
    """The messages of all detectors of a night."""
    return [message for visit in read_manifest(night).visits for message in announcements(visit)]


def detectors_done(out: Path) -> int:
    return len(list((out / ".store" / "cutouts").rglob("*.*")))


def records_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((out / "ledger").glob("[0-9]*.json"))]


def test_the_next_release_goes_on_from_a_savepoint_amid_a_visit(
    trial: Callable[[str], Trial], local: Trial, tmp_path: Path
) -> None:
    run = trial("released")
    log, messages = KafkaMessageLog(run.bootstrap, "released-visits"), announced(run.night)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"quarantine": {"detector_time_limit_s": 600}}))
    log.append(messages[:SAVED_MESSAGES])
    run.submit("--parallelism", 2, "--config", config, "--visit-timeout", 600)
    run.await_visits(2)
    until(lambda: detectors_done(run.out) >= SAVED_MESSAGES)
    saved = run.run("flink", "cancel", run.out, "--savepoint")
    refused = of_release(release(tmp_path / "none", NO_RELEASE), "flink", "resume", run.out)
    assert refused.returncode == 1
    assert "Cannot map" in refused.stderr
    config.write_text(yaml.safe_dump({"quarantine": {"detector_time_limit_s": 500}}))
    tree = release(tmp_path / "next", NEXT_RELEASE)
    flink_down(run.cluster)
    try:
        for command in (["cluster", "up", "flink", "--folder", run.cluster.folder], ["flink", "resume", run.out]):
            done = of_release(tree, *command)
            assert done.returncode == 0, done.stderr
        assert run.status()["restored"] == saved
        log.append(messages[SAVED_MESSAGES:])
        run.await_visits(4)
        run.run("flink", "cancel", run.out)
    finally:
        flink_down(run.cluster)
        flink_up(run.cluster)
    # What was done was not done again, and what came was done by the new code.
    records = records_of(run.out)
    assert [record["revision"] for record in records] == [0] * 4
    assert ["of the next release" in record["notes"] for record in records] == [False, False, True, True]
    run.run("flink", "close", run.out)
    assert_same(run, local)


def packets_of(out: Path, visits: Iterable[int] | None = None) -> dict[int, dict[str, Any]]:
    """The packets in the archive of an output folder by diaSourceId, of some visits or of all."""
    packets = Run(out, 0, "", "").packets()
    wanted = None if visits is None else set(visits)
    return {
        packet["diaSourceId"]: packet for packet in packets if wanted is None or packet["diaSource"]["visit"] in wanted
    }


def digest_of_packets(packets: dict[int, dict[str, Any]]) -> str:
    return hashlib.sha256(repr(sorted(packets.items())).encode()).hexdigest()


def of_history(packets: dict[int, dict[str, Any]], earlier: Iterable[int]) -> set[int]:
    """The packets whose histories hold any of these earlier sources."""
    known = set(earlier)
    return {
        number
        for number, packet in packets.items()
        if known.intersection(one["diaSourceId"] for one in packet["prvDiaSources"] or ())
    }


def test_a_job_of_the_previous_release_is_gone_on_with(
    trial: Callable[[str], Trial], local: Trial, tmp_path: Path
) -> None:
    run = trial("old")
    with tarfile.open(SAVEPOINT) as archive:
        archive.extractall(tmp_path, filter="data")
    told = json.loads((tmp_path / "told.json").read_text())
    # Another job of the same night stands for the one that was saved: its store holds the pixels of the open visit.
    run.announce()
    run.submit("--visit-timeout", 600)
    run.await_visits(4)
    run.run("flink", "cancel", run.out)
    for folder in ("archive", "brokers", "failures", "filters", "ledger"):
        shutil.rmtree(run.out / folder, ignore_errors=True)
    run.run("flink", "resume", run.out, "--savepoint", tmp_path / "savepoint")
    assert run.status()["restored"] == str(tmp_path / "savepoint")
    run.await_visits(2)
    run.run("flink", "cancel", run.out)
    first, second, third, fourth = [visit.visit for visit in read_manifest(run.night).visits]
    # Visits that were done are not worked on again; of the open one, the detector that was done is there.
    records = records_of(run.out)
    assert [(record["visit"], record["revision"]) for record in records] == [(third, 0), (fourth, 0)]
    assert [record["detectors"]["processed"] for record in records] == [2, 2]
    # What was found before is the history of what comes now.
    before, after = packets_of(local.out, (first, second)), packets_of(local.out, (third, fourth))
    found = packets_of(run.out)
    expected = len(of_history(after, before))
    assert expected > 20
    assert len(of_history(found, told["dia_source_ids"])) >= 0.9 * expected
    # As long as pixels are worked on as they were then, nothing fails and the bytes are the same.
    if told["digest"] == digest_of_packets(before):
        assert [record["failures"] for record in records] == [0, 0]
        assert digest_of_packets(found) == digest_of_packets(after)

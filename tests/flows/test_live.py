"""Visits announced on a topic give the bytes of the same visits in a night folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from conftest import Run, write_night

from runners.cli import main
from runners.kafka import EmbeddedKafka, KafkaMessageLog
from runners.summary import summarise
from schemas.manifests import announcements, read_manifest
from transforms.latency import STAGES


@pytest.fixture(scope="module")
def kafka() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka() as cluster:
        yield cluster


def _live(out: Path, kafka: EmbeddedKafka, topic: str, *more: str) -> Run:
    given = ("live", "--bootstrap", kafka.bootstrap, "--topic", topic, "--out", str(out), "--json", "--quiet", *more)
    result = CliRunner().invoke(main, [*given, "--stop-at-end"])
    return Run(out, result.exit_code, result.stdout, result.stderr)


def _send(kafka: EmbeddedKafka, topic: str, messages: list[bytes]) -> None:
    KafkaMessageLog(kafka.bootstrap, topic).append(messages)


@pytest.fixture(scope="module")
def night(two_nights: Path, visits: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_night(tmp_path_factory.mktemp("live") / "night", two_nights, visits[:3])


def _chain_output(run: Run) -> dict[str, bytes]:
    return run.files("archive", "brokers", "filters")


def _ledger(run: Run) -> list[dict[str, Any]]:
    """The ledger without clocks."""
    records = [json.loads(line) for line in (run.out / "ledger" / "visits.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in one.items() if key not in ("latency", "latency_s", "seconds")} for one in records
    ]


def test_announced_visits_give_the_bytes_of_the_night_folder(
    night: Path, kafka: EmbeddedKafka, produce: Callable[..., Run], tmp_path: Path
) -> None:
    announced = CliRunner().invoke(
        main, ["announce", str(night), "--bootstrap", kafka.bootstrap, "--topic", "whole", "--cadence", "0.1"]
    )
    assert announced.exit_code == 0, announced.output
    assert announced.stderr.count("2 detectors announced") == 3
    of_folder = produce(night, tmp_path / "folder", "--quiet")
    of_topic = _live(tmp_path / "topic", kafka, "whole", "--known-objects", str(night))
    assert (of_folder.exit_code, of_topic.exit_code) == (0, 0), of_topic.stderr
    assert of_topic.summary["alerts"] > 10
    assert _chain_output(of_topic) == _chain_output(of_folder)
    assert _ledger(of_topic) == _ledger(of_folder)
    # A broken-off run is run again into the same folder.
    again = _live(tmp_path / "topic", kafka, "whole", "--known-objects", str(night))
    assert again.exit_code == 0, again.stderr
    assert _chain_output(again) == _chain_output(of_folder)


def test_a_detector_that_does_not_come_is_told_and_one_that_comes_later_gets_its_alerts(
    night: Path, kafka: EmbeddedKafka, tmp_path: Path
) -> None:
    first, second, _ = read_manifest(night).visits
    _send(kafka, "gappy", [announcements(first)[0], b"no announcement"])
    out = tmp_path / "out"
    run = _live(out, kafka, "gappy", "--visit-timeout", "0.5")
    assert run.exit_code == 0, run.stderr
    assert {one["error"] for one in run.failures()} == {"DetectorMissing", "InvalidAnnouncement"}
    (record,) = _ledger(run)
    assert record["detectors"] == {"expected": 2, "processed": 1, "failed": 1}
    ids = {packet["diaSourceId"] for packet in run.packets()}
    _send(kafka, "gappy", [announcements(first)[1], *announcements(second)])
    later = _live(out, kafka, "gappy", "--visit-timeout", "0.5")
    assert later.exit_code == 0, later.stderr
    record, _ = _ledger(later)
    assert record["detectors"] == {"expected": 2, "processed": 2, "failed": 0}
    assert record["revision"] == 1
    assert ids < {packet["diaSourceId"] for packet in later.packets()}


def test_a_live_night_says_how_late_its_alerts_were_and_that_of_a_folder_does_not(
    night: Path, kafka: EmbeddedKafka, produce: Callable[..., Run], tmp_path: Path
) -> None:
    announced_at = time.time()
    announced = CliRunner().invoke(main, ["announce", str(night), "--bootstrap", kafka.bootstrap, "--topic", "timed"])
    assert announced.exit_code == 0, announced.output
    brokers = tmp_path / "brokers.yaml"
    broker = {"name": "a", "stream": "full", "encoding": "rubin", "sink": "kafka", "topic": "timed-alerts"}
    brokers.write_text(yaml.safe_dump({"brokers": [broker]}))
    time.sleep(1.0)
    run = _live(tmp_path / "out", kafka, "timed", "--kafka", kafka.bootstrap, "--brokers", str(brokers))
    ended_at = time.time()
    assert run.exit_code == 0, run.stderr
    records = [json.loads(line) for line in (run.out / "ledger" / "visits.jsonl").read_text().splitlines()]
    assert [record["latency"]["alerts"] for record in records] == [record["alerts"] for record in records]
    for record in records:
        latency = record["latency"]
        # Each figure is rounded to 0.1 ms, and Kafka's times to 1 ms.
        assert sum(latency[stage]["mean"] for stage in STAGES) == pytest.approx(latency["total"]["mean"], abs=3e-4)
        assert latency["waiting"]["mean"] > 0.9
        assert all(latency[stage]["mean"] >= 0 for stage in STAGES)
        assert latency["total"]["max"] < ended_at - announced_at + 2e-3
    night_as_a_whole = summarise(run.out).latency
    assert night_as_a_whole is not None and night_as_a_whole["alerts"] == run.summary["alerts"]
    of_folder = produce(night, tmp_path / "folder", "--quiet")
    assert of_folder.exit_code == 0
    assert summarise(of_folder.out).latency is None


def test_what_cannot_be_listened_to_is_refused(kafka: EmbeddedKafka, tmp_path: Path) -> None:
    nobody = CliRunner().invoke(main, ["live", "--bootstrap", "127.0.0.1:9", "--out", str(tmp_path / "out")])
    assert nobody.exit_code == 1
    assert "no Kafka broker answered at 127.0.0.1:9" in " ".join(nobody.stderr.split())
    assert not (tmp_path / "out").exists()

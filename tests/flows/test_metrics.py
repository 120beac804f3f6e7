"""The stages count what the ledger says, where a runner listens to them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
import yaml
from click.testing import CliRunner
from confluent_kafka import Consumer, TopicPartition
from conftest import Run, write_night

from runners import local
from runners.cli import main
from runners.kafka import EmbeddedKafka, KafkaMessageLog, consumer_settings
from schemas.manifests import announcements, read_manifest
from transforms import metrics

Told = dict[str, Any]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    """Our metrics of the flow that a test runs, by name; the in-process runner, as we run it, keeps none.

    Of a gauge it tells any of the values that were set: their last one is looked at on a cluster.
    """
    found: Told = {}
    run = beam.Pipeline.run

    def listening(flow: beam.Pipeline, *arguments: Any, **options: Any) -> Any:
        result = run(flow, *arguments, **options)
        answer = result.metrics().query()
        for one in [*answer["counters"], *answer["gauges"]]:
            if one.key.metric.namespace == metrics.NAMESPACE:
                assert one.key.metric.name not in found, "a name belongs to one step"
                found[one.key.metric.name] = one.committed
        return result

    monkeypatch.setattr(local, "_lightened_runner", contextlib.nullcontext)
    monkeypatch.setattr(beam.Pipeline, "run", listening)
    yield found


def _ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ledger" / "visits.jsonl").read_text().splitlines()]


def _values(bootstrap: str, topic: str) -> list[bytes]:
    """What lies on a topic."""
    consumer = Consumer(consumer_settings(bootstrap, "checkers", from_beginning=True))
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        places = [TopicPartition(topic, partition, 0) for partition in partitions]
        count = sum(consumer.get_watermark_offsets(place, timeout=10)[1] for place in places)
        consumer.assign(places)
        return [consumer.poll(10).value() for _ in range(count)]
    finally:
        consumer.close()


def test_metrics_are_the_figures_of_the_ledger(
    told: Told, two_nights: Path, visits: list[dict[str, Any]], tmp_path: Path
) -> None:
    night = write_night(tmp_path / "night", two_nights, visits[:3])
    brokers = [
        {"name": "all", "stream": "full", "topic": "all"},
        {"name": "thin", "stream": "full", "topic": "thin", "encoding": "json-thin"},
        {"name": "bright", "stream": "demo.bright-new", "topic": "bright"},
    ]
    (tmp_path / "brokers.yaml").write_text(yaml.safe_dump({"brokers": brokers}))
    messages = [message for visit in read_manifest(night).visits for message in announcements(visit)]
    # The last visit lacks a detector, and one message is none.
    messages = [*messages[:2], b"no announcement", *messages[2:-1]]
    with EmbeddedKafka() as kafka:
        KafkaMessageLog(kafka.bootstrap, "visits").append(messages)
        given = ["live", "--bootstrap", kafka.bootstrap, "--kafka", kafka.bootstrap, "--out", str(tmp_path / "out")]
        more = ["--brokers", str(tmp_path / "brokers.yaml"), "--visit-timeout", "0.5", "--stop-at-end", "--quiet"]
        result = CliRunner().invoke(main, [*given, *more])
        assert result.exit_code == 0, result.stderr
        sent = {topic: _values(kafka.bootstrap, topic) for topic in ("all", "thin", "bright")}
    ledger = _ledger(tmp_path / "out")
    passed = [one["passed"] for record in ledger for one in record["filters"].values()]
    assert sum(record["alerts"] for record in ledger) > 10
    assert {told.pop("source_offset").value, told.pop("visits_open").value} <= set(range(len(messages) + 1))
    assert told == {
        "announcements_read": len(messages),
        "visits_closed": 3,
        "visits_timed_out": 1,
        "detectors_subtracted": sum(record["detectors"]["processed"] for record in ledger),
        "dia_sources": sum(record["dia_sources"]["selected"] for record in ledger),
        "alerts_packaged": sum(record["alerts"] for record in ledger),
        "packets_acknowledged": sum(stream["sent"] for record in ledger for stream in record["streams"].values()),
        "bytes_acknowledged": sum(map(len, sent["all"] + sent["thin"])),
        "filter_passes": sum(passed),
        "filtered_packets_acknowledged": sum(record["delivered"]["bright"] for record in ledger),
        "filtered_bytes_acknowledged": sum(map(len, sent["bright"])),
        "visits_accounted": 3,
        # The ledger holds those of visits.
        "failures": sum(record["failures"] for record in ledger) + 1,
    }


def test_a_night_that_is_sent_nowhere_counts_too(
    told: Told, produce: Callable[..., Run], two_nights: Path, visits: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = produce(write_night(tmp_path / "night", two_nights, visits[:1]), tmp_path / "out", "--quiet")
    assert run.exit_code == 0, run.stderr
    (record,) = _ledger(run.out)
    assert told["alerts_packaged"] == record["alerts"] > 0
    assert told["visits_accounted"] == 1
    assert told["packets_acknowledged"] == 0


def test_without_beam_around_it_a_count_does_nothing() -> None:
    metrics.ALERTS_PACKAGED.inc(3)
    metrics.SOURCE_OFFSET.set(3)

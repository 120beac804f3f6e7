"""What an operator is told of a live job that is behind, was started again, or saves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runners.flink_commands import status_lines
from runners.kafka import EmbeddedKafka, KafkaMessageLog, KafkaUnreachableError
from runners.live_health import Announced, AnnouncedVisit, announced_so_far, event_time_lag, problems, source_lag
from schemas.manifests import announcements, event_time_s, read_manifest

MIDPOINT_S = 1_795_401_878.4
NEWEST, OVERDUE = AnnouncedVisit(4, MIDPOINT_S), AnnouncedVisit(3, MIDPOINT_S - 37.0)
ANNOUNCED = Announced(end=23, newest=NEWEST, due=17, overdue=OVERDUE)
NEVER_MS = -9_223_372_036_854_775_808
ENDED_MS = 9_223_372_036_854_775_807


def _stage(name: str, watermark_ms: int | None = None, held_up: float | None = 0.0, **metrics: int) -> dict[str, Any]:
    return {"name": name, "busy": 0.1, "held_up": held_up, "watermark_ms": watermark_ms, "metrics": metrics}


def _told(**more: Any) -> dict[str, Any]:
    """A job with which all is well."""
    stages = [_stage("source", ENDED_MS, None, source_offset=23), _stage("sink", round(MIDPOINT_S * 1000) + 2000)]
    told = {
        "job": "1f",
        "state": "RUNNING",
        "ledger": {"visits": 4, "alerts": 1000, "failures": 0, "latency": None},
        "uptime_s": 900.0,
        "restarts": 0,
        "restored": None,
        "last_failure": None,
        "checkpoint": {
            "number": 8,
            "failing": False,
            "age_s": 12.0,
            "seconds": 0.4,
            "state_bytes": 10**6,
            "completed": 8,
            "failed": 0,
        },
        "stages": stages,
        "source": source_lag(ANNOUNCED, stages),
        "event_time": event_time_lag(ANNOUNCED, stages),
        **more,
    }
    return {**told, "problems": list(problems(told, 10.0))}


def test_nothing_is_said_to_be_wrong_when_nothing_is() -> None:
    told = _told()
    assert told["problems"] == []
    assert next(status_lines(told)) == "job 1f RUNNING, nothing wrong"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": "FAILED"}, "the job does not run: it is FAILED"),
        (
            {"restarts": 3, "last_failure": {"age_s": 40.0, "reason": "TimeoutException: Heartbeat"}},
            "restarted 3 times, last failed 40 s ago: TimeoutException: Heartbeat",
        ),
        (
            {"restarts": 0, "last_failure": {"age_s": 1.0, "reason": "TimeoutException: Heartbeat"}},
            "failed 1 s ago: TimeoutException: Heartbeat",
        ),
        ({"checkpoint": None}, "no checkpoint for 900 s"),
        ({"checkpoint": {**_told()["checkpoint"], "age_s": 121.0}}, "no checkpoint for 121 s"),
        ({"checkpoint": {**_told()["checkpoint"], "failing": True}}, "the latest checkpoint failed"),
        (
            {"source": source_lag(ANNOUNCED, [_stage("source", source_offset=9)])},
            "behind by 14 messages, 8 of them announced over 60 s ago",
        ),
        (
            {
                "source": {
                    "offset": 9,
                    "end": None,
                    "behind": None,
                    "overdue": None,
                    "error": "no Kafka broker answered",
                }
            },
            "Kafka does not tell what was announced: no Kafka broker answered",
        ),
        ({"stages": [_stage("slow", held_up=0.9)]}, "held up 90% of the time by those behind it: slow"),
    ],
)
def test_what_is_wrong_is_said_first(change: dict[str, Any], said: str) -> None:
    told = _told(**change)
    assert told["problems"] == [said]
    assert list(status_lines(told))[1] == f"! {said}"


def test_a_job_that_was_lost_is_told_and_one_that_is_closed_is_no_problem() -> None:
    told = {"job": "1f", "ledger": _told()["ledger"]}
    assert list(problems({**told, "state": "LOST"}, 10.0)) == ["the job does not run: it is LOST"]
    closed = {**told, "state": "CLOSED", "problems": list(problems({**told, "state": "CLOSED"}, 10.0))}
    assert next(status_lines(closed)) == "job 1f CLOSED, nothing wrong"


@pytest.mark.parametrize(
    "change",
    [
        {"restarts": 3, "last_failure": {"age_s": 3700.0, "reason": "long over"}},
        {"checkpoint": None, "uptime_s": 100.0},
        {"checkpoint": {**_told()["checkpoint"], "age_s": 119.0}},
        {"source": {"offset": None, "end": 23, "behind": None, "overdue": None, "error": None}},
    ],
)
def test_what_is_over_or_not_known_yet_is_no_problem(change: dict[str, Any]) -> None:
    assert _told(**change)["problems"] == []


def test_a_longer_interval_of_checkpoints_is_waited_for() -> None:
    told = _told(checkpoint={**_told()["checkpoint"], "age_s": 200.0})
    assert list(problems(told, 60.0)) == ["no checkpoint for 200 s"]
    assert list(problems(told, 67.0)) == []


def test_the_lag_of_the_source_in_messages() -> None:
    assert source_lag(ANNOUNCED, [_stage("a"), _stage("b", source_offset=9)])["behind"] == 14
    assert source_lag(ANNOUNCED, [_stage("b", source_offset=24)])["behind"] == 0  # read since the end was asked for
    assert source_lag(ANNOUNCED, [_stage("a")])["behind"] is None
    assert source_lag(Announced(None, error="away"), [_stage("b", source_offset=9)])["behind"] is None


def test_the_lag_of_event_time_is_that_of_the_slowest_stage_in_the_nights_clock() -> None:
    stages = [_stage("source", ENDED_MS), _stage("fast", 1_795_401_880_000), _stage("slow", 1_795_401_806_400)]
    lag = event_time_lag(ANNOUNCED, stages)
    assert lag["behind_s"] == pytest.approx(72.0)
    assert (lag["slowest"], lag["newest_visit"], lag["has_begun"]) == ("slow", 4, True)
    assert lag["overdue_visit"] == 3
    told = _told(event_time=lag)
    assert told["problems"] == ["visit 3, announced over 60 s ago, is not through; furthest behind: slow"]
    # A visit that was announced just now is on its way.
    nearly = event_time_lag(ANNOUNCED, [_stage("fast", 1_795_401_880_000), _stage("slow", 1_795_401_843_400)])
    assert (nearly["behind_s"], nearly["overdue_visit"]) == (pytest.approx(35.0), None)
    assert _told(event_time=nearly)["problems"] == []
    assert event_time_lag(ANNOUNCED, stages[:2])["behind_s"] == 0.0
    not_begun = event_time_lag(ANNOUNCED, [*stages, _stage("new", NEVER_MS)])
    assert (not_begun["has_begun"], not_begun["behind_s"]) == (False, None)
    assert _told(event_time=not_begun)["problems"] == ["visit 3, announced over 60 s ago, is not through; nothing is"]
    assert event_time_lag(Announced(0), stages)["behind_s"] is None


def test_the_end_of_the_topic_and_the_visits_announced_last(two_nights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visit = read_manifest(two_nights).visits[0]
    with EmbeddedKafka() as kafka:
        options = {"bootstrap": kafka.bootstrap, "topic": "health", "kafka_config": None}
        log = KafkaMessageLog(kafka.bootstrap, "health")
        log.append([*announcements(visit), b"no announcement"])
        newest = AnnouncedVisit(visit.visit, event_time_s(visit.midpoint_mjd_tai))
        n_detectors = len(visit.detectors)
        # This Kafka does not look for times: all of it is taken for old.
        assert announced_so_far(options) == Announced(n_detectors + 1, newest, n_detectors + 1, newest)
        monkeypatch.setattr(KafkaMessageLog, "first_since", lambda log, written_at: 1)
        assert announced_so_far(options) == Announced(n_detectors + 1, newest, 1, newest)
        monkeypatch.setattr(KafkaMessageLog, "first_since", lambda log, written_at: 0)
        log.append([b"no announcement"] * 5)
        assert announced_so_far(options) == Announced(n_detectors + 6)


def test_a_kafka_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(log: KafkaMessageLog) -> int:
        raise KafkaUnreachableError(f"nobody at {log.bootstrap}")

    monkeypatch.setattr(KafkaMessageLog, "end", end)
    nobody = announced_so_far({"bootstrap": "127.0.0.1:9", "topic": "visits", "kafka_config": None})
    assert nobody == Announced(None, error="nobody at 127.0.0.1:9")

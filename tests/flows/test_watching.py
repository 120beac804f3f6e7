"""A live job watched from outside: what was announced, what is done, and how it ends."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runners import watching
from runners.cluster.settings import ClusterError
from runners.flink_operations import LiveJob, LiveJobError, ledger_figures
from runners.kafka import EmbeddedKafka, KafkaMessageLog
from schemas.manifests import DetectorImages, LoggedMessage, Visit, announcements


def _visit(number: int) -> Visit:
    images = tuple(DetectorImages(detector, f"/night/{number}_{detector}.fits", None) for detector in (0, 1))
    place = (150.0, 2.0, 0.0)
    return Visit(number, 20261122, number, "SimCam", "r", 61367.0, 30.0, 61367.1, *place, "science", None, images)


def _write(out: Path, visit: int) -> None:
    record: dict[str, Any] = {"visit": visit, "band": "r", "alerts": 3, "failures": 0, "latency": None}
    (out / "ledger").mkdir(parents=True, exist_ok=True)
    (out / "ledger" / f"{visit}.json").write_text(json.dumps(record))


@pytest.mark.parametrize("last_state", ["RUNNING", "FAILED"])
def test_watching_ends_with_the_last_visit_or_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_state: str
) -> None:
    looks = 0

    def state_of(job: LiveJob) -> str:
        nonlocal looks
        looks += 1
        if looks == 1:
            log.append([b"no announcement", *announcements(_visit(1)), *announcements(_visit(2))])
        if looks == 2:
            _write(tmp_path, 1)
        if looks == 3 and last_state == "RUNNING":
            _write(tmp_path, 2)
        return last_state if looks == 3 else "RUNNING"

    monkeypatch.setattr(watching, "state_of", state_of)
    shown = io.StringIO()
    with EmbeddedKafka() as kafka:
        log = KafkaMessageLog(kafka.bootstrap, "watched")
        options = {"bootstrap": kafka.bootstrap, "topic": "watched", "kafka_config": None}
        job = LiveJob(tmp_path, tmp_path, options, 0.0)
        if last_state == "RUNNING":
            watching.watch(job, 2, console=Console(file=shown, width=120))
        else:
            with pytest.raises(LiveJobError, match="the job is FAILED, with 1 of 2 visits in the ledger"):
                watching.watch(job, 2, console=Console(file=shown, width=120))
    lines = shown.getvalue().splitlines()
    assert lines[0] == "visit 1 r: 3 alerts (1 of 2, 2 announced)"
    assert len(lines) == (2 if last_state == "RUNNING" else 1)


def test_a_job_that_ends_with_its_last_visit_has_done_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state_of(job: LiveJob) -> str:
        _write(tmp_path, 1)
        return "FINISHED"

    monkeypatch.setattr(watching, "state_of", state_of)
    options = {"bootstrap": "127.0.0.1:9", "topic": "watched", "kafka_config": None}
    monkeypatch.setattr(KafkaMessageLog, "read", lambda log, offset, timeout_s: None)
    watching.watch(LiveJob(tmp_path, tmp_path, options, 0.0), 1, console=Console(file=io.StringIO()))


def test_watching_ends_when_nothing_happens_for_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "state_of", lambda job: "RUNNING")
    monkeypatch.setattr(KafkaMessageLog, "read", lambda log, offset, timeout_s: None)
    options = {"bootstrap": "127.0.0.1:9", "topic": "watched", "kafka_config": None}
    with pytest.raises(LiveJobError, match=r"for 0\.3 s: 0 visits announced, 0 of 1 in the ledger"):
        watching.watch(LiveJob(tmp_path, tmp_path, options, 0.0), 1, 0.3, Console(file=io.StringIO()))


def test_a_flink_that_does_not_answer_is_waited_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(job: LiveJob) -> str:
        nonlocal asked
        asked += 1
        if asked == 3:
            _write(tmp_path, 1)
        raise ClusterError("no answer")

    asked = 0
    monkeypatch.setattr(watching, "state_of", silent)
    monkeypatch.setattr(KafkaMessageLog, "read", lambda log, offset, timeout_s: None)
    options = {"bootstrap": "127.0.0.1:9", "topic": "watched", "kafka_config": None}
    job = LiveJob(tmp_path, tmp_path, options, 0.0)
    watching.watch(job, 1, console=Console(file=io.StringIO()))
    assert asked == 3
    monkeypatch.setattr(watching, "_FLINK_PATIENCE_S", 0.0)
    with pytest.raises(ClusterError):
        watching.watch(job, 2, console=Console(file=io.StringIO()))


def test_records_that_are_none_are_passed_over(tmp_path: Path) -> None:
    for visit, text in enumerate(("", "null", "[]", '{"visit": 4, "alerts": 3, "fail')):
        _write(tmp_path, visit)
        (tmp_path / "ledger" / f"{visit}.json").write_text(text)
    _write(tmp_path, 9)
    assert ledger_figures(tmp_path) == {"visits": 1, "alerts": 3, "failures": 0, "latency": None}


def test_a_look_at_what_is_announced_ends_while_more_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = time.monotonic() + 10 * watching._LOOK_S

    def read(log: KafkaMessageLog, offset: int, timeout_s: float) -> LoggedMessage:
        assert time.monotonic() < given_up
        time.sleep(0.01)
        return LoggedMessage(offset, announcements(_visit(offset + 1))[0])

    monkeypatch.setattr(KafkaMessageLog, "read", read)
    options = {"bootstrap": "127.0.0.1:9", "topic": "watched", "kafka_config": None}
    announced = watching._AnnouncedVisits(LiveJob(Path("out"), Path("cluster"), options, 0.0))
    announced.look()
    seen = announced.count()
    announced.look()
    assert 0 < seen < announced.count()

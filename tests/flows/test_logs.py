"""Log lines of a cluster: JSON, with what they are about, in files that do not grow without end."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from runners import logs
from runners.cluster.processes import Service, is_alive, log_of, start, stop
from runners.cluster.settings import load_cluster_settings
from runners.flink_commands import _note
from runners.flink_operations import FlinkRun, LiveJob
from runners.logs import HumanLines, JsonLines, bound_logs, note_command

ABOUT = {"stage": "subtraction", "visit": 12, "detector": None}
WRITER = "import itertools, os, time\nfor n in itertools.count(): os.write(1, b'%9d\\n' % n); time.sleep(0.001)"


def _record(**more: object) -> logging.LogRecord:
    values = {"name": "transforms.failures", "levelname": "WARNING", "msg": "no %s", "args": ("PSF",)}
    return logging.makeLogRecord({**values, "created": 1_795_401_880.25, "process": 7, **more})


def test_a_line_for_machines_and_one_for_people() -> None:
    assert json.loads(JsonLines().format(_record(**ABOUT))) == {
        "time": "2026-11-23T02:44:40.250+00:00",
        "level": "WARNING",
        "logger": "transforms.failures",
        "process": 7,
        "stage": "subtraction",
        "visit": 12,
        "message": "no PSF",
    }
    assert HumanLines().format(_record(**ABOUT)) == "warning: no PSF (stage subtraction, visit 12)"
    assert HumanLines().format(_record()) == "warning: no PSF"


def test_an_exception_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = JsonLines().format(_record(exc_info=sys.exc_info()))
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: two\nlines")


def test_what_was_done_to_a_job_is_added_to_one_file(tmp_path: Path) -> None:
    for message in ("submitted", "cancelled"):
        note_command(tmp_path / "logs", message, job="1f", out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "logs" / logs.COMMANDS).read_text().splitlines()]
    assert [line["message"] for line in lines] == ["submitted", "cancelled"]
    assert {(line["job"], line["out"], line["level"]) for line in lines} == {("1f", str(tmp_path), "INFO")}


def test_what_was_done_is_done_also_where_it_cannot_be_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("no folder")
    _note(LiveJob(tmp_path, tmp_path, {}, 0.0, (FlinkRun("1f"),)), "submitted")
    assert capsys.readouterr().err.startswith("not noted in the cluster's logs: ")


def test_a_log_is_cut_off_while_its_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost is what was written during the cut; nothing is written in the wrong place, such as far beyond the
    end, where a process that does not append would go on."""
    monkeypatch.setattr(logs, "LOG_BYTES", 2000)
    cluster, service = load_cluster_settings(tmp_path), Service("writer", ())
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "small.log").write_text("short")
    pid = start(cluster, service, [sys.executable, "-S", "-c", WRITER])
    path = log_of(cluster, service)
    try:
        for _ in range(2):
            while path.stat().st_size <= logs.LOG_BYTES:
                assert is_alive(pid)
            bound_logs(cluster.logs)
        while path.stat().st_size < 100:
            assert is_alive(pid)
    finally:
        stop(cluster, service)
    parts = [path.with_name("writer.log.before").read_bytes(), path.read_bytes()]
    numbers = [[int(line) for line in part.splitlines()] for part in parts]
    assert all(list(range(found[0], found[-1] + 1)) == found for found in numbers)
    assert numbers[0][0] > 0  # of three parts the first is gone
    assert numbers[0][-1] < numbers[1][0]
    assert (tmp_path / "logs" / "small.log").read_text() == "short"

"""The command on a night with a detector that kills or hangs its process: run again it gets over it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, write_night

from runners.flink_setup import load_flink_settings

# Detection of one detector: what it does instead is in the file's place of {work}.
ODD_STAGES = """
import os, signal, time
import transforms.detection
from transforms.detection import _DetectFn

class DetectFn(_DetectFn):
    def work(self, exposure):
        if (exposure.visit.visit, exposure.detector) == ({visit}, {detector}):
            {work}
        yield from super().work(exposure)

def patch():
    transforms.detection._DetectFn = DetectFn
"""
_COMMAND = "import odd_stages; odd_stages.patch(); from runners.cli import main; main()"


@pytest.fixture
def night(two_nights: Path, visits: list[dict[str, Any]], tmp_path: Path) -> Path:
    return write_night(tmp_path / "night", two_nights, visits[:2])


@pytest.fixture
def produce_odd(
    night: Path, visits: list[dict[str, Any]], tmp_path: Path
) -> Callable[[str], Callable[..., subprocess.CompletedProcess[str]]]:
    """Makes the command in a process of its own, with some work instead of detection in one detector."""

    def make(work: str) -> Callable[..., subprocess.CompletedProcess[str]]:
        visit, detector = visits[0]["visit"], visits[0]["detectors"][1]["detector"]
        (tmp_path / "odd_stages.py").write_text(ODD_STAGES.format(visit=visit, detector=detector, work=work))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

        def run(*options: str) -> subprocess.CompletedProcess[str]:
            given = ["produce", str(night), "--out", str(tmp_path / "out"), "--json", "--quiet", *options]
            command = [sys.executable, "-c", _COMMAND, *given]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

        return run

    return make


def without_the_detector(night: Path, visits: Sequence[dict[str, Any]], tmp_path: Path) -> Path:
    """The same night with a detector that cannot be subtracted."""
    first = json.loads(json.dumps(visits[0]))
    first["detectors"][1]["template"] = None
    return write_night(tmp_path / "without", night, [first, visits[1]])


@pytest.mark.long
@pytest.mark.parametrize("runner", ["local", "flink"])
def test_a_detector_that_segfaults_is_a_failure_at_the_third_run(
    runner: str,
    night: Path,
    visits: list[dict[str, Any]],
    produce: Callable[..., Run],
    produce_odd: Any,
    tmp_path: Path,
) -> None:
    if runner == "flink" and not load_flink_settings().jar.is_file():
        pytest.skip("no job server: run `make flink-setup`")
    run = partial(produce_odd("os.kill(os.getpid(), signal.SIGSEGV)"), "--runner", runner)
    out = tmp_path / "out"
    culprit = f"{visits[0]['visit']}-{visits[0]['detectors'][1]['detector']}"
    for number in (1, 2):
        assert run().returncode == -signal.SIGSEGV
        assert (out / ".attempts" / f"{culprit}.{number}").exists()
    done = run()
    assert done.returncode == 0, done.stderr
    assert not (out / ".attempts").exists()
    expected = produce(without_the_detector(night, visits, tmp_path), tmp_path / "expected")
    (failure,), (other,) = Run(out, 0, "", "").failures(), expected.failures()
    assert (failure["visit"], failure["detector"]) == (other["visit"], other["detector"])
    assert (failure["stage"], failure["error"]) == ("detection", "WorkerKilled")
    assert failure["reason"] == "killed by SIGSEGV, alone in a process"
    written = Run(out, 0, "", "").files("archive", "filters")
    assert written == expected.files("archive", "filters")
    assert len(written) > 4
    again = run()  # the verdict stands
    assert again.returncode == 0, again.stderr
    assert Run(out, 0, "", "").failures() == [failure]


@pytest.mark.long
def test_an_innocent_detector_at_which_two_runs_were_killed_loses_nothing(
    night: Path, produce: Callable[..., Run], produce_odd: Any, tmp_path: Path
) -> None:
    in_trial = tmp_path / "in_trial"
    kills = f"os.path.exists({str(in_trial)!r}) or os.kill(os.getpid(), signal.SIGKILL)"
    run = produce_odd(kills)
    for _ in (1, 2):
        assert run().returncode == -signal.SIGKILL
    in_trial.touch()
    done = run()
    assert done.returncode == 0, done.stderr
    expected = produce(night, tmp_path / "expected")
    assert Run(tmp_path / "out", 0, "", "").failures() == expected.failures() == []
    assert Run(tmp_path / "out", 0, "", "").files("archive", "filters") == expected.files("archive", "filters")


@pytest.mark.long
def test_a_detector_that_hangs_is_a_failure_at_the_third_run(produce_odd: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("quarantine: {detector_time_limit_s: 20}\n")  # others of the night need well under a second
    run = produce_odd("time.sleep(600)")
    for _ in (1, 2):
        done = run("--config", str(config))
        assert done.returncode == 1
        assert "has been in work for more than 20 s" in done.stderr
    done = run("--config", str(config))
    assert done.returncode == 0, done.stderr
    (failure,) = Run(tmp_path / "out", 0, "", "").failures()
    assert (failure["stage"], failure["error"]) == ("detection", "WorkerHung")

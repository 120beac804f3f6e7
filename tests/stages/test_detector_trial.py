"""Trials: stages in a process of their own, told how it ended; and the time limit of a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crashing_stages import ExitsFn, HangsFn, RaisesFn, SignalledFn, WorksFn, one_detector

from schemas.elements import DetectorVisit
from transforms.detector_trial import TrialEnd, try_out
from transforms.time_limit import process_ends_after

LIMIT_S = 120.0


@pytest.fixture
def element() -> DetectorVisit:
    return one_detector(3)


def test_a_trial_runs_stages_in_order_in_a_process_of_its_own(element: DetectorVisit, tmp_path: Path) -> None:
    works = WorksFn(str(tmp_path), os.getpid())
    assert try_out([works, SignalledFn(signal.SIGSEGV)], element, LIMIT_S) == TrialEnd("signalled", 11, True)
    assert (tmp_path / "ran-3").exists()


def test_an_exception_is_not_held_against_a_detector(element: DetectorVisit) -> None:
    assert try_out([RaisesFn(), SignalledFn(signal.SIGSEGV)], element, LIMIT_S) == TrialEnd("", 0, True)


def test_a_stage_that_leaves_its_process_is_told_of(element: DetectorVisit) -> None:
    assert try_out([ExitsFn()], element, LIMIT_S) == TrialEnd("exits", 0, True)


@pytest.mark.long
def test_a_hanging_trial_is_ended_with_its_children(element: DetectorVisit, tmp_path: Path) -> None:
    limit_s = 8.0  # so that a process begins in time also where others are at work
    assert try_out([HangsFn(str(tmp_path))], element, limit_s) == TrialEnd("hangs", 0, False)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10.0
    while _runs(child):  # until init has taken note of it
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("work", "said"), [("time.sleep(60)", "detector 3"), ("hold_interpreter(60)", "in hold_interpreter")]
)
def test_work_beyond_its_time_ends_the_process_and_says_so(work: str, said: str) -> None:
    program = (
        f"import sys, time; sys.path[:] = {sys.path!r}\n"
        "from transforms import time_limit\n"
        "from crashing_stages import hold_interpreter\n"
        "time_limit._GRACE_S = 1.0\n"
        "limit = time_limit.process_ends_after\n"
        "with limit(60, 'another, with time left'), limit(0.2, 'detector 3'):\n"
        f"    {work}\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert time.monotonic() - started < 50


def test_work_in_time_leaves_nothing_behind() -> None:
    for _ in range(3):
        with process_ends_after(0.05, "must not be said"):
            pass
    time.sleep(0.2)

"""A trial: the stages of detector space run on one detector in a process of its own, which may be killed or hang.

The process shares nothing with the worker but the stores: no threads, no locks. What it makes is thrown
away, but for files in the stores, which the worker would write with the same bytes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import apache_beam as beam

from schemas.elements import DetectorVisit
from transforms.failures import StageFn

_PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from transforms.detector_trial import main
main()
"""
_SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)


class TrialEnd(NamedTuple):
    """How a trial ended.

    Attributes
    ----------
    stage : that in work at the end; empty before the first, and when all had ended
    signal : that which killed it, else 0
    in_time : whether it ended by itself within its time
    """

    stage: str
    signal: int
    in_time: bool


def try_out(stages: Sequence[StageFn], element: DetectorVisit, limit_s: float) -> TrialEnd:
    """Run stages on an element in a process of its own, which has ended with all its children when this returns.

    An exception that a stage raises is no concern of the trial: it ends well.

    Raises
    ------
    OSError
        The process cannot be started.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as told:
        pickle.dump(sys.path, given)
        pickle.dump((os.getpid(), tuple(stages), element), given)
        given.seek(0)
        process = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=given, stdout=told, start_new_session=True)
        try:
            code = process.wait(limit_s)
            in_time = True
        except subprocess.TimeoutExpired:
            code, in_time = 0, False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told.seek(0)
        begun = told.read().decode().split("\n")
    return TrialEnd(begun[-2] if len(begun) > 1 else "", max(-code, 0), in_time)


def main() -> None:
    """The process: reads what to do from standard input, writes the name of each stage before it begins."""
    faulthandler.enable()
    report = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints
    parent, stages, element = pickle.load(sys.stdin.buffer)
    _end_with(parent)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # short of memory, the system is to end this process, not the worker
    try:
        for stage in stages:
            stage.setup()
        elements: Iterable[Any] = [element]
        for stage in stages:
            os.write(report, f"{stage.stage}\n".encode())
            elements = [made for one in elements for made in stage.process(one) if not _is_tagged(made)]
    finally:
        os.write(report, b"\n")
        os._exit(0)


def _is_tagged(made: Any) -> bool:
    return isinstance(made, beam.pvalue.TaggedOutput)


def _end_with(parent: int) -> None:
    """Have the system kill this process when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)

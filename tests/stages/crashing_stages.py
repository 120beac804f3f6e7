"""Stages of detector space that end or stop the process they run in; in a module, so that trials find them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.elements import DetectorVisit
from schemas.manifests import DetectorImages, visit_without_images
from transforms.failures import StageFn


@dataclass
class WorksFn(StageFn):
    """Leaves a file that says it ran, in a process other than `worker`."""

    folder: str
    worker: int
    stage = "works"

    def work(self, element: Any) -> Iterator[Any]:
        assert os.getpid() != self.worker
        assert threading.active_count() == 1
        (Path(self.folder) / f"ran-{element.detector}").touch()
        yield element


@dataclass
class RaisesFn(StageFn):
    stage = "raises"

    def work(self, element: Any) -> Iterator[Any]:
        raise ValueError("not for a trial to judge")


@dataclass
class SignalledFn(StageFn):
    """Killed by a signal of its own."""

    number: int
    stage = "signalled"

    def work(self, element: Any) -> Iterator[Any]:
        os.kill(os.getpid(), self.number)
        yield element


@dataclass
class ExitsFn(StageFn):
    stage = "exits"

    def work(self, element: Any) -> Iterator[Any]:
        os._exit(3)
        yield element


@dataclass
class HangsFn(StageFn):
    """Starts a child that sleeps on, writes its id, and holds the interpreter in compiled code."""

    folder: str
    stage = "hangs"

    def work(self, element: Any) -> Iterator[Any]:
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        (Path(self.folder) / "child").write_text(str(child.pid))
        hold_interpreter(600)
        yield element


def hold_interpreter(seconds: int) -> None:
    """Sleep as compiled code does that never lets another Python thread run."""
    ctypes.PyDLL(None).sleep(seconds)


def one_detector(detector: int) -> DetectorVisit:
    """A detector of a visit, without pixels."""
    visit = visit_without_images(2026112200001, 61367.1, "r", [detector], source="SimCam")
    return DetectorVisit(visit, DetectorImages(detector, "science.fits", None))

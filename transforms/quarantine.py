"""QuarantineDetectors: a detector that kills or hangs its worker becomes a failure record, not a crash loop."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from pydantic import Field
from pydantic.dataclasses import dataclass

from schemas.elements import DetectorVisit, FailureRecord, StageElement
from transforms.detector_trial import TrialEnd, try_out
from transforms.failures import FAILED, StageFn, decide_once, failed_in, failure_line
from transforms.time_limit import process_ends_after

STAGE = "quarantine"
_UNTRIED = 2  # attempts that may end with their worker before the next begins with a trial
# Whoever ends processes from outside may hit a trial too: so many attempts and trials before that is held against it.
_MOST = 10
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class QuarantineConfig:
    """How long a worker may take for one detector before it is taken to hang: wall-clock, all stages together."""

    detector_time_limit_s: float = Field(default=600.0, ge=1)


class QuarantineResult(NamedTuple):
    """`good`: DetectorVisit; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class QuarantineDetectors(beam.PTransform):
    """Stand before the stages of detector space, fused with them, and keep account of who survives them.

    Input and output `good`: DetectorVisit; `failed`: detectors in quarantine. While a detector is in work there is a
    file in the folder `attempts`; two of earlier workers, which ended without removing theirs, put it on trial: the
    stages are run on it in a process of its own first (`transforms.detector_trial`). If that ends well the
    detector goes on. If it dies or hangs, its failure is recorded durably in the folder `verdicts`, and obeyed by
    whoever meets the detector again. A worker that takes too long for a detector ends itself. Order: as it comes; a
    duplicate is another attempt. No state but the two folders, which all workers share.

    Parameters
    ----------
    config : QuarantineConfig
    stages : those of detector space, in order
    attempts, verdicts : str
    """

    def __init__(self, config: QuarantineConfig, stages: Sequence[StageFn], attempts: str, verdicts: str) -> None:
        super().__init__()
        self.stage = _QuarantineFn(config, tuple(stages), attempts, verdicts)

    def expand(self, detectors: beam.PCollection) -> QuarantineResult:
        outputs = detectors | "WatchDetector" >> beam.ParDo(self.stage).with_output_types(StageElement).with_outputs(
            FAILED, main="good"
        )
        return QuarantineResult(outputs.good, outputs[FAILED])


class _QuarantineFn(StageFn):
    stage = STAGE

    def __init__(self, config: QuarantineConfig, stages: tuple[StageFn, ...], attempts: str, verdicts: str) -> None:
        self.limit_s = config.detector_time_limit_s
        self.stages = stages
        self.attempts = attempts
        self.verdicts = verdicts

    def work(self, element: DetectorVisit) -> Iterator[Any]:
        visit, detector = element.visit.visit, element.detector
        verdict = Path(self.verdicts) / f"{visit}-{detector}.json"
        attempts = _Attempts(Path(self.attempts), f"{visit}-{detector}")
        try:
            failure = _standing(verdict)
            if failure is None:
                failure = self._tried(element, attempts)
                if failure is not None:
                    failure = _record(decide_once(verdict, failure_line(failure)))
            if failure is not None:
                yield from failed_in(element.visit, failure)
                return
            what = (
                f"nightstream: detector {detector} of visit {visit} has been in work for more than {self.limit_s:g} s: "
                "ending this process. The job, or the same command again, goes on; the third time with a trial apart"
            )
            with process_ends_after(self.limit_s, what):
                yield element  # fused: when this returns the detector has left detector space
        finally:
            attempts.end()

    def _tried(self, element: DetectorVisit, attempts: _Attempts) -> FailureRecord | None:
        """Begin an attempt; what speaks against going on with it, if anything."""
        try:
            number, end = attempts.begin(), None
            while _UNTRIED < number <= _MOST:
                end = try_out(self.stages, element, self.limit_s)
                if not (end.signal in _FROM_OUTSIDE or end.stage):
                    return None
                if end.signal not in _FROM_OUTSIDE:
                    break
                number = attempts.begin()
        except OSError as error:  # no room for the file, no memory for the process
            logging.getLogger(__name__).warning("detector %d goes on unwatched: %s", element.detector, error)
            return None
        return None if number <= _UNTRIED else _failure(element, end, self.limit_s)


class _Attempts:
    """The attempts at one detector that began and did not end: files NAME.1, NAME.2 ... in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._begun = 0

    def begin(self) -> int:
        """Record one more; its number."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            try:
                os.close(os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            self._begun = number
            break
        return self._begun

    def end(self) -> None:
        """Forget this one, and those before it: it has shown what becomes of them. One that stays costs a trial."""
        for number in range(self._begun, 0, -1):
            with suppress(OSError):
                self._path(number).unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._name}.{number}"


def _standing(verdict: Path) -> FailureRecord | None:
    try:
        return _record(verdict.read_bytes())
    except FileNotFoundError:
        return None


def _record(line: bytes) -> FailureRecord:
    return FailureRecord(**json.loads(line))


def _failure(element: DetectorVisit, end: TrialEnd | None, limit_s: float) -> FailureRecord:
    """What is known of a detector that did not get through its trial, or never to its end."""
    error = "WorkerKilled"
    if end is None:
        reason = f"{_MOST} workers ended while it was in work"
    elif not end.in_time:
        error, reason = "WorkerHung", f"not ended after {limit_s:g} s, alone in a process"
    elif end.signal in _FROM_OUTSIDE:
        reason = f"killed by {signal.Signals(end.signal).name} again and again, alone in a process: out of memory?"
    elif end.signal:
        reason = f"killed by {signal.Signals(end.signal).name}, alone in a process"
    else:
        reason = "ended its process, alone in it"
    stage = STAGE if end is None or not end.stage else end.stage
    return FailureRecord(element.visit.visit, element.detector, stage, error, reason, "all alerts of the detector")

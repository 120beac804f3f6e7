"""QuarantineDetectors: who is tried, what a verdict takes, and what is left of it in files."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from crashing_stages import SignalledFn, WorksFn, one_detector

from schemas.elements import DetectorVisit, FailureRecord, StageElement, VisitPart
from schemas.framing import unpack
from transforms import quarantine
from transforms.detector_trial import TrialEnd
from transforms.failures import StageFn
from transforms.quarantine import QuarantineConfig, QuarantineDetectors

WELL = TrialEnd("", 0, True)
SEGFAULT = TrialEnd("subtraction", signal.SIGSEGV, True)
HUNG = TrialEnd("detection", 0, False)
KILLED = TrialEnd("cutouts", signal.SIGKILL, True)
Trials = Callable[..., list[float]]


class _Worker:
    """A worker with the stage of a quarantine; its work breaks off where a killed worker's would."""

    def __init__(self, folder: Path, stages: Sequence[StageFn] = ()) -> None:
        attempts, verdicts = folder / "attempts", folder / "verdicts"
        transform = QuarantineDetectors(QuarantineConfig(), stages, str(attempts), str(verdicts))
        self.fn = transform.stage
        self.attempts, self.verdicts = attempts, verdicts
        self.left_off: list[Iterator[Any]] = []

    def die_at(self, element: DetectorVisit) -> None:
        """Take the element and never come back from it."""
        outputs = self.fn.process(element)
        assert next(outputs) is element
        self.left_off.append(outputs)  # else Python would end it properly

    def do(self, element: DetectorVisit) -> list[Any]:
        return list(self.fn.process(element))

    def files(self) -> list[str]:
        return sorted(path.name for path in self.attempts.iterdir())


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    """Has trials end as given, one after the other; returns the list of their time limits."""

    def plan(*ends: TrialEnd | Exception) -> list[float]:
        left, limits = list(ends), []

        def try_out(stages: Any, element: DetectorVisit, limit_s: float) -> TrialEnd:
            limits.append(limit_s)
            end = left.pop(0)
            if isinstance(end, Exception):
                raise end
            return end

        monkeypatch.setattr(quarantine, "try_out", try_out)
        return limits

    return plan


@pytest.fixture
def worker(tmp_path: Path) -> _Worker:
    return _Worker(tmp_path)


@pytest.fixture
def suspect(worker: _Worker) -> DetectorVisit:
    """A detector at which two workers died."""
    element = one_detector(3)
    worker.die_at(element)
    worker.die_at(element)
    return element


def _failure(outputs: list[Any]) -> FailureRecord:
    """The record on the failed output; the visit is told the same."""
    tagged, part = outputs
    assert isinstance(part, VisitPart)
    assert FailureRecord(**unpack(part.part)[0]["record"]) == tagged.value
    return tagged.value


def test_a_detector_that_is_done_leaves_no_file_and_is_not_tried(worker: _Worker, trials: Trials) -> None:
    limits = trials()
    element = one_detector(3)
    for _ in range(3):
        assert worker.do(element) == [element]
    worker.die_at(element)
    assert worker.files() == ["2026112200001-3.1"]
    assert worker.do(element) == [element]
    assert (worker.files(), limits) == ([], [])


def test_after_two_killed_workers_an_innocent_detector_is_tried_and_goes_on(
    worker: _Worker, suspect: DetectorVisit, trials: Trials
) -> None:
    limits = trials(WELL)
    other = one_detector(4)
    assert worker.do(other) == [other]
    assert limits == []
    assert worker.do(suspect) == [suspect]
    assert limits == [QuarantineConfig().detector_time_limit_s]
    assert worker.files() == []
    assert not worker.verdicts.exists()
    assert worker.do(suspect) == [suspect]  # cleared of all suspicion


@pytest.mark.parametrize(
    ("end", "record"),
    [
        (SEGFAULT, ("subtraction", "WorkerKilled", "killed by SIGSEGV, alone in a process")),
        (HUNG, ("detection", "WorkerHung", "not ended after 600 s, alone in a process")),
        (TrialEnd("detection", 0, True), ("detection", "WorkerKilled", "ended its process, alone in it")),
    ],
)
def test_a_detector_that_does_not_survive_its_trial_is_a_failure(
    worker: _Worker, suspect: DetectorVisit, trials: Trials, end: TrialEnd, record: tuple[str, str, str]
) -> None:
    trials(end)
    failure = _failure(worker.do(suspect))
    assert (failure.stage, failure.error, failure.reason) == record
    assert (failure.visit, failure.detector, failure.lost) == (suspect.visit.visit, 3, "all alerts of the detector")
    assert worker.files() == []


def test_a_verdict_stands_without_another_trial(worker: _Worker, suspect: DetectorVisit, trials: Trials) -> None:
    limits = trials(SEGFAULT)
    failure = _failure(worker.do(suspect))
    assert _failure(_Worker(worker.attempts.parent).do(suspect)) == failure
    assert len(limits) == 1
    (path,) = worker.verdicts.iterdir()
    assert FailureRecord(**json.loads(path.read_bytes())) == failure
    path.unlink()  # how it is given another try
    assert worker.do(suspect) == [suspect]


def test_of_two_workers_verdicts_the_first_stands(
    worker: _Worker, suspect: DetectorVisit, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials(SEGFAULT)
    failure = _failure(worker.do(suspect))
    monkeypatch.setattr(quarantine, "_standing", lambda path: None)  # both look before one has written
    trials(HUNG)
    worker.die_at(suspect)
    worker.die_at(suspect)
    assert _failure(worker.do(suspect)) == failure


@pytest.mark.parametrize("hits", range(1, 8))
def test_kills_that_may_come_from_outside_are_not_held_against_a_detector(
    worker: _Worker, suspect: DetectorVisit, trials: Trials, hits: int
) -> None:
    trials(*[KILLED] * hits, WELL)
    assert worker.do(suspect) == [suspect]
    assert worker.files() == []


def test_trials_that_are_always_killed_are(worker: _Worker, suspect: DetectorVisit, trials: Trials) -> None:
    limits = trials(*[KILLED] * 8)
    failure = _failure(worker.do(suspect))
    assert len(limits) == 8
    assert (failure.stage, failure.error) == ("cutouts", "WorkerKilled")
    assert failure.reason == "killed by SIGKILL again and again, alone in a process: out of memory?"
    assert worker.files() == []


def test_a_detector_that_always_takes_its_worker_along_ends_as_a_failure(worker: _Worker, trials: Trials) -> None:
    element = one_detector(3)
    limits = trials(*[WELL] * 8)
    for _ in range(10):
        worker.die_at(element)
    assert len(limits) == 8
    failure = _failure(worker.do(element))
    assert (failure.stage, failure.error) == ("quarantine", "WorkerKilled")
    assert failure.reason == "10 workers ended while it was in work"


def test_a_worker_killed_at_a_trial_leaves_one_attempt_more(
    worker: _Worker, suspect: DetectorVisit, monkeypatch: pytest.MonkeyPatch, trials: Trials
) -> None:
    class KilledError(BaseException):
        pass

    def try_out(*_: Any) -> TrialEnd:
        assert worker.files() == ["2026112200001-3.1", "2026112200001-3.2", "2026112200001-3.3"]
        raise KilledError

    monkeypatch.setattr(quarantine, "try_out", try_out)
    with pytest.raises(KilledError):
        worker.do(suspect)


def test_without_room_for_files_or_processes_detectors_go_on(
    worker: _Worker, suspect: DetectorVisit, trials: Trials
) -> None:
    trials(OSError(12, "no memory"))
    assert worker.do(suspect) == [suspect]
    worker.attempts.rmdir()
    worker.attempts.touch()  # a file where the folder would be
    assert worker.do(suspect) == [suspect]


def test_an_error_behind_is_passed_on_and_ends_the_attempt(worker: _Worker) -> None:
    element = one_detector(3)

    def fail(_: Any) -> None:
        raise ValueError("behind")

    transform = QuarantineDetectors(QuarantineConfig(), (), str(worker.attempts), str(worker.verdicts))
    with pytest.raises(Exception, match="behind"), beam.Pipeline(runner=FnApiRunner()) as flow:
        elements = flow | beam.Create([element]).with_output_types(StageElement)
        (elements | transform).good | beam.Map(fail)
    assert worker.files() == []


def test_in_a_flow_what_is_behind_works_while_the_attempt_is_recorded(worker: _Worker) -> None:
    elements = [one_detector(detector) for detector in (3, 4)]
    folder = worker.attempts
    transform = QuarantineDetectors(QuarantineConfig(), (), str(folder), str(worker.verdicts))
    with beam.Pipeline(runner=FnApiRunner()) as flow:
        detectors = flow | beam.Create(elements).with_output_types(StageElement)
        seen = (detectors | transform).good | beam.Map(lambda one: sorted(path.name for path in folder.iterdir()))
        assert_that(seen, equal_to([["2026112200001-3.1"], ["2026112200001-4.1"]]))
    assert worker.files() == []


def test_the_stages_themselves_are_tried(tmp_path: Path) -> None:
    worker = _Worker(tmp_path, (WorksFn(str(tmp_path), os.getpid()), SignalledFn(signal.SIGSEGV)))
    element = one_detector(3)
    worker.die_at(element)
    worker.die_at(element)
    assert _failure(worker.do(element)).stage == "signalled"
    assert (tmp_path / "ran-3").exists()

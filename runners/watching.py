"""A live job watched from outside: what was announced to it, and what came of that."""

from __future__ import annotations

import math
import time

from rich.console import Console

from runners.cluster.flink import ENDED
from runners.cluster.settings import ClusterError
from runners.flink_operations import CLOSED, LOST, LiveJob, LiveJobError, state_of
from runners.kafka import KafkaMessageLog
from runners.ledger import ledger_files
from runners.progress import VisitProgress
from schemas.manifests import parse_announcement

_LOOK_S = 0.5
_FLINK_PATIENCE_S = 30.0


def watch(job: LiveJob, n_visits: int, patience_s: float = math.inf, console: Console | None = None) -> None:
    """Show visits until so many of them are in the ledger.

    Raises
    ------
    LiveJobError
        The job ends before, or for `patience_s` nothing is announced and no visit gets through.
    ClusterError
        Flink does not answer for `_FLINK_PATIENCE_S`.
    """
    announced = _AnnouncedVisits(job)
    moved_at = answered_at = time.monotonic()
    before = (0, 0)
    with VisitProgress(job.out, n_visits, console=console, afresh=False, announced=announced.count):
        while (done := len(ledger_files(job.out))) < n_visits:
            try:
                state: str | None = state_of(job)
                answered_at = time.monotonic()
            except ClusterError:  # busy, or standing still for a while
                if time.monotonic() > answered_at + _FLINK_PATIENCE_S:
                    raise
                state = None
            # A job may have ended, and have written its last record before that, since the ledger was looked at.
            if state in (*ENDED, LOST, CLOSED) and (done := len(ledger_files(job.out))) < n_visits:
                raise LiveJobError(f"the job is {state}, with {done} of {n_visits} visits in the ledger")
            announced.look()
            if (announced.count(), done) != before:
                before, moved_at = (announced.count(), done), time.monotonic()
            elif time.monotonic() > moved_at + patience_s:
                raise LiveJobError(
                    f"nothing was announced and no visit got through for {patience_s:g} s: "
                    f"{announced.count()} visits announced, {done} of {n_visits} in the ledger"
                )
            time.sleep(_LOOK_S)


class _AnnouncedVisits:
    """The visits on the topic that a job listens to."""

    def __init__(self, job: LiveJob) -> None:
        self._log = KafkaMessageLog(job.options["bootstrap"], job.options["topic"], job.options["kafka_config"])
        self._offset = 0
        self._visits: set[int] = set()

    def count(self) -> int:
        return len(self._visits)

    def look(self) -> None:
        """Read what has come since the last look, for as long as a look takes: the rest is for the next one."""
        ends = time.monotonic() + _LOOK_S
        while (left_s := ends - time.monotonic()) > 0 and (message := self._log.read(self._offset, left_s)) is not None:
            self._offset = message.offset + 1
            try:
                self._visits.add(parse_announcement(message.content).visit.visit)
            except ValueError:
                continue  # it becomes a failure record of the job

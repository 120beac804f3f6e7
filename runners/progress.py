"""How far a run has got, on stderr: the ledger is watched, so the flow itself knows nothing of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from runners.ledger import ledger_files, read_record
from transforms.latency import night_latency

_POLL_S = 0.2


class VisitProgress:
    """Shows each visit as its ledger record appears, for as long as the `with` block lasts.

    A bar on a terminal, one line a visit elsewhere, nothing when quiet. Unless `afresh` is false, records that were
    there at the start count only once they are rewritten; a rewritten one counts its visit once.

    Parameters
    ----------
    out : Path
        Output folder; its ledger may not exist yet.
    n_visits : int
        Visits to come; 0 where nobody knows.
    quiet : bool
        Show nothing.
    console : rich.console.Console or None
        None for stderr.
    afresh : bool
        Whether records that are there at the start are of an earlier run.
    announced : callable () -> int, or None
        How many visits were announced so far, where that is worth telling.
    """

    def __init__(
        self,
        out: Path,
        n_visits: int,
        *,
        quiet: bool = False,
        console: Console | None = None,
        afresh: bool = True,
        announced: Callable[[], int] | None = None,
    ) -> None:
        self._out = out
        self._n_visits = n_visits
        self._quiet = quiet
        self._afresh = afresh
        self._announced = announced
        self._console = console or Console(stderr=True)
        self._seen: dict[Path, int] = {}
        self._records: dict[Path, dict[str, Any]] = {}
        self._sums = self._summed()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> VisitProgress:
        if self._quiet:
            return self
        if self._afresh:
            self._seen = self._modified()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("visits"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._totals(), total=self._n_visits or None)
            self._bar.start()
        self._thread = threading.Thread(target=self._watch, name="visit progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def _watch(self) -> None:
        while not self._done.wait(_POLL_S):
            self._look()
        self._look()

    def _look(self) -> None:
        if self._bar is not None and self._announced is not None:
            self._bar.update(self._task, description=self._totals())
        for path, modified_ns in sorted(self._modified().items()):
            if self._seen.get(path) == modified_ns:
                continue
            record = read_record(path)
            if record is None:
                continue  # being replaced right now: it is there again at the next look
            self._seen[path] = modified_ns
            self._records[path] = record
            self._sums = self._summed()
            self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=len(self._records), description=self._totals())
            return
        alerts, failures = record.get("alerts") or 0, record.get("failures") or 0
        latency_s = record.get("latency_s")
        line = f"visit {record.get('visit')} {record.get('band') or '-'}: {alerts:,} alerts"
        latency = record.get("latency")
        if latency is not None:
            line += f", {_of_visit(latency)}"
        elif latency_s is not None:
            line += f" in {latency_s:.1f} s"
        if failures:
            line += f", {failures:,} failures"
        of_all = f" of {self._n_visits}" if self._n_visits else ""
        announced = "" if self._announced is None else f", {self._announced()} announced"
        self._console.print(Text(f"{line} ({len(self._records)}{of_all}{announced})"), soft_wrap=True)

    def _totals(self) -> str:
        return self._sums if self._announced is None else f"{self._announced()} announced, {self._sums}"

    def _summed(self) -> str:
        alerts = sum(record.get("alerts") or 0 for record in self._records.values())
        failures = sum(record.get("failures") or 0 for record in self._records.values())
        told = f"{alerts:,} alerts, {failures:,} failures"
        latency = night_latency(self._records.values())
        return told if latency is None else f"{told}, {latency_text(latency)}"

    def _modified(self) -> dict[Path, int]:
        found = {}
        for path in ledger_files(self._out):
            try:
                found[path] = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
        return found


def latency_text(latency: dict[str, Any]) -> str:
    """How late the alerts of a night were, in short; of `transforms.latency.night_latency`."""
    total, overhead = latency["total"], latency["overhead"]
    return (
        f"latency p50 {total['p50']:.1f} s, p99 {total['p99']:.1f}; "
        f"without pixel work p50 {overhead['p50']:.1f} s, p99 {overhead['p99']:.1f}"
    )


def _of_visit(latency: dict[str, Any]) -> str:
    return f"p50 {latency['total']['p50']:.1f} s, without pixel work {latency['overhead']['p50']:.1f} s"


@contextlib.contextmanager
def status_line(told: Callable[[], str], silent: bool) -> Iterator[None]:
    """Shows on a terminal what `told` says twice a second, for work whose stages cannot call back."""
    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield
        return
    finished = threading.Event()
    with console.status(told()) as status:

        def watch() -> None:
            while not finished.wait(0.5):
                status.update(told())

        watcher = threading.Thread(target=watch, name="status line", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()

"""Baseline of the whole chain: seconds per stage and detector, alerts per second.

Runs a simulated night through the local runner without Kafka and prints what the ledger says. It
compares nothing: its figures are what later work is measured against, on the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.night_simulation import simulate_night
from runners.configuration import load_brokers, load_checked_filters, load_production_config
from runners.entries import night_input
from runners.local import local_engine
from runners.running import RunRequest, run_chain
from runners.summary import RunSummary, summarise

SKY_STAGES = ("association", "packaging")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", choices=("tiny", "demo", "detector"))
    parser.add_argument("--repeat", type=int, default=3, help="runs; the best is printed (the first compiles)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"python {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        night = Path(folder) / "night"
        simulate_night(options.preset, night, options.seed)
        runs = [_run(night, Path(folder) / f"out{number}") for number in range(options.repeat)]
    _print(options.preset, *min(runs, key=lambda run: run[1]))


def _run(night: Path, out: Path) -> tuple[RunSummary, float, float]:
    filters, _ = load_checked_filters(None)
    request = RunRequest(out, load_production_config(None), load_brokers(None), filters)
    cpu = time.process_time()
    result = run_chain(request, night_input(night, request), lambda n_visits: _nothing(), local_engine(()))
    return summarise(out), result.seconds, time.process_time() - cpu


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


def _print(preset: str, summary: RunSummary, seconds: float, cpu_seconds: float) -> None:
    n_detectors = max(summary.detectors_processed, 1)
    print(f"preset {preset}: {len(summary.visits)} visits, {n_detectors} detectors, {summary.alerts} alerts")
    print(f"{'stage':<14} {'s / detector':>12} {'share':>7}")
    total = sum(summary.seconds_per_stage.values())
    for stage, spent in summary.seconds_per_stage.items():
        print(f"{stage:<14} {spent / n_detectors:>12.4f} {spent / total:>7.1%}")
    print(f"{'all stages':<14} {total / n_detectors:>12.4f}")
    sky = sum(summary.seconds_per_stage.get(stage, 0.0) for stage in SKY_STAGES)
    print(f"whole run {seconds:.1f} s wall, {cpu_seconds:.1f} s CPU: {summary.alerts / seconds:.0f} alerts / s")
    print(f"association and packaging alone: {summary.alerts / sky:.0f} alerts / s of one core")


if __name__ == "__main__":
    main()

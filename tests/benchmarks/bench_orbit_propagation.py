"""What known orbits cost a worker process, a night and an exposure, and how soon they are lost without planets.

CPU seconds, best of N. `--known N` is the size of a table that is written, read and searched as in a run: seconds, and
megabytes of the process before, after and at most.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from schemas.observatories import OBSERVATORIES
from transforms.numerics.orbit_propagation import (
    Orbits,
    observer_at,
    orbits_from_elements,
    perihelion_of_mean_anomaly,
    predict_positions,
    propagate_perturbed,
    propagate_two_body,
    rough_directions,
)
from transforms.solar_system import element_table, known_objects

EPOCH = 60000.0
RUBIN = (289.25058, 0.864981, -0.500958)


def _belt(n: int, seed: int) -> Orbits:
    """Elements spread like the main belt's: 2.1 to 3.3 au, e to 0.3, i to 20 degrees."""
    rng = np.random.default_rng(seed)
    e = rng.uniform(0.0, 0.3, n)
    q, passage = perihelion_of_mean_anomaly(rng.uniform(2.1, 3.3, n), e, rng.uniform(0, 360, n), np.full(n, EPOCH))
    angles = rng.uniform(0, 20, n), rng.uniform(0, 360, n), rng.uniform(0, 360, n)
    return orbits_from_elements(q, e, *angles, passage, np.full(n, EPOCH))


def _cpu_s(work: Callable[[], object], repeats: int) -> float:
    best = np.inf
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return float(best)


def _write_table(path: Path, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = {
        "ssObjectId": rng.permutation(np.arange(1, n + 1)),
        "designation": [f"{1900 + number % 120} AB{number % 1000}" for number in range(n)],
        "epoch_mjd": np.full(n, EPOCH),
        "a": rng.uniform(2.1, 3.3, n),
        "e": rng.uniform(0.0, 0.3, n),
        "i": rng.uniform(0.0, 20.0, n),
        **{name: rng.uniform(0.0, 360.0, n) for name in ("node", "argperi", "mean_anomaly")},
        "h": rng.uniform(12.0, 20.0, n),
    }
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(pa.table(columns), path)
    else:
        pq.write_table(pa.table(columns), path)


def _memory_mb() -> float:
    """What the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _known_objects(name: str, n: int, seed: int) -> None:
    """What a table of this size takes in one worker process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        _write_table(path, n, seed)
        pa.default_memory_pool().release_unused()
        rng = np.random.default_rng(seed)
        ra, dec = 20.0 + rng.uniform(0.0, 0.2, 500), 8.0 + rng.uniform(0.0, 0.2, 500)
        site = OBSERVATORIES["X05"]
        propagate_perturbed(_belt(1, seed), EPOCH + 1.0)  # what has to be compiled or loaded first
        before = _memory_mb()
        marks = [time.process_time()]
        element_table(str(path))
        marks.append(time.process_time())
        known = known_objects(None, str(path))
        marks.append(time.process_time())
        known.predicted_near(EPOCH + 100.1, site, ra, dec, 1.0)
        marks.append(time.process_time())
        night_mb = _memory_mb()
        exposures = 50
        for number in range(exposures):
            found = known.predicted_near(EPOCH + 100.1 + number / 1000.0, site, ra, dec, 1.0)
        marks.append(time.process_time())
        known.predicted_near(EPOCH + 101.1, site, ra, dec, 1.0)
    read, states, night, exposure = np.diff(marks)
    print(
        f"{name}, {n} orbits: read {read:.2f} s, states {states:.2f} s, a night 100 days from the epoch {night:.2f} s"
    )
    print(f"  an exposure, {len(found)} objects about it: {exposure / exposures * 1e3:.1f} ms")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"  memory of the process: {before:.0f} MB before, {night_mb:.0f} with a night, {_memory_mb():.0f} with two")
    print(f"  at most {peak_mb:.0f} MB, with what wrote the table")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--known", type=int, help="only this: a table of so many orbits as in a run")
    parser.add_argument("--name", default="orbits.parquet", choices=["orbits.parquet", "orbits.csv"])
    given = parser.parse_args()
    if given.known:
        _known_objects(given.name, given.known, given.seed)
        return
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    orbits = _belt(given.objects, given.seed)
    observer = observer_at(EPOCH + 100.3, *RUBIN)
    night = propagate_perturbed(orbits, EPOCH + 100.0)
    work: dict[str, Callable[[], object]] = {
        "to a night 100 days from the epoch, planets": lambda: propagate_perturbed(orbits, EPOCH + 100.0),
        "the same, two-body": lambda: propagate_two_body(orbits, EPOCH + 100.0),
        "rough directions at a visit": lambda: rough_directions(night, observer),
        "places at a visit, in full": lambda: predict_positions(night, observer),
    }
    for name, one in work.items():
        one()
        seconds = _cpu_s(one, given.repeats)
        print(f"{name:45s} {seconds:8.3f} s   {seconds / given.objects * 1e6:7.2f} us an object")
    few = _belt(min(given.objects, 2000), given.seed + 1)
    print("days from the epoch: arcsec that two-body motion is off at 1 au less than the distance (median, 95 %)")
    for days in (3.0, 10.0, 30.0, 100.0, 300.0):
        with_planets, alone = propagate_perturbed(few, EPOCH + days), propagate_two_body(few, EPOCH + days)
        missed = np.linalg.norm(with_planets.position - alone.position, axis=1)
        nearest = np.linalg.norm(with_planets.position, axis=1) - 1.0
        arcsec = np.degrees(missed / nearest) * 3600.0
        print(f"{days:6.0f}   {np.median(arcsec):9.3f} {np.percentile(arcsec, 95):9.3f}")


if __name__ == "__main__":
    main()

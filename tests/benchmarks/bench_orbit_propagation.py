"""What known orbits cost a night and a visit (CPU seconds, best of N), and how soon they are lost without planets."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
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

"""How right detection and point-source measurement are: simulated pairs through the chain's subtraction and detector.

Every pair of `transforms.numerics.pair_simulation` is subtracted by `subtract_exposures` and searched by `search`, as
in a night, and what is found near each true point source (0.8 FWHM, right sign) is compared with it.

    python tests/benchmarks/study_detection.py --seeds 8

S/N is the true one of an optimal PSF fit at the known place, with the true PSF of the difference (the science image's
at the source, made white as the difference was) and the variance of the difference, the source's own photons included.
Cramer-Rao bounds (CRB) are those of the same model with flux and position free. Sources lie on good pixels, 27 pixels
from the edge, not on hidden cosmic rays.

    isolated  transients and movers where the mean steady light of 5 x 5 pixels is below half the noise of a pixel
    in_host   transients on galaxies
    on_star   transients where other steady light is brighter than that
    variable  changes of a star, of either sign

Tables, for each regime
  completeness  part found, with its binomial error; `50 %` is the S/N at which half are found: mean and standard
                deviation of the likelihood of a cumulative normal in S/N 3 to 8
  flux          mean of fitted / true flux - 1 in per cent, with its standard error; in brackets what physics gives:
                a fit at a free position takes the highest of the noise, s -> s + n + chi^2_2 / (2 s) with n normal, and
                what stays below the threshold is not seen
  position      error over the CRB in x and in y: rms, half of the interval of the middle 68 %, median of |error| /
                0.674; the standard error of the rms is 1 / sqrt(2 n)
  pulls         (measured - true) / error: standard deviation, in brackets half of the interval of the middle 68 %. The
                true aperture flux is the part of the PSF within 12 pixels; the true forced fluxes are those that the
                same fit finds in light without noise
  offsets       means of the last three pulls: what neighbours and the background leave
  must show     the figures that count, of isolated sources, S/N beyond 7 where none is said; `x y` pools both axes
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "numerics"))

from measured_pairs import measured_pair

from transforms.detection import DetectionConfig
from transforms.numerics.pair_simulation import REGIMES

GROUPS = ("isolated", "in_host", "on_star", "variable")
COMPLETENESS_BINS = ((3.0, 4.0), (4.0, 4.5), (4.5, 5.0), (5.0, 5.5), (5.5, 6.0), (6.0, 7.0), (7.0, 10.0), (10.0, 60.0))
FLUX_BINS = ((5.0, 7.0), (7.0, 20.0), (20.0, 60.0))
FINE_BINS = ((5.0, 7.0), (7.0, 10.0), (10.0, 20.0), (20.0, 60.0))
FEWEST = 10
PULLS = ("flux", "x", "y", "aperture", "science", "template")
_HALF_SNR, _HALF_WIDTH = np.arange(3.5, 7.5, 0.01), np.geomspace(0.3, 3.0, 24)
_FITTED_SNR = (3.0, 8.0)
_DRAWS = 4000

Rows = NDArray[np.void]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--seeds", type=int, default=8, help="pairs of each regime")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=1024, help="side of a pair in pixels")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, {vars(arguments)}")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.processes) as processes:
        for regime in arguments.regime:
            pairs = processes.map(measured_pair, seeds, repeat(REGIMES[regime]), repeat(arguments.size))
            report(regime, np.concatenate(list(pairs)))


def report(regime: str, rows: Rows) -> None:
    for print_table in (print_completeness, print_flux, print_positions, print_pulls, print_offsets, print_verdict):
        print(f"\n#### {regime}: {print_table.__name__.removeprefix('print_')}")
        print_table(rows)
    sys.stdout.flush()


# --- tables ------------------------------------------------------------------------------------------------------


def print_completeness(rows: Rows) -> None:
    print_row("group", "n", "50 %", *(f"{low:g}-{high:g}" for low, high in COMPLETENESS_BINS))
    print_rule(3 + len(COMPLETENESS_BINS))
    for group in GROUPS:
        members = rows[rows["group"] == group]
        parts = [completeness(within(members, limits)) for limits in COMPLETENESS_BINS]
        print_row(group, members.size, with_error(half_completeness(members)), *map(with_error, parts))


def print_flux(rows: Rows) -> None:
    print_row("group", *(f"S/N {low:g}-{high:g}" for low, high in FLUX_BINS))
    print_rule(1 + len(FLUX_BINS))
    for group in GROUPS:
        cells = []
        for limits in FLUX_BINS:
            found = found_within(rows, group, limits)
            cells.append(enough(found, lambda found: f"{with_error(flux_bias(found))} ({expected_bias(found):.2f})"))
        print_row(group, *cells)


def print_positions(rows: Rows) -> None:
    print_row("group", "S/N", "n", "rms x", "rms y", "68 % x", "68 % y", "median x", "median y", "claimed / CRB")
    print_rule(10)
    for group, limits, found in each_bin(rows):
        off = position_errors(found)
        figures = [figure(axis) for figure in (rms, middle_width, median_width) for axis in off]
        claimed = np.median([found["xErr"] / found["bound_x"], found["yErr"] / found["bound_y"]])
        print_row(group, limits, found.size, *(f"{value:.2f}" for value in (*figures, claimed)))


def print_pulls(rows: Rows) -> None:
    print_row("group", "S/N", "n", *PULLS)
    print_rule(3 + len(PULLS))
    for group, limits, found in each_bin(rows):
        widths = (pulls(found)[name] for name in PULLS)
        print_row(group, limits, found.size, *(f"{np.std(pull):.2f} ({middle_width(pull):.2f})" for pull in widths))


def print_offsets(rows: Rows) -> None:
    print_row("group", "S/N", "n", *PULLS[3:])
    print_rule(3 + len(PULLS[3:]))
    for group, limits, found in each_bin(rows):
        print_row(group, limits, found.size, *(with_error(mean(pulls(found)[name])) for name in PULLS[3:]))


def print_verdict(rows: Rows) -> None:
    isolated = rows[rows["group"] == "isolated"]
    bright, middling, both = (found_within(rows, "isolated", limits) for limits in ((20, 60), (7, 20), (7, 60)))
    print_row("figure", "value", "wanted")
    print_rule(3)
    print_row("S/N of 50 % completeness", with_error(half_completeness(isolated)), "<= 5.5")
    print_row("flux bias %, S/N >= 20", with_error(flux_bias(bright)), "+-1")
    print_row("flux bias %, S/N 7-20", with_error(flux_bias(middling)), "+-3")
    print_row("position x y / CRB, rms", with_error(width(position_errors(both).ravel())), "<= 1.10")
    print_row("pull of psfFlux", with_error(width(pulls(both)["flux"])), "0.95-1.10")
    print_row("pull of x y", with_error(width(np.append(pulls(both)["x"], pulls(both)["y"]))), "0.95-1.10")


def print_row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def print_rule(n_columns: int) -> None:
    print("|" + "---|" * n_columns)


def with_error(figure: tuple[float, float]) -> str:
    return f"{figure[0]:.2f} ± {figure[1]:.2f}"


def enough(found: Rows, cell: Callable[[Rows], str]) -> str:
    return cell(found) if found.size >= FEWEST else "-"


# --- figures -----------------------------------------------------------------------------------------------------


def within(rows: Rows, limits: tuple[float, float]) -> Rows:
    return rows[(rows["snr"] >= limits[0]) & (rows["snr"] < limits[1])]


def found_within(rows: Rows, group: str, limits: tuple[float, float]) -> Rows:
    return within(rows[(rows["group"] == group) & rows["found"]], limits)


def each_bin(rows: Rows) -> Iterable[tuple[str, str, Rows]]:
    for group in GROUPS:
        for limits in FINE_BINS:
            found = found_within(rows, group, limits)
            if found.size >= FEWEST:
                yield group, f"{limits[0]:g}-{limits[1]:g}", found


def completeness(rows: Rows) -> tuple[float, float]:
    """Part found and its binomial error, that of half a source where none or all are found."""
    if rows.size == 0:
        return np.nan, np.nan
    part = float(rows["found"].mean())
    return part, float(np.sqrt(max(part * (1.0 - part), 0.5 / rows.size) / rows.size))


def half_completeness(rows: Rows) -> tuple[float, float]:
    """S/N at which half are found: mean and standard deviation over the likelihood of a cumulative normal."""
    fitted = within(rows, _FITTED_SNR)
    away = (fitted["snr"] - _HALF_SNR[:, None, None]) / _HALF_WIDTH[:, None]
    log_likelihood = np.where(fitted["found"], norm.logcdf(away), norm.logsf(away)).sum(axis=2)
    likelihood = np.exp(log_likelihood - log_likelihood.max()).sum(axis=1)
    likelihood /= likelihood.sum()
    centre = float(np.sum(likelihood * _HALF_SNR))
    return centre, float(np.sqrt(np.sum(likelihood * (_HALF_SNR - centre) ** 2)))


def flux_bias(found: Rows) -> tuple[float, float]:
    return mean(100.0 * (found["psfFlux"] / found["flux"] - 1.0))


def expected_bias(found: Rows) -> float:
    """Bias in per cent of a perfect fit at a free position, of sources that pass the threshold."""
    part = np.median(found["peak_snr"] / np.abs(found["psfFlux"] / found["psfFluxErr"]))
    draws = np.random.default_rng(1)
    noise = draws.normal(size=(_DRAWS, found.size)) + draws.chisquare(2, (_DRAWS, found.size)) / (2.0 * found["snr"])
    seen = part * (found["snr"] + noise) > DetectionConfig().threshold_snr
    return float(100.0 * np.mean(np.sum(seen * noise, axis=0) / np.maximum(seen.sum(axis=0), 1) / found["snr"]))


def position_errors(found: Rows) -> NDArray[np.float64]:
    """(2, n) in x and y, over the Cramer-Rao bound."""
    return np.stack(
        [(found["x"] - found["true_x"]) / found["bound_x"], (found["y"] - found["true_y"]) / found["bound_y"]]
    )


def pulls(found: Rows) -> dict[str, NDArray[np.float64]]:
    sign = np.sign(found["flux"])
    truth = {
        "flux": ("psfFlux", found["flux"]),
        "x": ("x", found["true_x"]),
        "y": ("y", found["true_y"]),
        "aperture": ("apFlux", found["flux"] * found["in_aperture"]),
        "science": ("scienceFlux", found["light_science"]),
        "template": ("templateFlux", found["light_template"]),
    }
    return {
        name: (sign if name == "flux" else 1.0) * (found[column] - true) / found[f"{column}Err"]
        for name, (column, true) in truth.items()
    }


def mean(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values) / np.sqrt(values.size))


def width(values: NDArray[np.float64]) -> tuple[float, float]:
    """rms and its standard error, that of normal values."""
    return rms(values), rms(values) / float(np.sqrt(2.0 * values.size))


def rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def middle_width(values: NDArray[np.float64]) -> float:
    low, high = np.percentile(values, [15.865, 84.135])
    return float(0.5 * (high - low))


def median_width(values: NDArray[np.float64]) -> float:
    return float(np.median(np.abs(values)) / 0.67449)


if __name__ == "__main__":
    main()

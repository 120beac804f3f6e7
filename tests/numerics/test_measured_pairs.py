"""Detection and point-source photometry on simulated pairs, from raw counts through the chain's own subtraction.

`make study-detection` has the same figures on more pairs and in finer bins.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from measured_pairs import measured_pair
from numpy.typing import NDArray

from transforms.numerics.pair_simulation import REGIMES

SEED = 101
SIDE_PIX = 1024
TRANSIENTS = 300.0  # more than a regime has, so that few pairs tell enough
SURE = 3.5  # standard errors: chance alone breaks one assertion of 2000

Rows = NDArray[np.void]


@pytest.fixture(scope="module")
def isolated() -> Rows:
    regimes = [replace(REGIMES[name], transients=TRANSIENTS) for name in ("lsst", "sharp_science", "undersampled")]
    rows = np.concatenate([measured_pair(SEED, regime, SIDE_PIX) for regime in regimes])
    return rows[rows["group"] == "isolated"]


def found(rows: Rows, least_snr: float, most_snr: float = np.inf) -> Rows:
    return rows[rows["found"] & (rows["snr"] >= least_snr) & (rows["snr"] < most_snr)]


def assert_width(values: NDArray[np.float64], least: float, most: float) -> None:
    """The rms lies in an interval, but for what chance does to it: 1 / sqrt(2 n) of normal values."""
    width = np.sqrt(np.mean(np.square(values)))
    chance = 1.0 + SURE / np.sqrt(2.0 * values.size)
    assert least / chance < width < most * chance


def test_half_of_the_sources_of_signal_to_noise_five_and_a_half_are_found_and_nearly_all_of_eight(
    isolated: Rows,
) -> None:
    near = np.abs(isolated["snr"] - 5.5) < 1.0  # as many above as below: completeness is symmetric about its half
    part, n = isolated["found"][near].mean(), np.count_nonzero(near)
    assert part > 0.5 - SURE * 0.5 / np.sqrt(n)
    bright = isolated[isolated["snr"] > 8.0]
    # The threshold is 3 sigma below; 0.1 % of such sources miss it by noise, some lie beside a bright star's wings.
    assert np.count_nonzero(~bright["found"]) <= 2


@pytest.mark.parametrize(("least_snr", "most_snr", "bias"), [(7.0, 20.0, 0.03), (20.0, 60.0, 0.01)])
def test_fluxes_are_unbiased(isolated: Rows, least_snr: float, most_snr: float, bias: float) -> None:
    rows = found(isolated, least_snr, most_snr)
    off = rows["psfFlux"] / rows["flux"] - 1.0
    assert abs(off.mean()) < bias + SURE * np.sqrt(np.mean(rows["snr"] ** -2.0) / rows.size)


def test_positions_are_within_a_tenth_of_the_cramer_rao_bound(isolated: Rows) -> None:
    rows = found(isolated, 7.0)
    errors = [(rows[name] - rows[f"true_{name}"]) / rows[f"bound_{name}"] for name in ("x", "y")]
    assert_width(np.concatenate(errors), 0.9, 1.1)


@pytest.mark.parametrize(
    ("column", "truth"),
    [("psfFlux", "flux"), ("x", "true_x"), ("y", "true_y"), ("scienceFlux", "light_science")],
)
def test_errors_are_those_that_are_claimed(isolated: Rows, column: str, truth: str) -> None:
    rows = found(isolated, 7.0)
    assert_width((rows[column] - rows[truth]) / rows[f"{column}Err"], 0.95, 1.1)


def test_template_fluxes_scatter_as_their_errors_say(isolated: Rows) -> None:
    rows = found(isolated, 7.0)
    pull = (rows["templateFlux"] - rows["light_template"]) / rows["templateFluxErr"]
    # Wings of stars far away are in the light and, with the background, not in the template: their mean is left out.
    assert_width(pull - pull.mean(), 0.95, 1.1)

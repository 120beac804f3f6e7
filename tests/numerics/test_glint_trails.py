"""Rows of glints among random sources."""

from __future__ import annotations

import time

import numpy as np
import pytest

from transforms.numerics.glint_trails import FALSE_ROWS, TOLERANCE_PIX, find_glint_trails

SHAPE = (4096, 4096)


def _field(n: int, seed: int, side: float = 4096.0) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.random.default_rng(seed).uniform(0.0, side, (2, n))
    return x, y


def _row(n: int, span: float, angle: float, seed: int, scatter: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    along = span * np.linspace(-0.5, 0.5, n)
    off = rng.normal(0.0, scatter, (2, n))
    return 2000.0 + along * np.cos(angle) + off[0], 2100.0 + along * np.sin(angle) + off[1]


@pytest.mark.parametrize("n", [50, 200, 500])
def test_random_fields_hold_no_rows(n: int) -> None:
    """The bound is 1e-3 a field: of 300 fields more than 3 with a row have a chance below 3e-4."""
    assert FALSE_ROWS == 1e-3
    n_false = sum(find_glint_trails(*_field(n, seed), SHAPE).any() for seed in range(300))
    assert n_false <= 3


@pytest.mark.parametrize("angle", [0.0, 0.7, np.pi / 2, 2.5])
@pytest.mark.parametrize("n_field", [0, 100, 500])
def test_eight_glints_in_a_row_are_found_and_nothing_else(angle: float, n_field: int) -> None:
    # Off the line by 5 sigma would be one in 2e6; the ends are off as well: sqrt(1.5) of the scatter.
    x, y = _field(n_field, 3)
    row_x, row_y = _row(8, 450.0, angle, 4, TOLERANCE_PIX / (5.0 * np.sqrt(1.5)))
    flagged = find_glint_trails(np.append(x, row_x), np.append(y, row_y), SHAPE)
    assert flagged[n_field:].all()
    across = (y - 2100.0) * np.cos(angle) - (x - 2000.0) * np.sin(angle)
    assert not flagged[:n_field][np.abs(across) > 2.0 * TOLERANCE_PIX].any()


def test_four_glints_are_no_row_and_a_bent_row_is_none() -> None:
    assert not find_glint_trails(*_row(4, 300.0, 0.3, 1), SHAPE).any()
    x, y = _row(7, 300.0, 0.0, 1)
    assert find_glint_trails(x, y, SHAPE).all()
    assert not find_glint_trails(x, y + 40.0 * ((x - 2000.0) / 150.0) ** 2, SHAPE).any()


def test_the_same_row_counts_in_an_empty_field_and_not_in_a_crowd() -> None:
    row = _row(5, 300.0, 1.0, 2)
    assert find_glint_trails(*row, SHAPE).all()
    crowd = _field(3000, 5)
    assert not find_glint_trails(np.append(crowd[0], row[0]), np.append(crowd[1], row[1]), SHAPE)[3000:].any()


def test_pieces_of_one_residual_count_once() -> None:
    """Three places in line, of three close sources each: nine points, but three sources."""
    x = np.array([0.0, 5.0, 10.0, 200.0, 205.0, 210.0, 400.0, 405.0, 410.0]) + 1000.0
    assert not find_glint_trails(x, np.full(9, 1000.0), SHAPE).any()
    assert find_glint_trails(np.linspace(1000.0, 1410.0, 9), np.full(9, 1000.0), SHAPE).all()


def test_no_row_depends_on_the_order_of_the_sources_or_on_which_axis_is_which() -> None:
    x, y = (np.append(field, row) for field, row in zip(_field(100, 8), _row(6, 400.0, 0.4, 9), strict=True))
    flagged = find_glint_trails(x, y, SHAPE)
    order = np.random.default_rng(1).permutation(x.size)
    np.testing.assert_array_equal(find_glint_trails(x[order], y[order], SHAPE), flagged[order])
    np.testing.assert_array_equal(find_glint_trails(y, x, SHAPE), flagged)
    assert flagged.any()


def test_few_sources_and_sources_at_one_place_are_no_row() -> None:
    assert find_glint_trails([], [], SHAPE).tolist() == []
    assert not find_glint_trails(np.full(9, 50.0), np.full(9, 50.0), SHAPE).any()
    with pytest.raises(ValueError, match="one length"):
        find_glint_trails([1.0, 2.0], [1.0], SHAPE)


def test_a_storm_in_a_corner_costs_what_one_all_over_the_detector_costs() -> None:
    places = np.random.default_rng(3).uniform(0.0, 1.0, (2, 2_000))
    seconds = []
    for side in (4096.0, 4096.0, 640.0):  # the first compiles
        started = time.process_time()
        find_glint_trails(*(side * places), (4096, 4096))
        seconds.append(time.process_time() - started)
    # Within 450 pixels, as in an even field, were two thirds of all: 150 times the work.
    assert seconds[2] < 5.0 * seconds[1]

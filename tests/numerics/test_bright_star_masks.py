"""What bright stars leave: the part of their light is measured, trails and bleeds are marked, sources are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from simulated_pair import moffat

from transforms.numerics.bright_star_masks import residual_part, star_trails

SHAPE = (300, 400)
NOTHING = np.zeros(SHAPE, dtype=bool)
FWHM = 4.0
Planes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def stars(rng: np.random.Generator, n: int, flux: float) -> np.ndarray:
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    places = rng.uniform((20, 20), (SHAPE[1] - 20, SHAPE[0] - 20), (n, 2))
    return np.sum([flux * moffat(columns - x, rows - y, FWHM) for x, y in places], axis=0)


def noise(rng: np.random.Generator, variance: np.ndarray) -> np.ndarray:
    return rng.normal(size=SHAPE) * np.sqrt(variance)


def part_of(difference: np.ndarray, variance: np.ndarray, light: np.ndarray) -> float:
    return residual_part(difference.astype(np.float32), variance.astype(np.float32), light.astype(np.float32), NOTHING)


def trails_of(planes: Planes, turn: Callable[[np.ndarray], np.ndarray] = np.asarray) -> np.ndarray:
    difference, variance, saturated, bad = planes
    return star_trails(turn(difference), turn(variance), turn(saturated), turn(bad), FWHM)


@pytest.mark.parametrize("part", [0.01, 0.05])
def test_the_part_of_the_light_that_is_left_is_measured(part: float) -> None:
    rng = np.random.default_rng(1)
    light = stars(rng, 40, 3e5)
    variance = 900.0 + light
    difference = noise(rng, variance) + part * light * rng.normal(size=SHAPE)
    n_bright = np.count_nonzero(light > 20.0 * np.sqrt(variance))
    # the median of |x| has an error of 1.17 / sqrt(2 n) of sigma; below the photon noise it tells less of the part
    excess = np.median((part * light / np.sqrt(variance))[light > 20.0 * np.sqrt(variance)])
    error = part * (1.17 / np.sqrt(2.0 * n_bright)) * (1.0 + 1.0 / excess**2)
    assert n_bright > 1000
    assert part_of(difference, variance, light) == pytest.approx(part, abs=5.0 * error)


def test_nothing_is_left_where_noise_explains_all() -> None:
    """With a variance 10 % too large, so that chance cannot decide."""
    rng = np.random.default_rng(2)
    light = stars(rng, 40, 3e5)
    assert part_of(noise(rng, 900.0 + light), 1.1 * (900.0 + light), light) == 0.0


def test_a_few_variables_do_not_hide_that_the_others_are_subtracted() -> None:
    rng = np.random.default_rng(3)
    steady, variable = stars(rng, 40, 3e5), stars(rng, 4, 3e5)
    variance = 900.0 + steady + variable
    difference = noise(rng, variance) + 0.02 * steady * rng.normal(size=SHAPE) + 0.3 * variable
    assert 0.02 < part_of(difference, variance, steady + variable) < 0.03


def test_an_image_without_bright_stars_has_no_residual_part() -> None:
    rng = np.random.default_rng(4)
    variance = np.full(SHAPE, 900.0)
    assert part_of(noise(rng, variance), variance, np.zeros(SHAPE)) == 0.0


def field_with_trail(rng: np.random.Generator, trail_sigma: float) -> Planes:
    """A saturated star whose rows 149 to 151 are off by some sigma a pixel, to the right, over 150 pixels."""
    saturated = NOTHING.copy()
    saturated[145:156, 100:111] = True
    variance = np.full(SHAPE, 900.0)
    difference = noise(rng, variance)
    difference[149:152, 111:261] += 30.0 * trail_sigma
    return difference.astype(np.float32), variance.astype(np.float32), saturated, saturated


@pytest.mark.parametrize("sigma", [2.0, -2.0])
def test_a_trail_is_marked_along_its_rows_and_nowhere_else(sigma: float) -> None:
    marked = trails_of(field_with_trail(np.random.default_rng(5), sigma))
    assert marked[149:152, 111:255].all()
    marked[148:153, 111:290] = False
    assert not marked.any()


def test_noise_and_sources_beside_a_saturated_star_make_no_trail() -> None:
    """20 fields: sources of any brightness stand on the star's rows and columns; a halo lies around it."""
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    n_marked = 0
    for seed in range(20):
        rng = np.random.default_rng([6, seed])
        difference, variance, saturated, bad = field_with_trail(rng, 0.0)
        for x, y in ((130, 150), (200, 151), (105, 200), (60, 149)):
            difference += (10.0 ** rng.uniform(3, 5) * moffat(columns - x, rows - y, FWHM)).astype(np.float32)
        difference += (3e4 / (30.0**2 + (columns - 105) ** 2 + (rows - 150) ** 2)).astype(np.float32)
        n_marked += int(star_trails(difference, variance, saturated, bad, FWHM).any())
    assert n_marked == 0


@pytest.mark.parametrize("turn", [np.fliplr, np.flipud, np.transpose])
def test_a_turned_image_has_the_turned_mask(turn: Callable[[np.ndarray], np.ndarray]) -> None:
    planes = field_with_trail(np.random.default_rng(7), 1.5)
    marked = trails_of(planes)
    assert marked.any()
    np.testing.assert_array_equal(trails_of(planes, turn), turn(marked))


def test_a_constant_added_to_the_difference_changes_no_trail() -> None:
    difference, variance, saturated, bad = field_with_trail(np.random.default_rng(8), 2.0)
    marked = star_trails(difference, variance, saturated, bad, FWHM)
    shifted = star_trails(difference + np.float32(3.0), variance, saturated, bad, FWHM)  # a tenth of sigma
    assert np.mean(marked == shifted) > 0.999  # clipping at 4 sigma is not shifted


@pytest.mark.parametrize("turn", [np.asarray, np.transpose])
def test_a_bleed_is_grown_by_a_pixel_and_a_round_core_is_not(turn: Callable[[np.ndarray], np.ndarray]) -> None:
    saturated = NOTHING.copy()
    saturated[100, 50:120] = True  # a row, one pixel wide
    saturated[90:111, 75:96] = True  # its star, not much wider than a third of the bleed
    planes = (np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32), saturated, saturated)
    marked = turn(trails_of(planes, turn))
    expected = NOTHING.copy()
    expected[[99, 101], 50:120] = True
    expected[:, 75:96] = False
    np.testing.assert_array_equal(marked, expected)


def test_bad_arguments_are_refused() -> None:
    plane = np.ones(SHAPE)
    with pytest.raises(ValueError, match="differ in shape"):
        star_trails(plane, plane, NOTHING, NOTHING[1:], FWHM)
    with pytest.raises(ValueError, match="must be positive"):
        star_trails(plane, plane, NOTHING, NOTHING, 0.0)

"""Saturated stars of a template: cores filled by what their wings ask for, halos measured together and taken off."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_pair import moffat, moffat_stamp

from transforms.numerics.psf_grid import PsfGrid
from transforms.numerics.saturated_cores import SaturatedStars, fill_saturated_cores, subtract_halos

SHAPE = (300, 320)
FWHM_PIX, SKY_VARIANCE, FULL_WELL = 4.0, 100.0, 5e4
PSF = PsfGrid(moffat_stamp(14, FWHM_PIX)[np.newaxis, np.newaxis])
STARS = ((60.3, 70.7, 4e6), (200.0, 90.5, 1.5e7), (120.6, 220.1, 8e6), (260.2, 250.8, 2e6))


def scene(seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Light without noise, a noisy image cut off at full well, and its saturated pixels."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    light = sum(flux * moffat(x - sx, y - sy, FWHM_PIX) for sx, sy, flux in STARS)
    noise = np.random.default_rng(seed).normal(size=SHAPE) * np.sqrt(SKY_VARIANCE + light)
    saturated = light > FULL_WELL
    return light, np.where(saturated, np.float32(FULL_WELL), light + noise).astype(np.float32), saturated


def filled(image: np.ndarray, bad: np.ndarray, saturated: np.ndarray) -> tuple[np.ndarray, SaturatedStars]:
    result = image.copy()
    variance = np.full(SHAPE, SKY_VARIANCE, dtype=np.float32) + np.clip(image, 0, None)
    return result, fill_saturated_cores(result, variance, bad, saturated, PSF)


def test_cores_hold_what_the_stars_are_made_of() -> None:
    light, image, saturated = scene()
    result, stars = filled(image, saturated, saturated)
    assert len(stars.x) == len(STARS)
    for x, y, flux in STARS:
        star = int(np.argmin(np.hypot(stars.x - x, stars.y - y)))
        assert np.hypot(stars.x[star] - x, stars.y[star] - y) < 0.1
        # the wings' weights carry a model error of 5 % a pixel over
        # some 300 pixels
        assert stars.flux[star] == pytest.approx(flux, rel=0.02)
        core = np.hypot(*(np.mgrid[: SHAPE[0], : SHAPE[1]] - np.array([y, x])[:, None, None])) < 12
        assert result[core].sum() == pytest.approx(light[core].sum(), rel=0.02)
    np.testing.assert_array_equal(result[~saturated], image[~saturated])


def test_a_bleed_does_not_draw_the_star_along() -> None:
    _, image, saturated = scene(2)
    x, y, flux = STARS[2]
    saturated = saturated.copy()
    saturated[150:240, 119:122] = True  # much further down than up
    image = np.where(saturated, np.float32(FULL_WELL), image)
    _, stars = filled(image, saturated, saturated)
    star = int(np.argmin(np.hypot(stars.x - x, stars.y - y)))
    assert np.hypot(stars.x[star] - x, stars.y[star] - y) < 0.1
    assert stars.flux[star] == pytest.approx(flux, rel=0.02)


def test_what_is_no_star_stays_as_it_is() -> None:
    image = np.random.default_rng(3).normal(0.0, 10.0, SHAPE).astype(np.float32)
    column, everything = np.zeros(SHAPE, dtype=bool), np.ones(SHAPE, dtype=bool)
    column[:, 33] = True
    for saturated in (column, everything, np.zeros(SHAPE, dtype=bool)):
        result, stars = filled(image, saturated, saturated)
        assert len(stars.x) == 0
        np.testing.assert_array_equal(result, image)


@pytest.mark.parametrize("seed", range(20))
def test_any_footprints_give_finite_pixels_and_change_no_others(seed: int) -> None:
    rng = np.random.default_rng([4, seed])
    _, image, _ = scene(seed)
    saturated = np.zeros(SHAPE, dtype=bool)
    for _ in range(rng.integers(1, 30)):
        y, x = rng.integers(-5, SHAPE[0] + 5), rng.integers(-5, SHAPE[1] + 5)
        saturated[max(y, 0) : max(y + rng.integers(1, 40), 0), max(x, 0) : max(x + rng.integers(1, 40), 0)] = True
    bad = saturated | (rng.random(SHAPE) < 0.05)
    result, stars = filled(image, bad, saturated)
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(result[~saturated], image[~saturated])
    assert np.all(result[saturated] >= image[saturated])
    assert all(np.isfinite(column).all() for column in stars)


def halo_scene(n_stars: int, seed: int) -> tuple[np.ndarray, np.ndarray, SaturatedStars]:
    """A difference of noise 10 with a halo 1e-6 (12 / r)^2 of the flux around each star, from 12 pixels on."""
    rng = np.random.default_rng([5, seed])
    x, y = rng.uniform(30, 290, n_stars), rng.uniform(30, 270, n_stars)
    stars = SaturatedStars(x, y, 10.0 ** rng.uniform(6.3, 7.2, n_stars))
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    halo = np.zeros(SHAPE)
    for sx, sy, flux in zip(*stars, strict=True):
        r = np.hypot(columns - sx, rows - sy)
        halo += flux * np.where(r < 30, 1e-6 * np.minimum((12.0 / np.maximum(r, 1.0)) ** 2, 1.0), 0.0)
    return (halo + rng.normal(0.0, 10.0, SHAPE)).astype(np.float32), halo, stars


def test_halos_are_taken_off_and_given_to_the_template() -> None:
    difference, halo, stars = halo_scene(8, 1)
    matched = np.zeros(SHAPE, dtype=np.float32)
    unusable, variance = np.zeros(SHAPE, dtype=bool), np.full(SHAPE, 100.0, dtype=np.float32)
    before = difference.copy()
    subtract_halos(difference, matched, variance, unusable, stars, FWHM_PIX)
    np.testing.assert_allclose(difference + matched, before, atol=1e-4)
    inner = halo > 2.0
    left = float(np.sum((halo - matched)[inner] ** 2) / np.sum(halo[inner] ** 2))
    assert left < 0.05  # of the halos' power: neighbours' halos in a star's ring are not told apart


def test_a_transient_in_one_halo_stays() -> None:
    results = []
    for flux in (0.0, 2e4):
        difference, _, stars = halo_scene(8, 2)
        y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
        transient = flux * moffat(x - stars.x[0] - 15.0, y - stars.y[0], FWHM_PIX)
        difference += transient.astype(np.float32)
        matched = np.zeros(SHAPE, dtype=np.float32)
        variance = np.full(SHAPE, 100.0, dtype=np.float32)
        subtract_halos(difference, matched, variance, np.zeros(SHAPE, dtype=bool), stars, FWHM_PIX)
        results.append(matched)
    # a ring's median moves by less than the noise of its 90 pixels, a tenth of a pixel's
    assert np.abs(results[1] - results[0]).max() < 2.0


def test_few_stars_make_no_halo_and_noise_none_either() -> None:
    rng = np.random.default_rng(6)
    for n_stars, seeds in ((4, range(1)), (8, range(10))):
        n_moved = 0
        for _ in seeds:
            difference = rng.normal(0.0, 10.0, SHAPE).astype(np.float32)
            stars = SaturatedStars(rng.uniform(30, 290, n_stars), rng.uniform(30, 270, n_stars), np.full(n_stars, 3e6))
            matched = np.zeros(SHAPE, dtype=np.float32)
            variance = np.full(SHAPE, 100.0, dtype=np.float32)
            subtract_halos(difference, matched, variance, np.zeros(SHAPE, dtype=bool), stars, FWHM_PIX)
            n_moved += bool(matched.any())
        # 20 rings at 3 sigma, ends of correlated rings included: one run in twenty
        assert n_moved <= 0.3 * len(seeds)


@pytest.mark.parametrize(("n_stars", "n_spoilt"), [(5, 1), (6, 1), (10, 2), (16, 3)])
def test_what_lies_around_a_few_stars_is_no_halo_of_the_others(n_stars: int, n_spoilt: int) -> None:
    rng = np.random.default_rng([7, n_stars])
    difference = rng.normal(0.0, 10.0, SHAPE).astype(np.float32)
    x, y = np.divmod(np.arange(n_stars), 4)
    stars = SaturatedStars(40.0 + 70.0 * x, 40.0 + 70.0 * y, np.full(n_stars, 3e6))
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    for star in range(n_spoilt):
        difference[np.hypot(columns - stars.x[star], rows - stars.y[star]) < 14] += 600.0
    matched = np.zeros(SHAPE, dtype=np.float32)
    variance = np.full(SHAPE, 100.0, dtype=np.float32)
    subtract_halos(difference, matched, variance, np.zeros(SHAPE, dtype=bool), stars, FWHM_PIX)
    assert np.abs(matched).max() < 10.0  # below the noise of one pixel; the spoilt light is 600

"""Fluxes on empty sky."""

from __future__ import annotations

import math

import numpy as np
import pytest

from transforms.numerics import sky_sources
from transforms.numerics.sky_sources import CLEAR_RADIUS_PIX, SKY_SOURCES, measure_sky_sources

SIDE = 512
SIGMA = 1.8
START = (0.3, 0.6)


def _psf() -> np.ndarray:
    axis = np.arange(-10, 11)
    psf = np.exp(-(axis[None, :] ** 2 + axis[:, None] ** 2) / (2 * SIGMA**2))
    return psf / psf.sum()


def _sky(noise: float = 3.0, claimed: float = 3.0, level: float = 0.0) -> dict:
    difference = np.random.default_rng(7).normal(level, noise, (SIDE, SIDE)).astype(np.float32)
    empty = np.zeros((SIDE, SIDE))
    return {
        "difference": difference,
        "variance": np.full((SIDE, SIDE), claimed**2, dtype=np.float32),
        "bad": empty.astype(bool),
        "psf": _psf(),
        "snr_map": empty.astype(np.float32),
        "threshold": 5.0,
        "start": START,
    }


@pytest.mark.parametrize("claimed", [3.0, 1.5])
def test_the_width_tells_by_how_much_the_errors_are_wrong(claimed: float) -> None:
    """1.4826 MAD of n normal values scatters by sqrt(1.36 / n) = 5 % for n = 500; five sigma of it."""
    sky = measure_sky_sources(**_sky(claimed=claimed), n_sources=500)
    tolerance = 5.0 * math.sqrt(1.36 / 500)
    assert sky.n_sources == 500
    assert sky.pull_width == pytest.approx(3.0 / claimed, rel=tolerance)
    # The error of a Gaussian PSF's flux in white noise: sigma sqrt(4 pi) times the noise of a pixel.
    assert sky.flux_sigma == pytest.approx(3.0 * math.sqrt(4.0 * math.pi) * SIGMA, rel=tolerance)


def test_a_background_left_behind_shows_in_the_median() -> None:
    """A level of one sigma of a pixel, under a PSF of effective area 4 pi sigma^2, is that much flux."""
    at_zero, raised = (measure_sky_sources(**_sky(level=level)).flux_median for level in (0.0, 3.0))
    assert raised - at_zero == pytest.approx(3.0 * 4.0 * math.pi * SIGMA**2, rel=1e-3)


def test_no_place_is_near_a_source_or_a_bad_pixel_or_the_border() -> None:
    planes = _sky()
    planes["snr_map"][::40, ::40] = -6.0
    planes["bad"][20::40, 20::40] = True
    x, y = sky_sources._halton(1000, START)
    x, y = x * SIDE - 0.5, y * SIDE - 0.5
    chosen = sky_sources._clear_places(planes["snr_map"], planes["bad"], 5.0, x, y, SKY_SOURCES)
    assert len(chosen) == SKY_SOURCES
    column, row = np.round(x[chosen]), np.round(y[chosen])
    for blocked in ((planes["snr_map"] != 0.0) | planes["bad"],):
        rows, columns = np.nonzero(blocked)
        apart = np.maximum(np.abs(row[:, None] - rows), np.abs(column[:, None] - columns))
        assert apart.min() > CLEAR_RADIUS_PIX
    assert min(row.min(), column.min()) >= CLEAR_RADIUS_PIX
    assert max(row.max(), column.max()) < SIDE - CLEAR_RADIUS_PIX


def test_places_fill_the_image_evenly_and_follow_the_start() -> None:
    x, y = sky_sources._halton(100, START)
    # Of 100 random points, 4 of 16 cells' counts would be off by more than 3; of a Halton sequence none is.
    counts = np.histogram2d(x, y, bins=4, range=((0, 1), (0, 1)))[0]
    assert np.abs(counts - 6.25).max() < 3.0
    assert not np.array_equal(x, sky_sources._halton(100, (0.31, 0.6))[0])
    np.testing.assert_array_equal(x, sky_sources._halton(1000, START)[0][:100])


def test_where_nothing_is_empty_there_is_no_noise_to_tell() -> None:
    planes = _sky()
    planes["snr_map"][:] = 9.0
    sky = measure_sky_sources(**planes)
    assert sky.n_sources == 0
    assert math.isnan(sky.pull_width)

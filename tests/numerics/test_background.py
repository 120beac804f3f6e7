"""Background: a smooth sky is found under stars, and masked boxes do no harm."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_pair import expose, random_stars, render

from transforms.numerics.background import BackgroundError, subtract_background

SHAPE = (384, 448)
SKY_NOISE = 20.0


def sloping_sky() -> np.ndarray:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return 1000.0 + 0.1 * x - 0.05 * y


def noisy_sky(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (sloping_sky() + rng.normal(scale=SKY_NOISE, size=SHAPE)).astype(np.float32)


def test_plane_sky_is_recovered_to_its_statistical_error() -> None:
    result = subtract_background(noisy_sky(1), np.zeros(SHAPE, dtype=bool))
    # the mode 2.5 median - 1.5 mean of a box of 128^2 pixels is about 2.5 times noisier than the mean; 5 sigma of it.
    # A plane's slope within the outermost half boxes is extrapolated flat by the spline: 0.1 * 64 at worst
    box_error = 5 * 2.5 * SKY_NOISE / 128
    inner = (slice(64, -64), slice(64, -64))
    assert np.max(np.abs(result.background - sloping_sky())[inner]) < box_error + 0.1 * 16
    assert abs(result.level - sloping_sky().mean()) < box_error
    assert result.rms == pytest.approx(np.hypot(SKY_NOISE, 0.1 * 128 / np.sqrt(12)), rel=0.05)


def test_image_is_background_plus_rest() -> None:
    image = noisy_sky(2)
    result = subtract_background(image, np.zeros(SHAPE, dtype=bool))
    np.testing.assert_array_equal(result.image, image - result.background)


def test_adding_a_constant_moves_the_background_by_it() -> None:
    image = noisy_sky(3)
    mask = np.zeros(SHAPE, dtype=bool)
    low, high = subtract_background(image, mask), subtract_background(image + np.float32(512.0), mask)
    # the frame of the histogram moves by rounding, by a small part of a level
    assert np.max(np.abs(high.background - low.background - 512.0)) < 0.05 * SKY_NOISE


def test_stars_hardly_raise_the_background() -> None:
    rng = np.random.default_rng(4)
    truth = render(SHAPE, random_stars(rng, SHAPE, 150), 4.0)
    exposure = expose(rng, truth, sky=400.0, sky_variance=400.0)
    result = subtract_background(exposure.image, exposure.bad)
    # clipping leaves the wings: less than a tenth of the noise
    assert abs(np.median(result.background) - 400.0) < 0.1 * SKY_NOISE


def test_masked_garbage_and_nan_do_not_matter_and_fully_masked_boxes_are_bridged() -> None:
    image = noisy_sky(5)
    mask = np.zeros(SHAPE, dtype=bool)
    mask[:128, :128] = True
    mask[200:260, 300] = True
    clean = subtract_background(image, mask)
    image[mask] = 1e7
    image[300, 7] = np.nan
    mask_and_nan = subtract_background(image, mask)
    assert np.isfinite(mask_and_nan.background).all()
    assert np.isnan(mask_and_nan.image[300, 7])
    # one pixel of 128^2 less
    assert np.max(np.abs(mask_and_nan.background - clean.background)) < 0.05 * SKY_NOISE
    # the neighbours' level stands in for the masked corner: off by at most the slope over one and a half boxes
    assert np.max(np.abs(clean.background - sloping_sky())[:128, :128]) < 0.15 * 192


def test_input_is_not_changed() -> None:
    image = noisy_sky(6)
    copy = image.copy()
    subtract_background(image, np.zeros(SHAPE, dtype=bool))
    np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize("masked_fraction", [0.6, 1.0])
def test_too_few_pixels_are_refused_with_their_number(masked_fraction: float) -> None:
    mask = np.random.default_rng(7).random(SHAPE) < masked_fraction
    with pytest.raises(BackgroundError, match=f"{np.count_nonzero(mask)} of {mask.size} pixels"):
        subtract_background(noisy_sky(7), mask)


def test_all_nan_is_refused() -> None:
    with pytest.raises(BackgroundError, match="not finite"):
        subtract_background(np.full(SHAPE, np.nan), np.zeros(SHAPE, dtype=bool))

"""Stacking of exposures, and what single exposures are cleaned of before."""

from __future__ import annotations

import numpy as np
import pytest

from transforms.numerics.image_stacking import StackingError, affine_grid, find_hits, stack_exposures
from transforms.numerics.warping import warp_exposure

SHAPE = (80, 90)
N = 9


def noise_cube(sigma: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    images = random.normal(0.0, 1.0, (len(sigma), *SHAPE)) * sigma[:, None, None]
    variances = np.broadcast_to((sigma**2)[:, None, None], images.shape).copy()
    return images, variances, np.ones(images.shape, dtype=bool)


def gaussian(x: float, y: float, sigma_pix: float, peak: float) -> np.ndarray:
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return peak * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma_pix**2))


def test_noise_of_the_mean_is_what_its_variance_says() -> None:
    sigma = np.linspace(1.0, 3.0, N)
    stack = stack_exposures(*noise_cube(sigma))
    pull = stack.image / np.sqrt(stack.variance)
    # scatter of n pixels is known to 1 / sqrt(2 n); clipping at 4 sigma takes 6e-5 of the values
    assert np.std(pull) == pytest.approx(1.0, abs=5.0 / np.sqrt(2 * pull.size))
    assert np.median(stack.variance) == pytest.approx(1.0 / np.sum(sigma**-2), rel=1e-3)


def test_a_cosmic_ray_in_one_exposure_leaves_no_trace() -> None:
    cube = noise_cube(np.ones(N))
    cube[0][3, 40, 50] = 5000.0
    stack = stack_exposures(*cube)
    assert abs(stack.image[40, 50]) < 5.0 / np.sqrt(N - 1)
    assert stack.n_used[40, 50] == N - 1
    assert stack.n_given[40, 50] == N


def test_a_star_keeps_its_flux_though_the_seeing_changes() -> None:
    images, variances, usable = noise_cube(np.full(N, 3.0))
    for k in range(N):
        width = 2.0 * (1.0 + 0.01 * k)
        images[k] += gaussian(45, 40, width, 1e5 / (2 * np.pi * width**2))
    stack = stack_exposures(images, variances, usable)
    assert stack.n_used[30:51, 35:56].mean() > N - 0.1
    near = np.s_[25:56, 30:61]
    # noise of 31 x 31 pixels of 3 / sqrt(9): 31, three times that
    assert stack.image[near].sum(dtype=float) == pytest.approx(1e5, abs=100.0)


def test_a_strong_variable_is_in_the_mean_with_all_its_exposures() -> None:
    images, variances, usable = noise_cube(np.ones(N))
    images[:, 40, 50] = 1000.0 * np.arange(N)
    stack = stack_exposures(images, variances, usable)
    assert stack.n_used[40, 50] == N
    assert stack.image[40, 50] == pytest.approx(1000.0 * (N - 1) / 2, rel=1e-6)


def test_pixels_seen_too_seldom_have_no_data() -> None:
    images, variances, usable = noise_cube(np.ones(N))
    usable[2:, :10] = False
    stack = stack_exposures(images, variances, usable, min_exposures=3)
    assert np.all(np.isnan(stack.image[:10]))
    assert np.all(np.isinf(stack.variance[:10]))
    assert np.all(np.isfinite(stack.image[10:]))


def test_order_of_exposures_has_no_effect_beyond_rounding() -> None:
    cube = noise_cube(np.linspace(1.0, 2.0, N))
    forward = stack_exposures(*cube)
    backward = stack_exposures(*(plane[::-1] for plane in cube))
    np.testing.assert_allclose(forward.image, backward.image, atol=1e-6)  # float32 of values near 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (c[0][:0], c[1][:0], c[2][:0]), "empty"),
        (lambda c: (c[0], c[1][:, :5], c[2]), "differ"),
        (lambda c: (c[0], c[1], c[2] & (np.arange(N) != 4)[:, None, None]), r"exposures \[4\] have no usable pixel"),
        (lambda c: (c[0][:2], c[1][:2], c[2][:2]), "2 exposures, 3 are needed"),
    ],
)
def test_what_cannot_be_stacked_is_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StackingError, match=message):
        stack_exposures(*change(noise_cube(np.ones(N))))


def test_affine_grid_brings_a_star_to_the_common_frame() -> None:
    affine = np.array([[1.001, 0.002, 7.3], [-0.002, 0.999, -4.6]])
    star = np.array([31.4, 42.7])
    moved = affine[:, :2] @ star + affine[:, 2]
    image = gaussian(*moved, 2.0, 1000.0)
    origin = (-5.0, 3.0)
    grid = affine_grid(affine, (60, 70), origin)
    warped = warp_exposure(image, np.ones(SHAPE), np.zeros(SHAPE, dtype=np.int32), grid, (60, 70))
    pixels = np.nan_to_num(warped.image).astype(float)
    rows, columns = np.mgrid[:60, :70]
    # a windowed sinc keeps the centre of a star of FWHM 4.7 pixels to 1e-3 pixels
    assert (pixels * columns).sum() / pixels.sum() == pytest.approx(star[0] - origin[0], abs=5e-3)
    assert (pixels * rows).sum() / pixels.sum() == pytest.approx(star[1] - origin[1], abs=5e-3)


def test_hits_are_found_and_stars_are_not() -> None:
    random = np.random.default_rng(3)
    image = random.normal(0.0, 5.0, SHAPE)
    for k in range(6):
        image += gaussian(12 + 13 * k, 20.3 + 0.1 * k, 1.5, 10.0 ** (2 + 0.5 * k))  # FWHM 3.5 pixels
    track = [(60, 30), (60, 31), (61, 32), (61, 33)]
    for row, column in track:
        image[row, column] += 400.0
    image[70, 70] += 200.0
    variance = 25.0 + np.maximum(image, 0.0)
    hits = find_hits(image, variance, np.zeros(SHAPE, dtype=bool))
    assert hits[70, 70]
    assert sum(hits[pixel] for pixel in track) >= 3
    assert not hits[:50].any()


def test_bad_pixels_are_no_hits() -> None:
    image = np.random.default_rng(3).normal(0.0, 5.0, SHAPE)
    image[30, 30] = 1e6
    bad = np.zeros(SHAPE, dtype=bool)
    bad[30, 30] = True
    assert not find_hits(image, np.full(SHAPE, 25.0), bad).any()

"""Stacking of exposures, and what single exposures are cleaned of before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import maximum_filter
from scipy.signal import fftconvolve
from simulated_pair import moffat

from transforms.numerics.decorrelation import interpolation_power
from transforms.numerics.image_stacking import (
    ExposureToStack,
    StackingError,
    affine_grid,
    find_hits,
    stack_exposures,
    stack_on_grid,
)
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


def moffat_image(shape: tuple[int, int], x: float, y: float, fwhm_pix: float, flux: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return flux * moffat(columns - x, rows - y, fwhm_pix)


SEEING = 4.0 * np.linspace(1.0, 1.6, N)


def stars_in_varying_seeing(fluxes: tuple[float, ...], seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stars 26 pixels apart in seeing from 4 to 6.4 pixels, with photon noise; sky noise 5."""
    images, variances, usable = noise_cube(np.full(N, 5.0), seed)
    random = np.random.default_rng([seed, 2])
    for k in range(N):
        stars = sum(
            moffat_image(SHAPE, 15.3 + 26 * (i % 3), 16.7 + 26 * (i // 3), SEEING[k], flux)
            for i, flux in enumerate(fluxes)
        )
        images[k] += stars + random.normal(size=SHAPE) * np.sqrt(stars)
        variances[k] += stars
    return images, variances, usable


def test_no_star_is_eaten_though_the_seeing_varies_by_60_percent() -> None:
    cube = stars_in_varying_seeing((3e3, 1e4, 1e5, 1e6, 3e6, 1e7))
    stack = stack_exposures(*cube, SEEING)
    # of noise 6e-5 is beyond 4 sigma, and a pixel has N chances
    assert np.mean(stack.n_used < N) < 5 * N * 6e-5
    weights = stack.weights[:, None, None]
    np.testing.assert_allclose(np.median(stack.image), np.median((weights * cube[0]).sum(axis=0)), atol=0.1)


def test_a_cosmic_ray_in_a_stars_wing_and_a_satellite_across_stars_are_left_out() -> None:
    images, variances, usable = stars_in_varying_seeing((3e3, 1e4, 1e4, 3e3, 1e4, 1e4))
    clean = stack_exposures(images, variances, usable, SEEING)
    soiled = images.copy()
    soiled[4, 24, 20] += 2000.0
    rows = np.abs(np.arange(SHAPE[0])[:, None] - 0.5 * np.arange(SHAPE[1])[None, :] - 20.0)
    trail = 100.0 * np.exp(-(rows**2) / 8.0)  # 20 sigma of the sky a pixel
    soiled[6] += trail
    stack = stack_exposures(soiled, variances, usable, SEEING)
    assert stack.n_used[24, 20] < N
    on_sky = maximum_filter(clean.image, 9) < 40.0
    left = (stack.image - clean.image)[on_sky]
    # a pixel that loses one exposure of nine changes by 5 / sqrt(9 * 8) = 0.6, and what is below 40, twice the limit
    # of outliers, may stay if nothing beside it is above; the trail itself is 100 / 9 = 11
    assert np.max(np.abs(left)) < 4.5
    core = on_sky & (trail > 60.0)
    assert np.mean(stack.n_used[core] == N) < 0.01
    # on the stars what is let pass is a small part of the star
    bright = clean.image > 100.0
    assert np.max(np.abs(stack.image - clean.image)[bright] / clean.image[bright]) < 0.15


def test_seeing_that_is_not_known_is_taken_for_that_of_the_others() -> None:
    cube = stars_in_varying_seeing((3e3, 1e4))
    known = stack_exposures(*cube, np.where(np.arange(N) == 4, np.median(SEEING), SEEING))
    unknown = stack_exposures(*cube, np.where(np.arange(N) == 4, np.nan, SEEING))
    np.testing.assert_array_equal(known.image, unknown.image)


# --- from exposures on their own pixels --------------------------------------------------------------------------

BIG = (300, 300)


def dithered(
    seed: int, scales: np.ndarray, sigma: float = 5.0, sky: float = 300.0, stars: bool = True
) -> list[ExposureToStack]:
    """Exposures of one sky, shifted and turned, in flux units `scales` times that of the stack."""
    random = np.random.default_rng(seed)
    positions = np.column_stack((random.uniform(30, 270, (12, 2)), 10.0 ** random.uniform(4.0, 5.0, 12)))
    made = []
    for scale in scales:
        dx, dy = random.uniform(-3, 3, 2)
        turn = random.uniform(-2e-3, 2e-3)
        affine = np.array([[1.0, turn, dx], [-turn, 1.0, dy]])
        truth = np.zeros(BIG)
        if stars:
            for x, y, flux in positions:
                moved = affine[:, :2] @ [x, y] + affine[:, 2]
                truth += moffat_image(BIG, moved[0], moved[1], 4.5, flux)
        variance = sigma**2 + truth
        image = truth + sky + random.normal(size=BIG) * np.sqrt(variance)
        none = np.zeros(BIG, dtype=bool)
        grid = affine_grid(affine, BIG, (0.0, 0.0))
        made.append(ExposureToStack(scale * image, scale**2 * variance, none, none.copy(), grid, float(scale), 4.5))
    return made


def test_stack_has_the_flux_of_its_unit_and_the_depth_of_all_exposures() -> None:
    scales = np.array([1.0, 0.5, 2.0, 1.3, 0.9, 1.1])
    exposures = dithered(4, scales)
    stack = stack_on_grid(exposures, BIG, min_exposures=3)
    alone = stack_on_grid(
        [replace(exposures[0], grid=affine_grid(np.eye(3)[:2], BIG, (0.0, 0.0)))], BIG, min_exposures=1
    )
    inner = np.s_[20:-20, 20:-20]
    # equal depth whatever the unit: six equal weights, a sixth of the variance
    np.testing.assert_allclose(stack.weights, 1 / 6, rtol=0.02)
    assert np.median(stack.variance[inner]) == pytest.approx(25.0 / 6, rel=0.02)
    assert stack.interpolated == pytest.approx(1.0, abs=0.15)
    assert alone.interpolated == 0.0
    random = np.random.default_rng(4)
    positions = np.column_stack((random.uniform(30, 270, (12, 2)), 10.0 ** random.uniform(4.0, 5.0, 12)))
    rows, columns = np.mgrid[: BIG[0], : BIG[1]]
    for x, y, flux in positions:
        others = sum(moffat_image(BIG, *other[:2], 4.5, other[2]) for other in positions if other[0] != x)
        model = moffat_image(BIG, x, y, 4.5, 1.0)
        near = np.hypot(columns - x, rows - y) < 6.0
        weight = model[near] / stack.variance[near]
        found = np.sum(weight * (stack.image - others)[near]) / np.sum(weight * model[near])
        error = np.sum(model[near] ** 2 / stack.variance[near]) ** -0.5
        # five errors and 0.5 %, for the background under the stars and the sinc
        assert found == pytest.approx(flux, abs=5 * error + 0.005 * flux)


def test_variance_of_a_stack_is_that_of_sums_over_pixels() -> None:
    stack = stack_on_grid(dithered(7, np.ones(6), stars=False), BIG, min_exposures=3)
    rows, columns = np.mgrid[-8:9, -8:9]
    psf = moffat(columns, rows, 4.5)
    inner = np.s_[20:-20, 20:-20]
    flux = fftconvolve(np.nan_to_num(stack.image), psf, mode="same")[inner]
    error = np.sqrt(fftconvolve(np.nan_to_num(stack.variance, posinf=0.0), psf**2, mode="same"))[inner]
    # 260^2 pixels hold some 260^2 / 30 independent sums of a PSF of FWHM 4.5; the background takes 1 %
    assert np.std(flux / error) == pytest.approx(1.0, abs=5 / np.sqrt(2 * flux.size / 30) + 0.01)
    kept = np.std((stack.image / np.sqrt(stack.variance))[inner]) ** 2
    power = interpolation_power(np.fft.fftfreq(64)) ** stack.interpolated
    assert kept == pytest.approx(np.mean(power) ** 2, rel=0.04)


def test_a_core_that_is_saturated_in_half_of_the_exposures_is_marked_and_no_hole() -> None:
    exposures = []
    for number, one in enumerate(dithered(9, np.ones(6))):
        saturated = np.zeros(BIG, dtype=bool)
        if number < 4:
            saturated[148:153, 148:153] = True
        exposures.append(replace(one, saturated=saturated, image=np.where(saturated, 6e4, one.image)))
    stack = stack_on_grid(exposures, BIG, min_exposures=3)
    assert stack.saturated[150, 150]
    assert np.isfinite(stack.image[140:161, 140:161]).all()
    assert stack.image[150, 150] > 5e4
    assert not stack.saturated[100:120].any()


def test_bad_pixels_and_pixels_without_data_are_taken_from_the_other_exposures() -> None:
    exposures = dithered(11, np.ones(5), stars=False)
    exposures[2].bad[100:105, :] = True
    exposures[2].image[100:105, :] = 1e6
    exposures[3].image[200:210, 50:60] = np.nan
    stack = stack_on_grid(exposures, BIG, min_exposures=3)
    inner = np.s_[20:-20, 20:-20]
    assert np.max(np.abs(stack.image[inner]) / np.sqrt(stack.variance[inner])) < 7
    assert np.min(stack.n_used[inner]) >= 3
    assert stack.n_used[102, 150] == 4


def test_no_exposures_are_refused() -> None:
    with pytest.raises(StackingError, match="no exposures"):
        stack_on_grid([], BIG, min_exposures=1)

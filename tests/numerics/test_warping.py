"""Warping: exact for whole pixels, right for smooth images, conserving flux, honest about missing pixels."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from simulated_pair import moffat

from transforms.numerics.warping import (
    CoordinateGrid,
    WarpedExposure,
    WarpError,
    coordinate_grid,
    sinc_weights,
    warp_exposure,
    wcs_coordinate_grid,
)

SHAPE = (120, 150)
STEP = 32


def affine_grid(
    dx: float, dy: float, scale: float = 1.0, angle_deg: float = 0.0, shape: tuple[int, int] = SHAPE
) -> CoordinateGrid:
    """Input coordinates = scale * rotation * output coordinates + shift."""
    x, y = coordinate_grid(shape, STEP)
    c, s = scale * np.cos(np.radians(angle_deg)), scale * np.sin(np.radians(angle_deg))
    return CoordinateGrid(c * x - s * y + dx, s * x + c * y + dy, STEP)


def warp(image: np.ndarray, grid: CoordinateGrid, variance: float = 1.0) -> WarpedExposure:
    planes = np.full(image.shape, variance), np.zeros(image.shape, dtype=np.int32)
    return warp_exposure(image, *planes, grid, SHAPE)


def test_whole_pixel_shift_is_exact() -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(size=(140, 170)).astype(np.float32)
    variance = rng.random((140, 170)).astype(np.float32) + 1
    mask = rng.integers(0, 8, size=(140, 170)).astype(np.int32)
    result = warp_exposure(image, variance, mask, affine_grid(7.0, 5.0), SHAPE)
    assert not result.no_data.any()
    np.testing.assert_array_equal(result.image, image[5:125, 7:157])
    np.testing.assert_array_equal(result.variance, variance[5:125, 7:157])


def test_star_is_kept_better_than_by_lanczos_4() -> None:
    """The reason for the window: a Moffat star of 4.5 pixels at half a pixel from the input pixels."""
    distance = 3.5 - np.arange(8)
    lanczos = np.sinc(distance) * np.sinc(distance / 4)
    y, x = np.mgrid[-15:16, -15:16].astype(float)
    errors = []
    for weights in (sinc_weights(np.array([0.5]))[0], lanczos / lanczos.sum()):
        taps = [(b - 3, a - 3, weights[b] * weights[a]) for b in range(8) for a in range(8)]
        out = sum(weight * moffat(x + dx, y + dy, 4.5) for dy, dx, weight in taps)
        errors.append(np.max(np.abs(out - moffat(x + 0.5, y + 0.5, 4.5))))
    assert errors[0] < 0.5 * errors[1]


def test_band_limited_image_agrees_with_exact_values_and_with_a_quintic_spline() -> None:
    def scene(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.cos(2 * np.pi * (x / 9.0 + 0.3)) * np.cos(2 * np.pi * (y / 11.0 - 0.1))

    y_in, x_in = np.mgrid[:160, :190].astype(float)
    grid = affine_grid(8.37, 6.81, angle_deg=0.5)
    y_out, x_out = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    c, s = np.cos(np.radians(0.5)), np.sin(np.radians(0.5))
    x, y = c * x_out - s * y_out + 8.37, s * x_out + c * y_out + 6.81
    result = warp(scene(x_in, y_in), grid)
    seen = ~result.no_data
    assert seen.mean() > 0.95
    # response of the weights to waves of 9 and 11 pixels, at the worst phase
    fraction = np.linspace(0, 1, 101)
    distance = fraction[:, None] + 3 - np.arange(8)
    response = [np.sum(sinc_weights(fraction) * np.exp(2j * np.pi * distance / p), axis=1) for p in (9, 11)]
    loss = sum(np.max(np.abs(r - 1)) for r in response)
    assert loss < 2e-3
    assert np.max(np.abs(result.image - scene(x, y))[seen]) < loss + 1e-6
    spline = ndimage.map_coordinates(scene(x_in, y_in), [y, x], order=5)
    assert np.max(np.abs(result.image - spline)[seen]) < loss + 1e-3  # the spline's own error at p = 9


@pytest.mark.parametrize("fwhm_pix", [2.5, 3.5, 5.0])
def test_star_keeps_profile_and_flux(fwhm_pix: float) -> None:
    y_in, x_in = np.mgrid[:160, :190].astype(float)
    star = moffat(x_in - 80.3, y_in - 70.6, fwhm_pix)
    result = warp(star, affine_grid(9.43, 8.71))
    y_out, x_out = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    expected = moffat(x_out - (80.3 - 9.43), y_out - (70.6 - 8.71), fwhm_pix)
    # error of the bare weights on this profile at the worst of random phases of star and shift, rounded up
    relative_error = {2.5: 3.5e-2, 3.5: 5e-3, 5.0: 7e-4}[fwhm_pix]
    assert np.nanmax(np.abs(result.image - expected)) < relative_error * expected.max()
    box = (slice(62 - 25, 62 + 26), slice(71 - 25, 71 + 26))
    assert result.image[box].sum(dtype=float) == pytest.approx(expected[box].sum(), rel=2e-3)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.7, 1.4), angle_deg=st.floats(-30, 30))
def test_flux_of_a_star_is_kept_under_scaling_and_rotation(scale: float, angle_deg: float) -> None:
    y_in, x_in = np.mgrid[:160, :190].astype(float)
    star = moffat(x_in - 95.2, y_in - 80.4, 5.0)
    c, s = scale * np.cos(np.radians(angle_deg)), scale * np.sin(np.radians(angle_deg))
    grid = affine_grid(95.2 - (c * 75 - s * 60), 80.4 - (s * 75 + c * 60), scale, angle_deg)
    result = warp(star, grid)
    radius = np.hypot(*(np.mgrid[: SHAPE[0], : SHAPE[1]] - np.array([60, 75])[:, None, None]))
    expected = star[np.hypot(x_in - 95.2, y_in - 80.4) < 25 * scale].sum()
    # interpolation 1e-3; pixels on the rim of the aperture hold 1e-3 of the flux
    assert np.nansum(result.image[radius < 25]) == pytest.approx(expected, rel=2e-3)


def test_sky_per_pixel_scales_with_pixel_area() -> None:
    result = warp(np.full((200, 260), 100.0), affine_grid(10, 10, scale=1.25))
    np.testing.assert_allclose(result.image[~result.no_data], 100.0 * 1.25**2, rtol=1e-6)


def test_variance_is_the_sum_of_squared_weights() -> None:
    grid = affine_grid(8.5, 8.5)
    result = warp(np.zeros((140, 170)), grid, variance=4.0)
    weights = sinc_weights(np.array([0.5]))[0]
    np.testing.assert_allclose(result.variance[~result.no_data], 4.0 * np.sum(weights**2) ** 2, rtol=1e-6)


def test_noise_of_a_warped_image_has_the_propagated_variance() -> None:
    rng = np.random.default_rng(3)
    result = warp(rng.normal(size=(140, 170)), affine_grid(8.3, 7.6, angle_deg=1.0))
    pull = result.image / np.sqrt(result.variance)
    # correlated over about two pixels a direction: a quarter of the samples count
    n = np.count_nonzero(~result.no_data) / 4
    assert np.nanvar(pull) == pytest.approx(1.0, abs=5 * np.sqrt(2 / n))


def test_mask_bits_spread_over_the_nearest_four_by_four() -> None:
    mask = np.zeros((140, 170), dtype=np.int32)
    mask[60, 80] = 5
    mask[61, 80] = 8
    result = warp_exposure(np.zeros(mask.shape), np.ones(mask.shape), mask, affine_grid(8.5, 8.5), SHAPE)
    expected = np.zeros(SHAPE, dtype=np.int32)
    # output pixel p lies at p + 8.5: it takes the pixels p + 7 to p + 10
    expected[50:54, 70:74] |= 5
    expected[51:55, 70:74] |= 8
    np.testing.assert_array_equal(result.mask, expected)


def test_no_data_wherever_a_tap_misses_and_planes_say_so() -> None:
    image = np.zeros((140, 170), dtype=np.float32)
    variance = np.ones_like(image)
    mask = np.zeros(image.shape, dtype=np.int32)
    image[60, 80], variance[20, 30], variance[100, 30], mask[100, 120] = np.nan, np.inf, -1.0, 16
    grid = affine_grid(8.5, 8.5)
    result = warp_exposure(image, variance, mask, grid, SHAPE, no_data_bits=16)
    expected = np.zeros(SHAPE, dtype=bool)
    for y, x in ((60, 80), (20, 30), (100, 30), (100, 120)):
        expected[y - 12 : y - 4, x - 12 : x - 4] = True  # taps of output pixel p are the pixels p + 5 to p + 12
    np.testing.assert_array_equal(result.no_data, expected)
    assert np.isnan(result.image[expected]).all()
    assert np.isinf(result.variance[expected]).all()
    assert not result.mask[expected].any()
    assert np.isfinite(result.image[~expected]).all()


def test_outside_the_input_there_is_no_data() -> None:
    result = warp(np.ones((60, 60)), affine_grid(-40.0, -30.0))
    y, x = np.nonzero(~result.no_data)
    # taps from -3 to +4
    assert (y.min(), y.max()) == (33, 30 + 55)
    assert (x.min(), x.max()) == (43, 40 + 55)


def test_nan_coordinates_are_no_data_and_do_not_crash() -> None:
    grid = affine_grid(10.0, 10.0)
    grid.x[0, 0] = np.nan
    result = warp(np.ones((200, 200)), grid)
    assert result.no_data[: STEP - 1, : STEP - 1].all()
    assert not result.no_data[STEP + 1 :, STEP + 1 :].any()


def tangent_wcs(crpix: tuple[float, float], rotation_deg: float, scale_arcsec: float = 0.2) -> WCS:
    wcs = WCS(naxis=2)
    c, s = np.cos(np.radians(rotation_deg)), np.sin(np.radians(rotation_deg))
    wcs.wcs.crval, wcs.wcs.crpix = [150.1, 2.2], crpix
    wcs.wcs.cd = np.array([[-c, s], [s, c]]) * scale_arcsec / 3600
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    return wcs


def test_wcs_grid_gives_template_coordinates_of_every_science_pixel() -> None:
    science, template = tangent_wcs((75.0, 60.0), 12.0), tangent_wcs((83.2, 71.7), 0.0, 0.25)
    grid = wcs_coordinate_grid(science, template, SHAPE, STEP)
    star_x, star_y = 70.4, 55.8
    template_x, template_y = template.all_world2pix(*science.all_pix2world(star_x, star_y, 0), 0)
    y_in, x_in = np.mgrid[:200, :220].astype(float)
    result = warp(moffat(x_in - template_x, y_in - template_y, 4.0), grid)
    image = np.nan_to_num(result.image[30:81, 45:96].astype(float))
    y, x = np.mgrid[30:81, 45:96]
    # centroid of a noiseless star
    assert np.sum(image * x) / image.sum() == pytest.approx(star_x, abs=0.01)
    assert np.sum(image * y) / image.sum() == pytest.approx(star_y, abs=0.01)
    # pixels of 0.2" on pixels of 0.25": the flux of a star is kept
    assert image.sum() == pytest.approx(1.0, rel=1e-2)


def test_unconnectable_wcs_is_refused() -> None:
    class Failing:
        def all_pix2world(self, x: np.ndarray, y: np.ndarray, origin: int) -> tuple[np.ndarray, np.ndarray]:
            raise ValueError("one or more coordinates are invalid")

    with pytest.raises(WarpError, match="coordinates are invalid"):
        wcs_coordinate_grid(Failing(), tangent_wcs((1, 1), 0), SHAPE)


def test_grid_that_is_too_small_and_unlike_planes_are_refused() -> None:
    image = np.zeros((50, 50))
    with pytest.raises(WarpError, match="needs a grid"):
        warp_exposure(image, image, image.astype(np.int32), affine_grid(0, 0, shape=(40, 40)), SHAPE)
    with pytest.raises(WarpError, match="differ in shape"):
        warp_exposure(image, image[1:], image.astype(np.int32), affine_grid(0, 0), SHAPE)


def test_weights_sum_to_one_and_mirror() -> None:
    fraction = np.linspace(0, 1, 33)
    weights = sinc_weights(fraction)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-14)
    np.testing.assert_allclose(weights, sinc_weights(1 - fraction)[:, ::-1], atol=1e-14)
    np.testing.assert_array_equal(weights[0], [0, 0, 0, 1, 0, 0, 0, 0])

"""Measurement of sources: centroids, fluxes, shapes, sizes, flags, and any pixel content."""

from __future__ import annotations

import numpy as np
import pytest
import sep
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transforms.numerics.detection import Detections, find_peaks, lobe_distance, significance_map
from transforms.numerics.forced_photometry import linear_psf_fit
from transforms.numerics.measurement import (
    Measurements,
    _bbox_sizes,
    fit_centroids,
    mask_flags,
    measure_sources,
    psf_moments,
)
from transforms.numerics.psf_grid import PsfGrid

FLAGS = {name for name, kind in Measurements.__annotations__.items() if "bool" in str(kind)}
PSF_SIZE = 25
HALF = PSF_SIZE // 2


def gaussian(fwhm: float, dx: float = 0.0, dy: float = 0.0, size: int = PSF_SIZE) -> NDArray[np.float64]:
    sigma = fwhm / 2.3548200450309493
    v, u = np.mgrid[:size, :size] - size // 2
    image: NDArray[np.float64] = np.exp(-((u - dx) ** 2 + (v - dy) ** 2) / (2.0 * sigma**2))
    return image / (2.0 * np.pi * sigma**2)


def detections_at(peak_y: list[int], peak_x: list[int], sign: float = 1.0) -> Detections:
    y, x = np.array(peak_y), np.array(peak_x)
    n = y.size
    negative = np.full(n, sign < 0.0)
    none = np.zeros(n, bool)
    snr = np.full(n, 10.0 * sign, np.float32)
    box, moments = (
        (y - 2, y + 3, x - 2, x + 3),
        (x.astype(float), y.astype(float), *np.array([2.0, 2.0, 0.0])[:, None] + np.zeros(n)),
    )
    return Detections(y, x, snr, negative, none, np.zeros(n, np.float32), *box, np.full(n, 25), *moments, 0)


def measure(
    difference: NDArray[np.floating],
    variance: NDArray[np.floating],
    psf: NDArray[np.float64],
    detections: Detections,
    bad: NDArray[np.bool_] | None = None,
) -> Measurements:
    masked = np.zeros(difference.shape, bool) if bad is None else bad
    nothing = np.zeros_like(difference)
    return measure_sources(difference, variance, difference, variance, nothing, variance, masked, psf, detections)


def field_of_sources(fwhm: float, snr: float, n_side: int, seed: int) -> tuple[NDArray[np.float64], ...]:
    """White noise of sigma 3 with point sources on a jittered grid; returns image, true x, true y, peaks y and x."""
    rng = np.random.default_rng(seed)
    spacing = 31
    image = rng.normal(0.0, 3.0, (n_side * spacing, n_side * spacing))
    flux = snr * 3.0 / np.sqrt((gaussian(fwhm) ** 2).sum())
    grid = spacing // 2 + spacing * np.arange(n_side)
    cy, cx = (axis.ravel() for axis in np.meshgrid(grid, grid, indexing="ij"))
    dx, dy = rng.uniform(-0.5, 0.5, (2, cx.size))
    for source in range(cx.size):
        image[cy[source] - HALF : cy[source] + HALF + 1, cx[source] - HALF : cx[source] + HALF + 1] += flux * gaussian(
            fwhm, dx[source], dy[source]
        )
    return image, cx + dx, cy + dy, cy, cx


@pytest.mark.parametrize(("fwhm", "shift"), [(2.1, (0.45, -0.3)), (4.7, (-0.5, 0.5)), (4.7, (2.4, -1.7))])
def test_centroid_and_flux_of_a_noiseless_source_are_exact(fwhm: float, shift: tuple[float, float]) -> None:
    difference = np.zeros((61, 61))
    difference[30 - HALF : 31 + HALF, 30 - HALF : 31 + HALF] = 5000.0 * gaussian(fwhm, *shift)
    found = measure(difference, np.ones_like(difference), gaussian(fwhm), detections_at([30], [30]))
    # Symmetric errors of the spline cancel in the position; steps below 1e-4 pixel end the iteration, whose error
    # shrinks at least tenfold a step. The flux keeps the spline error, 0.13 % at FWHM 2.1.
    assert not found.centroid_flag[0]
    assert found.x[0] - 30.0 == pytest.approx(shift[0], abs=1e-4 if fwhm > 3 else 1e-3)
    assert found.y[0] - 30.0 == pytest.approx(shift[1], abs=1e-4 if fwhm > 3 else 1e-3)
    assert found.psf_flux[0] == pytest.approx(5000.0, rel=1e-4 if fwhm > 3 else 2e-3)


def test_centroid_errors_meet_the_cramer_rao_bound_and_their_pulls_have_unit_width() -> None:
    fwhm, snr = 4.0, 20.0
    image, x, y, peak_y, peak_x = field_of_sources(fwhm, snr, 28, seed=1)
    found = measure(image, np.full_like(image, 9.0), gaussian(fwhm), detections_at(peak_y.tolist(), peak_x.tolist()))
    assert not found.centroid_flag.any()
    n = x.size
    sigma = fwhm / 2.3548
    bound = np.sqrt(2.0) * sigma / snr  # Gaussian PSF, white noise: sum(P^2) / sum(P_x^2) = 2 sigma^2
    for error, claimed in ((found.x - x, found.x_err), (found.y - y, found.y_err)):
        assert abs(error.std() / bound - 1.0) < 0.2
        assert np.median(claimed) == pytest.approx(bound, rel=0.02)
        assert abs(error.mean()) < 4.0 * bound / np.sqrt(n)
        # The claimed error uses the fitted flux, which is off by 1 / snr: 1 % of width, besides the sampling.
        assert abs((error / claimed).std() - 1.0) < 4.0 / np.sqrt(2.0 * n) + 0.01


def test_flux_pulls_have_mean_zero_and_unit_width_at_fixed_positions_and_little_bias_at_fitted_ones() -> None:
    fwhm, snr = 4.0, 20.0
    image, x, y, peak_y, peak_x = field_of_sources(fwhm, snr, 28, seed=2)
    variance = np.full_like(image, 9.0)
    found = measure(image, variance, gaussian(fwhm), detections_at(peak_y.tolist(), peak_x.tolist()))
    at_truth = linear_psf_fit(image, variance, gaussian(fwhm), x, y)
    flux = snr * 3.0 / np.sqrt((gaussian(fwhm) ** 2).sum())
    n = x.size
    pull = (at_truth.flux - flux) / at_truth.flux_err
    assert abs(pull.mean()) < 4.0 / np.sqrt(n)
    assert abs(pull.std() - 1.0) < 4.0 / np.sqrt(2.0 * n)
    # Two fitted coordinates take the best of the noise: a bias of +1 / snr sigma (one half for each).
    fitted = (found.psf_flux - flux) / found.psf_flux_err
    assert abs(fitted.mean() - 1.0 / snr) < 4.0 / np.sqrt(n)
    assert abs(fitted.std() - 1.0) < 4.0 / np.sqrt(2.0 * n) + 1.0 / snr
    reduced = found.psf_chi2 / (found.psf_n_pixels - 3)
    assert abs(reduced.mean() - 1.0) < 4.0 * np.sqrt(2.0 / 441.0 / n)


def test_the_covariance_of_x_and_y_is_that_of_repeated_fits() -> None:
    rng = np.random.default_rng(7)
    v, u = np.mgrid[:PSF_SIZE, :PSF_SIZE] - HALF
    psf = np.exp(-0.5 * (5.0 * u * u - 6.0 * u * v + 5.0 * v * v) / 16.0)  # elongated along x = y
    psf /= psf.sum()
    n = 900
    image = rng.normal(0.0, 1.0, (PSF_SIZE, n * PSF_SIZE)) + 30.0 / np.sqrt((psf**2).sum()) * np.tile(psf, n)
    centres = HALF + PSF_SIZE * np.arange(n)
    fitted = fit_centroids(image, np.ones_like(image), image > np.inf, psf, centres, np.full(n, HALF))
    assert not fitted.flag.any()
    correlation = np.corrcoef(fitted.x - centres, fitted.y - HALF)[0, 1]
    claimed = np.median(fitted.x_y_cov / (fitted.x_err * fitted.y_err))
    assert claimed == pytest.approx(0.6, abs=0.03)  # the PSF's own: 3 / 5
    assert abs(correlation - claimed) < 4.0 * (1.0 - claimed**2) / np.sqrt(n)


def test_flux_error_of_white_noise_is_the_noise_over_the_root_of_the_squared_psf() -> None:
    difference = np.random.default_rng(0).normal(0.0, 3.0, (61, 61))
    difference[18:43, 18:43] += 3000.0 * gaussian(4.7)
    found = measure(difference, np.full_like(difference, 9.0), gaussian(4.7), detections_at([30], [30]))
    # sum(P^2) of the shifted, 21 pixels wide stamp is that of the whole PSF to 1e-4.
    assert found.psf_flux_err[0] == pytest.approx(3.0 / np.sqrt((gaussian(4.7) ** 2).sum()), rel=1e-4)


def test_negating_the_difference_negates_fluxes_and_keeps_everything_else() -> None:
    image, *_ = field_of_sources(4.0, 15.0, 6, seed=3)
    bad = np.zeros(image.shape, bool)
    image = image.astype(np.float32)
    variance = np.full_like(image, 9.0)
    results = []
    for difference in (image, -image):
        snr_map, _ = significance_map(difference, variance, bad, gaussian(4.0))
        results.append(measure(difference, variance, gaussian(4.0), find_peaks(snr_map, bad), bad))
    plain, negated = results
    assert plain.x.size >= 36
    np.testing.assert_array_equal(negated.is_negative, ~plain.is_negative)
    for name in ("psf_flux", "ap_flux"):
        np.testing.assert_array_equal(getattr(negated, name), -getattr(plain, name))
    for name in ("x", "y", "x_err", "psf_flux_err", "psf_chi2", "ixx", "iyy", "ixy", "snr", "peak_excess", "bbox_size"):
        np.testing.assert_array_equal(getattr(negated, name), getattr(plain, name))


def test_scaling_the_units_scales_fluxes_and_keeps_positions() -> None:
    image, *_, peak_y, peak_x = field_of_sources(4.0, 15.0, 4, seed=4)
    peaks = detections_at(peak_y.tolist(), peak_x.tolist())
    plain = measure(image, np.full_like(image, 9.0), gaussian(4.0), peaks)
    scaled = measure(64.0 * image, np.full_like(image, 64.0**2 * 9.0), gaussian(4.0), peaks)
    for name in ("psf_flux", "psf_flux_err", "ap_flux", "ap_flux_err", "science_flux", "star_flux"):
        np.testing.assert_array_equal(getattr(scaled, name), 64.0 * getattr(plain, name))
    for name in ("x", "y", "x_err", "psf_chi2", "ixx", "core_chi2", "peak_excess", "size_ratio"):
        np.testing.assert_array_equal(getattr(scaled, name), getattr(plain, name))


def test_shifting_by_whole_pixels_shifts_centroids() -> None:
    image, *_, peak_y, peak_x = field_of_sources(4.0, 15.0, 3, seed=5)
    moved = np.zeros((160, 160))
    moved[20:113, 37:130] = image
    still = np.zeros((160, 160))
    still[3:96, 5:98] = image
    first = measure(still, np.ones_like(still), gaussian(4.0), detections_at(list(peak_y + 3), list(peak_x + 5)))
    second = measure(moved, np.ones_like(moved), gaussian(4.0), detections_at(list(peak_y + 20), list(peak_x + 37)))
    # Adding an integer to a coordinate below 256 rounds at 2^-45.
    np.testing.assert_allclose(second.x - first.x, 32.0, atol=1e-12)
    np.testing.assert_allclose(second.y - first.y, 17.0, atol=1e-12)
    np.testing.assert_allclose(second.psf_flux, first.psf_flux, rtol=1e-10)


def test_one_source_measures_the_same_alone_and_among_others() -> None:
    image, *_, peak_y, peak_x = field_of_sources(4.0, 15.0, 3, seed=6)
    everything = measure(image, np.ones_like(image), gaussian(4.0), detections_at(list(peak_y), list(peak_x)))
    alone = measure(image, np.ones_like(image), gaussian(4.0), detections_at([peak_y[4]], [peak_x[4]]))
    for of_all, of_one in zip(everything, alone, strict=True):
        assert of_all[4:5].tobytes() == of_one.tobytes()


def test_no_source_gives_empty_columns() -> None:
    found = measure(np.zeros((40, 40)), np.ones((40, 40)), gaussian(4.0), detections_at([], []))
    assert {column.shape for column in found} == {(0,)}


def test_a_fit_that_leaves_the_peak_keeps_the_peak_and_says_so() -> None:
    ramp = np.tile(np.linspace(0.0, 1000.0, 61) ** 2, (61, 1))  # nothing to hold on to
    flat = np.zeros((61, 61))
    for difference in (ramp, flat):
        fitted = fit_centroids(difference, np.ones_like(flat), flat.astype(bool), gaussian(4.0), [30], [25])
        assert fitted.flag[0]
        assert (fitted.x[0], fitted.y[0]) == (30.0, 25.0)
        assert np.isnan([fitted.x_err[0], fitted.y_err[0], fitted.x_y_cov[0]]).all()


def test_forced_fluxes_are_those_of_science_and_template_at_the_centroid() -> None:
    science, template = np.zeros((61, 61)), np.zeros((61, 61))
    science[18:43, 18:43], template[18:43, 18:43] = 900.0 * gaussian(4.7), 700.0 * gaussian(4.7)
    ones = np.ones_like(science)
    found = measure_sources(
        science - template,
        2.0 * ones,
        science,
        ones,
        template,
        ones,
        science > np.inf,
        gaussian(4.7),
        detections_at([30], [30]),
    )
    # Pixels are float32: one rounding of 6e-8.
    assert found.science_flux[0] == pytest.approx(900.0, rel=1e-6)
    assert found.template_flux[0] == pytest.approx(700.0, rel=1e-6)
    assert found.psf_flux[0] == pytest.approx(200.0, rel=1e-6)
    assert found.psf_flux_err[0] == pytest.approx(np.sqrt(2.0) * found.science_flux_err[0], rel=1e-7)
    # The star of the brightest pixel: the science image, whose central pixel is the peak of the PSF.
    assert found.star_flux[0] == pytest.approx(900.0, rel=1e-6)


def test_science_psf_is_used_for_forced_fluxes_only() -> None:
    difference = np.zeros((61, 61))
    difference[18:43, 18:43] = 900.0 * gaussian(4.7)
    ones, good = np.ones_like(difference), np.zeros(difference.shape, bool)
    peaks = detections_at([30], [30])
    planes = (difference, ones, difference, ones, difference, ones, good)
    same, wide = (
        measure_sources(*planes, gaussian(4.7), peaks),
        measure_sources(*planes, gaussian(4.7), peaks, gaussian(6)),
    )
    assert same.psf_flux[0] == wide.psf_flux[0]
    # A Gaussian of width s fitted with one of width t: sum(P D) / sum(P^2) = 2 t^2 / (s^2 + t^2), cut at 21 pixels.
    assert wide.science_flux[0] / 900.0 == pytest.approx(2.0 * 36.0 / (36.0 + 4.7**2), rel=1e-3)
    assert wide.template_flux[0] == wide.science_flux[0]


def widening_field(snr: float) -> tuple[NDArray[np.float64], Detections, PsfGrid]:
    """Sources whose width grows by 12 % along x, in noise of sigma 1, and the PSFs at the centres of the cells.

    They lie on a grid of 28 x 28, 4 x 4 of it in each cell.
    """
    rng = np.random.default_rng(9)
    size, spacing, n_side = 896, 32, 28
    image = rng.normal(0.0, 1.0, (size, size))

    def fwhm_at(x: float) -> float:
        return 4.5 * (0.94 + 0.12 * x / size)

    peaks = 16 + spacing * np.arange(n_side)
    for cx in peaks:
        psf = gaussian(fwhm_at(cx))
        for cy in peaks:
            dx, dy = rng.uniform(-0.5, 0.5, 2)
            stamp = np.s_[cy - HALF : cy + HALF + 1, cx - HALF : cx + HALF + 1]
            image[stamp] += snr / np.sqrt((psf**2).sum()) * gaussian(fwhm_at(cx + dx), dx, dy)
    cells = np.array([gaussian(fwhm_at(128 * column + 63.5)) for column in range(7)])
    y, x = np.meshgrid(peaks, peaks, indexing="ij")
    grid = PsfGrid(np.broadcast_to(cells, (7, *cells.shape)).astype(np.float32))
    return image, detections_at(y.ravel().tolist(), x.ravel().tolist()), grid


def test_fluxes_and_chi_square_of_a_psf_that_varies_are_right_with_its_grid_and_wrong_with_its_mean() -> None:
    image, found, grid = widening_field(100.0)
    variance, bad = np.ones_like(image), np.zeros(image.shape, bool)
    column = found.peak_x // 128
    norms = np.array([np.sqrt((gaussian(4.5 * (0.94 + 0.12 * x / 896)) ** 2).sum()) for x in found.peak_x])
    n = 4 * 28  # sources of a column of cells
    worst = {}
    for name, psf in (("grid", grid), ("mean", grid.images[3, 3])):
        measured = measure_sources(image, variance, image, variance, image, variance, bad, psf, found, psf)
        flux_ratio = measured.psf_flux * norms / 100.0
        np.testing.assert_array_equal(measured.science_flux, measured.psf_flux)
        misfit = measured.core_chi2 / (measured.core_n_pixels - 3)
        worst[name] = [max(abs(np.mean(one[column == c]) - 1.0) for c in range(7)) for one in (flux_ratio, misfit)]
    # A mean of n fluxes of 1 % is good to 0.1 %; half a cell away the width is off by 0.9 %, of both signs.
    assert worst["grid"][0] < 5e-3
    # Some 60 pixels in a core, so chi-square per pixel scatters by sqrt(2 / 60 / n) = 0.017.
    assert worst["grid"][1] < 4.0 * np.sqrt(2.0 / 60.0 / n)
    # At the ends the mean PSF is 5 % off in width, and so is the flux: f = 2 t^2 / (s^2 + t^2).
    assert worst["mean"][0] > 0.04
    assert worst["mean"][1] > 0.15


def test_shapes_and_centres_go_with_the_psf_of_the_source_s_cell_however_many_are_measured_at_once() -> None:
    image, found, grid = widening_field(100.0)
    variance, bad = np.ones_like(image), np.zeros(image.shape, bool)
    together = measure_sources(image, variance, image, variance, image, variance, bad, grid, found, grid)
    for source in (0, 3, 4, 27, 400, 783):
        cell = found.peak_y[source] // 128, found.peak_x[source] // 128
        one = Detections(*(column[source : source + 1] for column in found[:-1]), 0)
        for psf in (grid, grid.images[cell]):
            alone = measure_sources(image, variance, image, variance, image, variance, bad, psf, one, psf)
            for name, column in alone._asdict().items():
                assert column.tobytes() == getattr(together, name)[source : source + 1].tobytes(), name
        moments = together.ixx_psf[source], together.iyy_psf[source], together.ixy_psf[source]
        assert moments == psf_moments(grid.images[cell])
    np.testing.assert_array_less(1.1, together.ixx_psf[found.peak_x > 768] / together.ixx_psf[0])


def test_aperture_flux_is_the_area_times_the_level_and_masks_are_scaled_for() -> None:
    level = np.full((80, 80), 3.0)
    bad = np.zeros(level.shape, bool)
    bad[40:43, 45:48] = True
    found = measure(level, np.full_like(level, 4.0), gaussian(4.0), detections_at([40, 5], [40, 40]), bad)
    # A flat level leaves the centroid where it was; exact overlap areas, sums in float64 of float32 areas at worst.
    area = np.pi * 12.0**2
    assert found.ap_flux[0] == pytest.approx(3.0 * area, rel=1e-5)
    assert found.ap_flux_flag_truncated.tolist() == [False, True]
    assert not found.ap_flux_flag.any()
    unmasked = measure(level, np.full_like(level, 4.0), gaussian(4.0), detections_at([40], [40]))
    oracle = sep.sum_circle(level, unmasked.x, unmasked.y, 12.0, var=np.full_like(level, 4.0), subpix=0)
    assert (unmasked.x[0], unmasked.y[0]) == pytest.approx((40.0, 40.0), abs=1e-3)
    assert unmasked.ap_flux[0] == pytest.approx(oracle[0][0], rel=1e-12)
    assert unmasked.ap_flux_err[0] == pytest.approx(2.0 * np.sqrt(area), rel=1e-5)


@pytest.mark.parametrize("axes", [(2.0, 2.0, 0.0), (3.0, 1.8, 0.0), (2.5, 2.0, 0.9)])
def test_moments_of_a_gaussian_are_its_covariance(axes: tuple[float, float, float]) -> None:
    xx, yy, xy = axes[0] ** 2, axes[1] ** 2, axes[2]
    v, u = np.mgrid[:81, :81] - 40.0
    determinant = xx * yy - xy * xy
    difference = 1e4 * np.exp(-0.5 * (yy * u * u - 2.0 * xy * u * v + xx * v * v) / determinant)
    found = measure(difference, np.ones_like(difference), gaussian(4.7), detections_at([40], [40]))
    # The weight is cut at 5 sigma, where the weighted profile is 1e-11; the iteration stops at 1e-4 of xx + yy and
    # shrinks its error at least tenfold a step.
    tolerance = 1e-4 * (xx + yy)
    measured = (found.ixx[0], found.iyy[0], found.ixy[0])
    assert measured == pytest.approx((xx, yy, xy), abs=tolerance)
    assert found.ixx_psf[0] == pytest.approx((4.7 / 2.3548) ** 2, rel=1e-3)


def test_a_shape_with_a_fifth_of_its_light_masked_is_not_measured_but_its_flux_is() -> None:
    difference, bad = np.zeros((61, 61)), np.zeros((61, 61), bool)
    difference[18:43, 18:43] = 1e4 * gaussian(4.0)
    bad[:, 32:] = True  # 1.5 pixels or 0.9 sigma from the centre
    found = measure(difference, np.ones_like(difference), gaussian(4.0), detections_at([30], [30]), bad)
    assert np.isnan([found.ixx[0], found.iyy[0], found.ixy[0], found.size_ratio[0]]).all()
    assert found.psf_flux[0] == pytest.approx(1e4, rel=1e-4)
    assert found.good_weight[0] < 1.0


def test_moments_of_a_psf_image_do_not_depend_on_its_normalisation() -> None:
    assert psf_moments(gaussian(4.0)) == pytest.approx(psf_moments(7.0 * gaussian(4.0)), rel=1e-6)


def test_size_ratio_is_one_for_a_point_source_and_small_for_a_single_pixel() -> None:
    difference = np.zeros((61, 121))
    difference[18:43, 18:43] = 1e4 * gaussian(4.0)
    difference[30, 90] = 1e4
    found = measure(difference, np.ones_like(difference), gaussian(4.0), detections_at([30, 30], [30, 90]))
    assert found.size_ratio[0] == pytest.approx(1.0, abs=1e-3)  # the moments' own stopping accuracy
    assert found.size_ratio[1] < 0.01
    # All the flux in one pixel: the linear fit gives A P0 / sum(P^2), and the excess is measured in units of flux P0.
    q = gaussian(4.0)[HALF, HALF] ** 2 / (gaussian(4.0) ** 2).sum()
    assert found.peak_excess[1] == pytest.approx(1.0 / q - 1.0, rel=0.01)


@pytest.mark.parametrize(
    ("box", "x", "y", "expected"),
    [((10, 15, 20, 31), 25.0, 12.0, 10), ((10, 15, 20, 31), 21.4, 12.0, 18), ((10, 13, 20, 23), 40.0, 11.0, 6)],
)
def test_box_size_holds_the_footprint_but_at_most_twice_its_side(
    box: tuple[int, int, int, int], x: float, y: float, expected: int
) -> None:
    y0, y1, x0, x1 = (np.array([edge]) for edge in box)
    one = detections_at([int(y)], [int(x)])._replace(y0=y0, y1=y1, x0=x0, x1=x1)
    assert _bbox_sizes(one, np.array([x]), np.array([y])).tolist() == [expected]


def test_sources_at_the_border_are_measured_with_padded_stamps_and_flagged() -> None:
    difference = np.zeros((60, 60))
    padded = np.zeros((100, 100))
    padded[20 - HALF : 21 + HALF, 45 - HALF : 46 + HALF] = 1e4 * gaussian(4.0, 0.2, 0.3)
    difference[:] = padded[20:80, 20:80]
    found = measure(difference, np.ones_like(difference), gaussian(4.0), detections_at([0, 30], [25, 30]))
    assert found.psf_flux_flag_edge.tolist() == [True, False]
    assert not found.psf_flux_flag[0]
    assert found.x[0] == pytest.approx(25.2, abs=1e-3)
    assert found.y[0] == pytest.approx(0.3, abs=1e-3)
    assert found.psf_flux[0] == pytest.approx(1e4, rel=1e-3)


def test_a_fully_masked_source_is_null_and_flagged() -> None:
    difference, bad = np.ones((60, 60)), np.ones((60, 60), bool)
    found = measure(difference, np.ones_like(difference), gaussian(4.0), detections_at([30], [30]), bad)
    for flag in ("centroid_flag", "psf_flux_flag", "psf_flux_flag_no_good_pixels", "ap_flux_flag", "forced_flux_flag"):
        assert getattr(found, flag)[0], flag
    assert np.isnan([found.psf_flux[0], found.ap_flux[0], found.science_flux[0], found.ixx[0]]).all()
    assert found.psf_n_pixels[0] == 0


def test_mask_flags_look_at_the_box_and_at_three_pixels_around_the_centroid() -> None:
    mask = np.zeros((50, 50), np.int32)
    mask[10, 10], mask[12, 11], mask[3, 20], mask[40, 31], mask[13, 10] = 1, 2, 4, 8, 16
    boxes = detections_at([10, 30], [10, 30])._replace(
        y0=np.array([10, 30]), y1=np.array([11, 41]), x0=np.array([10, 30]), x1=np.array([11, 32])
    )
    flags = mask_flags(mask, {"A": 0, "B": 1, "C": 2, "D": 3, "E": 4}, [10.4, 30.0], [11.4, 30.0], boxes)
    assert {name: column.tolist() for name, column in flags.anywhere.items()} == {
        "A": [True, False],
        "B": [True, False],
        "C": [False, False],
        "D": [False, True],
        "E": [True, False],
    }
    assert flags.centre["A"].tolist() == [True, False]
    assert flags.centre["B"].tolist() == [True, False]
    assert flags.centre["D"].tolist() == [False, False]
    assert flags.centre["E"].tolist() == [False, False]  # two pixels away
    assert flags.off_image.tolist() == [False, False]


def test_mask_flags_of_the_highest_bit_and_beyond_the_border() -> None:
    mask = np.full((20, 20), np.iinfo(np.int32).min, np.int32)
    flags = mask_flags(mask, {"TOP": 31, "LOW": 0}, [-3.2, 5.0], [5.0, 19.6], detections_at([5, 18], [1, 5]))
    assert flags.anywhere["TOP"].tolist() == [True, True]
    assert flags.anywhere["LOW"].tolist() == [False, False]
    assert flags.centre["TOP"].tolist() == [False, True]
    assert flags.off_image.tolist() == [True, True]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), odd_fraction=st.floats(0.0, 1.0))
def test_any_pixel_content_gives_finite_numbers_or_nan(seed: int, odd_fraction: float) -> None:
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -1.0, 3e38, -3e38, 1e-45, 1e-30], dtype=np.float32)
    planes = rng.normal(0, 3, (6, 32, 34)).astype(np.float32)
    planes[1::2] = planes[1::2] ** 2
    changed = rng.random(planes.shape) < odd_fraction
    planes[changed] = rng.choice(odd, int(changed.sum()))
    peaks = detections_at(rng.integers(2, 30, 15).tolist(), rng.integers(2, 32, 15).tolist(), sign=-1.0)
    found = measure_sources(*planes, rng.random((32, 34)) < 0.1, gaussian(3.0), peaks)
    for name, column in found._asdict().items():
        assert column.shape == (15,)
        if name not in FLAGS:
            assert not np.isinf(column).any(), name
    assert np.isfinite(found.x).all()
    assert np.isfinite(found.y).all()
    assert (np.hypot(found.x - peaks.peak_x, found.y - peaks.peak_y) <= 5.0).all()


def trail_image(
    length_pix: float, angle: float, x: float, y: float, flux: float, fwhm: float = 4.5, side: int = 121
) -> NDArray[np.float64]:
    sigma2, (v, u) = (fwhm / 2.3548) ** 2, np.mgrid[:side, :side].astype(float)
    image = np.zeros((side, side))
    for s in (np.arange(200) + 0.5) / 200 - 0.5:
        distance2 = (u - x - s * length_pix * np.cos(angle)) ** 2 + (v - y - s * length_pix * np.sin(angle)) ** 2
        image += flux / 200 * np.exp(-0.5 * distance2 / sigma2) / (2 * np.pi * sigma2)
    return image


def measure_found(difference: NDArray[np.float64], noise: float, fwhm: float = 4.5) -> tuple[Measurements, Detections]:
    variance, bad = np.full(difference.shape, noise**2), np.zeros(difference.shape, bool)
    snr_map, _ = significance_map(difference, variance, bad, gaussian(fwhm))
    found = find_peaks(snr_map, bad, 5.0, lobe_distance(gaussian(fwhm)))
    return measure(difference, variance, gaussian(fwhm), found), found


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("length_pix", "angle"), [(20.0, 0.0), (35.0, 0.7), (50.0, 2.5)])
def test_the_centroid_of_a_trail_is_its_middle_within_the_noise(length_pix: float, angle: float, sign: float) -> None:
    pulls, errors, n_whole = [], [], 0
    for seed in range(12):
        rng = np.random.default_rng([seed, int(length_pix)])
        x, y = 60.0 + rng.uniform(-0.5, 0.5, 2)
        noise = rng.normal(0.0, 1.0, (121, 121))
        measured, found = measure_found(noise + trail_image(length_pix, angle, x, y, sign * 15.0 * length_pix), 1.0)
        one = int(np.argmax(found.n_pixels))
        covariance = np.array(
            [
                [measured.x_err[one] ** 2, measured.x_y_cov[one]],
                [measured.x_y_cov[one], measured.y_err[one] ** 2],
            ]
        )
        along = np.array([np.cos(angle), np.sin(angle)])
        offset = along @ [measured.x[one] - x, measured.y[one] - y]
        across = along[::-1] * [-1, 1] @ [measured.x[one] - x, measured.y[one] - y]
        pulls.append(offset / np.sqrt(along @ covariance @ along))
        errors.append((abs(offset), abs(across)))
        n_whole += not measured.centroid_flag[one]
    assert n_whole == 12
    # The noise also moves the weight, which the error leaves out: up to twice as wide. 12 draws: +- 3 / sqrt(24).
    assert np.std(pulls) < 2.0 * (1 + 3 / np.sqrt(24))
    along_pix, across_pix = np.median(errors, axis=0)
    assert along_pix < 0.05 * length_pix
    assert across_pix < 0.3


def test_a_noiseless_trail_is_centred_exactly_and_its_moments_are_those_of_its_length() -> None:
    measured, found = measure_found(trail_image(30.0, 0.6, 60.3, 59.8, 5e3), 1.0)
    assert found.peak_x.size == 1
    # Symmetric about its middle but for the sampling by pixels; the iteration stops at a step of 1e-3 pixels.
    assert (measured.x[0], measured.y[0]) == pytest.approx((60.3, 59.8), abs=5e-3)
    major = 0.5 * (measured.ixx[0] + measured.iyy[0]) + np.hypot(
        0.5 * (measured.ixx[0] - measured.iyy[0]), measured.ixy[0]
    )
    # A flat-topped trail under a Gaussian weight looks longer than its L^2 / 12 + sigma^2, by less than a factor 2.
    expected = 30.0**2 / 12 + (4.5 / 2.3548) ** 2
    assert expected < major < 2.0 * expected
    angle = 0.5 * np.arctan2(2 * measured.ixy[0], measured.ixx[0] - measured.iyy[0])
    assert angle == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("snr", [8.0, 100.0, 3000.0])
def test_point_sources_keep_the_position_of_the_psf_fit(snr: float) -> None:
    image, _, _, _, _ = field_of_sources(4.5, snr, 6, seed=3)
    variance, bad = np.full(image.shape, 9.0), np.zeros(image.shape, bool)
    snr_map, _ = significance_map(image, variance, bad, gaussian(4.5))
    found = find_peaks(snr_map, bad, 5.0, lobe_distance(gaussian(4.5)))
    fitted = fit_centroids(image, variance, bad, gaussian(4.5), found.peak_x, found.peak_y)
    measured = measure(image, variance, gaussian(4.5), found)
    assert found.peak_x.size >= 36
    np.testing.assert_array_equal(measured.x, fitted.x)
    np.testing.assert_array_equal(measured.y_err, fitted.y_err)

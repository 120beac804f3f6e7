"""Linear PSF fluxes: formula, oracle, metamorphic and statistical facts, and any pixel content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from transforms.numerics.forced_photometry import (
    GOOD_WEIGHT_MIN,
    evaluate_psf,
    forced_psf_flux,
    linear_psf_fit,
    psf_splines,
)
from transforms.numerics.psf_grid import PsfError, PsfGrid

FLOAT32_ROUNDING = 2.0**-23


def gaussian_psf(fwhm: float, size: int = 31, dx: float = 0.0, dy: float = 0.0) -> NDArray[np.float64]:
    sigma = fwhm / 2.3548200450309493
    v, u = np.mgrid[:size, :size] - size // 2
    image: NDArray[np.float64] = np.exp(-((u - dx) ** 2 + (v - dy) ** 2) / (2.0 * sigma**2))
    return image / (2.0 * np.pi * sigma**2)


def test_flux_of_a_psf_shaped_source_is_exact_and_its_error_follows_the_formula() -> None:
    psf = gaussian_psf(4.0, 21)
    image = np.zeros((60, 60))
    image[20:41, 15:36] = 1234.5 * psf
    flux, flux_err, good = forced_psf_flux(image, np.full_like(image, 9.0), psf, [25.0], [30.0])
    assert good[0]
    # Each pixel is rounded to float32 once; the weighted mean of the roundings cannot exceed one rounding.
    assert flux[0] == pytest.approx(1234.5, rel=FLOAT32_ROUNDING)
    assert flux_err[0] == pytest.approx(3.0 / np.sqrt((psf**2).sum()), rel=1e-12)


@pytest.mark.parametrize("fwhm", [2.1, 3.0, 4.7])
def test_sub_pixel_flux_is_right_to_the_spline_error(fwhm: float) -> None:
    # A quintic spline is off by f^(6) / 46080 half-way between pixels, which is 15 / sigma^6 of a Gaussian's peak
    # for each axis: 0.13 % at FWHM 2.1, 0.015 % at 3. A tenth more for the orders beyond; pixels are float32.
    sigma = fwhm / 2.3548
    image = np.zeros((41, 41))
    image[5:36, 5:36] = 1000.0 * gaussian_psf(fwhm, dx=0.5, dy=-0.37)
    flux, _, _ = forced_psf_flux(image, np.ones_like(image), gaussian_psf(fwhm), [20.5], [19.63])
    assert abs(flux[0] / 1000.0 - 1.0) < 2.2 * 15.0 / (46080.0 * sigma**6) + FLOAT32_ROUNDING


def test_fit_agrees_with_a_plain_loop_over_pixels() -> None:
    rng = np.random.default_rng(11)
    psf = gaussian_psf(3.3, 27, dx=0.2)
    psf += 0.001 * rng.random(psf.shape)
    image = rng.normal(5.0, 2.0, (50, 48)).astype(np.float32)
    variance = rng.uniform(0.5, 4.0, image.shape).astype(np.float32)
    bad = rng.random(image.shape) < 0.1
    image[22, 20], variance[23, 25], variance[24, 26], variance[25, 22] = np.nan, 0.0, -1.0, np.inf
    x, y = np.array([21.3, 3.9, 46.6, 30.0]), np.array([24.8, 2.2, 47.4, 30.5])
    fit = linear_psf_fit(image, variance, psf, x, y, bad)
    padded = np.pad(psf, 12)
    for source in range(x.size):
        cx, cy = int(np.floor(x[source] + 0.5)), int(np.floor(y[source] + 0.5))
        pd = noise = energy = energy_all = 0.0
        used = []
        for v in range(cy - 10, cy + 11):
            for u in range(cx - 10, cx + 11):
                at = [[v - y[source] + 25.0], [u - x[source] + 25.0]]
                p = float(map_coordinates(padded, at, order=5, mode="mirror")[0])
                energy_all += p * p
                if not (0 <= v < 50 and 0 <= u < 48) or bad[v, u]:
                    continue
                value, var = float(image[v, u]), float(variance[v, u])
                if not np.isfinite(value) or not np.isfinite(var) or var <= 0.0:
                    continue
                pd += p * value
                noise += p * p * var
                energy += p * p
                used.append((p, value, var))
        flux = pd / energy
        chi2 = sum((d - flux * p) ** 2 / var for p, d, var in used)
        likelihood = -0.5 * (chi2 + sum(np.log(2.0 * np.pi * var) for _, _, var in used))
        # The two prefilters truncate their recursions at 1e-15 or so; sums of 441 terms add a few roundings.
        assert fit.good_weight[source] == pytest.approx(energy / energy_all, rel=1e-9)
        assert fit.n_pixels[source] == len(used)
        if energy < GOOD_WEIGHT_MIN * energy_all:
            assert not fit.good[source]
            continue
        assert fit.flux[source] == pytest.approx(flux, rel=1e-9)
        assert fit.flux_err[source] == pytest.approx(np.sqrt(noise) / energy, rel=1e-9)
        assert fit.chi2[source] == pytest.approx(chi2, rel=1e-9)
        assert fit.ln_likelihood[source] == pytest.approx(likelihood, rel=1e-9)
    assert fit.edge.tolist() == [False, True, True, False]
    assert fit.good[[0, 3]].all()


def test_slopes_are_the_derivatives_of_the_model() -> None:
    spline = psf_splines(gaussian_psf(2.5), [0.0], [0.0])
    size = 2 * spline.half_width + 1
    stamps = np.empty((5, 3, size, size))
    step = 1e-5
    for number, (ex, ey) in enumerate([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]):
        evaluate_psf(spline.coefficients[0], spline.half_width, 2.37 + ex * step, -1.81 + ey * step, *stamps[number])
    # Central differences: truncation step^2 P''' / 6 ~ 1e-11 and rounding 1e-16 / step ~ 1e-11.
    np.testing.assert_allclose(stamps[0, 1], (stamps[1, 0] - stamps[2, 0]) / (2.0 * step), atol=1e-9)
    np.testing.assert_allclose(stamps[0, 2], (stamps[3, 0] - stamps[4, 0]) / (2.0 * step), atol=1e-9)


def test_every_source_is_fitted_with_the_psf_of_its_cell_and_of_no_other() -> None:
    rng = np.random.default_rng(6)
    images = np.array([[gaussian_psf(row + 0.3 * column, 21) for column in range(3)] for row in (3.0, 4.0)])
    image, variance = rng.normal(0, 1, (256, 300)).astype(np.float32), np.ones((256, 300), np.float32)
    # Cells end between pixels: 127.4 belongs to the first, 127.6 to the second.
    x = np.concatenate([rng.uniform(-3, 303, 60), [127.4, 127.6, 260.0, 20.0]])
    y = np.concatenate([rng.uniform(-3, 258, 60), [127.6, 127.4, 20.0, 200.0]])
    together = linear_psf_fit(image, variance, PsfGrid(images), x, y)
    seen = set()
    for source in range(x.size):
        cell = min(max(int(y[source] + 0.5) // 128, 0), 1), min(max(int(x[source] + 0.5) // 128, 0), 2)
        seen.add(cell)
        alone = linear_psf_fit(image, variance, images[cell], x[source : source + 1], y[source : source + 1])
        assert [one.tobytes() for one in alone] == [one[source : source + 1].tobytes() for one in together]
    assert len(seen) == 6


def test_negating_the_image_negates_the_flux_and_keeps_the_error() -> None:
    rng = np.random.default_rng(2)
    image, variance = rng.normal(0, 1, (40, 40)).astype(np.float32), np.ones((40, 40), np.float32)
    x, y = rng.uniform(5, 35, (2, 30))
    flux, flux_err, _ = forced_psf_flux(image, variance, gaussian_psf(3.0), x, y)
    negated, negated_err, _ = forced_psf_flux(-image, variance, gaussian_psf(3.0), x, y)
    np.testing.assert_array_equal(negated, -flux)
    np.testing.assert_array_equal(negated_err, flux_err)


def test_a_window_gives_the_same_bytes_as_the_whole_image() -> None:
    rng = np.random.default_rng(3)
    image = rng.normal(0, 1, (200, 300)).astype(np.float32)
    variance = rng.uniform(1, 2, image.shape).astype(np.float32)
    x, y = rng.uniform(150.0, 180.0, 50), rng.uniform(100.0, 120.0, 50)
    whole = forced_psf_flux(image, variance, gaussian_psf(4.0), x, y)
    window = np.s_[85:136, 135:196]
    part = forced_psf_flux(image[window], variance[window], gaussian_psf(4.0), x - 135.0, y - 85.0)
    for of_whole, of_part in zip(whole, part, strict=True):
        assert of_whole.tobytes() == of_part.tobytes()


def test_windows_each_of_its_own_source_give_the_same_bytes_as_the_whole_image() -> None:
    rng = np.random.default_rng(7)
    image = rng.normal(0, 1, (140, 300)).astype(np.float32)
    variance = rng.uniform(-0.1, 2, image.shape).astype(np.float32)
    x, y = np.append(rng.uniform(0, 299, 60), [0, 299, 0.4]), np.append(rng.uniform(0, 139, 60), [0, 139, 70.5])
    splines = psf_splines(PsfGrid(np.array([[gaussian_psf(row, 21) for row in (3.0, 4.0, 5.0)]])), x, y)
    x0, y0 = (np.maximum(np.floor(axis + 0.5).astype(int) - 10, 0) for axis in (x, y))
    windows = np.zeros((2, 63, 21, 21), np.float32)
    for k in range(63):
        for plane, whole in enumerate((image, variance)):
            part = whole[y0[k] : y0[k] + 21, x0[k] : x0[k] + 21]
            windows[plane, k, : part.shape[0], : part.shape[1]] = part
    of_windows = forced_psf_flux(*windows, splines, x - x0, y - y0)
    of_image = forced_psf_flux(image, variance, splines, x, y)
    assert [one.tobytes() for one in of_windows] == [one.tobytes() for one in of_image]
    assert of_windows[2].sum() > 55
    with pytest.raises(ValueError, match="must be 62 images of one shape"):
        forced_psf_flux(*windows, splines, x[1:], y[1:])


def test_flux_pulls_have_mean_zero_and_unit_width() -> None:
    rng = np.random.default_rng(4)
    n_side, spacing, flux = 50, 22, 40.0
    psf = gaussian_psf(3.5, 21)
    variance = rng.uniform(0.5, 3.0, (n_side * spacing, n_side * spacing)).astype(np.float32)
    image = rng.normal(0.0, np.sqrt(variance))
    centres = 11 + spacing * np.arange(n_side)
    for cy in centres:
        for cx in centres:
            image[cy - 10 : cy + 11, cx - 10 : cx + 11] += flux * psf
    y, x = (grid.ravel().astype(float) for grid in np.meshgrid(centres, centres, indexing="ij"))
    measured, flux_err, good = forced_psf_flux(image, variance, psf, x, y)
    assert good.all()
    pull = (measured - flux) / flux_err
    n = pull.size
    assert abs(pull.mean()) < 4.0 / np.sqrt(n)
    assert abs(pull.std() - 1.0) < 4.0 / np.sqrt(2.0 * n)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_variance_counted_from_the_pixels_themselves_does_not_bias_fluxes(sign: float) -> None:
    rng = np.random.default_rng(5)
    n_side, spacing, flux, sky = 40, 22, 1000.0, 400.0
    psf = gaussian_psf(4.0, 21)
    expected = np.full((n_side * spacing, n_side * spacing), sky)
    centres = 11 + spacing * np.arange(n_side)
    for cy in centres:
        for cx in centres:
            expected[cy - 10 : cy + 11, cx - 10 : cx + 11] += flux * psf
    counts = rng.poisson(expected).astype(float)
    y, x = (grid.ravel().astype(float) for grid in np.meshgrid(centres, centres, indexing="ij"))
    measured, flux_err, _ = forced_psf_flux(sign * (counts - sky), counts, psf, x, y)
    pull = (sign * measured - flux) / flux_err
    # Weights 1 / counts would take a count from each pixel: sqrt(4 pi) sigma_psf / sqrt(sky) = 0.30 sigma.
    assert abs(pull.mean()) < 4.0 / n_side
    assert abs(pull.std() - 1.0) < 4.0 / np.sqrt(2.0) / n_side


@pytest.mark.parametrize(("masked_columns", "is_good"), [(10, True), (11, False)])
def test_half_of_the_effective_weight_decides_whether_there_is_a_flux(masked_columns: int, is_good: bool) -> None:
    image, variance = np.ones((21, 21)), np.ones((21, 21))
    variance[:, :masked_columns] = np.inf  # column 10 is the centre: without it less than half is left
    flux, flux_err, good = forced_psf_flux(image, variance, gaussian_psf(4.0, 21), [10.0], [10.0])
    assert good[0] == is_good
    assert np.isfinite(flux[0]) == is_good
    assert np.isfinite(flux_err[0]) == is_good


@pytest.mark.parametrize("position", [(np.nan, 5.0), (5.0, np.inf), (-400.0, 5.0), (5.0, 1e300), (-7.6, 5.0)])
def test_positions_without_pixels_have_no_flux(position: tuple[float, float]) -> None:
    flux, flux_err, good = forced_psf_flux(
        np.ones((20, 20)), np.ones((20, 20)), gaussian_psf(3.0), [position[0], 10.0], [position[1], 10.0]
    )
    assert good.tolist() == [False, True]
    assert np.isnan(flux[0])
    assert np.isnan(flux_err[0])


@pytest.mark.parametrize(
    ("psf", "evidence"),
    [
        (np.ones((4, 4)), r"\(4, 4\)"),
        (np.ones((3, 5)), r"\(3, 5\)"),
        (np.full((3, 3), np.nan), "9 pixels"),
        (np.zeros((3, 3)), "positive sum, got 0"),
    ],
)
def test_a_useless_psf_is_refused_with_the_evidence(psf: NDArray[np.float64], evidence: str) -> None:
    with pytest.raises(PsfError, match=evidence):
        forced_psf_flux(np.ones((9, 9)), np.ones((9, 9)), psf, [4.0], [4.0])


def test_planes_and_positions_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        forced_psf_flux(np.ones((9, 9)), np.ones((9, 8)), gaussian_psf(3.0), [4.0], [4.0])
    with pytest.raises(ValueError, match="one length"):
        forced_psf_flux(np.ones((9, 9)), np.ones((9, 9)), gaussian_psf(3.0), [4.0, 5.0], [4.0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), odd_fraction=st.floats(0.0, 1.0))
def test_any_pixel_content_gives_finite_numbers_or_nan(seed: int, odd_fraction: float) -> None:
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -1.0, 3e38, -3e38, 1e-45, 1e-30], dtype=np.float32)
    planes = rng.normal(0, 1, (2, 30, 30)).astype(np.float32) ** 2
    changed = rng.random(planes.shape) < odd_fraction
    planes[changed] = rng.choice(odd, int(changed.sum()))
    fit = linear_psf_fit(planes[0], planes[1], gaussian_psf(3.0), rng.uniform(-5, 35, 20), rng.uniform(-5, 35, 20))
    assert np.isfinite(fit.flux[fit.good]).all()
    assert np.isfinite(fit.flux_err[fit.good]).all()
    assert np.isfinite(fit.chi2[fit.good]).all()
    assert np.isfinite(fit.ln_likelihood[fit.good]).all()
    for column in (fit.flux, fit.flux_err, fit.chi2, fit.ln_likelihood):
        assert np.isnan(column[~fit.good]).all()

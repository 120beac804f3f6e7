"""Dipole fits: exact without noise, honest errors, what counts as a dipole, and any pixel content."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shape_scenes import NOISE, cells, extreme_planes, flux_of_snr, profile, psf_image, trail

from transforms.numerics.dipole_fitting import Dipoles, fit_dipoles
from transforms.numerics.model_fitting import spline_stack

SIDE = 45
Planes = tuple[NDArray[np.float64], NDArray[np.float64]]


def fit(science: NDArray, template: NDArray, x: Any, y: Any, fwhm: float = 4.0, noise: float = NOISE) -> Dipoles:
    variance = np.full(science.shape, noise**2)
    stack = spline_stack(psf_image(fwhm)[np.newaxis])
    peak_x, peak_y = np.asarray(x), np.asarray(y)
    return fit_dipoles(
        science - template,
        2.0 * variance,
        science,
        variance,
        template,
        variance,
        np.zeros(science.shape, bool),
        stack,
        stack,
        np.zeros(peak_x.size, dtype=int),
        peak_x,
        peak_y,
    )


def star_pair(separation: float, angle: float, flux: float, template_flux: float, fwhm: float = 4.0) -> Planes:
    """A star at the middle of a cell that is elsewhere in the template; without noise."""
    dx, dy = 0.5 * separation * np.cos(angle), 0.5 * separation * np.sin(angle)
    middle = SIDE // 2
    science = flux * trail((SIDE, SIDE), fwhm, middle + dx, middle + dy, 0.0, 0.0)
    template = template_flux * trail((SIDE, SIDE), fwhm, middle - dx, middle - dy, 0.0, 0.0)
    return science, template


def noisy_field(separation: float, snr: float, n_side: int, seed: int, fwhm: float = 4.0) -> tuple[Any, ...]:
    """Stars that moved, in every direction; S/N is that of one lobe on the difference."""
    rng = np.random.default_rng(seed)
    science, template = rng.normal(0.0, NOISE, (2, n_side * SIDE, n_side * SIDE))
    flux = flux_of_snr(snr, psf_image(fwhm), np.sqrt(2.0) * NOISE)
    for cell in cells(n_side, SIDE):
        on_science, on_template = star_pair(separation, rng.uniform(0.0, 2.0 * np.pi), flux, flux, fwhm)
        science[cell] += on_science
        template[cell] += on_template
    middle = SIDE // 2 + SIDE * np.arange(n_side)
    y, x = (axis.ravel() for axis in np.meshgrid(middle, middle, indexing="ij"))
    return science, template, x, y, flux


@pytest.mark.parametrize(("separation", "template_part"), [(0.3, 1.0), (1.0, 0.8), (3.0, 1.0), (8.0, 0.6)])
def test_a_dipole_without_noise_is_found_exactly(separation: float, template_part: float) -> None:
    science, template = star_pair(separation, 0.7, 1e5, template_part * 1e5)
    found = fit(science, template, [SIDE // 2], [SIDE // 2], noise=1.0)
    assert found.good[0]
    # The last step starts within a tenth of the errors, which are 2e-5 of the flux and 4e-5 pixel, and ends far closer;
    # the quintic spline is exact to 1e-5 of the peak at this FWHM.
    vector = found.x_positive[0] - found.x_negative[0], found.y_positive[0] - found.y_negative[0]
    assert vector == pytest.approx((separation * np.cos(0.7), separation * np.sin(0.7)), abs=1e-3)
    assert found.mean_flux[0] == pytest.approx(0.5e5 * (1.0 + template_part), rel=1e-4)
    assert found.flux_diff[0] == pytest.approx(1e5 * (1.0 - template_part), abs=20.0)
    assert 0.5 * (found.x_positive[0] + found.x_negative[0]) == pytest.approx(SIDE // 2, abs=1e-3)


def test_swapping_science_and_template_swaps_the_lobes() -> None:
    science, template, x, y, _ = noisy_field(2.0, 30.0, 3, seed=5)
    found, swapped = fit(science, template, x, y), fit(template, science, x, y)
    # The sums run in another order, so a last step may differ in its last digits.
    for name, other in (("x_positive", "x_negative"), ("y_positive", "y_negative"), ("mean_flux", "mean_flux")):
        np.testing.assert_allclose(getattr(found, name), getattr(swapped, other), rtol=1e-6)
    np.testing.assert_allclose(found.flux_diff, -swapped.flux_diff, rtol=1e-4, atol=1e-6 * found.mean_flux.max())
    np.testing.assert_array_equal(found.is_dipole, swapped.is_dipole)


@pytest.mark.parametrize("separation", [1.0, 3.0])
def test_errors_are_honest_though_the_difference_repeats_the_other_two(separation: float) -> None:
    science, template, x, y, flux = noisy_field(separation, 40.0, 13, seed=2)
    found = fit(science, template, x, y)
    assert found.is_dipole.all()
    n = x.size
    width_tolerance = 4.0 / np.sqrt(2.0 * n)
    length = np.hypot(found.x_positive - found.x_negative, found.y_positive - found.y_negative)
    for pull in (
        (found.mean_flux - flux) / found.mean_flux_err,
        found.flux_diff / found.flux_diff_err,
        (length - separation) / found.separation_err,
    ):
        # Fitted positions take the best of the noise: a shift of order 1 / snr sigma for each coordinate.
        assert abs(pull.mean()) < 4.0 / np.sqrt(n) + 0.1
        assert abs(pull.std() - 1.0) < width_tolerance + 0.05
    reduced = found.chi2 / found.n_pixels
    assert abs(reduced.mean() - 1.0) < 0.05


def test_dipoles_with_visible_lobes_are_classified_and_single_sources_are_not() -> None:
    # 1.2 pixels of a star of S/N 40 at a FWHM of 4 leave lobes of S/N 10.
    science, template, x, y, _ = noisy_field(1.2, 40.0, 8, seed=3)
    assert fit(science, template, x, y).is_dipole.mean() > 0.9
    rng = np.random.default_rng(4)
    science, template = rng.normal(0.0, NOISE, (2, 8 * SIDE, 8 * SIDE))
    flux = flux_of_snr(40.0, psf_image(4.0), np.sqrt(2.0) * NOISE)
    for number, cell in enumerate(cells(8, SIDE)):
        # Variables on a star of 0 to 10 times the change, and a registration error of 0.03 pixels.
        steady = (0.0, 1.0, 3.0, 10.0)[number % 4] * flux
        on_science, on_template = star_pair(0.03, 0.0, steady + flux, steady)
        science[cell] += on_science
        template[cell] += on_template
    found = fit(science, template, x, y)
    assert not found.is_dipole.any()
    assert np.nanmedian(found.lobe_share) > 0.9


def test_lobes_further_apart_than_five_sigma_are_no_dipole() -> None:
    inside, outside = (fit(*star_pair(gap, 0.0, 1e5, 1e5), [SIDE // 2], [SIDE // 2]) for gap in (8.0, 9.5))
    assert inside.is_dipole[0]  # sigma is 1.70 pixels
    assert outside.good[0] and not outside.is_dipole[0]


def test_a_steady_host_and_sky_level_do_not_disturb() -> None:
    science, template = star_pair(2.0, 0.3, 1e5, 1e5)
    v, u = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    host = 3e5 * profile(14.0, u, v) + 50.0
    found = fit(science + host, template + host, [SIDE // 2], [SIDE // 2], noise=30.0)
    assert found.is_dipole[0]
    # The host's core, 1.1 times the star's flux within the star's PSF, draws science and template; the pedestals and
    # the difference hold against it. Without them the mean flux would come out twice as large.
    assert found.mean_flux[0] == pytest.approx(1e5, rel=0.3)
    length = np.hypot(found.x_positive[0] - found.x_negative[0], found.y_positive[0] - found.y_negative[0])
    assert length == pytest.approx(2.0, rel=0.3)


@pytest.mark.parametrize("seed", range(12))
def test_any_pixels_give_finite_numbers_or_nan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (31, 37)
    planes = [extreme_planes(rng, shape) for _ in range(3)]
    y = np.concatenate([rng.integers(0, shape[0], 20), [0, 0, shape[0] - 1, shape[0] - 1]])
    x = np.concatenate([rng.integers(0, shape[1], 20), [0, shape[1] - 1, 0, shape[1] - 1]])
    stack = spline_stack(np.stack([psf_image(rng.uniform(1.5, 9.0), size=25) for _ in range(3)]))
    with np.errstate(all="ignore"):
        found = fit_dipoles(
            *planes[0][:2], *planes[1][:2], *planes[2][:2], planes[0][2], stack, stack, rng.integers(0, 3, x.size), x, y
        )
    for name in ("mean_flux", "mean_flux_err", "flux_diff_err", "separation_err", "chi2", "snr", "lobe_share"):
        column = getattr(found, name)
        assert np.isfinite(column[found.good]).all()
        assert np.isnan(column[~found.good]).all()
    assert not (found.is_dipole & ~found.good).any()


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_images_have_no_dipole(value: float) -> None:
    flat = np.full((SIDE, SIDE), value)
    assert not fit(flat, flat, [SIDE // 2, 0], [SIDE // 2, 0]).is_dipole.any()

"""Matching kernels: known kernels are recovered, odd stars are left out, refusals carry evidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulated_pair import Stars, moffat_stamp, render

from transforms.numerics.convolution import convolve
from transforms.numerics.kernel_matching import (
    BadKernelError,
    KernelSolution,
    TooFewKernelStarsError,
    fit_matching_kernel,
    kernel_half_width_pix,
    kernel_sigmas_pix,
    select_kernel_stars,
)
from transforms.numerics.psf_modelling import DetectedSources

SHAPE = (320, 360)
SKY_VARIANCE = 25.0


def gaussian_kernel(sigma_pix: float, half: int = 11, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    offset = np.arange(-half, half + 1)
    kernel = np.exp(-0.5 * (((offset[None, :] - x) / sigma_pix) ** 2 + ((offset[:, None] - y) / sigma_pix) ** 2))
    return kernel / kernel.sum()


def bright_stars(seed: int, n: int = 60) -> Stars:
    """Stars of S/N 100 and more, far enough from the edges for whole stamps."""
    rng = np.random.default_rng([seed, 0])
    flux = np.exp(rng.uniform(np.log(1e4), np.log(1e5), n))
    return Stars(rng.uniform(26, SHAPE[1] - 27, n), rng.uniform(26, SHAPE[0] - 27, n), flux)


def fit(
    science: np.ndarray, template: np.ndarray, stars: Stars, fwhm: tuple[float, float] = (4.7, 3.5), **options: Any
) -> KernelSolution:
    flat, good = np.full(SHAPE, SKY_VARIANCE), np.zeros(SHAPE, dtype=bool)
    planes = science, flat, good, template, flat / 100, good
    return fit_matching_kernel(*planes, stars.x, stars.y, *fwhm, **options)


def noisy(image: np.ndarray, seed: int) -> np.ndarray:
    return image + np.random.default_rng([seed, 1]).normal(scale=np.sqrt(SKY_VARIANCE), size=SHAPE)


def central_kernel(solution: KernelSolution) -> np.ndarray:
    return solution.kernels_at(np.array([SHAPE[1] / 2]), np.array([SHAPE[0] / 2]))[0]


# a Gaussian of the basis's own width is in the basis; what is left is what stars cannot tell: kernels that differ by
# fine structure which their PSF blurs below the float32 rounding of `convolve` (chi2 < 1e-7). One 6 % narrower is
# expanded to degree 4: ((1.06^2 - 1) / 2)^3 = 2e-4 for each of some ten functions
@pytest.mark.parametrize(("relative_width", "tolerance"), [(1.0, 3e-3), (0.94, 1e-2)])
def test_known_kernel_and_its_scale_are_recovered_without_noise(relative_width: float, tolerance: float) -> None:
    stars = bright_stars(1)
    template = render(SHAPE, stars, 3.5)
    kernel = 1.3 * gaussian_kernel(relative_width * kernel_sigmas_pix(4.7, 3.5)[1])
    solution = fit(convolve(template, kernel) + 7.0, template, stars)
    assert np.max(np.abs(central_kernel(solution) - kernel)) < tolerance * kernel.max()
    assert solution.kernel_sum == pytest.approx(1.3, rel=1e-5)
    plane = np.zeros(SHAPE, dtype=np.float32)
    solution.subtract_background(plane)
    assert plane == pytest.approx(np.full(SHAPE, -7.0), abs=0.1)
    assert solution.chi2 < 1e-7  # no noise was added


def test_reduced_chi_square_is_one_with_noise_and_the_sum_is_within_its_error() -> None:
    stars = bright_stars(2)
    template = render(SHAPE, stars, 3.5)
    solution = fit(noisy(convolve(template, gaussian_kernel(1.25)), 2), template, stars)
    # each stamp's chi-square has 729 degrees of freedom; 60 stamps that overlap a little, less 166 unknowns of 43,000,
    # and less than 1 for the term of 0.5 % of the flux
    assert solution.chi2 == pytest.approx(1.0, abs=5 * np.sqrt(2 / (729 * 30)) + 166 / (729 * 60) + 0.02)
    # 12 stamps were held out: median of 12; the solution's own noise adds
    assert solution.validation_chi2 == pytest.approx(1.0, abs=5 * 1.25 * np.sqrt(2 / 729 / 12) + 0.03)
    # flux of all stars in apertures that hold the kernel: noise of 60 x 300 pixels over the total flux
    total = stars.flux.sum()
    assert solution.kernel_sum == pytest.approx(1.0, abs=5 * np.sqrt(60 * 300 * SKY_VARIANCE) / total + 2e-3)


def test_shifted_science_image_shifts_the_kernel() -> None:
    stars = bright_stars(3)
    template = render(SHAPE, stars, 3.5)
    solution = fit(noisy(convolve(template, gaussian_kernel(1.3, x=0.6, y=-0.4)), 3), template, stars)
    kernel = central_kernel(solution)
    offset = np.arange(kernel.shape[0]) - kernel.shape[0] // 2
    window = gaussian_kernel(3.0, len(offset) // 2)
    # a windowed centroid comes out smaller by 1 / (1 + (1.3 / 3)^2); noise far below 0.05
    shrink = 1 + (1.3 / 3.0) ** 2
    centroid = [
        shrink * np.sum(window * kernel * o) / np.sum(window * kernel) for o in (offset[None, :], offset[:, None])
    ]
    assert centroid == pytest.approx([0.6, -0.4], abs=0.05)


def test_varying_kernel_needs_spatial_order() -> None:
    stars = bright_stars(4, n=70)
    template = render(SHAPE, stars, 3.5)
    science = noisy(render(SHAPE, stars, 4.75, gradient=0.08), 4)
    varying, constant = fit(science, template, stars), fit(science, template, stars, spatial_order=0)
    assert (varying.spatial_order, constant.spatial_order) == (2, 0)
    # held-out stamps must gain by it, and be near 1
    assert varying.validation_chi2 < 1.15
    assert constant.validation_chi2 > 1.5 * varying.validation_chi2
    left, right = varying.kernels_at(np.array([30.0, 330.0]), np.array([160.0, 160.0]))
    assert left.max() > 1.1 * right.max()  # sharper on the left
    assert left.sum() == pytest.approx(right.sum(), rel=1e-9)  # the sum does not depend on position


def test_basis_sums_are_one_and_zero() -> None:
    stars = bright_stars(5)
    template = render(SHAPE, stars, 3.5)
    basis = fit(noisy(convolve(template, gaussian_kernel(1.25)), 5), template, stars).basis
    assert basis.shape == (27, 23, 23)
    np.testing.assert_allclose(basis.sum(axis=(1, 2)), [1.0] + 26 * [0.0], atol=1e-12)


def test_scaling_the_template_scales_the_kernel_back() -> None:
    stars = bright_stars(6)
    template = render(SHAPE, stars, 3.5)
    science = noisy(convolve(template, gaussian_kernel(1.25)), 6)
    plain = fit(science, template, stars)
    flat, good = np.full(SHAPE, SKY_VARIANCE), np.zeros(SHAPE, dtype=bool)
    scaled = fit_matching_kernel(
        science, flat, good, 4.0 * template, 16.0 * flat / 100, good, stars.x, stars.y, 4.7, 3.5
    )
    # same problem in other units, but for rounding through a matrix with a ridge of 1e-9
    assert scaled.kernel_sum == pytest.approx(plain.kernel_sum / 4.0, rel=1e-6)
    assert central_kernel(scaled) == pytest.approx(central_kernel(plain) / 4.0, abs=1e-5 * central_kernel(plain).max())
    assert scaled.chi2 == pytest.approx(plain.chi2, rel=1e-6)


def test_variables_are_left_out_and_do_no_harm() -> None:
    stars = bright_stars(7)
    template = render(SHAPE, stars, 3.5)
    steady = noisy(convolve(template, gaussian_kernel(1.25)), 7)
    index = np.argsort(stars.flux)[-6:]  # the brightest tenth varies by 20 to 60 %
    change = Stars(stars.x[index], stars.y[index], stars.flux[index] * np.array([0.2, -0.3, 0.4, 0.6, -0.5, 0.3]))
    science = steady + convolve(render(SHAPE, change, 3.5), gaussian_kernel(1.25))
    solution = fit(science, template, stars)
    assert solution.n_stars_offered == 60
    # neighbours that share a stamp with one of the six go too
    assert 35 <= solution.n_stars_used <= 54
    assert solution.kernel_sum == pytest.approx(1.0, abs=0.01)
    assert solution.chi2 == pytest.approx(fit(steady, template, stars).chi2, abs=0.1)


def test_bad_pixels_in_stamps_have_no_weight() -> None:
    stars = bright_stars(8)
    template = render(SHAPE, stars, 3.5)
    science = noisy(convolve(template, gaussian_kernel(1.25)), 8)
    bad = np.random.default_rng(80).random(SHAPE) < 0.02
    spoilt = np.where(bad, np.nan, science)
    flat, good = np.full(SHAPE, SKY_VARIANCE), np.zeros(SHAPE, dtype=bool)
    positions = stars.x, stars.y, 4.7, 3.5
    with_nan = fit_matching_kernel(spoilt, flat, bad, template, flat / 100, good, *positions)
    clean = fit_matching_kernel(science, flat, good, template, flat / 100, good, *positions)
    # a random 2 % fewer pixels
    assert with_nan.kernel_sum == pytest.approx(clean.kernel_sum, rel=5e-3)
    assert with_nan.chi2 == pytest.approx(clean.chi2, abs=0.05)


@pytest.mark.parametrize(("n_stars", "order"), [(11, 0), (14, 1), (23, 1), (26, 2)])
def test_spatial_order_follows_the_number_of_stars(n_stars: int, order: int) -> None:
    # on a lattice, so that no star is left out for its flux ratio
    x, y = (a.ravel()[:n_stars] for a in np.meshgrid(np.linspace(40, 320, 6), np.linspace(40, 280, 5)))
    stars = Stars(x, y, np.full(n_stars, 5e4))
    template = render(SHAPE, stars, 3.5)
    solution = fit(noisy(convolve(template, gaussian_kernel(1.25)), 9), template, stars)
    assert solution.spatial_order == order
    assert solution.background_order == min(order, 1)


def test_same_input_gives_same_bytes() -> None:
    stars = bright_stars(10)
    template = render(SHAPE, stars, 3.5)
    science = noisy(convolve(template, gaussian_kernel(1.25)), 10)
    first, second = fit(science, template, stars), fit(science, template, stars)
    assert first.coefficients.tobytes() == second.coefficients.tobytes()


@pytest.mark.parametrize("n_stars", [0, 1, 9])
def test_too_few_stars_are_refused_with_their_number(n_stars: int) -> None:
    stars = bright_stars(11, n=n_stars)
    template = render(SHAPE, stars, 3.5)
    with pytest.raises(TooFewKernelStarsError, match=f"of {n_stars} kernel stars.*10 are needed"):
        fit(noisy(template, 11), template, stars)


def test_images_of_different_sky_are_refused() -> None:
    stars, others = bright_stars(12), bright_stars(13)
    with pytest.raises((TooFewKernelStarsError, BadKernelError)):
        fit(noisy(render(SHAPE, stars, 4.7), 12), noisy(render(SHAPE, others, 3.5), 13), stars)


def test_non_finite_template_is_refused() -> None:
    stars = bright_stars(14)
    template = render(SHAPE, stars, 3.5)
    science = noisy(convolve(template, gaussian_kernel(1.25)), 14)
    template[int(stars.y[3]) + 14, int(stars.x[3])] = np.nan  # outside the box for fluxes, within the stamp's reach
    with pytest.raises(BadKernelError, match="not finite"):
        fit(science, template, stars)


def test_widths_of_gaussians_match_in_quadrature() -> None:
    narrow, middle, wide = kernel_sigmas_pix(5.0, 3.0)
    assert middle == pytest.approx(np.sqrt(5.0**2 - 3.0**2) / 2.3548)
    assert (narrow, wide) == pytest.approx((middle / 2, 2 * middle))
    assert kernel_sigmas_pix(4.0, 6.0)[1] == pytest.approx(0.4 * 6.0 / 2.3548)  # sharper science image
    assert min(kernel_sigmas_pix(1.0, 1.0)) >= 0.7
    assert [kernel_half_width_pix(f, 2.0) for f in (1.0, 4.5, 20.0)] == [6, 10, 15]


def sources_on_a_lattice(n: int = 400, spacing: float = 18.0) -> DetectedSources:
    side = round(np.sqrt(n))
    x, y = (30.0 + spacing * a.ravel() for a in np.meshgrid(np.arange(side), np.arange(side)))
    flux = np.linspace(1e5, 1e4, n)
    ones = np.ones(n)
    return DetectedSources(x, y, flux, flux / 100, 2 * ones, 0 * ones, ones.astype(bool))


def test_kernel_stars_are_spread_over_cells() -> None:
    sources, shape = sources_on_a_lattice(), (420, 420)
    good = np.zeros(shape, dtype=bool)
    chosen = select_kernel_stars(sources, good, good, 10, 9.0)
    cells, counts = np.unique(sources.y[chosen] // 64 * 10 + sources.x[chosen] // 64, return_counts=True)
    assert counts.max() == 2
    assert len(cells) == 36  # 384 pixels hold whole stamps: all cells of 64 pixels among them
    assert np.all(np.diff(sources.flux[chosen]) < 0)


def test_kernel_stars_are_clean_isolated_unmasked_of_fit_brightness_and_inside() -> None:
    sources, shape = sources_on_a_lattice(), (420, 420)
    science_bad, template_bad = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    everything = set(select_kernel_stars(sources, science_bad, template_bad, 10, 9.0).tolist())
    first, second, third, fourth = sorted(everything)[:4]
    science_bad[round(sources.y[first]) + 4, round(sources.x[first])] = True
    template_bad[round(sources.y[second]), round(sources.x[second]) - 4] = True
    clean, snr = sources.clean.copy(), sources.snr.copy()
    clean[third], snr[fourth] = False, 3000.0
    spoilt = replace(sources, clean=clean, snr=snr)
    chosen = set(select_kernel_stars(spoilt, science_bad, template_bad, 10, 9.0).tolist())
    assert not chosen & {first, second, third, fourth}
    assert chosen
    # nearer than 20 pixels to a brighter source: on this lattice only the brightest has none
    lonely = select_kernel_stars(sources, np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool), 10, 20.0)
    assert lonely.tolist() == [0]
    assert (
        select_kernel_stars(sources, np.zeros((60, 60), dtype=bool), np.zeros((60, 60), dtype=bool), 10, 9.0).size <= 1
    )


def test_moffat_pair_leaves_little_of_the_stars() -> None:
    """Science PSF from the template PSF by the fitted kernel, against the true one."""
    stars = bright_stars(15)
    template = render(SHAPE, stars, 3.75)
    solution = fit(noisy(render(SHAPE, stars, 4.75), 15), template, stars, (4.75, 3.75))
    expected = moffat_stamp(24, 4.75)
    matched = convolve(moffat_stamp(24, 3.75), central_kernel(solution))
    # noise of the fit: 60 stars of median S/N 200 determine some 20 pixels of the core: 1 % of the peak
    assert np.max(np.abs(matched - expected)) < 0.01 * expected.max()

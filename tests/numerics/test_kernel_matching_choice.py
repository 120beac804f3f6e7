"""Choice of the kernel's basis and order on held-out stamps, template noise, diagnostics and guards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulated_pair import Stars, moffat_stamp, render
from threadpoolctl import threadpool_limits

from transforms.numerics.convolution import convolve
from transforms.numerics.kernel_matching import (
    KERNEL_MODELS,
    BadKernelError,
    KernelModel,
    KernelSolution,
    KernelSumError,
    TooFewKernelStarsError,
    fit_matching_kernel,
)

SHAPE = (420, 400)
NOISE = 5.0
BROAD, DELTA = KernelModel("broad_gauss_hermite", 2), KernelModel("delta", 2)


def gaussian_kernel(sigma_pix: float, half: int = 11) -> np.ndarray:
    offset = np.arange(-half, half + 1)
    kernel = np.exp(-0.5 * (offset[None, :] ** 2 + offset[:, None] ** 2) / sigma_pix**2)
    return kernel / kernel.sum()


def bright_stars(seed: int, n: int = 90) -> Stars:
    rng = np.random.default_rng([seed, 0])
    flux = np.sort(np.exp(rng.uniform(np.log(5e3), np.log(1e5), n)))[::-1]
    return Stars(rng.uniform(30, SHAPE[1] - 31, n), rng.uniform(30, SHAPE[0] - 31, n), flux)


def noise(seed: int, image: int, sigma: float = NOISE) -> np.ndarray:
    return np.random.default_rng([seed, image]).normal(scale=sigma, size=SHAPE)


def fit(
    science: np.ndarray,
    template: np.ndarray,
    stars: Stars,
    fwhm: tuple[float, float] = (4.7, 3.5),
    template_noise: float = 0.1 * NOISE,
    **options: Any,
) -> KernelSolution:
    good = np.zeros(SHAPE, dtype=bool)
    variances = np.full(SHAPE, NOISE**2), np.full(SHAPE, template_noise**2)
    planes = science, variances[0], good, template, variances[1], good
    return fit_matching_kernel(*planes, stars.x, stars.y, *fwhm, **options)


def kernel_at(solution: KernelSolution, x: float, y: float) -> np.ndarray:
    return solution.kernels_at(np.array([x]), np.array([y]))[0]


def centred(kernel: np.ndarray, half: int) -> np.ndarray:
    return np.pad(kernel, half - kernel.shape[0] // 2)


@pytest.mark.parametrize("model", [BROAD, DELTA])
def test_sums_of_basis_functions_are_one_and_zero(model: KernelModel) -> None:
    stars = bright_stars(1)
    template = render(SHAPE, stars, 3.5)
    solution = fit(convolve(template, gaussian_kernel(1.3)) + noise(1, 1), template, stars, models=[model])
    n, side = (49, 23) if model == BROAD else (221, 17)
    assert solution.basis.shape == (n, side, side)
    np.testing.assert_allclose(solution.basis.sum(axis=(1, 2)), [1.0] + (n - 1) * [0.0], atol=1e-12)
    assert solution.model == model


@pytest.mark.parametrize("model", [BROAD, DELTA])
def test_known_kernel_that_varies_is_recovered(model: KernelModel) -> None:
    stars = bright_stars(2, n=120)
    template = render(SHAPE, stars, 3.5)
    # a mixture of two kernels whose share is a plane in x: inside both models' polynomials
    share = np.linspace(0.0, 1.0, SHAPE[1])[np.newaxis, :]
    narrow, wide = gaussian_kernel(1.1), gaussian_kernel(1.7)
    # stars are point-like: the share at a star is constant to 13 / 400
    science = (1 - share) * convolve(template, narrow) + share * convolve(template, wide)
    solution = fit(science + noise(2, 1), template, stars, models=[model])
    psf = moffat_stamp(24, 3.5)
    for x in (60.0, 200.0, 340.0):
        part = x / (SHAPE[1] - 1)
        expected = convolve(psf, (1 - part) * narrow + part * wide)
        found = convolve(psf, kernel_at(solution, x, 210.0))
        # 120 stars of median S/N 300 for some 20 x 6 unknowns of the core: sqrt(120 / 120) / 300, and as much of model
        assert np.max(np.abs(found - expected)) < 0.015 * expected.max()
    # 97 unknowns a stamp at most of 729, for a share of the stars
    assert solution.validation_chi2 == pytest.approx(1.0, abs=0.08)
    assert not solution.is_poor


def test_identical_images_give_the_unit_kernel() -> None:
    stars = bright_stars(3)
    image = render(SHAPE, stars, 4.0) + noise(3, 1)
    solution = fit(image, image, stars, (4.0, 4.0), NOISE, models=KERNEL_MODELS)
    # blank sky tells that the noise is shared; without that the kernel would be made to sharpen it away
    assert solution.noise_share == 0.0
    assert solution.kernel_sum == pytest.approx(1.0, abs=1e-3)
    psf = moffat_stamp(24, 4.0)
    assert np.max(np.abs(convolve(psf, kernel_at(solution, 200.0, 210.0)) - psf)) < 3e-3 * psf.max()
    assert solution.sum_variation < 5e-3


@pytest.mark.parametrize("model", [BROAD, DELTA])
def test_template_moved_by_whole_pixels_moves_the_kernel(model: KernelModel) -> None:
    stars = bright_stars(4)
    template = render(SHAPE, stars, 3.5)
    science = convolve(template, gaussian_kernel(1.4)) + noise(4, 1)
    plain = kernel_at(fit(science, template, stars, models=[model]), 200.0, 210.0)
    moved = kernel_at(fit(science, np.roll(template, 1, axis=1), stars, models=[model]), 200.0, 210.0)
    psf = moffat_stamp(24, 3.5)
    expected, found = convolve(psf, plain), np.roll(convolve(psf, moved), 1, axis=1)
    # the Gaussians of degree 6 hold a shift of a pixel to a per cent, free pixels exactly but at the disc's rim
    assert np.max(np.abs(found - expected)) < 0.015 * expected.max()


def test_scaled_science_image_scales_the_kernel() -> None:
    stars = bright_stars(5)
    template = render(SHAPE, stars, 3.5)
    science = convolve(template, gaussian_kernel(1.3)) + noise(5, 1)
    plain = fit(science, template, stars, models=[DELTA])
    good = np.zeros(SHAPE, dtype=bool)
    variances = np.full(SHAPE, 9 * NOISE**2), np.full(SHAPE, 0.01 * NOISE**2)
    scaled = fit_matching_kernel(
        3 * science, variances[0], good, template, variances[1], good, stars.x, stars.y, 4.7, 3.5, models=[DELTA]
    )
    # the same equations but for single precision, a few 1e-7 of a matrix that smoothness keeps at a condition of 1e7
    assert scaled.kernel_sum == pytest.approx(3 * plain.kernel_sum, rel=1e-3)
    psf = moffat_stamp(24, 3.5)
    one, three = (convolve(psf, kernel_at(solution, 200.0, 210.0)) for solution in (plain, scaled))
    assert np.max(np.abs(three / 3 - one)) < 3e-3 * one.max()
    assert scaled.flux_ratio == pytest.approx(3 * plain.flux_ratio, rel=1e-5)


def test_template_noise_no_longer_blurs_the_kernel_of_a_sharper_science_image() -> None:
    stars = bright_stars(6, n=120)
    template = render(SHAPE, stars, 4.4) + noise(6, 2, 0.5 * NOISE)
    science = render(SHAPE, stars, 3.5) + noise(6, 1)
    corrected = fit(science, template, stars, (3.5, 4.4), 0.5 * NOISE, models=[BROAD])
    # a stated variance far below the noise leaves no pixel blank, so that nothing is known of the noise
    plain = fit(science, template, stars, (3.5, 4.4), 1e-3 * NOISE, models=[BROAD])
    assert (corrected.noise_share > 0, plain.noise_share) == (True, 0.0)
    psf, expected = moffat_stamp(24, 4.4), moffat_stamp(24, 3.5)
    lacking = [
        1 - convolve(psf, kernel_at(solution, 200.0, 210.0)).max() / expected.max() for solution in (plain, corrected)
    ]
    assert lacking[0] > 0.02
    assert abs(lacking[1]) < 0.5 * lacking[0]


def test_noise_share_is_not_used_where_nothing_is_gained() -> None:
    stars = bright_stars(7)
    template = render(SHAPE, stars, 3.5) + noise(7, 2, 0.3 * NOISE)
    science = render(SHAPE, stars, 4.7) + noise(7, 1)
    assert fit(science, template, stars, template_noise=0.3 * NOISE, models=[BROAD]).noise_share == 0.0


# the choice ----------------------------------------------------------------------------------------------------------


def test_double_image_is_given_to_the_delta_basis() -> None:
    stars = bright_stars(8)
    template = render(SHAPE, stars, 3.5)
    science = 0.5 * np.roll(template, (-4, 1), (0, 1)) + 0.5 * np.roll(template, (4, -1), (0, 1)) + noise(8, 1)
    solution = fit(science, template, stars, models=KERNEL_MODELS)
    assert solution.model.basis == "delta"
    assert [score.model.basis for score in solution.scores].count("broad_gauss_hermite") >= 1
    assert all(score.excess > score.excess_error for score in solution.scores[1:])


def test_smooth_kernel_stays_with_the_gaussians_and_the_delta_basis_is_not_tried() -> None:
    stars = bright_stars(9)
    template = render(SHAPE, stars, 3.5)
    science = convolve(template, gaussian_kernel(1.4)) + noise(9, 1)
    solution = fit(science, template, stars, models=KERNEL_MODELS)
    assert solution.model.basis == "broad_gauss_hermite"
    assert all(score.model.basis == "broad_gauss_hermite" for score in solution.scores)


def test_cubic_variation_is_given_order_three() -> None:
    stars = bright_stars(10, n=160)
    template = render(SHAPE, stars, 3.5)
    u = np.linspace(-1.0, 1.0, SHAPE[1])[np.newaxis, :]
    share = 0.5 + 0.5 * (4 * u**3 - 3 * u)  # no polynomial of a lower order is near it
    science = (1 - share) * convolve(template, gaussian_kernel(1.1)) + share * convolve(template, gaussian_kernel(2.0))
    solution = fit(science + noise(10, 1), template, stars, models=KERNEL_MODELS)
    assert solution.spatial_order == 3
    orders = [score.model.spatial_order for score in solution.scores if score.model.basis != "delta"]
    assert orders == [3, 2, 1, 0]
    assert all(score.excess > 0 for score in solution.scores[1:])


def rippled_pair(seed: int, amplitude_pix: float) -> tuple[np.ndarray, np.ndarray, Stars]:
    """A pair whose science image is shifted along x by a wave of 250 pixels: too short for polynomials of order 3."""
    stars = bright_stars(seed, n=160)
    shift = amplitude_pix * np.sin(2 * np.pi * stars.x / 250.0) * np.cos(2 * np.pi * stars.y / 250.0)
    moved = Stars(stars.x + shift, stars.y, stars.flux)
    return render(SHAPE, moved, 4.5) + noise(seed, 1), render(SHAPE, stars, 3.7), stars


def first_moment(kernels: np.ndarray) -> np.ndarray:
    offset = np.arange(kernels.shape[2]) - kernels.shape[2] // 2
    return np.asarray(np.einsum("nji,i->n", kernels, offset) / kernels.sum(axis=(1, 2)))


def test_kernel_follows_shifts_that_vary_from_star_to_star() -> None:
    science, template, stars = rippled_pair(23, 0.05)
    solution = fit(science, template, stars, (4.5, 3.7), models=[BROAD])
    smooth = replace(solution, ripples=replace(solution.ripples, weights=np.zeros_like(solution.ripples.weights)))
    y, x = (axis.ravel() for axis in np.meshgrid(np.arange(60.0, 361.0, 20.0), np.arange(60.0, 341.0, 20.0)))
    expected = 0.05 * np.sin(2 * np.pi * x / 250.0) * np.cos(2 * np.pi * y / 250.0)
    left = [float(np.std(first_moment(one.kernels_at(x, y)) - expected)) for one in (smooth, solution)]
    # half of the wave's 0.025 rms: polynomials of order 2 take a part of it, the ripples most of the rest
    assert left[1] < 0.6 * left[0]
    assert left[1] < 0.0125
    plain, rippled = (one.kernels_at(x, y).sum(axis=(1, 2)) for one in (smooth, solution))
    assert np.allclose(plain, rippled, rtol=1e-12)


def test_no_ripples_are_found_in_noise() -> None:
    science, template, stars = rippled_pair(24, 0.0)
    solution = fit(science, template, stars, (4.5, 3.7), models=[BROAD])
    everywhere = np.linspace(40.0, 380.0, 30)
    # a star of S/N 100 tells its place to 0.02 pixels; what is taken for a ripple by chance must be below that
    assert np.abs(solution.ripples.amplitudes(everywhere, everywhere)[:, :2]).max() < 0.01


@pytest.mark.parametrize("seed", [25, 27])
def test_source_beside_a_star_is_not_taken_for_a_ripple(seed: int) -> None:
    science, template, stars = rippled_pair(seed, 0.03)
    without = fit(science, template, stars, (4.5, 3.7), models=[BROAD])
    one = int(np.argmin(np.hypot(stars.x - 200.0, stars.y - 210.0) / np.sqrt(stars.flux)))
    place = stars.x[one : one + 1], stars.y[one : one + 1]
    beside = Stars(place[0] + 3.5, place[1], 0.1 * stars.flux[one : one + 1])
    with_source = fit(science + render(SHAPE, beside, 4.5), template, stars, (4.5, 3.7), models=[BROAD])
    change = with_source.ripples.amplitudes(*place) - without.ripples.amplitudes(*place)
    # all of the source would be a shift of about 0.1 * 3.5 exp(-3.5^2 / 4 / 1.9^2) = 0.15 pixels, a fifth of which the
    # process would believe; without the star its neighbours are to say much the same
    assert abs(change[0, 0]) < 0.01


def test_few_stars_get_a_simple_kernel_and_an_honest_chi_square() -> None:
    stars = bright_stars(11, n=11)
    template = render(SHAPE, stars, 3.5)
    science = render(SHAPE, stars, 4.7) + noise(11, 1)
    solution = fit(science, template, stars, models=KERNEL_MODELS)
    assert solution.spatial_order == 0
    assert [score.model for score in solution.scores] == [KernelModel("broad_gauss_hermite", 0)]
    # in sample 50 unknowns take their part of 11 x 729 pixels; out of sample they add it
    assert solution.validation_chi2 > solution.chi2
    assert solution.validation_chi2 == pytest.approx(1.0, abs=5 * np.sqrt(2 / 729 / 11) + 0.05)


def test_stars_in_one_corner_do_not_carry_a_polynomial_over_the_image() -> None:
    rng = np.random.default_rng(12)
    stars = Stars(rng.uniform(30, 90, 40), rng.uniform(30, 90, 40), np.full(40, 3e4))
    template = render(SHAPE, stars, 3.5)
    solution = fit(convolve(template, gaussian_kernel(1.3)) + noise(12, 1), template, stars)
    assert solution.spatial_order <= 1


def test_unmatched_images_are_flagged_as_poor() -> None:
    stars = bright_stars(13)
    template = render(SHAPE, stars, 3.5)
    science = 0.5 * np.roll(template, (-4, 1), (0, 1)) + 0.5 * np.roll(template, (4, -1), (0, 1)) + noise(13, 1)
    solution = fit(science, template, stars, models=[BROAD])
    assert solution.validation_chi2 > 1.3
    assert solution.is_poor


# guards --------------------------------------------------------------------------------------------------------------


def test_flux_ratio_that_varies_over_the_image_is_measured_and_refused_when_large() -> None:
    stars = bright_stars(14)
    template = render(SHAPE, stars, 3.5)
    u = np.linspace(-1.0, 1.0, SHAPE[1])[np.newaxis, :]
    blurred = convolve(template, gaussian_kernel(1.3))
    slight = fit((1 + 0.05 * u) * blurred + noise(14, 1), template, stars, models=[BROAD])
    # 0.05 to either side, 0.04 between the outermost stars of each; light of neighbours in the boxes adds
    assert slight.sum_variation == pytest.approx(0.1, abs=max(5 * slight.sum_variation_error, 0.01))
    assert slight.sum_variation > 5 * slight.sum_variation_error
    with pytest.raises(KernelSumError, match=r"varies by 0\.\d+ \+- .* over the image, 0\.3 is allowed"):
        fit((1 + 0.4 * u) * blurred + noise(14, 1), template, stars, models=[BROAD])


def test_kernel_sum_that_leaps_from_the_flux_ratio_is_refused() -> None:
    stars = bright_stars(15)
    template = render(SHAPE, stars, 3.5)
    # a double image: its halves lie beyond the box of the flux ratio, and inside the kernel
    science = 0.5 * np.roll(template, (-7, 1), (0, 1)) + 0.5 * np.roll(template, (6, -2), (0, 1)) + noise(15, 1)
    with pytest.raises(KernelSumError, match=r"kernel sum .* is not within 0\.5 to 2 times the stars' flux ratio"):
        fit(science, template, stars, models=[DELTA])


def test_too_few_stars_are_refused_whatever_the_models() -> None:
    stars = bright_stars(16, n=3)
    template = render(SHAPE, stars, 3.5)
    with pytest.raises(TooFewKernelStarsError, match="3 of 3 kernel stars offered, 10 are needed"):
        fit(template + noise(16, 1), template, stars, models=KERNEL_MODELS)


def test_stars_of_one_good_pixel_are_refused() -> None:
    stars = bright_stars(17)
    template = render(SHAPE, stars, 3.5)
    good, flat = np.zeros(SHAPE, dtype=bool), np.full(SHAPE, NOISE**2)
    bad = np.ones(SHAPE, dtype=bool)
    bad[np.rint(stars.y).astype(int), np.rint(stars.x).astype(int)] = False
    with pytest.raises(BadKernelError):
        fit_matching_kernel(template + noise(17, 1), flat, bad, template, flat, good, stars.x, stars.y, 4.7, 3.5)


def test_stars_at_the_edge_are_left_out() -> None:
    stars = bright_stars(19)
    edge = Stars(
        np.append(stars.x, [3.0, 200.0]), np.append(stars.y, [200.0, 417.0]), np.append(stars.flux, [5e4, 5e4])
    )
    template = render(SHAPE, edge, 3.5)
    science = convolve(template, gaussian_kernel(1.3)) + noise(19, 1)
    every, inner = fit(science, template, edge), fit(science, template, stars)
    assert (every.n_stars_offered, inner.n_stars_offered) == (92, 90)
    assert every.coefficients.tobytes() == inner.coefficients.tobytes()


def test_number_of_threads_does_not_change_a_byte() -> None:
    stars = bright_stars(18)
    template = render(SHAPE, stars, 4.0) + noise(18, 2)
    science = render(SHAPE, stars, 4.0) + noise(18, 1)
    found = []
    for n_threads in (1, 2):
        with threadpool_limits(n_threads):
            solution = fit(science, template, stars, (4.0, 4.0), NOISE, models=[BROAD, DELTA])
            kernels = solution.kernels_at(np.array([50.0, 300.0]), np.array([60.0, 350.0]))
            found.append((solution.coefficients.tobytes(), kernels.tobytes(), solution.validation_chi2))
    assert found[0] == found[1]

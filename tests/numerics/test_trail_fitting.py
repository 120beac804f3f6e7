"""Trail fits: exact without noise, errors at the Cramer-Rao bound, flags, and any pixel content."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from shape_scenes import NOISE, SIGMA_PER_FWHM, cells, extreme_planes, flux_of_snr, psf_image, trail

from transforms.numerics.model_fitting import spline_stack
from transforms.numerics.trail_fitting import Trails, _draw_gaussian, draw_summed, fit_trails


def moments(fwhm: float, dx: NDArray, dy: NDArray) -> NDArray[np.float64]:
    """Second moments of a uniform line under a Gaussian PSF."""
    sigma2 = (fwhm * SIGMA_PER_FWHM) ** 2
    return np.stack([sigma2 + dx * dx / 12.0, sigma2 + dy * dy / 12.0, dx * dy / 12.0])


def fit(
    image: NDArray,
    fwhm: float,
    x: ArrayLike,
    y: ArrayLike,
    dx: ArrayLike,
    dy: ArrayLike,
    noise: float,
    moffat: bool = False,
) -> Trails:
    stack = spline_stack(psf_image(fwhm, moffat)[np.newaxis])
    at_x, at_y, along_x, along_y = (np.atleast_1d(np.asarray(column, dtype=float)) for column in (x, y, dx, dy))
    nothing, first = np.zeros(image.shape, bool), np.zeros(at_x.size, int)
    ixx, iyy, ixy = moments(fwhm, along_x, along_y)
    variance = np.full(image.shape, noise**2)
    return fit_trails(image, variance, nothing, stack, first, at_x, at_y, ixx, iyy, ixy)


def information(parameters: NDArray, fwhm: float, shape: tuple[int, int], moffat: bool) -> NDArray[np.float64]:
    """Inverse Fisher matrix of (flux, x, y, dx, dy) by finite differences of the analytic scene: the bound itself."""
    flux, *line = parameters
    slopes = [trail(shape, fwhm, *line, moffat=moffat)]
    for k in range(4):
        up, down = list(line), list(line)
        up[k], down[k] = up[k] + 1e-3, down[k] - 1e-3
        slopes.append(flux * (trail(shape, fwhm, *up, moffat=moffat) - trail(shape, fwhm, *down, moffat=moffat)) / 2e-3)
    jacobian = np.stack([slope.ravel() for slope in slopes])
    inverse: NDArray[np.float64] = np.linalg.inv(jacobian @ jacobian.T / NOISE**2)
    return inverse


@pytest.mark.parametrize("moffat", [False, True])
@pytest.mark.parametrize(("dx", "dy"), [(5.0, 0.0), (0.0, 12.0), (20.0, -25.0), (60.0, 3.0)])
def test_a_trail_without_noise_is_found_exactly(dx: float, dy: float, moffat: bool) -> None:
    shape = (81, 101)
    image = 1e5 * trail(shape, 4.0, 50.3, 40.2, dx, dy, moffat)
    found = fit(image, 4.0, 51.0, 39.5, 1.05 * dx + 0.5, 0.95 * dy, noise=1.0, moffat=moffat)
    assert found.good[0]
    sign = 1.0 if dx > 0.0 or found.dy[0] > 0.0 else -1.0
    # The PSF is summed to 2e-4 and its wings end at 9 pixels, where the Moffat's line integral misses 0.3 %; the image
    # of a Moffat PSF sums to 1 over 41 pixels, which lacks 0.04 % of the profile.
    assert (found.x[0], found.y[0]) == pytest.approx((50.3, 40.2), abs=2e-3)
    assert (found.dx[0], sign * found.dy[0]) == pytest.approx((dx, dy), abs=0.02)
    assert found.flux[0] == pytest.approx(1e5, rel=3e-3 if moffat else 5e-4)
    assert not found.edge[0] or max(dx, dy) >= 60.0


@pytest.mark.parametrize("draw", ["gaussian", "summed"])
def test_derivatives_of_the_model_are_those_of_its_differences(draw: str) -> None:
    fwhm, shape = 4.0, (31, 41)
    stack = spline_stack(psf_image(fwhm)[np.newaxis])
    everywhere = np.ones(shape)

    def planes_at(parameters: NDArray) -> NDArray[np.float64]:
        planes = np.zeros((6, *shape))
        if draw == "gaussian":
            _draw_gaussian(fwhm * SIGMA_PER_FWHM, parameters, everywhere, planes)
        else:
            draw_summed(stack.coefficients[0], stack.half_width, stack.sigma_pix[0], parameters, planes)
        return planes

    at = np.array([100.0, 20.2, 15.1, 9.0, 4.0])
    planes = planes_at(at)
    for k in range(5):
        up, down = at.copy(), at.copy()
        up[k], down[k] = up[k] + 1e-4, down[k] - 1e-4
        slope = (planes_at(up)[0] - planes_at(down)[0]) / 2e-4
        # Second-order differences: 1e-8 of a third derivative of order 1.
        np.testing.assert_allclose(planes[1 + k], slope, atol=1e-6)
    reference = 100.0 * trail(shape, fwhm, *at[1:])
    # 2e-4 of the peak from the sum; the spline image lacks what lies beyond 9 pixels, exp(-14).
    np.testing.assert_allclose(planes[0], reference, atol=3e-4 * reference.max())


@pytest.mark.parametrize(
    ("fwhm", "length", "snr", "moffat"),
    [(4.0, 8.0, 20.0, True), (2.2, 5.0, 20.0, False), (4.0, 25.0, 20.0, False), (4.0, 60.0, 60.0, False)],
)
def test_errors_meet_the_cramer_rao_bound_and_pulls_have_unit_width(
    fwhm: float, length: float, snr: float, moffat: bool
) -> None:
    rng = np.random.default_rng(11)
    n_side, side = (12, int(length) + 36) if length < 30.0 else (5, int(length) + 36)
    n = n_side**2
    image = rng.normal(0.0, NOISE, (n_side * side, n_side * side))
    truth, bound = np.empty((5, n)), np.empty((2, n))
    for number, cell in enumerate(cells(n_side, side)):
        angle = rng.uniform(-0.49, 0.49) * np.pi
        line = [*(side / 2 + rng.uniform(-0.5, 0.5, 2)), length * np.cos(angle), length * np.sin(angle)]
        drawn = trail((side, side), fwhm, *line, moffat=moffat)
        flux = flux_of_snr(snr, drawn, NOISE)
        image[cell] += flux * drawn
        along = np.array([np.cos(angle), np.sin(angle)])
        # All directions have nearly one bound; every fourth is enough for its mean.
        if number % 4 == 0:
            covariance = information(np.array([flux, *line]), fwhm, (side, side), moffat)[3:, 3:]
            across = np.array([-along[1], along[0]])
            bound[:, number] = along @ covariance @ along, across @ covariance @ across / length**2
        truth[:, number] = flux, line[0] + cell[1].start, line[1] + cell[0].start, *line[2:]
    flux, x, y, dx, dy = truth
    start = rng.normal(0.0, 0.3, (2, n))
    found = fit(image, fwhm, x + start[0], y + start[1], 0.95 * dx, 0.95 * dy, NOISE, moffat)
    assert found.good.mean() > 0.95
    good = found.good
    error_length = (np.hypot(found.dx, found.dy) - length)[good]
    turned = (np.arctan2(found.dy, found.dx) - np.arctan2(dy, dx))[good]
    error_angle = (turned + 0.5 * np.pi) % np.pi - 0.5 * np.pi
    sampling = 3.0 / np.sqrt(2.0 * n)
    assert np.sqrt((error_length**2).mean() / bound[0, ::4].mean()) < 1.1 + sampling
    assert np.sqrt((error_angle**2).mean() / bound[1, ::4].mean()) < 1.1 + sampling
    for value, true, claimed in (
        (found.flux, flux, found.flux_err),
        (found.x, x, found.x_err),
        (found.y, y, found.y_err),
        (np.hypot(found.dx, found.dy), length, _length_err(found)),
    ):
        pull = ((value - true) / claimed)[good]
        assert abs(pull.std() - 1.0) < 0.1 + sampling
        # A noisy length takes the best of the noise: a bias of order 1 / snr of its error for each parameter.
        assert abs(pull.mean()) < 3.0 / np.sqrt(n) + 5.0 / snr
    assert abs((found.flux / flux)[good].mean() - 1.0) < 0.01 + 3.0 / (snr * np.sqrt(n))


def _length_err(found: Trails) -> NDArray[np.float64]:
    length = np.hypot(found.dx, found.dy)
    cosine, sine = found.dx / length, found.dy / length
    return np.sqrt((cosine * found.dx_err) ** 2 + (sine * found.dy_err) ** 2 + 2.0 * cosine * sine * found.dx_dy_cov)


def test_a_trail_of_the_template_has_negative_flux() -> None:
    image = trail((61, 61), 4.0, 30.0, 31.0, 12.0, 5.0)
    found, negative = (fit(sign * 1e4 * image, 4.0, 30.0, 31.0, 11.0, 5.0, noise=1.0) for sign in (1.0, -1.0))
    assert negative.flux[0] == pytest.approx(-found.flux[0], rel=1e-12)
    assert negative.dx[0] == pytest.approx(found.dx[0], rel=1e-12)


@pytest.mark.parametrize(("y", "edge", "off_image"), [(30.0, False, False), (2.0, True, False), (-0.2, True, True)])
def test_flags_tell_where_a_trail_ends(y: float, edge: bool, off_image: bool) -> None:
    image = 1e4 * trail((61, 61), 4.0, 30.0, y, 16.0, 1.0)
    found = fit(image, 4.0, 30.0, y, 15.0, 1.0, noise=1.0)
    assert found.good[0] and found.suspect_long[0]
    assert (found.edge[0], found.off_image[0]) == (edge, off_image)


def test_a_satellite_and_moments_that_are_not_finite_are_left_alone() -> None:
    image = 1e4 * trail((60, 400), 4.0, 200.0, 30.0, 300.0, 0.0)
    for length in (300.0, np.nan):
        found = fit(image, 4.0, 200.0, 30.0, length, 0.0, noise=1.0)
        assert not found.good[0] and found.n_pixels[0] == 0 and not found.edge[0]


@pytest.mark.parametrize("seed", range(12))
def test_any_pixels_give_finite_numbers_or_nan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (31, 37)
    image, variance, bad = extreme_planes(rng, shape)
    n = 24
    y, x = rng.uniform(-3.0, shape[0] + 3.0, n), rng.uniform(-3.0, shape[1] + 3.0, n)
    start = rng.choice([0.0, 2.0, 30.0, 1e3, 1e300, -5.0, np.nan, np.inf], (3, n))
    stack = spline_stack(np.stack([psf_image(rng.uniform(1.5, 9.0), size=25) for _ in range(3)]))
    with np.errstate(all="ignore"):
        found = fit_trails(image, variance, bad, stack, rng.integers(0, 3, n), x, y, *start)
    for name in ("x", "x_err", "dx", "dx_err", "dx_dy_cov", "flux", "flux_err", "chi2"):
        column = getattr(found, name)
        assert np.isfinite(column[found.good]).all()
        assert np.isnan(column[~found.good]).all()

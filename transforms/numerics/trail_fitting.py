"""Trails: a line of light convolved with the PSF, fitted to elongated sources of the difference."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from transforms.numerics.forced_photometry import checked_planes, evaluate_psf, pixel_weight
from transforms.numerics.model_fitting import (
    FIT_REACH_SIGMA,
    SETTLED,
    SplineStack,
    factorise,
    invert_factored,
    solve_factored,
)

TRAIL_LENGTH_MAX_PIX = 120.0  # twice 10 deg / day in 30 s at 0.2 arcsec: beyond are satellites
SUSPECT_LENGTH_SIGMA = 3.0  # LSST's bound of a long trail, in PSF radii
_FWHM_PER_SIGMA = 2.3548200450309493
_EVALUATIONS_MAX = 40
_ROUGHNESS = 1e-5  # of the squared S/N: chi-square jumps by a third of it where stamps with cut wings move by a pixel
_N_PARAMETERS = 5  # flux, x, y of the middle, and the vector from end to end
_N_PLANES = 1 + _N_PARAMETERS  # the model and its derivatives
_LENGTH_START_MIN_SIGMA = 1.0
_LENGTH_SLACK = 0.15  # how far the moments may misjudge a length
_GROWTH_SIGMA = 3.0  # of the length in one window: 2 sigma of the PSF remain beyond each end
_WINDOWS_MAX = 12
_LENGTH_LEAST_SIGMA = 0.5  # shorter lines broaden the PSF by 2 %
_ELONGATION_MIN = 3.0  # standard errors of length^2: 1 to 6 of 1,000 point sources get there
_PANEL_SIGMA = 2.5  # light is summed along the line in panels of at most this, 4 Gauss-Legendre points each: 2e-4
_GAUSS_NODES = (-0.8611363115940526, -0.3399810435848563, 0.3399810435848563, 0.8611363115940526)
_GAUSS_WEIGHTS = (0.3478548451374538, 0.6521451548625461, 0.6521451548625461, 0.3478548451374538)


class Trails(NamedTuple):
    """Fitted trails of n sources; every array has shape (n,), NaN where `good` is false.

    Attributes
    ----------
    good : the fit settled on a trail of at most 120 pixels whose squared length exceeds 3 of its errors
    x, y : pixels, the trail's middle
    x_err, y_err, x_y_cov : standard errors and covariance of the middle, pixels and pixels^2
    dx, dy : pixels, vector from one end to the other, dx >= 0; its length is the trail's
    dx_err, dy_err, dx_dy_cov : standard errors and covariance of the vector
    flux, flux_err : image units, negative for a trail of the template
    chi2, n_pixels : of the model; n_pixels is int32, 0 where nothing was fitted
    off_image : an end lies beyond the border
    edge : an end lies beyond the border or within the PSF's FWHM of it
    suspect_long : longer than 3 sigma of the PSF
    """

    good: NDArray[np.bool_]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    x_err: NDArray[np.float64]
    y_err: NDArray[np.float64]
    x_y_cov: NDArray[np.float64]
    dx: NDArray[np.float64]
    dy: NDArray[np.float64]
    dx_err: NDArray[np.float64]
    dy_err: NDArray[np.float64]
    dx_dy_cov: NDArray[np.float64]
    flux: NDArray[np.float64]
    flux_err: NDArray[np.float64]
    chi2: NDArray[np.float64]
    n_pixels: NDArray[np.int32]
    off_image: NDArray[np.bool_]
    edge: NDArray[np.bool_]
    suspect_long: NDArray[np.bool_]


def fit_trails(
    image: ArrayLike,
    variance: ArrayLike,
    bad: NDArray[np.bool_],
    psfs: SplineStack,
    psf_of_source: NDArray[np.integer],
    x: ArrayLike,
    y: ArrayLike,
    ixx: ArrayLike,
    iyy: ArrayLike,
    ixy: ArrayLike,
) -> Trails:
    """Fit a uniform trail to each source.

    The model is flux times the mean of P(c + t d), t from -1/2 to 1/2, with d the vector from end to end. It is fitted
    first with a Gaussian P, whose integral is closed (Veres et al. 2012), then with the PSF image itself,
    summed along the line. Levenberg-Marquardt with analytic derivatives and inverse-variance weights.

    Parameters
    ----------
    image, variance, bad : (ny, nx) planes as in `linear_psf_fit`
    psfs : PSFs of the image
    psf_of_source : (n,) index of each source's PSF
    x, y : (n,) pixels, where to start
    ixx, iyy, ixy : (n,) second moments in pixels^2 to start from; the source is skipped where they are not finite

    Returns
    -------
    Trails

    Raises
    ------
    ValueError
        Planes differ in shape.

    Notes
    -----
    O(length). The window follows a line that grows. Trails shorter than the PSF's FWHM have no linear error in their
    length; L / (2 L_err) is the S/N of L^2, by which they are told from points.
    """
    pixels, pixel_variance, masked = checked_planes(image, variance, bad)
    psf_index = np.ascontiguousarray(psf_of_source, dtype=np.int64)
    start = np.stack([np.asarray(column, dtype=np.float64) for column in (x, y, ixx, iyy, ixy)])
    real = np.full((13, start.shape[1]), np.nan)
    n_pixels = np.zeros(start.shape[1], dtype=np.int32)
    _fit_all(
        pixels,
        pixel_variance,
        masked,
        psfs.coefficients,
        psfs.sigma_pix,
        psfs.half_width,
        psf_index,
        start,
        real,
        n_pixels,
    )
    good = np.isfinite(real).all(axis=0)
    real[:, ~good] = np.nan
    n_pixels[~good] = 0
    sigma = psfs.sigma_pix[psf_index]
    inside = _margin(real[0], real[1], real[5], real[6], pixels.shape)
    with np.errstate(invalid="ignore"):
        return Trails(
            good=good,
            x=real[0],
            y=real[1],
            x_err=real[2],
            y_err=real[3],
            x_y_cov=real[4],
            dx=real[5],
            dy=real[6],
            dx_err=real[7],
            dy_err=real[8],
            dx_dy_cov=real[9],
            flux=real[10],
            flux_err=real[11],
            chi2=real[12],
            n_pixels=n_pixels,
            off_image=inside < 0.0,
            edge=inside < _FWHM_PER_SIGMA * sigma,
            suspect_long=np.hypot(real[5], real[6]) > SUSPECT_LENGTH_SIGMA * sigma,
        )


def _margin(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    dx: NDArray[np.float64],
    dy: NDArray[np.float64],
    shape: tuple[int, ...],
) -> NDArray[np.float64]:
    """Distance in pixels of the ends of each trail from the nearest border, negative beyond it."""
    reach_x, reach_y = 0.5 * np.abs(dx), 0.5 * np.abs(dy)
    ny, nx = shape
    return np.minimum.reduce([x - reach_x + 0.5, y - reach_y + 0.5, nx - 0.5 - x - reach_x, ny - 0.5 - y - reach_y])


@njit(cache=True)
def _fit_all(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    coefficients: NDArray[np.float64],
    sigma_pix: NDArray[np.float64],
    half_width: int,
    psf_of_source: NDArray[np.int64],
    start: NDArray[np.float64],
    real: NDArray[np.float64],
    n_pixels: NDArray[np.int32],
) -> None:
    """Fill `real` (x, y, x_err, y_err, x_y_cov, the same of the vector, flux, flux_err, chi2) and `n_pixels`."""
    covariance = np.empty((_N_PARAMETERS, _N_PARAMETERS))
    parameters = np.empty(_N_PARAMETERS)
    for source in range(start.shape[1]):
        psf = psf_of_source[source]
        sigma = sigma_pix[psf]
        if not _start_line(start[:, source], sigma, image.shape, parameters):
            continue
        reach = FIT_REACH_SIGMA * sigma + 1.0
        settled = True
        chi2, count = 0.0, 0
        true_psf = False
        for _ in range(_WINDOWS_MAX):
            before = math.hypot(parameters[3], parameters[4])
            slack = 0.0 if true_psf else _LENGTH_SLACK * before
            x0, y0, values, weights = cut_out(image, variance, bad, parameters, reach + slack)
            parameters[1] -= x0
            parameters[2] -= y0
            settled, chi2 = _fit_one(
                values, weights, coefficients[psf], half_width, sigma, true_psf, parameters, covariance
            )
            parameters[1] += x0
            parameters[2] += y0
            count = (weights > 0.0).sum()
            after = math.hypot(parameters[3], parameters[4])
            if true_psf or not after > _LENGTH_LEAST_SIGMA * sigma:
                break
            # A line that outgrew its window may be longer still.
            true_psf = after < before + _GROWTH_SIGMA * sigma
            if not true_psf:
                parameters[0] = 0.0
        if not (settled and true_psf and _is_longer_than_a_point(parameters, covariance)):
            continue
        if parameters[3] < 0.0:
            parameters[3:] *= -1.0  # with dx and dy, all their covariances with each other keep their sign
        for k in range(2):
            first = 1 + 2 * k
            real[5 * k, source], real[5 * k + 1, source] = parameters[first], parameters[first + 1]
            real[5 * k + 2, source] = math.sqrt(max(covariance[first, first], 0.0))
            real[5 * k + 3, source] = math.sqrt(max(covariance[first + 1, first + 1], 0.0))
            real[5 * k + 4, source] = covariance[first, first + 1]
        real[10, source] = parameters[0]
        real[11, source] = math.sqrt(max(covariance[0, 0], 0.0))
        real[12, source] = chi2
        n_pixels[source] = count


@njit(cache=True)
def _is_longer_than_a_point(parameters: NDArray[np.float64], covariance: NDArray[np.float64]) -> bool:
    """Whether the squared length, in which short trails are linear, exceeds its error; L / (2 L_err) is its S/N."""
    dx, dy = parameters[3], parameters[4]
    length2 = dx * dx + dy * dy
    along = dx * dx * covariance[3, 3] + 2.0 * dx * dy * covariance[3, 4] + dy * dy * covariance[4, 4]
    return bool(length2 > 2.0 * _ELONGATION_MIN * math.sqrt(max(along, 0.0)))


@njit(cache=True)
def _start_line(
    start: NDArray[np.float64], sigma: float, shape: tuple[int, int], parameters: NDArray[np.float64]
) -> bool:
    """Line with the given moments: a uniform one has length^2 / 12 along itself. False where there is none."""
    x, y, xx, yy, xy = start
    ny, nx = shape
    if not (-0.5 <= x < nx - 0.5 and -0.5 <= y < ny - 0.5):
        return False
    split = math.hypot(0.5 * (xx - yy), xy)
    major = 0.5 * (xx + yy) + split
    length = math.sqrt(12.0 * max(major - sigma * sigma, 0.0))
    if not length < (1.0 + _LENGTH_SLACK) * TRAIL_LENGTH_MAX_PIX:
        return False
    length = min(max(length, _LENGTH_START_MIN_SIGMA * sigma), TRAIL_LENGTH_MAX_PIX)
    angle = 0.5 * math.atan2(2.0 * xy, xx - yy)
    parameters[0], parameters[1], parameters[2] = 0.0, x, y
    parameters[3], parameters[4] = length * math.cos(angle), length * math.sin(angle)
    return True


@njit(cache=True)
def cut_out(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    parameters: NDArray[np.float64],
    reach: float,
) -> tuple[int, int, NDArray[np.float64], NDArray[np.float64]]:
    """Origin, values and inverse variances of the window around a line; weights are 0 further than `reach` from it."""
    ny, nx = image.shape
    x, y, dx, dy = parameters[1], parameters[2], parameters[3], parameters[4]
    x0 = min(max(math.floor(x - 0.5 * abs(dx) - reach), 0), nx)
    y0 = min(max(math.floor(y - 0.5 * abs(dy) - reach), 0), ny)
    x1 = max(min(math.ceil(x + 0.5 * abs(dx) + reach) + 1, nx), x0)
    y1 = max(min(math.ceil(y + 0.5 * abs(dy) + reach) + 1, ny), y0)
    values, weights = np.zeros((y1 - y0, x1 - x0)), np.zeros((y1 - y0, x1 - x0))
    length2 = dx * dx + dy * dy
    for j in range(y0, y1):
        for i in range(x0, x1):
            along = ((i - x) * dx + (j - y) * dy) / length2 if length2 > 0.0 else 0.0
            along = min(max(along, -0.5), 0.5)
            if math.hypot(i - x - along * dx, j - y - along * dy) > reach:
                continue
            weight = pixel_weight(image[j, i], variance[j, i], bad[j, i])
            if weight > 0.0:
                values[j - y0, i - x0], weights[j - y0, i - x0] = image[j, i], weight
    return x0, y0, values, weights


@njit(cache=True)
def _fit_one(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    coefficients: NDArray[np.float64],
    half_width: int,
    sigma: float,
    true_psf: bool,
    parameters: NDArray[np.float64],
    covariance: NDArray[np.float64],
) -> tuple[bool, float]:
    """Bring the parameters from their start to the minimum; whether they settled, and chi-square before the last step.

    The first step with a Gaussian PSF moves the flux alone.
    """
    n = _N_PARAMETERS
    planes = np.empty((_N_PLANES, values.shape[0], values.shape[1]))
    matrix, factor = np.empty((n, n)), np.zeros((n, n))
    new_matrix, gradient, new_gradient = np.empty((n, n)), np.empty(n), np.empty(n)
    step, tried = np.empty(n), np.empty(n)
    _draw(coefficients, half_width, sigma, true_psf, parameters, weights, planes)
    chi2 = _accumulate(values, weights, planes, matrix, gradient)
    damping = 0.0
    for evaluation in range(_EVALUATIONS_MAX):
        if evaluation == 0 and not true_psf:
            for k in range(1, n):
                matrix[k, k], gradient[k] = 1.0, 0.0  # without flux the line has no derivatives
        settled = max(SETTLED, _ROUGHNESS * parameters[0] * parameters[0] * matrix[0, 0])
        # What is left to be gained is told by the free step, however short the steps must be.
        if (
            (evaluation > 0 or true_psf)
            and factorise(matrix, 0.0, factor)
            and _gain_of_step(factor, parameters, gradient, step, tried) < settled
            and _is_line(tried, values.shape)
        ):
            parameters[:] = tried
            invert_factored(factor, covariance)
            return True, chi2
        if not factorise(matrix, damping, factor):
            break
        if not _gain_of_step(factor, parameters, gradient, step, tried) < np.inf:
            break
        new_chi2 = np.inf
        if _is_line(tried, values.shape):
            _draw(coefficients, half_width, sigma, true_psf, tried, weights, planes)
            new_chi2 = _accumulate(values, weights, planes, new_matrix, new_gradient)
        if new_chi2 <= chi2:
            parameters[:] = tried
            matrix[:] = new_matrix
            gradient[:] = new_gradient
            chi2 = new_chi2
            damping = 0.0 if damping < 1e-3 else 0.1 * damping
            if not math.hypot(parameters[3], parameters[4]) > _LENGTH_LEAST_SIGMA * sigma:
                break
        else:
            damping = max(10.0 * damping, 1e-2)
    return False, 0.0


@njit(cache=True)
def _gain_of_step(
    factor: NDArray[np.float64],
    parameters: NDArray[np.float64],
    gradient: NDArray[np.float64],
    step: NDArray[np.float64],
    tried: NDArray[np.float64],
) -> float:
    """Fill the step and where it leads; return what the normal equations promise of it, in chi-square."""
    solve_factored(factor, gradient, step)
    gain = 0.0
    for k in range(_N_PARAMETERS):
        gain += step[k] * gradient[k]
        tried[k] = parameters[k] + step[k]
    return gain


@njit(cache=True)
def _is_line(parameters: NDArray[np.float64], shape: tuple[int, int]) -> bool:
    """Whether the middle is on the window and the length below the limit."""
    if not math.hypot(parameters[3], parameters[4]) <= TRAIL_LENGTH_MAX_PIX:
        return False
    ny, nx = shape
    return bool(-0.5 <= parameters[1] <= nx - 0.5 and -0.5 <= parameters[2] <= ny - 0.5)


@njit(cache=True)
def _draw(
    coefficients: NDArray[np.float64],
    half_width: int,
    sigma: float,
    true_psf: bool,
    parameters: NDArray[np.float64],
    weights: NDArray[np.float64],
    planes: NDArray[np.float64],
) -> None:
    """Fill the planes with the model and its derivatives by flux, x, y, dx, dy."""
    if true_psf:
        draw_summed(coefficients, half_width, sigma, parameters, planes)
    else:
        _draw_gaussian(sigma, parameters, weights, planes)


@njit(cache=True)
def _draw_gaussian(
    sigma: float, parameters: NDArray[np.float64], weights: NDArray[np.float64], planes: NDArray[np.float64]
) -> None:
    """The closed form for a Gaussian PSF, where weights are positive.

    Along and across the line by u and v: M = f G(v) (Phi(u + L/2) - Phi(u - L/2)) / L.
    """
    flux, x, y, dx, dy = parameters
    length = max(math.hypot(dx, dy), 1e-6 * sigma)
    cosine, sine = dx / length, dy / length
    scale = 1.0 / (math.sqrt(2.0) * sigma)
    norm = 1.0 / (math.sqrt(2.0 * math.pi) * sigma)
    for j in range(weights.shape[0]):
        for i in range(weights.shape[1]):
            if not weights[j, i] > 0.0:
                continue
            u = (i - x) * cosine + (j - y) * sine
            v = (j - y) * cosine - (i - x) * sine
            across = norm * math.exp(-((v * scale) ** 2))
            ahead, behind = u + 0.5 * length, u - 0.5 * length
            head = norm * math.exp(-((ahead * scale) ** 2))
            tail = norm * math.exp(-((behind * scale) ** 2))
            along = 0.5 * (math.erf(ahead * scale) - math.erf(behind * scale)) / length
            unit = across * along
            by_u = across * (head - tail) / length
            by_v = -v / (sigma * sigma) * unit
            by_length = (0.5 * across * (head + tail) - unit) / length
            by_angle = v * by_u - u * by_v
            planes[0, j, i] = flux * unit
            planes[1, j, i] = unit
            planes[2, j, i] = -flux * (by_u * cosine - by_v * sine)
            planes[3, j, i] = -flux * (by_u * sine + by_v * cosine)
            planes[4, j, i] = flux * (by_length * cosine - by_angle * sine / length)
            planes[5, j, i] = flux * (by_length * sine + by_angle * cosine / length)


@njit(cache=True)
def draw_summed(
    coefficients: NDArray[np.float64],
    half_width: int,
    sigma: float,
    parameters: NDArray[np.float64],
    planes: NDArray[np.float64],
) -> None:
    """Sum the PSF along the line, in panels of Gauss-Legendre points."""
    flux, x, y, dx, dy = parameters
    ny, nx = planes.shape[1], planes.shape[2]
    width = 2 * half_width + 1
    stamp, slope_x, slope_y = np.empty((width, width)), np.empty((width, width)), np.empty((width, width))
    planes[:] = 0.0
    n_panels = max(1, math.ceil(math.hypot(dx, dy) / (_PANEL_SIGMA * sigma)))
    for panel in range(n_panels):
        for node in range(len(_GAUSS_NODES)):
            t = (panel + 0.5 + 0.5 * _GAUSS_NODES[node]) / n_panels - 0.5
            part = 0.5 * _GAUSS_WEIGHTS[node] / n_panels
            at_x, at_y = x + t * dx, y + t * dy
            column, row = math.floor(at_x + 0.5), math.floor(at_y + 0.5)
            x0, y0 = column - half_width, row - half_width
            if x0 >= nx or y0 >= ny or x0 + width <= 0 or y0 + width <= 0:
                continue
            evaluate_psf(coefficients, half_width, at_x - column, at_y - row, stamp, slope_x, slope_y)
            for j in range(max(0, -y0), min(width, ny - y0)):
                for i in range(max(0, -x0), min(width, nx - x0)):
                    by_x, by_y = part * slope_x[j, i], part * slope_y[j, i]
                    planes[1, y0 + j, x0 + i] += part * stamp[j, i]
                    planes[2, y0 + j, x0 + i] += by_x
                    planes[3, y0 + j, x0 + i] += by_y
                    planes[4, y0 + j, x0 + i] += t * by_x
                    planes[5, y0 + j, x0 + i] += t * by_y
    for j in range(ny):
        for i in range(nx):
            planes[0, j, i] = flux * planes[1, j, i]
            for k in range(2, _N_PLANES):
                planes[k, j, i] *= flux


@njit(cache=True)
def _accumulate(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    planes: NDArray[np.float64],
    matrix: NDArray[np.float64],
    gradient: NDArray[np.float64],
) -> float:
    """Fill the normal equations of the drawn model; return chi-square."""
    n = _N_PARAMETERS
    matrix[:] = 0.0
    gradient[:] = 0.0
    chi2 = 0.0
    for j in range(values.shape[0]):
        for i in range(values.shape[1]):
            weight = weights[j, i]
            if not weight > 0.0:
                continue
            residual = values[j, i] - planes[0, j, i]
            chi2 += weight * residual * residual
            for row in range(n):
                scaled = weight * planes[1 + row, j, i]
                gradient[row] += scaled * residual
                for column in range(row + 1):
                    matrix[row, column] += scaled * planes[1 + column, j, i]
    for row in range(n):
        for column in range(row):
            matrix[column, row] = matrix[row, column]
    return chi2

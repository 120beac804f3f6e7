"""Dipoles: two PSFs of opposite sign, fitted to difference, science image and matched template together."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from transforms.numerics.forced_photometry import checked_planes, evaluate_psf, pixel_weight
from transforms.numerics.model_fitting import (
    DAMPING_FREE,
    FIT_REACH_SIGMA,
    SETTLED,
    SHIFT_MAX_PIX,
    SplineStack,
    factorise,
    invert_factored,
    solve_factored,
)

DIPOLE_SNR_MIN = 5.0 * math.sqrt(2.0)
LOBE_SHARE_MAX = 0.65
SEPARATION_MAX_SIGMA = 5.0
_DIRECT_WEIGHT = 0.5  # of science and template beside the difference, which repeats what they say but knows no host
_EVALUATIONS_MAX = 40
_LOBE = 4  # parameters of a lobe: flux, x, y, and the pedestal of the image it lies in
_LOBE_SIGN = (1.0, -1.0)


class Dipoles(NamedTuple):
    """Fitted dipoles of n sources; every array has shape (n,), NaN where `good` is false.

    Attributes
    ----------
    good : the fit settled with both fluxes positive
    is_dipole : good, and by LSST's limits a dipole: `snr` > 7.07, `lobe_share` < 0.65, separation < 5 sigma of the PSF
    x_positive, y_positive, x_negative, y_negative : pixels, centres of the lobes
    separation_err : pixels, standard error of the distance between them
    mean_flux, mean_flux_err : mean of the lobes' absolute fluxes, image units
    flux_diff, flux_diff_err : absolute flux of the positive minus that of the negative lobe
    chi2, n_pixels : of the model on the difference; n_pixels is int32, 0 where nothing was fitted
    snr : sqrt(sum(model^2 / V)) on the difference: for lobes that do not overlap, the quadrature sum of their S/N
    lobe_share : of the model on the difference, the larger of the sums of its positive and its negative pixels over
        both: 0.5 for a balanced dipole, 1 for a single source. For separate lobes it is the share of the flux
    """

    good: NDArray[np.bool_]
    is_dipole: NDArray[np.bool_]
    x_positive: NDArray[np.float64]
    y_positive: NDArray[np.float64]
    x_negative: NDArray[np.float64]
    y_negative: NDArray[np.float64]
    separation_err: NDArray[np.float64]
    mean_flux: NDArray[np.float64]
    mean_flux_err: NDArray[np.float64]
    flux_diff: NDArray[np.float64]
    flux_diff_err: NDArray[np.float64]
    chi2: NDArray[np.float64]
    n_pixels: NDArray[np.int32]
    snr: NDArray[np.float64]
    lobe_share: NDArray[np.float64]


def fit_dipoles(
    difference: ArrayLike,
    variance: ArrayLike,
    science: ArrayLike,
    science_variance: ArrayLike,
    matched_template: ArrayLike,
    template_variance: ArrayLike,
    bad: NDArray[np.bool_],
    psfs: SplineStack,
    science_psfs: SplineStack,
    psf_of_source: NDArray[np.integer],
    peak_x: NDArray[np.integer],
    peak_y: NDArray[np.integer],
) -> Dipoles:
    """Fit two PSFs of opposite sign around each peak.

    Minimises chi2(D) + chi2(S) / 2 + chi2(T) / 2 with inverse-variance weights, where

        D = f+ P(c+) - f- P(c-),   S = f+ P'(c+) + s,   T = f- P'(c-) + t.

    The difference of an unresolved dipole knows only flux times separation; science and template tell them apart.
    Steps are Levenberg-Marquardt with analytic derivatives, from the brightest and the faintest patch around the peak.
    The noise of D is that of S - T, so the errors come from A^-1 B A^-1 with B the covariance of the gradient under
    independent noise of S and T, not from A^-1.

    Parameters
    ----------
    difference, science, matched_template : (ny, nx), used as float32, one unit, free of background
    variance, science_variance, template_variance : (ny, nx), used as float32, that unit squared
    bad : (ny, nx) bool, pixels that no measurement uses; those that are not finite or have no positive variance join
    psfs, science_psfs : PSFs of the difference, and of science and matched template
    psf_of_source : (n,) index of each source's PSF in both stacks
    peak_x, peak_y : (n,) pixels inside the image

    Returns
    -------
    Dipoles

    Raises
    ------
    ValueError
        Planes differ in shape.

    Notes
    -----
    About 0.3 ms a source at a FWHM of 4 pixels.
    """
    pixels, pixel_variance, masked = checked_planes(difference, variance, bad)
    science_pixels, science_pixel_variance, _ = checked_planes(science, science_variance, masked)
    template_pixels, template_pixel_variance, _ = checked_planes(matched_template, template_variance, masked)
    n = len(peak_x)
    real = np.full((12, n), np.nan)
    n_pixels = np.zeros(n, dtype=np.int32)
    _fit_all(
        pixels,
        pixel_variance,
        science_pixels,
        science_pixel_variance,
        template_pixels,
        template_pixel_variance,
        masked,
        psfs.coefficients,
        science_psfs.coefficients,
        psfs.sigma_pix,
        min(psfs.half_width, science_psfs.half_width),
        np.ascontiguousarray(psf_of_source, dtype=np.int64),
        np.ascontiguousarray(peak_x, dtype=np.int64),
        np.ascontiguousarray(peak_y, dtype=np.int64),
        real,
        n_pixels,
    )
    good = np.isfinite(real).all(axis=0)
    real[:, ~good] = np.nan
    n_pixels[~good] = 0
    separation = np.hypot(real[0] - real[2], real[1] - real[3])
    with np.errstate(invalid="ignore"):
        is_dipole = good & (real[10] > DIPOLE_SNR_MIN) & (real[11] < LOBE_SHARE_MAX)
        is_dipole &= separation < SEPARATION_MAX_SIGMA * psfs.sigma_pix[psf_of_source]
    return Dipoles(
        good=good,
        is_dipole=is_dipole,
        x_positive=real[0],
        y_positive=real[1],
        x_negative=real[2],
        y_negative=real[3],
        separation_err=real[4],
        mean_flux=real[5],
        mean_flux_err=real[6],
        flux_diff=real[7],
        flux_diff_err=real[8],
        chi2=real[9],
        n_pixels=n_pixels,
        snr=real[10],
        lobe_share=real[11],
    )


@njit(cache=True)
def _fit_all(
    difference: NDArray[np.float32],
    variance: NDArray[np.float32],
    science: NDArray[np.float32],
    science_variance: NDArray[np.float32],
    template: NDArray[np.float32],
    template_variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    coefficients: NDArray[np.float64],
    science_coefficients: NDArray[np.float64],
    sigma_pix: NDArray[np.float64],
    half_width: int,
    psf_of_source: NDArray[np.int64],
    peak_x: NDArray[np.int64],
    peak_y: NDArray[np.int64],
    real: NDArray[np.float64],
    n_pixels: NDArray[np.int32],
) -> None:
    """Fill `real` (the columns of `Dipoles` from x_positive to chi2, then snr and lobe_share) and `n_pixels`."""
    width = 2 * half_width + 1
    values, weights = np.empty((3, width, width)), np.empty((3, width, width))
    stamps = np.empty((2, 2, 3, width, width))  # lobe; on the difference, on its own image; PSF and its two slopes
    seeds = np.empty((2, 2), dtype=np.int64)
    covariance = np.empty((2 * _LOBE, 2 * _LOBE))
    for source in range(peak_x.size):
        psf = psf_of_source[source]
        sigma = sigma_pix[psf]
        if not _find_lobes(difference, variance, bad, peak_x[source], peak_y[source], sigma, seeds):
            continue
        centre_x, centre_y = (seeds[0, 0] + seeds[1, 0]) // 2, (seeds[0, 1] + seeds[1, 1]) // 2
        half_separation = 0.5 * math.hypot(seeds[0, 0] - seeds[1, 0], seeds[0, 1] - seeds[1, 1])
        radius = min(float(half_width), FIT_REACH_SIGMA * sigma + 1.0 + half_separation)
        x0, y0 = centre_x - half_width, centre_y - half_width
        _cut_out(difference, variance, bad, x0, y0, radius, values[0], weights[0])
        _cut_out(science, science_variance, bad, x0, y0, radius, values[1], weights[1])
        _cut_out(template, template_variance, bad, x0, y0, radius, values[2], weights[2])
        parameters = np.zeros(2 * _LOBE)
        for lobe in range(2):
            parameters[lobe * _LOBE + 1] = seeds[lobe, 0] - centre_x
            parameters[lobe * _LOBE + 2] = seeds[lobe, 1] - centre_y
        settled, chi2 = _fit_one(
            values, weights, coefficients[psf], science_coefficients[psf], half_width, parameters, stamps, covariance
        )
        if not (settled and parameters[0] > 0.0 and parameters[_LOBE] > 0.0):
            continue
        n_pixels[source] = (weights[0] > 0.0).sum()
        _describe(parameters, covariance, stamps, weights[0], real[:, source])
        real[0, source] += centre_x
        real[1, source] += centre_y
        real[2, source] += centre_x
        real[3, source] += centre_y
        real[9, source] = chi2


@njit(cache=True)
def _find_lobes(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    peak_x: int,
    peak_y: int,
    sigma: float,
    seeds: NDArray[np.int64],
) -> bool:
    """Fill `seeds` with (x, y) of the most significant positive, then negative patch within 5 sigma of the peak.

    A patch is a square of about one sigma around a pixel. False when there are not both signs.
    """
    ny, nx = image.shape
    reach = min(SEPARATION_MAX_SIGMA * sigma, 2.0 * SHIFT_MAX_PIX)
    patch = max(1, int(0.7 * sigma))
    best = np.zeros(2)
    box = math.ceil(reach)
    for y in range(max(0, peak_y - box), min(ny, peak_y + box + 1)):
        for x in range(max(0, peak_x - box), min(nx, peak_x + box + 1)):
            if math.hypot(x - peak_x, y - peak_y) > reach:
                continue
            signal, information = 0.0, 0.0
            for v in range(max(0, y - patch), min(ny, y + patch + 1)):
                for u in range(max(0, x - patch), min(nx, x + patch + 1)):
                    weight = pixel_weight(image[v, u], variance[v, u], bad[v, u])
                    if weight > 0.0:
                        signal += weight * image[v, u]
                        information += weight
            if not information > 0.0:
                continue
            significance = signal / math.sqrt(information)
            for lobe in range(2):
                if _LOBE_SIGN[lobe] * significance > best[lobe]:
                    best[lobe] = _LOBE_SIGN[lobe] * significance
                    seeds[lobe, 0], seeds[lobe, 1] = x, y
    separation = max(abs(seeds[0, 0] - seeds[1, 0]), abs(seeds[0, 1] - seeds[1, 1]))
    return best[0] > 0.0 and best[1] > 0.0 and separation < 2.0 * SHIFT_MAX_PIX


@njit(cache=True)
def _cut_out(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x0: int,
    y0: int,
    radius: float,
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> None:
    """Copy a stamp's values and inverse variances; the latter are 0 for what is not usable or beyond the radius."""
    ny, nx = image.shape
    half_width = values.shape[0] // 2
    for j in range(values.shape[0]):
        for i in range(values.shape[1]):
            y, x = y0 + j, x0 + i
            values[j, i] = 0.0
            weights[j, i] = 0.0
            if not (0 <= y < ny and 0 <= x < nx) or math.hypot(i - half_width, j - half_width) > radius:
                continue
            weight = pixel_weight(image[y, x], variance[y, x], bad[y, x])
            if weight > 0.0:
                values[j, i], weights[j, i] = image[y, x], weight


@njit(cache=True)
def _fit_one(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    coefficients: NDArray[np.float64],
    science_coefficients: NDArray[np.float64],
    half_width: int,
    parameters: NDArray[np.float64],
    stamps: NDArray[np.float64],
    covariance: NDArray[np.float64],
) -> tuple[bool, float]:
    """Bring the parameters from their start to the minimum; whether they settled, and chi-square on the difference.

    The first step moves only what is linear: fluxes and pedestals.
    """
    n = 2 * _LOBE
    matrix, factor = np.empty((n, n)), np.zeros((n, n))
    new_matrix, gradient, new_gradient = np.empty((n, n)), np.empty(n), np.empty(n)
    step, tried = np.empty(n), np.empty(n)
    _evaluate_lobes(coefficients, science_coefficients, half_width, parameters, stamps)
    chi2, difference_chi2 = _accumulate(values, weights, stamps, parameters, matrix, gradient)
    damping = 0.0
    for evaluation in range(_EVALUATIONS_MAX):
        if evaluation == 0:
            for lobe in range(2):
                for k in range(lobe * _LOBE + 1, lobe * _LOBE + 3):
                    matrix[k, k], gradient[k] = 1.0, 0.0  # with no flux yet, this row is zero besides
        if not factorise(matrix, damping, factor):
            break
        solve_factored(factor, gradient, step)
        gain = 0.0
        for k in range(n):
            gain += step[k] * gradient[k]
            tried[k] = parameters[k] + step[k]
        if not gain < np.inf:
            break
        for lobe in range(2):
            for k in range(lobe * _LOBE + 1, lobe * _LOBE + 3):
                tried[k] = min(max(tried[k], -SHIFT_MAX_PIX), SHIFT_MAX_PIX)
        if evaluation > 0 and damping < DAMPING_FREE and gain < SETTLED:
            parameters[:] = tried
            _evaluate_lobes(coefficients, science_coefficients, half_width, parameters, stamps)
            if factorise(matrix, 0.0, factor):
                _spread(values, weights, stamps, parameters, factor, covariance)
                return True, difference_chi2
            break
        _evaluate_lobes(coefficients, science_coefficients, half_width, tried, stamps)
        new_chi2, new_difference_chi2 = _accumulate(values, weights, stamps, tried, new_matrix, new_gradient)
        if new_chi2 <= chi2:
            parameters[:] = tried
            matrix[:] = new_matrix
            gradient[:] = new_gradient
            chi2, difference_chi2 = new_chi2, new_difference_chi2
            damping = 0.0 if damping < 1e-3 else 0.1 * damping
        else:
            damping = max(10.0 * damping, 1e-2)
    return False, 0.0


@njit(cache=True)
def _evaluate_lobes(
    coefficients: NDArray[np.float64],
    science_coefficients: NDArray[np.float64],
    half_width: int,
    parameters: NDArray[np.float64],
    stamps: NDArray[np.float64],
) -> None:
    """Fill the stamps with both PSFs of both lobes, for unit flux."""
    for lobe in range(2):
        dx, dy = parameters[lobe * _LOBE + 1], parameters[lobe * _LOBE + 2]
        on_difference, on_image = stamps[lobe, 0], stamps[lobe, 1]
        evaluate_psf(coefficients, half_width, dx, dy, on_difference[0], on_difference[1], on_difference[2])
        evaluate_psf(science_coefficients, half_width, dx, dy, on_image[0], on_image[1], on_image[2])


@njit(cache=True)
def _slopes(
    stamps: NDArray[np.float64], parameters: NDArray[np.float64], j: int, i: int, slopes: NDArray[np.float64]
) -> float:
    """Model of the difference at a pixel; `slopes` (2, 8) become derivatives of the difference and of the images.

    In the second row the first half is of the science image, the other of the template.
    """
    model = 0.0
    for lobe in range(2):
        first, sign = lobe * _LOBE, _LOBE_SIGN[lobe]
        flux = parameters[first]
        stamp, direct = stamps[lobe, 0], stamps[lobe, 1]
        model += sign * flux * stamp[0, j, i]
        slopes[0, first] = sign * stamp[0, j, i]
        slopes[0, first + 1] = sign * flux * stamp[1, j, i]
        slopes[0, first + 2] = sign * flux * stamp[2, j, i]
        slopes[0, first + 3] = 0.0
        slopes[1, first] = direct[0, j, i]
        slopes[1, first + 1] = flux * direct[1, j, i]
        slopes[1, first + 2] = flux * direct[2, j, i]
        slopes[1, first + 3] = 1.0
    return model


@njit(cache=True)
def _accumulate(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    stamps: NDArray[np.float64],
    parameters: NDArray[np.float64],
    matrix: NDArray[np.float64],
    gradient: NDArray[np.float64],
) -> tuple[float, float]:
    """Fill the normal equations at the parameters; return chi-square with its weights, and that of the difference."""
    n = 2 * _LOBE
    slopes = np.empty((2, n))
    matrix[:] = 0.0
    gradient[:] = 0.0
    chi2, direct_chi2 = 0.0, 0.0
    for j in range(values.shape[1]):
        for i in range(values.shape[2]):
            if not (weights[0, j, i] > 0.0 or weights[1, j, i] > 0.0 or weights[2, j, i] > 0.0):
                continue
            residual = values[0, j, i] - _slopes(stamps, parameters, j, i, slopes)
            weight = weights[0, j, i]
            chi2 += weight * residual * residual
            for row in range(n):
                scaled = weight * slopes[0, row]
                gradient[row] += scaled * residual
                for column in range(row + 1):
                    matrix[row, column] += scaled * slopes[0, column]
            for lobe in range(2):
                first = lobe * _LOBE
                weight = _DIRECT_WEIGHT * weights[1 + lobe, j, i]
                model = parameters[first] * slopes[1, first] + parameters[first + 3]
                residual = values[1 + lobe, j, i] - model
                direct_chi2 += weight * residual * residual
                for row in range(first, first + _LOBE):
                    scaled = weight * slopes[1, row]
                    gradient[row] += scaled * residual
                    for column in range(first, row + 1):
                        matrix[row, column] += scaled * slopes[1, column]
    for row in range(n):
        for column in range(row):
            matrix[column, row] = matrix[row, column]
    return chi2 + direct_chi2, chi2


@njit(cache=True)
def _spread(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    stamps: NDArray[np.float64],
    parameters: NDArray[np.float64],
    factor: NDArray[np.float64],
    covariance: NDArray[np.float64],
) -> None:
    """Covariance A^-1 B A^-1 of the parameters, for the factor of A.

    Where a pixel's D is S - T but for a scale (its variance is not quite the sum of theirs), the gradient holds the
    noise of S by `via_science`, that of T by `via_template`.
    """
    n = 2 * _LOBE
    slopes, via = np.empty((2, n)), np.empty((2, n))
    noise, inverse, half = np.zeros((n, n)), np.empty((n, n)), np.zeros((n, n))
    for j in range(values.shape[1]):
        for i in range(values.shape[2]):
            _slopes(stamps, parameters, j, i, slopes)
            w, w_science, w_template = weights[0, j, i], weights[1, j, i], weights[2, j, i]
            both = w > 0.0 and w_science > 0.0 and w_template > 0.0
            scale = math.sqrt(1.0 / (w * (1.0 / w_science + 1.0 / w_template))) if both else 0.0
            for lobe in range(2):
                own = weights[1 + lobe, j, i]
                if not own > 0.0:
                    continue
                for k in range(n):
                    via[lobe, k] = _LOBE_SIGN[lobe] * w * scale * slopes[0, k]
                for k in range(lobe * _LOBE, (lobe + 1) * _LOBE):
                    via[lobe, k] += _DIRECT_WEIGHT * own * slopes[1, k]
                for row in range(n):
                    for column in range(n):
                        noise[row, column] += via[lobe, row] * via[lobe, column] / own
            if w > 0.0 and not both:
                for row in range(n):
                    for column in range(n):
                        noise[row, column] += w * slopes[0, row] * slopes[0, column]
    invert_factored(factor, inverse)
    covariance[:] = 0.0
    for row in range(n):
        for column in range(n):
            for k in range(n):
                half[row, column] += inverse[row, k] * noise[k, column]
    for row in range(n):
        for column in range(n):
            for k in range(n):
                covariance[row, column] += half[row, k] * inverse[k, column]


@njit(cache=True)
def _describe(
    parameters: NDArray[np.float64],
    covariance: NDArray[np.float64],
    stamps: NDArray[np.float64],
    weights: NDArray[np.float64],
    columns: NDArray[np.float64],
) -> None:
    """Fill a source's columns of `_fit_all` but chi2; positions relative to the stamp's central pixel."""
    positive, negative = 0, _LOBE
    dx = parameters[positive + 1] - parameters[negative + 1]
    dy = parameters[positive + 2] - parameters[negative + 2]
    columns[0], columns[1] = parameters[positive + 1], parameters[positive + 2]
    columns[2], columns[3] = parameters[negative + 1], parameters[negative + 2]
    separation = math.hypot(dx, dy)
    along = np.zeros(2 * _LOBE)  # derivatives of the separation; isotropic where it has no direction
    cosine, sine = (dx / separation, dy / separation) if separation > 0.0 else (1.0, 0.0)
    along[positive + 1], along[positive + 2] = cosine, sine
    along[negative + 1], along[negative + 2] = -cosine, -sine
    variance = 0.0
    for row in range(2 * _LOBE):
        for column in range(2 * _LOBE):
            variance += along[row] * covariance[row, column] * along[column]
    columns[4] = math.sqrt(variance) if variance > 0.0 else np.nan
    flux_variance = covariance[positive, positive] + covariance[negative, negative]
    shared = 2.0 * covariance[positive, negative]
    columns[5] = 0.5 * (parameters[positive] + parameters[negative])
    columns[6] = 0.5 * math.sqrt(flux_variance + shared) if flux_variance + shared > 0.0 else np.nan
    columns[7] = parameters[positive] - parameters[negative]
    columns[8] = math.sqrt(flux_variance - shared) if flux_variance - shared > 0.0 else np.nan
    power, above, below = 0.0, 0.0, 0.0
    for j in range(weights.shape[0]):
        for i in range(weights.shape[1]):
            model = parameters[positive] * stamps[0, 0, 0, j, i] - parameters[negative] * stamps[1, 0, 0, j, i]
            power += weights[j, i] * model * model
            if model > 0.0:
                above += model
            else:
                below -= model
    columns[10] = math.sqrt(power)
    columns[11] = max(above, below) / (above + below) if above + below > 0.0 else np.nan

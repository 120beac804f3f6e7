"""Matching kernel between a template and a science image (Alard & Lupton 1998; Alard 2000; Bramich 2008).

The kernel is a sum of basis functions (Gaussians times polynomials, or free pixels held smooth) whose coefficients
are polynomials of the position. It is fitted to stamps around stars by weighted least squares; the normal matrix of
each stamp is kept, so that leaving stamps out, other spatial orders and validation cost next to nothing.

The template's noise is part of the model that is fitted, and would pull the kernel towards a blurring one (errors in
variables): what it adds to the normal matrix on average is measured in blank sky and taken off.

What varies on scales too short for polynomials, as the air's shifts and blurs do, is a Gaussian process through what
the stars have left (`Ripples`).

Sums are numba loops and plain einsum, not BLAS, whose rounding depends on its number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from transforms.numerics.convolution import convolve_stamp
from transforms.numerics.psf_modelling import DetectedSources

MIN_KERNEL_STARS = 10
STARS_PER_SPATIAL_TERM = 4  # order 2 (6 terms) needs 24 stars, order 1 (3 terms) 12, else order 0
POOR_VALIDATION_CHI2 = 1.3
_STAMP_HALF_PIX = 13
_CORE_BOX_PIX = 9  # no bad pixel of either image may lie in the box of this side around a kernel star
_N_CELLS = 200  # kernel stars are spread over about so many square cells
_LEAST_CELL_PIX = 64
_STARS_PER_CELL = 2
_DEGREES = {"gauss_hermite": (4, 2, 2), "broad_gauss_hermite": (6, 4, 2)}
_BROAD_WIDTHS = ((0.15, 0.6), (0.32, 0.8), (0.64, 1.5))  # sigma over the wider FWHM, and its least value, pixels
_DELTA_ABOVE_CHI2 = 1.05  # held-out chi-square of the Gaussians; any nearer to 1 they cannot be beaten
_DELTA_FIRST_STARS = 120  # on which it must keep up with the Gaussians, before all stamps are measured again
_DELTA_STRENGTH = 1e-4  # of the Laplacian's square, relative to the normal matrix
_DELTA_STARS_PER_TERM = 10
_MODEL_ERROR = 0.005  # of the local flux: keeps the brightest stars from ruling the fit
_CLIP_MADS = 10.0  # at 5 the brightest stars go where the science image is sharper, and residuals grow by 15 %
_MAD_TO_SIGMA = 1.4826
_MAX_CLIPS = 6
_RIDGE = 1e-9  # of the diagonal
_FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
_N_FOLDS = 5
_ENOUGH_HELD_OUT = 60  # stamps; with fewer than 5 times as many stars more folds are held out in turn
_FLUX_RATIO_RANGE = (0.5, 2.0)
_LARGEST_SUM_VARIATION = 0.3
_LARGEST_POSITION_CONDITION = 300.0
_FWHM_TO_SIGMA = 2.3548
_NOISE_SHARE = 0.9  # of what the template's noise adds to the normal matrix, that may be taken off
_LEAST_GAIN = 0.003  # of held-out chi-square, for which a kernel may pass more of the template's noise
_MOST_NOISE = 20.0  # times the template's, at any star: more is the solution of a nearly singular matrix
_LESS_NOISE = (1.0, 0.9, 0.8, 0.65, 0.5, 0.3, 0.0)  # parts of it, tried until the matrix is positive
_POWER_STEPS = 8
_TILE = 4  # rows and columns of products that are summed at a time; as unrolled in `_products_of_rows`
_PAD = 16  # pixels of a stamp are padded with zeros to a multiple of it: whole vectors
_NOISE_LAGS = 4
_NOISE_WINDOW_PIX = 64
_N_NOISE_WINDOWS = 8  # along an axis
_BLANK_BOX_PIX = 9
_BLANK_SIGMA = 4.5  # blank pixels have none above this in the box around them, in either image
_LEAST_NOISE = 0.05  # of the stated variance: below, the template is taken for free of noise
_SHARED_NOISE = 0.1  # correlation of the images' noise at which they are taken to share exposures
_RIPPLE_REACHES_PIX = (150.0, 220.0, 320.0, 450.0)
_LEAST_RIPPLE_SIGNIFICANCE = 3.0
_RIPPLE_STAMP_FWHM = 1.5  # half side of a stamp; at least 5 pixels
_MOST_RIPPLE = 3.0  # standard deviations of a ripple and its error together
_BEYOND_SIGMA = 0.3173
_RIPPLE_CELL_PIX = 128
_RIPPLE_STARS_PER_CELL = 6
_RIPPLE_LEAST_SNR = 30.0
_LEAST_MODE_EIGENVALUE = 1e-4  # of a star's normal matrix, scaled to a diagonal of ones
_SOLVER_STEPS = 60
_SOLVER_PRECISION = 1e-6


class KernelMatchingError(ValueError):
    """No usable kernel; the message carries the evidence."""


class TooFewKernelStarsError(KernelMatchingError):
    """Fewer stars than a kernel needs, before or after clipping."""


class BadKernelError(KernelMatchingError):
    """A kernel was found and is not to be believed."""


class KernelSumError(BadKernelError):
    """The kernel's sum is not what the stars' fluxes ask for, or they ask for one that varies over the image."""


class IllConditionedKernelError(BadKernelError):
    """The stars do not determine the kernel's coefficients."""


@dataclass(frozen=True)
class KernelModel:
    """What a kernel is made of.

    Attributes
    ----------
    basis : "gauss_hermite" (27 functions, widths by the difference of the PSFs), "broad_gauss_hermite" (49, widths by
        the wider PSF) or "delta" (each pixel of a disc, held smooth)
    spatial_order : order of the coefficients' polynomials in position, 0 to 3; lowered where stars are too few
    """

    basis: Literal["gauss_hermite", "broad_gauss_hermite", "delta"] = "gauss_hermite"
    spatial_order: int = 2


@dataclass(frozen=True)
class ModelScore:
    """How a model did on stamps that its fit did not see.

    Attributes
    ----------
    model : as fitted, so with the spatial order that the stars afford
    chi2 : mean reduced chi-square of the held-out stamps; infinite where no fit was possible
    excess, excess_error : mean over stamps of this minus the chosen model's chi2, and its standard error
    """

    model: KernelModel
    chi2: float
    excess: float
    excess_error: float


@dataclass(frozen=True, eq=False)
class Ripples:
    """Small changes of a kernel's place, width and shape that vary from star to star.

    The air shifts and blurs images on scales of some hundred pixels, which polynomials over a detector do not follow.
    ``K + sum_m a_m(x) D_m K`` with the derivatives D of sum 0: d/dx, d/dy, dxx + dyy, dxx - dyy, 2 dxdy (differences
    of neighbouring pixels). An amplitude is a Gaussian process in position, ``a_m(x) = sum_s weights[m, s]
    c(|x - x_s| / reaches_pix[m])`` with Wendland's ``c(r) = (1 - r)^4 (4 r + 1)``, 0 beyond r = 1.

    Attributes
    ----------
    x, y : (n,) of the stars, pixels
    weights : (5, n) float64; zeros where an amplitude does not tell itself from noise
    reaches_pix : (5,) float64
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    weights: NDArray[np.float64]
    reaches_pix: NDArray[np.float64]

    def amplitudes(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, 5) at positions (n,): pixels (the first two) and pixels squared."""
        found = np.zeros((len(x), len(self.weights)))
        rising = np.argsort(self.y, kind="stable")
        _add_fields(
            np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64),
            self.x[rising], self.y[rising], np.ascontiguousarray(self.weights.T[rising]), self.reaches_pix, found,
        )  # fmt: skip
        return found


@dataclass(frozen=True, eq=False)
class KernelSolution:
    """A spatially varying kernel and a differential background.

    ``science ~ kernel(x, y) * template + background(x, y)``. The kernel's sum is the same everywhere (the
    photometric ratio of the images does not depend on position): only basis kernel 0 has a sum, and its
    coefficient is constant.

    Attributes
    ----------
    basis : (n_basis, k, k) float64; sums 1 (the first) and 0 (all others)
    coefficients : (n_basis, n_terms) float64 of the polynomials in scaled position
    background_coefficients : (n_background_terms,) float64, science image's unit
    spatial_order, background_order : orders of these polynomials
    shape : (ny, nx) of the image; positions are scaled to [-1, 1] with it
    kernel_sum : science flux of unit template flux
    n_stars_offered, n_stars_used : before and after clipping
    chi2 : mean reduced chi-square of the stamps used
    validation_chi2 : reduced chi-square of stamps, a fifth or more of all, that a fit like this did not see; the mean
        without the lowest and the highest tenth
    model : basis and spatial order
    flux_ratio : median flux ratio of the stars, as measured before any fit
    sum_variation, sum_variation_error : largest relative difference over the image of a plane through the stars' flux
        ratios, and its error. The kernel's sum is constant; PSFs that vary unlike make some per cent of it
    condition_number : of the normal matrix (scaled to a diagonal of ones) as solved, by power iteration
    noise_share : part of the template's noise that was taken off the normal matrix
    scores : of the models that were tried, the chosen one first
    ripples : what the kernel does on scales below those of the polynomials
    """

    basis: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    background_coefficients: NDArray[np.float64]
    spatial_order: int
    background_order: int
    shape: tuple[int, int]
    kernel_sum: float
    n_stars_offered: int
    n_stars_used: int
    chi2: float
    validation_chi2: float
    model: KernelModel
    flux_ratio: float
    sum_variation: float
    sum_variation_error: float
    condition_number: float
    noise_share: float
    scores: tuple[ModelScore, ...]
    ripples: Ripples

    @property
    def is_poor(self) -> bool:
        """Held-out stamps are badly matched: use the difference with care."""
        return not self.validation_chi2 <= POOR_VALIDATION_CHI2

    def kernels_at(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float64]:
        """Kernels at positions (n,) in pixels; returns (n, k, k)."""
        terms = _position_terms(x, y, self.shape, self.spatial_order)
        side = self.basis.shape[1]
        images = np.einsum("bt,bp->tp", self.coefficients, self.basis.reshape(len(self.basis), -1))
        kernels = np.einsum("nt,tp->np", terms, images).reshape(-1, side, side)  # terms are fewer than functions
        _add_ripples(kernels, self.ripples.amplitudes(x, y))
        return np.asarray(kernels)

    def subtract_background(self, image: NDArray[np.float32]) -> None:
        """Subtract the differential background from an image of the kernel's shape, in place."""
        ny, nx = self.shape
        powers = np.zeros((self.background_order + 1, self.background_order + 1))
        for value, (i, j) in zip(self.background_coefficients, _exponents(self.background_order), strict=True):
            powers[i, j] = value
        _subtract_polynomial(image, powers, _scaled(np.arange(nx), nx), _scaled(np.arange(ny), ny))


@njit(cache=True)
def _subtract_polynomial(
    image: NDArray[np.float32], powers: NDArray[np.float64], u: NDArray[np.float64], v: NDArray[np.float64]
) -> None:
    """image[y, x] -= sum_ij powers[i, j] u[x]^i v[y]^j"""
    order = powers.shape[0] - 1
    row = np.zeros(order + 1)
    for y in range(image.shape[0]):
        for i in range(order + 1):
            row[i] = 0.0
            for j in range(order, -1, -1):
                row[i] = row[i] * v[y] + powers[i, j]
        for x in range(image.shape[1]):
            value = 0.0
            for i in range(order, -1, -1):
                value = value * u[x] + row[i]
            image[y, x] -= np.float32(value)


@dataclass(frozen=True, eq=False)
class _Basis:
    """Basis functions, and how to convolve with them: shifts, then products of two profiles.

    Function c is ``own[c] * raw[c] + carried[c] * raw[0]``, which gives it the sum 1 (the first) or 0.
    """

    functions: NDArray[np.float64]  # (n, k, k)
    shifts: NDArray[np.intp]  # (n_shifts, 2) row, column
    profiles: NDArray[np.float64]  # (n_profiles, k)
    rows: NDArray[np.intp]  # (n - n_shifts,) profile along y
    columns: NDArray[np.intp]  # likewise along x
    own: NDArray[np.float64]
    carried: NDArray[np.float64]
    strength: float  # of the smoothness term
    dtype: type[np.floating]  # of the normal matrices: float32 does where smoothness is asked for


@dataclass(frozen=True, eq=False)
class _Stamps:
    """Normal equations of each stamp in its own local coefficients: basis functions, then a constant.

    Symmetric matrices are stored as rows of their lower triangles, one after the other: e = c (c + 1) / 2 entries.
    """

    gram: NDArray[np.floating]  # (n, e)
    right: NDArray[np.float64]  # (n, c)
    square: NDArray[np.float64]  # (n,) weighted sum of squares of the science pixels
    n_pixels: NDArray[np.int64]  # (n,) used
    noise: NDArray[np.float64]  # (e,) what template noise of unit weighted variance adds to `gram` on average
    noise_sum: NDArray[np.float64]  # (n,) template's variance times weight, summed over the stamp
    noise_factor: float  # of the template's variance in the weights
    roughness: NDArray[np.float64]  # (e,) square of the Laplacian, of the weight it is to have; 0 without
    u: NDArray[np.float64]  # (n,) scaled positions
    v: NDArray[np.float64]

    @property
    def n_columns(self) -> int:
        return self.right.shape[1]


@dataclass(frozen=True)
class _Plan:
    """One way to solve for the coefficients of given stamps."""

    order: int
    background_order: int
    noise_share: float


@dataclass(frozen=True, eq=False)
class _Fit:
    coefficients: NDArray[np.float64]  # (columns, terms)
    used: NDArray[np.intp]
    plan: _Plan
    condition_number: float


def select_kernel_stars(
    sources: DetectedSources,
    science_bad: NDArray[np.bool_],
    template_bad: NDArray[np.bool_],
    kernel_half_width_pix: int,
    isolation_pix: float,
    min_snr: float = 20.0,
    max_snr: float = 2000.0,
    *,
    for_ripples: bool = False,
) -> NDArray[np.intp]:
    """Choose kernel stars: clean, isolated, bright but not too bright, and spread over the image.

    The brightest 2 per square cell (200 cells an image, but none smaller than 64 pixels), no pixel of the central
    9 x 9 bad in either image, no brighter source within `isolation_pix`, whole stamps inside the image.

    Parameters
    ----------
    sources : sources of the science image
    science_bad, template_bad : (ny, nx) bool
    kernel_half_width_pix : half side of the kernel to be fitted
    isolation_pix : distance to the next source that is brighter
    min_snr, max_snr : interval of the signal-to-noise ratio in the science image
    for_ripples : choose stars that show ripples instead: of S/N above 30, up to 6 per cell of 128 pixels

    Returns
    -------
    (n,) indices into `sources`, in order of decreasing flux
    """
    ny, nx = science_bad.shape
    margin = _STAMP_HALF_PIX + kernel_half_width_pix + 1
    column, row = np.rint(sources.x).astype(np.intp), np.rint(sources.y).astype(np.intp)
    usable = (sources.snr >= min_snr) & (sources.snr <= max_snr) & sources.clean
    usable &= (column >= margin) & (column < nx - margin) & (row >= margin) & (row < ny - margin)
    core = np.arange(_CORE_BOX_PIX) - _CORE_BOX_PIX // 2
    cores = row[usable][:, None, None] + core[:, None], column[usable][:, None, None] + core
    usable[usable] = ~(science_bad[cores] | template_bad[cores]).any(axis=(1, 2))
    cell_pix, per_cell = max(math.sqrt(ny * nx / _N_CELLS), _LEAST_CELL_PIX), _STARS_PER_CELL
    if for_ripples:
        usable &= sources.snr >= _RIPPLE_LEAST_SNR
        cell_pix, per_cell = _RIPPLE_CELL_PIX, _RIPPLE_STARS_PER_CELL
    positions = np.column_stack((sources.x, sources.y))
    tree = cKDTree(positions) if len(positions) else None
    taken: dict[tuple[int, int], int] = {}
    chosen = []
    for index in np.flatnonzero(usable):
        cell = (int(row[index] / cell_pix), int(column[index] / cell_pix))
        if taken.get(cell, 0) >= per_cell or tree is None:
            continue
        if min(tree.query_ball_point(positions[index], isolation_pix)) < index:  # sources come brightest first
            continue
        taken[cell] = taken.get(cell, 0) + 1
        chosen.append(index)
    return np.array(chosen, dtype=np.intp)


def kernel_half_width_pix(fwhm_science_pix: float, fwhm_template_pix: float) -> int:
    """Half side of a kernel that holds the basis: 2.2 times the wider FWHM, between 6 and 15 pixels."""
    return int(np.clip(np.ceil(2.2 * max(fwhm_science_pix, fwhm_template_pix)), 6, 15))


def kernel_sigmas_pix(fwhm_science_pix: float, fwhm_template_pix: float) -> tuple[float, float, float]:
    """Widths of the three Gaussians of the basis.

    The middle one is the width that Gaussian PSFs would need, ``sqrt(s_science^2 - s_template^2)``, at least 0.4
    of the wider PSF (also where the science image is sharper); the others are narrower and wider by a factor 2,
    the narrow one at least 0.7 pixels.
    """
    sigma_science, sigma_template = fwhm_science_pix / _FWHM_TO_SIGMA, fwhm_template_pix / _FWHM_TO_SIGMA
    match = math.sqrt(max(sigma_science**2 - sigma_template**2, 0.0))
    middle = max(match, 0.4 * max(sigma_science, sigma_template), 0.9)
    return max(0.5 * middle, 0.7), middle, 2.0 * middle


# What to choose from, likeliest first: PSFs vary over a detector, and the few bright stars that would show it make the
# residuals. The delta basis, dear and with the most unknowns, is tried where the Gaussians leave something to win.
KERNEL_MODELS = (*(KernelModel("broad_gauss_hermite", order) for order in (2, 1, 0, 3)), KernelModel("delta", 2))


def fit_matching_kernel(
    science: NDArray[np.floating],
    science_variance: NDArray[np.floating],
    science_bad: NDArray[np.bool_],
    template: NDArray[np.floating],
    template_variance: NDArray[np.floating],
    template_bad: NDArray[np.bool_],
    star_x: NDArray[np.floating],
    star_y: NDArray[np.floating],
    fwhm_science_pix: float,
    fwhm_template_pix: float,
    spatial_order: int = 2,
    background_order: int = 1,
    models: Sequence[KernelModel] | None = None,
    ripple_stars: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
) -> KernelSolution:
    """Fit the kernel that makes the template look like the science image.

    Minimises ``sum w (S - K(x, y) * T - b(x, y))^2`` over stamps of 27 x 27 pixels, with
    ``w = 1 / (v_S + q v_T + (0.005 r T)^2)``; q is the noise that passes a Gaussian kernel of the width the FWHMs
    ask for, times the flux ratio r squared. Within a stamp the kernel and the background are constant. Stamps
    whose flux ratio (before) is more than 5 or reduced chi-square (after each fit) more than 10 MADs out are left out.
    Of what the template's noise adds to the normal matrix 0.9 is taken off where held-out stamps gain by it (less if
    that leaves no solution): it makes a kernel blur too much, badly where the science image is the sharper one.
    Nothing is taken off if blank sky shows that the images share their noise.

    Of several `models` (the likeliest come first) the first is taken whose chi-square of held-out stamps is within one
    standard error of the best, in paired differences: all see the same stamps. A delta basis is skipped where a model
    before it leaves a held-out chi-square below 1.05, or where on 120 of the stars it falls behind the first at
    order 1. Ripples come on top of the chosen one; the chi-squares are those without them.

    Parameters
    ----------
    science, science_variance, science_bad : (ny, nx) planes, background subtracted, finite where not bad
    template, template_variance, template_bad : (ny, nx) planes on the same grid, likewise; bad pixels must hold
        finite values, and those that a bad pixel reaches through the kernel must be among the bad ones
    star_x, star_y : (n,) kernel stars, pixels; those without a whole stamp plus kernel inside the image are left out
    fwhm_science_pix, fwhm_template_pix : widths of the PSFs, which set the basis
    spatial_order : order of the kernel's polynomial, 0 to 3. Lowered until there are 4 stars per term (10 for a
        delta basis) and their positions tell the terms apart
    background_order : order of the differential background's polynomial, 0 to 2; not above the kernel's
    models : what to choose from, likeliest first, for instance `KERNEL_MODELS`; None for the Gauss-Hermite basis of
        27 functions and `spatial_order`, which else counts for nothing
    ripple_stars : x and y of the stars whose residuals are to show what varies from star to star; None for the kernel
        stars

    Returns
    -------
    KernelSolution

    Raises
    ------
    TooFewKernelStarsError : fewer than 10 stars are offered, or left after clipping
    BadKernelError : the pixels are not finite
    IllConditionedKernelError : the normal equations of no model have a solution
    KernelSumError : the kernel's sum is not within 0.5 to 2 times the flux ratio of the stars, or the stars'
        flux ratios differ over the image by more than 0.3 and 5 times the error of that

    Notes
    -----
    Cost O(n_stars stamp^2 n_basis^2 + (n_basis n_terms)^3). 613 stars, order 2, one core of an AMD EPYC with AVX-512:
    0.20 CPU s with 27 functions, 0.29 with 49 (0.38 at order 3), 0.79 with the delta basis, 0.31 for `KERNEL_MODELS`.
    """
    _require_stars(len(star_x), len(star_x), "offered")
    shape = (science.shape[0], science.shape[1])
    fwhm = max(fwhm_science_pix, fwhm_template_pix)
    bad = science_bad | template_bad
    inside = _has_whole_stamp(star_x, star_y, shape, kernel_half_width_pix(fwhm_science_pix, fwhm_template_pix))
    ratio, kept, ratios = _flux_ratio(science, template, bad, star_x[inside], star_y[inside], fwhm)
    kept = inside[kept]
    _require_stars(len(kept), len(star_x), "with whole stamps and like flux ratios")
    x, y = np.rint(star_x[kept]).astype(np.intp), np.rint(star_y[kept]).astype(np.intp)
    noise_factor = ratio**2 * _noise_factor(fwhm_science_pix, fwhm_template_pix)
    planes = _Planes(science, science_variance, template, template_variance, bad, noise_factor, _MODEL_ERROR * ratio)
    correlation = _template_noise(science, science_variance, template, template_variance, bad)
    stamps_of: dict[str, tuple[_Basis, _Stamps]] = {}
    trials: list[_Trial] = []
    failure: KernelMatchingError | None = None
    shares = (0.0, _NOISE_SHARE) if correlation.any() else (0.0,)
    for model in models or (KernelModel("gauss_hermite", spatial_order),):
        model = replace(model, spatial_order=_affordable_order(model, x, y, shape))
        if any(trial.model == model for trial in trials) or (model.basis == "delta" and _is_well_matched(trials)):
            continue
        if model.basis not in stamps_of:
            basis = _basis_of(model, fwhm_science_pix, fwhm_template_pix)
            few = np.arange(0, len(x), -(-len(x) // _DELTA_FIRST_STARS))
            if model.basis == "delta" and trials and len(few) < len(x):
                first = _measure_stamps(planes, x[few], y[few], basis, correlation)
                if not _keeps_up(
                    replace(model, spatial_order=min(model.spatial_order, 1)), basis, first, trials[0], few
                ):
                    continue
            stamps = _measure_stamps(planes, x, y, basis, correlation)
            stamps_of[model.basis] = basis, stamps
        try:
            with_shares = [_held_out_trial(model, *stamps_of[model.basis], background_order, s) for s in shares]
        except BadKernelError as error:
            failure = error
            continue
        trial = max(with_shares, key=lambda one: _gain(with_shares[0], one))
        trials.append(trial)
        shares = (trial.plan.noise_share,)  # the more flexible models go the way of the first
    if not trials:
        raise failure or BadKernelError("no kernel model was given")
    trial, scores = _choice(trials)
    stamps, order = trial.stamps, trial.model.spatial_order
    fit = _fit_clipped(stamps, np.arange(len(x)), trial.plan)
    _require_stars(len(fit.used), len(star_x), "after clipping")
    kernel_sum = float(fit.coefficients[0, 0])
    variation, variation_error = _variation_over_image(ratios, x, y, shape)
    _check_sum(kernel_sum, ratio, variation, variation_error, len(fit.used))
    background_order = min(background_order, order)
    smooth = KernelSolution(
        basis=trial.basis.functions,
        coefficients=fit.coefficients[:-1],
        background_coefficients=fit.coefficients[-1, : len(_exponents(background_order))],
        spatial_order=order,
        background_order=background_order,
        shape=shape,
        kernel_sum=kernel_sum,
        n_stars_offered=len(star_x),
        n_stars_used=len(fit.used),
        chi2=float(np.mean(_reduced_chi2(stamps, fit, fit.used))),
        validation_chi2=_trimmed_mean(trial.chi2),
        model=trial.model,
        flux_ratio=ratio,
        sum_variation=variation,
        sum_variation_error=variation_error,
        condition_number=fit.condition_number,
        noise_share=fit.plan.noise_share,
        scores=scores,
        ripples=_NO_RIPPLES,
    )
    if ripple_stars is None:
        ripple_stars = star_x[inside], star_y[inside]
    noise = smooth.noise_share * correlation
    return replace(smooth, ripples=_ripples(smooth, planes, noise, *ripple_stars, fwhm))


@dataclass(frozen=True, eq=False)
class _Planes:
    """The images; the science image is finite where not bad, and so is the template everywhere."""

    science: NDArray[np.floating]
    science_variance: NDArray[np.floating]
    template: NDArray[np.floating]
    template_variance: NDArray[np.floating]
    bad: NDArray[np.bool_]
    noise_factor: float  # of the template's variance in the weights
    model_error: float  # of the template's pixels


@njit(cache=True)
def _weigh(
    science_variance: NDArray[np.floating],
    template: NDArray[np.floating],
    template_variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    noise_factor: float,
    model_error: float,
    weight: NDArray[np.floating],
) -> None:
    """Fill the weights of pixels, 0 where bad."""
    for y in range(bad.shape[0]):
        for x in range(bad.shape[1]):
            variance = science_variance[y, x] + noise_factor * template_variance[y, x]
            variance += (model_error * template[y, x]) ** 2
            weight[y, x] = 0.0 if bad[y, x] else 1.0 / variance


@dataclass(frozen=True, eq=False)
class _Trial:
    """A model, and its reduced chi-square on the stamps held out (`which`), each by a fit that did not see it."""

    model: KernelModel
    basis: _Basis
    stamps: _Stamps
    plan: _Plan
    which: NDArray[np.intp]
    chi2: NDArray[np.float64]


def _require_stars(n_stars: int, n_offered: int, when: str) -> None:
    if n_stars < MIN_KERNEL_STARS:
        raise TooFewKernelStarsError(f"{n_stars} of {n_offered} kernel stars {when}, {MIN_KERNEL_STARS} are needed")


def _has_whole_stamp(
    x: NDArray[np.floating], y: NDArray[np.floating], shape: tuple[int, int], kernel_half_width: int
) -> NDArray[np.intp]:
    margin = _STAMP_HALF_PIX + kernel_half_width
    inside = (np.rint(x) >= margin) & (np.rint(x) < shape[1] - margin)
    inside &= (np.rint(y) >= margin) & (np.rint(y) < shape[0] - margin)
    return np.flatnonzero(inside)


def _affordable_order(model: KernelModel, x: NDArray[np.intp], y: NDArray[np.intp], shape: tuple[int, int]) -> int:
    """Spatial order that the stars' number and places afford."""
    per_term = _DELTA_STARS_PER_TERM if model.basis == "delta" else STARS_PER_SPATIAL_TERM
    order = model.spatial_order
    while order > 0 and (
        len(x) < per_term * len(_exponents(order))
        or np.linalg.cond(_position_terms(x, y, shape, order)) > _LARGEST_POSITION_CONDITION
    ):
        order -= 1
    return order


def _check_sum(kernel_sum: float, ratio: float, variation: float, variation_error: float, n_stars: int) -> None:
    low, high = _FLUX_RATIO_RANGE
    if not low * ratio < kernel_sum < high * ratio:
        raise KernelSumError(
            f"kernel sum {kernel_sum:g} is not within {low:g} to {high:g} times the stars' flux ratio {ratio:g} "
            f"({n_stars} stars)"
        )
    if variation > max(_LARGEST_SUM_VARIATION, 5.0 * variation_error):
        raise KernelSumError(
            f"flux ratio of the stars varies by {variation:.2f} +- {variation_error:.2f} of itself over the image, "
            f"{_LARGEST_SUM_VARIATION:g} is allowed ({n_stars} stars)"
        )


def _flux_ratio(
    science: NDArray[np.floating],
    template: NDArray[np.floating],
    bad: NDArray[np.bool_],
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    fwhm_pix: float,
) -> tuple[float, NDArray[np.intp], NDArray[np.float64]]:
    """Median ratio of the stars' fluxes in the good pixels of a box; the stars of about that ratio, and theirs."""
    if len(x) == 0:
        return 1.0, np.zeros(0, dtype=np.intp), np.zeros(0)
    half = int(np.clip(np.rint(fwhm_pix), 5, _STAMP_HALF_PIX))
    offset = np.arange(-half, half + 1)
    rows = np.rint(y).astype(np.intp)[:, None, None] + offset[:, None]
    columns = np.rint(x).astype(np.intp)[:, None, None] + offset[None, :]
    good = ~bad[rows, columns]
    science_flux = np.where(good, science[rows, columns], 0.0).sum(axis=(1, 2), dtype=np.float64)
    template_flux = np.where(good, template[rows, columns], 0.0).sum(axis=(1, 2), dtype=np.float64)
    positive = np.flatnonzero((science_flux > 0) & (template_flux > 0))
    if len(positive) == 0:
        return 1.0, positive, np.zeros(0)
    ratios = science_flux[positive] / template_flux[positive]
    ratio = float(np.median(ratios))
    scatter = float(np.median(np.abs(ratios - ratio)))
    # the floor lets pass what a varying PSF does to the flux in a box
    alike = np.abs(ratios - ratio) < 5.0 * _MAD_TO_SIGMA * scatter + 0.05 * ratio
    return ratio, positive[alike], ratios[alike]


def _noise_factor(fwhm_science_pix: float, fwhm_template_pix: float) -> float:
    """Sum of squares of the Gaussian kernel between two Gaussian PSFs; 1 if there is none."""
    variance_pix2 = (fwhm_science_pix**2 - fwhm_template_pix**2) / _FWHM_TO_SIGMA**2
    return float(min(1.0, 1.0 / (4.0 * np.pi * variance_pix2))) if variance_pix2 > 0 else 1.0


def _exponents(order: int) -> list[tuple[int, int]]:
    """Exponents (of x, of y) by rising total order, so that a lower order is a prefix of a higher one."""
    return [(total - j, j) for total in range(order + 1) for j in range(total + 1)]


def _scaled(position: NDArray[np.floating] | NDArray[np.integer], side: int) -> NDArray[np.float64]:
    return np.asarray(2.0 * position / max(side - 1, 1) - 1.0, dtype=np.float64)


def _position_terms(
    x: NDArray[np.floating] | NDArray[np.integer],
    y: NDArray[np.floating] | NDArray[np.integer],
    shape: tuple[int, int],
    order: int,
) -> NDArray[np.float64]:
    u, v = _scaled(x, shape[1]), _scaled(y, shape[0])
    return np.stack([u**i * v**j for i, j in _exponents(order)], axis=-1)


def _profiles(sigma: float, degree: int, half: int) -> NDArray[np.float64]:
    """One-dimensional factors of the basis: Gaussian times powers 0..degree; (degree + 1, k)."""
    u = np.arange(-half, half + 1) / sigma
    return np.stack([u**i * np.exp(-0.5 * u**2) for i in range(degree + 1)])


def _pairs(degree: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Powers (of x, of y) of one Gaussian's basis functions; the first is the Gaussian itself."""
    pairs = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
    return np.array([i for i, _ in pairs], dtype=np.intp), np.array([j for _, j in pairs], dtype=np.intp)


def _basis_of(model: KernelModel, fwhm_science_pix: float, fwhm_template_pix: float) -> _Basis:
    fwhm = max(fwhm_science_pix, fwhm_template_pix)
    if model.basis == "delta":
        return _built_basis([], _disc(int(np.clip(np.ceil(1.8 * fwhm), 5, 8))), _DELTA_STRENGTH)
    half = kernel_half_width_pix(fwhm_science_pix, fwhm_template_pix)
    if model.basis == "broad_gauss_hermite":
        sigmas = tuple(max(part * fwhm, least) for part, least in _BROAD_WIDTHS)
    else:
        sigmas = kernel_sigmas_pix(fwhm_science_pix, fwhm_template_pix)
    profiles = [_profiles(sigma, degree, half) for sigma, degree in zip(sigmas, _DEGREES[model.basis], strict=True)]
    return _built_basis(profiles, np.zeros((0, 2), dtype=np.intp), 0.0)


def _disc(radius: int) -> NDArray[np.intp]:
    """Rows and columns of the pixels of a disc, nearest to the centre first."""
    row, column = (axis.ravel() for axis in np.mgrid[-radius : radius + 1, -radius : radius + 1])
    square = row**2 + column**2
    nearest = np.argsort(square, kind="stable")
    return np.column_stack((row, column))[nearest[square[nearest] <= (radius + 0.3) ** 2]].astype(np.intp)


def _built_basis(profiles: list[NDArray[np.float64]], shifts: NDArray[np.intp], strength: float) -> _Basis:
    """Basis of either free pixels or products of profiles; function 0 gets the sum 1, all others the sum 0."""
    if profiles:
        rows, columns = _factors(profiles)
        stacked = np.concatenate(profiles)
        raw = np.einsum("cj,ci->cji", stacked[rows], stacked[columns])
    else:
        half = int(np.abs(shifts).max())
        rows, columns = np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp)
        stacked = np.zeros((0, 2 * half + 1))
        raw = np.zeros((len(shifts), 2 * half + 1, 2 * half + 1))
        raw[np.arange(len(shifts)), half + shifts[:, 0], half + shifts[:, 1]] = 1.0
    size, total = np.abs(raw).sum(axis=(1, 2)), raw.sum(axis=(1, 2))
    own = 1.0 / size
    carried = -total / size / total[0]
    own[0], carried[0] = 1.0 / total[0], 0.0
    functions = own[:, None, None] * raw + carried[:, None, None] * raw[0]
    dtype = np.float32 if strength > 0 else np.float64
    return _Basis(functions, shifts, stacked, rows, columns, own, carried, strength, dtype)


def _factors(profiles: list[NDArray[np.float64]]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which two profiles (counted through all Gaussians) make a basis function: along y, along x."""
    rows, columns, first = [], [], 0
    for profile in profiles:
        i, j = _pairs(len(profile) - 1)
        rows.append(first + j)
        columns.append(first + i)
        first += len(profile)
    return np.concatenate(rows), np.concatenate(columns)


def _roughness(functions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products of the functions' Laplacians, zero beyond the support; (n, n)."""
    padded = np.pad(functions, ((0, 0), (1, 1), (1, 1)))
    laplacian = 4.0 * padded
    for axis in (1, 2):
        laplacian -= np.roll(padded, 1, axis) + np.roll(padded, -1, axis)
    flat = laplacian.reshape(len(functions), -1)
    return np.asarray(np.einsum("ap,bp->ab", flat, flat))


# --- the template's noise ------------------------------------------------------------------------------------------


def _template_noise(
    science: NDArray[np.floating],
    science_variance: NDArray[np.floating],
    template: NDArray[np.floating],
    template_variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Autocorrelation of the template's noise in blank sky, over its stated variance; (9, 9), centred.

    All zeros where there is next to no noise, or where the science image has the same noise: then the kernel is to
    follow it.
    """
    correlation = np.zeros((2 * _NOISE_LAGS + 1, 2 * _NOISE_LAGS + 1))
    ny, nx = science.shape
    side = min(_NOISE_WINDOW_PIX, ny, nx)
    sums, counts, shared = np.zeros_like(correlation), np.zeros(correlation.shape, dtype=np.int64), np.zeros(3)
    for top in np.unique(np.linspace(0, ny - side, _N_NOISE_WINDOWS).astype(np.intp)):
        for left in np.unique(np.linspace(0, nx - side, _N_NOISE_WINDOWS).astype(np.intp)):
            window = slice(top, top + side), slice(left, left + side)
            good = ~bad[window]
            first, second = (
                np.where(good, image[window] / np.sqrt(np.where(good, variance[window], 1.0)), np.inf)
                for image, variance in ((science, science_variance), (template, template_variance))
            )
            light = np.maximum(np.abs(first), np.abs(second))
            blank = ndimage.maximum_filter(light, _BLANK_BOX_PIX) < _BLANK_SIGMA
            _add_noise_products(first, second, blank, sums, counts, shared)
    if counts.min() < 100:
        return correlation
    # exactly symmetric: the normal matrix holds directions a billionth as long as others
    correlation = (sums + sums[::-1, ::-1]) / (counts + counts[::-1, ::-1])
    noisy = correlation[_NOISE_LAGS, _NOISE_LAGS] > _LEAST_NOISE
    is_shared = shared[0] > _SHARED_NOISE * math.sqrt(shared[1] * shared[2])
    return correlation if noisy and not is_shared else np.zeros_like(correlation)


@njit(cache=True, fastmath=_FAST_MATH)
def _add_noise_products(
    science: NDArray[np.float64],
    template: NDArray[np.float64],
    blank: NDArray[np.bool_],
    sums: NDArray[np.float64],
    counts: NDArray[np.int64],
    shared: NDArray[np.float64],
) -> None:
    """Products of blank template pixels at each lag, and of both images' second differences."""
    ny, nx = template.shape
    lags = sums.shape[0] // 2
    mean, n = 0.0, 0
    for y in range(ny):
        for x in range(nx):
            if blank[y, x]:
                mean += template[y, x]
                n += 1
    mean /= max(n, 1)
    for y in range(lags, ny - lags):
        for x in range(lags, nx - lags):
            if not blank[y, x]:
                continue
            value = template[y, x] - mean
            for j in range(-lags, lags + 1):
                for i in range(-lags, lags + 1):
                    if blank[y + j, x + i]:
                        sums[lags + j, lags + i] += value * (template[y + j, x + i] - mean)
                        counts[lags + j, lags + i] += 1
            a, b = _second_difference(science, y, x), _second_difference(template, y, x)
            shared[0] += a * b
            shared[1] += a * a
            shared[2] += b * b


@njit(cache=True, fastmath=_FAST_MATH)
def _second_difference(image: NDArray[np.float64], y: int, x: int) -> float:
    """(1, -2, 1) along both axes: blind to what is smooth."""
    total = 4.0 * image[y, x]
    total -= 2.0 * (image[y - 1, x] + image[y + 1, x] + image[y, x - 1] + image[y, x + 1])
    total += image[y - 1, x - 1] + image[y - 1, x + 1] + image[y + 1, x - 1] + image[y + 1, x + 1]
    return total


# --- normal equations ------------------------------------------------------------------------------------------------


def _triangle(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.asarray(matrix[np.tril_indices(len(matrix))], dtype=np.float64)


def _with_constant(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.pad(matrix, ((0, 1), (0, 1)))


def _measure_stamps(
    planes: _Planes, x: NDArray[np.intp], y: NDArray[np.intp], basis: _Basis, correlation: NDArray[np.float64]
) -> _Stamps:
    """Normal equations of the stamps around (x, y)."""
    n_columns = len(basis.functions) + 1
    gram = np.zeros((len(x), n_columns * (n_columns + 1) // 2), dtype=basis.dtype)
    right, square = np.zeros((len(x), n_columns)), np.zeros(len(x))
    n_pixels, noise_sum = np.zeros(len(x), dtype=np.int64), np.zeros(len(x))
    side = 2 * _STAMP_HALF_PIX + 1
    reach = _STAMP_HALF_PIX + basis.functions.shape[1] // 2
    wide = np.empty((side + 2 * reach - 2 * _STAMP_HALF_PIX,) * 2, dtype=basis.dtype)
    design = np.zeros((-(-(n_columns + 1) // _TILE) * _TILE, -(-side * side // _PAD) * _PAD), dtype=basis.dtype)
    flipped = np.ascontiguousarray(basis.profiles[:, ::-1]).astype(basis.dtype)
    mixing = np.column_stack((basis.own, basis.carried)).astype(basis.dtype)
    weight = np.empty((side, side), dtype=planes.science.dtype)
    for star, (column, row) in enumerate(zip(x, y, strict=True)):
        wide[:] = planes.template[row - reach : row + reach + 1, column - reach : column + reach + 1]
        top, left = row - _STAMP_HALF_PIX, column - _STAMP_HALF_PIX
        stamp = slice(top, top + side), slice(left, left + side)
        noise2, bad = planes.template_variance[stamp], planes.bad[stamp]
        _weigh(
            planes.science_variance[stamp], planes.template[stamp], noise2, bad, planes.noise_factor,
            planes.model_error, weight,
        )  # fmt: skip
        stamp_weight = weight.astype(np.float64)
        root = np.sqrt(stamp_weight).ravel()
        data = np.where(bad, 0.0, planes.science[stamp]).ravel() * root
        _fill_design(wide, basis.shifts, flipped, basis.rows, basis.columns, mixing, root, data, design)
        _fill_gram(design, gram[star], right[star])
        square[star] = np.sum(data**2)
        n_pixels[star] = np.count_nonzero(root)
        noise_sum[star] = np.sum(stamp_weight * noise2)
    u, v = _scaled(x, planes.bad.shape[1]), _scaled(y, planes.bad.shape[0])
    flat = basis.functions.reshape(n_columns - 1, -1)
    spread = ndimage.convolve(basis.functions, correlation[np.newaxis], mode="constant").reshape(flat.shape)
    noise = _triangle(_with_constant(np.einsum("ap,bp->ab", spread, flat)))
    roughness = np.zeros_like(noise)
    if basis.strength > 0:
        rough = _roughness(basis.functions)
        diagonal = np.cumsum(np.arange(1, n_columns)) - 1
        scale = np.mean(np.sum(gram[:, diagonal], axis=1, dtype=np.float64)) / np.trace(rough)
        roughness = _triangle(_with_constant(basis.strength * scale * rough))
    return _Stamps(gram, right, square, n_pixels, noise, noise_sum, planes.noise_factor, roughness, u, v)


@njit(cache=True, fastmath=_FAST_MATH)
def _fill_design(
    wide: NDArray[np.floating],
    shifts: NDArray[np.intp],
    flipped: NDArray[np.floating],
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    mixing: NDArray[np.floating],
    root: NDArray[np.float64],
    data: NDArray[np.float64],
    design: NDArray[np.floating],
) -> None:
    """Rows: the template stamp convolved with each basis function, a constant, all times root weight; the data."""
    n_profiles, k = flipped.shape
    side = int(math.sqrt(len(root)))
    half = (wide.shape[0] - side) // 2
    n_shifts, n_functions = len(shifts), len(mixing)
    for basis in range(n_shifts):
        for y in range(side):
            source = wide[half + y - shifts[basis, 0]]
            for x in range(side):
                design[basis, y * side + x] = source[half + x - shifts[basis, 1]]
    along_x = np.zeros((n_profiles, wide.shape[0], side), dtype=wide.dtype)
    for profile in range(n_profiles):
        for y in range(wide.shape[0]):
            total = along_x[profile, y]
            for tap in range(k):
                value = flipped[profile, tap]
                for x in range(side):
                    total[x] += value * wide[y, x + tap]
    for basis in range(n_shifts, n_functions):
        design[basis] = 0.0
        for y in range(side):
            total = design[basis, y * side : (y + 1) * side]
            for tap in range(k):
                value = flipped[rows[basis - n_shifts], tap]
                source = along_x[columns[basis - n_shifts], y + tap]
                for x in range(side):
                    total[x] += value * source[x]
    # last to first, so that function 0 is still raw when the others take their part of it
    for basis in range(n_functions - 1, -1, -1):
        own, carried = mixing[basis, 0], mixing[basis, 1]
        for pixel in range(side * side):
            design[basis, pixel] = (own * design[basis, pixel] + carried * design[0, pixel]) * root[pixel]
    design[n_functions, : side * side] = root
    design[n_functions + 1, : side * side] = data


@njit(cache=True, fastmath=_FAST_MATH)
def _products_of_rows(
    left: NDArray[np.floating], right: NDArray[np.floating], n: int, out: NDArray[np.floating]
) -> None:
    """Dot products of the first n entries of 4 rows with those of 4 others: 16 sums at a time stay in registers."""
    a0, a1, a2, a3 = left[0], left[1], left[2], left[3]
    b0, b1, b2, b3 = right[0], right[1], right[2], right[3]
    zero = a0[0] - a0[0]  # of the arrays' own precision
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = zero
    for k in range(n):
        x0, x1, x2, x3 = a0[k], a1[k], a2[k], a3[k]
        y0, y1, y2, y3 = b0[k], b1[k], b2[k], b3[k]
        s00 += x0 * y0
        s01 += x0 * y1
        s02 += x0 * y2
        s03 += x0 * y3
        s10 += x1 * y0
        s11 += x1 * y1
        s12 += x1 * y2
        s13 += x1 * y3
        s20 += x2 * y0
        s21 += x2 * y1
        s22 += x2 * y2
        s23 += x2 * y3
        s30 += x3 * y0
        s31 += x3 * y1
        s32 += x3 * y2
        s33 += x3 * y3
    out[0, 0], out[0, 1], out[0, 2], out[0, 3] = s00, s01, s02, s03
    out[1, 0], out[1, 1], out[1, 2], out[1, 3] = s10, s11, s12, s13
    out[2, 0], out[2, 1], out[2, 2], out[2, 3] = s20, s21, s22, s23
    out[3, 0], out[3, 1], out[3, 2], out[3, 3] = s30, s31, s32, s33


@njit(cache=True, fastmath=_FAST_MATH)
def _fill_gram(design: NDArray[np.floating], gram: NDArray[np.floating], right: NDArray[np.float64]) -> None:
    """Lower triangle of the products of the design's rows; those with the data go to `right`."""
    n_rows, n_pixels = design.shape
    n_columns = len(right)
    out = np.zeros((4, 4), dtype=design.dtype)
    for first in range(0, n_rows, 4):
        for second in range(0, first + 4, 4):
            _products_of_rows(design[first : first + 4], design[second : second + 4], n_pixels, out)
            for i in range(4):
                for j in range(4):
                    row, column = first + i, second + j
                    if row < n_columns and column <= row:
                        gram[row * (row + 1) // 2 + column] = out[i, j]
                    elif row == n_columns and column < n_columns:
                        right[column] = out[i, j]


# --- solving ----------------------------------------------------------------------------------------------------


def _held_out_trial(
    model: KernelModel, basis: _Basis, stamps: _Stamps, background_order: int, noise_share: float
) -> _Trial:
    """Fit without a fifth of the stamps, and that in turn for as many fifths as make enough stamps."""
    n = len(stamps.square)
    n_folds = min(max(-(-_ENOUGH_HELD_OUT * _N_FOLDS // n), 1), _N_FOLDS)
    plan = _Plan(model.spatial_order, min(background_order, model.spatial_order), noise_share)
    fold = np.arange(n) % _N_FOLDS  # stars come in order of brightness
    which, chi2 = [], []
    for left_out in range(_N_FOLDS - 1, _N_FOLDS - 1 - n_folds, -1):
        fit = _fit_clipped(stamps, np.flatnonzero(fold != left_out), plan)
        plan = fit.plan
        which.append(np.flatnonzero(fold == left_out))
        chi2.append(_reduced_chi2(stamps, fit, which[-1]))
    return _Trial(model, basis, stamps, plan, np.concatenate(which), np.concatenate(chi2))


def _gain(plain: _Trial, other: _Trial) -> float:
    """Held-out chi-square that a trial saves, if that is more than its error and worth more noise; 0 if not."""
    gain, error = _mean_and_error(plain.chi2 - other.chi2)
    return gain if gain > max(error, _LEAST_GAIN) else 0.0


def _is_well_matched(trials: Sequence[_Trial]) -> bool:
    return any(_trimmed_mean(trial.chi2) < _DELTA_ABOVE_CHI2 for trial in trials)


def _keeps_up(model: KernelModel, basis: _Basis, stamps: _Stamps, other: _Trial, which: NDArray[np.intp]) -> bool:
    """Whether a model matches some stamps no worse than another's basis, at the same order, but for the error."""
    order, share = other.plan.background_order, other.plan.noise_share
    try:
        own = _held_out_trial(model, basis, stamps, order, share)
    except IllConditionedKernelError:
        return False
    same = replace(other.model, spatial_order=model.spatial_order)
    rival = _held_out_trial(same, other.basis, _some_stamps(other.stamps, which), order, share)
    return _choice([own, rival])[0] is own


def _some_stamps(stamps: _Stamps, which: NDArray[np.intp]) -> _Stamps:
    names = ("gram", "right", "square", "n_pixels", "noise_sum", "u", "v")
    return replace(stamps, **{name: getattr(stamps, name)[which] for name in names})


def _choice(trials: Sequence[_Trial]) -> tuple[_Trial, tuple[ModelScore, ...]]:
    """The first model that is within its error of the best; scores of all, the chosen one first."""
    chi2 = np.stack([trial.chi2 for trial in trials])
    least = chi2.min(axis=0)
    middle = np.median(least)
    # stamps that no model matches hold something that varies
    fit_to_judge = least <= middle + _CLIP_MADS * _MAD_TO_SIGMA * np.median(np.abs(least - middle)) + 1e-12
    chi2 = chi2[:, fit_to_judge]
    best = int(np.argmin(chi2.mean(axis=1)))
    chosen = best
    for index in range(len(trials)):
        excess, error = _mean_and_error(chi2[index] - chi2[best])
        if excess <= error:
            chosen = index
            break
    order = [chosen] + [index for index in range(len(trials)) if index != chosen]
    scores = tuple(
        ModelScore(trials[index].model, float(chi2[index].mean()), *_mean_and_error(chi2[index] - chi2[chosen]))
        for index in order
    )
    return trials[chosen], scores


def _trimmed_mean(values: NDArray[np.float64]) -> float:
    n_cut = len(values) // 10
    return float(np.sort(values)[n_cut : len(values) - n_cut].mean())


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / math.sqrt(max(len(values) - 1, 1)))


def _fit_clipped(stamps: _Stamps, offered: NDArray[np.intp], plan: _Plan) -> _Fit:
    """Solve, leave out the stamps that are matched badly, solve again until no more are to be left out."""
    used = offered
    fit = _solve_with_less_noise(stamps, used, plan)
    for _ in range(_MAX_CLIPS):
        chi2 = _reduced_chi2(stamps, fit, offered)
        now = chi2[np.isin(offered, used)]
        middle = np.median(now)
        scatter = _MAD_TO_SIGMA * np.median(np.abs(now - middle))
        kept = offered[chi2 <= middle + _CLIP_MADS * scatter]
        if np.array_equal(kept, used):
            break
        used = kept
        fit = _solve_with_less_noise(stamps, used, fit.plan)
    return fit


def _solve_with_less_noise(stamps: _Stamps, used: NDArray[np.intp], plan: _Plan) -> _Fit:
    """Solve; take less of the noise off where the matrix is not positive without it, or nearly singular."""
    for part in _LESS_NOISE:
        less = replace(plan, noise_share=part * plan.noise_share)
        fit = _solve(stamps, used, less)
        if fit is not None and (less.noise_share == 0 or _is_quiet(stamps, fit)):
            return fit
        if plan.noise_share == 0:
            break
    raise IllConditionedKernelError(
        f"normal equations of {len(used)} stamps for {stamps.n_columns} columns of order {plan.order} are singular"
    )


def _solve(stamps: _Stamps, used: NDArray[np.intp], plan: _Plan) -> _Fit | None:
    """Weighted least squares over stamps: the sum of (gram of a stamp) x (terms terms^T), one Cholesky."""
    terms, products = _exponents(plan.order), _exponents(2 * plan.order)
    place = {exponent: index for index, exponent in enumerate(products)}
    product_of = np.array([[place[i + k, j + m] for k, m in terms] for i, j in terms])
    monomials = np.stack([stamps.u[used] ** i * stamps.v[used] ** j for i, j in products], axis=1)
    free = np.ones((stamps.n_columns, len(terms)), dtype=np.bool_)
    free[0, 1:] = False  # the kernel's sum does not depend on position
    free[-1, len(_exponents(plan.background_order)) :] = False
    n_free = np.count_nonzero(free)
    place_of = np.full(free.shape, -1)
    place_of[free] = np.arange(n_free)
    moments = _moments(stamps.gram, used, monomials)
    moments += monomials.sum(axis=0)[:, np.newaxis] * stamps.roughness
    noise = plan.noise_share * np.einsum("s,sm->m", stamps.noise_sum[used], monomials)
    moments -= noise[:, np.newaxis] * stamps.noise
    normal = _normal_matrix(moments, product_of, place_of, -(-n_free // _TILE) * _TILE)
    right = np.zeros(len(normal))
    right[:n_free] = np.einsum("si,sa->ia", stamps.right[used], monomials[:, : len(terms)])[free]
    diagonal = np.diag(normal)
    if not np.all(np.isfinite(diagonal)) or not np.all(np.isfinite(right)):
        raise BadKernelError(f"normal equations of {len(used)} stamps are not finite")
    if np.any(diagonal <= 0):
        return None
    scale = 1.0 / np.sqrt(diagonal)
    normal *= scale[:, np.newaxis]
    normal *= scale
    normal[np.diag_indices_from(normal)] += _RIDGE
    largest = _largest_eigenvalue(normal)
    if not _factorise(normal):
        return None
    right *= scale
    _substitute(normal, right)
    coefficients = np.zeros(free.shape)
    coefficients[free] = (right * scale)[:n_free]
    return _Fit(coefficients, used, plan, largest * _largest_inverse_eigenvalue(normal))


@njit(cache=True, fastmath=_FAST_MATH)
def _moments(gram: NDArray[np.floating], used: NDArray[np.intp], monomials: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over stamps of monomials in position times gram; (n_monomials, e)."""
    n_entries, n_monomials = gram.shape[1], monomials.shape[1]
    total = np.zeros((n_monomials, n_entries))
    for start in range(0, n_entries, 1024):  # what is summed up stays in the cache
        stop = min(start + 1024, n_entries)
        for index in range(len(used)):
            row = gram[used[index], start:stop]
            for monomial in range(n_monomials):
                value, target = monomials[index, monomial], total[monomial, start:stop]
                for entry in range(stop - start):
                    target[entry] += value * row[entry]
    return total


@njit(cache=True)
def _normal_matrix(
    moments: NDArray[np.float64], product_of: NDArray[np.intp], place_of: NDArray[np.intp], side: int
) -> NDArray[np.float64]:
    """Lower triangle of the normal matrix; rows and columns beyond the unknowns are those of the unit matrix."""
    normal = np.zeros((side, side))
    n_columns, n_terms = place_of.shape
    for first in range(n_columns):
        for a in range(n_terms):
            row = place_of[first, a]
            if row < 0:
                continue
            for second in range(first + 1):
                entry = first * (first + 1) // 2 + second
                for b in range(n_terms):
                    column = place_of[second, b]
                    if 0 <= column <= row:
                        normal[row, column] = moments[product_of[a, b], entry]
    for row in range(place_of.max() + 1, side):
        normal[row, row] = 1.0
    return normal


@njit(cache=True, fastmath=_FAST_MATH)
def _factorise(matrix: NDArray[np.float64]) -> bool:
    """Cholesky factor in place of the lower triangle; False if the matrix is not positive definite."""
    n = len(matrix)
    out = np.zeros((4, 4))
    for block in range(0, n, 64):  # 64 rows stay in the cache while the factor passes by
        end = min(block + 64, n)
        for column in range(0, end, 4):
            for row in range(max(block, column), end, 4):
                _products_of_rows(matrix[row : row + 4], matrix[column : column + 4], column, out)
                for i in range(4):
                    for j in range(4 if row > column else i + 1):
                        total = matrix[row + i, column + j] - out[i, j]
                        for k in range(column, column + j):
                            total -= matrix[row + i, k] * matrix[column + j, k]
                        if row + i > column + j:
                            matrix[row + i, column + j] = total / matrix[column + j, column + j]
                        elif total > 0.0:
                            matrix[row + i, row + i] = math.sqrt(total)
                        else:
                            return False
    return True


@njit(cache=True, fastmath=_FAST_MATH)
def _substitute(factor: NDArray[np.float64], right: NDArray[np.float64]) -> None:
    """Solve with a Cholesky factor, in place of `right`."""
    for row in range(len(right)):
        total = right[row]
        for column in range(row):
            total -= factor[row, column] * right[column]
        right[row] = total / factor[row, row]
    for row in range(len(right) - 1, -1, -1):
        value = right[row] / factor[row, row]
        right[row] = value
        for column in range(row):
            right[column] -= factor[row, column] * value


@njit(cache=True, fastmath=_FAST_MATH)
def _largest_eigenvalue(matrix: NDArray[np.float64]) -> float:
    """Of the symmetric matrix with this lower triangle, by power iteration: a lower bound, near it."""
    n = len(matrix)
    vector, size = np.ones(n), 1.0
    for _ in range(_POWER_STEPS):
        image = np.zeros(n)
        for row in range(n):
            value, total = vector[row], matrix[row, row] * vector[row]
            for column in range(row):
                total += matrix[row, column] * vector[column]
                image[column] += matrix[row, column] * value
            image[row] += total
        size = math.sqrt(np.sum(image * image) / np.sum(vector * vector))
        vector = image / math.sqrt(np.sum(image * image))
    return size


@njit(cache=True, fastmath=_FAST_MATH)
def _largest_inverse_eigenvalue(factor: NDArray[np.float64]) -> float:
    """Of the inverse of the matrix with this Cholesky factor, likewise."""
    n = len(factor)
    vector = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    size = 1.0
    for _ in range(_POWER_STEPS):
        before = math.sqrt(np.sum(vector * vector))
        _substitute(factor, vector)
        after = math.sqrt(np.sum(vector * vector))
        size = after / before
        vector /= after
    return size


def _reduced_chi2(stamps: _Stamps, fit: _Fit, which: NDArray[np.intp]) -> NDArray[np.float64]:
    """Chi-square per pixel, as if the template's noise passed any kernel with the weights' noise factor.

    So it is mismatch, not noise, that tells kernels apart; the noise that passes is in the difference's variance.
    """
    local = _local_coefficients(stamps, fit, which)
    chi2 = stamps.square[which] - 2.0 * np.sum(local * stamps.right[which], axis=1)
    chi2 += _quadratic_forms(stamps.gram, which, local)
    if stamps.noise.any():
        chi2 += stamps.noise_sum[which] * (stamps.noise_factor - _noise_passed(stamps, fit, which))
    return np.asarray(chi2 / stamps.n_pixels[which])


def _is_quiet(stamps: _Stamps, fit: _Fit) -> bool:
    most = _MOST_NOISE * fit.coefficients[0, 0] ** 2
    return bool(np.all(_noise_passed(stamps, fit, fit.used) <= most))


def _noise_passed(stamps: _Stamps, fit: _Fit, which: NDArray[np.intp]) -> NDArray[np.float64]:
    """Variance of the convolved template over that of the template, at stamps."""
    local = _local_coefficients(stamps, fit, which)
    return _quadratic_forms(stamps.noise[np.newaxis], np.zeros(len(which), dtype=np.intp), local)


def _local_coefficients(stamps: _Stamps, fit: _Fit, which: NDArray[np.intp]) -> NDArray[np.float64]:
    u, v = stamps.u[which], stamps.v[which]
    terms = np.stack([u**i * v**j for i, j in _exponents(fit.plan.order)], axis=1)
    return np.asarray(np.einsum("st,ct->sc", terms, fit.coefficients))


@njit(cache=True, fastmath=_FAST_MATH)
def _quadratic_forms(
    triangles: NDArray[np.floating], which: NDArray[np.intp], vectors: NDArray[np.float64]
) -> NDArray[np.float64]:
    forms = np.zeros(len(which))
    n_columns = vectors.shape[1]
    for index in range(len(which)):
        vector, first = vectors[index], 0
        for row in range(n_columns):
            entries, total = triangles[which[index], first : first + row + 1], 0.0
            for column in range(row):
                total += entries[column] * vector[column]
            forms[index] += vector[row] * (2.0 * total + entries[row] * vector[row])
            first += row + 1
    return forms


# --- ripples ----------------------------------------------------------------------------------------------------

_N_RIPPLES = 5
_NO_RIPPLES = Ripples(np.zeros(0), np.zeros(0), np.zeros((_N_RIPPLES, 0)), np.ones(_N_RIPPLES))


def _ripples(
    kernel: KernelSolution,
    planes: _Planes,
    noise: NDArray[np.float64],
    star_x: NDArray[np.floating],
    star_y: NDArray[np.floating],
    fwhm_pix: float,
) -> Ripples:
    """What the residuals of stars have in common with those of their neighbours.

    The flux and the background of each star are free: a star that varies changes nothing. As in the kernel's own fit
    the template's noise is in the residual and in the derivatives alike, and what it adds (autocorrelation `noise`,
    with the kernel of the image's centre) is taken off.
    """
    half = max(int(np.rint(_RIPPLE_STAMP_FWHM * fwhm_pix)), 5)
    margin = half + 1 + kernel.basis.shape[1] // 2
    column, row = np.rint(star_x).astype(np.intp), np.rint(star_y).astype(np.intp)
    inside = (column >= margin) & (column < kernel.shape[1] - margin)
    inside &= (row >= margin) & (row < kernel.shape[0] - margin)
    x, y = column[inside].astype(np.float64), row[inside].astype(np.float64)
    background = np.einsum(
        "nt,t->n", _position_terms(x, y, kernel.shape, kernel.background_order), kernel.background_coefficients
    )
    normal, right, noise_sum = _star_equations(
        planes.science,
        planes.science_variance,
        planes.template,
        planes.template_variance,
        planes.bad,
        planes.noise_factor,
        planes.model_error,
        column[inside],
        row[inside],
        kernel.kernels_at(x, y),
        background,
        half,
    )
    added = noise_sum[:, np.newaxis, np.newaxis] * _noise_products(kernel, noise)
    normal -= added
    right += added[:, _N_RIPPLES]
    scale = np.sqrt(np.maximum(np.einsum("naa->na", normal), 1e-300))
    scaled = normal / (scale[:, :, np.newaxis] * scale[:, np.newaxis])
    known = np.flatnonzero(np.linalg.eigvalsh(scaled)[:, 0] > _LEAST_MODE_EIGENVALUE)
    covariance = np.linalg.inv(normal[known])
    x, y = x[known], y[known]
    amplitudes = np.einsum("nab,nb->na", covariance, right[known])[:, :_N_RIPPLES]
    variances = np.einsum("naa->na", covariance)[:, :_N_RIPPLES]
    known = np.arange(len(x))
    # a source beside a star looks like a shift, but a large one
    for mode in range(_N_RIPPLES):
        found, error2 = amplitudes[known, mode], variances[known, mode]
        likely = found**2 / (error2 + _power(found, error2))
        known = known[likely < _MOST_RIPPLE**2]
    x, y, amplitudes, variances = x[known], y[known], amplitudes[known], variances[known]
    pairs = cKDTree(np.column_stack((x, y))).query_pairs(_RIPPLE_REACHES_PIX[-1], output_type="ndarray")
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))] if len(pairs) else np.zeros((0, 2), dtype=np.intp)
    apart = np.hypot(x[pairs[:, 0]] - x[pairs[:, 1]], y[pairs[:, 0]] - y[pairs[:, 1]])
    alike = [_alikeness(apart / reach) for reach in _RIPPLE_REACHES_PIX]
    fields = [_smooth_field(amplitudes[:, m], variances[:, m], pairs, alike) for m in range(_N_RIPPLES)]
    return Ripples(x, y, np.array([weights for weights, _ in fields]), np.array([reach for _, reach in fields]))


def _power(values: NDArray[np.float64], variance: NDArray[np.float64]) -> float:
    """Variance of the true values about 0, robustly: that which makes 68 % of them lie within one of their sigma."""
    if len(values) == 0:
        return 0.0
    low, high = 0.0, float(np.max(values**2))
    for _ in range(40):
        middle = 0.5 * (low + high)
        weight = 1.0 / (variance + middle)  # those count that tell it from noise
        beyond = float(np.sum(weight * (values**2 > variance + middle)) / weight.sum())
        low, high = (middle, high) if beyond > _BEYOND_SIGMA else (low, middle)
    return 0.5 * (low + high)


def _noise_products(kernel: KernelSolution, noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean products of the modes of the template's noise, convolved with the kernel; (7, 7)."""
    middle = np.array([0.5 * (side - 1) for side in kernel.shape])
    stamp = np.pad(kernel.kernels_at(middle[1:], middle[:1])[0], 6)
    spread = ndimage.convolve(stamp, noise, mode="constant")
    modes, spread_modes = (np.zeros((_N_RIPPLES + 2, (len(stamp) - 2) ** 2)) for _ in range(2))
    _fill_modes(stamp, modes)
    _fill_modes(spread, spread_modes)
    products = np.einsum("ap,bp->ab", spread_modes, modes)
    products[-1], products[:, -1] = 0.0, 0.0  # the constant has no noise
    return np.asarray(products)


def _alikeness(apart: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wendland's function of distances in units of the reach."""
    square = np.square(np.maximum(1.0 - apart, 0.0))
    return np.asarray(square * square * (4.0 * apart + 1.0))


def _smooth_field(
    values: NDArray[np.float64],
    variance: NDArray[np.float64],
    pairs: NDArray[np.intp],
    alike: Sequence[NDArray[np.float64]],
) -> tuple[NDArray[np.float64], float]:
    """Weights and reach of the Gaussian process through values that neighbours share; zeros if they share nothing.

    `alike` says for each reach how alike pairs are. The field's power is the mean product of neighbours' values,
    weighted as for independent ones.
    """
    n = len(values)
    if n == 0:
        return np.zeros(0), 1.0
    scatter = _power(values, variance)
    weight = 1.0 / (variance + scatter)
    both = weight[pairs[:, 0]] * weight[pairs[:, 1]]
    products = both * values[pairs[:, 0]] * values[pairs[:, 1]]
    most, reach, power, shape = _LEAST_RIPPLE_SIGNIFICANCE, 1.0, 0.0, np.zeros(len(pairs))
    for trial, near in zip(_RIPPLE_REACHES_PIX, alike, strict=True):
        size = float(np.sum(both * near**2))
        significance = float(np.sum(products * near)) / math.sqrt(max(size, 1e-300))
        if significance > most:
            most, reach, power, shape = significance, trial, significance / math.sqrt(size), near
    if power == 0.0:
        return np.zeros(n), reach
    diagonal = variance + max(scatter, power)
    close = np.flatnonzero(shape)
    return power * _solved(pairs[close], power * shape[close], diagonal, values), reach


@njit(cache=True)
def _solved(
    pairs: NDArray[np.int64], off: NDArray[np.float64], diagonal: NDArray[np.float64], right: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Solve a sparse symmetric positive definite system by conjugate gradients, scaled to a diagonal of ones."""
    scale = 1.0 / np.sqrt(diagonal)
    solution = np.zeros(len(right))
    residual = right * scale
    direction = residual.copy()
    square = np.sum(residual * residual)
    goal = square * _SOLVER_PRECISION**2
    for _ in range(_SOLVER_STEPS):
        if square <= goal:
            break
        image = direction.copy()
        for pair in range(len(off)):
            i, j = pairs[pair, 0], pairs[pair, 1]
            value = off[pair] * scale[i] * scale[j]
            image[i] += value * direction[j]
            image[j] += value * direction[i]
        step = square / np.sum(direction * image)
        solution += step * direction
        residual -= step * image
        before = square
        square = np.sum(residual * residual)
        direction = residual + (square / before) * direction
    return solution * scale


@njit(cache=True, fastmath=_FAST_MATH)
def _star_equations(
    science: NDArray[np.floating],
    science_variance: NDArray[np.floating],
    template: NDArray[np.floating],
    template_variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    noise_factor: float,
    model_error: float,
    columns: NDArray[np.intp],
    rows: NDArray[np.intp],
    kernels: NDArray[np.float64],
    background: NDArray[np.float64],
    half: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Normal equations of the modes in each star's residual, and its template variance times weight."""
    n, side, k = len(columns), 2 * half + 1, kernels.shape[1]
    margin = half + 1 + k // 2
    normal, right, noise_sum = np.zeros((n, 7, 7)), np.zeros((n, 7)), np.zeros(n)
    height, width = -(-(side + 2) // 4) * 4, -(-(side + 2) // 32) * 32  # whole tiles
    around = np.zeros((height + k - 1, width + k - 1), dtype=np.float32)
    mirrored, matched = np.zeros((k + 6, k), dtype=np.float32), np.zeros((height, width), dtype=np.float32)
    model, modes = np.zeros((side + 2, side + 2)), np.zeros((7, side * side))
    weights, residual = np.zeros(side * side), np.zeros(side * side)
    weight = np.zeros((side, side), dtype=science.dtype)
    for star in range(n):
        top, left = rows[star] - margin, columns[star] - margin
        for y in range(side + k + 1):
            for x in range(side + k + 1):
                around[y, x] = template[top + y, left + x]
        for y in range(k):
            for x in range(k):
                mirrored[3 + y, x] = kernels[star, k - 1 - y, k - 1 - x]
        convolve_stamp(around, mirrored, matched)
        model[:] = matched[: side + 2, : side + 2]
        _fill_modes(model, modes)
        inside = (
            slice(rows[star] - half, rows[star] + half + 1),
            slice(columns[star] - half, columns[star] + half + 1),
        )
        noise2, is_bad, pixels = template_variance[inside], bad[inside], science[inside]
        _weigh(science_variance[inside], template[inside], noise2, is_bad, noise_factor, model_error, weight)
        for y in range(side):
            for x in range(side):
                weights[y * side + x] = weight[y, x]
                value = 0.0 if is_bad[y, x] else pixels[y, x]
                residual[y * side + x] = value - background[star] - modes[5, y * side + x]
                noise_sum[star] += weight[y, x] * noise2[y, x]
        for a in range(7):
            weighted = modes[a] * weights
            right[star, a] = np.sum(weighted * residual)
            for b in range(a + 1):
                normal[star, a, b] = np.sum(weighted * modes[b])
                normal[star, b, a] = normal[star, a, b]
    return normal, right, noise_sum


@njit(cache=True)
def _fill_modes(model: NDArray[np.float64], modes: NDArray[np.float64]) -> None:
    """Derivatives of a model with a rim of a pixel, the model itself, and a constant."""
    side = model.shape[0] - 2
    for y in range(side):
        for x in range(side):
            _derivatives(model, y + 1, x + 1, modes[:, y * side + x])
            modes[5, y * side + x] = model[y + 1, x + 1]
            modes[6, y * side + x] = 1.0


@njit(cache=True)
def _derivatives(image: NDArray[np.float64], y: int, x: int, out: NDArray[np.float64]) -> None:
    left, right, below, above = image[y, x - 1], image[y, x + 1], image[y - 1, x], image[y + 1, x]
    bend_x, bend_y = right + left - 2.0 * image[y, x], above + below - 2.0 * image[y, x]
    out[0] = 0.5 * (right - left)
    out[1] = 0.5 * (above - below)
    out[2] = bend_x + bend_y
    out[3] = bend_x - bend_y
    out[4] = 0.5 * (image[y + 1, x + 1] - image[y + 1, x - 1] - image[y - 1, x + 1] + image[y - 1, x - 1])


@njit(cache=True)
def _add_ripples(kernels: NDArray[np.float64], amplitudes: NDArray[np.float64]) -> None:
    """Add amplitudes times derivatives to each kernel, in place; kernels end in zeros, sums are kept."""
    side = kernels.shape[1]
    padded = np.zeros((side + 2, side + 2))
    slopes = np.zeros(5)
    for index in range(len(kernels)):
        if not np.any(amplitudes[index]):
            continue
        padded[1:-1, 1:-1] = kernels[index]
        before = np.sum(kernels[index])
        for y in range(side):
            for x in range(side):
                _derivatives(padded, y + 1, x + 1, slopes)
                for ripple in range(5):
                    kernels[index, y, x] += amplitudes[index, ripple] * slopes[ripple]
        kernels[index, side // 2, side // 2] += before - np.sum(kernels[index])  # what passed the edge


@njit(cache=True)
def _add_fields(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    star_x: NDArray[np.float64],
    star_y: NDArray[np.float64],
    weights: NDArray[np.float64],
    reaches: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Stars by rising y; `weights` (n, 5)."""
    most = np.max(reaches)
    for place in range(len(x)):
        first = np.searchsorted(star_y, y[place] - most)
        for star in range(first, len(star_x)):
            if star_y[star] >= y[place] + most:
                break
            square = (x[place] - star_x[star]) ** 2 + (y[place] - star_y[star]) ** 2
            if square >= most**2:
                continue
            distance = math.sqrt(square)
            for ripple in range(len(reaches)):
                part = distance / reaches[ripple]
                if part < 1.0:
                    out[place, ripple] += weights[star, ripple] * (1.0 - part) ** 4 * (4.0 * part + 1.0)


def _variation_over_image(
    ratios: NDArray[np.float64], x: NDArray[np.intp], y: NDArray[np.intp], shape: tuple[int, int]
) -> tuple[float, float]:
    """Largest relative difference over the image of a plane through flux ratios, and its error."""
    plane = _position_terms(x, y, shape, 1)
    normal = np.einsum("sa,sb->ab", plane, plane)
    if np.linalg.cond(normal) > _LARGEST_POSITION_CONDITION**2:
        return 0.0, np.inf  # stars on a line
    covariance = np.linalg.inv(normal)
    values = np.einsum("ab,b->a", covariance, np.einsum("sa,s->a", plane, ratios))
    residual = ratios - np.einsum("sa,a->s", plane, values)
    scatter = math.sqrt(float(np.sum(residual**2)) / max(len(ratios) - 3, 1))
    error = 2.0 * scatter * math.sqrt(float(np.sum(np.diag(covariance)[1:])))
    return 2.0 * float(np.sum(np.abs(values[1:]))) / abs(values[0]), error / abs(float(values[0]))

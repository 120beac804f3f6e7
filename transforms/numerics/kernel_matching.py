"""Matching kernel between a template and a science image (Alard & Lupton 1998; Alard 2000).

The kernel is a sum of Gaussians times polynomials whose coefficients are polynomials of the position. It is fitted
to stamps around stars by weighted least squares; the normal matrix of each stamp is kept, so that leaving stamps
out and solving again costs next to nothing. Sums are numba loops and plain einsum, not BLAS, whose rounding depends
on its number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from transforms.numerics.psf_modelling import DetectedSources

MIN_KERNEL_STARS = 10
STARS_PER_SPATIAL_TERM = 4  # order 2 (6 terms) needs 24 stars, order 1 (3 terms) 12, else order 0
_STAMP_HALF_PIX = 13
_CORE_BOX_PIX = 9  # no bad pixel of either image may lie in the box of this side around a kernel star
_N_CELLS = 200  # kernel stars are spread over about so many square cells
_LEAST_CELL_PIX = 64
_STARS_PER_CELL = 2
_DEGREES = (4, 2, 2)
_N_COLUMNS = sum((degree + 1) * (degree + 2) // 2 for degree in _DEGREES)
_MODEL_ERROR = 0.005  # of the local flux: keeps the brightest stars from ruling the fit
_CLIP_MADS = 5.0  # at 3 the brightest stars go where the science image is sharper, and residuals grow by 15 %
_MAD_TO_SIGMA = 1.4826
_MAX_CLIPS = 6
_RIDGE = 1e-9  # of the diagonal
_FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
_VALIDATION_EVERY = 5
_FLUX_RATIO_RANGE = (0.2, 5.0)
_FWHM_TO_SIGMA = 2.3548


class KernelMatchingError(ValueError):
    """No usable kernel; the message carries the evidence."""


class TooFewKernelStarsError(KernelMatchingError):
    """Fewer stars than a kernel needs, before or after clipping."""


class BadKernelError(KernelMatchingError):
    """A kernel was found and is not to be believed."""


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
    validation_chi2 : median reduced chi-square of the fifth of the stamps that a first fit did not see
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

    def kernels_at(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float64]:
        """Kernels at positions (n,) in pixels; returns (n, k, k)."""
        terms = _position_terms(x, y, self.shape, self.spatial_order)
        side = self.basis.shape[1]
        local = np.einsum("nt,bt->nb", terms, self.coefficients)
        kernels = np.einsum("nb,bp->np", local, self.basis.reshape(len(self.basis), -1))
        return kernels.reshape(-1, side, side)

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
class _Stamps:
    """Normal equations of each stamp in its own local coefficients: kernel columns, then a constant."""

    gram: NDArray[np.float64]  # (n, c, c)
    right: NDArray[np.float64]  # (n, c)
    square: NDArray[np.float64]  # (n,) weighted sum of squares of the science pixels
    n_pixels: NDArray[np.int64]  # (n,) used
    terms: NDArray[np.float64]  # (n, t) polynomial terms at the stamp
    free: NDArray[np.bool_]  # (c, t) which coefficients the fit may use


def select_kernel_stars(
    sources: DetectedSources,
    science_bad: NDArray[np.bool_],
    template_bad: NDArray[np.bool_],
    kernel_half_width_pix: int,
    isolation_pix: float,
    min_snr: float = 20.0,
    max_snr: float = 2000.0,
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

    Returns
    -------
    (n,) indices into `sources`, in order of decreasing flux
    """
    ny, nx = science_bad.shape
    margin = _STAMP_HALF_PIX + kernel_half_width_pix + 1
    column, row = np.rint(sources.x).astype(np.intp), np.rint(sources.y).astype(np.intp)
    usable = (sources.snr >= min_snr) & (sources.snr <= max_snr) & sources.clean
    usable &= (column >= margin) & (column < nx - margin) & (row >= margin) & (row < ny - margin)
    near_bad = ndimage.maximum_filter(science_bad | template_bad, _CORE_BOX_PIX)
    usable[usable] &= ~near_bad[row[usable], column[usable]]
    cell_pix = max(math.sqrt(ny * nx / _N_CELLS), _LEAST_CELL_PIX)
    positions = np.column_stack((sources.x, sources.y))
    tree = cKDTree(positions) if len(positions) else None
    taken: dict[tuple[int, int], int] = {}
    chosen = []
    for index in np.flatnonzero(usable):
        cell = (int(row[index] / cell_pix), int(column[index] / cell_pix))
        if taken.get(cell, 0) >= _STARS_PER_CELL or tree is None:
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
) -> KernelSolution:
    """Fit the kernel that makes the template look like the science image.

    Minimises ``sum w (S - K(x, y) * T - b(x, y))^2`` over stamps of 27 x 27 pixels, with
    ``w = 1 / (v_S + q v_T + (0.005 r T)^2)``; q is the noise that passes a Gaussian kernel of the width the FWHMs
    ask for, times the flux ratio r squared. Within a stamp the kernel and the background are constant. Stamps
    whose flux ratio (before) or reduced chi-square (after each fit) is more than 5 MADs out are left out.

    Parameters
    ----------
    science, science_variance, science_bad : (ny, nx) planes, background subtracted, finite where not bad
    template, template_variance, template_bad : (ny, nx) planes on the same grid, likewise; bad pixels must hold
        finite values, and those that a bad pixel reaches through the kernel must be among the bad ones
    star_x, star_y : (n,) kernel stars, pixels; whole stamps plus kernel must lie inside the image
    fwhm_science_pix, fwhm_template_pix : widths of the PSFs, which set the basis
    spatial_order : order of the kernel's polynomial, 0 to 3. Lowered until there are 4 stars per term
    background_order : order of the differential background's polynomial, 0 to 2; not above the kernel's

    Returns
    -------
    KernelSolution

    Raises
    ------
    TooFewKernelStarsError : fewer than 10 stars are offered, or left after clipping
    BadKernelError : the normal equations have no solution, or the kernel's sum is not finite or not within
        0.2 to 5 times the flux ratio of the stars

    Notes
    -----
    Cost O(n_stars stamp^2 n_basis^2), about 0.3 ms a star.
    """
    _require_stars(len(star_x), len(star_x), "offered")
    ratio, kept = _flux_ratio(science, template, science_bad | template_bad, star_x, star_y)
    _require_stars(len(kept), len(star_x), "with like flux ratios")
    x, y = np.rint(star_x[kept]).astype(np.intp), np.rint(star_y[kept]).astype(np.intp)
    order = _affordable_order(spatial_order, len(x))
    half = kernel_half_width_pix(fwhm_science_pix, fwhm_template_pix)
    sigmas = kernel_sigmas_pix(fwhm_science_pix, fwhm_template_pix)
    profiles = [_profiles(sigma, degree, half) for sigma, degree in zip(sigmas, _DEGREES, strict=True)]
    mixing = _mixing(profiles)
    noise_factor = ratio**2 * _noise_factor(fwhm_science_pix, fwhm_template_pix)
    variance = science_variance + noise_factor * template_variance + (_MODEL_ERROR * ratio * template) ** 2
    weight = np.where(science_bad | template_bad, 0.0, 1.0 / variance)
    gram, right, square, n_pixels = _measure_stamps(science, template, weight, x, y, profiles, mixing)
    shape = (science.shape[0], science.shape[1])
    terms = _position_terms(x, y, shape, order)
    n_background_terms = len(_exponents(min(background_order, order)))
    free = np.ones((_N_COLUMNS + 1, terms.shape[1]), dtype=np.bool_)
    free[0, 1:] = False  # the kernel's sum does not depend on position
    free[-1, n_background_terms:] = False
    stamps = _Stamps(gram, right, square, n_pixels, terms, free)
    training = np.arange(len(x)) % _VALIDATION_EVERY != _VALIDATION_EVERY - 1
    coefficients, _ = _fit_clipped(stamps, np.flatnonzero(training))
    validation = float(np.median(_reduced_chi2(stamps, coefficients, np.flatnonzero(~training))))
    coefficients, used = _fit_clipped(stamps, np.arange(len(x)))
    _require_stars(len(used), len(star_x), "after clipping")
    kernel_sum = float(coefficients[0, 0])
    low, high = _FLUX_RATIO_RANGE
    if not low * ratio < kernel_sum < high * ratio:
        raise BadKernelError(
            f"kernel sum {kernel_sum:g} is not within {low:g} to {high:g} times the stars' flux ratio {ratio:g} "
            f"({len(used)} stars)"
        )
    return KernelSolution(
        basis=_basis(profiles, mixing),
        coefficients=coefficients[:-1],
        background_coefficients=coefficients[-1, :n_background_terms],
        spatial_order=order,
        background_order=min(background_order, order),
        shape=shape,
        kernel_sum=kernel_sum,
        n_stars_offered=len(star_x),
        n_stars_used=len(used),
        chi2=float(np.mean(_reduced_chi2(stamps, coefficients, used))),
        validation_chi2=validation,
    )


def _require_stars(n_stars: int, n_offered: int, when: str) -> None:
    if n_stars < MIN_KERNEL_STARS:
        raise TooFewKernelStarsError(f"{n_stars} of {n_offered} kernel stars {when}, {MIN_KERNEL_STARS} are needed")


def _affordable_order(spatial_order: int, n_stars: int) -> int:
    order = spatial_order
    while order > 0 and n_stars < STARS_PER_SPATIAL_TERM * len(_exponents(order)):
        order -= 1
    return order


def _flux_ratio(
    science: NDArray[np.floating],
    template: NDArray[np.floating],
    bad: NDArray[np.bool_],
    x: NDArray[np.floating],
    y: NDArray[np.floating],
) -> tuple[float, NDArray[np.intp]]:
    """Median ratio of the stars' fluxes in the good ones of 11 x 11 pixels, and the stars of about that ratio."""
    if len(x) == 0:
        return 1.0, np.zeros(0, dtype=np.intp)
    offset = np.arange(-5, 6)
    rows = np.rint(y).astype(np.intp)[:, None, None] + offset[:, None]
    columns = np.rint(x).astype(np.intp)[:, None, None] + offset[None, :]
    good = ~bad[rows, columns]
    science_flux = np.where(good, science[rows, columns], 0.0).sum(axis=(1, 2), dtype=np.float64)
    template_flux = np.where(good, template[rows, columns], 0.0).sum(axis=(1, 2), dtype=np.float64)
    positive = np.flatnonzero((science_flux > 0) & (template_flux > 0))
    if len(positive) == 0:
        return 1.0, positive
    ratios = science_flux[positive] / template_flux[positive]
    ratio = float(np.median(ratios))
    scatter = float(np.median(np.abs(ratios - ratio)))
    # the floor lets pass what a varying PSF does to the flux in a box
    alike = np.abs(ratios - ratio) < 5.0 * _MAD_TO_SIGMA * scatter + 0.05 * ratio
    return ratio, positive[alike]


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


def _mixing(profiles: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Matrix from products of profiles to the basis: function 0 gets the sum 1, all others the sum 0."""
    sums, scales = [], []
    for profile in profiles:
        i, j = _pairs(len(profile) - 1)
        even = (i % 2 == 0) & (j % 2 == 0)  # the others are odd in x or y: their sum is 0
        total = profile.sum(axis=1)
        sums.append(np.where(even, total[i] * total[j], 0.0))
        size = np.abs(profile).sum(axis=1)
        scales.append(size[i] * size[j])
    sum_of, scale_of = np.concatenate(sums), np.concatenate(scales)
    mixing = np.diag(1.0 / scale_of)
    mixing[1:, 0] = -sum_of[1:] / scale_of[1:] / sum_of[0]
    return mixing


def _basis(profiles: list[NDArray[np.float64]], mixing: NDArray[np.float64]) -> NDArray[np.float64]:
    rows, columns = _factors(profiles)
    stacked = np.concatenate(profiles)
    return np.einsum("bc,cj,ci->bji", mixing, stacked[rows], stacked[columns])


def _measure_stamps(
    science: NDArray[np.floating],
    template: NDArray[np.floating],
    weight: NDArray[np.floating],
    x: NDArray[np.intp],
    y: NDArray[np.intp],
    profiles: list[NDArray[np.float64]],
    mixing: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Gram matrix, right side, weighted square and number of pixels of each stamp."""
    side = 2 * _STAMP_HALF_PIX + 1
    reach = _STAMP_HALF_PIX + profiles[0].shape[1] // 2
    rows, columns = _factors(profiles)
    flipped = np.ascontiguousarray(np.concatenate(profiles)[:, ::-1])
    n_columns = _N_COLUMNS + 1
    gram, right = np.zeros((len(x), n_columns, n_columns)), np.zeros((len(x), n_columns))
    square, n_pixels = np.zeros(len(x)), np.zeros(len(x), dtype=np.int64)
    design = np.empty((n_columns, side * side))
    for star, (column, row) in enumerate(zip(x, y, strict=True)):
        wide = template[row - reach : row + reach + 1, column - reach : column + reach + 1].astype(np.float64)
        top, left = row - _STAMP_HALF_PIX, column - _STAMP_HALF_PIX
        stamp = slice(top, top + side), slice(left, left + side)
        root = np.sqrt(weight[stamp].astype(np.float64).ravel())
        data = np.where(root > 0, science[stamp].ravel(), 0.0) * root
        _fill_design(wide, flipped, rows, columns, mixing, root, design)
        _add_normal_equations(design, data, gram[star], right[star])
        square[star] = np.sum(data**2)
        n_pixels[star] = np.count_nonzero(root)
    return gram, right, square, n_pixels


def _factors(profiles: list[NDArray[np.float64]]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which two profiles (counted through all Gaussians) make a basis function: along y, along x."""
    rows, columns, first = [], [], 0
    for profile in profiles:
        i, j = _pairs(len(profile) - 1)
        rows.append(first + j)
        columns.append(first + i)
        first += len(profile)
    return np.concatenate(rows), np.concatenate(columns)


@njit(cache=True, fastmath=_FAST_MATH)
def _fill_design(
    wide: NDArray[np.float64],
    flipped: NDArray[np.float64],
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    mixing: NDArray[np.float64],
    root: NDArray[np.float64],
    design: NDArray[np.float64],
) -> None:
    """The template stamp convolved with each basis function (separably), then a constant; times root weight."""
    n_profiles, k = flipped.shape
    side = wide.shape[0] - k + 1
    along_x = np.zeros((n_profiles, wide.shape[0], side))
    for profile in range(n_profiles):
        for y in range(wide.shape[0]):
            total = along_x[profile, y]
            for tap in range(k):
                value = flipped[profile, tap]
                for x in range(side):
                    total[x] += value * wide[y, x + tap]
    for basis in range(len(rows)):
        pixels = design[basis]
        pixels[:] = 0.0
        for y in range(side):
            total = pixels[y * side : (y + 1) * side]
            for tap in range(k):
                value = flipped[rows[basis], tap]
                source = along_x[columns[basis], y + tap]
                for x in range(side):
                    total[x] += value * source[x]
    # `mixing` is diagonal but for its first column, so that last to first needs no copy
    for basis in range(len(rows) - 1, -1, -1):
        own, carried = mixing[basis, basis], mixing[basis, 0] if basis > 0 else 0.0
        for pixel in range(side * side):
            design[basis, pixel] = (own * design[basis, pixel] + carried * design[0, pixel]) * root[pixel]
    design[len(rows)] = root


@njit(cache=True, fastmath=_FAST_MATH)
def _add_normal_equations(
    design: NDArray[np.float64], data: NDArray[np.float64], gram: NDArray[np.float64], right: NDArray[np.float64]
) -> None:
    for a in range(design.shape[0]):
        for b in range(a + 1):
            total = 0.0
            for pixel in range(design.shape[1]):
                total += design[a, pixel] * design[b, pixel]
            gram[a, b] += total
            gram[b, a] = gram[a, b]
        total = 0.0
        for pixel in range(design.shape[1]):
            total += design[a, pixel] * data[pixel]
        right[a] += total


def _fit_clipped(stamps: _Stamps, offered: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Coefficients (columns, terms) and the stamps that are left when no more are to be clipped."""
    used = offered
    coefficients = _solve(stamps, used)
    for _ in range(_MAX_CLIPS):
        chi2 = _reduced_chi2(stamps, coefficients, offered)
        middle = np.median(chi2[np.isin(offered, used)])
        scatter = _MAD_TO_SIGMA * np.median(np.abs(chi2[np.isin(offered, used)] - middle))
        kept = offered[chi2 <= middle + _CLIP_MADS * scatter]
        if np.array_equal(kept, used):
            break
        used = kept
        coefficients = _solve(stamps, used)
    return coefficients, used


def _solve(stamps: _Stamps, used: NDArray[np.intp]) -> NDArray[np.float64]:
    """Weighted least squares over stamps: the sum of (gram of a stamp) x (terms terms^T), one Cholesky."""
    n_columns, n_terms = stamps.free.shape
    terms = stamps.terms[used]
    outer = terms[:, :, np.newaxis] * terms[:, np.newaxis, :]
    normal = np.einsum("sij,sab->abij", stamps.gram[used], outer).transpose(2, 0, 3, 1)
    free = np.flatnonzero(stamps.free)
    normal = normal.reshape(n_columns * n_terms, -1)[np.ix_(free, free)]
    right = np.einsum("si,sa->ia", stamps.right[used], terms).ravel()[free]
    scale = np.sqrt(np.diag(normal))
    if not np.all(np.isfinite(normal)) or np.any(scale == 0):
        raise BadKernelError(f"normal equations of {len(used)} stamps are not finite or empty")
    normal = normal / np.outer(scale, scale)
    normal[np.diag_indices_from(normal)] += _RIDGE
    solution = right / scale
    if not _solve_by_cholesky(normal, solution):
        raise BadKernelError(f"normal equations of {len(used)} stamps for {len(free)} unknowns are singular")
    coefficients = np.zeros(stamps.free.size)
    coefficients[free] = solution / scale
    return coefficients.reshape(n_columns, n_terms)


@njit(cache=True, fastmath=_FAST_MATH)
def _solve_by_cholesky(matrix: NDArray[np.float64], right: NDArray[np.float64]) -> bool:
    """Solve in place (both arrays are overwritten); False if the matrix is not positive definite."""
    n = len(right)
    for row in range(n):
        for column in range(row + 1):
            total = matrix[row, column]
            for inner in range(column):
                total -= matrix[row, inner] * matrix[column, inner]
            if column < row:
                matrix[row, column] = total / matrix[column, column]
            elif total > 0.0:
                matrix[row, row] = np.sqrt(total)
            else:
                return False
    for row in range(n):
        total = right[row]
        for inner in range(row):
            total -= matrix[row, inner] * right[inner]
        right[row] = total / matrix[row, row]
    for row in range(n - 1, -1, -1):
        total = right[row]
        for below in range(row + 1, n):
            total -= matrix[below, row] * right[below]
        right[row] = total / matrix[row, row]
    return True


def _reduced_chi2(stamps: _Stamps, coefficients: NDArray[np.float64], which: NDArray[np.intp]) -> NDArray[np.float64]:
    local = np.einsum("st,ct->sc", stamps.terms[which], coefficients)
    model_square = np.einsum("ni,nij,nj->n", local, stamps.gram[which], local)
    chi2 = stamps.square[which] - 2.0 * np.sum(local * stamps.right[which], axis=1) + model_square
    return np.asarray(chi2 / stamps.n_pixels[which])

"""Faint trails that detection cuts into several sources: which sources lie on one line with light between them."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from transforms.numerics.forced_photometry import evaluate_psf, pixel_weight
from transforms.numerics.model_fitting import FIT_REACH_SIGMA, SplineStack, factorise, solve_factored
from transforms.numerics.trail_fitting import TRAIL_LENGTH_MAX_PIX, Trails, cut_out, draw_summed
from transforms.numerics.union_find import root

_NEIGHBOURS = 6  # among so many nearest sources the next piece of a trail is sought
_GAP_END_SIGMA = 2.4  # 1 FWHM: what lies nearer to a source is its own light
_LINE_HALF_WIDTH_SIGMA = 2.0
_BRIDGE_SNR_MIN = 3.0
_BRIDGE_PART_MIN = 0.5  # of the light a pixel of line that the fainter source would have as part of a trail
_ACROSS_SIGMA = 2.0  # how far off the line, or beyond its ends, the centroid of a piece may lie
_OUTSHINE = 1.5  # what is brighter than this times the trail (and 4 errors) is a source of its own
_OUTSHINE_ERRORS = 4.0
_STRETCH_SIGMA = 4.7  # 2 FWHM: at S/N 5 a source, a dark stretch of a trail misses 6 errors
_UNEVENNESS_MAX = 3.0  # standard deviations of chi-square: 1 in 50 of the trails cut to pieces gets there
_MEMBERS_MAX = 60  # more pieces than 2 pixels of trail each


def link_fragments(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    flux: NDArray[np.float64],
    sigma: NDArray[np.float64],
    usable: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Tell which sources may be pieces of one trail: those of one sign with light on the line between them.

    The light between two sources is a line of the PSF's width, fitted to the pixels further than 1 FWHM from both. It
    links them when it has S/N 3 and half of what the fainter one, were it part of a trail, would have in a pixel of it.

    Parameters
    ----------
    image, variance, bad : (ny, nx) planes as in `linear_psf_fit`
    x, y, flux, sigma : (n,) pixels, PSF flux of either sign, and sigma of the PSF in pixels
    usable : (n,) bool, the others have no links; those used are finite

    Returns
    -------
    (n,) lowest index among the sources linked to each, over any number of links; its own where there is none

    Notes
    -----
    Each source is compared with its 6 nearest within half the longest trail: O(n log n).
    """
    label = np.arange(x.size, dtype=np.int64)
    chosen = np.flatnonzero(usable)
    if chosen.size < 2:
        return label
    positions = np.stack([x[chosen], y[chosen]], axis=-1)
    _, near = cKDTree(positions).query(positions, k=_NEIGHBOURS + 1, distance_upper_bound=0.5 * TRAIL_LENGTH_MAX_PIX)
    first, place = np.nonzero(near < chosen.size)
    pairs = np.sort(np.stack([chosen[first], chosen[near[first, place]]]), axis=0)
    pairs = np.unique(pairs[:, pairs[0] < pairs[1]], axis=1)
    _link(image, variance, bad, x, y, flux, sigma, np.ascontiguousarray(pairs, dtype=np.int64), label)
    return label


def lines_through(
    label: NDArray[np.int64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Lines from end to end of linked sources.

    Parameters
    ----------
    label : (n,) from `link_fragments`
    x, y : (n,) pixels

    Returns
    -------
    heads : (m,) labels of two sources or more
    lines : (4, m) x and y of the middle and the vector from end to end, pixels
    """
    heads, counts = np.unique(label, return_counts=True)
    heads = heads[counts > 1]
    lines = np.empty((4, heads.size))
    for number, head in enumerate(heads):
        members = np.flatnonzero(label == head)
        u, v = x[members] - x[members].mean(), y[members] - y[members].mean()
        angle = 0.5 * np.arctan2(2.0 * (u * v).sum(), (u * u - v * v).sum())
        along = u * np.cos(angle) + v * np.sin(angle)
        middle, length = 0.5 * (along.max() + along.min()), along.max() - along.min()
        lines[:, number] = (
            x[members].mean() + middle * np.cos(angle),
            y[members].mean() + middle * np.sin(angle),
            length * np.cos(angle),
            length * np.sin(angle),
        )
    return heads, lines


def claim_fragments(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    psfs: SplineStack,
    psf_of_trail: NDArray[np.int64],
    trails: Trails,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    flux: NDArray[np.float64],
    flux_err: NDArray[np.float64],
    usable: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Tell which sources are pieces of a fitted trail.

    A piece lies within 2 sigma of the PSF of the line, has the trail's sign, and does not outshine it. The trail gets
    its pieces when it describes the pixels around it better, by chi-square, than point sources of free fluxes at the
    places of the pieces, and its light is even along the line: else it may be a shorter trail and a point beyond its
    end. The trail of highest S/N chooses first.

    Parameters
    ----------
    image, variance, bad : (ny, nx) planes as in `linear_psf_fit`
    psfs, psf_of_trail : PSFs of the image, and which is that of each trail (m,)
    trails : m trails, not all good
    x, y, flux, flux_err : (n,) of the sources: pixels, PSF flux and its error
    usable : (n,) bool, sources that may be pieces; those are finite

    Returns
    -------
    (n,) index of the trail of each source, -1 for none; a trail has two sources or more, or none
    """
    owner = np.full(x.size, -1, dtype=np.int64)
    good = np.flatnonzero(trails.good)
    order = good[np.argsort(-np.abs(trails.flux[good]) / trails.flux_err[good], kind="stable")]
    lines = np.stack([trails.flux, trails.x, trails.y, trails.dx, trails.dy])
    _claim(
        image,
        variance,
        bad,
        psfs.coefficients,
        psfs.sigma_pix,
        psfs.half_width,
        psf_of_trail,
        lines,
        order,
        np.stack([x, y, flux, flux_err]),
        usable,
        owner,
    )
    return owner


@njit(cache=True)
def _link(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    flux: NDArray[np.float64],
    sigma: NDArray[np.float64],
    pairs: NDArray[np.int64],
    label: NDArray[np.int64],
) -> None:
    for pair in range(pairs.shape[1]):
        one, other = pairs[0, pair], pairs[1, pair]
        if (flux[one] > 0.0) != (flux[other] > 0.0):
            continue
        width = sigma[one]
        fainter = min(abs(flux[one]), abs(flux[other])) / (2.0 * math.sqrt(math.pi) * width)
        light, error = _line_light(
            image, variance, bad, x[one], y[one], x[other], y[other], width, _GAP_END_SIGMA * width
        )
        light *= 1.0 if flux[one] > 0.0 else -1.0
        if light > _BRIDGE_SNR_MIN * error and light > _BRIDGE_PART_MIN * fainter:
            mine, theirs = root(label, one), root(label, other)
            label[max(mine, theirs)] = min(mine, theirs)
    for source in range(label.size):
        label[source] = root(label, source)


@njit(cache=True)
def _line_light(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x0: float,
    y0: float,
    x1: float,
    y1: float,
    sigma: float,
    margin: float,
) -> tuple[float, float]:
    """Light a pixel of line between two places, a margin off both, and its error; infinite where no pixel tells."""
    ny, nx = image.shape
    length = math.hypot(x1 - x0, y1 - y0)
    first, last = margin, length - margin
    if not last > first:
        return 0.0, np.inf
    cosine, sine = (x1 - x0) / length, (y1 - y0) / length
    reach = _LINE_HALF_WIDTH_SIGMA * sigma
    signal, information = 0.0, 0.0
    for j in range(max(0, math.ceil(min(y0, y1) - reach)), min(ny, math.floor(max(y0, y1) + reach) + 1)):
        for i in range(max(0, math.ceil(min(x0, x1) - reach)), min(nx, math.floor(max(x0, x1) + reach) + 1)):
            along = (i - x0) * cosine + (j - y0) * sine
            across = (j - y0) * cosine - (i - x0) * sine
            if along < first or along > last or abs(across) > reach:
                continue
            weight = pixel_weight(image[j, i], variance[j, i], bad[j, i])
            if weight > 0.0:
                profile = math.exp(-0.5 * (across / sigma) ** 2) / (math.sqrt(2.0 * math.pi) * sigma)
                signal += weight * profile * image[j, i]
                information += weight * profile * profile
    if not 0.0 < information < np.inf:
        return 0.0, np.inf
    return signal / information, 1.0 / math.sqrt(information)


@njit(cache=True)
def _claim(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    coefficients: NDArray[np.float64],
    sigma_pix: NDArray[np.float64],
    half_width: int,
    psf_of_trail: NDArray[np.int64],
    lines: NDArray[np.float64],
    order: NDArray[np.int64],
    points: NDArray[np.float64],
    usable: NDArray[np.bool_],
    owner: NDArray[np.int64],
) -> None:
    members = np.empty(_MEMBERS_MAX, dtype=np.int64)
    for trail in order:
        psf = psf_of_trail[trail]
        sigma = sigma_pix[psf]
        flux, x, y, dx, dy = lines[:, trail]
        length = math.hypot(dx, dy)
        cosine, sine = dx / length, dy / length
        as_point = abs(flux) / length * 2.0 * math.sqrt(math.pi) * sigma
        reach = _ACROSS_SIGMA * sigma
        count = 0
        for source in range(points.shape[1]):
            u, v = points[0, source] - x, points[1, source] - y
            if not (usable[source] and owner[source] < 0 and (points[2, source] > 0.0) == (flux > 0.0)):
                continue
            if abs(v * cosine - u * sine) > reach or abs(u * cosine + v * sine) > 0.5 * length + reach:
                continue
            if abs(points[2, source]) > _OUTSHINE * as_point + _OUTSHINE_ERRORS * points[3, source]:
                continue
            if count < _MEMBERS_MAX:
                members[count] = source
            count += 1
        if not 2 <= count <= _MEMBERS_MAX:
            continue
        as_trail, as_points = _both_chi2(
            image, variance, bad, coefficients[psf], half_width, sigma, lines[:, trail], points, members[:count]
        )
        if as_trail < as_points and _is_even(image, variance, bad, lines[:, trail], sigma):
            owner[members[:count]] = trail


@njit(cache=True)
def _is_even(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    line: NDArray[np.float64],
    sigma: float,
) -> bool:
    """Whether the light of stretches of 2 FWHM along the line scatters no more than its errors."""
    _, x, y, dx, dy = line
    length = math.hypot(dx, dy)
    inner = length - 2.0 * sigma
    n = math.floor(inner / (_STRETCH_SIGMA * sigma))
    if n < 2:
        return True
    lights, weights = np.empty(n), np.empty(n)
    for k in range(n):
        first, last = (inner * (k / n - 0.5)) / length, (inner * ((k + 1) / n - 0.5)) / length
        light, error = _line_light(
            image, variance, bad, x + first * dx, y + first * dy, x + last * dx, y + last * dy, sigma, 0.0
        )
        lights[k], weights[k] = light, 1.0 / (error * error)
    total = weights.sum()
    if not total > 0.0:
        return False
    mean = (weights * lights).sum() / total
    chi2 = (weights * (lights - mean) ** 2).sum()
    free = (weights > 0.0).sum() - 1.0
    return bool(chi2 <= free + _UNEVENNESS_MAX * math.sqrt(2.0 * free))


@njit(cache=True)
def _both_chi2(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    coefficients: NDArray[np.float64],
    half_width: int,
    sigma: float,
    line: NDArray[np.float64],
    points: NDArray[np.float64],
    members: NDArray[np.int64],
) -> tuple[float, float]:
    """Chi-square of the pixels around a trail with its model, and with points at its members' places."""
    x0, y0, values, weights = cut_out(image, variance, bad, line, (FIT_REACH_SIGMA + _ACROSS_SIGMA) * sigma + 1.0)
    ny, nx = values.shape
    planes = np.empty((6, ny, nx))
    at = line.copy()
    at[1] -= x0
    at[2] -= y0
    draw_summed(coefficients, half_width, sigma, at, planes)
    n, width = members.size, 2 * half_width + 1
    models = np.zeros((n, ny, nx))
    stamp, slope_x, slope_y = np.empty((width, width)), np.empty((width, width)), np.empty((width, width))
    for k in range(n):
        at_x, at_y = points[0, members[k]] - x0, points[1, members[k]] - y0
        column, row = math.floor(at_x + 0.5), math.floor(at_y + 0.5)
        left, low = column - half_width, row - half_width
        evaluate_psf(coefficients, half_width, at_x - column, at_y - row, stamp, slope_x, slope_y)
        for j in range(max(0, -low), min(width, ny - low)):
            for i in range(max(0, -left), min(width, nx - left)):
                models[k, low + j, left + i] = stamp[j, i]
    matrix, factor = np.zeros((n, n)), np.zeros((n, n))
    vector, fluxes = np.zeros(n), np.zeros(n)
    as_trail, nothing = 0.0, 0.0
    for j in range(ny):
        for i in range(nx):
            weight = weights[j, i]
            if not weight > 0.0:
                continue
            as_trail += weight * (values[j, i] - planes[0, j, i]) ** 2
            nothing += weight * values[j, i] ** 2
            for row in range(n):
                if models[row, j, i] != 0.0:
                    vector[row] += weight * models[row, j, i] * values[j, i]
                    for column in range(row + 1):
                        matrix[row, column] += weight * models[row, j, i] * models[column, j, i]
    # Points at one place are one point to a float: then the trail has it.
    if not factorise(matrix, 0.0, factor):
        return as_trail, nothing
    solve_factored(factor, vector, fluxes)
    for k in range(n):
        nothing -= fluxes[k] * vector[k]
    return as_trail, nothing

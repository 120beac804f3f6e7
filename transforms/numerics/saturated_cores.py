"""Saturated stars of a template: what their cores would hold, and the halos that a kernel does not reach.

A kernel carries the light of a core as far as it reaches. A core filled from its rim lacks most of the star's light, so
that a positive ring is left around each saturated star; the PSF, scaled to the star's wings, fills it. Beyond the
kernel the wings of the two PSFs differ by the same part of each star's light: measured on all of them, it is taken off.
On three simulated crowded pairs the rings 6, 9, 12, 15 and 18 pixels from such stars held 1.67, 1.13, 0.38, 0.25 and
0.11 sigma a pixel with neither, 0.05, -0.13, 0.27, 0.24 and 0.12 with filled cores, 0.09, -0.06, 0.08, 0.02 and 0.00
with both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from transforms.numerics.forced_photometry import evaluate_psf, spline_coefficients
from transforms.numerics.psf_grid import PsfGrid

_STEPS = 5
_CLIP_FROM_STEP, _CLIP_SIGMA = 2, 5.0  # neighbours are left out once the star's place and flux are about right
_MODEL_ERROR = 0.05  # of the light: a PSF is no better known in the wings of one star
_LEAST_WING_PIXELS = 20
_LEAST_SNR = 20.0  # of the wings; a bad column through blank sky has none
_LARGEST_SHIFT_PIX = 4.0
_RING_PIX = 2
_HALO_FWHM = 10.0  # radius to which halos are measured
_LEAST_STARS = 5
_LEAST_RING_PIXELS = 8
_HALO_SIGMA = 3.0  # a ring is taken off if it is this significant
_STAR_CLIP_SIGMA = 4.0
_HALO_SCATTER = 0.15  # PSFs vary, so does the part of the light
_MEDIAN_ERROR = 1.2533  # of the median of a normal distribution, over that of its mean


class SaturatedStars(NamedTuple):
    """Stars whose cores were filled; arrays (n,): pixels, and flux in the image's unit."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]


def fill_saturated_cores(
    image: NDArray[np.float32],
    variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    saturated: NDArray[np.bool_],
    psf: PsfGrid,
) -> SaturatedStars:
    """Replace the saturated pixels of stars, in place, by what their wings ask for.

    Each connected group of saturated pixels is taken for one star, its centre for the pixel deepest inside. Flux and
    position are fitted to the good pixels under the PSF by Gauss-Newton steps, weights 1 / (V + (0.05 D)^2). Groups
    without 20 such pixels, with wings below S/N 20, or whose star would move by more than 4 pixels, stay as they are;
    so do pixels that hold more than the fit.

    Parameters
    ----------
    image : (ny, nx) float32, background subtracted, finite
    variance : (ny, nx) floating, of a pixel; > 0 where not `bad`
    bad : (ny, nx) bool, pixels that no fit uses
    saturated : (ny, nx) bool, the pixels to be filled, all of them bad
    psf : of the image, in its cells: the light in wings goes with the fifth power of the width

    Returns
    -------
    SaturatedStars
    """
    rows, columns = np.nonzero(saturated)
    if len(rows) == 0:
        return SaturatedStars(np.zeros(0), np.zeros(0), np.zeros(0))
    star = _groups(rows, columns)
    order = np.argsort(star, kind="stable")
    starts = np.flatnonzero(np.diff(star[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    rows, columns = rows[order], columns[order]
    centre_y, centre_x = _centres(rows, columns, starts, ends)
    used, psf_of_group = np.unique(psf.cells_at(centre_x, centre_y), return_inverse=True)
    stars = np.zeros((3, len(starts)))
    n = _fill(
        image,
        variance,
        bad,
        rows,
        columns,
        starts,
        ends,
        centre_y,
        centre_x,
        spline_coefficients(psf.of_cells[used]),
        psf_of_group,
        psf.images.shape[2] // 2,
        stars,
    )
    return SaturatedStars(*stars[:, :n])


def subtract_halos(
    difference: NDArray[np.float32],
    matched_template: NDArray[np.float32],
    variance: NDArray[np.floating],
    unusable: NDArray[np.bool_],
    stars: SaturatedStars,
    fwhm_pix: float,
) -> NDArray[np.float64]:
    """Move what saturated stars leave around them from the difference to the matched template, both in place.

    ``D(r) = flux h(r)``: in rings of 2 pixels, to 10 FWHM, each star's median is taken, and h is the mean over the
    stars weighted by their errors, without stars that are 4 sigma and more off the weighted median. Rings in which h is
    not 3 sigma from 0 count as 0, and all beyond the first such ring that follows a significant one; between the
    middles of rings h is linear.

    Parameters
    ----------
    difference, matched_template : (ny, nx) float32, changed by opposite amounts
    variance : (ny, nx) floating, of a pixel of the difference
    unusable : (ny, nx) bool, pixels that measure nothing
    stars : from `fill_saturated_cores`; with fewer than 5 nothing is done
    fwhm_pix : of the science PSF

    Returns
    -------
    h (n_rings,) in units of 1 / pixel
    """
    n_rings = math.ceil(_HALO_FWHM * fwhm_pix / _RING_PIX)
    profile = np.zeros(n_rings)
    if len(stars.x) < _LEAST_STARS:
        return profile
    middle, error = _ring_medians(difference, variance, unusable, stars.x, stars.y, n_rings)
    begun = False
    for ring in range(n_rings):
        profile[ring] = _part_of_light(middle[:, ring], error[:, ring], stars.flux)
        if begun and profile[ring] == 0.0:
            break
        begun |= profile[ring] != 0.0
    if profile.any():
        _move_halos(difference, matched_template, stars.x, stars.y, stars.flux, profile)
    return profile


def _part_of_light(middle: NDArray[np.float64], error: NDArray[np.float64], flux: NDArray[np.float64]) -> float:
    """The part of the stars' light in a ring; 0 where it is not significant, or too few stars agree."""
    known = np.flatnonzero(np.isfinite(error))
    if len(known) < _LEAST_STARS:
        return 0.0
    weight = (flux[known] / error[known]) ** 2
    ratio = middle[known] / flux[known]
    order = np.argsort(ratio, kind="stable")
    total = np.cumsum(weight[order])
    typical = float(ratio[order][np.searchsorted(total, 0.5 * total[-1])])
    allowed = np.maximum(error[known], _HALO_SCATTER * abs(typical) * flux[known])
    agree = np.abs(middle[known] - typical * flux[known]) <= _STAR_CLIP_SIGMA * allowed
    if np.count_nonzero(agree) < _LEAST_STARS:
        return 0.0
    norm = float(np.sum(weight[agree]))
    part = float(np.sum(weight[agree] * ratio[agree])) / norm
    return part if abs(part) * math.sqrt(norm) > _HALO_SIGMA else 0.0


def _ring_medians(
    difference: NDArray[np.float32],
    variance: NDArray[np.floating],
    unusable: NDArray[np.bool_],
    star_x: NDArray[np.float64],
    star_y: NDArray[np.float64],
    n_rings: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n_stars, n_rings) medians of the difference and their errors; infinite where too few pixels are usable."""
    middle, error = np.zeros((len(star_x), n_rings)), np.full((len(star_x), n_rings), np.inf)
    reach = n_rings * _RING_PIX
    for star, (x, y) in enumerate(zip(star_x, star_y, strict=True)):
        top, left = max(round(y) - reach, 0), max(round(x) - reach, 0)
        box = slice(top, max(round(y) + reach + 1, 0)), slice(left, max(round(x) + reach + 1, 0))
        values, noise2, use = difference[box], variance[box], ~unusable[box]
        rows, columns = np.nonzero(use)
        ring = (np.hypot(rows + top - y, columns + left - x) / _RING_PIX).astype(np.int64)
        order = np.lexsort((values[use], ring))
        bounds = np.searchsorted(ring[order], np.arange(n_rings + 1))
        sorted_values, sorted_noise2 = values[use][order], noise2[use][order]
        for index in range(n_rings):
            first, last = bounds[index], bounds[index + 1]
            if last - first >= _LEAST_RING_PIXELS:
                middle[star, index] = sorted_values[(first + last) // 2]
                mean_noise2 = float(np.mean(sorted_noise2[first:last], dtype=np.float64))
                error[star, index] = _MEDIAN_ERROR * math.sqrt(mean_noise2 / (last - first))
    return middle, error


@njit(cache=True)
def _move_halos(
    difference: NDArray[np.float32],
    matched_template: NDArray[np.float32],
    star_x: NDArray[np.float64],
    star_y: NDArray[np.float64],
    flux: NDArray[np.float64],
    profile: NDArray[np.float64],
) -> None:
    ny, nx = difference.shape
    reach = len(profile) * _RING_PIX
    for star in range(len(star_x)):
        for y in range(max(int(star_y[star]) - reach, 0), min(int(star_y[star]) + reach + 2, ny)):
            for x in range(max(int(star_x[star]) - reach, 0), min(int(star_x[star]) + reach + 2, nx)):
                place = math.hypot(x - star_x[star], y - star_y[star]) / _RING_PIX - 0.5
                inner = max(math.floor(place), 0)
                if inner >= len(profile):
                    continue
                outer = profile[inner + 1] if inner + 1 < len(profile) else 0.0
                share = max(place - inner, 0.0)
                halo = np.float32(flux[star] * (profile[inner] * (1.0 - share) + outer * share))
                difference[y, x] -= halo
                matched_template[y, x] += halo


@njit(cache=True)
def _groups(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the 8-connected group of each pixel; pixels come in raster order."""
    n = len(rows)
    parent = np.arange(n)
    above = 0
    for pixel in range(n):
        if pixel > 0 and rows[pixel - 1] == rows[pixel] and columns[pixel - 1] == columns[pixel] - 1:
            parent[pixel] = parent[pixel - 1]
        while above < pixel and (
            rows[above] < rows[pixel] - 1 or (rows[above] == rows[pixel] - 1 and columns[above] < columns[pixel] - 1)
        ):
            above += 1
        other = above
        while other < pixel and rows[other] == rows[pixel] - 1 and columns[other] <= columns[pixel] + 1:
            one, two = pixel, other
            while parent[one] != one:
                one = parent[one]
            while parent[two] != two:
                two = parent[two]
            parent[max(one, two)] = min(one, two)
            other += 1
    for pixel in range(n):
        parent[pixel] = parent[parent[pixel]]  # earlier pixels already point to the first of their group
    return parent


@njit(cache=True)
def _fill(
    image: NDArray[np.float32],
    variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    centre_y: NDArray[np.int64],
    centre_x: NDArray[np.int64],
    coefficients: NDArray[np.float64],
    psf_of_group: NDArray[np.int64],
    half: int,
    stars: NDArray[np.float64],
) -> int:
    """Fit and fill group by group; x, y and flux of those that were filled go to the first columns of `stars`."""
    ny, nx = image.shape
    side = 2 * half + 1
    model, slope_x, slope_y = np.empty((side, side)), np.empty((side, side)), np.empty((side, side))
    n_filled = 0
    for group in range(len(starts)):
        first, last = starts[group], ends[group]
        row, column, psf = centre_y[group], centre_x[group], coefficients[psf_of_group[group]]
        dx, dy, flux, snr, n_wing = 0.0, 0.0, 0.0, 0.0, 0
        for step in range(_STEPS):
            evaluate_psf(psf, half, dx, dy, model, slope_x, slope_y)
            m00 = m01 = m02 = m11 = m12 = m22 = r0 = r1 = r2 = 0.0
            n_wing = 0
            for j in range(max(0, half - row), min(side, ny + half - row)):
                for i in range(max(0, half - column), min(side, nx + half - column)):
                    y, x = row + j - half, column + i - half
                    if bad[y, x]:
                        continue
                    value, p = image[y, x], model[j, i]
                    noise2 = variance[y, x] + (_MODEL_ERROR * value) ** 2
                    residual = value - flux * p
                    if step >= _CLIP_FROM_STEP and residual * residual > _CLIP_SIGMA**2 * noise2:
                        continue
                    a, b = flux * slope_x[j, i], flux * slope_y[j, i]
                    weight = 1.0 / noise2
                    m00, m01, m02 = m00 + weight * p * p, m01 + weight * p * a, m02 + weight * p * b
                    m11, m12, m22 = m11 + weight * a * a, m12 + weight * a * b, m22 + weight * b * b
                    r0, r1, r2 = r0 + weight * p * residual, r1 + weight * a * residual, r2 + weight * b * residual
                    n_wing += 1
            if n_wing < _LEAST_WING_PIXELS or not m00 > 0.0:
                break
            if step == 0:  # no flux yet, so no slopes
                flux += r0 / m00
            else:
                matrix = np.array([[m00, m01, m02], [m01, m11, m12], [m02, m12, m22]])
                if not abs(np.linalg.det(matrix)) > 1e-12 * m00 * m11 * m22:
                    break
                move = np.linalg.solve(matrix, np.array([r0, r1, r2]))
                flux += move[0]
                dx += min(max(move[1], -1.0), 1.0)
                dy += min(max(move[2], -1.0), 1.0)
            snr = flux * math.sqrt(m00)
            if not (snr >= _LEAST_SNR and math.hypot(dx, dy) <= _LARGEST_SHIFT_PIX):
                break
        if not (n_wing >= _LEAST_WING_PIXELS and snr >= _LEAST_SNR and math.hypot(dx, dy) <= _LARGEST_SHIFT_PIX):
            continue
        evaluate_psf(psf, half, dx, dy, model, slope_x, slope_y)
        for pixel in range(first, last):
            j, i = rows[pixel] - row + half, columns[pixel] - column + half
            if 0 <= j < side and 0 <= i < side:
                image[rows[pixel], columns[pixel]] = max(image[rows[pixel], columns[pixel]], flux * model[j, i])
        stars[0, n_filled], stars[1, n_filled], stars[2, n_filled] = column + dx, row + dy, flux
        n_filled += 1
    return n_filled


@njit(cache=True)
def _centres(
    rows: NDArray[np.int64], columns: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of the deepest pixel of each group."""
    centre_y, centre_x = np.empty(len(starts), np.int64), np.empty(len(starts), np.int64)
    for group in range(len(starts)):
        group_rows, group_columns = rows[starts[group] : ends[group]], columns[starts[group] : ends[group]]
        centre_y[group], centre_x[group] = _deepest(group_rows, group_columns)
    return centre_y, centre_x


@njit(cache=True)
def _deepest(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> tuple[int, int]:
    """The pixel of a group with the most of the group above, below, left and right of it: the smallest of the four.

    A bleed adds to one direction only, so it does not draw the centre along.
    """
    top, left = rows.min(), columns.min()
    inside = np.zeros((rows.max() - top + 3, columns.max() - left + 3), dtype=np.int64)
    for pixel in range(len(rows)):
        inside[rows[pixel] - top + 1, columns[pixel] - left + 1] = 1
    down, right = inside.copy(), inside.copy()  # lengths of the runs that end here
    up, back = inside.copy(), inside.copy()
    for y in range(1, inside.shape[0] - 1):
        for x in range(1, inside.shape[1] - 1):
            down[y, x] = (down[y - 1, x] + 1) * inside[y, x]
            right[y, x] = (right[y, x - 1] + 1) * inside[y, x]
    for y in range(inside.shape[0] - 2, 0, -1):
        for x in range(inside.shape[1] - 2, 0, -1):
            up[y, x] = (up[y + 1, x] + 1) * inside[y, x]
            back[y, x] = (back[y, x + 1] + 1) * inside[y, x]
    best, depth = 0, -1
    for pixel in range(len(rows)):
        y, x = rows[pixel] - top + 1, columns[pixel] - left + 1
        vertical, horizontal = min(down[y, x], up[y, x]), min(right[y, x], back[y, x])
        here = 1000 * min(vertical, horizontal) + min(max(vertical, horizontal), 999)
        if here > depth:
            best, depth = pixel, here
    return rows[best], columns[best]

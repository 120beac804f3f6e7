"""Detection on a difference image: calibrated matched-filter significance, footprints of both signs, peaks."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from transforms.numerics.forced_photometry import checked_planes, pixel_weight
from transforms.numerics.mask_growth import grown
from transforms.numerics.psf_grid import PSF_CELL_PIX, PsfGrid, as_psf_grid
from transforms.numerics.union_find import root

LOBE_DISTANCE_MIN_PIX = 3  # lobes of opposite sign, each grown by one pixel, then touch
_LOBE_DISTANCE_FWHM = (
    1.2  # the peaks of an unresolved dipole are 2 sqrt(2) sigma = 1.2 FWHM apart in the filtered image
)
_FILTER_ENERGY_KEPT = 0.999  # the wings beyond this part of sum(P^2) cost time and hold 0.05 % of the significance
_SOURCE_SIGMA = 5.0  # noise reaches it on 1e-6 of the pixels
_NOISE_SAMPLE_MAX = 1 << 20  # 1e6 pixels give the robust sigma to 0.2 %
_NOISE_PSF_AREAS_MIN = 100.0  # a bright source covers 10; in fewer the sources themselves would be the noise
_STRIP_ROWS = 32  # strips and tiles divide the cells of a PSF
_TILE_COLUMNS = 64
_MAD_TO_SIGMA = 1.4826022185056018
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Detections(NamedTuple):
    """Sources found in a significance map, in the order of (peak_y, peak_x, sign).

    All arrays have shape (n,). Peaks are the most significant pixel of their footprint; of equals, the first in
    raster order.

    Attributes
    ----------
    peak_y, peak_x : int64 pixels
    peak_snr : float32, signed significance at the peak
    is_negative : the footprint has no pixel above the positive threshold
    has_both_signs : the footprint joins positive and negative lobes
    opposite_snr : float32 >= 0, largest significance of the sign opposite to the peak's, on the footprint or within
        the lobe distance of it, whether or not it passes the threshold
    y0, y1, x0, x1 : int64, bounding box of the footprint, upper ends exclusive
    n_pixels : int64, pixels in the footprint
    mean_x, mean_y : float64 pixels, first moments of the footprint with |significance| as weight
    spread_xx, spread_yy, spread_xy : float64 pixels^2, its second moments about them
    n_rejected : int, footprints dropped because their peak lay on a rejected pixel
    """

    peak_y: NDArray[np.int64]
    peak_x: NDArray[np.int64]
    peak_snr: NDArray[np.float32]
    is_negative: NDArray[np.bool_]
    has_both_signs: NDArray[np.bool_]
    opposite_snr: NDArray[np.float32]
    y0: NDArray[np.int64]
    y1: NDArray[np.int64]
    x0: NDArray[np.int64]
    x1: NDArray[np.int64]
    n_pixels: NDArray[np.int64]
    mean_x: NDArray[np.float64]
    mean_y: NDArray[np.float64]
    spread_xx: NDArray[np.float64]
    spread_yy: NDArray[np.float64]
    spread_xy: NDArray[np.float64]
    n_rejected: int


def significance_map(
    difference: ArrayLike, variance: ArrayLike, bad: NDArray[np.bool_], psf: ArrayLike | PsfGrid
) -> tuple[NDArray[np.float32], float]:
    """Compute the calibrated significance of a point source at each pixel.

    S = sum(P D / V) / sqrt(sum(P^2 / V)) over the usable pixels around each pixel, P the PSF of the cell it lies in,
    then divided by its own robust sigma 1.4826 MAD(S) over good pixels away from sources, so that a threshold means the
    same whatever correlation the noise has.

    Parameters
    ----------
    difference : (ny, nx), used as float32; free of background
    variance : (ny, nx), used as float32, image units squared
    bad : (ny, nx) bool, pixels to leave out; pixels that are not finite or have no positive variance join them
    psf : (k, k) odd image, positive sum, or a grid of such

    Returns
    -------
    snr_map : (ny, nx) float32, finite; 0 where no usable pixel lies under the PSF
    noise_ratio : the robust sigma of S before calibration: 1 when the variance plane is right and the noise white.
        0 when S is constant, NaN when the good pixels are fewer than 100 PSFs cover: then S is left as it is

    Raises
    ------
    PsfError
        As `as_psf_grid`.
    ValueError
        The planes differ in shape.

    Notes
    -----
    O(ny nx w^2) with w the width that holds 0.999 of sum(P^2) of every PSF: 0.04, 0.07 and 0.13 CPU s per 1024^2
    pixels for a FWHM of 2.1, 4.7 and 8 pixels. The robust sigma comes from a regular grid of at most 1e6 pixels.
    """
    pixels, pixel_variance, masked = checked_planes(difference, variance, bad)
    grid = as_psf_grid(psf)
    filters = _compact_filters(grid.images)
    snr_map = np.empty(pixels.shape, dtype=np.float32)
    _filter_image(pixels, pixel_variance, masked, filters, snr_map)
    psf_area_pix = 4.0 * math.pi * float(np.median(gaussian_variances(grid.of_cells)))
    reach, n_pixels_min = filters.shape[2] // 2, _NOISE_PSF_AREAS_MIN * psf_area_pix
    noise_ratio = _noise_beside_sources(snr_map, pixels, pixel_variance, masked, reach, n_pixels_min)
    if math.isfinite(noise_ratio) and noise_ratio > 0.0:
        _divide(snr_map, noise_ratio)
    return snr_map, noise_ratio


def lobe_distance(psf: ArrayLike | PsfGrid) -> int:
    """Distance in pixels within which lobes of opposite sign are taken for one dipole: 1.2 FWHM, at least 3.

    The FWHM is that of the Gaussian with the same sum(P^2), the median of the cells.

    Parameters
    ----------
    psf : (k, k) odd image, positive sum, or a grid of such

    Raises
    ------
    PsfError
        As `as_psf_grid`.
    """
    sigma = float(np.median(np.sqrt(gaussian_variances(as_psf_grid(psf).of_cells))))
    return max(LOBE_DISTANCE_MIN_PIX, round(_LOBE_DISTANCE_FWHM * 2.0 * math.sqrt(2.0 * math.log(2.0)) * sigma))


def gaussian_variances(psfs: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) sigma^2 in pixels^2 of the round Gaussians with the same sum(P^2) as (n, k, k) PSFs."""
    images = psfs.astype(np.float64)
    return np.asarray(np.square(images.sum(axis=(1, 2))) / (4.0 * math.pi * np.square(images).sum(axis=(1, 2))))


def find_peaks(
    snr_map: ArrayLike,
    reject: NDArray[np.bool_],
    threshold: float = 5.0,
    lobe_distance_pix: int = LOBE_DISTANCE_MIN_PIX,
) -> Detections:
    """Find one source per footprint in a significance map.

    Footprints are the 8-connected sets of pixels with S > threshold, and of those with S < -threshold. Two peaks of
    such a set are two footprints when the lower one stands `threshold` above the saddle between them: noise seldom
    does that (3.5 sigma of a difference), a star next to a cosmic ray does. Footprints of opposite sign that come
    within `lobe_distance_pix` of each other are one. The source sits at the footprint's largest |S|; when that pixel
    is on `reject` the footprint is dropped and counted. There is no limit on the number: that is the caller's.

    Parameters
    ----------
    snr_map : (ny, nx) float32; NaN counts as 0
    reject : (ny, nx) bool, no peak may lie here (NO_DATA, BAD, SAT, EDGE)
    threshold : > 0, in units of the noise of `snr_map`
    lobe_distance_pix : >= 1, along x and y; 3 joins lobes that touch when each is grown by one pixel,
        `lobe_distance(psf)` also joins the lobes of a faint dipole, which lie further apart

    Returns
    -------
    Detections
        Depends on nothing but the arguments, in content and in order.

    Raises
    ------
    ValueError
        Shapes differ, the threshold is not a positive finite number, or the lobe distance is below 1.

    Notes
    -----
    O(ny nx) plus O(lobe_distance_pix^2) per pixel above the threshold.
    """
    significance = np.ascontiguousarray(snr_map, dtype=np.float32)
    rejected = np.ascontiguousarray(reject, dtype=np.bool_)
    if significance.ndim != 2 or significance.shape != rejected.shape:
        raise ValueError(f"'reject' must have the shape of the map, got {rejected.shape} and {significance.shape}")
    if not (math.isfinite(threshold) and threshold > 0.0):
        raise ValueError(f"'threshold' must be positive and finite, got {threshold}")
    if lobe_distance_pix < 1:
        raise ValueError(f"'lobe_distance_pix' must be at least 1, got {lobe_distance_pix}")
    rows, columns = np.nonzero(np.abs(significance) > np.float32(threshold))
    parent = np.arange(rows.size, dtype=np.int64)
    opposite = np.zeros(rows.size, dtype=np.float32)
    descending = np.argsort(-np.abs(significance[rows, columns]), kind="stable")
    _grow_basins(significance, rows, columns, descending, threshold, parent)
    _join_lobes(significance, rows, columns, lobe_distance_pix, parent, opposite)
    roots, footprint = np.unique(parent, return_inverse=True)
    whole = _summarise_footprints(significance, rows, columns, footprint, opposite, roots.size)
    return _without_rejected(whole, rejected)


def take_strongest(found: Detections, limit: int) -> tuple[Detections, NDArray[np.int64]]:
    """The `limit` most significant sources in their order, and the place of each among all; of equals the first."""
    places = np.sort(np.argsort(-np.abs(found.peak_snr), kind="stable")[:limit])
    columns = {name: column[places] for name, column in found._asdict().items() if name != "n_rejected"}
    return found._replace(**columns), places


def _compact_filters(psfs: NDArray[np.floating]) -> NDArray[np.float64]:
    """The central squares of (cells_y, cells_x, k, k) PSFs, of the width in which each keeps 0.999 of its sum(P^2)."""
    images = psfs.astype(np.float64)
    energy, centre = np.square(images), images.shape[2] // 2
    needed = _FILTER_ENERGY_KEPT * energy.sum(axis=(2, 3))
    for half_width in range(centre):
        core = (
            ...,
            slice(centre - half_width, centre + half_width + 1),
            slice(centre - half_width, centre + half_width + 1),
        )
        if (energy[core].sum(axis=(2, 3)) >= needed).all():
            return np.ascontiguousarray(images[core])
    return np.ascontiguousarray(images)


def _noise_beside_sources(
    snr_map: NDArray[np.float32],
    pixels: NDArray[np.float32],
    variance: NDArray[np.float32],
    masked: NDArray[np.bool_],
    reach: int,
    n_pixels_min: float,
) -> float:
    """Robust sigma without what lies within `reach` of a significant pixel; with it where nothing else is left.

    Sources on a part e of the pixels make a median of absolute values 1.2 e too large: 3.5 % for 110 sources and a
    FWHM of 4.75 on 1024 x 1024 pixels, which were that many faint sources lost.
    """
    with_sources = _robust_sigma(snr_map, pixels, variance, masked, n_pixels_min)
    if not (math.isfinite(with_sources) and with_sources > 0.0):
        return with_sources
    near_source = grown(np.abs(snr_map) > np.float32(min(_SOURCE_SIGMA * with_sources, _FLOAT32_MAX)), reach)
    alone = _robust_sigma(snr_map, pixels, variance, masked | near_source, n_pixels_min)
    return alone if math.isfinite(alone) and alone > 0.0 else with_sources


def _robust_sigma(
    snr_map: NDArray[np.float32],
    pixels: NDArray[np.float32],
    variance: NDArray[np.float32],
    masked: NDArray[np.bool_],
    n_pixels_min: float,
) -> float:
    step = max(1, math.ceil(math.sqrt(snr_map.size / _NOISE_SAMPLE_MAX)))
    grid = (slice(None, None, step), slice(None, None, step))
    usable = ~masked[grid] & np.isfinite(pixels[grid]) & np.isfinite(variance[grid]) & (variance[grid] > 0.0)
    sample = snr_map[grid][usable].astype(np.float64)
    if sample.size == 0 or sample.size * step * step < n_pixels_min:
        return math.nan
    return float(_MAD_TO_SIGMA * np.median(np.abs(sample - np.median(sample))))


@njit(cache=True)
def _filter_image(
    difference: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    filters: NDArray[np.float64],
    significance: NDArray[np.float32],
) -> None:
    """Fill `significance` strip by strip, so that the weighted planes never exist as whole images."""
    ny, nx = difference.shape
    cells_y, cells_x, width, _ = filters.shape
    half_width = width // 2
    n_tiles = (nx + _TILE_COLUMNS - 1) // _TILE_COLUMNS
    signal = np.zeros((_STRIP_ROWS + 2 * half_width, n_tiles * _TILE_COLUMNS + 2 * half_width))
    weight = np.zeros_like(signal)
    numerator, information = np.empty(_TILE_COLUMNS), np.empty(_TILE_COLUMNS)
    limit = _FLOAT32_MAX
    for strip in range(0, ny, _STRIP_ROWS):
        for j in range(signal.shape[0]):
            y = strip + j - half_width
            for x in range(nx):
                w = 0.0
                if 0 <= y < ny:
                    w = pixel_weight(difference[y, x], variance[y, x], bad[y, x])
                weight[j, x + half_width] = w
                signal[j, x + half_width] = w * difference[y, x] if w > 0.0 else 0.0
        for y in range(strip, min(strip + _STRIP_ROWS, ny)):
            for x0 in range(0, nx, _TILE_COLUMNS):
                numerator[:] = 0.0
                information[:] = 0.0
                psf = filters[min(y // PSF_CELL_PIX, cells_y - 1), min(x0 // PSF_CELL_PIX, cells_x - 1)]
                for j in range(width):
                    for i in range(width):
                        p = psf[j, i]
                        p2 = p * p
                        signal_row = signal[y - strip + j, x0 + i : x0 + i + _TILE_COLUMNS]
                        weight_row = weight[y - strip + j, x0 + i : x0 + i + _TILE_COLUMNS]
                        for k in range(_TILE_COLUMNS):
                            numerator[k] += p * signal_row[k]
                            information[k] += p2 * weight_row[k]
                for k in range(min(_TILE_COLUMNS, nx - x0)):
                    value = 0.0
                    if information[k] > 0.0:
                        value = numerator[k] / math.sqrt(information[k])
                    significance[y, x0 + k] = min(max(value, -limit), limit)


@njit(cache=True)
def _divide(snr_map: NDArray[np.float32], noise_ratio: float) -> None:
    """Divide in place in float64, clipped to what float32 holds (numpy would warn, or make 0 / 0 of a tiny ratio)."""
    limit = _FLOAT32_MAX
    for y in range(snr_map.shape[0]):
        for x in range(snr_map.shape[1]):
            snr_map[y, x] = min(max(snr_map[y, x] / noise_ratio, -limit), limit)


@njit(cache=True)
def _grow_basins(
    significance: NDArray[np.float32],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    descending: NDArray[np.int64],
    prominence: float,
    parent: NDArray[np.int64],
) -> None:
    """Union-find from the strongest pixel down: a pixel joins the basin of its strongest neighbour of its own sign.

    Basins that meet in a pixel become one unless the lower peak stands `prominence` above that pixel. The root of a
    basin is its peak.
    """
    ny, nx = significance.shape
    rank = np.empty(rows.size, dtype=np.int64)
    rank[descending] = np.arange(rows.size)
    number = _pixel_numbers(significance.shape, rows, columns)
    met = np.empty(8, dtype=np.int64)
    for pixel in descending:
        y, x = rows[pixel], columns[pixel]
        saddle = abs(significance[y, x])
        uphill, n_met = -1, 0
        for v in range(max(0, y - 1), min(ny, y + 2)):
            for u in range(max(0, x - 1), min(nx, x + 2)):
                other = number[v, u] - 1
                if other < 0 or rank[other] >= rank[pixel] or (significance[v, u] > 0.0) != (significance[y, x] > 0.0):
                    continue
                met[n_met] = root(parent, other)
                n_met += 1
                if uphill < 0 or rank[other] < rank[uphill]:
                    uphill = other
        if uphill < 0:
            continue
        parent[pixel] = root(parent, uphill)
        for one in met[:n_met]:
            mine, theirs = root(parent, pixel), root(parent, one)
            higher, lower = (mine, theirs) if rank[mine] < rank[theirs] else (theirs, mine)
            if higher != lower and abs(significance[rows[lower], columns[lower]]) - saddle < prominence:
                parent[lower] = higher


@njit(cache=True)
def _join_lobes(
    significance: NDArray[np.float32],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    reach: int,
    parent: NDArray[np.int64],
    opposite: NDArray[np.float32],
) -> None:
    """Unite basins of opposite sign within reach; each parent ends as the root of its footprint.

    `opposite` becomes, for each pixel, the largest significance of the other sign within reach.
    """
    ny, nx = significance.shape
    number = _pixel_numbers(significance.shape, rows, columns)
    for pixel in range(rows.size):
        y, x = rows[pixel], columns[pixel]
        positive = significance[y, x] > 0.0
        for v in range(max(0, y - reach), min(ny, y + reach + 1)):
            for u in range(max(0, x - reach), min(nx, x + reach + 1)):
                value = significance[v, u]
                if positive == (value > 0.0):
                    continue
                if abs(value) > opposite[pixel]:
                    opposite[pixel] = abs(value)
                if number[v, u] > 0:
                    mine, theirs = root(parent, pixel), root(parent, number[v, u] - 1)
                    parent[max(mine, theirs)] = min(mine, theirs)
    for pixel in range(rows.size):
        parent[pixel] = root(parent, pixel)


@njit(cache=True)
def _pixel_numbers(shape: tuple[int, int], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int32]:
    """(ny, nx) place in the list of each listed pixel, counted from 1; 0 elsewhere."""
    number = np.zeros(shape, dtype=np.int32)
    for pixel in range(rows.size):
        number[rows[pixel], columns[pixel]] = pixel + 1
    return number


def _summarise_footprints(
    significance: NDArray[np.float32],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    footprint: NDArray[np.int64],
    opposite: NDArray[np.float32],
    n_footprints: int,
) -> Detections:
    """Reduce pixels to footprints: peak, signs, bounding box, size."""
    values = significance[rows, columns]
    strength = np.abs(values)
    # Last key first: footprint, then strongest, then raster order; the first of each footprint is its peak.
    order = np.lexsort((np.arange(rows.size), -strength, footprint))
    is_first = np.ones(rows.size, dtype=np.bool_)
    is_first[1:] = footprint[order][1:] != footprint[order][:-1]
    peaks = order[is_first]
    n_pixels = np.bincount(footprint, minlength=n_footprints).astype(np.int64)
    n_positive = np.bincount(footprint, weights=values > 0.0, minlength=n_footprints)
    n_negative = n_pixels - n_positive
    # Within a merged footprint only pixels of the peak's sign look at the other sign.
    facing = np.where((values > 0.0) == (values[peaks] > 0.0)[footprint], opposite, strength)
    strongest_opposite = np.zeros(n_footprints, dtype=np.float32)
    np.maximum.at(strongest_opposite, footprint, facing)
    starts = np.full((2, n_footprints), np.iinfo(np.int64).max)
    stops = np.zeros((2, n_footprints), dtype=np.int64)
    for axis, position in enumerate((rows, columns)):
        np.minimum.at(starts[axis], footprint, position)
        np.maximum.at(stops[axis], footprint, position + 1)
    return Detections(
        peak_y=rows[peaks],
        peak_x=columns[peaks],
        peak_snr=values[peaks],
        is_negative=n_positive == 0,
        has_both_signs=(n_positive > 0) & (n_negative > 0),
        opposite_snr=strongest_opposite,
        y0=starts[0],
        y1=stops[0],
        x0=starts[1],
        x1=stops[1],
        n_pixels=n_pixels,
        **_moments_of_footprints(rows, columns, strength.astype(np.float64), footprint, n_footprints),
        n_rejected=0,
    )


def _moments_of_footprints(
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    weight: NDArray[np.float64],
    footprint: NDArray[np.intp],
    n_footprints: int,
) -> dict[str, NDArray[np.float64]]:
    def weighted_mean(values: NDArray[np.integer] | NDArray[np.floating]) -> NDArray[np.float64]:
        return np.bincount(footprint, weights=weight * values, minlength=n_footprints) / total

    total = np.bincount(footprint, weights=weight, minlength=n_footprints)
    mean_x, mean_y = weighted_mean(columns), weighted_mean(rows)
    u, v = columns - mean_x[footprint], rows - mean_y[footprint]
    return {
        "mean_x": mean_x,
        "mean_y": mean_y,
        "spread_xx": weighted_mean(u * u),
        "spread_yy": weighted_mean(v * v),
        "spread_xy": weighted_mean(u * v),
    }


def _without_rejected(whole: Detections, rejected: NDArray[np.bool_]) -> Detections:
    """Drop footprints whose peak is rejected and put the rest in the order that diaSource ids count in."""
    kept = np.flatnonzero(~rejected[whole.peak_y, whole.peak_x])
    order = kept[np.lexsort((whole.peak_snr[kept] < 0.0, whole.peak_x[kept], whole.peak_y[kept]))]
    return Detections(
        peak_y=whole.peak_y[order],
        peak_x=whole.peak_x[order],
        peak_snr=whole.peak_snr[order],
        is_negative=whole.is_negative[order],
        has_both_signs=whole.has_both_signs[order],
        opposite_snr=whole.opposite_snr[order],
        y0=whole.y0[order],
        y1=whole.y1[order],
        x0=whole.x0[order],
        x1=whole.x1[order],
        n_pixels=whole.n_pixels[order],
        mean_x=whole.mean_x[order],
        mean_y=whole.mean_y[order],
        spread_xx=whole.spread_xx[order],
        spread_yy=whole.spread_yy[order],
        spread_xy=whole.spread_xy[order],
        n_rejected=int(whole.peak_y.size - kept.size),
    )

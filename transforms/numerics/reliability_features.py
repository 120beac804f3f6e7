"""What the reliability model sees of a detected source: ratios and significances, named in `FEATURES`.

No feature knows where on the detector a source lies, how bright it is in any unit, how large pixels are, or which sign
it has: a model trained on them has no way to learn where and how bright the sources were that it was trained on. The
light underneath a source, its static light, is that of the template for a source that appeared, and that of the
science image for one that vanished. Values are clipped to intervals beyond which they mean the same.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from transforms.numerics.detection import Detections, gaussian_variances
from transforms.numerics.measurement import Measurements
from transforms.numerics.psf_grid import PsfGrid, as_psf_grid
from transforms.numerics.source_shapes import Shapes

FEATURES = {
    "significance": "|S| at the peak, at most 30: brighter sources are not told apart",
    "fit_over_peak": "S/N of the PSF fit over |S| at the peak",
    "core_chi2": "chi-square a pixel of the PSF fit in the core",
    "core_misfit": "part of the source's (S/N)^2 that the PSF leaves in the core beyond the noise",
    "peak_excess": "brightest of 3 x 3 pixels beyond the PSF model and 3 sigma, in model peaks",
    "peak_over_model": "brightest of 3 x 3 pixels, in model peaks",
    "size_ratio": "second moment under a PSF-like weight over that of the PSF",
    "size": "root of the adaptive moments' trace over that of the PSF",
    "elongation": "root of the ratio of major and minor adaptive moment",
    "footprint": "pixels of the footprint, in FWHM^2",
    "footprint_elongation": "root of the ratio of the footprint's moments",
    "opposite": "largest significance of the other sign nearby",
    "opposite_part": "the same beyond 2.5, over |S| at the peak beyond 2.5",
    "negative_part": "part of the light beyond 1.5 sigma within 2 FWHM that has the other sign",
    "asymmetry": "root of the odd over the even part's power within 1.5 FWHM, the noise taken off the odd part",
    "core_over_psf": "flux within 0.7 FWHM over what the PSF has there",
    "aperture_over_psf": "flux within 1.5 FWHM over what the PSF has there",
    "good_weight": "part of the PSF's weight on usable pixels",
    "masked_part": "part of the 15 x 15 pixels around that is masked",
    "static_core": "log10 of the brightest static pixel within 1 FWHM, as the flux of a star, over the flux",
    "static_near": "the same between 1 and 2 FWHM",
    "static_far": "the same between 2 and 5 FWHM, in rows up to 0.4 FWHM apart",
    "static_flux": "log10 of the PSF flux of the static light over the flux",
    "expected_residual": "static_core and log10 of the part that subtraction may leave",
    "saturation_distance": "to the nearest pixel saturated in either image, in FWHM, at most 6",
    "saturated_area": "log10 of 1 + the saturated pixels within 6 FWHM, in FWHM^2",
    "local_noise": (
        "mean |D| / sigma between 2 and 4 FWHM, in rows up to 0.8 FWHM apart, over that of Gaussian noise of the "
        "image's level"
    ),
    "centroid_shift": "from the peak to the fitted position, in FWHM",
    "lobe_share": "of a fitted dipole, the larger lobe's part of its light",
    "dipole_length": "of a fitted dipole, in FWHM",
    "trail_length": "of a fitted trail, in FWHM",
    "trail_chi2": "chi-square a pixel of a fitted trail",
    "trail_gain": "S/N of a fitted trail over that of the PSF fit",
}

_HIGHEST_SNR = 30.0
_HIGHEST_LOG = 4.0
_OPPOSITE_NOISE_SNR = 2.5  # the other sign seldom exceeds this by noise alone
_CORE_FWHM, _APERTURE_FWHM, _NEGATIVE_FWHM = 0.7, 1.5, 2.0
# Of the wide rings not all rows are looked at: the brightest pixel of a star is missed by at most 0.2 FWHM, and the
# noise has 47 pixels for each pixel of the FWHM.
_STATIC_ROWS_FWHM, _NOISE_ROWS_FWHM = 0.4, 0.8
_STATIC_FWHM = (1.0, 2.0, 5.0)
_NOISE_FWHM = (2.0, 4.0)
_SATURATION_FWHM = 6.0
_LARGEST_REACH_PIX = 60
_MASK_HALF_WIDTH_PIX = 7
_SURE_SIGMA = 1.5
_FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))
_MEAN_ABSOLUTE = math.sqrt(2.0 / math.pi)  # of unit Gaussian noise
_LEAST_RESIDUAL_PART = 1e-3

_STAMP_FEATURES = (
    "peak_over_model", "negative_part", "asymmetry", "core_over_psf", "aperture_over_psf", "masked_part",
    "static_core", "static_near", "static_far", "saturation_distance", "saturated_area", "local_noise",
)  # fmt: skip


def reliability_features(
    difference: ArrayLike,
    variance: ArrayLike,
    science: ArrayLike,
    matched_template: ArrayLike,
    bad: NDArray[np.bool_],
    saturated: NDArray[np.bool_],
    psf: ArrayLike | PsfGrid,
    detections: Detections,
    measured: Measurements,
    shapes: Shapes,
    noise_ratio: float,
    residual_part: float,
) -> NDArray[np.float32]:
    """Features of all detected sources.

    Parameters
    ----------
    difference, variance, science, matched_template : (ny, nx) float32 planes as `measure_sources` takes them
    bad, saturated : (ny, nx) bool: pixels that no measurement uses; pixels saturated in science or template
    psf : PSF of the difference, (k, k) or a grid
    detections, measured, shapes : the sources, as found, measured and fitted on these planes
    noise_ratio : of `significance_map`: true noise over what the variance plane says; 1 stands in for 0 and NaN
    residual_part : of the matched template's light that its subtraction may leave in a pixel, >= 0

    Returns
    -------
    (n, len(FEATURES)) float32, columns in the order of `FEATURES`, finite or NaN (not measurable)

    Notes
    -----
    All columns stay the same when all planes are scaled, when the difference and the roles of science and template are
    negated, and when the planes are mirrored (tested). 8 to 45 us a source for a FWHM of 2 to 10 pixels.
    """
    grid = as_psf_grid(psf)
    n = measured.x.size
    noise = noise_ratio if np.isfinite(noise_ratio) and noise_ratio > 0.0 else 1.0
    fwhms = _FWHM_PER_SIGMA * np.sqrt(gaussian_variances(grid.of_cells))
    cells = grid.cells_at(detections.peak_x, detections.peak_y)
    sign = np.where(detections.peak_snr < 0.0, -1.0, 1.0)
    stamps = np.full((len(_STAMP_FEATURES), n), np.nan)
    _measure_stamps(
        np.ascontiguousarray(difference, dtype=np.float32),
        np.ascontiguousarray(variance, dtype=np.float32),
        np.ascontiguousarray(science, dtype=np.float32),
        np.ascontiguousarray(matched_template, dtype=np.float32),
        np.ascontiguousarray(bad),
        np.ascontiguousarray(saturated),
        saturated.any(axis=1),
        fwhms,
        _enclosed(grid.of_cells, fwhms, cells),
        cells,
        measured.x,
        measured.y,
        sign,
        measured.psf_flux,
        noise,
        stamps,
    )
    columns = dict(zip(_STAMP_FEATURES, stamps, strict=True))
    with np.errstate(all="ignore"):  # columns may hold NaN, zero and huge values
        columns |= _of_measurements(detections, measured, fwhms[cells], noise)
        columns |= _of_shapes(shapes, measured, fwhms[cells], noise)
        left = np.log10(max(residual_part, _LEAST_RESIDUAL_PART))
        columns["expected_residual"] = columns["static_core"] + left
        static = np.where(sign > 0.0, measured.template_flux, measured.science_flux)
        columns["static_flux"] = _log_ratio(static, measured.psf_flux)
    table = np.stack([columns[name] for name in FEATURES], axis=1)
    return np.where(np.isfinite(table), table, np.nan).astype(np.float32)


def _of_measurements(
    detections: Detections, measured: Measurements, fwhm: NDArray[np.float64], noise: float
) -> dict[str, NDArray[np.float64]]:
    snr = measured.snr
    fit_snr = np.abs(measured.psf_flux) / (measured.psf_flux_err * noise)
    n_core = measured.core_n_pixels.astype(np.float64)
    chi2 = measured.core_chi2 / noise**2
    own, of_psf = (measured.ixx + measured.iyy, measured.ixx_psf + measured.iyy_psf)
    footprint = (detections.spread_xx, detections.spread_yy, detections.spread_xy)
    shift = np.hypot(measured.x - detections.peak_x, measured.y - detections.peak_y)
    return {
        "significance": np.minimum(snr, _HIGHEST_SNR),
        "fit_over_peak": np.clip(fit_snr / snr, 0.0, 3.0),
        "core_chi2": np.clip(chi2 / n_core, 0.0, 20.0),
        "core_misfit": np.clip((chi2 - n_core) / fit_snr**2, -1.0, 3.0),
        "peak_excess": np.clip(measured.peak_excess, 0.0, 5.0),
        "size_ratio": np.clip(measured.size_ratio, -1.0, 4.0),
        "size": np.clip(np.sqrt(own / of_psf), 0.0, 5.0),
        "elongation": _elongation(measured.ixx, measured.iyy, measured.ixy),
        "footprint": np.clip(detections.n_pixels / fwhm**2, 0.0, 30.0),
        "footprint_elongation": _elongation(*footprint),
        "opposite": np.clip(measured.opposite_snr, 0.0, _HIGHEST_SNR),
        "opposite_part": np.clip(
            (measured.opposite_snr - _OPPOSITE_NOISE_SNR) / np.maximum(snr - _OPPOSITE_NOISE_SNR, 1.0), 0.0, 2.0
        ),
        "good_weight": measured.good_weight,
        "centroid_shift": np.clip(shift / fwhm, 0.0, 2.0),
    }


def _of_shapes(
    shapes: Shapes, measured: Measurements, fwhm: NDArray[np.float64], noise: float
) -> dict[str, NDArray[np.float64]]:
    dipoles, trails = shapes.dipoles, shapes.trails
    separation = np.hypot(dipoles.x_positive - dipoles.x_negative, dipoles.y_positive - dipoles.y_negative)
    gain = (trails.flux / trails.flux_err) / (measured.psf_flux / measured.psf_flux_err)
    return {
        "lobe_share": dipoles.lobe_share,
        "dipole_length": np.clip(separation / fwhm, 0.0, 5.0),
        "trail_length": np.clip(np.hypot(trails.dx, trails.dy) / fwhm, 0.0, 20.0),
        "trail_chi2": np.clip(trails.chi2 / (noise**2 * trails.n_pixels), 0.0, 10.0),
        "trail_gain": np.clip(gain, 0.0, 10.0),
    }


def _elongation(xx: NDArray[np.float64], yy: NDArray[np.float64], xy: NDArray[np.float64]) -> NDArray[np.float64]:
    half_trace, half_split = 0.5 * (xx + yy), np.hypot(0.5 * (xx - yy), xy)
    ratio: NDArray[np.float64] = np.clip(np.sqrt((half_trace + half_split) / (half_trace - half_split)), 1.0, 5.0)
    return ratio


def _log_ratio(light: NDArray[np.float64], flux: NDArray[np.float64]) -> NDArray[np.float64]:
    """log10 of |light / flux|, from -2 (nothing there, or less) to 4."""
    ratio = np.clip(np.maximum(light, 0.0) / np.abs(flux), 1e-2, 10.0**_HIGHEST_LOG)
    return np.asarray(np.log10(ratio))


@njit(cache=True)
def _enclosed(psfs: NDArray[np.floating], fwhms: NDArray[np.float64], cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, 3): of each PSF in `cells` its middle pixel, and its sums within the radii of core and aperture; else NaN."""
    half = psfs.shape[1] // 2
    enclosed = np.full((len(psfs), 3), np.nan)
    for cell in cells:
        if not np.isnan(enclosed[cell, 0]):
            continue
        core2, aperture2 = (_CORE_FWHM * fwhms[cell]) ** 2, (_APERTURE_FWHM * fwhms[cell]) ** 2
        reach = min(half, math.floor(_APERTURE_FWHM * fwhms[cell]))
        core, aperture = 0.0, 0.0
        for v in range(-reach, reach + 1):
            for u in range(-reach, reach + 1):
                if u * u + v * v <= aperture2:
                    aperture += psfs[cell, half + v, half + u]
                    if u * u + v * v <= core2:
                        core += psfs[cell, half + v, half + u]
        enclosed[cell, 0], enclosed[cell, 1], enclosed[cell, 2] = psfs[cell, half, half], core, aperture
    return enclosed


@njit(cache=True, error_model="numpy")  # a PSF may have no light in its middle
def _measure_stamps(
    difference: NDArray[np.float32],
    variance: NDArray[np.float32],
    science: NDArray[np.float32],
    template: NDArray[np.float32],
    bad: NDArray[np.bool_],
    saturated: NDArray[np.bool_],
    saturated_in_row: NDArray[np.bool_],
    fwhms: NDArray[np.float64],
    enclosed: NDArray[np.float64],
    cells: NDArray[np.int64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    sign: NDArray[np.float64],
    flux: NDArray[np.float64],
    noise: float,
    columns: NDArray[np.float64],
) -> None:
    """Fill the rows of `columns`, in the order of `_STAMP_FEATURES`."""
    ny, nx = difference.shape
    for source in range(x.size):
        size = abs(flux[source])
        if not 0.0 < size < np.inf:
            continue
        fwhm = fwhms[cells[source]]
        peak_part, core_part, aperture_part = enclosed[cells[source]]
        at_x, at_y = x[source], y[source]
        centre_x, centre_y = math.floor(at_x + 0.5), math.floor(at_y + 0.5)
        twice_x, twice_y = math.floor(2.0 * at_x + 0.5), math.floor(2.0 * at_y + 0.5)
        peak, core, aperture = -np.inf, 0.0, 0.0
        same, opposite, odd, even = 0.0, 0.0, 0.0, 0.0
        core2, aperture2 = (_CORE_FWHM * fwhm) ** 2, (_APERTURE_FWHM * fwhm) ** 2
        noise2, least2 = noise * noise, (_SURE_SIGMA * noise) ** 2
        for row in range(*_rows(at_y, _NEGATIVE_FWHM * fwhm, 1, ny)):
            first, last = _chord(at_x, at_y, row, _NEGATIVE_FWHM * fwhm, nx)
            for column in range(first, last + 1):
                value, power = np.float64(difference[row, column]), np.float64(variance[row, column])
                if bad[row, column] or not (0.0 < power < np.inf) or not (-np.inf < value < np.inf):
                    continue
                value *= sign[source]
                if abs(column - centre_x) <= 1 and abs(row - centre_y) <= 1:
                    peak = max(peak, value)
                sure = value if value * value > least2 * power else 0.0  # no branch: noise would take either
                same += max(sure, 0.0)
                opposite += max(-sure, 0.0)
                distance2 = (column - at_x) ** 2 + (row - at_y) ** 2
                if distance2 > aperture2:
                    continue
                aperture += value
                if distance2 <= core2:
                    core += value
                mirror_x, mirror_y = twice_x - column, twice_y - row
                if 0 <= mirror_x < nx and 0 <= mirror_y < ny:
                    other, other_power = difference[mirror_y, mirror_x], variance[mirror_y, mirror_x]
                    if not bad[mirror_y, mirror_x] and 0.0 < other_power < np.inf and -np.inf < other < np.inf:
                        odd += (value - sign[source] * other) ** 2 - (power + other_power) * noise2
                        even += (value + sign[source] * other) ** 2
        static = template if sign[source] > 0.0 else science
        near0 = _brightest(static, bad, at_x, at_y, 0.0, _STATIC_FWHM[0] * fwhm, 1)
        near1 = _brightest(static, bad, at_x, at_y, _STATIC_FWHM[0] * fwhm, _STATIC_FWHM[1] * fwhm, 1)
        step = max(1, math.floor(_STATIC_ROWS_FWHM * fwhm))
        near2 = _brightest(static, bad, at_x, at_y, _STATIC_FWHM[1] * fwhm, _STATIC_FWHM[2] * fwhm, step)
        step = max(1, math.floor(_NOISE_ROWS_FWHM * fwhm))
        nearest, area = _saturation(saturated, saturated_in_row, at_x, at_y, fwhm)
        ring_level = _mean_deviation(
            difference, variance, bad, at_x, at_y, _NEGATIVE_FWHM * fwhm, _NOISE_FWHM[1] * fwhm, step
        )
        columns[0, source] = min(peak / (size * peak_part), 5.0)
        columns[1, source] = opposite / (same + opposite) if same + opposite > 0.0 else np.nan
        columns[2, source] = math.sqrt(min(max(odd / even, 0.0), 4.0)) if even > 0.0 else np.nan
        columns[3, source] = min(max(core / (size * core_part), -1.0), 3.0)
        columns[4, source] = min(max(aperture / (size * aperture_part), -1.0), 5.0)
        columns[5, source] = _masked_part(bad, centre_x, centre_y)
        columns[6, source] = _log_of(near0, size * peak_part)
        columns[7, source] = _log_of(near1, size * peak_part)
        columns[8, source] = _log_of(near2, size * peak_part)
        columns[9, source] = nearest
        columns[10, source] = math.log10(1.0 + area / fwhm**2)
        columns[11, source] = min(ring_level / (_MEAN_ABSOLUTE * noise), 10.0)


@njit(cache=True)
def _span(middle: float, radius: float, n: int) -> tuple[int, int]:
    """First and last of n pixels that are no farther than `radius` from `middle`; none: the last before the first."""
    radius = min(radius, _LARGEST_REACH_PIX)
    return max(0, math.ceil(middle - radius)), min(n - 1, math.floor(middle + radius))


@njit(cache=True)
def _rows(y: float, radius: float, step: int, ny: int) -> tuple[int, int, int]:
    """Range of every `step`-th row no farther than `radius`, the one nearest to y among them."""
    first, last = _span(y, radius, ny)
    return first + (math.floor(y + 0.5) - first) % step, last + 1, step


@njit(cache=True)
def _chord(x: float, y: float, row: int, radius: float, nx: int) -> tuple[int, int]:
    """First and last column of a row inside a circle; none: the last before the first."""
    left2 = radius * radius - (row - y) ** 2
    return _span(x, math.sqrt(left2), nx) if left2 >= 0.0 else (0, -1)


@njit(cache=True)
def _ring(x: float, y: float, row: int, inner: float, outer: float, nx: int) -> tuple[int, int, int, int]:
    """First column and the one behind the last of both parts of a row in a ring; inner 0 is all of a circle."""
    first, last = _chord(x, y, row, outer, nx)
    hole_first, hole_last = _chord(x, y, row, inner, nx) if inner > 0.0 else (0, -1)
    if hole_last < hole_first:
        return first, last + 1, 0, 0
    return first, hole_first, hole_last + 1, last + 1


@njit(cache=True)
def _brightest(
    plane: NDArray[np.float32], bad: NDArray[np.bool_], x: float, y: float, inner: float, outer: float, step: int
) -> float:
    """Brightest good pixel in every `step`-th row of a ring, -inf if it has none."""
    brightest = np.float32(-np.inf)
    for row in range(*_rows(y, outer, step, plane.shape[0])):
        start, stop, next_start, next_stop = _ring(x, y, row, inner, outer, plane.shape[1])
        for begin, end in ((start, stop), (next_start, next_stop)):
            for column in range(begin, end):
                value = plane[row, column]
                if value > brightest and not bad[row, column] and value < np.inf:
                    brightest = value
    return np.float64(brightest)


@njit(cache=True)
def _mean_deviation(
    difference: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x: float,
    y: float,
    inner: float,
    outer: float,
    step: int,
) -> float:
    """Mean |D| / sigma of every `step`-th row of a ring, NaN if it has no good pixel."""
    total, n_good = 0.0, 0
    for row in range(*_rows(y, outer, step, difference.shape[0])):
        start, stop, next_start, next_stop = _ring(x, y, row, inner, outer, difference.shape[1])
        for begin, end in ((start, stop), (next_start, next_stop)):
            for column in range(begin, end):
                value, power = difference[row, column], variance[row, column]
                if not bad[row, column] and 0.0 < power < np.inf and -np.inf < value < np.inf:
                    total += abs(value) / np.sqrt(power)  # in float32, half the time
                    n_good += 1
    return total / n_good if n_good > 0 else np.nan


@njit(cache=True)
def _saturation(
    saturated: NDArray[np.bool_], in_row: NDArray[np.bool_], x: float, y: float, fwhm: float
) -> tuple[float, int]:
    """Distance to the nearest saturated pixel, in FWHM, and how many there are; looked for within 6 FWHM.

    `in_row` says which rows have any: few, so most are skipped.
    """
    nearest2, n_saturated = (_SATURATION_FWHM * fwhm) ** 2, 0
    for row in range(*_rows(y, _SATURATION_FWHM * fwhm, 1, saturated.shape[0])):
        if not in_row[row]:
            continue
        first, last = _chord(x, y, row, _SATURATION_FWHM * fwhm, saturated.shape[1])
        for column in range(first, last + 1):
            if saturated[row, column]:
                n_saturated += 1
                nearest2 = min(nearest2, (column - x) ** 2 + (row - y) ** 2)
    return math.sqrt(nearest2) / fwhm, n_saturated


@njit(cache=True)
def _masked_part(bad: NDArray[np.bool_], centre_x: int, centre_y: int) -> float:
    """Part of the box around a pixel that is bad or beyond the border."""
    ny, nx = bad.shape
    good = 0
    for row in range(max(0, centre_y - _MASK_HALF_WIDTH_PIX), min(ny, centre_y + _MASK_HALF_WIDTH_PIX + 1)):
        for column in range(max(0, centre_x - _MASK_HALF_WIDTH_PIX), min(nx, centre_x + _MASK_HALF_WIDTH_PIX + 1)):
            good += not bad[row, column]
    return 1.0 - good / (2.0 * _MASK_HALF_WIDTH_PIX + 1.0) ** 2


@njit(cache=True, error_model="numpy")
def _log_of(light: float, unit: float) -> float:
    """log10 of light / unit, from -2 (nothing there) to 4; NaN where there was no pixel."""
    if light == -np.inf:
        return np.nan
    return math.log10(min(max(light / unit, 1e-2), 10.0**_HIGHEST_LOG))

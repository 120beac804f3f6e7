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
    "static_far": "the same between 2 and 5 FWHM",
    "static_flux": "log10 of the PSF flux of the static light over the flux",
    "expected_residual": "static_core and log10 of the part that subtraction may leave",
    "saturation_distance": "to the nearest pixel saturated in either image, in FWHM, at most 6",
    "saturated_area": "log10 of 1 + the saturated pixels within 6 FWHM, in FWHM^2",
    "local_noise": "mean |D| / sigma between 2 and 4 FWHM, over that of Gaussian noise of the image's level",
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
    negated, and when the planes are mirrored (tested). 15 to 75 us a source for a FWHM of 2 to 8 pixels.
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


def _enclosed(psfs: NDArray[np.floating], fwhms: NDArray[np.float64], used: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, 3): of each PSF that is used its middle pixel, and its sums within the radii of core and aperture."""
    half = psfs.shape[1] // 2
    distance = np.hypot(*np.mgrid[-half : half + 1, -half : half + 1])
    enclosed = np.full((len(psfs), 3), np.nan)
    for row in np.unique(used):
        psf = psfs[row].astype(np.float64)
        within = [psf[distance <= radius * fwhms[row]].sum() for radius in (_CORE_FWHM, _APERTURE_FWHM)]
        enclosed[row] = psf[half, half], *within
    return enclosed


@njit(cache=True, error_model="numpy")  # a PSF may have no light in its middle
def _measure_stamps(
    difference: NDArray[np.float32],
    variance: NDArray[np.float32],
    science: NDArray[np.float32],
    template: NDArray[np.float32],
    bad: NDArray[np.bool_],
    saturated: NDArray[np.bool_],
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
        centre_x, centre_y = math.floor(x[source] + 0.5), math.floor(y[source] + 0.5)
        off_x, off_y = x[source] - centre_x, y[source] - centre_y
        twice_x, twice_y = math.floor(2.0 * x[source] + 0.5), math.floor(2.0 * y[source] + 0.5)
        reach = min(math.ceil(_SATURATION_FWHM * fwhm), _LARGEST_REACH_PIX)
        peak, core, aperture = -np.inf, 0.0, 0.0
        same, opposite, odd, even = 0.0, 0.0, 0.0, 0.0
        near0, near1, near2 = -np.inf, -np.inf, -np.inf
        nearest, area = _SATURATION_FWHM, 0
        absolute, ring = 0.0, 0
        static_plane = template if sign[source] > 0.0 else science
        static_core2, static_near2 = (_STATIC_FWHM[0] * fwhm) ** 2, (_STATIC_FWHM[1] * fwhm) ** 2
        static_far2 = (_STATIC_FWHM[2] * fwhm) ** 2
        noise2, core2 = (_NOISE_FWHM[1] * fwhm) ** 2, (_CORE_FWHM * fwhm) ** 2
        aperture2, negative2 = (_APERTURE_FWHM * fwhm) ** 2, (_NEGATIVE_FWHM * fwhm) ** 2
        for v in range(max(-reach, -centre_y), min(reach + 1, ny - centre_y)):
            row = centre_y + v
            for u in range(max(-reach, -centre_x), min(reach + 1, nx - centre_x)):
                column = centre_x + u
                distance2 = (u - off_x) ** 2 + (v - off_y) ** 2
                is_saturated = saturated[row, column]
                if distance2 > static_far2 and not is_saturated:
                    continue
                if is_saturated:
                    distance = math.sqrt(distance2) / fwhm
                    if distance < _SATURATION_FWHM:
                        area += 1
                        nearest = min(nearest, distance)
                if bad[row, column] or distance2 > static_far2:
                    continue
                static = np.float64(static_plane[row, column])
                if static < np.inf:
                    if distance2 <= static_core2:
                        near0 = max(near0, static)
                    elif distance2 <= static_near2:
                        near1 = max(near1, static)
                    else:
                        near2 = max(near2, static)
                if distance2 > noise2:
                    continue
                value, power = np.float64(difference[row, column]), np.float64(variance[row, column])
                if not (0.0 < power < np.inf) or not (-np.inf < value < np.inf):
                    continue
                value *= sign[source]
                if distance2 > negative2:
                    absolute += math.sqrt(value * value / power)
                    ring += 1
                    continue
                sigma = math.sqrt(power) * noise
                if abs(u) <= 1 and abs(v) <= 1:
                    peak = max(peak, value)
                if distance2 <= core2:
                    core += value
                if value > _SURE_SIGMA * sigma:
                    same += value
                elif value < -_SURE_SIGMA * sigma:
                    opposite -= value
                if distance2 > aperture2:
                    continue
                aperture += value
                mirror_x, mirror_y = twice_x - column, twice_y - row
                if 0 <= mirror_x < nx and 0 <= mirror_y < ny:
                    other, other_power = difference[mirror_y, mirror_x], variance[mirror_y, mirror_x]
                    if not bad[mirror_y, mirror_x] and 0.0 < other_power < np.inf and -np.inf < other < np.inf:
                        odd += (value - sign[source] * other) ** 2 - (power + other_power) * noise**2
                        even += (value + sign[source] * other) ** 2
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
        columns[11, source] = min(absolute / (ring * _MEAN_ABSOLUTE * noise), 10.0) if ring > 0 else np.nan


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

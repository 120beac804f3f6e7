"""Measurement of detected sources: sub-pixel centroids, PSF and aperture fluxes, shapes, mask flags.

All sources of an image are measured in a few compiled loops over stamps; nothing here runs Python per source.
Columns are float64 with NaN for "not measurable"; the units are those of the pixels, the caller converts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import sep
from numba import njit
from numpy.typing import ArrayLike, NDArray

from transforms.numerics.detection import Detections, gaussian_variances
from transforms.numerics.forced_photometry import (
    PsfSplines,
    checked_planes,
    evaluate_psf,
    linear_psf_fit,
    pixel_weight,
    psf_splines,
)
from transforms.numerics.psf_grid import PsfGrid, as_psf_grid

APERTURE_RADIUS_PIX = 12.0
CENTROID_SHIFT_MAX_PIX = 5.0
CENTRE_HALF_WIDTH_PIX = 1  # 'center' flags look at the 3 x 3 pixels around the centroid
FLAG_RADIUS_PIX = 3  # flags look at least this far around the centroid, however small the footprint
_CENTROID_ITERATIONS = 40
_CENTROID_STEP_MAX_PIX = 0.5
_CENTROID_TOLERANCE_PIX = 1e-4
_CENTROID_TOLERANCE_ERR = 0.02  # of the standard error; trails have flat tops, where steps shrink slowly
_SHAPE_HALF_WIDTH_PIX = 18
_SHAPE_REACH_SIGMA = 5.0  # the weight there is 4e-6: pixels that enter or leave the window do not stir the iteration
_SHAPE_ITERATIONS = 60
_SHAPE_TOLERANCE = 1e-4
_ELONGATED_AXIS_RATIO2 = 2.25  # of a footprint's second moments: axes 1.5 to 1
_ELONGATED_SPREAD_PSF = 4.0  # in PSF sigma^2; the footprint of a point source has 2, that of a 3 FWHM trail 4
_TRAIL_HALF_WIDTH_PIX = 40  # 62.5 pixels of trail (10 deg / day, 30 s, 0.2 arcsec) and the PSF's wings
_TRAIL_STEP_MAX_PIX = 2.0
_TRAIL_TOLERANCE_PIX = 1e-3
_SHAPE_GOOD_WEIGHT_MIN = 0.95  # a mask that cuts a fifth off one side halves the moment across it
_PEAK_NOISE_ALLOWANCE = 3.0  # sigma; the largest of 9 pure-noise pixels passes it in 1 % of sources


class Measurements(NamedTuple):
    """Measured columns of n sources, in the order of the detections; every array has shape (n,).

    Attributes
    ----------
    x, y : centroid in pixels, 0-based, always finite: the middle of a trail, the peak's pixel where `centroid_flag`
    x_err, y_err : standard errors in pixels from the noise of the pixels; NaN where `centroid_flag`
    x_y_cov : covariance of x and y in pixels^2; NaN where `centroid_flag`
    centroid_flag : the fit was singular, did not settle, or left the peak by more than 5 pixels
    snr : |significance| at the peak
    is_negative : the footprint comes from the negative detections only
    psf_flux, psf_flux_err, psf_chi2, psf_ln_likelihood : linear PSF fit on the difference at (x, y)
    psf_n_pixels : int32, usable pixels of that fit
    psf_flux_flag, psf_flux_flag_edge, psf_flux_flag_no_good_pixels : no flux; stamp crosses the border; no usable pixel
    ap_flux, ap_flux_err : sum in a circle of radius 12 pixels (masked area scaled for) and its error
    ap_flux_flag, ap_flux_flag_truncated : no flux; the circle crosses the border
    science_flux, science_flux_err, template_flux, template_flux_err : the same linear fit on the other two images
    forced_flux_flag, forced_flux_flag_edge, forced_flux_flag_no_good_pixels : as for the PSF flux, for either image
    ixx, iyy, ixy : adaptive second moments of the source in pixels^2, NaN where not measurable
    ixx_psf, iyy_psf, ixy_psf : the same of the PSF at the source
    bbox_size : int32, side in pixels of the square around the centroid that holds the footprint
    has_both_signs, opposite_snr : as in `Detections`, for the reliability
    core_chi2, core_n_pixels : chi-square and usable pixels of the PSF fit within the PSF's core
    peak_excess : brightness of the best of 3 x 3 pixels beyond the PSF model and 3 sigma, in units of the model's peak
    good_weight : part of the PSF's effective weight on usable pixels
    size_ratio : second moment under a PSF-like weight over that of the PSF; below 1 is sharper than the PSF, NaN where
        not measurable
    star_flux : largest pixel of science or template within the PSF's core, as the flux of a star with that peak
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    x_err: NDArray[np.float64]
    y_err: NDArray[np.float64]
    x_y_cov: NDArray[np.float64]
    centroid_flag: NDArray[np.bool_]
    snr: NDArray[np.float64]
    is_negative: NDArray[np.bool_]
    psf_flux: NDArray[np.float64]
    psf_flux_err: NDArray[np.float64]
    psf_chi2: NDArray[np.float64]
    psf_ln_likelihood: NDArray[np.float64]
    psf_n_pixels: NDArray[np.int32]
    psf_flux_flag: NDArray[np.bool_]
    psf_flux_flag_edge: NDArray[np.bool_]
    psf_flux_flag_no_good_pixels: NDArray[np.bool_]
    ap_flux: NDArray[np.float64]
    ap_flux_err: NDArray[np.float64]
    ap_flux_flag: NDArray[np.bool_]
    ap_flux_flag_truncated: NDArray[np.bool_]
    science_flux: NDArray[np.float64]
    science_flux_err: NDArray[np.float64]
    template_flux: NDArray[np.float64]
    template_flux_err: NDArray[np.float64]
    forced_flux_flag: NDArray[np.bool_]
    forced_flux_flag_edge: NDArray[np.bool_]
    forced_flux_flag_no_good_pixels: NDArray[np.bool_]
    ixx: NDArray[np.float64]
    iyy: NDArray[np.float64]
    ixy: NDArray[np.float64]
    ixx_psf: NDArray[np.float64]
    iyy_psf: NDArray[np.float64]
    ixy_psf: NDArray[np.float64]
    bbox_size: NDArray[np.int32]
    has_both_signs: NDArray[np.bool_]
    opposite_snr: NDArray[np.float64]
    core_chi2: NDArray[np.float64]
    core_n_pixels: NDArray[np.int32]
    peak_excess: NDArray[np.float64]
    good_weight: NDArray[np.float64]
    size_ratio: NDArray[np.float64]
    star_flux: NDArray[np.float64]


class Centroids(NamedTuple):
    """Fitted positions of n sources; see `fit_centroids`."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    x_err: NDArray[np.float64]
    y_err: NDArray[np.float64]
    x_y_cov: NDArray[np.float64]
    flag: NDArray[np.bool_]


class MaskFlags(NamedTuple):
    """Mask planes met by n sources: (n,) bool for each plane name, and whether the centroid is off the image."""

    anywhere: dict[str, NDArray[np.bool_]]
    centre: dict[str, NDArray[np.bool_]]
    off_image: NDArray[np.bool_]


def measure_sources(
    difference: ArrayLike,
    variance: ArrayLike,
    science: ArrayLike,
    science_variance: ArrayLike,
    matched_template: ArrayLike,
    template_variance: ArrayLike,
    bad: NDArray[np.bool_],
    psf: ArrayLike | PsfGrid,
    detections: Detections,
    science_psf: ArrayLike | PsfGrid | None = None,
) -> Measurements:
    """Measure every detected source on the difference, the science image and the matched template.

    The PSF of a source is that of the cell its peak lies in.

    Parameters
    ----------
    difference, science, matched_template : (ny, nx), used as float32, one unit, free of background
    variance, science_variance, template_variance : (ny, nx), used as float32, that unit squared
    bad : (ny, nx) bool, pixels that no measurement uses; those that are not finite or have no positive variance join
    psf : (k, k) odd image summing to 1, or a grid of such, the PSF of the difference
    detections : from `find_peaks` on the same pixels
    science_psf : the PSF of science and matched template when it differs from `psf` (decorrelation changes it)

    Returns
    -------
    Measurements
        Everything is finite or NaN whatever the pixels hold.

    Raises
    ------
    PsfError
        As `as_psf_grid`.
    ValueError
        Planes differ in shape.

    Notes
    -----
    Tested: flux pulls have mean 0 and width 1, centroid errors are within 20 % of the Cramer-Rao bound at S/N 20.
    60 to 160 us per source for a FWHM of 2 to 8 pixels, plus a few passes over the image for the apertures.
    """
    pixels, pixel_variance, masked = checked_planes(difference, variance, bad)
    science_pixels, science_pixel_variance, _ = checked_planes(science, science_variance, masked)
    template_pixels, template_pixel_variance, _ = checked_planes(matched_template, template_variance, masked)
    psf = as_psf_grid(psf)
    splines = psf_splines(psf, detections.peak_x, detections.peak_y)
    science_splines = splines
    if science_psf is not None:
        science_splines = psf_splines(science_psf, detections.peak_x, detections.peak_y)
    peak_fits = fit_centroids(pixels, pixel_variance, masked, splines, detections.peak_x, detections.peak_y)
    sign = np.where(detections.peak_snr < 0.0, -1.0, 1.0)
    centroids, trail_shapes = _centre_elongated(pixels, pixel_variance, masked, psf, detections, sign, peak_fits)
    x, y = centroids.x, centroids.y
    fit = linear_psf_fit(pixels, pixel_variance, splines, x, y, masked)
    on_science = linear_psf_fit(science_pixels, science_pixel_variance, science_splines, x, y, masked)
    on_template = linear_psf_fit(template_pixels, template_pixel_variance, science_splines, x, y, masked)
    ap_flux, ap_flux_err, truncated = _aperture_fluxes(pixels, pixel_variance, masked, x, y)
    psf_shapes = _moments_of_psfs(psf, detections)
    shapes = np.full((4, x.size), np.nan)
    _adaptive_moments(pixels, pixel_variance, masked, x, y, sign, psf_shapes, shapes)
    shapes[:3] = np.where(np.isnan(trail_shapes), shapes[:3], trail_shapes)
    core, core_n_pixels = _core_features(
        pixels, pixel_variance, masked, science_pixels, template_pixels, splines, x, y, sign, fit.flux
    )
    return Measurements(
        x=x,
        y=y,
        x_err=centroids.x_err,
        y_err=centroids.y_err,
        x_y_cov=centroids.x_y_cov,
        centroid_flag=centroids.flag,
        snr=np.abs(detections.peak_snr.astype(np.float64)),
        is_negative=detections.is_negative,
        psf_flux=fit.flux,
        psf_flux_err=fit.flux_err,
        psf_chi2=fit.chi2,
        psf_ln_likelihood=fit.ln_likelihood,
        psf_n_pixels=fit.n_pixels,
        psf_flux_flag=~fit.good,
        psf_flux_flag_edge=fit.edge,
        psf_flux_flag_no_good_pixels=fit.n_pixels == 0,
        ap_flux=ap_flux,
        ap_flux_err=ap_flux_err,
        ap_flux_flag=np.isnan(ap_flux),
        ap_flux_flag_truncated=truncated,
        science_flux=on_science.flux,
        science_flux_err=on_science.flux_err,
        template_flux=on_template.flux,
        template_flux_err=on_template.flux_err,
        forced_flux_flag=~(on_science.good & on_template.good),
        forced_flux_flag_edge=on_science.edge,
        forced_flux_flag_no_good_pixels=(on_science.n_pixels == 0) | (on_template.n_pixels == 0),
        ixx=shapes[0],
        iyy=shapes[1],
        ixy=shapes[2],
        ixx_psf=psf_shapes[0],
        iyy_psf=psf_shapes[1],
        ixy_psf=psf_shapes[2],
        bbox_size=_bbox_sizes(detections, x, y),
        has_both_signs=detections.has_both_signs,
        opposite_snr=detections.opposite_snr.astype(np.float64),
        core_chi2=core[0],
        core_n_pixels=core_n_pixels,
        peak_excess=core[1],
        good_weight=fit.good_weight,
        size_ratio=shapes[3],
        star_flux=core[2],
    )


def fit_centroids(
    image: ArrayLike,
    variance: ArrayLike,
    bad: NDArray[np.bool_],
    psf: ArrayLike | PsfGrid | PsfSplines,
    peak_x: ArrayLike,
    peak_y: ArrayLike,
) -> Centroids:
    """Fit flux and position of a PSF around each peak by Gauss-Newton with inverse-variance weights.

    Minimises sum((D - f P(x, y))^2 / V) over the stamp around the peak; at each step the flux is the linear optimum
    and the step in (x, y) solves the normal equations with the flux projected out. Steps are limited to half a pixel.

    Parameters
    ----------
    image, variance, bad : (ny, nx) planes as in `linear_psf_fit`
    psf : (k, k) odd image summing to 1, a grid of such, or the prepared `PsfSplines` of these sources
    peak_x, peak_y : (n,) integer pixels to start from

    Returns
    -------
    Centroids
        Position, its standard errors and covariance. Where the problem is singular or not finite, does not settle in
        40 steps, or ends more than 5 pixels from the peak: the peak itself, NaN errors, and `flag`.
    """
    pixels, pixel_variance, masked = checked_planes(image, variance, bad)
    start_x = np.ascontiguousarray(peak_x, dtype=np.int64)
    start_y = np.ascontiguousarray(peak_y, dtype=np.int64)
    splines = psf if isinstance(psf, PsfSplines) else psf_splines(psf, start_x, start_y)
    fitted = np.full((5, start_x.size), np.nan)
    flag = np.ones(start_x.size, dtype=np.bool_)
    _fit_positions(pixels, pixel_variance, masked, *splines, start_x, start_y, fitted, flag)
    return Centroids(fitted[0], fitted[1], fitted[2], fitted[3], fitted[4], flag)


def _centre_elongated(
    pixels: NDArray[np.float32],
    variance: NDArray[np.float32],
    masked: NDArray[np.bool_],
    psf: PsfGrid,
    detections: Detections,
    sign: NDArray[np.float64],
    peak_fits: Centroids,
) -> tuple[Centroids, NDArray[np.float64]]:
    """Centroids with those of trails at their middle, and the (3, n) second moments of the trails, NaN for the others.

    A PSF fitted to a trail settles on a bump of noise anywhere along it. So a footprint of one sign that is longer
    than a PSF makes gets the self-weighting elliptical Gaussian with a free centre, which is unbiased for anything
    symmetric. Where that does not settle within the footprint's box, the PSF fit stands.
    """
    sigma2 = gaussian_variances(psf.of_cells)[psf.cells_at(detections.peak_x, detections.peak_y)]
    xx, yy, xy = detections.spread_xx, detections.spread_yy, detections.spread_xy
    half_trace, half_split = 0.5 * (xx + yy), np.hypot(0.5 * (xx - yy), xy)
    major, minor = half_trace + half_split, half_trace - half_split
    chosen = np.flatnonzero(
        ~detections.has_both_signs & (major > _ELONGATED_SPREAD_PSF * sigma2) & (major > _ELONGATED_AXIS_RATIO2 * minor)
    )
    start = np.stack([xx, yy, xy])[:, chosen] + np.array([[1.0], [1.0], [0.0]])  # never narrower than a pixel
    centred = np.full((8, chosen.size), np.nan)
    _centre_moments(
        pixels, variance, masked, detections.mean_x[chosen], detections.mean_y[chosen], sign[chosen], start, centred
    )
    with np.errstate(invalid="ignore"):
        inside = (centred[0] >= detections.x0[chosen]) & (centred[0] < detections.x1[chosen])
        inside &= (centred[1] >= detections.y0[chosen]) & (centred[1] < detections.y1[chosen])
    moved = chosen[inside]
    fitted = np.stack(peak_fits[:5])
    fitted[:, moved] = centred[:5, inside]
    flag = peak_fits.flag.copy()
    flag[moved] = False
    trail_shapes = np.full((3, xx.size), np.nan)
    trail_shapes[:, moved] = centred[5:, inside]
    return Centroids(fitted[0], fitted[1], fitted[2], fitted[3], fitted[4], flag), trail_shapes


def psf_moments(psf: ArrayLike) -> tuple[float, float, float]:
    """Adaptive second moments (ixx, iyy, ixy) of a PSF image in pixels^2; NaN when they do not settle.

    Parameters
    ----------
    psf : (k, k) odd image

    Raises
    ------
    PsfError
        As `as_psf_grid`.
    """
    moments = _moments_of_stack(as_psf_grid(psf).middle[np.newaxis])
    return float(moments[0, 0]), float(moments[1, 0]), float(moments[2, 0])


def _moments_of_psfs(psf: PsfGrid, detections: Detections) -> NDArray[np.float64]:
    """(3, n) moments of the PSF of each source."""
    cells, of_source = np.unique(psf.cells_at(detections.peak_x, detections.peak_y), return_inverse=True)
    return np.ascontiguousarray(_moments_of_stack(psf.of_cells[cells])[:, of_source])


def _moments_of_stack(psfs: NDArray[np.floating]) -> NDArray[np.float64]:
    """(3, n) adaptive moments of (n, k, k) PSF images."""
    images = np.ascontiguousarray(psfs, dtype=np.float64)
    moments = np.full((3, len(images)), np.nan)
    sums = np.array([image.sum() for image in images]).reshape(-1, 1, 1)
    _moments_of_images((images / sums).astype(np.float32), gaussian_variances(images), moments)
    return moments


def mask_flags(
    mask: ArrayLike,
    bits: Mapping[str, int],
    x: ArrayLike,
    y: ArrayLike,
    detections: Detections,
    radius_pix: int = FLAG_RADIUS_PIX,
) -> MaskFlags:
    """Tell which mask planes each source meets.

    Parameters
    ----------
    mask : (ny, nx) integer
    bits : bit number of each plane, 0 to 31
    x, y : (n,) centroids in pixels, finite
    detections : the sources' bounding boxes
    radius_pix : how far around the centroid `anywhere` looks at least, >= 0

    Returns
    -------
    MaskFlags
        `anywhere`: a pixel with that bit lies in the footprint's bounding box or within `radius_pix` of the centroid;
        `centre`: one lies in the 3 x 3 pixels around the centroid. Pixels beyond the border have no bits.
    """
    planes = np.ascontiguousarray(mask, dtype=np.int64)
    x_pix = np.floor(np.asarray(x, dtype=np.float64) + 0.5).astype(np.int64)
    y_pix = np.floor(np.asarray(y, dtype=np.float64) + 0.5).astype(np.int64)
    wide = np.stack(
        [
            np.minimum(detections.y0, y_pix - radius_pix),
            np.maximum(detections.y1, y_pix + radius_pix + 1),
            np.minimum(detections.x0, x_pix - radius_pix),
            np.maximum(detections.x1, x_pix + radius_pix + 1),
        ]
    )
    near = np.stack(
        [
            y_pix - CENTRE_HALF_WIDTH_PIX,
            y_pix + CENTRE_HALF_WIDTH_PIX + 1,
            x_pix - CENTRE_HALF_WIDTH_PIX,
            x_pix + CENTRE_HALF_WIDTH_PIX + 1,
        ]
    )
    anywhere, centre = _or_boxes(planes, wide), _or_boxes(planes, near)
    ny, nx = planes.shape
    return MaskFlags(
        anywhere={name: (anywhere >> bit & 1).astype(np.bool_) for name, bit in bits.items()},
        centre={name: (centre >> bit & 1).astype(np.bool_) for name, bit in bits.items()},
        off_image=(x_pix < 0) | (y_pix < 0) | (x_pix >= nx) | (y_pix >= ny),
    )


def _aperture_fluxes(
    pixels: NDArray[np.float32],
    variance: NDArray[np.float32],
    masked: NDArray[np.bool_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Circular aperture sums by sep, on planes where unusable pixels are masked and hold nothing odd."""
    data, data_variance, unusable = _without_unusable(pixels, variance, masked)
    flux, flux_err, sep_flag = sep.sum_circle(
        data, x, y, APERTURE_RADIUS_PIX, var=data_variance, mask=unusable, subpix=0
    )
    measured = np.isfinite(flux) & np.isfinite(flux_err) & (flux_err > 0.0) & (sep_flag & sep.APER_ALLMASKED == 0)
    ny, nx = pixels.shape
    reach = APERTURE_RADIUS_PIX
    truncated = (x - reach < -0.5) | (y - reach < -0.5) | (x + reach > nx - 0.5) | (y + reach > ny - 0.5)
    return np.where(measured, flux, np.nan), np.where(measured, flux_err, np.nan), truncated


def _bbox_sizes(detections: Detections, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int32]:
    """LSST's rule: min(ceil(2 max |box edge - centroid|), 2 max(width, height)), edges being the outermost pixels."""
    edges = np.stack(
        [
            np.abs(detections.x0 - x),
            np.abs(detections.x1 - 1 - x),
            np.abs(detections.y0 - y),
            np.abs(detections.y1 - 1 - y),
        ]
    )
    side = np.maximum(detections.x1 - detections.x0, detections.y1 - detections.y0)
    return np.minimum(np.ceil(2.0 * edges.max(axis=0)), 2.0 * side).astype(np.int32)


def _core_features(
    pixels: NDArray[np.float32],
    variance: NDArray[np.float32],
    masked: NDArray[np.bool_],
    science: NDArray[np.float32],
    template: NDArray[np.float32],
    splines: PsfSplines,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    sign: NDArray[np.float64],
    flux: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Rows core_chi2, peak_excess, star_flux, and the number of usable core pixels."""
    real = np.full((3, x.size), np.nan)
    n_pixels = np.zeros(x.size, dtype=np.int32)
    _measure_cores(
        pixels,
        variance,
        masked,
        science,
        template,
        *splines,
        x,
        y,
        sign,
        flux,
        real,
        n_pixels,
    )
    return real, n_pixels


@njit(cache=True)
def _without_unusable(
    pixels: NDArray[np.float32], variance: NDArray[np.float32], masked: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels and variance with 0 where they are unusable, and where that is, in one pass."""
    data, data_variance, unusable = np.zeros_like(pixels), np.zeros_like(variance), np.ones_like(masked)
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            if pixel_weight(pixels[y, x], variance[y, x], masked[y, x]) > 0.0:
                data[y, x], data_variance[y, x], unusable[y, x] = pixels[y, x], variance[y, x], False
    return data, data_variance, unusable


@njit(cache=True)
def _fit_positions(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    coefficients: NDArray[np.float64],
    half_width: int,
    of_source: NDArray[np.int64],
    peak_x: NDArray[np.int64],
    peak_y: NDArray[np.int64],
    fitted: NDArray[np.float64],
    flag: NDArray[np.bool_],
) -> None:
    """Fill `fitted` (x, y, x_err, y_err, x_y_cov) and `flag` for each source."""
    ny, nx = image.shape
    width = 2 * half_width + 1
    model = np.empty((width, width))
    slope_x, slope_y = np.empty((width, width)), np.empty((width, width))
    for source in range(peak_x.size):
        fitted[0, source], fitted[1, source] = peak_x[source], peak_y[source]
        x0, y0 = peak_x[source] - half_width, peak_y[source] - half_width
        j0, j1 = max(0, -y0), min(width, ny - y0)
        i0, i1 = max(0, -x0), min(width, nx - x0)
        dx, dy = 0.0, 0.0
        for iteration in range(_CENTROID_ITERATIONS):
            evaluate_psf(coefficients[of_source[source]], half_width, dx, dy, model, slope_x, slope_y)
            pp, px, py, xx, xy, yy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            pd, xd, yd = 0.0, 0.0, 0.0
            for j in range(j0, j1):
                for i in range(i0, i1):
                    value = np.float64(image[y0 + j, x0 + i])
                    weight = pixel_weight(value, variance[y0 + j, x0 + i], bad[y0 + j, x0 + i])
                    if weight > 0.0:
                        p, gx, gy = model[j, i], slope_x[j, i], slope_y[j, i]
                        pp += weight * p * p
                        px += weight * p * gx
                        py += weight * p * gy
                        xx += weight * gx * gx
                        xy += weight * gx * gy
                        yy += weight * gy * gy
                        pd += weight * p * value
                        xd += weight * gx * value
                        yd += weight * gy * value
            if not pp > 0.0:
                break
            flux = pd / pp
            information_xx = flux * flux * (xx - px * px / pp)
            information_xy = flux * flux * (xy - px * py / pp)
            information_yy = flux * flux * (yy - py * py / pp)
            determinant = information_xx * information_yy - information_xy * information_xy
            if not (
                information_xx > 0.0
                and information_yy > 0.0
                and determinant > 1e-9 * information_xx * information_yy
                and determinant < np.inf
            ):
                break
            gradient_x, gradient_y = flux * (xd - flux * px), flux * (yd - flux * py)
            step_x = (information_yy * gradient_x - information_xy * gradient_y) / determinant
            step_y = (information_xx * gradient_y - information_xy * gradient_x) / determinant
            error_x, error_y = math.sqrt(information_yy / determinant), math.sqrt(information_xx / determinant)
            largest = max(abs(step_x), abs(step_y))
            settled = largest <= max(_CENTROID_TOLERANCE_PIX, _CENTROID_TOLERANCE_ERR * min(error_x, error_y))
            scale = min(1.0, _CENTROID_STEP_MAX_PIX / largest) if largest > 0.0 else 1.0
            if iteration >= _CENTROID_ITERATIONS // 2 and not settled:
                scale *= 0.5  # ends the rare swings between two points
            dx += scale * step_x
            dy += scale * step_y
            if not math.hypot(dx, dy) <= CENTROID_SHIFT_MAX_PIX:
                break
            if settled:
                fitted[0, source], fitted[1, source] = peak_x[source] + dx, peak_y[source] + dy
                fitted[2, source], fitted[3, source] = error_x, error_y
                fitted[4, source] = -information_xy / determinant
                flag[source] = False
                break


@njit(cache=True)
def _weighted_sums(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x: float,
    y: float,
    sign: float,
    xx: float,
    yy: float,
    xy: float,
    half_width: float,
    sums: NDArray[np.float64],
) -> None:
    """Sums under a Gaussian weight w of covariance (xx, yy, xy), cut at 5 sigma and at `half_width`, about (x, y).

    With b = w * sign * image, V the variance and (u, v) the offsets, `sums` becomes those of
    b, b u, b v, b u^2, b v^2, b u v; of w and of w on usable pixels; of w^2 V u^2, w^2 V v^2, w^2 V u v.
    """
    ny, nx = image.shape
    sums[:] = 0.0
    determinant = xx * yy - xy * xy
    reach_x = min(_SHAPE_REACH_SIGMA * math.sqrt(xx), half_width)
    reach_y = min(_SHAPE_REACH_SIGMA * math.sqrt(yy), half_width)
    for j in range(math.ceil(y - reach_y), math.floor(y + reach_y) + 1):
        v = j - y
        for i in range(math.ceil(x - reach_x), math.floor(x + reach_x) + 1):
            u = i - x
            distance2 = (yy * u * u - 2.0 * xy * u * v + xx * v * v) / determinant
            if distance2 > _SHAPE_REACH_SIGMA * _SHAPE_REACH_SIGMA:
                continue
            w = math.exp(-0.5 * distance2)
            sums[6] += w
            if not (0 <= j < ny and 0 <= i < nx):
                continue
            value = np.float64(image[j, i])
            weight = pixel_weight(value, variance[j, i], bad[j, i])
            if weight <= 0.0:
                continue
            sums[7] += w
            brightness = w * sign * value
            sums[0] += brightness
            sums[1] += brightness * u
            sums[2] += brightness * v
            sums[3] += brightness * u * u
            sums[4] += brightness * v * v
            sums[5] += brightness * u * v
            noise = w * w / weight
            sums[8] += noise * u * u
            sums[9] += noise * v * v
            sums[10] += noise * u * v


@njit(cache=True)
def _next_weight(
    xx: float, yy: float, xy: float, cxx: float, cyy: float, cxy: float
) -> tuple[bool, float, float, float, float]:
    """Move a weight W towards (C^-1 - W^-1)^-1, where C is what was measured under it.

    Returns whether that is a covariance at all, the new (xx, yy, xy), and the largest change before it was limited.
    """
    measured = cxx * cyy - cxy * cxy
    if not (measured > 0.0 and cxx > 0.0):
        return False, xx, yy, xy, 0.0
    determinant = xx * yy - xy * xy
    # Entries of C^-1 - W^-1, to be inverted.
    axx = cyy / measured - yy / determinant
    ayy = cxx / measured - xx / determinant
    axy = xy / determinant - cxy / measured
    inverse = axx * ayy - axy * axy
    if not (inverse > 0.0 and axx > 0.0):
        return False, xx, yy, xy, 0.0
    new_xx, new_yy, new_xy = ayy / inverse, axx / inverse, -axy / inverse
    change = max(abs(new_xx - xx), abs(new_yy - yy), abs(new_xy - xy))
    # Move by at most a factor of two in size: noise can make one estimate nearly infinite.
    factor = min(1.0, (xx + yy) / (new_xx + new_yy - xx - yy)) if new_xx + new_yy > xx + yy else 1.0
    return True, xx + factor * (new_xx - xx), yy + factor * (new_yy - yy), xy + factor * (new_xy - xy), change


@njit(cache=True)
def _adaptive_moments(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    sign: NDArray[np.float64],
    start: NDArray[np.float64],
    moments: NDArray[np.float64],
) -> None:
    """Fill `moments`: ixx, iyy, ixy of the elliptical Gaussian that weights itself, and the first step's size ratio.

    Each step measures the covariance C of the image under a Gaussian weight of covariance W and sets
    W = (C^-1 - W^-1)^-1, whose fixed point for a Gaussian source is its own covariance. The centre stays at (x, y).
    The size ratio is 2 trace(C) / trace(W) under the starting weight: 1 for an image whose own moments start it.
    `start` is (3, n).
    """
    sums = np.empty(11)
    for source in range(x.size):
        xx, yy, xy = start[0, source], start[1, source], start[2, source]
        for iteration in range(_SHAPE_ITERATIONS):
            if not _is_weight(xx, yy, xy, _SHAPE_HALF_WIDTH_PIX):
                break
            _weighted_sums(
                image, variance, bad, x[source], y[source], sign[source], xx, yy, xy, _SHAPE_HALF_WIDTH_PIX, sums
            )
            total = sums[0]
            if not (total > 0.0 and sums[7] >= _SHAPE_GOOD_WEIGHT_MIN * sums[6]):
                break
            cxx, cyy, cxy = sums[3] / total, sums[4] / total, sums[5] / total
            if iteration == 0:
                moments[3, source] = 2.0 * (cxx + cyy) / (xx + yy)
            valid, xx, yy, xy, change = _next_weight(xx, yy, xy, cxx, cyy, cxy)
            if not valid:
                break
            if change <= _SHAPE_TOLERANCE * (xx + yy):
                moments[0, source], moments[1, source], moments[2, source] = xx, yy, xy
                break


@njit(cache=True)
def _moments_of_images(images: NDArray[np.float32], start: NDArray[np.float64], moments: NDArray[np.float64]) -> None:
    """Fill `moments` (3, n): ixx, iyy, ixy about the middle of each of (n, k, k) images, from round starts (n,)."""
    side = images.shape[1]
    even, unmasked = np.ones((side, side), dtype=np.float32), np.zeros((side, side), dtype=np.bool_)
    centre, positive, weight, found = np.full(1, float(side // 2)), np.ones(1), np.zeros((3, 1)), np.empty((4, 1))
    for number in range(len(images)):
        weight[0, 0] = weight[1, 0] = start[number]
        found[:] = np.nan
        _adaptive_moments(images[number], even, unmasked, centre, centre, positive, weight, found)
        moments[:, number] = found[:3, 0]


@njit(cache=True)
def _is_weight(xx: float, yy: float, xy: float, half_width: float) -> bool:
    """Whether a covariance is that of a weight wider than a point and narrower than the window."""
    return bool(xx * yy - xy * xy > 1e-4 and xx > 0.0 and xx + yy < half_width * half_width)


@njit(cache=True)
def _centre_moments(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    sign: NDArray[np.float64],
    start: NDArray[np.float64],
    centred: NDArray[np.float64],
) -> None:
    """Fill `centred` (x, y, x_err, y_err, x_y_cov, ixx, iyy, ixy): as `_adaptive_moments`, but the centre moves too.

    Under a weight like the source itself the first moment shows half of an offset, so a step is twice the moment and
    its error 2 sqrt(sum(w^2 V u^2)) / sum(w f). `start` is (3, n).
    """
    sums = np.empty(11)
    for source in range(x.size):
        centre_x, centre_y = x[source], y[source]
        xx, yy, xy = start[0, source], start[1, source], start[2, source]
        for _ in range(_SHAPE_ITERATIONS):
            if not _is_weight(xx, yy, xy, _TRAIL_HALF_WIDTH_PIX):
                break
            _weighted_sums(
                image, variance, bad, centre_x, centre_y, sign[source], xx, yy, xy, _TRAIL_HALF_WIDTH_PIX, sums
            )
            total = sums[0]
            if not (total > 0.0 and sums[7] >= _SHAPE_GOOD_WEIGHT_MIN * sums[6]):
                break
            mean_x, mean_y = sums[1] / total, sums[2] / total
            cxx, cyy = sums[3] / total - mean_x * mean_x, sums[4] / total - mean_y * mean_y
            valid, xx, yy, xy, change = _next_weight(xx, yy, xy, cxx, cyy, sums[5] / total - mean_x * mean_y)
            if not valid:
                break
            step = 2.0 * math.hypot(mean_x, mean_y)
            scale = min(1.0, _TRAIL_STEP_MAX_PIX / step) if step > 0.0 else 1.0
            centre_x += scale * 2.0 * mean_x
            centre_y += scale * 2.0 * mean_y
            if change <= _SHAPE_TOLERANCE * (xx + yy) and step <= _TRAIL_TOLERANCE_PIX:
                centred[0, source], centred[1, source] = centre_x, centre_y
                centred[2, source] = 2.0 * math.sqrt(sums[8]) / total
                centred[3, source] = 2.0 * math.sqrt(sums[9]) / total
                centred[4, source] = 4.0 * sums[10] / (total * total)
                centred[5, source], centred[6, source], centred[7, source] = xx, yy, xy
                break


@njit(cache=True)
def _measure_cores(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    science: NDArray[np.float32],
    template: NDArray[np.float32],
    coefficients: NDArray[np.float64],
    half_width: int,
    of_source: NDArray[np.int64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    sign: NDArray[np.float64],
    flux: NDArray[np.float64],
    real: NDArray[np.float64],
    n_pixels: NDArray[np.int32],
) -> None:
    """Fill `real` (core_chi2, peak_excess, star_flux) and the number of usable core pixels."""
    ny, nx = image.shape
    width = 2 * half_width + 1
    model = np.empty((width, width))
    centrals, radii = np.empty(len(coefficients)), np.empty(len(coefficients))
    for index in range(len(coefficients)):
        evaluate_psf(coefficients[index], half_width, 0.0, 0.0, model, None, None)
        sigma = math.sqrt(1.0 / (4.0 * math.pi * (model * model).sum()))
        centrals[index] = model[half_width, half_width]
        radii[index] = min(max(2.0, 2.5 * sigma), float(half_width))
    for source in range(x.size):
        if math.isnan(flux[source]):
            continue
        centre_x, centre_y = math.floor(x[source] + 0.5), math.floor(y[source] + 0.5)
        dx, dy = x[source] - centre_x, y[source] - centre_y
        central, radius = centrals[of_source[source]], radii[of_source[source]]
        evaluate_psf(coefficients[of_source[source]], half_width, dx, dy, model, None, None)
        chi2, excess, star = 0.0, 0.0, 0.0
        for j in range(width):
            for i in range(width):
                u, v = i - half_width, j - half_width
                column, row = centre_x + u, centre_y + v
                if math.hypot(u - dx, v - dy) > radius or not (0 <= row < ny and 0 <= column < nx):
                    continue
                value = np.float64(image[row, column])
                weight = pixel_weight(value, variance[row, column], bad[row, column])
                if weight <= 0.0:
                    continue
                residual = value - flux[source] * model[j, i]
                chi2 += residual * residual * weight
                n_pixels[source] += 1
                brightest = max(np.float64(science[row, column]), np.float64(template[row, column]))
                if star < brightest < np.inf:
                    star = brightest
                if abs(u) <= 1 and abs(v) <= 1:
                    beyond = sign[source] * residual - _PEAK_NOISE_ALLOWANCE / math.sqrt(weight)
                    excess = max(excess, beyond)
        real[0, source] = chi2
        scale = abs(flux[source]) * central
        real[1, source] = excess / scale if scale > 0.0 else np.nan
        real[2, source] = star / central if central > 0.0 else np.nan


@njit(cache=True)
def _or_boxes(mask: NDArray[np.int64], boxes: NDArray[np.int64]) -> NDArray[np.int64]:
    """OR of the mask over each box (y0, y1, x0, x1), clipped to the image."""
    ny, nx = mask.shape
    found = np.zeros(boxes.shape[1], dtype=np.int64)
    for source in range(boxes.shape[1]):
        for j in range(max(0, boxes[0, source]), min(ny, boxes[1, source])):
            for i in range(max(0, boxes[2, source]), min(nx, boxes[3, source])):
                found[source] |= mask[j, i]
    return found

"""What a detected source looks like beyond a point: dipole, trail, extended."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transforms.numerics.detection import Detections, gaussian_variances
from transforms.numerics.dipole_fitting import Dipoles, fit_dipoles
from transforms.numerics.forced_photometry import checked_planes
from transforms.numerics.measurement import Measurements
from transforms.numerics.model_fitting import SplineStack, spline_stack
from transforms.numerics.psf_grid import PsfGrid, as_psf_grid
from transforms.numerics.trail_fitting import Trails, fit_trails
from transforms.numerics.trail_fragments import claim_fragments, lines_through, link_fragments

# A lobe holds at least 0.35 of a dipole, so at least 0.54 of the other; noise and faint neighbours take or give some.
_OPPOSITE_SNR_MIN = 4.0  # among the 100 pixels around a source, noise gets there once in 1,000 sources
_OPPOSITE_PART_MIN = 0.4
_FOOTPRINT_SPREAD_PSF = 4.0  # in PSF sigma^2; the footprint of a point source has 2, that of a 3 FWHM trail 4
_FOOTPRINT_AXIS_RATIO2 = 2.25
_AXIS_ERROR = 2.0 * np.sqrt(2.0)  # the major moment of a Gaussian source has this relative error at S/N 1
_EXCESS_SIGNIFICANCE = 3.5  # 1 point source in 2,000; none below S/N 10, where no moment exceeds its error so far
_EXCESS_TRIED = 2.0  # errors of a point source: 1 in 7 of them; the fit tells
_EXCESS_MIN = 0.25  # of the PSF's moment: a trail of 0.74 FWHM
_MINOR_EXCESS_MAX = 0.5  # of the excess of the major axis: rounder sources are blobs
_MINOR_MIN = 0.5  # of the PSF's moment: narrower tracks are cosmic rays
_SPREAD_ERROR = 2.0  # the trace of the moments of a Gaussian source has this relative error at S/N 1


class Shapes(NamedTuple):
    """Shapes of n sources, in the order of the detections.

    Attributes
    ----------
    dipole_attempted, trail_attempted : (n,) bool, which sources were fitted as what
    dipoles, trails : columns of n sources; rows of sources that were not attempted are not `good`
    part_of_trail : (n,) bool, pieces of the trail of another source
    extendedness : (n,) from 0 for a point to 1 for what is surely larger; NaN where there are no moments
    """

    dipole_attempted: NDArray[np.bool_]
    dipoles: Dipoles
    trail_attempted: NDArray[np.bool_]
    trails: Trails
    part_of_trail: NDArray[np.bool_]
    extendedness: NDArray[np.float64]


class LinesOnSky(NamedTuple):
    """Vectors on the sky; every array has shape (n,). Angles count from north through east, in [0, 360) degrees."""

    length_arcsec: NDArray[np.float64]
    length_err_arcsec: NDArray[np.float64]
    angle_deg: NDArray[np.float64]
    angle_err_deg: NDArray[np.float64]


def measure_shapes(
    difference: ArrayLike,
    variance: ArrayLike,
    science: ArrayLike,
    science_variance: ArrayLike,
    matched_template: ArrayLike,
    template_variance: ArrayLike,
    bad: NDArray[np.bool_],
    psf: ArrayLike | PsfGrid,
    science_psf: ArrayLike | PsfGrid,
    detections: Detections,
    measured: Measurements,
) -> Shapes:
    """Fit dipoles and trails where a source looks like one, and tell how extended each source is.

    A dipole is tried where the opposite sign is beyond 4 sigma and 0.4 of the peak. A trail is tried on what is no
    dipole and elongated: by its footprint, or by moments whose major axis exceeds the PSF's by 3.5 errors and a
    quarter, the minor one by less than half as much.

    Parameters
    ----------
    difference, science, matched_template : (ny, nx), used as float32, one unit, free of background
    variance, science_variance, template_variance : (ny, nx), used as float32, that unit squared
    bad : (ny, nx) bool, pixels that no measurement uses
    psf, science_psf : (k, k) odd images summing to 1, or grids of such: of the difference, and of science and matched
        template
    detections, measured : the sources, as `measure_sources` took and gave them

    Returns
    -------
    Shapes
        Everything is finite or NaN whatever the pixels hold.

    Raises
    ------
    PsfError
        As `as_psf_grid`.
    ValueError
        Planes differ in shape.
    """
    n = measured.x.size
    of_difference, of_images = as_psf_grid(psf), as_psf_grid(science_psf)
    dipole_attempted = _may_be_dipole(detections)
    chosen = np.flatnonzero(dipole_attempted)
    peaks = detections.peak_x[chosen], detections.peak_y[chosen]
    (on_difference, on_images), prepared = _stacks((of_difference, of_images), *peaks)
    dipoles = fit_dipoles(
        difference,
        variance,
        science,
        science_variance,
        matched_template,
        template_variance,
        bad,
        on_difference,
        on_images,
        prepared,
        *peaks,
    )
    all_dipoles = Dipoles(*(_spread_out(column, chosen, n) for column in dipoles))
    variances = gaussian_variances(of_difference.of_cells)
    sigma = np.sqrt(variances[of_difference.cells_at(detections.peak_x, detections.peak_y)])
    trail_attempted, all_trails, part_of_trail = _fit_trails(
        checked_planes(difference, variance, bad), of_difference, detections, measured, sigma, all_dipoles.is_dipole
    )
    return Shapes(dipole_attempted, all_dipoles, trail_attempted, all_trails, part_of_trail, _extendedness(measured))


def lines_on_sky(
    jacobian: NDArray[np.float64], dx: NDArray[np.float64], dy: NDArray[np.float64], covariance: NDArray[np.float64]
) -> LinesOnSky:
    """Turn vectors in pixels into lengths and position angles on the sky.

    Parameters
    ----------
    jacobian : (n, 2, 2) derivatives of (ra cos dec, dec) in degrees by (x, y) in pixels
    dx, dy : (n,) pixels
    covariance : (n, 2, 2) of (dx, dy), pixels^2
    """
    vector = (jacobian @ np.stack([dx, dy], axis=-1)[..., np.newaxis])[..., 0]
    length = np.hypot(vector[:, 0], vector[:, 1])
    on_sky = jacobian @ covariance @ jacobian.transpose(0, 2, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        along = vector / length[:, np.newaxis]
        across = np.stack([along[:, 1], -along[:, 0]], axis=-1)
        length_err = np.sqrt(np.einsum("ni,nij,nj->n", along, on_sky, along))
        angle_err = np.sqrt(np.einsum("ni,nij,nj->n", across, on_sky, across)) / length
    return LinesOnSky(
        length_arcsec=3600.0 * length,
        length_err_arcsec=3600.0 * length_err,
        angle_deg=np.degrees(np.arctan2(vector[:, 0], vector[:, 1])) % 360.0,
        angle_err_deg=np.degrees(angle_err),
    )


def _fit_trails(
    planes: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]],
    psf: PsfGrid,
    detections: Detections,
    measured: Measurements,
    sigma: NDArray[np.float64],
    is_dipole: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], Trails, NDArray[np.bool_]]:
    """Which sources were fitted as trails, the trails, and which sources are pieces of another's.

    First the lines through linked sources, each given to that of its pieces which is nearest to its middle; then the
    sources that are no pieces, each from its own moments.
    """
    n = measured.x.size
    x, y, flux, flux_err = measured.x, measured.y, measured.psf_flux, measured.psf_flux_err
    usable = ~detections.has_both_signs & ~is_dipole & np.isfinite(flux) & (flux_err > 0.0)
    heads, lines = lines_through(link_fragments(*planes, x, y, flux, sigma, usable), x, y)
    (stack,), prepared = _stacks((psf,), lines[0], lines[1])
    long_x, long_y = lines[2:] ** 2 / 12.0 + sigma[heads] ** 2
    joint = fit_trails(*planes, stack, prepared, lines[0], lines[1], long_x, long_y, lines[2] * lines[3] / 12.0)
    owner = claim_fragments(*planes, stack, prepared, joint, x, y, flux, flux_err, usable)
    part_of_trail = owner >= 0
    rows, which = [], np.unique(owner[part_of_trail])
    for trail in which:
        pieces = np.flatnonzero(owner == trail)
        rows.append(pieces[np.argmin(np.hypot(x[pieces] - joint.x[trail], y[pieces] - joint.y[trail]))])
    joined = np.array(rows, dtype=np.int64)
    part_of_trail[joined] = False

    elongated, maybe, moments = _may_be_trail(detections, measured, sigma)
    chosen = np.flatnonzero(maybe & ~is_dipole & (owner < 0))
    (stack,), prepared = _stacks((psf,), detections.peak_x[chosen], detections.peak_y[chosen])
    single = fit_trails(*planes, stack, prepared, x[chosen], y[chosen], *moments[:, chosen])
    owner = claim_fragments(*planes, stack, prepared, single, x, y, flux, flux_err, usable & (owner < 0))
    own = np.full(n, -1)
    own[chosen] = np.arange(chosen.size)
    leads = (owner >= 0) & (owner == own)
    part_of_trail |= (owner >= 0) & ~leads & np.isin(owner, owner[leads])
    all_rows = np.concatenate([joined, chosen])
    both = (
        np.concatenate([np.asarray(one)[which], np.asarray(other)]) for one, other in zip(joint, single, strict=True)
    )
    all_trails = Trails(*(_spread_out(column, all_rows, n) for column in both))
    return (elongated & ~is_dipole) | all_trails.good, all_trails, part_of_trail


def _stacks(
    grids: tuple[PsfGrid, ...],
    x: NDArray[np.integer] | NDArray[np.floating],
    y: NDArray[np.integer] | NDArray[np.floating],
) -> tuple[list[SplineStack], NDArray[np.int64]]:
    """The PSFs of the cells that hold places, prepared, and which of them is that of each place."""
    cells = np.stack([grid.cells_at(x, y) for grid in grids])
    used, prepared = np.unique(cells, axis=1, return_inverse=True)
    if x.size == 0:
        used = np.zeros((len(grids), 1), dtype=np.int64)
    stacks = [spline_stack(grid.of_cells[rows]) for grid, rows in zip(grids, used, strict=True)]
    return stacks, np.asarray(prepared, dtype=np.int64).reshape(-1)


def _spread_out(column: NDArray, rows: NDArray[np.int64], n: int) -> NDArray:
    """A column of n rows with the given rows filled; the others are NaN, False or 0."""
    wide = np.full(n, np.nan if column.dtype.kind == "f" else 0, dtype=column.dtype)
    wide[rows] = column
    return wide


def _may_be_dipole(detections: Detections) -> NDArray[np.bool_]:
    peak = np.abs(detections.peak_snr)
    opposite = detections.opposite_snr
    chosen: NDArray[np.bool_] = (opposite > _OPPOSITE_SNR_MIN) & (opposite > _OPPOSITE_PART_MIN * peak)
    return chosen


def _may_be_trail(
    detections: Detections, measured: Measurements, sigma: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """Which sources are elongated, which may be, and (3, n) moments to start their fits from."""
    own = np.stack([measured.ixx, measured.iyy, measured.ixy])
    footprint = np.stack([detections.spread_xx, detections.spread_yy, detections.spread_xy])
    footprint_major, footprint_minor = _axes(footprint)
    long_footprint = (footprint_major > _FOOTPRINT_SPREAD_PSF * sigma**2) & (
        footprint_major > _FOOTPRINT_AXIS_RATIO2 * footprint_minor
    )
    major, minor = _axes(own)
    psf_major, psf_minor = _axes(np.stack([measured.ixx_psf, measured.iyy_psf, measured.ixy_psf]))
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = major - psf_major
        error = _AXIS_ERROR * psf_major / measured.snr
        straight = (excess > _EXCESS_MIN * psf_major) & (minor - psf_minor < _MINOR_EXCESS_MAX * excess + error)
        maybe_long = straight & (excess > _EXCESS_TRIED * error)
        long_moments = straight & (excess > _EXCESS_SIGNIFICANCE * _AXIS_ERROR * major / measured.snr)
        narrow = minor < _MINOR_MIN * psf_minor
    measurable = np.isfinite(own).all(axis=0)
    # The footprint is that of the filtered image: one PSF wider than the source.
    start = np.where(measurable, own, footprint - np.array([[1.0], [1.0], [0.0]]) * sigma**2)
    possible = ~narrow & ~detections.has_both_signs
    return (long_footprint | long_moments) & possible, (long_footprint | maybe_long) & possible, start


def _axes(moments: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Major and minor eigenvalue of (3, n) moments xx, yy, xy."""
    xx, yy, xy = moments
    with np.errstate(invalid="ignore"):
        half_trace, half_split = 0.5 * (xx + yy), np.hypot(0.5 * (xx - yy), xy)
    return half_trace + half_split, half_trace - half_split


def _extendedness(measured: Measurements) -> NDArray[np.float64]:
    """LSST's 1 - exp(-chi2 / 2) with chi2 = (T - T_psf)^2 / T_psf, T = ixx + iyy in pixels^2, but 0 for T < T_psf.

    The error of T joins the denominator, so that a faint point source is none the more extended for its noise.
    """
    spread, psf_spread = measured.ixx + measured.iyy, measured.ixx_psf + measured.iyy_psf
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        variance = psf_spread + (_SPREAD_ERROR * spread / measured.snr) ** 2
        extendedness: NDArray[np.float64] = -np.expm1(-0.5 * np.maximum(spread - psf_spread, 0.0) ** 2 / variance)
    return extendedness

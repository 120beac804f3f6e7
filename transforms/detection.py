"""DetectDiaSources: diaSources of an exposure as a record batch, measured, scored, identified."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from schemas.elements import DetectedSources, FailureRecord, StageElement, SubtractedExposure
from schemas.exposures import MASK_BITS, mask_bits
from schemas.identifiers import MAX_COUNTER, dia_source_ids
from schemas.records import BOOLEAN_NULL, DIA_SOURCE, SS_SOURCE, empty_records, null_infinite, take_records
from transforms.failures import FAILED, StageFn, failed_in, failure_of
from transforms.metrics import DIA_SOURCES
from transforms.numerics.detection import Detections, find_peaks, lobe_distance, significance_map, take_strongest
from transforms.numerics.dipole_fitting import Dipoles
from transforms.numerics.glint_trails import find_glint_trails
from transforms.numerics.measurement import MaskFlags, Measurements, mask_flags, measure_sources
from transforms.numerics.psf_grid import PsfGrid
from transforms.numerics.reliability import score
from transforms.numerics.reliability_features import reliability_features
from transforms.numerics.sky_sources import SkyNoise, measure_sky_sources
from transforms.numerics.source_shapes import Shapes, lines_on_sky, measure_shapes
from transforms.numerics.trail_fitting import Trails
from transforms.reliability_model import shipped_model
from transforms.subtraction import UNUSABLE_PLANES

STAGE = "detection"
REJECTED_PLANES = ("NO_DATA", "BAD", "SAT", "EDGE", "CR_TEMPLATE")
SATURATED_PLANES = ("SAT", "SAT_TEMPLATE")
ON_REJECTED_PIXELS = "on rejected pixels"
BEYOND_MAX_SOURCES = "beyond max_sources"
_CENTRE = ("x", "y", "x_err", "y_err", "x_y_cov")
_NOT_MEASURED = (ON_REJECTED_PIXELS, BEYOND_MAX_SOURCES)
_USABLE_BIT = 16  # beside those of MASK_BITS, where pixels are looked up for the flags
_HOLE_PART = 0.5  # of the difference's flux: more of it is a hole in the science image than light in the template
_ELONGATED_AXIS_RATIO2 = 2.25  # of a footprint's second moments: axes 1.5 to 1
_FLAG_PLANES = {
    "pixelFlags_bad": ("BAD", False),
    "pixelFlags_cr": ("CR", False),
    "pixelFlags_crCenter": ("CR", True),
    "pixelFlags_edge": ("EDGE", False),
    "pixelFlags_nodata": ("NO_DATA", False),
    "pixelFlags_nodataCenter": ("NO_DATA", True),
    "pixelFlags_interpolated": ("INTRP", False),
    "pixelFlags_interpolatedCenter": ("INTRP", True),
    "pixelFlags_saturated": ("SAT", False),
    "pixelFlags_saturatedCenter": ("SAT", True),
    "pixelFlags_suspect": ("SUSPECT", False),
    "pixelFlags_suspectCenter": ("SUSPECT", True),
    "pixelFlags_streak": ("STREAK", False),
    "pixelFlags_streakCenter": ("STREAK", True),
    "pixelFlags_injected": ("INJECTED", False),
    "pixelFlags_injectedCenter": ("INJECTED", True),
    "pixelFlags_injected_template": ("INJECTED_TEMPLATE", False),
    "pixelFlags_injected_templateCenter": ("INJECTED_TEMPLATE", True),
}
_MEASURED_COLUMNS = {
    "x": "x",
    "xErr": "x_err",
    "y": "y",
    "yErr": "y_err",
    "centroid_flag": "centroid_flag",
    "apFlux": "ap_flux",
    "apFluxErr": "ap_flux_err",
    "apFlux_flag": "ap_flux_flag",
    "apFlux_flag_apertureTruncated": "ap_flux_flag_truncated",
    "isNegative": "is_negative",
    "snr": "snr",
    "psfFlux": "psf_flux",
    "psfFluxErr": "psf_flux_err",
    "psfLnL": "psf_ln_likelihood",
    "psfChi2": "psf_chi2",
    "psfNdata": "psf_n_pixels",
    "psfFlux_flag": "psf_flux_flag",
    "psfFlux_flag_edge": "psf_flux_flag_edge",
    "psfFlux_flag_noGoodPixels": "psf_flux_flag_no_good_pixels",
    "scienceFlux": "science_flux",
    "scienceFluxErr": "science_flux_err",
    "templateFlux": "template_flux",
    "templateFluxErr": "template_flux_err",
    "forced_PsfFlux_flag": "forced_flux_flag",
    "forced_PsfFlux_flag_edge": "forced_flux_flag_edge",
    "forced_PsfFlux_flag_noGoodPixels": "forced_flux_flag_no_good_pixels",
    "bboxSize": "bbox_size",
}


class SearchedSources(NamedTuple):
    """What a search found: records of all sources, which of them are kept, and what the reliability is to see."""

    records: np.ndarray
    kept: np.ndarray
    features: np.ndarray
    rejected: dict[str, int]
    sky: SkyNoise


class SourceStormError(ValueError):
    """More sources than ids can number."""


@dataclass(frozen=True)
class DetectionConfig:
    """What counts as a diaSource. Defaults are LSST's where it has one; the rules: docs/detection.md."""

    threshold_snr: float = Field(default=5.0, ge=3, le=50)
    min_science_snr: float = Field(default=-2.0, allow_inf_nan=False)
    max_motion_deg_per_day: float = Field(default=10.0, gt=0)
    max_sources: int = Field(default=5_000, ge=1, le=MAX_COUNTER)
    release: int = Field(default=0, ge=0, le=63)


class DetectionResult(NamedTuple):
    """`good`: DetectedSources; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class DetectDiaSources(beam.PTransform):
    """Find and measure what differs, of both signs.

    Input: SubtractedExposure. Output `good`: DetectedSources, always one per exposure, its records
    in order of diaSourceId; `failed`: exposures that could not be searched, and those of which only the
    `max_sources` most significant detections were. Ids count the detections in order of (peak y, peak x,
    sign), before any selection. Order: as it comes; a duplicate gives the
    same records. No state.
    """

    def __init__(self, config: DetectionConfig) -> None:
        super().__init__()
        self.stage = _DetectFn(config)

    def expand(self, exposures: beam.PCollection) -> DetectionResult:
        outputs = exposures | "DetectInDifference" >> beam.ParDo(self.stage).with_output_types(
            StageElement
        ).with_outputs(FAILED, main="good")
        return DetectionResult(outputs.good, outputs[FAILED])


class _DetectFn(StageFn):
    stage = STAGE

    def __init__(self, config: DetectionConfig) -> None:
        self.config = config

    def setup(self) -> None:
        shipped_model()

    def work(self, exposure: SubtractedExposure) -> Iterator[Any]:
        started = time.perf_counter()
        try:
            detected = detect_sources(exposure, self.config)
        except Exception as error:  # whatever one detector's pixels do must not stop the others
            failure = _failure(error, exposure)
            yield from failed_in(exposure.visit, failure)
            return
        detected.seconds["detection"] = time.perf_counter() - started
        if detected.rejected[BEYOND_MAX_SOURCES]:
            yield from failed_in(exposure.visit, _storm(detected, self.config))
        DIA_SOURCES.inc(len(detected.dia_sources))
        yield detected


def _failure(error: Exception, exposure: SubtractedExposure) -> FailureRecord:
    return failure_of(error, STAGE, exposure.visit.visit, exposure.detector, lost="all alerts of the detector")


def _storm(detected: DetectedSources, config: DetectionConfig) -> FailureRecord:
    exposure = detected.exposure
    return FailureRecord(
        exposure.visit.visit,
        exposure.detector,
        STAGE,
        "SourceStorm",
        f"more than max_sources {config.max_sources} detections: bad subtraction?",
        f"the {detected.rejected[BEYOND_MAX_SOURCES]} least significant of {detected.n_detected} detections",
    )


def detect_sources(exposure: SubtractedExposure, config: DetectionConfig) -> DetectedSources:
    """The diaSources of one exposure, those that are kept.

    Raises
    ------
    SourceStormError
        More detections than ids can number.
    """
    searched = search(exposure, config)
    model = shipped_model()
    searched.records["reliability"] = score(searched.features, model.trees)
    searched.records["reliabilityVersion"] = model.version.encode()
    return DetectedSources(
        exposure=exposure,
        dia_sources=take_records(searched.records, searched.kept),
        ss_sources=empty_records(SS_SOURCE, 0),
        n_detected=len(searched.records) + sum(searched.rejected[name] for name in _NOT_MEASURED),
        rejected=searched.rejected,
        seconds=dict(exposure.seconds),
        sky_sources=_sky_account(searched.sky),
    )


def search(exposure: SubtractedExposure, config: DetectionConfig) -> SearchedSources:
    """Find and measure the sources of one exposure, at most `max_sources`; their reliability is not set.

    Raises
    ------
    SourceStormError
        More detections than ids can number.
    """
    bad = (exposure.mask & mask_bits(*UNUSABLE_PLANES)) != 0
    psf, science_psf = PsfGrid(exposure.psf), PsfGrid(exposure.science_psf)
    with np.errstate(over="ignore"):  # an infinite variance masks the pixel
        residual = np.square(np.float32(exposure.residual_part) * exposure.matched_template)
        expected = exposure.difference_variance + residual
    snr_map, noise_ratio = significance_map(exposure.difference, expected, bad, psf)
    reject = (exposure.mask & mask_bits(*REJECTED_PLANES)) != 0
    found = find_peaks(snr_map, reject, config.threshold_snr, lobe_distance(psf))
    n_found = len(found.peak_x)
    if n_found > MAX_COUNTER:
        raise SourceStormError(f"{n_found} sources in one detector, ids number {MAX_COUNTER}: bad subtraction?")
    found, places = take_strongest(found, config.max_sources)
    visit = exposure.visit
    ids = dia_source_ids(visit.day_obs, visit.seq_num, exposure.detector, n_found, config.release)[places]
    planes = (
        exposure.difference,
        exposure.difference_variance,
        exposure.science,
        exposure.science_variance,
        exposure.matched_template,
        exposure.template_variance,
        bad,
    )
    measured = measure_sources(*planes, psf, found, science_psf)
    shapes = measure_shapes(*planes, psf, science_psf, found, measured)
    usable = np.where(bad, 0, 1 << _USABLE_BIT).astype(np.int32)
    flags = mask_flags(exposure.mask | usable, {**MASK_BITS, "usable": _USABLE_BIT}, measured.x, measured.y, found)
    features = reliability_features(
        exposure.difference,
        exposure.difference_variance,
        exposure.science,
        exposure.matched_template,
        bad,
        (exposure.mask & mask_bits(*SATURATED_PLANES)) != 0,
        psf,
        found,
        measured,
        shapes,
        noise_ratio,
        exposure.residual_part,
    )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, then null
        records = _records(exposure, _centred_on_trails(measured, shapes), flags, ids)
        _fill_shape_flags(records, measured, found)
        _fill_shapes(records, exposure, shapes)
    null_infinite(records)
    records["glint_trail"] = _are_glints(measured, found, exposure.difference.shape)
    kept, rejected = _select(records, found, shapes, ~flags.centre["usable"], exposure, config)
    rejected[ON_REJECTED_PIXELS] = int(found.n_rejected)
    rejected[BEYOND_MAX_SOURCES] = n_found - len(records)
    start = tuple(np.random.default_rng((visit.visit, exposure.detector)).random(2))
    sky = measure_sky_sources(*planes[:2], bad, psf, snr_map, config.threshold_snr, start)
    return SearchedSources(records, kept, features, rejected, sky)


def _sky_account(sky: SkyNoise) -> dict[str, float]:
    """The same under the names of the ledger; empty without sky sources."""
    if sky.n_sources == 0:
        return {}
    return {
        "measured": sky.n_sources,
        "flux_median_njy": sky.flux_median,
        "flux_sigma_njy": sky.flux_sigma,
        "pull_width": sky.pull_width,
    }


def _centred_on_trails(measured: Measurements, shapes: Shapes) -> Measurements:
    """Sources whose centroid failed are where their trail is: a PSF does not settle on a bright one."""
    trails = shapes.trails
    moved = measured.centroid_flag & trails.good & ~trails.off_image
    columns = {name: np.where(moved, getattr(trails, name), getattr(measured, name)) for name in _CENTRE}
    return measured._replace(**columns, centroid_flag=measured.centroid_flag & ~moved)


def _are_glints(measured: Measurements, found: Detections, shape: tuple[int, ...]) -> np.ndarray:
    """Glints of the science image, and those of the template; whatever becomes of their sources."""
    glints = np.zeros(len(measured.x), dtype=bool)
    for rows in (np.flatnonzero(found.peak_snr >= 0), np.flatnonzero(found.peak_snr < 0)):
        glints[rows] = find_glint_trails(measured.x[rows], measured.y[rows], (shape[0], shape[1]))
    return glints


def _records(
    exposure: SubtractedExposure,
    measured: Measurements,
    flags: MaskFlags,
    ids: np.ndarray,
) -> np.ndarray:
    visit = exposure.visit
    records = empty_records(DIA_SOURCE, len(ids))
    records["diaSourceId"] = ids
    records["visit"], records["detector"] = visit.visit, exposure.detector
    records["band"] = visit.band.encode()
    records["midpointMjdTai"] = visit.midpoint_mjd_tai
    records["timeProcessedMjdTai"] = visit.readout_end_mjd_tai
    records["exposureTime"] = visit.exposure_time_s
    for column, name in _MEASURED_COLUMNS.items():
        records[column] = getattr(measured, name)
    _fill_sky(records, exposure, measured)
    for column, (plane, at_centre) in _FLAG_PLANES.items():
        records[column] = (flags.centre if at_centre else flags.anywhere)[plane]
    records["pixelFlags"] = flags.off_image  # the flags of the centre then mean nothing
    records["pixelFlags_offimage"] = flags.off_image
    return records


def _fill_shape_flags(records: np.ndarray, measured: Measurements, found: Detections) -> None:
    """Why there are no moments, or none to be trusted. Nothing is deblended, so no source is a parent."""
    contained = (measured.x > found.x0 - 0.5) & (measured.x < found.x1 - 0.5)
    contained &= (measured.y > found.y0 - 0.5) & (measured.y < found.y1 - 0.5)
    records["shape_flag_no_pixels"] = measured.psf_n_pixels == 0
    records["shape_flag_not_contained"] = ~contained
    records["shape_flag_parent_source"] = False
    records["shape_flag"] = np.isnan(measured.ixx) | ~contained


def _fill_sky(records: np.ndarray, exposure: SubtractedExposure, measured: Measurements) -> None:
    """Positions and their errors on the sky (raErr includes cos dec), and moments, by the local WCS.

    Moments stay along x and y, in arcsec^2 by the area of the pixel, as in LSST's packets.
    """
    if len(records) == 0:
        return
    ra, dec = exposure.wcs.all_pix2world(measured.x, measured.y, 0)
    records["ra"], records["dec"] = ra % 360.0, dec
    jacobian = _local_jacobian(exposure, measured.x, measured.y)
    covariance = np.empty((len(records), 2, 2))
    covariance[:, 0, 0], covariance[:, 1, 1] = measured.x_err**2, measured.y_err**2
    covariance[:, 0, 1] = covariance[:, 1, 0] = measured.x_y_cov
    on_sky = jacobian @ covariance @ jacobian.transpose(0, 2, 1)
    with np.errstate(invalid="ignore"):
        records["raErr"], records["decErr"] = np.sqrt(on_sky[:, 0, 0]), np.sqrt(on_sky[:, 1, 1])
    records["ra_dec_Cov"] = on_sky[:, 0, 1]
    pixel_arcsec2 = 3600.0**2 * np.abs(np.linalg.det(jacobian))
    for name in ("ixx", "iyy", "ixy"):
        records[name] = pixel_arcsec2 * getattr(measured, name)
        records[f"{name}PSF"] = pixel_arcsec2 * getattr(measured, f"{name}_psf")


def _fill_shapes(records: np.ndarray, exposure: SubtractedExposure, shapes: Shapes) -> None:
    """Dipole and trail columns of the sources that were fitted as such, null elsewhere; extendedness of all."""
    records["extendedness"] = shapes.extendedness
    records["dipoleFitAttempted"] = shapes.dipole_attempted
    records["isDipole"] = shapes.dipoles.is_dipole
    records["trail_flag_edge"] = np.where(shapes.trails.good, shapes.trails.edge, BOOLEAN_NULL)
    records["trail_flag"] = np.where(shapes.trail_attempted, ~shapes.trails.good, BOOLEAN_NULL)
    rows = np.flatnonzero(shapes.dipoles.good)
    if rows.size:
        lobes = Dipoles._make(column[rows] for column in shapes.dipoles)
        dx, dy = lobes.x_positive - lobes.x_negative, lobes.y_positive - lobes.y_negative
        middle_x, middle_y = 0.5 * (lobes.x_positive + lobes.x_negative), 0.5 * (lobes.y_positive + lobes.y_negative)
        line = lines_on_sky(_local_jacobian(exposure, middle_x, middle_y), dx, dy, np.zeros((rows.size, 2, 2)))
        records["dipoleLength"][rows], records["dipoleAngle"][rows] = line.length_arcsec, line.angle_deg
        records["dipoleMeanFlux"][rows], records["dipoleMeanFluxErr"][rows] = lobes.mean_flux, lobes.mean_flux_err
        records["dipoleFluxDiff"][rows], records["dipoleFluxDiffErr"][rows] = lobes.flux_diff, lobes.flux_diff_err
        records["dipoleChi2"][rows], records["dipoleNdata"][rows] = lobes.chi2, lobes.n_pixels
    rows = np.flatnonzero(shapes.trails.good)
    if rows.size:
        trails = Trails._make(column[rows] for column in shapes.trails)
        jacobian = _local_jacobian(exposure, trails.x, trails.y)
        ra, dec = exposure.wcs.all_pix2world(trails.x, trails.y, 0)
        records["trailRa"][rows], records["trailDec"][rows] = ra % 360.0, dec
        middle = jacobian @ _covariances(trails.x_err, trails.y_err, trails.x_y_cov) @ jacobian.transpose(0, 2, 1)
        records["trailRaErr"][rows], records["trailDecErr"][rows] = np.sqrt(middle[:, 0, 0]), np.sqrt(middle[:, 1, 1])
        spread = _covariances(trails.dx_err, trails.dy_err, trails.dx_dy_cov)
        line = lines_on_sky(jacobian, trails.dx, trails.dy, spread)
        records["trailLength"][rows], records["trailLengthErr"][rows] = line.length_arcsec, line.length_err_arcsec
        records["trailAngle"][rows], records["trailAngleErr"][rows] = line.angle_deg % 180.0, line.angle_err_deg
        records["trailFlux"][rows], records["trailFluxErr"][rows] = trails.flux, trails.flux_err
        records["trailChi2"][rows], records["trailNdata"][rows] = trails.chi2, trails.n_pixels
        # A trail that detection cut to pieces has but one of them as footprint; its cutout is to hold all.
        reach_x = np.abs(trails.x - records["x"][rows]) + 0.5 * np.abs(trails.dx)
        reach_y = np.abs(trails.y - records["y"][rows]) + 0.5 * np.abs(trails.dy)
        side = np.ceil(2.0 * np.maximum(reach_x, reach_y)).astype(np.int32)
        records["bboxSize"][rows] = np.maximum(records["bboxSize"][rows], side)


def _covariances(x_err: np.ndarray, y_err: np.ndarray, x_y_cov: np.ndarray) -> np.ndarray:
    """(n, 2, 2) covariance matrices."""
    covariance = np.empty((len(x_err), 2, 2))
    covariance[:, 0, 0], covariance[:, 1, 1] = x_err**2, y_err**2
    covariance[:, 0, 1] = covariance[:, 1, 0] = x_y_cov
    return covariance


def _local_jacobian(exposure: SubtractedExposure, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, 2, 2) derivatives of (ra cos dec, dec) in degrees by (x, y) in pixels."""
    _, dec = exposure.wcs.all_pix2world(x, y, 0)
    columns = []
    for dx, dy in ((0.5, 0.0), (0.0, 0.5)):
        ra_up, dec_up = exposure.wcs.all_pix2world(x + dx, y + dy, 0)
        ra_down, dec_down = exposure.wcs.all_pix2world(x - dx, y - dy, 0)
        d_ra = ((ra_up - ra_down + 180.0) % 360.0 - 180.0) * np.cos(np.radians(dec))
        columns.append(np.stack([d_ra, dec_up - dec_down], axis=-1))
    return np.stack(columns, axis=-1)


def _select(
    records: np.ndarray,
    found: Detections,
    shapes: Shapes,
    no_usable_centre: np.ndarray,
    exposure: SubtractedExposure,
    config: DetectionConfig,
) -> tuple[np.ndarray, dict[str, int]]:
    """Which sources are kept, and how many each rule dropped: each source counts under its first.

    Unknown values never drop a source. What the rules are for stands in docs/detection.md.
    """
    science_snr = np.divide(
        records["scienceFlux"],
        records["scienceFluxErr"],
        out=np.full(len(records), np.nan, dtype=np.float32),
        where=records["scienceFluxErr"] > 0,
    )
    rules = {
        "no finite position": ~(np.isfinite(records["ra"]) & np.isfinite(records["dec"])),
        "off image": records["pixelFlags_offimage"] == 1,
        "saturated or no data at the centre": (records["pixelFlags_saturatedCenter"] == 1)
        | (records["pixelFlags_nodataCenter"] == 1),
        "no usable pixel at the centre": no_usable_centre,
        "cosmic ray at the centre": records["pixelFlags_crCenter"] == 1,
        "fast trail": _is_fast_trail(records, found, shapes, exposure, config),
        "part of a longer trail": shapes.part_of_trail,
        "centroid failed": records["centroid_flag"] == 1,
        # A source that vanished leaves its light in the template; over-subtracted sky alone makes -3 of its place.
        "negative direct image": (science_snr < config.min_science_snr)
        & (-records["scienceFlux"] > _HOLE_PART * np.abs(records["psfFlux"])),
    }
    kept = np.ones(len(records), dtype=bool)
    rejected = {}
    for name, dropped in rules.items():
        rejected[name] = int(np.count_nonzero(kept & dropped))
        kept &= ~dropped
    return kept, rejected


def _is_fast_trail(
    records: np.ndarray,
    found: Detections,
    shapes: Shapes,
    exposure: SubtractedExposure,
    config: DetectionConfig,
) -> np.ndarray:
    """What moved faster than may be published, or may have: cut by the border, or long and fitted by no trail."""
    if len(records) == 0:
        return np.zeros(0, dtype=bool)
    least_arcsec = config.max_motion_deg_per_day * 3600.0 / 86400.0 * exposure.visit.exposure_time_s
    trails = shapes.trails
    fast = (records["trailLength"] >= least_arcsec) | trails.off_image | (trails.suspect_long & trails.edge)
    pixel_arcsec = 3600.0 * np.hypot(*_local_jacobian(exposure, records["x"], records["y"]).transpose(1, 0, 2)).T
    diagonal = np.hypot(pixel_arcsec[0] * (found.x1 - found.x0), pixel_arcsec[1] * (found.y1 - found.y0))
    half_trace = 0.5 * (found.spread_xx + found.spread_yy)
    half_split = np.hypot(0.5 * (found.spread_xx - found.spread_yy), found.spread_xy)
    elongated = half_trace + half_split > _ELONGATED_AXIS_RATIO2 * (half_trace - half_split)
    # A trail of length d spreads d^2 / 12: three times as much holds more than the trail that was fitted.
    whole = trails.good & ~(half_trace + half_split > (trails.dx**2 + trails.dy**2) / 4.0)
    ny, nx = exposure.difference.shape
    at_border = (found.x0 == 0) | (found.y0 == 0) | (found.x1 == nx) | (found.y1 == ny)
    long = (shapes.trail_attempted | elongated) & (diagonal >= least_arcsec)
    return (trails.good & fast) | (~whole & long) | (~trails.good & shapes.trail_attempted & at_border)

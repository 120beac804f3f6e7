"""What a sky cell knows, and how one visit changes it. Pure: arrays in, arrays out, no Beam.

A cell is a HEALPix nested pixel. It holds every object and every associated source in it and within
a halo around it, so that what it decides for its own sources agrees with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hpgeom
import numpy as np

from schemas.elements import AlertBatch
from schemas.identifiers import dia_forced_source_id
from schemas.records import (
    DIA_FORCED_SOURCE,
    DIA_OBJECT,
    DIA_SOURCE,
    concatenate_records,
    empty_records,
    take_records,
)
from transforms.cell_state import SEEN
from transforms.numerics.dia_association import Positions, associate
from transforms.numerics.dia_object_statistics import LightCurves, band_statistics, mean_positions
from transforms.numerics.solar_system_matching import unit_vectors

BANDS = b"ugrizy"
DAYS_PER_YEAR = 365.25
_HALO_DIRECTIONS = 32
_QUALITY_FLAGS = (
    "centroid_flag",
    "pixelFlags_crCenter",
    "pixelFlags_nodataCenter",
    "pixelFlags_interpolatedCenter",
    "pixelFlags_saturatedCenter",
    "pixelFlags_suspectCenter",
    "pixelFlags_streakCenter",
    "glint_trail",
)
_BAND_COLUMNS = {
    "psf_mean": "{}_psfFluxMean",
    "psf_mean_err": "{}_psfFluxMeanErr",
    "psf_sigma": "{}_psfFluxSigma",
    "psf_n": "{}_psfFluxNdata",
    "psf_min": "{}_psfFluxMin",
    "psf_max": "{}_psfFluxMax",
    "psf_max_slope": "{}_psfFluxMaxSlope",
    "psf_err_mean": "{}_psfFluxErrMean",
    "science_mean": "{}_scienceFluxMean",
    "science_mean_err": "{}_scienceFluxMeanErr",
    "forced_mean": "{}_fpFluxMean",
    "forced_mean_err": "{}_fpFluxMeanErr",
}


@dataclass(frozen=True)
class AssociationRules:
    """The rules of association; see `transforms.association.AssociationConfig` for units and reasons."""

    radius_arcsec: float
    error_floor_arcsec: float
    error_fallback_arcsec: float
    halo_arcsec: float
    new_object_min_reliability: float
    history_months: float
    forced_min_sources: int
    forced_min_reliability: float
    forced_max_trail_arcsec: float

    @property
    def history_days(self) -> float:
        return self.history_months / 12.0 * DAYS_PER_YEAR


@dataclass(frozen=True)
class CellKnowledge:
    """Objects (sorted by diaObjectId) and their history, in any order."""

    objects: np.ndarray
    sources: np.ndarray
    forced: np.ndarray

    @classmethod
    def nothing(cls) -> CellKnowledge:
        return cls(empty_records(DIA_OBJECT, 0), empty_records(DIA_SOURCE, 0), empty_records(DIA_FORCED_SOURCE, 0))


@dataclass(frozen=True)
class CellVisit:
    """What arrived of one visit in one cell: context, detectors, sources and their ssSources."""

    context: dict[str, Any]
    detectors: tuple[int, ...]
    sources: np.ndarray
    ss_sources: np.ndarray

    @property
    def number(self) -> int:
        return int(self.context["visit"])

    @property
    def midpoint_mjd_tai(self) -> float:
        return float(self.context["midpoint_mjd_tai"])

    def seen(self) -> np.ndarray:
        """Its detectors as a cell remembers them, (n,) SEEN."""
        seen = np.empty(len(self.detectors), SEEN)
        seen["visit"], seen["detector"], seen["midpointMjdTai"] = self.number, self.detectors, self.midpoint_mjd_tai
        return seen


@dataclass(frozen=True)
class ForcedFluxes:
    """Forced fluxes of objects on one detector, nJy; `inside` marks those that lie on it."""

    inside: np.ndarray
    psf_flux: np.ndarray
    psf_flux_err: np.ndarray
    science_flux: np.ndarray
    science_flux_err: np.ndarray


@dataclass(frozen=True)
class CellOutcome:
    """What a visit did to a cell: objects afterwards, rows to append to its history, alerts to emit."""

    objects: np.ndarray
    new_sources: np.ndarray
    new_forced: np.ndarray
    batch: AlertBatch


MeasureForced = Callable[[int, np.ndarray, np.ndarray], ForcedFluxes]


def cells_of(ra_deg: np.ndarray, dec_deg: np.ndarray, order: int) -> np.ndarray:
    """HEALPix nested cell of each position; (n,) int64."""
    return np.asarray(hpgeom.angle_to_pixel(1 << order, ra_deg, dec_deg, nest=True), dtype=np.int64)


def cells_overlapping(ra_deg: np.ndarray, dec_deg: np.ndarray, order: int) -> np.ndarray:
    """All cells that touch the convex polygon of these corners, and perhaps a few more beside it."""
    found = hpgeom.query_polygon(1 << order, np.asarray(ra_deg) % 360.0, dec_deg, inclusive=True, nest=True)
    return np.asarray(found, dtype=np.int64)


def cells_with_halo(ra_deg: np.ndarray, dec_deg: np.ndarray, order: int, halo_arcsec: float) -> np.ndarray:
    """The cells that need each position: its own and those whose halo it lies in; (n, 33) with repeats.

    The halo is probed in `_HALO_DIRECTIONS`: the tip of a cell that reaches less than 1/6 of the halo
    inwards between two of them may be missed (measured: all within 0.84 halo are found).
    """
    centre = unit_vectors(ra_deg, dec_deg)
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    east = np.stack([-np.sin(ra), np.cos(ra), np.zeros_like(ra)], axis=-1)
    north = np.stack([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)], axis=-1)
    halo = np.radians(halo_arcsec / 3600.0)
    angles = np.arange(_HALO_DIRECTIONS) * (2.0 * np.pi / _HALO_DIRECTIONS)
    directions = np.cos(angles)[None, :, None] * east[:, None] + np.sin(angles)[None, :, None] * north[:, None]
    ring = np.cos(halo) * centre[:, None] + np.sin(halo) * directions
    ring_ra = np.degrees(np.arctan2(ring[..., 1], ring[..., 0])) % 360.0
    ring_dec = np.degrees(np.arctan2(ring[..., 2], np.hypot(ring[..., 0], ring[..., 1])))
    own = cells_of(ra_deg, dec_deg, order)
    around = cells_of(ring_ra.ravel(), ring_dec.ravel(), order).reshape(len(own), _HALO_DIRECTIONS)
    return np.concatenate([own[:, None], around], axis=1)


def process_visit(
    cell: int, order: int, known: CellKnowledge, arrived: CellVisit, rules: AssociationRules, measure: MeasureForced
) -> CellOutcome:
    """Associate one visit's sources in one cell, measure forced fluxes, make alerts.

    A visit that comes late is decided as it would have been in time: by objects where they were then, and only
    history that precedes it enters its alerts. Of objects founded since, those are joined by what would have founded
    them. The objects that stay are summarised up to their newest source.

    Parameters
    ----------
    cell, order : the cell that decides
    known : objects and history of the cell
    arrived : the visit's sources in the cell and its halo, detectors not yet seen only
    rules : AssociationRules
    measure : (detector, ra, dec) -> ForcedFluxes, never raises

    Returns
    -------
    CellOutcome
    """
    visit, midpoint = arrived.number, arrived.midpoint_mjd_tai
    sources = _sorted_by(arrived.sources, arrived.sources["diaSourceId"])
    before = _preceding(known.sources, midpoint, visit, rules.history_days)
    forced_before = _preceding(known.forced, midpoint, visit, rules.history_days)

    moving = sources["ssObjectId"] != 0
    fixed = take_records(sources, ~moving)
    is_late = bool(np.any(_follows(known.sources, midpoint, visit)))
    objects_then = _as_they_were(known, before, midpoint, visit) if is_late else known.objects
    free = _without_visit_partner(objects_then, known.sources, visit)
    match = associate(
        _positions(fixed),
        _positions(free),
        radius_arcsec=rules.radius_arcsec,
        error_floor_arcsec=rules.error_floor_arcsec,
        error_fallback_arcsec=rules.error_fallback_arcsec,
        max_group_width_arcsec=rules.halo_arcsec / 2.0,
    )
    fit = _qualifies(fixed, rules.new_object_min_reliability)
    matched = match.object_index >= 0
    matched[matched] &= fit[matched] | ~(free["firstDiaSourceMjdTai"][match.object_index[matched]] > midpoint)
    qualified = ~matched & fit
    fixed["diaObjectId"] = 0
    fixed["diaObjectId"][matched] = free["diaObjectId"][match.object_index[matched]]
    fixed["diaObjectId"][qualified] = fixed["diaSourceId"][qualified]
    associated = take_records(fixed, matched | qualified)
    touched = np.sort(associated["diaObjectId"])

    created = _new_objects(take_records(fixed, qualified))
    objects = _sorted_by(concatenate_records([objects_then, created], DIA_OBJECT), "diaObjectId")
    rows = concatenate_records([before, associated], DIA_SOURCE)
    objects = _move_to_means(objects, touched, rows)
    new_forced = _forced_rows(objects, rows, arrived, rules, measure)

    forced_rows = concatenate_records([forced_before, new_forced], DIA_FORCED_SOURCE)
    alert_objects = _summarised(_of_ids(objects, touched), rows, forced_rows, arrived.context)
    kept_objects = alert_objects
    if is_late:
        all_rows = concatenate_records([known.sources, associated], DIA_SOURCE)
        all_forced = concatenate_records([known.forced, new_forced], DIA_FORCED_SOURCE)
        kept_objects = _brought_up_to_date(_of_ids(objects, touched), all_rows, all_forced, arrived.context, rules)
    objects = _replaced(known.objects, kept_objects)

    batch = _alert_batch(
        cell,
        order,
        arrived,
        take_records(sources, moving),
        fixed,
        alert_objects,
        kept_objects,
        before,
        forced_rows,
        new_forced,
        {"new": created["diaObjectId"], "contested": match.contested, "wide": match.wide},
    )
    return CellOutcome(objects, associated, new_forced, batch)


def _sorted_by(records: np.ndarray, key: np.ndarray | str) -> np.ndarray:
    values = records[key] if isinstance(key, str) else key
    return take_records(records, np.argsort(values, kind="stable"))


def _preceding(rows: np.ndarray, midpoint: float, visit: int, days: float) -> np.ndarray:
    """Rows of earlier visits, not older than `days`."""
    return take_records(rows, ~_follows(rows, midpoint, visit) & (rows["midpointMjdTai"] > midpoint - days))


def _follows(rows: np.ndarray, midpoint: float, visit: int) -> np.ndarray:
    """Rows that do not precede (midpoint, visit). Rows of the visit itself (another detector's) do precede."""
    later = rows["midpointMjdTai"] > midpoint
    return later | ((rows["midpointMjdTai"] == midpoint) & (rows["visit"] > visit))


def _as_they_were(known: CellKnowledge, before: np.ndarray, midpoint: float, visit: int) -> np.ndarray:
    """Objects with those that were detected since put back to the mean of what preceded."""
    since = known.sources["diaObjectId"][_follows(known.sources, midpoint, visit)]
    moved = np.intersect1d(np.intersect1d(since, before["diaObjectId"]), known.objects["diaObjectId"])
    return _move_to_means(known.objects.copy(), moved, before)


def _without_visit_partner(objects: np.ndarray, sources: np.ndarray, visit: int) -> np.ndarray:
    """Objects that have no source of this visit yet (another detector of it may have come before)."""
    taken = sources["diaObjectId"][sources["visit"] == visit]
    return take_records(objects, ~np.isin(objects["diaObjectId"], taken))


def _positions(records: np.ndarray) -> Positions:
    return Positions(records["ra"], records["dec"], records["raErr"], records["decErr"])


def _qualifies(sources: np.ndarray, min_reliability: float) -> np.ndarray:
    """Sources with a position that may found a new object; unknown flags and reliability qualify."""
    flagged = np.zeros(len(sources), dtype=bool)
    for name in _QUALITY_FLAGS:
        flagged |= sources[name] == 1
    placed = np.isfinite(sources["ra"]) & np.isfinite(sources["dec"])
    return placed & ~flagged & ~(sources["reliability"] < min_reliability)


def _new_objects(sources: np.ndarray) -> np.ndarray:
    objects = empty_records(DIA_OBJECT, len(sources))
    for name in ("ra", "dec", "raErr", "decErr", "ra_dec_Cov"):
        objects[name] = sources[name]
    objects["diaObjectId"] = sources["diaSourceId"]
    objects["firstDiaSourceMjdTai"] = sources["midpointMjdTai"]
    return objects


def _of_ids(objects: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return take_records(objects, np.searchsorted(objects["diaObjectId"], ids))


def _replaced(objects: np.ndarray, updated: np.ndarray) -> np.ndarray:
    kept = take_records(objects, ~np.isin(objects["diaObjectId"], updated["diaObjectId"]))
    return _sorted_by(concatenate_records([kept, updated], DIA_OBJECT), "diaObjectId")


def _by_object(rows: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the given (sorted) objects by (object, time, id) and their (n + 1,) offsets."""
    own = take_records(rows, np.isin(rows["diaObjectId"], ids))
    identifier = own["diaSourceId" if own.dtype == DIA_SOURCE else "diaForcedSourceId"]
    own = take_records(own, np.lexsort((identifier, own["midpointMjdTai"], own["diaObjectId"])))
    offsets = np.append(np.searchsorted(own["diaObjectId"], ids), len(own)).astype(np.int64)
    return own, offsets


def _move_to_means(objects: np.ndarray, touched: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Objects with the touched ones moved to the mean position of their detections."""
    if len(touched) == 0:
        return objects
    own, offsets = _by_object(rows, touched)
    where = np.searchsorted(objects["diaObjectId"], touched)
    objects["ra"][where], objects["dec"][where] = mean_positions(offsets, own["ra"], own["dec"])
    return objects


def _light_curves(rows: np.ndarray, offsets: np.ndarray) -> LightCurves:
    band = np.full(len(rows), -1, dtype=np.int8)
    for index in range(len(BANDS)):
        band[rows["band"] == BANDS[index : index + 1]] = index
    # Copied: a single packed row counts as contiguous but is not aligned, which would compile the loops anew.
    columns = ("midpointMjdTai", "psfFlux", "psfFluxErr", "scienceFlux", "scienceFluxErr")
    return LightCurves(offsets, band, *(rows[name].astype(np.float64) for name in columns))


def _summarised(objects: np.ndarray, rows: np.ndarray, forced_rows: np.ndarray, context: dict[str, Any]) -> np.ndarray:
    """Objects with counts, times, mean position and band statistics over the given rows."""
    if len(objects) == 0:
        return objects
    ids = objects["diaObjectId"]
    own, offsets = _by_object(rows, ids)
    forced, forced_offsets = _by_object(forced_rows, ids)
    statistics = band_statistics(_light_curves(own, offsets), _light_curves(forced, forced_offsets))
    for key, column in _BAND_COLUMNS.items():
        for index in range(len(BANDS)):
            objects[column.format(chr(BANDS[index]))] = statistics[key][:, index]
    objects["ra"], objects["dec"] = mean_positions(offsets, own["ra"], own["dec"])
    first = np.minimum.reduceat(own["midpointMjdTai"], offsets[:-1])
    # A first detection older than the history stays known; a later one may belong to a visit after this one.
    known_first = objects["firstDiaSourceMjdTai"]
    objects["firstDiaSourceMjdTai"] = np.where(known_first < first, known_first, first)
    objects["lastDiaSourceMjdTai"] = np.maximum.reduceat(own["midpointMjdTai"], offsets[:-1])
    objects["nDiaSources"] = np.diff(offsets)
    objects["validityStartMjdTai"] = context["readout_end_mjd_tai"]
    return objects


def _brought_up_to_date(
    objects: np.ndarray, rows: np.ndarray, forced_rows: np.ndarray, context: dict[str, Any], rules: AssociationRules
) -> np.ndarray:
    """Objects as their newest source left them, with what came late in its place: never before `context`."""
    ids, inverse = np.unique(rows["diaObjectId"], return_inverse=True)
    newest = np.full(len(ids), -np.inf)
    np.maximum.at(newest, inverse, rows["midpointMjdTai"])

    def in_reach(history: np.ndarray) -> np.ndarray:
        known = take_records(history, np.isin(history["diaObjectId"], ids))
        end = newest[np.searchsorted(ids, known["diaObjectId"])]
        times = known["midpointMjdTai"]
        return take_records(known, (times <= end) & (times > end - rules.history_days))

    valid_from = np.fmax(objects["validityStartMjdTai"], context["readout_end_mjd_tai"])
    return _summarised(objects, in_reach(rows), in_reach(forced_rows), {**context, "readout_end_mjd_tai": valid_from})


def _forced_rows(
    objects: np.ndarray, rows: np.ndarray, arrived: CellVisit, rules: AssociationRules, measure: MeasureForced
) -> np.ndarray:
    """Forced measurements of this visit for every object with enough good sources."""
    candidates = _forced_candidates(objects, rows, rules)
    parts = []
    for detector in arrived.detectors:
        if len(candidates) == 0:
            break
        fluxes = measure(detector, candidates["ra"], candidates["dec"])
        inside = take_records(candidates, fluxes.inside)
        part = empty_records(DIA_FORCED_SOURCE, len(inside))
        for name in ("diaObjectId", "ra", "dec"):
            part[name] = inside[name]
        part["visit"], part["detector"] = arrived.context["visit"], detector
        part["diaForcedSourceId"] = [
            dia_forced_source_id(int(object_id), arrived.context["visit"], detector)
            for object_id in inside["diaObjectId"]
        ]
        part["psfFlux"] = fluxes.psf_flux[fluxes.inside]
        part["psfFluxErr"] = fluxes.psf_flux_err[fluxes.inside]
        part["scienceFlux"] = fluxes.science_flux[fluxes.inside]
        part["scienceFluxErr"] = fluxes.science_flux_err[fluxes.inside]
        part["midpointMjdTai"] = arrived.context["midpoint_mjd_tai"]
        part["timeProcessedMjdTai"] = arrived.context["readout_end_mjd_tai"]
        part["band"] = arrived.context["band"].encode()
        parts.append(part)
    return concatenate_records(parts, DIA_FORCED_SOURCE)


def _forced_candidates(objects: np.ndarray, rows: np.ndarray, rules: AssociationRules) -> np.ndarray:
    """Objects with at least `forced_min_sources` sources fit to trust a position."""
    good = (
        ~(rows["reliability"] < rules.forced_min_reliability)
        & ~(rows["trailLength"] > rules.forced_max_trail_arcsec)
        & (rows["glint_trail"] != 1)
        & (rows["isDipole"] != 1)
    )
    ids, counts = np.unique(rows["diaObjectId"][good], return_counts=True)
    return take_records(objects, np.isin(objects["diaObjectId"], ids[counts >= rules.forced_min_sources]))


def _alert_batch(
    cell: int,
    order: int,
    arrived: CellVisit,
    moving: np.ndarray,
    fixed: np.ndarray,
    alert_objects: np.ndarray,
    kept_objects: np.ndarray,
    before: np.ndarray,
    forced_rows: np.ndarray,
    new_forced: np.ndarray,
    decisions: dict[str, Any],
) -> AlertBatch:
    """The alerts and table rows that this cell owns: those of sources inside the cell itself."""
    owned = cells_of(fixed["ra"], fixed["dec"], order) == cell
    fixed = take_records(fixed, owned)
    moving = take_records(moving, cells_of(moving["ra"], moving["dec"], order) == cell)
    has_object = fixed["diaObjectId"] != 0
    alerts = concatenate_records([take_records(fixed, has_object), moving], DIA_SOURCE)
    alerts = _sorted_by(alerts, "diaSourceId")
    is_fixed = alerts["diaObjectId"] != 0
    ids = alerts["diaObjectId"][is_fixed]

    objects = empty_records(DIA_OBJECT, len(alerts))
    objects[is_fixed] = _of_ids(alert_objects, ids)
    states = _of_ids(kept_objects, ids)
    prv, prv_offsets = _histories(before, alerts["diaObjectId"])
    forced, forced_offsets = _histories(forced_rows, alerts["diaObjectId"])
    ss_sources = np.zeros(len(alerts), dtype=arrived.ss_sources.dtype)
    if (~is_fixed).any():
        ss_by_id = _sorted_by(arrived.ss_sources, "diaSourceId")
        ss_sources[~is_fixed] = take_records(
            ss_by_id, np.searchsorted(ss_by_id["diaSourceId"], alerts["diaSourceId"][~is_fixed])
        )
    forced_owned = take_records(new_forced, cells_of(new_forced["ra"], new_forced["dec"], order) == cell)
    n_new = int(np.isin(ids, decisions["new"]).sum())
    return AlertBatch(
        context={**arrived.context, "cell": cell, "detectors": list(arrived.detectors)},
        dia_sources=alerts,
        prv_dia_sources=prv,
        prv_offsets=prv_offsets,
        prv_forced_sources=forced,
        forced_offsets=forced_offsets,
        dia_objects=objects,
        ss_sources=ss_sources,
        object_states=states,
        unassociated=take_records(fixed, ~has_object),
        forced_sources=forced_owned,
        counts={
            "objects_new": n_new,
            "objects_updated": int(is_fixed.sum()) - n_new,
            "sources_without_object": int((~has_object).sum()),
            "contested_groups": int(owned[decisions["contested"]].sum()),
            "wide_groups": int(owned[decisions["wide"]].sum()),
        },
    )


def _histories(rows: np.ndarray, object_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flattened rows of each alert's object (none where the id is 0), and offsets."""
    ids = np.unique(object_ids[object_ids != 0])
    own, offsets = _by_object(rows, ids)
    position = np.searchsorted(ids, object_ids)
    slices = []
    lengths = np.zeros(len(object_ids), dtype=np.int64)
    for index, object_id in enumerate(object_ids):
        if object_id != 0:
            start, end = offsets[position[index]], offsets[position[index] + 1]
            slices.append(np.arange(start, end))
            lengths[index] = end - start
    chosen = np.concatenate(slices) if slices else np.empty(0, dtype=np.int64)
    return take_records(own, chosen), np.concatenate(([0], np.cumsum(lengths)))

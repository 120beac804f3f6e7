"""What a sky cell knows, and how one visit changes it. Pure: arrays in, arrays out, no Beam.

A cell is a HEALPix nested pixel. It holds every object and every associated source in it and within
a halo around it, so that what it decides for its own sources agrees with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

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
BAND_COLUMNS = {
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
_OBJECT_BYTES = np.dtype(f"V{DIA_OBJECT.itemsize}")


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
        founded=free["firstDiaSourceMjdTai"],
    )
    fit = _qualifies(fixed, rules.new_object_min_reliability) & _is_new(fixed["diaSourceId"], known.objects)
    matched = match.object_index >= 0
    matched[matched] &= fit[matched] | ~(free["firstDiaSourceMjdTai"][match.object_index[matched]] > midpoint)
    qualified = ~matched & fit
    fixed["diaObjectId"] = 0
    fixed["diaObjectId"][matched] = free["diaObjectId"][match.object_index[matched]]
    fixed["diaObjectId"][qualified] = fixed["diaSourceId"][qualified]
    associated = take_records(fixed, matched | qualified)
    touched = np.sort(associated["diaObjectId"])

    created = _new_objects(take_records(fixed, qualified))
    objects = _with(objects_then, created)
    rows = concatenate_records([before, associated], DIA_SOURCE)
    detections = _by_object(rows, touched)
    objects = _replaced(objects, _moved_to_means(_of_ids(objects, touched), detections))
    new_forced = _forced_rows(objects, rows, arrived, rules, measure)

    forced = _by_object(concatenate_records([forced_before, new_forced], DIA_FORCED_SOURCE), touched)
    alert_objects = _summarised(_of_ids(objects, touched), detections, forced, arrived.context)
    kept_objects = alert_objects
    if is_late:
        all_rows = concatenate_records([known.sources, associated], DIA_SOURCE)
        all_forced = concatenate_records([known.forced, new_forced], DIA_FORCED_SOURCE)
        kept_objects = _brought_up_to_date(_of_ids(objects, touched), all_rows, all_forced, arrived.context, rules)
    objects = _replaced(_with(known.objects, created), kept_objects)

    batch = _alert_batch(
        cell,
        order,
        arrived,
        take_records(sources, moving),
        fixed,
        alert_objects,
        kept_objects,
        detections.without_visit(visit),
        forced,
        new_forced,
        {"new": created["diaObjectId"], "contested": match.contested, "wide": match.wide},
    )
    return CellOutcome(objects, associated, new_forced, batch)


def _sorted_by(records: np.ndarray, key: np.ndarray | str) -> np.ndarray:
    values = records[key] if isinstance(key, str) else key
    return take_records(records, np.argsort(values, kind="stable"))


def _preceding(rows: np.ndarray, midpoint: float, visit: int, days: float) -> np.ndarray:
    """Rows of earlier visits, not older than `days`."""
    preceding = ~_follows(rows, midpoint, visit) & (rows["midpointMjdTai"] > midpoint - days)
    return rows if preceding.all() else take_records(rows, preceding)


def _follows(rows: np.ndarray, midpoint: float, visit: int) -> np.ndarray:
    """Rows that do not precede (midpoint, visit). Rows of the visit itself (another detector's) do precede."""
    later = rows["midpointMjdTai"] > midpoint
    return later | ((rows["midpointMjdTai"] == midpoint) & (rows["visit"] > visit))


def _as_they_were(known: CellKnowledge, before: np.ndarray, midpoint: float, visit: int) -> np.ndarray:
    """Objects with those that were detected since put back to the mean of what preceded."""
    since = known.sources["diaObjectId"][_follows(known.sources, midpoint, visit)]
    moved = np.intersect1d(np.intersect1d(since, before["diaObjectId"]), known.objects["diaObjectId"])
    return _replaced(known.objects, _moved_to_means(_of_ids(known.objects, moved), _by_object(before, moved)))


def _without_visit_partner(objects: np.ndarray, sources: np.ndarray, visit: int) -> np.ndarray:
    """Objects that have no source of this visit yet (another detector of it may have come before)."""
    taken = np.sort(sources["diaObjectId"][sources["visit"] == visit])
    return take_records(objects, ~_among(objects["diaObjectId"], taken))


def _positions(records: np.ndarray) -> Positions:
    return Positions(records["ra"], records["dec"], records["raErr"], records["decErr"])


def _qualifies(sources: np.ndarray, min_reliability: float) -> np.ndarray:
    """Sources with a position that may found a new object; unknown flags and reliability qualify."""
    flagged = np.zeros(len(sources), dtype=bool)
    for name in _QUALITY_FLAGS:
        flagged |= sources[name] == 1
    placed = np.isfinite(sources["ra"]) & np.isfinite(sources["dec"])
    return placed & ~flagged & ~(sources["reliability"] < min_reliability)


def _is_new(ids: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Which sorted ids are no object's, and not that of the source before: an id stands for one object for good."""
    return ~_among(ids, objects["diaObjectId"]) & (np.diff(ids, prepend=-1) != 0)


def _new_objects(sources: np.ndarray) -> np.ndarray:
    objects = empty_records(DIA_OBJECT, len(sources))
    for name in ("ra", "dec", "raErr", "decErr", "ra_dec_Cov"):
        objects[name] = sources[name]
    objects["diaObjectId"] = sources["diaSourceId"]
    objects["firstDiaSourceMjdTai"] = sources["midpointMjdTai"]
    return objects


def _of_ids(objects: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return take_records(objects, np.searchsorted(objects["diaObjectId"], ids))


def _with(objects: np.ndarray, created: np.ndarray) -> np.ndarray:
    return _sorted_by(concatenate_records([objects, created], DIA_OBJECT), "diaObjectId")


def _replaced(objects: np.ndarray, updated: np.ndarray) -> np.ndarray:
    """Objects with the updated ones, which are all among them, in their new state."""
    replaced = objects.copy()
    where = np.searchsorted(objects["diaObjectId"], updated["diaObjectId"])
    replaced.view(_OBJECT_BYTES)[where] = updated.view(_OBJECT_BYTES)
    return replaced


def _among(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which values are among the sorted ids: as `np.isin`, which takes longer than all else for a few."""
    if len(ids) == 0:
        return np.zeros(len(values), dtype=bool)
    return np.asarray(ids[np.minimum(np.searchsorted(ids, values), len(ids) - 1)] == values)


class _Histories(NamedTuple):
    """Which rows are the history of which object; rows are wide, so they stay where they are until they are alerts'.

    Attributes
    ----------
    ids : (n,) int64 diaObjectId, ascending
    rows : records in any order
    order : indices of rows by (object, time, id)
    offsets : (n + 1,) int64; object i owns order[offsets[i]:offsets[i + 1]]
    """

    ids: np.ndarray
    rows: np.ndarray
    order: np.ndarray
    offsets: np.ndarray

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self.rows[name][self.order])

    def without_visit(self, visit: int) -> _Histories:
        kept = self.column("visit") != visit
        before = np.concatenate(([0], np.cumsum(kept)))
        return self._replace(order=self.order[kept], offsets=before[self.offsets])

    def of_each(self, object_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each of these objects behind each other (none where the id is 0), and offsets."""
        known = object_ids != 0
        where = np.searchsorted(self.ids, object_ids[known])
        starts, lengths = np.zeros((2, len(object_ids)), dtype=np.int64)
        starts[known], lengths[known] = self.offsets[where], np.diff(self.offsets)[where]
        ends = np.cumsum(lengths)
        chosen = np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)
        return take_records(self.rows, self.order[chosen]), np.concatenate(([0], ends))


def _by_object(rows: np.ndarray, ids: np.ndarray) -> _Histories:
    """The histories of objects given by their sorted ids."""
    own = np.flatnonzero(_among(rows["diaObjectId"], ids))
    identifier = "diaSourceId" if rows.dtype == DIA_SOURCE else "diaForcedSourceId"
    object_ids, times, identifiers = (rows[name][own] for name in ("diaObjectId", "midpointMjdTai", identifier))
    order = np.lexsort((identifiers, times, object_ids))
    offsets = np.append(np.searchsorted(object_ids[order], ids), len(own)).astype(np.int64)
    return _Histories(ids, rows, own[order], offsets)


def _moved_to_means(objects: np.ndarray, detections: _Histories) -> np.ndarray:
    """Objects at the mean position of their detections."""
    if len(objects):
        position = detections.column("ra"), detections.column("dec")
        objects["ra"], objects["dec"] = mean_positions(detections.offsets, *position)
    return objects


def across_bands(objects: np.ndarray, column: str) -> np.ndarray:
    """One quantity in all bands as a view (n, 6) of DIA_OBJECT records, whose fields for it are equally far apart."""
    dtype, offset, step = _band_layout(column)
    return np.ndarray((len(objects), len(BANDS)), dtype, objects, offset, (DIA_OBJECT.itemsize, step))


@cache
def _band_layout(column: str) -> tuple[np.dtype, int, int]:
    places = {name: (field[0], field[1]) for name, field in (DIA_OBJECT.fields or {}).items()}
    (dtype, first), (_, second) = (places[column.format(chr(band))] for band in BANDS[:2])
    return dtype, first, second - first


def _light_curves(histories: _Histories) -> LightCurves:
    letters = histories.column("band")
    band = np.full(len(letters), -1, dtype=np.int8)
    for index in range(len(BANDS)):
        band[letters == BANDS[index : index + 1]] = index
    # Copied: a single packed row counts as contiguous but is not aligned, which would compile the loops anew.
    columns = ("midpointMjdTai", "psfFlux", "psfFluxErr", "scienceFlux", "scienceFluxErr")
    return LightCurves(histories.offsets, band, *(histories.column(name).astype(np.float64) for name in columns))


def _single(values: np.ndarray) -> np.ndarray:
    """Values as float32 holds them, null where it cannot."""
    return np.where(np.abs(values) <= np.finfo(np.float32).max, values, np.nan)


def _summarised(objects: np.ndarray, detections: _Histories, forced: _Histories, context: dict[str, Any]) -> np.ndarray:
    """Objects with counts, times and band statistics of their histories."""
    if len(objects) == 0:
        return objects
    statistics = band_statistics(_light_curves(detections), _light_curves(forced))
    for key, column in BAND_COLUMNS.items():
        across_bands(objects, column)[:] = _single(statistics[key])
    times, offsets = detections.column("midpointMjdTai"), detections.offsets
    first = np.minimum.reduceat(times, offsets[:-1])
    # A first detection older than the history stays known; a later one may belong to a visit after this one.
    known_first = objects["firstDiaSourceMjdTai"]
    objects["firstDiaSourceMjdTai"] = np.where(known_first < first, known_first, first)
    objects["lastDiaSourceMjdTai"] = np.maximum.reduceat(times, offsets[:-1])
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

    def in_reach(history: np.ndarray) -> _Histories:
        known = take_records(history, _among(history["diaObjectId"], ids))
        end = newest[np.searchsorted(ids, known["diaObjectId"])]
        times = known["midpointMjdTai"]
        reached = take_records(known, (times <= end) & (times > end - rules.history_days))
        return _by_object(reached, objects["diaObjectId"])

    valid_from = np.fmax(objects["validityStartMjdTai"], context["readout_end_mjd_tai"])
    detections = in_reach(rows)
    moved = _moved_to_means(objects, detections)
    return _summarised(moved, detections, in_reach(forced_rows), {**context, "readout_end_mjd_tai": valid_from})


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
    return take_records(objects, _among(objects["diaObjectId"], ids[counts >= rules.forced_min_sources]))


def _alert_batch(
    cell: int,
    order: int,
    arrived: CellVisit,
    moving: np.ndarray,
    fixed: np.ndarray,
    alert_objects: np.ndarray,
    kept_objects: np.ndarray,
    before: _Histories,
    forced: _Histories,
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
    prv, prv_offsets = before.of_each(alerts["diaObjectId"])
    forced_rows, forced_offsets = forced.of_each(alerts["diaObjectId"])
    ss_sources = np.zeros(len(alerts), dtype=arrived.ss_sources.dtype)
    if (~is_fixed).any():
        ss_by_id = _sorted_by(arrived.ss_sources, "diaSourceId")
        ss_sources[~is_fixed] = take_records(
            ss_by_id, np.searchsorted(ss_by_id["diaSourceId"], alerts["diaSourceId"][~is_fixed])
        )
    forced_owned = take_records(new_forced, cells_of(new_forced["ra"], new_forced["dec"], order) == cell)
    n_new = int(_among(ids, decisions["new"]).sum())
    return AlertBatch(
        context={**arrived.context, "cell": cell, "detectors": list(arrived.detectors)},
        dia_sources=alerts,
        prv_dia_sources=prv,
        prv_offsets=prv_offsets,
        prv_forced_sources=forced_rows,
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

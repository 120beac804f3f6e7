"""AssociateSsObjects: known moving objects at the places where ephemerides or orbits put them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from schemas.element_tables import ElementTable, read_element_table, record_designation
from schemas.elements import DetectedSources, StageElement
from schemas.manifests import SURVEY_MJD_RANGE, Visit
from schemas.observatories import Observatory, observatory_of
from schemas.records import MPC_ORBITS, SS_SOURCE, concatenate_records, empty_records, null_infinite, take_records
from transforms.failures import FAILED, StageFn, failed_in, failure_of
from transforms.numerics.orbit_propagation import (
    Observer,
    Orbits,
    PredictedPositions,
    apparent_magnitude,
    mean_anomaly_of_perihelion,
    mean_motion_deg_per_d,
    motion_reach,
    observer_at,
    orbits_from_elements,
    perihelion_of_mean_anomaly,
    positions_from_ranges,
    predict_positions,
    propagate_perturbed,
    rough_directions,
)
from transforms.numerics.solar_system_matching import (
    Ephemerides,
    distance_ranks,
    ephemeris_offsets,
    interpolate_ephemerides,
    match_one_to_one,
    sky_cap,
    sky_coordinates,
    unit_vectors,
    within_cap,
)

STAGE = "solar_system"
DEFAULT_OBSERVATORY = "X05"  # Rubin
# Objects this near to the sources are predicted in full: what the first, rough direction may be wrong by.
_ROUGH_ARCSEC = 300.0
# What is kept of one night and one visit for the next exposure; visits in flight are few and ordered in time.
_NIGHTS_KEPT, _VISITS_KEPT = 2, 8
_NIGHT_HALF_D = 0.501  # a visit is nearest to its night's whole day, give or take TDB - TAI
_loading = threading.Lock()
_DEG_PER_DAY = 24.0 / 3600.0  # of arcsec per hour
_REQUIRED = {
    "ssObjectId": pa.types.is_integer,
    "mjd_tai": pa.types.is_floating,
    "ra": pa.types.is_floating,
    "dec": pa.types.is_floating,
}
_OPTIONAL_NUMBERS = ("magnitude", "topo_range_au")


class EphemeridesError(ValueError):
    """An ephemeris table that cannot be used; the message says why."""


@dataclass(frozen=True)
class SolarSystemConfig:
    """How sources are tied to known objects.

    `observatory`: from where orbits are seen, see `observatory_of`; goes before what the manifest says.
    """

    radius_arcsec: float = Field(default=1.0, gt=0, le=30)
    observatory: str | None = None

    @field_validator("observatory")
    @classmethod
    def _known(cls, text: str | None) -> str | None:
        if text is not None:
            observatory_of(text)
        return text

    def observatory_at(self, visit: Visit) -> Observatory:
        """Where a visit was taken from. ValueError if its manifest names no place."""
        return observatory_of(self.observatory or visit.observatory or DEFAULT_OBSERVATORY)


class SolarSystemResult(NamedTuple):
    """`good`: DetectedSources; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class AssociateSsObjects(beam.PTransform):
    """Give sources that lie at a known object's place their ssObjectId and ssSource record.

    Input and output `good`: DetectedSources; `failed`: exposures for which the places could not be
    computed (their sources go on without). Ephemerides and elements are loaded once per worker process. Order: as
    it comes; a duplicate gives the same. No state.
    """

    def __init__(self, config: SolarSystemConfig, ephemerides: str | None, elements: str | None = None) -> None:
        super().__init__()
        self.stage = _MatchEphemeridesFn(config, ephemerides, elements)

    def expand(self, detected: beam.PCollection) -> SolarSystemResult:
        outputs = detected | "MatchEphemerides" >> beam.ParDo(self.stage).with_output_types(StageElement).with_outputs(
            FAILED, main="good"
        )
        return SolarSystemResult(outputs.good, outputs[FAILED])


class _MatchEphemeridesFn(StageFn):
    stage = STAGE

    def __init__(self, config: SolarSystemConfig, ephemerides: str | None, elements: str | None) -> None:
        self.config = config
        self.ephemerides = ephemerides
        self.elements = elements

    def setup(self) -> None:
        nothing = self.ephemerides is None and self.elements is None
        self.known = None if nothing else known_objects(self.ephemerides, self.elements)

    def work(self, detected: DetectedSources) -> Iterator[Any]:
        started = time.perf_counter()
        if self.known is not None and len(detected.dia_sources):
            try:
                detected = associate_ss_objects(detected, self.known, self.config)
            except Exception as error:  # without known objects the night goes on
                exposure = detected.exposure
                lost = "solar-system association of the detector"
                failure = failure_of(error, STAGE, exposure.visit.visit, exposure.detector, lost=lost)
                yield from failed_in(exposure.visit, failure)
        detected.seconds["solar_system"] = time.perf_counter() - started
        yield detected


def read_ephemerides(path: str) -> tuple[pa.Table, dict[str, int]]:
    """The usable rows of a night folder's ephemerides, and how many others there are, by reason.

    Raises
    ------
    EphemeridesError
        The file is missing, broken, or lacks a column.
    """
    try:
        table = pq.ParquetFile(Path(path)).read()
    except (OSError, pa.ArrowException) as error:
        raise EphemeridesError(f"{path}: cannot be read: {error}") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise EphemeridesError(f"{path}: two columns of one name")
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise EphemeridesError(f"{path}: no column {', '.join(missing)}; there are {', '.join(table.column_names)}")
    for name in _OPTIONAL_NUMBERS:
        if name in table.column_names and not _is_number(table[name].type):
            raise EphemeridesError(f"{path}: {name} is {table[name].type}")
    for name, kind in _REQUIRED.items():
        if not kind(table[name].type):
            raise EphemeridesError(f"{path}: {name} is {table[name].type}")
    # Ids that int64 cannot hold become negative.
    ids = table["ssObjectId"].fill_null(0).cast(pa.int64(), safe=False)
    table = table.set_column(table.column_names.index("ssObjectId"), "ssObjectId", ids)
    mjd, ra, dec = (table[name].fill_null(np.nan).to_numpy() for name in ("mjd_tai", "ra", "dec"))
    first_mjd, last_mjd = SURVEY_MJD_RANGE
    rules = {
        "ssObjectId is missing or not positive": ids.to_numpy() < 1,
        f"mjd_tai outside [{first_mjd:.0f}, {last_mjd:.0f}]": ~((mjd >= first_mjd) & (mjd <= last_mjd)),
        "no place on the sky: ra in [-180, 360], dec in [-90, 90]": ~(
            (ra >= -180.0) & (ra <= 360.0) & (np.abs(dec) <= 90.0)
        ),
    }
    kept = np.ones(len(table), dtype=bool)
    problems = {}
    for reason, wrong in rules.items():
        if (kept & wrong).any():
            problems[reason] = int(np.count_nonzero(kept & wrong))
        kept &= ~wrong
    return (table.filter(pa.array(kept)) if problems else table), problems


def known_objects(ephemerides: str | None, elements: str | None) -> KnownObjects:
    """The known objects of two files, read once for all threads and stages of a process.

    Those asked for last are kept, and no others; a file that changed is read anew.
    """
    with _loading:
        states = (None if path is None else _state_of(path) for path in (ephemerides, elements))
        return _loaded(*states)


def element_table(path: str) -> ElementTable:
    """The elements of a file, read once as with `known_objects`. ElementsError if it is no table of elements."""
    with _loading:
        return _element_table(_state_of(path))


_FileState = tuple[str, int, int]  # path, size, time of the last change


def _state_of(path: str) -> _FileState:
    try:
        state = Path(path).stat()
    except OSError:
        return path, 0, 0  # whoever reads it says what is wrong
    return path, state.st_size, state.st_mtime_ns


@lru_cache(maxsize=1)
def _element_table(elements: _FileState) -> ElementTable:
    table = read_element_table(Path(elements[0]))
    pa.default_memory_pool().release_unused()  # as much again as the table
    return table


@lru_cache(maxsize=1)
def _loaded(ephemerides: _FileState | None, elements: _FileState | None) -> KnownObjects:
    return KnownObjects(
        None if ephemerides is None else read_ephemerides(ephemerides[0])[0],
        None if elements is None else _element_table(elements),
    )


class KnownObjects:
    """Known objects, and where they are at a time; one for all threads of a process.

    An object that the ephemerides place at that time is taken from there, even if there are elements too. What was
    computed of all orbits for a night and of all ephemerides for a visit is kept for the next exposure; what is
    predicted depends on the visit alone.
    """

    def __init__(self, ephemerides: pa.Table | None, elements: ElementTable | None) -> None:
        self._ephemerides = ephemerides
        self._elements = elements
        self._orbits = _orbits_of(elements)
        self._computing = threading.Lock()  # threads wait for a night rather than compute it twice
        self._night_of = lru_cache(maxsize=_NIGHTS_KEPT)(self._compute_night)
        self._places_at = lru_cache(maxsize=_VISITS_KEPT)(self._compute_places)

    def predicted_near(
        self, mjd_tai: float, site: Observatory, ra_deg: np.ndarray, dec_deg: np.ndarray, radius_arcsec: float
    ) -> np.ndarray:
        """SS_SOURCE of the objects about sources, as predicted, in order of ssObjectId; what needs a source is null."""
        observer = observer_at(mjd_tai, site.longitude_deg, site.rho_cos_phi, site.rho_sin_phi)
        with self._computing:
            places = self._places_at(mjd_tai)
            night = self._night_of(float(round(mjd_tai)))
        centre, reach_arcsec = sky_cap(ra_deg, dec_deg)
        reach_arcsec += radius_arcsec
        parts = []
        # What float32 cannot hold becomes infinite, then null.
        with np.errstate(over="ignore", invalid="ignore"):
            if self._ephemerides is not None:
                near = within_cap(unit_vectors(places.ra_deg, places.dec_deg), centre, reach_arcsec)
                parts.append(_from_ephemerides(self._ephemerides, places, observer, np.flatnonzero(near)))
            if self._elements is not None:
                rows = night.rows_about(centre, reach_arcsec + _ROUGH_ARCSEC)
                rows = rows[~np.isin(self._elements.ss_object_id[rows], places.ss_object_id)]
                directions = rough_directions(_rows_of(night.orbits, rows), observer)
                rows = rows[within_cap(directions, centre, reach_arcsec + _ROUGH_ARCSEC)]
                parts.append(_from_elements(self._elements, night.orbits, observer, rows))
        predicted = concatenate_records(parts, SS_SOURCE)
        null_infinite(predicted)
        return take_records(predicted, np.argsort(predicted["ssObjectId"]))

    def _compute_places(self, mjd_tai: float) -> Ephemerides:
        return _places(self._ephemerides, mjd_tai)

    def _compute_night(self, day: float) -> _Night:
        orbits = propagate_perturbed(self._orbits, day)
        geocentre = observer_at(day, 0.0, 0.0, 0.0)
        directions, reach = motion_reach(orbits, geocentre, _NIGHT_HALF_D)
        # By columns and in single precision, 0.02 arcsec: it only preselects.
        return _Night(orbits, directions.T.astype(np.float32, order="C"), (reach + 1e-6).astype(np.float32))


class _Night(NamedTuple):
    """All orbits at a whole day, their directions then (3, n), and how far (rad) they get until half a day from it."""

    orbits: Orbits
    directions: np.ndarray
    reach: np.ndarray

    def rows_about(self, centre: np.ndarray, radius_arcsec: float) -> np.ndarray:
        """The objects that may come within a circle on the sky some time that night, and few others."""
        apart = np.zeros(len(self.reach), dtype=np.float32)
        for along, middle in zip(self.directions, centre.astype(np.float32), strict=True):
            apart += (along - middle) ** 2
        return np.flatnonzero(apart <= (self.reach + np.float32(math.radians(radius_arcsec / 3600.0))) ** 2)


def associate_ss_objects(detected: DetectedSources, known: KnownObjects, config: SolarSystemConfig) -> DetectedSources:
    """Match one exposure's sources, one to one and nearest first, with the known objects at its midpoint."""
    sources = detected.dia_sources.copy()
    ra, dec = sources["ra"], sources["dec"]
    visit = detected.exposure.visit
    site = config.observatory_at(visit)
    predicted = known.predicted_near(visit.midpoint_mjd_tai, site, ra, dec, config.radius_arcsec)
    matched, row, distance_arcsec = match_one_to_one(
        ra, dec, predicted["ephRa"], predicted["ephDec"], config.radius_arcsec
    )
    ss_sources = take_records(predicted, row)
    sources["ssObjectId"][matched] = ss_sources["ssObjectId"]
    ss_sources["diaSourceId"] = sources["diaSourceId"][matched]
    places = ss_sources["ephRa"], ss_sources["ephDec"]
    offsets = ephemeris_offsets(ra[matched], dec[matched], *places, ss_sources["ephRateRa"], ss_sources["ephRateDec"])
    for name, values in zip(
        ("eclLambda", "eclBeta", "galLon", "galLat"), sky_coordinates(ra[matched], dec[matched]), strict=True
    ):
        ss_sources[name] = values
    ss_sources["ephOffset"] = distance_arcsec
    ss_sources["ephOffsetRa"], ss_sources["ephOffsetDec"] = offsets.offset_ra, offsets.offset_dec
    ss_sources["ephOffsetAlongTrack"] = offsets.along_track
    ss_sources["ephOffsetCrossTrack"] = offsets.cross_track
    ss_sources["diaDistanceRank"] = distance_ranks(ra, dec, matched, *places)
    return replace(detected, dia_sources=sources, ss_sources=ss_sources)


def _places(table: pa.Table | None, mjd_tai: float) -> Ephemerides:
    if table is None:
        return interpolate_ephemerides(np.zeros(0, np.int64), [], [], [], mjd_tai)
    ids, mjd, ra, dec = (table[name].to_numpy() for name in ("ssObjectId", "mjd_tai", "ra", "dec"))
    return interpolate_ephemerides(ids, mjd, ra, dec, mjd_tai, _optional(table, "topo_range_au"))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)


def _optional(table: pa.Table, name: str) -> np.ndarray | None:
    """A column of numbers, NaN where there is none; None without it."""
    return table[name].cast(pa.float64()).fill_null(np.nan).to_numpy() if name in table.column_names else None


def _from_ephemerides(table: pa.Table, places: Ephemerides, observer: Observer, near: np.ndarray) -> np.ndarray:
    """The predicted ssSources of the chosen objects; magnitude and designation from each object's first row."""
    ids, ra, dec, rate_ra, rate_dec, distance, distance_rate = (column[near] for column in places)
    seen = positions_from_ranges(
        ra, dec, rate_ra * _DEG_PER_DAY, rate_dec * _DEG_PER_DAY, distance, distance_rate, observer
    )
    predicted = _records(ids, seen)
    known_ids, first = np.unique(table["ssObjectId"].to_numpy(), return_index=True)
    rows = first[np.searchsorted(known_ids, ids)]
    if "designation" in table.column_names:
        predicted["designation"] = [record_designation(name) for name in table["designation"].take(rows).to_pylist()]
    magnitude = _optional(table, "magnitude")
    if magnitude is not None:
        predicted["ephVmag"] = magnitude[rows]
    return predicted


def _rows_of(orbits: Orbits, rows: np.ndarray) -> Orbits:
    return Orbits(*(column[rows] for column in orbits))


def _from_elements(elements: ElementTable, orbits: Orbits, observer: Observer, near: np.ndarray) -> np.ndarray:
    """The predicted ssSources of the chosen objects."""
    seen = predict_positions(propagate_perturbed(_rows_of(orbits, near), observer.mjd_tdb), observer)
    predicted = _records(elements.ss_object_id[near], seen)
    predicted["designation"] = elements.designation[near]
    predicted["ephVmag"] = apparent_magnitude(
        elements.absolute_h[near],
        elements.slope_g[near],
        seen.helio_range_au,
        seen.topo_range_au,
        seen.phase_angle_deg,
    )
    return predicted


def _records(ss_object_id: np.ndarray, seen: PredictedPositions) -> np.ndarray:
    """SS_SOURCE of predictions; what needs a source is null."""
    predicted = empty_records(SS_SOURCE, len(ss_object_id))
    predicted["ssObjectId"] = ss_object_id
    columns = {
        "elongation": seen.elongation_deg,
        "phaseAngle": seen.phase_angle_deg,
        "topoRange": seen.topo_range_au,
        "topoRangeRate": seen.topo_range_rate_km_s,
        "helioRange": seen.helio_range_au,
        "helioRangeRate": seen.helio_range_rate_km_s,
        "ephRa": seen.ra_deg,
        "ephDec": seen.dec_deg,
        "ephRate": np.hypot(seen.rate_ra_deg_per_d, seen.rate_dec_deg_per_d),
        "ephRateRa": seen.rate_ra_deg_per_d,
        "ephRateDec": seen.rate_dec_deg_per_d,
        "helio_vtot": np.linalg.norm(seen.helio_velocity, axis=1),
        "topo_vtot": np.linalg.norm(seen.topo_velocity, axis=1),
    }
    for axis, name in enumerate("xyz"):
        columns[f"helio_{name}"] = seen.helio_position[:, axis]
        columns[f"helio_v{name}"] = seen.helio_velocity[:, axis]
        columns[f"topo_{name}"] = seen.topo_position[:, axis]
        columns[f"topo_v{name}"] = seen.topo_velocity[:, axis]
    for name, values in columns.items():
        predicted[name] = values
    return predicted


def _orbits_of(elements: ElementTable | None) -> Orbits:
    if elements is None:
        return Orbits(np.zeros(0), np.zeros((0, 3)), np.zeros((0, 3)))
    q, perihelion = elements.perihelion_au, elements.perihelion_mjd
    without = np.isnan(q)
    replaced = perihelion_of_mean_anomaly(
        elements.semi_major_au[without],
        elements.eccentricity[without],
        elements.mean_anomaly_deg[without],
        elements.epoch_mjd[without],
    )
    q, perihelion = q.copy(), perihelion.copy()
    q[without], perihelion[without] = replaced
    return orbits_from_elements(
        q,
        elements.eccentricity,
        elements.inclination_deg,
        elements.node_deg,
        elements.argument_deg,
        perihelion,
        elements.epoch_mjd,
    )


def orbit_records(elements: ElementTable | None, ss_object_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) MPC_ORBITS of objects, and which of them the table has; no object is 0."""
    records, has = empty_records(MPC_ORBITS, len(ss_object_id)), np.zeros(len(ss_object_id), dtype=bool)
    if elements is not None and len(elements.ss_object_id):
        known = elements.ss_object_id
        rows = np.minimum(np.searchsorted(known, ss_object_id), len(known) - 1)
        has = known[rows] == ss_object_id
        records[has] = _mpc_orbits(elements, rows[has])
    return records, has


def _mpc_orbits(elements: ElementTable, rows: np.ndarray) -> np.ndarray:
    """MPC_ORBITS of rows of a table: what it gives, and of perihelion and mean anomaly each from the other."""
    records = empty_records(MPC_ORBITS, len(rows))
    q, perihelion, a, anomaly = (
        column[rows]
        for column in (
            elements.perihelion_au,
            elements.perihelion_mjd,
            elements.semi_major_au,
            elements.mean_anomaly_deg,
        )
    )
    e, epoch = elements.eccentricity[rows], elements.epoch_mjd[rows]
    without = np.isnan(q)
    from_anomaly = perihelion_of_mean_anomaly(a[without], e[without], anomaly[without], epoch[without])
    from_perihelion = mean_anomaly_of_perihelion(q[~without], e[~without], perihelion[~without], epoch[~without])
    q[without], perihelion[without] = from_anomaly
    a[~without], anomaly[~without] = from_perihelion
    motion = mean_motion_deg_per_d(a)
    columns = {
        "designation": elements.designation[rows],
        "packed_primary_provisional_designation": elements.packed_provisional[rows],
        "unpacked_primary_provisional_designation": elements.unpacked_provisional[rows],
        "a": a,
        "q": q,
        "e": e,
        "i": elements.inclination_deg[rows],
        "node": elements.node_deg[rows],
        "argperi": elements.argument_deg[rows],
        "peri_time": perihelion,
        "mean_anomaly": anomaly,
        "mean_motion": motion,
        "period": np.where(a > 0.0, 360.0 / motion, np.nan),
        "epoch_mjd": epoch,
        "h": elements.absolute_h[rows],
        "g": elements.slope_g[rows],
    }
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, then null
        for name, values in columns.items():
            records[name] = values
    null_infinite(records)
    return records

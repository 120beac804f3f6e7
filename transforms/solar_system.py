"""AssociateSsObjects: known moving objects at the places where ephemerides or orbits put them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
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
from schemas.observatories import Observatory, observatory_of
from schemas.records import SS_SOURCE, concatenate_records, empty_records, take_records
from transforms.failures import FAILED, StageFn, failed_in, failure_of
from transforms.numerics.orbit_propagation import (
    Observer,
    Orbits,
    PredictedPositions,
    apparent_magnitude,
    observer_at,
    orbits_from_elements,
    perihelion_of_mean_anomaly,
    positions_from_ranges,
    predict_positions,
    propagate_perturbed,
    rough_directions,
    tdb_of_tai,
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
# Objects this near to the sources are predicted in full: what the first, rough direction may be wrong by.
_ROUGH_ARCSEC = 300.0
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
    """How sources are tied to known objects. `observatory`: from where orbits are seen; see `observatory_of`."""

    radius_arcsec: float = Field(default=1.0, gt=0, le=30)
    observatory: str = "X05"

    @field_validator("observatory")
    @classmethod
    def _known(cls, text: str) -> str:
        observatory_of(text)
        return text


class SolarSystemResult(NamedTuple):
    """`good`: DetectedSources; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class AssociateSsObjects(beam.PTransform):
    """Give sources that lie at a known object's place their ssObjectId and ssSource record.

    Input and output `good`: DetectedSources; `failed`: exposures for which the places could not be
    computed (their sources go on without). Ephemerides and elements are loaded once per worker. Order: as it
    comes; a duplicate gives the same. No state.
    """

    def __init__(self, config: SolarSystemConfig, ephemerides: str | None, elements: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.ephemerides = ephemerides
        self.elements = elements

    def expand(self, detected: beam.PCollection) -> SolarSystemResult:
        outputs = detected | "MatchEphemerides" >> beam.ParDo(
            _MatchEphemeridesFn(self.config, self.ephemerides, self.elements)
        ).with_output_types(StageElement).with_outputs(FAILED, main="good")
        return SolarSystemResult(outputs.good, outputs[FAILED])


class _MatchEphemeridesFn(StageFn):
    def __init__(self, config: SolarSystemConfig, ephemerides: str | None, elements: str | None) -> None:
        self.config = config
        self.ephemerides = ephemerides
        self.elements = elements

    def setup(self) -> None:
        ephemerides = None if self.ephemerides is None else read_ephemerides(self.ephemerides)
        elements = None if self.elements is None else read_element_table(Path(self.elements))
        nothing = ephemerides is None and elements is None
        self.known = None if nothing else KnownObjects(ephemerides, elements, observatory_of(self.config.observatory))

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


def read_ephemerides(path: str) -> pa.Table:
    """The ephemeris table of a night folder.

    Raises
    ------
    EphemeridesError
        The file is missing, broken, or lacks a column.
    """
    try:
        table = pq.ParquetFile(Path(path)).read()
    except (OSError, pa.ArrowInvalid) as error:
        raise EphemeridesError(f"{path}: cannot be read: {error}") from error
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise EphemeridesError(f"{path}: no column {', '.join(missing)}; there are {', '.join(table.column_names)}")
    for name in _OPTIONAL_NUMBERS:
        if name in table.column_names and not _is_number(table[name].type):
            raise EphemeridesError(f"{path}: {name} is {table[name].type}")
    for name, kind in _REQUIRED.items():
        column = table[name]
        if column.null_count:
            raise EphemeridesError(f"{path}: {column.null_count} rows have no {name}")
        if not kind(column.type):
            raise EphemeridesError(f"{path}: {name} is {column.type}")
    return table.set_column(table.column_names.index("ssObjectId"), "ssObjectId", table["ssObjectId"].cast(pa.int64()))


class KnownObjects:
    """Known objects, and where they are at a time.

    An object that the ephemerides place at that time is taken from there, even if there are elements too. What was
    computed of all orbits for a night and for a visit is kept until another is asked for; it depends on nothing else.
    """

    def __init__(self, ephemerides: pa.Table | None, elements: ElementTable | None, observatory: Observatory) -> None:
        self._ephemerides = ephemerides
        self._elements = elements
        self._observatory = observatory
        self._orbits = _orbits_of(elements)
        self._night: tuple[float, Orbits] | None = None
        self._visit: _Visit | None = None

    def predicted_near(
        self, mjd_tai: float, ra_deg: np.ndarray, dec_deg: np.ndarray, radius_arcsec: float
    ) -> np.ndarray:
        """SS_SOURCE of the objects about sources, as predicted, in order of ssObjectId; what needs a source is null."""
        visit = self._places_at(mjd_tai)
        centre, reach_arcsec = sky_cap(ra_deg, dec_deg)
        reach_arcsec += radius_arcsec
        parts = []
        if self._ephemerides is not None:
            near = within_cap(unit_vectors(visit.places.ra_deg, visit.places.dec_deg), centre, reach_arcsec)
            parts.append(_from_ephemerides(self._ephemerides, visit, np.flatnonzero(near)))
        if self._elements is not None:
            near = within_cap(visit.directions, centre, reach_arcsec + _ROUGH_ARCSEC)
            near &= ~np.isin(self._elements.ss_object_id, visit.places.ss_object_id)
            parts.append(_from_elements(self._elements, self._orbits_of_night(mjd_tai), visit, np.flatnonzero(near)))
        predicted = concatenate_records(parts, SS_SOURCE)
        return take_records(predicted, np.argsort(predicted["ssObjectId"]))

    def _places_at(self, mjd_tai: float) -> _Visit:
        if self._visit is None or self._visit.observer.mjd_tdb != tdb_of_tai(mjd_tai):
            site = self._observatory
            observer = observer_at(mjd_tai, site.longitude_deg, site.rho_cos_phi, site.rho_sin_phi)
            places = _places(self._ephemerides, mjd_tai)
            orbits = self._orbits_of_night(mjd_tai)
            self._visit = _Visit(observer, places, rough_directions(orbits, observer))
        return self._visit

    def _orbits_of_night(self, mjd_tai: float) -> Orbits:
        """All orbits at the nearest whole day: what the planets do over years is computed once a night."""
        day = float(round(mjd_tai))
        if self._night is None or self._night[0] != day:
            self._night = (day, propagate_perturbed(self._orbits, day))
        return self._night[1]


class _Visit(NamedTuple):
    """Of all objects: where ephemerides place them, and about where orbits do."""

    observer: Observer
    places: Ephemerides
    directions: np.ndarray


def associate_ss_objects(detected: DetectedSources, known: KnownObjects, config: SolarSystemConfig) -> DetectedSources:
    """Match one exposure's sources, one to one and nearest first, with the known objects at its midpoint."""
    sources = detected.dia_sources.copy()
    ra, dec = sources["ra"], sources["dec"]
    predicted = known.predicted_near(detected.exposure.visit.midpoint_mjd_tai, ra, dec, config.radius_arcsec)
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


def _from_ephemerides(table: pa.Table, visit: _Visit, near: np.ndarray) -> np.ndarray:
    """The predicted ssSources of the chosen objects; magnitude and designation from each object's first row."""
    ids, ra, dec, rate_ra, rate_dec, distance, distance_rate = (column[near] for column in visit.places)
    seen = positions_from_ranges(
        ra, dec, rate_ra * _DEG_PER_DAY, rate_dec * _DEG_PER_DAY, distance, distance_rate, visit.observer
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


def _from_elements(elements: ElementTable, orbits: Orbits, visit: _Visit, near: np.ndarray) -> np.ndarray:
    """The predicted ssSources of the chosen objects."""
    chosen = Orbits(orbits.mjd_tdb[near], orbits.position[near], orbits.velocity[near])
    seen = predict_positions(propagate_perturbed(chosen, visit.observer.mjd_tdb), visit.observer)
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

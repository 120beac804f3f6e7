"""Simulated fields full of known objects among other sources, and how many `associate_ss_objects` names rightly."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.element_tables import ElementTable
from schemas.elements import DetectedSources, SubtractedExposure
from schemas.manifests import DetectorImages, Visit
from schemas.observatories import OBSERVATORIES
from schemas.records import DIA_SOURCE, SS_SOURCE, empty_records
from transforms.numerics.orbit_propagation import (
    Observer,
    Orbits,
    observer_at,
    orbits_from_elements,
    perihelion_of_mean_anomaly,
    predict_positions,
    propagate_perturbed,
    rough_directions,
)
from transforms.solar_system import KnownObjects, SolarSystemConfig, associate_ss_objects

MIDPOINT = 61367.1
RUBIN = OBSERVATORIES["X05"]
ARCSEC = np.radians(1.0 / 3600.0)
_DRAWN_AT_ONCE = 400_000
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class FieldSpec:
    """A square field on the ecliptic opposite the Sun.

    Attributes
    ----------
    side_deg : its side
    known : objects of the main belt in it that are detected
    undetected : more of them whose light is too faint
    others : sources that are none of these, anywhere in it
    detectors_along, detectors_across : exposures that it is divided into
    days : of the elements' epoch before the visit
    orbit_error_arcsec, orbit_error_spread : median distance of the known orbit's place from the true one, along the
        track, and its spread (log-normal). The defaults are what real detections show: of 4,945 by ZTF of 546
        asteroids, up to 900 days from the epoch of JPL's elements, half lie within 0.06 arcsec, 95 % within 0.27,
        0.1 % beyond 1 (study_orbits.py); their own astrometric errors are in that
    astrometric_error_arcsec : per coordinate, least and most
    """

    side_deg: float = 3.5
    known: int = 2_000
    undetected: int = 1_000
    others: int = 10_000
    detectors_along: int = 21
    detectors_across: int = 9
    days: float = 40.0
    orbit_error_arcsec: float = 0.062
    orbit_error_spread: float = 0.91
    astrometric_error_arcsec: tuple[float, float] = (0.05, 0.1)


class FieldScores(NamedTuple):
    """`matched`: known objects that are detected and named rightly; `wrong`: of all matches."""

    known: int
    sources: int
    matches: int
    matched: float
    wrong: float
    missed_outside: int  # the detection is beyond the radius of the prediction
    missed_taken: int  # another source is at the object's place, or another object at the source's
    wrong_others: int  # sources that are no known object
    cpu_ms: float  # per exposure


class _Elements(NamedTuple):
    semi_major_au: FloatArray
    eccentricity: FloatArray
    inclination_deg: FloatArray
    node_deg: FloatArray
    argument_deg: FloatArray
    mean_anomaly_deg: FloatArray
    epoch_mjd: FloatArray

    def orbits(self) -> Orbits:
        a, e, inclination, node, argument, anomaly, epoch = self
        q, passage = perihelion_of_mean_anomaly(a, e, anomaly, epoch)
        return orbits_from_elements(q, e, inclination, node, argument, passage, epoch)


def field_scores(spec: FieldSpec, seed: int) -> FieldScores:
    """Simulate a field, name its sources, and compare with what they are."""
    rng = np.random.default_rng(seed)
    observer = observer_at(MIDPOINT, *RUBIN)
    towards, east, north = _axes(observer)
    elements = _objects_in_field(spec, rng, observer, (towards, east, north))
    n = len(elements.epoch_mjd)
    places = _places(elements, observer)
    seen = np.arange(n) < spec.known
    # The known orbit runs ahead or behind: its mean anomaly is off.
    off = spec.orbit_error_arcsec * np.exp(rng.normal(0.0, spec.orbit_error_spread, n)) * rng.choice([-1.0, 1.0], n)
    ahead = elements._replace(mean_anomaly_deg=elements.mean_anomaly_deg + 1e-4)
    arcsec_per_deg = np.linalg.norm(_places(ahead, observer) - places, axis=1) / ARCSEC / 1e-4
    known = elements._replace(mean_anomaly_deg=elements.mean_anomaly_deg + off / arcsec_per_deg)
    # Sources: the detected objects, then others.
    error = rng.uniform(*spec.astrometric_error_arcsec, seen.sum())[:, None] * rng.normal(size=(seen.sum(), 2))
    detected = places[seen] + ARCSEC * (error[:, :1] * east + error[:, 1:] * north)
    half = np.tan(np.radians(0.5 * spec.side_deg))
    offsets = rng.uniform(-half, half, (spec.others, 2))
    vectors = np.concatenate([detected, towards + offsets[:, :1] * east + offsets[:, 1:] * north])
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    truth = np.concatenate([1 + np.flatnonzero(seen), np.zeros(spec.others, dtype=np.int64)])

    column = _cell(vectors @ east / (vectors @ towards), half, spec.detectors_along)
    row = _cell(vectors @ north / (vectors @ towards), half, spec.detectors_across)
    detector = column * spec.detectors_across + row
    objects = KnownObjects(None, _table(known))
    named, config = np.zeros(len(truth), dtype=np.int64), SolarSystemConfig()
    objects.predicted_near(MIDPOINT, RUBIN, np.zeros(1), np.zeros(1), 1.0)  # the night's work
    started = time.process_time()
    for number in np.unique(detector):
        rows = np.flatnonzero(detector == number)
        named[rows] = associate_ss_objects(_detected(vectors[rows]), objects, config).dia_sources["ssObjectId"]
    seconds = time.process_time() - started

    predicted = _places(known, observer)
    distance = np.linalg.norm(vectors[: spec.known] - predicted[seen], axis=1) / ARCSEC
    missed = named[: spec.known] != truth[: spec.known]
    is_match, is_wrong = named != 0, (named != 0) & (named != truth)
    return FieldScores(
        known=spec.known,
        sources=len(truth),
        matches=int(is_match.sum()),
        matched=float(1.0 - missed.mean()),
        wrong=float(is_wrong.sum() / max(is_match.sum(), 1)),
        missed_outside=int((missed & (distance > config.radius_arcsec)).sum()),
        missed_taken=int((missed & (distance <= config.radius_arcsec)).sum()),
        wrong_others=int(is_wrong[spec.known :].sum()),
        cpu_ms=1000.0 * seconds / len(np.unique(detector)),
    )


def _axes(observer: Observer) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Unit vectors away from the Sun, and east and north of that."""
    towards = observer.position / np.linalg.norm(observer.position)
    east = np.array([-towards[1], towards[0], 0.0]) / np.hypot(towards[0], towards[1])
    return towards, east, np.cross(towards, east)


def _objects_in_field(
    spec: FieldSpec, rng: np.random.Generator, observer: Observer, axes: tuple[FloatArray, FloatArray, FloatArray]
) -> _Elements:
    """Objects spread like the main belt's, all over the sky, of which those in the field are kept."""
    towards, east, north = axes
    half = np.tan(np.radians(0.499 * spec.side_deg))
    parts: list[_Elements] = []
    while sum(len(part.epoch_mjd) for part in parts) < spec.known + spec.undetected:
        n = _DRAWN_AT_ONCE
        drawn = _Elements(
            rng.uniform(2.1, 3.3, n),
            np.minimum(rng.rayleigh(0.11, n), 0.5),
            np.minimum(np.degrees(rng.rayleigh(np.radians(7.0), n)), 60.0),
            rng.uniform(0.0, 360.0, n),
            rng.uniform(0.0, 360.0, n),
            rng.uniform(0.0, 360.0, n),
            np.full(n, observer.mjd_tdb - spec.days),
        )
        directions = rough_directions(drawn.orbits(), observer)
        ahead = directions @ towards
        inside = (
            (ahead > 0.0) & (np.abs(directions @ east) < half * ahead) & (np.abs(directions @ north) < half * ahead)
        )
        parts.append(_Elements(*(column[inside] for column in drawn)))
    wanted = slice(0, spec.known + spec.undetected)
    return _Elements(*(np.concatenate(columns)[wanted] for columns in zip(*parts, strict=True)))


def _places(elements: _Elements, observer: Observer) -> FloatArray:
    """(n, 3) unit vectors at which the objects are seen."""
    seen = predict_positions(propagate_perturbed(elements.orbits(), observer.mjd_tdb), observer)
    return seen.topo_position / seen.topo_range_au[:, None]


def _cell(tangent: FloatArray, half: float, n_cells: int) -> NDArray[np.int64]:
    return np.clip(np.floor((tangent / half + 1.0) * 0.5 * n_cells).astype(np.int64), 0, n_cells - 1)


def _table(elements: _Elements) -> ElementTable:
    n, nothing = len(elements.epoch_mjd), np.full(len(elements.epoch_mjd), np.nan)
    no_name = np.zeros(n, dtype="S1")
    return ElementTable(
        ss_object_id=1 + np.arange(n),
        designation=no_name,
        epoch_mjd=elements.epoch_mjd,
        eccentricity=elements.eccentricity,
        inclination_deg=elements.inclination_deg,
        node_deg=elements.node_deg,
        argument_deg=elements.argument_deg,
        perihelion_au=nothing,
        perihelion_mjd=nothing,
        semi_major_au=elements.semi_major_au,
        mean_anomaly_deg=elements.mean_anomaly_deg,
        absolute_h=nothing,
        slope_g=nothing,
        packed_provisional=no_name,
        unpacked_provisional=no_name,
    )


def _detected(vectors: FloatArray) -> DetectedSources:
    ra = np.degrees(np.arctan2(vectors[:, 1], vectors[:, 0])) % 360.0
    return detected_sources(ra, np.degrees(np.arcsin(vectors[:, 2])))


def detected_sources(ra_deg: Any, dec_deg: Any, observatory: str | None = None) -> DetectedSources:
    """The sources of one exposure at these places; without pixels."""
    sources = empty_records(DIA_SOURCE, len(ra_deg))
    sources["diaSourceId"] = 1 + np.arange(len(ra_deg))
    sources["ra"], sources["dec"] = ra_deg, dec_deg
    images = (DetectorImages(0, "", None),)
    visit = Visit(
        1, 20261122, 1, "SimCam", "r", MIDPOINT, 30.0, MIDPOINT, 150.0, 2.0, 0.0, None, None, images, observatory
    )
    nothing: Any = np.zeros((1, 1), dtype=np.float32)
    exposure = SubtractedExposure(
        visit, 0, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, None, {}, 0.0, ()
    )
    return DetectedSources(exposure, sources, empty_records(SS_SOURCE, 0), len(ra_deg), {}, {})

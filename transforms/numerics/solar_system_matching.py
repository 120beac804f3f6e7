"""Solar-system association: ephemerides at a time, one-to-one matching on the sky, coordinates and offsets.

Positions are unit vectors wherever they are combined, so right ascension has no seam and poles are nothing special.
Times are MJD TAI throughout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

ARCSEC_PER_RADIAN = 180.0 * 3600.0 / math.pi
HOURS_PER_DAY = 24.0
OBLIQUITY_J2000_ARCSEC = 84381.448  # IAU 1976, the obliquity of MPC and JPL orbital elements
# Direction of the Galactic pole and of the ascending node of the Galactic plane in the ICRS (ESA SP-1200 vol. 1, 1.5.3)
GALACTIC_POLE_RA_DEG, GALACTIC_POLE_DEC_DEG, GALACTIC_NODE_LON_DEG = 192.85948, 27.12825, 32.93192
_ROWS_MAX = 4


class Ephemerides(NamedTuple):
    """Positions of m objects at one time; every array has shape (m,), objects in ascending order of id.

    Attributes
    ----------
    ss_object_id : dtype as given
    ra_deg, dec_deg : float64; ra in [0, 360)
    rate_ra_arcsec_per_h, rate_dec_arcsec_per_h : motion on the sky, the first with cos(dec) applied; NaN for an
        object with a single row
    range_au, range_rate_au_per_d : distance and its rate; NaN where the rows around the time do not all tell it
    """

    ss_object_id: NDArray[np.generic]
    ra_deg: NDArray[np.float64]
    dec_deg: NDArray[np.float64]
    rate_ra_arcsec_per_h: NDArray[np.float64]
    rate_dec_arcsec_per_h: NDArray[np.float64]
    range_au: NDArray[np.float64]
    range_rate_au_per_d: NDArray[np.float64]


class EphemerisOffsets(NamedTuple):
    """Source minus ephemeris for n pairs, in arcsec; every array has shape (n,).

    Attributes
    ----------
    offset : angular distance, >= 0
    offset_ra, offset_dec : components towards east (cos(dec) applied) and north
    along_track, cross_track : components along the motion, and 90 degrees from it (from north towards west when the
        object moves north); NaN where the motion is zero or unknown
    """

    offset: NDArray[np.float64]
    offset_ra: NDArray[np.float64]
    offset_dec: NDArray[np.float64]
    along_track: NDArray[np.float64]
    cross_track: NDArray[np.float64]


def interpolate_ephemerides(
    ss_object_id: ArrayLike,
    mjd_tai: ArrayLike,
    ra_deg: ArrayLike,
    dec_deg: ArrayLike,
    at_mjd: float,
    range_au: ArrayLike | None = None,
) -> Ephemerides:
    """Interpolate each object's ephemeris to a time.

    Lagrange interpolation in time of the unit vectors of the up to four rows around `at_mjd` (four rows: cubic, three:
    quadratic, two: linear), projected back to the sphere; the rates are its exact derivative.

    Parameters
    ----------
    ss_object_id : (n,) integers or strings; rows in any order
    mjd_tai : (n,) days
    ra_deg, dec_deg : (n,) degrees
    at_mjd : MJD TAI, finite
    range_au : (n,) distances, interpolated alike; NaN where not known

    Returns
    -------
    Ephemerides
        Objects whose rows do not bracket the time (first <= at_mjd <= last) are left out, never extrapolated.
        Independent of the order of the rows.

    Raises
    ------
    ValueError
        Columns differ in length or the time is not finite.

    Notes
    -----
    Rows that are not finite are ignored; of rows of one object at one time the one with the lowest (ra, dec) is used.
    With hourly rows a main-belt object is right to better than 1e-3 arcsec (tested on a circular arc of 1 deg/day
    with a diurnal parallax of 8 arcsec). O(n log n).
    """
    ids, mjd = np.asarray(ss_object_id), np.asarray(mjd_tai, dtype=np.float64)
    ra, dec = np.asarray(ra_deg, dtype=np.float64), np.asarray(dec_deg, dtype=np.float64)
    distance = np.full(mjd.shape, np.nan) if range_au is None else np.asarray(range_au, dtype=np.float64)
    if not ids.ndim == 1 or not ids.shape == mjd.shape == ra.shape == dec.shape == distance.shape:
        raise ValueError(
            f"ephemeris columns must be of one length, got {ids.shape}, {mjd.shape}, {ra.shape}, {dec.shape}"
        )
    if not math.isfinite(at_mjd):
        raise ValueError(f"'at_mjd' must be finite, got {at_mjd}")
    finite = np.isfinite(mjd) & np.isfinite(ra) & np.isfinite(dec)
    order = np.flatnonzero(finite)
    order = order[np.lexsort((distance[order], dec[order], ra[order], mjd[order], ids[order]))]
    ids, mjd, ra, dec, distance = ids[order], mjd[order], ra[order], dec[order], distance[order]
    new_row = np.ones(ids.size, dtype=np.bool_)
    new_row[1:] = (ids[1:] != ids[:-1]) | (mjd[1:] != mjd[:-1])
    ids, mjd, vectors = ids[new_row], mjd[new_row], _unit_vectors(ra[new_row], dec[new_row])
    distance = distance[new_row]

    objects, first, count = np.unique(ids, return_index=True, return_counts=True)
    bracketed = np.zeros(objects.size, dtype=np.bool_)
    if objects.size:
        bracketed = (mjd[first] <= at_mjd) & (mjd[first + count - 1] >= at_mjd)
    objects, first, count = objects[bracketed], first[bracketed], count[bracketed]
    n_before = np.concatenate([[0], np.cumsum(mjd < at_mjd)])
    following = n_before[first + count] - n_before[first]  # rows of the object before the time
    n_used = np.minimum(count, _ROWS_MAX)
    start = first + np.clip(following - _ROWS_MAX // 2, 0, count - n_used)
    position, motion = np.zeros((objects.size, 3)), np.full((objects.size, 3), np.nan)
    out_range, range_rate = np.full(objects.size, np.nan), np.full(objects.size, np.nan)
    for n_rows in range(1, _ROWS_MAX + 1):
        group = np.flatnonzero(n_used == n_rows)
        rows = start[group, None] + np.arange(n_rows)
        values, slopes = _lagrange(mjd[rows] - at_mjd)
        position[group] = np.einsum("ij,ijk->ik", values, vectors[rows])
        out_range[group] = np.einsum("ij,ij->i", values, distance[rows])
        if n_rows > 1:
            motion[group] = np.einsum("ij,ijk->ik", slopes, vectors[rows])
            range_rate[group] = np.einsum("ij,ij->i", slopes, distance[rows])
    length = np.linalg.norm(position, axis=1)
    out_ra, out_dec = _angles(position)
    east, north = _tangent_vectors(out_ra, out_dec)
    per_hour = ARCSEC_PER_RADIAN / HOURS_PER_DAY / length
    return Ephemerides(
        objects,
        out_ra,
        out_dec,
        np.einsum("ij,ij->i", motion, east) * per_hour,
        np.einsum("ij,ij->i", motion, north) * per_hour,
        out_range,
        range_rate,
    )


def match_one_to_one(
    source_ra_deg: ArrayLike,
    source_dec_deg: ArrayLike,
    ephemeris_ra_deg: ArrayLike,
    ephemeris_dec_deg: ArrayLike,
    radius_arcsec: float = 1.0,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pair sources and ephemerides, nearest pair first, each used at most once.

    Parameters
    ----------
    source_ra_deg, source_dec_deg : (n,) degrees; NaN never matches
    ephemeris_ra_deg, ephemeris_dec_deg : (m,) degrees; NaN never matches
    radius_arcsec : largest distance of a pair, inclusive, in (0, 3600]

    Returns
    -------
    source_index, ephemeris_index : (k,) int64, in ascending order of source_index
    distance_arcsec : (k,) float64
        Of pairs at the same distance the one with the lower source, then lower ephemeris index comes first.

    Raises
    ------
    ValueError
        The radius is outside its interval or the columns of a catalogue differ in length.
    """
    if not 0.0 < radius_arcsec <= 3600.0:
        raise ValueError(f"'radius_arcsec' must be in (0, 3600], got {radius_arcsec}")
    sources, source_number = _finite_vectors("source", source_ra_deg, source_dec_deg)
    objects, object_number = _finite_vectors("ephemeris", ephemeris_ra_deg, ephemeris_dec_deg)
    if not sources.size or not objects.size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float64)
    # The tree only preselects: a hair wider than the radius, which is then applied to the angle itself.
    chord_limit = 2.0 * math.sin(0.5 * radius_arcsec / ARCSEC_PER_RADIAN) * (1.0 + 1e-6)
    neighbours = cKDTree(sources).query_ball_point(objects, chord_limit)
    counts = [len(found) for found in neighbours]
    object_index = np.repeat(np.arange(objects.shape[0]), counts)
    source_index = np.concatenate([np.asarray(found, dtype=np.int64) for found in neighbours])
    chord = np.linalg.norm(sources[source_index] - objects[object_index], axis=1)
    distance = 2.0 * np.arcsin(np.minimum(1.0, 0.5 * chord)) * ARCSEC_PER_RADIAN
    within = distance <= radius_arcsec
    source_index, object_index, distance = source_index[within], object_index[within], distance[within]
    order = np.lexsort((object_index, source_index, distance))
    taken = _greedy(source_index[order].tolist(), object_index[order].tolist())
    chosen = order[taken]
    chosen = chosen[np.argsort(source_index[chosen], kind="stable")]
    return source_number[source_index[chosen]], object_number[object_index[chosen]], distance[chosen]


def distance_ranks(
    source_ra_deg: ArrayLike,
    source_dec_deg: ArrayLike,
    matched: NDArray[np.int64],
    ephemeris_ra_deg: ArrayLike,
    ephemeris_dec_deg: ArrayLike,
) -> NDArray[np.int64]:
    """How near its source is to each ephemeris among all sources: 1 for the nearest.

    Parameters
    ----------
    source_ra_deg, source_dec_deg : (n,) degrees, all sources
    matched : (k,) number of the source of each pair
    ephemeris_ra_deg, ephemeris_dec_deg : (k,) degrees, the ephemeris of each pair

    Returns
    -------
    (k,) int64, one more than the number of sources that are strictly nearer
    """
    sources, number = _finite_vectors("source", source_ra_deg, source_dec_deg)
    objects, _ = _finite_vectors("ephemeris", ephemeris_ra_deg, ephemeris_dec_deg)
    own = np.linalg.norm(sources[np.searchsorted(number, matched)] - objects, axis=1)
    ranks = np.ones(len(objects), dtype=np.int64)
    for pair, rows in enumerate(cKDTree(sources).query_ball_point(objects, own * (1.0 + 1e-6))):
        ranks[pair] += np.count_nonzero(np.linalg.norm(sources[rows] - objects[pair], axis=1) < own[pair])
    return ranks


def sky_cap(ra_deg: ArrayLike, dec_deg: ArrayLike) -> tuple[NDArray[np.float64], float]:
    """A circle on the sky about places: (3,) unit vector of its centre and its radius in arcsec.

    Places that are not finite are left out; of none the radius is 0 and the centre anywhere.
    """
    vectors, _ = _finite_vectors("source", ra_deg, dec_deg)
    middle = vectors.sum(axis=0) if len(vectors) else np.array([1.0, 0.0, 0.0])
    length = float(np.linalg.norm(middle))
    centre = middle / length if length > 0.0 else np.array([1.0, 0.0, 0.0])
    chord = np.linalg.norm(vectors - centre, axis=1).max(initial=0.0)
    return centre, 2.0 * math.asin(min(1.0, 0.5 * float(chord))) * ARCSEC_PER_RADIAN


def within_cap(vectors: NDArray[np.float64], centre: NDArray[np.float64], radius_arcsec: float) -> NDArray[np.bool_]:
    """Which of (n, 3) unit vectors lie within a circle on the sky."""
    chord_limit = 2.0 * math.sin(0.5 * min(radius_arcsec / ARCSEC_PER_RADIAN, math.pi))
    return np.linalg.norm(vectors - centre, axis=1) <= chord_limit


def unit_vectors(ra_deg: ArrayLike, dec_deg: ArrayLike) -> NDArray[np.float64]:
    """(n, 3) unit vectors of places in degrees."""
    return _unit_vectors(np.asarray(ra_deg, dtype=np.float64), np.asarray(dec_deg, dtype=np.float64))


def sky_coordinates(
    ra_deg: ArrayLike, dec_deg: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Rotate ICRS positions to ecliptic (J2000) and Galactic coordinates.

    Parameters
    ----------
    ra_deg, dec_deg : (n,) degrees

    Returns
    -------
    ecl_lambda_deg, ecl_beta_deg, gal_lon_deg, gal_lat_deg : (n,) float64; longitudes in [0, 360); NaN for NaN

    Notes
    -----
    Ecliptic: rotation about the equinox by 84381.448 arcsec; within 2e-5 deg (0.07 arcsec) of astropy's
    BarycentricMeanEcliptic, whose obliquity is the IAU 2006 one, 0.042 arcsec smaller, and which rotates from ICRS to
    the J2000 equinox first. Galactic: pole and node of the Hipparcos catalogue; within 1e-5 deg of astropy's Galactic.
    """
    vectors = _unit_vectors(np.asarray(ra_deg, dtype=np.float64), np.asarray(dec_deg, dtype=np.float64))
    ecl_lambda, ecl_beta = _angles(vectors @ _ECLIPTIC_ROTATION.T)
    gal_lon, gal_lat = _angles(vectors @ _GALACTIC_ROTATION.T)
    return ecl_lambda, ecl_beta, gal_lon, gal_lat


def ephemeris_offsets(
    source_ra_deg: ArrayLike,
    source_dec_deg: ArrayLike,
    ephemeris_ra_deg: ArrayLike,
    ephemeris_dec_deg: ArrayLike,
    rate_ra_arcsec_per_h: ArrayLike,
    rate_dec_arcsec_per_h: ArrayLike,
) -> EphemerisOffsets:
    """Compute source minus ephemeris on the sky, also along and across the predicted motion.

    With east and north unit vectors at the ephemeris: the direction of the source there, scaled to the angular
    distance; along = offset . t, cross = offset . (-t_north, t_east) in (east, north), t the unit motion.

    Parameters
    ----------
    source_ra_deg, source_dec_deg, ephemeris_ra_deg, ephemeris_dec_deg : (n,) degrees
    rate_ra_arcsec_per_h, rate_dec_arcsec_per_h : (n,), the first with cos(dec) applied

    Returns
    -------
    EphemerisOffsets
        along_track^2 + cross_track^2 = offset_ra^2 + offset_dec^2 = offset^2.
    """
    source = _unit_vectors(np.asarray(source_ra_deg, dtype=np.float64), np.asarray(source_dec_deg, dtype=np.float64))
    object_ra = np.asarray(ephemeris_ra_deg, dtype=np.float64)
    object_dec = np.asarray(ephemeris_dec_deg, dtype=np.float64)
    separation = source - _unit_vectors(object_ra, object_dec)
    offset = 2.0 * np.arcsin(np.minimum(1.0, 0.5 * np.linalg.norm(separation, axis=1))) * ARCSEC_PER_RADIAN
    east, north = _tangent_vectors(object_ra, object_dec)
    toward_east = np.einsum("ij,ij->i", separation, east)
    toward_north = np.einsum("ij,ij->i", separation, north)
    length = np.hypot(toward_east, toward_north)
    scale = np.divide(offset, length, out=np.zeros_like(offset), where=length > 0.0)
    offset_ra = np.where(np.isnan(offset), np.nan, toward_east * scale)
    offset_dec = np.where(np.isnan(offset), np.nan, toward_north * scale)
    rate_ra = np.asarray(rate_ra_arcsec_per_h, dtype=np.float64)
    rate_dec = np.asarray(rate_dec_arcsec_per_h, dtype=np.float64)
    rate = np.hypot(rate_ra, rate_dec)
    moving = rate > 0.0
    track_ra = np.divide(rate_ra, rate, out=np.full_like(rate, np.nan), where=moving)
    track_dec = np.divide(rate_dec, rate, out=np.full_like(rate, np.nan), where=moving)
    return EphemerisOffsets(
        offset,
        offset_ra,
        offset_dec,
        offset_ra * track_ra + offset_dec * track_dec,
        offset_dec * track_ra - offset_ra * track_dec,
    )


def _unit_vectors(ra_deg: NDArray[np.float64], dec_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


def _angles(vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Longitude in [0, 360) and latitude in degrees; exact near the poles, where arcsin is not."""
    longitude = np.degrees(np.arctan2(vectors[:, 1], vectors[:, 0])) % 360.0
    longitude = np.where(longitude == 360.0, 0.0, longitude)  # what a tiny negative angle rounds to
    latitude = np.degrees(np.arctan2(vectors[:, 2], np.hypot(vectors[:, 0], vectors[:, 1])))
    return longitude, latitude


def _tangent_vectors(
    ra_deg: NDArray[np.float64], dec_deg: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors towards east and north at each position."""
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    east = np.stack([-np.sin(ra), np.cos(ra), np.zeros_like(ra)], axis=-1)
    north = np.stack([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)], axis=-1)
    return east, north


def _lagrange(times: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lagrange weights for value and slope at time 0 of (m, k) distinct row times."""
    n_rows = times.shape[1]
    values, slopes = np.ones_like(times), np.zeros_like(times)
    for row in range(n_rows):
        others = [other for other in range(n_rows) if other != row]
        for other in others:
            gap = times[:, row] - times[:, other]
            values[:, row] *= -times[:, other] / gap
            term = 1.0 / gap
            for third in others:
                if third != other:
                    term = term * -times[:, third] / (times[:, row] - times[:, third])
            slopes[:, row] += term
    return values, slopes


def _finite_vectors(name: str, ra_deg: ArrayLike, dec_deg: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Unit vectors of the rows with a position, and their row numbers."""
    ra, dec = np.asarray(ra_deg, dtype=np.float64), np.asarray(dec_deg, dtype=np.float64)
    if ra.ndim != 1 or ra.shape != dec.shape:
        raise ValueError(f"{name} columns must be one-dimensional and of one length, got {ra.shape} and {dec.shape}")
    rows = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec)).astype(np.int64)
    return _unit_vectors(ra[rows], dec[rows]), rows


def _greedy(first: list[int], second: list[int]) -> NDArray[np.int64]:
    """Numbers of the pairs taken when each member may be used once and pairs come in order of preference."""
    used_first: set[int] = set()
    used_second: set[int] = set()
    taken = []
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        if a not in used_first and b not in used_second:
            used_first.add(a)
            used_second.add(b)
            taken.append(number)
    return np.array(taken, dtype=np.int64)


def _ecliptic_rotation() -> NDArray[np.float64]:
    """Rotation about the equinox, so that the x axis stays and the pole tips by the obliquity."""
    angle = OBLIQUITY_J2000_ARCSEC / ARCSEC_PER_RADIAN
    return np.array(
        [[1.0, 0.0, 0.0], [0.0, math.cos(angle), math.sin(angle)], [0.0, -math.sin(angle), math.cos(angle)]]
    )


def _galactic_rotation() -> NDArray[np.float64]:
    """Rows are the Galactic axes in the ICRS: the node, turned in the plane by its longitude, and the pole."""
    pole_ra, pole_dec = np.array([GALACTIC_POLE_RA_DEG]), np.array([GALACTIC_POLE_DEC_DEG])
    pole = _unit_vectors(pole_ra, pole_dec)[0]
    node = _tangent_vectors(pole_ra, pole_dec)[0][0]
    beside = np.cross(pole, node)
    angle = math.radians(GALACTIC_NODE_LON_DEG)
    return np.stack(
        [math.cos(angle) * node - math.sin(angle) * beside, math.sin(angle) * node + math.cos(angle) * beside, pole]
    )


_ECLIPTIC_ROTATION = _ecliptic_rotation()
_GALACTIC_ROTATION = _galactic_rotation()

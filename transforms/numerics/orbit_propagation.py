"""Orbits to places on the sky: osculating elements, perturbed and two-body motion, observer, light time, brightness.

Orbits are heliocentric states in au and au per day on the axes of the ICRS, each with a time of its own in MJD TDB
(TT will do: they differ by less than 2 ms, in which an asteroid moves 60 m). Elements are those of the Minor Planet
Center and JPL: ecliptic and equinox of J2000.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import erfa
import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

GAUSSIAN_CONSTANT = 0.01720209895  # au^1.5 / d, defines the Sun's pull in all published elements
GM_SUN = GAUSSIAN_CONSTANT**2
AU_KM = 149_597_870.7
DAY_S = 86_400.0
LIGHT_AU_PER_D = 299_792.458 * DAY_S / AU_KM
TT_MINUS_TAI_D = 32.184 / DAY_S
EARTH_RADIUS_AU = 6378.137 / AU_KM  # the unit of the MPC's parallax constants
EARTH_TURN_PER_UT1_D = 2.0 * math.pi * 1.00273781191135448  # IAU 2000, rad
OBLIQUITY_J2000_RAD = math.radians(84381.448 / 3600.0)  # IAU 1976, that of published elements
DEFAULT_SLOPE_G = 0.15
# Sun over planet, Mercury to Neptune (the Earth with the Moon): IAU 2009 system of constants.
_MASS_RATIOS = (6023600.0, 408523.71, 328900.5596, 3098708.0, 1047.348644, 3497.9018, 22902.98, 19412.26)
_GM_PLANETS = GM_SUN / np.array(_MASS_RATIOS)
_MJD_ZERO_JD = 2400000.5
_SERIES_TERMS = 10
_ITERATIONS_MAX = 100
_LIGHT_TIME_ITERATIONS = 3  # each leaves v / c, at most 1e-3, of the last error
_PLANET_STEP_D = 1.0
# A step is a part of the time of free fall to the Sun, and so many days per au to the nearest planet, which then comes
# nearer by at most some percent. Measured over 300 days: 5e-8 au in the main belt, 2e-8 au near the Earth (medians).
_STEP_PER_FALL_TIME, _STEP_PER_PLANET_AU, _STEP_MIN_D, _STEP_MAX_D = 1.0 / 60.0, 3.0, 1e-3, 8.0

# What `motion_reach` bounds pulls with: how near the Sun an object may come, the Earth ever comes; au / d of the Sun.
_NEAR_SUN_AU, _EARTH_NEAREST_AU, _SUN_SPEED_MAX = 0.3, 0.98, 1e-5

FloatArray = NDArray[np.float64]


class Orbits(NamedTuple):
    """n osculating heliocentric states.

    Attributes
    ----------
    mjd_tdb : (n,) times of the states
    position : (n, 3) au, ICRS axes
    velocity : (n, 3) au / d
    """

    mjd_tdb: FloatArray
    position: FloatArray
    velocity: FloatArray


class Observer(NamedTuple):
    """Where an observer is at a time.

    Attributes
    ----------
    mjd_tdb : the time
    position, velocity : (3,) from the Sun, au and au / d, ICRS axes
    sun_velocity : (3,) of the Sun about the barycentre of the solar system, au / d
    """

    mjd_tdb: float
    position: FloatArray
    velocity: FloatArray
    sun_velocity: FloatArray


class PredictedPositions(NamedTuple):
    """What an observer sees of n objects; arrays of shape (n,) unless said otherwise.

    Attributes
    ----------
    ra_deg, dec_deg : astrometric place, ICRS; ra in [0, 360)
    rate_ra_deg_per_d, rate_dec_deg_per_d : its motion, the first with cos(dec) applied
    elongation_deg, phase_angle_deg : angle Sun - observer - object, and Sun - object - observer
    topo_range_au, helio_range_au : distances from the observer and the Sun when the light left
    topo_range_rate_km_s, helio_range_rate_km_s : their rates, positive receding
    helio_position, topo_position : (n, 3) au, when the light left
    helio_velocity, topo_velocity : (n, 3) km / s: of the object when the light left, from the Sun and from the
        observer when it arrived
    """

    ra_deg: FloatArray
    dec_deg: FloatArray
    rate_ra_deg_per_d: FloatArray
    rate_dec_deg_per_d: FloatArray
    elongation_deg: FloatArray
    phase_angle_deg: FloatArray
    topo_range_au: FloatArray
    topo_range_rate_km_s: FloatArray
    helio_range_au: FloatArray
    helio_range_rate_km_s: FloatArray
    helio_position: FloatArray
    helio_velocity: FloatArray
    topo_position: FloatArray
    topo_velocity: FloatArray


# --- orbits ----------------------------------------------------------------------------------------------------


def perihelion_of_mean_anomaly(
    semi_major_au: ArrayLike, eccentricity: ArrayLike, mean_anomaly_deg: ArrayLike, epoch_mjd: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Perihelion distance and time of elements given by semi-major axis and mean anomaly.

    Parameters
    ----------
    semi_major_au : (n,) > 0 for ellipses, < 0 for hyperbolas
    eccentricity : (n,) not 1
    mean_anomaly_deg : (n,) degrees; of an ellipse any turn
    epoch_mjd : (n,) when the mean anomaly holds

    Returns
    -------
    perihelion_au, perihelion_mjd : (n,); of an ellipse the passage nearest to the epoch
    """
    a, e = np.asarray(semi_major_au, np.float64), np.asarray(eccentricity, np.float64)
    anomaly, epoch = np.asarray(mean_anomaly_deg, np.float64), np.asarray(epoch_mjd, np.float64)
    nearest = np.where(a > 0.0, (anomaly + 180.0) % 360.0 - 180.0, anomaly)
    mean_motion = GAUSSIAN_CONSTANT / np.abs(a) ** 1.5
    return a * (1.0 - e), epoch - np.radians(nearest) / mean_motion


def mean_anomaly_of_perihelion(
    perihelion_au: ArrayLike, eccentricity: ArrayLike, perihelion_mjd: ArrayLike, epoch_mjd: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Semi-major axis and mean anomaly of elements given by perihelion distance and time.

    Returns
    -------
    semi_major_au : (n,), < 0 for hyperbolas, NaN for parabolas
    mean_anomaly_deg : (n,) degrees; of an ellipse in [0, 360), NaN for parabolas
    """
    q, e = np.asarray(perihelion_au, np.float64), np.asarray(eccentricity, np.float64)
    a = np.divide(q, 1.0 - e, out=np.full_like(q, np.nan), where=e != 1.0)
    since = np.asarray(epoch_mjd, np.float64) - np.asarray(perihelion_mjd, np.float64)
    anomaly = mean_motion_deg_per_d(a) * since
    return a, np.where(a > 0.0, anomaly % 360.0, anomaly)


def mean_motion_deg_per_d(semi_major_au: ArrayLike) -> FloatArray:
    """(n,) mean motion, sqrt(GM / |a|^3) in degrees a day."""
    return np.degrees(GAUSSIAN_CONSTANT / np.abs(np.asarray(semi_major_au, np.float64)) ** 1.5)


def orbits_from_elements(
    perihelion_au: ArrayLike,
    eccentricity: ArrayLike,
    inclination_deg: ArrayLike,
    node_deg: ArrayLike,
    argument_deg: ArrayLike,
    perihelion_mjd: ArrayLike,
    epoch_mjd: ArrayLike,
) -> Orbits:
    """States of osculating elements at their epoch.

    The state at perihelion is q P and sqrt(GM (1 + e) / q) Q with the unit vectors P towards perihelion and Q along
    the motion there; two-body motion takes it to the epoch, the same way for every eccentricity.

    Parameters
    ----------
    perihelion_au : (n,) > 0
    eccentricity : (n,) >= 0; 1 is a parabola
    inclination_deg, node_deg, argument_deg : (n,) on the ecliptic and equinox of J2000
    perihelion_mjd, epoch_mjd : (n,) MJD TDB or TT

    Raises
    ------
    ValueError
        Columns of different lengths, or a value that is not finite or outside its interval.
    """
    columns = [
        np.atleast_1d(np.asarray(column, np.float64))
        for column in (
            perihelion_au,
            eccentricity,
            inclination_deg,
            node_deg,
            argument_deg,
            perihelion_mjd,
            epoch_mjd,
        )
    ]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
        raise ValueError(f"elements must be of one length, got {', '.join(str(column.shape) for column in columns)}")
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("elements must be finite")
    q, e, inclination, node, argument, perihelion, epoch = columns
    if (q <= 0.0).any() or (e < 0.0).any():
        raise ValueError(f"need perihelion_au > 0 and eccentricity >= 0, got {q.min()} and {e.min()} at the least")
    inclination, node, argument = np.radians(inclination), np.radians(node), np.radians(argument)
    towards, along = _orbit_axes(inclination, node, argument)
    speed = np.sqrt(GM_SUN * (1.0 + e) / q)
    at_perihelion = Orbits(perihelion, q[:, None] * towards, speed[:, None] * along)
    return propagate_two_body(at_perihelion, epoch)


def propagate_two_body(orbits: Orbits, to_mjd_tdb: ArrayLike) -> Orbits:
    """States after unperturbed motion about the Sun.

    Kepler's equation in universal variables, sqrt(GM) dt = r0 x c1 + s0 x^2 c2 + x^3 c3 with Stumpff functions
    c_k(x^2 / a), solved by Laguerre's method inside a bracket: the same for ellipses, parabolas and hyperbolas.

    Parameters
    ----------
    orbits : Orbits
    to_mjd_tdb : number or (n,)

    Returns
    -------
    Orbits
        At `to_mjd_tdb`; energy and angular momentum kept to rounding.

    Notes
    -----
    Against numerical integration: 2e-9 au over two years, for e from 0 to 6 (tests). A hyperbola that comes and goes in
    one call loses the digits of exp(F1 - F0), the rise of its anomaly. 0.2 us an object.

    Two-body motion leaves a main-belt orbit by 0.4 arcsec after 30 days, 4 after 100, 40 after 300 (medians).
    """
    to = np.broadcast_to(np.asarray(to_mjd_tdb, np.float64), orbits.mjd_tdb.shape).copy()
    position, velocity = np.empty_like(orbits.position), np.empty_like(orbits.velocity)
    _propagate_two_body(orbits.mjd_tdb, orbits.position, orbits.velocity, to, position, velocity)
    return Orbits(to, position, velocity)


def propagate_perturbed(orbits: Orbits, to_mjd_tdb: float) -> Orbits:
    """States after motion about the Sun, pulled by the eight planets.

    Two-body arcs with the planets' pulls on object and Sun, GM_p (d / |d|^3 - r_p / |r_p|^3), as kicks at their
    ends (Wisdom & Holman 1991): the error of a step is that of the perturbation alone. Planets from ERFA's plan94.

    Parameters
    ----------
    orbits : Orbits
    to_mjd_tdb : the same time for all, finite

    Notes
    -----
    Not in it: the Moon apart from the Earth, large asteroids, relativity, radiation, outgassing. Against JPL's
    Horizons 0.009 arcsec at most after 10 to 30 days; against detections of ZTF 0.06 arcsec (theirs) up to 900 days
    from the epoch. 0.09 us an object and day in the main belt.

    References
    ----------
    Wisdom & Holman 1991, AJ 102, 1528; Simon et al. 1994, A&A 282, 663.
    """
    if orbits.mjd_tdb.size == 0:
        return orbits
    first = min(float(orbits.mjd_tdb.min()), to_mjd_tdb) - _PLANET_STEP_D
    last = max(float(orbits.mjd_tdb.max()), to_mjd_tdb) + _PLANET_STEP_D
    # Whole days, so that what an object meets doesn't depend on the others.
    table_start = math.floor(first)
    table = planet_table(table_start, math.ceil(last) - table_start + 1)
    position, velocity = orbits.position.copy(), orbits.velocity.copy()
    _propagate_perturbed(orbits.mjd_tdb, position, velocity, to_mjd_tdb, table, float(table_start), _GM_PLANETS)
    return Orbits(np.full(orbits.mjd_tdb.shape, to_mjd_tdb), position, velocity)


def planet_table(first_mjd: int, n_days: int) -> FloatArray:
    """(n_days, 8, 2, 3) heliocentric positions (au) and velocities (au / d) of the planets, a row a day."""
    days = first_mjd + np.arange(n_days, dtype=np.float64)
    state, _ = erfa.ufunc.plan94(_MJD_ZERO_JD, days[:, None], np.arange(1, 9)[None, :])
    return np.stack([state["p"], state["v"]], axis=2)


# --- observer --------------------------------------------------------------------------------------------------


def tdb_of_tai(mjd_tai: float) -> float:
    """MJD TDB (to 2 ms: TT) of an MJD TAI."""
    return mjd_tai + TT_MINUS_TAI_D


def observer_at(mjd_tai: float, longitude_deg: float, rho_cos_phi: float, rho_sin_phi: float) -> Observer:
    """An observatory's place and motion at a time.

    The Earth from ERFA's epv00, the observatory turned with it: Earth rotation angle, precession and nutation of
    IAU 2006/2000A; without polar motion, and with UTC for UT1, so that no table is needed and bytes repeat.

    Parameters
    ----------
    mjd_tai : MJD TAI
    longitude_deg : degrees east
    rho_cos_phi, rho_sin_phi : the Minor Planet Center's parallax constants, in Earth radii; 0, 0 is the geocentre

    Notes
    -----
    The Earth is right to 11 km (4 km rms; 1900-2100), the observatory on it to 0.43 km (0.9 s of UT1 - UTC): 0.015
    arcsec and 0.0006 arcsec at 1 au, inversely with distance.
    """
    tdb = tdb_of_tai(mjd_tai)
    helio, bary, _ = erfa.ufunc.epv00(_MJD_ZERO_JD, tdb)
    utc = erfa.ufunc.taiutc(_MJD_ZERO_JD, mjd_tai)[:2]
    angle = float(erfa.ufunc.era00(*utc)) + math.radians(longitude_deg)
    site = EARTH_RADIUS_AU * np.array([rho_cos_phi * math.cos(angle), rho_cos_phi * math.sin(angle), rho_sin_phi])
    spin = EARTH_TURN_PER_UT1_D * np.array([-site[1], site[0], 0.0])
    to_celestial = erfa.ufunc.c2i06a(_MJD_ZERO_JD, tdb).T
    return Observer(
        tdb,
        helio["p"] + np.einsum("ij,j->i", to_celestial, site),
        helio["v"] + np.einsum("ij,j->i", to_celestial, spin),
        bary["v"] - helio["v"],
    )


# --- what the observer sees ------------------------------------------------------------------------------------


def rough_directions(orbits: Orbits, observer: Observer) -> FloatArray:
    """(n, 3) unit vectors to the objects, light time taken along a straight line.

    For a first choice among many objects: unperturbed, and off by GM tau^2 / 2 r^2 over the distance: below 0.01
    arcsec beyond 0.5 au from the Sun, an arcminute at 0.005 au.
    """
    towards = _rough_towards(propagate_two_body(orbits, observer.mjd_tdb), observer)
    return towards / _length(towards)[:, None]


def _rough_towards(now: Orbits, observer: Observer) -> FloatArray:
    towards = now.position - observer.position
    light_time = _length(towards) / LIGHT_AU_PER_D
    towards -= light_time[:, None] * (now.velocity + observer.sun_velocity)
    return towards


def motion_reach(orbits: Orbits, geocentre: Observer, span_d: float) -> tuple[FloatArray, FloatArray]:
    """Where objects are at a time, and how far from there they can be seen a while before or after.

    Within the span s an object and the Earth move against each other by at most
    d = s |v| + s^2 / 2 (GM / r_min^2 + GM / r_earth^2) plus an Earth radius, which is asin(d / distance) on the sky.
    Here r_min = r - s |v| - 0.001 au is the least distance from the Sun that the object can get to.

    Parameters
    ----------
    orbits : Orbits
        States near the time: motion from there is unperturbed.
    geocentre : Observer
    span_d : days, above 0, at most 1

    Returns
    -------
    directions : (n, 3) unit vectors, as `rough_directions`
    reach_rad : (n,) angle from there to any `rough_directions` of an observer on the Earth within the span; pi for
        objects that can come within 0.3 au of the Sun or pass the Earth
    """
    now = propagate_two_body(orbits, geocentre.mjd_tdb)
    towards = _rough_towards(now, geocentre)
    distance, speed = _length(towards), _length(now.velocity)
    nearest_sun = _length(now.position) - span_d * speed - 0.001
    pull = GM_SUN / np.maximum(nearest_sun, _NEAR_SUN_AU) ** 2
    way = span_d * _length(now.velocity - geocentre.velocity) + EARTH_RADIUS_AU
    way += 0.5 * span_d**2 * (pull + GM_SUN / _EARTH_NEAREST_AU**2)
    # What light time does: it is another by way / c, and the velocity it is taken with by the pull.
    way += (way * (speed + _SUN_SPEED_MAX) + (distance + way) * span_d * pull) / LIGHT_AU_PER_D
    ratio = np.where(nearest_sun < _NEAR_SUN_AU, 2.0, way / distance)
    reach = np.where(ratio < 1.0, np.arcsin(np.minimum(ratio, 1.0)), math.pi)
    return towards / distance[:, None], reach


def predict_positions(orbits: Orbits, observer: Observer) -> PredictedPositions:
    """Where an observer sees objects, how they move, and how far they are.

    The light that arrives at t left at t - tau, c tau = |x(t - tau) - o(t)| with object x and observer o about the
    barycentre of the solar system. The astrometric place is the direction of that difference: no aberration and no
    deflection of light, as in catalogues of stars. Its rates are exact derivatives, d tau / dt in them; rates of
    distances are velocities along the line of sight, as JPL's are (the derivative is smaller by v / c).

    Parameters
    ----------
    orbits : Orbits
        States near the time: motion from there is unperturbed.
    observer : Observer

    Returns
    -------
    PredictedPositions
    """
    n = orbits.mjd_tdb.size
    helio, helio_velocity, topo = np.empty((n, 3)), np.empty((n, 3)), np.empty((n, 3))
    _with_light_time(*orbits, observer.mjd_tdb, observer.position, observer.sun_velocity, helio, helio_velocity, topo)
    direction = topo / _length(topo)[:, None]
    # d topo / dt = x' (1 - tau') - o', and its component towards the object is c tau'.
    relative = helio_velocity - observer.velocity
    delay = _dot(direction, relative) / (LIGHT_AU_PER_D + _dot(direction, helio_velocity))
    return _seen(topo, relative, relative - delay[:, None] * helio_velocity, helio, helio_velocity, observer)


def positions_from_ranges(
    ra_deg: ArrayLike,
    dec_deg: ArrayLike,
    rate_ra_deg_per_d: ArrayLike,
    rate_dec_deg_per_d: ArrayLike,
    topo_range_au: ArrayLike,
    topo_range_rate_au_per_d: ArrayLike,
    observer: Observer,
) -> PredictedPositions:
    """Complete an ephemeris of places and distances by what follows from them.

    Parameters
    ----------
    ra_deg, dec_deg, rate_ra_deg_per_d, rate_dec_deg_per_d : (n,), the first rate with cos(dec) applied
    topo_range_au, topo_range_rate_au_per_d : (n,); NaN where not known
    observer : Observer
        Whose ephemeris it is.

    Returns
    -------
    PredictedPositions
        What would need something unknown is NaN. Velocities are derivatives of apparent positions: smaller than
        those of `predict_positions` by v / c, some m / s.
    """
    ra, dec = np.radians(np.asarray(ra_deg, np.float64)), np.radians(np.asarray(dec_deg, np.float64))
    distance = np.asarray(topo_range_au, np.float64)[:, None]
    direction, east, north = _sky_axes(ra, dec)
    turn = (
        np.radians(np.asarray(rate_ra_deg_per_d, np.float64))[:, None] * east
        + np.radians(np.asarray(rate_dec_deg_per_d, np.float64))[:, None] * north
    )
    relative = distance * turn + np.asarray(topo_range_rate_au_per_d, np.float64)[:, None] * direction
    topo = distance * direction
    seen = _seen(topo, relative, relative, topo + observer.position, relative + observer.velocity, observer)
    # Places need no distance.
    return seen._replace(
        ra_deg=np.asarray(ra_deg, np.float64),
        dec_deg=np.asarray(dec_deg, np.float64),
        rate_ra_deg_per_d=np.asarray(rate_ra_deg_per_d, np.float64),
        rate_dec_deg_per_d=np.asarray(rate_dec_deg_per_d, np.float64),
        elongation_deg=_angle_deg(direction, np.broadcast_to(-observer.position, direction.shape)),
    )


def _seen(
    topo: FloatArray,
    relative: FloatArray,
    motion: FloatArray,
    helio: FloatArray,
    helio_velocity: FloatArray,
    observer: Observer,
) -> PredictedPositions:
    """What follows from positions in au and velocities in au / d; `motion` is the derivative of `topo`."""
    topo_range, helio_range = _length(topo), _length(helio)
    ra, dec = np.arctan2(topo[:, 1], topo[:, 0]), np.arctan2(topo[:, 2], np.hypot(topo[:, 0], topo[:, 1]))
    direction, east, north = _sky_axes(ra, dec)
    ra_deg = np.degrees(ra) % 360.0
    km_s = AU_KM / DAY_S
    return PredictedPositions(
        np.where(ra_deg == 360.0, 0.0, ra_deg),
        np.degrees(dec),
        np.degrees(_dot(motion, east) / topo_range),
        np.degrees(_dot(motion, north) / topo_range),
        _angle_deg(topo, np.broadcast_to(-observer.position, topo.shape)),
        _angle_deg(-topo, -helio),
        topo_range,
        _dot(direction, relative) * km_s,
        helio_range,
        _dot(helio, helio_velocity) / helio_range * km_s,
        helio,
        helio_velocity * km_s,
        topo,
        relative * km_s,
    )


def apparent_magnitude(
    absolute_h: ArrayLike,
    slope_g: ArrayLike,
    helio_range_au: ArrayLike,
    topo_range_au: ArrayLike,
    phase_angle_deg: ArrayLike,
) -> FloatArray:
    """Apparent magnitude of an asteroid in the two-parameter system of the IAU.

    H + 5 log10(r d) - 2.5 log10((1 - G) phi_1 + G phi_2), phi_i = exp(-A_i tan(alpha / 2)^B_i).

    Parameters
    ----------
    absolute_h, slope_g : (n,); NaN in G stands for 0.15, NaN in H gives NaN
    helio_range_au, topo_range_au : (n,) > 0
    phase_angle_deg : (n,) in [0, 180]; made for angles below 120

    References
    ----------
    Bowell et al. 1989, in Asteroids II, 524.
    """
    h, slope = np.asarray(absolute_h, np.float64), np.asarray(slope_g, np.float64)
    slope = np.where(np.isnan(slope), DEFAULT_SLOPE_G, slope)
    tangent = np.tan(0.5 * np.radians(np.asarray(phase_angle_deg, np.float64)))
    lit = (1.0 - slope) * np.exp(-3.33 * tangent**0.63) + slope * np.exp(-1.87 * tangent**1.22)
    # A slope far out of the usual can make the light negative: then nothing is known.
    lit = np.where(lit > 0.0, lit, np.nan)
    distance = np.asarray(helio_range_au, np.float64) * np.asarray(topo_range_au, np.float64)
    return h + 5.0 * np.log10(distance) - 2.5 * np.log10(lit)


# --- vectors ---------------------------------------------------------------------------------------------------


def _orbit_axes(inclination: FloatArray, node: FloatArray, argument: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Unit vectors towards perihelion and along the motion there, ICRS axes."""
    cos_i, sin_i = np.cos(inclination), np.sin(inclination)
    cos_n, sin_n = np.cos(node), np.sin(node)
    cos_w, sin_w = np.cos(argument), np.sin(argument)
    towards = (cos_n * cos_w - sin_n * sin_w * cos_i, sin_n * cos_w + cos_n * sin_w * cos_i, sin_w * sin_i)
    along = (-cos_n * sin_w - sin_n * cos_w * cos_i, -sin_n * sin_w + cos_n * cos_w * cos_i, cos_w * sin_i)
    return _equatorial(*towards), _equatorial(*along)


def _equatorial(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
    """Ecliptic components to (n, 3) on the axes of the equator."""
    cosine, sine = math.cos(OBLIQUITY_J2000_RAD), math.sin(OBLIQUITY_J2000_RAD)
    return np.stack([x, cosine * y - sine * z, sine * y + cosine * z], axis=1)


def _sky_axes(ra: FloatArray, dec: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(n, 3) unit vectors towards places on the sky, and towards east and north there."""
    cos_ra, sin_ra, cos_dec, sin_dec = np.cos(ra), np.sin(ra), np.cos(dec), np.sin(dec)
    direction = np.stack([cos_dec * cos_ra, cos_dec * sin_ra, sin_dec], axis=1)
    east = np.stack([-sin_ra, cos_ra, np.zeros_like(ra)], axis=1)
    north = np.stack([-sin_dec * cos_ra, -sin_dec * sin_ra, cos_dec], axis=1)
    return direction, east, north


def _dot(first: FloatArray, second: FloatArray) -> FloatArray:
    return np.einsum("ij,ij->i", first, second)


def _length(vectors: FloatArray) -> FloatArray:
    return np.sqrt(_dot(vectors, vectors))


def _angle_deg(first: FloatArray, second: FloatArray) -> FloatArray:
    """Angles between vectors, exact near 0 and 180 degrees too."""
    return np.degrees(np.arctan2(_length(np.cross(first, second)), _dot(first, second)))


# --- kernels ---------------------------------------------------------------------------------------------------


@njit(cache=True)
def _stumpff(z: float) -> tuple[float, float, float, float]:
    """c_k(z) = sum (-z)^j / (2 j + k)! for k = 0 to 3."""
    if abs(z) < 1.0:
        c2, c3 = 0.0, 0.0
        term2, term3 = 0.5, 1.0 / 6.0
        for j in range(_SERIES_TERMS):
            c2 += term2
            c3 += term3
            term2 *= -z / ((2 * j + 3) * (2 * j + 4))
            term3 *= -z / ((2 * j + 4) * (2 * j + 5))
        return 1.0 - z * c2, 1.0 - z * c3, c2, c3
    root = math.sqrt(abs(z))
    c0, c1 = (math.cos(root), math.sin(root) / root) if z > 0.0 else (math.cosh(root), math.sinh(root) / root)
    return c0, c1, (1.0 - c0) / z, (1.0 - c1) / z


@njit(cache=True)
def _time_at(x: float, r0: float, sigma: float, inverse_a: float) -> float:
    """Kepler's equation: sqrt(GM) times the time since the start at the universal anomaly x."""
    _, c1, c2, c3 = _stumpff(inverse_a * x * x)
    return r0 * x * c1 + sigma * x * x * c2 + x * x * x * c3


@njit(cache=True)
def _kepler(position: np.ndarray, velocity: np.ndarray, dt: float) -> None:
    """Move one state by two-body motion, in place."""
    if dt == 0.0:
        return
    r0 = math.sqrt(position[0] ** 2 + position[1] ** 2 + position[2] ** 2)
    # Inverse semi-major axis and sigma = r . v / sqrt(GM); backwards in time is forwards with sigma reversed.
    inverse_a = 2.0 / r0 - (velocity[0] ** 2 + velocity[1] ** 2 + velocity[2] ** 2) / GM_SUN
    sigma = (position[0] * velocity[0] + position[1] * velocity[1] + position[2] * velocity[2]) / GAUSSIAN_CONSTANT
    if inverse_a > 0.0:
        period = 2.0 * math.pi / (GAUSSIAN_CONSTANT * inverse_a**1.5)
        if abs(dt) > 0.5 * period:
            dt -= period * round(dt / period)
    sign = 1.0 if dt >= 0.0 else -1.0
    sigma *= sign
    target = GAUSSIAN_CONSTANT * abs(dt)
    low, x = 0.0, target / r0
    if inverse_a > 0.0:
        high = 2.0 * math.pi / math.sqrt(inverse_a)
        x = min(x, 0.5 * high)
    else:
        if inverse_a < 0.0:
            x = min(x, 1.0 / math.sqrt(-inverse_a))
        high = x
        while _time_at(high, r0, sigma, inverse_a) < target:
            low, high = high, 2.0 * high
        x = max(x, low)
    c1, c2, r = 1.0, 0.5, r0
    for _ in range(_ITERATIONS_MAX):
        c0, c1, c2, c3 = _stumpff(inverse_a * x * x)
        time = r0 * x * c1 + sigma * x * x * c2 + x * x * x * c3
        r = r0 * c0 + sigma * x * c1 + x * x * c2
        excess = time - target
        if excess > 0.0:
            high = x
        else:
            low = x
        slope = sigma * c0 + (1.0 - inverse_a * r0) * x * c1
        root = math.sqrt(abs(16.0 * r * r - 20.0 * excess * slope))
        following = x - 5.0 * excess / (r + root)
        if not low <= following <= high:
            following = 0.5 * (low + high)
        if abs(following - x) <= 4e-16 * x:
            break
        x = following
    f = 1.0 - x * x * c2 / r0
    g = sign * (r0 * x * c1 + sigma * x * x * c2) / GAUSSIAN_CONSTANT
    f_rate = -sign * GAUSSIAN_CONSTANT * x * c1 / (r * r0)
    g_rate = 1.0 - x * x * c2 / r
    for k in range(3):
        start, speed = position[k], velocity[k]
        position[k] = f * start + g * speed
        velocity[k] = f_rate * start + g_rate * speed


@njit(cache=True)
def _propagate_two_body(
    epoch: np.ndarray,
    position: np.ndarray,
    velocity: np.ndarray,
    to: np.ndarray,
    out_position: np.ndarray,
    out_velocity: np.ndarray,
) -> None:
    out_position[:], out_velocity[:] = position, velocity
    for i in range(epoch.size):
        _kepler(out_position[i], out_velocity[i], to[i] - epoch[i])


@njit(cache=True)
def _with_light_time(
    epoch: np.ndarray,
    position: np.ndarray,
    velocity: np.ndarray,
    mjd: float,
    observer: np.ndarray,
    sun_velocity: np.ndarray,
    out_position: np.ndarray,
    out_velocity: np.ndarray,
    out_topo: np.ndarray,
) -> None:
    """States when the light left, and the vector from the observer then to now."""
    for i in range(epoch.size):
        light_time = 0.0
        for _ in range(_LIGHT_TIME_ITERATIONS + 1):
            out_position[i], out_velocity[i] = position[i], velocity[i]
            _kepler(out_position[i], out_velocity[i], mjd - light_time - epoch[i])
            # The Sun itself moves while the light travels.
            out_topo[i] = out_position[i] - light_time * sun_velocity - observer
            light_time = math.sqrt(out_topo[i, 0] ** 2 + out_topo[i, 1] ** 2 + out_topo[i, 2] ** 2) / LIGHT_AU_PER_D


@njit(cache=True)
def _planets_at(mjd: float, table: np.ndarray, table_start: float, planets: np.ndarray) -> None:
    """Positions of the planets between the rows of a table, cubic in position and velocity."""
    row = math.floor(mjd - table_start)
    u = mjd - table_start - row
    for p in range(planets.shape[0]):
        for k in range(3):
            start, end = table[row, p, 0, k], table[row + 1, p, 0, k]
            start_rate, end_rate = table[row, p, 1, k], table[row + 1, p, 1, k]
            rise = end - start
            planets[p, k] = start + u * (
                start_rate + u * (3.0 * rise - 2.0 * start_rate - end_rate + u * (start_rate + end_rate - 2.0 * rise))
            )


@njit(cache=True)
def _pull(position: np.ndarray, planets: np.ndarray, gm: np.ndarray, pull: np.ndarray) -> float:
    """The planets' pull on object less that on the Sun; returns the distance of the nearest planet."""
    nearest = math.inf
    pull[:] = 0.0
    for p in range(gm.size):
        d0 = planets[p, 0] - position[0]
        d1 = planets[p, 1] - position[1]
        d2 = planets[p, 2] - position[2]
        distance = math.sqrt(d0 * d0 + d1 * d1 + d2 * d2)
        nearest = min(nearest, distance)
        from_sun = math.sqrt(planets[p, 0] ** 2 + planets[p, 1] ** 2 + planets[p, 2] ** 2)
        direct, indirect = gm[p] / distance**3, gm[p] / from_sun**3
        pull[0] += direct * d0 - indirect * planets[p, 0]
        pull[1] += direct * d1 - indirect * planets[p, 1]
        pull[2] += direct * d2 - indirect * planets[p, 2]
    return nearest


@njit(cache=True)
def _propagate_perturbed(
    epoch: np.ndarray,
    position: np.ndarray,
    velocity: np.ndarray,
    to: float,
    table: np.ndarray,
    table_start: float,
    gm: np.ndarray,
) -> None:
    planets, pull = np.empty((gm.size, 3)), np.empty(3)
    for i in range(epoch.size):
        now = epoch[i]
        if now == to:
            continue
        _planets_at(now, table, table_start, planets)
        nearest = _pull(position[i], planets, gm, pull)
        while now != to:
            from_sun = math.sqrt(position[i, 0] ** 2 + position[i, 1] ** 2 + position[i, 2] ** 2)
            fall_time = from_sun**1.5 / GAUSSIAN_CONSTANT
            step = min(fall_time * _STEP_PER_FALL_TIME, nearest * _STEP_PER_PLANET_AU, _STEP_MAX_D)
            step = max(step, _STEP_MIN_D)
            following = to if abs(to - now) <= step else now + math.copysign(step, to - now)
            dt = following - now
            velocity[i] += 0.5 * dt * pull
            _kepler(position[i], velocity[i], dt)
            _planets_at(following, table, table_start, planets)
            nearest = _pull(position[i], planets, gm, pull)
            velocity[i] += 0.5 * dt * pull
            now = following

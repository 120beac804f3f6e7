"""A simulated sky: where things are, how bright they are, how they move and change.

A sky is drawn once from a seed: stars, galaxies, transients, variables. Movers are drawn per night. Every
random stream is keyed by (seed, purpose, key...), so an image depends on its own key only, and source
positions never depend on how much noise was drawn before. `image_rendering` turns a sky into images.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

PIXEL_SCALE_ARCSEC = 0.2
ARCSEC_PER_RADIAN = 180.0 * 3600.0 / np.pi
READ_NOISE_E = 6.0

# Electrons per second of an AB magnitude-0 source are 10^(0.4 zero point); dark sky in mag/arcsec^2.
# Rounded values for an 8.4 m telescope with the LSST bands.
ZERO_POINT_MAG = {"u": 26.5, "g": 28.5, "r": 28.4, "i": 28.2, "z": 27.8, "y": 26.8}
SKY_MAG_ARCSEC2 = {"u": 23.0, "g": 22.3, "r": 21.2, "i": 20.5, "z": 19.6, "y": 18.6}
# Magnitude in a band = r + coefficient * (g - r): a one-parameter colour sequence, enough to make bands differ.
COLOUR_COEFFICIENT = {"u": 2.6, "g": 1.0, "r": 0.0, "i": -0.5, "z": -0.7, "y": -0.8}
NJY_ZERO_POINT_MAG = 31.4

MOFFAT_BETA = 3.5
ALPHA_PER_FWHM = 0.5 / np.sqrt(2.0 ** (1.0 / MOFFAT_BETA) - 1.0)


class SimulationError(ValueError):
    """A request for a sky or an image that cannot be simulated; the message says which value is wrong."""


class Purpose(IntEnum):
    """What a random stream is for. Streams of different purposes are independent."""

    SKY = 1
    MOVERS = 2
    TRAIL = 3
    CONDITIONS = 4
    PSF = 5
    SCIENCE_NOISE = 6
    TEMPLATE_NOISE = 7
    COSMIC_RAYS = 8
    BAD_COLUMNS = 9
    POINTING = 10
    INJECTIONS = 11
    ASTROMETRY = 12
    TRAINING = 13


def random_stream(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """The random stream of one purpose and key; the same arguments give the same numbers.

    Parameters
    ----------
    seed : int
        Seed of the whole simulation, >= 0.
    purpose : Purpose
        What the numbers are for.
    *key : int
        Non-negative integers such as visit and detector.

    Raises
    ------
    SimulationError
        A negative number among seed and key.
    """
    entropy = (seed, int(purpose), *key)
    if min(entropy) < 0:
        raise SimulationError(f"seed and key must not be negative, got {entropy}")
    return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(entropy)))


# --- where things are ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TanProjection:
    """Gnomonic projection of a detector; pixel (0, 0) is the centre of the first pixel.

    Attributes
    ----------
    ra_deg, dec_deg : tangent point
    x_pix, y_pix : where the tangent point falls, 0-based (may lie off the detector)
    rotation_deg : position angle of the +y axis, east of north
    scale_arcsec : pixel scale; x grows to the west at rotation 0
    """

    ra_deg: float
    dec_deg: float
    x_pix: float
    y_pix: float
    rotation_deg: float = 0.0
    scale_arcsec: float = PIXEL_SCALE_ARCSEC

    @property
    def cd_deg(self) -> np.ndarray:
        """(2, 2) matrix from pixel offsets to (xi, eta) in degrees."""
        angle = np.deg2rad(self.rotation_deg)
        cosine, sine = np.cos(angle), np.sin(angle)
        return self.scale_arcsec / 3600.0 * np.array([[-cosine, sine], [sine, cosine]])

    def to_pixels(self, ra_deg: np.ndarray, dec_deg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel positions of sky positions (degrees, any shape; within 90 deg of the tangent point)."""
        xi_deg, eta_deg = tangent_plane_from_sky(ra_deg, dec_deg, self.ra_deg, self.dec_deg)
        inverse = np.linalg.inv(self.cd_deg)
        x = self.x_pix + inverse[0, 0] * xi_deg + inverse[0, 1] * eta_deg
        y = self.y_pix + inverse[1, 0] * xi_deg + inverse[1, 1] * eta_deg
        return x, y

    def to_sky(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sky positions in degrees (ra in [0, 360)) of pixel positions."""
        dx, dy = np.asarray(x) - self.x_pix, np.asarray(y) - self.y_pix
        cd = self.cd_deg
        return sky_from_tangent_plane(
            cd[0, 0] * dx + cd[0, 1] * dy, cd[1, 0] * dx + cd[1, 1] * dy, self.ra_deg, self.dec_deg
        )


def tangent_plane_from_sky(
    ra_deg: np.ndarray, dec_deg: np.ndarray, ra0_deg: float, dec0_deg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gnomonic (xi, eta) in degrees of sky positions about (ra0, dec0)."""
    d_ra = np.deg2rad(np.asarray(ra_deg) - ra0_deg)
    dec, dec0 = np.deg2rad(dec_deg), np.deg2rad(dec0_deg)
    cosine = np.sin(dec0) * np.sin(dec) + np.cos(dec0) * np.cos(dec) * np.cos(d_ra)
    xi = np.cos(dec) * np.sin(d_ra) / cosine
    eta = (np.cos(dec0) * np.sin(dec) - np.sin(dec0) * np.cos(dec) * np.cos(d_ra)) / cosine
    return np.rad2deg(xi), np.rad2deg(eta)


def sky_from_tangent_plane(
    xi_deg: np.ndarray, eta_deg: np.ndarray, ra0_deg: float, dec0_deg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sky positions in degrees (ra in [0, 360)) of gnomonic (xi, eta) about (ra0, dec0)."""
    xi, eta, dec0 = np.deg2rad(xi_deg), np.deg2rad(eta_deg), np.deg2rad(dec0_deg)
    denominator = np.cos(dec0) - eta * np.sin(dec0)
    ra = ra0_deg + np.rad2deg(np.arctan2(xi, denominator))
    dec = np.arctan2(np.sin(dec0) + eta * np.cos(dec0), np.hypot(xi, denominator))
    return np.mod(ra, 360.0), np.rad2deg(dec)


# --- how bright things are -------------------------------------------------------------------------------------


def flux_njy_from_magnitude(magnitude: np.ndarray) -> np.ndarray:
    """AB magnitude to nJy."""
    return np.power(10.0, 0.4 * (NJY_ZERO_POINT_MAG - np.asarray(magnitude)))


def band_magnitude(magnitude_r: np.ndarray, g_minus_r: np.ndarray, band: str) -> np.ndarray:
    """Magnitude in `band` of sources with r magnitude and g - r colour."""
    return magnitude_r + COLOUR_COEFFICIENT[band] * g_minus_r


@dataclass(frozen=True)
class Conditions:
    """What the atmosphere and the camera did in one exposure (or, for a template, in its stack).

    Attributes
    ----------
    seeing_arcsec : FWHM of the Moffat at the image centre, before pixel integration
    electrons_per_njy : whole exposure, transparency included
    sky_electrons_pix : sky level at the image centre
    sky_slope_x, sky_slope_y : relative change of the sky from the centre to the edge
    n_stacked : exposures averaged; 1 for a science image
    """

    band: str
    exposure_time_s: float
    seeing_arcsec: float
    electrons_per_njy: float
    sky_electrons_pix: float
    sky_slope_x: float = 0.0
    sky_slope_y: float = 0.0
    n_stacked: int = 1


def nominal_conditions(
    band: str,
    exposure_time_s: float,
    seeing_arcsec: float,
    *,
    transparency: float = 1.0,
    sky_brightening: float = 1.0,
    sky_slope: tuple[float, float] = (0.0, 0.0),
    n_stacked: int = 1,
) -> Conditions:
    """Conditions of a dark-sky exposure at the zero points and sky levels of this module.

    Raises
    ------
    SimulationError
        Unknown band, or an exposure time or seeing that is not positive.
    """
    if band not in ZERO_POINT_MAG:
        raise SimulationError(f"unknown band {band!r}, expected one of {', '.join(ZERO_POINT_MAG)}")
    if not (exposure_time_s > 0 and seeing_arcsec > 0):
        raise SimulationError(f"exposure time {exposure_time_s} s and seeing {seeing_arcsec} must be positive")
    zero_point = ZERO_POINT_MAG[band]
    per_njy = exposure_time_s * transparency * 10.0 ** (0.4 * (zero_point - NJY_ZERO_POINT_MAG))
    sky_rate = PIXEL_SCALE_ARCSEC**2 * 10.0 ** (0.4 * (zero_point - SKY_MAG_ARCSEC2[band]))
    sky_e = exposure_time_s * sky_rate * sky_brightening
    return Conditions(band, exposure_time_s, seeing_arcsec, per_njy, sky_e, sky_slope[0], sky_slope[1], n_stacked)


def draw_conditions(seed: int, visit: int, band: str, exposure_time_s: float) -> Conditions:
    """Conditions of one visit: seeing 0.7-1.1 arcsec, transparency 0.9-1, sky +- 15 % with a gradient to 4 %."""
    stream = random_stream(seed, Purpose.CONDITIONS, visit)
    return nominal_conditions(
        band,
        exposure_time_s,
        stream.uniform(0.7, 1.1),
        transparency=stream.uniform(0.9, 1.0),
        sky_brightening=stream.uniform(0.85, 1.15),
        sky_slope=(stream.uniform(-0.04, 0.04), stream.uniform(-0.04, 0.04)),
    )


def nominal_flux_error_njy(band: str, exposure_time_s: float, seeing_arcsec: float = 0.9) -> float:
    """Error of an optimal flux of a faint point source on dark sky.

    sigma = sqrt(sky + read noise^2) sqrt(pi alpha^2 (2 beta - 1)) / (beta - 1), in electrons.
    """
    conditions = nominal_conditions(band, exposure_time_s, seeing_arcsec)
    alpha_pix = ALPHA_PER_FWHM * seeing_arcsec / PIXEL_SCALE_ARCSEC
    effective_pixels = np.pi * alpha_pix**2 * (2 * MOFFAT_BETA - 1) / (MOFFAT_BETA - 1) ** 2
    variance_e = (conditions.sky_electrons_pix + READ_NOISE_E**2) * effective_pixels
    return float(np.sqrt(variance_e) / conditions.electrons_per_njy)


# --- the sky ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SkyConfig:
    """A rectangle of sky about (ra_deg, dec_deg) and how densely it is filled (per square arcminute).

    `epoch_mjd_tai` is the clock of transients and variables; a quarter of the transients appear within
    `appearance_window_h` after it, the others shine from before. Stars count N(<m) ~ 10^(0.25 m) for
    r in [13.5, 25.5], galaxies ~ 10^(0.35 m) for r in [18, 25].
    """

    ra_deg: float
    dec_deg: float
    width_arcsec: float
    height_arcsec: float
    epoch_mjd_tai: float
    appearance_window_h: float
    exposure_time_s: float = 30.0
    stars_per_arcmin2: float = 122.0
    galaxies_per_arcmin2: float = 37.0
    transients_per_arcmin2: float = 2.5
    variables_per_arcmin2: float = 1.7
    asteroids_per_arcmin2: float = 0.7

    @property
    def area_arcmin2(self) -> float:
        return self.width_arcsec * self.height_arcsec / 3600.0


@dataclass(frozen=True)
class Stars:
    ra_deg: np.ndarray
    dec_deg: np.ndarray
    magnitude_r: np.ndarray
    g_minus_r: np.ndarray


@dataclass(frozen=True)
class Galaxies:
    """Elliptical galaxies; `position_angle_deg` of the major axis, east of north; `is_bulge` picks the profile."""

    ra_deg: np.ndarray
    dec_deg: np.ndarray
    magnitude_r: np.ndarray
    g_minus_r: np.ndarray
    half_light_arcsec: np.ndarray
    axis_ratio: np.ndarray
    position_angle_deg: np.ndarray
    is_bulge: np.ndarray


@dataclass(frozen=True)
class Transients:
    """Point sources absent from templates: flux_r exp((t - epoch) / timescale) from `onset_mjd_tai` on."""

    ra_deg: np.ndarray
    dec_deg: np.ndarray
    flux_r_njy: np.ndarray
    g_minus_r: np.ndarray
    onset_mjd_tai: np.ndarray
    timescale_d: np.ndarray
    host: np.ndarray  # index of the galaxy it lies in, -1 for none


@dataclass(frozen=True)
class Variables:
    """Stars whose flux is mean * (1 + amplitude sin(2 pi (t - epoch) / period + phase)); templates hold the mean."""

    star: np.ndarray
    amplitude: np.ndarray
    period_d: np.ndarray
    phase_rad: np.ndarray


@dataclass(frozen=True)
class Sky:
    config: SkyConfig
    stars: Stars
    galaxies: Galaxies
    transients: Transients
    variables: Variables


@dataclass(frozen=True)
class Movers:
    """Sources in uniform motion along great circles.

    Attributes
    ----------
    names : object names
    kind : "asteroid" or "trail"
    identifiers : (n,) int64, ssObjectId
    position, direction : (n, 3) unit vectors at `epoch_mjd_tai`, perpendicular to one another
    rate_arcsec_per_h : (n,)
    magnitude_r, g_minus_r : (n,)
    """

    names: tuple[str, ...]
    kind: str
    identifiers: np.ndarray
    position: np.ndarray
    direction: np.ndarray
    rate_arcsec_per_h: np.ndarray
    magnitude_r: np.ndarray
    g_minus_r: np.ndarray
    epoch_mjd_tai: float

    def sky_position(self, mjd_tai: float) -> tuple[np.ndarray, np.ndarray]:
        """(n,) right ascensions in [0, 360) and declinations in degrees."""
        vector, _ = self._state(mjd_tai)
        ra = np.rad2deg(np.arctan2(vector[:, 1], vector[:, 0]))
        return np.mod(ra, 360.0), np.rad2deg(np.arcsin(np.clip(vector[:, 2], -1.0, 1.0)))

    def sky_rates(self, mjd_tai: float) -> tuple[np.ndarray, np.ndarray]:
        """(n,) rates towards east (cos dec included) and north in arcsec per hour."""
        vector, tangent = self._state(mjd_tai)
        ra, dec = np.arctan2(vector[:, 1], vector[:, 0]), np.arcsin(np.clip(vector[:, 2], -1.0, 1.0))
        east, north = _east_north(ra, dec)
        rate = self.rate_arcsec_per_h
        return rate * np.sum(tangent * east, axis=1), rate * np.sum(tangent * north, axis=1)

    def _state(self, mjd_tai: float) -> tuple[np.ndarray, np.ndarray]:
        angle = self.rate_arcsec_per_h * (mjd_tai - self.epoch_mjd_tai) * 24.0 / ARCSEC_PER_RADIAN
        cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return cosine * self.position + sine * self.direction, cosine * self.direction - sine * self.position


def draw_sky(seed: int, config: SkyConfig) -> Sky:
    """Draw the sources that do not move. The same seed and config give the same sky.

    Transients have nominal r-band S/N log-uniform in [5.5, 50]; a third lie in galaxies, up to three
    half-light radii from the nucleus. Injected sources are at least 5 arcsec from one another.

    Raises
    ------
    SimulationError
        A patch without area.
    """
    if not config.area_arcmin2 > 0:
        raise SimulationError(f"a sky of {config.width_arcsec} x {config.height_arcsec} arcsec has no area")
    stream = random_stream(seed, Purpose.SKY)
    stars = _draw_stars(stream, config)
    galaxies = _draw_galaxies(stream, config)
    transients = _draw_transients(stream, config, galaxies)
    variables = _draw_variables(stream, config, stars, transients)
    return Sky(config, stars, galaxies, transients, variables)


def _count(density_per_arcmin2: float, config: SkyConfig) -> int:
    return round(density_per_arcmin2 * config.area_arcmin2)


def _draw_positions(stream: np.random.Generator, config: SkyConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    xi = stream.uniform(-0.5, 0.5, count) * config.width_arcsec / 3600.0
    eta = stream.uniform(-0.5, 0.5, count) * config.height_arcsec / 3600.0
    return sky_from_tangent_plane(xi, eta, config.ra_deg, config.dec_deg)


def draw_magnitudes(stream: np.random.Generator, count: int, bright: float, faint: float, slope: float) -> np.ndarray:
    """Magnitudes between two limits with counts N(<m) ~ 10^(slope m)."""
    low, high = 10.0 ** (slope * bright), 10.0 ** (slope * faint)
    return np.log10(stream.uniform(low, high, count)) / slope


def _draw_stars(stream: np.random.Generator, config: SkyConfig) -> Stars:
    count = _count(config.stars_per_arcmin2, config)
    ra, dec = _draw_positions(stream, config, count)
    magnitude = draw_magnitudes(stream, count, 13.5, 25.5, 0.25)
    red = stream.uniform(size=count) < 0.5
    colour = np.where(red, 1.35, 0.45) + 0.15 * stream.standard_normal(count)
    return Stars(ra, dec, magnitude, colour)


def _draw_galaxies(stream: np.random.Generator, config: SkyConfig) -> Galaxies:
    count = _count(config.galaxies_per_arcmin2, config)
    ra, dec = _draw_positions(stream, config, count)
    magnitude = draw_magnitudes(stream, count, 18.0, 25.0, 0.35)
    half_light = 0.5 * 10.0 ** (-0.12 * (magnitude - 22.0) + 0.12 * stream.standard_normal(count))
    return Galaxies(
        ra,
        dec,
        magnitude,
        0.6 + 0.3 * stream.standard_normal(count),
        half_light,
        stream.uniform(0.3, 1.0, count),
        stream.uniform(0.0, 180.0, count),
        stream.uniform(size=count) < 0.25,
    )


def _draw_transients(stream: np.random.Generator, config: SkyConfig, galaxies: Galaxies) -> Transients:
    count = _count(config.transients_per_arcmin2, config)
    ra, dec = _draw_positions(stream, config, count)
    candidates = np.flatnonzero((galaxies.magnitude_r > 18.5) & (galaxies.magnitude_r < 23.5))
    host = np.full(count, -1)
    hosted = np.arange(count) % 3 == 0
    if candidates.size:
        host[hosted] = stream.choice(candidates, int(hosted.sum()))
    in_host = np.flatnonzero(host >= 0)
    offset = stream.uniform(0.0, 3.0, count)[in_host] * galaxies.half_light_arcsec[host[in_host]] / 3600.0
    angle = stream.uniform(0.0, 2 * np.pi, count)[in_host]
    along, across = offset * np.cos(angle), offset * np.sin(angle) * galaxies.axis_ratio[host[in_host]]
    position_angle = np.deg2rad(galaxies.position_angle_deg[host[in_host]])
    east = along * np.sin(position_angle) + across * np.cos(position_angle)
    north = along * np.cos(position_angle) - across * np.sin(position_angle)
    dec[in_host] = galaxies.dec_deg[host[in_host]] + north
    ra[in_host] = np.mod(galaxies.ra_deg[host[in_host]] + east / np.cos(np.deg2rad(dec[in_host])), 360.0)

    snr = np.exp(stream.uniform(np.log(5.5), np.log(50.0), count))
    flux = snr * nominal_flux_error_njy("r", config.exposure_time_s)
    colour = 0.4 + 0.3 * stream.standard_normal(count)
    appears = stream.uniform(size=count) < 0.25
    delay_d = stream.uniform(0.0, 1.0, count) * config.appearance_window_h / 24.0
    onset = np.where(appears, config.epoch_mjd_tai + delay_d, -np.inf)
    timescale = stream.choice([-1.0, 1.0], count) * stream.uniform(3.0, 20.0, count)
    keep = _far_apart(ra, dec, 5.0)
    return Transients(ra[keep], dec[keep], flux[keep], colour[keep], onset[keep], timescale[keep], host[keep])


def _draw_variables(stream: np.random.Generator, config: SkyConfig, stars: Stars, transients: Transients) -> Variables:
    suited = np.flatnonzero((stars.magnitude_r > 18.0) & (stars.magnitude_r < 22.5))
    count = min(_count(config.variables_per_arcmin2, config), suited.size)
    star = stream.permutation(suited)[:count]
    snr = np.exp(stream.uniform(np.log(8.0), np.log(80.0), count))
    change_njy = snr * nominal_flux_error_njy("r", config.exposure_time_s)
    amplitude = np.minimum(change_njy / flux_njy_from_magnitude(stars.magnitude_r[star]), 0.6)
    period, phase = stream.uniform(0.3, 3.0, count), stream.uniform(0.0, 2 * np.pi, count)
    n_before = transients.ra_deg.size
    ra = np.concatenate([transients.ra_deg, stars.ra_deg[star]])
    dec = np.concatenate([transients.dec_deg, stars.dec_deg[star]])
    keep = _far_apart(ra, dec, 5.0)[n_before:]
    return Variables(star[keep], amplitude[keep], period[keep], phase[keep])


def _far_apart(ra_deg: np.ndarray, dec_deg: np.ndarray, separation_arcsec: float) -> np.ndarray:
    """Which positions to keep, in order, so that all kept ones are at least `separation_arcsec` apart."""
    if ra_deg.size == 0:
        return np.zeros(0, dtype=bool)
    xi, eta = tangent_plane_from_sky(ra_deg, dec_deg, float(ra_deg[0]), float(dec_deg[0]))
    return far_apart(xi * 3600.0, eta * 3600.0, separation_arcsec)


def far_apart(x: np.ndarray, y: np.ndarray, separation: float) -> np.ndarray:
    """Which points of a plane to keep, in order, so that all kept ones are at least `separation` apart."""
    keep = np.zeros(x.size, dtype=bool)
    for index in range(x.size):
        keep[index] = not np.any(np.hypot(x[keep] - x[index], y[keep] - y[index]) < separation)
    return keep


def draw_asteroids(seed: int, config: SkyConfig, day_obs: int, epoch_mjd_tai: float) -> Movers:
    """Asteroids of one night: 20-60 arcsec/h, nominal r-band S/N log-uniform in [6, 60].

    Positions are uniform over the sky's rectangle at `epoch_mjd_tai`. Names and ids hold `day_obs`.
    """
    stream = random_stream(seed, Purpose.MOVERS, day_obs)
    count = max(_count(config.asteroids_per_arcmin2, config), 1)
    ra, dec = _draw_positions(stream, config, count)
    rate = stream.uniform(20.0, 60.0, count)
    snr = np.exp(stream.uniform(np.log(6.0), np.log(60.0), count))
    names = tuple(f"asteroid-{day_obs}-{index:03d}" for index in range(count))
    identifiers = np.array([day_obs * 1000 + index for index in range(count)], dtype=np.int64)
    return _movers(stream, config, names, "asteroid", identifiers, (ra, dec), rate, snr, epoch_mjd_tai)


def draw_trail(
    seed: int, config: SkyConfig, visit: int, mjd_tai: float, near_deg: tuple[float, float], within_arcsec: float
) -> Movers:
    """One fast mover for one visit: a trail of 3-10 arcsec with S/N 25-60 (were it a point source).

    Its middle lies uniformly in a square of half-width `within_arcsec` about `near_deg` (ra, dec).
    """
    stream = random_stream(seed, Purpose.TRAIL, visit)
    xi, eta = stream.uniform(-within_arcsec, within_arcsec, (2, 1)) / 3600.0
    position = sky_from_tangent_plane(xi, eta, *near_deg)
    rate = stream.uniform(3.0, 10.0, 1) * 3600.0 / config.exposure_time_s
    snr = stream.uniform(25.0, 60.0, 1)
    name = (f"trail-{visit}",)
    return _movers(stream, config, name, "trail", np.zeros(1, dtype=np.int64), position, rate, snr, mjd_tai)


def _movers(
    stream: np.random.Generator,
    config: SkyConfig,
    names: tuple[str, ...],
    kind: str,
    identifiers: np.ndarray,
    position_deg: tuple[np.ndarray, np.ndarray],
    rate_arcsec_per_h: np.ndarray,
    snr: np.ndarray,
    epoch_mjd_tai: float,
) -> Movers:
    ra, dec = np.deg2rad(position_deg[0]), np.deg2rad(position_deg[1])
    heading = stream.uniform(0.0, 2 * np.pi, len(names))[:, None]
    east, north = _east_north(ra, dec)
    vector = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)
    flux_njy = snr * nominal_flux_error_njy("r", config.exposure_time_s)
    return Movers(
        names,
        kind,
        identifiers,
        vector,
        np.sin(heading) * east + np.cos(heading) * north,
        rate_arcsec_per_h,
        NJY_ZERO_POINT_MAG - 2.5 * np.log10(flux_njy),
        0.5 + 0.1 * stream.standard_normal(len(names)),
        epoch_mjd_tai,
    )


def _east_north(ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    east = np.stack([-np.sin(ra), np.cos(ra), np.zeros_like(ra)], axis=1)
    north = np.stack([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)], axis=1)
    return east, north


def transient_flux_njy(sky: Sky, band: str, mjd_tai: float) -> np.ndarray:
    """(n_transients,) flux at a time; 0 before the onset. Growth and decay stop at a factor of e^2."""
    transients = sky.transients
    change = np.clip((mjd_tai - sky.config.epoch_mjd_tai) / transients.timescale_d, -2.0, 2.0)
    colour = 10.0 ** (-0.4 * COLOUR_COEFFICIENT[band] * transients.g_minus_r)
    return np.where(mjd_tai >= transients.onset_mjd_tai, transients.flux_r_njy * colour * np.exp(change), 0.0)


def variable_flux_change_njy(sky: Sky, band: str, mjd_tai: float) -> np.ndarray:
    """(n_variables,) flux at a time minus the mean flux that templates hold."""
    variables, stars = sky.variables, sky.stars
    mean = flux_njy_from_magnitude(
        band_magnitude(stars.magnitude_r[variables.star], stars.g_minus_r[variables.star], band)
    )
    cycles = (mjd_tai - sky.config.epoch_mjd_tai) / variables.period_d
    return mean * variables.amplitude * np.sin(2 * np.pi * cycles + variables.phase_rad)

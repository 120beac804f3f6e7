"""A simulated sky and the detector images it gives, with the truth about everything injected.

A sky is drawn once from a seed: stars, galaxies, transients, variables. Movers are drawn per night.
`render_science` and `render_template` turn sky, projection, PSF and conditions into one image with its
true variance. Every random stream is keyed by (seed, purpose, key...), so an image depends on its own
key only, and source positions never depend on how much noise was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numba import njit

PIXEL_SCALE_ARCSEC = 0.2
ARCSEC_PER_RADIAN = 180.0 * 3600.0 / np.pi
FULL_WELL_E = 100_000.0
READ_NOISE_E = 6.0
PSF_SIZE_PIX = 41

# Electrons per second of an AB magnitude-0 source are 10^(0.4 zero point); dark sky in mag/arcsec^2.
# Rounded values for an 8.4 m telescope with the LSST bands.
ZERO_POINT_MAG = {"u": 26.5, "g": 28.5, "r": 28.4, "i": 28.2, "z": 27.8, "y": 26.8}
SKY_MAG_ARCSEC2 = {"u": 23.0, "g": 22.3, "r": 21.2, "i": 20.5, "z": 19.6, "y": 18.6}
# Magnitude in a band = r + coefficient * (g - r): a one-parameter colour sequence, enough to make bands differ.
COLOUR_COEFFICIENT = {"u": 2.6, "g": 1.0, "r": 0.0, "i": -0.5, "z": -0.7, "y": -0.8}
NJY_ZERO_POINT_MAG = 31.4

MOFFAT_BETA = 3.5
ALPHA_PER_FWHM = 0.5 / np.sqrt(2.0 ** (1.0 / MOFFAT_BETA) - 1.0)
_STAMP_RADIUS_ALPHA = 6.0  # leaves (1 + 36)^-2.5 = 1.2e-4 of the flux outside
_CORE_RADIUS_ALPHA = 2.5
_STAMP_FLOOR_E = 0.1  # surface brightness at which a bright star's wing is cut: 0.3 % of the sky noise
_TRACK_STEP_PIX = 0.5

# Sums of Gaussians (weights; sigma in units of the Moffat alpha or of the half-light radius), least-squares
# fits of our own. The Moffat one is within 5e-4 of the peak everywhere, so galaxies and stars share a PSF.
# The two galaxy profiles (exponential; steep like Sersic 4, without its cusp) are what they are: the sky.
_MOFFAT_MIXTURE = np.array(
    [[0.112179, 0.440071, 0.345224, 0.0931547, 0.00937062], [0.28554, 0.411718, 0.611268, 0.971754, 1.78265]]
)
_DISC_MIXTURE = np.array([[0.0186115, 0.169875, 0.496199, 0.315315], [0.161284, 0.419625, 0.830944, 1.45778]])
_BULGE_MIXTURE = np.array(
    [[0.0311413, 0.0959339, 0.220995, 0.338387, 0.313543], [0.0312, 0.111384, 0.317848, 0.88432, 2.6899]]
)

INJECTION_DTYPE = np.dtype(
    [
        ("kind", "U9"),
        ("object", "U32"),
        ("ra", "f8"),
        ("dec", "f8"),
        ("x", "f4"),
        ("y", "f4"),
        ("flux_njy", "f8"),
        ("snr", "f8"),
        ("good_pixels", "?"),
    ]
)
GOOD_MASK_RADIUS_PIX = 2
GOOD_EDGE_PIX = 15
GOOD_SATURATED_STAR_PIX = 12.0
SHARPEST_TEMPLATE_ARCSEC = 0.75


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


def _draw_magnitudes(stream: np.random.Generator, count: int, bright: float, faint: float, slope: float) -> np.ndarray:
    low, high = 10.0 ** (slope * bright), 10.0 ** (slope * faint)
    return np.log10(stream.uniform(low, high, count)) / slope


def _draw_stars(stream: np.random.Generator, config: SkyConfig) -> Stars:
    count = _count(config.stars_per_arcmin2, config)
    ra, dec = _draw_positions(stream, config, count)
    magnitude = _draw_magnitudes(stream, count, 13.5, 25.5, 0.25)
    red = stream.uniform(size=count) < 0.5
    colour = np.where(red, 1.35, 0.45) + 0.15 * stream.standard_normal(count)
    return Stars(ra, dec, magnitude, colour)


def _draw_galaxies(stream: np.random.Generator, config: SkyConfig) -> Galaxies:
    count = _count(config.galaxies_per_arcmin2, config)
    ra, dec = _draw_positions(stream, config, count)
    magnitude = _draw_magnitudes(stream, count, 18.0, 25.0, 0.35)
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
    keep = np.zeros(ra_deg.size, dtype=bool)
    if ra_deg.size == 0:
        return keep
    xi, eta = tangent_plane_from_sky(ra_deg, dec_deg, float(ra_deg[0]), float(dec_deg[0]))
    for index in range(ra_deg.size):
        distance_deg = np.hypot(xi[keep] - xi[index], eta[keep] - eta[index])
        keep[index] = not np.any(distance_deg * 3600.0 < separation_arcsec)
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


# --- the PSF ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PsfField:
    """Elliptical Moffat (beta 3.5) whose width and shape change over a detector.

    With u, v = -1..1 from edge to edge: fwhm = fwhm_pix (1 + slope_x u + slope_y v + curvature (u^2 + v^2) / 2),
    e1 = e1 + e1_slope u, e2 = e2 + e2_slope v, where e1 = (Ixx - Iyy) / (Ixx + Iyy), e2 = 2 Ixy / (Ixx + Iyy).
    """

    shape: tuple[int, int]
    fwhm_pix: float
    slope_x: float = 0.0
    slope_y: float = 0.0
    curvature: float = 0.0
    e1: float = 0.0
    e2: float = 0.0
    e1_slope: float = 0.0
    e2_slope: float = 0.0

    def at(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """FWHM in pixels, e1 and e2 at pixel positions; beyond the edges the values of the edge."""
        ny, nx = self.shape
        u = np.clip((np.asarray(x, dtype=np.float64) - (nx - 1) / 2) / (nx / 2), -1.0, 1.0)
        v = np.clip((np.asarray(y, dtype=np.float64) - (ny - 1) / 2) / (ny / 2), -1.0, 1.0)
        relative = 1.0 + self.slope_x * u + self.slope_y * v + self.curvature * (u * u + v * v) / 2
        return self.fwhm_pix * relative, self.e1 + self.e1_slope * u, self.e2 + self.e2_slope * v


def draw_psf(seed: int, visit: int, detector: int, seeing_arcsec: float, shape: tuple[int, int]) -> PsfField:
    """The PSF of one exposure: width changing by a few per cent and ellipticity of a few per cent."""
    stream = random_stream(seed, Purpose.PSF, visit, detector)
    slopes = np.clip(stream.standard_normal(2), -2, 2) * 0.012
    shapes = np.clip(stream.standard_normal(4), -2, 2) * np.array([0.03, 0.03, 0.01, 0.01])
    return PsfField(
        shape,
        seeing_arcsec / PIXEL_SCALE_ARCSEC,
        float(slopes[0]),
        float(slopes[1]),
        stream.uniform(0.0, 0.03),
        *(float(value) for value in shapes),
    )


def psf_image(psf: PsfField, x: float, y: float, size_pix: int = PSF_SIZE_PIX) -> np.ndarray:
    """The pixel-integrated PSF at a position, centred on the middle pixel.

    Returns
    -------
    (size_pix, size_pix) float64, sum 1.

    Raises
    ------
    SimulationError
        `size_pix` is even or smaller than 3.
    """
    if size_pix < 3 or size_pix % 2 == 0:
        raise SimulationError(f"the PSF image must have an odd size of at least 3 pixels, got {size_pix}")
    stamp = np.zeros((size_pix, size_pix))
    centre = np.full(1, size_pix // 2, dtype=np.float64)
    fwhm, e1, e2 = psf.at(np.array([x]), np.array([y]))
    add_point_sources(stamp, centre, centre, np.ones(1), fwhm, e1, e2, 1e-12)
    return stamp / stamp.sum()


@njit(cache=True)
def add_point_sources(
    image: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    flux: np.ndarray,
    fwhm_pix: np.ndarray,
    e1: np.ndarray,
    e2: np.ndarray,
    floor: float,
) -> None:
    """Add pixel-integrated elliptical Moffats to `image` in place.

    The profile is flux (beta - 1) / (pi alpha^2) (1 + q / alpha^2)^-beta with q the quadratic form of the
    ellipse, det q = 1. Within 2.5 alpha a pixel is a 3 x 3 Gauss-Legendre sum, outside its midpoint value.

    Parameters
    ----------
    image : (ny, nx) float64, changed in place
    x, y, flux, fwhm_pix, e1, e2 : (n,) float64; flux in the unit of the image, |e| < 1
    floor : surface brightness (> 0) at which a wing may be cut, but never inside 6 alpha

    Notes
    -----
    6 alpha holds 99.988 % of the flux. Cost O(n * stamp area).
    """
    ny, nx = image.shape
    node = np.sqrt(0.6) * 0.5
    offsets = (-node, 0.0, node)
    weights = (5.0 / 18.0, 8.0 / 18.0, 5.0 / 18.0)
    for i in range(x.size):
        if flux[i] == 0.0:
            continue
        alpha = fwhm_pix[i] * ALPHA_PER_FWHM
        scale = 1.0 / (alpha * alpha)
        root = np.sqrt(1.0 - e1[i] * e1[i] - e2[i] * e2[i])
        q_xx = (1.0 - e1[i]) / root * scale
        q_yy = (1.0 + e1[i]) / root * scale
        q_xy = -e2[i] / root * scale
        peak = flux[i] * (MOFFAT_BETA - 1.0) / np.pi * scale
        reach = max(_STAMP_RADIUS_ALPHA, (abs(peak) / floor) ** (0.5 / MOFFAT_BETA))
        half_x = reach * alpha * np.sqrt((1.0 + e1[i]) / root)
        half_y = reach * alpha * np.sqrt((1.0 - e1[i]) / root)
        x_low, x_high = max(0, int(np.ceil(x[i] - half_x))), min(nx - 1, int(np.floor(x[i] + half_x)))
        y_low, y_high = max(0, int(np.ceil(y[i] - half_y))), min(ny - 1, int(np.floor(y[i] + half_y)))
        for row in range(y_low, y_high + 1):
            dy = row - y[i]
            for column in range(x_low, x_high + 1):
                dx = column - x[i]
                q = q_xx * dx * dx + 2.0 * q_xy * dx * dy + q_yy * dy * dy
                if q > reach * reach:
                    continue
                if q > _CORE_RADIUS_ALPHA * _CORE_RADIUS_ALPHA:
                    t = 1.0 + q
                    value = 1.0 / (t * t * t * np.sqrt(t))
                else:
                    value = 0.0
                    for k in range(3):
                        sub_y = dy + offsets[k]
                        for m in range(3):
                            sub_x = dx + offsets[m]
                            t = 1.0 + q_xx * sub_x * sub_x + 2.0 * q_xy * sub_x * sub_y + q_yy * sub_y * sub_y
                            value += weights[k] * weights[m] / (t * t * t * np.sqrt(t))
                image[row, column] += peak * value


@njit(cache=True)
def add_gaussians(image: np.ndarray, x: np.ndarray, y: np.ndarray, flux: np.ndarray, covariance: np.ndarray) -> None:
    """Add elliptical Gaussians, cut at 5 sigma, to `image` in place.

    Parameters
    ----------
    image : (ny, nx) float64, changed in place
    x, y, flux : (n,) float64
    covariance : (n, 3) float64, (xx, xy, yy) in pixel^2, pixel integration included by adding 1/12
    """
    ny, nx = image.shape
    for i in range(x.size):
        xx, xy, yy = covariance[i, 0], covariance[i, 1], covariance[i, 2]
        determinant = xx * yy - xy * xy
        i_xx, i_xy, i_yy = yy / determinant, -xy / determinant, xx / determinant
        peak = flux[i] / (2.0 * np.pi * np.sqrt(determinant))
        half_x, half_y = 5.0 * np.sqrt(xx), 5.0 * np.sqrt(yy)
        x_low, x_high = max(0, int(np.ceil(x[i] - half_x))), min(nx - 1, int(np.floor(x[i] + half_x)))
        y_low, y_high = max(0, int(np.ceil(y[i] - half_y))), min(ny - 1, int(np.floor(y[i] + half_y)))
        for row in range(y_low, y_high + 1):
            dy = row - y[i]
            for column in range(x_low, x_high + 1):
                dx = column - x[i]
                q = i_xx * dx * dx + 2.0 * i_xy * dx * dy + i_yy * dy * dy
                if q < 25.0:
                    image[row, column] += peak * np.exp(-0.5 * q)


@njit(cache=True)
def bleed_columns(electrons: np.ndarray, full_well_e: float) -> None:
    """Spill charge above the full well along columns, half up and half down, in place.

    Charge is conserved but for what leaves the detector at its ends.
    """
    ny, nx = electrons.shape
    for column in range(nx):
        row = 0
        while row < ny:
            if electrons[row, column] <= full_well_e:
                row += 1
                continue
            first, excess = row, 0.0
            while row < ny and electrons[row, column] > full_well_e:
                excess += electrons[row, column] - full_well_e
                electrons[row, column] = full_well_e
                row += 1
            for start, step in ((row, 1), (first - 1, -1)):
                spill, target = 0.5 * excess, start
                while spill > 0.0 and 0 <= target < ny:
                    taken = min(spill, max(0.0, full_well_e - electrons[target, column]))
                    electrons[target, column] += taken
                    spill -= taken
                    target += step


# --- images ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RenderedExposure:
    """One simulated image with its truth.

    Attributes
    ----------
    image, variance : (ny, nx) float32, nJy and nJy^2; the variance is the true one (sky, sources, read noise)
    bad, saturated, cosmic_ray : (ny, nx) bool, what the mask of the exposure shall say
    psf : (41, 41) float64, the true PSF at the image centre, sum 1
    injections : INJECTION_DTYPE rows, in order of kind and object; empty for a template
    """

    image: np.ndarray
    variance: np.ndarray
    bad: np.ndarray
    saturated: np.ndarray
    cosmic_ray: np.ndarray
    psf: np.ndarray
    injections: np.ndarray


@dataclass(frozen=True)
class _Tracks:
    """Injected sources on one image: where each one's light falls during the exposure."""

    kind: np.ndarray
    name: np.ndarray
    ra_deg: np.ndarray
    dec_deg: np.ndarray
    x: np.ndarray
    y: np.ndarray
    x_start: np.ndarray
    y_start: np.ndarray
    x_end: np.ndarray
    y_end: np.ndarray
    flux_njy: np.ndarray


def render_science(
    sky: Sky,
    movers: Sequence[Movers],
    projection: TanProjection,
    psf: PsfField,
    conditions: Conditions,
    midpoint_mjd_tai: float,
    *,
    noise: np.random.Generator,
    cosmic_rays: np.random.Generator,
    bad_columns: np.random.Generator,
) -> RenderedExposure:
    """Render one science image with everything that changes, its defects and its truth.

    Electrons = stars + galaxies + injected sources + sky, bled along columns above the full well; the image is
    (Poisson(electrons) + read noise + cosmic rays) / electrons_per_njy, with the sky left in.
    The truth's S/N is |flux| sqrt(sum p^2 / variance) with p the source's own profile (PSF, or PSF along its
    track) and the variance of this image; the template's noise is not in it.

    Parameters
    ----------
    sky : Sky
    movers : sequence of Movers
        Asteroids and trails that shine in this exposure.
    projection, psf, conditions : of this exposure; the image has `psf.shape`
    midpoint_mjd_tai : float
        Middle of the exposure; movers are trailed over `conditions.exposure_time_s` about it.
    noise, cosmic_rays, bad_columns : np.random.Generator
        Separate streams, so that defects do not change when the sources do.

    Returns
    -------
    RenderedExposure
    """
    tracks = _injected_tracks(sky, movers, projection, conditions, midpoint_mjd_tai)
    electrons = static_electrons(sky, projection, psf, conditions)
    _add_tracks(electrons, tracks, psf, conditions.electrons_per_njy)
    electrons += sky_level_electrons(psf.shape, conditions)
    bleed_columns(electrons, FULL_WELL_E)
    saturated = electrons >= FULL_WELL_E
    variance = ((electrons + READ_NOISE_E**2) / conditions.electrons_per_njy**2).astype(np.float32)
    counts = noise.poisson(electrons).astype(np.float32)
    counts += np.float32(READ_NOISE_E) * noise.standard_normal(psf.shape, dtype=np.float32)
    flagged = _add_cosmic_rays(counts, cosmic_rays)
    bad = _add_bad_columns(counts, bad_columns)
    unusable = saturated | flagged | bad
    cores = _saturated_star_cores(sky, projection, psf, conditions)
    injections = _truth_rows(tracks, psf, variance, unusable, cores)
    image = (counts / np.float32(conditions.electrons_per_njy)).astype(np.float32)
    return RenderedExposure(image, variance, bad, saturated, flagged, _central_psf(psf), injections)


def render_template(
    sky: Sky, projection: TanProjection, psf: PsfField, conditions: Conditions, *, noise: np.random.Generator
) -> RenderedExposure:
    """Render a template: the mean of `conditions.n_stacked` exposures, sky subtracted, nothing injected.

    Stars above the full well are cut off and flagged, without bleeds (which a stack over rotations rejects).
    """
    electrons = static_electrons(sky, projection, psf, conditions) + sky_level_electrons(psf.shape, conditions)
    saturated = electrons >= FULL_WELL_E
    np.minimum(electrons, FULL_WELL_E, out=electrons)
    variance_e = (electrons + READ_NOISE_E**2) / conditions.n_stacked
    electrons -= sky_level_electrons(psf.shape, conditions)
    electrons += np.sqrt(variance_e) * noise.standard_normal(psf.shape)
    per_njy = conditions.electrons_per_njy
    nothing = np.zeros(psf.shape, dtype=bool)
    return RenderedExposure(
        (electrons / per_njy).astype(np.float32),
        (variance_e / per_njy**2).astype(np.float32),
        nothing,
        saturated,
        nothing,
        _central_psf(psf),
        np.zeros(0, dtype=INJECTION_DTYPE),
    )


def sky_level_electrons(shape: tuple[int, int], conditions: Conditions) -> np.ndarray:
    """(ny, nx) expected sky electrons: a plane."""
    ny, nx = shape
    u = np.linspace(-1.0, 1.0, nx)[None, :]
    v = np.linspace(-1.0, 1.0, ny)[:, None]
    return conditions.sky_electrons_pix * (1.0 + conditions.sky_slope_x * u + conditions.sky_slope_y * v)


def static_electrons(sky: Sky, projection: TanProjection, psf: PsfField, conditions: Conditions) -> np.ndarray:
    """(ny, nx) expected electrons of stars (at mean flux) and galaxies, without sky."""
    electrons = np.zeros(psf.shape)
    stars = sky.stars
    x, y = projection.to_pixels(stars.ra_deg, stars.dec_deg)
    magnitude = band_magnitude(stars.magnitude_r, stars.g_minus_r, conditions.band)
    flux = flux_njy_from_magnitude(magnitude) * conditions.electrons_per_njy
    add_point_sources(electrons, x, y, flux, *psf.at(x, y), _STAMP_FLOOR_E)
    _add_galaxies(electrons, sky.galaxies, projection, psf, conditions)
    return electrons


def _add_galaxies(
    electrons: np.ndarray, galaxies: Galaxies, projection: TanProjection, psf: PsfField, conditions: Conditions
) -> None:
    """Every galaxy as Gaussians: each component of its profile convolved with each component of the PSF."""
    x, y = projection.to_pixels(galaxies.ra_deg, galaxies.dec_deg)
    fwhm, e1, e2 = psf.at(x, y)
    magnitude = band_magnitude(galaxies.magnitude_r, galaxies.g_minus_r, conditions.band)
    flux = flux_njy_from_magnitude(magnitude) * conditions.electrons_per_njy
    root = np.sqrt(1.0 - e1**2 - e2**2)
    psf_shape = (ALPHA_PER_FWHM * fwhm[:, None]) ** 2 * np.stack([1.0 + e1, e2, 1.0 - e1], axis=1) / root[:, None]
    galaxy_shape = _galaxy_covariance_pix2(galaxies, projection)
    for is_bulge, mixture in ((False, _DISC_MIXTURE), (True, _BULGE_MIXTURE)):
        chosen = galaxies.is_bulge == is_bulge
        for profile_weight, profile_sigma in mixture.T:
            for psf_weight, psf_sigma in _MOFFAT_MIXTURE.T:
                covariance = profile_sigma**2 * galaxy_shape[chosen] + psf_sigma**2 * psf_shape[chosen]
                covariance += np.array([1.0, 0.0, 1.0]) / 12.0
                add_gaussians(electrons, x[chosen], y[chosen], profile_weight * psf_weight * flux[chosen], covariance)


def _galaxy_covariance_pix2(galaxies: Galaxies, projection: TanProjection) -> np.ndarray:
    """(n, 3) covariance (xx, xy, yy) in pixels of a profile of sigma = half-light radius along the major axis."""
    angle = np.deg2rad(galaxies.position_angle_deg)
    major = galaxies.half_light_arcsec[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    minor = (galaxies.axis_ratio * galaxies.half_light_arcsec)[:, None]
    minor = minor * np.stack([np.cos(angle), -np.sin(angle)], axis=1)
    inverse = np.linalg.inv(projection.cd_deg * 3600.0)
    axes_pix = [axis @ inverse.T for axis in (major, minor)]
    return sum(
        (np.stack([a[:, 0] ** 2, a[:, 0] * a[:, 1], a[:, 1] ** 2], axis=1) for a in axes_pix),
        np.zeros((galaxies.ra_deg.size, 3)),
    )


def _injected_tracks(
    sky: Sky, movers: Sequence[Movers], projection: TanProjection, conditions: Conditions, midpoint_mjd_tai: float
) -> _Tracks:
    band, half_d = conditions.band, 0.5 * conditions.exposure_time_s / 86400.0
    transients, star = sky.transients, sky.variables.star
    flux = transient_flux_njy(sky, band, midpoint_mjd_tai)
    shining = np.flatnonzero(flux > 0)
    parts = [
        _static_track(
            "transient", shining, transients.ra_deg[shining], transients.dec_deg[shining], flux[shining], projection
        ),
        _static_track(
            "variable",
            np.arange(star.size),
            sky.stars.ra_deg[star],
            sky.stars.dec_deg[star],
            variable_flux_change_njy(sky, band, midpoint_mjd_tai),
            projection,
        ),
    ]
    for group in movers:
        ra, dec = group.sky_position(midpoint_mjd_tai)
        parts.append(
            (
                np.full(ra.size, group.kind),
                np.array(group.names),
                ra,
                dec,
                *projection.to_pixels(ra, dec),
                *projection.to_pixels(*group.sky_position(midpoint_mjd_tai - half_d)),
                *projection.to_pixels(*group.sky_position(midpoint_mjd_tai + half_d)),
                flux_njy_from_magnitude(band_magnitude(group.magnitude_r, group.g_minus_r, band)),
            )
        )
    return _Tracks(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _static_track(
    kind: str, index: np.ndarray, ra: np.ndarray, dec: np.ndarray, flux_njy: np.ndarray, projection: TanProjection
) -> tuple[np.ndarray, ...]:
    x, y = projection.to_pixels(ra, dec)
    names = np.array([f"{kind}-{number:04d}" for number in index], dtype="U32")
    return np.full(index.size, kind), names, ra, dec, x, y, x, y, x, y, flux_njy


def _track_points(tracks: _Tracks, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced positions, at most half a pixel apart, along the track of one source."""
    dx, dy = tracks.x_end[index] - tracks.x_start[index], tracks.y_end[index] - tracks.y_start[index]
    count = max(1, int(np.ceil(np.hypot(dx, dy) / _TRACK_STEP_PIX)))
    fraction = (np.arange(count) + 0.5) / count
    return tracks.x_start[index] + fraction * dx, tracks.y_start[index] + fraction * dy


def _add_tracks(electrons: np.ndarray, tracks: _Tracks, psf: PsfField, electrons_per_njy: float) -> None:
    for index in range(tracks.flux_njy.size):
        x, y = _track_points(tracks, index)
        flux = np.full(x.size, tracks.flux_njy[index] * electrons_per_njy / x.size)
        add_point_sources(electrons, x, y, flux, *psf.at(x, y), _STAMP_FLOOR_E)


def _truth_rows(
    tracks: _Tracks, psf: PsfField, variance: np.ndarray, unusable: np.ndarray, cores: np.ndarray
) -> np.ndarray:
    """Truth of the sources whose centre falls on the image."""
    ny, nx = psf.shape
    on_image = (tracks.x >= -0.5) & (tracks.x < nx - 0.5) & (tracks.y >= -0.5) & (tracks.y < ny - 0.5)
    chosen = np.flatnonzero(on_image)
    rows = np.zeros(chosen.size, dtype=INJECTION_DTYPE)
    for name, column in (("kind", tracks.kind), ("object", tracks.name), ("ra", tracks.ra_deg)):
        rows[name] = column[chosen]
    rows["dec"], rows["x"], rows["y"] = tracks.dec_deg[chosen], tracks.x[chosen], tracks.y[chosen]
    rows["flux_njy"] = tracks.flux_njy[chosen]
    for row, index in zip(rows, chosen, strict=True):
        row["snr"] = abs(tracks.flux_njy[index]) * _optimal_inverse_error(tracks, int(index), psf, variance)
        row["good_pixels"] = _has_good_pixels(float(tracks.x[index]), float(tracks.y[index]), unusable, cores)
    return np.sort(rows, order=("kind", "object"))


def _optimal_inverse_error(tracks: _Tracks, index: int, psf: PsfField, variance: np.ndarray) -> float:
    """sqrt(sum p^2 / variance) over the pixels of the image that the source's profile p reaches."""
    x, y = _track_points(tracks, index)
    reach = int(np.ceil(1.3 * _STAMP_RADIUS_ALPHA * ALPHA_PER_FWHM * psf.fwhm_pix))
    ny, nx = psf.shape
    x_low, x_high = max(0, int(x.min()) - reach), min(nx, int(x.max()) + reach + 1)
    y_low, y_high = max(0, int(y.min()) - reach), min(ny, int(y.max()) + reach + 1)
    profile = np.zeros((y_high - y_low, x_high - x_low))
    add_point_sources(profile, x - x_low, y - y_low, np.full(x.size, 1.0 / x.size), *psf.at(x, y), 1.0)
    return float(np.sqrt(np.sum(profile**2 / variance[y_low:y_high, x_low:x_high])))


def _has_good_pixels(x: float, y: float, unusable: np.ndarray, cores: np.ndarray) -> bool:
    ny, nx = unusable.shape
    if min(x, y, nx - 1 - x, ny - 1 - y) < GOOD_EDGE_PIX:
        return False
    column, row, radius = round(x), round(y), GOOD_MASK_RADIUS_PIX
    if unusable[row - radius : row + radius + 1, column - radius : column + radius + 1].any():
        return False
    return not np.any(np.hypot(cores[:, 0] - x, cores[:, 1] - y) < GOOD_SATURATED_STAR_PIX)


def _saturated_star_cores(sky: Sky, projection: TanProjection, psf: PsfField, conditions: Conditions) -> np.ndarray:
    """(n, 2) pixel positions of stars that saturate here or in the sharpest template."""
    stars = sky.stars
    magnitude = band_magnitude(stars.magnitude_r, stars.g_minus_r, conditions.band)
    flux_e = flux_njy_from_magnitude(magnitude) * conditions.electrons_per_njy
    fwhm_pix = min(psf.fwhm_pix, SHARPEST_TEMPLATE_ARCSEC / PIXEL_SCALE_ARCSEC)
    peak_e = flux_e * (MOFFAT_BETA - 1) / (np.pi * (ALPHA_PER_FWHM * fwhm_pix) ** 2)
    bright = (
        1.2 * (peak_e + conditions.sky_electrons_pix) > FULL_WELL_E
    )  # width, transparency and sky of the template differ
    return np.stack(projection.to_pixels(stars.ra_deg[bright], stars.dec_deg[bright]), axis=1)


def _add_cosmic_rays(counts: np.ndarray, stream: np.random.Generator, per_megapixel: float = 20.0) -> np.ndarray:
    """Add straight tracks of charge in place; returns the pixels flagged as cosmic ray: 4 of 5 hits."""
    ny, nx = counts.shape
    flagged = np.zeros(counts.shape, dtype=bool)
    for _ in range(stream.poisson(per_megapixel * nx * ny / 1e6)):
        x, y = stream.uniform(0, nx), stream.uniform(0, ny)
        angle, length = stream.uniform(0, np.pi), 1.0 + stream.exponential(6.0)
        charge_e = 300.0 + stream.exponential(1500.0)
        step = np.arange(0.0, length)
        columns, rows = np.floor(x + step * np.cos(angle)).astype(int), np.floor(y + step * np.sin(angle)).astype(int)
        inside = (columns >= 0) & (columns < nx) & (rows >= 0) & (rows < ny)
        columns, rows = columns[inside], rows[inside]
        counts[rows, columns] += np.float32(charge_e)
        flagged[rows, columns] |= stream.uniform() < 0.8
    return flagged


def _add_bad_columns(counts: np.ndarray, stream: np.random.Generator, per_thousand: float = 2.0) -> np.ndarray:
    """Overwrite some columns, whole or in part, dead or hot, in place; returns those pixels."""
    ny, nx = counts.shape
    bad = np.zeros(counts.shape, dtype=bool)
    for _ in range(max(1, round(per_thousand * nx / 1000.0))):
        column, first = int(stream.integers(nx)), int(stream.integers(-ny, ny // 2))
        width, is_hot = int(stream.integers(1, 3)), stream.uniform() < 0.5
        region = (slice(max(first, 0), ny), slice(column, column + width))
        counts[region] = counts[region] + np.float32(5000.0) if is_hot else np.float32(0.0)
        bad[region] = True
    return bad


def _central_psf(psf: PsfField) -> np.ndarray:
    ny, nx = psf.shape
    return psf_image(psf, (nx - 1) / 2, (ny - 1) / 2)

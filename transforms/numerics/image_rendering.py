"""Images of a simulated sky, with the truth about everything injected.

`render_science` and `render_template` turn sky, projection, PSF and conditions into one image with its true
variance: stars as pixel-integrated Moffats, galaxies as Gaussian sums, movers along their tracks; then sky,
saturation with bleeds, noise, cosmic rays and bad columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from transforms.numerics.sky_simulation import (
    ALPHA_PER_FWHM,
    MOFFAT_BETA,
    PIXEL_SCALE_ARCSEC,
    READ_NOISE_E,
    Conditions,
    Galaxies,
    Movers,
    Purpose,
    SimulationError,
    Sky,
    TanProjection,
    band_magnitude,
    flux_njy_from_magnitude,
    random_stream,
    transient_flux_njy,
    variable_flux_change_njy,
)

FULL_WELL_E = 100_000.0
PSF_SIZE_PIX = 41

_STAMP_RADIUS_ALPHA = 6.0  # leaves (1 + 36)^-2.5 = 1.2e-4 of the flux outside
_CORE_RADIUS_ALPHA = 2.5
STAMP_FLOOR_E = 0.1  # surface brightness at which a bright star's wing is cut: 0.3 % of the sky noise
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


# --- the PSF ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlaneWaves:
    """Smooth random fields over a detector: sums of plane waves, what turbulence does on scales below a detector.

    Field j is ``sum_k amplitude[j, k] cos(wave_vector[k] . (x, y) + phase[j, k])``.

    Attributes
    ----------
    wave_vectors : (n, 2) float64, radians per pixel along x and y
    amplitudes, phases : (m, n) float64 of m fields
    """

    wave_vectors: np.ndarray
    amplitudes: np.ndarray
    phases: np.ndarray

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(m, ...) values of the fields at pixel positions of any shape."""
        position = np.stack(np.broadcast_arrays(x, y), axis=-1).astype(np.float64)
        angle = position @ self.wave_vectors.T
        return np.stack(
            [np.cos(angle + phase) @ amplitude for amplitude, phase in zip(self.amplitudes, self.phases, strict=True)]
        )


def draw_plane_waves(
    stream: np.random.Generator, rms: tuple[float, ...], shortest_pix: float, longest_pix: float, count: int = 32
) -> PlaneWaves:
    """Draw independent fields of the given rms, with wavelengths log-uniform between two limits.

    Amplitudes grow as wavelength^(1/3): the image displacement of Kolmogorov turbulence (k^(-5/3) a mode in two
    dimensions) steepened by one power of k, as an exposure averages over the wind.
    """
    wavelength = np.exp(stream.uniform(np.log(shortest_pix), np.log(longest_pix), count))
    heading = stream.uniform(0.0, 2 * np.pi, count)
    vectors = (2 * np.pi / wavelength)[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    relative = np.cbrt(wavelength)
    relative = relative * np.sqrt(2.0 / np.sum(relative**2))
    return PlaneWaves(vectors, np.outer(rms, relative), stream.uniform(0.0, 2 * np.pi, (len(rms), count)))


@dataclass(frozen=True)
class PsfField:
    """Elliptical Moffat (beta 3.5) whose width and shape change over a detector.

    With u, v = -1..1 from edge to edge: fwhm = fwhm_pix (1 + slope_x u + slope_y v + curvature (u^2 + v^2) / 2),
    e1 = e1 + e1_slope u, e2 = e2 + e2_slope v, where e1 = (Ixx - Iyy) / (Ixx + Iyy), e2 = 2 Ixy / (Ixx + Iyy).
    `ripple`, three fields, is added to these on smaller scales: to the FWHM (relative), to e1 and to e2.
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
    ripple: PlaneWaves | None = None

    def at(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """FWHM in pixels, e1 and e2 at pixel positions; beyond the edges the values of the edge."""
        ny, nx = self.shape
        u = np.clip((np.asarray(x, dtype=np.float64) - (nx - 1) / 2) / (nx / 2), -1.0, 1.0)
        v = np.clip((np.asarray(y, dtype=np.float64) - (ny - 1) / 2) / (ny / 2), -1.0, 1.0)
        relative = 1.0 + self.slope_x * u + self.slope_y * v + self.curvature * (u * u + v * v) / 2
        e1, e2 = self.e1 + self.e1_slope * u, self.e2 + self.e2_slope * v
        if self.ripple is not None:
            ripple = self.ripple.at(x, y)
            relative, e1, e2 = relative + ripple[0], e1 + ripple[1], e2 + ripple[2]
        return self.fwhm_pix * relative, e1, e2


def draw_psf(seed: int, visit: int, detector: int, seeing_arcsec: float, shape: tuple[int, int]) -> PsfField:
    """The PSF of one exposure: width changing by a few per cent and ellipticity of a few per cent."""
    stream = random_stream(seed, Purpose.PSF, visit, detector)
    slopes = np.clip(stream.standard_normal(2), -2, 2) * 0.012
    shapes = np.clip(stream.standard_normal(4), -2, 2) * np.array([0.03, 0.03, 0.01, 0.01])
    e1, e2, e1_slope, e2_slope = (float(value) for value in shapes)
    return PsfField(
        shape,
        seeing_arcsec / PIXEL_SCALE_ARCSEC,
        float(slopes[0]),
        float(slopes[1]),
        stream.uniform(0.0, 0.03),
        e1,
        e2,
        e1_slope,
        e2_slope,
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
    flagged, _ = add_cosmic_rays(counts, cosmic_rays)
    bad = add_bad_columns(counts, bad_columns)
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
    add_point_sources(electrons, x, y, flux, *psf.at(x, y), STAMP_FLOOR_E)
    _add_galaxies(electrons, sky.galaxies, projection, psf, conditions)
    return electrons


def _add_galaxies(
    electrons: np.ndarray, galaxies: Galaxies, projection: TanProjection, psf: PsfField, conditions: Conditions
) -> None:
    x, y = projection.to_pixels(galaxies.ra_deg, galaxies.dec_deg)
    magnitude = band_magnitude(galaxies.magnitude_r, galaxies.g_minus_r, conditions.band)
    flux = flux_njy_from_magnitude(magnitude) * conditions.electrons_per_njy
    add_galaxies(electrons, x, y, flux, _galaxy_covariance_pix2(galaxies, projection), galaxies.is_bulge, psf)


def add_galaxies(
    image: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    flux: np.ndarray,
    covariance_pix2: np.ndarray,
    is_bulge: np.ndarray,
    psf: PsfField,
) -> None:
    """Add galaxies behind a PSF to `image` in place: each Gaussian of a profile convolved with each of the PSF.

    Parameters
    ----------
    image : (ny, nx) float64, changed in place
    x, y, flux : (n,) float64
    covariance_pix2 : (n, 3) float64 (xx, xy, yy) of an ellipse whose sigma is the half-light radius
    is_bulge : (n,) bool, the steep profile instead of the exponential one
    psf : PsfField
    """
    fwhm, e1, e2 = psf.at(x, y)
    root = np.sqrt(1.0 - e1**2 - e2**2)
    psf_shape = (ALPHA_PER_FWHM * fwhm[:, None]) ** 2 * np.stack([1.0 + e1, e2, 1.0 - e1], axis=1) / root[:, None]
    for steep, mixture in ((False, _DISC_MIXTURE), (True, _BULGE_MIXTURE)):
        chosen = is_bulge == steep
        for profile_weight, profile_sigma in mixture.T:
            for psf_weight, psf_sigma in _MOFFAT_MIXTURE.T:
                covariance = profile_sigma**2 * covariance_pix2[chosen] + psf_sigma**2 * psf_shape[chosen]
                covariance += np.array([1.0, 0.0, 1.0]) / 12.0
                add_gaussians(image, x[chosen], y[chosen], profile_weight * psf_weight * flux[chosen], covariance)


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
    return track_points(tracks.x_start[index], tracks.y_start[index], tracks.x_end[index], tracks.y_end[index])


def track_points(x_start: float, y_start: float, x_end: float, y_end: float) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced positions, at most half a pixel apart, along the track of one source."""
    dx, dy = x_end - x_start, y_end - y_start
    count = max(1, int(np.ceil(np.hypot(dx, dy) / _TRACK_STEP_PIX)))
    fraction = (np.arange(count) + 0.5) / count
    return x_start + fraction * dx, y_start + fraction * dy


def _add_tracks(electrons: np.ndarray, tracks: _Tracks, psf: PsfField, electrons_per_njy: float) -> None:
    for index in range(tracks.flux_njy.size):
        x, y = _track_points(tracks, index)
        flux = np.full(x.size, tracks.flux_njy[index] * electrons_per_njy / x.size)
        add_point_sources(electrons, x, y, flux, *psf.at(x, y), STAMP_FLOOR_E)


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
        row["good_pixels"] = has_good_pixels(float(tracks.x[index]), float(tracks.y[index]), unusable, cores)
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


def has_good_pixels(x: float, y: float, unusable: np.ndarray, cores: np.ndarray) -> bool:
    """Whether a source lies off the edge, off masked pixels, and off the cores (n, 2) of saturated stars."""
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


def add_cosmic_rays(
    counts: np.ndarray, stream: np.random.Generator, per_megapixel: float = 20.0
) -> tuple[np.ndarray, np.ndarray]:
    """Add straight tracks of charge in place; returns the pixels flagged (4 of 5 hits) and those that are not."""
    ny, nx = counts.shape
    flagged, missed = np.zeros(counts.shape, dtype=bool), np.zeros(counts.shape, dtype=bool)
    for _ in range(stream.poisson(per_megapixel * nx * ny / 1e6)):
        x, y = stream.uniform(0, nx), stream.uniform(0, ny)
        angle, length = stream.uniform(0, np.pi), 1.0 + stream.exponential(6.0)
        charge_e = 300.0 + stream.exponential(1500.0)
        step = np.arange(0.0, length)
        columns, rows = np.floor(x + step * np.cos(angle)).astype(int), np.floor(y + step * np.sin(angle)).astype(int)
        inside = (columns >= 0) & (columns < nx) & (rows >= 0) & (rows < ny)
        columns, rows = columns[inside], rows[inside]
        counts[rows, columns] += np.float32(charge_e)
        known = flagged if stream.uniform() < 0.8 else missed
        known[rows, columns] = True
    return flagged, missed & ~flagged


def add_bad_columns(counts: np.ndarray, stream: np.random.Generator, per_thousand: float = 2.0) -> np.ndarray:
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

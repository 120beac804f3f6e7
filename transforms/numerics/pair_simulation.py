"""Science and template images of one field, with the truth, to judge image differencing by.

A pair is made to be hard in the ways real ones are: PSFs that vary smoothly and on small scales and differ between
the epochs, two pixel grids joined by a distorted mapping with an astrometric error on small scales, a template that
is a stack of exposures of unlike seeing, stars into saturation and bleeds, defects, cosmic rays, stars that moved.
`simulate_pair` returns counts, variances, masks, and what was put where.

Not simulated: diffraction spikes, ghosts and wide halos, differential chromatic refraction, the brighter-fatter
effect, correlated noise in the template before it is warped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from transforms.numerics.image_rendering import (
    FULL_WELL_E,
    STAMP_FLOOR_E,
    PlaneWaves,
    PsfField,
    add_bad_columns,
    add_cosmic_rays,
    add_galaxies,
    add_point_sources,
    bleed_columns,
    draw_plane_waves,
    has_good_pixels,
    sky_level_electrons,
    track_points,
)
from transforms.numerics.sky_simulation import (
    ALPHA_PER_FWHM,
    MOFFAT_BETA,
    Conditions,
    Purpose,
    SimulationError,
    draw_magnitudes,
    far_apart,
    random_stream,
)

LEAST_SIDE_PIX, LARGEST_SIDE_PIX = 256, 8192
TRUTH_DTYPE = np.dtype(
    [
        ("kind", "U13"),
        ("x", "f8"),
        ("y", "f8"),
        ("dx", "f8"),
        ("dy", "f8"),
        ("flux", "f8"),
        ("snr", "f8"),
        ("good_pixels", "?"),
        ("in_host", "?"),
    ]
)
STAR_DTYPE = np.dtype(
    [("x", "f8"), ("y", "f8"), ("flux", "f8"), ("snr", "f8"), ("is_steady", "?"), ("is_saturated", "?")]
)

_BEYOND_EDGE_PIX = 40.0  # sources this far off the image still shine into it
_LEAST_SEPARATION_PIX = 24.0  # between injected sources
_SCIENCE, _TEMPLATE = 0, 1  # keys of random streams
_TEMPLATE_SEEINGS = (0.92, 1.08)  # of the two halves of the stack: a sum of Moffats is no Moffat
_STAMP_PIX, _TRAIL_STAMP_PIX = 64, 128
_FLUX_SLOPE = 0.24  # N(>F) ~ F^-0.6
_FAINTEST_SNR = 3.0
_SATURATION_MARGIN = 1.2  # peaks this much below the full well count as saturated: PSFs differ from place to place


@dataclass(frozen=True)
class Regime:
    """What kind of pair to simulate. Fluxes are electrons of the science image; densities per 1024^2 pixels.

    Attributes
    ----------
    fwhm_science_pix, fwhm_template_pix : FWHM of the Moffats at the centre, before pixel integration
    pixel_scale_arcsec : only to turn areas into square degrees
    sky_electrons_pix, read_noise_e, full_well_e : of the science image; a template exposure has the same
    n_stacked : exposures in the template, half of them of better and half of worse seeing than its mean
    template_scale : template counts of one science electron
    stars, galaxies : how many; stars count N(>F) ~ F^-0.6 from S/N 3 to `brightest_star_e`
    transients, variables, movers, trails, fast_stars, vanished : how many are injected at most (they keep 24 pixels
        apart); vanished ones are in the template only
    most_snr : injected S/N are even in log S/N from 3 to this
    psf_slope, psf_curvature : relative change of the FWHM from the centre to an edge
    psf_ripple, shape_ripple : rms of the small-scale change of the FWHM (relative), and of e1 and e2
    jitter_pix : rms of the small-scale astrometric error, each axis
    ripple_pix : shortest and longest wavelength of ripple and jitter
    """

    fwhm_science_pix: float
    fwhm_template_pix: float
    pixel_scale_arcsec: float = 0.2
    sky_electrons_pix: float = 900.0
    read_noise_e: float = 6.0
    full_well_e: float = FULL_WELL_E
    n_stacked: int = 10
    template_scale: float = 1.3
    stars: float = 700.0
    galaxies: float = 150.0
    brightest_star_e: float = 1.2e7
    transients: float = 110.0
    variables: float = 24.0
    movers: float = 8.0
    trails: float = 4.0
    fast_stars: float = 4.0
    vanished: float = 0.0
    most_snr: float = 50.0
    psf_slope: float = 0.04
    psf_curvature: float = 0.03
    psf_ripple: float = 0.01
    shape_ripple: float = 0.007
    jitter_pix: float = 0.02
    ripple_pix: tuple[float, float] = (200.0, 2000.0)


_LSST = Regime(4.75, 3.75)
REGIMES = MappingProxyType(
    {
        "lsst": _LSST,
        "sharp_science": replace(_LSST, fwhm_science_pix=3.5, fwhm_template_pix=4.4),
        "undersampled": Regime(
            2.3,
            2.0,
            pixel_scale_arcsec=1.01,
            read_noise_e=9.0,
            full_well_e=3e5,
            stars=1000.0,
            ripple_pix=(100.0, 2000.0),
        ),
        "crowded": replace(_LSST, stars=7000.0),
    }
)


@dataclass(frozen=True)
class PixelMapping:
    """From the plane of a field (pixels from its centre) to the pixels of one image.

    ``(x, y) = (centre_x, centre_y) + R(rotation) (u, v) + quadratic (u^2, u v, v^2)``; `jitter` comes on top of it in
    the image, as a function of (u, v), but is no part of what a WCS would say.

    Attributes
    ----------
    quadratic : (2, 3) float64, 1 / pixel
    jitter : two fields (along x and y), or None
    """

    centre_x: float
    centre_y: float
    rotation_deg: float = 0.0
    quadratic: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))
    jitter: PlaneWaves | None = None

    def to_pixels(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel positions by the WCS."""
        u, v = np.asarray(u, dtype=np.float64), np.asarray(v, dtype=np.float64)
        cosine, sine = np.cos(np.deg2rad(self.rotation_deg)), np.sin(np.deg2rad(self.rotation_deg))
        bent_x, bent_y = np.tensordot(self.quadratic, np.stack([u * u, u * v, v * v]), axes=1)
        return self.centre_x + cosine * u - sine * v + bent_x, self.centre_y + sine * u + cosine * v + bent_y

    def to_true_pixels(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel positions where the image has them: by the WCS plus jitter."""
        x, y = self.to_pixels(u, v)
        if self.jitter is None:
            return x, y
        off_x, off_y = self.jitter.at(u, v)
        return x + off_x, y + off_y

    def to_plane(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of `to_pixels`, by iteration: the distortion is small (< 1e-3), so six steps reach rounding."""
        cosine, sine = np.cos(np.deg2rad(self.rotation_deg)), np.sin(np.deg2rad(self.rotation_deg))
        u, v = np.asarray(x, dtype=np.float64) - self.centre_x, np.asarray(y, dtype=np.float64) - self.centre_y
        u, v = cosine * u + sine * v, cosine * v - sine * u
        for _ in range(6):
            back_x, back_y = self.to_pixels(u, v)
            off_x, off_y = x - back_x, y - back_y
            u, v = u + cosine * off_x + sine * off_y, v + cosine * off_y - sine * off_x
        return u, v

    def jacobian(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(n, 2, 2) derivatives of `to_pixels` at (n,) positions."""
        cosine, sine = np.cos(np.deg2rad(self.rotation_deg)), np.sin(np.deg2rad(self.rotation_deg))
        rows = [
            [cosine + 2 * self.quadratic[0, 0] * u + self.quadratic[0, 1] * v,
             -sine + self.quadratic[0, 1] * u + 2 * self.quadratic[0, 2] * v],
            [sine + 2 * self.quadratic[1, 0] * u + self.quadratic[1, 1] * v,
             cosine + self.quadratic[1, 1] * u + 2 * self.quadratic[1, 2] * v],
        ]  # fmt: skip
        return np.moveaxis(np.array(rows), 2, 0)


@dataclass(frozen=True, eq=False)
class PairImage:
    """One image of a pair.

    Attributes
    ----------
    image, variance : (n, n) float32, counts and counts^2; the variance is the true one
    bad, saturated, cosmic_ray : (n, n) bool, what its mask says
    hidden_cosmic_ray : (n, n) bool, hits that its mask does not know
    psfs : PSFs whose mean is that of the image; one for the science image
    mapping : PixelMapping
    saturation : counts at the full well
    """

    image: np.ndarray
    variance: np.ndarray
    bad: np.ndarray
    saturated: np.ndarray
    cosmic_ray: np.ndarray
    hidden_cosmic_ray: np.ndarray
    psfs: tuple[PsfField, ...]
    mapping: PixelMapping
    saturation: float

    @property
    def masked(self) -> np.ndarray:
        """(n, n) bool, all that the mask marks."""
        return self.bad | self.saturated | self.cosmic_ray

    def psf_stamp(self, x: float, y: float, size_pix: int, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
        """The pixel-integrated PSF of position (x, y), (size_pix, size_pix), at (dx, dy) from the middle pixel.

        Its sum is the part of the flux that falls on the stamp.
        """
        stamp = np.zeros((size_pix, size_pix))
        centre_x, centre_y = np.full(1, (size_pix - 1) // 2 + dx), np.full(1, (size_pix - 1) // 2 + dy)
        share = np.full(1, 1.0 / len(self.psfs))
        for psf in self.psfs:
            add_point_sources(stamp, centre_x, centre_y, share, *psf.at(np.array([x]), np.array([y])), 1e-12)
        return stamp


@dataclass(frozen=True, eq=False)
class SimulatedPair:
    """Two images of one field and the truth about their difference.

    Attributes
    ----------
    regime : Regime
    science, template : PairImage, each on its own grid
    light : (n, n) float32, expected science counts without sky and without defects
    truth : TRUTH_DTYPE rows, what differs. Kinds: transient, mover, trail (science only), vanished (template only,
        flux below 0), variable (flux is the change, of either sign), proper_motion (flux is the star's). x, y in
        science pixels, a trail's at its middle; dx, dy is a trail's vector, or how far a star moved; snr is that of an
        optimal measurement on both images; good_pixels: off edges, masks and saturated stars in both; in_host: placed
        on a galaxy
    stars : STAR_DTYPE rows, all stars; x, y in science pixels; snr with the star's own photon noise; `is_steady`
        when it is not in the truth; `is_saturated` in either image
    """

    regime: Regime
    science: PairImage
    template: PairImage
    light: np.ndarray
    truth: np.ndarray
    stars: np.ndarray

    def template_position(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Template pixels of science pixels, by the WCSs."""
        return self.template.mapping.to_pixels(*self.science.mapping.to_plane(x, y))

    @property
    def area_deg2(self) -> float:
        """Area of the science image in square degrees."""
        return float(self.science.image.size * (self.regime.pixel_scale_arcsec / 3600.0) ** 2)


@dataclass(frozen=True, eq=False)
class _Scene:
    """Everything steady, in the plane of the field; fluxes in science electrons."""

    star_u: np.ndarray
    star_v: np.ndarray
    star_flux: np.ndarray
    galaxy_u: np.ndarray
    galaxy_v: np.ndarray
    galaxy_flux: np.ndarray
    galaxy_covariance: np.ndarray  # (n, 3)
    is_bulge: np.ndarray


@dataclass(frozen=True, eq=False)
class _Changes:
    """What differs between the epochs, in the plane of the field; one row per source, in the order of the truth."""

    kind: np.ndarray
    star: np.ndarray  # index of the star that varies or moves, -1 for none
    u: np.ndarray
    v: np.ndarray
    du: np.ndarray
    dv: np.ndarray
    wanted_snr: np.ndarray  # with the sign of the flux; of a fast star what its flux makes it
    in_host: np.ndarray


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Where and how one image shows the field."""

    mapping: PixelMapping
    psfs: tuple[PsfField, ...]


def simulate_pair(seed: int, regime: Regime, size_pix: int) -> SimulatedPair:
    """Simulate a science image and a template of the same field.

    Parameters
    ----------
    seed : int
        >= 0; the same arguments give the same bytes.
    regime : Regime
        One of `REGIMES`, or one of your own.
    size_pix : int
        Side of both images, 256 to 8192. PSFs and sky change from edge to edge by the same, whatever the size.

    Returns
    -------
    SimulatedPair

    Raises
    ------
    SimulationError
        A size or a seed out of its interval.
    """
    if not LEAST_SIDE_PIX <= size_pix <= LARGEST_SIDE_PIX:
        raise SimulationError(
            f"the side of a pair must be between {LEAST_SIDE_PIX} and {LARGEST_SIDE_PIX} pixels, got {size_pix}"
        )
    shape = (size_pix, size_pix)
    scene = _draw_scene(random_stream(seed, Purpose.SKY), regime, size_pix)
    science_epoch, template_epoch = (_draw_epoch(seed, regime, shape, image) for image in (_SCIENCE, _TEMPLATE))
    changes = _draw_changes(random_stream(seed, Purpose.INJECTIONS), regime, scene, size_pix)
    template = _template_image(seed, regime, _as_in_template(scene, changes), template_epoch)

    slopes = random_stream(seed, Purpose.CONDITIONS).uniform(-0.05, 0.05, 2)
    sky = sky_level_electrons(shape, _conditions(regime, float(slopes[0]), float(slopes[1])))
    light = _static_electrons(scene, science_epoch, shape)
    steady_variance = (light + sky + regime.read_noise_e**2).astype(np.float32)
    flux, snr = _fluxes(changes, scene, science_epoch, template_epoch, steady_variance, template, regime)
    _add_changes(light, changes, flux, science_epoch)
    template = _with_vanished(template, seed, regime, changes, flux, template_epoch)
    science = _science_image(seed, regime, light + sky, science_epoch)
    stars = _star_rows(scene, changes, science_epoch, template_epoch, regime)
    truth = _truth_rows(changes, flux, snr, science, template, stars)
    return SimulatedPair(regime, science, template, light.astype(np.float32), truth, stars)


# --- what there is ---------------------------------------------------------------------------------------------


def _draw_scene(stream: np.random.Generator, regime: Regime, size_pix: int) -> _Scene:
    side = size_pix + 2 * _BEYOND_EDGE_PIX
    n_stars, n_galaxies = (round(density * (side / 1024.0) ** 2) for density in (regime.stars, regime.galaxies))
    faintest_e = _FAINTEST_SNR * _flux_error_e(regime, regime.fwhm_science_pix)
    star_u, star_v = stream.uniform(-side / 2, side / 2, (2, n_stars))
    magnitude = draw_magnitudes(
        stream, n_stars, -2.5 * np.log10(regime.brightest_star_e), -2.5 * np.log10(faintest_e), _FLUX_SLOPE
    )
    galaxy_u, galaxy_v = stream.uniform(-side / 2, side / 2, (2, n_galaxies))
    # galaxies of S/N 10 to 2500 as point sources; the brighter, the larger
    brightest_galaxy_e = 2500.0 * faintest_e / _FAINTEST_SNR
    galaxy_flux = 10.0 ** (
        -0.4
        * draw_magnitudes(stream, n_galaxies, -2.5 * np.log10(brightest_galaxy_e), -2.5 * np.log10(3 * faintest_e), 0.3)
    )
    half_light_arcsec = (
        0.45 * (galaxy_flux / (20.0 * faintest_e)) ** 0.25 * np.exp(0.25 * stream.standard_normal(n_galaxies))
    )
    half_light_pix = np.clip(half_light_arcsec / regime.pixel_scale_arcsec, 0.3, 15.0)
    ratio, angle = stream.uniform(0.3, 1.0, n_galaxies), stream.uniform(0.0, np.pi, n_galaxies)
    major, minor = half_light_pix**2, (ratio * half_light_pix) ** 2
    cosine, sine = np.cos(angle), np.sin(angle)
    covariance = np.stack(
        [
            major * cosine**2 + minor * sine**2,
            (major - minor) * cosine * sine,
            major * sine**2 + minor * cosine**2,
        ],
        axis=1,
    )
    is_bulge = stream.uniform(size=n_galaxies) < 0.25
    return _Scene(star_u, star_v, 10.0 ** (-0.4 * magnitude), galaxy_u, galaxy_v, galaxy_flux, covariance, is_bulge)


def _draw_changes(stream: np.random.Generator, regime: Regime, scene: _Scene, size_pix: int) -> _Changes:
    megapixels = (size_pix / 1024.0) ** 2
    count = {
        kind: round(density * megapixels)
        for kind, density in (
            ("proper_motion", regime.fast_stars),
            ("variable", regime.variables),
            ("transient", regime.transients),
            ("mover", regime.movers),
            ("trail", regime.trails),
            ("vanished", regime.vanished),
        )
    }
    star_snr = scene.star_flux / np.sqrt(scene.star_flux + _flux_error_e(regime, regime.fwhm_science_pix) ** 2)
    unsaturated = _peak_e(scene.star_flux, regime.fwhm_science_pix) < 0.5 * regime.full_well_e
    inside = np.maximum(np.abs(scene.star_u), np.abs(scene.star_v)) < size_pix / 2
    suited = stream.permutation(np.flatnonzero(unsaturated & inside & (star_snr > 15.0)))
    star = suited[: count["proper_motion"] + count["variable"]]
    is_fast = np.arange(star.size) < count["proper_motion"]

    free_kinds = ("transient", "mover", "trail", "vanished")
    n_free = sum(count[name] for name in free_kinds)
    free_u, free_v = stream.uniform(-size_pix / 2, size_pix / 2, (2, n_free))
    free_kind = np.repeat(free_kinds, [count[name] for name in free_kinds])
    hosts = np.flatnonzero(np.maximum(np.abs(scene.galaxy_u), np.abs(scene.galaxy_v)) < size_pix / 2)
    may_have_host = np.isin(free_kind, ("transient", "vanished")) & (np.arange(n_free) % 3 == 0)
    hosted = np.flatnonzero(may_have_host) if hosts.size else np.zeros(0, int)
    host = hosts[stream.integers(hosts.size, size=hosted.size)] if hosts.size else hosted
    angle, radius = stream.uniform(0.0, 2 * np.pi, hosted.size), stream.uniform(0.0, 2.5, hosted.size)
    root_xx = np.sqrt(scene.galaxy_covariance[host, 0])  # an ellipse by its Cholesky factor
    root_xy = scene.galaxy_covariance[host, 1] / root_xx
    root_yy = np.sqrt(scene.galaxy_covariance[host, 2] - root_xy**2)
    free_u[hosted] = scene.galaxy_u[host] + radius * np.cos(angle) * root_xx
    free_v[hosted] = scene.galaxy_v[host] + radius * (np.cos(angle) * root_xy + np.sin(angle) * root_yy)

    length = np.where(free_kind == "trail", stream.uniform(8.0, 40.0, n_free), 0.0)
    heading = stream.uniform(0.0, 2 * np.pi, star.size + n_free)
    shift = np.where(is_fast, np.exp(stream.uniform(np.log(0.15), np.log(2.0), star.size)), 0.0)
    reach = np.concatenate([shift, length])
    least, most = np.log([_FAINTEST_SNR, regime.most_snr])
    snr = np.exp(stream.uniform(least, most, reach.size))
    kind = np.concatenate([np.where(is_fast, "proper_motion", "variable"), free_kind])
    brighter = stream.uniform(size=reach.size) < 0.5
    snr = np.where(((kind == "variable") & ~brighter) | (kind == "vanished"), -snr, snr)
    u, v = np.concatenate([scene.star_u[star], free_u]), np.concatenate([scene.star_v[star], free_v])
    index = np.concatenate([star, np.full(n_free, -1)])
    in_host = np.zeros(reach.size, dtype=bool)
    in_host[star.size + hosted] = True
    keep = far_apart(u, v, _LEAST_SEPARATION_PIX)
    du, dv = reach * np.cos(heading), reach * np.sin(heading)
    return _Changes(kind[keep], index[keep], u[keep], v[keep], du[keep], dv[keep], snr[keep], in_host[keep])


def _as_in_template(scene: _Scene, changes: _Changes) -> _Scene:
    """The scene with fast stars where they were."""
    fast = changes.kind == "proper_motion"
    u, v = scene.star_u.copy(), scene.star_v.copy()
    u[changes.star[fast]] -= changes.du[fast]
    v[changes.star[fast]] -= changes.dv[fast]
    return replace(scene, star_u=u, star_v=v)


def _flux_error_e(regime: Regime, fwhm_pix: float) -> float:
    """Error of the optimal flux of a faint point source on the science image's sky."""
    alpha = ALPHA_PER_FWHM * fwhm_pix
    effective_pixels = np.pi * alpha**2 * (2 * MOFFAT_BETA - 1) / (MOFFAT_BETA - 1) ** 2
    return float(np.sqrt((regime.sky_electrons_pix + regime.read_noise_e**2) * effective_pixels))


def _peak_e(flux_e: np.ndarray, fwhm_pix: float) -> np.ndarray:
    """Central surface brightness of stars, electrons per pixel."""
    return np.asarray(flux_e * (MOFFAT_BETA - 1) / (np.pi * (ALPHA_PER_FWHM * fwhm_pix) ** 2))


# --- how it is seen --------------------------------------------------------------------------------------------


def _draw_epoch(seed: int, regime: Regime, shape: tuple[int, int], image: int) -> _Epoch:
    """Mapping and PSFs of one image. The science image's grid is the plane, but for its own distortion."""
    stream = random_stream(seed, Purpose.ASTROMETRY, image)
    centre = (shape[0] - 1) / 2
    rotation, offset_x, offset_y = stream.uniform(-1.0, 1.0, 3) * (image == _TEMPLATE)
    calm = np.sqrt(regime.n_stacked) if image == _TEMPLATE else 1.0
    quadratic = 2e-7 * stream.standard_normal((2, 3))
    jitter = draw_plane_waves(stream, (regime.jitter_pix / calm,) * 2, *regime.ripple_pix)
    mapping = PixelMapping(
        centre + 5.0 * float(offset_x), centre + 5.0 * float(offset_y), 0.1 * float(rotation), quadratic, jitter
    )
    stream = random_stream(seed, Purpose.PSF, image)
    if image == _SCIENCE:
        return _Epoch(mapping, (_draw_psf(stream, regime, shape, regime.fwhm_science_pix, 1.0),))
    calm = np.sqrt(regime.n_stacked / len(_TEMPLATE_SEEINGS))
    return _Epoch(
        mapping,
        tuple(
            _draw_psf(stream, regime, shape, regime.fwhm_template_pix * seeing, calm) for seeing in _TEMPLATE_SEEINGS
        ),
    )


def _draw_psf(
    stream: np.random.Generator, regime: Regime, shape: tuple[int, int], fwhm_pix: float, calm: float
) -> PsfField:
    angle = stream.uniform(0.0, 2 * np.pi)
    shapes = stream.uniform(-1.0, 1.0, 4) * np.array([0.04, 0.04, 0.02, 0.02])
    e1, e2, e1_slope, e2_slope = (float(value) for value in shapes)
    rms = (regime.psf_ripple / calm, regime.shape_ripple / calm, regime.shape_ripple / calm)
    return PsfField(
        shape,
        fwhm_pix,
        regime.psf_slope * float(np.cos(angle)),
        regime.psf_slope * float(np.sin(angle)),
        regime.psf_curvature * stream.uniform(-1.0, 1.0),
        e1,
        e2,
        e1_slope,
        e2_slope,
        draw_plane_waves(stream, rms, *regime.ripple_pix),
    )


def _conditions(regime: Regime, slope_x: float = 0.0, slope_y: float = 0.0) -> Conditions:
    seeing_arcsec = regime.fwhm_science_pix * regime.pixel_scale_arcsec
    return Conditions("r", 30.0, seeing_arcsec, 1.0, regime.sky_electrons_pix, slope_x, slope_y)


def _static_electrons(scene: _Scene, epoch: _Epoch, shape: tuple[int, int]) -> np.ndarray:
    """Expected electrons of stars and galaxies, without sky."""
    electrons = np.zeros(shape)
    mapping = epoch.mapping
    star_x, star_y = mapping.to_true_pixels(scene.star_u, scene.star_v)
    galaxy_x, galaxy_y = mapping.to_true_pixels(scene.galaxy_u, scene.galaxy_v)
    xx, xy, yy = scene.galaxy_covariance.T
    tensor = np.moveaxis(np.array([[xx, xy], [xy, yy]]), 2, 0)
    jacobian = mapping.jacobian(scene.galaxy_u, scene.galaxy_v)
    tensor = jacobian @ tensor @ np.swapaxes(jacobian, 1, 2)
    covariance = np.stack([tensor[:, 0, 0], tensor[:, 0, 1], tensor[:, 1, 1]], axis=1)
    for psf in epoch.psfs:
        share = 1.0 / len(epoch.psfs)
        add_point_sources(electrons, star_x, star_y, share * scene.star_flux, *psf.at(star_x, star_y), STAMP_FLOOR_E)
        add_galaxies(electrons, galaxy_x, galaxy_y, share * scene.galaxy_flux, covariance, scene.is_bulge, psf)
    return electrons


def _template_image(seed: int, regime: Regime, scene: _Scene, epoch: _Epoch) -> PairImage:
    """Mean of `n_stacked` exposures, scaled, without sky; bleeds are gone with the stacking, saturated cores not."""
    shape = epoch.psfs[0].shape
    electrons = _static_electrons(scene, epoch, shape) + regime.sky_electrons_pix
    saturated = electrons >= regime.full_well_e
    np.minimum(electrons, regime.full_well_e, out=electrons)
    variance = (electrons + regime.read_noise_e**2) / regime.n_stacked
    noise = random_stream(seed, Purpose.TEMPLATE_NOISE).standard_normal(shape)
    counts = electrons - regime.sky_electrons_pix + np.sqrt(variance) * noise
    scale, nothing = regime.template_scale, np.zeros(shape, dtype=bool)
    return PairImage(
        (scale * counts).astype(np.float32),
        (scale**2 * variance).astype(np.float32),
        nothing,
        saturated,
        nothing,
        nothing,
        epoch.psfs,
        epoch.mapping,
        scale * (regime.full_well_e - regime.sky_electrons_pix),
    )


def _science_image(seed: int, regime: Regime, electrons: np.ndarray, epoch: _Epoch) -> PairImage:
    """One exposure with bleeds, noise, cosmic rays and bad columns, sky left in. `electrons` is used up."""
    bleed_columns(electrons, regime.full_well_e)
    saturated = electrons >= regime.full_well_e
    stream = random_stream(seed, Purpose.SCIENCE_NOISE)
    counts = stream.poisson(electrons).astype(np.float32)
    counts += np.float32(regime.read_noise_e) * stream.standard_normal(electrons.shape, dtype=np.float32)
    cosmic_ray, hidden = add_cosmic_rays(counts, random_stream(seed, Purpose.COSMIC_RAYS))
    bad = add_bad_columns(counts, random_stream(seed, Purpose.BAD_COLUMNS))
    variance = (electrons + regime.read_noise_e**2).astype(np.float32)
    hidden &= ~(bad | saturated)
    return PairImage(
        counts, variance, bad, saturated, cosmic_ray, hidden, epoch.psfs, epoch.mapping, regime.full_well_e
    )


# --- the truth -------------------------------------------------------------------------------------------------


def _fluxes(
    changes: _Changes,
    scene: _Scene,
    science: _Epoch,
    template: _Epoch,
    science_variance: np.ndarray,
    template_image: PairImage,
    regime: Regime,
) -> tuple[np.ndarray, np.ndarray]:
    """Signed flux and optimal S/N of each change; a variable's flux is limited to 0.7 of its star's mean."""
    x, y = science.mapping.to_true_pixels(changes.u, changes.v)
    template_x, template_y = template.mapping.to_true_pixels(changes.u, changes.v)
    local_science = _local_mean(science_variance, x, y)
    local_template = _local_mean(template_image.variance, template_x, template_y) / regime.template_scale**2
    flux, snr = np.zeros(x.size), np.zeros(x.size)
    for row in range(x.size):
        signal, science_psf, template_psf = _profiles(changes, row, science, template, (x[row], y[row]))
        unit_snr = _optimal_snr(signal, science_psf, template_psf, local_science[row], local_template[row])
        flux[row] = changes.wanted_snr[row] / unit_snr
        if changes.kind[row] == "variable":
            limit = 0.7 * scene.star_flux[changes.star[row]]
            flux[row] = np.clip(flux[row], -limit, limit)
        elif changes.kind[row] == "proper_motion":
            flux[row] = scene.star_flux[changes.star[row]]
        snr[row] = abs(flux[row]) * unit_snr
    return flux, snr


def _profiles(
    changes: _Changes, row: int, science: _Epoch, template: _Epoch, position: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a change of unit flux looks like, and the PSFs of both images there, each on a stamp of its own."""
    kind, at = changes.kind[row], (np.full(1, position[0]), np.full(1, position[1]))
    side = _TRAIL_STAMP_PIX if kind == "trail" else _STAMP_PIX
    middle = np.full(1, side / 2.0)
    science_psf, template_psf = np.zeros((side, side)), np.zeros((side, side))
    local = science.psfs[0].at(*at)
    add_point_sources(science_psf, middle, middle, np.ones(1), *local, 1.0)
    for psf in template.psfs:
        add_point_sources(template_psf, middle, middle, np.full(1, 1.0 / len(template.psfs)), *psf.at(*at), 1.0)
    signal = science_psf
    if kind == "trail":
        x, y = _trail_points(side / 2.0, side / 2.0, changes.du[row], changes.dv[row])
        signal = np.zeros((side, side))
        add_point_sources(
            signal, x, y, np.full(x.size, 1.0 / x.size), *(np.repeat(value, x.size) for value in local), 1.0
        )
    elif kind == "proper_motion":
        before = np.zeros((side, side))
        add_point_sources(before, middle - changes.du[row], middle - changes.dv[row], np.ones(1), *local, 1.0)
        signal = science_psf - before
    return signal, science_psf, template_psf


def _optimal_snr(
    signal: np.ndarray,
    science_psf: np.ndarray,
    template_psf: np.ndarray,
    science_variance: float,
    template_variance: float,
) -> float:
    """S/N of a known signal in the proper difference of two images with white noise.

    ``sqrt(mean_k |Q|^2 |P_t|^2 / (v_s |P_t|^2 + v_t |P_s|^2))`` over the frequencies of a stamp (Zackay, Ofek &
    Gal-Yam 2016, eqs. 12 to 17, for a signal Q instead of a point source): no linear method gets more.
    """
    q, p_s, p_t = (np.abs(np.fft.rfft2(stamp)) ** 2 for stamp in (signal, science_psf, template_psf))
    twice = np.full(q.shape[1], 2.0)  # frequencies that rfft2 leaves out
    twice[0] = twice[-1] = 1.0
    noise = science_variance * p_t + template_variance * p_s
    return float(np.sqrt(np.sum(twice * q * p_t / np.maximum(noise, 1e-300)) / signal.size))


def _local_mean(plane: np.ndarray, x: np.ndarray, y: np.ndarray, half_width: int = 2) -> np.ndarray:
    """(n,) means of a plane over boxes, of the nearest box inside the image for sources near its edge."""
    offset = np.arange(-half_width, half_width + 1)
    ny, nx = plane.shape
    column = np.clip(np.rint(x).astype(int), half_width, nx - 1 - half_width)
    row = np.clip(np.rint(y).astype(int), half_width, ny - 1 - half_width)
    boxes = plane[row[:, None, None] + offset[:, None], column[:, None, None] + offset[None, :]]
    return np.asarray(boxes.mean(axis=(1, 2), dtype=np.float64))


def _trail_points(x: float, y: float, dx: float, dy: float) -> tuple[np.ndarray, np.ndarray]:
    return track_points(x - dx / 2, y - dy / 2, x + dx / 2, y + dy / 2)


def _add_changes(light: np.ndarray, changes: _Changes, flux: np.ndarray, epoch: _Epoch) -> None:
    """Add to the science image what is not in the static scene: fast stars are."""
    x, y = epoch.mapping.to_true_pixels(changes.u, changes.v)
    (psf,) = epoch.psfs
    for row in np.flatnonzero(~np.isin(changes.kind, ("proper_motion", "vanished"))):
        is_trail = changes.kind[row] == "trail"
        dx, dy = (changes.du[row], changes.dv[row]) if is_trail else (0.0, 0.0)
        track_x, track_y = _trail_points(x[row], y[row], dx, dy)
        share = np.full(track_x.size, flux[row] / track_x.size)
        # along a track the PSF of its middle: what the truth's S/N is computed with
        local = (np.repeat(value, track_x.size) for value in psf.at(x[row : row + 1], y[row : row + 1]))
        add_point_sources(light, track_x, track_y, share, *local, STAMP_FLOOR_E)


def _with_vanished(
    image: PairImage, seed: int, regime: Regime, changes: _Changes, flux: np.ndarray, epoch: _Epoch
) -> PairImage:
    """The template with what is gone from the science image, and its photon noise."""
    gone = changes.kind == "vanished"
    if not gone.any():
        return image
    light = np.zeros(image.image.shape)
    x, y = epoch.mapping.to_true_pixels(changes.u[gone], changes.v[gone])
    for psf in epoch.psfs:
        add_point_sources(light, x, y, -flux[gone] / len(epoch.psfs), *psf.at(x, y), STAMP_FLOOR_E)
    variance = light / regime.n_stacked
    noise = random_stream(seed, Purpose.TEMPLATE_NOISE, 1).standard_normal(light.shape)
    scale = regime.template_scale
    counts = np.minimum(image.image + scale * (light + np.sqrt(variance) * noise), image.saturation)
    return replace(
        image,
        image=counts.astype(np.float32),
        variance=(image.variance + scale**2 * variance).astype(np.float32),
        saturated=image.saturated | (counts >= image.saturation),
    )


def _star_rows(scene: _Scene, changes: _Changes, science: _Epoch, template: _Epoch, regime: Regime) -> np.ndarray:
    rows = np.zeros(scene.star_u.size, dtype=STAR_DTYPE)
    rows["x"], rows["y"] = science.mapping.to_true_pixels(scene.star_u, scene.star_v)
    rows["flux"] = scene.star_flux
    rows["snr"] = scene.star_flux / np.sqrt(scene.star_flux + _flux_error_e(regime, regime.fwhm_science_pix) ** 2)
    rows["is_steady"] = True
    rows["is_steady"][changes.star[changes.star >= 0]] = False
    sharpest = min(psf.fwhm_pix for psf in (*science.psfs, *template.psfs))
    peak = _peak_e(scene.star_flux, sharpest) + regime.sky_electrons_pix
    rows["is_saturated"] = _SATURATION_MARGIN * peak > regime.full_well_e
    return rows


def _truth_rows(
    changes: _Changes, flux: np.ndarray, snr: np.ndarray, science: PairImage, template: PairImage, stars: np.ndarray
) -> np.ndarray:
    """Rows of what lies on the science image."""
    rows = np.zeros(changes.kind.size, dtype=TRUTH_DTYPE)
    rows["kind"], rows["dx"], rows["dy"] = changes.kind, changes.du, changes.dv
    rows["x"], rows["y"] = science.mapping.to_true_pixels(changes.u, changes.v)
    rows["flux"], rows["snr"], rows["in_host"] = flux, snr, changes.in_host
    saturated = stars[stars["is_saturated"]]
    cores = np.stack([saturated["x"], saturated["y"]], axis=1)
    science_masked, template_masked = science.masked, template.masked
    template_x, template_y = template.mapping.to_true_pixels(changes.u, changes.v)
    for row, x, y in zip(rows, template_x, template_y, strict=True):
        row["good_pixels"] = has_good_pixels(float(row["x"]), float(row["y"]), science_masked, cores)
        row["good_pixels"] &= has_good_pixels(float(x), float(y), template_masked, np.zeros((0, 2)))
    ny, nx = science_masked.shape
    on_image = (rows["x"] >= -0.5) & (rows["x"] < nx - 0.5) & (rows["y"] >= -0.5) & (rows["y"] < ny - 0.5)
    return rows[on_image]

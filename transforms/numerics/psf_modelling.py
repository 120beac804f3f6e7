"""Finding stars, and the mean point-spread function of an exposure from its bright, isolated, unsaturated stars."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sep
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from transforms.numerics.warping import HALF_TAPS, TAPS, sinc_weights

MIN_PSF_STARS = 5
_DETECTION_SIGMA = 5.0
_MIN_AREA_PIX = 5
_CORE_BOX_PIX = 5  # no bad pixel may lie in the box of this side around a star's peak
_MAX_ELLIPTICITY, _ELLIPTICITY_MARGIN = 0.3, 0.1
_BRIGHT_PART, _LEAST_BRIGHT = 0.25, 40  # sizes are isophotal: too small for faint stars, which rule a crowded field
_MIN_HALF_LIGHT_PIX = 0.8  # sharper things are cosmic rays and hot pixels
_LOCUS_HALF_WIDTH = 0.12  # of the stars' half-light radius; holds a PSF that changes by +-10 %
_NEIGHBOUR_FLUX_RATIO = 0.05
_MODEL_ERROR = 0.02  # of the star's own light: keeps the brightest stars from ruling the mean
_CLIP_SIGMA = 4.0
_N_ITERATIONS = 3
_FWHM_OVERSAMPLING = 10
_WING_RADIUS_FWHM = 1.5


class PsfEstimationError(ValueError):
    """A PSF that cannot be measured; the message says how many stars were found, and what was refused."""


@dataclass(frozen=True, eq=False)
class DetectedSources:
    """Sources of one image, brightest first; arrays of shape (n,).

    Attributes
    ----------
    x, y : float64, pixels, 0-based
    flux : float64, isophotal, image's unit
    snr : float64, signal-to-noise ratio of `flux`
    half_light_radius_pix : float64
    ellipticity : float64, 1 - minor / major axis
    clean : bool, no bad pixel in the core, not cut by the image's edge
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    snr: NDArray[np.float64]
    half_light_radius_pix: NDArray[np.float64]
    ellipticity: NDArray[np.float64]
    clean: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PsfEstimate:
    """Mean PSF of an image.

    Attributes
    ----------
    psf : (k, k) float64, odd, centred on the middle pixel, sum 1
    fwhm_pix : full width at half maximum
    n_stars : stars it was made from
    """

    psf: NDArray[np.float64]
    fwhm_pix: float
    n_stars: int


def detect_sources(
    image: NDArray[np.floating], variance: NDArray[np.floating], bad: NDArray[np.bool_]
) -> DetectedSources:
    """Find sources above 5 sigma per pixel, for choosing stars (not for science).

    Parameters
    ----------
    image : (ny, nx) floating, background subtracted
    variance : (ny, nx) floating, square of the image's unit, > 0 where not `bad`
    bad : (ny, nx) bool, True for pixels to leave out

    Returns
    -------
    DetectedSources

    Raises
    ------
    PsfEstimationError : the detection fails (message of sep within, such as too many sources in a blend)
    """
    pixels = np.where(bad, 0.0, image).astype(np.float32, order="C")
    noise = np.sqrt(np.where(bad, 1.0, variance)).astype(np.float32, order="C")
    mask = np.ascontiguousarray(bad, dtype=np.bool_)
    sep.set_extract_pixstack(max(pixels.size, 300_000))
    try:
        found = sep.extract(pixels, _DETECTION_SIGMA, err=noise, mask=mask, minarea=_MIN_AREA_PIX)
    except Exception as error:  # sep raises bare Exception
        raise PsfEstimationError(f"source detection failed on an image of shape {pixels.shape}: {error}") from error
    found = found[(found["flux"] > 0) & (found["a"] > 0)]
    found = found[np.lexsort((found["x"], found["y"], -found["flux"]))]
    x, y = found["x"].astype(np.float64), found["y"].astype(np.float64)
    flux = found["flux"].astype(np.float64)
    radius, _ = sep.flux_radius(pixels, x, y, np.maximum(6.0 * found["a"], 6.0), 0.5, normflux=flux, mask=mask)
    near_bad = ndimage.maximum_filter(mask, _CORE_BOX_PIX)
    column, row = np.rint(x).astype(np.intp), np.rint(y).astype(np.intp)
    return DetectedSources(
        x=x,
        y=y,
        flux=flux,
        snr=flux / (noise[row, column] * np.sqrt(found["npix"])),
        half_light_radius_pix=np.asarray(radius, dtype=np.float64),
        ellipticity=1.0 - found["b"] / found["a"],
        clean=(found["flag"] & ~sep.OBJ_MERGED == 0) & ~near_bad[row, column],
    )


def estimate_psf(
    image: NDArray[np.floating],
    variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    sources: DetectedSources | None = None,
    half_width_pix: int = 15,
    min_snr: float = 30.0,
    max_stars: int = 150,
) -> PsfEstimate:
    """Stack bright, isolated, unsaturated stars to a mean PSF.

    Stars are, of the brightest quarter, the sources of the most frequent size (half-sample mode of the half-light
    radius). Each is centred
    by a Gaussian-weighted centroid and a sub-pixel shift. Then, three times: flux by least squares with the
    current PSF, weighted mean of the normalised stamps with pixels beyond 4 sigma left out. Beyond 1.5 FWHM the
    mean of a ring stands for its pixels.

    Parameters
    ----------
    image : (ny, nx) floating, background subtracted
    variance : (ny, nx) floating, square of the image's unit
    bad : (ny, nx) bool; saturated pixels must be among them
    sources : result of `detect_sources` on these arrays, if there is one already
    half_width_pix : half side of the stamp, >= 5; 3 FWHM hold 99.6 % of a Moffat star (beta 3.5)
    min_snr : least signal-to-noise ratio of a star, > 0
    max_stars : the brightest so many are used

    Returns
    -------
    PsfEstimate

    Raises
    ------
    PsfEstimationError : fewer than 5 stars are left

    Notes
    -----
    One PSF for the whole image: where the PSF varies by +-6 % this is its mean. From 7 to 18 simulated Moffat stars
    the profile is recovered to 1 to 3 % of its peak and least-squares fluxes to 1.3 % (2.5 pixels FWHM: 3 % and 1 %,
    with a FWHM 2 to 4 % too wide, as the sub-pixel shift smooths; tests/numerics/test_psf_modelling.py).
    """
    bad = np.ascontiguousarray(bad, dtype=np.bool_)
    if sources is None:
        sources = detect_sources(image, variance, bad)
    chosen, half_light = _choose_stars(sources, np.shape(image), half_width_pix, min_snr, max_stars)
    pixels = np.where(bad, 0.0, image).astype(np.float32, order="C")
    x, y, flags = sep.winpos(pixels, sources.x[chosen], sources.y[chosen], 2.0 * half_light / 2.3548, mask=bad)
    moved = np.hypot(x - sources.x[chosen], y - sources.y[chosen])
    settled = (moved < half_light) & (flags & ~sep.APER_HASMASKED == 0)
    if np.count_nonzero(settled) < MIN_PSF_STARS:
        raise PsfEstimationError(f"only {np.count_nonzero(settled)} of {len(chosen)} stars have a stable centre")
    stamps, weights = _centred_stamps(pixels, variance, bad, x[settled], y[settled], half_width_pix)
    whole = (np.mean(weights > 0, axis=(1, 2)) > 0.5) & (stamps.sum(axis=(1, 2)) > 0)
    if np.count_nonzero(whole) < MIN_PSF_STARS:
        raise PsfEstimationError(
            f"only {np.count_nonzero(whole)} of {len(chosen)} stars have more good pixels than bad"
        )
    psf = _with_mean_wings(_stack(stamps[whole], weights[whole]))
    return PsfEstimate(psf=psf, fwhm_pix=psf_fwhm_pix(psf), n_stars=int(np.count_nonzero(whole)))


def psf_fwhm_pix(psf: NDArray[np.floating]) -> float:
    """Full width at half maximum: diameter of the circle with the area in which the PSF exceeds half its maximum.

    Parameters
    ----------
    psf : (k, k) floating, k odd and >= 5, one peak near the middle

    Returns
    -------
    FWHM in pixels; good to 1 % for FWHM >= 2 pixels (cubic spline between pixels)

    Raises
    ------
    PsfEstimationError : not such an array, not finite, or without a positive peak
    """
    psf = np.asarray(psf, dtype=np.float64)
    if psf.ndim != 2 or psf.shape[0] != psf.shape[1] or psf.shape[0] % 2 == 0 or psf.shape[0] < 5:
        raise PsfEstimationError(f"a PSF is square with an odd side of at least 5, got shape {psf.shape}")
    if not np.all(np.isfinite(psf)) or psf.max() <= 0:
        raise PsfEstimationError(f"a PSF must be finite with a positive peak, its maximum is {psf.max()}")
    fine = ndimage.zoom(psf, _FWHM_OVERSAMPLING, order=3, mode="nearest", grid_mode=True)
    above = np.count_nonzero(fine > 0.5 * fine.max()) / _FWHM_OVERSAMPLING**2
    return float(2.0 * np.sqrt(above / np.pi))


def _choose_stars(
    sources: DetectedSources, shape: tuple[int, ...], half_width_pix: int, min_snr: float, max_stars: int
) -> tuple[NDArray[np.intp], float]:
    """Indices of the stars, brightest first, and their half-light radius."""
    margin = half_width_pix + HALF_TAPS + 1
    inside = (np.minimum(sources.x, sources.y) >= margin) & (sources.x < shape[1] - margin)
    inside &= sources.y < shape[0] - margin
    sized = (sources.half_light_radius_pix > _MIN_HALF_LIGHT_PIX) & (sources.snr >= min_snr)
    candidates = np.flatnonzero(sources.clean & inside & sized)
    candidates = candidates[: max(int(_BRIGHT_PART * len(candidates)), _LEAST_BRIGHT)]
    typical = float(np.median(sources.ellipticity[candidates])) if len(candidates) else 0.0
    round_enough = max(_MAX_ELLIPTICITY, typical + _ELLIPTICITY_MARGIN)  # a guiding error is no reason to have no PSF
    candidates = candidates[sources.ellipticity[candidates] < round_enough]
    evidence = f"{len(sources.x)} sources, {len(candidates)} bright, round, clean and above S/N {min_snr:g}"
    if len(candidates) < MIN_PSF_STARS:
        raise PsfEstimationError(f"too few stars for a PSF: {evidence}; {MIN_PSF_STARS} are needed")
    half_light = _half_sample_mode(sources.half_light_radius_pix[candidates])
    alike = np.abs(sources.half_light_radius_pix[candidates] / half_light - 1.0) < _LOCUS_HALF_WIDTH
    candidates = candidates[alike]
    # the widest isolation that leaves enough stars; clipping takes what neighbours leave in the stamps
    for radius_pix in (1.2 * half_width_pix, 0.6 * half_width_pix):
        chosen = candidates[_is_isolated(sources, candidates, radius_pix)][:max_stars]
        if len(chosen) >= 2 * MIN_PSF_STARS:
            break
    if len(chosen) < MIN_PSF_STARS:
        raise PsfEstimationError(
            f"too few stars for a PSF: {evidence}, {len(candidates)} of the most frequent size "
            f"({half_light:.2f} pixels), {len(chosen)} isolated; {MIN_PSF_STARS} are needed"
        )
    return chosen, half_light


def _half_sample_mode(values: NDArray[np.float64]) -> float:
    """Mode by halving: keep the shortest interval with half of the values until a few are left."""
    kept = np.sort(values)
    while len(kept) > 3:
        half = -(-len(kept) // 2)
        start = int(np.argmin(kept[half - 1 :] - kept[: len(kept) - half + 1]))
        kept = kept[start : start + half]
    return float(np.mean(kept))


def _is_isolated(sources: DetectedSources, chosen: NDArray[np.intp], radius_pix: float) -> NDArray[np.bool_]:
    """True for chosen sources without a neighbour of more than 5 % of their flux within a radius."""
    positions = np.column_stack((sources.x, sources.y))
    neighbours = cKDTree(positions).query_ball_point(positions[chosen], radius_pix)
    return np.array(
        [
            all(other == own or sources.flux[other] < _NEIGHBOUR_FLUX_RATIO * sources.flux[own] for other in near)
            for own, near in zip(chosen, neighbours, strict=True)
        ],
        dtype=np.bool_,
    )


def _centred_stamps(
    pixels: NDArray[np.float32],
    variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    half_width_pix: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Stamps shifted so that stars are on the middle pixel, and inverse variances (0 for bad pixels); (n, k, k)."""
    first_x, first_y = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
    side = 2 * half_width_pix + 1
    # taps go from -3 to +4
    offset = np.arange(-half_width_pix - HALF_TAPS + 1, half_width_pix + HALF_TAPS + 1)
    rows, columns = first_y[:, None, None] + offset[:, None], first_x[:, None, None] + offset[None, :]
    raw = pixels[rows, columns].astype(np.float64)
    unusable = bad[rows, columns]
    weight_x, weight_y = sinc_weights(x - first_x), sinc_weights(y - first_y)
    stamps = np.zeros((len(x), side, side))
    for b in range(TAPS):
        for a in range(TAPS):
            weight = (weight_y[:, b] * weight_x[:, a])[:, None, None]
            stamps += weight * raw[:, b : b + side, a : a + side]
    near = slice(HALF_TAPS - 1, HALF_TAPS - 1 + side)
    touched = ndimage.maximum_filter(unusable, size=(1, TAPS, TAPS), origin=(0, -1, -1))[:, near, near]
    inverse_variance = 1.0 / np.where(touched, np.inf, variance[rows, columns][:, near, near])
    return stamps, inverse_variance


def _stack(stamps: NDArray[np.float64], inverse_variance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Clipped weighted mean of stamps scaled to unit flux; sum 1."""
    core = slice(stamps.shape[1] // 4, -(stamps.shape[1] // 4))
    flux = np.maximum(stamps[:, core, core].sum(axis=(1, 2)), 0.5 * stamps.sum(axis=(1, 2)))
    usable = inverse_variance > 0
    psf = np.median(stamps / flux[:, None, None], axis=0)
    with np.errstate(divide="ignore"):
        variance = 1.0 / inverse_variance
    for _ in range(_N_ITERATIONS):
        weight = usable / (variance + (_MODEL_ERROR * flux[:, None, None] * psf) ** 2)
        flux = np.sum(weight * stamps * psf, axis=(1, 2)) / np.sum(weight * psf**2, axis=(1, 2))
        error = np.sqrt(variance + (_MODEL_ERROR * flux[:, None, None] * psf) ** 2)
        kept = usable & (np.abs(stamps - flux[:, None, None] * psf) < _CLIP_SIGMA * error)
        weight = kept * (flux[:, None, None] / error) ** 2
        total = weight.sum(axis=0)
        mean = np.sum(weight * stamps / flux[:, None, None], axis=0) / np.where(total > 0, total, 1.0)
        psf = np.where(total > 0, mean, psf)
        psf = psf / psf.sum()
    return np.asarray(psf)


def _with_mean_wings(psf: NDArray[np.float64]) -> NDArray[np.float64]:
    """PSF with the pixels beyond 1.5 FWHM replaced by the mean profile: alone they are mostly noise; sum 1."""
    half = psf.shape[0] // 2
    offset = np.arange(-half, half + 1)
    radius = np.hypot(offset[:, np.newaxis], offset[np.newaxis, :])
    ring = np.rint(radius).astype(np.intp)
    profile = np.bincount(ring.ravel(), psf.ravel()) / np.bincount(ring.ravel())
    mean_radius = np.bincount(ring.ravel(), radius.ravel()) / np.bincount(ring.ravel())
    smooth = np.where(radius > _WING_RADIUS_FWHM * psf_fwhm_pix(psf), np.interp(radius, mean_radius, profile), psf)
    return np.asarray(smooth / smooth.sum())

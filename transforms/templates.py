"""Templates from exposures: what an exposure is worth, which go into which template, and the template itself. No Beam.

A template belongs to one band and one detector of a field, and lies on the pixels of one of the exposures, with a
margin so that dithered exposures find all of it. What comes out depends on the exposures, not on their order.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS, NoConvergence, Sip
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass
from scipy.spatial import cKDTree

from schemas.exposures import AB_ZERO_POINT_NJY, Exposure, mask_bits, read_exposure
from transforms.numerics.background import subtract_background
from transforms.numerics.image_stacking import ExposureToStack, StackedExposure, StackingError, stack_on_grid
from transforms.numerics.psf_modelling import PsfEstimationError, estimate_psf, fit_psf_model, psf_fwhm_pix
from transforms.numerics.registration import MIN_MATCHES, RegistrationError, StarList, find_stars
from transforms.numerics.warping import wcs_coordinate_grid

UNUSABLE_PLANES = ("BAD", "CR", "STREAK", "NO_DATA")
_BACKGROUND_BOX_PIX = 128
_LEAST_GOOD = 0.1  # of the pixels
_SEEING_RANGE = 1.3  # of the seeing that the sharpest quarter of the exposures has
_NOISE_RANGE = 10.0  # of the median variance: beyond, an exposure adds less than a tenth of what others do
_LEAST_OVERLAP = 0.05  # of the grid
_MAX_MARGIN = 0.5  # of the grid's side, on each side
_LATTICE = 17
_MATCH_PIX = 3.0
_MAX_OFFSET_FWHM = 0.5
_LEAST_EXPECTED = 20  # stars that must be where the WCS says before it is judged
_LEAST_FOUND = 0.25  # of them
_TRUSTED_RATIO = 0.05  # zero points stand unless stars say otherwise; apertures in other seeing are wrong by 2 %
_FWHM_TO_SIGMA = 1.0 / 2.3548


class UnfitExposureError(ValueError):
    """An exposure that cannot be in a template; the message says why."""


class NoTemplateBuiltError(ValueError):
    """A template that cannot be built; the message says of what and why."""


@checked_dataclass(frozen=True)
class TemplateConfig:
    """Which exposures go into a template.

    Attributes
    ----------
    max_fwhm_arcsec : poorest seeing; None takes up to 1.3 times that of the sharpest quarter, and in any case the
        sharpest `min_exposures`
    min_exposures : least number in a template and in each of its pixels; below 3 a cosmic ray cannot be told
    max_exposures : the sharpest are taken
    grid_visit : visit whose pixels are the template's; None takes the sharpest exposure
    """

    max_fwhm_arcsec: float | None = Field(default=None, gt=0)
    min_exposures: int = Field(default=3, ge=1)
    max_exposures: int = Field(default=20, ge=1)
    grid_visit: int | None = None


@dataclass(frozen=True, order=True)
class ListedExposure:
    """One detector of one visit as a manifest lists it. `fingerprint` changes when the file does."""

    midpoint_mjd_tai: float
    visit: int
    detector: int
    instrument: str
    band: str
    path: str
    fingerprint: str | None = None


@dataclass(frozen=True)
class MeasuredExposure:
    """What an exposure is worth.

    Attributes
    ----------
    listed : where it comes from
    shape : (ny, nx)
    wcs_header : cards of its WCS
    fwhm_pix, fwhm_arcsec : seeing
    variance : median of its good pixels, nJy^2
    """

    listed: ListedExposure
    shape: tuple[int, int]
    wcs_header: str
    fwhm_pix: float
    fwhm_arcsec: float
    variance: float

    @property
    def name(self) -> str:
        return f"visit {self.listed.visit} detector {self.listed.detector}"


@dataclass(frozen=True)
class TemplatePlan:
    """One template to build.

    Attributes
    ----------
    name : of its files, without ending
    detector : that it is for
    grid : exposure whose pixels it has
    origin : (x, y) of its first pixel among these
    shape : (ny, nx)
    exposures : to stack, the sharpest first
    left_out : what was not good enough, with reasons
    """

    name: str
    detector: int
    grid: MeasuredExposure
    origin: tuple[int, int]
    shape: tuple[int, int]
    exposures: tuple[MeasuredExposure, ...]
    left_out: tuple[str, ...]
    config: TemplateConfig = field(default_factory=TemplateConfig)

    @property
    def digest(self) -> str:
        """Of everything that decides the template's pixels."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, default=str).encode()).hexdigest()


# --- one exposure ----------------------------------------------------------------------------------------------------


def measure_exposure(listed: ListedExposure) -> MeasuredExposure:
    """Read an exposure and measure its seeing and its depth.

    Raises
    ------
    ExposureError : it cannot be read
    UnfitExposureError : fewer than a tenth of its pixels are good, it has no PSF and too few stars for one
    BackgroundError : no background can be measured
    """
    exposure = read_exposure(listed.path)
    bad = (exposure.mask & mask_bits(*UNUSABLE_PLANES, "SAT")) != 0
    good = float(np.mean(~bad))
    if good < _LEAST_GOOD:
        raise UnfitExposureError(f"{good:.1%} of the pixels are good, {_LEAST_GOOD:.0%} are needed")
    if float(np.min(exposure.image[~bad])) == float(np.max(exposure.image[~bad])):
        raise UnfitExposureError("all good pixels have the same value")
    try:
        if exposure.psf is None:
            sky = subtract_background(exposure.image, bad, _BACKGROUND_BOX_PIX)
            fwhm_pix = estimate_psf(sky.image, np.where(bad, 1.0, exposure.variance), bad).fwhm_pix
        else:
            fwhm_pix = psf_fwhm_pix(exposure.psf)
    except PsfEstimationError as error:
        raise UnfitExposureError(f"its seeing is not known: {error}") from error
    shape = (exposure.image.shape[0], exposure.image.shape[1])
    return MeasuredExposure(
        listed=listed,
        shape=shape,
        wcs_header=exposure.wcs.to_header(relax=True).tostring(sep="\n"),
        fwhm_pix=fwhm_pix,
        fwhm_arcsec=fwhm_pix * _pixel_scale_arcsec(exposure.wcs, shape),
        variance=float(np.median(exposure.variance[~bad])),
    )


def _pixel_scale_arcsec(wcs: WCS, shape: tuple[int, int]) -> float:
    """Root of the area of the pixel in the middle."""
    x, y = (shape[1] - 1) / 2.0, (shape[0] - 1) / 2.0
    ra, dec = wcs.all_pix2world([x, x + 1.0, x], [y, y, y + 1.0], 0)
    d_ra = ((ra[1:] - ra[0] + 180.0) % 360.0 - 180.0) * math.cos(math.radians(dec[0]))
    d_dec = dec[1:] - dec[0]
    return 3600.0 * math.sqrt(abs(d_ra[0] * d_dec[1] - d_ra[1] * d_dec[0]))


def wcs_of(header: str) -> WCS:
    """WCS of cards as `MeasuredExposure` keeps them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=AstropyWarning)
        return WCS(fits.Header.fromstring(header, sep="\n")).celestial


# --- which exposures -------------------------------------------------------------------------------------------------


def plan_templates(
    exposures: Iterable[MeasuredExposure], config: TemplateConfig
) -> Iterator[TemplatePlan | tuple[MeasuredExposure, NoTemplateBuiltError]]:
    """Templates of one instrument and band, one for each detector and field; or why there is none.

    Exposures of a detector that cover the centre of the first of them are one field. Into its template go those of any
    detector that overlap its grid.
    """
    ordered = sorted(exposures, key=lambda one: one.listed)
    for group in _fields(ordered):
        try:
            yield _plan(group, ordered, config)
        except NoTemplateBuiltError as error:
            yield group[0], error


def _fields(ordered: Sequence[MeasuredExposure]) -> list[list[MeasuredExposure]]:
    fields: list[list[MeasuredExposure]] = []
    for one in ordered:
        for members in fields:
            same = members[0].listed.detector == one.listed.detector
            if same and _covered(_centre(members[0]), one) == 1.0:
                members.append(one)
                break
        else:
            fields.append([one])
    return fields


def _plan(
    group: Sequence[MeasuredExposure], everything: Sequence[MeasuredExposure], config: TemplateConfig
) -> TemplatePlan:
    ra, dec = (float(value[0]) for value in _centre(group[0]))
    what = f"band {group[0].listed.band} detector {group[0].listed.detector} at RA {ra:.3f} Dec {dec:.3f}"
    grid = min(group, key=lambda one: (one.fwhm_arcsec, one.listed))
    if config.grid_visit is not None:
        named = [one for one in group if one.listed.visit == config.grid_visit]
        if not named:
            raise NoTemplateBuiltError(f"{what}: visit {config.grid_visit}, asked for as grid, is not there")
        grid = named[0]
    origin, shape = _with_margin(grid, group)
    sky = sky_lattice(wcs_of(grid.wcs_header), shape, origin)
    overlapping = [one for one in everything if _covered(sky, one) >= _LEAST_OVERLAP]
    chosen, left_out = _good_ones(overlapping, config)
    if len(chosen) < config.min_exposures:
        why = f"; left out: {', '.join(left_out)}" if left_out else ""
        raise NoTemplateBuiltError(f"{what}: {len(chosen)} exposures, {config.min_exposures} are needed{why}")
    instrument = re.sub(r"\W+", "_", grid.listed.instrument).lower()
    grid_ra, grid_dec = (float(value[0]) for value in _centre(grid))
    name = f"{instrument}_{grid.listed.band}_{grid.listed.detector:03d}_{grid_ra:.4f}{grid_dec:+.4f}"
    return TemplatePlan(name, grid.listed.detector, grid, origin, shape, tuple(chosen), tuple(left_out), config)


def _good_ones(
    exposures: Sequence[MeasuredExposure], config: TemplateConfig
) -> tuple[list[MeasuredExposure], list[str]]:
    """The exposures to stack, the sharpest first, and why the others are not."""
    ranked = sorted(exposures, key=lambda one: (one.fwhm_arcsec, one.listed))
    if config.max_fwhm_arcsec is not None:
        limit = config.max_fwhm_arcsec
    else:
        sharp = ranked[(len(ranked) - 1) // 4].fwhm_arcsec
        limit = max(_SEEING_RANGE * sharp, ranked[min(config.min_exposures, len(ranked)) - 1].fwhm_arcsec)
    noise = _NOISE_RANGE * float(np.median([one.variance for one in ranked]))
    chosen: list[MeasuredExposure] = []
    left_out: list[str] = []
    for one in ranked:
        if one.fwhm_arcsec > limit:
            left_out.append(f"{one.name} (seeing {one.fwhm_arcsec:.2f} arcsec, at most {limit:.2f})")
        elif one.variance > noise:
            left_out.append(f"{one.name} (variance {one.variance / noise * _NOISE_RANGE:.0f} times the median)")
        elif len(chosen) == config.max_exposures:
            left_out.append(f"{one.name} (beyond the {config.max_exposures} sharpest)")
        else:
            chosen.append(one)
    return chosen, left_out


def _centre(one: MeasuredExposure) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ra, dec = wcs_of(one.wcs_header).all_pix2world([(one.shape[1] - 1) / 2.0], [(one.shape[0] - 1) / 2.0], 0)
    return ra % 360.0, dec


def sky_lattice(
    wcs: WCS, shape: tuple[int, int], origin: tuple[int, int] = (0, 0)
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions (ra, dec) of 17 x 17 pixels spread over an image from edge to edge."""
    x, y = np.meshgrid(
        origin[0] + np.linspace(0, shape[1] - 1, _LATTICE), origin[1] + np.linspace(0, shape[0] - 1, _LATTICE)
    )
    ra, dec = wcs.all_pix2world(x.ravel(), y.ravel(), 0)
    return ra, dec


def overlap(sky: tuple[NDArray[np.float64], NDArray[np.float64]], wcs: WCS, shape: tuple[int, int]) -> float:
    """Part of the positions (ra, dec) that lie on an image, 0 to 1."""
    x, y = _pixels(wcs, *sky)
    return float(np.mean(_inside(x, y, shape)))


def _inside(x: NDArray[np.float64], y: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    return np.asarray((x >= 0) & (y >= 0) & (x <= shape[1] - 1) & (y <= shape[0] - 1))


def _covered(sky: tuple[NDArray[np.float64], NDArray[np.float64]], one: MeasuredExposure) -> float:
    return overlap(sky, wcs_of(one.wcs_header), one.shape)


def _pixels(
    wcs: WCS, ra: NDArray[np.float64], dec: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixels of positions; NaN for all of them where a distortion has no inverse: far off the image."""
    try:
        x, y = wcs.all_world2pix(ra, dec, 0)
    except (NoConvergence, ValueError):
        x = y = np.full(np.shape(ra), np.nan)
    return x, y


def _with_margin(grid: MeasuredExposure, group: Sequence[MeasuredExposure]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Origin and shape of the grid that holds the exposures of a field, up to half a side beyond each edge."""
    wcs = wcs_of(grid.wcs_header)
    ny, nx = grid.shape
    left, low, right, top = 0.0, 0.0, nx - 1.0, ny - 1.0
    for one in group:
        x, y = _pixels(wcs, *sky_lattice(wcs_of(one.wcs_header), one.shape))
        if np.isfinite(x).all():
            left, right = min(left, float(x.min())), max(right, float(x.max()))
            low, top = min(low, float(y.min())), max(top, float(y.max()))
    x_first, y_first = math.floor(max(left, -_MAX_MARGIN * nx)), math.floor(max(low, -_MAX_MARGIN * ny))
    x_last, y_last = math.ceil(min(right, (1 + _MAX_MARGIN) * nx)), math.ceil(min(top, (1 + _MAX_MARGIN) * ny))
    return (x_first, y_first), (y_last - y_first + 1, x_last - x_first + 1)


# --- one template ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltTemplate:
    """A template, and what there is to tell of it (JSON types)."""

    exposure: Exposure
    record: dict[str, Any]


def build_template(plan: TemplatePlan) -> BuiltTemplate:
    """Read, match and stack the exposures of a plan.

    An exposure whose stars are not where its WCS says is left out. Fluxes are scaled where stars show that a zero
    point is off by more than 5 %.

    Raises
    ------
    ExposureError, BackgroundError, WarpError : from the steps
    NoTemplateBuiltError : too few exposures are left, or one of them has no pixel in the grid
    """
    wcs = shifted_wcs(read_exposure(plan.grid.listed.path).wcs, plan.origin)
    used: list[dict[str, Any]] = []
    left_out = list(plan.left_out)
    try:
        stack = stack_on_grid(_prepared(plan, wcs, used, left_out), plan.shape, min_exposures=plan.config.min_exposures)
    except StackingError as error:
        raise NoTemplateBuiltError(f"{plan.name}: {error}; left out: {', '.join(left_out) or 'none'}") from error
    for facts, weight in zip(used, stack.weights, strict=True):
        facts["weight"] = round(float(weight), 5)
    exposure = exposure_of_stack(stack, wcs)
    return BuiltTemplate(exposure, _record(plan, exposure, stack, used, left_out))


def _prepared(
    plan: TemplatePlan, wcs: WCS, used: list[dict[str, Any]], left_out: list[str]
) -> Iterator[ExposureToStack]:
    """Exposures one by one, the sharpest first; what is to be told of them goes into `used` and `left_out`."""
    scale_arcsec = _pixel_scale_arcsec(wcs, plan.shape)
    first: tuple[StarList, WCS] | None = None
    for one in plan.exposures:
        listed = one.listed
        exposure = read_exposure(listed.path)
        stars = _stars(exposure)
        try:
            ratio = 1.0 if stars is None or first is None else _flux_ratio(first, stars, exposure)
        except UnfitExposureError as error:
            left_out.append(f"{one.name} ({error})")
            continue
        if first is None and stars is not None:
            first = stars, exposure.wcs
        used.append(
            {
                "visit": listed.visit,
                "detector": listed.detector,
                "midpoint_mjd_tai": listed.midpoint_mjd_tai,
                "science": listed.path,
                "fwhm_arcsec": round(one.fwhm_arcsec, 4),
                "flux_ratio": round(ratio, 5),
            }
        )
        yield exposure_to_stack(exposure, wcs, plan.shape, ratio, one.fwhm_arcsec / scale_arcsec)


def exposure_to_stack(
    exposure: Exposure, wcs: WCS, shape: tuple[int, int], flux_ratio: float, fwhm_pix: float
) -> ExposureToStack:
    """An exposure, to be stacked on the grid of a WCS."""
    return ExposureToStack(
        image=exposure.image,
        variance=exposure.variance,
        saturated=(exposure.mask & mask_bits("SAT")) != 0,
        bad=(exposure.mask & mask_bits(*UNUSABLE_PLANES)) != 0,
        grid=wcs_coordinate_grid(wcs, exposure.wcs, shape),
        flux_ratio=flux_ratio,
        fwhm_pix=fwhm_pix,
    )


def exposure_of_stack(stack: StackedExposure, wcs: WCS) -> Exposure:
    """A stack with mask and, where it has stars enough, the PSF at its centre."""
    missing = ~np.isfinite(stack.image)
    mask = np.where(missing, mask_bits("NO_DATA"), 0).astype(np.int32)
    mask[stack.saturated] |= mask_bits("SAT")
    notes: tuple[str, ...] = ()
    psf = None
    try:
        known = np.where(missing, np.float32(1.0), stack.variance)
        psf = fit_psf_model(np.where(missing, np.float32(0.0), stack.image), known, mask != 0).at_centre()
    except PsfEstimationError as error:
        notes = (f"no PSF: {error}",)
    return Exposure(stack.image, stack.variance, mask, wcs, psf, notes, stack.interpolated)


def shifted_wcs(wcs: WCS, origin: tuple[int, int]) -> WCS:
    """The WCS of an image whose first pixel is pixel `origin` (x, y), which may lie outside."""
    shifted = wcs.deepcopy()
    shifted.wcs.crpix = np.array(wcs.wcs.crpix) - origin
    if wcs.sip is not None:
        sip = wcs.sip
        shifted.sip = Sip(sip.a, sip.b, sip.ap, sip.bp, np.array(sip.crpix) - origin)
    shifted.wcs.set()
    return shifted


def _stars(exposure: Exposure) -> StarList | None:
    """Stars to compare exposures by; None where there are too few."""
    bad = (exposure.mask & mask_bits(*UNUSABLE_PLANES, "SAT")) != 0
    try:
        return find_stars(exposure.image, bad)
    except RegistrationError:
        return None


def _flux_ratio(first: tuple[StarList, WCS], stars: StarList, exposure: Exposure) -> float:
    """Flux of a star over that in the first exposure, 1 where the zero points are as good as the stars can tell."""
    reference, wcs = first
    ra, dec = wcs.all_pix2world(reference.x, reference.y, 0)
    x, y = _pixels(exposure.wcs, ra, dec)
    expected = np.flatnonzero(_inside(x, y, (exposure.image.shape[0], exposure.image.shape[1])))
    if len(expected) == 0:
        return 1.0
    here = np.column_stack((x[expected], y[expected]))
    distance, nearest = cKDTree(np.column_stack((stars.x, stars.y))).query(here, distance_upper_bound=_MATCH_PIX)
    found = np.flatnonzero(np.isfinite(distance))
    if len(expected) >= _LEAST_EXPECTED and len(found) < _LEAST_FOUND * len(expected):
        raise UnfitExposureError(f"{len(found)} of {len(expected)} stars are where its WCS says")
    if len(found) < MIN_MATCHES:
        return 1.0
    partner = nearest[found]
    offset = math.hypot(
        float(np.median(stars.x[partner] - here[found, 0])), float(np.median(stars.y[partner] - here[found, 1]))
    )
    if offset > _MAX_OFFSET_FWHM * stars.fwhm_pix:
        raise UnfitExposureError(f"its WCS is off by {offset:.1f} pixels")
    ratios = stars.flux[partner] / reference.flux[expected[found]]
    ratio = float(np.median(ratios))
    error = 1.2533 * 1.4826 * float(np.median(np.abs(ratios - ratio))) / math.sqrt(len(ratios))
    return ratio if abs(ratio - 1.0) > max(_TRUSTED_RATIO, 3.0 * error) else 1.0


def _record(
    plan: TemplatePlan,
    exposure: Exposure,
    stack: StackedExposure,
    used: list[dict[str, Any]],
    left_out: list[str],
) -> dict[str, Any]:
    fwhm_pix = math.nan if exposure.psf is None else psf_fwhm_pix(exposure.psf)
    filled = np.isfinite(exposure.image)
    noise = 5.0 * math.sqrt(float(np.median(exposure.variance[filled])) * 4.0 * math.pi) * fwhm_pix * _FWHM_TO_SIGMA
    known = math.isfinite(fwhm_pix)
    ny, nx = plan.shape
    ra, dec = exposure.wcs.all_pix2world((nx - 1) / 2.0, (ny - 1) / 2.0, 0)
    return {
        "template": f"{plan.name}.fits",
        "instrument": plan.grid.listed.instrument,
        "band": plan.grid.listed.band,
        "detector": plan.detector,
        "ra_deg": round(float(ra) % 360.0, 6),
        "dec_deg": round(float(dec), 6),
        "shape": list(plan.shape),
        "grid_visit": plan.grid.listed.visit,
        "n_exposures": len(used),
        "filled": round(float(filled.mean()), 4),
        "mean_depth": round(float(stack.n_used.mean(dtype=np.float64)), 3),
        "fwhm_arcsec": round(fwhm_pix * _pixel_scale_arcsec(exposure.wcs, plan.shape), 4) if known else None,
        "depth_5sigma_mag": round(AB_ZERO_POINT_NJY - 2.5 * math.log10(noise), 3) if known else None,
        "exposures": used,
        "left_out": left_out,
        "notes": list(exposure.notes),
        "input": plan.digest,
    }

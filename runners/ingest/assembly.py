"""From calibrated exposures with a WCS to visits: which share a field, a visit, a template."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from numpy.typing import NDArray

from runners.ingest.night_folder import Refusal, RefusedInput, number_visits
from schemas.exposures import AB_ZERO_POINT_NJY, Exposure, ExposureError, mask_bits, read_exposure, write_exposure
from schemas.manifests import MAX_DETECTOR, MAX_EXPOSURE_TIME_S, DetectorImages, Visit
from transforms.numerics.differencing import SubtractionParameters

UNUSABLE_PLANES = ("BAD", "SAT", "CR", "NO_DATA")
_SAME_VISIT_S = 0.5
_WCS_ERROR_PIX = 0.1
_WCS_NEEDED = ("CRVAL1", "CRVAL2")
_WCS_NUMBERS = ("CRPIX1", "CRPIX2", "CDELT1", "CDELT2", "CD1_1", "CD1_2", "CD2_1", "CD2_2")
_LEAST_GOOD = SubtractionParameters().min_coverage  # of the pixels; `produce` would refuse the difference


@dataclass(frozen=True)
class ConvertedExposure:
    """Facts of an exposure that was written to a night folder.

    Attributes
    ----------
    source : what it was made from
    path : where it was written
    fwhm_pix : width of its PSF, NaN when unknown
    ra_deg, dec_deg, radius_deg : centre of the image on the sky, half of its shorter side
    observatory : where it was taken, as a manifest says it; None when unknown
    """

    source: str
    path: Path
    instrument: str
    band: str
    detector: int
    midpoint_mjd_tai: float
    exposure_time_s: float
    target: str | None
    fwhm_pix: float
    ra_deg: float
    dec_deg: float
    radius_deg: float
    observatory: str | None = None

    @property
    def seeing_pix(self) -> float:
        """What to sort by: the best first, the unknown last."""
        return self.fwhm_pix if math.isfinite(self.fwhm_pix) else math.inf


def celestial_wcs(header: fits.Header) -> WCS:
    """The WCS of an image header; RefusedInput where a card of it is missing or no number.

    wcslib takes 0 for a CRVAL that it cannot read, and says so in a warning only.
    """
    for card in (*_WCS_NEEDED, *(card for card in _WCS_NUMBERS if card in header)):
        value = header.get(card)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RefusedInput(f"unusable WCS: {card} must be a number, got {value!r}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=AstropyWarning)
        try:
            wcs = WCS(header)
        except Exception as error:  # wcslib raises many kinds
            raise RefusedInput(f"unusable WCS: {type(error).__name__}: {error}") from error
    if not wcs.has_celestial:
        raise RefusedInput("no celestial WCS in the image header")
    return wcs.celestial


def exposure_in_njy(
    image: NDArray[np.floating],
    variance: NDArray[np.floating],
    usable: NDArray[np.bool_],
    mask: NDArray[np.int32],
    wcs: WCS,
    psf: NDArray[np.float64] | None,
    zero_point: float,
) -> Exposure:
    """An exposure from planes in units of AB magnitude `zero_point`; pixels not usable, or too large, have no data."""
    scale = 10.0 ** (0.4 * (AB_ZERO_POINT_NJY - zero_point))
    with np.errstate(over="ignore", invalid="ignore"):
        pixels = np.where(usable, image * scale, np.nan).astype(np.float32)
        noise = np.where(usable, variance * scale**2, np.inf).astype(np.float32)
    return Exposure(
        image=pixels,
        variance=noise,
        mask=np.where(np.isfinite(pixels) & np.isfinite(noise), mask, mask | mask_bits("NO_DATA")).astype(np.int32),
        wcs=wcs,
        psf=psf,
    )


def write_checked(path: Path, exposure: Exposure, *, zero_point: float, source: str) -> tuple[float, float, float]:
    """Write an exposure and read it back: what `produce` could not use is refused here, and leaves no file.

    Parameters
    ----------
    path : where to write
    exposure : in nJy
    zero_point : AB magnitude of 1 unit of the input; a card keeps it
    source : name of the input; a card keeps its end

    Returns
    -------
    tuple
        Centre on the sky (ra, dec) and half of the shorter side, degrees.

    Raises
    ------
    RefusedInput : too few good pixels; a WCS that is singular, or that a FITS header cannot hold; whatever
        `read_exposure` refuses; the file cannot be written
    """
    good = float(np.mean((exposure.mask & mask_bits(*UNUSABLE_PLANES)) == 0))
    if good < _LEAST_GOOD:
        raise RefusedInput(f"{good:.1%} of the pixels are good, {_LEAST_GOOD:.0%} are needed")
    x, y = _corners_and_centre(exposure.image.shape)
    position = _require_round_trip(exposure, exposure, x, y)
    cards: dict[str, object] = {
        "MAGZERO": (zero_point, "AB mag of 1 unit of the input"),
        "FRAME": source[-60:].encode("ascii", "replace").decode(),
    }
    try:
        write_exposure(path, exposure, header=cards)
        _require_round_trip(exposure, read_exposure(path), x, y)
    except Exception as error:  # astropy raises many kinds
        for left in (path, path.with_name("." + path.name)):
            left.unlink(missing_ok=True)
        raise RefusedInput(_why_not_written(error, path)) from error
    (ra, dec), (right, top) = position[4], (position[5], position[6])
    half_sides = [separation_deg(ra, dec, *edge) for edge in (right, top)]
    return float(ra) % 360.0 % 360.0, float(dec), min(half_sides)  # -1e-17 % 360 is 360


def _corners_and_centre(shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixels of the four corners, the centre, the middle of the right and of the upper edge."""
    right, top = shape[1] - 1.0, shape[0] - 1.0
    x = [0.0, right, 0.0, right, right / 2, right, right / 2]
    y = [0.0, 0.0, top, top, top / 2, top / 2, top]
    return np.array(x), np.array(y)


def _require_round_trip(
    there: Exposure, back: Exposure, x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Positions (n, 2) of pixels by one WCS; RefusedInput unless the other leads from them to the same pixels."""
    try:
        ra, dec = there.wcs.all_pix2world(x, y, 0)
        if not np.isfinite([ra, dec]).all():
            raise RefusedInput("unusable WCS: it gives no position on the sky for the edges of the image")
        moved = float(np.max(np.hypot(*(np.array(back.wcs.all_world2pix(ra, dec, 0)) - [x, y]))))
    except RefusedInput:
        raise
    except Exception as error:  # wcslib raises many kinds
        raise RefusedInput(f"unusable WCS: {type(error).__name__}: {error}") from error
    if not moved < _WCS_ERROR_PIX:
        said = "to the sky and back" if there is back else "as written and read again"
        raise RefusedInput(f"unusable WCS: {said}, pixels at the edges move by {moved:.3g}")
    return np.column_stack((ra, dec))


def _why_not_written(error: Exception, path: Path) -> str:
    if isinstance(error, RefusedInput):
        return str(error)
    if isinstance(error, ExposureError):
        return str(error).removeprefix(f"{path.name}: ")
    return f"cannot be written: {type(error).__name__}: {error}"


def separation_deg(ra1: float, dec1: float, ra2: float, dec2: float) -> float:
    """Angle between two positions, by the haversine formula."""
    a1, d1, a2, d2 = np.radians([ra1, dec1, ra2, dec2])
    chord = math.sin((d2 - d1) / 2.0) ** 2 + math.cos(d1) * math.cos(d2) * math.sin((a2 - a1) / 2.0) ** 2
    return math.degrees(2.0 * math.asin(min(math.sqrt(chord), 1.0)))


def group_fields(exposures: Iterable[ConvertedExposure]) -> list[list[ConvertedExposure]]:
    """Exposures of one instrument and band that cover each other's centres; groups and members in time order."""
    groups: list[list[ConvertedExposure]] = []
    for one in sorted(exposures, key=lambda exposure: (exposure.midpoint_mjd_tai, exposure.source)):
        for group in groups:
            first = group[0]
            apart = separation_deg(first.ra_deg, first.dec_deg, one.ra_deg, one.dec_deg)
            if (first.instrument, first.band) == (one.instrument, one.band) and apart < first.radius_deg:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def without_repeats(exposures: Iterable[ConvertedExposure], refused: list[Refusal]) -> list[ConvertedExposure]:
    """Exposures in time order, each detector once a visit; a repeat is refused and its file removed.

    Before templates are chosen: an exposure must not be subtracted from a copy of itself.
    """
    kept: list[ConvertedExposure] = []
    for one in sorted(exposures, key=lambda one: (one.midpoint_mjd_tai, one.band, one.detector, one.source)):
        first = _taken(kept, one)
        if first is None:
            kept.append(one)
        else:
            one.path.unlink()
            refused.append(Refusal(one.source, f"same time, band and detector {one.detector} as {first.source}"))
    return kept


def _taken(kept: list[ConvertedExposure], one: ConvertedExposure) -> ConvertedExposure | None:
    """The exposure of the same visit and detector among `kept`, which is in time order."""
    for other in reversed(kept):
        if (one.midpoint_mjd_tai - other.midpoint_mjd_tai) * 86400.0 >= _SAME_VISIT_S:
            return None
        if (other.detector, other.band) == (one.detector, one.band):
            return other
    return None


def visits_of(exposures: Sequence[ConvertedExposure], templates: dict[Path, Path | None]) -> list[Visit]:
    """Visits in time order, numbered: exposures of one band with one midpoint are the detectors of one visit.

    Parameters
    ----------
    exposures : of one instrument, `without_repeats`
    templates : template of each science image, None where there is none
    """
    ordered = sorted(exposures, key=lambda one: (one.midpoint_mjd_tai, one.band, one.detector, one.source))
    gathered: list[list[ConvertedExposure]] = []
    for one in ordered:
        group = next((group for group in gathered if _same_visit(group[0], one)), None)
        if group is None:
            gathered.append([one])
        else:
            group.append(one)
    return number_visits([_visit(group, templates) for group in gathered])


def _same_visit(first: ConvertedExposure, one: ConvertedExposure) -> bool:
    apart_s = abs(first.midpoint_mjd_tai - one.midpoint_mjd_tai) * 86400.0
    return first.band == one.band and apart_s < _SAME_VISIT_S


def _visit(group: list[ConvertedExposure], templates: dict[Path, Path | None]) -> Visit:
    first = group[0]
    detectors = [
        DetectorImages(
            one.detector, str(one.path), None if (template := templates[one.path]) is None else str(template)
        )
        for one in group
    ]
    return Visit(
        visit=0,
        day_obs=0,
        seq_num=0,
        instrument=first.instrument,
        band=first.band,
        midpoint_mjd_tai=first.midpoint_mjd_tai,
        exposure_time_s=first.exposure_time_s,
        readout_end_mjd_tai=first.midpoint_mjd_tai + 0.5 * first.exposure_time_s / 86400.0,
        boresight_ra_deg=first.ra_deg,
        boresight_dec_deg=first.dec_deg,
        rotation_deg=0.0,
        observation_reason="science",
        target_name=first.target,
        detectors=tuple(detectors),
        observatory=first.observatory,
    )


def checked_detector(value: object) -> int:
    """A detector number; ValueError says what is allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"detector must be an integer, got {value!r}")
    try:
        number = int(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"detector must be an integer, got {value!r}") from error
    if not 0 <= number <= MAX_DETECTOR or number != float(value):
        raise ValueError(f"detector must be an integer in [0, {MAX_DETECTOR}], got {value!r}")
    return number


def checked_exposure_time(seconds: float) -> float:
    """An exposure time that a manifest takes; RefusedInput says what is allowed."""
    if not 0.0 < seconds <= MAX_EXPOSURE_TIME_S:
        raise RefusedInput(f"exposure time must be in (0, {MAX_EXPOSURE_TIME_S:.0f}] s, got {seconds}")
    return seconds

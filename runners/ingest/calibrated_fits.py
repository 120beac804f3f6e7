"""Any folder of calibrated FITS images with a WCS into a night folder, told by a header map what each card means.

Templates are given, or built: the best third of the exposures of a band and field (by seeing, at most ten) is warped to
the grid of the best of them and averaged; exposures that are in a template are no visits, so that nothing new on the
sky is subtracted from itself.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from astropy.io import fits
from astropy.io.fits.card import Undefined
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from runners.ingest.assembly import (
    UNUSABLE_PLANES,
    ConvertedExposure,
    celestial_wcs,
    checked_detector,
    checked_exposure_time,
    exposure_in_njy,
    group_fields,
    separation_deg,
    visits_of,
    without_repeats,
    write_checked,
)
from runners.ingest.night_folder import (
    IngestedNight,
    IngestError,
    Progress,
    Refusal,
    RefusedInput,
    checked_midpoint,
    claim_folder,
    files_below,
    finish_folder,
    mjd_of_iso,
    tai_of_utc_mjd,
    watched,
)
from schemas.exposures import (
    MASK_BITS,
    MAX_STORED_BITS,
    READ_NOISE_DEFAULT_E,
    Exposure,
    ExposureError,
    mask_bits,
    open_unpacked,
    read_exposure,
    write_exposure,
)
from schemas.manifests import BANDS
from schemas.observatories import observatory_of
from transforms.numerics.background import BackgroundError, subtract_background
from transforms.numerics.image_stacking import StackingError, stack_on_grid
from transforms.numerics.psf_modelling import PsfEstimationError, estimate_psf, psf_fwhm_pix
from transforms.numerics.warping import WarpError
from transforms.templates import exposure_of_stack, exposure_to_stack

TEMPLATE_PART = 1.0 / 3.0
MAX_TEMPLATE_EXPOSURES = 10
_BACKGROUND_BOX_PIX = 128
_FITS_ENDINGS = (".fits", ".fits.fz", ".fits.gz", ".fits.bz2", ".fits.xz", ".fit", ".fts")
_GAIN_RANGE = (1e-6, 1e6)
_STRICT = ConfigDict(extra="forbid")


class HeaderMapError(ValueError):
    """A header map that cannot be used; the message names file, key and what is allowed."""


@checked_dataclass(frozen=True, config=_STRICT)
class Value:
    """Where a value comes from: a card of the image's or the primary header, or the same for all."""

    card: str | None = None
    value: float | int | str | None = None


@checked_dataclass(frozen=True, config=_STRICT)
class BandValue:
    """The filter's name; `names` translates what the card holds (or its first word) to one of u g r i z y."""

    card: str | None = None
    value: str | None = None
    names: dict[str, str] = Field(default_factory=dict)


@checked_dataclass(frozen=True, config=_STRICT)
class TimeValue:
    """A time: MJD, JD or ISO text, in UTC or TAI, at the start, middle or end of the exposure."""

    card: str
    format: Literal["mjd", "jd", "iso"] = "mjd"
    scale: Literal["utc", "tai"] = "utc"
    at: Literal["start", "middle", "end"] = "start"


@checked_dataclass(frozen=True, config=_STRICT)
class ZeroPointValue:
    """AB magnitude of 1 adu in the whole exposure, or in a second of it."""

    card: str | None = None
    value: float | None = None
    per: Literal["exposure", "second"] = "exposure"


@checked_dataclass(frozen=True, config=_STRICT)
class MaskPlane:
    """A mask HDU. `bits`: our plane of each bit number; without them its MP_ cards; without these all is BAD."""

    hdu: str | int
    bits: dict[int, str] = Field(default_factory=dict)


@checked_dataclass(frozen=True, config=_STRICT)
class NoisePlane:
    """An HDU with the noise: variance, inverse variance or standard deviation, in the image's unit."""

    hdu: str | int
    kind: Literal["variance", "inverse_variance", "sigma"] = "variance"


@checked_dataclass(frozen=True, config=_STRICT)
class HeaderMap:
    """What the cards and HDUs of a survey's files mean."""

    instrument: Value
    band: BandValue
    time: TimeValue
    exposure_time_s: Value
    zero_point: ZeroPointValue
    detector: Value = field(default_factory=lambda: Value(value=0))
    gain: Value | None = None
    read_noise_e: Value | None = None
    saturation: Value | None = None
    fwhm_pix: Value | None = None
    target: Value | None = None
    observatory: Value | None = None
    image_hdu: str | int | None = None
    mask: MaskPlane | None = None
    noise: NoisePlane | None = None
    psf_hdu: str | int | None = None
    ignore: str = ""  # regular expression on file names


def shipped_maps() -> dict[str, str]:
    """Names of the maps that come with the program, and their texts."""
    folder = resources.files("runners.config") / "ingest"
    return {
        item.name.removesuffix(".yaml"): item.read_text(encoding="utf-8")
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".yaml")
    }


def load_header_map(name_or_path: str) -> HeaderMap:
    """A shipped map by its name, or a YAML file.

    Raises
    ------
    HeaderMapError
        No such map, no YAML, an unknown key, a value that is not allowed.
    """
    shipped = shipped_maps()
    if name_or_path in shipped:
        text = shipped[name_or_path]
    else:
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(shipped)
            raise HeaderMapError(f"{name_or_path}: cannot be read ({error}); shipped maps are {known}") from error
    try:
        content = yaml.safe_load(text)
        header_map = TypeAdapter(HeaderMap).validate_python(content)
    except yaml.YAMLError as error:
        raise HeaderMapError(f"{name_or_path}: no YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        raise HeaderMapError(f"{name_or_path}: {key}: {first['msg']} (got {first['input']!r})") from error
    _check_map(header_map, name_or_path)
    return header_map


def _check_map(header_map: HeaderMap, name: str) -> None:
    for key in (one.name for one in fields(header_map)):
        entry = getattr(header_map, key)
        if isinstance(entry, (Value, BandValue, ZeroPointValue)) and (entry.card is None) == (entry.value is None):
            raise HeaderMapError(f"{name}: {key}: give either card or value")
    for given, band in {**header_map.band.names, "value": header_map.band.value or BANDS[0]}.items():
        if band not in BANDS:
            raise HeaderMapError(f"{name}: band: {given}: {band!r} is not one of {', '.join(BANDS)}")
    for bit, plane in (header_map.mask.bits if header_map.mask else {}).items():
        if not 0 <= bit < MAX_STORED_BITS:
            raise HeaderMapError(f"{name}: mask: bits: {bit} is not in [0, {MAX_STORED_BITS})")
        if plane not in MASK_BITS:
            raise HeaderMapError(f"{name}: mask: bits: {bit}: {plane!r} is not one of {', '.join(MASK_BITS)}")
    try:
        re.compile(header_map.ignore)
    except re.error as error:
        raise HeaderMapError(f"{name}: ignore: no regular expression: {error}") from error


def ingest_fits(
    source: Path, header_map: HeaderMap, out: Path, templates: Path | None = None, progress: Progress | None = None
) -> IngestedNight:
    """Ingest a folder of calibrated images.

    Parameters
    ----------
    source : Path
        Folder, searched below too.
    header_map : HeaderMap
    out : Path
        Night folder to write.
    templates : Path, optional
        Folder of templates that the same map describes (no time needed): for each science image the one of its band
        that lies nearest and covers its centre. Without it templates are built.
    progress : callable, optional
        Called with (what, done, all).

    Returns
    -------
    IngestedNight
        Files that cannot be used are in `refused`.

    Raises
    ------
    IngestError
        No files there, none of them can be used, or `out` holds something else.
    """
    given = [] if templates is None else _fits_paths(templates, header_map, out)
    if templates is not None and not given:
        raise IngestError(f"no FITS files in {templates}: no templates")
    apart = {os.path.realpath(path) for path in given}
    paths = [path for path in _fits_paths(source, header_map, out) if os.path.realpath(path) not in apart]
    if not paths:
        raise IngestError(f"no FITS files in {source}" + (" but the templates" if given else ""))
    claim_folder(out)
    refused: list[Refusal] = []
    converted = _convert_all(paths, source, header_map, out / "science", refused, progress, timed=True)
    if not converted:
        raise IngestError(f"none of {len(paths)} files can be used; {refused[0].source}: {refused[0].reason}")
    converted = without_repeats(_one_instrument(converted, refused), refused)
    notes: list[str] = []
    if templates is None:
        chosen = _build_templates(converted, out / "templates", refused, notes, progress)
    else:
        n_before = len(refused)
        made = _convert_all(given, templates, header_map, out / "templates", refused, progress, timed=False)
        if not made:
            name, reason = refused[n_before]
            raise IngestError(f"none of {len(given)} templates can be used; {name}: {reason}")
        chosen = {one.path: _nearest_template(one, made) for one in converted}
        notes.append(f"{len(made)} templates given")
    science = [one for one in converted if one.path in chosen]
    lacking = [one.source for one in science if chosen[one.path] is None]
    notes += [f"no template for {name}" for name in lacking]
    visits = visits_of(science, chosen)
    night = IngestedNight(
        folder=out,
        instrument=converted[0].instrument,
        visits=len(visits),
        detectors=sum(len(visit.detectors) for visit in visits),
        templates=len({path for path in chosen.values() if path is not None}),
        refused=tuple(sorted(refused)),
        notes=tuple(notes),
    )
    return finish_folder(night, visits)


def _fits_paths(folder: Path, header_map: HeaderMap, out: Path) -> list[Path]:
    ignored = re.compile(header_map.ignore) if header_map.ignore else None
    found = (path for path in files_below(folder, without=out) if path.name.lower().endswith(_FITS_ENDINGS))
    return [path for path in found if ignored is None or not ignored.search(path.name)]


def _convert_all(
    paths: list[Path],
    root: Path,
    header_map: HeaderMap,
    folder: Path,
    refused: list[Refusal],
    progress: Progress | None,
    *,
    timed: bool,
) -> list[ConvertedExposure]:
    converted: list[ConvertedExposure] = []
    by_name = {str(path.relative_to(root)): path for path in paths}
    for name in watched(list(by_name), "reading" if timed else "reading templates", progress):
        target = folder / (re.sub(r"\W+", "_", re.sub(r"\.(fits?|fts)(\.\w+)?$", "", name, flags=re.I)) + ".fits")
        if target.exists() and any(one.path == target for one in converted):
            refused.append(Refusal(name, f"another file is written as {target.name} already"))
            continue
        try:
            converted.append(_convert(by_name[name], name, header_map, target, timed=timed))
        except RefusedInput as error:
            refused.append(Refusal(name, str(error)))
    return converted


def _one_instrument(converted: list[ConvertedExposure], refused: list[Refusal]) -> list[ConvertedExposure]:
    """A night folder holds one instrument: the one with the most exposures stays."""
    names = [one.instrument for one in converted]
    kept = max(sorted(set(names)), key=names.count)
    for one in converted:
        if one.instrument != kept:
            one.path.unlink()
            reason = f"instrument {one.instrument}: this night folder is for {kept}, ingest it by itself"
            refused.append(Refusal(one.source, reason))
    return [one for one in converted if one.instrument == kept]


# --- one file ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Opened:
    """HDUs of a file, the image's and the primary header."""

    hdus: fits.HDUList
    image: Any
    primary: fits.Header

    def look_up(self, entry: Value | BandValue | ZeroPointValue, key: str) -> Any:
        if entry.card is None:
            return entry.value
        for header in (self.image.header, self.primary):
            value = header.get(entry.card)
            if value is not None and not isinstance(value, Undefined):
                return value
        raise RefusedInput(f"{key}: no card {entry.card} with a value")

    def number(self, entry: Value | ZeroPointValue, key: str) -> float:
        found = self.look_up(entry, key)
        try:
            number = float(found)
        except (TypeError, ValueError) as error:
            raise RefusedInput(f"{key}: {entry.card or 'value'} must be a number, got {found!r}") from error
        if not math.isfinite(number) or isinstance(found, bool):
            raise RefusedInput(f"{key}: {entry.card or 'value'} must be a finite number, got {found!r}")
        return number

    def hdu(self, name: str | int, key: str) -> Any:
        try:
            hdu = self.hdus[name]
        except (KeyError, IndexError) as error:
            known = ", ".join(f"{number} {one.name}".strip() for number, one in enumerate(self.hdus))
            raise RefusedInput(f"{key}: no HDU {name!r}, there are {known}") from error
        if not hdu.is_image or hdu.data is None:
            raise RefusedInput(f"{key}: HDU {name!r} holds no image")
        return hdu


def _convert(path: Path, name: str, header_map: HeaderMap, target: Path, *, timed: bool) -> ConvertedExposure:
    """Read one file by the map and write it as an exposure in nJy."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=AstropyWarning)
            warnings.filterwarnings("error", message=".*truncated")  # only a warning to astropy, broken to us
            with open_unpacked(path) as stream, fits.open(stream, memmap=False, lazy_load_hdus=False) as hdus:
                return _convert_opened(_open_image(hdus, header_map), name, header_map, target, timed=timed)
    except RefusedInput:
        raise
    except Exception as error:  # astropy raises many kinds on broken bytes
        raise RefusedInput(f"broken FITS file: {type(error).__name__}: {error}") from error


def _open_image(hdus: fits.HDUList, header_map: HeaderMap) -> _Opened:
    opened = _Opened(hdus, None, hdus[0].header)
    if header_map.image_hdu is not None:
        image = opened.hdu(header_map.image_hdu, "image_hdu")
    else:
        image = next((hdu for hdu in hdus if hdu.is_image and hdu.header.get("NAXIS", 0) > 0), None)
        if image is None:
            raise RefusedInput("no image in the file")
    if image.data.ndim != 2:
        raise RefusedInput(f"the image must be two-dimensional, got shape {image.data.shape}")
    return _Opened(hdus, image, hdus[0].header)


def _convert_opened(
    opened: _Opened, name: str, header_map: HeaderMap, target: Path, *, timed: bool
) -> ConvertedExposure:
    band = _band(opened, header_map.band)
    exposure_time_s = checked_exposure_time(opened.number(header_map.exposure_time_s, "exposure_time_s"))
    midpoint = _midpoint_mjd_tai(opened, header_map.time, exposure_time_s) if timed else math.nan
    try:
        detector = checked_detector(opened.look_up(header_map.detector, "detector"))
    except ValueError as error:
        raise RefusedInput(str(error)) from error
    zero_point = opened.number(header_map.zero_point, "zero_point")
    if header_map.zero_point.per == "second":
        zero_point += 2.5 * math.log10(exposure_time_s)
    if not 0.0 < zero_point < 60.0:
        raise RefusedInput(f"zero_point {zero_point} is no AB magnitude of 1 adu")
    exposure = _exposure(opened, header_map, zero_point)
    instrument = str(opened.look_up(header_map.instrument, "instrument")).strip()
    if not instrument:
        raise RefusedInput("instrument: the card is empty")
    named = None if header_map.target is None else str(opened.look_up(header_map.target, "target")).strip()
    observatory = None if header_map.observatory is None else _observatory(opened, header_map.observatory)
    fwhm_pix = _fwhm_pix(opened, header_map, exposure)
    ra, dec, radius = write_checked(target, exposure, zero_point=zero_point, source=name)
    return ConvertedExposure(
        source=name,
        path=target,
        instrument=instrument,
        band=band,
        detector=detector,
        midpoint_mjd_tai=midpoint,
        exposure_time_s=exposure_time_s,
        target=named or None,
        fwhm_pix=fwhm_pix,
        ra_deg=ra,
        dec_deg=dec,
        radius_deg=radius,
        observatory=observatory,
    )


def _observatory(opened: _Opened, entry: Value) -> str:
    text = str(opened.look_up(entry, "observatory")).strip()
    try:
        observatory_of(text)
    except ValueError as error:
        raise RefusedInput(f"observatory: {error}") from error
    return text


def _band(opened: _Opened, entry: BandValue) -> str:
    found = str(opened.look_up(entry, "band")).strip()
    for spelling in (found, found.split(" ")[0]):
        if spelling in entry.names:
            return entry.names[spelling]
        if spelling in BANDS:
            return spelling
    raise RefusedInput(f"band: {found!r} is none of {', '.join([*entry.names, *BANDS])}; add it to the map's names")


def _midpoint_mjd_tai(opened: _Opened, entry: TimeValue, exposure_time_s: float) -> float:
    found = opened.look_up(Value(card=entry.card), "time")
    if entry.format == "iso":
        mjd = mjd_of_iso(str(found))
    else:
        mjd = opened.number(Value(card=entry.card), "time") - (2400000.5 if entry.format == "jd" else 0.0)
    if entry.scale == "utc":
        mjd = tai_of_utc_mjd(mjd)
    shift_s = {"start": 0.5, "middle": 0.0, "end": -0.5}[entry.at] * exposure_time_s
    return checked_midpoint(mjd + shift_s / 86400.0)


def _exposure(opened: _Opened, header_map: HeaderMap, zero_point: float) -> Exposure:
    wcs = celestial_wcs(opened.image.header)
    pixels = np.array(opened.image.data, dtype=np.float64)
    mask = _mask(opened, header_map, pixels)
    variance = _variance(opened, header_map, pixels)
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(pixels) & np.isfinite(variance) & (variance > 0)
    if not usable.any():
        raise RefusedInput("no pixel has both a finite value and a positive variance")
    return exposure_in_njy(pixels, variance, usable, mask, wcs, _psf(opened, header_map), zero_point)


def _mask(opened: _Opened, header_map: HeaderMap, pixels: NDArray[np.float64]) -> NDArray[np.int32]:
    mask = np.zeros(pixels.shape, dtype=np.int32)
    if header_map.saturation is not None:
        with np.errstate(invalid="ignore"):
            mask[pixels >= opened.number(header_map.saturation, "saturation")] |= mask_bits("SAT")
    if header_map.mask is None:
        return mask
    hdu = opened.hdu(header_map.mask.hdu, "mask")
    if hdu.data.shape != pixels.shape or not np.issubdtype(hdu.data.dtype, np.integer):
        raise RefusedInput(f"mask: shape {hdu.data.shape} of {hdu.data.dtype}, integers of {pixels.shape} are needed")
    stored = np.asarray(hdu.data).astype(np.int64)
    planes = header_map.mask.bits or _bits_of_cards(hdu.header)
    if not planes:
        mask[stored != 0] |= mask_bits("BAD")
    for bit, plane in planes.items():
        if plane in MASK_BITS:
            mask[(stored >> bit) & 1 == 1] |= mask_bits(plane)
    return mask


def _bits_of_cards(header: fits.Header) -> dict[int, str]:
    planes = {}
    for card, bit in header.items():
        if card.upper().startswith("MP_"):
            if isinstance(bit, bool) or not isinstance(bit, int) or not 0 <= bit < MAX_STORED_BITS:
                raise RefusedInput(f"mask: {card} must be a bit number in [0, {MAX_STORED_BITS}), got {bit!r}")
            planes[bit] = card[3:].upper()
    return planes


def _variance(opened: _Opened, header_map: HeaderMap, pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    if header_map.noise is not None:
        hdu = opened.hdu(header_map.noise.hdu, "noise")
        if hdu.data.shape != pixels.shape:
            raise RefusedInput(f"noise: shape {hdu.data.shape}, the image {pixels.shape}")
        plane = np.array(hdu.data, dtype=np.float64)
        if header_map.noise.kind == "sigma":
            return np.where(plane > 0, plane, np.nan) ** 2
        if header_map.noise.kind == "inverse_variance":
            return np.asarray(1.0 / np.where(plane > 0, plane, np.nan))
        return plane
    if header_map.gain is None:
        raise RefusedInput("the map has neither noise nor gain: no variance")
    gain = opened.number(header_map.gain, "gain")
    read_noise_e = READ_NOISE_DEFAULT_E
    if header_map.read_noise_e is not None:
        read_noise_e = opened.number(header_map.read_noise_e, "read_noise_e")
    low, high = _GAIN_RANGE
    if not (low <= gain <= high and 0 <= read_noise_e <= high):
        raise RefusedInput(
            f"gain must be in [{low:g}, {high:g}] and read noise in [0, {high:g}], got {gain} and {read_noise_e}"
        )
    return np.asarray((np.maximum(pixels, 0.0) * gain + read_noise_e**2) / gain**2)


def _psf(opened: _Opened, header_map: HeaderMap) -> NDArray[np.float64] | None:
    if header_map.psf_hdu is None:
        return None
    psf = np.array(opened.hdu(header_map.psf_hdu, "psf_hdu").data, dtype=np.float64)
    if psf.ndim != 2 or psf.shape[0] != psf.shape[1] or psf.shape[0] % 2 == 0 or not psf.sum() > 0:
        raise RefusedInput(f"psf_hdu: an odd square image with a positive sum is needed, got shape {psf.shape}")
    return np.asarray(psf / psf.sum())


def _fwhm_pix(opened: _Opened, header_map: HeaderMap, exposure: Exposure) -> float:
    """Seeing by the card, the PSF or the stars; NaN where none of these says."""
    if header_map.fwhm_pix is not None:
        fwhm_pix = opened.number(header_map.fwhm_pix, "fwhm_pix")
        if fwhm_pix <= 0:
            raise RefusedInput(f"fwhm_pix must be positive, got {fwhm_pix}")
        return fwhm_pix
    try:
        if exposure.psf is not None:
            return psf_fwhm_pix(exposure.psf)
        bad = (exposure.mask & mask_bits(*UNUSABLE_PLANES)) != 0
        sky = subtract_background(exposure.image, bad, _BACKGROUND_BOX_PIX)
        variance = np.where(bad, np.float32(np.median(exposure.variance[~bad])), exposure.variance)
        return estimate_psf(sky.image, variance, bad).fwhm_pix
    except (PsfEstimationError, BackgroundError):
        return math.nan


# --- templates --------------------------------------------------------------------------------------------------


def _nearest_template(one: ConvertedExposure, templates: list[ConvertedExposure]) -> Path | None:
    """Of the given templates of the band that cover the exposure's centre the one whose centre is nearest."""
    near = []
    for other in templates:
        distance = separation_deg(one.ra_deg, one.dec_deg, other.ra_deg, other.dec_deg)
        if other.band == one.band and distance < other.radius_deg:
            near.append((distance, other.source, other.path))
    return min(near)[2] if near else None


def _build_templates(
    converted: list[ConvertedExposure],
    folder: Path,
    refused: list[Refusal],
    notes: list[str],
    progress: Progress | None,
) -> dict[Path, Path | None]:
    """Template of each exposure that stays a visit."""
    chosen: dict[Path, Path | None] = {}
    groups = {str(number): group for number, group in enumerate(group_fields(converted), start=1)}
    for number in watched(list(groups), "stacking templates", progress):
        group = groups[number]
        n_stacked = min(int(TEMPLATE_PART * len(group) + 0.5), MAX_TEMPLATE_EXPOSURES, len(group) - 1)
        if n_stacked < 1:
            chosen |= {one.path: None for one in group}
            continue
        ranked = sorted(group, key=lambda one: (one.seeing_pix, one.midpoint_mjd_tai, one.source))
        path = folder / f"{ranked[0].band}_{int(number):03d}.fits"
        try:
            write_exposure(path, _stacked(ranked[:n_stacked]), header={"NFRAMES": n_stacked})
        except (StackingError, WarpError, BackgroundError, ExposureError) as error:
            refused.append(Refusal(ranked[0].source, f"no template of band {ranked[0].band}: {error}"))
            chosen |= {one.path: None for one in group}
            continue
        stacked = ", ".join(one.source for one in ranked[:n_stacked])
        notes.append(f"template {path.name}: {stacked}; these are no visits")
        for one in ranked[:n_stacked]:
            one.path.unlink()
        chosen |= {one.path: path for one in ranked[n_stacked:]}
    return chosen


def _stacked(group: list[ConvertedExposure]) -> Exposure:
    """Clipped mean on the grid of the first exposure."""
    first = read_exposure(group[0].path)
    if len(group) == 1:
        return first
    shape = (first.image.shape[0], first.image.shape[1])
    exposures = (
        exposure_to_stack(read_exposure(one.path), first.wcs, shape, flux_ratio=1.0, fwhm_pix=one.fwhm_pix)
        for one in group
    )
    return exposure_of_stack(stack_on_grid(exposures, shape, min_exposures=1), first.wcs)

"""Cutouts of the Legacy Surveys (DECam, MOSAIC-3, 90prime; Community Pipeline) into night folders, one an instrument.

Everything comes as it is: image (`_ooi_`), data-quality codes (`_ood_`) and inverse variance (`_oow_`) with their TPV
WCS, PSFEx models (`*psfex*`), and the zero point of the CCD from `survey-ccds*.fits*` (`ccdzpt`, AB magnitude of 1 adu
a second). Of each band and field the exposure with the best seeing is the template, the others are visits.

The weights of MOSAIC-3 and 90prime hold the noise of sky and readout only; the photon noise of the sources is added.
Their images are photoelectrons a second (`BUNIT`), so that it is their value above the sky over the exposure time.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy import ndimage

from runners.ingest.assembly import (
    ConvertedExposure,
    celestial_wcs,
    checked_detector,
    checked_exposure_time,
    exposure_in_njy,
    group_fields,
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
    tai_of_utc_mjd,
    watched,
)
from schemas.exposures import Exposure, mask_bits, open_unpacked
from transforms.numerics.psf_modelling import PsfEstimationError, psf_fwhm_pix

# codes of the Community Pipeline since version 3.5 (NOIRLab data handbook); 7 is a difference to the stack: no defect
PLANES_OF_CODES = {1: "BAD", 2: "NO_DATA", 3: "SAT", 4: "SAT", 5: "CR", 6: "BAD", 7: "SUSPECT", 8: "STREAK"}
_BAND_OF_FILTER = {"u": "u", "g": "g", "r": "r", "i": "i", "z": "z", "zd": "z", "y": "y"}
_OBSERVATORIES = {"DECam": "W84", "Mosaic3": "695", "90prime": "V00"}  # by INSTRUME; codes of the MPC
_PSF_HALF_WIDTH_PIX = 31
_ZERO_POINT_RANGE = (15.0, 35.0)
_IMAGE_NAME = re.compile(r"_ooi_.*\.fits(\.\w+)?$")
_CALIBRATION_NAME = re.compile(r"(-psfex|sky)\.fits(\.\w+)?$")
_MODEL_NAME = re.compile(r"psfex.*\.fits(\.\w+)?$")
_TABLE_NAME = re.compile(r"^survey-ccds.*\.fits(\.\w+)?$")
_COLUMNS = ("ccdname", "filter", "exptime", "mjd_obs", "ccdzpt", "expnum")


@dataclass(frozen=True)
class _CcdRow:
    """What `survey-ccds` says about one image."""

    ccd_name: str
    band: str
    exposure_time_s: float
    mjd_utc: float
    zero_point_per_s: float
    exposure_number: int


def ingest_decam(source: Path, out: Path, progress: Progress | None = None) -> list[IngestedNight]:
    """Ingest a tree of Community Pipeline cutouts.

    Parameters
    ----------
    source : Path
        Folder with `survey-ccds*.fits*` tables and, anywhere below, `*_ooi_*` images with their companions.
    out : Path
        Night folder; with several instruments, the folder of a night folder for each.
    progress : callable, optional
        Called with (what, done, all).

    Returns
    -------
    list of IngestedNight
        One per instrument, by name. Each image that cannot be used is in `refused`; so is one that would be the
        template of nothing.

    Raises
    ------
    IngestError
        No images or no table there, none of them can be used, or `out` holds something else.
    """
    paths = files_below(source, without=out)
    images = [path for path in paths if _IMAGE_NAME.search(path.name) and not _CALIBRATION_NAME.search(path.name)]
    if not images:
        raise IngestError(f"no *_ooi_*.fits in {source}")
    refused: list[Refusal] = []
    rows = _ccd_rows(source, [path for path in paths if _TABLE_NAME.match(path.name)], images, refused)
    models = [path for path in paths if _MODEL_NAME.search("/".join(path.relative_to(source).parts))]
    claim_folder(out)
    instruments = _instruments(images, refused)
    if not instruments:
        raise IngestError(f"none of {len(images)} images can be read; {refused[0].source}: {refused[0].reason}")
    nights: list[IngestedNight] = []
    for name, own in sorted(instruments.items()):
        folder = out if len(instruments) == 1 else out / name
        own_refused = list(refused) if not nights else []
        nights.append(_ingest_instrument(own, rows, models, folder, own_refused, progress))
    if not any(night.detectors for night in nights):
        reasons = [refusal for night in nights for refusal in night.refused]
        raise IngestError(f"none of {len(images)} images can be used; {reasons[0].source}: {reasons[0].reason}")
    return nights


@dataclass(frozen=True)
class _Images:
    """Images of one instrument by their names, and what the instrument calls itself."""

    instrument: str
    by_name: dict[str, Path]


def _instruments(images: list[Path], refused: list[Refusal]) -> dict[str, _Images]:
    """Images by instrument, the key being the name of its folder."""
    found: dict[str, _Images] = {}
    seen: dict[str, Path] = {}
    for path in images:
        if path.name in seen:  # tables know images by their names only
            refused.append(Refusal(path.name, f"{path}: an image of this name is there already, {seen[path.name]}"))
            continue
        seen[path.name] = path
        try:
            with _opened(path) as hdus:
                instrument = _text(hdus[0].header, "INSTRUME")
        except RefusedInput as error:
            refused.append(Refusal(path.name, str(error)))
            continue
        if not instrument:
            refused.append(Refusal(path.name, "no INSTRUME card in the primary header"))
            continue
        folder = re.sub(r"\W+", "_", instrument).lower()
        found.setdefault(folder, _Images(instrument, {})).by_name[path.name] = path
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[fits.HDUList]:
    """A file's HDUs; whatever astropy makes of broken bytes becomes RefusedInput."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=AstropyWarning)  # cards of the archive that bend the standard
            warnings.filterwarnings("error", message=".*truncated")
            with open_unpacked(path) as stream, fits.open(stream, memmap=False, lazy_load_hdus=False) as hdus:
                yield hdus
    except RefusedInput:
        raise
    except Exception as error:  # astropy raises many kinds on broken bytes
        raise RefusedInput(f"broken FITS file: {type(error).__name__}: {error}") from error


def _text(header: fits.Header, card: str) -> str:
    """Text of a card, empty where it is missing or has no value."""
    value = header.get(card)
    return value.strip() if isinstance(value, str) else ""


def _ingest_instrument(
    images: _Images,
    rows: dict[str, list[dict[str, Any]]],
    models: list[Path],
    folder: Path,
    refused: list[Refusal],
    progress: Progress | None,
) -> IngestedNight:
    claim_folder(folder)
    converted: list[ConvertedExposure] = []
    notes: set[str] = set()
    for name in watched(sorted(images.by_name), f"reading {images.instrument}", progress):
        try:
            converted.append(_convert(images, name, rows.get(name, []), models, folder, notes))
        except RefusedInput as error:
            refused.append(Refusal(name, str(error)))
    science: list[ConvertedExposure] = []
    templates: dict[Path, Path | None] = {}
    n_templates = 0
    for group in group_fields(without_repeats(converted, refused)):
        best = min(group, key=lambda one: (one.seeing_pix, one.midpoint_mjd_tai))
        others = [one for one in group if one is not best]
        if not others:
            best.path.unlink()
            refused.append(Refusal(best.source, f"the only exposure of band {best.band} in its field: no template"))
            continue
        n_templates += 1
        template = folder / "templates" / best.path.name
        template.parent.mkdir(parents=True, exist_ok=True)
        best.path.rename(template)
        notes.add(f"{best.source} is the template of band {best.band}, {len(others)} visits")
        templates |= {one.path: template for one in others}
        science += others
    visits = visits_of(science, templates)
    night = IngestedNight(
        folder=folder,
        instrument=images.instrument,
        visits=len(visits),
        detectors=sum(len(visit.detectors) for visit in visits),
        templates=n_templates,
        refused=tuple(sorted(refused)),
        notes=tuple(sorted(notes)),
    )
    return finish_folder(night, visits)


def _ccd_rows(
    source: Path, tables: list[Path], images: list[Path], refused: list[Refusal]
) -> dict[str, list[dict[str, Any]]]:
    """Rows of all `survey-ccds` tables by the names of the images; tables may list many more."""
    wanted = {path.name for path in images}
    rows: dict[str, list[dict[str, Any]]] = {}
    unusable = []
    for path in tables:
        try:
            with _opened(path) as hdus:
                table = _table(hdus, (*_COLUMNS, "image_filename"))
                columns = {name: table[name] for name in _COLUMNS}
                for index, name in enumerate(table["image_filename"]):
                    if (file := str(name).strip().rsplit("/", 1)[-1]) in wanted:
                        rows.setdefault(file, []).append({key: column[index] for key, column in columns.items()})
        except RefusedInput as error:
            unusable.append(Refusal(str(path.relative_to(source)), f"unusable table: {error}"))
    if len(unusable) == len(tables):
        why = "".join(f"; {refusal.source}: {refusal.reason}" for refusal in unusable)
        raise IngestError(f"no survey-ccds*.fits table in {source}: zero points are not known{why}")
    refused += unusable
    return rows


def _table(hdus: fits.HDUList, columns: tuple[str, ...]) -> fits.FITS_rec:
    """The table in the first extension, which must have these columns."""
    if len(hdus) < 2 or not isinstance(hdus[1], (fits.BinTableHDU, fits.TableHDU)):
        raise RefusedInput("no table in the first extension")
    known = {name.lower() for name in hdus[1].columns.names}
    if missing := [name for name in columns if name not in known]:
        raise RefusedInput(f"no column {', '.join(missing)}")
    return hdus[1].data


def _row_of(rows: list[dict[str, Any]], extension: str) -> _CcdRow:
    """The one row that is meant, checked; with several it is that of the image's extension."""
    different = list(dict.fromkeys(_checked_row(row) for row in rows))
    if len(different) > 1:
        different = [row for row in different if row.ccd_name == extension]
    if len(different) != 1:
        reason = "not in any survey-ccds table" if not rows else f"{len(rows)} different rows in survey-ccds tables"
        raise RefusedInput(f"{reason}: no zero point")
    return different[0]


def _checked_row(row: dict[str, Any]) -> _CcdRow:
    try:
        checked = _CcdRow(
            ccd_name=str(row["ccdname"]).strip(),
            band=str(row["filter"]).strip(),
            exposure_time_s=float(row["exptime"]),
            mjd_utc=float(row["mjd_obs"]),
            zero_point_per_s=float(row["ccdzpt"]),
            exposure_number=int(row["expnum"]),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise RefusedInput(f"its row of the survey-ccds table: {error}") from error
    if checked.band not in _BAND_OF_FILTER:
        raise RefusedInput(f"filter {checked.band!r}, known are {', '.join(_BAND_OF_FILTER)}")
    low, high = _ZERO_POINT_RANGE
    if not low < checked.zero_point_per_s < high:
        raise RefusedInput(f"ccdzpt {checked.zero_point_per_s} is not between {low} and {high}")
    checked_exposure_time(checked.exposure_time_s)
    return checked


def _convert(
    images: _Images, name: str, rows: list[dict[str, Any]], models: list[Path], folder: Path, notes: set[str]
) -> ConvertedExposure:
    path = images.by_name[name]
    image, header, primary = _plane(path)
    row = _row_of(rows, _text(header, "EXTNAME"))
    start = tai_of_utc_mjd(row.mjd_utc)
    midpoint = checked_midpoint(start + 0.5 * row.exposure_time_s / 86400.0)
    codes, weight = _companion(path, "_ood_"), _companion(path, "_oow_")
    if not image.shape == codes.shape == weight.shape:
        raise RefusedInput(f"planes differ in shape: image {image.shape}, mask {codes.shape}, weight {weight.shape}")
    if not np.issubdtype(codes.dtype, np.integer):
        raise RefusedInput(f"mask codes must be integers, got {codes.dtype}")
    psf = _psf_at_centre(_model_of(path, row, models), image.shape)
    if psf is None:
        notes.add(f"no PSF model for {name}: measured on the image when it is subtracted")
    # MOSAIC-3 and 90prime images are per second, DECam's are not
    per_second = "/s" in _text(primary, "BUNIT")
    zero_point = row.zero_point_per_s + (0.0 if per_second else 2.5 * float(np.log10(row.exposure_time_s)))
    exposure = _exposure(
        image, codes, weight, celestial_wcs(header), psf, zero_point, row.exposure_time_s if per_second else None
    )
    out = folder / "science" / (name.split(".fits")[0].replace(".", "_") + ".fits")
    detector = _detector(header, primary)
    ra, dec, radius = write_checked(out, exposure, zero_point=zero_point, source=name)
    return ConvertedExposure(
        source=name,
        path=out,
        instrument=images.instrument,
        band=_BAND_OF_FILTER[row.band],
        detector=detector,
        midpoint_mjd_tai=midpoint,
        exposure_time_s=row.exposure_time_s,
        target=_text(primary, "OBJECT") or None,
        fwhm_pix=_fwhm(psf),
        ra_deg=ra,
        dec_deg=dec,
        radius_deg=radius,
        observatory=_OBSERVATORIES.get(images.instrument),
    )


def _exposure(
    image: NDArray[np.floating],
    codes: NDArray[np.integer],
    weight: NDArray[np.floating],
    wcs: WCS,
    psf: NDArray[np.float64] | None,
    zero_point: float,
    electrons_per_s_for: float | None,
) -> Exposure:
    """Planes in nJy; `electrons_per_s_for` is the exposure time of an image whose weights lack its photon noise."""
    usable = np.isfinite(weight) & (weight > 0) & np.isfinite(image)
    if not usable.any():
        raise RefusedInput("no pixel has a finite value and a positive weight")
    variance = 1.0 / np.where(usable, weight, np.nan)
    if electrons_per_s_for is not None:
        variance += np.maximum(image - np.median(image[usable]), 0.0) / electrons_per_s_for
    return exposure_in_njy(image, variance, usable, _mask_of_codes(codes), wcs, psf, zero_point)


def _fwhm(psf: NDArray[np.float64] | None) -> float:
    if psf is None:
        return float("nan")
    try:
        return psf_fwhm_pix(psf)
    except PsfEstimationError:
        return float("nan")


def _detector(header: fits.Header, primary: fits.Header) -> int:
    try:
        return checked_detector(header.get("CCDNUM", primary.get("CCDNUM", 0)))
    except ValueError as error:
        raise RefusedInput(f"CCDNUM: {error}") from error


def _companion(path: Path, kind: str) -> NDArray[Any]:
    companion = path.with_name(path.name.replace("_ooi_", kind))
    if not companion.is_file():
        raise RefusedInput(f"no {companion.name} beside it")
    try:
        return _plane(companion)[0]
    except RefusedInput as error:
        raise RefusedInput(f"{companion.name}: {error}") from error


def _plane(path: Path) -> tuple[NDArray[Any], fits.Header, fits.Header]:
    """The two-dimensional image of a file, its header and the primary header."""
    with _opened(path) as hdus:
        found = [hdu for hdu in hdus if hdu.is_image and hdu.header.get("NAXIS", 0) == 2]
        if len(found) != 1:
            what = f"{len(found)} images" if found else "no two-dimensional image"
            raise RefusedInput(f"{what} in the file, that of one CCD is needed")
        return np.array(found[0].data), found[0].header.copy(), hdus[0].header.copy()


def _mask_of_codes(codes: NDArray[np.integer]) -> NDArray[np.int32]:
    mask = np.zeros(codes.shape, dtype=np.int32)
    for code in np.unique(codes):
        if code != 0:  # a code that the handbook does not list is taken for a defect
            mask[codes == code] |= mask_bits(PLANES_OF_CODES.get(int(code), "BAD"))
    return mask


def _model_of(path: Path, row: _CcdRow, models: list[Path]) -> Path | None:
    """The PSFEx table of an image, named by its file or by the number of its exposure, and by its CCD."""
    stem = path.name.split(".fits")[0].removesuffix(f".{row.ccd_name}").removesuffix(f"-{row.ccd_name}")
    for model in models:
        name = model.name.split(".fits")[0].removesuffix("-psfex")
        if name in (f"{stem}-{row.ccd_name}", f"decam-{row.exposure_number}-{row.ccd_name}"):
            return model
        if name.endswith(f"-{row.exposure_number:08d}-{row.ccd_name}"):
            return model
    return None


def _psf_at_centre(path: Path | None, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """PSFEx model at the centre of an image, on its pixels, sum 1; None without a model.

    ``P = sum_k c_k(u, v) M_k`` with ``u = (x - POLZERO1) / POLSCAL1``, likewise v, x and y counted from 1, and the
    polynomial's terms in the order ``v^j u^i`` with i running fastest and i + j <= POLDEG1.
    """
    if path is None:
        return None
    degree, u, v = 0, 0.0, 0.0
    try:
        with _opened(path) as hdus:
            header, planes = hdus[1].header, np.array(_table(hdus, ("psf_mask",))["psf_mask"][0], dtype=np.float64)
        step_pix = float(header["PSF_SAMP"])
        if header.get("POLNAXIS", 2) > 0:  # 0: a PSF that is the same everywhere; not in files of the Legacy Surveys
            degree = int(header["POLDEG1"])
            ny, nx = shape
            u = ((nx + 1) / 2.0 - float(header["POLZERO1"])) / float(header["POLSCAL1"])
            v = ((ny + 1) / 2.0 - float(header["POLZERO2"])) / float(header["POLSCAL2"])
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:  # RefusedInput is a ValueError
        raise RefusedInput(f"unusable PSFEx table {path.name}: {error}") from error
    terms = [u**i * v**j for j in range(degree + 1) for i in range(degree + 1 - j)]
    known = planes.ndim == 3 and len(planes) == len(terms) and all(side % 2 == 1 for side in planes.shape[1:])
    if not known or not 0.01 < step_pix < 100.0:
        raise RefusedInput(
            f"unusable PSFEx table {path.name}: {planes.shape} for a polynomial of degree {degree}, step {step_pix}"
        )
    psf = np.einsum("k,kyx->yx", np.array(terms), planes)
    middle = np.array(psf.shape) // 2
    half = min(_PSF_HALF_WIDTH_PIX, int(middle.min() * step_pix))
    offset = np.arange(-half, half + 1) / step_pix
    grid = np.meshgrid(middle[0] + offset, middle[1] + offset, indexing="ij")
    on_pixels = (
        psf[np.ix_(middle[0] + np.arange(-half, half + 1), middle[1] + np.arange(-half, half + 1))]
        if (step_pix == 1.0)
        else ndimage.map_coordinates(psf, grid, order=3, mode="constant")
    )
    total = on_pixels.sum()
    if not np.isfinite(total) or total <= 0:
        raise RefusedInput(f"unusable PSFEx table {path.name}: the PSF at the centre has the sum {total}")
    return np.asarray(on_pixels / total)

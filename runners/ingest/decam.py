"""Cutouts of the Legacy Surveys (DECam, MOSAIC-3, 90prime; Community Pipeline) into night folders, one an instrument.

Everything comes as it is: image (`_ooi_`), data-quality codes (`_ood_`) and inverse variance (`_oow_`) with their TPV
WCS, PSFEx models (`*psfex*`), and the zero point of the CCD from `survey-ccds*.fits*` (`ccdzpt`, AB magnitude of 1 adu
a second). Of each band and field the exposure with the best seeing is the template, the others are visits.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy import ndimage

from runners.ingest.assembly import ConvertedExposure, checked_detector, group_fields, sky_extent, visits_of
from runners.ingest.night_folder import (
    IngestedNight,
    IngestError,
    Progress,
    Refusal,
    RefusedInput,
    claim_folder,
    finish_folder,
    tai_of_utc_mjd,
    watched,
)
from schemas.exposures import AB_ZERO_POINT_NJY, Exposure, mask_bits, write_exposure
from transforms.numerics.psf_modelling import PsfEstimationError, psf_fwhm_pix

# codes of the Community Pipeline since version 3.5 (NOIRLab data handbook); 7 is a difference to the stack: no defect
PLANES_OF_CODES = {1: "BAD", 2: "NO_DATA", 3: "SAT", 4: "SAT", 5: "CR", 6: "BAD", 7: "SUSPECT", 8: "STREAK"}
_BAND_OF_FILTER = {"u": "u", "g": "g", "r": "r", "i": "i", "z": "z", "zd": "z", "y": "y"}
_PSF_HALF_WIDTH_PIX = 31
_ZERO_POINT_RANGE = (15.0, 35.0)


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
    if not source.is_dir():
        raise IngestError(f"{source} is not a folder")
    calibrations = tuple(f"{kind}.fits" for kind in ("-psfex", "sky"))
    images = sorted(path for path in source.rglob("*_ooi_*.fits*") if not path.name.endswith(calibrations))
    if not images:
        raise IngestError(f"no *_ooi_*.fits in {source}")
    rows = _ccd_rows(source)
    models = sorted({*source.rglob("psfex/**/*.fits"), *source.rglob("*-psfex.fits")})
    claim_folder(out)
    refused: list[Refusal] = []
    instruments = _instruments(images, refused)
    if not instruments:
        raise IngestError(f"none of {len(images)} images can be read; {refused[0].source}: {refused[0].reason}")
    nights: list[IngestedNight] = []
    for instrument, own in sorted(instruments.items()):
        folder = out if len(instruments) == 1 else out / re.sub(r"\W+", "_", instrument).lower()
        own_refused = list(refused) if not nights else []
        nights.append(_ingest_instrument(instrument, own, rows, models, folder, own_refused, progress))
    if not any(night.detectors for night in nights):
        reasons = [refusal for night in nights for refusal in night.refused]
        raise IngestError(f"none of {len(images)} images can be used; {reasons[0].source}: {reasons[0].reason}")
    return nights


def _instruments(images: list[Path], refused: list[Refusal]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in images:
        try:
            with fits.open(path, memmap=False) as hdus:
                instrument = str(hdus[0].header.get("INSTRUME", "")).strip()
        except Exception as error:  # astropy raises many kinds on broken bytes
            refused.append(Refusal(path.name, f"broken FITS file: {type(error).__name__}: {error}"))
            continue
        if not instrument:
            refused.append(Refusal(path.name, "no INSTRUME card in the primary header"))
            continue
        found.setdefault(instrument, []).append(path)
    return found


def _ingest_instrument(
    instrument: str,
    images: list[Path],
    rows: dict[str, _CcdRow],
    models: list[Path],
    folder: Path,
    refused: list[Refusal],
    progress: Progress | None,
) -> IngestedNight:
    claim_folder(folder)
    by_name = {path.name: path for path in images}
    converted: list[ConvertedExposure] = []
    notes: set[str] = set()
    for name in watched(sorted(by_name), f"reading {instrument}", progress):
        try:
            converted.append(_convert(by_name[name], instrument, rows.get(name), models, folder, notes))
        except RefusedInput as error:
            refused.append(Refusal(name, str(error)))
    science: list[ConvertedExposure] = []
    templates: dict[Path, Path | None] = {}
    n_templates = 0
    for group in group_fields(converted):
        best = min(group, key=lambda one: (one.seeing_deg, one.midpoint_mjd_tai))
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
    visits = visits_of(science, templates, refused)
    night = IngestedNight(
        folder=folder,
        instrument=instrument,
        visits=len(visits),
        detectors=sum(len(visit.detectors) for visit in visits),
        templates=n_templates,
        refused=tuple(sorted(refused)),
        notes=tuple(sorted(notes)),
    )
    return finish_folder(night, visits)


def _ccd_rows(source: Path) -> dict[str, _CcdRow]:
    """Rows of all `survey-ccds` tables by the image's file name."""
    tables = sorted(source.rglob("survey-ccds*.fits*"))
    if not tables:
        raise IngestError(f"no survey-ccds*.fits table in {source}: zero points are not known")
    rows: dict[str, _CcdRow] = {}
    for path in tables:
        try:
            for row in fits.getdata(path, 1):
                name = Path(str(row["image_filename"]).strip()).name
                rows[name] = _CcdRow(
                    ccd_name=str(row["ccdname"]).strip(),
                    band=str(row["filter"]).strip(),
                    exposure_time_s=float(row["exptime"]),
                    mjd_utc=float(row["mjd_obs"]),
                    zero_point_per_s=float(row["ccdzpt"]),
                    exposure_number=int(row["expnum"]),
                )
        except Exception as error:  # astropy raises many kinds; a column may be missing
            raise IngestError(f"{path}: unusable table: {type(error).__name__}: {error}") from error
    return rows


def _convert(
    path: Path, instrument: str, row: _CcdRow | None, models: list[Path], folder: Path, notes: set[str]
) -> ConvertedExposure:
    if row is None:
        raise RefusedInput("not in any survey-ccds table: no zero point")
    if row.band not in _BAND_OF_FILTER:
        raise RefusedInput(f"filter {row.band!r}, known are {', '.join(_BAND_OF_FILTER)}")
    low, high = _ZERO_POINT_RANGE
    if not low < row.zero_point_per_s < high:
        raise RefusedInput(f"ccdzpt {row.zero_point_per_s} is not between {low} and {high}")
    if not (np.isfinite(row.exposure_time_s) and row.exposure_time_s > 0):
        raise RefusedInput(f"exptime must be positive, got {row.exposure_time_s}")
    image, header, primary = _plane(path)
    codes, _, _ = _plane(_companion(path, "_ood_"))
    weight, _, _ = _plane(_companion(path, "_oow_"))
    if not image.shape == codes.shape == weight.shape:
        raise RefusedInput(f"planes differ in shape: image {image.shape}, mask {codes.shape}, weight {weight.shape}")
    wcs = _wcs(header)
    psf = _psf_at_centre(_model_of(path, row, models), image.shape)
    if psf is None:
        notes.add(f"no PSF model for {path.name}: measured on the image when it is subtracted")
    zero_point = row.zero_point_per_s
    if "/s" not in str(primary.get("BUNIT", "")):  # MOSAIC-3 and 90prime images are per second, DECam's are not
        zero_point += 2.5 * float(np.log10(row.exposure_time_s))
    scale = 10.0 ** (0.4 * (AB_ZERO_POINT_NJY - zero_point))
    mask = _mask_of_codes(codes)
    usable = np.isfinite(weight) & (weight > 0) & np.isfinite(image)
    mask[~usable] |= mask_bits("NO_DATA")
    exposure = Exposure(
        image=np.where(usable, image * scale, np.nan).astype(np.float32),
        variance=(scale**2 / np.where(usable, weight, np.nan)).astype(np.float32),
        mask=mask,
        wcs=wcs,
        psf=psf,
    )
    if not usable.any():
        raise RefusedInput("no pixel has a finite value and a positive weight")
    ra, dec, radius = sky_extent(exposure)
    out = folder / "science" / (path.name.split(".fits")[0].replace(".", "_") + ".fits")
    write_exposure(out, exposure, header={"MAGZERO": (zero_point, "AB mag of 1 unit of the input"), "FRAME": path.name})
    start = tai_of_utc_mjd(row.mjd_utc)
    return ConvertedExposure(
        source=path.name,
        path=out,
        instrument=instrument,
        band=_BAND_OF_FILTER[row.band],
        detector=_detector(header, primary),
        midpoint_mjd_tai=start + 0.5 * row.exposure_time_s / 86400.0,
        exposure_time_s=row.exposure_time_s,
        target=str(primary.get("OBJECT", "")).strip() or None,
        fwhm_pix=_fwhm(psf),
        ra_deg=ra,
        dec_deg=dec,
        radius_deg=radius,
    )


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


def _companion(path: Path, kind: str) -> Path:
    companion = path.with_name(path.name.replace("_ooi_", kind))
    if not companion.is_file():
        raise RefusedInput(f"no {companion.name} beside it")
    return companion


def _plane(path: Path) -> tuple[NDArray[Any], fits.Header, fits.Header]:
    """First two-dimensional image of a file, its header and the primary header."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=AstropyWarning)  # cards of the archive that bend the standard
            warnings.filterwarnings("error", message=".*truncated")
            with fits.open(path, memmap=False) as hdus:
                for hdu in hdus:
                    if hdu.is_image and hdu.header.get("NAXIS", 0) == 2:
                        return np.array(hdu.data), hdu.header.copy(), hdus[0].header.copy()
    except Exception as error:  # astropy raises many kinds on broken bytes
        raise RefusedInput(f"{path.name}: broken FITS file: {type(error).__name__}: {error}") from error
    raise RefusedInput(f"{path.name}: no two-dimensional image in the file")


def _wcs(header: fits.Header) -> WCS:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=AstropyWarning)
        try:
            wcs = WCS(header)
        except Exception as error:  # wcslib raises many kinds
            raise RefusedInput(f"unusable WCS: {type(error).__name__}: {error}") from error
    if not wcs.has_celestial:
        raise RefusedInput("no celestial WCS in the image header")
    return wcs.celestial


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
    try:
        with fits.open(path, memmap=False) as hdus:
            header, planes = hdus[1].header, np.array(hdus[1].data["psf_mask"][0], dtype=np.float64)
        degree = int(header["POLDEG1"])
        ny, nx = shape
        u = ((nx + 1) / 2.0 - float(header["POLZERO1"])) / float(header["POLSCAL1"])
        v = ((ny + 1) / 2.0 - float(header["POLZERO2"])) / float(header["POLSCAL2"])
        step_pix = float(header["PSF_SAMP"])
    except Exception as error:  # astropy raises many kinds; a card may be missing
        raise RefusedInput(f"{path.name}: unusable PSFEx table: {type(error).__name__}: {error}") from error
    terms = [u**i * v**j for j in range(degree + 1) for i in range(degree + 1 - j)]
    if planes.ndim != 3 or len(planes) != len(terms) or not step_pix > 0:
        raise RefusedInput(f"{path.name}: {planes.shape} planes for a polynomial of degree {degree}, step {step_pix}")
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
        raise RefusedInput(f"{path.name}: the PSF at the centre has the sum {total}")
    return np.asarray(on_pixels / total)

"""Exposures in and out of FITS: image, variance, mask, WCS and PSF of one detector of one visit.

Layout of a file: `IMAGE` (or the primary HDU) float32 with the WCS, `MASK` int32 with
`MP_<PLANE>` cards giving bit numbers, `VARIANCE` float32 in BUNIT squared, `PSF` an odd square
image summing to 1. Pixels are converted to nJy on reading; mask planes to the fixed bits below.
A card `NINTERP` of `VARIANCE` says that the noise is not white: how often it was interpolated.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS

MASK_BITS = {
    "BAD": 0,
    "SAT": 1,
    "CR": 2,
    "EDGE": 3,
    "NO_DATA": 4,
    "INTRP": 5,
    "SUSPECT": 6,
    "STREAK": 7,
    "SPIKE": 8,
    "HIGH_VARIANCE": 9,
    "INJECTED": 10,
    "SAT_TEMPLATE": 11,
    "BAD_TEMPLATE": 12,
    "CR_TEMPLATE": 13,
    "INJECTED_TEMPLATE": 14,
    "OTHER": 15,
}
AB_ZERO_POINT_NJY = 31.4  # m_AB = 31.4 - 2.5 log10(flux / nJy)
READ_NOISE_DEFAULT_E = 5.0
MAX_STORED_BITS = 63
J2000 = 2000.0
MIN_SIDE_PIX = 32
MIN_PSF_SIDE_PIX = 3
MAX_INTERPOLATED = 16
MAX_ABS_MAG_ZERO = 60.0  # beyond, nJy no longer fit float32


_UNPACKERS = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}


class ExposureError(ValueError):
    """An exposure that cannot be used; the message names file and reason."""


@dataclass(frozen=True)
class Exposure:
    """One detector of one visit (or its template).

    Attributes
    ----------
    image : (ny, nx) float32, nJy, sky may be present, NaN where there are no data
    variance : (ny, nx) float32, nJy^2, > 0 (infinite where there are no data)
    mask : (ny, nx) int32, bits as in `MASK_BITS`
    wcs : celestial WCS, 0-based pixels with `origin=0`
    psf : (k, k) float64 with k odd and sum 1, or None when the file has none
    notes : what was missing in the file and had to be estimated
    interpolated : how many times the noise was interpolated, a mean for a stack; the variance is then that of white
        noise which gives sums over several pixels the error they have
    """

    image: np.ndarray
    variance: np.ndarray
    mask: np.ndarray
    wcs: WCS
    psf: np.ndarray | None
    notes: tuple[str, ...] = ()
    interpolated: float = 0.0


def mask_bits(*planes: str) -> int:
    """The bits of the named planes, ORed."""
    return sum(1 << MASK_BITS[plane] for plane in planes)


def read_exposure(path: str | Path) -> Exposure:
    """Read one exposure, convert it to nJy and fill in what can be estimated.

    Parameters
    ----------
    path : str or Path
        FITS file, plain or compressed.

    Returns
    -------
    Exposure
        `notes` names everything that was missing and stood in for.

    Raises
    ------
    ExposureError
        Missing or broken file, no two-dimensional image, no WCS in (ra, dec), no way to nJy, planes
        of another shape, no finite pixel, an even or non-square PSF.

    Notes
    -----
    A file cut exactly between two of its extensions looks like one that never had the later ones: FITS
    has no end mark. `notes` then says that there is no variance, or no mask.
    """
    path = Path(path)
    if not path.is_file():
        raise ExposureError(f"{path.name}: no such file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=AstropyWarning)
            # What astropy only warns of is a broken file for us: without its mask or variance, an
            # image cut short would look like one that never had them. The last filter goes first.
            warnings.filterwarnings("error", message=".*truncated")
            warnings.filterwarnings("error", message="Error validating header")
            # Values too large for float32 become infinite: pixels without data.
            with (
                np.errstate(over="ignore", invalid="ignore"),
                open_unpacked(path) as stream,  # astropy leaves a file open when it fails half-way
                fits.open(stream, memmap=False, lazy_load_hdus=False) as hdus,
            ):
                return _exposure_from_hdus(hdus, path.name)
    except ExposureError:
        raise
    except Exception as error:  # astropy raises many kinds on broken bytes: all are one thing to us
        raise ExposureError(f"{path.name}: broken FITS file: {type(error).__name__}: {error}") from error


def read_grid(path: str | Path) -> tuple[WCS, tuple[int, int]]:
    """WCS and shape (ny, nx) of an exposure, from its headers alone.

    Raises
    ------
    ExposureError : missing or broken file, no two-dimensional image, no WCS in (ra, dec)
    """
    path = Path(path)
    if not path.is_file():
        raise ExposureError(f"{path.name}: no such file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=AstropyWarning)
            with open_unpacked(path) as stream, fits.open(stream, memmap=False, lazy_load_hdus=False) as hdus:
                image_hdu = _image_hdu(hdus)
                if image_hdu is None or image_hdu.header.get("NAXIS") != 2:
                    raise ExposureError(f"{path.name}: no two-dimensional image in the file")
                shape = (int(image_hdu.header["NAXIS2"]), int(image_hdu.header["NAXIS1"]))
                return _read_wcs(image_hdu.header, shape, path.name), shape
    except ExposureError:
        raise
    except Exception as error:  # astropy raises many kinds on broken bytes
        raise ExposureError(f"{path.name}: broken FITS file: {type(error).__name__}: {error}") from error


def open_unpacked(path: Path) -> BinaryIO:
    """The file to read FITS from: unpacked here, as astropy takes a packed file cut short for a short one.

    Raises
    ------
    OSError, EOFError, zlib.error, lzma.LZMAError : it cannot be read, or is no whole packed file
    """
    with path.open("rb") as stream:
        head = stream.read(8)
    for magic, unpack in _UNPACKERS.items():
        if head.startswith(magic):
            return io.BytesIO(unpack(path.read_bytes()))
    return path.open("rb")


def _exposure_from_hdus(hdus: fits.HDUList, name: str) -> Exposure:
    notes: list[str] = []
    planes = {hdu.name: hdu for hdu in hdus}
    image_hdu = _image_hdu(hdus)
    if image_hdu is None:
        raise ExposureError(f"{name}: no image in the file")
    if image_hdu.data.ndim != 2:
        raise ExposureError(f"{name}: image must be two-dimensional, got shape {image_hdu.data.shape}")
    header = image_hdu.header
    wcs = _read_wcs(header, image_hdu.data.shape, name)
    image = np.array(image_hdu.data, dtype=np.float32)
    if min(image.shape) < MIN_SIDE_PIX:
        raise ExposureError(
            f"{name}: image of shape {image.shape} is too small, at least {MIN_SIDE_PIX} x {MIN_SIDE_PIX} pixels"
        )
    finite = np.isfinite(image)
    if not finite.any():
        raise ExposureError(f"{name}: no finite pixel in the image")
    njy_per_unit = _njy_per_unit(header, name)
    mask = _read_mask(planes.get("MASK"), image.shape, name, notes)
    variance = _read_variance(planes.get("VARIANCE"), image, finite, header, name, notes)
    image *= np.float32(njy_per_unit)
    variance *= np.float32(njy_per_unit**2)
    unusable = ~finite | ~np.isfinite(variance) | (variance <= 0)
    if unusable.all():
        raise ExposureError(f"{name}: no pixel has both a finite value and a positive variance")
    mask[unusable] |= mask_bits("NO_DATA")
    variance[unusable] = np.inf
    image[unusable] = np.nan
    return Exposure(
        image,
        variance,
        mask,
        wcs,
        _read_psf(planes.get("PSF"), name),
        tuple(notes),
        _read_interpolated(planes.get("VARIANCE"), name),
    )


def _read_interpolated(hdu: fits.ImageHDU | None, name: str) -> float:
    number = 0.0 if hdu is None else hdu.header.get("NINTERP", 0.0)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= MAX_INTERPOLATED:
        raise ExposureError(f"{name}: NINTERP must be a number in [0, {MAX_INTERPOLATED}], got {number!r}")
    return float(number)


def _image_hdu(hdus: fits.HDUList) -> fits.hdu.base.ExtensionHDU | None:
    """`IMAGE`, or the first image that is nothing else we know."""
    named = [hdu for hdu in hdus if hdu.name == "IMAGE" and _is_image(hdu)]
    known = ("MASK", "VARIANCE", "PSF")
    return next(iter(named[-1:] + [hdu for hdu in hdus if hdu.name not in known and _is_image(hdu)]), None)


def _read_wcs(header: fits.Header, shape: tuple[int, int], name: str) -> WCS:
    """The WCS, if it gives (ra, dec) in degrees: everything behind takes its two numbers for that."""
    try:
        wcs = WCS(header)
    except Exception as error:  # wcslib raises many kinds
        raise ExposureError(f"{name}: unusable WCS: {type(error).__name__}: {error}") from error
    if not wcs.has_celestial:
        raise ExposureError(f"{name}: no celestial WCS in the image header")
    wcs = wcs.celestial
    axes = tuple(axis[:4].rstrip("-") for axis in wcs.wcs.ctype)
    if axes != ("RA", "DEC"):
        raise ExposureError(f"{name}: the WCS must have axes RA, DEC, got {', '.join(wcs.wcs.ctype)}")
    frame = wcs.wcs.radesys.strip().upper()
    if frame not in ("", "ICRS", "FK5") or (frame == "FK5" and wcs.wcs.equinox != J2000):
        raise ExposureError(f"{name}: the WCS must be ICRS or FK5 of J2000, got {frame} of {wcs.wcs.equinox}")
    ny, nx = shape
    corners = wcs.all_pix2world([0, nx - 1, 0, nx - 1], [0, 0, ny - 1, ny - 1], 0)
    if not np.isfinite(corners).all():
        raise ExposureError(f"{name}: the WCS gives no position on the sky for the corners of the image")
    return wcs


def _is_image(hdu: fits.hdu.base.ExtensionHDU) -> bool:
    return bool(hdu.is_image and hdu.header.get("NAXIS", 0) > 0)


def _njy_per_unit(header: fits.Header, name: str) -> float:
    unit = str(header.get("BUNIT", "adu" if "MAGZERO" in header else "")).strip().lower()
    if unit == "njy":
        return 1.0
    if unit in ("adu", "count", "counts", "dn"):
        zero_point = header.get("MAGZERO")
        if isinstance(zero_point, bool) or not isinstance(zero_point, (int, float)) or not np.isfinite(zero_point):
            raise ExposureError(f"{name}: BUNIT is {unit} but there is no finite MAGZERO card")
        if abs(zero_point) > MAX_ABS_MAG_ZERO:
            raise ExposureError(f"{name}: MAGZERO {zero_point} is no zero point in magnitudes")
        return float(10.0 ** (0.4 * (AB_ZERO_POINT_NJY - zero_point)))
    raise ExposureError(f"{name}: BUNIT {header.get('BUNIT')!r} is unknown, expected nJy, or adu with MAGZERO")


def _read_mask(hdu: fits.ImageHDU | None, shape: tuple[int, ...], name: str, notes: list[str]) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.int32)
    if hdu is None or hdu.data is None:
        notes.append("no mask: all pixels taken as good")
        return mask
    if hdu.data.shape != shape:
        raise ExposureError(f"{name}: MASK has shape {hdu.data.shape}, the image {shape}")
    if not np.issubdtype(hdu.data.dtype, np.integer):
        raise ExposureError(f"{name}: MASK must hold integers, got {hdu.data.dtype}")
    stored = np.asarray(hdu.data).astype(np.int64)
    planes = {card[3:].upper(): bit for card, bit in hdu.header.items() if card.upper().startswith("MP_")}
    if not planes:
        notes.append("mask without MP_ cards: every set pixel taken as BAD")
        mask[stored != 0] = mask_bits("BAD")
        return mask
    for plane, bit in planes.items():
        if isinstance(bit, bool) or not isinstance(bit, int) or not 0 <= bit < MAX_STORED_BITS:
            raise ExposureError(f"{name}: MP_{plane} must be a bit number in [0, {MAX_STORED_BITS}), got {bit!r}")
        if plane in MASK_BITS:
            mask[(stored >> bit) & 1 == 1] |= np.int32(1 << MASK_BITS[plane])
    return mask


def _read_variance(
    hdu: fits.ImageHDU | None,
    image: np.ndarray,
    finite: np.ndarray,
    header: fits.Header,
    name: str,
    notes: list[str],
) -> np.ndarray:
    """Variance in the image's own unit squared."""
    if hdu is not None and hdu.data is not None:
        if hdu.data.shape != image.shape:
            raise ExposureError(f"{name}: VARIANCE has shape {hdu.data.shape}, the image {image.shape}")
        return np.array(hdu.data, dtype=np.float32)
    gain = header.get("GAIN")
    in_adu = str(header.get("BUNIT", "adu")).strip().lower() != "njy"
    if in_adu and isinstance(gain, (int, float)) and gain > 0:
        read_noise_e = header.get("RDNOISE", READ_NOISE_DEFAULT_E)
        if isinstance(read_noise_e, bool) or not isinstance(read_noise_e, (int, float)) or read_noise_e < 0:
            raise ExposureError(f"{name}: RDNOISE must be electrons, not negative, got {read_noise_e!r}")
        notes.append("no variance: from GAIN and RDNOISE")
        electrons = np.maximum(np.where(finite, image, 0.0), 0.0) * gain
        return ((electrons + read_noise_e**2) / gain**2).astype(np.float32)
    values = image[finite]
    sigma = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    notes.append("no variance, no GAIN: constant, from the scatter of the image")
    return np.full(image.shape, sigma**2, dtype=np.float32)


def _read_psf(hdu: fits.ImageHDU | None, name: str) -> np.ndarray | None:
    if hdu is None or hdu.data is None:
        return None
    psf = np.array(hdu.data, dtype=np.float64)
    if psf.ndim != 2 or psf.shape[0] != psf.shape[1] or psf.shape[0] % 2 == 0 or psf.shape[0] < MIN_PSF_SIDE_PIX:
        raise ExposureError(
            f"{name}: PSF must be an odd square image of at least {MIN_PSF_SIDE_PIX} pixels a side, "
            f"got shape {psf.shape}"
        )
    total = psf.sum()
    if not np.isfinite(total) or total <= 0:
        raise ExposureError(f"{name}: PSF must have a positive sum, got {total}")
    return psf / total


def write_exposure(path: Path, exposure: Exposure, *, header: dict[str, object] | None = None) -> None:
    """Write an exposure in nJy, atomically; `header` holds further cards of the IMAGE HDU."""
    image_header = exposure.wcs.to_header(relax=True)  # SIP and other distortions are no standard
    image_header["BUNIT"] = "nJy"
    for card, value in (header or {}).items():
        image_header[card] = value
    mask_header = fits.Header()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=fits.verify.VerifyWarning)  # long plane names need HIERARCH
        for plane, bit in MASK_BITS.items():
            mask_header[f"MP_{plane}"] = bit
    variance_header = fits.Header()
    variance_header["BUNIT"] = "nJy2"
    if exposure.interpolated > 0:
        variance_header["NINTERP"] = (exposure.interpolated, "times the noise was interpolated")
    hdus = [
        fits.PrimaryHDU(),
        fits.ImageHDU(np.asarray(exposure.image, dtype=np.float32), image_header, name="IMAGE"),
        fits.ImageHDU(np.asarray(exposure.mask, dtype=np.int32), mask_header, name="MASK"),
        fits.ImageHDU(np.asarray(exposure.variance, dtype=np.float32), variance_header, name="VARIANCE"),
    ]
    if exposure.psf is not None:
        hdus.append(fits.ImageHDU(np.asarray(exposure.psf, dtype=np.float64), name="PSF"))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("." + path.name)
    fits.HDUList(hdus).writeto(partial, overwrite=True)
    partial.rename(path)

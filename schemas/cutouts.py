"""Cutouts: a stamp of an image around a source, with variance, mask, PSF and WCS, as FITS bytes.

HDUs: PRIMARY float32 image in nJy with a TAN WCS of its own; UNCERT float32 variance in nJy^2;
PSFIMAGE float64; MASK int32 with `MP_<PLANE>` cards giving bit numbers. Names and keywords are those that
`astropy.nddata.CCDData.read` looks for.

astropy writes one file per (side, PSF size, mask planes) with placeholders; a cutout is a copy of that
file with numbers put into its header cards and pixels into its data.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

MIN_SIDE_PIX = 30
MAX_SIDE_PIX = 102
_CARD_BYTES = 80
_PLACEHOLDER = 0.5
_DTYPES = {-32: ">f4", -64: ">f8", 32: ">i4"}  # by BITPIX
_FLOAT_CARDS = ("ROTPA", "CRPIX1", "CRPIX2", "CRVAL1", "CRVAL2", "CD1_1", "CD1_2", "CD2_1", "CD2_2")
_INTEGER_CARDS = ("CUTMINX", "CUTMINY")
_TANGENT_STEP_PIX = 20.0  # as far from a source as most stamps reach


class CutoutError(ValueError):
    """Input that makes no cutout; the message names what and why."""


@dataclass(frozen=True)
class LocalTan:
    """A tangent-plane WCS of an image near one point.

    Attributes
    ----------
    ra_deg, dec_deg : the tangent point
    x_pix, y_pix : its pixel in the full image, 0-based
    cd_deg_per_pix : ((d xi/dx, d xi/dy), (d eta/dx, d eta/dy)), xi to the east and eta to the north
    """

    ra_deg: float
    dec_deg: float
    x_pix: float
    y_pix: float
    cd_deg_per_pix: tuple[tuple[float, float], tuple[float, float]]


def cutout_side(bbox_size_pix: int) -> int:
    """Side of the stamp for a source whose footprint needs `bbox_size_pix`: clamped to 30..102 pixels."""
    return min(max(int(bbox_size_pix), MIN_SIDE_PIX), MAX_SIDE_PIX)


def local_tangents(wcs: WCS, x_pix: np.ndarray, y_pix: np.ndarray) -> list[LocalTan]:
    """The tangent-plane WCS at each of many points of an image, distortions included to first order.

    Parameters
    ----------
    wcs : celestial WCS of the full image, longitude first
    x_pix, y_pix : (n,) float, 0-based pixels

    Returns
    -------
    list of n LocalTan
        Each with its tangent point at the source; the CD matrix by central differences over +-20 pixels.
    """
    x = np.asarray(x_pix, dtype=np.float64)
    y = np.asarray(y_pix, dtype=np.float64)
    step = _TANGENT_STEP_PIX
    all_x = np.concatenate([x, x - step, x + step, x, x])
    all_y = np.concatenate([y, y, y, y - step, y + step])
    ra, dec = (np.asarray(angle).reshape(5, -1) for angle in wcs.all_pix2world(all_x, all_y, 0))
    xi, eta = _gnomonic_deg(ra[1:], dec[1:], ra[0], dec[0])
    xi_x, xi_y = (xi[1] - xi[0]) / (2 * step), (xi[3] - xi[2]) / (2 * step)
    eta_x, eta_y = (eta[1] - eta[0]) / (2 * step), (eta[3] - eta[2]) / (2 * step)
    return [
        LocalTan(
            float(ra[0, i]),
            float(dec[0, i]),
            float(x[i]),
            float(y[i]),
            ((float(xi_x[i]), float(xi_y[i])), (float(eta_x[i]), float(eta_y[i]))),
        )
        for i in range(len(x))
    ]


def cutout_bytes(
    image: np.ndarray,
    variance: np.ndarray,
    mask: np.ndarray,
    psf: np.ndarray | None,
    x_pix: float,
    y_pix: float,
    side_pix: int,
    wcs_local: LocalTan,
    rotation_deg: float,
    mask_planes: Mapping[str, int],
) -> bytes | None:
    """FITS bytes of the stamp around a source.

    Where the stamp crosses the border of the image it keeps its full side: the pixels beyond are NaN in
    image and variance and NO_DATA and EDGE in the mask.

    Parameters
    ----------
    image : (ny, nx) float32, nJy
    variance : (ny, nx) float32, nJy^2
    mask : (ny, nx) int32, bits as in `mask_planes`
    psf : (k, k) float64 with sum 1, or None: the file then has no PSFIMAGE
    x_pix, y_pix : centroid, 0-based pixels
    side_pix : side of the square stamp, in [1, 1000]; see `cutout_side`
    wcs_local : see `local_tangents`
    rotation_deg : position angle of the camera, card ROTPA
    mask_planes : bit number of each mask plane; NO_DATA and EDGE must be among them

    Returns
    -------
    bytes or None
        None if the centroid is not finite or lies outside the image (its border is at -0.5 and n - 0.5).

    Raises
    ------
    CutoutError
        Planes of different shapes, a PSF that is not square, a side out of range, no NO_DATA or EDGE
        plane, numbers that are not finite in the WCS or the rotation.
    """
    if not image.shape == variance.shape == mask.shape or image.ndim != 2:
        raise CutoutError(
            f"image, variance and mask must be 2-d of one shape, got {image.shape}, {variance.shape}, {mask.shape}"
        )
    if not 1 <= side_pix <= 1000:
        raise CutoutError(f"side_pix must lie in [1, 1000], got {side_pix}")
    ny, nx = image.shape
    if not (-0.5 <= x_pix < nx - 0.5 and -0.5 <= y_pix < ny - 0.5):
        return None
    template = _template(side_pix, _psf_side(psf), tuple(mask_planes.items()))
    # The stamp's centre lies within half a pixel of the centroid, for odd and even sides.
    x_min = math.floor(x_pix - side_pix / 2 + 1)
    y_min = math.floor(y_pix - side_pix / 2 + 1)
    file = bytearray(template.file)
    _patch_header(file, template, x_min, y_min, wcs_local, rotation_deg)
    inside = (
        slice(max(y_min, 0), min(y_min + side_pix, ny)),
        slice(max(x_min, 0), min(x_min + side_pix, nx)),
    )
    target = (
        slice(inside[0].start - y_min, inside[0].stop - y_min),
        slice(inside[1].start - x_min, inside[1].stop - x_min),
    )
    # The template's pixels are the padding, so only pixels of the image are written.
    template.plane(file, "PRIMARY")[target] = image[inside]
    template.plane(file, "UNCERT")[target] = variance[inside]
    template.plane(file, "MASK")[target] = mask[inside]
    if psf is not None:
        template.plane(file, "PSFIMAGE")[:] = psf
    return bytes(file)


@dataclass(frozen=True)
class _Template:
    file: bytes
    cards: Mapping[str, int]  # keyword -> byte at which its card starts
    planes: Mapping[str, tuple[int, str, int]]  # HDU -> first byte of its data, dtype, side

    def plane(self, file: bytearray, name: str) -> np.ndarray:
        """The pixels of one HDU of a copy of this template, writable."""
        start, dtype, side = self.planes[name]
        return np.frombuffer(file, dtype, side * side, start).reshape(side, side)


@lru_cache(maxsize=256)  # sides 30..102 of one PSF size and one set of planes, with room for other PSF sizes
def _template(side: int, psf_side: int, mask_planes: tuple[tuple[str, int], ...]) -> _Template:
    bits = dict(mask_planes)
    if "NO_DATA" not in bits or "EDGE" not in bits:
        raise CutoutError(f"mask_planes must name NO_DATA and EDGE, got {', '.join(sorted(bits)) or 'none'}")
    beyond = (1 << bits["NO_DATA"]) | (1 << bits["EDGE"])
    variance_header = fits.Header([("UTYPE", "VarianceUncertainty", "astropy class"), ("BUNIT", "nJy2")])
    mask_header = fits.Header()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=fits.verify.VerifyWarning)  # long plane names need HIERARCH
        for plane, bit in mask_planes:
            mask_header[f"MP_{plane}"] = bit
    padding = np.full((side, side), np.nan, dtype=np.float32)
    hdus = [
        fits.PrimaryHDU(padding, _primary_header()),
        fits.ImageHDU(padding, variance_header, name="UNCERT"),
    ]
    if psf_side:
        hdus.append(fits.ImageHDU(np.zeros((psf_side, psf_side)), name="PSFIMAGE"))
    hdus.append(fits.ImageHDU(np.full((side, side), beyond, dtype=np.int32), mask_header, name="MASK"))
    stream = io.BytesIO()
    fits.HDUList(hdus).writeto(stream)
    file = stream.getvalue()
    with fits.open(io.BytesIO(file)) as written:
        starts = {hdu.name: hdu.fileinfo()["datLoc"] for hdu in written}
        planes = {hdu.name: (starts[hdu.name], _DTYPES[hdu.header["BITPIX"]], hdu.header["NAXIS1"]) for hdu in written}
    keywords = [file[at : at + 8].decode("ascii").rstrip() for at in range(0, starts["PRIMARY"], _CARD_BYTES)]
    cards = {key: _CARD_BYTES * keywords.index(key) for key in (*_FLOAT_CARDS, *_INTEGER_CARDS)}
    return _Template(file, cards, planes)


def _primary_header() -> fits.Header:
    cards: list[tuple[str, object, str]] = [
        ("BUNIT", "nJy", "unit of the pixels"),
        ("CUTMINX", 0, "full-image column of the first pixel, 0-based"),
        ("CUTMINY", 0, "full-image row of the first pixel, 0-based"),
        ("ROTPA", _PLACEHOLDER, "[deg] position angle of the camera"),
        ("WCSAXES", 2, ""),
        ("CTYPE1", "RA---TAN", ""),
        ("CTYPE2", "DEC--TAN", ""),
        ("CUNIT1", "deg", ""),
        ("CUNIT2", "deg", ""),
        ("RADESYS", "ICRS", ""),
    ]
    cards += [(key, _PLACEHOLDER, "") for key in _FLOAT_CARDS if key != "ROTPA"]
    return fits.Header([fits.Card(*card) for card in cards])


def _patch_header(
    file: bytearray, template: _Template, x_min: int, y_min: int, wcs: LocalTan, rotation_deg: float
) -> None:
    (cd11, cd12), (cd21, cd22) = wcs.cd_deg_per_pix
    # FITS counts pixels from 1.
    floats = (
        rotation_deg,
        wcs.x_pix - x_min + 1,
        wcs.y_pix - y_min + 1,
        wcs.ra_deg,
        wcs.dec_deg,
        cd11,
        cd12,
        cd21,
        cd22,
    )
    if not all(map(math.isfinite, floats)):
        raise CutoutError(f"rotation and WCS must be finite, got {rotation_deg} and {wcs}")
    for keyword, value in zip(_FLOAT_CARDS, floats, strict=True):
        _patch_card(file, template.cards[keyword], f"{value:20.12E}")
    for keyword, number in zip(_INTEGER_CARDS, (x_min, y_min), strict=True):
        _patch_card(file, template.cards[keyword], f"{number:20d}")


def _patch_card(file: bytearray, start: int, value: str) -> None:
    """Put a value of 20 characters where the FITS standard has it: columns 11 to 30 of the card."""
    file[start + 10 : start + 30] = value.encode("ascii")


def _psf_side(psf: np.ndarray | None) -> int:
    if psf is None:
        return 0
    if psf.ndim != 2 or psf.shape[0] != psf.shape[1] or not psf.size:
        raise CutoutError(f"psf must be a square image, got shape {psf.shape}")
    return int(psf.shape[0])


def _gnomonic_deg(
    ra_deg: np.ndarray, dec_deg: np.ndarray, ra0_deg: np.ndarray, dec0_deg: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tangent-plane coordinates (xi, eta) in degrees about (ra0, dec0)."""
    dra = np.radians(ra_deg - ra0_deg)
    dec, dec0 = np.radians(dec_deg), np.radians(dec0_deg)
    cosine = np.sin(dec0) * np.sin(dec) + np.cos(dec0) * np.cos(dec) * np.cos(dra)
    xi = np.cos(dec) * np.sin(dra) / cosine
    eta = (np.cos(dec0) * np.sin(dec) - np.sin(dec0) * np.cos(dec) * np.cos(dra)) / cosine
    return np.degrees(xi), np.degrees(eta)

"""Cutouts: a stamp of an image around a source, with variance, PSF and WCS, as FITS bytes.

Two contents. `complete`: PRIMARY float32 image in nJy with a TAN WCS of its own; UNCERT float32 variance in nJy^2;
PSFIMAGE float64; MASK int32 with `MP_<PLANE>` cards giving bit numbers. `strict`: what LSST's packager gets of
`astropy.nddata.CCDData.write`, to the byte: no MASK and no CTYPE. Names and keywords of both are those that
`CCDData.read` looks for.

astropy writes one file per (content, side, PSF size, ...) with placeholders; a cutout is a copy of that file with
numbers put into its header cards and pixels into its data, for all sources of a detector in one compiled loop.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from astropy.io import fits
from astropy.nddata import CCDData, VarianceUncertainty
from astropy.wcs import WCS
from numba import njit

Content = Literal["complete", "strict"]

MIN_SIDE_PIX = 30
MAX_SIDE_PIX = 102
_CARD_BYTES = 80
_FLOAT_CARDS = ("ROTPA", "CRPIX1", "CRPIX2", "CRVAL1", "CRVAL2", "CD1_1", "CD1_2", "CD2_1", "CD2_2")
_WCSLIB_CARDS = ("CRPIX1", "CRPIX2", "PC1_1", "PC1_2", "PC2_1", "PC2_2", "CRVAL1", "CRVAL2")
_ROTATION_COMMENT = "Pos angle in deg of focal plane +Y wrt North"
# In the files' templates. They differ from 0 and 1, which astropy leaves out of a PC matrix, and make a regular one.
_PLACEHOLDER = 0.5
_PLACEHOLDER_MATRIX = (0.5, 0.25, 0.125, 0.75)
_UNIT_MATRIX = (1.0, 0.0, 0.0, 1.0)
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


class CutImage(NamedTuple):
    """One of the images that stamps are cut from.

    Attributes
    ----------
    image : (ny, nx) float32, nJy
    variance : (ny, nx) float32, nJy^2
    psfs : (m, k, k) with sum 1, or None: the files then have no PSFIMAGE
    psf_of : (n,) int, which of `psfs` is that of each source
    """

    image: np.ndarray
    variance: np.ndarray
    psfs: np.ndarray | None
    psf_of: np.ndarray


class Cutouts(NamedTuple):
    """Stamps of n sources.

    Attributes
    ----------
    files : n tuples, one FITS file for each `CutImage`; None where there can be no stamp
    refused : why there is none, by row
    """

    files: list[tuple[memoryview, ...] | None]
    refused: dict[int, str]


def cutout_sides(bbox_size_pix: np.ndarray) -> np.ndarray:
    """Sides of the stamps for sources whose footprints need `bbox_size_pix` (n,): clamped to 30..102 pixels."""
    return np.clip(bbox_size_pix, MIN_SIDE_PIX, MAX_SIDE_PIX).astype(np.int64)


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
    if len(x) == 0:
        return []  # astropy's transformations take no empty arrays
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


def cut_out(
    images: Sequence[CutImage],
    mask: np.ndarray,
    x_pix: np.ndarray,
    y_pix: np.ndarray,
    sides_pix: np.ndarray,
    tangents: Sequence[LocalTan],
    rotation_deg: float,
    mask_planes: Mapping[str, int],
    content: Content = "complete",
) -> Cutouts:
    """Stamps around the sources of a detector, from each of several images of it.

    Where a stamp crosses the border of the image it keeps its full side: the pixels beyond are NaN in the image,
    infinite in the variance and, in a `complete` file, NO_DATA and EDGE in the mask. A source whose centroid is
    not finite or lies outside the image (its border is at -0.5 and n - 0.5), or whose WCS is not finite or
    singular, has no stamps.

    Parameters
    ----------
    images : all of one shape
    mask : (ny, nx) int32, bits as in `mask_planes`
    x_pix, y_pix : (n,) centroids, 0-based pixels
    sides_pix : (n,) sides of the square stamps, in [1, 1000]; see `cutout_sides`
    tangents : n; see `local_tangents`
    rotation_deg : position angle of the camera, card ROTPA
    mask_planes : bit number of each mask plane; NO_DATA and EDGE must be among them
    content : `complete`, or `strict`

    Raises
    ------
    CutoutError
        Planes of different shapes, PSFs that are not square, a side out of range, no NO_DATA or EDGE
        plane, a rotation that is not finite.

    Notes
    -----
    About 10 us for a stamp of 51 pixels with a PSF of 41.
    """
    _check(images, mask, sides_pix, rotation_deg, mask_planes)
    planes = tuple(mask_planes.items())
    refused: dict[int, str] = {}
    groups: dict[tuple[int, tuple[bool, ...]], list[int]] = {}
    places = zip(x_pix.tolist(), y_pix.tolist(), sides_pix.tolist(), tangents, strict=True)
    for row, (x, y, side, tangent) in enumerate(places):
        problem = _problem(x, y, mask.shape, tangent)
        if problem is None:
            groups.setdefault((side, _unit_elements(tangent) if content == "strict" else ()), []).append(row)
        else:
            refused[row] = problem
    files: list[list[memoryview]] = [[] for _ in tangents]
    mask_words = np.ascontiguousarray(mask, dtype=np.int32).view(np.uint32)
    psfs = [_words_of_psfs(one) for one in images]
    for (side, unit_elements), rows in groups.items():
        # The stamp's centre lies within half a pixel of the centroid, for odd and even sides.
        corners = np.floor(np.stack([x_pix[rows], y_pix[rows]], axis=1) - side / 2 + 1).astype(np.int64)
        templates = [
            _strict_template(side, psf_side, unit_elements)
            if content == "strict"
            else _complete_template(side, psf_side, planes)
            for psf_side, _, _ in psfs
        ]
        heads = _heads(templates[0].head, content, corners.tolist(), [tangents[row] for row in rows], rotation_deg)
        for one, template, (_, words, psf_of) in zip(images, templates, psfs, strict=True):
            group = np.empty((len(rows), len(template.words)), dtype=np.uint32)
            image, variance = (
                np.ascontiguousarray(plane, dtype=np.float32).view(np.uint32) for plane in (one.image, one.variance)
            )
            _write_stamps(
                image,
                variance,
                mask_words,
                words,
                psf_of[rows],
                corners,
                side,
                heads,
                template.words,
                template.starts,
                group,
            )
            data, size = group.reshape(-1).view(np.uint8).data, group.itemsize * group.shape[1]
            for i, row in enumerate(rows):
                files[row].append(data[i * size : (i + 1) * size])
    return Cutouts([None if row in refused else tuple(stamps) for row, stamps in enumerate(files)], refused)


class _Template(NamedTuple):
    """A file with placeholders.

    head : the first HDU's header, as a `%` format for the values of `_heads`
    words : the file, (file bytes / 4,) uint32
    starts : (4,) word at which the data of PRIMARY, UNCERT, PSFIMAGE and MASK begin, -1 where there are none
    """

    head: bytes
    words: np.ndarray
    starts: np.ndarray


def _check(
    images: Sequence[CutImage],
    mask: np.ndarray,
    sides_pix: np.ndarray,
    rotation_deg: float,
    mask_planes: Mapping[str, int],
) -> None:
    shapes = [mask.shape, *(plane.shape for one in images for plane in (one.image, one.variance))]
    if len(set(shapes)) != 1 or mask.ndim != 2:
        raise CutoutError(f"images, variances and mask must be 2-d of one shape, got {sorted(set(shapes))}")
    for one in images:
        shape = (1, 1, 1) if one.psfs is None else one.psfs.shape
        if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
            raise CutoutError(f"psfs must be square images, got shape {shape}")
    if len(sides_pix) and not 1 <= sides_pix.min() <= sides_pix.max() <= 1000:
        raise CutoutError(f"sides must lie in [1, 1000], got {sides_pix.min()} to {sides_pix.max()}")
    if not math.isfinite(rotation_deg):
        raise CutoutError(f"the rotation must be finite, got {rotation_deg}")
    if "NO_DATA" not in mask_planes or "EDGE" not in mask_planes:
        raise CutoutError(f"mask_planes must name NO_DATA and EDGE, got {', '.join(sorted(mask_planes)) or 'none'}")


def _problem(x: float, y: float, shape: tuple[int, ...], tangent: LocalTan) -> str | None:
    """Why a source can have no stamp."""
    ny, nx = shape
    if not (-0.5 <= x < nx - 0.5 and -0.5 <= y < ny - 0.5):
        return f"the centroid ({x:g}, {y:g}) lies outside the image of {nx} x {ny} pixels"
    (cd11, cd12), (cd21, cd22) = tangent.cd_deg_per_pix
    numbers = (tangent.x_pix, tangent.y_pix, tangent.ra_deg, tangent.dec_deg, cd11, cd12, cd21, cd22)
    if not all(map(math.isfinite, numbers)):
        return f"the WCS is not finite: {tangent}"
    if cd11 * cd22 == cd12 * cd21:
        return f"the WCS is singular: {tangent}"
    return None


def _unit_elements(tangent: LocalTan) -> tuple[bool, ...]:
    """Which elements of the matrix are the unit matrix's: astropy writes no card for those."""
    return tuple(one == unit for one, unit in zip(_matrix(tangent), _UNIT_MATRIX, strict=True))


def _matrix(tangent: LocalTan) -> tuple[float, ...]:
    return tangent.cd_deg_per_pix[0] + tangent.cd_deg_per_pix[1]


def _words_of_psfs(one: CutImage) -> tuple[int, np.ndarray, np.ndarray]:
    """Side of the PSFs, those that are used as words of a file (n_used, words), and which is whose (n,)."""
    if one.psfs is None:
        return 0, np.zeros((1, 0), dtype=np.uint32), np.zeros(len(one.psf_of), dtype=np.int64)
    used, psf_of = np.unique(one.psf_of, return_inverse=True)
    side = one.psfs.shape[1]
    pixels = one.psfs[used].astype(">f8").reshape(len(used), side * side)
    return side, pixels.view(np.uint32), psf_of.astype(np.int64)


def _heads(
    head: bytes, content: Content, corners: list[list[int]], tangents: list[LocalTan], rotation_deg: float
) -> np.ndarray:
    """First headers of the files of sources, (n, words) uint32."""
    filled = []
    for (x_min, y_min), tangent in zip(corners, tangents, strict=True):
        # FITS counts pixels from 1.
        reference = (tangent.x_pix - x_min + 1, tangent.y_pix - y_min + 1)
        sky = (tangent.ra_deg, tangent.dec_deg)
        if content == "complete":
            filled.append(head % (x_min, y_min, rotation_deg, *reference, *sky, *_matrix(tangent)))
        else:
            elements = [
                value for value, unit in zip(_matrix(tangent), _unit_elements(tangent), strict=True) if not unit
            ]
            # LSST gives the column and row before the first pixel.
            filled.append(
                head
                % (
                    x_min - 1,
                    y_min - 1,
                    _astropy_card(rotation_deg, _ROTATION_COMMENT),
                    *(_wcslib_card(value, "Pixel coordinate of reference point") for value in reference),
                    *(_wcslib_card(value, "Coordinate transformation matrix element") for value in elements),
                    *(_wcslib_card(value, "Coordinate value at reference point") for value in sky),
                )
            )
    return np.frombuffer(b"".join(filled), dtype=np.uint32).reshape(len(filled), -1)


def _astropy_card(value: float, comment: str) -> bytes:
    """A card behind its keyword as astropy writes it: as many digits as the number needs, at most 20 characters."""
    mantissa, mark, exponent = repr(value).upper().partition("E")
    return _card(mantissa[: 20 - len(mark + exponent)] + mark + exponent, comment)


def _wcslib_card(value: float, comment: str) -> bytes:
    """A card behind its keyword as wcslib writes it: a place for the sign, then 14 significant digits."""
    text = f"{value: .14G}"
    return _card(text if "." in text or "E" in text else f"{text}.0", comment)


def _card(text: str, comment: str) -> bytes:
    return f"{text:>20} / {comment}".ljust(_CARD_BYTES - 10).encode("ascii")


@lru_cache(maxsize=256)  # sides 30..102 of one PSF size and one set of planes, with room for other PSF sizes
def _complete_template(side: int, psf_side: int, mask_planes: tuple[tuple[str, int], ...]) -> _Template:
    bits = dict(mask_planes)
    beyond = (1 << bits["NO_DATA"]) | (1 << bits["EDGE"])
    variance_header = fits.Header([("UTYPE", "VarianceUncertainty", "astropy class"), ("BUNIT", "nJy2")])
    mask_header = fits.Header()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=fits.verify.VerifyWarning)  # long plane names need HIERARCH
        for plane, bit in mask_planes:
            mask_header[f"MP_{plane}"] = bit
    hdus = [
        fits.PrimaryHDU(_padding(side, np.nan), _primary_header()),
        fits.ImageHDU(_padding(side, np.inf), variance_header, name="UNCERT"),
    ]
    if psf_side:
        hdus.append(fits.ImageHDU(np.zeros((psf_side, psf_side)), name="PSFIMAGE"))
    hdus.append(fits.ImageHDU(np.full((side, side), beyond, dtype=np.int32), mask_header, name="MASK"))
    stream = io.BytesIO()
    fits.HDUList(hdus).writeto(stream)
    return _template(stream.getvalue(), {key: b"%20.12E" for key in _FLOAT_CARDS}, 20)


@lru_cache(maxsize=256)
def _strict_template(side: int, psf_side: int, unit_elements: tuple[bool, ...]) -> _Template:
    wcs = WCS(naxis=2)
    wcs.wcs.crpix = wcs.wcs.crval = [_PLACEHOLDER, _PLACEHOLDER]
    matrix = np.where(unit_elements, _UNIT_MATRIX, _PLACEHOLDER_MATRIX)
    wcs.wcs.cd = matrix.reshape(2, 2)
    stamp = CCDData(
        _padding(side, np.nan),
        uncertainty=VarianceUncertainty(_padding(side, np.inf)),
        wcs=wcs,
        psf=np.zeros((psf_side, psf_side)) if psf_side else None,
        meta={"cutMinX": 0, "cutMinY": 0},
        unit="nJy",
    )
    stamp.header["ROTPA"] = (_PLACEHOLDER, _ROTATION_COMMENT)
    stream = io.BytesIO()
    stamp.write(stream, format="fits")
    return _template(stream.getvalue(), dict.fromkeys(("ROTPA", *_WCSLIB_CARDS), b"%s"), _CARD_BYTES - 10)


def _padding(side: int, value: float) -> np.ndarray:
    return np.full((side, side), value, dtype=np.float32)


def _template(file: bytes, slots: dict[str, bytes], n_bytes: int) -> _Template:
    """A template of a file: `slots` replace `n_bytes` of the cards of their keywords, from column 11 on."""
    with fits.open(io.BytesIO(file)) as hdus:
        first = {hdu.name: hdu.fileinfo()["datLoc"] // 4 for hdu in hdus}
    head = b""
    for at in range(0, 4 * first["PRIMARY"], _CARD_BYTES):
        card = file[at : at + _CARD_BYTES]
        keyword = card[:8].decode("ascii").rstrip()
        if keyword in slots:
            card = card[:10] + slots[keyword] + card[10 + n_bytes :]
        elif keyword in ("CUTMINX", "CUTMINY"):
            card = card[:10] + b"%20d" + card[30:]
        head += card
    starts = [first.get(name, -1) for name in ("PRIMARY", "UNCERT", "PSFIMAGE", "MASK")]
    return _Template(head, np.frombuffer(file, dtype=np.uint32).copy(), np.array(starts))


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


@njit(cache=True)
def _write_stamps(
    image: np.ndarray,
    variance: np.ndarray,
    mask: np.ndarray,
    psfs: np.ndarray,
    psf_of: np.ndarray,
    corners: np.ndarray,
    side: int,
    heads: np.ndarray,
    template: np.ndarray,
    starts: np.ndarray,
    files: np.ndarray,
) -> None:
    """Stamps of one side from one image. All words are uint32: pixels as the machine has them, the rest as in files."""
    for i in range(len(files)):
        file = files[i]
        # The template's pixels are the padding, so only pixels of the image are written.
        file[:] = template
        file[: heads.shape[1]] = heads[i]
        _write_window(image, corners[i], side, file, starts[0])
        _write_window(variance, corners[i], side, file, starts[1])
        if starts[2] >= 0:
            file[starts[2] : starts[2] + psfs.shape[1]] = psfs[psf_of[i]]
        if starts[3] >= 0:
            _write_window(mask, corners[i], side, file, starts[3])


@njit(cache=True)
def _write_window(pixels: np.ndarray, corner: np.ndarray, side: int, file: np.ndarray, start: int) -> None:
    """The part of a stamp that lies on the image, big endian."""
    ny, nx = pixels.shape
    x_min, y_min = corner
    first, end = max(0, -x_min), min(side, nx - x_min)
    for row in range(max(0, -y_min), min(side, ny - y_min)):
        source = pixels[y_min + row, x_min + first : x_min + end]
        target = file[start + row * side + first : start + row * side + end]
        for column in range(len(source)):
            word = source[column]
            target[column] = (
                (word >> np.uint32(24))
                | ((word >> np.uint32(8)) & np.uint32(0xFF00))
                | ((word << np.uint32(8)) & np.uint32(0xFF0000))
                | (word << np.uint32(24))
            )


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

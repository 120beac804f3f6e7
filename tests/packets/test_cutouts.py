"""Cutouts: astropy reads back the pixels, the sky positions and the CCDData that went in."""

from __future__ import annotations

import io

import numpy as np
import pytest
from astropy.io import fits
from astropy.nddata import CCDData, VarianceUncertainty
from astropy.wcs import WCS

from schemas.cutouts import CutoutError, LocalTan, cutout_bytes, cutout_side, local_tangents
from schemas.exposures import MASK_BITS

PIXEL_DEG = 0.2 / 3600.0
NY, NX = 260, 300
BEYOND = (1 << MASK_BITS["NO_DATA"]) | (1 << MASK_BITS["EDGE"])


def _image(seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    psf = rng.random((41, 41))
    return (
        rng.normal(0, 100, (NY, NX)).astype(np.float32),
        rng.uniform(50, 60, (NY, NX)).astype(np.float32),
        rng.integers(0, 2**16, (NY, NX)).astype(np.int32),
        psf / psf.sum(),
    )


def _wcs(ra_deg: float = 150.1, dec_deg: float = 2.2, *, distorted: bool = False) -> WCS:
    """A rotated TAN image of 0.2 arcsec pixels whose tangent point lies 2,000 pixels away."""
    angle = np.radians(30.0)
    wcs = WCS(naxis=2)
    suffix = "-SIP" if distorted else ""
    wcs.wcs.ctype = ["RA---TAN" + suffix, "DEC--TAN" + suffix]
    wcs.wcs.crval = [ra_deg, dec_deg]
    wcs.wcs.crpix = [2000.0, -1500.0]
    wcs.wcs.cd = PIXEL_DEG * np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if distorted:
        from astropy.wcs import Sip

        a = np.zeros((4, 4))
        b = np.zeros((4, 4))
        a[2, 0], a[0, 2], b[1, 1] = 2e-7, -1e-7, 1.5e-7  # up to 1 pixel at 2,000 pixels from the centre
        wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    wcs.wcs.set()
    return wcs


def _cutout(x: float, y: float, side: int, *, psf: bool = True, wcs: WCS | None = None) -> bytes | None:
    image, variance, mask, kernel = _image()
    (tangent,) = local_tangents(wcs or _wcs(), np.array([x]), np.array([y]))
    return cutout_bytes(image, variance, mask, kernel if psf else None, x, y, side, tangent, 12.5, MASK_BITS)


def test_side_is_the_bounding_box_within_30_and_102_pixels() -> None:
    assert [cutout_side(size) for size in (0, 29, 30, 51, 102, 103, 5000)] == [30, 30, 30, 51, 102, 102, 102]


@pytest.mark.parametrize("side", [30, 51, 102])
def test_astropy_reads_back_the_pixels(side: int) -> None:
    image, variance, mask, psf = _image()
    x, y = 140.3, 120.8
    with fits.open(io.BytesIO(_cutout(x, y, side)), checksum=True) as hdus:
        hdus.verify("exception")
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "UNCERT", "PSFIMAGE", "MASK"]
        assert [hdu.header["BITPIX"] for hdu in hdus] == [-32, -32, -64, 32]
        header = hdus[0].header
        left, low = header["CUTMINX"], header["CUTMINY"]
        window = (slice(low, low + side), slice(left, left + side))
        np.testing.assert_array_equal(hdus["PRIMARY"].data, image[window])
        np.testing.assert_array_equal(hdus["UNCERT"].data, variance[window])
        np.testing.assert_array_equal(hdus["MASK"].data, mask[window])
        np.testing.assert_array_equal(hdus["PSFIMAGE"].data, psf)
        assert header["BUNIT"] == "nJy"
        assert header["ROTPA"] == 12.5
        assert {key[3:]: bit for key, bit in hdus["MASK"].header.items() if key.startswith("MP_")} == MASK_BITS
    assert abs(left + (side - 1) / 2 - x) <= 0.5
    assert abs(low + (side - 1) / 2 - y) <= 0.5


def test_ccddata_reads_image_uncertainty_mask_psf_and_wcs() -> None:
    image, variance, mask, psf = _image()
    ccd = CCDData.read(io.BytesIO(_cutout(140.0, 120.0, 31)), format="fits")
    window = (slice(105, 136), slice(125, 156))
    assert str(ccd.unit) == "nJy"
    np.testing.assert_array_equal(ccd.data, image[window])
    assert isinstance(ccd.uncertainty, VarianceUncertainty)
    np.testing.assert_array_equal(ccd.uncertainty.array, variance[window])
    np.testing.assert_array_equal(ccd.mask, mask[window] != 0)
    np.testing.assert_array_equal(ccd.psf, psf)
    assert list(ccd.wcs.wcs.ctype) == ["RA---TAN", "DEC--TAN"]


def test_variance_is_labelled_as_astropy_labels_it() -> None:
    """Oracle: the file that CCDData writes of the same pixels (as LSST's packager does)."""
    image, variance, _, psf = _image()
    window = (slice(105, 136), slice(125, 156))
    ccd = CCDData(image[window], uncertainty=VarianceUncertainty(variance[window]), psf=psf, unit="nJy")
    stream = io.BytesIO()
    ccd.write(stream, format="fits")
    stream.seek(0)
    with fits.open(stream) as theirs, fits.open(io.BytesIO(_cutout(140.0, 120.0, 31))) as ours:
        assert [hdu.name for hdu in ours] == [*[hdu.name for hdu in theirs], "MASK"]
        assert ours["UNCERT"].header["UTYPE"] == theirs["UNCERT"].header["UTYPE"]
        assert ours["PRIMARY"].header["BUNIT"] == theirs["PRIMARY"].header["BUNIT"]
        for name in ("PRIMARY", "UNCERT", "PSFIMAGE"):
            assert ours[name].header["BITPIX"] == theirs[name].header["BITPIX"]
            np.testing.assert_array_equal(ours[name].data, theirs[name].data)


@pytest.mark.parametrize(("ra", "dec"), [(150.1, 2.2), (0.01, -30.0), (359.99, 60.0), (40.0, 89.7), (10.0, -85.0)])
@pytest.mark.parametrize("distorted", [False, True])
def test_sky_positions_agree_with_the_full_image_over_the_largest_stamp(ra: float, dec: float, distorted: bool) -> None:
    """Within 0.01 pixel. Expected at 51 pixels: SIP curvature 4e-7 * 51**2 / 2 = 5e-4, projection below 1e-5 pixel."""
    full = _wcs(ra, dec, distorted=distorted)
    with fits.open(io.BytesIO(_cutout(140.3, 120.8, 102, wcs=full))) as hdus:
        header = hdus[0].header
        local = WCS(header)
    grid_y, grid_x = np.mgrid[0:102:10, 0:102:10].astype(float)
    grid_x, grid_y = np.append(grid_x.ravel(), 101.0), np.append(grid_y.ravel(), 101.0)
    sky = local.all_pix2world(grid_x, grid_y, 0)
    x, y = full.all_world2pix(*sky, 0, tolerance=1e-6)
    offset = np.hypot(x - header["CUTMINX"] - grid_x, y - header["CUTMINY"] - grid_y)
    assert offset.max() < 0.01


def test_source_stands_at_its_place_in_the_stamp() -> None:
    x, y = 3.2, 255.9
    full = _wcs()
    ra, dec = full.all_pix2world(x, y, 0)
    with fits.open(io.BytesIO(_cutout(x, y, 40))) as hdus:
        header = hdus[0].header
        column, row = WCS(header).all_world2pix(ra, dec, 0)
    # CRVAL is written to 13 digits: 5e-11 deg at 150 deg, 9e-7 pixel; CRPIX adds 1e-12.
    assert column + header["CUTMINX"] == pytest.approx(x, abs=2e-6)
    assert row + header["CUTMINY"] == pytest.approx(y, abs=2e-6)


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (-0.5, 130.0), (NX - 0.51, NY - 0.51), (5.0, 255.0), (150.0, 3.0)])
def test_a_stamp_across_the_border_keeps_its_size_and_marks_what_lies_beyond(x: float, y: float) -> None:
    image, variance, mask, _ = _image()
    side = 50
    with fits.open(io.BytesIO(_cutout(x, y, side))) as hdus:
        left, low = hdus[0].header["CUTMINX"], hdus[0].header["CUTMINY"]
        rows, columns = np.mgrid[low : low + side, left : left + side]
        inside = (rows >= 0) & (rows < NY) & (columns >= 0) & (columns < NX)
        assert 0 < inside.sum() < side * side
        source = rows[inside], columns[inside]
        assert np.isnan(hdus["PRIMARY"].data[~inside]).all()
        assert np.isnan(hdus["UNCERT"].data[~inside]).all()
        assert (hdus["MASK"].data[~inside] == BEYOND).all()
        np.testing.assert_array_equal(hdus["PRIMARY"].data[inside], image[source])
        np.testing.assert_array_equal(hdus["UNCERT"].data[inside], variance[source])
        np.testing.assert_array_equal(hdus["MASK"].data[inside], mask[source])


def test_a_stamp_wider_than_the_image_holds_all_of_it() -> None:
    planes = np.ones((20, 25), np.float32), np.ones((20, 25), np.float32), np.zeros((20, 25), np.int32)
    tangent = LocalTan(10.0, 20.0, 12.0, 9.0, ((-PIXEL_DEG, 0.0), (0.0, PIXEL_DEG)))
    data = cutout_bytes(*planes, None, 12.0, 9.0, 102, tangent, 0.0, MASK_BITS)
    with fits.open(io.BytesIO(data)) as hdus:
        assert np.nansum(hdus[0].data) == 500
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "UNCERT", "MASK"]


@pytest.mark.parametrize(
    ("x", "y"), [(-0.51, 100.0), (100.0, -0.51), (NX - 0.5, 100.0), (100.0, NY - 0.5), (np.nan, 1.0), (1.0, np.inf)]
)
def test_a_source_outside_the_image_has_no_cutout(x: float, y: float) -> None:
    image, variance, mask, psf = _image()
    tangent = LocalTan(10.0, 20.0, 0.0, 0.0, ((-PIXEL_DEG, 0.0), (0.0, PIXEL_DEG)))
    assert cutout_bytes(image, variance, mask, psf, x, y, 30, tangent, 0.0, MASK_BITS) is None


def test_same_input_gives_same_bytes_and_one_cutout_leaves_no_trace_in_the_next() -> None:
    first = _cutout(140.0, 120.0, 33)
    _cutout(2.0, 2.0, 33)
    assert _cutout(140.0, 120.0, 33) == first


@pytest.mark.parametrize(
    "value", [0.0, -1e-300, 5.5555555555555555e-5, -179.99999999999997, -1e200, 359.99999999999994]
)
def test_header_numbers_survive(value: float) -> None:
    """13 significant digits: relative error at most 5e-13. Exponents of three digits fill the card."""
    image, variance, mask, psf = _image()
    tangent = LocalTan(value, value / 10, 140.0, 120.0, ((value, -value), (value, 1.0)))
    data = cutout_bytes(image, variance, mask, psf, 140.0, 120.0, 30, tangent, value, MASK_BITS)
    with fits.open(io.BytesIO(data)) as hdus:
        header = hdus[0].header
        for card, expected in (("CRVAL1", value), ("CRVAL2", value / 10), ("CD1_2", -value), ("ROTPA", value)):
            assert header[card] == pytest.approx(expected, rel=5e-13, abs=0)


def test_input_that_makes_no_cutout_is_refused() -> None:
    image, variance, mask, psf = _image()
    good = LocalTan(10.0, 20.0, 140.0, 120.0, ((-PIXEL_DEG, 0.0), (0.0, PIXEL_DEG)))
    bad = LocalTan(np.nan, 20.0, 140.0, 120.0, ((-PIXEL_DEG, 0.0), (0.0, PIXEL_DEG)))
    with pytest.raises(CutoutError, match="of one shape"):
        cutout_bytes(image, variance[:-1], mask, psf, 140, 120, 30, good, 0.0, MASK_BITS)
    with pytest.raises(CutoutError, match="square image, got shape"):
        cutout_bytes(image, variance, mask, psf[:-1], 140, 120, 30, good, 0.0, MASK_BITS)
    with pytest.raises(CutoutError, match="got 0"):
        cutout_bytes(image, variance, mask, psf, 140, 120, 0, good, 0.0, MASK_BITS)
    with pytest.raises(CutoutError, match="must be finite"):
        cutout_bytes(image, variance, mask, psf, 140, 120, 30, bad, 0.0, MASK_BITS)
    with pytest.raises(CutoutError, match="must name NO_DATA and EDGE, got BAD"):
        cutout_bytes(image, variance, mask, psf, 140, 120, 30, good, 0.0, {"BAD": 0})

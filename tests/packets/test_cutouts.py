"""Cutouts: astropy reads back what went in; strict ones are what `CCDData.write` makes of the same, to the byte."""

from __future__ import annotations

import io
from pathlib import Path

import fastavro
import numpy as np
import pytest
from astropy.io import fits
from astropy.nddata import CCDData, VarianceUncertainty
from astropy.wcs import WCS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.cutouts import Content, CutImage, CutoutError, LocalTan, cut_out, cutout_sides, local_tangents
from schemas.exposures import MASK_BITS

PIXEL_DEG = 0.2 / 3600.0
NY, NX = 260, 300
RUBIN_ALERTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "rubin_alerts"
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


def _cut(
    planes: tuple[np.ndarray, np.ndarray, np.ndarray],
    psf: np.ndarray | None,
    place: tuple[float, float, int],
    tangent: LocalTan,
    rotation_deg: float = 0.0,
    mask_planes: dict[str, int] = MASK_BITS,
    content: Content = "complete",
) -> bytes | None:
    """One stamp; None where there is none."""
    image, variance, mask = planes
    one = CutImage(image, variance, None if psf is None else psf[np.newaxis], np.array([0]))
    x, y, side = (np.array([value]) for value in place)
    found = cut_out([one], mask, x, y, side, [tangent], rotation_deg, mask_planes, content)
    assert (found.files[0] is None) == (0 in found.refused)
    return None if found.files[0] is None else bytes(found.files[0][0])


def _cutout(
    x: float, y: float, side: int, *, psf: bool = True, wcs: WCS | None = None, content: Content = "complete"
) -> bytes | None:
    *planes, kernel = _image()
    (tangent,) = local_tangents(wcs or _wcs(), np.array([x]), np.array([y]))
    return _cut(tuple(planes), kernel if psf else None, (x, y, side), tangent, 12.5, content=content)


def test_side_is_the_bounding_box_within_30_and_102_pixels() -> None:
    assert cutout_sides(np.array([0, 29, 30, 51, 102, 103, 5000])).tolist() == [30, 30, 30, 51, 102, 102, 102]


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
        assert (hdus["UNCERT"].data[~inside] == np.inf).all()
        assert (hdus["MASK"].data[~inside] == BEYOND).all()
        np.testing.assert_array_equal(hdus["PRIMARY"].data[inside], image[source])
        np.testing.assert_array_equal(hdus["UNCERT"].data[inside], variance[source])
        np.testing.assert_array_equal(hdus["MASK"].data[inside], mask[source])


def test_a_stamp_wider_than_the_image_holds_all_of_it() -> None:
    planes = np.ones((20, 25), np.float32), np.ones((20, 25), np.float32), np.zeros((20, 25), np.int32)
    tangent = LocalTan(10.0, 20.0, 12.0, 9.0, ((-PIXEL_DEG, 0.0), (0.0, PIXEL_DEG)))
    data = _cut(planes, None, (12.0, 9.0, 102), tangent)
    with fits.open(io.BytesIO(data)) as hdus:
        assert np.nansum(hdus[0].data) == 500
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "UNCERT", "MASK"]


@pytest.mark.parametrize(
    ("x", "y"), [(-0.51, 100.0), (100.0, -0.51), (NX - 0.5, 100.0), (100.0, NY - 0.5), (np.nan, 1.0), (1.0, np.inf)]
)
def test_a_source_outside_the_image_has_no_cutout(x: float, y: float) -> None:
    *planes, psf = _image()
    tangent = LocalTan(10.0, 20.0, 0.0, 0.0, ((-PIXEL_DEG, 0.0), (0.0, PIXEL_DEG)))
    assert _cut(tuple(planes), psf, (x, y, 30), tangent) is None


def test_same_input_gives_same_bytes_and_one_cutout_leaves_no_trace_in_the_next() -> None:
    first = _cutout(140.0, 120.0, 33)
    _cutout(2.0, 2.0, 33)
    assert _cutout(140.0, 120.0, 33) == first


@pytest.mark.parametrize("value", [-1e-300, 5.5555555555555555e-5, -179.99999999999997, -1e200, 359.99999999999994])
def test_header_numbers_survive(value: float) -> None:
    """13 significant digits: relative error at most 5e-13. Exponents of three digits fill the card."""
    *planes, psf = _image()
    tangent = LocalTan(value, value / 10, 140.0, 120.0, ((value, -value), (1.0, 1.0)))
    data = _cut(tuple(planes), psf, (140.0, 120.0, 30), tangent, value)
    with fits.open(io.BytesIO(data)) as hdus:
        header = hdus[0].header
        for card, expected in (("CRVAL1", value), ("CRVAL2", value / 10), ("CD1_2", -value), ("ROTPA", value)):
            assert header[card] == pytest.approx(expected, rel=5e-13, abs=0)


def test_input_that_makes_no_cutout_is_refused() -> None:
    image, variance, mask, psf = _image()
    planes, place = (image, variance, mask), (140.0, 120.0, 30)
    good = LocalTan(10.0, 20.0, 140.0, 120.0, ((-PIXEL_DEG, 0.0), (0.0, PIXEL_DEG)))
    with pytest.raises(CutoutError, match="of one shape"):
        _cut((image, variance[:-1], mask), psf, place, good)
    with pytest.raises(CutoutError, match="square images, got shape"):
        _cut(planes, psf[:-1], place, good)
    with pytest.raises(CutoutError, match="got 0"):
        _cut(planes, psf, (140.0, 120.0, 0), good)
    with pytest.raises(CutoutError, match="rotation must be finite"):
        _cut(planes, psf, place, good, np.nan)
    with pytest.raises(CutoutError, match="must name NO_DATA and EDGE, got BAD"):
        _cut(planes, psf, place, good, 0.0, {"BAD": 0})


@pytest.mark.parametrize("content", ["complete", "strict"])
def test_a_source_without_stamp_costs_the_others_none(content: Content) -> None:
    image, variance, mask, psf = _image()
    matrix = ((-PIXEL_DEG, 0.0), (0.0, PIXEL_DEG))
    x = np.array([140.0, -3.0, 50.0, 60.0, 70.0])
    y = np.array([120.0, 120.0, 120.0, 120.0, np.nan])
    tangents = [LocalTan(10.0, 20.0, one, 120.0, matrix) for one in x.tolist()]
    tangents[2] = LocalTan(np.inf, 20.0, 50.0, 120.0, matrix)
    tangents[3] = LocalTan(10.0, 20.0, 60.0, 120.0, ((PIXEL_DEG, PIXEL_DEG), (PIXEL_DEG, PIXEL_DEG)))
    one = CutImage(image, variance, psf[np.newaxis], np.zeros(5, dtype=int))
    found = cut_out([one] * 3, mask, x, y, np.full(5, 30), tangents, 0.0, MASK_BITS, content)
    assert [files is None for files in found.files] == [False, True, True, True, True]
    alone = _cut((image, variance, mask), psf, (140.0, 120.0, 30), tangents[0], content=content)
    assert found.files[0] == (alone, alone, alone)
    reasons = {1: "outside the image", 2: "not finite", 3: "singular", 4: "outside the image"}
    assert found.refused.keys() == reasons.keys()
    assert all(reason in found.refused[row] for row, reason in reasons.items())


@pytest.mark.parametrize("content", ["complete", "strict"])
def test_a_detector_at_once_gives_the_stamps_of_each_source_alone(content: Content) -> None:
    """Many sides, PSFs of other sizes in another image, stamps across the border."""
    rng = np.random.default_rng(3)
    n = 40
    x, y = rng.uniform(-0.5, NX - 0.5, n), rng.uniform(-0.5, NY - 0.5, n)
    sides = cutout_sides(rng.integers(20, 40, n))
    tangents = local_tangents(_wcs(), x, y)
    *planes, _ = _image()
    image, variance, mask = planes
    images = [
        CutImage(image, variance, rng.random((5, 41, 41)).astype(np.float32), rng.integers(0, 5, n)),
        CutImage(image + 1, variance + 1, rng.random((3, 25, 25)), rng.integers(0, 3, n)),
        CutImage(image + 2, variance + 2, None, np.zeros(n, dtype=int)),
    ]
    found = cut_out(images, mask, x, y, sides, tangents, -71.25, MASK_BITS, content)
    assert not found.refused
    for i, files in enumerate(found.files):
        for one, file in zip(images, files, strict=True):
            psf = None if one.psfs is None else one.psfs[one.psf_of[i]]
            place = (x[i], y[i], sides[i])
            assert _cut((one.image, one.variance, mask), psf, place, tangents[i], -71.25, content=content) == file


def test_no_sources_make_no_cutouts() -> None:
    image, variance, mask, psf = _image()
    none = np.zeros(0)
    one = CutImage(image, variance, psf[np.newaxis], none.astype(int))
    found = cut_out([one], mask, none, none, none.astype(int), local_tangents(_wcs(), none, none), 0.0, MASK_BITS)
    assert found == ([], {})


# --- strict -----------------------------------------------------------------------------------------


def _written_by_astropy(
    stamp: np.ndarray,
    variance: np.ndarray,
    psf: np.ndarray | None,
    tangent: LocalTan,
    corner: tuple[int, int],
    rotation_deg: float,
) -> bytes:
    """What LSST's packager does: a linear WCS, and as corner the column and row before the first pixel."""
    wcs = WCS(naxis=2)
    wcs.array_shape = stamp.shape
    before = corner[0] - 1, corner[1] - 1
    wcs.wcs.crpix = [tangent.x_pix - before[0], tangent.y_pix - before[1]]
    wcs.wcs.crval = [tangent.ra_deg, tangent.dec_deg]
    wcs.wcs.cd = np.array(tangent.cd_deg_per_pix)
    ccd = CCDData(
        stamp,
        uncertainty=VarianceUncertainty(variance),
        flags=np.zeros(stamp.shape, dtype=np.int32),
        wcs=wcs,
        psf=psf,
        meta={"cutMinX": before[0], "cutMinY": before[1]},
        unit="nJy",
    )
    ccd.header["ROTPA"] = (rotation_deg, "Pos angle in deg of focal plane +Y wrt North")
    stream = io.BytesIO()
    ccd.write(stream, format="fits")
    return stream.getvalue()


_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_ELEMENTS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-52, 5e-324]), st.floats(-1e-4, 1e-4), _FLOATS)
_NUMBERS = st.one_of(st.sampled_from([0.0, -0.0, 360.0, 1e14, 1e15, 1e16, 1e-5]), st.floats(-400.0, 400.0), _FLOATS)


@settings(max_examples=150, deadline=None)
@given(
    crval=st.tuples(_NUMBERS, _NUMBERS),
    matrix=st.tuples(*[_ELEMENTS] * 4),
    rotation_deg=_NUMBERS,
    x=st.floats(-0.5, NX - 0.5, exclude_max=True),
    y=st.floats(-0.5, NY - 0.5, exclude_max=True),
    off=st.tuples(*[st.one_of(st.just(0.0), st.floats(-1e-9, 1e-9), st.floats(-1e20, 1e20))] * 2),
    side=st.integers(30, 102),
    psf_side=st.sampled_from([0, 1, 25, 41, 60]),
)
@example((-1.2345678901234567e-105, 1e15), (-1.2345678901234567e-105, 0.0, 0.3, 1.0), -1.5e-105, 3, 4, (0, 0), 31, 41)
def test_a_strict_file_is_the_one_astropy_writes(
    crval: tuple[float, float],
    matrix: tuple[float, float, float, float],
    rotation_deg: float,
    x: float,
    y: float,
    off: tuple[float, float],
    side: int,
    psf_side: int,
) -> None:
    image, variance, mask, _ = _image()
    psf = np.random.default_rng(psf_side).random((psf_side, psf_side)) if psf_side else None
    tangent = LocalTan(*crval, x + off[0], y + off[1], (matrix[:2], matrix[2:]))
    ours = _cut((image, variance, mask), psf, (x, y, side), tangent, rotation_deg, content="strict")
    left, low = int(np.floor(x - side / 2 + 1)), int(np.floor(y - side / 2 + 1))
    rows, columns = np.mgrid[low : low + side, left : left + side]
    inside = (rows >= 0) & (rows < NY) & (columns >= 0) & (columns < NX)
    stamps = []
    for plane, beyond in ((image, np.nan), (variance, np.inf)):
        stamps.append(np.full((side, side), beyond, dtype=np.float32))
        stamps[-1][inside] = plane[rows[inside], columns[inside]]
    try:
        theirs = _written_by_astropy(*stamps, psf, tangent, (left, low), rotation_deg)
    except ValueError as error:  # astropy's SingularMatrixError, of products that underflow among them
        assert "singular" in str(error).lower()
        return
    if matrix[0] * matrix[3] == matrix[1] * matrix[2]:
        assert ours is None
    else:
        assert ours == theirs


@pytest.mark.skipif(not RUBIN_ALERTS.is_dir(), reason="no rubin_alerts beside the project")
def test_strict_files_are_those_of_real_lsst_alerts() -> None:
    """Pixels, PSF and numbers of a stamp back into the file they came from; all but the corner in the full image."""
    n = 0
    with (RUBIN_ALERTS / "lsstcam_20260305_i_ddf_long_history_fink.avro").open("rb") as stream:
        for packet in fastavro.reader(stream):
            for name in ("cutoutDifference", "cutoutScience", "cutoutTemplate"):
                theirs = packet[name]
                with fits.open(io.BytesIO(theirs)) as hdus:
                    header = hdus[0].header
                    image, variance = (hdus[hdu].data.astype(np.float32) for hdu in ("PRIMARY", "UNCERT"))
                    psf = hdus["PSFIMAGE"].data.astype(np.float64)
                    matrix = tuple(tuple(header[f"PC{i}_{j}"] for j in (1, 2)) for i in (1, 2))
                sky = header["CRVAL1"], header["CRVAL2"]
                tangent = LocalTan(*sky, header["CRPIX1"] - 1, header["CRPIX2"] - 1, matrix)
                place = ((image.shape[0] - 1) / 2, (image.shape[0] - 1) / 2, image.shape[0])
                planes = (image, variance, np.zeros(image.shape, dtype=np.int32))
                ours = _cut(planes, psf, place, tangent, header["ROTPA"], content="strict")
                at = [theirs.index(card.encode()) for card in ("CUTMINX", "CUTMINY")]
                assert [ours[: at[0]], ours[at[1] + 80 :]] == [theirs[: at[0]], theirs[at[1] + 80 :]]
                n += 1
    assert n == 21


@pytest.mark.skipif(not RUBIN_ALERTS.is_dir(), reason="no rubin_alerts beside the project")
def test_lsst_pads_at_the_border_as_we_do() -> None:
    """One real alert lies 14 pixels from its detector's edge, with stamps of 52: 11 columns hang over."""
    with (RUBIN_ALERTS / "lsstcam_20250905_i_fink9.0.avro").open("rb") as stream:
        at_border = [one for one in fastavro.reader(stream) if one["diaSource"]["x"] < 15]
    (packet,) = at_border
    for name in ("cutoutDifference", "cutoutScience"):
        theirs = packet[name]
        with fits.open(io.BytesIO(theirs)) as hdus:
            corner, side = hdus[0].header["CUTMINX"], hdus[0].header["NAXIS1"]
            image, variance = (hdus[hdu].data[:, 11:].astype(np.float32) for hdu in ("PRIMARY", "UNCERT"))
            psf = hdus["PSFIMAGE"].data.astype(np.float64)
        tangent = LocalTan(10.0, 20.0, 0.0, 0.0, ((-PIXEL_DEG, 0.0), (0.0, PIXEL_DEG)))
        place = (packet["diaSource"]["x"], (side - 1) / 2, side)
        ours = _cut((image, variance, np.zeros(image.shape, np.int32)), psf, place, tangent, content="strict")
        with fits.open(io.BytesIO(ours)) as hdus:
            assert hdus[0].header["CUTMINX"] == corner
        assert ours[2880:] == theirs[2880:]

"""Exposures: FITS of many makes become nJy, our mask bits and a usable variance, or a clear refusal."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.exposures import MASK_BITS, Exposure, ExposureError, mask_bits, read_exposure, read_grid, write_exposure

NY, NX = 40, 48
FITS_BLOCK = 2880
NJY_PER_ADU_AT_27 = 10.0 ** (0.4 * (31.4 - 27.0))


def _wcs() -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.cunit = ["RA---TAN", "DEC--TAN"], ["deg", "deg"]
    wcs.wcs.crval, wcs.wcs.crpix, wcs.wcs.cdelt = [150.1, 2.2], [20.0, 25.0], [-5e-5, 5e-5]
    return wcs


def _image() -> np.ndarray:
    return np.random.default_rng(1).normal(500.0, 10.0, (NY, NX)).astype(np.float32)


def _mask() -> np.ndarray:
    mask = np.zeros((NY, NX), dtype=np.int32)
    mask[0, 0], mask[0, 1], mask[0, 2] = 1, 2, 4
    return mask


def _exposure(**changes: Any) -> Exposure:
    whole: dict[str, Any] = {
        "image": _image(),
        "variance": np.full((NY, NX), 100.0, dtype=np.float32),
        "mask": np.zeros((NY, NX), dtype=np.int32),
        "wcs": _wcs(),
        "psf": np.full((3, 3), 1.0 / 9.0),
    }
    return Exposure(**{**whole, **changes})


def _write(
    path: Path,
    *,
    cards: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    planes: dict[str, np.ndarray] | None = None,
    mask_cards: dict[str, Any] | None = None,
    image: np.ndarray | None = None,
) -> Path:
    """A file as another program may write it: IMAGE in nJy and whichever planes are given."""
    header = _wcs().to_header()
    header["BUNIT"] = "nJy"
    header.update(cards or {})
    for card in without:
        del header[card]
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(_image() if image is None else image, header, name="IMAGE")]
    for name, plane in (planes or {}).items():
        hdus.append(
            fits.ImageHDU(plane, fits.Header((mask_cards or {}).items()) if name == "MASK" else None, name=name)
        )
    fits.HDUList(hdus).writeto(path, overwrite=True)
    return path


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(ExposureError) as caught:
        read_exposure(path)
    assert str(caught.value).startswith(f"{path.name}: ")
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- round trips ------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    mask = np.random.default_rng(2).integers(0, 1 << 4, (NY, NX), dtype=np.int32)
    exposure = _exposure(mask=mask, variance=np.linspace(1, 9, NY * NX, dtype=np.float32).reshape(NY, NX))
    write_exposure(tmp_path / "deep" / "a.fits", exposure, header={"FILTER": "r"})
    back = read_exposure(tmp_path / "deep" / "a.fits")
    np.testing.assert_array_equal(back.image, exposure.image)
    np.testing.assert_array_equal(back.variance, exposure.variance)
    np.testing.assert_array_equal(back.mask, exposure.mask)
    np.testing.assert_allclose(back.psf, exposure.psf, rtol=1e-15)
    assert back.notes == ()
    assert back.image.dtype == back.variance.dtype == np.float32 and back.mask.dtype == np.int32
    at = np.array([0.0, 17.0, 47.0]), np.array([0.0, 31.0, 39.0])
    np.testing.assert_allclose(
        back.wcs.all_pix2world(*at, 0),
        exposure.wcs.all_pix2world(*at, 0),
        rtol=0,
        atol=1e-10,  # 4e-7 arcsec
    )
    assert fits.getheader(tmp_path / "deep" / "a.fits", "IMAGE")["FILTER"] == "r"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.fits"]


def test_every_mask_plane_survives_a_round_trip(tmp_path: Path) -> None:
    mask = np.zeros((NY, NX), dtype=np.int32)
    for column, bit in enumerate(MASK_BITS.values()):
        mask[0, column] = 1 << bit
    write_exposure(tmp_path / "a.fits", _exposure(mask=mask))
    np.testing.assert_array_equal(read_exposure(tmp_path / "a.fits").mask, mask)


def test_pixels_without_data_are_nan_with_infinite_variance_and_marked(tmp_path: Path) -> None:
    image, variance = _image(), np.full((NY, NX), 100.0, dtype=np.float32)
    image[0, 0], image[0, 1], variance[1, 0], variance[1, 1], variance[1, 2] = np.nan, np.inf, 0.0, -1.0, np.nan
    write_exposure(tmp_path / "a.fits", _exposure(image=image, variance=variance))
    back = read_exposure(tmp_path / "a.fits")
    lost = np.zeros((NY, NX), dtype=bool)
    lost[0, :2] = lost[1, :3] = True
    np.testing.assert_array_equal(np.isnan(back.image), lost)
    np.testing.assert_array_equal(np.isinf(back.variance), lost)
    np.testing.assert_array_equal(back.mask == mask_bits("NO_DATA"), lost)


def test_mask_bits_joins_planes() -> None:
    assert mask_bits("BAD", "CR") == 0b101 and mask_bits() == 0
    assert len(set(MASK_BITS.values())) == len(MASK_BITS)


# --- files of other makes ---------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["RICE_1", "GZIP_1", "GZIP_2", "HCOMPRESS_1"])
def test_a_tile_compressed_file_gives_the_same_pixels_within_its_quantisation(tmp_path: Path, compression: str) -> None:
    image, mask = _image(), _mask()
    hdus = fits.HDUList(
        [
            fits.PrimaryHDU(),
            fits.CompImageHDU(image, fits.Header({**_wcs().to_header(), "BUNIT": "nJy"}), name="IMAGE",
                              compression_type=compression, quantize_level=16.0),
            fits.CompImageHDU(mask, fits.Header({"MP_SAT": 1}), name="MASK", compression_type="PLIO_1"),
        ]
    )  # fmt: skip
    hdus.writeto(tmp_path / "a.fits.fz")
    back = read_exposure(tmp_path / "a.fits.fz")
    # Steps of a sixteenth of the noise: no pixel is off by more than one of them.
    np.testing.assert_allclose(back.image, image, rtol=0, atol=1.1 * 10.0 / 16.0)
    np.testing.assert_array_equal(back.mask == mask_bits("SAT"), mask == 2)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_packed_file_is_read_and_one_cut_short_refused(tmp_path: Path, suffix: str) -> None:
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[suffix]
    write_exposure(tmp_path / "a.fits", _exposure())
    packed = pack((tmp_path / "a.fits").read_bytes())
    whole, cut = tmp_path / f"a.fits.{suffix}", tmp_path / f"b.fits.{suffix}"
    whole.write_bytes(packed)
    np.testing.assert_array_equal(read_exposure(whole).image, _image())
    for kept in np.linspace(10, len(packed) - 1, 20).astype(int):
        cut.write_bytes(packed[:kept])
        _refused(cut, "broken FITS file")


def test_an_image_in_the_primary_unit_is_read(tmp_path: Path) -> None:
    header = fits.Header({**_wcs().to_header(), "BUNIT": "nJy"})
    fits.PrimaryHDU(_image(), header).writeto(tmp_path / "a.fits")
    np.testing.assert_array_equal(read_exposure(tmp_path / "a.fits").image, _image())


def test_scaled_integers_are_read_as_their_values_and_blanks_as_no_data(tmp_path: Path) -> None:
    stored = np.arange(NY * NX, dtype=np.int16).reshape(NY, NX)
    hdu = fits.ImageHDU(stored, fits.Header({**_wcs().to_header(), "BUNIT": "nJy", "BLANK": 7}), name="IMAGE")
    hdu.header["BSCALE"], hdu.header["BZERO"] = 0.5, 100.0
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "a.fits")
    back = read_exposure(tmp_path / "a.fits")
    with fits.open(tmp_path / "a.fits") as hdus:
        written = np.array(hdus["IMAGE"].data)
    assert np.isnan(back.image[np.isnan(written)]).all()
    np.testing.assert_array_equal(back.image, written.astype(np.float32))


@given(bits=st.permutations(range(20)), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_planes_are_taken_by_name_whatever_their_bits_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, bits: list[int], seed: int
) -> None:
    known = ["BAD", "SAT", "CR", "EDGE", "INTRP", "SPIKE"]
    file_bits = dict(zip([*known, "VNDR", "DETEC"], bits, strict=False))  # two planes we do not know
    stored = np.random.default_rng(seed).integers(0, 1 << 20, (NY, NX), dtype=np.int32)
    path = tmp_path_factory.mktemp("mask") / "a.fits"
    _write(path, planes={"MASK": stored}, mask_cards={f"MP_{plane}": bit for plane, bit in file_bits.items()})
    expected = np.zeros((NY, NX), dtype=np.int32)
    for plane in known:
        expected[stored & (1 << file_bits[plane]) != 0] += 1 << MASK_BITS[plane]
    np.testing.assert_array_equal(read_exposure(path).mask, expected)


def test_a_mask_without_names_is_all_bad_and_says_so(tmp_path: Path) -> None:
    back = read_exposure(_write(tmp_path / "a.fits", planes={"MASK": _mask()}))
    np.testing.assert_array_equal(back.mask == mask_bits("BAD"), _mask() != 0)
    assert "mask without MP_ cards: every set pixel taken as BAD" in back.notes


def test_a_file_without_mask_is_all_good_and_says_so(tmp_path: Path) -> None:
    back = read_exposure(_write(tmp_path / "a.fits"))
    assert not back.mask.any() and back.psf is None
    assert "no mask: all pixels taken as good" in back.notes


@pytest.mark.parametrize("unit", ["adu", "ADU", "count", "DN", None])
def test_adu_become_njy_by_the_zero_point(tmp_path: Path, unit: str | None) -> None:
    cards = {"MAGZERO": 27.0} | ({} if unit is None else {"BUNIT": unit})
    variance = np.full((NY, NX), 4.0, dtype=np.float32)
    path = _write(tmp_path / "a.fits", cards=cards, without=() if unit else ("BUNIT",), planes={"VARIANCE": variance})
    back = read_exposure(path)
    # float32 pixels: two roundings of half a unit in the last place.
    np.testing.assert_allclose(back.image, _image().astype(float) * NJY_PER_ADU_AT_27, rtol=2**-22)
    np.testing.assert_allclose(back.variance, 4.0 * NJY_PER_ADU_AT_27**2, rtol=2**-22)


def test_a_magnitude_equals_the_zero_point_at_one_adu(tmp_path: Path) -> None:
    image = _image()
    image[3, 4] = 1.0
    variance = np.ones((NY, NX), dtype=np.float32)
    back = read_exposure(
        _write(tmp_path / "a.fits", image=image, cards={"BUNIT": "adu", "MAGZERO": 25.5}, planes={"VARIANCE": variance})
    )
    assert 31.4 - 2.5 * np.log10(back.image[3, 4]) == pytest.approx(25.5, abs=1e-6)  # 2**-23 * 1.09 mag, times 8


def test_gain_and_read_noise_stand_in_for_the_variance(tmp_path: Path) -> None:
    image = _image()
    image[0, 0] = -50.0
    path = _write(
        tmp_path / "a.fits", image=image, cards={"BUNIT": "adu", "MAGZERO": 27.0, "GAIN": 2.0, "RDNOISE": 3.0}
    )
    back = read_exposure(path)
    expected_adu = np.maximum(image.astype(float), 0.0) / 2.0 + (3.0 / 2.0) ** 2
    np.testing.assert_allclose(back.variance, expected_adu * NJY_PER_ADU_AT_27**2, rtol=2**-21)
    assert "no variance: from GAIN and RDNOISE" in back.notes
    without = read_exposure(_write(tmp_path / "b.fits", cards={"BUNIT": "adu", "MAGZERO": 27.0, "GAIN": 2.0}))
    np.testing.assert_allclose(
        without.variance, (_image().astype(float) / 2.0 + 2.5**2) * NJY_PER_ADU_AT_27**2, rtol=2**-21
    )


def test_without_variance_and_gain_the_scatter_stands_in(tmp_path: Path) -> None:
    back = read_exposure(_write(tmp_path / "a.fits"))
    assert np.unique(back.variance).size == 1
    # The MAD of n normal deviates scatters by 1.17 / sqrt(n); twice that for the square, and 5 sigma.
    assert back.variance[0, 0] == pytest.approx(100.0, rel=5 * 2 * 1.17 / np.sqrt(NX * NY))
    assert "no variance, no GAIN: constant, from the scatter of the image" in back.notes


def test_a_psf_is_normalised(tmp_path: Path) -> None:
    psf = np.outer([1.0, 2.0, 1.0], [1.0, 2.0, 1.0])
    back = read_exposure(_write(tmp_path / "a.fits", planes={"PSF": psf}))
    assert back.psf is not None
    np.testing.assert_allclose(back.psf, psf / 16.0, rtol=1e-15)


@pytest.mark.parametrize("cards", [{"RADESYS": "FK5", "EQUINOX": 2000.0}, {"RADESYS": "ICRS"}])
def test_a_wcs_in_a_frame_equal_to_icrs_is_taken(tmp_path: Path, cards: dict[str, Any]) -> None:
    assert read_exposure(_write(tmp_path / "a.fits", cards=cards)).wcs.has_celestial


# --- refusals ---------------------------------------------------------------------------------------


def _nan_psf() -> np.ndarray:
    return np.full((3, 3), np.nan)


SWAPPED_AXES = {"CTYPE1": "DEC--TAN", "CTYPE2": "RA---TAN", "CRVAL1": 2.2, "CRVAL2": 150.1}
REFUSALS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"image": np.zeros((2, NY, NX), np.float32)}, (f"image must be two-dimensional, got shape (2, {NY}, {NX})",)),
    ({"image": np.zeros(NX, np.float32)}, (f"image must be two-dimensional, got shape ({NX},)",)),
    ({"image": np.full((NY, NX), np.nan, np.float32)}, ("no finite pixel in the image",)),
    ({"image": np.full((NY, NX), 1e300)}, ("no finite pixel in the image",)),
    ({"image": np.ones((31, NX), np.float32)}, (f"shape (31, {NX}) is too small, at least 32 x 32 pixels",)),
    ({"image": np.full((NY, NX), 7, np.float32)}, ("no pixel has both a finite value and a positive variance",)),
    ({"planes": {"VARIANCE": np.zeros((NY, NX), np.float32)}}, ("no pixel has both a finite value and a positive",)),
    ({"planes": {"VARIANCE": np.full((NY, NX), -1.0)}}, ("no pixel has both a finite value and a positive variance",)),
    ({"planes": {"VARIANCE": np.full((NY, NX), 1e200)}}, ("no pixel has both a finite value and a positive variance",)),
    ({"planes": {"VARIANCE": np.ones((NY - 1, NX))}}, (f"VARIANCE has shape (39, {NX}), the image ({NY}, {NX})",)),
    ({"planes": {"MASK": _mask()[1:]}}, (f"MASK has shape (39, {NX}), the image ({NY}, {NX})",)),
    ({"planes": {"MASK": np.full((NY, NX), np.nan)}}, ("MASK must hold integers, got >f8",)),
    ({"planes": {"MASK": _mask()}, "mask_cards": {"MP_SAT": -1}}, ("MP_SAT must be a bit number in [0, 63), got -1",)),
    ({"planes": {"MASK": _mask()}, "mask_cards": {"MP_SAT": 70}}, ("MP_SAT must be a bit number in [0, 63), got 70",)),
    ({"planes": {"MASK": _mask()}, "mask_cards": {"MP_SAT": "x"}}, ("MP_SAT must be a bit number", "got 'x'")),
    ({"planes": {"PSF": np.ones((4, 4))}}, ("PSF must be an odd square image", "got shape (4, 4)")),
    ({"planes": {"PSF": np.ones((3, 5))}}, ("PSF must be an odd square image", "got shape (3, 5)")),
    ({"planes": {"PSF": np.ones((1, 1))}}, ("at least 3 pixels a side, got shape (1, 1)",)),
    ({"planes": {"PSF": -np.ones((3, 3))}}, ("PSF must have a positive sum, got -9.0",)),
    ({"planes": {"PSF": _nan_psf()}}, ("PSF must have a positive sum, got nan",)),
    ({"cards": {"BUNIT": "Jy"}}, ("BUNIT 'Jy' is unknown, expected nJy, or adu with MAGZERO",)),
    ({"without": ("BUNIT",)}, ("BUNIT None is unknown, expected nJy, or adu with MAGZERO",)),
    ({"cards": {"BUNIT": "adu"}}, ("BUNIT is adu but there is no finite MAGZERO card",)),
    ({"cards": {"BUNIT": "adu", "MAGZERO": "none"}}, ("BUNIT is adu but there is no finite MAGZERO card",)),
    ({"cards": {"BUNIT": "adu", "MAGZERO": True}}, ("BUNIT is adu but there is no finite MAGZERO card",)),
    ({"cards": {"BUNIT": "adu", "MAGZERO": 1000.0}}, ("MAGZERO 1000.0 is no zero point in magnitudes",)),
    ({"cards": {"BUNIT": "adu", "MAGZERO": 27.0, "GAIN": 2.0, "RDNOISE": "low"}}, ("RDNOISE must be", "got 'low'")),
    ({"cards": {"BUNIT": "adu", "MAGZERO": 27.0, "GAIN": 2.0, "RDNOISE": -1.0}}, ("RDNOISE must be", "got -1.0")),
    ({"without": ("CTYPE1", "CTYPE2")}, ("no celestial WCS in the image header",)),
    ({"cards": {"CTYPE1": "XPIX", "CTYPE2": "YPIX"}}, ("no celestial WCS in the image header",)),
    ({"cards": {"CTYPE2": "FREQ"}}, ("unusable WCS",)),
    ({"cards": {"CDELT1": 0.0, "CDELT2": 0.0}}, ("unusable WCS",)),
    ({"cards": {"CRVAL2": 200.0}}, ("unusable WCS",)),
    ({"cards": {"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN"}}, ("must have axes RA, DEC, got GLON-TAN, GLAT-TAN",)),
    ({"cards": SWAPPED_AXES}, ("must have axes RA, DEC, got DEC--TAN, RA---TAN",)),
    ({"cards": {"RADESYS": "FK4", "EQUINOX": 1950.0}}, ("must be ICRS or FK5 of J2000, got FK4 of 1950.0",)),
    ({"cards": {"RADESYS": "FK5", "EQUINOX": 1975.0}}, ("must be ICRS or FK5 of J2000, got FK5 of 1975.0",)),
    ({"cards": {"CTYPE1": "RA---SIN", "CTYPE2": "DEC--SIN", "CDELT1": 9.0, "CDELT2": 9.0}}, ("corners of the image",)),
]  # fmt: skip


@pytest.mark.parametrize(("written", "words"), REFUSALS)
def test_what_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, written: dict[str, Any], words: tuple[str, ...]
) -> None:
    _refused(_write(tmp_path / "a.fits", **written), *words)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.fits", tmp_path):
        _refused(path, "no such file")


def test_a_file_without_image_is_refused(tmp_path: Path) -> None:
    table = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.arange(3.0))])
    fits.HDUList([fits.PrimaryHDU(), table, fits.ImageHDU(_mask(), name="MASK")]).writeto(tmp_path / "a.fits")
    _refused(tmp_path / "a.fits", "no image in the file")


@pytest.mark.parametrize("content", [b"", b"text", b"SIMPLE  =                    T", b"\x1f\x8b", b"\0" * 5760])
def test_a_file_that_is_no_fits_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.fits").write_bytes(content)
    _refused(tmp_path / "a.fits", "broken FITS file")


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, tuple[int, ...]]:
    """A file to spoil, its bytes, and where its extensions begin."""
    path = tmp_path_factory.mktemp("whole") / "a.fits"
    write_exposure(path, _exposure())
    with fits.open(path, lazy_load_hdus=False) as hdus:
        begins = tuple(hdu.fileinfo()["hdrLoc"] for hdu in hdus)
    return path, path.read_bytes(), begins


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_file_cut_anywhere_but_between_extensions_is_refused(
    whole_file: tuple[Path, bytes, tuple[int, ...]], data: st.DataObject
) -> None:
    path, content, begins = whole_file
    cut = data.draw(st.integers(0, len(content) - 1).filter(lambda at: at not in begins))
    spoilt = path.with_name("b.fits")
    spoilt.write_bytes(content[:cut])
    with pytest.raises(ExposureError, match=r"^b\.fits: "):
        read_exposure(spoilt)


def test_a_file_cut_between_extensions_says_what_it_lacks(whole_file: tuple[Path, bytes, tuple[int, ...]]) -> None:
    path, content, begins = whole_file
    _, image, mask, variance, psf = begins
    spoilt = path.with_name("c.fits")
    spoilt.write_bytes(content[:image])
    _refused(spoilt, "no image in the file")
    spoilt.write_bytes(content[:mask])
    assert read_exposure(spoilt).notes[0] == "no mask: all pixels taken as good"
    spoilt.write_bytes(content[:variance])
    assert read_exposure(spoilt).notes == ("no variance, no GAIN: constant, from the scatter of the image",)
    spoilt.write_bytes(content[:psf])
    assert read_exposure(spoilt).psf is None


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_spoilt_bytes_give_an_exposure_or_an_exposure_error(
    whole_file: tuple[Path, bytes, tuple[int, ...]], data: st.DataObject
) -> None:
    path, content, begins = whole_file
    start = data.draw(st.sampled_from(begins))
    at = data.draw(st.integers(start, start + FITS_BLOCK - 1))  # headers are where a wrong byte does most
    spoilt = path.with_name("d.fits")
    spoilt.write_bytes(content[:at] + data.draw(st.binary(min_size=1, max_size=8)) + content[at + 1 :])
    _is_sound_or_refused(lambda: read_exposure(spoilt))


def _is_sound_or_refused(read: Callable[[], Exposure]) -> None:
    try:
        exposure = read()
    except ExposureError:
        return
    shape = exposure.image.shape
    assert exposure.mask.shape == exposure.variance.shape == shape and min(shape) >= 32
    usable = np.isfinite(exposure.image)
    assert usable.any()
    assert (exposure.variance[usable] > 0).all() and np.isfinite(exposure.variance[usable]).all()
    assert (exposure.mask[~usable] & mask_bits("NO_DATA")).all()


def test_the_number_of_interpolations_is_kept_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.fits"
    write_exposure(path, _exposure())
    assert read_exposure(path).interpolated == 0.0
    write_exposure(path, replace(_exposure(), interpolated=0.75))
    assert read_exposure(path).interpolated == 0.75
    for wrong in (-1.0, 17, "often", True):
        fits.setval(path, "NINTERP", value=wrong, extname="VARIANCE")
        _refused(path, "NINTERP must be a number in [0, 16]")


def test_grid_is_read_from_headers_alone(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.fits")
    wcs, shape = read_grid(path)
    exposure = read_exposure(path)
    assert shape == exposure.image.shape
    np.testing.assert_array_equal(wcs.all_pix2world(3.0, 4.0, 0), exposure.wcs.all_pix2world(3.0, 4.0, 0))
    with pytest.raises(ExposureError, match="no such file"):
        read_grid(tmp_path / "none.fits")
    path.write_bytes(b"no FITS")
    with pytest.raises(ExposureError, match="broken FITS file"):
        read_grid(path)

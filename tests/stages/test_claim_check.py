"""Both stores give back what was put in, keep the first writing, and refuse what is missing or broken."""

from __future__ import annotations

import os
import time
from pathlib import Path

import blosc2
import numpy as np
import pytest
from astropy.wcs import WCS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.claim_check import PLANES, ClaimCheckError, ImageStore, read_blobs, sweep_stores, write_blobs

_fixture_ok = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
_rows = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(st.binary(max_size=20), min_size=width, max_size=width), min_size=1, max_size=5)
)


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- blobs ------------------------------------------------------------------------------------------


@_fixture_ok
@given(rows=_rows, seed=st.integers(0, 2**31))
def test_blobs_come_back_by_key_in_the_order_asked_for(
    rows: list[list[bytes]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.choice(np.arange(-(2**40), 2**62, 2**57), len(rows), replace=False)
    path = tmp_path_factory.mktemp("blobs") / "deep" / "down" / "x.packets"
    write_blobs(path, keys, rows)
    order = rng.permutation(len(rows))
    assert read_blobs(path, keys[order]) == [tuple(rows[row]) for row in order]
    assert read_blobs(path, keys[:0]) == []
    assert _files(path.parent) == ["x.packets"]


def test_the_first_writer_wins(tmp_path: Path) -> None:
    path = tmp_path / "x.packets"
    write_blobs(path, np.array([1]), [(b"first",)])
    write_blobs(path, np.array([1]), [(b"second",)])
    assert read_blobs(path, np.array([1])) == [(b"first",)]


def test_equal_blobs_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_blobs(tmp_path / name, np.array([3, 1]), [(b"x", b"yy"), (b"", b"z")])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_rows_make_a_file_that_holds_no_key(tmp_path: Path) -> None:
    path = tmp_path / "x.cutouts"
    write_blobs(path, np.empty(0, dtype=np.int64), [])
    assert read_blobs(path, np.empty(0, dtype=np.int64)) == []
    with pytest.raises(ClaimCheckError, match=r"x\.cutouts does not hold 5"):
        read_blobs(path, np.array([5]))


def test_a_missing_file_key_or_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.packets"
    with pytest.raises(ClaimCheckError, match=r"x\.packets is missing"):
        read_blobs(path, np.array([1]))
    with pytest.raises(ValueError, match="2 keys for 1 rows"):
        write_blobs(path, np.array([1, 2]), [(b"a",)])
    assert _files(tmp_path) == []
    write_blobs(path, np.array([1]), [(b"a",)])
    with pytest.raises(ClaimCheckError, match=r"x\.packets does not hold 2"):
        read_blobs(path, np.array([1, 2]))


@_fixture_ok
@given(rows=_rows, data=st.data())
def test_a_blob_file_cut_anywhere_or_lengthened_is_refused(
    rows: list[list[bytes]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.packets"
    write_blobs(path, np.arange(len(rows)), rows)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:cut], whole + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(ClaimCheckError, match=r"x\.packets is (broken|not an indexed blob file)"):
            read_blobs(path, np.arange(len(rows)))


@pytest.mark.parametrize("at", range(8, 40))
def test_an_index_with_a_wrong_byte_is_refused_or_asks_for_another_key(tmp_path: Path, at: int) -> None:
    path = tmp_path / "x.packets"
    write_blobs(path, np.array([7]), [(b"abc", b"de")])
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ClaimCheckError):
        read_blobs(path, np.array([7]))


# --- images -----------------------------------------------------------------------------------------


def _wcs_text() -> str:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.cdelt = ["RA---TAN", "DEC--TAN"], [150.1, 2.2], [-5e-5, 5e-5]
    wcs.wcs.crpix, wcs.wcs.cunit = [100.0, 80.0], ["deg", "deg"]
    return wcs.to_header(relax=True).tostring(sep="\n")


@pytest.fixture
def planes() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    made = [rng.normal(size=(150, 200)).astype(np.float32) for _ in PLANES]
    made[1][3, 5] = np.inf  # an infinite variance marks a pixel that must not be used
    return made


def test_every_window_comes_back_in_all_planes_as_it_was_stored(tmp_path: Path, planes: list[np.ndarray]) -> None:
    store, psf = ImageStore(str(tmp_path)), np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3)
    science_psf = psf[:1, :1, :1, :1]
    store.write(17, 4, planes, _wcs_text(), psf, science_psf)
    stored = store.open(17, 4)
    assert stored.shape == (150, 200)
    for images, back in ((psf, stored.psf), (science_psf, stored.science_psf)):
        assert (back.dtype, back.shape) == (np.float32, images.shape)
        np.testing.assert_array_equal(back, images)
    np.testing.assert_allclose(stored.wcs.pixel_to_world_values(99, 79), (150.1, 2.2), atol=1e-9)
    for y0, y1, x0, x1 in ((0, 150, 0, 200), (0, 1, 0, 1), (120, 135, 100, 140), (149, 150, 199, 200)):
        window = stored.window(y0, y1, x0, x1)
        assert window.dtype == np.float32
        np.testing.assert_array_equal(window, [plane[y0:y1, x0:x1] for plane in planes])
    assert _files(tmp_path) == ["004.b2nd", "004.psf.npy", "004.science_psf.npy"]


def test_the_first_writing_of_an_image_stands(tmp_path: Path, planes: list[np.ndarray]) -> None:
    store, psf = ImageStore(str(tmp_path)), np.ones((1, 1, 1, 1))
    store.write(1, 0, planes, _wcs_text(), psf, 2.0 * psf)
    store.write(1, 0, [plane + 1 for plane in planes], _wcs_text(), psf, 2.0 * psf)
    np.testing.assert_array_equal(store.open(1, 0).window(0, 9, 0, 9), [plane[:9, :9] for plane in planes])


def test_a_missing_image_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ClaimCheckError, match=r"no stored image of visit 17 detector 4: 004\.b2nd is missing"):
        ImageStore(str(tmp_path)).open(17, 4)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("file", ["004.b2nd", "004.psf.npy", "004.science_psf.npy"])
def test_an_image_cut_short_is_refused_by_name(
    tmp_path: Path, planes: list[np.ndarray], file: str, kept: float
) -> None:
    store = ImageStore(str(tmp_path))
    store.write(17, 4, planes, _wcs_text(), np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)))
    path = store.path(17, 4).with_name(file)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ClaimCheckError, match="stored image of visit 17 detector 4 is broken"):
        store.open(17, 4)


def test_an_image_without_its_psf_is_refused_by_name(tmp_path: Path, planes: list[np.ndarray]) -> None:
    store = ImageStore(str(tmp_path))
    store.write(17, 4, planes, _wcs_text(), np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)))
    store.psf_path(17, 4, "psf").unlink()
    with pytest.raises(ClaimCheckError, match=r"stored image of visit 17 detector 4 is broken: .*004\.psf\.npy"):
        store.open(17, 4)


@pytest.mark.parametrize(
    ("shape", "dtype", "header"),
    [
        ((1, 150, 200), np.float32, _wcs_text()),  # would be taken for all four planes
        ((4, 150, 200), np.float64, _wcs_text()),
        ((4, 150), np.float32, _wcs_text()),
        ((4, 150, 200), np.float32, "SIMPLE  =                    T"),
        ((4, 150, 200), np.float32, 7),
        ((4, 150, 200), np.float32, None),
    ],
)
def test_a_file_that_is_no_stored_image_is_refused_by_name(
    tmp_path: Path, planes: list[np.ndarray], shape: tuple[int, ...], dtype: type, header: object
) -> None:
    store = ImageStore(str(tmp_path))
    store.write(17, 4, planes, _wcs_text(), np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)))
    other = blosc2.asarray(np.ones(shape, dtype), urlpath=str(store.path(17, 4)), mode="w")
    if header is not None:
        other.schunk.vlmeta["wcs"] = header
    del other
    with pytest.raises(ClaimCheckError, match="stored image of visit 17 detector 4 is broken"):
        store.open(17, 4)


def test_a_writing_that_fails_leaves_nothing_behind(tmp_path: Path, planes: list[np.ndarray]) -> None:
    psf = np.ones((1, 1, 3, 3))
    with pytest.raises(ValueError, match=r"planes of different shapes: \(150, 200\), \(149, 200\)"):
        ImageStore(str(tmp_path)).write(1, 0, [planes[0], planes[1][:149], *planes[2:]], _wcs_text(), psf, psf)
    with pytest.raises(ValueError, match="could not convert string to float"):
        ImageStore(str(tmp_path)).write(1, 0, [*planes[:3], np.full((150, 200), "text")], _wcs_text(), psf, psf)
    with pytest.raises(TypeError):
        write_blobs(tmp_path / "x.packets", np.array([1]), [(b"abc", "text")])  # type: ignore[list-item]
    assert _files(tmp_path) == []


# --- age ---------------------------------------------------------------------------------------------


def test_visits_that_nobody_wrote_to_for_long_leave_the_stores(tmp_path: Path) -> None:
    for name in ("images", "packets"):
        for visit in (1, 2):
            write_blobs(tmp_path / name / str(visit) / "x.packets", np.array([1]), [(b"abc",)])
    old = time.time() - 1000.0
    for name in ("images", "packets"):
        os.utime(tmp_path / name / "1", (old, old))
    (tmp_path / "images" / "unpacked.parquet").touch()
    assert sweep_stores(tmp_path, {"images": 2000.0, "packets": 2000.0, "cutouts": 1.0}) == 0
    assert sweep_stores(tmp_path, {"images": 500.0, "packets": 2000.0}) == 1
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert found == ["images/2", "images/unpacked.parquet", "packets/1", "packets/2"]

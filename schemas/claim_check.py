"""Claim check: what is too heavy for a shuffle waits in files and travels as a location.

Two stores: `ImageStore` for difference and science pixels, read by window, and indexed blob files
(`write_blobs`, `read_blobs`) for cutouts and finished packets. A file is written under a temporary
name and renamed; where it exists already it is left alone, as a second writing gives the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import blosc2
import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

PLANES = ("difference", "difference_variance", "science", "science_variance")
_PSF_NAMES = ("psf", "science_psf")
_CHUNK_PIX = 128
_BLOCK_PIX = 32  # what a window is unpacked from: of all planes, so that one reading gives them together
_MAGIC = b"NSBLOB01"
_COUNT = struct.Struct("<II")


class ClaimCheckError(OSError):
    """A claim that cannot be redeemed: the file is missing or broken."""


@dataclass(frozen=True)
class StoredExposure:
    """One exposure in the image store. Variances are infinite where a pixel must not be used.

    `psf` and `science_psf` are the PSFs of difference and science image in their cells, (cells_y, cells_x, k, k)
    float32.
    """

    wcs: WCS
    psf: np.ndarray
    science_psf: np.ndarray
    shape: tuple[int, int]
    pixels: Any

    def window(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Pixels [y0:y1, x0:x1], which must lie inside the image, of all `PLANES`; (4, y1 - y0, x1 - x0) float32."""
        return np.asarray(self.pixels[:, y0:y1, x0:x1])


@dataclass(frozen=True)
class ImageStore:
    """Chunked, compressed pixels of each (visit, detector) under `root`, and beside them the PSFs as they are."""

    root: str

    def path(self, visit: int, detector: int) -> Path:
        return Path(self.root) / str(visit) / f"{detector:03d}.b2nd"

    def psf_path(self, visit: int, detector: int, name: str) -> Path:
        return self.path(visit, detector).with_name(f"{detector:03d}.{name}.npy")

    def write(
        self,
        visit: int,
        detector: int,
        planes: Sequence[np.ndarray],
        wcs_text: str,
        psf: np.ndarray,
        science_psf: np.ndarray,
    ) -> None:
        """Write the four planes of `PLANES`, all (ny, nx) float32, with WCS header text and the PSFs of cells."""
        path = self.path(visit, detector)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        ny, nx = planes[0].shape
        if any(plane.shape != (ny, nx) for plane in planes):
            raise ValueError(f"planes of different shapes: {', '.join(str(plane.shape) for plane in planes)}")
        with _renamed_when_whole(path) as partial:
            stored = blosc2.empty(
                shape=(len(PLANES), ny, nx),
                dtype=np.float32,
                chunks=(len(PLANES), min(ny, _CHUNK_PIX), min(nx, _CHUNK_PIX)),
                blocks=(len(PLANES), min(ny, _BLOCK_PIX), min(nx, _BLOCK_PIX)),
                urlpath=str(partial),
                mode="w",
                cparams=blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=1, nthreads=1),
            )
            for y0 in range(0, ny, _CHUNK_PIX):
                stored[:, y0 : y0 + _CHUNK_PIX] = np.stack([plane[y0 : y0 + _CHUNK_PIX] for plane in planes])
            stored.schunk.vlmeta["wcs"] = wcs_text
            del stored
            for name, images in zip(_PSF_NAMES, (psf, science_psf), strict=True):
                with _renamed_when_whole(self.psf_path(visit, detector, name)) as other, other.open("wb") as stream:
                    np.save(stream, np.ascontiguousarray(images, dtype="<f4"))

    def open(self, visit: int, detector: int) -> StoredExposure:
        """Open one exposure for reading by window; ClaimCheckError when it is not there."""
        path = self.path(visit, detector)
        if not path.exists():
            raise ClaimCheckError(f"no stored image of visit {visit} detector {detector}: {path.name} is missing")
        try:
            pixels = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
            psf, science_psf = (
                np.asarray(np.load(self.psf_path(visit, detector, name), mmap_mode="r")) for name in _PSF_NAMES
            )
            if pixels.ndim != 3 or len(PLANES) != pixels.shape[0] or pixels.dtype != np.float32:
                raise ValueError(f"it holds {pixels.dtype} of shape {pixels.shape}")
            wcs = WCS(fits.Header.fromstring(pixels.schunk.vlmeta["wcs"], sep="\n"))
            if not wcs.has_celestial:
                raise ValueError("its WCS speaks of no sky")
        except (OSError, RuntimeError, KeyError, ValueError, EOFError, AttributeError, TypeError) as error:
            raise ClaimCheckError(f"stored image of visit {visit} detector {detector} is broken: {error}") from error
        return StoredExposure(wcs, psf, science_psf, (pixels.shape[1], pixels.shape[2]), pixels)


def write_blobs(path: Path, keys: np.ndarray, rows: Sequence[Sequence[bytes | memoryview]]) -> None:
    """Write an indexed blob file: for each key a fixed number of blobs.

    Parameters
    ----------
    path : Path
        Final name; nothing is done where it exists.
    keys : (n,) int64
    rows : n sequences of equally many bytes objects
    """
    if path.exists():
        return
    if len(keys) != len(rows):
        raise ValueError(f"{len(keys)} keys for {len(rows)} rows of blobs")
    width = len(rows[0]) if rows else 0
    lengths = np.array([[len(blob) for blob in row] for row in rows], dtype="<i8").reshape(len(rows), width)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _renamed_when_whole(path) as partial, partial.open("wb") as stream:
        stream.write(_MAGIC + _COUNT.pack(len(rows), width))
        stream.write(np.ascontiguousarray(keys, dtype="<i8").tobytes())
        stream.write(lengths.tobytes())
        for row in rows:
            stream.writelines(row)


class BlobFile:
    """An indexed blob file: its index is read once, its blobs when they are asked for, the file not kept open.

    Raises
    ------
    ClaimCheckError
        The file is missing or broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._stream() as stream:
            keys, self._offsets = _blob_index(stream, path.name)
        self._width = (len(self._offsets) - 1) // len(keys) if len(keys) else 0
        self._row_of = {key: row for row, key in enumerate(keys.tolist())}

    def read(self, keys: Iterable[int]) -> Iterator[tuple[bytes, ...]]:
        """The blobs of the given keys, in that order; ClaimCheckError where one is not in the file."""
        with self._stream() as stream:
            for key in keys:
                row = self._row_of.get(int(key))
                if row is None:
                    raise ClaimCheckError(f"{self.path.name} does not hold {int(key)}")
                bounds = self._offsets[row * self._width : (row + 1) * self._width + 1]
                stream.seek(int(bounds[0]))
                yield tuple(stream.read(int(length)) for length in np.diff(bounds))

    def _stream(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except FileNotFoundError as error:
            raise ClaimCheckError(f"{self.path.name} is missing") from error


def read_blobs(path: Path, keys: np.ndarray) -> list[tuple[bytes, ...]]:
    """The blobs of the given keys, in that order; ClaimCheckError where the file is missing or broken or lacks one."""
    return list(BlobFile(path).read(keys))


def _blob_index(stream: BinaryIO, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys, and where each blob begins and the last one ends; ClaimCheckError unless the file is exactly that long."""
    size = os.fstat(stream.fileno()).st_size
    head = stream.read(len(_MAGIC) + _COUNT.size)
    if len(head) != len(_MAGIC) + _COUNT.size or head[: len(_MAGIC)] != _MAGIC:
        raise ClaimCheckError(f"{name} is not an indexed blob file")
    n_rows, width = _COUNT.unpack_from(head, len(_MAGIC))
    start = len(head) + 8 * n_rows * (1 + width)
    if start > size:
        raise ClaimCheckError(f"{name} is broken: {size} bytes cannot hold {n_rows} rows of {width}")
    keys = np.frombuffer(stream.read(8 * n_rows), dtype="<i8")
    lengths = np.frombuffer(stream.read(8 * n_rows * width), dtype="<i8")
    # Each length is checked before they are summed: the sum of absurd ones may wrap around.
    if len(lengths) and not (lengths.min() >= 0 and lengths.max() <= size):
        raise ClaimCheckError(f"{name} is broken: a blob of {lengths.min()} or {lengths.max()} bytes in {size}")
    offsets = start + np.concatenate(([0], np.cumsum(lengths)))
    if offsets[-1] != size:
        raise ClaimCheckError(f"{name} is broken: {size} bytes, its index speaks of {offsets[-1]}")
    return keys, offsets


def sweep_stores(root: Path, ages_s: Mapping[str, float]) -> int:
    """Remove visits to which nothing was added for so long; how many folders that were.

    `root` holds the stores, each with a folder per visit; `ages_s`: by name of the store, the age that visits reach.
    """
    removed = 0
    for name, age_s in ages_s.items():
        limit = time.time() - age_s
        for visit in (root / name).glob("*/"):
            with contextlib.suppress(FileNotFoundError):
                if visit.stat().st_mtime < limit:
                    shutil.rmtree(visit, ignore_errors=True)
                    removed += 1
    return removed


@contextlib.contextmanager
def _renamed_when_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which it gets when the block ends well and loses when it does not."""
    partial = path.with_name(f".{os.getpid()}.{threading.get_ident()}.{path.name}")
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)

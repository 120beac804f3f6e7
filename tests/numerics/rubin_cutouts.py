"""Real diaSources of LSST's alert packets beside the project: pixels, PSFs and what LSST measured on them."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, NamedTuple

import fastavro
import numpy as np
import pyarrow.parquet as pq
from astropy.io import fits
from numpy.typing import NDArray

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "rubin_alerts"
SETS = {
    "HSC 2016-03-07": "hsc_cosmos_20160307_g_fink9.0.avro",
    "LSSTCam 2025-09-05": "lsstcam_20250905_i_fink9.0.avro",
    "LSSTCam 2025-12-31": "lsstcam_20251231_i_fink10.0.parquet",
    "LSSTCam 2026-03-05": "lsstcam_20260305_i_ddf_long_history_fink.avro",
}


class RubinSource(NamedTuple):
    """One real diaSource.

    Attributes
    ----------
    measured : LSST's diaSource record
    x, y : its place in the cutout, pixels, 0-based
    difference, variance, science, science_variance : (ny, nx) float32, nJy, NaN where masked
    psf, science_psf : (k, k), sum 1
    pixel_arcsec2 : area of a pixel
    """

    measured: dict[str, Any]
    x: float
    y: float
    difference: NDArray[np.float32]
    variance: NDArray[np.float32]
    science: NDArray[np.float32]
    science_variance: NDArray[np.float32]
    psf: NDArray[np.float64]
    science_psf: NDArray[np.float64]
    pixel_arcsec2: float


def rubin_sources(name: str) -> list[RubinSource]:
    """The sources of one set that LSST did not call a dipole."""
    path = DATA / SETS[name]
    if path.suffix == ".parquet":
        packets = pq.read_table(path, columns=["diaSource", "cutoutDifference", "cutoutScience"]).to_pylist()
    else:
        with path.open("rb") as stream:
            packets = list(fastavro.reader(stream))
    return [_source(packet) for packet in packets if not packet["diaSource"]["isDipole"]]


def _source(packet: dict[str, Any]) -> RubinSource:
    header, difference, variance, psf = _planes(packet["cutoutDifference"])
    _, science, science_variance, science_psf = _planes(packet["cutoutScience"])
    matrix = np.array([[header["PC1_1"], header["PC1_2"]], [header["PC2_1"], header["PC2_2"]]])
    # The world coordinate reference is the source itself; FITS counts pixels from 1.
    return RubinSource(
        packet["diaSource"],
        header["CRPIX1"] - 1.0,
        header["CRPIX2"] - 1.0,
        difference.astype(np.float32),
        variance.astype(np.float32),
        science.astype(np.float32),
        science_variance.astype(np.float32),
        psf.astype(np.float64),
        science_psf.astype(np.float64),
        3600.0**2 * abs(float(np.linalg.det(matrix))),
    )


def _planes(cutout: bytes) -> tuple[fits.Header, NDArray, NDArray, NDArray]:
    content = gzip.decompress(cutout) if cutout.startswith(b"\x1f\x8b") else cutout
    with fits.open(io.BytesIO(content)) as planes:
        return planes[0].header, planes[0].data, planes["UNCERT"].data, planes["PSFIMAGE"].data

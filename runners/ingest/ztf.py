"""ZTF detections as a DIA-source table: one row per detection, from the alerts and their histories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.source_tables import RADIUS_KEY
from schemas.ztf import (
    BAND_OF_FID,
    EXPOSURE_S,
    JD_RANGE,
    OBJECT_RADIUS_ARCSEC,
    midpoint_mjd_tai,
    psf_flux_err_njy,
    psf_flux_njy,
    significance,
    visit_of_pid,
)
from transforms.archiving import write_table

_COLUMNS = ("objectId", "candid", "jd", "fid", "ra", "dec", "magpsf", "sigmapsf", "isdiffpos", "rcid", "pid")


class ZtfTableError(ValueError):
    """ZTF detections that cannot be read; the message names file and reason."""


@dataclass(frozen=True)
class ZtfIngest:
    """What came of an ingest: rows and exposures written, and what was left out and why."""

    table: Path
    sources: int
    visits: int
    refused: tuple[str, ...]


def ingest_ztf_detections(source: Path, out: Path) -> ZtfIngest:
    """Write the detections of `source` (a Parquet file, or a folder with them) as a DIA-source table.

    diaSourceId is candid, visit the number of the exposure, detector the readout channel; fluxes are in
    nJy from magpsf, negative where isdiffpos is false; times go from JD UTC at the start of the
    exposure to MJD TAI at its middle. The file asks for ZTF's own gate of 1.5 arcsec.

    Raises
    ------
    ZtfTableError
        No table of detections there, or none of its rows can be used.
    """
    tables, refused = [], []
    for path in _detection_files(source):
        try:
            tables.append(_read(path))
        except ZtfTableError as error:
            refused.append(str(error))
    if not tables:
        reasons = "; ".join(refused) or "no *detections*.parquet"
        raise ZtfTableError(f"{source}: nothing to ingest: {reasons}")
    rows = pa.concat_tables(tables)
    table, n_bad = _dia_sources(rows)
    if n_bad:
        refused.append(f"{n_bad} rows without a positive error, a finite magnitude, place or time, or of unknown fid")
    if len(table) == 0:
        raise ZtfTableError(f"{source}: no usable row: {'; '.join(refused)}")
    write_table(out, table)
    return ZtfIngest(out, len(table), len(np.unique(table["visit"].to_numpy())), tuple(refused))


def _detection_files(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return
    yield from sorted(source.glob("*detections*.parquet"))


def _read(path: Path) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowInvalid) as error:
        raise ZtfTableError(f"{path.name}: not a Parquet table: {error}") from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise ZtfTableError(f"{path.name}: no column {', '.join(missing)}")
    return table.select(_COLUMNS).replace_schema_metadata(None)


def _dia_sources(rows: pa.Table) -> tuple[pa.Table, int]:
    columns = {name: rows[name].to_numpy() for name in _COLUMNS if name != "objectId"}
    magnitude, error = columns["magpsf"], columns["sigmapsf"]
    finite = np.all([np.isfinite(columns[name]) for name in ("ra", "dec", "magpsf")], axis=0)
    in_time = (columns["jd"] > JD_RANGE[0]) & (columns["jd"] < JD_RANGE[1])
    good = finite & in_time & (error > 0) & np.isin(columns["fid"], list(BAND_OF_FID))
    columns = {name: values[good] for name, values in columns.items()}
    magnitude, error = magnitude[good], error[good]
    flux = psf_flux_njy(magnitude, columns["isdiffpos"])
    flux_err = psf_flux_err_njy(magnitude, error)
    midpoint = midpoint_mjd_tai(columns["jd"], EXPOSURE_S)
    visit = visit_of_pid(columns["pid"])
    table = pa.table(
        {
            "diaSourceId": pa.array(columns["candid"], pa.int64()),
            "visit": pa.array(visit, pa.int64()),
            "detector": pa.array(columns["rcid"], pa.int32()),
            "band": pa.array([BAND_OF_FID[fid] for fid in columns["fid"]], pa.string()),
            "midpointMjdTai": pa.array(_one_time_per_visit(visit, midpoint), pa.float64()),
            "ra": pa.array(columns["ra"] % 360.0, pa.float64()),
            "dec": pa.array(columns["dec"], pa.float64()),
            "psfFlux": pa.array(flux.astype(np.float32), pa.float32()),
            "psfFluxErr": pa.array(flux_err.astype(np.float32), pa.float32()),
            "snr": pa.array(significance(error).astype(np.float32), pa.float32()),
            "isNegative": pa.array(~columns["isdiffpos"].astype(bool), pa.bool_()),
            "exposureTime": pa.array(np.full(len(visit), EXPOSURE_S, dtype=np.float32), pa.float32()),
        },
        metadata={RADIUS_KEY: str(OBJECT_RADIUS_ARCSEC).encode()},
    )
    return table, int(np.count_nonzero(~good))


def _one_time_per_visit(visit: np.ndarray, midpoint: np.ndarray) -> np.ndarray:
    """The earliest midpoint of each visit: old and new packets round the same exposure's JD differently."""
    _, group = np.unique(visit, return_inverse=True)
    earliest = np.full(group.max(initial=-1) + 1, np.inf)
    np.minimum.at(earliest, group, midpoint)
    return earliest[group]

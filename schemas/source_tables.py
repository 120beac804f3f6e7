"""DIA-source tables: the public form of joint 1, and where `nightstream associate` begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.manifests import BANDS, Manifest, ManifestError, ManifestProblem, Visit, visit_without_images
from schemas.records import DIA_SOURCE, records_from_arrow, take_records

REQUIRED_COLUMNS = (
    "diaSourceId",
    "visit",
    "detector",
    "band",
    "midpointMjdTai",
    "ra",
    "dec",
    "psfFlux",
    "psfFluxErr",
    "snr",
)
RADIUS_KEY = b"association_radius_arcsec"


@dataclass(frozen=True)
class SourceTable:
    """Sources fit to be associated, and what in the table is not.

    Attributes
    ----------
    records : DIA_SOURCE in order of (midpoint, visit, detector, diaSourceId)
    manifest : the visits the table speaks of; their detectors have no images
    """

    records: np.ndarray
    manifest: Manifest


def read_source_table(path: Path) -> SourceTable:
    """Read a DIA-source table.

    Optional columns that are missing are null (required integers 0, x and y NaN); without
    timeProcessedMjdTai the visit's midpoint stands in. Rows that cannot be used become one problem per
    visit and reason, the rest goes on.

    Raises
    ------
    ManifestError
        No Parquet file, a required column is missing or of a wrong type.
    """
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowInvalid) as error:
        raise ManifestError(f"{path}: not a Parquet table: {error}") from error
    missing = [name for name in REQUIRED_COLUMNS if name not in table.column_names]
    if missing:
        raise ManifestError(f"{path}: no column {', '.join(missing)}; required are {', '.join(REQUIRED_COLUMNS)}")
    null = np.zeros(len(table), dtype=bool)
    for name in ("diaSourceId", "visit", "detector", "midpointMjdTai", "ra", "dec"):
        null |= pc.is_null(table[name]).to_numpy()
    table = table.filter(pa.array(~null))
    try:
        records = records_from_arrow(table.replace_schema_metadata(None), DIA_SOURCE)
    except ValueError as error:
        raise ManifestError(f"{path}: {error}") from error
    untimed = ~np.isfinite(records["timeProcessedMjdTai"])
    records["timeProcessedMjdTai"][untimed] = records["midpointMjdTai"][untimed]
    order = np.lexsort((records["diaSourceId"], records["detector"], records["visit"], records["midpointMjdTai"]))
    records = take_records(records, order)
    kept, problems = _usable(records)
    if null.any():
        lost = f"{null.sum()} diaSources"
        problems.append(ManifestProblem(0, None, None, "NullKey", "no id, visit, detector, time or place", lost))
    records = take_records(records, kept)
    return SourceTable(records, Manifest(_visits(records), tuple(problems)))


def _usable(records: np.ndarray) -> tuple[np.ndarray, list[ManifestProblem]]:
    first = np.zeros(len(records), dtype=bool)
    first[np.unique(records["diaSourceId"], return_index=True)[1]] = True
    _, visit_row, visit_of = np.unique(records["visit"], return_index=True, return_inverse=True)
    rules = {
        "diaSourceId occurs twice": ~first,
        "unknown band": ~np.isin(records["band"], [band.encode() for band in BANDS]),
        "no finite position": ~(np.isfinite(records["ra"]) & np.isfinite(records["dec"])),
        "declination outside [-90, 90]": np.abs(records["dec"]) > 90.0,
        "no finite time": ~np.isfinite(records["midpointMjdTai"]),
        "another time than its visit": records["midpointMjdTai"] != records["midpointMjdTai"][visit_row][visit_of],
        "another band than its visit": records["band"] != records["band"][visit_row][visit_of],
    }
    kept = np.ones(len(records), dtype=bool)
    problems = []
    for reason, wrong in rules.items():
        dropped = kept & wrong
        for visit, count in zip(*np.unique(records["visit"][dropped], return_counts=True), strict=True):
            lost = f"{count} diaSources"
            problems.append(ManifestProblem(0, int(visit), None, "UnusableSource", reason, lost))
        kept &= ~wrong
    return kept, problems


def _visits(records: np.ndarray) -> tuple[Visit, ...]:
    visits = []
    order = np.argsort(records["visit"], kind="stable")
    boundaries = np.flatnonzero(np.diff(records["visit"][order])) + 1
    for rows in np.split(order, boundaries) if len(order) else ():
        first = records[rows[0]]
        exposure_time = float(first["exposureTime"])
        visits.append(
            visit_without_images(
                int(first["visit"]),
                float(first["midpointMjdTai"]),
                first["band"].decode(),
                np.unique(records["detector"][rows]).tolist(),
                source="catalogue",
                exposure_time_s=exposure_time if math.isfinite(exposure_time) else 0.0,
                readout_end_mjd_tai=float(first["timeProcessedMjdTai"]),
            )
        )
    return tuple(sorted(visits, key=lambda visit: (visit.midpoint_mjd_tai, visit.visit)))


def read_table_visits(path: Path) -> Manifest:
    """The visits that a DIA-source table speaks of; ManifestError as `read_source_table`."""
    return read_source_table(path).manifest


def table_radius_arcsec(path: Path) -> float | None:
    """The gate that a table asks for in its metadata; ManifestError if it is no table or no number."""
    try:
        metadata = pq.ParquetFile(path).schema_arrow.metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise ManifestError(f"{path}: not a Parquet table: {error}") from error
    if RADIUS_KEY not in metadata:
        return None
    try:
        return float(metadata[RADIUS_KEY])
    except ValueError as error:
        raise ManifestError(f"{path}: {RADIUS_KEY.decode()} in its metadata: {error}") from error

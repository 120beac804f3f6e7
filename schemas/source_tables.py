"""DIA-source tables: the public form of joint 1, and where `nightstream associate` begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.manifests import BANDS, DetectorImages, Manifest, ManifestError, ManifestProblem, Visit
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
_MJD_EPOCH = date(1858, 11, 17)
_HALF_DAY = 0.5


@dataclass(frozen=True)
class SourceTable:
    """Sources fit to be associated, and what in the table is not.

    Attributes
    ----------
    records : DIA_SOURCE in order of (midpoint, visit, detector, diaSourceId)
    manifest : the visits the table speaks of; their detectors have no images
    radius_arcsec : the gate the table asks for in its metadata, or None
    """

    records: np.ndarray
    manifest: Manifest
    radius_arcsec: float | None


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
    metadata = table.schema.metadata or {}
    radius = float(metadata[RADIUS_KEY]) if RADIUS_KEY in metadata else None
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
        reason = f"{null.sum()} rows without id, visit, time or place"
        problems.append(ManifestProblem(0, None, None, "NullKey", reason))
    records = take_records(records, kept)
    return SourceTable(records, Manifest(_visits(records), tuple(problems)), radius)


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
            problems.append(ManifestProblem(0, int(visit), None, "UnusableSource", f"{count} sources: {reason}"))
        kept &= ~wrong
    return kept, problems


def _visits(records: np.ndarray) -> tuple[Visit, ...]:
    visits = []
    for visit in np.unique(records["visit"]):
        rows = records[records["visit"] == visit]
        midpoint = float(rows["midpointMjdTai"][0])
        exposure_time = float(rows["exposureTime"][0])
        detectors = tuple(DetectorImages(int(one), "", None) for one in np.unique(rows["detector"]))
        visits.append(
            Visit(
                visit=int(visit),
                day_obs=day_obs_of(midpoint),
                seq_num=0,
                instrument="catalogue",
                band=rows["band"][0].decode(),
                midpoint_mjd_tai=midpoint,
                exposure_time_s=exposure_time if math.isfinite(exposure_time) else 0.0,
                readout_end_mjd_tai=float(rows["timeProcessedMjdTai"][0]),
                boresight_ra_deg=0.0,
                boresight_dec_deg=0.0,
                rotation_deg=0.0,
                observation_reason=None,
                target_name=None,
                detectors=detectors,
            )
        )
    return tuple(sorted(visits, key=lambda visit: (visit.midpoint_mjd_tai, visit.visit)))


def day_obs_of(mjd: float) -> int:
    """YYYYMMDD of the observing day: the calendar date twelve hours earlier."""
    day = _MJD_EPOCH + timedelta(days=math.floor(mjd - _HALF_DAY))
    return day.year * 10000 + day.month * 100 + day.day

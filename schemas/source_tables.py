"""DIA-source tables: the public form of joint 1, and where `nightstream associate` begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.manifests import (
    BANDS,
    SURVEY_MJD_RANGE,
    Manifest,
    ManifestError,
    ManifestProblem,
    Visit,
    visit_without_images,
)
from schemas.records import DIA_SOURCE, RecordLayoutError, records_from_arrow, take_records

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

# What must be known of a row before it can be called one of a visit.
_KEY_TYPES = {
    "diaSourceId": pa.int64(),
    "visit": pa.int64(),
    "detector": pa.int64(),
    "band": pa.string(),
    "midpointMjdTai": pa.float64(),
    "ra": pa.float64(),
    "dec": pa.float64(),
}
_MAX_DETECTOR = 2**31 - 1
_FULL_CIRCLE_DEG = 360.0
_MOST_AT_ONE_PLACE = 100  # more sources of one visit are at no place: 0, 0, say, stands where it is not known


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
    timeProcessedMjdTai the visit's midpoint stands in. Which objects the sources belong to is for
    association to say: diaObjectId is not read. Rows that cannot be used become one problem per visit
    and reason, the rest goes on. Of the times and bands given for one visit those of most rows stand. The
    order of rows has no effect.

    Raises
    ------
    ManifestError
        No Parquet file, a required column is missing or of a wrong type.
    """
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(f"{path}: not a Parquet table: {error}") from error
    missing = [name for name in REQUIRED_COLUMNS if name not in table.column_names]
    if missing:
        raise ManifestError(f"{path}: no column {', '.join(missing)}; required are {', '.join(REQUIRED_COLUMNS)}")
    try:
        usable, problems = _typed_rows(table.replace_schema_metadata(None))
        records = records_from_arrow(usable, DIA_SOURCE)
    except (ValueError, pa.ArrowException) as error:
        raise ManifestError(f"{path}: {error}") from error
    records["diaObjectId"] = 0
    records["ra"] %= _FULL_CIRCLE_DEG
    records["ra"][records["ra"] == _FULL_CIRCLE_DEG] = 0.0  # what a place just west of 0 is rounded to
    untimed = ~np.isfinite(records["timeProcessedMjdTai"])
    records["timeProcessedMjdTai"][untimed] = records["midpointMjdTai"][untimed]
    records = _in_order(records)
    kept, more = _usable(records)
    records = take_records(records, kept)
    return SourceTable(records, Manifest(_visits(records), (*problems, *more)))


def _typed_rows(table: pa.Table) -> tuple[pa.Table, list[ManifestProblem]]:
    """The rows whose keys are there and within what records, days and the sky can hold, and why the others are not."""
    if len(set(table.column_names)) < len(table.column_names):
        raise RecordLayoutError("the table has two columns of one name")
    columns = {name: _as_keys(table, name, kind) for name, kind in _KEY_TYPES.items()}
    null = np.zeros(len(table), dtype=bool)
    for column in columns.values():
        null |= column.is_null().to_numpy(zero_copy_only=False)
    keys = {
        name: column.fill_null(0).to_numpy()
        for name, column in columns.items()
        if not pa.types.is_string(_KEY_TYPES[name])
    }
    known_bands = pc.is_in(columns["band"], value_set=pa.array(BANDS)).to_numpy(zero_copy_only=False)
    ra, dec, midpoint = keys["ra"], keys["dec"], keys["midpointMjdTai"]
    first_mjd, last_mjd = SURVEY_MJD_RANGE
    rules = {
        "no id, visit, detector, band, time or place": null,
        "visit is not positive": keys["visit"] < 1,
        "diaSourceId is not positive": keys["diaSourceId"] < 1,
        "detector outside [0, 2147483647]": (keys["detector"] < 0) | (keys["detector"] > _MAX_DETECTOR),
        f"unknown band, expected one of {', '.join(BANDS)}": ~known_bands,
        "no finite position": ~(np.isfinite(ra) & np.isfinite(dec)),
        "right ascension outside [-180, 360]": (ra < -180.0) | (ra > _FULL_CIRCLE_DEG),
        "declination outside [-90, 90]": np.abs(dec) > 90.0,
        f"midpointMjdTai outside [{first_mjd:.0f}, {last_mjd:.0f}]": ~(
            (midpoint >= first_mjd) & (midpoint <= last_mjd)
        ),
    }
    kept, problems = _checked(keys["visit"], rules)
    return table.filter(pa.array(kept)), problems


def _as_keys(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    column = table[name]
    whole, held = pa.types.is_integer(kind), column.type
    if whole and not (pa.types.is_integer(held) or pa.types.is_null(held)):
        raise RecordLayoutError(f"{name} holds {held} but must hold whole numbers")
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RecordLayoutError(f"{name}: {held} does not fit {kind}: {error}") from error


def _in_order(records: np.ndarray) -> np.ndarray:
    """Records by (midpoint, visit, detector, diaSourceId) and, of equal keys, by content."""
    if len(np.unique(records["diaSourceId"])) < len(records):
        records = take_records(records, np.argsort(records.view(f"V{records.dtype.itemsize}"), kind="stable"))
    keys = (records["diaSourceId"], records["detector"], records["visit"], records["midpointMjdTai"])
    return take_records(records, np.lexsort(keys))


def _usable(records: np.ndarray) -> tuple[np.ndarray, list[ManifestProblem]]:
    """Which records fit together: one time and band a visit, each id once."""
    unlike_visit = np.zeros(len(records), dtype=bool)
    exposure = records[["midpointMjdTai", "band"]]
    for rows in _rows_of_visits(records):
        values, which, counts = np.unique(exposure[rows], return_inverse=True, return_counts=True)
        if len(values) > 1:
            unlike_visit[rows] = which.ravel() != np.argmax(counts)
    first = np.zeros(len(records), dtype=bool)
    agreeing = np.flatnonzero(~unlike_visit)
    first[agreeing[np.unique(records["diaSourceId"][agreeing], return_index=True)[1]]] = True
    rules = {
        "another time or band than most of its visit": unlike_visit,
        "diaSourceId occurs twice": ~first,
        f"at one place with more than {_MOST_AT_ONE_PLACE} sources of its visit": _heaped(records),
    }
    return _checked(records["visit"], rules)


def _heaped(records: np.ndarray) -> np.ndarray:
    """Which records share a place, to the bit, with too many others of their visit."""
    place = records["dec"], records["ra"], records["visit"]
    order = np.lexsort(place)
    starts = np.ones(len(records), dtype=bool)
    starts[1:] = np.any([np.diff(values[order]) != 0 for values in place], axis=0)
    heap = np.cumsum(starts) - 1
    heaped = np.empty(len(records), dtype=bool)
    heaped[order] = np.bincount(heap)[heap] > _MOST_AT_ONE_PLACE
    return heaped


def _checked(visits: np.ndarray, rules: dict[str, np.ndarray]) -> tuple[np.ndarray, list[ManifestProblem]]:
    """Which rows break no rule, and a problem per visit and rule, each row counted under the first it breaks."""
    kept = np.ones(len(visits), dtype=bool)
    problems = []
    visits = np.maximum(visits, 0)
    for reason, wrong in rules.items():
        dropped = kept & wrong
        for visit, count in zip(*np.unique(visits[dropped], return_counts=True), strict=True):
            lost = f"{count} diaSources"
            problems.append(ManifestProblem(0, int(visit) or None, None, "UnusableSource", reason, lost))
        kept &= ~wrong
    return kept, problems


def _rows_of_visits(records: np.ndarray) -> list[np.ndarray]:
    """The rows of each visit, in order of its number."""
    if len(records) == 0:
        return []
    order = np.argsort(records["visit"], kind="stable")
    return np.split(order, np.flatnonzero(np.diff(records["visit"][order])) + 1)


def _visits(records: np.ndarray) -> tuple[Visit, ...]:
    visits = []
    for rows in _rows_of_visits(records):
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
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(f"{path}: not a Parquet table: {error}") from error
    if RADIUS_KEY not in metadata:
        return None
    try:
        return float(metadata[RADIUS_KEY])
    except ValueError as error:
        raise ManifestError(f"{path}: {RADIUS_KEY.decode()} in its metadata: {error}") from error

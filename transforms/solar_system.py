"""AssociateSsObjects: known moving objects at the places where the ephemerides put them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from pydantic.dataclasses import dataclass

from schemas.elements import DetectedSources, StageElement
from schemas.records import SS_SOURCE, empty_records
from transforms.failures import FAILED, StageFn, failed_in, failure_of
from transforms.numerics.solar_system_matching import (
    ephemeris_offsets,
    interpolate_ephemerides,
    match_one_to_one,
    sky_coordinates,
)

STAGE = "solar_system"
_REQUIRED = {
    "ssObjectId": pa.types.is_integer,
    "mjd_tai": pa.types.is_floating,
    "ra": pa.types.is_floating,
    "dec": pa.types.is_floating,
}


class EphemeridesError(ValueError):
    """An ephemeris table that cannot be used; the message says why."""


@dataclass(frozen=True)
class SolarSystemConfig:
    """How sources are tied to ephemerides."""

    radius_arcsec: float = Field(default=1.0, gt=0, le=30)


class SolarSystemResult(NamedTuple):
    """`good`: DetectedSources; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class AssociateSsObjects(beam.PTransform):
    """Give sources that lie at an ephemeris their ssObjectId and ssSource record.

    Input and output `good`: DetectedSources; `failed`: exposures whose ephemerides could not be
    computed (their sources go on without). The ephemerides are loaded once per worker. Order: as it
    comes; a duplicate gives the same. No state.
    """

    def __init__(self, config: SolarSystemConfig, ephemerides: str | None) -> None:
        super().__init__()
        self.config = config
        self.ephemerides = ephemerides

    def expand(self, detected: beam.PCollection) -> SolarSystemResult:
        outputs = detected | "MatchEphemerides" >> beam.ParDo(
            _MatchEphemeridesFn(self.config, self.ephemerides)
        ).with_output_types(StageElement).with_outputs(FAILED, main="good")
        return SolarSystemResult(outputs.good, outputs[FAILED])


class _MatchEphemeridesFn(StageFn):
    def __init__(self, config: SolarSystemConfig, ephemerides: str | None) -> None:
        self.config = config
        self.ephemerides = ephemerides

    def setup(self) -> None:
        self.table = None if self.ephemerides is None else read_ephemerides(self.ephemerides)

    def work(self, detected: DetectedSources) -> Iterator[Any]:
        started = time.perf_counter()
        if self.table is not None and len(detected.dia_sources):
            try:
                detected = associate_ss_objects(detected, self.table, self.config)
            except Exception as error:  # without ephemerides the night goes on
                exposure = detected.exposure
                lost = "solar-system association of the detector"
                failure = failure_of(error, STAGE, exposure.visit.visit, exposure.detector, lost=lost)
                yield from failed_in(exposure.visit, failure)
        detected.seconds["solar_system"] = time.perf_counter() - started
        yield detected


def read_ephemerides(path: str) -> pa.Table:
    """The ephemeris table of a night folder.

    Raises
    ------
    EphemeridesError
        The file is missing, broken, or lacks a column.
    """
    try:
        table = pq.ParquetFile(Path(path)).read()
    except (OSError, pa.ArrowInvalid) as error:
        raise EphemeridesError(f"{path}: cannot be read: {error}") from error
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise EphemeridesError(f"{path}: no column {', '.join(missing)}; there are {', '.join(table.column_names)}")
    for name, kind in _REQUIRED.items():
        column = table[name]
        if column.null_count:
            raise EphemeridesError(f"{path}: {column.null_count} rows have no {name}")
        if not kind(column.type):
            raise EphemeridesError(f"{path}: {name} is {column.type}")
    return table.set_column(table.column_names.index("ssObjectId"), "ssObjectId", table["ssObjectId"].cast(pa.int64()))


def associate_ss_objects(detected: DetectedSources, table: pa.Table, config: SolarSystemConfig) -> DetectedSources:
    """Match one exposure's sources, one to one and nearest first, with the ephemerides at its midpoint."""
    sources = detected.dia_sources.copy()
    ids = table["ssObjectId"].to_numpy()
    predicted = interpolate_ephemerides(
        ids,
        table["mjd_tai"].to_numpy(),
        table["ra"].to_numpy(),
        table["dec"].to_numpy(),
        detected.exposure.visit.midpoint_mjd_tai,
    )
    source_index, row, distance_arcsec = match_one_to_one(
        sources["ra"], sources["dec"], predicted.ra_deg, predicted.dec_deg, config.radius_arcsec
    )
    ss_sources = empty_records(SS_SOURCE, len(source_index))
    matched_ids = np.asarray(predicted.ss_object_id)[row].astype(np.int64)
    sources["ssObjectId"][source_index] = matched_ids
    if len(source_index):
        ra, dec = sources["ra"][source_index], sources["dec"][source_index]
        offsets = ephemeris_offsets(
            ra,
            dec,
            predicted.ra_deg[row],
            predicted.dec_deg[row],
            predicted.rate_ra_arcsec_per_h[row],
            predicted.rate_dec_arcsec_per_h[row],
        )
        ss_sources["diaSourceId"] = sources["diaSourceId"][source_index]
        ss_sources["ssObjectId"] = matched_ids
        coordinates = sky_coordinates(ra, dec)
        for name, values in zip(("eclLambda", "eclBeta", "galLon", "galLat"), coordinates, strict=True):
            ss_sources[name] = values
        ss_sources["ephRa"], ss_sources["ephDec"] = predicted.ra_deg[row], predicted.dec_deg[row]
        # The schema's rates are deg / day.
        to_deg_per_day = 24.0 / 3600.0
        ss_sources["ephRateRa"] = predicted.rate_ra_arcsec_per_h[row] * to_deg_per_day
        ss_sources["ephRateDec"] = predicted.rate_dec_arcsec_per_h[row] * to_deg_per_day
        ss_sources["ephRate"] = np.hypot(ss_sources["ephRateRa"], ss_sources["ephRateDec"])
        ss_sources["ephOffset"] = distance_arcsec
        ss_sources["ephOffsetRa"], ss_sources["ephOffsetDec"] = offsets.offset_ra, offsets.offset_dec
        ss_sources["ephOffsetAlongTrack"] = offsets.along_track
        ss_sources["ephOffsetCrossTrack"] = offsets.cross_track
        ss_sources["diaDistanceRank"] = 1
        _fill_names(ss_sources, table, ids, matched_ids)
    return replace(detected, dia_sources=sources, ss_sources=ss_sources)


def _fill_names(ss_sources: np.ndarray, table: pa.Table, ids: np.ndarray, matched_ids: np.ndarray) -> None:
    """Designation and magnitude, where the table has them, from each object's first row."""
    unique_ids, first = np.unique(ids, return_index=True)
    rows = first[np.searchsorted(unique_ids, matched_ids)]
    if "designation" in table.column_names:
        names = table["designation"].to_pylist()
        # Cut to what the layout holds, never inside a character.
        ss_sources["designation"] = [(names[row] or "").encode()[:32].decode(errors="ignore").encode() for row in rows]
    if "magnitude" in table.column_names:
        ss_sources["ephVmag"] = table["magnitude"].to_numpy()[rows]

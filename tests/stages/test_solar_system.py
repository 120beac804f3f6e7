"""Ephemerides: what is read, what is refused, and what sources get from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.elements import DetectedSources, SubtractedExposure
from schemas.manifests import DetectorImages, Visit
from schemas.observatories import OBSERVATORIES
from schemas.records import DIA_SOURCE, SS_SOURCE, empty_records
from transforms.solar_system import (
    EphemeridesError,
    KnownObjects,
    SolarSystemConfig,
    associate_ss_objects,
    read_ephemerides,
)

BIG_ID = 2**60 + 1
MIDPOINT = 61367.1


def _table(**changes: Any) -> pa.Table:
    columns: dict[str, Any] = {
        "ssObjectId": pa.array([BIG_ID, BIG_ID, BIG_ID + 2, BIG_ID + 2], pa.int64()),
        "designation": ["x" * 31 + "é"] * 2 + ["2026 AB"] * 2,
        "mjd_tai": [61367.0, 61367.2] * 2,
        "ra": [150.0, 150.002, 150.1, 150.1],
        "dec": [2.0, 2.0, 2.1, 2.102],
        "magnitude": [20.0, 20.0, 21.0, 21.0],
    }
    return pa.table({**columns, **changes})


def _written(tmp_path: Path, table: pa.Table) -> str:
    path = tmp_path / "ephemerides.parquet"
    pq.write_table(table, path)
    return str(path)


def _detected(ra: list[float], dec: list[float]) -> DetectedSources:
    sources = empty_records(DIA_SOURCE, len(ra))
    sources["diaSourceId"] = 1 + np.arange(len(ra))
    sources["ra"], sources["dec"] = ra, dec
    images = (DetectorImages(0, "", None),)
    visit = Visit(1, 20261122, 1, "SimCam", "r", MIDPOINT, 30.0, MIDPOINT, 150.0, 2.0, 0.0, None, None, images)
    nothing: Any = np.zeros((1, 1), dtype=np.float32)
    exposure = SubtractedExposure(
        visit, 0, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, None, {}, 0.0, ()
    )
    return DetectedSources(exposure, sources, empty_records(SS_SOURCE, 0), len(ra), {}, {})


def test_sources_at_the_interpolated_places_get_ids_beyond_2_53(tmp_path: Path) -> None:
    known = KnownObjects(read_ephemerides(_written(tmp_path, _table())), None, OBSERVATORIES["X05"])
    named = associate_ss_objects(_detected([150.001, 150.1, 150.05], [2.0, 2.101, 2.0]), known, SolarSystemConfig())
    assert named.dia_sources["ssObjectId"].tolist() == [BIG_ID, BIG_ID + 2, 0]
    assert named.ss_sources["ssObjectId"].tolist() == [BIG_ID, BIG_ID + 2]
    # Half of 0.002 deg in 0.1 d: 0.01 deg / d, times cos(dec) in right ascension.
    np.testing.assert_allclose(named.ss_sources["ephRateRa"], [0.01 * np.cos(np.radians(2.0)), 0.0], atol=1e-6)
    np.testing.assert_allclose(named.ss_sources["ephRateDec"], [0.0, 0.01], atol=1e-6)


def test_long_designation_is_cut_between_characters(tmp_path: Path) -> None:
    known = KnownObjects(read_ephemerides(_written(tmp_path, _table())), None, OBSERVATORIES["X05"])
    named = associate_ss_objects(_detected([150.001], [2.0]), known, SolarSystemConfig())
    assert named.ss_sources["designation"][0].decode() == "x" * 31


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ssObjectId": pa.array([None, BIG_ID, BIG_ID, BIG_ID], pa.int64())}, "1 rows have no ssObjectId"),
        ({"ssObjectId": ["a", "a", "b", "b"]}, "ssObjectId is string"),
        ({"ra": pa.array([None, 150.0, 150.1, 150.1], pa.float64())}, "1 rows have no ra"),
    ],
)
def test_unusable_ephemerides_are_refused_with_the_reason(tmp_path: Path, changes: Any, reason: str) -> None:
    with pytest.raises(EphemeridesError, match=reason):
        read_ephemerides(_written(tmp_path, _table(**changes)))

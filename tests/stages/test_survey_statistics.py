"""Statistics of diaObjects against those in LSST's own packets: deep-field light curves of hundreds of sources."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from survey_sources import DATA
from survey_statistics import Summary, band_columns, summaries

from schemas.records import DIA_OBJECT

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}")

LONG_HISTORIES = "lsstcam_20260305"
SETS = ("hsc", "lsstcam_20250905", "lsstcam_20251231", "lsstcam_20260222", LONG_HISTORIES, "sim_or4", "sim_or5")
SHARED = (
    "psfFluxMean",
    "psfFluxMeanErr",
    "psfFluxSigma",
    "psfFluxNdata",
    "psfFluxMin",
    "psfFluxMax",
    "psfFluxMaxSlope",
    "psfFluxErrMean",
    "scienceFluxMean",
    "scienceFluxMeanErr",
)
FORCED = ("fpFluxMean", "fpFluxMeanErr")
WHOLE = ("diaObjectId", "validityStartMjdTai", "ra", "raErr", "dec", "decErr", "ra_dec_Cov", "nDiaSources")
TIMES = ("firstDiaSourceMjdTai", "lastDiaSourceMjdTai")
# LSST adds in single precision: some forty roundings of at most 2^-24 behind a weighted mean, of which about
# sqrt(40) / sqrt(3) = 4 remain; twice that.
FLOAT_PRECISION = 8 * 2.0**-24


@pytest.fixture(scope="module")
def long_histories() -> list[Summary]:
    return list(summaries(LONG_HISTORIES))


def test_every_column_of_the_schema_is_compared() -> None:
    of_bands = {column for kind in (*SHARED, *FORCED) for column in band_columns(kind)}
    assert of_bands | set(WHOLE) | set(TIMES) == set(DIA_OBJECT.names or ())


def test_the_light_curves_are_long(long_histories: list[Summary]) -> None:
    assert len(long_histories) == 5
    assert min(len(one.rows) for one in long_histories) > 300 < min(len(one.forced) for one in long_histories)


@pytest.mark.parametrize("name", SETS)
def test_where_lsst_has_a_statistic_of_detections_ours_is_the_same_in_float_precision(name: str) -> None:
    compared: Counter[str] = Counter()
    for one in summaries(name):
        for kind in SHARED:
            column = f"{one.band}_{kind}"
            theirs = one.theirs.get(column)
            if theirs is None or theirs != theirs:
                continue
            tolerance = FLOAT_PRECISION * one.cancellation(column)
            assert one.value(column) == pytest.approx(theirs, rel=tolerance, abs=0.0), column
            compared[kind] += 1
    assert min(compared[kind] for kind in ("psfFluxMean", "psfFluxMeanErr", "psfFluxNdata", "psfFluxErrMean")) >= 2
    if name == LONG_HISTORIES:
        assert all(compared[kind] == 5 for kind in SHARED)


def test_extremes_counts_and_the_founder_s_errors_are_the_same_bits(long_histories: list[Summary]) -> None:
    exact = ("diaObjectId", "raErr", "decErr", "ra_dec_Cov", "nDiaSources")
    for one in long_histories:
        for column in (*exact, *(f"{one.band}_psfFlux{kind}" for kind in ("Ndata", "Min", "Max"))):
            assert one.value(column) == one.theirs[column], column


def test_mean_positions_agree(long_histories: list[Summary]) -> None:
    for one in long_histories:
        # A dozen roundings of an angle below 360 degrees in double precision.
        assert one.value("ra") == pytest.approx(one.theirs["ra"], abs=12 * 360.0 * 2.0**-53)
        assert one.value("dec") == pytest.approx(one.theirs["dec"], abs=12 * 360.0 * 2.0**-53)


def test_lsst_fills_the_band_of_the_visit_only_and_we_all_that_were_seen(long_histories: list[Summary]) -> None:
    n_more = 0
    for one in long_histories:
        for band in "ugrizy":
            seen = len(one.of_band(one.rows, band))
            assert one.value(f"{band}_psfFluxNdata") == seen
            assert (one.value(f"{band}_psfFluxMean") is not None) == (seen > 0)
            if band != one.band:
                assert one.theirs[f"{band}_psfFluxNdata"] == 0 and one.theirs[f"{band}_psfFluxMean"] is None
                n_more += seen > 0
    assert n_more > 10


def test_forced_means_and_first_and_last_times_are_ours_alone(long_histories: list[Summary]) -> None:
    for one in long_histories:
        for band in "ugrizy":
            points = one.of_band(one.forced, band)
            assert all(one.theirs[f"{band}_{kind}"] is None for kind in FORCED)
            usable = [
                (flux, err)
                for flux, err in zip(points["psfFlux"].tolist(), points["psfFluxErr"].tolist(), strict=True)
                if math.isfinite(flux) and err > 0
            ]
            if not usable:
                assert one.value(f"{band}_fpFluxMean") is None
                continue
            weight = math.fsum(1.0 / err**2 for _, err in usable)
            mean = math.fsum(flux / err**2 for flux, err in usable) / weight
            assert one.value(f"{band}_fpFluxMean") == np.float32(mean)
            assert one.value(f"{band}_fpFluxMeanErr") == np.float32(math.sqrt(1.0 / weight))
        assert all(one.theirs[column] is None for column in TIMES)
        times = one.rows["midpointMjdTai"]
        assert [one.value(column) for column in TIMES] == [times.min(), times.max()]


def test_lsst_dates_its_state_by_the_write_to_its_database(long_histories: list[Summary]) -> None:
    for one in long_histories:
        ours, theirs = one.value("validityStartMjdTai"), one.theirs["validityStartMjdTai"]
        assert one.rows["midpointMjdTai"].max() < ours and abs(theirs - ours) < 60.0 / 86400.0

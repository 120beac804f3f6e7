"""The statistics of a diaObject as a cell leaves them: every column, and nothing that divides by zero."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sky_samples import Cell, context, everywhere, no_images, only, sources

from schemas.records import DIA_OBJECT

FLOAT_COLUMNS = [name for name in DIA_OBJECT.names or () if DIA_OBJECT[name].kind == "f"]
NEVER_NULL = ("validityStartMjdTai", "ra", "dec", "firstDiaSourceMjdTai", "lastDiaSourceMjdTai")
DETECTIONS = (
    "psfFluxMean",
    "psfFluxMeanErr",
    "psfFluxMin",
    "psfFluxMax",
    "psfFluxErrMean",
    "scienceFluxMean",
    "scienceFluxMeanErr",
)


def seen(rows: list[dict[str, Any]], measure: Any = no_images) -> np.ndarray:
    """The object of sources at one place, an hour apart unless a row says the time (MJD)."""
    cell = Cell(measure)
    for number, row in enumerate(rows, start=1):
        told = context(number, row.pop("mjd", None), row.pop("band", "r"))
        cell.see(told, sources(told, [0.0], **row))
    assert len(cell.known.objects) == 1
    return cell.known.objects


def columns_set(told: np.ndarray) -> set[str]:
    return {name for name in FLOAT_COLUMNS if np.isfinite(told[name][0])}


def test_every_column_is_filled_once_each_band_has_two_sources_and_a_forced_point() -> None:
    rows = [{"band": band, "ra_dec_Cov": 1e-12, "psfFlux": 100.0 + n} for n, band in enumerate("ugrizy" * 2)]
    told = seen(rows, everywhere)
    assert columns_set(told) == set(FLOAT_COLUMNS)
    assert [int(told[f"{band}_psfFluxNdata"][0]) for band in "ugrizy"] == [2] * 6
    assert told["nDiaSources"] == 12
    times = [context(number)["midpoint_mjd_tai"] for number in (1, 12)]
    assert [told["firstDiaSourceMjdTai"][0], told["lastDiaSourceMjdTai"][0]] == times
    assert told["validityStartMjdTai"] == context(12)["readout_end_mjd_tai"]


def test_one_source_has_a_mean_but_no_scatter_no_slope_and_no_forced_mean() -> None:
    told = seen([{}])
    assert columns_set(told) == {*NEVER_NULL, "raErr", "decErr", *(f"r_{kind}" for kind in DETECTIONS)}
    assert told["firstDiaSourceMjdTai"] == told["lastDiaSourceMjdTai"] == context(1)["midpoint_mjd_tai"]


@pytest.mark.parametrize("error", [0.0, -3.0, np.nan, np.inf])
def test_fluxes_without_a_usable_error_have_extremes_but_no_weight(error: float) -> None:
    told = seen([{"psfFlux": 10.0, "psfFluxErr": error}, {"psfFlux": 14.0, "psfFluxErr": error}])[0]
    assert (told["r_psfFluxMin"], told["r_psfFluxMax"], told["r_psfFluxNdata"]) == (10.0, 14.0, 0)
    assert told["r_psfFluxSigma"] == pytest.approx(np.sqrt(8.0), rel=2.0**-23)
    assert np.isnan(told["r_psfFluxMean"]) and np.isnan(told["r_psfFluxMeanErr"])
    weighed = seen([{"psfFlux": 10.0, "psfFluxErr": error}, {"psfFlux": 14.0, "psfFluxErr": 2.0}])[0]
    assert (weighed["r_psfFluxMean"], weighed["r_psfFluxMeanErr"], weighed["r_psfFluxNdata"]) == (14.0, 2.0, 1)


@pytest.mark.parametrize("flux", [np.nan, np.inf, -np.inf])
def test_a_flux_that_is_no_number_counts_nowhere(flux: float) -> None:
    told = seen([{"psfFlux": flux, "scienceFlux": flux}, {"psfFlux": 14.0, "scienceFlux": 20.0}])[0]
    assert (told["r_psfFluxMin"], told["r_psfFluxMax"], told["r_psfFluxMean"]) == (14.0, 14.0, 14.0)
    assert (told["r_psfFluxNdata"], told["nDiaSources"], told["r_scienceFluxMean"]) == (1, 2, 20.0)
    assert np.isnan(told["r_psfFluxSigma"]) and np.isnan(told["r_psfFluxMaxSlope"])


def test_two_visits_at_one_time_give_no_slope_and_no_warning() -> None:
    at = context(1)["midpoint_mjd_tai"]
    told = seen([{"psfFlux": 10.0, "mjd": at}, {"psfFlux": 14.0, "mjd": at}])[0]
    assert np.isnan(told["r_psfFluxMaxSlope"]) and told["r_psfFluxNdata"] == 2
    assert told["r_psfFluxSigma"] == pytest.approx(np.sqrt(8.0), rel=2.0**-23)


def test_what_single_precision_cannot_hold_is_null() -> None:
    most = float(np.finfo(np.float32).max)
    told = seen([{"psfFlux": -most}, {"psfFlux": most}])[0]
    assert np.isnan(told["r_psfFluxSigma"]) and np.isnan(told["r_psfFluxMaxSlope"])
    assert (told["r_psfFluxMin"], told["r_psfFluxMax"], told["r_psfFluxMean"]) == (-most, most, 0.0)


# A mean of the greatest number itself may round to beyond it: half of it stays below.
least, most = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max) / 2.0
any_flux = st.one_of(st.floats(-most, most, width=32), st.sampled_from([0.0, least, most, -most, np.nan, np.inf]))
any_error = st.one_of(st.floats(-most, most, width=32), st.sampled_from([0.0, least, most, -1.0, np.nan, np.inf]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(any_flux, any_error, st.integers(0, 3), st.sampled_from("gr")), min_size=1, max_size=6))
def test_whatever_was_measured_no_statistic_is_infinite(rows: list[tuple[float, float, int, str]]) -> None:
    start = context(0)["midpoint_mjd_tai"]
    told = seen(
        [
            {"psfFlux": flux, "psfFluxErr": error, "scienceFlux": flux, "scienceFluxErr": error}
            | {"mjd": start + step * 1e-9, "band": band}
            for (flux, error, _, band), step in zip(
                rows, itertools.accumulate(step for _, _, step, _ in rows), strict=True
            )
        ]
    )
    assert not any(np.isinf(told[name][0]) for name in FLOAT_COLUMNS)
    assert np.isfinite([told[name][0] for name in NEVER_NULL]).all()
    assert told["nDiaSources"] == len(rows)
    for band in "gr":
        usable = sum(b == band and np.isfinite(f) and np.isfinite(e) and e > 0 for f, e, _, b in rows)
        assert told[f"{band}_psfFluxNdata"] == usable
        assert np.isfinite(told[f"{band}_psfFluxMean"][0]) == (usable > 0)


def test_first_and_last_times_follow_a_source_that_comes_late() -> None:
    cell = Cell()
    for number in (2, 4, 3, 1):
        cell.see(context(number), sources(context(number), [0.0]))
    (told,) = only(cell.known.objects, diaObjectId=200_001)
    assert told["firstDiaSourceMjdTai"] == context(1)["midpoint_mjd_tai"]
    assert told["lastDiaSourceMjdTai"] == context(4)["midpoint_mjd_tai"]
    assert told["nDiaSources"] == 4

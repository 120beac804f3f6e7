"""Object statistics against plain Python, and mean positions where RA and declination end."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.numerics.dia_object_statistics import (
    N_BANDS,
    LightCurves,
    _accumulate_flux,
    band_statistics,
    mean_positions,
)

Row = tuple[int, float, float, float, float, float]  # band, mjd, flux, err, science flux, science err


def light_curves(objects: list[list[Row]]) -> LightCurves:
    flat = [row for rows in objects for row in rows]
    columns = np.array(flat, dtype=np.float64).reshape(len(flat), 6).T
    offsets = np.concatenate(([0], np.cumsum([len(rows) for rows in objects]))).astype(np.int64)
    return LightCurves(offsets, columns[0].astype(np.int8), *(np.ascontiguousarray(column) for column in columns[1:]))


def weighted(rows: list[tuple[float, float]]) -> tuple[float, float, int]:
    used = [(f, e) for f, e in rows if math.isfinite(f) and math.isfinite(e) and e > 0]
    if not used:
        return math.nan, math.nan, 0
    weight = math.fsum(1.0 / e**2 for _, e in used)
    return math.fsum(f / e**2 for f, e in used) / weight, math.sqrt(1.0 / weight), len(used)


def plain_statistics(rows: list[Row], forced: list[Row], band: int) -> dict[str, float]:
    own = [row for row in rows if row[0] == band]
    fluxes = [(row[1], row[2]) for row in own if math.isfinite(row[2])]
    values = [f for _, f in fluxes]
    errors = [row[3] for row in own if math.isfinite(row[3])]
    rises = [(g - f) / (u - t) for (t, f), (u, g) in itertools.pairwise(fluxes) if u > t]
    mean, mean_err, n = weighted([(row[2], row[3]) for row in own])
    science, science_err, _ = weighted([(row[4], row[5]) for row in own])
    point, point_err, _ = weighted([(row[2], row[3]) for row in forced if row[0] == band])
    return {
        "psf_mean": mean,
        "psf_mean_err": mean_err,
        "psf_n": n,
        "psf_sigma": statistics.stdev(values) if len(values) > 1 else math.nan,
        "psf_min": min(values, default=math.nan),
        "psf_max": max(values, default=math.nan),
        "psf_max_slope": max(rises, default=math.nan),
        "psf_err_mean": math.fsum(errors) / len(errors) if errors else math.nan,
        "science_mean": science,
        "science_mean_err": science_err,
        "forced_mean": point,
        "forced_mean_err": point_err,
    }


fluxes = st.one_of(st.floats(-1e5, 1e5), st.sampled_from([math.nan, math.inf, 0.0]))
errors = st.one_of(st.floats(1.0, 1e3), st.sampled_from([math.nan, math.inf, 0.0, -5.0]))
drawn_rows = st.lists(
    st.tuples(st.integers(-1, 6), st.integers(0, 12).map(lambda n: 61000.0 + n / 4), fluxes, errors, fluxes, errors),
    min_size=0,
    max_size=12,
).map(lambda rows: sorted(rows, key=lambda row: row[1]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(drawn_rows, drawn_rows), min_size=0, max_size=4))
def test_statistics_equal_plain_python_per_object_and_band(objects: list[tuple[list[Row], list[Row]]]) -> None:
    found = band_statistics(light_curves([own for own, _ in objects]), light_curves([forced for _, forced in objects]))
    for i, (own, forced) in enumerate(objects):
        for band in range(N_BANDS):
            for key, expected in plain_statistics(own, forced, band).items():
                # 12 rows of up to 1e5 in double precision: absolute error of sums below 12 x 12 x 1e5 x 2^-53 x
                # (largest ratio of weights is inside the quotient), so 1e-7 leaves a factor above 1000.
                assert found[key][i, band] == pytest.approx(expected, rel=1e-9, abs=1e-7, nan_ok=True), key


def test_one_point_has_a_mean_but_no_scatter_and_no_slope() -> None:
    found = band_statistics(light_curves([[(2, 61000.0, 100.0, 5.0, 300.0, 6.0)]]), light_curves([[]]))
    at = {key: float(values[0, 2]) for key, values in found.items()}
    assert (at["psf_mean"], at["psf_mean_err"], at["psf_n"]) == (100.0, 5.0, 1)
    assert (at["psf_min"], at["psf_max"], at["psf_err_mean"]) == (100.0, 100.0, 5.0)
    assert (at["science_mean"], at["science_mean_err"]) == pytest.approx((300.0, 6.0), rel=4 * 2**-53)
    assert all(math.isnan(at[key]) for key in ("psf_sigma", "psf_max_slope", "forced_mean", "forced_mean_err"))
    assert found["psf_n"][0].tolist() == [0, 0, 1, 0, 0, 0]


def test_equal_times_give_no_slope() -> None:
    row = (1, 61000.0, 10.0, 1.0, 10.0, 1.0)
    found = band_statistics(light_curves([[row, (1, 61000.0, 20.0, 1.0, 10.0, 1.0)]]), light_curves([[]]))
    assert math.isnan(found["psf_max_slope"][0, 1])
    later = [row, (1, 61000.0, 20.0, 1.0, 10.0, 1.0), (1, 61000.5, 25.0, 1.0, 10.0, 1.0)]
    assert band_statistics(light_curves([later]), light_curves([[]]))["psf_max_slope"][0, 1] == 10.0


def test_slope_is_the_steepest_rise_even_when_all_fall() -> None:
    falling = [(1, 61000.0 + k, -2.0 * k**2, 1.0, 0.0, 1.0) for k in range(4)]
    assert band_statistics(light_curves([falling]), light_curves([[]]))["psf_max_slope"][0, 1] == -2.0


def test_no_objects_give_no_statistics() -> None:
    found = band_statistics(light_curves([]), light_curves([]))
    assert all(values.shape == (0, N_BANDS) for values in found.values())


def test_neighbours_in_the_table_change_no_byte() -> None:
    rng = np.random.default_rng(3)
    rows = [[(int(rng.integers(6)), 61000.0 + k, *rng.normal(100, 30, 4)) for k in range(9)] for _ in range(5)]
    together = band_statistics(light_curves(rows), light_curves(rows))
    for i, own in enumerate(rows):
        alone = band_statistics(light_curves([own]), light_curves([own]))
        assert all(alone[key][0].tobytes() == together[key][i].tobytes() for key in alone)


def test_loops_are_compiled_for_one_layout_only() -> None:
    for n in (0, 1, 2):
        band_statistics(light_curves([[(0, 61000.0, 1.0, 1.0, 1.0, 1.0)] * n]), light_curves([[]]))
    assert len(_accumulate_flux.signatures) == 1


@pytest.mark.parametrize(
    ("ra", "dec", "mean_ra", "mean_dec"),
    [
        ([10.0], [20.0], 10.0, 20.0),
        ([359.999, 0.001], [5.0, 5.0], 0.0, 5.0),
        ([359.9999, 0.0003], [-60.0, -60.0], 0.0001, -60.0),
        ([0.0, 90.0, 180.0, 270.0], [89.9999] * 4, None, 90.0),
        ([30.0, 210.0], [-89.9999, -89.9999], None, -90.0),
        ([123.0], [90.0], None, 90.0),
    ],
)
def test_mean_position_is_the_mean_direction(
    ra: list[float], dec: list[float], mean_ra: float | None, mean_dec: float
) -> None:
    found_ra, found_dec = mean_positions(np.array([0, len(ra)]), np.array(ra), np.array(dec))
    # The mean of two points on a parallel, h to both sides in RA, lies off it by h^2 / 4 sin(2 dec): h is 1e-3 deg.
    assert found_dec[0] == pytest.approx(mean_dec, abs=np.degrees(np.radians(1e-3) ** 2 / 4.0))
    if mean_ra is not None:
        assert (found_ra[0] - mean_ra + 180.0) % 360.0 - 180.0 == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("ra", [[0.0], [359.99999999999994], [1e-16], [360.0 - 1e-4, 1e-4], [360.0 - 1e-7, 1e-7]])
@pytest.mark.parametrize("dec", [-60.0, 0.0, 45.0])
def test_mean_right_ascension_is_below_360(ra: list[float], dec: float) -> None:
    # Of the symmetric pairs some have a mean of -1e-17 deg, whose remainder by 360 rounds to 360.
    found = mean_positions(np.array([0, len(ra)]), np.array(ra), np.full(len(ra), dec))[0][0]
    assert 0.0 <= found < 360.0


def test_mean_positions_of_many_objects_are_those_of_each() -> None:
    rng = np.random.default_rng(5)
    ra, dec = rng.uniform(0, 360, 40), rng.uniform(-90, 90, 40)
    offsets = np.array([0, 1, 4, 20, 40])
    together = mean_positions(offsets, ra, dec)
    for i in range(4):
        part = slice(offsets[i], offsets[i + 1])
        alone = mean_positions(np.array([0, offsets[i + 1] - offsets[i]]), ra[part], dec[part])
        assert (alone[0][0], alone[1][0]) == (together[0][i], together[1][i])

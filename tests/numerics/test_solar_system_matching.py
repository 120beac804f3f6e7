"""Ephemerides, one-to-one matching, coordinates and offsets, also across RA 0 and at the poles."""

from __future__ import annotations

import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import BarycentricMeanEcliptic, SkyCoord
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transforms.numerics.solar_system_matching import (
    ephemeris_offsets,
    interpolate_ephemerides,
    match_one_to_one,
    sky_coordinates,
)

START = 61367.0
ARCSEC = 1.0 / 3600.0
FloatArray = NDArray[np.float64]


def arc(mjd: FloatArray, inclination_deg: float, start_deg: float, rate_deg: float) -> tuple[FloatArray, FloatArray]:
    """A great circle through (0, 0), tilted, run along at a constant rate, with a diurnal wobble of 8 arcsec."""
    angle = np.radians(start_deg + rate_deg * (mjd - START) + 8.0 * ARCSEC * np.cos(2.0 * np.pi * mjd))
    tilt = np.radians(inclination_deg)
    vectors = np.cos(angle), np.sin(angle) * np.cos(tilt), np.sin(angle) * np.sin(tilt)
    return np.degrees(np.arctan2(vectors[1], vectors[0])) % 360.0, np.degrees(np.arcsin(vectors[2]))


def separation_arcsec(ra1: FloatArray, dec1: FloatArray, ra2: FloatArray, dec2: FloatArray) -> FloatArray:
    first, second = SkyCoord(ra1 * u.deg, dec1 * u.deg), SkyCoord(ra2 * u.deg, dec2 * u.deg)
    distance: FloatArray = first.separation(second).arcsec
    return distance


@pytest.mark.parametrize("inclination_deg", [0.0, 23.0, 90.0])
@pytest.mark.parametrize("start_deg", [0.0, 45.0, 89.99, 179.99, 359.99])
def test_interpolated_positions_and_rates_are_right_also_across_the_seam_and_the_pole(
    inclination_deg: float, start_deg: float
) -> None:
    rows = START + np.arange(-6, 7) / 24.0
    at = START + 0.4137 / 24.0
    ra, dec = arc(rows, inclination_deg, start_deg, 1.0)
    found = interpolate_ephemerides(np.full(rows.size, 7), rows, ra, dec, at)
    true_ra, true_dec = arc(np.array([at]), inclination_deg, start_deg, 1.0)
    # Cubic interpolation with step h is off by at most 3/128 h^4 f'''': the wobble's is 8 arcsec (2 pi)^4 and at
    # its extreme here, h 1/24 d;
    # its slope by h^3 f'''' / 24 x 2 or so (per day).
    fourth = 8.0 * (2.0 * np.pi) ** 4
    assert separation_arcsec(found.ra_deg, found.dec_deg, true_ra, true_dec)[0] < 3.0 / 128.0 * fourth / 24.0**4 * 1.1
    step = 1e-3
    around_ra, around_dec = arc(np.array([at - step, at + step]), inclination_deg, start_deg, 1.0)
    moved = ephemeris_offsets(around_ra, around_dec, *(np.repeat(c, 2) for c in (true_ra, true_dec)), [0, 0], [0, 0])
    slope_limit = fourth / 24.0**3 / 12.0 / 24.0 + 1e-4
    hours = 2.0 * step * 24.0
    assert found.rate_ra_arcsec_per_h[0] == pytest.approx(np.diff(moved.offset_ra)[0] / hours, abs=slope_limit)
    assert found.rate_dec_arcsec_per_h[0] == pytest.approx(np.diff(moved.offset_dec)[0] / hours, abs=slope_limit)


def test_a_row_at_the_time_is_returned_itself() -> None:
    rows = START + np.arange(5) / 24.0
    ra, dec = arc(rows, 23.0, 359.98, 1.0)
    for row in range(5):
        found = interpolate_ephemerides(np.zeros(5, int), rows, ra, dec, rows[row])
        # The row's unit vector there and back: 1e-15 rad of rounding.
        assert separation_arcsec(found.ra_deg, found.dec_deg, ra[row : row + 1], dec[row : row + 1])[0] < 1e-8


def test_objects_whose_rows_do_not_bracket_the_time_are_left_out() -> None:
    ids = np.array(["early", "early", "late", "late", "around", "around", "exact"])
    mjd = START + np.array([-2.0, -1.0, 1.0, 2.0, -1.0, 1.0, 0.0])
    found = interpolate_ephemerides(ids, mjd, np.full(7, 10.0), np.full(7, -5.0), START)
    assert found.ss_object_id.tolist() == ["around", "exact"]
    np.testing.assert_allclose(found.ra_deg, 10.0, atol=1e-12)
    np.testing.assert_allclose(found.dec_deg, -5.0, atol=1e-12)
    assert found.rate_ra_arcsec_per_h[0] == pytest.approx(0.0, abs=1e-9)
    assert np.isnan(found.rate_ra_arcsec_per_h[1])


def test_two_rows_give_motion_along_the_great_circle_and_its_rate() -> None:
    found = interpolate_ephemerides([1, 1], [START, START + 1.0], [359.9, 0.1], [0.0, 0.0], START + 0.5)
    assert found.ra_deg[0] == pytest.approx(0.0, abs=1e-9) or found.ra_deg[0] == pytest.approx(360.0, abs=1e-9)
    # The chord is shorter than the arc by angle^2 / 24 and the midpoint lies angle^2 / 8 inside: net + angle^2 / 12.
    assert found.rate_ra_arcsec_per_h[0] == pytest.approx(0.2 * 3600.0 / 24.0, rel=np.radians(0.2) ** 2)


def test_the_order_of_rows_and_repeated_rows_change_nothing() -> None:
    rng = np.random.default_rng(1)
    rows = np.tile(START + np.arange(-3, 4) / 24.0, 20)
    ids = np.repeat(rng.permutation(2**60 + np.arange(20)), 7)
    ra, dec = arc(rows, 40.0, 0.0, 0.3)
    ra = (ra + 18.0 * np.repeat(np.arange(20), 7)) % 360.0
    expected = interpolate_ephemerides(ids, rows, ra, dec, START + 0.01)
    assert expected.ss_object_id.tolist() == sorted(set(ids.tolist()))
    shuffled = rng.permutation(np.concatenate([np.arange(140), rng.integers(0, 140, 30)]))
    found = interpolate_ephemerides(ids[shuffled], rows[shuffled], ra[shuffled], dec[shuffled], START + 0.01)
    for column, reference in zip(found, expected, strict=True):
        assert column.tobytes() == reference.tobytes()


def test_rows_that_are_not_finite_are_ignored_and_an_empty_table_gives_nothing() -> None:
    found = interpolate_ephemerides(
        [1, 1, 1], [START - 1, START, START + 1], [5.0, np.nan, 5.0], [1.0, 1.0, 1.0], START
    )
    assert found.ra_deg[0] == pytest.approx(5.0, abs=1e-12)
    empty = interpolate_ephemerides(np.zeros(0, np.int64), [], [], [], START)
    assert {column.shape for column in empty} == {(0,)}
    with pytest.raises(ValueError, match=r"one length, got \(2,\)"):
        interpolate_ephemerides([1, 2], [START], [5.0], [1.0], START)
    with pytest.raises(ValueError, match="finite, got nan"):
        interpolate_ephemerides([1], [START], [5.0], [1.0], np.nan)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pole=st.sampled_from([0.0, 60.0, -89.9999, 90.0]))
def test_matching_agrees_with_a_plain_greedy_loop(seed: int, pole: float) -> None:
    rng = np.random.default_rng(seed)
    n, m = rng.integers(0, 25, 2)
    scale = 3.0 * ARCSEC / max(np.cos(np.radians(pole)), 1e-6)
    ra1, ra2 = rng.normal(0, min(scale, 200.0), n) % 360.0, rng.normal(0, min(scale, 200.0), m) % 360.0
    dec1 = np.clip(pole + rng.normal(0, 3.0 * ARCSEC, n), -90.0, 90.0)
    dec2 = np.clip(pole + rng.normal(0, 3.0 * ARCSEC, m), -90.0, 90.0)
    source, ephemeris, distance = match_one_to_one(ra1, dec1, ra2, dec2, 1.0)
    pairs = []
    for i in range(n):
        for j in range(m):
            gap = separation_arcsec(ra1[i : i + 1], dec1[i : i + 1], ra2[j : j + 1], dec2[j : j + 1])[0]
            if gap <= 1.0:
                pairs.append((gap, i, j))
    taken: dict[int, tuple[int, float]] = {}
    for gap, i, j in sorted(pairs):
        if i not in taken and j not in {partner for partner, _ in taken.values()}:
            taken[i] = (j, gap)
    assert source.tolist() == sorted(taken)
    assert ephemeris.tolist() == [taken[i][0] for i in sorted(taken)]
    # Two formulas for one angle: 1e-16 rad of rounding each, and the sine's loss for coordinates of 360 degrees.
    np.testing.assert_allclose(distance, [taken[i][1] for i in sorted(taken)], atol=1e-8)


def test_ties_go_to_the_lower_index_and_each_member_is_used_once() -> None:
    source, ephemeris, distance = match_one_to_one([10.0, 10.0], [0.0, 0.0], [10.0, 10.0, 10.0], [0.0, 0.0, 0.0])
    assert (source.tolist(), ephemeris.tolist(), distance.tolist()) == ([0, 1], [0, 1], [0.0, 0.0])


def test_the_radius_is_inclusive_to_rounding_and_nan_never_matches() -> None:
    ra, dec = [10.0, np.nan, 20.0], [0.0, 0.0, np.nan]
    assert match_one_to_one(ra, dec, [10.0], [0.999 * ARCSEC])[0].tolist() == [0]
    assert match_one_to_one(ra, dec, [10.0], [1.001 * ARCSEC])[0].size == 0
    assert match_one_to_one(ra, dec, [np.nan], [0.0])[0].size == 0
    assert match_one_to_one([], [], [10.0], [0.0])[1].size == 0
    for radius in (0.0, -1.0, np.nan, 4000.0):
        with pytest.raises(ValueError, match="radius_arcsec"):
            match_one_to_one(ra, dec, [10.0], [0.0], radius)
    with pytest.raises(ValueError, match="source columns"):
        match_one_to_one([1.0, 2.0], [1.0], [10.0], [0.0])


def test_ecliptic_and_galactic_coordinates_agree_with_astropy() -> None:
    rng = np.random.default_rng(2)
    ra = np.concatenate([rng.uniform(0.0, 360.0, 2000), [0.0, 0.0, 270.0, 192.85948, 266.4]])
    dec = np.concatenate([np.degrees(np.arcsin(rng.uniform(-1, 1, 2000))), [90.0, -90.0, 66.56, 27.12825, -28.94]])
    ecl_lambda, ecl_beta, gal_lon, gal_lat = sky_coordinates(ra, dec)
    sky = SkyCoord(ra * u.deg, dec * u.deg)
    ecliptic, galactic = sky.transform_to(BarycentricMeanEcliptic(equinox="J2000")), sky.galactic
    # Obliquity: 84381.448 (IAU 1976, ours) against 84381.406 (IAU 2006) arcsec; equator and equinox of J2000 against
    # the ICRS: 17 and 7 mas in the pole, 15 mas in the origin. Galactic: the rounding of pole and node to 5 decimals.
    frame_bias = np.sqrt(0.017**2 + 0.007**2 + 0.015**2)
    assert separation_arcsec(ecl_lambda, ecl_beta, ecliptic.lon.deg, ecliptic.lat.deg).max() < 0.042 + frame_bias
    assert separation_arcsec(gal_lon, gal_lat, galactic.l.deg, galactic.b.deg).max() < 1e-5 * 3600.0
    for longitude in (ecl_lambda, gal_lon):
        assert ((longitude >= 0.0) & (longitude < 360.0)).all()


def test_coordinates_of_nan_are_nan() -> None:
    assert np.isnan(np.stack(sky_coordinates([np.nan, 1.0], [1.0, np.nan]))).all()


@pytest.mark.parametrize("dec", [0.0, -60.0, 89.0])
@pytest.mark.parametrize("ra", [0.0, 123.0, 359.99999])
def test_offsets_have_cos_dec_and_split_along_the_track(ra: float, dec: float) -> None:
    d_east, d_north = 0.3, -0.4
    source_ra = ra + d_east * ARCSEC / np.cos(np.radians(dec))
    found = ephemeris_offsets([source_ra], [dec + d_north * ARCSEC], [ra], [dec], [3.0], [4.0])
    # Flat-sky arithmetic is off by offset^2 tan(dec) / 2 (1e-4 arcsec per arcsec^2 at dec 89) plus rounding at 1e-9.
    curvature = 0.25 * np.tan(np.radians(abs(dec))) / 206265.0 + 1e-8
    assert found.offset_ra[0] == pytest.approx(d_east, abs=curvature)
    assert found.offset_dec[0] == pytest.approx(d_north, abs=curvature)
    assert found.offset[0] == pytest.approx(0.5, abs=curvature)
    # Motion towards (0.6, 0.8): along = 0.3 * 0.6 - 0.4 * 0.8; across, to the left of it: -0.4 * 0.6 - 0.3 * 0.8.
    assert found.along_track[0] == pytest.approx(-0.14, abs=curvature)
    assert found.cross_track[0] == pytest.approx(-0.48, abs=curvature)


def test_without_motion_there_is_no_track_and_without_position_no_offset() -> None:
    found = ephemeris_offsets(
        [10.0, 10.0, np.nan], [5.0, 5.0, 5.0], [10.0] * 3, [5.0] * 3, [0.0, np.nan, 1.0], [0.0] * 3
    )
    assert found.offset[:2].tolist() == [0.0, 0.0]
    assert found.offset_ra[:2].tolist() == [0.0, 0.0]
    assert np.isnan(found.along_track).all()
    assert np.isnan(found.cross_track).all()
    assert np.isnan([found.offset[2], found.offset_ra[2], found.offset_dec[2]]).all()

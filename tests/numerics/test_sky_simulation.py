"""The simulated sky: positions, motions and fluxes are what they are said to be, to derived tolerances."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from sky_configs import EMPTY, EPOCH, FULL

from transforms.numerics import sky_simulation as sim


def _angle_arcsec(ra: np.ndarray, dec: np.ndarray, ra0: np.ndarray, dec0: np.ndarray) -> np.ndarray:
    """Haversine: exact for tiny angles."""
    ra, dec, ra0, dec0 = (np.deg2rad(value) for value in (ra, dec, ra0, dec0))
    half = np.sin((dec - dec0) / 2) ** 2 + np.cos(dec) * np.cos(dec0) * np.sin((ra - ra0) / 2) ** 2
    return 2 * np.arcsin(np.sqrt(half)) * sim.ARCSEC_PER_RADIAN


def test_streams_of_another_purpose_or_key_are_independent_and_negative_keys_refused() -> None:
    draws = [
        sim.random_stream(*key).random(4).tobytes()
        for key in ((1, sim.Purpose.SKY), (2, sim.Purpose.SKY), (1, sim.Purpose.PSF), (1, sim.Purpose.PSF, 7))
    ]
    assert len(set(draws)) == 4
    assert sim.random_stream(1, sim.Purpose.SKY).random(4).tobytes() == draws[0]
    with pytest.raises(sim.SimulationError, match="must not be negative"):
        sim.random_stream(-1, sim.Purpose.SKY)


# --- the sky


def test_transients_are_dark_before_their_onset_and_change_slowly() -> None:
    sky = sim.draw_sky(5, replace(FULL, transients_per_arcmin2=40.0))
    early, late = (sim.transient_flux_njy(sky, "r", mjd) for mjd in (EPOCH - 0.01, EPOCH + 0.5 / 24))
    appeared = (early == 0) & (late > 0)
    assert 0 < appeared.sum() < early.size
    assert np.all(late > 0)
    np.testing.assert_allclose(late[~appeared], early[~appeared], rtol=0.011)  # 0.031 d over at least 3 d


def test_about_a_third_of_the_transients_lie_off_the_nuclei_of_galaxies() -> None:
    sky = sim.draw_sky(5, replace(FULL, transients_per_arcmin2=40.0))
    hosted = sky.transients.host >= 0
    assert 0.2 < hosted.mean() < 0.45
    galaxies, host = sky.galaxies, sky.transients.host[hosted]
    distance = _angle_arcsec(
        sky.transients.ra_deg[hosted], sky.transients.dec_deg[hosted], galaxies.ra_deg[host], galaxies.dec_deg[host]
    )
    relative = distance / galaxies.half_light_arcsec[host]
    assert relative.max() <= 3.0001 and np.median(relative) > 0.5


def test_variables_go_up_and_down_and_never_below_no_flux() -> None:
    sky = sim.draw_sky(5, replace(FULL, variables_per_arcmin2=20.0))
    star = sky.variables.star
    mean = sim.flux_njy_from_magnitude(sim.band_magnitude(sky.stars.magnitude_r[star], sky.stars.g_minus_r[star], "g"))
    times = EPOCH + np.linspace(0, 6, 200)
    change = np.array([sim.variable_flux_change_njy(sky, "g", mjd) for mjd in times])
    assert np.all(change.min(axis=0) < 0) and np.all(change.max(axis=0) > 0)
    assert np.all(mean + change > 0)


def test_injected_sources_are_kept_apart() -> None:
    sky = sim.draw_sky(5, replace(FULL, transients_per_arcmin2=40.0))
    ra = np.concatenate([sky.transients.ra_deg, sky.stars.ra_deg[sky.variables.star]])
    dec = np.concatenate([sky.transients.dec_deg, sky.stars.dec_deg[sky.variables.star]])
    distance = _angle_arcsec(ra[:, None], dec[:, None], ra[None, :], dec[None, :])
    assert distance[~np.eye(ra.size, dtype=bool)].min() >= 5.0 * (1 - 1e-6)


# --- things that move


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), hours=st.floats(-12, 12), dec=st.floats(-85, 85))
def test_movers_keep_their_rate_along_a_great_circle(seed: int, hours: float, dec: float) -> None:
    config = replace(FULL, dec_deg=dec)
    asteroids = sim.draw_asteroids(seed, config, 20261122, EPOCH)
    ra0, dec0 = asteroids.sky_position(EPOCH)
    ra1, dec1 = asteroids.sky_position(EPOCH + hours / 24)
    # Times near 6e4 days are kept to 7e-12 d = 6e-7 s; positions to 1e-16 rad of arcsin at |dec| <= 85 deg.
    expected = asteroids.rate_arcsec_per_h * abs(hours)
    np.testing.assert_allclose(_angle_arcsec(ra1, dec1, ra0, dec0), expected, atol=1e-6)
    assert asteroids.rate_arcsec_per_h.min() >= 20 and asteroids.rate_arcsec_per_h.max() <= 60
    east, north = asteroids.sky_rates(EPOCH + hours / 24)
    np.testing.assert_allclose(np.hypot(east, north), asteroids.rate_arcsec_per_h, rtol=1e-9)


def test_sky_rates_are_the_derivatives_of_the_position() -> None:
    asteroids = sim.draw_asteroids(5, replace(FULL, dec_deg=60.0), 20261122, EPOCH)
    step_h = 0.5
    (ra0, dec0), (ra1, dec1) = (asteroids.sky_position(EPOCH + sign * step_h / 24) for sign in (-1, 1))
    east, north = asteroids.sky_rates(EPOCH)
    _, dec = asteroids.sky_position(EPOCH)
    d_ra = (np.mod(ra1 - ra0 + 180, 360) - 180) * np.cos(np.deg2rad(dec)) * 3600
    # A central difference over 1 h errs by about (30 arcsec)^2 tan^2(dec) / 206265^2 of the rate: nothing.
    np.testing.assert_allclose(d_ra / (2 * step_h), east, atol=1e-4)
    np.testing.assert_allclose((dec1 - dec0) * 3600 / (2 * step_h), north, atol=1e-4)


# --- projection and bad input


@settings(max_examples=50, deadline=None)
@given(
    ra=st.floats(0, 359.99),
    dec=st.floats(-89, 89),
    rotation=st.floats(-180, 180),
    x=st.floats(-500, 4500),
    y=st.floats(-500, 4500),
)
def test_projection_is_the_tan_projection_of_astropy(
    ra: float, dec: float, rotation: float, x: float, y: float
) -> None:
    projection = sim.TanProjection(ra, dec, 2047.5, 1999.25, rotation)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [ra, dec], [2048.5, 2000.25]
    wcs.wcs.cd = projection.cd_deg
    ours = projection.to_sky(np.array([x]), np.array([y]))
    theirs = wcs.all_pix2world([x], [y], 0)
    assert _angle_arcsec(*ours, *theirs)[0] < 1e-6
    back = projection.to_pixels(*ours)
    assert back[0][0] == pytest.approx(x, abs=1e-5) and back[1][0] == pytest.approx(y, abs=1e-5)


def test_rotation_is_the_position_angle_of_plus_y() -> None:
    projection = sim.TanProjection(150.0, 0.0, 0.0, 0.0, rotation_deg=30.0)
    ra, dec = projection.to_sky(np.array([0.0]), np.array([1000.0]))
    angle = np.rad2deg(np.arctan2((ra[0] - 150.0), dec[0]))
    assert angle == pytest.approx(30.0, abs=1e-4)


def test_bad_requests_are_refused_with_the_value_named() -> None:
    with pytest.raises(sim.SimulationError, match="unknown band 'x'"):
        sim.nominal_conditions("x", 30.0, 0.9)
    with pytest.raises(sim.SimulationError, match="seeing 0"):
        sim.nominal_conditions("r", 30.0, 0.0)
    with pytest.raises(sim.SimulationError, match="has no area"):
        sim.draw_sky(1, replace(EMPTY, width_arcsec=0.0))

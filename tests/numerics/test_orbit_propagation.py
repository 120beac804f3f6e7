"""Orbits: two-body motion against integration, planets, the observer against astropy, light time, what is seen."""

from __future__ import annotations

import astropy.units as u
import erfa
import numpy as np
import pytest
from astropy.coordinates import EarthLocation, get_body_barycentric_posvel
from astropy.time import Time
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from orbit_samples import GM_SUN, Elements, elements_of_states, random_elements
from scipy.integrate import solve_ivp

from transforms.numerics.orbit_propagation import (
    AU_KM,
    DAY_S,
    EARTH_RADIUS_AU,
    LIGHT_AU_PER_D,
    Observer,
    Orbits,
    apparent_magnitude,
    mean_anomaly_of_perihelion,
    mean_motion_deg_per_d,
    motion_reach,
    observer_at,
    orbits_from_elements,
    perihelion_of_mean_anomaly,
    planet_table,
    positions_from_ranges,
    predict_positions,
    propagate_perturbed,
    propagate_two_body,
    rough_directions,
    tdb_of_tai,
)

FloatArray = NDArray[np.float64]
EPOCH = 60000.0
RUBIN = (289.25058, 0.864981, -0.500958)
ARCSEC = np.radians(1.0 / 3600.0)
# Circular, elliptic, nearly parabolic from both sides, parabolic, hyperbolic.
ECCENTRICITIES = [0.0, 1e-9, 0.1, 0.7, 0.97, 1.0 - 1e-6, 1.0 - 1e-12, 1.0, 1.0 + 1e-12, 1.0 + 1e-6, 1.2, 3.36, 6.1]


def integrated(position: FloatArray, velocity: FloatArray, days: float) -> FloatArray:
    """The state after `days` by an eighth-order Runge-Kutta integration in Cartesian coordinates."""

    def slope(t: float, state: FloatArray) -> FloatArray:
        x = state[:3]
        return np.concatenate([state[3:], -GM_SUN * x / np.linalg.norm(x) ** 3])

    found = solve_ivp(slope, (0.0, days), np.concatenate([position, velocity]), "DOP853", rtol=1e-13, atol=1e-15)
    end: FloatArray = found.y[:, -1]
    return end


@pytest.mark.parametrize("eccentricity", ECCENTRICITIES)
def test_two_body_motion_is_that_of_the_equation_of_motion_integrated(eccentricity: float) -> None:
    orbits = orbits_from_elements(*random_elements(np.random.default_rng(11), np.full(3, eccentricity)))
    for days in (-700.0, 3.0, 900.0):
        moved = propagate_two_body(orbits, EPOCH + days)
        for k in range(3):
            expected = integrated(orbits.position[k], orbits.velocity[k], days)
            # The integrator's 1e-13 a step grows with the square of the number of steps, a few hundred.
            np.testing.assert_allclose(moved.position[k], expected[:3], atol=2e-9)
            np.testing.assert_allclose(moved.velocity[k], expected[3:], atol=2e-10)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_elements_survive_the_way_to_states_on_the_orbit_and_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 20
    eccentricity = np.where(rng.uniform(size=n) < 0.5, rng.uniform(0.01, 0.99, n), rng.uniform(1.01, 4.0, n))
    given_elements = random_elements(rng, eccentricity)
    given_elements.perihelion_au[eccentricity > 1.0] += 1.0
    moved = propagate_two_body(orbits_from_elements(*given_elements), EPOCH + rng.uniform(-1000.0, 1000.0, n))
    found = elements_of_states(*moved)
    # A hyperbola on the way through perihelion: terms exp(F1 - F0), up to 1e5, times as large as their sum, and 100
    # times as much of that is seen in the angular momentum of nearly radial motion. The eccentricity, at least 0.01,
    # divides the error of angles in the orbit; |1 - e|, the same, that of the time.
    np.testing.assert_allclose(found.perihelion_au, given_elements.perihelion_au, rtol=1e-8)
    np.testing.assert_allclose(found.eccentricity, given_elements.eccentricity, rtol=1e-8)
    for name in ("inclination_deg", "node_deg", "argument_deg"):
        turned = getattr(found, name) - getattr(given_elements, name)
        np.testing.assert_allclose((turned + 180.0) % 360.0 - 180.0, 0.0, atol=1e-6)
    passed = found.perihelion_mjd - given_elements.perihelion_mjd
    axis = given_elements.perihelion_au / np.abs(1.0 - eccentricity)
    period = 2.0 * np.pi * axis**1.5 / np.sqrt(GM_SUN)
    turns = np.where(eccentricity < 1.0, np.round(passed / period), 0.0)
    np.testing.assert_allclose(passed - turns * period, 0.0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_energy_and_angular_momentum_are_kept_and_there_and_back_is_the_same_place(seed: int) -> None:
    rng = np.random.default_rng(seed)
    eccentricity = np.array(ECCENTRICITIES)
    start = orbits_from_elements(*random_elements(rng, eccentricity))
    to = EPOCH + rng.choice([-1.0, 1.0], len(eccentricity)) * 10.0 ** rng.uniform(-3.0, 4.5, len(eccentricity))
    moved = propagate_two_body(start, to)
    energy, momentum = zip(*(_integrals(orbits) for orbits in (start, moved)), strict=True)
    # Rounding of the terms of which they are made, at the end where these are larger; on the way through perihelion
    # a hyperbola's terms are exp(F) times as large, F to about 10 here, and cancel.
    terms = [0.5 * _squares(one.velocity) + GM_SUN / np.sqrt(_squares(one.position)) for one in (start, moved)]
    assert (np.abs(energy[1] - energy[0]) < 1e-10 * np.maximum(*terms)).all()
    products = [np.sqrt(_squares(one.position) * _squares(one.velocity)) for one in (start, moved)]
    assert (np.sqrt(_squares(momentum[1] - momentum[0])) < 1e-10 * np.maximum(*products)).all()
    back = propagate_two_body(moved, EPOCH)
    # Phase: the rounding of the energy, 1e-15, times the angle run through, at most 86 years at 0.2 au.
    np.testing.assert_allclose(back.position, start.position, rtol=0, atol=1e-8 * np.abs(start.position).max())


def _integrals(orbits: Orbits) -> tuple[FloatArray, FloatArray]:
    energy = 0.5 * _squares(orbits.velocity) - GM_SUN / np.sqrt(_squares(orbits.position))
    return energy, np.cross(orbits.position, orbits.velocity)


def _squares(vectors: FloatArray) -> FloatArray:
    squares: FloatArray = (vectors**2).sum(1)
    return squares


def test_mean_anomaly_and_perihelion_say_the_same() -> None:
    # A quarter of Kepler's area: M = E - e sin E with E = 60 degrees, and the hyperbola's M = e sinh H - H.
    mean = np.degrees(np.radians(60.0) - 0.5 * np.sin(np.radians(60.0)))
    hyperbolic = np.degrees(1.5 * np.sinh(0.8) - 0.8)
    q, passage = perihelion_of_mean_anomaly([2.0, -2.0], [0.5, 1.5], [mean, hyperbolic], [EPOCH, EPOCH])
    np.testing.assert_allclose(q, [1.0, 1.0])
    zero = np.zeros(2)
    orbits = orbits_from_elements(q, [0.5, 1.5], zero, zero, zero, passage, [EPOCH, EPOCH])
    distance = np.linalg.norm(orbits.position, axis=1)
    np.testing.assert_allclose(distance, [2.0 * (1.0 - 0.5 * 0.5), 2.0 * (1.5 * np.cosh(0.8) - 1.0)], rtol=1e-12)
    turned = perihelion_of_mean_anomaly([2.0], [0.5], [mean + 720.0], [EPOCH])
    assert turned[1][0] == pytest.approx(passage[0], abs=1e-9)


def test_the_ecliptic_is_tilted_by_the_obliquity_towards_the_equator() -> None:
    # On the ecliptic, perihelion at longitude 90 degrees: the summer solstice, at declination 23.4392911 degrees.
    orbits = orbits_from_elements([1.0], [0.1], [0.0], [0.0], [90.0], [EPOCH], [EPOCH])
    dec = np.degrees(np.arcsin(orbits.position[0, 2]))
    assert dec == pytest.approx(84381.448 / 3600.0, abs=1e-12)
    assert orbits.position[0, :2] == pytest.approx([0.0, np.cos(np.radians(dec))], abs=1e-15)
    assert orbits.velocity[0, 0] < 0.0  # counterclockwise, seen from the north


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"perihelion_au": 0.0}, "perihelion_au > 0"),
        ({"eccentricity": -0.1}, "eccentricity >= 0"),
        ({"node_deg": np.nan}, "finite"),
        ({"epoch_mjd": [1.0, 2.0]}, r"one length, got \(1,\)"),
    ],
)
def test_elements_that_make_no_orbit_are_refused(change: dict[str, float], words: str) -> None:
    elements: dict[str, object] = dict.fromkeys(Elements._fields, 1.0)
    with pytest.raises(ValueError, match=words):
        orbits_from_elements(**{**elements, **change})  # type: ignore[arg-type]


def test_planets_pull_as_in_the_integrated_equation() -> None:
    # Two of the main belt, one at a Trojan's distance, a comet that goes in and out.
    orbits = orbits_from_elements(*random_elements(np.random.default_rng(5), np.array([0.1, 0.3, 0.05, 0.95])))
    ratios = np.array([6023600.0, 408523.71, 328900.5596, 3098708.0, 1047.348644, 3497.9018, 22902.98, 19412.26])

    def slope(t: float, state: FloatArray) -> FloatArray:
        x = state.reshape(2, 4, 3)[0]
        planets = erfa.plan94(2400000.5 + EPOCH, t, np.arange(1, 9))["p"]
        towards = planets[None, :, :] - x[:, None, :]
        pull = towards / np.linalg.norm(towards, axis=2)[:, :, None] ** 3
        pull -= planets / np.linalg.norm(planets, axis=1)[:, None] ** 3
        acceleration = (pull * (GM_SUN / ratios)[None, :, None]).sum(1)
        acceleration -= GM_SUN * x / np.linalg.norm(x, axis=1)[:, None] ** 3
        return np.concatenate([state[12:], acceleration.ravel()])

    for days in (-80.0, 80.0):
        start = np.concatenate([orbits.position.ravel(), orbits.velocity.ravel()])
        found = solve_ivp(slope, (0.0, days), start, "DOP853", rtol=1e-9, atol=1e-12)
        expected = found.y[:12, -1].reshape(4, 3)
        missed = np.linalg.norm(propagate_perturbed(orbits, EPOCH + days).position - expected, axis=1)
        perturbation = np.linalg.norm(propagate_two_body(orbits, EPOCH + days).position - expected, axis=1)
        assert (perturbation > 1e-6).all()  # 1000 times what the integration is off by
        # N kicks miss 1 / (2 N^2) of what a pull that grows with time does; steps are of at most 8 days.
        assert (missed < perturbation / (2.0 * (80.0 / 8.0) ** 2)).all()


def test_an_orbit_is_propagated_the_same_whatever_others_are_with_it() -> None:
    rng = np.random.default_rng(6)
    orbits = orbits_from_elements(*random_elements(rng, rng.uniform(0.0, 1.5, 12)))
    orbits = orbits._replace(mjd_tdb=EPOCH + rng.uniform(-500.0, 500.0, 12))
    together = propagate_perturbed(orbits, EPOCH + 0.3)
    for k in range(12):
        alone = propagate_perturbed(Orbits(*(column[k : k + 1] for column in orbits)), EPOCH + 0.3)
        assert alone.position.tobytes() == together.position[k].tobytes()
        assert alone.velocity.tobytes() == together.velocity[k].tobytes()


@pytest.mark.parametrize("year", [2012.3, 2020.4, 2026.9])
def test_the_observer_is_where_astropy_puts_it(year: float) -> None:
    # Within the leap seconds and Earth orientation that astropy ships; nothing is fetched.
    time = Time(year, format="decimalyear", scale="tai")
    time.delta_ut1_utc = 0.0
    site = EarthLocation.from_geocentric(*(_site_m() * u.m))
    found = observer_at(time.mjd, *RUBIN)
    earth, earth_velocity = get_body_barycentric_posvel("earth", time, ephemeris="builtin")
    sun, sun_velocity = get_body_barycentric_posvel("sun", time, ephemeris="builtin")
    from_earth = _gcrs_m(site, time)
    expected = (earth - sun).xyz.to_value(u.au) + from_earth[0] / (AU_KM * 1e3)
    # astropy's Sun is read from the same series: rounding only.
    np.testing.assert_allclose(found.position, expected, atol=1e-12)
    velocity = (earth_velocity - sun_velocity).xyz.to_value(u.au / u.d) + from_earth[1] / (AU_KM * 1e3) * DAY_S
    np.testing.assert_allclose(found.velocity, velocity, atol=1e-10)
    np.testing.assert_allclose(found.sun_velocity, sun_velocity.xyz.to_value(u.au / u.d), atol=1e-12)
    geocentre = observer_at(time.mjd, 0.0, 0.0, 0.0)
    np.testing.assert_allclose(geocentre.position, (earth - sun).xyz.to_value(u.au), atol=1e-12)


def _site_m() -> FloatArray:
    longitude, rho_cos, rho_sin = np.radians(RUBIN[0]), RUBIN[1], RUBIN[2]
    radius = EARTH_RADIUS_AU * AU_KM * 1e3
    return radius * np.array([rho_cos * np.cos(longitude), rho_cos * np.sin(longitude), rho_sin])


def _gcrs_m(site: EarthLocation, time: Time) -> tuple[FloatArray, FloatArray]:
    """astropy's own rotation, with the pole at rest as ours is."""
    matrix = erfa.c2t06a(time.tt.jd1, time.tt.jd2, time.ut1.jd1, time.ut1.jd2, 0.0, 0.0)
    position = matrix.T @ np.array([site.x.value, site.y.value, site.z.value])
    later = time + 0.5 * u.s
    earlier = time - 0.5 * u.s
    turned = []
    for at in (earlier, later):
        at.delta_ut1_utc = 0.0
        matrix = erfa.c2t06a(at.tt.jd1, at.tt.jd2, at.ut1.jd1, at.ut1.jd2, 0.0, 0.0)
        turned.append(matrix.T @ np.array([site.x.value, site.y.value, site.z.value]))
    return position, turned[1] - turned[0]


def test_far_future_dates_need_no_table_and_warn_of_nothing() -> None:
    # The manifest allows midpoints up to MJD 71,635; leap seconds are announced half a year ahead.
    observer = observer_at(71_635.0, *RUBIN)
    assert 0.98 < np.linalg.norm(observer.position) < 1.02


def test_a_near_object_is_shifted_by_the_parallax_of_the_site() -> None:
    mjd = 60100.25
    site, centre = observer_at(mjd, *RUBIN), observer_at(mjd, 0.0, 0.0, 0.0)
    towards = np.array([0.6, 0.64, 0.48])
    distance = 0.01
    light_time = distance / LIGHT_AU_PER_D
    position = centre.position + distance * towards + light_time * centre.sun_velocity
    orbits = Orbits(np.array([centre.mjd_tdb - light_time]), position[None, :], centre.velocity[None, :])
    from_centre, from_site = predict_positions(orbits, centre), predict_positions(orbits, site)
    seen = [_direction(one) for one in (from_centre, from_site)]
    np.testing.assert_allclose(seen[0], towards, atol=1e-12)
    baseline = site.position - centre.position
    expected = distance * towards - baseline
    expected /= np.linalg.norm(expected)
    # The site sees the light of a moment that differs by the baseline over c: 0.02 s at 30 km / s, 0.08 arcsec.
    late = np.linalg.norm(baseline) / LIGHT_AU_PER_D * np.linalg.norm(centre.velocity) / distance
    assert np.linalg.norm(seen[1] - expected) < 1.01 * late
    across = baseline - baseline @ towards * towards
    # Parallax: the baseline across the line of sight over the distance, up to second order in 1/235.
    shift = np.linalg.norm(seen[1] - seen[0]) / ARCSEC
    assert shift == pytest.approx(np.linalg.norm(across) / distance / ARCSEC, rel=1.5 * EARTH_RADIUS_AU / distance)
    assert shift > 300.0


def _direction(seen: object) -> FloatArray:
    ra, dec = np.radians(seen.ra_deg[0]), np.radians(seen.dec_deg[0])  # type: ignore[attr-defined]
    return np.array([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])


def _still_observer(position: FloatArray, mjd: float = EPOCH) -> Observer:
    return Observer(mjd, position, np.zeros(3), np.zeros(3))


def test_light_time_of_a_radial_path_has_the_analytic_answer() -> None:
    # Far out the Sun's pull is nothing: x(t) = x0 + v t, seen from the origin's side, c tau = |x0| - |v| tau.
    x0, v = np.array([5000.0, 0.0, 0.0]), np.array([0.05, 0.0, 0.0])
    seen = predict_positions(
        Orbits(np.array([EPOCH]), x0[None, :], v[None, :]), _still_observer(np.array([1.0, 0.0, 0.0]))
    )
    tau = 4999.0 / (LIGHT_AU_PER_D + 0.05)
    # GM / r^2 tau^2 / 2 = 5e-9 au.
    assert seen.topo_range_au[0] == pytest.approx(LIGHT_AU_PER_D * tau, abs=1e-8)
    assert seen.helio_range_au[0] == pytest.approx(5000.0 - 0.05 * tau, abs=1e-8)


def test_light_time_moves_a_crossing_object_back_by_v_over_c() -> None:
    x0, v = np.array([5001.0, 0.0, 0.0]), np.array([0.0, 0.05, 0.0])
    seen = predict_positions(
        Orbits(np.array([EPOCH]), x0[None, :], v[None, :]), _still_observer(np.array([1.0, 0.0, 0.0]))
    )
    # c tau = sqrt(d^2 + (v tau)^2), so the angle back is arcsin(v / c) exactly.
    back = -np.degrees(np.arcsin(0.05 / LIGHT_AU_PER_D))
    assert (seen.ra_deg[0] + 180.0) % 360.0 - 180.0 == pytest.approx(back, abs=1e-9)


def test_the_motion_of_the_sun_shifts_what_its_light_left_behind() -> None:
    x0 = np.array([[5001.0, 0.0, 0.0]])
    still = _still_observer(np.array([1.0, 0.0, 0.0]))
    drifting = still._replace(sun_velocity=np.array([0.0, 0.05, 0.0]))
    seen = predict_positions(Orbits(np.array([EPOCH]), x0, np.zeros((1, 3))), drifting)
    back = -np.degrees(np.arcsin(0.05 / LIGHT_AU_PER_D))
    assert (seen.ra_deg[0] + 180.0) % 360.0 - 180.0 == pytest.approx(back, abs=1e-9)


def _some(seed: int, n: int = 40) -> Orbits:
    rng = np.random.default_rng(seed)
    return orbits_from_elements(*random_elements(rng, rng.uniform(0.0, 1.3, n)))


def test_rates_are_the_derivatives_of_the_places() -> None:
    orbits, mjd, half = _some(3), EPOCH + 40.2, 0.004
    before, now, after = (predict_positions(orbits, observer_at(mjd + step, *RUBIN)) for step in (-half, 0.0, half))
    turned = (after.ra_deg - before.ra_deg + 180.0) % 360.0 - 180.0
    # The site's circle is the fastest change: h^2 / 6 (2 pi)^3 R / d, and the third derivative of the orbit.
    limit = np.degrees(half**2 / 6.0 * (2.0 * np.pi) ** 3 * 2.0 * EARTH_RADIUS_AU / now.topo_range_au) + 1e-6
    steep = 1.0 + np.tan(np.radians(now.dec_deg)) ** 2  # of meridians near the pole
    error = turned / (2.0 * half) * np.cos(np.radians(now.dec_deg)) - now.rate_ra_deg_per_d
    assert (np.abs(error) < limit * steep).all()
    assert (np.abs((after.dec_deg - before.dec_deg) / (2.0 * half) - now.rate_dec_deg_per_d) < limit * steep).all()
    for name, rate in (("topo_range_au", "topo_range_rate_km_s"), ("helio_range_au", "helio_range_rate_km_s")):
        slope = (getattr(after, name) - getattr(before, name)) / (2.0 * half) * AU_KM / DAY_S
        # Rates are velocities at their time; the derivative has d tau / dt in it: v^2 / c, and up to 100 km / s.
        np.testing.assert_allclose(getattr(now, rate), slope, atol=100.0**2 / 3e5)


def test_distances_angles_and_vectors_belong_together() -> None:
    observer = observer_at(EPOCH + 12.0, *RUBIN)
    seen = predict_positions(_some(4), observer)
    np.testing.assert_allclose(np.linalg.norm(seen.topo_position, axis=1), seen.topo_range_au, rtol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(seen.helio_position, axis=1), seen.helio_range_au, rtol=1e-14)
    sun = np.linalg.norm(observer.position)
    # The plane triangle Sun, observer, object; the Sun's 13 m / s during the light's way are 1e-6 au at 30 au.
    cos_elongation = (sun**2 + seen.topo_range_au**2 - seen.helio_range_au**2) / (2.0 * sun * seen.topo_range_au)
    cos_phase = (seen.helio_range_au**2 + seen.topo_range_au**2 - sun**2) / (
        2.0 * seen.helio_range_au * seen.topo_range_au
    )
    np.testing.assert_allclose(np.cos(np.radians(seen.elongation_deg)), cos_elongation, atol=1e-5)
    np.testing.assert_allclose(np.cos(np.radians(seen.phase_angle_deg)), cos_phase, atol=1e-5)


def test_an_ephemeris_with_distances_tells_what_the_orbit_tells() -> None:
    observer = observer_at(EPOCH + 12.0, *RUBIN)
    seen = predict_positions(_some(5), observer)
    rate = seen.topo_range_rate_km_s * DAY_S / AU_KM
    told = positions_from_ranges(
        seen.ra_deg, seen.dec_deg, seen.rate_ra_deg_per_d, seen.rate_dec_deg_per_d, seen.topo_range_au, rate, observer
    )
    for name in seen._fields:
        atol = 100.0**2 / 3e5 if "km_s" in name or "velocity" in name else 1e-5
        np.testing.assert_allclose(getattr(told, name), getattr(seen, name), atol=atol, err_msg=name)
    nothing = np.full(40, np.nan)
    told = positions_from_ranges(
        seen.ra_deg, seen.dec_deg, seen.rate_ra_deg_per_d, seen.rate_dec_deg_per_d, nothing, nothing, observer
    )
    np.testing.assert_allclose(told.elongation_deg, seen.elongation_deg, atol=1e-9)
    assert np.isnan(told.phase_angle_deg).all() and np.isnan(told.helio_velocity).all()
    assert told.ra_deg.tolist() == seen.ra_deg.tolist()


def test_rough_directions_are_within_an_arcsecond_of_the_places() -> None:
    observer, orbits = observer_at(EPOCH + 12.0, *RUBIN), _some(7, 300)
    seen = predict_positions(orbits, observer)
    ra, dec = np.radians(seen.ra_deg), np.radians(seen.dec_deg)
    exact = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)
    tau = seen.topo_range_au / LIGHT_AU_PER_D
    limit = GM_SUN / seen.helio_range_au**2 * tau**2 / 2.0 / seen.topo_range_au + 3e-8  # and (v / c)^2
    assert (np.linalg.norm(rough_directions(orbits, observer) - exact, axis=1) < 1.5 * limit).all()


def test_magnitudes_follow_distance_and_phase() -> None:
    # At 1 au from both and no phase an asteroid has magnitude H; ten times as far from both, 10 magnitudes more.
    found = apparent_magnitude([15.0, 15.0], [0.15, 0.15], [1.0, 10.0], [1.0, 10.0], [0.0, 0.0])
    np.testing.assert_allclose(found, [15.0, 25.0], atol=1e-12)
    # phi_1 = exp(-3.33 tan(15 deg)^0.63) = 0.23410, phi_2 = exp(-1.87 tan(15 deg)^1.22) = 0.68747, by hand.
    expected = 15.0 - 2.5 * np.log10(0.85 * 0.23410 + 0.15 * 0.68747)
    at_30 = apparent_magnitude([15.0, 15.0], [0.15, np.nan], [1.0, 1.0], [1.0, 1.0], [30.0, 30.0])
    np.testing.assert_allclose(at_30, expected, atol=1e-3)
    assert np.isnan(apparent_magnitude([np.nan], [0.15], [1.0], [1.0], [0.0])).all()


def test_planets_stand_in_their_table_by_day() -> None:
    table = planet_table(60000, 3)
    assert table.shape == (3, 8, 2, 3)
    distances = np.linalg.norm(table[0, :, 0], axis=1)
    bounds = [
        (0.30, 0.47),
        (0.71, 0.73),
        (0.98, 1.02),
        (1.38, 1.67),
        (4.9, 5.5),
        (9.0, 10.2),
        (18.2, 20.2),
        (29.7, 30.4),
    ]
    assert all(low < distance < high for distance, (low, high) in zip(distances, bounds, strict=True))
    # Positions move by the velocities: the curvature of Mercury's path is the largest, 0.005 au / d^2.
    np.testing.assert_allclose(table[2, :, 0] - table[0, :, 0], 2.0 * table[1, :, 1], atol=1e-3)


def test_tdb_is_32_184_s_ahead_of_tai() -> None:
    assert (tdb_of_tai(60000.0) - 60000.0) * DAY_S == pytest.approx(32.184, abs=1e-6)


@pytest.mark.parametrize("eccentricity", [0.0, 0.3, 0.99, 1.2, 6.1])
def test_perihelion_and_mean_anomaly_lead_to_each_other(eccentricity: float) -> None:
    elements = random_elements(np.random.default_rng(5), np.full(50, eccentricity))
    q, passage, epoch = elements.perihelion_au, elements.perihelion_mjd, elements.epoch_mjd
    a, anomaly = mean_anomaly_of_perihelion(q, elements.eccentricity, passage, epoch)
    again, passage_again = perihelion_of_mean_anomaly(a, elements.eccentricity, anomaly, epoch)
    np.testing.assert_allclose(again, q, rtol=1e-13 / abs(1.0 - eccentricity))
    # The same passage up to whole turns, of which there are none for hyperbolas.
    missed = mean_motion_deg_per_d(a) * (passage_again - passage)
    if eccentricity < 1.0:
        assert ((anomaly >= 0.0) & (anomaly < 360.0)).all()
        missed = (missed + 180.0) % 360.0 - 180.0
    # Rounding of a time of 6e4 days, and of angles of up to some thousand turns of 1e-16 each.
    assert np.abs(missed).max() < 1e-11 * (360.0 + np.abs(anomaly).max())


def test_a_parabola_has_no_mean_anomaly() -> None:
    a, anomaly = mean_anomaly_of_perihelion([1.0], [1.0], [60000.0], [60010.0])
    assert np.isnan(a[0]) and np.isnan(anomaly[0])


def test_no_object_is_seen_farther_from_its_place_at_midnight_than_its_reach() -> None:
    """Objects of every kind, half of them on their way past the Earth or the Sun, at times and places over a day."""
    rng = np.random.default_rng(21)
    n, span = 4000, 0.501
    elements = random_elements(rng, rng.choice([0.0, 0.1, 0.5, 0.97, 1.0, 1.5, 6.1], n), EPOCH)
    orbits = orbits_from_elements(*elements)
    geocentre = observer_at(EPOCH, 0.0, 0.0, 0.0)
    near = slice(0, n // 4)  # 0.001 to 0.3 au from the Earth
    away = rng.normal(size=(n // 4, 3))
    away *= (10.0 ** rng.uniform(-3.0, -0.5, n // 4) / np.linalg.norm(away, axis=1))[:, None]
    orbits.position[near] = geocentre.position + away
    sun = slice(n // 4, n // 2)  # within 0.05 to 0.8 au of the Sun
    orbits.position[sun] *= (rng.uniform(0.05, 0.8, n // 4) / np.linalg.norm(orbits.position[sun], axis=1))[:, None]
    directions, reach = motion_reach(orbits, geocentre, span)
    widest = np.zeros(n)
    for dt in (-span, -0.25, 0.0, 0.1, span):
        for site in (RUBIN, (289.25058 + 180.0, 0.999, 0.0)):
            seen = rough_directions(orbits, observer_at(EPOCH + dt, *site))
            apart = 2.0 * np.arcsin(np.minimum(1.0, 0.5 * np.linalg.norm(seen - directions, axis=1)))
            widest = np.maximum(widest, apart)
    assert (widest <= reach).all()
    # And it is of use: of objects beyond both it is less than twice as far as they get.
    ordinary = reach[n // 2 :] < np.pi
    assert ordinary.mean() > 0.8
    assert np.median(reach[n // 2 :][ordinary] / widest[n // 2 :][ordinary]) < 2.0

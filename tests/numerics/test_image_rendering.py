"""Images of the simulated sky: what is rendered is what the truth says, to derived tolerances."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sky_configs import EMPTY, EPOCH, FULL

from transforms.numerics import image_rendering as rendering
from transforms.numerics import sky_simulation as sim

SHAPE = (400, 360)
PROJECTION = sim.TanProjection(150.1, 2.2, 181.3, 196.7, rotation_deg=12.0)
PSF = rendering.PsfField(SHAPE, 4.5, slope_x=0.02, slope_y=-0.01, curvature=0.02, e1=0.05, e2=-0.03, e1_slope=0.01)
CONDITIONS = sim.nominal_conditions("r", 30.0, 0.9, sky_slope=(0.03, -0.02))
CUT_OFF = (1.0 + 6.0**2) ** -2.5  # Moffat flux beyond 6 alpha: 1.2e-4


def _render(
    sky: sim.Sky,
    *movers: sim.Movers,
    noise_seed: int = 1,
    mjd_tai: float = EPOCH,
    conditions: sim.Conditions = CONDITIONS,
) -> rendering.RenderedExposure:
    return rendering.render_science(
        sky,
        movers,
        PROJECTION,
        PSF,
        conditions,
        mjd_tai,
        noise=sim.random_stream(noise_seed, sim.Purpose.SCIENCE_NOISE),
        cosmic_rays=sim.random_stream(3, sim.Purpose.COSMIC_RAYS),
        bad_columns=sim.random_stream(8, sim.Purpose.BAD_COLUMNS),  # columns that miss the lone star but hit sources
    )


def _one_star_sky(magnitude: float) -> sim.Sky:
    ra, dec = PROJECTION.to_sky(np.array([150.3]), np.array([171.8]))
    star = sim.Stars(ra, dec, np.array([magnitude]), np.zeros(1))
    return replace(sim.draw_sky(0, EMPTY), stars=star)


def _clear(rendered: rendering.RenderedExposure) -> np.ndarray:
    return ~(rendered.bad | rendered.saturated | rendered.cosmic_ray)


# --- PSF and stamps


@settings(max_examples=30, deadline=None)
@given(
    x=st.floats(60, 61),
    y=st.floats(60, 61),
    fwhm=st.floats(3.2, 6.0),
    e1=st.floats(-0.15, 0.15),
    e2=st.floats(-0.15, 0.15),
)
def test_a_point_source_sums_to_its_flux(x: float, y: float, fwhm: float, e1: float, e2: float) -> None:
    image = np.zeros((121, 121))
    rendering.add_point_sources(image, *(np.array([value]) for value in (x, y, 1000.0, fwhm, e1, e2)), 1.0)
    # Beyond 6 alpha nothing is drawn (up to 40 pixels: inside the image); wing pixels at their midpoint are too faint
    # by h^2 / 24 times the Laplacian 49 / r^2, 2.4 % at 2.5 alpha = 8.5 pixels, of the 0.7 % flux that lies there.
    assert image.sum() / 1000.0 == pytest.approx(1.0 - CUT_OFF, abs=0.024 * 0.0071)


def test_a_point_source_is_pixel_integrated_like_a_finely_sampled_moffat() -> None:
    fwhm, x, y = 3.5, 10.3, 9.8
    image = np.zeros((21, 21))
    rendering.add_point_sources(image, *(np.array([value]) for value in (x, y, 1.0, fwhm, 0.0, 0.0)), 1.0)
    fine = (np.arange(21 * 31) + 0.5) / 31 - 0.5
    alpha = fwhm * sim.ALPHA_PER_FWHM
    radius2 = (fine[None, :] - x) ** 2 + (fine[:, None] - y) ** 2
    profile = 2.5 / (np.pi * alpha**2) * (1 + radius2 / alpha**2) ** -3.5
    expected = profile.reshape(21, 31, 21, 31).mean(axis=(1, 3))
    # 3-point Gauss-Legendre in the core and 31-point midpoints: both exact to about 1e-4 of the peak at alpha = 3.7.
    assert np.abs(image - expected).max() < 1e-4 * expected.max()


def test_moments_of_a_point_source_have_the_asked_ellipticity() -> None:
    image = np.zeros((161, 161))
    rendering.add_point_sources(image, *(np.array([value]) for value in (80.0, 80.0, 1.0, 4.5, 0.12, -0.07)), 1e-9)
    offset = np.arange(161) - 80.0
    # An elliptical aperture is not needed: weights by a fixed round Gaussian only dilute both components alike.
    weight = image * np.exp(-0.5 * (offset[None, :] ** 2 + offset[:, None] ** 2) / 20.0**2)
    xx, yy = (weight * offset[None, :] ** 2).sum(), (weight * offset[:, None] ** 2).sum()
    xy = (weight * offset[None, :] * offset[:, None]).sum()
    assert (xx - yy) / (2 * xy) == pytest.approx(0.12 / -0.07, rel=0.01)
    assert xx > yy and xy < 0


def test_psf_image_sums_to_one_and_peaks_in_its_middle() -> None:
    image = rendering.psf_image(PSF, 30.0, 300.0)
    assert image.shape == (41, 41)
    assert image.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.unravel_index(image.argmax(), image.shape) == (20, 20)


@pytest.mark.parametrize("size", [40, 1, 0])
def test_psf_image_of_even_or_tiny_size_is_refused(size: int) -> None:
    with pytest.raises(sim.SimulationError, match=f"odd size.*got {size}"):
        rendering.psf_image(PSF, 0.0, 0.0, size)


def test_a_tiny_galaxy_looks_like_a_star() -> None:
    sky = _one_star_sky(20.0)
    stars = sky.stars
    dot = sim.Galaxies(
        stars.ra_deg,
        stars.dec_deg,
        stars.magnitude_r,
        stars.g_minus_r,
        np.full(1, 1e-6),
        np.ones(1),
        np.zeros(1),
        np.zeros(1, bool),
    )
    empty = sim.draw_sky(0, EMPTY)
    star = rendering.static_electrons(sky, PROJECTION, PSF, CONDITIONS)
    galaxy = rendering.static_electrons(replace(empty, galaxies=dot), PROJECTION, PSF, CONDITIONS)
    # The Gaussians fit the Moffat to 5e-4 of its peak, and 1/12 pixel^2 stands for the pixel to (h / sigma)^4 / 960.
    assert np.abs(star - galaxy).max() < 2e-3 * star.max()


def test_galaxies_hold_their_flux_and_follow_the_rotation_of_the_detector() -> None:
    ra, dec = PROJECTION.to_sky(np.array([180.0]), np.array([200.0]))
    galaxy = sim.Galaxies(
        ra, dec, np.array([19.0]), np.zeros(1), np.ones(1), np.full(1, 0.4), np.full(1, 35.0), np.zeros(1, bool)
    )
    sky = replace(sim.draw_sky(0, EMPTY), galaxies=galaxy)
    image = rendering.static_electrons(sky, PROJECTION, replace(PSF, e1=0.0, e2=0.0, e1_slope=0.0), CONDITIONS)
    flux = float(sim.flux_njy_from_magnitude(19.0)) * CONDITIONS.electrons_per_njy
    # Each Gaussian is cut at 5 sigma: exp(-12.5) = 3.7e-6 of the flux lies beyond.
    assert image.sum() == pytest.approx(flux, rel=2e-5)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    dx, dy = x - 180.0, y - 200.0
    xx, yy, xy = ((image * part).sum() for part in (dx * dx, dy * dy, dx * dy))
    # The major axis lies 35 deg and +y 12 deg east of north, so it is 23 deg from +y towards east, which is towards -x.
    angle_deg = np.rad2deg(0.5 * np.arctan2(2 * xy, xx - yy)) % 180
    assert angle_deg == pytest.approx(90.0 + 35.0 - 12.0, abs=0.1)


# --- one image


def test_an_isolated_star_has_its_flux_within_the_noise_of_the_variance_plane() -> None:
    star, empty = _render(_one_star_sky(18.0)), _render(sim.draw_sky(0, EMPTY), noise_seed=2)
    box = (slice(172 - 60, 172 + 61), slice(150 - 60, 150 + 61))
    assert not star.bad[box].any()  # the same in both; sky and cosmic rays, flagged or not, cancel
    flux = (star.image[box].astype(np.float64) - empty.image[box]).sum()
    error = np.sqrt((star.variance[box].astype(np.float64) + empty.variance[box]).sum())
    truth = float(sim.flux_njy_from_magnitude(18.0))
    assert flux == pytest.approx(truth * (1 - CUT_OFF), abs=4 * error)
    assert 4 * error < 0.06 * truth  # so that the test can fail


def test_noise_between_two_draws_matches_the_variance_plane_also_in_sources() -> None:
    sky = sim.draw_sky(5, FULL)
    first, second = _render(sky, noise_seed=1), _render(sky, noise_seed=2)
    # Cosmic rays and columns come from streams of their own and cancel.
    clear = _clear(first)
    pull = (first.image.astype(np.float64) - second.image) / np.sqrt(2.0 * first.variance)
    bright = clear & (first.variance > 1.5 * np.median(first.variance))
    for chosen in (clear, bright):
        n_pixels = int(chosen.sum())
        assert n_pixels > 400
        assert pull[chosen].mean() == pytest.approx(0.0, abs=4 / np.sqrt(n_pixels))
        assert pull[chosen].std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * n_pixels))


def test_sky_is_left_in_the_science_image_and_has_a_gradient() -> None:
    rendered = _render(sim.draw_sky(0, EMPTY))
    expected = rendering.sky_level_electrons(SHAPE, CONDITIONS) / CONDITIONS.electrons_per_njy
    clear = _clear(rendered)
    pull = (rendered.image - expected) / np.sqrt(rendered.variance)
    clear &= np.abs(pull) < 6  # cosmic rays that are not flagged; noise beyond 6 sigma: 3e-4 pixels
    assert pull[clear].mean() == pytest.approx(0.0, abs=4 / np.sqrt(clear.sum()))
    assert pull[clear].std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * clear.sum()))
    assert expected[:, -1].mean() / expected[:, 0].mean() == pytest.approx(1.03 / 0.97)


def test_templates_are_sky_subtracted_and_as_deep_as_their_stack() -> None:
    conditions = replace(CONDITIONS, n_stacked=12)
    sky = sim.draw_sky(5, FULL)
    first, second = (
        rendering.render_template(
            sky, PROJECTION, PSF, conditions, noise=sim.random_stream(seed, sim.Purpose.TEMPLATE_NOISE)
        )
        for seed in (1, 2)
    )
    clear = ~first.saturated
    pull = (first.image.astype(np.float64) - second.image)[clear] / np.sqrt(2.0 * first.variance[clear])
    assert pull.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * clear.sum()))
    science = _render(sky)
    ratio = np.median(science.variance) / np.median(first.variance)
    assert ratio == pytest.approx(12.0, rel=0.01)
    empty = rendering.render_template(
        sim.draw_sky(0, EMPTY), PROJECTION, PSF, conditions, noise=sim.random_stream(1, sim.Purpose.TEMPLATE_NOISE)
    )
    error = np.sqrt(empty.variance.astype(np.float64).sum()) / empty.image.size
    assert empty.image.mean(dtype=np.float64) == pytest.approx(0.0, abs=4 * error)
    assert first.injections.size == 0


def test_the_same_streams_give_the_same_bytes_and_other_noise_does_not() -> None:
    sky = sim.draw_sky(5, FULL)
    first, again, other = _render(sky), _render(sim.draw_sky(5, FULL)), _render(sky, noise_seed=2)
    for name in ("image", "variance", "bad", "saturated", "cosmic_ray", "psf", "injections"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert first.image.tobytes() != other.image.tobytes()
    assert first.variance.tobytes() == other.variance.tobytes()
    assert first.injections.tobytes() == other.injections.tobytes()


def test_saturated_stars_are_flagged_and_bleed_along_their_column() -> None:
    rendered = _render(_one_star_sky(13.6))
    rows, columns = np.nonzero(rendered.saturated)
    assert abs(np.median(columns) - 150.3) < 2
    assert np.ptp(rows) > 2 * np.ptp(columns)
    full_well_njy = rendering.FULL_WELL_E / CONDITIONS.electrons_per_njy
    noise_njy = np.sqrt(rendering.FULL_WELL_E) / CONDITIONS.electrons_per_njy
    clear = rendered.saturated & ~rendered.bad & ~rendered.cosmic_ray
    assert np.abs(rendered.image[clear] - full_well_njy).max() < 6 * noise_njy


def test_bleeding_keeps_the_charge_and_fills_pixels_to_the_full_well() -> None:
    electrons = np.full((101, 3), 10.0)
    electrons[48:53, 1] = [500.0, 2000.0, 9000.0, 2000.0, 500.0]
    before = electrons.sum(axis=0)
    rendering.bleed_columns(electrons, 1000.0)
    assert electrons.max() == 1000.0
    np.testing.assert_allclose(electrons.sum(axis=0), before, rtol=1e-12)  # rounding of 100 additions
    assert np.all(electrons[:, (0, 2)] == 10.0)


def test_bleeding_off_the_end_of_a_column_loses_only_what_leaves() -> None:
    electrons = np.zeros((4, 1))
    electrons[0, 0] = 4100.0
    rendering.bleed_columns(electrons, 1000.0)
    # Half of the excess of 3100 goes down and leaves, half fills 1.55 pixels above.
    np.testing.assert_allclose(electrons[:, 0], [1000.0, 1000.0, 550.0, 0.0], atol=1e-9)


# --- truth


def test_light_added_by_injections_has_the_flux_and_place_of_the_truth() -> None:
    sky = replace(sim.draw_sky(5, replace(EMPTY, transients_per_arcmin2=1.0)))
    with_source, without = _render(sky), _render(sim.draw_sky(5, EMPTY))
    # The variance plane holds no noise: its change is the injected light.
    gain = CONDITIONS.electrons_per_njy
    light = (with_source.variance.astype(np.float64) - without.variance) * gain
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    rows = with_source.injections
    isolated = [row for row in rows if min(row["x"], row["y"], SHAPE[1] - row["x"], SHAPE[0] - row["y"]) > 45]
    checked = 0
    for row in isolated:
        others = rows[rows["object"] != row["object"]]
        if others.size and np.hypot(others["x"] - row["x"], others["y"] - row["y"]).min() < 70:
            continue
        near = np.hypot(x - row["x"], y - row["y"]) < 34
        flux = light[near].sum()
        # float32 rounding of the variance: 6e-8 * 260 nJy^2 * gain in each of 3600 pixels, added in quadrature.
        rounding = 6e-8 * 300 * gain * np.sqrt(near.sum())
        assert flux == pytest.approx(row["flux_njy"], rel=2e-3, abs=4 * rounding)
        assert (light * x)[near].sum() / flux == pytest.approx(row["x"], abs=0.02)
        assert (light * y)[near].sum() / flux == pytest.approx(row["y"], abs=0.02)
        checked += 1
    assert checked >= 1


def test_truth_positions_agree_with_the_projection_and_lie_on_the_image() -> None:
    sky = sim.draw_sky(5, FULL)
    asteroids = sim.draw_asteroids(5, FULL, 20261122, EPOCH)
    rows = _render(sky, asteroids).injections
    assert set(rows["kind"]) == {"transient", "variable", "asteroid"}
    x, y = PROJECTION.to_pixels(rows["ra"], rows["dec"])
    assert np.abs(rows["x"] - x).max() < 1e-4 and np.abs(rows["y"] - y).max() < 1e-4  # float32 at 400: 3e-5
    assert rows["x"].min() >= -0.5 and rows["x"].max() < SHAPE[1] - 0.5
    assert len(set(rows["object"])) == rows.size


def test_snr_of_faint_sources_on_dark_sky_is_flux_over_the_nominal_error() -> None:
    flat = replace(CONDITIONS, sky_slope_x=0.0, sky_slope_y=0.0)
    sky = sim.draw_sky(5, replace(EMPTY, transients_per_arcmin2=6.0))
    rows = _render(sky, conditions=flat).injections
    faint = rows[(rows["snr"] < 10) & (np.minimum(rows["x"], rows["y"]) > 30) & (rows["x"] < 330) & (rows["y"] < 370)]
    assert faint.size >= 2
    expected = faint["flux_njy"] / sim.nominal_flux_error_njy("r", 30.0, 0.9)
    # Width changes by up to 4 % over the field, the source's own photons lower it by up to 2 %, and integration over
    # pixels widens the PSF: 1/12 pixel^2 on sigma^2 = 3.7 is 1 % in the error.
    np.testing.assert_allclose(faint["snr"], expected, rtol=0.06)


def test_good_pixels_are_a_plain_loop_over_the_mask() -> None:
    sky = sim.draw_sky(5, replace(FULL, transients_per_arcmin2=40.0))
    rendered = _render(sky)
    unusable = ~_clear(rendered)
    seen = set()
    for row in rendered.injections:
        column, line = int(np.rint(row["x"])), int(np.rint(row["y"]))
        near_edge = min(row["x"], row["y"], SHAPE[1] - 1 - row["x"], SHAPE[0] - 1 - row["y"]) < 15
        flagged = unusable[max(0, line - 2) : line + 3, max(0, column - 2) : column + 3].any()
        if near_edge or flagged:
            assert not row["good_pixels"]
            seen.add("edge" if near_edge else "flag")
        seen.add(bool(row["good_pixels"]))
    assert {"edge", "flag", True} <= seen


def test_sources_next_to_a_saturated_star_are_not_on_good_pixels() -> None:
    sky = _one_star_sky(14.5)
    x, y = np.array([150.3 + 9.0, 150.3 + 40.0]), np.array([171.8 + 4.0, 171.8 + 40.0])
    ra, dec = PROJECTION.to_sky(x, y)
    transients = sim.Transients(
        ra, dec, np.full(2, 3000.0), np.zeros(2), np.full(2, -np.inf), np.full(2, 5.0), np.full(2, -1)
    )
    rows = _render(replace(sky, transients=transients)).injections
    assert rows["good_pixels"].tolist() == [False, True]


def test_truth_holds_no_transient_before_its_onset() -> None:
    sky = sim.draw_sky(5, replace(FULL, transients_per_arcmin2=40.0))
    shown = set(_render(sky, mjd_tai=EPOCH - 0.01).injections["object"])
    dark = np.flatnonzero(sim.transient_flux_njy(sky, "r", EPOCH - 0.01) == 0)
    assert dark.size > 0
    assert not {f"transient-{index:04d}" for index in dark} & shown
    assert any(name.startswith("transient") for name in shown)


def test_a_trail_is_as_long_as_its_motion_and_holds_its_flux() -> None:
    centre = tuple(float(value[0]) for value in PROJECTION.to_sky(np.array([180.0]), np.array([200.0])))
    trail = sim.draw_trail(5, EMPTY, 2026112200001, EPOCH, centre, 5.0)
    length_pix = float(trail.rate_arcsec_per_h[0]) * 30 / 3600 / sim.PIXEL_SCALE_ARCSEC
    assert 15 <= length_pix <= 50
    empty = sim.draw_sky(0, EMPTY)
    rendered = _render(empty, trail)
    light = (rendered.variance.astype(np.float64) - _render(empty).variance) * CONDITIONS.electrons_per_njy
    row = rendered.injections[0]
    assert row["kind"] == "trail"
    # Its light is so faint that float32 rounding of the variance (6e-8 * 260 nJy^2 a pixel) adds to the sum.
    rounding = 6e-8 * 300 * CONDITIONS.electrons_per_njy * np.sqrt(light.size)
    assert light.sum() == pytest.approx(row["flux_njy"], rel=1e-3, abs=4 * rounding)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    near = np.hypot(x - row["x"], y - row["y"]) < 60
    assert (light * x)[near].sum() / light[near].sum() == pytest.approx(row["x"], abs=0.02)
    assert (light * y)[near].sum() / light[near].sum() == pytest.approx(row["y"], abs=0.02)
    dx, dy = (x - row["x"])[near], (y - row["y"])[near]
    xx, yy, xy = ((light[near] * part).sum() / light.sum() for part in (dx * dx, dy * dy, dx * dy))
    spread = np.linalg.eigvalsh([[xx, xy], [xy, yy]])
    # Variance of a uniform line is L^2 / 12; the PSF adds alike along and across but for its 5 % ellipticity.
    assert spread[1] - spread[0] == pytest.approx(length_pix**2 / 12, rel=0.05, abs=2.0)

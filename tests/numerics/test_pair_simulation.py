"""Simulated pairs: what the images hold is what truth, masks and variance planes say, to derived tolerances."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
from scipy import ndimage
from scipy.integrate import quad

from transforms.numerics.image_rendering import draw_plane_waves
from transforms.numerics.pair_simulation import REGIMES, PairImage, Regime, SimulatedPair, simulate_pair
from transforms.numerics.sky_simulation import SimulationError

SIDE = 512
CUT_OFF = (1.0 + 6.0**2) ** -2.5  # Moffat flux beyond 6 alpha: 1.2e-4
EMPTY = replace(
    REGIMES["lsst"], stars=0.0, galaxies=0.0, transients=0.0, variables=0.0, movers=0.0, trails=0.0, fast_stars=0.0
)
# a stack so deep that its noise, jitter and small-scale PSF changes are 1e-4 of one exposure's
DEEP = replace(EMPTY, n_stacked=10**8)
# A position wrong by 0.01 pixels changes a PSF by 0.01 * max|P'| = 0.003 of its peak at a FWHM of 4.75 pixels
# (Gaussian: 0.61 / sigma); the rest allows for neighbours' wings.
SHAPE_TOLERANCE = 0.002


@cache
def _pair(name: str, seed: int = 1, side: int = SIDE) -> SimulatedPair:
    return simulate_pair(seed, REGIMES[name], side)


def _worst_residual(
    pixels: np.ndarray, image: PairImage, x: np.ndarray, y: np.ndarray, flux: np.ndarray, half: int = 6
) -> float:
    """Largest |pixels - flux PSF| in small boxes on sources, over the peak of each."""
    worst = 0.0
    for column, row, total in zip(x, y, flux, strict=True):
        i, j = round(column), round(row)
        model = total * image.psf_stamp(column, row, 2 * half + 1, column - i, row - j)
        box = pixels[j - half : j + half + 1, i - half : i + half + 1]
        worst = max(worst, float(np.abs(box - model).max() / np.abs(model).max()))
    return worst


def _is_alone(x: np.ndarray, y: np.ndarray, separation: float = 60.0) -> np.ndarray:
    """Sources away from the edge and from one another."""
    distance = np.hypot(x[:, None] - x, y[:, None] - y) + 1e9 * np.eye(x.size)
    inside = (np.minimum(x, y) > 60) & (np.maximum(x, y) < SIDE - 60)
    return inside & (distance.min(axis=1) > separation)


# --- flux and positions


def test_what_vanished_is_in_the_template_alone_and_negative() -> None:
    pair = simulate_pair(3, replace(DEEP, vanished=60.0, jitter_pix=0.0, template_scale=1.0), SIDE)
    assert set(pair.truth["kind"]) == {"vanished"} and (pair.truth["flux"] < 0.0).all()
    assert pair.light.max() == 0.0
    rows = pair.truth[_is_alone(pair.truth["x"], pair.truth["y"])]
    assert rows.size >= 3
    x, y = pair.template_position(rows["x"], rows["y"])
    assert _worst_residual(pair.template.image, pair.template, x, y, -rows["flux"]) < SHAPE_TOLERANCE


def test_transients_are_where_and_as_bright_as_the_truth_says() -> None:
    pair = simulate_pair(3, replace(EMPTY, transients=60.0), SIDE)
    rows = pair.truth[_is_alone(pair.truth["x"], pair.truth["y"])]
    assert rows.size >= 3
    assert _worst_residual(pair.light, pair.science, rows["x"], rows["y"], rows["flux"]) < SHAPE_TOLERANCE


def test_all_injected_flux_is_in_the_image() -> None:
    pair = simulate_pair(3, replace(EMPTY, transients=60.0, movers=20.0, trails=20.0), SIDE)
    truth = pair.truth[(np.minimum(pair.truth["x"], pair.truth["y"]) > 45)]
    truth = truth[np.maximum(truth["x"], truth["y"]) < SIDE - 45]
    assert {"transient", "mover", "trail"} == set(truth["kind"])
    edge = np.setdiff1d(pair.truth, truth)
    light = pair.light.astype(np.float64)
    inner = light.sum() - sum(_on_image(pair, row) for row in edge)
    # rendering loses the flux beyond 6 alpha and gains less than 2e-4 (tests of `add_point_sources`);
    # sources at the edge are taken off with a stamp that holds all but 2e-4 of theirs
    assert inner == pytest.approx(truth["flux"].sum(), rel=4e-4, abs=4e-4 * edge["flux"].sum())


def _on_image(pair: SimulatedPair, row: np.void) -> float:
    """Flux of a source near the edge that falls on the image, along its track."""
    side, half = 121, 60
    total = 0.0
    steps = np.linspace(-0.5, 0.5, 201) if row["kind"] == "trail" else np.zeros(1)
    for step in steps:
        x, y = row["x"] + step * row["dx"], row["y"] + step * row["dy"]
        i, j = round(x), round(y)
        stamp = pair.science.psf_stamp(x, y, side, x - i, y - j)
        rows, columns = np.arange(j - half, j + half + 1), np.arange(i - half, i + half + 1)
        inside = ((rows >= 0) & (rows < SIDE))[:, None] & ((columns >= 0) & (columns < SIDE))
        total += row["flux"] * stamp[inside].sum() / steps.size
    return float(total)


def test_template_shows_stars_where_the_mappings_put_them_and_scaled() -> None:
    regime = replace(DEEP, stars=120.0, jitter_pix=0.0)
    pair = simulate_pair(5, regime, SIDE)
    x, y = pair.template_position(pair.stars["x"], pair.stars["y"])
    assert np.hypot(x - pair.stars["x"], y - pair.stars["y"]).max() > 1.0  # the grids do differ
    chosen = _is_alone(x, y) & ~pair.stars["is_saturated"]
    assert np.count_nonzero(chosen) >= 3
    flux = regime.template_scale * pair.stars["flux"][chosen]
    # rotation and distortion bend no PSF here, and noise is 1e-4 of 31 electrons against peaks of more than 25
    assert _worst_residual(pair.template.image, pair.template, x[chosen], y[chosen], flux) < SHAPE_TOLERANCE


def test_mapping_there_and_back_is_the_identity() -> None:
    mapping = _pair("lsst").template.mapping
    x, y = np.meshgrid(np.linspace(0, SIDE, 7), np.linspace(0, SIDE, 7))
    back_x, back_y = mapping.to_pixels(*mapping.to_plane(x, y))
    np.testing.assert_allclose([back_x, back_y], [x, y], rtol=0, atol=1e-9)  # rounding at 512 pixels: 1e-13


def test_mapping_jacobian_is_its_derivative() -> None:
    mapping = _pair("lsst").template.mapping
    u, v, step = np.array([-200.0, 31.0]), np.array([140.0, -77.0]), 1e-3
    east = (np.array(mapping.to_pixels(u + step, v)) - np.array(mapping.to_pixels(u - step, v))) / (2 * step)
    north = (np.array(mapping.to_pixels(u, v + step)) - np.array(mapping.to_pixels(u, v - step))) / (2 * step)
    # central differences of a quadratic are exact but for rounding, 512 * 2e-16 / 1e-3
    np.testing.assert_allclose(mapping.jacobian(u, v), np.stack([east.T, north.T], axis=2), rtol=0, atol=1e-9)


def test_fast_stars_were_elsewhere_in_the_template() -> None:
    regime = replace(DEEP, stars=120.0, fast_stars=120.0, jitter_pix=0.0)
    pair = simulate_pair(5, regime, SIDE)
    fast = pair.truth[pair.truth["kind"] == "proper_motion"]
    fast = fast[_is_alone(fast["x"], fast["y"])]
    assert fast.size >= 2
    now = pair.template_position(fast["x"], fast["y"])
    before = pair.template_position(fast["x"] - fast["dx"], fast["y"] - fast["dy"])
    flux = regime.template_scale * fast["flux"]
    assert _worst_residual(pair.template.image, pair.template, *before, flux) < 5 * SHAPE_TOLERANCE
    assert _worst_residual(pair.template.image, pair.template, *now, flux) > 10 * SHAPE_TOLERANCE
    assert _worst_residual(pair.light, pair.science, fast["x"], fast["y"], fast["flux"]) < 5 * SHAPE_TOLERANCE


def test_galaxies_have_the_same_flux_in_both_images() -> None:
    pair = simulate_pair(2, replace(DEEP, galaxies=60.0), SIDE)
    science = pair.light.astype(np.float64)
    template = pair.template.image.astype(np.float64) / pair.regime.template_scale
    x, y = pair.template_position(
        *(position.astype(float) for position in np.meshgrid(np.arange(SIDE), np.arange(SIDE)))
    )
    inner = (slice(80, -80), slice(80, -80))
    back = ndimage.map_coordinates(ndimage.gaussian_filter(template, 24.0), [y, x], order=3)
    blurred = ndimage.gaussian_filter(science, 24.0)
    # Second moments of the PSFs, alpha^2 / 3 a direction, differ by 3.2 pixel^2, which lowers the peak of a blob of
    # sigma 24 by 3.2 / 24^2 = 0.6 %; the distortion changes areas by less than 4 * 2e-7 * 256 * 3 = 0.06 %.
    assert np.abs(back - blurred)[inner].max() < 0.008 * blurred.max()


# --- noise and masks


@pytest.mark.parametrize("name", ["lsst", "undersampled"])
def test_variance_planes_are_the_variance_of_the_noise(name: str) -> None:
    pair = _pair(name)
    regime, science, template = pair.regime, pair.science, pair.template
    expected = science.variance.astype(np.float64) - regime.read_noise_e**2
    usable = ~(science.bad | science.cosmic_ray | science.hidden_cosmic_ray)
    pulls = {"science": ((science.image - expected) / np.sqrt(science.variance))[usable]}
    electrons = template.variance.astype(np.float64) / regime.template_scale**2 * regime.n_stacked
    expected = regime.template_scale * (electrons - regime.read_noise_e**2 - regime.sky_electrons_pix)
    pulls["template"] = ((template.image - expected) / np.sqrt(template.variance)).ravel()
    for pull in pulls.values():
        assert abs(pull.mean()) < 5 / np.sqrt(pull.size)
        assert abs(pull.std() - 1) < 5 / np.sqrt(2 * pull.size)
        neighbours = pull[1:] * pull[:-1]  # mostly neighbouring pixels: white noise
        assert abs(neighbours.mean()) < 5 / np.sqrt(pull.size)


def test_science_light_and_sky_make_up_the_variance() -> None:
    pair = _pair("lsst")
    sky = pair.science.variance - pair.light - pair.regime.read_noise_e**2
    faint = (pair.light < 1e4) & ~ndimage.binary_dilation(pair.science.saturated, iterations=3)
    # a plane within 5 % of the mean along each axis; float32 keeps 1e4 to 1e-3
    assert np.abs(sky[faint] / pair.regime.sky_electrons_pix - 1).max() < 0.1
    corners = sky[0, 0] + sky[-1, -1] - sky[0, -1] - sky[-1, 0]
    assert abs(corners) < 0.1
    assert np.ptp(sky[faint]) > 1.0  # there is a gradient


def test_saturated_pixels_are_full_and_masked_and_bleed_along_columns() -> None:
    pair = _pair("crowded", 2)
    full = pair.science.variance >= np.float32(pair.regime.full_well_e + pair.regime.read_noise_e**2)
    np.testing.assert_array_equal(full, pair.science.saturated)
    labels, count = ndimage.label(pair.science.saturated, structure=np.ones((3, 3)))
    sizes = [(box[0].stop - box[0].start, box[1].stop - box[1].start) for box in ndimage.find_objects(labels)]
    tall, wide = max(sizes)
    assert count > 3 and tall > 2 * wide  # without bleeds a saturated core is round
    bright = pair.stars[pair.stars["flux"] > 6e6]
    for star in bright[_is_alone(bright["x"], bright["y"], 0.0)]:
        assert pair.science.saturated[round(star["y"]), round(star["x"])]
        assert star["is_saturated"]


def test_hidden_cosmic_rays_shine_and_no_mask_knows_them() -> None:
    pairs = [_pair("lsst", seed) for seed in range(1, 5)]
    hidden = [pair.science.hidden_cosmic_ray for pair in pairs]
    for pair, hits in zip(pairs, hidden, strict=True):
        assert not np.any(hits & pair.science.masked)
        excess = pair.science.image - (pair.science.variance - pair.regime.read_noise_e**2)
        assert np.all(excess[hits] > 300.0 - 6 * np.sqrt(pair.science.variance[hits]))
    part = sum(hits.sum() for hits in hidden) / sum(
        (pair.science.cosmic_ray | hits).sum() for pair, hits in zip(pairs, hidden, strict=True)
    )
    assert 0.02 < part < 0.6  # 1 of 5 hits, about 20 hits of some 8 pixels in the four


def test_bad_columns_are_dead_or_hot() -> None:
    pair = _pair("lsst")
    bad = pair.science.bad
    assert bad.any() and bad.any(axis=0).sum() < 20
    values = pair.science.image[bad]
    assert np.all((values == 0) | (values > 5000))


# --- the point of it: hard in the ways real pairs are


def test_psf_varies_smoothly_and_on_small_scales_in_both_images() -> None:
    pair = _pair("lsst", side=1024)
    position = np.linspace(0, 1023, 65)
    x, y = (axis.ravel() for axis in np.meshgrid(position, position))
    u, v = x / 512 - 1, y / 512 - 1
    terms = np.stack([u**i * v**j for i in range(4) for j in range(4 - i)], axis=1)
    for image, calm in ((pair.science, 1.0), (pair.template, np.sqrt(5.0))):
        fwhm, e1, _ = image.psfs[0].at(x, y)
        relative = fwhm / fwhm.mean()
        assert np.ptp(relative) > 0.05  # slopes of 4 % to either side
        for values, rms in ((relative, pair.regime.psf_ripple / calm), (e1, pair.regime.shape_ripple / calm)):
            left = values - terms @ np.linalg.lstsq(terms, values, rcond=None)[0]
            # a cubic takes up waves longer than the image: about half of the power
            assert 0.3 * rms < left.std() < 1.5 * rms


def test_plane_waves_have_the_rms_asked_for() -> None:
    rng = np.random.default_rng(4)
    waves = draw_plane_waves(rng, (0.5, 2.0), 50.0, 500.0)
    x, y = rng.uniform(0, 1e5, (2, 20_000))
    values = waves.at(x, y)
    # variance of sums of 32 cosines over 20 000 independent positions: relative error below 1 / sqrt(20 000)
    np.testing.assert_allclose(values.std(axis=1), [0.5, 2.0], rtol=5 / np.sqrt(20_000))


def test_jitter_moves_the_image_off_its_wcs() -> None:
    pair = simulate_pair(6, replace(EMPTY, transients=200.0, jitter_pix=0.5), SIDE)
    u, v = pair.science.mapping.to_plane(pair.truth["x"], pair.truth["y"])
    jitter = pair.science.mapping.jitter
    assert jitter is not None
    off = np.hypot(*jitter.at(u, v))
    assert 0.1 < np.sqrt(np.mean(off**2)) < 1.5  # 0.7 expected; few waves longer than the image
    rows = pair.truth[_is_alone(pair.truth["x"], pair.truth["y"], 24.0)][:20]
    assert _worst_residual(pair.light, pair.science, rows["x"], rows["y"], rows["flux"], 3) < 0.05


# --- truth


def test_truth_holds_every_kind_and_both_signs() -> None:
    truth = _pair("lsst", side=1024).truth
    assert set(truth["kind"]) == {"transient", "variable", "mover", "trail", "proper_motion"}
    flux = truth["flux"]
    assert np.any(flux[truth["kind"] == "variable"] < 0) and np.any(flux[truth["kind"] == "variable"] > 0)
    assert np.all(flux[truth["kind"] != "variable"] > 0)
    snr = truth["snr"][truth["kind"] == "transient"]
    assert snr.min() >= 3.0 - 1e-9 and snr.max() <= 50.0 + 1e-9
    # log-uniform: the median is the geometric mean 12.2, with an error of 0.5 ln(50 / 3) / sqrt(n) in the logarithm
    assert abs(np.log(np.median(snr) / np.sqrt(150.0))) < 4 * 0.5 * np.log(50 / 3) / np.sqrt(snr.size)


def test_snr_against_a_noiseless_template_is_that_of_a_matched_filter() -> None:
    pair = simulate_pair(3, replace(DEEP, transients=60.0), SIDE)
    for row in pair.truth[pair.truth["good_pixels"]]:
        psf = pair.science.psf_stamp(row["x"], row["y"], 63)
        i, j = round(row["x"]), round(row["y"])
        sky = float(pair.science.variance[j, i] - pair.light[j, i])
        # the sky's gradient over a stamp is below 1e-3
        assert row["snr"] == pytest.approx(row["flux"] * np.sqrt(np.sum(psf**2) / sky), rel=3e-3)


def test_snr_falls_with_the_noise_of_the_template() -> None:
    deep, shallow = (simulate_pair(3, replace(EMPTY, transients=60.0, n_stacked=n), SIDE).truth for n in (10**8, 1))
    np.testing.assert_allclose(deep["snr"], shallow["snr"], rtol=1e-12)  # the S/N is drawn, the flux follows
    # With equal white noise and Gaussian PSFs of variance s^2 and t^2 the S/N^2 falls to a part
    # a int_0^1 x^(a-1) / (1 + x) dx with a = s^2 / (s^2 - t^2) = 1 / (1 - (3.75 / 4.75)^2) = 2.65: 0.59, and not to the
    # half that it would be at equal PSFs. Moffats are within 3 % of it in flux.
    a = 1.0 / (1.0 - (EMPTY.fwhm_template_pix / EMPTY.fwhm_science_pix) ** 2)
    part = a * quad(lambda x: x ** (a - 1) / (1 + x), 0.0, 1.0)[0]
    np.testing.assert_allclose(shallow["flux"] / deep["flux"], 1 / np.sqrt(part), rtol=0.03)


def test_good_pixels_are_off_masks_and_edges_in_both_images() -> None:
    pair = _pair("crowded", 2)
    good = pair.truth[pair.truth["good_pixels"]]
    assert 0.5 < good.size / pair.truth.size < 1
    x, y = pair.template_position(good["x"], good["y"])
    assert not pair.science.masked[np.rint(good["y"]).astype(int), np.rint(good["x"]).astype(int)].any()
    assert not pair.template.masked[np.rint(y).astype(int), np.rint(x).astype(int)].any()
    assert np.minimum(good["x"], good["y"]).min() > 14 and np.maximum(good["x"], good["y"]).max() < SIDE - 15


def test_steady_stars_are_not_in_the_truth() -> None:
    pair = _pair("lsst")
    steady = pair.stars[pair.stars["is_steady"]]
    changed = pair.truth[np.isin(pair.truth["kind"], ["variable", "proper_motion"])]
    distance = np.hypot(steady["x"][:, None] - changed["x"], steady["y"][:, None] - changed["y"])
    assert changed.size > 0 and distance.min() > 0
    assert np.count_nonzero(~pair.stars["is_steady"]) >= changed.size


# --- as a tool


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, again, other = (simulate_pair(seed, REGIMES["lsst"], 256) for seed in (7, 7, 8))
    for name in ("image", "variance", "bad", "saturated", "cosmic_ray", "hidden_cosmic_ray"):
        for image, repeated in ((first.science, again.science), (first.template, again.template)):
            assert getattr(image, name).tobytes() == getattr(repeated, name).tobytes()
    assert first.truth.tobytes() == again.truth.tobytes() and first.stars.tobytes() == again.stars.tobytes()
    assert first.science.image.tobytes() != other.science.image.tobytes()


def test_regimes_are_what_their_names_say() -> None:
    sharp, coarse, crowded, usual = (REGIMES[name] for name in ("sharp_science", "undersampled", "crowded", "lsst"))
    assert sharp.fwhm_science_pix < sharp.fwhm_template_pix and usual.fwhm_science_pix > usual.fwhm_template_pix
    assert coarse.fwhm_science_pix < 2.5
    assert crowded.stars == 10 * usual.stars
    same = {field.name for field in fields(Regime)} - {"stars"}
    assert all(getattr(crowded, name) == getattr(usual, name) for name in same)


@pytest.mark.parametrize(("seed", "side"), [(1, 255), (1, 8193), (-1, 512)])
def test_what_cannot_be_simulated_is_refused_with_its_value(seed: int, side: int) -> None:
    with pytest.raises(SimulationError, match=str(seed if seed < 0 else side)):
        simulate_pair(seed, REGIMES["lsst"], side)

"""Sources: groups of significant pixels, split where they are two, and what circles around them hold."""

from __future__ import annotations

import numpy as np
import pytest
import sep
from scipy import ndimage
from simulated_pair import Stars, expose, random_stars, render

from transforms.numerics.psf_modelling import detect_sources, remeasured
from transforms.numerics.source_extraction import circle_sums, extract_sources, half_light_radii

SHAPE = (300, 340)
EVERYTHING_GOOD = np.zeros(SHAPE, dtype=bool)


def field(seed: int, n_stars: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """A crowded field without sky: image and variance."""
    truth = render(SHAPE, random_stars(np.random.default_rng([seed, 0]), SHAPE, n_stars), 4.0)
    exposure = expose(np.random.default_rng([seed, 1]), truth, sky=0.0, sky_variance=400.0)
    return exposure.image.astype(np.float32), exposure.variance.astype(np.float32)


def test_without_splitting_sources_are_the_connected_groups_of_pixels_above_the_threshold() -> None:
    image, variance = field(1)
    bad = np.random.default_rng(2).random(SHAPE) < 0.02
    found = extract_sources(image, variance, bad, saddle_snr=np.inf)
    significant = (image > 0) & (image**2 > np.float32(9.0) * variance) & ~bad
    labels, n_labels = ndimage.label(significant, np.ones((3, 3)))
    number = ndimage.sum_labels(significant, labels, np.arange(1, n_labels + 1))
    flux = ndimage.sum_labels(image, labels, np.arange(1, n_labels + 1))[number >= 5]
    x = ndimage.sum_labels(image * np.arange(SHAPE[1]), labels, np.arange(1, n_labels + 1))[number >= 5] / flux
    order = np.argsort(-flux)
    assert len(flux) > 50
    np.testing.assert_allclose(found.flux, flux[order], rtol=1e-6)
    np.testing.assert_allclose(found.x, x[order], rtol=1e-6)
    np.testing.assert_array_equal(np.sort(found.n_pix), np.sort(number[number >= 5]))


def test_transposed_image_has_the_same_sources_transposed() -> None:
    image, variance = field(3)
    found = extract_sources(image, variance, EVERYTHING_GOOD)
    turned = extract_sources(image.T.copy(), variance.T.copy(), EVERYTHING_GOOD.T.copy())
    for name, other in (("flux", "flux"), ("x", "y"), ("y", "x"), ("major", "major"), ("n_pix", "n_pix")):
        np.testing.assert_allclose(getattr(found, name), getattr(turned, other), rtol=1e-6)


def test_scaled_image_has_the_same_sources() -> None:
    image, variance = field(4)
    found = extract_sources(image, variance, EVERYTHING_GOOD)
    scaled = extract_sources(np.float32(4.0) * image, np.float32(16.0) * variance, EVERYTHING_GOOD)
    np.testing.assert_array_equal(scaled.flux, 4.0 * found.flux)
    np.testing.assert_array_equal(scaled.x, found.x)


# half the FWHM is within one peak, 1.6 FWHM has a saddle at a quarter of the peaks
@pytest.mark.parametrize(("separation_pix", "n_sources"), [(2.0, 1), (6.5, 2)])
def test_two_stars_are_one_source_until_there_is_a_saddle(separation_pix: float, n_sources: int) -> None:
    stars = Stars(np.array([150.2, 150.2 + separation_pix]), np.array([100.4, 100.4]), np.array([5e4, 4e4]))
    exposure = expose(np.random.default_rng(5), render(SHAPE, stars, 4.0), sky=0.0, sky_variance=400.0)
    found = extract_sources(exposure.image, exposure.variance, exposure.bad)
    assert len(found.x) == n_sources
    if n_sources == 2:
        np.testing.assert_allclose(np.sort(found.x), stars.x, atol=0.5)  # each holds some of the other's wing


def test_noise_alone_has_no_sources_and_does_not_split_a_bright_star() -> None:
    random = np.random.default_rng(6)
    noise = random.normal(0.0, 20.0, SHAPE).astype(np.float32)
    variance = np.full(SHAPE, 400.0, dtype=np.float32)
    assert len(extract_sources(noise, variance, EVERYTHING_GOOD).x) == 0
    stars = Stars(np.array([150.2]), np.array([100.4]), np.array([2e6]))
    exposure = expose(random, render(SHAPE, stars, 8.0), sky=0.0, sky_variance=400.0)
    assert len(extract_sources(exposure.image, exposure.variance, EVERYTHING_GOOD).x) == 1


def test_half_light_radii_and_circle_sums_are_those_of_sep() -> None:
    image, variance = field(7, n_stars=60)
    bad = EVERYTHING_GOOD
    found = extract_sources(image, variance, bad)
    reach = np.maximum(6.0 * found.major, 6.0)
    inside = np.flatnonzero((np.minimum(found.x, found.y) > 30) & (found.x < SHAPE[1] - 31) & (found.y < SHAPE[0] - 31))
    x, y, flux, reach = found.x[inside], found.y[inside], found.flux[inside], reach[inside]
    radii = half_light_radii(image, bad, x, y, flux, reach)
    expected, _ = sep.flux_radius(image, x, y, reach, 0.5, normflux=flux, subpix=3)
    # sep has 64 steps to the reach and interpolates between: a tenth of a step of 0.2 pixels, squares of 3 x 3 alike
    np.testing.assert_allclose(radii, expected, atol=0.05)
    sums, noise2 = circle_sums(image, variance, bad, x, y, np.full(len(x), 7.0))
    oracle, error, _ = sep.sum_circle(image, x, y, 7.0, var=variance, subpix=1)
    np.testing.assert_allclose(sums, oracle, rtol=1e-5, atol=0.1)
    np.testing.assert_allclose(noise2, error**2, rtol=1e-5)


def test_bad_pixels_belong_to_no_source_and_no_circle() -> None:
    image, variance = field(8, n_stars=5)
    bad = EVERYTHING_GOOD.copy()
    bad[:, 100:] = True
    image[:, 100:] = np.nan
    found = extract_sources(image, variance, bad)
    assert np.all(found.x < 100)
    x, y = np.array([99.0]), np.array([50.0])
    flux, noise2 = circle_sums(image, variance, bad, x, y, np.array([5.0]))
    assert np.isfinite(flux).all()
    assert noise2[0] < 0.6 * np.pi * 25.0 * variance[:, :100].max()
    assert np.isfinite(half_light_radii(image, bad, x, y, np.array([1e9]), np.array([20.0]))).all()


def test_remeasured_sources_have_the_fluxes_and_widths_of_the_other_image() -> None:
    stars = Stars(np.array([60.3, 200.7, 260.1]), np.array([70.2, 150.6, 240.9]), np.array([3e4, 8e4, 5e4]))
    first = expose(np.random.default_rng(9), render(SHAPE, stars, 3.5), sky=0.0, sky_variance=400.0)
    brightness = np.array([2.0, 0.5, 1.0])
    others = Stars(stars.x, stars.y, stars.flux * brightness)
    second = expose(np.random.default_rng(10), render(SHAPE, others, 4.5), sky=0.0, sky_variance=400.0)
    second.bad[241, 261] = True
    sources = detect_sources(first.image, first.variance, first.bad)
    found = remeasured(sources, second.image, second.variance, second.bad)
    order = np.argsort(-others.flux)
    np.testing.assert_allclose(found.x, stars.x[order], atol=0.2)
    # a circle of three half-light radii of the narrower image holds nine tenths of the light of the wider
    np.testing.assert_allclose(found.flux[:2], 0.93 * others.flux[order][:2], rtol=0.05)
    np.testing.assert_allclose(found.half_light_radius_pix[:2], 0.57 * 4.5, rtol=0.1)
    np.testing.assert_array_equal(found.clean, [True, False, True] if order[1] == 2 else [True, True, False])

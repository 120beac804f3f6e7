"""PSF from stars: known Moffat profiles are recovered, and what is not a star does not enter."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_pair import SimulatedImage, Stars, expose, moffat_stamp, random_stars, render

from transforms.numerics.background import subtract_background
from transforms.numerics.psf_modelling import (
    PsfEstimate,
    PsfEstimationError,
    detect_sources,
    estimate_psf,
    psf_fwhm_pix,
)

SHAPE = (400, 400)


def star_field(seed: int, fwhm_pix: float, n_stars: int = 120, gradient: float = 0.0) -> SimulatedImage:
    rng = np.random.default_rng([seed, 0])
    truth = render(SHAPE, random_stars(rng, SHAPE, n_stars), fwhm_pix, gradient)
    return expose(np.random.default_rng([seed, 1]), truth, sky=400.0, sky_variance=400.0)


def measured(exposure: SimulatedImage) -> PsfEstimate:
    image = subtract_background(exposure.image, exposure.bad).image
    return estimate_psf(image, exposure.variance, exposure.bad)


# 18 stars, noise of a pixel of a star of median S/N 70: 0.05 of its peak, over sqrt(18) = 0.012; worst of 200 pixels in
# the core 3 sigma. Undersampled stars (2.5 pixels) are also smoothed by the sub-pixel shift, see test_warping
@pytest.mark.parametrize(("fwhm_pix", "fwhm_tolerance"), [(2.5, 0.05), (3.5, 0.03), (4.75, 0.03)])
def test_moffat_psf_is_recovered(fwhm_pix: float, fwhm_tolerance: float) -> None:
    tolerance = 0.035
    result = measured(star_field(0, fwhm_pix))
    truth = moffat_stamp(15, fwhm_pix)
    assert result.psf.shape == (31, 31)
    assert result.psf.sum() == pytest.approx(1.0, abs=1e-12)
    assert result.n_stars >= 5
    assert np.max(np.abs(result.psf - truth)) < tolerance * truth.max()
    assert result.fwhm_pix == pytest.approx(fwhm_pix, rel=fwhm_tolerance)
    # flux of a star measured by least squares with this PSF: the bias that later stages would inherit; the errors of
    # some 30 independent pixels within the core average
    assert np.sum(result.psf * truth) / np.sum(result.psf**2) == pytest.approx(1.0, abs=0.015)


def test_psf_is_centred() -> None:
    psf = measured(star_field(2, 4.0)).psf
    offset = np.arange(-15, 16)
    weight = moffat_stamp(15, 4.0) * psf
    # centroids of ~30 stars of S/N > 30: fwhm / (2.35 * 30 * sqrt(30)) = 0.01 pixels
    assert abs(np.sum(weight * offset[None, :]) / weight.sum()) < 0.02
    assert abs(np.sum(weight * offset[:, None]) / weight.sum()) < 0.02


def test_varying_psf_gives_its_mean() -> None:
    result = measured(star_field(3, 4.0, gradient=0.06))
    # mean of the simulated factor 1 + 0.06 (0.7 u + 0.5 v^2 - 0.2) over the image is 0.998; it runs over +-6 %
    assert result.fwhm_pix == pytest.approx(4.0, rel=0.03)


def test_flux_scale_does_not_matter() -> None:
    exposure = star_field(4, 4.0)
    plain = measured(exposure)
    scaled = measured(
        SimulatedImage(exposure.image * 8, exposure.variance * 64, exposure.bad, exposure.truth)  # powers of two: exact
    )
    np.testing.assert_allclose(scaled.psf, plain.psf, atol=1e-4 * plain.psf.max())
    assert scaled.n_stars == plain.n_stars


def test_saturated_stars_and_cosmic_rays_do_not_enter() -> None:
    exposure = star_field(5, 4.0)
    image, bad = exposure.image.copy(), exposure.bad.copy()
    saturated = image > 3000.0
    image[saturated], bad[saturated] = 3000.0, True
    rng = np.random.default_rng(50)
    rows, columns = rng.integers(20, 380, size=(2, 40))
    image[rows, columns] += 5000.0  # unmarked hits of one pixel
    image[rows, columns + 1] += 2000.0
    result = measured(SimulatedImage(image, exposure.variance, bad, exposure.truth))
    truth = moffat_stamp(15, 4.0)
    # fewer and fainter stars than in the unspoilt field (tolerance 3.5 %)
    assert np.max(np.abs(result.psf - truth)) < 0.05 * truth.max()
    assert result.fwhm_pix == pytest.approx(4.0, rel=0.03)


def test_galaxies_do_not_enter() -> None:
    rng = np.random.default_rng(6)
    stars, galaxies = random_stars(rng, SHAPE, 70, flux_min=8e3), random_stars(rng, SHAPE, 60, flux_min=8e3)
    truth = render(SHAPE, stars, 4.0)
    for index, size in enumerate(rng.uniform(5.5, 12.0, 60)):
        one = Stars(galaxies.x[[index]], galaxies.y[[index]], galaxies.flux[[index]])
        truth += render(SHAPE, one, size)
    result = measured(expose(rng, truth, sky=400.0, sky_variance=400.0))
    assert result.fwhm_pix == pytest.approx(4.0, rel=0.05)


def test_detected_sources_are_the_stars() -> None:
    rng = np.random.default_rng(7)
    stars = Stars(np.array([60.3, 200.7, 330.1]), np.array([70.2, 150.6, 300.9]), np.array([2e4, 8e4, 4e4]))
    exposure = expose(rng, render(SHAPE, stars, 4.0), sky=0.0, sky_variance=400.0)
    sources = detect_sources(exposure.image, exposure.variance, exposure.bad)
    order = [1, 2, 0]
    # centroid error is about fwhm / S/N = 4 / 80 at worst
    np.testing.assert_allclose(sources.x, stars.x[order], atol=0.1)
    np.testing.assert_allclose(sources.y, stars.y[order], atol=0.1)
    assert sources.clean.all()
    # a Moffat star of beta 3.5 holds half its light within 0.57 FWHM; isophotal fluxes are some percent short
    np.testing.assert_allclose(sources.half_light_radius_pix, 0.57 * 4.0, rtol=0.1)


def test_bad_pixel_in_the_core_makes_a_source_unclean() -> None:
    stars = Stars(np.array([60.0, 200.0]), np.array([70.0, 150.0]), np.array([5e4, 4e4]))
    exposure = expose(np.random.default_rng(8), render(SHAPE, stars, 4.0), sky=0.0, sky_variance=400.0)
    exposure.bad[71, 61] = True
    sources = detect_sources(exposure.image, exposure.variance, exposure.bad)
    clean = {round(x): bool(ok) for x, ok in zip(sources.x, sources.clean, strict=True)}
    assert clean[200]
    assert not clean[60]


@pytest.mark.parametrize("n_stars", [0, 3])
def test_too_few_stars_are_refused_with_their_number(n_stars: int) -> None:
    rng = np.random.default_rng(9)
    x = np.linspace(80, 320, n_stars)
    truth = render(SHAPE, Stars(x, x, np.full(n_stars, 5e4)), 4.0)
    exposure = expose(rng, truth, sky=0.0, sky_variance=400.0)
    with pytest.raises(PsfEstimationError, match=rf"{n_stars} sources.*5 are needed"):
        estimate_psf(exposure.image, exposure.variance, exposure.bad)


@pytest.mark.parametrize("fwhm_pix", [2.0, 3.0, 5.0, 8.0])
def test_fwhm_of_a_moffat_stamp(fwhm_pix: float) -> None:
    # cubic spline between pixels: 1 % from 3 pixels on, 3 % at 2
    assert psf_fwhm_pix(moffat_stamp(20, fwhm_pix)) == pytest.approx(fwhm_pix, rel=0.01 if fwhm_pix >= 3 else 0.03)


def test_fwhm_of_an_ellipse_is_the_geometric_mean_of_its_axes() -> None:
    offset = np.arange(-20, 21)
    psf = np.exp(-0.5 * ((offset[None, :] / 3.0) ** 2 + (offset[:, None] / 1.5) ** 2))
    assert psf_fwhm_pix(psf) == pytest.approx(2.3548 * np.sqrt(3.0 * 1.5), rel=0.01)


@pytest.mark.parametrize(
    "psf", [np.ones((4, 4)), np.ones((5, 7)), np.ones(9), np.zeros((7, 7)), np.full((7, 7), np.nan), np.ones((3, 3))]
)
def test_what_is_no_psf_is_refused(psf: np.ndarray) -> None:
    with pytest.raises(PsfEstimationError):
        psf_fwhm_pix(psf)

"""PSF from stars: known profiles are recovered where there are no stars, and what is not a star does not enter."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_pair import SimulatedImage, Stars, expose, moffat_stamp, random_stars, render

from transforms.numerics.background import subtract_background
from transforms.numerics.image_rendering import PsfField, add_point_sources, psf_image
from transforms.numerics.psf_modelling import (
    PsfEstimate,
    PsfEstimationError,
    PsfModel,
    constant_psf,
    detect_sources,
    estimate_psf,
    fit_psf_model,
    psf_fwhm_pix,
)

SHAPE = (400, 400)
LARGE = (900, 900)


def star_field(seed: int, fwhm_pix: float, n_stars: int = 120, gradient: float = 0.0) -> SimulatedImage:
    rng = np.random.default_rng([seed, 0])
    truth = render(SHAPE, random_stars(rng, SHAPE, n_stars), fwhm_pix, gradient)
    return expose(np.random.default_rng([seed, 1]), truth, sky=400.0, sky_variance=400.0)


def measured(exposure: SimulatedImage) -> PsfEstimate:
    image = subtract_background(exposure.image, exposure.bad).image
    return estimate_psf(image, exposure.variance, exposure.bad)


def varying(fwhm_pix: float, shape: tuple[int, int] = LARGE) -> PsfField:
    """Width changes by +-8 %, ellipticity by +-0.03 on each component."""
    return PsfField(shape, fwhm_pix, 0.03, -0.02, 0.05, 0.04, -0.03, 0.03, -0.02)


def expose_field(
    field: PsfField, seed: int, n_stars: int, flux_min: float = 3000.0, sky_variance: float = 400.0
) -> SimulatedImage:
    """Pixel-integrated stars everywhere, also across the edges; no sky."""
    stars = random_stars(np.random.default_rng([seed, 0]), field.shape, n_stars, flux_min)
    truth = np.zeros(field.shape)
    add_point_sources(truth, stars.x, stars.y, stars.flux, *field.at(stars.x, stars.y), 0.01)
    return expose(np.random.default_rng([seed, 1]), truth, sky=0.0, sky_variance=sky_variance)


def fitted(exposure: SimulatedImage, spatial_order: int = 2) -> PsfModel:
    return fit_psf_model(exposure.image, exposure.variance, exposure.bad, spatial_order=spatial_order)


def errors(model: PsfModel, field: PsfField) -> tuple[np.ndarray, np.ndarray]:
    """At 40 places, of the PSF (largest, over its peak), and of fluxes by least squares with it."""
    ny, nx = field.shape
    x, y = np.random.default_rng(9).uniform(10, (nx - 10, ny - 10), (40, 2)).T
    found = model.at(x, y)
    truth = np.array([psf_image(field, *place, found.shape[1]) for place in zip(x, y, strict=True)])
    largest = np.max(np.abs(found - truth), axis=(1, 2)) / truth.max(axis=(1, 2))
    return largest, np.sum(found * truth, axis=(1, 2)) / np.sum(found**2, axis=(1, 2)) - 1.0


# 18 stars, noise of a pixel of a star of median S/N 70: 0.05 of its peak, over sqrt(18) = 0.012; a profile with five
# parameters has less; worst of 200 pixels in the core 2 sigma
@pytest.mark.parametrize("fwhm_pix", [2.5, 3.5, 4.75])
def test_moffat_psf_is_recovered(fwhm_pix: float) -> None:
    result = measured(star_field(0, fwhm_pix))
    truth = moffat_stamp(len(result.psf) // 2, fwhm_pix)
    assert result.psf.sum() == pytest.approx(1.0, abs=1e-12)
    assert result.n_stars >= 5
    assert np.max(np.abs(result.psf - truth)) < 0.025 * truth.max()
    assert result.fwhm_pix == pytest.approx(fwhm_pix, rel=0.02)
    # flux of a star measured by least squares with this PSF: the bias that later stages would inherit; the errors of
    # some 30 independent pixels within the core average
    assert np.sum(result.psf * truth) / np.sum(result.psf**2) == pytest.approx(1.0, abs=0.01)


# 90 (6 pixels: isolation takes them) to 250 stars of median S/N 100: the width of a Moffat profile is known to
# 0.7 / 100 / sqrt(100 / 6 terms) = 0.17 %, fluxes, which go with its square, to 0.34 %; 0.1 to 0.3 % measured.
# Two seeds, as the sky below the stars gives an error common to all places
@pytest.mark.parametrize("fwhm_pix", [2.0, 2.5, 4.0, 6.0])
def test_varying_psf_is_recovered_between_stars(fwhm_pix: float) -> None:
    field = varying(fwhm_pix)
    largest, fluxes = np.hstack([errors(fitted(expose_field(field, seed, 450)), field) for seed in (1, 2)])
    assert np.median(largest) < 0.006
    assert np.max(largest) < 0.05  # in a corner, where a prediction is as uncertain as that of one in eight stars
    assert abs(np.mean(fluxes)) < 0.003
    assert np.sqrt(np.mean(fluxes**2)) < 0.005


def test_one_psf_everywhere_is_worse_where_it_varies() -> None:
    field = varying(4.0)
    exposure = expose_field(field, 1, 450)
    constant, _ = errors(fitted(exposure, 0), field)
    followed, _ = errors(fitted(exposure, 2), field)
    assert np.median(followed) < 0.25 * np.median(constant)


def test_profile_that_is_no_moffat_is_recovered() -> None:
    # two Gaussians, sampled; the narrow one elliptical: the best single profile leaves 2.8 % of the peak
    stars = random_stars(np.random.default_rng(3), (820, 820), 350, 3000.0)
    truth = np.zeros(LARGE)
    offset = np.arange(-30, 31)

    def profile(dx: float, dy: float) -> np.ndarray:
        u, v = offset[None, :] - dx, offset[:, None] - dy
        core = 0.7 / 1.9 / 2.3 * np.exp(-0.5 * ((u / 1.9) ** 2 + (v / 2.3) ** 2))
        return (core + 0.3 / 3.4**2 * np.exp(-0.5 * (u**2 + v**2) / 3.4**2)) / (2.0 * np.pi)

    for x, y, flux in zip(stars.x + 40, stars.y + 40, stars.flux, strict=True):
        i, j = round(x), round(y)
        truth[j - 30 : j + 31, i - 30 : i + 31] += flux * profile(x - i, y - j)
    exposure = expose(np.random.default_rng(4), truth, sky=0.0, sky_variance=400.0)
    psf = fitted(exposure).at_centre()
    half = len(psf) // 2
    expected = profile(0.0, 0.0)[30 - half : 31 + half, 30 - half : 31 + half]
    expected = expected / expected.sum()
    assert np.max(np.abs(psf - expected)) < 0.014 * expected.max()
    # a pedestal of 1e-4 of the peak cannot be told from sky: 850 pixels of it hold 0.3 % of the flux (peak 0.025), and
    # the rim of the stamp is no better known than three times that
    assert np.sum(psf * expected) / np.sum(psf**2) == pytest.approx(1.0, abs=0.012)


@pytest.mark.parametrize("fwhm_pix", [4.0, 6.0])
def test_crowded_field_gives_unbiased_fluxes(fwhm_pix: float) -> None:
    """1,500 stars on 400 x 400 pixels: a bright one for each 5 to 15 beams; before, fluxes came out 4 % high."""
    ratios = []
    for seed in range(4):
        truth = render(SHAPE, random_stars(np.random.default_rng([seed, 1500]), SHAPE, 1500), fwhm_pix)
        psf = measured(expose(np.random.default_rng([seed, 1]), truth, sky=400.0, sky_variance=400.0)).psf
        expected = moffat_stamp(len(psf) // 2, fwhm_pix)
        ratios.append(np.sum(psf * expected) / np.sum(psf**2) - 1.0)
    # per field 0.6 to 0.8 % over six seeds: faint neighbours
    assert np.sqrt(np.mean(np.square(ratios))) < 0.012


def test_order_is_lowered_where_stars_are_few() -> None:
    field = varying(4.0)
    assert fitted(expose_field(field, 1, 450)).spatial_order == 4  # twice the order of the widths
    few = fitted(expose_field(field, 5, 12, 2e4))
    assert 5 <= few.n_stars <= 12
    assert few.spatial_order == 0
    # width within its change over the image
    assert few.fwhm_pix == pytest.approx(4.1, rel=0.06)


def test_stars_in_one_corner_do_not_say_how_the_psf_changes() -> None:
    stars = random_stars(np.random.default_rng(1), (300, 300), 60, 3000.0)
    field = varying(4.0)
    truth = np.zeros(LARGE)
    add_point_sources(truth, stars.x, stars.y, stars.flux, *field.at(stars.x, stars.y), 0.01)
    model = fitted(expose(np.random.default_rng(2), truth, sky=0.0, sky_variance=400.0))
    assert model.spatial_order == 0


def test_rotated_image_gives_rotated_psf() -> None:
    exposure = expose_field(varying(4.0), 1, 300)
    nx = LARGE[1]
    model = fitted(exposure)
    rotated = fit_psf_model(np.rot90(exposure.image), np.rot90(exposure.variance), exposure.bad)
    # the pixel (x, y) comes to (y, nx - 1 - x) under rot90 of [y, x] images. The choice of stars depends on the order
    # of pixels where sources blend: a few of the 150 stars differ, hence a tenth of the PSF's own error of 0.5 %
    x, y = np.array([100.0, 450.0, 800.0]), np.array([700.0, 449.5, 120.0])
    there = rotated.at(y, nx - 1 - x)
    here = np.rot90(model.at(x, y), axes=(1, 2))
    assert np.max(np.abs(there - here)) < 2e-3 * here.max()


def test_shifted_image_gives_the_same_psf() -> None:
    exposure = expose_field(PsfField(LARGE, 4.0, e1=0.05), 1, 300)
    model = fitted(exposure, 0)
    moved = fit_psf_model(exposure.image[7:, 11:], exposure.variance[7:, 11:], exposure.bad[7:, 11:], spatial_order=0)
    assert np.max(np.abs(moved.at_centre() - model.at_centre())) < 2e-3 * model.at_centre().max()


def test_psf_is_normalised_and_the_same_one_by_one() -> None:
    model = fitted(expose_field(varying(4.0), 1, 450))
    x, y = np.array([0.0, 450.0, 899.0, 2000.0]), np.array([0.0, 450.0, 899.0, -50.0])
    psfs = model.at(x, y)
    np.testing.assert_allclose(psfs.sum(axis=(1, 2)), 1.0, atol=1e-12)
    np.testing.assert_array_equal(psfs[1], model.at(450.0, 450.0)[0])
    np.testing.assert_array_equal(psfs[3], model.at(899.0, 0.0)[0])  # beyond the edge the edge's
    np.testing.assert_array_equal(model.at_centre(), model.at(449.5, 449.5)[0])
    assert model.fwhm_pix == psf_fwhm_pix(model.at_centre())


def test_psf_is_centred() -> None:
    model = fitted(expose_field(varying(4.0), 2, 450))
    for psf in model.at([50.0, 450.0, 850.0], [800.0, 450.0, 50.0]):
        half = len(psf) // 2
        offset = np.arange(-half, half + 1)
        weight = moffat_stamp(half, 4.0) * psf
        # centroids of 150 stars of S/N > 30: fwhm / (2.35 * 30 * sqrt(150 / 6 terms)) = 0.011 pixels
        assert abs(np.sum(weight * offset[None, :]) / weight.sum()) < 0.02
        assert abs(np.sum(weight * offset[:, None]) / weight.sum()) < 0.02


def test_the_same_input_gives_the_same_bytes() -> None:
    exposure = expose_field(varying(4.0), 1, 300)
    first, second = fitted(exposure), fitted(exposure)
    assert first.basis.tobytes() == second.basis.tobytes()
    assert first.coefficients.tobytes() == second.coefficients.tobytes()


def test_bad_pixels_do_not_enter() -> None:
    field = varying(4.0)
    exposure = expose_field(field, 1, 450)
    rng = np.random.default_rng(12)
    bad = rng.random(LARGE) < 0.005  # in half of all 5 x 5 cores none, 60 % of the stars' stamps hold several
    bad[:, ::151] = True
    image = np.where(bad, np.float32(np.nan), exposure.image)
    largest, fluxes = errors(fit_psf_model(image, exposure.variance, bad), field)
    assert np.median(largest) < 0.01
    assert abs(np.mean(fluxes)) < 0.005


def test_constant_psf_is_the_given_one_everywhere() -> None:
    model = constant_psf(3.0 * moffat_stamp(12, 4.0), (100, 200))
    assert model.n_stars == 0
    assert model.shape == (100, 200)
    np.testing.assert_allclose(
        model.at([0.0, 150.0], [99.0, 3.0]), moffat_stamp(12, 4.0)[None].repeat(2, 0), atol=1e-15
    )
    assert model.fwhm_pix == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("psf", [np.ones((4, 4)), np.full((7, 7), np.nan), np.zeros((7, 7))])
def test_what_is_no_psf_is_no_constant_model(psf: np.ndarray) -> None:
    with pytest.raises(PsfEstimationError):
        constant_psf(psf, (100, 100))


@pytest.mark.parametrize("order", [-1, 4])
def test_unknown_order_is_refused(order: int) -> None:
    exposure = star_field(0, 4.0)
    with pytest.raises(PsfEstimationError, match="0 to 3"):
        fit_psf_model(exposure.image, exposure.variance, exposure.bad, spatial_order=order)


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
    truth = moffat_stamp(len(result.psf) // 2, 4.0)
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
    # centroid error is about fwhm / S/N = 4 / 80 at worst; which of 30 rim pixels of 3 sigma, 5 pixels out, lie above
    # the threshold adds 5 / sqrt(2) * 60 * sqrt(30 / 4) / 2e4 = 0.03: three sigma of both
    np.testing.assert_allclose(sources.x, stars.x[order], atol=0.2)
    np.testing.assert_allclose(sources.y, stars.y[order], atol=0.2)
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

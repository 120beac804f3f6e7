"""What noise a PSF finds in a difference, and what background is left between the stars."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import fftconvolve
from simulated_pair import Stars, expose, moffat_stamp, random_stars, render

from transforms.numerics.convolution import convolve
from transforms.numerics.differencing import DifferenceResult, ImagePlanes, SubtractionParameters, subtract
from transforms.numerics.warping import CoordinateGrid, coordinate_grid, warp_exposure

SHAPE = (400, 400)
INNER = (slice(30, -30), slice(30, -30))


def pair(
    seed: int, fwhm_science: float, fwhm_template: float, n_stars: int = 80, wing: float = 0.0
) -> tuple[DifferenceResult, Stars]:
    """Equally deep images with given PSFs; `wing` of each science star's light is spread over a FWHM of 20 pixels."""
    random = np.random.default_rng([seed, 1])
    stars = random_stars(random, SHAPE, n_stars, 5e3, 2e5)
    truth = (1.0 - wing) * render(SHAPE, stars, fwhm_science)
    if wing:
        truth += wing * fftconvolve(render(SHAPE, stars, 2.0), moffat_stamp(80, 20.0), mode="same")
    science = expose(random, truth, 300.0, 400.0)
    template = expose(random, render(SHAPE, stars, fwhm_template), 300.0, 400.0)
    planes = [
        ImagePlanes(one.image, one.variance, one.bad, moffat_stamp(20, fwhm))
        for one, fwhm in ((science, fwhm_science), (template, fwhm_template))
    ]
    return subtract(*planes, SubtractionParameters(spatial_order=0)), stars


def away_from(stars: Stars, distance_pix: float) -> np.ndarray:
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    near = np.zeros(SHAPE, dtype=bool)
    for x, y in zip(stars.x, stars.y, strict=True):
        near |= np.hypot(columns - x, rows - y) < distance_pix
    return ~near


@pytest.mark.parametrize(("fwhm_science", "fwhm_template"), [(5.0, 3.5), (4.5, 4.2), (3.8, 4.6)])
def test_noise_on_empty_sky_is_white_and_of_the_stated_variance(fwhm_science: float, fwhm_template: float) -> None:
    result, stars = pair(3, fwhm_science, fwhm_template)
    empty = away_from(stars, 18.0)[INNER]
    scaled = (result.difference / np.sqrt(result.variance))[INNER]
    n = np.count_nonzero(empty)
    # errors of the kernel's 30 or so coefficients are common to all pixels: 1 % beside five sigma of the sample
    assert np.std(scaled[empty]) == pytest.approx(1.0, abs=5.0 / np.sqrt(2.0 * n) + 0.01)
    for first, second in ((scaled[:, 1:], scaled[:, :-1]), (scaled[1:], scaled[:-1])):
        both = empty[:, 1:] & empty[:, :-1] if first.shape[1] < scaled.shape[1] else empty[1:] & empty[:-1]
        assert abs(np.mean(first[both] * second[both])) < 5.0 / np.sqrt(n) + 0.01


@pytest.mark.parametrize(("fwhm_science", "fwhm_template"), [(5.0, 3.5), (4.5, 4.2)])
def test_psf_fluxes_on_empty_sky_scatter_as_the_variance_says(fwhm_science: float, fwhm_template: float) -> None:
    result, stars = pair(3, fwhm_science, fwhm_template)
    psf = result.psf.middle[10:-10, 10:-10].astype(np.float64)
    norm = np.sum(psf**2)
    flux = convolve(np.nan_to_num(result.difference), psf)[INNER] / norm
    empty = away_from(stars, 18.0)[INNER]
    expected = np.sqrt(np.median(result.variance[INNER][empty]) / norm)
    # neighbouring fluxes share their noise over 1 / norm pixels: so many less are independent
    n = np.count_nonzero(empty) * norm
    assert np.std(flux[empty]) == pytest.approx(expected, rel=5.0 / np.sqrt(2.0 * n))


@pytest.mark.parametrize(("fwhm_science", "fwhm_template"), [(5.0, 3.5), (3.8, 4.6)])
def test_template_fluxes_on_empty_sky_scatter_as_their_own_part_says(fwhm_science: float, fwhm_template: float) -> None:
    result, stars = pair(3, fwhm_science, fwhm_template)
    psf = result.science_psf.middle.astype(np.float64)
    norm = np.sum(psf**2)
    flux = convolve(result.matched_template, psf)[INNER] / norm
    empty = away_from(stars, 24.0)[INNER]
    white = np.median(result.variance[INNER][empty]) - 400.0
    part = result.template_noise_part[0, 0]
    # a kernel that widens passes less noise to sums over a PSF than white noise would have, one that sharpens more
    assert part < 0.85 if fwhm_science > fwhm_template else part > 1.15
    n = np.count_nonzero(empty) * norm
    assert np.std(flux[empty]) == pytest.approx(np.sqrt(part * white / norm), rel=5.0 / np.sqrt(2.0 * n))


def test_white_variance_of_a_warped_image_is_what_sums_over_a_psf_find() -> None:
    random = np.random.default_rng(5)
    x, y = coordinate_grid((300, 300))
    grid = CoordinateGrid(x + 10.5, y + 10.4, 32)
    image = random.normal(0.0, 3.0, (330, 330)).astype(np.float32)
    warped = warp_exposure(image, np.full(image.shape, 9.0), np.zeros(image.shape, dtype=np.int32), grid, (300, 300))
    psf = moffat_stamp(12, 4.0)
    sums = convolve(warped.image, psf)[INNER[0], INNER[1]]
    n = sums.size * np.sum(psf**2)
    error = 5.0 / np.sqrt(2.0 * n)
    assert np.var(sums) == pytest.approx(9.0 * np.sum(psf**2), rel=2.0 * error)
    np.testing.assert_allclose(warped.white_variance, 9.0, rtol=1e-5)
    assert np.median(warped.variance) < 0.75 * 9.0
    assert np.var(warped.image) == pytest.approx(np.median(warped.variance), rel=0.03)


def test_wings_beyond_the_kernel_leave_no_background_between_the_stars() -> None:
    """A fifth of the light in wings of 20 pixels: the fit at the stars takes them for a background everywhere."""
    result, stars = pair(6, 4.5, 4.0, n_stars=30, wing=0.2)
    empty = away_from(stars, 25.0) & ~result.invalid
    level = np.mean(result.difference[empty]) / np.sqrt(np.mean(result.variance[empty]))
    # a PSF of 40 effective pixels makes 0.05 sigma of a pixel to 0.3 sigma of a flux; the fit alone leaves 0.11
    assert abs(level) < 0.05

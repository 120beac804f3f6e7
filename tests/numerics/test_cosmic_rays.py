"""Cosmic rays: what is sharper than the PSF is found, point sources and what is made of them are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage
from simulated_pair import moffat

from transforms.numerics.cosmic_rays import find_cosmic_rays, largest_contrasts

SKY = 900.0
SIDE = 32
N_SIDE = 24


def pixel_moffat(x: np.ndarray, y: np.ndarray, fwhm_pix: float) -> np.ndarray:
    """Profile integrated over pixels by 3 x 3 points."""
    sub = (np.arange(3) + 0.5) / 3 - 0.5
    return np.mean([moffat(x + a, y + b, fwhm_pix) for a in sub for b in sub], axis=0)


def psf_of(fwhm_pix: float) -> np.ndarray:
    offset = np.arange(-20.0, 21.0)
    psf = pixel_moffat(offset[np.newaxis], offset[:, np.newaxis], fwhm_pix)
    return psf / psf.sum()


def point_sources(rng: np.random.Generator, fwhm_pix: float, snr: np.ndarray) -> np.ndarray:
    """A grid of sources, each on its own SIDE x SIDE pixels, centred anywhere in a pixel; without noise."""
    noise2 = SKY / np.sum(psf_of(fwhm_pix) ** 2)
    flux = (snr**2 + np.sqrt(snr**4 + 4 * snr**2 * noise2)) / 2
    offset = np.arange(SIDE) - SIDE // 2
    dx, dy = rng.uniform(-0.5, 0.5, (2, snr.size, 1, 1))
    stamps = flux[:, None, None] * pixel_moffat(offset[None, None, :] - dx, offset[None, :, None] - dy, fwhm_pix)
    return stamps.reshape(N_SIDE, N_SIDE, SIDE, SIDE).swapaxes(1, 2).reshape(N_SIDE * SIDE, N_SIDE * SIDE)


def noisy(rng: np.random.Generator, light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    variance = SKY + light
    return (light + rng.normal(size=light.shape) * np.sqrt(variance)).astype(np.float32), variance.astype(np.float32)


def tracks(rng: np.random.Generator, shape: tuple[int, int], n: int, electrons: float) -> np.ndarray:
    """Straight tracks of 1 to 15 pixels, each pixel with the same charge."""
    image = np.zeros(shape)
    for _ in range(n):
        y, x = rng.uniform(5, np.array(shape) - 5)
        angle, step = rng.uniform(0, np.pi), np.arange(rng.integers(1, 16))
        rows, columns = np.floor(y + step * np.sin(angle)), np.floor(x + step * np.cos(angle))
        inside = (rows < shape[0]) & (columns < shape[1]) & (columns >= 0)
        image[rows[inside].astype(int), columns[inside].astype(int)] = electrons
    return image


NOTHING = np.zeros((N_SIDE * SIDE, N_SIDE * SIDE), dtype=bool)


@pytest.mark.parametrize(("fwhm", "narrower"), [(2.0, 1.0), (2.3, 0.93), (3.5, 1.0), (4.75, 0.93)])
def test_fewer_than_three_in_a_thousand_point_sources_lose_a_pixel(fwhm: float, narrower: float) -> None:
    """At any S/N from 5 to 1000, also where the true PSF is narrower than the given one."""
    rng = np.random.default_rng(round(100 * fwhm * narrower))
    n_lost, n = 0, 0
    for least, most in ((5.0, 20.0), (20.0, 200.0), (200.0, 1000.0)):
        snr = np.exp(rng.uniform(np.log(least), np.log(most), N_SIDE**2))
        image, variance = noisy(rng, point_sources(rng, fwhm * narrower, snr))
        hits = find_cosmic_rays(image, variance, image, NOTHING, psf_of(fwhm))
        n_lost += int(np.count_nonzero(hits.reshape(N_SIDE, SIDE, N_SIDE, SIDE).any(axis=(1, 3))))
        n += N_SIDE**2
    assert n_lost <= 0.003 * n


@pytest.mark.parametrize(("fwhm", "least"), [(2.3, 0.97), (3.5, 0.99), (4.75, 0.99)])
def test_tracks_of_ten_sigma_are_found_pixel_by_pixel(fwhm: float, least: float) -> None:
    rng = np.random.default_rng(7)
    charge = tracks(rng, NOTHING.shape, 120, 10.0 * np.sqrt(SKY))
    image, variance = noisy(rng, np.zeros(NOTHING.shape))
    image += charge.astype(np.float32)
    hits = find_cosmic_rays(image, variance, image, NOTHING, psf_of(fwhm))
    assert np.mean(hits[charge > 0]) > least
    # a pixel of pure noise beside a hit is 3 sigma bright once in 740
    assert np.count_nonzero(hits & (charge == 0)) < 0.02 * np.count_nonzero(charge)


def test_galaxies_trails_and_blends_lose_nothing() -> None:
    """Sums of point sources; the trail is 30 pixels long."""
    rng = np.random.default_rng(3)
    seeds = np.zeros((400, 400))
    for y in range(40, 400, 80):
        for x in range(40, 400, 80):
            seeds[y, x] += 3e4
            seeds[y + rng.integers(-6, 7, 30), x + rng.integers(-6, 7, 30)] += 3e3  # a clumpy galaxy
        seeds[y + 30, 100:130] = 2e3
    for fwhm in (2.3, 4.75):
        light = ndimage.convolve(seeds, psf_of(fwhm), mode="constant")
        image, variance = noisy(rng, light)
        hits = find_cosmic_rays(image, variance, image, np.zeros(light.shape, dtype=bool), psf_of(fwhm))
        assert np.count_nonzero(hits) <= 1


def test_dipoles_lose_nothing() -> None:
    """Stars that moved by half a pixel: their lobes are sharp on the difference, but a star stands on the image."""
    rng = np.random.default_rng(11)
    snr = np.exp(rng.uniform(np.log(20.0), np.log(500.0), N_SIDE**2))
    star = point_sources(np.random.default_rng(5), 3.0, snr)
    before = ndimage.shift(star, (0.0, 0.5), order=3, mode="nearest")
    image, variance = noisy(rng, star)
    hits = find_cosmic_rays(image - before.astype(np.float32), variance, image, NOTHING, psf_of(3.0))
    assert np.count_nonzero(hits) <= 0.003 * snr.size


@pytest.mark.parametrize("turn", [np.fliplr, np.flipud, np.transpose, lambda plane: np.rot90(plane, 2)])
def test_a_turned_image_has_the_turned_mask(turn: Callable[[np.ndarray], np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    light = point_sources(rng, 3.0, np.full(N_SIDE**2, 100.0))
    image, variance = noisy(rng, light)
    image += tracks(rng, image.shape, 60, 250.0).astype(np.float32)
    bad = rng.random(image.shape) < 0.003
    psf = psf_of(3.0)
    difference = image - light.astype(np.float32)
    hits = find_cosmic_rays(difference, variance, image, bad, psf)
    turned = find_cosmic_rays(turn(difference), turn(variance), turn(image), turn(bad), turn(psf))
    assert np.count_nonzero(hits) > 100
    np.testing.assert_array_equal(turned, turn(hits))


def test_a_long_wide_track_is_marked_whole() -> None:
    # both pixels of a row reach both of the next: listed twice each, there would be 2^999 at the end of this track
    n_rows = 1000
    difference, light = np.zeros((n_rows, 9)), np.zeros((n_rows, 9))
    difference[:, 4:6], light[0, 4:6] = 30.0, 30.0  # only the first row stands out of the science image too
    planes = (difference, np.ones_like(difference), light, np.zeros(difference.shape, dtype=bool), psf_of(4.0))
    np.testing.assert_array_equal(find_cosmic_rays(*planes), difference > 0.0)


def test_bad_pixels_are_neither_marked_nor_looked_at() -> None:
    rng = np.random.default_rng(4)
    image, variance = noisy(rng, np.zeros((100, 100)))
    bad = np.zeros(image.shape, dtype=bool)
    image[50, 50], image[50, 51], image[20, 20] = 1e4, np.nan, np.nan
    bad[20, 20] = bad[50, 51] = True
    hits = find_cosmic_rays(image, variance, image, bad, psf_of(3.0))
    assert hits[50, 50]
    assert np.count_nonzero(hits) == 1


def test_contrasts_are_those_of_a_gaussian_a_tenth_narrower() -> None:
    """P(0) / P(u) of a sampled Gaussian is exp(u^2 / (2 sigma^2)); the mean of a pair is largest relative there."""
    offset = np.arange(-15.0, 16.0)
    psf = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 2.0**2))
    side, diagonal = np.exp(np.array([1.0, 2.0]) / (2 * (0.9 * 2.0) ** 2))
    np.testing.assert_allclose(largest_contrasts(psf), [side, side, diagonal, diagonal], rtol=2e-3)


@pytest.mark.parametrize("psf", [np.ones((4, 4)), np.ones((3, 3)), np.zeros((7, 7)), np.full((7, 7), np.nan)])
def test_an_unusable_psf_is_refused(psf: np.ndarray) -> None:
    with pytest.raises(ValueError, match="PSF must be"):
        largest_contrasts(psf)


def test_planes_of_unlike_shape_are_refused() -> None:
    plane = np.ones((9, 9))
    with pytest.raises(ValueError, match="differ in shape"):
        find_cosmic_rays(plane, plane, np.ones((9, 8)), np.zeros((9, 9), dtype=bool), psf_of(3.0))


def test_more_faint_hits_are_found_than_by_astroscrappy() -> None:
    """On a blank field, by hit; there the science image is all that it has to look at, too."""
    astroscrappy = pytest.importorskip("astroscrappy")
    rng = np.random.default_rng(9)
    charge = tracks(rng, NOTHING.shape, 150, 8.0 * np.sqrt(SKY))
    image, variance = noisy(rng, point_sources(rng, 4.75, np.full(N_SIDE**2, 30.0)))
    image += charge.astype(np.float32)
    ours = find_cosmic_rays(image, variance, image, NOTHING, psf_of(4.75))
    theirs, _ = astroscrappy.detect_cosmics(image + np.float32(SKY), gain=1.0, readnoise=0.1, sigclip=5.0)
    labels, n = ndimage.label(charge > 0, np.ones((3, 3)))
    found = [np.unique(labels[mask & (charge > 0)]).size for mask in (ours, theirs)]
    assert found[0] >= found[1] >= 0.5 * n

"""The shipped model scores what it claims to, on stamps made without the simulator that it was trained with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from transforms.numerics.detection import find_peaks, lobe_distance, significance_map
from transforms.numerics.measurement import measure_sources
from transforms.numerics.reliability import score
from transforms.numerics.reliability_features import reliability_features
from transforms.numerics.source_shapes import measure_shapes
from transforms.reliability_model import (
    shipped_model,
)

SIZE, SPACING, N_SIDE, NOISE = 41, 70, 6, 3.0
RESIDUAL_PART = 0.01  # what a good subtraction leaves
FWHMS = (2.1, 4.7, 8.0)  # undersampled like ZTF, like LSST, a small telescope
Stamp = NDArray[np.float64]
Source = Callable[[float, float, float], Stamp]  # fwhm, dx, dy -> stamp in units of a flux of S/N 1


def moffat(fwhm: float, dx: float = 0.0, dy: float = 0.0) -> Stamp:
    alpha = fwhm / (2.0 * np.sqrt(2.0 ** (1.0 / 3.5) - 1.0))
    v, u = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    image: Stamp = (1.0 + ((u - dx) ** 2 + (v - dy) ** 2) / alpha**2) ** -3.5
    return image * 2.5 / (np.pi * alpha**2)


def flux_of_unit_snr(fwhm: float) -> float:
    return float(NOISE / np.sqrt((moffat(fwhm) ** 2).sum()))


def features_of(
    source: Source,
    fwhm: float,
    star: Source | None = None,
    seed: int = 1,
    *,
    scale: float = 1.0,
    negated: bool = False,
    mirrored: bool = False,
) -> NDArray[np.float32]:
    """Features of the sources that the whole detection and measurement finds on a grid of copies."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(0.0, NOISE, (N_SIDE * SPACING, N_SIDE * SPACING))
    template = np.zeros_like(difference)
    unit = flux_of_unit_snr(fwhm)
    for cy in range(SPACING // 2, difference.shape[0], SPACING):
        for cx in range(SPACING // 2, difference.shape[1], SPACING):
            dx, dy = rng.uniform(-0.5, 0.5, 2)
            stamp = np.s_[cy - SIZE // 2 : cy + SIZE // 2 + 1, cx - SIZE // 2 : cx + SIZE // 2 + 1]
            difference[stamp] += unit * source(fwhm, dx, dy)
            if star is not None:
                template[stamp] += unit * star(fwhm, dx, dy)
    science = template + difference
    if negated:
        difference, science, template = -difference, template, science
    if mirrored:
        difference, science, template = (np.flip(plane, axis=1) for plane in (difference, science, template))
    difference, science, template = (scale * plane for plane in (difference, science, template))
    variance, bad = np.full_like(difference, (scale * NOISE) ** 2), np.zeros(difference.shape, bool)
    snr_map, noise_ratio = significance_map(difference, variance, bad, moffat(fwhm))
    peaks = find_peaks(snr_map, bad, 5.0, lobe_distance(moffat(fwhm)))
    planes = (difference, variance, science, variance, template, variance, bad)
    found = measure_sources(*planes, moffat(fwhm), peaks)
    shapes = measure_shapes(*planes, moffat(fwhm), moffat(fwhm), peaks, found)
    images = (difference, variance, science, template, bad, bad)
    return reliability_features(*images, moffat(fwhm), peaks, found, shapes, noise_ratio, RESIDUAL_PART)


def scores(source: Source, fwhm: float, star: Source | None = None, seed: int = 1) -> NDArray[np.float32]:
    return score(features_of(source, fwhm, star, seed), shipped_model().trees)


def cosmic_ray(snr: float) -> Source:
    def stamp(fwhm: float, dx: float, dy: float) -> Stamp:
        image = np.zeros((SIZE, SIZE))
        psf = moffat(fwhm)
        image[SIZE // 2, SIZE // 2] = snr * (psf**2).sum() / psf.max()  # matched-filter S/N of a single pixel
        return image

    return stamp


def trail(snr: float, length_fwhm: float) -> Source:
    def stamp(fwhm: float, dx: float, dy: float) -> Stamp:
        along = np.linspace(-0.5, 0.5, 31) * length_fwhm * fwhm
        return snr * np.mean([moffat(fwhm, dx + 0.8 * s, dy + 0.6 * s) for s in along], axis=0)

    return stamp


def dipole(snr: float, separation_fwhm: float) -> Source:
    def stamp(fwhm: float, dx: float, dy: float) -> Stamp:
        half = 0.5 * separation_fwhm * fwhm
        return snr * (moffat(fwhm, dx + half, dy) - moffat(fwhm, dx - half, dy))

    return stamp


def width_mismatch(snr: float, wider: float) -> Source:
    def stamp(fwhm: float, dx: float, dy: float) -> Stamp:
        return snr * (moffat(fwhm * wider, dx, dy) - moffat(fwhm, dx, dy))

    return stamp


def point(snr: float) -> Source:
    return lambda fwhm, dx, dy: snr * moffat(fwhm, dx, dy)


@pytest.mark.parametrize("fwhm", FWHMS)
@pytest.mark.parametrize("snr", [9.0, 30.0, 1000.0, -9.0, -30.0])
def test_clean_point_sources_of_either_sign_score_high(fwhm: float, snr: float) -> None:
    found = scores(point(snr), fwhm)
    assert found.size == N_SIDE**2
    # 36 noisy copies: one may have an odd neighbour.
    assert np.sort(found)[1] > 0.9


@pytest.mark.parametrize("fwhm", FWHMS)
@pytest.mark.parametrize("snr", [12.0, 100.0])
def test_single_pixel_cosmic_rays_score_low(fwhm: float, snr: float) -> None:
    found = scores(cosmic_ray(snr), fwhm)
    assert found.size == N_SIDE**2
    assert found.max() < 0.1


@pytest.mark.parametrize("fwhm", FWHMS)
@pytest.mark.parametrize(("snr", "separation_fwhm"), [(200.0, 0.1), (40.0, 0.5), (30.0, 1.0)])
def test_symmetric_dipoles_score_low(fwhm: float, snr: float, separation_fwhm: float) -> None:
    found = scores(dipole(snr, separation_fwhm), fwhm)
    assert found.size >= N_SIDE**2
    assert np.sort(found)[-2] < 0.3


@pytest.mark.parametrize("fwhm", FWHMS)
@pytest.mark.parametrize("length_fwhm", [0.5, 1.0, 1.5])
def test_short_trails_stay_reliable(fwhm: float, length_fwhm: float) -> None:
    found = scores(trail(40.0, length_fwhm), fwhm)
    assert found.size == N_SIDE**2
    assert found.min() > 0.5


@pytest.mark.parametrize("fwhm", FWHMS)
def test_trails_too_long_for_the_psf_fit_stay_reliable(fwhm: float) -> None:
    # Stamps of 41 pixels hold a trail of 3 FWHM of 8 pixels; each piece of a broken one counts.
    found = scores(trail(80.0, 3.0), fwhm)
    assert found.size >= N_SIDE**2
    assert np.sort(found)[1] > 0.5


@pytest.mark.parametrize("fwhm", FWHMS)
def test_a_clean_fading_star_stays_reliable(fwhm: float) -> None:
    assert scores(point(-30.0), fwhm, star=point(300.0)).min() > 0.9


@pytest.mark.parametrize("fwhm", FWHMS)
def test_residuals_of_a_bright_star_with_a_wrong_width_score_low(fwhm: float) -> None:
    found = scores(width_mismatch(3000.0, 1.03), fwhm, star=point(3000.0))
    assert found.size >= N_SIDE**2
    assert np.median(found) < 0.2

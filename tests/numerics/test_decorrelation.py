"""Decorrelation: white noise of the right variance, fluxes kept, and the identity where nothing is to be done."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.signal import fftconvolve

from transforms.numerics.decorrelation import decorrelation_kernels, interpolation_count, interpolation_power
from transforms.numerics.warping import TAPS, sinc_weights

SIDE = 768
EDGE = 48


def gaussian(sigma_pix: float) -> np.ndarray:
    y, x = np.mgrid[-12:13, -12:13]
    kernel = np.exp(-(x * x + y * y) / (2.0 * sigma_pix**2))
    return kernel / kernel.sum()


def lag_one(image: np.ndarray) -> tuple[float, float]:
    variance = image.var()
    return float(np.mean(image[:, 1:] * image[:, :-1]) / variance), float(np.mean(image[1:] * image[:-1]) / variance)


@pytest.mark.parametrize("kernel", [gaussian(1.3), 2.5 * gaussian(1.0) - 1.5 * gaussian(1.6)], ids=["wider", "sharper"])
@pytest.mark.parametrize(("science_variance", "template_variance"), [(1.0, 1.0), (1.0, 0.2), (0.3, 1.0)])
def test_noise_becomes_white_with_the_variance_of_both_images(
    kernel: np.ndarray, science_variance: float, template_variance: float
) -> None:
    rng = np.random.default_rng(20261123)
    science = rng.normal(0.0, science_variance**0.5, size=(SIDE, SIDE))
    template = rng.normal(0.0, template_variance**0.5, size=(SIDE, SIDE))
    difference = science - fftconvolve(template, kernel, mode="same")
    (phi,) = decorrelation_kernels(
        kernel[np.newaxis], np.array([science_variance]), np.array([template_variance]), interpolated=False
    )
    white = fftconvolve(difference, phi, mode="same")[EDGE:-EDGE, EDGE:-EDGE]
    n_pixels = white.size
    # scatter of a variance sqrt(2 / n) = 0.2 %, of a correlation 1 / sqrt(n) = 0.15 %: four of each
    assert white.var() == pytest.approx(science_variance + template_variance, rel=4 * (2 / n_pixels) ** 0.5)
    assert max(map(abs, lag_one(white))) < 4 / n_pixels**0.5


def test_interpolated_template_noise_becomes_white_too() -> None:
    rng = np.random.default_rng(5)
    weights = sinc_weights((np.arange(16) + 0.5) / 16)
    template = rng.normal(size=(SIDE // 2, SIDE // 2))
    parts = []  # shifted by many pairs of sub-pixel phases, as on a slowly rotating grid
    for phase_y, phase_x in product((1, 5, 9, 13), repeat=2):
        interpolation = np.outer(weights[phase_y], weights[phase_x])
        parts.append(fftconvolve(template, interpolation[::-1, ::-1], mode="same"))
    kernel = gaussian(0.4)  # wider ones damp what interpolation damps
    (phi,) = decorrelation_kernels(kernel[np.newaxis], np.array([0.05]), np.array([1.0]), interpolated=True)
    (blind,) = decorrelation_kernels(kernel[np.newaxis], np.array([0.05]), np.array([1.0]), interpolated=False)

    def worst(correction: np.ndarray) -> float:
        found = []
        for part in parts:
            difference = rng.normal(0.0, 0.05**0.5, size=part.shape) - fftconvolve(part, kernel, mode="same")
            found.append(lag_one(fftconvolve(difference, correction, mode="same")[EDGE:-EDGE, EDGE:-EDGE]))
        return float(np.max(np.abs(np.mean(found, axis=0))))

    assert worst(phi) < 0.02 < worst(blind)


def test_flux_is_kept_also_where_the_kernel_scales_it() -> None:
    kernels = np.stack([gaussian(1.5), 3.0 * gaussian(1.0)])
    phi = decorrelation_kernels(kernels, np.array([1.0, 2.0]), np.array([0.5, 0.1]), interpolated=True)
    np.testing.assert_allclose(phi.sum(axis=(1, 2)), 1.0, rtol=1e-12)


def test_template_without_noise_leaves_the_difference_as_it_is() -> None:
    (phi,) = decorrelation_kernels(gaussian(2.0)[np.newaxis], np.array([1.0]), np.array([0.0]), interpolated=True)
    expected = np.zeros_like(phi)
    expected[len(phi) // 2, len(phi) // 2] = 1.0
    np.testing.assert_allclose(phi, expected, atol=1e-12)


def test_interpolation_passes_slow_waves_whole_and_damps_fast_ones() -> None:
    power = interpolation_power(np.array([0.0, 0.1, 0.25, 0.5]))
    assert power[0] == pytest.approx(1.0, abs=1e-12)
    assert power[1] == pytest.approx(1.0, abs=0.01)
    assert 0.9 < power[2] < 1.05
    # at the Nyquist frequency half of the phases see the wave's nodes
    assert 0.3 < power[3] < 0.7
    assert TAPS == 8


def test_noise_that_was_interpolated_twice_becomes_white_too() -> None:
    rng = np.random.default_rng(6)
    weights = sinc_weights((np.arange(16) + 0.5) / 16)

    def interpolated(image: np.ndarray) -> np.ndarray:
        """As a stack is: half of the noise from each of two exposures, at other phases."""
        phases = rng.integers(0, 16, 2)
        return fftconvolve(image, np.outer(weights[phases[0]], weights[phases[1]])[::-1, ::-1], mode="same")

    once, twice = [], []
    (phi,) = decorrelation_kernels(gaussian(0.4)[np.newaxis], np.array([0.05]), np.array([1.0]), interpolated=2.0)
    (blind,) = decorrelation_kernels(gaussian(0.4)[np.newaxis], np.array([0.05]), np.array([1.0]), interpolated=1.0)
    for _ in range(64):
        template = interpolated(interpolated(rng.normal(size=(SIDE // 4, SIDE // 4))))
        difference = rng.normal(0.0, 0.05**0.5, size=template.shape) - fftconvolve(template, gaussian(0.4), mode="same")
        for kernel, found in ((phi, twice), (blind, once)):
            found.append(fftconvolve(difference, kernel, mode="same")[EDGE:-EDGE, EDGE:-EDGE].var())
    # a variance of 1.05 is stated; 64 pairs of phases know their mean to 2 %
    assert np.mean(twice) == pytest.approx(1.05, rel=0.06)
    assert np.mean(once) < 0.9 * 1.05


@pytest.mark.parametrize("count", [0.0, 0.5, 1.0, 2.0])
def test_interpolations_are_counted_by_the_noise_they_took(count: float) -> None:
    kept = np.mean(interpolation_power(np.fft.fftfreq(64)) ** count) ** 2
    white = np.array([[4.0, 9.0], [np.inf, 0.0]])
    variance = np.array([[4.0 * kept, 9.0 * kept], [np.inf, 0.0]])
    assert interpolation_count(variance, white) == pytest.approx(count, abs=0.01)


def test_nothing_known_counts_as_one_interpolation() -> None:
    assert interpolation_count(np.full((2, 2), np.inf), np.full((2, 2), np.inf)) == 1.0

"""Injected sources have the place, size, light and noise that were asked for."""

from __future__ import annotations

import numpy as np
import pytest

from transforms.numerics.psf_modelling import PsfModel, constant_psf
from transforms.numerics.source_injection import (
    add_source,
    local_variance,
    unit_of_snr,
    unit_source,
    variance_per_light,
    with_light,
)

SIGMA_PIX = 2.0


def gaussian_psf() -> PsfModel:
    v, u = np.mgrid[-15:16, -15:16]
    return constant_psf(np.exp(-0.5 * (u**2 + v**2) / SIGMA_PIX**2), (100, 120))


def moments(light: np.ndarray) -> tuple[float, float, float, float, float]:
    """Sum, centroid (x, y) and second moments along x and y."""
    v, u = np.mgrid[: light.shape[0], : light.shape[1]]
    total = light.sum()
    x, y = (u * light).sum() / total, (v * light).sum() / total
    return total, x, y, ((u - x) ** 2 * light).sum() / total, ((v - y) ** 2 * light).sum() / total


@pytest.mark.parametrize(("x", "y"), [(50.0, 40.0), (50.3, 39.6), (61.5, 40.5), (50.49, 40.51)])
def test_a_point_has_its_place_width_and_flux(x: float, y: float) -> None:
    light = np.zeros((100, 120))
    add_source(light, unit_source(gaussian_psf(), x, y), 300.0)
    total, at_x, at_y, xx, yy = moments(light)
    # Cubic splines on a Gaussian of sigma 2 err by 1e-4 of its peak; the stamp ends at 7.5 sigma.
    assert total == pytest.approx(300.0, rel=1e-3)
    assert (at_x, at_y) == pytest.approx((x, y), abs=2e-3)
    assert (xx, yy) == pytest.approx((SIGMA_PIX**2, SIGMA_PIX**2), rel=5e-3)


def test_a_trail_has_its_middle_and_length() -> None:
    light = np.zeros((100, 120))
    add_source(light, unit_source(gaussian_psf(), 55.2, 44.7, 24.0, -9.0), 100.0)
    total, x, y, xx, yy = moments(light)
    assert total == pytest.approx(100.0, rel=1e-3)
    assert (x, y) == pytest.approx((55.2, 44.7), abs=5e-3)
    # A line of length l adds l^2 / 12; half-pixel steps take (l / n)^2 / 12 of it, below 1 part in 1000.
    assert xx == pytest.approx(SIGMA_PIX**2 + 24.0**2 / 12.0, rel=5e-3)
    assert yy == pytest.approx(SIGMA_PIX**2 + 9.0**2 / 12.0, rel=5e-3)


@pytest.mark.parametrize(("x", "y"), [(0.0, 50.0), (119.0, 99.0), (-30.0, 50.0), (60.0, 130.0)])
def test_what_lies_off_the_image_is_lost(x: float, y: float) -> None:
    wide, light = np.zeros((300, 320)), np.zeros((100, 120))
    add_source(light, unit_source(gaussian_psf(), x, y), 1.0)
    source = unit_source(gaussian_psf(), x, y)
    add_source(wide, source._replace(row=source.row + 100, column=source.column + 100), 1.0)
    np.testing.assert_array_equal(light, wide[100:200, 100:220])


def test_a_source_of_unit_snr_is_one_sigma_of_its_own_fit() -> None:
    source = unit_source(gaussian_psf(), 50.0, 40.0)
    # A Gaussian has an effective area of 4 pi sigma^2.
    assert unit_of_snr(source, 9.0) == pytest.approx(3.0 * np.sqrt(4.0 * np.pi) * SIGMA_PIX, rel=1e-3)


def test_light_brings_its_photon_noise() -> None:
    stream = np.random.default_rng(5)
    image, variance = np.zeros((200, 200), dtype=np.float32), np.full((200, 200), 4.0, dtype=np.float32)
    light = np.zeros((200, 200))
    light[:100] = 1000.0
    added, noise2 = with_light(image, variance, light, 0.5, stream)
    assert added.dtype == noise2.dtype == np.float32
    np.testing.assert_array_equal(added[100:], 0.0)
    np.testing.assert_array_equal(noise2, 4.0 + 0.5 * light)
    # 20,000 pixels: 5 sigma of a mean and of a variance.
    assert added[:100].mean() == pytest.approx(1000.0, abs=5.0 * np.sqrt(500.0 / 20_000))
    assert added[:100].var() == pytest.approx(500.0, rel=5.0 * np.sqrt(2.0 / 20_000))


def test_the_gain_is_read_off_the_variance() -> None:
    stream = np.random.default_rng(6)
    image = stream.normal(0.0, 3.0, (200, 200))
    image[50:60, 50:80] += 5000.0
    good = np.ones(image.shape, dtype=bool)
    assert variance_per_light(image, 9.0 + 0.25 * np.maximum(image, 0.0), good) == pytest.approx(0.25, rel=0.02)
    assert variance_per_light(image, np.full(image.shape, 9.0), good) == 0.0
    assert variance_per_light(np.ones((50, 50)), np.ones((50, 50)), np.ones((50, 50), dtype=bool)) == 0.0


def test_the_local_variance_leaves_out_what_is_infinite() -> None:
    variance = np.full((40, 40), 2.0)
    variance[:, 20] = np.inf
    assert local_variance(variance, 19.6, 10.0) == 2.0
    assert np.isnan(local_variance(np.full((40, 40), np.inf), 5.0, 5.0))

"""Point sources, trails and dipoles on white noise, drawn from analytic profiles, for the tests of shape fits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOISE = 3.0
SIGMA_PER_FWHM = 1.0 / 2.3548200450309493
MOFFAT_BETA = 3.5


def profile(fwhm: float, u: NDArray, v: NDArray, moffat: bool = False) -> NDArray[np.float64]:
    """PSF of unit flux at offsets (u, v)."""
    if moffat:
        alpha2 = fwhm**2 / (4.0 * (2.0 ** (1.0 / MOFFAT_BETA) - 1.0))
        return (MOFFAT_BETA - 1.0) / (np.pi * alpha2) * (1.0 + (u**2 + v**2) / alpha2) ** -MOFFAT_BETA
    sigma2 = (fwhm * SIGMA_PER_FWHM) ** 2
    return np.exp(-(u**2 + v**2) / (2.0 * sigma2)) / (2.0 * np.pi * sigma2)


def psf_image(fwhm: float, moffat: bool = False, size: int = 41) -> NDArray[np.float64]:
    v, u = np.mgrid[:size, :size] - size // 2
    image = profile(fwhm, u, v, moffat)
    return image / image.sum()


def trail(
    shape: tuple[int, int], fwhm: float, x: float, y: float, dx: float, dy: float, moffat: bool = False
) -> NDArray[np.float64]:
    """Light of unit flux along the vector (dx, dy) about (x, y); a point for a vector of 0."""
    v, u = np.mgrid[: shape[0], : shape[1]]
    # Gauss-Legendre points closer than a third of a FWHM: exact to 1e-8 for a Gaussian.
    positions, parts = np.polynomial.legendre.leggauss(1 if dx == dy == 0.0 else 8 + int(4 * np.hypot(dx, dy) / fwhm))
    image = np.zeros(shape)
    for position, part in zip(positions, parts, strict=True):
        image += 0.5 * part * profile(fwhm, u - x - 0.5 * position * dx, v - y - 0.5 * position * dy, moffat)
    return image


def flux_of_snr(snr: float, shape: NDArray[np.float64], noise: float) -> float:
    """Flux at which a source of that shape has the S/N under an optimal filter."""
    return snr * noise / float(np.sqrt((shape**2).sum()))


def cells(n_side: int, side: int) -> list[tuple[slice, slice]]:
    """The n_side^2 square cells of an image."""
    return [
        (slice(j * side, (j + 1) * side), slice(i * side, (i + 1) * side)) for j in range(n_side) for i in range(n_side)
    ]


def extreme_planes(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
    """Image, variance and mask in which anything may be NaN, infinite, huge, zero, negative or constant."""
    image = rng.choice([1.0, 1e3, 1e18, 3e38]) * rng.normal(size=shape)
    image = np.round(image) if rng.random() < 0.3 else image
    variance = np.full(shape, rng.choice([1e-30, 1.0, 1e30])) * rng.uniform(0.5, 2.0, shape)
    bad = rng.random(shape) < rng.choice([0.0, 0.1, 0.9])
    for plane in (image, variance):
        for value in (np.nan, np.inf, -np.inf, 0.0, -1.0):
            plane[rng.random(shape) < rng.choice([0.0, 0.0, 0.05, 0.5])] = value
    with np.errstate(over="ignore"):
        return image.astype(np.float32), variance.astype(np.float32), bad

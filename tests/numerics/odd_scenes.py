"""Images that no telescope should send, and some that it does: for tests that nothing falls over or gets lost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from transforms.numerics.psf_grid import PSF_CELL_PIX, PsfGrid

SNR = 60.0  # of injected sources, whole and in the noise of the scene
_ODD_VALUES = np.array([np.nan, np.inf, -np.inf, 0.0, -1.0, 3e38, -3e38, 1e-45, -1e-45, 1e-38, 65535.0, 1e20])


class OddScene(NamedTuple):
    """Planes as `measure_sources` takes them, and where bright sources lie in clean pixels.

    Attributes
    ----------
    planes : difference, variance, science, science variance, template, template variance; (ny, nx) float32
    bad, reject, saturated : (ny, nx) bool
    mask : (ny, nx) int32
    psf, science_psf : grids
    injected : (m, 3) x, y and sign of sources that must be found
    fwhm : of the PSF, pixels
    """

    planes: list[NDArray[np.float32]]
    bad: NDArray[np.bool_]
    reject: NDArray[np.bool_]
    saturated: NDArray[np.bool_]
    mask: NDArray[np.int32]
    psf: PsfGrid
    science_psf: PsfGrid
    injected: NDArray[np.float64]
    fwhm: float


def odd_scene(seed: int) -> OddScene:
    """One scene: a third of them tiny, some larger than a cell of the PSF, three in five with odd pixels."""
    rng = np.random.default_rng(seed)
    shape = _shape(rng)
    fwhm = float(np.exp(rng.uniform(np.log(1.5), np.log(9.0))))
    sigma = fwhm / 2.3548
    noise = float(rng.choice([1.0, 30.0, 1e-12, 1e12], p=[0.7, 0.1, 0.1, 0.1]))
    if rng.random() < 0.05:
        noise = 1e-19  # variances are denormal
    planes = [noise * rng.normal(0.0, 1.0, shape) for _ in range(6)]
    for variance in (1, 3, 5):
        planes[variance] = np.full(shape, noise**2) * (rng.uniform(0.5, 2.0, shape) if rng.random() < 0.3 else 1.0)
    places = _inject(rng, planes, sigma, noise)
    plain = [plane.copy() for plane in planes[:2]]
    spoiled = rng.random() < 0.6
    part = rng.choice([0.0, 0.0, 0.02, 0.3], 3) * spoiled
    bad, reject, saturated = (rng.random(shape) < one for one in part)
    if spoiled:
        _spoil(rng, planes, bad)
    with np.errstate(over="ignore"):
        floats = [plane.astype(np.float32) for plane in planes]
    mask = rng.integers(0, 2**31 - 1, shape, dtype=np.int32) * (rng.random(shape) < 0.05)
    size = int(rng.choice([3, 9, 21, 25, 41, 61]))
    psf, science_psf = _psf(rng, shape, sigma, size), _psf(rng, shape, 0.9 * sigma, size)
    odd = bad | reject | (planes[0] != plain[0]) | (planes[1] != plain[1])
    injected = _clean_places(places, odd, fwhm, size // 2)
    return OddScene(
        floats, bad, reject, saturated, mask.astype(np.int32), psf, science_psf, np.array(injected).reshape(-1, 3), fwhm
    )


def _shape(rng: np.random.Generator) -> tuple[int, int]:
    kind = rng.random()
    if kind < 0.35:
        return int(rng.integers(1, 10)), int(rng.integers(1, 10))
    if kind < 0.4:
        return (1, 64) if rng.random() < 0.5 else (64, 1)
    if kind < 0.43:
        return int(rng.integers(100, 200)), int(rng.integers(129, 160))
    return int(rng.integers(10, 60)), int(rng.integers(10, 60))


def _inject(
    rng: np.random.Generator, planes: list[NDArray[np.float64]], sigma: float, noise: float
) -> list[tuple[float, float, float]]:
    """Bright sources on borders, corners and anywhere; dipoles and streaks for the fits, which are no test of loss."""
    ny, nx = planes[0].shape
    v, u = np.mgrid[:ny, :nx]
    flux = SNR * noise * np.sqrt(4.0 * np.pi) * sigma / (2.0 * np.pi * sigma**2)
    places = []
    for _ in range(int(rng.integers(0, 4))):
        x = rng.choice([0.0, nx - 1.0, rng.uniform(0.0, nx - 1.0)])
        y = rng.choice([0.0, ny - 1.0, rng.uniform(0.0, ny - 1.0)])
        sign = float(rng.choice([-1.0, 1.0]))
        light = flux * np.exp(-0.5 * ((u - x) ** 2 + (v - y) ** 2) / sigma**2)
        planes[0] += sign * light
        planes[2 if sign > 0 else 4] += light
        places.append((x, y, sign))
    kind = rng.random()
    if kind < 0.1:
        light = flux * np.exp(-0.5 * ((u - 0.5 * nx) ** 2 + (v - 0.5 * ny) ** 2) / sigma**2)
        planes[0] += np.gradient(light, axis=1) if nx > 1 else light
        return []
    if kind < 0.2:
        planes[0] += flux * np.exp(-0.5 * (v - 0.4 * u - 0.1 * ny) ** 2 / sigma**2)
        return []
    return places


def _spoil(rng: np.random.Generator, planes: list[NDArray[np.float64]], bad: NDArray[np.bool_]) -> None:
    for plane in planes:
        kind = rng.random()
        if kind < 0.2:
            changed = rng.random(plane.shape) < rng.choice([0.01, 0.1, 1.0], p=[0.6, 0.3, 0.1])
            plane[changed] = rng.choice(_ODD_VALUES, int(changed.sum()))
        elif kind < 0.27:
            plane[:] = rng.choice(_ODD_VALUES)
        elif kind < 0.32:
            plane[: plane.shape[0] // 2] = rng.choice(_ODD_VALUES)
    if rng.random() < 0.1:
        bad[:] = True


def _psf(rng: np.random.Generator, shape: tuple[int, int], sigma: float, size: int) -> PsfGrid:
    """One PSF or a grid of the image's cells; sometimes with noise and lobes of either sign, once in a while a ring."""
    cells = [-(-side // PSF_CELL_PIX) for side in shape] if rng.random() < 0.5 else [1, 1]
    v, u = np.mgrid[:size, :size] - size // 2
    images = np.exp(-0.5 * (u**2 + v**2) / sigma**2) * np.ones((*cells, 1, 1))
    images += 0.003 * rng.normal(size=images.shape) * (rng.random() < 0.2)
    images = np.maximum(images, -0.001)
    if rng.random() < 0.03:
        images[..., size // 2, size // 2] = 0.0
    return PsfGrid((images / images.sum(axis=(2, 3), keepdims=True)).astype(np.float32))


def _clean_places(
    places: list[tuple[float, float, float]], odd: NDArray[np.bool_], fwhm: float, psf_half: int
) -> list[tuple[float, float, float]]:
    """Sources that detection sees as they are: their footprint, and what it may join, holds no odd pixel and no other.

    And none where odd pixels, spread by the filter, make half of the image that the noise is judged by.
    """
    filtered = min(3.0 * fwhm, psf_half)
    if maximum_filter(odd, 2 * int(filtered) + 1, mode="constant").mean() > 0.2:
        return []
    # A footprint of S/N 60 reaches 1.4 FWHM, lobes join over 1.2 FWHM, an odd pixel or another source reaches as far.
    reach = 2.6 * fwhm + max(filtered, 1.4 * fwhm) + 4.0
    y, x = np.nonzero(odd)
    return [
        one
        for number, one in enumerate(places)
        if not (np.hypot(x - one[0], y - one[1]) < reach).any()
        and all(np.hypot(one[0] - other[0], one[1] - other[1]) > reach for k, other in enumerate(places) if k != number)
    ]

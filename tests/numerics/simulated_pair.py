"""Small simulated science image and template with known stars, PSF and noise, for the differencing tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOFFAT_BETA = 3.5
_STAMP_HALF_PIX = 24


def moffat(x: np.ndarray, y: np.ndarray, fwhm_pix: float | np.ndarray) -> np.ndarray:
    """Moffat profile of unit flux at offsets (x, y), sampled at pixel centres."""
    alpha = fwhm_pix / (2.0 * np.sqrt(2.0 ** (1.0 / MOFFAT_BETA) - 1.0))
    return (MOFFAT_BETA - 1.0) / (np.pi * alpha**2) * (1.0 + (x**2 + y**2) / alpha**2) ** -MOFFAT_BETA


def moffat_stamp(half_pix: int, fwhm_pix: float) -> np.ndarray:
    """(k, k) PSF stamp with k = 2 half_pix + 1, centred, sum 1."""
    offset = np.arange(-half_pix, half_pix + 1, dtype=float)
    stamp = moffat(offset[np.newaxis, :], offset[:, np.newaxis], fwhm_pix)
    return stamp / stamp.sum()


@dataclass(frozen=True, eq=False)
class Stars:
    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray


@dataclass(frozen=True, eq=False)
class SimulatedImage:
    """Pixels with sky; variance = sky variance + flux (gain 1)."""

    image: np.ndarray
    variance: np.ndarray
    bad: np.ndarray
    truth: np.ndarray  # noiseless, without sky


def random_stars(
    rng: np.random.Generator, shape: tuple[int, int], n: int, flux_min: float = 500.0, flux_max: float = 2e5
) -> Stars:
    """Stars with N(>F) ~ F^-0.6, uniform on the image."""
    u = rng.random(n)
    slope = -0.6
    flux = (flux_min**slope + u * (flux_max**slope - flux_min**slope)) ** (1.0 / slope)
    return Stars(rng.uniform(0, shape[1] - 1, n), rng.uniform(0, shape[0] - 1, n), flux)


def render(shape: tuple[int, int], stars: Stars, fwhm_pix: float, gradient: float = 0.0) -> np.ndarray:
    """Noiseless stars. FWHM changes by a factor 1 -+ `gradient` along x and, quadratically, along y."""
    image = np.zeros(shape)
    ny, nx = shape
    for x, y, flux in zip(stars.x, stars.y, stars.flux, strict=True):
        u, v = 2.0 * x / (nx - 1) - 1.0, 2.0 * y / (ny - 1) - 1.0
        fwhm = fwhm_pix * (1.0 + gradient * (0.7 * u + 0.5 * v**2 - 0.2))
        y0, y1 = max(round(y) - _STAMP_HALF_PIX, 0), min(round(y) + _STAMP_HALF_PIX + 1, ny)
        x0, x1 = max(round(x) - _STAMP_HALF_PIX, 0), min(round(x) + _STAMP_HALF_PIX + 1, nx)
        offset_x = np.arange(x0, x1)[np.newaxis, :] - x
        offset_y = np.arange(y0, y1)[:, np.newaxis] - y
        image[y0:y1, x0:x1] += flux * moffat(offset_x, offset_y, fwhm)
    return image


def expose(
    rng: np.random.Generator, truth: np.ndarray, sky: float, sky_variance: float, scale: float = 1.0
) -> SimulatedImage:
    """Add sky and Gaussian noise of variance ``sky_variance + flux``; then multiply everything with `scale`."""
    variance = sky_variance + np.maximum(truth, 0.0)
    image = truth + sky + rng.normal(size=truth.shape) * np.sqrt(variance)
    return SimulatedImage(
        image=(scale * image).astype(np.float32),
        variance=(scale**2 * variance).astype(np.float32),
        bad=np.zeros(truth.shape, dtype=bool),
        truth=scale * truth,
    )


def simulate_pair(
    seed: int,
    shape: tuple[int, int] = (400, 400),
    n_stars: int = 250,
    fwhm_science: float = 4.75,
    fwhm_template: float = 3.75,
    gradient: float = 0.06,
    transients: Stars | None = None,
    template_depth: float = 10.0,
    template_scale: float = 1.0,
) -> tuple[SimulatedImage, SimulatedImage, Stars]:
    """Science image and template of the same stars; the PSF gradients are opposite. Returns the stars too."""
    star_rng, science_rng, template_rng = (np.random.default_rng([seed, i]) for i in range(3))
    stars = random_stars(star_rng, shape, n_stars)
    science = render(shape, stars, fwhm_science, gradient)
    if transients is not None:
        science += render(shape, transients, fwhm_science, gradient)
    template = render(shape, stars, fwhm_template, -gradient)
    template_noise_variance = 400.0 / template_depth + np.maximum(template, 0.0) / template_depth
    template_image = template + 300.0 + template_rng.normal(size=shape) * np.sqrt(template_noise_variance)
    return (
        expose(science_rng, science, sky=400.0, sky_variance=400.0),
        SimulatedImage(
            image=(template_scale * template_image).astype(np.float32),
            variance=(template_scale**2 * template_noise_variance).astype(np.float32),
            bad=np.zeros(shape, dtype=bool),
            truth=template_scale * template,
        ),
        stars,
    )

"""Sources put into an image: points and trails with its own PSF and the photon noise of their light."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from transforms.numerics.psf_modelling import PsfModel

_STEPS_PER_PIX = 2.0  # of the points that make a trail
_BRIGHT_PART = 0.005  # of the pixels, to see by how much light raises the variance
_NOISE_BOX_PIX = 5


class Stamp(NamedTuple):
    """A source of unit flux; `row` and `column` are those of its first pixel, which may lie off the image."""

    row: int
    column: int
    pixels: NDArray[np.float64]


def unit_source(psf: PsfModel, x: float, y: float, dx: float = 0.0, dy: float = 0.0) -> Stamp:
    """The light of a point of flux 1, or of a trail (dx, dy) around its middle (x, y).

    Parameters
    ----------
    psf : of the image; along a trail that of its middle
    x, y : pixels, 0-based
    dx, dy : from end to end, pixels; 0 for a point

    Returns
    -------
    Stamp, its sum that of the PSF's stamp: 1 up to what a shift by splines loses, about 1e-3
    """
    kernel = psf.at(x, y)[0]
    n_points = 1 + math.ceil(_STEPS_PER_PIX * math.hypot(dx, dy))
    along = (np.arange(n_points) + 0.5) / n_points - 0.5
    half_x, half_y = (kernel.shape[0] // 2 + 1 + math.ceil(abs(step) / 2.0) for step in (dx, dy))
    column, row = round(x) - half_x, round(y) - half_y
    pixels = np.zeros((2 * half_y + 1, 2 * half_x + 1))
    framed = np.pad(kernel, 1)
    for part in along:
        at_x, at_y = x + part * dx, y + part * dy
        left, low = round(at_x) - column - framed.shape[1] // 2, round(at_y) - row - framed.shape[0] // 2
        moved = ndimage.shift(framed, (at_y - round(at_y), at_x - round(at_x)), order=3, mode="constant")
        top, right = low + framed.shape[0], left + framed.shape[1]
        first_row, first_column = max(0, -low), max(0, -left)
        pixels[max(0, low) : top, max(0, left) : right] += moved[
            first_row : first_row + pixels.shape[0] - max(0, low),
            first_column : first_column + pixels.shape[1] - max(0, left),
        ]
    return Stamp(row, column, pixels / n_points)


def unit_of_snr(source: Stamp, variance: float) -> float:
    """Flux of a source that has S/N 1 in white noise, measured with its own profile."""
    return math.sqrt(variance / float(np.sum(np.square(source.pixels))))


def variance_per_light(image: NDArray[np.floating], variance: NDArray[np.floating], good: NDArray[np.bool_]) -> float:
    """By how much the variance rises with the light of the brightest pixels: one over the gain; 0 if it does not."""
    light, noise = image[good].astype(np.float64), variance[good].astype(np.float64)
    bright = light >= np.quantile(light, 1.0 - _BRIGHT_PART)
    rise = float(np.median(light[bright]) - np.median(light))
    return max(float(np.median(noise[bright]) - np.median(noise)) / rise, 0.0) if rise > 0.0 else 0.0


def local_variance(variance: NDArray[np.floating], x: float, y: float) -> float:
    """Median of the finite variances in a small box; NaN if there are none."""
    half = _NOISE_BOX_PIX // 2
    row, column = max(round(y) - half, 0), max(round(x) - half, 0)
    box = variance[row : row + _NOISE_BOX_PIX, column : column + _NOISE_BOX_PIX]
    return float(np.median(box[np.isfinite(box)])) if np.isfinite(box).any() else math.nan


def add_source(light: NDArray[np.float64], source: Stamp, flux: float) -> None:
    """Add a source to a plane in place; what lies off the plane is lost."""
    ny, nx = light.shape
    first_row, first_column = max(0, -source.row), max(0, -source.column)
    last_row, last_column = (
        min(source.pixels.shape[0], ny - source.row),
        min(source.pixels.shape[1], nx - source.column),
    )
    if last_row <= first_row or last_column <= first_column:
        return
    light[
        source.row + first_row : source.row + last_row, source.column + first_column : source.column + last_column
    ] += flux * source.pixels[first_row:last_row, first_column:last_column]


def with_light(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    light: NDArray[np.float64],
    per_light: float,
    stream: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Image and variance with light added, and with the photon noise it brings.

    Parameters
    ----------
    image, variance, light : (ny, nx) in one unit of flux, and its square; light >= 0 but for ringing of its PSF
    per_light : as `variance_per_light` tells
    stream : of the noise
    """
    brought = per_light * np.maximum(light, 0.0)
    noise = np.sqrt(brought) * stream.standard_normal(light.shape)
    return (image + light + noise).astype(np.float32), (variance + brought).astype(np.float32)

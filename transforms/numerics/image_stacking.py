"""Stacking of registered exposures into a template, and the defects that single exposures have.

Exposures are brought to one pixel grid beforehand (transforms.numerics.warping), scaled to one flux unit and freed of
their background.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from transforms.numerics.warping import CoordinateGrid, coordinate_grid

_MAD_TO_SIGMA = 1.4826
_HIT_SIGMA = 7.0
_HIT_RATIO = 2.0  # of a pixel to the median of its 8 neighbours; the peak of a star of FWHM 3 has 1.5
_MAX_HIT_GROWTH = 4
_GROWTH_SIGMA = 4.0


class StackingError(ValueError):
    """Exposures that cannot be stacked; the message says why."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Clipped mean of exposures.

    Attributes
    ----------
    image : (ny, nx) float32, NaN where `n_used` is below the least number
    variance : (ny, nx) float32 of the mean, infinite there
    n_used : (ny, nx) int16, exposures in the mean
    n_given : (ny, nx) int16, exposures with a usable pixel, before clipping
    """

    image: NDArray[np.float32]
    variance: NDArray[np.float32]
    n_used: NDArray[np.int16]
    n_given: NDArray[np.int16]


def affine_grid(affine: NDArray[np.floating], shape: tuple[int, int], origin: tuple[float, float]) -> CoordinateGrid:
    """Where the pixels of an output image lie in an input image, for an affine transformation.

    Parameters
    ----------
    affine : (2, 3) floating, from the pixels of a common frame to those of the input image
    shape : (ny, nx) of the output image
    origin : (x, y) of the output's first pixel in the common frame

    Returns
    -------
    CoordinateGrid : exact for an affine transformation
    """
    x, y = coordinate_grid(shape)
    x, y = x + origin[0], y + origin[1]
    return CoordinateGrid(
        x=affine[0, 0] * x + affine[0, 1] * y + affine[0, 2],
        y=affine[1, 0] * x + affine[1, 1] * y + affine[1, 2],
        step_pix=32,
    )


def stack_exposures(
    images: NDArray[np.floating],
    variances: NDArray[np.floating],
    usable: NDArray[np.bool_],
    *,
    clip_sigma: float = 4.0,
    model_error: float = 0.1,
    min_exposures: int = 3,
) -> Stack:
    """Weighted mean of exposures with outliers left out, pixel by pixel.

    An exposure is left out of a pixel where it is further than `clip_sigma` errors from the median there, with
    ``error^2 = v + (model_error * |median|)^2``: the second term lets pass what different PSFs do to stars. Where
    half of the exposures or more would go, nothing is left out: there the sky itself varies. An exposure has one
    weight, 1 over the median of its variance, so that bright stars have the same PSF as faint ones.

    Parameters
    ----------
    images : (n, ny, nx) floating, same unit, background subtracted
    variances : (n, ny, nx) floating, square of that unit
    usable : (n, ny, nx) bool
    clip_sigma : > 0; a large number clips nothing
    model_error : >= 0, fraction of the flux
    min_exposures : least number in the mean, 1 to n

    Returns
    -------
    Stack

    Raises
    ------
    StackingError : shapes differ, no exposures, fewer than `min_exposures`, or one without a usable pixel

    Notes
    -----
    Of n exposures with white noise the mean has 1/sqrt(n) of it, and `variance` says so (tests).
    """
    if images.ndim != 3 or not images.shape == variances.shape == usable.shape or len(images) == 0:
        raise StackingError(f"planes differ or are empty: {images.shape}, {variances.shape}, {usable.shape}")
    if not 1 <= min_exposures <= len(images):
        raise StackingError(f"{len(images)} exposures, {min_exposures} are needed")
    good = usable & np.isfinite(images) & np.isfinite(variances) & (variances > 0)
    empty = [number for number, plane in enumerate(good) if not plane.any()]
    if empty:
        raise StackingError(f"exposures {empty} have no usable pixel")
    weights = np.array([1.0 / np.median(v[g]) for v, g in zip(variances, good, strict=True)], dtype=np.float64)
    ny, nx = images.shape[1:]
    out = Stack(
        image=np.full((ny, nx), np.nan, dtype=np.float32),
        variance=np.full((ny, nx), np.inf, dtype=np.float32),
        n_used=np.zeros((ny, nx), dtype=np.int16),
        n_given=np.zeros((ny, nx), dtype=np.int16),
    )
    _stack_pixels(
        np.ascontiguousarray(images, dtype=np.float32),
        np.ascontiguousarray(variances, dtype=np.float32),
        good,
        weights,
        clip_sigma,
        model_error,
        min_exposures,
        out.image,
        out.variance,
        out.n_used,
        out.n_given,
    )
    return out


@njit(cache=True)
def _stack_pixels(
    images: NDArray[np.float32],
    variances: NDArray[np.float32],
    good: NDArray[np.bool_],
    weights: NDArray[np.float64],
    clip_sigma: float,
    model_error: float,
    min_exposures: int,
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    n_used: NDArray[np.int16],
    n_given: NDArray[np.int16],
) -> None:
    n = images.shape[0]
    values = np.empty(n)
    for y in range(images.shape[1]):
        for x in range(images.shape[2]):
            count = 0
            for k in range(n):
                if good[k, y, x]:
                    values[count] = images[k, y, x]
                    count += 1
            n_given[y, x] = count
            if count < min_exposures:
                continue
            median = np.median(values[:count])
            n_inside = 0
            for k in range(n):
                if good[k, y, x] and not _is_outlier(
                    images[k, y, x], median, variances[k, y, x], clip_sigma, model_error
                ):
                    n_inside += 1
            # of two that disagree neither can be told to be wrong, and where most disagree the sky varies
            clips = count > 2 and 2 * n_inside > count
            total, total_weight, noise, used = 0.0, 0.0, 0.0, 0
            for k in range(n):
                if not good[k, y, x]:
                    continue
                if clips and _is_outlier(images[k, y, x], median, variances[k, y, x], clip_sigma, model_error):
                    continue
                total += weights[k] * images[k, y, x]
                total_weight += weights[k]
                noise += weights[k] ** 2 * variances[k, y, x]
                used += 1
            n_used[y, x] = used
            if used >= min_exposures:
                image[y, x] = total / total_weight
                variance[y, x] = noise / total_weight**2


@njit(cache=True)
def _is_outlier(value: float, median: float, variance: float, clip_sigma: float, model_error: float) -> bool:
    return bool((value - median) ** 2 > clip_sigma**2 * (variance + (model_error * median) ** 2))


def find_hits(image: NDArray[np.floating], variance: NDArray[np.floating], bad: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Cosmic rays and hot pixels: what is sharper than any star in a well-sampled image.

    A pixel that stands out of the median of its 8 neighbours by 7 sigma and is more than twice that median; then
    neighbours of hits that stand out of what is left by 4 sigma, up to 4 pixels away.

    Parameters
    ----------
    image : (ny, nx) floating, background subtracted; stars need a FWHM of at least 3 pixels
    variance : (ny, nx) floating, square of the image's unit
    bad : (ny, nx) bool, pixels that are known to be bad and not to be searched

    Returns
    -------
    (ny, nx) bool, never True where `bad`
    """
    pixels = np.where(bad, 0.0, image).astype(np.float64)
    # the variance of a hit holds its own photons: the neighbours' says what is expected there
    sigma = np.sqrt(ndimage.median_filter(np.where(bad, np.median(variance[~bad]), variance), 3))
    ring = np.ones((3, 3), dtype=np.bool_)
    ring[1, 1] = False
    around = ndimage.median_filter(pixels, footprint=ring)
    hits = (pixels - around > _HIT_SIGMA * sigma) & (pixels > _HIT_RATIO * around) & ~bad
    wide = np.ones((5, 5), dtype=np.bool_)
    wide[1:4, 1:4] = False
    outside = ndimage.median_filter(pixels, footprint=wide)
    stands_out = (pixels - outside > _GROWTH_SIGMA * sigma) & (pixels > 1.5 * _HIT_RATIO * outside) & ~bad
    return np.asarray(ndimage.binary_dilation(hits, mask=hits | stands_out, iterations=_MAX_HIT_GROWTH))

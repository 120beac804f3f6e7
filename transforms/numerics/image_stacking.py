"""Stacking of exposures into a template, and the defects that single exposures have.

    T(x, y) = sum_k w_k I_k / sum_k w_k,    I_k = warp(exposure_k - background_k) / flux ratio_k

with one weight for all pixels of an exposure, 1 over its variance, so that bright stars have the same PSF as faint
ones, and with what only one exposure shows left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from transforms.numerics.background import subtract_background
from transforms.numerics.decorrelation import interpolation_count
from transforms.numerics.warping import CoordinateGrid, coordinate_grid, warp_exposure

_HIT_SIGMA = 7.0
_HIT_RATIO = 2.0  # of a pixel to the median of its 8 neighbours; the peak of a star of FWHM 3 has 1.5
_MAX_HIT_GROWTH = 4
_GROWTH_SIGMA = 4.0
_UNKNOWN_FWHM_PIX = 4.0
_OUTLIER_GROWTH = 3  # pixels at most, into what stands out half as much
_SAT, _BAD = 1, 2  # bits of the mask that is warped


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
    weights : (n,) float64, of the exposures, sum 1
    """

    image: NDArray[np.float32]
    variance: NDArray[np.float32]
    n_used: NDArray[np.int16]
    n_given: NDArray[np.int16]
    weights: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ExposureToStack:
    """An exposure on its own pixels, and where these lie.

    Attributes
    ----------
    image : (ny_k, nx_k) floating, sky may be present, NaN where there are no data
    variance : (ny_k, nx_k) floating, square of the image's unit
    saturated, bad : (ny_k, nx_k) bool; bad pixels are not used, a saturated one is where nothing better is known
    grid : where the output pixels lie in it
    flux_ratio : its flux of a star over that wanted in the stack, > 0
    fwhm_pix : its seeing, in output pixels; NaN where it is not known
    """

    image: NDArray[np.floating]
    variance: NDArray[np.floating]
    saturated: NDArray[np.bool_]
    bad: NDArray[np.bool_]
    grid: CoordinateGrid
    flux_ratio: float
    fwhm_pix: float


@dataclass(frozen=True, eq=False)
class StackedExposure:
    """A template.

    Attributes
    ----------
    image : (ny, nx) float32, without background; NaN where too few exposures are
    variance : (ny, nx) float32, of white noise that gives sums over several pixels their error; infinite there
    saturated : (ny, nx) bool; a star's core is filled with what the exposures have there, so that it is no hole
    n_used : (ny, nx) int16, exposures in the mean
    weights : (n,) float64, of the exposures, sum 1
    interpolated : how often the noise was interpolated, `decorrelation.interpolation_count`
    """

    image: NDArray[np.float32]
    variance: NDArray[np.float32]
    saturated: NDArray[np.bool_]
    n_used: NDArray[np.int16]
    weights: NDArray[np.float64]
    interpolated: float


def stack_on_grid(
    exposures: Iterable[ExposureToStack],
    shape: tuple[int, int],
    *,
    min_exposures: int,
    background_box_pix: int = 128,
) -> StackedExposure:
    """Free exposures of their background, warp them to one grid, scale them to one flux unit and average them.

    A pixel that is saturated in half of the exposures or more is saturated in the stack.

    Parameters
    ----------
    exposures : taken one by one; the planes of all of them on the output grid are held, at most 27 bytes a pixel each
    shape : (ny, nx) of the output
    min_exposures : least number in a pixel, 1 to n
    background_box_pix : side of the boxes of the background

    Returns
    -------
    StackedExposure

    Raises
    ------
    StackingError, BackgroundError, WarpError : from the steps
    """
    images, variances, usable, fwhm_pix = [], [], [], []
    n_saturated, filling = np.zeros(shape, dtype=np.int16), np.full(shape, -np.inf, dtype=np.float32)
    filling_variance = np.zeros(shape, dtype=np.float32)
    single, white = [], []
    for one in exposures:
        sky = subtract_background(one.image, one.bad | one.saturated, background_box_pix)
        mask = (_SAT * one.saturated + _BAD * one.bad).astype(np.int32)
        warped = warp_exposure(sky.image, one.variance, mask, one.grid, shape)
        ratio = np.float32(one.flux_ratio)
        image, variance = warped.image / ratio, warped.white_variance / ratio**2
        saturated = ~warped.no_data & ((warped.mask & _SAT) != 0)
        n_saturated += saturated
        np.maximum(filling, image, out=filling, where=saturated)
        np.maximum(filling_variance, variance, out=filling_variance, where=saturated)
        good = ~warped.no_data & (warped.mask == 0)
        images.append(image)
        variances.append(variance)
        usable.append(good)
        fwhm_pix.append(one.fwhm_pix)
        if good.any():
            single.append(float(np.mean(warped.variance[good] / warped.white_variance[good], dtype=np.float64)))
            white.append(float(np.median(variance[good])))
    if not images:
        raise StackingError("no exposures")
    stack = stack_exposures(
        np.array(images), np.array(variances), np.array(usable), np.array(fwhm_pix), min_exposures=min_exposures
    )
    noise = stack.weights**2 * np.array(white)
    core = (n_saturated > 0) & (n_saturated >= stack.n_given)
    return StackedExposure(
        image=np.where(core, filling, stack.image),
        variance=np.where(core, filling_variance, stack.variance),
        saturated=core,
        n_used=stack.n_used,
        weights=stack.weights,
        interpolated=interpolation_count(noise * np.array(single), noise),
    )


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
    fwhm_pix: NDArray[np.floating] | None = None,
    *,
    clip_sigma: float = 4.0,
    model_error: float = 0.3,
    min_exposures: int = 3,
) -> Stack:
    """Weighted mean of exposures with outliers left out.

    An exposure k is left out of a pixel where

        |I_k - M| > clip_sigma sqrt(v_k) + (model_error + |1 - (fwhm / fwhm_k)^2|) L,

    with the median M, L the largest M within a little more than half a FWHM, and the median fwhm of the exposures: the
    second term is what another seeing does to a star at its core (peaks go with the inverse square) and, by L, in its
    wings. So are its neighbours, up to 3 pixels away, where they exceed half of that. Where half of the exposures or
    more would go, nothing is left out: there the sky itself varies.

    Parameters
    ----------
    images : (n, ny, nx) floating, same unit, background subtracted
    variances : (n, ny, nx) floating, square of that unit
    usable : (n, ny, nx) bool
    fwhm_pix : (n,) seeing; NaN for an exposure, or None, where it is not known: then taken for that of the others
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
    Of n exposures with white noise the mean has 1/sqrt(n) of it, and `variance` says so (tests). An exposure has one
    weight, 1 over the median of its variance.
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
    seeing = np.full(len(images), np.nan) if fwhm_pix is None else np.array(fwhm_pix, dtype=np.float64)
    usual = float(np.median(seeing[np.isfinite(seeing)])) if np.isfinite(seeing).any() else _UNKNOWN_FWHM_PIX
    seeing = np.where(np.isfinite(seeing), seeing, usual)
    tolerance = model_error + np.abs(1.0 - (usual / seeing) ** 2)
    images = np.ascontiguousarray(images, dtype=np.float32)
    variances = np.ascontiguousarray(variances, dtype=np.float32)
    shape = (images.shape[1], images.shape[2])
    median, n_given = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int16)
    _medians(images, good, median, n_given)
    brightest = ndimage.maximum_filter(np.maximum(median, 0.0), 2 * math.floor(0.5 * usual + 1.0) + 1)
    outlier = np.zeros(images.shape, dtype=np.uint8)
    _find_outliers(images, variances, good, median, n_given, brightest, clip_sigma, tolerance, outlier)
    for _ in range(_OUTLIER_GROWTH):
        _grow_outliers(outlier)
    out = Stack(
        image=np.full(shape, np.nan, dtype=np.float32),
        variance=np.full(shape, np.inf, dtype=np.float32),
        n_used=np.zeros(shape, dtype=np.int16),
        n_given=n_given,
        weights=weights / weights.sum(),
    )
    _average(images, variances, good, outlier, weights, min_exposures, out.image, out.variance, out.n_used)
    return out


_SUSPECT, _OUTLIER, _NEXT = 1, 2, 3  # beyond half the limit, beyond it, to become an outlier after this pass


@njit(cache=True)
def _medians(
    images: NDArray[np.float32], good: NDArray[np.bool_], median: NDArray[np.float32], n_given: NDArray[np.int16]
) -> None:
    n, ny, nx = images.shape
    values = np.empty(n, dtype=np.float32)
    for y in range(ny):
        for x in range(nx):
            count = 0
            for k in range(n):
                if good[k, y, x]:  # an insertion sort: there are few
                    value = images[k, y, x]
                    place = count
                    while place > 0 and values[place - 1] > value:
                        values[place] = values[place - 1]
                        place -= 1
                    values[place] = value
                    count += 1
            n_given[y, x] = count
            if count > 0:
                median[y, x] = np.float32(0.5) * (values[(count - 1) // 2] + values[count // 2])


@njit(cache=True)
def _find_outliers(
    images: NDArray[np.float32],
    variances: NDArray[np.float32],
    good: NDArray[np.bool_],
    median: NDArray[np.float32],
    n_given: NDArray[np.int16],
    brightest: NDArray[np.float32],
    clip_sigma: float,
    tolerance: NDArray[np.float64],
    outlier: NDArray[np.uint8],
) -> None:
    n, ny, nx = images.shape
    for k in range(n):
        for y in range(ny):
            for x in range(nx):
                if good[k, y, x] and n_given[y, x] > 2:  # of two that disagree neither can be told to be wrong
                    limit = clip_sigma * np.sqrt(variances[k, y, x]) + tolerance[k] * brightest[y, x]
                    off = abs(images[k, y, x] - median[y, x])
                    if off > limit:
                        outlier[k, y, x] = _OUTLIER
                    elif off > 0.5 * limit:
                        outlier[k, y, x] = _SUSPECT


@njit(cache=True)
def _grow_outliers(outlier: NDArray[np.uint8]) -> None:
    """One pixel more of what is suspect."""
    n, ny, nx = outlier.shape
    for k in range(n):
        for y in range(ny):
            for x in range(nx):
                if outlier[k, y, x] == _OUTLIER:
                    for row in range(max(y - 1, 0), min(y + 2, ny)):
                        for column in range(max(x - 1, 0), min(x + 2, nx)):
                            if outlier[k, row, column] == _SUSPECT:
                                outlier[k, row, column] = _NEXT
        for y in range(ny):
            for x in range(nx):
                if outlier[k, y, x] == _NEXT:
                    outlier[k, y, x] = _OUTLIER


@njit(cache=True)
def _average(
    images: NDArray[np.float32],
    variances: NDArray[np.float32],
    good: NDArray[np.bool_],
    outlier: NDArray[np.uint8],
    weights: NDArray[np.float64],
    min_exposures: int,
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    n_used: NDArray[np.int16],
) -> None:
    n, ny, nx = images.shape
    for y in range(ny):
        for x in range(nx):
            count, n_out = 0, 0
            for k in range(n):
                if good[k, y, x]:
                    count += 1
                    n_out += outlier[k, y, x] == _OUTLIER
            clips = 2 * n_out < count  # where most disagree the sky varies
            total, total_weight, noise, used = 0.0, 0.0, 0.0, 0
            for k in range(n):
                if good[k, y, x] and not (clips and outlier[k, y, x] == _OUTLIER):
                    total += weights[k] * images[k, y, x]
                    total_weight += weights[k]
                    noise += weights[k] ** 2 * variances[k, y, x]
                    used += 1
            n_used[y, x] = used
            if used >= min_exposures:
                image[y, x] = total / total_weight
                variance[y, x] = noise / total_weight**2


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

"""Smooth background of an exposure (sky, scattered light), by clipped modes in boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

_FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
_FIRST_CLIP_SIGMA = 2.0
_LEVELS = 2048  # of the histogram, over 10 sigma of the pixels that are left
_LEVELS_SIGMA = 5.0
_CLIP_SIGMA = 3.0
_MAX_CLIPS = 100
_PRECISION = 1e-4  # of sigma, at which clipping ends
_SKEWED = 0.3  # of sigma between mean and median: then the median is nearer to the sky


class BackgroundError(ValueError):
    """A background that cannot be measured; the message says how many pixels there were."""


@dataclass(frozen=True, eq=False)
class BackgroundSpline:
    """Bicubic spline through the boxes' values, continued to the edges of the image.

    Attributes
    ----------
    nodes : (n_boxes_y, n_boxes_x) float64
    box_pix : side of a box
    rms : median of the boxes' noise
    """

    nodes: NDArray[np.float64]
    box_pix: int
    rms: float

    def subtract_from(self, image: NDArray[np.floating], out: NDArray[np.float32]) -> float:
        """out = image - spline, which may be the same array; the mean of the spline where that is finite."""
        return float(_subtract_spline(image, self.nodes, _bends(self.nodes), self.box_pix, out))


@dataclass(frozen=True, eq=False)
class BackgroundSubtraction:
    """An image and its background, apart.

    Attributes
    ----------
    image : (ny, nx) float32, background subtracted; not finite where the input is not
    level : mean background, image's unit
    rms : mean noise of the sky, image's unit
    spline : evaluates the background
    """

    image: NDArray[np.float32]
    level: float
    rms: float
    spline: BackgroundSpline

    @property
    def background(self) -> NDArray[np.float32]:
        """(ny, nx) float32, finite everywhere."""
        background = np.zeros(self.image.shape, dtype=np.float32)
        self.spline.subtract_from(background, background)
        return np.negative(background, out=background)


def subtract_background(
    image: NDArray[np.floating], mask: NDArray[np.bool_], box_pix: int = 128
) -> BackgroundSubtraction:
    """Measure a smooth background in boxes and subtract it.

    In each box the mode of the clipped pixels is estimated (2.5 median - 1.5 mean), boxes are median filtered
    3 x 3 and joined by a bicubic spline (Bertin & Arnouts 1996). Boxes with fewer than half of their pixels
    take their neighbours' value.

    Parameters
    ----------
    image : (ny, nx) floating; non-finite pixels are left out
    mask : (ny, nx) bool, True for pixels to leave out
    box_pix : side of a box in pixels, >= 8; must be several times wider than the objects to keep

    Returns
    -------
    BackgroundSubtraction

    Raises
    ------
    BackgroundError : shapes differ, a box is too small, or no box has enough unmasked pixels
    """
    image, mask = np.asarray(image), np.asarray(mask, dtype=np.bool_)
    if image.ndim != 2 or image.shape != mask.shape or box_pix < 8:
        raise BackgroundError(f"image of shape {image.shape}, mask of shape {mask.shape}, boxes of {box_pix} pixels")
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    spline = _measured(image, mask, box_pix)
    pixels = np.empty(image.shape, dtype=np.float32)
    level = spline.subtract_from(image, pixels)
    return BackgroundSubtraction(image=pixels, level=level, rms=spline.rms, spline=spline)


def subtract_background_in_place(image: NDArray[np.float32], mask: NDArray[np.bool_], box_pix: int = 128) -> None:
    """The same, on a float32 image in place: a new plane costs more than the arithmetic.

    Parameters, Raises : as `subtract_background`; an image for which it raises is left as it was
    """
    _measured(image, mask, box_pix).subtract_from(image, image)


def _measured(image: NDArray[np.floating], mask: NDArray[np.bool_], box_pix: int) -> BackgroundSpline:
    modes, sigmas, n_used = _boxes(image, mask, box_pix)
    known = np.isfinite(modes)
    if not known.any():
        raise BackgroundError(
            f"no box of {box_pix} pixels is half usable: {mask.size - n_used} of {mask.size} pixels are masked or "
            "not finite"
        )
    if not known.all():
        rows, columns = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        modes = modes[rows, columns]
    return BackgroundSpline(_median_filtered(modes), box_pix, float(np.median(sigmas[known])))


@njit(cache=True)
def _boxes(
    image: NDArray[np.floating], mask: NDArray[np.bool_], box_pix: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Mode and noise of each box, NaN where less than half of it can be used; number of usable pixels."""
    ny, nx = image.shape
    modes = np.full(((ny + box_pix - 1) // box_pix, (nx + box_pix - 1) // box_pix), np.nan)
    sigmas = modes.copy()
    pixels = np.empty(box_pix * box_pix + 1, dtype=np.float32)
    histogram = np.empty(_LEVELS, dtype=np.int32)
    n_usable = 0
    for box_y in range(modes.shape[0]):
        rows = range(box_y * box_pix, min((box_y + 1) * box_pix, ny))
        for box_x in range(modes.shape[1]):
            first, end = box_x * box_pix, min((box_x + 1) * box_pix, nx)
            n = 0
            for y in rows:
                for x in range(first, end):  # every pixel is written, and overwritten by the next if it is bad
                    pixels[n] = image[y, x]
                    n += (not mask[y, x]) & np.isfinite(image[y, x])
            n_usable += n
            if n > 0 and 2 * n >= len(rows) * (end - first):
                modes[box_y, box_x], sigmas[box_y, box_x] = _mode_and_sigma(pixels[:n], histogram)
    return modes, sigmas, n_usable


@njit(cache=True, fastmath=_FAST_MATH)
def _mode_and_sigma(pixels: NDArray[np.float32], histogram: NDArray[np.int32]) -> tuple[float, float]:
    low, high = np.float32(-np.inf), np.float32(np.inf)
    mean, sigma = 0.0, 0.0
    origin = pixels[0]  # of sums, in float32: they only frame the histogram
    for _ in range(2):
        total, square, n = np.float32(0.0), np.float32(0.0), np.int32(0)
        for pixel in pixels:
            used = (pixel >= low) & (pixel <= high)
            value = pixel - origin if used else np.float32(0.0)
            total += value
            square += value * value
            n += np.int32(used)
        mean = float(total) / n
        sigma = math.sqrt(max(float(square) / n - mean * mean, 0.0))
        mean += float(origin)
        low, high = np.float32(mean - _FIRST_CLIP_SIGMA * sigma), np.float32(mean + _FIRST_CLIP_SIGMA * sigma)
    if not sigma > 0.0:
        return mean, 0.0
    step = 2.0 * _LEVELS_SIGMA * sigma / _LEVELS
    lowest = mean - _LEVELS_SIGMA * sigma
    start, per_step = np.float32(lowest - origin), np.float32(1.0 / step)
    histogram[:] = 0
    for pixel in pixels:
        place = (pixel - origin - start) * per_step
        if (place >= 0) & (place < _LEVELS):
            histogram[np.uint32(place)] += np.int32(1)
    mean, median, sigma = _clipped_moments(histogram)
    centre = median if abs(mean - median) > _SKEWED * sigma else 2.5 * median - 1.5 * mean
    return lowest + centre * step, sigma * step


@njit(cache=True, fastmath=_FAST_MATH)
def _clipped_moments(histogram: NDArray[np.int32]) -> tuple[float, float, float]:
    """Mean, median and standard deviation within 3 of these about the median, in levels from the lower edge."""
    first, end = 0, len(histogram)
    mean = median = sigma = 0.0
    for _ in range(_MAX_CLIPS):
        n, total, square = 0, 0.0, 0.0
        for level in range(first, end):
            count, value = histogram[level], level + 0.5
            n += count
            total += count * value
            square += count * value * value
        if n == 0:
            break
        before = sigma
        mean = total / n
        sigma = math.sqrt(max(square / n - mean * mean, 0.0))
        below, level = 0, first
        while 2 * (below + histogram[level]) < n:
            below += histogram[level]
            level += 1
        median = level + (0.5 * n - below) / histogram[level]
        if sigma < 0.1 or abs(sigma - before) <= _PRECISION * before:
            break
        first = max(int(median - _CLIP_SIGMA * sigma), 0)
        end = min(int(median + _CLIP_SIGMA * sigma) + 1, len(histogram))
    return mean, median, sigma


@njit(cache=True)
def _median_filtered(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Medians of 3 x 3, at the edges of 3 along them: a slope is kept by what lies alike on both sides."""
    ny, nx = values.shape
    out = np.empty_like(values)
    for y in range(ny):
        high = min(1, y, ny - 1 - y)
        for x in range(nx):
            wide = min(1, x, nx - 1 - x)
            out[y, x] = np.median(values[y - high : y + high + 1, x - wide : x + wide + 1].copy())
    return out


@njit(cache=True)
def _bends(nodes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Second derivatives along the first axis of natural splines through nodes one apart."""
    n = nodes.shape[0]
    bends, factor = np.zeros_like(nodes), np.zeros(n)
    for i in range(1, n - 1):
        factor[i] = 1.0 / (4.0 - factor[i - 1])
        bends[i] = (6.0 * (nodes[i + 1] - 2.0 * nodes[i] + nodes[i - 1]) - bends[i - 1]) * factor[i]
    for i in range(n - 2, 0, -1):
        bends[i] -= factor[i] * bends[i + 1]
    return bends


@njit(cache=True)
def _subtract_spline(
    image: NDArray[np.floating],
    nodes: NDArray[np.float64],
    bends_y: NDArray[np.float64],
    box_pix: int,
    out: NDArray[np.float32],
) -> float:
    ny, nx = image.shape
    n_y, n_x = nodes.shape
    of_row = np.zeros((n_x, 1))
    total, number = 0.0, 0
    for y in range(ny):
        low, v = _place(y, box_pix, n_y)
        high = min(low + 1, n_y - 1)
        w = 1.0 - v
        for node in range(n_x):
            of_row[node, 0] = w * nodes[low, node] + v * nodes[high, node]
            of_row[node, 0] += ((w**3 - w) * bends_y[low, node] + (v**3 - v) * bends_y[high, node]) / 6.0
        bends = _bends(of_row)
        for box in range(max(n_x - 1, 1)):
            right = min(box + 1, n_x - 1)
            first = 0 if box == 0 else box * box_pix + box_pix // 2
            end = nx if box >= n_x - 2 else (box + 1) * box_pix + box_pix // 2
            step = of_row[right, 0] - of_row[box, 0]
            slope = step - bends[box, 0] / 3.0 - bends[right, 0] / 6.0
            square, cube = 0.5 * bends[box, 0], (bends[right, 0] - bends[box, 0]) / 6.0
            centre = (box + 0.5) * box_pix - 0.5
            sum_of_box, n_of_box = _subtract_cubic(
                image[y, first:end],
                np.float32(of_row[box, 0]),
                np.float32(slope),
                np.float32(square),
                np.float32(cube),
                np.float32((first - centre) / box_pix),
                np.float32(1.0 / box_pix),
                out[y, first:end],
            )
            total += sum_of_box
            number += n_of_box
    return total / max(number, 1)


@njit(cache=True, fastmath=_FAST_MATH)
def _subtract_cubic(
    image: NDArray[np.floating],
    start: float,
    slope: float,
    square: float,
    cube: float,
    first: float,
    step: float,
    out: NDArray[np.float32],
) -> tuple[float, int]:
    """Subtract a cubic of ``first + step x`` from a row; sum of the cubic, and number of pixels, where it is finite."""
    total, number = np.float32(0.0), 0
    for x in range(len(image)):
        u = first + np.float32(x) * step
        background = start + u * (slope + u * (square + u * cube))
        value = np.float32(image[x]) - background
        finite = np.isfinite(value)
        total += background if finite else np.float32(0.0)
        number += finite
        out[x] = value
    return float(total), number


@njit(cache=True)
def _place(pixel: int, box_pix: int, n_boxes: int) -> tuple[int, float]:
    """The box whose centre lies at or before a pixel, of those that have a next one, and the distance in boxes."""
    position = (pixel + 0.5) / box_pix - 0.5
    box = min(max(int(np.floor(position)), 0), max(n_boxes - 2, 0))
    return box, position - box

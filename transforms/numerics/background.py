"""Smooth background of an exposure (sky, scattered light), by clipped modes in boxes with sep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sep
from numba import njit
from numpy.typing import NDArray

_LEVEL_STEP_PIX = 8  # a smooth background's mean needs no more


class BackgroundError(ValueError):
    """A background that cannot be measured; the message says how many pixels there were."""


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
    spline: sep.Background

    @property
    def background(self) -> NDArray[np.float32]:
        """(ny, nx) float32, finite everywhere."""
        return np.asarray(self.spline.back(dtype=np.float32))


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
    pixels = np.array(image, dtype=np.float32, order="C")
    spline = subtract_background_in_place(pixels, mask, box_pix)
    every = (slice(None, None, _LEVEL_STEP_PIX),) * 2
    return BackgroundSubtraction(
        image=pixels,
        level=float(np.nanmean(image[every].astype(np.float64) - pixels[every])),
        rms=float(spline.globalrms),
        spline=spline,
    )


def subtract_background_in_place(
    image: NDArray[np.float32], mask: NDArray[np.bool_], box_pix: int = 128
) -> sep.Background:
    """The same, on a C-contiguous float32 image in place: a new plane costs more than the arithmetic.

    Parameters, Raises : as `subtract_background`; an image for which it raises is left as it was

    Returns
    -------
    sep.Background that was subtracted
    """
    left_out = np.empty(image.shape, dtype=np.bool_)
    if not _mark_left_out(image, mask, box_pix, left_out):  # sep then returns zeros and says nothing
        raise BackgroundError(
            f"no box of {box_pix} pixels is half usable: {np.count_nonzero(left_out)} of {left_out.size} pixels are "
            "masked or not finite"
        )
    spline = sep.Background(image, mask=left_out, bw=box_pix, bh=box_pix)
    spline.subfrom(image)
    return spline


@njit(cache=True)
def _mark_left_out(
    image: NDArray[np.float32], mask: NDArray[np.bool_], box_pix: int, left_out: NDArray[np.bool_]
) -> bool:
    """Mark pixels that are masked or not finite; True if a box has half of its pixels."""
    ny, nx = image.shape
    any_is_half_used = False
    for y in range(0, ny, box_pix):
        for x in range(0, nx, box_pix):
            height, width = min(box_pix, ny - y), min(box_pix, nx - x)
            n_used = 0
            for row in range(y, y + height):
                for column in range(x, x + width):
                    used = (not mask[row, column]) & np.isfinite(image[row, column])
                    n_used += used
                    left_out[row, column] = not used
            any_is_half_used |= 2 * n_used >= height * width
    return any_is_half_used

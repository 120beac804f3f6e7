"""Smooth background of an exposure (sky, scattered light), by clipped modes in boxes with sep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sep
from numba import njit
from numpy.typing import NDArray


class BackgroundError(ValueError):
    """A background that cannot be measured; the message says how many pixels there were."""


@dataclass(frozen=True, eq=False)
class BackgroundSubtraction:
    """An image and its background, apart.

    Attributes
    ----------
    image : (ny, nx) float32, background subtracted; NaN where the input is
    background : (ny, nx) float32, finite everywhere
    level : mean background, image's unit
    rms : mean noise of the sky, image's unit
    """

    image: NDArray[np.float32]
    background: NDArray[np.float32]
    level: float
    rms: float


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
    estimate, pixels = _estimated(image, mask, box_pix)
    background = estimate.back(dtype=np.float32)
    return BackgroundSubtraction(
        image=np.subtract(image, background, out=pixels, casting="same_kind"),  # a new plane costs as much as a pass
        background=background,
        level=float(background.mean(dtype=np.float64)),
        rms=float(estimate.globalrms),
    )


def measure_background(image: NDArray[np.floating], mask: NDArray[np.bool_], box_pix: int = 128) -> NDArray[np.float32]:
    """The background alone, (ny, nx) float32, finite everywhere.

    Parameters, Raises : as `subtract_background`
    """
    return np.asarray(_estimated(image, mask, box_pix)[0].back(dtype=np.float32))


def _estimated(
    image: NDArray[np.floating], mask: NDArray[np.bool_], box_pix: int
) -> tuple[sep.Background, NDArray[np.float32]]:
    """The fitted background, and a plane that is not needed any more."""
    image, mask = np.asarray(image), np.asarray(mask, dtype=np.bool_)
    if image.ndim != 2 or image.shape != mask.shape or box_pix < 8:
        raise BackgroundError(f"image of shape {image.shape}, mask of shape {mask.shape}, boxes of {box_pix} pixels")
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    pixels, left_out = np.empty(image.shape, dtype=np.float32), np.empty(image.shape, dtype=np.bool_)
    if not _copy_used(image, mask, box_pix, pixels, left_out):  # sep then returns zeros and says nothing
        raise BackgroundError(
            f"no box of {box_pix} pixels is half usable: {np.count_nonzero(left_out)} of {left_out.size} pixels are "
            "masked or not finite"
        )
    return sep.Background(pixels, mask=left_out, bw=box_pix, bh=box_pix), pixels


@njit(cache=True)
def _copy_used(
    image: NDArray[np.floating],
    mask: NDArray[np.bool_],
    box_pix: int,
    pixels: NDArray[np.float32],
    left_out: NDArray[np.bool_],
) -> bool:
    """Copy with zeros where pixels are masked or not finite; True if a box has half of its pixels."""
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
                    pixels[row, column] = np.float32(image[row, column]) if used else np.float32(0.0)
            any_is_half_used |= 2 * n_used >= height * width
    return any_is_half_used

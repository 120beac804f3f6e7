"""The PSF of an image as pixels: one for each cell of 128 x 128 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PSF_CELL_PIX = 128


class PsfError(ValueError):
    """A PSF image that cannot be used; the message says what was found."""


@dataclass(frozen=True, eq=False)
class PsfGrid:
    """PSFs of the cells of an image, counted from its first pixel; a place beyond the last cell belongs to that one.

    So a grid of one cell is the same PSF everywhere.

    Attributes
    ----------
    images : (cells_y, cells_x, k, k) float32 or float64, k odd, finite, each centred on its middle pixel, sum 1

    Raises
    ------
    PsfError
        The images are not such arrays or have a sum that is not positive.
    """

    images: NDArray[np.floating]

    def __post_init__(self) -> None:
        images = self.images
        if images.ndim != 4 or images.size == 0 or images.shape[2] != images.shape[3] or images.shape[2] % 2 == 0:
            raise PsfError(f"PSFs of cells must be odd square images (cells_y, cells_x, k, k), got {images.shape}")
        finite = np.isfinite(images)
        if not finite.all():
            raise PsfError(f"'psf' has {int((~finite).sum())} pixels that are not finite")
        least = images.sum(axis=(2, 3), dtype=np.float64).min()
        if not least > 0.0:
            raise PsfError(f"'psf' must have a positive sum, got {least}")

    @property
    def of_cells(self) -> NDArray[np.floating]:
        """The images in a row, (n_cells, k, k); `cells_at` tells which."""
        return self.images.reshape(-1, *self.images.shape[2:])

    @property
    def middle(self) -> NDArray[np.floating]:
        """PSF (k, k) of the cell in the middle."""
        return np.asarray(self.images[self.images.shape[0] // 2, self.images.shape[1] // 2])

    def cells_at(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.int64]:
        """Which of `of_cells` holds at positions (n,) in pixels; places beyond the image, or NaN, have some cell."""
        row, column = (
            np.clip(np.floor((np.nan_to_num(position) + 0.5) / PSF_CELL_PIX), 0, n_cells - 1).astype(np.int64)
            for position, n_cells in zip((y, x), self.images.shape, strict=False)
        )
        return np.asarray(row * self.images.shape[1] + column)

    def at(self, x: float, y: float) -> NDArray[np.floating]:
        """PSF (k, k) at one place in pixels."""
        return np.asarray(self.of_cells[int(self.cells_at(x, y))])


def as_psf_grid(psf: ArrayLike | PsfGrid) -> PsfGrid:
    """A grid as it is, or one image (k, k) as the grid of the same PSF everywhere.

    Raises
    ------
    PsfError
        The image is not odd and square, has pixels that are not finite, or a sum that is not positive.
    """
    if isinstance(psf, PsfGrid):
        return psf
    image = np.asarray(psf, dtype=np.float64)
    if image.ndim != 2 or image.shape[0] != image.shape[1] or image.shape[0] % 2 == 0:
        raise PsfError(f"'psf' must be an odd square image, got shape {image.shape}")
    return PsfGrid(image[np.newaxis, np.newaxis])

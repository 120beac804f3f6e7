"""PSFs of cells: which cell a place belongs to, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.numerics.psf_grid import PSF_CELL_PIX, PsfError, PsfGrid, as_psf_grid
from transforms.numerics.psf_modelling import PsfModel, constant_psf


def numbered(cells_y: int, cells_x: int) -> PsfGrid:
    """A grid whose PSFs tell their cell by the first pixel."""
    images = np.ones((cells_y, cells_x, 3, 3), dtype=np.float32)
    images[..., 0, 0] = np.arange(cells_y * cells_x).reshape(cells_y, cells_x)
    return PsfGrid(images)


@given(
    cells=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    place=st.tuples(st.floats(-1e300, 1e300) | st.floats(-1.0, 600.0), st.floats(-1.0, 600.0)),
)
def test_a_place_belongs_to_the_cell_of_its_pixel_or_to_the_nearest_one(
    cells: tuple[int, int], place: tuple[float, float]
) -> None:
    x, y = place
    # The pixel is the one whose centre is nearest; all that is beyond the image is cut to it before that.
    row, column = (
        min(int((min(max(value, 0.0), 1e4) + 0.5) // PSF_CELL_PIX), n - 1)
        for value, n in zip((y, x), cells, strict=True)
    )
    grid = numbered(*cells)
    assert grid.at(x, y)[0, 0] == row * cells[1] + column
    assert grid.cells_at([x], [y]).tolist() == [row * cells[1] + column]


def test_places_that_are_no_number_have_some_cell() -> None:
    cells = numbered(2, 3).cells_at([np.nan, np.inf, -np.inf], [np.nan, -np.inf, np.inf])
    assert cells.tolist() == [0, 2, 3]


def test_one_image_is_the_psf_everywhere() -> None:
    image = np.arange(9.0).reshape(3, 3)
    grid = as_psf_grid(image)
    for place in ((0.0, 0.0), (4000.0, 17.0), (-9.0, 1e5)):
        np.testing.assert_array_equal(grid.at(*place), image)
    np.testing.assert_array_equal(grid.middle, image)
    assert as_psf_grid(grid) is grid


def test_cells_of_a_model_have_its_psf_at_their_centres_and_a_constant_one_has_one_cell() -> None:
    narrow, wide = (np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2) for sigma in (1.5, 1.9))
    basis = np.stack([np.outer(one, one) / np.outer(one, one).sum() for one in (narrow, wide)])
    model = PsfModel(basis, np.array([[0.5, 0.3, 0.1], [0.5, -0.3, -0.1]]), 1, (200, 400), 4.0, 50)
    images = model.on_cells().images
    assert images.shape == (2, 4, 13, 13)
    for row, y in enumerate((63.5, 163.5)):
        for column, x in enumerate((63.5, 191.5, 319.5, 391.5)):
            np.testing.assert_allclose(images[row, column], model.at(x, y)[0], rtol=1e-6)
    assert constant_psf(basis[0], (200, 400)).on_cells().images.shape == (1, 1, 13, 13)


@pytest.mark.parametrize(
    ("images", "evidence"),
    [
        (np.ones((3, 3)), r"\(3, 3\)"),
        (np.ones((2, 2, 4, 4)), r"\(2, 2, 4, 4\)"),
        (np.ones((2, 2, 3, 5)), r"\(2, 2, 3, 5\)"),
        (np.ones((0, 2, 3, 3)), r"\(0, 2, 3, 3\)"),
        (np.full((1, 2, 3, 3), np.inf), "18 pixels"),
        (np.array([1.0, -2.0])[:, None, None, None] * np.ones((2, 1, 3, 3)), r"positive sum, got -18"),
    ],
)
def test_useless_psfs_are_refused_with_the_evidence(images: np.ndarray, evidence: str) -> None:
    with pytest.raises(PsfError, match=evidence):
        PsfGrid(images)

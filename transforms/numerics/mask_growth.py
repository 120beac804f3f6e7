"""Masks grown by squares, in time that does not depend on their size."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


def grown(bad: NDArray[np.bool_], radius_pix: int, *, outside: bool = False) -> NDArray[np.bool_]:
    """True within a square of half side `radius_pix` of a True pixel.

    Parameters
    ----------
    bad : (ny, nx) bool
    radius_pix : >= 0
    outside : what lies beyond the image's edges

    Returns
    -------
    (ny, nx) bool
    """
    bad = np.ascontiguousarray(bad, dtype=np.bool_)
    along_x = np.empty_like(bad)
    _grow_rows(bad, radius_pix, outside, along_x)
    result = np.empty_like(bad)
    _grow_columns(along_x, radius_pix, outside, result)
    return result


@njit(cache=True)
def _grow_rows(bad: NDArray[np.bool_], radius: int, outside: bool, out: NDArray[np.bool_]) -> None:
    ny, nx = bad.shape
    far = -radius - 1
    for y in range(ny):
        last = -1 if outside else far  # nearest True pixel to the left, or the edge
        for x in range(nx):
            if bad[y, x]:
                last = x
            out[y, x] = x - last <= radius
        last = nx if outside else nx + radius
        for x in range(nx - 1, -1, -1):
            if bad[y, x]:
                last = x
            if last - x <= radius:
                out[y, x] = True


@njit(cache=True)
def _grow_columns(bad: NDArray[np.bool_], radius: int, outside: bool, out: NDArray[np.bool_]) -> None:
    """Row by row, with the last True row of each column, so that memory is read in order."""
    ny, nx = bad.shape
    last = np.full(nx, -1 if outside else -radius - 1, dtype=np.int64)
    for y in range(ny):
        for x in range(nx):
            if bad[y, x]:
                last[x] = y
            out[y, x] = y - last[x] <= radius
    last[:] = ny if outside else ny + radius
    for y in range(ny - 1, -1, -1):
        for x in range(nx):
            if bad[y, x]:
                last[x] = y
            if last[x] - y <= radius:
                out[y, x] = True

"""Glint trails: sources in a straight row, as a tumbling satellite flashes, by the chance that a row is none."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

LEAST_GLINTS = 5
REACH_PIX = 1000.0  # longest row that is tested; longer ones consist of such
TOLERANCE_PIX = 2.0  # off the line: centroids of S/N 5 are right to 0.12 FWHM, orbits straight
APART_PIX = 12.0  # sources nearer to each other count once: pieces of one residual
FALSE_ROWS = 1e-3  # expected per detector, if sources lie at random around each other
BESIDE = 10.0  # half-widths of a row that a row of chance, out of clumps, would fill as well
FILLED_BY_CHANCE = 5e-3  # 3 of 3 have 1e-3, 3 of 5 have 9e-3
_NEIGHBOURS = 100.0  # at most on average within reach: bounds the cost in crowds, where long rows are chance


def find_glint_trails(x: ArrayLike, y: ArrayLike, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Find sources that lie in a straight row more than chance has it.

    Each ordered pair (i, j) of sources at most 1,000 pixels apart is the test of one row. Of the m other sources in the
    square of half-side |ij| around i, k lie between i and j within 2 pixels of the line. Were the m at random in the
    square (clipped to the image), each would be there with p = 4 |ij| / area. The row counts when k >= 3 and
    n_pairs P(Binomial(m, p) >= k) <= 1e-3: the sum of these chances bounds the expected number of false rows, whatever
    the density and however it varies on scales above that of the row. Against clumps, which are smaller, the row must
    also be thin: of the sources within 20 pixels of the line, a tenth by chance, too many lie in it for 5e-3.

    Parameters
    ----------
    x, y : (n,) pixels, finite, of the sources of one sign
    shape : (ny, nx) of the image

    Returns
    -------
    (n,) bool, the ends of a row and all between them; invariant under the order of the sources but for groups of
    sources within 12 pixels, of which the first counts

    Raises
    ------
    ValueError
        x and y are no lists of one length.

    Notes
    -----
    Exact: no row is missed for want of tries. At most 100 neighbours a source are looked at on average, however they
    are clumped; in even fields O(n (n + 100^2)).
    """
    x_pix, y_pix = np.ascontiguousarray(x, dtype=np.float64), np.ascontiguousarray(y, dtype=np.float64)
    if x_pix.ndim != 1 or x_pix.shape != y_pix.shape:
        raise ValueError(f"'x' and 'y' must be one-dimensional and of one length, got {x_pix.shape} and {y_pix.shape}")
    in_row = np.zeros(x_pix.size, dtype=np.bool_)
    if x_pix.size >= LEAST_GLINTS:
        counted = _first_of_groups(x_pix, y_pix)
        reach = min(REACH_PIX, math.sqrt(_NEIGHBOURS * shape[0] * shape[1] / (4.0 * counted.sum())))
        n_pairs = _pairs_within(x_pix[counted], y_pix[counted], reach)
        while n_pairs > _NEIGHBOURS * counted.sum():  # sources in clumps
            reach *= 0.8
            n_pairs = _pairs_within(x_pix[counted], y_pix[counted], reach)
        rows = _find_rows(x_pix[counted], y_pix[counted], shape[0], shape[1], reach, n_pairs)
        for x0, y0, x1, y1 in rows:
            in_row |= _between(x_pix, y_pix, x0, y0, x1, y1)
    return in_row


def _between(
    x: NDArray[np.float64], y: NDArray[np.float64], x0: float, y0: float, x1: float, y1: float
) -> NDArray[np.bool_]:
    """Which sources lie on the row from one end to the other, ends included."""
    length = math.hypot(x1 - x0, y1 - y0)
    along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length
    across = ((y - y0) * (x1 - x0) - (x - x0) * (y1 - y0)) / length
    between: NDArray[np.bool_] = (np.abs(across) <= TOLERANCE_PIX) & (
        np.abs(along - 0.5 * length) < 0.5 * length + 1e-6
    )
    return between


@njit(cache=True)
def _first_of_groups(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    counted = np.ones(x.size, dtype=np.bool_)
    for i in range(x.size):
        for j in range(i):
            if counted[j] and math.hypot(x[i] - x[j], y[i] - y[j]) < APART_PIX:
                counted[i] = False
                break
    return counted


@njit(cache=True)
def _pairs_within(x: NDArray[np.float64], y: NDArray[np.float64], reach: float) -> int:
    """Number of ordered pairs."""
    n_pairs = 0
    for i in range(x.size):
        for j in range(i):
            if math.hypot(x[j] - x[i], y[j] - y[i]) <= reach:
                n_pairs += 2
    return n_pairs


@njit(cache=True)
def _find_rows(
    x: NDArray[np.float64], y: NDArray[np.float64], ny: int, nx: int, reach: float, n_pairs: int
) -> NDArray[np.float64]:
    """(n_rows, 4) ends x0, y0, x1, y1 of the rows that chance does not explain."""
    n = x.size
    rows = []
    near = np.empty(n, dtype=np.int64)
    for i in range(n):
        n_near = 0
        for j in range(n):
            if j != i and max(abs(x[j] - x[i]), abs(y[j] - y[i])) <= reach:
                near[n_near] = j
                n_near += 1
        for j in near[:n_near]:
            dx, dy = x[j] - x[i], y[j] - y[i]
            length = math.hypot(dx, dy)
            if length > reach:
                continue
            n_others, n_between, n_beside = 0, 0, 0
            for k in near[:n_near]:
                u, v = x[k] - x[i], y[k] - y[i]
                if k == j or max(abs(u), abs(v)) > length:
                    continue
                n_others += 1
                along = u * dx + v * dy
                across = abs(v * dx - u * dy)
                if 0.0 < along < length * length and across <= BESIDE * TOLERANCE_PIX * length:
                    n_beside += 1
                    if across <= TOLERANCE_PIX * length:
                        n_between += 1
            if n_between < LEAST_GLINTS - 2 or _tail(n_beside, n_between, 1.0 / BESIDE) > FILLED_BY_CHANCE:
                continue
            wide = min(x[i] + length, nx - 0.5) - max(x[i] - length, -0.5)
            high = min(y[i] + length, ny - 0.5) - max(y[i] - length, -0.5)
            chance = min(2.0 * TOLERANCE_PIX * length / (wide * high), 1.0)
            if n_pairs * _tail(n_others, n_between, chance) <= FALSE_ROWS:
                rows.append((x[i], y[i], x[j], y[j]))
    ends = np.empty((len(rows), 4))
    for row in range(len(rows)):
        ends[row, 0], ends[row, 1], ends[row, 2], ends[row, 3] = rows[row]
    return ends


@njit(cache=True)
def _tail(m: int, k: int, p: float) -> float:
    """P(Binomial(m, p) >= k)."""
    if p >= 1.0:
        return 1.0
    log_term = math.lgamma(m + 1.0) - math.lgamma(k + 1.0) - math.lgamma(m - k + 1.0)
    term = math.exp(log_term + k * math.log(p) + (m - k) * math.log1p(-p))
    total = 0.0
    for hits in range(k, m + 1):
        total += term
        term *= (m - hits) / (hits + 1.0) * p / (1.0 - p)
    return total

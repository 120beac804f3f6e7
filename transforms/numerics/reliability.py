"""The reliability of detected sources: boosted trees on `reliability_features`, with calibrated scores.

The trees are plain arrays, walked in one compiled loop: the same bytes anywhere, and no learning library to install
where alerts are made. `reliability_fitting` makes them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from transforms.numerics.reliability_features import FEATURES

_LEAF = -1
_FIT = list(FEATURES).index("fit_over_peak")


class TreeModel(NamedTuple):
    """Trees as rows of nodes, and what turns their sum into a score.

    Attributes
    ----------
    roots : (n_trees,) int64, the first node of each tree
    feature : (n_nodes,) int64, column that a node looks at, -1 for a leaf
    threshold : (n_nodes,) float64, values up to it go left
    nan_left : (n_nodes,) bool, where what was not measured goes
    left, right : (n_nodes,) int64, the next nodes; larger than the node itself
    value : (n_nodes,) float64, what a leaf adds
    slope, offset : score = 1 / (1 + exp(-(slope * sum + offset))); slope > 0
    """

    roots: NDArray[np.int64]
    feature: NDArray[np.int64]
    threshold: NDArray[np.float64]
    nan_left: NDArray[np.bool_]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: NDArray[np.float64]
    slope: float
    offset: float


class TreeModelError(ValueError):
    """Trees that cannot be walked; the message says why."""


def score(features: ArrayLike, model: TreeModel) -> NDArray[np.float32]:
    """Score how reliably each detection is a real change on the sky: 0 not at all, 1 surely.

    Parameters
    ----------
    features : (n, len(FEATURES)) from `reliability_features`
    model : checked by `check_model`

    Returns
    -------
    (n,) float32 in [0, 1]; 0 where the PSF fit gave nothing. Among as many bogus as real sources of the training's mix
    it is the part that is real.

    Notes
    -----
    The sum of trees is that of LightGBM to the bit (tested). About 6 us a source for 250 trees.
    """
    table = np.ascontiguousarray(features, dtype=np.float32)
    if table.ndim != 2 or table.shape[1] != len(FEATURES):
        raise ValueError(f"features must have shape (n, {len(FEATURES)}), got {table.shape}")
    with np.errstate(over="ignore"):
        reliability = 1.0 / (1.0 + np.exp(-(model.slope * raw_score(table, model) + model.offset)))
    return np.where(np.isfinite(table[:, _FIT]), reliability, 0.0).astype(np.float32)


def raw_score(table: NDArray[np.float32], model: TreeModel) -> NDArray[np.float64]:
    """(n,) sums of all trees, before calibration."""
    total = np.zeros(len(table))
    _walk(table, *model[:7], total)
    return total


def check_model(model: TreeModel) -> None:
    """Refuse trees that do not end or that look at features there are none of.

    Raises
    ------
    TreeModelError
        The message says what is wrong.
    """
    n_nodes = len(model.feature)
    if any(len(column) != n_nodes for column in model[2:7]):
        raise TreeModelError(f"columns of nodes differ in length: {[len(column) for column in model[1:7]]}")
    if n_nodes == 0 or np.any((model.roots < 0) | (model.roots >= n_nodes)):
        raise TreeModelError(f"roots must be among the {n_nodes} nodes")
    inner = np.flatnonzero(model.feature != _LEAF)
    if np.any((model.feature[inner] < 0) | (model.feature[inner] >= len(FEATURES))):
        raise TreeModelError(f"nodes look at features beyond the {len(FEATURES)} there are")
    for child in (model.left[inner], model.right[inner]):
        if np.any((child <= inner) | (child >= n_nodes)):
            raise TreeModelError("a node must come before its children")
    numbers = np.concatenate([model.threshold[inner], model.value, [model.slope, model.offset]])
    if not np.isfinite(numbers).all() or not model.slope > 0.0:
        raise TreeModelError("thresholds, values and calibration must be finite, the slope positive")


@njit(cache=True)
def _walk(
    table: NDArray[np.float32],
    roots: NDArray[np.int64],
    feature: NDArray[np.int64],
    threshold: NDArray[np.float64],
    nan_left: NDArray[np.bool_],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    value: NDArray[np.float64],
    total: NDArray[np.float64],
) -> None:
    for row in range(len(table)):
        for root in roots:
            node = root
            while feature[node] >= 0:
                seen = np.float64(table[row, feature[node]])
                goes_left = nan_left[node] if np.isnan(seen) else seen <= threshold[node]
                node = left[node] if goes_left else right[node]
            total[row] += value[node]

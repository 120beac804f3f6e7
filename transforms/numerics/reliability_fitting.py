"""Fitting and judging the reliability model: trees by LightGBM, calibration, completeness and purity."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transforms.numerics.reliability import TreeModel, check_model
from transforms.numerics.reliability_features import FEATURES

# The more of it, the less reliable; the rest may go either way. What the training has little of must not turn around.
WORSE_WITH_MORE = (
    "core_misfit",
    "peak_excess",
    "opposite_part",
    "negative_part",
    "asymmetry",
    "expected_residual",
    "static_flux",
)
_ROUNDS = 250
_SETTINGS = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 40,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "monotone_constraints": [-1 if name in WORSE_WITH_MORE else 0 for name in FEATURES],
    "monotone_constraints_method": "intermediate",
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}
_NEWTON_STEPS = 50


class TrainingError(ValueError):
    """A model that cannot be fitted; the message says why."""


def balanced_weights(class_index: NDArray[np.integer]) -> NDArray[np.float64]:
    """(n,) weights, mean 1: bogus (class 0) weighs as much as all that is real, whose classes weigh the same each."""
    weight = np.zeros(class_index.size)
    real_classes = np.unique(class_index[class_index > 0])
    for one in real_classes:
        weight[class_index == one] = 0.5 / (np.count_nonzero(class_index == one) * len(real_classes))
    bogus = class_index == 0
    weight[bogus] = 0.5 / max(int(np.count_nonzero(bogus)), 1)
    return weight * class_index.size


def fit_trees(features: NDArray[np.float32], class_index: NDArray[np.integer], seed: int) -> TreeModel:
    """Fit the trees; not calibrated yet (slope 1, offset 0).

    Parameters
    ----------
    features : (n, len(FEATURES)) float32
    class_index : (n,) >= 0; 0 is bogus, every other is a class of real sources
    seed : of the subsets that trees see; the same arguments give the same trees

    Raises
    ------
    TrainingError
        Nothing of one kind, or no LightGBM.
    """
    is_real = class_index > 0
    if is_real.all() or not is_real.any():
        raise TrainingError(f"{np.count_nonzero(is_real)} of {is_real.size} sources are real: both kinds are needed")
    booster = fit_booster(features, class_index, seed)
    return _as_model(booster.dump_model()["tree_info"])


def fit_booster(features: NDArray[np.float32], class_index: NDArray[np.integer], seed: int) -> Any:
    """The same as LightGBM's own object."""
    try:
        import lightgbm
    except ImportError as error:
        raise TrainingError("training needs LightGBM: pip install 'nightstream[training]'") from error
    data = lightgbm.Dataset(
        features,
        (class_index > 0).astype(np.float64),
        weight=balanced_weights(class_index),
        feature_name=list(FEATURES),
    )
    return lightgbm.train({**_SETTINGS, "seed": seed}, data, _ROUNDS)


def calibrated(
    model: TreeModel, raw: NDArray[np.float64], is_real: NDArray[np.bool_], weight: NDArray[np.float64]
) -> TreeModel:
    """The model with slope and offset of the logistic curve that fits raw scores to labels (Platt's scaling).

    Newton steps on the weighted log-likelihood with Platt's targets, (n + 1) / (n + 2) for n of a kind, which keep the
    curve finite where the two kinds are apart.
    """
    n_real, n_bogus = np.count_nonzero(is_real), np.count_nonzero(~is_real)
    target = np.where(is_real, (n_real + 1.0) / (n_real + 2.0), 1.0 / (n_bogus + 2.0))
    slope, offset = 1.0, 0.0
    for _ in range(_NEWTON_STEPS):
        score = 1.0 / (1.0 + np.exp(-(slope * raw + offset)))
        error, power = weight * (score - target), weight * np.maximum(score * (1.0 - score), 1e-9)
        gradient = np.array([np.sum(error * raw), np.sum(error)])
        hessian = np.array([[np.sum(power * raw * raw), np.sum(power * raw)], [np.sum(power * raw), np.sum(power)]])
        step = np.clip(np.linalg.solve(hessian, gradient), -1.0, 1.0)
        slope, offset = max(slope - step[0], 0.05), offset - step[1]
        if np.abs(step).max() < 1e-9:
            break
    fitted = model._replace(slope=float(slope), offset=float(offset))
    check_model(fitted)
    return fitted


def _as_model(trees: list[dict[str, Any]]) -> TreeModel:
    nodes: list[list[float]] = []  # feature, threshold, nan_left, left, right, value

    def add(node: dict[str, Any]) -> int:
        row = len(nodes)
        if "leaf_value" in node:
            nodes.append([-1, 0.0, False, 0, 0, node["leaf_value"]])
            return row
        # Without a NaN in training LightGBM takes one for 0.
        nan_left = node["default_left"] if node["missing_type"] == "NaN" else node["threshold"] >= 0.0
        nodes.append([node["split_feature"], node["threshold"], nan_left, 0, 0, 0.0])
        nodes[row][3] = add(node["left_child"])
        nodes[row][4] = add(node["right_child"])
        return row

    roots = [add(tree["tree_structure"]) for tree in trees]
    feature, threshold, nan_left, left, right, value = zip(*nodes, strict=True)
    whole = [np.array(column, dtype=np.int64) for column in (roots, feature, left, right)]
    real = [np.array(column, dtype=np.float64) for column in (threshold, value)]
    model = TreeModel(
        whole[0], whole[1], real[0], np.array(nan_left, dtype=np.bool_), whole[2], whole[3], real[1], 1.0, 0.0
    )
    check_model(model)
    return model

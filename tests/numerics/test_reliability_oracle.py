"""Training with LightGBM: our walk through the trees gives its sums, and the same data give the same model."""

from __future__ import annotations

import numpy as np
import pytest

from transforms.numerics.reliability import TreeModel, raw_score, score
from transforms.numerics.reliability_features import FEATURES
from transforms.numerics.reliability_fitting import (
    WORSE_WITH_MORE,
    TrainingError,
    balanced_weights,
    calibrated,
    fit_booster,
    fit_trees,
)

pytest.importorskip("lightgbm", exc_type=ImportError)


def sample(n: int = 3000, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Features of which the fifth tells real from bogus, with some not measured, one never; classes 0 to 3."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, len(FEATURES))).astype(np.float32)
    classes = np.where(features[:, 4] + 0.5 * rng.normal(size=n) > 0.0, 0, rng.integers(1, 4, n))
    features[rng.uniform(size=features.shape) < 0.05] = np.nan
    features[:, 7], features[:, 5] = np.nan, rng.normal(size=n)
    return features, classes


def test_scores_are_those_of_lightgbm_to_the_bit() -> None:
    features, classes = sample()
    model = fit_trees(features, classes, 3)
    unseen, _ = sample(seed=2)
    unseen[::7, 5] = np.nan  # which training never saw there
    theirs = fit_booster(features, classes, 3).predict(unseen, raw_score=True, num_threads=1)
    np.testing.assert_array_equal(raw_score(unseen, model), theirs)


def test_the_same_data_give_the_same_trees_and_another_seed_others() -> None:
    features, classes = sample()
    first, again, other = (fit_trees(features, classes, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in TreeModel._fields)
    assert not np.array_equal(first.value, other.value)


def test_what_makes_worse_never_raises_the_sum() -> None:
    features, classes = sample()
    model = fit_trees(features, classes, 3)
    for name in WORSE_WITH_MORE:
        table = np.repeat(features[:5], 50, axis=0)
        table[:, list(FEATURES).index(name)] = np.tile(np.linspace(-3.0, 3.0, 50, dtype=np.float32), 5)
        assert np.diff(raw_score(table, model).reshape(5, 50), axis=1).max() <= 1e-12  # rounding of the sum


def test_calibrated_scores_are_the_part_that_is_real() -> None:
    features, classes = sample(20000)
    model = fit_trees(features[:10000], classes[:10000], 3)
    tune, test = slice(10000, 15000), slice(15000, 20000)
    model = calibrated(model, raw_score(features[tune], model), classes[tune] > 0, balanced_weights(classes[tune]))
    found, weight = score(features[test], model), balanced_weights(classes[test])
    for least in (0.1, 0.3, 0.5, 0.7):
        inside = (found >= least) & (found < least + 0.2)
        part = np.average(classes[test][inside] > 0, weights=weight[inside])
        # 5 sigma of a binomial part, and the step of the bin's own slope
        assert abs(part - found[inside].mean()) < 5.0 * np.sqrt(0.25 / np.count_nonzero(inside)) + 0.02


def test_one_kind_of_source_is_refused() -> None:
    features, classes = sample(100)
    with pytest.raises(TrainingError, match="both kinds"):
        fit_trees(features, np.zeros_like(classes), 1)

"""The reliability model as a file, and the one that comes with the package."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transforms.numerics.reliability import TreeModel, check_model
from transforms.numerics.reliability_features import FEATURES

LONGEST_VERSION = 7  # characters that the alert schema has for it
_WHOLE = ("roots", "feature", "left", "right")
_REAL = ("threshold", "value")


class ReliabilityModelError(ValueError):
    """A model file that cannot be used; the message names it and says why."""


class ReliabilityModel(NamedTuple):
    """A model, its name in alerts, and the score from which sources count as reliable."""

    version: str
    threshold: float
    trees: TreeModel


@cache
def shipped_model() -> ReliabilityModel:
    """The model of this release."""
    with resources.as_file(resources.files("transforms") / "models" / "reliability.json") as path:
        return read_model(path)


def read_model(path: Path) -> ReliabilityModel:
    """Read a model that `write_model` wrote.

    Raises
    ------
    ReliabilityModelError
        The file is no model, or one of other features.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["features"] != list(FEATURES):
            raise ReliabilityModelError(f"{path}: a model of other features than this release has; train it anew")
        roots, feature, left, right = (np.array(known[name], dtype=np.int64) for name in _WHOLE)
        threshold, value = (np.array(known[name], dtype=np.float64) for name in _REAL)
        nan_left = np.array(known["nan_left"], dtype=np.int64) != 0
        calibration = float(known["slope"]), float(known["offset"])
        trees = TreeModel(roots, feature, threshold, nan_left, left, right, value, *calibration)
        check_model(trees)
        version, reliable_from = str(known["version"]), float(known["reliable_from"])
    except ReliabilityModelError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ReliabilityModelError(f"{path}: no reliability model: {type(error).__name__}: {error}") from error
    if not 0 < len(version) <= LONGEST_VERSION:
        raise ReliabilityModelError(f"{path}: version {version!r} must have 1 to {LONGEST_VERSION} characters")
    return ReliabilityModel(version, reliable_from, trees)


def write_model(path: Path, model: ReliabilityModel) -> None:
    """Write a model as JSON; numbers are written so that reading gives the same bits."""
    lines = {"version": model.version, "reliable_from": model.threshold, "features": list(FEATURES)}
    lines |= {"slope": model.trees.slope, "offset": model.trees.offset}
    for name in (*_WHOLE, "nan_left", *_REAL):
        column = getattr(model.trees, name)
        lines[name] = column.astype(np.int64).tolist() if column.dtype == np.bool_ else column.tolist()
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in lines.items())
    path.write_text("{\n" + text + "\n}\n", encoding="utf-8")

"""FitReliability: from labelled sources to a model and its card."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np

from transforms.numerics.reliability import TreeModel, raw_score, score
from transforms.numerics.reliability_features import FEATURES
from transforms.numerics.reliability_fitting import TrainingError, balanced_weights, calibrated, fit_trees
from transforms.reliability_card import Judged, card
from transforms.reliability_model import ReliabilityModel, write_model
from transforms.reliability_training import LabelledSources, TrainingPair

MODEL, CARD = "reliability.json", "reliability.md"
RELIABLE_FROM = 0.5
_FIT_SEED = 1


class FitReliability(beam.PTransform):
    """Fit, calibrate and judge the model of all pairs, once all are stored.

    Input: names of stored pairs, at least one. Output: path of the model. The pairs are read in the order of `pairs`,
    so the order in which they come does not matter. No state.
    """

    def __init__(self, folder: str, version: str, pairs: tuple[TrainingPair, ...]) -> None:
        super().__init__()
        self.folder = folder
        self.version = version
        self.pairs = pairs

    def expand(self, names: beam.PCollection) -> beam.PCollection:
        return (
            names
            | "GatherNames" >> beam.combiners.ToList()
            | "FitModel" >> beam.Map(_fit, self.folder, self.version, self.pairs).with_output_types(str)
        )


def _fit(names: Iterable[str], folder: str, version: str, pairs: tuple[TrainingPair, ...]) -> str:
    stored = set(names)
    return fit_folder(Path(folder), version, [pair for pair in pairs if pair.name in stored])


def store_labelled(folder: Path, pair: TrainingPair, labelled: LabelledSources) -> str:
    """Write the sources of a pair under a temporary name and rename it; the pair's name."""
    path = stored_path(folder, pair)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    with part.open("wb") as file:
        np.savez_compressed(file, rows=labelled.rows, features=labelled.features, names=np.array(list(FEATURES)))
    os.replace(part, path)
    return pair.name


def stored_path(folder: Path, pair: TrainingPair) -> Path:
    return folder / "pairs" / f"{pair.name}.npz"


def is_stored(folder: Path, pair: TrainingPair) -> bool:
    """Whether the sources of a pair are there, with the features of this release."""
    with contextlib.suppress(OSError, ValueError, KeyError), np.load(stored_path(folder, pair)) as file:
        return file["names"].tolist() == list(FEATURES)
    return False


class _Sources(NamedTuple):
    """Sources of several pairs that can be labelled."""

    rows: np.ndarray
    features: np.ndarray
    n_ambiguous: int
    n_pairs: int


def fit_folder(folder: Path, version: str, pairs: list[TrainingPair]) -> str:
    """Fit model and card from the stored pairs; path of the model.

    Raises
    ------
    TrainingError
        A part (train, calibrate, test) has no pairs or only one kind of source.
    """
    tests = {"plain": [pair for pair in pairs if not pair.varied], "varied": _of_part(pairs, "test", varied=True)}
    trees = _fitted(folder, pairs)
    judged = [
        Judged(f"{name}, {regime}", *_judge(folder, [pair for pair in chosen if pair.regime == regime], trees))
        for name, chosen in tests.items()
        for regime in dict.fromkeys(pair.regime for pair in pairs)
    ]
    held_out = list(_held_out(folder, pairs, tests))
    model = ReliabilityModel(version, RELIABLE_FROM, trees)
    counts = {part: _read(folder, _of_part(pairs, part, varied=True)) for part in ("train", "calibrate", "test")}
    counts["plain"] = _read(folder, tests["plain"])
    text = card(
        model, {name: (one.n_pairs, one.rows, one.n_ambiguous) for name, one in counts.items()}, judged, held_out
    )
    (folder / CARD).write_text(text, encoding="utf-8")
    write_model(folder / MODEL, model)
    return str(folder / MODEL)


def _fitted(folder: Path, pairs: list[TrainingPair]) -> TreeModel:
    train, tune = (_read(folder, _of_part(pairs, part, varied=True)) for part in ("train", "calibrate"))
    trees = fit_trees(train.features, train.rows["class_index"], _FIT_SEED)
    classes = tune.rows["class_index"]
    if not ((classes > 0).any() and (classes == 0).any()):
        raise TrainingError("calibration needs pairs with real and bogus sources")
    return calibrated(trees, raw_score(tune.features, trees), classes > 0, balanced_weights(classes))


def _held_out(folder: Path, pairs: list[TrainingPair], tests: dict[str, list[TrainingPair]]) -> Iterator[Judged]:
    """Each regime judged by a model that never saw it, on seeds that it never saw either."""
    for regime in dict.fromkeys(pair.regime for pair in pairs):
        others = [pair for pair in pairs if pair.regime != regime]
        if not others:
            return
        trees = _fitted(folder, others)
        for name, chosen in tests.items():
            mine = [pair for pair in chosen if pair.regime == regime]
            yield Judged(f"{name}, {regime}", *_judge(folder, mine, trees))


def _judge(folder: Path, pairs: list[TrainingPair], trees: TreeModel) -> tuple[np.ndarray, np.ndarray]:
    sources = _read(folder, pairs)
    return sources.rows, score(sources.features, trees)


def _of_part(pairs: list[TrainingPair], part: str, *, varied: bool) -> list[TrainingPair]:
    return [pair for pair in pairs if pair.part == part and pair.varied == varied]


def _read(folder: Path, pairs: list[TrainingPair]) -> _Sources:
    if not pairs:
        raise TrainingError("no pair of some part could be searched: more seeds are needed")
    rows, features = [], []
    for pair in pairs:
        with np.load(stored_path(folder, pair)) as file:
            rows.append(file["rows"])
            features.append(file["features"])
    all_rows, all_features = np.concatenate(rows), np.concatenate(features)
    labelled = all_rows["class_index"] >= 0
    return _Sources(all_rows[labelled], all_features[labelled], int(np.count_nonzero(~labelled)), len(pairs))

"""FitReliability: from labelled sources to a model and its card."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np

from transforms.numerics.reliability import TreeModel, raw_score, score
from transforms.numerics.reliability_features import FEATURES
from transforms.numerics.reliability_fitting import TrainingError, balanced_weights, calibrated, fit_trees
from transforms.reliability_card import Judged, Part, card
from transforms.reliability_model import ReliabilityModel, write_model
from transforms.reliability_nights import TrainingExposure, without_repeated
from transforms.reliability_training import KINDS, LABELLED_DTYPE, LabelledSources, TrainingPair

MODEL, CARD = "reliability.json", "reliability.md"
RELIABLE_FROM = 0.5
_FIT_SEED = 1


class FitReliability(beam.PTransform):
    """Fit, calibrate and judge the model of all pairs and exposures of real nights, once all are stored.

    Input: names of what is stored, at least one. Output: path of the model. All is read in the order of `pairs` and
    `exposures`, so the order in which it comes does not matter. No state.
    """

    def __init__(
        self, folder: str, version: str, pairs: tuple[TrainingPair, ...], exposures: tuple[TrainingExposure, ...] = ()
    ) -> None:
        super().__init__()
        self.folder = folder
        self.version = version
        self.pairs = pairs
        self.exposures = exposures

    def expand(self, names: beam.PCollection) -> beam.PCollection:
        return (
            names
            | "GatherNames" >> beam.combiners.ToList()
            | "FitModel" >> beam.Map(_fit, self.folder, self.version, self.pairs, self.exposures).with_output_types(str)
        )


def _fit(
    names: Iterable[str],
    folder: str,
    version: str,
    pairs: tuple[TrainingPair, ...],
    exposures: tuple[TrainingExposure, ...],
) -> str:
    stored = set(names)
    for night in dict.fromkeys(one.night for one in exposures):
        wanted = [one for one in exposures if one.night == night]
        if not any(one.name in stored for one in wanted):
            raise TrainingError(f"night {night}: none of its {len(wanted)} pairs of images could be searched")
    return fit_folder(
        Path(folder),
        version,
        [pair for pair in pairs if pair.name in stored],
        [one for one in exposures if one.name in stored],
    )


def store_labelled(folder: Path, pair: TrainingPair | TrainingExposure, labelled: LabelledSources) -> str:
    """Write the sources of a pair under a temporary name and rename it; the pair's name."""
    path = stored_path(folder, pair)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    with part.open("wb") as file:
        np.savez_compressed(file, rows=labelled.rows, features=labelled.features, names=np.array(list(FEATURES)))
    os.replace(part, path)
    return pair.name


def stored_path(folder: Path, pair: TrainingPair | TrainingExposure) -> Path:
    return folder / "pairs" / f"{pair.name}.npz"


def is_stored(folder: Path, pair: TrainingPair | TrainingExposure) -> bool:
    """Whether the sources of a pair are there, with the features of this release."""
    damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
    with contextlib.suppress(*damaged), np.load(stored_path(folder, pair)) as file:
        return file["names"].tolist() == list(FEATURES) and file["rows"].dtype == LABELLED_DTYPE
    return False


class _Sources(NamedTuple):
    """Sources of several pairs that can be labelled."""

    rows: np.ndarray
    features: np.ndarray
    n_ambiguous: int
    n_pairs: int


_Stored = Mapping[str, LabelledSources]


def fit_folder(
    folder: Path, version: str, pairs: Sequence[TrainingPair], exposures: Sequence[TrainingExposure] = ()
) -> str:
    """Fit model and card from what is stored of simulated pairs and real nights; path of the model.

    Raises
    ------
    TrainingError
        A part (train, calibrate, test) has no pairs or only one kind of source.
    """
    stored = _stored(folder, pairs, exposures)
    tests = {"plain": [pair for pair in pairs if not pair.varied], "varied": _of_part(pairs, "test")}
    trees = _fitted(stored, pairs, exposures)
    judged = [
        Judged(f"{name}, {regime}", *_judge(stored, [pair for pair in chosen if pair.regime == regime], trees))
        for name, chosen in tests.items()
        for regime in dict.fromkeys(pair.regime for pair in pairs)
    ]
    held_out = list(_held_out(stored, pairs, tests))
    at_night = list(_judged_nights(stored, exposures, trees))
    before = list(_judged_nights(stored, exposures, _fitted(stored, pairs, ()))) if exposures else []
    model = ReliabilityModel(version, RELIABLE_FROM, trees)
    parts = {part: _of_part(pairs, part) for part in ("train", "calibrate", "test")} | {"plain": tests["plain"]}
    counts = [_counted(name, _read(stored, chosen)) for name, chosen in parts.items()]
    for night in dict.fromkeys(one.night for one in exposures):
        for part in ("train", "calibrate", "test"):
            chosen = [one for one in exposures if one.night == night and one.part == part]
            if chosen:
                days = ", ".join(str(day) for day in sorted({one.visit.day_obs for one in chosen}))
                counts.append(_counted(f"{night}, {part}: {days}", _read(stored, chosen)))
    text = card(model, counts, judged, held_out, at_night, before)
    (folder / CARD).write_text(text, encoding="utf-8")
    write_model(folder / MODEL, model)
    return str(folder / MODEL)


def _counted(name: str, sources: _Sources) -> Part:
    return Part(name, sources.n_pairs, sources.rows, sources.n_ambiguous)


def _fitted(stored: _Stored, pairs: Sequence[TrainingPair], exposures: Sequence[TrainingExposure]) -> TreeModel:
    train, tune = (
        _read(stored, [*_of_part(pairs, part), *(one for one in exposures if one.part == part)])
        for part in ("train", "calibrate")
    )
    trees = fit_trees(train.features, train.rows["class_index"], _FIT_SEED)
    classes = tune.rows["class_index"]
    if not ((classes > 0).any() and (classes == 0).any()):
        raise TrainingError("calibration needs pairs with real and bogus sources")
    return calibrated(trees, raw_score(tune.features, trees), classes > 0, balanced_weights(classes))


def _held_out(stored: _Stored, pairs: Sequence[TrainingPair], tests: dict[str, list[TrainingPair]]) -> Iterator[Judged]:
    """Each regime judged by a model that never saw it, on seeds that it never saw either."""
    for regime in dict.fromkeys(pair.regime for pair in pairs):
        others = [pair for pair in pairs if pair.regime != regime]
        if not others:
            return
        trees = _fitted(stored, others, ())
        for name, chosen in tests.items():
            mine = [pair for pair in chosen if pair.regime == regime]
            yield Judged(f"{name}, {regime}", *_judge(stored, mine, trees))


def _judged_nights(stored: _Stored, exposures: Sequence[TrainingExposure], trees: TreeModel) -> Iterator[Judged]:
    for night in dict.fromkeys(one.night for one in exposures):
        for kind in KINDS:
            chosen = [one for one in exposures if (one.night, one.kind, one.part) == (night, kind, "test")]
            if chosen:
                yield Judged(f"{night}, {kind}, {len(chosen)} exposures", *_judge(stored, chosen, trees))


def _judge(
    stored: _Stored, pairs: Sequence[TrainingPair | TrainingExposure], trees: TreeModel
) -> tuple[np.ndarray, np.ndarray]:
    sources = _read(stored, pairs)
    return sources.rows, score(sources.features, trees)


def _of_part(pairs: Sequence[TrainingPair], part: str) -> list[TrainingPair]:
    """The varied pairs of a part."""
    return [pair for pair in pairs if pair.part == part and pair.varied]


def _stored(folder: Path, pairs: Sequence[TrainingPair], exposures: Sequence[TrainingExposure]) -> _Stored:
    """What is stored, by name; what repeats at night is ambiguous."""
    loaded = {}
    everything: list[TrainingPair | TrainingExposure] = [*pairs, *exposures]
    for one in everything:
        with np.load(stored_path(folder, one)) as file:
            loaded[one.name] = LabelledSources(file["rows"], file["features"])
    for exposure, rows in without_repeated((one, loaded[one.name].rows) for one in exposures):
        loaded[exposure.name] = loaded[exposure.name]._replace(rows=rows)
    return loaded


def _read(stored: _Stored, pairs: Sequence[TrainingPair | TrainingExposure]) -> _Sources:
    if not pairs:
        raise TrainingError("no pair of some part could be searched: more seeds are needed")
    rows = np.concatenate([stored[pair.name].rows for pair in pairs])
    features = np.concatenate([stored[pair.name].features for pair in pairs])
    labelled = rows["class_index"] >= 0
    return _Sources(rows[labelled], features[labelled], int(np.count_nonzero(~labelled)), len(pairs))

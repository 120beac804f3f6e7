"""Reliability training: a model and its card from simulated pairs and real nights.

    CreatePairs     -> LabelPairs     -> StorePair     -> FitReliability, WriteFailures
    CreateExposures -> LabelExposures -> StoreExposure ->

A pair or exposure that is stored already is not made again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam

from schemas.elements import FailureRecord
from transforms.failures import failure_line, write_lines
from transforms.reliability_fitting import FitReliability, is_stored, store_labelled
from transforms.reliability_nights import LabelExposures, TrainingExposure, TrainingNights
from transforms.reliability_training import KINDS, LabelledSources, LabelPairs, TrainingPair

FAILURES = "failures.jsonl"
SIZE_PIX = 1024
_PARTS = ("train", "train", "train", "calibrate", "test")  # of five seeds in a row


def training_pairs(
    regimes: Sequence[str], first_seed: int, n_seeds: int, size_pix: int = SIZE_PIX
) -> list[TrainingPair]:
    """Every regime and kind of each seed; the test seeds plain too. The order is that of the seeds."""
    pairs = []
    for number in range(n_seeds):
        part = _PARTS[number % len(_PARTS)]
        for regime in regimes:
            for kind in KINDS:
                pairs.append(TrainingPair(regime, first_seed + number, kind, size_pix, varied=True, part=part))
                if part == "test":
                    pairs.append(TrainingPair(regime, first_seed + number, kind, size_pix, varied=False, part=part))
    return pairs


@dataclass(frozen=True)
class ReliabilityTraining:
    """The dataflow."""

    folder: str
    version: str
    pairs: tuple[TrainingPair, ...]
    nights: TrainingNights

    def build(self, flow: beam.Pipeline, *, spread: bool = False) -> None:
        folder = Path(self.folder)
        exposures = self.nights.exposures
        everything: list[TrainingPair | TrainingExposure] = [*self.pairs, *exposures]
        stored = {one.name for one in everything if is_stored(folder, one)}
        missing = [pair for pair in self.pairs if pair.name not in stored]
        labelled = (
            flow
            | "CreatePairs" >> beam.Create(missing, reshuffle=spread).with_output_types(TrainingPair)
            | "LabelPairs" >> LabelPairs()
        )
        at_night = (
            flow
            | "CreateExposures"
            >> beam.Create([one for one in exposures if one.name not in stored], reshuffle=spread).with_output_types(
                TrainingExposure
            )
            | "LabelExposures" >> LabelExposures()
        )
        made = labelled.good | "StorePair" >> beam.Map(_store, self.folder).with_output_types(str)
        seen = at_night.good | "StoreExposure" >> beam.Map(_store, self.folder).with_output_types(str)
        known = flow | "CreateStored" >> beam.Create(sorted(stored)).with_output_types(str)
        _ = (
            (made, seen, known)
            | "JoinPairs" >> beam.Flatten()
            | "FitReliability" >> FitReliability(self.folder, self.version, self.pairs, exposures)
        )
        problems = flow | "CreateProblems" >> beam.Create(self.nights.problems).with_output_types(FailureRecord)
        _ = (
            (labelled.failed, at_night.failed, problems)
            | "JoinFailures" >> beam.Flatten()
            | "EncodeFailures" >> beam.Map(failure_line).with_output_types(bytes)
            | "GatherFailures" >> beam.combiners.ToList()
            | "WriteFailures" >> beam.Map(_write_sorted, str(folder / FAILURES)).with_output_types(str)
        )


def _store(labelled: tuple[TrainingPair | TrainingExposure, LabelledSources], folder: str) -> str:
    return store_labelled(Path(folder), *labelled)


def _write_sorted(lines: Iterable[bytes], path: str) -> str:
    write_lines(Path(path), sorted(lines))
    return path

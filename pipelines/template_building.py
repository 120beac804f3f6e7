"""Template building: a folder of templates from the exposures of one or more nights.

    CreateExposures -> MeasureExposures -> PlanTemplates -> StackTemplates -> WriteIndex, WriteFailures

Pixels are read where they are measured, and again where they are stacked; between them travel a few numbers. The index
is written last, so a folder that has one is complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam

from schemas.elements import FailureRecord
from transforms.failures import failure_line, write_lines
from transforms.template_building import MeasureExposures, PlanTemplates, StackTemplates
from transforms.templates import ListedExposure, TemplateConfig

INDEX = "templates.jsonl"
FAILURES = "failures.jsonl"


@dataclass(frozen=True)
class TemplateBuilding:
    """The dataflow. `problems` were met before it: they are listed with those met in it."""

    exposures: Sequence[ListedExposure]
    folder: str
    config: TemplateConfig
    problems: Sequence[FailureRecord] = ()

    def build(self, flow: beam.Pipeline, *, spread: bool = False) -> None:
        listed = flow | "CreateExposures" >> beam.Create(list(self.exposures), reshuffle=spread).with_output_types(
            ListedExposure
        )
        measured = listed | "MeasureExposures" >> MeasureExposures()
        planned = measured.good | "PlanTemplates" >> PlanTemplates(self.config)
        stacked = planned.good | "StackTemplates" >> StackTemplates(self.folder)
        known = flow | "CreateProblems" >> beam.Create(list(self.problems)).with_output_types(FailureRecord)
        _ = (
            (known, measured.failed, planned.failed, stacked.failed)
            | "JoinFailures" >> beam.Flatten()
            | "EncodeFailures" >> beam.Map(failure_line).with_output_types(bytes)
            | "GatherFailures" >> beam.combiners.ToList()
            | "WriteFailures" >> beam.Map(_write_sorted, str(Path(self.folder) / FAILURES)).with_output_types(str)
        )
        _ = (
            stacked.good
            | "EncodeIndex" >> beam.Map(str.encode).with_output_types(bytes)
            | "GatherIndex" >> beam.combiners.ToList()
            | "WriteIndex" >> beam.Map(_write_sorted, str(Path(self.folder) / INDEX)).with_output_types(str)
        )


def _write_sorted(lines: Iterable[bytes], path: str) -> str:
    write_lines(Path(path), sorted(lines))
    return path

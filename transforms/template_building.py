"""MeasureExposures, PlanTemplates and StackTemplates: from exposures listed to templates written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from threadpoolctl import threadpool_limits

from schemas.elements import FailureRecord
from schemas.exposures import write_exposure
from transforms.failures import FAILED, failure_of, write_bytes
from transforms.templates import (
    BuiltTemplate,
    ListedExposure,
    MeasuredExposure,
    TemplateConfig,
    TemplatePlan,
    build_template,
    measure_exposure,
    plan_templates,
)

STAGE = "templates"
_LOST_EXPOSURE = "the exposure in its template"
_LOST_TEMPLATE = "the template"


class TemplateResult(NamedTuple):
    """`good`: what the next step takes; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class MeasureExposures(beam.PTransform):
    """Seeing and depth of each exposure.

    Input: ListedExposure. Output `good`: ((instrument, band), MeasuredExposure); `failed`: one record per exposure that
    cannot be used. No state.
    """

    def expand(self, listed: beam.PCollection) -> TemplateResult:
        outputs = listed | "MeasureExposure" >> beam.ParDo(_MeasureExposureFn()).with_output_types(
            tuple[tuple[str, str], MeasuredExposure]
        ).with_outputs(FAILED, main="good")
        return TemplateResult(outputs.good, outputs[FAILED])


class PlanTemplates(beam.PTransform):
    """Which exposures of an instrument and band go into which template.

    Input: ((instrument, band), MeasuredExposure). Output `good`: TemplatePlan; `failed`: one record per detector and
    field without a template. The order of the exposures has no effect.
    """

    def __init__(self, config: TemplateConfig) -> None:
        super().__init__()
        self.config = config

    def expand(self, measured: beam.PCollection) -> TemplateResult:
        outputs = (
            measured
            | "GatherBand" >> beam.GroupByKey()
            | "PlanBand"
            >> beam.ParDo(_PlanBandFn(self.config)).with_output_types(TemplatePlan).with_outputs(FAILED, main="good")
        )
        return TemplateResult(outputs.good, outputs[FAILED])


class StackTemplates(beam.PTransform):
    """Build and write templates.

    Input: TemplatePlan. Output `good`: the JSON line that describes the template, which `folder` then holds; `failed`:
    one record per template that cannot be built. One that is there already, of the same input, is left as it is.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def expand(self, plans: beam.PCollection) -> TemplateResult:
        outputs = (
            plans
            | "SpreadTemplates" >> beam.Reshuffle()
            | "StackTemplate"
            >> beam.ParDo(_StackTemplateFn(self.folder)).with_output_types(str).with_outputs(FAILED, main="good")
        )
        return TemplateResult(outputs.good, outputs[FAILED])


class _MeasureExposureFn(beam.DoFn):
    def setup(self) -> None:
        threadpool_limits(1)  # one BLAS thread: sums must run in the same order everywhere

    def process(self, listed: ListedExposure) -> Iterator[Any]:
        try:
            yield (listed.instrument, listed.band), measure_exposure(listed)
        except Exception as error:  # whatever one exposure's pixels do must not stop the others
            yield _failed(failure_of(error, STAGE, listed.visit, listed.detector, lost=_LOST_EXPOSURE))


class _PlanBandFn(beam.DoFn):
    def __init__(self, config: TemplateConfig) -> None:
        self.config = config

    def process(self, element: tuple[tuple[str, str], Iterable[MeasuredExposure]]) -> Iterator[Any]:
        for planned in plan_templates(element[1], self.config):
            if isinstance(planned, TemplatePlan):
                yield planned
            else:
                listed = planned[0].listed
                yield _failed(failure_of(planned[1], STAGE, listed.visit, listed.detector, lost=_LOST_TEMPLATE))


class _StackTemplateFn(beam.DoFn):
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self) -> None:
        threadpool_limits(1)

    def process(self, plan: TemplatePlan) -> Iterator[Any]:
        try:
            yield _finished(self.folder, plan) or _write(self.folder, plan, build_template(plan))
        except Exception as error:  # one template must not stop the others
            listed = plan.grid.listed
            yield _failed(failure_of(error, STAGE, listed.visit, plan.detector, lost=_LOST_TEMPLATE))


def _failed(record: FailureRecord) -> beam.pvalue.TaggedOutput:
    return beam.pvalue.TaggedOutput(FAILED, record)


def _finished(folder: Path, plan: TemplatePlan) -> str | None:
    """The line of a template that an earlier run built of the same input."""
    try:
        line = (folder / f"{plan.name}.json").read_text(encoding="utf-8").strip()
        same = json.loads(line)["input"] == plan.digest
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return line if same and (folder / f"{plan.name}.fits").is_file() else None


def _write(folder: Path, plan: TemplatePlan, built: BuiltTemplate) -> str:
    """Write image, then description: one that is there belongs to a whole image."""
    record = built.record
    cards: dict[str, object] = {
        "INSTRUME": record["instrument"].encode("ascii", "replace").decode()[:60],
        "BAND": record["band"],
        "DETECTOR": record["detector"],
        "GRIDVIS": (record["grid_visit"], "visit whose pixels these are"),
        "NEXP": (record["n_exposures"], "exposures in the stack"),
    }
    for number, used in enumerate(record["exposures"], start=1):
        cards[f"VIS{number:03d}"] = (used["visit"], f"detector {used['detector']}")
        cards[f"WGT{number:03d}"] = (used["weight"], "weight")
        cards[f"FLX{number:03d}"] = (used["flux_ratio"], "divided by")
    (folder / f"{plan.name}.json").unlink(missing_ok=True)
    write_exposure(folder / f"{plan.name}.fits", built.exposure, header=cards)
    line = json.dumps(record)
    write_bytes(folder / f"{plan.name}.json", line.encode() + b"\n")
    return line

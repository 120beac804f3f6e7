"""ReadVisits: the visits of a night, a table or an archive, visit by visit, with the watermark moving behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.transforms.core import WatermarkEstimatorProvider
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp

from schemas.elements import DetectorVisit, EarlierNights, FailureRecord, StageElement, VisitPart
from schemas.framing import pack
from schemas.manifests import Manifest, Visit, event_time_s
from transforms.failures import FAILED

STAGE = "ingestion"
# Runners truncate the watermark of a residual to whole seconds: two seconds are always past the visit.
WATERMARK_LEAD_S = 2.0


# A turn with the visits, and an empty one in which the timers of sky space fire; with the next come those of
# visit space, which sky space has set. Otherwise a visit would be closed only after the next was worked on.
_TURNS_PER_SLICE = 2


class IngestionResult(NamedTuple):
    """`good`: DetectorVisit per detector to process, and the announcement of each visit; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


@dataclass(frozen=True)
class VisitList:
    """Where visits are announced: a file, and the function that reads it."""

    path: str
    read: Callable[[Path], Manifest]


class ReadVisits(beam.PTransform):
    """Announce visits and their detectors.

    Output `good`: EarlierNights if there is a history; then for each visit a VisitPart that announces it,
    and one DetectorVisit per detector, with the visit's midpoint as event time; `failed`: what in the
    list cannot be used. Order: (midpoint, visit), whole visits at a time; after each the watermark
    moves `WATERMARK_LEAD_S` past it, so nobody waits for the next visit. Duplicates in the list are
    failures. No state.

    `spread` puts a Reshuffle behind the detectors, so that they go to all workers; the local runner,
    which then would no longer go visit by visit, does without.
    """

    def __init__(self, visits: VisitList, history: tuple[str, ...] = (), *, spread: bool = False) -> None:
        super().__init__()
        self.visits = visits
        self.history = history
        self.spread = spread

    def expand(self, begin: beam.pvalue.PBegin) -> IngestionResult:
        read = (
            begin
            | "StartNight" >> beam.Create([self.visits])
            | "EmitVisits"
            >> beam.ParDo(_EmitVisitsFn()).with_output_types(Visit | None).with_outputs(FAILED, main="visits")
        )
        elements = read.visits | "SplitDetectors" >> beam.FlatMap(_announced, self.history).with_output_types(
            StageElement
        )
        return IngestionResult(spread_out(elements) if self.spread else elements, read[FAILED])


def spread_out(elements: beam.PCollection) -> beam.PCollection:
    """The elements of a source, on all workers."""
    return elements | "SpreadDetectors" >> beam.Reshuffle().with_output_types(StageElement)


def event_timestamp(midpoint_mjd_tai: float) -> Timestamp:
    """Event time of a visit, to the millisecond: what timers and shuffles keep of it is the whole of it.

    Made of whole microseconds: Beam cuts seconds off at the microsecond below, which for one time in ten or so is the
    millisecond before.
    """
    return Timestamp(micros=round(1000.0 * event_time_s(midpoint_mjd_tai)) * 1000)


def visit_context(visit: Visit) -> dict[str, Any]:
    """What sky space and packets need to know of a visit; JSON types only."""
    return {
        "visit": visit.visit,
        "day_obs": visit.day_obs,
        "band": visit.band,
        "midpoint_mjd_tai": visit.midpoint_mjd_tai,
        "readout_end_mjd_tai": visit.readout_end_mjd_tai,
        "rotation_deg": visit.rotation_deg,
        "observation_reason": visit.observation_reason,
        "target_name": visit.target_name,
    }


def announcement_part(visit: Visit, expected: Iterable[int]) -> bytes:
    """The part that says a visit exists, and which detectors it has."""
    return pack({"kind": "visit", "context": visit_context(visit), "expected": list(expected)})


def _announced(visit: Visit | None, history: tuple[str, ...]) -> Iterator[StageElement]:
    if visit is None:
        if history:
            yield EarlierNights(history)
        return
    part = announcement_part(visit, [one.detector for one in visit.detectors])
    yield VisitPart(visit.visit, visit.midpoint_mjd_tai, part)
    for images in visit.detectors:
        yield DetectorVisit(visit, images)


def _announcements(visits: VisitList) -> _Announcements:
    """The list as it is now; parsed once, although the source asks for it at every turn."""
    return _parsed(visits, Path(visits.path).stat().st_mtime_ns)


class _Announcements(NamedTuple):
    manifest: Manifest
    slices: list[tuple[Visit, ...]]


@lru_cache(maxsize=2)
def _parsed(visits: VisitList, modified_ns: int) -> _Announcements:
    manifest = visits.read(Path(visits.path))
    return _Announcements(manifest, slices_of(manifest))


def slices_of(manifest: Manifest) -> list[tuple[Visit, ...]]:
    """Visits grouped so that the watermark after a slice lies before the next slice."""
    slices: list[list[Visit]] = []
    for visit in manifest.visits:
        if slices and visit.event_time_s - slices[-1][-1].event_time_s <= WATERMARK_LEAD_S + 1.0:
            slices[-1].append(visit)
        else:
            slices.append([visit])
    return [tuple(group) for group in slices]


class _SliceTrackerProvider(beam.RestrictionProvider):
    """Offset 0 for the manifest's problems, then `_TURNS_PER_SLICE` for each slice."""

    def initial_restriction(self, element: VisitList) -> OffsetRange:
        return OffsetRange(0, 1 + _TURNS_PER_SLICE * len(_announcements(element).slices))

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return OffsetRestrictionTracker(restriction)

    def restriction_size(self, element: VisitList, restriction: OffsetRange) -> int:
        return restriction.size()


class WatermarkBySource(WatermarkEstimatorProvider):
    """A watermark that stands where the source last set it."""

    def initial_estimator_state(self, element: Any, restriction: Any) -> None:
        return None

    def create_watermark_estimator(self, estimator_state: Any) -> ManualWatermarkEstimator:
        return ManualWatermarkEstimator(estimator_state)


class _EmitVisitsFn(beam.DoFn):
    """Emits one slice of the manifest per call and then checkpoints itself."""

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: VisitList,
        tracker: Any = beam.DoFn.RestrictionParam(_SliceTrackerProvider()),
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(WatermarkBySource()),
    ) -> Iterator[Any]:
        manifest, slices = _announcements(element)
        position = tracker.current_restriction().start
        if not tracker.try_claim(position):
            return
        if position == 0:
            first = event_timestamp(manifest.visits[0].midpoint_mjd_tai) if manifest.visits else Timestamp(0)
            for problem in manifest.problems:
                record = FailureRecord(
                    problem.visit,
                    problem.detector,
                    STAGE,
                    problem.error,
                    problem.reason,
                    problem.lost,
                )
                yield beam.pvalue.TaggedOutput(FAILED, TimestampedValue(record, first))
            yield TimestampedValue(None, first)  # the night begins: what earlier nights left comes first
            watermark.set_watermark(first)
        elif (position - 1) % _TURNS_PER_SLICE == 0:
            group = slices[(position - 1) // _TURNS_PER_SLICE]
            for visit in group:
                yield TimestampedValue(visit, event_timestamp(visit.midpoint_mjd_tai))
            watermark.set_watermark(event_timestamp(group[-1].midpoint_mjd_tai) + WATERMARK_LEAD_S)
        if position + 1 < tracker.current_restriction().stop:
            tracker.defer_remainder(Duration(0))
        else:
            tracker.try_claim(position + 1)

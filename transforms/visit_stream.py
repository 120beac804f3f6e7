"""ReadVisitStream: visits as they are announced, detector by detector, on a topic with one partition.

What is open (visits announced in part) travels in the restriction of the source, so a checkpoint holds it: as JSON,
and without the place of the log, so that a job goes on at another address and in a later release.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import apache_beam as beam
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp

from schemas.elements import DetectorVisit, EarlierNights, FailureRecord, StageElement, VisitPart
from schemas.manifests import AnnouncedDetector, LoggedMessage, parse_announcement
from transforms.failures import FAILED, decide_once, failure_part
from transforms.ingestion import (
    STAGE,
    WATERMARK_LEAD_S,
    IngestionResult,
    ReadVisits,
    VisitList,
    WatermarkBySource,
    announcement_part,
    event_timestamp,
    spread_out,
)
from transforms.metrics import ANNOUNCEMENTS_READ, SOURCE_OFFSET, VISITS_CLOSED, VISITS_OPEN, VISITS_TIMED_OUT

# Output leaves the source when a turn ends, so a turn with work is short. Checkpoints wait for the end of an idle one.
_TURN_S = 0.2
_IDLE_TURN_S = 2.0
# Flink's runner takes up what a turn left undone before it tells others how far event time has come, and then does not
# tell them at all, unless there is a pause in between. One made of another job server than ours knows whole seconds
# only (docs/decisions/0007-the-residuals-of-the-source.md), and Beam takes a little off.
_PAUSE_S = 0.2
_WHOLE_SECONDS_PAUSE_S = 2.5
_CUT_S = 0.05
# Empty turns in which the local runner fires the timers of sky space, then those of visit space that these set.
_RESTS_AT_END = 2
# Closed visits of which repeated announcements are still known.
_REMEMBERED = 20


class MessageLog(Protocol):
    """An ordered log of messages that are kept for some time. Picklable; opened at its first use in a worker."""

    def end(self) -> int:
        """The offset that the next message to be written will have; ConnectionError if nobody answers."""

    def read(self, offset: int, timeout_s: float) -> LoggedMessage | None:
        """The first message at `offset`, or the next one kept; None if none came in time."""


@dataclass(frozen=True)
class VisitStream:
    """Where visits are announced as they are taken.

    Attributes
    ----------
    log : messages of `schemas.manifests.announcements`
    closings : folder where closings by time-out are recorded, before the watermark moves; kept with the output
    timeout_s : how long a visit waits for its detectors, from its first one on
    stop_at_end : stop behind what the log holds when the flow starts, when all visits in it are closed
    """

    log: MessageLog
    closings: str
    timeout_s: float = 120.0
    stop_at_end: bool = False


class ReadVisitStream(beam.PTransform):
    """Announce visits and their detectors as the messages come.

    Output `good`: EarlierNights if there is a history; for each visit a VisitPart that announces it, and one
    DetectorVisit per message, with the visit's midpoint as event time; `failed`: messages that cannot be used, gaps
    in the log, detectors that did not come in time. Order: that of the log. The watermark moves `WATERMARK_LEAD_S`
    past a visit when all its announced detectors were read, or, by a reader that has read all there is, `timeout_s`
    after the first; the closing is then recorded first, and obeyed by whoever reads the log again. A visit
    that is open holds the watermark short of its midpoint. Duplicates within a visit are dropped. No state but the
    source's own.

    `spread` puts a Reshuffle behind the detectors, so that they go to all workers; the source pauses for a moment when
    visits were closed, as Flink's runner needs it. Without, the source goes visit by visit, each as a whole, and after
    it makes an empty turn in which timers fire, as the local runner needs it.
    """

    def __init__(self, visits: VisitStream, history: tuple[str, ...] = (), *, spread: bool = False) -> None:
        super().__init__()
        self.visits = visits
        self.history = history
        self.spread = spread

    def expand(self, begin: beam.pvalue.PBegin) -> IngestionResult:
        read = (
            begin
            | "StartStream" >> beam.Impulse()
            | "ReadAnnouncements"
            >> beam.ParDo(_ReadAnnouncementsFn(self.visits, self.history, rests=not self.spread))
            .with_output_types(StageElement)
            .with_outputs(FAILED, main="elements")
        )
        return IngestionResult(spread_out(read.elements) if self.spread else read.elements, read[FAILED])


def read_visits(visits: VisitList | VisitStream, history: tuple[str, ...], *, spread: bool) -> beam.PTransform:
    """The source of visits: of a list, or as they are announced."""
    if isinstance(visits, VisitStream):
        return ReadVisitStream(visits, history, spread=spread)
    return ReadVisits(visits, history, spread=spread)


@dataclass(frozen=True)
class _OpenVisit:
    """What is known of an announced visit; detectors as bits of integers.

    `facts`: digest of what its messages must agree in; `awaited`: those that close it.
    """

    visit: int
    exposure: tuple[int, int]
    midpoint_mjd_tai: float
    facts: str
    expected: int
    awaited: int
    seen: int
    opened_at: float

    @property
    def event_time(self) -> Timestamp:
        return event_timestamp(self.midpoint_mjd_tai)

    @property
    def is_complete(self) -> bool:
        return self.awaited & ~self.seen == 0


@dataclass(frozen=True)
class StreamPosition:
    """How far the log was read, and what is open there: the source's restriction.

    It lies in savepoints under its names (`position_bytes`): a field that is added needs a default.

    Attributes
    ----------
    offset : of the next message
    end : where to stop once everything is closed, or None
    open, closed : visits in order of their first message; of closed ones the latest
    begun : whether the first visit was met
    rests : how many turns are to be empty
    finished : whether there is nothing left to do
    """

    offset: int = 0
    end: int | None = None
    open: tuple[_OpenVisit, ...] = ()
    closed: tuple[_OpenVisit, ...] = ()
    begun: bool = False
    rests: int = 0
    finished: bool = False


def position_bytes(position: StreamPosition) -> bytes:
    """A position as JSON."""
    return json.dumps(asdict(position)).encode()


def read_position(encoded: bytes) -> StreamPosition:
    """The position that `position_bytes` made, of this release or another: what this one does not know is left out."""
    told = json.loads(encoded)
    for name in ("open", "closed"):
        told[name] = tuple(_known(_OpenVisit, {**one, "exposure": tuple(one["exposure"])}) for one in told[name])
    return _known(StreamPosition, told)


def _known(kind: Any, told: dict[str, Any]) -> Any:
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in told.items() if name in names})


class _PositionCoder(beam.coders.Coder):
    """Coder of positions."""

    def encode(self, position: StreamPosition) -> bytes:
        return position_bytes(position)

    def decode(self, encoded: bytes) -> StreamPosition:
        return read_position(encoded)

    def is_deterministic(self) -> bool:
        return True


class _PositionTracker(RestrictionTracker):
    """Claims positions; what is left behind the last claimed one is the residual."""

    def __init__(self, position: StreamPosition) -> None:
        self._position = position

    def current_restriction(self) -> StreamPosition:
        return self._position

    def current_progress(self) -> RestrictionProgress:
        return RestrictionProgress(completed=0, remaining=1)

    def try_claim(self, position: StreamPosition) -> bool:
        if self._position.finished:
            return False
        self._position = position
        return True

    def try_split(self, fraction_of_remainder: float) -> tuple[StreamPosition, StreamPosition] | None:
        if fraction_of_remainder != 0 or self._position.finished:
            return None
        rest, self._position = self._position, replace(self._position, finished=True)
        return self._position, rest

    def check_done(self) -> bool:
        if not self._position.finished:
            raise ValueError(f"messages from offset {self._position.offset} on were not read")
        return True

    def is_bounded(self) -> bool:
        return self._position.end is not None


class _PositionProvider(beam.RestrictionProvider):
    def initial_restriction(self, element: bytes) -> StreamPosition:
        return StreamPosition()

    def create_tracker(self, restriction: StreamPosition) -> _PositionTracker:
        return _PositionTracker(restriction)

    def restriction_coder(self) -> _PositionCoder:
        return _PositionCoder()

    def restriction_size(self, element: bytes, restriction: StreamPosition) -> int:
        return 1


class _ReadAnnouncementsFn(beam.DoFn):
    """Reads for one turn per call and then checkpoints itself.

    Its element, which Flink's state repeats as a key in many places, is empty.
    """

    def __init__(self, visits: VisitStream, history: tuple[str, ...], *, rests: bool) -> None:
        self.visits = visits
        self.history = history
        self.rests = rests
        self.starts = True
        self.pause_s = _PAUSE_S
        self.rests_until = 0.0

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: bytes,
        tracker: Any = beam.DoFn.RestrictionParam(_PositionProvider()),
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(WatermarkBySource()),
    ) -> Iterator[Any]:
        position = tracker.current_restriction()
        if self.visits.stop_at_end and position.end is None:
            position = replace(position, end=self.visits.log.end())
        if not tracker.try_claim(position):
            return
        pause_s = 0.0
        if position.rests:
            position = replace(position, rests=position.rests - 1)
        elif self.starts and not self.rests and position.begun:
            # Those behind, who may have been started again as well, are told the time before anything else.
            pause_s = self.pause_s
        elif time.monotonic() < self.rests_until - _CUT_S and self.pause_s < _WHOLE_SECONDS_PAUSE_S:
            pause_s = self.pause_s = _WHOLE_SECONDS_PAUSE_S
        else:
            turn = _Turn(self.visits, self.history, position, whole_visits=self.rests)
            yield from turn.outputs()
            position = turn.position
            passed = _passed(position)
            if passed is not None and (watermark.current_watermark() is None or passed > watermark.current_watermark()):
                watermark.set_watermark(passed)
            if self.rests and (turn.has_closed or _is_at_end(position)):
                position = replace(position, rests=_RESTS_AT_END if _is_at_end(position) else 1)
            elif not self.rests:
                # A worker that stood still misses the telling: so there is another pause behind each idle turn.
                pause_s = 0.0 if turn.has_read and not turn.has_closed else self.pause_s
        SOURCE_OFFSET.set(position.offset)
        VISITS_OPEN.set(len(position.open))
        self.starts = False
        at_end = _is_at_end(position) and not position.rests
        tracker.try_claim(replace(position, finished=at_end))
        if not at_end:
            self.rests_until = time.monotonic() + pause_s
            tracker.defer_remainder(Duration(pause_s))


def _is_at_end(position: StreamPosition) -> bool:
    """Whether everything was read that was to be read, and everything is closed."""
    return position.end is not None and position.offset >= position.end and not position.open


def _passed(position: StreamPosition) -> Timestamp | None:
    """How far event time has come: short of the earliest open visit, else past the latest closed one."""
    if position.open:
        return min(one.event_time for one in position.open) - Duration(micros=1000)
    if position.closed:
        return max(one.event_time for one in position.closed) + WATERMARK_LEAD_S
    return None


class _Turn:
    """One turn of reading: what it puts out, and the position it comes to."""

    def __init__(
        self, stream: VisitStream, history: tuple[str, ...], position: StreamPosition, *, whole_visits: bool = False
    ) -> None:
        self.stream = stream
        self.history = history
        self.position = position
        self.whole_visits = whole_visits
        self.has_closed = False
        self.has_read = False
        self._is_over = False
        self._has_more = False

    def outputs(self) -> Iterator[Any]:
        """Read until `_TURN_S` after the first message, or nothing came for `_IDLE_TURN_S`.

        When visits were closed, not longer than messages wait: in a backlog all are told in one pause. A closing by
        time-out ends the turn, so that detectors that come after it find event time beyond their visit, each time it is
        read. With `whole_visits` any closing does, and nothing else while a visit is open: the local runner fires
        timers between turns.
        """
        ends = time.monotonic() + _IDLE_TURN_S
        while not self._is_over:
            left = ends - time.monotonic()
            if left <= 0 and not (self.whole_visits and self.position.open):
                return
            if _is_at_end(self.position):
                return
            patience_s = 0.0 if self.has_closed else self._patience_s(max(left, _TURN_S))
            message = self.stream.log.read(self.position.offset, patience_s)
            self._has_more = message is not None
            if message is not None:
                if not self.has_read:
                    self.has_read, ends = True, time.monotonic() + _TURN_S
                yield from self._take(message)
            yield from self._close()
            if self.has_closed and not self._has_more:
                return

    def _patience_s(self, left_s: float) -> float:
        """How long to wait for a message: not beyond the time of an open visit."""
        due = min((one.opened_at for one in self.position.open), default=None)
        if due is None:
            return left_s
        return min(left_s, max(due + self.stream.timeout_s - time.time(), 0.0) + 0.05)

    def _take(self, message: LoggedMessage) -> Iterator[Any]:
        position, offset = self.position, message.offset
        if offset > position.offset:
            reason = f"messages {position.offset} to {offset - 1} are no longer kept"
            yield self._untied("MessagesLost", reason, "the detectors they announced")
        if offset < position.offset:
            reason = f"the log ended before message {position.offset} and goes on at {offset}: it was made anew"
            yield self._untied("MessagesLost", reason, "what was announced in between")
        self.position = replace(position, offset=offset + 1)
        ANNOUNCEMENTS_READ.inc()
        try:
            announced = parse_announcement(message.content)
        except ValueError as error:
            yield self._untied("InvalidAnnouncement", f"message {offset}: {error}", "the detector announced there")
            return
        # Nobody reads what is yet to be written: then the clock of who wrote it is ahead.
        announced_at = None if message.written_at is None else min(message.written_at, time.time())
        yield from self._announce(announced, offset, announced_at)

    def _announce(self, announced: AnnouncedDetector, offset: int, announced_at: float | None) -> Iterator[Any]:
        visit, bit = announced.visit, 1 << announced.images.detector
        at = event_timestamp(visit.midpoint_mjd_tai)
        known = (*self.position.closed, *self.position.open)
        one = next((other for other in known if other.visit == visit.visit), None)
        if one is None:
            clash = next((other for other in known if other.exposure == (visit.day_obs, visit.seq_num)), None)
            if clash is not None:
                reason = f"message {offset}: day_obs {visit.day_obs} seq_num {visit.seq_num} is visit {clash.visit}"
                yield from self._refused(announced, "DuplicateExposure", reason)
                return
            one = self._opened(announced)
            self.position = replace(self.position, open=(*self.position.open, one))
            if not self.position.begun:
                self.position = replace(self.position, begun=True)
                if self.history:
                    yield TimestampedValue(EarlierNights(self.history), at)
            part = announcement_part(visit, announced.expected)
            yield TimestampedValue(VisitPart(visit.visit, visit.midpoint_mjd_tai, part), at)
        elif one.facts != announced.facts:
            reason = f"message {offset}: visit {visit.visit} was announced before with different content"
            yield from self._refused(announced, "InvalidAnnouncement", reason)
            return
        if not one.seen & bit:
            self._update(replace(one, seen=one.seen | bit))
            yield TimestampedValue(DetectorVisit(visit, announced.images, announced_at), at)

    def _untied(self, error: str, reason: str, lost: str) -> Any:
        """A failure of no visit, at a time that the watermark has not passed."""
        record = FailureRecord(None, None, STAGE, error, reason, lost)
        return beam.pvalue.TaggedOutput(FAILED, TimestampedValue(record, _passed(self.position) or Timestamp(0)))

    def _refused(self, announced: AnnouncedDetector, error: str, reason: str) -> Iterator[Any]:
        visit, detector = announced.visit, announced.images.detector
        lost = "the detector announced there"
        yield from _told(visit.visit, visit.midpoint_mjd_tai, detector, error, reason, lost)

    def _opened(self, announced: AnnouncedDetector) -> _OpenVisit:
        visit, expected = announced.visit, _bits(announced.expected)
        closing = _read_closing(Path(self.stream.closings), visit.visit)
        return _OpenVisit(
            visit=visit.visit,
            exposure=(visit.day_obs, visit.seq_num),
            midpoint_mjd_tai=visit.midpoint_mjd_tai,
            facts=announced.facts,
            expected=expected,
            awaited=expected if closing is None else closing,
            seen=0,
            opened_at=time.time(),
        )

    def _update(self, one: _OpenVisit) -> None:
        def updated(visits: tuple[_OpenVisit, ...]) -> tuple[_OpenVisit, ...]:
            return tuple(one if other.visit == one.visit else other for other in visits)

        self.position = replace(self.position, open=updated(self.position.open), closed=updated(self.position.closed))

    def _close(self) -> Iterator[Any]:
        """Close the visits that are complete, or whose time is out."""
        for one in self.position.open:
            closing = one
            if not one.is_complete and self._time_is_out(one):
                awaited = _write_closing(Path(self.stream.closings), one.visit, one.seen)
                closing = replace(one, awaited=awaited)
            if not closing.is_complete:
                self._update(closing)
                continue
            yield from self._missing(closing)
            still_open = tuple(other for other in self.position.open if other.visit != one.visit)
            closed = (*self.position.closed, closing)[-_REMEMBERED:]
            self.position = replace(self.position, open=still_open, closed=closed)
            self.has_closed = True
            timed_out = closing.expected & ~closing.seen != 0
            self._is_over |= self.whole_visits or timed_out
            VISITS_CLOSED.inc()
            VISITS_TIMED_OUT.inc(int(timed_out))

    def _time_is_out(self, one: _OpenVisit) -> bool:
        """Whether a visit waited long enough, and nothing that could be of it waits in the log."""
        if self._has_more or time.time() < one.opened_at + self.stream.timeout_s:
            return False
        try:
            return self.position.offset >= self.stream.log.end()
        except ConnectionError:
            return False

    def _missing(self, one: _OpenVisit) -> Iterator[Any]:
        for detector in _detectors(one.expected & ~one.seen):
            reason = f"not announced within {self.stream.timeout_s:g} s after the first detector of the visit"
            lost = "its alerts, unless it comes later"
            yield from _told(one.visit, one.midpoint_mjd_tai, detector, "DetectorMissing", reason, lost)


def _told(visit: int, midpoint_mjd_tai: float, detector: int, error: str, reason: str, lost: str) -> Iterator[Any]:
    """A failure of a visit: to the failure records, and to the visit."""
    record = FailureRecord(visit, detector, STAGE, error, reason, lost)
    at = event_timestamp(midpoint_mjd_tai)
    yield beam.pvalue.TaggedOutput(FAILED, TimestampedValue(record, at))
    yield TimestampedValue(VisitPart(visit, midpoint_mjd_tai, failure_part(record)), at)


def _read_closing(folder: Path, visit: int) -> int | None:
    """The detectors with which a visit was closed before its time, as bits; None if it was not."""
    try:
        return _bits(tuple(json.loads((folder / f"{visit}.json").read_text())["detectors"]))
    except FileNotFoundError:
        return None


def _write_closing(folder: Path, visit: int, seen: int) -> int:
    """Record that a visit is closed with the detectors seen, durably; what stands there, if it was before."""
    closing = json.dumps({"visit": visit, "detectors": _detectors(seen)})
    standing = decide_once(folder / f"{visit}.json", closing.encode())
    return _bits(tuple(json.loads(standing)["detectors"]))


def _bits(detectors: tuple[int, ...]) -> int:
    return sum(1 << detector for detector in detectors)


def _detectors(bits: int) -> list[int]:
    return [detector for detector in range(bits.bit_length()) if bits >> detector & 1]

"""ReadVisitStream on logs held in memory: what it puts out, when the watermark moves, what a restart does."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.pvalue import TaggedOutput
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.timestamp import Duration, Timestamp

from schemas.elements import DetectorVisit, EarlierNights, FailureRecord
from schemas.framing import unpack
from schemas.manifests import DetectorImages, LoggedMessage, Visit, announcements, parse_announcement
from transforms import visit_stream
from transforms.ingestion import event_timestamp
from transforms.visit_stream import (
    ReadVisitStream,
    StreamPosition,
    VisitStream,
    _is_at_end,
    _passed,
    _PositionTracker,
    _ReadAnnouncementsFn,
    _Turn,
    position_bytes,
    read_position,
)

START_MJD = 61367.0
CADENCE_D = 37.0 / 86_400.0


@dataclass(frozen=True)
class _ListLog:
    """A log of messages, of which the first `dropped` are gone."""

    messages: tuple[bytes, ...]
    dropped: int = 0

    def end(self) -> int:
        return len(self.messages)

    def read(self, offset: int, timeout_s: float) -> LoggedMessage | None:
        offset = max(offset, self.dropped)
        if offset < len(self.messages):
            return LoggedMessage(offset, self.messages[offset], 1000.0 + offset)
        time.sleep(timeout_s)
        return None


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit_stream, "_IDLE_TURN_S", 1.5)


def _visit(number: int, n_detectors: int = 3) -> Visit:
    midpoint = START_MJD + number * CADENCE_D
    return Visit(
        visit=2026112200000 + number,
        day_obs=20261122,
        seq_num=number,
        instrument="SimCam",
        band="r",
        midpoint_mjd_tai=midpoint,
        exposure_time_s=30.0,
        readout_end_mjd_tai=midpoint + 2e-4,
        boresight_ra_deg=150.0,
        boresight_dec_deg=2.0,
        rotation_deg=0.0,
        observation_reason="science",
        target_name=None,
        detectors=tuple(DetectorImages(k, f"/night/science/{number}_{k}.fits", None) for k in range(n_detectors)),
    )


def _read(
    stream: VisitStream, position: StreamPosition, *, turns: int = 100
) -> tuple[list[Any], list[FailureRecord], StreamPosition]:
    """What some turns put out, as (visit, detector) or the kind of a part, and where they came to."""
    seen: list[Any] = []
    failures: list[FailureRecord] = []
    for _ in range(turns):
        if _is_at_end(position):
            break
        turn = _Turn(stream, (), position)
        for output in turn.outputs():
            if isinstance(output, TaggedOutput):
                failures.append(output.value.value)
            elif isinstance(output.value, DetectorVisit):
                seen.append((output.value.visit.seq_num, output.value.detector))
            else:
                seen.append(unpack(output.value.part)[0]["kind"])
        position = turn.position
    return seen, failures, position


def _messages(*visits: Visit) -> tuple[bytes, ...]:
    return tuple(message for visit in visits for message in announcements(visit))


def test_an_announcement_says_all_of_its_detector_and_visit() -> None:
    visit = _visit(1)
    told = [parse_announcement(message) for message in announcements(visit)]
    assert [one.images for one in told] == list(visit.detectors)
    assert [one.visit for one in told] == [replace(visit, detectors=(images,)) for images in visit.detectors]
    assert {one.expected for one in told} == {(0, 1, 2)}
    assert len({one.facts for one in told}) == 1
    assert parse_announcement(announcements(replace(visit, band="g"))[0]).facts != told[0].facts


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"detector": None}, "detector must be an integer"),
        ({"science": "science/1.fits"}, "science must be an absolute path"),
        ({"expected_detectors": "0"}, "expected_detectors must be a list"),
        ({"expected_detectors": [1, 2]}, "detector 0 is none of expected_detectors"),
        ({"expected_detectors": [0, 1.5]}, "expected_detectors must be an integer"),
        ({"midpoint_mjd_tai": "now"}, "midpoint_mjd_tai must be a finite number"),
        ({"visit": 0}, "visit must be an integer"),
    ],
)
def test_an_announcement_that_lacks_something_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    record = {**json.loads(announcements(_visit(1))[0]), **change}
    with pytest.raises(ValueError, match=reason):
        parse_announcement(json.dumps(record).encode())


@pytest.mark.parametrize("message", [b"", b"\xff\xfe", b"[]", b"3", b"{", b"[" * 100_000])
def test_what_is_no_announcement_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match=r"not JSON|expected an object"):
        parse_announcement(message)


def test_detectors_carry_the_time_of_their_announcement(tmp_path: Path) -> None:
    turn = _Turn(VisitStream(_ListLog(_messages(_visit(1))), str(tmp_path)), (), StreamPosition(0, None))
    detectors = [one.value for one in turn.outputs() if isinstance(one.value, DetectorVisit)]
    assert [one.announced_at for one in detectors] == [1000.0, 1001.0, 1002.0]


@pytest.mark.parametrize("written_at", [None, 1e11])
def test_no_detector_was_announced_later_than_it_was_read(tmp_path: Path, written_at: float | None) -> None:
    """Where the producer told no time, none is made up."""

    class _OtherClock(_ListLog):
        def read(self, offset: int, timeout_s: float) -> LoggedMessage | None:
            message = super().read(offset, timeout_s)
            return None if message is None else message._replace(written_at=written_at)

    log = _OtherClock(_messages(_visit(1, n_detectors=1)))
    began = time.time()
    turn = _Turn(VisitStream(log, str(tmp_path)), (), StreamPosition(0, None))
    (one,) = (one.value for one in turn.outputs() if isinstance(one.value, DetectorVisit))
    if written_at is None:
        assert one.announced_at is None
    else:
        assert one.announced_at is not None and began <= one.announced_at <= time.time()


def test_the_watermark_waits_for_open_visits_and_passes_closed_ones(tmp_path: Path) -> None:
    first, second = _visit(1), _visit(2)
    begun = _messages(first)[:2] + _messages(second)
    seen, failures, position = _read(VisitStream(_ListLog(begun), str(tmp_path)), StreamPosition(0, None), turns=1)
    # The second visit is complete, the first is not: nothing more waits, and the watermark stays at the first.
    assert seen == ["visit", (1, 0), (1, 1), "visit", (2, 0), (2, 1), (2, 2)]
    assert _passed(position) == event_timestamp(first.midpoint_mjd_tai) - 0.001
    stream = VisitStream(_ListLog(begun + _messages(first)[2:]), str(tmp_path))
    seen, _, position = _read(stream, position, turns=1)
    assert seen == [(1, 2)]
    assert _passed(position) == event_timestamp(second.midpoint_mjd_tai) + 2.0
    assert failures == []


def test_a_backlog_of_complete_visits_is_read_in_one_turn(tmp_path: Path) -> None:
    stream = VisitStream(_ListLog(_messages(*map(_visit, range(1, 21)))), str(tmp_path))
    seen, _, position = _read(stream, StreamPosition(0, None), turns=1)
    assert len([one for one in seen if one != "visit"]) == 60
    assert (len(position.closed), position.open) == (20, ())


def test_a_visit_whose_time_is_out_is_closed_with_what_came(tmp_path: Path) -> None:
    visit = _visit(1)
    stream = VisitStream(_ListLog(_messages(visit)[:2]), str(tmp_path / "closings"), timeout_s=0.2)
    seen, failures, position = _read(stream, StreamPosition(0, 2))
    assert seen == ["visit", (1, 0), (1, 1), "failure"]
    assert [(one.visit, one.detector, one.error) for one in failures] == [(visit.visit, 2, "DetectorMissing")]
    assert position.open == ()
    assert json.loads((tmp_path / "closings" / f"{visit.visit}.json").read_text()) == {
        "visit": visit.visit,
        "detectors": [0, 1],
    }
    assert [path.name for path in (tmp_path / "closings").iterdir()] == [f"{visit.visit}.json"]


def test_whoever_reads_again_obeys_a_closing(tmp_path: Path) -> None:
    first, second = _visit(1), _visit(2)
    early = _messages(first)[:2]
    _read(VisitStream(_ListLog(early), str(tmp_path), timeout_s=0.2), StreamPosition(0, 2))
    # The last detector has come since. Reading it all from the start, the visit is closed without it all the same.
    log = _ListLog(early + _messages(first)[2:] + _messages(second))
    stream = VisitStream(log, str(tmp_path))
    seen, failures, position = _read(stream, StreamPosition(0, None), turns=1)
    assert seen == ["visit", (1, 0), (1, 1), "failure"]
    assert _passed(position) == event_timestamp(first.midpoint_mjd_tai) + 2.0
    assert [one.detector for one in failures] == [2]
    seen, _, _ = _read(stream, replace(position, end=6))
    assert seen == [(1, 2), "visit", (2, 0), (2, 1), (2, 2)]


def test_a_closing_that_another_wrote_first_stands(tmp_path: Path) -> None:
    visit = _visit(1)
    stream = VisitStream(_ListLog(_messages(visit)[:2]), str(tmp_path), timeout_s=1.0)
    _, _, position = _read(stream, StreamPosition(0, None), turns=1)
    (tmp_path / f"{visit.visit}.json").write_text(json.dumps({"visit": visit.visit, "detectors": [0]}))
    _, failures, position = _read(stream, position, turns=1)
    assert position.open == ()
    assert [one.detector for one in failures] == [2]
    assert json.loads((tmp_path / f"{visit.visit}.json").read_text())["detectors"] == [0]


def test_while_there_is_more_to_read_no_visit_runs_out_of_time(tmp_path: Path) -> None:
    """After an outage the rest of a visit lies in the log, however long ago the visit was opened."""
    visit = _visit(1)
    stream = VisitStream(_ListLog(_messages(visit)), str(tmp_path), timeout_s=5.0)
    _, _, position = _read(VisitStream(_ListLog(_messages(visit)[:1]), str(tmp_path)), StreamPosition(0, None), turns=1)
    old = replace(position, open=tuple(replace(one, opened_at=time.time() - 3600.0) for one in position.open), end=3)
    seen, failures, _ = _read(stream, old)
    assert (seen, failures) == ([(1, 1), (1, 2)], [])
    assert list(tmp_path.iterdir()) == []


def test_a_visit_whose_time_is_out_does_not_slow_the_reading_of_a_backlog(tmp_path: Path) -> None:
    class _Counting(_ListLog):
        def end(self) -> int:
            asked.append(1)
            return super().end()

    asked: list[int] = []
    first, *others = map(_visit, range(1, 21))
    log = _Counting(_messages(first)[:2] + _messages(*others))
    seen, failures, position = _read(VisitStream(log, str(tmp_path), timeout_s=1e-9), StreamPosition(0, None), turns=1)
    assert len([one for one in seen if isinstance(one, tuple)]) == 2 + 57
    assert (len(asked), position.open) == (1, ())
    assert [(one.visit, one.detector) for one in failures] == [(first.visit, 2)]


def test_a_turn_of_whole_visits_waits_for_the_rest_of_an_open_one(tmp_path: Path) -> None:
    class _Slow(_ListLog):
        """The last message comes a second after the others were read."""

        def read(self, offset: int, timeout_s: float) -> LoggedMessage | None:
            if offset == 2 and time.monotonic() < comes_at:
                time.sleep(timeout_s)
                return None
            return super().read(offset, timeout_s)

    stream = VisitStream(_Slow(_messages(_visit(1))), str(tmp_path))
    comes_at = time.monotonic() + 1.0
    in_parts = _Turn(stream, (), StreamPosition(0, None))
    assert len(list(in_parts.outputs())) == 3  # the visit and two detectors
    assert not in_parts.has_closed
    comes_at = time.monotonic() + 1.0
    whole = _Turn(stream, (), StreamPosition(0, None), whole_visits=True)
    assert len(list(whole.outputs())) == 4
    assert whole.has_closed


def test_while_nobody_answers_no_visit_runs_out_of_time(tmp_path: Path) -> None:
    class _Away(_ListLog):
        def end(self) -> int:
            raise ConnectionError("nobody there")

    visit = _visit(1)
    stream = VisitStream(_Away(_messages(visit)[:1]), str(tmp_path), timeout_s=0.1)
    _, failures, position = _read(stream, StreamPosition(0, None), turns=2)
    assert [one.visit for one in position.open] == [visit.visit]
    assert failures == list(tmp_path.iterdir()) == []


def test_repeats_are_dropped_and_contradictions_refused(tmp_path: Path) -> None:
    visit = _visit(1)
    one, two, three = _messages(visit)
    other_band = announcements(replace(visit, band="g"))[1]
    same_exposure = announcements(replace(visit, visit=visit.visit + 5))[0]
    log = _ListLog((one, one, other_band, same_exposure, b"{}", two, three, two))
    seen, failures, _ = _read(VisitStream(log, str(tmp_path)), StreamPosition(0, 8))
    assert [item for item in seen if isinstance(item, tuple)] == [(1, 0), (1, 1), (1, 2)]
    assert [(failure.error, failure.reason.split(":")[0]) for failure in failures] == [
        ("InvalidAnnouncement", "message 2"),
        ("DuplicateExposure", "message 3"),
        ("InvalidAnnouncement", "message 4"),
    ]
    assert [failure.visit for failure in failures] == [visit.visit, visit.visit + 5, None]


def test_messages_that_are_gone_are_told(tmp_path: Path) -> None:
    stream = VisitStream(_ListLog(_messages(_visit(1), _visit(2)), dropped=3), str(tmp_path))
    seen, (failure,), _ = _read(stream, StreamPosition(0, 6))
    assert seen == ["visit", (2, 0), (2, 1), (2, 2)]
    assert (failure.error, failure.reason) == ("MessagesLost", "messages 0 to 2 are no longer kept")


def test_a_log_made_anew_is_read_from_its_start(tmp_path: Path) -> None:
    class _NewLog(_ListLog):
        def read(self, offset: int, timeout_s: float) -> LoggedMessage | None:
            return super().read(0 if offset == 7 else offset, timeout_s)

    stream = VisitStream(_NewLog(_messages(_visit(3))), str(tmp_path))
    seen, (failure,), _ = _read(stream, StreamPosition(7, None), turns=1)
    assert seen == ["visit", (3, 0), (3, 1), (3, 2)]
    assert failure.reason.startswith("the log ended before message 7 and goes on at 0")


def test_a_checkpoint_leaves_what_was_not_claimed() -> None:
    tracker = _PositionTracker(StreamPosition(0, None))
    assert tracker.try_claim(StreamPosition(5, None))
    assert tracker.try_split(0.5) is None
    with pytest.raises(ValueError, match="from offset 5 on"):
        tracker.check_done()
    done, rest = tracker.try_split(0) or (None, None)
    assert done is not None and done.finished
    assert rest == StreamPosition(5, None)
    assert tracker.check_done()
    assert not tracker.try_claim(StreamPosition(6, None))


@pytest.mark.parametrize("spread", [False, True])
def test_the_flow_ends_behind_what_the_log_held(spread: bool, tmp_path: Path) -> None:
    log = _ListLog((*_messages(_visit(1)), b"broken", *_messages(_visit(2))[:2]))
    stream = VisitStream(log, str(tmp_path / "closings"), timeout_s=0.3, stop_at_end=True)

    def named(element: Any) -> Any:
        if isinstance(element, DetectorVisit):
            return element.visit.seq_num, element.detector
        return "history" if isinstance(element, EarlierNights) else unpack(element.part)[0]["kind"]

    with beam.Pipeline(runner=FnApiRunner()) as flow:
        read = flow | ReadVisitStream(stream, ("/before",), spread=spread)
        named_elements = read.good | beam.Map(named).with_output_types(Any)
        expected = ["history", "visit", (1, 0), (1, 1), (1, 2), "visit", (2, 0), (2, 1), "failure"]
        assert_that(named_elements, equal_to(expected, equals_fn=lambda a, b: a == b), label="Good")
        errors = read.failed | beam.Map(lambda record: record.error).with_output_types(str)
        assert_that(errors, equal_to(["InvalidAnnouncement", "DetectorMissing"]), label="Failed")


class _Tracker(_PositionTracker):
    """Notes for how long the source lets the rest wait."""

    pause_s = 0.0

    def defer_remainder(self, pause: Duration) -> None:
        self.pause_s = pause.micros / 1e6


class _Watermark:
    def current_watermark(self) -> Timestamp | None:
        return None

    def set_watermark(self, timestamp: Timestamp) -> None: ...


def _taken_up(source: _ReadAnnouncementsFn, position: StreamPosition) -> tuple[StreamPosition, int, float]:
    """One call of the source: where it came to, how much it put out, how long it wants to rest."""
    tracker = _Tracker(position)
    outputs = list(source.process(b"", tracker, _Watermark()))
    return tracker.current_restriction(), len(outputs), tracker.pause_s


def test_a_source_whose_pause_is_cut_to_whole_seconds_makes_longer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that event time gets through on a job server of another make, which takes 0.2 s for none and 2.5 s for 2."""
    now_s = 100.0
    clock = SimpleNamespace(time=time.time, monotonic=lambda: now_s)
    monkeypatch.setattr(visit_stream, "time", clock)

    class _Log(_ListLog):
        def read(self, offset: int, timeout_s: float) -> LoggedMessage | None:
            nonlocal now_s
            now_s += 0.0 if offset < len(self.messages) else timeout_s
            return super().read(offset, 0.0)

    first, second = _messages(_visit(1, n_detectors=1), _visit(2, n_detectors=1))
    source = _ReadAnnouncementsFn(VisitStream(_Log((first,)), str(tmp_path)), (), rests=False)
    position, n_outputs, pause_s = _taken_up(source, StreamPosition())
    assert (position.offset, n_outputs > 0, pause_s) == (1, True, visit_stream._PAUSE_S)
    now_s += pause_s
    position, _, pause_s = _taken_up(source, position)
    assert pause_s == visit_stream._PAUSE_S  # it was kept
    source.visits = replace(source.visits, log=_Log((first, second)))
    position, n_outputs, pause_s = _taken_up(source, position)  # at once
    assert (position.offset, n_outputs, pause_s) == (1, 0, visit_stream._WHOLE_SECONDS_PAUSE_S)
    now_s += 2.0
    position, n_outputs, pause_s = _taken_up(source, position)
    assert (position.offset, n_outputs > 0, pause_s) == (2, True, visit_stream._WHOLE_SECONDS_PAUSE_S)


def test_a_source_that_is_started_again_tells_event_time_before_it_reads(tmp_path: Path) -> None:
    log = _ListLog(_messages(_visit(1), _visit(2)))
    _, _, position = _read(VisitStream(log, str(tmp_path)), StreamPosition(0, None), turns=1)
    source = _ReadAnnouncementsFn(VisitStream(_ListLog((*log.messages, b"more")), str(tmp_path)), (), rests=False)
    again, n_outputs, pause_s = _taken_up(source, position)
    assert (again.offset, n_outputs, pause_s) == (6, 0, visit_stream._PAUSE_S)


def test_position_comes_back_from_its_bytes(tmp_path: Path) -> None:
    log = _ListLog(_messages(_visit(1), _visit(2))[:4])
    _, _, position = _read(VisitStream(log, str(tmp_path)), StreamPosition(0, None), turns=1)
    assert position.open and position.closed
    assert read_position(position_bytes(position)) == position


def test_position_of_another_release_is_read() -> None:
    """As release 0.1 writes it, less a field with a default, and with fields that were added since."""
    visit = {
        "visit": 2026112200001,
        "exposure": [20261122, 1],
        "midpoint_mjd_tai": 61367.0,
        "facts": "10548c16447fac37",
        "expected": 2**200 + 7,
        "awaited": 7,
        "seen": 3,
        "opened_at": 1.7e9,
        "airmass": 1.2,
    }
    told = {"offset": 5, "end": None, "open": [visit], "closed": [], "begun": True, "rests": 0, "paused": 1}
    position = read_position(json.dumps(told).encode())
    assert (position.offset, position.end, position.begun, position.finished) == (5, None, True, False)
    assert (position.open[0].exposure, position.open[0].expected, position.closed) == ((20261122, 1), 2**200 + 7, ())

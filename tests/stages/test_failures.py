"""CollectFailures: every record once in the file of its visit, however late, and nothing kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing import test_stream
from apache_beam.transforms.window import TimestampedValue

from schemas.elements import FailureRecord
from transforms.failures import CollectFailures, _WriteFailuresFn, decide_once, failure_line

VISIT = 2026112200001


def _failure(detector: int, visit: int | None = VISIT) -> FailureRecord:
    return FailureRecord(visit, detector, "subtraction", "NoTemplateError", "none", "all")


def _lines(folder: Path) -> dict[str, list[bytes]]:
    return {path.name: path.read_bytes().splitlines() for path in folder.iterdir()}


def _expected(*detectors: int) -> dict[str, list[bytes]]:
    return {f"{VISIT}.jsonl": [failure_line(_failure(detector)) for detector in detectors]}


class _Bag:
    """Bag state of one key."""

    def __init__(self) -> None:
        self.held: list[bytes] = []

    def read(self) -> list[bytes]:
        return list(self.held)

    def clear(self) -> None:
        self.held.clear()


def test_repeated_and_late_records_stand_once_beside_the_earlier_ones(tmp_path: Path) -> None:
    stream = (
        test_stream.TestStream()
        .advance_watermark_to(0)
        .add_elements([TimestampedValue(_failure(detector), 1000.0) for detector in (2, 1, 2)])
        .advance_watermark_to(2000)
        .add_elements([TimestampedValue(_failure(detector), 1000.0) for detector in (0, 1)])
        .advance_watermark_to(2000 + 10 * 86_400)
        .add_elements([TimestampedValue(_failure(3), 1000.0)])
        .advance_watermark_to_infinity()
    )
    options = PipelineOptions([], streaming=True)
    with beam.Pipeline(runner="BundleBasedDirectRunner", options=options) as flow:
        flow | stream.with_output_types(FailureRecord) | CollectFailures(str(tmp_path))
    assert _lines(tmp_path) == _expected(0, 1, 2, 3)


def test_all_records_are_written_on_the_local_runner(tmp_path: Path) -> None:
    records = [_failure(detector) for detector in (2, 1, 2)]
    with beam.Pipeline(runner=FnApiRunner()) as flow:
        created = flow | beam.Create([*records, _failure(4, visit=None)]) | beam.Map(_stamped)
        created | CollectFailures(str(tmp_path))
    assert _lines(tmp_path) == {**_expected(1, 2), "manifest.jsonl": [failure_line(_failure(4, visit=None))]}


def _stamped(record: FailureRecord) -> TimestampedValue:
    return TimestampedValue(record, 1000.0)


def test_written_records_leave_the_state(tmp_path: Path) -> None:
    write, lines = _WriteFailuresFn(str(tmp_path), None, 1.0).write, _Bag()
    for detector in (1, 0):
        lines.held = [failure_line(_failure(detector))]
        assert list(write(VISIT, lines)) == [str(tmp_path / f"{VISIT}.jsonl")]
        assert lines.held == []
    assert _lines(tmp_path) == _expected(0, 1)
    assert list(write(VISIT, lines)) == []  # a timer that fires again
    assert _lines(tmp_path) == _expected(0, 1)


def test_records_stay_in_the_state_when_they_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines: Any = _Bag()
    lines.held = [failure_line(_failure(1))]
    with pytest.raises(OSError):
        list(_WriteFailuresFn(str(tmp_path / "file"), None, 1.0).write(VISIT, lines))
    assert lines.held == [failure_line(_failure(1))]


class _Sink:
    """Keeps what was sent and acknowledged; refuses to acknowledge while `is_away`."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.is_away = False

    def send(self, topic: str, key: bytes, value: bytes, headers: list[Any]) -> None:
        self.sent.append((topic, value))

    def flush(self, deadline_s: float) -> tuple[int, int]:
        if self.is_away:
            raise RuntimeError("not acknowledged")
        return 0, 0


def test_new_records_are_sent_before_they_are_written_and_again_when_that_failed(tmp_path: Path) -> None:
    sink: Any = _Sink()
    write, lines = _WriteFailuresFn(str(tmp_path), sink, 1.0).write, _Bag()
    lines.held = [failure_line(_failure(detector)) for detector in (1, 0)]
    list(write(VISIT, lines))
    told = [("alert-failures", failure_line(_failure(detector))) for detector in (0, 1)]
    assert sink.sent == told
    lines.held = [failure_line(_failure(detector)) for detector in (1, 2)]
    sink.is_away = True
    with pytest.raises(RuntimeError):
        list(write(VISIT, lines))
    assert _lines(tmp_path) == _expected(0, 1)
    sink.is_away = False
    list(write(VISIT, lines))
    assert sink.sent[2:] == 2 * [("alert-failures", failure_line(_failure(2)))]
    assert _lines(tmp_path) == _expected(0, 1, 2)


def test_a_record_is_logged_when_it_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write, lines = _WriteFailuresFn(str(tmp_path), None, 1.0).write, _Bag()
    for detectors in ((0, 1), (1, 2)):
        lines.held = [failure_line(_failure(detector)) for detector in detectors]
        list(write(VISIT, lines))
    one = _failure(0)
    assert [(told.levelname, told.stage, told.visit, told.detector) for told in caplog.records] == [
        ("WARNING", one.stage, one.visit, detector) for detector in (0, 1, 2)
    ]
    assert caplog.records[0].getMessage() == f"{one.error}: {one.reason}; lost: {one.lost}"


def test_the_first_to_decide_is_obeyed_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "decision"
    assert decide_once(path, b"one") == b"one"
    assert decide_once(path, b"other") == b"one"
    assert [one.name for one in path.parent.iterdir()] == ["decision"]

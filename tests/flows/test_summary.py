"""Totals of a run, what was recovered of a simulated night, and what a person sees of both."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from runners.progress import VisitProgress
from runners.summary import UnreadableOutputError, json_summary, print_summary, read_table, recovered, summarise
from transforms.latency import FIGURES

ARCSEC_DEG = 1.0 / 3600.0
CONTRACT_KEYS = [
    "visits",
    "detectors",
    "dia_sources",
    "objects_new",
    "objects_updated",
    "ss_matches",
    "alerts",
    "delivered",
    "passed",
    "failures",
    "seconds",
]


def ledger_record(visit: int, **changes: Any) -> dict[str, Any]:
    return {
        "visit": visit,
        "day_obs": 20261122,
        "band": "r",
        "midpoint_mjd_tai": 61367.0 - 0.01 * visit,
        "detectors": {"expected": 3, "processed": 2, "failed": 1},
        "dia_sources": {"detected": 20, "selected": 12, "rejected": {"edge": 1, "low reliability": 7}},
        "ss_matches": 2,
        "objects": {"new": 6, "updated": 3},
        "sources_without_object": 1,
        "alerts": 11,
        "streams": {"lsst-alerts-v11": {"sent": 11}},
        "delivered": {"fink": 11, "antares": 11},
        "filters": {"demo.bright": {"seen": 11, "passed": 4, "capped": 1, "error": None}},
        "forced_sources": 9,
        "failures": 1,
        "latency_s": 1.5 * visit,
        "seconds": {"detection": 0.5, "subtraction": 2.0},
        **changes,
    }


def write_ledger(out: Path, *records: dict[str, Any]) -> None:
    folder = out / "ledger"
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        (folder / f"{record['visit']}.json").write_text(json.dumps(record))


def write_failures(out: Path, *records: dict[str, Any]) -> None:
    folder = out / "failures"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def failure(stage: str, reason: str, visit: int | None = 1) -> dict[str, Any]:
    return {"visit": visit, "detector": 0, "stage": stage, "error": "SomeError", "reason": reason, "lost": "it"}


def printed(*args: Any, **kwargs: Any) -> str:
    stream = io.StringIO()
    print_summary(Console(file=stream, width=120), *args, **kwargs)
    return stream.getvalue()


def test_json_has_exactly_the_keys_of_the_contract_and_the_totals(tmp_path: Path) -> None:
    write_ledger(tmp_path, ledger_record(1), ledger_record(2, delivered={"fink": 10}, filters={}))
    write_failures(tmp_path, failure("detection", "a"), failure("ingestion", "b", visit=None))
    result = json_summary(summarise(tmp_path), seconds=12.34567)
    assert list(result) == CONTRACT_KEYS
    assert result == {
        "visits": 2,
        "detectors": 4,
        "dia_sources": 24,
        "objects_new": 12,
        "objects_updated": 6,
        "ss_matches": 4,
        "alerts": 22,
        "delivered": {"antares": 11, "fink": 21},
        "passed": {"demo.bright": 4},
        "failures": 2,
        "seconds": 12.346,
    }
    assert json.loads(json.dumps(result)) == result


def test_visits_come_in_order_of_midpoint_and_latency_over_visits(tmp_path: Path) -> None:
    write_ledger(tmp_path, *(ledger_record(visit) for visit in (1, 2, 3)), ledger_record(4, latency_s=None))
    summary = summarise(tmp_path)
    assert [record["visit"] for record in summary.visits] == [4, 3, 2, 1]
    assert (summary.latency_p50_s, summary.latency_max_s) == (3.0, 4.5)
    assert list(summary.rejected.items()) == [("low reliability", 28), ("edge", 4)]
    assert list(summary.seconds_per_stage) == ["subtraction", "detection"]


def test_record_without_optional_keys_counts_as_nothing(tmp_path: Path) -> None:
    write_ledger(tmp_path, {"visit": 7, "midpoint_mjd_tai": None, "detectors": None})
    summary = summarise(tmp_path)
    assert json_summary(summary, 0.0)["visits"] == 1
    assert (summary.alerts, summary.delivered, summary.filters, summary.latency_p50_s) == (0, {}, {}, None)


def test_empty_output_folder_gives_zeros(tmp_path: Path) -> None:
    result = json_summary(summarise(tmp_path), 0.0)
    assert all(not value for value in result.values())
    assert "0 alerts from 0 visits" in printed(summarise(tmp_path), out=tmp_path, seconds=0.0)


def test_unfinished_files_are_passed_over_and_broken_ones_named(tmp_path: Path) -> None:
    write_ledger(tmp_path, ledger_record(1))
    (tmp_path / "ledger" / ".2.json").write_text("{")
    (tmp_path / "ledger" / "visits.jsonl").write_text("not read")
    assert len(summarise(tmp_path).visits) == 1
    (tmp_path / "ledger" / "3.json").write_text('{"visit":')
    with pytest.raises(UnreadableOutputError, match=r"3\.json is not JSON"):
        summarise(tmp_path)


def test_failures_are_grouped_most_frequent_first(tmp_path: Path) -> None:
    write_failures(tmp_path, failure("b", "x"), failure("a", "y"), failure("b", "x", visit=2), failure("a", "x"))
    groups = summarise(tmp_path).grouped_failures()
    assert groups == [("b", "SomeError: x", 2), ("a", "SomeError: x", 1), ("a", "SomeError: y", 1)]


def test_recovered_needs_the_same_image_one_arcsec_and_an_alert(tmp_path: Path) -> None:
    night, out = tmp_path / "night", tmp_path / "out"
    dec = 60.0
    truth = [
        # kind, visit, detector, offset in right ascension on the sky (arcsec), snr, good_pixels
        ("found", 1, 0, 0.0, 50.0, True),
        ("found", 1, 0, 100.0, 5.0, True),  # faint, and found all the same
        ("found", 1, 0, 200.0, 50.0, False),  # on bad pixels, without an alert
        ("fading", 1, 0, 300.0, -50.0, True),
        ("missed", 2, 0, 0.0, 50.0, True),  # right place, another visit
        ("missed", 1, 1, 100.0, 50.0, True),  # right place, another detector
        ("missed", 1, 0, 401.2, 50.0, True),  # source at 400: 1.2 arcsec away
        ("near", 1, 0, 399.2, 50.0, True),  # 0.8 arcsec away; in coordinates 1.6 at dec 60
        ("silent", 1, 0, 500.0, 50.0, True),  # a source, but no alert
    ]

    def place(offset_arcsec: float) -> dict[str, float]:
        return {"ra": (359.95 + offset_arcsec * ARCSEC_DEG / 0.5) % 360.0, "dec": dec}

    rows = [
        {"kind": kind, "visit": visit, "detector": detector, **place(offset), "snr": snr, "good_pixels": good}
        for kind, visit, detector, offset, snr, good in truth
    ]
    write_parquet(night / "truth" / "injected.parquet", rows)
    sources = [
        {"visit": 1, "detector": 0, **place(offset), "diaObjectId": dia, "ssObjectId": ss}
        for offset, dia, ss in [(0, 1, None), (100, None, 9), (300, 2, None), (400, 3, None), (500, None, None)]
    ]
    write_parquet(out / "archive" / "dia_sources" / "day_obs=20261122" / "1.parquet", sources)
    result = {kind.kind: kind for kind in recovered(night, out)}
    counts = {
        kind: (one.recovered_bright, one.injected_bright, one.recovered, one.injected) for kind, one in result.items()
    }
    assert counts == {
        "fading": (1, 1, 1, 1),
        "found": (1, 1, 2, 3),
        "missed": (0, 3, 0, 3),
        "near": (1, 1, 1, 1),
        "silent": (0, 1, 0, 1),
    }


def test_nothing_is_recovered_of_a_night_that_gave_no_source(tmp_path: Path) -> None:
    row = {"kind": "star", "visit": 1, "detector": 0, "ra": 1.0, "dec": 2.0, "snr": 20.0, "good_pixels": True}
    write_parquet(tmp_path / "truth" / "injected.parquet", [row])
    (one,) = recovered(tmp_path, tmp_path)
    assert (one.injected, one.recovered) == (1, 0)
    assert recovered(tmp_path / "elsewhere", tmp_path) == []


def test_table_joins_nights_and_fills_missing_columns(tmp_path: Path) -> None:
    folder = tmp_path / "archive" / "dia_sources"
    write_parquet(folder / "day_obs=20261121" / "1.parquet", [{"diaSourceId": 2**62 + 1, "snr": 1.0}])
    write_parquet(folder / "day_obs=20261122" / "2.parquet", [{"diaSourceId": 5}])
    (folder / "day_obs=20261122" / ".3.parquet").write_bytes(b"half")
    table = read_table(tmp_path, "dia_sources", ["diaSourceId", "snr", "band"])
    assert table.to_pylist() == [
        {"diaSourceId": 2**62 + 1, "snr": 1.0, "band": None},
        {"diaSourceId": 5, "snr": None, "band": None},
    ]
    (folder / "day_obs=20261122" / "4.parquet").write_bytes(b"broken")
    with pytest.raises(UnreadableOutputError, match="dia_sources cannot be read"):
        read_table(tmp_path, "dia_sources", ["diaSourceId"])


def test_person_sees_brokers_filters_failures_and_places(tmp_path: Path) -> None:
    write_ledger(
        tmp_path, ledger_record(1, filters={"demo.bad": {"seen": 3, "passed": 0, "capped": 0, "error": "timed out"}})
    )
    write_failures(tmp_path, *(failure("detection", f"reason [{n}]") for n in range(7)))
    text = printed(summarise(tmp_path), out=tmp_path, seconds=3.0, received={"antares": 9, "fink": 11})
    assert "11 alerts from 1 visits in 3.0 s" in text
    assert "timed out" in text and "2 kinds more" in text
    assert "reason [0]" in text  # square brackets of a reason are text, not markup
    antares = next(line for line in text.splitlines() if line.strip().startswith("antares"))
    assert antares.split() == ["antares", "│", "11", "│", "9"]
    assert str(tmp_path / "ledger") in text.replace("\n", "")
    assert str(tmp_path / "brokers") not in text  # there is no such folder


def progress_lines(out: Path, *, terminal: bool = False, quiet: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=terminal)
    write_ledger(out, ledger_record(5))  # from an earlier attempt
    with VisitProgress(out, 2, quiet=quiet, console=console):
        write_ledger(out, ledger_record(1, failures=0))
        time.sleep(0.3)
        write_ledger(out, ledger_record(2))
    return stream.getvalue()


def test_progress_prints_one_line_a_visit_where_there_is_no_terminal(tmp_path: Path) -> None:
    assert progress_lines(tmp_path).splitlines() == [
        "visit 1 r: 11 alerts in 1.5 s (1 of 2)",
        "visit 2 r: 11 alerts in 3.0 s, 1 failures (2 of 2)",
    ]


def test_progress_draws_a_bar_on_a_terminal_and_ends_full(tmp_path: Path) -> None:
    shown = progress_lines(tmp_path, terminal=True)
    last = shown[shown.rindex("visits") :]
    assert "2/2" in last and "22 alerts, 1 failures" in last


def _latency(total_s: float, pixels_s: float) -> dict[str, Any]:
    """Of a visit whose alerts were all equally late."""
    seconds = {"waiting": total_s - pixels_s, "pixels": pixels_s, "total": total_s, "overhead": total_s - pixels_s}
    figures = {name: dict.fromkeys(("mean", "p50", "p99", "max"), seconds.get(name, 0.0)) for name in FIGURES}
    return {"alerts": 11, **figures}


def test_how_late_announced_visits_were_is_told_by_stage(tmp_path: Path) -> None:
    records = [ledger_record(visit, latency=_latency(2.0 + visit, 1.5)) for visit in (1, 2, 3)]
    write_ledger(tmp_path, *records, ledger_record(4, latency=None))
    text = printed(summarise(tmp_path), out=tmp_path, seconds=3.0)
    total = next(line for line in text.splitlines() if line.strip().startswith("total"))
    assert total.split("│")[1:] == [f" {seconds}" for seconds in ("4.00 ", "4.00 ", "5.00 ", "5.00")]
    write_ledger(tmp_path / "without", ledger_record(1))
    assert "overhead" not in printed(summarise(tmp_path / "without"), out=tmp_path, seconds=3.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_live_job_is_watched_from_its_first_visit_on(tmp_path: Path, terminal: bool) -> None:
    write_ledger(tmp_path, ledger_record(1, failures=0, latency=_latency(3.0, 1.5)))
    stream = io.StringIO()
    console = Console(file=stream, width=160, force_terminal=terminal)
    with VisitProgress(tmp_path, 2, console=console, afresh=False, announced=lambda: 2):
        time.sleep(0.3)
        write_ledger(tmp_path, ledger_record(2, latency=_latency(4.0, 1.5)))
    shown = stream.getvalue()
    if terminal:
        told = "2 announced, 22 alerts, 1 failures, latency p50 3.0 s, p99 4.0; without pixel work p50 1.5 s, p99 2.5"
        assert told in shown[shown.rindex("visits") :]
    else:
        assert shown.splitlines() == [
            "visit 1 r: 11 alerts, p50 3.0 s, without pixel work 1.5 s (1 of 2, 2 announced)",
            "visit 2 r: 11 alerts, p50 4.0 s, without pixel work 2.5 s, 1 failures (2 of 2, 2 announced)",
        ]


def test_quiet_progress_says_nothing(tmp_path: Path) -> None:
    assert progress_lines(tmp_path, quiet=True) == ""


def test_broker_that_got_nothing_without_kafka_is_skipped_unless_another_reason_is_known(tmp_path: Path) -> None:
    nothing = {"delivered": {"fink": 0, "lasair": 0, "mirror": 11}, "streams": {}}
    write_ledger(tmp_path, ledger_record(1, **nothing))
    assert summarise(tmp_path).unserved_brokers == {"fink": "skipped: no Kafka", "lasair": "skipped: no Kafka"}
    assert printed(summarise(tmp_path), out=tmp_path, seconds=1.0).count("skipped: no Kafka") == 2
    # Its folder could not be written: that is the reason.
    write_failures(tmp_path, {**failure("distribution", "disk full"), "lost": "11 packets to lasair"})
    assert list(summarise(tmp_path).unserved_brokers) == ["fink"]
    # A folder of a filter that passed nothing is empty with or without Kafka.
    silent = {"demo.bright": {"seen": 11, "passed": 0, "capped": 0, "error": None}}
    write_ledger(tmp_path, ledger_record(1, **nothing, filters=silent))
    assert "or a folder for demo.bright, empty" in summarise(tmp_path).unserved_brokers["fink"]
    # With a topic served, or without any alert, zero is just zero.
    write_ledger(tmp_path, ledger_record(1, **{**nothing, "streams": {"lsst-alerts-v11": {"sent": 11}}}))
    assert summarise(tmp_path).unserved_brokers == {}
    write_ledger(tmp_path, ledger_record(1, **nothing, alerts=0))
    assert summarise(tmp_path).unserved_brokers == {}


def test_rows_that_are_not_wanted_are_not_read(tmp_path: Path) -> None:
    for night, ids in ((20261122, [1, 2, None]), (20261123, [2, 3])):
        rows = [{"diaObjectId": key, "psfFlux": float(night)} for key in ids]
        write_parquet(tmp_path / "archive" / "dia_forced_sources" / f"day_obs={night}" / "a.parquet", rows)
    wanted = ("diaObjectId", pa.array([2, 9], pa.int64()))
    table = read_table(tmp_path, "dia_forced_sources", ["diaObjectId", "psfFlux", "band"], wanted)
    assert table["diaObjectId"].to_pylist() == [2, 2]
    assert table["psfFlux"].to_pylist() == [20261122.0, 20261123.0]
    assert table["band"].to_pylist() == [None, None]

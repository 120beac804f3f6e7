"""Bad input costs what it must and nothing else: one record says what went wrong, the rest is delivered."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from runners import running
from runners.kafka import check_kafka

FIRST_DAY = 20261122
ALL_DETECTOR = "all alerts of the detector"


def _changed(source: Path, target: Path, change: Callable[[fits.HDUList], object]) -> str:
    with fits.open(source, memmap=False, lazy_load_hdus=False) as hdus:
        change(hdus)
        hdus.writeto(target, output_verify="silentfix")
    return str(target)


def _no_wcs(hdus: fits.HDUList) -> None:
    for card in ("CTYPE1", "CTYPE2"):
        del hdus["IMAGE"].header[card]


def _cube(hdus: fits.HDUList) -> None:
    hdus["IMAGE"].data = np.stack([hdus["IMAGE"].data] * 2)


def _other_mask(hdus: fits.HDUList) -> None:
    hdus["MASK"].data = hdus["MASK"].data[:-1]


def _fill(extension: str, value: float) -> Callable[[fits.HDUList], object]:
    def change(hdus: fits.HDUList) -> None:
        hdus[extension].data = np.full_like(hdus[extension].data, value)

    return change


def _tiny(hdus: fits.HDUList) -> None:
    for name in ("IMAGE", "MASK", "VARIANCE"):
        hdus[name].data = hdus[name].data[:20, :20]


def _galactic(hdus: fits.HDUList) -> None:
    hdus["IMAGE"].header["CTYPE1"], hdus["IMAGE"].header["CTYPE2"] = "GLON-TAN", "GLAT-TAN"


def _elsewhere(hdus: fits.HDUList) -> None:
    hdus["IMAGE"].header["CRVAL1"] += 30.0


def _cutout_of_few_stars(hdus: fits.HDUList) -> None:
    for name in ("IMAGE", "MASK", "VARIANCE"):
        hdus[name].data = hdus[name].data[:120, :120]


def _another_field(hdus: fits.HDUList) -> None:
    for name in ("IMAGE", "MASK", "VARIANCE"):
        hdus[name].data = hdus[name].data[:, ::-1]


def _too_little_variance(hdus: fits.HDUList) -> None:
    hdus["VARIANCE"].data /= 16.0


# detector: what was done to its science image, and the failure: error and words of the reason.
CHANGES: dict[int, tuple[Callable[[fits.HDUList], object], str, str]] = {
    20: (_no_wcs, "ExposureError", "no celestial WCS"),
    21: (_cube, "ExposureError", "must be two-dimensional, got shape (2, 512, 512)"),
    22: (_other_mask, "ExposureError", "MASK has shape (511, 512), the image (512, 512)"),
    23: (_fill("IMAGE", np.nan), "ExposureError", "no finite pixel"),
    24: (_fill("VARIANCE", 0.0), "ExposureError", "no pixel has both a finite value and a positive variance"),
    25: (_fill("IMAGE", 1000.0), "UnusableImageError", "good pixels of the science image have the value 1000"),
    26: (_tiny, "ExposureError", "shape (20, 20) is too small, at least 32 x 32"),
    27: (_galactic, "ExposureError", "must have axes RA, DEC, got GLON-TAN, GLAT-TAN"),
    28: (_elsewhere, "UnusableImageError", "template has no good pixel"),
    29: (_cutout_of_few_stars, "TooFewKernelStarsError", "kernel stars offered, 10 are needed"),
    30: (_another_field, "KernelSumError", "is not within 0.5 to 2 times the stars' flux ratio"),
    31: (_too_little_variance, "BadSubtractionError", "times what the variances say, 3 times is allowed"),
}


@pytest.fixture(scope="module")
def bad_run(
    nights: dict[int, Path],
    visits: list[dict[str, Any]],
    night_of: Callable[..., Path],
    produce: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Two good visits, the second with a crowd of bad detectors, among lines of every bad kind."""
    folder, images = tmp_path_factory.mktemp("bad"), tmp_path_factory.mktemp("images")
    first, second = visits[0], json.loads(json.dumps(visits[1]))
    good = second["detectors"][0]
    science = nights[FIRST_DAY] / good["science"]
    (images / "cut.fits").write_bytes(science.read_bytes()[:1_000_000])
    (images / "text.fits").write_text("this is no FITS file")
    bad = {
        10: {"science": str(images / "missing.fits")},
        11: {"science": str(images / "cut.fits")},
        12: {"science": str(images / "text.fits")},
        13: {"template": None},
        14: {"template": str(images / "missing.fits")},
    }
    for detector, (change, _, _) in CHANGES.items():
        bad[detector] = {"science": _changed(science, images / f"{detector}.fits", change)}
    second["detectors"] += [{**good, **paths, "detector": detector} for detector, paths in bad.items()]
    records = [
        first,
        "this line is no JSON",
        {**visits[2], "band": "x"},
        second,
        first,
        {**first, "rotation_deg": 17.0},
        {**visits[3], "visit": 77, "seq_num": first["seq_num"]},
        {**visits[3], "target_name": "\ud83d"},
        {**visits[3], "midpoint_mjd_tai": 1e300},
        {**visits[3], "visit": 10**30},
    ]
    return produce(night_of(folder / "night", nights[FIRST_DAY], records), folder / "out", "--kafka", "embedded")


def _detector_failures(run: Any, detector: int) -> list[dict[str, Any]]:
    return [record for record in run.failures() if record["detector"] == detector]


def test_a_night_full_of_bad_input_ends_with_exit_code_0(bad_run: Any) -> None:
    assert bad_run.exit_code == 0, bad_run.stderr
    assert bad_run.summary["failures"] == len(bad_run.failures()) == 5 + len(CHANGES) + 8
    assert bad_run.summary["detectors"] == 4 and bad_run.summary["visits"] == 2


def test_what_is_good_is_delivered_as_if_the_bad_were_not_there(bad_run: Any, first_run: Any) -> None:
    for folder in ("archive/alerts", "brokers", "filters"):
        here, there = bad_run.files(folder), first_run.files(folder)
        assert here == {path: there[path] for path in here}
        assert len({Path(path).name for path in here}) == 2, folder


@pytest.mark.parametrize(
    ("detector", "error", "words"),
    [
        (10, "ExposureError", "missing.fits: no such file"),
        (11, "ExposureError", "cut.fits: broken FITS file"),
        (12, "ExposureError", "text.fits: broken FITS file"),
        (13, "NoTemplateError", "no_template: no r template for detector 13"),
        (14, "ExposureError", "missing.fits: no such file"),
        *((detector, error, words) for detector, (_, error, words) in CHANGES.items()),
    ],
)
def test_a_bad_detector_is_one_record_naming_visit_stage_and_reason(
    bad_run: Any, visits: list[dict[str, Any]], detector: int, error: str, words: str
) -> None:
    (record,) = _detector_failures(bad_run, detector)
    assert (record["visit"], record["stage"], record["lost"]) == (visits[1]["visit"], "subtraction", ALL_DETECTOR)
    assert record["error"] == error and words in record["reason"]


@pytest.mark.parametrize(
    ("line", "visit", "error", "words"),
    [
        (2, None, "BrokenLine", "not JSON"),
        (3, 2, "InvalidVisit", "unknown band 'x', expected one of u, g, r, i, z, y"),
        (5, 0, "DuplicateVisit", "announced before with the same content"),
        (6, 0, "DuplicateVisit", "announced before with different content; the first stands"),
        (7, 77, "DuplicateExposure", "already belongs to visit"),
        (8, 3, "InvalidVisit", "not valid Unicode"),
        (9, 3, "InvalidVisit", "midpoint_mjd_tai 1e+300 is outside"),
        (10, None, "InvalidVisit", "visit must be an integer in"),
    ],
)
def test_a_bad_line_is_one_record_naming_line_visit_and_reason(
    bad_run: Any, visits: list[dict[str, Any]], line: int, visit: int | None, error: str, words: str
) -> None:
    records = [record for record in bad_run.failures() if record["reason"].startswith(f"line {line}:")]
    records += [record for record in bad_run.failures() if record["reason"].startswith(f"line {line} ")]
    (record,) = records
    expected = visits[visit]["visit"] if visit is not None and visit < len(visits) else visit
    assert (record["visit"], record["detector"], record["stage"]) == (expected, None, "ingestion")
    assert record["error"] == error and words in record["reason"]


def test_the_ledger_counts_detectors_that_failed_and_no_visit_that_was_none(
    bad_run: Any, visits: list[dict[str, Any]]
) -> None:
    ledger = [json.loads(line) for line in (bad_run.out / "ledger" / "visits.jsonl").read_text().splitlines()]
    assert [record["visit"] for record in ledger] == [visits[0]["visit"], visits[1]["visit"]]
    assert [record["detectors"]["failed"] for record in ledger] == [0, 5 + len(CHANGES)]
    assert [record["failures"] for record in ledger] == [0, 5 + len(CHANGES)]
    assert [record["revision"] for record in ledger] == [0, 0]


# --- one visit is enough for the rest -------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_visit(
    nights: dict[int, Path], visits: list[dict[str, Any]], night_of: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A night of one visit with one detector."""
    record = {**visits[0], "detectors": visits[0]["detectors"][:1]}
    return night_of(tmp_path_factory.mktemp("one") / "night", nights[FIRST_DAY], [record])


def test_a_filter_that_is_none_is_recorded_and_the_others_run(one_visit: Path, produce: Any, tmp_path: Path) -> None:
    filters = tmp_path / "filters"
    filters.mkdir()
    (filters / "good.yaml").write_text("{name: good, owner: demo, where: diaSource.snr > 5}\n")
    (filters / "unsound.yaml").write_text("{name: unsound, owner: demo, where: diaSource.nonsense > 5}\n")
    (filters / "broken.yaml").write_text("name: [broken\n")
    run = produce(one_visit, tmp_path / "out", "--filters", filters, "--kafka", "embedded")
    assert run.exit_code == 0, run.stderr
    assert set(run.summary["passed"]) == {"demo.good"} and run.summary["passed"]["demo.good"] > 0
    reasons = sorted(record["reason"] for record in run.failures())
    assert len(reasons) == run.summary["failures"] == 2
    assert reasons[0].startswith("broken.yaml") and "nonsense" in reasons[1]
    assert {(record["stage"], record["error"]) for record in run.failures()} == {("filtering", "InvalidFilter")}
    assert "filter left out: broken.yaml" in run.stderr
    # The shipped broker that reads a shipped filter has nothing to read here; the others are served.
    assert "broker left out: bright-new-readers" in run.stderr
    assert set(run.summary["delivered"]) == {"antares", "fink", "babamul", "archive-mirror"}


@pytest.mark.parametrize("broken", ["bytes", "columns"])
def test_broken_ephemerides_cost_the_solar_system_and_nothing_else(
    one_visit: Path, visits: Any, nights: dict[int, Path], produce: Any, tmp_path: Path, broken: str
) -> None:
    night = tmp_path / "night"
    shutil.copytree(one_visit, night, symlinks=True)
    path = night / "ephemerides.parquet"
    table = pq.read_table(path)
    path.unlink()
    if broken == "bytes":
        path.write_bytes(b"PAR1 and then nothing")
    else:
        pq.write_table(table.drop_columns(["ra"]), path)
    run = produce(night, tmp_path / "out")
    assert run.exit_code == 0 and run.summary["alerts"] > 5 and run.summary["ss_matches"] == 0
    (record,) = run.failures()
    assert (record["visit"], record["stage"], record["error"]) == (None, "solar_system", "EphemeridesError")
    assert "ephemerides.parquet" in record["reason"] and "solar-system association" in record["lost"]


def test_bad_rows_of_ephemerides_are_reported_and_the_others_matched(
    one_visit: Path, produce: Any, tmp_path: Path
) -> None:
    night = tmp_path / "night"
    shutil.copytree(one_visit, night, symlinks=True)
    path = night / "ephemerides.parquet"
    table = pq.read_table(path)
    nobody = pa.array([0] * len(table), table.schema.field("ssObjectId").type)
    path.unlink()
    at = table.column_names.index("ssObjectId")
    pq.write_table(pa.concat_tables([table, table.set_column(at, table.schema.field(at), nobody)]), path)
    run = produce(night, tmp_path / "out")
    assert run.exit_code == 0 and run.summary["ss_matches"] > 0
    (record,) = run.failures()
    assert (record["stage"], record["error"]) == ("solar_system", "UnusableEphemerides")
    assert record["lost"] == f"{len(table)} rows" and "ssObjectId" in record["reason"]


def test_what_lies_beside_the_manifest_may_be_missing_or_of_no_use_and_the_manifest_stands_for_its_folder(
    one_visit: Path, produce: Any, tmp_path: Path
) -> None:
    with_them = produce(one_visit / "visits.jsonl", tmp_path / "by-file")
    assert with_them.summary["ss_matches"] > 0 and "Injected sources that became alerts" in with_them.stderr
    night = tmp_path / "night"
    shutil.copytree(one_visit, night, symlinks=True)
    (night / "ephemerides.parquet").unlink()
    (night / "truth").unlink()
    (night / "truth").mkdir()
    (night / "truth" / "injected.parquet").write_bytes(b"PAR1 and then nothing")
    without = produce(night, tmp_path / "out")
    assert without.exit_code == 0 and "the run is complete, its report is not" in without.stderr
    assert without.summary["ss_matches"] == 0 and without.failures() == []


def test_a_night_of_bad_lines_only_ends_with_exit_code_0_and_no_alert(
    nights: dict[int, Path], night_of: Any, produce: Any, tmp_path: Path
) -> None:
    run = produce(night_of(tmp_path / "night", nights[FIRST_DAY], ["{", "[]"]), tmp_path / "out")
    assert run.exit_code == 0 and run.summary["alerts"] == 0 and run.summary["visits"] == 0
    assert [record["error"] for record in run.failures()] == ["BrokenLine", "InvalidVisit"]


def test_failures_of_an_earlier_attempt_do_not_outlive_their_cause(
    one_visit: Path, produce: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert produce(one_visit, out).exit_code == 0
    (out / "failures").mkdir()
    (out / "failures" / "1.jsonl").write_text('{"visit": 1, "stage": "distribution", "reason": "disk full"}\n')
    again = produce(one_visit, out)
    assert again.exit_code == 0 and again.failures() == [] and again.summary["failures"] == 0


# --- refused before anything is written -----------------------------------------------------------------


def test_an_unknown_configuration_key_is_refused_with_file_key_and_allowed_keys(
    one_visit: Path, produce: Any, tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("detection: {treshold_snr: 5.0}\n")
    run = produce(one_visit, tmp_path / "out", "--config", config)
    run.assert_refused(
        2, "mine.yaml: detection: unknown key 'treshold_snr'", "max_sources, min_science_snr", "threshold_snr"
    )
    assert not (tmp_path / "out").exists()


def test_a_bad_broker_file_is_refused_with_file_key_and_allowed_values(
    one_visit: Path, produce: Any, tmp_path: Path
) -> None:
    brokers = tmp_path / "mine.yaml"
    brokers.write_text("brokers: [{name: a, topic: t, encoding: xml}]\n")
    produce(one_visit, tmp_path / "out", "--brokers", brokers).assert_refused(
        2, "mine.yaml", "encoding", "'fink' or 'json-thin'"
    )
    brokers.write_text("brokers: [{name: a, stream: nobody.nothing}]\n")
    run = produce(one_visit, tmp_path / "out", "--brokers", brokers)
    run.assert_refused(2, "mine.yaml: broker a wants stream 'nobody.nothing'", "demo.bright-new", "full")
    assert not (tmp_path / "out").exists()


def test_a_kafka_broker_that_does_not_answer_ends_the_run_soon_and_before_it_began(
    one_visit: Path, produce: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inspect.signature(check_kafka).parameters["timeout_s"].default <= 15.0
    monkeypatch.setattr(running, "check_kafka", functools.partial(check_kafka, timeout_s=2.0))  # not to wait so long
    started = time.monotonic()
    run = produce(one_visit, tmp_path / "out", "--kafka", "localhost:1")
    run.assert_refused(1, "no Kafka broker answered at localhost:1 within 2 s")
    assert time.monotonic() - started < 2.0 + 3.0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kafka", ["localhost", "localhost:x", ":9092", "localhost:70000", ""])
def test_an_address_that_is_none_is_a_usage_error(one_visit: Path, produce: Any, tmp_path: Path, kafka: str) -> None:
    produce(one_visit, tmp_path / "out", "--kafka", kafka).assert_refused(2, "expected none, embedded or HOST:PORT")


def test_a_night_that_is_not_there_is_refused(produce: Any, tmp_path: Path) -> None:
    produce(tmp_path / "nowhere", tmp_path / "out").assert_refused(2, "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    produce(tmp_path / "empty", tmp_path / "out").assert_refused(1, "no visits.jsonl in", "is it a night folder?")
    (tmp_path / "empty" / "visits.jsonl").write_text("\n")
    produce(tmp_path / "empty", tmp_path / "out").assert_refused(1, "visits.jsonl announces no visit")
    assert not (tmp_path / "out").exists()


def test_a_history_that_is_none_is_refused(one_visit: Path, produce: Any, first_run: Any, tmp_path: Path) -> None:
    produce(one_visit, tmp_path / "out", "--history", one_visit).assert_refused(2, "holds no archive", "--history")
    broken = tmp_path / "broken"
    shutil.copytree(first_run.out / "archive" / "dia_sources", broken / "archive" / "dia_sources")
    next((broken / "archive").rglob("*.parquet")).write_bytes(b"PAR1 and then nothing")
    produce(one_visit, tmp_path / "out", "--history", broken).assert_refused(2, "--history", "broken")
    assert not (tmp_path / "out").exists()
    produce(one_visit, first_run.out, "--history", first_run.out).assert_refused(2, "is the output folder of this run")


def test_an_output_folder_that_cannot_be_used_is_refused(one_visit: Path, produce: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    produce(one_visit, tmp_path / "file").assert_refused(2, "cannot be written")
    produce(one_visit, tmp_path / "file" / "below").assert_refused(2, "cannot be written")
    produce(one_visit, "/proc/nightstream-out").assert_refused(2, "/proc/nightstream-out cannot be written")  # root too
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    produce(one_visit, tmp_path / "other").assert_refused(2, "is not empty and not an output folder of nightstream")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["letter.txt"]
    (tmp_path / "other" / ".nightstream.json").write_text("{")
    produce(one_visit, tmp_path / "other").assert_refused(2, ".nightstream.json is broken")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("stray",), "unexpected stray"),
        (("--", "--no_such_option", "3"), "unexpected no_such_option"),
        (("--", "--direct_num_workers", "many"), "invalid int value: 'many'"),
    ],
)
def test_options_beam_does_not_know_are_a_usage_error(
    one_visit: Path, produce: Any, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    produce(one_visit, tmp_path / "out", *options).assert_refused(2, words)
    assert not (tmp_path / "out").exists()

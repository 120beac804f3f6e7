"""`nightstream associate` on tables made by hand: what comes out, from what order of rows, and of bad rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.source_tables import RADIUS_KEY, REQUIRED_COLUMNS, read_source_table

ARCSEC = 1.0 / 3600.0
FIRST_MJD = 61_000.1
DAY_OBS = ("20251120", "20251121")
# visit: (midpoint, band); two nights
VISITS = {11: (FIRST_MJD, "r"), 12: (FIRST_MJD + 0.1, "g"), 21: (FIRST_MJD + 1, "r"), 22: (FIRST_MJD + 1.1, "g")}
N_OBJECTS = 6
SHIFTED = 2  # lies 1.25 arcsec further east on the second night
ASTEROID = 4_000_000_000_000
TYPES = {
    "diaSourceId": pa.int64(), "visit": pa.int64(), "detector": pa.int64(), "band": pa.string(),
    "midpointMjdTai": pa.float64(), "ra": pa.float64(), "dec": pa.float64(), "psfFlux": pa.float32(),
    "psfFluxErr": pa.float32(), "snr": pa.float32(), "reliability": pa.float32(), "ssObjectId": pa.int64(),
    "diaObjectId": pa.int64(), "x": pa.float64(), "pixelFlags_crCenter": pa.bool_(), "note": pa.string(),
}  # fmt: skip


def row(visit: int, number: int, **changes: Any) -> dict[str, Any]:
    """A row of a visit: source `number` of it, at a place of its own that is on both sides of RA 0."""
    midpoint, band = VISITS.get(visit, (FIRST_MJD + 2, "i"))
    return {
        "diaSourceId": visit * 1000 + number, "visit": visit, "detector": number % 3, "band": band,
        "midpointMjdTai": midpoint, "ra": (number - 3) * 20 * ARCSEC % 360.0, "dec": -2.0 + number * 5 * ARCSEC,
        "psfFlux": 1000.0 + 10 * number, "psfFluxErr": 50.0, "snr": 20.0,
    } | changes  # fmt: skip


def good_rows() -> list[dict[str, Any]]:
    """Two nights of the same objects, an asteroid, a source too unreliable for an object, ids of other surveys."""
    rows = []
    for visit in VISITS:
        for number in range(N_OBJECTS):
            one = row(visit, number, reliability=0.9, diaObjectId=7, x=5.0 + number, note="is not in the schema")
            if number == SHIFTED and visit > 20:
                one["ra"] += 1.25 * ARCSEC
            rows.append(one)
        rows.append(row(visit, 50, dec=-1.9 + visit * ARCSEC, ssObjectId=ASTEROID, diaObjectId=7))
        rows.append(row(visit, 60, dec=-1.8 + visit * ARCSEC, reliability=0.05))
    return rows


def table_of(rows: Iterable[dict[str, Any]], radius: bytes | None = b"1.5", **types: pa.DataType) -> pa.Table:
    listed = list(rows)
    names = [name for name in TYPES if name in REQUIRED_COLUMNS or any(name in one for one in listed)]
    arrays = [pa.array([one.get(name) for one in listed], types.get(name, TYPES[name])) for name in names]
    return pa.table(arrays, names).replace_schema_metadata({} if radius is None else {RADIUS_KEY: radius})


def written(path: Path, rows: Iterable[dict[str, Any]], radius: bytes | None = b"1.5", **types: pa.DataType) -> Path:
    pq.write_table(table_of(rows, radius, **types), path)
    return path


@pytest.fixture(scope="module")
def whole(associate: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both nights in one run."""
    folder = tmp_path_factory.mktemp("whole")
    run = associate(written(folder / "t.parquet", good_rows()), folder / "out")
    assert run.exit_code == 0, run.stderr
    return run


def products(run: Any, day_obs: str = "") -> dict[str, bytes]:
    """Everything that is promised to be equal, of one night or all."""
    files = run.files("archive", "brokers", "filters")
    visits = {str(visit) for visit in VISITS if day_obs in (DAY_OBS[visit > 20], "")}
    return {
        path: content
        for path, content in files.items()
        if Path(path).stem in visits or (Path(path).suffix == ".parquet" and day_obs in path)
    }


# --- what comes out -------------------------------------------------------------------------------------


def test_counts_are_those_of_the_table(whole: Any) -> None:
    summary = whole.summary
    assert (summary["visits"], summary["detectors"], summary["dia_sources"]) == (4, 12, 4 * (N_OBJECTS + 2))
    assert (summary["objects_new"], summary["objects_updated"]) == (N_OBJECTS, 3 * N_OBJECTS)
    assert (summary["ss_matches"], summary["alerts"], summary["failures"]) == (4, 4 * (N_OBJECTS + 1), 0)
    assert summary["delivered"]["archive-mirror"] == summary["alerts"]
    archived = [json.loads(line) for line in (whole.out / "ledger" / "visits.jsonl").read_text().splitlines()]
    assert [one["visit"] for one in archived] == list(VISITS)
    assert [one["sources_without_object"] for one in archived] == [1] * 4


def test_packets_hold_the_columns_of_the_table_and_the_objects_that_association_found(whole: Any) -> None:
    by_id = {packet["diaSourceId"]: packet for packet in whole.packets()}
    assert not {visit * 1000 + 60 for visit in VISITS} & set(by_id)
    for visit, (midpoint, band) in VISITS.items():
        for number in range(N_OBJECTS):
            packet = by_id[visit * 1000 + number]
            source, history = packet["diaSource"], packet["prvDiaSources"]
            earlier = [one * 1000 + number for one in VISITS if one < visit]
            assert source["diaObjectId"] == packet["diaObject"]["diaObjectId"] == 11_000 + number
            assert [one["diaSourceId"] for one in history or []] == earlier
            assert packet["prvDiaForcedSources"] == [] and packet["cutoutDifference"] is None
            given = row(visit, number)
            assert (source["detector"], source["band"], source["midpointMjdTai"]) == (number % 3, band, midpoint)
            assert (source["psfFlux"], source["dec"]) == (given["psfFlux"], given["dec"])
            assert source["x"] == 5.0 + number and np.isnan(source["y"])
            assert source["timeProcessedMjdTai"] == midpoint and source["apFlux"] is None


def test_a_source_whose_ss_object_the_table_names_is_a_match_without_object_and_history(whole: Any) -> None:
    packets = [packet for packet in whole.packets() if packet["ssSource"] is not None]
    assert [packet["diaSourceId"] for packet in packets] == [visit * 1000 + 50 for visit in VISITS]
    for packet in packets:
        assert packet["ssSource"]["ssObjectId"] == packet["diaSource"]["ssObjectId"] == ASTEROID
        assert packet["ssSource"]["diaSourceId"] == packet["diaSourceId"]
        assert packet["diaSource"]["diaObjectId"] is packet["diaObject"] is packet["prvDiaSources"] is None


def test_the_radius_is_the_tables_unless_the_configuration_says_otherwise(
    whole: Any, associate: Any, tmp_path: Path
) -> None:
    """The shifted object is one within 1.5 arcsec and two within 1.2."""
    config = tmp_path / "mine.yaml"
    config.write_text("association: {radius_arcsec: 1.2}\n")
    run = associate(written(tmp_path / "t.parquet", good_rows()), tmp_path / "out", "--config", config)
    assert whole.summary["objects_new"] == N_OBJECTS and run.summary["objects_new"] == N_OBJECTS + 1


# --- the same again -------------------------------------------------------------------------------------


def test_order_of_rows_and_columns_row_groups_and_wider_types_change_no_byte(
    whole: Any, associate: Any, tmp_path: Path
) -> None:
    rows = [good_rows()[k] for k in np.random.default_rng(7).permutation(len(good_rows()))]
    table = table_of(rows, psfFlux=pa.float64(), band=pa.dictionary(pa.int8(), pa.string()), detector=pa.uint8())
    table = table.select(table.column_names[::-1])
    path = tmp_path / "shuffled.parquet"
    pq.write_table(table, path, row_group_size=5, compression="zstd")
    run = associate(path, tmp_path / "out")
    assert run.exit_code == 0, run.stderr
    assert products(run) == products(whole) and len(products(run)) > 12


def test_a_second_run_into_the_same_folder_changes_no_byte_and_another_table_is_refused(
    whole: Any, associate: Any, tmp_path: Path
) -> None:
    before = products(whole)
    again = associate(whole.out.parent / "t.parquet", whole.out)
    assert again.exit_code == 0 and products(again) == before
    associate(written(tmp_path / "other.parquet", good_rows()[:9]), whole.out).assert_refused(
        2, "output of another input"
    )
    assert products(again) == before


def test_night_after_night_with_history_gives_the_bytes_of_both_at_once(
    whole: Any, associate: Any, tmp_path: Path
) -> None:
    nights = [[one for one in good_rows() if (one["visit"] > 20) is second] for second in (False, True)]
    first = associate(written(tmp_path / "1.parquet", nights[0]), tmp_path / "first")
    second = associate(written(tmp_path / "2.parquet", nights[1]), tmp_path / "second", "--history", tmp_path / "first")
    assert (first.exit_code, second.exit_code) == (0, 0), second.stderr
    assert second.summary["objects_new"] == 0
    assert products(second) == products(whole, DAY_OBS[1]) and len(products(second)) > 6
    of_first_night = {path: content for path, content in products(whole, DAY_OBS[0]).items() if path.endswith(".avro")}
    assert of_first_night == {path: products(first)[path] for path in of_first_night}


# --- bad rows -------------------------------------------------------------------------------------------

MAX_LONG, MAX_INT = 2**63 - 1, 2**31 - 1
NO_KEY = "no id, visit, detector, band, time or place"
# reason -> rows that break it, each of a visit of its own
BAD: dict[str, list[dict[str, Any]]] = {
    NO_KEY: [{name: None} for name in ("diaSourceId", "detector", "band", "midpointMjdTai", "ra", "dec")],
    "diaSourceId is not positive": [{"diaSourceId": 0}, {"diaSourceId": -5}, {"diaSourceId": -MAX_LONG - 1}],
    "detector outside [0, 2147483647]": [{"detector": -1}, {"detector": MAX_INT + 1}, {"detector": MAX_LONG}],
    "unknown band": [{"band": ""}, {"band": "clear, and rather long"}, {"band": "R"}, {"band": "r\0"}],
    "no finite position": [{name: value} for name in ("ra", "dec") for value in (np.nan, np.inf, -np.inf)],
    "right ascension outside [-180, 360]": [{"ra": 360.001}, {"ra": -180.001}, {"ra": 1e300}],
    "declination outside [-90, 90]": [{"dec": 90.001}, {"dec": -1e300}],
    "midpointMjdTai outside [10000, 100000]": [
        {"midpointMjdTai": value} for value in (1e12, -5.0, 0.0, np.nan, np.inf)
    ],
}
# rows that are odd but can be used
ODD: list[dict[str, Any]] = [
    {"visit": MAX_LONG},
    {"detector": MAX_INT},
    {"diaSourceId": MAX_LONG},
    {"midpointMjdTai": 10_000.0},
    {"midpointMjdTai": 100_000.0},
    # Seconds of these times 1e6 round to less than the millisecond they are.
    {"midpointMjdTai": 14_800.002468},
    {"midpointMjdTai": 53_400.002468},
    {"midpointMjdTai": 65_800.004936},
    {"ra": -100.0},
    {"ra": 360.0, "dec": 40.0},
    {"ra": -1e-20, "dec": 41.0},
    {"dec": 90.0},
    {"dec": -90.0},
    {"psfFlux": np.inf},
    {"psfFlux": None, "psfFluxErr": None, "snr": None},
    {"psfFlux": 3e38, "psfFluxErr": 1e-38},
    {"psfFluxErr": 0.0},
    {"psfFluxErr": -1.0, "snr": -np.inf},
    {"psfFlux": -np.inf, "psfFluxErr": np.inf, "snr": np.nan},
]
FIRST_BAD, FIRST_ODD = 1_000, 2_000


@pytest.fixture(scope="module")
def bad_run(associate: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two visits of good rows, among rows of every bad and every odd kind."""
    folder = tmp_path_factory.mktemp("bad")
    rows = [one for one in good_rows() if one["visit"] < 20]
    for visit, change in enumerate((one for group in BAD.values() for one in group), start=FIRST_BAD):
        rows.append(row(visit, 0) | change)
    for visit, change in enumerate(ODD, start=FIRST_ODD):
        rows.append(row(visit, 0, dec=-30.0 + visit * 0.001) | change)
    # Twice at one place, so that light curves are made of them.
    rows += [row(FIRST_ODD + 500 + k, 0, dec=5.0, midpointMjdTai=61_010.0 + k, **ODD[-6 + k]) for k in range(6)]
    rows += [
        row(12, 70) | {"visit": None},
        row(12, 71) | {"visit": 0},
        row(12, 72) | {"visit": -12},
        row(12, 73, midpointMjdTai=1.0),
        row(12, 74, midpointMjdTai=FIRST_MJD),
        row(12, 75, midpointMjdTai=FIRST_MJD + 0.2, band="z"),
        row(12, 76, band="r"),
        row(12, 1, psfFlux=77.0),
        row(12, 2, detector=77),
        row(12, 3),
        row(12, 3),
    ]
    return associate(written(folder / "t.parquet", rows), folder / "out", "--kafka", "embedded")


def test_bad_rows_cost_themselves_and_the_run_ends_with_exit_code_0(bad_run: Any, whole: Any) -> None:
    assert bad_run.exit_code == 0, bad_run.stderr
    assert "Traceback" not in bad_run.stderr
    assert bad_run.summary["visits"] == 2 + len(ODD) + 6
    assert bad_run.summary["dia_sources"] == 2 * (N_OBJECTS + 2) + len(ODD) + 6
    assert bad_run.summary["alerts"] == 2 * (N_OBJECTS + 1) + len(ODD) + 6
    assert bad_run.summary["delivered"]["antares"] == bad_run.summary["alerts"]
    assert (
        bad_run.files("archive/alerts")[f"archive/alerts/day_obs={DAY_OBS[0]}/11.avro"]
        == (whole.files("archive/alerts")[f"archive/alerts/day_obs={DAY_OBS[0]}/11.avro"])
    )


def test_a_bad_row_is_a_record_that_names_visit_reason_and_what_was_lost(bad_run: Any) -> None:
    found = {record["visit"]: record for record in bad_run.failures() if record["visit"] not in (None, 12)}
    reasons = [reason for reason, group in BAD.items() for _ in group]
    assert sorted(found) == [FIRST_BAD + k for k in range(len(reasons))]
    for visit, reason in enumerate(reasons, start=FIRST_BAD):
        record = found[visit]
        assert (record["stage"], record["error"], record["lost"]) == ("ingestion", "UnusableSource", "1 diaSources")
        assert record["reason"].startswith(reason), record


def test_rows_without_a_visit_and_rows_unlike_their_visit_are_told_of(bad_run: Any) -> None:
    nowhere = {record["reason"]: record["lost"] for record in bad_run.failures() if record["visit"] is None}
    assert nowhere == {NO_KEY: "1 diaSources", "visit is not positive": "2 diaSources"}
    of_visit = {record["reason"]: record["lost"] for record in bad_run.failures() if record["visit"] == 12}
    assert of_visit == {
        "midpointMjdTai outside [10000, 100000]": "1 diaSources",
        "another time or band than most of its visit": "3 diaSources",
        "diaSourceId occurs twice": "4 diaSources",
    }


def test_odd_numbers_come_out_as_they_went_in(bad_run: Any) -> None:
    by_visit = {packet["diaSource"]["visit"]: packet["diaSource"] for packet in bad_run.packets()}
    for visit, change in enumerate(ODD, start=FIRST_ODD):
        source = by_visit[change.get("visit", visit)]
        for name, value in change.items():
            if name == "ra":
                assert source["ra"] == {-100.0: 260.0}.get(value, 0.0)
            elif value is None or value != value:
                assert source[name] is None
            else:
                single = TYPES[name] == pa.float32()
                assert source[name] == (np.float32(value) if single else value), name


def test_of_rows_with_one_id_the_same_stands_whatever_their_order(tmp_path: Path) -> None:
    rows = [row(11, 0, psfFlux=flux, snr=snr) for flux, snr in ((3.0, 1.0), (1.0, 2.0), (2.0, 3.0))]
    ways = [[rows[k] for k in order] for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0])]
    kept = [read_source_table(written(tmp_path / "t.parquet", way)).records for way in ways]
    assert [len(one) for one in kept] == [1, 1, 1] and len({one.tobytes() for one in kept}) == 1


def test_a_table_of_bad_rows_only_ends_with_exit_code_0_and_no_alert(associate: Any, tmp_path: Path) -> None:
    run = associate(written(tmp_path / "t.parquet", [row(11, 0, ra=np.nan), row(0, 1)]), tmp_path / "out")
    assert run.exit_code == 0 and (run.summary["alerts"], run.summary["visits"]) == (0, 0)
    assert sorted(record["reason"] for record in run.failures()) == ["no finite position", "visit is not positive"]


def test_sources_heaped_on_one_place_are_told_of_and_left_out(tmp_path: Path) -> None:
    """0, 0 where the place is unknown: one hundred of a visit at one place may be sources, one more is none."""
    rows = [row(11, k, ra=0.0, dec=0.0) for k in range(101)] + [row(12, k, ra=0.0, dec=0.0) for k in range(100)]
    table = read_source_table(written(tmp_path / "t.parquet", [*rows, row(11, 500, ra=360.0, dec=0.0), row(11, 501)]))
    assert sorted(table.records["visit"].tolist()) == [11] + [12] * 100
    assert [(one.visit, one.lost) for one in table.manifest.problems] == [(11, "102 diaSources")]
    assert "at one place with more than 100 sources" in table.manifest.problems[0].reason


# --- histories ------------------------------------------------------------------------------------------


@pytest.fixture
def first_night(whole: Any, associate: Any, tmp_path: Path) -> Path:
    """Output of the first night."""
    rows = [one for one in good_rows() if one["visit"] < 20]
    assert associate(written(tmp_path / "first.parquet", rows), tmp_path / "first").exit_code == 0
    return tmp_path / "first"


def _edited(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    for path in (folder / "archive" / name).rglob("*.parquet"):
        pq.write_table(change(pq.ParquetFile(path).read()), path)


def test_a_history_that_does_not_fit_together_or_comes_again_is_refused(
    first_night: Path, associate: Any, tmp_path: Path
) -> None:
    """Each would be a wrong answer, or no answer, without a word."""
    second = [one for one in good_rows() if one["visit"] > 20]
    attempts: list[tuple[list[dict[str, Any]], Callable[[Path], object], str]] = [
        ([one for one in good_rows() if one["visit"] < 20], lambda _: None, "visit 11, detector 0 is in it"),
        ([one | {"visit": one["visit"] - 10} for one in second], lambda _: None, "visit 11, detector 0 is in it"),
        ([one | {"diaSourceId": one["diaSourceId"] - 10_000} for one in second], lambda _: None, "12 diaSourceIds"),
        (second, lambda old: shutil.rmtree(old / "archive" / "dia_objects"), "of diaObjects that are not in it"),
        (second, lambda old: (old / "archive" / "dia_objects" / "_parts").mkdir(), "a run that was broken off"),
        (second, lambda old: _edited(old, "dia_objects", lambda one: one.drop_columns("ra")), "no column ra"),
        (second, lambda old: _edited(old, "dia_objects", lambda one: _filled(one, "ra", np.nan)), "have no position"),
        (second, lambda old: _edited(old, "dia_sources", lambda one: _filled(one, "dec", 99.0)), "have no position"),
        (second, lambda old: _edited(old, "dia_sources", lambda one: _filled(one, "midpointMjdTai", np.nan)), "time"),
    ]
    for k, (rows, change, words) in enumerate(attempts):
        history, table = tmp_path / f"old{k}", written(tmp_path / "t.parquet", rows)
        shutil.copytree(first_night, history)
        change(history)
        associate(table, tmp_path / "out", "--history", history).assert_refused(2, f"--history {history}", words)
    assert not (tmp_path / "out").exists()


def _filled(table: pa.Table, name: str, value: float) -> pa.Table:
    index = table.column_names.index(name)
    return table.set_column(index, name, pa.array([value] * len(table)))


def test_a_history_that_lacks_a_night_is_told_of_and_what_a_killed_writer_left_is_not_read(
    first_night: Path, associate: Any, tmp_path: Path
) -> None:
    """The first night's sources are gone; in the objects' place lies half a file under a temporary name."""
    shutil.rmtree(first_night / "archive" / "dia_sources")
    next((first_night / "archive" / "dia_objects").iterdir()).joinpath(".77.dia_objects.parquet").write_bytes(b"PAR1")
    second = written(tmp_path / "second.parquet", [one for one in good_rows() if one["visit"] > 20])
    run = associate(second, tmp_path / "out", "--history", first_night)
    assert run.exit_code == 0, run.stderr
    assert run.summary["objects_new"] == 0
    assert [(one["error"], one["lost"]) for one in run.failures()] == [
        ("ShortHistory", f"part of the history of {N_OBJECTS} diaObjects")
    ]


def test_what_a_killed_run_left_under_temporary_names_does_not_stop_the_next(
    first_night: Path, associate: Any, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in (first_night / "archive").rglob("*") if path.is_file()}
    for name in ("dia_objects/_parts/day_obs=20251120/.77.11.parquet", "dia_sources/day_obs=20251120/.77.11.parquet"):
        path = first_night / "archive" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"PAR1 and not much more")
    run = associate(tmp_path / "first.parquet", first_night)
    assert run.exit_code == 0, run.stderr
    assert before == {path: path.read_bytes() for path in (first_night / "archive").rglob("*") if path.is_file()}


# --- refused before anything is written -----------------------------------------------------------------


def _flipped(path: Path, place: int) -> bytes:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "footer"])
def test_what_is_no_parquet_file_is_refused(associate: Any, tmp_path: Path, kind: str) -> None:
    good = written(tmp_path / "good.parquet", good_rows())
    contents = {
        "text": b"diaSourceId,ra,dec\n1,2,3\n",
        "empty": b"",
        "cut": good.read_bytes()[:-100],
        "footer": _flipped(good, -200),
    }
    path = tmp_path / "bad.parquet"
    path.write_bytes(contents[kind])
    associate(path, tmp_path / "out").assert_refused(1, "bad.parquet: not a Parquet table")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (table_of(good_rows()).drop_columns(["snr", "visit"]), "no column visit, snr; required are diaSourceId"),
        (table_of([]), "there is no source in it"),
        (table_of(good_rows(), diaSourceId=pa.float64()), "diaSourceId holds double but must hold whole numbers"),
        (table_of(good_rows(), visit=pa.float32()), "visit holds float but must hold whole numbers"),
        (table_of(good_rows()).append_column("ra", pa.array([0.0] * 32)), "two columns of one name"),
        (table_of(good_rows()).append_column("apFlux", pa.array(["much"] * 32)), "apFlux: string does not fit float"),
        (table_of(good_rows()).append_column("apFlux", pa.array([{"a": 1}] * 32)), "apFlux: struct<a: int64> does not"),
        (
            table_of([]).drop_columns(["dec"]).append_column("dec", pa.array([], pa.list_(pa.float64()))),
            "dec: list<",
        ),
        (
            table_of(good_rows()).append_column("bboxSize", pa.array([2**40] * 32)),
            "bboxSize: int64 does not fit int32",
        ),
    ],
    ids=["missing", "empty", "float-id", "float-visit", "twice", "text", "struct", "list", "too-wide"],
)
def test_a_table_without_the_columns_or_types_is_refused(
    associate: Any, tmp_path: Path, table: pa.Table, words: str
) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(table, path)
    associate(path, tmp_path / "out").assert_refused(1, "bad.parquet", words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("radius", "exit_code", "words"),
    [
        (b"wide", 1, "association_radius_arcsec in its metadata"),
        (b"\xff\xfe", 1, "association_radius_arcsec in its metadata"),
        (b"", 1, "association_radius_arcsec in its metadata"),
        (b"nan", 2, "radius_arcsec"),
        (b"0", 2, "radius_arcsec"),
        (b"-1.5", 2, "radius_arcsec"),
        (b"1e9", 2, "radius_arcsec"),
        (b"inf", 2, "radius_arcsec"),
        (b"4", 2, "halo_arcsec 10.0 must be at least 6 times radius_arcsec 4.0"),
    ],
)
def test_a_radius_that_is_none_is_refused(
    associate: Any, tmp_path: Path, radius: bytes, exit_code: int, words: str
) -> None:
    path = written(tmp_path / "t.parquet", good_rows(), radius)
    associate(path, tmp_path / "out").assert_refused(exit_code, words)
    assert not (tmp_path / "out").exists()


def test_a_folder_a_missing_file_and_an_option_that_is_none_are_usage_errors(associate: Any, tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    good = written(tmp_path / "t.parquet", good_rows())
    associate(tmp_path / "folder.parquet", tmp_path / "out").assert_refused(2, "is a directory")
    associate(tmp_path / "nowhere.parquet", tmp_path / "out").assert_refused(2, "does not exist")
    associate(good, tmp_path / "out", "--history", tmp_path / "folder.parquet").assert_refused(2, "holds no archive")
    assert not (tmp_path / "out").exists()

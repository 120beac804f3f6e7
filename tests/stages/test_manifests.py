"""The manifest: every refusal with its reason, one problem a line, and no meaning in the order of lines."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.manifests import (
    ManifestError,
    manifest_lines,
    night_folder,
    parse_visit,
    read_manifest,
    write_manifest,
)

MIDPOINT = 61367.125
READOUT_END = MIDPOINT + 2e-4


def _record(number: int = 1, **changes: Any) -> dict[str, Any]:
    record = {
        "visit": 2026112200000 + number,
        "day_obs": 20261122,
        "seq_num": number,
        "instrument": "SimCam",
        "band": "r",
        "midpoint_mjd_tai": MIDPOINT + number * 4e-4,
        "exposure_time_s": 30.0,
        "readout_end_mjd_tai": READOUT_END + number * 4e-4,
        "boresight_ra_deg": 150.1,
        "boresight_dec_deg": 2.2,
        "rotation_deg": 0.0,
        "observation_reason": "science",
        "target_name": None,
        "detectors": [
            {"detector": 1, "science": f"science/{number}_1.fits", "template": None},
            {"detector": 0, "science": f"science/{number}_0.fits", "template": "templates/r_0.fits"},
        ],
    }
    return {**record, **changes}


def _night(folder: Path, *lines: dict[str, Any] | str) -> Path:
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "visits.jsonl").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return folder


def _only_problem(night: Path) -> tuple[int, int | None, str, str]:
    (problem,) = read_manifest(night).problems
    assert problem.detector is None
    return problem.line, problem.visit, problem.error, problem.reason


# --- reading ----------------------------------------------------------------------------------------


def test_a_visit_is_read_with_absolute_paths_and_detectors_in_order(tmp_path: Path) -> None:
    manifest = read_manifest(_night(tmp_path, _record()))
    assert manifest.problems == ()
    (visit,) = manifest.visits
    assert (visit.visit, visit.band, visit.midpoint_mjd_tai) == (2026112200001, "r", MIDPOINT + 4e-4)
    assert [images.detector for images in visit.detectors] == [0, 1]
    assert visit.detectors[0].science == str(tmp_path / "science/1_0.fits")
    assert visit.detectors[0].template == str(tmp_path / "templates/r_0.fits")
    assert visit.detectors[1].template is None


def test_the_event_time_is_floored_to_the_millisecond(tmp_path: Path) -> None:
    (visit,) = read_manifest(_night(tmp_path, _record(midpoint_mjd_tai=61367.0, readout_end_mjd_tai=61367.0))).visits
    assert visit.event_time_s == (61367 - 40587) * 86400.0
    later = 61367.0 + 1.9e-3 / 86400.0
    (visit,) = read_manifest(_night(tmp_path, _record(midpoint_mjd_tai=later, readout_end_mjd_tai=later))).visits
    assert visit.event_time_s == (61367 - 40587) * 86400.0 + 0.001


def test_the_manifest_file_stands_for_its_folder(tmp_path: Path) -> None:
    night = _night(tmp_path, _record())
    assert read_manifest(night / "visits.jsonl") == read_manifest(night)
    assert night_folder(night) == night_folder(night / "visits.jsonl") == night


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), n_visits=st.integers(1, 6))
def test_shuffled_lines_are_the_same_manifest(tmp_path: Path, seed: int, n_visits: int) -> None:
    rng = random.Random(seed)
    # Some at the same moment: the visit's number decides.
    times = [MIDPOINT + rng.choice((0, 0, 1, 2)) * 4e-4 for _ in range(n_visits)]
    records = [
        _record(number, midpoint_mjd_tai=time, readout_end_mjd_tai=time + 1e-4) for number, time in enumerate(times)
    ]
    in_order = read_manifest(_night(tmp_path, *records))
    rng.shuffle(records)
    for record in records:
        rng.shuffle(record["detectors"])
    assert read_manifest(_night(tmp_path, *records)) == in_order
    keys = [(visit.midpoint_mjd_tai, visit.visit) for visit in in_order.visits]
    assert keys == sorted(keys) and len(keys) == n_visits


def test_what_was_written_is_read_back_and_paths_inside_the_night_are_relative(tmp_path: Path) -> None:
    elsewhere = [{"detector": 3, "science": "/archive/raw/x.fits", "template": None}]
    visits = read_manifest(
        _night(tmp_path / "a", _record(1), _record(2, detectors=elsewhere, target_name="M 31"))
    ).visits
    path = write_manifest(tmp_path / "a", list(visits))
    assert read_manifest(tmp_path / "a").visits == visits
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written[0]["detectors"][0]["science"] == "science/1_0.fits"
    assert written[1]["detectors"][0]["science"] == "/archive/raw/x.fits"
    assert [file.name for file in path.parent.iterdir()] == ["visits.jsonl"]


def test_blank_lines_a_byte_order_mark_and_unusual_line_separators_do_no_harm(tmp_path: Path) -> None:
    text = json.dumps(_record(target_name="line\u2028separator\u0085next"), ensure_ascii=False)
    (tmp_path / "visits.jsonl").write_bytes(b"\xef\xbb\xbf\n" + text.encode() + b"\r\n   \n")
    manifest = read_manifest(tmp_path)
    assert manifest.problems == ()
    assert manifest.visits[0].target_name == "line\u2028separator\u0085next"


def test_empty_texts_are_null_and_ra_is_brought_into_0_360(tmp_path: Path) -> None:
    (visit,) = read_manifest(
        _night(tmp_path, _record(target_name="", observation_reason="", boresight_ra_deg=-10.0))
    ).visits
    assert visit.target_name is None and visit.observation_reason is None and visit.boresight_ra_deg == 350.0


# --- one bad line -----------------------------------------------------------------------------------

NO_VISIT_CHANGES = [
    ({"band": "x"}, "unknown band 'x', expected one of u, g, r, i, z, y"),
    ({"band": None}, "band must be a non-empty text, got None"),
    ({"band": 7}, "band must be a non-empty text, got 7"),
    ({"observatory": 5}, "observatory must be a text or null, got 5"),
    ({"instrument": ""}, "instrument must be a non-empty text, got ''"),
    ({"exposure_time_s": 0}, "exposure_time_s must be in (0, 86400], got 0.0"),
    ({"exposure_time_s": -3.0}, "exposure_time_s must be in (0, 86400], got -3.0"),
    ({"exposure_time_s": 1e9}, "exposure_time_s must be in (0, 86400], got 1000000000.0"),
    ({"exposure_time_s": "30"}, "exposure_time_s must be a finite number, got '30'"),
    ({"exposure_time_s": True}, "exposure_time_s must be a finite number, got True"),
    ({"midpoint_mjd_tai": float("nan")}, "midpoint_mjd_tai must be a finite number, got nan"),
    ({"midpoint_mjd_tai": float("inf")}, "midpoint_mjd_tai must be a finite number, got inf"),
    ({"midpoint_mjd_tai": 10**400}, "midpoint_mjd_tai must be a finite number, got 1000000000"),
    ({"midpoint_mjd_tai": None}, "midpoint_mjd_tai must be a finite number, got None"),
    ({"midpoint_mjd_tai": 1e12}, "midpoint_mjd_tai 1000000000000.0 is outside [55196, 71635]"),
    ({"midpoint_mjd_tai": -5}, "midpoint_mjd_tai -5.0 is outside [55196, 71635]"),
    ({"readout_end_mjd_tai": MIDPOINT - 1}, "must lie within a day after midpoint_mjd_tai"),
    ({"readout_end_mjd_tai": MIDPOINT + 2}, "must lie within a day after midpoint_mjd_tai"),
    ({"boresight_dec_deg": 90.5}, "boresight_dec_deg 90.5 is outside [-90, 90]"),
    ({"day_obs": 20091231}, "day_obs must be an integer in [20100101, 20541231], got 20091231"),
    ({"day_obs": 20260230}, "day_obs 20260230 is no date"),
    ({"day_obs": "20261122"}, "day_obs must be an integer in [20100101, 20541231], got '20261122'"),
    ({"seq_num": 32768}, "seq_num must be an integer in [0, 32767], got 32768"),
    ({"seq_num": 1.0}, "seq_num must be an integer in [0, 32767], got 1.0"),
    ({"target_name": 5}, "target_name must be a text or null, got 5"),
    ({"target_name": "half \ud83d"}, "is not valid Unicode"),
    ({"observation_reason": "zero\0"}, "holds a zero character"),
    ({"detectors": []}, "detectors must be a non-empty list"),
    ({"detectors": {"detector": 0}}, "detectors must be a non-empty list"),
    ({"detectors": [3]}, "detectors must hold objects, got int"),
    ({"detectors": [{"detector": 0}]}, "science is missing"),
    ({"detectors": [{"science": "a.fits"}]}, "detector is missing"),
    ({"detectors": [{"detector": 256, "science": "a.fits"}]}, "detector must be an integer in [0, 255], got 256"),
    ({"detectors": [{"detector": 0, "science": "a\0.fits"}]}, "holds a zero character"),
    ({"detectors": [{"detector": 0, "science": "a"}] * 2}, "detector 0 is listed twice"),
    ({"detectors": [{"detector": 0, "science": "a", "template": 4}]}, "template must be a text or null, got 4"),
]


@pytest.mark.parametrize(("changes", "reason"), NO_VISIT_CHANGES)
def test_a_line_that_is_no_visit_is_a_problem_and_the_next_line_is_read(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    night = _night(tmp_path, _record(1, **changes), _record(2))
    line, visit, error, said = _only_problem(night)
    assert (line, visit, error) == (1, 2026112200001, "InvalidVisit")
    assert said.startswith("line 1: ") and reason in said and len(said) < 300
    assert [one.seq_num for one in read_manifest(night).visits] == [2]


@pytest.mark.parametrize("key", [key for key in _record() if key not in ("observation_reason", "target_name")])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    record = _record()
    del record[key]
    _, visit, error, said = _only_problem(_night(tmp_path, record))
    expected = "detectors must be a non-empty list" if key == "detectors" else f"line 1: {key} is missing"
    assert error == "InvalidVisit" and expected in said
    assert visit == (None if key == "visit" else 2026112200001)


@pytest.mark.parametrize("visit", [0, -5, 10**30, 1.5, "17", None, True])
def test_a_visit_number_that_is_none_is_named_and_nothing_is_filed_under_it(tmp_path: Path, visit: Any) -> None:
    _, filed_under, error, said = _only_problem(_night(tmp_path, _record(visit=visit)))
    assert filed_under is None and error == "InvalidVisit"
    assert "visit must be an integer in [1, 9223372036854775807], got" in said


@pytest.mark.parametrize(
    "line", ["not json", "{", '{"visit": 1,}', "[" * 100_000, '{"visit": ' + "9" * 5000 + "}", "\x00", "[1"]
)
def test_a_line_that_is_no_json_is_a_problem_and_the_next_line_is_read(tmp_path: Path, line: str) -> None:
    night = _night(tmp_path, line, _record(2))
    number, visit, error, said = _only_problem(night)
    assert (number, visit, error) == (1, None, "BrokenLine") and said.startswith("line 1 is not JSON: ")
    assert len(read_manifest(night).visits) == 1


@pytest.mark.parametrize("line", ["[]", "3", '"visit"', "null", "NaN"])
def test_a_line_that_is_no_object_is_a_problem(tmp_path: Path, line: str) -> None:
    _, visit, error, said = _only_problem(_night(tmp_path, line))
    assert visit is None and error == "InvalidVisit" and "expected an object, got" in said


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(
    record=st.dictionaries(
        st.sampled_from(sorted(_record())),
        st.none()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.dictionaries(st.sampled_from(["detector", "science", "template"]), st.integers() | st.text())),
    )
)
def test_whatever_the_values_a_record_is_a_visit_or_a_value_error(record: dict[str, Any]) -> None:
    try:
        parse_visit({**_record(), **record}, Path("/night"))
    except ValueError as error:
        assert str(error)


def test_a_visit_announced_twice_is_a_problem_and_the_first_stands(tmp_path: Path) -> None:
    _, visit, error, said = _only_problem(_night(tmp_path, _record(1), _record(1)))
    assert (visit, error) == (2026112200001, "DuplicateVisit")
    assert said == "line 2: visit 2026112200001 was announced before with the same content; the first stands"
    night = _night(tmp_path, _record(1), _record(1, rotation_deg=5.0))
    _, visit, error, said = _only_problem(night)
    assert (visit, error) == (2026112200001, "DuplicateVisit") and "with different content" in said
    assert read_manifest(night).visits[0].rotation_deg == 0.0


def test_two_visits_of_one_exposure_would_share_ids_and_are_a_problem(tmp_path: Path) -> None:
    _, visit, error, said = _only_problem(_night(tmp_path, _record(1), _record(1, visit=5)))
    assert (visit, error) == (5, "DuplicateExposure")
    assert "day_obs 20261122 seq_num 1 already belongs to visit 2026112200001" in said


# --- no manifest at all -----------------------------------------------------------------------------


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    for night in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ManifestError, match=rf"no visits\.jsonl in {night}: is it a night folder\?"):
            read_manifest(night)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "visits.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match=r"visits\.jsonl is not UTF-8 text"):
        manifest_lines(tmp_path)


def test_two_instruments_in_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="mixes instruments Other, SimCam: one night folder holds one"):
        read_manifest(_night(tmp_path, _record(1), _record(2, instrument="Other")))


def test_an_empty_manifest_has_no_visits_and_no_problems(tmp_path: Path) -> None:
    manifest = read_manifest(_night(tmp_path))
    assert manifest.visits == () and manifest.problems == ()

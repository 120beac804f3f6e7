"""Night folders as training data: which exposures are taken, what is injected into them, what is called bogus."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from runners.cli import main
from schemas.exposures import Exposure, mask_bits, read_exposure
from schemas.manifests import Visit
from transforms.reliability_nights import (
    LEAST_VISITS,
    TrainingExposure,
    TrainingNightError,
    inject,
    label_exposure,
    training_nights,
    without_repeated,
)
from transforms.reliability_training import AMBIGUOUS, CLASSES, KINDS, LABELLED_DTYPE


def folder_of(path: Path, visits: list[dict[str, Any]], images: Path) -> Path:
    """A night folder with these visits, their images where they are."""
    path.mkdir()
    lines = []
    for visit in visits:
        detectors = [
            one | {name: one[name] and str(images / one[name]) for name in ("science", "template")}
            for one in visit["detectors"]
        ]
        lines.append(json.dumps(visit | {"detectors": detectors}))
    (path / "visits.jsonl").write_text("\n".join(lines) + "\n")
    return path


def without_templates(visit: dict[str, Any]) -> dict[str, Any]:
    return visit | {"detectors": [one | {"template": None} for one in visit["detectors"]]}


# --- which exposures -------------------------------------------------------------------------------------------------


def test_every_exposure_comes_in_every_kind_and_whole_nights_in_one_part(two_nights: Path) -> None:
    nights = training_nights([two_nights])
    assert nights.problems == ()
    assert {one.kind for one in nights.exposures} == set(KINDS)
    parts = {day: {one.part for one in nights.exposures if one.visit.day_obs == day} for day in (20261122, 20261123)}
    assert parts == {20261122: {"train"}, 20261123: {"test"}}
    assert len({one.name for one in nights.exposures}) == len(nights.exposures)
    as_is = {(one.visit.visit, one.detector): one for one in nights.exposures if one.kind == "as_is"}
    assert len(as_is) == 2 * 4 * 2
    for one in nights.exposures:
        straight = as_is[one.visit.visit, one.detector]
        if one.kind == "swapped":
            assert (one.science, one.template) == (straight.template, straight.science)
        if one.kind == "same_night":
            other = next(two for two in as_is.values() if two.science == one.template)
            assert one.science == straight.science != other.science
            assert (other.visit.day_obs, other.visit.band) == (one.visit.day_obs, one.visit.band)
            assert other.detector == one.detector


@pytest.mark.parametrize("number", [0, 1])
def test_a_night_in_which_nothing_could_repeat_is_refused(
    tmp_path: Path, two_nights: Path, visits: list[dict[str, Any]], number: int
) -> None:
    bands = [visits[0], next(one for one in visits if one["band"] != visits[0]["band"])]
    night = folder_of(tmp_path / "short", bands[: number + 1], two_nights)
    with pytest.raises(TrainingNightError, match=f"short: of .* no field is in {LEAST_VISITS} visits"):
        training_nights([night])


def test_nights_that_cannot_be_used_say_why(tmp_path: Path, two_nights: Path, visits: list[dict[str, Any]]) -> None:
    with pytest.raises(TrainingNightError, match=r"no visits.jsonl"):
        training_nights([tmp_path])
    bare = folder_of(tmp_path / "bare", [without_templates(one) for one in visits], two_nights)
    with pytest.raises(TrainingNightError, match="of 16 detectors none has a template"):
        training_nights([bare])
    (tmp_path / "other").mkdir()
    twin = folder_of(tmp_path / "other" / two_nights.name, visits, two_nights)
    with pytest.raises(TrainingNightError, match="names of their own"):
        training_nights([two_nights, twin])
    assert training_nights([two_nights, two_nights]) == training_nights([two_nights])


def test_a_broken_image_is_listed_and_the_rest_is_taken(
    tmp_path: Path, two_nights: Path, visits: list[dict[str, Any]]
) -> None:
    (tmp_path / "broken.fits").write_bytes(b"SIMPLE  =")
    first = visits[0]["detectors"][0] | {"science": str(tmp_path / "broken.fits")}
    changed = visits[0] | {"detectors": [first, *visits[0]["detectors"][1:]]}
    nights = training_nights([folder_of(tmp_path / "night", [changed, *visits[1:]], two_nights)])
    assert [(one.visit, one.detector, one.error) for one in nights.problems] == [
        (visits[0]["visit"], first["detector"], "ExposureError")
    ]
    assert sum(one.kind == "as_is" for one in nights.exposures) == 15


def test_the_command_refuses_a_bad_night_before_it_works(tmp_path: Path) -> None:
    pytest.importorskip("lightgbm", exc_type=ImportError)
    (tmp_path / "night").mkdir()
    arguments = ["train-reliability", "--out", str(tmp_path / "out"), "--night", str(tmp_path / "night")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "no visits.jsonl" in result.stderr
    assert not (tmp_path / "out").exists()


# --- what is injected ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(two_nights: Path) -> tuple[TrainingExposure, Exposure, Exposure]:
    wanted = training_nights([two_nights]).exposures[0]
    return wanted, read_exposure(wanted.science), read_exposure(wanted.template)


def test_what_appears_is_in_the_first_image_and_what_vanishes_in_the_second(
    pair: tuple[TrainingExposure, Exposure, Exposure],
) -> None:
    _, first, second = pair
    before = first.image.copy(), second.image.copy()
    injected = inject(first, second, 3)
    np.testing.assert_array_equal(first.image, before[0])
    np.testing.assert_array_equal(second.image, before[1])
    assert {"transient", "variable", "trail", "vanished"} <= set(injected.truth["kind"])
    off = np.hypot(*(injected.truth[axis][:, np.newaxis] - injected.truth[axis] for axis in "xy"))
    assert off[~np.eye(len(off), dtype=bool)].min() >= 4.0 * injected.fwhm_pix
    for source in injected.truth:
        x, y = source["x"], source["y"]
        image, was = injected.first, first
        if source["flux"] < 0.0:
            image, was = injected.second, second
            x, y = (float(value) for value in second.wcs.all_world2pix(*first.wcs.all_pix2world(x, y, 0), 0))
        if source["kind"] == "trail" or not 12.0 < source["snr"] < 1000.0:
            continue
        # Within 1.5 FWHM lie more than 80 % of a Moffat's light; other injected sources are 4 FWHM away.
        reach = round(1.5 * injected.fwhm_pix)
        near = np.s_[round(y) - reach : round(y) + reach + 1, round(x) - reach : round(x) + reach + 1]
        added = float((image.image[near] - was.image[near]).sum(dtype=np.float64))
        noise = np.sqrt(max(float((image.variance[near] - was.variance[near]).sum(dtype=np.float64)), 0.0))
        assert 0.75 * abs(source["flux"]) - 5.0 * noise < added < 1.05 * abs(source["flux"]) + 5.0 * noise
    assert injected.first.mask is first.mask
    assert inject(first, second, 3).first.image.tobytes() == injected.first.image.tobytes()
    assert inject(first, second, 4).first.image.tobytes() != injected.first.image.tobytes()


def test_nothing_is_injected_where_pixels_are_bad(pair: tuple[TrainingExposure, Exposure, Exposure]) -> None:
    _, first, second = pair
    mask = first.mask.copy()
    mask[: mask.shape[0] // 2] |= np.int32(mask_bits("BAD"))
    injected = inject(replace(first, mask=mask), second, 3)
    assert len(injected.truth) > 0
    assert injected.truth["y"].min() > mask.shape[0] // 2


def test_injected_sources_are_found_and_the_same_exposure_gives_the_same_bytes(
    pair: tuple[TrainingExposure, Exposure, Exposure],
) -> None:
    wanted, _, _ = pair
    labelled = label_exposure(wanted)
    rows = labelled.rows
    assert labelled.features.shape[0] == rows.size
    found = rows["class_index"] == 0
    assert found.any() and np.isfinite(rows["ra"][found]).all() and (rows["near_deg"][found] > 0.0).all()
    assert np.isnan(rows["ra"][~found]).all()
    classes = {CLASSES[index] for index in rows["class_index"][~found]}
    assert {"transient", "variable", "negative"} <= classes
    again = label_exposure(replace(wanted, digest=wanted.digest ^ 1))  # the same files, elsewhere
    assert again.rows.tobytes() == rows.tobytes() and again.features.tobytes() == labelled.features.tobytes()


# --- what repeats ----------------------------------------------------------------------------------------------------


def exposure_of(visit: Visit, number: int, kind: str = "as_is", night: str = "n") -> TrainingExposure:
    return TrainingExposure(night, replace(visit, visit=number), 0, "a", "b", kind, "train", 0)


def rows_at(*ra: float, injected: bool = False) -> np.ndarray:
    rows = np.zeros(len(ra), dtype=LABELLED_DTYPE)
    rows["ra"], rows["near_deg"] = ra, 1.0 / 3600.0
    if injected:
        rows["ra"], rows["class_index"] = np.nan, CLASSES.index("transient")
    return rows


def test_what_two_visits_show_at_one_place_is_ambiguous(
    pair: tuple[TrainingExposure, Exposure, Exposure],
) -> None:
    visit = pair[0].visit
    arcsec = 1.0 / 3600.0
    found = [
        (exposure_of(visit, 1), rows_at(10.0, 11.0)),
        (exposure_of(visit, 2), rows_at(10.0 + 0.9 * arcsec, 12.0)),
        (exposure_of(visit, 3), rows_at(11.0 + 1.1 * arcsec, 0.0)),
        (exposure_of(visit, 1, "swapped"), rows_at(11.0, 12.0)),  # 11 was seen in its own visit only
        (exposure_of(visit, 1, "same_night"), rows_at(10.0, 12.0)),
        (exposure_of(visit, 4), rows_at(10.0, injected=True)),
        (exposure_of(visit, 5, night="other"), rows_at(10.0)),
    ]
    classes = [rows["class_index"].tolist() for _, rows in without_repeated(found)]
    transient = CLASSES.index("transient")
    assert classes == [[AMBIGUOUS, 0], [AMBIGUOUS, 0], [0, 0], [0, AMBIGUOUS], [AMBIGUOUS] * 2, [transient], [0]]
    assert found[0][1]["class_index"].tolist() == [0, 0]

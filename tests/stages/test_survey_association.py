"""What surveys have tied together themselves, through our stage: LSST's own packets, ELAsTiCC and ZTF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from survey_sources import (
    BEYOND,
    DATA,
    FOLLOWS,
    NEIGHBOURS,
    TWINS,
    UNFIT,
    Comparison,
    Survey,
    compare,
    elasticc,
    lsst,
    ztf,
)

from transforms.association import AssociationConfig
from transforms.sky_cells import _qualifies

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}")

# set: its detections, and those of them whose true object no other detection of a visit and no other object doubts
LSST_SETS = {
    "hsc": (133, 114),
    "lsstcam_20250905": (63, 63),
    "lsstcam_20251231": (26, 26),
    "lsstcam_20260222": (29, 29),
    "lsstcam_20260305": (1739, 1419),
    "sim_or4": (1793, 1793),
    "sim_or5": (127, 127),
}
MIN_RIGHT, MIN_RIGHT_ZTF = 0.995, 0.998


def assert_well_explained(found: Comparison) -> None:
    """Every wrong detection has a reason, and one that fits it."""
    ids = found.sources["diaSourceId"].tolist()
    assert sorted(found.reasons) == sorted(
        one for one, right in zip(ids, found.right.tolist(), strict=True) if not right
    )
    reason = np.array([found.reasons.get(one, "") for one in ids])
    assert not np.isin(reason[found.clear], [TWINS, NEIGHBOURS]).any()
    assert not np.isin(reason[~found.clear], [BEYOND, FOLLOWS]).any()
    np.testing.assert_array_equal(reason == UNFIT, found.sources["diaObjectId"] == 0)


def assert_one_source_per_object_and_visit(found: Comparison) -> None:
    with_object = found.sources[found.sources["diaObjectId"] != 0]
    counts = Counter(zip(with_object["diaObjectId"].tolist(), with_object["visit"].tolist(), strict=True))
    assert max(counts.values()) == 1


@pytest.mark.parametrize("name", LSST_SETS)
def test_detections_of_lsst_s_packets_lie_in_the_objects_lsst_gave_them(name: str, tmp_path: Path) -> None:
    found = compare(lsst(name, tmp_path, judged=False))
    assert (len(found.sources), int(found.clear.sum())) == LSST_SETS[name]
    assert found.right[found.clear].mean() >= MIN_RIGHT
    assert_well_explained(found)
    assert_one_source_per_object_and_visit(found)


@pytest.mark.parametrize("name", LSST_SETS)
def test_by_the_newest_rules_only_sources_unfit_to_found_an_object_go_without(name: str, tmp_path: Path) -> None:
    found = compare(lsst(name, tmp_path, judged=True))
    unfit = found.sources[found.sources["diaObjectId"] == 0]
    assert not _qualifies(unfit, AssociationConfig().new_object_min_reliability).any()
    tied = found.clear & (found.sources["diaObjectId"] != 0)
    assert found.right[tied].mean() >= MIN_RIGHT
    assert_well_explained(found)


def test_ids_that_the_survey_used_twice_and_asteroids_are_no_truth(tmp_path: Path) -> None:
    assert lsst("hsc", tmp_path, judged=False).left_out == {"asteroid": 0, "id used twice": 2}
    assert lsst("lsstcam_20260305", tmp_path, judged=False).left_out == {"asteroid": 2, "id used twice": 0}


def test_a_wrong_gate_is_told_by_the_truth(tmp_path: Path) -> None:
    survey = lsst("lsstcam_20260305", tmp_path, judged=False)
    narrow = compare(Survey(survey.table, survey.truth, 0.1, {}))
    assert narrow.right[narrow.clear].mean() < 0.9


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("survey", "n_detections", "min_right"),
    [
        (elasticc, 7260, MIN_RIGHT),
        (lambda folder: elasticc(folder, scatter_seed=1), 7260, MIN_RIGHT),
        (ztf, 9581, MIN_RIGHT_ZTF),
    ],
    ids=["elasticc", "elasticc_scattered", "ztf"],
)
def test_detections_lie_in_the_objects_of_the_survey(
    survey: Callable[[Path], Survey], n_detections: int, min_right: float, tmp_path: Path
) -> None:
    found = compare(survey(tmp_path))
    assert len(found.sources) == n_detections
    assert found.right.mean() >= min_right
    assert_well_explained(found)
    assert_one_source_per_object_and_visit(found)

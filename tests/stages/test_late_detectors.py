"""Detectors that come one to five visits late: what they may change, and what never changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from sky_runs import Outcome, Sky, Step, apart_sky, final_objects, late_by, make_sky, run_by_hand, together
from sky_samples import alerts_of

from schemas.records import DIA_FORCED_SOURCE, DIA_SOURCE, concatenate_records, take_records
from transforms.association import AssociationConfig

CONFIG = AssociationConfig(cell_order=9)
PLACES = [(150.0, 2.0), (0.0, -60.0), (45.0, 41.8103149), (123.0, 89.99)]
# What the founder leaves in its object for good.
FOUNDERS = ("diaObjectId", "raErr", "decErr", "ra_dec_Cov")
FORCED_MEANS = tuple(f"{band}_fpFluxMean{suffix}" for band in "ugrizy" for suffix in ("", "Err"))


def draw_late(rng: np.random.Generator, n_visits: int, n_late: int) -> dict[tuple[int, int], int]:
    chosen = rng.permutation([(visit, detector) for visit in range(n_visits - 1) for detector in (0, 1)])[:n_late]
    return {(int(visit), int(detector)): int(rng.integers(1, 6)) for visit, detector in chosen}


@dataclass
class Remembered:
    """One object by the written rule: its id, and its detections as (midpoint, diaSourceId)."""

    identifier: int = 0
    detections: list[tuple[float, int]] = field(default_factory=list)


def by_the_rule(steps: list[Step], object_of: dict[int, int]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """diaObjectId of each source, and the sources in its alert's history, of objects that are far apart.

    A source joins an object that was detected before the source's own time. Else it must be fit to found one: then it
    joins the object if a later visit has founded it already, or founds it.
    """
    known: dict[int, Remembered] = {}
    identifiers, histories = {}, {}
    for _, element in steps:
        for row in [] if element is None else element.dia_sources:
            source, midpoint = int(row["diaSourceId"]), float(row["midpointMjdTai"])
            one = known.setdefault(object_of[source], Remembered())
            earlier = sorted(detection for detection in one.detections if detection[0] < midpoint)
            identifiers[source] = 0
            if row["ssObjectId"] == 0 and (earlier or row["reliability"] >= 0.1):
                one.identifier = one.identifier or source
                identifiers[source], histories[source] = one.identifier, [identifier for _, identifier in earlier]
                one.detections.append((midpoint, source))
    return identifiers, histories


def sources_of(outcome: Outcome) -> np.ndarray:
    return concatenate_records(
        [rows for one in outcome.batches for rows in (one.dia_sources, one.unassociated)], DIA_SOURCE
    )


def forced_of(outcome: Outcome) -> np.ndarray:
    rows = concatenate_records([one.forced_sources for one in outcome.batches], DIA_FORCED_SOURCE)
    return take_records(rows, np.argsort(rows["diaForcedSourceId"]))


def assigned(outcome: Outcome) -> dict[int, int]:
    rows = sources_of(outcome)
    return dict(zip(rows["diaSourceId"].tolist(), rows["diaObjectId"].tolist(), strict=True))


def without(row: np.void, names: tuple[str, ...]) -> bytes:
    """A record's bytes but for some fields."""
    bare = np.array([row])
    for name in names:
        bare[name] = 0
    return bare.tobytes()


def check_always(sky: Sky, outcome: Outcome) -> None:
    """What holds however late and however crowded: nothing lost or doubled, nothing from the future."""
    given = sorted(int(i) for visit in sky.visits for one in visit for i in one.dia_sources["diaSourceId"])
    rows = sources_of(outcome)
    assert sorted(rows["diaSourceId"].tolist()) == given
    alerts_of(outcome.batches)  # KeyError on an alert that was made twice
    for one in outcome.batches:
        midpoint = one.context["midpoint_mjd_tai"]
        assert (one.prv_dia_sources["midpointMjdTai"] < midpoint).all()
        assert (one.prv_forced_sources["midpointMjdTai"] <= midpoint).all()
        told = one.dia_objects[one.dia_sources["diaObjectId"] != 0]
        assert (told["lastDiaSourceMjdTai"] == midpoint).all()
        assert (told["firstDiaSourceMjdTai"] <= midpoint).all()
    with_object = rows[rows["diaObjectId"] != 0]
    assert len(np.unique(with_object[["diaObjectId", "visit"]])) == len(with_object)
    forced = forced_of(outcome)
    assert len(np.unique(forced["diaForcedSourceId"])) == len(forced)
    # Every id that an alert has told is an object of the table, which counts all its sources.
    objects = final_objects(outcome.batches)
    ids, counts = np.unique(with_object["diaObjectId"], return_counts=True)
    assert objects["diaObjectId"].tolist() == ids.tolist()
    assert objects["nDiaSources"].tolist() == counts.tolist()
    assert set(ids.tolist()) <= set(with_object["diaSourceId"].tolist())


def check_apart(seed: int, folder: Path, *, n_late: int, images: bool = False) -> int:
    """Against the run in order, object by object; how many objects were first detected by a late detector."""
    rng = np.random.default_rng(seed)
    sky, object_of = apart_sky(seed, *PLACES[seed % len(PLACES)], folder, images=images)
    late = draw_late(rng, len(sky.visits), n_late)
    steps, store = late_by(sky, late), sky.store if images else None
    in_order, found = run_by_hand(sky.steps(), CONFIG, store), run_by_hand(steps, CONFIG, store)
    check_always(sky, found)
    before, expected_before = assigned(in_order), by_the_rule(sky.steps(), object_of)
    after, expected_after = assigned(found), by_the_rule(steps, object_of)
    assert before == expected_before[0]
    assert after == expected_after[0]
    for one in found.batches:
        for i, row in enumerate(one.dia_sources):
            told = one.prv_dia_sources[one.prv_offsets[i] : one.prv_offsets[i + 1]]
            assert told["diaSourceId"].tolist() == expected_after[1].get(int(row["diaSourceId"]), [])

    late_sources = {int(i) for visit, detector in late for i in sky.visits[visit][detector].dia_sources["diaSourceId"]}
    midpoint_of = {int(row["diaSourceId"]): float(row["midpointMjdTai"]) for row in sources_of(in_order)}
    rows_before, rows_after = (
        {int(row["diaObjectId"]): row for row in final_objects(run.batches)} for run in (in_order, found)
    )
    forced = {name: forced_of(run) for name, run in (("before", in_order), ("after", found))}
    alerts_before, alerts_after = alerts_of(in_order.batches), alerts_of(found.batches)
    skipped = FORCED_MEANS if images else ()
    n_refounded = 0
    for number in set(object_of.values()):
        own = [i for i in object_of if object_of[i] == number]
        own_late = [i for i in own if i in late_sources and before[i] != 0]
        members = [i for i in own if before[i] != 0]
        if not members:
            assert not any(after[i] for i in own)
            continue
        old, new = (next(ids[i] for i in members if ids[i]) for ids in (before, after))
        if min(members, key=midpoint_of.__getitem__) not in late_sources:
            assert [before[i] for i in own] == [after[i] for i in own]
            assert without(rows_before[old], skipped) == without(rows_after[new], skipped)
            assert all(alerts_before[i] == alerts_after[i] for i in own_late[:1] if len(own_late) == 1)
        elif old != new:
            n_refounded += 1
            assert after[old] == new
            if [i for i in own if after[i]] == members:
                assert without(rows_before[old], FOUNDERS + skipped) == without(rows_after[new], FOUNDERS + skipped)
        if not own_late:
            assert forced["before"][forced["before"]["diaObjectId"] == old].tobytes() == (
                forced["after"][forced["after"]["diaObjectId"] == old].tobytes()
            )
    if images:
        assert len(forced["after"]) > 0
    return n_refounded


def check_crowded(seed: int, folder: Path, *, images: bool = False) -> tuple[int, int]:
    """Two orders of cells agree; how many sources are not with their object of the run in order, and of how many.

    Of objects that a late detector detected first, and sources that founded none in order, nothing is said.
    """
    rng = np.random.default_rng(seed)
    width = float(rng.choice([10.0, 30.0, 124.0]))
    sky = make_sky(seed, *PLACES[seed % 4], folder, n_objects=40, n_visits=7, width_pix=width, images=images)
    late = draw_late(rng, 7, int(rng.integers(1, 5)))
    steps = late_by(sky, late)
    store = sky.store if images else None
    orders = rng.permutation(np.arange(8, 14))[:2].tolist()
    first, second = (run_by_hand(steps, AssociationConfig(cell_order=order), store) for order in orders)
    check_always(sky, first)
    assert together(first) == together(second), orders
    before, after = assigned(run_by_hand(sky.steps(), CONFIG, store)), assigned(first)
    founders = {int(i) for visit, detector in late for i in sky.visits[visit][detector].dia_sources["diaSourceId"]}
    told = [i for i in before if before[i] != 0 and before[i] not in founders]
    return sum(before[i] != after[i] for i in told), len(told)


@pytest.mark.parametrize("n_late", [1, 4])
def test_late_detectors_change_only_objects_that_they_detected_first(n_late: int, tmp_path: Path) -> None:
    assert sum(check_apart(seed, tmp_path, n_late=n_late) for seed in range(12)) > 5


def test_late_detectors_change_no_forced_flux_of_objects_they_did_not_detect(tmp_path: Path) -> None:
    for seed in range(3):
        check_apart(seed, tmp_path, n_late=1 + seed, images=True)


def test_late_detectors_in_crowded_fields_lose_and_double_nothing_in_any_cells(tmp_path: Path) -> None:
    changed, total = np.sum([check_crowded(seed, tmp_path) for seed in range(8)], axis=0)
    assert 0 < changed < 0.3 * total


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2000, 2300))
def test_late_detectors_change_only_objects_that_they_detected_first_in_many_skies(seed: int, tmp_path: Path) -> None:
    check_apart(seed, tmp_path, n_late=1 + seed % 5, images=seed % 10 == 0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3000, 3200))
def test_late_detectors_in_many_crowded_fields_lose_and_double_nothing(seed: int, tmp_path: Path) -> None:
    check_crowded(seed, tmp_path, images=seed % 10 == 0)

"""What a sky cell remembers: bytes of every version, compaction, pruning, and visits that come too late."""

from __future__ import annotations

from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from sky_runs import CellByHand, Sky, Step, make_sky, run_by_hand, together, write_archive

from schemas.elements import EarlierNights, VisitPart
from schemas.framing import pack, unpack
from schemas.records import DIA_FORCED_SOURCE, DIA_OBJECT, DIA_SOURCE, empty_records, records_to_bytes
from transforms import association, cell_state
from transforms.association import AssociationConfig
from transforms.cell_state import (
    SEEN,
    CellIndex,
    CellStateError,
    DamagedStateError,
    history_block,
    index_bytes,
    read_history,
    read_index,
    seen_of,
)

CONFIG = AssociationConfig(cell_order=11)


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Sky:
    return make_sky(3, 150.0, 2.0, tmp_path_factory.mktemp("sky"), n_objects=20, n_visits=9, images=False)


def seen(*rows: tuple[int, int, float]) -> np.ndarray:
    return np.array(list(rows), SEEN)


def test_index_comes_back_from_its_bytes() -> None:
    objects = empty_records(DIA_OBJECT, 2)
    objects["diaObjectId"] = [5, 2**62 + 1]
    back = read_index(index_bytes(CellIndex(seen((7, 1, 61000.5), (2**60, 0, 61001.0)), objects)))
    assert back.has_seen(7, 1) and back.has_seen(2**60, 0) and not back.has_seen(7, 0)
    assert back.newest_mjd_tai == 61001.0
    assert back.objects.tobytes() == objects.tobytes()


def test_equal_indices_have_equal_bytes() -> None:
    rows = [(7, 1, 61000.5), (7, 0, 61000.5), (3, 2, 61002.0)]
    objects = empty_records(DIA_OBJECT, 0)
    one = CellIndex(seen(), objects).with_seen(seen(*rows)).with_seen(seen(rows[1]))
    other = CellIndex(seen(*rows[::-1]), objects)
    assert index_bytes(one) == index_bytes(other)


def test_state_of_the_first_version_is_read() -> None:
    objects = empty_records(DIA_OBJECT, 1)
    objects["diaObjectId"], objects["lastDiaSourceMjdTai"] = 9, 61010.0
    pairs = np.array([[7, 1], [8, 0]], dtype="<i8")
    first = read_index(pack({"version": 1}, (pairs.tobytes(), records_to_bytes(objects))))
    assert first.has_seen(7, 1) and first.has_seen(8, 0) and not first.has_seen(7, 0)
    assert first.objects["diaObjectId"].tolist() == [9]
    # Their times are unknown: they are kept as long as what is newest.
    assert len(first.reaching(1.0).seen) == 2


def test_state_of_a_later_version_is_refused() -> None:
    header, buffers = unpack(index_bytes(read_index(None)))
    later = pack({**header, "version": cell_state.STATE_VERSION + 1}, tuple(bytes(part) for part in buffers))
    with pytest.raises(CellStateError, match="version"):
        read_index(later)


@pytest.mark.parametrize("damage", ["cut", "grown", "header", "no text", "other", "empty frame"])
@pytest.mark.parametrize("blob", ["index", "history"])
def test_damaged_state_is_a_typed_error(blob: str, damage: str) -> None:
    objects = empty_records(DIA_OBJECT, 2)
    nothing = (empty_records(DIA_SOURCE, 1), empty_records(DIA_FORCED_SOURCE, 1))
    whole = index_bytes(CellIndex(seen((7, 1, 61000.5)), objects)) if blob == "index" else history_block(*nothing)
    damaged = {
        "cut": whole[:-1],
        "grown": whole + b"1",
        "header": whole[:4] + bytes([whole[4] ^ 1]) + whole[5:],
        "no text": b"\xff" * 100,
        "other": pack({"version": 2}, (b"12345", b"12345")),
        "empty frame": pack({}),
    }[damage]
    with pytest.raises(DamagedStateError, match="state is damaged"):
        read_index(damaged) if blob == "index" else read_history([damaged])


def test_cell_of_damaged_state_fails_visit_by_visit_and_the_others_go_on(sky: Sky) -> None:
    """One cell's index is cut short between visits: what comes to it is failures, its state stays as it is."""
    cell = CellByHand(AssociationConfig(cell_order=8))
    for detectors in sky.visits[:3]:
        assert list(cell.visit(detectors[0]))
    cell.index.item = damaged = (cell.index.item or b"")[:-1]
    blocks = list(cell.history.items)
    for detectors in sky.visits[3:5]:
        told = list(cell.outputs(detectors[0]))
        failures = [one.value.value for one in told if isinstance(one, beam.pvalue.TaggedOutput)]
        number = detectors[0].exposure.visit.visit
        assert [(one.visit, one.error) for one in failures] == [(number, "DamagedStateError")]
        assert len([one for one in told if isinstance(one.value, VisitPart)]) == 1 and len(told) == 2
    assert cell.index.item == damaged and cell.history.items == blocks and not cell.pending.items


def test_history_that_comes_twice_is_known_once(sky: Sky, tmp_path: Path) -> None:
    first = run_by_hand(Sky(sky.visits[:4], sky.store).steps(), CONFIG, None)
    write_archive(first.batches, tmp_path)
    history, rest = EarlierNights((str(tmp_path),)), Sky(sky.visits[4:], sky.store).steps()
    expected = run_by_hand([(0.0, history), *rest], CONFIG, None)
    twice = run_by_hand([(0.0, history), (0.0, history), *rest[:3], (0.0, history), *rest[3:]], CONFIG, None)
    assert together(twice) == together(expected)


def test_seen_detectors_of_sources_are_counted_once(sky: Sky) -> None:
    rows = sky.visits[0][0].dia_sources
    assert len(rows) > 1
    assert seen_of(rows)[["visit", "detector"]].tolist() == [(int(rows["visit"][0]), 0)]


@pytest.mark.parametrize("compacted_from", [1, 2, 5])
def test_compaction_changes_nothing(sky: Sky, compacted_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = together(run_by_hand(sky.steps(), CONFIG, None))
    monkeypatch.setattr(association, "COMPACTED_FROM", compacted_from)
    assert together(run_by_hand(sky.steps(), CONFIG, None)) == expected


def test_compacted_history_holds_what_is_in_reach_only(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visits 0.9 days apart and a history of a day: with the month for what is late, all 9 visits are in reach."""
    monkeypatch.setattr(association, "COMPACTED_FROM", 1)
    monkeypatch.setattr(association, "LATEST_DAYS", 1.0)
    kept: list[np.ndarray] = []
    block = association.history_block

    def watched(sources: np.ndarray, forced: np.ndarray) -> bytes:
        kept.append(sources)
        return block(sources, forced)

    monkeypatch.setattr(association, "history_block", watched)
    short = AssociationConfig(cell_order=11, history_months=12.0 / 365.25)
    run_by_hand(sky.steps(), short, None)
    spans = [np.ptp(rows["midpointMjdTai"]) for rows in kept if len(rows)]
    assert max(spans) == pytest.approx(1.8)  # three visits, not nine


def late(sky: Sky, visit: int) -> list[Step]:
    """The first detector of a visit comes when all others are through."""
    one = sky.visits[visit][0]
    return [*(step for step in sky.steps() if step[1] is not one), (one.exposure.visit.event_time_s, one)]


def test_visit_beyond_what_is_remembered_is_a_failure_and_disturbs_nobody(
    sky: Sky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(association, "LATEST_DAYS", 1.0)
    short = AssociationConfig(cell_order=11, history_months=12.0 / 365.25)
    in_time = run_by_hand([step for step in sky.steps() if step[1] is not sky.visits[0][0]], short, None)
    found = run_by_hand(late(sky, 0), short, None)
    assert together(found) == together(in_time)
    number = sky.visits[0][0].exposure.visit.visit
    assert found.failed and {(one.visit, one.detector, one.error) for one in found.failed} == {
        (number, 0, "LateVisitError")
    }
    assert "remembers 2 days" in found.failed[0].reason
    told = [one for one in found.good if isinstance(one, VisitPart)]
    assert [one.visit for one in told] == [number] * len(found.failed)


def test_visit_late_but_in_reach_gets_its_alerts(sky: Sky) -> None:
    found = run_by_hand(late(sky, 0), CONFIG, None)
    assert found.failed == []
    on_time = run_by_hand(sky.steps(), CONFIG, None)
    assert together(found)[0].keys() == together(on_time)[0].keys()


def test_memory_of_a_cell_levels_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two detectors a visit, ten times as many visits as are in reach: the index stops growing."""
    monkeypatch.setattr(association, "LATEST_DAYS", 1.0)
    sizes: list[int] = []
    to_bytes = association.index_bytes

    def watched(index: CellIndex) -> bytes:
        sizes.append(len(index.seen))
        return to_bytes(index)

    monkeypatch.setattr(association, "index_bytes", watched)
    sky = make_sky(4, 150.0, 2.0, tmp_path, n_objects=3, n_visits=40, images=False)
    run_by_hand(sky.steps(), AssociationConfig(cell_order=11, history_months=36.0 / 365.25), None)
    assert max(sizes) == 2 * 5  # visits within 4 days of the newest, 0.9 apart

"""What one visit does to one sky cell: pure, without Beam."""

from __future__ import annotations

import hpgeom
import numpy as np
import pytest
from sky_samples import (
    ARCSEC,
    CELL,
    DEC,
    ORDER,
    RA,
    START,
    Cell,
    context,
    everywhere,
    no_images,
    only,
    sources,
)

from schemas.identifiers import dia_forced_source_id
from schemas.records import DIA_OBJECT, DIA_SOURCE, SS_SOURCE, concatenate_records, empty_records
from transforms.sky_cells import BAND_COLUMNS, ForcedFluxes, across_bands, cells_of, cells_overlapping, cells_with_halo

YEAR = 365.25


def history(outcome: object, row: int) -> np.ndarray:
    batch = outcome.batch  # type: ignore[attr-defined]
    return batch.prv_dia_sources[batch.prv_offsets[row] : batch.prv_offsets[row + 1]]


def forced_history(outcome: object, row: int) -> np.ndarray:
    batch = outcome.batch  # type: ignore[attr-defined]
    return batch.prv_forced_sources[batch.forced_offsets[row] : batch.forced_offsets[row + 1]]


def test_new_source_founds_an_object_of_its_own_id() -> None:
    told = context(1)
    outcome = Cell().see(told, sources(told, [0.0, 30.0]))
    ids = outcome.batch.dia_sources["diaSourceId"].tolist()
    assert outcome.batch.dia_sources["diaObjectId"].tolist() == ids
    assert outcome.objects["diaObjectId"].tolist() == ids
    assert outcome.batch.dia_objects["diaObjectId"].tolist() == ids
    assert outcome.batch.dia_objects["nDiaSources"].tolist() == [1, 1]
    assert outcome.batch.dia_objects["firstDiaSourceMjdTai"].tolist() == [told["midpoint_mjd_tai"]] * 2
    assert outcome.batch.dia_objects["validityStartMjdTai"].tolist() == [told["readout_end_mjd_tai"]] * 2
    assert outcome.batch.counts["objects_new"] == 2
    assert len(history(outcome, 0)) == 0


def test_source_near_an_object_joins_it_and_gets_its_history() -> None:
    cell = Cell()
    first = cell.see(context(1), sources(context(1), [0.0]))
    outcome = cell.see(context(2), sources(context(2), [0.4], psfFlux=1600.0))
    assert outcome.batch.dia_sources["diaObjectId"].tolist() == first.batch.dia_sources["diaSourceId"].tolist()
    assert history(outcome, 0)["diaSourceId"].tolist() == first.batch.dia_sources["diaSourceId"].tolist()
    told = outcome.batch.dia_objects[0]
    assert told["nDiaSources"] == 2
    assert told["r_psfFluxMean"] == 1300.0  # equal errors
    assert told["r_psfFluxNdata"] == 2
    assert told["g_psfFluxNdata"] == 0
    assert np.isnan(told["g_psfFluxMean"])
    assert told["r_psfFluxMaxSlope"] == pytest.approx(600.0 * 24.0, rel=1e-6)  # one hour apart, float32
    assert told["ra"] == pytest.approx(RA + 0.2 * ARCSEC / np.cos(np.radians(DEC)), abs=1e-11)
    assert told["firstDiaSourceMjdTai"] == context(1)["midpoint_mjd_tai"]
    assert told["lastDiaSourceMjdTai"] == context(2)["midpoint_mjd_tai"]
    assert outcome.batch.counts["objects_updated"] == 1
    assert outcome.batch.object_states.tobytes() == outcome.batch.dia_objects.tobytes()


@pytest.mark.parametrize(
    "columns",
    [
        {"reliability": 0.05},
        {"centroid_flag": 1},
        {"glint_trail": 1},
        {"pixelFlags_crCenter": 1},
        {"pixelFlags_nodataCenter": 1},
        {"pixelFlags_interpolatedCenter": 1},
        {"pixelFlags_saturatedCenter": 1},
        {"pixelFlags_suspectCenter": 1},
        {"pixelFlags_streakCenter": 1},
    ],
)
def test_unfit_source_founds_no_object_but_may_join_one(columns: dict[str, float]) -> None:
    cell = Cell()
    unfit = cell.see(context(1), sources(context(1), [0.0], **columns))
    assert len(unfit.batch.dia_sources) == len(unfit.objects) == len(unfit.new_sources) == 0
    assert unfit.batch.unassociated["diaSourceId"].tolist() == [100_001]
    assert unfit.batch.unassociated["diaObjectId"].tolist() == [0]
    assert unfit.batch.counts["sources_without_object"] == 1
    cell.see(context(2), sources(context(2), [0.0]))
    joined = cell.see(context(3), sources(context(3), [0.1], **columns))
    assert joined.batch.dia_sources["diaObjectId"].tolist() == [200_001]


@pytest.mark.parametrize(
    "columns",
    [{"reliability": np.nan}, {"reliability": 0.1}, {"centroid_flag": -1}, {"pixelFlags_crCenter": 0}, {"isDipole": 1}],
)
def test_unknown_reliability_and_flags_qualify(columns: dict[str, float]) -> None:
    outcome = Cell().see(context(1), sources(context(1), [0.0], **columns))
    assert outcome.batch.dia_sources["diaObjectId"].tolist() == [100_001]


@pytest.mark.parametrize("axis", ["ra", "dec"])
def test_source_without_a_position_is_kept_apart_and_disturbs_nobody(axis: str) -> None:
    lost = sources(context(1), [0.0, 20.0])
    lost[axis][1] = np.nan
    nowhere = int(cells_of(lost["ra"][1:], lost["dec"][1:], ORDER)[0])
    outcome = Cell().see(context(1), lost)
    assert outcome.batch.dia_sources["diaSourceId"].tolist() == [100_001]
    elsewhere = Cell(cell=nowhere).see(context(1), lost)
    told = concatenate_records([outcome.batch.unassociated, elsewhere.batch.unassociated], DIA_SOURCE)
    assert 100_002 in told["diaSourceId"]


def test_an_id_founds_one_object_only() -> None:
    """Ids that come again, from another visit and twice in one: their sources may join objects, not be new ones."""
    cell = Cell()
    cell.see(context(1), sources(context(1), [0.0]))
    rows = sources(context(2), [20.0, 40.0, 60.0], diaSourceId=[100_001, 200_002, 200_002])
    outcome = cell.see(context(2), rows)
    assert outcome.objects["diaObjectId"].tolist() == [100_001, 200_002]
    assert outcome.batch.dia_objects["nDiaSources"].tolist() == [1]
    assert outcome.batch.counts["sources_without_object"] == 2


def test_two_sources_of_a_visit_never_share_an_object() -> None:
    cell = Cell()
    cell.see(context(1), sources(context(1), [0.0]))
    outcome = cell.see(context(2), sources(context(2), [0.1, 0.5]))
    assert outcome.batch.dia_sources["diaObjectId"].tolist() == [100_001, 200_002]
    assert outcome.batch.counts["contested_groups"] == 1


def test_two_detectors_of_a_visit_never_share_an_object_even_if_one_comes_later() -> None:
    told = context(2)
    first, second = sources(told, [0.1]), sources(told, [0.2], detector=1)
    together, apart = Cell(), Cell()
    for cell in (together, apart):
        cell.see(context(1), sources(context(1), [0.0]))
    both = together.see(told, concatenate_records([first, second], DIA_SOURCE), detectors=(0, 1))
    assert both.batch.dia_sources["diaObjectId"].tolist() == [100_001, 201_001]
    apart.see(told, first)
    later = apart.see(told, second, detectors=(1,))
    assert later.batch.dia_sources["diaObjectId"].tolist() == [201_001]
    assert len(history(later, 0)) == 0
    assert np.array_equal(later.objects["diaObjectId"], both.objects["diaObjectId"])


def test_order_of_sources_in_the_message_changes_nothing() -> None:
    rows = sources(context(2), [0.3, -0.4, 10.0, 11.2, 40.0], [0.0, 0.1, 0.0, 0.0, 0.0])
    outcomes = []
    for order in (np.arange(5), np.array([3, 1, 4, 0, 2])):
        cell = Cell(everywhere)
        cell.see(context(1), sources(context(1), [0.0, 0.7, 10.5]))
        outcomes.append(cell.see(context(2), rows[order]))
    for name in ("dia_sources", "dia_objects", "prv_dia_sources", "prv_forced_sources", "forced_sources"):
        assert getattr(outcomes[0].batch, name).tobytes() == getattr(outcomes[1].batch, name).tobytes()


def late_and_timely() -> tuple[Cell, Cell, object, object]:
    """Visits 1, 2, 3 in order in one cell; 1, 3 and then 2 in another; visit 2 of each."""
    rows = {k: sources(context(k), [0.1 * k], psfFlux=1000.0 * k) for k in (1, 2, 3)}
    timely, late = Cell(everywhere), Cell(everywhere)
    in_time = [timely.see(context(k), rows[k]) for k in (1, 2, 3)][1]
    afterwards = [late.see(context(k), rows[k]) for k in (1, 3, 2)][2]
    return timely, late, in_time, afterwards


def test_late_visit_gets_the_alert_it_would_have_got_in_time() -> None:
    _, _, in_time, afterwards = late_and_timely()
    for name in ("dia_sources", "prv_dia_sources", "prv_forced_sources", "dia_objects"):
        assert getattr(in_time.batch, name).tobytes() == getattr(afterwards.batch, name).tobytes(), name


def test_objects_after_a_late_visit_know_all_visits() -> None:
    timely, late, _, afterwards = late_and_timely()
    state = afterwards.batch.object_states
    assert state["nDiaSources"].tolist() == [3]
    assert state["lastDiaSourceMjdTai"].tolist() == [context(3)["midpoint_mjd_tai"]]
    assert state["validityStartMjdTai"].tolist() == [context(3)["readout_end_mjd_tai"]]
    assert state.tobytes() == late.known.objects.tobytes()
    # Visit 3 was measured at a position that did not know visit 2: forced fluxes differ, nothing else does.
    expected = timely.known.objects.copy()
    for name in ("r_fpFluxMean", "r_fpFluxMeanErr"):
        expected[name] = state[name]
    assert state.tobytes() == expected.tobytes()


def test_late_visit_before_all_others_leaves_their_alerts_objects_first_time() -> None:
    cell = Cell()
    cell.see(context(3), sources(context(3), [0.0]))
    outcome = cell.see(context(1), sources(context(1), [0.1]))
    told, kept = outcome.batch.dia_objects[0], outcome.batch.object_states[0]
    assert told["diaObjectId"] == 300_001  # an object that is published already keeps its id
    assert (told["nDiaSources"], told["lastDiaSourceMjdTai"]) == (1, context(1)["midpoint_mjd_tai"])
    assert (kept["nDiaSources"], kept["lastDiaSourceMjdTai"]) == (2, context(3)["midpoint_mjd_tai"])
    assert told["firstDiaSourceMjdTai"] == kept["firstDiaSourceMjdTai"] == context(1)["midpoint_mjd_tai"]
    assert told["validityStartMjdTai"] == context(1)["readout_end_mjd_tai"]
    assert len(history(outcome, 0)) == 0


def test_late_visit_finds_objects_where_they_were() -> None:
    """Visit 3 moves the object from 0 to 0.4 arcsec: what visit 2 saw at -0.7 is within the gate of 0 only."""
    cell = Cell(everywhere)
    for number, place in ((1, 0.0), (3, 0.8)):
        cell.see(context(number), sources(context(number), [place]))
    outcome = cell.see(context(2), sources(context(2), [-0.7]))
    assert outcome.batch.dia_sources["diaObjectId"].tolist() == [100_001]
    assert outcome.batch.object_states["nDiaSources"].tolist() == [3]


def test_late_visit_measures_forced_fluxes_where_objects_were() -> None:
    """Of an object that it did not detect; the flux of these tests is the place in arcsec."""
    cell = Cell(everywhere)
    for number, place in ((1, 0.0), (2, 0.2), (4, 0.7)):
        cell.see(context(number), sources(context(number), [place]))
    before = cell.known.objects.tobytes()
    outcome = cell.see(context(3), sources(context(3), []))
    assert outcome.new_forced["psfFlux"] == pytest.approx(0.1, abs=1e-6)  # degrees in double precision: 1e-10 arcsec
    assert cell.known.objects.tobytes() == before


@pytest.mark.parametrize(("reliability", "expected"), [(0.9, 300_001), (0.05, 0)])
def test_late_source_joins_an_object_founded_since_if_it_could_have_founded_it(
    reliability: float, expected: int
) -> None:
    cell = Cell()
    cell.see(context(3), sources(context(3), [0.0]))
    outcome = cell.see(context(1), sources(context(1), [0.1], reliability=reliability))
    told = [*outcome.batch.dia_sources["diaObjectId"], *outcome.batch.unassociated["diaObjectId"]]
    assert told == [expected]
    assert cell.known.objects["diaObjectId"].tolist() == [300_001]


def test_late_visit_elsewhere_in_the_cell_changes_no_state() -> None:
    """A cell that knows later visits of other objects must decide as one that does not."""
    outcomes = []
    for others in ([], [60.0]):
        cell = Cell(everywhere)
        cell.see(context(1, START - 364.0), sources(context(1, START - 364.0), [0.0]))
        cell.see(context(5, START + 20.0), sources(context(5, START + 20.0), others))
        outcomes.append(cell.see(context(2), sources(context(2), [0.0])))
    assert outcomes[0].batch.object_states.tobytes() == outcomes[1].batch.object_states.tobytes()
    assert outcomes[0].batch.object_states.tobytes() == outcomes[0].batch.dia_objects.tobytes()


def test_alert_has_nothing_from_after_its_visit() -> None:
    rng = np.random.default_rng(8)
    cell = Cell(everywhere)
    for number in rng.permutation(12):
        told = context(int(number) + 1)
        outcome = cell.see(told, sources(told, [rng.normal(0.0, 0.2), 30.0 + rng.normal(0.0, 0.2)]))
        batch, midpoint = outcome.batch, told["midpoint_mjd_tai"]
        assert (batch.prv_dia_sources["midpointMjdTai"] < midpoint).all()
        assert (batch.prv_forced_sources["midpointMjdTai"] <= midpoint).all()
        assert (batch.dia_objects["lastDiaSourceMjdTai"] == midpoint).all()
        assert (batch.dia_objects["firstDiaSourceMjdTai"] <= midpoint).all()
        assert (batch.dia_objects["validityStartMjdTai"] == told["readout_end_mjd_tai"]).all()
        assert np.array_equal(batch.dia_objects["nDiaSources"], np.diff(batch.prv_offsets) + 1)
    assert (cell.known.objects["nDiaSources"] == 12).all()
    assert (cell.known.objects["validityStartMjdTai"] == context(12)["readout_end_mjd_tai"]).all()


def test_history_older_than_twelve_months_leaves_alerts_but_the_object_stays_matchable() -> None:
    cell = Cell(everywhere)
    early = [context(k, START + k) for k in (1, 2)]
    for told in early:
        cell.see(told, sources(told, [0.0]))
    inside = context(3, early[0]["midpoint_mjd_tai"] + YEAR - 1e-6)
    outcome = cell.see(inside, sources(inside, [0.1]))
    assert history(outcome, 0)["visit"].tolist() == [told["visit"] for told in early]
    assert outcome.batch.dia_objects["nDiaSources"].tolist() == [3]
    beyond = context(4, inside["midpoint_mjd_tai"] + YEAR)
    outcome = cell.see(beyond, sources(beyond, [0.2]))
    assert outcome.batch.dia_sources["diaObjectId"].tolist() == [100_001]
    assert len(history(outcome, 0)) == 0
    assert outcome.batch.dia_objects["nDiaSources"].tolist() == [1]
    assert outcome.batch.dia_objects["firstDiaSourceMjdTai"].tolist() == [early[0]["midpoint_mjd_tai"]]
    assert len(forced_history(outcome, 0)) == 0  # one source within reach: no forced photometry, none in history


def test_forced_photometry_waits_for_two_good_sources() -> None:
    cell = Cell(everywhere)
    first = cell.see(context(1), sources(context(1), [0.0]))
    second = cell.see(context(2), sources(context(2), [0.4]))
    third = cell.see(context(3), sources(context(3), []))
    assert len(first.new_forced) == 0
    assert len(second.new_forced) == len(third.new_forced) == 1
    # Forced at the mean of both sources, this visit's included.
    assert second.new_forced["psfFlux"][0] == pytest.approx(0.2, abs=1e-6)
    assert second.batch.dia_objects["r_fpFluxMean"][0] == pytest.approx(0.2, abs=1e-6)
    assert forced_history(second, 0)["visit"].tolist() == [context(2)["visit"]]
    fourth = cell.see(context(4), sources(context(4), [0.0]))
    assert forced_history(fourth, 0)["visit"].tolist() == [context(k)["visit"] for k in (2, 3, 4)]


@pytest.mark.parametrize(
    ("columns", "n_forced"),
    [
        ({}, 1),
        ({"reliability": 0.49}, 0),
        ({"reliability": 0.5}, 1),
        ({"reliability": np.nan}, 1),
        ({"trailLength": 1.5}, 0),
        ({"trailLength": np.nan}, 1),
        ({"glint_trail": 1}, 0),
        ({"isDipole": 1}, 0),
        ({"isDipole": -1}, 1),
    ],
)
def test_forced_photometry_trusts_good_sources_only(columns: dict[str, float], n_forced: int) -> None:
    cell = Cell(everywhere)
    cell.see(context(1), sources(context(1), [0.0]))
    outcome = cell.see(context(2), sources(context(2), [0.0], **columns))
    assert len(outcome.batch.dia_sources) == 1
    assert len(outcome.new_forced) == n_forced


def test_forced_rows_are_of_detectors_that_see_the_object_only() -> None:
    def second_only(detector: int, ra: np.ndarray, dec: np.ndarray) -> ForcedFluxes:
        return everywhere(detector, ra, dec) if detector == 1 else no_images(detector, ra, dec)

    cell = Cell(second_only)
    cell.see(context(1), sources(context(1), [0.0]))
    outcome = cell.see(context(2), sources(context(2), [0.0]), detectors=(0, 1, 2))
    row = outcome.new_forced[0]
    assert len(outcome.new_forced) == 1
    assert (row["diaObjectId"], row["visit"], row["detector"]) == (100_001, context(2)["visit"], 1)
    assert row["diaForcedSourceId"] == dia_forced_source_id(100_001, context(2)["visit"], 1)
    assert row["midpointMjdTai"] == context(2)["midpoint_mjd_tai"]
    assert row["timeProcessedMjdTai"] == context(2)["readout_end_mjd_tai"]
    assert (row["band"], row["psfFluxErr"], row["scienceFluxErr"]) == (b"r", 7.0, 8.0)
    assert outcome.batch.forced_sources.tobytes() == outcome.new_forced.tobytes()


def test_forced_flux_that_could_not_be_measured_is_null_and_leaves_the_mean_alone() -> None:
    def unreadable(detector: int, ra: np.ndarray, dec: np.ndarray) -> ForcedFluxes:
        return ForcedFluxes(np.ones(len(ra), dtype=bool), *(np.full(len(ra), np.nan) for _ in range(4)))

    cell = Cell(unreadable)
    cell.see(context(1), sources(context(1), [0.0]))
    outcome = cell.see(context(2), sources(context(2), [0.0]))
    assert np.isnan(outcome.new_forced["psfFlux"]).tolist() == [True]
    assert np.isnan(outcome.batch.dia_objects["r_fpFluxMean"][0])


def test_solar_system_sources_pass_by_the_objects() -> None:
    cell = Cell(everywhere)
    cell.see(context(1), sources(context(1), [0.0]))
    rows = sources(context(2), [0.0, 15.0])
    rows["ssObjectId"][0] = 77
    ss = empty_records(SS_SOURCE, 1)
    ss["diaSourceId"], ss["ssObjectId"] = rows["diaSourceId"][0], 77
    outcome = cell.see(context(2), rows, ss=ss)
    batch = outcome.batch
    assert batch.dia_sources["diaObjectId"].tolist() == [0, 200_002]
    assert batch.dia_sources["ssObjectId"].tolist() == [77, 0]
    assert batch.ss_sources["ssObjectId"][0] == 77
    assert np.diff(batch.prv_offsets).tolist() == np.diff(batch.forced_offsets).tolist() == [0, 0]
    assert len(batch.object_states) == 1
    assert 200_001 not in outcome.new_sources["diaSourceId"]
    assert only(cell.known.objects, diaObjectId=100_001)["nDiaSources"].tolist() == [1]
    assert len(batch.unassociated) == 0


def test_cell_emits_only_what_lies_in_it_but_remembers_its_halo() -> None:
    border = float(hpgeom.boundaries(1 << ORDER, CELL, step=1)[0].max())  # its easternmost corner
    lat = float(
        hpgeom.boundaries(1 << ORDER, CELL, step=1)[1][np.argmax(hpgeom.boundaries(1 << ORDER, CELL, step=1)[0])]
    )
    told = [context(k) for k in (1, 2)]
    visits = []
    for one in told:
        rows = sources(one, [0.0, 0.0])
        rows["ra"], rows["dec"] = [border - 3 * ARCSEC, border + 3 * ARCSEC], lat
        visits.append(rows)
    cells = cells_of(visits[0]["ra"], visits[0]["dec"], ORDER)
    assert cells[0] == CELL != cells[1]
    inner, outer = Cell(everywhere), Cell(everywhere, cell=int(cells[1]))
    for one, rows in zip(told, visits, strict=True):
        here, there = inner.see(one, rows), outer.see(one, rows)
        assert len(here.objects) == len(there.objects) == 2
        assert here.batch.dia_sources["diaSourceId"].tolist() == rows["diaSourceId"][:1].tolist()
        assert there.batch.dia_sources["diaSourceId"].tolist() == rows["diaSourceId"][1:].tolist()
        assert here.batch.object_states["diaObjectId"].tolist() == [100_001]
        assert there.batch.object_states["diaObjectId"].tolist() == [100_002]
    assert here.batch.forced_sources["diaObjectId"].tolist() == [100_001]
    assert there.batch.forced_sources["diaObjectId"].tolist() == [100_002]
    assert len(here.new_forced) == 2


def test_groups_are_counted_by_the_cell_that_owns_them_only() -> None:
    rows = [sources(context(1), [0.0]), sources(context(2), [0.1, 0.4])]
    elsewhere = Cell(cell=CELL + 1)
    for told, part in zip((context(1), context(2)), rows, strict=True):
        outcome = elsewhere.see(told, part)
    assert outcome.batch.counts["contested_groups"] == 0


def test_empty_visit_changes_nothing() -> None:
    cell = Cell()
    cell.see(context(1), sources(context(1), [0.0]))
    before = cell.known.objects.tobytes()
    outcome = cell.see(context(2), sources(context(2), []))
    assert cell.known.objects.tobytes() == before
    assert len(outcome.batch.dia_sources) == len(outcome.new_sources) == len(outcome.batch.object_states) == 0
    assert outcome.batch.prv_offsets.tolist() == outcome.batch.forced_offsets.tolist() == [0]
    assert len(Cell().see(context(1), sources(context(1), [])).objects) == 0


def corners_of_cells(order: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners of random cells, the poles and RA 0 among them."""
    rng = np.random.default_rng(seed)
    ra, dec = rng.uniform(0, 360, 12), np.degrees(np.arcsin(rng.uniform(-1, 1, 12)))
    ra = np.concatenate([ra, [0.0, 0.001, 10.0, 200.0]])
    dec = np.concatenate([dec, [0.0, -60.0, 89.9999, -89.9999]])
    lon, lat = hpgeom.boundaries(1 << order, cells_of(ra, dec, order), step=1)
    return lon.ravel(), lat.ravel()


@pytest.mark.parametrize("order", [8, 11, 13])
def test_halo_reaches_every_cell_within_five_sixths_of_it(order: int) -> None:
    halo = 10.0
    corner_ra, corner_dec = corners_of_cells(order, order)
    rng = np.random.default_rng(1)
    for ra0, dec0 in zip(corner_ra, corner_dec, strict=True):
        angle, reach = rng.uniform(0, 2 * np.pi, 30), halo * np.sqrt(rng.uniform(0, 1, 30)) * ARCSEC
        dec = np.clip(dec0 + reach * np.sin(angle), -90.0, 90.0)
        ra = (ra0 + reach * np.cos(angle) / np.maximum(np.cos(np.radians(dec)), 1e-6)) % 360.0
        needed = cells_with_halo(ra, dec, order, halo)
        # A cell that comes within 5/6 of the halo is met by a disc of half-arcsecond points of that radius.
        for k in range(30):
            disc_angle = rng.uniform(0, 2 * np.pi, 400)
            disc_reach = halo * 5.0 / 6.0 * np.sqrt(rng.uniform(0, 1, 400)) * ARCSEC
            disc_dec = np.clip(dec[k] + disc_reach * np.sin(disc_angle), -90.0, 90.0)
            if abs(disc_dec).max() > 89.99:
                continue  # offsets in RA are no distances there; the test of whole skies covers the poles
            disc_ra = (ra[k] + disc_reach * np.cos(disc_angle) / np.cos(np.radians(disc_dec))) % 360.0
            assert set(cells_of(disc_ra, disc_dec, order)) <= set(needed[k])


@pytest.mark.parametrize("order", [8, 9, 11, 13])
@pytest.mark.parametrize(("ra0", "dec0"), [(150.0, 2.0), (359.999, -60.0), (45.0, 41.81), (10.0, 89.99)])
def test_polygon_covers_every_cell_with_a_point_inside(order: int, ra0: float, dec0: float) -> None:
    rng = np.random.default_rng(2)
    half = 0.02
    x, y = rng.uniform(-half, half, (2, 20_000))
    corners = np.array([[-half, -half], [half, -half], [half, half], [-half, half]]).T

    def on_sky(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From the tangent plane, degrees."""
        ra, dec = np.radians(ra0), np.radians(dec0)
        u, v = np.radians(x), np.radians(y)
        vector = (
            np.array([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])[:, None]
            + u * np.array([-np.sin(ra), np.cos(ra), 0.0])[:, None]
            + v * np.array([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)])[:, None]
        )
        return np.degrees(np.arctan2(vector[1], vector[0])) % 360.0, np.degrees(
            np.arctan2(vector[2], np.hypot(vector[0], vector[1]))
        )

    found = cells_overlapping(*on_sky(*corners), order)
    inside = np.unique(cells_of(*on_sky(x, y), order))
    assert set(inside) <= set(found)
    # Not wasteful: at most the cells of a polygon one cell larger on each side, twice over.
    side_in_cells = 2 * half / (58.6 / (1 << order))
    assert len(found) <= 2 * (side_in_cells + 2.0) ** 2


def test_the_fields_of_a_quantity_are_filled_band_by_band() -> None:
    names = list(DIA_OBJECT.names or ())
    objects = empty_records(DIA_OBJECT, 2)
    for value, name in enumerate(names):
        objects[name] = value
    for column in BAND_COLUMNS.values():
        of_bands = [column.format(band) for band in "ugrizy"]
        in_bands = across_bands(objects, column)
        assert in_bands.tolist() == [[names.index(name) for name in of_bands]] * 2
        in_bands[1] = -1.0
        assert [objects[name].tolist() for name in of_bands] == [[names.index(name), -1.0] for name in of_bands]

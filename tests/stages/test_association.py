"""AssociateDiaSources: order, repeats, lateness, cell order, history and lost images change no alert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from apache_beam.utils.timestamp import Timestamp
from astropy.wcs import WCS, Sip
from sky_runs import (
    Outcome,
    Sky,
    Step,
    detector_wcs,
    elements,
    late_steps,
    make_sky,
    run_by_hand,
    run_on_beam,
    run_on_stream,
    together,
    write_archive,
)
from sky_samples import alerts_of, tables_of

from schemas.claim_check import ImageStore
from schemas.elements import CatalogueSources, EarlierNights, FailureRecord, VisitPart
from schemas.framing import pack, unpack
from schemas.manifests import SURVEY_MJD_RANGE, visit_without_images
from schemas.records import (
    DIA_FORCED_SOURCE,
    DIA_OBJECT,
    DIA_SOURCE,
    SS_SOURCE,
    empty_records,
    records_from_bytes,
    take_records,
)
from transforms import association
from transforms.association import (
    AssociationConfig,
    _ForcedPhotometer,
    _split_due,
    history_messages,
    read_archive,
    sky_messages,
)
from transforms.ingestion import event_timestamp
from transforms.numerics.forced_photometry import linear_psf_fit
from transforms.numerics.psf_grid import PsfGrid
from transforms.sky_cells import cells_with_halo

CONFIG = AssociationConfig(cell_order=11)


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Sky:
    return make_sky(1, 0.0, -60.0, tmp_path_factory.mktemp("sky"))


@pytest.fixture(scope="module")
def sorted_run(sky: Sky) -> Outcome:
    return run_by_hand(sky.steps(), CONFIG, sky.store)


def test_the_sky_of_these_tests_has_what_they_are_about(sorted_run: Outcome) -> None:
    batches = sorted_run.batches
    assert len({one.context["cell"] for one in batches}) > 12
    assert len(alerts_of(batches)) > 100
    assert sum(one.counts["contested_groups"] for one in batches) > 3
    assert max(np.diff(one.prv_offsets).max(initial=0) for one in batches) == 4
    assert sum(len(one.forced_sources) for one in batches) > 50
    assert any(np.isfinite(one.forced_sources["psfFlux"]).any() for one in batches)
    assert any(len(one.unassociated) for one in batches)
    assert any(one.dia_sources["ssObjectId"].any() for one in batches)
    assert sorted_run.failed == []


def test_every_source_is_told_once(sky: Sky, sorted_run: Outcome) -> None:
    given = sorted(int(i) for visit in sky.visits for one in visit for i in one.dia_sources["diaSourceId"])
    told = [rows["diaSourceId"] for one in sorted_run.batches for rows in (one.dia_sources, one.unassociated)]
    assert sorted(np.concatenate(told).tolist()) == given


def test_beam_gives_what_the_visits_in_order_give(sky: Sky, sorted_run: Outcome, tmp_path: Path) -> None:
    found = run_on_beam(sky.steps(), CONFIG, sky.store, tmp_path)
    assert together(found) == together(sorted_run)
    assert found.failed == []


def test_beam_gives_the_same_when_all_comes_shuffled_and_twice(sky: Sky, sorted_run: Outcome, tmp_path: Path) -> None:
    steps = elements(sky)
    order = np.random.default_rng(5).permutation(2 * len(steps))
    twice = [(steps + steps)[i] for i in order]
    found = run_on_beam(twice, CONFIG, sky.store, tmp_path)
    assert together(found) == together(sorted_run)


def test_beam_gives_the_same_with_a_bundle_per_element(sky: Sky, sorted_run: Outcome, tmp_path: Path) -> None:
    steps = elements(sky)
    order = np.random.default_rng(6).permutation(2 * len(steps))
    found = run_on_stream([(steps + steps)[i] for i in order], CONFIG, sky.store, tmp_path)
    assert together(found) == together(sorted_run)


@pytest.mark.parametrize("seed", range(2))
def test_arrival_and_timers_in_any_order_give_the_same(sky: Sky, sorted_run: Outcome, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = elements(sky)
    shuffled = [(steps + steps)[i] for i in rng.permutation(2 * len(steps))]
    assert together(run_by_hand(shuffled, CONFIG, sky.store, rng)) == together(sorted_run)


def test_visits_at_one_moment_are_taken_by_number(sky: Sky) -> None:
    """Equal midpoints: the visit's number decides, in time or out of order."""
    same = []
    for detectors in sky.visits:
        visit = replace(detectors[0].exposure.visit, midpoint_mjd_tai=61367.5, readout_end_mjd_tai=61367.5002)
        for one in detectors:
            rows = take_records(one.dia_sources, slice(None)).copy()
            rows["midpointMjdTai"] = visit.midpoint_mjd_tai
            same.append(
                (visit.event_time_s, replace(one, exposure=replace(one.exposure, visit=visit), dia_sources=rows))
            )
    runs = [run_by_hand([same[i] for i in order], CONFIG, sky.store) for order in (range(10), range(9, -1, -1))]
    assert together(runs[0]) == together(runs[1])
    assert max(np.diff(one.prv_offsets).max(initial=0) for one in runs[0].batches) == 4


def test_a_visit_is_due_when_its_timer_fires_whatever_the_year() -> None:
    """Timers and shuffles keep whole milliseconds, rounded down: what is left must not lie before the visit."""
    low, high = SURVEY_MJD_RANGE
    for midpoint in np.random.default_rng(9).uniform(low, high, 20_000).tolist():
        at = event_timestamp(midpoint)
        assert at.micros % 1000 == 0
        assert 0 <= (midpoint - 40587.0) * 86_400_000.0 - at.micros / 1000 < 1.001  # double precision: 1e-3 ms
    part = pack({"kind": "part", "context": {"visit": 5, "midpoint_mjd_tai": midpoint}})
    assert _split_due([part], at)[0] == [part]
    assert _split_due([part], Timestamp(micros=at.micros - 1000))[2] == [part]


def test_second_delivery_after_the_visit_is_a_no_op(sky: Sky, sorted_run: Outcome, tmp_path: Path) -> None:
    steps = sky.steps()
    repeated = [*steps, *elements(sky), (5e8, None), *elements(sky)[:3]]
    for found in (
        run_by_hand(repeated, CONFIG, sky.store, np.random.default_rng(1)),
        run_on_beam(repeated, CONFIG, sky.store, tmp_path),
    ):
        assert together(found) == together(sorted_run)
        assert len(found.batches) == len(sorted_run.batches)


def test_late_detector_gets_its_alerts_and_changes_no_other(sky: Sky, tmp_path: Path) -> None:
    steps = late_steps(sky, 2, 1)
    before = run_by_hand(steps[:-1], CONFIG, sky.store)
    found = run_on_beam(steps, CONFIG, sky.store, tmp_path)
    assert together(found) == together(run_by_hand(steps, CONFIG, sky.store))
    published, now = alerts_of(before.batches), alerts_of(found.batches)
    late = sky.visits[2][1]
    assert {key: now[key] for key in published} == published
    gained = set(now) - set(published)
    assert gained <= set(late.dia_sources["diaSourceId"].tolist())
    assert len(gained) > 5
    midpoint = late.exposure.visit.midpoint_mjd_tai
    for one in found.batches:
        if one.context["visit"] == late.exposure.visit.visit:
            assert (one.prv_dia_sources["midpointMjdTai"] <= midpoint).all()
            assert (one.dia_objects["lastDiaSourceMjdTai"][one.dia_sources["diaObjectId"] != 0] == midpoint).all()


def test_late_alert_is_the_one_it_would_have_been_where_no_later_source_is_near(sky: Sky) -> None:
    in_time = alerts_of(run_by_hand(sky.steps(), CONFIG, sky.store).batches)
    late = alerts_of(run_by_hand(late_steps(sky, 2, 1), CONFIG, sky.store).batches)
    ids = [int(i) for i in sky.visits[2][1].dia_sources["diaSourceId"] if int(i) in late and int(i) in in_time]
    same = sum(in_time[i] == late[i] for i in ids)
    # Those differ whose object was founded by a later visit, or by the other detector, or whose partner moved on.
    assert same >= 0.6 * len(ids)


def test_groups_are_counted_once_whatever_the_cell_order(sky: Sky, sorted_run: Outcome) -> None:
    def counted(outcome: Outcome, name: str) -> int:
        return sum(one.counts[name] for one in outcome.batches)

    coarse = run_by_hand(sky.steps(), AssociationConfig(cell_order=8), sky.store)
    for name in ("contested_groups", "wide_groups", "objects_new", "objects_updated", "sources_without_object"):
        assert counted(coarse, name) == counted(sorted_run, name), name


@pytest.mark.parametrize("cut", [1, 3])
def test_two_nights_with_history_are_one_long_run(sky: Sky, sorted_run: Outcome, cut: int, tmp_path: Path) -> None:
    parts = [Sky(sky.visits[:cut], sky.store), Sky(sky.visits[cut:], sky.store)]
    first = run_by_hand(parts[0].steps(), AssociationConfig(cell_order=9), sky.store)
    write_archive(first.batches, tmp_path)
    # The history goes to finer cells than those that wrote it.
    second = run_by_hand([(0.0, EarlierNights((str(tmp_path),))), *parts[1].steps()], CONFIG, sky.store)
    long_run = [one for one in sorted_run.batches if one.context["visit"] > sky.visits[cut - 1][0].exposure.visit.visit]
    assert alerts_of(second.batches) == alerts_of(long_run)
    assert tables_of(second.batches) == tables_of(long_run)


def test_history_on_beam_is_known_before_the_first_visit(sky: Sky, sorted_run: Outcome, tmp_path: Path) -> None:
    first = run_by_hand(Sky(sky.visits[:2], sky.store).steps(), CONFIG, sky.store)
    write_archive(first.batches, tmp_path / "out")
    steps: list[Step] = [(0.0, EarlierNights((str(tmp_path / "out"),))), *Sky(sky.visits[2:], sky.store).steps()]
    found = run_on_beam(steps, CONFIG, sky.store, tmp_path)
    expected = alerts_of(sorted_run.batches)
    assert alerts_of(found.batches) == {key: expected[key] for key in alerts_of(found.batches)}
    assert len(found.batches) > 20


def test_history_keeps_the_fullest_of_two_states_of_one_time(sky: Sky, tmp_path: Path) -> None:
    found = run_by_hand(late_steps(sky, 2, 1), CONFIG, sky.store)
    late = [one for one in found.batches if one.context["detectors"] == [1]]
    # The late detector's rows are read first, so that nothing but the count can prefer them.
    write_archive(late, tmp_path / "0")
    write_archive([one for one in found.batches if one.context["detectors"] != [1]], tmp_path / "1")
    known = read_archive(tuple(str(path) for path in sorted(tmp_path.iterdir())))
    counts = {int(row["diaObjectId"]): int(row["nDiaSources"]) for row in known.objects}
    ids, sources = np.unique(known.sources["diaObjectId"], return_counts=True)
    assert counts == dict(zip(ids.tolist(), sources.tolist(), strict=True))


def test_nights_out_of_reach_are_passed_over_but_for_their_objects(
    sky: Sky, sorted_run: Outcome, tmp_path: Path
) -> None:
    """A night of 2025 and one of 2026, 400 days apart: a year and a month reach to one of them only."""
    write_archive(sorted_run.batches[:60], tmp_path / "old")
    write_archive(sorted_run.batches[60:], tmp_path / "new")
    for table in (tmp_path / "old" / "archive").iterdir():
        (table / "day_obs=20261122").rename(table / "day_obs=20251018")
    folders = tuple(str(tmp_path / name) for name in ("old", "new"))
    whole, reaching = read_archive(folders), read_archive(folders, 396.0)
    assert reaching.objects.tobytes() == whole.objects.tobytes()
    newer = read_archive(folders[1:])
    assert 0 < len(newer.sources) < len(whole.sources) and 0 < len(newer.forced) < len(whole.forced)
    assert reaching.sources.tobytes() == newer.sources.tobytes()
    assert reaching.forced.tobytes() == newer.forced.tobytes()
    assert read_archive(folders, 399.0).sources.tobytes() == whole.sources.tobytes()


def test_history_read_and_sent_in_small_portions_is_the_same(
    sorted_run: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, part in enumerate((sorted_run.batches[:30], sorted_run.batches[30:60], sorted_run.batches[60:])):
        write_archive(part, tmp_path / str(number))
    folders = tuple(str(path) for path in sorted(tmp_path.iterdir()))
    expected = list(history_messages(folders, CONFIG))
    monkeypatch.setattr(association, "_ROWS_AT_ONCE", 7)
    assert list(history_messages(folders, CONFIG)) == expected
    assert len(expected) > 5


def test_sources_go_to_every_cell_that_needs_them_and_to_no_other() -> None:
    """A detector's sources all over the sky, one in seven moving: each message holds the rows of its cell, in order."""
    rng, n = np.random.default_rng(2), 400
    rows = empty_records(DIA_SOURCE, n)
    rows["diaSourceId"], rows["ra"] = np.arange(1, n + 1), rng.uniform(0.0, 360.0, n)
    rows["dec"] = np.degrees(np.arcsin(rng.uniform(-1.0, 1.0, n)))
    rows["ssObjectId"][::7] = 5
    visit = visit_without_images(1, 61000.0, "r", [0], source="test")
    sent = dict(sky_messages(CatalogueSources(visit, 0, rows), CONFIG))
    needed = cells_with_halo(rows["ra"], rows["dec"], CONFIG.cell_order, CONFIG.halo_arcsec)
    assert set(sent) == {int(cell) for cell in needed.ravel()} and len(sent) > n
    for cell, message in sent.items():
        own = take_records(rows, (needed == cell).any(axis=1))
        _, buffers = unpack(message)
        assert bytes(buffers[0]) == own.tobytes()
        moving = records_from_bytes(SS_SOURCE, buffers[1])["diaSourceId"]
        assert moving.tolist() == own["diaSourceId"][own["ssObjectId"] != 0].tolist()


def test_history_goes_to_every_cell_that_needs_it_and_to_no_other(sorted_run: Outcome, tmp_path: Path) -> None:
    write_archive(sorted_run.batches, tmp_path)
    known = read_archive((str(tmp_path),))
    sent = dict(history_messages((str(tmp_path),), CONFIG))
    assert len(sent) > 5
    needed = [
        cells_with_halo(rows["ra"], rows["dec"], CONFIG.cell_order, CONFIG.halo_arcsec)
        for rows in (known.objects, known.sources)
    ]
    assert set(sent) == {int(cell) for cells in needed for cell in cells.ravel()}
    for cell, message in sent.items():
        here = [(cells == cell).any(axis=1) for cells in needed]
        sources = take_records(known.sources, here[1])
        ids = np.union1d(known.objects["diaObjectId"][here[0]], sources["diaObjectId"])
        forced = known.forced["diaForcedSourceId"][np.isin(known.forced["diaObjectId"], ids)]
        _, buffers = unpack(message)
        assert records_from_bytes(DIA_OBJECT, buffers[0])["diaObjectId"].tolist() == ids.tolist()
        assert bytes(buffers[1]) == sources.tobytes()
        told = records_from_bytes(DIA_FORCED_SOURCE, buffers[2])
        assert sorted(told["diaForcedSourceId"].tolist()) == sorted(forced.tolist())


def test_missing_history_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no archive"):
        read_archive((str(tmp_path),))


def test_lost_image_is_a_counted_failure_and_the_alerts_still_go(sky: Sky, sorted_run: Outcome, tmp_path: Path) -> None:
    found = run_on_beam(sky.steps(), CONFIG, ImageStore(str(tmp_path / "nothing")), tmp_path)
    assert set(alerts_of(found.batches)) == set(alerts_of(sorted_run.batches))
    assert sum(len(one.forced_sources) for one in found.batches) == 0
    assert found.failed
    for failure in found.failed:
        assert isinstance(failure, FailureRecord)
        assert (failure.stage, failure.error) == ("association", "ClaimCheckError")
        assert failure.lost.startswith("forced photometry of ")
        assert "is missing" in failure.reason
    assert {(one.visit, one.detector) for one in found.failed} <= {
        (visit[0].exposure.visit.visit, detector) for visit in sky.visits for detector in (0, 1)
    }
    assert len([one for one in found.good if isinstance(one, VisitPart)]) == len(found.failed)


def test_broken_image_of_one_detector_leaves_the_others_alone(sky: Sky, sorted_run: Outcome, tmp_path: Path) -> None:
    other = make_sky(1, 0.0, -60.0, tmp_path)
    broken = sky.visits[2][0].exposure.visit.visit
    other.store.path(broken, 0).write_bytes(b"this is no image")
    found = run_by_hand(sky.steps(), CONFIG, other.store)
    assert {(one.visit, one.detector) for one in found.failed} == {(broken, 0)}

    def forced(outcome: Outcome) -> set[bytes]:
        rows = np.concatenate([one.forced_sources for one in outcome.batches])
        untouched = take_records(rows, (rows["visit"] != broken) | (rows["detector"] != 0))
        return {row.tobytes() for row in untouched}

    assert forced(found) == forced(sorted_run)


SHAPE = (220, 300)


def bent_wcs() -> WCS:
    """A detector with a distortion that only iterations invert, 2 pixels at its corners and without end far outside."""
    wcs = detector_wcs(0.0, -60.0, 0)
    forward, none = np.zeros((4, 4)), np.zeros((4, 4))
    forward[2, 0], forward[1, 2], forward[0, 3] = 1e-5, 1e-7, -1e-7
    wcs.sip = Sip(forward, forward.T.copy(), none, none, wcs.wcs.crpix)
    wcs.wcs.ctype = ["RA---TAN-SIP", "DEC--TAN-SIP"]
    return wcs


def stored_image(folder: Path, wcs: WCS) -> tuple[ImageStore, list[np.ndarray], np.ndarray]:
    """Noise as visit 7, detector 3; its planes and the PSF grids of difference and science image."""
    rng = np.random.default_rng(5)
    planes = [plane(rng.random(SHAPE)).astype(np.float32) for plane in (np.negative, np.sqrt, np.square, np.exp)]
    v, u = np.mgrid[-8:9, -8:9]
    sigmas = np.array([[[1.2, 1.5, 1.9], [1.0, 1.3, 1.7]], [[1.1, 1.4, 1.8], [1.6, 2.0, 2.1]]])
    psfs = np.exp(-0.5 * (u**2 + v**2) / sigmas[..., np.newaxis, np.newaxis] ** 2).astype(np.float32)
    store = ImageStore(str(folder))
    store.write(7, 3, planes, wcs.to_header(relax=True).tostring(sep="\n"), *psfs)
    return store, planes, psfs


def measured(store: ImageStore, ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, list[FailureRecord]]:
    """Of each position: whether it is inside, and the four numbers; what failed."""
    photometer = _ForcedPhotometer(store)
    return np.array(list(vars(photometer.measure(7, 3, ra, dec)).values())).T, photometer.take_failures()


def test_forced_fluxes_are_those_of_the_whole_image_with_the_psf_of_each_place(tmp_path: Path) -> None:
    wcs = detector_wcs(0.0, -60.0, 0)
    store, planes, psfs = stored_image(tmp_path, wcs)
    rng = np.random.default_rng(6)
    x, y = rng.uniform(-30.0, 330.0, 80), rng.uniform(-30.0, 250.0, 80)
    ra, dec = wcs.pixel_to_world_values(x, y)
    found, failures = measured(store, ra, dec)
    assert failures == []
    inside = (x >= 0) & (x <= 299) & (y >= 0) & (y <= 219)
    np.testing.assert_array_equal(found[:, 0], inside)
    assert {(int(b + 0.5) // 128, int(a + 0.5) // 128) for a, b in zip(x[inside], y[inside], strict=True)} == {
        (row, column) for row in range(2) for column in range(3)
    }
    x, y = store.open(7, 3).wcs.world_to_pixel_values(ra[inside], dec[inside])
    for image, variance, psf, columns in ((*planes[:2], psfs[0], found[:, 1:3]), (*planes[2:], psfs[1], found[:, 3:])):
        expected = linear_psf_fit(image, variance, PsfGrid(psf), x, y)
        np.testing.assert_array_equal(columns[inside], np.transpose([expected.flux, expected.flux_err]))
        assert np.isnan(columns[~inside]).all()


def test_a_forced_flux_is_the_same_to_the_bit_whatever_else_is_asked_for(tmp_path: Path) -> None:
    """Cells ask for their own objects, so anything else would show the cell order in the alerts."""
    wcs = bent_wcs()
    store, _, _ = stored_image(tmp_path, wcs)
    rng = np.random.default_rng(8)
    ra, dec = wcs.pixel_to_world_values(rng.uniform(-5.0, 305.0, 60), rng.uniform(-5.0, 225.0, 60))
    # The last lie where the iterations diverge.
    ra, dec = np.append(ra, [20.0, 340.0, 0.0]), np.append(dec, [-50.0, -70.0, -80.0])
    together, failures = measured(store, ra, dec)
    assert failures == []
    assert 45 < np.isfinite(together[:, 1]).sum() < 60
    assert not together[-3:, 0].any()
    for chosen in (*np.split(np.arange(63), 63), *(rng.permutation(63)[:20] for _ in range(20))):
        assert measured(store, ra[chosen], dec[chosen])[0].tobytes() == together[chosen].tobytes()


def test_a_window_that_cannot_be_read_costs_the_objects_in_it_and_no_other(tmp_path: Path) -> None:
    wcs = detector_wcs(0.0, -60.0, 0)
    store, _, _ = stored_image(tmp_path, wcs)
    x, y = np.meshgrid(np.arange(20.0, 290.0, 30.0), np.arange(20.0, 210.0, 30.0))
    ra, dec = wcs.pixel_to_world_values(x.ravel(), y.ravel())
    whole, _ = measured(store, ra, dec)
    content = bytearray(store.path(7, 3).read_bytes())
    pixels = store.open(7, 3).pixels
    header = content.index(pixels.schunk.get_chunk(1)[:32])  # of the chunk of rows 0 to 127, columns 128 to 255
    content[header : header + 32] = bytes(32)
    store.path(7, 3).write_bytes(content)
    found, (failure,) = measured(store, ra, dec)
    # Windows reach 8 pixels, as the PSF does.
    lost = (x.ravel() + 8 >= 128) & (x.ravel() - 8 < 256) & (y.ravel() - 8 < 128)
    np.testing.assert_array_equal(np.isnan(found[:, 1:]).all(axis=1), lost)
    assert found[~lost].tobytes() == whole[~lost].tobytes()
    assert found[:, 0].all()
    assert failure.lost == f"forced photometry of {lost.sum()} objects"
    assert (failure.visit, failure.detector) == (7, 3)


def test_parts_of_a_visit_come_out_once_it_is_due(sky: Sky, tmp_path: Path) -> None:
    visit = sky.visits[0][0].exposure.visit
    part = VisitPart(visit.visit, visit.midpoint_mjd_tai, b"something to know")
    found = run_on_beam([(visit.event_time_s, part), *sky.steps()[:3]], CONFIG, sky.store, tmp_path)
    assert [one for one in found.good if isinstance(one, VisitPart)] == [part]
    assert found.batches


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"radius_arcsec": 2.0}, "at least 6 times"),
        ({"cell_order": 13, "halo_arcsec": 20.0}, "exceeds half a cell"),
        ({"cell_order": 3}, "greater than or equal to 4"),
    ],
)
def test_cells_too_small_for_their_halo_are_refused(options: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AssociationConfig(**options)  # type: ignore[arg-type]

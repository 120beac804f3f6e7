"""Association of sources with objects: gate, score, matching, and what an answer may depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from association_fields import around
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.numerics.dia_association import Assignment, Positions, _columns, _pair_scores, associate

ARCSEC = 1.0 / 3600.0
WIDE_OPEN = 1e4  # no group is ever too wide
# Positions in double precision degrees are good to 1e-13 deg, 4e-10 arcsec; a projected offset of up to 5 arcsec
# differs from the arc by 5 (5 arcsec in rad)^2 / 6 < 1e-9 arcsec and, through the convergence of the meridians,
# by 5^2 tan(dec) / 2 in units of 1 / 206265 arcsec: 1.1e-4 at dec 60 for 5 arcsec, 4.2e-6 for 1 arcsec.
OFFSET_TOLERANCE_ARCSEC = 5e-6


def rows(positions: Positions, index: np.ndarray) -> Positions:
    return Positions(positions.ra[index], positions.dec[index], positions.ra_err[index], positions.dec_err[index])


def joined(*parts: Positions) -> Positions:
    return Positions(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("ra", "dec", "ra_err", "dec_err"))
    )


def open_associate(sources: Positions, objects: Positions, **options: Any) -> Assignment:
    return associate(sources, objects, **{"max_group_width_arcsec": WIDE_OPEN, **options})


def score_of(sources: Positions, objects: Positions) -> float:
    """Score of the first source with the first object."""
    pair = np.zeros((1, 2), dtype=np.int64)
    return float(_pair_scores(_columns(sources), _columns(objects), pair, 0.05, 0.2)[0])


def usable(error_deg: float, floor: float, fallback: float) -> float:
    return max(error_deg * 3600.0, floor) if math.isfinite(error_deg) and error_deg > 0 else fallback


def slow_scores(sources: Positions, objects: Positions, radius_arcsec: float) -> dict[tuple[int, int], float]:
    """Score of every pair within the gate, by plain trigonometry."""
    found = {}
    for i in range(len(sources)):
        for k in range(len(objects)):
            d_ra = (sources.ra[i] - objects.ra[k] + 180.0) % 360.0 - 180.0
            cos_dec = math.cos(math.radians(0.5 * (sources.dec[i] + objects.dec[k])))
            x, y = d_ra * cos_dec * 3600.0, (sources.dec[i] - objects.dec[k]) * 3600.0
            if math.hypot(x, y) > radius_arcsec:
                continue
            var_x = usable(sources.ra_err[i], 0.05, 0.2) ** 2 + usable(objects.ra_err[k], 0.05, 0.2) ** 2
            var_y = usable(sources.dec_err[i], 0.05, 0.2) ** 2 + usable(objects.dec_err[k], 0.05, 0.2) ** 2
            found[i, k] = 0.5 * (x * x / var_x + y * y / var_y) + 0.5 * math.log(var_x * var_y)
    return found


def all_matchings(
    scores: dict[tuple[int, int], float], n_sources: int, i: int = 0, taken: frozenset[int] = frozenset()
) -> Iterator[tuple[tuple[int, int], ...]]:
    if i == n_sources:
        yield ()
        return
    yield from all_matchings(scores, n_sources, i + 1, taken)
    for source, k in scores:
        if source == i and k not in taken:
            for rest in all_matchings(scores, n_sources, i + 1, taken | {k}):
                yield ((i, k), *rest)


offsets = st.floats(-1.6, 1.6, allow_nan=False).map(lambda value: round(value, 3))
points = st.lists(st.tuples(offsets, offsets), min_size=0, max_size=5, unique=True)


@st.composite
def small_skies(draw: st.DrawFn) -> tuple[Positions, Positions]:
    ra, dec = draw(st.sampled_from([(150.0, 2.0), (0.0, 0.0), (359.99995, -60.0), (80.0, 75.0)]))
    sides = []
    for _ in range(2):
        drawn = draw(points)
        side = around(ra, dec, [x for x, _ in drawn], [y for _, y in drawn])
        errors = draw(
            st.lists(st.sampled_from([0.01, 0.1, 0.3, math.nan, -1.0]), min_size=len(drawn), max_size=len(drawn))
        )
        sides.append(Positions(side.ra, side.dec, np.array(errors, dtype=float) * ARCSEC, side.dec_err))
    return sides[0], sides[1]


def test_score_is_the_gaussian_negative_log_likelihood_of_both_offsets() -> None:
    sources = around(40.0, -30.0, [0.3], [-0.4], err=0.12, err_dec=0.2)
    objects = around(40.0, -30.0, [0.0], [0.0], err=0.09, err_dec=0.1)
    var_ra, var_dec = 0.12**2 + 0.09**2, 0.2**2 + 0.1**2
    expected = 0.5 * (0.3**2 / var_ra + 0.4**2 / var_dec) + 0.5 * math.log(var_ra * var_dec)
    # d(score) = offset * d(offset) / variance on each axis
    tolerance = OFFSET_TOLERANCE_ARCSEC * (0.3 / var_ra + 0.4 / var_dec)
    assert score_of(sources, objects) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("error_arcsec", "used_arcsec"),
    [(0.3, 0.3), (0.001, 0.05), (math.nan, 0.2), (math.inf, 0.2), (0.0, 0.2), (-1.0, 0.2)],
)
def test_small_errors_get_the_floor_and_missing_ones_the_fallback(error_arcsec: float, used_arcsec: float) -> None:
    sources, objects = around(10.0, 0.0, [0.0], [0.0], err=error_arcsec), around(10.0, 0.0, [0.0], [0.0], err=0.1)
    score = score_of(sources, objects)
    assert score == pytest.approx(math.log(used_arcsec**2 + 0.1**2), rel=1e-12)


def test_errors_in_single_precision_are_taken_as_they_are() -> None:
    sources = around(10.0, 0.0, [0.0], [0.0])
    single = Positions(sources.ra, sources.dec, sources.ra_err.astype("f4"), sources.dec_err.astype("f4"))
    score = score_of(single, sources)
    assert score == pytest.approx(math.log(2 * 0.1**2), abs=4e-7)  # twice 2^-24 from each of two errors, rounded up


@pytest.mark.parametrize("dec", [-60.0, 0.0, 60.0, 85.0])
def test_right_ascension_counts_on_the_sky(dec: float) -> None:
    # East by 0.4 arcsec is 0.8 in the coordinate at dec -60: without cos(dec) the northern object would win.
    objects = around(200.0, dec, [0.4, 0.0], [0.0, 0.6])
    assert open_associate(around(200.0, dec, [0.0], [0.0]), objects).object_index[0] == 0


def test_ra_error_is_an_error_on_the_sky() -> None:
    # Equal distances east and north; a larger error in RA makes the eastern object likelier.
    source = around(200.0, -60.0, [0.0], [0.0], err=0.4, err_dec=0.1)
    found = open_associate(source, around(200.0, -60.0, [0.5, 0.0], [0.0, 0.5], err=0.05))
    assert found.object_index[0] == 0
    var_ra, var_dec = 0.4**2 + 0.05**2, 0.1**2 + 0.05**2
    score = score_of(source, around(200.0, -60.0, [0.5], [0.0], err=0.05))
    expected = 0.5 * 0.5**2 / var_ra + 0.5 * math.log(var_ra * var_dec)
    assert score == pytest.approx(expected, abs=OFFSET_TOLERANCE_ARCSEC * 0.5 / var_ra)


@pytest.mark.parametrize("dec", [90.0, -90.0, 89.99995, -89.99999])
def test_distances_across_a_pole_are_true(dec: float) -> None:
    """Two positions on both sides of a pole: RA differs by half a turn, the sky by little."""
    sources = around(30.0, dec, [0.3, 5.0], [0.0, 5.0])
    objects = around(30.0, dec, [-0.3, 5.0, 0.0], [0.0, 5.2, 0.9])
    assert open_associate(sources, objects).object_index.tolist() == [0, 1]
    score = score_of(sources, objects)
    # Isotropic errors, so only the distance counts: 0.6 arcsec with variance 2 x 0.1^2 on both axes.
    expected = 0.5 * 0.6**2 / 0.02 + math.log(0.02)
    assert score == pytest.approx(expected, abs=0.6 / 0.02 * OFFSET_TOLERANCE_ARCSEC)


@pytest.mark.parametrize("dec", [0.0, -60.0, 80.0])
def test_ra_zero_is_no_border(dec: float) -> None:
    sources, objects = around(0.0, dec, [-0.2, 3.0], [0.0, 0.0]), around(0.0, dec, [0.2, 3.1], [0.0, 0.0])
    assert (sources.ra[0] > 359.0) and (objects.ra[0] < 1.0)
    assert open_associate(sources, objects).object_index.tolist() == [0, 1]


@pytest.mark.parametrize(("ra", "dec"), [(150.0, 2.0), (0.0, -60.0), (77.0, 89.9999)])
@pytest.mark.parametrize(("distance", "expected"), [(0.999, 0), (1.001, -1)])
def test_gate_is_the_distance_on_the_sky(ra: float, dec: float, distance: float, expected: int) -> None:
    for angle in np.linspace(0.0, 2.0 * np.pi, 8, endpoint=False):
        objects = around(ra, dec, [distance * math.cos(angle)], [distance * math.sin(angle)])
        assert open_associate(around(ra, dec, [0.0], [0.0]), objects).object_index[0] == expected


def test_two_pairs_are_found_where_the_nearest_first_would_find_one() -> None:
    # Nearest first takes source 0 with object 0 (0.3 arcsec) and leaves source 1 and object 1, 1.5 arcsec apart.
    sources = around(150.0, 2.0, [0.0, 0.9], [0.0, 0.0])
    objects = around(150.0, 2.0, [0.3, -0.6], [0.0, 0.0])
    found = open_associate(sources, objects)
    assert found.object_index.tolist() == [1, 0]
    assert found.contested.tolist() == [0]
    assert found.wide.tolist() == []


def test_contended_object_goes_to_the_likelier_source() -> None:
    sources = around(150.0, 2.0, [0.5, -0.1, 0.0], [0.0, 0.0, 0.6])
    found = open_associate(sources, around(150.0, 2.0, [0.0], [0.0]))
    assert found.object_index.tolist() == [-1, 0, -1]


def test_sources_of_equal_score_are_settled_by_id() -> None:
    twice = around(150.0, 2.0, [0.25, 0.25], [0.0, 0.0])
    assert open_associate(twice, around(150.0, 2.0, [0.0], [0.0])).object_index.tolist() == [0, -1]
    assert open_associate(around(150.0, 2.0, [0.0], [0.0]), twice).object_index.tolist() == [0]


@settings(max_examples=250, deadline=None)
@given(small_skies())
def test_matching_has_most_pairs_and_then_least_total_score(sky: tuple[Positions, Positions]) -> None:
    sources, objects = sky
    scores = slow_scores(sources, objects, 1.0)
    found = open_associate(sources, objects).object_index
    pairs = [(i, int(k)) for i, k in enumerate(found) if k >= 0]
    assert len({k for _, k in pairs}) == len(pairs)
    if not set(pairs) <= set(scores):  # a pair at the very gate, where the slow distance rounds the other way
        separations = [slow_scores(rows(sources, np.array([i])), rows(objects, np.array([k])), 1.001) for i, k in pairs]
        assert all(separations)
        return
    matchings = list(all_matchings(scores, len(sources)))
    most = max(len(matching) for matching in matchings)
    least = min(sum(scores[pair] for pair in matching) for matching in matchings if len(matching) == most)
    assert len(pairs) == most
    # Each pair's score may differ by offset / variance * offset tolerance: at most 1 / (2 x 0.05^2) x 4e-5 (dec 75).
    assert sum(scores[pair] for pair in pairs) == pytest.approx(least, abs=max(len(pairs), 1) * 200.0 * 4e-5)


@settings(max_examples=100, deadline=None)
@given(small_skies(), st.randoms(use_true_random=False))
def test_order_of_rows_changes_nothing(sky: tuple[Positions, Positions], random: object) -> None:
    sources, objects = sky
    scores = sorted(slow_scores(sources, objects, 1.001).values())
    if len(scores) > 1 and np.diff(scores).min() < 1e-3:
        return  # ties are settled by order
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    by_source, by_object = rng.permutation(len(sources)), rng.permutation(len(objects))
    before = open_associate(sources, objects)
    after = open_associate(rows(sources, by_source), rows(objects, by_object))
    pairs = {(i, int(k)) for i, k in enumerate(before.object_index) if k >= 0}
    shuffled = {(int(by_source[i]), int(by_object[k])) for i, k in enumerate(after.object_index) if k >= 0}
    assert len(pairs) == len(shuffled)
    total = slow_scores(sources, objects, 1.001)
    assert sum(total[pair] for pair in pairs) == pytest.approx(sum(total[pair] for pair in shuffled), abs=1e-9)
    assert len(before.contested) == len(after.contested)


@settings(max_examples=60, deadline=None)
@given(small_skies(), small_skies())
def test_far_away_rows_change_nothing(sky: tuple[Positions, Positions], other: tuple[Positions, Positions]) -> None:
    sources, objects = sky
    moved = tuple(Positions(p.ra, p.dec - 3.0, p.ra_err, p.dec_err) for p in other)
    alone = open_associate(sources, objects).object_index
    together = open_associate(joined(moved[0], sources), joined(moved[1], objects)).object_index
    shift = len(moved[1])
    assert np.array_equal(np.where(alone >= 0, alone + shift, -1), together[len(moved[0]) :])


def crowd(seed: int, n: int, width_arcsec: float) -> Positions:
    rng = np.random.default_rng(seed)
    return around(150.0, -45.0, list(rng.uniform(0, width_arcsec, n)), list(rng.uniform(0, width_arcsec, n)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [60, 120, 250, 600])
def test_source_is_matched_the_same_by_who_sees_the_group_limit_and_a_gate_around_it(seed: int, n: int) -> None:
    """Crowded fields from single pairs to one group that fills the field: what sky cells rely on."""
    sources, objects, limit, radius = crowd(seed, n, 20.0), crowd(100 + seed, n, 20.0), 5.0, 1.0
    whole = associate(sources, objects, max_group_width_arcsec=limit)
    east = [(p.ra - 150.0) * math.cos(math.radians(45.0)) * 3600.0 for p in (sources, objects)]
    north = [(p.dec + 45.0) * 3600.0 for p in (sources, objects)]
    for i in range(0, n, 5):
        seen_sources, seen_objects = (
            np.flatnonzero(np.hypot(east[side] - east[0][i], north[side] - north[0][i]) < limit + radius + 0.01)
            for side in (0, 1)
        )
        part = associate(rows(sources, seen_sources), rows(objects, seen_objects), max_group_width_arcsec=limit)
        mine = part.object_index[np.flatnonzero(seen_sources == i)[0]]
        assert (seen_objects[mine] if mine >= 0 else -1) == whole.object_index[i]
    if n >= 250:
        assert len(whole.wide) > 0
    assert set(whole.wide) <= set(whole.contested)


def test_group_too_wide_is_matched_by_mutual_nearest_and_counted() -> None:
    # Objects every 0.9 arcsec, each source 0.2 to 0.7 east of one: all hang together over 7.2 arcsec.
    objects = around(150.0, 2.0, [0.9 * k for k in range(9)], [0.0] * 9)
    sources = around(150.0, 2.0, [0.9 * k + 0.2 for k in range(8)] + [0.7], [0.0] * 8 + [0.1])
    found = associate(sources, objects, max_group_width_arcsec=5.0)
    assert found.wide.tolist() == [0]
    assert found.object_index.tolist() == [*range(8), -1]  # the last lost object 1 to source 1, which is nearer
    narrow = open_associate(sources, objects)
    assert narrow.wide.tolist() == []
    assert sorted(narrow.object_index) == list(range(9))


@pytest.mark.parametrize("first", [[10.0, 20.0], [20.0, 10.0], [10.0, 10.0], [math.nan, 10.0], [math.nan, math.nan]])
def test_of_objects_that_are_not_resolved_the_older_one_goes_before(first: list[float]) -> None:
    """Wherever the source falls, one source goes to the older, two sources go to both."""
    objects, founded = around(150.0, 2.0, [0.0, 0.1], [0.0, 0.0]), np.array(first)
    older = int(np.lexsort(([0, 1], np.nan_to_num(founded, nan=np.inf)))[0])
    for east in (-0.3, 0.0, 0.1, 0.4):
        one = open_associate(around(150.0, 2.0, [east], [0.0]), objects, founded=founded)
        assert one.object_index.tolist() == [older]
    two = open_associate(around(150.0, 2.0, [0.0, 0.1], [0.0, 0.0]), objects, founded=founded)
    assert two.object_index.tolist() == [0, 1]


def test_age_counts_for_nothing_between_objects_that_are_resolved() -> None:
    objects = around(150.0, 2.0, [0.0, 0.25], [0.0, 0.0])
    found = open_associate(around(150.0, 2.0, [0.2], [0.0]), objects, founded=np.array([10.0, 20.0]))
    assert found.object_index.tolist() == [1]


@pytest.mark.parametrize(("n", "expected"), [(300, 300), (301, 1)])
def test_a_group_of_more_than_600_members_is_matched_by_mutual_nearest_and_counted(n: int, expected: int) -> None:
    """All at one place: a matching would take n^3, hours for the thousands that a wrong table may hold."""
    heap = around(150.0, 2.0, [0.0] * n, [0.0] * n)
    found = associate(heap, heap, founded=np.zeros(n))
    assert np.count_nonzero(found.object_index >= 0) == expected
    assert (found.contested.tolist(), len(found.wide)) == ([0], expected == 1)


def test_positions_that_are_not_finite_match_nothing_and_disturb_nobody() -> None:
    sources, objects = around(10.0, 5.0, [0.0] * 3, [0.0, 3.0, 6.0]), around(10.0, 5.0, [0.1] * 3, [0.0, 3.0, 6.0])
    sources.ra[0] = objects.dec[2] = math.nan
    assert open_associate(sources, objects).object_index.tolist() == [-1, 1, -1]


@pytest.mark.parametrize(("n_sources", "n_objects"), [(0, 0), (0, 2), (2, 0), (2, 1)])
def test_nothing_to_match_gives_nothing(n_sources: int, n_objects: int) -> None:
    sources = around(10.0, 5.0, [0.0] * n_sources, [0.0] * n_sources)
    found = associate(sources, around(10.0, 5.0, [9.0] * n_objects, [0.0] * n_objects))
    assert found.object_index.tolist() == [-1] * n_sources
    assert len(found.contested) == len(found.wide) == 0

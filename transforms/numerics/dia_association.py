"""Association of the diaSources of one visit with known diaObjects: gates, scores, matching."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit

from transforms.numerics.union_find import root

ARCSEC_PER_DEG = 3600.0
_NO_PAIR = -1
_TWIN_ARCSEC = 0.2  # what lies nearer is not resolved: two detections of one thing, or two things for good
_TWIN_SURCHARGE = 1e4  # beyond any difference of scores: (gate / floor)^2 is 400 by default
_CROWD = 600  # members of a group at most, for a matching: 0.2 s; no sky shows a tenth of them in 5 arcsec
_CELL_PER_GATE = 4.0  # most gates then touch one or two cells, and cells still hold few
_PER_DEG = (1.0 - 1e-15) / 360.0  # so that no right ascension below 360 rounds up to the column after the last


@dataclass(frozen=True)
class Positions:
    """Positions on the sky.

    Attributes
    ----------
    ra, dec : (n,) float64, degrees
    ra_err, dec_err : (n,) float, degrees on the sky (`ra_err` includes cos(dec)); NaN where unknown
    """

    ra: np.ndarray
    dec: np.ndarray
    ra_err: np.ndarray
    dec_err: np.ndarray

    def __len__(self) -> int:
        return len(self.ra)


@dataclass(frozen=True)
class Assignment:
    """Which object each source goes to.

    Attributes
    ----------
    object_index : (n_sources,) int64, -1 where no object was assigned; no object occurs twice
    contested : (n_groups,) int64, the first source of each group of more than one source or object
    wide : int64, those of `contested` beyond the limits, matched by mutual nearest neighbour instead
    """

    object_index: np.ndarray
    contested: np.ndarray
    wide: np.ndarray


def associate(
    sources: Positions,
    objects: Positions,
    *,
    radius_arcsec: float = 1.0,
    error_floor_arcsec: float = 0.05,
    error_fallback_arcsec: float = 0.2,
    max_group_width_arcsec: float = 5.0,
    founded: np.ndarray | None = None,
) -> Assignment:
    """Match sources to objects one to one, group by group.

    Pairs within `radius_arcsec` are scored by the Gaussian negative log-likelihood
    ``0.5 (dra^2 / var_ra + ddec^2 / var_dec) + 0.5 ln(var_ra var_dec)`` in arcsec, the variances
    being the sums of both squared errors, each at least the floor and the fallback where missing.
    Each connected group of pairs takes the matching of maximum cardinality and, among those, of
    minimum total score, so the answer does not depend on the rest of the sky. Groups wider than
    `max_group_width_arcsec`, or of more than 600 members, fall back to mutual nearest neighbours. Positions
    that are not finite match nothing.

    Parameters
    ----------
    sources, objects : Positions
        Both sorted by id, which settles ties.
    radius_arcsec : float
        Gate, > 0.
    max_group_width_arcsec : float
        Limit of twice the largest distance from a group's first source, hence of its true extent. Who
        knows everything within ``max_group_width_arcsec + radius_arcsec`` of a source sees either all of
        its group or enough of it to call it wide, and so decides as one who knows the whole sky.

    founded : (n_objects,) float64, optional
        When each object was first seen. Of objects of a group within 0.2 arcsec of each other the one founded first
        goes before: a visit that sees one thing there must not hop between them.

    Returns
    -------
    Assignment

    Notes
    -----
    Sources are hashed into cells of the gate's size, objects looked up there: O(n_sources + n_objects), 10 ns an
    object that is near no source, plus O(k^3) per contested group of k members, k at most 600.

    References
    ----------
    Gate, score and errors: lsst/ap_association `association.py` (2026-06); ours differs in matching
    per group and in applying cos(dec) to the difference in right ascension.
    """
    nothing = np.full(len(sources), _NO_PAIR, dtype=np.int64)
    if len(sources) == 0 or len(objects) == 0:
        return Assignment(nothing, nothing[:0], nothing[:0])
    source_columns, object_columns = _columns(sources), _columns(objects)
    pairs = _pairs_within(source_columns, object_columns, radius_arcsec / ARCSEC_PER_DEG)
    if len(pairs) == 0:
        return Assignment(nothing, nothing[:0], nothing[:0])
    group = _group_labels(pairs, len(sources), len(objects))
    errors = error_floor_arcsec, error_fallback_arcsec
    times = np.empty(0) if founded is None else np.where(np.isfinite(founded), founded, np.inf)
    return Assignment(
        *_match_groups(source_columns, object_columns, pairs, group, times, *errors, max_group_width_arcsec)
    )


class _Columns(NamedTuple):
    """Positions as contiguous float64, what the compiled loops take."""

    ra: np.ndarray
    dec: np.ndarray
    ra_err: np.ndarray
    dec_err: np.ndarray


def _columns(positions: Positions) -> _Columns:
    columns = (positions.ra, positions.dec, positions.ra_err, positions.dec_err)
    return _Columns(*(np.ascontiguousarray(values, dtype=np.float64) for values in columns))


@njit(cache=True)
def unit_vector(ra_deg: float, dec_deg: float) -> tuple[float, float, float]:
    """Direction of a position in degrees."""
    ra, dec = math.radians(ra_deg), math.radians(dec_deg)
    return math.cos(dec) * math.cos(ra), math.cos(dec) * math.sin(ra), math.sin(dec)


@njit(cache=True)
def _columns_of_zone(zone: int, height_deg: float) -> int:
    """Number of cells along a zone: none is narrower than the zone is high, at the zone's narrower edge."""
    furthest = max(abs(zone * height_deg - 90.0), abs((zone + 1) * height_deg - 90.0))
    return max(1, int(360.0 * math.cos(math.radians(min(furthest, 90.0))) / height_deg))


@njit(cache=True)
def _cell(zone: int, column: int) -> int:
    """One number for a cell: there are at most 2^31 zones and 2^32 columns."""
    return (zone << 32) | column


@njit(cache=True)
def _slot(cell: int, mask: int) -> int:
    mixed = (cell >> 32) * 1_000_003 + (cell & 0xFFFFFFFF)
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D
    return (mixed ^ (mixed >> 12)) & mask


@njit(cache=True)
def _cells_of_gates(
    sources: _Columns, reach_deg: float, height_deg: float
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Enter every source in all cells that its gate touches, so that an object need look up its own cell only.

    The sky is cut into zones of declination, counted from the south pole, each zone into equal cells of right
    ascension. Returns (n,) cell and source of each entry; the first zone; the columns of each zone from there.
    """
    zones_per_deg = 1.0 / height_deg
    low_zone, high_zone = 1 << 40, -1
    for i in range(len(sources.ra)):
        if math.isfinite(sources.ra[i]) and math.isfinite(sources.dec[i]):
            low_zone = min(low_zone, math.floor((sources.dec[i] - reach_deg + 90.0) * zones_per_deg))
            high_zone = max(high_zone, math.floor((sources.dec[i] + reach_deg + 90.0) * zones_per_deg))
    n_columns = np.empty(max(high_zone - low_zone + 1, 0), dtype=np.int64)
    for zone in range(low_zone, low_zone + len(n_columns)):
        n_columns[zone - low_zone] = _columns_of_zone(zone, height_deg)
    cells, holders = np.empty(4 * len(sources.ra), dtype=np.int64), np.empty(4 * len(sources.ra), dtype=np.int32)
    n_entries = 0
    for i in range(len(sources.ra)):
        ra, dec = sources.ra[i] % 360.0, sources.dec[i]
        if not (math.isfinite(ra) and math.isfinite(dec)):
            continue
        # The circle of the gate spans asin(sin(gate) / cos(dec)) in right ascension, everything around a pole.
        ratio = math.sin(math.radians(reach_deg)) / max(math.cos(math.radians(dec)), 1e-300)
        reach = math.degrees(math.asin(ratio)) * (1.0 + 1e-6) if ratio < 1.0 else 180.0
        first_zone = math.floor((dec - reach_deg + 90.0) * zones_per_deg)
        for zone in range(first_zone, math.floor((dec + reach_deg + 90.0) * zones_per_deg) + 1):
            n = n_columns[zone - low_zone]
            if 2.0 * reach + 360.0 / n >= 360.0:
                first, count = 0, n
            else:
                first = math.floor((ra - reach) * (n * _PER_DEG))
                count = math.floor((ra + reach) * (n * _PER_DEG)) - first + 1
            if n_entries + count > len(cells):
                cells = np.concatenate((cells, np.empty(len(cells) + count, dtype=np.int64)))
                holders = np.concatenate((holders, np.empty(len(holders) + count, dtype=np.int32)))
            for column in range(first, first + count):
                inside = column + n if column < 0 else column - n if column >= n else column
                cells[n_entries], holders[n_entries] = _cell(zone, inside), i
                n_entries += 1
    return cells[:n_entries], holders[:n_entries], low_zone, n_columns


@njit(cache=True)
def _pairs_within(sources: _Columns, objects: _Columns, radius_deg: float) -> np.ndarray:
    """(n, 2) pairs (source, object) within the gate, in order of source, then object."""
    n_sources = len(sources.ra)
    # A hair more than the gate, so that rounding loses no pair on its edge.
    reach = max(radius_deg * (1.0 + 1e-6), 1e-7)
    height = _CELL_PER_GATE * reach
    cells, holders, low_zone, n_columns = _cells_of_gates(sources, reach, height)
    size = 16
    while size < 2 * len(cells):
        size *= 2
    mask = size - 1
    head = np.full(size, -1, dtype=np.int32)
    following = np.empty(len(cells), dtype=np.int32)
    for e in range(len(cells)):
        slot = _slot(cells[e], mask)
        following[e] = head[slot]
        head[slot] = e
    vectors = np.empty((n_sources, 3))
    for i in range(n_sources):
        vectors[i, 0], vectors[i, 1], vectors[i, 2] = unit_vector(sources.ra[i], sources.dec[i])
    columns_per_deg, zones_per_deg = n_columns * _PER_DEG, 1.0 / height
    chord2 = (2.0 * math.sin(0.5 * math.radians(radius_deg))) ** 2
    found = np.empty((2 * n_sources + 16, 2), dtype=np.int64)
    n_found = 0
    for k in range(len(objects.ra)):
        ra, dec = objects.ra[k], objects.dec[k]
        if not (math.isfinite(ra) and math.isfinite(dec)):
            continue
        zone = int((dec + 90.0) * zones_per_deg)
        row = zone - low_zone
        if row < 0 or row >= len(n_columns):
            continue
        if ra < 0.0 or ra >= 360.0:
            ra = ra % 360.0
        cell = _cell(zone, int(ra * columns_per_deg[row]))
        e = head[_slot(cell, mask)]
        x, y, z, is_near = 0.0, 0.0, 0.0, False
        while e >= 0:
            if cells[e] == cell:
                i = holders[e]
                if not is_near:
                    x, y, z = unit_vector(objects.ra[k], dec)
                    is_near = True
                if (x - vectors[i, 0]) ** 2 + (y - vectors[i, 1]) ** 2 + (z - vectors[i, 2]) ** 2 <= chord2:
                    if n_found == len(found):
                        more = np.empty((2 * n_found, 2), dtype=np.int64)
                        more[:n_found] = found
                        found = more
                    found[n_found, 0], found[n_found, 1] = i, k
                    n_found += 1
            e = following[e]
    # Objects came in order; counting by source puts the pairs in order of (source, object).
    start = np.zeros(n_sources + 1, dtype=np.int64)
    for p in range(n_found):
        start[found[p, 0] + 1] += 1
    for i in range(n_sources):
        start[i + 1] += start[i]
    pairs = np.empty((n_found, 2), dtype=np.int64)
    for p in range(n_found):
        i = found[p, 0]
        pairs[start[i], 0], pairs[start[i], 1] = i, found[p, 1]
        start[i] += 1
    return pairs


@njit(cache=True)
def _usable_error(error_deg: float, floor_arcsec: float, fallback_arcsec: float) -> float:
    if math.isfinite(error_deg) and error_deg > 0.0:
        return max(error_deg * ARCSEC_PER_DEG, floor_arcsec)
    return fallback_arcsec


@njit(cache=True)
def _pair_scores(
    sources: _Columns, objects: _Columns, pairs: np.ndarray, floor_arcsec: float, fallback_arcsec: float
) -> np.ndarray:
    """Score of each pair; offsets are projected, as RA times cos(dec) fails at the poles."""
    scores = np.empty(len(pairs))
    to_arcsec = math.degrees(1.0) * ARCSEC_PER_DEG
    for p in range(len(pairs)):
        i, k = pairs[p, 0], pairs[p, 1]
        ra, dec = math.radians(objects.ra[k]), math.radians(objects.dec[k])
        u, v, w = unit_vector(sources.ra[i], sources.dec[i])
        x, y, z = unit_vector(objects.ra[k], objects.dec[k])
        du, dv, dw = u - x, v - y, w - z
        east = (dv * math.cos(ra) - du * math.sin(ra)) * to_arcsec
        north = (dw * math.cos(dec) - math.sin(dec) * (du * math.cos(ra) + dv * math.sin(ra))) * to_arcsec
        var_ra = (
            _usable_error(sources.ra_err[i], floor_arcsec, fallback_arcsec) ** 2
            + _usable_error(objects.ra_err[k], floor_arcsec, fallback_arcsec) ** 2
        )
        var_dec = (
            _usable_error(sources.dec_err[i], floor_arcsec, fallback_arcsec) ** 2
            + _usable_error(objects.dec_err[k], floor_arcsec, fallback_arcsec) ** 2
        )
        scores[p] = 0.5 * (east * east / var_ra + north * north / var_dec) + 0.5 * math.log(var_ra * var_dec)
    return scores


@njit(cache=True)
def _group_labels(pairs: np.ndarray, n_sources: int, n_objects: int) -> np.ndarray:
    """The first source of the connected group of each pair."""
    parent = np.arange(n_sources)
    holder = np.full(n_objects, -1, dtype=np.int32)  # a source that can take the object
    for p in range(len(pairs)):
        i, k = pairs[p, 0], pairs[p, 1]
        if holder[k] < 0:
            holder[k] = i
        else:
            one, other = root(parent, i), root(parent, holder[k])
            parent[max(one, other)] = min(one, other)
    group = np.empty(len(pairs), dtype=np.int64)
    for p in range(len(pairs)):
        group[p] = root(parent, pairs[p, 0])
    return group


@njit(cache=True)
def _match_groups(
    sources: _Columns,
    objects: _Columns,
    pairs: np.ndarray,
    group: np.ndarray,
    founded: np.ndarray,
    floor_arcsec: float,
    fallback_arcsec: float,
    max_width_arcsec: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns of `Assignment`; only contested pairs are scored."""
    n_sources = len(sources.ra)
    assigned = np.full(n_sources, _NO_PAIR, dtype=np.int64)
    contested = np.empty(n_sources, dtype=np.int64)
    wide = np.empty(n_sources, dtype=np.int64)
    n_contested, n_wide = 0, 0
    # Counted, so that the pairs of a group stay in order of (source, object).
    end = np.zeros(n_sources + 1, dtype=np.int64)
    for p in range(len(pairs)):
        end[group[p] + 1] += 1
    for first in range(n_sources):
        end[first + 1] += end[first]
    order = np.empty(len(pairs), dtype=np.int64)
    for p in range(len(pairs)):
        order[end[group[p]]] = p
        end[group[p]] += 1
    start = 0
    for first in range(n_sources):
        members = order[start : end[first]]
        start = end[first]
        if len(members) == 1:
            assigned[first] = pairs[members[0], 1]
        elif len(members) > 1:
            contested[n_contested] = first
            n_contested += 1
            own = pairs[members]
            scores = _pair_scores(sources, objects, own, floor_arcsec, fallback_arcsec)
            if len(founded) > 0:
                _put_twins_last(objects, own, founded, scores)
            if _width_arcsec(sources, objects, own) > max_width_arcsec or _is_crowd(own):
                wide[n_wide] = first
                n_wide += 1
                chosen = _mutual_nearest(own, scores)
            else:
                chosen = _best_matching(own, scores)
            for p in range(len(members)):
                if chosen[p]:
                    assigned[own[p, 0]] = own[p, 1]
    return assigned, contested[:n_contested].copy(), wide[:n_wide].copy()


@njit(cache=True)
def _put_twins_last(objects: _Columns, pairs: np.ndarray, founded: np.ndarray, scores: np.ndarray) -> None:
    """Add a surcharge to pairs of objects beside which an older one of the group lies."""
    chord2 = (2.0 * math.sin(0.5 * math.radians(_TWIN_ARCSEC / ARCSEC_PER_DEG))) ** 2
    members, member = _ranks(pairs[:, 1].copy())
    vectors, later = np.empty((len(members), 3)), np.zeros(len(members), dtype=np.bool_)
    for m in range(len(members)):
        k = members[m]
        vectors[m, 0], vectors[m, 1], vectors[m, 2] = unit_vector(objects.ra[k], objects.dec[k])
    for m in range(len(members)):
        x, y, z = vectors[m]
        for other in range(len(members)):
            first, second = founded[members[other]], founded[members[m]]
            if other == m or first > second or (first == second and other > m):
                continue
            if (x - vectors[other, 0]) ** 2 + (y - vectors[other, 1]) ** 2 + (z - vectors[other, 2]) ** 2 <= chord2:
                later[m] = True
                break
    for p in range(len(pairs)):
        if later[member[p]]:
            scores[p] += _TWIN_SURCHARGE


@njit(cache=True)
def _width_arcsec(sources: _Columns, objects: _Columns, pairs: np.ndarray) -> float:
    """Extent of a group: twice the largest distance of a member from the group's first source."""
    x, y, z = unit_vector(sources.ra[pairs[0, 0]], sources.dec[pairs[0, 0]])
    chord2 = 0.0
    for p in range(len(pairs)):
        u, v, w = unit_vector(sources.ra[pairs[p, 0]], sources.dec[pairs[p, 0]])
        chord2 = max(chord2, (x - u) ** 2 + (y - v) ** 2 + (z - w) ** 2)
        u, v, w = unit_vector(objects.ra[pairs[p, 1]], objects.dec[pairs[p, 1]])
        chord2 = max(chord2, (x - u) ** 2 + (y - v) ** 2 + (z - w) ** 2)
    return 2.0 * math.degrees(2.0 * math.asin(min(0.5 * math.sqrt(chord2), 1.0))) * ARCSEC_PER_DEG


@njit(cache=True)
def _is_crowd(pairs: np.ndarray) -> bool:
    """Whether a group has too many members for a matching."""
    if len(pairs) < _CROWD:  # a group hangs together by no fewer pairs than members less one
        return False
    return len(np.unique(pairs[:, 0])) + len(np.unique(pairs[:, 1])) > _CROWD


@njit(cache=True)
def _ranks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values in order, and the place of each value among them."""
    distinct = np.unique(values)
    return distinct, np.searchsorted(distinct, values)


@njit(cache=True)
def _best_matching(pairs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which pairs are in the matching of most pairs, then least total score.

    Shortest augmenting paths with potentials (Kuhn, Munkres; Jonker and Volgenant 1987), each source having a column
    of its own that stands for no object, dearer than any number of real pairs.
    """
    row_ids, row = _ranks(pairs[:, 0].copy())
    column_ids, column = _ranks(pairs[:, 1].copy())
    n, n_real = len(row_ids), len(column_ids)
    m = n_real + n
    shifted = scores - scores.min()
    unmatched = (shifted.max() + 1.0) * (min(n, n_real) + 1)
    cost = np.full((n, m), np.inf)
    pair_at = np.full((n, m), _NO_PAIR, dtype=np.int64)
    for p in range(len(pairs)):
        cost[row[p], column[p]] = shifted[p]
        pair_at[row[p], column[p]] = p
    for i in range(n):
        cost[i, m - 1 - i] = unmatched  # of equal costs the first column wins: later sources go without
    of_column = np.full(m, -1, dtype=np.int64)
    row_price, column_price = np.zeros(n), np.zeros(m)
    for i in range(n):
        shortest, done = np.full(m, np.inf), np.zeros(m, dtype=np.bool_)
        came_from = np.full(m, -1, dtype=np.int64)
        at_row, at_column, length = i, -1, 0.0
        while True:
            for j in range(m):
                if not done[j] and cost[at_row, j] < np.inf:
                    candidate = length + cost[at_row, j] - row_price[at_row] - column_price[j]
                    if candidate < shortest[j]:
                        shortest[j], came_from[j] = candidate, at_column
            at_column, length = -1, np.inf
            for j in range(m):
                if not done[j] and shortest[j] < length:
                    at_column, length = j, shortest[j]
            done[at_column] = True
            if of_column[at_column] < 0:
                break
            at_row = of_column[at_column]
        row_price[i] += length
        for j in range(m):
            if done[j] and j != at_column:
                row_price[of_column[j]] += length - shortest[j]
                column_price[j] -= length - shortest[j]
        while at_column >= 0:
            previous = came_from[at_column]
            of_column[at_column] = i if previous < 0 else of_column[previous]
            at_column = previous
    chosen = np.zeros(len(pairs), dtype=np.bool_)
    for j in range(n_real):
        if of_column[j] >= 0:
            chosen[pair_at[of_column[j], j]] = True
    return chosen


@njit(cache=True)
def _mutual_nearest(pairs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which pairs are best for both their source and their object; ties go to lower ids."""
    row_ids, row = _ranks(pairs[:, 0].copy())
    column_ids, column = _ranks(pairs[:, 1].copy())
    of_row, of_column = np.full(len(row_ids), -1), np.full(len(column_ids), -1)
    for p in range(len(pairs)):  # in order of (source, object): the first of equals stays
        if of_row[row[p]] < 0 or scores[p] < scores[of_row[row[p]]]:
            of_row[row[p]] = p
        if of_column[column[p]] < 0 or scores[p] < scores[of_column[column[p]]]:
            of_column[column[p]] = p
    chosen = np.zeros(len(pairs), dtype=np.bool_)
    for p in range(len(pairs)):
        chosen[p] = of_row[row[p]] == p and of_column[column[p]] == p
    return chosen

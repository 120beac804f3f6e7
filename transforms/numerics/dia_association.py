"""Association of the diaSources of one visit with known diaObjects: gates, scores, matching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

ARCSEC_PER_DEG = 3600.0


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
    wide : int64, those of `contested` wider than the limit, matched by mutual nearest neighbour instead
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
) -> Assignment:
    """Match sources to objects one to one, group by group.

    Pairs within `radius_arcsec` are scored by the Gaussian negative log-likelihood
    ``0.5 (dra^2 / var_ra + ddec^2 / var_dec) + 0.5 ln(var_ra var_dec)`` in arcsec, the variances
    being the sums of both squared errors, each at least the floor and the fallback where missing.
    Each connected group of pairs takes the matching of maximum cardinality and, among those, of
    minimum total score, so the answer does not depend on the rest of the sky. Groups wider than
    `max_group_width_arcsec` fall back to mutual nearest neighbours. Positions that are not finite
    match nothing.

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

    Returns
    -------
    Assignment

    Notes
    -----
    O((n_sources + n_objects) log n_objects) plus O(k^3) per contested group of k members.

    References
    ----------
    Gate, score and errors: lsst/ap_association `association.py` (2026-06); ours differs in matching
    per group and in applying cos(dec) to the difference in right ascension.
    """
    nothing = np.full(len(sources), -1, dtype=np.int64)
    if len(sources) == 0 or len(objects) == 0:
        return Assignment(nothing, nothing[:0], nothing[:0])
    pair_source, pair_object = _pairs_within(sources, objects, radius_arcsec)
    if len(pair_source) == 0:
        return Assignment(nothing, nothing[:0], nothing[:0])
    scores = _scores(sources, objects, pair_source, pair_object, error_floor_arcsec, error_fallback_arcsec)
    groups = _group_labels(pair_source, pair_object, len(sources), len(objects))
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) > 0])
    ends = np.r_[starts[1:], len(order)]
    contested, wide = [], []
    assigned = nothing
    for start, end in zip(starts, ends, strict=True):
        members = order[start:end]
        if end - start == 1:
            assigned[pair_source[members]] = pair_object[members]
            continue
        contested.append(pair_source[members[0]])
        if _width_arcsec(sources, objects, pair_source[members], pair_object[members]) > max_group_width_arcsec:
            wide.append(pair_source[members[0]])
            chosen = _mutual_nearest(pair_source[members], pair_object[members], scores[members])
        else:
            chosen = _best_matching(pair_source[members], pair_object[members], scores[members])
        assigned[pair_source[members][chosen]] = pair_object[members][chosen]
    return Assignment(assigned, np.array(contested, dtype=np.int64), np.array(wide, dtype=np.int64))


def unit_vectors(ra_deg: np.ndarray, dec_deg: np.ndarray) -> np.ndarray:
    """(n, 3) unit vectors of positions in degrees."""
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


def _pairs_within(sources: Positions, objects: Positions, radius_arcsec: float) -> tuple[np.ndarray, np.ndarray]:
    placed_sources, placed_objects = _placed(sources), _placed(objects)
    source_vectors = unit_vectors(sources.ra[placed_sources], sources.dec[placed_sources])
    object_vectors = unit_vectors(objects.ra[placed_objects], objects.dec[placed_objects])
    chord = 2.0 * np.sin(np.radians(radius_arcsec / ARCSEC_PER_DEG) / 2.0)
    found = cKDTree(object_vectors).query_ball_point(source_vectors, chord, return_sorted=True)
    counts = np.array([len(hits) for hits in found], dtype=np.int64)
    pair_source = placed_sources[np.repeat(np.arange(len(counts)), counts)]
    pair_object = placed_objects[np.array([hit for hits in found for hit in hits], dtype=np.int64)]
    return pair_source, pair_object


def _placed(positions: Positions) -> np.ndarray:
    return np.flatnonzero(np.isfinite(positions.ra) & np.isfinite(positions.dec))


def _offsets_arcsec(
    sources: Positions, objects: Positions, pair_source: np.ndarray, pair_object: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """East and north of each source from its object; projected, as RA times cos(dec) fails at the poles."""
    ra, dec = np.radians(objects.ra[pair_object]), np.radians(objects.dec[pair_object])
    apart = unit_vectors(sources.ra[pair_source], sources.dec[pair_source]) - unit_vectors(
        objects.ra[pair_object], objects.dec[pair_object]
    )
    east = np.stack([-np.sin(ra), np.cos(ra), np.zeros_like(ra)], axis=-1)
    north = np.stack([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)], axis=-1)
    to_arcsec = np.degrees(ARCSEC_PER_DEG)
    return np.sum(apart * east, axis=-1) * to_arcsec, np.sum(apart * north, axis=-1) * to_arcsec


def _scores(
    sources: Positions,
    objects: Positions,
    pair_source: np.ndarray,
    pair_object: np.ndarray,
    floor_arcsec: float,
    fallback_arcsec: float,
) -> np.ndarray:
    d_ra, d_dec = _offsets_arcsec(sources, objects, pair_source, pair_object)

    def variance(source_err: np.ndarray, object_err: np.ndarray) -> np.ndarray:
        return (
            _usable_error(source_err[pair_source], floor_arcsec, fallback_arcsec) ** 2
            + _usable_error(object_err[pair_object], floor_arcsec, fallback_arcsec) ** 2
        )

    var_ra = variance(sources.ra_err, objects.ra_err)
    var_dec = variance(sources.dec_err, objects.dec_err)
    return 0.5 * (d_ra**2 / var_ra + d_dec**2 / var_dec) + 0.5 * np.log(var_ra * var_dec)


def _usable_error(error_deg: np.ndarray, floor_arcsec: float, fallback_arcsec: float) -> np.ndarray:
    error = np.asarray(error_deg, dtype=np.float64) * ARCSEC_PER_DEG
    known = np.isfinite(error) & (error > 0)
    return np.where(known, np.maximum(error, floor_arcsec), fallback_arcsec)


def _group_labels(pair_source: np.ndarray, pair_object: np.ndarray, n_sources: int, n_objects: int) -> np.ndarray:
    """Label of the connected group of each pair."""
    size = n_sources + n_objects
    graph = coo_matrix((np.ones(len(pair_source)), (pair_source, n_sources + pair_object)), shape=(size, size))
    labels = connected_components(graph, directed=False)[1]
    return labels[pair_source]


def _width_arcsec(sources: Positions, objects: Positions, pair_source: np.ndarray, pair_object: np.ndarray) -> float:
    """Extent of a group: twice the largest distance of a member from the group's first source."""
    first = int(pair_source[0])
    vectors = np.concatenate(
        [
            unit_vectors(sources.ra[pair_source], sources.dec[pair_source]),
            unit_vectors(objects.ra[pair_object], objects.dec[pair_object]),
        ]
    )
    centre = unit_vectors(sources.ra[first : first + 1], sources.dec[first : first + 1])
    chord = np.sqrt(np.sum((vectors - centre) ** 2, axis=1).max())
    return float(2.0 * np.degrees(2.0 * np.arcsin(min(chord / 2.0, 1.0))) * ARCSEC_PER_DEG)


def _best_matching(pair_source: np.ndarray, pair_object: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Indices of the pairs in the matching of most pairs, then least total score."""
    rows, row = np.unique(pair_source, return_inverse=True)
    columns, column = np.unique(pair_object, return_inverse=True)
    shifted = scores - scores.min()
    unmatched = (shifted.max() + 1.0) * (min(len(rows), len(columns)) + 1)
    cost = np.full((len(rows), len(columns) + len(rows)), unmatched)
    cost[row, column] = shifted
    pair_at = np.full((len(rows), len(columns)), -1)
    pair_at[row, column] = np.arange(len(pair_source))
    chosen_row, chosen_column = linear_sum_assignment(cost)
    real = chosen_column < len(columns)
    chosen = pair_at[chosen_row[real], chosen_column[real]]
    return chosen[chosen >= 0]


def _mutual_nearest(pair_source: np.ndarray, pair_object: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Indices of the pairs that are best for both their source and their object; ties go to lower ids."""
    by_source = _first_of_each(pair_source, np.lexsort((pair_object, scores, pair_source)))
    by_object = _first_of_each(pair_object, np.lexsort((pair_source, scores, pair_object)))
    return np.intersect1d(by_source, by_object)


def _first_of_each(key: np.ndarray, order: np.ndarray) -> np.ndarray:
    return order[np.r_[True, np.diff(key[order]) > 0]]

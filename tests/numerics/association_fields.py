"""Fields of sources and objects, ordinary and malicious, and the exact decision of each group by slow means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

from transforms.numerics.dia_association import Positions, _columns, _pair_scores, _pairs_within

ARCSEC = 1.0 / 3600.0
# Positions become unit vectors in double precision: angles up to 2 pi rounded to 4e-16, then sines of them to 1e-16;
# two of these in each of three components: 2e-15 rad, 4e-10 arcsec.
VECTOR_TOLERANCE_ARCSEC = 5e-10
# A score changes by offset / variance x offset: at most 1 / (2 x 0.05^2) = 200 per arcsec on each axis.
SCORE_TOLERANCE = 2 * 200.0 * VECTOR_TOLERANCE_ARCSEC + 1e-12
# Totals of up to 100 scores below 1e3 and of surcharges below 1e5, each sum rounded to 1e-16 of it.
TIE = 1e-8


def around(
    ra: float, dec: float, east: list[float], north: list[float], err: float = 0.1, err_dec: float | None = None
) -> Positions:
    """Positions at offsets in arcsec on the sky from a point."""
    x, y = np.radians(np.array(east) * ARCSEC), np.radians(np.array(north) * ARCSEC)
    ra0, dec0 = math.radians(ra), math.radians(dec)
    vectors = (
        np.array([math.cos(dec0) * math.cos(ra0), math.cos(dec0) * math.sin(ra0), math.sin(dec0)])
        + x[:, None] * np.array([-math.sin(ra0), math.cos(ra0), 0.0])
        + y[:, None] * np.array([-math.sin(dec0) * math.cos(ra0), -math.sin(dec0) * math.sin(ra0), math.cos(dec0)])
    )
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    n = len(x)
    return Positions(
        np.degrees(np.arctan2(vectors[:, 1], vectors[:, 0])) % 360.0,
        np.degrees(np.arctan2(vectors[:, 2], np.hypot(vectors[:, 0], vectors[:, 1]))),
        np.full(n, err * ARCSEC),
        np.full(n, (err if err_dec is None else err_dec) * ARCSEC),
    )


Field = tuple[Positions, Positions]


def _with_errors(rng: np.random.Generator, positions: Positions) -> Positions:
    errors = rng.uniform(0.03, 0.3, (2, len(positions))) * ARCSEC
    return Positions(positions.ra, positions.dec, *errors)


def _strewn(rng: np.random.Generator, ra: float, dec: float, n_objects: int, width_arcsec: float) -> Field:
    """Four of five sources belong to an object, with the errors of detection; the others are anywhere."""
    objects = rng.uniform(-0.5, 0.5, (2, n_objects)) * width_arcsec
    n_own = n_objects * 3 // 5
    own = objects[:, rng.permutation(n_objects)[:n_own]] + rng.normal(0.0, 0.15, (2, n_own))
    strays = rng.uniform(-0.5, 0.5, (2, n_own // 4)) * width_arcsec
    sources = np.concatenate([own, strays], axis=1)
    return (
        _with_errors(rng, around(ra, dec, *(list(axis) for axis in sources))),
        _with_errors(rng, around(ra, dec, *(list(axis) for axis in objects))),
    )


def _crowded(rng: np.random.Generator, ra: float = 150.0, dec: float = 2.0) -> Field:
    """270 objects in 3 x 3 arcmin: 30 a square arcminute."""
    return _strewn(rng, ra, dec, 270, 180.0)


def _chains(rng: np.random.Generator) -> Field:
    """Rows of objects and sources in turn, each within the gate of the next, of 2 to 14 members and 20 arcsec apart."""
    sides: tuple[list[list[float]], list[list[float]]] = ([], [])
    for row in range(12):
        x, length = 0.0, int(rng.integers(2, 15))
        for member in range(length):
            sides[(member + row) % 2].append([x, 20.0 * row + rng.uniform(-0.1, 0.1)])
            x += rng.uniform(0.4, 0.98)
    return tuple(  # type: ignore[return-value]
        _with_errors(rng, around(80.0, -30.0, *np.array(side).T.tolist())) for side in sides
    )


def _grid(rng: np.random.Generator) -> Field:
    """Pieces of square grids whose step is the gate, or a hair more or less; equal errors, so ties abound."""
    sides: tuple[list[list[float]], list[list[float]]] = ([], [])
    for piece in range(60):
        step = 1.0 + rng.choice([-1e-8, 0.0, 1e-8])
        nx, ny = rng.integers(1, 4, 2)
        for i in range(nx):
            for j in range(ny):
                sides[(i + j) % 2].append([20.0 * piece + i * step, j * step])
    return tuple(around(0.0, 0.0, *np.array(side).T.tolist()) for side in sides)  # type: ignore[return-value]


def _doubled(rng: np.random.Generator) -> Field:
    """Positions that occur up to three times on either side, with equal errors."""
    places = rng.uniform(-20.0, 20.0, (2, 40))
    sides = [np.repeat(places, rng.integers(0, 4, 40), axis=1) for _ in range(2)]
    return tuple(around(200.0, 45.0, *side.tolist()) for side in sides)  # type: ignore[return-value]


def _next_to_each_other(rng: np.random.Generator) -> Field:
    """Up to four a side 1e-13 degrees apart, what a double barely holds; half of them with equal errors."""
    places = np.stack([rng.uniform(0.0, 360.0, 30), rng.uniform(-80.0, 80.0, 30)])
    sides = []
    for _ in range(2):
        ra, dec = np.repeat(places, rng.integers(0, 5, 30), axis=1)
        ra, dec = ra + rng.choice([-1e-13, 0.0, 1e-13], len(ra)), dec + rng.choice([-1e-13, 0.0, 1e-13], len(ra))
        side = _with_errors(rng, Positions(ra % 360.0, dec, ra, ra))
        side.ra_err[dec > 0] = side.dec_err[dec > 0] = 0.1 * ARCSEC
        sides.append(side)
    return sides[0], sides[1]


def _not_finite(rng: np.random.Generator) -> Field:
    """A crowded field with holes in positions and errors of every kind."""
    sides = _crowded(rng, 359.9999, 60.0)
    for side in sides:
        for name, worth in (("ra", (np.nan, np.inf)), ("dec", (np.nan, -np.inf))):
            getattr(side, name)[rng.random(len(side)) < 0.05] = rng.choice(worth)
        for errors in (side.ra_err, side.dec_err):
            hit = rng.random(len(side)) < 0.3
            errors[hit] = rng.choice([np.nan, np.inf, 0.0, -1.0, 1e-9], int(hit.sum()))
    return sides


def _clumps(rng: np.random.Generator) -> Field:
    """Crowds of up to 25 a side, from one group of a few arcsec to several of twice the limit of five."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for clump in range(10):
        width = rng.uniform(1.0, 9.0)
        for side in sides:
            n = int(rng.integers(2, 26))
            side.append(np.stack([30.0 * clump + rng.uniform(0, width, n), rng.uniform(0, width, n)]))
    return tuple(  # type: ignore[return-value]
        _with_errors(rng, around(10.0, -75.0, *np.concatenate(side, axis=1).tolist())) for side in sides
    )


FIELDS: dict[str, Callable[[np.random.Generator], Field]] = {
    "sparse": lambda rng: _strewn(rng, 150.0, 2.0, 100, 600.0),
    "crowded": _crowded,
    "crowded, dec -60": lambda rng: _crowded(rng, 30.0, -60.0),
    "RA 0 / 360": lambda rng: _crowded(rng, 0.0, -20.0),
    "north pole": lambda rng: _crowded(rng, 123.0, 90.0),
    "south pole": lambda rng: _crowded(rng, 0.0, -89.9995),
    "chains": _chains,
    "grid of the gate": _grid,
    "doubled": _doubled,
    "1e-13 degrees": _next_to_each_other,
    "not finite": _not_finite,
    "clumps": _clumps,
}


def separations_arcsec(one: Positions, other: Positions) -> np.ndarray:
    """(n, m) angular separations in extended precision; NaN for positions that are not finite."""
    to_rad = np.arctan(np.longdouble(1.0)) / 45

    def vectors(positions: Positions) -> np.ndarray:
        finite = np.isfinite(positions.ra) & np.isfinite(positions.dec)
        ra = np.where(finite, positions.ra, np.nan).astype(np.longdouble) * to_rad
        dec = np.where(finite, positions.dec, np.nan).astype(np.longdouble) * to_rad
        return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)

    chord = np.sqrt(np.sum((vectors(one)[:, None] - vectors(other)[None]) ** 2, axis=-1))
    return 2 * np.arcsin(chord / 2) / to_rad * 3600


def exact_scores(sources: Positions, objects: Positions, pairs: np.ndarray) -> np.ndarray:
    """Scores in extended precision, offsets along the object's meridian and parallel."""
    to_rad = np.arctan(np.longdouble(1.0)) / 45
    i, k = pairs.T
    ra, dec = objects.ra[k].astype(np.longdouble) * to_rad, objects.dec[k].astype(np.longdouble) * to_rad
    d_ra, source_dec = sources.ra[i].astype(np.longdouble) * to_rad - ra, sources.dec[i].astype(np.longdouble) * to_rad
    east = np.cos(source_dec) * np.sin(d_ra)
    # sin(a - b) of the declinations, and what the parallel bends away from the great circle.
    north = np.sin(source_dec - dec) + 2 * np.sin(dec) * np.cos(source_dec) * np.sin(d_ra / 2) ** 2
    score = np.zeros(len(pairs), dtype=np.longdouble)
    volume = np.ones(len(pairs), dtype=np.longdouble)
    for offset, errors, other in ((east, sources.ra_err, objects.ra_err), (north, sources.dec_err, objects.dec_err)):
        variance = _usable(errors)[i] ** 2 + _usable(other)[k] ** 2
        score += (offset / to_rad * 3600) ** 2 / variance / 2
        volume *= variance
    return score + np.log(volume) / 2


def _usable(errors_deg: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(errors_deg) & (errors_deg > 0), np.maximum(errors_deg * 3600.0, 0.05), 0.2)


class Candidates(NamedTuple):
    """(p, 2) pairs (source, object) within the gate in this order, their scores, and the group of each."""

    pairs: np.ndarray
    scores: np.ndarray
    group: np.ndarray


def candidates(sources: Positions, objects: Positions, radius_arcsec: float = 1.0) -> Candidates:
    """What there is to decide. Pairs at the very gate and the last digits of scores are those of double precision."""
    columns = _columns(sources), _columns(objects)
    pairs = _pairs_within(*columns, radius_arcsec * ARCSEC)
    scores = _pair_scores(*columns, pairs, 0.05, 0.2)
    n, m = len(sources), len(objects)
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], n + pairs[:, 1])), shape=(n + m, n + m))
    return Candidates(pairs, scores, connected_components(graph, directed=False)[1][pairs[:, 0]])


def best_matching(pairs: np.ndarray, scores: np.ndarray) -> tuple[int, float, list[int]]:
    """Most pairs, then least total: their number, the total, and which pairs."""
    rows, row = np.unique(pairs[:, 0], return_inverse=True)
    columns, column = np.unique(pairs[:, 1], return_inverse=True)
    n, m = len(rows), len(columns)
    shifted = scores - scores.min()
    without = (shifted.max() + 1.0) * (n + 1)
    cost = np.full((n, m + n), 10.0 * (n + 1) * without)
    cost[row, column] = shifted
    cost[:, m:] = without
    chosen = {(i, k) for i, k in zip(*linear_sum_assignment(cost), strict=True) if k < m}
    taken = [p for p in range(len(pairs)) if (row[p], column[p]) in chosen]
    return len(taken), float(scores[taken].sum()), taken


def is_only_best(pairs: np.ndarray, scores: np.ndarray) -> bool:
    """Whether every other matching has fewer pairs or a total that is clearly larger."""
    count, total, taken = best_matching(pairs, scores)
    for p in taken:
        rest = np.delete(np.arange(len(pairs)), p)
        if len(rest):
            other_count, other_total, _ = best_matching(pairs[rest], scores[rest])
            if other_count == count and other_total < total + TIE:
                return False
    return True


def mutual_nearest(pairs: np.ndarray, scores: np.ndarray) -> list[int]:
    """Pairs best for both; of equal scores the lower id is the better."""

    def best(side: int, member: int) -> int:
        own = np.flatnonzero(pairs[:, side] == member)
        return int(min(own, key=lambda p: (scores[p], pairs[p, 1 - side])))

    return [p for p in range(len(pairs)) if best(0, pairs[p, 0]) == p == best(1, pairs[p, 1])]


def whole_batch_matching(found: Candidates, n_sources: int, n_objects: int) -> np.ndarray:
    """LSST's rule of 2026: the least total over the whole batch, a source without object costing max(score) + 1."""
    weight = found.scores - found.scores.min(initial=0.0) + 1.0
    ghost = np.arange(n_sources)
    cost = coo_matrix(
        (
            np.concatenate([weight, np.full(n_sources, weight.max(initial=1.0) + 1.0)]),
            (np.concatenate([found.pairs[:, 0], ghost]), np.concatenate([found.pairs[:, 1], n_objects + ghost])),
        ),
        shape=(n_sources, n_objects + n_sources),
    ).tocsr()
    row, column = min_weight_full_bipartite_matching(cost)
    assigned = np.full(n_sources, -1, dtype=np.int64)
    assigned[row] = np.where(column < n_objects, column, -1)
    return assigned

"""Association against an exact decision of every group by slow means, in ordinary and malicious fields."""

from __future__ import annotations

import numpy as np
import pytest
from association_fields import (
    FIELDS,
    SCORE_TOLERANCE,
    TIE,
    VECTOR_TOLERANCE_ARCSEC,
    best_matching,
    candidates,
    exact_scores,
    is_only_best,
    mutual_nearest,
    separations_arcsec,
)
from test_dia_association import rows

from transforms.numerics.dia_association import associate

LIMIT_ARCSEC = 5.0


def check_field(name: str, seed: int) -> dict[str, int]:
    """Compare one field; how many groups of each kind it had."""
    sources, objects = FIELDS[name](np.random.default_rng(seed))
    found = associate(sources, objects, max_group_width_arcsec=LIMIT_ARCSEC)
    pairs, scores, group = candidates(sources, objects)
    separations = separations_arcsec(sources, objects)
    inside = np.zeros(separations.shape, dtype=bool)
    inside[tuple(pairs.T)] = True
    assert not np.any(inside & ~(separations <= 1.0 + VECTOR_TOLERANCE_ARCSEC))
    assert not np.any(~inside & (separations < 1.0 - VECTOR_TOLERANCE_ARCSEC))
    assert np.abs(scores - exact_scores(sources, objects, pairs)).max(initial=0.0) < SCORE_TOLERANCE

    expected = np.full(len(sources), -1, dtype=np.int64)
    contested, wide, counts = [], [], {"groups": 0, "contested": 0, "wide": 0, "tied": 0}
    for label in np.unique(group):
        own = np.flatnonzero(group == label)
        members, own_scores = pairs[own], scores[own]
        first = int(members[:, 0].min())
        counts["groups"] += 1
        if len(own) > 1:
            contested.append(first)
        head = rows(sources, np.array([first]))
        reach = [separations_arcsec(head, rows(p, members[:, side])).max() for side, p in enumerate((sources, objects))]
        width = 2.0 * max(reach)
        assert abs(width - LIMIT_ARCSEC) > 4 * VECTOR_TOLERANCE_ARCSEC  # else either answer would do
        if width > LIMIT_ARCSEC and len(own) > 1:
            wide.append(first)
            taken = mutual_nearest(members, own_scores)
        else:
            count, total, taken = best_matching(members, own_scores)
            if not is_only_best(members, own_scores):
                counts["tied"] += 1
                mine = [p for p in range(len(own)) if found.object_index[members[p, 0]] == members[p, 1]]
                assert len(mine) == count
                assert abs(own_scores[mine].sum() - total) < TIE
                taken = mine
        expected[members[taken, 0]] = members[taken, 1]
    assert found.object_index.tolist() == expected.tolist()
    taken_objects = expected[expected >= 0]
    assert len(np.unique(taken_objects)) == len(taken_objects)
    assert found.contested.tolist() == sorted(contested)
    assert found.wide.tolist() == sorted(wide)
    return {**counts, "contested": len(contested), "wide": len(wide)}


@pytest.mark.parametrize("name", FIELDS)
def test_assignments_are_those_of_the_exact_oracle(name: str) -> None:
    counts = [check_field(name, seed) for seed in range(6)]
    total = {key: sum(one[key] for one in counts) for key in counts[0]}
    assert total["groups"] > 50
    # Each field has what it is for.
    assert (total["contested"] > 20) == (name != "sparse")
    assert (total["tied"] > 20) == (name in ("grid of the gate", "doubled", "1e-13 degrees"))
    assert (total["wide"] > 5) == (name in ("chains", "grid of the gate", "clumps"))


@pytest.mark.long
@pytest.mark.parametrize("name", FIELDS)
def test_assignments_are_those_of_the_exact_oracle_in_many_fields(name: str) -> None:
    counts = [check_field(name, seed) for seed in range(100, 200)]
    print(name, {key: sum(one[key] for one in counts) for key in counts[0]})

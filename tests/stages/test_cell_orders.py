"""Alerts and tables are the same whatever the order of the sky cells, wherever on the sky."""

from __future__ import annotations

from pathlib import Path

import pytest
from sky_runs import elements, late_steps, make_sky, run_by_hand, together

from transforms.association import AssociationConfig

PLACES = {
    "mid-cell": (150.0, 2.0),
    "ra-zero": (0.0, 10.0),
    "ra-zero-far-south": (359.9999, -60.0),
    "corner of three base pixels": (45.0, 41.8103149),
    "north pole": (123.0, 89.995),
    "south pole": (10.0, -89.97),
}


@pytest.mark.parametrize("place", PLACES)
def test_alerts_and_tables_do_not_depend_on_the_cell_order(place: str, tmp_path: Path) -> None:
    sky = make_sky(11 + list(PLACES).index(place), *PLACES[place], tmp_path, n_objects=40, n_visits=4)
    # A visit without one detector, which comes late, and a repeat: in time, late and double at once.
    steps = [*late_steps(sky, 1, 0), *elements(sky)[:2]]
    expected = together(run_by_hand(steps, AssociationConfig(cell_order=8), sky.store))
    assert len(expected[0]) > 80
    for order in (9, 10, 11, 12, 13):
        found = run_by_hand(steps, AssociationConfig(cell_order=order), sky.store)
        assert together(found) == expected, order


@pytest.mark.parametrize("seed", range(3))
def test_alerts_do_not_depend_on_the_cell_order_in_crowded_fields(seed: int, tmp_path: Path) -> None:
    # 260 objects in 360 x 190 arcsec, half of them within an arcsecond of others: 14 a square arcminute.
    sky = make_sky(seed, 30.0, -30.0, tmp_path, n_objects=260, n_visits=4, clump_arcsec=1.2, images=False)
    expected = together(run_by_hand(sky.steps(), AssociationConfig(cell_order=8), sky.store))
    for order in (10, 13):
        assert together(run_by_hand(sky.steps(), AssociationConfig(cell_order=order), sky.store)) == expected, order

"""Alerts and tables are the same whatever the order of the sky cells, wherever on the sky."""

from __future__ import annotations

from pathlib import Path

import hpgeom
import numpy as np
import pytest
from sky_runs import PIXEL_ARCSEC, SIZE_PIX, detector_wcs, elements, late_steps, make_sky, run_by_hand, together

from transforms.association import AssociationConfig, _covered_cells
from transforms.sky_cells import cells_of

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


@pytest.mark.parametrize("seed", range(2))
def test_groups_wider_than_the_halo_do_not_depend_on_the_cell_order(seed: int, tmp_path: Path) -> None:
    # 420 objects in 30 x 30 arcsec around a corner of cells of every order: nearly all hang together.
    ra, dec = (float(axis[0, 0]) for axis in hpgeom.boundaries(1 << 8, np.array([270_000]), step=1))
    sky = make_sky(seed, ra, dec, tmp_path, n_objects=420, n_visits=2, width_pix=10.0, images=False)
    coarse = run_by_hand(sky.steps(), AssociationConfig(cell_order=8), sky.store)
    assert sum(one.counts["wide_groups"] for one in coarse.batches) > 0
    expected = together(coarse)
    for order in (10, 12, 13):
        assert together(run_by_hand(sky.steps(), AssociationConfig(cell_order=order), sky.store)) == expected, order


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", [8, 11, 13])
def test_detector_is_announced_to_all_cells_within_its_halo(place: str, order: int) -> None:
    config = AssociationConfig(cell_order=order)
    margin = config.halo_arcsec / PIXEL_ARCSEC
    rng = np.random.default_rng(3)
    for detector in (0, 1):
        wcs = detector_wcs(*PLACES[place], detector)
        along = rng.uniform(-margin, SIZE_PIX - 1 + margin, 5000)
        across = rng.choice([-margin, SIZE_PIX - 1 + margin, 30.0], 5000)
        x, y = np.concatenate([along, across]), np.concatenate([across, along])
        ra, dec = wcs.pixel_to_world_values(x, y)
        assert set(cells_of(ra % 360.0, dec, order)) <= set(_covered_cells(wcs, (SIZE_PIX, SIZE_PIX), config))

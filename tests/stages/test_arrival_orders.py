"""Alerts and tables are the same to the byte however a sky is cut into cells and its detectors arrive."""

from __future__ import annotations

from pathlib import Path

import hpgeom
import numpy as np
import pytest
from sky_runs import Sky, any_delivery, make_sky, run_by_hand, run_on_stream, together

from transforms.association import AssociationConfig

FIRST_LONG = 1000


def any_sky(seed: int, folder: Path, rng: np.random.Generator, *, images: bool) -> Sky:
    """A small sky anywhere, often where cells of several orders, or the coordinates, have their corners."""
    place = rng.integers(0, 5)
    ra, dec = rng.uniform(0.0, 360.0), np.degrees(np.arcsin(rng.uniform(-1.0, 1.0)))
    if place == 0:
        cell = rng.integers(0, 12 << 16, 1)
        ra, dec = (float(axis[0, 0]) for axis in hpgeom.boundaries(1 << 8, cell, step=1))
    elif place == 1:
        ra = rng.choice([0.0, 359.9999, 1e-4])
    elif place == 2:
        dec = rng.choice([-1.0, 1.0]) * rng.uniform(89.9, 90.0)
    return make_sky(
        seed,
        float(ra),
        float(np.clip(dec, -89.999, 89.999)),
        folder,
        n_objects=int(rng.integers(5, 60)),
        n_visits=int(rng.integers(2, 6)),
        clump_arcsec=float(rng.choice([0.3, 0.7, 1.5])),
        width_pix=float(rng.choice([8.0, 30.0, 124.0])),
        images=images,
    )


def check_delivery(seed: int, folder: Path, *, images: bool = False) -> None:
    """One sky in cells of one order in time, in those of another in any order: the same alerts and tables."""
    rng = np.random.default_rng(seed)
    sky = any_sky(seed, folder, rng, images=images)
    store = sky.store if images else None
    orders = rng.permutation(np.arange(8, 14))[:2].tolist()
    expected = run_by_hand(sky.steps(), AssociationConfig(cell_order=orders[0]), store)
    found = run_by_hand(any_delivery(sky, rng), AssociationConfig(cell_order=orders[1]), store, rng)
    assert together(found) == together(expected), orders
    assert len(together(expected)[0]) > 0
    if images and len(sky.visits) > 2:
        assert sum(len(one.forced_sources) for one in expected.batches) > 0


@pytest.mark.parametrize("seed", range(40))
def test_delivery_and_cell_order_change_nothing(seed: int, tmp_path: Path) -> None:
    check_delivery(seed, tmp_path)


@pytest.mark.parametrize("seed", range(100, 106))
def test_delivery_and_cell_order_change_no_forced_flux(seed: int, tmp_path: Path) -> None:
    check_delivery(seed, tmp_path, images=True)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(FIRST_LONG, FIRST_LONG + 600))
def test_delivery_and_cell_order_change_nothing_in_many_skies(seed: int, tmp_path: Path) -> None:
    check_delivery(seed, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(FIRST_LONG + 600, FIRST_LONG + 660))
def test_delivery_and_cell_order_change_no_forced_flux_in_many_skies(seed: int, tmp_path: Path) -> None:
    check_delivery(seed, tmp_path, images=True)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(FIRST_LONG + 660, FIRST_LONG + 680))
def test_beam_gives_the_same_with_any_delivery(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    sky = any_sky(seed, tmp_path, rng, images=True)
    orders = rng.permutation(np.arange(8, 12))[:2].tolist()
    expected = run_by_hand(sky.steps(), AssociationConfig(cell_order=orders[0]), sky.store)
    found = run_on_stream(any_delivery(sky, rng), AssociationConfig(cell_order=orders[1]), sky.store, tmp_path)
    assert together(found) == together(expected), orders

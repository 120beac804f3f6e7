"""An empty and a crowded patch of sky for the tests of sky and rendering."""

from __future__ import annotations

from dataclasses import replace

from transforms.numerics.sky_simulation import SkyConfig

EPOCH = 61367.1
EMPTY = SkyConfig(
    150.1,
    2.2,
    110.0,
    110.0,
    EPOCH,
    appearance_window_h=0.5,
    stars_per_arcmin2=0.0,
    galaxies_per_arcmin2=0.0,
    transients_per_arcmin2=0.0,
    variables_per_arcmin2=0.0,
    asteroids_per_arcmin2=0.0,
)
FULL = replace(
    EMPTY,
    stars_per_arcmin2=120.0,
    galaxies_per_arcmin2=40.0,
    transients_per_arcmin2=8.0,
    variables_per_arcmin2=6.0,
    asteroids_per_arcmin2=3.0,
)

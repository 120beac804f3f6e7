"""Warping beside reproject's interpolation, over projections and distortions that surveys use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from astropy.wcs import WCS
from simulated_pair import moffat

from transforms.numerics.warping import warp_exposure, wcs_coordinate_grid

reproject = pytest.importorskip("reproject")

SHAPE, TEMPLATE_SHAPE = (300, 340), (360, 400)
PIXEL_DEG = 0.2 / 3600


def tangent(angle_deg: float, scale: float, crpix: tuple[float, float]) -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [359.99, -60.0], list(crpix)
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    wcs.wcs.cd = scale * PIXEL_DEG * np.array([[-c, s], [s, c]])
    wcs.wcs.set()
    return wcs


def with_sip(wcs: WCS) -> WCS:
    header = wcs.to_header(relax=True)
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
    for axis in "AB":
        header[f"{axis}_ORDER"] = 2
    header["A_2_0"], header["A_1_1"], header["B_0_2"], header["B_2_0"] = 2e-6, -1e-6, 1.5e-6, -2e-6
    return WCS(header)


def with_tpv(wcs: WCS) -> WCS:
    header = wcs.to_header(relax=True)
    header["CTYPE1"], header["CTYPE2"] = "RA---TPV", "DEC--TPV"
    header["PV1_1"], header["PV2_1"] = 1.0, 1.0
    header["PV1_4"], header["PV1_5"], header["PV2_4"] = 0.04, -0.03, 0.03  # per degree: 2e-6 per pixel
    return WCS(header)


@pytest.mark.parametrize("distorted", [lambda wcs: wcs, with_sip, with_tpv], ids=["TAN", "SIP", "TPV"])
def test_warped_stars_are_those_of_a_quintic_spline(distorted: Callable[[WCS], WCS]) -> None:
    template_wcs = distorted(tangent(3.0, 1.02, (200.0, 180.0)))
    science_wcs = tangent(0.0, 1.0, (171.3, 148.6))
    rng = np.random.default_rng(5)
    y, x = np.mgrid[: TEMPLATE_SHAPE[0], : TEMPLATE_SHAPE[1]].astype(float)
    image = sum(moffat(x - cx, y - cy, 4.5) for cx, cy in rng.uniform(30, 330, (60, 2)))
    grid = wcs_coordinate_grid(science_wcs, template_wcs, SHAPE)
    mask = np.zeros(TEMPLATE_SHAPE, dtype=np.int32)
    ours = warp_exposure(image, np.ones(TEMPLATE_SHAPE), mask, grid, SHAPE)
    theirs, footprint = reproject.reproject_interp((image, template_wcs), science_wcs, shape_out=SHAPE, order=5)
    nodes_y, nodes_x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    template_x, template_y = template_wcs.all_world2pix(*science_wcs.all_pix2world(nodes_x, nodes_y, 0), 0)
    area = np.abs(
        np.gradient(template_x, axis=1) * np.gradient(template_y, axis=0)
        - np.gradient(template_x, axis=0) * np.gradient(template_y, axis=1)
    )
    inside = ~ours.no_data & (footprint > 0)
    inside[:3] = inside[-3:] = inside[:, :3] = inside[:, -3:] = False  # one-sided derivatives
    assert np.mean(inside) > 0.9
    # either is within 0.11 % of a star's peak at this width; the grid of coordinates is good to 5e-4 pixels
    difference = np.abs(ours.image - theirs * area)[inside]
    assert difference.max() < 2.5e-3 * image.max()
    assert np.sqrt(np.mean(difference**2)) < 2e-4 * image.max()

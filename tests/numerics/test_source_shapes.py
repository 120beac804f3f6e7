"""Which sources are fitted as dipoles and trails, extendedness, angles on the sky, and the whole on any pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shape_scenes import NOISE, cells, extreme_planes, flux_of_snr, psf_image, trail

from transforms.numerics.detection import Detections, find_peaks, lobe_distance, significance_map
from transforms.numerics.measurement import Measurements, measure_sources
from transforms.numerics.psf_grid import PsfGrid
from transforms.numerics.source_shapes import Shapes, lines_on_sky, measure_shapes

FWHM = 4.0
SIDE = 51
KINDS = ("point", "fading", "dipole", "trail", "blob")


def mixed_field(n_side: int, seed: int) -> tuple[NDArray, NDArray, NDArray[np.str_]]:
    """Science and template with one source in each cell, and their kinds."""
    rng = np.random.default_rng(seed)
    science, template = rng.normal(0.0, NOISE, (2, n_side * SIDE, n_side * SIDE))
    kinds = rng.choice(KINDS, n_side * n_side)
    for kind, cell in zip(kinds, cells(n_side, SIDE), strict=True):
        x, y = SIDE / 2 + rng.uniform(-0.5, 0.5, 2)
        angle = rng.uniform(0.0, np.pi)
        cosine, sine = np.cos(angle), np.sin(angle)
        line = (14.0 * cosine, 14.0 * sine) if kind == "trail" else (0.0, 0.0)
        drawn = trail((SIDE, SIDE), 2.0 * FWHM if kind == "blob" else FWHM, x, y, *line)
        flux = flux_of_snr(40.0, drawn, np.sqrt(2.0) * NOISE)
        (template if kind == "fading" else science)[cell] += flux * drawn
        if kind == "dipole":
            template[cell] += flux * trail((SIDE, SIDE), FWHM, x + 2.0 * cosine, y + 2.0 * sine, 0.0, 0.0)
    return science, template, kinds


def look(science: NDArray, template: NDArray, cells_of_psf: int = 1) -> tuple[Detections, Measurements, Shapes]:
    variance = np.full(science.shape, NOISE**2)
    difference, unmasked, psf = science - template, np.zeros(science.shape, bool), psf_image(FWHM)
    planes: dict[str, Any] = {
        "difference": difference,
        "variance": 2.0 * variance,
        "science": science,
        "science_variance": variance,
        "matched_template": template,
        "template_variance": variance,
        "bad": unmasked,
    }
    snr_map, _ = significance_map(difference, 2.0 * variance, unmasked, psf)
    found = find_peaks(snr_map, unmasked, 5.0, lobe_distance(psf))
    measured = measure_sources(**planes, psf=psf, detections=found)
    grid = PsfGrid(np.tile(psf, (cells_of_psf, cells_of_psf, 1, 1)))
    return found, measured, measure_shapes(**planes, psf=grid, science_psf=grid, detections=found, measured=measured)


def kind_of_each(measured: Measurements, kinds: NDArray[np.str_]) -> NDArray[np.str_]:
    n_side = round(np.sqrt(kinds.size))
    cell = (measured.y // SIDE).astype(int) * n_side + (measured.x // SIDE).astype(int)
    return kinds[cell]


def test_each_kind_is_taken_for_what_it_is() -> None:
    science, template, kinds = mixed_field(11, seed=1)
    found, measured, shapes = look(science, template)
    kind = kind_of_each(measured, kinds)
    strong = np.abs(found.peak_snr) > 8.0  # noise peaks above 5 sigma: 1 in 10 such fields
    for name in KINDS:
        assert np.count_nonzero(strong & (kind == name)) >= 10
    # The changes have S/N 40: dipoles of 2 pixels have lobes of S/N 16, the moments of blobs are known to 7 %.
    is_dipole = shapes.dipoles.is_dipole[strong]
    assert is_dipole[kind[strong] == "dipole"].mean() > 0.9
    assert not is_dipole[kind[strong] != "dipole"].any()
    is_trail = shapes.trails.good[strong] & shapes.trails.suspect_long[strong]
    assert is_trail[kind[strong] == "trail"].mean() > 0.9
    assert not is_trail[kind[strong] != "trail"].any()
    extended = shapes.extendedness[strong]
    point = np.isin(kind[strong], ("point", "fading"))
    assert np.nanmax(extended[point]) < 0.3 and np.nanmedian(extended[point]) < 0.05
    assert np.nanmin(extended[kind[strong] == "blob"]) > 0.7


def test_equal_psfs_of_a_stack_give_the_numbers_of_one() -> None:
    science, template, _ = mixed_field(4, seed=2)
    _, _, one = look(science, template)
    _, _, many = look(science, template, cells_of_psf=3)
    for column, other in zip((*one.dipoles, *one.trails), (*many.dipoles, *many.trails), strict=True):
        np.testing.assert_array_equal(column, other)


def test_no_sources_give_empty_columns() -> None:
    found, _, shapes = look(np.zeros((40, 40)), np.zeros((40, 40)))
    assert found.peak_x.size == 0
    for columns in (shapes.dipoles, shapes.trails, (shapes.extendedness, shapes.dipole_attempted)):
        assert all(column.shape == (0,) for column in columns)


@pytest.mark.parametrize("seed", range(8))
def test_any_pixels_give_finite_numbers_or_nan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    planes = [extreme_planes(rng, (48, 53)) for _ in range(3)]
    (difference, variance, bad), psf = planes[0], psf_image(rng.uniform(1.5, 6.0), size=25)
    with np.errstate(all="ignore"):
        snr_map, _ = significance_map(difference, variance, bad, psf)
        found = find_peaks(snr_map, bad, 3.0, lobe_distance(psf))
        arguments: dict[str, Any] = {
            "difference": difference,
            "variance": variance,
            "science": planes[1][0],
            "science_variance": planes[1][1],
            "matched_template": planes[2][0],
            "template_variance": planes[2][1],
            "bad": bad,
        }
        measured = measure_sources(**arguments, psf=psf, detections=found)
    shapes = measure_shapes(**arguments, psf=psf, science_psf=psf, detections=found, measured=measured)
    assert not (shapes.dipoles.good & ~shapes.dipole_attempted).any()
    assert not (shapes.trails.good & ~shapes.trail_attempted).any()
    with np.errstate(invalid="ignore"):
        assert (np.isnan(shapes.extendedness) | ((shapes.extendedness >= 0.0) & (shapes.extendedness <= 1.0))).all()


def test_angles_on_the_sky_count_from_north_through_east() -> None:
    # x to the west and y to the north at 0.2 arcsec a pixel, as on an unrotated detector.
    jacobian = np.broadcast_to(np.diag([-0.2, 0.2]) / 3600.0, (4, 2, 2))
    dx, dy = np.array([0.0, -3.0, 0.0, 1.0]), np.array([5.0, 0.0, -5.0, -1.0])
    covariance = np.broadcast_to(np.diag([0.04, 0.01]), (4, 2, 2))
    lines = lines_on_sky(jacobian, dx, dy, covariance)
    np.testing.assert_allclose(lines.angle_deg, [0.0, 90.0, 180.0, 225.0], atol=1e-12)
    np.testing.assert_allclose(lines.length_arcsec, 0.2 * np.hypot(dx, dy))
    np.testing.assert_allclose(lines.length_err_arcsec, 0.2 * np.array([0.1, 0.2, 0.1, np.sqrt(0.025)]))
    np.testing.assert_allclose(lines.angle_err_deg[:2], np.degrees([0.2 / 5.0, 0.1 / 3.0]))

"""Registration by the stars, on synthetic star fields whose transformation is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from transforms.numerics.registration import RegistrationError, StarList, find_stars, register

SIDE = 360
SIGMA_PIX = 2.0
NOISE = 5.0
AFFINE = np.array([[0.9994, 0.0031, -12.37], [-0.0029, 1.0005, 8.81]])


def star_positions(n_stars: int = 90, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    flux = 3000.0 * random.pareto(1.2, n_stars) + 5000.0
    return random.uniform(25, SIDE - 25, (n_stars, 2)), np.minimum(flux, 300_000.0)


def draw(positions: np.ndarray, flux: np.ndarray, seed: int, sigma_pix: float = SIGMA_PIX) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    image = np.random.default_rng(seed).normal(200.0, NOISE, (SIDE, SIDE))
    for (star_x, star_y), light in zip(positions, flux, strict=True):
        image += (
            light / (2 * np.pi * sigma_pix**2) * np.exp(-((x - star_x) ** 2 + (y - star_y) ** 2) / (2 * sigma_pix**2))
        )
    return image.astype(np.float32)


def no_bad() -> np.ndarray:
    return np.zeros((SIDE, SIDE), dtype=bool)


@pytest.fixture(scope="module")
def two_lists() -> tuple[StarList, StarList]:
    positions, flux = star_positions()
    moved = positions @ AFFINE[:, :2].T + AFFINE[:, 2]
    first = find_stars(draw(positions, flux, seed=1), no_bad())
    second = find_stars(draw(moved, 0.7 * flux, seed=2, sigma_pix=1.2 * SIGMA_PIX), no_bad())
    return first, second


def greatest_deviation_pix(affine: np.ndarray, truth: np.ndarray) -> float:
    corners = np.array([[0, 0], [SIDE, 0], [0, SIDE], [SIDE, SIDE]], dtype=float)
    difference = affine - truth
    return float(np.hypot(*(corners @ difference[:, :2].T + difference[:, 2]).T).max())


def test_affine_transformation_is_found_across_a_change_of_seeing_and_flux(
    two_lists: tuple[StarList, StarList],
) -> None:
    found = register(*two_lists)
    # centres of 5000 adu at 5 adu noise are good to 0.02 pixels, blends to 0.2; 50 stars: 0.03 at the corners
    assert found.n_stars > 50
    assert greatest_deviation_pix(found.affine, AFFINE) < 0.1


def test_flux_ratio_is_that_of_the_stars(two_lists: tuple[StarList, StarList]) -> None:
    # apertures grow with the seeing, so that the ratio holds to what neighbours add: 3 %
    assert register(*two_lists).flux_ratio == pytest.approx(0.7, rel=0.03)


def test_the_way_back_is_the_inverse(two_lists: tuple[StarList, StarList]) -> None:
    there, back = register(*two_lists), register(two_lists[1], two_lists[0])
    product = np.vstack((back.affine, [0, 0, 1])) @ np.vstack((there.affine, [0, 0, 1]))
    # least squares in the one frame or in the other differ by less than the error of the fit
    assert greatest_deviation_pix(product[:2], np.eye(3)[:2]) < 0.05


def test_repeating_a_registration_gives_the_same_bytes(two_lists: tuple[StarList, StarList]) -> None:
    # the search for asterisms is random within, the answer must not be
    results = {register(*two_lists).affine.tobytes() for _ in range(5)}
    assert len(results) == 1


def test_a_rotation_by_180_degrees_is_found() -> None:
    positions, flux = star_positions()
    turned = SIDE - 1.0 - positions
    found = register(find_stars(draw(positions, flux, 1), no_bad()), find_stars(draw(turned, flux, 2), no_bad()))
    truth = np.array([[-1.0, 0.0, SIDE - 1.0], [0.0, -1.0, SIDE - 1.0]])
    assert greatest_deviation_pix(found.affine, truth) < 0.1


def test_seeing_is_measured_for_ranking(two_lists: tuple[StarList, StarList]) -> None:
    # half-light radii of isolated Gaussians give the FWHM; neighbours widen both alike
    assert two_lists[1].fwhm_pix / two_lists[0].fwhm_pix == pytest.approx(1.2, rel=0.1)
    assert two_lists[0].fwhm_pix == pytest.approx(2.3548 * SIGMA_PIX, rel=0.15)


def test_different_fields_are_refused_with_the_numbers(two_lists: tuple[StarList, StarList]) -> None:
    positions, flux = star_positions(seed=77)
    other = find_stars(draw(positions, flux, seed=3), no_bad())
    with pytest.raises(RegistrationError, match=r"no registration of \d+ to \d+ stars"):
        register(two_lists[0], other)


def test_an_empty_sky_is_refused() -> None:
    noise = np.random.default_rng(0).normal(200.0, NOISE, (SIDE, SIDE)).astype(np.float32)
    with pytest.raises(RegistrationError, match="12 are needed"):
        find_stars(noise, no_bad())


def test_an_image_without_good_pixels_is_refused() -> None:
    with pytest.raises(RegistrationError, match="no background"):
        find_stars(np.full((SIDE, SIDE), np.nan, dtype=np.float32), no_bad())


def test_stars_on_bad_pixels_are_left_out() -> None:
    positions, flux = star_positions()
    bad = no_bad()
    bad[int(positions[0, 1]), int(positions[0, 0])] = True
    stars = find_stars(draw(positions, flux, seed=1), bad)
    assert np.hypot(stars.x - positions[0, 0], stars.y - positions[0, 1]).min() > 2.0


def test_stars_that_lie_on_a_line_are_refused(two_lists: tuple[StarList, StarList]) -> None:
    first = two_lists[0]
    line = replace(first, x=np.linspace(10, 300, len(first.x)), y=np.linspace(10, 300, len(first.x)))
    with pytest.raises(RegistrationError):
        register(line, line)

"""The rules score what it claims to, on simulated stamps at three samplings, and is monotone and scale-free."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transforms.numerics.detection import find_peaks, lobe_distance, significance_map
from transforms.numerics.measurement import measure_sources
from transforms.numerics.reliability import RELIABILITY_VERSION, score

SIZE, SPACING, N_SIDE, NOISE = 41, 70, 6, 3.0
FWHMS = (2.1, 4.7, 8.0)  # undersampled like ZTF, like LSST, a small telescope
Stamp = NDArray[np.float64]
Source = Callable[[float, float, float], Stamp]  # fwhm, dx, dy -> stamp in units of a flux of S/N 1

CLEAN = {
    "snr": 20.0,
    "psf_flux": 1000.0,
    "psf_flux_err": 50.0,
    "core_chi2": 50.0,
    "core_n_pixels": 50.0,
    "peak_excess": 0.0,
    "size_ratio": 1.0,
    "opposite_snr": 1.0,
    "good_weight": 1.0,
    "star_flux": 1000.0,
    "near_saturated": 0.0,
}


def moffat(fwhm: float, dx: float = 0.0, dy: float = 0.0) -> Stamp:
    alpha = fwhm / (2.0 * np.sqrt(2.0 ** (1.0 / 3.5) - 1.0))
    v, u = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    image: Stamp = (1.0 + ((u - dx) ** 2 + (v - dy) ** 2) / alpha**2) ** -3.5
    return image * 2.5 / (np.pi * alpha**2)


def flux_of_unit_snr(fwhm: float) -> float:
    return float(NOISE / np.sqrt((moffat(fwhm) ** 2).sum()))


def scores(source: Source, fwhm: float, star: Source | None = None, seed: int = 1) -> NDArray[np.float32]:
    """Reliability of the sources that the whole detection and measurement finds on a grid of copies."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(0.0, NOISE, (N_SIDE * SPACING, N_SIDE * SPACING))
    template = np.zeros_like(difference)
    unit = flux_of_unit_snr(fwhm)
    for cy in range(SPACING // 2, difference.shape[0], SPACING):
        for cx in range(SPACING // 2, difference.shape[1], SPACING):
            dx, dy = rng.uniform(-0.5, 0.5, 2)
            stamp = np.s_[cy - SIZE // 2 : cy + SIZE // 2 + 1, cx - SIZE // 2 : cx + SIZE // 2 + 1]
            difference[stamp] += unit * source(fwhm, dx, dy)
            if star is not None:
                template[stamp] += unit * star(fwhm, dx, dy)
    variance, bad = np.full_like(difference, NOISE**2), np.zeros(difference.shape, bool)
    snr_map, noise_ratio = significance_map(difference, variance, bad, moffat(fwhm))
    peaks = find_peaks(snr_map, bad, 5.0, lobe_distance(moffat(fwhm)))
    found = measure_sources(
        difference, variance, template + difference, variance, template, variance, bad, moffat(fwhm), peaks
    )
    columns = {name: getattr(found, name) for name in CLEAN if name != "near_saturated"}
    return score(**columns, near_saturated=np.zeros(found.snr.size, bool), noise_ratio=noise_ratio)


def one_score(**changes: float) -> float:
    columns = {name: np.array([changes.get(name, value)]) for name, value in CLEAN.items()}
    return float(score(**columns, noise_ratio=changes.get("noise_ratio", 1.0))[0])


def cosmic_ray(snr: float) -> Source:
    def stamp(fwhm: float, dx: float, dy: float) -> Stamp:
        image = np.zeros((SIZE, SIZE))
        psf = moffat(fwhm)
        image[SIZE // 2, SIZE // 2] = snr * (psf**2).sum() / psf.max()  # matched-filter S/N of a single pixel
        return image

    return stamp


def trail(snr: float, length_fwhm: float) -> Source:
    def stamp(fwhm: float, dx: float, dy: float) -> Stamp:
        along = np.linspace(-0.5, 0.5, 31) * length_fwhm * fwhm
        return snr * np.mean([moffat(fwhm, dx + 0.8 * s, dy + 0.6 * s) for s in along], axis=0)

    return stamp


def dipole(snr: float, separation_fwhm: float) -> Source:
    def stamp(fwhm: float, dx: float, dy: float) -> Stamp:
        half = 0.5 * separation_fwhm * fwhm
        return snr * (moffat(fwhm, dx + half, dy) - moffat(fwhm, dx - half, dy))

    return stamp


def width_mismatch(snr: float, wider: float) -> Source:
    def stamp(fwhm: float, dx: float, dy: float) -> Stamp:
        return snr * (moffat(fwhm * wider, dx, dy) - moffat(fwhm, dx, dy))

    return stamp


def point(snr: float) -> Source:
    return lambda fwhm, dx, dy: snr * moffat(fwhm, dx, dy)


@pytest.mark.parametrize("fwhm", FWHMS)
@pytest.mark.parametrize("snr", [9.0, 30.0, 1000.0, -9.0, -30.0])
def test_clean_point_sources_of_either_sign_score_high(fwhm: float, snr: float) -> None:
    found = scores(point(snr), fwhm)
    assert found.size == N_SIDE**2
    # 36 noisy copies: one may have an odd neighbour.
    assert np.sort(found)[1] > 0.9


@pytest.mark.parametrize("fwhm", FWHMS)
@pytest.mark.parametrize("snr", [12.0, 100.0])
def test_single_pixel_cosmic_rays_score_low(fwhm: float, snr: float) -> None:
    found = scores(cosmic_ray(snr), fwhm)
    assert found.size == N_SIDE**2
    assert found.max() < 0.1


@pytest.mark.parametrize("fwhm", FWHMS)
@pytest.mark.parametrize(("snr", "separation_fwhm"), [(200.0, 0.1), (40.0, 0.5), (30.0, 1.0)])
def test_symmetric_dipoles_score_low(fwhm: float, snr: float, separation_fwhm: float) -> None:
    found = scores(dipole(snr, separation_fwhm), fwhm)
    assert found.size >= N_SIDE**2
    assert np.sort(found)[-2] < 0.3


@pytest.mark.parametrize("fwhm", FWHMS)
@pytest.mark.parametrize("length_fwhm", [0.5, 1.0, 1.5])
def test_short_trails_stay_reliable(fwhm: float, length_fwhm: float) -> None:
    found = scores(trail(40.0, length_fwhm), fwhm)
    assert found.size == N_SIDE**2
    assert found.min() > 0.5


@pytest.mark.parametrize("fwhm", FWHMS)
def test_trails_too_long_for_the_psf_fit_stay_reliable(fwhm: float) -> None:
    # Stamps of 41 pixels hold a trail of 3 FWHM of 8 pixels; each piece of a broken one counts.
    found = scores(trail(80.0, 3.0), fwhm)
    assert found.size >= N_SIDE**2
    assert np.sort(found)[1] > 0.5


def test_a_clean_source_next_to_saturation_is_doubtful_but_not_dropped() -> None:
    assert 0.1 < one_score(near_saturated=1.0) < 0.5


@pytest.mark.parametrize("fwhm", FWHMS)
def test_a_clean_fading_star_stays_reliable(fwhm: float) -> None:
    assert scores(point(-30.0), fwhm, star=point(300.0)).min() > 0.9


@pytest.mark.parametrize("fwhm", FWHMS)
def test_residuals_of_a_bright_star_with_a_wrong_width_score_low(fwhm: float) -> None:
    found = scores(width_mismatch(3000.0, 1.03), fwhm, star=point(3000.0))
    assert found.size >= N_SIDE**2
    assert np.median(found) < 0.2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("peak_excess", [0.0, 0.2, 1.0, 5.0]),
        ("core_chi2", [50.0, 200.0, 400.0, 4000.0]),
        ("size_ratio", [1.0, 0.6, 0.3, 0.0, -1.0]),
        ("opposite_snr", [0.0, 7.0, 10.0, 20.0]),
        ("good_weight", [1.0, 0.8, 0.5, 0.0]),
        ("star_flux", [1e3, 2e4, 1e5, 1e7]),
        ("near_saturated", [0.0, 1.0]),
        ("snr", [20.0, 7.0, 6.0, 5.0]),
    ],
)
def test_each_defect_lowers_the_score_and_never_raises_it(name: str, values: list[float]) -> None:
    found = [one_score(**{name: value}) for value in values]
    assert all(later <= earlier for earlier, later in pairwise(found))
    assert found[-1] < found[0] == one_score()


def test_a_known_noise_ratio_excuses_the_chi_square_it_causes() -> None:
    assert one_score(core_chi2=4.0 * 50.0, noise_ratio=2.0) == one_score()
    assert one_score(core_chi2=4.0 * 50.0, noise_ratio=np.nan) == one_score(core_chi2=4.0 * 50.0)
    assert one_score(core_chi2=4.0 * 50.0) < one_score()


def test_the_score_does_not_depend_on_units_or_on_the_sign_of_the_flux() -> None:
    assert one_score(psf_flux=8000.0, psf_flux_err=400.0, star_flux=160000.0) == one_score(star_flux=20000.0)
    assert one_score(psf_flux=-1000.0) == one_score()


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, np.nan) for name in CLEAN if name != "size_ratio"]
    + [
        ("psf_flux", np.inf),
        ("psf_flux", 0.0),
        ("psf_flux_err", np.inf),
        ("psf_flux_err", 0.0),
        ("psf_flux_err", -50.0),
    ],
)
def test_what_was_not_measured_scores_zero(name: str, value: float) -> None:
    assert one_score(**{name: value}) == 0.0


def test_a_size_that_was_not_measured_costs_nothing() -> None:
    assert one_score(size_ratio=np.nan) == one_score()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), min_size=len(CLEAN), max_size=len(CLEAN)), st.floats())
def test_any_features_give_a_score_between_zero_and_one(values: list[float], noise_ratio: float) -> None:
    columns = {name: np.array([value]) for name, value in zip(CLEAN, values, strict=True)}
    found = score(**columns, noise_ratio=noise_ratio)
    assert found.dtype == np.float32
    assert 0.0 <= found[0] <= 1.0


def test_the_version_fits_the_seven_characters_of_the_schema() -> None:
    assert RELIABILITY_VERSION == "rules-2"
    assert len(RELIABILITY_VERSION) <= 7

"""The shipped model scores what it claims to, on stamps made without the simulator that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transforms.numerics.detection import find_peaks, lobe_distance, significance_map
from transforms.numerics.measurement import measure_sources
from transforms.numerics.reliability import TreeModel, TreeModelError, check_model, raw_score, score
from transforms.numerics.reliability_features import FEATURES, reliability_features
from transforms.numerics.source_shapes import measure_shapes
from transforms.reliability_model import LONGEST_VERSION, ReliabilityModelError, read_model, shipped_model, write_model

SIZE, SPACING, N_SIDE, NOISE = 41, 70, 6, 3.0
RESIDUAL_PART = 0.01  # what a good subtraction leaves
FWHMS = (2.1, 4.7, 8.0)  # undersampled like ZTF, like LSST, a small telescope
Stamp = NDArray[np.float64]
Source = Callable[[float, float, float], Stamp]  # fwhm, dx, dy -> stamp in units of a flux of S/N 1


def moffat(fwhm: float, dx: float = 0.0, dy: float = 0.0) -> Stamp:
    alpha = fwhm / (2.0 * np.sqrt(2.0 ** (1.0 / 3.5) - 1.0))
    v, u = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    image: Stamp = (1.0 + ((u - dx) ** 2 + (v - dy) ** 2) / alpha**2) ** -3.5
    return image * 2.5 / (np.pi * alpha**2)


def flux_of_unit_snr(fwhm: float) -> float:
    return float(NOISE / np.sqrt((moffat(fwhm) ** 2).sum()))


def features_of(
    source: Source,
    fwhm: float,
    star: Source | None = None,
    seed: int = 1,
    *,
    scale: float = 1.0,
    negated: bool = False,
    mirrored: bool = False,
) -> NDArray[np.float32]:
    """Features of the sources that the whole detection and measurement finds on a grid of copies."""
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
    science = template + difference
    if negated:
        difference, science, template = -difference, template, science
    if mirrored:
        difference, science, template = (np.flip(plane, axis=1) for plane in (difference, science, template))
    difference, science, template = (scale * plane for plane in (difference, science, template))
    variance, bad = np.full_like(difference, (scale * NOISE) ** 2), np.zeros(difference.shape, bool)
    snr_map, noise_ratio = significance_map(difference, variance, bad, moffat(fwhm))
    peaks = find_peaks(snr_map, bad, 5.0, lobe_distance(moffat(fwhm)))
    planes = (difference, variance, science, variance, template, variance, bad)
    found = measure_sources(*planes, moffat(fwhm), peaks)
    shapes = measure_shapes(*planes, moffat(fwhm), moffat(fwhm), peaks, found)
    images = (difference, variance, science, template, bad, bad)
    return reliability_features(*images, moffat(fwhm), peaks, found, shapes, noise_ratio, RESIDUAL_PART)


def scores(source: Source, fwhm: float, star: Source | None = None, seed: int = 1) -> NDArray[np.float32]:
    return score(features_of(source, fwhm, star, seed), shipped_model().trees)


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
    # By the model's card 98.6 % of transients beyond 6 sigma score above 0.9 and 99.5 % above the threshold of 0.5. So
    # of 36 noisy copies two or more lie below 0.5 once in 70 fields; that 6 lie below 0.9 once in 100,000.
    assert np.sort(found)[1] > 0.5
    assert np.sort(found)[5] > 0.9


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
    # 36 noisy copies: one may have an odd neighbour. Lobes a FWHM apart look most like two sources.
    assert np.sort(found)[-2] < (shipped_model().threshold if separation_fwhm == 1.0 else 0.1)
    assert np.median(found) < 0.2


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


@pytest.mark.parametrize("fwhm", FWHMS)
def test_a_clean_fading_star_stays_reliable(fwhm: float) -> None:
    assert scores(point(-30.0), fwhm, star=point(300.0)).min() > 0.9


@pytest.mark.parametrize("fwhm", FWHMS)
def test_residuals_of_a_bright_star_with_a_wrong_width_score_low(fwhm: float) -> None:
    found = scores(width_mismatch(3000.0, 1.03), fwhm, star=point(3000.0))
    assert found.size >= N_SIDE**2
    assert np.median(found) < 0.2


def test_units_change_no_feature_beyond_rounding() -> None:
    as_it_is, scaled = (features_of(point(20.0), 4.7, point(50.0), scale=scale) for scale in (1.0, 1024.0))
    # 1024 scales every float without rounding; only the aperture sums of `sep` and log10 may round anew.
    np.testing.assert_allclose(scaled, as_it_is, rtol=1e-5, atol=1e-6)


def test_features_do_not_know_the_sign() -> None:
    as_it_is, negated = (features_of(point(20.0), 4.7, point(50.0), negated=negated) for negated in (False, True))
    np.testing.assert_allclose(negated, as_it_is, rtol=1e-5, atol=1e-6)


def test_features_do_not_know_left_from_right() -> None:
    as_it_is, mirrored = (features_of(dipole(40.0, 1.0), 4.7, mirrored=mirrored) for mirrored in (False, True))
    # The order of sources differs; centroids settle to 1e-4 pixels, which moves few pixels over a radius.
    assert mirrored.shape == as_it_is.shape
    off = np.abs(np.nan_to_num(np.sort(mirrored, axis=0)) - np.nan_to_num(np.sort(as_it_is, axis=0)))
    assert np.median(off, axis=0).max() <= 1e-3


def test_a_source_without_a_psf_flux_scores_zero() -> None:
    features = features_of(point(30.0), 4.7)
    features[0, list(FEATURES).index("fit_over_peak")] = np.nan
    found = score(features, shipped_model().trees)
    assert found[0] == 0.0 and found[1:].min() > 0.5


@pytest.mark.parametrize("name", ["core_misfit", "peak_excess", "opposite_part", "negative_part", "asymmetry"])
def test_a_growing_defect_never_raises_the_score(name: str) -> None:
    features = np.repeat(features_of(point(20.0), 4.7)[:4], 40, axis=0)
    column = list(FEATURES).index(name)
    features[:, column] = np.tile(np.linspace(0.0, 3.0, 40, dtype=np.float32), 4)
    found = score(features, shipped_model().trees).reshape(4, 40)
    assert np.all(np.diff(found, axis=1) <= 0.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), min_size=len(FEATURES), max_size=len(FEATURES)))
def test_any_features_give_a_score_between_zero_and_one(values: list[float]) -> None:
    found = score(np.array([values], dtype=np.float32), shipped_model().trees)
    assert found.dtype == np.float32
    assert 0.0 <= found[0] <= 1.0


def test_features_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(n, "):
        score(np.zeros((2, len(FEATURES) + 1)), shipped_model().trees)


def stump() -> TreeModel:
    """One tree: the first feature up to 1 or unknown gives 2, more gives -1."""
    whole = [np.array(column, dtype=np.int64) for column in ([0], [0, -1, -1], [1, 0, 0], [2, 0, 0])]
    roots, feature, left, right = whole
    threshold, value = np.array([1.0, 0.0, 0.0]), np.array([0.0, 2.0, -1.0])
    return TreeModel(roots, feature, threshold, np.array([True, False, False]), left, right, value, 1.0, 0.0)


def test_a_tree_is_walked_as_written() -> None:
    table = np.zeros((4, len(FEATURES)), dtype=np.float32)
    table[:, 0] = [1.0, np.nextafter(np.float32(1.0), np.float32(2.0)), np.nan, -np.inf]
    assert raw_score(table, stump()).tolist() == [2.0, -1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roots": np.array([3])}, "roots"),
        ({"feature": np.array([len(FEATURES), -1, -1])}, "beyond"),
        ({"left": np.array([0, 0, 0])}, "before its children"),
        ({"right": np.array([3, 0, 0])}, "before its children"),
        ({"value": np.array([0.0, np.nan, 0.0])}, "finite"),
        ({"value": np.array([0.0, 1.0])}, "length"),
        ({"slope": -1.0}, "slope"),
    ],
)
def test_trees_that_cannot_be_walked_are_refused(changes: dict[str, Any], message: str) -> None:
    check_model(stump())
    with pytest.raises(TreeModelError, match=message):
        check_model(stump()._replace(**changes))


def test_a_model_that_was_written_is_read_to_the_bit(tmp_path: Path) -> None:
    shipped = shipped_model()
    write_model(tmp_path / "model.json", shipped)
    again = read_model(tmp_path / "model.json")
    assert again[:2] == shipped[:2]
    for mine, theirs in zip(again.trees, shipped.trees, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("features", ["snr"], "other features"),
        ("version", "too-long", "1 to 7"),
        ("left", [0], "no reliability model"),
        ("slope", "steep", "no reliability model"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = tmp_path / "model.json"
    write_model(path, shipped_model())
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {key: value}))
    with pytest.raises(ReliabilityModelError, match=message):
        read_model(path)


def test_the_shipped_version_fits_the_schema() -> None:
    assert 0 < len(shipped_model().version) <= LONGEST_VERSION

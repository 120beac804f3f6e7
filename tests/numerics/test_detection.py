"""Significance maps and peaks: oracle, calibration, symmetry, footprints of both signs, any pixel content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from transforms.numerics.detection import Detections, _compact_filters, find_peaks, lobe_distance, significance_map
from transforms.numerics.psf_grid import PsfGrid


def moffat_psf(fwhm: float, size: int = 31, dx: float = 0.0, dy: float = 0.0) -> NDArray[np.float64]:
    alpha = fwhm / (2.0 * np.sqrt(2.0 ** (1.0 / 3.5) - 1.0))
    v, u = np.mgrid[:size, :size] - size // 2
    image: NDArray[np.float64] = (1.0 + ((u - dx) ** 2 + (v - dy) ** 2) / alpha**2) ** -3.5
    return image * 2.5 / (np.pi * alpha**2)


def peaks_of(pixels: dict[tuple[int, int], float], shape: tuple[int, int] = (40, 40), **options: int) -> Detections:
    snr_map = np.zeros(shape, dtype=np.float32)
    for position, value in pixels.items():
        snr_map[position] = value
    return find_peaks(snr_map, np.zeros(shape, dtype=bool), **options)


def test_significance_agrees_with_a_plain_loop_over_pixels() -> None:
    rng = np.random.default_rng(1)
    difference = rng.normal(0.0, 3.0, (45, 71)).astype(np.float32)
    variance = rng.uniform(4.0, 16.0, difference.shape).astype(np.float32)
    bad = rng.random(difference.shape) < 0.05
    bad[10:30, 20:45] = True
    difference[3, 4], variance[5, 6], variance[7, 8], variance[9, 10] = np.nan, 0.0, np.inf, -1.0
    psf = _compact_filters(moffat_psf(2.6)[None, None])[0, 0]
    snr_map, noise_ratio = significance_map(difference, variance, bad, psf)
    reach = psf.shape[0] // 2
    expected = np.zeros(difference.shape)
    for y in range(difference.shape[0]):
        for x in range(difference.shape[1]):
            numerator = information = 0.0
            for v in range(max(0, y - reach), min(difference.shape[0], y + reach + 1)):
                for u in range(max(0, x - reach), min(difference.shape[1], x + reach + 1)):
                    value, var = float(difference[v, u]), float(variance[v, u])
                    if bad[v, u] or not np.isfinite(value) or not np.isfinite(var) or var <= 0.0:
                        continue
                    p = psf[v - y + reach, u - x + reach]
                    numerator += p * value / var
                    information += p * p / var
            expected[y, x] = numerator / np.sqrt(information) if information > 0.0 else 0.0
    assert (expected == 0.0).any()
    # Stored as float32 and divided in float32: two roundings of 6e-8; sums near zero keep float64's 1e-14.
    np.testing.assert_allclose(snr_map * noise_ratio, expected, rtol=3e-7, atol=1e-12)


def test_the_map_of_a_grid_of_psfs_is_in_each_cell_that_of_its_psf() -> None:
    rng = np.random.default_rng(8)
    shape = (200, 310)
    difference = rng.normal(0.0, 3.0, shape).astype(np.float32)
    variance, bad = rng.uniform(4.0, 16.0, shape), rng.random(shape) < 0.05
    # Nine pixels of so wide a PSF hold no border that could be cut off: the filters of all are 9 x 9.
    images = np.array([[moffat_psf(5.0 + row + 0.7 * column, 9) for column in range(3)] for row in (0.0, 0.2)])
    grid_map, grid_ratio = significance_map(difference, variance, bad, PsfGrid(images))
    for row in range(2):
        for column in range(3):
            cell = np.s_[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)]
            one_map, one_ratio = significance_map(difference, variance, bad, images[row, column])
            # Each is rounded to float32 twice, before and after its calibration.
            np.testing.assert_allclose(grid_map[cell] * grid_ratio, one_map[cell] * one_ratio, rtol=3e-7, atol=1e-12)


def test_every_psf_of_a_grid_keeps_its_significance_in_filters_of_one_width() -> None:
    images = np.array([[moffat_psf(3.0), moffat_psf(6.0)]])
    filters = _compact_filters(images)
    kept = np.square(filters).sum(axis=(2, 3)) / np.square(images).sum(axis=(2, 3))
    assert (kept >= 0.999).all()
    assert filters.shape[2] == _compact_filters(images[:, 1:]).shape[2] < images.shape[2]
    assert lobe_distance(PsfGrid(images[:, [0, 1, 1]])) == lobe_distance(images[0, 1]) > lobe_distance(images[0, 0])


@pytest.mark.parametrize("true_over_claimed", [1.0, 2.0])
def test_noise_ratio_tells_true_noise_from_claimed_and_the_map_has_unit_width(true_over_claimed: float) -> None:
    rng = np.random.default_rng(2)
    difference = rng.normal(0.0, 3.0 * true_over_claimed, (600, 600))
    psf = moffat_psf(3.0)
    snr_map, noise_ratio = significance_map(difference, np.full((600, 600), 9.0), np.zeros((600, 600), bool), psf)
    # The MAD of N independent values has a relative error 1.17 / sqrt(N); here N = pixels * sum(P^2).
    tolerance = 4.0 * 1.17 / np.sqrt(difference.size * (psf**2).sum())
    assert noise_ratio == pytest.approx(true_over_claimed, rel=tolerance)
    assert snr_map.std() == pytest.approx(1.0, rel=tolerance)


def test_sources_do_not_make_the_noise_seem_larger() -> None:
    rng = np.random.default_rng(3)
    psf, side = moffat_psf(5.0), 600
    difference = rng.normal(0.0, 3.0, (side, side))
    reach = psf.shape[0] // 2
    for y in range(30, side - 30, 45):
        for x in range(30, side - 30, 45):
            difference[y - reach : y + reach + 1, x - reach : x + reach + 1] += (
                20.0 * 3.0 * psf / np.sqrt((psf**2).sum())
            )
    _, noise_ratio = significance_map(difference, np.full((side, side), 9.0), np.zeros((side, side), bool), psf)
    # as above; a median over all pixels would be 14 % high. Wings beyond the filter add at most 1 %.
    tolerance = 4.0 * 1.17 / np.sqrt(difference.size * (psf**2).sum())
    assert noise_ratio == pytest.approx(1.0, abs=tolerance + 0.01)


def test_significance_of_a_source_is_flux_over_its_error() -> None:
    psf = moffat_psf(3.0, 21)
    difference = np.random.default_rng(3).normal(0.0, 1.0, (400, 400))
    difference[100:121, 200:221] += 50.0 / np.sqrt((psf**2).sum()) * psf
    snr_map, noise_ratio = significance_map(difference, np.ones((400, 400)), np.zeros((400, 400), bool), psf)
    # The compact filter keeps at least 0.999 of sum(P^2); noise adds 1.
    assert abs(snr_map[110, 210] * noise_ratio - 50.0) < 50.0 * 0.0005 + 4.0


def test_negating_the_difference_negates_the_map_and_swaps_the_sign_of_detections() -> None:
    rng = np.random.default_rng(4)
    difference = rng.normal(0.0, 1.0, (200, 200)).astype(np.float32)
    difference[50:81, 50:81] += 40.0 * moffat_psf(3.0)
    difference[120:151, 90:121] -= 40.0 * moffat_psf(3.0)
    variance, bad = np.ones_like(difference), np.zeros(difference.shape, bool)
    snr_map, noise_ratio = significance_map(difference, variance, bad, moffat_psf(3.0))
    negated, negated_ratio = significance_map(-difference, variance, bad, moffat_psf(3.0))
    np.testing.assert_array_equal(negated, -snr_map)
    assert negated_ratio == noise_ratio
    found, swapped = find_peaks(snr_map, bad), find_peaks(negated, bad)
    assert found.is_negative.tolist() == [False, True]
    assert swapped.is_negative.tolist() == [True, False]
    np.testing.assert_array_equal(found.peak_y, swapped.peak_y)
    np.testing.assert_array_equal(found.peak_snr, -swapped.peak_snr)


def test_scaling_the_units_keeps_the_map() -> None:
    rng = np.random.default_rng(5)
    difference = rng.normal(0.0, 1.0, (80, 90)).astype(np.float32)
    variance, bad = rng.uniform(1, 2, difference.shape).astype(np.float32), rng.random(difference.shape) < 0.02
    snr_map, _ = significance_map(difference, variance, bad, moffat_psf(3.0))
    scaled, _ = significance_map(difference * 1024.0, variance * 1024.0**2, bad, moffat_psf(3.0))
    np.testing.assert_array_equal(scaled, snr_map)  # powers of two round nothing


def test_shifting_by_whole_pixels_shifts_map_and_peaks() -> None:
    rng = np.random.default_rng(6)
    core = rng.normal(0.0, 1.0, (60, 60)).astype(np.float32)
    core[20:41, 20:41] += 60.0 * moffat_psf(3.0, 21)
    maps = []
    for y0, x0 in [(30, 30), (47, 35)]:
        difference = np.zeros((140, 140), np.float32)
        difference[y0 : y0 + 60, x0 : x0 + 60] = core
        bad = np.ones(difference.shape, bool)
        bad[y0 : y0 + 60, x0 : x0 + 60] = False
        maps.append(significance_map(difference, np.ones_like(difference), bad, moffat_psf(3.0))[0])
    np.testing.assert_array_equal(maps[0][30:90, 30:90], maps[1][47:107, 35:95])
    nothing = np.zeros((140, 140), bool)
    before, after = find_peaks(maps[0], nothing), find_peaks(maps[1], nothing)
    np.testing.assert_array_equal(after.peak_y, before.peak_y + 17)
    np.testing.assert_array_equal(after.peak_x, before.peak_x + 5)
    np.testing.assert_array_equal(after.x1, before.x1 + 5)


def test_a_constant_difference_and_a_masked_image_are_left_as_they_are() -> None:
    zero = np.zeros((60, 60))
    snr_map, noise_ratio = significance_map(zero, zero + 1.0, zero.astype(bool), moffat_psf(3.0))
    assert noise_ratio == 0.0
    assert not snr_map.any()
    snr_map, noise_ratio = significance_map(zero, zero + 1.0, ~zero.astype(bool), moffat_psf(3.0))
    assert np.isnan(noise_ratio)
    assert not snr_map.any()


def test_an_image_of_few_psfs_is_not_calibrated_by_the_source_that_fills_it() -> None:
    psf = moffat_psf(4.0)
    source = 100.0 * psf[psf.shape[0] // 2 - 4 : psf.shape[0] // 2 + 5, psf.shape[0] // 2 - 4 : psf.shape[0] // 2 + 5]
    snr_map, noise_ratio = significance_map(source, np.ones((9, 9)), source > np.inf, psf)
    assert np.isnan(noise_ratio)
    # 9 of 41 pixels' width hold all but a part of the light whose square is below 1 % of the whole.
    assert snr_map[4, 4] == pytest.approx(100.0 * np.sqrt((psf**2).sum()), rel=0.01)


def test_a_footprint_gives_one_source_at_its_most_significant_pixel() -> None:
    found = peaks_of({(10, 10): 6.0, (10, 11): 9.0, (11, 12): 7.0, (9, 9): 5.5})
    assert (found.peak_y.tolist(), found.peak_x.tolist(), found.peak_snr.tolist()) == ([10], [11], [9.0])
    assert (found.y0[0], found.y1[0], found.x0[0], found.x1[0], found.n_pixels[0]) == (9, 12, 9, 13, 4)
    assert not found.is_negative[0]
    assert not found.has_both_signs[0]


def test_the_threshold_itself_is_not_a_detection() -> None:
    assert peaks_of({(10, 10): 5.0, (20, 20): -5.0}).peak_y.size == 0
    assert peaks_of({(10, 10): np.nextafter(np.float32(5), np.float32(6))}).peak_y.size == 1


def test_lobes_of_one_sign_with_a_gap_stay_two_sources() -> None:
    assert peaks_of({(10, 10): 6.0, (10, 12): 7.0}).peak_x.tolist() == [10, 12]


@pytest.mark.parametrize(("distance", "n_sources"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_lobes_of_opposite_sign_join_when_grown_by_one_pixel_they_touch(distance: int, n_sources: int) -> None:
    found = peaks_of({(10, 10): 6.0, (10 + distance, 10 + distance): -8.0})
    assert found.peak_y.size == n_sources
    if n_sources == 1:
        assert found.peak_snr[0] == -8.0
        assert found.has_both_signs[0]
        assert not found.is_negative[0]
        assert found.opposite_snr[0] == 6.0
    else:
        assert found.is_negative.tolist() == [False, True]


def test_a_faint_lobe_below_the_threshold_is_reported_as_opposite_significance() -> None:
    found = peaks_of({(10, 10): 6.0, (12, 10): -4.5, (30, 30): -7.0})
    assert found.opposite_snr.tolist() == [4.5, 0.0]
    assert not found.has_both_signs.any()


@pytest.mark.parametrize("fwhm", [2.1, 4.7, 8.0])
def test_the_lobe_distance_of_a_psf_joins_a_faint_dipole(fwhm: float) -> None:
    psf = moffat_psf(fwhm, 41)
    difference = np.random.default_rng(7).normal(0.0, 1e-3, (121, 121))
    shift = fwhm / 16.0
    dipole = moffat_psf(fwhm, 41, dx=shift) - moffat_psf(fwhm, 41, dx=-shift)
    difference[40:81, 40:81] += dipole
    snr_map, _ = significance_map(difference, np.ones_like(difference), np.zeros(difference.shape, bool), psf)
    snr_map *= np.float32(7.0) / snr_map.max()  # lobes of S/N 7: small footprints far apart
    found = find_peaks(snr_map, np.zeros(difference.shape, bool), 5.0, lobe_distance(psf))
    assert found.peak_y.size == 1
    assert found.has_both_signs[0]


def test_peaks_on_rejected_pixels_are_dropped_and_counted() -> None:
    snr_map = np.zeros((20, 20), np.float32)
    snr_map[5, 5], snr_map[5, 6], snr_map[15, 15] = 9.0, 6.0, -6.0
    reject = np.zeros(snr_map.shape, bool)
    reject[5, 5] = True
    found = find_peaks(snr_map, reject)
    assert (found.n_rejected, found.peak_y.tolist(), found.is_negative.tolist()) == (1, [15], [True])


def test_sources_come_in_order_of_peak_row_then_column() -> None:
    # The footprint that starts first in raster order has the later peak.
    found = peaks_of({(5, 5): 6.0, (6, 6): 6.5, (7, 7): 9.0, (6, 20): 8.0, (6, 30): -8.0, (3, 38): 6.0})
    assert list(zip(found.peak_y.tolist(), found.peak_x.tolist(), strict=True)) == [(3, 38), (6, 20), (6, 30), (7, 7)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.floats(2.0, 8.0))
def test_footprints_are_the_connected_components_of_an_independent_labelling(seed: int, width: float) -> None:
    rng = np.random.default_rng(seed)
    # below 10 no peak stands 5 above a saddle of at least 5, which would split its footprint
    snr_map = np.clip(rng.normal(0.0, width, (30, 40)), -9.9, 9.9).astype(np.float32)
    found = find_peaks(snr_map, np.zeros(snr_map.shape, bool))
    square = np.ones((3, 3))
    above, below = snr_map > 5.0, snr_map < -5.0
    near = np.ones((7, 7))
    labels = np.zeros(snr_map.shape, int)
    positive, n_positive = ndimage.label(above, square)
    negative, n_negative = ndimage.label(below, square)
    labels = np.where(above, positive, np.where(below, negative + n_positive, 0))
    group = list(range(n_positive + n_negative + 1))
    for label in range(1, n_positive + 1):
        reached = set(np.unique(labels[ndimage.binary_dilation(positive == label, near) & below]).tolist())
        for other in reached:
            old, new = group[other], group[label]
            group = [new if g == old else g for g in group]
    merged = np.array(group)[labels] * (labels > 0)
    expected = []
    for name in sorted(set(merged[labels > 0].tolist())):
        inside = merged == name
        y, x = np.unravel_index(np.argmax(np.where(inside, np.abs(snr_map), 0.0)), snr_map.shape)
        expected.append((int(y), int(x), int(inside.sum()), bool(not (inside & above).any())))
    measured = zip(found.peak_y, found.peak_x, found.n_pixels, found.is_negative, strict=True)
    assert [(int(y), int(x), int(n), bool(s)) for y, x, n, s in measured] == sorted(expected)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), odd_fraction=st.floats(0.0, 1.0))
def test_any_pixel_content_gives_a_finite_map_and_peaks_inside_it(seed: int, odd_fraction: float) -> None:
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -1.0, 3e38, -3e38, 1e-45, 1e-30], dtype=np.float32)
    planes = rng.normal(0, 1, (2, 33, 70)).astype(np.float32)
    changed = rng.random(planes.shape) < odd_fraction
    planes[changed] = rng.choice(odd, int(changed.sum()))
    bad = rng.random(planes[0].shape) < 0.1
    snr_map, _ = significance_map(planes[0], planes[1], bad, moffat_psf(3.0))
    assert np.isfinite(snr_map).all()
    found = find_peaks(snr_map, bad)
    assert (np.abs(found.peak_snr) > 5.0).all()
    assert ((found.y0 <= found.peak_y) & (found.peak_y < found.y1) & (found.y1 <= 33)).all()
    assert ((found.x0 <= found.peak_x) & (found.peak_x < found.x1) & (found.x1 <= 70)).all()
    assert not bad[found.peak_y, found.peak_x].any()


def test_nan_in_a_significance_map_counts_as_nothing() -> None:
    found = peaks_of({(10, 10): np.nan, (10, 11): 6.0, (20, 20): np.nan})
    assert (found.peak_y.tolist(), found.n_pixels.tolist()) == ([10], [1])


def test_senseless_arguments_are_refused_with_the_evidence() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        find_peaks(np.zeros((3, 3)), np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match=r"got -5"):
        find_peaks(np.zeros((3, 3)), np.zeros((3, 3), bool), -5.0)
    with pytest.raises(ValueError, match=r"got 0"):
        find_peaks(np.zeros((3, 3)), np.zeros((3, 3), bool), 5.0, 0)
    with pytest.raises(ValueError, match="one shape"):
        significance_map(np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 4), bool), moffat_psf(3.0))


def test_a_source_next_to_a_brighter_one_in_one_footprint_is_a_source_of_its_own() -> None:
    psf = moffat_psf(4.5, 41)
    difference = np.random.default_rng(7).normal(0.0, 1.0, (201, 201))
    for x, snr in ((92, 300.0), (106, 46.0)):  # 3 FWHM apart: the wings join them above S/N 5
        difference[80:121, x - 20 : x + 21] += snr / np.sqrt((psf**2).sum()) * psf
    snr_map, _ = significance_map(difference, np.ones_like(difference), np.zeros(difference.shape, bool), psf)
    assert snr_map[100, 92:107].min() > 5.0
    found = find_peaks(snr_map, np.zeros(difference.shape, bool))
    # A peak of S/N 46 in the filtered image is good to sigma sqrt(2) / 46: less than a tenth of a pixel.
    assert sorted(zip(found.peak_y.tolist(), found.peak_x.tolist(), strict=True)) == [(100, 92), (100, 106)]


@pytest.mark.parametrize(("saddle", "peaks"), [(14.9, [10, 12]), (15.1, [10])])
def test_the_lower_peak_must_stand_the_threshold_above_the_saddle(saddle: float, peaks: list[int]) -> None:
    found = peaks_of({(10, 10): 30.0, (10, 11): saddle, (10, 12): 20.0})
    assert found.peak_x.tolist() == peaks


def test_a_split_footprint_loses_only_the_part_whose_peak_is_rejected() -> None:
    snr_map, reject = np.zeros((30, 30), np.float32), np.zeros((30, 30), bool)
    snr_map[10, 8:16] = [20.0, 60.0, 20.0, 6.0, 6.0, 20.0, 30.0, 20.0]
    reject[10, 9] = True
    found = find_peaks(snr_map, reject)
    assert found.peak_x.tolist() == [14]
    assert found.n_rejected == 1


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), smoothing=st.floats(0.6, 2.0))
def test_peaks_are_those_of_a_flood_from_the_top(seed: int, smoothing: float) -> None:
    rng = np.random.default_rng(seed)
    snr_map = ndimage.gaussian_filter(rng.normal(0.0, 1.0, (16, 16)), smoothing)
    snr_map = (12.0 + 8.0 * snr_map / snr_map.std()).astype(np.float32)
    snr_map[snr_map < 0.0] = 0.0  # one sign only: lobes are tested elsewhere
    expected = set()
    for y, x in zip(*np.nonzero(snr_map > 5.0), strict=True):
        level = max(5.0, float(snr_map[y, x]) - 5.0)
        # A level at or below the threshold is no saddle: the footprint's own peak is the highest pixel in it.
        inside = snr_map > level
        label, _ = ndimage.label(inside, np.ones((3, 3)))
        if snr_map[label == label[y, x]].max() == snr_map[y, x]:
            expected.add((int(y), int(x)))
    found = find_peaks(snr_map, np.zeros((16, 16), bool))
    assert set(zip(found.peak_y.tolist(), found.peak_x.tolist(), strict=True)) == expected


def test_moments_of_a_footprint_are_weighted_by_significance() -> None:
    found = peaks_of({(10, 10): 10.0, (10, 11): 20.0, (11, 12): 10.0})
    assert (found.mean_x[0], found.mean_y[0]) == pytest.approx((11.0, 10.25))
    assert (found.spread_xx[0], found.spread_yy[0], found.spread_xy[0]) == pytest.approx((0.5, 0.1875, 0.25))

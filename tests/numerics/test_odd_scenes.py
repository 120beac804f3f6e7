"""Detection, measurement and reliability of any pixels: finite or null fields, no exception, no source lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from odd_scenes import OddScene, odd_scene

from transforms.numerics.detection import Detections, find_peaks, lobe_distance, significance_map
from transforms.numerics.measurement import CENTROID_SHIFT_MAX_PIX, Measurements, mask_flags, measure_sources
from transforms.numerics.reliability import score
from transforms.numerics.reliability_features import reliability_features
from transforms.numerics.source_shapes import measure_shapes
from transforms.reliability_model import shipped_model

BATCHES, SCENES_IN_BATCH = 10, 210
BITS = {"BAD": 0, "SAT": 1, "CR": 3, "TOP": 30}


def look(scene: OddScene) -> tuple[Detections, Measurements, list[Any]]:
    """All of it: detections, measurements, and a list of every other array."""
    planes = scene.planes
    difference, variance, science, _, template, _ = planes
    snr_map, noise_ratio = significance_map(difference, variance, scene.bad, scene.psf)
    found = find_peaks(snr_map, scene.reject, 5.0, lobe_distance(scene.psf))
    measured = measure_sources(*planes, scene.bad, scene.psf, found, scene.science_psf)
    shapes = measure_shapes(*planes, scene.bad, scene.psf, scene.science_psf, found, measured)
    flags = mask_flags(scene.mask, BITS, measured.x, measured.y, found)
    features = reliability_features(
        difference,
        variance,
        science,
        template,
        scene.bad,
        scene.saturated,
        scene.psf,
        found,
        measured,
        shapes,
        noise_ratio,
        0.01,
    )
    reliability = score(features, shipped_model().trees)
    others = [
        snr_map,
        shapes.extendedness,
        shapes.dipole_attempted,
        *shapes.dipoles,
        *shapes.trails,
        flags.off_image,
        *flags.anywhere.values(),
        features,
        reliability,
    ]
    return found, measured, others


def check(seed: int) -> int:
    """Check one scene; the number of sources that had to be found."""
    scene = odd_scene(seed)
    before = content(scene)
    found, measured, others = look(scene)
    assert content(scene) == before, "an input was changed"
    n = found.peak_x.size
    for column in (*found[:-1], *measured, *others[1:]):
        assert len(column) == n
        assert not np.isinf(column).any()
    assert np.isfinite(others[0]).all()
    for name in ("x", "y", "snr"):
        assert np.isfinite(getattr(measured, name)).all(), name
    farthest = max(CENTROID_SHIFT_MAX_PIX, np.hypot(*scene.bad.shape))
    assert (np.hypot(measured.x - found.peak_x, measured.y - found.peak_y) <= farthest).all()
    np.testing.assert_array_equal(measured.psf_flux_flag, np.isnan(measured.psf_flux))
    np.testing.assert_array_equal(measured.psf_flux_flag, np.isnan(measured.psf_flux_err))
    np.testing.assert_array_equal(measured.ap_flux_flag, np.isnan(measured.ap_flux))
    reliability = others[-1]
    assert ((reliability >= 0.0) & (reliability <= 1.0)).all()
    assert len({*zip(found.peak_y.tolist(), found.peak_x.tolist(), strict=True)}) == n
    for x, y, sign in scene.injected:
        near = np.hypot(found.peak_x - x, found.peak_y - y) <= 0.5 * scene.fwhm + 2.0
        assert (near & (found.peak_snr * sign > 0.0)).any(), f"lost the source at {x:.1f}, {y:.1f}"
    if seed % 8 == 0:
        assert content(look(scene)) == content((found, measured, others)), "a second run gave other bytes"
    return len(scene.injected)


def content(value: Any) -> bytes:
    """Bytes of all arrays in nested tuples and lists."""
    if isinstance(value, tuple | list):
        return b"".join(content(one) for one in value)
    if hasattr(value, "images"):
        value = value.images
    array: NDArray = np.asarray(value)
    return array.tobytes()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_odd_scenes_are_searched_and_measured_whole(batch: int) -> None:
    n_injected = 0
    for seed in range(batch * SCENES_IN_BATCH, (batch + 1) * SCENES_IN_BATCH):
        try:
            n_injected += check(seed)
        except Exception as error:
            error.add_note(f"odd scene {seed}")
            raise
    assert n_injected > SCENES_IN_BATCH // 10  # scenes still have sources to lose

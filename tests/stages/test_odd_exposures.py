"""The whole search of exposures that hold any pixels: finite or null fields, every source counted, the same twice."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from astropy.wcs import WCS
from odd_scenes import OddScene, odd_scene

from schemas.elements import SubtractedExposure
from schemas.exposures import mask_bits
from schemas.manifests import DetectorImages, Visit
from schemas.records import DIA_SOURCE
from transforms.detection import DetectionConfig, detect_sources, search

VISIT = Visit(
    2026112200123, 20261122, 123, "SimCam", "r", 61367.1, 30.0, 61367.1002, 0.0, -60.0, 0.0, None, None,
    (DetectorImages(94, "", None),),
)  # fmt: skip
PIXELS = [field.name for field in fields(SubtractedExposure) if field.type == "np.ndarray"]


def exposure_of(scene: OddScene) -> SubtractedExposure:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [0.0, -60.0], [1.0, 1.0]
    wcs.wcs.cd = np.diag([-0.2, 0.2]) / 3600.0
    difference, variance, science, science_variance, template, template_variance = scene.planes
    planes = scene.bad * mask_bits("NO_DATA") | scene.reject * mask_bits("EDGE") | scene.saturated * mask_bits("SAT")
    return SubtractedExposure(
        visit=VISIT,
        detector=94,
        science=science,
        science_variance=science_variance,
        difference=difference,
        difference_variance=variance,
        matched_template=template,
        template_variance=template_variance,
        mask=planes.astype(np.int32) | scene.mask & mask_bits("CR", "SUSPECT", "STREAK"),
        psf=scene.psf.images,
        science_psf=scene.science_psf.images,
        wcs=wcs,
        seconds={},
        started_at=0.0,
        notes=(),
        residual_part=0.01,
    )


@pytest.mark.parametrize("batch", range(4))
def test_odd_exposures_are_searched_and_every_source_is_kept_or_counted(batch: int) -> None:
    n_kept = 0
    for seed in range(100_000 + 50 * batch, 100_000 + 50 * (batch + 1)):
        exposure = exposure_of(odd_scene(seed))
        before = [getattr(exposure, name).tobytes() for name in PIXELS]
        found = search(exposure, DetectionConfig())
        records = found.records
        assert len(found.features) == len(found.kept) == len(records)
        assert len(set(records["diaSourceId"].tolist())) == len(records)
        for name in DIA_SOURCE.names:
            if records.dtype[name].kind == "f":
                assert not np.isinf(records[name]).any(), (seed, name)
        kept = records[found.kept]
        for name in ("ra", "dec", "x", "y", "snr"):
            assert np.isfinite(kept[name]).all(), (seed, name)
        detected = detect_sources(exposure, DetectionConfig())
        assert detected.n_detected == len(detected.dia_sources) + sum(detected.rejected.values())
        assert ((detected.dia_sources["reliability"] >= 0.0) & (detected.dia_sources["reliability"] <= 1.0)).all()
        again = kept.copy()
        for name in ("reliability", "reliabilityVersion"):
            again[name] = detected.dia_sources[name]
        assert again.tobytes() == detected.dia_sources.tobytes()
        assert before == [getattr(exposure, name).tobytes() for name in PIXELS]
        n_kept += len(kept)
    assert n_kept > 20  # scenes still have sources

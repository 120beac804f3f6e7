"""DetectDiaSources on hand-made differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from astropy.wcs import WCS

from schemas.elements import SubtractedExposure
from schemas.exposures import MASK_BITS, mask_bits
from schemas.identifiers import dia_source_ids
from schemas.manifests import DetectorImages, Visit
from transforms.detection import DetectionConfig, SourceStormError, detect_sources

SIZE = 256
NOISE = 10.0
FLUX = 4000.0
PLACES = ((60.3, 70.8), (180.6, 90.1), (120.0, 200.4))


def _psf() -> np.ndarray:
    axis = np.arange(-12, 13)
    psf = np.exp(-(axis[None, :] ** 2 + axis[:, None] ** 2) / (2 * 1.8**2))
    return psf / psf.sum()


def _star(x: float, y: float) -> np.ndarray:
    axis = np.arange(SIZE)
    star = np.exp(-((axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2) / (2 * 1.8**2))
    return star / star.sum()


def _wcs() -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [0.001, -60.0], [SIZE / 2, SIZE / 2]
    wcs.wcs.cd = np.diag([-0.2, 0.2]) / 3600.0
    return wcs


def _exposure(signs: tuple[float, ...] = (1.0, -1.0, 1.0), mask: np.ndarray | None = None) -> SubtractedExposure:
    rng = np.random.default_rng(3)
    difference = rng.normal(0.0, NOISE, (SIZE, SIZE))
    template = np.zeros((SIZE, SIZE))
    for sign, (x, y) in zip(signs, PLACES, strict=True):
        difference += sign * FLUX * _star(x, y)
        template += 2.0 * FLUX * _star(x, y) * (sign < 0)
    variance = np.full((SIZE, SIZE), NOISE**2, dtype=np.float32)
    visit = Visit(
        2026112200123, 20261122, 123, "SimCam", "r", 61367.1, 30.0, 61367.1002, 0.0, -60.0, 0.0, None, None,
        (DetectorImages(94, "", None),),
    )  # fmt: skip
    return SubtractedExposure(
        visit=visit,
        detector=94,
        science=(difference + template).astype(np.float32),
        science_variance=variance,
        difference=difference.astype(np.float32),
        difference_variance=variance,
        matched_template=template.astype(np.float32),
        template_variance=np.zeros_like(variance),
        mask=np.zeros((SIZE, SIZE), dtype=np.int32) if mask is None else mask,
        psf=_psf(),
        science_psf=_psf(),
        wcs=_wcs(),
        seconds={},
        started_at=0.0,
        notes=(),
    )


def test_sources_are_found_measured_and_numbered_by_row() -> None:
    found = detect_sources(_exposure(), DetectionConfig()).dia_sources
    assert found["diaSourceId"].tolist() == dia_source_ids(20261122, 123, 94, 3).tolist()
    assert found["isNegative"].tolist() == [0, 1, 0]
    # Flux error of a Gaussian PSF in white noise: sigma * sqrt(4 pi s^2) = 10 * 6.38 nJy.
    error = NOISE * np.sqrt(4 * np.pi) * 1.8
    np.testing.assert_allclose(found["psfFlux"], [FLUX, -FLUX, FLUX], atol=5 * error)
    np.testing.assert_allclose(found["psfFluxErr"], error, rtol=0.02)
    assert (found["reliability"] > 0.9).all()
    assert set(found["reliabilityVersion"]) == {found["reliabilityVersion"][0]}
    assert found["midpointMjdTai"].tolist() == [61367.1] * 3


def test_positions_and_their_errors_are_on_the_sky() -> None:
    exposure = _exposure()
    found = detect_sources(exposure, DetectionConfig()).dia_sources
    x, y = np.array(PLACES).T
    ra, dec = exposure.wcs.all_pix2world(x, y, 0)
    assert (found["ra"] >= 0).all()
    assert (found["ra"] < 360).all()
    # One pixel is 0.2 arcsec whatever the declination: raErr includes cos(dec), here 0.5.
    np.testing.assert_allclose(found["raErr"] * 3600, found["xErr"] * 0.2, rtol=1e-3)
    offset = ((found["ra"] - ra + 180) % 360 - 180) * np.cos(np.radians(dec))
    np.testing.assert_array_less(np.abs(offset), 5 * found["raErr"])
    np.testing.assert_array_less(np.abs(found["dec"] - dec), 5 * found["decErr"])


def test_flags_name_the_planes_that_a_source_meets() -> None:
    mask = np.zeros((SIZE, SIZE), dtype=np.int32)
    mask[71, 60] |= mask_bits("SUSPECT")
    mask[94, 181] |= mask_bits("STREAK")
    found = detect_sources(_exposure(mask=mask), DetectionConfig()).dia_sources
    assert found["pixelFlags_suspectCenter"].tolist() == [1, 0, 0]
    assert found["pixelFlags_streak"].tolist() == [0, 1, 0]
    assert found["pixelFlags_streakCenter"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("plane", ["SAT", "BAD", "NO_DATA", "EDGE", "CR_TEMPLATE"])
def test_peak_on_rejected_pixels_is_counted_not_kept(plane: str) -> None:
    mask = np.zeros((SIZE, SIZE), dtype=np.int32)
    mask[185:216, 105:136] |= np.int32(1 << MASK_BITS[plane])
    found = detect_sources(_exposure(mask=mask), DetectionConfig())
    assert len(found.dia_sources) == 2
    assert found.n_detected == len(found.dia_sources) + sum(found.rejected.values())


def test_negative_direct_image_is_no_source_and_counted() -> None:
    exposure = _exposure()
    dark = exposure.science - 3.0 * FLUX * _star(*PLACES[2]).astype(np.float32)
    object.__setattr__(exposure, "science", dark.astype(np.float32))
    found = detect_sources(exposure, DetectionConfig())
    assert found.rejected["negative direct image"] == 1
    # The ids of the others do not depend on what was dropped.
    assert found.dia_sources["diaSourceId"].tolist() == dia_source_ids(20261122, 123, 94, 3)[:2].tolist()


def test_source_storm_is_refused_with_its_numbers() -> None:
    with pytest.raises(SourceStormError, match="3 sources in one detector, more than max_sources 2"):
        detect_sources(_exposure(), DetectionConfig(max_sources=2))


def test_what_is_left_of_a_star_must_be_exceeded_but_is_no_error() -> None:
    """The second source stands on a star twice as bright: at 2 x 2, a pixel's S/N is at most 1/4."""
    found = detect_sources(replace(_exposure(), residual_part=2.0), DetectionConfig()).dia_sources
    without = detect_sources(_exposure(), DetectionConfig()).dia_sources
    assert found["isNegative"].tolist() == [0, 0]
    np.testing.assert_array_equal(found["psfFluxErr"], without["psfFluxErr"][[0, 2]])


def test_empty_difference_gives_no_source_and_no_error() -> None:
    exposure = _exposure(signs=(0.0, 0.0, 0.0))
    found = detect_sources(exposure, DetectionConfig(threshold_snr=8.0))
    assert len(found.dia_sources) == 0
    assert found.n_detected == 0

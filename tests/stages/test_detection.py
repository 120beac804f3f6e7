"""DetectDiaSources on hand-made differences."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from schemas.elements import SubtractedExposure
from schemas.exposures import MASK_BITS, mask_bits
from schemas.identifiers import dia_source_ids
from schemas.manifests import DetectorImages, Visit
from transforms.cutouts import encode_cutouts
from transforms.detection import DetectionConfig, SourceStormError, detect_sources

SIZE = 256
NOISE = 10.0
FLUX = 4000.0
PLACES = ((60.3, 70.8), (180.6, 90.1), (120.0, 200.4))


def _psf(sigma: float = 1.8) -> np.ndarray:
    axis = np.arange(-12, 13)
    psf = np.exp(-(axis[None, :] ** 2 + axis[:, None] ** 2) / (2 * sigma**2))
    return (psf / psf.sum())[None, None].astype(np.float32)


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


def test_the_psf_of_a_cutout_and_of_the_moments_is_that_of_the_source_s_cell() -> None:
    exposure = _exposure()
    sigmas, science_sigmas = np.array([[1.7, 1.8], [1.9, 2.0]]), np.array([[1.5, 1.4], [1.3, 1.2]])
    for name, of_cells in (("psf", sigmas), ("science_psf", science_sigmas)):
        grid = np.array([[_psf(sigma)[0, 0] for sigma in row] for row in of_cells])
        object.__setattr__(exposure, name, grid)
    detected = detect_sources(exposure, DetectionConfig())
    for source, stamps in zip(detected.dia_sources, encode_cutouts(detected), strict=True):
        cell = int(source["y"]) // 128, int(source["x"]) // 128
        assert source["ixxPSF"] == pytest.approx((0.2 * sigmas[cell]) ** 2, rel=1e-3)
        for stamp, plane in zip(stamps, ("psf", "science_psf", "science_psf"), strict=True):
            with fits.open(io.BytesIO(stamp)) as hdus:
                np.testing.assert_array_equal(hdus["PSFIMAGE"].data, getattr(exposure, plane)[cell])
    cells = {(int(source["y"]) // 128, int(source["x"]) // 128) for source in detected.dia_sources}
    assert len(cells) == 3


def test_pieces_of_a_faint_trail_are_one_source_and_counted() -> None:
    exposure = _exposure(signs=(0.0, 0.0, 0.0))
    trail = np.mean([_star(128.0 + u, 100.0 + 0.3 * u) for u in np.linspace(-35.0, 35.0, 281)], axis=0)
    # S/N 20: its ridge has 5.6 a source, and noise cuts it.
    light = 20.0 * NOISE / np.sqrt((trail**2).sum()) * trail
    object.__setattr__(exposure, "difference", (exposure.difference + light).astype(np.float32))
    object.__setattr__(exposure, "science", (exposure.science + light).astype(np.float32))
    found = detect_sources(exposure, DetectionConfig())
    assert found.n_detected > 1
    assert found.rejected["part of a longer trail"] == found.n_detected - 1
    (source,) = found.dia_sources
    ids = dia_source_ids(20261122, 123, 94, found.n_detected)
    assert source["diaSourceId"] in ids
    # The bound is 2.4 pixels at this S/N and width; the cutout holds 70 pixels along x.
    assert source["trailLength"] == pytest.approx(0.2 * np.hypot(70.0, 21.0), abs=5 * 0.2 * 2.4)
    assert source["bboxSize"] >= 65
    assert source["trail_flag"] == 0
    assert source["trail_flag_edge"] == 0


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

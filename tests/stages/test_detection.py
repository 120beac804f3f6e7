"""DetectDiaSources on hand-made differences."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apache_beam.pvalue import TaggedOutput
from astropy.io import fits
from astropy.wcs import WCS

from schemas.claim_check import read_blobs
from schemas.elements import DetectedSources, FailureRecord, SubtractedExposure, VisitPart
from schemas.exposures import MASK_BITS, mask_bits
from schemas.identifiers import dia_source_ids
from schemas.manifests import DetectorImages, Visit
from transforms import detection
from transforms.cutouts import CutoutConfig, EncodeCutouts, encode_cutouts
from transforms.detection import DetectionConfig, SourceStormError, detect_sources
from transforms.packaging import cutout_file

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


def test_a_source_that_vanished_from_over_subtracted_sky_is_kept() -> None:
    """A hole of 5 sigma of the forced flux, 319 nJy, is a twelfth of what left the template."""
    exposure = _exposure()
    hole = 5.0 * NOISE * np.sqrt(4 * np.pi) * 1.8 * _star(*PLACES[1])
    dark = (exposure.science - FLUX * _star(*PLACES[1]) - hole).astype(np.float32)
    found = detect_sources(replace(exposure, science=dark), DetectionConfig())
    assert found.rejected["negative direct image"] == 0
    vanished = found.dia_sources[1]
    assert vanished["scienceFlux"] < -2.0 * vanished["scienceFluxErr"]


def test_the_psf_of_a_cutout_and_of_the_moments_is_that_of_the_source_s_cell() -> None:
    exposure = _exposure()
    sigmas, science_sigmas = np.array([[1.7, 1.8], [1.9, 2.0]]), np.array([[1.5, 1.4], [1.3, 1.2]])
    for name, of_cells in (("psf", sigmas), ("science_psf", science_sigmas)):
        grid = np.array([[_psf(sigma)[0, 0] for sigma in row] for row in of_cells])
        object.__setattr__(exposure, name, grid)
    detected = detect_sources(exposure, DetectionConfig())
    for source, stamps in zip(detected.dia_sources, encode_cutouts(detected).files, strict=True):
        cell = int(source["y"]) // 128, int(source["x"]) // 128
        assert source["ixxPSF"] == pytest.approx((0.2 * sigmas[cell]) ** 2, rel=1e-3)
        for stamp, plane in zip(stamps, ("psf", "science_psf", "science_psf"), strict=True):
            with fits.open(io.BytesIO(stamp)) as hdus:
                np.testing.assert_array_equal(hdus["PSFIMAGE"].data, getattr(exposure, plane)[cell])
    cells = {(int(source["y"]) // 128, int(source["x"]) // 128) for source in detected.dia_sources}
    assert len(cells) == 3


@pytest.mark.parametrize("content", ["complete", "strict"])
def test_a_source_without_cutouts_is_counted_and_costs_the_others_none(tmp_path: Path, content: str) -> None:
    detected = detect_sources(_exposure(), DetectionConfig())
    detected.dia_sources["x"][1] = -5.0
    stage = EncodeCutouts(CutoutConfig(content), str(tmp_path))
    outputs = list(stage.stage.work(detected))
    records = [one.value for one in outputs if isinstance(one, TaggedOutput)]
    n = len(detected.dia_sources)
    assert [(record.stage, record.lost) for record in records] == [("cutouts", f"cutouts of 1 of {n} alerts")]
    assert "outside the image" in records[0].reason
    ids = detected.dia_sources["diaSourceId"]
    files = read_blobs(cutout_file(str(tmp_path), detected.exposure.visit.visit, detected.exposure.detector), ids)
    assert [tuple(map(bool, row)) for row in files] == [(i != 1,) * 3 for i in range(n)]
    with fits.open(io.BytesIO(files[0][0])) as hdus:
        assert ("MASK" in hdus) == (content == "complete")


def test_moments_lie_along_the_axes_of_the_detector_however_it_is_turned() -> None:
    exposure = _exposure()
    axis = np.arange(-12, 13)
    psf = np.exp(-(axis[None, :] ** 2) / (2 * 2.2**2) - axis[:, None] ** 2 / (2 * 1.5**2))
    object.__setattr__(exposure, "psf", (psf / psf.sum())[None, None].astype(np.float32))
    turned = 0.2 / 3600.0 * np.array([[0.0, 1.0], [1.0, 0.0]])
    exposure.wcs.wcs.cd = turned
    for source in detect_sources(exposure, DetectionConfig()).dia_sources:
        # Settled to 1e-4 of the trace.
        assert source["ixxPSF"] == pytest.approx((0.2 * 2.2) ** 2, rel=1e-3)
        assert source["iyyPSF"] == pytest.approx((0.2 * 1.5) ** 2, rel=1e-3)
        assert abs(source["ixyPSF"]) < 1e-3 * source["ixxPSF"]


def test_pieces_of_a_faint_trail_are_one_source_and_counted() -> None:
    exposure = _exposure(signs=(0.0, 0.0, 0.0))
    trail = np.mean([_star(128.0 + u, 100.0 + 0.3 * u) for u in np.linspace(-35.0, 35.0, 281)], axis=0)
    # S/N 20: its ridge has 5.6 a source, and noise cuts it.
    light = 20.0 * NOISE / np.sqrt((trail**2).sum()) * trail
    object.__setattr__(exposure, "difference", (exposure.difference + light).astype(np.float32))
    object.__setattr__(exposure, "science", (exposure.science + light).astype(np.float32))
    found = detect_sources(exposure, DetectionConfig(max_motion_deg_per_day=20.0))
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


def test_of_a_source_storm_the_most_significant_are_kept_with_their_ids() -> None:
    exposure = _exposure()
    bright = exposure.difference + FLUX * _star(*PLACES[2]).astype(np.float32)
    everything = detect_sources(replace(exposure, difference=bright), DetectionConfig())
    found = detect_sources(replace(exposure, difference=bright), DetectionConfig(max_sources=1))
    assert everything.rejected["beyond max_sources"] == 0
    assert found.rejected["beyond max_sources"] == 2
    assert found.n_detected == everything.n_detected == 3
    assert found.dia_sources.tobytes() == everything.dia_sources[[2]].tobytes()


def test_equal_sources_of_a_storm_are_kept_from_the_first_row_on() -> None:
    exposure = _exposure(signs=(0.0, 0.0, 0.0))
    difference = np.zeros((SIZE, SIZE), dtype=np.float32)
    for x, y in ((40, 40), (200, 40), (120, 120), (40, 200)):
        difference += np.float32(FLUX) * _star(x, y).astype(np.float32)
    quiet = replace(exposure, difference=difference, science=difference)
    found = detect_sources(quiet, DetectionConfig(max_sources=2)).dia_sources
    assert found["diaSourceId"].tolist() == dia_source_ids(20261122, 123, 94, 4)[:2].tolist()


def test_a_source_storm_leaves_a_failure_record_and_goes_on() -> None:
    outputs = list(detection._DetectFn(DetectionConfig(max_sources=2)).process(_exposure()))
    failure, part, detected = outputs
    assert failure.tag == "failed"
    assert isinstance(part, VisitPart)
    assert isinstance(detected, DetectedSources)
    assert failure.value == FailureRecord(
        2026112200123, 94, "detection", "SourceStorm",
        "more than max_sources 2 detections: bad subtraction?", "the 1 least significant of 3 detections",
    )  # fmt: skip
    assert len(list(detection._DetectFn(DetectionConfig(max_sources=3)).process(_exposure()))) == 1


def test_more_sources_than_ids_are_refused_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "MAX_COUNTER", 2)
    with pytest.raises(SourceStormError, match="3 sources in one detector, ids number 2"):
        detect_sources(_exposure(), DetectionConfig())


def _with_trail(length: float, x: float, y: float, snr: float = 200.0, cut: int = SIZE) -> SubtractedExposure:
    """A trail at 30 degrees to the rows instead of the three sources; the image ends at column `cut`."""
    exposure = _exposure(signs=(0.0, 0.0, 0.0))
    trail = np.mean(
        [_star(x + t * 0.866 * length, y + t * 0.5 * length) for t in np.linspace(-0.5, 0.5, 2 * int(length) + 1)],
        axis=0,
    )
    flux = snr * NOISE / np.sqrt((trail**2).sum())
    planes: dict[str, Any] = {
        name: np.ascontiguousarray(getattr(exposure, name)[:, :cut])
        for name in ("difference_variance", "science_variance", "matched_template", "template_variance", "mask")
    }
    difference = (exposure.difference + flux * trail).astype(np.float32)[:, :cut].copy()
    return replace(exposure, difference=difference, science=difference, **planes)


@pytest.mark.parametrize(
    ("length", "cut", "is_fast"),
    [
        (30, SIZE, False),  # 6 arcsec in 30 s
        (56, SIZE, False),  # 11.2
        (70, SIZE, True),  # 14.0; the limit is 12.5
        (150, SIZE, True),  # no trail of this length is fitted: by its footprint
        (40, 130, True),  # cut by the border of the image: who knows how long it is
        (40, 118, True),
    ],
)
def test_what_moves_faster_than_10_degrees_a_day_is_no_source_and_counted(
    length: float, cut: int, is_fast: bool
) -> None:
    found = detect_sources(_with_trail(length, 120.0, 130.0, cut=cut), DetectionConfig())
    assert found.rejected["fast trail"] == int(is_fast)
    assert len(found.dia_sources) == int(not is_fast)


@pytest.mark.parametrize(("part", "is_fast"), [(0.2, True), (1.0, False)])
def test_a_fit_to_a_part_of_a_long_trail_does_not_hide_it(
    monkeypatch: pytest.MonkeyPatch, part: float, is_fast: bool
) -> None:
    """A trail of 58 pixels, below the limit of 62.5, whose footprint's diagonal is beyond it."""
    measure = detection.measure_shapes

    def with_short_trails(*planes: Any) -> Any:
        shapes = measure(*planes)
        assert shapes.trails.good.all()
        trails = shapes.trails._replace(dx=part * shapes.trails.dx, dy=part * shapes.trails.dy)
        return shapes._replace(trails=trails)

    monkeypatch.setattr(detection, "measure_shapes", with_short_trails)
    found = detect_sources(_with_trail(58, 120.0, 130.0), DetectionConfig())
    assert found.rejected["fast trail"] == int(is_fast)


def test_a_point_source_cut_by_the_border_is_no_fast_trail() -> None:
    exposure = _exposure(signs=(0.0, 0.0, 0.0))
    places = ((0.0, 60.0), (128.0, 0.4), (255.0, 200.0), (60.0, 254.0), (1.5, 1.0))
    difference = exposure.difference + 5 * FLUX * np.sum([_star(x, y) for x, y in places], axis=0, dtype=np.float32)
    found = detect_sources(replace(exposure, difference=difference, science=difference), DetectionConfig())
    assert found.n_detected == len(places)
    assert found.rejected["fast trail"] == 0


def test_the_limit_of_motion_follows_exposure_time_and_configuration() -> None:
    exposure = _with_trail(70, 120.0, 130.0)
    longer = replace(exposure, visit=replace(exposure.visit, exposure_time_s=40.0))
    assert detect_sources(longer, DetectionConfig()).rejected["fast trail"] == 0
    assert detect_sources(exposure, DetectionConfig(max_motion_deg_per_day=12.0)).rejected["fast trail"] == 0


@pytest.mark.parametrize(
    ("plane", "half_width", "reason"),
    [
        ("CR", 0, "cosmic ray at the centre"),
        ("SPIKE", 2, "no usable pixel at the centre"),
        ("SPIKE", 0, None),  # the pixels around it are enough
        ("HIGH_VARIANCE", 4, None),  # a bright star may vary
    ],
)
def test_planes_at_the_centre_of_a_source(plane: str, half_width: int, reason: str | None) -> None:
    mask = np.zeros((SIZE, SIZE), dtype=np.int32)
    mask[200 - half_width : 201 + half_width, 120 - half_width : 121 + half_width] = mask_bits(plane)
    found = detect_sources(_exposure(mask=mask), DetectionConfig())
    assert {name: n for name, n in found.rejected.items() if n} == ({} if reason is None else {reason: 1})
    assert len(found.dia_sources) == (3 if reason is None else 2)


def test_a_source_without_a_centroid_is_dropped_unless_it_has_a_trail(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_measured(monkeypatch, centroid_flag=np.array([True]), x_err=np.array([np.nan]))
    point = _exposure(signs=(1.0, 0.0, 0.0))
    found = detect_sources(point, DetectionConfig())
    assert (len(found.dia_sources), found.rejected["centroid failed"]) == (0, 1)
    (trail,) = detect_sources(_with_trail(30, 120.0, 130.0), DetectionConfig()).dia_sources
    assert trail["centroid_flag"] == 0
    assert trail["xErr"] > 0
    np.testing.assert_allclose([trail["x"], trail["y"]], [120.0, 130.0], atol=5 * trail["xErr"])


def test_unknown_values_drop_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_measured(monkeypatch, science_flux=np.full(3, np.nan), science_flux_err=np.full(3, np.nan))
    assert len(detect_sources(_exposure(), DetectionConfig()).dia_sources) == 3


def _replace_measured(monkeypatch: pytest.MonkeyPatch, **columns: np.ndarray) -> None:
    measure = detection.measure_sources
    monkeypatch.setattr(detection, "measure_sources", lambda *planes: measure(*planes)._replace(**columns))


def test_shape_flags_say_why_there_are_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    found = detect_sources(_exposure(), DetectionConfig()).dia_sources
    for name in ("shape_flag", "shape_flag_no_pixels", "shape_flag_not_contained", "shape_flag_parent_source"):
        assert found[name].tolist() == [0, 0, 0]
    _replace_measured(
        monkeypatch,
        ixx=np.array([np.nan, 3.0, np.nan]),
        psf_n_pixels=np.array([441, 441, 0]),
        x=np.array([PLACES[0][0], PLACES[1][0] + 4.5, PLACES[2][0]]),
        y=np.array([place[1] for place in PLACES]),
    )
    found = detect_sources(replace(_exposure(), psf=_psf(1.0)), DetectionConfig()).dia_sources
    assert found["shape_flag"].tolist() == [1, 1, 1]
    assert found["shape_flag_no_pixels"].tolist() == [0, 0, 1]
    assert found["shape_flag_not_contained"].tolist() == [0, 1, 0]


def test_glints_in_a_row_are_flagged_by_sign() -> None:
    exposure = _exposure()
    row = [(20.0 + 30.0 * number, 30.0 + 15.0 * number) for number in range(8)]
    light = FLUX * np.sum([_star(x, y) for x, y in row], axis=0, dtype=np.float32)
    found = detect_sources(replace(exposure, difference=exposure.difference + light), DetectionConfig()).dia_sources
    in_row = np.min([np.hypot(found["x"] - x, found["y"] - y) for x, y in row], axis=0) < 3.0
    assert in_row.sum() == 8
    np.testing.assert_array_equal(found["glint_trail"] == 1, in_row)
    # Every second one negative: two rows of four are none.
    signs = FLUX * np.sum([(-1) ** i * _star(*place) for i, place in enumerate(row)], axis=0, dtype=np.float32)
    mixed = detect_sources(replace(exposure, difference=exposure.difference + signs), DetectionConfig()).dia_sources
    assert not mixed["glint_trail"].any()


def test_sky_sources_tell_the_noise_of_a_flux_and_not_the_sources() -> None:
    sky = detect_sources(_exposure(), DetectionConfig()).sky_sources
    assert sky["measured"] == 100
    # The scatter of 1.4826 MAD of 100 values is 0.12; the flux error is noise * sqrt(4 pi) sigma.
    assert sky["pull_width"] == pytest.approx(1.0, abs=0.5)
    assert sky["flux_sigma_njy"] == pytest.approx(NOISE * np.sqrt(4 * np.pi) * 1.8, rel=0.5)
    again = detect_sources(_exposure(), DetectionConfig()).sky_sources
    assert again == sky


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

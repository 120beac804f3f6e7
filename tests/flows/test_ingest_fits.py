"""Any folder of calibrated images by a header map: synthetic frames of a small dithered survey."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from click.testing import CliRunner

from runners.ingest.calibrated_fits import HeaderMapError, ingest_fits, load_header_map, shipped_maps
from runners.ingest.commands import ingest
from runners.ingest.night_folder import IngestedNight, IngestError
from schemas.elements import DetectorVisit
from schemas.exposures import mask_bits, read_exposure
from schemas.manifests import read_manifest
from transforms.detection import DetectionConfig, detect_sources
from transforms.subtraction import SubtractionConfig, subtract_detector

SIDE = 256
SCALE_DEG = 0.3 / 3600.0
RA, DEC = 150.0, 2.0
ZERO_POINT = 27.0
GAIN, READ_NOISE_E, SKY_ADU = 2.0, 6.0, 300.0
FIRST_MJD_UTC = 60000.2
NEW_SOURCE = (RA + 11 * SCALE_DEG, DEC - 17 * SCALE_DEG)
NEW_FLUX_ADU = 4000.0
N_FRAMES = 9


def pointing(dx_pix: float, dy_pix: float) -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [RA, DEC]
    wcs.wcs.crpix = [SIDE / 2 + dx_pix, SIDE / 2 + dy_pix]
    wcs.wcs.cd = [[-SCALE_DEG, 0.0], [0.0, SCALE_DEG]]
    return wcs


def stars() -> np.ndarray:
    """(n, 3): ra, dec, flux in adu; on a jittered grid, so that enough are isolated for kernel and PSF."""
    random = np.random.default_rng(11)
    step = np.arange(-140, 141, 35.0)
    x, y = np.meshgrid(step, step)
    x, y = x.ravel() + random.uniform(-5, 5, x.size), y.ravel() + random.uniform(-5, 5, x.size)
    flux = 10.0 ** random.uniform(4.2, 5.2, x.size)
    return np.column_stack((RA + x * SCALE_DEG, DEC + y * SCALE_DEG, flux))


def render(wcs: WCS, sigma_pix: float, seed: int, extra: list[tuple[float, float, float]] | None = None) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    image = np.full((SIDE, SIDE), SKY_ADU)
    for ra, dec, flux in [*stars(), *(extra or [])]:
        x, y = wcs.all_world2pix(ra, dec, 0)
        image += (
            flux / (2 * np.pi * sigma_pix**2) * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma_pix**2))
        )
    random = np.random.default_rng(seed)
    electrons = random.poisson(image * GAIN) + random.normal(0.0, READ_NOISE_E, image.shape)
    return (electrons / GAIN).astype(np.float32)


def write_frame(path: Path, number: int, *, sigma_pix: float = 1.8, **cards: object) -> None:
    """Frame `number` of the survey: a minute apart, dithered; the new source is in the even ones from 4 on."""
    wcs = pointing(3.3 * (number % 3), -2.1 * (number % 4))
    extra = [(*NEW_SOURCE, NEW_FLUX_ADU)] if number >= 4 and number % 2 == 0 else None
    header = wcs.to_header()
    values = {"INSTRUME": "TestCam", "FILTER": "r", "MJD-OBS": FIRST_MJD_UTC + number / 1440.0, "EXPTIME": 30.0}
    header.update({**values, "MAGZERO": ZERO_POINT, "GAIN": GAIN, "RDNOISE": READ_NOISE_E})
    for card, value in cards.items():
        if value is None:
            header.remove(card)
        else:
            header[card] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    fits.PrimaryHDU(render(wcs, sigma_pix, seed=number, extra=extra), header).writeto(path)


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine frames; 1, 3 and 5 have the best seeing. Among them files that cannot be used."""
    source = tmp_path_factory.mktemp("survey")
    for number in range(N_FRAMES):
        write_frame(source / f"night1/frame{number}.fits", number, sigma_pix=1.6 if number in (1, 3, 5) else 1.9)
    write_frame(source / "bad/filter.fits", 20, FILTER="H-alpha")
    write_frame(source / "bad/no_time.fits", 21, **{"MJD-OBS": None})
    write_frame(source / "bad/no_wcs.fits", 22, CTYPE1=None, CTYPE2=None)
    write_frame(source / "bad/zero_point.fits", 23, MAGZERO="unknown")
    write_frame(source / "bad/other_camera.fits", 24, INSTRUME="OtherCam")
    write_frame(source / "bad/same_time.fits", 4)
    (source / "bad/broken.fits").write_bytes(b"SIMPLE  =                    T")
    return source


@pytest.fixture(scope="module")
def night(survey: Path, tmp_path_factory: pytest.TempPathFactory) -> IngestedNight:
    return ingest_fits(survey, load_header_map("generic"), tmp_path_factory.mktemp("fits") / "night")


def test_bad_files_are_listed_with_reasons_and_the_rest_ingested(night: IngestedNight) -> None:
    reasons = dict(night.refused)
    bad = [f"bad/{name}.fits" for name in ("broken", "filter", "no_time", "no_wcs", "other_camera", "zero_point")]
    assert sorted(reasons) == [*bad, "night1/frame4.fits"]
    assert "H-alpha" in reasons["bad/filter.fits"]
    assert "no card MJD-OBS" in reasons["bad/no_time.fits"]
    assert "no celestial WCS" in reasons["bad/no_wcs.fits"]
    assert "MAGZERO must be a number, got 'unknown'" in reasons["bad/zero_point.fits"]
    assert "OtherCam" in reasons["bad/other_camera.fits"]
    assert "same time, band and detector 0 as bad/same_time.fits" in reasons["night1/frame4.fits"]
    # ten good frames, three of them stacked, one given twice
    assert (night.visits, night.detectors, night.templates) == (6, 6, 1)


def test_template_is_stacked_from_the_best_seeing_and_these_are_no_visits(night: IngestedNight) -> None:
    (note,) = [note for note in night.notes if note.startswith("template")]
    assert all(f"night1/frame{number}.fits" in note for number in (1, 3, 5))
    visits = read_manifest(night.folder).visits
    stems = {Path(visit.detectors[0].science).stem for visit in visits}
    assert stems == {"bad_same_time", *(f"night1_frame{number}" for number in (0, 2, 6, 7, 8))}
    assert {path.name for path in (night.folder / "science").glob("*night1*")} >= {"night1_frame0.fits"}
    assert not (night.folder / "science/night1_frame1.fits").exists()


def test_template_is_deeper_than_its_exposures_by_the_root_of_their_number(night: IngestedNight) -> None:
    visit = read_manifest(night.folder).visits[0]
    template, science = (read_exposure(str(path)) for path in (visit.detectors[0].template, visit.detectors[0].science))
    # resampling smooths: a windowed sinc keeps 50 to 100 % of the variance along each axis
    ratio = np.median(template.variance[np.isfinite(template.variance)]) / np.median(science.variance)
    assert 0.2 < 3.0 * ratio < 1.05


def test_a_new_source_is_found_where_it_is_and_nothing_else(night: IngestedNight) -> None:
    njy_per_adu = 10 ** (0.4 * (31.4 - ZERO_POINT))
    for visit in read_manifest(night.folder).visits:
        exposure = subtract_detector(DetectorVisit(visit, visit.detectors[0]), SubtractionConfig(), time.time())
        sources = detect_sources(exposure, DetectionConfig()).dia_sources
        # beside bright stars the residual of the fit adds to the noise: 5 sigma happens by chance, 6 does not
        reliable = sources[(sources["reliability"] >= 0.5) & (sources["snr"] >= 6.0)]
        number = round((visit.midpoint_mjd_tai - FIRST_MJD_UTC - 52.0 / 86400.0) * 1440.0)
        expected = number >= 4 and number % 2 == 0
        assert len(reliable) == expected, number
        if expected:
            apart = np.hypot(
                (reliable["ra"] - NEW_SOURCE[0]) * np.cos(np.radians(DEC)), reliable["dec"] - NEW_SOURCE[1]
            )
            assert apart[0] < 0.3 * SCALE_DEG  # S/N 40 and FWHM 4.5 pixels: 0.05 pixels
            # error of the fit and 3 % for the PSF's own
            error = np.hypot(3.0 * reliable["psfFluxErr"][0], 0.03 * NEW_FLUX_ADU * njy_per_adu)
            assert reliable["psfFlux"][0] == pytest.approx(NEW_FLUX_ADU * njy_per_adu, abs=float(error))


def test_given_templates_are_matched_by_band_and_place(survey: Path, tmp_path: Path) -> None:
    templates = tmp_path / "templates"
    write_frame(templates / "deep_r.fits", 1, **{"MJD-OBS": None})
    write_frame(templates / "deep_g.fits", 1, FILTER="g")
    write_frame(templates / "far_r.fits", 1, CRVAL1=RA + 1.0)
    given = ingest_fits(survey, load_header_map("generic"), tmp_path / "night", templates)
    visits = read_manifest(given.folder).visits
    assert len(visits) == N_FRAMES
    assert {Path(str(visit.detectors[0].template)).name for visit in visits} == {"deep_r.fits"}
    assert given.templates == 1


def test_a_single_exposure_has_no_template_and_that_is_said(tmp_path: Path) -> None:
    write_frame(tmp_path / "in/frame.fits", 0)
    made = ingest_fits(tmp_path / "in", load_header_map("generic"), tmp_path / "night")
    assert made.templates == 0
    assert read_manifest(made.folder).visits[0].detectors[0].template is None
    assert "no template for frame.fits" in made.notes


@pytest.mark.parametrize(
    ("time_entry", "value", "seconds"),
    [
        ("{card: T, format: mjd, scale: utc, at: start}", 60000.2, 37.0 + 15.0),
        ("{card: T, format: mjd, scale: tai, at: middle}", 60000.2, 0.0),
        ("{card: T, format: jd, scale: utc, at: end}", 2460000.7, 37.0 - 15.0),
        ("{card: T, format: iso, scale: utc, at: middle}", "2023-02-25T04:48:00", 37.0),
        ("{card: T, format: iso, scale: tai, at: start}", "2023-02-25T04:48:00", 15.0),
    ],
)
def test_times_are_read_in_every_way_the_map_can_say(
    tmp_path: Path, time_entry: str, value: object, seconds: float
) -> None:
    text = shipped_maps()["generic"].splitlines()
    text = [f"time: {time_entry}" if line.startswith("time:") else line for line in text]
    (tmp_path / "map.yaml").write_text("\n".join(text))
    write_frame(tmp_path / "in/frame.fits", 0, T=value)
    made = ingest_fits(tmp_path / "in", load_header_map(str(tmp_path / "map.yaml")), tmp_path / "night")
    midpoint = read_manifest(made.folder).visits[0].midpoint_mjd_tai
    # a JD in float64 is good to 4e-5 s, MJD - JD twice that
    assert (midpoint - 60000.2) * 86400.0 == pytest.approx(seconds, abs=1e-4)


def test_the_map_says_where_the_telescope_stands(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(shipped_maps()["generic"] + "\nobservatory: {card: SITE}\n")
    write_frame(tmp_path / "in/a.fits", 0, SITE="I41")
    write_frame(tmp_path / "in/b.fits", 1, SITE="243.14022 0.836322 0.546875")
    write_frame(tmp_path / "in/c.fits", 2, SITE="here")
    made = ingest_fits(tmp_path / "in", load_header_map(str(tmp_path / "map.yaml")), tmp_path / "night")
    found = {visit.observatory for visit in read_manifest(made.folder).visits}
    assert found and found <= {"I41", "243.14022 0.836322 0.546875"}
    (refused,) = made.refused
    assert refused.source == "c.fits" and "observatory: expected one of 500" in refused.reason
    assert made.visits + 1 == 2  # the best of two is the template


def test_planes_of_the_map_are_read(tmp_path: Path) -> None:
    wcs = pointing(0, 0)
    pixels = render(wcs, 1.8, seed=1)
    mask = np.zeros(pixels.shape, dtype=np.int16)
    mask[10, 20], mask[30, 40] = 1, 4
    header = wcs.to_header()
    header.update({"INSTRUME": "Cam", "FILTER": "r", "DATE-OBS": "2023-02-25T04:48:00", "EXPTIME": 30.0})
    header.update({"MAGZERO": ZERO_POINT, "DETECTOR": 7})
    mask_header = fits.Header({"MP_BAD": 0, "MP_SAT": 2})
    psf = np.zeros((5, 5))
    psf[2, 2] = 2.0
    hdus = fits.HDUList(
        [
            fits.PrimaryHDU(),
            fits.ImageHDU(pixels, header, name="IMAGE"),
            fits.ImageHDU(mask, mask_header, name="MASK"),
            fits.ImageHDU(np.full(pixels.shape, 170.0, dtype=np.float32), name="VARIANCE"),
            fits.ImageHDU(psf, name="PSF"),
        ]
    )
    (tmp_path / "in").mkdir()
    hdus.writeto(tmp_path / "in/frame.fits")
    made = ingest_fits(tmp_path / "in", load_header_map("with_planes"), tmp_path / "night")
    images = read_manifest(made.folder).visits[0].detectors[0]
    exposure = read_exposure(images.science)
    scale = 10 ** (0.4 * (31.4 - ZERO_POINT))
    assert images.detector == 7
    assert exposure.mask[10, 20] == mask_bits("BAD")
    assert exposure.mask[30, 40] == mask_bits("SAT")
    assert np.count_nonzero(exposure.mask) == 2
    np.testing.assert_allclose(exposure.image, pixels * scale, rtol=1e-6)
    np.testing.assert_allclose(exposure.variance, 170.0 * scale**2, rtol=1e-6)
    assert exposure.psf is not None
    assert exposure.psf[2, 2] == 1.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bands: {card: X}", "bands"),
        ("band: {card: FILTER, names: {Sloan: q}}", "'q' is not one of u, g, r, i, z, y"),
        ("time: {card: MJD-OBS, scale: gps}", "time.scale"),
        ("gain: {card: GAIN, value: 2}", "gain: give either card or value"),
        ("ignore: '('", "no regular expression"),
        ("mask: {hdu: MASK, bits: {0: BROKEN}}", "'BROKEN' is not one of BAD"),
        ("instrument: [", "no YAML"),
        ("instrument: {value: [1]}", "instrument.value"),
        ("band: r", "band: Input should be a dictionary"),
        ("saturation: {}", "saturation: give either card or value"),
        ("target: {}", "target: give either card or value"),
        ("mask: {hdu: 1, bits: {-1: BAD}}", "-1 is not in [0, 63)"),
        ("mask: {hdu: 1, bits: {a: BAD}}", "valid integer"),
        ("time: 2020-01-01", "time: Input should be"),
    ],
)
def test_a_wrong_map_is_refused_with_file_and_key(tmp_path: Path, line: str, message: str) -> None:
    key = line.split(":")[0]
    text = [one for one in shipped_maps()["generic"].splitlines() if not one.startswith(f"{key}:")]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*text, line]))
    with pytest.raises(HeaderMapError) as caught:
        load_header_map(str(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"- a", b"5", b"a: &a [*a]", b"\tx: 1", b"x: !!python/none", b"\xff\xfe"])
def test_what_is_no_map_at_all_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(HeaderMapError, match=r"mine\.yaml"):
        load_header_map(str(path))
    with pytest.raises(HeaderMapError, match="cannot be read"):
        load_header_map(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fwhm_pix: {value: wide}", "fwhm_pix: value must be a number, got 'wide'"),
        ("fwhm_pix: {value: -3}", "fwhm_pix must be positive, got -3.0"),
        ("fwhm_pix: {card: SEEING}", "fwhm_pix: no card SEEING with a value"),
        ("mask: {hdu: MASK}", "mask: no HDU 'MASK', there are 0 PRIMARY"),
        ("image_hdu: SCI", "image_hdu: no HDU 'SCI'"),
        ("psf_hdu: 0", "an odd square image with a positive sum is needed"),
        ("detector: {value: abc}", "detector must be an integer, got 'abc'"),
        ("instrument: {value: ' '}", "instrument: the card is empty"),
        ("ignore: '.'", "no FITS files"),
    ],
)
def test_a_map_that_fits_no_file_says_what_is_missing(tmp_path: Path, line: str, message: str) -> None:
    key = line.split(":")[0]
    text = [one for one in shipped_maps()["generic"].splitlines() if not one.startswith(f"{key}:")]
    (tmp_path / "mine.yaml").write_text("\n".join([*text, line]))
    write_frame(tmp_path / "in/frame.fits", 0)
    with pytest.raises(IngestError) as caught:
        ingest_fits(tmp_path / "in", load_header_map(str(tmp_path / "mine.yaml")), tmp_path / "night")
    assert message in str(caught.value)


def change(path: Path, modify: Callable[[fits.PrimaryHDU], object]) -> None:
    """Rewrite a frame with its HDU modified."""
    with fits.open(path) as opened:
        hdu = opened[0].copy()
    modify(hdu)
    hdu.writeto(path, overwrite=True, output_verify="ignore")


def set_data(path: Path, modify: Callable[[np.ndarray], np.ndarray]) -> None:
    change(path, lambda hdu: setattr(hdu, "data", modify(hdu.data)))


def spoil_card(path: Path, card: bytes, text: bytes) -> None:
    content = path.read_bytes()
    at = content.index(card) + 10
    path.write_bytes(content[:at] + text + content[at + len(text) :])


def with_cards(**cards: object) -> Callable[[Path], object]:
    return lambda path: change(path, lambda hdu: hdu.header.update(cards))


# what is done to a frame, and what its refusal must say
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:90_000]), "truncated"),
    "cut_behind_the_header": (lambda path: path.write_bytes(path.read_bytes()[:2880]), "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "broken FITS file"),
    "packed_and_cut": (lambda path: path.write_bytes(gzip.compress(path.read_bytes())[:40_000]), "EOFError"),
    "cube": (lambda path: set_data(path, lambda data: np.stack([data, data])), "two-dimensional, got shape (2, 256"),
    "spectrum": (lambda path: set_data(path, np.ravel), "two-dimensional, got shape (65536,)"),
    "stamp": (lambda path: set_data(path, lambda data: data[:10, :10]), "too small, at least 32 x 32"),
    "nothing_seen": (lambda path: set_data(path, lambda data: data * np.nan), "no pixel has both a finite value"),
    "too_bright": (lambda path: set_data(path, lambda data: np.full_like(data, 3e38)), "0.0% of the pixels are good"),
    "card_in_ruins": (lambda path: spoil_card(path, b"EXPTIME", b"  ?!@#$ '  "), "EXPTIME"),
    "card_binary": (lambda path: spoil_card(path, b"EXPTIME", b"\x00\xff\xfe\x01"), "EXPTIME"),
    "blank_instrument": (with_cards(INSTRUME=fits.card.UNDEFINED), "instrument: no card INSTRUME with a value"),
    "blank_band": (with_cards(FILTER=fits.card.UNDEFINED), "band: no card FILTER with a value"),
    "time_text": (with_cards(**{"MJD-OBS": "yesterday"}), "time: MJD-OBS must be a number, got 'yesterday'"),
    "time_huge": (with_cards(**{"MJD-OBS": 1e300}), "MJD 1e+300 is not between 1960 and 2100"),
    "time_before_the_ids": (with_cards(**{"MJD-OBS": 50000.0}), "is not in a night from 20100101 to 20541231"),
    "no_exposure_time": (with_cards(EXPTIME=0), "exposure time must be in (0, 86400] s, got 0.0"),
    "endless": (with_cards(EXPTIME=1e9), "exposure time must be in (0, 86400] s"),
    "zero_point_nan": (with_cards(MAGZERO="NaN"), "MAGZERO must be a finite number, got 'NaN'"),
    "zero_point_negative": (with_cards(MAGZERO=-99.0), "zero_point -99.0 is no AB magnitude"),
    "no_gain": (with_cards(GAIN=0.0), "gain must be in [1e-06, 1e+06]"),
    "gain_huge": (with_cards(GAIN=1e300), "gain must be in [1e-06, 1e+06]"),
    "gain_true": (with_cards(GAIN=True), "GAIN must be a finite number, got True"),
    "position_text": (with_cards(CRVAL1="x"), "CRVAL1 must be a number, got 'x'"),
    "position_missing": (lambda path: change(path, lambda hdu: hdu.header.remove("CRVAL2")), "CRVAL2 must be a number"),
    "no_scale": (with_cards(CDELT1=0.0), "unusable WCS"),
    "tiny_scale": (with_cards(CDELT1=1e-30, CDELT2=1e-30), "unusable WCS: to the sky and back"),
    "galactic": (with_cards(CTYPE1="GLON-TAN", CTYPE2="GLAT-TAN"), "must have axes RA, DEC"),
    "old_equinox": (with_cards(RADESYS="FK4"), "must be ICRS or FK5 of J2000"),
    "beyond_the_pole": (with_cards(CRVAL2=95.0), "unusable WCS"),
}


def test_each_kind_of_damage_has_its_reason_and_costs_its_file_only(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for number in range(4):
        write_frame(source / f"good{number}.fits", number)
    for number, (name, (damage, _)) in enumerate(DAMAGES.items(), start=10):
        write_frame(source / f"{name}.fits", number)
        damage(source / f"{name}.fits")
    (source / "folder.fits").mkdir()
    (source / "circle.fits").symlink_to(source / "circle.fits")
    (source / "nowhere.fits").symlink_to(tmp_path / "nowhere")
    (source / "again").symlink_to(source)
    result = CliRunner().invoke(ingest, ["fits", str(source), "--out", str(tmp_path / "night"), "--json"])
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    reasons = {item["source"].removesuffix(".fits"): item["reason"] for item in summary["refused"]}
    assert sorted(reasons) == sorted([*DAMAGES, "circle", "nowhere"])
    for name, (_, reason) in DAMAGES.items():
        assert reason in reasons[name], name
    assert "symbolic links" in reasons["circle"]
    assert "No such file" in reasons["nowhere"]
    assert (summary["visits"], summary["templates"]) == (3, 1)
    assert len(list((tmp_path / "night" / "science").iterdir())) == 3


@pytest.mark.parametrize("where", [{"CRVAL1": 0.0}, {"CRVAL2": 90.0}, {"CRVAL2": -90.0}, {"CRVAL1": 359.9999}])
def test_fields_at_ra_zero_and_the_poles_are_one_field(tmp_path: Path, where: dict[str, float]) -> None:
    for number in range(4):
        write_frame(tmp_path / f"in/{number}.fits", number, **where)
    made = ingest_fits(tmp_path / "in", load_header_map("generic"), tmp_path / "night")
    assert (made.visits, made.templates, made.refused) == (3, 1, ())
    for visit in read_manifest(made.folder).visits:
        assert 0.0 <= visit.boresight_ra_deg < 360.0


def test_a_distortion_survives_the_ingest(tmp_path: Path) -> None:
    """SIP is no part of the standard: astropy leaves it out of a header unless told otherwise."""
    write_frame(
        tmp_path / "in/frame.fits",
        0,
        CTYPE1="RA---TAN-SIP",
        CTYPE2="DEC--TAN-SIP",
        A_ORDER=2,
        B_ORDER=2,
        A_2_0=1e-4,
        B_0_2=1e-4,
    )
    made = ingest_fits(tmp_path / "in", load_header_map("generic"), tmp_path / "night")
    kept = read_exposure(read_manifest(made.folder).visits[0].detectors[0].science).wcs
    given = WCS(fits.getheader(tmp_path / "in/frame.fits"))
    x, y = [0.0, SIDE - 1.0, 30.0], [0.0, 40.0, SIDE - 1.0]
    np.testing.assert_allclose(kept.all_pix2world(x, y, 0), given.all_pix2world(x, y, 0), atol=1e-9)
    assert np.hypot(*(np.array(given.all_pix2world(255, 0, 0)) - given.wcs_pix2world(255, 0, 0))) > SCALE_DEG


def test_names_of_any_kind_are_ingested(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for number, name in enumerate(["été ✨.fits", "x" * 240 + ".fits", "with space.fits"]):
        write_frame(source / "plain.fits", number)
        (source / "plain.fits").rename(source / name)
    write_frame(source / "plain.fits", 3)
    os.rename(bytes(source / "plain.fits"), bytes(source) + b"/\xff\xfe.fits")
    result = CliRunner().invoke(ingest, ["fits", str(source), "--out", str(tmp_path / "night"), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["detectors"] == 3
    assert json.loads(result.stdout)["refused"] == []


def test_compressed_files_are_read_and_two_of_a_name_are_told_apart(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for number in range(4):
        write_frame(source / f"{number}.fits", number)
    with fits.open(source / "0.fits") as hdus:
        packed = fits.CompImageHDU(hdus[0].data, hdus[0].header, compression_type="GZIP_1")
        fits.HDUList([fits.PrimaryHDU(), packed]).writeto(source / "0.fits.fz")
    (source / "0.fits").unlink()
    (source / "1.fits.gz").write_bytes(gzip.compress((source / "1.fits").read_bytes()))
    made = ingest_fits(source, load_header_map("generic"), tmp_path / "night")
    assert [(refusal.source, refusal.reason) for refusal in made.refused] == [
        ("1.fits.gz", "another file is written as 1.fits already")
    ]
    assert made.visits == 3


def test_folders_that_cannot_be_read_or_written_are_refused_as_a_whole(tmp_path: Path) -> None:
    source, far = tmp_path / "in", tmp_path / "far"
    for number in range(3):
        write_frame(source / f"{number}.fits", number)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/one.fits").write_bytes(b"x")
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/visits.jsonl").write_text("{}\n")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1").write_text("")
    header_map = load_header_map("generic")
    for folder, out, templates, message in [
        (tmp_path / "empty", "night", None, "no FITS files in"),
        (tmp_path / "file", "night", None, "is not a folder"),
        (source, "in", None, "is to be read and written: give a new folder"),
        (source, "file", None, "is a file, not a folder"),
        (source, "file/night", None, "cannot be written"),
        (source, "mine", None, "holds a night that was not made by ingest"),
        (source, "thesis", None, "is not empty"),
        (source, "night", tmp_path / "empty", "no templates"),
        (source, "night", tmp_path / "bad", "none of 1 templates can be used; one.fits: broken FITS file"),
        (source, "other", source, "but the templates"),
    ]:
        with pytest.raises(IngestError, match=message):
            ingest_fits(folder, header_map, tmp_path / out, templates)
    assert (tmp_path / "mine/visits.jsonl").read_text() == "{}\n"
    write_frame(far / "r.fits", 1, CRVAL1=RA + 1.0)
    made = ingest_fits(source, header_map, tmp_path / "lonely", far)
    assert (made.visits, made.templates) == (3, 0)
    assert [note for note in made.notes if note.startswith("no template for")] != []


def test_a_night_is_written_again_and_meanwhile_has_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write_frame(tmp_path / f"in/{number}.fits", number)
    header_map, night = load_header_map("generic"), tmp_path / "night"
    ingest_fits(tmp_path / "in", header_map, night)
    first = {path.name: path.read_bytes() for path in night.rglob("*") if path.is_file()}
    ingest_fits(tmp_path / "in", header_map, night)
    assert {path.name: path.read_bytes() for path in night.rglob("*") if path.is_file()} == first

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runners.ingest.assembly.write_exposure", full)
    with pytest.raises(IngestError, match=r"cannot be written: OSError: .*No space left"):
        ingest_fits(tmp_path / "in", header_map, night)
    assert not (night / "visits.jsonl").exists()


def test_command_prints_a_summary_and_shows_maps(survey: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(ingest, ["fits", "--show-map", "generic"])
    assert shown.exit_code == 0
    assert shown.stdout == shipped_maps()["generic"]
    (tmp_path / "map.yaml").write_text(shown.stdout)
    arguments = ["fits", str(survey), "--map", str(tmp_path / "map.yaml"), "--out", str(tmp_path / "night"), "--json"]
    result = CliRunner().invoke(ingest, arguments)
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert {key: summary[key] for key in ("visits", "detectors", "templates")} == {
        "visits": 6,
        "detectors": 6,
        "templates": 1,
    }
    assert len(summary["refused"]) == 7
    unknown = CliRunner().invoke(ingest, ["fits", str(survey), "--map", "nosuch", "--out", str(tmp_path / "other")])
    assert unknown.exit_code == 2
    assert "shipped maps are generic, with_planes" in unknown.stderr


def test_a_folder_without_usable_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one.fits").write_bytes(b"nothing")
    with pytest.raises(IngestError, match=r"none of 1 files can be used; one.fits: broken FITS file"):
        ingest_fits(tmp_path / "in", load_header_map("generic"), tmp_path / "night")

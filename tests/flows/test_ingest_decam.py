"""Community Pipeline cutouts to night folders: what comes in must come out, and what cannot must be said."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from click.testing import CliRunner

from runners.ingest.commands import ingest
from runners.ingest.decam import ingest_decam
from runners.ingest.night_folder import IngestedNight, IngestError
from schemas.elements import DetectorVisit
from schemas.exposures import Exposure, mask_bits, read_exposure
from schemas.manifests import read_manifest
from transforms.numerics.kernel_matching import TooFewKernelStarsError
from transforms.numerics.psf_modelling import psf_fwhm_pix
from transforms.subtraction import SubtractionConfig, subtract_detector

DATA = Path(__file__).parents[3] / "shared" / "data" / "decam_legacysurvey_cutouts"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}")


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, IngestedNight]:
    made = ingest_decam(DATA, tmp_path_factory.mktemp("decam") / "nights")
    return {night.instrument: night for night in made}


def input_of(name: str, kind: str = "ooi") -> Path:
    """The image that a written file was made from: its name has `_` for the `.` before the CCD."""
    wanted = name.replace("ooi", kind)
    return next(
        path for path in DATA.rglob(f"*_{kind}_*.fits") if path.name.replace(".", "_") == wanted.replace(".", "_")
    )


def written(night: IngestedNight) -> list[Path]:
    return sorted(night.folder.glob("science/*.fits")) + sorted(night.folder.glob("templates/*.fits"))


def table_row(name: str) -> fits.FITS_record:
    for path in DATA.rglob("survey-ccds-1.fits.gz"):
        for row in fits.getdata(path, 1):
            if Path(row["image_filename"]).name == name:
                return row
    raise LookupError(name)


def aperture_flux(exposure: Exposure, x: float, y: float, radius_pix: float) -> float:
    rows, columns = np.mgrid[: exposure.image.shape[0], : exposure.image.shape[1]]
    distance = np.hypot(columns - x, rows - y)
    sky = np.nanmedian(exposure.image[(distance > 2 * radius_pix) & (distance < 3 * radius_pix)])
    return float(np.nansum(exposure.image[distance < radius_pix] - sky))


def test_each_instrument_gets_a_night_folder(nights: dict[str, IngestedNight]) -> None:
    counts = {name: (night.visits, night.templates, len(night.refused)) for name, night in nights.items()}
    assert counts == {"DECam": (6, 3, 0), "90prime": (4, 2, 0), "Mosaic3": (1, 1, 0)}
    for night in nights.values():
        assert len(read_manifest(night.folder).visits) == night.visits
        assert read_manifest(night.folder).problems == ()


def test_positions_are_those_of_the_input_wcs(nights: dict[str, IngestedNight]) -> None:
    for night in nights.values():
        for path in written(night):
            exposure = read_exposure(path)
            with fits.open(input_of(path.name)) as hdus:
                wcs = WCS(hdus[1].header)
            ny, nx = exposure.image.shape
            x, y = [0.0, nx - 1.0, 0.0, nx - 1.0, nx / 3.0], [0.0, 0.0, ny - 1.0, ny - 1.0, ny / 2.0]
            # TPV coefficients are written with 12 digits: 1e-8 degrees over the focal plane are 4e-5 arcsec
            np.testing.assert_allclose(exposure.wcs.all_pix2world(x, y, 0), wcs.all_pix2world(x, y, 0), atol=2e-8)


def test_pixels_variance_and_mask_are_those_of_the_input(nights: dict[str, IngestedNight]) -> None:
    for path in written(nights["DECam"]):
        exposure = read_exposure(path)
        planes = {kind: fits.getdata(input_of(path.name, kind), 1) for kind in ("ooi", "ood", "oow")}
        usable = planes["oow"] > 0
        scale = exposure.image[usable] / planes["ooi"][usable]
        assert np.ptp(scale) < 1e-5 * scale[0]  # one factor for all: nJy per adu, in float32
        np.testing.assert_allclose(exposure.variance[usable] * planes["oow"][usable], scale[0] ** 2, rtol=1e-5)
        assert np.isinf(exposure.variance[~usable]).all()
        marked = (exposure.mask & mask_bits("BAD", "SAT", "CR", "NO_DATA", "STREAK")) != 0
        np.testing.assert_array_equal(marked, (planes["ood"] != 0) | ~usable)


def test_a_star_has_the_same_flux_in_all_epochs_of_a_band(nights: dict[str, IngestedNight]) -> None:
    """Zero points over three years, on the brightest of the field's Gaia stars (of the others one is a variable)."""
    stars = np.concatenate([fits.getdata(path, 1) for path in sorted(DATA.rglob("chunk-*.fits"))])
    stars = stars[(np.abs(stars["ra"] - 186.744) < 0.02) & (np.abs(stars["dec"] - 25.462) < 0.012)]
    star = stars[np.argmin(stars["phot_g_mean_mag"])]
    fluxes: dict[str, list[float]] = {}
    for path in written(nights["DECam"]):
        exposure = read_exposure(path)
        x, y = exposure.wcs.all_world2pix(star["ra"], star["dec"], 0)
        fluxes.setdefault(path.name.split("_")[4], []).append(aperture_flux(exposure, float(x), float(y), 12.0))
    assert {band: len(found) for band, found in fluxes.items()} == {"g": 2, "r": 3, "z": 4}
    for band, found in fluxes.items():
        # zero points hold to 1 or 2 %, and an aperture of 12 pixels loses 1 to 4 % at a FWHM of 3.7 to 5.6 pixels;
        # an exposure time that is forgotten, or counted twice, would make a factor of 2
        assert np.ptp(found) < 0.07 * np.median(found), band
    # Gaia's G of an M dwarf lies between its r and z
    assert 31.4 - 2.5 * np.log10(fluxes["r"][0]) > star["phot_g_mean_mag"] > 31.4 - 2.5 * np.log10(fluxes["z"][0])


def test_the_psf_is_the_model_at_the_centre(nights: dict[str, IngestedNight]) -> None:
    for night in nights.values():
        for path in written(night):
            psf = read_exposure(path).psf
            assert psf is not None
            assert psf.sum() == pytest.approx(1.0)
            half = psf.shape[0] // 2
            assert np.unravel_index(np.argmax(psf), psf.shape) == (half, half)
    for path in written(nights["DECam"]):
        # the table's FWHM is SExtractor's over the whole CCD, 5 to 12 % wider than the half-maximum contour
        ratio = psf_fwhm_pix(read_exposure(path).psf) / float(table_row(input_of(path.name).name)["fwhm"])
        assert 0.85 < ratio < 1.02


def test_the_best_seeing_is_the_template_and_no_visit(nights: dict[str, IngestedNight]) -> None:
    night = nights["DECam"]
    for visit in read_manifest(night.folder).visits:
        science, template = (
            read_exposure(str(path)) for path in (visit.detectors[0].science, visit.detectors[0].template)
        )
        assert psf_fwhm_pix(template.psf) <= psf_fwhm_pix(science.psf)
        assert f"_{visit.band}_" in Path(str(visit.detectors[0].template)).name
    assert not {path.name for path in night.folder.glob("science/*")} & {
        path.name for path in night.folder.glob("templates/*")
    }


def test_midpoints_are_tai_and_detectors_are_the_ccds(nights: dict[str, IngestedNight]) -> None:
    for visit in read_manifest(nights["DECam"].folder).visits:
        path = input_of(Path(visit.detectors[0].science).name)
        header = fits.getheader(path, 1)
        row = table_row(path.name)
        tai_minus_utc_s = 37.0 if row["mjd_obs"] >= 57754 else 35.0  # since 2017; in April 2015
        expected = row["mjd_obs"] + (tai_minus_utc_s + 0.5 * row["exptime"]) / 86400.0
        assert visit.midpoint_mjd_tai == pytest.approx(expected, abs=1e-8)
        assert visit.detectors[0].detector == header["CCDNUM"]


def test_every_exposure_is_refused_for_too_few_kernel_stars(nights: dict[str, IngestedNight]) -> None:
    for visit in read_manifest(nights["DECam"].folder).visits:
        with pytest.raises(TooFewKernelStarsError, match="10 are needed"):
            subtract_detector(DetectorVisit(visit, visit.detectors[0]), SubtractionConfig(), time.time())


def test_bad_inputs_are_listed_and_the_rest_ingested(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    shutil.copytree(DATA / "testcase4", source)
    images = {path.name[4:17]: path for path in source.rglob("*_ooi_*.fits") if "calib" not in path.parts}
    no_mask, broken, other_shape, no_wcs, unknown = sorted(images.values())[:5]
    no_mask.with_name(no_mask.name.replace("_ooi_", "_ood_")).unlink()
    broken.write_bytes(broken.read_bytes()[:100_000])
    with fits.open(other_shape, mode="update") as hdus:
        hdus[1].data = hdus[1].data[:100]
    with fits.open(no_wcs, mode="update") as hdus:
        for card in ("CTYPE1", "CTYPE2"):
            del hdus[1].header[card]
    unknown.rename(unknown.with_name("c4d_990101_000000_ooi_z_ls9.N3.fits"))
    result = CliRunner().invoke(ingest, ["decam", str(source), "--out", str(tmp_path / "night"), "--json"])
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    reasons = {item["source"]: item["reason"] for item in summary["refused"]}
    assert "_ood_" in reasons[no_mask.name]
    assert "broken FITS file" in reasons[broken.name]
    assert "planes differ in shape" in reasons[other_shape.name]
    assert "no celestial WCS" in reasons[no_wcs.name]
    assert "no zero point" in reasons["c4d_990101_000000_ooi_z_ls9.N3.fits"]
    assert summary["visits"] + summary["templates"] + len(reasons) == 9
    assert summary["visits"] >= 1
    assert len(read_manifest(tmp_path / "night").visits) == summary["visits"]


def test_a_tree_without_a_table_of_zero_points_is_refused(tmp_path: Path) -> None:
    images = DATA / "mzlsbass3" / "images"
    with pytest.raises(IngestError, match="no survey-ccds"):
        ingest_decam(images, tmp_path / "night")
    with pytest.raises(IngestError, match=r"no \*_ooi_\*\.fits"):
        ingest_decam(tmp_path, tmp_path / "night")

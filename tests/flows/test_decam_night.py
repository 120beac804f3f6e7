"""Real DECam exposures from ingest to diaSources: each one accounted for, and injected sources measured rightly.

The cutouts hold one to four stars, too few for a matching kernel, so `produce` refuses all of them. For the recovery
test stars that do not change are put into the template and the science exposures of each field, at one place on the
sky, and transients into the science exposures only. Everything else stays real: sky, noise, masks, galaxies, the PSF
models of each epoch, zero points, and the TPV coordinates that connect the epochs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from astropy.io import fits
from scipy import ndimage

from runners.ingest.decam import ingest_decam
from runners.ingest.night_folder import IngestedNight
from schemas.exposures import Exposure, read_exposure, write_exposure
from schemas.manifests import read_manifest

DATA = Path(__file__).parents[3] / "shared" / "data" / "decam_legacysurvey_cutouts"
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}"),
]
SEEDS = (1, 2, 3, 4, 5)
N_STARS, STAR_SNR = 28, (100.0, 600.0)
N_TRANSIENTS, TRANSIENT_SNR = 10, (8.0, 50.0)  # in the science image alone
MATCH_PIX = 3.0
PIXEL_DEG = 0.262 / 3600.0
MAD_TO_SIGMA, MEDIAN_ERROR = 1.4826, 1.2533  # the median's error is 1.25 times the mean's
COLUMNS = ("visit", "x", "y", "ra", "dec", "raErr", "decErr", "psfFlux", "psfFluxErr", "reliability")


def source_images() -> dict[str, Path]:
    return {path.name: path for path in DATA.rglob("*_ooi_*.fits") if "calib" not in path.parts}


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, IngestedNight]:
    made = ingest_decam(DATA, tmp_path_factory.mktemp("decam") / "nights")
    return {night.instrument: night for night in made}


# every exposure is accounted for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instrument", "error", "reason"),
    [
        ("DECam", "TooFewKernelStarsError", "kernel stars offered, 10 are needed"),
        ("Mosaic3", "TooFewKernelStarsError", "kernel stars offered, 10 are needed"),
        ("90prime", "UnusableImageError", "is smaller than 64 pixels"),
    ],
)
def test_every_exposure_is_a_template_or_refused_with_its_reason(
    nights: dict[str, IngestedNight],
    produce: Callable[..., Any],
    tmp_path: Path,
    instrument: str,
    error: str,
    reason: str,
) -> None:
    night = nights[instrument]
    run = produce(night.folder, tmp_path / "out")
    assert run.exit_code == 0, run.stderr
    visits = {visit.visit: frame_of(visit.detectors[0].science) for visit in read_manifest(night.folder).visits}
    templates = {frame_of(path) for path in night.folder.glob("templates/*.fits")}
    failures = run.failures()
    failed = {visits[failure["visit"]] for failure in failures}
    assert len(failures) == len(failed) == run.summary["failures"] == run.summary["visits"]
    for failure in failures:
        assert failure["error"] == error
        assert reason in failure["reason"]
        assert failure["lost"] == "all alerts of the detector"
    mine = {name for name, path in source_images().items() if fits.getval(path, "INSTRUME") == instrument}
    assert failed | templates == mine
    assert not failed & templates
    assert night.refused == ()


# injected sources -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Injections:
    """Transients of all runs, one row each: what was put in and what came out; NaN where nothing did.

    `strange` counts the reliable diaSources of all runs that are none of them, nor one of the field's Gaia stars.
    """

    visit: np.ndarray
    flux: np.ndarray
    found: np.ndarray
    measured: dict[str, np.ndarray]
    ra: np.ndarray
    dec: np.ndarray
    strange: int
    summaries: list[dict[str, Any]]

    def expected_snr(self) -> np.ndarray:
        """Flux over the error that its exposure's diaSources have in the median."""
        error = self.measured["psfFluxErr"]
        typical = {visit: np.nanmedian(error[self.visit == visit]) for visit in np.unique(self.visit)}
        return self.flux / np.array([typical[visit] for visit in self.visit])

    def pulls(self) -> np.ndarray:
        return (self.measured["psfFlux"] - self.flux) / self.measured["psfFluxErr"]


def frame_of(path: str | Path) -> str:
    return str(fits.getval(path, "FRAME", "IMAGE"))


def electrons_per_njy(path: str | Path) -> float:
    """By the gain of the input's header and the zero point that the ingest used."""
    gain = float(fits.getval(source_images()[frame_of(path)], "GAINA", 1))
    return gain / 10.0 ** (0.4 * (31.4 - float(fits.getval(path, "MAGZERO", "IMAGE"))))


def shifted(psf: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """The PSF moved by part of a pixel, by a phase in Fourier space: not by the splines that measure it later."""
    wide = np.pad(psf, 8)
    return np.fft.ifft2(ndimage.fourier_shift(np.fft.fft2(wide), (dy, dx))).real


def add_sources(exposure: Exposure, sources: np.ndarray, electrons: float, random: np.random.Generator) -> Exposure:
    """Exposure with point sources (x, y, flux), their photon noise in pixels and variance."""
    image, variance = exposure.image.astype(np.float64), exposure.variance.astype(np.float64)
    assert exposure.psf is not None
    for x, y, flux in sources:
        column, row = round(x), round(y)
        stamp = flux * shifted(exposure.psf, x - column, y - row)
        top, left = row - stamp.shape[0] // 2, column - stamp.shape[1] // 2
        rows = slice(max(top, 0), min(top + stamp.shape[0], image.shape[0]))
        columns = slice(max(left, 0), min(left + stamp.shape[1], image.shape[1]))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue  # the template reaches further than the science image
        stamp = stamp[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        light = np.maximum(stamp, 0.0)
        image[rows, columns] += random.poisson(light * electrons) / electrons + np.minimum(stamp, 0.0)
        variance[rows, columns] += light / electrons
    return replace(exposure, image=image.astype(np.float32), variance=variance.astype(np.float32))


def room(exposure: Exposure, objects_pix: float, margin_pix: int) -> np.ndarray:
    """(ny, nx) bool: pixels this far from every bright or masked one, and from the image's edges."""
    good = np.isfinite(exposure.image) & (exposure.mask == 0)
    smooth = ndimage.gaussian_filter(np.where(good, exposure.image - np.nanmedian(exposure.image), 0.0), 1.5)
    noise = MAD_TO_SIGMA * np.median(np.abs(smooth[good]))
    free = ndimage.distance_transform_edt(good & (smooth < 5.0 * noise)) > objects_pix
    inside = np.zeros_like(free)
    inside[margin_pix:-margin_pix, margin_pix:-margin_pix] = True
    return np.asarray(free & inside)


def room_in_both(science: Exposure, template: Exposure) -> np.ndarray:
    """Where a transient has room in the science image and at the same place of the sky in the template."""
    rows, columns = np.nonzero(room(science, 12.0, 15))
    sky = science.wcs.all_pix2world(columns, rows, 0)
    x, y = (np.rint(axis).astype(int) for axis in template.wcs.all_world2pix(*sky, 0))
    in_template = room(template, 12.0, 15)
    ny, nx = in_template.shape
    both = np.zeros(science.image.shape, dtype=bool)
    both[rows, columns] = in_template[y.clip(0, ny - 1), x.clip(0, nx - 1)]  # its edges have no room
    return both


def point_source_error(exposure: Exposure) -> float:
    """Error of a PSF flux on the sky of one exposure, nJy."""
    assert exposure.psf is not None
    sky_variance = np.median(exposure.variance[np.isfinite(exposure.variance)])
    return float(np.sqrt(sky_variance / np.sum(exposure.psf**2)))


def far_from(x: float, y: float, others: np.ndarray, least_pix: float) -> bool:
    return len(others) == 0 or bool(np.min(np.hypot(others[:, 0] - x, others[:, 1] - y)) >= least_pix)


def random_places(
    random: np.random.Generator, allowed: np.ndarray, number: int, apart_pix: float, others: np.ndarray
) -> np.ndarray:
    """(n, 2) positions between the pixels, apart from each other and from others; fewer where there is no room."""
    places = np.empty((0, 2))
    for x, y in random.uniform((0, 0), (allowed.shape[1] - 1, allowed.shape[0] - 1), (5000, 2)):
        free = allowed[round(y), round(x)] and far_from(x, y, places, apart_pix) and far_from(x, y, others, 16.0)
        if free and len(places) < number:
            places = np.vstack([places, (x, y)])
    return places


def log_uniform(random: np.random.Generator, limits: tuple[float, float], number: int) -> np.ndarray:
    return np.exp(random.uniform(np.log(limits[0]), np.log(limits[1]), number))


def inject(night: Path, folder: Path, seed: int, allowed: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """A copy of a night folder with stars and transients; returns (ra, dec, flux) of the transients by visit."""
    shutil.copytree(night, folder)
    random = np.random.default_rng(seed)
    stars: dict[str, np.ndarray] = {}
    injected = {}
    for visit in read_manifest(folder).visits:
        images = visit.detectors[0]
        assert images.template is not None
        if images.template not in stars:
            template = read_exposure(images.template)
            places = random_places(random, room(template, 18.0, 30), N_STARS, 20.0, np.empty((0, 2)))
            flux = point_source_error(template) * log_uniform(random, STAR_SNR, len(places))
            stars[images.template] = np.column_stack((*template.wcs.all_pix2world(*places.T, 0), flux))
            write(images.template, template, np.column_stack((places, flux)), random)
        science = read_exposure(images.science)
        ra, dec, star_flux = stars[images.template].T
        star_places = np.column_stack(science.wcs.all_world2pix(ra, dec, 0))
        places = random_places(random, allowed[visit.visit], N_TRANSIENTS, 18.0, star_places)
        flux = point_source_error(science) * log_uniform(random, TRANSIENT_SNR, len(places))
        sources = np.column_stack((np.vstack([star_places, places]), np.concatenate([star_flux, flux])))
        write(images.science, science, sources, random)
        injected[visit.visit] = np.column_stack((*science.wcs.all_pix2world(*places.T, 0), flux))
    return injected


def write(path: str, exposure: Exposure, sources: np.ndarray, random: np.random.Generator) -> None:
    electrons = electrons_per_njy(path)
    cards = {card: fits.getval(path, card, "IMAGE") for card in ("MAGZERO", "FRAME")}
    write_exposure(Path(path), add_sources(exposure, sources, electrons, random), header=cards)


@pytest.fixture(scope="module")
def injections(
    nights: dict[str, IngestedNight], produce: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Injections:
    base, night = tmp_path_factory.mktemp("injected"), nights["DECam"].folder
    allowed = {}
    for visit in read_manifest(night).visits:
        images = visit.detectors[0]
        allowed[visit.visit] = room_in_both(read_exposure(images.science), read_exposure(str(images.template)))
    rows: list[tuple[int, float, float, float]] = []
    found: list[dict[str, float]] = []
    strange = 0
    summaries = []
    for seed in SEEDS:
        truth = inject(night, base / f"night{seed}", seed, allowed)
        run = produce(base / f"night{seed}", base / f"out{seed}")
        assert run.exit_code == 0, run.stderr
        summaries.append(run.summary)
        paths = sorted((run.out / "archive" / "dia_sources").rglob("*.parquet"))
        table = ds.dataset(paths, format="parquet").to_table(columns=list(COLUMNS))
        sources = {name: table[name].to_numpy() for name in COLUMNS}
        for number, injected in truth.items():
            mine = {name: column[sources["visit"] == number] for name, column in sources.items()}
            taken = np.zeros(len(mine["ra"]), dtype=bool)
            for ra, dec, flux in injected:
                apart = np.hypot((mine["ra"] - ra) * np.cos(np.radians(dec)), mine["dec"] - dec) / PIXEL_DEG
                nearest = int(np.argmin(apart))
                is_found = bool(apart[nearest] < MATCH_PIX)
                taken[nearest] |= is_found
                rows.append((number, ra, dec, flux))
                found.append({name: float(mine[name][nearest]) if is_found else np.nan for name in COLUMNS})
            strange += int(np.count_nonzero(~taken & (mine["reliability"] >= 0.5) & ~at_gaia_star(mine)))
    truth_rows = np.array(rows)
    measured = {name: np.array([one[name] for one in found]) for name in COLUMNS}
    visits, ra, dec, flux = (truth_rows[:, 0].astype(np.int64), *truth_rows[:, 1:].T)
    return Injections(visits, flux, np.isfinite(measured["psfFlux"]), measured, ra, dec, strange, summaries)


def at_gaia_star(sources: dict[str, np.ndarray]) -> np.ndarray:
    stars = np.concatenate([fits.getdata(path, 1) for path in sorted(DATA.rglob("chunk-*.fits"))])
    d_ra = (sources["ra"][:, None] - stars["ra"]) * np.cos(np.radians(sources["dec"][:, None]))
    apart = np.hypot(d_ra, sources["dec"][:, None] - stars["dec"])
    return np.asarray(apart.min(axis=1) < 2 * MATCH_PIX * PIXEL_DEG)


def robust_sigma(values: np.ndarray) -> float:
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))))


def test_with_stars_enough_every_decam_exposure_is_subtracted(injections: Injections) -> None:
    for summary in injections.summaries:
        assert (summary["visits"], summary["detectors"], summary["failures"]) == (6, 6, 0)
    assert all(np.count_nonzero(injections.visit == visit) >= 20 for visit in np.unique(injections.visit))


def test_injected_sources_above_ten_sigma_are_found_and_believed(injections: Injections) -> None:
    bright = injections.expected_snr() > 10.0
    assert np.count_nonzero(bright) >= 60
    assert np.mean(injections.found[bright]) >= 0.95
    assert np.mean(injections.measured["reliability"][bright & injections.found] >= 0.5) >= 0.95
    for visit in np.unique(injections.visit):
        mine = bright & (injections.visit == visit)
        # nine of ten, less two standard deviations of so few
        assert np.mean(injections.found[mine]) >= 0.9 - 2.0 * np.sqrt(0.09 / np.count_nonzero(mine)), visit


def test_faint_injected_sources_are_found_as_often_as_noise_lets_them(injections: Injections) -> None:
    """At an expected S/N of 6.5 to 10, with a threshold of 5 in units of the map's own noise."""
    faint = (injections.expected_snr() > 6.5) & (injections.expected_snr() <= 10.0)
    n = np.count_nonzero(faint)
    assert n >= 20
    # the map's noise is up to 20 % above that of the variance plane: 6.5 may be 5.4, where two of three are found
    assert np.mean(injections.found[faint]) >= 2 / 3 - 2.0 * np.sqrt(0.22 / n)


def test_fluxes_are_recovered_within_their_errors(injections: Injections) -> None:
    """Above an expected S/N of 8: below, noise decides what is found, and what is found is too bright."""
    sure = injections.found & (injections.expected_snr() > 8.0)
    pulls, snr = injections.pulls(), injections.flux / injections.measured["psfFluxErr"]
    n = np.count_nonzero(sure)
    assert n >= 100
    assert 0.8 < robust_sigma(pulls[sure]) < 1.3
    # three errors of the median, and 2 % of the flux: what kernels of 11 pixels leave of wings of 31
    assert abs(np.median(pulls[sure])) < 3.0 * MEDIAN_ERROR / np.sqrt(n) + 0.02 * np.median(snr[sure])
    for visit in np.unique(injections.visit):
        mine = sure & (injections.visit == visit)
        n = np.count_nonzero(mine)
        assert n >= 10
        assert abs(np.median(pulls[mine])) < 3.0 * MEDIAN_ERROR / np.sqrt(n) + 0.02 * np.median(snr[mine]), visit
        # of n normal pulls the sum of squares is n +- sqrt(2 n); without the 5 % most extreme it is less
        assert np.mean(np.sort(pulls[mine] ** 2)[: int(0.95 * n)]) < 1.3**2 + 3.0 * np.sqrt(2.0 / n), visit


def test_fluxes_have_no_bias_beyond_two_percent(injections: Injections) -> None:
    sure = injections.found & (injections.expected_snr() > 8.0)
    weight = (injections.flux[sure] / injections.measured["psfFluxErr"][sure]) ** 2
    ratio = injections.measured["psfFlux"][sure] / injections.flux[sure]
    error = 1.0 / np.sqrt(weight.sum())
    assert error < 0.01
    assert abs(np.sum(weight * ratio) / weight.sum() - 1.0) < 0.02 + 2.0 * error


def test_positions_are_recovered_within_their_errors(injections: Injections) -> None:
    sure = injections.found & (injections.expected_snr() > 8.0)
    n = np.count_nonzero(sure)
    d_ra = (injections.measured["ra"] - injections.ra) * np.cos(np.radians(injections.dec))
    d_dec = injections.measured["dec"] - injections.dec
    for offset, error in ((d_ra, injections.measured["raErr"]), (d_dec, injections.measured["decErr"])):
        pulls = (offset / error)[sure]
        # the template's noise is smooth: it moves a centroid less than the same noise in single pixels would
        assert 0.65 < robust_sigma(pulls) < 1.3
        assert abs(np.median(pulls)) < 3.0 * MEDIAN_ERROR / np.sqrt(n)
        # a hundredth of a pixel for the PSF model's own centre
        assert abs(np.median(offset[sure])) < 0.01 * PIXEL_DEG + 3.0 * MEDIAN_ERROR * np.median(error[sure]) / np.sqrt(
            n
        )


def test_little_else_is_believed_but_the_stars_that_do_change(injections: Injections) -> None:
    """One of the field's three Gaia stars varies, one has moved by half a pixel; a cosmic ray is not in the mask."""
    assert injections.strange <= len(SEEDS) * 6 * 0.1


def test_an_injected_source_has_its_flux_and_place() -> None:
    rows, columns = np.mgrid[-20:21, -20:21]
    psf = np.exp(-(rows**2 + columns**2) / (2 * 2.0**2))
    psf /= psf.sum()
    stamp = shifted(psf, 0.3, -0.4)
    y, x = np.mgrid[: stamp.shape[0], : stamp.shape[1]] - stamp.shape[0] // 2
    assert stamp.sum() == pytest.approx(1.0, abs=1e-9)
    assert (np.sum(x * stamp), np.sum(y * stamp)) == pytest.approx((0.3, -0.4), abs=1e-6)
    exact = np.exp(-((x - 0.3) ** 2 + (y + 0.4) ** 2) / (2 * 2.0**2)) / (2 * np.pi * 2.0**2)
    assert np.abs(stamp - exact).max() < 1e-6 * exact.max()

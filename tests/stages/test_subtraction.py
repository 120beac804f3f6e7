"""SubtractTemplates on exposures read from files: what a ledger is told of a difference that is not quite right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.wcs import WCS
from simulated_pair import Stars, expose, moffat_stamp, render, simulate_pair

from schemas.elements import DetectorVisit, SubtractedExposure
from schemas.exposures import Exposure, write_exposure
from schemas.manifests import DetectorImages, Visit
from transforms.numerics.kernel_matching import TooFewKernelStarsError
from transforms.subtraction import SubtractionConfig, subtract_detector

SHAPE = (400, 400)


def exposure(image: np.ndarray, variance: np.ndarray, fwhm_pix: float) -> Exposure:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [150.0, -30.0], [image.shape[1] / 2, image.shape[0] / 2]
    wcs.wcs.cd = np.diag([-0.2, 0.2]) / 3600.0
    mask = np.zeros(image.shape, dtype=np.int32)
    return Exposure(image.astype(np.float32), variance.astype(np.float32), mask, wcs, moffat_stamp(15, fwhm_pix))


def subtracted(folder: Path, science: Exposure, template: Exposure) -> SubtractedExposure:
    write_exposure(folder / "science.fits", science)
    write_exposure(folder / "template.fits", template)
    images = DetectorImages(94, str(folder / "science.fits"), str(folder / "template.fits"))
    visit = Visit(7, 20261122, 7, "SimCam", "r", 61367.1, 30.0, 61367.1002, 150.0, -30.0, 0.0, None, None, (images,))
    return subtract_detector(DetectorVisit(visit, images), SubtractionConfig(), 0.0)


@pytest.fixture(scope="module")
def pair() -> tuple[Exposure, Exposure]:
    science, template, _ = simulate_pair(41, SHAPE)
    return exposure(science.image, science.variance, 4.75), exposure(template.image, template.variance, 3.75)


def test_a_good_difference_has_no_notes(tmp_path: Path, pair: tuple[Exposure, Exposure]) -> None:
    assert subtracted(tmp_path, *pair).notes == ()


def test_a_fringed_exposure_is_noted_for_its_kernel_and_its_noise(
    tmp_path: Path, pair: tuple[Exposure, Exposure]
) -> None:
    fringes = 30.0 * np.sin(np.arange(SHAPE[1]) / 1.1)  # 1.06 sigma rms beside the noise: 1.5 together
    science = replace(pair[0], image=(pair[0].image + fringes).astype(np.float32))
    notes = subtracted(tmp_path, science, pair[1]).notes
    assert notes == (
        "poor matching kernel: reduced chi2 above 1.3 on held-out stars",
        "noise of the difference above 1.25 of what the variances say",
    )


def test_an_exposure_subtracted_from_itself_is_noted_for_its_lack_of_noise(
    tmp_path: Path, pair: tuple[Exposure, Exposure]
) -> None:
    notes = subtracted(tmp_path, pair[0], pair[0]).notes
    assert notes == ("noise of the difference below 0.8 of what the variances say",)


def test_a_template_that_lacks_stars_is_noted(tmp_path: Path) -> None:
    """Of 100 stars of one flux, one a cell of 32 pixels, every fourth is not in the template."""
    random = np.random.default_rng(42)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(50.0, 350, 32), np.arange(50.0, 350, 32)))
    kept = np.arange(len(x)) % 4 > 0
    pair = []
    for used, fwhm_pix, variance in ((np.ones(len(x), dtype=bool), 4.75, 400.0), (kept, 3.75, 40.0)):
        image = expose(
            random, render(SHAPE, Stars(x[used], y[used], np.full(used.sum(), 5e4)), fwhm_pix), 0.0, variance
        )
        pair.append(exposure(image.image, image.variance, fwhm_pix))
    notes = subtracted(tmp_path, *pair).notes
    assert "poor subtraction: too much of the sources' light is left in the difference" in notes


def test_a_cloud_s_edge_is_noted_where_the_stars_are_sure_of_it(tmp_path: Path) -> None:
    science, template, stars = simulate_pair(43, SHAPE, gradient=0.0)
    loss = 1.0 - 0.2 * np.arange(SHAPE[1]) / SHAPE[1]
    image = expose(np.random.default_rng(43), render(SHAPE, stars, 4.75) * loss, 400.0, 400.0)
    clear = subtracted(
        tmp_path,
        exposure(science.image, science.variance, 4.75),
        exposure(template.image, template.variance, 3.75),
    )
    clouded = subtracted(
        tmp_path, exposure(image.image, image.variance, 4.75), exposure(template.image, template.variance, 3.75)
    )
    note = "flux ratio to the template varies over the image by more than 10%"
    assert note in clouded.notes
    assert note not in clear.notes


def test_a_cutout_of_three_stars_is_never_subtracted(tmp_path: Path) -> None:
    random = np.random.default_rng(44)
    stars = Stars(np.array([60.0, 100.0, 140.0]), np.array([120.0, 60.0, 130.0]), np.full(3, 5e4))
    pair = [expose(random, render((200, 200), stars, fwhm), 400.0, 400.0) for fwhm in (4.75, 3.75)]
    with pytest.raises(TooFewKernelStarsError, match="3 of 3 kernel stars offered, 10 are needed"):
        subtracted(tmp_path, *(exposure(one.image, one.variance, f) for one, f in zip(pair, (4.75, 3.75), strict=True)))

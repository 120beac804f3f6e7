"""Real DECam stamps beside a difference that others published: 256 pixels, FWHM 5.2 against 3.8.

Ten exposures in two groups of five, stacked by the authors, and a transient beside a galaxy. There is no truth: the
published difference (SFFT, decorrelated with the kernels of all ten exposures) is what ours has to keep up with. A
single exposure holds too few kernel stars, a stack just enough; the noise of the stacks is correlated before anybody
subtracts them, so whitening is looked at on a single pair, with the published kernel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from scipy import ndimage
from scipy.signal import fftconvolve
from simulated_pair import moffat_stamp

from transforms.numerics.decorrelation import decorrelation_kernels
from transforms.numerics.differencing import DifferenceResult, ImagePlanes, subtract
from transforms.numerics.kernel_matching import TooFewKernelStarsError
from transforms.numerics.psf_modelling import PsfEstimationError

DATA = Path(__file__).parents[3] / "shared" / "data" / "decam_sfft_stamps"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}")
TRANSIENT = (129, 128)  # x, y, pixels
STARS = ((58, 180), (101, 73), (105, 232), (180, 201))  # whole, and not saturated
MAD_TO_SIGMA = 1.4826


def pixels(name: str) -> np.ndarray:
    return np.asarray(fits.getdata(DATA / f"{name}.fits"), dtype=np.float64)


def noise_of(image: np.ndarray, pixels_used: np.ndarray) -> float:
    values = image[pixels_used]
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))))


def sky_variance(image: np.ndarray) -> float:
    """Of the pixels that three clips at three sigma leave."""
    used = np.ones(image.shape, dtype=bool)
    for _ in range(3):
        used = np.abs(image - np.median(image[used])) < 3.0 * noise_of(image, used)
    return float(np.var(image[used]))


def planes(name: str, n_exposures: int = 1, has_psf: bool = False) -> ImagePlanes:
    """The stamps have neither variance nor mask: sky noise as measured, and the light's by the gain."""
    header, image = fits.getheader(DATA / f"{name}.fits"), pixels(name)
    light = np.maximum(ndimage.gaussian_filter(image, 1.0), 0.0) / (n_exposures * header["GAIN"])
    psf = moffat_stamp(15, header["FWHM"]) if has_psf else None
    return ImagePlanes(image.astype(np.float32), sky_variance(image) + light, image > 0.8 * header["SATURATE"], psf)


@pytest.fixture(scope="module")
def ours() -> DifferenceResult:
    return subtract(planes("Stack-DEC-OBS04", 5), planes("Stack-DEC-OBS18", 5))


@pytest.fixture(scope="module")
def blank(ours: DifferenceResult) -> np.ndarray:
    """Pixels with no light of either stack within 4 pixels."""
    light = np.maximum(ours.science, ours.matched_template) / np.sqrt(ours.variance)
    return np.asarray(ndimage.maximum_filter(np.where(ours.invalid, np.inf, light), 9) < 4.5)


def neighbour_correlation(image: np.ndarray, used: np.ndarray) -> float:
    """Of a pixel with the next one, along the axis where it is larger."""
    centred = np.where(used, image - np.median(image[used]), 0.0)
    centred[np.abs(centred) > 5.0 * noise_of(image, used)] = 0.0
    both = [(centred[:, 1:] * centred[:, :-1])[used[:, 1:] & used[:, :-1]]]
    both.append((centred[1:] * centred[:-1])[used[1:] & used[:-1]])
    return float(max(abs(product.mean()) for product in both) / np.var(centred[used]))


@pytest.mark.parametrize("has_psf", [False, True])
@pytest.mark.parametrize("exposure", "abcde")
def test_a_single_exposure_has_too_few_stars_and_is_refused(exposure: str, has_psf: bool) -> None:
    pair = [planes(f"DEC-OBS{group}{exposure}.mini", has_psf=has_psf) for group in ("04", "18")]
    with pytest.raises(TooFewKernelStarsError if has_psf else PsfEstimationError, match=r"\d+ .*are needed"):
        subtract(*pair)


def test_the_stacks_are_subtracted_and_called_poor(ours: DifferenceResult) -> None:
    assert 10 <= ours.kernel.n_stars_used <= 20
    assert ours.fwhm_ratio == pytest.approx(5.23 / 3.85, rel=0.05)
    assert ours.kernel.kernel_sum == pytest.approx(pixels("FinalMatchKernel").sum(), rel=0.02)
    # noise correlated by the stacking passes for signal, and two of the stars move
    assert ours.kernel.is_poor


def test_the_published_transient_is_found_as_clearly_as_in_the_published_difference(
    ours: DifferenceResult, blank: np.ndarray
) -> None:
    """The matched filter of each difference's own PSF: the errors of fluxes, whatever the noise's correlation."""
    wide = np.pad(ours.science_psf.middle, 30)
    published_psf = fftconvolve(wide, pixels("DeCorrKernel"), mode="same")
    far = ndimage.binary_erosion(blank, iterations=8)
    found = {}
    for name, difference, psf in (
        ("ours", np.nan_to_num(ours.difference).astype(float), ours.psf.middle),
        ("published", pixels("FinalDifference.DeCorr"), published_psf),
    ):
        middle = len(psf) // 2
        core = psf[middle - 15 : middle + 16, middle - 15 : middle + 16]
        flux = fftconvolve(difference, core[::-1, ::-1], mode="same") / np.sum(core**2)
        x, y = TRANSIENT
        found[name] = (float(flux[y - 2 : y + 3, x - 2 : x + 3].max()), noise_of(flux, far))
    (flux, error), (published_flux, published_error) = found["ours"], found["published"]
    assert published_flux / published_error > 30
    assert flux == pytest.approx(published_flux, abs=3 * published_error)
    # the scatter of n independent fluxes is known to 1.17 / sqrt(n); a PSF covers some 40 pixels
    assert error < published_error * (1 + 3 * 1.17 / np.sqrt(np.count_nonzero(far) / 40))


def test_less_is_left_of_the_stars_than_in_the_published_difference(ours: DifferenceResult, blank: np.ndarray) -> None:
    def left(difference: np.ndarray) -> float:
        noise = noise_of(difference, blank)
        parts = []
        for x, y in STARS:
            box = slice(y - 7, y + 8), slice(x - 7, x + 8)
            power = np.sum(difference[box] ** 2) - 15**2 * noise**2
            parts.append(np.sqrt(max(power, 0.0) / np.sum(ours.science[box] ** 2)))
        return float(np.median(parts))

    # of four stars one that moves is left by both; the median is of the middle two
    assert left(ours.difference.astype(float)) < 0.75 * left(pixels("FinalDifference.DeCorr"))
    assert left(ours.difference.astype(float)) < left(pixels("FinalDifference"))


def test_the_noise_of_a_single_pair_is_made_white_and_as_large_as_expected(blank: np.ndarray) -> None:
    """Science exposure a was never resampled, template exposure a neither; the kernel is the published one."""
    science, template, kernel = pixels("DEC-OBS04a.mini"), pixels("DEC-OBS18a.mini"), pixels("FinalMatchKernel")
    v_science, v_template = sky_variance(science), sky_variance(template)
    difference = science - fftconvolve(template, kernel, mode="same")
    whitening = decorrelation_kernels(
        kernel[np.newaxis], np.array([v_science]), np.array([v_template]), interpolated=False
    )[0]
    white = fftconvolve(difference, whitening, mode="same")
    n = np.count_nonzero(blank)
    before = max(neighbour_correlation(image, blank) for image in (science, template))
    assert neighbour_correlation(difference, blank) > before + 5 / np.sqrt(n)
    # no worse than the inputs, and far from the published stack's 0.16
    assert neighbour_correlation(white, blank) < before + 5 / np.sqrt(n)
    assert neighbour_correlation(pixels("FinalDifference.DeCorr"), blank) > 0.1
    expected = np.sqrt(v_science + v_template * kernel.sum() ** 2)
    assert noise_of(white, blank) == pytest.approx(expected, rel=5 * 1.17 / np.sqrt(n) + 0.02)  # 2 %: faint galaxies

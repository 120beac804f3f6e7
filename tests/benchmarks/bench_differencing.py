"""Image differencing on simulated pairs: our chain beside HOTPANTS and SFFT, judged by one judge.

Every pair comes from `transforms.numerics.pair_simulation`, so the truth is known. The template is warped once with our
warp; each peer gets the same warped template, variances and masks. Times are CPU seconds of one core. The judge looks
at each difference with a matched filter of the true local PSF and fits that PSF with a free position; it is the same
for all peers.

    python tests/benchmarks/bench_differencing.py --regime lsst --seeds 4 --size 1024 --hotpants /path/to/hotpants
    python tests/benchmarks/bench_differencing.py --steps --size 4096 --seeds 1 --hotpants /path/to/hotpants

HOTPANTS is built outside the project from https://github.com/acbecker/hotpants (needs cfitsio, apt's libcfitsio-dev):
    make hotpants COPTS="-O3 -march=native -funroll-loops -std=gnu99 -fcommon -D_GNU_SOURCE" LIBS="-lm -lcfitsio"
It runs with its own defaults (basis 6 4 2 of sigma 0.7 1.5 3, order 2, background order 1). On three lsst pairs of 1024
pixels, orders 1 and 3, denser stamps, other sigmas, kernel widths and cuts were worse or within errors of them; the
other regimes were not scanned. `--hotpants-flags` tries more.
SFFT is on the package index as `sfft` (with `fastremap` and `pyfftw`); on a CPU it takes minutes and 3 GB a megapixel.

Columns
  CPU s     subtraction from pixels in memory (HOTPANTS: its whole process, so with FITS files; warp apart)
  noise     robust standard deviation of D / sigma in blank sky; sigma is what the peer says
  corr x y  correlation of D / sigma with the next pixel, in blank sky
  score     robust standard deviation of the matched filter's S in blank sky: 1 when 5 sigma means 5 sigma
  FP        false positives per square degree beyond 5 of the peer's own sigma; `far`: farther than 40 pixels from
            saturated stars; `=C`: beyond the threshold at which all peers find the same part of the sources
            of S/N 5 to 12, the part that the least complete of them finds at 5 sigma. White noise alone gives
            5 exp(-12.5) / ((2 pi)^1.5 sigma_psf^2) a pixel: some 90 (lsst, crowded), 170 (sharp_science) and 15
            (undersampled)
  CR        detections of cosmic rays that no mask knew, per square degree
  completeness  by optimal S/N, beyond 5 sigma
  bias      mean of fitted / true flux - 1, S/N >= 20 (weighted with the square of the S/N)
  pull      robust standard deviation of (fitted - true) / error, S/N >= 10. That of the science image minus its true
            light is 1.06 (lsst), 1.00 (sharp_science), 1.02 (undersampled) and 0.94 (crowded), each +- 0.04, on 8
            pairs of 1024 pixels: what a difference has beyond is its own
  chi       rms of D / sigma in 11 x 11 pixels on steady, unsaturated stars of S/N 100-1000 and beyond
Numbers are means over seeds with the standard error of the mean; completeness, bias and pull are of all seeds together.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from astropy.io import fits
from scipy import ndimage
from scipy.signal import fftconvolve
from scipy.spatial import cKDTree
from threadpoolctl import threadpool_limits

from transforms.numerics import differencing
from transforms.numerics.convolution import block_centres, convolve_spatially_varying
from transforms.numerics.decorrelation import interpolation_count
from transforms.numerics.differencing import DECORRELATION_CELL_PIX, ImagePlanes
from transforms.numerics.pair_simulation import REGIMES, SimulatedPair, simulate_pair
from transforms.numerics.warping import CoordinateGrid, WarpedExposure, coordinate_grid, warp_exposure

THRESHOLD = 5.0
LOWEST_THRESHOLD = 4.0  # peaks are kept from here on
EDGE_PIX = 27
MASK_MARGIN_PIX = 3
NEAR_SATURATED_PIX = 40.0
SNR_BINS = ((3.0, 5.0), (5.0, 6.0), (6.0, 8.0), (8.0, 12.0), (12.0, 50.1))
EQUAL_SNR = (5.0, 12.0)
BLANK_LIGHT_SIGMA = 0.3  # of the sky's noise: brighter pixels are not blank
BLANK_TRUTH_PIX = 12.0
PSF_BLOCK_PIX = 64
STAR_BOX_HALF_PIX = 5
FIT_STEPS = 6
DERIVATIVE_STEP_PIX = 0.05
STEP_REPEATS = 3  # with --steps; the fastest counts
# steps of ours that HOTPANTS has too; the convolution that decorrelates, which it has not, is in, and the rest
LIKE_HOTPANTS = (
    "subtract_background", "subtract_background_in_place", "detect_sources", "grown", "select_kernel_stars",
    "fit_matching_kernel", "convolve_spatially_varying", "the rest",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Task:
    """What every peer gets: the science image and the template on its grid."""

    pair: SimulatedPair
    warped: WarpedExposure
    science_bad: np.ndarray
    template_bad: np.ndarray
    warp_seconds: float

    @property
    def bad(self) -> np.ndarray:
        return self.science_bad | self.template_bad


@dataclass(frozen=True, eq=False)
class Difference:
    """What a peer gives back.

    Attributes
    ----------
    image, variance : (ny, nx); the science image's counts. Noise, chi and pulls are judged by this variance
    invalid : (ny, nx) bool, pixels that the peer itself says not to use
    seconds : CPU seconds by step; their sum is the time of the subtraction
    expected_power : (ny, nx) variance by which detections are judged; None for `variance`
    transfer : kernel at (x, y) that turned the science PSF into that of the difference; None if there is none
    """

    image: np.ndarray
    variance: np.ndarray
    invalid: np.ndarray
    seconds: dict[str, float]
    transfer: Callable[[float, float], np.ndarray] | None = None
    expected_power: np.ndarray | None = None


@dataclass(eq=False)
class Verdict:
    """One difference judged; lists are over sources or peaks."""

    noise: float
    correlation_x: float
    correlation_y: float
    score: float
    false_significance: np.ndarray  # |S| of false positives
    false_is_far: np.ndarray
    cosmic_rays: int
    kind: np.ndarray  # of the good sources of the truth
    snr: np.ndarray
    found_significance: np.ndarray  # of the same, 0 where there is no peak
    flux_ratio: np.ndarray  # of the same, NaN where not fitted
    pull: np.ndarray
    chi_faint: float
    chi_bright: float
    seconds: dict[str, float] = field(default_factory=dict)


# --- peers -----------------------------------------------------------------------------------------------------


def prepare(pair: SimulatedPair) -> Task:
    """Warp the template to the science grid."""
    science, template = pair.science, pair.template
    shape = science.image.shape
    begin = time.process_time()
    step = 32
    grid = CoordinateGrid(*pair.template_position(*coordinate_grid(shape, step)), step)
    warped = warp_exposure(template.image, template.variance, template.masked.astype(np.int32), grid, shape)
    seconds = time.process_time() - begin
    return Task(pair, warped, science.masked, warped.no_data | (warped.mask != 0), seconds)


def subtract_ours(task: Task) -> Difference:
    """Our chain, from pixels in memory; PSFs are measured, as the chain has to when none comes with an image."""
    pair, warped = task.pair, task.warped
    science = ImagePlanes(pair.science.image, pair.science.variance, task.science_bad, saturated=pair.science.saturated)
    template = ImagePlanes(
        warped.image,
        warped.white_variance,
        task.template_bad,
        interpolated=interpolation_count(warped.variance, warped.white_variance),
        saturated=task.template_bad & ~warped.no_data,
    )
    with timed_functions(differencing) as seconds:
        begin = time.process_time()
        result = differencing.subtract(science, template)
        total = time.process_time() - begin
    seconds["the rest"] = total - sum(seconds.values())
    cell_pix = DECORRELATION_CELL_PIX

    def transfer(x: float, y: float) -> np.ndarray:
        return np.asarray(result.decorrelation[int(y + 0.5) // cell_pix, int(x + 0.5) // cell_pix])

    unusable = result.invalid | result.cosmic_rays | result.trails
    expected = result.variance + np.square(np.float32(result.residual_part) * result.matched_template)
    return Difference(result.difference, result.variance, unusable, seconds, transfer, expected)


@contextlib.contextmanager
def timed_functions(module: ModuleType) -> Iterator[dict[str, float]]:
    """CPU seconds of the public numerics functions that `module` imports, while it is run."""
    seconds: dict[str, float] = {}
    originals = {
        name: value
        for name, value in vars(module).items()
        if callable(value)
        and not inspect.isclass(value)
        and not name.startswith("_")
        and str(getattr(value, "__module__", "")).startswith("transforms.numerics")
        and value.__module__ != module.__name__
    }
    depth = 0

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            begin = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                depth -= 1
                if depth == 0:  # what a step calls is part of the step
                    seconds[name] = seconds.get(name, 0.0) + time.process_time() - begin

        return call

    for name, function in originals.items():
        setattr(module, name, timed(name, function))
    try:
        yield seconds
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


def subtract_hotpants(task: Task, program: Path, extra_flags: list[str], own_mask: bool) -> Difference:
    """HOTPANTS with kernels of spatial order 2, the template convolved, true noise planes given.

    With `own_mask` it blanks what its input masks reach through the kernel, as it does by default; else nothing.
    """
    pair, warped = task.pair, task.warped
    side = pair.science.image.shape[0]
    planes = {
        "inim": pair.science.image,
        "tmplim": np.where(task.warped.no_data, 0.0, warped.image),
        "ini": np.sqrt(pair.science.variance),
        "tni": np.sqrt(np.where(warped.no_data, 0.0, warped.white_variance)),
        "imi": task.science_bad.astype(np.int16),
        "tmi": task.template_bad.astype(np.int16),
    }
    stamps = str(max(10, side // 200))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [str(program), "-c", "t", "-n", "i", "-ko", "2", "-bgo", "1", "-nsx", stamps, "-nsy", stamps]
        command += ["-iu", f"{pair.science.saturation:.0f}", "-tu", f"{pair.template.saturation:.0f}"]
        command += ["-il", "-10000", "-tl", "-10000", "-v", "0"]
        if not own_mask:
            command += ["-mous", "-1"]
        for key, plane in planes.items():
            dtype = np.int16 if plane.dtype == np.int16 else np.float32
            fits.writeto(folder / f"{key}.fits", plane.astype(dtype))
            command += [f"-{key}", str(folder / f"{key}.fits")]
        for key in ("outim", "oni"):
            command += [f"-{key}", str(folder / f"{key}.fits")]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*command, *extra_flags], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0 or not (folder / "outim.fits").exists():
            raise SystemExit(
                f"{program} failed with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        image, noise = (fits.getdata(folder / f"{key}.fits").astype(np.float32) for key in ("outim", "oni"))
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Difference(image, noise**2, ~(noise > 0), {"whole process": seconds})


def subtract_sfft(task: Task) -> Difference:
    """SFFT on the CPU, delta basis of 17 x 17, order 2; sources of the truth are hidden from its fit.

    It gives no variance: that is v_S + q v_T, with the q that makes the blank sky's noise ratio 1.
    """
    from sfft.CustomizedPacket import Customized_Packet

    pair, warped = task.pair, task.warped
    images, bad = [], [task.science_bad, task.template_bad]
    for plane, left_out in zip((pair.science.image, np.where(warped.no_data, 0.0, warped.image)), bad, strict=True):
        images.append(differencing.subtract_background(plane, left_out).image)
    hidden = ndimage.binary_dilation(task.bad, iterations=8) | _near_truth(pair, 12.0)
    with tempfile.TemporaryDirectory() as name:
        paths = {key: str(Path(name) / f"{key}.fits") for key in ("sci", "ref", "msci", "mref", "diff")}
        for key, plane in zip(("sci", "ref"), images, strict=True):
            fits.writeto(paths[key], np.where(task.bad, np.float32(0.0), plane))
            fits.writeto(paths["m" + key], np.where(hidden, np.float32(0.0), plane))
        begin = time.process_time()
        with contextlib.redirect_stdout(None):
            Customized_Packet.CP(
                paths["ref"], paths["sci"], paths["mref"], paths["msci"], "REF", 8, FITS_DIFF=paths["diff"],
                KerPolyOrder=2, BGPolyOrder=1, BACKEND_4SUBTRACT="Numpy", NUM_CPU_THREADS_4SUBTRACT=1, VERBOSE_LEVEL=0,
            )  # fmt: skip
        seconds = time.process_time() - begin
        image = fits.getdata(paths["diff"]).astype(np.float32)
    template_variance = np.where(warped.no_data, 0.0, warped.white_variance)
    blank = _blank_sky(task, ~np.isfinite(image))
    excess = _robust_std(image[blank]) ** 2 - float(np.mean(pair.science.variance[blank]))
    share = max(excess, 0.0) / float(np.mean(template_variance[blank]))
    return Difference(
        image, pair.science.variance + np.float32(share) * template_variance, task.bad, {"whole call": seconds}
    )


# --- the judge -------------------------------------------------------------------------------------------------


def judge(task: Task, difference: Difference) -> Verdict:
    """Measure one difference against the truth."""
    pair = task.pair
    unusable = difference.invalid | task.bad | ~np.isfinite(difference.image) | ~(difference.variance > 0)
    unusable |= ~np.isfinite(difference.variance)
    weight = _inverse(difference.variance, unusable)
    expected = weight if difference.expected_power is None else _inverse(difference.expected_power, unusable)
    pixels = np.where(unusable, np.float32(0.0), difference.image).astype(np.float32)
    scaled = pixels * np.sqrt(weight)
    blank = _blank_sky(task, unusable)
    noise, correlation_x, correlation_y = _noise_figures(scaled, blank)
    significance = _significance(pair, difference, pixels, expected)
    peak_x, peak_y, peak = _peaks(pair, significance, unusable)
    good, found = _match(pair, peak_x, peak_y, peak)
    is_false, is_hit = _classify(pair, peak_x, peak_y)
    saturated = pair.stars[pair.stars["is_saturated"]]
    is_far = ~_is_near(peak_x, peak_y, saturated["x"], saturated["y"], NEAR_SATURATED_PIX)
    ratio, pull = _fitted_fluxes(pair, difference, pixels, weight, good, found, peak_x, peak_y)
    chi_faint, chi_bright = (
        _star_chi(pair, scaled, unusable, *limits) for limits in ((100.0, 1000.0), (1000.0, np.inf))
    )
    return Verdict(
        noise=noise,
        correlation_x=correlation_x,
        correlation_y=correlation_y,
        score=_robust_std(significance[blank]),
        false_significance=np.abs(peak[is_false]),
        false_is_far=is_far[is_false],
        cosmic_rays=int(np.count_nonzero(is_hit & (np.abs(peak) > THRESHOLD))),
        kind=good["kind"],
        snr=good["snr"],
        found_significance=np.where(found >= 0, np.abs(np.append(peak, 0.0)[found]), 0.0),
        flux_ratio=ratio,
        pull=pull,
        chi_faint=chi_faint,
        chi_bright=chi_bright,
        seconds=dict(difference.seconds),
    )


def _inverse(variance: np.ndarray, unusable: np.ndarray) -> np.ndarray:
    return np.where(unusable, 0.0, 1.0 / np.where(unusable, 1.0, variance)).astype(np.float32)


def _robust_std(values: np.ndarray) -> float:
    """Half of the interval that holds the middle 68.27 %."""
    low, high = np.percentile(values, [15.865, 84.135]) if values.size else (np.nan, np.nan)
    return float(0.5 * (high - low))


def _near_truth(pair: SimulatedPair, radius_pix: float) -> np.ndarray:
    """(ny, nx) bool, pixels near anything in the truth, all along trails."""
    ny, nx = pair.science.image.shape
    far = np.ones((ny, nx), dtype=bool)
    for row in pair.truth:
        length = float(np.hypot(row["dx"], row["dy"])) if row["kind"] == "trail" else 0.0
        steps = np.linspace(-0.5, 0.5, int(length) + 2) if length else np.zeros(1)
        columns, rows = np.rint(row["x"] + steps * row["dx"]), np.rint(row["y"] + steps * row["dy"])
        far[np.clip(rows, 0, ny - 1).astype(int), np.clip(columns, 0, nx - 1).astype(int)] = False
    return ndimage.distance_transform_edt(far) < radius_pix


def _blank_sky(task: Task, unusable: np.ndarray) -> np.ndarray:
    """Pixels far from masks, the edge and the truth, with next to no light of stars and galaxies."""
    pair = task.pair
    sky_noise = np.sqrt(pair.regime.sky_electrons_pix + pair.regime.read_noise_e**2)
    blank = np.abs(pair.light) < BLANK_LIGHT_SIGMA * sky_noise
    blank &= ~ndimage.binary_dilation(unusable | task.bad | pair.science.hidden_cosmic_ray, iterations=5)
    blank &= ~_near_truth(pair, BLANK_TRUTH_PIX)
    inside = np.zeros_like(blank)
    inside[EDGE_PIX:-EDGE_PIX, EDGE_PIX:-EDGE_PIX] = True
    return blank & inside


def _noise_figures(scaled: np.ndarray, blank: np.ndarray) -> tuple[float, float, float]:
    """Noise ratio and the correlations with the next pixel to the right and above."""
    values = np.clip(scaled - np.median(scaled[blank]), -5.0, 5.0)
    correlations = []
    for here, there in (
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
        ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
    ):
        both = blank[here] & blank[there]
        a, b = values[here][both].astype(np.float64), values[there][both].astype(np.float64)
        correlations.append(float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))))
    return _robust_std(scaled[blank]), correlations[0], correlations[1]


def _psf_side(pair: SimulatedPair) -> int:
    return 2 * int(np.ceil(2.6 * pair.regime.fwhm_science_pix)) + 1


def _difference_psf(
    pair: SimulatedPair, difference: Difference, x: float, y: float, dx: float = 0.0, dy: float = 0.0
) -> np.ndarray:
    """The true PSF of the difference at (x, y), centred at (dx, dy) from the middle of the stamp."""
    side = _psf_side(pair)
    if difference.transfer is None:
        return pair.science.psf_stamp(x, y, side, dx, dy)
    kernel = difference.transfer(x, y)
    wide = pair.science.psf_stamp(x, y, side + kernel.shape[0] - 1, dx, dy)
    return fftconvolve(wide, kernel, mode="valid")


def _significance(pair: SimulatedPair, difference: Difference, pixels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """S = sum(P D / V) / sqrt(sum(P^2 / V)) with the PSF of each block."""
    x, y = block_centres(pixels.shape, PSF_BLOCK_PIX)
    psfs = np.array(
        [[_difference_psf(pair, difference, x[j, i], y[j, i]) for i in range(x.shape[1])] for j in range(x.shape[0])]
    )
    mirrored = psfs[..., ::-1, ::-1]  # a correlation by means of a convolution
    numerator = convolve_spatially_varying(pixels * weight, mirrored, PSF_BLOCK_PIX)
    denominator = convolve_spatially_varying(weight, mirrored**2, PSF_BLOCK_PIX)
    return numerator / np.sqrt(np.maximum(denominator, 1e-30))


def _peaks(
    pair: SimulatedPair, significance: np.ndarray, unusable: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y, S of the highest |S| within 0.8 FWHM, off masks and edges; order: raster.

    S is that of a parabola through the peak and its neighbours along each axis: the pixel's own value is up to 15 % low
    where the PSF is under-sampled.
    """
    strength = np.abs(significance)
    reach = max(2, round(0.8 * pair.regime.fwhm_science_pix))
    is_peak = (strength == ndimage.maximum_filter(strength, size=2 * reach + 1)) & (strength > LOWEST_THRESHOLD)
    is_peak &= ~ndimage.maximum_filter(unusable, size=2 * MASK_MARGIN_PIX + 1)
    is_peak[:EDGE_PIX], is_peak[-EDGE_PIX:], is_peak[:, :EDGE_PIX], is_peak[:, -EDGE_PIX:] = (False,) * 4
    y, x = np.nonzero(is_peak)
    top = significance[y, x].astype(np.float64)
    peak = top.copy()
    for step_y, step_x in ((0, 1), (1, 0)):
        before, after = (strength[y + sign * step_y, x + sign * step_x] for sign in (-1, 1))
        bend = np.maximum(2.0 * np.abs(top) - before - after, 1e-6)
        peak += np.sign(top) * np.minimum((after - before) ** 2 / (8.0 * bend), 0.25 * np.abs(top))
    return x, y, peak


def _match_radius_pix(pair: SimulatedPair) -> float:
    return max(4.0, 1.2 * pair.regime.fwhm_science_pix)


def _match(pair: SimulatedPair, x: np.ndarray, y: np.ndarray, peak: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Good sources of the truth away from the edge, and the most significant peak of the right sign at each, or -1."""
    truth = pair.truth
    ny, nx = pair.science.image.shape
    inner = (truth["x"] > EDGE_PIX) & (truth["x"] < nx - 1 - EDGE_PIX)
    inner &= (truth["y"] > EDGE_PIX) & (truth["y"] < ny - 1 - EDGE_PIX)
    good = truth[truth["good_pixels"] & inner & (truth["kind"] != "proper_motion")]
    found = np.full(good.size, -1)
    for row, source in enumerate(good):
        near = _distance_to_source(source, x, y) < _match_radius_pix(pair)
        candidates = np.flatnonzero(near & (np.sign(peak) == np.sign(source["flux"])))
        if candidates.size:
            found[row] = candidates[np.argmax(np.abs(peak[candidates]))]
    return good, found


def _distance_to_source(source: np.void, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to a point source, to the line of a trail, or to the path of a star that moved."""
    is_trail = source["kind"] == "trail"
    start, stop = (-0.5, 0.5) if is_trail else (-1.0, 0.0)
    length2 = max(source["dx"] ** 2 + source["dy"] ** 2, 1e-12)
    off_x, off_y = x - source["x"], y - source["y"]
    along = np.clip((off_x * source["dx"] + off_y * source["dy"]) / length2, start, stop)
    return np.hypot(off_x - along * source["dx"], off_y - along * source["dy"])


def _classify(pair: SimulatedPair, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which peaks are false positives, and which are cosmic rays; the others are near something in the truth."""
    is_real = np.zeros(x.size, dtype=bool)
    for source in pair.truth:
        is_real |= _distance_to_source(source, x, y) < _match_radius_pix(pair)
    near_hit = ndimage.maximum_filter(pair.science.hidden_cosmic_ray, size=2 * round(_match_radius_pix(pair)) + 1)
    is_hit = near_hit[y, x] & ~is_real
    return ~is_real & ~is_hit, is_hit


def _is_near(x: np.ndarray, y: np.ndarray, other_x: np.ndarray, other_y: np.ndarray, radius_pix: float) -> np.ndarray:
    if other_x.size == 0 or x.size == 0:
        return np.zeros(x.size, dtype=bool)
    distance, _ = cKDTree(np.column_stack([other_x, other_y])).query(np.column_stack([x, y]))
    return distance < radius_pix


def _fitted_fluxes(
    pair: SimulatedPair,
    difference: Difference,
    pixels: np.ndarray,
    weight: np.ndarray,
    good: np.ndarray,
    found: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Fitted over true flux, and pull, of the point sources that were found; NaN for the others."""
    ratio, pull = np.full(good.size, np.nan), np.full(good.size, np.nan)
    for row in np.flatnonzero((found >= 0) & (good["kind"] != "trail") & (good["snr"] >= 10.0)):
        flux, error = _fit_source(pair, difference, pixels, weight, int(x[found[row]]), int(y[found[row]]))
        ratio[row] = flux / good["flux"][row]
        pull[row] = (flux - good["flux"][row]) / error
    return ratio, pull


def _fit_source(
    pair: SimulatedPair, difference: Difference, pixels: np.ndarray, weight: np.ndarray, x: int, y: int
) -> tuple[float, float]:
    """Flux and its error by Gauss-Newton in flux and position; the PSF is rendered anew at each position."""
    half = _psf_side(pair) // 2
    box = (slice(y - half, y + half + 1), slice(x - half, x + half + 1))
    data, inverse = pixels[box].astype(np.float64), weight[box].astype(np.float64)
    flux, error, dx, dy, step = 0.0, float("nan"), 0.0, 0.0, DERIVATIVE_STEP_PIX
    model_at = functools.partial(_difference_psf, pair, difference, float(x), float(y))
    for _ in range(FIT_STEPS):
        model = model_at(dx, dy)
        slope_x = (model_at(dx + step, dy) - model_at(dx - step, dy)) / (2 * step)
        slope_y = (model_at(dx, dy + step) - model_at(dx, dy - step)) / (2 * step)
        design = np.stack([model.ravel(), slope_x.ravel(), slope_y.ravel()])
        covariance = np.linalg.inv((design * inverse.ravel()) @ design.T)
        flux, move_x, move_y = covariance @ design @ (inverse * data).ravel()
        error = float(np.sqrt(covariance[0, 0]))
        if flux == 0.0:
            break
        dx = float(np.clip(dx + np.clip(move_x / flux, -0.5, 0.5), -3.0, 3.0))
        dy = float(np.clip(dy + np.clip(move_y / flux, -0.5, 0.5), -3.0, 3.0))
    return float(flux), error


def _star_chi(
    pair: SimulatedPair, scaled: np.ndarray, unusable: np.ndarray, least_snr: float, most_snr: float
) -> float:
    """rms of D / sigma around steady stars; NaN when there is none."""
    stars = pair.stars
    ny, nx = scaled.shape
    half = STAR_BOX_HALF_PIX
    use = stars["is_steady"] & ~stars["is_saturated"] & (stars["snr"] >= least_snr) & (stars["snr"] < most_snr)
    use &= (stars["x"] > EDGE_PIX) & (stars["x"] < nx - 1 - EDGE_PIX)
    use &= (stars["y"] > EDGE_PIX) & (stars["y"] < ny - 1 - EDGE_PIX)
    spoiled = unusable | pair.science.hidden_cosmic_ray | _near_truth(pair, 2 * _match_radius_pix(pair))
    spoiled = ndimage.maximum_filter(spoiled, size=2 * half + 1)
    squares, count = 0.0, 0
    for star in stars[use]:
        column, row = round(star["x"]), round(star["y"])
        if not spoiled[row, column]:
            box = scaled[row - half : row + half + 1, column - half : column + half + 1].astype(np.float64)
            squares, count = squares + float(np.sum(box**2)), count + box.size
    return float(np.sqrt(squares / count)) if count else float("nan")


# --- figures over seeds ----------------------------------------------------------------------------------------

Figure = tuple[float, float]  # value and its error


def summarise(verdicts: dict[str, list[Verdict]], area_deg2: float) -> dict[str, dict[str, Figure]]:
    """Figures of each peer over all seeds of one regime."""
    least_complete = min(_completeness(peer, *EQUAL_SNR, THRESHOLD)[0] for peer in verdicts.values())
    return {label: _figures(peer, area_deg2, least_complete) for label, peer in verdicts.items()}


def _figures(peer: list[Verdict], area_deg2: float, equal_completeness: float) -> dict[str, Figure]:
    figures = {"CPU s": _mean([sum(one.seconds.values()) for one in peer])}
    for name in ("noise", "correlation_x", "correlation_y", "score"):
        figures[name] = _mean([getattr(one, name) for one in peer])
    equal_threshold = _threshold_of(peer, equal_completeness)
    for suffix, threshold in (("", THRESHOLD), (" =C", equal_threshold)):
        beyond = [one.false_significance > threshold for one in peer]
        figures["FP" + suffix] = _mean([np.count_nonzero(false) / area_deg2 for false in beyond])
        figures["FP far" + suffix] = _mean(
            [np.count_nonzero(false & one.false_is_far) / area_deg2 for false, one in zip(beyond, peer, strict=True)]
        )
    figures["threshold =C"] = (equal_threshold, 0.0)
    figures["CR"] = _mean([one.cosmic_rays / area_deg2 for one in peer])
    for least, most in SNR_BINS:
        figures[f"C {least:.0f}-{most:.0f}"] = _completeness(peer, least, most, THRESHOLD)
    figures["C trails"] = _completeness(peer, 0.0, np.inf, THRESHOLD, trails=True)
    figures["bias"], figures["pull"] = _flux_bias(peer), _pull_width(peer)
    for name in ("chi_faint", "chi_bright"):
        figures[name] = _mean([getattr(one, name) for one in peer])
    return figures


def _mean(values: list[float]) -> Figure:
    usable = np.array([value for value in values if np.isfinite(value)])
    if usable.size == 0:
        return float("nan"), float("nan")
    error = float(usable.std(ddof=1) / np.sqrt(usable.size)) if usable.size > 1 else float("nan")
    return float(usable.mean()), error


def _significances(peer: list[Verdict], least_snr: float, most_snr: float, trails: bool = False) -> np.ndarray:
    parts = [
        one.found_significance[(one.snr >= least_snr) & (one.snr < most_snr) & ((one.kind == "trail") == trails)]
        for one in peer
    ]
    return np.concatenate(parts)


def _completeness(
    peer: list[Verdict], least_snr: float, most_snr: float, threshold: float, trails: bool = False
) -> Figure:
    found = _significances(peer, least_snr, most_snr, trails) > threshold
    if found.size == 0:
        return float("nan"), float("nan")
    part = float(found.mean())
    return part, float(np.sqrt(max(part * (1 - part), 0.25 / found.size) / found.size))


def _threshold_of(peer: list[Verdict], completeness: float) -> float:
    """The threshold, not below 5, beyond which that part of the sources is found."""
    found = np.sort(_significances(peer, *EQUAL_SNR))[::-1]
    wanted = round(completeness * found.size)
    return max(float(found[wanted - 1]) * (1.0 - 1e-9), THRESHOLD) if wanted > 0 else float("inf")


def _flux_bias(peer: list[Verdict]) -> Figure:
    ratio, snr = (np.concatenate([getattr(one, name) for one in peer]) for name in ("flux_ratio", "snr"))
    use = np.isfinite(ratio) & (snr >= 20.0)
    if np.count_nonzero(use) < 2:
        return float("nan"), float("nan")
    off, weight = ratio[use] - 1.0, snr[use] ** 2
    off = np.clip(off, -10.0 / snr[use], 10.0 / snr[use])  # one source in a star's core must not be the mean
    mean = float(np.sum(weight * off) / weight.sum())
    return mean, float(np.sqrt(np.sum(weight**2 * (off - mean) ** 2)) / weight.sum())


def _pull_width(peer: list[Verdict]) -> Figure:
    pull, snr = (np.concatenate([getattr(one, name) for one in peer]) for name in ("pull", "snr"))
    pull = pull[np.isfinite(pull) & (snr >= 10.0)]
    return _robust_std(pull), float(0.97 / np.sqrt(max(pull.size, 1)))  # error of a 68 % interval of a Gaussian


# --- running ---------------------------------------------------------------------------------------------------


def main() -> None:
    options = parse_options()
    regimes = options.regime or list(REGIMES)
    threadpool_limits(1)  # times are of one core
    versions = f"python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}"
    print(f"{versions}, one core of {os.cpu_count()}")
    peers = chosen_peers(options)
    _run_peers(peers, prepare(simulate_pair(0, REGIMES["lsst"], 512)), ours_only=True)  # compiles
    report: dict[str, Any] = {"size": options.size, "seeds": options.seeds, "regimes": {}}
    for regime in regimes:
        report["regimes"][regime] = run_regime(regime, peers, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, allow_nan=True) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", action="append", choices=list(REGIMES), help="may be repeated; default: all")
    parser.add_argument("--seeds", type=int, default=4, help="pairs a regime, with seeds 1, 2, ... (default 4)")
    parser.add_argument("--size", type=int, default=1024, help="side of an image in pixels (default 1024)")
    parser.add_argument("--steps", action="store_true", help="CPU seconds per step and peak memory only, no judging")
    parser.add_argument("--hotpants", type=Path, metavar="PATH", help="the HOTPANTS program; left out without it")
    parser.add_argument("--hotpants-mask", action="store_true", help="also judge HOTPANTS with its own output mask")
    parser.add_argument("--hotpants-flags", default="", metavar="FLAGS", help="more flags for it, in one string")
    parser.add_argument("--sfft", action="store_true", help="run SFFT too, if it can be imported")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def chosen_peers(options: argparse.Namespace) -> dict[str, Callable[[Task], Difference]]:
    peers: dict[str, Callable[[Task], Difference]] = {"ours": subtract_ours}
    if options.hotpants:
        flags = options.hotpants_flags.split()
        for own_mask in (False, True)[: 1 + options.hotpants_mask]:
            label = "HOTPANTS own mask" if own_mask else "HOTPANTS"
            peers[label] = functools.partial(
                subtract_hotpants, program=options.hotpants.resolve(), extra_flags=flags, own_mask=own_mask
            )
    if options.sfft:
        try:
            import sfft.CustomizedPacket  # noqa: F401
        except ImportError as error:
            print(f"sfft is left out: {error}")
        else:
            peers["SFFT"] = subtract_sfft
    return peers


def _run_peers(
    peers: dict[str, Callable[[Task], Difference]], task: Task, ours_only: bool = False, repeats: int = 1
) -> dict[str, Difference]:
    """The fastest run of each."""
    return {
        label: min((subtract(task) for _ in range(repeats)), key=lambda one: sum(one.seconds.values()))
        for label, subtract in peers.items()
        if label == "ours" or not ours_only
    }


def run_regime(
    regime: str, peers: dict[str, Callable[[Task], Difference]], options: argparse.Namespace
) -> dict[str, Any]:
    """Simulate, subtract and judge all seeds of a regime, print its tables, return its figures."""
    verdicts: dict[str, list[Verdict]] = {label: [] for label in peers}
    seconds: dict[str, list[dict[str, float]]] = {label: [] for label in peers}
    area_deg2, peak_mb = 0.0, float("nan")
    for seed in range(1, options.seeds + 1):
        task = prepare(simulate_pair(seed, REGIMES[regime], options.size))
        area_deg2 = task.pair.area_deg2
        for label, difference in _run_peers(peers, task, repeats=STEP_REPEATS if options.steps else 1).items():
            own = {"warp": task.warp_seconds, **difference.seconds} if label == "ours" else difference.seconds
            seconds[label].append(own)
            if not options.steps:
                verdicts[label].append(judge(task, difference))
        if options.steps and seed == options.seeds:
            peak_mb = _peak_memory_mb(task)
    print(f"\n{regime}: {options.seeds} pairs of {options.size} x {options.size}, {area_deg2:.5f} square degrees each")
    steps = {label: _step_means(of_peer) for label, of_peer in seconds.items()}
    if options.steps:
        _print_steps(steps, peak_mb)
        return {"steps": steps, "peak_mb": peak_mb}
    figures = summarise(verdicts, area_deg2)
    _print_table(figures)
    return {"steps": steps, "figures": figures, "area_deg2": area_deg2}


def _peak_memory_mb(task: Task) -> float:
    """What our chain holds at most beyond its input, MB."""
    tracemalloc.start()
    subtract_ours(task)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 1e6


def _step_means(of_peer: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in of_peer for name in one)
    return {name: float(np.mean([one.get(name, 0.0) for one in of_peer])) for name in names}


def _print_steps(steps: dict[str, dict[str, float]], peak_mb: float) -> None:
    ours = sum(value for name, value in steps["ours"].items() if name != "warp")
    for label, of_peer in steps.items():
        for name, value in ((name, value) for name, value in of_peer.items() if value > 1e-3):
            print(f"  {label:<18} {name:<32} {value:8.3f} CPU s")
        if label == "ours":
            print(
                f"  {label:<18} {'all but the warp':<32} {ours:8.3f} CPU s, at most {peak_mb:.0f} MB beyond its input"
            )
        else:
            print(f"  {label:<18} {'over ours without warp':<32} {sum(of_peer.values()) / ours:8.2f}")
            alike = sum(steps["ours"].get(name, 0.0) for name in LIKE_HOTPANTS)
            print(f"  {label:<18} {'over what it does too of ours':<32} {sum(of_peer.values()) / alike:8.2f}")


_COLUMNS = (
    ("CPU s", "CPU s", 2), ("noise", "noise", 3), ("correlation_x", "corr x", 3), ("correlation_y", "corr y", 3),
    ("score", "score", 3), ("FP", "FP", 0), ("FP far", "FP far", 0), ("FP =C", "FP =C", 0),
    ("FP far =C", "FP far =C", 0), ("CR", "CR", 0), ("C 3-5", "C 3-5", 2), ("C 5-6", "C 5-6", 2),
    ("C 6-8", "C 6-8", 2), ("C 8-12", "C 8-12", 2), ("C 12-50", "C 12-50", 2), ("C trails", "C trails", 2),
    ("bias", "bias", 4), ("pull", "pull", 2), ("chi_faint", "chi 100-", 2), ("chi_bright", "chi 1000-", 2),
)  # fmt: skip


def _print_table(figures: dict[str, dict[str, Figure]]) -> None:
    """One row a figure, one column a peer: there are more figures than fit a line."""
    print(f"  {'':<10}" + "".join(f"{label:>24}" for label in figures))
    for key, title, digits in _COLUMNS:
        cells = (f"{of_peer[key][0]:.{digits}f} +- {of_peer[key][1]:.{digits}f}" for of_peer in figures.values())
        print(f"  {title:<10}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()

"""Microseconds a source of each measurement, beside the oracle libraries that are installed, in the same run."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shape_scenes import NOISE, flux_of_snr, profile, psf_image

from transforms.numerics.detection import find_peaks, lobe_distance, significance_map
from transforms.numerics.forced_photometry import linear_psf_fit, psf_splines
from transforms.numerics.measurement import (
    _adaptive_moments,
    _aperture_fluxes,
    fit_centroids,
    mask_flags,
    measure_sources,
)
from transforms.numerics.psf_grid import PSF_CELL_PIX, PsfGrid
from transforms.numerics.reliability import score
from transforms.numerics.reliability_features import reliability_features
from transforms.numerics.source_shapes import measure_shapes
from transforms.reliability_model import shipped_model

REPEATS = 3
SIDE_PIX = 2048
SPACING_PIX = 45  # 45 x 45 sources
PEER_SOURCES = 300


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Least CPU seconds of three calls, and the result."""
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        result = call()
        seconds.append(time.process_time() - started)
    return min(seconds), result


def points(fwhm: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Science and template of 2,025 points, S/N 10 to 100 on the difference, a third of them fading."""
    rng = np.random.default_rng(seed)
    science, template = rng.normal(0.0, NOISE, (2, SIDE_PIX, SIDE_PIX))
    half = SPACING_PIX // 2
    for y in range(half, SIDE_PIX - half, SPACING_PIX):
        for x in range(half, SIDE_PIX - half, SPACING_PIX):
            v, u = np.mgrid[-half : half + 1, -half : half + 1]
            dx, dy = rng.uniform(-0.5, 0.5, 2)
            light = profile(fwhm, u - dx, v - dy, moffat=True)
            flux = flux_of_snr(float(np.exp(rng.uniform(np.log(10.0), np.log(100.0)))), light, np.sqrt(2.0) * NOISE)
            image = template if rng.random() < 1.0 / 3.0 else science
            image[y - half : y + half + 1, x - half : x + half + 1] += flux * light
    return science.astype(np.float32), template.astype(np.float32)


def costs(fwhm: float, side: int, seed: int) -> None:
    del side
    science, template = points(fwhm, seed)
    difference, variance = science - template, np.full(science.shape, 2.0 * NOISE**2, np.float32)
    half_variance, bad = 0.5 * variance, np.zeros(science.shape, bool)
    n_cells = SIDE_PIX // PSF_CELL_PIX
    widths = fwhm * (1.0 + 0.02 * np.linspace(-1.0, 1.0, n_cells))
    row = np.array([psf_image(float(width), moffat=True) for width in widths], np.float32)
    grid = PsfGrid(np.broadcast_to(row, (n_cells, *row.shape)).copy())
    planes = (difference, variance, science, half_variance, template, half_variance, bad)
    steps: dict[str, float] = {}
    steps["significance map"], (snr_map, noise_ratio) = timed(lambda: significance_map(difference, variance, bad, grid))
    steps["peaks"], found = timed(lambda: find_peaks(snr_map, bad, 5.0, lobe_distance(grid)))
    steps["measure_sources"], measured = timed(lambda: measure_sources(*planes, grid, found, grid))
    steps["measure_shapes"], shapes = timed(lambda: measure_shapes(*planes, grid, grid, found, measured))
    mask = bad.astype(np.int32)
    steps["mask flags"], _ = timed(lambda: mask_flags(mask, {"BAD": 0}, measured.x, measured.y, found))
    seen = (difference, variance, science, template, bad, bad, grid, found, measured, shapes, noise_ratio, 0.01)
    steps["features"], features = timed(lambda: reliability_features(*seen))
    steps["score"], _ = timed(lambda: score(features, shipped_model().trees))
    n = found.peak_x.size
    print(f"{'steps':18s} {'CPU s':>7s} {'us a source':>12s}  ({n} sources, {SIDE_PIX}^2 pixels, {n_cells**2} PSFs)")
    for name, seconds in (*steps.items(), ("all", sum(steps.values()))):
        print(f"{name:18s} {seconds:7.3f} {1e6 * seconds / n:12.1f}")
    x, y, sign = measured.x, measured.y, np.where(found.peak_snr < 0.0, -1.0, 1.0)
    splines = psf_splines(grid, found.peak_x, found.peak_y)
    start = np.stack([measured.ixx_psf, measured.iyy_psf, measured.ixy_psf])

    def moments() -> NDArray[np.float64]:
        found_moments = np.full((4, n), np.nan)
        _adaptive_moments(difference, variance, bad, x, y, sign, start, found_moments)
        return found_moments

    ours: dict[str, tuple[float, Any]] = {
        "PSF splines": timed(lambda: psf_splines(grid, found.peak_x, found.peak_y)),
        "centroid": timed(lambda: fit_centroids(difference, variance, bad, splines, found.peak_x, found.peak_y)),
        "PSF flux": timed(lambda: linear_psf_fit(difference, variance, splines, x, y, bad)),
        "aperture": timed(lambda: _aperture_fluxes(difference, variance, bad, x, y)),
        "adaptive moments": timed(moments),
    }
    peers = {
        "centroid": ("sep", lambda: peer_sep_centroids(difference, x, y, fwhm)),
        "PSF flux": ("photutils", lambda: peer_photutils(difference, variance, grid, x, y)),
        "aperture": ("sep", lambda: peer_sep_apertures(difference, variance, x, y)),
        "adaptive moments": ("galsim", lambda: peer_galsim(difference, grid, x, y, sign)),
    }
    print(f"\n{'measurement':18s} {'us a source':>12s}  peer")
    for name, (seconds, _) in ours.items():
        peer = ""
        if name in peers:
            library, call = peers[name]
            peer = f"{library} {call():.1f}" if importable(library) else f"{library} not installed"
        print(f"{name:18s} {1e6 * seconds / n:12.1f}  {peer}")


def importable(library: str) -> bool:
    try:
        importlib.import_module(library)
    except ImportError:
        return False
    return True


def peer_sep_centroids(difference: NDArray[np.float32], x: NDArray, y: NDArray, fwhm: float) -> float:
    import sep

    seconds, _ = timed(lambda: sep.winpos(difference, np.round(x), np.round(y), fwhm / 2.3548))
    return 1e6 * seconds / x.size


def peer_sep_apertures(difference: NDArray[np.float32], variance: NDArray[np.float32], x: NDArray, y: NDArray) -> float:
    import sep

    seconds, _ = timed(lambda: sep.sum_circle(difference, x, y, 12.0, var=variance, subpix=0))
    return 1e6 * seconds / x.size


def peer_photutils(
    difference: NDArray[np.float32], variance: NDArray[np.float32], grid: PsfGrid, x: NDArray, y: NDArray
) -> float:
    """Flux alone, at fixed places, one PSF for all."""
    from astropy.table import Table
    from photutils.psf import ImagePSF, PSFPhotometry

    model = ImagePSF(grid.middle.astype(np.float64))
    model.x_0.fixed = model.y_0.fixed = True
    some = slice(0, PEER_SOURCES)
    places = Table({"x": x[some], "y": y[some], "flux": np.ones(len(x[some]))})
    fitter = PSFPhotometry(model, (21, 21), aperture_radius=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds, _ = timed(
            lambda: fitter(difference.astype(float), error=np.sqrt(variance, dtype=float), init_params=places)
        )
    return 1e6 * seconds / len(places)


def peer_galsim(difference: NDArray[np.float32], grid: PsfGrid, x: NDArray, y: NDArray, sign: NDArray) -> float:
    import galsim

    half = 18
    stamps = []
    for one in range(PEER_SOURCES):
        column, row = int(np.floor(x[one] + 0.5)), int(np.floor(y[one] + 0.5))
        rows = slice(max(0, row - half), row + half + 1)
        columns = slice(max(0, column - half), column + half + 1)
        stamps.append(galsim.Image(np.ascontiguousarray(sign[one] * difference[rows, columns], dtype=np.float32)))
    seconds, _ = timed(lambda: [galsim.hsm.FindAdaptiveMom(stamp, strict=False) for stamp in stamps])
    return 1e6 * seconds / PEER_SOURCES

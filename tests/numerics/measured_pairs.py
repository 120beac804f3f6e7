"""Simulated pairs subtracted, searched and measured by the chain, each true source beside what was found of it."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.signal import fftconvolve
from threadpoolctl import threadpool_limits

from schemas.elements import SubtractedExposure
from schemas.exposures import Exposure, mask_bits
from schemas.manifests import DetectorImages, Visit
from transforms import subtraction
from transforms.detection import DetectionConfig, search
from transforms.numerics.differencing import DECORRELATION_CELL_PIX, DifferenceResult
from transforms.numerics.forced_photometry import linear_psf_fit
from transforms.numerics.pair_simulation import PairImage, Regime, SimulatedPair, simulate_pair
from transforms.numerics.psf_grid import PsfGrid
from transforms.numerics.warping import CoordinateGrid, coordinate_grid
from transforms.subtraction import UNUSABLE_PLANES, SubtractionConfig, subtract_exposures

EDGE_PIX = 27
APERTURE_RADIUS_PIX = 12.0
MEASURED = (
    "x", "y", "xErr", "yErr", "psfFlux", "psfFluxErr", "apFlux", "apFluxErr",
    "scienceFlux", "scienceFluxErr", "templateFlux", "templateFluxErr",
)  # fmt: skip
ROW_DTYPE = np.dtype(
    [
        ("group", "U8"),  # isolated, in_host, on_star, variable
        ("flux", "f8"),  # true values
        ("true_x", "f8"),
        ("true_y", "f8"),
        (
            "light_science",
            "f8",
        ),  # what the forced fit finds at the measured place in light without noise, NaN if not found
        ("light_template", "f8"),
        ("snr", "f8"),  # an optimal fit's at the known place, with the true PSF and variance of the difference
        ("bound_x", "f8"),  # Cramer-Rao bounds with flux and position free, pixels
        ("bound_y", "f8"),
        ("bound_flux", "f8"),
        ("in_aperture", "f8"),  # part of the PSF within 12 pixels
        ("found", "?"),
        ("peak_snr", "f8"),
        *((name, "f8") for name in MEASURED),
    ]
)
_NODE_STEP_PIX, _STAMP_PIX, _SLOPE_STEP_PIX = 32, 41, 0.02
_MATCH_FWHM, _LEAST_MATCH_PIX = 0.8, 2.0
_STEADY_SIGMA = 0.5  # of a pixel: more steady light than that in the mean of the core, and a source is not isolated
_CORE_HALF_PIX = 2
_MJD = 61367.0


def measured_pair(seed: int, regime: Regime, size_pix: int) -> NDArray[np.void]:
    """ROW_DTYPE rows of the point sources on good pixels of one pair, as the chain detects and measures them."""
    with threadpool_limits(1):
        pair = simulate_pair(seed, regime, size_pix)
        exposure, result = subtracted(pair)
        searched = search(exposure, DetectionConfig())
    return matched_rows(pair, exposure, result, searched.records[searched.kept])


def subtracted(pair: SimulatedPair) -> tuple[SubtractedExposure, DifferenceResult]:
    """The pair through the subtraction stage, and what its core returned: it knows how noise was made white."""
    results: list[DifferenceResult] = []

    def kept(*arguments: Any) -> DifferenceResult:
        results.append(core(*arguments))
        return results[0]

    core = subtraction.subtract
    science, template = _as_exposure(pair.science), _as_exposure(pair.template)
    x, y = coordinate_grid(pair.science.image.shape, _NODE_STEP_PIX)
    grid = CoordinateGrid(*pair.template_position(x, y), _NODE_STEP_PIX)
    with patch.object(subtraction, "subtract", kept):
        exposure = subtract_exposures(_visit(), 0, science, template, grid, SubtractionConfig())
    return exposure, results[0]


def matched_rows(
    pair: SimulatedPair, exposure: SubtractedExposure, result: DifferenceResult, records: NDArray[np.void]
) -> NDArray[np.void]:
    truth = _judged(pair)
    rows = np.zeros(truth.size, ROW_DTYPE)
    rows["flux"], rows["true_x"], rows["true_y"] = truth["flux"], truth["x"], truth["y"]
    rows["group"] = _groups(pair, exposure, truth)
    for row in rows:
        _fill_bounds(row, pair, exposure, result)
    for name in (*MEASURED, "peak_snr"):
        rows[name] = np.nan
    reach = max(_LEAST_MATCH_PIX, _MATCH_FWHM * pair.regime.fwhm_science_pix)
    for row in rows:
        distance = np.hypot(records["x"] - row["true_x"], records["y"] - row["true_y"])
        distance[np.sign(records["psfFlux"]) != np.sign(row["flux"])] = np.inf
        if distance.size and distance.min() < reach:
            nearest = records[np.argmin(distance)]
            row["found"], row["peak_snr"] = True, nearest["snr"]
            for name in MEASURED:
                row[name] = nearest[name]
    rows["light_science"], rows["light_template"] = _light_fluxes(pair, exposure, rows)
    return rows


def _judged(pair: SimulatedPair) -> NDArray[np.void]:
    """Point sources on good pixels, away from edges."""
    truth = pair.truth
    ny, nx = pair.science.image.shape
    inner = (truth["x"] > EDGE_PIX) & (truth["x"] < nx - 1 - EDGE_PIX)
    inner &= (truth["y"] > EDGE_PIX) & (truth["y"] < ny - 1 - EDGE_PIX)
    hit = [
        pair.science.hidden_cosmic_ray[round(y) - 5 : round(y) + 6, round(x) - 5 : round(x) + 6].any()
        for x, y in zip(truth["x"], truth["y"], strict=True)
    ]
    return truth[truth["good_pixels"] & inner & ~np.array(hit) & ~np.isin(truth["kind"], ("trail", "proper_motion"))]


def _groups(pair: SimulatedPair, exposure: SubtractedExposure, truth: NDArray[np.void]) -> NDArray[np.str_]:
    group = np.full(truth.size, "isolated", "U8")
    limit = _STEADY_SIGMA * np.sqrt(np.median(exposure.science_variance))
    for number, source in enumerate(truth):
        core = _box(source["x"], source["y"], _CORE_HALF_PIX)
        if source["kind"] == "variable":
            group[number] = "variable"
        elif source["in_host"]:
            group[number] = "in_host"
        elif exposure.matched_template[core].mean(dtype=np.float64) > limit:
            group[number] = "on_star"
    return group


def _light_fluxes(
    pair: SimulatedPair, exposure: SubtractedExposure, rows: NDArray[np.void]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fluxes that the chain's forced fit finds in the light of the science image, with and without what differs."""
    half = _STAMP_PIX // 2
    light = np.pad(pair.light.astype(np.float64), half)
    steady = light.copy()
    for row in rows:
        x, y = float(row["true_x"]), float(row["true_y"])
        stamp = pair.science.psf_stamp(x, y, _STAMP_PIX, x - round(x), y - round(y))
        steady[_box(x + half, y + half, half)] -= row["flux"] * stamp
    bad = (exposure.mask & mask_bits(*UNUSABLE_PLANES)) != 0
    psf, inner = PsfGrid(exposure.science_psf), (slice(half, -half), slice(half, -half))
    found = (
        linear_psf_fit(light[inner], exposure.science_variance, psf, rows["x"], rows["y"], bad),
        linear_psf_fit(steady[inner], exposure.template_variance, psf, rows["x"], rows["y"], bad),
    )
    return found[0].flux, found[1].flux


def _box(x: float, y: float, half: int) -> tuple[slice, slice]:
    column, row = round(float(x)), round(float(y))
    return slice(row - half, row + half + 1), slice(column - half, column + half + 1)


def _fill_bounds(row: np.void, pair: SimulatedPair, exposure: SubtractedExposure, result: DifferenceResult) -> None:
    x, y = float(row["true_x"]), float(row["true_y"])
    white = result.decorrelation[int(y + 0.5) // DECORRELATION_CELL_PIX, int(x + 0.5) // DECORRELATION_CELL_PIX]
    side = _STAMP_PIX + white.shape[0] - 1
    dx, dy, step = x - round(x), y - round(y), _SLOPE_STEP_PIX

    def psf(off_x: float, off_y: float) -> NDArray[np.float64]:
        wide = pair.science.psf_stamp(x, y, side, dx + off_x, dy + off_y)
        return np.asarray(fftconvolve(wide, white, mode="valid"))

    model = psf(0.0, 0.0)
    slope_x, slope_y = (psf(step, 0.0) - psf(-step, 0.0)) / (2 * step), (psf(0.0, step) - psf(0.0, -step)) / (2 * step)
    design = np.stack([model.ravel(), row["flux"] * slope_x.ravel(), row["flux"] * slope_y.ravel()])
    weight = 1.0 / _padded(exposure.difference_variance, x, y).ravel()
    information = np.einsum("ik,jk,k->ij", design, design, weight)
    covariance = np.linalg.inv(information)
    row["snr"] = abs(row["flux"]) * np.sqrt(information[0, 0])
    row["bound_flux"], row["bound_x"], row["bound_y"] = np.sqrt(np.diag(covariance))
    v, u = np.mgrid[:_STAMP_PIX, :_STAMP_PIX] - _STAMP_PIX // 2
    row["in_aperture"] = model[np.hypot(u - dx, v - dy) <= APERTURE_RADIUS_PIX].sum()


def _padded(plane: NDArray[np.float32], x: float, y: float) -> NDArray[np.float64]:
    """Stamp around a place, with infinity beyond the border."""
    half = _STAMP_PIX // 2
    wide = np.pad(plane.astype(np.float64), half, constant_values=np.inf)
    return wide[_box(x + half, y + half, half)]


def _as_exposure(image: PairImage) -> Exposure:
    mask = np.zeros(image.image.shape, dtype=np.int32)
    for plane, pixels in {"BAD": image.bad, "SAT": image.saturated, "CR": image.cosmic_ray}.items():
        mask[pixels] |= np.int32(mask_bits(plane))
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [0.0, 0.0], [0.5 * image.image.shape[1], 0.5 * image.image.shape[0]]
    wcs.wcs.cd = np.diag([-0.2, 0.2]) / 3600.0
    return Exposure(image.image, image.variance, mask, wcs, psf=None)


def _visit() -> Visit:
    return Visit(
        visit=1,
        day_obs=20261122,
        seq_num=1,
        instrument="SimCam",
        band="r",
        midpoint_mjd_tai=_MJD,
        exposure_time_s=30.0,
        readout_end_mjd_tai=_MJD,
        boresight_ra_deg=0.0,
        boresight_dec_deg=0.0,
        rotation_deg=0.0,
        observation_reason=None,
        target_name=None,
        detectors=(DetectorImages(0, "", None),),
    )

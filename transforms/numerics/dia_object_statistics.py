"""Summary statistics of diaObjects from their time-sorted detections and forced measurements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

N_BANDS = 6
_PLANES = (
    "psf_mean",
    "psf_mean_err",
    "psf_sigma",
    "psf_n",
    "psf_min",
    "psf_max",
    "psf_max_slope",
    "psf_err_mean",
    "science_mean",
    "science_mean_err",
    "forced_mean",
    "forced_mean_err",
)


@dataclass(frozen=True)
class LightCurves:
    """Light curves of n_objects, flattened.

    Attributes
    ----------
    offsets : (n_objects + 1,) int64, object i owns rows offsets[i]:offsets[i + 1]
    band : (n_rows,) int8 in 0..5 for ugrizy, other values are left out
    mjd : (n_rows,) float64, ascending within an object
    flux, flux_err, science_flux, science_flux_err : (n_rows,) float, nJy, NaN where unknown
    """

    offsets: np.ndarray
    band: np.ndarray
    mjd: np.ndarray
    flux: np.ndarray
    flux_err: np.ndarray
    science_flux: np.ndarray
    science_flux_err: np.ndarray


def band_statistics(detections: LightCurves, forced: LightCurves) -> dict[str, np.ndarray]:
    """Per object and band: weighted means, scatter, extremes and steepest rise.

    Weighted mean ``sum(f / e^2) / sum(1 / e^2)`` with error ``sqrt(1 / sum(1 / e^2))`` over the rows
    with finite flux and positive error; sample standard deviation (one degree of freedom lost);
    largest ``dF/dt`` between neighbours in time (nJy / day, signed, equal times left out). Scatter,
    extremes and rise are over all finite fluxes, the mean error over all finite errors.

    Returns
    -------
    dict of (n_objects, 6) float64
        Keys psf_mean, psf_mean_err, psf_sigma, psf_n, psf_min, psf_max, psf_max_slope,
        psf_err_mean, science_mean, science_mean_err, forced_mean, forced_mean_err. NaN where a
        value is undefined (no rows; one row for sigma and slope); psf_n is 0 there.

    Notes
    -----
    O(n_rows); sums run in row order, so equal input gives equal bytes.

    References
    ----------
    lsst/meas_base `diaCalculationPlugins`: ap_meanFlux, ap_sigmaFlux, ap_minMaxFlux,
    ap_maxSlopeFlux, ap_meanErrFlux, ap_meanTotFlux.
    """
    n_objects = len(detections.offsets) - 1
    out = np.full((len(_PLANES), n_objects, N_BANDS), np.nan)
    out[_PLANES.index("psf_n")] = 0.0
    _accumulate_flux(
        detections.offsets,
        detections.band,
        detections.mjd,
        np.asarray(detections.flux, dtype=np.float64),
        np.asarray(detections.flux_err, dtype=np.float64),
        out,
    )
    science = _PLANES.index("science_mean")
    _accumulate_mean(
        detections.offsets,
        detections.band,
        np.asarray(detections.science_flux, dtype=np.float64),
        np.asarray(detections.science_flux_err, dtype=np.float64),
        out[science],
        out[science + 1],
    )
    point = _PLANES.index("forced_mean")
    _accumulate_mean(
        forced.offsets,
        forced.band,
        np.asarray(forced.flux, dtype=np.float64),
        np.asarray(forced.flux_err, dtype=np.float64),
        out[point],
        out[point + 1],
    )
    return {name: out[index] for index, name in enumerate(_PLANES)}


def mean_positions(offsets: np.ndarray, ra_deg: np.ndarray, dec_deg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unweighted mean direction of each object's detections, RA in [0, 360); every object needs a row."""
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    x = np.add.reduceat(np.cos(dec) * np.cos(ra), offsets[:-1])
    y = np.add.reduceat(np.cos(dec) * np.sin(ra), offsets[:-1])
    z = np.add.reduceat(np.sin(dec), offsets[:-1])
    mean_ra = np.degrees(np.arctan2(y, x)) % 360.0
    # The remainder of a tiny negative angle rounds to 360 itself.
    return np.where(mean_ra < 360.0, mean_ra, 0.0), np.degrees(np.arctan2(z, np.hypot(x, y)))


@njit(cache=True)
def _accumulate_flux(
    offsets: np.ndarray, band: np.ndarray, mjd: np.ndarray, flux: np.ndarray, flux_err: np.ndarray, out: np.ndarray
) -> None:
    for i in range(len(offsets) - 1):
        for b in range(N_BANDS):
            n, n_used, n_err = 0, 0, 0
            weight, weighted, total, err_total = 0.0, 0.0, 0.0, 0.0
            low, high, slope = np.inf, -np.inf, -np.inf
            last_mjd, last_flux = np.nan, np.nan
            for k in range(offsets[i], offsets[i + 1]):
                if band[k] != b:
                    continue
                f, e = flux[k], flux_err[k]
                if np.isfinite(e):
                    err_total += e
                    n_err += 1
                if not np.isfinite(f):
                    continue
                n += 1
                total += f
                low, high = min(low, f), max(high, f)
                if mjd[k] > last_mjd:
                    slope = max(slope, (f - last_flux) / (mjd[k] - last_mjd))
                last_mjd, last_flux = mjd[k], f
                if np.isfinite(e) and e > 0.0:
                    weight += 1.0 / (e * e)
                    weighted += f / (e * e)
                    n_used += 1
            out[3, i, b] = n_used
            if n_used > 0:
                out[0, i, b] = weighted / weight
                out[1, i, b] = np.sqrt(1.0 / weight)
            if n_err > 0:
                out[7, i, b] = err_total / n_err
            if n == 0:
                continue
            out[4, i, b], out[5, i, b] = low, high
            if slope > -np.inf:
                out[6, i, b] = slope
            if n > 1:
                mean = total / n
                squares = 0.0
                for k in range(offsets[i], offsets[i + 1]):
                    if band[k] == b and np.isfinite(flux[k]):
                        squares += (flux[k] - mean) ** 2
                out[2, i, b] = np.sqrt(squares / (n - 1))


@njit(cache=True)
def _accumulate_mean(
    offsets: np.ndarray,
    band: np.ndarray,
    flux: np.ndarray,
    flux_err: np.ndarray,
    mean: np.ndarray,
    mean_err: np.ndarray,
) -> None:
    for i in range(len(offsets) - 1):
        for b in range(N_BANDS):
            weight, weighted = 0.0, 0.0
            for k in range(offsets[i], offsets[i + 1]):
                e = flux_err[k]
                if band[k] == b and np.isfinite(flux[k]) and np.isfinite(e) and e > 0.0:
                    weight += 1.0 / (e * e)
                    weighted += flux[k] / (e * e)
            if weight > 0.0:
                mean[i, b] = weighted / weight
                mean_err[i, b] = np.sqrt(1.0 / weight)

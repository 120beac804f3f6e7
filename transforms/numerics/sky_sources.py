"""Sky sources: PSF fluxes where nothing was found, which show what the noise of a flux really is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from transforms.numerics.forced_photometry import linear_psf_fit
from transforms.numerics.psf_grid import PsfGrid

SKY_SOURCES = 100
CLEAR_RADIUS_PIX = 8  # LSST's
_TRIES_PER_SOURCE = 10
_MAD_TO_SIGMA = 1.4826022185056018


class SkyNoise(NamedTuple):
    """What n sky sources say; all but the number are NaN when there are none.

    Attributes
    ----------
    n_sources : how many places were measured
    flux_median : image units; 0 but for a residual background
    flux_sigma : image units, 1.4826 MAD: the true noise of a PSF flux on empty sky
    pull_width : 1.4826 MAD of flux over its error: 1 when the errors are right
    """

    n_sources: int
    flux_median: float
    flux_sigma: float
    pull_width: float


def measure_sky_sources(
    difference: ArrayLike,
    variance: ArrayLike,
    bad: NDArray[np.bool_],
    psf: ArrayLike | PsfGrid,
    snr_map: NDArray[np.float32],
    threshold: float,
    start: tuple[float, float],
    n_sources: int = SKY_SOURCES,
) -> SkyNoise:
    """Measure PSF fluxes at places of empty sky.

    The places are the first `n_sources` of a Halton sequence (bases 2 and 3, shifted by `start`) with neither a bad
    pixel nor one beyond the threshold within 8 pixels along x and y; ten times as many are tried.

    Parameters
    ----------
    difference, variance, bad, psf : as in `linear_psf_fit`
    snr_map : (ny, nx), as detection saw it
    threshold : of detection
    start : two fractions in [0, 1): which places, the same for the same fractions

    Notes
    -----
    100 sources tell the width to 12 %, the visit's 189 detectors together to 1 %.
    """
    x, y = _halton(n_sources * _TRIES_PER_SOURCE, start)
    ny, nx = snr_map.shape
    x_pix, y_pix = x * nx - 0.5, y * ny - 0.5
    chosen = _clear_places(snr_map, bad, threshold, x_pix, y_pix, n_sources)
    fit = linear_psf_fit(difference, variance, psf, x_pix[chosen], y_pix[chosen], bad)
    flux, flux_err = fit.flux[fit.good], fit.flux_err[fit.good]
    if flux.size == 0:
        return SkyNoise(0, np.nan, np.nan, np.nan)
    return SkyNoise(flux.size, float(np.median(flux)), _robust_sigma(flux), _robust_sigma(flux / flux_err))


def _robust_sigma(values: NDArray[np.float64]) -> float:
    return float(_MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))))


def _halton(n: int, start: tuple[float, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points that fill the unit square evenly, however many of them are taken."""
    axes = []
    for base, shift in zip((2, 3), start, strict=True):
        number, digit = np.arange(1, n + 1), 1.0 / base
        fraction = np.full(n, shift)
        while number.any():
            number, remainder = np.divmod(number, base)
            fraction += remainder * digit
            digit /= base
        axes.append(fraction % 1.0)
    return axes[0], axes[1]


@njit(cache=True)
def _clear_places(
    snr_map: NDArray[np.float32],
    bad: NDArray[np.bool_],
    threshold: float,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    wanted: int,
) -> NDArray[np.int64]:
    """The first places that lie whole within the image and clear of everything."""
    ny, nx = snr_map.shape
    chosen = np.empty(wanted, dtype=np.int64)
    n_chosen = 0
    for place in range(x.size):
        column, row = int(np.floor(x[place] + 0.5)), int(np.floor(y[place] + 0.5))
        x0, x1 = column - CLEAR_RADIUS_PIX, column + CLEAR_RADIUS_PIX + 1
        y0, y1 = row - CLEAR_RADIUS_PIX, row + CLEAR_RADIUS_PIX + 1
        clear = x0 >= 0 and y0 >= 0 and x1 <= nx and y1 <= ny
        for j in range(y0, y1):
            if not clear:
                break
            for i in range(x0, x1):
                if bad[j, i] or abs(snr_map[j, i]) > threshold:
                    clear = False
                    break
        if clear:
            chosen[n_chosen] = place
            n_chosen += 1
            if n_chosen == wanted:
                break
    return chosen[:n_chosen]

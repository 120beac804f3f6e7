"""Noise of a difference image made white again (Zackay, Ofek & Gal-Yam 2016; LSST DMTN-021).

Convolution with the matching kernel correlates the template's noise from pixel to pixel, and so did the
interpolation that put it onto the science grid. A further kernel undoes both, for one place of the image:

    phi(k)^2 = (v_S + r^2 v_T) / (v_S + v_T |K(k)|^2 |W(k)|^2n)

with the variances v of a pixel, the matching kernel K of sum r, and the transfer W of the interpolation, which the
noise went through n times: that of a stack once more than that of a single exposure. The difference convolved with phi
has the variance v_S + r^2 v_T in every pixel, no covariance, and the PSF P_S * phi.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transforms.numerics.warping import TAPS, sinc_weights

_FFT_SIDE = 64
_N_PHASES = 32
_MAX_COUNT = 4.0
_KEPT_POWER = 0.999999  # of a sum of squares: variance and covariances are then within 4e-4 of white
_LEAST_POWER = 1e-3  # of the white spectrum: where less noise than that is left there is no signal either


def decorrelation_kernels(
    kernels: NDArray[np.floating],
    science_variance: NDArray[np.floating],
    template_variance: NDArray[np.floating],
    *,
    interpolated: float,
    most_side_pix: int = 25,
) -> NDArray[np.float64]:
    """Kernels that make the noise of a difference image white, one for each place.

    Parameters
    ----------
    kernels : (n, k, k) matching kernels, k odd, below 64
    science_variance, template_variance : (n,) of a pixel, positive; the template's as it was before interpolation
    interpolated : how many times `warping.warp_exposure` interpolated the template's noise, see `interpolation_count`
    most_side_pix : largest side of the result, odd; it is smaller where that holds all but 1e-6 of the squares of each

    Returns
    -------
    (n, side, side) float64, each with sum 1: fluxes are kept
    """
    n, side = kernels.shape[0], kernels.shape[1]
    padded = np.zeros((n, _FFT_SIDE, _FFT_SIDE))
    padded[:, :side, :side] = kernels
    power = np.square(np.abs(np.fft.rfft2(padded)))
    if interpolated > 0:
        along = interpolation_power(np.fft.fftfreq(_FFT_SIDE)) ** interpolated
        power *= along[:, np.newaxis] * along[np.newaxis, : power.shape[2]]
    science = np.asarray(science_variance, dtype=np.float64)[:, np.newaxis, np.newaxis]
    template = np.asarray(template_variance, dtype=np.float64)[:, np.newaxis, np.newaxis]
    total = np.square(kernels.sum(axis=(1, 2)))[:, np.newaxis, np.newaxis]
    white = science + total * template
    spectrum = np.maximum(science + template * power, _LEAST_POWER * white)
    phi = np.fft.fftshift(np.fft.irfft2(np.sqrt(white / spectrum), s=(_FFT_SIDE, _FFT_SIDE)), axes=(1, 2))
    middle = _FFT_SIDE // 2
    wanted = max(radius_of_part(squares[1:, 1:], _KEPT_POWER) for squares in np.square(phi))
    half = min(wanted, most_side_pix // 2)
    phi = phi[:, middle - half : middle + half + 1, middle - half : middle + half + 1]
    # what the wings had, spread evenly, changes the power least; scaling would make all the noise louder
    return np.asarray(phi + (1.0 - phi.sum(axis=(1, 2), keepdims=True)) / phi[0].size)


def radius_of_part(weight: NDArray[np.floating], part: float) -> int:
    """Half side of the centred square that holds a part, 0 to 1, of the sum of an array (k, k), k odd."""
    half = weight.shape[0] // 2
    inside = [weight[half - r : half + r + 1, half - r : half + r + 1].sum() for r in range(half + 1)]
    return int(np.searchsorted(inside, part * inside[-1]))


def interpolation_power(frequency: NDArray[np.floating]) -> NDArray[np.float64]:
    """Part of white noise that interpolation passes along one axis, mean over all sub-pixel positions.

    Parameters
    ----------
    frequency : cycles per pixel

    Returns
    -------
    ``mean |sum_t w_t exp(-2 pi i f t)|^2``, 1 at frequency 0
    """
    weights = sinc_weights((np.arange(_N_PHASES) + 0.5) / _N_PHASES)
    waves = np.exp(-2j * np.pi * np.asarray(frequency)[:, np.newaxis] * np.arange(TAPS))
    return np.asarray(np.mean(np.square(np.abs(waves @ weights.T)), axis=1))


def interpolation_count(variance: NDArray[np.floating], white_variance: NDArray[np.floating]) -> float:
    """How many times noise was interpolated at average sub-pixel positions to lose what it has lost.

    1 for a usual warp, 0 for shifts by whole pixels, 2 where all pixels lie half-way between two others.

    Parameters
    ----------
    variance, white_variance : of a pixel after interpolation, and of the white noise that sums find; infinite or 0
        where there are no data (`warping.WarpedExposure`, `image_stacking.Stack`)

    Returns
    -------
    n with ``mean(variance) / mean(white_variance) = (mean_f W(f)^2n)^2``, 0 to 4; 1 where there are no data
    """
    usable = np.isfinite(white_variance) & (white_variance > 0)
    if not usable.any():
        return 1.0
    kept = np.mean(variance[usable], dtype=np.float64) / np.mean(white_variance[usable], dtype=np.float64)
    counts = np.linspace(0.0, _MAX_COUNT, 81)
    power = interpolation_power(np.fft.fftfreq(_FFT_SIDE))
    expected = np.array([np.mean(power**count) ** 2 for count in counts])
    return float(np.interp(-kept, -expected, counts))

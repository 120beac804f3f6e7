"""A first reliability for detected sources: rules on measured features, not training.

Each feature says in which known way a detection can fail to be a point-like change on the sky: a cosmic ray, a dipole
of a misaligned star, the residual of a bright star, a hole in the mask. A logistic function of the sum of their
penalties is the score. The weights were chosen by hand so that each failure alone brings the score below the usual
cuts; nothing was fitted to labelled data, and the score is no probability.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

RELIABILITY_VERSION = "rules-2"

_CLEAN = 4.0  # logit of a clean source: 0.982
_FAINT_SNR = 7.0  # below it chance and the number of pixels make every detection less certain
_FAINT_WEIGHT = 0.5  # per unit of S/N below that
_MISFIT_ALLOWANCE = 2.0  # sigma of chi2 that pure noise may use
_MISFIT_WEIGHT, _MISFIT_LIMIT = 3.0, 3.0
_PEAK_WEIGHT, _PEAK_LIMIT = 4.0, 3.0
_SHARP_RATIO, _SHARP_WEIGHT = 0.6, 5.0  # second moment below 0.6 of the PSF's: sharper than the optics allow
_OPPOSITE_NOISE_SNR = 2.5  # the other sign seldom exceeds this by noise alone
_OPPOSITE_FLOOR, _OPPOSITE_FULL, _OPPOSITE_WEIGHT = 0.2, 0.6, 6.0  # LSST's dipole has lobes of at least 0.54
_MASKED_FLOOR, _MASKED_WEIGHT = 0.1, 6.0  # part of the PSF's weight lost to masks
_SATURATED_WEIGHT = 5.0  # a clean source at the rim of a saturated core scores 0.27: it can't be told from a residual
_STAR_FRACTION, _STAR_WEIGHT = 0.05, 4.0  # per factor of ten below 5 % of the star underneath


def score(
    *,
    snr: ArrayLike,
    psf_flux: ArrayLike,
    psf_flux_err: ArrayLike,
    core_chi2: ArrayLike,
    core_n_pixels: ArrayLike,
    peak_excess: ArrayLike,
    size_ratio: ArrayLike,
    opposite_snr: ArrayLike,
    good_weight: ArrayLike,
    star_flux: ArrayLike,
    near_saturated: ArrayLike,
    noise_ratio: float,
) -> NDArray[np.float32]:
    """Score how reliably each detection is a real, point-like change: 0 not at all, 1 surely.

    score = 1 / (1 + exp(-(4 - sum of penalties))); every penalty is >= 0 and grows with its defect, none depends on
    units, pixel scale or the sign of the source. Columns have shape (n,) and come from `measure_sources`.

    Parameters
    ----------
    snr : |significance| at the peak, > 0
    psf_flux, psf_flux_err : linear PSF fit on the difference
    core_chi2, core_n_pixels : its chi-square and pixels in the core
    peak_excess : brightest pixel beyond the PSF model, in units of the model's peak, >= 0 (cosmic rays: above 1)
    size_ratio : second moment under a PSF-like weight over that of the PSF; NaN (not measured) costs nothing
    opposite_snr : largest significance of the other sign near the footprint, >= 0
    good_weight : part of the PSF's weight on usable pixels, in [0, 1]
    star_flux : flux of the star that stands at the same place in science or template, >= 0
    near_saturated : bool, a pixel saturated in science or template lies within reach of the PSF
    noise_ratio : of `significance_map`: true noise over what the variance plane says; 1 stands in for 0 and NaN

    Returns
    -------
    (n,) float32 in [0, 1]; 0 where the PSF fit gave nothing

    Notes
    -----
    Penalties: faintness below S/N 7; misfit, the part of the source's (S/N)^2 that the PSF leaves in the core beyond
    2 sigma of chi2 noise (a flux of S/N s in a single pixel leaves about s^2 (1/q - 1), q = P0^2 / sum(P^2)); peak
    excess; sharpness; a lobe of the other sign; masked weight; saturation next to it, where neither image is linear;
    and the contrast to a star underneath when the change is below 5 % of it. Tested on simulated stamps: clean point
    sources of either sign above 0.9 at S/N 8, one-pixel cosmic rays below 0.1, symmetric dipoles below 0.3, trails up
    to 8 FWHM long above 0.5.
    """
    significance, flux, flux_err, chi2 = _columns(snr, psf_flux, psf_flux_err, core_chi2)
    n_pixels, excess, size, opposite = _columns(core_n_pixels, peak_excess, size_ratio, opposite_snr)
    weight, star = _columns(good_weight, star_flux)
    noise = np.float64(noise_ratio if np.isfinite(noise_ratio) and noise_ratio > 0.0 else 1.0)
    with np.errstate(all="ignore"):  # columns may hold NaN, zero and huge values; what is not finite scores 0 below
        penalty = _FAINT_WEIGHT * np.maximum(0.0, _FAINT_SNR - significance)
        fit_snr2 = np.square(flux / flux_err / noise)
        left_over = chi2 / np.square(noise) - n_pixels - _MISFIT_ALLOWANCE * np.sqrt(2.0 * n_pixels)
        penalty += _MISFIT_WEIGHT * np.clip(left_over / fit_snr2, 0.0, _MISFIT_LIMIT)
        penalty += _PEAK_WEIGHT * np.clip(excess, 0.0, _PEAK_LIMIT)
        sharpness = np.clip((_SHARP_RATIO - size) / _SHARP_RATIO, 0.0, 1.0)
        penalty += _SHARP_WEIGHT * np.where(np.isnan(size), 0.0, sharpness)
        lobe = np.maximum(0.0, opposite - _OPPOSITE_NOISE_SNR) / np.maximum(significance - _OPPOSITE_NOISE_SNR, 1.0)
        penalty += _OPPOSITE_WEIGHT * np.clip((lobe - _OPPOSITE_FLOOR) / (_OPPOSITE_FULL - _OPPOSITE_FLOOR), 0.0, 1.0)
        penalty += _MASKED_WEIGHT * np.maximum(0.0, 1.0 - weight - _MASKED_FLOOR)
        penalty += _SATURATED_WEIGHT * np.asarray(near_saturated, dtype=np.float64)
        contrast = np.log10(_STAR_FRACTION * star / np.abs(flux))
        penalty += _STAR_WEIGHT * np.maximum(0.0, contrast)
        reliability = 1.0 / (1.0 + np.exp(penalty - _CLEAN))
    measured = np.isfinite(flux) & np.isfinite(flux_err) & (flux_err > 0.0) & (flux != 0.0)
    return np.where(measured & np.isfinite(reliability), reliability, 0.0).astype(np.float32)


def _columns(*columns: ArrayLike) -> list[NDArray[np.float64]]:
    return [np.asarray(column, dtype=np.float64) for column in columns]

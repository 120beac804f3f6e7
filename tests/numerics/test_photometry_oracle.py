"""Fluxes and centroids beside photutils, where that is installed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from shape_scenes import NOISE, flux_of_snr, profile, psf_image

from transforms.numerics.forced_photometry import linear_psf_fit
from transforms.numerics.measurement import _aperture_fluxes, fit_centroids

pytest.importorskip("photutils")
from astropy.table import Table
from photutils.aperture import CircularAperture, aperture_photometry
from photutils.psf import ImagePSF, PSFPhotometry

FWHM, SNR, N_SIDE, SPACING = 4.0, 20.0, 8, 45


def field(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Noisy points at sub-pixel places, and where they are."""
    rng = np.random.default_rng(seed)
    side = N_SIDE * SPACING
    image = rng.normal(0.0, NOISE, (side, side))
    v, u = np.mgrid[:side, :side]
    y, x = (axis.ravel() * float(SPACING) + 22.0 for axis in np.mgrid[:N_SIDE, :N_SIDE])
    x, y = x + rng.uniform(-0.5, 0.5, x.size), y + rng.uniform(-0.5, 0.5, x.size)
    for one in range(x.size):
        light = profile(FWHM, u - x[one], v - y[one], moffat=True)
        image += flux_of_snr(SNR, light, NOISE) * light
    return image, x, y


def photutils_fit(image: NDArray[np.float64], x: NDArray, y: NDArray, fixed: bool) -> Table:
    model = ImagePSF(psf_image(FWHM, moffat=True))
    model.x_0.fixed = model.y_0.fixed = fixed
    fitter = PSFPhotometry(model, (21, 21), aperture_radius=4.0)
    error = np.full(image.shape, NOISE)
    return fitter(image, error=error, init_params=Table({"x": x, "y": y, "flux": np.full(x.size, 1e3)}))


def test_psf_fluxes_and_errors_at_fixed_places_agree_with_photutils() -> None:
    image, x, y = field(1)
    ours = linear_psf_fit(image, np.full(image.shape, NOISE**2), psf_image(FWHM, moffat=True), x, y)
    theirs = photutils_fit(image, x, y, fixed=True)
    # Their bicubic spline of the PSF is ten times worse than our quintic one: 0.2 % of the peak at this width.
    np.testing.assert_allclose(ours.flux, theirs["flux_fit"], rtol=3e-3, atol=3e-3 * np.abs(ours.flux).max())
    np.testing.assert_allclose(ours.flux_err, theirs["flux_err"], rtol=5e-3)


def test_centroids_and_their_errors_agree_with_photutils() -> None:
    image, x, y = field(2)
    variance, psf = np.full(image.shape, NOISE**2), psf_image(FWHM, moffat=True)
    peaks = [np.floor(axis + 0.5).astype(int) for axis in (x, y)]
    ours = fit_centroids(image, variance, image > np.inf, psf, *peaks)
    theirs = photutils_fit(image, x, y, fixed=False)
    # The stamps are centred alike; ours ends where a step is 2 % of the error, the splines differ by less.
    assert not ours.flag.any()
    np.testing.assert_allclose(ours.x, theirs["x_fit"], atol=0.05 * np.median(ours.x_err))
    np.testing.assert_allclose(ours.y, theirs["y_fit"], atol=0.05 * np.median(ours.y_err))
    np.testing.assert_allclose(ours.x_err, theirs["x_err"], rtol=0.02)


def test_aperture_fluxes_agree_with_photutils() -> None:
    image, x, y = field(3)
    pixels, variance = image.astype(np.float32), np.full(image.shape, NOISE**2, np.float32)
    flux, flux_err, _ = _aperture_fluxes(pixels, variance, np.zeros(image.shape, bool), x, y)
    apertures = CircularAperture(np.stack([x, y], axis=-1), 12.0)
    theirs = aperture_photometry(pixels.astype(float), apertures, error=np.full(image.shape, NOISE), method="exact")
    # Both exact; 452 pixels of float64 each.
    np.testing.assert_allclose(flux, theirs["aperture_sum"], rtol=1e-9, atol=1e-9 * np.abs(flux).max())
    np.testing.assert_allclose(flux_err, theirs["aperture_sum_err"], rtol=1e-6)

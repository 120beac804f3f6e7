"""Adaptive moments beside GalSim's HSM, where that is installed."""

from __future__ import annotations

import numpy as np
import pytest
from shape_scenes import NOISE, flux_of_snr, psf_image, trail

from transforms.numerics.measurement import psf_moments

galsim = pytest.importorskip("galsim")


def hsm_moments(image: np.ndarray) -> tuple[float, float, float]:
    found = galsim.hsm.FindAdaptiveMom(galsim.Image(image))
    trace_part = found.moments_sigma**2 / np.sqrt(1.0 - found.observed_e1**2 - found.observed_e2**2)
    xx, yy = trace_part * (1.0 + found.observed_e1), trace_part * (1.0 - found.observed_e1)
    return xx, yy, trace_part * found.observed_e2


@pytest.mark.parametrize("moffat", [False, True])
@pytest.mark.parametrize("fwhm", [2.5, 4.0, 7.0])
def test_moments_of_psf_images_agree_with_hsm(fwhm: float, moffat: bool) -> None:
    image = psf_image(fwhm, moffat)
    # Both stop where a step changes the moments by less than about 1e-4 of their size; they come out within 2e-5.
    np.testing.assert_allclose(psf_moments(image), hsm_moments(image), rtol=1e-4, atol=1e-5 * fwhm**2)


@pytest.mark.parametrize(("dx", "dy"), [(4.0, 0.0), (3.0, 5.0), (-8.0, 4.0)])
def test_moments_of_elongated_sources_agree_with_hsm(dx: float, dy: float) -> None:
    image = trail((61, 61), 4.0, 30.0, 30.0, dx, dy)
    ours, theirs = psf_moments(image), hsm_moments(image)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * (theirs[0] + theirs[1]))


def test_moments_of_a_noisy_source_agree_with_hsm_within_what_a_free_centre_changes() -> None:
    rng = np.random.default_rng(3)
    drawn = trail((61, 61), 4.0, 30.0, 30.0, 3.0, 2.0)
    image = flux_of_snr(50.0, drawn, NOISE) * drawn + rng.normal(0.0, NOISE, drawn.shape)
    ours, theirs = psf_moments(image), hsm_moments(image)
    # The centre errs by 0.05 pixels a coordinate, whose square enters the moments; their own error is 6 %.
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02 * (theirs[0] + theirs[1]) / 2.0)

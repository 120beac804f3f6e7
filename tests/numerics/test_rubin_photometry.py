"""Our measurements on the difference cutouts of real LSST alerts, with the PSFs they carry, beside LSST's own.

`pytest -s` prints the table. What the packets hold, as these tests show:

- The PSF is the detector's average, LSST's fluxes used that of the place: a PSF too wide by a part e makes flux and
  error too large by e, and leaves their ratio.
- LSST multiplies psfFlux and psfFluxErr by an aperture correction, scienceFlux by none.
- So the ratio of the errors is both together, to be taken off; what is left is how the two codes measure.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import sep
from numpy.typing import NDArray
from rubin_cutouts import DATA, SETS, RubinSource, rubin_sources

from transforms.numerics.detection import Detections, find_peaks, gaussian_variances, significance_map
from transforms.numerics.forced_photometry import linear_psf_fit
from transforms.numerics.measurement import Measurements, measure_sources, psf_moments

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no rubin_alerts beside the project")
LSSTCAM = [name for name in SETS if name.startswith("LSSTCam")]
_PSF_REACH = 10  # half of our stamps' width, in which a PSF of sigma s has 1 - exp(-100 / s^2) of its sum(P^2)


@cache
def sources_of(name: str) -> list[RubinSource]:
    return rubin_sources(name)


@cache
def columns_of(name: str) -> dict[str, NDArray[np.float64]]:
    """Our measurements and LSST's, one row a source: ours, theirs, ratios."""
    rows = [compared(source) for source in sources_of(name)]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def compared(source: RubinSource) -> dict[str, float]:
    theirs, place = source.measured, ([source.x], [source.y])
    fit = linear_psf_fit(source.difference, source.variance, source.psf, *place)
    on_science = linear_psf_fit(source.science, source.science_variance, source.science_psf, *place)
    (whole,), (exact,) = (
        sep.sum_circle(np.ascontiguousarray(source.difference), *place, 12.0, subpix=subpix)[0] for subpix in (1, 0)
    )
    psf_xx, psf_yy, psf_xy = np.array(psf_moments(source.psf)) * source.pixel_arcsec2
    psf_trace = theirs["ixxPSF"] + theirs["iyyPSF"]
    return {
        "snr": theirs["psfFlux"] / theirs["psfFluxErr"],
        "detector": theirs["visit"] * 1000 + theirs["detector"],
        "flux": fit.flux[0] / theirs["psfFlux"],
        "error": fit.flux_err[0] / theirs["psfFluxErr"],
        "pull": fit.flux[0] / fit.flux_err[0] - theirs["psfFlux"] / theirs["psfFluxErr"],
        "science": on_science.flux[0] / theirs["scienceFlux"],
        "science error": on_science.flux_err[0] / theirs["scienceFluxErr"],
        "aperture of whole pixels": (whole - theirs["apFlux"]) / theirs["apFluxErr"],
        "aperture": (exact - theirs["apFlux"]) / theirs["apFluxErr"],
        "psf width": np.sqrt((psf_xx + psf_yy) / psf_trace),
        "psf ixx": (psf_xx - theirs["ixxPSF"]) / psf_trace,
        "psf ixy": (psf_xy - theirs["ixyPSF"]) / psf_trace,
        "psf sigma": np.sqrt(gaussian_variances(source.psf[np.newaxis])[0]),
        **found_again(source),
    }


def found_again(source: RubinSource) -> dict[str, float]:
    """What detection and measurement of the cutout alone make of the source; NaN where there is nothing in 3 pixels."""
    names = ("peak", "x", "y", "trace", "ixx", "ixy")
    bad = np.isnan(source.difference)
    snr_map, _ = significance_map(source.difference, source.variance, bad, source.psf)
    found = find_peaks(snr_map, bad, 4.0)
    distance = np.hypot(found.peak_x - source.x, found.peak_y - source.y)
    if not (distance < 3.0).any():
        return dict.fromkeys(names, np.nan)
    measured = measured_alone(source, found, int(np.argmin(distance)))
    theirs = source.measured
    spread = np.nan if theirs["ixx"] is None else theirs["ixx"] + theirs["iyy"]
    return dict(
        zip(
            names,
            (
                measured.snr[0] / abs(theirs["snr"]),
                (measured.x[0] - source.x) / (theirs["xErr"] or np.nan),
                (measured.y[0] - source.y) / (theirs["yErr"] or np.nan),
                (measured.ixx[0] + measured.iyy[0]) * source.pixel_arcsec2 / spread,
                (measured.ixx[0] * source.pixel_arcsec2 - (theirs["ixx"] or 0.0)) / spread,
                (measured.ixy[0] * source.pixel_arcsec2 - (theirs["ixy"] or 0.0)) / spread,
            ),
            strict=True,
        )
    )


def measured_alone(source: RubinSource, found: Detections, row: int) -> Measurements:
    columns = {name: column[row : row + 1] for name, column in found._asdict().items() if name != "n_rejected"}
    science = (source.science, source.science_variance)
    planes = (source.difference, source.variance, *science, *science, np.isnan(source.difference))
    return measure_sources(*planes, source.psf, found._replace(**columns), source.science_psf)


def spread_of(values: NDArray[np.float64]) -> tuple[float, float, int]:
    """Median, robust sigma and number of the values that are not NaN."""
    known = values[~np.isnan(values)]
    if known.size == 0:
        return np.nan, np.nan, 0
    middle = float(np.median(known))
    return middle, 1.4826 * float(np.median(np.abs(known - middle))), known.size


def joined(names: list[str]) -> dict[str, NDArray[np.float64]]:
    parts = [columns_of(name) for name in names]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def test_the_table() -> None:
    rows = (
        "flux", "error", "pull", "science", "science error", "aperture of whole pixels", "aperture", "peak", "x", "y",
        "psf width", "psf ixx", "psf ixy", "trace", "ixx", "ixy",
    )  # fmt: skip
    for group in (*([name] for name in SETS), LSSTCAM):
        columns = joined(group)
        print(f"\n{', '.join(group)}: {columns['snr'].size} sources, median (robust sigma) [number]")
        bright = np.abs(columns["snr"]) > 10.0
        for key in rows:
            texts = [f"{m:8.4f} ({s:.4f}) [{n}]" for m, s, n in map(spread_of, (columns[key], columns[key][bright]))]
            print(f"  {key:26s} {texts[0]:26s} S/N > 10: {texts[1]}")
        per_detector = [np.median(columns["error"][columns["detector"] == one]) for one in set(columns["detector"])]
        print(f"  aperture correction and PSF, by detector: {min(per_detector):.3f} to {max(per_detector):.3f}")
        assert spread_of(columns["flux"])[2] == columns["snr"].size


@pytest.mark.parametrize("name", SETS)
def test_psf_fluxes_in_units_of_their_errors_are_those_of_lsst(name: str) -> None:
    middle, sigma, n = spread_of(columns_of(name)["pull"])
    # The same pixels, so what differs is small beside the error: the PSF of the place is up to 3 % off the average in
    # width and shape, and a filter that is off by e differs by e sigma; LSST's stamps of 41 pixels reach beyond our 21,
    # where at the widest PSF, sigma 4 pixels, a part exp(-100 / 16) of sum(P^2) lies: 0.04 sigma.
    allowed = 0.1
    assert sigma < allowed
    assert abs(middle) < 4.0 * allowed / np.sqrt(n)


def test_psf_fluxes_of_lsstcam_are_within_two_percent_and_the_rest_is_the_aperture_correction() -> None:
    columns = joined(LSSTCAM)
    middle, _, n = spread_of(columns["flux"])
    assert abs(middle - 1.0) < 0.02
    # The error has no noise, so its ratio is the correction; a flux at S/N 5 is 0.1 sigma or 2 % off it by the pixels.
    left, sigma, _ = spread_of(columns["flux"] / columns["error"])
    assert sigma < 0.02
    assert abs(left - 1.0) < 4.0 * 0.02 / np.sqrt(n)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_positive_and_negative_fluxes_differ_from_lsst_s_by_the_same_part(sign: float) -> None:
    columns = joined(list(SETS))
    chosen = np.sign(columns["snr"]) == sign
    middle, _, n = spread_of((columns["flux"] / columns["error"])[chosen])
    # Weights of one over the variance plane, which holds the noise of the pixels, make these 0.97 and 1.03.
    assert abs(middle - 1.0) < 4.0 * 0.02 / np.sqrt(n)


@pytest.mark.parametrize("name", SETS)
def test_forced_fluxes_on_the_science_image_are_those_of_lsst(name: str) -> None:
    columns = columns_of(name)
    # No aperture correction. Hosts fill the stamp: how far it reaches changes single fluxes by up to 20 %, both ways.
    assert abs(spread_of(columns["science"])[0] - 1.0) < 0.01
    assert abs(spread_of(columns["science error"])[0] - 1.0) < 0.005


@pytest.mark.parametrize("name", SETS)
def test_aperture_fluxes_are_those_of_lsst_but_for_the_fractions_of_pixels_on_the_circle(name: str) -> None:
    columns = columns_of(name)
    # LSST sums pixels whose centres lie inside; at most one rounding of float32 in each of 452 pixels.
    assert abs(spread_of(columns["aperture of whole pixels"])[0]) < 0.01
    # We take the part inside. 8 r = 96 pixels lie on the circle, each off by 1/12 of its variance in the mean, of the
    # pi r^2 = 452 that make the error: 0.13 sigma, half as much again for few sources.
    middle, sigma, n = spread_of(columns["aperture"])
    assert sigma < 0.2
    assert abs(middle) < 4.0 * 0.13 / np.sqrt(n)


def test_adaptive_moments_are_those_of_lsst_along_the_axes_of_the_detector() -> None:
    columns = joined(list(SETS))
    bright = np.abs(columns["snr"]) > 10.0
    # Both stop at about 1e-4 of the size; our centre is that of a PSF fit, theirs is free: 1 / snr of the size off, its
    # square in the moments. Axes of the sky, which lie anywhere, would be tenths off.
    middle, _, n = spread_of(columns["trace"][bright])
    assert n >= 12
    assert abs(middle - 1.0) < 0.005
    for key in ("ixx", "ixy"):
        middle, sigma, _ = spread_of(columns[key][bright])
        assert abs(middle) < 0.005
        assert sigma < 0.01


@pytest.mark.parametrize("name", SETS)
def test_moments_of_the_psf_are_those_of_lsst_but_for_the_place(name: str) -> None:
    columns = columns_of(name)
    assert abs(spread_of(columns["psf width"])[0] - 1.0) < 0.01
    for key in ("psf ixx", "psf ixy"):
        middle, sigma, n = spread_of(columns[key])
        assert sigma < 0.03  # how much the PSF of the place differs from the detector's average
        assert abs(middle) < 4.0 * 0.03 / np.sqrt(n)


def test_positions_are_those_of_lsst_within_the_part_of_the_error_that_the_methods_share_not() -> None:
    columns = joined(list(SETS))
    for key in ("x", "y"):
        middle, sigma, n = spread_of(columns[key])
        assert sigma < 0.5
        assert abs(middle) < 4.0 * 0.5 / np.sqrt(n)

"""Measurement of diaSources: what each step costs beside other libraries; dipoles and trails, how well and how fast.

Every field is drawn from analytic profiles on white noise, detected and measured by our own chain (`find_peaks`,
`measure_sources`), then given to `measure_shapes`. The peer solves the same models for some of the sources with
`scipy.optimize.least_squares` and numerical derivatives, as LSST's plugins do through lmfit and scipy; it starts at
the truth. Times are CPU microseconds a source, best of three.

    python tests/benchmarks/bench_detection.py --fwhm 4

Tables
  costs     2,025 points on 2048^2 pixels with 256 PSFs: CPU s of each step, microseconds a source of each measurement
            beside sep, photutils and GalSim where they are installed
  mix       2,000 sources: 93 % points, 5 % dipoles, 2 % trails: CPU s of each step
  dipoles   by separation and S/N of one lobe on the difference (were it alone): detected, classified, `lobes` the
            median S/N of what is left of them in the difference; errors in units of the claimed ones
  singles   variables on stars of 0, 1, 10 and 100 times their change, under a registration error in pixels: part
            classified as dipole. At 100 times and 0.1 pixels the lobes of the error outshine the change: a dipole
  trails    of S/N under an optimal filter: part fitted, median errors of length and angle over the Cramer-Rao bound,
            width of the pulls, mean flux ratio with its standard error
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "numerics"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measurement_costs import costs, timed
from shape_scenes import NOISE, flux_of_snr, profile, psf_image, trail

from transforms.numerics.detection import Detections, find_peaks, lobe_distance, significance_map
from transforms.numerics.measurement import Measurements, measure_sources
from transforms.numerics.source_shapes import Shapes, measure_shapes

PEERS = 5


class Field(NamedTuple):
    """Science, template, and rows (x, y, flux, dx, dy) of the truth: a trail's or a dipole's vector."""

    science: NDArray[np.float64]
    template: NDArray[np.float64]
    truth: NDArray[np.float64]


class Found(NamedTuple):
    """What our chain made of a field, and CPU seconds of its steps."""

    detections: Detections
    measured: Measurements
    shapes: Shapes
    measure_s: float
    shapes_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fwhm", type=float, default=4.0, help="of the Moffat PSF, pixels")
    parser.add_argument("--side", type=int, default=10, help="sources along each side of a field")
    parser.add_argument("--costs-only", action="store_true", help="the first table alone")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, {arguments}")
    look(draw_field("point", arguments.fwhm, 2, 50.0, 0.0, 0), arguments.fwhm)  # compiles
    for table in (costs,) if arguments.costs_only else (costs, mix, dipoles, singles, trails):
        print()
        table(arguments.fwhm, arguments.side, arguments.seed)


def draw_field(kind: str, fwhm: float, n_side: int, snr: float, size: float, seed: int) -> Field:
    """One source of the kind in each cell; `size` is a separation, a length, or a registration error."""
    rng = np.random.default_rng(seed)
    side = int(10 * fwhm + (size if kind == "trail" else 0.0)) + 8
    science, template = rng.normal(0.0, NOISE, (2, n_side * side, n_side * side))
    truth = []
    for number in range(n_side * n_side):
        row, column = divmod(number, n_side)
        cell = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
        x, y = side / 2.0 + rng.uniform(-0.5, 0.5, 2)
        angle = rng.uniform(-0.5, 0.5) * np.pi
        dx, dy = size * np.cos(angle), size * np.sin(angle)
        line = (dx, dy) if kind == "trail" else (0.0, 0.0)
        drawn = trail((side, side), fwhm, x, y, *line, moffat=True)
        flux = flux_of_snr(snr, drawn, np.sqrt(2.0) * NOISE)
        if kind == "dipole":
            drawn = trail((side, side), fwhm, x + 0.5 * dx, y + 0.5 * dy, 0.0, 0.0, moffat=True)
            template[cell] += flux * trail((side, side), fwhm, x - 0.5 * dx, y - 0.5 * dy, 0.0, 0.0, moffat=True)
        if kind == "variable":
            steady = flux * rng.choice([0.0, 1.0, 10.0, 100.0])
            science[cell] += steady * drawn
            template[cell] += steady * trail((side, side), fwhm, x + dx, y + dy, 0.0, 0.0, moffat=True)
        science[cell] += flux * drawn
        truth.append((x + cell[1].start, y + cell[0].start, flux, dx, dy))
    return Field(science, template, np.array(truth).T)


def look(field: Field, fwhm: float) -> Found:
    science, template = field.science.astype(np.float32), field.template.astype(np.float32)
    variance = np.full(science.shape, NOISE**2, np.float32)
    difference, unmasked, psf = science - template, np.zeros(science.shape, bool), psf_image(fwhm, moffat=True)
    planes: dict[str, Any] = {
        "difference": difference,
        "variance": 2.0 * variance,
        "science": science,
        "science_variance": variance,
        "matched_template": template,
        "template_variance": variance,
        "bad": unmasked,
    }
    snr_map, _ = significance_map(difference, 2.0 * variance, unmasked, psf)
    found = find_peaks(snr_map, unmasked, 5.0, lobe_distance(psf))
    measure_s, measured = timed(lambda: measure_sources(**planes, psf=psf, detections=found))
    shapes_s, shapes = timed(
        lambda: measure_shapes(**planes, psf=psf, science_psf=psf, detections=found, measured=measured)
    )
    return Found(found, measured, shapes, measure_s, shapes_s)


def mix(fwhm: float, side: int, seed: int) -> None:
    parts = [("point", 31, 30.0, 0.0), ("point", 30, 10.0, 0.0), ("dipole", 10, 60.0, 1.5), ("trail", 6, 30.0, 20.0)]
    print(f"{'mix':10s} {'sources':>8s} {'measure_sources':>16s} {'measure_shapes':>15s}  (CPU s)")
    total = np.zeros(3)
    for kind, n_side, snr, size in parts:
        found = look(draw_field(kind, fwhm, n_side, snr, size, seed), fwhm)
        row = np.array([found.measured.x.size, found.measure_s, found.shapes_s])
        total += row
        print(f"{kind:10s} {row[0]:8.0f} {row[1]:16.3f} {row[2]:15.4f}")
    print(f"{'all':10s} {total[0]:8.0f} {total[1]:16.3f} {total[2]:15.4f}")


def dipoles(fwhm: float, side: int, seed: int) -> None:
    print("dipoles  separation  S/N  detected  classified  lobes  pull mean flux  pull length     us  scipy us")
    for separation in (0.3, 0.5, 1.0, 2.0, 3.0):
        for snr in (20.0, 50.0, 200.0):
            field = draw_field("dipole", fwhm, side, snr, separation, seed)
            found = look(field, fwhm)
            fits = found.shapes.dipoles
            near = nearest(field, found, fwhm)
            detected = np.unique(near[near >= 0]).size / field.truth.shape[1]
            row = fits.is_dipole & (near >= 0)
            classified = np.unique(near[row]).size / field.truth.shape[1]
            if not row.any():
                print(f"{separation:19.1f} {snr:4.0f} {detected:9.2f} {classified:11.2f}")
                continue
            length = np.hypot(fits.x_positive - fits.x_negative, fits.y_positive - fits.y_negative)
            pull_flux = ((fits.mean_flux - field.truth[2, near]) / fits.mean_flux_err)[row].std()
            pull_length = ((length - separation) / fits.separation_err)[row].std()
            cost = 1e6 * found.shapes_s / found.measured.x.size
            peer = peer_microseconds(field, fwhm, dipole_residuals) if snr == 50.0 else np.nan
            print(
                f"{separation:19.1f} {snr:4.0f} {detected:9.2f} {classified:11.2f} {np.median(fits.snr[row]):6.1f} "
                f"{pull_flux:15.2f} {pull_length:12.2f} {cost:6.0f} {peer:9.0f}"
            )


def singles(fwhm: float, side: int, seed: int) -> None:
    print("singles  registration error  S/N  sources  dipole tried  classified  trail tried")
    for error in (0.0, 0.03, 0.1):
        for snr in (8.0, 20.0, 100.0):
            found = look(draw_field("variable", fwhm, 2 * side, snr, error, seed), fwhm)
            shapes = found.shapes
            print(
                f"{error:27.2f} {snr:4.0f} {found.measured.x.size:8d} {shapes.dipole_attempted.mean():13.4f} "
                f"{shapes.dipoles.is_dipole.mean():11.4f} {shapes.trail_attempted.mean():12.4f}"
            )


def trails(fwhm: float, side: int, seed: int) -> None:
    print("trails   length  S/N  fitted  length/CRB  angle/CRB  pull length  pull flux  flux ratio        us  scipy us")
    for length in (5.0, 8.0, 15.0, 30.0, 60.0):
        for snr in (20.0, 30.0, 60.0):
            field = draw_field("trail", fwhm, side, snr, length, seed)
            found = look(field, fwhm)
            fits, near = found.shapes.trails, nearest(field, found, fwhm + 0.5 * length)
            row = fits.good & (near >= 0)
            fitted = np.unique(near[row]).size / field.truth.shape[1]
            if not row.any():
                print(f"{length:15.0f} {snr:4.0f} {fitted:7.2f}")
                continue
            _, _, flux, dx, dy = field.truth[:, near[row]]
            found_length = np.hypot(fits.dx, fits.dy)[row]
            cosine, sine = fits.dx[row] / found_length, fits.dy[row] / found_length
            claimed = np.sqrt(
                (cosine * fits.dx_err[row]) ** 2
                + (sine * fits.dy_err[row]) ** 2
                + 2.0 * cosine * sine * fits.dx_dy_cov[row]
            )
            turned = (np.arctan2(fits.dy, fits.dx)[row] - np.arctan2(dy, dx) + 0.5 * np.pi) % np.pi - 0.5 * np.pi
            bounds = np.mean([bound(truth, fwhm) for truth in field.truth.T[: 4 * PEERS]], axis=0)
            ratio = fits.flux[row] / flux
            peer = peer_microseconds(field, fwhm, trail_residuals) if snr == 30.0 else np.nan
            print(
                f"{length:15.0f} {snr:4.0f} {fitted:7.2f} {robust(found_length - length) / bounds[0]:11.2f} "
                f"{robust(turned) / bounds[1]:10.2f} {robust((found_length - length) / claimed):12.2f} "
                f"{robust((fits.flux[row] - flux) / fits.flux_err[row]):10.2f} "
                f"{ratio.mean():7.3f}+-{ratio.std() / np.sqrt(ratio.size):.3f} "
                f"{1e6 * found.shapes_s / found.measured.x.size:9.0f} {peer:9.0f}"
            )


def robust(errors: NDArray[np.float64]) -> float:
    return float(1.4826 * np.median(np.abs(errors)))


def nearest(field: Field, found: Found, reach: float) -> NDArray[np.int64]:
    """Row of the truth each source belongs to, -1 where none lies within reach."""
    distance, row = cKDTree(field.truth[:2].T).query(np.stack([found.measured.x, found.measured.y], axis=-1))
    return np.where(distance < reach, row, -1)


def bound(truth: NDArray[np.float64], fwhm: float) -> tuple[float, float]:
    """Cramer-Rao bounds of a trail's length and angle, by finite differences of the scene."""
    flux, line = truth[2], truth[[0, 1, 3, 4]].copy()
    side = int(10 * fwhm + np.hypot(line[2], line[3])) + 8
    line[:2] = side / 2.0 + line[:2] % 1.0
    slopes = [trail((side, side), fwhm, *line, moffat=True)]
    for k in range(4):
        shift = 1e-3 * (np.arange(4) == k)
        up, down = (trail((side, side), fwhm, *(line + sign * shift), moffat=True) for sign in (1.0, -1.0))
        slopes.append(flux * (up - down) / 2e-3)
    jacobian = np.stack([slope.ravel() for slope in slopes])
    covariance = np.linalg.inv(jacobian @ jacobian.T / (2.0 * NOISE**2))[3:, 3:]
    length = np.hypot(line[2], line[3])
    along, across = line[2:] / length, np.array([-line[3], line[2]]) / length
    return np.sqrt(along @ covariance @ along), np.sqrt(across @ covariance @ across) / length


def peer_microseconds(
    field: Field, fwhm: float, residuals: Callable[[Field, NDArray[np.float64], float], tuple[Any, NDArray]]
) -> float:
    """CPU time a source of scipy's solver on the same model, from the truth."""
    started = time.process_time()
    for truth in field.truth.T[:PEERS]:
        function, start = residuals(field, truth, fwhm)
        least_squares(function, start, x_scale=np.abs(start) + 1.0, ftol=1e-6, xtol=1e-6)
    return 1e6 * (time.process_time() - started) / PEERS


def window(field: Field, truth: NDArray[np.float64], half_width: int) -> tuple[slice, slice, float, float]:
    """Slices around a source and its position in them."""
    x0, y0 = int(truth[0]) - half_width, int(truth[1]) - half_width
    return (
        slice(y0, y0 + 2 * half_width + 1),
        slice(x0, x0 + 2 * half_width + 1),
        truth[0] - x0,
        truth[1] - y0,
    )


def dipole_residuals(field: Field, truth: NDArray[np.float64], fwhm: float) -> tuple[Any, NDArray[np.float64]]:
    rows, columns, x, y = window(field, truth, 10)
    science, template = field.science[rows, columns] / NOISE, field.template[rows, columns] / NOISE
    v, u = np.mgrid[:21, :21]

    def function(p: NDArray[np.float64]) -> NDArray[np.float64]:
        positive = p[0] * profile(fwhm, u - p[1], v - p[2], moffat=True) / NOISE
        negative = p[3] * profile(fwhm, u - p[4], v - p[5], moffat=True) / NOISE
        on_science, on_template = science - positive - p[6], template - negative - p[7]
        return np.concatenate(
            [
                ((on_science - on_template + p[6] - p[7]) / np.sqrt(2.0)).ravel(),
                (on_science / np.sqrt(2.0)).ravel(),
                (on_template / np.sqrt(2.0)).ravel(),
            ]
        )

    dx, dy = 0.5 * truth[3], 0.5 * truth[4]
    return function, np.array([truth[2], x + dx, y + dy, truth[2], x - dx, y - dy, 0.0, 0.0])


def trail_residuals(field: Field, truth: NDArray[np.float64], fwhm: float) -> tuple[Any, NDArray[np.float64]]:
    half_width = 8 + int(0.5 * np.hypot(truth[3], truth[4]))
    rows, columns, x, y = window(field, truth, half_width)
    data = (field.science[rows, columns] - field.template[rows, columns]) / (np.sqrt(2.0) * NOISE)

    def function(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return (data - p[0] * trail(data.shape, fwhm, *p[1:], moffat=True) / (np.sqrt(2.0) * NOISE)).ravel()

    return function, np.array([truth[2], x, y, truth[3], truth[4]])


if __name__ == "__main__":
    main()

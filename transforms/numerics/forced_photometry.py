"""Linear PSF fluxes at given positions: the one definition of a PSF flux in the whole chain.

`linear_psf_fit` gives flux, error, chi-square and what was usable; `forced_psf_flux` is the short form for
forced photometry on windows of stored images. Measurement of new sources calls the same code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from transforms.numerics.psf_grid import PsfGrid, as_psf_grid

STAMP_HALF_WIDTH_MAX_PIX = 10  # 21 x 21 pixels hold > 99.8 % of sum(P^2) up to a FWHM of 10 pixels
GOOD_WEIGHT_MIN = 0.5  # a flux needs this fraction of the PSF's effective weight sum(P^2) on usable pixels
_SPLINE_DEGREE = 5  # a quintic is within 0.13 % at a FWHM of 2.1 pixels, a cubic ten times worse
_SPLINE_POLES = (
    math.sqrt(67.5 - math.sqrt(4436.25)) + math.sqrt(26.25) - 6.5,
    math.sqrt(67.5 + math.sqrt(4436.25)) - math.sqrt(26.25) - 6.5,
)
_SPLINE_MARGIN_PIX = 10  # zero border: room for shifts up to 6 pixels and the decay of the spline's prefilter
_POSITION_LIMIT_PIX = 1e9  # beyond it a float position has no meaning as a pixel


class PsfSplines(NamedTuple):
    """The PSFs of n sources prepared for evaluation between pixels.

    Attributes
    ----------
    coefficients : (n_images, m, m) float64, quintic B-spline coefficients of the zero-padded PSF images, m odd
    half_width : stamps around a source have 2 * half_width + 1 pixels a side
    of_source : (n,) int64, which of the images is that of each source
    """

    coefficients: NDArray[np.float64]
    half_width: int
    of_source: NDArray[np.int64]


class LinearPsfFit(NamedTuple):
    """Linear PSF fits of n sources; every array has shape (n,).

    Attributes
    ----------
    flux, flux_err : image units; NaN where `good` is false
    chi2 : sum over usable pixels of (data - flux P)^2 / variance; NaN where `good` is false
    ln_likelihood : -(chi2 + sum ln(2 pi variance)) / 2; NaN where `good` is false
    n_pixels : int32, usable pixels in the stamp
    good_weight : sum(P^2) over usable pixels divided by sum(P^2) over the stamp, in [0, 1]
    edge : the stamp crosses the border of the image (true for positions that are not finite)
    good : the flux is finite and good_weight >= GOOD_WEIGHT_MIN
    """

    flux: NDArray[np.float64]
    flux_err: NDArray[np.float64]
    chi2: NDArray[np.float64]
    ln_likelihood: NDArray[np.float64]
    n_pixels: NDArray[np.int32]
    good_weight: NDArray[np.float64]
    edge: NDArray[np.bool_]
    good: NDArray[np.bool_]


def psf_splines(psf: ArrayLike | PsfGrid, x: ArrayLike, y: ArrayLike) -> PsfSplines:
    """Prepare the PSFs at the places of sources for evaluation between pixels by quintic B-splines.

    A spline passes through the pixels of its image and is zero beyond the border. O(k^2) for each cell that holds a
    source, 30 us for k = 41.

    Parameters
    ----------
    psf : (k, k) array, k odd, sum 1, or a grid of such
    x, y : (n,) pixels, 0-based; anything finite or not

    Raises
    ------
    PsfError
        As `as_psf_grid`.
    """
    grid = as_psf_grid(psf)
    cells, of_source = np.unique(grid.cells_at(x, y), return_inverse=True)
    half_width = min(grid.images.shape[2] // 2, STAMP_HALF_WIDTH_MAX_PIX)
    return PsfSplines(spline_coefficients(grid.of_cells[cells]), half_width, of_source.astype(np.int64))


def spline_coefficients(images: NDArray[np.floating]) -> NDArray[np.float64]:
    """Quintic B-spline coefficients (m, k + 20, k + 20) of PSF images (m, k, k), zero beyond their borders."""
    n_images, side, margin = len(images), images.shape[1], _SPLINE_MARGIN_PIX
    coefficients = np.zeros((n_images, side + 2 * margin, side + 2 * margin))
    coefficients[:, margin : margin + side, margin : margin + side] = images
    _prefilter(coefficients)
    return coefficients


def linear_psf_fit(
    image: ArrayLike,
    variance: ArrayLike,
    psf: ArrayLike | PsfGrid | PsfSplines,
    x: ArrayLike,
    y: ArrayLike,
    bad: NDArray[np.bool_] | None = None,
) -> LinearPsfFit:
    """Fit the flux of a PSF at fixed positions, all sources in one compiled loop.

    flux = sum(P D) / sum(P^2), flux_err = sqrt(sum(P^2 V)) / sum(P^2), the sums over the usable pixels of a stamp of
    at most 21 x 21 pixels around the pixel nearest to (x, y); P is the PSF at the sub-pixel position. A pixel is
    usable when it is inside the image, its value is finite, its variance finite and positive, and it is not `bad`.

    All pixels weigh the same, as LSST has it: a variance that was counted from the pixels themselves, weighting them,
    takes 0.2 sigma from every positive flux and adds it to every negative one, and where a PSF is not quite right, the
    error it makes would change with the brightness. In white noise nothing is lost; where the photons of the source
    itself are all the noise, the error is 15 % above the least possible one.

    Parameters
    ----------
    image : (ny, nx), used as float32; free of background
    variance : (ny, nx), used as float32, image units squared; anything but a positive finite number masks the pixel
    psf : (k, k) odd image summing to 1, a grid of such, or the prepared `PsfSplines` of these sources
    x, y : (n,) pixels, 0-based; may lie outside the image or be NaN (then no flux)
    bad : (ny, nx) bool, optional, further pixels to leave out

    Returns
    -------
    LinearPsfFit

    Raises
    ------
    PsfError
        As `as_psf_grid`.
    ValueError
        Shapes of image, variance and bad, or of x and y, differ.

    Notes
    -----
    The error assumes independent pixels. A window cut out of an image, with x and y reduced by the window's
    integer origin, gives the same bytes as the whole image (tested). About 9 us per source.
    """
    pixels, pixel_variance, masked = checked_planes(image, variance, bad)
    x_pix, y_pix = _checked_positions(x, y)
    planes = (pixels[np.newaxis], pixel_variance[np.newaxis], masked[np.newaxis])
    return _fits(planes, np.zeros(x_pix.size, dtype=np.int64), psf, x_pix, y_pix)


def _fits(
    planes: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]],
    image_of: NDArray[np.int64],
    psf: ArrayLike | PsfGrid | PsfSplines,
    x_pix: NDArray[np.float64],
    y_pix: NDArray[np.float64],
) -> LinearPsfFit:
    splines = psf if isinstance(psf, PsfSplines) else psf_splines(psf, x_pix, y_pix)
    n_sources = x_pix.size
    real = np.full((5, n_sources), np.nan)
    n_pixels = np.zeros(n_sources, dtype=np.int32)
    edge = np.ones(n_sources, dtype=np.bool_)
    _fit_fluxes(*planes, image_of, *splines, x_pix, y_pix, real, n_pixels, edge)
    return LinearPsfFit(real[0], real[1], real[2], real[3], n_pixels, real[4], edge, np.isfinite(real[0]))


def forced_psf_flux(
    image: ArrayLike, variance: ArrayLike, psf: ArrayLike | PsfSplines, x: ArrayLike, y: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Measure PSF fluxes at known positions, on one image or each on a window of its own.

    The method, its limits and errors are those of `linear_psf_fit`.

    Parameters
    ----------
    image, variance : (ny, nx), or (n, ny, nx) windows; masks arrive as a variance that is not a positive finite number
    psf : (k, k) odd image summing to 1, or the prepared `PsfSplines` of these sources: cells of a grid count from the
        first pixel of the whole image, so windows need their own choice
    x, y : (n,) pixels, 0-based; for windows: position minus the window's integer origin

    Returns
    -------
    flux, flux_err : (n,) float64, image units, NaN where not good
    good : (n,) bool, at least half of the PSF's effective weight sum(P^2) lies on usable pixels
    """
    if np.ndim(image) != 3:
        fit = linear_psf_fit(image, variance, psf, x, y)
    else:
        x_pix, y_pix = _checked_positions(x, y)
        planes = checked_planes(image, variance, None, n_images=x_pix.size)
        fit = _fits(planes, np.arange(x_pix.size), psf, x_pix, y_pix)
    return fit.flux, fit.flux_err, fit.good


def checked_planes(
    image: ArrayLike, variance: ArrayLike, bad: NDArray[np.bool_] | None, n_images: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Return the three planes in the layout the compiled loops take, after comparing their shapes.

    Raises
    ------
    ValueError
        The planes are not images of one shape, or not `n_images` of one shape each.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a value beyond float32 becomes inf, which masks the pixel
        pixels = np.ascontiguousarray(image, dtype=np.float32)
        pixel_variance = np.ascontiguousarray(variance, dtype=np.float32)
    masked = np.zeros(pixels.shape, np.bool_) if bad is None else np.ascontiguousarray(bad, dtype=np.bool_)
    shape = pixels.shape if n_images is None else (n_images, *pixels.shape[1:])
    n_axes = 2 if n_images is None else 3
    if pixels.ndim != n_axes or not shape == pixels.shape == pixel_variance.shape == masked.shape:
        count = "images" if n_images is None else f"{n_images} images"
        raise ValueError(
            f"image, variance and bad must be {count} of one shape, got "
            f"{pixels.shape}, {pixel_variance.shape} and {masked.shape}"
        )
    return pixels, pixel_variance, masked


def _checked_positions(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x_pix = np.ascontiguousarray(x, dtype=np.float64)
    y_pix = np.ascontiguousarray(y, dtype=np.float64)
    if x_pix.ndim != 1 or x_pix.shape != y_pix.shape:
        raise ValueError(f"'x' and 'y' must be one-dimensional and of one length, got {x_pix.shape} and {y_pix.shape}")
    return x_pix, y_pix


@njit(cache=True)
def _prefilter(coefficients: NDArray[np.float64]) -> None:
    """Turn (m, w, w) samples, zero beyond their borders, into quintic B-spline coefficients, in place.

    Each pole z takes a causal and an anti-causal recursion along either axis (Unser, Aldroubi, Eden 1993); both run
    along the first axis, all columns at once, on the image and on the image turned.
    """
    for image in range(len(coefficients)):
        plane = coefficients[image]
        for z in _SPLINE_POLES:
            gain = (1.0 - z) * (1.0 - 1.0 / z)
            _recur_along_columns(plane, z)
            turned = plane.T.copy()
            _recur_along_columns(turned, z)
            plane[:] = turned.T * (gain * gain)


@njit(cache=True)
def _recur_along_columns(plane: NDArray[np.float64], z: float) -> None:
    side = len(plane)
    for j in range(1, side):
        for i in range(side):
            plane[j, i] += z * plane[j - 1, i]
    for i in range(side):
        plane[side - 1, i] *= -z / (1.0 - z * z)
    for j in range(side - 2, -1, -1):
        for i in range(side):
            plane[j, i] = z * (plane[j + 1, i] - plane[j, i])


@njit(cache=True)
def pixel_weight(value: float, variance: float, bad: bool) -> float:
    """Inverse variance of a usable pixel, 0 for any other (every comparison with NaN is false)."""
    if bad or not (0.0 < variance < np.inf) or not (-np.inf < value < np.inf):
        return 0.0
    return 1.0 / np.float64(variance)


@njit(cache=True)
def _spline_taps(t: float, taps: NDArray[np.float64], slopes: NDArray[np.float64]) -> None:
    """Weights of the B-spline coefficients around a point, and their derivatives, by the recursion over degrees."""
    taps[:] = 0.0
    taps[0] = 1.0
    for degree in range(1, _SPLINE_DEGREE + 1):
        for k in range(degree, -1, -1):
            below = taps[k - 1] if k > 0 else 0.0
            if degree == _SPLINE_DEGREE:
                slopes[k] = below - taps[k]
            taps[k] = ((t + degree - k) * below + (k + 1 - t) * taps[k]) / degree


@njit(cache=True)
def evaluate_psf(
    coefficients: NDArray[np.float64],
    half_width: int,
    dx: float,
    dy: float,
    model: NDArray[np.float64],
    slope_x: NDArray[np.float64] | None,
    slope_y: NDArray[np.float64] | None,
) -> None:
    """Fill a stamp with the PSF centred (dx, dy) off the stamp's central pixel, and its slopes d/d(dx), d/d(dy).

    Without slopes it takes half the time.

    All three stamps are (2 half_width + 1) pixels a side; |dx|, |dy| <= 6.
    """
    width = 2 * half_width + 1
    n_taps = _SPLINE_DEGREE + 1
    taps_x, slopes_x = np.empty(n_taps), np.empty(n_taps)
    taps_y, slopes_y = np.empty(n_taps), np.empty(n_taps)
    whole_x, whole_y = math.floor(-dx), math.floor(-dy)
    _spline_taps(-dx - whole_x, taps_x, slopes_x)
    _spline_taps(-dy - whole_y, taps_y, slopes_y)
    first = coefficients.shape[0] // 2 - half_width - _SPLINE_DEGREE // 2
    first_x, first_y = first + whole_x, first + whole_y
    rows = np.empty((width + _SPLINE_DEGREE, width))
    for j in range(width + _SPLINE_DEGREE):
        for i in range(width):
            value = 0.0
            for k in range(n_taps):
                value += taps_x[k] * coefficients[first_y + j, first_x + i + k]
            rows[j, i] = value
    for j in range(width):
        for i in range(width):
            value = 0.0
            for k in range(n_taps):
                value += taps_y[k] * rows[j + k, i]
            model[j, i] = value
    if slope_x is None or slope_y is None:
        return
    row_slopes = np.empty((width + _SPLINE_DEGREE, width))
    for j in range(width + _SPLINE_DEGREE):
        for i in range(width):
            slope = 0.0
            for k in range(n_taps):
                slope += slopes_x[k] * coefficients[first_y + j, first_x + i + k]
            row_slopes[j, i] = slope
    for j in range(width):
        for i in range(width):
            along_x, along_y = 0.0, 0.0
            for k in range(n_taps):
                along_x += taps_y[k] * row_slopes[j + k, i]
                along_y += slopes_y[k] * rows[j + k, i]
            slope_x[j, i] = -along_x
            slope_y[j, i] = -along_y


@njit(cache=True)
def _fit_fluxes(
    images: NDArray[np.float32],
    variances: NDArray[np.float32],
    bad_planes: NDArray[np.bool_],
    image_of: NDArray[np.int64],
    coefficients: NDArray[np.float64],
    half_width: int,
    of_source: NDArray[np.int64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    real: NDArray[np.float64],
    n_pixels: NDArray[np.int32],
    edge: NDArray[np.bool_],
) -> None:
    """Fill `real` (flux, error, chi2, ln likelihood, good weight), `n_pixels` and `edge` for each source."""
    _, ny, nx = images.shape
    width = 2 * half_width + 1
    model = np.empty((width, width))
    for source in range(x.size):
        real[4, source] = 0.0
        k = image_of[source]
        image, variance, bad = images[k], variances[k], bad_planes[k]
        if not (abs(x[source]) < _POSITION_LIMIT_PIX and abs(y[source]) < _POSITION_LIMIT_PIX):
            continue
        centre_x, centre_y = math.floor(x[source] + 0.5), math.floor(y[source] + 0.5)
        x0, y0 = centre_x - half_width, centre_y - half_width
        edge[source] = x0 < 0 or y0 < 0 or x0 + width > nx or y0 + width > ny
        j0, j1 = max(0, -y0), min(width, ny - y0)
        i0, i1 = max(0, -x0), min(width, nx - x0)
        if j0 >= j1 or i0 >= i1:
            continue
        dx, dy = x[source] - centre_x, y[source] - centre_y
        evaluate_psf(coefficients[of_source[source]], half_width, dx, dy, model, None, None)
        energy_all = (model * model).sum()
        signal, noise, energy = 0.0, 0.0, 0.0
        for j in range(j0, j1):
            for i in range(i0, i1):
                value = np.float64(image[y0 + j, x0 + i])
                weight = pixel_weight(value, variance[y0 + j, x0 + i], bad[y0 + j, x0 + i])
                if weight > 0.0:
                    p = model[j, i]
                    signal += p * value
                    noise += p * p / weight
                    energy += p * p
                    n_pixels[source] += 1
        real[4, source] = energy / energy_all
        if not (energy >= GOOD_WEIGHT_MIN * energy_all and noise > 0.0):
            continue
        flux = signal / energy
        chi2, ln_norm = 0.0, 0.0
        for j in range(j0, j1):
            for i in range(i0, i1):
                value = np.float64(image[y0 + j, x0 + i])
                weight = pixel_weight(value, variance[y0 + j, x0 + i], bad[y0 + j, x0 + i])
                if weight > 0.0:
                    residual = value - flux * model[j, i]
                    chi2 += residual * residual * weight
                    ln_norm += math.log(2.0 * math.pi / weight)
        real[0, source] = flux
        real[1, source] = math.sqrt(noise) / energy
        real[2, source] = chi2
        real[3, source] = -0.5 * (chi2 + ln_norm)

"""Sources of an image as groups of significant pixels, split at the saddles between them.

Pixels above the threshold are taken from bright to faint. One without a taken neighbour begins a source, any other
joins that of its brightest taken neighbour. Where two sources meet, the fainter stays one of its own if what it has
above the saddle is significant and not too small a part of the other; else it joins that (persistence). Cost: one pass
over the image, and what the few significant pixels need.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from transforms.numerics.union_find import root

_RADIUS_STEP_PIX = 0.05
_SUBPIXELS = 3


@dataclass(frozen=True, eq=False)
class ExtractedSources:
    """Arrays of shape (n,), by flux from bright to faint.

    Attributes
    ----------
    x, y : float64, flux-weighted mean position, pixels, 0-based
    flux : float64, sum of the source's pixels
    n_pix : int64, number of them
    major, minor : float64, root mean square extent along the axes, pixels
    at_edge : bool, a pixel of it lies at the image's edge
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    n_pix: NDArray[np.int64]
    major: NDArray[np.float64]
    minor: NDArray[np.float64]
    at_edge: NDArray[np.bool_]


def extract_sources(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    threshold: float = 3.0,
    min_pix: int = 5,
    contrast: float = 0.001,
    saddle_snr: float = 5.0,
) -> ExtractedSources:
    """Find groups of at least `min_pix` connected pixels above a threshold, and split them.

    Parameters
    ----------
    image : (ny, nx) float32, background subtracted
    variance : (ny, nx) float32, square of the image's unit, > 0 where not `bad`
    bad : (ny, nx) bool, pixels that belong to no source
    threshold : in standard deviations of a pixel, > 0
    min_pix : least number of pixels of a source, and of what it has above a saddle
    contrast : least part of the brighter neighbour's flux that a source has above the saddle, 0 to 1
    saddle_snr : least significance of what a source has above the saddle

    Returns
    -------
    ExtractedSources

    Notes
    -----
    Three standard deviations in five connected pixels are not reached by white noise: of 4096^2 pixels 2e4 are above,
    with a chance of some (8 x 1.4e-3)^4 = 1e-8 each to have such neighbours.
    """
    places, values, sigmas = _significant_pixels(image, variance, bad, threshold * threshold)
    brightest_first = np.argsort(-values, kind="stable")
    source = _flooded(places, values, sigmas, brightest_first, image.shape[1], min_pix, contrast, saddle_snr)
    n_sources = int(source.max(initial=-1)) + 1
    sums, at_edge = _summed(places, values, source, n_sources, image.shape)
    kept, flux = np.flatnonzero(sums[:, 0] >= min_pix), sums[:, 1]
    x, y, xx, yy, xy = (sums[kept, column] / flux[kept] for column in range(2, 7))
    xx, yy, xy = xx - x * x, yy - y * y, xy - x * y
    mean, half = 0.5 * (xx + yy), np.hypot(0.5 * (xx - yy), xy)
    found = ExtractedSources(
        x=x + sums[kept, 7],
        y=y + sums[kept, 8],
        flux=flux[kept],
        n_pix=sums[kept, 0].astype(np.int64),
        major=np.sqrt(
            np.maximum(mean + half, 1.0 / 12.0)
        ),  # that of one pixel, whatever rounding leaves of huge values
        minor=np.sqrt(np.maximum(mean - half, 0.0)),
        at_edge=at_edge[kept],
    )
    order = np.lexsort((found.x, found.y, -found.flux))
    return ExtractedSources(*(getattr(found, name)[order] for name in ExtractedSources.__dataclass_fields__))


@njit(cache=True)
def _significant_pixels(
    image: NDArray[np.float32], variance: NDArray[np.float32], bad: NDArray[np.bool_], threshold2: float
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Places (row * nx + column, rising), values and standard deviations of pixels above the threshold."""
    ny, nx = image.shape
    limit = np.float32(threshold2)
    places = np.empty(max(image.size // 16, 2 * nx), dtype=np.int64)
    n = 0
    for y in range(ny):
        if n + nx > len(places):
            longer = np.empty(2 * len(places), dtype=np.int64)
            longer[:n] = places[:n]
            places = longer
        for x in range(nx):  # every place is written, and overwritten by the next if it does not count: no branches
            value = image[y, x]
            places[n] = y * nx + x
            n += (value > 0) & (value * value > limit * variance[y, x]) & (not bad[y, x])
    places = places[:n].copy()
    values, sigmas = np.empty(n, dtype=np.float32), np.empty(n, dtype=np.float32)
    for index in range(n):
        y, x = places[index] // nx, places[index] % nx
        values[index], sigmas[index] = image[y, x], np.sqrt(variance[y, x])
    return places, values, sigmas


@njit(cache=True)
def _flooded(
    places: NDArray[np.int64],
    values: NDArray[np.float32],
    sigmas: NDArray[np.float32],
    brightest_first: NDArray[np.int64],
    nx: int,
    min_pix: int,
    contrast: float,
    saddle_snr: float,
) -> NDArray[np.int32]:
    """Number of the source of each pixel, in order of the sources' peaks from bright to faint."""
    n = len(places)
    near = _neighbours(places, nx)
    source = np.full(n, -1, dtype=np.int32)
    parent, n_pix = np.empty(n, dtype=np.int32), np.zeros(n, dtype=np.int64)
    flux, peak_sigma = np.zeros(n), np.zeros(n)
    n_sources = 0
    for pixel in brightest_first:
        brightest = -1
        for k in range(8):
            other = near[pixel, k]
            # equal values: the one that was taken, so that source >= 0, is a neighbour all the same
            if other >= 0 and source[other] >= 0 and (brightest < 0 or values[other] > values[brightest]):
                brightest = other
        if brightest < 0:
            own = n_sources
            parent[own], peak_sigma[own] = own, sigmas[pixel]
            n_sources += 1
        else:
            own = root(parent, source[brightest])
            level = float(values[pixel])
            for k in range(8):
                other = near[pixel, k]
                if other < 0 or source[other] < 0:
                    continue
                met = root(parent, source[other])
                if met == own:
                    continue
                faint, bright = max(met, own), min(met, own)  # numbered from bright to faint
                above = flux[faint] - level * n_pix[faint]
                alone = n_pix[faint] >= min_pix and above > contrast * flux[bright]
                if not (alone and above > saddle_snr * peak_sigma[faint] * np.sqrt(n_pix[faint])):
                    parent[faint] = bright
                    flux[bright] += flux[faint]
                    n_pix[bright] += n_pix[faint]
                    own = root(parent, own)
        source[pixel] = own
        flux[own] += values[pixel]
        n_pix[own] += 1
    for pixel in range(n):
        source[pixel] = root(parent, source[pixel])
    return source


@njit(cache=True)
def _neighbours(places: NDArray[np.int64], nx: int) -> NDArray[np.int32]:
    """(n, 8) indices of the pixels around each among the given ones, -1 where there is none."""
    n = len(places)
    near = np.full((n, 8), -1, dtype=np.int32)
    first = 0
    for pixel in range(n):
        place = places[pixel]
        column = place % nx
        if column > 0 and pixel > 0 and places[pixel - 1] == place - 1:
            near[pixel, 0], near[pixel - 1, 1] = pixel - 1, pixel
        while places[first] < place - nx - 1:
            first += 1
        other = first
        while places[other] <= place - nx + 1:
            step = places[other] - (place - nx)
            if 0 <= column + step < nx:
                near[pixel, 3 + step], near[other, 6 - step] = other, pixel
            other += 1
    return near


@njit(cache=True)
def _summed(
    places: NDArray[np.int64],
    values: NDArray[np.float32],
    source: NDArray[np.int32],
    n_sources: int,
    shape: tuple[int, int],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Number, flux, its moments of first and second order about an origin, that (x, y); whether the edge is touched."""
    ny, nx = shape
    sums, at_edge = np.zeros((n_sources, 9)), np.zeros(n_sources, dtype=np.bool_)
    for pixel in range(len(places)):
        row, column = places[pixel] // nx, places[pixel] % nx
        own = sums[source[pixel]]
        if own[0] == 0:
            own[7], own[8] = column, row
        value, u, v = float(values[pixel]), column - own[7], row - own[8]
        own[0] += 1
        own[1] += value
        own[2] += value * u
        own[3] += value * v
        own[4] += value * u * u
        own[5] += value * v * v
        own[6] += value * u * v
        if row == 0 or column == 0 or row == ny - 1 or column == nx - 1:
            at_edge[source[pixel]] = True
    return sums, at_edge


@njit(cache=True)
def half_light_radii(
    image: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    flux: NDArray[np.float64],
    reach: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Radii of the circles around sources that hold half of a flux.

    Parameters
    ----------
    image : (ny, nx) float32, background subtracted
    bad : (ny, nx) bool, pixels that count for nothing
    x, y : (n,) centres, pixels
    flux : (n,) whole fluxes
    reach : (n,) largest radii, pixels

    Returns
    -------
    (n,) float64, pixels; the reach where there is less than half of the flux within it
    """
    ny, nx = image.shape
    radii = np.empty(len(x))
    curve = np.empty(int(reach.max() / _RADIUS_STEP_PIX) + 2) if len(x) else np.empty(0)
    part = 1.0 / _SUBPIXELS**2
    for s in range(len(x)):
        wanted = 0.5 * flux[s]
        outer = min(4.0, reach[s])
        while True:  # most need little more than their core
            n_bins = int(outer / _RADIUS_STEP_PIX)
            curve[:n_bins] = 0.0
            for row in range(max(int(y[s] - outer), 0), min(int(y[s] + outer) + 2, ny)):
                for column in range(max(int(x[s] - outer), 0), min(int(x[s] + outer) + 2, nx)):
                    if bad[row, column]:
                        continue
                    value = part * image[row, column]
                    for j in range(_SUBPIXELS):
                        v = row + (j + 0.5) / _SUBPIXELS - 0.5 - y[s]
                        for i in range(_SUBPIXELS):
                            u = column + (i + 0.5) / _SUBPIXELS - 0.5 - x[s]
                            place = int(np.sqrt(u * u + v * v) / _RADIUS_STEP_PIX)
                            if place < n_bins:
                                curve[place] += value
            inside, place = 0.0, 0
            while place < n_bins and inside + curve[place] < wanted:
                inside += curve[place]
                place += 1
            if place < n_bins or outer >= reach[s]:
                break
            outer = min(2.0 * outer, reach[s])
        if place == n_bins:
            radii[s] = outer
        else:
            radii[s] = (place + (wanted - inside) / curve[place]) * _RADIUS_STEP_PIX
    return radii


@njit(cache=True)
def circle_sums(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    radius: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of image and variance over good pixels whose centres lie in circles; (n,) each.

    Parameters
    ----------
    image, variance : (ny, nx) float32
    bad : (ny, nx) bool, pixels that count for nothing
    x, y, radius : (n,) circles, pixels
    """
    ny, nx = image.shape
    flux, noise2 = np.zeros(len(x)), np.zeros(len(x))
    for s in range(len(x)):
        for row in range(max(int(y[s] - radius[s]), 0), min(int(y[s] + radius[s]) + 2, ny)):
            for column in range(max(int(x[s] - radius[s]), 0), min(int(x[s] + radius[s]) + 2, nx)):
                inside = (column - x[s]) ** 2 + (row - y[s]) ** 2 <= radius[s] ** 2
                if inside and not bad[row, column]:
                    flux[s] += image[row, column]
                    noise2[s] += variance[row, column]
    return flux, noise2

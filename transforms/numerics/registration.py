"""Registration of images by their stars: asterisms find the transformation, all stars in common refine it.

Asterism matching is astroalign's (Beroiz, Cabral & Sanchez 2020, Astron. Comput. 32, 100384). It tries triangles in
random order, so its result is only the start of a least-squares fit that is repeated until the matched stars no longer
change: the answer depends on the star lists alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import astroalign
import numpy as np
import sep
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from transforms.numerics.background import BackgroundError, subtract_background

MIN_MATCHES = 12
_DETECTION_SIGMA = 4.0
_MIN_AREA_PIX = 5
_SMOOTHING_SIGMA_PIX = 1.5  # blended stars keep their peaks, noise does not
_MAX_STARS = 200
_CONTROL_POINTS = (50, 70)  # the cost of a failure grows with the square: 5 s for both
_MATCH_RADII_PIX = (3.0, 2.0, 1.5)
_MAX_REFINEMENTS = 30
_CLIP_SIGMA = 4.0
_FWHM_FROM_HALF_LIGHT = 2.0  # of a Gaussian


class RegistrationError(ValueError):
    """Images that cannot be registered; the message says how many stars there were and how many matched."""


@dataclass(frozen=True, eq=False)
class StarList:
    """Stars of one image, brightest first; arrays of shape (n,).

    Attributes
    ----------
    x, y : float64, pixels, 0-based, Gaussian-weighted centres
    flux : float64 > 0, in an aperture of one FWHM radius, image's unit
    fwhm_pix : median width of the brighter half
    sky, sky_rms : of the image, image's unit
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    fwhm_pix: float
    sky: float
    sky_rms: float


@dataclass(frozen=True, eq=False)
class Registration:
    """Where the pixels of one image lie in another.

    Attributes
    ----------
    affine : (2, 3) float64; ``(x, y) of the other image = affine[:, :2] @ (x, y) + affine[:, 2]``, 0-based pixels
    n_stars : stars the fit used
    rms_pix : root mean square distance of these stars after it
    flux_ratio : median flux of a star in the other image over its flux in this one
    """

    affine: NDArray[np.float64]
    n_stars: int
    rms_pix: float
    flux_ratio: float


def find_stars(image: NDArray[np.floating], bad: NDArray[np.bool_], box_pix: int = 64) -> StarList:
    """Find stars for registration, in crowded fields too.

    Sources above 4 sigma of the sky in a slightly smoothed image; saturated ones are left out by `bad`, blends stay.

    Parameters
    ----------
    image : (ny, nx) floating, sky may be present; non-finite pixels are left out
    bad : (ny, nx) bool, saturated and defective pixels
    box_pix : side of the boxes of the background, >= 8

    Returns
    -------
    StarList : at most 200 stars

    Raises
    ------
    RegistrationError : no background can be measured, the detection fails, or fewer than 12 stars are found
    """
    bad = np.asarray(bad, dtype=np.bool_) | ~np.isfinite(image)
    try:
        sky = subtract_background(image, bad, box_pix)
    except BackgroundError as error:
        raise RegistrationError(f"no background: {error}") from error
    pixels = np.where(bad, 0.0, sky.image).astype(np.float32)
    smooth = ndimage.gaussian_filter(pixels, _SMOOTHING_SIGMA_PIX)
    rms = 1.4826 * float(np.median(np.abs(smooth[~bad] - np.median(smooth[~bad]))))
    sep.set_extract_pixstack(max(pixels.size, 300_000))
    try:
        found = sep.extract(
            smooth, _DETECTION_SIGMA * max(rms, 1e-30), mask=bad, minarea=_MIN_AREA_PIX, deblend_cont=0.001
        )
    except Exception as error:  # sep raises bare Exception
        raise RegistrationError(f"detection of stars failed: {error}") from error
    column, row = np.rint(found["x"]).astype(np.intp), np.rint(found["y"]).astype(np.intp)
    touched = ndimage.maximum_filter(bad, 7)[row, column]
    found = found[~touched & (found["flux"] > 0) & (found["b"] > 0)]
    found = found[np.lexsort((found["x"], found["y"], -found["flux"]))]
    if len(found) < MIN_MATCHES:
        raise RegistrationError(f"{len(found)} stars are found, {MIN_MATCHES} are needed")
    x, y = found["x"].astype(np.float64), found["y"].astype(np.float64)
    bright = slice(0, max(len(found) // 2, MIN_MATCHES))
    radius, _ = sep.flux_radius(pixels, x[bright], y[bright], np.full(len(x[bright]), 12.0), 0.5, mask=bad)
    fwhm_pix = float(np.clip(_FWHM_FROM_HALF_LIGHT * np.median(radius), 1.5, 15.0))
    x, y, _ = sep.winpos(pixels, x, y, fwhm_pix / 2.3548, mask=bad)
    flux, _, _ = sep.sum_circle(pixels, x, y, fwhm_pix, mask=bad, subpix=5)
    inside = (x > 0) & (y > 0) & (x < pixels.shape[1] - 1) & (y < pixels.shape[0] - 1)
    kept = np.flatnonzero((flux > 0) & np.isfinite(x) & np.isfinite(y) & inside)
    kept = kept[np.lexsort((x[kept], y[kept], -flux[kept]))][:_MAX_STARS]
    if len(kept) < MIN_MATCHES:
        raise RegistrationError(f"{len(kept)} stars have a centre and a flux, {MIN_MATCHES} are needed")
    return StarList(
        x=np.asarray(x[kept]),
        y=np.asarray(y[kept]),
        flux=np.asarray(flux[kept], dtype=np.float64),
        fwhm_pix=fwhm_pix,
        sky=sky.level,
        sky_rms=sky.rms,
    )


def register(stars: StarList, other: StarList) -> Registration:
    """Find the affine transformation from the pixels of one image to those of another.

    Parameters
    ----------
    stars, other : star lists of the two images; they need about 20 of their brightest stars in common

    Returns
    -------
    Registration

    Raises
    ------
    RegistrationError : no asterisms in common, or fewer than 12 stars match after the fit

    Notes
    -----
    0.1 to 0.4 pixels a star in a crowded field with a FWHM of 5 to 8 pixels, which 60 or more stars bring to
    well under 0.1 pixels for the transformation.
    """
    positions, other_positions = np.column_stack((stars.x, stars.y)), np.column_stack((other.x, other.y))
    reasons = []
    for n_points in _CONTROL_POINTS:
        try:
            guess, _ = astroalign.find_transform(positions, other_positions, max_control_points=n_points)
        except (astroalign.MaxIterError, ValueError, TypeError, IndexError) as error:
            reasons.append(f"{n_points} brightest: {error}")
            continue
        affine, pairs, distance = _refine(np.asarray(guess.params)[:2], positions, other_positions)
        if len(pairs) >= MIN_MATCHES:
            ratio = float(np.median(other.flux[pairs[:, 1]] / stars.flux[pairs[:, 0]]))
            return Registration(affine, len(pairs), float(np.sqrt(np.mean(distance**2))), ratio)
        reasons.append(f"{n_points} brightest: {len(pairs)} stars match, {MIN_MATCHES} are needed")
    raise RegistrationError(
        f"no registration of {len(positions)} to {len(other_positions)} stars; " + "; ".join(reasons)
    )


def _refine(
    affine: NDArray[np.float64], positions: NDArray[np.float64], other: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.float64]]:
    """Affine fit to the mutual nearest neighbours, repeated until they stay the same."""
    tree = cKDTree(other)
    pairs, distance = np.zeros((0, 2), dtype=np.intp), np.zeros(0)
    for step in range(_MAX_REFINEMENTS):
        radius_pix = _MATCH_RADII_PIX[min(step, len(_MATCH_RADII_PIX) - 1)]
        moved = positions @ affine[:, :2].T + affine[:, 2]
        found = _mutual_pairs(moved, tree, radius_pix)
        if len(found) < MIN_MATCHES:
            return affine, found, np.zeros(len(found))
        distance = np.hypot(*(moved[found[:, 0]] - other[found[:, 1]]).T)
        scatter = max(1.4826 * float(np.median(distance)), 1e-6)
        kept = distance < _CLIP_SIGMA * scatter
        found, distance = found[kept], distance[kept]
        if step >= len(_MATCH_RADII_PIX) and np.array_equal(found, pairs):
            break
        pairs = found
        affine = _fit_affine(positions[pairs[:, 0]], other[pairs[:, 1]])
    return affine, pairs, distance


def _mutual_pairs(moved: NDArray[np.float64], tree: cKDTree, radius_pix: float) -> NDArray[np.intp]:
    """(n, 2) indices of points that are each other's nearest within a radius, in order of the first."""
    distance, nearest = tree.query(moved, distance_upper_bound=radius_pix)
    mine = np.flatnonzero(np.isfinite(distance))
    _, back = cKDTree(moved).query(tree.data[nearest[mine]])
    mine = mine[back == mine]
    return np.column_stack((mine, nearest[mine])).astype(np.intp)


def _fit_affine(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares affine (2, 3), by normal equations about the mean: no BLAS threads, repeatable."""
    centre, target_centre = source.mean(axis=0), target.mean(axis=0)
    p, q = source - centre, target - target_centre
    normal = np.einsum("ni,nj->ij", p, p)
    determinant = normal[0, 0] * normal[1, 1] - normal[0, 1] ** 2
    if not determinant > 1e-12 * (normal[0, 0] + normal[1, 1]) ** 2:
        raise RegistrationError(f"{len(source)} matched stars lie on a line")
    inverse = np.array([[normal[1, 1], -normal[0, 1]], [-normal[1, 0], normal[0, 0]]]) / determinant
    linear = np.einsum("ni,nj->ij", q, p) @ inverse
    return np.column_stack((linear, target_centre - linear @ centre))

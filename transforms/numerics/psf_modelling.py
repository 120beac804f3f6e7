"""Finding stars, and the point-spread function of an exposure as it changes over the image.

The PSF of an image is a smooth part, an elliptical Moffat profile whose three shape parameters are polynomials of the
position, fitted to all stars at once, and what the stars show beyond it, a pixel image whose every pixel is a
polynomial of the position. The smooth part is integrated over pixels where each star lies, so that under-sampled
stars are not smoothed by resampling; only the small remainder is resampled. The sum of both is then written as a
pixel basis with polynomial coefficients, which is all that others see.

Sums are numba loops and plain einsum, not BLAS, whose rounding depends on its number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from transforms.numerics.convolution import block_centres
from transforms.numerics.psf_grid import PSF_CELL_PIX, PsfGrid
from transforms.numerics.source_extraction import circle_sums, extract_sources, half_light_radii
from transforms.numerics.warping import HALF_TAPS, TAPS, sinc_weights

MIN_PSF_STARS = 5
STARS_PER_SPATIAL_TERM = 4  # order 2 (6 terms) needs 24 stars, order 1 (3 terms) 12
_MAX_ORDER = 3
_CORE_BOX_PIX = 5  # no bad pixel may lie in the box of this side around a star's peak
_FWHM_OVERSAMPLING = 10
_FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}

# --- choice of stars
_MIN_SNRS = (30.0, 15.0)  # the lower one when the higher leaves too few
_MAX_STARS = 300
_MAX_CANDIDATES = 400  # some are dropped in the fit
_MAX_OF_CONSTANT = 130  # candidates where one PSF is asked for: two of each cell
_MAX_ELLIPTICITY, _ELLIPTICITY_MARGIN = 0.3, 0.1
_BRIGHT_PART, _LEAST_BRIGHT = 0.25, 40  # sizes are isophotal: too small for faint stars, which rule a crowded field
_MIN_HALF_LIGHT_PIX = 0.8  # sharper things are cosmic rays and hot pixels
_LOCUS_HALF_WIDTHS = (0.2, 0.4)  # of the stars' half-light radius; the wider one when the first leaves few
_FEW_STARS = 12
_HALF_LIGHT_TO_FWHM = 1.75  # Moffat profile with exponent 3.5; 2.0 for a Gaussian
_ENOUGH_STARS = 30  # neighbours are modelled; isolation is given up step by step until there are that many
_ISOLATION = ((3.5, 0.05), (2.0, 0.05), (2.0, 0.3))  # no neighbour within so many FWHM with this part of the flux
_EDGE_FWHM = 1.5
_N_CELLS_A_SIDE = 8  # stars are taken in turn from the cells of a grid
_LEAST_GOOD_PART = 0.5  # of a stamp's pixels

# --- stamps
_STAMP_FWHM = 3.5  # half side of the model
_MIN_HALF_PIX, _MAX_HALF_PIX = 10, 30
_FIT_FWHM, _CROWDED_FIT_FWHM = 3.5, 2.5  # radius within which stars are fitted; the smooth part goes on beyond
_CROWDED = 1.5  # mean number of sources within the wider radius
_LEAST_FIT_PIX = 8.0
_CORE_FWHM = 1.5  # for the first iterations: enough to find centres and widths
_MAX_NEIGHBOURS = 24  # modelled on one stamp, the brightest
_SKY_QUANTILE = 0.25  # first guess; stars take the others

# --- fit of the smooth part
# of the star's own light, one for each iteration: large while the profile is wrong, in the end so large that the
# brightest stars do not rule
_MODEL_ERRORS = (0.3, 0.1, 0.03, 0.02, 0.02)
_CORE_UNTIL = 3  # iterations on the stars' cores
_CONSTANT_UNTIL = 3  # iterations with one shape everywhere
_CLEAN_FROM = 2  # iteration from which stars are dropped
_NEIGHBOUR_ERROR = 0.15  # of a neighbour's light: it is not exactly where it was found
_HUBER_SIGMA = 3.0
_MAX_STEP_PIX = 0.5
_MAX_DRIFT_FWHM = 0.35
_GAMMA_RANGE = (0.02, 0.65)  # 1 / Moffat exponent: nearly a Gaussian, exponent 1.54
_MAX_GAMMA_STEP = 0.1
_FIRST_GAMMA = 0.3
_SIZE_CLIP, _LEAST_SIZE_CLIP = 4.0, 0.03
_MISFIT_CLIP = 6.0
_MAD_TO_SIGMA = 1.4826
_MAX_LEVERAGE = 1.5  # variance of a prediction at a corner over that of one star
_RIDGE = 1e-9
_SHAPE_SLOPE = 0.1  # expected relative change of a, b, c by one term, for corners with few stars
_HALO_WIDTH = 3.0  # of the second component, in units of the first
_MAX_HALO = 0.1
_HALO_SIGMA = 5.0  # less significant ones are left out: they would add noise to the flux
_N_LOCAL, _N_SHAPE = 4, 5

_INTEGRATED_FORM = 9.0  # of the quadratic form, 1 at half maximum: 1.5 FWHM

# --- remainder
_CLIP_SIGMA = 4.0
_N_REMAINDER_PASSES = 2
_RIM_PART = 0.85  # of the half side: there sky and wing cannot be told apart, and the smooth part stands alone
_RING_SIGMA = 5.0
_RING_RIDGE = 1e-4  # a change of all rings like that of the amplitude has no weight
_MAX_SIZE_CHANGE = 4.0 * math.log(1.35)  # of the determinant; FWHM by a factor of 1.35, or the order is lowered
_MAX_REMAINDER = 0.5  # of the peak
_BASIS_PRECISION = 1e-4  # of the peak


_LARGEST_OFFSET_PIX = 2  # of a given PSF's peak from the middle


class PsfEstimationError(ValueError):
    """A PSF that cannot be measured; the message says how many stars were found, and what was refused."""


@dataclass(frozen=True, eq=False)
class DetectedSources:
    """Sources of one image, brightest first; arrays of shape (n,).

    Attributes
    ----------
    x, y : float64, pixels, 0-based
    flux : float64, isophotal, image's unit
    snr : float64, signal-to-noise ratio of `flux`
    half_light_radius_pix : float64
    ellipticity : float64, 1 - minor / major axis
    clean : bool, no bad pixel in the core, not cut by the image's edge
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    snr: NDArray[np.float64]
    half_light_radius_pix: NDArray[np.float64]
    ellipticity: NDArray[np.float64]
    clean: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PsfEstimate:
    """Mean PSF of an image.

    Attributes
    ----------
    psf : (k, k) float64, odd, centred on the middle pixel, sum 1
    fwhm_pix : full width at half maximum
    n_stars : stars it was made from
    """

    psf: NDArray[np.float64]
    fwhm_pix: float
    n_stars: int


@dataclass(frozen=True, eq=False)
class PsfModel:
    """The PSF of an image wherever one asks: ``PSF(x, y) = sum_b c_b(x, y) basis_b``, scaled to sum 1.

    Attributes
    ----------
    basis : (n_basis, k, k) float64, k odd; the mean PSF first
    coefficients : (n_basis, n_terms) float64, of products of Legendre polynomials in position, scaled to [-1, 1]
        from the first to the last pixel and held there beyond
    spatial_order : highest total order of these; twice the order of the shapes that were fitted, as pixels do not
        follow a width linearly
    shape : (ny, nx) of the image
    fwhm_pix : full width at half maximum at the centre of the image
    n_stars : stars it was made from; 0 when it was given
    """

    basis: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    spatial_order: int
    shape: tuple[int, int]
    fwhm_pix: float
    n_stars: int

    def at(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """PSFs at positions (n,) in pixels; returns (n, k, k), each centred on the middle pixel, sum 1."""
        u, v = _scaled(x, self.shape[1]), _scaled(y, self.shape[0])
        return np.asarray(_evaluate(self.basis, self.coefficients, self.spatial_order, u, v))

    def at_centre(self) -> NDArray[np.float64]:
        """PSF (k, k) at the centre of the image."""
        ny, nx = self.shape
        return np.asarray(self.at(0.5 * (nx - 1), 0.5 * (ny - 1))[0])

    def on_cells(self) -> PsfGrid:
        """PSFs at the centres of the cells of the image, in float32; one where it is the same everywhere."""
        shape = self.shape if self.spatial_order > 0 else (1, 1)
        x, y = block_centres(shape, PSF_CELL_PIX)
        images = self.at(x.ravel(), y.ravel()).astype(np.float32)
        return PsfGrid(images.reshape(*x.shape, *images.shape[1:]))


@dataclass(frozen=True, eq=False)
class _Stamps:
    """Pixels around candidate stars; arrays of length n."""

    pixels: NDArray[np.float64]  # (n, k, k), 0 where bad
    variance: NDArray[np.float64]  # (n, k, k), infinite where bad
    column: NDArray[np.intp]  # of the middle pixel
    row: NDArray[np.intp]
    first: NDArray[np.intp]  # (n + 1,) where each star's neighbours begin
    neighbour_x: NDArray[np.float64]  # from the middle pixel
    neighbour_y: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, eq=False)
class _Smooth:
    """The smooth part and the stars as it sees them."""

    field: NDArray[np.float64]  # (3, n_terms) Legendre coefficients of the quadratic form a, b, c
    gamma: float
    halo: float  # amplitude of the wide component for unit amplitude
    order: int
    radius_fwhm: float  # within which stars are fitted
    x: NDArray[np.float64]  # (n,) star's centre from the middle pixel of its stamp
    y: NDArray[np.float64]
    amplitude: NDArray[np.float64]
    sky: NDArray[np.float64]
    kept: NDArray[np.bool_]


def detect_sources(
    image: NDArray[np.floating], variance: NDArray[np.floating], bad: NDArray[np.bool_]
) -> DetectedSources:
    """Find sources of 3 sigma in each of five connected pixels, for choosing stars (not for science).

    Parameters
    ----------
    image : (ny, nx) floating, background subtracted
    variance : (ny, nx) floating, square of the image's unit, > 0 where not `bad`
    bad : (ny, nx) bool, True for pixels to leave out

    Returns
    -------
    DetectedSources
    """
    mask = np.ascontiguousarray(bad, dtype=np.bool_)
    pixels = np.ascontiguousarray(image, dtype=np.float32)
    noise2 = np.ascontiguousarray(variance, dtype=np.float32)
    found = extract_sources(pixels, noise2, mask)
    reach = np.maximum(6.0 * found.major, 6.0)
    at_centre = np.rint(found.y).astype(np.intp), np.rint(found.x).astype(np.intp)
    return DetectedSources(
        x=found.x,
        y=found.y,
        flux=found.flux,
        snr=found.flux / np.sqrt(noise2[at_centre] * found.n_pix),
        half_light_radius_pix=half_light_radii(pixels, mask, found.x, found.y, found.flux, reach),
        ellipticity=1.0 - found.minor / found.major,
        clean=~found.at_edge & _has_good_core(mask, found.x, found.y),
    )


def remeasured(
    sources: DetectedSources, image: NDArray[np.floating], variance: NDArray[np.floating], bad: NDArray[np.bool_]
) -> DetectedSources:
    """Sources that were detected on one image as another image of the same sky and pixel grid has them.

    Parameters
    ----------
    sources : of `detect_sources` on the other image
    image, variance, bad : (ny, nx) planes, as for `detect_sources`

    Returns
    -------
    DetectedSources, those with a positive flux in a circle of three half-light radii; positions and ellipticities are
    kept
    """
    mask = np.ascontiguousarray(bad, dtype=np.bool_)
    pixels = np.ascontiguousarray(image, dtype=np.float32)
    reach = 3.0 * np.maximum(sources.half_light_radius_pix, 1.0)
    flux, noise2 = circle_sums(
        pixels, np.ascontiguousarray(variance, dtype=np.float32), mask, sources.x, sources.y, reach
    )
    kept = np.flatnonzero((flux > 0) & (noise2 > 0))
    kept = kept[np.lexsort((sources.x[kept], sources.y[kept], -flux[kept]))]
    x, y, flux = sources.x[kept], sources.y[kept], flux[kept]
    return DetectedSources(
        x=x,
        y=y,
        flux=flux,
        snr=flux / np.sqrt(noise2[kept]),
        half_light_radius_pix=half_light_radii(pixels, mask, x, y, flux, reach[kept]),
        ellipticity=sources.ellipticity[kept],
        clean=sources.clean[kept] & _has_good_core(mask, x, y),
    )


def _has_good_core(bad: NDArray[np.bool_], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """No bad pixel in the box around a position."""
    column, row = np.rint(x).astype(np.intp), np.rint(y).astype(np.intp)
    near = np.arange(_CORE_BOX_PIX) - _CORE_BOX_PIX // 2
    rows = np.clip(row[:, None, None] + near[:, None], 0, bad.shape[0] - 1)
    columns = np.clip(column[:, None, None] + near, 0, bad.shape[1] - 1)
    return np.asarray(~bad[rows, columns].any(axis=(1, 2)))


def constant_psf(psf: NDArray[np.floating], shape: tuple[int, int]) -> PsfModel:
    """Model with one PSF everywhere.

    Parameters
    ----------
    psf : (k, k) floating, k odd and >= 5, one peak near the middle, positive sum
    shape : (ny, nx) of the image

    Returns
    -------
    PsfModel with ``n_stars`` 0

    Raises
    ------
    PsfEstimationError : `psf` is no such array
    """
    image = np.array(psf, dtype=np.float64)
    fwhm_pix, total = psf_fwhm_pix(image), float(image.sum())
    if total <= 0:
        raise PsfEstimationError(f"a PSF must have a positive sum, it is {total:g}")
    middle = image.shape[0] // 2
    peak_y, peak_x = np.unravel_index(np.argmax(image), image.shape)
    if max(abs(int(peak_y) - middle), abs(int(peak_x) - middle)) > _LARGEST_OFFSET_PIX:
        raise PsfEstimationError(f"the peak of a PSF lies at ({peak_x}, {peak_y}), not near its middle {middle}")
    return PsfModel(image[np.newaxis] / total, np.ones((1, 1)), 0, (shape[0], shape[1]), fwhm_pix, 0)


def fit_psf_model(
    image: NDArray[np.floating],
    variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    sources: DetectedSources | None = None,
    spatial_order: int = 2,
) -> PsfModel:
    """Measure the PSF of an image, and how it changes over it, from its stars.

    Up to 300 sources (130 for order 0) of the most frequent size, spread over the image. For all of them at once a
    Moffat profile ``A (1 + (2^g - 1) Q)^(-1/g)``, ``Q = a dx^2 + 2 b dx dy + c dy^2``, integrated over pixels, is
    fitted with a, b, c as polynomials of the position and one g, by Gauss-Newton steps in which the stars' own
    amplitude, centre and sky are eliminated; neighbours are fitted with the same profile and taken off before every
    step. Stars of another size than the others at their place, or badly fitted, are dropped. Then what the stars show
    beyond it, scaled to unit amplitude and shifted to the middle of a pixel, becomes first a mean profile by rings,
    then a polynomial of the position in each pixel, both shrunk by how far they exceed their errors (empirical Bayes,
    by rings). The sum, evaluated on a grid of positions, is written as mean and principal components.

    Parameters
    ----------
    image : (ny, nx) floating, background subtracted
    variance : (ny, nx) floating, square of the image's unit, > 0 where not `bad`
    bad : (ny, nx) bool; saturated pixels must be among them
    sources : result of `detect_sources` on these arrays, if there is one already
    spatial_order : 0 to 3, highest order of shapes and pixels; a lower one is taken where stars are fewer than 4 a
        term or leave a corner unconstrained

    Returns
    -------
    PsfModel, its stamp 3.5 FWHM to each side (21 to 61 pixels)

    Raises
    ------
    PsfEstimationError : fewer than 5 stars are left, or they have no common profile; a bad `spatial_order`
    """
    if not 0 <= spatial_order <= _MAX_ORDER:
        raise PsfEstimationError(f"the spatial order of a PSF is 0 to {_MAX_ORDER}, got {spatial_order}")
    bad = np.ascontiguousarray(bad, dtype=np.bool_)
    if sources is None:
        sources = detect_sources(image, variance, bad)
    shape = (bad.shape[0], bad.shape[1])
    chosen, fwhm_pix = _choose_stars(sources, shape)
    chosen = chosen[: _MAX_CANDIDATES if spatial_order > 0 else _MAX_OF_CONSTANT]
    radius_fwhm = _fit_radius_fwhm(sources, shape, fwhm_pix)
    half = min(math.ceil(max(radius_fwhm * fwhm_pix, _LEAST_FIT_PIX)), _MAX_HALF_PIX)
    stamps = _cut_stamps(image, variance, bad, sources, chosen, half)
    for order in range(spatial_order, -1, -1):
        smooth = _fit_smooth_part(stamps, shape, fwhm_pix, radius_fwhm, order)
        kept = np.flatnonzero(smooth.kept)[:_MAX_STARS]
        used = _subset_of_smooth(smooth, kept)
        images = _psf_images(used, _fit_remainder(_subset(stamps, kept), shape, used), fwhm_pix)
        if images is not None:
            return _as_pixel_basis(images, 2 * used.order, shape, len(kept))
    raise PsfEstimationError(f"the {len(kept)} stars have no common profile")


def estimate_psf(
    image: NDArray[np.floating],
    variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    sources: DetectedSources | None = None,
) -> PsfEstimate:
    """One PSF for the whole image: `fit_psf_model` with order 0. Where the PSF varies this is its mean.

    Parameters, Raises : as `fit_psf_model`
    """
    model = fit_psf_model(image, variance, bad, sources, spatial_order=0)
    return PsfEstimate(psf=model.at_centre(), fwhm_pix=model.fwhm_pix, n_stars=model.n_stars)


def psf_fwhm_pix(psf: NDArray[np.floating]) -> float:
    """Full width at half maximum: diameter of the circle with the area in which the PSF exceeds half its maximum.

    Parameters
    ----------
    psf : (k, k) floating, k odd and >= 5, one peak near the middle

    Returns
    -------
    FWHM in pixels; good to 1 % for FWHM >= 2 pixels (cubic spline between pixels)

    Raises
    ------
    PsfEstimationError : not such an array, not finite, or without a positive peak
    """
    psf = np.asarray(psf, dtype=np.float64)
    if psf.ndim != 2 or psf.shape[0] != psf.shape[1] or psf.shape[0] % 2 == 0 or psf.shape[0] < 5:
        raise PsfEstimationError(f"a PSF is square with an odd side of at least 5, got shape {psf.shape}")
    if not np.all(np.isfinite(psf)) or psf.max() <= 0:
        raise PsfEstimationError(f"a PSF must be finite with a positive peak, its maximum is {psf.max()}")
    fine = ndimage.zoom(psf, _FWHM_OVERSAMPLING, order=3, mode="nearest", grid_mode=True)
    above = np.count_nonzero(fine > 0.5 * fine.max()) / _FWHM_OVERSAMPLING**2
    return float(2.0 * np.sqrt(above / np.pi))


# --- positions -------------------------------------------------------------------------------------------------------


def _position_terms(x: ArrayLike, y: ArrayLike, shape: tuple[int, int], order: int) -> NDArray[np.float64]:
    """Products of Legendre polynomials by rising total order, (n, n_terms); a lower order is a prefix."""
    return _products(_scaled(x, shape[1]), _scaled(y, shape[0]), order)


def _products(u: NDArray[np.float64], v: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    along_x, along_y = _legendre(u, order), _legendre(v, order)
    return np.stack([along_x[i] * along_y[j] for i, j in _degrees(order)], axis=-1)


def _degrees(order: int) -> list[tuple[int, int]]:
    return [(total - j, j) for total in range(order + 1) for j in range(total + 1)]


def _scaled(position: ArrayLike, side: int) -> NDArray[np.float64]:
    """Positions from -1 at the first to 1 at the last pixel, and that beyond; (n,)."""
    values = np.asarray(position, dtype=np.float64).reshape(-1)
    return np.asarray(np.minimum(np.maximum(2.0 / max(side - 1, 1) * values - 1.0, -1.0), 1.0))


def _legendre(u: NDArray[np.float64], order: int) -> list[NDArray[np.float64]]:
    values = [np.ones_like(u), u]
    for n in range(1, order):
        values.append(((2 * n + 1) * u * values[n] - n * values[n - 1]) / (n + 1))
    return values[: order + 1]


@njit(cache=True, fastmath=_FAST_MATH)
def _evaluate(
    basis: NDArray[np.float64],
    coefficients: NDArray[np.float64],
    order: int,
    u: NDArray[np.float64],
    v: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(n, k, k) sums of basis images at scaled positions (n,), each scaled to sum 1."""
    n_basis, side, _ = basis.shape
    out = np.zeros((len(u), side, side))
    along_u, along_v = np.ones(order + 2), np.ones(order + 2)
    for n in range(len(u)):
        along_u[1], along_v[1] = u[n], v[n]
        for i in range(1, order):
            along_u[i + 1] = ((2 * i + 1) * u[n] * along_u[i] - i * along_u[i - 1]) / (i + 1)
            along_v[i + 1] = ((2 * i + 1) * v[n] * along_v[i] - i * along_v[i - 1]) / (i + 1)
        total = 0.0
        for b in range(n_basis):
            weight, t = 0.0, 0
            for degree in range(order + 1):
                for j in range(degree + 1):
                    weight += coefficients[b, t] * along_u[degree - j] * along_v[j]
                    t += 1
            for row in range(side):
                for column in range(side):
                    value = weight * basis[b, row, column]
                    out[n, row, column] += value
                    total += value
        for row in range(side):
            for column in range(side):
                out[n, row, column] /= total
    return out


# --- stars -----------------------------------------------------------------------------------------------------------


def _choose_stars(sources: DetectedSources, shape: tuple[int, int]) -> tuple[NDArray[np.intp], float]:
    """Indices of candidate stars, the best of every part of the image first, and a first guess of their FWHM."""
    for min_snr in _MIN_SNRS:
        candidates = np.flatnonzero(
            sources.clean & (sources.half_light_radius_pix > _MIN_HALF_LIGHT_PIX) & (sources.snr >= min_snr)
        )
        bright = candidates[: max(int(_BRIGHT_PART * len(candidates)), _LEAST_BRIGHT)]
        typical = float(np.median(sources.ellipticity[bright])) if len(bright) else 0.0
        round_enough = max(_MAX_ELLIPTICITY, typical + _ELLIPTICITY_MARGIN)  # guiding errors: still a PSF
        bright = bright[sources.ellipticity[bright] < round_enough]
        evidence = f"{len(sources.x)} sources, {len(candidates)} clean and above S/N {min_snr:g}, {len(bright)} round"
        if len(bright) >= MIN_PSF_STARS:
            break
    else:
        raise PsfEstimationError(f"too few stars for a PSF: {evidence}; {MIN_PSF_STARS} are needed")
    half_light = _half_sample_mode(sources.half_light_radius_pix[bright])
    fwhm_pix = _HALF_LIGHT_TO_FWHM * half_light
    margin = _EDGE_FWHM * fwhm_pix
    inside = np.minimum(sources.x, sources.y)[candidates] >= margin
    inside &= (sources.x[candidates] <= shape[1] - 1 - margin) & (sources.y[candidates] <= shape[0] - 1 - margin)
    candidates = candidates[inside & (sources.ellipticity[candidates] < round_enough)]
    for half_width in _LOCUS_HALF_WIDTHS:
        alike = candidates[np.abs(sources.half_light_radius_pix[candidates] / half_light - 1.0) < half_width]
        # the widest isolation that leaves enough stars; neighbours that are left are fitted
        for radius_fwhm, flux_ratio in _ISOLATION:
            chosen = alike[_is_isolated(sources, alike, radius_fwhm * fwhm_pix, flux_ratio)]
            if len(chosen) >= _ENOUGH_STARS:
                break
        if len(chosen) >= _FEW_STARS:
            break
    if len(chosen) < MIN_PSF_STARS:
        raise PsfEstimationError(
            f"too few stars for a PSF: {evidence}, {len(alike)} of the most frequent size "
            f"({half_light:.2f} pixels) away from the edge, {len(chosen)} isolated; {MIN_PSF_STARS} are needed"
        )
    return _spread(sources, chosen, shape), fwhm_pix


def _fit_radius_fwhm(sources: DetectedSources, shape: tuple[int, int], fwhm_pix: float) -> float:
    """Wide, to tell wings from sky, unless neighbours fill it."""
    within = len(sources.x) / (shape[0] * shape[1]) * math.pi * (_FIT_FWHM * fwhm_pix) ** 2
    return _CROWDED_FIT_FWHM if within > _CROWDED else _FIT_FWHM


def _half_sample_mode(values: NDArray[np.float64]) -> float:
    """Mode by halving: keep the shortest interval with half of the values until a few are left."""
    kept = np.sort(values)
    while len(kept) > 3:
        half = -(-len(kept) // 2)
        start = int(np.argmin(kept[half - 1 :] - kept[: len(kept) - half + 1]))
        kept = kept[start : start + half]
    return float(np.mean(kept))


def _is_isolated(
    sources: DetectedSources, chosen: NDArray[np.intp], radius_pix: float, flux_ratio: float
) -> NDArray[np.bool_]:
    """True for chosen sources without a neighbour of more than this part of their flux within a radius."""
    positions = np.column_stack((sources.x, sources.y))
    neighbours = cKDTree(positions).query_ball_point(positions[chosen], radius_pix)
    return np.array(
        [
            all(other == own or sources.flux[other] < flux_ratio * sources.flux[own] for other in near)
            for own, near in zip(chosen, neighbours, strict=True)
        ],
        dtype=np.bool_,
    )


def _spread(sources: DetectedSources, chosen: NDArray[np.intp], shape: tuple[int, int]) -> NDArray[np.intp]:
    """Chosen sources in the order in which they are taken: the brightest of each cell, then the second of each..."""
    cell_x = (sources.x[chosen] * _N_CELLS_A_SIDE / shape[1]).astype(np.intp)
    cell = (sources.y[chosen] * _N_CELLS_A_SIDE / shape[0]).astype(np.intp) * _N_CELLS_A_SIDE + cell_x
    by_cell = np.lexsort((np.arange(len(chosen)), cell))  # sources come brightest first
    starts = np.flatnonzero(np.diff(cell[by_cell], prepend=-1))
    rank = np.empty(len(chosen), dtype=np.intp)
    rank[by_cell] = np.arange(len(chosen)) - np.repeat(starts, np.diff(starts, append=len(chosen)))
    return chosen[np.lexsort((np.arange(len(chosen)), rank))]


def _cut_stamps(
    image: NDArray[np.floating],
    variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    sources: DetectedSources,
    chosen: NDArray[np.intp],
    half: int,
) -> _Stamps:
    """Stamps of the stars that have enough good pixels; what lies beyond the image's edge is bad."""
    ny, nx = bad.shape
    column, row = np.rint(sources.x[chosen]).astype(np.intp), np.rint(sources.y[chosen]).astype(np.intp)
    offset = np.arange(-half, half + 1)
    rows, columns = row[:, None, None] + offset[:, None], column[:, None, None] + offset[None, :]
    outside = (rows < 0) | (rows >= ny) | (columns < 0) | (columns >= nx)
    at = (np.clip(rows, 0, ny - 1), np.clip(columns, 0, nx - 1))
    values, noise = image[at].astype(np.float64), variance[at].astype(np.float64)
    unusable = outside | bad[at] | ~np.isfinite(values) | ~(noise > 0)
    enough = np.mean(~unusable, axis=(1, 2)) >= _LEAST_GOOD_PART
    if np.count_nonzero(enough) < MIN_PSF_STARS:
        raise PsfEstimationError(
            f"too few stars for a PSF: only {np.count_nonzero(enough)} of {len(chosen)} have {_LEAST_GOOD_PART:.0%} "
            f"good pixels in a stamp of {2 * half + 1} pixels; {MIN_PSF_STARS} are needed"
        )
    positions = np.column_stack((sources.x, sources.y))
    near = cKDTree(positions).query_ball_point(positions[chosen], math.sqrt(2.0) * half)
    lists = [
        np.array(sorted(other for other in others if other != own)[:_MAX_NEIGHBOURS], dtype=np.intp)
        for own, others, good in zip(chosen, near, enough, strict=True)
        if good
    ]
    column, row = column[enough], row[enough]
    n_near = np.array([len(one) for one in lists], dtype=np.intp)
    all_near = np.concatenate(lists)
    return _Stamps(
        pixels=np.where(unusable, 0.0, values)[enough],
        variance=np.where(unusable, np.inf, noise)[enough],
        column=column,
        row=row,
        first=np.concatenate((np.zeros(1, dtype=np.intp), np.cumsum(n_near))),
        neighbour_x=sources.x[all_near] - np.repeat(column, n_near),
        neighbour_y=sources.y[all_near] - np.repeat(row, n_near),
    )


def _subset(stamps: _Stamps, kept: NDArray[np.intp]) -> _Stamps:
    parts = [np.arange(stamps.first[i], stamps.first[i + 1]) for i in kept]
    near = np.concatenate(parts)
    return _Stamps(
        pixels=stamps.pixels[kept],
        variance=stamps.variance[kept],
        column=stamps.column[kept],
        row=stamps.row[kept],
        first=np.concatenate((np.zeros(1, dtype=np.intp), np.cumsum([len(part) for part in parts]))),
        neighbour_x=stamps.neighbour_x[near],
        neighbour_y=stamps.neighbour_y[near],
    )


def _subset_of_smooth(smooth: _Smooth, kept: NDArray[np.intp]) -> _Smooth:
    return replace(
        smooth,
        x=smooth.x[kept],
        y=smooth.y[kept],
        amplitude=smooth.amplitude[kept],
        sky=smooth.sky[kept],
        kept=smooth.kept[kept],
    )


# --- smooth part -----------------------------------------------------------------------------------------------------


def _fit_smooth_part(
    stamps: _Stamps, shape: tuple[int, int], fwhm_pix: float, radius_fwhm: float, spatial_order: int
) -> _Smooth:
    """Profile, its change over the image, and every star's amplitude, centre and sky."""
    n, side = len(stamps), stamps.pixels.shape[1]
    middle = side // 2
    sky = np.quantile(stamps.pixels, _SKY_QUANTILE, axis=(1, 2))
    peak = stamps.pixels[:, middle - 1 : middle + 2, middle - 1 : middle + 2].max(axis=(1, 2)) - sky
    smooth = _Smooth(
        field=np.array([[4.0 / fwhm_pix**2], [0.0], [4.0 / fwhm_pix**2]]),
        gamma=_FIRST_GAMMA,
        halo=0.0,
        order=0,
        radius_fwhm=radius_fwhm,
        x=np.zeros(n),
        y=np.zeros(n),
        amplitude=peak,
        sky=sky,
        kept=peak > 0,
    )
    for iteration, model_error in enumerate(_MODEL_ERRORS):
        smooth = replace(smooth, radius_fwhm=_CORE_FWHM if iteration < _CORE_UNTIL else radius_fwhm)
        _require_stars(smooth.kept, n)
        order = 0 if iteration < _CONSTANT_UNTIL else _affordable_order(stamps, shape, smooth.kept, spatial_order)
        smooth = _with_order(smooth, order)
        terms = _position_terms(stamps.column, stamps.row, shape, order)
        smooth, neighbours = _fit_linear_part(stamps, smooth, terms, model_error, iteration == 0)
        smooth = _gauss_newton_step(stamps, smooth, terms, neighbours, model_error, iteration >= _CLEAN_FROM)
    _require_stars(smooth.kept, n)
    return smooth


def _require_stars(kept: NDArray[np.bool_], n_candidates: int) -> None:
    if np.count_nonzero(kept) < MIN_PSF_STARS:
        raise PsfEstimationError(
            f"too few stars for a PSF: {np.count_nonzero(kept)} of {n_candidates} candidates have a common profile and "
            f"a stable centre; {MIN_PSF_STARS} are needed"
        )


def _affordable_order(stamps: _Stamps, shape: tuple[int, int], kept: NDArray[np.bool_], spatial_order: int) -> int:
    """Highest order up to the wanted one for which there are stars enough, and near all corners."""
    corners_x, corners_y = np.array([0, 0, 1, 1]) * (shape[1] - 1), np.array([0, 1, 0, 1]) * (shape[0] - 1)
    for order in range(spatial_order, 0, -1):
        terms = _position_terms(stamps.column[kept], stamps.row[kept], shape, order)
        if len(terms) < STARS_PER_SPATIAL_TERM * terms.shape[1]:
            continue
        gram = np.einsum("nt,ns->ts", terms, terms) + _RIDGE * np.eye(terms.shape[1])
        at_corners = _position_terms(corners_x, corners_y, shape, order)
        if np.max(np.einsum("nt,tn->n", at_corners, np.linalg.solve(gram, at_corners.T))) < _MAX_LEVERAGE:
            return order
    return 0


def _fit_form(smooth: _Smooth) -> float:
    """Value of the quadratic form, 1 at half maximum, up to which pixels are fitted."""
    least = _LEAST_FIT_PIX**2 * math.sqrt(_determinant(smooth.field[:, 0]))
    return max((2.0 * smooth.radius_fwhm) ** 2, least)


def _with_order(smooth: _Smooth, order: int) -> _Smooth:
    n_terms = len(_degrees(order))
    field = np.zeros((3, n_terms))
    common = min(n_terms, smooth.field.shape[1])
    field[:, :common] = smooth.field[:, :common]
    return replace(smooth, field=field, order=order)


def _fit_linear_part(
    stamps: _Stamps, smooth: _Smooth, terms: NDArray[np.float64], model_error: float, alone: bool
) -> tuple[_Smooth, NDArray[np.float64]]:
    """Amplitudes and skies with the profile as it is, and the neighbours' light on each stamp (n, k, k)."""
    neighbours = np.zeros_like(stamps.pixels)
    amplitude, sky = smooth.amplitude.copy(), smooth.sky.copy()
    shapes = np.einsum("nt,st->ns", terms, smooth.field)
    _solve_linear_parts(
        stamps.pixels,
        stamps.variance,
        stamps.first,
        stamps.neighbour_x,
        stamps.neighbour_y,
        smooth.x,
        smooth.y,
        shapes,
        smooth.gamma,
        smooth.halo,
        _fit_form(smooth),
        model_error,
        alone,
        amplitude,
        sky,
        neighbours,
    )
    return replace(smooth, amplitude=amplitude, sky=sky, kept=smooth.kept & (amplitude > 0)), neighbours


def _gauss_newton_step(
    stamps: _Stamps,
    smooth: _Smooth,
    terms: NDArray[np.float64],
    neighbours: NDArray[np.float64],
    model_error: float,
    clean: bool,
) -> _Smooth:
    """One step of all parameters, the stars' own eliminated (Schur complement); drops stars unlike the others."""
    n, n_terms = terms.shape
    normal, right = np.zeros((n, _N_LOCAL + _N_SHAPE, _N_LOCAL + _N_SHAPE)), np.zeros((n, _N_LOCAL + _N_SHAPE))
    misfit = np.zeros(n)
    shapes = np.einsum("nt,st->ns", terms, smooth.field)
    _add_normal_equations(
        stamps.pixels,
        stamps.variance,
        neighbours,
        smooth.x,
        smooth.y,
        smooth.amplitude,
        smooth.sky,
        shapes,
        smooth.gamma,
        smooth.halo,
        _fit_form(smooth),
        model_error,
        normal,
        right,
        misfit,
    )
    own = slice(0, _N_LOCAL)
    rest = slice(_N_LOCAL, None)
    scale = np.sqrt(np.maximum(np.diagonal(normal, axis1=1, axis2=2), np.finfo(np.float64).tiny))
    normal = normal / scale[:, :, np.newaxis] / scale[:, np.newaxis, :]
    right = right / scale
    normal += _RIDGE * np.eye(_N_LOCAL + _N_SHAPE)
    solved = np.linalg.solve(normal[:, own, own], np.concatenate((normal[:, own, rest], right[:, own, None]), axis=2))
    schur = normal[:, rest, rest] - np.einsum("nls,nlr->nsr", normal[:, own, rest], solved[:, :, :_N_SHAPE])
    schur_right = right[:, rest] - np.einsum("nls,nl->ns", normal[:, own, rest], solved[:, :, _N_SHAPE])
    shape_scale = scale[:, rest]
    kept = smooth.kept
    if clean:
        kept = kept & _is_like_the_others(schur, schur_right, shape_scale, shapes, misfit, kept)
        _require_stars(kept, n)
    # unknowns: the coefficients of a, b, c, then gamma and halo
    design = np.zeros((n, _N_SHAPE, 3 * n_terms + 2))
    for s in range(3):
        design[:, s, s * n_terms : (s + 1) * n_terms] = terms * shape_scale[:, s, None]
    design[:, 3, -2] = shape_scale[:, 3]
    design[:, 4, -1] = shape_scale[:, 4]
    design[~kept] = 0.0
    gram = np.einsum("nsi,nsj->ij", design, np.einsum("nsr,nrj->nsj", schur, design))
    total = np.einsum("nsi,ns->i", design, schur_right)
    prior = np.zeros(len(total))
    prior[:-2].reshape(3, -1)[:, 1:] = (_SHAPE_SLOPE * math.sqrt(_determinant(smooth.field[:, 0]))) ** -2.0
    gram += np.diag(prior)
    total -= prior * np.concatenate((smooth.field.ravel(), (0.0, smooth.halo)))
    step = _solved_with_halo_if_significant(gram, total, smooth.halo)
    field, gamma, part = _limited(smooth, step, terms, kept)
    halo = float(min(max(smooth.halo + part * step[-1], 0.0), _MAX_HALO))
    shape_step = np.einsum("nsi,i->ns", design, part * step)
    local = (solved[:, :, _N_SHAPE] - np.einsum("nls,ns->nl", solved[:, :, :_N_SHAPE], shape_step)) / scale[:, own]
    x = smooth.x + np.clip(local[:, 1], -_MAX_STEP_PIX, _MAX_STEP_PIX)
    y = smooth.y + np.clip(local[:, 2], -_MAX_STEP_PIX, _MAX_STEP_PIX)
    amplitude, sky = smooth.amplitude + local[:, 0], smooth.sky + local[:, 3]
    kept = kept & (amplitude > 0)
    settled = np.hypot(x, y) < math.sqrt(0.5) + _MAX_DRIFT_FWHM * 2.0 / math.sqrt(math.sqrt(_determinant(field[:, 0])))
    return replace(
        smooth, field=field, gamma=gamma, halo=halo, x=x, y=y, amplitude=amplitude, sky=sky, kept=kept & settled
    )


def _solved_with_halo_if_significant(
    gram: NDArray[np.float64], right: NDArray[np.float64], halo: float
) -> NDArray[np.float64]:
    """Step of all parameters; its last one, the halo's, leads to 0 where the halo is within its error."""
    width = np.sqrt(np.maximum(np.diag(gram), np.finfo(np.float64).tiny))
    gram = gram / np.outer(width, width) + _RIDGE * np.eye(len(right))
    inverse = np.linalg.inv(gram)
    step = np.einsum("ij,j->i", inverse, right / width)
    if halo * width[-1] + step[-1] > _HALO_SIGMA * math.sqrt(inverse[-1, -1]):
        return np.asarray(step / width)
    gone = -halo * width[-1]
    step = np.linalg.solve(gram[:-1, :-1], (right / width)[:-1] - gram[:-1, -1] * gone)
    return np.append(step, gone) / width


def _limited(
    smooth: _Smooth, step: NDArray[np.float64], terms: NDArray[np.float64], kept: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], float, float]:
    """Field and gamma after a step, and the part of the step for which they stay those of a profile."""
    change = step[:-2].reshape(3, -1)
    part = min(1.0, _MAX_GAMMA_STEP / max(abs(step[-2]), 1e-12))
    for _ in range(10):
        field = smooth.field + part * change
        before = np.einsum("nt,st->ns", terms[kept], smooth.field)
        after = np.einsum("nt,st->ns", terms[kept], field)
        mean_is_sound = field[0, 0] > 0 and _determinant(field[:, 0]) > 0
        if mean_is_sound and np.all(_determinant(after.T) > 0.25 * _determinant(before.T)) and np.all(after[:, 0] > 0):
            gamma = min(max(smooth.gamma + part * step[-2], _GAMMA_RANGE[0]), _GAMMA_RANGE[1])
            return field, float(gamma), part
        part *= 0.5
    raise PsfEstimationError(f"the {np.count_nonzero(kept)} stars have no common profile: the fit does not converge")


def _determinant(form: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(form[0] * form[2] - form[1] ** 2)


def _is_like_the_others(
    schur: NDArray[np.float64],
    schur_right: NDArray[np.float64],
    scale: NDArray[np.float64],
    shapes: NDArray[np.float64],
    misfit: NDArray[np.float64],
    kept: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """True for stars of the size the others have at their place, and as well fitted."""
    forms = schur[:, :3, :3] + _RIDGE * np.eye(3)
    change = np.linalg.solve(forms, schur_right[:, :3, None])[:, :, 0] / scale[:, :3]
    twice_sum = 2.0 * (shapes[:, 0] + shapes[:, 2])
    growth = -(change[:, 0] + change[:, 2]) / twice_sum
    covariance = np.linalg.inv(forms) / scale[:, :3, None] / scale[:, None, :3]
    error = np.sqrt(covariance[:, 0, 0] + 2.0 * covariance[:, 0, 2] + covariance[:, 2, 2]) / twice_sum
    few = np.count_nonzero(kept) < _ENOUGH_STARS  # a mode then follows chance clumps
    centre = float(np.median(growth[kept])) if few else _half_sample_mode(growth[kept])
    spread = _MAD_TO_SIGMA * float(np.median(np.abs(growth[kept] - centre)))
    alike = np.abs(growth - centre) < np.maximum(_SIZE_CLIP * np.maximum(spread, error), _LEAST_SIZE_CLIP)
    typical = float(np.median(misfit[kept]))
    spread = _MAD_TO_SIGMA * float(np.median(np.abs(misfit[kept] - typical)))
    return np.asarray(alike & (misfit < typical + max(_MISFIT_CLIP * spread, typical)))


@njit(cache=True, fastmath=_FAST_MATH)
def _profile(dx: float, dy: float, a: float, b: float, c: float, gamma: float, halo: float) -> float:
    """Moffat profile of unit amplitude and another, `halo` high and three times as wide, mean over a pixel.

    Two Gauss-Legendre nodes a direction within 1.5 FWHM, the pixel's centre beyond.
    """
    h = 2.0**gamma - 1.0
    form = a * dx * dx + 2.0 * b * dx * dy + c * dy * dy
    wide = halo * math.exp(-math.log(1.0 + h * form / _HALO_WIDTH**2) / gamma) if halo != 0.0 else 0.0
    if form > _INTEGRATED_FORM:
        return math.exp(-math.log(1.0 + h * form) / gamma) + wide
    node = 0.5 / math.sqrt(3.0)
    total = 0.0
    for j in range(2):
        v = dy + (2 * j - 1) * node
        for i in range(2):
            u = dx + (2 * i - 1) * node
            total += math.exp(-math.log(1.0 + h * (a * u * u + 2.0 * b * u * v + c * v * v)) / gamma)
    return 0.25 * total + wide


@njit(cache=True, fastmath=_FAST_MATH)
def _solve_linear_parts(
    pixels: NDArray[np.float64],
    variance: NDArray[np.float64],
    first: NDArray[np.intp],
    neighbour_x: NDArray[np.float64],
    neighbour_y: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    shapes: NDArray[np.float64],
    gamma: float,
    halo: float,
    fit_form: float,
    model_error: float,
    alone: bool,
    amplitude: NDArray[np.float64],
    sky: NDArray[np.float64],
    neighbours: NDArray[np.float64],
) -> None:
    """Least squares for star, sky and neighbours on each stamp (also on those without neighbours if `alone`).

    Writes the last three arguments.
    """
    n, side, _ = pixels.shape
    half = side // 2
    for s in range(n):
        a, b, c = shapes[s, 0], shapes[s, 1], shapes[s, 2]
        m = 2 + first[s + 1] - first[s]
        if m == 2 and not alone:
            continue
        columns = np.empty((m, side * side))
        weighted = np.empty((m, side * side))
        data = np.empty(side * side)
        n_used = 0
        for row in range(side):
            for column in range(side):
                dx, dy = column - half - x[s], row - half - y[s]
                if a * dx * dx + 2.0 * b * dx * dy + c * dy * dy > fit_form:
                    continue
                value = _profile(dx, dy, a, b, c, gamma, halo)
                weight = 1.0 / math.sqrt(variance[s, row, column] + (model_error * amplitude[s] * value) ** 2)
                columns[0, n_used], columns[1, n_used] = value, 1.0
                for k in range(2, m):
                    near = first[s] + k - 2
                    columns[k, n_used] = _profile(
                        column - half - neighbour_x[near], row - half - neighbour_y[near], a, b, c, gamma, halo
                    )
                for k in range(m):
                    weighted[k, n_used] = columns[k, n_used] * weight
                data[n_used] = pixels[s, row, column] * weight
                n_used += 1
        gram, right = np.empty((m, m)), np.empty(m)
        for i in range(m):
            right[i] = _dot(weighted[i], data, n_used)
            for j in range(i + 1):
                gram[i, j] = _dot(weighted[i], weighted[j], n_used)
        solution = _solve_positive(gram, right)
        amplitude[s], sky[s] = solution[0], solution[1]
        for k in range(2, m):
            if solution[k] > 0.0:
                near = first[s] + k - 2
                for row in range(side):
                    for column in range(side):
                        neighbours[s, row, column] += solution[k] * _profile(
                            column - half - neighbour_x[near], row - half - neighbour_y[near], a, b, c, gamma, halo
                        )


@njit(cache=True, fastmath=_FAST_MATH)
def _dot(left: NDArray[np.float64], right: NDArray[np.float64], n: int) -> float:
    total = 0.0
    for i in range(n):
        total += left[i] * right[i]
    return total


@njit(cache=True)
def _solve_positive(gram: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve with a positive matrix (its lower half, overwritten) by Cholesky, its scaled diagonal raised by 1e-6."""
    m = len(right)
    scale = np.empty(m)
    for i in range(m):
        scale[i] = 1.0 / math.sqrt(max(gram[i, i], 1e-300))
    for i in range(m):
        for j in range(i + 1):
            gram[i, j] *= scale[i] * scale[j]
        gram[i, i] += 1e-6  # neighbours within a pixel of each other cannot be told apart
    for i in range(m):
        for j in range(i + 1):
            total = gram[i, j]
            for k in range(j):
                total -= gram[i, k] * gram[j, k]
            if i == j:
                gram[i, i] = math.sqrt(max(total, 1e-12))
            else:
                gram[i, j] = total / gram[j, j]
    solution = np.empty(m)
    for i in range(m):
        total = right[i] * scale[i]
        for k in range(i):
            total -= gram[i, k] * solution[k]
        solution[i] = total / gram[i, i]
    for i in range(m - 1, -1, -1):
        total = solution[i]
        for k in range(i + 1, m):
            total -= gram[k, i] * solution[k]
        solution[i] = total / gram[i, i]
    return solution * scale


@njit(cache=True, fastmath=_FAST_MATH)
def _add_normal_equations(
    pixels: NDArray[np.float64],
    variance: NDArray[np.float64],
    neighbours: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    amplitude: NDArray[np.float64],
    sky: NDArray[np.float64],
    shapes: NDArray[np.float64],
    gamma: float,
    halo: float,
    fit_form: float,
    model_error: float,
    normal: NDArray[np.float64],
    right: NDArray[np.float64],
    misfit: NDArray[np.float64],
) -> None:
    """Of each star in (amplitude, x, y, sky, a, b, c, gamma, halo); misfit is the reduced chi-square; Huber weights."""
    n, side, _ = pixels.shape
    half = side // 2
    node = 0.5 / math.sqrt(3.0)
    h = 2.0**gamma - 1.0
    slope_of_h = math.log(2.0) * 2.0**gamma
    for s in range(n):
        a, b, c = shapes[s, 0], shapes[s, 1], shapes[s, 2]
        chi2, n_used = 0.0, 0
        j = np.zeros(9)
        for row in range(side):
            for column in range(side):
                dx, dy = column - half - x[s], row - half - y[s]
                form = a * dx * dx + 2.0 * b * dx * dy + c * dy * dy
                if form > fit_form or not variance[s, row, column] < np.inf:
                    continue
                n_nodes = 2 if form <= _INTEGRATED_FORM else 1
                j[:] = 0.0
                for ky in range(n_nodes):
                    v = dy + (2 * ky - 1) * node if n_nodes == 2 else dy
                    for kx in range(n_nodes):
                        u = dx + (2 * kx - 1) * node if n_nodes == 2 else dx
                        node_form = a * u * u + 2.0 * b * u * v + c * v * v
                        t = 1.0 + h * node_form
                        log_t = math.log(t)
                        value = math.exp(-log_t / gamma)
                        slope = -value * h / (gamma * t)
                        j[0] += value
                        j[1] -= slope * 2.0 * (a * u + b * v)
                        j[2] -= slope * 2.0 * (b * u + c * v)
                        j[4] += slope * u * u
                        j[5] += slope * 2.0 * u * v
                        j[6] += slope * v * v
                        j[7] += value * (log_t / gamma - slope_of_h * node_form / t) / gamma
                part = 1.0 / (n_nodes * n_nodes)
                j[0] *= part
                for i in (1, 2, 4, 5, 6, 7):
                    j[i] *= part * amplitude[s]
                j[8] = math.exp(-math.log(1.0 + h * form / _HALO_WIDTH**2) / gamma)
                j[0] += halo * j[8]
                j[8] *= amplitude[s]
                j[3] = 1.0
                model = amplitude[s] * j[0]
                difference = pixels[s, row, column] - neighbours[s, row, column] - sky[s] - model
                noise2 = variance[s, row, column] + (model_error * model) ** 2
                noise2 += (_NEIGHBOUR_ERROR * neighbours[s, row, column]) ** 2
                sigmas = abs(difference) / math.sqrt(noise2)
                weight = 1.0 / noise2
                if sigmas > _HUBER_SIGMA:
                    weight *= _HUBER_SIGMA / sigmas
                chi2 += weight * difference * difference
                n_used += 1
                for i in range(9):
                    right[s, i] += weight * j[i] * difference
                    for k in range(i + 1):
                        normal[s, i, k] += weight * j[i] * j[k]
        misfit[s] = chi2 / max(n_used, 1)
        for i in range(9):
            for k in range(i):
                normal[s, k, i] = normal[s, i, k]


# --- remainder -------------------------------------------------------------------------------------------------------


def _fit_remainder(stamps: _Stamps, shape: tuple[int, int], smooth: _Smooth) -> NDArray[np.float64]:
    """What stars of unit amplitude show beyond the smooth part: Legendre coefficients of pixels, (n_terms, k, k)."""
    model_error = _MODEL_ERRORS[-1]
    terms = _position_terms(stamps.column, stamps.row, shape, smooth.order)
    smooth, neighbours = _fit_linear_part(stamps, smooth, terms, model_error, True)
    shapes = np.einsum("nt,st->ns", terms, smooth.field)
    n, side, _ = stamps.pixels.shape
    values, noise2 = np.zeros((n, side, side)), np.zeros((n, side, side))
    weights_x, weights_y = sinc_weights(smooth.x - np.floor(smooth.x)), sinc_weights(smooth.y - np.floor(smooth.y))
    _centre_remainders(
        stamps.pixels,
        stamps.variance,
        neighbours,
        smooth.x,
        smooth.y,
        smooth.amplitude,
        smooth.sky,
        shapes,
        smooth.gamma,
        smooth.halo,
        model_error,
        weights_x,
        weights_y,
        values,
        noise2,
    )
    rings = _rings(side)
    mean_profile = np.zeros((1, side, side))
    _add_profiles(smooth.field[:, :1].T, smooth.gamma, smooth.halo, mean_profile)
    profile, corrected = np.zeros((side, side)), values
    coefficients = np.zeros((terms.shape[1], side, side))
    for _ in range(_N_REMAINDER_PASSES):
        fitted = profile + np.einsum("nt,tyx->nyx", terms, coefficients)
        used = np.abs(corrected - fitted) < _CLIP_SIGMA * np.sqrt(noise2)
        weights = np.where(used, 1.0 / noise2, 0.0)
        profile, corrected = _ring_profile(values, weights, mean_profile[0], rings)
        coefficients = _pixel_polynomials(corrected - profile, weights, terms, rings)
    coefficients[0] += profile
    return coefficients


def _rings(side: int) -> NDArray[np.intp]:
    """(k, k) distance from the middle pixel, rounded; the corners belong to the ring at the rim."""
    offset = np.arange(side) - side // 2
    return np.minimum(np.rint(np.hypot(offset[:, None], offset[None, :])), side // 2).astype(np.intp)


def _ring_profile(
    values: NDArray[np.float64], weights: NDArray[np.float64], model: NDArray[np.float64], rings: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean of each ring over all stars (k, k), 0 at the rim, and the stamps with sky and amplitude that go with it.

    Solved together with every star's sky and amplitude (eliminated), which the smooth part alone got wrong where wings
    are not as it says. All zero where the gain in chi-square is not significant: freedom in the wings costs accuracy.
    """
    n, ring = len(values), rings.ravel()
    n_free = int(np.count_nonzero(np.arange(ring.max() + 1) < _RIM_PART * ring.max()))
    w, v, flat = weights.reshape(n, -1), values.reshape(n, -1), model.ravel()
    own = np.stack([np.ones_like(flat), flat])  # sky, amplitude
    weighted = w * v
    gram_own = np.stack([np.einsum("np,bp->nb", w * one, own) for one in own], axis=1) + 1e-12 * np.eye(2)
    gram_ring = np.bincount(ring, w.sum(axis=0))[:n_free]
    cross = np.stack([_ring_sums(w * one, ring)[:, :n_free] for one in own], axis=1)
    right_own, right_ring = np.einsum("np,ap->na", weighted, own), np.bincount(ring, weighted.sum(axis=0))[:n_free]
    solved = np.linalg.solve(gram_own, np.concatenate((cross, right_own[:, :, None]), axis=2))
    gram = np.diag(gram_ring) - np.einsum("nak,nal->kl", cross, solved[:, :, :-1])
    right = right_ring - np.einsum("nak,na->k", cross, solved[:, :, -1])
    gram[np.diag_indices_from(gram)] += _RING_RIDGE * gram_ring
    if not gram_ring.all():  # a ring of which no star has a pixel that is used
        return np.zeros_like(model), values
    rings_fitted = np.linalg.solve(gram, right)
    if float(np.sum(rings_fitted * right)) < n_free + _RING_SIGMA * math.sqrt(2.0 * n_free):
        return np.zeros_like(model), values
    change = solved[:, :, -1] - np.einsum("nak,k->na", solved[:, :, :-1], rings_fitted)
    corrected = v - np.einsum("na,ap->np", change, own)
    profile = np.concatenate((rings_fitted, np.zeros(ring.max() + 1 - n_free)))
    return profile[rings], corrected.reshape(values.shape)


def _ring_sums(values: NDArray[np.float64], ring: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sums over the pixels of each ring, (n, n_pixels) to (n, n_rings)."""
    by_ring = np.argsort(ring, kind="stable")
    starts = np.searchsorted(ring[by_ring], np.arange(ring.max() + 1))
    return np.asarray(np.add.reduceat(values[:, by_ring], starts, axis=1))


def _pixel_polynomials(
    values: NDArray[np.float64], weights: NDArray[np.float64], terms: NDArray[np.float64], rings: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Weighted polynomial of each pixel, its terms shrunk to what their scatter in a ring has above their errors."""
    n_terms, side = terms.shape[1], values.shape[1]
    gram, right = np.zeros((side * side, n_terms, n_terms)), np.zeros((side * side, n_terms))
    _add_pixel_equations(values.reshape(len(values), -1), weights.reshape(len(values), -1), terms, gram, right)
    largest = np.einsum("ptt->pt", gram).max(axis=1)
    known = largest > 0
    ridge = np.where(known, _RIDGE * largest, 1.0)
    inverse = np.linalg.inv(gram + ridge[:, None, None] * np.eye(n_terms))
    plain = np.einsum("pts,ps->pt", inverse, right)
    error2 = np.einsum("ptt->pt", inverse)
    ring = rings.ravel()
    number = np.bincount(ring, known)
    prior = np.empty((side * side, n_terms))
    for t in range(n_terms):
        precision = np.where(known, 1.0 / error2[:, t], 0.0)
        total = np.maximum(np.bincount(ring, precision), np.finfo(np.float64).tiny)
        chi2 = np.bincount(ring, precision * plain[:, t] ** 2)
        excess = np.maximum(chi2 - number - np.sqrt(2.0 * number), 0.0)
        prior[:, t] = np.where(known, (excess / total)[ring], 0.0)
    # posterior mean: (gram + 1 / prior)^-1 right, without dividing by a prior of 0
    damped = np.eye(n_terms) + np.einsum("pts,pt->pts", gram, prior)
    solution = np.linalg.solve(damped, (prior * right)[:, :, None])[:, :, 0]
    return np.ascontiguousarray(solution.T.reshape(n_terms, side, side))


@njit(cache=True, fastmath=_FAST_MATH)
def _add_pixel_equations(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    terms: NDArray[np.float64],
    gram: NDArray[np.float64],
    right: NDArray[np.float64],
) -> None:
    n, n_pixels = values.shape
    n_terms = terms.shape[1]
    for s in range(n):
        for p in range(n_pixels):
            weight = weights[s, p]
            if weight == 0.0:
                continue
            for t in range(n_terms):
                product = weight * terms[s, t]
                right[p, t] += product * values[s, p]
                for k in range(t + 1):
                    gram[p, t, k] += product * terms[s, k]
    for p in range(n_pixels):
        for t in range(n_terms):
            for k in range(t):
                gram[p, k, t] = gram[p, t, k]


@njit(cache=True, fastmath=_FAST_MATH)
def _centre_remainders(
    pixels: NDArray[np.float64],
    variance: NDArray[np.float64],
    neighbours: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    amplitude: NDArray[np.float64],
    sky: NDArray[np.float64],
    shapes: NDArray[np.float64],
    gamma: float,
    halo: float,
    model_error: float,
    weights_x: NDArray[np.float64],
    weights_y: NDArray[np.float64],
    values: NDArray[np.float64],
    noise2: NDArray[np.float64],
) -> None:
    """Stamps less sky, neighbours and smooth part, over amplitude, shifted so that the star is in the middle.

    Bad pixels are as the smooth part says; what lies next to one has no weight (infinite `noise2`).
    """
    n, side, _ = pixels.shape
    half = side // 2
    for s in range(n):
        a, b, c = shapes[s, 0], shapes[s, 1], shapes[s, 2]
        raw, raw2 = np.zeros((side, side)), np.zeros((side, side))
        for row in range(side):
            for column in range(side):
                model = amplitude[s] * _profile(column - half - x[s], row - half - y[s], a, b, c, gamma, halo)
                near = neighbours[s, row, column]
                error2 = variance[s, row, column] + (model_error * model) ** 2 + (_NEIGHBOUR_ERROR * near) ** 2
                raw2[row, column] = error2 / amplitude[s] ** 2
                if variance[s, row, column] < np.inf:
                    raw[row, column] = (pixels[s, row, column] - near - sky[s] - model) / amplitude[s]
        floor_x, floor_y = math.floor(x[s]), math.floor(y[s])
        along = np.zeros((side, side))
        for row in range(side):
            for column in range(side):
                for k in range(TAPS):
                    source = column + floor_x + k - HALF_TAPS + 1
                    if 0 <= source < side:
                        along[row, column] += weights_x[s, k] * raw[row, source]
        for row in range(side):
            for column in range(side):
                for k in range(TAPS):
                    source = row + floor_y + k - HALF_TAPS + 1
                    if 0 <= source < side:
                        values[s, row, column] += weights_y[s, k] * along[source, column]
                near_row, near_column = row + floor_y, column + floor_x
                error2 = 0.0
                for j in range(2):
                    for i in range(2):
                        if 0 <= near_row + j < side and 0 <= near_column + i < side:
                            error2 = max(error2, raw2[near_row + j, near_column + i])
                        else:
                            error2 = np.inf
                noise2[s, row, column] = error2


# --- model -----------------------------------------------------------------------------------------------------------


def _psf_images(smooth: _Smooth, remainder: NDArray[np.float64], fwhm_pix: float) -> NDArray[np.float64] | None:
    """The PSF's Legendre coefficients, images (n_terms, k, k) of twice the order; None if it is absurd anywhere.

    They come from its values at Chebyshev nodes, the positions at which polynomials behave best.
    """
    order = 2 * smooth.order
    nodes = np.cos(np.pi * (np.arange(order + 3) + 0.5) / (order + 3)) if order else np.zeros(1)
    v, u = (axis.ravel() for axis in np.meshgrid(nodes, nodes, indexing="ij"))
    terms = _products(u, v, smooth.order)
    shapes = np.einsum("nt,st->ns", terms, smooth.field)
    half = min(max(math.ceil(_STAMP_FWHM * fwhm_pix), _MIN_HALF_PIX), _MAX_HALF_PIX)
    psfs = np.zeros((len(terms), 2 * half + 1, 2 * half + 1))
    rim = half - remainder.shape[1] // 2
    inner = slice(rim, 2 * half + 1 - rim)
    psfs[:, inner, inner] = np.einsum("nt,tyx->nyx", terms, remainder)
    beyond = np.max(np.abs(psfs))
    determinant = _determinant(shapes.T)
    typical = float(_determinant(smooth.field[:, 0]))
    if np.any(shapes[:, 0] <= 0) or np.any(np.abs(np.log(np.maximum(determinant / typical, 1e-9))) > _MAX_SIZE_CHANGE):
        return None
    if beyond > _MAX_REMAINDER:
        return None
    _add_profiles(shapes, smooth.gamma, smooth.halo, psfs)
    psfs /= psfs.sum(axis=(1, 2))[:, None, None]
    at_nodes = _products(u, v, order)
    projection = np.linalg.solve(np.einsum("nt,ns->ts", at_nodes, at_nodes), at_nodes.T)
    return np.einsum("tn,nyx->tyx", projection, psfs)


def _as_pixel_basis(images: NDArray[np.float64], order: int, shape: tuple[int, int], n_stars: int) -> PsfModel:
    basis, coefficients = _principal_components(images, order)
    model = PsfModel(basis, coefficients, order, shape, math.nan, n_stars)
    return replace(model, fwhm_pix=psf_fwhm_pix(model.at_centre()))


@njit(cache=True, fastmath=_FAST_MATH)
def _add_profiles(shapes: NDArray[np.float64], gamma: float, halo: float, images: NDArray[np.float64]) -> None:
    n, side, _ = images.shape
    half = side // 2
    for i in range(n):
        for row in range(side):
            for column in range(side):
                images[i, row, column] += _profile(
                    column - half, row - half, shapes[i, 0], shapes[i, 1], shapes[i, 2], gamma, halo
                )


def _principal_components(images: NDArray[np.float64], order: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Basis (b, k, k) and coefficients (b, t) of a polynomial whose coefficients are images (t, k, k).

    The mean PSF comes first, then the principal components over the image, as long as they hold 1e-4 of its peak.
    """
    # mean square of a product of Legendre polynomials over the square
    size = np.sqrt([1.0 / ((2 * i + 1) * (2 * j + 1)) for i, j in _degrees(order)])
    if len(images) == 1:
        return images, np.ones((1, 1))
    varying = images[1:] * size[1:, None, None]
    _, vectors = np.linalg.eigh(np.einsum("ayx,byx->ab", varying, varying))
    basis = [images[0]]
    coefficients = [np.eye(1, len(images))[0]]
    left = varying
    for vector in vectors.T[::-1]:
        if np.max(np.abs(left)) < _BASIS_PRECISION * images[0].max():
            break
        component = np.einsum("t,tyx->yx", vector, varying)
        left = left - vector[:, None, None] * component
        basis.append(component)
        coefficients.append(np.concatenate((np.zeros(1), vector / size[1:])))
    return np.array(basis), np.array(coefficients)

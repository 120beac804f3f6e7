"""Science image minus matched template: background, PSF, kernel, convolution, variance."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from transforms.numerics.background import BackgroundError, subtract_background, subtract_background_in_place
from transforms.numerics.bright_star_masks import residual_part, star_trails
from transforms.numerics.convolution import block_centres, convolve_spatially_varying
from transforms.numerics.cosmic_rays import find_cosmic_rays
from transforms.numerics.decorrelation import decorrelation_kernels, radius_of_part
from transforms.numerics.kernel_matching import (
    KERNEL_MODELS,
    KernelModel,
    KernelSolution,
    fit_matching_kernel,
    kernel_half_width_pix,
    select_kernel_stars,
)
from transforms.numerics.mask_growth import grown
from transforms.numerics.psf_grid import PSF_CELL_PIX, PsfGrid
from transforms.numerics.psf_modelling import (
    PsfModel,
    constant_psf,
    detect_sources,
    fit_psf_model,
    remeasured,
)
from transforms.numerics.saturated_cores import fill_saturated_cores, subtract_halos
from transforms.numerics.subtraction_quality import SubtractionQuality, measure_quality, require_a_subtraction

# Planes are made by numpy, not by numba: numpy asks for large pages, which cost a fifth.
_KERNEL_BLOCK_PIX = 32
_VARIANCE_BLOCK_PIX = 64
DECORRELATION_CELL_PIX = 256
_KERNEL_CORE_WEIGHT = 0.95  # of the kernel's absolute weight: nearer bad template pixels make a difference invalid
_KERNEL_WEIGHT_OF_CORES = 0.99  # saturated cores hold far more, and are known to some per cent only
_VARIANCE_WEIGHT = 0.999  # of the squared kernel's weight
_ISOLATION_FWHM = 2.0
_LEAST_SIDE_PIX = 64
_FILL_DEPTH_PIX = 20  # beyond the reach of the widest kernel


class UnusableImageError(ValueError):
    """An image that cannot be differenced; the message says which and what it holds."""


class LowCoverageError(ValueError):
    """Science image and template have too few good pixels in common."""


@dataclass(frozen=True, eq=False)
class ImagePlanes:
    """One image on the science pixel grid.

    Attributes
    ----------
    image : (ny, nx) floating, sky may be present, NaN where there are no data
    variance : (ny, nx) floating, square of the image's unit
    bad : (ny, nx) bool, pixels not to measure on: saturated, defective, hit, no data
    psf : (k, k) floating, k odd, sum 1, taken for the same everywhere; None to have it measured
    interpolated : how many times `warping.warp_exposure` interpolated its noise (`decorrelation.interpolation_count`);
        above 0 the variance is that before interpolation (`WarpedExposure.white_variance`)
    saturated : (ny, nx) bool, which of the bad pixels are saturated: trails start there; None if that is not known
    """

    image: NDArray[np.floating]
    variance: NDArray[np.floating]
    bad: NDArray[np.bool_]
    psf: NDArray[np.floating] | None = None
    interpolated: float = 0.0
    saturated: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class SubtractionParameters:
    """What may be tuned.

    Attributes
    ----------
    background_box_pix : side of the boxes of the background, >= 8
    spatial_order : highest order of the kernel's polynomial in position, 0 to 3
    background_order : order of the differential background, 0 to 2
    min_snr, max_snr : signal-to-noise ratio of kernel stars in the science image
    min_coverage : least fraction of pixels that are good in both images, 0 to 1
    """

    background_box_pix: int = 128
    spatial_order: int = 3
    background_order: int = 1
    min_snr: float = 20.0
    max_snr: float = 2000.0
    min_coverage: float = 0.1


@dataclass(frozen=True, eq=False)
class DifferenceResult:
    """Science image minus matched template.

    Attributes
    ----------
    difference : (ny, nx) float32, science image's unit, noise decorrelated; NaN where `invalid`
    variance : (ny, nx) float32, of a pixel, without covariance; infinite where `invalid`
    science : (ny, nx) float32, science image without its background; NaN where `invalid`
    matched_template : (ny, nx) float32, template convolved with the kernel, without sky; finite
    invalid : (ny, nx) bool, True where the science image has no data, or bad template pixels or the image's edge
        lie within the kernel's core; other bad science pixels keep their values
    residual_part : of the matched template's light that its subtraction leaves, see `bright_star_masks`
    high_variance : (ny, nx) bool, where that outweighs the noise
    trails : (ny, nx) bool, along bleeds, rows and columns of saturated stars; they kept their values
    cosmic_rays, template_cosmic_rays : (ny, nx) bool, hits that no mask knew; they kept their values
    template_noise_part : (cells_y, cells_x) float64, in cells of 256 pixels: the variance of sums of the matched
        template over the science PSF, by what the template's part of `variance` says; 1 for white noise
    psf : PSFs of the difference, float32: those of the science image but for the decorrelation
    science_psf : PSFs of the science image, float32
    decorrelation : (cells_y, cells_x, m, m) float64, sums 1: what the difference was convolved with in each cell of 256
        pixels
    kernel : the kernel solution, with its numbers of stars and chi-squares
    science_background, template_background : mean levels that were subtracted
    fwhm_science_pix, fwhm_template_pix : widths of the PSFs at the centre of the image
    n_psf_stars : stars of the science PSF; 0 when the PSF was given
    quality : what the difference has of its sources and of its noise
    """

    difference: NDArray[np.float32]
    variance: NDArray[np.float32]
    science: NDArray[np.float32]
    matched_template: NDArray[np.float32]
    invalid: NDArray[np.bool_]
    residual_part: float
    high_variance: NDArray[np.bool_]
    trails: NDArray[np.bool_]
    cosmic_rays: NDArray[np.bool_]
    template_cosmic_rays: NDArray[np.bool_]
    template_noise_part: NDArray[np.float64]
    psf: PsfGrid
    science_psf: PsfGrid
    decorrelation: NDArray[np.float64]
    kernel: KernelSolution
    science_background: float
    template_background: float
    fwhm_science_pix: float
    fwhm_template_pix: float
    n_psf_stars: int
    quality: SubtractionQuality

    @property
    def fwhm_ratio(self) -> float:
        """Science over template; below 1 the kernel had to sharpen the template."""
        return self.fwhm_science_pix / self.fwhm_template_pix


def subtract(
    science: ImagePlanes, template: ImagePlanes, parameters: SubtractionParameters = SubtractionParameters()
) -> DifferenceResult:
    """Subtract a template, matched in PSF, flux scale and background, from a science image.

    ``D = phi(x, y) * (S - K(x, y) * T - b(x, y))`` with the kernel of `kernel_matching.fit_matching_kernel`; the
    template is convolved also where the science image is sharper, and phi makes the noise white again
    (`decorrelation`), one kernel per cell of 256 pixels. b is fitted at the stars, where it also takes up what their
    far wings differ by, so what is left of a background between them is measured in boxes and subtracted too. The
    variance is that of both images, ``v_S + (K^2 * v_T) (sum K)^2 / sum K^2``.

    Parameters
    ----------
    science, template : planes of the same shape, the template already on the science pixel grid
    parameters : what may be tuned

    Returns
    -------
    DifferenceResult

    Raises
    ------
    UnusableImageError : shapes differ, an image is too small, has no good pixel, or is constant
    LowCoverageError : fewer than `min_coverage` of the pixels are good in both images
    BackgroundError, PsfEstimationError, TooFewKernelStarsError, BadKernelError : from the steps
    BadSubtractionError : the sources are not gone, or the noise is far beyond what the variances say
    """
    science, template = _native(science), _native(template)
    science_bad = _checked_bad("science image", science)
    template_bad = _checked_bad("template", template)
    if science.image.shape != template.image.shape:
        raise UnusableImageError(f"science image {science.image.shape} and template {template.image.shape} differ")
    coverage = 1.0 - np.count_nonzero(science_bad | template_bad) / science_bad.size
    if coverage < parameters.min_coverage:
        raise LowCoverageError(
            f"{coverage:.1%} of the pixels are good in both images, {parameters.min_coverage:.0%} are needed (science "
            f"image {np.mean(~science_bad):.1%}, template {np.mean(~template_bad):.1%})"
        )
    science_sky = subtract_background(science.image, science_bad, parameters.background_box_pix)
    template_sky = subtract_background(template.image, template_bad, parameters.background_box_pix)
    science_variance = _finite_plane(science.variance, science_bad)
    template_variance = _finite_plane(template.variance, template_bad)
    template_pixels = template_sky.image
    _fill(template_pixels, template_bad)

    sources = detect_sources(science_sky.image, science_variance, science_bad)
    model = _known_psf(science) or fit_psf_model(science_sky.image, science_variance, science_bad, sources)
    template_model = _known_psf(template)
    if template_model is None:
        template_sources = remeasured(sources, template_pixels, template_variance, template_bad)
        template_model = fit_psf_model(template_pixels, template_variance, template_bad, template_sources)
    cores = template_bad & _saturated(template)
    saturated_stars = fill_saturated_cores(
        template_pixels, template_variance, template_bad, cores, template_model.on_cells()
    )
    half = kernel_half_width_pix(model.fwhm_pix, template_model.fwhm_pix)
    near_bad_template = grown(template_bad, half // 2, outside=True)
    isolation_pix = _ISOLATION_FWHM * model.fwhm_pix
    stars, ripple_stars = (
        select_kernel_stars(
            sources,
            science_bad,
            near_bad_template,
            half,
            isolation_pix,
            parameters.min_snr,
            parameters.max_snr,
            for_ripples=for_ripples,
        )
        for for_ripples in (False, True)
    )
    kernel = fit_matching_kernel(
        science_sky.image,
        science_variance,
        science_bad,
        template_pixels,
        template_variance,
        near_bad_template,
        sources.x[stars],
        sources.y[stars],
        model.fwhm_pix,
        template_model.fwhm_pix,
        parameters.spatial_order,
        parameters.background_order,
        _kernel_models(parameters.spatial_order),
        (sources.x[ripple_stars], sources.y[ripple_stars]),
    )
    kernels = _kernels_of_blocks(kernel, _KERNEL_BLOCK_PIX)
    matched = convolve_spatially_varying(template_pixels, kernels, _KERNEL_BLOCK_PIX)
    variance = convolve_spatially_varying(template_variance, _passed_variance(kernel), _VARIANCE_BLOCK_PIX)
    variance += science_variance
    invalid = grown(template_bad, _core_radius_pix(kernels, _KERNEL_CORE_WEIGHT), outside=True)
    invalid |= grown(cores, _core_radius_pix(kernels, _KERNEL_WEIGHT_OF_CORES))
    unusable = np.empty_like(invalid)
    _mark_unmeasured(science.image, science.variance, science_bad, invalid, unusable)
    difference = np.subtract(science_sky.image, matched, out=science_sky.image)  # a new plane costs as much as a pass
    kernel.subtract_background(difference)
    with contextlib.suppress(BackgroundError):  # too few pixels are left to measure what is left of it
        subtract_background_in_place(difference, unusable, parameters.background_box_pix)
    subtract_halos(difference, matched, variance, unusable, saturated_stars, model.fwhm_pix)
    part = residual_part(difference, variance, matched, unusable)
    noise2 = template_pixels  # their plane is free now
    science_pixels, high_variance = np.empty_like(difference), np.empty_like(invalid)
    _fill_with_residual(difference, matched, variance, invalid, part, science_pixels, noise2, high_variance)
    trails = star_trails(difference, noise2, _saturated(science, template), unusable, model.fwhm_pix)
    unusable |= trails
    cosmic_rays = find_cosmic_rays(difference, noise2, science_pixels, unusable, model.at_centre())
    np.negative(difference, out=difference)
    template_cosmic_rays = find_cosmic_rays(difference, noise2, matched, unusable, model.at_centre())
    np.negative(difference, out=difference)
    unusable |= cosmic_rays
    decorrelation = _decorrelation_of_cells(kernel, science_variance, template_variance, template.interpolated)
    white = convolve_spatially_varying(
        difference, decorrelation, DECORRELATION_CELL_PIX, left_out=unusable, out=noise2
    )  # likewise
    quality = measure_quality(white, variance, science_pixels, matched, unusable)
    require_a_subtraction(quality)
    science_psf = model.on_cells()
    _finish_planes(difference, unusable, invalid, white, science_pixels, variance)
    return DifferenceResult(
        difference=white,
        variance=variance,
        science=science_pixels,
        matched_template=matched,
        invalid=invalid,
        residual_part=part,
        high_variance=high_variance,
        trails=trails,
        cosmic_rays=cosmic_rays,
        template_cosmic_rays=template_cosmic_rays,
        template_noise_part=_noise_in_psf_sums(kernel, science_psf),
        psf=_decorrelated_psf(science_psf, decorrelation, kernel.shape),
        science_psf=science_psf,
        decorrelation=decorrelation,
        kernel=kernel,
        science_background=science_sky.level,
        template_background=template_sky.level,
        fwhm_science_pix=model.fwhm_pix,
        fwhm_template_pix=template_model.fwhm_pix,
        n_psf_stars=model.n_stars,
        quality=quality,
    )


def _kernel_models(highest_order: int) -> tuple[KernelModel, ...]:
    """What to choose from, with no polynomial above an order; each once."""
    capped = (KernelModel(model.basis, min(model.spatial_order, highest_order)) for model in KERNEL_MODELS)
    return tuple(dict.fromkeys(capped))


def _native(planes: ImagePlanes) -> ImagePlanes:
    """Image and variance in this machine's byte order, as floats that can be computed with."""
    image, variance = (np.asarray(plane) for plane in (planes.image, planes.variance))
    image, variance = (plane.astype(_computed_type(plane.dtype), copy=False) for plane in (image, variance))
    return replace(planes, image=image, variance=variance)


def _computed_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")


def _checked_bad(name: str, planes: ImagePlanes) -> NDArray[np.bool_]:
    """All pixels not to measure on; refuses what cannot be differenced."""
    image = planes.image
    if image.ndim != 2 or not image.shape == planes.variance.shape == np.shape(planes.bad):
        raise UnusableImageError(
            f"{name}: planes differ in shape: image {image.shape}, variance {planes.variance.shape}, "
            f"bad {np.shape(planes.bad)}"
        )
    if planes.saturated is not None and np.shape(planes.saturated) != image.shape:
        raise UnusableImageError(f"{name}: saturated pixels {np.shape(planes.saturated)}, image {image.shape}")
    if min(image.shape) < _LEAST_SIDE_PIX:
        raise UnusableImageError(f"{name} of shape {image.shape} is smaller than {_LEAST_SIDE_PIX} pixels")
    bad = np.array(planes.bad, dtype=np.bool_)
    n_finite, n_noisy, lowest, highest = _mark_bad(image, planes.variance, bad)
    n_good = bad.size - np.count_nonzero(bad)
    if n_good == 0:
        raise UnusableImageError(
            f"{name} has no good pixel: {n_finite / bad.size:.1%} are finite, {n_noisy / bad.size:.1%} have a "
            f"positive, finite variance, {np.mean(planes.bad):.1%} are marked bad"
        )
    if lowest == highest:
        raise UnusableImageError(f"all {n_good} good pixels of the {name} have the value {lowest:g}")
    return bad


@njit(cache=True)
def _mark_bad(
    image: NDArray[np.floating], variance: NDArray[np.floating], bad: NDArray[np.bool_]
) -> tuple[int, int, float, float]:
    """Mark in `bad` what cannot be measured on; numbers of finite and noisy pixels, extremes of the good ones."""
    n_finite, n_noisy = 0, 0
    lowest, highest = np.inf, -np.inf
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            finite = np.isfinite(image[y, x])
            noisy = (variance[y, x] > 0) & (variance[y, x] < np.inf)
            n_finite += finite
            n_noisy += noisy
            if finite & noisy & (not bad[y, x]):
                lowest, highest = min(lowest, image[y, x]), max(highest, image[y, x])
            else:
                bad[y, x] = True
    return n_finite, n_noisy, lowest, highest


def _finite_plane(variance: NDArray[np.floating], bad: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Variance with the median of the good pixels where it is unusable; no copy if all is well."""
    if variance.dtype == np.float32 and _is_noisy_everywhere(variance):
        return np.asarray(variance)
    sample = variance[::4, ::4][~bad[::4, ::4]]
    plane = np.empty(variance.shape, dtype=np.float32)
    _copy_noisy(variance, np.float32(np.median(sample if len(sample) else variance[~bad])), plane)
    return plane


@njit(cache=True)
def _is_noisy_everywhere(variance: NDArray[np.floating]) -> bool:
    for y in range(variance.shape[0]):
        usable = True
        for x in range(variance.shape[1]):
            usable &= (variance[y, x] > 0) & (variance[y, x] < np.inf)
        if not usable:
            return False
    return True


@njit(cache=True)
def _copy_noisy(variance: NDArray[np.floating], fill: float, plane: NDArray[np.float32]) -> None:
    for y in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            value = np.float32(variance[y, x])
            plane[y, x] = value if (value > 0) & (value < np.inf) else fill


def _saturated(*images: ImagePlanes) -> NDArray[np.bool_]:
    known = [image.saturated for image in images if image.saturated is not None]
    return np.logical_or.reduce(known) if known else np.zeros(images[0].image.shape, dtype=np.bool_)


def _known_psf(planes: ImagePlanes) -> PsfModel | None:
    ny, nx = planes.image.shape
    return None if planes.psf is None else constant_psf(planes.psf, (ny, nx))


def _kernels_of_blocks(kernel: KernelSolution, block_pix: int) -> NDArray[np.float64]:
    x, y = block_centres(kernel.shape, block_pix)
    kernels = kernel.kernels_at(x.ravel(), y.ravel())
    return kernels.reshape(*x.shape, *kernels.shape[1:])


def _decorrelation_of_cells(
    kernel: KernelSolution,
    science_variance: NDArray[np.float32],
    template_variance: NDArray[np.float32],
    interpolated: float,
) -> NDArray[np.float64]:
    cells = _kernels_of_blocks(kernel, DECORRELATION_CELL_PIX)
    found = decorrelation_kernels(
        cells.reshape(-1, *cells.shape[2:]),
        _cell_medians(science_variance),
        _cell_medians(template_variance),
        interpolated=interpolated,
    )
    return found.reshape(*cells.shape[:2], *found.shape[1:])


def _cell_medians(plane: NDArray[np.float32]) -> NDArray[np.float64]:
    """Median of every fourth row and column of each cell, row by row."""
    ny, nx = plane.shape
    side = DECORRELATION_CELL_PIX
    corners = [(y, x) for y in range(0, ny, side) for x in range(0, nx, side)]
    return np.array([np.median(plane[y : y + side : 4, x : x + side : 4]) for y, x in corners], dtype=np.float64)


def _passed_variance(kernel: KernelSolution) -> NDArray[np.float64]:
    """What the template's variance is convolved with: squared kernels of the sum of the kernel's sum squared.

    Their wings, a thousandth, are cut off: squares need a quarter of the kernel's pixels.
    """
    squares = np.square(_kernels_of_blocks(kernel, _VARIANCE_BLOCK_PIX))
    side = squares.shape[2]
    cut = side // 2 - radius_of_part(squares.mean(axis=(0, 1)), _VARIANCE_WEIGHT)
    squares = squares[:, :, cut : side - cut, cut : side - cut]
    squares *= kernel.kernel_sum**2 / np.sum(squares, axis=(2, 3), keepdims=True)
    return squares


@njit(cache=True)
def _mark_unmeasured(
    image: NDArray[np.floating],
    variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    invalid: NDArray[np.bool_],
    unusable: NDArray[np.bool_],
) -> None:
    """Mark in `invalid` where there are no data; fill `unusable`: that or bad."""
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            invalid[y, x] |= not (np.isfinite(image[y, x]) & np.isfinite(variance[y, x]))
            unusable[y, x] = bad[y, x] | invalid[y, x]


@njit(cache=True)
def _fill_with_residual(
    difference: NDArray[np.float32],
    matched: NDArray[np.float32],
    variance: NDArray[np.float32],
    invalid: NDArray[np.bool_],
    part: float,
    science: NDArray[np.float32],
    noise2: NDArray[np.float32],
    high_variance: NDArray[np.bool_],
) -> None:
    """Science image without background; variance with what bright stars leave; where the latter outweighs the noise."""
    for y in range(difference.shape[0]):
        for x in range(difference.shape[1]):
            science[y, x] = difference[y, x] + matched[y, x]
            residual = (np.float32(part) * matched[y, x]) ** 2
            noise2[y, x] = variance[y, x] + residual
            high_variance[y, x] = (residual > variance[y, x]) & (not invalid[y, x])


@njit(cache=True)
def _finish_planes(
    difference: NDArray[np.float32],
    unusable: NDArray[np.bool_],
    invalid: NDArray[np.bool_],
    white: NDArray[np.float32],
    science: NDArray[np.float32],
    variance: NDArray[np.float32],
) -> None:
    """Unusable pixels keep their difference, invalid ones nothing."""
    for y in range(difference.shape[0]):
        for x in range(difference.shape[1]):
            if unusable[y, x]:
                white[y, x] = difference[y, x]
            if invalid[y, x]:
                white[y, x] = science[y, x] = np.nan
                variance[y, x] = np.inf


def _decorrelated_psf(psf: PsfGrid, kernels: NDArray[np.float64], shape: tuple[int, int]) -> PsfGrid:
    """PSF of each cell convolved with the kernel of the larger cell it lies in."""
    rows, columns = (np.arange(0, side, PSF_CELL_PIX) for side in shape)
    side = psf.images.shape[2]
    convolved = np.empty((len(rows), len(columns), side, side), dtype=np.float32)
    for row, y in enumerate(rows):
        images = psf.of_cells[psf.cells_at(columns, np.full(len(columns), y))]
        white = kernels[y // DECORRELATION_CELL_PIX, columns // DECORRELATION_CELL_PIX]
        found = fftconvolve(images.astype(np.float64), white, mode="same", axes=(1, 2))
        convolved[row] = found / found.sum(axis=(1, 2), keepdims=True)
    return PsfGrid(convolved)


def _noise_in_psf_sums(kernel: KernelSolution, psf: PsfGrid) -> NDArray[np.float64]:
    """Variance of PSF sums over the matched template by that of white noise, in cells of the decorrelation.

    A sum of template noise over a PSF P after the kernel K is one over their correlation: sum((P * K)^2), where white
    noise of the variance that the template adds to the difference has r^2 sum(P^2), r the sum of the kernel.
    """
    x, y = block_centres(kernel.shape, DECORRELATION_CELL_PIX)
    kernels = _kernels_of_blocks(kernel, DECORRELATION_CELL_PIX)
    part = np.empty(x.shape)
    for cell in np.ndindex(x.shape):
        image = psf.at(float(x[cell]), float(y[cell])).astype(np.float64)
        seen = fftconvolve(image, kernels[cell][::-1, ::-1])
        part[cell] = np.sum(np.square(seen)) / (kernel.kernel_sum**2 * np.sum(np.square(image)))
    return part


def _core_radius_pix(kernels: NDArray[np.float64], part: float) -> int:
    """Half side of the centred square with a part of the absolute weight of the mean kernel."""
    return radius_of_part(np.abs(kernels.mean(axis=(0, 1))), part)


def _fill(image: NDArray[np.float32], missing: NDArray[np.bool_]) -> None:
    """Replace missing pixels from the rim inwards: like their neighbours near it, 0 far from it.

    A zero in a saturated core would leak through the kernel's wings with the full brightness of the star.
    """
    rows, columns = np.nonzero(missing)
    image[rows, columns] = 0.0
    _fill_from_rim(image, missing.astype(np.uint8), rows, columns, _FILL_DEPTH_PIX)


@njit(cache=True)
def _fill_from_rim(
    image: NDArray[np.float32],
    depth: NDArray[np.uint8],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    n_passes: int,
) -> None:
    """`depth` is 0 for known pixels and becomes the pass in which a pixel was filled, plus one."""
    ny, nx = image.shape
    n_left = len(rows)
    for step in range(1, n_passes + 1):
        n_open = 0
        for index in range(n_left):
            row, column = rows[index], columns[index]
            total, n_known = 0.0, 0
            for y in range(max(row - 1, 0), min(row + 2, ny)):
                for x in range(max(column - 1, 0), min(column + 2, nx)):
                    known = depth[y, x] == 0 or 1 < depth[y, x] <= step  # not what this pass filled
                    if known:
                        total += image[y, x]
                        n_known += 1
            if n_known > 0:
                image[row, column] = total / n_known
                depth[row, column] = step + 1
            else:
                rows[n_open], columns[n_open] = row, column
                n_open += 1
        n_left = n_open

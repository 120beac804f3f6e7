"""SubtractTemplates: science image minus matched template, one element per detector of a visit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from threadpoolctl import threadpool_limits

from schemas.claim_check import ImageStore
from schemas.elements import DetectorVisit, StageElement, SubtractedExposure
from schemas.exposures import MASK_BITS, Exposure, mask_bits, read_exposure
from schemas.manifests import Visit
from transforms.failures import FAILED, StageFn, failed_in, failure_of
from transforms.metrics import DETECTORS_SUBTRACTED
from transforms.numerics.decorrelation import interpolation_count
from transforms.numerics.differencing import (
    DECORRELATION_CELL_PIX,
    DifferenceResult,
    ImagePlanes,
    SubtractionParameters,
    subtract,
)
from transforms.numerics.kernel_matching import POOR_VALIDATION_CHI2, KernelSolution
from transforms.numerics.subtraction_quality import SubtractionQuality
from transforms.numerics.warping import CoordinateGrid, warp_exposure, wcs_coordinate_grid

STAGE = "subtraction"
UNUSABLE_PLANES = ("BAD", "SAT", "CR", "NO_DATA", "SPIKE", "SAT_TEMPLATE", "BAD_TEMPLATE")
POOR_RESIDUAL, POOR_TYPICAL_RESIDUAL = 0.2, 0.1
POOR_SUM_VARIATION, SURE_SIGMA = 0.1, 5.0
LEAST_NOISE_RATIO, MOST_NOISE_RATIO = 0.8, 1.25
_CARRIED_OVER = {"SAT": "SAT_TEMPLATE", "BAD": "BAD_TEMPLATE", "CR": "CR_TEMPLATE", "INJECTED": "INJECTED_TEMPLATE"}


class NoTemplateError(ValueError):
    """The field has no template."""


@dataclass(frozen=True)
class SubtractionConfig:
    """How a template is matched and subtracted."""

    background_box_pix: int = Field(default=128, ge=8, le=1024)
    kernel_spatial_order: int = Field(default=3, ge=0, le=3)
    background_order: int = Field(default=1, ge=0, le=2)
    min_star_snr: float = Field(default=20.0, gt=0)
    max_star_snr: float = Field(default=2000.0, gt=0)
    min_coverage: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _some_stars_are_left(self) -> SubtractionConfig:
        if self.min_star_snr >= self.max_star_snr:
            raise ValueError(f"min_star_snr {self.min_star_snr} must lie below max_star_snr {self.max_star_snr}")
        return self

    def parameters(self) -> SubtractionParameters:
        return SubtractionParameters(
            background_box_pix=self.background_box_pix,
            spatial_order=self.kernel_spatial_order,
            background_order=self.background_order,
            min_snr=self.min_star_snr,
            max_snr=self.max_star_snr,
            min_coverage=self.min_coverage,
        )


class SubtractionResult(NamedTuple):
    """`good`: SubtractedExposure; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class SubtractTemplates(beam.PTransform):
    """Read a science image and its template, warp, match the PSF, subtract, store the pixels.

    Input: DetectorVisit. Output `good`: SubtractedExposure, one per detector that could be
    subtracted; difference and science pixels are in the image store by then. `failed`: one record per
    detector that could not, with the reason. Order: as it comes; a duplicate gives the same pixels
    again. No state.
    """

    def __init__(self, config: SubtractionConfig, image_store: ImageStore) -> None:
        super().__init__()
        self.stage = _SubtractDetectorFn(config, image_store)

    def expand(self, detectors: beam.PCollection) -> SubtractionResult:
        outputs = detectors | "SubtractDetector" >> beam.ParDo(self.stage).with_output_types(StageElement).with_outputs(
            FAILED, main="good"
        )
        return SubtractionResult(outputs.good, outputs[FAILED])


class _SubtractDetectorFn(StageFn):
    stage = STAGE

    def __init__(self, config: SubtractionConfig, image_store: ImageStore) -> None:
        self.config = config
        self.image_store = image_store

    def setup(self) -> None:
        threadpool_limits(1)  # one BLAS thread: sums must run in the same order everywhere

    def work(self, element: DetectorVisit) -> Iterator[Any]:
        started_at, started = time.time(), time.perf_counter()
        try:
            exposure = subtract_detector(element, self.config, started_at)
            write_to_store(exposure, self.image_store)
        except Exception as error:  # whatever one detector's pixels do must not stop the others
            lost = "all alerts of the detector"
            failure = failure_of(error, STAGE, element.visit.visit, element.detector, lost=lost)
            yield from failed_in(element.visit, failure)
            return
        exposure.seconds["subtraction"] = time.perf_counter() - started
        DETECTORS_SUBTRACTED.inc()
        yield exposure


def subtract_detector(element: DetectorVisit, config: SubtractionConfig, started_at: float) -> SubtractedExposure:
    """Subtract one detector.

    Raises
    ------
    NoTemplateError, ExposureError, ValueError
        The reason why it cannot be subtracted.
    """
    begin = time.perf_counter()
    science = read_exposure(element.images.science)
    if element.images.template is None:
        raise NoTemplateError(f"no_template: no {element.visit.band} template for detector {element.detector}")
    template = read_exposure(element.images.template)
    read_seconds = time.perf_counter() - begin
    grid = wcs_coordinate_grid(science.wcs, template.wcs, science.image.shape)
    exposure = subtract_exposures(element.visit, element.detector, science, template, grid, config)
    return replace(
        exposure, seconds={"reading": read_seconds}, started_at=started_at, announced_at=element.announced_at
    )


def subtract_exposures(
    visit: Visit, detector: int, science: Exposure, template: Exposure, grid: CoordinateGrid, config: SubtractionConfig
) -> SubtractedExposure:
    """Subtract a template from a science image, both in memory; `grid` says where science pixels lie in the template.

    Raises
    ------
    ValueError
        The reason why it cannot be subtracted.
    """
    warped = warp_exposure(
        template.image, template.variance, template.mask, grid, science.image.shape, mask_bits("NO_DATA")
    )
    template_bad = warped.no_data | ((warped.mask & mask_bits("BAD", "SAT", "CR")) != 0)
    interpolated = template.interpolated + interpolation_count(warped.variance, warped.white_variance)
    science_bad = (science.mask & mask_bits("BAD", "SAT", "CR", "NO_DATA")) != 0
    result = subtract(
        ImagePlanes(
            science.image,
            science.variance,
            science_bad,
            science.psf,
            saturated=(science.mask & mask_bits("SAT")) != 0,
        ),
        ImagePlanes(
            warped.image,
            warped.white_variance,
            template_bad,
            template.psf,
            interpolated=interpolated,
            saturated=(warped.mask & mask_bits("SAT")) != 0,
        ),
        config.parameters(),
    )
    mask = _joined_mask(science, warped.mask, result)
    return SubtractedExposure(
        visit=visit,
        detector=detector,
        science=result.science,
        science_variance=science.variance,
        difference=result.difference,
        difference_variance=result.variance,
        matched_template=result.matched_template,
        template_variance=_template_variance(result, science.variance),
        mask=mask,
        psf=result.psf.images,
        science_psf=result.science_psf.images,
        wcs=science.wcs,
        seconds={},
        started_at=0.0,
        notes=(
            *science.notes,
            *(f"template: {note}" for note in template.notes),
            *_quality_notes(result.kernel, result.quality),
            *((f"no PSF: measured on {result.n_psf_stars} stars",) if result.n_psf_stars else ()),
        ),
        residual_part=result.residual_part,
    )


def _template_variance(result: DifferenceResult, science_variance: np.ndarray) -> np.ndarray:
    """Variance of the matched template, infinite where there is no difference.

    Its noise is not white: this is the variance of the white noise that gives PSF fluxes the error they have.
    """
    variance = np.full(science_variance.shape, np.inf, dtype=np.float32)
    np.subtract(result.variance, science_variance, out=variance, where=~result.invalid)
    np.maximum(variance, 0.0, out=variance)
    side = DECORRELATION_CELL_PIX
    for (row, column), part in np.ndenumerate(result.template_noise_part):
        variance[row * side : (row + 1) * side, column * side : (column + 1) * side] *= np.float32(part)
    return variance


def _quality_notes(kernel: KernelSolution, quality: SubtractionQuality) -> Iterator[str]:
    """What is not bad enough to refuse a difference; without figures, as notes are counted by their text."""
    if kernel.is_poor:
        yield f"poor matching kernel: reduced chi2 above {POOR_VALIDATION_CHI2} on held-out stars"
    if kernel.sum_variation > max(POOR_SUM_VARIATION, SURE_SIGMA * kernel.sum_variation_error):
        yield f"flux ratio to the template varies over the image by more than {POOR_SUM_VARIATION:.0%}"
    if quality.residual_fraction > POOR_RESIDUAL or quality.typical_residual > POOR_TYPICAL_RESIDUAL:
        yield "poor subtraction: too much of the sources' light is left in the difference"
    if quality.noise_ratio < LEAST_NOISE_RATIO:
        yield f"noise of the difference below {LEAST_NOISE_RATIO:g} of what the variances say"
    if quality.noise_ratio > MOST_NOISE_RATIO:
        yield f"noise of the difference above {MOST_NOISE_RATIO:g} of what the variances say"


def _joined_mask(science: Exposure, template_mask: np.ndarray, result: DifferenceResult) -> np.ndarray:
    mask = science.mask.copy()
    for plane, carried in _CARRIED_OVER.items():
        mask[(template_mask >> MASK_BITS[plane]) & 1 == 1] |= np.int32(1 << MASK_BITS[carried])
    for plane, pixels in {
        "NO_DATA": result.invalid,
        "HIGH_VARIANCE": result.high_variance,
        "SPIKE": result.trails,
        "CR": result.cosmic_rays,
        "CR_TEMPLATE": result.template_cosmic_rays,
    }.items():
        mask[pixels] |= np.int32(mask_bits(plane))
    return mask


def write_to_store(exposure: SubtractedExposure, store: ImageStore) -> None:
    """Difference and science pixels for forced photometry; what must not be used has infinite variance."""
    unusable = (exposure.mask & mask_bits(*UNUSABLE_PLANES)) != 0
    planes = [
        np.nan_to_num(exposure.difference, nan=0.0, posinf=0.0, neginf=0.0),
        np.where(unusable, np.float32(np.inf), exposure.difference_variance),
        np.nan_to_num(exposure.science, nan=0.0, posinf=0.0, neginf=0.0),
        np.where(unusable, np.float32(np.inf), exposure.science_variance),
    ]
    header = exposure.wcs.to_header(relax=True)
    store.write(
        exposure.visit.visit, exposure.detector, planes, header.tostring(sep="\n"), exposure.psf, exposure.science_psf
    )

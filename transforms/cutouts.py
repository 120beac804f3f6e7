"""EncodeCutouts: science, template and difference stamps of every source, as finished FITS bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from pydantic.dataclasses import dataclass

from schemas.claim_check import write_blobs
from schemas.cutouts import Content, CutImage, CutoutError, Cutouts, cut_out, cutout_sides, local_tangents
from schemas.elements import DetectedSources, StageElement, VisitPart
from schemas.exposures import MASK_BITS
from schemas.framing import pack
from transforms.failures import FAILED, StageFn, failed_in, failure_of
from transforms.numerics.psf_grid import PsfGrid
from transforms.packaging import cutout_file

STAGE = "cutouts"


@dataclass(frozen=True)
class CutoutConfig:
    """What a cutout holds: `complete`, or `strict`, which is LSST's file to the byte (no mask, no CTYPE)."""

    content: Content = "complete"


class CutoutResult(NamedTuple):
    """`good`: DetectedSources; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class EncodeCutouts(beam.PTransform):
    """Write the cutouts of an exposure's sources to the cutout store, where packaging finds them.

    Input and output `good`: DetectedSources, and after each the VisitPart that says it was processed;
    `failed`: exposures whose cutouts, or some of them, could not be made (their alerts go without). Order: as it
    comes; a duplicate writes nothing new. No state.
    """

    def __init__(self, config: CutoutConfig, folder: str) -> None:
        super().__init__()
        self.stage = _WriteCutoutsFn(config, folder)

    def expand(self, detected: beam.PCollection) -> CutoutResult:
        outputs = detected | "WriteCutouts" >> beam.ParDo(self.stage).with_output_types(StageElement).with_outputs(
            FAILED, main="good"
        )
        return CutoutResult(outputs.good, outputs[FAILED])


class _WriteCutoutsFn(StageFn):
    stage = STAGE

    def __init__(self, config: CutoutConfig, folder: str) -> None:
        self.config = config
        self.folder = folder

    def work(self, detected: DetectedSources) -> Iterator[Any]:
        started = time.perf_counter()
        exposure, n = detected.exposure, len(detected.dia_sources)
        error: Exception
        try:
            path = cutout_file(self.folder, exposure.visit.visit, exposure.detector)
            cutouts = encode_cutouts(detected, self.config.content)
            # Empty bytes stand for no stamp.
            write_blobs(path, detected.dia_sources["diaSourceId"], [files or (b"",) * 3 for files in cutouts.files])
            lost, error = len(cutouts.refused), CutoutError(next(iter(cutouts.refused.values()), ""))
        except Exception as problem:  # an alert without cutouts is better than none
            lost, error = n, problem
        if lost:
            what = f"cutouts of {lost} of {n} alerts"
            failure = failure_of(error, STAGE, exposure.visit.visit, exposure.detector, lost=what)
            yield from failed_in(exposure.visit, failure)
        detected.seconds["cutouts"] = time.perf_counter() - started
        yield detected
        yield VisitPart(exposure.visit.visit, exposure.visit.midpoint_mjd_tai, detector_part(detected))


def detector_part(detected: DetectedSources) -> bytes:
    """The part that says a detector was processed."""
    exposure = detected.exposure
    return detector_account(
        exposure.detector,
        detected.n_detected,
        len(detected.dia_sources),
        exposure.started_at,
        announced_at=exposure.announced_at,
        rejected=detected.rejected,
        ss_matches=len(detected.ss_sources),
        seconds=detected.seconds,
        notes=exposure.notes,
        sky_sources=detected.sky_sources,
    )


def detector_account(
    detector: int,
    detected: int,
    selected: int,
    started_at: float,
    *,
    announced_at: float | None = None,
    rejected: Mapping[str, int] = MappingProxyType({}),
    ss_matches: int = 0,
    seconds: Mapping[str, float] = MappingProxyType({}),
    notes: tuple[str, ...] = (),
    sky_sources: Mapping[str, float] = MappingProxyType({}),
) -> bytes:
    """What the ledger is to know of one detector whose work ends now, as a part of its visit."""
    header = {
        "kind": "detector",
        "detector": detector,
        "detected": detected,
        "selected": selected,
        "rejected": dict(rejected),
        "ss_matches": ss_matches,
        "seconds": dict(seconds),
        "announced_at": announced_at,
        "started_at": started_at,
        "ended_at": time.time(),
        "notes": list(notes),
        "sky_sources": dict(sky_sources),
    }
    return pack(header)


def encode_cutouts(detected: DetectedSources, content: Content = "complete") -> Cutouts:
    """Difference, science and template stamps of each source."""
    exposure, sources = detected.exposure, detected.dia_sources
    x, y = (sources[name].astype(np.float64) for name in ("x", "y"))
    psf, science_psf = PsfGrid(exposure.psf), PsfGrid(exposure.science_psf)
    images = [
        CutImage(image, variance, psfs.of_cells, psfs.cells_at(x, y))
        for image, variance, psfs in (
            (exposure.difference, exposure.difference_variance, psf),
            (exposure.science, exposure.science_variance, science_psf),
            (exposure.matched_template, exposure.template_variance, science_psf),
        )
    ]
    return cut_out(
        images,
        exposure.mask,
        x,
        y,
        cutout_sides(sources["bboxSize"]),
        local_tangents(exposure.wcs, x, y),
        exposure.visit.rotation_deg,
        MASK_BITS,
        content,
    )

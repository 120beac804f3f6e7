"""EncodeCutouts: science, template and difference stamps of every source, as finished FITS bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import apache_beam as beam

from schemas.claim_check import write_blobs
from schemas.cutouts import cutout_bytes, cutout_side, local_tangents
from schemas.elements import DetectedSources, StageElement, VisitPart
from schemas.exposures import MASK_BITS
from schemas.framing import pack
from transforms.failures import FAILED, StageFn, failed_in, failure_of
from transforms.numerics.psf_grid import PsfGrid
from transforms.packaging import cutout_file

STAGE = "cutouts"


class CutoutResult(NamedTuple):
    """`good`: DetectedSources; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class EncodeCutouts(beam.PTransform):
    """Write the cutouts of an exposure's sources to the cutout store, where packaging finds them.

    Input and output `good`: DetectedSources, and after each the VisitPart that says it was processed;
    `failed`: exposures whose cutouts could not be made (their alerts go without). Order: as it comes; a
    duplicate writes nothing new. No state.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def expand(self, detected: beam.PCollection) -> CutoutResult:
        outputs = detected | "WriteCutouts" >> beam.ParDo(_WriteCutoutsFn(self.folder)).with_output_types(
            StageElement
        ).with_outputs(FAILED, main="good")
        return CutoutResult(outputs.good, outputs[FAILED])


class _WriteCutoutsFn(StageFn):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def work(self, detected: DetectedSources) -> Iterator[Any]:
        started = time.perf_counter()
        exposure = detected.exposure
        try:
            path = cutout_file(self.folder, exposure.visit.visit, exposure.detector)
            write_blobs(path, detected.dia_sources["diaSourceId"], encode_cutouts(detected))
        except Exception as error:  # an alert without cutouts is better than none
            lost = f"cutouts of {len(detected.dia_sources)} alerts"
            failure = failure_of(error, STAGE, exposure.visit.visit, exposure.detector, lost=lost)
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
    rejected: Mapping[str, int] = MappingProxyType({}),
    ss_matches: int = 0,
    seconds: Mapping[str, float] = MappingProxyType({}),
    notes: tuple[str, ...] = (),
    sky_sources: Mapping[str, float] = MappingProxyType({}),
) -> bytes:
    """What the ledger is to know of one processed detector, as a part of its visit."""
    header = {
        "kind": "detector",
        "detector": detector,
        "detected": detected,
        "selected": selected,
        "rejected": dict(rejected),
        "ss_matches": ss_matches,
        "seconds": dict(seconds),
        "started_at": started_at,
        "notes": list(notes),
        "sky_sources": dict(sky_sources),
    }
    return pack(header)


def encode_cutouts(detected: DetectedSources) -> list[tuple[bytes, bytes, bytes]]:
    """Difference, science and template stamps of each source; empty bytes where there is none."""
    exposure, sources = detected.exposure, detected.dia_sources
    if len(sources) == 0:
        return []
    tangents = local_tangents(exposure.wcs, sources["x"].astype(float), sources["y"].astype(float))
    psf, science_psf = PsfGrid(exposure.psf), PsfGrid(exposure.science_psf)
    planes = (
        (exposure.difference, exposure.difference_variance, psf),
        (exposure.science, exposure.science_variance, science_psf),
        (exposure.matched_template, exposure.template_variance, science_psf),
    )
    rows = []
    for source, tangent in zip(sources, tangents, strict=True):
        stamps = [
            cutout_bytes(
                image,
                variance,
                exposure.mask,
                psfs.at(float(source["x"]), float(source["y"])),
                float(source["x"]),
                float(source["y"]),
                cutout_side(int(source["bboxSize"])),
                tangent,
                exposure.visit.rotation_deg,
                MASK_BITS,
            )
            for image, variance, psfs in planes
        ]
        rows.append((stamps[0] or b"", stamps[1] or b"", stamps[2] or b""))
    return rows

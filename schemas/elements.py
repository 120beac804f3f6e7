"""Elements of the dataflow that stay on one worker, from one fused stage to the next.

Pixels and column batches are handed over as Python objects inside a fused stage. Their coder tells
Beam how large they are and refuses to encode them: a shuffle of pixels is a mistake in the graph,
not something to be slow about.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from astropy.wcs import WCS

from schemas.manifests import DetectorImages, Visit


class StageElement:
    """What goes from stage to stage in detector and sky space; the type by which its coder is found."""


class FusedElement(StageElement):
    """An element that must not cross a shuffle."""

    def nbytes(self) -> int:
        """Approximate size in bytes."""
        return 1024


@dataclass(frozen=True)
class FailureRecord:
    """What went wrong, where, and what was lost. `visit` is None for a broken manifest line."""

    visit: int | None
    detector: int | None
    stage: str
    error: str
    reason: str
    lost: str


class PassingElement(StageElement):
    """What every stage of detector space hands on as it is.

    It travels with the detectors rather than beside them, because a Flatten in front of a stateful
    stage would make the local runner hold everything back until the night is over.
    """


@dataclass(frozen=True)
class VisitPart(PassingElement):
    """Something to be known of a visit in visit space."""

    visit: int
    midpoint_mjd_tai: float
    part: bytes


@dataclass(frozen=True)
class EarlierNights(PassingElement):
    """Output folders whose tables sky space is to know before the first visit."""

    folders: tuple[str, ...]


@dataclass(frozen=True)
class DetectorVisit(StageElement):
    """One detector of one visit, to be read; paths resolved.

    `announced_at`: UNIX time at which it was announced, None where it was not.
    """

    visit: Visit
    images: DetectorImages
    announced_at: float | None = None

    @property
    def detector(self) -> int:
        return self.images.detector


@dataclass(frozen=True)
class SubtractedExposure(FusedElement):
    """One exposure after template subtraction.

    Attributes
    ----------
    visit, detector : which exposure
    science, science_variance, difference, difference_variance, matched_template,
    template_variance : (ny, nx) float32, nJy or nJy^2; science without its background; the difference's noise white,
        the template's variance that of white noise which gives PSF fluxes their errors
    mask : (ny, nx) int32, science planes and the template's as `_TEMPLATE`
    psf : (cells_y, cells_x, k, k) float32, sums 1, the PSFs of the difference in its cells (`numerics.psf_grid`)
    science_psf : the same of the science image and the matched template
    wcs : WCS of the science image
    seconds : wall-clock seconds per stage so far
    started_at : UNIX time at which work on the exposure began
    notes : what had to be estimated
    residual_part : of the matched template's light that its subtraction may leave in a pixel
    announced_at : as in `DetectorVisit`
    """

    visit: Visit
    detector: int
    science: np.ndarray
    science_variance: np.ndarray
    difference: np.ndarray
    difference_variance: np.ndarray
    matched_template: np.ndarray
    template_variance: np.ndarray
    mask: np.ndarray
    psf: np.ndarray
    science_psf: np.ndarray
    wcs: WCS
    seconds: dict[str, float]
    started_at: float
    notes: tuple[str, ...]
    residual_part: float = 0.0
    announced_at: float | None = None

    def nbytes(self) -> int:
        return 7 * self.science.nbytes + self.psf.nbytes + self.science_psf.nbytes


@dataclass(frozen=True)
class DetectedSources(FusedElement):
    """The diaSources of one exposure, and its pixels for the cutouts.

    `sky_sources` tells what fluxes on empty sky say of the noise (docs/outputs.md); empty where none was measured.
    """

    exposure: SubtractedExposure
    dia_sources: np.ndarray
    ss_sources: np.ndarray
    n_detected: int
    rejected: dict[str, int]
    seconds: dict[str, float]
    sky_sources: dict[str, float] = field(default_factory=dict)

    def nbytes(self) -> int:
        return self.exposure.nbytes() + self.dia_sources.nbytes


@dataclass(frozen=True)
class CatalogueSources(FusedElement):
    """The diaSources of one exposure as a table has them, (n,) DIA_SOURCE sorted by diaSourceId; no pixels."""

    visit: Visit
    detector: int
    dia_sources: np.ndarray

    def nbytes(self) -> int:
        return self.dia_sources.nbytes


@dataclass(frozen=True)
class AlertBatch(FusedElement):
    """The alerts of one sky cell and visit before packaging, as columns.

    Attributes
    ----------
    context : what the packets and tables need to know of the visit (see `transforms.association`)
    dia_sources : (n,) DIA_SOURCE, sorted by diaSourceId
    prv_dia_sources, prv_offsets : flattened history and (n + 1,) offsets
    prv_forced_sources, forced_offsets : the same for forced measurements
    dia_objects : (n,) DIA_OBJECT, meaningful where dia_sources have a diaObjectId
    ss_sources : (n,) SS_SOURCE, meaningful where dia_sources have an ssObjectId
    object_states : DIA_OBJECT, the objects as they stay known (late visits: with later history)
    unassociated : (m,) DIA_SOURCE, selected sources without an object: no alert, but archived
    forced_sources : (k,) DIA_FORCED_SOURCE measured in this visit and owned by this cell
    counts : counters for the ledger
    fired_at : UNIX time at which the visit was due in the cell, and work on it began
    """

    context: dict[str, Any]
    dia_sources: np.ndarray
    prv_dia_sources: np.ndarray
    prv_offsets: np.ndarray
    prv_forced_sources: np.ndarray
    forced_offsets: np.ndarray
    dia_objects: np.ndarray
    ss_sources: np.ndarray
    object_states: np.ndarray
    unassociated: np.ndarray
    forced_sources: np.ndarray
    counts: dict[str, int]
    fired_at: float | None = None

    def nbytes(self) -> int:
        return self.dia_sources.nbytes + self.prv_dia_sources.nbytes + self.prv_forced_sources.nbytes

    def part(self, start: int, stop: int) -> AlertBatch:
        """Alerts start..stop-1 with their history, without what belongs to the cell as a whole."""
        stop = min(stop, len(self.dia_sources))
        history = slice(self.prv_offsets[start], self.prv_offsets[stop])
        forced = slice(self.forced_offsets[start], self.forced_offsets[stop])
        return replace(
            self,
            dia_sources=self.dia_sources[start:stop],
            prv_dia_sources=self.prv_dia_sources[history],
            prv_offsets=self.prv_offsets[start : stop + 1] - self.prv_offsets[start],
            prv_forced_sources=self.prv_forced_sources[forced],
            forced_offsets=self.forced_offsets[start : stop + 1] - self.forced_offsets[start],
            dia_objects=self.dia_objects[start:stop],
            ss_sources=self.ss_sources[start:stop],
            object_states=self.object_states[:0],
            unassociated=self.unassociated[:0],
            forced_sources=self.forced_sources[:0],
            counts={},
        )


@dataclass(frozen=True)
class VisitAlerts(FusedElement):
    """All that is known of one visit in visit space.

    Attributes
    ----------
    visit, day_obs : which visit
    revision : 0 at the first closing; one more for each firing after late detectors
    summary : the visit as the ledger will tell it, growing from stage to stage
    alerts : thin table of alerts, sorted by diaSourceId: diaSourceId, kafkaKey, packetFile, packetDigest,
        revision and the columns that the installed filters name
    tables : records for the archive by table name
    failures : failure records met so far
    passed : per filter the diaSourceIds that passed, in rank order
    selected : per filter that selects columns these, a row for each in `passed`
    """

    visit: int
    day_obs: int
    revision: int
    summary: dict[str, Any]
    alerts: pa.Table
    tables: dict[str, np.ndarray]
    failures: tuple[FailureRecord, ...] = ()
    passed: dict[str, np.ndarray] = field(default_factory=dict)
    selected: dict[str, pa.Table] = field(default_factory=dict)

    def nbytes(self) -> int:
        return self.alerts.nbytes + sum(records.nbytes for records in self.tables.values())


class StageElementCoder(beam.coders.coders.FastCoder):
    """Coder of `StageElement`: knows the size of a `FusedElement` and refuses to encode one."""

    def _create_impl(self) -> beam.coders.coder_impl.CoderImpl:
        return _StageElementCoderImpl()

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> type:
        return StageElement


class _StageElementCoderImpl(beam.coders.coder_impl.StreamCoderImpl):
    def encode_to_stream(self, value: StageElement, stream: Any, nested: bool) -> None:
        if isinstance(value, FusedElement):
            raise TypeError(f"{type(value).__name__} must stay in one fused stage: it may not cross a shuffle")
        stream.write(pickle.dumps(value, protocol=5), nested)

    def decode_from_stream(self, stream: Any, nested: bool) -> Any:
        return pickle.loads(stream.read_all(nested))

    def estimate_size(self, value: StageElement, nested: bool = False) -> int:
        return value.nbytes() if isinstance(value, FusedElement) else 1024

    def get_estimated_size_and_observables(self, value: StageElement, nested: bool = False) -> tuple[int, list[Any]]:
        return self.estimate_size(value, nested), []


for _element_class in (StageElement, VisitAlerts):
    beam.coders.registry.register_coder(_element_class, StageElementCoder)

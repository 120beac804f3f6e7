"""Whole small skies through AssociateDiaSources: made, run under Beam, and run by hand in any order."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing import test_stream
from apache_beam.transforms.core import WatermarkEstimatorProvider
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp
from astropy.wcs import WCS
from sky_samples import alerts_of, tables_of

from schemas.claim_check import ImageStore
from schemas.elements import AlertBatch, DetectedSources, StageElement, SubtractedExposure
from schemas.framing import unpack
from schemas.identifiers import dia_source_ids
from schemas.manifests import DetectorImages, Visit
from schemas.records import DIA_SOURCE, SS_SOURCE, concatenate_records, empty_records, records_to_arrow, take_records
from transforms.archiving import write_table
from transforms.association import AssociateDiaSources, AssociationConfig, _AssociateInCellsFn, sky_messages
from transforms.cell_state import read_index
from transforms.ingestion import event_timestamp

SIZE_PIX = 64
PIXEL_ARCSEC = 3.0
ARCSEC = 1.0 / 3600.0
START = 61367.1
# Step: an element at its event time, or the watermark (seconds) that nothing will follow in time.
Step = tuple[float, StageElement | None]


def detector_wcs(ra: float, dec: float, detector: int) -> WCS:
    """Detectors side by side, 4 pixels over each other, on one tangent plane."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [ra, dec]
    wcs.wcs.crpix = [SIZE_PIX - 1.0 - detector * (SIZE_PIX - 4.0), SIZE_PIX / 2.0]
    wcs.wcs.cdelt = [-PIXEL_ARCSEC * ARCSEC, PIXEL_ARCSEC * ARCSEC]
    wcs.wcs.set()
    return wcs


@dataclass(frozen=True)
class Sky:
    """A small survey: the DetectedSources of each visit, and its image store."""

    visits: tuple[tuple[DetectedSources, ...], ...]
    store: ImageStore

    def steps(self) -> list[Step]:
        """All detectors in order, the watermark past each visit at its end."""
        found: list[Step] = []
        for detectors in self.visits:
            time = detectors[0].exposure.visit.event_time_s
            found += [(time, one) for one in detectors]
            found.append((time + 2.0, None))
        return found


def make_sky(
    seed: int,
    ra: float,
    dec: float,
    folder: Path,
    *,
    n_objects: int = 30,
    n_visits: int = 5,
    clump_arcsec: float = 0.7,
    width_pix: float = 2.0 * SIZE_PIX - 4.0,
    images: bool = True,
) -> Sky:
    """Objects that come back visit after visit, some in clumps, with strays and a moving one.

    They are spread over a box of `width_pix`, at most half as high, in the middle of the two detectors.
    """
    rng = np.random.default_rng(seed)
    field = detector_wcs(ra, dec, 0)
    u = SIZE_PIX - 2.0 + width_pix * rng.uniform(-0.5, 0.5, n_objects)
    v = SIZE_PIX / 2.0 + min(width_pix, SIZE_PIX) * rng.uniform(-0.5, 0.5, n_objects)
    n_clumped = n_objects // 3
    partner = rng.integers(0, n_objects - n_clumped, n_clumped)
    u[-n_clumped:] = u[partner] + rng.normal(0.0, clump_arcsec / PIXEL_ARCSEC, n_clumped)
    v[-n_clumped:] = v[partner] + rng.normal(0.0, clump_arcsec / PIXEL_ARCSEC, n_clumped)
    store = ImageStore(str(folder / f"images-{seed}"))
    visits = []
    for number in range(n_visits):
        visit = _visit(number, ra, dec)
        scatter = rng.normal(0.0, 0.12 / PIXEL_ARCSEC, (2, n_objects))
        seen = rng.uniform(size=n_objects) < 0.75
        stray = rng.uniform(0.0, 1.0, (2, 3)) * np.array([[2.0 * SIZE_PIX], [float(SIZE_PIX)]])
        all_u = np.concatenate([(u + scatter[0])[seen], stray[0]])
        all_v = np.concatenate([(v + scatter[1])[seen], stray[1]])
        detectors = []
        for detector in (0, 1):
            x = all_u - detector * (SIZE_PIX - 4.0)
            inside = (x >= 0) & (x <= SIZE_PIX - 1) & (all_v >= 0) & (all_v <= SIZE_PIX - 1)
            position = field.pixel_to_world_values(all_u[inside], all_v[inside])
            detectors.append(_detected(visit, detector, position, detector_wcs(ra, dec, detector), rng))
            if images:
                _write_images(store, visit, detector, detector_wcs(ra, dec, detector), rng)
        visits.append(tuple(detectors))
    return Sky(tuple(visits), store)


def apart_sky(seed: int, ra: float, dec: float, folder: Path, *, images: bool = False) -> tuple[Sky, dict[int, int]]:
    """Objects so far apart that who belongs to whom is beyond doubt; which object each diaSourceId is of.

    They stand 18 arcsec apart, on one detector each, and scatter by at most 0.3 arcsec: any two detections of one are
    within 0.85 arcsec, and so are a detection and a mean of others. Some are rarely seen; three detections in ten are
    too unreliable to found an object.
    """
    rng = np.random.default_rng(seed)
    field = detector_wcs(ra, dec, 0)
    columns = np.concatenate([np.arange(6.0, 56.0, 6.0), np.arange(70.0, 120.0, 6.0)])
    places = rng.permutation(np.stack(np.meshgrid(columns, np.arange(4.0, 60.0, 6.0)), axis=-1).reshape(-1, 2))
    places = places[: int(rng.integers(10, 40))]
    often = rng.uniform(0.1, 1.0, len(places))
    store = ImageStore(str(folder / f"images-{seed}"))
    object_of: dict[int, int] = {}
    visits = []
    for number in range(8):
        visit, detectors = _visit(number, ra, dec), []
        for detector in (0, 1):
            seen = np.flatnonzero((rng.random(len(places)) < often) & ((places[:, 0] > 62.0) == (detector == 1)))
            offset = np.clip(rng.normal(0.0, 0.12, (2, len(seen))), -0.3, 0.3) / PIXEL_ARCSEC
            wcs = detector_wcs(ra, dec, detector)
            found = _detected(visit, detector, field.pixel_to_world_values(*(places[seen].T + offset)), wcs, rng)
            found.dia_sources["reliability"] = np.where(rng.random(len(seen)) < 0.3, 0.05, 0.9)
            object_of.update(zip(found.dia_sources["diaSourceId"].tolist(), seen.tolist(), strict=True))
            detectors.append(found)
            if images:
                _write_images(store, visit, detector, wcs, rng)
        visits.append(tuple(detectors))
    return Sky(tuple(visits), store), object_of


def _write_images(store: ImageStore, visit: Visit, detector: int, wcs: WCS, rng: np.random.Generator) -> None:
    planes = [rng.normal(0.0, 5.0, (SIZE_PIX, SIZE_PIX)).astype(np.float32) for _ in range(2)]
    variance = np.full((SIZE_PIX, SIZE_PIX), 25.0, dtype=np.float32)
    header = wcs.to_header().tostring(sep="\n")
    store.write(visit.visit, detector, [planes[0], variance, planes[1], variance], header, _psf(), _psf())


def _psf() -> np.ndarray:
    y, x = np.mgrid[-4:5, -4:5]
    psf = np.exp(-0.5 * (x**2 + y**2) / 1.2**2)
    return (psf / psf.sum())[np.newaxis, np.newaxis]


def _visit(number: int, ra: float, dec: float) -> Visit:
    midpoint = START + 0.9 * number
    return Visit(
        visit=2026112200001 + number,
        day_obs=20261122,
        seq_num=1 + number,
        instrument="SimCam",
        band="gr"[number % 2],
        midpoint_mjd_tai=midpoint,
        exposure_time_s=30.0,
        readout_end_mjd_tai=midpoint + 2e-4,
        boresight_ra_deg=ra,
        boresight_dec_deg=dec,
        rotation_deg=0.0,
        observation_reason=None,
        target_name=None,
        detectors=tuple(DetectorImages(detector, "", "") for detector in (0, 1)),
    )


def _detected(
    visit: Visit, detector: int, position: tuple[np.ndarray, np.ndarray], wcs: WCS, rng: np.random.Generator
) -> DetectedSources:
    n = len(position[0])
    rows = empty_records(DIA_SOURCE, n)
    rows["diaSourceId"] = dia_source_ids(visit.day_obs, visit.seq_num, detector, n)
    rows["visit"], rows["detector"], rows["band"] = visit.visit, detector, visit.band.encode()
    rows["midpointMjdTai"], rows["timeProcessedMjdTai"] = visit.midpoint_mjd_tai, visit.readout_end_mjd_tai
    rows["ra"], rows["dec"] = position[0] % 360.0, position[1]
    rows["raErr"], rows["decErr"] = rng.uniform(0.05, 0.2, (2, n)) * ARCSEC
    rows["psfFlux"], rows["psfFluxErr"] = rng.normal(1000.0, 100.0, n), 20.0
    rows["scienceFlux"], rows["scienceFluxErr"] = rng.normal(3000.0, 100.0, n), 25.0
    rows["reliability"] = rng.uniform(0.0, 1.0, n) ** 0.7
    rows["isDipole"], rows["trailLength"] = 0, 0.1
    ss = empty_records(SS_SOURCE, min(n, 1))
    rows["ssObjectId"][-1:], ss["ssObjectId"] = 77, 77
    ss["diaSourceId"] = rows["diaSourceId"][n - len(ss) :]
    image = np.zeros((SIZE_PIX, SIZE_PIX), dtype=np.float32)
    exposure = SubtractedExposure(
        visit, detector, image, image, image, image, image, image, image, _psf(), _psf(), wcs, {}, 0.0, ()
    )
    return DetectedSources(exposure, rows, ss, n, {}, {})


@dataclass
class Outcome:
    """All that came out of a run."""

    good: list[Any]
    failed: list[Any]

    @property
    def batches(self) -> list[AlertBatch]:
        return [one for one in self.good if isinstance(one, AlertBatch)]


class _Bag:
    def __init__(self) -> None:
        self.items: list[bytes] = []

    def add(self, item: bytes) -> None:
        self.items.append(item)

    def read(self) -> list[bytes]:
        return list(self.items)

    def clear(self) -> None:
        self.items = []


class _Value:
    def __init__(self) -> None:
        self.item: bytes | None = None

    def read(self) -> bytes | None:
        return self.item

    def write(self, item: bytes) -> None:
        self.item = item


class _Timers:
    def __init__(self) -> None:
        self.set_at: dict[str, Timestamp] = {}

    def set(self, at: Timestamp, dynamic_timer_tag: str) -> None:
        self.set_at[dynamic_timer_tag] = Timestamp(micros=at.micros // 1000 * 1000)


def run_by_hand(
    steps: Iterable[Step], config: AssociationConfig, store: ImageStore | None, rng: np.random.Generator | None = None
) -> Outcome:
    """Run the stage's DoFn with states and timers of our own; due timers fire in random order."""
    fn = _AssociateInCellsFn(config, store)
    fn.setup()
    cells: dict[int, tuple[_Bag, _Value, _Bag, _Timers]] = {}
    outcome, watermark = Outcome([], []), Timestamp(0)

    def fire() -> None:
        for cell, (pending, index, history, timers) in cells.items():
            due = sorted(tag for tag, at in timers.set_at.items() if at < watermark)
            for tag in due if rng is None else rng.permutation(due).tolist():
                at = timers.set_at.pop(tag)
                for output in fn.associate(cell, at, pending, index, history, timers):
                    value = output.value if isinstance(output, (TimestampedValue, beam.pvalue.TaggedOutput)) else output
                    value = value.value if isinstance(value, TimestampedValue) else value
                    kept = outcome.failed if isinstance(output, beam.pvalue.TaggedOutput) else outcome.good
                    kept.append(value)

    for time, element in [*steps, (4e9, None)]:
        if element is None:
            watermark = max(watermark, Timestamp(time))
        else:
            for cell, message in sky_messages(element, config):
                pending, _, _, timers = cells.setdefault(cell, (_Bag(), _Value(), _Bag(), _Timers()))
                fn.process((cell, message), Timestamp(time), pending, timers)
        fire()
    return outcome


class CellByHand:
    """The cell that owns most of a visit's sources, run visit by visit with state of our own."""

    def __init__(self, config: AssociationConfig) -> None:
        self.config = config
        self.fn = _AssociateInCellsFn(config, None)
        self.fn.setup()
        self.pending, self.index, self.history, self.timers = _Bag(), _Value(), _Bag(), _Timers()

    def visit(self, element: StageElement) -> Iterator[AlertBatch]:
        """The batches of one visit, all of whose sources lie in one cell."""
        for output in self.outputs(element):
            if isinstance(output.value, AlertBatch):
                yield output.value

    def outputs(self, element: StageElement) -> Iterator[Any]:
        """All that the stage yields for one visit."""
        messages = dict(sky_messages(element, self.config))
        if not messages:
            return
        cell = max(messages, key=lambda one: len(messages[one]))
        at = event_timestamp(unpack(messages[cell])[0]["context"]["midpoint_mjd_tai"])
        self.fn.process((cell, messages[cell]), at, self.pending, self.timers)
        yield from self.fn.associate(cell, at, self.pending, self.index, self.history, self.timers)

    def n_objects(self) -> int:
        return len(read_index(self.index.item).objects)

    def n_blocks(self) -> int:
        return len(self.history.items)

    def nbytes(self) -> int:
        return len(self.index.item or b"") + sum(len(block) for block in self.history.items)


def run_on_beam(steps: list[Step], config: AssociationConfig, store: ImageStore, folder: Path) -> Outcome:
    """Run the whole transform on the local runner; a watermark step ends a bundle and moves the watermark.

    That runner is right with such a source only if each slice holds whole visits (or what is late).
    """
    with beam.Pipeline(runner=FnApiRunner()) as flow:
        return _associated(send_in_order(flow, steps, folder), config, store, folder)


def send_in_order(flow: beam.Pipeline, steps: list[Step], folder: Path) -> beam.PCollection:
    """The elements of the steps, in slices that end where the watermark moves; they wait in files in `folder`."""
    slices: list[tuple[list[int], float]] = []
    waiting: list[int] = []
    for i, (time, element) in enumerate([*steps, (4e9, None)]):
        if element is None:
            slices.append((waiting, time))
            waiting = []
        else:
            waiting.append(i)
    times = [time for time, _ in steps]
    indices = flow | beam.Create([0]) | beam.ParDo(_EmitSlicesFn(slices, times)).with_output_types(int)
    return _loaded(indices, steps, folder)


def _loaded(indices: beam.PCollection, steps: list[Step], folder: Path) -> beam.PCollection:
    kept = folder / uuid.uuid4().hex
    kept.mkdir(parents=True)
    for i, (_, element) in enumerate(steps):
        (kept / str(i)).write_bytes(pickle.dumps(element))
    return indices | "LoadElements" >> beam.Map(_Load(kept)).with_output_types(StageElement)


def run_on_stream(steps: list[Step], config: AssociationConfig, store: ImageStore, folder: Path) -> Outcome:
    """Run the whole transform with a bundle per element, the watermark where the steps put it."""
    stream = test_stream.TestStream().advance_watermark_to(0)
    for i, (time, element) in enumerate(steps):
        if element is None:
            stream = stream.advance_watermark_to(time)
        else:
            stream = stream.add_elements([TimestampedValue(i, time)])
    options = beam.options.pipeline_options.PipelineOptions([], streaming=True)
    with beam.Pipeline(runner="BundleBasedDirectRunner", options=options) as flow:
        indices = flow | stream.advance_watermark_to_infinity().with_output_types(int)
        return _associated(_loaded(indices, steps, folder), config, store, folder)


class _Later(Outcome):
    """An outcome that is read from its folder when it is first asked for, after the pipeline has run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getattr__(self, name: str) -> list[Any]:
        if name not in ("good", "failed"):
            raise AttributeError(name)
        found = [pickle.loads(path.read_bytes()) for path in (self.folder / name).iterdir()]
        setattr(self, name, found)
        return found


def _associated(sent: beam.PCollection, config: AssociationConfig, store: ImageStore, folder: Path) -> Outcome:
    kept = folder / uuid.uuid4().hex
    for name in ("good", "failed"):
        (kept / name).mkdir(parents=True)
    outputs = sent | AssociateDiaSources(config, store)
    outputs.good | "KeepGood" >> beam.Map(_Keep(kept / "good"))
    outputs.failed | "KeepFailed" >> beam.Map(_Keep(kept / "failed"))
    return _Later(kept)


class _Load:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, index: int) -> Any:
        return pickle.loads((Path(self.folder) / str(index)).read_bytes())


class _Keep:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, element: Any) -> None:
        (Path(self.folder) / uuid.uuid4().hex).write_bytes(pickle.dumps(element))


class _SliceProvider(beam.RestrictionProvider):
    def initial_restriction(self, element: int) -> OffsetRange:
        return OffsetRange(0, 1_000_000)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return OffsetRestrictionTracker(restriction)

    def restriction_size(self, element: int, restriction: OffsetRange) -> int:
        return restriction.size()


class _WatermarkProvider(WatermarkEstimatorProvider):
    def initial_estimator_state(self, element: int, restriction: OffsetRange) -> None:
        return None

    def create_watermark_estimator(self, estimator_state: Any) -> ManualWatermarkEstimator:
        return ManualWatermarkEstimator(estimator_state)


class _EmitSlicesFn(beam.DoFn):
    """Emits the elements of one slice per call, sets the watermark, and hands over to the next."""

    def __init__(self, slices: list[tuple[list[int], float]], times: list[float]) -> None:
        self.slices, self.times = slices, times

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: int,
        tracker: Any = beam.DoFn.RestrictionParam(_SliceProvider()),  # noqa: B008
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(_WatermarkProvider()),  # noqa: B008
    ) -> Iterator[Any]:
        position = tracker.current_restriction().start
        if not tracker.try_claim(position):
            return
        indices, until = self.slices[position]
        for index in indices:
            yield TimestampedValue(index, Timestamp(self.times[index]))
        watermark.set_watermark(max(watermark.current_watermark() or Timestamp(0), Timestamp(until)))
        if position + 1 < len(self.slices):
            tracker.defer_remainder(Duration(0))
        else:
            tracker.try_claim(tracker.current_restriction().stop)


def write_archive(batches: list[AlertBatch], out: Path) -> None:
    """The tables of a night as `produce` leaves them."""
    sources = [rows for one in batches for rows in (one.dia_sources, one.unassociated)]
    forced = [one.forced_sources for one in batches]
    for name, rows in (
        ("dia_sources", concatenate_records(sources, DIA_SOURCE)),
        ("dia_objects", final_objects(batches)),
        ("dia_forced_sources", concatenate_records(forced, forced[0].dtype)),
    ):
        write_table(out / "archive" / name / "day_obs=20261122" / "1.parquet", records_to_arrow(rows))


def final_objects(batches: list[AlertBatch]) -> np.ndarray:
    """The last state of each object, in order of diaObjectId."""
    states = concatenate_records([one.object_states for one in batches], batches[0].object_states.dtype)
    order = np.lexsort((states["nDiaSources"], states["validityStartMjdTai"], states["diaObjectId"]))
    states = take_records(states, order)
    last = np.append(np.diff(states["diaObjectId"]) != 0, True)[: len(states)]
    return take_records(states, last)


def together(outcome: Outcome) -> tuple[dict[int, bytes], dict[str, list[bytes]]]:
    return alerts_of(outcome.batches), tables_of(outcome.batches)


def elements(sky: Sky) -> list[Step]:
    return [step for step in sky.steps() if step[1] is not None]


def any_delivery(sky: Sky, rng: np.random.Generator) -> list[Step]:
    """All detectors in any order, some several times; the watermark passes visits of which all are there, or lags."""
    deliveries: list[tuple[float, Step]] = []
    spread, again = rng.choice([0.3, 2.0, 20.0]), rng.choice([0.0, 0.3, 1.0])
    for number, detectors in enumerate(sky.visits):
        for one in detectors:
            step: Step = (one.exposure.visit.event_time_s, one)
            arrival = number + rng.uniform(0.0, spread)
            deliveries.append((arrival, step))
            deliveries += [(arrival + rng.exponential(3.0), step) for _ in range(rng.binomial(2, again))]
    deliveries.sort(key=lambda delivery: delivery[0])
    missing = {id(one): one.exposure.visit.event_time_s for detectors in sky.visits for one in detectors}
    steps: list[Step] = []
    told = 0.0
    for _, step in deliveries:
        steps.append(step)
        missing.pop(id(step[1]), None)
        until = min(missing.values(), default=3e9) - 2.0
        if until > told and rng.random() < 0.4:
            steps.append((until, None))
            told = until
    return steps


def late_by(sky: Sky, late: dict[tuple[int, int], int]) -> list[Step]:
    """Visits in order, but for some detectors, (visit, detector), that come so many visits after their own."""
    steps: list[Step] = []
    for number, detectors in enumerate(sky.visits):
        time = detectors[0].exposure.visit.event_time_s
        steps += [(time, one) for detector, one in enumerate(detectors) if (number, detector) not in late]
        steps.append((time + 2.0, None))
        for (of_visit, detector), visits_late in late.items():
            if min(of_visit + visits_late, len(sky.visits) - 1) == number:
                one = sky.visits[of_visit][detector]
                steps.append((one.exposure.visit.event_time_s, one))
    return steps


def late_steps(sky: Sky, visit: int, detector: int) -> list[Step]:
    """One detector of one visit comes when all others are through."""
    late = sky.visits[visit][detector]
    return [*(step for step in sky.steps() if step[1] is not late), (late.exposure.visit.event_time_s, late)]

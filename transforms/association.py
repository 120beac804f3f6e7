"""AssociateDiaSources: the one stage that remembers. Keyed by sky cell, in event time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.coders import BytesCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from astropy.wcs import WCS, NoConvergence
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from schemas.claim_check import PLANES, ImageStore, StoredExposure
from schemas.elements import CatalogueSources, DetectedSources, EarlierNights, FailureRecord, StageElement, VisitPart
from schemas.framing import pack, unpack
from schemas.manifests import Visit
from schemas.records import (
    DIA_FORCED_SOURCE,
    DIA_OBJECT,
    DIA_SOURCE,
    SS_SOURCE,
    RecordLayoutError,
    arrow_schema,
    concatenate_records,
    empty_records,
    records_from_arrow,
    records_from_bytes,
    records_to_bytes,
    take_records,
)
from transforms.archiving import are_object_tables_unfinished
from transforms.cell_state import (
    COMPACTED_FROM,
    LATEST_DAYS,
    CellIndex,
    DamagedStateError,
    history_block,
    index_bytes,
    reaching_rows,
    read_history,
    read_index,
    seen_of,
)
from transforms.failures import FAILED, failure_of, failure_part
from transforms.ingestion import event_timestamp, visit_context
from transforms.numerics.forced_photometry import forced_psf_flux, psf_splines
from transforms.numerics.psf_grid import PsfGrid
from transforms.sky_cells import (
    AssociationRules,
    CellKnowledge,
    CellVisit,
    ForcedFluxes,
    cells_overlapping,
    cells_with_halo,
    process_visit,
)

STAGE = "association"
_OPEN_EXPOSURES = 8
_ROWS_AT_ONCE = 50_000
_HALO_PER_RADIUS = 6.0
_CELL_ARCSEC_AT_ORDER_0 = 58.6 * 3600.0


@dataclass(frozen=True)
class AssociationConfig:
    """How sources are tied to objects. Defaults are the values LSST runs with, where it has one."""

    cell_order: int = Field(default=8, ge=4, le=13)
    halo_arcsec: float = Field(default=10.0, gt=0, le=60)
    radius_arcsec: float = Field(default=1.0, gt=0, le=5)
    error_floor_arcsec: float = Field(default=0.05, gt=0)
    error_fallback_arcsec: float = Field(default=0.2, gt=0)
    new_object_min_reliability: float = Field(default=0.1, ge=0, le=1)
    history_months: float = Field(default=12.0, gt=0)
    forced_min_sources: int = Field(default=2, ge=1)
    forced_min_reliability: float = Field(default=0.5, ge=0, le=1)
    forced_max_trail_arcsec: float = Field(default=1.4, gt=0)

    @model_validator(mode="after")
    def _check_halo(self) -> AssociationConfig:
        # A matched group (half a halo) and its objects' own sources must lie where the halo is complete.
        if self.halo_arcsec < _HALO_PER_RADIUS * self.radius_arcsec:
            raise ValueError(
                f"halo_arcsec {self.halo_arcsec} must be at least {_HALO_PER_RADIUS:g} times "
                f"radius_arcsec {self.radius_arcsec}"
            )
        half_cell_arcsec = _CELL_ARCSEC_AT_ORDER_0 / (1 << self.cell_order) / 2.0
        if self.halo_arcsec > half_cell_arcsec:
            raise ValueError(
                f"halo_arcsec {self.halo_arcsec} exceeds half a cell of cell_order {self.cell_order}, "
                f"{half_cell_arcsec:.1f} arcsec"
            )
        return self

    def rules(self) -> AssociationRules:
        names = AssociationRules.__dataclass_fields__
        return AssociationRules(**{name: getattr(self, name) for name in names})


class LateVisitError(ValueError):
    """A visit of which a sky cell no longer knows whether it was seen, nor what preceded it."""


class AssociationResult(NamedTuple):
    """`good`: AlertBatch per sky cell and visit, VisitParts as they came; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class AssociateDiaSources(beam.PTransform):
    """Tie diaSources to diaObjects and give every source with an object its history.

    Input: DetectedSources (or CatalogueSources), VisitParts, and EarlierNights before them. Output `good`:
    AlertBatch per (cell, visit), VisitParts when their visit is due, all at the visit's event time;
    `failed`: forced photometry that could not be done (none is tried without an image store). Key:
    HEALPix cell; a source goes to its own cell and to those whose halo it lies in. Order: per cell by
    (midpoint, visit), whole visits, when the watermark has passed them; a detector that comes later is
    processed when it comes, with the history that precedes it. A detector delivered twice changes
    nothing; one that comes more than `history_months` and a month after the newest visit of a cell is
    refused, as the cell no longer knows what preceded it; so is what comes to a cell whose state is damaged.
    State per cell: what waits for the watermark, and `transforms.cell_state`.
    """

    def __init__(self, config: AssociationConfig, image_store: ImageStore | None) -> None:
        super().__init__()
        self.config = config
        self.image_store = image_store

    def expand(self, detected: beam.PCollection) -> AssociationResult:
        outputs = (
            detected
            | "SendToSkyCells" >> beam.FlatMap(sky_messages, self.config).with_output_types(tuple[int, bytes])
            | "AssociateInCells"
            >> beam.ParDo(_AssociateInCellsFn(self.config, self.image_store))
            .with_output_types(StageElement)
            .with_outputs(FAILED, main="good")
        )
        return AssociationResult(outputs.good, outputs[FAILED])


def sky_messages(element: StageElement, config: AssociationConfig) -> Iterator[Any]:
    """The messages of one element to the sky cells that need it."""
    if isinstance(element, DetectedSources):
        yield from sky_cell_messages(element, config)
    elif isinstance(element, CatalogueSources):
        nowhere, ss_sources = np.empty(0, dtype=np.int64), _named_ss_sources(element.dia_sources)
        yield from _to_cells(element.visit, element.detector, nowhere, element.dia_sources, ss_sources, config)
    elif isinstance(element, EarlierNights):
        yield from history_messages(element.folders, config)
    elif isinstance(element, VisitPart):
        # No cell has a negative number: parts of a visit wait there for the same timer as its sources.
        context = {"visit": element.visit, "midpoint_mjd_tai": element.midpoint_mjd_tai}
        yield -element.visit, pack({"kind": "part", "context": context}, (element.part,))


def _named_ss_sources(dia_sources: np.ndarray) -> np.ndarray:
    """The ssSources of a table that only names the ssObject of each source."""
    moving = take_records(dia_sources, dia_sources["ssObjectId"] != 0)
    ss_sources = empty_records(SS_SOURCE, len(moving))
    for name in ("diaSourceId", "ssObjectId"):
        ss_sources[name] = moving[name]
    return ss_sources


def sky_cell_messages(detected: DetectedSources, config: AssociationConfig) -> Iterator[tuple[int, bytes]]:
    """One message per cell that the detector touches, also when it found nothing there."""
    exposure = detected.exposure
    covered = _covered_cells(exposure.wcs, exposure.science.shape, config)
    yield from _to_cells(exposure.visit, exposure.detector, covered, detected.dia_sources, detected.ss_sources, config)


def _to_cells(
    visit: Visit,
    detector: int,
    covered: np.ndarray,
    sources: np.ndarray,
    ss_sources: np.ndarray,
    config: AssociationConfig,
) -> Iterator[tuple[int, bytes]]:
    header = {"kind": "visit", "detector": detector, "context": visit_context(visit)}
    needing, needed = _cells_needing(sources, config)
    for cell in np.union1d(covered, needing):
        first, last = np.searchsorted(needing, [cell, cell + 1])
        rows = take_records(sources, needed[first:last])
        own_ss = take_records(ss_sources, np.isin(ss_sources["diaSourceId"], rows["diaSourceId"]))
        yield int(cell), pack(header, (records_to_bytes(rows), records_to_bytes(own_ss)))


def _covered_cells(wcs: Any, shape: tuple[int, ...], config: AssociationConfig) -> np.ndarray:
    """Cells whose area or halo the detector overlaps."""
    ny, nx = shape
    corner = wcs.pixel_to_world_values([0, nx - 1], [0, ny - 1])
    diagonal_arcsec = 3600.0 * float(np.hypot(*(np.ptp(axis) for axis in _unwrapped(corner))))
    pixel_arcsec = max(diagonal_arcsec / np.hypot(nx, ny), 1e-3)
    # A little more than the halo, for sides that a distortion bends outwards.
    margin = 1.2 * config.halo_arcsec / pixel_arcsec
    left, right, low, high = -margin, nx - 1 + margin, -margin, ny - 1 + margin
    ra, dec = wcs.pixel_to_world_values([left, right, right, left], [low, low, high, high])
    return cells_overlapping(np.asarray(ra), np.asarray(dec), config.cell_order)


def _unwrapped(corner: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    ra, dec = (np.asarray(axis, dtype=np.float64) for axis in corner)
    return ((ra - ra[0] + 180.0) % 360.0 - 180.0) * np.cos(np.radians(dec.mean())), dec


def history_messages(folders: tuple[str, ...], config: AssociationConfig) -> Iterator[Any]:
    """The archive tables of earlier nights as messages to the cells that need them."""
    known = read_archive(folders, config.rules().history_days + LATEST_DAYS)
    objects, sources, forced = known.objects, known.sources, known.forced
    ids, n = objects["diaObjectId"], max(len(objects), 1)
    source_cell, source_row = _cells_needing(sources, config)
    object_cell, object_row = _cells_needing(objects, config)
    # An object goes where it is needed, and where its sources are.
    of_source = np.searchsorted(ids, sources["diaObjectId"])
    has_object = np.append(ids, -1)[of_source] == sources["diaObjectId"]
    with_object = has_object[source_row]
    also = source_cell[with_object] * n + of_source[source_row[with_object]]
    object_cell, object_row = np.divmod(np.unique(np.concatenate([object_cell * n + object_row, also])), n)
    forced = take_records(forced, np.argsort(forced["diaObjectId"], kind="stable"))
    first, last = (np.searchsorted(forced["diaObjectId"], ids, side=side) for side in ("left", "right"))
    for cell in np.unique(np.concatenate([source_cell, object_cell])):
        object_rows, source_rows = (
            rows[slice(*np.searchsorted(cells, [cell, cell + 1]))]
            for cells, rows in ((object_cell, object_row), (source_cell, source_row))
        )
        forced_rows = [np.arange(first[row], last[row]) for row in object_rows if last[row] > first[row]]
        buffers = (
            records_to_bytes(take_records(objects, object_rows)),
            records_to_bytes(take_records(sources, source_rows)),
            records_to_bytes(take_records(forced, np.concatenate(forced_rows) if forced_rows else slice(0))),
        )
        yield int(cell), pack({"kind": "history"}, buffers)


def _cells_needing(rows: np.ndarray, config: AssociationConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (cell, row) of the cells that need each row, in this order."""
    pairs = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        needed = np.sort(cells_with_halo(part["ra"], part["dec"], config.cell_order, config.halo_arcsec), axis=1)
        index, column = np.nonzero(np.diff(needed, axis=1, prepend=-1))
        pairs.append(needed[index, column] * len(rows) + start + index)
    if not pairs:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    cell, row = np.divmod(np.sort(np.concatenate(pairs)), len(rows))
    return cell, row


def read_archive(folders: tuple[str, ...], reach_days: float = np.inf) -> CellKnowledge:
    """Objects (the latest state of each, in order of id), associated sources and forced sources of output folders.

    Parameters
    ----------
    folders : output folders of produce
    reach_days : nights that lie further back than this from the newest are passed over, but for their objects

    Raises
    ------
    FileNotFoundError
        A folder that is not an output folder, or that of a run which was broken off.
    RecordLayoutError
        A table that cannot be read or lacks columns.
    """
    for folder in folders:
        archive = Path(folder) / "archive"
        if not archive.is_dir():
            raise FileNotFoundError(f"{folder} holds no archive: --history wants an output folder of produce")
        if are_object_tables_unfinished(archive):
            raise FileNotFoundError(f"{folder} is the output of a run that was broken off: run it again first")
    sources = [
        take_records(rows, rows["diaObjectId"] != 0)
        for rows in _read_tables(folders, "dia_sources", DIA_SOURCE, reach_days)
    ]
    forced = _read_tables(folders, "dia_forced_sources", DIA_FORCED_SOURCE, reach_days)
    return CellKnowledge(
        _latest_states(_read_tables(folders, "dia_objects", DIA_OBJECT)),
        _first_of_each(concatenate_records(sources, DIA_SOURCE), "diaSourceId"),
        _first_of_each(concatenate_records(list(forced), DIA_FORCED_SOURCE), "diaForcedSourceId"),
    )


def _latest_states(tables: Iterator[np.ndarray]) -> np.ndarray:
    """The latest state of each object; at no time are more than thrice as many in memory."""
    latest, n_waiting = empty_records(DIA_OBJECT, 0), 0
    waiting: list[np.ndarray] = []

    def merged() -> np.ndarray:
        states = concatenate_records([latest, *waiting], DIA_OBJECT)
        # Two states of one time: a late visit has put another source into the second.
        age = (states["nDiaSources"], states["validityStartMjdTai"], states["diaObjectId"])
        states = take_records(states, np.lexsort(age))
        return take_records(states, np.diff(states["diaObjectId"], append=-1) != 0)

    for rows in tables:
        waiting.append(rows)
        n_waiting += len(rows)
        if n_waiting > max(len(latest), _ROWS_AT_ONCE):
            latest, waiting, n_waiting = merged(), [], 0
    return merged()


def _first_of_each(records: np.ndarray, key: str) -> np.ndarray:
    return take_records(records, np.unique(records[key], return_index=True)[1])


def _read_tables(
    folders: tuple[str, ...], name: str, dtype: np.dtype, reach_days: float = np.inf
) -> Iterator[np.ndarray]:
    """The rows of each file of a table, of the nights within reach of the newest."""
    nights = [path for folder in folders for path in sorted((Path(folder) / "archive" / name).glob("day_obs=*"))]
    newest = max((_day(night) for night in nights), default=0)
    for night in nights:
        # A day more, as a night's visits are up to a day after the noon it is named for.
        if newest - _day(night) <= reach_days + 1:
            for path in sorted(night.glob("[!.]*.parquet")):
                yield _read_table(path, dtype)


def _read_table(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        table = pq.ParquetFile(path).read()
        wanted = [field.name for field in arrow_schema(dtype) if not field.nullable]
        if missing := sorted({*wanted, "diaObjectId"} - {*table.column_names}):
            raise RecordLayoutError(f"no column {', '.join(missing)}")
        return records_from_arrow(table, dtype)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RecordLayoutError(f"{path}: {error}") from error


def _day(night: Path) -> int:
    """The number of the day of a folder day_obs=YYYYMMDD."""
    return datetime.strptime(night.name, "day_obs=%Y%m%d").toordinal()


class _AssociateInCellsFn(beam.DoFn):
    PENDING = BagStateSpec("pending", BytesCoder())
    INDEX = ReadModifyWriteStateSpec("index", BytesCoder())
    HISTORY = BagStateSpec("history", BytesCoder())
    DUE = TimerSpec("cell_due", TimeDomain.WATERMARK)

    def __init__(self, config: AssociationConfig, image_store: ImageStore | None) -> None:
        self.config = config
        self.image_store = image_store

    def setup(self) -> None:
        self.forced = _ForcedPhotometer(self.image_store)

    def process(
        self,
        element: tuple[int, bytes],
        timestamp: Timestamp = beam.DoFn.TimestampParam,
        pending: Any = beam.DoFn.StateParam(PENDING),
        due: Any = beam.DoFn.TimerParam(DUE),
    ) -> None:
        pending.add(element[1])
        header, _ = unpack(element[1])
        if header["kind"] != "history":
            due.set(timestamp, dynamic_timer_tag=str(header["context"]["visit"]))

    @on_timer(DUE)
    def associate(
        self,
        cell: int = beam.DoFn.KeyParam,
        timestamp: Timestamp = beam.DoFn.TimestampParam,
        pending: Any = beam.DoFn.StateParam(PENDING),
        index: Any = beam.DoFn.StateParam(INDEX),
        history: Any = beam.DoFn.StateParam(HISTORY),
        due: Any = beam.DoFn.TimerParam(DUE),
    ) -> Iterator[Any]:
        fired_at = time.time()
        waiting = [bytes(message) for message in pending.read()]
        arrived, earlier, rest = _split_due(waiting, timestamp)
        if not arrived:
            return
        pending.clear()
        for message in rest:
            pending.add(message)
        if cell < 0:
            yield from _visit_parts(arrived)
            return
        blocks = [bytes(block) for block in history.read()]
        try:
            known = read_index(index.read())
            sources, forced = read_history(blocks)
        except DamagedStateError as error:
            for visit in _visits_of(arrived, read_index(None)):
                lost = f"{len(visit.sources)} sources in or around sky cell {cell}"
                failure = failure_of(error, STAGE, visit.number, lost=lost)
                yield from _failed_at(event_timestamp(visit.midpoint_mjd_tai), visit, failure)
            return
        for message in earlier:
            _, buffers = unpack(message)
            objects = _merged_objects(known.objects, records_from_bytes(DIA_OBJECT, buffers[0]))
            more = _not_among(sources, records_from_bytes(DIA_SOURCE, buffers[1]), "diaSourceId")
            more_forced = _not_among(forced, records_from_bytes(DIA_FORCED_SOURCE, buffers[2]), "diaForcedSourceId")
            known = replace(known, objects=objects).with_seen(seen_of(more))
            sources = concatenate_records([sources, more], DIA_SOURCE)
            forced = concatenate_records([forced, more_forced], DIA_FORCED_SOURCE)
            blocks.append(history_block(more, more_forced))
            history.add(blocks[-1])
        reach = self.config.rules().history_days + LATEST_DAYS
        for visit in _visits_of(arrived, known):
            event_time = event_timestamp(visit.midpoint_mjd_tai)
            if visit.midpoint_mjd_tai <= known.newest_mjd_tai - reach:
                yield from _failed_at(event_time, visit, _too_late(cell, visit, known.newest_mjd_tai, reach))
                continue
            started = time.perf_counter()
            outcome = process_visit(
                cell,
                self.config.cell_order,
                CellKnowledge(known.objects, sources, forced),
                visit,
                self.config.rules(),
                partial(self.forced.measure, visit.number),
            )
            known = replace(known, objects=outcome.objects).with_seen(visit.seen())
            sources = concatenate_records([sources, outcome.new_sources], DIA_SOURCE)
            forced = concatenate_records([forced, outcome.new_forced], DIA_FORCED_SOURCE)
            blocks.append(history_block(outcome.new_sources, outcome.new_forced))
            history.add(blocks[-1])
            for failure in self.forced.take_failures():
                # Named by cell: of records that are equal one is kept.
                lost = f"{failure.lost} in or around sky cell {cell}"
                yield from _failed_at(event_time, visit, replace(failure, lost=lost))
            outcome.batch.counts["association_us"] = int(1e6 * (time.perf_counter() - started))
            yield TimestampedValue(replace(outcome.batch, fired_at=fired_at), event_time)
        known = known.reaching(reach)
        index.write(index_bytes(known))
        if len(blocks) >= COMPACTED_FROM:
            history.clear()
            history.add(
                history_block(*(reaching_rows(rows, known.newest_mjd_tai, reach) for rows in (sources, forced)))
            )


def _failed_at(event_time: Timestamp, visit: CellVisit, failure: FailureRecord) -> Iterator[Any]:
    yield beam.pvalue.TaggedOutput(FAILED, TimestampedValue(failure, event_time))
    yield TimestampedValue(VisitPart(visit.number, visit.midpoint_mjd_tai, failure_part(failure)), event_time)


def _too_late(cell: int, visit: CellVisit, newest_mjd_tai: float, reach_days: float) -> FailureRecord:
    error = LateVisitError(
        f"sky cell {cell} knows a visit {newest_mjd_tai - visit.midpoint_mjd_tai:.1f} days later and "
        f"remembers {reach_days:.0f} days"
    )
    detector = visit.detectors[0] if len(visit.detectors) == 1 else None
    return failure_of(error, STAGE, visit.number, detector, lost=f"{len(visit.sources)} sources in or around the cell")


def _visit_parts(messages: list[bytes]) -> Iterator[TimestampedValue]:
    for message in sorted(messages):
        header, buffers = unpack(message)
        visit, midpoint = header["context"]["visit"], header["context"]["midpoint_mjd_tai"]
        yield TimestampedValue(VisitPart(visit, midpoint, bytes(buffers[0])), event_timestamp(midpoint))


def _split_due(waiting: list[bytes], fired_at: Timestamp) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Visit messages that are due, history messages, and the rest."""
    arrived, earlier, rest = [], [], []
    for message in waiting:
        header, _ = unpack(message)
        if header["kind"] == "history":
            earlier.append(message)
        elif event_timestamp(header["context"]["midpoint_mjd_tai"]) <= fired_at:
            arrived.append(message)
        else:
            rest.append(message)
    return arrived, sorted(earlier), rest


def _visits_of(messages: list[bytes], known: CellIndex) -> list[CellVisit]:
    """Messages as visits in order of (midpoint, visit), detectors already seen left out."""
    by_visit: dict[tuple[float, int], dict[int, tuple[dict[str, Any], list[memoryview]]]] = {}
    for message in messages:
        header, buffers = unpack(message)
        context, detector = header["context"], header["detector"]
        if not known.has_seen(context["visit"], detector):
            by_visit.setdefault((context["midpoint_mjd_tai"], context["visit"]), {}).setdefault(
                detector, (context, buffers)
            )
    visits = []
    for key in sorted(by_visit):
        detectors = by_visit[key]
        parts = [detectors[detector] for detector in sorted(detectors)]
        visits.append(
            CellVisit(
                context=parts[0][0],
                detectors=tuple(sorted(detectors)),
                sources=concatenate_records([records_from_bytes(DIA_SOURCE, part[1][0]) for part in parts], DIA_SOURCE),
                ss_sources=concatenate_records(
                    [records_from_bytes(SS_SOURCE, part[1][1]) for part in parts], SS_SOURCE
                ),
            )
        )
    return visits


def _not_among(known: np.ndarray, more: np.ndarray, key: str) -> np.ndarray:
    return take_records(more, ~np.isin(more[key], known[key]))


def _merged_objects(known: np.ndarray, more: np.ndarray) -> np.ndarray:
    merged = concatenate_records([known, _not_among(known, more, "diaObjectId")], DIA_OBJECT)
    return take_records(merged, np.argsort(merged["diaObjectId"], kind="stable"))


class _OpenExposure(NamedTuple):
    stored: StoredExposure
    psfs: dict[str, PsfGrid]  # by plane


class _ForcedPhotometer:
    """Forced fluxes from the image store; keeps the last few exposures open, remembers its failures."""

    def __init__(self, store: ImageStore | None) -> None:
        self.store = store
        self.opened: OrderedDict[tuple[int, int], _OpenExposure] = OrderedDict()
        self.failures: list[FailureRecord] = []

    def take_failures(self) -> list[FailureRecord]:
        taken, self.failures = self.failures, []
        return taken

    def measure(self, visit: int, detector: int, ra: np.ndarray, dec: np.ndarray) -> ForcedFluxes:
        """Forced fluxes of positions on one detector. What cannot be read is NaN and noted as a failure."""
        n = len(ra)
        fluxes = ForcedFluxes(np.zeros(n, dtype=bool), *(np.full(n, np.nan) for _ in range(4)))
        if self.store is None:
            return fluxes
        try:
            stored, psfs = self._open(self.store, visit, detector)
            x, y = _pixels_of(stored.wcs, ra, dec)
            ny, nx = stored.shape
            fluxes.inside[:] = (x >= 0) & (x <= nx - 1) & (y >= 0) & (y <= ny - 1)
            x, y = x[fluxes.inside], y[fluxes.inside]
            splines = {plane: psf_splines(psf, x, y) for plane, psf in psfs.items()}
        except Exception as error:
            self.failures.append(failure_of(error, STAGE, visit, detector, lost=f"forced photometry of {n} objects"))
            return fluxes
        half = max(of_plane.half_width for of_plane in splines.values())
        # Never before the first pixel, so that subtracting it from a position rounds nothing.
        x0, y0 = (np.maximum(np.floor(position + 0.5).astype(np.int64) - half, 0) for position in (x, y))
        windows, errors = _windows(stored, x0, y0, 2 * half + 1)
        if errors:
            lost = f"forced photometry of {len(errors)} objects"
            self.failures.append(failure_of(errors[-1], STAGE, visit, detector, lost=lost))
        for plane, flux, flux_err in (
            ("difference", fluxes.psf_flux, fluxes.psf_flux_err),
            ("science", fluxes.science_flux, fluxes.science_flux_err),
        ):
            image, variance = (windows[PLANES.index(name)] for name in (plane, plane + "_variance"))
            flux[fluxes.inside], flux_err[fluxes.inside], _ = forced_psf_flux(
                image, variance, splines[plane], x - x0, y - y0
            )
        return fluxes

    def _open(self, store: ImageStore, visit: int, detector: int) -> _OpenExposure:
        key = (visit, detector)
        if key not in self.opened:
            stored = store.open(visit, detector)
            psfs = {"difference": PsfGrid(stored.psf), "science": PsfGrid(stored.science_psf)}
            self.opened[key] = _OpenExposure(stored, psfs)
            if len(self.opened) > _OPEN_EXPOSURES:
                self.opened.popitem(last=False)
        self.opened.move_to_end(key)
        return self.opened[key]


def _pixels_of(wcs: WCS, ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel positions, each to the bit as if it were alone; NaN so far outside that the distortion has no inverse."""
    try:
        x, y = wcs.all_world2pix(ra, dec, 0, adaptive=True)  # else all iterate as long as one of them needs it
    except NoConvergence as error:
        x, y = error.best_solution.T.copy()
        for lost in (error.divergent, error.slow_conv):
            if lost is not None:
                x[lost] = y[lost] = np.nan
    return np.asarray(x), np.asarray(y)


def _windows(stored: StoredExposure, x0: np.ndarray, y0: np.ndarray, side: int) -> tuple[np.ndarray, list[Exception]]:
    """Windows of all planes (4, n, side, side) from their first pixels on, and why some could not be read.

    What could not be read, or lies beyond the image, has variance 0: it is not used.
    """
    windows = np.zeros((len(PLANES), len(x0), side, side), dtype=np.float32)
    errors: list[Exception] = []
    ny, nx = stored.shape
    for k in range(len(x0)):
        y1, x1 = min(y0[k] + side, ny), min(x0[k] + side, nx)
        try:
            windows[:, k, : y1 - y0[k], : x1 - x0[k]] = stored.window(y0[k], y1, x0[k], x1)
        except Exception as error:
            errors.append(error)
    return windows, errors

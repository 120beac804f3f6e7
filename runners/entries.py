"""The three entries into the chain: a night folder, a table of diaSources, archived packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.alert_production import AlertProduction
from pipelines.catalogue_association import CatalogueAssociation
from pipelines.packet_replay import PacketReplay
from runners.kafka import KafkaMessageLog
from runners.output_folder import fingerprint, history_digest
from runners.running import Entry, RunInput, RunRequest
from schemas.element_tables import ElementsError
from schemas.elements import FailureRecord
from schemas.manifests import Manifest, ManifestError, manifest_lines, manifest_path, night_folder, read_manifest
from schemas.packet_index import index_packets, packet_files, read_index_visits
from schemas.source_tables import read_source_table, read_table_visits
from transforms.association import STAGE as ASSOCIATION
from transforms.association import read_archive
from transforms.cell_state import LATEST_DAYS
from transforms.delivery import Delivery
from transforms.distribution import FULL_STREAM, ZTF_TOPIC, BrokerConfig
from transforms.failures import failure_of
from transforms.ingestion import VisitList
from transforms.sky_cells import CellKnowledge
from transforms.solar_system import STAGE, EphemeridesError, element_table, read_ephemerides
from transforms.visit_stream import VisitStream

EPHEMERIDES = "ephemerides.parquet"
ORBITS = ("orbits.parquet", "orbits.csv")  # the first there is


class HistoryError(ValueError):
    """A folder given as history that is none."""


def night_input(night: Path, request: RunRequest, history: tuple[Path, ...] = ()) -> RunInput:
    """A night folder. ManifestError or HistoryError if it or the history cannot be read."""
    manifest = read_manifest(night)
    if not manifest.visits and not manifest.problems:
        raise ManifestError(f"{night}: visits.jsonl announces no visit")
    short = check_history(history, request, manifest)
    folders = tuple(str(folder) for folder in history)

    def enter(store: Path) -> Entry:
        ephemerides, without_places = usable_ephemerides(night)
        elements, without_orbits = usable_elements(night)

        def dataflow(delivery: Delivery) -> AlertProduction:
            visits = VisitList(str(manifest_path(night)), read_manifest)
            return AlertProduction(visits, delivery, request.config, ephemerides, folders, elements)

        return Entry(manifest, dataflow, request.brokers, (*without_places, *without_orbits, *short))

    # The order of lines does not decide anything, unless some cannot be used: of two that contradict each
    # other the first stands.
    lines = manifest_lines(night)
    images = {path for visit in manifest.visits for one in visit.detectors for path in (one.science, one.template)}
    beside = [str(night_folder(night) / name) for name in (EPHEMERIDES, *ORBITS)]
    parts = [
        "night",
        lines if manifest.problems else sorted(lines),
        [fingerprint(Path(path)) for path in sorted(path for path in images if path is not None) + beside],
        [history_digest(folder) for folder in history],
    ]
    return RunInput(str(night), parts, enter)


@dataclass(frozen=True)
class AnnouncedVisits:
    """A topic on which visits are announced, and how long to listen.

    Attributes
    ----------
    bootstrap, topic : where
    known_objects : folder with ephemerides.parquet, orbits.parquet or orbits.csv, or None
    visit_timeout_s : how long a visit waits for its detectors
    stop_at_end : stop behind what the topic holds now
    """

    bootstrap: str
    topic: str
    known_objects: Path | None
    visit_timeout_s: float
    stop_at_end: bool


def stream_input(announced: AnnouncedVisits, request: RunRequest, history: tuple[Path, ...] = ()) -> RunInput:
    """Visits as they are announced. KafkaUnreachableError or HistoryError if topic or history cannot be read."""
    log = KafkaMessageLog(announced.bootstrap, announced.topic, request.login)
    log.end()
    short = check_history(history, request, Manifest(()))
    folders = tuple(str(folder) for folder in history)
    known = announced.known_objects
    closings = request.out / "ledger" / "closings"
    stream = VisitStream(log, str(closings), announced.visit_timeout_s, announced.stop_at_end)

    def enter(store: Path) -> Entry:
        ephemerides, without_places = (None, ()) if known is None else usable_ephemerides(known)
        elements, without_orbits = (None, ()) if known is None else usable_elements(known)

        def dataflow(delivery: Delivery) -> AlertProduction:
            return AlertProduction(stream, delivery, request.config, ephemerides, folders, elements)

        return Entry(Manifest(()), dataflow, request.brokers, (*without_places, *without_orbits, *short))

    beside = [] if known is None else [fingerprint(known / name) for name in (EPHEMERIDES, *ORBITS)]
    parts = ["stream", announced.bootstrap, announced.topic, beside, [history_digest(folder) for folder in history]]
    return RunInput(f"topic {announced.topic} of {announced.bootstrap}", parts, enter)


def table_input(table: Path, request: RunRequest, history: tuple[Path, ...] = ()) -> RunInput:
    """A DIA-source table. ManifestError or HistoryError if it or the history cannot be read."""
    sources = read_source_table(table)
    manifest = sources.manifest
    if not manifest.visits and not manifest.problems:
        raise ManifestError(f"{table}: there is no source in it")
    short = check_history(history, request, manifest, sources.records["diaSourceId"])
    folders = tuple(str(folder) for folder in history)

    def enter(store: Path) -> Entry:
        def dataflow(delivery: Delivery) -> CatalogueAssociation:
            visits, config = VisitList(str(table), read_table_visits), request.config
            return CatalogueAssociation(visits, delivery, config.association, config.packaging, folders)

        return Entry(manifest, dataflow, request.brokers, short)

    parts = ["table", fingerprint(table), [history_digest(folder) for folder in history]]
    return RunInput(str(table), parts, enter)


def packets_input(sources: Sequence[Path], request: RunRequest, tell: Callable[[int], None] | None = None) -> RunInput:
    """Archived packets, files or folders of them. `tell` is told how many were found so far."""

    def enter(store: Path) -> Entry:
        path = store / "packets.parquet"
        index = index_packets(sources, path, store / "unpacked", tell)
        dataflow = partial(PacketReplay, VisitList(str(path), read_index_visits))
        return Entry(index.manifest, dataflow, brokers_of_survey(request.brokers, index.survey))

    files = [(path.name, fingerprint(path)) for path in packet_files(sources)]
    return RunInput(", ".join(str(source) for source in sources), ["packets", files], enter)


def brokers_of_survey(brokers: tuple[BrokerConfig, ...], survey: str) -> tuple[BrokerConfig, ...]:
    """The brokers as they are served with packets of a survey: ZTF's have a topic and an encoding of their own.

    Filtered streams stay in the encodings that need no schema id.
    """
    if survey != "ztf":
        return brokers
    return tuple(
        replace(broker, encoding="ocf", topic=ZTF_TOPIC)
        if broker.stream == FULL_STREAM
        else replace(broker, encoding="ocf" if broker.encoding == "rubin" else broker.encoding)
        for broker in brokers
    )


def check_history(
    history: tuple[Path, ...], request: RunRequest, manifest: Manifest, new_ids: Sequence[int] | np.ndarray = ()
) -> tuple[FailureRecord, ...]:
    """What the history lacks without being of no use.

    Parameters
    ----------
    history : earlier output folders
    request, manifest : the run and the visits to come
    new_ids : diaSourceIds to come, where they are known already

    Raises
    ------
    HistoryError
        Unless every folder of the history is the finished output of another run, of other detectors and sources.
    """
    names = ", ".join(str(folder) for folder in history)
    for folder in history:
        if folder.resolve() == request.out.resolve():
            raise HistoryError(f"--history {folder} is the output folder of this run")
    try:
        known = read_archive(tuple(str(folder) for folder in history))
        _check_tables(known)
        _check_nothing_comes_again(known, manifest, np.asarray(new_ids, dtype=np.int64))
    except (OSError, ValueError) as error:
        raise HistoryError(f"--history {names}: {error}") from error
    short = _with_short_history(known, request.config.association.rules().history_days)
    if short == 0:
        return ()
    reason = f"--history {names} holds fewer sources of {short} diaObjects than these had: earlier nights are missing"
    return (
        FailureRecord(None, None, ASSOCIATION, "ShortHistory", reason, f"part of the history of {short} diaObjects"),
    )


def _check_tables(known: CellKnowledge) -> None:
    """ValueError unless the tables of a history fit together."""
    for rows, kind in ((known.objects, "diaObjects"), (known.sources, "diaSources")):
        lost = ~(np.isfinite(rows["ra"]) & (np.abs(rows["dec"]) <= 90.0))
        if lost.any():
            raise ValueError(f"{lost.sum()} {kind} have no position")
    if not np.isfinite(known.sources["midpointMjdTai"]).all():
        raise ValueError("diaSources without a time")
    unknown = ~np.isin(known.sources["diaObjectId"], known.objects["diaObjectId"])
    if unknown.any():
        raise ValueError(f"{unknown.sum()} diaSources are of diaObjects that are not in it")


def _check_nothing_comes_again(known: CellKnowledge, manifest: Manifest, new_ids: np.ndarray) -> None:
    """ValueError if detectors or sources to come are in the history: they would be taken for repeats of these."""
    seen = {pair for rows in (known.sources, known.forced) for pair in rows[["visit", "detector"]].tolist()}
    for visit in manifest.visits:
        for one in visit.detectors:
            if (visit.visit, one.detector) in seen:
                raise ValueError(f"visit {visit.visit}, detector {one.detector} is in it, and to come as well")
    again = np.intersect1d(new_ids, known.sources["diaSourceId"])
    if len(again):
        raise ValueError(f"{len(again)} diaSourceIds to come are in it, the first is {again[0]}")


def _with_short_history(known: CellKnowledge, reach_days: float) -> int:
    """How many objects had more detections within reach of their last one than are there.

    Of those detected in the last month: of others, a night that is no longer needed may have held some.
    """
    objects, sources = known.objects, known.sources
    last = objects["lastDiaSourceMjdTai"]
    where = np.searchsorted(objects["diaObjectId"], sources["diaObjectId"])
    reached = sources["midpointMjdTai"] > last[where] - reach_days
    found = np.bincount(where[reached], minlength=len(objects))
    recent = last > np.max(last, initial=-np.inf) - LATEST_DAYS
    return int(np.count_nonzero(recent & (found < objects["nDiaSources"])))


def usable_ephemerides(night: Path) -> tuple[str | None, tuple[FailureRecord, ...]]:
    """The night's ephemerides, and what of them cannot be used; without them the night goes on."""
    path = night_folder(night) / EPHEMERIDES
    if not path.is_file():
        return None, ()
    try:
        _, problems = read_ephemerides(str(path))
    except EphemeridesError as error:
        return None, (failure_of(error, STAGE, None, lost="solar-system association with the night's ephemerides"),)
    return str(path), tuple(
        FailureRecord(None, None, STAGE, "UnusableEphemerides", f"{path.name}: {reason}", f"{count} rows")
        for reason, count in problems.items()
    )


def usable_elements(night: Path) -> tuple[str | None, tuple[FailureRecord, ...]]:
    """The night's elements, and what of them cannot be used; without them the night goes on."""
    path = next((path for name in ORBITS if (path := night_folder(night) / name).is_file()), None)
    if path is None:
        return None, ()
    try:
        table = element_table(str(path))
    except ElementsError as error:
        return None, (failure_of(error, STAGE, None, lost="solar-system association with the night's elements"),)
    return str(path), tuple(
        FailureRecord(
            None, None, STAGE, "UnusableElements", f"{path.name}: {one.reason}", f"{one.count} solar-system objects"
        )
        for one in table.problems
    )

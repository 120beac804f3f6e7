"""What a run did, in numbers: read from the ledger and the tables of an output folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runners.ledger import ledger_files
from transforms.latency import FIGURES, night_latency

MATCH_RADIUS_ARCSEC = 1.0
MIN_TRUTH_SNR = 10.0


@dataclass(frozen=True)
class FilterCount:
    """What one filter saw, passed on, and held back by its cap; the first error, if any."""

    seen: int
    passed: int
    capped: int
    error: str | None


@dataclass(frozen=True)
class RunSummary:
    """Totals over all visits of an output folder, and the records they came from.

    Attributes
    ----------
    visits : tuple of dict
        Ledger records in order of (midpoint, visit).
    failures : tuple of dict
        Failure records, those without a visit first.
    rejected : dict[str, int]
        diaSources that did not qualify, by reason, most frequent first.
    latency : dict or None
        How late alerts were, by stage (`transforms.latency`); None where visits were not announced.
    seconds_per_stage : dict[str, float]
        Worker seconds, longest first.
    """

    visits: tuple[dict[str, Any], ...]
    failures: tuple[dict[str, Any], ...]
    detectors_expected: int
    detectors_processed: int
    detectors_failed: int
    dia_sources_detected: int
    dia_sources_selected: int
    rejected: dict[str, int]
    ss_matches: int
    objects_new: int
    objects_updated: int
    sources_without_object: int
    forced_sources: int
    alerts: int
    delivered: dict[str, int]
    sent: dict[str, int]
    filters: dict[str, FilterCount]
    latencies_s: tuple[float, ...] = field(default=())
    latency: dict[str, Any] | None = None
    seconds_per_stage: dict[str, float] = field(default_factory=dict)

    @property
    def latency_p50_s(self) -> float | None:
        """Median over visits of the time from the first detector's start to the ledger record."""
        return median(self.latencies_s) if self.latencies_s else None

    @property
    def latency_max_s(self) -> float | None:
        return max(self.latencies_s, default=None)

    @property
    def unserved_brokers(self) -> dict[str, str]:
        """Why nothing went to some brokers, for as much as the ledger tells.

        Without Kafka no topic is in the ledger, and sinks of that kind are skipped. It does not say which
        brokers have one; but where every stream held alerts, a broker that got none cannot have been a folder.
        """
        if any(self.sent.values()) or self.alerts == 0:
            return {}
        empty = [name for name, count in self.filters.items() if count.passed == 0]
        reason = f"skipped: no Kafka (or a folder for {', '.join(empty)}, empty)" if empty else "skipped: no Kafka"
        lost = " ".join(text(record, "lost") for record in self.failures).split()
        return {name: reason for name, n in self.delivered.items() if n == 0 and name not in lost}

    def grouped_failures(self) -> list[tuple[str, str, int]]:
        """(stage, error and reason, how many), most frequent first, ties by name."""
        counts = Counter((text(record, "stage"), failure_reason(record)) for record in self.failures)
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [(stage, reason, n) for (stage, reason), n in ordered]


@dataclass(frozen=True)
class ClassRecovery:
    """How much of what was put into a simulated night came out as alerts, for one kind.

    `injected_bright` counts appearances on good pixels with |snr| above 10; `injected` all.
    """

    kind: str
    injected: int
    recovered: int
    injected_bright: int
    recovered_bright: int


class UnreadableOutputError(ValueError):
    """A file of the output folder cannot be read; the message names it and why."""


def summarise(out: Path) -> RunSummary:
    """Add up the ledger and the failures of an output folder.

    Optional keys that a record lacks count as nothing; an empty folder gives zeros.

    Raises
    ------
    UnreadableOutputError
        A ledger or failure file is not JSON.
    """
    visits = read_ledger(out)
    detectors = [_mapping(visit, "detectors") for visit in visits]
    sources = [_mapping(visit, "dia_sources") for visit in visits]
    objects = [_mapping(visit, "objects") for visit in visits]
    return RunSummary(
        visits=tuple(visits),
        failures=tuple(read_failures(out)),
        detectors_expected=_total(detectors, "expected"),
        detectors_processed=_total(detectors, "processed"),
        detectors_failed=_total(detectors, "failed"),
        dia_sources_detected=_total(sources, "detected"),
        dia_sources_selected=_total(sources, "selected"),
        rejected=_descending(+_added(_mapping(source, "rejected") for source in sources)),  # + drops the zeros
        ss_matches=_total(visits, "ss_matches"),
        objects_new=_total(objects, "new"),
        objects_updated=_total(objects, "updated"),
        sources_without_object=_total(visits, "sources_without_object"),
        forced_sources=_total(visits, "forced_sources"),
        alerts=_total(visits, "alerts"),
        delivered=_by_name(_added(_mapping(visit, "delivered") for visit in visits)),
        sent=_by_name(_added(_sent(visit) for visit in visits)),
        filters=_filter_counts(visits),
        latencies_s=tuple(float(visit["latency_s"]) for visit in visits if visit.get("latency_s") is not None),
        latency=night_latency(visits),
        seconds_per_stage=_descending(_added(_mapping(visit, "seconds") for visit in visits)),
    )


def json_summary(summary: RunSummary, seconds: float) -> dict[str, Any]:
    """The object that `--json` prints; `seconds` is the wall-clock time of the run."""
    return {
        "visits": len(summary.visits),
        "detectors": summary.detectors_processed,
        "dia_sources": summary.dia_sources_selected,
        "objects_new": summary.objects_new,
        "objects_updated": summary.objects_updated,
        "ss_matches": summary.ss_matches,
        "alerts": summary.alerts,
        "delivered": dict(summary.delivered),
        "passed": {name: count.passed for name, count in summary.filters.items()},
        "failures": len(summary.failures),
        "seconds": round(seconds, 3),
    }


def read_ledger(out: Path) -> list[dict[str, Any]]:
    """Ledger records, one a visit, in order of (midpoint, visit)."""
    records = [_parsed(path.read_text(encoding="utf-8"), str(path)) for path in ledger_files(out)]
    return sorted(records, key=lambda record: (record.get("midpoint_mjd_tai") or 0.0, record.get("visit") or 0))


def read_failures(out: Path) -> list[dict[str, Any]]:
    """Failure records in order of (visit, detector, stage, reason); those without a visit first."""
    records = []
    for path in sorted((out / "failures").glob("*.jsonl")):
        if path.name[0] in "._":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                records.append(_parsed(line, f"{path} line {number}"))

    def order(record: dict[str, Any]) -> tuple[int, int, str, str]:
        visit, detector = record.get("visit"), record.get("detector")
        place = (-1 if visit is None else int(visit), -1 if detector is None else int(detector))
        return (*place, text(record, "stage"), text(record, "reason"))

    return sorted(records, key=order)


def read_table(out: Path, table: str, columns: list[str], only: tuple[str, pa.Array] | None = None) -> pa.Table:
    """Read columns of `OUT/archive/<table>`; a table or column that isn't there comes back empty or null.

    `only` names one of the columns and the values of it whose rows are wanted: the others are not kept in memory.
    """
    files = sorted(path for path in (out / "archive" / table).glob("day_obs=*/*.parquet") if path.name[0] not in "._")
    if not files:
        return pa.table({name: pa.nulls(0) for name in columns})
    try:
        parts = [_read_columns(file, columns, only) for file in files]
    except (OSError, pa.ArrowInvalid) as error:
        raise UnreadableOutputError(f"table {table} cannot be read: {error}") from error
    return pa.concat_tables(parts, promote_options="permissive")


def _read_columns(file: Path, columns: list[str], only: tuple[str, pa.Array] | None) -> pa.Table:
    # One open a file: a run over years leaves thousands of small ones.
    with pq.ParquetFile(file) as stored:
        known = set(stored.schema_arrow.names)
        part = stored.read(columns=[name for name in columns if name in known], use_threads=False)
        n_rows = stored.metadata.num_rows
    for name in columns:
        if name not in known:  # a file with none of the columns still has its rows
            part = (
                part.append_column(name, pa.nulls(n_rows)) if part.num_columns else pa.table({name: pa.nulls(n_rows)})
            )
    part = part.select(columns)
    return part if only is None else part.filter(pc.is_in(part[only[0]].cast(only[1].type), only[1]))


def recovered(night: Path, out: Path) -> list[ClassRecovery]:
    """Compare what a simulated night contains with the alerts made from it.

    An injected appearance is recovered when a diaSource of the same visit and detector lies within
    1 arcsec of its true position and led to an alert (it has a diaObject or an ssObject).

    Parameters
    ----------
    night : Path
        Night folder; without `truth/injected.parquet` the result is empty.
    out : Path
        Output folder.

    Returns
    -------
    list[ClassRecovery]
        One a kind, in order of name.
    """
    path = night / "truth" / "injected.parquet"
    if not path.is_file():
        return []
    try:
        truth = pq.read_table(path, columns=["visit", "detector", "kind", "ra", "dec", "snr", "good_pixels"])
    except (OSError, pa.ArrowInvalid) as error:
        raise UnreadableOutputError(f"{path} cannot be read: {error}") from error
    found = _has_alert_nearby(truth, _alerting_sources(out))
    kinds = np.array(truth["kind"].to_pylist(), dtype=object)
    snr = np.abs(truth["snr"].to_numpy().astype(np.float64))
    bright = np.array(truth["good_pixels"].to_pylist(), dtype=bool) & (snr > MIN_TRUTH_SNR)
    return [
        ClassRecovery(
            kind=kind,
            injected=int(np.sum(kinds == kind)),
            recovered=int(np.sum((kinds == kind) & found)),
            injected_bright=int(np.sum((kinds == kind) & bright)),
            recovered_bright=int(np.sum((kinds == kind) & bright & found)),
        )
        for kind in sorted(set(kinds))
    ]


def print_summary(
    console: Console,
    summary: RunSummary,
    *,
    out: Path,
    seconds: float,
    recovery: list[ClassRecovery] | None = None,
    received: Mapping[str, int] | None = None,
    n_failures_shown: int = 5,
) -> None:
    """Print a run for a person.

    Parameters
    ----------
    console : rich.console.Console
        Where to print.
    summary : RunSummary
        From `summarise`.
    out : Path
        Output folder, named at the end.
    seconds : float
        Wall-clock time of the run.
    recovery : list[ClassRecovery] or None
        From `recovered`, for simulated nights.
    received : mapping of broker to count, or None
        What each embedded reader received, to set beside what was sent to it.
    n_failures_shown : int
        Most groups of failures to list.
    """
    console.print(_totals_table(summary, seconds))
    if summary.latency is not None:
        console.print(_latency_table(summary.latency))
    if summary.delivered or received:
        console.print(_brokers_table(summary, received))
    if summary.filters:
        console.print(_filters_table(summary))
    if recovery:
        console.print(_recovery_table(recovery))
    if summary.failures:
        console.print(_failures_table(summary, n_failures_shown))
    console.print(_places_table(out))


def failure_reason(record: Mapping[str, Any]) -> str:
    """Error class and reason of a failure record, as one text."""
    return ": ".join(part for part in (text(record, "error"), text(record, "reason")) if part) or "unknown"


def text(record: Mapping[str, Any], key: str) -> str:
    """A record's value as text; "" when it is missing or null."""
    value = record.get(key)
    return "" if value is None else str(value)


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UnreadableOutputError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UnreadableOutputError(f"{place} holds {type(record).__name__}, expected an object")
    return record


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def _total(records: Any, key: str) -> int:
    return sum(int(record.get(key) or 0) for record in records)


def _added(counts: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        for name, n in count.items():
            total[name] += n or 0
    return total


def _by_name(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts)}


def _descending(counts: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _sent(visit: Mapping[str, Any]) -> dict[str, int]:
    return {
        topic: (stream.get("sent") if isinstance(stream, Mapping) else stream) or 0
        for topic, stream in _mapping(visit, "streams").items()
    }


def _filter_counts(visits: list[dict[str, Any]]) -> dict[str, FilterCount]:
    records: dict[str, list[Mapping[str, Any]]] = {}
    for visit in visits:
        for name, record in _mapping(visit, "filters").items():
            records.setdefault(name, []).append(record)
    return {
        name: FilterCount(
            seen=_total(records[name], "seen"),
            passed=_total(records[name], "passed"),
            capped=_total(records[name], "capped"),
            error=next((str(record["error"]) for record in records[name] if record.get("error")), None),
        )
        for name in sorted(records)
    }


def _alerting_sources(out: Path) -> pa.Table:
    sources = read_table(out, "dia_sources", ["visit", "detector", "ra", "dec", "diaObjectId", "ssObjectId"])
    has_alert = [
        dia is not None or ss is not None
        for dia, ss in zip(sources["diaObjectId"].to_pylist(), sources["ssObjectId"].to_pylist(), strict=True)
    ]
    return sources.filter(pa.array(has_alert, pa.bool_()))


def _has_alert_nearby(truth: pa.Table, sources: pa.Table) -> np.ndarray:
    """Whether a source of the same visit and detector lies within the radius: bool (n_truth,)."""
    from scipy.spatial import cKDTree

    found = np.zeros(len(truth), dtype=bool)
    if len(sources) == 0:
        return found
    chord = 2.0 * np.sin(np.radians(MATCH_RADIUS_ARCSEC / 3600.0) / 2.0)
    source_rows = _rows_by_image(sources)
    source_xyz = _unit_vectors(sources)
    truth_xyz = _unit_vectors(truth)
    for image, rows in _rows_by_image(truth).items():
        if image in source_rows:
            tree = cKDTree(source_xyz[source_rows[image]])
            distance, _ = tree.query(truth_xyz[rows], distance_upper_bound=chord)
            found[rows] = np.isfinite(distance)
    return found


def _rows_by_image(table: pa.Table) -> dict[tuple[int, int], list[int]]:
    rows: dict[tuple[int, int], list[int]] = {}
    for row, image in enumerate(zip(table["visit"].to_pylist(), table["detector"].to_pylist(), strict=True)):
        rows.setdefault(image, []).append(row)
    return rows


def _unit_vectors(table: pa.Table) -> np.ndarray:
    ra = np.radians(table["ra"].to_numpy().astype(np.float64))
    dec = np.radians(table["dec"].to_numpy().astype(np.float64))
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)


def _number(n: int) -> str:
    return f"{n:,}"


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right")
    return table


def _totals_table(summary: RunSummary, seconds: float) -> Table:
    table = _table(
        f"{_number(summary.alerts)} alerts from {len(summary.visits)} visits in {seconds:.1f} s", "what", "n"
    )
    rows = {
        "detectors processed": _of(summary.detectors_processed, summary.detectors_expected),
        "diaSources detected": _number(summary.dia_sources_detected),
        "diaSources selected": _number(summary.dia_sources_selected),
        "diaObjects new": _number(summary.objects_new),
        "diaObjects updated": _number(summary.objects_updated),
        "solar-system matches": _number(summary.ss_matches),
        "diaForcedSources": _number(summary.forced_sources),
        "alerts": _number(summary.alerts),
        "failures": _number(len(summary.failures)),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    if summary.latency_p50_s is not None and summary.latency_max_s is not None:
        table.add_row(
            "latency a visit, median / longest", f"{summary.latency_p50_s:.1f} / {summary.latency_max_s:.1f} s"
        )
    return table


def _latency_table(latency: Mapping[str, Any]) -> Table:
    table = _table("Latency of alerts, seconds", "stage", "mean", "p50", "p99", "max")
    for name in FIGURES:
        table.add_row(name, *(f"{latency[name][figure]:.2f}" for figure in ("mean", "p50", "p99", "max")))
    return table


def _of(part: int, whole: int) -> str:
    return f"{_number(part)} of {_number(whole)}"


def _brokers_table(summary: RunSummary, received: Mapping[str, int] | None) -> Table:
    table = _table("Brokers", "broker", "sent", "received")
    for broker in sorted(set(summary.delivered) | set(received or {})):
        sent = summary.delivered.get(broker)
        got = (received or {}).get(broker)
        skipped = summary.unserved_brokers.get(broker)
        style = "red" if got is not None and sent is not None and got < sent else None
        table.add_row(
            Text(broker),
            "-" if sent is None else skipped or _number(sent),
            "-" if got is None else Text(_number(got), style=style or ""),
        )
    return table


def _filters_table(summary: RunSummary) -> Table:
    table = _table("Filters", "filter", "seen", "passed", "over the cap")
    for name, count in summary.filters.items():
        label = Text(name)
        if count.error:
            label.append(f"\n{count.error}", style="red")
        table.add_row(label, _number(count.seen), _number(count.passed), _number(count.capped))
    return table


def _recovery_table(recovery: list[ClassRecovery]) -> Table:
    table = _table(
        "Injected sources that became alerts", "kind", f"on good pixels, S/N > {MIN_TRUTH_SNR:.0f}", "percent", "all"
    )
    for kind in recovery:
        percent = f"{100 * kind.recovered_bright / kind.injected_bright:.1f}" if kind.injected_bright else "-"
        table.add_row(
            Text(kind.kind),
            _of(kind.recovered_bright, kind.injected_bright),
            percent,
            _of(kind.recovered, kind.injected),
        )
    return table


def _failures_table(summary: RunSummary, n_shown: int) -> Table:
    groups = summary.grouped_failures()
    table = _table("Failures", "stage", "n", "reason")
    table.columns[2].justify = "left"
    for stage, reason, n in groups[:n_shown]:
        table.add_row(Text(stage), _number(n), Text(reason))
    if len(groups) > n_shown:
        table.add_row(f"and {len(groups) - n_shown} kinds more", "", "")
    return table


def _places_table(out: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify, table.title_style = "Where it lies", "left", "bold"
    for name, place in {
        "report": out / "report" / "index.html",
        "alerts": out / "archive" / "alerts",
        "brokers": out / "brokers",
        "filters": out / "filters",
        "ledger": out / "ledger",
        "failures": out / "failures",
    }.items():
        if place.exists():
            table.add_row(name, Text(str(place), overflow="fold"))
    return table

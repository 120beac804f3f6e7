"""FilterAlerts, the mini-broker, and GatherVisits, which brings a visit together for it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.coders import BytesCoder, VarIntCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp

from schemas.elements import FailureRecord, VisitAlerts
from schemas.framing import pack, unpack
from schemas.records import (
    DIA_FORCED_SOURCE,
    DIA_OBJECT,
    DIA_SOURCE,
    SS_SOURCE,
    concatenate_records,
    records_from_bytes,
    take_records,
)
from transforms.alert_columns import thin_schema
from transforms.failures import FAILED
from transforms.filters.checking import CheckedFilter
from transforms.filters.engine import FilterConnection
from transforms.filters.execution import FilterOutcome, run_filters
from transforms.latency import visit_latency
from transforms.metrics import FILTER_PASSES

STAGE = "filtering"
# How long after a visit its late detectors still find the others.
VISIT_MEMORY_S = 2 * 86_400
_TABLES = (
    ("dia_sources", DIA_SOURCE, "diaSourceId"),
    ("dia_objects", DIA_OBJECT, "diaObjectId"),
    ("dia_forced_sources", DIA_FORCED_SOURCE, "diaForcedSourceId"),
    ("ss_sources", SS_SOURCE, "diaSourceId"),
)


class GatherVisits(beam.PTransform):
    """Bring all parts of a visit together when the watermark has passed it.

    Input: (visit, bytes) parts: the announcement (ingestion), processed detectors (cutouts), failures and
    batches of alerts (packaging). Output: VisitAlerts at the visit's event time. Key: visit. A
    part that comes later makes a further revision with everything known by then; a repeated part
    changes nothing. State: the parts of a visit, dropped `VISIT_MEMORY_S` after it, unless `keeps`: the local runner
    fires that timer at once, which is too early where parts can come later.
    """

    def __init__(self, filter_columns: frozenset[str], *, keeps: bool = False) -> None:
        super().__init__()
        self.gather = _GatherPartsFn(filter_columns, keeps)

    def expand(self, parts: beam.PCollection) -> beam.PCollection:
        return parts | "GatherParts" >> beam.ParDo(self.gather).with_output_types(VisitAlerts)


class _GatherPartsFn(beam.DoFn):
    FRESH = BagStateSpec("fresh", BytesCoder())
    SETTLED = BagStateSpec("settled", BytesCoder())
    REVISIONS = ReadModifyWriteStateSpec("revisions", VarIntCoder())
    DUE = TimerSpec("visit_due", TimeDomain.WATERMARK)
    FORGET = TimerSpec("visit_forget", TimeDomain.WATERMARK)

    def __init__(self, filter_columns: frozenset[str], keeps: bool) -> None:
        self.filter_columns = filter_columns
        self.keeps = keeps

    def process(
        self,
        element: tuple[int, bytes],
        timestamp: Timestamp = beam.DoFn.TimestampParam,
        fresh: Any = beam.DoFn.StateParam(FRESH),
        due: Any = beam.DoFn.TimerParam(DUE),
        forget: Any = beam.DoFn.TimerParam(FORGET),
    ) -> None:
        fresh.add(element[1])
        due.set(timestamp)
        if not self.keeps:
            forget.set(timestamp + Duration(VISIT_MEMORY_S))

    @on_timer(DUE)
    def close(
        self,
        visit: int = beam.DoFn.KeyParam,
        timestamp: Timestamp = beam.DoFn.TimestampParam,
        fresh: Any = beam.DoFn.StateParam(FRESH),
        settled: Any = beam.DoFn.StateParam(SETTLED),
        revisions: Any = beam.DoFn.StateParam(REVISIONS),
    ) -> Iterator[Any]:
        parts: dict[int, set[bytes]] = {}
        for part in settled.read():
            header, buffers = unpack(bytes(part))
            parts.setdefault(header["revision"], set()).add(bytes(buffers[0]))
        older = {_natural_key(part) for part in set().union(*parts.values())}
        new = {_natural_key(part): part for part in sorted(bytes(part) for part in fresh.read())}
        new_parts = {part for key, part in new.items() if key not in older}
        fresh.clear()
        if not new_parts:
            return
        revision = revisions.read() or 0
        parts[revision] = new_parts
        for part in new_parts:
            settled.add(pack({"revision": revision}, (part,)))
        revisions.write(revision + 1)
        yield TimestampedValue(visit_alerts(visit, revision, parts, self.filter_columns), timestamp)

    @on_timer(FORGET)
    def forget_visit(
        self,
        fresh: Any = beam.DoFn.StateParam(FRESH),
        settled: Any = beam.DoFn.StateParam(SETTLED),
        revisions: Any = beam.DoFn.StateParam(REVISIONS),
    ) -> None:
        # The local runner may fire this before `close`: what still waits must not be lost.
        if any(True for _ in fresh.read()):
            return
        settled.clear()
        revisions.clear()


def _natural_key(part: bytes) -> str:
    """What a part speaks of. A repeated one differs in its clocks, so bytes do not tell."""
    header, _ = unpack(part)
    speaks_of = {
        "visit": lambda: "",
        "detector": lambda: header["detector"],
        "failure": lambda: header["record"],
        "alerts": lambda: header["group"],
    }
    return f"{header['kind']} {speaks_of[header['kind']]()}"


def visit_alerts(
    visit: int, revision: int, parts: dict[int, set[bytes]], filter_columns: frozenset[str]
) -> VisitAlerts:
    """Everything known of a visit from its parts, in an order that does not depend on theirs."""
    schema = thin_schema(filter_columns).append(pa.field("revision", pa.int64()))
    thin: list[pa.Table] = []
    rows: dict[str, list[np.ndarray]] = {name: [] for name, _, _ in _TABLES}
    headers: dict[str, list[dict[str, Any]]] = {"visit": [], "detector": [], "failure": [], "alerts": []}
    for number in sorted(parts):
        for part in sorted(parts[number], key=_natural_key):
            header, buffers = unpack(part)
            header["revision"] = number
            headers[header["kind"]].append(header)
            if header["kind"] != "alerts":
                continue
            table = pa.ipc.open_stream(buffers[0]).read_all()
            header["alerts"] = len(table)
            table = table.append_column("revision", pa.array(np.full(len(table), number)))
            thin.append(table if table.schema == schema else _with_columns(table, schema))
            for (name, dtype, _), buffer in zip(_TABLES, buffers[1:], strict=True):
                rows[name].append(records_from_bytes(dtype, buffer))
    alerts = pa.concat_tables(thin) if thin else schema.empty_table()
    alerts = _first_rows(alerts)
    tables = {name: _unique_records(concatenate_records(rows[name], dtype), key) for name, dtype, key in _TABLES}
    failures = tuple(FailureRecord(**header["record"]) for header in headers["failure"])
    summary = _summary(visit, revision, headers, alerts, tables)
    return VisitAlerts(visit, summary["day_obs"], revision, summary, alerts, tables, failures)


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema from a part that was made for other filters, in a job that goes on with these."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _first_rows(alerts: pa.Table) -> pa.Table:
    """One row per diaSourceId, the earliest revision of each, sorted by it."""
    ids = alerts["diaSourceId"].to_numpy()
    return alerts.take(pa.array(np.unique(ids, return_index=True)[1]))


def _unique_records(records: np.ndarray, key: str) -> np.ndarray:
    """One record per key, the last one known (an object may be touched by two revisions), sorted by it."""
    backwards = take_records(records, np.arange(len(records))[::-1])
    return take_records(backwards, np.unique(backwards[key], return_index=True)[1])


def _summary(
    visit: int,
    revision: int,
    headers: dict[str, list[dict[str, Any]]],
    alerts: pa.Table,
    tables: dict[str, np.ndarray],
) -> dict[str, Any]:
    unannounced: dict[str, Any] = {"context": {"day_obs": 0}, "expected": []}
    announced = headers["visit"][0] if headers["visit"] else unannounced
    context = announced["context"]
    detectors = {header["detector"]: header for header in headers["detector"]}
    rejected: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for header in detectors.values():
        for reason, count in header["rejected"].items():
            rejected[reason] = rejected.get(reason, 0) + count
    for header in [*detectors.values(), *headers["alerts"]]:
        for stage, spent in header["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    counts: dict[str, int] = {}
    for header in headers["alerts"]:
        for name, count in header["counts"].items():
            counts[name] = counts.get(name, 0) + count
    shipped: dict[str, dict[str, int]] = {"trimmed": {}, "too_large": {}}
    for header in headers["alerts"]:
        for name, topics in header["shipped"].items():
            for topic, count in topics.items():
                shipped[name][topic] = shipped[name].get(topic, 0) + count
    expected = set(announced["expected"])
    return {
        "visit": visit,
        "day_obs": context["day_obs"],
        "band": context.get("band"),
        "midpoint_mjd_tai": context.get("midpoint_mjd_tai"),
        "readout_end_mjd_tai": context.get("readout_end_mjd_tai"),
        "revision": revision,
        "detectors": {
            "expected": len(expected),
            "processed": len(detectors),
            "failed": len(expected - set(detectors)),
        },
        "dia_sources": {
            "detected": sum(header["detected"] for header in detectors.values()),
            "selected": sum(header["selected"] for header in detectors.values()),
            "rejected": rejected,
        },
        "sky_sources": _sky_sources([header["sky_sources"] for header in detectors.values() if header["sky_sources"]]),
        "ss_matches": sum(header["ss_matches"] for header in detectors.values()),
        "objects": {"new": counts.get("objects_new", 0), "updated": counts.get("objects_updated", 0)},
        "sources_without_object": counts.get("sources_without_object", 0),
        "contested_groups": counts.get("contested_groups", 0),
        "wide_groups": counts.get("wide_groups", 0),
        "alerts": len(alerts),
        "forced_sources": len(tables["dia_forced_sources"]),
        **shipped,
        "started_at": min((header["started_at"] for header in detectors.values()), default=None),
        "latency": visit_latency(list(detectors.values()), headers["alerts"]),
        "notes": sorted({note for header in detectors.values() for note in header["notes"]}),
        "seconds": seconds,
    }


def _sky_sources(detectors: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How many there were in the visit, and of everything else the median over its detectors."""
    if not detectors:
        return None
    merged = {name: statistics.median(one[name] for one in detectors) for name in detectors[0]}
    return {**merged, "measured": sum(one["measured"] for one in detectors)}


class FilterResult(NamedTuple):
    """`good`: VisitAlerts with what passed; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class FilterAlerts(beam.PTransform):
    """Run the installed filters on a visit's alerts, each capped per visit by its own rank.

    Input: VisitAlerts. Output `good`: the same with the passed ids of each filter, what it selects of them,
    and counts in the summary; `failed`: a filter that failed (the others run). The cap holds over revisions: late rows
    take what room earlier ones left. Order: as it comes; a duplicate gives the same. No state.
    """

    def __init__(self, filters: tuple[CheckedFilter, ...]) -> None:
        super().__init__()
        self.filters = filters

    def expand(self, visits: beam.PCollection) -> FilterResult:
        outputs = visits | "RunFilters" >> beam.ParDo(_RunFiltersFn(self.filters)).with_output_types(
            VisitAlerts
        ).with_outputs(FAILED, main="good")
        return FilterResult(outputs.good, outputs[FAILED])


class _RunFiltersFn(beam.DoFn):
    def __init__(self, filters: tuple[CheckedFilter, ...]) -> None:
        self.filters = filters

    def setup(self) -> None:
        self.connection = FilterConnection()

    def teardown(self) -> None:
        self.connection.close()

    def process(self, visit: VisitAlerts) -> Iterator[Any]:
        passed: dict[str, np.ndarray] = {one.definition.full_name: np.empty(0, dtype=np.int64) for one in self.filters}
        counts = {name: {"seen": 0, "passed": 0, "capped": 0, "error": None} for name in passed}
        selected: dict[str, list[pa.Table]] = {}
        failures: list[FailureRecord] = []
        revisions = visit.alerts["revision"].to_numpy()
        for number in range(visit.revision + 1):
            rows = visit.alerts.filter(pa.array(revisions == number))
            for one, outcome in zip(self.filters, run_filters(self.filters, rows, self.connection), strict=True):
                name = one.definition.full_name
                room = one.definition.max_per_visit - len(passed[name])
                taken = outcome.passed[: max(room, 0)]
                passed[name] = np.concatenate([passed[name], taken])
                if outcome.columns.num_columns:
                    selected.setdefault(name, []).append(outcome.columns.slice(0, len(taken)))
                _add_counts(counts[name], outcome, len(taken))
                if outcome.error is not None and number == visit.revision:
                    lost = f"what {name} would have passed of {outcome.n_seen} alerts"
                    failures.append(FailureRecord(visit.visit, None, STAGE, "FilterFailed", outcome.error, lost))
        yield from (beam.pvalue.TaggedOutput(FAILED, failure) for failure in failures)
        FILTER_PASSES.inc(sum(map(len, passed.values())))
        summary = {**visit.summary, "filters": counts}
        yield replace(
            visit,
            summary=summary,
            passed=passed,
            selected={name: pa.concat_tables(tables) for name, tables in selected.items()},
            failures=visit.failures + tuple(failures),
        )


def _add_counts(counts: dict[str, Any], outcome: FilterOutcome, n_taken: int) -> None:
    counts["seen"] += outcome.n_seen
    counts["passed"] += n_taken
    counts["capped"] += outcome.n_passed - n_taken
    counts["error"] = outcome.error or counts["error"]

"""Running checked filters on the alerts of one visit.

Filters run one after the other on one connection, each under a time limit. The limit is an
interrupt, which DuckDB honours between vectors, not inside one call; running filters in a process that
can be killed from outside is a later step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.tables import project_alerts_schema
from transforms.filters.checking import CheckedFilter
from transforms.filters.engine import TABLE, TIMEOUT_S, FilterConnection, tidy_message, time_limit


class AlertsTableError(ValueError):
    """The table of alerts cannot be filtered: a column is missing or of a wrong type, or an id is null or repeated."""


@dataclass(frozen=True, eq=False)
class FilterOutcome:
    """What one filter did with one visit.

    `passed` (int64) holds the diaSourceIds that go out, best first, at most `max_per_visit`; row i of
    `columns` holds the select expressions of `passed[i]`. `n_passed` counts before the cap, `n_capped` those
    it held back. With an `error` nothing passed. `seconds` is wall time, the only part that may differ from run to run.
    """

    filter: str
    passed: npt.NDArray[np.int64]
    columns: pa.Table
    n_seen: int
    n_passed: int
    n_capped: int
    error: str | None
    seconds: float


def run_filters(
    filters: Sequence[CheckedFilter],
    alerts: pa.Table,
    connection: FilterConnection,
    *,
    timeout_s: float = TIMEOUT_S,
) -> list[FilterOutcome]:
    """Run every filter on all alerts of one visit.

    Parameters
    ----------
    filters : sequence of CheckedFilter
        One that fails says so in its outcome and does not touch the others.
    alerts : pa.Table
        One row per alert in any order, with at least the columns the filters need
        (`schemas.tables.project_alerts_schema`). Filters see NaN as null and a null history list as empty.
    connection : FilterConnection
        Holds no table between two calls.
    timeout_s : float
        Wall time each filter may take, > 0.

    Returns
    -------
    list of FilterOutcome
        In the order of `filters`; the same whatever the order of the rows.

    Raises
    ------
    AlertsTableError
        A needed column is missing or has another type than in the schema; a diaSourceId is null or
        stands twice.
    """
    needed = frozenset({"diaSource.diaSourceId"}.union(*(one.columns for one in filters)))
    visible = _as_filters_see(alerts, project_alerts_schema(needed))
    outcomes = []
    for one in filters:
        begin = time.perf_counter()
        try:
            outcome = _run(connection.get(), one, visible, timeout_s)
        except Exception as error:  # whatever one author's SQL does must not stop the others
            outcome = _failed(one, visible.num_rows, error)
            # DuckDB refuses everything after an internal error; and nothing of a failed query may stay behind.
            connection.close()
        outcomes.append(replace(outcome, seconds=time.perf_counter() - begin))
    return outcomes


def _run(
    connection: duckdb.DuckDBPyConnection, one: CheckedFilter, visible: pa.Table, timeout_s: float
) -> FilterOutcome:
    # Wide structs cost time even where their fields are not read.
    thin = _conform_table(visible, project_alerts_schema(one.columns))
    with time_limit(connection, timeout_s):
        connection.register(TABLE, thin)
        ranked = connection.execute(one.passing_sql).fetchnumpy()["__id"]
        passed = np.asarray(ranked[: one.definition.max_per_visit], dtype=np.int64)
        columns = pa.table({})
        if one.output_sql is not None:
            connection.register(TABLE, _rows_of(thin, passed))
            columns = _in_order(connection.sql(one.output_sql).to_arrow_table(), passed, one.output_names)
        connection.unregister(TABLE)
    return FilterOutcome(
        filter=one.definition.full_name,
        passed=passed,
        columns=columns,
        n_seen=visible.num_rows,
        n_passed=len(ranked),
        n_capped=len(ranked) - len(passed),
        error=None,
        seconds=0.0,
    )


def _failed(one: CheckedFilter, n_seen: int, error: Exception) -> FilterOutcome:
    return FilterOutcome(
        filter=one.definition.full_name,
        passed=np.empty(0, dtype=np.int64),
        columns=pa.table({}),
        n_seen=n_seen,
        n_passed=0,
        n_capped=0,
        error=f"{type(error).__name__}: {tidy_message(error)}",
        seconds=0.0,
    )


def _rows_of(thin: pa.Table, passed: npt.NDArray[np.int64]) -> pa.Table:
    return thin.take(np.searchsorted(_ids(thin), np.sort(passed)))


def _in_order(found: pa.Table, passed: npt.NDArray[np.int64], names: Sequence[str]) -> pa.Table:
    """The output rows in the order of `passed` (a subquery may return them in another), without their ids."""
    found_ids = found.column(found.num_columns - 1).to_numpy()
    rows = np.argsort(found_ids)[np.searchsorted(np.sort(found_ids), passed)]
    return found.take(rows).select(range(len(names))).rename_columns(list(names))


# --- the table as filters see it


def _ids(table: pa.Table) -> npt.NDArray[np.int64]:
    ids: npt.NDArray[np.int64] = pc.struct_field(table.column("diaSource"), "diaSourceId").to_numpy()
    return ids


def _as_filters_see(alerts: pa.Table, schema: pa.Schema) -> pa.Table:
    """The needed columns only, sorted by diaSourceId, NaN as null, no null lists."""
    table = _conform_table(alerts, schema)
    column = pc.struct_field(table.column("diaSource"), "diaSourceId")
    if column.null_count:
        raise AlertsTableError(f"{column.null_count} of {len(column)} alerts have no diaSource.diaSourceId")
    ids = column.to_numpy()
    if np.any(ids[1:] < ids[:-1]):  # sorted input makes even sums of floats repeat, whatever order alerts came in
        order = np.argsort(ids, kind="stable")
        ids, table = ids[order], table.take(order)
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if len(repeated):
        raise AlertsTableError(f"diaSourceId {repeated[0]} stands more than once among the alerts of one visit")
    return table


def _conform_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    arrays = []
    for field in schema:
        if table.column_names.count(field.name) != 1:
            raise AlertsTableError(f"the alerts have no column {field.name}; they have {', '.join(table.column_names)}")
        column = table.column(field.name)
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        arrays.append(_conform(array, field.type, field.name))
    return pa.Table.from_arrays(arrays, schema=schema)


def _conform(array: pa.Array, wanted: pa.DataType, name: str) -> pa.Array:
    """`array` cut down to `wanted`, sharing its buffers; NaN becomes null, a null list becomes empty."""
    if pa.types.is_struct(wanted) and pa.types.is_struct(array.type):
        for field in wanted:
            if array.type.get_field_index(field.name) < 0:
                raise AlertsTableError(f"the alerts have no column {name}.{field.name}")
        children = [_conform(array.field(field.name), field.type, f"{name}.{field.name}") for field in wanted]
        mask = array.is_null() if array.null_count else None
        return pa.StructArray.from_arrays(children, fields=list(wanted), mask=mask)
    if pa.types.is_list(wanted) and pa.types.is_list(array.type):
        values = _conform(array.flatten(), wanted.value_type, name)
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, values, type=wanted)
    if array.type != wanted:
        raise AlertsTableError(f"column {name} has type {array.type}, expected {wanted}")
    if pa.types.is_floating(wanted):
        is_nan = pc.is_nan(array)
        if pc.any(is_nan).as_py():
            return pc.if_else(is_nan, pa.scalar(None, wanted), array)
    return array

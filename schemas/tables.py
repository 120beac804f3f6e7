"""Arrow tables that cross a stage boundary: their columns and types, generated from the schema definitions.

Today this is the table `alerts`, what a filter author sees: one row per alert, the records of its packet as
struct columns and its history as lists of structs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import cache
from importlib import resources

import pyarrow as pa

ALERTS_SCHEMA_VERSION = "v11_1"  # v11.1 only adds nullable fields to v11.0, so it serves both

# column -> (record in the definitions, is it a list)
ALERT_COLUMNS = {
    "diaSource": ("diaSource", False),
    "diaObject": ("diaObject", False),
    "ssSource": ("ssSource", False),
    "prvDiaSources": ("diaSource", True),
    "prvDiaForcedSources": ("diaForcedSource", True),
}

ALERT_ID = "diaSourceId"

# Stands for its column when only the presence or the number of records is asked for; never null.
KEY_FIELDS = {
    "diaSource": "diaSourceId",
    "diaObject": "diaObjectId",
    "ssSource": "ssObjectId",
    "prvDiaSources": "diaSourceId",
    "prvDiaForcedSources": "diaForcedSourceId",
}

_ARROW_TYPES = {
    "long": pa.int64(),
    "int": pa.int32(),
    "float": pa.float32(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "string": pa.string(),
    "timestamp-micros": pa.timestamp("us"),
}


@cache
def alerts_arrow_schema() -> pa.Schema:
    """The whole table `alerts`: diaSourceId and the columns of `ALERT_COLUMNS`, every field nullable.

    Returns
    -------
    pa.Schema
        Struct columns diaSource, diaObject, ssSource; list-of-struct columns prvDiaSources and
        prvDiaForcedSources; fields in the order of the definitions.
    """
    fields = [pa.field(ALERT_ID, pa.int64())]
    for column, (record, is_list) in ALERT_COLUMNS.items():
        struct = pa.struct(_record_fields(record))
        fields.append(pa.field(column, pa.list_(struct) if is_list else struct))
    return pa.schema(fields)


def alert_fields(column: str) -> tuple[str, ...]:
    """Field names of one struct or list-of-struct column of `alerts`, in schema order.

    Raises
    ------
    KeyError
        `alerts` has no such column, or it holds no records.
    """
    record, _ = ALERT_COLUMNS[column]
    return tuple(field.name for field in _record_fields(record))


def project_alerts_schema(columns: Iterable[str]) -> pa.Schema:
    """The table `alerts` cut down to the named columns.

    Parameters
    ----------
    columns : iterable of str
        `diaSourceId` or `<column>.<field>`, e.g. `diaSource.snr`, `prvDiaSources.psfFlux`.

    Returns
    -------
    pa.Schema
        In the order of `alerts_arrow_schema`, whatever the order of `columns`; always holds
        `diaSource.diaSourceId`.

    Raises
    ------
    ValueError
        A name that `alerts` does not have.
    """
    wanted: dict[str, set[str]] = {"diaSource": {"diaSourceId"}}
    with_id = False
    for name in columns:
        column, _, field = name.partition(".")
        if name == ALERT_ID:
            with_id = True
        elif column in ALERT_COLUMNS and field in alert_fields(column):
            wanted.setdefault(column, set()).add(field)
        else:
            raise ValueError(f"table alerts has no column {name!r}")
    fields = [pa.field(ALERT_ID, pa.int64())] if with_id else []
    for column, (record, is_list) in ALERT_COLUMNS.items():
        if column in wanted:
            struct = pa.struct([field for field in _record_fields(record) if field.name in wanted[column]])
            fields.append(pa.field(column, pa.list_(struct) if is_list else struct))
    return pa.schema(fields)


@cache
def _record_fields(record: str) -> tuple[pa.Field, ...]:
    source = resources.files("schemas.avro.definitions") / f"{ALERTS_SCHEMA_VERSION}.csv"
    rows = csv.DictReader(source.read_text(encoding="utf-8").splitlines())
    return tuple(
        pa.field(row["field"], _ARROW_TYPES[row["type"].removesuffix("?")]) for row in rows if row["record"] == record
    )

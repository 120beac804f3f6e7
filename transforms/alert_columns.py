"""The thin table of alerts that travels to visit space: identity, location and the columns filters name.

Where a broker gets alerts in JSON, the table has what these say besides, and they are made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import erfa
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.avro.adaptation import PacketHead
from schemas.avro.reading import to_json
from schemas.elements import AlertBatch
from schemas.records import records_to_arrow, take_records
from schemas.tables import project_alerts_schema

LOCATION_FIELDS = (
    pa.field("diaSourceId", pa.int64()),
    pa.field("kafkaKey", pa.string()),
    pa.field("packetFile", pa.string()),
    pa.field("packetDigest", pa.string()),
)

JSON_COLUMNS = frozenset(
    f"diaSource.{name}" for name in ("diaObjectId", "ssObjectId", "diaSourceId", "visit", "ra", "dec", "midpointMjdTai")
)
_MJD_ZERO_JD = 2_400_000.5


def thin_schema(filter_columns: Iterable[str]) -> pa.Schema:
    """Schema of the thin table: the filters' table `alerts`, then where each packet lies."""
    schema = project_alerts_schema(filter_columns)
    for field in LOCATION_FIELDS:
        if field.name not in schema.names:
            schema = schema.append(field)
    return schema


def thin_alerts(batch: AlertBatch, file_name: str, digests: list[str], filter_columns: Iterable[str]) -> pa.Table:
    """The thin table of one batch, a row per alert."""
    schema = thin_schema(filter_columns)
    sources = batch.dia_sources
    n = len(sources)
    has_object = sources["diaObjectId"] != 0
    has_ss = sources["ssObjectId"] != 0
    records = {
        "diaSource": (sources, np.ones(n, dtype=bool)),
        "diaObject": (batch.dia_objects, has_object),
        "ssSource": (batch.ss_sources, has_ss),
    }
    lists = {
        "prvDiaSources": (batch.prv_dia_sources, batch.prv_offsets),
        "prvDiaForcedSources": (batch.prv_forced_sources, batch.forced_offsets),
    }
    columns: dict[str, pa.Array] = {
        "diaSourceId": pa.array(sources["diaSourceId"]),
        "kafkaKey": pa.array(np.where(has_object, sources["diaObjectId"], sources["ssObjectId"])).cast(pa.string()),
        "packetFile": pa.array([file_name] * n, pa.string()),
        "packetDigest": pa.array(digests, pa.string()),
    }
    for column, (rows, valid) in records.items():
        if column in schema.names:
            columns[column] = _struct(rows, schema.field(column).type, valid)
    for column, (rows, offsets) in lists.items():
        if column in schema.names:
            item = _struct(rows, schema.field(column).type.value_type, np.ones(len(rows), dtype=bool))
            columns[column] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), item)
    return pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


def replayed_alerts(
    packets: Sequence[PacketHead], table: pa.Table, file_name: str, digests: list[str], filter_columns: Iterable[str]
) -> pa.Table:
    """The thin table of replayed packets, a row each; `table` holds their `filter_columns`."""
    located = {
        "diaSourceId": pa.array([packet.dia_source_id for packet in packets], pa.int64()),
        "kafkaKey": pa.array([packet.kafka_key for packet in packets], pa.string()),
        "packetFile": pa.array([file_name] * len(packets), pa.string()),
        "packetDigest": pa.array(digests, pa.string()),
    }
    schema = thin_schema(filter_columns)
    arrays = [located[name] if name in located else table[name] for name in schema.names]
    return pa.table(arrays, schema=schema)


def thin_json(alerts: pa.Table, selected: pa.Table | None = None) -> list[bytes]:
    """Alerts as JSON objects, without cutouts or history (encoding `json-thin`).

    Parameters
    ----------
    alerts : thin table with `JSON_COLUMNS`
    selected : what the stream's filter selects of them, row by row; a column named like one of ours is left out

    Returns
    -------
    list of bytes
        One object each: ids as text (as are all whole numbers beyond 2^53), what is unknown null. `UTC` is the
        visit's midpoint, so that the same alert has the same bytes whenever it is sent.
    """
    names = [name.partition(".")[2] for name in JSON_COLUMNS]
    source = {name: pc.struct_field(alerts["diaSource"], name) for name in names}
    columns = {
        "diaObjectId": source["diaObjectId"],
        "objectId": source["diaObjectId"],
        "ssObjectId": source["ssObjectId"],
        "diaSourceId": source["diaSourceId"],
        "visit": source["visit"],
        "ra": source["ra"],
        "dec": source["dec"],
        "time": source["midpointMjdTai"],
    }
    if selected is not None:
        columns |= {name: selected[name] for name in selected.column_names if name not in {*columns, "UTC"}}
    columns["UTC"] = pa.array([_utc_text(time) for time in source["midpointMjdTai"].to_pylist()], pa.string())
    return [to_json(row).encode() for row in pa.table(columns).to_pylist()]


@lru_cache(maxsize=1024)
def _utc_text(mjd_tai: float | None) -> str | None:
    """A TAI time as date and time in UTC to the second; None for no time."""
    if mjd_tai is None or not math.isfinite(mjd_tai):
        return None
    utc = erfa.ufunc.taiutc(_MJD_ZERO_JD, mjd_tai)[:2]
    year, month, day, clock, _ = erfa.ufunc.d2dtf(b"UTC", 0, *utc)
    return f"{year}-{month:02}-{day:02} {clock['h']:02}:{clock['m']:02}:{clock['s']:02}"


def _struct(rows: np.ndarray, struct: pa.StructType, valid: np.ndarray) -> pa.StructArray:
    names = [field.name for field in struct]
    table = records_to_arrow(take_records(rows, np.arange(len(rows))), fields=names)
    arrays = [table.column(name).combine_chunks() for name in names]
    return pa.StructArray.from_arrays(arrays, fields=list(struct), mask=pa.array(~valid))

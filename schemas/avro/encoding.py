"""Columns of a batch of alerts to finished packet bodies, each encoded once.

Null rules of the packet (LSST's, unless said otherwise):

- a source of an object: `diaObject` set; `prvDiaSources` is null for an object with one source, a list
  (perhaps empty) from the second on; `prvDiaForcedSources` is a list, empty when there are none;
- a source of a solar-system object: `ssSource` set; `diaObject` and both histories null;
- `mpc_orbits` is set where the object's elements are known;
- a NaN in a nullable float is null (LSST writes NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from schemas import records
from schemas.avro import row_encoding
from schemas.avro.row_encoding import RowPlan, encode_rows, row_plan
from schemas.avro.schema_versions import PacketSchema

_KINDS = {
    "long": row_encoding.LONG,
    "timestamp-micros": row_encoding.LONG,
    "int": row_encoding.INT,
    "float": row_encoding.FLOAT,
    "double": row_encoding.DOUBLE,
    "boolean": row_encoding.BOOLEAN,
    "string": row_encoding.STRING,
}
_NULL = b"\x00"  # branch 0 of a union, zigzag
_VALUE = b"\x02"  # branch 1
_END_OF_ARRAY = b"\x00"


class PacketContentError(ValueError):
    """Columns that do not make packets; the message names the column and the reason."""


@dataclass(frozen=True, eq=False)
class AlertColumns:
    """A batch of n alerts of one visit, as columns.

    Attributes
    ----------
    dia_sources : (n,) DIA_SOURCE, the detections that triggered the alerts
    observation_reason, target_name : of the visit; None or empty is null
    prv_dia_sources : flat DIA_SOURCE, history of alert i in rows `prv_offsets[i]:prv_offsets[i + 1]`
    prv_offsets : (n + 1,) int64, from 0 to the number of history rows
    prv_forced : flat DIA_FORCED_SOURCE
    forced_offsets : (n + 1,) int64
    dia_objects : (n,) DIA_OBJECT, read where `has_object`
    has_object : (n,) bool
    ss_sources : (n,) SS_SOURCE, read where `has_ss`
    has_ss : (n,) bool
    mpc_orbits : (n,) MPC_ORBITS, read where `has_orbit`
    has_orbit : (n,) bool
    cutouts : difference, science, template: n FITS files each, None where there is no stamp

    Raises
    ------
    PacketContentError
        Lengths or layouts that do not agree, or history for an alert without an object.
    """

    dia_sources: np.ndarray
    observation_reason: str | None
    target_name: str | None
    prv_dia_sources: np.ndarray
    prv_offsets: np.ndarray
    prv_forced: np.ndarray
    forced_offsets: np.ndarray
    dia_objects: np.ndarray
    has_object: np.ndarray
    ss_sources: np.ndarray
    has_ss: np.ndarray
    mpc_orbits: np.ndarray
    has_orbit: np.ndarray
    cutouts: tuple[Sequence[bytes | None], Sequence[bytes | None], Sequence[bytes | None]]

    def __post_init__(self) -> None:
        n = len(self.dia_sources)
        for name, dtype, length in (
            ("dia_sources", records.DIA_SOURCE, n),
            ("prv_dia_sources", records.DIA_SOURCE, None),
            ("prv_forced", records.DIA_FORCED_SOURCE, None),
            ("dia_objects", records.DIA_OBJECT, n),
            ("ss_sources", records.SS_SOURCE, n),
            ("mpc_orbits", records.MPC_ORBITS, n),
            ("has_object", np.dtype(bool), n),
            ("has_ss", np.dtype(bool), n),
            ("has_orbit", np.dtype(bool), n),
        ):
            column = getattr(self, name)
            if column.dtype != dtype:
                raise PacketContentError(f"{name} has another layout than its record: {column.dtype}"[:300])
            if column.ndim != 1 or length not in (None, len(column)):
                raise PacketContentError(f"{name} must have shape ({n},), got {column.shape}")
        _check_offsets("prv_offsets", self.prv_offsets, len(self.prv_dia_sources), self.has_object)
        _check_offsets("forced_offsets", self.forced_offsets, len(self.prv_forced), self.has_object)
        lengths = [len(stamps) for stamps in self.cutouts]
        if lengths != [n, n, n]:
            raise PacketContentError(f"cutouts must be three lists of {n}, got lengths {lengths}")

    def __len__(self) -> int:
        return len(self.dia_sources)


def _check_offsets(name: str, offsets: np.ndarray, n_rows: int, has_object: np.ndarray) -> None:
    if offsets.shape != (len(has_object) + 1,) or not np.issubdtype(offsets.dtype, np.integer):
        raise PacketContentError(
            f"{name} must be {len(has_object) + 1} integers, got {offsets.dtype} of shape {offsets.shape}"
        )
    counts = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != n_rows or (counts < 0).any():
        raise PacketContentError(f"{name} must rise from 0 to {n_rows}, got {offsets[0]} to {offsets[-1]}")
    if (counts[~has_object] != 0).any():
        raise PacketContentError(f"{name}: history for an alert without an object")


def encode_packets(
    schema: PacketSchema, batch: AlertColumns, prefix: bytes = b"", *, sized_blocks: bool = False
) -> list[bytes]:
    """Encode a batch, one schemaless Avro body per alert in the batch's order.

    The bytes equal what fastavro writes for the same values; fields the version does not know are left out.

    Parameters
    ----------
    schema : which fields, in which order
    batch : the alerts
    prefix : put in front of each body, such as `wire_header`; it saves a copy of the packet
    sized_blocks : histories say how many bytes they have, so that readers that do not want them step over; same
        values, other bytes
    """
    n = len(batch)
    sources, source_at = _encoded(schema, "diaSource", batch.dia_sources)
    history, history_at = _encoded(schema, "diaSource", batch.prv_dia_sources)
    forced, forced_at = _encoded(schema, "diaForcedSource", batch.prv_forced)
    objects, object_at = _encoded(schema, "diaObject", batch.dia_objects)
    matches, match_at = _encoded(schema, "ssSource", batch.ss_sources)
    orbits, orbit_at = _encoded(schema, "mpc_orbits", batch.mpc_orbits)
    ids = batch.dia_sources["diaSourceId"].tolist()
    has_history = ((batch.dia_objects["nDiaSources"] > 1) | (np.diff(batch.prv_offsets) > 0)).tolist()
    prv_offsets, forced_offsets = batch.prv_offsets.tolist(), batch.forced_offsets.tolist()
    has_object, has_ss, has_orbit = batch.has_object.tolist(), batch.has_ss.tolist(), batch.has_orbit.tolist()
    visit = _optional_text(batch.observation_reason) + _optional_text(batch.target_name)

    bodies = []
    for i in range(n):
        parts: list[bytes | memoryview] = [prefix, avro_long(ids[i]), visit, sources[source_at[i] : source_at[i + 1]]]
        if has_object[i]:
            if has_history[i]:
                parts += _array(history, history_at, prv_offsets[i], prv_offsets[i + 1], sized_blocks)
            else:
                parts.append(_NULL)
            parts += _array(forced, forced_at, forced_offsets[i], forced_offsets[i + 1], sized_blocks)
            parts += (_VALUE, objects[object_at[i] : object_at[i + 1]])
        else:
            parts.append(_NULL * 3)
        parts += (_VALUE, matches[match_at[i] : match_at[i + 1]]) if has_ss[i] else (_NULL,)
        parts += (_VALUE, orbits[orbit_at[i] : orbit_at[i + 1]]) if has_orbit[i] else (_NULL,)
        for stamps in batch.cutouts:
            stamp = stamps[i]
            parts += (_NULL,) if stamp is None else (_VALUE, avro_long(len(stamp)), stamp)
        bodies.append(b"".join(parts))
    return bodies


def _encoded(schema: PacketSchema, record: str, rows: np.ndarray) -> tuple[memoryview, list[int]]:
    dtype = records.LAYOUTS[record]
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), dtype.itemsize)
    data, offsets = encode_rows(_plan(schema, record), raw)
    return data.data, offsets.tolist()


@cache
def _plan(schema: PacketSchema, record: str) -> RowPlan:
    dtype = records.LAYOUTS[record]
    layout = dtype.fields
    if layout is None:
        raise records.RecordLayoutError(f"{record} has no fields")
    fields = []
    for field in schema.records[record]:
        field_dtype, offset = layout[field.name][:2]
        null = records.null_integer(field) if field.nullable else 0
        fields.append((_KINDS[field.kind], offset, field_dtype.itemsize, field.nullable, null))
    return row_plan(fields)


def _array(data: memoryview, row_at: list[int], first: int, last: int, sized: bool) -> tuple[bytes | memoryview, ...]:
    """A non-null array of the rows first..last-1: one block, then the end mark."""
    if first == last:
        return (_VALUE, _END_OF_ARRAY)
    rows = data[row_at[first] : row_at[last]]
    # A negative count says that the block's length in bytes follows.
    count = avro_long(first - last) + avro_long(len(rows)) if sized else avro_long(last - first)
    return (_VALUE, count, rows, _END_OF_ARRAY)


def _optional_text(text: str | None) -> bytes:
    if not text:
        return _NULL
    encoded = text.encode()
    return _VALUE + avro_long(len(encoded)) + encoded


def avro_long(value: int) -> bytes:
    """An Avro long (or length, or count): zigzag, then 7 bits a byte from the least up."""
    zigzag = (value << 1) ^ (value >> 63)
    varint = bytearray()
    while zigzag >= 128:
        varint.append((zigzag & 127) | 128)
        zigzag >>= 7
    varint.append(zigzag)
    return bytes(varint)

"""Record layouts: numpy dtypes with one field per field of the newest packet schema.

They are what tables of sources and objects are inside the flow: packed, little-endian, of fixed size,
so that a batch crosses a shuffle as its own bytes. What is null:

==================================  =======================================================
schema type                         null
==================================  =======================================================
float?, double?                     NaN (a required float keeps NaN as NaN)
diaObjectId, ssObjectId,
parentDiaSourceId (long?)           0
other long?, int?                   the least value of the type, `INT64_NULL`, `INT32_NULL`
boolean?                            -1 (0 is false, 1 is true)
string?                             empty
==================================  =======================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.avro.schema_versions import NEWEST_VERSION, FieldDefinition, record_definitions

INT32_NULL = -(2**31)
INT64_NULL = -(2**63)
BOOLEAN_NULL = -1
ZERO_IS_NULL = frozenset({"diaObjectId", "ssObjectId", "parentDiaSourceId"})

_FORMATS = {"long": "<i8", "int": "<i4", "float": "<f4", "double": "<f8", "boolean": "i1", "timestamp-micros": "<i8"}
_STRING_BYTES = {
    "band": 1,
    "reliabilityVersion": 16,
    "designation": 32,
    "packed_primary_provisional_designation": 12,
    "unpacked_primary_provisional_designation": 32,
    "mpc_orb_jsonb": 1,  # never filled here
}
_ARROW_TYPES = {
    "long": pa.int64(),
    "int": pa.int32(),
    "float": pa.float32(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "string": pa.string(),
    "timestamp-micros": pa.int64(),
}


class RecordLayoutError(ValueError):
    """Data that do not fit a record layout; the message names field and reason."""


def _layout(record: str) -> np.dtype:
    fields = record_definitions(NEWEST_VERSION)[record]
    return np.dtype([(f.name, f"S{_STRING_BYTES[f.name]}" if f.kind == "string" else _FORMATS[f.kind]) for f in fields])


DIA_SOURCE = _layout("diaSource")
DIA_FORCED_SOURCE = _layout("diaForcedSource")
DIA_OBJECT = _layout("diaObject")
SS_SOURCE = _layout("ssSource")
MPC_ORBITS = _layout("mpc_orbits")
LAYOUTS = {
    "diaSource": DIA_SOURCE,
    "diaForcedSource": DIA_FORCED_SOURCE,
    "diaObject": DIA_OBJECT,
    "ssSource": SS_SOURCE,
    "mpc_orbits": MPC_ORBITS,
}
_RECORD_NAMES = {dtype: record for record, dtype in LAYOUTS.items()}


def field_types(record: str) -> dict[str, str]:
    """Schema type of each field of a record (newest version), such as {"visit": "long", "band": "string?"}."""
    return {f.name: f.kind + "?" * f.nullable for f in record_definitions(NEWEST_VERSION)[record]}


def null_integer(field: FieldDefinition) -> int:
    """The integer that stands for null in a nullable long, int, timestamp or boolean field."""
    if field.kind == "boolean":
        return BOOLEAN_NULL
    if field.name in ZERO_IS_NULL:
        return 0
    return INT32_NULL if field.kind == "int" else INT64_NULL


def empty_records(dtype: np.dtype, n: int) -> np.ndarray:
    """`n` records with every nullable field null, required integers 0 and required floats NaN."""
    return np.repeat(_empty_record(dtype), n).view(dtype)


@cache
def _empty_record(dtype: np.dtype) -> np.ndarray:
    record = np.zeros(1, dtype)
    for field in _fields(dtype):
        if field.kind in ("float", "double"):
            record[field.name] = np.nan
        elif field.nullable and field.kind != "string":
            record[field.name] = null_integer(field)
    return record.view(_void(dtype))


def records_to_bytes(records: np.ndarray) -> bytes:
    """The records' own bytes, without any header."""
    return records.tobytes()


def records_from_bytes(dtype: np.dtype, buffer: bytes | bytearray | memoryview) -> np.ndarray:
    """Records over `buffer` without a copy; read-only if the buffer is. RecordLayoutError if it ends mid-record."""
    size = memoryview(buffer).nbytes
    if size % dtype.itemsize:
        raise RecordLayoutError(
            f"{size} bytes are not whole records of {dtype.itemsize} bytes ({_RECORD_NAMES.get(dtype, 'other layout')})"
        )
    return np.frombuffer(buffer, dtype)


def concatenate_records(parts: Iterable[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """All parts behind each other, as a new array; no parts give no records.

    Goes through a view as plain bytes: numpy joins structured arrays field by field, 50 times slower.
    """
    views = []
    for part in parts:
        if part.dtype != dtype:
            raise RecordLayoutError(f"expected records of {dtype.itemsize} bytes, got dtype {_short(part.dtype)}")
        views.append(part.view(_void(dtype)))
    if not views:
        return np.empty(0, dtype)
    return np.concatenate(views).view(dtype)


def null_infinite(records: np.ndarray) -> None:
    """Make infinite numbers NaN, in place: null in packets and tables."""
    for name in records.dtype.names or ():
        column = records[name]
        if column.dtype.kind == "f":
            column[np.isinf(column)] = np.nan


def take_records(records: np.ndarray, selection: np.ndarray | slice) -> np.ndarray:
    """Records at an integer index array or boolean mask, as `records[selection]` but faster: not field by field."""
    return records.view(_void(records.dtype))[selection].view(records.dtype)


def records_to_arrow(records: np.ndarray, *, fields: Sequence[str] | None = None) -> pa.Table:
    """The records as an Arrow table, nulls as nulls.

    Parameters
    ----------
    records : (n,) of one of the layouts of this module
    fields : names of the columns wanted, in the order wanted; None gives all in schema order

    Raises
    ------
    RecordLayoutError
        Another layout, an unknown field, a string that is not UTF-8.
    """
    arrays, schema = _arrow_columns(records, fields)
    return pa.Table.from_arrays(arrays, schema=schema)


def records_to_struct_array(records: np.ndarray, *, fields: Sequence[str] | None = None) -> pa.StructArray:
    """The records as an Arrow struct array, for nested columns; otherwise as `records_to_arrow`."""
    arrays, schema = _arrow_columns(records, fields)
    return pa.StructArray.from_arrays(arrays, fields=list(schema))


def arrow_schema(dtype: np.dtype, fields: Sequence[str] | None = None) -> pa.Schema:
    """Arrow schema of a layout; each field's metadata carry unit and meaning."""
    known = {field.name: field for field in _fields(dtype)}
    unknown = [name for name in fields or () if name not in known]
    if unknown:
        raise RecordLayoutError(f"no field {', '.join(unknown)} in {_RECORD_NAMES[dtype]}")
    return pa.schema([_arrow_field(known[name]) for name in (known if fields is None else fields)])


def records_from_arrow(table: pa.Table | pa.RecordBatch, dtype: np.dtype) -> np.ndarray:
    """Records from a table with columns named as the schema's fields.

    Columns may be missing (null; required integers 0, required floats NaN); nulls in required columns
    are treated the same; columns the layout does not know are ignored. Whole numbers stay whole numbers:
    they never pass through a float.

    Parameters
    ----------
    table : columns in any order and any type that holds the field's values exactly
        (float64 to float32 excepted, which rounds)
    dtype : one of the layouts of this module

    Raises
    ------
    RecordLayoutError
        A float column for an integer field, a value out of range, a string too long for the layout.
    """
    records = empty_records(dtype, table.num_rows)
    present = set(table.column_names)
    if len(present) < len(table.column_names):
        raise RecordLayoutError("the table has two columns of one name")
    for field in _fields(dtype):
        if field.name in present:
            records[field.name] = _numpy_column(field, table.column(field.name), dtype)
    return records


def _void(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"V{dtype.itemsize}")


def _short(dtype: np.dtype) -> str:
    return _RECORD_NAMES.get(dtype, f"of {len(dtype.names)} fields" if dtype.names else str(dtype))


@cache
def _fields(dtype: np.dtype) -> tuple[FieldDefinition, ...]:
    if dtype not in _RECORD_NAMES:
        raise RecordLayoutError(f"not a record layout: dtype {_short(dtype)}")
    return record_definitions(NEWEST_VERSION)[_RECORD_NAMES[dtype]]


def _arrow_field(field: FieldDefinition) -> pa.Field:
    metadata = {"description": field.doc} | ({"unit": field.unit} if field.unit else {})
    return pa.field(field.name, _ARROW_TYPES[field.kind], nullable=field.nullable, metadata=metadata)


def _arrow_columns(records: np.ndarray, fields: Sequence[str] | None) -> tuple[list[pa.Array], pa.Schema]:
    definitions = {field.name: field for field in _fields(records.dtype)}
    schema = arrow_schema(records.dtype, fields)
    return [_arrow_column(definitions[name], records[name]) for name in schema.names], schema


def _arrow_column(field: FieldDefinition, values: np.ndarray) -> pa.Array:
    values = np.ascontiguousarray(values)
    null = _is_null(field, values) if field.nullable else None
    if field.kind == "boolean":
        values = values > 0
    if field.kind != "string":
        return pa.array(values, type=_ARROW_TYPES[field.kind], mask=null)
    try:
        return pa.array(values.tolist(), type=pa.binary(), mask=null).cast(pa.string())
    except pa.ArrowInvalid as error:
        raise RecordLayoutError(f"{field.name}: text that is not UTF-8") from error


def _is_null(field: FieldDefinition, values: np.ndarray) -> np.ndarray:
    if field.kind == "string":
        return values == b""
    if field.kind in ("float", "double"):
        return np.isnan(values)
    return values == null_integer(field)


def _numpy_column(field: FieldDefinition, column: pa.ChunkedArray | pa.Array, dtype: np.dtype) -> np.ndarray:
    arrow_type = _ARROW_TYPES[field.kind]
    if pa.types.is_integer(arrow_type) and pa.types.is_floating(column.type):
        raise RecordLayoutError(
            f"{field.name} holds {column.type} but must hold whole numbers: ids beyond 2^53 do not survive a float"
        )
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    try:
        column = column.cast(arrow_type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RecordLayoutError(f"{field.name}: {column.type} does not fit {arrow_type}: {error}") from error
    if field.kind == "string":
        return _numpy_strings(field.name, column, dtype[field.name].itemsize)
    if field.kind in ("float", "double"):
        fill: object = np.nan
    elif field.kind == "boolean":
        column, fill = column.cast(pa.int8()), BOOLEAN_NULL
    else:
        fill = null_integer(field) if field.nullable else 0
    if column.null_count:
        column = column.fill_null(pa.scalar(fill, type=column.type))
    return column.to_numpy(zero_copy_only=False)


def _numpy_strings(name: str, column: pa.Array, width: int) -> np.ndarray:
    values = column.cast(pa.binary()).fill_null(b"")
    longest = pc.max(pc.binary_length(values)).as_py() or 0
    if longest > width:
        raise RecordLayoutError(f"{name}: a text of {longest} bytes, at most {width} fit")
    return np.array(values.to_pylist(), dtype=f"S{width}")

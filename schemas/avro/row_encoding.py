"""Fixed-layout records to Avro bytes: arrays in, arrays out.

A plan says for each field, in wire order, how its bytes in the record become Avro bytes. One compiled
loop then runs over all records; it works on raw bits, so no value passes through another type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

LONG, INT, FLOAT, DOUBLE, BOOLEAN, STRING = range(6)
_WIDTH = {LONG: 8, INT: 4, FLOAT: 4, DOUBLE: 8, BOOLEAN: 1}  # bytes in the record
_WIDEST = {LONG: 10, INT: 5, FLOAT: 4, DOUBLE: 8, BOOLEAN: 1}  # bytes; a string needs 5 for its length besides


@dataclass(frozen=True, eq=False)
class RowPlan:
    """How to encode one record type.

    Attributes
    ----------
    fields : (n_fields, 4) int64: kind, offset in the record, width in bytes, 1 if nullable
    null_bits : (n_fields,) uint64: the integer that means null, sign-extended to 64 bits
    widest : bytes that one encoded record can take at most
    """

    fields: np.ndarray
    null_bits: np.ndarray
    widest: int


def row_plan(fields: list[tuple[int, int, int, bool, int]]) -> RowPlan:
    """Plan from (kind, offset, width, nullable, null integer) of each field in wire order.

    Raises
    ------
    ValueError
        A number of another width than its kind has.
    """
    for kind, offset, width, _, _ in fields:
        if width != _WIDTH.get(kind, width):
            raise ValueError(f"the field at byte {offset} has {width} bytes, its kind has {_WIDTH[kind]}")
    table = np.array([field[:4] for field in fields], dtype=np.int64).reshape(len(fields), 4)
    null_bits = np.array([field[4] for field in fields], dtype=np.int64).view(np.uint64)
    widest = sum(_WIDEST.get(kind, 5 + width) + nullable for kind, _, width, nullable, _ in fields)
    return RowPlan(table, null_bits, widest)


def encode_rows(plan: RowPlan, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encode records.

    Parameters
    ----------
    plan : the record type's plan
    rows : (n, itemsize) uint8, the records' bytes, C-contiguous

    Returns
    -------
    data : (m,) uint8, all encoded records behind each other
    offsets : (n + 1,) int64, record i is `data[offsets[i]:offsets[i + 1]]`

    Notes
    -----
    O(n * n_fields); about 0.2 us per record of 100 fields.
    """
    if not rows.flags.writeable:
        rows = rows.copy()  # numba would compile the loop a second time for read-only input
    data = np.empty(plan.widest * len(rows), dtype=np.uint8)
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    _encode_rows(plan.fields, plan.null_bits, rows, data, offsets)
    return data[: offsets[-1]], offsets


# Indices are unsigned: numba then leaves out the check for negative ones, and the compiler makes one machine
# instruction of the eight bytes of a load or a store.


@njit(cache=True, inline="always")
def _load4(data: np.ndarray, at: np.uint64) -> np.uint64:
    return (
        np.uint64(data[at])
        | (np.uint64(data[at + np.uint64(1)]) << np.uint64(8))
        | (np.uint64(data[at + np.uint64(2)]) << np.uint64(16))
        | (np.uint64(data[at + np.uint64(3)]) << np.uint64(24))
    )


@njit(cache=True, inline="always")
def _load8(data: np.ndarray, at: np.uint64) -> np.uint64:
    return _load4(data, at) | (_load4(data, at + np.uint64(4)) << np.uint64(32))


@njit(cache=True, inline="always")
def _store4(data: np.ndarray, at: np.uint64, bits: np.uint64) -> None:
    data[at] = np.uint8(bits)
    data[at + np.uint64(1)] = np.uint8(bits >> np.uint64(8))
    data[at + np.uint64(2)] = np.uint8(bits >> np.uint64(16))
    data[at + np.uint64(3)] = np.uint8(bits >> np.uint64(24))


@njit(cache=True, inline="always")
def _store8(data: np.ndarray, at: np.uint64, bits: np.uint64) -> None:
    _store4(data, at, bits)
    _store4(data, at + np.uint64(4), bits >> np.uint64(32))


@njit(cache=True)
def _write_varint(value: np.uint64, data: np.ndarray, position: np.uint64) -> np.uint64:
    while value >= np.uint64(128):
        data[position] = np.uint8(value | np.uint64(128))
        value = value >> np.uint64(7)
        position += np.uint64(1)
    data[position] = np.uint8(value)
    return position + np.uint64(1)


@njit(cache=True)
def _encode_rows(
    fields: np.ndarray, null_bits: np.ndarray, rows: np.ndarray, data: np.ndarray, offsets: np.ndarray
) -> None:
    one = np.uint64(1)
    row_bytes = rows.shape[1]
    flat = rows.reshape(rows.size)
    position = np.uint64(0)
    for i in range(rows.shape[0]):
        start = i * row_bytes
        for f in range(fields.shape[0]):
            kind = fields[f, 0]
            at = np.uint64(start + fields[f, 1])
            nullable = fields[f, 3] == 1
            # Numbers of a fixed width are written in any case; of a null the next field overwrites all but the branch.
            if kind == FLOAT:
                bits = _load4(flat, at)
                is_null = nullable and (bits & np.uint64(0x7FFFFFFF)) > np.uint64(0x7F800000)  # NaN
                if nullable:
                    data[position] = np.uint8(0) if is_null else np.uint8(2)  # branch of ["null", type], zigzag
                    position += one
                _store4(data, position, bits)
                position += np.uint64(0) if is_null else np.uint64(4)
            elif kind == DOUBLE:
                bits = _load8(flat, at)
                is_null = nullable and (bits & np.uint64(0x7FFFFFFFFFFFFFFF)) > np.uint64(0x7FF0000000000000)
                if nullable:
                    data[position] = np.uint8(0) if is_null else np.uint8(2)
                    position += one
                _store8(data, position, bits)
                position += np.uint64(0) if is_null else np.uint64(8)
            elif kind == BOOLEAN:
                bits = np.uint64(flat[at])
                is_null = nullable and bits == null_bits[f] & np.uint64(0xFF)
                if nullable:
                    data[position] = np.uint8(0) if is_null else np.uint8(2)
                    position += one
                data[position] = np.uint8(1) if bits else np.uint8(0)
                position += np.uint64(0) if is_null else one
            elif kind == STRING:
                length = np.uint64(fields[f, 2])
                while length > np.uint64(0) and flat[at + length - one] == 0:
                    length -= one
                if nullable:
                    data[position] = np.uint8(0) if length == np.uint64(0) else np.uint8(2)
                    position += one
                    if length == np.uint64(0):
                        continue
                position = _write_varint(length << one, data, position)
                for k in range(length):
                    data[position + np.uint64(k)] = flat[at + np.uint64(k)]
                position += length
            else:
                bits = _load8(flat, at) if kind == LONG else np.uint64(np.int64(np.int32(_load4(flat, at))))
                if nullable:
                    is_null = bits == null_bits[f]
                    data[position] = np.uint8(0) if is_null else np.uint8(2)
                    position += one
                    if is_null:
                        continue
                sign = bits >> np.uint64(63)
                position = _write_varint((bits << one) ^ (np.uint64(0) - sign), data, position)
        offsets[i + 1] = position

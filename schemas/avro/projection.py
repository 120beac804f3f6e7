"""Wanted fields of packets straight to Arrow columns, whatever schema they were written in.

A writer schema and the wanted fields become a short program, once (`schemas.avro.reading_programs`); one compiled
loop then runs it over a whole batch of bodies, which stay where they lie: bytes, memory maps. Nothing becomes a
Python object. Every read is checked against the end of its body, every count of items against the bytes that are
left, and a broken body costs only itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from schemas.avro.body_reading import (
    BOOLEAN,
    BYTES,
    DOUBLE,
    FINE,
    FLOAT,
    INT,
    LONG,
    REASONS,
    STRING,
    TIMESTAMP,
    gathered_texts,
    read_bodies,
)  # fmt: skip
from schemas.avro.container import ContainerSchema
from schemas.avro.reading_programs import Leaf, Program, compiled
from schemas.avro.wire import PacketFormatError

_CHAIN = 1024  # bodies behind each other that are looked for at a time
_MAX_TEXT_BYTES = 2**31 - 1
_NUMBERS = {
    LONG: pa.int64(), INT: pa.int32(), TIMESTAMP: pa.timestamp("us", "UTC"), FLOAT: pa.float32(), DOUBLE: pa.float64(),
    BOOLEAN: pa.bool_(),
}  # fmt: skip
_TEXTS = {STRING: pa.string(), BYTES: pa.binary()}


class Projection(NamedTuple):
    """Columns, a row per body (nulls where it is broken), and for each body None or what is wrong with it."""

    table: pa.Table
    errors: list[PacketFormatError | None]


def project(
    schema: ContainerSchema, bodies: Sequence[Any], columns: Iterable[str], *, whole: bool = False
) -> Projection:
    """Wanted fields of schemaless bodies of one schema.

    Parameters
    ----------
    bodies : anything with a buffer of bytes: bytes, memoryviews, maps
    columns : paths of fields that hold no records; in the table records are structs, lists lists of structs
    whole : check all of each body. Otherwise reading stops behind the last wanted field, and what lies beyond is
        not looked at.

    Raises
    ------
    ValueError
        The schema has no such column, it holds records, or lies in a list within a list.
    PacketFormatError
        The schema is too large.
    """
    paths = frozenset(columns)
    prefixes = {path[:k] for path in paths for k, letter in enumerate(path) if letter == "."}
    program = compiled(schema, paths | prefixes | {f"{prefix}[]" for prefix in prefixes}, whole)
    for path in sorted(paths):
        leaf = program.leaves.get(path)
        if leaf is None or leaf.kind not in _NUMBERS | _TEXTS:
            raise ValueError(f"{schema.label} has no column {path!r}")
    if program.ambiguous:
        raise ValueError(f"{schema.label}: a column of several types among {', '.join(sorted(paths))}")
    leaves = Leaves(schema.label, program, bodies, whole)
    ordered = [path for path in program.leaves if path in paths]
    tree: dict[str, Any] = {}
    for path in ordered:
        node = tree
        for name in path.split("."):
            node = node.setdefault(name, {})
    arrays = {name: _nested(leaves, name, below) for name, below in tree.items()}
    return Projection(pa.table(arrays), leaves.errors)


def split_bodies(schema: ContainerSchema, joined: Any, n: int) -> tuple[list[int], PacketFormatError | None]:
    """Where each of n bodies that lie behind each other ends, as far as they can be read, and what stopped that."""
    program = compiled(schema, frozenset(), True)
    view = memoryview(joined)
    ends = [0]
    while len(ends) <= n:
        start = ends[-1]
        leaves = Leaves(schema.label, program, [view[start:]], True, n_chained=min(n + 1 - len(ends), _CHAIN))
        good = leaves.codes == FINE
        ends += (start + leaves.ends[good]).tolist()
        if not good.all():
            return ends[1:], leaves.errors[int(np.argmin(good))]
    behind = len(view) - ends[-1]
    return ends[1:], PacketFormatError(f"{behind} bytes behind the packets") if behind else None


def _nested(leaves: Leaves, path: str, below: dict[str, Any]) -> pa.Array:
    """The Arrow array of a path and all wanted paths below it."""
    program = leaves.program
    if not below:
        return leaves.arrow(path)
    children = [_nested(leaves, f"{path}.{name}", deeper) for name, deeper in below.items()]
    is_list = path in program.levels
    there = leaves.valid(program.leaves[f"{path}[]" if is_list else path])
    struct = pa.StructArray.from_arrays(children, names=list(below), mask=pa.array(~there))
    if not is_list:
        return struct
    is_null = ~leaves.valid(program.leaves[path])
    return pa.ListArray.from_arrays(pa.array(leaves.offsets(path)), struct, mask=pa.array(is_null))


class Leaves:
    """The wanted values of a batch of bodies, as numpy and Arrow columns.

    Attributes
    ----------
    codes : (n,) uint8, 0 where a body could be read
    errors : what is wrong with each body, or None
    ends : (n,) int64, where reading stopped
    """

    def __init__(
        self, label: str, program: Program, bodies: Sequence[Any], whole: bool, *, n_chained: int | None = None
    ) -> None:
        buffers = [pa.py_buffer(body) for body in bodies]  # they keep the bytes alive
        n = len(buffers) if n_chained is None else n_chained
        addresses = np.array([buffer.address for buffer in buffers], dtype=np.uint64)
        lengths = np.array([buffer.size for buffer in buffers], dtype=np.int64)
        if n_chained is not None:
            addresses, lengths = np.repeat(addresses, n), np.repeat(lengths, n)
        n_levels = len(program.level_slots)
        self.program = program
        self.n = n
        self.codes = np.zeros(n, dtype=np.uint8)
        self.ends = np.zeros(n, dtype=np.int64)
        self._first = np.zeros((n_levels, n), dtype=np.int64)
        self._counts = np.zeros((n_levels, n), dtype=np.int64)
        self._values, self._valid = read_bodies(
            program.code,
            program.targets,
            program.level_slots,
            program.depth,
            addresses,
            lengths,
            whole,
            n_chained is not None,
            self._first,
            self._counts,
            self.codes,
            self.ends,
        )
        self._levels: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._label = label
        self._buffers = buffers
        self._addresses = addresses
        self._lengths = lengths

    @cached_property
    def errors(self) -> list[PacketFormatError | None]:
        errors: list[PacketFormatError | None] = [None] * self.n
        for i in np.flatnonzero(self.codes).tolist():
            where = f"{REASONS[int(self.codes[i])]}, at byte {self.ends[i]}"
            errors[i] = PacketFormatError(f"broken {self._label} packet of {self._lengths[i]} bytes: {where}")
        return errors

    def body_of_row(self, level: int) -> np.ndarray:
        """(n_rows,) int64, the body that each row of a level belongs to."""
        return np.arange(self.n) if level == 0 else np.repeat(np.arange(self.n), self._counts[level])

    def offsets(self, path: str) -> np.ndarray:
        """(n + 1,) int32, where the rows of each body's list begin."""
        counts = self._counts[self.program.levels[path]]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    def _level(self, level: int) -> tuple[np.ndarray, np.ndarray]:
        """(n_slots, n_rows) bits of the values of a level, and where there are any."""
        if level not in self._levels:
            width = int(self.program.level_slots[level])
            if level == 0:
                rows = np.arange(self.n) * width
            else:
                counts = self._counts[level]
                before = np.cumsum(counts) - counts
                within = np.arange(int(counts.sum())) - np.repeat(before, counts)
                rows = np.repeat(self._first[level], counts) + within * width
            places = rows + np.arange(width)[:, np.newaxis]
            self._levels[level] = self._values[places], self._valid[places].view(bool)
        return self._levels[level]

    def valid(self, leaf: Leaf) -> np.ndarray:
        """(n_rows,) bool, where the value is there."""
        return self._level(leaf.level)[1][leaf.slot]

    def numbers(self, leaf: Leaf) -> np.ndarray:
        """(n_rows,) the values, 0 where there is none; a timestamp is in us since 1970."""
        bits = self._level(leaf.level)[0][leaf.slot]
        if leaf.kind == DOUBLE:
            return bits.view(np.float64)
        if leaf.kind == FLOAT:
            return bits.astype(np.uint32).view(np.float32)
        if leaf.kind == BOOLEAN:
            return bits != 0
        return bits.view(np.int64).astype(np.int32) if leaf.kind == INT else bits.view(np.int64)

    def arrow(self, path: str) -> pa.Array:
        """The column of a number or text."""
        leaf = self.program.leaves[path]
        valid = self.valid(leaf)
        if leaf.kind in _NUMBERS:
            values = pa.array(self.numbers(leaf), mask=~valid, from_pandas=False)
            return values.cast(_NUMBERS[leaf.kind]) if leaf.kind == TIMESTAMP else values
        places = self._level(leaf.level)[0][leaf.slot]
        offsets = np.zeros(len(places) + 1, dtype=np.int64)
        np.cumsum(places & np.uint64(0xFFFFFFFF), out=offsets[1:])
        if offsets[-1] > _MAX_TEXT_BYTES:
            raise ValueError(f"{path}: {offsets[-1]} bytes in a batch: read fewer packets at a time")
        text = gathered_texts(self._addresses[self.body_of_row(leaf.level)], places, offsets)
        bitmap = pa.py_buffer(np.packbits(valid, bitorder="little"))
        buffers = [bitmap, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(text)]
        return pa.Array.from_buffers(_TEXTS[leaf.kind], len(places), buffers)

"""Wanted fields of packets straight to Arrow columns, whatever schema they were written in.

A writer schema and the wanted fields become a short program, once; one compiled loop then runs it over a whole
batch of bodies, which stay where they lie (bytes, memory maps). Nothing becomes a Python object. Every read is
checked against the end of its body, every count of items against the bytes that are left, and a broken body
costs only itself.

A path names a value from the top of the packet, `diaSource.snr`; inside a list it is the items' value,
`prvDiaSources.psfFlux`. `Leaves` knows three more: `diaObject` (a record: is it there), `diaObject*` (does it hold
anything but nulls) and `prvDiaSources[]` (is the item there).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numba import carray, njit, types
from numba.extending import intrinsic

from schemas.avro.container import ContainerSchema
from schemas.avro.wire import PacketFormatError

# kinds of values
LONG, INT, TIMESTAMP, FLOAT, DOUBLE, BOOLEAN, STRING, BYTES, FIXED, ENUM, NULL = range(11)
_KINDS = {
    "long": LONG, "int": INT, "float": FLOAT, "double": DOUBLE, "boolean": BOOLEAN, "string": STRING, "bytes": BYTES,
    "null": NULL,
}  # fmt: skip
_LEAST_BYTES = {FLOAT: 4, DOUBLE: 8, NULL: 0}  # 1 of all others

# instructions: (what, kind, slot, mark, number)
_NULLABLE, _VALUE, _UNION, _JUMP, _MARK, _LIST, _NEXT, _STOP = range(8)
_MAX_INSTRUCTIONS = 200_000

# what can be wrong with a body
(
    _FINE,
    _ENDS,
    _LONG_BITS,
    _BRANCH,
    _LENGTH,
    _COUNT,
    _SIZE,
    _TEXT,
    _INT_BITS,
    _TIME,
    _SYMBOL,
    _BEHIND,
    _LOST,
    _LARGE,
) = range(14)
_REASONS = {
    _ENDS: "it ends there",
    _LONG_BITS: "an integer of more than 64 bits",
    _BRANCH: "a union has no such branch",
    _LENGTH: "a length below 0",
    _COUNT: "more items than there are bytes",
    _SIZE: "a block of items that has another size than it says",
    _TEXT: "a text that is no UTF-8",
    _INT_BITS: "an int of more than 32 bits",
    _TIME: "a time outside the years 1 to 9999",
    _SYMBOL: "an enum has no such symbol",
    _BEHIND: "bytes behind the packet",
    _LOST: "it lies behind a broken one",
    _LARGE: "more than 2 GB",
}
_MAX_BODY_BYTES = 2**31 - 1
_CHAIN = 1024  # bodies behind each other that are looked for at a time
_TIMES = (-62_135_596_800_000_000, 253_402_300_799_999_999)  # us since 1970 of the years 1 to 9999

_NUMBERS = {
    LONG: pa.int64(), INT: pa.int32(), TIMESTAMP: pa.timestamp("us", "UTC"), FLOAT: pa.float32(), DOUBLE: pa.float64(),
    BOOLEAN: pa.bool_(),
}  # fmt: skip
_TEXTS = {STRING: pa.string(), BYTES: pa.binary()}


class Leaf(NamedTuple):
    """Where a wanted value is put: level 0 has a row per packet, each wanted list a level with a row per item."""

    level: int
    slot: int
    kind: int


@dataclass(frozen=True, eq=False)
class Program:
    """What to do with a body, and where its wanted values are put.

    Attributes
    ----------
    code : (n, 5) int64, the instructions
    targets : int64, for each union one after the other where its branches are read
    depth : lists that can be open at a time
    leaves : those wanted paths that the schema has
    levels : number of each wanted list, from 1
    level_slots : (n_levels,) int64, values in a row of each level
    ambiguous : a wanted value lies behind a union of several types, or has different types
    """

    code: np.ndarray
    targets: np.ndarray
    depth: int
    leaves: dict[str, Leaf]
    levels: dict[str, int]
    level_slots: np.ndarray
    ambiguous: bool


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
        good = leaves.codes == _FINE
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
        self._values, self._valid = _run(
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
            where = f"{_REASONS[int(self.codes[i])]}, at byte {self.ends[i]}"
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
        if offsets[-1] > _MAX_BODY_BYTES:
            raise ValueError(f"{path}: {offsets[-1]} bytes in a batch: read fewer packets at a time")
        text = _gathered(self._addresses[self.body_of_row(leaf.level)], places, offsets)
        bitmap = pa.py_buffer(np.packbits(valid, bitorder="little"))
        buffers = [bitmap, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(text)]
        return pa.Array.from_buffers(_TEXTS[leaf.kind], len(places), buffers)


@lru_cache(maxsize=256)
def compiled(schema: ContainerSchema, wanted: frozenset[str], whole: bool) -> Program:
    """The program that reads the wanted paths; those that the schema does not have are left out.

    Raises
    ------
    ValueError
        A wanted path in a list within a list.
    PacketFormatError
        The schema is too large.
    """
    compiler = _Compiler(wanted)
    try:
        compiler.add(schema.parsed, "", 0)
    except RecursionError:
        raise PacketFormatError(f"{schema.label}: a schema nested too deeply") from None
    return compiler.program(whole)


class _Compiler:
    """Turns a parsed schema into instructions; `wanted` are the paths that get a slot."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self.wanted = wanted
        self.holders = {path[:k] for path in wanted for k in range(len(path)) if path[k] in ".*["} | wanted
        self.code: list[list[int]] = []
        self.targets: list[int] = []
        self.named: dict[str, Any] = {}
        self.leaves: dict[str, Leaf] = {}
        self.levels: dict[str, int] = {}
        self.slots = [0]
        self.open_lists = self.depth = 0
        self.ambiguous = False
        self.last_write = 0

    def program(self, whole: bool) -> Program:
        end = len(self.code) if whole else self.last_write
        code = np.array([*self.code[:end], [_STOP, 0, -1, -1, 0]], dtype=np.int64)
        jumps = np.isin(code[:, 0], (_JUMP, _NEXT))
        code[jumps, 1] = np.minimum(code[jumps, 1], end)  # nothing behind is wanted: who would go there stops
        targets = np.minimum(np.array(self.targets, dtype=np.int64), end)
        slots = np.array(self.slots, dtype=np.int64)
        return Program(code, targets, max(self.depth, 1), self.leaves, self.levels, slots, self.ambiguous)

    def add(self, node: Any, path: str, level: int, mark: int = -1) -> int:
        """Instructions that read a value of a parsed schema and set `mark` where it is not null; its least bytes."""
        if isinstance(node, str) and node in self.named:
            node = self.named[node]
        if isinstance(node, list):
            return self._add_union(node, path, level, mark)
        name = node if isinstance(node, str) else node["type"]
        if not isinstance(name, str) or name in self.named:
            return self.add(name, path, level, mark)
        if isinstance(node, dict) and "name" in node:
            self.named[node["name"]] = node
        if name in ("record", "error"):
            return self._add_record(node, path, level, mark)
        if name in ("array", "map"):
            return self._add_list(node, path, level, mark)
        kind, number, seen_as = _kind(name, node)
        self._emit(_VALUE, kind, self._slot(path, level, seen_as), mark if kind != NULL else -1, number)
        return number if kind == FIXED else _LEAST_BYTES.get(kind, 1)

    def _add_union(self, branches: list[Any], path: str, level: int, mark: int) -> int:
        others = [one for one in branches if one != "null"]
        self.ambiguous |= len(others) > 1 and path in self.holders
        if len(branches) == 2 and len(others) == 1:
            value = self.named.get(others[0], others[0]) if isinstance(others[0], str) else others[0]
            name = value if isinstance(value, str) else value["type"]
            if isinstance(name, str) and (name in _KINDS or name in ("fixed", "enum")):
                if isinstance(value, dict) and "name" in value:
                    self.named[value["name"]] = value
                kind, number, seen_as = _kind(name, value)
                slot = self._slot(path, level, seen_as)
                self._emit(_NULLABLE, kind, slot, mark, 2 * number + branches.index("null"))
                return 1
        first, leaving = len(self.targets), []
        self.targets += [0] * len(branches)
        self._emit(_UNION, len(branches), -1, -1, first)
        for i, branch in enumerate(branches):
            self.targets[first + i] = len(self.code)
            self.add(branch, path, level, mark)
            leaving.append(len(self.code))
            self._emit(_JUMP, 0, -1, -1, 0)
        for place in leaving:
            self.code[place][1] = len(self.code)
        return 1

    def _add_record(self, node: dict[str, Any], path: str, level: int, mark: int) -> int:
        here = self._slot(path, level, NULL)
        for slot in (mark, here):
            if slot >= 0:
                self._emit(_MARK, 0, slot, -1, 0)
        anything = self._slot(f"{path}*", level, NULL)
        prefix = f"{path.removesuffix('[]')}." if path else ""
        return sum(self.add(field["type"], prefix + field["name"], level, anything) for field in node["fields"])

    def _add_list(self, node: dict[str, Any], path: str, level: int, mark: int) -> int:
        is_map = node["type"] == "map"
        wanted = path in self.holders and not is_map
        self.ambiguous |= wanted and level > 0
        inner = -1
        if wanted and level == 0:
            inner = self.levels.setdefault(path, len(self.slots))
            if inner == len(self.slots):
                self.slots.append(0)
            self._emit(_MARK, 0, self._slot(path, level, NULL, needed=True), -1, 0)
        if mark >= 0:
            self._emit(_MARK, 0, mark, -1, 0)
        self.open_lists += 1
        self.depth = max(self.depth, self.open_lists)
        self._emit(_LIST, 0, inner, -1, 0)
        again = len(self.code)
        self._emit(_NEXT, 0, inner, -1, 0)
        least = self.add("string", "\0", 0) if is_map else 0
        # Nothing below is wanted of what is no level of its own.
        least += self.add(node["values" if is_map else "items"], f"{path}[]" if inner > 0 else "\0", max(inner, 0))
        self._emit(_JUMP, again, -1, -1, 0)
        self.code[again][1], self.code[again][4] = len(self.code), max(least, 1)
        self.open_lists -= 1
        if inner > 0:
            self.last_write = len(self.code)
        return 1

    def _slot(self, path: str, level: int, kind: int, *, needed: bool = False) -> int:
        """Where a wanted path is put, -1 if it is not wanted."""
        if path not in self.wanted and not needed:
            return -1
        leaf = self.leaves.get(path)
        if leaf is None:
            leaf = self.leaves[path] = Leaf(level, self.slots[level], kind)
            self.slots[level] += 1
        self.ambiguous |= (leaf.level, leaf.kind) != (level, kind)
        return leaf.slot

    def _emit(self, what: int, kind: int, slot: int, mark: int, number: int) -> None:
        if len(self.code) == _MAX_INSTRUCTIONS:
            raise PacketFormatError(f"a schema of more than {_MAX_INSTRUCTIONS} fields")
        self.code.append([what, kind, slot, mark, number])
        if what in (_NULLABLE, _VALUE, _MARK) and max(slot, mark) >= 0:
            self.last_write = len(self.code)


def _kind(name: str, node: Any) -> tuple[int, int, int]:
    """How a value is read, its size or number of symbols, and what it is seen as: `NULL` if nothing of ours."""
    if name == "fixed":
        return FIXED, int(node["size"]), NULL
    if name == "enum":
        return ENUM, len(node["symbols"]), NULL
    logical = node.get("logicalType") if isinstance(node, dict) else None
    if (name, logical) == ("long", "timestamp-micros"):
        return TIMESTAMP, 0, TIMESTAMP
    return _KINDS[name], 0, NULL if logical else _KINDS[name]


@intrinsic
def _byte_pointer(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.uint64), codegen


@njit(cache=True)
def _long(data: np.ndarray, position: int, end: int) -> tuple[Any, int, int]:
    """The zigzag varint at `position`, where it ends, and what is wrong."""
    bits = np.uint64(0)
    shift = np.uint64(0)
    while position < end:
        byte = np.uint64(data[position])
        position += 1
        if shift == np.uint64(63) and byte > np.uint64(1):
            return 0, position - 1, _LONG_BITS
        bits |= (byte & np.uint64(127)) << shift
        if byte < np.uint64(128):
            return np.int64((bits >> np.uint64(1)) ^ (np.uint64(0) - (bits & np.uint64(1)))), position, _FINE
        shift += np.uint64(7)
    return 0, position, _ENDS


@njit(cache=True)
def _is_utf8(data: np.ndarray, position: int, end: int) -> bool:
    while position < end:
        lead = data[position]
        position += 1
        if lead < 0x80:
            continue
        low, high = 0x80, 0xBF  # of the second byte: no overlong forms, no surrogates, nothing above 10FFFF
        if 0xC2 <= lead <= 0xDF:
            more = 1
        elif 0xE0 <= lead <= 0xEF:
            more = 2
            if lead == 0xE0:
                low = 0xA0
            elif lead == 0xED:
                high = 0x9F
        elif 0xF0 <= lead <= 0xF4:
            more = 3
            if lead == 0xF0:
                low = 0x90
            elif lead == 0xF4:
                high = 0x8F
        else:
            return False
        if position + more > end or not low <= data[position] <= high:
            return False
        for k in range(position + 1, position + more):
            if data[k] & 0xC0 != 0x80:
                return False
        position += more
    return True


@njit(cache=True)
def _value(
    data: np.ndarray, position: int, end: int, kind: int, number: int, wanted: bool, whole: bool
) -> tuple[np.uint64, int, int]:
    """Bits of a value (of a text: its place and length), where it ends, and what is wrong."""
    bits = np.uint64(0)
    if kind in (FLOAT, DOUBLE):
        size = 4 if kind == FLOAT else 8
        if size > end - position:
            return bits, position, _ENDS
        if wanted:
            for k in range(size - 1, -1, -1):
                bits = (bits << np.uint64(8)) | np.uint64(data[position + k])
        return bits, position + size, _FINE
    if kind == BOOLEAN:
        if position >= end:
            return bits, position, _ENDS
        return np.uint64(data[position] != 0), position + 1, _FINE
    if kind == NULL:
        return bits, position, _FINE
    if kind == FIXED:
        if number > end - position:
            return bits, position, _ENDS
        return bits, position + number, _FINE
    start = position
    integer, position, wrong = _long(data, position, end)
    if wrong != _FINE:
        return bits, position, wrong
    if kind in (STRING, BYTES):
        if integer < 0:
            return bits, start, _LENGTH
        if integer > end - position:
            return bits, start, _ENDS
        if kind == STRING and (wanted or whole) and not _is_utf8(data, position, position + integer):
            return bits, start, _TEXT
        return (np.uint64(position) << np.uint64(32)) | np.uint64(integer), position + integer, _FINE
    if kind == INT and wanted and not -(2**31) <= integer < 2**31:
        return bits, start, _INT_BITS
    if kind == TIMESTAMP and (wanted or whole) and not _TIMES[0] <= integer <= _TIMES[1]:
        return bits, start, _TIME
    if kind == ENUM and not 0 <= integer < number:
        return bits, start, _SYMBOL
    return np.uint64(integer), position, _FINE


@njit(cache=True)
def _run(
    code: np.ndarray,
    targets: np.ndarray,
    level_slots: np.ndarray,
    depth: int,
    addresses: np.ndarray,
    lengths: np.ndarray,
    whole: bool,
    chained: bool,
    first: np.ndarray,
    counts: np.ndarray,
    codes: np.ndarray,
    ends: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Read all bodies. Rows of level 0 come first in the values; those of lists behind them, as they are read."""
    n = len(lengths)
    used = n * level_slots[0]
    values = np.zeros(used + 64, dtype=np.uint64)
    valid = np.zeros(used + 64, dtype=np.uint8)
    remaining = np.zeros(depth, dtype=np.int64)
    block_end = np.zeros(depth, dtype=np.int64)
    for body in range(n):
        end = lengths[body]
        position = 0
        wrong = _FINE
        if chained and body > 0:
            position = ends[body - 1]
            if codes[body - 1] != _FINE:
                wrong = _LOST
        if end > _MAX_BODY_BYTES:
            wrong = _LARGE
        data = carray(_byte_pointer(addresses[body]), end)
        kept = used
        base = body * level_slots[0]
        deepest = -1
        at = 0
        while wrong == _FINE:
            what = code[at, 0]
            kind = code[at, 1]
            slot = code[at, 2]
            mark = code[at, 3]
            number = code[at, 4]
            at += 1
            if what in (_NULLABLE, _VALUE):
                if what == _NULLABLE:
                    if position < end and data[position] <= 2 and data[position] & 1 == 0:
                        branch = data[position] >> 1
                        position += 1
                    else:
                        start = position
                        branch, position, wrong = _long(data, position, end)
                        if wrong == _FINE and not 0 <= branch <= 1:
                            position, wrong = start, _BRANCH
                        if wrong != _FINE:
                            break
                    if branch == number & 1:
                        continue
                    number >>= 1
                bits, position, wrong = _value(data, position, end, kind, number, slot >= 0, whole)
                if wrong != _FINE:
                    break
                if slot >= 0:
                    values[base + slot] = bits
                    valid[base + slot] = kind != NULL
                if mark >= 0:
                    valid[base + mark] = 1
            elif what == _UNION:
                start = position
                branch, position, wrong = _long(data, position, end)
                if wrong == _FINE and not 0 <= branch < kind:
                    position, wrong = start, _BRANCH
                if wrong != _FINE:
                    break
                at = targets[number + branch]
            elif what == _JUMP:
                at = kind
            elif what == _MARK:
                valid[base + slot] = 1
            elif what == _LIST:
                deepest += 1
                remaining[deepest] = 0
                block_end[deepest] = -1
                if slot > 0:
                    first[slot, body] = used
                    counts[slot, body] = 0
            elif what == _NEXT:
                if remaining[deepest] == 0:
                    if block_end[deepest] >= 0 and block_end[deepest] != position:
                        wrong = _SIZE
                        break
                    block_end[deepest] = -1
                    start = position
                    count, position, wrong = _long(data, position, end)
                    if wrong != _FINE:
                        break
                    if count == 0:
                        deepest -= 1
                        if slot > 0:
                            base = body * level_slots[0]
                        at = kind
                        continue
                    if count < 0:  # the size of its items in bytes comes behind
                        count = -count
                        size, position, wrong = _long(data, position, end)
                        if wrong == _FINE and size < 0:
                            position, wrong = start, _LENGTH
                        elif wrong == _FINE and size > end - position:
                            position, wrong = start, _ENDS
                        if wrong != _FINE:
                            break
                        block_end[deepest] = position + size
                        if slot < 0 and not whole:
                            position += size
                            at -= 1
                            continue
                    if count < 0 or count > (end - position) // number:
                        position, wrong = start, _COUNT
                        break
                    remaining[deepest] = count
                remaining[deepest] -= 1
                if slot > 0:
                    base = used
                    used += level_slots[slot]
                    counts[slot, body] += 1
                    if used > len(values):
                        values = _longer(values, used)
                        valid = _longer(valid, used)
            else:
                if whole and not chained and position != end:
                    wrong = _BEHIND
                break
        ends[body] = position
        if wrong != _FINE:
            codes[body] = wrong
            row = body * level_slots[0]
            for k in range(row, row + level_slots[0]):
                values[k] = 0
                valid[k] = 0
            for k in range(kept, used):
                values[k] = 0
                valid[k] = 0
            used = kept
            counts[:, body] = 0
    return values, valid


@njit(cache=True)
def _longer(array: np.ndarray, needed: int) -> np.ndarray:
    longer = np.zeros(max(2 * len(array), needed), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


@njit(cache=True)
def _gathered(addresses: np.ndarray, places: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The texts at places (start in the body, 32 bits, and length) behind each other."""
    text = np.empty(offsets[-1], dtype=np.uint8)
    for i in range(len(places)):
        length = offsets[i + 1] - offsets[i]
        if length > 0:
            start = np.int64(places[i] >> np.uint64(32))
            data = carray(_byte_pointer(addresses[i]), start + length)
            text[offsets[i] : offsets[i + 1]] = data[start:]
    return text

"""A writer schema and wanted paths as a program for `schemas.avro.body_reading`.

A path names a value from the top of the packet, `diaSource.snr`; inside a list it is the items' value,
`prvDiaSources.psfFlux`. Three more have no value, only whether it is there: `diaObject` (a record, a list),
`diaObject*` (a record that holds anything but nulls) and `prvDiaSources[]` (an item that is a record).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from schemas.avro.body_reading import (
    BOOLEAN,
    BYTES,
    DOUBLE,
    ENUM,
    FIXED,
    FLOAT,
    INT,
    JUMP,
    LIST,
    LONG,
    MARK,
    NEXT,
    NULL,
    NULLABLE,
    STOP,
    STRING,
    TIMESTAMP,
    UNION,
    VALUE,
)  # fmt: skip
from schemas.avro.container import ContainerSchema
from schemas.avro.wire import PacketFormatError

_KINDS = {
    "long": LONG, "int": INT, "float": FLOAT, "double": DOUBLE, "boolean": BOOLEAN, "string": STRING, "bytes": BYTES,
    "null": NULL,
}  # fmt: skip
_WIDTHS = {FLOAT: 4, DOUBLE: 8, BOOLEAN: 1}
_MAX_INSTRUCTIONS = 200_000


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
    code : (n, 5) int64, the instructions of `body_reading`
    targets : int64, for each union one after the other where its branches are read
    depth : lists that can be open at a time
    leaves : those wanted paths that the schema has
    levels : number of each wanted list, from 1
    level_slots : (n_levels,) int64, values in a row of each level
    ambiguous : a wanted value lies behind a union of several types, in a list within a list, or has different types
    """

    code: np.ndarray
    targets: np.ndarray
    depth: int
    leaves: dict[str, Leaf]
    levels: dict[str, int]
    level_slots: np.ndarray
    ambiguous: bool


@lru_cache(maxsize=256)
def compiled(schema: ContainerSchema, wanted: frozenset[str], whole: bool) -> Program:
    """The program that reads the wanted paths; those that the schema does not have are left out.

    `whole`: it goes through all of a body, else only as far as something is wanted.

    Raises
    ------
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
        code = np.array([*self.code[:end], [STOP, 0, -1, -1, 0]], dtype=np.int64)
        jumps = np.isin(code[:, 0], (JUMP, NEXT))
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
        self._emit(VALUE, kind, self._slot(path, level, seen_as), mark if kind != NULL else -1, number)
        return number if kind == FIXED else _WIDTHS.get(kind, 0 if kind == NULL else 1)

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
                self._emit(NULLABLE, kind, slot, mark, 2 * number + branches.index("null"))
                return 1
        first, leaving = len(self.targets), []
        self.targets += [0] * len(branches)
        self._emit(UNION, len(branches), -1, -1, first)
        for i, branch in enumerate(branches):
            self.targets[first + i] = len(self.code)
            self.add(branch, path, level, mark)
            leaving.append(len(self.code))
            self._emit(JUMP, 0, -1, -1, 0)
        for place in leaving:
            self.code[place][1] = len(self.code)
        return 1

    def _add_record(self, node: dict[str, Any], path: str, level: int, mark: int) -> int:
        here = self._slot(path, level, NULL)
        for slot in (mark, here):
            if slot >= 0:
                self._emit(MARK, 0, slot, -1, 0)
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
            self._emit(MARK, 0, self._slot(path, level, NULL, needed=True), -1, 0)
        if mark >= 0:
            self._emit(MARK, 0, mark, -1, 0)
        self.open_lists += 1
        self.depth = max(self.depth, self.open_lists)
        self._emit(LIST, 0, inner, -1, 0)
        again = len(self.code)
        self._emit(NEXT, 0, inner, -1, 0)
        least = self.add("string", "\0", 0) if is_map else 0
        # Nothing below is wanted of what is no level of its own.
        least += self.add(node["values" if is_map else "items"], f"{path}[]" if inner > 0 else "\0", max(inner, 0))
        self._emit(JUMP, again, -1, -1, 0)
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
        if what in (VALUE, NULLABLE) and slot < 0 and kind in _WIDTHS:  # stepped over, whatever it is
            kind, number = FIXED, number + (_WIDTHS[kind] << (what == NULLABLE))
        if len(self.code) == _MAX_INSTRUCTIONS:
            raise PacketFormatError(f"a schema of more than {_MAX_INSTRUCTIONS} fields")
        self.code.append([what, kind, slot, mark, number])
        if what in (NULLABLE, VALUE, MARK) and max(slot, mark) >= 0:
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

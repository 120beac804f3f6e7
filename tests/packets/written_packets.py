"""Random values of any Avro schema, and their bytes, written slowly and apart in all the ways the format allows."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

LONGS = [0, 1, -1, 63, 64, -64, -65, 2**31 - 1, -(2**31), 2**53 + 1, 2**63 - 1, -(2**63)]
INTS = [0, 1, -1, 63, 64, 2**31 - 1, -(2**31)]
DOUBLES = [0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf"), 5e-324, 1e300]
TEXTS = ["", "r", "y", "λ", "Ünïcödé 星", "0123456789" * 13]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _resolved(node: Any, named: dict[str, Any]) -> Any:
    """The definition behind a name; all definitions are gathered at the first call."""
    if not named:
        named.update(_definitions(node))
    if isinstance(node, str) and node in named:
        return named[node]
    return _resolved(node["type"], named) if isinstance(node, dict) and not isinstance(node["type"], str) else node


def _definitions(node: Any) -> dict[str, Any]:
    if isinstance(node, list):
        return {name: one for branch in node for name, one in _definitions(branch).items()}
    if not isinstance(node, dict):
        return {}
    found = {node["name"]: node} if node["type"] in ("record", "fixed", "enum") else {}
    inner = [field["type"] for field in node.get("fields", ())]
    inner += [node[key] for key in ("type", "items", "values") if key in node and not isinstance(node[key], str)]
    return found | _definitions(inner)


def random_value(node: Any, rng: np.random.Generator, named: dict[str, Any], *, longest: int = 4) -> Any:
    """A value of a parsed schema; texts, numbers and lengths at their extremes, nulls often."""
    node = _resolved(node, named)
    if isinstance(node, list):
        return random_value(node[int(rng.integers(len(node)))], rng, named, longest=longest)
    kind = node if isinstance(node, str) else node["type"]
    if kind == "record":
        return {field["name"]: random_value(field["type"], rng, named, longest=longest) for field in node["fields"]}
    if kind == "array":
        return [random_value(node["items"], rng, named, longest=longest) for _ in range(rng.integers(longest + 1))]
    if kind == "map":
        n = rng.integers(longest + 1)
        return {f"k{i}": random_value(node["values"], rng, named, longest=longest) for i in range(n)}
    if kind == "long" and isinstance(node, dict) and node.get("logicalType") == "timestamp-micros":
        return _EPOCH + timedelta(microseconds=int(rng.integers(-(10**16), 10**16)))
    choices: dict[str, Any] = {
        "null": lambda: None,
        "boolean": lambda: bool(rng.integers(2)),
        "long": lambda: LONGS[rng.integers(len(LONGS))],
        "int": lambda: INTS[rng.integers(len(INTS))],
        "double": lambda: DOUBLES[rng.integers(len(DOUBLES))] if rng.random() < 0.5 else float(rng.normal()),
        "float": lambda: float(np.float32(rng.normal())) if rng.random() < 0.9 else float("nan"),
        "string": lambda: TEXTS[rng.integers(len(TEXTS))],
        "bytes": lambda: rng.bytes(int(rng.integers(100))),
        "fixed": lambda: rng.bytes(node["size"]),
        "enum": lambda: node["symbols"][rng.integers(len(node["symbols"]))],
    }
    return choices[kind]()


def written(node: Any, value: Any, rng: np.random.Generator, named: dict[str, Any], *, blocks: bool = True) -> bytes:
    """The bytes of a value. With `blocks`, lists come in several blocks, some of them with their size."""
    node = _resolved(node, named)
    if isinstance(node, list):
        resolved = [_resolved(branch, named) for branch in node]
        (index,) = [i for i, branch in enumerate(resolved) if (branch == "null") == (value is None)]
        return long_bytes(index) + written(resolved[index], value, rng, named, blocks=blocks)
    kind = node if isinstance(node, str) else node["type"]
    if kind == "record":
        return b"".join(
            written(field["type"], value[field["name"]], rng, named, blocks=blocks) for field in node["fields"]
        )
    if kind in ("array", "map"):
        if kind == "array":
            items = [written(node["items"], one, rng, named, blocks=blocks) for one in value]
        else:
            items = [
                written("string", key, rng, named) + written(node["values"], one, rng, named, blocks=blocks)
                for key, one in value.items()
            ]
        return _list_bytes(items, rng, blocks)
    if isinstance(value, datetime):
        return long_bytes((value - _EPOCH) // timedelta(microseconds=1))
    if kind in ("long", "int"):
        return long_bytes(value)
    if kind in ("string", "bytes"):
        text = value.encode() if kind == "string" else value
        return long_bytes(len(text)) + text
    if kind == "enum":
        return long_bytes(node["symbols"].index(value))
    if kind == "fixed":
        return bytes(value)
    if kind == "null":
        return b""
    return struct.pack({"float": "<f", "double": "<d", "boolean": "?"}[kind], value)


def _list_bytes(items: list[bytes], rng: np.random.Generator, blocks: bool) -> bytes:
    out = b""
    while items:
        n = int(rng.integers(1, len(items) + 1)) if blocks else len(items)
        block, items = b"".join(items[:n]), items[n:]
        out += long_bytes(-n) + long_bytes(len(block)) if blocks and rng.random() < 0.5 else long_bytes(n)
        out += block
    return out + b"\0"


def long_bytes(value: int) -> bytes:
    """An Avro long by the specification."""
    zigzag = (value << 1) ^ (value >> 63)
    out = bytearray()
    while zigzag > 127:
        out.append(zigzag & 127 | 128)
        zigzag >>= 7
    return bytes([*out, zigzag])

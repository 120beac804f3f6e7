"""Framing of what crosses a shuffle: a small JSON header and raw buffers, joined in one bytes object."""

from __future__ import annotations

import json
import struct
from typing import Any

_LENGTH = struct.Struct("<I")


def pack(header: dict[str, Any], buffers: tuple[bytes, ...] = ()) -> bytes:
    """Join a header and buffers; `unpack` gives both back. Equal input gives equal bytes."""
    text = json.dumps({"header": header, "lengths": [len(buffer) for buffer in buffers]}, sort_keys=True).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *buffers))


def unpack(message: bytes) -> tuple[dict[str, Any], list[memoryview]]:
    """Split what `pack` joined; the buffers are views of the message."""
    view = memoryview(message)
    (size,) = _LENGTH.unpack_from(view)
    start = _LENGTH.size + size
    frame = json.loads(bytes(view[_LENGTH.size : start]))
    buffers = []
    for length in frame["lengths"]:
        buffers.append(view[start : start + length])
        start += length
    return frame["header"], buffers

"""Framing of what crosses a shuffle: a small JSON header and raw buffers, joined in one bytes object."""

from __future__ import annotations

import json
import struct
from typing import Any

_LENGTH = struct.Struct("<I")


class FramingError(ValueError):
    """Bytes that `pack` did not make, or not all of them."""


def pack(header: dict[str, Any], buffers: tuple[bytes, ...] = ()) -> bytes:
    """Join a header and buffers; `unpack` gives both back. Equal input gives equal bytes."""
    text = json.dumps({"header": header, "lengths": [len(buffer) for buffer in buffers]}, sort_keys=True).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *buffers))


def unpack(message: bytes) -> tuple[dict[str, Any], list[memoryview]]:
    """Split what `pack` joined; the buffers are views of the message.

    Raises
    ------
    FramingError
        The message is cut short or too long, or is something else.
    """
    view = memoryview(message)
    try:
        (size,) = _LENGTH.unpack_from(view)
        start = _LENGTH.size + size
        frame = json.loads(bytes(view[_LENGTH.size : start]))
        header, lengths = frame["header"], frame["lengths"]
        if start + sum(lengths) != len(view) or min(lengths, default=0) < 0:
            raise FramingError(f"{len(view)} bytes, the header speaks of {start + sum(lengths)}")
    except FramingError:
        raise
    except (struct.error, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FramingError(f"{len(view)} bytes are no framed message: {type(error).__name__}: {error}") from error
    buffers = []
    for length in lengths:
        buffers.append(view[start : start + length])
        start += length
    return header, buffers

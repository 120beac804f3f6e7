"""The five bytes in front of a packet on Kafka: 0, then the schema id as a big-endian 32-bit integer."""

from __future__ import annotations

import struct

_HEADER = struct.Struct(">bi")
HEADER_BYTES = _HEADER.size


class PacketFormatError(ValueError):
    """Bytes that are no packet; the message says where and why."""


def wrap(schema_id: int, body: bytes) -> bytes:
    """The wire message of a schemaless Avro body."""
    return _HEADER.pack(0, schema_id) + body


def unwrap(message: bytes) -> tuple[int, bytes]:
    """Schema id and body of a wire message. PacketFormatError if it is too short or starts with another byte."""
    if len(message) < HEADER_BYTES:
        raise PacketFormatError(f"a wire message has at least {HEADER_BYTES} bytes, got {len(message)}")
    magic, schema_id = _HEADER.unpack_from(message)
    if magic != 0:
        raise PacketFormatError(f"a wire message starts with byte 0, got {magic & 255}")
    return schema_id, message[HEADER_BYTES:]

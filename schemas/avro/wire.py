"""Bytes of packets: the header in front of one on Kafka (0, then the schema id, big endian), Avro's integers."""

from __future__ import annotations

import struct
from mmap import mmap

_HEADER = struct.Struct(">bi")
HEADER_BYTES = _HEADER.size


class PacketFormatError(ValueError):
    """Bytes that are no packet; the message says where and why."""


def wire_header(schema_id: int) -> bytes:
    """What stands in front of a schemaless Avro body in a wire message."""
    return _HEADER.pack(0, schema_id)


def wrap(schema_id: int, body: bytes) -> bytes:
    """The wire message of a schemaless Avro body."""
    return wire_header(schema_id) + body


def unwrap(message: bytes) -> tuple[int, bytes]:
    """Schema id and body of a wire message. PacketFormatError if it is too short or starts with another byte."""
    if len(message) < HEADER_BYTES:
        raise PacketFormatError(f"a wire message has at least {HEADER_BYTES} bytes, got {len(message)}")
    magic, schema_id = _HEADER.unpack_from(message)
    if magic != 0:
        raise PacketFormatError(f"a wire message starts with byte 0, got {magic & 255}")
    return schema_id, message[HEADER_BYTES:]


def read_long(data: bytes | memoryview | mmap, position: int) -> tuple[int, int]:
    """The zigzag varint at `position` and where it ends.

    Raises
    ------
    IndexError
        The data end within it.
    PacketFormatError
        It has more than 64 bits.
    """
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return (value >> 1) ^ -(value & 1), position
        shift += 7
        if shift > 63:
            raise PacketFormatError(f"an integer of more than 64 bits at byte {position}")

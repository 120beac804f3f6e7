"""Packets that are too large for a topic: the same alert with the oldest part of its history left out.

This is for the rare packet, and goes through nested dicts; the packet in the archive stays whole.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import fastavro

from schemas.avro.messages import Packet, container_message, encoded, packet_of, wire_message
from schemas.avro.reading import decode_body
from schemas.avro.wire import PacketFormatError

# List and its items' time, in the order in which they are trimmed: LSST's, then ZTF's.
_HISTORIES = (
    ("prvDiaForcedSources", "midpointMjdTai"),
    ("prvDiaSources", "midpointMjdTai"),
    ("fp_hists", "jd"),
    ("prv_candidates", "jd"),
)


class PacketTooLargeError(PacketFormatError):
    """A packet that is too large without any history."""


class TrimmedPacket(NamedTuple):
    """A packet, and how many items of each list were left out of it."""

    packet: Packet
    left_out: dict[str, int]


def fitting_value(encoding: str, message: bytes, max_bytes: int) -> tuple[bytes, dict[str, int]]:
    """A message in the encoding of a stream, trimmed to at most `max_bytes`, and what was left out.

    PacketTooLargeError where that cannot be; otherwise as `schemas.avro.messages.encoded`.
    """
    value = encoded(encoding, message)
    if len(value) <= max_bytes:
        return value, {}
    packet = packet_of(message)
    (schema, body), left_out = trimmed_packet(packet, max_bytes - (len(value) - len(packet.body)))
    smaller = Packet(schema, body)
    return encoded(
        encoding, container_message(smaller) if schema.schema_id is None else wire_message(smaller)
    ), left_out


def trimmed_packet(packet: Packet, max_bytes: int) -> TrimmedPacket:
    """A packet whose body has at most `max_bytes`.

    Forced measurements go first, then detections, of each the oldest and no more than needed (within one per cent).

    Raises
    ------
    PacketFormatError
        The packet is broken.
    PacketTooLargeError
        It is too large without any history.
    """
    if len(packet.body) <= max_bytes:
        return TrimmedPacket(packet, {})
    values = decode_body(packet.schema, packet.body)
    left_out: dict[str, int] = {}
    body = packet.body
    for name, time in _HISTORIES:
        history = sorted(values.get(name) or [], key=lambda item: item[time])
        if not history or len(body) <= max_bytes:
            continue
        bare = len(_encoded(packet, {**values, name: []}))
        item_bytes = (len(body) - bare) / len(history)
        kept = min(len(history), max(int((max_bytes - bare) / item_bytes), 0))
        body = _encoded(packet, {**values, name: _latest(history, kept)})
        while len(body) > max_bytes and kept > 0:  # items differ in size
            kept -= max(kept // 100, 1)
            body = _encoded(packet, {**values, name: _latest(history, kept)})
        values[name] = _latest(history, kept)
        left_out[name] = len(history) - kept
    if len(body) > max_bytes:
        raise PacketTooLargeError(f"the packet has {len(body)} bytes without any history, {max_bytes} is the most")
    return TrimmedPacket(Packet(packet.schema, body), left_out)


def _latest(history: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    return history[len(history) - n :]


def _encoded(packet: Packet, values: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, packet.schema.parsed, values)
    return stream.getvalue()

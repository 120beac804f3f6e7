"""Packets back to values: whole, only their first fields, or as a line of JSON."""

from __future__ import annotations

import io
import json
import math
from datetime import date
from decimal import Decimal
from typing import Any, NamedTuple

import fastavro

from schemas.avro.container import read_container_stream
from schemas.avro.schema_versions import PacketSchema, SchemaVersionError, WriterSchema, lsst_schema_by_id
from schemas.avro.wire import PacketFormatError, read_long, unwrap

_MAX_EXACT = 2**53  # beyond, not every whole number is a 64-bit float


class PacketPrefix(NamedTuple):
    """What lies first in a packet, the same in every version known here."""

    dia_source_id: int
    visit: int
    detector: int
    dia_object_id: int | None
    ss_object_id: int | None


def decode_packet(message: bytes) -> dict[str, Any]:
    """The packet in a wire message, as nested dicts.

    Raises
    ------
    PacketFormatError
        Too short, another first byte, an unknown schema id, a broken body, bytes behind the packet.
    """
    schema_id, body = unwrap(message)
    try:
        schema = lsst_schema_by_id(schema_id)
    except SchemaVersionError as error:
        raise PacketFormatError(str(error)) from error
    return decode_body(schema, body)


def decode_message(message: bytes) -> dict[str, Any]:
    """The packet of a message, wire or container, or an alert in JSON; PacketFormatError for anything else."""
    if message[:1] == b"{":
        return decode_json(message)
    return decode_body_of_container(message) if message[:3] == b"Obj" else decode_packet(message)


def decode_json(message: bytes) -> dict[str, Any]:
    """An alert in JSON, its ids as text. PacketFormatError if it is broken."""
    try:
        alert = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise PacketFormatError(f"broken JSON of {len(message)} bytes: {error}") from error
    if not isinstance(alert, dict):
        raise PacketFormatError(f"an alert in JSON is an object, got {type(alert).__name__}")
    return alert


def decode_body_of_container(message: bytes) -> dict[str, Any]:
    """The one packet of a container message; PacketFormatError if there is another number of them."""
    packets = decode_container(message)
    if len(packets) != 1:
        raise PacketFormatError(f"a container message holds one packet, got {len(packets)}")
    return packets[0]


def decode_body(schema: PacketSchema | WriterSchema, body: bytes) -> dict[str, Any]:
    """The packet in a schemaless body. PacketFormatError if it is broken or longer than its packet."""
    stream = io.BytesIO(body)
    try:
        packet = fastavro.schemaless_reader(stream, schema.parsed, None)
    except Exception as error:  # fastavro raises many kinds on broken bytes: all are one thing to us
        raise PacketFormatError(
            f"broken {schema.label} packet of {len(body)} bytes: {type(error).__name__}: {error}"
        ) from error
    if stream.tell() != len(body):
        raise PacketFormatError(f"{len(body) - stream.tell()} bytes behind a {schema.label} packet")
    if not isinstance(packet, dict):
        raise PacketFormatError(f"a packet is a record, got {type(packet).__name__}")
    return packet


def decode_container(message: bytes) -> list[dict[str, Any]]:
    """The packets of a container held in memory. PacketFormatError if it is broken."""
    return list(read_container_stream(io.BytesIO(message), "container"))


def packet_prefix(body: bytes) -> PacketPrefix:
    """Ids, visit and detector of a schemaless body without decoding the rest (5 us).

    Raises
    ------
    PacketFormatError
        The body ends early, a union has no such branch, or the two diaSourceIds differ.
    """
    try:
        alert_id, position = read_long(body, 0)
        for _ in ("observation_reason", "target_name"):
            length, position = _read_optional_long(body, position)
            position += _checked_length(length)
        dia_source_id, position = read_long(body, position)
        visit, position = read_long(body, position)
        detector, position = read_long(body, position)
        dia_object_id, position = _read_optional_long(body, position)
        ss_object_id, position = _read_optional_long(body, position)
    except IndexError:
        raise PacketFormatError(f"the packet ends within its first fields, after {len(body)} bytes") from None
    if alert_id != dia_source_id:
        raise PacketFormatError(f"the alert's diaSourceId {alert_id} is not its source's, {dia_source_id}")
    return PacketPrefix(dia_source_id, visit, detector, dia_object_id, ss_object_id)


def to_json(packet: dict[str, Any], *, cutout_sizes: bool = True) -> str:
    """One line of strict JSON for people and scripts.

    Ids (fields whose names end in `Id`) are text, and so are all whole numbers beyond 2^53; NaN and
    infinities are null; times of type timestamp are ISO 8601; a cutout is its size, `{"bytes": 34560}`, or
    left out.
    """
    return json.dumps(_plain(packet, cutout_sizes), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _plain(value: Any, cutout_sizes: bool) -> Any:
    if isinstance(value, dict):
        return {
            name: str(item) if name.endswith("Id") and isinstance(item, int) else _plain(item, cutout_sizes)
            for name, item in value.items()
            if cutout_sizes or not isinstance(item, bytes)
        }
    if isinstance(value, list):
        return [_plain(item, cutout_sizes) for item in value]
    if isinstance(value, bytes):
        return {"bytes": len(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) > _MAX_EXACT:
        return str(value)
    if isinstance(value, Decimal):
        return _plain(int(value) if value == value.to_integral_value() else float(value), cutout_sizes)
    if isinstance(value, date):  # a datetime is one too
        return value.isoformat()
    return value


def _read_optional_long(body: bytes, position: int) -> tuple[int | None, int]:
    branch, position = read_long(body, position)
    if branch == 0:
        return None, position
    if branch != 1:
        raise PacketFormatError(f"branch {branch} of a union of two at byte {position}")
    return read_long(body, position)


def _checked_length(length: int | None) -> int:
    if length is not None and length < 0:
        raise PacketFormatError(f"a text of {length} bytes")
    return length or 0

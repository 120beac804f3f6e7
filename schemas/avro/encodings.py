"""What one Kafka message holds: `rubin` (wire header + body) or `ocf` (an object container of one packet)."""

from __future__ import annotations

from schemas.avro.container import container_bytes, single_body
from schemas.avro.schema_versions import PacketSchema
from schemas.avro.wire import unwrap, wrap

ENCODINGS = ("rubin", "ocf")


class UnknownEncodingError(ValueError):
    """An encoding that packets are not sent in; the message lists those they are."""


def encode_message(encoding: str, schema: PacketSchema, body: bytes) -> bytes:
    """The message for a packet body. UnknownEncodingError for another encoding than `ENCODINGS`."""
    _check(encoding)
    if encoding == "rubin":
        return wrap(schema.schema_id, body)
    return container_bytes(schema, [body], docs=False)


def body_of_message(encoding: str, value: bytes) -> bytes:
    """The packet body that `encode_message` put into a message; PacketFormatError if there is none."""
    _check(encoding)
    return unwrap(value)[1] if encoding == "rubin" else single_body(value)


def message_headers(encoding: str) -> list[tuple[str, bytes]]:
    """Kafka headers that tell readers the encoding: hop-type clients choose their decoder by `_format`."""
    _check(encoding)
    return [("_format", b"avro")] if encoding == "ocf" else []


def _check(encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise UnknownEncodingError(f"unknown encoding {encoding!r}, known are {', '.join(ENCODINGS)}")

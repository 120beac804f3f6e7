"""Finished packets as messages: what goes out on a topic, and what waits in the packet store.

A message says which schema it is in. It is a wire message (0, schema id, body; encoding `rubin`) or an
object container of one packet (encoding `ocf`). Our own packets wait as the first; replayed ones as they
came, whatever survey's they are. Two encodings are sent only: `fink`, a body whose schema is the key of the
Kafka record, and `json-thin`, a line of JSON made of columns, no packet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from schemas.avro.container import ContainerSchema, container_bytes, single_body, whole_file, write_container
from schemas.avro.schema_versions import (
    PACKET_SCHEMA_IDS,
    SchemaVersionError,
    lsst_schema_by_id,
    packet_schema_by_id,
    writer_schema,
)
from schemas.avro.wire import PacketFormatError, unwrap, wrap

FINK = "fink"
JSON_THIN = "json-thin"
ENCODINGS = ("rubin", "ocf", FINK, JSON_THIN)


class UnknownEncodingError(ValueError):
    """An encoding that packets are not sent in; the message lists those they are."""


class Packet(NamedTuple):
    """A finished packet: its schema and its schemaless body."""

    schema: ContainerSchema
    body: bytes


def wire_message(packet: Packet) -> bytes:
    """The packet as a wire message. PacketFormatError where its schema has no id."""
    if packet.schema.schema_id is None:
        raise PacketFormatError(f"{packet.schema.label} has no schema id: there is no wire message of it")
    return wrap(packet.schema.schema_id, packet.body)


def container_message(packet: Packet) -> bytes:
    """The packet as a container of its own."""
    return container_bytes(packet.schema, [packet.body], docs=False)


def schema_of_container(text: str) -> ContainerSchema:
    """The schema of a container; where it is one of our own, with or without docs, that. SchemaVersionError."""
    schema = writer_schema(text)
    return packet_schema_by_id(schema.schema_id) if schema.schema_id in PACKET_SCHEMA_IDS else schema


def packet_of(message: bytes) -> Packet:
    """The packet in a message; PacketFormatError if there is none or its schema is unknown."""
    try:
        if message[:3] == b"Obj":
            header, body = single_body(message)
            return Packet(schema_of_container(header.schema_text), body)
        schema_id, body = unwrap(message)
        return Packet(lsst_schema_by_id(schema_id), body)
    except SchemaVersionError as error:
        raise PacketFormatError(str(error)) from error


def encoded(encoding: str, message: bytes) -> bytes:
    """A message in the encoding of a stream.

    A message that is in it already stays as it is, to the byte; so does a container whose schema has no
    id, in the encoding `rubin`.

    Raises
    ------
    UnknownEncodingError
        Another encoding than `ENCODINGS`.
    PacketFormatError
        No message; a packet in `json-thin`, which is made of columns.
    """
    if encoding not in ENCODINGS:
        raise UnknownEncodingError(f"unknown encoding {encoding!r}, known are {', '.join(ENCODINGS)}")
    if encoding == JSON_THIN:
        if not is_json(message):
            raise PacketFormatError("json-thin is made of an alert's columns, not of its packet")
        return message
    if encoding == FINK:
        return packet_of(message).body
    if _is_container(message) == (encoding == "ocf"):
        return message
    packet = packet_of(message)
    if encoding == "ocf":
        return container_message(packet)
    return message if packet.schema.schema_id is None else wire_message(packet)


def record_key(encoding: str, message: bytes, object_key: str) -> bytes:
    """The key of the Kafka record: the object's id as text; in `fink` the schema of the body as JSON text."""
    return _schema_key(packet_of(message).schema) if encoding == FINK else object_key.encode()


@lru_cache(maxsize=64)
def _schema_key(schema: ContainerSchema) -> bytes:
    return schema.json_text(docs=False).encode()


def message_of_record(key: bytes | None, value: bytes) -> bytes:
    """The message of a Kafka record in any encoding; a body whose schema was the key becomes a container.

    PacketFormatError where a key looks like a schema and is none.
    """
    if key is None or not is_json(key):
        return value
    try:
        return container_message(Packet(schema_of_container(key.decode()), value))
    except (UnicodeDecodeError, SchemaVersionError) as error:
        raise PacketFormatError(f"the key of the record is no schema: {error}") from error


def message_headers(message: bytes) -> list[tuple[str, bytes]]:
    """Kafka headers that tell readers the encoding: hop-type clients choose their decoder by `_format`."""
    return [("_format", b"avro")] if _is_container(message) else []


def write_messages(path: Path, messages: Iterable[bytes]) -> list[Path]:
    """Write packets to a container file; those in a further schema to one beside it, `<stem>.<schema>.avro`.

    `path` takes the schema of the first packet, block by block as the messages come; the rest is held in
    memory until then. Messages in JSON become the lines of `<stem>.jsonl` instead. Returns the files written.
    """
    messages = iter(messages)
    opening = next(messages, None)
    if opening is None:
        return []
    if is_json(opening):
        with whole_file(path.with_suffix(".jsonl")) as stream:
            stream.writelines(line + b"\n" for line in chain((opening,), messages))
        return [path.with_suffix(".jsonl")]
    packets = map(packet_of, chain((opening,), messages))
    first = next(packets)
    others: dict[str, list[Packet]] = {}

    def bodies_in_first_schema() -> Iterator[bytes]:
        for packet in chain((first,), packets):
            if packet.schema.fingerprint == first.schema.fingerprint:
                yield packet.body
            else:
                others.setdefault(packet.schema.fingerprint, []).append(packet)

    write_container(path, first.schema, bodies_in_first_schema())
    written = [path]
    for fingerprint, group in sorted(others.items()):
        written.append(path.with_name(f"{path.stem}.{fingerprint[:8]}.avro"))
        write_container(written[-1], group[0].schema, (packet.body for packet in group))
    return written


def is_json(text: bytes) -> bool:
    """Whether these bytes are a JSON object: an alert in `json-thin`, or the key of a record in `fink`."""
    return text[:1] == b"{"


def _is_container(message: bytes) -> bool:
    return message[:3] == b"Obj"

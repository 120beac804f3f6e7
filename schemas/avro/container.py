"""Avro object containers made of finished packet bodies: nothing is encoded again.

The same packets give the same file: the sync marker is the start of the SHA-256 of the schema text,
blocks are not compressed, and they end at fixed counts of packets and bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import fastavro

from schemas.avro.encoding import avro_long
from schemas.avro.schema_versions import PacketSchema
from schemas.avro.wire import PacketFormatError, read_long

BLOCK_PACKETS = 1000
BLOCK_BYTES = 1_000_000
_SYNC_BYTES = 16
_MAGIC = b"Obj\x01"


def container_bytes(schema: PacketSchema, bodies: Iterable[bytes], *, docs: bool = True) -> bytes:
    """A container with the given bodies. Without docs it is 16 KB smaller: for containers of one packet."""
    stream = io.BytesIO()
    _write(stream, schema, bodies, docs=docs)
    return stream.getvalue()


def write_container(path: Path, schema: PacketSchema, bodies: Iterable[bytes]) -> int:
    """Write a container file and return its number of packets.

    The file appears under its name complete or not at all: it is written beside it under a name that begins
    with a dot and renamed. `bodies` may be a generator; one block is held in memory.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with partial.open("wb") as stream:
            n_packets = _write(stream, schema, bodies, docs=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return n_packets


def read_container(path: Path) -> Iterator[dict[str, Any]]:
    """Packets of a container file, one after the other. PacketFormatError where the file is broken."""
    with path.open("rb") as stream:
        yield from read_container_stream(stream, path.name)


def read_container_stream(stream: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """Packets of an open container; `name` is for the message of the PacketFormatError.

    A file cut exactly between two blocks looks whole: the format has no end mark. The ledger has the counts.
    """
    if stream.read(len(_MAGIC)) != _MAGIC:  # fastavro does not look at the last byte
        raise PacketFormatError(f"{name}: not an Avro container: it does not start with 'Obj' and byte 1")
    stream.seek(0)
    n_read = 0
    try:
        for packet in fastavro.reader(stream):
            if not isinstance(packet, dict):
                raise PacketFormatError(f"{name}: holds {type(packet).__name__}, not records")
            yield packet
            n_read += 1
    except PacketFormatError:
        raise
    except Exception as error:  # fastavro raises many kinds on broken bytes: all are one thing to us
        raise PacketFormatError(
            f"{name}: broken container after {n_read} packets: {type(error).__name__}: {error}"
        ) from error


def _write(stream: BinaryIO, schema: PacketSchema, bodies: Iterable[bytes], *, docs: bool) -> int:
    header, sync = _header(schema, docs)
    stream.write(header)
    block: list[bytes] = []
    n_packets = size = 0
    for body in bodies:
        block.append(body)
        n_packets += 1
        size += len(body)
        if len(block) == BLOCK_PACKETS or size >= BLOCK_BYTES:
            stream.write(_block(block, size, sync))
            block, size = [], 0
    if block:
        stream.write(_block(block, size, sync))
    return n_packets


@cache
def _header(schema: PacketSchema, docs: bool) -> tuple[bytes, bytes]:
    """The bytes before the first block, and the sync marker that ends them and every block."""
    schema_text = schema.json_text(docs=docs).encode()
    sync = hashlib.sha256(schema_text).digest()[:16]
    pairs = ((b"avro.codec", b"null"), (b"avro.schema", schema_text))
    texts = b"".join(avro_long(len(text)) + text for pair in pairs for text in pair)
    return _MAGIC + avro_long(len(pairs)) + texts + avro_long(0) + sync, sync


def _block(bodies: list[bytes], size: int, sync: bytes) -> bytes:
    return b"".join((avro_long(len(bodies)), avro_long(size), *bodies, sync))


def single_body(message: bytes) -> bytes:
    """The body in a container of one packet without codec, undecoded; PacketFormatError for any other."""
    try:
        position = len(_MAGIC)
        n_pairs, position = read_long(message, position)
        while n_pairs:
            for _ in range(2 * n_pairs):
                length, position = read_long(message, position)
                position += length
            n_pairs, position = read_long(message, position)
        sync = message[position : position + _SYNC_BYTES]
        n_packets, position = read_long(message, position + _SYNC_BYTES)
        size, position = read_long(message, position)
    except IndexError:
        raise PacketFormatError(f"the container ends within its header, after {len(message)} bytes") from None
    end = position + size
    if message[: len(_MAGIC)] != _MAGIC or n_packets != 1 or size < 0 or message[end:] != sync:
        raise PacketFormatError("not a container of one packet")
    return message[position:end]

"""Avro object containers made of finished packet bodies: nothing is encoded again.

The same packets give the same file: the sync marker is the start of the SHA-256 of the schema text,
blocks are not compressed, and they end at fixed counts of packets and bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from mmap import mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fastavro

from schemas.avro.encoding import avro_long
from schemas.avro.schema_versions import PacketSchema, WriterSchema, writer_schema
from schemas.avro.wire import PacketFormatError, read_long

BLOCK_PACKETS = 1000
BLOCK_BYTES = 1_000_000
MAX_UNPACKED_BYTES = 500_000_000  # of one block: a few KB of zeros may say they are gigabytes
_SYNC_BYTES = 16
_CODECS = ("null", "deflate")
_MAGIC = b"Obj\x01"
ContainerSchema = PacketSchema | WriterSchema
Buffer = bytes | memoryview | mmap


def container_bytes(schema: ContainerSchema, bodies: Iterable[bytes], *, docs: bool = True) -> bytes:
    """A container with the given bodies. Without docs it is 16 KB smaller: for containers of one packet."""
    stream = io.BytesIO()
    _write(stream, schema, bodies, docs=docs)
    return stream.getvalue()


def write_container(path: Path, schema: ContainerSchema, bodies: Iterable[bytes]) -> int:
    """Write a container file and return its number of packets.

    The file appears under its name complete or not at all. `bodies` may be a generator; one block is held
    in memory.
    """
    with whole_file(path) as stream:
        return _write(stream, schema, bodies, docs=True)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name complete or not at all: under a dotted one first, then renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with partial.open("wb") as stream:
            yield stream
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
        packets = fastavro.reader(stream)
        writer_schema(packets.metadata["avro.schema"])  # one that is safe to read
        for packet in packets:
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


def _write(stream: BinaryIO, schema: ContainerSchema, bodies: Iterable[bytes], *, docs: bool) -> int:
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


@lru_cache(maxsize=64)
def _header(schema: ContainerSchema, docs: bool) -> tuple[bytes, bytes]:
    """The bytes before the first block, and the sync marker that ends them and every block."""
    schema_text = schema.json_text(docs=docs).encode()
    sync = hashlib.sha256(schema_text).digest()[:16]
    pairs = ((b"avro.codec", b"null"), (b"avro.schema", schema_text))
    texts = b"".join(avro_long(len(text)) + text for pair in pairs for text in pair)
    return _MAGIC + avro_long(len(pairs)) + texts + avro_long(0) + sync, sync


def _block(bodies: list[bytes], size: int, sync: bytes) -> bytes:
    return b"".join((avro_long(len(bodies)), avro_long(size), *bodies, sync))


@dataclass(frozen=True)
class ContainerHeader:
    """What a container says before its first block; `end` is where that begins."""

    schema_text: str
    codec: str
    sync: bytes
    end: int


def container_header(data: Buffer) -> ContainerHeader:
    """The header of a container held in memory; PacketFormatError if it is none or breaks off within."""
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise PacketFormatError("not an Avro container: it does not start with 'Obj' and byte 1")
    entries: dict[bytes, bytes] = {}
    try:
        position = len(_MAGIC)
        n_pairs, position = read_long(data, position)
        while n_pairs:
            if n_pairs < 0:  # a negative count is followed by the size of its pairs in bytes
                n_pairs, (_, position) = -n_pairs, read_long(data, position)
            for _ in range(n_pairs):
                key, position = _text(data, position)
                entries[key], position = _text(data, position)
            n_pairs, position = read_long(data, position)
        sync = bytes(data[position : position + _SYNC_BYTES])
    except IndexError:
        raise PacketFormatError(f"the container ends within its header, after {len(data)} bytes") from None
    if len(sync) < _SYNC_BYTES or b"avro.schema" not in entries:
        raise PacketFormatError("a container without a schema or sync marker")
    try:
        schema_text = entries[b"avro.schema"].decode()
    except UnicodeDecodeError as error:
        raise PacketFormatError(f"the container's schema is not UTF-8: {error}") from error
    codec = entries.get(b"avro.codec", b"null").decode("ascii", "replace")
    return ContainerHeader(schema_text, codec, sync, position + _SYNC_BYTES)


class ContainerBlock(NamedTuple):
    """One block of a container: where it begins, how many packets it holds, and their bytes, compressed."""

    offset: int
    n_packets: int
    payload: Buffer


def container_blocks(data: Buffer, header: ContainerHeader) -> Iterator[ContainerBlock]:
    """The blocks of a container held in memory; PacketFormatError where they break off."""
    position = header.end
    while position < len(data):
        block, position = container_block(data, header, position)
        yield block


def container_block(data: Buffer, header: ContainerHeader, offset: int) -> tuple[ContainerBlock, int]:
    """The block that begins at `offset`, and where it ends; PacketFormatError if it is broken."""
    try:
        n_packets, position = read_long(data, offset)
        size, position = read_long(data, position)
    except IndexError:
        raise PacketFormatError(f"the container ends within the block at byte {offset}") from None
    end = position + size
    if n_packets < 0 or size < 0 or bytes(data[end : end + _SYNC_BYTES]) != header.sync:
        raise PacketFormatError(f"the container's block at byte {offset} is broken")
    return ContainerBlock(offset, n_packets, data[position:end]), end + _SYNC_BYTES


def check_codec(codec: str) -> None:
    """PacketFormatError unless blocks with this codec can be read."""
    if codec not in _CODECS:
        raise PacketFormatError(f"codec {codec!r}, expected {' or '.join(_CODECS)}")


def block_bytes(block: ContainerBlock, codec: str) -> bytes:
    """The packet bodies of a block, one after the other. PacketFormatError for a broken block or another codec."""
    check_codec(codec)
    if codec == "null":
        return bytes(block.payload)
    unpacking = zlib.decompressobj(wbits=-15)
    try:
        bodies = unpacking.decompress(block.payload, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise PacketFormatError(f"the container's block at byte {block.offset} is broken: {error}") from error
    if not unpacking.eof:
        reason = f"holds more than {MAX_UNPACKED_BYTES} bytes" if unpacking.unconsumed_tail else "breaks off"
        raise PacketFormatError(f"the container's block at byte {block.offset} {reason}")
    return bodies


def single_body(message: bytes) -> tuple[ContainerHeader, bytes]:
    """Header and body of a container of one packet; PacketFormatError for any other."""
    header = container_header(message)
    block, end = container_block(message, header, header.end)
    if block.n_packets != 1 or end != len(message):
        raise PacketFormatError("not a container of one packet")
    return header, block_bytes(block, header.codec)


def _text(data: Buffer, position: int) -> tuple[bytes, int]:
    length, position = read_long(data, position)
    if length < 0 or position + length > len(data):
        raise IndexError
    return bytes(data[position : position + length]), position + length

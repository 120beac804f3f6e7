"""Containers read by hand: whatever the bytes, there is a packet or a `PacketFormatError`, and never for long."""

from __future__ import annotations

import io
import json
import time
import zlib
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_alerts import random_batch

from schemas.avro import container
from schemas.avro.container import (
    block_bytes,
    container_block,
    container_blocks,
    container_bytes,
    container_header,
    read_container,
    single_body,
)
from schemas.avro.encoding import encode_packets
from schemas.avro.messages import Packet, container_message, encoded, packet_of, schema_of_container
from schemas.avro.schema_versions import (
    ARCHIVED_VERSIONS,
    VERSIONS,
    SchemaVersionError,
    WriterSchema,
    archived_schema,
    lsst_schema_by_id,
    packet_schema,
    schema_id_of,
    writer_schema,
)
from schemas.avro.wire import PacketFormatError, wrap
from schemas.manifests import ManifestError
from schemas.packet_index import index_packets

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}")
SIMPLE = {
    "type": "record",
    "name": "ztf.alert",
    "fields": [
        {"name": "objectId", "type": "string"},
        {"name": "candid", "type": ["null", "long"]},
        {"name": "stamp", "type": "bytes"},
        {"name": "candidate", "type": {"type": "map", "values": "double"}},
    ],
}
PACKETS = [{"objectId": f"o{k}", "candid": k, "stamp": bytes([k]) * 50, "candidate": {"jd": 0.5 * k}} for k in range(9)]


def _written(codec: str = "null") -> bytes:
    stream = io.BytesIO()
    fastavro.writer(stream, SIMPLE, PACKETS, codec=codec, sync_interval=200, sync_marker=b"fedcba9876543210")
    return stream.getvalue()


WRITTEN = {codec: _written(codec) for codec in ("null", "deflate")}


def _bodies(content: bytes) -> list[bytes]:
    """The blocks' contents: what the code under test makes of a container."""
    header = container_header(content)
    writer_schema(header.schema_text)
    return [block_bytes(block, header.codec) for block in container_blocks(content, header)]


@pytest.mark.parametrize("codec", ["null", "deflate"])
def test_blocks_hold_what_fastavro_reads(codec: str) -> None:
    header = container_header(WRITTEN[codec])
    schema = writer_schema(header.schema_text)
    assert header.codec == codec and json.loads(header.schema_text)["name"] == "ztf.alert"
    read = []
    for block in container_blocks(WRITTEN[codec], header):
        stream = io.BytesIO(block_bytes(block, codec))
        read += [fastavro.schemaless_reader(stream, schema.parsed, None) for _ in range(block.n_packets)]
        assert stream.read() == b""
    assert read == PACKETS == list(fastavro.reader(io.BytesIO(WRITTEN[codec])))


@pytest.mark.parametrize("codec", ["null", "deflate"])
def test_a_container_cut_anywhere_is_refused_or_ends_with_a_block(codec: str) -> None:
    content = WRITTEN[codec]
    whole = _bodies(content)
    header = container_header(content)
    ends = {header.end} | {container_block(content, header, one.offset)[1] for one in container_blocks(content, header)}
    for length in range(len(content)):
        if length in ends:
            part = _bodies(content[:length])
            assert part == whole[: len(part)]
        else:
            with pytest.raises(PacketFormatError):
                _bodies(content[:length])


@given(data=st.data(), codec=st.sampled_from(["null", "deflate"]))
@settings(max_examples=400, deadline=1000)
def test_mutated_containers_are_read_or_refused(data: st.DataObject, codec: str) -> None:
    content = bytearray(WRITTEN[codec])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(max_size=12))
        kind = data.draw(st.sampled_from(["replace", "insert", "remove"]))
        stop = place if kind == "insert" else place + len(piece)
        content[place:stop] = b"" if kind == "remove" else piece
        content = content or bytearray(b"x")
    _is_read_or_refused(bytes(content))


@given(tail=st.binary(max_size=200))
@example(tail=b"\x02" + b"\xfe" * 9)
@example(tail=b"\x01\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@settings(max_examples=300, deadline=1000)
def test_any_bytes_behind_the_magic_are_read_or_refused(tail: bytes) -> None:
    _is_read_or_refused(b"Obj\x01" + tail)
    _is_read_or_refused(WRITTEN["null"][: container_header(WRITTEN["null"]).end] + tail)


def _is_read_or_refused(content: bytes) -> None:
    """Only the two named errors may come, and only as many bytes as there are."""
    try:
        bodies = _bodies(content)
    except (PacketFormatError, SchemaVersionError):
        bodies = []
    # Deflate makes at most 1032 bytes of one.
    assert sum(map(len, bodies)) <= 1032 * len(content)
    try:
        packet = packet_of(content)
    except PacketFormatError:
        return
    assert len(packet.body) <= 1032 * len(content)


@given(data=st.data())
@settings(max_examples=60, deadline=2000)
def test_a_file_of_mutated_containers_is_indexed_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The whole way of `replay`: no other error than the one that is told in one line."""
    folder = tmp_path_factory.mktemp("mutated")
    content = bytearray(WRITTEN[data.draw(st.sampled_from(["null", "deflate"]))])
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / "a.avro").write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    with pytest.raises(ManifestError, match="no packet to replay"):  # none of these has a usable candidate
        index_packets([folder], folder / "index.parquet", folder / "spool")


@pytest.mark.parametrize("n_pairs", [2**62, -(2**62), 10**6])
def test_a_header_that_promises_endless_pairs_ends_with_its_bytes(n_pairs: int) -> None:
    started = time.monotonic()
    with pytest.raises(PacketFormatError):
        container_header(b"Obj\x01" + container.avro_long(n_pairs) + b"\0" * 5000)
    assert time.monotonic() - started < 1.0


def test_a_block_that_would_unpack_to_more_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_UNPACKED_BYTES", 1000)
    packing = zlib.compressobj(9, wbits=-15)
    block = container.ContainerBlock(7, 1, packing.compress(bytes(1001)) + packing.flush())
    with pytest.raises(PacketFormatError, match="block at byte 7 holds more than 1000 bytes"):
        block_bytes(block, "deflate")
    packing = zlib.compressobj(9, wbits=-15)
    fitting = packing.compress(bytes(1000)) + packing.flush()
    assert block_bytes(block._replace(payload=fitting), "deflate") == bytes(1000)
    with pytest.raises(PacketFormatError, match="block at byte 7 breaks off"):
        block_bytes(block._replace(payload=fitting[:-1]), "deflate")


@pytest.mark.parametrize("n", [0, 2])
def test_a_container_of_another_number_of_packets_is_no_message(n: int) -> None:
    schema = packet_schema("11.0")
    bodies = encode_packets(schema, random_batch(n, np.random.default_rng(5))) if n else []
    with pytest.raises(PacketFormatError, match="not a container of one" if n else "ends within the block"):
        single_body(container_bytes(schema, bodies))


def test_a_container_whose_packets_nest_without_end_is_refused_before_one_is_read(tmp_path: Path) -> None:
    """Read on, it would end the process: fastavro's reader calls itself once a level."""
    header = container_bytes(writer_schema(_record("long")), [])
    text = _record(["null", "a.b"])
    hostile = header.replace(
        container.avro_long(len(_record("long"))) + _record("long").encode(),
        container.avro_long(len(text)) + text.encode(),
    )
    body = b"\2" * 100_000 + b"\0"
    block = container.avro_long(1) + container.avro_long(len(body)) + body + header[-16:]
    (tmp_path / "a.avro").write_bytes(hostile + block)
    with pytest.raises(PacketFormatError, match=r"broken container after 0 packets: .* a\.b holds itself"):
        list(read_container(tmp_path / "a.avro"))


# --- schemas --------------------------------------------------------------------------------------------


def _record(*fields: Any, name: str = "a.b") -> str:
    listed = [{"name": f"f{k}", "type": kind} for k, kind in enumerate(fields)]
    return json.dumps({"type": "record", "name": name, "fields": listed})


EMPTY = {"type": "record", "name": "empty", "fields": []}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_record(["null", "a.b"]), "a.b holds itself"),
        (_record({"type": "array", "items": "a.b"}), "a.b holds itself"),
        (_record({"type": "map", "values": ["long", "a.b"]}), "a.b holds itself"),
        (_record({"type": "record", "name": "c", "fields": [{"name": "x", "type": ["null", "a.b"]}]}), "holds itself"),
        (_record("long", {"type": "array", "items": "null"}), "an array of items without bytes"),
        (_record("long", {"type": "array", "items": {"type": "fixed", "name": "z", "size": 0}}), "items without bytes"),
        (_record("long", ["null", {"type": "array", "items": EMPTY}]), "without bytes"),
        (_record(), "a.b is a record without bytes"),
        (_record("null", "null"), "a.b is a record without bytes"),
        (_record("long", EMPTY), "empty is a record without bytes"),
        ('{"type": "enum", "name": "e", "symbols": ["a"]}', "e is of type enum, not a record"),
        ('{"type": "fixed", "name": "e", "size": 8}', "e is of type fixed, not a record"),
        ('["null", "long"]', "no schema of a record"),
        ('"long"', "no schema of a record"),
        ("null", "no schema of a record"),
        ("7", "no schema of a record"),
        ("", "no schema of a record"),
        ("{", "no schema of a record"),
        ("[" * 100_000, "no schema of a record: RecursionError"),
        (_record("nonsense"), "no schema of a record: UnknownType"),
        ('{"type": "record", "name": "a"}', "a is a record without bytes"),
        ('{"type": "record", "name": "a", "fields": 7}', "no schema of a record"),
        ('{"type": "record", "fields": []}', "no schema of a record"),
    ],
)
def test_a_schema_that_is_none_or_that_bytes_do_not_bound_is_refused(text: str, words: str) -> None:
    with pytest.raises(SchemaVersionError, match=words):
        writer_schema(text)


@pytest.mark.parametrize(
    "text",
    [
        _record(["null", "long"], {"type": "array", "items": ["null", "long"]}),
        _record({"type": "map", "values": "null"}),
        _record({"type": "record", "name": "c", "fields": [{"name": "x", "type": "int"}]}, ["null", "c"], "c"),
        _record({"type": "long", "logicalType": "timestamp-micros"}, {"type": "string"}),
    ],
)
def test_a_schema_that_bytes_bound_is_taken(text: str) -> None:
    assert writer_schema(text).text == text


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("docs", [True, False])
def test_own_containers_map_to_the_own_schema_with_and_without_docs(version: str, docs: bool) -> None:
    schema = packet_schema(version)
    (body,) = encode_packets(schema, random_batch(1, np.random.default_rng(3)))
    message = container_bytes(schema, [body], docs=docs)
    assert schema_of_container(container_header(message).schema_text) is schema
    assert packet_of(message) == Packet(schema, body) == packet_of(wrap(schema.schema_id, body))
    assert encoded("rubin", message) == wrap(schema.schema_id, body)
    assert encoded("ocf", wrap(schema.schema_id, body)) == container_message(Packet(schema, body))
    assert encoded("ocf", message) == message  # its own bytes, whatever it says beside


@pytest.mark.parametrize("version", [*VERSIONS, *ARCHIVED_VERSIONS])
def test_a_schema_that_only_bears_a_known_name_has_no_id_and_keeps_its_container(version: str) -> None:
    name = f"lsst.v{version.replace('.', '_')}.alert"
    message = container_bytes(writer_schema(_record("long", name=name)), [b"\2"])
    packet = packet_of(message)
    assert isinstance(packet.schema, WriterSchema) and packet.schema.schema_id is None
    assert encoded("rubin", message) == encoded("ocf", message) == message


@pytest.mark.parametrize("version", ARCHIVED_VERSIONS)
def test_an_archived_schema_is_found_by_its_id_and_by_its_text(version: str) -> None:
    schema = archived_schema(version)
    assert lsst_schema_by_id(schema_id_of(version)) is schema
    assert schema_of_container(schema.text).schema_id == schema_id_of(version)


@needs_data
@pytest.mark.parametrize("version", [*ARCHIVED_VERSIONS, "11.0"])
def test_schemas_of_versions_are_those_that_lssts_samples_were_written_in(version: str) -> None:
    sample = DATA / "lsst_alert_samples" / f"v{version.replace('.', '_')}" / "fakeAlert.avro"
    header = container_header(sample.read_bytes())
    assert writer_schema(header.schema_text).fingerprint == lsst_schema_by_id(schema_id_of(version)).fingerprint
    header, body = single_body(sample.read_bytes())
    assert encoded("rubin", sample.read_bytes()) == wrap(schema_id_of(version), body)

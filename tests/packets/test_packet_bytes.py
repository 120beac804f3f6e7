"""Bytes of packets: equal to fastavro's, read by LSST's client, safe against broken input."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from decimal import Decimal

import fastavro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lsst.alert.packet import SchemaRegistry
from sample_alerts import expected_packet, random_batch, random_records
from sample_alerts import same_values as _same

from schemas.avro.container import BLOCK_PACKETS, container_bytes, read_container, write_container
from schemas.avro.encoding import PacketContentError, encode_packets
from schemas.avro.messages import (
    Packet,
    UnknownEncodingError,
    container_message,
    encoded,
    message_headers,
    message_of_record,
    record_key,
    wire_message,
)
from schemas.avro.reading import decode_container, decode_message, decode_packet, packet_prefix, to_json
from schemas.avro.row_encoding import DOUBLE, INT, row_plan
from schemas.avro.schema_versions import VERSIONS, packet_schema
from schemas.avro.wire import PacketFormatError, unwrap, wire_header, wrap

LSST_SCHEMAS = SchemaRegistry.all_schemas_from_filesystem()
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, n=st.integers(0, 4))
def test_bytes_equal_those_of_fastavro_with_lssts_own_schema(version: str, seed: int, n: int) -> None:
    batch = random_batch(n, np.random.default_rng(seed))
    bodies = encode_packets(packet_schema(version), batch)
    assert len(bodies) == n
    lsst = LSST_SCHEMAS.get_by_version(version)
    for i, body in enumerate(bodies):
        assert body == lsst.serialize(expected_packet(version, batch, i))


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_lssts_client_and_our_reader_see_the_same_values(version: str, seed: int) -> None:
    batch = random_batch(3, np.random.default_rng(seed))
    schema = packet_schema(version)
    for i, body in enumerate(encode_packets(schema, batch)):
        expected = expected_packet(version, batch, i)
        assert _same(LSST_SCHEMAS.get_by_id(schema.schema_id).deserialize(body), expected)
        assert _same(decode_packet(wrap(schema.schema_id, body)), expected)


def test_long_histories_keep_count_and_order() -> None:
    rng = np.random.default_rng(11)
    n_history, n_forced = 300, 1000
    batch = random_batch(1, rng, longest=0)
    batch = replace(
        batch,
        has_object=np.array([True]),
        has_ss=np.array([False]),
        prv_dia_sources=random_records("diaSource", n_history, rng),
        prv_offsets=np.array([0, n_history]),
        prv_forced=random_records("diaForcedSource", n_forced, rng),
        forced_offsets=np.array([0, n_forced]),
    )
    (body,) = encode_packets(packet_schema("11.1"), batch)
    assert body == LSST_SCHEMAS.get_by_version("11.1").serialize(expected_packet("11.1", batch, 0))


def test_null_rules_of_history() -> None:
    """One source: history null. From the second on: a list, also when it is empty. Solar system: all null."""
    batch = random_batch(3, np.random.default_rng(5), longest=0)
    batch.dia_objects["nDiaSources"] = [1, 2, 1]
    batch = replace(batch, has_object=np.array([True, True, False]), has_ss=np.array([False, False, True]))
    packets = [decode_packet(wrap(1100, body)) for body in encode_packets(packet_schema("11.0"), batch)]
    assert [packet["prvDiaSources"] for packet in packets] == [None, [], None]
    assert [packet["prvDiaForcedSources"] for packet in packets] == [[], [], None]
    assert [packet["diaObject"] is None for packet in packets] == [False, False, True]
    assert [packet["ssSource"] is None for packet in packets] == [True, True, False]


def test_packets_do_not_depend_on_the_batch_they_were_made_in() -> None:
    batch = random_batch(6, np.random.default_rng(8))
    schema = packet_schema("11.0")
    together = encode_packets(schema, batch)
    for i in range(6):
        history = batch.prv_dia_sources[batch.prv_offsets[i] : batch.prv_offsets[i + 1]]
        forced = batch.prv_forced[batch.forced_offsets[i] : batch.forced_offsets[i + 1]]
        one = replace(
            batch,
            dia_sources=batch.dia_sources[i : i + 1],
            prv_dia_sources=history,
            prv_offsets=np.array([0, len(history)]),
            prv_forced=forced,
            forced_offsets=np.array([0, len(forced)]),
            dia_objects=batch.dia_objects[i : i + 1],
            has_object=batch.has_object[i : i + 1],
            ss_sources=batch.ss_sources[i : i + 1],
            has_ss=batch.has_ss[i : i + 1],
            mpc_orbits=batch.mpc_orbits[i : i + 1],
            has_orbit=batch.has_orbit[i : i + 1],
            cutouts=tuple([stamps[i]] for stamps in batch.cutouts),
        )
        assert encode_packets(schema, one) == [together[i]]


def test_a_prefix_stands_in_front_of_every_packet() -> None:
    batch = random_batch(5, np.random.default_rng(10))
    schema = packet_schema("11.0")
    messages = encode_packets(schema, batch, prefix=wire_header(schema.schema_id))
    assert messages == [wrap(schema.schema_id, body) for body in encode_packets(schema, batch)]


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_sized_histories_decode_to_the_same_and_can_be_stepped_over(version: str, seed: int) -> None:
    """Each history that is not empty has its length before it: a varint of one to three bytes for less than 1 MB."""
    batch = random_batch(3, np.random.default_rng(seed), longest=70)
    schema, lsst = packet_schema(version), LSST_SCHEMAS.get_by_version(version)
    plain, sized = (encode_packets(schema, batch, sized_blocks=choice) for choice in (False, True))
    narrow = copy.deepcopy(lsst.definition)
    narrow["fields"] = [field for field in narrow["fields"] if not field["name"].startswith("prv")]
    for i, body in enumerate(sized):
        expected = expected_packet(version, batch, i)
        assert _same(lsst.deserialize(body), expected)
        assert _same(decode_packet(wrap(schema.schema_id, body)), expected)
        assert packet_prefix(body) == packet_prefix(plain[i])
        histories = [expected.pop(name) for name in ("prvDiaSources", "prvDiaForcedSources")]
        assert _same(fastavro.schemaless_reader(io.BytesIO(body), lsst.definition, narrow), expected)
        filled = sum(bool(rows) for rows in histories)
        assert filled <= len(body) - len(plain[i]) <= 3 * filled


def test_read_only_records_give_the_same_bytes() -> None:
    batch = random_batch(4, np.random.default_rng(9))
    frozen = batch.dia_sources.copy()
    frozen.flags.writeable = False
    schema = packet_schema("11.1")
    assert encode_packets(schema, replace(batch, dia_sources=frozen)) == encode_packets(schema, batch)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prv_offsets": np.array([0, 1, 0, 0])}, "prv_offsets must rise"),
        ({"prv_offsets": np.array([0, 0, 0])}, "prv_offsets must be 4 integers"),
        ({"forced_offsets": np.zeros(4)}, "forced_offsets must be 4 integers"),
        ({"has_ss": np.zeros(2, dtype=bool)}, "has_ss must have shape"),
        ({"has_object": np.zeros(3)}, "has_object has another layout"),
        (
            {"cutouts": ([None] * 3, [None] * 2, [None] * 3)},
            r"cutouts must be three lists of 3, got lengths \[3, 2, 3\]",
        ),
    ],
)
def test_columns_that_disagree_are_refused(change: dict, reason: str) -> None:
    batch = random_batch(3, np.random.default_rng(1), longest=0)
    with pytest.raises(PacketContentError, match=reason):
        replace(batch, **change)


def test_history_of_an_alert_without_object_is_refused() -> None:
    rng = np.random.default_rng(2)
    batch = random_batch(1, rng, longest=0)
    with pytest.raises(PacketContentError, match="history for an alert without an object"):
        replace(
            batch,
            has_object=np.array([False]),
            prv_dia_sources=random_records("diaSource", 1, rng),
            prv_offsets=np.array([0, 1]),
        )


def test_a_number_of_another_width_than_its_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="the field at byte 3 has 2 bytes, its kind has 4"):
        row_plan([(DOUBLE, 8, 8, True, 0), (INT, 3, 2, False, 0)])


def test_wire_header_is_zero_and_the_big_endian_id() -> None:
    assert wrap(1100, b"x") == b"\x00\x00\x00\x04\x4cx"
    assert wrap(1101, b"") == b"\x00\x00\x00\x04\x4d"
    assert unwrap(b"\x00\x00\x00\x04\x4cxyz") == (1100, b"xyz")


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, version=st.sampled_from(VERSIONS))
def test_prefix_equals_the_full_decode(seed: int, version: str) -> None:
    batch = random_batch(2, np.random.default_rng(seed), longest=1)
    for body in encode_packets(packet_schema(version), batch):
        source = decode_packet(wrap(packet_schema(version).schema_id, body))["diaSource"]
        fields = ("diaSourceId", "visit", "detector", "diaObjectId", "ssObjectId")
        assert tuple(packet_prefix(body)) == tuple(source[name] for name in fields)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_truncation_is_a_packet_format_error(version: str) -> None:
    schema = packet_schema(version)
    (body,) = encode_packets(schema, random_batch(1, np.random.default_rng(4)))
    message = wrap(schema.schema_id, body)
    for length in range(0, len(message), max(1, len(message) // 150)):
        with pytest.raises(PacketFormatError):
            decode_packet(message[:length])
    for length in range(10):
        with pytest.raises(PacketFormatError):
            packet_prefix(body[:length])


def test_wrong_first_byte_unknown_id_and_trailing_bytes_are_packet_format_errors() -> None:
    schema = packet_schema("11.0")
    (body,) = encode_packets(schema, random_batch(1, np.random.default_rng(4)))
    with pytest.raises(PacketFormatError, match="starts with byte 0, got 1"):
        decode_packet(b"\x01" + wrap(1100, body)[1:])
    with pytest.raises(PacketFormatError, match=r"unknown schema id 1200, known are 700, .*, 1100, 1101"):
        decode_packet(wrap(1200, body))
    with pytest.raises(PacketFormatError, match=r"3 bytes behind a v11\.0 packet"):
        decode_packet(wrap(1100, body + b"abc"))


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_damaged_bytes_decode_or_are_a_packet_format_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    (body,) = encode_packets(packet_schema("11.1"), random_batch(1, np.random.default_rng(3)))
    damaged = bytearray(body)
    for _ in range(int(rng.integers(1, 4))):
        damaged[int(rng.integers(0, len(damaged)))] = int(rng.integers(0, 256))
    for read in (lambda: decode_packet(wrap(1101, bytes(damaged))), lambda: packet_prefix(bytes(damaged))):
        try:
            read()
        except PacketFormatError as error:
            assert str(error)


def test_stock_fastavro_reads_the_container_in_blocks(tmp_path) -> None:
    schema = packet_schema("11.0")
    batch = random_batch(4, np.random.default_rng(6), longest=1)
    bodies = encode_packets(schema, batch) * (BLOCK_PACKETS // 4 + 1)
    path = tmp_path / "1.avro"
    assert write_container(path, schema, iter(bodies)) == len(bodies)
    with path.open("rb") as stream:
        packets = list(fastavro.reader(stream))
    with path.open("rb") as stream:
        counts = [block.num_records for block in fastavro.block_reader(stream)]
    assert len(packets) == len(bodies)
    assert len(counts) > 1
    assert max(counts) <= BLOCK_PACKETS
    for i in range(4):
        assert _same(packets[-4 + i], expected_packet("11.0", batch, i))
    assert [packet["diaSourceId"] for packet in read_container(path)] == [packet["diaSourceId"] for packet in packets]
    assert [entry.name for entry in tmp_path.iterdir()] == ["1.avro"]


def test_same_packets_give_the_same_container_file(tmp_path) -> None:
    schema = packet_schema("11.1")
    bodies = encode_packets(schema, random_batch(3, np.random.default_rng(6)))
    for name in ("a", "b"):
        write_container(tmp_path / name, schema, bodies)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == container_bytes(schema, bodies)


def test_a_container_that_fails_half_way_leaves_nothing_behind(tmp_path) -> None:
    def bodies():
        yield b"x" * 2_000_000
        raise RuntimeError("store went away")

    with pytest.raises(RuntimeError, match="store went away"):
        write_container(tmp_path / "1.avro", packet_schema("11.0"), bodies())
    assert list(tmp_path.iterdir()) == []


def test_broken_container_is_a_packet_format_error(tmp_path) -> None:
    schema = packet_schema("11.0")
    data = container_bytes(schema, encode_packets(schema, random_batch(3, np.random.default_rng(7))))
    for broken in (b"", data[:100], data[:-5], b"Obj\x02" + data[4:], data[:-200] + bytes(200)):
        path = tmp_path / "broken.avro"
        path.write_bytes(broken)
        with pytest.raises(PacketFormatError, match=r"broken\.avro"):
            list(read_container(path))


def test_lsst_tools_read_our_container() -> None:
    schema = packet_schema("11.0")
    batch = random_batch(2, np.random.default_rng(7))
    stream = io.BytesIO(container_bytes(schema, encode_packets(schema, batch)))
    _, packets = LSST_SCHEMAS.get_by_version("11.0").retrieve_alerts(stream)
    assert all(_same(packet, expected_packet("11.0", batch, i)) for i, packet in enumerate(packets))


@pytest.mark.parametrize("version", VERSIONS)
def test_encodings_hold_the_same_packet(version: str) -> None:
    schema = packet_schema(version)
    batch = random_batch(1, np.random.default_rng(12))
    (body,) = encode_packets(schema, batch)
    expected = expected_packet(version, batch, 0)
    wire, container = (encoded(encoding, wire_message(Packet(schema, body))) for encoding in ("rubin", "ocf"))
    assert _same(decode_packet(wire), expected)
    assert _same(decode_container(container), [expected])
    assert encoded("rubin", container) == wire
    assert encoded("ocf", wire) == encoded("ocf", container) == container
    assert message_headers(container) == [("_format", b"avro")]
    assert message_headers(wire) == []
    assert [record_key(encoding, wire, "12") for encoding in ("rubin", "ocf", "json-thin")] == [b"12"] * 3
    for message in (wire, container):
        value, key = encoded("fink", message), record_key("fink", message, "12")
        assert value == body and message_of_record(key, value) == container
        assert _same(
            fastavro.schemaless_reader(io.BytesIO(value), fastavro.parse_schema(json.loads(key)), None), expected
        )
    assert message_of_record(b"12", wire) == wire
    with pytest.raises(PacketFormatError, match="made of an alert's columns"):
        encoded("json-thin", wire)
    with pytest.raises(UnknownEncodingError, match="'json', known are rubin, ocf, fink, json-thin"):
        encoded("json", wire)


def test_a_key_that_is_no_schema_is_one_broken_message() -> None:
    for key in (b"{", b'{"type": "long"}', b"{\xff}"):
        with pytest.raises(PacketFormatError, match="the key of the record is no schema"):
            message_of_record(key, b"body")


def test_broken_json_is_one_broken_message() -> None:
    assert decode_message(b'{"diaSourceId":"27131565485064193"}') == {"diaSourceId": "27131565485064193"}
    for message in (b"{", b'{"ra": \xff}', b"{" * 100_000):
        with pytest.raises(PacketFormatError, match="broken JSON"):
            decode_message(message)


def test_json_numbers_hold_no_whole_number_that_a_float_does_not() -> None:
    numbers = {
        "sum": Decimal(2**53),
        "more": Decimal(2**53 + 1),
        "part": Decimal("1.25"),
        "list": [2**53 + 1, -(2**63)],
    }
    assert json.loads(to_json(numbers)) == {
        "sum": 2**53,
        "more": "9007199254740993",
        "part": 1.25,
        "list": ["9007199254740993", "-9223372036854775808"],
    }


def test_a_message_container_fits_beside_its_cutouts() -> None:
    """Docs stay out of messages: 19 KB of schema a message instead of 35 KB."""
    schema = packet_schema("11.0")
    assert len(container_message(Packet(schema, b""))) < 19_000 < len(container_bytes(schema, [b""]))


def test_json_is_strict_and_keeps_ids_exact() -> None:
    batch = random_batch(1, np.random.default_rng(13), longest=0)
    batch.dia_sources["diaSourceId"] = 170587115523932323
    batch.dia_sources["psfFlux"] = np.nan
    batch.dia_sources["x"] = np.inf
    batch.dia_sources["visit"] = 2026112200001
    batch = replace(batch, cutouts=([b"123"], [None], [b""]))
    packet = decode_packet(wrap(1100, encode_packets(packet_schema("11.0"), batch)[0]))
    line = to_json(packet)
    assert "\n" not in line
    parsed = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert parsed["diaSourceId"] == parsed["diaSource"]["diaSourceId"] == "170587115523932323"
    assert parsed["diaSource"]["visit"] == 2026112200001
    assert parsed["diaSource"]["psfFlux"] is None
    assert parsed["diaSource"]["x"] is None
    assert parsed["cutoutDifference"] == {"bytes": 3}
    assert parsed["cutoutScience"] is None
    assert "cutoutDifference" not in json.loads(to_json(packet, cutout_sizes=False))


def test_json_writes_times_of_the_orbit_as_iso() -> None:
    lsst = LSST_SCHEMAS.get_by_version("11.0")
    batch = random_batch(1, np.random.default_rng(13), longest=0)
    packet = expected_packet("11.0", batch, 0)
    packet["mpc_orbits"] = {
        "id": 7,
        "designation": "2026 AB",
        "packed_primary_provisional_designation": "K26A00B",
        "unpacked_primary_provisional_designation": "2026 AB",
        "created_at": 1_764_000_000_000_001,
    }
    orbit = json.loads(to_json(decode_packet(wrap(1100, lsst.serialize(packet)))))["mpc_orbits"]
    assert orbit["created_at"] == "2025-11-24T16:00:00.000001+00:00"
    assert orbit["id"] == 7

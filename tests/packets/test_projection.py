"""Wanted fields straight to columns: the values that fastavro reads, and errors where it finds the bytes broken."""

from __future__ import annotations

import io
import json
import mmap
import tracemalloc
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_alerts import random_batch
from written_packets import long_bytes, random_value, written

from schemas.avro.encoding import encode_packets
from schemas.avro.projection import project, split_bodies
from schemas.avro.reading import decode_body
from schemas.avro.schema_versions import ARCHIVED_VERSIONS, VERSIONS, lsst_schema_by_id, schema_id_of, writer_schema
from schemas.avro.wire import PacketFormatError

SEEDS = st.integers(0, 2**32 - 1)
SCHEMAS = {version: lsst_schema_by_id(schema_id_of(version)) for version in (*ARCHIVED_VERSIONS, *VERSIONS)}
# As Fink's: null is the last branch, items may be null, maps lie between.
FINK = writer_schema(
    json.dumps(
        {
            "type": "record",
            "name": "fink",
            "fields": [
                {"name": "objectId", "type": ["string", "null"]},
                {"name": "when", "type": [{"type": "long", "logicalType": "timestamp-micros"}, "null"]},
                {"name": "kind", "type": {"type": "enum", "name": "kind", "symbols": ["a", "b", "c"]}},
                {"name": "hash", "type": [{"type": "fixed", "name": "hash", "size": 5}, "null"]},
                {"name": "features", "type": [{"type": "map", "values": ["double", "null"]}, "null"]},
                {"name": "deep", "type": {"type": "array", "items": {"type": "array", "items": "int"}}},
                {
                    "name": "prv",
                    "type": [
                        {
                            "type": "array",
                            "items": [
                                {
                                    "type": "record",
                                    "name": "row",
                                    "fields": [
                                        {"name": "jd", "type": ["double", "null"]},
                                        {"name": "fid", "type": "int"},
                                        {"name": "band", "type": ["null", "string"]},
                                        {"name": "flag", "type": ["boolean", "null"]},
                                        {"name": "inner", "type": {"type": "array", "items": "long"}},
                                    ],
                                },
                                "null",
                            ],
                        },
                        "null",
                    ],
                },
                {"name": "latest", "type": ["row", "null"]},
                {"name": "stamp", "type": ["null", "bytes"]},
            ],
        }
    )
)
FINK_COLUMNS = (
    "objectId", "when", "prv.jd", "prv.fid", "prv.band", "prv.flag", "latest.band", "latest.jd", "stamp",
)  # fmt: skip
# What we refuse and fastavro makes something of: integers beyond their bits, branches, symbols and sizes below 0,
# blocks whose items do not fill the size that they say.
STRICTER = ("of more than", "no such branch", "no such symbol", "another size", "a length below 0")


def _leaves(schema: Any) -> list[str]:
    """Paths of all numbers and texts outside lists in lists."""
    packet = random_value(schema.parsed, np.random.default_rng(0), {}, longest=0)
    found = []
    named: dict[str, Any] = {}

    def walk(node: Any, path: str, in_list: bool) -> None:
        if isinstance(node, dict) and "name" in node and node["type"] == "record":
            named[node["name"]] = node
        node = named.get(node, node) if isinstance(node, str) else node
        if isinstance(node, list):
            for branch in node:
                if branch != "null":
                    walk(branch, path, in_list)
        elif isinstance(node, dict) and node["type"] == "record":
            for field in node["fields"]:
                walk(field["type"], f"{path}.{field['name']}".lstrip("."), in_list)
        elif isinstance(node, dict) and node["type"] == "array":
            if not in_list:
                walk(node["items"], path, True)
        elif isinstance(node, str) or node["type"] == "long":
            found.append(path)

    walk(schema.parsed, "", False)
    assert packet
    return found


LEAVES = {label: _leaves(schema) for label, schema in SCHEMAS.items()}
# Early and late ones, of every record and list.
SOME = {label: tuple(paths[::7]) for label, paths in LEAVES.items()}


def _picked(packet: Any, columns: tuple[str, ...]) -> Any:
    """What a projection of the packet must hold."""
    if packet is None:
        return None
    if isinstance(packet, list):
        return [_picked(one, columns) for one in packet]
    tree: dict[str, list[str]] = {}
    for path in columns:
        name, _, below = path.partition(".")
        tree.setdefault(name, []).append(below)
    return {
        name: packet[name] if below == [""] else _picked(packet[name], tuple(below))
        for name, below in sorted(tree.items(), key=lambda one: list(packet).index(one[0]))
    }


def _plain(value: Any) -> str:
    """As text NaN equals NaN, 0.0 differs from -0.0 and every digit counts; times lose the name of their zone."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_plain(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return value.isoformat() if hasattr(value, "isoformat") else repr(value)


def _bodies(schema: Any, n: int, rng: np.random.Generator, *, blocks: bool = True) -> tuple[list[Any], list[bytes]]:
    packets = [random_value(schema.parsed, rng, {}) for _ in range(n)]
    return packets, [written(schema.parsed, packet, rng, {}, blocks=blocks) for packet in packets]


def _assert_values(schema: Any, bodies: list[bytes], packets: list[Any], columns: tuple[str, ...], whole: bool) -> None:
    table, errors = project(schema, bodies, columns, whole=whole)
    assert errors == [None] * len(bodies)
    table.validate(full=True)
    for row, packet in zip(table.to_pylist(), packets, strict=True):
        assert _plain(row) == _plain(_picked(packet, columns))


@pytest.mark.parametrize("version", [*ARCHIVED_VERSIONS, *VERSIONS])
@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, whole=st.booleans())
def test_columns_of_every_version_hold_what_was_written(version: str, seed: int, whole: bool) -> None:
    schema = SCHEMAS[version]
    packets, bodies = _bodies(schema, 3, np.random.default_rng(seed))
    for packet, body in zip(packets, bodies, strict=True):
        assert _plain(decode_body(schema, body)) == _plain(packet)  # the bytes are good
    _assert_values(schema, bodies, packets, tuple(LEAVES[version]), whole)
    _assert_values(schema, bodies, packets, SOME[version], whole)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, whole=st.booleans(), columns=st.sets(st.sampled_from(FINK_COLUMNS), min_size=1))
def test_columns_of_other_surveys_hold_what_was_written(seed: int, whole: bool, columns: set[str]) -> None:
    packets, bodies = _bodies(FINK, 4, np.random.default_rng(seed))
    _assert_values(FINK, bodies, packets, tuple(columns), whole)


def test_bodies_behind_each_other_are_told_apart() -> None:
    packets, bodies = _bodies(FINK, 2000, np.random.default_rng(3))
    ends = np.cumsum([len(body) for body in bodies]).tolist()
    joined = b"".join(bodies)
    assert split_bodies(FINK, joined, 2000) == (ends, None)
    found, error = split_bodies(FINK, joined + b"abc", 2000)
    assert found == ends and str(error) == "3 bytes behind the packets"
    found, error = split_bodies(FINK, joined[:-1], 2000)
    assert found == ends[:-1] and "it ends there" in str(error)
    found, error = split_bodies(FINK, joined, 2**62)
    assert found == ends and "it ends there" in str(error)
    assert len(packets) == 2000


def test_any_buffer_is_read_and_stays_as_it_is(tmp_path: Path) -> None:
    packets, bodies = _bodies(FINK, 5, np.random.default_rng(4))
    frozen = [memoryview(body) for body in bodies]
    _assert_values(FINK, frozen, packets, FINK_COLUMNS, True)
    _assert_values(FINK, [bytearray(body) for body in bodies], packets, FINK_COLUMNS, False)
    (tmp_path / "bodies").write_bytes(b"xyz".join(bodies))
    with (tmp_path / "bodies").open("rb") as stream:
        mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    starts = np.cumsum([0, *(len(body) + 3 for body in bodies)])
    pieces = [mapped[start : start + len(body)] for start, body in zip(starts, bodies, strict=False)]
    _assert_values(FINK, pieces, packets, FINK_COLUMNS, True)
    assert pieces == bodies


def test_no_bodies_give_no_rows() -> None:
    table, errors = project(FINK, [], FINK_COLUMNS)
    assert (table.num_rows, errors) == (0, [])


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("nothing", "has no column 'nothing'"),
        ("prv", "has no column 'prv'"),
        ("latest", "has no column 'latest'"),
        ("features", "has no column 'features'"),
        ("kind", "has no column 'kind'"),
        ("prv.inner", "has no column"),
        ("deep", "has no column 'deep'"),
    ],
)
def test_what_is_no_number_or_text_is_no_column(column: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        project(FINK, [], [column])


# ---- broken bytes


def _verdict(schema: Any, body: bytes) -> Any:
    try:
        return decode_body(schema, body)
    except PacketFormatError as error:
        return error


def _assert_judged(schema: Any, bodies: list[bytes], columns: tuple[str, ...]) -> tuple[int, int]:
    """Beside fastavro; numbers of bodies that both read, and that only fastavro did."""
    table, errors = project(schema, bodies, columns, whole=True)
    early, early_errors = project(schema, bodies, columns)
    table.validate(full=True)
    early.validate(full=True)
    n_both = n_stricter = 0
    for i, body in enumerate(bodies):
        verdict = _verdict(schema, body)
        if errors[i] is None:
            assert not isinstance(verdict, PacketFormatError), str(verdict)
            assert _plain(table.slice(i, 1).to_pylist()[0]) == _plain(_picked(verdict, columns))
            n_both += 1
        else:
            assert type(errors[i]) is PacketFormatError and ", at byte " in str(errors[i])
            if not isinstance(verdict, PacketFormatError):
                assert any(words in str(errors[i]) for words in STRICTER), str(errors[i])
                n_stricter += 1
        if early_errors[i] is None and errors[i] is None:
            assert early.slice(i, 1).equals(table.slice(i, 1)) or "nan" in str(early.slice(i, 1).to_pylist())
        assert errors[i] is not None or early_errors[i] is None  # the whole was fine, so is its beginning
    return n_both, n_stricter


@pytest.mark.parametrize("version", ["7.1", "9.0", "11.0", "11.1"])
def test_every_truncation_is_found_where_it_matters(version: str) -> None:
    schema, columns = SCHEMAS[version], SOME[version]
    _, (body,) = _bodies(schema, 1, np.random.default_rng(8))
    cut = [body[:length] for length in range(len(body))]
    _, errors = project(schema, cut, columns, whole=True)
    assert all(type(error) is PacketFormatError for error in errors)
    first = columns[:2]
    table, errors = project(schema, cut, first)
    n_lost = sum(error is not None for error in errors)
    assert 0 < n_lost < 60 and all(errors[:n_lost])  # the prefix is all that must be there
    whole = project(schema, [body], first).table
    assert all(table.slice(i, 1).equals(whole) for i in range(n_lost, len(cut)))
    assert all(set(row.values()) == {None} or not any(_flat(row)) for row in table.slice(0, n_lost).to_pylist())


def _flat(row: Any) -> list[Any]:
    return [one for value in row.values() for one in (_flat(value) if isinstance(value, dict) else [value])]


def test_bytes_behind_a_packet_are_found_in_the_whole_only() -> None:
    _, (body,) = _bodies(FINK, 1, np.random.default_rng(8))
    assert "bytes behind the packet, at byte" in str(project(FINK, [body + b"x"], ["objectId"], whole=True).errors[0])
    assert project(FINK, [body + b"x"], ["objectId"]).errors == [None]


def _mutated(body: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(body)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(damaged) + 1))
        kind = rng.integers(6)
        if kind <= 1 and place < len(damaged):
            damaged[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            damaged[place : place + 4] = rng.bytes(4)
        elif kind == 3:
            damaged[place:place] = long_bytes(int(rng.choice([-(2**62), -5, -1, 2**31, 2**62])))
        elif kind == 4:
            del damaged[place : place + int(rng.integers(1, 20))]
        else:
            del damaged[max(place, 1) :]
    return bytes(damaged) or b"\0"


def _fuzzed(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [(FINK, FINK_COLUMNS), *((SCHEMAS[version], SOME[version]) for version in ("7.1", "8.0", "9.0", "11.1"))]
    n_both = n_stricter = 0
    for schema, columns in groups:
        _, bodies = _bodies(schema, 20, rng, blocks=False)
        damaged = [_mutated(bodies[i % 20], rng) for i in range(n // len(groups))]
        both, stricter = _assert_judged(schema, damaged, columns)
        n_both += both
        n_stricter += stricter
    assert n_both > n // 50 and n_stricter < n // 10  # damage is neither always seen nor are we merely strict


def test_two_thousand_damaged_packets_are_judged_as_fastavro_does() -> None:
    _fuzzed(2000, 20261122)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_ten_times_ten_thousand_damaged_packets_are_judged_as_fastavro_does(seed: int) -> None:
    _fuzzed(10_000, seed)


def test_every_flipped_bit_of_a_packet_of_ours_is_judged_as_fastavro_does() -> None:
    schema = SCHEMAS["11.0"]
    batch = random_batch(1, np.random.default_rng(3), longest=1)
    (body,) = encode_packets(schema, batch)
    flipped = []
    for bit in range(0, 8 * len(body), 5):
        damaged = bytearray(body)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(damaged))
    _assert_judged(schema, flipped, SOME["11.0"])


@pytest.mark.parametrize(("wrote", "reads"), [("11.1", "11.0"), ("11.0", "11.1"), ("9.0", "11.0"), ("10.0", "7.1")])
def test_packets_read_by_another_schema_are_judged_as_fastavro_does(wrote: str, reads: str) -> None:
    _, bodies = _bodies(SCHEMAS[wrote], 40, np.random.default_rng(9), blocks=False)
    _assert_judged(SCHEMAS[reads], bodies, SOME[reads])


def test_a_broken_body_costs_only_itself() -> None:
    packets, bodies = _bodies(FINK, 50, np.random.default_rng(10))
    broken = list(range(0, 50, 3))
    for i in broken:
        bodies[i] = bodies[i][: len(bodies[i]) // 2]
    table, errors = project(FINK, bodies, FINK_COLUMNS, whole=True)
    assert [i for i, error in enumerate(errors) if error] == broken
    for i, row in enumerate(table.to_pylist()):
        assert _plain(row) == _plain(dict.fromkeys(row) if i in broken else _picked(packets[i], FINK_COLUMNS))


LISTS = writer_schema(
    json.dumps(
        {
            "type": "record",
            "name": "lists",
            "fields": [
                {
                    "name": "prv",
                    "type": {
                        "type": "array",
                        "items": {"type": "record", "name": "r", "fields": [{"name": "x", "type": "long"}]},
                    },
                }
            ],
        }
    )
)


@pytest.mark.parametrize("count", [2**62, 2**63 - 1, -(2**63), -(2**62), 10**6, -(10**6)])
@pytest.mark.parametrize("whole", [True, False])
def test_endless_counts_cost_neither_time_nor_memory(count: int, whole: bool) -> None:
    body = long_bytes(count) + long_bytes(900 if count < 0 else 2) + bytes(1000)
    project(LISTS, [body], ["prv.x"], whole=whole)
    tracemalloc.start()
    (error,) = project(LISTS, [body], ["prv.x"], whole=whole).errors
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error is not None and peak < 1_000_000


def test_a_sized_block_is_stepped_over_where_nobody_wants_what_is_in_it() -> None:
    after = {"name": "after", "type": "long"}
    avro = json.loads(LISTS.text)
    schema = writer_schema(json.dumps(avro | {"fields": [*avro["fields"], after]}))
    garbage = b"\xff" * 30
    body = long_bytes(-1) + long_bytes(30) + garbage + b"\0" + long_bytes(7)
    assert project(schema, [body], ["after"]).table["after"].to_pylist() == [7]
    assert "64 bits" in str(project(schema, [body], ["after"], whole=True).errors[0])
    wrong_size = long_bytes(-1) + long_bytes(2) + long_bytes(5) + b"\0" + b"\0" + long_bytes(7)
    assert "another size than it says" in str(project(schema, [wrong_size], ["prv.x"]).errors[0])


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_texts_are_utf8_as_python_has_it(text: bytes) -> None:
    schema = FINK
    body = long_bytes(0) + long_bytes(len(text)) + text
    table, (error,) = project(schema, [body], ["objectId"])
    try:
        assert error is None and table["objectId"].to_pylist() == [text.decode()] if _decodes(text) else error
    except UnicodeDecodeError:
        raise AssertionError(text) from None


def _decodes(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_every_short_sequence_of_critical_bytes_is_utf8_as_python_has_it() -> None:
    """All triples, and four bytes behind each lead of four, of the bytes where the rules change."""
    edges = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF]
    edges += [0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    texts = [bytes([a, b, c]) for a in edges for b in edges for c in edges]
    texts += [bytes([a, b, c, d]) for a in (0xF0, 0xF1, 0xF4) for b in edges for c in (0x80, 0xBF) for d in edges]
    bodies = [long_bytes(0) + long_bytes(len(text)) + text for text in texts]
    errors = project(FINK, bodies, ["objectId"]).errors
    assert [error is None for error in errors] == [_decodes(text) for text in texts]


def test_fastavro_is_as_lenient_as_the_list_of_what_we_refuse_says() -> None:
    """A reader that changes here makes the list too long."""
    read = [
        ("int", b"\xff\xff\xff\xff\xff\x01"),
        ("long", b"\xff" * 12 + b"\x01"),
        (["null", "long"], b"\x03"),
        ({"type": "array", "items": "long"}, b"\x01\x12\x02\x00"),
    ]
    for schema, content in read:
        fastavro.schemaless_reader(io.BytesIO(content), fastavro.parse_schema(schema), None)

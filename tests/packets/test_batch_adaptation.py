"""Batches of archived packets as columns: the same as packet by packet through dicts, table and refusals alike."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adaptation import ALL_COLUMNS, _valid_batch
from written_packets import random_value, written

from schemas.avro import batch_adaptation
from schemas.avro.adaptation import AdaptedPacket, adapt_packet, adapted_table
from schemas.avro.batch_adaptation import AdaptedBatch, adapt_packets
from schemas.avro.container import block_bytes, container_blocks, container_header
from schemas.avro.encoding import encode_packets
from schemas.avro.messages import Packet, packet_of, schema_of_container
from schemas.avro.projection import split_bodies
from schemas.avro.reading import decode_body
from schemas.avro.schema_versions import (
    ARCHIVED_VERSIONS,
    VERSIONS,
    lsst_schema_by_id,
    packet_schema,
    schema_id_of,
    writer_schema,
)
from schemas.avro.wire import PacketFormatError

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}")
FEW = frozenset({"diaSource.snr", "diaObject.nDiaSources", "prvDiaSources.psfFlux", "ssSource.ephOffset"})


def _one_by_one(packets: list[Packet], columns: frozenset[str]) -> tuple[list[Any], pa.Table]:
    """Heads or refusals, and the table, by way of dicts."""
    heads: list[Any] = []
    records = []
    for packet in packets:
        try:
            adapted = adapt_packet(decode_body(packet.schema, packet.body))
            adapted_table([adapted.record], columns)
            heads.append(adapted)
            records.append(adapted.record)
        except PacketFormatError as error:
            heads.append(error)
    return heads, adapted_table(records, columns)


def _assert_same(packets: list[Packet], columns: frozenset[str]) -> AdaptedBatch:
    heads, table = _one_by_one(packets, columns)
    batch = adapt_packets(packets, columns)
    assert [isinstance(one, PacketFormatError) for one in batch.heads] == [
        isinstance(one, PacketFormatError) for one in heads
    ]
    for ours, expected in zip(batch.heads, heads, strict=True):
        if isinstance(expected, AdaptedPacket):
            for name in type(ours).__dataclass_fields__:
                value = getattr(ours, name)
                assert (value, type(value)) == (getattr(expected, name), type(getattr(expected, name)))
        elif not str(expected).startswith("broken"):  # of broken bytes ours say where
            assert str(ours) == str(expected)
    usable = [i for i, one in enumerate(heads) if isinstance(one, AdaptedPacket)]
    assert batch.rows.tolist() == usable
    assert batch.is_moving.tolist() == [heads[i].record["ssSource"] is not None for i in usable]
    assert batch.table.schema == table.schema
    batch.table.validate(full=True)
    for name in table.schema.names:
        # As text NaN equals NaN, 0.0 differs from -0.0, and every digit counts.
        for ours, expected in zip(batch.table[name].to_pylist(), table[name].to_pylist(), strict=True):
            assert repr(ours) == repr(expected), name
    return batch


def _columnar_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a packet went through dicts")

    monkeypatch.setattr(batch_adaptation, "decode_body", refuse)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 6))
def test_random_packets_of_ours_give_the_same_both_ways(version: str, seed: int, n: int) -> None:
    schema = packet_schema(version)
    packets = [Packet(schema, body) for body in encode_packets(schema, _valid_batch(n, seed))]
    _assert_same(packets, ALL_COLUMNS)


# ---- every sample of the shared data


def _sample_files() -> list[Path]:
    return [
        *sorted((DATA / "lsst_alert_samples").glob("*/*.avro")),
        *sorted((DATA / "rubin_alerts").glob("*.avro")),
        *sorted((DATA / "rubin_alerts" / "wire_messages").glob("*.avro")),
        *sorted((DATA / "ztf_alerts" / "packets").glob("*")),
    ]


def packets_of_file(path: Path) -> list[Packet]:
    if path.suffix == ".tar":
        with tarfile.open(path) as members:
            streams = [members.extractfile(member) for member in members if member.isfile()]
            return [packet for stream in streams if stream for packet in _packets(stream.read())]
    return list(_packets(path.read_bytes()))


def _packets(content: bytes) -> Iterator[Packet]:
    if content[:3] != b"Obj":
        yield packet_of(content)
        return
    header = container_header(content)
    schema = schema_of_container(header.schema_text)
    for block in container_blocks(content, header):
        bodies = block_bytes(block, header.codec)
        ends, error = split_bodies(schema, bodies, block.n_packets)
        assert error is None
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            yield Packet(schema, bodies[start:end])


@needs_data
@pytest.mark.parametrize("path", _sample_files(), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_sample_gives_the_same_both_ways(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packets = packets_of_file(path)
    assert packets
    _assert_same(packets, ALL_COLUMNS)
    _assert_same(packets[:5], FEW)
    if "rubin" in str(path):
        _columnar_only(monkeypatch)
        assert not any(isinstance(head, PacketFormatError) for head in adapt_packets(packets, ALL_COLUMNS).heads)


# ---- random packets of every version, with everything that can be out of the ordinary


def _random_packets(schema: Any, n: int, rng: np.random.Generator, *, odd: float) -> list[Packet]:
    """Random values everywhere; those that every packet must have are usable but for a share of `odd` each."""

    def usually(record: dict[str, Any], **values: Any) -> None:
        record.update({name: value for name, value in values.items() if name in record and rng.random() >= odd})

    packets = []
    for k in range(n):
        packet = random_value(schema.parsed, rng, {})
        while packet["diaSource"] is None:
            packet = random_value(schema.parsed, rng, {})
        place = {"ra": float(rng.uniform(0.0, 360.0)), "dec": float(rng.uniform(-90.0, 90.0))}
        some_time = lambda: float(rng.choice([60_000.0, 60_000.5, rng.uniform(50_000.0, 70_000.0)]))  # noqa: E731
        for record in filter(None, (packet["diaSource"], *(packet["prvDiaSources"] or []))):
            usually(
                record, diaSourceId=k + 1, visit=5, detector=7, midpointMjdTai=some_time(), band="r", exposureTime=30.0,
                diaObjectId=int(rng.integers(0, 3)), ssObjectId=int(rng.integers(0, 3)), **place,
            )  # fmt: skip
        for name in ("prvDiaSources", "prvDiaForcedSources"):
            if packet[name] and rng.random() >= odd:  # Fink's items may be null
                packet[name] = [row for row in packet[name] if row is not None]
        for point in filter(None, packet["prvDiaForcedSources"] or []):
            near = {name: value + rng.choice([0.0, 0.05, 0.2]) for name, value in place.items()}
            usually(point, diaForcedSourceId=int(rng.integers(0, 9)), midpointMjdTai=some_time(), **near)
        for name in ("diaObject", "ssSource"):
            if packet.get(name) is not None:
                if rng.random() < 0.2 and "null" in _type_of(schema, name, "ra"):
                    packet[name] = dict.fromkeys(packet[name])
                usually(packet[name], diaObjectId=int(rng.integers(0, 3)), ssObjectId=int(rng.integers(1, 3)))
                for field, value in packet[name].items():
                    if isinstance(value, float) and rng.random() >= odd / 5:
                        packet[name][field] = float(rng.normal())
        packets.append(Packet(schema, written(schema.parsed, packet, rng, {})))
    return packets


def _type_of(schema: Any, record: str, name: str) -> Any:
    (node,) = [field["type"] for field in schema.parsed["fields"] if field["name"] == record]
    node = next(one for one in node if one != "null") if isinstance(node, list) else node
    return next((field["type"] for field in node["fields"] if field["name"] == name), "")


@pytest.mark.parametrize("version", [*ARCHIVED_VERSIONS, *VERSIONS])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), odd=st.sampled_from([0.0, 0.02, 0.1]))
def test_random_packets_of_every_version_give_the_same_both_ways(version: str, seed: int, odd: float) -> None:
    schema = lsst_schema_by_id(schema_id_of(version))
    packets = _random_packets(schema, 8, np.random.default_rng(seed), odd=odd)
    _assert_same(packets, ALL_COLUMNS)
    _assert_same(packets, FEW)


def _fink(name: str) -> Any:
    return schema_of_container(container_header((DATA / "rubin_alerts" / name).read_bytes()).schema_text)


@needs_data
@pytest.mark.parametrize("name", sorted(path.name for path in (DATA / "rubin_alerts").glob("*fink*.avro")))
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), odd=st.sampled_from([0.0, 0.02, 0.1]))
def test_random_packets_in_finks_schemas_give_the_same_both_ways(name: str, seed: int, odd: float) -> None:
    schema = _fink(name)
    _assert_same(_random_packets(schema, 8, np.random.default_rng(seed), odd=odd), ALL_COLUMNS)


def test_packets_of_several_schemas_come_back_in_their_order() -> None:
    rng = np.random.default_rng(5)
    packets = [
        packet
        for version in (*ARCHIVED_VERSIONS, *VERSIONS)
        for packet in _random_packets(lsst_schema_by_id(schema_id_of(version)), 6, rng, odd=0.02)
    ]
    mixed = [packets[k] for k in rng.permutation(len(packets))]
    batch = _assert_same(mixed, ALL_COLUMNS)
    assert len(batch.rows) > len(packets) // 2
    assert adapt_packets([], FEW).table.num_rows == 0


def test_packets_of_ours_never_go_through_dicts(monkeypatch: pytest.MonkeyPatch) -> None:
    _columnar_only(monkeypatch)
    for version in VERSIONS:
        schema = packet_schema(version)
        packets = [Packet(schema, body) for body in encode_packets(schema, _valid_batch(5, 3))]
        assert adapt_packets(packets, ALL_COLUMNS).rows.tolist() == list(range(5))


def test_a_broken_packet_is_told_with_its_byte_and_costs_only_itself() -> None:
    schema = packet_schema("11.0")
    packets = [Packet(schema, body) for body in encode_packets(schema, _valid_batch(4, 3))]
    packets[1] = Packet(schema, packets[1].body[:100])
    batch = adapt_packets(packets, ALL_COLUMNS)
    assert batch.rows.tolist() == [0, 2, 3]
    assert re.fullmatch(r"broken v11\.0 packet of 100 bytes: it ends there, at byte (9\d|100)", str(batch.heads[1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"diaSource": "string"}, "diaSource is no record"),
        ({"diaSource": {"type": "array", "items": "diaSource"}}, "diaSource is no record"),
        ({"prvDiaSources": "diaSource"}, "prvDiaSources is no list"),
        ({"prvDiaSources": {"type": "array", "items": "long"}}, r"prvDiaSources\[0\] is no record"),
        ({"ssSource": "double"}, "ssSource is no record"),
        ({"diaObject": {"type": "map", "values": "long"}}, "diaObject has no diaObjectId"),
    ],
)
def test_schemas_of_other_shapes_are_refused_as_by_dicts(change: dict[str, Any], words: str) -> None:
    source = {"type": "record", "name": "diaSource", "fields": [{"name": "ra", "type": "double"}]}
    shapes: dict[str, Any] = {"first": source, **change}
    fields = [{"name": name, "type": kind} for name, kind in shapes.items()]
    if "diaSource" not in change:
        required = {
            "diaSourceId": "long", "visit": "long", "detector": "int", "ra": "double", "dec": "double",
            "midpointMjdTai": "double", "band": "string",
        }  # fmt: skip
        whole = [{"name": name, "type": kind} for name, kind in required.items()]
        fields.append({"name": "diaSource", "type": {"type": "record", "name": "whole", "fields": whole}})
    schema = writer_schema(json.dumps({"type": "record", "name": "odd", "fields": fields}))
    rng = np.random.default_rng(1)
    for _ in range(30):
        packet = random_value(schema.parsed, rng, {})
        if [] in packet.values() or {} in packet.values():
            continue
        if "diaSource" not in change:
            packet["diaSource"] |= {
                "diaSourceId": 1, "visit": 2, "detector": 3, "ra": 4.0, "dec": 5.0, "midpointMjdTai": 6e4, "band": "r",
            }  # fmt: skip
        body = written(schema.parsed, packet, rng, {})
        (head,) = _assert_same([Packet(schema, body)], ALL_COLUMNS).heads
        assert re.search(words, str(head))

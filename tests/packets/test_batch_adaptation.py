"""Batches of archived packets as columns: the same as packet by packet through dicts, table and refusals alike."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adaptation import ALL_COLUMNS, _valid_batch

from schemas.avro import batch_adaptation
from schemas.avro.adaptation import AdaptedPacket, adapt_packet, adapted_table
from schemas.avro.batch_adaptation import AdaptedBatch, adapt_packets
from schemas.avro.container import block_bytes, container_blocks, container_header
from schemas.avro.encoding import encode_packets
from schemas.avro.messages import Packet, packet_of, schema_of_container
from schemas.avro.projection import split_bodies
from schemas.avro.reading import decode_body
from schemas.avro.schema_versions import VERSIONS, packet_schema
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

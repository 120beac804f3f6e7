"""Packets read by Apache's own Avro library: the same values, histories in blocks with or without their length."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from lsst.alert.packet import SchemaRegistry
from sample_alerts import expected_packet, random_batch

from schemas.avro.encoding import encode_packets
from schemas.avro.schema_versions import VERSIONS, packet_schema

avro_io = pytest.importorskip("avro.io", reason="of requirements-oracles.txt")
avro_schema = pytest.importorskip("avro.schema")


def _comparable(value: Any) -> Any:
    """NaN as text, so that it equals itself."""
    if isinstance(value, dict):
        return {name: _comparable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("sized_blocks", [False, True])
def test_apaches_avro_reads_the_same_values(version: str, sized_blocks: bool) -> None:
    definition = SchemaRegistry.all_schemas_from_filesystem().get_by_version(version).definition
    plain = {key: value for key, value in definition.items() if not key.startswith("__")}
    reader = avro_io.DatumReader(avro_schema.parse(json.dumps(plain)))
    batch = random_batch(8, np.random.default_rng(12))
    assert len(batch.prv_dia_sources) and len(batch.prv_forced)
    bodies = encode_packets(packet_schema(version), batch, sized_blocks=sized_blocks)
    for i, body in enumerate(bodies):
        stream = io.BytesIO(body)
        found = reader.read(avro_io.BinaryDecoder(stream))
        assert _comparable(found) == _comparable(expected_packet(version, batch, i))
        assert stream.tell() == len(body)

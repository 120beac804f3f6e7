"""Replayed packets and the columns that filters ask for."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro

from schemas.avro.messages import Packet
from schemas.avro.schema_versions import writer_schema
from transforms.replaying import _StoredPacket, adapted_packets

VISIT, DETECTOR = 17, 4
COLUMNS = frozenset({"diaObject.nDiaSources"})


def _stored(dia_source_id: int, n_dia_sources: Any, **changes: Any) -> _StoredPacket:
    kinds = {
        "diaSource": {
            "diaSourceId": "long", "visit": "long", "detector": "int", "ra": "double", "dec": "double",
            "midpointMjdTai": "double", "band": "string",
        },
        "diaObject": {"diaObjectId": "long", "nDiaSources": ["null", "double" if n_dia_sources == 2.5 else "long"]},
    }  # fmt: skip
    fields = [
        {
            "name": name,
            "type": {"type": "record", "name": name, "fields": [{"name": k, "type": v} for k, v in of.items()]},
        }
        for name, of in kinds.items()
    ]
    schema = writer_schema(json.dumps({"type": "record", "name": "broker.alert", "fields": fields}))
    source = {
        "diaSourceId": dia_source_id, "visit": VISIT, "detector": DETECTOR, "ra": 10.0, "dec": -20.0,
        "midpointMjdTai": 61367.1, "band": "r",
    } | changes  # fmt: skip
    body = io.BytesIO()
    packet = {"diaSource": source, "diaObject": {"diaObjectId": 9, "nDiaSources": n_dia_sources}}
    fastavro.schemaless_writer(body, schema.parsed, packet)
    return _StoredPacket(dia_source_id, "night.avro", b"message %d" % dia_source_id, Packet(schema, body.getvalue()))


def test_packets_that_fit_go_on_with_their_columns() -> None:
    packets, failures = adapted_packets(VISIT, DETECTOR, [_stored(1, 2), _stored(2, None)], COLUMNS)
    assert [head.dia_source_id for head in packets.heads] == [1, 2] and failures == []
    assert packets.table["diaObject"].to_pylist() == [{"nDiaSources": 2}, {"nDiaSources": None}]
    assert packets.messages == [b"message 1", b"message 2"]


def test_packets_that_do_not_fit_or_are_others_are_lost_alone() -> None:
    stored = [_stored(1, 2), _stored(2, 2.5), _stored(3, 4), _stored(4, 2**31), _stored(5, 5, visit=18)]
    packets, failures = adapted_packets(VISIT, DETECTOR, stored, COLUMNS)
    assert [head.dia_source_id for head in packets.heads] == [1, 3]
    assert [row["nDiaSources"] for row in packets.table["diaObject"].to_pylist()] == [2, 4]
    assert packets.messages == [b"message 1", b"message 3"]
    assert {(one.visit, one.detector, one.stage) for one in failures} == {(VISIT, DETECTOR, "replaying")}
    assert [one.lost for one in failures] == ["packet 2", "packet 4", "packet 5"]
    for failure, words in zip(failures, ("is no int32: 2.5", "is no int32: 2147483648", "has changed"), strict=True):
        assert words in failure.reason

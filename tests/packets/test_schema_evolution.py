"""Readers of one version read packets of another: what it lacks is null, what they do not know is passed over."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_alerts import expected_packet, random_batch, same_values

from schemas.avro.adaptation import adapt_packet
from schemas.avro.container import container_bytes
from schemas.avro.messages import packet_of
from schemas.avro.reading import decode_body, decode_packet
from schemas.avro.schema_versions import packet_schema, writer_schema
from schemas.avro.wire import PacketFormatError, wrap

GOLDEN = Path(__file__).parents[1] / "golden" / "packets" / "v11.1.bin"
SEEDS = st.integers(0, 2**32 - 1)
# Of 11.1, in the record diaSource; 11.2 is made up.
ADDED = {
    "11.1": ("exposureTime", "trailAlgorithm", "trail_flag", "reliabilityVersion"),
    "11.2": ("madeUpFlux", "madeUpName"),
}


def schema_of(version: str) -> Any:
    """The schema as fastavro keeps it."""
    return packet_schema(version).parsed if version != "11.2" else fastavro.parse_schema(made_up_schema())


def made_up_schema() -> dict[str, Any]:
    """11.2: a nullable field more in the middle of diaSource and one at its end."""
    avro: dict[str, Any] = json.loads(packet_schema("11.1").json_text(docs=False).replace("lsst.v11_1.", "lsst.v11_2."))
    (fields,) = (field["type"]["fields"] for field in avro["fields"] if field["name"] == "diaSource")
    flux, name = ADDED["11.2"]
    fields.insert(10, {"name": flux, "type": ["null", "float"], "default": None})
    fields.append({"name": name, "type": ["null", "string"], "default": None})
    return avro


def with_added(packet: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The packet with these values in every diaSource."""
    sources = packet["prvDiaSources"]
    return {
        **packet,
        "diaSource": {**packet["diaSource"], **values},
        "prvDiaSources": sources and [{**one, **values} for one in sources],
    }


def in_order(packet: dict[str, Any], version: str) -> dict[str, Any]:
    """The packet with the fields of diaSource in the order of a version, and only those it has."""
    (fields,) = (field["type"]["fields"] for field in schema_of(version)["fields"] if field["name"] == "diaSource")
    names = [field["name"] for field in fields]

    def ordered(source: dict[str, Any]) -> dict[str, Any]:
        return {name: source[name] for name in names}

    sources = packet["prvDiaSources"]
    return {
        **packet,
        "diaSource": ordered(packet["diaSource"]),
        "prvDiaSources": sources and [ordered(one) for one in sources],
    }


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("11.0", "11.1"), ("11.1", "11.0"), ("11.2", "11.1"), ("11.1", "11.2"), ("11.2", "11.0"), ("11.0", "11.2")],
)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_each_version_is_resolved_to_each_other(writer: str, reader: str, seed: int) -> None:
    batch = random_batch(3, np.random.default_rng(seed))
    for i in range(3):
        known = "11.0" if writer == "11.0" else "11.1"
        packet = expected_packet(known, batch, i)
        if writer == "11.2":
            packet = in_order(with_added(packet, dict(zip(ADDED["11.2"], (1.5, "λ"), strict=True))), "11.2")
        body = io.BytesIO()
        fastavro.schemaless_writer(body, schema_of(writer), packet)
        body.seek(0)
        found = fastavro.schemaless_reader(body, schema_of(writer), schema_of(reader))
        unknown = [name for version, names in ADDED.items() if writer < version <= reader for name in names]
        assert same_values(in_order(found, reader), in_order(with_added(packet, dict.fromkeys(unknown)), reader))
        assert body.read() == b""


def test_containers_of_a_version_to_come_are_read_by_the_schema_they_bring() -> None:
    """What filters ask for is there; a wire message of it is refused, as its id says nothing yet."""
    packet = decode_packet(GOLDEN.read_bytes())
    packet |= {"diaObject": None, "prvDiaSources": None, "prvDiaForcedSources": None}
    packet["diaSource"] |= {"ra": 150.25, "dec": -2.5, "midpointMjdTai": 61367.1, "band": "r"}
    newer = io.BytesIO()
    fastavro.schemaless_writer(newer, schema_of("11.2"), packet)
    container = container_bytes(writer_schema(json.dumps(made_up_schema())), [newer.getvalue()])
    schema, found = packet_of(container)
    assert schema.label == "lsst.v11_2.alert"
    assert same_values(adapt_packet(decode_body(schema, found)).record, adapt_packet(packet).record)
    with pytest.raises(PacketFormatError, match=r"unknown schema id 1102, known are .*1101"):
        decode_packet(wrap(1102, newer.getvalue()))

"""What is sent, read by the software that brokers read with: each in the encodings that it accepts.

LSST's client, stock fastavro, Apache's avro, Confluent's deserializer against the project's registry, Fink's consumer.
"""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import fastavro
import numpy as np
import pytest
from lsst.alert.packet import SchemaRegistry
from registry_server import running_registry
from sample_alerts import expected_packet, random_batch, same_values

from runners.kafka import EmbeddedKafka, KafkaAlertSink
from schemas.avro.encoding import encode_packets
from schemas.avro.messages import Packet, encoded, message_headers, record_key, wire_message
from schemas.avro.schema_versions import VERSIONS, packet_schema, schema_id_of

N_PACKETS = 60
HEADER_BYTES = 5
PATIENCE_S = 30.0


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sent(version: str) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Packets of every kind as wire messages, and the values they hold."""
    batch = random_batch(N_PACKETS, np.random.default_rng(20261123))
    batch.dia_sources["diaSourceId"] = 2**62 + np.arange(N_PACKETS)
    batch.dia_objects["nDiaSources"] = 1
    for stamps in batch.cutouts:
        stamps[::4] = [None] * len(stamps[::4])  # type: ignore[index]
    schema = packet_schema(version)
    messages = [wire_message(Packet(schema, body)) for body in encode_packets(schema, batch)]
    packets = [expected_packet(version, batch, i) for i in range(N_PACKETS)]
    for there_is in (
        lambda packet: packet["diaObject"] and packet["prvDiaSources"] is None,  # the first detection
        lambda packet: packet["prvDiaSources"] and packet["prvDiaForcedSources"],
        lambda packet: packet["ssSource"] and packet["mpc_orbits"],
        lambda packet: not any(packet[name] for name in packet if name.startswith("cutout")),
        lambda packet: all(packet[name] for name in packet if name.startswith("cutout")),
    ):
        assert any(map(there_is, packets))
    return messages, packets


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    with running_registry() as url:
        yield url


@pytest.fixture(scope="module")
def kafka() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka() as cluster:
        yield cluster


def in_order(found: list[dict[str, Any]], packets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What came from a topic, in the order in which it was sent; everything once."""
    by_id = {packet["diaSourceId"]: packet for packet in found}
    assert len(found) == len(packets) == len(by_id)
    return [by_id[packet["diaSourceId"]] for packet in packets]


def send(kafka: EmbeddedKafka, topic: str, encoding: str, messages: list[bytes]) -> None:
    sink = KafkaAlertSink(kafka.bootstrap)
    for message in messages:
        value = encoded(encoding, message)
        sink.send(topic, record_key(encoding, message, "1"), value, message_headers(value))
    sink.flush(10)


def test_lssts_client_reads_wire_messages_and_containers(sent: Any, version: str) -> None:
    messages, packets = sent
    schemas = SchemaRegistry.all_schemas_from_filesystem()
    for message, packet in zip(messages, packets, strict=True):
        schema = schemas.get_by_id(int.from_bytes(message[1:HEADER_BYTES], "big"))
        assert same_values(schema.deserialize(message[HEADER_BYTES:]), packet)
        _, found = schema.retrieve_alerts(io.BytesIO(encoded("ocf", message)))
        assert same_values(list(found), [packet])


def test_stock_fastavro_reads_all_three_given_what_comes_with_them(sent: Any, version: str, registry: str) -> None:
    messages, packets = sent
    with urllib.request.urlopen(f"{registry}/schemas/ids/{schema_id_of(version)}") as answer:
        told = fastavro.parse_schema(json.loads(json.load(answer)["schema"]))
    for message, packet in zip(messages, packets, strict=True):
        key = fastavro.parse_schema(json.loads(record_key("fink", message, "1")))
        bodies = ((message[HEADER_BYTES:], told), (encoded("fink", message), key))
        for body, schema in bodies:
            assert same_values(fastavro.schemaless_reader(io.BytesIO(body), schema, None), packet)
        assert same_values(list(fastavro.reader(io.BytesIO(encoded("ocf", message)))), [packet])


def test_apache_avro_reads_all_three(sent: Any, version: str) -> None:
    avro_schema = pytest.importorskip("avro.schema", exc_type=ImportError)
    datafile, avro_io = pytest.importorskip("avro.datafile"), pytest.importorskip("avro.io")
    messages, packets = sent
    reader = avro_io.DatumReader(avro_schema.parse(record_key("fink", messages[0], "1").decode()))
    described = avro_io.DatumReader(avro_schema.parse(packet_schema(version).json_text(docs=True)))
    for message, packet in zip(messages, packets, strict=True):
        assert same_values(reader.read(avro_io.BinaryDecoder(io.BytesIO(encoded("fink", message)))), packet)
        assert same_values(described.read(avro_io.BinaryDecoder(io.BytesIO(message[HEADER_BYTES:]))), packet)
        with datafile.DataFileReader(io.BytesIO(encoded("ocf", message)), avro_io.DatumReader()) as container:
            assert same_values(list(container), [packet])


def test_confluents_consumer_reads_wire_messages_by_the_projects_registry(
    sent: Any, version: str, registry: str, kafka: EmbeddedKafka
) -> None:
    client = pytest.importorskip("confluent_kafka.schema_registry", exc_type=ImportError)
    avro = pytest.importorskip("confluent_kafka.schema_registry.avro", exc_type=ImportError)
    from confluent_kafka import Consumer
    from confluent_kafka.serialization import MessageField, SerializationContext

    messages, packets = sent
    topic = f"lsst-alerts-v11-{version}"
    send(kafka, topic, "rubin", messages)
    decode = avro.AvroDeserializer(client.SchemaRegistryClient({"url": registry}))
    consumer = Consumer(
        {"bootstrap.servers": kafka.bootstrap, "group.id": f"lasair-{version}", "auto.offset.reset": "earliest"}
    )
    found = []
    try:
        consumer.subscribe([topic])
        for message in consumer.consume(N_PACKETS, PATIENCE_S):
            assert message.error() is None
            found.append(decode(message.value(), SerializationContext(topic, MessageField.VALUE)))
    finally:
        consumer.close()
    assert same_values(in_order(found, packets), packets)
    text = packet_schema("11.1").json_text(docs=False)
    to_newest = avro.AvroDeserializer(client.SchemaRegistryClient({"url": registry}), text)
    source = to_newest(messages[0], SerializationContext(topic, MessageField.VALUE))["diaSource"]
    lacking = source.keys() - packets[0]["diaSource"].keys()
    assert len(lacking) == (4 if version == "11.0" else 0) and {source[name] for name in lacking} <= {None}


def test_confluents_serializer_is_told_that_nothing_can_be_registered(registry: str) -> None:
    client = pytest.importorskip("confluent_kafka.schema_registry", exc_type=ImportError)
    asked = client.SchemaRegistryClient({"url": registry})
    assert asked.get_subjects() == ["alert-packet", "lsst-alerts-v11-value"]
    assert asked.get_latest_version("lsst-alerts-v11-value").schema_id == schema_id_of(VERSIONS[-1])
    assert asked.get_version("alert-packet", 1100).schema_id == 1100
    with pytest.raises(client.SchemaRegistryError) as refusal:
        asked.register_schema("lsst-alerts-v11-value", client.Schema('"long"', "AVRO"))
    assert (refusal.value.http_status_code, refusal.value.error_code) == (422, 42205)


def test_finks_consumer_reads_bodies_by_their_keys(sent: Any, version: str, kafka: EmbeddedKafka) -> None:
    fink = pytest.importorskip("fink_client.consumer", exc_type=ImportError)
    messages, packets = sent
    topic = f"fink-{version}"
    send(kafka, topic, "fink", messages)
    settings = {"bootstrap.servers": kafka.bootstrap, "group.id": f"fink-{version}"}
    with fink.AlertConsumer([topic], settings, "lsst") as consumer:
        found = consumer.consume(N_PACKETS, PATIENCE_S)
    assert {told for told, _, _ in found} == {topic}
    assert same_values(in_order([packet for _, packet, _ in found], packets), packets)

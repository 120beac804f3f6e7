"""The checker of the crash campaign sees every kind of damage, in every encoding."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
from conftest import Run
from stream_checker import Record, archived_packets, check_streams, check_topic, expected_packets

from runners.configuration import load_brokers
from runners.kafka import EmbeddedKafka, KafkaAlertSink, dia_source_id_header
from schemas.avro.messages import Packet, container_message, record_key, wire_message
from schemas.avro.reading import packet_prefix

FULL_TOPICS = ("lsst-alerts-v11", "lsst-alerts-v11-ocf")
FILTER_TOPIC = "filter-demo-bright-new"


@pytest.fixture(scope="module")
def packets(first_run: Run) -> list[Packet]:
    return list(archived_packets(first_run.out / "archive" / "alerts"))


@pytest.fixture(params=["rubin", "ocf", "fink"])
def records(request: pytest.FixtureRequest, packets: list[Packet]) -> list[Record]:
    return [record(packet, request.param) for packet in packets]


@pytest.fixture
def truth(packets: list[Packet]) -> dict[int, bytes]:
    return {packet_prefix(one.body).dia_source_id: hashlib.sha256(one.body).digest() for one in packets}


def record(packet: Packet, encoding: str) -> Record:
    """The record of a packet, as it is sent."""
    number = str(packet_prefix(packet.body).dia_source_id)
    message = container_message(packet) if encoding == "ocf" else wire_message(packet)
    value = packet.body if encoding == "fink" else message
    return Record(record_key(encoding, message, number), value, number)


def changed(packet: Packet) -> Packet:
    """Another packet of the same id."""
    return Packet(packet.schema, packet.body[:-1] + bytes([packet.body[-1] ^ 1]))


def test_the_truth_in_any_order_is_good(records: list[Record], truth: dict[int, bytes]) -> None:
    report = check_topic(reversed(records), truth)
    assert report.is_good
    assert (report.expected, report.records, report.repeats) == (len(records), len(records), 0)


def test_a_record_left_out_is_lost(records: list[Record], truth: dict[int, bytes]) -> None:
    report = check_topic(records[1:], truth)
    assert not report.is_good
    assert report.lost == (int(records[0].dia_source_id or ""),)


def test_a_record_sent_again_is_a_repeat_and_good(records: list[Record], truth: dict[int, bytes]) -> None:
    report = check_topic([*records, records[3]], truth)
    assert report.is_good
    assert report.repeats == 1


@pytest.mark.parametrize("encoding", ["rubin", "ocf", "fink"])
def test_a_byte_changed_is_a_contradiction(packets: list[Packet], truth: dict[int, bytes], encoding: str) -> None:
    number = packet_prefix(packets[2].body).dia_source_id
    good, other = [record(one, encoding) for one in packets], record(changed(packets[2]), encoding)
    instead = check_topic([*good[:2], other, *good[3:]], truth)
    assert (instead.is_good, instead.lost, instead.contradictory) == (False, (), (number,))
    for both in ([*good, other], [other, *good]):
        report = check_topic(both, truth)
        assert (report.is_good, report.contradictory, report.repeats) == (False, (number,), 1)


def test_repeats_that_differ_in_the_key_alone_are_a_contradiction(
    records: list[Record], truth: dict[int, bytes]
) -> None:
    report = check_topic([*records, records[0]._replace(key=(records[0].key or b"") + b" ")], truth)
    assert not report.is_good
    assert len(report.contradictory) == 1


def test_a_packet_that_should_not_be_is_unknown(records: list[Record], truth: dict[int, bytes]) -> None:
    number = next(iter(truth))
    del truth[number]
    report = check_topic(records, truth)
    assert (report.is_good, report.unknown, report.contradictory) == (False, (number,), ())


@pytest.mark.parametrize(
    "damage", [{"value": b""}, {"value": b"no packet"}, {"dia_source_id": "1"}, {"dia_source_id": None}]
)
def test_a_record_that_readers_cannot_use_is_unreadable_and_its_packet_lost(
    records: list[Record], truth: dict[int, bytes], damage: dict[str, object]
) -> None:
    report = check_topic([records[0]._replace(**damage), *records[1:]], truth)
    assert (report.is_good, report.unreadable, len(report.lost), report.repeats) == (False, 1, 1, 0)


def test_all_partitions_of_all_topics_are_read_to_their_ends(first_run: Run, packets: list[Packet]) -> None:
    expected = expected_packets(first_run.out, load_brokers(None))
    assert set(expected) == {*FULL_TOPICS, FILTER_TOPIC}
    assert 0 < len(expected[FILTER_TOPIC]) < len(expected[FULL_TOPICS[0]]) == len(packets)
    with EmbeddedKafka() as kafka:
        sink = KafkaAlertSink(kafka.bootstrap)
        for topic, numbers in expected.items():
            for packet in packets:
                sent = record(packet, "ocf" if topic.endswith("ocf") else "rubin")
                number = int(sent.dia_source_id or "")
                if number in numbers:
                    sink.send(topic, sent.key, sent.value, [dia_source_id_header(number)])
        sink.flush()
        reports = check_streams(kafka.bootstrap, first_run.out)
        assert all(report.is_good and not report.repeats for report in reports.values())
        assert {topic: report.records for topic, report in reports.items()} == {
            topic: len(numbers) for topic, numbers in expected.items()
        }
        again = record(packets[0], "rubin")
        sink.send(FULL_TOPICS[0], again.key, again.value, [dia_source_id_header(int(again.dia_source_id or ""))])
        sink.flush()
        after = check_streams(kafka.bootstrap, first_run.out)
        repeated = dataclasses.replace(reports[FULL_TOPICS[0]], records=len(packets) + 1, repeats=1)
        assert after == {**reports, FULL_TOPICS[0]: repeated}
        sink.close()


def test_the_truth_is_read_as_it_was_written(first_run: Run, packets: list[Packet]) -> None:
    ids = {packet["diaSourceId"] for packet in first_run.packets()}
    assert {packet_prefix(one.body).dia_source_id for one in packets} == ids
    assert len(packets) == len(ids) > 10
    assert not list(archived_packets(Path(first_run.out / "ledger")))

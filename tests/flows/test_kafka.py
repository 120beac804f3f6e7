"""The sink and the demo's readers against librdkafka's in-process cluster."""

from __future__ import annotations

import pickle
import random
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from runners.kafka import (
    BrokerReader,
    DeliveryError,
    EmbeddedKafka,
    KafkaAlertSink,
    KafkaSinkSettings,
    KafkaUnreachableError,
    check_kafka,
    dia_source_id_header,
)

TOPIC = "lsst-alerts-v11"
# A port that nothing listens on: the discard port, privileged.
NOBODY = "127.0.0.1:9"


@pytest.fixture(scope="module")
def kafka() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka() as cluster:
        yield cluster


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "-").replace("]", "")


def packet(dia_source_id: int, visit: int, n_bytes: int = 100) -> bytes:
    """Bytes that lz4 cannot shrink: visit and id, then noise of a fixed seed."""
    return struct.pack(">qq", visit, dia_source_id) + random.Random(dia_source_id).randbytes(n_bytes - 16)


def visit_of(value: bytes) -> int:
    return int(struct.unpack_from(">q", value)[0])


def id_of(value: bytes) -> int:
    return int(struct.unpack_from(">q", value, 8)[0])


def send(sink: KafkaAlertSink, topic: str, dia_source_id: int, value: bytes) -> None:
    sink.send(topic, b"%d" % dia_source_id, value, [dia_source_id_header(dia_source_id)])


def write_joined(path: Path, bodies: Iterable[bytes]) -> None:
    path.write_bytes(b"".join(bodies))


def test_two_readers_receive_forty_times_what_a_partition_keeps(
    kafka: EmbeddedKafka, topic: str, tmp_path: Path
) -> None:
    sink = KafkaAlertSink(kafka.bootstrap)
    n_packets, n_bytes = 2_000, 100_000
    noise = random.Random(1).randbytes(n_bytes + n_packets)
    readers = [BrokerReader(name, kafka.bootstrap, topic, visit_of, tmp_path) for name in ("antares", "fink")]
    for reader in readers:
        reader.start()
    try:
        for number in range(n_packets):
            value = struct.pack(">qq", 1 + number // 500, number) + noise[number : number + n_bytes - 16]
            send(sink, topic, number, value)
        assert sink.flush(30) == (n_packets, n_packets * n_bytes)
        assert sink.flush(30) == (0, 0)  # of those there are no new ones
        receipts = [reader.stop(expected=n_packets, timeout_s=30) for reader in readers]
    finally:
        for reader in readers:
            reader.close()
    assert sink.delivered == n_packets
    for receipt in receipts:
        assert (receipt.received, receipt.received_bytes) == (n_packets, n_packets * n_bytes)
        assert (receipt.lost, receipt.repeats, receipt.malformed, receipt.first_problem) == (0, 0, 0, None)


def test_all_messages_of_one_key_lie_in_one_partition_and_none_is_lost(
    kafka: EmbeddedKafka, topic: str, tmp_path: Path
) -> None:
    sink = KafkaAlertSink(kafka.bootstrap)
    with BrokerReader("alerce", kafka.bootstrap, topic, visit_of, tmp_path) as reader:
        for number in range(150):
            sink.send(topic, b"one object", packet(number, 1, 100_000), [dia_source_id_header(number)])
        sink.flush(30)
        receipt = reader.stop(expected=150, timeout_s=30)
    assert (receipt.received, receipt.lost) == (150, 0)


def test_keys_count_too_where_they_are_larger_than_values(kafka: EmbeddedKafka, topic: str, tmp_path: Path) -> None:
    """As in the encoding `fink`; six times what all four partitions keep."""
    sink = KafkaAlertSink(kafka.bootstrap)
    n_packets, n_bytes = 1_200, 100_000
    noise = random.Random(2).randbytes(n_bytes + n_packets)
    with BrokerReader("fink", kafka.bootstrap, topic, visit_of, tmp_path) as reader:
        for number in range(n_packets):
            sink.send(topic, b"k" + noise[number : number + n_bytes], packet(number, 1), [dia_source_id_header(number)])
        sink.flush(30)
        receipt = reader.stop(expected=n_packets, timeout_s=30)
    assert (receipt.received, receipt.lost, receipt.malformed) == (n_packets, 0, 0)


def test_reader_writes_one_file_a_visit_sorted_by_id(kafka: EmbeddedKafka, topic: str, tmp_path: Path) -> None:
    sink = KafkaAlertSink(kafka.bootstrap)
    ids = list(range(40))
    random.Random(7).shuffle(ids)
    with BrokerReader("lasair", kafka.bootstrap, topic, visit_of, tmp_path / "spool") as reader:
        for dia_source_id in ids:
            send(sink, topic, dia_source_id, packet(dia_source_id, visit=100 + dia_source_id % 2))
        sink.flush(10)
        reader.stop(expected=40, timeout_s=10)
        reader.write(tmp_path / "lasair", write_joined)
    assert sorted(path.name for path in (tmp_path / "lasair").iterdir()) == ["100.avro", "101.avro"]
    assert (tmp_path / "lasair" / "100.avro").read_bytes() == b"".join(
        packet(number, 100) for number in range(0, 40, 2)
    )
    assert list((tmp_path / "spool").iterdir()) == []


def test_repeats_are_dropped_and_repeats_with_other_bytes_are_contradictions(
    kafka: EmbeddedKafka, topic: str, tmp_path: Path
) -> None:
    sink = KafkaAlertSink(kafka.bootstrap)
    with BrokerReader("ampel", kafka.bootstrap, topic, visit_of, tmp_path) as reader:
        for value in (packet(1, 5), packet(1, 5), packet(2, 5), packet(2, 6)):
            send(sink, topic, id_of(value), value)
        sink.flush(10)
        receipt = reader.stop(expected=None, timeout_s=10)
        reader.write(tmp_path / "ampel", write_joined)
    assert (receipt.received, receipt.repeats, receipt.contradictions) == (2, 2, 1)
    assert receipt.first_problem is not None and "diaSourceId 2" in receipt.first_problem
    assert (tmp_path / "ampel" / "5.avro").read_bytes() == packet(1, 5) + packet(2, 5)


@pytest.mark.parametrize("headers", [[], [("dia_source_id", b"twelve")]])
def test_message_without_a_usable_id_is_counted_and_costs_no_other(
    kafka: EmbeddedKafka, topic: str, tmp_path: Path, headers: list[tuple[str, bytes]]
) -> None:
    sink = KafkaAlertSink(kafka.bootstrap)
    with BrokerReader("pitt", kafka.bootstrap, topic, visit_of, tmp_path) as reader:
        sink.send(topic, None, packet(1, 1), headers)
        send(sink, topic, 2, b"short")
        send(sink, topic, 3, packet(3, 1))
        sink.flush(10)
        receipt = reader.stop(expected=None, timeout_s=10)
    assert (receipt.received, receipt.malformed) == (1, 2)


def test_reader_counts_what_the_cluster_dropped_before_it_was_read(
    kafka: EmbeddedKafka, topic: str, tmp_path: Path
) -> None:
    sink = KafkaAlertSink(kafka.bootstrap, KafkaSinkSettings(batch_bytes=200_000))
    for number in range(200):  # 20 MB into one partition before any reader
        sink.send(topic, b"same", packet(number, 1, 100_000), [dia_source_id_header(number)])
    sink.flush(30)
    with BrokerReader("late", kafka.bootstrap, topic, visit_of, tmp_path) as reader:
        receipt = reader.stop(expected=None, timeout_s=10)
    assert receipt.lost > 0
    assert receipt.received + receipt.lost == 200
    assert receipt.first_problem is not None and "were gone" in receipt.first_problem


def test_reader_that_waits_in_vain_returns_at_its_deadline(kafka: EmbeddedKafka, topic: str, tmp_path: Path) -> None:
    with BrokerReader("silent", kafka.bootstrap, topic, visit_of, tmp_path) as reader:
        assert reader.stop(expected=1, timeout_s=0.3).received == 0


def test_sink_pickles_as_its_configuration_even_while_open(kafka: EmbeddedKafka, topic: str) -> None:
    sink = KafkaAlertSink(kafka.bootstrap, KafkaSinkSettings(linger_ms=1.0))
    send(sink, topic, 1, packet(1, 1))
    twin = pickle.loads(pickle.dumps(sink))
    sink.flush(10)
    assert (twin.bootstrap, twin.settings, twin.delivered) == (sink.bootstrap, sink.settings, 0)
    send(twin, topic, 2, packet(2, 1))
    twin.flush(10)
    assert twin.delivered == 1


def test_flush_raises_with_the_count_when_nobody_answers() -> None:
    sink = KafkaAlertSink(NOBODY)
    for number in range(3):
        send(sink, TOPIC, number, packet(number, 1))
    with pytest.raises(DeliveryError, match=r"3 messages were not acknowledged by 127\.0\.0\.1:9 .*refused"):
        sink.flush(1.5)
    sink.flush(0.1)  # nothing is left of the bundle that failed


def test_full_queue_blocks_and_then_raises() -> None:
    sink = KafkaAlertSink(NOBODY, KafkaSinkSettings(queue_bytes=1_000_000, send_deadline_s=0.5))
    with pytest.raises(DeliveryError, match=r"no room in the producer for 0\.5 s"):
        for number in range(20):
            send(sink, TOPIC, number, packet(number, 1, 100_000))


def test_too_large_message_is_refused_and_the_others_arrive(kafka: EmbeddedKafka, topic: str) -> None:
    sink = KafkaAlertSink(kafka.bootstrap)
    send(sink, topic, 1, packet(1, 1))
    with pytest.raises(DeliveryError, match="10000100 bytes"):
        send(sink, topic, 2, bytes(10_000_100))
    send(sink, topic, 3, packet(3, 1))
    sink.flush(10)
    assert sink.delivered == 2


def test_check_kafka_names_the_address_that_did_not_answer(kafka: EmbeddedKafka) -> None:
    check_kafka(kafka.bootstrap)
    with pytest.raises(KafkaUnreachableError, match=r"no Kafka broker answered at 127\.0\.0\.1:9 within 0\.5 s"):
        check_kafka(NOBODY, timeout_s=0.5)

"""Listening to container files and to a topic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fastavro
import pytest
from click.testing import CliRunner

from runners.cli import main
from runners.kafka import EmbeddedKafka, KafkaAlertSink, KafkaUnreachableError
from runners.listening import PacketFileError, listen_path, listen_topic
from schemas.avro.messages import Packet, encoded, record_key, wire_message
from schemas.avro.reading import decode_packet, to_json
from schemas.avro.schema_versions import packet_schema
from schemas.avro.wire import HEADER_BYTES

GOLDEN = Path(__file__).parents[1] / "golden" / "packets"
SCHEMA = {"type": "record", "name": "alert", "fields": [{"name": "diaSourceId", "type": "long"}]}


@pytest.fixture(scope="module")
def kafka() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka() as cluster:
        yield cluster


def write_packets(path: Path, *ids: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        # One packet a block, so that a cut file still holds the packets before the cut.
        fastavro.writer(stream, SCHEMA, [{"diaSourceId": key} for key in ids], sync_interval=1)
    return path


def produce(kafka: EmbeddedKafka, topic: str, n_messages: int, first: int = 0) -> None:
    sink = KafkaAlertSink(kafka.bootstrap)
    for number in range(first, first + n_messages):
        sink.send(topic, b"one partition", b"%d" % number, [])
    sink.flush(10)


def heard(kafka: EmbeddedKafka, topic: str, **options: object) -> list[int]:
    settings = {"idle_timeout_s": 0.5, **options}
    return [int(record.value) for record in listen_topic(kafka.bootstrap, topic, **settings)]  # type: ignore[arg-type]


def test_folder_is_read_in_order_of_path_without_unfinished_files(tmp_path: Path) -> None:
    write_packets(tmp_path / "day_obs=2" / "20.avro", 5)
    write_packets(tmp_path / "day_obs=1" / "10.avro", 1, 2)
    write_packets(tmp_path / "day_obs=1" / ".11.avro", 98)
    write_packets(tmp_path / "_parts" / "12.avro", 99)
    assert [packet["diaSourceId"] for packet in listen_path(tmp_path)] == [1, 2, 5]
    assert [packet["diaSourceId"] for packet in listen_path(tmp_path / "day_obs=1" / "10.avro")] == [1, 2]


def test_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    write_packets(tmp_path / ".cache" / "night" / "1.avro", 3)
    assert len(list(listen_path(tmp_path / ".cache" / "night"))) == 1


def test_broken_files_are_named_after_every_good_packet_was_given(tmp_path: Path) -> None:
    cut = write_packets(tmp_path / "1.avro", 1, 2)
    cut.write_bytes(cut.read_bytes()[:-5])
    (tmp_path / "2.avro").write_bytes(b"no container")
    write_packets(tmp_path / "3.avro", 3)
    packets: list[int] = []
    with pytest.raises(PacketFileError, match=r"/1\.avro: broken container after 2 .*/2\.avro: not an Avro") as error:
        for packet in listen_path(tmp_path):
            packets.append(packet["diaSourceId"])  # noqa: PERF401 - what came before the error counts
    assert packets == [1, 2, 3]
    assert "3.avro" not in str(error.value)


def test_path_without_packets_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PacketFileError, match=r"no \.avro file at"):
        list(listen_path(tmp_path))


def test_topic_is_heard_in_order_up_to_the_limit(kafka: EmbeddedKafka) -> None:
    produce(kafka, "limited", 20)
    assert heard(kafka, "limited", limit=15) == list(range(15))


def test_group_goes_on_where_it_stopped_and_hears_its_unfinished_message_again(kafka: EmbeddedKafka) -> None:
    produce(kafka, "stopped", 5)
    listener = listen_topic(kafka.bootstrap, "stopped", group="fink-1", idle_timeout_s=5.0)
    assert [int(next(listener).value), int(next(listener).value)] == [0, 1]
    listener.close()  # type: ignore[attr-defined]
    assert heard(kafka, "stopped", group="fink-1") == [1, 2, 3, 4]


def test_listen_prints_packets_of_every_encoding(kafka: EmbeddedKafka) -> None:
    """A body names its schema in the key (fink); JSON is printed as it is; what is neither is told and left out."""
    packet = Packet(packet_schema("11.0"), (GOLDEN / "v11.0.bin").read_bytes()[HEADER_BYTES:])
    wire = wire_message(packet)
    sink = KafkaAlertSink(kafka.bootstrap)
    for encoding in ("rubin", "ocf", "fink"):
        sink.send("every-encoding", record_key(encoding, wire, "12"), encoded(encoding, wire), [])
    sink.send("every-encoding", b"12", b'{"diaSourceId":"27131565485064193"}', [])
    sink.send("every-encoding", b'{"type":"long"}', packet.body, [])
    sink.flush(10)
    options = ["--bootstrap", kafka.bootstrap, "--topic", "every-encoding", "--limit", "5"]
    result = CliRunner().invoke(main, ["listen", *options])
    assert result.exit_code == 1 and result.stderr.count("message left out: the key of the record is no schema") == 1
    printed = sorted(result.stdout.splitlines(), key=len)
    assert printed[0] == '{"diaSourceId":"27131565485064193"}'
    assert printed[1:] == [to_json(decode_packet(wire))] * 3


def test_nobody_at_the_address_is_said_at_once() -> None:
    with pytest.raises(KafkaUnreachableError, match=r"127\.0\.0\.1:9"):
        next(listen_topic("127.0.0.1:9", "any", answer_timeout_s=0.5))

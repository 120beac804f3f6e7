"""Compares what lies on the alert topics of a Kafka broker with the output folder of an undisturbed run.

    python tests/campaigns/stream_checker.py --bootstrap HOST:PORT --truth OUT

A topic may hold a packet more than once; it must hold each packet of the truth, and no bytes but those. Every
record of every partition is read, from the first one to the last one that is there when the reading begins.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaException, TopicPartition

from runners.configuration import load_brokers
from runners.kafka import DIA_SOURCE_ID_HEADER, consumer_settings
from schemas.avro.container import block_bytes, container_blocks, container_header
from schemas.avro.messages import JSON_THIN, Packet, message_of_record, packet_of, schema_of_container
from schemas.avro.projection import split_bodies
from schemas.avro.reading import packet_prefix
from schemas.avro.wire import PacketFormatError
from transforms.distribution import FULL_STREAM, BrokerConfig

ANSWER_PATIENCE_S = 60.0


class Record(NamedTuple):
    """What lies on a topic. `dia_source_id`: its header, as text; None if there is none."""

    key: bytes | None
    value: bytes
    dia_source_id: str | None


@dataclass(frozen=True)
class TopicReport:
    """What a topic holds beside the truth: the diaSourceIds concerned, in order, and counts of records.

    Attributes
    ----------
    expected, records : packets of the truth, records on the topic
    lost : in the truth, not on the topic
    contradictory : records of one packet that differ from each other, or packets that differ from the truth's
    unknown : on the topic, not in the truth
    unreadable : records without a packet, or whose header is not its id
    repeats : records beyond the first of each packet
    """

    expected: int
    records: int
    lost: tuple[int, ...]
    contradictory: tuple[int, ...]
    unknown: tuple[int, ...]
    unreadable: int
    repeats: int

    @property
    def is_good(self) -> bool:
        """Whether the topic holds the truth and nothing but the truth."""
        return not (self.lost or self.contradictory or self.unknown or self.unreadable)


def check_topic(records: Iterable[Record], truth: dict[int, bytes]) -> TopicReport:
    """Compare records with the packets that they should hold.

    Parameters
    ----------
    records : of one topic, in any order
    truth : SHA-256 of the Avro bodies, by diaSourceId
    """
    first: dict[int, bytes] = {}
    contradictory: set[int] = set()
    n_records = unreadable = 0
    for record in records:
        n_records += 1
        try:
            body = packet_of(message_of_record(record.key, record.value)).body
            number = packet_prefix(body).dia_source_id
        except (PacketFormatError, IndexError):
            unreadable += 1
            continue
        if record.dia_source_id != str(number):
            unreadable += 1
            continue
        whole = _digest(b"%d %s" % (len(record.key or b""), (record.key or b"") + record.value))
        differs = first.setdefault(number, whole) != whole or truth.get(number, _digest(body)) != _digest(body)
        if differs:
            contradictory.add(number)
    return TopicReport(
        expected=len(truth),
        records=n_records,
        lost=tuple(sorted(truth.keys() - first.keys())),
        contradictory=tuple(sorted(contradictory)),
        unknown=tuple(sorted(first.keys() - truth.keys())),
        unreadable=unreadable,
        repeats=n_records - unreadable - len(first),
    )


def expected_packets(out: Path, brokers: Iterable[BrokerConfig]) -> dict[str, dict[int, bytes]]:
    """By topic, what `check_topic` is to find there: of full streams the archive, of filtered ones their folder.

    Streams in JSON are left out: there are no packets on them.
    """
    streams = {
        broker.kafka_topic: broker.stream
        for broker in brokers
        if broker.sink == "kafka" and broker.encoding != JSON_THIN
    }
    folders = {
        topic: out / "archive" / "alerts" if stream == FULL_STREAM else out / "filters" / stream
        for topic, stream in streams.items()
    }
    return {
        topic: {packet_prefix(one.body).dia_source_id: _digest(one.body) for one in archived_packets(folder)}
        for topic, folder in folders.items()
    }


def archived_packets(folder: Path) -> Iterator[Packet]:
    """All packets in the containers below a folder."""
    for path in sorted(folder.rglob("[!.]*.avro")):
        data = path.read_bytes()
        header = container_header(data)
        schema = schema_of_container(header.schema_text)
        for block in container_blocks(data, header):
            joined = block_bytes(block, header.codec)
            ends, error = split_bodies(schema, joined, block.n_packets)
            if error is not None:
                raise error
            yield from (Packet(schema, joined[start:end]) for start, end in pairwise([0, *ends]))


def read_topic(bootstrap: str, topic: str) -> Iterator[Record]:
    """All records of a topic; KafkaException where it is not there, TimeoutError where nothing comes any more."""
    consumer = Consumer(consumer_settings(bootstrap, "stream-checker", from_beginning=True))
    try:
        found = consumer.list_topics(topic, timeout=ANSWER_PATIENCE_S).topics[topic]
        if found.error is not None:
            raise KafkaException(found.error)
        places = [TopicPartition(topic, partition, 0) for partition in found.partitions]
        marks = [consumer.get_watermark_offsets(place, timeout=ANSWER_PATIENCE_S) for place in places]
        ends = {place.partition: end for place, (start, end) in zip(places, marks, strict=True) if start < end}
        consumer.assign([place for place in places if place.partition in ends])
        while ends:
            message = consumer.poll(ANSWER_PATIENCE_S)
            if message is None:
                raise TimeoutError(
                    f"topic {topic}: nothing came for {ANSWER_PATIENCE_S:g} s, but {ends} was not reached"
                )
            if message.error() is not None:
                raise KafkaException(message.error())
            if message.offset() >= ends.get(message.partition(), 0):
                continue
            yield Record(message.key(), message.value() or b"", _header(message.headers()))
            if message.offset() + 1 >= ends[message.partition()]:
                del ends[message.partition()]
    finally:
        consumer.close()


def check_streams(bootstrap: str, truth: Path) -> dict[str, TopicReport]:
    """Compare each topic of the shipped brokers with the output folder of an undisturbed run."""
    expected = expected_packets(truth, load_brokers(None))
    return {topic: check_topic(read_topic(bootstrap, topic), packets) for topic, packets in expected.items()}


def report_lines(reports: dict[str, TopicReport]) -> Iterator[str]:
    """A table, and the first ids of what is wrong."""
    columns = ("expected", "records", "lost", "contradictory", "unknown", "unreadable", "repeats")
    yield f"{'topic':<24}" + "".join(f"{name:>14}" for name in columns)
    for topic, report in reports.items():
        values = [getattr(report, name) for name in columns]
        yield f"{topic:<24}" + "".join(f"{one if isinstance(one, int) else len(one):>14}" for one in values)
        for name in ("lost", "contradictory", "unknown"):
            if numbers := getattr(report, name):
                yield f"  {name}: {', '.join(map(str, numbers[:5]))}{' ...' if len(numbers) > 5 else ''}"


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def _header(headers: list[tuple[str, bytes]] | None) -> str | None:
    return next(
        (value.decode("ascii", "replace") for name, value in headers or [] if name == DIA_SOURCE_ID_HEADER), None
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", required=True, help="the Kafka broker, HOST:PORT")
    parser.add_argument("--truth", required=True, type=Path, help="output folder of an undisturbed run")
    options = parser.parse_args()
    reports = check_streams(options.bootstrap, options.truth)
    print(*report_lines(reports), sep="\n")
    return 0 if all(report.is_good for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

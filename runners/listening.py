"""The core of `nightstream listen`: packets from container files or from a topic, one after another."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runners.kafka import check_kafka, consumer_settings
from runners.kafka_login import client_settings
from schemas.avro.container import read_container
from schemas.avro.wire import PacketFormatError

# Joining a consumer group takes a few seconds; a topic isn't idle before that is done.
_JOIN_PATIENCE_S = 30.0


class PacketFileError(ValueError):
    """Container files that could not be read (to their end); the message names each and why."""


class TopicReadError(RuntimeError):
    """The topic is missing, or the Kafka broker refuses to let it be read."""


def listen_path(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the packets of a container file, or of all below a folder in order of path.

    Parameters
    ----------
    path : Path
        An Avro object-container file, or a folder; in a folder only `*.avro` count, and names
        that start with "." or "_" are unfinished files and passed over.

    Yields
    ------
    dict
        One packet, fields as the file's own schema names them.

    Raises
    ------
    PacketFileError
        There is nothing to read; or, after every good packet was yielded, some files were broken.
    """
    files = _container_files(path)
    if not files:
        raise PacketFileError(f"no .avro file at {path}")
    problems = []
    for file in files:
        try:
            yield from _packets(file)
        except PacketFileError as error:
            problems.append(str(error))
    if problems:
        raise PacketFileError("; ".join(problems))


class KafkaRecord(NamedTuple):
    """What lies on a topic: key and value."""

    key: bytes | None
    value: bytes


def listen_topic(
    bootstrap: str,
    topic: str,
    *,
    group: str | None = None,
    from_beginning: bool = True,
    idle_timeout_s: float | None = None,
    limit: int | None = None,
    answer_timeout_s: float = 10.0,
    login: str | None = None,
) -> Iterator[KafkaRecord]:
    """Yield records as they come, in order within each partition.

    Parameters
    ----------
    bootstrap, topic : str
        "HOST:PORT" and what to read there.
    group : str or None
        Consumer group, which remembers how far it read (at least once: a message counts as read
        when the next one is asked for); None for a new group that starts over.
    from_beginning : bool
        Where a group without a memory starts: at the oldest message kept, or the next to come.
    idle_timeout_s : float or None
        Stop when nothing came for so long, counted from when the group was joined; None never.
    limit : int or None
        Stop after so many messages; None for all.
    answer_timeout_s : float
        How long the Kafka broker may take to answer at first.
    login : str or None
        Properties file with a user's login.

    Raises
    ------
    runners.kafka.KafkaUnreachableError
        No answer at `bootstrap`, or the login was refused.
    TopicReadError
        No such topic, or no right to read it.
    """
    from confluent_kafka import Consumer

    check_kafka(bootstrap, answer_timeout_s, login)
    # Whoever logs in may read with groups of its own name only.
    name = group or f"{client_settings(bootstrap, login).get('sasl.username', 'listen')}-{uuid.uuid4().hex}"
    settings = consumer_settings(bootstrap, name, from_beginning=from_beginning, login=login)
    # The embedded cluster forgets a member that left only after this time, and lets nobody join before.
    consumer = Consumer({**settings, "session.timeout.ms": 6000})
    idle_s = math.inf if idle_timeout_s is None else idle_timeout_s
    deadline = time.monotonic() + idle_s + _JOIN_PATIENCE_S

    def start_idle_clock(*_: Any) -> None:
        nonlocal deadline
        deadline = time.monotonic() + idle_s

    yielded = 0
    try:
        consumer.subscribe([topic], on_assign=start_idle_clock)
        while time.monotonic() < deadline and (limit is None or yielded < limit):
            message = consumer.poll(0.1)
            if message is None:
                continue
            if message.error() is not None:
                raise TopicReadError(f"topic {topic} at {bootstrap} cannot be read: {message.error().str()}")
            yield KafkaRecord(message.key(), message.value() or b"")
            consumer.store_offsets(message)
            yielded += 1
            start_idle_clock()
    finally:
        consumer.close()


def _container_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = (file.relative_to(path) for file in path.rglob("*.avro"))
    return [path / file for file in sorted(files) if not any(part[0] in "._" for part in file.parts)]


def _packets(file: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from read_container(file)
    except OSError as error:
        raise PacketFileError(f"{file} cannot be read: {error}") from error
    except PacketFormatError as error:  # it begins with the file's name
        raise PacketFileError(f"{file.parent}/{error}") from error

"""`nightstream replay`: archived packets go out again with their own bytes, and bad files cost only themselves."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest
import ztf_packets
from confluent_kafka import Consumer, TopicPartition
from ztf_packets import container, packet, write_tar

import schemas.avro.container
from runners import entries
from runners.kafka import BrokerReader, EmbeddedKafka, consumer_settings
from runners.running import _visit_of
from schemas.avro.adaptation import adapt_packet
from schemas.avro.container import container_blocks, container_header, read_container
from schemas.avro.reading import decode_message
from schemas.avro.schema_versions import packet_schema
from schemas.avro.wire import wrap
from schemas.manifests import ManifestError
from schemas.packet_index import PacketIndex, PacketReader, index_packets, read_packet
from schemas.ztf import object_number

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}")
FILTERS = {
    "bright": "{name: bright, owner: demo, where: diaSource.snr > 5 AND ab_magnitude(diaSource.psfFlux) < 18.45}",
    "known": "{name: known, owner: demo, where: len(prvDiaSources) >= 1 AND diaObject.nDiaSources = 2}",
}
BROKERS = """
brokers:
  - {name: everyone, topic: full-stream}
  - {name: bright-readers, stream: demo.bright, topic: bright-stream}
  - {name: mirror, sink: files}
  - {name: bright-lines, stream: demo.bright, encoding: json-thin, sink: files}
  - {name: bright-bodies, stream: demo.bright, encoding: fink, topic: bright-bodies}
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options: two filters of our own, three brokers."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "filters").mkdir()
    for name, text in FILTERS.items():
        (folder / "filters" / f"{name}.yaml").write_text(text)
    (folder / "brokers.yaml").write_text(BROKERS)
    return ["--filters", str(folder / "filters"), "--brokers", str(folder / "brokers.yaml")]


# --- our own archive ------------------------------------------------------------------------------------


def test_an_archive_replayed_gives_brokers_and_filters_the_bytes_of_the_night(
    first_run: Any, replay: Callable[..., Any], tmp_path: Path
) -> None:
    run = replay(first_run.out / "archive" / "alerts", tmp_path / "out", "--kafka", "embedded")
    assert run.exit_code == 0, run.stderr
    assert run.files("brokers", "filters") == first_run.files("brokers", "filters")
    for count in ("visits", "dia_sources", "alerts", "ss_matches", "delivered", "passed"):
        wanted = first_run.summary["alerts"] if count == "dia_sources" else first_run.summary[count]
        assert run.summary[count] == wanted, count
    assert not (tmp_path / "out" / "archive").exists() and run.failures() == []
    digests = [_of_ledger(one, "alerts_digest") for one in (run, first_run)]
    assert digests[0] == digests[1]


def test_wire_messages_replayed_give_the_same_as_the_containers_they_were_kept_in(
    first_run: Any, replay: Any, tmp_path: Path
) -> None:
    schema = packet_schema("11.0").parsed
    (tmp_path / "messages").mkdir()
    for one in first_run.packets():
        body = io.BytesIO()
        fastavro.schemaless_writer(body, schema, one)
        (tmp_path / "messages" / f"{one['diaSourceId']}.avro").write_bytes(wrap(1100, body.getvalue()))
    run = replay(tmp_path / "messages", tmp_path / "out", "--kafka", "embedded")
    assert run.exit_code == 0, run.stderr
    assert run.files("brokers", "filters") == first_run.files("brokers", "filters")


def test_readers_in_every_encoding_receive_the_same_alerts(first_run: Any, replay: Any, tmp_path: Path) -> None:
    encodings = ("rubin", "ocf", "fink", "json-thin")
    brokers = [
        {"name": f"{encoding}-{sink}", "encoding": encoding, "sink": sink, "topic": f"full-{encoding}"}
        for encoding in encodings
        for sink in ("kafka", "files")
    ]
    (tmp_path / "brokers.yaml").write_text(json.dumps({"brokers": brokers}))
    options = ("--kafka", "embedded", "--brokers", tmp_path / "brokers.yaml")
    run = replay(first_run.out / "archive" / "alerts", tmp_path / "out", *options)
    assert run.exit_code == 0 and run.failures() == [], run.stderr
    assert "reader of" not in run.stderr
    archived = sorted(path.read_bytes() for path in (first_run.out / "archive" / "alerts").rglob("*.avro"))
    for sink in ("kafka", "files"):
        for encoding in encodings[:3]:
            files = run.files(f"brokers/{encoding}-{sink}")
            assert sorted(files.values()) == archived, (encoding, sink)
    lines = {sink: run.files(f"brokers/json-thin-{sink}") for sink in ("kafka", "files")}
    assert [text for _, text in sorted(lines["kafka"].items())] == [text for _, text in sorted(lines["files"].items())]
    alerts = [json.loads(line) for text in lines["files"].values() for line in text.splitlines()]
    told = {(one["diaSourceId"], one["diaObjectId"], one["ssObjectId"], one["ra"], one["visit"]) for one in alerts}
    sources = [packet["diaSource"] for packet in first_run.packets()]
    ids = ("diaSourceId", "diaObjectId", "ssObjectId")
    texts = [[None if one[name] is None else str(one[name]) for name in ids] for one in sources]
    assert len(alerts) == len(sources)
    assert told == {(*ids, one["ra"], one["visit"]) for ids, one in zip(texts, sources, strict=True)}


def _of_ledger(run: Any, key: str) -> dict[int, Any]:
    lines = (run.out / "ledger" / "visits.jsonl").read_text().splitlines()
    return {record["visit"]: record[key] for record in map(json.loads, lines)}


# --- packets of another survey --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ztf_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, bytes]]:
    """A folder with packets in every kind of file, and the message that each has to be sent as, by candid."""
    folder = tmp_path_factory.mktemp("ztf") / "packets"
    (folder / "deep" / "er").mkdir(parents=True)
    own = {number: container([packet(number)]) for number in range(1, 7)}
    own[0] = container([packet(0, "4.0")], "4.0")
    own[5] = container([packet(5)], codec="deflate")
    (folder / "0.avro").write_bytes(own[0])
    (folder / "deep" / "er" / "5.avro").write_bytes(own[5])
    (folder / "6.avro").write_bytes(own[6])
    write_tar(folder / "a.tar", {"1.avro": own[1], "deep/2.avro": own[2]})
    write_tar(folder / "b.tar.gz", {"3.avro": own[3]}, "w:gz")
    (folder / "c.avro.gz").write_bytes(gzip.compress(own[4]))
    # Two blocks of two packets, and one alone: they go out in containers of their own.
    many = [packet(number, "4.0") for number in range(7, 12)]
    text = container(many, "4.0", codec="deflate", sync_interval=3000)
    assert [block.n_packets for block in container_blocks(text, container_header(text))] == [2, 2, 1]
    (folder / "many.avro").write_bytes(text)
    messages = {packet(number)["candid"]: message for number, message in own.items()}
    schema_text = container_header(text).schema_text
    for one in many:
        messages[one["candid"]] = _container_of_one(schema_text, one)
    return folder, messages


def _container_of_one(schema_text: str, one: dict[str, Any]) -> bytes:
    """Written slowly by the specification: header with the schema as it came, one block, not compressed."""

    def long(value: int) -> bytes:
        out, value = b"", value << 1
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    body = io.BytesIO()
    fastavro.schemaless_writer(body, ztf_packets.SCHEMAS["4.0"], one)
    schema = schema_text.encode()
    sync = hashlib.sha256(schema).digest()[:16]
    texts = b"".join(long(len(text)) + text for text in (b"avro.codec", b"null", b"avro.schema", schema))
    size = len(body.getvalue())
    return b"Obj\x01" + long(2) + texts + long(0) + sync + long(1) + long(size) + body.getvalue() + sync


@pytest.fixture(scope="module")
def ztf_run(
    ztf_files: tuple[Path, dict[int, bytes]], settings: list[str], replay: Any, tmp_path_factory: Any
) -> tuple[Any, dict[str, list[Any]]]:
    """The folder replayed to a Kafka that outlives the run, and the messages on each of its topics."""
    with EmbeddedKafka() as kafka:
        run = replay(ztf_files[0], tmp_path_factory.mktemp("out") / "out", "--kafka", kafka.bootstrap, *settings)
        return run, _read_topics(
            kafka.bootstrap, {"ztf-alerts": 12, "bright-stream": 5, "bright-bodies": 5, "alert-ledger": 6}
        )


def _read_topics(bootstrap: str, expected: dict[str, int]) -> dict[str, list[Any]]:
    """Messages of topics: as many as are expected and, for a while, any more."""
    consumer = Consumer(consumer_settings(bootstrap, "test", from_beginning=True))
    messages: dict[str, list[Any]] = {topic: [] for topic in expected}
    try:
        topics = consumer.list_topics(timeout=10).topics
        places = [TopicPartition(topic, partition, 0) for topic in expected for partition in topics[topic].partitions]
        consumer.assign(places)
        missing = sum(expected.values())
        while (message := consumer.poll(10.0 if missing > 0 else 0.3)) is not None:
            assert message.error() is None
            messages[message.topic()].append(message)
            missing -= 1
    finally:
        consumer.close()
    return messages


def test_ztf_packets_go_to_ztf_alerts_with_their_own_bytes_keys_and_ids(
    ztf_run: tuple[Any, dict[str, list[Any]]], ztf_files: tuple[Path, dict[int, bytes]]
) -> None:
    run, topics = ztf_run
    assert run.exit_code == 0, run.stderr
    sent = {int(dict(message.headers())["dia_source_id"]): message for message in topics["ztf-alerts"]}
    assert len(sent) == len(topics["ztf-alerts"]) == 12
    assert {candid: message.value() for candid, message in sent.items()} == ztf_files[1]
    for candid, message in sent.items():
        decoded = decode_message(message.value())
        assert decoded["candid"] == candid and message.key() == decoded["objectId"].encode()
        assert dict(message.headers())["_format"] == b"avro"


def test_filters_see_ztf_packets_in_todays_names_and_pass_their_bytes_on(
    ztf_run: tuple[Any, dict[str, list[Any]]], ztf_files: tuple[Path, dict[int, bytes]]
) -> None:
    run, topics = ztf_run
    bright = {packet(number)["candid"] for number in range(5)}
    messages = ztf_files[1]
    assert sorted(message.value() for message in topics["bright-stream"]) == sorted(messages[key] for key in bright)
    assert {one["candid"] for one in run.packets("filters/demo.bright")} == bright
    assert run.summary["passed"] == {"demo.bright": 5, "demo.known": 12}
    served = {"everyone": 12, "bright-readers": 5, "mirror": 12, "bright-lines": 5, "bright-bodies": 5}
    assert run.summary["delivered"] == served
    assert sorted(one["candid"] for one in run.packets("brokers/mirror")) == sorted(messages)


def test_filtered_ztf_packets_go_out_in_the_encodings_that_need_no_schema_id(
    ztf_run: tuple[Any, dict[str, list[Any]]], ztf_files: tuple[Path, dict[int, bytes]]
) -> None:
    run, topics = ztf_run
    bright = {packet(number)["candid"]: packet(number) for number in range(5)}
    for message in topics["bright-bodies"]:
        body, told = io.BytesIO(message.value()), fastavro.parse_schema(json.loads(message.key()))
        one: Any = fastavro.schemaless_reader(body, told, None)
        assert one == decode_message(ztf_files[1][bright.pop(one["candid"])["candid"]])
    assert not bright
    files = run.files("brokers/bright-lines").values()
    lines = {int(one["diaSourceId"]): one for text in files for one in map(json.loads, text.splitlines())}
    for number in range(5):
        one = packet(number)
        line = lines.pop(one["candid"])
        assert (line["ra"], line["dec"]) == (one["candidate"]["ra"], one["candidate"]["dec"])
        assert line["objectId"] == line["diaObjectId"] == str(object_number(one["objectId"]))
    assert not lines


def test_packets_of_one_exposure_in_two_schemas_go_to_two_files_each_in_its_own(
    ztf_run: tuple[Any, dict[str, list[Any]]], ztf_files: tuple[Path, dict[int, bytes]]
) -> None:
    """Exposure 3 has packet 6 in the older schema and 7 in the newer."""
    mirror = ztf_run[0].out / "brokers" / "mirror"
    older, newer = sorted(mirror.glob(f"{ztf_packets.FIRST_EXPOSURE + 3}.*avro"), key=lambda path: len(path.name))
    for path, number in ((older, 6), (newer, 7)):
        (one,) = read_container(path)
        message = ztf_files[1][packet(number)["candid"]]
        assert one == decode_message(message)
        assert _text(path.read_bytes()) == _text(message)
    assert len(list(mirror.glob("*.avro"))) == 6 + 2  # exposure 0, too, has both


def test_the_ledger_has_the_exposures_of_the_packets(ztf_run: tuple[Any, dict[str, list[Any]]]) -> None:
    run, topics = ztf_run
    assert _of_ledger(run, "alerts") == {ztf_packets.FIRST_EXPOSURE + k: 2 for k in range(6)}
    bands = _of_ledger(run, "band")
    assert [bands[visit] for visit in sorted(bands)] == ["g", "r"] * 3
    assert len(topics["alert-ledger"]) == 6


def test_a_second_replay_changes_no_byte_and_other_packets_are_refused(
    ztf_run: tuple[Any, dict[str, list[Any]]], ztf_files: tuple[Path, Any], settings: list[str], replay: Any
) -> None:
    run = ztf_run[0]
    before = run.files("brokers", "filters")
    again = replay(ztf_files[0], run.out, *settings)
    assert again.exit_code == 0, again.stderr
    assert again.files("brokers", "filters") == before and len(before) > 10
    replay(ztf_files[0] / "0.avro", run.out, *settings).assert_refused(2, "output of another input")
    assert run.files("brokers", "filters") == before
    assert not [path for path in run.out.iterdir() if path.name in (".store", ".spool")]


# --- bad files ------------------------------------------------------------------------------------------


def _without(one: dict[str, Any], **candidate: Any) -> dict[str, Any]:
    return one | {"candidate": one["candidate"] | candidate}


def _of_schema(schema_text: str, payload: bytes, n_packets: int = 1, codec: str = "null") -> bytes:
    """A container that says it holds `n_packets` of a schema."""
    empty = container([])
    header = container_header(empty)
    assert header.codec == "null"
    stream = io.BytesIO()
    pairs = ((b"avro.codec", codec.encode()), (b"avro.schema", schema_text.encode()))
    stream.write(b"Obj\x01")
    fastavro.schemaless_writer(stream, {"type": "map", "values": "bytes"}, {k.decode(): v for k, v in pairs})
    stream.write(header.sync)
    for value in (n_packets, len(payload)):
        fastavro.schemaless_writer(stream, "long", value)
    return stream.getvalue() + payload + header.sync


def _blocks_of(packets: Iterable[dict[str, Any]], **options: Any) -> bytes:
    """A container of one packet a block."""
    return container(list(packets), sync_interval=1, **options)


def _spoiled(content: bytes, block: int, what: str) -> bytes:
    """The container with one block made unreadable."""
    header = container_header(content)
    offsets = [one.offset for one in container_blocks(content, header)]
    spoiled = bytearray(content)
    if what == "size":
        spoiled[offsets[block] + 1] ^= 0x15
    elif what == "content":
        spoiled[offsets[block] + 3 : offsets[block + 1] - 16] = b"\xff" * (offsets[block + 1] - offsets[block] - 19)
    else:
        spoiled[offsets[block + 1] - 16] ^= 0xFF
    return bytes(spoiled)


def _deep(depth: int) -> str:
    items = '{"type":"array","items":' * depth + '"int"' + "}" * depth
    return f'{{"type":"record","name":"deep","fields":[{{"name":"x","type":{items}}}]}}'


def _bad_files(folder: Path) -> dict[str, tuple[list[int], list[tuple[str, str, str]]]]:
    """Files with something wrong; of each the packets that can still be had, and (error, words, lost) of the others."""
    folder.mkdir()
    six = [packet(number) for number in range(6)]
    whole = _blocks_of(six)
    deflated = _blocks_of(six, codec="deflate")
    good = {f"{number}.avro": container([packet(number)]) for number in range(3)}
    recursive = '{"type":"record","name":"n","fields":[{"name":"candidate","type":["null","n"]}]}'
    nulls = '{"type":"record","name":"n","fields":[{"name":"candidate","type":{"type":"array","items":"null"}}]}'
    empty_record = '{"type":"record","name":"n","fields":[]}'
    lsst_name = '{"type":"record","name":"lsst.v11_0.alert","fields":[{"name":"diaSource","type":"int"}]}'
    unreadable, unusable, broken_file = "UnreadablePackets", "UnusablePacket", "UnreadableFile"
    bomb = zlib.compressobj(9, wbits=-15)
    contents: dict[str, tuple[bytes, list[int], list[tuple[str, str, str]]]] = {
        "empty": (b"", [], [(broken_file, "an empty file", "what is in it")]),
        "text": (b"candid,jd\n1,2\n", [], [(unreadable, "neither an Avro container nor a wire", "what is in it")]),
        "zeros": (bytes(10_240), [], [(broken_file, "nothing in it", "what is in it")]),
        "magic": (b"Obj", [], [(unreadable, "not an Avro container", "what is in it")]),
        "header-cut": (whole[:300], [], [(unreadable, "ends within its header", "what is in it")]),
        "cut": (whole[:-1000], list(range(5)), [(unreadable, "is broken", " bytes")]),
        "cut-in-varint": (whole[: _offset(whole, 2) + 1], [0, 1], [(unreadable, "ends within the block", "1 bytes")]),
        "size-flipped": (_spoiled(whole, 1, "size"), [0, 2, 3, 4, 5], [(unreadable, "is broken", " bytes")]),
        "sync-flipped": (_spoiled(whole, 1, "sync"), [0, 3, 4, 5], [(unreadable, "is broken", " bytes")]),
        "content-flipped": (_spoiled(whole, 1, "content"), [0, 2, 3, 4, 5], [(unreadable, "", "1 of 1 packets")]),
        "deflate-flipped": (_spoiled(deflated, 1, "content"), [0, 2, 3, 4, 5], [(unreadable, "", "1 of 1 packets")]),
        "codec": (_of_schema(_text(whole), b"x", codec="zstandard"), [], [(unreadable, "codec 'zstandard'", "what")]),
        "id-unknown": (wrap(1234, b"\0" * 50), [], [(unreadable, "unknown schema id 1234, known are 700", "what")]),
        "wire-short": (b"\0\0", [], [(unreadable, "a wire message has at least 5 bytes", "what is in it")]),
        "wire-broken": (wrap(1100, b"\0" * 50), [], [(unreadable, "broken v11.0 packet of 50 bytes", "what")]),
        "json": (_of_schema("{", b""), [], [(unreadable, "no schema of a record: JSONDecodeError", "what")]),
        "enum": (
            _of_schema('{"type":"enum","name":"e","symbols":["a"]}', b"\0"),
            [],
            [(unreadable, "e is of type enum, not a record", "what")],
        ),
        "long": (_of_schema('"long"', b"\2"), [], [(unreadable, "no schema of a record", "what")]),
        "union": (_of_schema('["null","long"]', b"\0"), [], [(unreadable, "no schema of a record", "what")]),
        "deep": (_of_schema(_deep(100_000), b"\2" * 10), [], [(unreadable, "RecursionError", "what is in it")]),
        "recursive": (_of_schema(recursive, b"\2" * 100_000 + b"\0"), [], [(unreadable, "n holds itself", "what")]),
        "endless": (_of_schema(nulls, b"\xfe" * 8 + b"\x7f"), [], [(unreadable, "items without bytes", "what is")]),
        "no-bytes": (_of_schema(empty_record, b"", 2**62), [], [(unreadable, "a record without bytes", "what is in")]),
        "bomb": (
            _of_schema(_text(whole), bomb.compress(bytes(100_001)) + bomb.flush(), 9, "deflate"),
            [],
            [(unreadable, "holds more than 100000 bytes", "9 of 9 packets")],
        ),
        "lsst-name": (_of_schema(lsst_name, b"\2"), [], [(unusable, "diaSource is no record", "the packet")]),
        "no-packets": (container([]), [], []),
        "no-candid": (container([_without(packet(0), candid=None)]), [], [(unusable, "candid", "the packet")]),
        "no-place": (container([_without(packet(0), ra=None)]), [], [(unusable, "candidate has no ra", "the packet")]),
        "candid-0": (container([_without(packet(0), candid=0) | {"candid": 0}]), [], [(unusable, "0 is none", "the")]),
        "visit-0": (container([_without(packet(0), pid=5)]), [], [(unusable, "visit 0: 0 is none", "the packet")]),
        "jd": (container([_without(packet(0), jd=58_000.0)]), [], [(unusable, "candidate.jd 58000.0", "the packet")]),
        "name": (container([packet(0) | {"objectId": "a/../b"}]), [], [(unusable, "objectId is not ZTF", "the")]),
        "other-bytes": (container([packet(0), packet(0)]), [0], []),
        "gzip-cut": (gzip.compress(whole)[:-6], list(range(6)), [(broken_file, "broken gzip", "the rest")]),
        "gzip-half": (
            gzip.compress(whole, 0)[:-1000],
            list(range(5)),
            [(broken_file, "broken gzip", "the rest"), (unreadable, "is broken", " bytes")],
        ),
        "gzip-not": (b"\x1f\x8b" + b"x" * 100, [], [(broken_file, "broken gzip", "what is in it")]),
        "gzip-of-nothing": (gzip.compress(b""), [], [(broken_file, "an empty file", "what is in it")]),
    }
    wanted = {}
    for name, (content, usable, problems) in contents.items():
        (folder / f"{name}.avro").write_bytes(content)
        wanted[f"{name}.avro"] = (usable, problems)
    return wanted | _bad_tars(folder, good)


def _bad_tars(folder: Path, good: dict[str, bytes]) -> dict[str, tuple[list[int], list[tuple[str, str, str]]]]:
    junk = {"README": b"not a packet", ".hidden.avro": b"x", "void.avro": b"", **good, "x.avro.gz": gzip.compress(b"x")}
    junk_tar = write_tar(folder / "junk.tar", junk).read_bytes()
    (folder / "junk.tar").write_bytes(junk_tar)
    neither = "neither an Avro container nor a wire message"
    whole = write_tar(folder / "cut.tar", good).read_bytes()
    third = whole.find(b"2.avro")
    (folder / "cut.tar").write_bytes(whole[: third + 512 + 500])
    (folder / "cut-header.tar").write_bytes(whole[: third + 200])
    (folder / "header.tar").write_bytes(whole[:third] + b"\xff" * 200 + whole[third + 200 :])
    # A tar behind a gzip that breaks off within the last member.
    packed = zlib.compressobj(0, wbits=31)
    (folder / "cut.tar.gz").write_bytes((packed.compress(whole) + packed.flush())[: third + 512 + 500])
    (folder / "empty.tar").write_bytes(write_tar(folder / "empty.tar", {}).read_bytes())
    with tarfile.open(folder / "links.tar", "w") as tar:
        for name, kind in (("a.avro", tarfile.SYMTYPE), ("b.avro", tarfile.FIFOTYPE), ("c", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    rest = [("UnreadablePackets", "cut off", " bytes"), ("UnreadablePackets", "", "what is in it")]
    return {
        "junk.tar": ([0, 1, 2], [("UnreadablePackets", neither, "what is in it")] * 2),
        "cut.tar": ([0, 1], [*rest, ("UnreadableFile", "", "the rest of the file")]),
        "cut-header.tar": ([0, 1], [("UnreadableFile", "the tar breaks off at byte", "the rest of the file")]),
        "header.tar": ([0, 1], [("UnreadableFile", "the tar breaks off at byte", "the rest of the file")]),
        "cut.tar.gz": ([0, 1], [("UnreadableFile", "broken gzip", "the rest"), *rest, ("UnreadableFile", "", "the")]),
        "empty.tar": ([], [("UnreadableFile", "nothing in it", "what is in it")]),
        "links.tar": ([], [("UnreadableFile", "nothing in it", "what is in it")]),
    }


def _offset(content: bytes, block: int) -> int:
    return [one.offset for one in container_blocks(content, container_header(content))][block]


def _text(content: bytes) -> str:
    return container_header(content).schema_text


def _indexed(sources: list[Path], folder: Path) -> PacketIndex:
    return index_packets(sources, folder / "index.parquet", folder / "spool")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of more than 100 kB are too large."""
    assert schemas.avro.container.MAX_UNPACKED_BYTES <= 10**9
    monkeypatch.setattr(schemas.avro.container, "MAX_UNPACKED_BYTES", 100_000)


@pytest.mark.usefixtures("small_blocks")
def test_of_every_bad_file_what_is_good_is_found_and_what_is_lost_is_told(tmp_path: Path) -> None:
    wanted = _bad_files(tmp_path / "bad")
    assert len(wanted) > 40
    other = tmp_path / "other.avro"
    other.write_bytes(container([packet(40)]))
    for name, (usable, problems) in wanted.items():
        index = _indexed([tmp_path / "bad" / name, other], tmp_path)
        assert index.n_packets == len(usable) + 1, name
        found = [(problem.error, problem.reason, problem.lost) for problem in index.manifest.problems]
        assert len(found) == len(problems), (name, found)
        for (error, words, lost), record in zip(problems, found, strict=True):
            assert record[0] == error and words in record[1] and lost in record[2], (name, found)
            assert record[1].startswith(name), (name, found)


@pytest.mark.usefixtures("small_blocks")
def test_bad_files_among_good_ones_cost_themselves_and_the_run_ends_with_exit_code_0(
    settings: list[str], replay: Any, tmp_path: Path
) -> None:
    base = tmp_path
    wanted = _bad_files(base / "bad")
    n_problems = sum(len(problems) for _, problems in wanted.values())
    (base / "bad" / "folder.avro").mkdir()
    (base / "bad" / "folder.avro" / "9.avro").write_bytes(container([packet(9)]))
    (base / "bad" / ".hidden").mkdir()
    (base / "bad" / ".hidden" / "10.avro").write_bytes(container([packet(10)]))
    other_content = _without(packet(0), magpsf=17.0)
    (base / "bad" / "zz-other.avro").write_bytes(container([other_content]))
    run = replay([base / "bad", base / "bad" / "cut.avro"], tmp_path / "out", "--kafka", "embedded", *settings)
    assert run.exit_code == 0, run.stderr
    assert "Traceback" not in run.stderr
    candids = {packet(number)["candid"] for number in (0, 1, 2, 3, 4, 5, 9)}
    assert {one["candid"] for one in run.packets("brokers/everyone")} == candids
    assert run.summary["alerts"] == 7 and run.summary["delivered"]["everyone"] == 7
    records = run.failures()
    # cut.avro is given twice, and one more file holds a packet that came before with other content.
    assert len(records) == n_problems + 1 == run.summary["failures"]
    (duplicate,) = [record for record in records if record["error"] == "DuplicatePacket"]
    assert f"diaSourceId {packet(0)['candid']} came before with different content" in duplicate["reason"]
    assert (duplicate["visit"], duplicate["detector"]) == (ztf_packets.FIRST_EXPOSURE, 0)


@pytest.mark.parametrize("name", ["empty", "text", "no-packets", "enum", "no-candid"])
def test_only_bad_files_are_refused_with_reasons_and_leave_nothing_behind(
    replay: Any, settings: list[str], tmp_path: Path, name: str
) -> None:
    wanted = _bad_files(tmp_path / "bad")[f"{name}.avro"]
    words = [wanted[1][0][1]] if wanted[1] else ["1 files hold none"]
    run = replay(tmp_path / "bad" / f"{name}.avro", tmp_path / "out", *settings)
    run.assert_refused(1, "no packet to replay", *words)
    assert not (tmp_path / "out").exists()


def test_folders_without_packets_pipes_and_what_is_not_there_are_refused(replay: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no packets")
    replay(tmp_path / "empty", tmp_path / "out").assert_refused(1, "no file named .avro")
    os.mkfifo(tmp_path / "pipe.avro")
    replay(tmp_path / "pipe.avro", tmp_path / "out").assert_refused(1, "neither a file nor a folder")
    replay(tmp_path / "nowhere", tmp_path / "out").assert_refused(2, "does not exist")
    assert not (tmp_path / "out").exists()


def test_packets_of_two_surveys_are_refused_with_a_file_of_each(
    first_run: Any, replay: Any, ztf_files: tuple[Path, Any], tmp_path: Path
) -> None:
    (ours,) = [next((first_run.out / "archive" / "alerts").rglob("*.avro"))]
    run = replay([ours, ztf_files[0] / "0.avro"], tmp_path / "out")
    run.assert_refused(1, f"packets of lsst ({ours.name}) and ztf (0.avro): replay one survey at a time")
    assert not (tmp_path / "out").exists()


def _vanish(path: Path) -> None:
    path.unlink()


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _swap(path: Path) -> None:
    path.write_bytes(container([packet(4)] if path.name == "0.avro" else [packet(5), packet(6)]))


def _other_schema(path: Path) -> None:
    path.write_bytes(_of_schema('{"type":"enum","name":"e","symbols":["a"]}', b"\0" * 4000))


@pytest.mark.parametrize("change", [_vanish, _shorten, _empty, _swap, _other_schema])
def test_a_file_that_changes_between_index_and_flow_costs_its_packets(
    replay: Any,
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
) -> None:
    files = tmp_path / "packets"
    files.mkdir()
    (files / "0.avro").write_bytes(container([packet(0)]))
    (files / "1.avro").write_bytes(container([packet(1), packet(2)]))
    (files / "3.avro").write_bytes(container([packet(3)]))

    def index_then_change(*arguments: Any) -> PacketIndex:
        index = index_packets(*arguments)
        change(files / "0.avro")
        change(files / "1.avro")
        return index

    monkeypatch.setattr(entries, "index_packets", index_then_change)
    run = replay(files, tmp_path / "out", *settings)
    assert run.exit_code == 0, run.stderr
    assert run.summary["alerts"] == 1
    assert [one["candid"] for one in run.packets("brokers/mirror")] == [packet(3)["candid"]]
    lost = {record["lost"]: record for record in run.failures()}
    assert sorted(lost) == [f"packet {packet(number)['candid']}" for number in range(3)]
    assert {record["stage"] for record in run.failures()} == {"replaying"}


# --- real packets ---------------------------------------------------------------------------------------


def _received(kafka: EmbeddedKafka, topic: str, spool: Path, play: Callable[[], Any]) -> tuple[Any, list[bytes]]:
    """What a reader of a topic gets, byte for byte, while something is played."""
    got: list[bytes] = []
    spool.mkdir()
    with BrokerReader("reader", kafka.bootstrap, topic, _visit_of, spool) as reader:
        run = play()
        receipt = reader.stop(run.summary["alerts"])
        reader.write(spool / "out", lambda path, messages: got.extend(messages))
    assert (receipt.repeats, receipt.malformed, receipt.lost, receipt.first_problem) == (0, 0, 0, None)
    return run, got


@needs_data
def test_every_packet_of_five_versions_of_ztf_is_found_and_read_byte_for_byte(tmp_path: Path) -> None:
    packets = DATA / "ztf_alerts" / "packets"
    index = _indexed([packets], tmp_path)
    assert (index.survey, index.n_packets, index.manifest.problems) == ("ztf", 457, ())
    read = set(_read_all(tmp_path / "index.parquet", index))
    in_tars = list(_members(packets))
    assert {name.split("_")[2] for name, _ in in_tars} == {"v1.8", "v3.1", "v3.3", "v4.01", "v4.02"}
    assert {content for _, content in in_tars} <= read and len(read) == 457


@needs_data
def test_every_packet_of_rubin_is_found_and_wire_messages_are_read_byte_for_byte(tmp_path: Path) -> None:
    packets = DATA / "rubin_alerts"
    index = _indexed([packets], tmp_path)
    assert (index.survey, index.n_packets, index.manifest.problems) == ("lsst", 200, ())
    messages = {path.read_bytes() for path in (packets / "wire_messages").glob("*.avro")}
    assert len(messages) == 3 and messages <= set(_read_all(tmp_path / "index.parquet", index))


def _read_all(path: Path, index: PacketIndex) -> Iterator[bytes]:
    reader = PacketReader(path)
    for visit in index.manifest.visits:
        for one in visit.detectors:
            for _, place in reader.places(visit.visit, one.detector):
                yield read_packet(place)


def _members(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                yield path.name, stream.read()


@needs_data
@pytest.mark.real_data
def test_all_packets_of_five_versions_of_ztf_go_out_as_they_are(
    replay: Any, settings: list[str], tmp_path: Path
) -> None:
    packets = DATA / "ztf_alerts" / "packets"
    with EmbeddedKafka() as kafka:
        run, got = _received(
            kafka,
            "ztf-alerts",
            tmp_path / "spool",
            lambda: replay(packets, tmp_path / "out", "--kafka", kafka.bootstrap, *settings),
        )
    assert run.exit_code == 0, run.stderr
    assert (run.summary["alerts"], len(got), run.failures()) == (457, 457, [])
    sent = set(got)
    in_tars = {content for _, content in _members(packets)}
    assert in_tars <= sent and len(in_tars) > 300
    # Fink's files hold many packets each: these go out alone, the same in content.
    shared = [one for path in packets.glob("*.avro") for one in read_container(path)]
    alone = {one["candid"]: one for one in map(decode_message, sent - in_tars)}
    assert {key: repr(one) for key, one in alone.items()} == {one["candid"]: repr(one) for one in shared}


@needs_data
@pytest.mark.real_data
def test_all_packets_of_rubin_go_out_as_they_are(replay: Any, settings: list[str], tmp_path: Path) -> None:
    packets = DATA / "rubin_alerts"
    with EmbeddedKafka() as kafka:
        run, got = _received(
            kafka,
            "full-stream",
            tmp_path / "spool",
            lambda: replay(packets, tmp_path / "out", "--kafka", kafka.bootstrap, *settings),
        )
    assert run.exit_code == 0, run.stderr
    messages = [path.read_bytes() for path in (packets / "wire_messages").glob("*.avro")]
    assert (run.summary["alerts"], len(got), run.failures()) == (200, 200, [])
    assert len(messages) == 3 and set(messages) <= set(got)
    shared = {one["diaSource"]["diaSourceId"]: one for path in packets.glob("*.avro") for one in read_container(path)}
    for message in set(got) - set(messages):
        one = decode_message(message)
        assert repr(shared.pop(one["diaSource"]["diaSourceId"])) == repr(one)
    assert shared == {}


def test_the_kafka_key_of_an_object_is_its_name_and_the_column_its_number() -> None:
    adapted = adapt_packet(packet(3))
    assert adapted.kafka_key == "ZTF18aaaaaad"
    assert adapted.record["diaObject"]["diaObjectId"] == object_number("ZTF18aaaaaad")


def test_an_index_of_nothing_is_an_error_that_counts_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.avro").write_bytes(container([]))
    (tmp_path / "b.avro").write_bytes(container([]))
    with pytest.raises(ManifestError, match="2 files hold none"):
        _indexed([tmp_path], tmp_path)

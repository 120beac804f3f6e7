"""`nightstream produce` over a simulated night: repeatable, causal, complete, and received by every broker."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Consumer, TopicPartition
from lsst.alert.packet import SchemaRegistry

from runners.cli import main
from runners.kafka import EmbeddedKafka, consumer_settings
from schemas.avro.container import read_container
from schemas.avro.wire import unwrap
from transforms import accounting
from transforms.failures import write_bytes

FIRST_DAY, SECOND_DAY = 20261122, 20261123
CONTRACT_KEYS = {
    "visits",
    "detectors",
    "dia_sources",
    "objects_new",
    "objects_updated",
    "ss_matches",
    "alerts",
    "delivered",
    "passed",
    "failures",
    "seconds",
}
MATCH_ARCSEC = 1.0
TABLES = ("dia_sources", "dia_objects", "dia_forced_sources", "ss_sources")


@pytest.fixture(scope="module")
def packets(first_run: Any) -> list[dict[str, Any]]:
    return first_run.packets()


@pytest.fixture(scope="module")
def night_tables(first_run: Any) -> dict[str, Any]:
    return {name: pq.read_table(first_run.out / "archive" / name) for name in TABLES}


@pytest.fixture(scope="module")
def truth(nights: dict[int, Path]) -> list[dict[str, Any]]:
    """What was injected into the first night."""
    rows = pq.read_table(nights[FIRST_DAY] / "truth" / "injected.parquet").to_pylist()
    return [row for row in rows if str(row["visit"]).startswith(str(FIRST_DAY))]


def test_a_night_gives_alerts_at_every_visit_and_no_failure(first_run: Any) -> None:
    summary = first_run.summary
    assert summary["visits"] == 4 and summary["detectors"] == 8 and summary["failures"] == 0
    assert summary["alerts"] > 50 and first_run.failures() == []
    ledger = [json.loads(line) for line in (first_run.out / "ledger" / "visits.jsonl").read_text().splitlines()]
    assert sum(record["alerts"] for record in ledger) == summary["alerts"]
    assert all(record["alerts"] > 0 and record["revision"] == 0 for record in ledger)


def test_shuffled_manifest_lines_give_the_same_bytes(
    first_run: Any, nights: dict[int, Path], visits: Any, produce: Callable[..., Any], night_of: Any, tmp_path: Path
) -> None:
    records = [visit for visit in visits if visit["day_obs"] == FIRST_DAY]
    random.Random(5).shuffle(records)
    night = night_of(tmp_path / "night", nights[FIRST_DAY], records)
    assert (night / "visits.jsonl").read_bytes() != (nights[FIRST_DAY] / "visits.jsonl").read_bytes()
    run = produce(night, tmp_path / "out", "--kafka", "embedded")
    folders = ("archive/alerts", "filters", "brokers")
    assert run.files(*folders) == first_run.files(*folders)
    assert len(run.files("brokers")) > len(run.files("archive/alerts")) > 0
    for name in TABLES:
        assert pq.read_table(run.out / "archive" / name) == pq.read_table(first_run.out / "archive" / name)


def test_the_same_run_again_into_the_same_folder_changes_nothing(
    first_run: Any, nights: dict[int, Path], produce: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(first_run.out, out)
    again = produce(nights[FIRST_DAY], out, "--kafka", "embedded")
    assert again.exit_code == 0, again.stderr
    folders = ("archive", "filters", "brokers")
    assert again.files(*folders) == first_run.files(*folders)
    changing = ("seconds", "latency_s", "latency")

    def ledger(run: Any) -> list[dict[str, Any]]:
        lines = (run.out / "ledger" / "visits.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in changing} for line in lines]

    assert ledger(again) == ledger(first_run)
    assert {**again.summary, "seconds": 0} == {**first_run.summary, "seconds": 0}


def test_another_input_into_the_same_folder_is_refused_and_leaves_it_alone(
    first_run: Any, nights: dict[int, Path], produce: Callable[..., Any], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("detection: {threshold_snr: 6.0}\n")
    before = first_run.files(".")
    for night, options in ((nights[SECOND_DAY], ()), (nights[FIRST_DAY], ("--config", config))):
        refused = produce(night, first_run.out, *options)
        assert refused.exit_code == 2
        assert "holds the output of another input" in refused.stderr and str(first_run.out) in refused.stderr
    assert first_run.files(".") == before


def test_a_run_that_broke_off_is_completed_by_the_same_command(
    first_run: Any, nights: dict[int, Path], produce: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    def fail_at_third(path: Path, content: bytes) -> None:
        if path.name.endswith("03.json"):
            raise OSError("disk full")
        write_bytes(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(accounting, "write_bytes", fail_at_third)
        broken = produce(nights[FIRST_DAY], tmp_path / "out", "--kafka", "embedded")
    assert broken.exit_code == 1 and broken.stdout == ""
    assert "the run failed: OSError: disk full" in " ".join(broken.stderr.split())
    done = sorted(path.name for path in (broken.out / "ledger").iterdir())
    assert done == [f"{FIRST_DAY}00001.json", f"{FIRST_DAY}00002.json"]
    again = produce(nights[FIRST_DAY], tmp_path / "out", "--kafka", "embedded")
    assert again.exit_code == 0, again.stderr
    folders = ("archive", "filters", "brokers")
    assert again.files(*folders) == first_run.files(*folders)
    assert {**again.summary, "seconds": 0} == {**first_run.summary, "seconds": 0}


def test_other_pixels_under_the_same_manifest_are_another_input(
    first_run: Any, nights: dict[int, Path], produce: Callable[..., Any], tmp_path: Path
) -> None:
    night = tmp_path / "night"
    shutil.copytree(nights[FIRST_DAY], night)
    image = next((night / "science").glob(f"{FIRST_DAY}*.fits"))
    content = bytearray(image.read_bytes())
    content[20_000] ^= 1
    image.write_bytes(content)
    refused = produce(night, first_run.out)
    assert refused.exit_code == 2 and "another input" in refused.stderr


def test_both_nights_in_one_run_equal_the_first_and_then_the_second_with_history(
    first_run: Any, two_nights: Path, nights: dict[int, Path], produce: Callable[..., Any], tmp_path: Path
) -> None:
    together = produce(two_nights, tmp_path / "together")
    second = produce(nights[SECOND_DAY], tmp_path / "second", "--history", first_run.out)
    assert together.exit_code == second.exit_code == 0
    for day, apart in ((FIRST_DAY, first_run), (SECOND_DAY, second)):
        for kind in ("alerts", *TABLES):
            night = f"archive/{kind}/day_obs={day}"
            assert together.files(night) == apart.files(night), night
            assert len(apart.files(night)) > 0
    later = second.packets()
    with_memory = [
        packet for packet in later if any(p["visit"] // 10**5 == FIRST_DAY for p in packet["prvDiaSources"] or ())
    ]
    assert len(with_memory) > 20


def test_without_history_the_second_night_knows_nothing_of_the_first(
    nights: dict[int, Path], visits: Any, night_of: Any, produce: Callable[..., Any], tmp_path: Path
) -> None:
    records = [visit for visit in visits if visit["day_obs"] == SECOND_DAY][:1]
    run = produce(night_of(tmp_path / "night", nights[SECOND_DAY], records), tmp_path / "out")
    assert run.summary["alerts"] > 0
    assert not any(packet["prvDiaSources"] for packet in run.packets())


def test_no_alert_refers_to_a_later_time(packets: list[dict[str, Any]]) -> None:
    n_earlier = n_forced = 0
    for packet in packets:
        trigger = packet["diaSource"]["midpointMjdTai"]
        earlier = [source["midpointMjdTai"] for source in packet["prvDiaSources"] or ()]
        forced = [source["midpointMjdTai"] for source in packet["prvDiaForcedSources"] or ()]
        assert all(time < trigger for time in earlier) and all(time <= trigger for time in forced)
        assert earlier == sorted(earlier) and forced == sorted(forced)
        n_earlier, n_forced = n_earlier + len(earlier), n_forced + len(forced)
    assert n_earlier > 50 and n_forced > 50


def test_counts_and_ids_in_packets_agree(packets: list[dict[str, Any]]) -> None:
    for packet in packets:
        source, known, moving = packet["diaSource"], packet["diaObject"], packet["ssSource"]
        assert packet["diaSourceId"] == source["diaSourceId"]
        assert (known is None) != (moving is None)
        if known is not None:
            earlier = packet["prvDiaSources"] or []
            assert known["nDiaSources"] == 1 + len(earlier)
            assert {one["diaObjectId"] for one in [source, *earlier]} == {known["diaObjectId"]}
            assert known["validityStartMjdTai"] == source["timeProcessedMjdTai"]
        else:
            assert moving["ssObjectId"] == source["ssObjectId"] and source["diaObjectId"] is None
        assert all(packet[f"cutout{kind}"] for kind in ("Difference", "Science", "Template"))


def test_an_object_has_at_most_one_source_in_a_visit_and_every_id_is_unique(packets: list[dict[str, Any]]) -> None:
    sources = [packet["diaSource"] for packet in packets]
    assert max(Counter(source["diaSourceId"] for source in sources).values()) == 1
    seen = Counter((source["visit"], source["diaObjectId"]) for source in sources if source["diaObjectId"] is not None)
    assert max(seen.values()) == 1
    moving = Counter((source["visit"], source["ssObjectId"]) for source in sources if source["ssObjectId"] is not None)
    assert max(moving.values()) == 1


def test_tables_agree_with_the_packets(packets: list[dict[str, Any]], night_tables: dict[str, Any]) -> None:
    sources = {row["diaSourceId"]: row for row in night_tables["dia_sources"].to_pylist()}
    alerted = {packet["diaSourceId"] for packet in packets}
    with_object = {
        key for key, row in sources.items() if row["diaObjectId"] is not None or row["ssObjectId"] is not None
    }
    assert alerted == with_object
    for packet in packets:
        row = sources[packet["diaSourceId"]]
        for name in ("psfFlux", "ra", "dec", "diaObjectId", "visit", "detector", "midpointMjdTai"):
            assert packet["diaSource"][name] == row[name], name
    objects = night_tables["dia_objects"].to_pylist()
    assert len({row["diaObjectId"] for row in objects}) == len(objects)
    counted = Counter(row["diaObjectId"] for row in sources.values() if row["diaObjectId"] is not None)
    assert {row["diaObjectId"]: row["nDiaSources"] for row in objects} == dict(counted)
    forced = night_tables["dia_forced_sources"]["diaForcedSourceId"].to_pylist()
    assert len(set(forced)) == len(forced) > 0


def test_every_embedded_reader_received_exactly_what_was_sent(first_run: Any) -> None:
    archive = {Path(path).name: content for path, content in first_run.files("archive/alerts").items()}
    bright = {Path(path).name: content for path, content in first_run.files("filters/demo.bright-new").items()}
    assert len(archive) == 4 and bright
    for broker in ("antares", "fink", "babamul", "archive-mirror"):
        received = {Path(path).name: content for path, content in first_run.files(f"brokers/{broker}").items()}
        assert received == archive, broker
    readers = {Path(path).name: content for path, content in first_run.files("brokers/bright-new-readers").items()}
    assert readers == bright
    assert first_run.summary["delivered"]["antares"] == len(first_run.packets())
    assert first_run.summary["delivered"]["bright-new-readers"] == first_run.summary["passed"]["demo.bright-new"]


def test_what_passed_a_filter_is_what_its_text_says(first_run: Any, packets: list[dict[str, Any]]) -> None:
    bright = [
        packet
        for packet in packets
        if packet["diaSource"]["snr"] > 10
        and packet["diaObject"] is not None
        and packet["diaObject"]["nDiaSources"] == 1
        and (packet["diaSource"]["reliability"] is None or packet["diaSource"]["reliability"] >= 0.5)
    ]
    passed = Counter(packet["diaSource"]["visit"] for packet in first_run.packets("filters/demo.bright-new"))
    wanted = Counter(packet["diaSource"]["visit"] for packet in bright)
    assert passed == {visit: min(count, 20) for visit, count in wanted.items()}
    assert max(passed.values()) <= 20


def test_messages_on_a_kafka_broker_are_read_by_lssts_own_client(
    nights: dict[int, Path], visits: Any, night_of: Any, produce: Callable[..., Any], tmp_path: Path
) -> None:
    night = night_of(tmp_path / "night", nights[FIRST_DAY], visits[:1])
    brokers = tmp_path / "brokers.yaml"
    brokers.write_text("brokers: [{name: lasair, topic: lsst-alerts-v11}]\n")
    with EmbeddedKafka() as kafka:
        run = produce(night, tmp_path / "out", "--kafka", kafka.bootstrap, "--brokers", brokers)
        assert run.exit_code == 0, run.stderr
        messages = list(_messages(kafka.bootstrap, "lsst-alerts-v11"))
        ledger = [json.loads(message.value()) for message in _messages(kafka.bootstrap, "alert-ledger")]
    schemas = SchemaRegistry.all_schemas_from_filesystem()
    decoded = {}
    for message in messages:
        value = message.value()
        schema_id, body = unwrap(value)
        assert value[0] == 0 and int.from_bytes(value[1:5], "big") == schema_id == 1100
        packet = schemas.get_by_id(schema_id).deserialize(body)
        source = packet["diaSource"]
        assert message.key() == str(source["diaObjectId"] or source["ssObjectId"]).encode()
        assert dict(message.headers())["dia_source_id"] == str(packet["diaSourceId"]).encode()
        decoded[packet["diaSourceId"]] = packet
    archived = {packet["diaSourceId"]: packet for packet in run.packets()}
    assert len(messages) == len(archived) == run.summary["delivered"]["lasair"] > 10
    np.testing.assert_equal(decoded, archived)  # NaN equals NaN here
    assert [record["alerts"] for record in ledger] == [len(archived)]


def _messages(bootstrap: str, topic: str) -> Iterator[Any]:
    """Everything on a topic now."""
    consumer = Consumer(consumer_settings(bootstrap, "test", from_beginning=True))
    try:
        for partition in consumer.list_topics(topic, timeout=10).topics[topic].partitions:
            place = TopicPartition(topic, partition, 0)
            _, end = consumer.get_watermark_offsets(place, timeout=10)
            consumer.assign([place])
            for _ in range(end):
                message = consumer.poll(10)
                assert message is not None and message.error() is None
                yield message
    finally:
        consumer.close()


def test_bright_transients_become_alerts_in_their_visit_and_are_counted(
    packets: list[dict[str, Any]], night_tables: dict[str, Any], truth: list[dict[str, Any]]
) -> None:
    by_visit: dict[int, list[dict[str, Any]]] = {}
    for packet in packets:
        by_visit.setdefault(packet["diaSource"]["visit"], []).append(packet)
    bright = [row for row in truth if row["kind"] == "transient" and row["snr"] > 10 and row["good_pixels"]]
    found = [(row, _nearest(row, by_visit.get(row["visit"], []))) for row in bright]
    recovered = [(row, packet) for row, packet in found if packet is not None]
    assert len(bright) > 50 and len(recovered) >= 0.95 * len(bright)

    # Objects whose every appearance is bright, clean and recovered: the n-th alert counts n detections.
    appearances: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row, packet in recovered:
        appearances.setdefault(row["object"], []).append((packet["diaSource"]["midpointMjdTai"], packet))
    injected = Counter(row["object"] for row in truth)
    complete = {name: rows for name, rows in appearances.items() if len(rows) == injected[name]}
    assert len(complete) > 5
    at_the_end = {row["diaObjectId"]: row["nDiaSources"] for row in night_tables["dia_objects"].to_pylist()}
    for name, rows in complete.items():
        alerts = [packet for _, packet in sorted(rows, key=lambda row: row[0])]
        assert len({packet["diaObject"]["diaObjectId"] for packet in alerts}) == 1, name
        assert [packet["diaObject"]["nDiaSources"] for packet in alerts] == list(range(1, len(rows) + 1)), name
        assert at_the_end[alerts[0]["diaObject"]["diaObjectId"]] == len(rows), name


def _nearest(row: dict[str, Any], packets: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The alert at an injected position, if one lies within `MATCH_ARCSEC` on the same detector."""
    best, best_arcsec = None, MATCH_ARCSEC
    for packet in packets:
        source = packet["diaSource"]
        if source["detector"] == row["detector"]:
            d_ra = (source["ra"] - row["ra"]) * np.cos(np.radians(row["dec"]))
            arcsec = 3600.0 * float(np.hypot(d_ra, source["dec"] - row["dec"]))
            if arcsec < best_arcsec:
                best, best_arcsec = packet, arcsec
    return best


def test_json_goes_to_stdout_with_the_agreed_keys_and_nothing_else_does(
    nights: dict[int, Path], visits: Any, night_of: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    night = night_of(tmp_path / "night", nights[FIRST_DAY], visits[:1])
    out = tmp_path / "out"
    main(["produce", str(night), "--out", str(out), "--json", "--kafka", "embedded"], standalone_mode=False)
    stdout = capfd.readouterr().out
    assert stdout.count("\n") == 1
    summary = json.loads(stdout)
    assert set(summary) == CONTRACT_KEYS
    assert summary["visits"] == 1 and summary["detectors"] == 2 and summary["failures"] == 0
    assert set(summary["delivered"]) == {"antares", "fink", "babamul", "bright-new-readers", "archive-mirror"}
    assert set(summary["passed"]) == {"demo.bright-new", "demo.rising-transient"}
    assert len(list(read_container(next((out / "archive" / "alerts").rglob("*.avro"))))) == summary["alerts"]


def test_the_output_folder_holds_what_the_contract_lists_and_no_leftovers(first_run: Any) -> None:
    top = {path.name for path in first_run.out.iterdir()}
    assert top == {"archive", "brokers", "filters", "ledger", "report", ".nightstream.json"}
    visible = [path for path in first_run.out.rglob("*") if path.name[0] in "._" and path.name != ".nightstream.json"]
    assert visible == []
    for kind in ("alerts", *TABLES):
        assert (first_run.out / "archive" / kind / f"day_obs={FIRST_DAY}").is_dir()
    for table in TABLES:
        for path in (first_run.out / "archive" / table).rglob("*.parquet"):
            assert "day_obs" not in pq.read_schema(path).names

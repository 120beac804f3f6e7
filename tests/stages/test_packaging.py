"""PackageAlerts on random batches: packets do not depend on how many are made at once, and none waits for the last."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from alert_batches import DETECTOR, VISIT, alert_batch
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp
from sample_alerts import random_records

from runners.kafka import DeliveryError
from schemas.avro.reading import decode_packet
from schemas.claim_check import read_blobs, write_blobs
from schemas.elements import AlertBatch, FailureRecord
from schemas.framing import unpack
from schemas.records import DIA_SOURCE
from transforms import packaging
from transforms.delivery import Delivery
from transforms.distribution import BrokerConfig, BrokerLimits
from transforms.packaging import PackageAlerts, PackagingConfig, cutout_file
from transforms.sending import Headers

AT = Timestamp(1000)


class _RecordingSink:
    """Keeps what it is sent, and how many packets lay in the packet store at that time."""

    def __init__(self, packets: Path) -> None:
        self.packets = packets
        self.sent: list[tuple[str, bytes | None, bytes, Headers]] = []
        self.files_seen: list[int] = []

    def open(self) -> None: ...

    def send(self, topic: str, key: bytes | None, value: bytes, headers: Headers) -> None:
        self.sent.append((topic, key, value, headers))
        self.files_seen.append(len(list(self.packets.rglob("*.packets"))))

    def flush(self, deadline_s: float) -> tuple[int, int]:
        self.flushed_at = time.time()
        return 0, 0

    def close(self) -> None: ...


class _DeafSink(_RecordingSink):
    """Acknowledges nothing at first."""

    hears = False

    def flush(self, deadline_s: float) -> tuple[int, int]:
        if not self.hears:
            raise DeliveryError("no answer")
        return super().flush(deadline_s)


def _package(
    batch: AlertBatch,
    store: Path,
    sink: _RecordingSink | None,
    cutouts: str | None = None,
    limits: BrokerLimits | None = None,
) -> tuple[list[tuple[pa.Table, dict[str, Any], list[int]]], list[FailureRecord]]:
    """What packaging yields: thin table, header and the lengths of the table buffers; and the failure records."""
    brokers = (BrokerConfig(name="a", topic="alerts", limits=limits or BrokerLimits()),)
    delivery = Delivery(out=str(store), store=str(store), brokers=brokers, filters=(), sink=sink)
    package = PackageAlerts(PackagingConfig(), cutouts, delivery).package
    package.setup()
    package.start_bundle()
    failures = [one.value for one in package.process(batch, AT) if isinstance(one, TaggedOutput)]
    parts = []
    for output in package.finish_bundle():
        assert (output.timestamp, output.windows, output.value[0]) == (AT, (GlobalWindow(),), VISIT)
        header, buffers = unpack(output.value[1])
        assert header["kind"] == "alerts"
        lengths = [len(buffer) for buffer in buffers[1:]]
        parts.append((pa.ipc.open_stream(buffers[0]).read_all(), header, lengths))
    return parts, failures


@pytest.mark.parametrize("at_once", [1, 7, 40])
def test_packets_do_not_depend_on_how_many_are_made_at_once(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = alert_batch(40, seed=3)
    usual = _RecordingSink(tmp_path / "a" / "packets")
    ((thin, header, lengths),), failures = _package(batch, tmp_path / "a", usual)
    monkeypatch.setattr(packaging, "_ALERTS_AT_ONCE", at_once)
    other = _RecordingSink(tmp_path / "b" / "packets")
    ((other_thin, other_header, other_lengths),), other_failures = _package(batch, tmp_path / "b", other)
    assert usual.sent == other.sent
    assert [message[3] for message in usual.sent] == [
        [("dia_source_id", str(dia_source_id).encode())] for dia_source_id in batch.dia_sources["diaSourceId"]
    ]
    assert thin.drop_columns(["packetFile"]) == other_thin.drop_columns(["packetFile"])
    assert header["counts"] == other_header["counts"] == {"objects_new": 40}
    assert lengths == other_lengths
    assert lengths[0] == (40 + 2) * DIA_SOURCE.itemsize
    assert failures == other_failures == []
    assert len(set(other_thin["packetFile"].to_pylist())) == -(-40 // at_once)


def test_a_batch_goes_on_when_its_packets_are_acknowledged_and_says_when(tmp_path: Path) -> None:
    began = time.time()
    batch = replace(alert_batch(3, seed=4), fired_at=began)
    sink = _RecordingSink(tmp_path / "packets")
    ((_, header, _),), _ = _package(batch, tmp_path, sink)
    times = header["times"]
    assert began == times["fired_at"] <= times["associated_at"] <= sink.flushed_at <= times["acknowledged_at"]


def test_nothing_goes_on_of_a_bundle_that_was_not_acknowledged(tmp_path: Path) -> None:
    sink = _DeafSink(tmp_path / "packets")
    delivery = Delivery(out=str(tmp_path), store=str(tmp_path), brokers=(), filters=(), sink=sink)
    package = PackageAlerts(PackagingConfig(), None, delivery).package
    package.setup()
    package.start_bundle()
    assert list(package.process(alert_batch(3, seed=4), AT)) == []
    with pytest.raises(DeliveryError):
        next(iter(package.finish_bundle()))
    # The bundle is made once more, by the same worker: nothing of the first attempt is left.
    sink.hears = True
    package.start_bundle()
    assert list(package.process(alert_batch(3, seed=4), AT)) == []
    assert len(list(package.finish_bundle())) == 1


def test_the_first_packet_is_out_before_the_last_is_made(tmp_path: Path) -> None:
    n = 3 * packaging._ALERTS_AT_ONCE
    sink = _RecordingSink(tmp_path / "packets")
    _package(alert_batch(n, seed=4), tmp_path, sink)
    assert len(sink.sent) == n
    assert (sink.files_seen[0], sink.files_seen[-1]) == (1, 3)


def test_alerts_that_cannot_be_encoded_are_told_and_the_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaging, "_ALERTS_AT_ONCE", 10)
    encode = packaging.encode_packets

    def refuse_5012(schema: Any, columns: Any, **how: Any) -> list[bytes]:
        if 5012 in columns.dia_sources["diaSourceId"]:
            raise ValueError("a value that has no bytes")
        return encode(schema, columns, **how)

    monkeypatch.setattr(packaging, "encode_packets", refuse_5012)
    ((thin, _, lengths),), (failure,) = _package(alert_batch(40, seed=5), tmp_path, None)
    assert thin["diaSourceId"].to_pylist() == [*range(5000, 5010), *range(5020, 5040)]
    assert lengths[0] == (40 + 2) * DIA_SOURCE.itemsize  # the sources are archived all the same
    assert (failure.visit, failure.stage, failure.lost) == (VISIT, "packaging", "10 alerts of sky cell 7")


def test_alerts_made_in_several_goes_are_told_of_in_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of equal parts are equal, and repeats of a record are dropped."""
    monkeypatch.setattr(packaging, "_ALERTS_AT_ONCE", 10)
    encode = packaging.encode_packets

    def refuse_below_5020(schema: Any, columns: Any, **how: Any) -> list[bytes]:
        if columns.dia_sources["diaSourceId"][0] < 5020:
            raise ValueError("a value that has no bytes")
        return encode(schema, columns, **how)

    monkeypatch.setattr(packaging, "encode_packets", refuse_below_5020)
    _, failures = _package(alert_batch(35, seed=5), tmp_path, None, str(tmp_path / "nowhere"))
    assert [failure.lost for failure in failures] == ["cutouts of 35 alerts", "20 alerts of sky cell 7"]


def test_alerts_go_without_cutouts_that_cannot_be_read(tmp_path: Path) -> None:
    batch = alert_batch(5, seed=6)
    ids = batch.dia_sources["diaSourceId"]
    stamps = [(b"difference %d" % key, b"", b"template") for key in ids]
    write_blobs(cutout_file(str(tmp_path / "cutouts"), VISIT, DETECTOR), ids, stamps)
    whole, without = _RecordingSink(tmp_path / "a"), _RecordingSink(tmp_path / "b")
    assert _package(batch, tmp_path / "a", whole, str(tmp_path / "cutouts"))[1] == []
    _, (failure,) = _package(batch, tmp_path / "b", without, str(tmp_path / "nowhere"))
    assert failure.lost == "cutouts of 5 alerts"
    for key, with_stamps, bare in zip(ids, whole.sent, without.sent, strict=True):
        difference = b"difference %d" % key
        assert with_stamps[2].endswith(
            b"\x02" + bytes([2 * len(difference)]) + difference + b"\x00" + b"\x02\x10template"
        )
        assert bare[2].endswith(b"\x00\x00\x00")


def test_a_batch_without_alerts_gives_its_table_rows(tmp_path: Path) -> None:
    ((thin, header, lengths),), failures = _package(alert_batch(0, seed=7), tmp_path, None)
    assert (len(thin), failures, header["counts"]) == (0, [], {"objects_new": 0})
    assert lengths[0] == 2 * DIA_SOURCE.itemsize


def test_a_packet_beyond_the_topics_limit_goes_without_its_oldest_history(tmp_path: Path) -> None:
    batch = _with_long_history(alert_batch(6, seed=8), alert=2, n_forced=1000)
    sink = _RecordingSink(tmp_path / "a" / "packets")
    ((thin, header, _),), failures = _package(batch, tmp_path / "a", sink, limits=BrokerLimits(message_bytes=50_000))
    assert header["shipped"] == {"trimmed": {"alerts": 1}, "too_large": {}}
    assert failures == []
    (name,) = set(thin["packetFile"].to_pylist())
    for row, (_, _, value, headers) in enumerate(sink.sent):
        ((kept,),) = read_blobs(tmp_path / "a" / "packets" / name, batch.dia_sources["diaSourceId"][row : row + 1])
        if row != 2:
            assert value == kept
            continue
        assert 48_000 < len(value) <= 50_000
        whole, sent = decode_packet(kept), decode_packet(value)
        n = len(sent["prvDiaForcedSources"])
        assert headers[1:] == [("trimmed", f"prvDiaForcedSources={1000 - n}".encode())]
        assert repr(sent["prvDiaForcedSources"]) == repr(whole["prvDiaForcedSources"][1000 - n :])
        assert len(whole["prvDiaForcedSources"]) == 1000


def test_a_packet_too_large_without_history_is_told_and_stays_in_the_store(tmp_path: Path) -> None:
    batch = alert_batch(6, seed=8)
    ids = batch.dia_sources["diaSourceId"]
    stamps = [(bytes(60_000) if key == 5001 else b"small", b"", b"") for key in ids]
    write_blobs(cutout_file(str(tmp_path / "cutouts"), VISIT, DETECTOR), ids, stamps)
    sink = _RecordingSink(tmp_path / "packets")
    ((thin, header, _),), (failure,) = _package(
        batch, tmp_path, sink, str(tmp_path / "cutouts"), BrokerLimits(message_bytes=50_000)
    )
    assert header["shipped"] == {"trimmed": {}, "too_large": {"alerts": 1}}
    assert (failure.visit, failure.error, failure.lost) == (VISIT, "PacketTooLargeError", "packet 5001 on topic alerts")
    assert [dict(message[3])["dia_source_id"] for message in sink.sent] == [b"5000", b"5002", b"5003", b"5004", b"5005"]
    assert thin["diaSourceId"].to_pylist() == ids.tolist()


def _with_long_history(batch: AlertBatch, alert: int, n_forced: int) -> AlertBatch:
    """The same alerts, one of them an object's with many forced measurements and all others without any."""
    forced = random_records("diaForcedSource", n_forced, np.random.default_rng(9))
    forced["midpointMjdTai"] = np.sort(np.random.default_rng(9).uniform(60_000.0, 61_000.0, n_forced))
    offsets = np.where(np.arange(len(batch.dia_sources) + 1) > alert, n_forced, 0)
    batch.dia_sources["diaObjectId"][alert] = 77
    return replace(batch, prv_forced_sources=forced, forced_offsets=offsets)

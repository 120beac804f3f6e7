"""GatherVisits, FilterAlerts and DistributeAlerts on hand-made batches."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import fastavro
import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing import test_stream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import TimestampedValue

from schemas.avro.encoding import encode_packets
from schemas.avro.messages import Packet, wire_message
from schemas.avro.schema_versions import packet_schema
from schemas.claim_check import write_blobs
from schemas.elements import AlertBatch, FailureRecord, VisitAlerts
from schemas.framing import pack, unpack
from schemas.records import (
    DIA_FORCED_SOURCE,
    DIA_OBJECT,
    DIA_SOURCE,
    SS_SOURCE,
    empty_records,
)
from transforms.accounting import AccountVisits
from transforms.alert_columns import thin_alerts
from transforms.cutouts import detector_account
from transforms.delivery import Delivery
from transforms.distribution import BrokerConfig, DistributeAlerts, Shipment, full_streams
from transforms.failures import failure_part
from transforms.filtering import FilterAlerts, GatherVisits, visit_alerts
from transforms.filters.checking import CheckedFilter, check_filter
from transforms.filters.definition import FilterDefinition
from transforms.packaging import _alert_columns, acknowledged_part, packet_file, visit_part

VISIT = 2026112200001
MIDPOINT = 61367.1


@pytest.fixture
def bright() -> CheckedFilter:
    return check_filter(FilterDefinition(name="bright", owner="demo", where="diaSource.snr > 10", max_per_visit=3))


def _batch(first_id: int, n: int, cell: int = 7) -> AlertBatch:
    sources = empty_records(DIA_SOURCE, n)
    sources["diaSourceId"] = first_id + np.arange(n)
    sources["diaObjectId"] = sources["diaSourceId"]
    sources["visit"], sources["midpointMjdTai"], sources["band"] = VISIT, MIDPOINT, b"r"
    sources["snr"] = 5.0 + 3.0 * np.arange(n)
    objects = empty_records(DIA_OBJECT, n)
    objects["diaObjectId"], objects["nDiaSources"] = sources["diaObjectId"], 1
    nothing = np.zeros(n + 1, dtype=np.int64)
    context = {
        "visit": VISIT,
        "cell": cell,
        "day_obs": 20261122,
        "band": "r",
        "midpoint_mjd_tai": MIDPOINT,
        "readout_end_mjd_tai": MIDPOINT + 2e-4,
        "observation_reason": None,
        "target_name": None,
        "detectors": [0],
    }
    return AlertBatch(
        context=context,
        dia_sources=sources,
        prv_dia_sources=empty_records(DIA_SOURCE, 0),
        prv_offsets=nothing,
        prv_forced_sources=empty_records(DIA_FORCED_SOURCE, 0),
        forced_offsets=nothing,
        dia_objects=objects,
        ss_sources=empty_records(SS_SOURCE, n),
        object_states=objects,
        unassociated=empty_records(DIA_SOURCE, 0),
        forced_sources=empty_records(DIA_FORCED_SOURCE, 0),
        counts={"objects_new": n, "objects_updated": 0, "sources_without_object": 0, "association_us": 5},
    )


def _part(
    batch: AlertBatch, columns: frozenset[str], packets: Path | None = None, associated_at: float | None = None
) -> bytes:
    n, ids = len(batch.dia_sources), batch.dia_sources["diaSourceId"]
    schema = packet_schema("11.0")
    bodies = encode_packets(schema, _alert_columns(batch, ([None] * n, [None] * n, [None] * n), None))
    name = packet_file(VISIT, batch.context["cell"], ids)
    if packets is not None:
        write_blobs(packets / name, ids, [(wire_message(Packet(schema, body)),) for body in bodies])
    thin = thin_alerts(batch, name, ["digest"] * n, columns)
    return visit_part(batch, thin, 0.01, Shipment().counts(), associated_at)


def _ids(visit: VisitAlerts) -> list[int]:
    return visit.alerts["diaSourceId"].to_pylist()


def test_visit_is_the_same_whatever_the_order_of_its_parts(bright: CheckedFilter) -> None:
    parts = [_part(_batch(first, 4, cell), bright.columns) for first, cell in ((100, 1), (200, 2), (300, 3))]
    one = visit_alerts(VISIT, 0, {0: set(parts)}, bright.columns)
    other = visit_alerts(VISIT, 0, {0: set(reversed(parts))}, bright.columns)
    assert one.alerts.equals(other.alerts)
    assert one.tables["dia_sources"].tobytes() == other.tables["dia_sources"].tobytes()
    assert _ids(one) == sorted(_ids(one))
    assert len(one.alerts) == 12


def test_alert_that_arrives_in_two_parts_counts_once(bright: CheckedFilter) -> None:
    whole, repeat = _part(_batch(100, 4), bright.columns), _part(_batch(102, 2), bright.columns)
    visit = visit_alerts(VISIT, 1, {0: {whole}, 1: {repeat}}, bright.columns)
    assert _ids(visit) == [100, 101, 102, 103]
    assert visit.alerts["revision"].to_pylist() == [0, 0, 0, 0]


def test_repeated_parts_of_a_visit_are_gathered_once(bright: CheckedFilter) -> None:
    part = (VISIT, _part(_batch(100, 3), bright.columns))
    failure = (VISIT, failure_part(FailureRecord(VISIT, 1, "subtraction", "NoTemplateError", "none", "all")))
    elements = [TimestampedValue(element, 1000.0) for element in (part, part, failure, part)]
    with beam.Pipeline(runner=FnApiRunner()) as flow:
        told = (
            flow
            | beam.Create(elements)
            | "Stamp" >> beam.Map(lambda element: element).with_output_types(tuple[int, bytes])
            | GatherVisits(bright.columns)
            | "Tell" >> beam.Map(lambda visit: (visit.visit, visit.revision, _ids(visit), len(visit.failures)))
        )
        assert_that(told, equal_to([(VISIT, 0, [100, 101, 102], 1)]))


def test_late_part_makes_a_revision_that_knows_both(bright: CheckedFilter) -> None:
    early, late = (VISIT, _part(_batch(100, 2, 1), bright.columns)), (VISIT, _part(_batch(200, 2, 2), bright.columns))
    stream = (
        test_stream.TestStream()
        .advance_watermark_to(0)
        .add_elements([TimestampedValue(early, 1000.0)])
        .advance_watermark_to(2000)
        .add_elements([TimestampedValue(late, 1000.0)])
        .advance_watermark_to(3000)
        .advance_watermark_to_infinity()
    )
    options = beam.options.pipeline_options.PipelineOptions([], streaming=True)
    with beam.Pipeline(runner="BundleBasedDirectRunner", options=options) as flow:
        told = (
            flow
            | stream.with_output_types(tuple[int, bytes])
            | GatherVisits(bright.columns)
            | beam.Map(lambda visit: (visit.revision, _ids(visit), visit.alerts["revision"].to_pylist()))
        )
        assert_that(told, equal_to([(0, [100, 101], [0, 0]), (1, [100, 101, 200, 201], [0, 0, 1, 1])]))


def test_parts_made_for_other_filters_have_the_columns_of_these() -> None:
    """A job that goes on with other filters finds parts of before, with columns of then and without those of now."""
    before, now = frozenset({"diaSource.snr", "diaObject.ra"}), frozenset({"diaSource.snr", "diaSource.psfFlux"})
    early, late = _batch(1, 3), _batch(10, 2, cell=8)
    late.dia_sources["psfFlux"] = 7.0
    visit = visit_alerts(VISIT, 1, {0: {_part(early, before)}, 1: {_part(late, now)}}, now)
    assert _ids(visit) == [1, 2, 3, 10, 11]
    sources = visit.alerts["diaSource"].to_pylist()
    assert [one["snr"] for one in sources] == [5.0, 8.0, 11.0, 5.0, 8.0]
    assert [one["psfFlux"] for one in sources] == [None] * 3 + [7.0] * 2
    assert "diaObject" not in visit.alerts.column_names


def _check_visit(visit: VisitAlerts, transform: beam.PTransform, tell: Any, expected: Any) -> None:
    """Run one visit through a stage and compare what `tell` says of the result."""
    with beam.Pipeline(runner=FnApiRunner()) as flow:
        made = flow | beam.Create([0]) | "Make" >> beam.Map(lambda _: visit).with_output_types(VisitAlerts)
        result = made | transform
        assert_that(result.good | "Tell" >> beam.Map(tell), equal_to([expected]))


def test_cap_holds_over_revisions(bright: CheckedFilter) -> None:
    # S/N 5, 8, 11, 14: two of four pass in each part; the cap of three leaves room for one late alert.
    parts = {0: {_part(_batch(100, 4, 1), bright.columns)}, 1: {_part(_batch(200, 4, 2), bright.columns)}}
    visit = visit_alerts(VISIT, 1, parts, bright.columns)
    expected = ([103, 102, 203], {"demo.bright": {"seen": 8, "passed": 3, "capped": 1, "error": None}})
    _check_visit(
        visit, FilterAlerts((bright,)), lambda v: (v.passed["demo.bright"].tolist(), v.summary["filters"]), expected
    )


@dataclass(frozen=True)
class _FileSink:
    """Writes what it is given as lines of a file, as sinks are pickled."""

    path: str

    def open(self) -> None: ...

    def close(self) -> None: ...

    def flush(self, deadline_s: float) -> tuple[int, int]:
        return 0, 0

    def send(self, topic: str, key: bytes | None, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        with Path(self.path).open("a") as stream:
            stream.write(f"{topic} {(key or b'').decode()} {dict(headers)['dia_source_id'].decode()}\n")


@dataclass(frozen=True)
class _RecordSink(_FileSink):
    """Writes topic, key and value."""

    def send(self, topic: str, key: bytes | None, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        with Path(self.path).open("a") as stream:
            stream.write(json.dumps([topic, (key or b"").decode(), value.decode()]) + "\n")


def test_filtered_topic_is_sent_once_and_files_hold_the_same_packets(bright: CheckedFilter, tmp_path: Path) -> None:
    part = _part(_batch(100, 4), bright.columns, tmp_path / "packets")
    visit = visit_alerts(VISIT, 0, {0: {part}}, bright.columns)
    visit.passed["demo.bright"] = np.array([103, 102])
    brokers = (
        BrokerConfig(name="a", stream="demo.bright", topic="t"),
        BrokerConfig(name="b", stream="demo.bright", topic="t"),
        BrokerConfig(name="c", sink="files"),
    )
    distribute = DistributeAlerts(
        brokers,
        packet_folder=str(tmp_path / "packets"),
        broker_folder=str(tmp_path / "brokers"),
        filter_folder=str(tmp_path / "filters"),
        sink=_FileSink(str(tmp_path / "sent")),
        delivery_deadline_s=1.0,
    )
    _check_visit(visit, distribute, lambda v: v.summary["delivered"], {"a": 2, "b": 2, "c": 4})
    assert (tmp_path / "sent").read_text().splitlines() == ["t 103 103", "t 102 102"]
    for folder, ids in (("filters/demo.bright", [102, 103]), ("brokers/c", [100, 101, 102, 103])):
        with (tmp_path / folder / f"{VISIT}.avro").open("rb") as stream:
            assert [packet["diaSourceId"] for packet in fastavro.reader(stream)] == ids


@pytest.fixture
def measured() -> CheckedFilter:
    select = "diaSource.psfFlux AS flux, diaObject.ra, len(prvDiaSources) AS n_earlier"
    return check_filter(
        FilterDefinition(name="measured", owner="demo", select=select, where="diaSource.snr > 10", max_per_visit=3)
    )


def _delivery(brokers: tuple[BrokerConfig, ...], filters: tuple[CheckedFilter, ...], folder: Path) -> Delivery:
    return Delivery(str(folder), str(folder / "store"), brokers, filters)


def test_alerts_in_json_hold_the_columns_of_their_filter_and_need_no_packet(
    measured: CheckedFilter, tmp_path: Path
) -> None:
    brokers = (
        BrokerConfig(name="lasair", stream="demo.measured", encoding="json-thin"),
        BrokerConfig(name="folder", stream="demo.measured", encoding="json-thin", sink="files"),
        BrokerConfig(name="everything", encoding="json-thin", sink="files"),
    )
    to = _delivery(brokers, (measured,), tmp_path)
    early, late = _batch(2**60 + 1, 4, 1), _batch(2**60 + 11, 4, 2)
    early.dia_sources["psfFlux"] = [1.0, 2.0, 3.5, np.nan]
    early.dia_sources["ra"], early.dia_sources["dec"] = 150.25, -2.5
    late.dia_sources["diaObjectId"], late.dia_sources["ssObjectId"] = 0, 2**61
    parts = {0: {_part(early, to.filter_columns)}, 1: {_part(late, to.filter_columns)}}
    visit = visit_alerts(VISIT, 1, parts, to.filter_columns)
    with beam.Pipeline(runner=FnApiRunner()) as flow:
        made = flow | beam.Create([0]) | "Make" >> beam.Map(lambda _: visit).with_output_types(VisitAlerts)
        filtered = made | FilterAlerts(to.filters)
        filtered.good | DistributeAlerts(
            to.brokers,
            packet_folder=str(tmp_path / "nowhere"),
            broker_folder=str(tmp_path / "brokers"),
            filter_folder=str(tmp_path / "filters"),
            sink=_RecordSink(str(tmp_path / "sent")),
            delivery_deadline_s=1.0,
        )
    sent = [json.loads(line) for line in (tmp_path / "sent").read_text().splitlines()]
    # S/N 14 and 11 of the first part, 14 of the second: only that is new in revision 1.
    ((topic, key, value),) = sent
    assert (topic, key) == ("filter-demo-measured", str(2**61))
    assert json.loads(value) == {
        "diaObjectId": None,
        "objectId": None,
        "ssObjectId": str(2**61),
        "diaSourceId": str(2**60 + 14),
        "visit": VISIT,
        "ra": None,
        "dec": None,
        "time": MIDPOINT,
        "flux": None,
        "n_earlier": 0,
        "UTC": "2026-11-23 02:23:23",
    }
    lines = (tmp_path / "brokers" / "folder" / f"{VISIT}.jsonl").read_text().splitlines()
    alerts = [json.loads(line) for line in lines]
    assert [(one["diaSourceId"], one["flux"]) for one in alerts] == [
        (str(2**60 + 3), 3.5),
        (str(2**60 + 4), None),
        (str(2**60 + 14), None),
    ]
    assert [(one["objectId"], one["ra"], one["dec"]) for one in alerts[:1]] == [(str(2**60 + 3), 150.25, -2.5)]
    assert lines[2] == value
    every = (tmp_path / "brokers" / "everything" / f"{VISIT}.jsonl").read_text().splitlines()
    assert [json.loads(line)["diaSourceId"] for line in every] == visit.alerts["diaSourceId"].cast("string").to_pylist()
    assert "flux" not in every[0]


def test_missing_packet_file_is_a_failure_of_that_broker_only(bright: CheckedFilter, tmp_path: Path) -> None:
    visit = visit_alerts(VISIT, 0, {0: {_part(_batch(100, 4), bright.columns)}}, bright.columns)
    distribute = DistributeAlerts(
        (BrokerConfig(name="c", sink="files"), BrokerConfig(name="k", topic="t")),
        packet_folder=str(tmp_path / "nowhere"),
        broker_folder=str(tmp_path / "brokers"),
        filter_folder=str(tmp_path / "filters"),
        sink=_FileSink(str(tmp_path / "sent")),
        delivery_deadline_s=1.0,
    )
    expected = ({"c": 0, "k": 4}, [("distribution", "4 packets to c")])
    _check_visit(
        visit, distribute, lambda v: (v.summary["delivered"], [(one.stage, one.lost) for one in v.failures]), expected
    )


def test_repeated_detector_with_other_clocks_makes_no_revision(bright: CheckedFilter) -> None:
    first, again = (detector_account(0, 5, 4, started_at) for started_at in (1000.0, 2000.0))
    stream = (
        test_stream.TestStream()
        .advance_watermark_to(0)
        .add_elements([TimestampedValue((VISIT, first), 1000.0)])
        .advance_watermark_to(2000)
        .add_elements([TimestampedValue((VISIT, again), 1000.0)])
        .advance_watermark_to(3000)
        .advance_watermark_to_infinity()
    )
    options = beam.options.pipeline_options.PipelineOptions([], streaming=True)
    with beam.Pipeline(runner="BundleBasedDirectRunner", options=options) as flow:
        told = (
            flow
            | stream.with_output_types(tuple[int, bytes])
            | GatherVisits(bright.columns)
            | beam.Map(lambda visit: visit.revision)
        )
        assert_that(told, equal_to([0]))


def test_the_ledger_adds_up_what_each_rule_dropped_and_merges_the_sky_sources(bright: CheckedFilter) -> None:
    skies: tuple[dict[str, float], ...] = (
        {"measured": 100, "pull_width": 0.9},
        {"measured": 80, "pull_width": 1.3},
        {},
    )
    rules = ({"fast trail": 1, "off image": 0}, {"fast trail": 2, "off image": 5}, {"beyond max_sources": 7})
    parts = {
        detector_account(detector, 20, 10, 1000.0, rejected=rejected, sky_sources=sky)
        for detector, (rejected, sky) in enumerate(zip(rules, skies, strict=True))
    }
    summary = visit_alerts(VISIT, 0, {0: parts}, bright.columns).summary
    assert summary["dia_sources"]["rejected"] == {"fast trail": 3, "off image": 5, "beyond max_sources": 7}
    assert summary["sky_sources"] == {"measured": 180, "pull_width": pytest.approx(1.1)}
    without = visit_alerts(VISIT, 0, {0: {detector_account(0, 5, 4, 1000.0)}}, bright.columns).summary
    assert without["sky_sources"] is None


def _earlier(part: bytes, *lacking: str) -> bytes:
    """The part as a release made it that knew nothing of some of its fields."""
    header, buffers = unpack(part)
    return pack({key: value for key, value in header.items() if key not in lacking}, tuple(map(bytes, buffers)))


def test_parts_of_a_job_begun_by_an_earlier_release_are_gathered_without_their_latency(bright: CheckedFilter) -> None:
    batch = replace(_batch(100, 4), fired_at=30.0)
    alerts = acknowledged_part(_part(batch, bright.columns, associated_at=31.0), 33.0)
    account = detector_account(0, 5, 4, 11.0, announced_at=10.0)
    whole = visit_alerts(VISIT, 0, {0: {alerts, account}}, bright.columns)
    assert whole.summary["latency"]["total"]["p50"] == 23.0
    for parts in (
        {_earlier(alerts, "times"), account},
        {alerts, _earlier(account, "announced_at", "ended_at")},
    ):
        earlier = visit_alerts(VISIT, 0, {0: parts}, bright.columns)
        assert earlier.summary == {**whole.summary, "latency": None}
        assert earlier.alerts.equals(whole.alerts)


def test_clocks_do_not_decide_the_order_of_batches(bright: CheckedFilter) -> None:
    """Of two parts that hold one object the one that comes last stands: by cell and detectors, whoever was first.

    Nor does it matter how many digits a time has, on which the length of a part depends.
    """
    one, other = _batch(100, 4, cell=1), _batch(100, 4, cell=2)
    other.object_states["nDiaSources"] = 2
    kept = []
    for first, second in ((10.0, 20.123456), (20.123456, 10.0)):
        parts = {
            acknowledged_part(_part(replace(batch, fired_at=at), bright.columns, associated_at=at), at)
            for batch, at in ((one, first), (other, second))
        }
        kept.append(visit_alerts(VISIT, 0, {0: parts}, bright.columns).tables["dia_objects"].tobytes())
    assert kept[0] == kept[1]


def test_topic_in_two_encodings_is_refused() -> None:
    brokers = (BrokerConfig(name="a", topic="t"), BrokerConfig(name="b", topic="t", encoding="ocf"))
    with pytest.raises(ValueError, match="a topic holds one stream in one encoding"):
        full_streams(brokers)


def test_brokers_with_one_topic_share_one_stream() -> None:
    brokers = (BrokerConfig(name="a", topic="t"), BrokerConfig(name="b", topic="t"), BrokerConfig(name="c", topic="u"))
    assert [stream.topic for stream in full_streams(brokers)] == ["t", "u"]


def test_part_of_a_batch_holds_no_packet_bytes(bright: CheckedFilter) -> None:
    part = _part(_batch(100, 3), bright.columns)
    header, buffers = unpack(part)
    assert header["counts"] == {"objects_new": 3, "objects_updated": 0, "sources_without_object": 0}
    assert len(buffers) == 5


@pytest.mark.parametrize("sweeps", [False, True])
def test_the_ledger_of_a_live_job_rids_the_stores_of_old_visits(sweeps: bool, tmp_path: Path) -> None:
    old, young = (tmp_path / "store" / "packets" / name for name in ("1", "2"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (1e9, 1e9))
    visit = visit_alerts(VISIT, 0, {0: {_part(_batch(100, 2), frozenset())}}, frozenset())
    visit = replace(visit, summary={**visit.summary, "delivered": {}, "filters": {}})
    account = AccountVisits(
        str(tmp_path / "ledger"),
        streams=(),
        sink=None,
        delivery_deadline_s=1.0,
        store=str(tmp_path / "store") if sweeps else None,
    ).account
    account.setup()
    list(account.process(visit))
    assert old.exists()  # not at once: whoever goes on after a pause may still want it
    account.swept_at -= 3600.0
    list(account.process(visit))
    assert (old.exists(), young.exists()) == (not sweeps, True)

"""Archived packets in today's field names: formulas on packets made by hand, and every sample of the shared data."""

from __future__ import annotations

import copy
import io
import math
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.time import Time
from hypothesis import given, settings
from hypothesis import strategies as st
from lsst.alert.packet import SchemaRegistry
from sample_alerts import random_batch

from schemas import ztf
from schemas.avro.adaptation import AdaptedPacket, adapt_packet, adapted_table
from schemas.avro.encoding import AlertColumns, encode_packets
from schemas.avro.reading import decode_body
from schemas.avro.schema_versions import VERSIONS, packet_schema
from schemas.avro.wire import PacketFormatError, unwrap
from schemas.tables import ALERT_COLUMNS, ALERT_ID, alert_fields, project_alerts_schema

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}")

ALL_COLUMNS = frozenset(
    {ALERT_ID} | {f"{column}.{field}" for column in ALERT_COLUMNS for field in alert_fields(column)}
)
FLOAT32 = 2.0**-24  # relative rounding error
ZTF_MJD = 58_423.0
ZTF_JD = ZTF_MJD + 2_400_000.5
UTC_TO_TAI_S = 37.0  # since 2017
OBJECT_NUMBER = 18 * 26**7 + 1 * 26 + 25  # ZTF18aaaaabz


def _candidate(**changes: Any) -> dict[str, Any]:
    return {
        "jd": ZTF_JD, "fid": 2, "pid": 669000001215, "candid": 669000001215010001, "isdiffpos": "t", "rcid": 12,
        "field": 300, "xpos": 101.5, "ypos": 1.0, "ra": 150.25, "dec": -2.5, "magpsf": 20.0, "sigmapsf": 0.1,
        "magap": 19.5, "sigmagap": 0.1, "rb": 0.9, "drb": 0.99, "ssdistnr": -999.0, "ssmagnr": -999.0,
        "ssnamenr": "null", "ndethist": 3, "jdstarthist": ZTF_JD - 10.0, "jdendhist": ZTF_JD, "exptime": 30.0,
    } | changes  # fmt: skip


def _upper_limit(**changes: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("candid", "isdiffpos", "xpos", "ypos", "ra", "dec", "magpsf", "sigmapsf", "rcid"))
    return {"jd": ZTF_JD - 5.0, "fid": 1, "pid": 664000001215, "diffmaglim": 20.5} | nothing | changes


def _earlier(days: float, **changes: Any) -> dict[str, Any]:
    pid = 669000001215 - int(days) * 10**9
    row = _candidate(jd=ZTF_JD - days, pid=pid, candid=pid * 10**6, **changes)
    del row["exptime"]
    return row


def _forced(days: float, **changes: Any) -> dict[str, Any]:
    return {
        "field": 300, "rcid": 12, "fid": 1, "pid": 669000001215 - int(days) * 10**9, "magzpsci": 26.4,
        "exptime": 30.0, "jd": ZTF_JD - days, "forcediffimflux": 100.0, "forcediffimfluxunc": 10.0, "procstatus": "0",
    } | changes  # fmt: skip


def _ztf(candidate: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    candidate = _candidate() if candidate is None else candidate
    packet = {"schemavsn": "4.02", "objectId": "ZTF18aaaaabz", "candid": candidate["candid"], "candidate": candidate}
    return packet | {"prv_candidates": None, "fp_hists": None} | changes


def _lsst_source(**changes: Any) -> dict[str, Any]:
    return {
        "diaSourceId": 7001, "visit": 2026030500055, "detector": 140, "diaObjectId": 6001, "ssObjectId": 0,
        "parentDiaSourceId": 0, "midpointMjdTai": 61105.0936, "ra": 63.35, "dec": -47.18, "x": 10.0, "y": 20.0,
        "psfFlux": 1500.0, "snr": 12.5, "band": "i", "isNegative": False, "psfNdata": 441, "bboxSize": 30,
    } | changes  # fmt: skip


def _lsst_forced(**changes: Any) -> dict[str, Any]:
    return {
        "diaForcedSourceId": 8001, "diaObjectId": 6001, "ra": 63.35, "dec": -47.18, "visit": 2026021800060,
        "detector": 134, "psfFlux": 900.0, "midpointMjdTai": 61090.05, "band": "i",
    } | changes  # fmt: skip


def _lsst(source: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    source = _lsst_source() if source is None else source
    return {
        "diaSourceId": source.get("diaSourceId"),
        "diaSource": source,
        "diaObject": {"diaObjectId": 6001, "ra": 63.35, "dec": -47.18, "nDiaSources": 2},
        "ssSource": None,
        "prvDiaSources": [_lsst_source(diaSourceId=6001, midpointMjdTai=61090.05)],
        "prvDiaForcedSources": [_lsst_forced()],
    } | changes


# ---- ZTF


def test_flux_error_and_significance_follow_from_the_magnitude() -> None:
    source = adapt_packet(_ztf()).record["diaSource"]
    flux = 10.0 ** (0.4 * (31.4 - 20.0))
    assert flux == pytest.approx(36_307.8, abs=0.1)  # 3631 Jy at AB 0
    relative = 0.1 * math.log(10.0) / 2.5
    assert source["psfFlux"] == pytest.approx(flux, rel=1e-12)
    assert source["psfFluxErr"] == pytest.approx(flux * relative, rel=1e-12)
    assert source["snr"] == pytest.approx(1.0 / relative, rel=1e-12)


@pytest.mark.parametrize(("spelling", "sign"), [("t", 1), ("1", 1), (True, 1), (1, 1), ("f", -1), ("0", -1), (0, -1)])
def test_sign_of_the_flux_is_that_of_isdiffpos_in_every_spelling(spelling: object, sign: int) -> None:
    source = adapt_packet(_ztf(_candidate(isdiffpos=spelling))).record["diaSource"]
    assert math.copysign(1, source["psfFlux"]) == sign
    assert source["isNegative"] == (sign < 0)
    assert source["psfFluxErr"] > 0


@pytest.mark.parametrize(("said", "exposure_s"), [(30.0, 30.0), (300.0, 300.0), (None, 30.0), (-999.0, 30.0)])
def test_midpoint_is_the_start_in_tai_and_half_the_exposure(said: float | None, exposure_s: float) -> None:
    packet = adapt_packet(_ztf(_candidate(exptime=said)))
    midpoint = ZTF_MJD + (UTC_TO_TAI_S + exposure_s / 2) / 86_400.0
    assert packet.midpoint_mjd_tai == pytest.approx(midpoint, abs=2 * np.spacing(ZTF_MJD))
    assert packet.exposure_time_s == packet.record["diaSource"]["exposureTime"] == exposure_s


def test_packets_without_exptime_have_the_public_surveys_exposure() -> None:
    candidate = _candidate()
    del candidate["exptime"]
    assert adapt_packet(_ztf(candidate)).exposure_time_s == 30.0


@given(st.lists(st.floats(2_441_318.0, 2_461_800.0), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_times_equal_astropys(start: list[float]) -> None:
    jd = np.array(start)
    expected = Time(jd, format="jd", scale="utc").tai.mjd + 0.5 * 30.0 / 86_400.0
    assert (ztf.midpoint_mjd_tai(jd, 30.0) == expected).all()
    assert ztf.midpoint_mjd_tai(start[0], 30.0) == expected[0]


def test_identity_of_a_ztf_packet_is_that_of_the_detections_table() -> None:
    packet = adapt_packet(_ztf())
    assert (packet.survey, packet.dia_source_id) == ("ztf", 669000001215010001)
    assert (packet.visit, packet.detector, packet.band) == (66900000, 12, "r")
    assert packet.kafka_key == "ZTF18aaaaabz"
    assert packet.record["diaSource"]["diaObjectId"] == packet.record["diaObject"]["diaObjectId"] == OBJECT_NUMBER


def test_pixels_count_from_zero() -> None:
    source = adapt_packet(_ztf()).record["diaSource"]
    assert (source["x"], source["y"]) == (100.5, 0.0)


def test_what_ztf_measures_otherwise_is_null() -> None:
    record = adapt_packet(_ztf()).record
    assert {"reliability", "apFlux", "apFluxErr", "extendedness", "psfChi2"}.isdisjoint(record["diaSource"])
    assert {"ra", "dec", "r_psfFluxMean", "validityStartMjdTai"}.isdisjoint(record["diaObject"])


def test_object_has_ztfs_count_and_first_and_last_time() -> None:
    packet = adapt_packet(_ztf())
    dia_object = packet.record["diaObject"]
    assert dia_object["nDiaSources"] == 3
    assert dia_object["lastDiaSourceMjdTai"] == packet.midpoint_mjd_tai
    assert dia_object["firstDiaSourceMjdTai"] == pytest.approx(packet.midpoint_mjd_tai - 10.0, abs=1e-9)


def test_history_holds_the_detections_in_order_of_time_and_no_upper_limits() -> None:
    rows = [_earlier(2, isdiffpos="0"), _upper_limit(), _earlier(9, fid=1), _earlier(4, magpsf=None)]
    packet = adapt_packet(_ztf(prv_candidates=rows))
    history = packet.record["prvDiaSources"]
    assert [row["diaSourceId"] for row in history] == [rows[2]["candid"], rows[0]["candid"]]
    assert [row["band"] for row in history] == ["g", "r"]
    assert [row["isNegative"] for row in history] == [False, True]
    assert packet.midpoint_mjd_tai - history[1]["midpointMjdTai"] == pytest.approx(2.0, abs=1e-9)
    assert all(row["diaObjectId"] == OBJECT_NUMBER for row in history)


def test_forced_points_are_dn_at_their_zero_point_and_failures_are_left_out() -> None:
    bad = [
        _forced(3, procstatus="61", forcediffimflux=-99999.0, forcediffimfluxunc=-99999.0),
        _forced(4, procstatus="56"),
        _forced(5, forcediffimflux=-99999.0),
        _forced(6, magzpsci=None),
        _forced(7, forcediffimfluxunc=0.0),
    ]
    negative = _forced(8, forcediffimflux=-5.0, fid=2)
    points = adapt_packet(_ztf(fp_hists=[_forced(1), *bad, negative])).record["prvDiaForcedSources"]
    assert [point["band"] for point in points] == ["r", "g"]
    njy = 10.0 ** (0.4 * (31.4 - 26.4))  # exactly 100
    assert points[1]["psfFlux"] == pytest.approx(100.0 * njy, rel=1e-12)
    assert points[1]["psfFluxErr"] == pytest.approx(10.0 * njy, rel=1e-12)
    assert points[0]["psfFlux"] == pytest.approx(-5.0 * njy, rel=1e-12)
    assert len({point["diaForcedSourceId"] for point in points}) == 2
    assert "ra" not in points[0]


@pytest.mark.parametrize(
    ("distance", "name", "matched"),
    [
        (0.0, "95042", True),
        (5.0, "2019UU119", True),
        (6.0, "95042", False),
        (-999.0, "null", False),
        (0.0, "null", False),
        (None, None, False),
        (0.0, None, False),
        (None, "95042", False),
    ],
)
def test_a_solar_system_object_within_5_arcsec_is_a_match(
    distance: float | None, name: str | None, matched: bool
) -> None:
    candidate = _candidate(ssdistnr=distance, ssnamenr=name, ssmagnr=19.9)
    packet = adapt_packet(_ztf(candidate, prv_candidates=[_earlier(3)], fp_hists=[_forced(3)]))
    record = packet.record
    assert (record["ssSource"] is not None) == (record["diaObject"] is None) == matched
    assert bool(record["prvDiaSources"]) == bool(record["prvDiaForcedSources"]) == (not matched)
    assert packet.kafka_key == "ZTF18aaaaabz"
    if matched:
        assert record["ssSource"] == {
            "diaSourceId": packet.dia_source_id,
            "ssObjectId": record["diaSource"]["ssObjectId"],
            "designation": name,
            "ephOffset": distance,
            "ephVmag": 19.9,
        }
        assert "diaObjectId" not in record["diaSource"]


def test_solar_system_numbers_are_of_the_name_alone_and_differ() -> None:
    names = ["1", "11", "95042", "2019UU119", "C/2019Y4", "P/2010H2-with-a-long-tail"]
    numbers = [ztf.ss_object_number(name) for name in names]
    assert len(set(numbers)) == len(names)
    assert all(0 < number < 2**63 for number in numbers)
    assert numbers == [ztf.ss_object_number(name) for name in names]


@given(st.from_regex("ZTF[0-9]{2}[a-z]{7}", fullmatch=True), st.from_regex("ZTF[0-9]{2}[a-z]{7}", fullmatch=True))
def test_object_numbers_give_the_name_back_and_keep_the_order(one: str, other: str) -> None:
    assert ztf.object_name(ztf.object_number(one)) == one
    assert (ztf.object_number(one) < ztf.object_number(other)) == (one < other)


@pytest.mark.parametrize(
    "name", ["ZTF18aaaaaa", "ZTF18aaaaaaaa", "ztf18aaaaaaa", "ZTF18AAAAAAA", "ZTF١٨aaaaaaa", " ZTF18aaaaaaa", ""]
)
def test_other_names_are_no_ztf_objects(name: str) -> None:
    with pytest.raises(ValueError, match="objectId is not"):
        ztf.object_number(name)


@pytest.mark.parametrize("number", [-1, 100 * 26**7])
def test_other_numbers_are_no_ztf_objects(number: int) -> None:
    with pytest.raises(ValueError, match="not of a ZTF object"):
        ztf.object_name(number)


# ---- LSST


def test_an_lsst_packet_passes_by_name() -> None:
    packet = adapt_packet(_lsst())
    assert (packet.survey, packet.dia_source_id, packet.visit, packet.detector) == ("lsst", 7001, 2026030500055, 140)
    assert (packet.band, packet.midpoint_mjd_tai, packet.exposure_time_s) == ("i", 61105.0936, None)
    ids_that_mean_none = {"ssObjectId", "parentDiaSourceId"}
    assert packet.record["diaSource"] == {
        name: value for name, value in _lsst_source().items() if name not in ids_that_mean_none
    }
    assert packet.record["prvDiaForcedSources"] == [_lsst_forced()]
    assert adapt_packet(_lsst(_lsst_source(exposureTime=30.0))).exposure_time_s == 30.0


@pytest.mark.parametrize("absent", [None, "missing"])
def test_absent_records_are_none_and_absent_lists_are_empty(absent: str | None) -> None:
    packet = _lsst()
    for name in ("diaObject", "ssSource", "prvDiaSources", "prvDiaForcedSources"):
        if absent is None:
            packet[name] = None
        else:
            del packet[name]
    record = adapt_packet(packet).record
    assert record["diaObject"] is record["ssSource"] is None
    assert record["prvDiaSources"] == record["prvDiaForcedSources"] == []


def test_a_record_of_nulls_is_null() -> None:
    nulls = {"diaObject": dict.fromkeys(alert_fields("diaObject")), "ssSource": dict.fromkeys(alert_fields("ssSource"))}
    record = adapt_packet(_lsst(**nulls)).record
    assert record["diaObject"] is record["ssSource"] is None


@pytest.mark.parametrize(
    ("changes", "dia_object", "ss_source", "key"),
    [
        ({}, {"diaObjectId": 6001}, None, "6001"),
        ({"diaObjectId": None}, {"diaObjectId": 6001}, None, "6001"),
        ({"diaObjectId": 0, "ssObjectId": 5001}, None, {"ssObjectId": 5001}, "5001"),
        ({"diaObjectId": 0}, None, {"ssObjectId": 5001}, "5001"),
        ({"diaObjectId": 0}, None, None, "7001"),
    ],
)
def test_the_key_is_the_objects_id(changes: Any, dia_object: Any, ss_source: Any, key: str) -> None:
    packet = _lsst(_lsst_source(**changes), diaObject=dia_object, ssSource=ss_source)
    assert adapt_packet(packet).kafka_key == key


def test_histories_are_put_in_order_of_time_and_id() -> None:
    order = [(61090.0, 3), (61090.0, 5), (61095.0, 1)]
    sources = [_lsst_source(midpointMjdTai=time, diaSourceId=key) for time, key in reversed(order)]
    forced = [_lsst_forced(midpointMjdTai=time, diaForcedSourceId=key) for time, key in reversed(order)]
    record = adapt_packet(_lsst(prvDiaSources=sources, prvDiaForcedSources=forced)).record
    assert [(row["midpointMjdTai"], row["diaSourceId"]) for row in record["prvDiaSources"]] == order
    assert [(row["midpointMjdTai"], row["diaForcedSourceId"]) for row in record["prvDiaForcedSources"]] == order


def test_names_of_versions_7_and_8_become_those_of_today() -> None:
    moment = datetime(2025, 8, 15, 23, 51, 33, 464614, tzinfo=UTC)
    mjd = Time(moment, scale="utc").tai.mjd
    source = _lsst_source(is_negative=True, time_processed=moment)
    del source["isNegative"]
    forced = _lsst_forced(time_processed=moment.replace(tzinfo=None))
    record = adapt_packet(
        _lsst(source, diaObject={"diaObjectId": 6001, "validityStart": moment}, prvDiaForcedSources=[forced])
    ).record
    assert record["diaSource"]["isNegative"] is True
    two_roundings = 2 * np.spacing(mjd)
    for value in (
        record["diaSource"]["timeProcessedMjdTai"],
        record["diaObject"]["validityStartMjdTai"],
        record["prvDiaForcedSources"][0]["timeProcessedMjdTai"],
    ):
        assert value == pytest.approx(mjd, abs=two_roundings, rel=0)


def test_solar_system_fields_of_version_9_become_those_of_today() -> None:
    old = {
        "ssObjectId": 5001, "diaSourceId": None, "eclipticLambda": 346.0, "galacticB": -72.0, "heliocentricDist": 2.5,
        "topocentricDist": 1.5, "predictedVMagnitude": 20.5, "phaseAngle": 16.8, "residualRa": -1.0 / 3600.0,
        "residualDec": 2.0 / 3600.0, "heliocentricX": 2.0, "topocentricZ": -1.0, "topocentricVY": 0.01,
    }  # fmt: skip
    ss_source = adapt_packet(_lsst(_lsst_source(dec=60.0, diaObjectId=0), diaObject=None, ssSource=old)).record[
        "ssSource"
    ]
    assert ss_source == {
        "ssObjectId": 5001,
        "diaSourceId": 7001,
        "eclLambda": 346.0,
        "galLat": -72.0,
        "helioRange": 2.5,
        "topoRange": 1.5,
        "ephVmag": 20.5,
        "phaseAngle": 16.8,
        "ephOffsetRa": pytest.approx(-0.5, rel=1e-12),  # arcsec on the sky, at declination 60
        "ephOffsetDec": pytest.approx(2.0, rel=1e-12),
        "helio_x": 2.0,
        "topo_z": -1.0,
        "topo_vy": pytest.approx(0.01 * 149_597_870.7 / 86_400.0, rel=1e-12),
    }


def test_places_in_radians_of_version_7_are_null_and_others_stay() -> None:
    in_radians = _lsst_forced(ra=math.radians(63.35), dec=math.radians(-47.18))
    packet = _lsst(alertId=7001, prvDiaForcedSources=[in_radians, _lsst_forced(diaForcedSourceId=8002)])
    points = adapt_packet(packet).record["prvDiaForcedSources"]
    assert [(point.get("ra"), point.get("dec")) for point in points] == [(None, None), (63.35, -47.18)]


def test_places_across_0_degrees_are_near() -> None:
    source = _lsst_source(ra=359.9999)
    packet = _lsst(source, alertId=7001, prvDiaForcedSources=[_lsst_forced(ra=0.0001)])
    assert adapt_packet(packet).record["prvDiaForcedSources"][0]["ra"] == 0.0001


def _valid_batch(n: int, seed: int) -> AlertColumns:
    """A random batch with the ids, times, places and bands that an alert cannot be without."""
    rng = np.random.default_rng(seed)
    batch = random_batch(n, rng)
    for rows, key in ((batch.dia_sources, "diaSourceId"), (batch.prv_dia_sources, "diaSourceId")):
        rows[key] = rng.integers(1, 2**62, len(rows))
        rows["visit"], rows["detector"] = rng.integers(1, 2**50, len(rows)), rng.integers(0, 200, len(rows))
        rows["midpointMjdTai"] = np.sort(rng.uniform(50_000.0, 70_000.0, len(rows)))
        rows["ra"], rows["dec"] = rng.uniform(0.0, 360.0, len(rows)), rng.uniform(-90.0, 90.0, len(rows))
        rows["band"], rows["exposureTime"] = b"z", 30.0
    batch.prv_forced["diaForcedSourceId"] = rng.integers(1, 2**62, len(batch.prv_forced))
    batch.prv_forced["midpointMjdTai"] = np.sort(rng.uniform(50_000.0, 70_000.0, len(batch.prv_forced)))
    batch.prv_forced["diaObjectId"] = rng.integers(1, 2**62, len(batch.prv_forced))
    batch.dia_objects["diaObjectId"] = rng.integers(1, 2**62, n)
    batch.ss_sources["ssObjectId"] = rng.integers(1, 2**62, n)
    batch.ss_sources["diaSourceId"] = batch.dia_sources["diaSourceId"]
    for rows, name in ((batch.dia_sources, "diaObjectId"), (batch.dia_sources, "ssObjectId")):
        rows[name] = np.abs(rows[name] // 2)
    return batch


def _same(left: Any, right: Any) -> bool:
    """Equality in which NaN equals NaN."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right) and (left == right or (left != left and right != right))


def _without_nulls(values: dict[str, Any] | None) -> dict[str, Any] | None:
    return values if values is None else {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_packets_of_ours_adapt_to_themselves(version: str, seed: int) -> None:
    schema = packet_schema(version)
    packets = [decode_body(schema, body) for body in encode_packets(schema, _valid_batch(3, seed))]
    adapted = [adapt_packet(packet) for packet in packets]
    rows = adapted_table([one.record for one in adapted], ALL_COLUMNS).to_pylist()
    for packet, one, row in zip(packets, adapted, rows, strict=True):
        assert row.pop(ALERT_ID) == packet["diaSource"]["diaSourceId"]
        for column, (_, is_list) in ALERT_COLUMNS.items():
            sent = packet[column]
            if is_list:
                sent = [_without_nulls(values) for values in sent or []]
                assert _same(one.record[column], sent)
                assert _same([_without_nulls(values) for values in row[column]], sent)
            else:
                assert _same(one.record[column], _without_nulls(sent))
                assert _same(_without_nulls(row[column]), _without_nulls(sent))


# ---- refusals

BROKEN = [
    (list, "a packet is a record, got list"),
    (lambda: {"alert": 1}, r"neither LSST's packet \(diaSource\) nor ZTF's \(candidate\): fields \['alert'\]"),
    (lambda: _lsst(diaSource=3), "diaSource is no record: 3"),
    (lambda: _lsst(_lsst_source(diaSourceId=None)), "diaSource has no diaSourceId"),
    (lambda: _lsst(_lsst_source(diaSourceId=1.5)), r"diaSource\.diaSourceId is no whole number: 1\.5"),
    (lambda: _lsst(_lsst_source(diaSourceId=2**63)), r"diaSource\.diaSourceId 9223372036854775808 is outside"),
    (lambda: _lsst(_lsst_source(visit=None, ccdVisitId=5)), "ccdVisitId but no visit: versions before 7.0"),
    (lambda: _lsst(_lsst_source(visit=None)), "diaSource has no visit"),
    (lambda: _lsst(_lsst_source(detector=True)), r"diaSource\.detector is no whole number: True"),
    (lambda: _lsst(_lsst_source(ra=math.inf)), r"diaSource\.ra inf is outside \[0\.0, 360\.0\]"),
    (lambda: _lsst(_lsst_source(dec=math.nan)), "diaSource has no dec"),
    (lambda: _lsst(_lsst_source(dec="12")), r"diaSource\.dec is no number: '12'"),
    (lambda: _lsst(_lsst_source(midpointMjdTai=1480360995.0)), r"midpointMjdTai 1480360995\.0 is outside"),
    (lambda: _lsst(_lsst_source(band="Y")), r"diaSource\.band 'Y' is none of u, g, r, i, z, y"),
    (lambda: _lsst(_lsst_source(exposureTime="30")), r"diaSource\.exposureTime is no number: '30'"),
    (lambda: _lsst(diaObject={"ra": 1.0}), "diaObject has no diaObjectId"),
    (lambda: _lsst(prvDiaSources={}), r"prvDiaSources is no list: \{\}"),
    (lambda: _lsst(prvDiaSources=[_lsst_source(), None]), r"prvDiaSources\[1\] is no record: None"),
    (lambda: _lsst(prvDiaSources=[_lsst_source(midpointMjdTai=10**400)]), r"prvDiaSources\[0\]\.midpointMjdTai 10+"),
    (lambda: _lsst(prvDiaForcedSources=[{}]), r"prvDiaForcedSources\[0\] has no diaForcedSourceId"),
    (lambda: _ztf(objectId=None), "objectId is no text: None"),
    (lambda: _ztf(objectId="ZTF18"), "objectId is not ZTF, two digits of the year, seven small letters: 'ZTF18'"),
    (lambda: _ztf(candid=5), "candid 5 is not the candidate's, 669000001215010001"),
    (lambda: _ztf(_candidate(candid=None)), "candidate has no candid"),
    (lambda: _ztf(_candidate(pid="x")), r"candidate\.pid is no whole number: 'x'"),
    (lambda: _ztf(_candidate(rcid=None)), "candidate has no rcid"),
    (lambda: _ztf(_candidate(fid=4)), r"candidate\.fid 4 is none of 1, 2, 3"),
    (lambda: _ztf(_candidate(isdiffpos=None)), r"candidate\.isdiffpos is none of t, f, 1, 0: None"),
    (lambda: _ztf(_candidate(jd=58423.0)), r"candidate\.jd 58423\.0 is outside"),
    (lambda: _ztf(_candidate(magpsf="20")), r"candidate\.magpsf is no number: '20'"),
    (lambda: _ztf(_candidate(sigmapsf=-1.0)), r"candidate\.sigmapsf -1\.0 is outside"),
    (lambda: _ztf(prv_candidates=[_upper_limit(), _earlier(1, ra=None)]), r"prv_candidates\[1\] has no ra"),
    (lambda: _ztf(fp_hists=[_forced(1, jd=None)]), r"fp_hists\[0\] has no jd"),
    (lambda: _ztf(_candidate(ra=10**5000)), r"candidate\.ra int is outside"),
]


@pytest.mark.parametrize(("packet", "message"), BROKEN)
def test_what_lacks_identity_place_time_or_band_is_refused_with_field_and_value(packet: Any, message: str) -> None:
    with pytest.raises(PacketFormatError, match=message):
        adapt_packet(packet())


def test_a_magnitude_that_is_missing_leaves_the_fluxes_null() -> None:
    source = adapt_packet(_ztf(_candidate(magpsf=-999.0, sigmapsf=None))).record["diaSource"]
    assert {"psfFlux", "psfFluxErr", "snr"}.isdisjoint(source)


@pytest.mark.parametrize(
    ("column", "place", "name", "value", "message"),
    [
        ("diaSource", None, "psfFlux", "1", r"alert 7001: diaSource\.psfFlux is no float: '1'"),
        ("diaSource", None, "psfNdata", 2**31, r"alert 7001: diaSource\.psfNdata is no int32: 2147483648"),
        (
            "diaSource",
            None,
            "parentDiaSourceId",
            2**63,
            r"diaSource\.parentDiaSourceId is no int64: 9223372036854775808",
        ),
        ("diaSource", None, "isDipole", 1, r"diaSource\.isDipole is no bool: 1"),
        ("diaSource", None, "reliabilityVersion", 3, r"diaSource\.reliabilityVersion is no string: 3"),
        ("diaObject", None, "nDiaSources", 1.5, r"diaObject\.nDiaSources is no int32: 1\.5"),
        ("prvDiaSources", 0, "x", [1.0], r"alert 7001: prvDiaSources\[0\]\.x is no float: \[1\.0\]"),
        ("prvDiaForcedSources", 0, "band", b"\xff", r"prvDiaForcedSources\[0\]\.band is no string"),
        ("diaSource", None, "reliabilityVersion", "\ud800", r"diaSource\.reliabilityVersion is no string"),
    ],
)
def test_a_value_that_its_column_cannot_hold_is_named(
    column: str, place: int | None, name: str, value: Any, message: str
) -> None:
    packet = _lsst()
    (packet[column] if place is None else packet[column][place])[name] = value
    fine, bad = adapt_packet(_lsst(_lsst_source(diaSourceId=7000))).record, adapt_packet(packet).record
    with pytest.raises(PacketFormatError, match=message):
        adapted_table([fine, bad], ALL_COLUMNS)
    others = ALL_COLUMNS - {f"{column}.{name}"}
    assert adapted_table([fine, bad], others).num_rows == 2  # nobody asked for that field


def test_the_table_has_the_columns_asked_for_and_nulls_where_the_packet_has_none() -> None:
    columns = frozenset({"diaSource.snr", "diaSource.apFlux", "diaObject.nDiaSources", "ssSource.ssObjectId"})
    lone = _lsst(_lsst_source(diaSourceId=7002), diaObject=None)
    table = adapted_table([adapt_packet(packet).record for packet in (_lsst(), lone)], columns)
    assert table.schema == project_alerts_schema(columns)
    assert table.to_pylist() == [
        {
            "diaSource": {"diaSourceId": 7001, "snr": 12.5, "apFlux": None},
            "diaObject": {"nDiaSources": 2},
            "ssSource": None,
        },
        {"diaSource": {"diaSourceId": 7002, "snr": 12.5, "apFlux": None}, "diaObject": None, "ssSource": None},
    ]
    assert adapted_table([], columns).schema == project_alerts_schema(columns)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-(2**63), 2**63, 10**400, 0, -999, -99999])
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=3)
    | st.datetimes(timezones=st.sampled_from([None, UTC])),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=2),
    max_leaves=4,
)
SEEDS_OF_CHAOS = {
    "lsst": _lsst(
        alertId=7001,
        diaSource=_lsst_source(exposureTime=30.0, is_negative=True, time_processed=None),
        ssSource={"ssObjectId": 5001, "residualRa": 1e-4, "heliocentricVX": 0.01},
    ),
    "ztf": _ztf(prv_candidates=[_upper_limit(), _earlier(2)], fp_hists=[_forced(3)]),
    "asteroid": _ztf(_candidate(ssdistnr=0.0, ssnamenr="95042")),
}


def _places(values: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        yield (*way, key)
        yield from _places(value, (*way, key))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_whatever_a_packet_holds_it_is_adapted_or_refused(data: st.DataObject) -> None:
    packet = copy.deepcopy(SEEDS_OF_CHAOS[data.draw(st.sampled_from(sorted(SEEDS_OF_CHAOS)))])
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(list(_places(packet))))
        holder = packet
        for key in way:
            holder = holder[key]
        holder[last] = data.draw(ANYTHING)
    try:
        adapted = adapt_packet(packet)
        table = adapted_table([adapted.record], ALL_COLUMNS)
    except PacketFormatError:
        return
    assert isinstance(adapted, AdaptedPacket)
    assert all(type(value) is int for value in (adapted.dia_source_id, adapted.visit, adapted.detector))
    assert math.isfinite(adapted.midpoint_mjd_tai)
    assert table[ALERT_ID].to_pylist() == [adapted.dia_source_id]


@given(ANYTHING)
def test_what_is_no_packet_at_all_is_refused(packet: Any) -> None:
    with pytest.raises(PacketFormatError):
        adapt_packet(packet)


# ---- every sample of the shared data


def _avro(path: Path) -> list[Any]:
    with path.open("rb") as stream:
        return list(fastavro.reader(stream))


def _tar(path: Path) -> list[Any]:
    packets: list[Any] = []
    with tarfile.open(path) as members:
        for member in members:
            content = members.extractfile(member) if member.isfile() else None
            if content is not None:
                packets += fastavro.reader(io.BytesIO(content.read()))
    return packets


def _tabled(packets: list[Any]) -> list[AdaptedPacket]:
    """The packets adapted, and shown to fit the table with all its columns."""
    adapted = [adapt_packet(packet) for packet in packets]
    table = adapted_table([one.record for one in adapted], ALL_COLUMNS)
    assert table[ALERT_ID].to_pylist() == [one.dia_source_id for one in adapted]
    assert table.schema == project_alerts_schema(ALL_COLUMNS)
    return adapted


@needs_data
@pytest.mark.parametrize("version", ["7_0", "7_1", "7_2", "7_3", "7_4", "8_0", "9_0", "10_0", "11_0"])
def test_lssts_own_samples_are_adapted_but_for_the_unix_times_of_7(version: str) -> None:
    (packet,) = _avro(DATA / "lsst_alert_samples" / f"v{version}" / "fakeAlert.avro")
    if version.startswith("7"):
        with pytest.raises(PacketFormatError, match=r"midpointMjdTai 1480360995\.0 is outside"):
            adapt_packet(packet)
        packet["diaSource"]["midpointMjdTai"] = 57720.0
    (adapted,) = _tabled([packet])
    assert (adapted.visit, adapted.detector, adapted.band) == (1, 42, "r")
    assert adapted.kafka_key == "281323062375219201"
    assert len(adapted.record["prvDiaSources"]) == len(packet["prvDiaSources"]) > 0
    if version == "8_0":
        assert adapted.record["diaSource"]["timeProcessedMjdTai"] == pytest.approx(60902.99456, abs=1e-5)


@needs_data
@pytest.mark.parametrize(
    "path", sorted((DATA / "rubin_alerts").glob("*fink*.*")) + sorted((DATA / "rubin_alerts").glob("sim*.parquet"))
)
def test_lsst_alerts_as_fink_passes_them_on_are_adapted(path: Path) -> None:
    packets = _avro(path) if path.suffix == ".avro" else pq.ParquetFile(path).read().to_pylist()
    for packet, one in zip(packets, _tabled(packets), strict=True):
        source, record = packet["diaSource"], one.record
        assert (one.dia_source_id, one.visit, one.band) == (source["diaSourceId"], source["visit"], source["band"])
        assert one.kafka_key == str(source["diaObjectId"] or source["ssObjectId"])
        assert (record["diaObject"] is None) == (not source["diaObjectId"])
        assert (record["ssSource"] is None) == (not source["ssObjectId"])
        assert len(record["prvDiaSources"]) == len(packet["prvDiaSources"] or [])
        places = [
            math.hypot(row["ra"] - source["ra"], row["dec"] - source["dec"])
            for row in record["prvDiaForcedSources"]
            if "ra" in row
        ]
        assert max(places, default=0.0) < 0.1


@needs_data
@pytest.mark.parametrize("name", ["25409136044802067", "3527242430321524769", "7912941781254298"])
def test_kafka_messages_of_older_schemas_are_adapted(name: str) -> None:
    schema_id, body = unwrap((DATA / "rubin_alerts" / "wire_messages" / f"{name}.avro").read_bytes())
    packet = SchemaRegistry.all_schemas_from_filesystem().get_by_id(schema_id).deserialize(body)
    (adapted,) = _tabled([packet])
    assert adapted.dia_source_id == int(name)


@needs_data
def test_solar_system_offsets_and_velocities_of_version_9_are_physical() -> None:
    packets = _avro(DATA / "rubin_alerts" / "lsstcam_20250905_i_fink9.0.avro")
    (one,) = [one for one in map(adapt_packet, packets) if one.record["ssSource"] is not None]
    source, match = one.record["diaSource"], one.record["ssSource"]
    x, y, z = (match[f"topo_{axis}"] for axis in "xyz")
    ra, dec = math.degrees(math.atan2(y, x)), math.degrees(math.asin(z / math.hypot(x, y, z)))
    arcsec = 3600.0
    rounding = math.degrees(FLOAT32) * arcsec  # of the float32 position, in each of its coordinates
    across = (source["ra"] - ra) * math.cos(math.radians(dec)) * arcsec
    assert match["ephOffsetRa"] == pytest.approx(across, abs=2 * rounding)
    assert match["ephOffsetDec"] == pytest.approx((source["dec"] - dec) * arcsec, abs=2 * rounding)
    observer = [match[f"helio_v{axis}"] - match[f"topo_v{axis}"] for axis in "xyz"]
    # the Earth's 29.29 to 30.29 km/s in its orbit, and up to 0.47 of its turning
    assert 28.8 < math.hypot(*observer) < 30.8


@needs_data
def test_packets_before_version_7_are_refused_for_want_of_a_visit() -> None:
    table = pq.ParquetFile(DATA / "elasticc_sim" / "elasticc_alerts_89_mixed.parquet").read(["diaSource", "diaObject"])
    for packet in table.to_pylist():
        with pytest.raises(PacketFormatError, match="ccdVisitId but no visit"):
            adapt_packet(packet)


@needs_data
@pytest.mark.parametrize("path", sorted((DATA / "ztf_alerts" / "packets").glob("*")))
def test_ztf_packets_are_adapted_and_agree_with_their_forced_photometry(path: Path) -> None:
    packets = _tar(path) if path.suffix == ".tar" else _avro(path)
    adapted = _tabled(packets)
    assert len(adapted) == len(packets) > 0
    for packet, one in zip(packets, adapted, strict=True):
        candidate, record = packet["candidate"], one.record
        assert (one.dia_source_id, one.kafka_key) == (candidate["candid"], packet["objectId"])
        assert one.band == {1: "g", 2: "r", 3: "i"}[candidate["fid"]]
        assert (record["diaObject"] is None) == (record["ssSource"] is not None) == (candidate["ssdistnr"] >= 0)
        if record["diaObject"] is None:
            assert record["prvDiaSources"] == []
            continue
        assert ztf.object_name(record["diaObject"]["diaObjectId"]) == packet["objectId"]
        n_detections = sum(row["candid"] is not None for row in packet["prv_candidates"] or [])
        assert len(record["prvDiaSources"]) == n_detections
        forced = {(row["visit"], row["detector"]): row for row in record["prvDiaForcedSources"]}
        for row in record["prvDiaSources"]:
            assert row["midpointMjdTai"] < one.midpoint_mjd_tai
            again = forced.get((row["visit"], row["detector"]))
            if again is not None:  # two fits of one difference image, a little apart
                assert again["midpointMjdTai"] == row["midpointMjdTai"]
                assert again["psfFlux"] == pytest.approx(row["psfFlux"], abs=5 * row["psfFluxErr"])


@needs_data
def test_ztf_packets_and_the_table_of_detections_say_the_same() -> None:
    table = pq.ParquetFile(DATA / "ztf_alerts" / "ztf_detections.parquet").read()
    rows = {row["candid"]: row for row in table.select(["candid", "objectId", "jd", "pid", "rcid", "ra"]).to_pylist()}
    adapted = _tabled(_avro(DATA / "ztf_alerts" / "packets" / "ztf_20211122_fink-distributed.avro"))
    known = [(one, rows[one.dia_source_id]) for one in adapted if one.dia_source_id in rows]
    assert len(known) > 50
    for one, row in known:
        assert one.kafka_key == row["objectId"]
        assert (one.visit, one.detector) == (row["pid"] // 10_000, row["rcid"])
        assert one.midpoint_mjd_tai == ztf.midpoint_mjd_tai(row["jd"], 30.0)
        assert one.record["diaSource"]["ra"] == row["ra"]

"""Replayed packets and the columns that filters ask for."""

from __future__ import annotations

from typing import Any

from schemas.avro.adaptation import AdaptedPacket
from transforms.delivery import Delivery
from transforms.filters.checking import check_filter
from transforms.filters.definition import FilterDefinition
from transforms.replaying import _ReadPacket, _ReadPacketsFn

VISIT, DETECTOR = 17, 4


def _packet(dia_source_id: int, n_dia_sources: Any) -> _ReadPacket:
    record = {
        "diaSource": {"diaSourceId": dia_source_id},
        "diaObject": {"nDiaSources": n_dia_sources},
        "ssSource": None,
        "prvDiaSources": [],
        "prvDiaForcedSources": [],
    }
    adapted = AdaptedPacket("lsst", dia_source_id, VISIT, DETECTOR, "r", 61367.1, 30.0, str(dia_source_id), record)
    return _ReadPacket(adapted, b"message", "digest")


def _reader() -> _ReadPacketsFn:
    few = check_filter(FilterDefinition(name="few", owner="demo", where="diaObject.nDiaSources < 9"))
    return _ReadPacketsFn("index", Delivery(out="out", store="store", brokers=(), filters=(few,)))


def test_packets_that_fit_go_on_with_their_columns() -> None:
    fitting, table, failures = _reader()._fitting(VISIT, DETECTOR, [_packet(1, 2), _packet(2, None)])
    assert [packet.adapted.dia_source_id for packet in fitting] == [1, 2] and failures == []
    assert table["diaObject"].to_pylist() == [{"nDiaSources": 2}, {"nDiaSources": None}]


def test_a_packet_that_does_not_fit_is_lost_alone() -> None:
    fitting, table, failures = _reader()._fitting(VISIT, DETECTOR, [_packet(1, 2), _packet(2, 2.5), _packet(3, 4)])
    assert [packet.adapted.dia_source_id for packet in fitting] == [1, 3]
    assert [row["nDiaSources"] for row in table["diaObject"].to_pylist()] == [2, 4]
    (failure,) = failures
    assert (failure.visit, failure.detector, failure.stage, failure.lost) == (VISIT, DETECTOR, "replaying", "packet 2")
    assert "nDiaSources is no int32: 2.5" in failure.reason

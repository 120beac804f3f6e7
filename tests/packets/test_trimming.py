"""Packets too large for a topic lose the oldest of their history, nothing else."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import fastavro
import numpy as np
import pytest
from sample_alerts import random_batch, random_records

from schemas.avro.container import container_header, read_container
from schemas.avro.encoding import encode_packets
from schemas.avro.messages import Packet, schema_of_container
from schemas.avro.reading import decode_body
from schemas.avro.schema_versions import VERSIONS, packet_schema
from schemas.avro.trimming import PacketTooLargeError, trimmed_packet

ZTF_PACKETS = Path(__file__).parents[2].parent / "shared" / "data" / "ztf_alerts" / "packets"


def _packet(version: str, n_sources: int, n_forced: int) -> Packet:
    """A packet with history in order of time."""
    rng = np.random.default_rng(21)
    sources, forced = random_records("diaSource", n_sources, rng), random_records("diaForcedSource", n_forced, rng)
    sources["midpointMjdTai"] = np.sort(rng.uniform(60_000.0, 61_000.0, n_sources))
    forced["midpointMjdTai"] = np.sort(rng.uniform(60_000.0, 61_000.0, n_forced))
    batch = replace(
        random_batch(1, rng, longest=0),
        has_object=np.array([True]),
        has_ss=np.array([False]),
        has_orbit=np.array([False]),
        prv_dia_sources=sources,
        prv_offsets=np.array([0, n_sources]),
        prv_forced=forced,
        forced_offsets=np.array([0, n_forced]),
    )
    schema = packet_schema(version)
    return Packet(schema, encode_packets(schema, batch)[0])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("share", "forced_stay", "sources_stay"), [(0.9, True, True), (0.5, False, True)])
def test_the_oldest_forced_measurements_go_first_then_the_oldest_detections(
    version: str, share: float, forced_stay: bool, sources_stay: bool
) -> None:
    whole = _packet(version, 100, 300)
    before = decode_body(whole.schema, whole.body)
    most = int(share * len(whole.body))
    (schema, body), left_out = trimmed_packet(whole, most)
    after = decode_body(schema, body)
    assert 0.98 * most < len(body) <= most
    n_forced, n_sources = len(after["prvDiaForcedSources"]), len(after["prvDiaSources"])
    assert (n_forced > 0, n_sources > 0) == (forced_stay, sources_stay)
    assert (n_sources < 100) == (not forced_stay)  # detections are left out only when no forced one is left
    assert left_out == {"prvDiaForcedSources": 300 - n_forced} | (
        {} if forced_stay else {"prvDiaSources": 100 - n_sources}
    )
    kept = {
        **before,
        "prvDiaForcedSources": before["prvDiaForcedSources"][300 - n_forced :],
        "prvDiaSources": before["prvDiaSources"][100 - n_sources :],
    }
    assert repr(after) == repr(kept)  # repr, as NaN is not itself


def test_a_packet_that_fits_stays_to_the_byte() -> None:
    whole = _packet("11.0", 3, 3)
    assert trimmed_packet(whole, len(whole.body)) == (whole, {})


def test_a_packet_that_is_too_large_without_history_is_refused() -> None:
    whole = _packet("11.0", 3, 3)
    with pytest.raises(PacketTooLargeError, match="bytes without any history, 100 is the most"):
        trimmed_packet(whole, 100)


@pytest.mark.skipif(not ZTF_PACKETS.is_dir(), reason="precursor data is not beside the project")
def test_packets_of_ztf_lose_theirs() -> None:
    path, values = next(
        (path, values)
        for path in sorted(ZTF_PACKETS.glob("*.avro"))
        for values in read_container(path)
        if len(values["prv_candidates"] or []) > 5
    )
    schema = schema_of_container(container_header(path.read_bytes()).schema_text)
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, schema.parsed, values)
    (_, body), left_out = trimmed_packet(Packet(schema, stream.getvalue()), len(stream.getvalue()) - 300)
    after = decode_body(schema, body)["prv_candidates"]
    assert left_out == {"prv_candidates": len(values["prv_candidates"]) - len(after)}
    assert 0 < len(after) < len(values["prv_candidates"])
    assert after == sorted(values["prv_candidates"], key=lambda item: item["jd"])[-len(after) :]

"""Golden packets: the bytes of each schema version stay what they were."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path

import pytest
from lsst.alert.packet import SchemaRegistry

from schemas.avro.reading import decode_packet, packet_prefix
from schemas.avro.schema_versions import VERSIONS
from schemas.avro.wire import unwrap

GOLDEN = Path(__file__).parents[1] / "golden"
SHA256 = {
    "11.0": "976eb5cb7e67e5375f4f318558d0f854f8563aa46e7b192485003d29e8873dcf",
    "11.1": "d60e7e602108d1ec8ad10a115b1469805eed39c93b31d3b27edfba7b10d23077",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_packet_is_the_one_pinned_and_is_made_again_from_its_seed(version: str) -> None:
    message = (GOLDEN / "packets" / f"v{version}.bin").read_bytes()
    assert hashlib.sha256(message).hexdigest() == SHA256[version]
    assert runpy.run_path(str(GOLDEN / "make_packets.py"))["golden_message"](version) == message


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_packet_is_read_by_us_and_by_lsst(version: str) -> None:
    message = (GOLDEN / "packets" / f"v{version}.bin").read_bytes()
    schema_id, body = unwrap(message)
    packet = decode_packet(message)
    lsst = SchemaRegistry.all_schemas_from_filesystem().get_by_id(schema_id).deserialize(body)
    assert packet == lsst  # no NaN in a golden packet, so plain equality does
    assert packet["diaSourceId"] == packet_prefix(body).dia_source_id == 27131565485064193 + 2**26
    assert packet["diaObject"]["nDiaSources"] == len(packet["prvDiaSources"]) + 1
    assert len(packet["prvDiaForcedSources"]) == 3
    assert packet["ssSource"] is packet["mpc_orbits"] is packet["cutoutScience"] is None

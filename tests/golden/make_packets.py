"""Make the golden packets: one wire message per schema version, without cutouts, from a fixed seed.

    PYTHONPATH=. python tests/golden/make_packets.py

writes tests/golden/packets/v<version>.bin and prints the SHA-256 that tests/packets/test_golden_packets.py pins.
A file here changes only when a schema version or a null rule does: readers in the field have the old bytes.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np

from schemas.avro.encoding import AlertColumns, encode_packets
from schemas.avro.schema_versions import VERSIONS, packet_schema
from schemas.avro.wire import wrap
from schemas.records import DIA_FORCED_SOURCE, DIA_OBJECT, DIA_SOURCE, MPC_ORBITS, SS_SOURCE, empty_records, field_types

SEED = 20261122
FOLDER = Path(__file__).parent / "packets"
DIA_OBJECT_ID = 27131565485064193
MIDPOINT_MJD_TAI = 61367.25


def golden_message(version: str) -> bytes:
    """A detection of an object with two earlier detections and three forced points."""
    draw = random.Random(SEED)  # the standard library keeps its streams from version to version
    history = _filled("diaSource", DIA_SOURCE, 2, draw)
    history["diaSourceId"] = [DIA_OBJECT_ID, DIA_OBJECT_ID + 2**25]
    history["midpointMjdTai"] = [MIDPOINT_MJD_TAI - 3, MIDPOINT_MJD_TAI - 1]
    source = _filled("diaSource", DIA_SOURCE, 1, draw)
    source["diaSourceId"] = DIA_OBJECT_ID + 2**26
    source["midpointMjdTai"] = MIDPOINT_MJD_TAI
    forced = _filled("diaForcedSource", DIA_FORCED_SOURCE, 3, draw)
    dia_object = _filled("diaObject", DIA_OBJECT, 1, draw)
    dia_object["nDiaSources"] = 3
    for rows in (history, source, forced, dia_object):
        rows["diaObjectId"] = DIA_OBJECT_ID
    for rows in (history, source):
        rows["ssObjectId"] = 0
    batch = AlertColumns(
        dia_sources=source,
        observation_reason="science",
        target_name=None,
        prv_dia_sources=history,
        prv_offsets=np.array([0, 2]),
        prv_forced=forced,
        forced_offsets=np.array([0, 3]),
        dia_objects=dia_object,
        has_object=np.array([True]),
        ss_sources=empty_records(SS_SOURCE, 1),
        has_ss=np.array([False]),
        mpc_orbits=empty_records(MPC_ORBITS, 1),
        has_orbit=np.array([False]),
        cutouts=([None], [None], [None]),
    )
    schema = packet_schema(version)
    (body,) = encode_packets(schema, batch)
    return wrap(schema.schema_id, body)


def _filled(record: str, dtype: np.dtype, n: int, draw: random.Random) -> np.ndarray:
    """Records with a value in three of four nullable fields, null in the rest."""
    rows = empty_records(dtype, n)
    for name, kind in field_types(record).items():
        for i in range(n):
            if kind.endswith("?") and draw.random() < 0.25:
                continue
            rows[name][i] = _value(kind.removesuffix("?"), draw)
    return rows


def _value(kind: str, draw: random.Random) -> object:
    if kind == "string":
        return draw.choice([b"u", b"g", b"r", b"i", b"z", b"y"])
    if kind == "boolean":
        return draw.getrandbits(1)
    if kind == "long":
        return draw.getrandbits(58)
    if kind == "int":
        return draw.getrandbits(8)
    return draw.uniform(-1000.0, 1000.0)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for version in VERSIONS:
        message = golden_message(version)
        (FOLDER / f"v{version}.bin").write_bytes(message)
        print(version, len(message), hashlib.sha256(message).hexdigest())

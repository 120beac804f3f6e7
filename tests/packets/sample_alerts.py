"""Random alert batches for the packet tests, and the values their packets must hold, worked out slowly and apart."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from schemas.avro.encoding import AlertColumns
from schemas.avro.schema_versions import packet_schema
from schemas.records import DIA_FORCED_SOURCE, DIA_OBJECT, DIA_SOURCE, MPC_ORBITS, SS_SOURCE, field_types

ALERTED = {
    "diaSource": DIA_SOURCE,
    "diaForcedSource": DIA_FORCED_SOURCE,
    "diaObject": DIA_OBJECT,
    "ssSource": SS_SOURCE,
    "mpc_orbits": MPC_ORBITS,
}
INT64 = np.array([0, 1, -1, 63, 64, -64, -65, 2**53 + 1, 2**63 - 1, -(2**63), -(2**63) + 1], dtype=np.int64)
INT32 = np.array([0, 1, -1, 63, 64, 2**31 - 1, -(2**31), -(2**31) + 1], dtype=np.int32)
FLOATS = np.array([0.0, -0.0, 1.5, -1.5, np.nan, np.inf, -np.inf, 5e-324, 1e-40, 3.4e38, 1.7e308])
TEXTS = [b"", b"r", b"y", "λ".encode(), b"2026 AB12", "Ünïcödé 星".encode(), b"0123456789abcdef"]


def random_records(record: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Records of extremes, nulls and random bits in every field."""
    dtype = ALERTED[record]
    rows = np.zeros(n, dtype)
    for name, kind in field_types(record).items():
        kind = kind.removesuffix("?")
        if kind == "long":
            some = rng.integers(-(2**63), 2**63 - 1, n, dtype=np.int64)
            rows[name] = np.where(rng.random(n) < 0.5, rng.choice(INT64, n), some)
        elif kind == "int":
            some = rng.integers(-(2**31), 2**31 - 1, n, dtype=np.int32)
            rows[name] = np.where(rng.random(n) < 0.5, rng.choice(INT32, n), some)
        elif kind == "timestamp-micros":  # of the years that Python has
            rows[name] = np.where(rng.random(n) < 0.3, -(2**63), rng.integers(0, 2 * 10**15, n))
        elif kind == "boolean":
            rows[name] = rng.integers(-1, 2, n)
        elif kind == "string":
            width = dtype[name].itemsize
            fitting = [text for text in TEXTS if len(text) <= width]
            rows[name] = [fitting[k] for k in rng.integers(0, len(fitting), n)]
        else:
            with np.errstate(over="ignore"):
                special = rng.choice(FLOATS, n).astype(dtype[name])
            rows[name] = np.where(rng.random(n) < 0.5, special, rng.normal(size=n).astype(dtype[name]))
    return rows


def random_batch(n: int, rng: np.random.Generator, *, longest: int = 5) -> AlertColumns:
    """A batch in which every alert has its own mixture of object, match, histories and cutouts."""
    has_object = rng.random(n) < 0.7
    history = np.where(has_object, rng.integers(0, longest + 1, n), 0)
    forced = np.where(has_object, rng.integers(0, longest + 1, n), 0)
    objects = random_records("diaObject", n, rng)
    objects["nDiaSources"] = rng.integers(1, 4, n)
    return AlertColumns(
        dia_sources=random_records("diaSource", n, rng),
        observation_reason=str(rng.choice(["science", "", "Ψ field"])),
        target_name=None if rng.random() < 0.5 else "COSMOS é",
        prv_dia_sources=random_records("diaSource", int(history.sum()), rng),
        prv_offsets=np.concatenate([[0], np.cumsum(history)]).astype(np.int64),
        prv_forced=random_records("diaForcedSource", int(forced.sum()), rng),
        forced_offsets=np.concatenate([[0], np.cumsum(forced)]).astype(np.int64),
        dia_objects=objects,
        has_object=has_object,
        ss_sources=random_records("ssSource", n, rng),
        has_ss=~has_object,
        mpc_orbits=random_records("mpc_orbits", n, rng),
        has_orbit=~has_object & (rng.random(n) < 0.5),
        cutouts=tuple([_random_stamp(rng) for _ in range(n)] for _ in range(3)),  # type: ignore[arg-type]
    )


def expected_packet(version: str, batch: AlertColumns, i: int) -> dict[str, Any]:
    """The dict that alert `i` must decode to."""
    known = bool(batch.has_object[i])
    history = batch.prv_dia_sources[batch.prv_offsets[i] : batch.prv_offsets[i + 1]]
    forced = batch.prv_forced[batch.forced_offsets[i] : batch.forced_offsets[i + 1]]
    with_history = known and (batch.dia_objects["nDiaSources"][i] > 1 or len(history) > 0)
    return {
        "diaSourceId": int(batch.dia_sources["diaSourceId"][i]),
        "observation_reason": batch.observation_reason or None,
        "target_name": batch.target_name or None,
        "diaSource": expected_record(version, "diaSource", batch.dia_sources[i]),
        "prvDiaSources": [expected_record(version, "diaSource", row) for row in history] if with_history else None,
        "prvDiaForcedSources": (
            [expected_record(version, "diaForcedSource", row) for row in forced] if known else None
        ),
        "diaObject": expected_record(version, "diaObject", batch.dia_objects[i]) if known else None,
        "ssSource": expected_record(version, "ssSource", batch.ss_sources[i]) if batch.has_ss[i] else None,
        "mpc_orbits": expected_record(version, "mpc_orbits", batch.mpc_orbits[i]) if batch.has_orbit[i] else None,
        "cutoutDifference": batch.cutouts[0][i],
        "cutoutScience": batch.cutouts[1][i],
        "cutoutTemplate": batch.cutouts[2][i],
    }


def expected_record(version: str, record: str, row: np.void) -> dict[str, Any]:
    """The values of one record by the null rules of docs/packets.md, one field at a time."""
    values: dict[str, Any] = {}
    for field in packet_schema(version).records[record]:
        value = row[field.name].item()
        if field.kind == "string":
            value = value.decode() or (None if field.nullable else "")
        elif field.nullable and field.kind in ("float", "double"):
            value = None if math.isnan(value) else value
        elif field.nullable and field.kind == "boolean":
            value = {-1: None, 0: False, 1: True}[value]
        elif field.nullable and field.name in ("diaObjectId", "ssObjectId", "parentDiaSourceId"):
            value = value or None
        elif field.nullable:
            value = None if value == -(2**31 if field.kind == "int" else 2**63) else value
            if field.kind == "timestamp-micros" and value is not None:
                value = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value)
        values[field.name] = value
    return values


def same_values(left: object, right: object) -> bool:
    """Equality in which NaN equals NaN and 0.0 differs from -0.0."""
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same_values(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_values, left, right))
    if isinstance(left, float) and isinstance(right, float):
        if math.isnan(left) or math.isnan(right):
            return math.isnan(left) and math.isnan(right)
        return left == right and math.copysign(1, left) == math.copysign(1, right)
    return type(left) is type(right) and left == right


def _random_stamp(rng: np.random.Generator) -> bytes | None:
    length = int(rng.choice([-1, 0, 1, 63, 64, 300]))
    return None if length < 0 else rng.bytes(length)

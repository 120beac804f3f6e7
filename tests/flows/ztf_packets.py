"""Packets like ZTF's, made by hand: few fields, two versions of the schema, files of every kind they come in."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fastavro

FIRST_JD = 2_459_000.5
FIRST_EXPOSURE = 124_500_000
_LETTERS = "abcdefghij"


def _nullable(kind: Any) -> list[Any]:
    return ["null", kind]


def _schema(version: str) -> dict[str, Any]:
    """A record with what a detection needs; the newer version knows the exposure time and forced photometry."""
    newer = version == "4.0"
    detection = [
        ("jd", "double"), ("fid", "int"), ("pid", "long"), ("candid", _nullable("long")), ("rcid", "int"),
        ("isdiffpos", _nullable("string")), ("ra", _nullable("double")), ("dec", _nullable("double")),
        ("magpsf", _nullable("float")), ("sigmapsf", _nullable("float")),
    ]  # fmt: skip
    candidate = [*detection, ("ndethist", "int"), ("ssdistnr", _nullable("float")), ("ssnamenr", _nullable("string"))]
    if newer:
        candidate.append(("exptime", _nullable("float")))

    def record(name: str, fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        listed = [{"name": field, "type": kind} for field, kind in fields]
        return {"type": "record", "name": name, "namespace": "ztf.alert", "fields": listed}

    fields: list[tuple[str, Any]] = [
        ("schemavsn", "string"),
        ("objectId", "string"),
        ("candid", "long"),
        ("candidate", record("candidate", candidate)),
        ("prv_candidates", _nullable({"type": "array", "items": record("prv_candidate", detection)})),
    ]
    if newer:
        forced = [("jd", "double"), ("fid", "int"), ("pid", "long"), ("rcid", "int"), ("procstatus", "string"),
                  ("forcediffimflux", "float"), ("forcediffimfluxunc", "float"), ("magzpsci", "float")]  # fmt: skip
        fields.append(("fp_hists", _nullable({"type": "array", "items": record("fp_hist", forced)})))
    fields.append(("cutoutScience", _nullable("bytes")))
    return {**record("alert", fields), "namespace": "ztf", "doc": "what a stand-in is for"}


SCHEMAS = {version: fastavro.parse_schema(_schema(version)) for version in ("3.0", "4.0")}


def packet(number: int, version: str = "3.0", **changes: Any) -> dict[str, Any]:
    """Packet `number`: exposure `number` // 2, readout channel `number` % 2, an object of its own."""
    exposure = number // 2
    pid = (FIRST_EXPOSURE + exposure) * 10_000 + number % 2 * 100 + 15
    detection = {
        "jd": FIRST_JD + 0.01 * exposure, "fid": 1 + exposure % 2, "pid": pid, "candid": pid * 1_000_000 + number,
        "rcid": number % 2, "isdiffpos": "t", "ra": 10.0 + number, "dec": -5.0, "magpsf": 18.0 + 0.1 * number,
        "sigmapsf": 0.05,
    }  # fmt: skip
    earlier = detection | {"jd": detection["jd"] - 3.0, "pid": pid - 3 * 10**9, "candid": pid * 1_000_000 - 1}
    one = {
        "schemavsn": version,
        "objectId": f"ZTF18aaaaa{_LETTERS[number // 10]}{_LETTERS[number % 10]}",
        "candid": detection["candid"],
        "candidate": detection | {"ndethist": 2, "ssdistnr": -999.0, "ssnamenr": "null", "exptime": 60.0},
        "prv_candidates": [earlier],
        "fp_hists": None,
        "cutoutScience": bytes(range(256)) * 8,
    }
    return one | changes


def container(packets: Sequence[Mapping[str, Any]], version: str = "3.0", **options: Any) -> bytes:
    """An object container as ZTF writes them."""
    stream = io.BytesIO()
    # A sync marker of its own: fastavro draws one by chance.
    options = {"sync_marker": b"0123456789abcdef", **options}
    fastavro.writer(stream, SCHEMAS[version], packets, **options)
    return stream.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    """A tar of files with these contents."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path

"""The versions of the alert packet schema, read from one table per version in `definitions/`.

Those in `definitions/archived/` were in use before and are only read. Their tables hold no meanings, but the
alert record too: `name?` may be null, `[name]` is an array, and a name that is no primitive is a record.

A table lists the fields of every nested record in wire order with type, unit and meaning; the alert
record that binds them is the same in every version here and stands below. A `?` behind a type means
`["null", type]` with default null.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import fastavro
import fastavro.schema

VERSIONS = ("11.0", "11.1")
ARCHIVED_VERSIONS = ("7.0", "7.1", "7.2", "7.3", "7.4", "8.0", "9.0", "10.0")
NEWEST_VERSION = "11.1"
DEFAULT_VERSION = "11.0"  # what every public reader knows today

PRIMITIVE_KINDS = ("long", "int", "float", "double", "boolean", "string", "bytes", "timestamp-micros")


def schema_id_of(version: str) -> int:
    """The id of a version in the wire header: 100 * major + minor."""
    major, minor = version.split(".")
    return 100 * int(major) + int(minor)


PACKET_SCHEMA_IDS = tuple(schema_id_of(version) for version in VERSIONS)


class SchemaVersionError(ValueError):
    """A schema version or id that is not known here; the message lists the known ones."""


@dataclass(frozen=True)
class FieldDefinition:
    """One field of a record; `kind` is the Avro type without the union with null."""

    name: str
    kind: str
    nullable: bool
    unit: str
    doc: str

    @property
    def description(self) -> str:
        """Meaning and unit in one line."""
        return f"{self.doc} [{self.unit}]" if self.unit else self.doc


@dataclass(frozen=True, eq=False)
class PacketSchema:
    """One version of the alert packet schema.

    Attributes
    ----------
    version : such as "11.0"
    schema_id : 100 * major + minor, the id in the wire header
    records : fields of each nested record, in wire order
    avro : the schema with docs and defaults, as nested dicts; not to be changed
    parsed : the same as fastavro keeps it, for its readers and writers
    canonical : Avro parsing canonical form (no docs, defaults or logical types)
    fingerprint : SHA-256 of `canonical`, hexadecimal
    """

    version: str
    schema_id: int
    records: Mapping[str, tuple[FieldDefinition, ...]]
    avro: dict[str, Any]
    parsed: dict[str, Any]
    canonical: str
    fingerprint: str

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers rebuild it from the version: the bytes on the way stay few, the cache stays one.
        return packet_schema, (self.version,)

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"v{self.version}"

    def json_text(self, *, docs: bool) -> str:
        """The schema as JSON text, the same bytes every time, with or without docs."""
        return json.dumps(self.avro if docs else _without_docs(self.avro), separators=(",", ":"))


@dataclass(frozen=True, eq=False)
class WriterSchema:
    """The schema that a container of any survey brings along.

    Attributes
    ----------
    text : as it stands in the container
    label : full name of its record, such as "lsst.v10_0.alert" or "ztf.alert"
    schema_id : id in the wire header if it is one of LSST's, else None
    parsed : as fastavro keeps it
    fingerprint : SHA-256 of its parsing canonical form, hexadecimal
    """

    text: str
    label: str
    schema_id: int | None
    parsed: dict[str, Any]
    fingerprint: str

    def __reduce__(self) -> tuple[Any, ...]:
        return writer_schema, (self.text,)

    def json_text(self, *, docs: bool) -> str:
        """The text as it came, whatever `docs` says."""
        return self.text


@lru_cache(maxsize=64)
def writer_schema(text: str) -> WriterSchema:
    """The schema with the given JSON text; SchemaVersionError if it is none of a record that is safe to read."""
    try:
        avro = json.loads(text)
        parsed = fastavro.parse_schema(avro)
        fingerprint = _fingerprint(avro)
        name = parsed["name"]
        if parsed["type"] != "record":
            raise SchemaVersionError(f"{name} is of type {parsed['type']}, not a record")
        _least_bytes(parsed, {})
    except SchemaVersionError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        fastavro.schema.SchemaParseException,
    ) as error:
        raise SchemaVersionError(f"no schema of a record: {type(error).__name__}: {error}") from error
    return WriterSchema(text, name, _lsst_schema_id(name, fingerprint), parsed, fingerprint)


def _least_bytes(node: Any, known: dict[str, int | None]) -> int:
    """The fewest bytes that a value of a parsed schema takes up; `known`: those of named types, None while open.

    SchemaVersionError where bytes could not bound a value: a type that holds itself nests as deep as the bytes
    say, beyond the reader's stack; items and records without bytes repeat as often as a broken count says.
    """
    if isinstance(node, list):
        return 1 + min((_least_bytes(branch, known) for branch in node), default=0)
    if isinstance(node, str):
        if node in known:
            size = known[node]
            if size is None:
                raise SchemaVersionError(f"{node} holds itself")
            return size
        return 0 if node == "null" else 1
    kind = node["type"]
    if kind in ("array", "map"):
        if _least_bytes(node["items" if kind == "array" else "values"], known) == 0 and kind == "array":
            raise SchemaVersionError("an array of items without bytes")
        return 1
    if kind in ("record", "error"):
        known[node["name"]] = None
        size = sum(_least_bytes(field["type"], known) for field in node["fields"])
        if size == 0:
            raise SchemaVersionError(f"{node['name']} is a record without bytes")
        known[node["name"]] = size
        return size
    if kind in ("fixed", "enum"):
        known[node["name"]] = int(node["size"]) if kind == "fixed" else 1
        return known[node["name"]] or 0
    return _least_bytes(kind, known)


def _lsst_schema_id(name: str, fingerprint: str) -> int | None:
    """The wire id of an alert record of LSST; None for another, or one that only bears the name of a known one."""
    match = re.fullmatch(r"lsst\.v(\d{1,3})_(\d{1,2})\.alert", name)
    if match is None:
        return None
    version = f"{int(match[1])}.{int(match[2])}"
    if version in VERSIONS and packet_schema(version).fingerprint != fingerprint:
        return None
    if version in ARCHIVED_VERSIONS and _fingerprint(_archived_avro(version)) != fingerprint:
        return None
    return schema_id_of(version)


def _fingerprint(avro: Any) -> str:
    """SHA-256 of the parsing canonical form, hexadecimal."""
    return hashlib.sha256(fastavro.schema.to_parsing_canonical_form(avro).encode()).hexdigest()


@cache
def archived_schema(version: str) -> WriterSchema:
    """The schema of one of `ARCHIVED_VERSIONS`; SchemaVersionError if unknown."""
    if version not in ARCHIVED_VERSIONS:
        raise SchemaVersionError(f"unknown archived version {version!r}, known are {', '.join(ARCHIVED_VERSIONS)}")
    return writer_schema(json.dumps(_archived_avro(version), separators=(",", ":")))


@cache
def _archived_avro(version: str) -> Any:
    """The schema of an archived version as nested dicts, from its table."""
    name = f"v{version.replace('.', '_')}"
    table = resources.files("schemas.avro") / "definitions" / "archived" / f"{name}.csv"
    records: dict[str, list[tuple[str, str]]] = {}
    with table.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            records.setdefault(row["record"], []).append((row["field"], row["type"]))
    defined: set[str] = set()

    def avro_type(kind: str) -> Any:
        if kind.endswith("?"):
            return ["null", avro_type(kind[:-1])]
        if kind.startswith("["):
            return {"type": "array", "items": avro_type(kind[1:-1])}
        if kind == "timestamp-micros":
            return {"type": "long", "logicalType": kind}
        if kind in PRIMITIVE_KINDS:
            return kind
        if kind in defined:
            return f"lsst.{name}.{kind}"
        defined.add(kind)
        fields = [{"name": field, "type": avro_type(of)} for field, of in records[kind]]
        return {"type": "record", "name": f"lsst.{name}.{kind}", "fields": fields}

    return avro_type("alert")


def lsst_schema_by_id(schema_id: int) -> PacketSchema | WriterSchema:
    """The schema with the given wire id, also of an archived version; SchemaVersionError if unknown."""
    for version in ARCHIVED_VERSIONS:
        if schema_id_of(version) == schema_id:
            return archived_schema(version)
    return packet_schema_by_id(schema_id)


@cache
def record_definitions(version: str) -> Mapping[str, tuple[FieldDefinition, ...]]:
    """Fields of each nested record of `version`, in wire order. SchemaVersionError if unknown."""
    if version not in VERSIONS:
        raise SchemaVersionError(f"unknown schema version {version!r}, known are {', '.join(VERSIONS)}")
    table = resources.files("schemas.avro") / "definitions" / f"v{version.replace('.', '_')}.csv"
    records: dict[str, list[FieldDefinition]] = {}
    with table.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            kind = row["type"].removesuffix("?")
            if kind not in PRIMITIVE_KINDS:
                raise SchemaVersionError(f"{table.name}: field {row['field']} has unknown type {row['type']!r}")
            field = FieldDefinition(row["field"], kind, row["type"].endswith("?"), row["unit"], row["doc"])
            records.setdefault(row["record"], []).append(field)
    return {name: tuple(fields) for name, fields in records.items()}


@cache
def packet_schema(version: str) -> PacketSchema:
    """The schema of one version, built once per process.

    Raises
    ------
    SchemaVersionError
        Unknown version.
    """
    records = record_definitions(version)
    avro = _alert_record(f"lsst.v{version.replace('.', '_')}", records)
    canonical = fastavro.schema.to_parsing_canonical_form(avro)
    return PacketSchema(
        version=version,
        schema_id=schema_id_of(version),
        records=records,
        avro=avro,
        parsed=fastavro.parse_schema(avro),
        canonical=canonical,
        fingerprint=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def packet_schema_by_id(schema_id: int) -> PacketSchema:
    """The schema with the given wire id (1100, 1101); SchemaVersionError if unknown."""
    if schema_id not in PACKET_SCHEMA_IDS:
        known = ", ".join(str(schema_id_of(one)) for one in (*ARCHIVED_VERSIONS, *VERSIONS))
        raise SchemaVersionError(f"unknown schema id {schema_id}, known are {known}")
    return packet_schema(VERSIONS[PACKET_SCHEMA_IDS.index(schema_id)])


def _alert_record(namespace: str, records: Mapping[str, tuple[FieldDefinition, ...]]) -> dict[str, Any]:
    """The alert record: a record's full definition stands where it is first used, its name after that."""

    def define(record: str) -> dict[str, Any]:
        return {
            "type": "record",
            "name": f"{namespace}.{record}",
            "fields": [_avro_field(field) for field in records[record]],
        }

    def nullable(name: str, avro_type: Any, doc: str) -> dict[str, Any]:
        return {"name": name, "type": ["null", avro_type], "default": None, "doc": doc}

    return {
        "type": "record",
        "name": f"{namespace}.alert",
        "doc": "One alert: a difference-image detection with its history, its object and its cutouts.",
        "fields": [
            {"name": "diaSourceId", "type": "long", "doc": "Id of the detection that triggered the alert"},
            nullable("observation_reason", "string", "Why the visit was taken"),
            nullable("target_name", "string", "What the visit was pointed at"),
            {"name": "diaSource", "type": define("diaSource"), "doc": "The detection that triggered the alert"},
            nullable(
                "prvDiaSources",
                {"type": "array", "items": f"{namespace}.diaSource"},
                "Earlier detections of the object within 12 months",
            ),
            nullable(
                "prvDiaForcedSources",
                {"type": "array", "items": define("diaForcedSource")},
                "Forced measurements at the object's position within 12 months",
            ),
            nullable("diaObject", define("diaObject"), "The object the detection belongs to"),
            nullable("ssSource", define("ssSource"), "The match to a known solar-system object"),
            nullable("mpc_orbits", define("mpc_orbits"), "Orbit of that solar-system object"),
            nullable("cutoutDifference", "bytes", "FITS stamp of the difference image"),
            nullable("cutoutScience", "bytes", "FITS stamp of the science image"),
            nullable("cutoutTemplate", "bytes", "FITS stamp of the template"),
        ],
    }


def _avro_field(field: FieldDefinition) -> dict[str, Any]:
    avro_type: Any = field.kind
    if field.kind == "timestamp-micros":
        avro_type = {"type": "long", "logicalType": "timestamp-micros"}
    if not field.nullable:
        return {"name": field.name, "type": avro_type, "doc": field.description}
    return {"name": field.name, "type": ["null", avro_type], "default": None, "doc": field.description}


def _without_docs(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_docs(value) for key, value in node.items() if key != "doc"}
    if isinstance(node, list):
        return [_without_docs(item) for item in node]
    return node

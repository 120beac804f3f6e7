"""The schemas equal LSST's, whose package is the oracle here and is used nowhere else."""

from __future__ import annotations

import pickle

import fastavro.schema
import pytest
from lsst.alert.packet import SchemaRegistry

from schemas.avro.schema_versions import (
    ARCHIVED_VERSIONS,
    NEWEST_VERSION,
    VERSIONS,
    SchemaVersionError,
    archived_schema,
    packet_schema,
    packet_schema_by_id,
)

FINGERPRINTS = {
    "11.0": "9c2dfb211e03b51c3b64fe4105b6dd02aaa9c630ce788656c8cc9a155d468314",
    "11.1": "9aa444ad610374fc167b7f7124a77f58b2d7d819a13b1b6d01cb1e265c783f27",
}
ARCHIVED_FINGERPRINTS = {
    "7.0": "c176fef6a8a0962304c5cd0bdb990a0451dbf50bd673386ae59acca7bc2fdf3f",
    "7.1": "247bb62dc5e546e3e6170facbc39cc166fd31d0f765aa1f0835d45ecb2b90435",
    "7.2": "015124e9970354e918dac1a38d959916dc2110df2afe8b21c49e6d0747d7fbb9",
    "7.3": "0611d6b945c5e9c26a348f30f900f7e6537c341b1a9ad7366d04fc9e62a0d2cd",
    "7.4": "fd177231a19c203122617572a34a405aaba64ed03dfb8777d0143af5c6646e10",
    "8.0": "264a45e5ef1920023fa3fb5e26607d5fddb8e370e0eba2b08245ca8d37e67ac6",
    "9.0": "017239c3ff79ae5156cc4125ab1b12df955c1075e353a283627f590fed625b92",
    "10.0": "2c47c696524bdb8c19ea2b6e3947c55f642aa7eacc184e38c4b56a8380b03969",
}
CRC_64_AVRO = {"11.0": "efe464e649354e2b", "11.1": "a960816bc1c3d70c"}
LSST_SCHEMAS = SchemaRegistry.all_schemas_from_filesystem()


@pytest.mark.parametrize("version", VERSIONS)
def test_canonical_form_equals_that_of_lsst(version: str) -> None:
    lsst = LSST_SCHEMAS.get_by_version(version)
    assert packet_schema(version).canonical == fastavro.schema.to_parsing_canonical_form(lsst.definition)
    assert packet_schema(version).schema_id == lsst.get_schema_id()


@pytest.mark.parametrize("version", VERSIONS)
def test_fingerprints_stay(version: str) -> None:
    schema = packet_schema(version)
    assert schema.fingerprint == FINGERPRINTS[version]
    assert fastavro.schema.fingerprint(schema.canonical, "CRC-64-AVRO") == CRC_64_AVRO[version]


@pytest.mark.parametrize("version", ARCHIVED_VERSIONS)
def test_fingerprints_of_archived_versions_stay(version: str) -> None:
    assert archived_schema(version).fingerprint == ARCHIVED_FINGERPRINTS[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_defaults_and_logical_types_equal_those_of_lsst(version: str) -> None:
    """The canonical form drops both, so they are compared apart."""
    ours = _flat(fastavro.parse_schema(packet_schema(version).avro))
    lsst = _flat(LSST_SCHEMAS.get_by_version(version).definition)
    assert ours == lsst
    assert sum("timestamp-micros" in str(item) for item in ours) == 3


@pytest.mark.parametrize("version", VERSIONS)
def test_every_field_says_what_it_means(version: str) -> None:
    for record, fields in packet_schema(version).records.items():
        for field in fields:
            assert len(field.doc) > 5, f"{record}.{field.name}"


def test_no_description_is_lssts() -> None:
    """Their text is under another licence than ours; a short phrase may coincide, a sentence may not."""
    theirs = {
        doc.split(" [")[0].rstrip(".")
        for version in VERSIONS
        for doc in _docs(LSST_SCHEMAS.get_by_version(version).definition)
    }
    ours = {field.doc for fields in packet_schema(NEWEST_VERSION).records.values() for field in fields}
    assert len(theirs) > 200
    assert not {doc for doc in ours & theirs if len(doc.split()) > 4}


def test_docs_leave_no_trace_in_the_small_schema_text() -> None:
    schema = packet_schema("11.0")
    small = schema.json_text(docs=False)
    assert '"doc"' not in small
    assert '"doc"' in schema.json_text(docs=True)
    assert fastavro.schema.to_parsing_canonical_form(fastavro.schema.parse_schema(_json(small))) == schema.canonical


def test_schema_is_built_once_and_travels_as_its_version() -> None:
    schema = packet_schema("11.1")
    assert packet_schema("11.1") is schema
    assert pickle.loads(pickle.dumps(schema)) is schema
    assert len(pickle.dumps(schema)) < 200
    assert packet_schema_by_id(1101) is schema


def test_unknown_version_and_id_are_refused_with_the_known_ones() -> None:
    with pytest.raises(SchemaVersionError, match=r"'12\.0', known are 11\.0, 11\.1"):
        packet_schema("12.0")
    with pytest.raises(SchemaVersionError, match=r"1200, known are 700, .*, 1100, 1101"):
        packet_schema_by_id(1200)


def _json(text: str) -> dict:
    import json

    return json.loads(text)


def _flat(node: object, path: str = "") -> list[tuple[str, object]]:
    """(path, default, type if primitive) of every field, in order."""
    if isinstance(node, dict) and node.get("type") == "record":
        found: list[tuple[str, object]] = [(path, node["name"])]
        for field in node["fields"]:
            found.append((f"{path}.{field['name']}", field.get("default", "no default")))
            found += _flat(field["type"], f"{path}.{field['name']}")
        return found
    if isinstance(node, dict) and node.get("type") == "array":
        return _flat(node["items"], path + "[]")
    if isinstance(node, list):
        return [item for branch in node for item in _flat(branch, path)]
    if isinstance(node, dict):
        return [
            (path, tuple(sorted((key, str(value)) for key, value in node.items() if key in ("type", "logicalType"))))
        ]
    return [(path, node)]


def _docs(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["doc"]] if isinstance(node.get("doc"), str) else []
        return own + [doc for value in node.values() for doc in _docs(value)]
    if isinstance(node, list):
        return [doc for item in node for doc in _docs(item)]
    return []

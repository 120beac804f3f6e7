"""The schema registry over HTTP: what Confluent's clients ask for, and the pages."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from registry_server import running_registry

from runners.cli import main
from runners.schema_registry import ALL_VERSIONS, SUBJECTS, version_view
from schemas.avro.schema_versions import (
    ARCHIVED_VERSIONS,
    VERSIONS,
    lsst_schema_by_id,
    packet_schema,
    schema_id_of,
    writer_schema,
)

IDS = [schema_id_of(version) for version in ALL_VERSIONS]
WRITTEN_IDS = [schema_id_of(version) for version in VERSIONS]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_registry() as url:
        yield url


def ask(url: str, method: str = "GET") -> tuple[int, Any]:
    """Status and body of the answer."""
    body = b'{"schema":"\\"long\\""}' if method == "POST" else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, method=method), timeout=10) as answer:
            text, status, kind = answer.read().decode(), answer.status, answer.headers["content-type"]
    except urllib.error.HTTPError as error:
        with error:
            text, status, kind = error.read().decode(), error.code, error.headers["content-type"]
    return status, json.loads(text) if kind.startswith("application/json") else text


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_every_version_is_served_by_its_id(address: str, version: str) -> None:
    schema = lsst_schema_by_id(schema_id_of(version))
    status, found = ask(f"{address}/schemas/ids/{schema_id_of(version)}?subject=lsst-alerts-v11-value")
    assert status == 200 and list(found) == ["schema"]
    assert writer_schema(found["schema"]).fingerprint == schema.fingerprint


def test_subjects_list_their_versions_by_id(address: str) -> None:
    assert ask(f"{address}/subjects") == (200, ["alert-packet", "lsst-alerts-v11-value"])
    assert ask(f"{address}/subjects/alert-packet/versions") == (200, IDS)
    assert ask(f"{address}/subjects/lsst-alerts-v11-value/versions") == (200, WRITTEN_IDS)
    newest = ("lsst-alerts-v11-value", "latest", WRITTEN_IDS[-1])
    for subject, version, number in (("alert-packet", "700", 700), newest):
        status, found = ask(f"{address}/subjects/{subject}/versions/{version}")
        text = found.pop("schema")
        assert (status, found) == (200, {"subject": subject, "version": number, "id": number})
        assert writer_schema(text).fingerprint == lsst_schema_by_id(number).fingerprint


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/associations/resources/cluster/lsst-alerts-v11?resourceType=topic", 404),
        (f"/schemas/ids/{max(IDS) + 1}", 40403),
        ("/schemas/ids/eleven", 40403),
        ("/subjects/ztf-value/versions", 40401),
        ("/subjects/ztf-value/versions/1100", 40401),
        ("/subjects/lsst-alerts-v11-value/versions/1000", 40402),
        ("/versions/12.0", 40402),
        ("/config", 404),
    ],
)
def test_what_there_is_not_is_a_404_with_its_code(address: str, path: str, code: int) -> None:
    status, found = ask(address + path)
    assert status == 404 and found["error_code"] == code and found["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/versions"), ("POST", "/versions/1100"), ("DELETE", "/versions/1100")]
)
def test_nothing_can_be_registered(address: str, method: str, path: str) -> None:
    status, found = ask(f"{address}/subjects/lsst-alerts-v11-value{path}", method)
    assert (status, found["error_code"]) == (422, 42205)
    assert ask(f"{address}/subjects/lsst-alerts-v11-value/versions") == (200, WRITTEN_IDS)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_page_of_a_version_tells_every_field_with_unit_and_meaning(address: str, version: str) -> None:
    schema = packet_schema(version)
    status, page = ask(f"{address}/versions/{version}")
    assert status == 200 and schema.fingerprint in page
    for record, fields in schema.records.items():
        section = page[page.index(f'<section id="{record}">') :]
        rows = section[: section.index("</section>")].split("<tr>")[2:]
        assert len(rows) == len(fields)
        for row, field in zip(rows, fields, strict=True):
            cells = [re.sub("<[^>]*>", "", cell).strip() for cell in re.findall("<t[hd].*?</t[hd]>", row)]
            assert cells[0].split()[0] == field.name
            assert cells[1:4] == [field.kind, "yes" if field.nullable else "never", field.unit]
            assert cells[4].replace("&#39;", "'").replace("&gt;", ">").replace("&lt;", "<") == field.doc


def test_the_first_page_leads_to_every_version(address: str) -> None:
    status, page = ask(f"{address}/")
    assert status == 200
    for version in ALL_VERSIONS:
        assert f'href="/versions/{version}"' in page and f'href="/schemas/ids/{schema_id_of(version)}"' in page
        assert lsst_schema_by_id(schema_id_of(version)).fingerprint in page
        assert ask(f"{address}/versions/{version}")[0] == 200
    assert all(f"/subjects/{subject}/versions" in page for subject in SUBJECTS)


def test_views_tell_what_a_version_changed() -> None:
    added = {"exposureTime", "trailAlgorithm", "trail_flag", "reliabilityVersion"}
    assert set(version_view("11.1").added) == {f"diaSource.{name}" for name in added}
    assert version_view("11.1").gone == ()
    assert version_view(ALL_VERSIONS[0]).added == ()
    kinds = {row.name: (row.kind, row.nullable) for row in version_view("11.0").records["alert"]}
    assert kinds["prvDiaSources"] == ("list of diaSource", True)
    assert kinds["diaSource"] == ("diaSource", False)
    assert kinds["cutoutScience"] == ("bytes", True)
    assert not any(version_view(version).is_described for version in ARCHIVED_VERSIONS)


def test_a_port_that_is_taken_is_said_without_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(main, ["schemas", "serve", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1 and result.stderr.startswith("Error: cannot listen on 127.0.0.1: ")

"""A read-only schema registry: over HTTP for programs, with pages for people.

Routes, shapes and error codes are those that Confluent's clients ask for. The version of a schema in a subject is its
id, so that it is the same number everywhere.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from schemas.avro.schema_versions import (
    ARCHIVED_VERSIONS,
    DEFAULT_VERSION,
    VERSIONS,
    PacketSchema,
    lsst_schema_by_id,
    schema_id_of,
)

ALL_VERSIONS = (*ARCHIVED_VERSIONS, *VERSIONS)
SUBJECTS = {"alert-packet": ALL_VERSIONS, "lsst-alerts-v11-value": VERSIONS}


class RegistryError(Exception):
    """A request that is answered with an error; the code says more than the status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def registry_app() -> Starlette:
    """The registry as an ASGI application."""
    return Starlette(
        routes=[
            Route("/schemas/ids/{id}", _schema),
            Route("/subjects", _subjects),
            Route("/subjects/{subject}/versions", _versions),
            Route("/subjects/{subject}/versions/{version}", _version),
            Route("/", _index_page),
            Route("/versions/{version}", _version_page),
        ],
        exception_handlers={RegistryError: _refused, HTTPException: _no_route},
    )


def registry_server(host: str, port: int) -> tuple[uvicorn.Server, socket.socket]:
    """A server and the socket it is to run on: `server.run(sockets=[socket])`. OSError where the port is taken."""
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    return uvicorn.Server(uvicorn.Config(registry_app(), log_level="warning")), listening


# --- what programs ask for ------------------------------------------------------------------


async def _schema(request: Request) -> Response:
    number = request.path_params["id"]
    if number not in _ids(ALL_VERSIONS):
        raise RegistryError(40403, f"Schema {number} not found")
    return JSONResponse({"schema": _schema_text(int(number))})


async def _subjects(request: Request) -> Response:
    return JSONResponse(list(SUBJECTS))


async def _versions(request: Request) -> Response:
    return JSONResponse([int(number) for number in _ids(_of_subject(request))])


async def _version(request: Request) -> Response:
    known, number = _ids(_of_subject(request)), request.path_params["version"]
    if number == "latest":
        number = known[-1]
    if number not in known:
        raise RegistryError(40402, f"Version {number} not found; known are {', '.join(known)}")
    found = {"subject": request.path_params["subject"], "version": int(number), "id": int(number)}
    return JSONResponse({**found, "schema": _schema_text(int(number))})


def _of_subject(request: Request) -> tuple[str, ...]:
    subject = request.path_params["subject"]
    if subject not in SUBJECTS:
        raise RegistryError(40401, f"Subject '{subject}' not found; known are {', '.join(SUBJECTS)}")
    return SUBJECTS[subject]


def _ids(versions: tuple[str, ...]) -> list[str]:
    return [str(schema_id_of(version)) for version in versions]


@cache
def _schema_text(schema_id: int) -> str:
    return lsst_schema_by_id(schema_id).json_text(docs=True)


async def _refused(request: Request, error: Exception) -> Response:
    code, message = (error.code, error.message) if isinstance(error, RegistryError) else (500, "")
    return JSONResponse({"error_code": code, "message": message}, int(str(code)[:3]))


async def _no_route(request: Request, error: Exception) -> Response:
    """Confluent's client takes any other answer than such a 404 to /associations/... for one."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        return await _refused(request, RegistryError(42205, "This registry is read-only: nothing can be registered"))
    return await _refused(request, RegistryError(status, f"HTTP {status}: there is nothing at {request.url.path}"))


# --- what people look at --------------------------------------------------------------------


@dataclass(frozen=True)
class FieldRow:
    """A field of a record as a page tells it; `is_new`: the version before did not have it."""

    name: str
    kind: str
    nullable: bool
    unit: str
    doc: str
    is_new: bool


@dataclass(frozen=True)
class VersionView:
    """A version as the pages tell it; `gone`: fields that the version before had."""

    version: str
    schema_id: int
    name: str
    fingerprint: str
    use: str
    records: Mapping[str, tuple[FieldRow, ...]]
    gone: tuple[str, ...]

    @property
    def n_fields(self) -> int:
        return sum(len(rows) for rows in self.records.values())

    @property
    def added(self) -> tuple[str, ...]:
        return tuple(f"{record}.{row.name}" for record, rows in self.records.items() for row in rows if row.is_new)

    @property
    def is_described(self) -> bool:
        return any(row.doc for rows in self.records.values() for row in rows)


@cache
def version_view(version: str) -> VersionView:
    """What the pages tell of one of `ALL_VERSIONS`."""
    schema = lsst_schema_by_id(schema_id_of(version))
    described = {}
    if isinstance(schema, PacketSchema):
        described = {(record, one.name): one for record, fields in schema.records.items() for one in fields}
    before = _field_names(ALL_VERSIONS[max(ALL_VERSIONS.index(version) - 1, 0)])
    records = {}
    for record, fields in _record_fields(json.loads(_schema_text(schema_id_of(version)))):
        rows = []
        for field in fields:
            known = described.get((record, field["name"]))
            kind, nullable = _kind(field["type"])
            doc = field.get("doc", "") if known is None else known.doc
            is_new = f"{record}.{field['name']}" not in before
            rows.append(FieldRow(field["name"], kind, nullable, "" if known is None else known.unit, doc, is_new))
        records[record] = tuple(rows)
    gone = tuple(name for name in before if name not in _field_names(version))
    return VersionView(
        version,
        schema_id_of(version),
        f"lsst.v{version.replace('.', '_')}.alert",
        schema.fingerprint,
        "read only" if version in ARCHIVED_VERSIONS else "default" if version == DEFAULT_VERSION else "by choice",
        records,
        gone,
    )


@cache
def _field_names(version: str) -> tuple[str, ...]:
    avro = json.loads(_schema_text(schema_id_of(version)))
    return tuple(f"{record}.{field['name']}" for record, fields in _record_fields(avro) for field in fields)


def _record_fields(avro: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every record with its fields, the outer before those that it holds."""
    if isinstance(avro, list):
        for branch in avro:
            yield from _record_fields(branch)
    elif isinstance(avro, dict) and avro["type"] == "record":
        yield avro["name"].rpartition(".")[2], avro["fields"]
        for field in avro["fields"]:
            yield from _record_fields(field["type"])
    elif isinstance(avro, dict):
        yield from _record_fields(avro.get("items"))


def _kind(avro: Any) -> tuple[str, bool]:
    """How a type is called, and whether it can be null."""
    if isinstance(avro, list):
        (kind,) = (_kind(branch)[0] for branch in avro if branch != "null")
        return kind, True
    if isinstance(avro, str):
        return avro.rpartition(".")[2], False
    if avro["type"] == "array":
        return f"list of {_kind(avro['items'])[0]}", False
    return str(avro.get("logicalType") or avro.get("name", avro["type"])).rpartition(".")[2], False


async def _index_page(request: Request) -> Response:
    return _page("schemas.html", views=[version_view(version) for version in reversed(ALL_VERSIONS)], subjects=SUBJECTS)


async def _version_page(request: Request) -> Response:
    version = request.path_params["version"]
    if version not in ALL_VERSIONS:
        raise RegistryError(40402, f"Version {version} not found; known are {', '.join(ALL_VERSIONS)}")
    return _page("schema_version.html", view=version_view(version), versions=ALL_VERSIONS)


def _page(template: str, **values: Any) -> Response:
    return HTMLResponse(_environment().get_template(template).render(**values))


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("runners", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

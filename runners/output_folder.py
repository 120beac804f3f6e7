"""The output folder of a run: whose it is, and its books, closed when the flow has ended."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from schemas.elements import FailureRecord
from schemas.manifests import Manifest
from transforms.accounting import finish_ledger
from transforms.archiving import finish_object_tables
from transforms.delivery import ATTEMPTS
from transforms.failures import failure_line, write_bytes, write_lines
from transforms.filters.definition import FilterProblem

CLAIM = ".nightstream.json"
SCRATCH = (".store", ".spool")
_HEAD_BYTES = 32_768


class OutputFolderError(ValueError):
    """The output folder belongs to something else, or cannot be written."""


def check_output(out: Path, digest: str) -> None:
    """OutputFolderError unless the folder is empty, new, or that of an input with this digest."""
    path = out / CLAIM
    try:
        if path.is_file():
            known = _read_claim(path)
            if known["input"] != digest:
                raise OutputFolderError(
                    f"{out} holds the output of another input ({known['source']}): choose an empty folder"
                )
        elif out.exists() and any(out.iterdir()):
            raise OutputFolderError(
                f"{out} is not empty and not an output folder of nightstream: choose an empty folder"
            )
    except OSError as error:
        raise OutputFolderError(f"{out} cannot be written: {error}") from error


def clear_scratch(out: Path) -> Path:
    """A fresh folder for the claim-check stores. OutputFolderError where it cannot be made."""
    try:
        _remove(out, SCRATCH)
        store = out / SCRATCH[0]
        store.mkdir(parents=True)
    except OSError as error:
        raise OutputFolderError(f"{out} cannot be written: {error}") from error
    return store


def remove_scratch(out: Path) -> None:
    """Remove what only a running flow needs, and one that goes on where it broke off."""
    _remove(out, (*SCRATCH, ATTEMPTS))


def _remove(out: Path, names: tuple[str, ...]) -> None:
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)


def claim_output(out: Path, source: str, digest: str) -> None:
    """Mark the output folder as this input's.

    What a broken-off run left of failures and broker files is made again: it may be another release's.
    """
    renew_claim(out, source, digest)
    for folder in ("failures", "brokers"):
        shutil.rmtree(out / folder, ignore_errors=True)


def renew_claim(out: Path, source: str, digest: str) -> None:
    """Mark the output folder as this input's, and leave what is in it: the run goes on."""
    try:
        write_bytes(out / CLAIM, json.dumps({"input": digest, "source": source}, sort_keys=True).encode())
    except OSError as error:
        raise OutputFolderError(f"{out} cannot be written: {error}") from error


def _read_claim(path: Path) -> dict[str, str]:
    try:
        claim = json.loads(path.read_text(encoding="utf-8"))
        return {"input": str(claim["input"]), "source": str(claim["source"])}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputFolderError(f"{path} is broken ({error}): choose an empty folder") from error


def digest_of(parts: list[Any]) -> str:
    """SHA-256 over everything that decides what comes out of a run."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(path: Path) -> str | None:
    """Size, beginning and end of a file: to read all of a night twice is too dear. None if it cannot be read."""
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            digest = hashlib.sha256(stream.read(_HEAD_BYTES))
            stream.seek(max(size - _HEAD_BYTES, 0))
            digest.update(stream.read(_HEAD_BYTES))
            return f"{size}-{digest.hexdigest()}"
    except OSError:
        return None


def history_digest(folder: Path) -> str:
    """What the folder was made from, or its name where it does not say."""
    path = folder / CLAIM
    return _read_claim(path)["input"] if path.is_file() else str(folder.resolve())


def close_books(
    out: Path, filter_problems: tuple[FilterProblem, ...] = (), problems: tuple[FailureRecord, ...] = ()
) -> None:
    """What can only be written when the flow has ended; `problems` are those of the night as a whole."""
    # Nobody writes any more: temporary files that are still there are those of workers, or runs, that were killed.
    for path in (out / "archive").rglob(".*"):
        if path.is_file():
            path.unlink()
    finish_object_tables(out / "archive")
    finish_ledger(out / "ledger")
    left_out = tuple(
        FailureRecord(
            None,
            None,
            "filtering",
            "InvalidFilter",
            f"{problem.file}: {problem.key or 'file'}: {problem.reason}",
            "everything this filter would have passed",
        )
        for problem in filter_problems
    )
    for name, records in (("filters", left_out), ("night", problems)):
        if records:
            write_lines(out / "failures" / f"{name}.jsonl", [failure_line(record) for record in records])


def check_books(out: Path, manifest: Manifest) -> None:
    """RuntimeError unless the ledger knows every announced visit and what became of every source in it."""
    records = {}
    for line in (out / "ledger" / "visits.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["visit"]] = record
    missing = [visit.visit for visit in manifest.visits if visit.visit not in records]
    if missing:
        raise RuntimeError(f"the ledger has no record of {len(missing)} visits, the first is {missing[0]}")
    for visit, record in records.items():
        selected, alerts = record["dia_sources"]["selected"], record["alerts"]
        if selected != alerts + record["sources_without_object"] and not record["failures"]:
            raise RuntimeError(
                f"visit {visit}: {selected} sources were selected, but {alerts} became alerts and "
                f"{record['sources_without_object']} stayed without an object"
            )


def delivered_per_broker(out: Path) -> dict[str, int]:
    """Alerts that the ledger says each broker was sent."""
    totals: dict[str, int] = {}
    for line in (out / "ledger" / "visits.jsonl").read_text(encoding="utf-8").splitlines():
        for name, count in json.loads(line)["delivered"].items():
            totals[name] = totals.get(name, 0) + count
    return totals

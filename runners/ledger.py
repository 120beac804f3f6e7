"""The ledger of an output folder, read while it is being written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def ledger_files(out: Path) -> list[Path]:
    """`OUT/ledger/<visit>.json`, in order of name; unfinished files are passed over."""
    return sorted(path for path in (out / "ledger").glob("*.json") if path.name[0] not in "._")


def read_record(path: Path) -> dict[str, Any] | None:
    """A ledger record; None while it is being replaced, or if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None

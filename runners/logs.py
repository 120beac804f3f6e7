"""Log lines: one JSON object each in the log folder of a cluster, a short line for a person on a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

# Of each file of a cluster's log folder; as much again is kept of what was before.
LOG_BYTES = 32 * 2**20
COMMANDS = "commands.log"
_OURS = ("pipelines", "runners", "schemas", "transforms")
# What a line may be about, given to the logger as `extra`.
_SUBJECTS = ("stage", "visit", "detector", "job", "out")


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, process, what it is about, message, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            **_subjects(record),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class HumanLines(logging.Formatter):
    """The same in words, without the time."""

    def format(self, record: logging.LogRecord) -> str:
        about = ", ".join(f"{name} {value}" for name, value in _subjects(record).items())
        text = f"{record.levelname.lower()}: {record.getMessage()}{f' ({about})' if about else ''}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _subjects(record: logging.LogRecord) -> dict[str, object]:
    found = {name: getattr(record, name, None) for name in _SUBJECTS}
    return {name: value for name, value in found.items() if value is not None}


def log_for_people() -> None:
    """Errors to standard error, for the commands: what else matters comes as an exception."""
    handler = logging.StreamHandler()
    handler.setFormatter(HumanLines())
    logging.basicConfig(level=logging.ERROR, handlers=[handler])


def log_json() -> None:
    """JSON lines to standard error, for processes of a cluster: what we say, and warnings of libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(capture=True)


def note_command(folder: Path, message: str, *, job: str, out: Path) -> None:
    """Add a line to `commands.log` of a cluster's log folder: who works there later sees what was done to a job."""
    record = logging.makeLogRecord(
        {"name": "commands", "levelno": logging.INFO, "levelname": "INFO", "msg": message, "job": job, "out": str(out)}
    )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / COMMANDS).open("a", encoding="utf-8") as log:
        log.write(JsonLines().format(record) + "\n")


def bound_logs(folder: Path) -> None:
    """Move what is in a log that has become too large to `NAME.log.before`, and go on at its beginning.

    Those who write must append. What is written between the two steps is lost; where there is no room for the copy,
    all of it.
    """
    for path in folder.glob("*.log"):
        with contextlib.suppress(FileNotFoundError):  # its process was started again just now
            if path.stat().st_size > LOG_BYTES:
                with contextlib.suppress(OSError):
                    shutil.copyfile(path, path.with_name(f"{path.name}.before"))
                os.truncate(path, 0)

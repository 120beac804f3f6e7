"""The DuckDB connection that filters are checked and run on: closed to the outside, bounded in memory and time.

DuckDB's own settings are one of three fences. The first is the list of what a filter may say
(`transforms.filters.vocabulary`); the third, a process that can be killed, is still to come: an interrupt
is not honoured inside one vectorised call, and the memory limit is overshot by some functions. Those
functions are therefore not on the list.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

TABLE = "alerts"
MEMORY_LIMIT_MB = 512
TIMEOUT_S = 5.0

# In this order: the last one forbids all further SET.
_SETTINGS = (
    "threads = 1",  # one order of operations, so that results repeat to the byte
    "python_enable_replacements = false",  # else a filter reads this process's variables as tables
    "autoinstall_known_extensions = false",
    "autoload_known_extensions = false",
    "allow_community_extensions = false",
    "temp_directory = ''",
    "max_temp_directory_size = '0B'",
    "enable_external_access = false",
    "lock_configuration = true",
)

# Ours, so that authors need not write spherical trigonometry. Degrees; nJy to AB magnitude (null unless positive).
MACROS = {
    "separation_deg": (
        "(ra1, dec1, ra2, dec2) AS 2 * degrees(asin(least(1.0, sqrt("
        "sin(radians(dec2 - dec1) / 2) ** 2"
        " + cos(radians(dec1)) * cos(radians(dec2)) * sin(radians(ra2 - ra1) / 2) ** 2))))"
    ),
    "ab_magnitude": "(flux_njy) AS CASE WHEN flux_njy > 0 THEN 31.4 - 2.5 * log10(flux_njy) END",
}

MACRO_REPEATS = 2  # no macro names a parameter more often

_INTERRUPT_EVERY_S = 0.02
_PATIENCE = 10.0


class FilterTimeoutError(Exception):
    """A filter ran longer than it may."""


def open_connection(memory_limit_mb: int = MEMORY_LIMIT_MB) -> duckdb.DuckDBPyConnection:
    """A private in-memory database without access to files, network, extensions or Python variables."""
    connection = duckdb.connect(":memory:")
    for name, body in MACROS.items():
        connection.execute(f"CREATE MACRO {name}{body}")
    connection.execute(f"SET memory_limit = '{memory_limit_mb}MB'")
    for setting in _SETTINGS:
        connection.execute(f"SET {setting}")
    return connection


class FilterConnection:
    """A connection kept from visit to visit: opening one takes longer than a filter.

    What a filter may say leaves nothing behind in it; after an error it is dropped all the same.
    """

    def __init__(self, memory_limit_mb: int = MEMORY_LIMIT_MB) -> None:
        self._memory_limit_mb = memory_limit_mb
        self._connection: duckdb.DuckDBPyConnection | None = None

    def get(self) -> duckdb.DuckDBPyConnection:
        """The connection, opened where there is none."""
        if self._connection is None:
            self._connection = open_connection(self._memory_limit_mb)
        return self._connection

    def close(self) -> None:
        """Drop the connection; the next `get` opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def time_limit(connection: duckdb.DuckDBPyConnection, timeout_s: float) -> Iterator[None]:
    """Interrupt what runs on `connection` inside this block once it has had `timeout_s` seconds of processor time.

    So a busy machine does not decide what passes; only after `_PATIENCE` times as long the clock does.

    Raises
    ------
    FilterTimeoutError
        The block was interrupted.
    """
    done = threading.Event()
    expired = threading.Event()

    started, spent_before = time.monotonic(), time.process_time()

    def watch() -> None:
        wait_s = timeout_s
        while wait_s > 0.0:
            if done.wait(wait_s):
                return
            left_s = timeout_s - (time.process_time() - spent_before)
            wait_s = min(left_s, started + _PATIENCE * timeout_s - time.monotonic())
        expired.set()
        # Again and again: an interrupt that falls between two queries of the block is lost.
        while not done.wait(_INTERRUPT_EVERY_S):
            connection.interrupt()

    watcher = threading.Thread(target=watch, name="filter-time-limit", daemon=True)
    watcher.start()
    try:
        yield
    except duckdb.InterruptException as error:
        if not expired.is_set():
            raise
        raise FilterTimeoutError(f"stopped after {timeout_s:g} s") from error
    finally:
        done.set()
        watcher.join()


def tidy_message(error: Exception) -> str:
    """DuckDB's message without the line number of a text that its author never saw."""
    lines = str(error).strip().splitlines()
    tidy: list[str] = []
    indent = 0
    for line in lines:
        if line.startswith("LINE ") and ": " in line:
            indent = line.index(": ") + 2
            tidy.append("  " + line[indent:])
        elif indent and line.strip("^ ") == "":
            tidy.append("  " + line[indent:])
        elif line.strip():
            tidy.append(line)
    return "\n".join(tidy)

"""Tables of osculating elements: what a night folder may say of the orbits of known objects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from schemas.manifests import SURVEY_MJD_RANGE

REQUIRED_COLUMNS = ("ssObjectId", "epoch_mjd", "e", "i", "node", "argperi")
# One of the pairs must be there: where a row has both, the first.
PERIHELION, MEAN_ANOMALY = ("q", "peri_time"), ("a", "mean_anomaly")
PACKED, UNPACKED = "packed_primary_provisional_designation", "unpacked_primary_provisional_designation"
OPTIONAL_COLUMNS = ("designation", PACKED, UNPACKED, "h", "g")
KNOWN_COLUMNS = (*REQUIRED_COLUMNS, *PERIHELION, *MEAN_ANOMALY, *OPTIONAL_COLUMNS)
DESIGNATION_BYTES = 32
PACKED_BYTES = 12
_MAX_ECCENTRICITY = 100.0
_MIN_PERIHELION_AU = 1e-4  # well inside the Sun; below, propagation takes ever smaller steps
_MAX_PERIHELION_AU = 10_000.0
_MAX_PERIHELION_MJD = 2e6  # 3,600 years from now; a Julian date is beyond
_EXAMPLES = 3


class ElementsError(ValueError):
    """A table of elements that cannot be used; the message says why."""


@dataclass(frozen=True)
class ElementsProblem:
    """Why rows of a table cannot be used, and how many."""

    reason: str
    count: int


@dataclass(frozen=True)
class ElementTable:
    """Usable elements in order of ssObjectId, each id once; arrays of shape (n,), angles in degrees.

    Attributes
    ----------
    ss_object_id : int64 > 0
    designation : bytes, cut to what a record holds; empty where there is none
    epoch_mjd : TT
    perihelion_au, perihelion_mjd : NaN where the row gives semi-major axis and mean anomaly instead
    semi_major_au, mean_anomaly_deg : NaN where the row gives the perihelion
    absolute_h, slope_g : NaN where there is none
    packed_provisional, unpacked_provisional : the MPC's primary provisional designation; bytes, empty where there is
        none
    problems : what of the table is not in it
    """

    ss_object_id: np.ndarray
    designation: np.ndarray
    epoch_mjd: np.ndarray
    eccentricity: np.ndarray
    inclination_deg: np.ndarray
    node_deg: np.ndarray
    argument_deg: np.ndarray
    perihelion_au: np.ndarray
    perihelion_mjd: np.ndarray
    semi_major_au: np.ndarray
    mean_anomaly_deg: np.ndarray
    absolute_h: np.ndarray
    slope_g: np.ndarray
    packed_provisional: np.ndarray
    unpacked_provisional: np.ndarray
    problems: tuple[ElementsProblem, ...] = ()


def read_element_table(path: Path) -> ElementTable:
    """Read a table of elements, Parquet or (by its name) CSV with a header line.

    Columns are named as in the alert schema's `mpc_orbits`. Rows that cannot be used become one problem per reason,
    the rest goes on. Of rows with one ssObjectId the one of the latest epoch stands. The order of rows has no effect.

    Raises
    ------
    ElementsError
        The file cannot be read, lacks a column, or holds something else than numbers in one.
    """
    try:
        table, n_broken = _read_csv(path) if path.suffix == ".csv" else (_read_parquet(path), 0)
        names = table.column_names
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: names that are no UTF-8
        raise ElementsError(f"{path}: cannot be read: {error}") from error
    if len(set(names)) < len(names):
        raise ElementsError(f"{path}: two columns of one name")
    missing = [name for name in REQUIRED_COLUMNS if name not in table.column_names]
    if missing:
        raise ElementsError(f"{path}: no column {', '.join(missing)}; there are {', '.join(table.column_names)}")
    if not any(set(pair) <= set(table.column_names) for pair in (PERIHELION, MEAN_ANOMALY)):
        raise ElementsError(f"{path}: need columns {' and '.join(PERIHELION)}, or {' and '.join(MEAN_ANOMALY)}")
    try:
        columns = _columns(table)
    except ValueError as error:
        raise ElementsError(f"{path}: {error}") from error
    problems = [ElementsProblem("another number of cells than the header", n_broken)] if n_broken else []
    return _usable(columns, problems)


def _read_parquet(path: Path) -> pa.Table:
    """The known columns; a table of the MPC's has some that are many times as large."""
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    known = [name for name in names if name in KNOWN_COLUMNS]
    if len(set(known)) < len(known) or not set(REQUIRED_COLUMNS) <= set(known):
        return file.schema_arrow.empty_table()  # whose names say what is wrong
    return file.read(columns=known)


def _read_csv(path: Path) -> tuple[pa.Table, int]:
    """All known columns as text, so that one bad cell costs its row only; and the number of lines left out."""
    broken = 0

    def leave_out(_: Any) -> str:
        nonlocal broken
        broken += 1
        return "skip"

    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=leave_out),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(KNOWN_COLUMNS, pa.string()), strings_can_be_null=True, null_values=[""]
        ),
    )
    return table, broken


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    names = (*REQUIRED_COLUMNS[1:], *PERIHELION, *MEAN_ANOMALY, "h", "g")
    columns = {name: _numbers(table, name) for name in names}
    columns["ssObjectId"] = _identifiers(table["ssObjectId"])
    columns["designation"] = _designations(table, "designation", DESIGNATION_BYTES)
    columns[PACKED] = _designations(table, PACKED, PACKED_BYTES)
    columns[UNPACKED] = _designations(table, UNPACKED, DESIGNATION_BYTES)
    # Semi-major axis and mean anomaly stand in for rows without a perihelion.
    given = np.isfinite(columns["q"]) & np.isfinite(columns["peri_time"])
    for name, without in (("q", ~given), ("peri_time", ~given), ("a", given), ("mean_anomaly", given)):
        columns[name][without] = np.nan
    return columns


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64; NaN where there is no number."""
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    column = table[name]
    if _is_text(column.type):
        try:
            column = column.cast(pa.float64())
        except pa.ArrowInvalid:  # some cell is no number, or one that only Python reads
            return np.array(_parsed(column, float, math.nan), dtype=np.float64)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"{name} is {column.type}")
    return np.array(column.cast(pa.float64(), safe=False).fill_null(math.nan).to_numpy(), dtype=np.float64)


def _identifiers(column: pa.ChunkedArray) -> np.ndarray:
    """ssObjectId as int64; 0 where there is none. They never pass through a float."""
    if _is_text(column.type):
        if not pc.all(pc.match_substring_regex(column.fill_null("x"), r"\A[0-9]{1,18}\z")).as_py():
            numbers = _parsed(column, int, 0)
            return np.array([number if 0 < number < 2**63 else 0 for number in numbers], dtype=np.int64)
        column = column.cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"ssObjectId is {column.type}")
    try:
        return np.array(column.cast(pa.int64()).fill_null(0).to_numpy(), dtype=np.int64)
    except pa.ArrowInvalid as error:
        raise ValueError(f"ssObjectId: {error}") from error


def _designations(table: pa.Table, column: str, width: int) -> np.ndarray:
    """Names cut to what a record holds, never inside a character; one byte wide where there are none."""
    if column not in table.column_names:
        return np.zeros(len(table), dtype="S1")
    if _is_text(table[column].type):
        trimmed = pc.utf8_trim_whitespace(table[column]).cast(pa.large_binary()).fill_null(b"")
        if (pc.max(pc.binary_length(trimmed)).as_py() or 0) <= width:  # nothing to cut
            return np.array(trimmed.to_pylist(), dtype=f"S{width}")
    names = table[column].to_pylist()
    return np.array([record_designation(name, width) for name in names], dtype=f"S{width}")


def record_designation(name: object, width: int = DESIGNATION_BYTES) -> bytes:
    """A name as a record holds it: cut to its width, never inside a character; empty for none."""
    text = "" if name is None else str(name).strip()
    return text.encode(errors="ignore")[:width].decode(errors="ignore").encode()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _parsed(column: pa.ChunkedArray, parse: Callable[[str], Any], nothing: Any) -> list[Any]:
    values = []
    for text in column.to_pylist():
        try:
            values.append(nothing if text is None else parse(text))
        except ValueError:
            values.append(nothing)
    return values


def _usable(columns: dict[str, np.ndarray], problems: list[ElementsProblem]) -> ElementTable:
    """The rows that can be used, by id, and why the others cannot."""
    q, e = columns["q"], columns["e"]
    perihelion_given = np.isfinite(q)
    with np.errstate(invalid="ignore", over="ignore"):
        perihelion = np.where(perihelion_given, q, columns["a"] * (1.0 - e))
    shape_known = perihelion_given | (np.isfinite(columns["a"]) & np.isfinite(columns["mean_anomaly"]))
    oriented = [np.isfinite(columns[name]) for name in ("epoch_mjd", "e", "i", "node", "argperi")]
    first_mjd, last_mjd = SURVEY_MJD_RANGE
    rules = {
        "ssObjectId is missing or not positive": columns["ssObjectId"] < 1,
        "an element is missing or no number": ~(np.logical_and.reduce(oriented) & shape_known),
        f"epoch_mjd outside [{first_mjd:.0f}, {last_mjd:.0f}]": ~(
            (columns["epoch_mjd"] >= first_mjd) & (columns["epoch_mjd"] <= last_mjd)
        ),
        f"e outside [0, {_MAX_ECCENTRICITY:.0f}]": ~((e >= 0.0) & (e <= _MAX_ECCENTRICITY)),
        f"perihelion distance outside [{_MIN_PERIHELION_AU:g}, {_MAX_PERIHELION_AU:.0f}] au": ~(
            (perihelion >= _MIN_PERIHELION_AU) & (perihelion <= _MAX_PERIHELION_AU)
        ),
        "i outside [0, 180]": ~((columns["i"] >= 0.0) & (columns["i"] <= 180.0)),
        f"peri_time beyond MJD {_MAX_PERIHELION_MJD:.0f} either way": np.abs(columns["peri_time"])
        > _MAX_PERIHELION_MJD,
    }
    kept = np.ones(len(e), dtype=bool)
    for reason, wrong in rules.items():
        problems += _problem(reason, columns["ssObjectId"][kept & wrong])
        kept &= ~wrong
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(columns["ssObjectId"][rows], kind="stable")]
    ids = columns["ssObjectId"][rows]
    repeated = np.zeros(len(ids), dtype=bool)
    repeated[1:] = ids[1:] == ids[:-1]
    if repeated.any():
        # The latest epoch first; ties by content, so that the order of rows decides nothing.
        content = [columns[name][rows] for name in sorted(columns) if name not in ("ssObjectId", "epoch_mjd")]
        rows = rows[np.lexsort((*content, -columns["epoch_mjd"][rows], ids))][~repeated]
    problems += _problem("ssObjectId occurs again; the latest epoch stands", ids[repeated])
    columns = {name: column[rows] for name, column in columns.items()}
    return ElementTable(
        columns["ssObjectId"],
        columns["designation"],
        columns["epoch_mjd"],
        columns["e"],
        columns["i"],
        columns["node"],
        columns["argperi"],
        columns["q"],
        columns["peri_time"],
        columns["a"],
        columns["mean_anomaly"],
        columns["h"],
        columns["g"],
        columns[PACKED],
        columns[UNPACKED],
        tuple(problems),
    )


def _problem(reason: str, ids: np.ndarray) -> list[ElementsProblem]:
    if len(ids) == 0:
        return []
    named = [str(number) for number in np.unique(ids[ids > 0])[:_EXAMPLES]]
    examples = f" (ssObjectId {', '.join(named)}{' ...' if len(ids) > len(named) else ''})" if named else ""
    return [ElementsProblem(reason + examples, len(ids))]

"""Archived packets of a batch in the field names of the newest schema, column by column.

What becomes of a packet is said in `schemas.avro.adaptation`; here it is done for LSST's packets (7.0 to 11.1, also as
Fink passes them on) without a dict per alert. Each packet that is out of the ordinary, and every one of ZTF, goes
through the dicts of `adapt_packet`, so that both ways give the same table and the same refusals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.avro.adaptation import (
    ARCSEC_PER_DEG,
    LSST,
    MAX_EXPOSURE_S,
    MISPLACED_DEG,
    MJD_RANGE,
    RENAMED,
    SS_SOURCE_9,
    AdaptedPacket,
    PacketHead,
    adapt_packet,
    adapted_table,
    mjd_tai,
)
from schemas.avro.body_reading import BOOLEAN, DOUBLE, FLOAT, INT, LONG, STRING, TIMESTAMP
from schemas.avro.container import ContainerSchema
from schemas.avro.messages import Packet
from schemas.avro.projection import Leaves
from schemas.avro.reading import decode_body
from schemas.avro.reading_programs import Program, compiled
from schemas.avro.wire import PacketFormatError
from schemas.manifests import BANDS
from schemas.records import ZERO_IS_NULL
from schemas.tables import ALERT_COLUMNS, ALERT_ID, KEY_FIELDS, alerts_arrow_schema, project_alerts_schema

_MAX_INT = 2**31 - 1
_DAYS_TO_1970 = 40_587
_RESIDUAL_RA = "residualRa"
_LISTS = tuple(column for column, (_, is_list) in ALERT_COLUMNS.items() if is_list)

# what every packet is asked for, whatever the filters want
_CHECKED = {
    "diaSource": (
        "diaSourceId", "visit", "detector", "ra", "dec", "midpointMjdTai", "band", "exposureTime", "diaObjectId",
        "ssObjectId",
    ),
    "diaObject": ("diaObjectId",),
    "ssSource": ("ssObjectId",),
    "prvDiaSources": ("diaSourceId", "midpointMjdTai"),
    "prvDiaForcedSources": ("diaForcedSourceId", "midpointMjdTai"),
}  # fmt: skip
_OLD_SS_UNITS = {new: (old, unit) for old, new, unit in SS_SOURCE_9} | {"ephOffsetRa": (_RESIDUAL_RA, ARCSEC_PER_DEG)}
_FLOATS = (FLOAT, DOUBLE)
# of a column: what its numbers are here, and the kinds of written values that it takes as they are
_TYPES: dict[pa.DataType, tuple[type, tuple[int, ...]]] = {
    pa.int64(): (np.int64, (LONG, INT)),
    pa.int32(): (np.int32, (INT, LONG)),
    pa.float32(): (np.float32, _FLOATS),
    pa.float64(): (np.float64, _FLOATS),
    pa.bool_(): (np.bool_, (BOOLEAN,)),
    pa.string(): (np.bytes_, (STRING,)),
}


@dataclass(frozen=True)
class AdaptedBatch:
    """Packets in today's names.

    Attributes
    ----------
    heads : of each packet what it must say, or why it cannot be used
    rows : (n_usable,) int64, the packets that can be used, a row of the table each
    table : what `project_alerts_schema` describes
    is_moving : (n_usable,) bool, whether there is an ssSource
    """

    heads: list[PacketHead | PacketFormatError]
    rows: np.ndarray
    table: pa.Table
    is_moving: np.ndarray


def adapt_packets(packets: Sequence[Packet], columns: frozenset[str]) -> AdaptedBatch:
    """Packets, of whatever survey and version, as heads and rows of the table that filters see.

    Parameters
    ----------
    packets : in any mixture of schemas
    columns : of the table, as in `project_alerts_schema`

    A packet that is broken, lacks what every packet must say, or holds a value that its column cannot hold
    (`PacketFormatError` in `heads`) costs only itself.

    Raises
    ------
    ValueError
        A column that the table does not have.
    """
    heads: list[PacketHead | PacketFormatError] = [PacketFormatError("not read")] * len(packets)
    parts: list[_Part] = []
    left: list[int] = []
    by_schema: dict[int, list[int]] = {}
    for i, packet in enumerate(packets):
        by_schema.setdefault(id(packet.schema), []).append(i)
    for places in by_schema.values():
        plan = _lsst_plan(packets[places[0]].schema, columns)
        if plan is None:
            left += places
            continue
        batch = _LsstBatch(plan, [packets[i].body for i in places])
        table, good = batch.adapted()
        parts.append(_Part([places[k] for k in good], table, batch.is_there("ssSource")[good].tolist()))
        for k, head in zip(good, batch.heads(good), strict=True):
            heads[places[k]] = head
        for k in np.flatnonzero(batch.bad).tolist():
            error = batch.leaves.errors[k]
            if error is None:
                left.append(places[k])
            else:
                heads[places[k]] = error
    parts += _through_dicts(packets, left, columns, heads)
    rows = np.array([row for part in parts for row in part.rows], dtype=np.int64)
    is_moving = np.array([moving for part in parts for moving in part.is_moving], dtype=bool)
    tables = [part.table for part in parts] or [project_alerts_schema(columns).empty_table()]
    table = pa.concat_tables(tables)
    order = np.argsort(rows)
    if len(parts) > 1:
        table = table.combine_chunks().take(pa.array(order))
    return AdaptedBatch(heads, rows[order], table, is_moving[order])


class _Part(NamedTuple):
    rows: list[int]
    table: pa.Table
    is_moving: list[bool]


def _through_dicts(
    packets: Sequence[Packet], places: list[int], columns: frozenset[str], heads: list[PacketHead | PacketFormatError]
) -> list[_Part]:
    """Packets one by one; their heads, or why they cannot be used, are written into `heads`."""
    adapted: dict[int, AdaptedPacket] = {}
    for i in places:
        try:
            adapted[i] = adapt_packet(decode_body(packets[i].schema, packets[i].body))
        except PacketFormatError as error:
            heads[i] = error
    if not adapted:
        return []
    try:
        groups = [(list(adapted), adapted_table([one.record for one in adapted.values()], columns))]
    except PacketFormatError:
        groups = []
        for i, one in adapted.items():
            try:
                groups.append(([i], adapted_table([one.record], columns)))
            except PacketFormatError as error:
                heads[i] = error
    parts = []
    for rows, table in groups:
        for i in rows:
            heads[i] = adapted[i]
        parts.append(_Part(rows, table, [adapted[i].record["ssSource"] is not None for i in rows]))
    return parts


@dataclass(frozen=True, eq=False)
class _LsstPlan:
    """How packets of a schema become columns.

    Attributes
    ----------
    label : of the schema
    table_schema : of the table to make
    has_radians : forced points may have places in radians
    """

    label: str
    program: Program
    table_schema: pa.Schema
    has_radians: bool


@lru_cache(maxsize=256)
def _lsst_plan(schema: ContainerSchema, columns: frozenset[str]) -> _LsstPlan | None:
    """None where the schema is another survey's or has types that are not LSST's."""
    fields = {field["name"] for field in schema.parsed["fields"]}
    table_schema = project_alerts_schema(columns)
    wanted = {column: set(names) for column, names in _CHECKED.items()}
    for column in wanted.keys() & set(table_schema.names):
        kind = table_schema.field(column).type
        wanted[column] |= {field.name for field in (kind.value_type if column in _LISTS else kind)}
    has_radians = "alertId" in fields
    if has_radians:
        wanted["prvDiaForcedSources"] |= {"ra", "dec"}
    wanted["ssSource"] |= {old for old, _ in _OLD_SS_UNITS.values()}
    paths = set()
    for column, names in wanted.items():
        names |= {old for name in names for old, _ in _older(column, name)}
        paths |= {f"{column}.{name}" for name in names}
        paths |= {f"{column}[]"} if column in _LISTS else {column, f"{column}*"}
    program = compiled(schema, frozenset(paths), True)
    is_plain = all(_is_plain(program, column) for column in ALERT_COLUMNS if column in fields)
    if "diaSource" not in fields or program.ambiguous or not is_plain:
        return None
    return _LsstPlan(schema.label, program, table_schema, has_radians)


def _is_plain(program: Program, column: str) -> bool:
    """Whether a column has the shape and its values the types that LSST gives them."""
    there = f"{column}[]" if column in _LISTS else f"{column}*"
    level = program.levels.get(column, 0)
    if (level > 0) != (column in _LISTS) or there not in program.leaves:
        return False
    struct = _struct_of(column)
    for path, leaf in program.leaves.items():
        holder, _, name = path.partition(".")
        if holder != column or not name:
            continue
        if leaf.level != level:
            return False
        index = struct.get_field_index(name)
        if index >= 0:
            kinds = _TYPES[struct.field(index).type][1]
        elif name == "is_negative":
            kinds = (BOOLEAN,)
        else:
            kinds = _FLOATS if column == "ssSource" else (TIMESTAMP,)
        if leaf.kind not in kinds:
            return False
    return True


def _struct_of(column: str) -> pa.StructType:
    whole = alerts_arrow_schema().field(column).type
    return whole.value_type if column in _LISTS else whole


def _older(column: str, name: str) -> list[tuple[str, float | None]]:
    """Names that a field had before and, if its unit was another, that in units of now."""
    renamed: list[tuple[str, float | None]] = [
        (old, None) for old, new in RENAMED[ALERT_COLUMNS[column][0]] if new == name
    ]
    return renamed + ([_OLD_SS_UNITS[name]] if column == "ssSource" and name in _OLD_SS_UNITS else [])


class _LsstBatch:
    """A batch of LSST's packets; `bad` are those that only the way through dicts can judge."""

    def __init__(self, plan: _LsstPlan, bodies: Sequence[Any]) -> None:
        self.leaves = leaves = Leaves(plan.label, plan.program, bodies, True)
        self.table_schema = plan.table_schema
        self.bad = leaves.codes != 0
        self.fields: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self.misplaced: np.ndarray | None = None
        self._check_source()
        self._check_objects()
        self.orders = {column: self._check_history(column) for column in _LISTS}
        if plan.has_radians:
            self.misplaced = self._far_points()
            for name in ("ra", "dec"):
                self.fields.pop(("prvDiaForcedSources", name), None)

    def adapted(self) -> tuple[pa.Table, list[int]]:
        """The table of those packets that are not bad, and which these are."""
        table = pa.Table.from_arrays([self._column(column) for column in self.table_schema], schema=self.table_schema)
        good = np.flatnonzero(~self.bad)
        return table.take(pa.array(good)) if self.bad.any() else table, good.tolist()

    def heads(self, good: list[int]) -> Iterator[PacketHead]:
        """What these packets must say."""
        columns = [self._field("diaSource", name)[0].tolist() for name in _CHECKED["diaSource"][:3]]
        midpoints = self._field("diaSource", "midpointMjdTai")[0].tolist()
        exposures, has_exposure = self._field("diaSource", "exposureTime")
        bands = self.leaves.arrow("diaSource.band").to_pylist()
        for k in good:
            dia_source_id, visit, detector = (column[k] for column in columns)
            exposure = float(exposures[k])
            said = has_exposure[k] and not math.isnan(exposure)
            yield PacketHead(
                survey=LSST,
                dia_source_id=dia_source_id,
                visit=visit,
                detector=detector,
                band=bands[k],
                midpoint_mjd_tai=midpoints[k],
                exposure_time_s=exposure if said else None,
                kafka_key=str(int(self.keys[k]) or dia_source_id),
            )

    def is_there(self, column: str) -> np.ndarray:
        """(n,) bool, where a record holds anything but nulls."""
        leaf = self.leaves.program.leaves.get(f"{column}*")
        return np.zeros(self.leaves.n, dtype=bool) if leaf is None else self.leaves.valid(leaf)

    def _check_source(self) -> None:
        self.bad |= ~self.is_there("diaSource")
        for name in ("diaSourceId", "visit", "detector"):
            values, valid = self._field("diaSource", name)
            self.bad |= ~valid | (values < 0) | ((name == "detector") & (values > _MAX_INT))
        for name, low, high in (("ra", 0.0, 360.0), ("dec", -90.0, 90.0), ("midpointMjdTai", *MJD_RANGE)):
            values, valid = self._field("diaSource", name)
            self.bad |= ~(valid & (values >= low) & (values <= high))
        values, valid = self._field("diaSource", "exposureTime")
        self.bad |= valid & ~np.isnan(values) & ~((values >= 0.0) & (values <= MAX_EXPOSURE_S))
        if "diaSource.band" in self.leaves.program.leaves:
            bands = pc.is_in(self.leaves.arrow("diaSource.band"), pa.array(BANDS))
            self.bad |= ~bands.to_numpy(zero_copy_only=False)
        else:
            self.bad[:] = True

    def _check_objects(self) -> None:
        self.keys = np.zeros(self.leaves.n, dtype=np.int64)
        for column, name in (("diaObject", "diaObjectId"), ("ssSource", "ssObjectId")):
            own, has_own = self._field(column, name)
            self.bad |= self.is_there(column) & (~has_own | (own < 0))
            for ids, valid in (self._field("diaSource", name), (own, has_own)):
                self.keys = np.where((self.keys == 0) & valid, ids, self.keys)
        self.bad |= self.keys < 0
        for old, _ in _OLD_SS_UNITS.values():
            written = self._written("ssSource", old)
            if written is not None:
                self.bad |= written[1] & ~np.isfinite(written[0])

    def _check_history(self, column: str) -> np.ndarray | None:
        """The rows of all histories in order of (midpoint, id) within each packet, None where they are so already."""
        program = self.leaves.program
        if column not in program.levels:
            return None
        bodies = self.leaves.body_of_row(program.levels[column])
        ids, has_id = self._field(column, KEY_FIELDS[column])
        midpoints, has_midpoint = self._field(column, "midpointMjdTai")
        is_item = self.leaves.valid(program.leaves[f"{column}[]"])
        self.bad[bodies[~(is_item & has_id & (ids >= 0) & has_midpoint & np.isfinite(midpoints))]] = True
        order = np.lexsort((ids, midpoints, bodies))
        return None if (order == np.arange(len(order))).all() else order

    def _far_points(self) -> np.ndarray | None:
        """(n_rows,) bool, forced points that are not within 0.1 degrees of their alert in both angles."""
        column = "prvDiaForcedSources"
        if column not in self.leaves.program.levels:
            return None
        bodies = self.leaves.body_of_row(self.leaves.program.levels[column])
        (ra, has_ra), (dec, has_dec) = (self._field(column, name) for name in ("ra", "dec"))
        for values, valid in ((ra, has_ra), (dec, has_dec)):
            self.bad[bodies[valid & np.isinf(values)]] = True
        placed = has_ra & has_dec & np.isfinite(ra) & np.isfinite(dec)
        ra, dec = np.where(placed, ra, 0.0), np.where(placed, dec, 0.0)
        alert_ra, alert_dec = (self._good(name)[bodies] for name in ("ra", "dec"))
        across = (ra - alert_ra + 180.0) % 360.0 - 180.0
        far = np.abs(across) * self._cos_dec()[bodies] > MISPLACED_DEG
        return placed & (far | (np.abs(dec - alert_dec) > MISPLACED_DEG))

    def _good(self, name: str) -> np.ndarray:
        """A number of diaSource, 0 where the packet is bad."""
        return np.where(self.bad, 0.0, self._field("diaSource", name)[0])

    def _cos_dec(self) -> np.ndarray:
        # numpy's cosine may differ from the other way's in the last bit
        return np.array([math.cos(math.radians(dec)) for dec in self._good("dec").tolist()])

    def _column(self, column: pa.Field) -> pa.Array:
        if column.name == ALERT_ID:
            return self._array("diaSource", pa.field(ALERT_ID, pa.int64()))
        is_list = column.name in _LISTS
        struct = column.type.value_type if is_list else column.type
        arrays = [self._array(column.name, field) for field in struct]
        if not is_list:
            mask = pa.array(~self.is_there(column.name))
            return pa.StructArray.from_arrays(arrays, fields=list(struct), mask=mask)
        items = pa.StructArray.from_arrays(arrays, fields=list(struct))
        order = self.orders[column.name]
        if column.name not in self.leaves.program.levels:
            offsets = np.zeros(self.leaves.n + 1, dtype=np.int32)
        else:
            offsets = self.leaves.offsets(column.name)
        return pa.ListArray.from_arrays(pa.array(offsets), items if order is None else items.take(pa.array(order)))

    def _array(self, column: str, field: pa.Field) -> pa.Array:
        """The Arrow column of a field of today; packets with a value that it cannot hold are bad."""
        if pa.types.is_string(field.type):
            path = f"{column}.{field.name}"
            known = path in self.leaves.program.leaves
            return self.leaves.arrow(path) if known else pa.nulls(self._n_rows(column), field.type)
        values, valid = self._field(column, field.name)
        if pa.types.is_int32(field.type):
            fits = (values >= -_MAX_INT - 1) & (values <= _MAX_INT)
            self.bad[self._bodies(column)[valid & ~fits]] = True
            values = np.where(fits, values, 0)
        with np.errstate(over="ignore"):
            values = values.astype(_TYPES[field.type][0])
        return pa.array(values, mask=~valid, from_pandas=False)

    def _field(self, column: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A number under its name of today and where it is there."""
        if (column, name) not in self.fields:
            self.fields[column, name] = self._today(column, name)
        return self.fields[column, name]

    def _today(self, column: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        found = self._written(column, name)
        for old, unit in _older(column, name):
            older = self._written(column, old)
            if older is None:
                continue
            values, valid = older
            if old == _RESIDUAL_RA:
                values = ARCSEC_PER_DEG * self._cos_dec() * values.astype(np.float64)
            elif unit is not None:
                values = unit * values.astype(np.float64)
            found = (values, valid) if found is None else (np.where(found[1], found[0], values), found[1] | valid)
        n = self._n_rows(column)
        dtype = _TYPES[_struct_of(column).field(name).type][0]
        values, valid = (np.zeros(n, dtype=dtype), np.zeros(n, dtype=bool)) if found is None else found
        if name in ZERO_IS_NULL:
            valid = valid & (values != 0)
        if (column, name) == ("ssSource", "diaSourceId"):  # 9.0 left it null
            values = np.where(valid, values, self._field("diaSource", name)[0]).astype(np.int64)
            valid = valid | self.is_there(column)
        if column == "prvDiaForcedSources" and name in ("ra", "dec") and self.misplaced is not None:
            valid = valid & ~self.misplaced
        return values, valid

    def _written(self, column: str, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A number as it was written, timestamps as MJD TAI; None where the schema does not have it."""
        leaf = self.leaves.program.leaves.get(f"{column}.{name}")
        if leaf is None:
            return None
        values, valid = self.leaves.numbers(leaf), self.leaves.valid(leaf)
        if leaf.kind == TIMESTAMP:
            seconds, microseconds = np.divmod(values, 1_000_000)
            days, seconds = np.divmod(seconds, 86_400)
            values = mjd_tai(days + _DAYS_TO_1970, seconds, microseconds)
        return values, valid

    def _n_rows(self, column: str) -> int:
        return len(self._bodies(column))

    def _bodies(self, column: str) -> np.ndarray:
        """(n_rows,) the packet that each row of a column belongs to."""
        if column not in _LISTS:
            return self.leaves.body_of_row(0)
        level = self.leaves.program.levels.get(column)
        return np.empty(0, dtype=np.int64) if level is None else self.leaves.body_of_row(level)

"""From a filter's text to SQL that is known to be safe and known to bind, before it goes live.

Three steps. Each part (`select`, `where`, `rank_by`) must parse on its own as plain expressions, so that
no part can reach into the next. The parse tree is walked against the lists of what a filter may say
(`walking`, `vocabulary`): one alert is all that a filter can see. Last, the query is bound to the table
`alerts` with one row of nulls, so that unknown columns and wrong types show with DuckDB's own message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from schemas.tables import alerts_arrow_schema, project_alerts_schema
from transforms.filters.definition import FilterDefinition, FilterError
from transforms.filters.engine import TABLE, TIMEOUT_S, FilterTimeoutError, open_connection, tidy_message, time_limit
from transforms.filters.vocabulary import MAX_EXPRESSIONS, RANK_TYPES
from transforms.filters.walking import RESERVED_NAMES, Scope, Walk

_OUTPUT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}\Z")


@dataclass(frozen=True)
class CheckedFilter:
    """A filter that was found safe and that binds to the table `alerts`.

    `columns` names what it reads (`diaSource.snr`, `prvDiaSources.psfFlux`), always with the alert's id.
    `passing_sql` gives the ids of all alerts that pass, in rank order. `output_sql` gives the select
    expressions for every row it is given, then the id; None when nothing is selected. `output_names`
    names the select expressions.
    """

    definition: FilterDefinition
    columns: frozenset[str]
    output_names: tuple[str, ...]
    passing_sql: str
    output_sql: str | None


def check_filter(definition: FilterDefinition) -> CheckedFilter:
    """Check one filter and make its SQL.

    Parameters
    ----------
    definition : FilterDefinition
        As its author wrote it.

    Returns
    -------
    CheckedFilter
        Runs on any table of schema `project_alerts_schema(columns)` or wider.

    Raises
    ------
    FilterError
        A part does not parse, says something that is not allowed, names an unknown column, has a wrong
        type, or takes longer than `TIMEOUT_S` on an empty table. `key` names the part.
    """
    with open_connection() as connection:
        return _Check(definition, connection).run()


@dataclass(frozen=True)
class _RankKey:
    text: str
    direction: str
    node: dict[str, Any]


@dataclass(frozen=True)
class _Check:
    definition: FilterDefinition
    connection: duckdb.DuckDBPyConnection

    def run(self) -> CheckedFilter:
        selected = self._expressions("select") if self.definition.select.strip() else []
        (condition,) = self._expressions("where", count=1)
        keys = self._rank_keys()
        names = self._output_names(selected)

        walks = {key: Walk(self.definition.full_name, key) for key in ("select", "where", "rank_by")}
        scope = walks["select"].visit_named(selected, Scope())
        walks["where"].visit(condition, scope)
        for key in keys:
            walks["rank_by"].visit(key.node, scope)

        kinds = self._bind_parts(keys, walks)
        for walk in walks.values():
            walk.refuse_unresolved()
        columns = frozenset({"diaSource.diaSourceId"}.union(*(walk.columns for walk in walks.values())))

        passing_sql = self._passing_sql(keys, kinds)
        self._require_unchanged(passing_sql, selected, condition, len(keys))
        output_sql = self._output_sql() if selected else None
        self._bind_projected(columns, passing_sql, output_sql)
        return CheckedFilter(self.definition, columns, tuple(names), passing_sql, output_sql)

    # --- parsing

    def _fail(self, key: str, reason: str) -> FilterError:
        return FilterError(self.definition.full_name, key, reason)

    def _expressions(self, key: str, text: str | None = None, count: int | None = None) -> list[dict[str, Any]]:
        """The expressions that one part consists of, and nothing but expressions."""
        text = getattr(self.definition, key) if text is None else text
        node = self._select_node(key, text, f"SELECT {text}")
        if node["from_table"]["type"] != "EMPTY" or not _is_bare(node):
            raise self._fail(key, "only expressions are allowed here, no FROM, WHERE, GROUP BY, ORDER BY or LIMIT")
        nodes: list[dict[str, Any]] = node["select_list"]
        if count is not None and len(nodes) != count:
            raise self._fail(key, f"expected one expression, got {len(nodes)}")
        if count is not None and nodes[0]["alias"]:
            raise self._fail(key, f"{nodes[0]['alias']!r} would be a name, and names are given in select only")
        if len(nodes) > MAX_EXPRESSIONS:
            raise self._fail(key, f"{len(nodes)} expressions, more than the {MAX_EXPRESSIONS} allowed")
        return nodes

    def _select_node(self, key: str, text: str, sql: str) -> dict[str, Any]:
        odd = next((char for char in text if not (" " <= char <= "~" or char in "\t\r\n")), None)
        if odd is not None:
            raise self._fail(key, f"only printable ASCII is allowed, got {odd!r}")
        if any(text[start] == ";" for start, kind in duckdb.tokenize(text) if kind == duckdb.token_type.operator):
            raise self._fail(key, "';' is not allowed: a filter is one query, made of these expressions")
        self._require_one_select(key, sql)
        ((serialised,),) = self.connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
        try:
            tree = json.loads(serialised)
        except RecursionError as error:
            raise self._fail(key, "nested too deeply") from error
        if tree["error"]:
            raise self._fail(key, tree["error_message"])
        (statement,) = tree["statements"]
        if statement["node"]["type"] != "SELECT_NODE":
            raise self._fail(key, f"only expressions are allowed here, got {statement['node']['type']}")
        node: dict[str, Any] = statement["node"]
        return node

    def _require_one_select(self, key: str, sql: str) -> None:
        try:
            statements = duckdb.extract_statements(sql)
        except duckdb.Error as error:
            raise self._fail(key, tidy_message(error)) from error
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise self._fail(key, "expected expressions of one SELECT")

    def _rank_keys(self) -> list[_RankKey]:
        keys = []
        for text in _split_commas(self.definition.rank_by):
            if not text.strip():
                raise self._fail("rank_by", "an empty ranking key")
            node = self._select_node("rank_by", text, f"SELECT 1 ORDER BY {text}")
            modifiers = node["modifiers"]
            if len(modifiers) != 1 or modifiers[0]["type"] != "ORDER_MODIFIER" or len(modifiers[0]["orders"]) != 1:
                raise self._fail(
                    "rank_by", f"expected an expression with an optional ASC or DESC, got {text.strip()!r}"
                )
            (order,) = modifiers[0]["orders"]
            if order["null_order"] == "NULLS FIRST":
                raise self._fail("rank_by", "NULLS FIRST is not allowed: an alert without a rank comes last")
            direction = "DESC" if order["type"] == "DESCENDING" else "ASC"
            text = _without_direction(text)
            (expression,) = self._expressions("rank_by", text, count=1)
            keys.append(_RankKey(text, direction, expression))
        return keys

    def _output_names(self, selected: Sequence[dict[str, Any]]) -> list[str]:
        names: list[str] = []
        for position, node in enumerate(selected, start=1):
            name = node["alias"] or (node["column_names"][-1] if node["class"] == "COLUMN_REF" else "")
            if not name:
                raise self._fail("select", f"expression {position} needs a name: add AS <name>")
            if not _OUTPUT_NAME.match(name):
                raise self._fail("select", f"{name!r} is no name: use up to 63 letters, digits and _, a letter first")
            if name.lower() in {other.lower() for other in names}:
                raise self._fail("select", f"two expressions are called {name!r}: rename one with AS")
            if node["alias"].lower() in RESERVED_NAMES:
                raise self._fail("select", f"{name!r} is a column of the table: choose another name")
            names.append(name)
        return names

    # --- making and binding the SQL

    def _selected(self) -> str:
        # Each part ends with a line break, so that a trailing comment cannot swallow what follows.
        return f"{self.definition.select}\n, " if self.definition.select.strip() else ""

    def _passing_sql(self, keys: Sequence[_RankKey], numeric: Sequence[str]) -> str:
        ranks = "".join(
            # NaN is the greatest number to DuckDB and would come first under DESC: it counts as no rank.
            f"NULLIF((\n{key.text}\n), 'nan'::{kind})" + f' AS "__rank_{number}", '
            if kind in ("FLOAT", "DOUBLE")
            else f'(\n{key.text}\n) AS "__rank_{number}", '
            for number, (key, kind) in enumerate(zip(keys, numeric, strict=True))
        )
        order = "".join(f'"__rank_{number}" {key.direction} NULLS LAST, ' for number, key in enumerate(keys))
        return (
            f'SELECT "__id" FROM (SELECT {self._selected()}{ranks}diaSource.diaSourceId AS "__id"\n'
            f'FROM {TABLE} WHERE (\n{self.definition.where}\n)) ORDER BY {order}"__id"'
        )

    def _output_sql(self) -> str:
        return f'SELECT {self._selected()}diaSource.diaSourceId AS "__id"\nFROM {TABLE}'

    def _require_unchanged(self, passing_sql: str, selected: Sequence[Any], condition: Any, n_keys: int) -> None:
        """The parts must mean the same side by side as they did alone, where they were checked."""
        outer = self._select_node("where", "", passing_sql)
        inner = outer["from_table"]["subquery"]["node"] if outer["from_table"]["type"] == "SUBQUERY" else outer
        same = (
            inner["type"] == "SELECT_NODE"
            and inner["from_table"]["type"] == "BASE_TABLE"
            and inner["from_table"]["qualified_name"] == {"path": [TABLE]}
            and len(inner["select_list"]) == len(selected) + n_keys + 1
            and _without_places(inner["select_list"][: len(selected)]) == _without_places(selected)
            and _without_places(inner["where_clause"]) == _without_places(condition)
            and _is_bare({**inner, "where_clause": None})
        )
        if not same:
            raise self._fail("where", "select, where and rank_by do not fit together as one query")

    def _bind_parts(self, keys: Sequence[_RankKey], walks: dict[str, Walk]) -> list[str]:
        """Bind part by part, so that an error names the part it is in; the types of the ranking keys."""
        self.connection.register(TABLE, _one_empty_alert(alerts_arrow_schema()))
        self._bind("select", self._output_sql(), walks["select"])
        sql = f"SELECT {self._selected()}(\n{self.definition.where}\n)\nFROM {TABLE}"
        kind = self._bind("where", sql, walks["where"])[-1]
        if kind != "BOOLEAN":
            raise self._fail("where", f"expected a condition that is true or false, got a value of type {_short(kind)}")
        self._bind("where", f"SELECT {self._selected()}1\nFROM {TABLE} WHERE (\n{self.definition.where}\n)")
        kinds = []
        for key in keys:
            sql = f"SELECT {self._selected()}(\n{key.text}\n)\nFROM {TABLE}"
            kind = self._bind("rank_by", sql, walks["rank_by"])[-1]
            if kind not in RANK_TYPES and not kind.startswith("DECIMAL"):
                reason = f"expected numbers, texts or truth values, got a value of type {_short(kind)}"
                raise self._fail("rank_by", reason)
            kinds.append(kind)
        return kinds

    def _bind_projected(self, columns: Iterable[str], passing_sql: str, output_sql: str | None) -> None:
        """What the walk took for the columns needed must be enough, and must not change any type."""
        whole = self._bind("select", output_sql) if output_sql else []
        self.connection.register(TABLE, _one_empty_alert(project_alerts_schema(columns)))
        self._bind("where", passing_sql)
        if output_sql and self._bind("select", output_sql) != whole:
            raise self._fail("select", "cannot tell which fields this needs: name them")

    def _bind(self, key: str, sql: str, walk: Walk | None = None) -> list[str]:
        """Bind and run on one alert of nulls, which also finds impossible constants; the types of the result."""
        self._require_one_select(key, sql)
        try:
            with time_limit(self.connection, TIMEOUT_S):
                result = self.connection.execute(sql)
                kinds = [str(kind) for _, kind, *_ in result.description]
                result.fetchall()
        except (duckdb.Error, FilterTimeoutError) as error:
            hint = walk.hint() if walk else ""
            raise self._fail(key, tidy_message(error) + hint) from error
        return kinds


def _is_bare(node: dict[str, Any]) -> bool:
    """A SELECT of nothing but its select list."""
    extra = {key: value for key, value in node.items() if key not in ("type", "select_list", "from_table")}
    extra["cte_map"] = node["cte_map"]["map"]
    return extra.pop("aggregate_handling") == "STANDARD_HANDLING" and not any(extra.values())


def _without_places(tree: Any) -> Any:
    """A parse tree without the places in the text it came from."""
    if isinstance(tree, dict):
        return {key: _without_places(value) for key, value in tree.items() if not key.startswith("query_location")}
    return [_without_places(item) for item in tree] if isinstance(tree, (list, tuple)) else tree


def _one_empty_alert(schema: pa.Schema) -> pa.Table:
    return pa.Table.from_arrays([pa.nulls(1, field.type) for field in schema], schema=schema)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _split_commas(text: str) -> list[str]:
    """Split at the commas that stand outside all brackets, quotes and comments."""
    parts, depth, begin = [], 0, 0
    for start, kind in duckdb.tokenize(text):
        if kind != duckdb.token_type.operator:
            continue
        char = text[start]
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(text[begin:start])
            begin = start + 1
    return [*parts, text[begin:]]


def _without_direction(text: str) -> str:
    """A ranking key without its trailing ASC, DESC or NULLS LAST."""
    tokens = [(start, kind) for start, kind in duckdb.tokenize(text) if kind != duckdb.token_type.comment]
    ends = [start for start, _ in tokens[1:]] + [len(text)]
    words = [
        text[start:end].split("--")[0].split("/*")[0].strip().lower()
        for (start, _), end in zip(tokens, ends, strict=True)
    ]
    if words[-2:] == ["nulls", "last"]:
        del words[-2:]
    if words and words[-1] in ("asc", "desc"):
        words.pop()
    return text[: ends[len(words) - 1]] if words and len(words) < len(tokens) else text

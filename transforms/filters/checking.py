"""From a filter's text to SQL that is known to be safe and known to bind, before it goes live.

Three steps. Each part (`select`, `where`, `rank_by`) must parse on its own as plain expressions, so that
no part can reach into the next. The parse tree is walked against lists of what a filter may say: whatever
is not listed is refused, and one alert is all that a filter can see. Last, the query is bound to the empty
table `alerts`, so that unknown columns and wrong types show with DuckDB's own message.

The walk also finds the columns the filter needs, so that only these travel to it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb
import pyarrow as pa

from schemas.tables import (
    ALERT_COLUMNS,
    ALERT_ID,
    KEY_FIELDS,
    alert_fields,
    alerts_arrow_schema,
    project_alerts_schema,
)
from transforms.filters.definition import FilterDefinition
from transforms.filters.engine import (
    MACRO_REPEATS,
    MACROS,
    TABLE,
    TIMEOUT_S,
    FilterTimeout,
    open_connection,
    tidy_message,
    time_limit,
)

MAX_EXPRESSIONS = 50
MAX_DEPTH = 60
MAX_SUBQUERY_DEPTH = 4
MAX_NODES = 5_000  # after names given with AS are put in place: they double, and double again

OPERATORS = frozenset("+ - * / // % ** ^ & | @ ~~ !~~ ~~* !~~*".split())

SCALAR_FUNCTIONS = frozenset(
    """
    abs sqrt cbrt ln log log2 log10 exp pow power least greatest nullif if isnan isfinite isinf
    round floor ceil ceiling trunc sign mod fmod pi
    sin cos tan asin acos atan atan2 degrees radians
    lower upper starts_with ends_with contains prefix suffix length strlen substring substr like_escape not_like_escape
    struct_pack struct_extract row
    """.split()
) | frozenset(MACROS)

# Nothing here makes a longer list than it was given: no range, repeat, flatten, concatenation or reduction.
LIST_FUNCTIONS = frozenset(
    """
    list_filter array_filter list_transform array_transform list_apply array_apply
    len array_length list_value list_zip list_where list_select
    list_extract list_element array_extract list_slice array_slice list_first list_last
    list_contains list_has array_contains list_position list_has_any list_has_all
    list_sort array_sort list_reverse_sort list_reverse list_distinct list_unique
    list_aggregate list_aggr array_aggregate array_aggr
    list_min list_max list_sum list_avg list_count list_median list_mode list_mad list_product
    list_stddev_samp list_stddev_pop list_var_samp list_var_pop list_sem list_skewness list_kurtosis
    list_bool_and list_bool_or list_any_value
    """.split()
)

AGGREGATES = frozenset(
    """
    count count_star sum avg mean min max median mode mad product quantile_cont quantile_disc
    stddev stddev_samp stddev_pop variance var_samp var_pop sem skewness kurtosis
    regr_slope regr_intercept regr_r2 regr_count corr covar_samp covar_pop
    arg_min arg_max min_by max_by first last any_value bool_and bool_or count_if
    """.split()
)

WINDOWS = frozenset("row_number rank dense_rank lag lead first_value last_value nth_value".split())

CAST_TYPES = frozenset(
    """
    boolean bool tinyint smallint integer int bigint utinyint usmallint uinteger ubigint
    float real double decimal numeric varchar text string list
    """.split()
)

RANK_TYPES = frozenset(
    "BOOLEAN TINYINT SMALLINT INTEGER BIGINT HUGEINT UTINYINT USMALLINT UINTEGER UBIGINT FLOAT DOUBLE VARCHAR".split()
)

_OPERATOR_TYPES = frozenset(
    """
    COMPARE_IN COMPARE_NOT_IN OPERATOR_NOT OPERATOR_IS_NULL OPERATOR_IS_NOT_NULL OPERATOR_COALESCE OPERATOR_TRY
    ARRAY_EXTRACT ARRAY_SLICE STRUCT_EXTRACT
    """.split()
)

# Everything a node may carry, by class. A key that is not here (of a newer DuckDB, say) is refused unless empty.
_ANY_NODE = {"class", "type", "alias", "query_location", "query_location_length"}
_NODE_KEYS = {
    "COLUMN_REF": {"column_names"},
    "CONSTANT": {"literal"},
    "COMPARISON": {"left", "right"},
    "CONJUNCTION": {"children"},
    "OPERATOR": {"children"},
    "BETWEEN": {"input", "lower", "upper"},
    "CASE": {"case_checks", "else_expr"},
    "CAST": {"child", "try_cast", "type_expr"},
    "LAMBDA": {"lhs", "expr", "syntax_type"},
    "SUBQUERY": {"subquery_type", "subquery", "child", "comparison_type"},
    "FUNCTION": {
        "function_name",
        "filter",
        "order_bys",
        "distinct",
        "is_operator",
        "arguments",
        "qualified_name",
    },
    "WINDOW": {
        "function_name",
        "partitions",
        "orders",
        "arg_orders",
        "start",
        "end",
        "start_expr",
        "end_expr",
        "offset_expr",
        "default_expr",
        "ignore_nulls",
        "has_ignore_nulls",
        "filter_expr",
        "exclude_clause",
        "distinct",
        "arguments",
        "qualified_name",
    },
}
_SELECT_KEYS = {
    "type",
    "modifiers",
    "select_list",
    "from_table",
    "where_clause",
    "group_expressions",
    "group_sets",
    "aggregate_handling",
    "having",
    "qualify",
}

_COLUMNS = {name.lower(): name for name in (*ALERT_COLUMNS, ALERT_ID)}
_RESERVED = frozenset(_COLUMNS) | {TABLE}
_OUTPUT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}\Z")
_SLICING = frozenset("list_slice array_slice list_extract list_element array_extract list_reverse".split())
_MAPPING = frozenset("list_transform array_transform list_apply array_apply".split())
_SELECTING = frozenset("list_filter array_filter".split())
_COUNTING = frozenset("len length array_length".split())
_AGGREGATING = frozenset("list_aggregate list_aggr array_aggregate array_aggr".split())


class FilterError(ValueError):
    """A filter that may not or cannot run. `filter` is its full name, `key` the part at fault, `reason` why."""

    def __init__(self, filter: str, key: str, reason: str) -> None:
        super().__init__(filter, key, reason)
        self.filter = filter
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"filter {self.filter}, {self.key}: {self.reason}"


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

        walks = {key: _Walk(self.definition.full_name, key) for key in ("select", "where", "rank_by")}
        scope = walks["select"].visit_named(selected, _Scope())
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
            if node["alias"].lower() in _RESERVED:
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

    def _bind_parts(self, keys: Sequence[_RankKey], walks: dict[str, _Walk]) -> list[str]:
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

    def _bind(self, key: str, sql: str, walk: _Walk | None = None) -> list[str]:
        """Bind and run on one alert of nulls, which also finds constants that cannot be computed; the result's types."""
        self._require_one_select(key, sql)
        try:
            with time_limit(self.connection, TIMEOUT_S):
                result = self.connection.execute(sql)
                kinds = [str(kind) for _, kind, *_ in result.description]
                result.fetchall()
        except (duckdb.Error, FilterTimeout) as error:
            hint = walk.hint() if walk else ""
            raise self._fail(key, tidy_message(error) + hint) from error
        return kinds


@dataclass(frozen=True)
class _Scope:
    """What names mean at one place: the record column whose elements they stand for, or None (a plain value)."""

    variables: dict[str, str | None] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # of names given with AS: DuckDB puts the expression in place
    tables: frozenset[str] = frozenset()
    subqueries: int = 0

    def adding(self, variables: dict[str, str | None]) -> _Scope:
        sizes = {name: size for name, size in self.sizes.items() if name not in variables}
        return replace(self, variables={**self.variables, **variables}, sizes=sizes)

    def naming(self, name: str, size: int) -> _Scope:
        """With an expression's name added; a name that is there already keeps its meaning."""
        if name in self.variables:
            return replace(self, sizes={**self.sizes, name: max(size, self.sizes.get(name, 0))})
        return replace(self, variables={**self.variables, name: None}, sizes={**self.sizes, name: size})


class _Walk:
    """One walk over one part: refuses what is not allowed and gathers the columns that are read."""

    def __init__(self, filter_name: str, key: str) -> None:
        self.columns: set[str] = set()
        self._filter_name = filter_name
        self._key = key
        self._unresolved: list[str] = []
        self._depth = 0
        self._nodes = 0

    def visit_named(self, nodes: Sequence[dict[str, Any]], scope: _Scope) -> _Scope:
        """Walk the expressions of a select list; the scope with the names they are given."""
        for node in nodes:
            before = self._nodes
            self.visit(node, scope)
            if node["alias"]:
                scope = scope.naming(node["alias"].lower(), self._nodes - before)
        return scope

    def hint(self) -> str:
        """For a message about an unknown column: the names that may have been meant, or nothing."""
        for name in self._unresolved:
            owners = [column for column in ALERT_COLUMNS if name in map(str.lower, alert_fields(column))]
            if owners:
                return f"\nFields are named with their column: {', '.join(f'{owner}.{name}' for owner in owners)}"
            close = difflib.get_close_matches(name, _COLUMNS, n=2)
            if close:
                return f"\nDid you mean {' or '.join(_COLUMNS[match] for match in close)}?"
        return ""

    def refuse_unresolved(self) -> None:
        """DuckDB gives meaning to some names that are no columns (current_date, current_user)."""
        if self._unresolved:
            raise self._fail(f"{self._unresolved[0]!r} is no column of {TABLE}")

    def visit(self, node: dict[str, Any] | None, scope: _Scope) -> None:
        """Walk an expression whose whole value is used."""
        if node is None:
            return
        column = self._records(node, scope)
        if column is not None:
            self.columns.update(f"{column}.{name}" for name in alert_fields(column))

    def _fail(self, reason: str) -> FilterError:
        return FilterError(self._filter_name, self._key, reason)

    def _records(self, node: dict[str, Any], scope: _Scope) -> str | None:
        """Walk an expression; the column whose records it stands for, or None if it is a plain value.

        The fields of that column are not counted as read: the caller knows which of them it uses.
        """
        kind = node["class"]
        if kind not in _NODE_KEYS:
            raise self._fail(f"{kind.lower().replace('_', ' ')} is not allowed in a filter")
        self._refuse_extra(node, _ANY_NODE | _NODE_KEYS[kind])
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._fail(f"nested more than {MAX_DEPTH} levels deep")
        self._count_nodes(1)
        column: str | None = getattr(self, f"_{kind.lower()}")(node, scope)
        self._depth -= 1
        return column

    def _count_nodes(self, number: int) -> None:
        self._nodes += number
        if self._nodes > MAX_NODES:
            raise self._fail(
                f"more than {MAX_NODES} steps, counting each name given with AS as the whole expression it stands for"
            )

    def _refuse_extra(self, node: dict[str, Any], known: set[str]) -> None:
        for key, value in node.items():
            if key not in known and value not in (None, "", [], {}, False, {"map": []}):
                raise self._fail(f"{key.replace('_', ' ')} is not allowed in a filter")

    # --- expression classes; each returns what `_records` returns

    def _constant(self, node: dict[str, Any], scope: _Scope) -> None:
        return None

    def _column_ref(self, node: dict[str, Any], scope: _Scope) -> str | None:
        path = [name.lower() for name in node["column_names"]]
        if path[0] in scope.variables:
            self._count_nodes(scope.sizes.get(path[0], 0))
            column = scope.variables[path[0]]
            is_table = path[0] in scope.tables and len(path) > 1 and path[1] in scope.variables
            rest = path[2:] if is_table else path[1:]
        else:
            if path[0] == TABLE:
                path = path[1:]
                if not path:
                    raise self._fail(f"name the columns of {TABLE} instead of all of it")
            column = _COLUMNS.get(path[0])
            rest = path[1:]
            if column is None:
                self._unresolved.append(path[0])
            elif column == ALERT_ID:
                self.columns.add(ALERT_ID)
                return None
        if column is None or not rest:
            return column
        self._read_field(column, rest[0])
        return None

    def _comparison(self, node: dict[str, Any], scope: _Scope) -> None:
        self.visit(node["left"], scope)
        self.visit(node["right"], scope)

    def _conjunction(self, node: dict[str, Any], scope: _Scope) -> None:
        for child in node["children"]:
            self.visit(child, scope)

    def _between(self, node: dict[str, Any], scope: _Scope) -> None:
        for key in ("input", "lower", "upper"):
            self.visit(node[key], scope)

    def _case(self, node: dict[str, Any], scope: _Scope) -> None:
        for check in node["case_checks"]:
            self.visit(check["when_expr"], scope)
            self.visit(check["then_expr"], scope)
        self.visit(node["else_expr"], scope)

    def _cast(self, node: dict[str, Any], scope: _Scope) -> None:
        self._check_type(node["type_expr"])
        self.visit(node["child"], scope)

    def _check_type(self, node: dict[str, Any]) -> None:
        name = str(node.get("type_name", "")).lower()
        if name not in CAST_TYPES:
            raise self._fail(f"a cast to {name or 'this type'} is not allowed; allowed are {_listing(CAST_TYPES)}")
        for child in node["children"]:
            if child["class"] == "TYPE":
                self._check_type(child)

    def _lambda(self, node: dict[str, Any], scope: _Scope) -> None:
        raise self._fail(
            "a lambda is only allowed as the argument of list_filter or list_transform"
            " (written 'lambda p: ...', not 'p -> ...')"
        )

    def _operator(self, node: dict[str, Any], scope: _Scope) -> str | None:
        kind, children = node["type"], node["children"]
        if kind not in _OPERATOR_TYPES:
            raise self._fail(f"{kind.lower().replace('_', ' ')} is not allowed in a filter")
        if kind in ("OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL"):
            self._count(children[0], scope)
            return None
        if kind in ("ARRAY_EXTRACT", "ARRAY_SLICE", "STRUCT_EXTRACT"):
            return self._extract(children, scope)
        for child in children:
            self.visit(child, scope)
        return None

    def _function(self, node: dict[str, Any], scope: _Scope) -> str | None:
        name = node["function_name"].lower()
        self._check_function(name, node, scope)
        arguments = [argument["expression"] for argument in node["arguments"]]
        self.visit(node["filter"], scope)
        for order in node["order_bys"]["orders"]:
            self.visit(order["expression"], scope)
        if name in _MAPPING | _SELECTING:
            column = self._map(arguments, scope)
            return column if name in _SELECTING else None
        if name in _COUNTING and len(arguments) == 1:
            self._count(arguments[0], scope)
            return None
        if arguments and (name in _SLICING or name == "struct_extract"):
            return self._extract(arguments, scope)
        before = self._nodes
        for argument in arguments:
            self.visit(argument, scope)
        if name in MACROS:  # DuckDB writes an argument out as often as the macro names it
            self._count_nodes((MACRO_REPEATS - 1) * (self._nodes - before))
        return None

    def _check_function(self, name: str, node: dict[str, Any], scope: _Scope) -> None:
        if len(node["qualified_name"]["path"]) != 1:
            raise self._fail(f"write {name!r} without a schema")
        if node["is_operator"] and name in OPERATORS:
            return
        if name in AGGREGATES:
            if not scope.subqueries:
                raise self._fail(
                    f"{name} would run over many alerts, but a filter sees one at a time: use list_{name}(...), or"
                    f" (SELECT {name}(...) FROM unnest(prvDiaSources) AS t(p))"
                )
            return
        if name == "unnest":
            raise self._fail("unnest is only allowed after FROM: (SELECT ... FROM unnest(prvDiaSources) AS t(p))")
        if name not in SCALAR_FUNCTIONS and name not in LIST_FUNCTIONS:
            raise self._fail(f"function {name!r} is not allowed; docs/filters.md lists those that are")
        if name in _AGGREGATING:
            self._check_aggregate_name(name, node["arguments"])

    def _check_aggregate_name(self, name: str, arguments: Sequence[dict[str, Any]]) -> None:
        chosen = arguments[1]["expression"] if len(arguments) > 1 else {"class": None}
        text = chosen["literal"].get("text") if chosen["class"] == "CONSTANT" else None
        if str(text).lower() not in AGGREGATES:
            raise self._fail(f"{name} needs the name of an aggregate as its second argument, got {text!r}")

    def _window(self, node: dict[str, Any], scope: _Scope) -> None:
        name = node["function_name"].lower()
        if not scope.subqueries:
            raise self._fail(f"{name} OVER (...) is only allowed in a subquery: a filter sees one alert at a time")
        if name not in WINDOWS | AGGREGATES or len(node["qualified_name"]["path"]) != 1:
            raise self._fail(f"window function {name!r} is not allowed; docs/filters.md lists those that are")
        for child in (*node["partitions"], *(argument["expression"] for argument in node["arguments"])):
            self.visit(child, scope)
        for order in (*node["orders"], *node["arg_orders"]):
            self.visit(order["expression"], scope)
        for key in ("start_expr", "end_expr", "offset_expr", "default_expr", "filter_expr"):
            self.visit(node[key], scope)

    def _subquery(self, node: dict[str, Any], scope: _Scope) -> None:
        self.visit(node["child"], scope)
        self._query(node["subquery"]["node"], scope)

    # --- what several classes share

    def _read_field(self, column: str, name: str) -> None:
        for known in alert_fields(column):  # an unknown one is left to DuckDB, whose message names candidates
            if known.lower() == name:
                self.columns.add(f"{column}.{known}")

    def _count(self, node: dict[str, Any], scope: _Scope) -> None:
        """Only whether, or how many, records there are."""
        column = self._records(node, scope)
        if column is not None:
            self.columns.add(f"{column}.{KEY_FIELDS[column]}")

    def _extract(self, children: Sequence[dict[str, Any]], scope: _Scope) -> str | None:
        """`x[i]`, `x[i:j]` stand for records as x does; `x['name']`, `x.name` read a field."""
        column = self._records(children[0], scope)
        for child in children[1:]:
            self.visit(child, scope)
        index = children[1] if len(children) > 1 else {"class": None}
        if column is not None and index["class"] == "CONSTANT" and index["literal"]["kind"] == "STRING":
            self._read_field(column, index["literal"]["text"].lower())
            return None
        return column

    def _map(self, arguments: Sequence[dict[str, Any]], scope: _Scope) -> str | None:
        """`list_filter(list, lambda p: ...)` and `list_transform`: p stands for a record of the list."""
        if len(arguments) != 2 or arguments[1]["class"] != "LAMBDA":
            raise self._fail("list_filter and list_transform need a list and a lambda")
        column = self._records(arguments[0], scope)
        body = arguments[1]
        self._refuse_extra(body, _ANY_NODE | _NODE_KEYS["LAMBDA"])
        names = [body["lhs"]] if body["lhs"]["class"] == "COLUMN_REF" else _lambda_row(body["lhs"])
        if not names or any(len(name["column_names"]) != 1 for name in names):
            raise self._fail("the parameters of a lambda are plain names: lambda p: ... or lambda p, i: ...")
        parameters = [name["column_names"][0] for name in names]
        self._refuse_reserved(parameters)
        variables = {name.lower(): column if number == 0 else None for number, name in enumerate(parameters)}
        self.visit(body["expr"], scope.adding(variables))
        return column

    def _refuse_reserved(self, names: Iterable[str]) -> None:
        for name in names:
            if name.lower() in _RESERVED:
                raise self._fail(f"{name!r} is the name of a column or table: choose another")

    # --- subqueries over the history of the one alert

    def _query(self, node: dict[str, Any], scope: _Scope) -> None:
        if node["type"] != "SELECT_NODE":
            raise self._fail("a subquery is one SELECT ... FROM unnest(...), without UNION, EXCEPT or INTERSECT")
        if node["cte_map"]["map"]:
            raise self._fail("WITH is not allowed in a filter")
        self._refuse_extra(node, _SELECT_KEYS)
        if node["aggregate_handling"] != "STANDARD_HANDLING":
            raise self._fail("GROUP BY ALL is not allowed in a filter: name the expressions")
        if scope.subqueries == MAX_SUBQUERY_DEPTH:
            raise self._fail(f"more than {MAX_SUBQUERY_DEPTH} subqueries inside each other")
        self._depth += 1
        inner = self._from(node["from_table"], replace(scope, subqueries=scope.subqueries + 1))
        inner = self.visit_named(node["select_list"], inner)
        for expression in node["group_expressions"]:
            self.visit(expression, inner)
        for key in ("where_clause", "having", "qualify"):
            self.visit(node[key], inner)
        for modifier in node["modifiers"]:
            self._modifier(modifier, inner)
        self._depth -= 1

    def _modifier(self, modifier: dict[str, Any], scope: _Scope) -> None:
        kind = modifier["type"]
        if kind == "ORDER_MODIFIER":
            for order in modifier["orders"]:
                self.visit(order["expression"], scope)
        elif kind == "LIMIT_MODIFIER":
            self.visit(modifier["limit"], scope)
            self.visit(modifier["offset"], scope)
        elif kind == "DISTINCT_MODIFIER":
            for target in modifier.get("distinct_on_targets") or []:
                self.visit(target, scope)
        else:
            raise self._fail(f"{kind.lower().replace('_', ' ')} is not allowed in a filter")

    def _from(self, node: dict[str, Any], scope: _Scope) -> _Scope:
        """Walk what stands after FROM; the scope with its names added."""
        kind = node["type"]
        if node.get("sample"):
            raise self._fail("TABLESAMPLE is not allowed in a filter")
        if kind == "TABLE_FUNCTION" and node["function"]["function_name"].lower() == "unnest":
            return self._unnest(node, scope)
        if kind == "JOIN":
            joined = self._from(node["right"], self._from(node["left"], scope))
            self.visit(node["condition"], joined)
            return joined
        if kind == "SUBQUERY":
            self._query(node["subquery"]["node"], scope)
            names = [*node["column_name_alias"], *_output_columns(node["subquery"]["node"])]
            return self._with_table(node["alias"], names, None, scope)
        what = {
            "BASE_TABLE": f"table {node.get('table_name')!r} cannot be read",
            "TABLE_FUNCTION": f"table function {node.get('function', {}).get('function_name')!r} is not allowed",
            "EMPTY": "a subquery without FROM is not allowed",
        }.get(kind, f"{kind.lower().replace('_', ' ')} is not allowed after FROM")
        raise self._fail(f"{what}: a filter sees one alert, so FROM takes only unnest(...) of its lists")

    def _unnest(self, node: dict[str, Any], scope: _Scope) -> _Scope:
        if node["with_ordinality"] != "WITHOUT_ORDINALITY":
            raise self._fail("WITH ORDINALITY is not allowed in a filter")
        arguments = node["function"]["arguments"]
        if len(arguments) != 1 or len(node["function"]["qualified_name"]["path"]) != 1:
            raise self._fail("unnest takes one list")
        column = self._records(arguments[0]["expression"], scope)
        if column is not None:  # one field at least must be there to carry the records
            self.columns.add(f"{column}.{KEY_FIELDS[column]}")
        names = node["column_name_alias"] or ["unnest"]
        return self._with_table(node["alias"], names, column, scope)

    def _with_table(self, alias: str, names: Sequence[str], column: str | None, scope: _Scope) -> _Scope:
        self._refuse_reserved([*names, alias])
        variables: dict[str, str | None] = {name.lower(): column for name in (alias, *names) if name}
        return replace(scope.adding(variables), tables=scope.tables | {alias.lower()} if alias else scope.tables)


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


def _lambda_row(node: dict[str, Any]) -> list[dict[str, Any]]:
    names = [argument["expression"] for argument in node.get("arguments", [])]
    return names if all(name["class"] == "COLUMN_REF" for name in names) else []


def _output_columns(node: dict[str, Any]) -> list[str]:
    """Names that the select list of a subquery gives to the query around it, in lower case."""
    names = []
    for item in node.get("select_list", []):
        name = item["alias"] or (item["column_names"][-1] if item["class"] == "COLUMN_REF" else "")
        if name:
            names.append(name.lower())
    return names


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
    words = [text[start:end].split("--")[0].split("/*")[0].strip().lower() for (start, _), end in zip(tokens, ends)]
    if words[-2:] == ["nulls", "last"]:
        del words[-2:]
    if words and words[-1] in ("asc", "desc"):
        words.pop()
    return text[: ends[len(words) - 1]] if words and len(words) < len(tokens) else text


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

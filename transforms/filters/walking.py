"""A walk over the parse tree of a filter's expressions: may it say this, and which columns does it read?

The tree is what DuckDB's `json_serialize_sql` gives. A node is checked before its children, and nothing is
bound or run. Names are followed through lambdas and subqueries, so that `p.snr` is known to read
`prvDiaSources.snr`; where a record is used as a whole, all its fields count as read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from schemas.tables import ALERT_COLUMNS, ALERT_ID, KEY_FIELDS, alert_fields
from transforms.filters.definition import FilterError
from transforms.filters.engine import MACRO_REPEATS, MACROS, TABLE
from transforms.filters.vocabulary import (
    AGGREGATES,
    AGGREGATING_FUNCTIONS,
    ANY_NODE_KEYS,
    CAST_TYPES,
    COUNTING_FUNCTIONS,
    LIST_FUNCTIONS,
    MAPPING_FUNCTIONS,
    MAX_DEPTH,
    MAX_NODES,
    MAX_SUBQUERY_DEPTH,
    NODE_KEYS,
    OPERATOR_TYPES,
    OPERATORS,
    SCALAR_FUNCTIONS,
    SELECT_KEYS,
    SELECTING_FUNCTIONS,
    SLICING_FUNCTIONS,
    WINDOWS,
)

_COLUMNS = {name.lower(): name for name in (*ALERT_COLUMNS, ALERT_ID)}
RESERVED_NAMES = frozenset(_COLUMNS) | {TABLE}


@dataclass(frozen=True)
class Scope:
    """What names mean at one place: the record column whose elements they stand for, or None (a plain value)."""

    variables: dict[str, str | None] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # of names given with AS: DuckDB puts the expression in place
    tables: frozenset[str] = frozenset()
    subqueries: int = 0

    def adding(self, variables: dict[str, str | None]) -> Scope:
        sizes = {name: size for name, size in self.sizes.items() if name not in variables}
        return replace(self, variables={**self.variables, **variables}, sizes=sizes)

    def naming(self, name: str, size: int) -> Scope:
        """With an expression's name added; a name that is there already keeps its meaning."""
        if name in self.variables:
            return replace(self, sizes={**self.sizes, name: max(size, self.sizes.get(name, 0))})
        return replace(self, variables={**self.variables, name: None}, sizes={**self.sizes, name: size})


class Walk:
    """One walk over one part: refuses what is not allowed and gathers the columns that are read."""

    def __init__(self, filter_name: str, key: str) -> None:
        self.columns: set[str] = set()
        self._filter_name = filter_name
        self._key = key
        self._unresolved: list[str] = []
        self._depth = 0
        self._nodes = 0

    def visit_named(self, nodes: Sequence[dict[str, Any]], scope: Scope) -> Scope:
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

    def visit(self, node: dict[str, Any] | None, scope: Scope) -> None:
        """Walk an expression whose whole value is used."""
        if node is None:
            return
        column = self._records(node, scope)
        if column is not None:
            self.columns.update(f"{column}.{name}" for name in alert_fields(column))

    def _fail(self, reason: str) -> FilterError:
        return FilterError(self._filter_name, self._key, reason)

    def _records(self, node: dict[str, Any], scope: Scope) -> str | None:
        """Walk an expression; the column whose records it stands for, or None if it is a plain value.

        The fields of that column are not counted as read: the caller knows which of them it uses.
        """
        kind = node["class"]
        if kind not in NODE_KEYS:
            raise self._fail(f"{kind.lower().replace('_', ' ')} is not allowed in a filter")
        self._refuse_extra(node, ANY_NODE_KEYS | NODE_KEYS[kind])
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

    def _refuse_extra(self, node: dict[str, Any], known: frozenset[str]) -> None:
        for key, value in node.items():
            if key not in known and value not in (None, "", [], {}, False, {"map": []}):
                raise self._fail(f"{key.replace('_', ' ')} is not allowed in a filter")

    # --- expression classes; each returns what `_records` returns

    def _constant(self, node: dict[str, Any], scope: Scope) -> None:
        return None

    def _column_ref(self, node: dict[str, Any], scope: Scope) -> str | None:
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

    def _comparison(self, node: dict[str, Any], scope: Scope) -> None:
        self.visit(node["left"], scope)
        self.visit(node["right"], scope)

    def _conjunction(self, node: dict[str, Any], scope: Scope) -> None:
        for child in node["children"]:
            self.visit(child, scope)

    def _between(self, node: dict[str, Any], scope: Scope) -> None:
        for key in ("input", "lower", "upper"):
            self.visit(node[key], scope)

    def _case(self, node: dict[str, Any], scope: Scope) -> None:
        for check in node["case_checks"]:
            self.visit(check["when_expr"], scope)
            self.visit(check["then_expr"], scope)
        self.visit(node["else_expr"], scope)

    def _cast(self, node: dict[str, Any], scope: Scope) -> None:
        self._check_type(node["type_expr"])
        self.visit(node["child"], scope)

    def _check_type(self, node: dict[str, Any]) -> None:
        name = str(node.get("type_name", "")).lower()
        if name not in CAST_TYPES:
            raise self._fail(f"a cast to {name or 'this type'} is not allowed; allowed are {_listing(CAST_TYPES)}")
        for child in node["children"]:
            if child["class"] == "TYPE":
                self._check_type(child)

    def _lambda(self, node: dict[str, Any], scope: Scope) -> None:
        raise self._fail(
            "a lambda is only allowed as the argument of list_filter or list_transform"
            " (written 'lambda p: ...', not 'p -> ...')"
        )

    def _operator(self, node: dict[str, Any], scope: Scope) -> str | None:
        kind, children = node["type"], node["children"]
        if kind not in OPERATOR_TYPES:
            raise self._fail(f"{kind.lower().replace('_', ' ')} is not allowed in a filter")
        if kind in ("OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL"):
            self._count(children[0], scope)
            return None
        if kind in ("ARRAY_EXTRACT", "ARRAY_SLICE", "STRUCT_EXTRACT"):
            return self._extract(children, scope)
        for child in children:
            self.visit(child, scope)
        return None

    def _function(self, node: dict[str, Any], scope: Scope) -> str | None:
        name = node["function_name"].lower()
        self._check_function(name, node, scope)
        arguments = [argument["expression"] for argument in node["arguments"]]
        self.visit(node["filter"], scope)
        for order in node["order_bys"]["orders"]:
            self.visit(order["expression"], scope)
        if name in MAPPING_FUNCTIONS | SELECTING_FUNCTIONS:
            column = self._map(arguments, scope)
            return column if name in SELECTING_FUNCTIONS else None
        if name in COUNTING_FUNCTIONS and len(arguments) == 1:
            self._count(arguments[0], scope)
            return None
        if arguments and (name in SLICING_FUNCTIONS or name == "struct_extract"):
            return self._extract(arguments, scope)
        before = self._nodes
        for argument in arguments:
            self.visit(argument, scope)
        if name in MACROS:  # DuckDB writes an argument out as often as the macro names it
            self._count_nodes((MACRO_REPEATS - 1) * (self._nodes - before))
        return None

    def _check_function(self, name: str, node: dict[str, Any], scope: Scope) -> None:
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
        if name in AGGREGATING_FUNCTIONS:
            self._check_aggregate_name(name, node["arguments"])

    def _check_aggregate_name(self, name: str, arguments: Sequence[dict[str, Any]]) -> None:
        chosen: dict[str, Any] = arguments[1]["expression"] if len(arguments) > 1 else {"class": None}
        text = chosen["literal"].get("text") if chosen["class"] == "CONSTANT" else None
        if str(text).lower() not in AGGREGATES:
            raise self._fail(f"{name} needs the name of an aggregate as its second argument, got {text!r}")

    def _window(self, node: dict[str, Any], scope: Scope) -> None:
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

    def _subquery(self, node: dict[str, Any], scope: Scope) -> None:
        self.visit(node["child"], scope)
        self._query(node["subquery"]["node"], scope)

    # --- what several classes share

    def _read_field(self, column: str, name: str) -> None:
        for known in alert_fields(column):  # an unknown one is left to DuckDB, whose message names candidates
            if known.lower() == name:
                self.columns.add(f"{column}.{known}")

    def _count(self, node: dict[str, Any], scope: Scope) -> None:
        """Only whether, or how many, records there are."""
        column = self._records(node, scope)
        if column is not None:
            self.columns.add(f"{column}.{KEY_FIELDS[column]}")

    def _extract(self, children: Sequence[dict[str, Any]], scope: Scope) -> str | None:
        """`x[i]`, `x[i:j]` stand for records as x does; `x['name']`, `x.name` read a field."""
        column = self._records(children[0], scope)
        for child in children[1:]:
            self.visit(child, scope)
        index: dict[str, Any] = children[1] if len(children) > 1 else {"class": None}
        if column is not None and index["class"] == "CONSTANT" and index["literal"]["kind"] == "STRING":
            self._read_field(column, index["literal"]["text"].lower())
            return None
        return column

    def _map(self, arguments: Sequence[dict[str, Any]], scope: Scope) -> str | None:
        """`list_filter(list, lambda p: ...)` and `list_transform`: p stands for a record of the list."""
        if len(arguments) != 2 or arguments[1]["class"] != "LAMBDA":
            raise self._fail("list_filter and list_transform need a list and a lambda")
        column = self._records(arguments[0], scope)
        body = arguments[1]
        self._refuse_extra(body, ANY_NODE_KEYS | NODE_KEYS["LAMBDA"])
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
            if name.lower() in RESERVED_NAMES:
                raise self._fail(f"{name!r} is the name of a column or table: choose another")

    # --- subqueries over the history of the one alert

    def _query(self, node: dict[str, Any], scope: Scope) -> None:
        if node["type"] != "SELECT_NODE":
            raise self._fail("a subquery is one SELECT ... FROM unnest(...), without UNION, EXCEPT or INTERSECT")
        if node["cte_map"]["map"]:
            raise self._fail("WITH is not allowed in a filter")
        self._refuse_extra(node, SELECT_KEYS)
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

    def _modifier(self, modifier: dict[str, Any], scope: Scope) -> None:
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

    def _from(self, node: dict[str, Any], scope: Scope) -> Scope:
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

    def _unnest(self, node: dict[str, Any], scope: Scope) -> Scope:
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

    def _with_table(self, alias: str, names: Sequence[str], column: str | None, scope: Scope) -> Scope:
        self._refuse_reserved([*names, alias])
        variables: dict[str, str | None] = {name.lower(): column for name in (alias, *names) if name}
        return replace(scope.adding(variables), tables=scope.tables | {alias.lower()} if alias else scope.tables)


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


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

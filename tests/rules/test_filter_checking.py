"""What a filter may say, what it is told when it may not, and which columns it is found to need."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from schemas.tables import alert_fields, alerts_arrow_schema, project_alerts_schema
from transforms.filters import vocabulary
from transforms.filters.checking import CheckedFilter, check_filter
from transforms.filters.definition import MAX_SQL_CHARACTERS, FilterDefinition, FilterError, load_filters
from transforms.filters.engine import MACRO_REPEATS, MACROS, open_connection

ROOT = Path(__file__).parents[2]


def check(where: str = "true", select: str = "", rank_by: str = "diaSource.snr DESC") -> CheckedFilter:
    return check_filter(FilterDefinition(name="probe", owner="demo", where=where, select=select, rank_by=rank_by))


def needed(where: str = "true", select: str = "", rank_by: str = "diaSource.diaSourceId") -> set[str]:
    return set(check(where, select, rank_by).columns) - {"diaSource.diaSourceId"}


# --- definitions and folders


def test_example_filters_load_and_check() -> None:
    definitions, problems = load_filters(ROOT / "runners/config/filters")
    assert problems == []
    assert [definition.full_name for definition in definitions] == ["demo.bright-new", "demo.rising-transient"]
    for definition in definitions:
        check_filter(definition)


def test_each_fault_of_a_file_is_a_problem_with_file_key_and_reason(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: Bad Name\nowner: demo\nwher: x\nmax_per_visit: 21\n")
    definitions, problems = load_filters(tmp_path)
    assert definitions == []
    assert {(problem.file, problem.key) for problem in problems} == {
        ("a.yaml", key) for key in ("name", "where", "wher", "max_per_visit")
    }
    reasons = {problem.key: problem.reason for problem in problems}
    assert "allowed are name, owner, where, select, rank_by, max_per_visit, description" in reasons["wher"]
    assert "less than or equal to 20" in reasons["max_per_visit"]
    assert reasons["where"] == "this key is missing"
    assert "'Bad Name'" in reasons["name"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"- 1", "got list"),
        (b"{[", "not YAML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"name: a\nname: b\nowner: demo\nwhere: 'true'", "stands twice"),
        (b"[" * 5000, "not YAML"),
        (b"#" * 200_000, "more than the"),
        (b"", "got NoneType"),
        (b"name: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_file_that_is_no_filter_is_a_problem_and_the_next_file_still_loads(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    (tmp_path / "b.yaml").write_text("name: good\nowner: demo\nwhere: 'true'\n")
    definitions, problems = load_filters(tmp_path)
    assert [definition.name for definition in definitions] == ["good"]
    assert [problem.file for problem in problems] == ["a.yaml"]
    assert reason in problems[0].reason


def test_second_filter_of_one_name_is_refused_and_names_the_first(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yaml"):
        (tmp_path / name).write_text("name: one\nowner: demo\nwhere: 'true'\n")
    definitions, problems = load_filters(tmp_path)
    assert len(definitions) == 1
    assert [(problem.file, problem.key) for problem in problems] == [("b.yaml", "name")]
    assert "already defined in a.yaml" in problems[0].reason


def test_missing_folder_is_a_problem_and_an_empty_one_is_none(tmp_path: Path) -> None:
    assert load_filters(tmp_path) == ([], [])
    _, problems = load_filters(tmp_path / "absent")
    assert problems[0].reason == "no such folder"


def test_a_text_longer_than_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"name: a\nowner: demo\nwhere: 'true --{'x' * MAX_SQL_CHARACTERS}'\n")
    _, problems = load_filters(tmp_path)
    assert [(problem.key, f"at most {MAX_SQL_CHARACTERS}" in problem.reason) for problem in problems] == [
        ("where", True)
    ]


# --- attempts to get out


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("true; COPY alerts TO 'x'", "';' is not allowed"),
        ("true;", "';' is not allowed"),
        ("true) OR (true", "syntax error"),
        ("true /* open", "unterminated"),
        ("true FROM 'file.parquet'", "no FROM"),
        ("true FROM alerts", "no FROM"),
        ("true LIMIT 1", "LIMIT"),
        ("true GROUP BY ALL", "GROUP BY"),
        ("true QUALIFY true", "only expressions"),
        ("true USING SAMPLE 3", "only expressions"),
        ("true WINDOW w AS ()", "syntax error"),
        ("DISTINCT true", "only expressions"),
        ("true UNION SELECT false", "only expressions"),
        ("true, true", "expected one expression, got 2"),
        ("true AS x", "names are given in select only"),
        ("(SELECT count(*) FROM 'file.parquet') > 0", "table 'file.parquet' cannot be read"),
        ("(SELECT count(*) FROM alerts) > 0", "table 'alerts' cannot be read"),
        ("(SELECT count(*) FROM information_schema.tables) > 0", "table 'tables' cannot be read"),
        ("(SELECT count(*) FROM unnest(prvDiaSources) AS t(p), alerts) > 0", "table 'alerts' cannot be read"),
        ("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0", "table function 'read_csv'"),
        ("(SELECT count(*) FROM range(1000)) > 0", "table function 'range'"),
        ("(SELECT count(*) FROM duckdb_settings()) > 0", "table function 'duckdb_settings'"),
        ("(SELECT count(*) FROM query('SELECT 1')) > 0", "table function 'query'"),
        ("(SELECT count(*) FROM glob('/*')) > 0", "table function 'glob'"),
        ("(WITH RECURSIVE a AS (SELECT 1) SELECT * FROM a) = 1", "WITH is not allowed"),
        ("(SELECT p.snr FROM unnest(prvDiaSources) AS t(p) UNION ALL SELECT 1) > 1", "without UNION"),
        ("(SELECT 1) = 1", "without FROM"),
        ("(VALUES (1)) = 1", "FROM takes only unnest"),
        ("(SHOW TABLES) = 1", "FROM takes only unnest"),
        ("(SELECT * FROM unnest(prvDiaSources)) = 1", "star is not allowed"),
        ("(SELECT count(*) FROM unnest(prvDiaSources) TABLESAMPLE 10%) > 1", "TABLESAMPLE"),
        ("(SELECT count(*) FROM (SELECT p.snr FROM unnest(prvDiaSources) AS t(p)) TABLESAMPLE 10%) > 1", "TABLESAMPLE"),
        ("(SELECT count(*) FROM unnest(prvDiaSources, recursive := true)) > 1", "unnest takes one list"),
        ("unnest(prvDiaSources).snr > 1", "unnest is only allowed after FROM"),
        ("list_reduce([1, 2], lambda a, b: a + b) > 1", "function 'list_reduce' is not allowed"),
        ("(lambda p: p) IS NULL", "a lambda is only allowed"),
        ("COLUMNS('.*')", "star is not allowed"),
        ("read_text('/etc/passwd') = ''", "function 'read_text' is not allowed"),
        ("getenv('HOME') = ''", "function 'getenv' is not allowed"),
        ("current_setting('memory_limit') = ''", "function 'current_setting' is not allowed"),
        ("getvariable('x') = 1", "function 'getvariable' is not allowed"),
        ("levenshtein('a', 'b') = 1", "function 'levenshtein' is not allowed"),
        ("len(repeat('x', 2000000000)) = 1", "function 'repeat' is not allowed"),
        ("len(range(1000000000)) = 1", "function 'range' is not allowed"),
        ("diaSource.band || 'a' = 'ra'", "function '||' is not allowed"),
        ("list_aggregate([1], 'string_agg') = ''", "got 'string_agg'"),
        ("list_aggregate([1], lower('SUM')) = 1", "needs the name of an aggregate"),
        ("main.abs(diaSource.snr) > 1", "schema is not allowed"),
        ("random() > 0.5", "function 'random' is not allowed"),
        ("now() IS NULL", "function 'now' is not allowed"),
        ("current_user = 'x'", "'current_user' is no column"),
        ("current_timestamp IS NULL", "'current_timestamp' is no column"),
        ("rowid > 3", 'Referenced column "rowid" not found'),
        ("alerts IS NULL", "name the columns of alerts"),
        ("diaSource.snr > $1", "parameter is not allowed"),
        ("diaSource.snr > ?", "parameter is not allowed"),
        ("#1 = 1", "positional reference is not allowed"),
        ("'a' COLLATE nocase = 'A'", "collate is not allowed"),
        ("diaSource.band::JSON IS NULL", "cast to json is not allowed"),
        ("max(diaSource.snr) > 3", "a filter sees one at a time"),
        ("row_number() OVER () = 1", "a filter sees one alert at a time"),
        ("len(list_filter(prvDiaSources, lambda diaSource: true)) = 0", "name of a column or table"),
        ("PRAGMA version", "names are given in select only"),
        ("COPY alerts TO 'x'", "syntax error"),
        ("ATTACH 'x.db'", "cast to attach is not allowed"),
        ("CREATE VIEW alerts AS SELECT 1", "syntax error"),
        ("diaSource.snr > 5 \N{LATIN SMALL LETTER E WITH ACUTE}", "printable ASCII"),
        ("diaSource.snr > 5 \x00", "printable ASCII"),
    ],
)
def test_what_reaches_beyond_the_alert_is_refused_with_the_reason(where: str, reason: str) -> None:
    with pytest.raises(FilterError) as caught:
        check(where)
    assert reason in caught.value.reason
    assert (caught.value.filter, caught.value.key) == ("demo.probe", "where")
    assert str(caught.value).startswith("filter demo.probe, where: ")


@pytest.mark.parametrize(
    ("select", "reason"),
    [
        ("diaSource.ra; SELECT 1 AS b", "';' is not allowed"),
        ("diaSource.ra FROM 'file.parquet'", "no FROM"),
        ("diaSource.ra,", "syntax error"),
        ("*", "needs a name"),
        ("diaSource.snr * 2", "needs a name"),
        ("diaSource.ra, diaObject.ra AS RA", "two expressions are called 'RA'"),
        ("diaSource.snr AS diaobject", "is a column of the table"),
        ('diaSource.snr AS "a b"', "is no name"),
        ('diaSource.snr AS "__id"', "is no name"),
        ("(SELECT 1 AS a FROM alerts) AS b", "table 'alerts' cannot be read"),
        ("current_date AS today", "'current_date' is no column"),
        ("(SELECT sum(diaSource.snr) FROM unnest(prvDiaSources) AS t(p)) AS s", "must appear in the GROUP BY"),
        (", ".join(f"1 AS a{number}" for number in range(51)), "more than the 50 allowed"),
    ],
)
def test_select_takes_only_named_expressions(select: str, reason: str) -> None:
    with pytest.raises(FilterError, match=r"filter demo\.probe, select: ") as caught:
        check(select=select)
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("rank_by", "reason"),
    [
        ("diaSource.snr NULLS FIRST", "comes last"),
        ("diaSource.snr DESC LIMIT 3", "optional ASC or DESC"),
        ("diaSource.snr,", "an empty ranking key"),
        ("ALL", "selection list"),
        ("random()", "function 'random' is not allowed"),
        ("prvDiaSources", "expected numbers"),
        ("diaSource.snrr DESC", '"snr"'),
    ],
)
def test_rank_by_takes_only_ordered_expressions(rank_by: str, reason: str) -> None:
    with pytest.raises(FilterError, match=r"filter demo\.probe, rank_by: ") as caught:
        check(rank_by=rank_by)
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("where", "select", "reason"),
    [
        ("1 + " * 59 + "1 > 3", "", "levels deep"),
        ("1 + " * 900 + "1 > 3", "", "nested too deeply"),
        (
            "(SELECT max(x) FROM " + "(SELECT p AS x FROM " * 4 + "unnest([1]) AS t(p)" + ") AS u(p)" * 4 + ") > 1",
            "",
            "more than 4 subqueries",
        ),
        ("true", "1 AS a0, " + ", ".join(f"a{n} + a{n} AS a{n + 1}" for n in range(40)), "more than 5000 steps"),
        (
            "(SELECT max(a40) FROM (SELECT 1 AS a0, "
            + ", ".join(f"a{n} + a{n} AS a{n + 1}" for n in range(40))
            + " FROM unnest(prvDiaSources))) > 1",
            "",
            "more than 5000 steps",
        ),
        ("ab_magnitude(" * 30 + "1" + ")" * 30 + " > 1", "", "more than 5000 steps"),
    ],
    ids=["deep", "very deep", "subqueries", "names that double", "names that double below", "macros that double"],
)
def test_what_would_take_forever_to_plan_is_refused_before_planning(where: str, select: str, reason: str) -> None:
    with pytest.raises(FilterError) as caught:
        check(where, select)
    assert reason in caught.value.reason


def test_macros_name_no_parameter_more_often_than_the_walk_counts() -> None:
    for body in MACROS.values():
        parameters, expression = body.split(" AS ", maxsplit=1)
        for name in re.findall(r"\w+", parameters):
            assert len(re.findall(rf"\b{name}\b", expression)) <= MACRO_REPEATS


def test_the_connection_itself_refuses_files_variables_and_settings() -> None:
    outside = pa.table({"x": [1]})
    with open_connection() as connection:
        for sql in (
            "SELECT * FROM read_csv('/etc/passwd')",
            "COPY (SELECT 1) TO '/tmp/leak.csv'",
            "ATTACH '/tmp/leak.db'",
            "INSTALL httpfs",
            "SET enable_external_access = true",
            "SELECT * FROM outside",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(sql).fetchall()
    assert outside.num_rows == 1


# --- messages


def test_unknown_field_names_candidates() -> None:
    with pytest.raises(FilterError) as caught:
        check("diaSource.snrr > 5")
    assert 'Candidate Entries: "snr"' in caught.value.reason


def test_field_without_its_column_is_told_where_it_belongs() -> None:
    with pytest.raises(FilterError) as caught:
        check("snr > 5")
    assert "diaSource.snr, prvDiaSources.snr" in caught.value.reason


def test_misspelt_column_is_told_its_neighbour_and_the_place() -> None:
    with pytest.raises(FilterError) as caught:
        check("diaSource.snr > 5\n  AND diaSorce.reliability > 0.5")
    assert "Did you mean diaSource" in caught.value.reason
    *_, line, caret, _ = caught.value.reason.splitlines()
    assert line[caret.index("^") :].startswith("diaSorce.reliability")


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("diaSource.snr", "true or false, got a value of type FLOAT"),
        ("diaSource.band > 1", "Cannot compare values of type VARCHAR"),
        ("diaSource.snr > 'bright'", "Could not convert string 'bright'"),
        ("5 // 0 = 1", "Division by zero"),
        ("abs('a', 2) > 1", "No function matches"),
        ("prvDiaSources.snr > 1", "Cannot extract field 'snr'"),
    ],
)
def test_wrong_types_and_impossible_constants_show_before_any_alert(where: str, reason: str) -> None:
    with pytest.raises(FilterError) as caught:
        check(where)
    assert reason in caught.value.reason


# --- columns


@pytest.mark.parametrize(
    ("where", "columns"),
    [
        ("diaSource.snr > 5", {"diaSource.snr"}),
        ("DIASOURCE.SNR > 5", {"diaSource.snr"}),
        ("alerts.diaSource.snr > 5", {"diaSource.snr"}),
        ("diaSource['snr'] > 5", {"diaSource.snr"}),
        ("struct_extract(diaSource, 'snr') > 5", {"diaSource.snr"}),
        ("diaSourceId > 5", {"diaSourceId"}),
        ("ssSource IS NOT NULL", {"ssSource.ssObjectId"}),
        ("len(prvDiaSources) = 0", {"prvDiaSources.diaSourceId"} - {"diaSource.diaSourceId"}),
        ("prvDiaSources[-1].snr > 5", {"prvDiaSources.snr"}),
        ("prvDiaSources[2:3][1]['snr'] > 5", {"prvDiaSources.snr"}),
        (
            "list_max([p.psfFlux for p in prvDiaSources if p.band = diaSource.band]) > 5",
            {"prvDiaSources.psfFlux", "prvDiaSources.band", "diaSource.band"},
        ),
        (
            "list_filter(list_filter(prvDiaSources, lambda p: p.snr > 5), lambda q: q.band = 'r')[1].ra > 5",
            {"prvDiaSources.snr", "prvDiaSources.band", "prvDiaSources.ra"},
        ),
        (
            "EXISTS (SELECT 1 FROM unnest(prvDiaForcedSources) AS t(f) WHERE t.f.psfFlux > 3 * f.psfFluxErr)",
            {
                "prvDiaForcedSources.diaForcedSourceId",
                "prvDiaForcedSources.psfFlux",
                "prvDiaForcedSources.psfFluxErr",
            },
        ),
        (
            "(SELECT max(d) FROM (SELECT p.snr - lag(p.snr) OVER (ORDER BY p.midpointMjdTai) AS d"
            " FROM unnest(prvDiaSources) AS t(p))) > 1",
            {"prvDiaSources.diaSourceId", "prvDiaSources.snr", "prvDiaSources.midpointMjdTai"},
        ),
        ("list_sort(prvDiaSources)[1].snr > 5", {f"prvDiaSources.{name}" for name in alert_fields("prvDiaSources")}),
        ("diaObject = diaObject", {f"diaObject.{name}" for name in alert_fields("diaObject")}),
    ],
)
def test_columns_are_those_the_filter_reads(where: str, columns: set[str]) -> None:
    assert needed(where) == columns


def test_columns_of_all_three_parts_count() -> None:
    assert needed(
        "diaSource.snr > 5", "diaObject.ra, diaObject.ra + 1 AS next", "next DESC, diaSource.reliability"
    ) == {
        "diaSource.snr",
        "diaObject.ra",
        "diaSource.reliability",
    }


def test_projected_schema_keeps_order_and_types_of_the_whole() -> None:
    schema = project_alerts_schema(["prvDiaSources.psfFlux", "diaSource.snr", "diaSource.band"])
    whole = alerts_arrow_schema()
    assert schema.names == ["diaSource", "prvDiaSources"]
    assert [field.name for field in schema.field("diaSource").type] == ["diaSourceId", "snr", "band"]
    assert schema.field("prvDiaSources").type.value_type.field("psfFlux").type == pa.float32()
    assert whole.field("diaSource").type.field("midpointMjdTai").type == pa.float64()
    assert whole.field("diaSource").type.field("isDipole").type == pa.bool_()
    with pytest.raises(ValueError, match=r"no column 'diaSource\.snrr'"):
        project_alerts_schema(["diaSource.snrr"])


# --- what stays allowed


@pytest.mark.parametrize(
    "where",
    [
        "true -- a comment with ; and 'quotes",
        "diaSource.snr BETWEEN 5 AND 10 OR diaSource.band IN ('g', 'r') AND NOT diaSource.isDipole",
        "diaSource.reliabilityVersion LIKE 'v2%' AND starts_with(diaSource.band, 'g')",
        "separation_deg(diaSource.ra, diaSource.dec, 150.1, 2.2) < 0.5",
        "CASE WHEN diaSource.psfFlux > 0 THEN log10(diaSource.psfFlux) > 3 ELSE false END",
        "TRY(CAST(diaSource.band AS INTEGER)) = 1",
        "(SELECT regr_slope(p.psfFlux, p.midpointMjdTai) FROM unnest(prvDiaSources) AS t(p) WHERE p.band = 'r') > 2",
        "(SELECT count(*) FROM unnest(prvDiaSources) AS a(x), unnest(prvDiaSources) AS b(y) WHERE x.snr < y.snr) > 3",
        "diaSource.band IN (SELECT p.band FROM unnest(prvDiaSources) AS t(p))",
        "list_aggregate([p.snr for p in prvDiaSources], 'stddev_samp') > 1",
    ],
)
def test_ordinary_filters_are_accepted(where: str) -> None:
    check(where)


def test_every_allowed_function_exists_in_this_duckdb() -> None:
    with open_connection() as connection:
        rows = connection.execute("SELECT DISTINCT lower(function_name) FROM duckdb_functions()").fetchall()
    known = {name for (name,) in rows}
    listed = (
        vocabulary.OPERATORS
        | vocabulary.SCALAR_FUNCTIONS
        | vocabulary.LIST_FUNCTIONS
        | vocabulary.AGGREGATES
        | vocabulary.WINDOWS
    )
    assert listed - known == set()


def test_the_page_for_authors_lists_every_allowed_function() -> None:
    page = (ROOT / "docs/filters.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[a-z_0-9]+", page))
    listed = vocabulary.SCALAR_FUNCTIONS | vocabulary.LIST_FUNCTIONS | vocabulary.AGGREGATES | vocabulary.WINDOWS
    assert listed - words == set()


def test_a_checked_filter_survives_pickling() -> None:
    checked = check("diaSource.snr > 5", "diaSource.ra")
    assert pickle.loads(pickle.dumps(checked)) == checked
    error = FilterError("demo.probe", "where", "reason")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)

"""Filters on alerts: against plain Python, at the cap, with nulls, in any order, and when one misbehaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.tables import alerts_arrow_schema, project_alerts_schema
from transforms.filters.checking import CheckedFilter, check_filter
from transforms.filters.definition import FilterDefinition, load_filters
from transforms.filters.engine import MEMORY_LIMIT_MB, FilterConnection
from transforms.filters.execution import AlertsTableError, FilterOutcome, run_filters

ROOT = Path(__file__).parents[2]
FIRST_ID = 2**62 + 1  # beyond what a double holds exactly

EXAMPLES = {one.name: check_filter(one) for one in load_filters(ROOT / "runners/config/filters")[0]}
COLUMNS = frozenset().union(*(one.columns for one in EXAMPLES.values())) | {"diaSource.reliability"}


def check(where: str = "true", **parts: Any) -> CheckedFilter:
    return check_filter(FilterDefinition(**{"name": "probe", "owner": "demo", "where": where, **parts}))


def filtered(
    filters: Sequence[CheckedFilter], alerts: pa.Table, *, memory_limit_mb: int = MEMORY_LIMIT_MB, **limits: Any
) -> list[FilterOutcome]:
    connection = FilterConnection(memory_limit_mb)
    try:
        return run_filters(filters, alerts, connection, **limits)
    finally:
        connection.close()


def run_one(checked: CheckedFilter, alerts: pa.Table, **limits: Any) -> FilterOutcome:
    (outcome,) = filtered([checked], alerts, **limits)
    return outcome


def random_alerts(n_alerts: int, seed: int, columns: frozenset[str] = COLUMNS) -> list[dict[str, Any]]:
    """Rows with ties in snr, NaN and null fluxes, null objects, and null, empty and long histories."""
    rng = np.random.default_rng(seed)

    def sample(chance: float, value: Any) -> Any:
        return None if rng.random() < chance else value

    def source(ident: int) -> dict[str, Any]:
        flux = (
            float("nan") if rng.random() < 0.05 else float(np.float32(rng.lognormal(5, 1) * rng.choice([1, 1, 1, -1])))
        )
        return {
            "diaSourceId": ident,
            "ra": float(rng.uniform(0, 360)),
            "dec": float(rng.uniform(-90, 90)),
            "band": sample(0.05, str(rng.choice(["g", "r"]))),
            "midpointMjdTai": 61000.0 + float(rng.uniform(0, 60)),
            "psfFlux": sample(0.05, flux),
            "snr": sample(0.05, float(rng.integers(3, 40))),
            "isDipole": sample(0.2, bool(rng.random() < 0.2)),
            "reliability": sample(0.1, float(np.float32(rng.random()))),
        }

    rows = []
    for number in rng.permutation(n_alerts):
        history = [source(int(rng.integers(1, 2**60))) for _ in range(int(rng.poisson(6)))]
        rows.append(
            {
                "diaSourceId": FIRST_ID + int(number),
                "diaSource": {**source(FIRST_ID + int(number)), "midpointMjdTai": 61050.0},
                "diaObject": sample(0.2, {"nDiaSources": int(rng.integers(1, 4))}),
                "prvDiaSources": sample(0.2, history),
            }
        )
    return rows


def as_table(rows: list[dict[str, Any]], columns: frozenset[str] = COLUMNS) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=project_alerts_schema(columns))


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _ranked(scores: list[tuple[float, int]]) -> list[int]:
    return [ident for _, ident in sorted(scores, key=lambda pair: (-pair[0], pair[1]))]


def bright_new_oracle(rows: list[dict[str, Any]]) -> list[int]:
    scores = []
    for row in rows:
        source, object_ = row["diaSource"], row["diaObject"]
        if source["snr"] is None or source["snr"] <= 10:
            continue
        if source["reliability"] is not None and source["reliability"] < 0.5:
            continue
        if object_ is not None and object_["nDiaSources"] == 1:
            scores.append((source["snr"], source["diaSourceId"]))
    return _ranked(scores)


def rising_transient_oracle(rows: list[dict[str, Any]]) -> list[int]:
    scores = []
    for row in rows:
        source = row["diaSource"]
        before = [
            previous
            for previous in row["prvDiaSources"] or []
            if previous["band"] is not None
            and previous["band"] == source["band"]
            and previous["midpointMjdTai"] > source["midpointMjdTai"] - 30
        ]
        fluxes = [flux for flux in (_number(previous["psfFlux"]) for previous in before) if flux is not None]
        flux = _number(source["psfFlux"])
        if source["snr"] is None or source["snr"] <= 5 or len(before) < 2 or not fluxes or flux is None:
            continue
        if max(fluxes) > 0:
            brightening = np.float32(flux) / np.float32(max(fluxes))
            if brightening > 1.2:
                scores.append((float(brightening), source["diaSourceId"]))
    return _ranked(scores)


ORACLES = {"bright-new": bright_new_oracle, "rising-transient": rising_transient_oracle}


@pytest.mark.parametrize("name", sorted(ORACLES))
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_example_filter_passes_what_plain_python_passes(name: str, seed: int) -> None:
    rows = random_alerts(600, seed)
    expected = ORACLES[name](rows)
    assert len(expected) > 20  # else this would not see the cap
    outcome = run_one(EXAMPLES[name], as_table(rows))
    assert outcome.error is None
    assert outcome.passed.dtype == np.int64
    assert outcome.passed.tolist() == expected[:20]
    assert (outcome.n_seen, outcome.n_passed, outcome.n_capped) == (600, len(expected), len(expected) - 20)


def test_output_columns_belong_to_their_alerts_in_rank_order() -> None:
    rows = random_alerts(300, 4)
    outcome = run_one(EXAMPLES["rising-transient"], as_table(rows))
    sources = {row["diaSourceId"]: row["diaSource"] for row in rows}
    assert outcome.columns.column_names == [
        "ra",
        "dec",
        "band",
        "psfFlux",
        "brightest_before_njy",
        "brightening",
    ]
    assert outcome.columns.num_rows == len(outcome.passed) > 1
    for ident, output in zip(outcome.passed.tolist(), outcome.columns.to_pylist(), strict=True):
        assert {key: output[key] for key in ("ra", "dec", "band", "psfFlux")} == {
            key: sources[ident][key] for key in ("ra", "dec", "band", "psfFlux")
        }
    brightening = outcome.columns.column("brightening").to_pylist()
    assert brightening == sorted(brightening, reverse=True)


def test_subquery_outputs_stay_with_their_alert() -> None:
    rows = random_alerts(200, 5)
    checked = check(select="diaSource.diaSourceId, (SELECT count(*) FROM unnest(prvDiaSources) AS t(p)) AS n_before")
    outcome = run_one(checked, as_table(rows, checked.columns))
    length = {row["diaSourceId"]: len(row["prvDiaSources"] or []) for row in rows}
    assert outcome.columns.column("diaSourceId").to_pylist() == outcome.passed.tolist()
    assert outcome.columns.column("n_before").to_pylist() == [length[ident] for ident in outcome.passed.tolist()]


def test_every_shuffle_gives_the_same_outcome() -> None:
    slope = check(
        "(SELECT regr_slope(p.psfFlux, p.midpointMjdTai) FROM unnest(prvDiaSources) AS t(p)) IS NOT NULL",
        select="(SELECT sum(p.psfFlux::DOUBLE) FROM unnest(prvDiaSources) AS t(p)) AS total",
        rank_by="(SELECT regr_slope(p.psfFlux, p.midpointMjdTai) FROM unnest(prvDiaSources) AS t(p)) DESC",
    )
    filters = [*EXAMPLES.values(), slope]
    table = as_table(random_alerts(250, 6))
    expected = filtered(filters, table)
    assert all(outcome.n_passed > 0 for outcome in expected)

    @settings(max_examples=12, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), pieces=st.integers(1, 5))
    def shuffled(seed: int, pieces: int) -> None:
        order = np.random.default_rng(seed).permutation(table.num_rows)
        parts = [table.take(part) for part in np.array_split(order, pieces)]
        for first, second in zip(expected, filtered(filters, pa.concat_tables(parts)), strict=True):
            assert first.passed.tobytes() == second.passed.tobytes()
            assert first.columns.equals(second.columns)
            assert (first.n_seen, first.n_passed, first.n_capped) == (second.n_seen, second.n_passed, second.n_capped)

    shuffled()


def test_columns_found_to_be_needed_are_enough() -> None:
    wide = pa.Table.from_pylist(random_alerts(300, 7), schema=alerts_arrow_schema())
    for checked in EXAMPLES.values():
        thin = pa.Table.from_pylist(random_alerts(300, 7), schema=project_alerts_schema(checked.columns))
        first, second = run_one(checked, wide), run_one(checked, thin)
        assert first.passed.tolist() == second.passed.tolist()
        assert first.columns.equals(second.columns)


def test_a_slice_of_a_table_is_filtered_as_a_table_of_its_rows() -> None:
    rows = random_alerts(200, 8)
    filters = list(EXAMPLES.values())
    for part, whole in zip(
        filtered(filters, as_table(rows).slice(37, 101)), filtered(filters, as_table(rows[37:138])), strict=True
    ):
        assert part.passed.tolist() == whole.passed.tolist()
        assert part.columns.equals(whole.columns)


# --- rank and cap


def small(snr: list[float | None], **fields: list[Any]) -> pa.Table:
    """One alert for each value of snr, ids counting up from FIRST_ID; `fields` go to diaSource."""
    rows = [
        {"diaSource": {"diaSourceId": FIRST_ID + i, "snr": value, **{name: fields[name][i] for name in fields}}}
        for i, value in enumerate(snr)
    ]
    return pa.Table.from_pylist(rows, schema=alerts_arrow_schema())


def test_equal_ranks_go_by_ascending_id() -> None:
    outcome = run_one(check(max_per_visit=3), small([7.0, 9.0, 7.0, 9.0, 7.0]))
    assert (outcome.passed - FIRST_ID).tolist() == [1, 3, 0]
    assert (outcome.n_passed, outcome.n_capped) == (5, 2)


def test_null_and_nan_ranks_come_last_in_either_direction() -> None:
    table = small([5.0, None, 8.0, float("nan"), 6.0])
    assert (run_one(check(rank_by="diaSource.snr DESC"), table).passed - FIRST_ID).tolist() == [2, 4, 0, 1, 3]
    assert (run_one(check(rank_by="diaSource.snr ASC"), table).passed - FIRST_ID).tolist() == [0, 4, 2, 1, 3]
    computed = check(rank_by="sqrt(diaSource.snr - 6) DESC")  # NaN below 6
    assert (run_one(computed, table).passed - FIRST_ID).tolist() == [2, 4, 0, 1, 3]


def test_several_ranking_keys_count_in_turn_and_may_use_names_of_select() -> None:
    table = small([5.0, 5.0, 9.0, 9.0], band=["r", "g", "r", "g"])
    checked = check(
        select="diaSource.snr * 2 AS twice",
        rank_by="diaSource.band /* a, b */ ASC, twice DESC -- bright, first\n NULLS LAST",
    )
    assert (run_one(checked, table).passed - FIRST_ID).tolist() == [3, 1, 2, 0]


def test_the_default_rank_is_the_brightest_first_and_the_default_cap_is_20() -> None:
    outcome = run_one(check(), small([float(value) for value in range(30)]))
    assert (outcome.passed - FIRST_ID).tolist() == list(range(29, 9, -1))
    assert (outcome.n_passed, outcome.n_capped) == (30, 10)


# --- nulls


def test_only_true_passes_not_null() -> None:
    table = small([5.0, None, float("nan"), 20.0])
    assert (run_one(check("diaSource.snr > 10"), table).passed - FIRST_ID).tolist() == [3]
    assert (run_one(check("NOT (diaSource.snr > 10)"), table).passed - FIRST_ID).tolist() == [0]
    assert (run_one(check("diaSource.snr IS NULL"), table).passed - FIRST_ID).tolist() == [1, 2]


def test_absent_records_are_null_and_absent_histories_are_empty() -> None:
    rows: list[dict[str, Any]] = [
        {"diaSource": {"diaSourceId": 1}, "diaObject": {"diaObjectId": 9}, "prvDiaSources": None},
        {"diaSource": {"diaSourceId": 2}, "ssSource": {"ssObjectId": 5}, "prvDiaSources": []},
        {"diaSource": {"diaSourceId": 3}, "prvDiaSources": [{"diaSourceId": 8, "snr": float("nan")}]},
    ]
    table = pa.Table.from_pylist(rows, schema=alerts_arrow_schema())
    facts = {
        "diaObject IS NOT NULL": [1],
        "ssSource IS NOT NULL": [2],
        "len(prvDiaSources) = 0": [1, 2],
        "prvDiaSources[1].snr IS NULL": [1, 2, 3],
        "len(list_filter(prvDiaSources, lambda p: p.snr > 5)) > 0": [],
        "diaObject.nDiaSources = 0": [],
    }
    for where, passed in facts.items():
        assert run_one(check(where), table).passed.tolist() == passed, where


def test_our_own_functions_give_degrees_and_ab_magnitudes() -> None:
    table = small(
        [1.0, 1.0, 1.0, 1.0],
        psfFlux=[3631e9, 1000.0, -5.0, None],
        ra=[359.5, 0.0, 10.0, 0.0],
        dec=[0.0, 90.0, -60.0, 0.0],
    )
    checked = check(
        select="ab_magnitude(diaSource.psfFlux) AS m, separation_deg(diaSource.ra, diaSource.dec, 0.5, 0) AS s",
        rank_by="diaSource.diaSourceId",
    )
    rows = run_one(checked, table).columns.to_pylist()
    # 3631 Jy is magnitude 0; the constant 31.4 and float32 fluxes are good to 1e-4
    assert [row["m"] and round(row["m"], 3) for row in rows] == [0.0, 23.9, None, None]
    expected = [1.0, 90.0, math.degrees(math.acos(math.cos(math.radians(60)) * math.cos(math.radians(9.5)))), 0.5]
    assert [row["s"] for row in rows] == pytest.approx(
        expected, abs=1e-9
    )  # haversine, doubles, angles over 0.5 degrees


# --- failures


def test_a_filter_that_fails_at_run_time_does_not_stop_the_others() -> None:
    failing = check("diaSource.band::INTEGER = 1", name="failing")
    failing_output = check(select="diaSource.band::INTEGER AS n", name="failing-output")
    table = small([5.0, 6.0], band=["r", "1"])
    outcomes = filtered([check(), failing, failing_output, check(name="last")], table)
    assert [outcome.filter for outcome in outcomes] == [
        "demo.probe",
        "demo.failing",
        "demo.failing-output",
        "demo.last",
    ]
    assert [outcome.n_passed for outcome in outcomes] == [2, 0, 0, 2]
    for outcome in outcomes[1:3]:
        assert outcome.error is not None and "ConversionException" in outcome.error and "'r'" in outcome.error
        assert len(outcome.passed) == outcome.columns.num_rows == 0
    assert outcomes[3].error is None


def test_a_filter_without_end_is_stopped_and_the_next_one_runs() -> None:
    product = ", ".join(f"unnest(prvDiaSources) AS t{n}(p{n})" for n in range(8))
    endless = check(f"(SELECT sum(p0.snr * p7.snr) FROM {product}) > 1")
    history = [{"diaSourceId": n, "snr": float(n)} for n in range(100)]
    rows = [{"diaSource": {"diaSourceId": n, "snr": 1.0}, "prvDiaSources": history} for n in range(10)]
    table = pa.Table.from_pylist(rows, schema=alerts_arrow_schema())
    stopped, after = filtered([endless, check()], table, timeout_s=0.3)
    assert stopped.error is not None and "stopped after 0.3 s" in stopped.error
    assert 0.3 <= stopped.seconds < 10  # 1e16 rows would take years
    assert (stopped.n_passed, after.error, after.n_passed) == (0, None, 10)


def test_a_filter_that_wants_too_much_memory_fails_alone() -> None:
    greedy = check(
        "(SELECT count(DISTINCT x.snr * 1000 + y.snr)"
        " FROM unnest(prvDiaSources) AS a(x), unnest(prvDiaSources) AS b(y)) > 1"
    )
    history = [{"diaSourceId": n, "snr": float(n)} for n in range(2500)]
    rows = [{"diaSource": {"diaSourceId": n, "snr": 1.0}, "prvDiaSources": history} for n in range(2)]
    table = pa.Table.from_pylist(rows, schema=alerts_arrow_schema())
    failed, after = filtered([greedy, check()], table, memory_limit_mb=64)
    assert failed.error is not None and "OutOfMemory" in failed.error
    assert (after.error, after.n_passed) == (None, 2)


def test_no_alerts_and_no_filters_are_fine() -> None:
    empty = alerts_arrow_schema().empty_table()
    (outcome,) = filtered([EXAMPLES["bright-new"]], empty)
    assert (outcome.n_seen, outcome.n_passed, outcome.error, outcome.columns.num_rows) == (0, 0, None, 0)
    assert filtered([], empty) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.drop_columns(["diaObject"]), "no column diaObject"),
        (lambda table: pa.concat_tables([table, table]), f"diaSourceId {FIRST_ID} stands more than once"),
        (
            lambda table: table.set_column(1, "diaSource", pa.nulls(2, table.schema.field(1).type)),
            "2 of 2 alerts have no",
        ),
        (
            lambda table: table.set_column(
                1, "diaSource", pa.array([{"diaSourceId": 1, "snr": "a"}, {"diaSourceId": 2, "snr": "b"}])
            ),
            "diaSource.snr has type string, expected float",
        ),
        (
            lambda table: table.set_column(1, "diaSource", pa.array([{"diaSourceId": 1}, {"diaSourceId": 2}])),
            "no column diaSource.snr",
        ),
    ],
)
def test_a_table_that_cannot_be_filtered_is_refused_with_the_evidence(change: Any, reason: str) -> None:
    with pytest.raises(AlertsTableError, match=reason):
        run_one(check("diaObject.nDiaSources = 1 OR diaSource.snr > 1"), change(small([1.0, 2.0])))


def test_visits_on_one_connection_do_not_see_each_other() -> None:
    connection = FilterConnection()
    kept = check(where="diaSource.snr > 0", select="diaSource.ra")
    broken = check(where="CAST(diaSource.band AS DOUBLE) > 0")
    first, second = as_table(random_alerts(40, 1)), as_table(random_alerts(30, 2))
    alone = [filtered([kept], table)[0].passed.tolist() for table in (first, second, first)]
    together = []
    for table in (first, second, first):
        outcome, failed = run_filters([kept, broken], table, connection)
        together.append(outcome.passed.tolist())
        assert failed.error is not None
    connection.close()
    assert together == alone

"""`nightstream produce` with orbits of known objects: the same matches as with ephemerides made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from orbit_samples import elements_of_states

from transforms.numerics.orbit_propagation import (
    LIGHT_AU_PER_D,
    Orbits,
    observer_at,
    orbits_from_elements,
    predict_positions,
    tdb_of_tai,
)

FIRST_DAY = 20261122
RUBIN = (289.25058, 0.864981, -0.500958)
DISTANCE_AU = 2.0
ABSENT = ("ephemerides.parquet", "orbits.parquet", "orbits.csv")


def _orbits_of_asteroids(night: Path, midpoint: float) -> tuple[list[dict[str, Any]], Orbits]:
    """The simulated asteroids' rows nearest in time, and an orbit for each that passes there at the rate given."""
    rows = pq.read_table(night / "ephemerides.parquet").to_pylist()
    mjd = min((row["mjd_tai"] for row in rows), key=lambda one: abs(one - midpoint))
    found = [row for row in rows if row["mjd_tai"] == mjd]
    observer = observer_at(mjd, *RUBIN)
    ra, dec = (np.radians([row[name] for row in found]) for name in ("ra", "dec"))
    rates = [np.radians(np.array([row[name] for row in found]) * 24.0 / 3600.0) for name in RATES]
    towards = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)
    east = np.stack([-np.sin(ra), np.cos(ra), np.zeros_like(ra)], axis=1)
    north = np.cross(towards, east)
    # c tau = distance; no motion along the line of sight, so d tau / dt is 0.
    light_time = DISTANCE_AU / LIGHT_AU_PER_D
    position = DISTANCE_AU * towards + observer.position + light_time * observer.sun_velocity
    velocity = DISTANCE_AU * (rates[0][:, None] * east + rates[1][:, None] * north) + observer.velocity
    epoch = np.full(len(found), observer.mjd_tdb - light_time)
    return found, Orbits(epoch, position, velocity)


RATES = ("ra_rate_arcsec_per_h", "dec_rate_arcsec_per_h")


@pytest.fixture(scope="module")
def asteroids(nights: dict[int, Path], visits: list[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
    """The first night's asteroids as a table of elements, and as ephemerides computed from these."""
    times = [visit["midpoint_mjd_tai"] for visit in visits if visit["day_obs"] == FIRST_DAY]
    rows, orbits = _orbits_of_asteroids(nights[FIRST_DAY], float(np.mean(times)))
    elements = elements_of_states(*orbits)
    ids = [row["ssObjectId"] for row in rows]
    names = [row["designation"] for row in rows]
    columns = dict(zip(("q", "e", "i", "node", "argperi", "peri_time", "epoch_mjd"), elements, strict=True))
    table = pa.table({"ssObjectId": ids, "designation": names, **columns, "h": np.full(len(ids), 18.0)})
    parts = []
    for mjd in np.arange(min(times) - 0.02, max(times) + 0.03, 0.01):
        observer = observer_at(mjd, *RUBIN)
        seen = predict_positions(orbits_from_elements(*elements), observer)
        assert observer.mjd_tdb == tdb_of_tai(mjd)
        parts.append(
            pa.table(
                {
                    "ssObjectId": ids,
                    "designation": names,
                    "mjd_tai": np.full(len(ids), mjd),
                    "ra": seen.ra_deg,
                    "dec": seen.dec_deg,
                    "topo_range_au": seen.topo_range_au,
                }
            )
        )
    return table, pa.concat_tables(parts)


@pytest.fixture(scope="module")
def night_with(nights: dict[int, Path], visits: list[dict[str, Any]], night_of: Any, tmp_path_factory: Any) -> Any:
    """Makes the first night's folder with these files in place of its ephemerides."""

    def make(**tables: pa.Table | str) -> Path:
        records = [visit for visit in visits if visit["day_obs"] == FIRST_DAY]
        night: Path = night_of(tmp_path_factory.mktemp("orbits") / "night", nights[FIRST_DAY], records)
        for name in ABSENT:
            (night / name).unlink(missing_ok=True)
        for name, content in tables.items():
            if isinstance(content, str):
                (night / f"{name}.csv").write_text(content)
            else:
                pq.write_table(content, night / f"{name}.parquet")
        return night

    return make


@pytest.fixture(scope="module")
def by_elements(asteroids: Any, night_with: Any, produce: Any, tmp_path_factory: Any) -> Any:
    return produce(night_with(orbits=asteroids[0]), tmp_path_factory.mktemp("elements") / "out")


def _ss_sources(run: Any) -> dict[int, dict[str, Any]]:
    rows = pq.read_table(run.out / "archive" / "ss_sources").to_pylist()
    return {row["diaSourceId"]: row for row in rows}


def test_elements_give_the_matches_of_the_ephemerides_made_of_them(
    asteroids: Any, night_with: Any, by_elements: Any, first_run: Any, produce: Any, tmp_path: Path
) -> None:
    by_table = produce(night_with(ephemerides=asteroids[1]), tmp_path / "out")
    assert by_elements.exit_code == by_table.exit_code == 0
    assert by_elements.summary["failures"] == 0
    found, expected = _ss_sources(by_elements), _ss_sources(by_table)
    assert len(found) == by_elements.summary["ss_matches"] > 10
    assert {key: row["ssObjectId"] for key, row in found.items()} == {
        key: row["ssObjectId"] for key, row in expected.items()
    }
    # And those of the simulator's own ephemerides, great circles, which an orbit leaves by 0.04 arcsec in an hour.
    assert {key: row["ssObjectId"] for key, row in found.items()} == {
        key: row["ssObjectId"] for key, row in _ss_sources(first_run).items()
    }
    for key, row in found.items():
        other = expected[key]
        assert row.keys() == other.keys() and row["designation"] == other["designation"]
        for name, value in row.items():
            if name in ("designation", "ephVmag"):
                continue
            assert value is not None and other[name] is not None, name
            assert value == pytest.approx(other[name], abs=_tolerance(name)), name
        assert row["ephVmag"] is not None and other["ephVmag"] is None


def _tolerance(name: str) -> float:
    """The table is made without the planets, whose pull of 1e-8 au / d^2 does 5e-6 arcsec in 0.1 d at 2 au.

    Interpolation over 0.01 d leaves 3/128 h^4 of the site's circle, 1e-7 arcsec; float32 the rest.
    """
    if "Offset" in name:
        return 1e-5  # arcsec
    if name in ("ephRate", "ephRateRa", "ephRateDec"):
        return 1e-6  # deg / d; float32 of up to 1
    # Velocities of a table are derivatives, less by v / c: up to 60 km / s of which 60 / 300,000.
    return 60.0**2 / 3e5 if "v" in name or "Rate" in name else 1e-6 * 180.0


def test_every_field_of_an_ssource_is_filled_from_elements(by_elements: Any) -> None:
    packets = [packet for packet in by_elements.packets() if packet["ssSource"] is not None]
    assert len(packets) == by_elements.summary["ss_matches"]
    for packet in packets:
        assert [name for name, value in packet["ssSource"].items() if value is None] == []
        assert packet["ssSource"]["topoRange"] == pytest.approx(DISTANCE_AU, abs=1e-3)
        assert packet["ssSource"]["ephOffset"] < 1.0 and packet["diaObject"] is None


def test_packets_of_known_orbits_carry_the_elements_given(asteroids: Any, by_elements: Any, first_run: Any) -> None:
    given = {row["ssObjectId"]: row for row in asteroids[0].to_pylist()}
    packets = [packet for packet in by_elements.packets() if packet["ssSource"] is not None]
    assert packets
    for packet in packets:
        orbit, row = packet["mpc_orbits"], given[packet["ssSource"]["ssObjectId"]]
        for name in ("designation", "q", "e", "i", "node", "argperi", "peri_time", "epoch_mjd", "h"):
            assert orbit[name] == row[name], name
        assert orbit["g"] is None and orbit["mpc_orb_jsonb"] is None
        assert orbit["a"] == pytest.approx(row["q"] / (1.0 - row["e"]))
    others = [packet for packet in by_elements.packets() if packet["ssSource"] is None]
    assert others and all(packet["mpc_orbits"] is None for packet in others)
    # With ephemerides only nothing is known of orbits.
    assert all(packet["mpc_orbits"] is None for packet in first_run.packets())


def test_bad_rows_of_a_csv_are_failures_and_the_rest_is_matched(
    asteroids: Any, night_with: Any, by_elements: Any, produce: Any, tmp_path: Path
) -> None:
    path = tmp_path / "orbits.csv"
    pyarrow.csv.write_csv(asteroids[0], path)
    lines = path.read_text().splitlines()
    cells = lines[1].split(",")
    header = [name.strip('"') for name in lines[0].split(",")]
    negative = [
        "-1.0" if name == "e" else "77" if name == "ssObjectId" else cell
        for name, cell in zip(header, cells, strict=True)
    ]
    text = [
        "x" if name == "i" else "78" if name == "ssObjectId" else cell for name, cell in zip(header, cells, strict=True)
    ]
    bad = [",".join(negative), ",".join(text), "1,2"]
    run = produce(night_with(orbits="\n".join([*lines, *bad]) + "\n"), tmp_path / "out")
    assert run.exit_code == 0
    assert _ss_sources(run) == _ss_sources(by_elements)
    records = sorted(run.failures(), key=lambda record: record["reason"])
    assert {(record["stage"], record["error"], record["lost"]) for record in records} == {
        ("solar_system", "UnusableElements", "1 solar-system objects")
    }
    reasons = [record["reason"] for record in records]
    assert len(reasons) == 3
    assert reasons[0] == "orbits.csv: an element is missing or no number (ssObjectId 78)"
    assert reasons[1] == "orbits.csv: another number of cells than the header"
    assert reasons[2] == "orbits.csv: e outside [0, 100] (ssObjectId 77)"
    assert json.loads(run.stdout)["failures"] == 3


def test_a_table_of_elements_that_is_none_costs_the_matches_only(night_with: Any, produce: Any, tmp_path: Path) -> None:
    run = produce(night_with(orbits="a,b\n1,2\n"), tmp_path / "out")
    assert run.exit_code == 0 and run.summary["alerts"] > 50 and run.summary["ss_matches"] == 0
    (record,) = run.failures()
    assert (record["stage"], record["error"]) == ("solar_system", "ElementsError")
    assert "no column ssObjectId" in record["reason"] and "elements" in record["lost"]

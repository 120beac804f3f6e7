"""Sky space: association and statistics beside their peers, and the whole of it through Beam.

    python tests/benchmarks/bench_association.py [--big] [--runner flink]
        [--only numerics|rules|statistics|space|years|history]

Times are CPU seconds, best of three where the call is short. Peers run in the same process on the same input:

  whole visit   LSST's rule of 2026 written plainly: k-d tree of all objects, a score for each pair within the gate, one
                column per source that stands for no object at cost max(score) + 1, `scipy`'s minimum-weight full
                bipartite matching of the whole visit
  astropy       `SkyCoord.match_to_catalog_sky` of sources to objects: the nearest only, no one-to-one rule
  pandas        the statistics of a diaObject by `groupby(...).apply` of a function per object and band

Tables
  numerics      ms per visit; `differ`: sources that the whole-visit rule gives another object or none
  rules         groups of sources and objects that the whole-visit rule decides differently, 100 fields of each kind
                (`tests/numerics/association_fields.py`); `alone`: groups it decides differently once the rest is away
  statistics    microseconds per object of 21 sources in six bands
  space         DIA-source batches in, packets out, through Beam without cutouts: alerts per CPU second by cell order
                (alerts per cell and visit), history length, objects per cell; state per cell. On the local runner, or
                on an embedded Flink with one slot and with two, Java's CPU seconds among them
  years         10,000 visits of one cell in two simulated years, a history of 12 months: ms per visit, bytes of state
  history       30 nights of `nightstream associate`, each started with --history of all earlier ones, and one long run;
                then what reading and sending an archive of so many sources costs
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import hpgeom
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from astropy import units
from astropy.coordinates import SkyCoord
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "numerics"))

from association_fields import FIELDS, Candidates, candidates, whole_batch_matching
from sky_runs import CellByHand, Step, send_in_order

from runners.cli import main as run_cli
from runners.flink import flink_engine
from runners.local import Run, local_engine
from schemas.elements import CatalogueSources, EarlierNights
from schemas.identifiers import dia_source_ids
from schemas.manifests import Visit
from schemas.records import DIA_OBJECT, DIA_SOURCE, concatenate_records, empty_records, records_to_arrow, take_records
from transforms.archiving import write_table
from transforms.association import AssociateDiaSources, AssociationConfig, history_messages, read_archive
from transforms.delivery import Delivery
from transforms.numerics.dia_association import Positions, associate
from transforms.numerics.dia_object_statistics import LightCurves, band_statistics
from transforms.numerics.solar_system_matching import unit_vectors
from transforms.packaging import PackageAlerts, PackagingConfig

try:
    import pandas as pd
except ImportError:  # of requirements-oracles.txt
    pd = None

ARCSEC = 1.0 / 3600.0
START_MJD = 61367.1
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", action="store_true", help="also 40,000 sources by 2,000,000 objects, minutes of peers")
    parser.add_argument("--only", choices=("numerics", "rules", "statistics", "space", "years", "history"))
    parser.add_argument("--runner", choices=("local", "flink"), default="local", help="for the table space")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, seed {options.seed}")
    tables: dict[str, Callable[[], None]] = {
        "numerics": lambda: numerics(options.seed, options.big),
        "rules": lambda: rules(options.seed),
        "statistics": lambda: statistics(options.seed),
        "space": lambda: space(options.seed, options.runner),
        "years": lambda: years(options.seed),
        "history": lambda: history(options.seed),
    }
    for name, table in tables.items():
        if options.only in (None, name):
            print()
            table()


def timed(call: Callable[[], Any], repeats: int = REPEATS) -> tuple[float, Any]:
    """Least CPU seconds of some calls, those of processes beside this one among them, and the result."""
    seconds = []
    for _ in range(repeats):
        started = _cpu_s()
        result = call()
        seconds.append(_cpu_s() - started)
    return min(seconds), result


def _cpu_s() -> float:
    beside = (process.cpu_times() for process in psutil.Process().children(recursive=True))
    return time.process_time() + sum(times.user + times.system for times in beside)


def numerics(seed: int, big: bool) -> None:
    associate(*field(seed, 100, 1000, 0.1))
    print(
        "numerics   sources   objects  deg2  per arcmin2   ours ms  whole visit ms  astropy ms   ratio  "
        "contested  differ"
    )
    sizes = [(10_000, 50_000, 9.6), (10_000, 200_000, 9.6), (10_000, 800_000, 9.6), (10_000, 20_000, 0.2)]
    if big:
        sizes += [(40_000, 200_000, 9.6), (40_000, 2_000_000, 9.6)]
    for n_sources, n_objects, area in sizes:
        pair = field(seed, n_sources, n_objects, area)
        ours, found = timed(partial(associate, *pair))
        plain, assigned = timed(partial(whole_visit, *pair), 1)
        nearest, _ = timed(partial(astropy_nearest, *pair), 1)
        differ = int(np.count_nonzero(found.object_index != assigned))
        print(
            f"{n_sources:18d} {n_objects:9d} {area:5.1f} {n_objects / area / 3600.0:12.1f} {1e3 * ours:9.1f} "
            f"{1e3 * plain:15.0f} {1e3 * nearest:11.0f} {plain / ours:7.0f} {len(found.contested):10d} {differ:7d}"
        )


def field(seed: int, n_sources: int, n_objects: int, area_deg2: float) -> tuple[Positions, Positions]:
    """Objects over a square at dec -30; four of five sources belong to one, with errors of 0.05 to 0.3 arcsec."""
    rng = np.random.default_rng(seed)
    side = np.sqrt(area_deg2)
    cos_dec = np.cos(np.radians(30.0))

    def anywhere(n: int) -> np.ndarray:
        return np.stack([150.0 + rng.uniform(0, side, n) / cos_dec, -30.0 + rng.uniform(0, side, n)])

    objects = anywhere(n_objects)
    own = objects[:, rng.permutation(n_objects)[: min(int(0.8 * n_sources), n_objects)]]
    error = rng.uniform(0.05, 0.3, own.shape[1]) * ARCSEC
    own = own + rng.normal(0.0, 1.0, own.shape) * error * np.array([[1.0 / cos_dec], [1.0]])
    others = anywhere(n_sources - own.shape[1])
    sources = np.concatenate([own, others], axis=1)
    source_error = np.concatenate([error, np.full(others.shape[1], 0.1 * ARCSEC)])
    object_error = np.full(n_objects, 0.05 * ARCSEC)
    return Positions(*sources, source_error, source_error), Positions(*objects, object_error, object_error)


def whole_visit(sources: Positions, objects: Positions, radius_arcsec: float = 1.0) -> np.ndarray:
    """Object of each source by the whole-visit rule; -1 for none."""
    tree = cKDTree(unit_vectors(objects.ra, objects.dec))
    chord = 2.0 * np.sin(np.radians(radius_arcsec * ARCSEC) / 2.0)
    hits = tree.query_ball_point(unit_vectors(sources.ra, sources.dec), chord)
    row = np.repeat(np.arange(len(sources)), [len(one) for one in hits])
    column = np.array([k for one in hits for k in one], dtype=np.int64)
    variances = []
    for source_err, object_err in ((sources.ra_err, objects.ra_err), (sources.dec_err, objects.dec_err)):
        one, other = (np.maximum(error * 3600.0, 0.05) for error in (source_err[row], object_err[column]))
        variances.append(one**2 + other**2)
    d_ra = (sources.ra[row] - objects.ra[column]) * 3600.0 * np.cos(np.radians(objects.dec[column]))
    d_dec = (sources.dec[row] - objects.dec[column]) * 3600.0
    score = 0.5 * (d_ra**2 / variances[0] + d_dec**2 / variances[1]) + 0.5 * np.log(variances[0] * variances[1])
    weight = score - score.min() + 1.0
    n, m = len(sources), len(objects)
    ghost = np.arange(n)
    cost = coo_matrix(
        (
            np.concatenate([weight, np.full(n, weight.max() + 1.0)]),
            (np.concatenate([row, ghost]), np.concatenate([column, m + ghost])),
        ),
        shape=(n, m + n),
    ).tocsr()
    matched_row, matched_column = min_weight_full_bipartite_matching(cost)
    assigned = np.full(n, -1, dtype=np.int64)
    assigned[matched_row] = np.where(matched_column < m, matched_column, -1)
    return assigned


def rules(seed: int) -> None:
    print("rules               groups  contested  wide  differ  (wide  fewer pairs  other pairs)  alone")
    for name, field_of in FIELDS.items():
        total = np.zeros(7, dtype=np.int64)
        for number in range(100):
            total += compare_rules(*field_of(np.random.default_rng(1000 * seed + number)))
        groups, contested, n_wide, wide_differ, fewer, other, alone = total.tolist()
        print(
            f"{name:18s} {groups:7d} {contested:10d} {n_wide:5d} {wide_differ + fewer + other:7d} {wide_differ:6d} "
            f"{fewer:12d} {other:12d} {alone:7d}"
        )


def compare_rules(sources: Positions, objects: Positions) -> np.ndarray:
    """What `rules` counts, of one field."""
    found, assignment = candidates(sources, objects), associate(sources, objects)
    ours, wide = assignment.object_index, set(assignment.wide.tolist())
    theirs = whole_batch_matching(found, len(sources), len(objects))
    differ = np.zeros(3, dtype=np.int64)
    alone = 0
    labels = np.unique(found.group)
    for label in labels:
        own = found.group == label
        members = np.unique(found.pairs[own, 0])
        part = Candidates(found.pairs[own], found.scores[own], found.group[own])
        alone += bool(np.any(whole_batch_matching(part, len(sources), len(objects))[members] != theirs[members]))
        if np.any(ours[members] != theirs[members]):
            fewer = np.count_nonzero(theirs[members] >= 0) < np.count_nonzero(ours[members] >= 0)
            differ[0 if int(members[0]) in wide else 1 if fewer else 2] += 1
    return np.array([len(labels), len(assignment.contested), len(wide), *differ, alone])


def astropy_nearest(sources: Positions, objects: Positions) -> Any:
    one, other = (SkyCoord(p.ra * units.deg, p.dec * units.deg) for p in (sources, objects))
    return one.match_to_catalog_sky(other)


def statistics(seed: int) -> None:
    n_objects, n_rows = 20_000, 21
    rng = np.random.default_rng(seed)
    curves = LightCurves(
        np.arange(0, n_objects * n_rows + 1, n_rows),
        rng.integers(0, 6, n_objects * n_rows).astype(np.int8),
        np.sort(rng.uniform(0, 365, (n_objects, n_rows)), axis=1).ravel(),
        *(rng.uniform(low, high, n_objects * n_rows) for low, high in ((-500, 2000), (10, 50), (0, 9000), (10, 50))),
    )
    band_statistics(curves, curves)
    ours, found = timed(lambda: band_statistics(curves, curves))
    if pd is None:
        print(f"statistics: {1e6 * ours / n_objects:.2f} us/object; pandas is not installed (requirements-oracles.txt)")
        return
    n_peer = 200
    seconds, plain = timed(lambda: pandas_statistics(curves, n_peer), 1)
    worst = max(
        float(np.nanmax(np.abs(found[name][:n_peer] - plain[name]) / np.abs(plain[name]).clip(1e-9))) for name in plain
    )
    print("statistics  ours us/object  pandas us/object    ratio  largest relative difference")
    mine, theirs = 1e6 * ours / n_objects, 1e6 * seconds / n_peer
    print(f"{mine:26.2f} {theirs:17.0f} {theirs / mine:8.0f} {worst:28.1e}")


def pandas_statistics(curves: LightCurves, n_objects: int) -> dict[str, np.ndarray]:
    """The same formulas, a group at a time."""
    end = curves.offsets[n_objects]
    table = pd.DataFrame(
        {
            "object": np.repeat(np.arange(n_objects), np.diff(curves.offsets[: n_objects + 1])),
            "band": curves.band[:end],
            "mjd": curves.mjd[:end],
            "flux": curves.flux[:end],
            "err": curves.flux_err[:end],
            "science": curves.science_flux[:end],
            "science_err": curves.science_flux_err[:end],
        }
    )

    def mean(flux: Any, err: Any) -> tuple[float, float]:
        weight = 1.0 / err**2
        return float(np.sum(weight * flux) / np.sum(weight)), float(np.sqrt(1.0 / np.sum(weight)))

    plugins: dict[str, Callable[[Any], float]] = {
        "psf_mean": lambda g: mean(g.flux, g.err)[0],
        "psf_mean_err": lambda g: mean(g.flux, g.err)[1],
        "psf_sigma": lambda g: g.flux.std(),
        "psf_min": lambda g: g.flux.min(),
        "psf_max": lambda g: g.flux.max(),
        "psf_max_slope": lambda g: (np.diff(g.flux) / np.diff(g.mjd)).max() if len(g) > 1 else np.nan,
        "psf_err_mean": lambda g: g.err.mean(),
        "science_mean": lambda g: mean(g.science, g.science_err)[0],
        "science_mean_err": lambda g: mean(g.science, g.science_err)[1],
        "forced_mean": lambda g: mean(g.flux, g.err)[0],
        "forced_mean_err": lambda g: mean(g.flux, g.err)[1],
    }
    found = {name: np.full((n_objects, 6), np.nan) for name in plugins}
    for band in range(6):
        of_band = table[table.band == band]
        for name, plugin in plugins.items():
            values = of_band.groupby("object").apply(plugin, include_groups=False)
            found[name][values.index, band] = values.to_numpy()
    return found


def space(seed: int, runner: str) -> None:
    rows = [
        (10, 4, 20, 1.0),
        (9, 16, 20, 1.0),
        (8, 64, 20, 1.0),
        (9, 16, 80, 1.0),
        (8, 64, 80, 1.0),
        (9, 16, 300, 1.0),
        (8, 64, 300, 1.0),
        (9, 160, 20, 0.1),
        (8, 640, 20, 0.1),
        (9, 1600, 20, 0.01),
        (8, 6400, 20, 0.01),
    ]
    if runner == "local":
        with local_engine(()) as run:
            _space_table(seed, run, rows, 512)
        return
    for slots in (1, 2):
        with flink_engine((f"--parallelism={slots}",), print) as run:
            print(f"{slots} slots")
            _space_table(seed, run, rows[:3], 2048)


def _space_table(seed: int, run: Run, rows: list[tuple[int, int, int, float]], n_objects: int) -> None:
    run_space(seed, run, 9, n_objects // 16, 16, 1.0, 9)  # compiles
    print("space  order  cells  objects/cell  alerts/cell/visit  history  alerts  CPU s  alerts/CPU s  state KB/cell")
    for order, objects_per_cell, history, lit in rows:
        n_cells = n_objects // objects_per_cell if lit == 1.0 else 32
        seconds, alerts = run_space(seed, run, order, n_cells, objects_per_cell, lit, history)
        size = objects_per_cell * (lit * history * DIA_SOURCE.itemsize + DIA_OBJECT.itemsize) / 1e3
        print(
            f"{order:12d} {n_cells:6d} {objects_per_cell:13d} {lit * objects_per_cell:18.0f} {history:8d} {alerts:7d} "
            f"{seconds:6.2f} {alerts / seconds:13.0f} {size:14.0f}"
        )


def run_space(
    seed: int, run: Run, order: int, n_cells: int, objects_per_cell: int, lit: float, history: int
) -> tuple[float, int]:
    """CPU seconds and alerts of five visits: what a run of six takes beyond one of the first, after a history."""
    visits = list(make_visits(seed, order, n_cells, objects_per_cell, lit, history + 6))
    with tempfile.TemporaryDirectory() as folder:
        write_history(visits[:history], Path(folder))
        first, _ = timed(lambda: run_visits(run, visits[history : history + 1], order, folder), 2)
        whole, _ = timed(lambda: run_visits(run, visits[history:], order, folder), 2)
    return whole - first, sum(len(one.dia_sources) for one in visits[history + 1 :])


def make_visits(
    seed: int, order: int, n_cells: int, objects_per_cell: int, lit: float, n_visits: int
) -> Iterator[CatalogueSources]:
    """Visits of neighbouring cells whose objects, or the part `lit` of them, are seen each time.

    The diaObjectId is there from the start, as a history wants it; association sets it anew.
    """
    rng = np.random.default_rng(seed)
    first = int(hpgeom.angle_to_pixel(1 << order, 150.0, -30.0))
    first -= first % 128
    ra, dec = hpgeom.pixel_to_angle(1 << order, np.repeat(np.arange(first, first + n_cells), objects_per_cell))
    reach = 0.3 * 58.6 / (1 << order)
    ra = ra + rng.uniform(-reach, reach, len(ra)) / np.cos(np.radians(dec))
    dec = dec + rng.uniform(-reach, reach, len(dec))
    for number in range(n_visits):
        midpoint = START_MJD + number / 24.0
        seen = np.flatnonzero(rng.random(len(ra)) < lit)
        n = len(seen)
        rows = empty_records(DIA_SOURCE, n)
        rows["diaSourceId"] = dia_source_ids(20261122, number + 1, 0, n, 0)
        rows["diaObjectId"] = 1 + seen
        visit, band = 2026112200000 + number + 1, "ugrizy"[number % 6]
        rows["visit"], rows["band"], rows["midpointMjdTai"] = visit, band.encode(), midpoint
        rows["timeProcessedMjdTai"] = midpoint + 2e-4
        rows["ra"] = ra[seen] + rng.normal(0, 0.05 * ARCSEC, n)
        rows["dec"] = dec[seen] + rng.normal(0, 0.05 * ARCSEC, n)
        rows["raErr"] = rows["decErr"] = 0.05 * ARCSEC
        for name, value in {"psfFlux": 900.0, "scienceFlux": 4000.0}.items():
            rows[name], rows[f"{name}Err"] = value + rng.normal(0, 20, n), 20.0
        rows["snr"], rows["reliability"] = 45.0, 0.9
        yield CatalogueSources(_visit(visit, number, midpoint, band), 0, rows)


def _visit(visit: int, number: int, midpoint: float, band: str) -> Visit:
    return Visit(
        visit=visit,
        day_obs=20261122,
        seq_num=number + 1,
        instrument="bench",
        band=band,
        midpoint_mjd_tai=midpoint,
        exposure_time_s=30.0,
        readout_end_mjd_tai=midpoint + 2e-4,
        boresight_ra_deg=150.0,
        boresight_dec_deg=-30.0,
        rotation_deg=0.0,
        observation_reason="bench",
        target_name=None,
        detectors=(),
    )


def write_history(visits: list[CatalogueSources], folder: Path) -> None:
    """The tables of an output folder that hold what these visits left."""
    sources = concatenate_records([one.dia_sources for one in visits], DIA_SOURCE)
    ids, first = np.unique(sources["diaObjectId"], return_index=True)
    objects = empty_records(DIA_OBJECT, len(ids))
    objects["diaObjectId"], objects["validityStartMjdTai"] = ids, visits[-1].visit.readout_end_mjd_tai
    for name in ("ra", "dec", "raErr", "decErr"):
        objects[name] = sources[name][first]
    objects["firstDiaSourceMjdTai"] = sources["midpointMjdTai"][first]
    for name, rows in (("dia_sources", sources), ("dia_objects", objects)):
        write_table(folder / "archive" / name / "day_obs=20261122" / "1.parquet", records_to_arrow(rows))


def years(seed: int) -> None:
    """Twenty objects, each seen in a tenth of the visits, and once in ten visits a source that never comes back."""
    n_visits, n_objects = 10_000, 20
    days_per_visit = 730.5 / n_visits
    rng = np.random.default_rng(seed)
    ra, dec = (float(angle[0]) for angle in hpgeom.pixel_to_angle(1 << 9, np.array([1_000_000])))
    east, north = rng.uniform(-100, 100, (2, n_objects)) * ARCSEC
    cell = CellByHand(AssociationConfig())
    print("years  visits  month  ms/visit  objects  state KB  blocks  alerts  history of an alert")
    started, alerts, longest = time.process_time(), 0, 0
    for number in range(n_visits):
        stray = rng.uniform(-100, 100, (2, int(rng.random() < 0.1))) * ARCSEC
        seen = rng.random(n_objects) < 0.1
        offset = np.concatenate([np.stack([east, north])[:, seen], stray], axis=1)
        offset = offset + rng.normal(0, 0.05 * ARCSEC, offset.shape)
        rows = empty_records(DIA_SOURCE, offset.shape[1])
        midpoint, band = START_MJD + number * days_per_visit, "ugrizy"[number % 6]
        visit = 2026112200000 + number
        rows["diaSourceId"] = (number + 1) * 1000 + np.arange(len(rows))
        rows["visit"], rows["band"], rows["midpointMjdTai"] = visit, band.encode(), midpoint
        rows["ra"], rows["dec"] = ra + offset[0] / np.cos(np.radians(dec)), dec + offset[1]
        rows["raErr"] = rows["decErr"] = 0.05 * ARCSEC
        rows["psfFlux"], rows["psfFluxErr"] = rng.normal(900.0, 20.0, len(rows)), 20.0
        for batch in cell.visit(CatalogueSources(_visit(visit, number, midpoint, band), 0, rows)):
            alerts += len(batch.dia_sources)
            longest = max(longest, int(np.diff(batch.prv_offsets).max(initial=0)))
        if (number + 1) % 1000 == 0:
            now = time.process_time()
            print(
                f"{number + 1:13d} {(number + 1) * days_per_visit / 30.4:6.1f} {now - started:9.2f} "
                f"{cell.n_objects():8d} {cell.nbytes() / 1e3:9.0f} {cell.n_blocks():7d} {alerts:7d} {longest:20d}"
            )
            started, alerts, longest = now, 0, 0


def history(seed: int) -> None:
    n_nights, told = 30, (1, 11, 31)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        base, n_rows = Path(folder), 0
        places = np.stack([150.0 + rng.uniform(0, 0.7, 500), -30.0 + rng.uniform(0, 0.7, 500)])
        tables = [night_table(rng, night, places) for night in range(n_nights + 1)]
        print("history  night  sources before  CPU s  without history  peak MB  without history", flush=True)
        for night, table in enumerate(tables):
            path, out = base / f"{night}.parquet", base / f"out-{night}"
            pq.write_table(table, path)
            earlier = [f"--history={base / f'out-{number}'}" for number in range(night)]
            if night + 1 not in told:
                run_cli(["associate", str(path), "--out", str(out), "--quiet", *earlier], standalone_mode=False)
            else:
                seconds, peak = run_apart(path, out, earlier)
                bare_seconds, bare_peak = run_apart(path, base / f"bare-{night}", [])
                print(f"{night + 1:14d} {n_rows:15d} {seconds:6.1f} {bare_seconds:16.1f} {peak:8.0f} {bare_peak:16.0f}")
            n_rows += table.num_rows
        pq.write_table(pa.concat_tables(tables), base / "all.parquet")
        seconds, peak = run_apart(base / "all.parquet", base / "whole", [])
        last = base / f"out-{n_nights}" / "archive"
        files = [path.relative_to(last) for path in sorted(last.rglob("day_obs=*/*")) if path.is_file()]
        same = [(last / path).read_bytes() == (base / "whole" / "archive" / path).read_bytes() for path in files]
        print(f"one long run: {seconds:.1f} s, {peak:.0f} MB; files of the last night: {len(same)}, equal: {sum(same)}")
    print("history  sources  objects  cells  read s  read and send s  MB sent  peak MB more")
    for n_sources in (100_000, 400_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            write_archive_of(rng, n_sources, Path(folder))
            code = f"from bench_association import archive_costs; archive_costs({folder!r})"
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=_with_paths(), check=True)


def archive_costs(folder: str) -> None:
    """A line about reading one archive; in a process of its own, for its memory."""
    config = AssociationConfig()
    status = Path("/proc/self/status")
    before = peak_mb(status.read_text())
    read_s, known = timed(lambda: read_archive((folder,)), 1)
    n_sources, n_objects = len(known.sources), len(known.objects)
    del known
    send_s, sizes = timed(lambda: [len(message) for _, message in history_messages((folder,), config)], 1)
    peak = peak_mb(status.read_text()) - before
    sent = sum(sizes) / 1e6
    print(f"{n_sources:16d} {n_objects:8d} {len(sizes):6d} {read_s:7.1f} {send_s:16.1f} {sent:8.0f} {peak:13.0f}")


def night_table(rng: np.random.Generator, night: int, places: np.ndarray) -> pa.Table:
    """Six visits, each seeing three objects of ten, as a table for `associate`."""
    tables = []
    for number in range(6):
        seen = np.flatnonzero(rng.random(places.shape[1]) < 0.3)
        n = len(seen)
        visit, midpoint = (20261122 + night) * 100 + number, START_MJD + night + number / 48.0
        columns = {
            "diaSourceId": (night * 6 + number + 1) * 10_000 + np.arange(n),
            "visit": np.full(n, visit),
            "detector": np.zeros(n, dtype=np.int32),
            "band": np.full(n, "gri"[number % 3]),
            "midpointMjdTai": np.full(n, midpoint),
            "ra": places[0][seen] + rng.normal(0, 0.1 * ARCSEC, n),
            "dec": places[1][seen] + rng.normal(0, 0.1 * ARCSEC, n),
            "psfFlux": rng.normal(900.0, 20.0, n).astype(np.float32),
            "psfFluxErr": np.full(n, 20.0, dtype=np.float32),
            "snr": np.full(n, 45.0, dtype=np.float32),
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def run_apart(table: Path, out: Path, options: list[str]) -> tuple[float, float]:
    """CPU seconds and peak MB of `nightstream associate` in a process of its own."""
    code = (
        "import sys, time; from runners.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print(time.process_time()); print(open('/proc/self/status').read())"
    )
    arguments = ["associate", str(table), "--out", str(out), "--quiet", *options]
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, env=_with_paths(), check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[0]), peak_mb(done.stdout)


def peak_mb(status: str) -> float:
    """Peak memory by /proc/PID/status; what getrusage tells includes that of the program which started this one."""
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _with_paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def write_archive_of(rng: np.random.Generator, n_sources: int, folder: Path) -> None:
    """Ten nights of objects of 20 sources each, 5,000 objects a square degree."""
    n_objects = n_sources // 20
    own, side = rng.integers(0, n_objects, n_sources), np.sqrt(n_objects / 5000.0)
    objects = empty_records(DIA_OBJECT, n_objects)
    objects["diaObjectId"], objects["nDiaSources"] = 1 + np.arange(n_objects), 20
    objects["ra"], objects["dec"] = 150.0 + rng.uniform(0, side, n_objects), -30.0 + rng.uniform(0, side, n_objects)
    sources = empty_records(DIA_SOURCE, n_sources)
    sources["diaSourceId"], sources["diaObjectId"] = 1 + np.arange(n_sources), 1 + own
    sources["ra"], sources["dec"] = objects["ra"][own], objects["dec"][own]
    sources["visit"] = 1 + np.arange(n_sources) * 200 // n_sources
    sources["midpointMjdTai"], sources["band"] = START_MJD + sources["visit"] / 20.0, b"r"
    for night in range(10):
        rows = take_records(sources, (sources["visit"] - 1) // 20 == night)
        path = folder / "archive" / "dia_sources" / f"day_obs=202611{night + 1:02d}" / "1.parquet"
        write_table(path, records_to_arrow(rows))
    write_table(folder / "archive" / "dia_objects" / "day_obs=20261110" / "1.parquet", records_to_arrow(objects))


class _SkySpace:
    """Association and packaging alone, as the engines run a dataflow."""

    def __init__(self, steps: list[Step], order: int, folder: str) -> None:
        self.steps, self.order, self.folder = steps, order, folder

    def build(self, flow: beam.Pipeline, *, spread: bool = False) -> None:
        delivery = Delivery(out=self.folder, store=self.folder, brokers=(), filters=())
        sent = send_in_order(flow, self.steps, Path(self.folder))
        associated = sent | AssociateDiaSources(AssociationConfig(cell_order=self.order), image_store=None)
        associated.good | PackageAlerts(PackagingConfig(), None, delivery)


def run_visits(run: Run, visits: list[CatalogueSources], order: int, history: str) -> None:
    steps: list[Step] = [(0.0, EarlierNights((history,)))]
    for one in visits:
        steps += [(one.visit.event_time_s, one), (one.visit.event_time_s + 2.0, None)]
    with tempfile.TemporaryDirectory() as folder:
        run(_SkySpace(steps, order, folder))


if __name__ == "__main__":
    main()

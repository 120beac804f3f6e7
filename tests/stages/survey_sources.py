"""Detections that surveys have tied to objects themselves, as tables for `associate`; and how ours compare with theirs.

The sets lie in `DATA`. A survey's own object is the truth of a detection; sources of known asteroids have none.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.spatial import cKDTree
from sky_runs import Step, run_by_hand

from runners.ingest.ztf import ingest_ztf_detections
from schemas.elements import CatalogueSources
from schemas.records import DIA_SOURCE, arrow_schema, concatenate_records, take_records
from schemas.source_tables import read_source_table, table_radius_arcsec
from transforms.association import AssociationConfig
from transforms.numerics.solar_system_matching import unit_vectors

DATA = Path(__file__).parents[3] / "shared" / "data"
LSST_GATE_ARCSEC = 1.0
YEAR_DAYS = 365.25
# What tells whether a source may found an object: rules that are younger than some of the sets.
_JUDGEMENTS = ("reliability", "centroid_flag", "glint_trail", "pixelFlags")

# Why a detection is not where its true object's others are.
UNFIT = "may not found an object today"
TWINS = "two sources of a visit within the gate"
NEIGHBOURS = "two objects within the gate"
BEYOND = "beyond the gate of its object's mean so far"
FOLLOWS = "after one beyond the gate"


@dataclass(frozen=True)
class Survey:
    """A table of detections as `associate` takes it.

    Attributes
    ----------
    table : Parquet
    truth : the survey's own object of each diaSourceId that has one
    radius_arcsec : the survey's gate
    left_out : detections that are no truth, and why
    """

    table: Path
    truth: dict[int, int | str]
    radius_arcsec: float
    left_out: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """Our objects beside the survey's.

    Attributes
    ----------
    sources : DIA_SOURCE of all detections that have a truth, in order of time, with our diaObjectId
    right : it shares its object with most of its true object's detections, and most of them are of that true object
    alone : `right`, and no detection of another true object is among them
    clear : no other object of the survey and no second source of a visit lie within the gate of its true object
    reasons : why those that are not right are not, by diaSourceId
    """

    sources: np.ndarray
    right: np.ndarray
    alone: np.ndarray
    clear: np.ndarray
    reasons: dict[int, str]


def elasticc(folder: Path, scatter_seed: int | None = None) -> Survey:
    """ELAsTiCC: simulated, all detections of an object at one place; visits are the distinct times.

    With a seed the places get the scatter of 0.7 arcsec seeing, sigma = 0.3 / (S/N) and 0.02 arcsec, and tell it.
    """
    rows: dict[int, dict[str, Any]] = {}
    for name in ("935", "89_mixed"):
        path = DATA / "elasticc_sim" / f"elasticc_alerts_{name}.parquet"
        for alert in pq.ParquetFile(path).read(columns=["diaSource", "prvDiaSources"]).to_pylist():
            for one in (alert["diaSource"], *(alert["prvDiaSources"] or ())):
                rows.setdefault(one["diaSourceId"], one)
    ordered = sorted(rows.values(), key=lambda one: one["diaSourceId"])
    times = sorted({one["midPointTai"] for one in ordered})
    visit = dict(zip(times, range(1, len(times) + 1), strict=True))
    columns = {
        "diaSourceId": [one["diaSourceId"] for one in ordered],
        "visit": [visit[one["midPointTai"]] for one in ordered],
        "detector": [0] * len(ordered),
        "band": [one["filterName"].lower() for one in ordered],
        "midpointMjdTai": [one["midPointTai"] for one in ordered],
        "ra": [one["ra"] for one in ordered],
        "dec": [one["decl"] for one in ordered],
        "psfFlux": [one["psFlux"] for one in ordered],
        "psfFluxErr": [one["psFluxErr"] for one in ordered],
        "snr": [one["snr"] for one in ordered],
    }
    if scatter_seed is not None:
        sigma_deg = np.hypot(0.3 / np.maximum(np.abs(columns["snr"]), 1.0), 0.02) / 3600.0
        east, north = np.random.default_rng(scatter_seed).normal(size=(2, len(ordered))) * sigma_deg
        columns["ra"] = np.asarray(columns["ra"]) + east / np.cos(np.radians(columns["dec"]))
        columns["dec"] = np.asarray(columns["dec"]) + north
        columns["raErr"] = columns["decErr"] = sigma_deg
    table = folder / f"elasticc-{scatter_seed}.parquet"
    pq.write_table(pa.table(columns), table)
    return Survey(table, {one["diaSourceId"]: one["diaObjectId"] for one in ordered}, LSST_GATE_ARCSEC, {})


def ztf(folder: Path) -> Survey:
    """Eight years of public ZTF."""
    rows = pq.read_table(DATA / "ztf_alerts" / "ztf_detections.parquet", columns=["candid", "objectId"])
    table = ingest_ztf_detections(DATA / "ztf_alerts", folder / "ztf.parquet").table
    truth = dict(zip(rows["candid"].to_pylist(), rows["objectId"].to_pylist(), strict=True))
    return Survey(table, truth, table_radius_arcsec(table) or math.nan, {})


def lsst(name: str, folder: Path, *, judged: bool) -> Survey:
    """A set of `rubin_alerts`, the detections of the alerts and of their histories.

    Objects that are further than 2 arcsec across are no truth: their ids were used twice. `judged` keeps what tells
    whether a source may found an object.
    """
    rows: dict[int, dict[str, Any]] = {}
    for alert in read_alerts(name):
        for one in (alert["diaSource"], *(alert["prvDiaSources"] or ())):
            rows.setdefault(one["diaSourceId"], one)
    ordered = [rows[key] for key in sorted(rows)]
    members = defaultdict(list)
    for one in ordered:
        if one["diaObjectId"] and not one.get("ssObjectId"):
            members[one["diaObjectId"]].append(one)
    reused = {key for key, own in members.items() if _extent_arcsec(own) > 2.0}
    truth = {one["diaSourceId"]: key for key, own in members.items() if key not in reused for one in own}
    schema = arrow_schema(DIA_SOURCE)
    kept = [one for one in schema if one.name in ordered[0] and (judged or not one.name.startswith(_JUDGEMENTS))]
    columns = {field.name: pa.array([one[field.name] for one in ordered], field.type) for field in kept}
    table = folder / f"{name}-{judged}.parquet"
    pq.write_table(pa.table(columns), table)
    asteroids = sum(bool(one.get("ssObjectId")) for one in ordered)
    left_out = {"asteroid": asteroids, "id used twice": sum(len(members[key]) for key in reused)}
    return Survey(table, truth, LSST_GATE_ARCSEC, left_out)


def read_alerts(name: str) -> list[dict[str, Any]]:
    """The records of a file of `rubin_alerts` by the beginning of its name."""
    (path,) = (DATA / "rubin_alerts").glob(f"{name}*")
    if path.suffix == ".parquet":
        return pq.ParquetFile(path).read().to_pylist()
    with path.open("rb") as stream:
        return list(fastavro.reader(stream))


def compare(survey: Survey) -> Comparison:
    """Associate the table cell by cell, and compare."""
    read = read_source_table(survey.table)
    if read.manifest.problems:
        raise ValueError(f"{survey.table.name}: {read.manifest.problems[0]}")
    config = AssociationConfig(radius_arcsec=survey.radius_arcsec)
    outcome = run_by_hand(_steps(read.records, read.manifest.visits), config, None)
    parts = [rows for batch in outcome.batches for rows in (batch.dia_sources, batch.unassociated)]
    sources = concatenate_records(parts, DIA_SOURCE)
    if len(np.unique(sources["diaSourceId"])) != len(read.records) or len(sources) != len(read.records):
        raise ValueError(f"{survey.table.name}: {len(read.records)} sources became {len(sources)}")
    sources = take_records(sources, np.lexsort((sources["diaSourceId"], sources["midpointMjdTai"])))
    sources = take_records(sources, np.array([key in survey.truth for key in sources["diaSourceId"].tolist()]))
    return _compared(sources, survey)


def _steps(records: np.ndarray, visits: Iterable[Any]) -> list[Step]:
    """All detectors in order of time; the watermark passes them at the end, cells still take visits in order."""
    by_number = {visit.visit: visit for visit in visits}
    starts = np.flatnonzero(np.diff(records["visit"]) | np.diff(records["detector"])) + 1
    steps: list[Step] = []
    for rows in np.split(np.arange(len(records)), starts):
        visit = by_number[int(records["visit"][rows[0]])]
        own = CatalogueSources(visit, int(records["detector"][rows[0]]), take_records(records, rows))
        steps.append((visit.event_time_s, own))
    return steps


def _compared(sources: np.ndarray, survey: Survey) -> Comparison:
    found = sources["diaObjectId"].tolist()
    truth = [survey.truth[key] for key in sources["diaSourceId"].tolist()]
    names_in: dict[int, Counter[int | str]] = defaultdict(Counter)
    objects_of: dict[int | str, Counter[int]] = defaultdict(Counter)
    for one, name in zip(found, truth, strict=True):
        if one:
            names_in[one][name] += 1
            objects_of[name][one] += 1
    main_name = {one: names.most_common(1)[0][0] for one, names in names_in.items()}
    main_object = {name: objects.most_common(1)[0][0] for name, objects in objects_of.items()}
    right = np.array(
        [
            one != 0 and main_name[one] == name and main_object[name] == one
            for one, name in zip(found, truth, strict=True)
        ]
    )
    alone = right & np.array([len(names_in[one]) == 1 for one in found])
    doubtful = _doubtful_objects(sources, truth, survey.radius_arcsec)
    clear = np.array([name not in doubtful for name in truth])
    reasons = _reasons(sources, np.flatnonzero(~right), truth, doubtful, survey.radius_arcsec)
    return Comparison(sources, right, alone, clear, reasons)


def _doubtful_objects(sources: np.ndarray, truth: list[int | str], radius_arcsec: float) -> dict[int | str, str]:
    """True objects whose detections are nobody's for certain, and why."""
    place = unit_vectors(sources["ra"], sources["dec"])
    names = sorted(set(truth), key=str)
    rows_of = _rows_of(truth)
    centres = np.array([place[rows_of[name]].mean(axis=0) for name in names])
    near = cKDTree(place).query_ball_point(centres, np.radians(radius_arcsec / 3600.0))
    doubtful = {}
    for name, rows in zip(names, near, strict=True):
        if len(np.unique(sources["visit"][rows])) < len(rows):
            doubtful[name] = TWINS
        elif any(truth[row] != name for row in rows):
            doubtful[name] = NEIGHBOURS
    return doubtful


def _reasons(
    sources: np.ndarray,
    wrong: np.ndarray,
    truth: list[int | str],
    doubtful: dict[int | str, str],
    radius_arcsec: float,
) -> dict[int, str]:
    """Why detections are not where their object's others are; by diaSourceId, the first of the reasons that holds."""
    place = unit_vectors(sources["ra"], sources["dec"])
    rows_of = _rows_of(truth)
    reasons = {}
    for row in wrong.tolist():
        own = [one for one in rows_of[truth[row]] if one < row]
        earlier = [one for one in own if sources["midpointMjdTai"][row] - sources["midpointMjdTai"][one] < YEAR_DAYS]
        if sources["diaObjectId"][row] == 0:
            reason = UNFIT
        elif truth[row] in doubtful:
            reason = doubtful[truth[row]]
        elif earlier and _distance_arcsec(place[earlier].mean(axis=0), place[row]) > radius_arcsec:
            reason = BEYOND
        else:
            reason = FOLLOWS
        reasons[int(sources["diaSourceId"][row])] = reason
    return reasons


def _rows_of(truth: list[int | str]) -> dict[int | str, list[int]]:
    rows: dict[int | str, list[int]] = defaultdict(list)
    for row, name in enumerate(truth):
        rows[name].append(row)
    return rows


def _distance_arcsec(places: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.degrees(np.linalg.norm(places - place, axis=-1)) * 3600.0


def _extent_arcsec(own: list[dict[str, Any]]) -> float:
    place = unit_vectors(np.array([one["ra"] for one in own]), np.array([one["dec"] for one in own]))
    return float(max(_distance_arcsec(place, one).max() for one in place))

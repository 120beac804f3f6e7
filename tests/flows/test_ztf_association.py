"""Eight years of ZTF through `associate`: the objects found again are those that ZTF had found.

ZTF's objectId is the truth here: its own association, made within 1.5 arcsec. The sample has whole objects.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from runners.ingest.ztf import ingest_ztf_detections
from schemas.avro.container import read_container

DATA = Path(__file__).parents[3] / "shared" / "data" / "ztf_alerts"
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}"),
]
MIN_RIGHT = 0.998
CUTOUTS = ("cutoutDifference", "cutoutScience", "cutoutTemplate")


@dataclass(frozen=True)
class Association:
    """The whole set associated once."""

    run: Any
    truth: dict[int, str]
    table: pa.Table
    sources: list[dict[str, Any]]

    def packets(self) -> Iterator[dict[str, Any]]:
        """Every packet of the archive, one at a time."""
        for path in sorted((self.run.out / "archive" / "alerts").rglob("*.avro")):
            yield from read_container(path)


@pytest.fixture(scope="module")
def associated(associate: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Association:
    folder = tmp_path_factory.mktemp("ztf")
    detections = pq.read_table(DATA / "ztf_detections.parquet", columns=["candid", "objectId"])
    ingested = ingest_ztf_detections(DATA, folder / "ztf.parquet")
    (folder / "no-filters").mkdir()  # association is looked at here; a filter's seconds depend on the machine
    run = associate(ingested.table, folder / "out", "--filters", folder / "no-filters")
    archived = ds.dataset(run.out / "archive" / "dia_sources", format="parquet").to_table(
        columns=["diaSourceId", "diaObjectId", "visit", "detector", "midpointMjdTai"]
    )
    truth = dict(zip(detections["candid"].to_pylist(), detections["objectId"].to_pylist(), strict=True))
    return Association(run, truth, pq.read_table(ingested.table), archived.to_pylist())


def test_the_run_ends_well_and_loses_no_detection(associated: Association) -> None:
    run = associated.run
    assert run.exit_code == 0, run.stderr
    assert run.summary["failures"] == 0 and run.failures() == []
    wanted = sorted(associated.truth)
    assert len(wanted) > 9_000
    assert sorted(source["diaSourceId"] for source in associated.sources) == wanted
    assert run.summary["dia_sources"] == run.summary["alerts"] == len(wanted)
    assert run.summary["visits"] == len(set(associated.table["visit"].to_pylist()))


def test_nearly_all_detections_lie_in_the_object_of_their_object_id(associated: Association) -> None:
    """Right is a detection whose object is mostly of its objectId, and its objectId mostly in that object."""
    pairs = [(source["diaObjectId"], associated.truth[source["diaSourceId"]]) for source in associated.sources]
    names_in: dict[int | None, Counter[str]] = defaultdict(Counter)
    objects_of: dict[str, Counter[int | None]] = defaultdict(Counter)
    for dia_object, name in pairs:
        names_in[dia_object][name] += 1
        objects_of[name][dia_object] += 1
    main_name = {dia_object: names.most_common(1)[0][0] for dia_object, names in names_in.items()}
    main_object = {name: objects.most_common(1)[0][0] for name, objects in objects_of.items()}
    right = [
        dia_object is not None and main_name[dia_object] == name and main_object[name] == dia_object
        for dia_object, name in pairs
    ]
    split = sorted(name for name, objects in objects_of.items() if len(objects) > 1)
    print(
        f"{sum(right)} of {len(right)} detections ({np.mean(right):.3%}) of {len(main_object)} objects; split: {split}"
    )
    assert np.mean(right) >= MIN_RIGHT


def test_an_object_has_one_source_per_visit(associated: Association) -> None:
    counts = Counter((source["diaObjectId"], source["visit"]) for source in associated.sources)
    assert max(counts.values()) == 1


def test_packets_have_the_earlier_year_of_their_object_and_nothing_else(associated: Association) -> None:
    """Oracle: the archived sources of each object, looked through one by one."""
    of_object: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for source in associated.sources:
        of_object[source["diaObjectId"]].append(source)
    n_packets = n_with_history = 0
    for packet in associated.packets():
        source, history = packet["diaSource"], packet["prvDiaSources"]
        midpoint = source["midpointMjdTai"]
        earlier = {
            one["diaSourceId"]
            for one in of_object[source["diaObjectId"]]
            if midpoint - 365.25 < one["midpointMjdTai"] < midpoint
        }
        assert {one["diaSourceId"] for one in history or []} == earlier
        times = [one["midpointMjdTai"] for one in history or []]
        assert times == sorted(times) and all(time < midpoint for time in times)
        assert packet["diaObject"]["diaObjectId"] == source["diaObjectId"] != 0
        assert packet["diaObject"]["nDiaSources"] == len(earlier) + 1
        assert packet["prvDiaForcedSources"] == [] and packet["ssSource"] is None
        assert [packet[name] for name in CUTOUTS] == [None, None, None]
        n_packets += 1
        n_with_history += history is not None
    assert n_packets == len(associated.truth) and n_with_history > n_packets / 2


def test_there_are_no_forced_sources(associated: Association) -> None:
    assert not list((associated.run.out / "archive").glob("dia_forced_sources/**/*.parquet"))


def test_the_ledger_tells_of_every_exposure_and_its_readout_channels(associated: Association) -> None:
    rows = sorted(zip(associated.table["visit"].to_pylist(), associated.table["detector"].to_pylist(), strict=True))
    expected = {visit: len({one[1] for one in group}) for visit, group in groupby(rows, key=lambda row: row[0])}
    lines = (associated.run.out / "ledger" / "visits.jsonl").read_text().splitlines()
    ledger = [json.loads(line) for line in lines]
    assert {one["visit"]: one["detectors"]["processed"] for one in ledger} == expected
    assert [one["midpoint_mjd_tai"] for one in ledger] == sorted(one["midpoint_mjd_tai"] for one in ledger)
    assert {one["revision"] for one in ledger} == {0}

"""A small archive of two nights as the stage writes it, with ids that no float holds and nulls of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.elements import VisitAlerts
from schemas.records import (
    BOOLEAN_NULL,
    DIA_FORCED_SOURCE,
    DIA_OBJECT,
    DIA_SOURCE,
    SS_SOURCE,
    concatenate_records,
    empty_records,
)
from transforms.archiving import SORTED_BY, _ArchiveFn, finish_object_tables

DAYS = (20261122, 20261123)
# Odd and beyond 2^53: a float64 holds every 32nd number there.
FIRST_ID = 170_094_456_272_322_681
N_SOURCES = 40


@dataclass(frozen=True)
class Archive:
    """The folder and what went in, in the order in which the tables are to hold it."""

    folder: Path
    written: dict[str, np.ndarray]

    def files(self, name: str) -> list[Path]:
        """The Parquet files of a table, in order."""
        return sorted((self.folder / name).rglob("*.parquet"))


def make_archive(out: Path) -> Archive:
    """Two visits a night: each source has an object, a solar-system object or none, in turns."""
    folder = out / "archive"
    stage = _ArchiveFn(str(folder), str(out / "packets"))
    written: dict[str, list[np.ndarray]] = {name: [] for name in SORTED_BY}
    for number, day in enumerate((DAYS[0], DAYS[0], DAYS[1], DAYS[1])):
        visit = day * 100_000 + number
        tables = _tables(visit, number)
        stage._write(VisitAlerts(visit, day, 0, {}, pa.table({"diaSourceId": pa.array([], pa.int64())}), tables, ()))
        for name, rows in tables.items():
            if name != "dia_objects" or number % 2:  # the later visit of a night leaves the state of its objects
                written[name].append(rows)
    finish_object_tables(folder)
    dtypes = {name: parts[0].dtype for name, parts in written.items()}
    return Archive(folder, {name: concatenate_records(parts, dtypes[name]) for name, parts in written.items()})


def _tables(visit: int, number: int) -> dict[str, np.ndarray]:
    index = np.arange(N_SOURCES)
    kind = index % 3  # of an object, moving, without either
    sources = empty_records(DIA_SOURCE, N_SOURCES)
    sources["diaSourceId"] = FIRST_ID + 1000 * number + 2 * index
    sources["diaObjectId"] = np.where(kind == 0, FIRST_ID + 2 * index, 0)
    sources["ssObjectId"] = np.where(kind == 1, FIRST_ID + 2 * index, 0)
    sources["visit"], sources["midpointMjdTai"] = visit, 61366.0 + number
    sources["ra"], sources["dec"] = np.linspace(0.0, 359.0, N_SOURCES), np.linspace(-89.0, 89.0, N_SOURCES)
    sources["psfFlux"] = np.where(index % 2, np.float32(np.pi) * index, np.nan)
    sources["isDipole"] = np.where(index % 2, index % 4 == 1, BOOLEAN_NULL)
    sources["band"], sources["reliabilityVersion"] = b"r", np.where(index % 2, b"1.0", b"")
    objects = empty_records(DIA_OBJECT, int(np.sum(kind == 0)))
    objects["diaObjectId"], objects["nDiaSources"] = sources["diaObjectId"][kind == 0], 1 + number
    objects["validityStartMjdTai"] = 61366.0 + number
    forced = empty_records(DIA_FORCED_SOURCE, len(objects))
    forced["diaObjectId"] = objects["diaObjectId"]
    forced["diaForcedSourceId"] = 2**62 + 1001 * number + 1 + 2 * np.arange(len(forced))
    forced["visit"], forced["band"] = visit, b"r"
    moving = empty_records(SS_SOURCE, int(np.sum(kind == 1)))
    for name in ("diaSourceId", "ssObjectId"):
        moving[name] = sources[name][kind == 1]
    moving["designation"] = np.where(np.arange(len(moving)) % 2, "2026 ÄB1".encode(), b"")
    return {"dia_sources": sources, "dia_objects": objects, "dia_forced_sources": forced, "ss_sources": moving}

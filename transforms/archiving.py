"""ArchiveAlerts: one Avro container per visit, and the tables as Parquet."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.avro.messages import write_messages
from schemas.elements import VisitAlerts
from schemas.records import records_to_arrow
from transforms.distribution import packet_messages
from transforms.failures import FAILED, failure_of

STAGE = "archiving"
SORTED_BY = {
    "dia_sources": "diaSourceId",
    "dia_objects": "diaObjectId",
    "dia_forced_sources": "diaForcedSourceId",
    "ss_sources": "diaSourceId",
}
_PARTS = "_parts"


class ArchiveResult(NamedTuple):
    """`good`: VisitAlerts; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class ArchiveAlerts(beam.PTransform):
    """Write a visit's packets and table rows.

    Input and output `good`: VisitAlerts; `failed`: what could not be written. A revised visit's
    files are rewritten whole. `dia_objects` holds one state per object and night, so its rows wait as
    parts per visit until `finish_object_tables` puts them together. No state.
    """

    def __init__(self, folder: str, *, packet_folder: str) -> None:
        super().__init__()
        self.archive = _ArchiveFn(folder, packet_folder)

    def expand(self, visits: beam.PCollection) -> ArchiveResult:
        outputs = visits | "WriteArchive" >> beam.ParDo(self.archive).with_output_types(VisitAlerts).with_outputs(
            FAILED, main="good"
        )
        return ArchiveResult(outputs.good, outputs[FAILED])


class _ArchiveFn(beam.DoFn):
    def __init__(self, folder: str, packet_folder: str) -> None:
        self.folder = folder
        self.packet_folder = packet_folder

    def process(self, visit: VisitAlerts) -> Iterator[Any]:
        failures = []
        try:
            self._write(visit)
        except Exception as error:  # one visit's archive must not stop the others
            lost = f"archive of {len(visit.alerts)} alerts"
            failures.append(failure_of(error, STAGE, visit.visit, lost=lost))
        yield from (beam.pvalue.TaggedOutput(FAILED, failure) for failure in failures)
        yield replace(visit, failures=visit.failures + tuple(failures))

    def _write(self, visit: VisitAlerts) -> None:
        archive = Path(self.folder)
        night = f"day_obs={visit.day_obs}"
        if len(visit.alerts):
            path = archive / "alerts" / night / f"{visit.visit}.avro"
            path.parent.mkdir(parents=True, exist_ok=True)
            ids = visit.alerts["diaSourceId"].to_numpy()
            write_messages(path, packet_messages(visit, ids, self.packet_folder))
        for name, records in visit.tables.items():
            if len(records) == 0:
                continue
            folder = archive / name / night
            if name == "dia_objects":
                folder = archive / name / _PARTS / night
            write_table(folder / f"{visit.visit}.parquet", archive_table(records), SORTED_BY[name])


def archive_table(records: np.ndarray) -> pa.Table:
    """Records as the archive keeps them: as `records_to_arrow`, with what pandas and astropy need to be told.

    pandas turns whole numbers with nulls among them into floats, which round ids beyond 2^53, unless the metadata name
    a type of its own that holds both. astropy cannot read null text, so text is empty instead, and takes its width
    from the metadata.
    """
    table = records_to_arrow(records)
    metadata, columns = {}, []
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            table = table.set_column(index, field.with_nullable(False), table[index].fill_null(""))
            metadata[f"table::len::{field.name}"] = str(records.dtype[field.name].itemsize)
        elif pa.types.is_integer(field.type) and field.nullable:
            kind = str(field.type)
            named = {"name": field.name, "field_name": field.name, "pandas_type": kind}
            columns.append({**named, "numpy_type": kind.capitalize(), "metadata": None})
    pandas = {"index_columns": [], "column_indexes": [], "columns": columns, "creator": {}, "pandas_version": "2.0"}
    return table.replace_schema_metadata({**metadata, "pandas": json.dumps(pandas)})


def write_table(path: Path, table: pa.Table, sorted_by: str | None = None) -> None:
    """Write a Parquet file under a temporary name and rename it; `sorted_by` goes into its row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    order = [pq.SortingColumn(table.column_names.index(sorted_by))] if sorted_by else None
    pq.write_table(table, partial, compression="zstd", row_group_size=100_000, sorting_columns=order)
    partial.replace(path)


def are_object_tables_unfinished(archive: Path) -> bool:
    """Whether `finish_object_tables` is still to come."""
    return (archive / "dia_objects" / _PARTS).exists()


def finish_object_tables(archive: Path) -> None:
    """Put the parts of `dia_objects` together: per night one row per object, its latest state."""
    parts = archive / "dia_objects" / _PARTS
    for night in sorted(parts.glob("day_obs=*")):
        table = pa.concat_tables([pq.ParquetFile(path).read() for path in sorted(night.glob("*.parquet"))])
        ids = table["diaObjectId"].to_numpy()
        # After a late visit two states begin at one time: the fuller one stands.
        order = np.lexsort((table["nDiaSources"].to_numpy(), table["validityStartMjdTai"].to_numpy(), ids))
        last = np.append(np.diff(ids[order]) != 0, True)
        path = archive / "dia_objects" / night.name / "dia_objects.parquet"
        write_table(path, table.take(pa.array(order[last])), SORTED_BY["dia_objects"])
    shutil.rmtree(parts, ignore_errors=True)

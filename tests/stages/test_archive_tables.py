"""The archive's tables as their readers find them: sorted, with statistics, whole numbers whole; DuckDB."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_samples import DAYS, FIRST_ID, Archive, make_archive

from schemas.records import LAYOUTS, empty_records, records_from_arrow
from transforms.archiving import SORTED_BY, archive_table, write_table

IDS = ("diaSourceId", "diaObjectId", "ssObjectId", "parentDiaSourceId", "diaForcedSourceId", "visit")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("name", SORTED_BY)
def test_tables_hold_every_record_as_it_was(archive: Archive, name: str) -> None:
    rows = pa.concat_tables([pq.ParquetFile(path).read() for path in archive.files(name)])
    expected = archive.written[name]
    assert records_from_arrow(rows, expected.dtype).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", SORTED_BY)
def test_rows_ascend_by_id_and_the_file_says_so(archive: Archive, name: str) -> None:
    key = SORTED_BY[name]
    for path in archive.files(name):
        file = pq.ParquetFile(path)
        assert np.all(np.diff(file.read([key])[key].to_numpy()) > 0)
        order = [pq.SortingColumn(file.schema_arrow.names.index(key))]
        assert [list(file.metadata.row_group(i).sorting_columns) for i in range(file.num_row_groups)] == [order]


@pytest.mark.parametrize("name", SORTED_BY)
def test_row_groups_hold_the_range_of_every_column_with_values(archive: Archive, name: str) -> None:
    for path in archive.files(name):
        file = pq.ParquetFile(path)
        group, rows = file.metadata.row_group(0), file.read()
        for index, column in enumerate(rows.column_names):
            statistics = group.column(index).statistics
            assert statistics is not None and statistics.null_count == rows[column].null_count, column
            values = [value for value in rows[column].to_pylist() if value is not None]
            if values and not any(value != value for value in values):
                assert (statistics.min, statistics.max) == (min(values), max(values)), column


@pytest.mark.parametrize("record", LAYOUTS)
def test_no_text_is_null_and_unknown_ids_are(record: str) -> None:
    table = archive_table(empty_records(LAYOUTS[record], 3))
    for field in table.schema:
        if pa.types.is_string(field.type):
            assert not field.nullable and table[field.name].to_pylist() == [""] * 3, field.name
        if field.name in ("diaObjectId", "ssObjectId") and field.nullable:
            assert table[field.name].null_count == 3, field.name


def test_units_and_meanings_stay_with_the_columns(archive: Archive) -> None:
    field = pq.read_schema(archive.files("dia_sources")[0]).field("psfFlux")
    assert field.metadata[b"unit"] == b"nJy" and field.metadata[b"description"]


@pytest.mark.parametrize("name", SORTED_BY)
def test_duckdb_reads_ids_exactly_and_the_night_from_the_path(archive: Archive, name: str) -> None:
    files = str(archive.folder / name / "*" / "*.parquet")
    ids = [column for column in IDS if column in (archive.written[name].dtype.names or ())]
    query = f"SELECT {', '.join(ids)}, day_obs FROM read_parquet(?, hive_partitioning = true)"
    rows = duckdb.execute(query, [files]).fetchall()
    expected = archive.written[name]
    found = sorted(tuple(value or 0 for value in row[:-1]) for row in rows)  # in records, 0 is no id
    assert found == sorted(zip(*(expected[column].tolist() for column in ids), strict=True))
    assert {int(row[-1]) for row in rows} == set(DAYS)


def test_duckdb_finds_the_sources_of_the_objects_by_id(archive: Archive) -> None:
    folder = archive.folder
    found = duckdb.execute(
        f"SELECT count(*), count(DISTINCT s.diaObjectId) FROM read_parquet('{folder}/dia_sources/*/*.parquet') s "
        f"WHERE s.diaObjectId IN (SELECT diaObjectId FROM read_parquet('{folder}/dia_objects/*/*.parquet'))"
    ).fetchone()
    with_object = archive.written["dia_sources"]["diaObjectId"]
    assert found == (np.count_nonzero(with_object), len(np.unique(with_object[with_object > 0])))


def test_a_float_would_not_hold_these_ids(archive: Archive) -> None:
    ids = archive.written["dia_sources"]["diaSourceId"]
    assert np.all(ids >= FIRST_ID) and not np.any(ids.astype(np.float64).astype(np.int64) == ids)


def test_a_table_without_an_order_claims_none(tmp_path: Path) -> None:
    write_table(tmp_path / "any.parquet", pa.table({"x": [2, 1]}))
    assert pq.ParquetFile(tmp_path / "any.parquet").metadata.row_group(0).sorting_columns == ()

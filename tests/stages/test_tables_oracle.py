"""The archive's tables in pandas and in astropy (whose reader needs pandas), read without being told anything."""

from __future__ import annotations

import numpy as np
import pytest
from archive_samples import DAYS, Archive, make_archive
from astropy.table import Table, vstack

from transforms.archiving import SORTED_BY

pd = pytest.importorskip("pandas", exc_type=ImportError)

IDS = ("diaSourceId", "diaObjectId", "ssObjectId", "parentDiaSourceId", "diaForcedSourceId", "visit")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("name", SORTED_BY)
def test_pandas_reads_a_folder_with_its_ids_as_whole_numbers(archive: Archive, name: str) -> None:
    found = pd.read_parquet(archive.folder / name)
    expected = archive.written[name]
    assert {int(day) for day in found["day_obs"]} == set(DAYS)
    for column in expected.dtype.names or ():
        if column in IDS:
            assert str(found[column].dtype).lower() == "int64", column
            np.testing.assert_array_equal(found[column].fillna(0).to_numpy(np.int64), expected[column], err_msg=column)
        elif expected.dtype[column].kind == "f":
            assert found[column].dtype == expected.dtype[column], column
            np.testing.assert_array_equal(found[column], expected[column], err_msg=column)


def test_pandas_tells_null_flags_from_false_ones(archive: Archive) -> None:
    found, expected = pd.read_parquet(archive.folder / "dia_sources"), archive.written["dia_sources"]["isDipole"]
    np.testing.assert_array_equal(found["isDipole"].isna(), expected == -1)
    np.testing.assert_array_equal(found["isDipole"].eq(True), expected == 1)


def test_pandas_selects_by_id_through_the_row_groups(archive: Archive) -> None:
    wanted = int(archive.written["dia_sources"]["diaSourceId"][57])
    (row,) = pd.read_parquet(archive.folder / "dia_sources", filters=[("diaSourceId", "==", wanted)]).itertuples()
    assert row.diaSourceId == wanted


def test_pandas_joins_sources_with_their_objects(archive: Archive) -> None:
    sources, objects = (pd.read_parquet(archive.folder / name) for name in ("dia_sources", "dia_objects"))
    sources = sources[sources["diaObjectId"].notna()]
    joined = sources.merge(objects, on=["diaObjectId", "day_obs"], suffixes=("", "_object"))
    assert len(joined) == np.count_nonzero(archive.written["dia_sources"]["diaObjectId"])


@pytest.mark.parametrize("name", SORTED_BY)
def test_astropy_reads_every_table_and_ids_without_nulls_as_whole_numbers(archive: Archive, name: str) -> None:
    found = vstack([Table.read(path, format="parquet") for path in archive.files(name)])
    expected = archive.written[name]
    assert found.colnames == list(expected.dtype.names or ())
    for column in IDS:
        if column in found.colnames and expected[column].all():
            assert found[column].dtype == np.int64, column
            np.testing.assert_array_equal(found[column], expected[column], err_msg=column)
    if "psfFlux" in found.colnames:
        np.testing.assert_array_equal(found["psfFlux"], expected["psfFlux"])
    if "designation" in found.colnames:
        assert found["designation"].tolist() == [text.decode() for text in expected["designation"].tolist()]


def test_astropy_keeps_ids_with_nulls_by_way_of_pandas(archive: Archive) -> None:
    found = Table.from_pandas(pd.read_parquet(archive.folder / "dia_sources"))
    expected = archive.written["dia_sources"]["diaObjectId"]
    np.testing.assert_array_equal(found["diaObjectId"].filled(0), expected)
    assert found["diaObjectId"].dtype == np.int64

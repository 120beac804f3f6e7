"""Record layouts: null rules, and exact round trips through bytes, Arrow and Parquet."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_alerts import random_records

from schemas.records import (
    DIA_FORCED_SOURCE,
    DIA_OBJECT,
    DIA_SOURCE,
    INT32_NULL,
    LAYOUTS,
    SS_SOURCE,
    RecordLayoutError,
    concatenate_records,
    empty_records,
    field_types,
    records_from_arrow,
    records_from_bytes,
    records_to_arrow,
    records_to_bytes,
    records_to_struct_array,
    take_records,
)

SEEDS = st.integers(0, 2**32 - 1)
RECORDS = sorted(LAYOUTS)


def test_layouts_are_packed_little_endian_and_hold_every_field() -> None:
    assert [len(LAYOUTS[record].names) for record in RECORDS] == [14, 82, 102, 53, 39]
    for record, dtype in LAYOUTS.items():
        assert list(dtype.names) == list(field_types(record))
        assert dtype.itemsize == sum(dtype[name].itemsize for name in dtype.names)
        assert all(dtype[name].newbyteorder("<") == dtype[name] for name in dtype.names)
    assert (DIA_SOURCE.itemsize, DIA_FORCED_SOURCE.itemsize, DIA_OBJECT.itemsize, SS_SOURCE.itemsize) == (
        348,
        85,
        352,
        224,
    )


def test_empty_records_are_null_where_they_may_be() -> None:
    source = empty_records(DIA_SOURCE, 2)[1]
    assert source["diaSourceId"] == 0
    assert np.isnan(source["x"])
    table = records_to_arrow(empty_records(DIA_SOURCE, 3))
    for name, kind in field_types("diaSource").items():
        assert table.column(name).null_count == (3 if kind.endswith("?") else 0), name


@pytest.mark.parametrize("record", RECORDS)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, n=st.integers(0, 40))
def test_bytes_arrow_and_parquet_give_the_same_bytes_back(record: str, seed: int, n: int) -> None:
    rows = random_records(record, n, np.random.default_rng(seed))
    dtype = LAYOUTS[record]
    assert records_from_bytes(dtype, records_to_bytes(rows)).tobytes() == rows.tobytes()
    table = records_to_arrow(rows)
    assert records_from_arrow(table, dtype).tobytes() == rows.tobytes()
    file = io.BytesIO()
    pq.write_table(table, file)
    file.seek(0)
    assert records_from_arrow(pq.read_table(file), dtype).tobytes() == rows.tobytes()
    struct = records_to_struct_array(rows)
    assert len(struct) == n
    assert records_from_arrow(pa.Table.from_struct_array(struct), dtype).tobytes() == rows.tobytes()


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n=st.integers(0, 20))
def test_taking_and_joining_equal_plain_numpy(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_records("diaSource", n, rng)
    mask = rng.random(n) < 0.5
    order = rng.permutation(n)
    assert take_records(rows, mask).tobytes() == rows[mask].tobytes()
    assert take_records(rows, order).tobytes() == rows[order].tobytes()
    assert take_records(rows, slice(1, n)).tobytes() == rows[1:n].tobytes()
    parts = [rows[: n // 2], rows[n // 2 :]]
    joined = concatenate_records(parts, DIA_SOURCE)
    assert joined.tobytes() == rows.tobytes()
    joined["ra"] = 1.0  # a new array: writing to it leaves the parts alone
    assert n == 0 or parts[1].tobytes() == rows[n // 2 :].tobytes()


def test_joining_nothing_gives_no_records_and_other_layouts_are_refused() -> None:
    assert concatenate_records([], DIA_OBJECT).shape == (0,)
    with pytest.raises(RecordLayoutError, match="got dtype diaSource"):
        concatenate_records([empty_records(DIA_SOURCE, 1)], DIA_OBJECT)
    with pytest.raises(RecordLayoutError, match="not a record layout"):
        records_to_arrow(np.zeros(1, dtype=[("a", "i4")]))


def test_bytes_that_end_within_a_record_are_refused() -> None:
    with pytest.raises(RecordLayoutError, match="347 bytes are not whole records of 348 bytes"):
        records_from_bytes(DIA_SOURCE, bytes(347))


def test_arrow_sees_the_null_rules() -> None:
    rows = empty_records(DIA_SOURCE, 3)
    rows["diaObjectId"] = [0, 7, -(2**63)]
    rows["parentDiaSourceId"] = [0, 1, 2]
    rows["trailAlgorithm"] = [INT32_NULL, 0, 1]
    rows["isNegative"] = [-1, 0, 1]
    rows["band"] = [b"", b"g", b"r"]
    rows["psfFlux"] = [np.nan, np.inf, 0.0]
    rows["x"] = [np.nan, 1.0, 2.0]
    columns = records_to_arrow(rows, fields=["band", "diaObjectId", "trailAlgorithm", "isNegative", "psfFlux", "x"])
    assert columns.column_names == ["band", "diaObjectId", "trailAlgorithm", "isNegative", "psfFlux", "x"]
    assert columns.column("band").to_pylist() == [None, "g", "r"]
    assert columns.column("diaObjectId").to_pylist() == [None, 7, -(2**63)]
    assert columns.column("trailAlgorithm").to_pylist() == [None, 0, 1]
    assert columns.column("isNegative").to_pylist() == [None, False, True]
    assert columns.column("psfFlux").to_pylist() == [None, float("inf"), 0.0]
    assert columns.column("x").null_count == 0
    assert not columns.schema.field("x").nullable
    assert columns.schema.field("psfFlux").metadata[b"unit"] == b"nJy"


def test_missing_columns_are_null_and_unknown_ones_ignored() -> None:
    ids = [2**63 - 1, 2**53 + 1, 3]
    table = pa.table(
        {
            "diaSourceId": ids,
            "diaObjectId": pa.array([2**53 + 1, None, 5]),
            "candid": ["a", "b", "c"],
            "isNegative": pa.array([1, 0, None], type=pa.int8()),
            "psfFlux": pa.array([1.5, None, 2.5], type=pa.float64()),
            "trailNdata": pa.array([None, 3, 4], type=pa.int64()),
            "band": pa.array(["g", None, "r"]).dictionary_encode(),
        }
    )
    rows = records_from_arrow(table, DIA_SOURCE)
    assert rows["diaSourceId"].tolist() == ids
    assert rows["diaObjectId"].tolist() == [2**53 + 1, 0, 5]
    assert rows["isNegative"].tolist() == [1, 0, -1]
    assert rows["trailNdata"].tolist() == [0, 3, 4]
    assert rows["band"].tolist() == [b"g", b"", b"r"]
    assert np.isnan(rows["psfFlux"][1])
    assert np.isnan(rows["x"]).all()
    assert (rows["glint_trail"] == -1).all()


def test_chunked_columns_and_record_batches_are_read() -> None:
    rows = random_records("diaObject", 9, np.random.default_rng(3))
    table = pa.concat_tables([records_to_arrow(rows[:4]), records_to_arrow(rows[4:])])
    assert records_from_arrow(table, DIA_OBJECT).tobytes() == rows.tobytes()
    (batch,) = records_to_arrow(rows).to_batches()
    assert records_from_arrow(batch, DIA_OBJECT).tobytes() == rows.tobytes()


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ({"diaObjectId": pa.array([1.0, None])}, "diaObjectId holds double but must hold whole numbers"),
        ({"detector": pa.array([1, 2**40])}, "detector: int64 does not fit int32"),
        ({"visit": pa.array([1, 2**63], type=pa.uint64())}, "visit: uint64 does not fit int64"),
        ({"band": pa.array(["r", "rr"])}, "band: a text of 2 bytes, at most 1 fit"),
        ({"ra": pa.array(["1", "x"])}, "ra: string does not fit double"),
    ],
)
def test_columns_that_do_not_fit_are_refused(column: dict, reason: str) -> None:
    with pytest.raises(RecordLayoutError, match=reason):
        records_from_arrow(pa.table(column), DIA_SOURCE)


def test_unknown_fields_and_broken_texts_are_refused() -> None:
    rows = empty_records(DIA_SOURCE, 1)
    with pytest.raises(RecordLayoutError, match="no field psfflux in diaSource"):
        records_to_arrow(rows, fields=["psfflux"])
    rows["band"] = b"\xff"
    with pytest.raises(RecordLayoutError, match="band: text that is not UTF-8"):
        records_to_arrow(rows)

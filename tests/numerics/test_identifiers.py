"""Identifiers: the published bit layout, its limits, and forced ids that need no counter."""

from __future__ import annotations

from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.identifiers import (
    COUNTER_BITS,
    MAX_COUNTER,
    day_number,
    dia_forced_source_id,
    dia_source_ids,
)

LARGEST = 2**63 - 1


def unpacked(identifier: int) -> tuple[int, date, int, int, int]:
    """Release, day, sequence number, detector and counter, read from the right."""
    counter = identifier % 2**19
    detector = identifier // 2**19 % 2**8
    seq_num = identifier // 2**27 % 2**15
    day = date.fromordinal(date(2010, 1, 1).toordinal() + identifier // 2**42 % 2**14)
    return identifier // 2**57, day, seq_num, detector, counter


def test_bits_are_where_the_published_layout_has_them() -> None:
    assert dia_source_ids(20261122, 123, 94, 1).tolist() == [27131565485064193]


@pytest.mark.parametrize(
    ("identifier", "parts"),
    [
        (170587115523932323, (1, date(2026, 6, 25), 637, 2, 163)),
        (170635513156862219, (1, date(2026, 7, 6), 779, 121, 267)),
    ],
)
def test_ids_seen_in_public_alerts_are_reproduced(identifier: int, parts: tuple[int, date, int, int, int]) -> None:
    release, day, seq_num, detector, counter = parts
    assert unpacked(identifier) == parts
    ids = dia_source_ids(int(day.strftime("%Y%m%d")), seq_num, detector, counter, release)
    assert ids[-1] == identifier


@given(
    st.dates(date(2010, 1, 1), date(2054, 11, 9)),
    st.integers(0, 32767),
    st.integers(0, 255),
    st.integers(1, 50),
    st.integers(0, 63),
)
def test_parts_can_be_read_back(day: date, seq_num: int, detector: int, n: int, release: int) -> None:
    ids = dia_source_ids(int(day.strftime("%Y%m%d")), seq_num, detector, n, release)
    assert ids.dtype == np.int64
    assert 0 < ids[0] <= LARGEST
    assert unpacked(int(ids[-1])) == (release, day, seq_num, detector, n)
    assert np.all(np.diff(ids) == 1)


def test_largest_values_fit_63_bits() -> None:
    largest = dia_source_ids(20541109, 32767, 255, MAX_COUNTER, 63)
    assert largest[-1] == LARGEST - (1 << 56)  # the re-interpretation bit stays 0
    assert MAX_COUNTER == 2**COUNTER_BITS - 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((20091231, 1, 0, 1), "day"),
        ((20541110, 1, 0, 1), "day"),
        ((20261122, 32768, 0, 1), "seq_num"),
        ((20261122, -1, 0, 1), "seq_num"),
        ((20261122, 1, 256, 1), "detector"),
        ((20261122, 1, 0, 2**19), "n_sources"),
        ((20261122, 1, 0, 1, 64), "release"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(arguments: tuple[int, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        dia_source_ids(*arguments)


def test_a_day_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="day"):
        day_number(20260231)


def test_an_exposure_without_sources_has_no_ids() -> None:
    assert dia_source_ids(20261122, 1, 0, 0).tolist() == []


def test_forced_ids_are_the_same_on_every_run_and_machine() -> None:
    # Written down once: they are in archives, so a change of the recipe must not pass unnoticed.
    assert dia_forced_source_id(27131565485064193, 2026112200123, 94) == 939699468975603965


@given(st.integers(1, LARGEST), st.integers(1, 10**13), st.integers(0, 255))
def test_forced_ids_have_63_bits_and_tell_their_keys_apart(object_id: int, visit: int, detector: int) -> None:
    identifier = dia_forced_source_id(object_id, visit, detector)
    assert 0 <= identifier <= LARGEST
    others = {
        dia_forced_source_id(object_id, visit, detector + 1),
        dia_forced_source_id(object_id, visit + 1, detector),
        dia_forced_source_id(object_id - 1, visit, detector),
    }
    assert identifier not in others
    assert len(others) == 3

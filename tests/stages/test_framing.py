"""What crosses a shuffle comes out as it went in, and what was not packed is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.framing import FramingError, pack, unpack

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_headers = st.dictionaries(st.text(), _json, max_size=4)
_buffers = st.lists(st.binary(max_size=40), max_size=4)


@given(_headers, _buffers)
def test_unpack_gives_back_what_pack_was_given(header: dict[str, Any], buffers: list[bytes]) -> None:
    out_header, out_buffers = unpack(pack(header, tuple(buffers)))
    assert out_header == header
    assert [bytes(buffer) for buffer in out_buffers] == buffers


@given(_headers, _buffers)
def test_the_order_in_which_a_header_was_filled_does_not_show(header: dict[str, Any], buffers: list[bytes]) -> None:
    backwards = dict(reversed(list(header.items())))
    assert pack(header, tuple(buffers)) == pack(backwards, tuple(buffers))


@given(_headers, _buffers, st.data())
def test_a_message_cut_anywhere_or_lengthened_is_refused(
    header: dict[str, Any], buffers: list[bytes], data: st.DataObject
) -> None:
    message = pack(header, tuple(buffers))
    cut = data.draw(st.integers(0, len(message) - 1))
    for wrong in (message[:cut], message + b"\0"):
        with pytest.raises(FramingError):
            unpack(wrong)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_never_raise_anything_but_a_framing_error(message: bytes) -> None:
    with pytest.raises(FramingError, match=f"{len(message)} bytes"):
        unpack(message)


def test_buffers_are_views_of_the_message() -> None:
    message = pack({"kind": "alerts"}, (b"abc", b"", b"de"))
    _, buffers = unpack(message)
    assert all(buffer.obj is message for buffer in buffers)

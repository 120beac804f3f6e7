"""The loop that runs a reading program over the bodies of packets, compiled.

A program is a table of instructions (what, kind, slot, mark, number):

========  ======================================================================================================
VALUE     read a value of a kind; into `slot`, if that is not -1, and set `mark`, if that is not
NULLABLE  the same behind a union with null: `number` is twice the VALUE's number and the branch of null
UNION     go to `targets[number + branch]`; `kind` is the number of branches
JUMP      go to `kind`
MARK      set `slot`
LIST      begin a list (or map); the rows of its items belong to level `slot`, or nobody wants them if that is -1
NEXT      the next item, of at least `number` bytes; behind the last one go to `kind`
STOP      done
========  ======================================================================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

# kinds of values
LONG, INT, TIMESTAMP, FLOAT, DOUBLE, BOOLEAN, STRING, BYTES, FIXED, ENUM, NULL = range(11)
NULLABLE, VALUE, UNION, JUMP, MARK, LIST, NEXT, STOP = range(8)

# what can be wrong with a body
FINE, ENDS, LONG_BITS, BRANCH, LENGTH, COUNT, SIZE = range(7)
TEXT, INT_BITS, TIME, SYMBOL, BEHIND, LOST, LARGE = range(7, 14)
REASONS = {
    ENDS: "it ends there",
    LONG_BITS: "an integer of more than 64 bits",
    BRANCH: "a union has no such branch",
    LENGTH: "a length below 0",
    COUNT: "more items than there are bytes",
    SIZE: "a block of items that has another size than it says",
    TEXT: "a text that is no UTF-8",
    INT_BITS: "an int of more than 32 bits",
    TIME: "a time outside the years 1 to 9999",
    SYMBOL: "an enum has no such symbol",
    BEHIND: "bytes behind the packet",
    LOST: "it lies behind a broken one",
    LARGE: "more than 2 GB",
}

_MAX_BODY_BYTES = 2**31 - 1
_ROOM = 14  # the values take more room
_TIMES = (-62_135_596_800_000_000, 253_402_300_799_999_999)  # us since 1970 of the years 1 to 9999


@intrinsic
def _byte_pointer(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.uint64), codegen


@njit(cache=True)
def _long(data: np.ndarray, position: int, end: int) -> tuple[Any, int, int]:
    """The zigzag varint at `position`, where it ends, and what is wrong."""
    bits = np.uint64(0)
    shift = np.uint64(0)
    while position < end:
        byte = np.uint64(data[position])
        position += 1
        if shift == np.uint64(63) and byte > np.uint64(1):
            return 0, position - 1, LONG_BITS
        bits |= (byte & np.uint64(127)) << shift
        if byte < np.uint64(128):
            return np.int64((bits >> np.uint64(1)) ^ (np.uint64(0) - (bits & np.uint64(1)))), position, FINE
        shift += np.uint64(7)
    return 0, position, ENDS


@njit(cache=True)
def _is_utf8(data: np.ndarray, position: int, end: int) -> bool:
    while position < end:
        lead = data[position]
        position += 1
        if lead < 0x80:
            continue
        low, high = 0x80, 0xBF  # of the second byte: no overlong forms, no surrogates, nothing above 10FFFF
        if 0xC2 <= lead <= 0xDF:
            more = 1
        elif 0xE0 <= lead <= 0xEF:
            more = 2
            if lead == 0xE0:
                low = 0xA0
            elif lead == 0xED:
                high = 0x9F
        elif 0xF0 <= lead <= 0xF4:
            more = 3
            if lead == 0xF0:
                low = 0x90
            elif lead == 0xF4:
                high = 0x8F
        else:
            return False
        if position + more > end or not low <= data[position] <= high:
            return False
        for k in range(position + 1, position + more):
            if data[k] & 0xC0 != 0x80:
                return False
        position += more
    return True


@njit(cache=True)
def _value(
    data: np.ndarray, position: int, end: int, kind: int, number: int, wanted: bool, whole: bool
) -> tuple[np.uint64, int, int]:
    """Bits of a value (of a text: its place and length), where it ends, and what is wrong."""
    bits = np.uint64(0)
    if kind in (FLOAT, DOUBLE):
        size = 4 if kind == FLOAT else 8
        if size > end - position:
            return bits, position, ENDS
        if wanted:
            for k in range(size - 1, -1, -1):
                bits = (bits << np.uint64(8)) | np.uint64(data[position + k])
        return bits, position + size, FINE
    if kind == BOOLEAN:
        if position >= end:
            return bits, position, ENDS
        return np.uint64(data[position] != 0), position + 1, FINE
    if kind == NULL:
        return bits, position, FINE
    start = position
    integer, position, wrong = _long(data, position, end)
    if wrong != FINE:
        return bits, position, wrong
    if kind in (STRING, BYTES):
        if integer < 0:
            return bits, start, LENGTH
        if integer > end - position:
            return bits, start, ENDS
        if kind == STRING and (wanted or whole) and not _is_utf8(data, position, position + integer):
            return bits, start, TEXT
        return (np.uint64(position) << np.uint64(32)) | np.uint64(integer), position + integer, FINE
    if kind == INT and wanted and not -(2**31) <= integer < 2**31:
        return bits, start, INT_BITS
    if kind == TIMESTAMP and (wanted or whole) and not _TIMES[0] <= integer <= _TIMES[1]:
        return bits, start, TIME
    if kind == ENUM and not 0 <= integer < number:
        return bits, start, SYMBOL
    return np.uint64(integer), position, FINE


@njit(cache=True)
def _read_body(
    code: np.ndarray,
    targets: np.ndarray,
    level_slots: np.ndarray,
    remaining: np.ndarray,
    block_end: np.ndarray,
    data: np.ndarray,
    position: int,
    end: int,
    whole: bool,
    chained: bool,
    body: int,
    first: np.ndarray,
    counts: np.ndarray,
    values: np.ndarray,
    valid: np.ndarray,
    used: int,
) -> tuple[int, int, int]:
    """How much of the values is used after a body, where reading stopped, and what is wrong, `_ROOM` for instance."""
    wrong = FINE
    base = body * level_slots[0]
    deepest = -1
    at = 0
    while wrong == FINE:
        what = code[at, 0]
        kind = code[at, 1]
        slot = code[at, 2]
        mark = code[at, 3]
        number = code[at, 4]
        at += 1
        if what in (NULLABLE, VALUE):
            if what == NULLABLE:
                if position < end and data[position] <= 2 and data[position] & 1 == 0:
                    branch = data[position] >> 1
                    position += 1
                else:
                    start = position
                    branch, position, wrong = _long(data, position, end)
                    if wrong == FINE and not 0 <= branch <= 1:
                        position, wrong = start, BRANCH
                    if wrong != FINE:
                        break
                if branch == number & 1:
                    continue
                number >>= 1
            if kind == FIXED:
                if number > end - position:
                    wrong = ENDS
                    break
                position += number
                if mark >= 0:
                    valid[base + mark] = 1
                continue
            bits, position, wrong = _value(data, position, end, kind, number, slot >= 0, whole)
            if wrong != FINE:
                break
            if slot >= 0:
                values[base + slot] = bits
                valid[base + slot] = kind != NULL
            if mark >= 0:
                valid[base + mark] = 1
        elif what == UNION:
            start = position
            branch, position, wrong = _long(data, position, end)
            if wrong == FINE and not 0 <= branch < kind:
                position, wrong = start, BRANCH
            if wrong != FINE:
                break
            at = targets[number + branch]
        elif what == JUMP:
            at = kind
        elif what == MARK:
            valid[base + slot] = 1
        elif what == LIST:
            deepest += 1
            remaining[deepest] = 0
            block_end[deepest] = -1
            if slot > 0:
                first[slot, body] = used
                counts[slot, body] = 0
        elif what == NEXT:
            if remaining[deepest] == 0:
                if block_end[deepest] >= 0 and block_end[deepest] != position:
                    wrong = SIZE
                    break
                block_end[deepest] = -1
                start = position
                count, position, wrong = _long(data, position, end)
                if wrong != FINE:
                    break
                if count == 0:
                    deepest -= 1
                    if slot > 0:
                        base = body * level_slots[0]
                    at = kind
                    continue
                if count < 0:  # the size of its items in bytes comes behind
                    count = -count
                    size, position, wrong = _long(data, position, end)
                    if wrong == FINE and size < 0:
                        position, wrong = start, LENGTH
                    elif wrong == FINE and size > end - position:
                        position, wrong = start, SIZE
                    if wrong != FINE:
                        break
                    block_end[deepest] = position + size
                    if slot < 0 and not whole:
                        position += size
                        at -= 1
                        continue
                if count < 0 or count > (end - position) // number:
                    position, wrong = start, COUNT
                    break
                remaining[deepest] = count
            remaining[deepest] -= 1
            if slot > 0:
                base = used
                used += level_slots[slot]
                counts[slot, body] += 1
                if used > len(values):
                    wrong = _ROOM
        else:
            if whole and not chained and position != end:
                wrong = BEHIND
            break
    return used, position, wrong


@njit(cache=True)
def read_bodies(
    code: np.ndarray,
    targets: np.ndarray,
    level_slots: np.ndarray,
    depth: int,
    addresses: np.ndarray,
    lengths: np.ndarray,
    whole: bool,
    chained: bool,
    first: np.ndarray,
    counts: np.ndarray,
    codes: np.ndarray,
    ends: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Run a program over bodies that lie anywhere in memory.

    Parameters
    ----------
    code, targets, level_slots, depth : as in `reading_programs.Program`
    addresses, lengths : (n,) uint64 and int64, where each body lies
    whole : a body that goes on behind the program is broken, and text and times are checked also where unwanted
    chained : all addresses are one; each body begins where the one before ended
    first, counts : (n_levels, n) int64, filled: where each body's rows of a list begin in the values, and how many
    codes : (n,) uint8, filled: what is wrong with each body
    ends : (n,) int64, filled: where reading stopped

    Returns
    -------
    values : uint64, the bits of the values (of a text its start in the body, 32 bits, and its length), 0 where there is
        none. First the rows of level 0, one a body; then those of lists, in the order in which they were read.
    valid : uint8 of the same shape, 1 where there is a value

    Notes
    -----
    Every read lies before the end of its body. An item of a list has at least a byte for each of its values, so that
    the values take up at most some 20 times the bytes of the bodies.
    """
    width = level_slots[0]
    used = len(lengths) * width
    values = np.zeros(used + 64, dtype=np.uint64)
    valid = np.zeros(used + 64, dtype=np.uint8)
    remaining = np.zeros(depth, dtype=np.int64)
    block_end = np.zeros(depth, dtype=np.int64)
    for body in range(len(lengths)):
        start = ends[body - 1] if chained and body > 0 else 0
        if chained and body > 0 and codes[body - 1] != FINE:
            codes[body] = LOST
            ends[body] = start
            continue
        if lengths[body] > _MAX_BODY_BYTES:
            codes[body] = LARGE
            continue
        data = carray(_byte_pointer(addresses[body]), lengths[body])
        while True:
            reached, position, wrong = _read_body(
                code, targets, level_slots, remaining, block_end, data, start, lengths[body], whole, chained, body,
                first, counts, values, valid, used,
            )  # fmt: skip
            if wrong == FINE:
                break
            for k in range(body * width, (body + 1) * width):
                values[k] = 0
                valid[k] = 0
            values[used : min(reached, len(values))] = 0
            valid[used : min(reached, len(valid))] = 0
            counts[:, body] = 0
            if wrong != _ROOM:
                reached = used
                break
            # Arrays that could change within the loop over instructions would make it four times as slow.
            values = _longer(values)
            valid = _longer(valid)
        used = reached
        codes[body] = wrong
        ends[body] = position
    return values, valid


@njit(cache=True)
def _longer(array: np.ndarray) -> np.ndarray:
    longer = np.zeros(2 * len(array), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


@njit(cache=True)
def gathered_texts(addresses: np.ndarray, places: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The texts at places (start in the body, 32 bits, and length) behind each other."""
    text = np.empty(offsets[-1], dtype=np.uint8)
    for i in range(len(places)):
        length = offsets[i + 1] - offsets[i]
        if length > 0:
            start = np.int64(places[i] >> np.uint64(32))
            data = carray(_byte_pointer(addresses[i]), start + length)
            text[offsets[i] : offsets[i + 1]] = data[start:]
    return text

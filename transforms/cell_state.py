"""What a sky cell remembers between visits, as the bytes that Beam's state holds.

Two states. The *index*, one blob that every visit of the cell rewrites: which detectors of which visits were seen,
and the objects. The *history*, a bag of blocks that every visit appends one to: the sources it associated and the
forced sources it measured. Once there are `COMPACTED_FROM` blocks they become one, without what is out of reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from schemas.framing import pack, unpack
from schemas.records import (
    DIA_FORCED_SOURCE,
    DIA_OBJECT,
    DIA_SOURCE,
    concatenate_records,
    empty_records,
    records_from_bytes,
    records_to_bytes,
    take_records,
)

STATE_VERSION = 2
COMPACTED_FROM = 32
# Beyond the history: so late may a detector of a visit come and still find what preceded it.
LATEST_DAYS = 31.0
SEEN = np.dtype([("visit", "<i8"), ("detector", "<i4"), ("midpointMjdTai", "<f8")])


class CellStateError(ValueError):
    """State that this code cannot read."""


class DamagedStateError(CellStateError):
    """State that no version of this code has written."""


@dataclass(frozen=True)
class CellIndex:
    """Detectors seen, (n,) SEEN in any order, and (m,) DIA_OBJECT sorted by diaObjectId."""

    seen: np.ndarray
    objects: np.ndarray

    @property
    def newest_mjd_tai(self) -> float:
        """Midpoint of the newest visit seen, -inf before the first."""
        return float(self.seen["midpointMjdTai"].max(initial=-np.inf))

    def has_seen(self, visit: int, detector: int) -> bool:
        """Whether a detector of a visit was processed."""
        return bool(np.any((self.seen["visit"] == visit) & (self.seen["detector"] == detector)))

    def with_seen(self, more: np.ndarray) -> CellIndex:
        """The index with more detectors seen; those it has already are not doubled."""
        fresh = [not self.has_seen(int(one["visit"]), int(one["detector"])) for one in more]
        return CellIndex(np.concatenate([self.seen, more[np.array(fresh, dtype=bool)]]), self.objects)

    def reaching(self, days: float) -> CellIndex:
        """The index without detectors more than `days` older than the newest."""
        return CellIndex(self.seen[self.seen["midpointMjdTai"] > self.newest_mjd_tai - days], self.objects)


def seen_of(sources: np.ndarray) -> np.ndarray:
    """The detectors that sources speak of, (n,) SEEN."""
    seen = np.empty(len(sources), SEEN)
    for name in SEEN.names or ():
        seen[name] = sources[name]
    return np.unique(seen)


def read_index(stored: bytes | None) -> CellIndex:
    """The index that `index_bytes` made, of this version or an earlier one; an empty one of nothing.

    Raises
    ------
    CellStateError
        State of a later version.
    DamagedStateError
        Cut short, or not framed as state is.
    """
    if not stored:
        return CellIndex(np.empty(0, SEEN), empty_records(DIA_OBJECT, 0))
    with _damage_told():
        header, buffers = unpack(stored)
        version = int(header["version"])
        if version > STATE_VERSION:
            raise CellStateError(f"sky-cell state of version {version}, this code reads up to {STATE_VERSION}")
        objects = records_from_bytes(DIA_OBJECT, buffers[1])
        if version == STATE_VERSION:
            return CellIndex(np.frombuffer(buffers[0], SEEN), objects)
        # Pairs without times: as old as the newest object, so that they stay long enough.
        pairs = np.frombuffer(buffers[0], dtype="<i8").reshape(-1, 2)
        seen = np.empty(len(pairs), SEEN)
        seen["visit"], seen["detector"] = pairs.T
        seen["midpointMjdTai"] = np.nanmax(objects["lastDiaSourceMjdTai"], initial=-np.inf)
        return CellIndex(seen, objects)


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """Any error of taking state apart as a DamagedStateError."""
    try:
        yield
    except CellStateError:
        raise
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DamagedStateError(f"sky-cell state is damaged: {error}") from error


def index_bytes(index: CellIndex) -> bytes:
    """The index as state holds it; equal indices give equal bytes."""
    seen = np.sort(index.seen, order=("visit", "detector"))
    return pack({"version": STATE_VERSION}, (seen.tobytes(), records_to_bytes(index.objects)))


def history_block(sources: np.ndarray, forced: np.ndarray) -> bytes:
    """One block of history."""
    return pack({}, (records_to_bytes(sources), records_to_bytes(forced)))


def read_history(blocks: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """DIA_SOURCE and DIA_FORCED_SOURCE rows of all blocks; DamagedStateError as `read_index`."""
    with _damage_told():
        frames = [unpack(block)[1] for block in blocks]
        sources = concatenate_records([records_from_bytes(DIA_SOURCE, frame[0]) for frame in frames], DIA_SOURCE)
        forced = concatenate_records(
            [records_from_bytes(DIA_FORCED_SOURCE, frame[1]) for frame in frames], DIA_FORCED_SOURCE
        )
        return sources, forced


def reaching_rows(rows: np.ndarray, newest_mjd_tai: float, days: float) -> np.ndarray:
    """Rows that are at most `days` older than the newest visit."""
    return take_records(rows, rows["midpointMjdTai"] > newest_mjd_tai - days)

"""Identifiers that are functions of the input alone, in the 63-bit layout Rubin publishes.

Layout of a diaSourceId, from the highest bit: release 6 | re-interpretation 1 | days since
2010-01-01 14 | seq_num 15 | detector 8 | counter 19 (reference: the packer of lsst/obs_lsst).
"""

from __future__ import annotations

import hashlib
from datetime import date

import numpy as np

RELEASE_BITS, DAY_BITS, SEQ_BITS, DETECTOR_BITS, COUNTER_BITS = 6, 14, 15, 8, 19
FIRST_DAY = date(2010, 1, 1).toordinal()
MAX_COUNTER = (1 << COUNTER_BITS) - 1


def dia_source_ids(day_obs: int, seq_num: int, detector: int, n_sources: int, release: int = 0) -> np.ndarray:
    """The ids of the `n_sources` sources of one exposure, counters from 1 in rank order.

    Returns
    -------
    (n_sources,) int64

    Raises
    ------
    ValueError
        A part that does not fit its bits, or more than 524,287 sources.
    """
    day = day_number(day_obs)
    parts = (
        ("release", release, RELEASE_BITS),
        ("day", day, DAY_BITS),
        ("seq_num", seq_num, SEQ_BITS),
        ("detector", detector, DETECTOR_BITS),
        ("n_sources", n_sources, COUNTER_BITS),
    )
    for name, value, bits in parts:
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} {value} does not fit {bits} bits")
    packed = (((day << SEQ_BITS) | seq_num) << DETECTOR_BITS) | detector
    exposure = (release << (1 + DAY_BITS + SEQ_BITS + DETECTOR_BITS)) | packed
    return (np.int64(exposure) << np.int64(COUNTER_BITS)) + np.arange(1, n_sources + 1, dtype=np.int64)


def dia_forced_source_id(dia_object_id: int, visit: int, detector: int) -> int:
    """A 63-bit id of one forced measurement, the same whichever sky cell or worker makes it.

    A counter would need all objects of the exposure in one place; a hash of the natural key does not.
    Two of 10^7 ids of one night are equal with a chance of 5e-6.
    """
    key = f"{dia_object_id}/{visit}/{detector}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") & (2**63 - 1)


def day_number(day_obs: int) -> int:
    """Days from 2010-01-01 to `day_obs` (YYYYMMDD)."""
    return date(day_obs // 10000, day_obs // 100 % 100, day_obs % 100).toordinal() - FIRST_DAY

"""Disjoint sets in an array of parents, for compiled loops that join what hangs together."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def root(parent: np.ndarray, member: int) -> int:
    """The member that stands for the set of `member`; `parent`, (n,) integers, is shortened on the way."""
    while parent[member] != member:
        parent[member] = parent[parent[member]]
        member = parent[member]
    return member

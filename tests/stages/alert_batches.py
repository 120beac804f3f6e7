"""Random batches of alerts, as association hands them to packaging."""

from __future__ import annotations

import numpy as np
from sample_alerts import random_batch

from schemas.elements import AlertBatch
from schemas.records import DIA_FORCED_SOURCE, DIA_OBJECT, DIA_SOURCE

VISIT, DETECTOR = 2026112200001, 4


def alert_batch(n: int, seed: int) -> AlertBatch:
    """Random alerts of one detector and sky cell, ids from 5000 on, with histories; and some rows of the tables."""
    columns = random_batch(n, np.random.default_rng(seed))
    sources = columns.dia_sources
    sources["diaSourceId"], sources["visit"], sources["detector"] = 5000 + np.arange(n), VISIT, DETECTOR
    sources["diaObjectId"] = np.where(columns.has_object, 100 + np.arange(n), 0)
    sources["ssObjectId"] = np.where(columns.has_ss, 900 + np.arange(n), 0)
    columns.ss_sources["ssObjectId"] = sources["ssObjectId"]
    return AlertBatch(
        context={
            "visit": VISIT,
            "cell": 7,
            "detectors": [DETECTOR],
            "observation_reason": columns.observation_reason,
            "target_name": columns.target_name,
        },
        dia_sources=sources,
        prv_dia_sources=columns.prv_dia_sources,
        prv_offsets=columns.prv_offsets,
        prv_forced_sources=columns.prv_forced,
        forced_offsets=columns.forced_offsets,
        dia_objects=columns.dia_objects,
        ss_sources=columns.ss_sources,
        object_states=columns.dia_objects.astype(DIA_OBJECT),
        unassociated=np.zeros(2, DIA_SOURCE),
        forced_sources=np.zeros(3, DIA_FORCED_SOURCE),
        counts={"association_us": 5, "objects_new": n},
    )

"""How late alerts were, by stage: of a visit for the ledger, and of a night from the ledger.

An alert's time from the last announcement of its visit to its acknowledgement, cut at five moments:

    last announcement - waiting - first detector begun - pixels - last detector done - closing -
    its sky cell begun - association - its batch associated - delivery - acknowledged

Where a detector was begun before the last one was announced, `pixels` counts from the announcement on. The stages add
up to `total`; `overhead` is all of it but `pixels`. docs/outputs.md says what is in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

STAGES = ("waiting", "pixels", "closing", "association", "delivery")
FIGURES = (*STAGES, "total", "overhead")
# An upper bound for the alerts of a visit of which only these are known, in percent of them.
_SHARES = {"p50": 50, "p99": 49, "max": 1}


def visit_latency(detectors: Sequence[dict[str, Any]], batches: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Seconds by stage over the alerts of a visit; None if nobody knows when it was announced.

    Parameters
    ----------
    detectors : headers of their accounts (`transforms.cutouts.detector_account`), with `revision`
    batches : headers of the parts with alerts (`transforms.packaging.alerts_part`), with `revision` and how many
        `alerts` each holds

    Batches of a revision are counted from the detectors that came with it, or with the last one before that had any.
    Parts that earlier versions have made lack some of the times, and are left out.
    """
    announced = [one for one in detectors if one.get("announced_at") is not None]
    spans, weights = [], []
    for batch in batches:
        known = [one for one in announced if one["revision"] <= batch["revision"]]
        times = batch.get("times", {})
        if not known or not batch["alerts"] or times.get("acknowledged_at") is None:
            continue
        newest = max(one["revision"] for one in known)
        own = [one for one in known if one["revision"] == newest]
        last_announced = max(one["announced_at"] for one in own)
        moments = (
            last_announced,
            max(last_announced, min(one["started_at"] for one in own)),
            max(one["ended_at"] for one in own),
            times["fired_at"],
            times["associated_at"],
            times["acknowledged_at"],
        )
        stages = np.diff(moments)
        total = moments[-1] - moments[0]
        spans.append([*stages, total, total - stages[STAGES.index("pixels")]])
        weights.append(batch["alerts"])
    if not spans:
        return None
    columns = np.array(spans).T
    return {
        "alerts": int(sum(weights)),
        **{name: _figures(column, np.array(weights)) for name, column in zip(FIGURES, columns, strict=True)},
    }


def night_latency(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The same over the alerts of all visits, from ledger records; None if none of them tells.

    Of the alerts of a visit only some percentiles are in the ledger, so p50 and p99 of the night are upper bounds: no
    alert is taken for faster than it was.
    """
    known = [record["latency"] for record in records if _is_whole(record.get("latency"))]
    if not known:
        return None
    alerts = np.array([one["alerts"] for one in known])
    told: dict[str, Any] = {"alerts": int(alerts.sum())}
    for name in FIGURES:
        values = np.array([[one[name][share] for share in _SHARES] for one in known]).ravel()
        weights = np.outer(alerts, list(_SHARES.values())).ravel()
        mean = np.average([one[name]["mean"] for one in known], weights=alerts)
        told[name] = {**_figures(values, weights), "mean": _rounded(mean)}
    return told


def _is_whole(latency: Any) -> bool:
    """Whether this is a block as `visit_latency` makes it; those of other versions may have other stages."""
    return isinstance(latency, dict) and {"alerts", *FIGURES} <= latency.keys()


def _figures(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])

    def percentile(percent: int) -> float:
        # The least value that so many do not exceed; whole numbers, so nothing is lost by rounding.
        return float(values[order][np.searchsorted(100 * reached, percent * reached[-1])])

    return {
        "mean": _rounded(np.average(values, weights=weights)),
        "p50": _rounded(percentile(50)),
        "p99": _rounded(percentile(99)),
        "max": _rounded(values.max()),
    }


def _rounded(seconds: float) -> float:
    return round(float(seconds), 4)

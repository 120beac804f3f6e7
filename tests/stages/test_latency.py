"""The times of alerts by stage, of a visit and of a night."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transforms.latency import FIGURES, STAGES, night_latency, visit_latency

SHARES = {"mean", "p50", "p99", "max"}


def _detector(announced: float | None, started: float, ended: float, revision: int = 0) -> dict[str, Any]:
    return {"announced_at": announced, "started_at": started, "ended_at": ended, "revision": revision}


def _batch(alerts: int, fired: float, associated: float, acknowledged: float, revision: int = 0) -> dict[str, Any]:
    times = {"fired_at": fired, "associated_at": associated, "acknowledged_at": acknowledged}
    return {"alerts": alerts, "revision": revision, "times": times}


def _medians(latency: dict[str, Any] | None) -> dict[str, float]:
    assert latency is not None
    return {name: latency[name]["p50"] for name in FIGURES}


def test_the_way_of_a_batch_is_cut_at_five_moments() -> None:
    detectors = [_detector(100.0, 100.5, 103.0), _detector(100.25, 101.0, 104.0)]
    told = visit_latency(detectors, [_batch(7, 106.0, 106.25, 106.75)])
    assert told is not None
    assert {share for name in FIGURES for share in told[name]} == SHARES
    assert told["alerts"] == 7
    assert _medians(told) == {
        "waiting": 0.25, "pixels": 3.5, "closing": 2.0, "association": 0.25, "delivery": 0.5,
        "total": 6.5, "overhead": 3.0,
    }  # fmt: skip
    # One batch: all its alerts were equally late.
    assert all(set(told[name].values()) == {told[name]["p50"]} for name in FIGURES)


def test_work_before_the_last_announcement_is_nobodys_waiting() -> None:
    detectors = [_detector(100.0, 100.5, 103.0), _detector(102.0, 102.5, 104.0)]
    told = _medians(visit_latency(detectors, [_batch(1, 105.0, 105.0, 105.0)]))
    assert (told["waiting"], told["pixels"], told["total"], told["overhead"]) == (0.0, 2.0, 3.0, 1.0)


def test_batches_weigh_as_many_alerts_as_they_have() -> None:
    batches = [_batch(99, 2.0, 2.0, 3.0), _batch(1, 2.0, 2.0, 53.0), _batch(0, 2.0, 2.0, 1e9)]
    told = visit_latency([_detector(0.0, 0.0, 2.0)], batches)
    assert told is not None
    assert told["delivery"] == {"mean": 1.5, "p50": 1.0, "p99": 1.0, "max": 51.0}
    assert told["alerts"] == 100


def test_a_late_detector_is_counted_from_its_own_announcement() -> None:
    detectors = [_detector(0.0, 1.0, 2.0), _detector(500.0, 501.0, 502.0, revision=1)]
    batches = [_batch(1, 3.0, 3.0, 4.0), _batch(1, 503.0, 503.0, 505.0, revision=1), _batch(1, 600.0, 600.0, 604.0, 2)]
    told = visit_latency(detectors, batches)
    assert told is not None
    # Of revision 2 no detector is known: its batch came of those of revision 1.
    assert told["total"] == {"mean": pytest.approx((4 + 5 + 104) / 3, abs=1e-4), "p50": 5.0, "p99": 104.0, "max": 104.0}


def test_nothing_is_told_where_times_are_missing() -> None:
    detector, batch = _detector(1.0, 2.0, 3.0), _batch(5, 4.0, 5.0, 6.0)
    of_earlier_versions = {"alerts": 5, "revision": 0}
    assert visit_latency([_detector(None, 2.0, 3.0)], [batch]) is None
    assert visit_latency([{"started_at": 2.0, "revision": 0}], [batch]) is None
    assert visit_latency([detector], [of_earlier_versions]) is None
    assert visit_latency([detector], []) is None
    told = visit_latency([detector], [of_earlier_versions, batch])
    assert told is not None and told["alerts"] == 5
    assert night_latency([{}, {"latency": None}, {"latency": {"alerts": 3, "total": {"p50": 1.0}}}]) is None


def _random_visit(rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    detectors = []
    for announced in rng.uniform(0, 2, 4):
        started = announced + rng.exponential(0.3)
        detectors.append(_detector(announced, started, started + rng.exponential(2)))
    done = max(one["ended_at"] for one in detectors)
    batches = [_batch(int(rng.integers(0, 30)), *(done + np.cumsum(rng.exponential(0.5, 3)))) for _ in range(8)]
    return detectors, [*batches, _batch(1, done, done, done)]


def test_stages_add_up_and_a_nights_figures_are_bounds_of_its_alerts() -> None:
    rng = np.random.default_rng(3)
    records, totals = [], []
    for _ in range(40):
        detectors, batches = _random_visit(rng)
        told = visit_latency(detectors, batches)
        assert told is not None
        # Each is rounded to 0.1 ms: five roundings of at most half of that, and that of the sum.
        assert sum(told[stage]["mean"] for stage in STAGES) == pytest.approx(told["total"]["mean"], abs=3e-4)
        assert told["overhead"]["mean"] + told["pixels"]["mean"] == pytest.approx(told["total"]["mean"], abs=1.5e-4)
        announced = max(one["announced_at"] for one in detectors)
        for batch in batches:
            totals += [batch["times"]["acknowledged_at"] - announced] * batch["alerts"]
        records.append({"latency": told})
    night = night_latency(records)
    assert night is not None and night["alerts"] == len(totals)
    p50, p99 = np.percentile(totals, [50, 99], method="inverted_cdf")
    assert night["total"]["mean"] == pytest.approx(np.mean(totals), abs=1e-4)
    assert night["total"]["max"] == pytest.approx(max(totals), abs=1e-4)
    assert p50 - 1e-4 <= night["total"]["p50"] <= max(record["latency"]["total"]["p50"] for record in records)
    assert p99 - 1e-4 <= night["total"]["p99"] <= night["total"]["max"]

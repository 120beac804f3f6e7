"""A detector that kills its worker, on a Flink cluster: the job gets over it by itself. `make cluster-test`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, write_night
from own_cluster import own_cluster
from test_cluster import produce_on_cluster
from test_flink import digests, produce
from test_quarantine_runs import ODD_STAGES, without_the_detector

import transforms.detection
from runners.cluster.flink import flink_down, flink_up
from runners.cluster.settings import ClusterSettings
from runners.local import local_engine

pytestmark = pytest.mark.cluster


@pytest.fixture
def flink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterSettings]:
    """A cluster of one slot, whose workers find modules in `tmp_path`."""
    settings = own_cluster(tmp_path / "cluster", task_managers=1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.syspath_prepend(tmp_path)
    assert flink_up(settings)
    yield settings
    flink_down(settings)


def test_a_detector_that_segfaults_becomes_a_failure_and_the_job_goes_on(
    flink: ClusterSettings,
    two_nights: Path,
    visits: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    night = write_night(tmp_path / "night", two_nights, visits[:2])
    expected = tmp_path / "expected"
    produce(without_the_detector(night, visits, tmp_path), expected, local_engine(()))
    visit, detector = visits[0]["visit"], visits[0]["detectors"][1]["detector"]
    work = "os.kill(os.getpid(), signal.SIGSEGV)"
    (tmp_path / "odd_stages.py").write_text(ODD_STAGES.format(visit=visit, detector=detector, work=work))
    monkeypatch.setattr(transforms.detection, "_DetectFn", importlib.import_module("odd_stages").DetectFn)
    out = tmp_path / "out"
    produce_on_cluster(night, out, flink)
    (failure,) = Run(out, 0, "", "").failures()
    assert (failure["visit"], failure["detector"]) == (visit, detector)
    assert (failure["stage"], failure["error"]) == ("detection", "WorkerKilled")
    for folder in ("archive", "filters"):
        assert digests(out, folder) == digests(expected, folder)
        assert len(digests(out, folder)) >= 2
    assert not (out / ".attempts").exists()

"""The books: what the ledger must account for before a run counts as done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runners.local import BeamOptionsError, beam_options
from runners.output_folder import check_books
from schemas.manifests import DetectorImages, Manifest, Visit

VISIT = 2026112200001


def _manifest() -> Manifest:
    images = (DetectorImages(0, "", None),)
    return Manifest((Visit(VISIT, 20261122, 1, "S", "r", 61367.1, 30.0, 61367.1, 0.0, 0.0, 0.0, None, None, images),))


def _ledger(tmp_path: Path, **changes: Any) -> Path:
    record = {
        "visit": VISIT,
        "dia_sources": {"selected": 10},
        "alerts": 8,
        "sources_without_object": 2,
        "failures": 0,
        **changes,
    }
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "visits.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def test_balanced_books_pass(tmp_path: Path) -> None:
    check_books(_ledger(tmp_path), _manifest())


def test_lost_source_stops_the_run_from_counting_as_done(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="10 sources were selected, but 7 became alerts and 2 stayed"):
        check_books(_ledger(tmp_path, alerts=7), _manifest())


def test_loss_that_a_failure_record_explains_is_no_imbalance(tmp_path: Path) -> None:
    check_books(_ledger(tmp_path, alerts=7, failures=1), _manifest())


def test_visit_without_a_record_stops_the_run_from_counting_as_done(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"no record of 1 visits, the first is {VISIT}"):
        check_books(_ledger(tmp_path, visit=7), _manifest())


def test_direct_runner_mode_that_loses_elements_is_refused() -> None:
    with pytest.raises(BeamOptionsError, match="multi_threading loses elements"):
        beam_options(("--direct_running_mode=multi_threading", "--direct_num_workers=2"))

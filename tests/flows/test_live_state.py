"""What savepoints hang on has not changed unawares; and each kind of change is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any

import apache_beam as beam
import live_state
import numpy as np
import pytest
from apache_beam.coders import VarIntCoder
from live_state import GOLDEN, NOT_RESUMED, RESUMED, fingerprint, live_graph, verdict

import pipelines.alert_production
from runners import flink_operations
from schemas.elements import StageElement
from transforms import association, cell_state, filtering, ingestion
from transforms.subtraction import SubtractTemplates
from transforms.visit_stream import StreamPosition

Change = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def pinned() -> str:
    return GOLDEN.read_text("utf-8")


def test_savepoints_of_the_last_release_are_resumed(pinned: str) -> None:
    told = verdict(pinned, fingerprint())
    assert not told, told


def test_transforms_are_known_by_their_labels() -> None:
    for number, transform in live_graph().components.transforms.items():
        assert number == transform.unique_name


class WithAnotherStage(SubtractTemplates):
    """As before, but behind one stage more."""

    def expand(self, detectors: beam.PCollection) -> Any:
        return super().expand(detectors | "Look" >> beam.Map(lambda one: one).with_output_types(StageElement))


def a_stage(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipelines.alert_production, "SubtractTemplates", WithAnotherStage)


def a_class_of_a_stage(patch: pytest.MonkeyPatch) -> None:
    # A class of another name at the place of the old one would be pickled as a whole, and change the old one with it.
    patch.setattr(association._AssociateInCellsFn, "default_label", lambda fn: "_AssociateFn")


def a_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(association._AssociateInCellsFn.PENDING, "name", "waiting")


def a_coder(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(filtering._GatherPartsFn.FRESH, "coder", VarIntCoder())


def a_timer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(filtering._GatherPartsFn.DUE, "name", "visit_ready")


def a_field_with_a_default(patch: pytest.MonkeyPatch) -> None:
    with_more = make_dataclass("StreamPosition", [("looked", int, 0)], bases=(StreamPosition,), frozen=True)
    patch.setattr(live_state, "StreamPosition", with_more)


def a_field_without(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(live_state, "StreamPosition", make_dataclass("StreamPosition", [("offset", int)], frozen=True))


def a_header(patch: pytest.MonkeyPatch) -> None:
    context = ingestion.visit_context
    patch.setattr(ingestion, "visit_context", lambda visit: {**context(visit), "airmass": 1.0})


def a_layout(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cell_state, "SEEN", np.dtype([("visit", "<i8"), ("midpointMjdTai", "<f8"), ("detector", "<i4")]))


def the_key_groups(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flink_operations, "_KEY_GROUPS", 256)


@pytest.mark.parametrize("change", [a_stage, a_field_with_a_default])
def test_what_is_added_and_disturbs_nobody_is_told_as_such(
    change: Change, pinned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    told = verdict(pinned, fingerprint())
    assert RESUMED in told
    assert len([line for line in told.splitlines() if line.startswith("+") and not line.startswith("+++")]) == 1


@pytest.mark.parametrize(
    "change",
    [a_class_of_a_stage, a_state, a_coder, a_timer, a_field_without, a_header, a_layout, the_key_groups],
)
def test_what_ends_the_lives_of_savepoints_is_told(
    change: Change, pinned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    assert NOT_RESUMED in verdict(pinned, fingerprint())

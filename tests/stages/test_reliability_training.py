"""Labels of training pairs: what is called real, bogus and ambiguous, and that pairs and folders repeat to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from pipelines.reliability_training import training_pairs
from transforms.failures import FAILED
from transforms.numerics.pair_simulation import TRUTH_DTYPE
from transforms.numerics.reliability_features import FEATURES
from transforms.reliability_fitting import is_stored, store_labelled, stored_path
from transforms.reliability_training import (
    AMBIGUOUS,
    CLASSES,
    LABELLED_DTYPE,
    LabelledSources,
    LabelPairs,
    TrainingPair,
    label,
    label_pair,
)

FWHM_PIX = 5.0
SMALL = TrainingPair("lsst", 8, "as_is", 512, varied=True, part="train")


def truth(kind: str, *, flux: float = 100.0, dx: float = 0.0, in_host: bool = False) -> np.ndarray:
    rows = np.zeros(1, dtype=TRUTH_DTYPE)
    rows["kind"], rows["x"], rows["y"], rows["dx"], rows["flux"], rows["snr"] = kind, 50.0, 50.0, dx, flux, 20.0
    rows["good_pixels"], rows["in_host"] = True, in_host
    return rows


def one_label(truth: np.ndarray, *, off: float = 0.0, snr: float = 20.0, sign: float = 1.0) -> str:
    rows = label(np.array([50.0 + off]), np.array([50.0]), np.array([snr]), np.array([sign]), truth, FWHM_PIX)
    index = int(rows["class_index"][0])
    return "ambiguous" if index == AMBIGUOUS else CLASSES[index]


@pytest.mark.parametrize(
    ("rows", "sign", "expected"),
    [
        (truth("transient"), 1.0, "transient"),
        (truth("transient", in_host=True), 1.0, "in_host"),
        (truth("mover"), 1.0, "mover"),
        (truth("variable"), 1.0, "variable"),
        (truth("variable", flux=-100.0), -1.0, "variable"),
        (truth("vanished", flux=-100.0, in_host=True), -1.0, "negative"),
        (truth("vanished", flux=100.0), 1.0, "transient"),  # with the roles exchanged
        (truth("trail", flux=-100.0), -1.0, "negative"),
        (truth("proper_motion"), 1.0, "ambiguous"),
    ],
)
def test_each_kind_of_change_has_its_class(rows: np.ndarray, sign: float, expected: str) -> None:
    assert one_label(rows, sign=sign) == expected


def test_what_is_near_a_change_and_not_explained_by_it_is_ambiguous() -> None:
    assert one_label(truth("transient"), off=0.79 * FWHM_PIX) == "transient"
    assert one_label(truth("transient"), off=0.81 * FWHM_PIX) == "ambiguous"
    assert one_label(truth("transient"), off=2.99 * FWHM_PIX) == "ambiguous"
    assert one_label(truth("transient"), off=3.01 * FWHM_PIX) == "bogus"
    assert one_label(truth("transient"), sign=-1.0) == "ambiguous"
    assert one_label(truth("transient"), snr=41.0) == "ambiguous"
    assert one_label(truth("transient"), snr=5.9) == "ambiguous"


def test_all_pieces_of_a_trail_are_real_and_one_source_of_a_point() -> None:
    x, y = np.array([38.0, 50.0, 62.0, 70.0]), np.full(4, 50.0)
    found = label(x, y, np.full(4, 15.0), np.ones(4), truth("trail", dx=30.0), FWHM_PIX)
    assert found["class_index"].tolist() == [CLASSES.index("trail")] * 3 + [AMBIGUOUS]
    near = np.array([51.0, 50.5])
    found = label(near, y[:2], np.full(2, 15.0), np.ones(2), truth("transient"), FWHM_PIX)
    assert found["class_index"].tolist() == [AMBIGUOUS, CLASSES.index("transient")]


def test_a_pair_repeats_to_the_byte_and_finds_what_was_injected() -> None:
    first, again = label_pair(SMALL), label_pair(SMALL)
    assert first.rows.tobytes() == again.rows.tobytes() and first.features.tobytes() == again.features.tobytes()
    assert first.features.shape == (first.rows.size, len(FEATURES))
    # A quarter of the density of 155 in 1024 x 1024, some too faint and some too near each other.
    real = first.rows["class_index"] > 0
    assert np.count_nonzero(real) > 15
    assert {"transient", "variable", "negative"} <= {CLASSES[index] for index in first.rows["class_index"][real]}
    assert np.isnan(first.rows["true_snr"][~real]).all() and (first.rows["true_snr"][real] > 0).all()


def test_exchanged_roles_exchange_signs() -> None:
    swapped = label_pair(replace(SMALL, kind="swapped"))
    classes = swapped.rows["class_index"]
    # What appeared is gone: transients, movers and trails are negative, and only vanished ones appear.
    assert np.count_nonzero(classes == CLASSES.index("negative")) > np.count_nonzero(
        classes == CLASSES.index("transient")
    )
    assert not np.isin(classes, [CLASSES.index(name) for name in ("mover", "trail")]).any()


def test_a_pair_that_cannot_be_simulated_is_listed_and_stops_nothing() -> None:
    with beam.Pipeline(runner=FnApiRunner()) as flow:
        labelled = flow | beam.Create([replace(SMALL, size_pix=100)]) | LabelPairs()
        lost = labelled[FAILED] | beam.Map(lambda record: (record.error, record.lost))
        assert_that(labelled.good, equal_to([]), label="Good")
        assert_that(lost, equal_to([("SimulationError", "pair lsst_8_as_is_100_varied")]), label="Failed")


def test_a_stored_pair_is_known_until_features_change(tmp_path: Path) -> None:
    assert not is_stored(tmp_path, SMALL)
    rows = label(np.zeros(1), np.zeros(1), np.ones(1), np.ones(1), truth("mover"), FWHM_PIX)
    store_labelled(tmp_path, SMALL, LabelledSources(rows, np.zeros((1, len(FEATURES)), dtype=np.float32)))
    assert is_stored(tmp_path, SMALL) and not is_stored(tmp_path, replace(SMALL, seed=9))
    assert [path.name for path in stored_path(tmp_path, SMALL).parent.iterdir()] == [f"{SMALL.name}.npz"]
    with stored_path(tmp_path, SMALL).open("wb") as file:
        np.savez(file, rows=rows, features=np.zeros((1, 1)), names=np.array(["snr"]))
    assert not is_stored(tmp_path, SMALL)


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_stored_pair_that_was_cut_off_is_made_anew(tmp_path: Path, part: float) -> None:
    store_labelled(tmp_path, SMALL, LabelledSources(np.zeros(1, LABELLED_DTYPE), np.zeros((1, len(FEATURES)), "f4")))
    path = stored_path(tmp_path, SMALL)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert not is_stored(tmp_path, SMALL)


def test_no_seed_is_in_two_parts() -> None:
    pairs = training_pairs(["lsst", "crowded"], 100, 10)
    parts = {seed: {pair.part for pair in pairs if pair.seed == seed} for seed in range(100, 110)}
    assert all(len(of_seed) == 1 for of_seed in parts.values())
    assert {pair.part for pair in pairs if not pair.varied} == {"test"}
    assert len({pair.name for pair in pairs}) == len(pairs) == 10 * 2 * 3 + 2 * 2 * 3

"""The model card: what the reliability was trained on, and how good it is on what it never saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from transforms.numerics.reliability_fitting import WORSE_WITH_MORE
from transforms.reliability_model import ReliabilityModel
from transforms.reliability_training import CLASSES, TRAINING_REGIMES

LEAST_SNR = 6.0
_SNR_BINS = ((5.0, 6.0), (6.0, 8.0), (8.0, 12.0), (12.0, 25.0), (25.0, np.inf))
_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
_REAL = CLASSES[1:]

_HEAD = """# Reliability {version}

Written by `nightstream train-reliability`. How it is made: `pipelines/reliability_training.py`; what the model sees:
`transforms/numerics/reliability_features.py`.

The score is the part that is real among sources that look like this one, were there as many bogus as real ones, and as
many of each class of real ones. **Published threshold: {threshold:g}.** The file has {trees} trees, {nodes} nodes.
With more of these the score never rises: {worse}.

## Data
{source} (`transforms/numerics/pair_simulation.py`), injected into raw counts,
then subtracted and searched by the chain itself. {regimes} regimes; pairs as they are, with roles exchanged, and of
the same night. Split by seed, which is field and night: trees are fitted on one part, the score is calibrated on a
second, all below is measured on a third.
*Plain* pairs have the densities of their regime; *varied* ones have more of the rare classes and more that goes wrong:
`TrainingPair` says what. The model is fitted on varied pairs only. A source is real if a change of its sign lies within
0.8 FWHM and explains its S/N; what is near a change and is not explained by it is left out (ambiguous).
"""

_NIGHTS = """*Nights* are real: {nights}. Whole nights of an instrument are in one part each. Real is what was injected
into the pixels of science image and template; bogus what was found without that and does not repeat at its place in
another visit (`transforms/reliability_nights.py`). In the table: night folder, part: its nights.
"""

_LIMITS = """
## Known limits
- One simulator made all of it: no diffraction spikes, ghosts, halos, differential refraction, satellite trails or
  correlated noise in templates, so what it says of those is not tested here.{of_nights}
- Purity depends on how many real sources there are. The share of bogus that passes does not: multiply it with the
  bogus of your own images.
- Completeness is that of the score among sources that were detected, not that of the detection.
- Sources of S/N above 300 and a FWHM outside of 1.7 to 9.3 pixels were not trained on.
- Stars that moved are ambiguous, as are wrong-signed neighbours of a change.
"""

_NO_NIGHTS = " Real nights are not part of the training."
_OF_NIGHTS = """
- At night, stars that subtract badly in every visit are ambiguous; what is real and seen once counts as bogus; a
  field that was seen in several nights is in several parts; injected sources have the PSF that the chain itself
  measures."""


class Part(NamedTuple):
    """Some of the data: how many pairs, their LABELLED_DTYPE rows with a class, and how many have none."""

    name: str
    n_pairs: int
    rows: np.ndarray
    n_ambiguous: int


class Judged(NamedTuple):
    """Sources of a test set, LABELLED_DTYPE rows, and their scores."""

    name: str
    rows: np.ndarray
    scores: np.ndarray


def card(
    model: ReliabilityModel,
    counts: Sequence[Part],
    judged: Sequence[Judged],
    held_out: Sequence[Judged],
    at_night: Sequence[Judged] = (),
    without_nights: Sequence[Judged] = (),
) -> str:
    """The model card as Markdown.

    Parameters
    ----------
    model : as it is shipped
    counts : the parts of the data
    judged : its test sets of simulated pairs
    held_out : the same, each judged by a model of other regimes
    at_night, without_nights : test sets of real nights, judged by the model, and by one trained on simulated pairs only
    """
    nights = sorted({one.name.split(",")[0] for one in at_night} | _nights_of(counts))
    lines = [
        _HEAD.format(
            version=model.version,
            regimes=len(TRAINING_REGIMES),
            threshold=model.threshold,
            trees=len(model.trees.roots),
            nodes=len(model.trees.feature),
            worse=", ".join(f"`{name}`" for name in WORSE_WITH_MORE),
            source="Simulated pairs and real nights. Simulated ones" if nights else "Simulated pairs",
        )
    ]
    if nights:
        lines += [_NIGHTS.format(nights=", ".join(nights))]
    lines += _table(
        ("part", "pairs", *CLASSES, "ambiguous"),
        (
            (
                part.name,
                part.n_pairs,
                *(int(np.count_nonzero(part.rows["class_index"] == one)) for one in range(len(CLASSES))),
                part.n_ambiguous,
            )
            for part in counts
        ),
    )
    lines += ["", f"## Regimes and seeds never seen in training, S/N >= {LEAST_SNR:g}"]
    lines += ["Each regime is judged by a model fitted on the others; errors are binomial.", ""]
    lines += _judged_table(held_out, model.threshold)
    lines += ["", f"## The shipped model, seeds never seen in training, S/N >= {LEAST_SNR:g}", ""]
    lines += _judged_table(judged, model.threshold)
    for title, sets in (("the shipped model", at_night), ("a model of simulated pairs only", without_nights)):
        if sets:
            lines += ["", f"## Real nights never seen in training, {title}, S/N >= {LEAST_SNR:g}", ""]
            lines += _judged_table(sets, model.threshold)
            lines += ["", f"By S/N, {title}:", ""]
            rows, scores = (np.concatenate([one[column] for one in sets]) for column in (1, 2))
            lines += _table(("S/N", *_REAL, "bogus that pass"), _by_snr(rows, scores, model.threshold))
    rows = np.concatenate([one.rows for one in judged])
    scores = np.concatenate([one.scores for one in judged])
    lines += ["", "## By S/N, the shipped model, all test pairs", ""]
    lines += _table(("S/N", *_REAL, "bogus that pass"), _by_snr(rows, scores, model.threshold))
    lines += ["", f"## By threshold, the shipped model, all test pairs, S/N >= {LEAST_SNR:g}", ""]
    bright = rows["snr"] >= LEAST_SNR
    lines += _table(
        ("from", *_REAL, "bogus that pass"),
        ((f"{limit:g}", *_parts(rows[bright], scores[bright], limit)) for limit in _THRESHOLDS),
    )
    return "\n".join(lines) + "\n" + _LIMITS.format(of_nights=_OF_NIGHTS if nights else _NO_NIGHTS)


def _nights_of(counts: Sequence[Part]) -> set[str]:
    return {part.name.split(",")[0] for part in counts if "," in part.name}


def _judged_table(sets: Sequence[Judged], threshold: float) -> list[str]:
    def line(name: str, rows: np.ndarray, scores: np.ndarray) -> tuple[str, ...]:
        bright = rows["snr"] >= LEAST_SNR
        rows, passed = rows[bright], scores[bright] >= threshold
        real = rows["class_index"] > 0
        parts = _parts(rows, scores[bright], threshold)
        purity_raw, purity = _part(real, np.ones(real.size, bool)), _part(real, passed)
        return (name, _part(passed, real), *parts[:-1], purity_raw, purity, parts[-1])

    names = ("pairs", "all real", *_REAL, "purity before", "purity", "bogus that pass")
    lines = [line(one.name, one.rows, one.scores) for one in sets]
    for kind in ("plain", "varied"):
        of_kind = [one for one in sets if one.name.startswith(kind)]
        if of_kind:
            rows, scores = (np.concatenate([one[column] for one in of_kind]) for column in (1, 2))
            lines.append(line(f"**{kind}, all**", rows, scores))
    return _table(names, lines)


def _by_snr(rows: np.ndarray, scores: np.ndarray, threshold: float) -> Iterator[tuple[str, ...]]:
    for least, most in _SNR_BINS:
        inside = (rows["snr"] >= least) & (rows["snr"] < most)
        yield (f"{least:g} - {most:g}", *_parts(rows[inside], scores[inside], threshold))


def _parts(rows: np.ndarray, scores: np.ndarray, threshold: float) -> tuple[str, ...]:
    """Completeness of each class of real sources, and the part of bogus that passes."""
    passed = scores >= threshold
    order = (*range(1, len(CLASSES)), 0)
    return tuple(_part(passed, rows["class_index"] == one) for one in order)


def _part(of_them: np.ndarray, among: np.ndarray) -> str:
    """Per cent with its binomial error, and of how many; the error of none or all is that of one more that differs."""
    n, k = int(np.count_nonzero(among)), int(np.count_nonzero(of_them & among))
    if n == 0:
        return "-"
    p = min(max(k / n, 1.0 / (n + 1.0)), n / (n + 1.0))
    return f"{100.0 * k / n:.1f} ± {100.0 * np.sqrt(p * (1.0 - p) / n):.1f} ({n})"


def _table(names: Sequence[str], lines: Iterator[Sequence[object]] | Sequence[Sequence[object]]) -> list[str]:
    head = "| " + " | ".join(names) + " |"
    return [head, "|" + "---|" * len(names), *("| " + " | ".join(map(str, line)) + " |" for line in lines)]

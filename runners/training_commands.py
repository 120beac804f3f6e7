"""The command `nightstream train-reliability`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from runners.run_commands import Failure

FIRST_SEED = 1000


@click.command("train-reliability")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for pairs, model and card.")
@click.option(
    "--seeds", default=25, show_default=True, type=click.IntRange(min=5), help="How many; 15 to 30 pairs each."
)
@click.option("--seed", "first_seed", default=FIRST_SEED, show_default=True, type=click.IntRange(min=0), help="First.")
@click.option("--regime", "regimes", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.option(
    "--night",
    "nights",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A night folder with templates, real images; may be repeated.",
)
@click.option("--version", "version", default="gbm-2", show_default=True, help="The model's name in alerts.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def train_reliability(
    out: Path,
    seeds: int,
    first_seed: int,
    regimes: tuple[str, ...],
    nights: tuple[Path, ...],
    version: str,
    quiet: bool,
) -> None:
    """Train the reliability of detected sources on simulated pairs, and on real nights beside them.

    Each seed gives 15 pairs, each for the test 30. Of five seeds three are for fitting, one for calibration, one for
    the test. Of five nights in a row three are for fitting, too; each exposure is searched as it is and with sources
    injected, against its template, with roles exchanged, and against the next exposure of the same night. Of what is
    in one visit only nothing can be learned.

    Writes OUT/reliability.json, the model, and OUT/reliability.md, its card; what could not be searched is in
    OUT/failures.jsonl. A second or two for each pair; run again into the same OUT, pairs that are there are not made
    anew. Needs LightGBM: pip install 'nightstream[training]'.
    """
    from pipelines.reliability_training import FAILURES, ReliabilityTraining, training_pairs
    from runners.local import local_engine
    from runners.progress import status_line
    from transforms.reliability_fitting import CARD, MODEL
    from transforms.reliability_model import LONGEST_VERSION
    from transforms.reliability_nights import training_nights
    from transforms.reliability_training import TRAINING_REGIMES

    for name in regimes:
        if name not in TRAINING_REGIMES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(TRAINING_REGIMES)}", param_hint="--regime")
    if not 0 < len(version) <= LONGEST_VERSION:
        raise click.BadParameter(f"must have 1 to {LONGEST_VERSION} characters", param_hint="--version")
    try:
        import lightgbm  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: its OpenMP library is missing
        raise Failure(f"training needs LightGBM (pip install 'nightstream[training]'): {error}") from error
    pairs = tuple(training_pairs(tuple(dict.fromkeys(regimes)) or tuple(TRAINING_REGIMES), first_seed, seeds))
    try:
        real = training_nights(nights)
        n_pairs = len(pairs) + len(real.exposures)
        out.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with status_line(lambda: _progress(out, n_pairs, started), quiet), local_engine(()) as run:
            run(ReliabilityTraining(str(out), version, pairs, real))
    except (RuntimeError, OSError, ValueError) as error:
        raise Failure(str(error)) from error
    if not quiet:
        n_failed = len((out / FAILURES).read_text(encoding="utf-8").splitlines())
        click.echo(f"{out / MODEL}, {out / CARD}: of {n_pairs} pairs, {n_failed} problems")


def _progress(out: Path, n_pairs: int, started: float) -> str:
    n_stored = sum(1 for _ in (out / "pairs").glob("[!.]*.npz"))
    return f"{n_stored} of {n_pairs} pairs, {time.monotonic() - started:.0f} s"

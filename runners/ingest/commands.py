"""The command `nightstream ingest`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from runners.ingest.night_folder import IngestedNight
    from runners.ingest.night_folder import Progress as TellProgress

_SOURCE = click.argument("source", type=click.Path(exists=True, path_type=Path))
_OUT = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Night folder to write; new or empty."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr.")
_QUIET = click.option("--quiet", is_flag=True, help="No progress, no summary.")


class _Failure(click.ClickException):
    """The ingest as a whole failed."""

    exit_code = 1


@click.group()
def ingest() -> None:
    """Turn data of precursor surveys into the inputs of this program.

    Images become a night folder for `produce`, catalogues a table for `associate`. Inputs that cannot be used are
    listed with their reasons, the rest is ingested: exit code 0. Exit code 1 means that nothing could be ingested.

    \b
    nightstream ingest saao ../shared/data/saao_kb13475 --out night
    nightstream produce night --out result
    nightstream ingest ztf-detections ../shared/data/ztf_alerts --out ztf.parquet
    nightstream associate ztf.parquet --out result
    """


@ingest.command()
@_SOURCE
@_OUT
@_JSON
@_QUIET
def saao(source: Path, out: Path, as_json: bool, quiet: bool) -> None:
    """Frames of the SAAO 1.0 m telescope: no WCS, no zero point, no mask.

    Registers all frames of SOURCE to the best of them by their stars and builds the template from the ten
    sharpest. WCS and zero points are nominal: right relative to each other, not on the sky.
    """
    from runners.ingest.saao import ingest_saao

    with _failures(), _progress(quiet or as_json) as tell:
        nights = [ingest_saao(source, out, tell)]
    _tell(nights, as_json=as_json, quiet=quiet)


@ingest.command()
@_SOURCE
@_OUT
@_JSON
@_QUIET
def decam(source: Path, out: Path, as_json: bool, quiet: bool) -> None:
    """Community Pipeline cutouts (DECam, MOSAIC-3, 90prime) of the Legacy Surveys.

    SOURCE holds survey-ccds*.fits tables and *_ooi_*, *_ood_*, *_oow_* images at any depth. Of each band and field
    the exposure with the best seeing is the template. Several instruments become one night folder each, below OUT.
    """
    from runners.ingest.decam import ingest_decam

    with _failures(), _progress(quiet or as_json) as tell:
        nights = ingest_decam(source, out, tell)
    _tell(nights, as_json=as_json, quiet=quiet)


def _show_map(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    if name is None:
        return
    from runners.ingest.calibrated_fits import shipped_maps

    maps = shipped_maps()
    if name not in maps:
        raise click.BadParameter(f"{name!r}, expected one of {', '.join(maps)}", ctx=ctx)
    click.echo(maps[name], nl=False)
    ctx.exit()


@ingest.command(name="fits")
@_SOURCE
@_OUT
@click.option(
    "--map", "map_name", default="generic", show_default=True, help="Header map: a YAML file or a shipped name."
)
@click.option(
    "--templates",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of templates that the map describes too. Without it the best exposures are stacked.",
)
@click.option(
    "--show-map", callback=_show_map, is_eager=True, expose_value=False, metavar="NAME", help="Print a shipped map."
)
@_JSON
@_QUIET
def fits_folder(source: Path, out: Path, map_name: str, templates: Path | None, as_json: bool, quiet: bool) -> None:
    """Any folder of calibrated FITS images with a WCS.

    A header map says which card is the band, the time, the zero point and so on. Templates that are not given are
    built: the best third of the exposures of a band and field, at most ten, which are then no visits.
    """
    from runners.ingest.calibrated_fits import HeaderMapError, ingest_fits, load_header_map

    try:
        header_map = load_header_map(map_name)
    except HeaderMapError as error:
        raise click.UsageError(str(error)) from error
    with _failures(), _progress(quiet or as_json) as tell:
        nights = [ingest_fits(source, header_map, out, templates, tell)]
    _tell(nights, as_json=as_json, quiet=quiet)


@ingest.command(name="ztf-detections")
@_SOURCE
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Parquet file to write.")
@_JSON
@_QUIET
def ztf_detections(source: Path, out: Path, as_json: bool, quiet: bool) -> None:
    """Detections of ZTF as a table of diaSources, for `nightstream associate`.

    SOURCE is a Parquet file with a row per detection, or a folder with such files (*detections*.parquet). The
    table asks for ZTF's own association radius of 1.5 arcsec.
    """
    from runners.ingest.ztf import ZtfTableError, ingest_ztf_detections

    try:
        done = ingest_ztf_detections(source, out)
    except (ZtfTableError, OSError) as error:
        raise _Failure(str(error)) from error
    if as_json:
        facts = {"table": str(done.table), "sources": done.sources, "visits": done.visits, "refused": done.refused}
        click.echo(json.dumps(facts))
    if not quiet:
        lines = [
            f"{done.table}: {done.sources} sources of {done.visits} visits",
            *(f"  refused {reason}" for reason in done.refused),
        ]
        click.echo("\n".join(lines), err=as_json)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    from runners.ingest.night_folder import IngestError

    try:
        yield
    except IngestError as error:
        raise _Failure(str(error)) from error


@contextlib.contextmanager
def _progress(silent: bool) -> Iterator[TellProgress | None]:
    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield show


def _tell(nights: Sequence[IngestedNight], *, as_json: bool, quiet: bool) -> None:
    if as_json:
        click.echo(json.dumps(_summary(nights)))
    if quiet:
        return
    for night in nights:
        lines = [
            f"{night.folder}: {night.visits} visits, {night.detectors} exposures, {night.templates} templates "
            f"of {night.instrument}",
            *(f"  {note}" for note in night.notes),
            *(f"  refused {refusal.source}: {refusal.reason}" for refusal in night.refused),
        ]
        click.echo("\n".join(lines), err=as_json)


def _summary(nights: Sequence[IngestedNight]) -> dict[str, Any]:
    return {
        "visits": sum(night.visits for night in nights),
        "detectors": sum(night.detectors for night in nights),
        "templates": sum(night.templates for night in nights),
        "refused": [refusal._asdict() for night in nights for refusal in night.refused],
        "nights": [
            {"folder": str(night.folder), "instrument": night.instrument, "visits": night.visits} for night in nights
        ],
    }

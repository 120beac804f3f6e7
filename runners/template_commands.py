"""The command `nightstream templates`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from runners.run_commands import BadUsage, Failure
from schemas.manifests import BANDS, ManifestError

_NIGHT = click.Path(exists=True, path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr.")
_QUIET = click.option("--quiet", is_flag=True, help="No progress, no summary.")


@click.group()
def templates() -> None:
    """Build templates from the exposures of earlier nights, and give them to a night.

    \b
    nightstream templates build night1 night2 --out templates
    nightstream templates attach night3 templates
    nightstream produce night3 --out result
    """


@templates.command()
@click.argument("nights", nargs=-1, required=True, type=_NIGHT)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of templates; new, empty or one.")
@click.option("--band", "bands", multiple=True, type=click.Choice(BANDS), help="Only this band; may be repeated.")
@click.option(
    "--max-fwhm",
    "max_fwhm_arcsec",
    type=click.FloatRange(min=0, min_open=True),
    metavar="ARCSEC",
    help="Poorest seeing. Without it, up to 1.3 times that of the sharpest quarter.",
)
@click.option(
    "--min-exposures",
    default=3,
    show_default=True,
    type=click.IntRange(min=1),
    help="Least number in a template and in each of its pixels; below 3 cosmic rays stay.",
)
@click.option("--max-exposures", default=20, show_default=True, type=click.IntRange(min=1), help="The sharpest.")
@click.option(
    "--grid", "grid_visit", type=click.IntRange(min=1), metavar="VISIT", help="Pixels to use; else the sharpest's."
)
@_JSON
@_QUIET
def build(
    nights: tuple[Path, ...], out: Path, bands: tuple[str, ...], as_json: bool, quiet: bool, **choice: Any
) -> None:
    """Stack the exposures of NIGHTS into templates, one per band, detector and field.

    NIGHTS are folders with visits.jsonl; templates they have already play no part. Of each field the sharp and deep
    exposures are freed of their background, warped to the pixels of the sharpest, scaled to one flux unit where their
    stars ask for it, and averaged without what only one of them shows. OUT gets a FITS file and a JSON description for
    each template, and templates.jsonl with all of them.

    What cannot be used is listed in OUT/failures.jsonl, the rest is built: exit code 0. Exit code 1: nothing could be
    built. Run again into the same OUT, only what has changed is built anew.
    """
    from pipelines.template_building import FAILURES, TemplateBuilding
    from runners.local import local_engine
    from runners.progress import status_line
    from runners.template_folder import TemplateFolderError, claim_template_folder, list_exposures, read_index
    from transforms.templates import TemplateConfig

    started = time.monotonic()
    try:
        config = TemplateConfig(**choice)
    except ValidationError as error:
        raise BadUsage(
            "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        ) from error
    if config.min_exposures > config.max_exposures:
        raise BadUsage(f"--min-exposures {config.min_exposures} is above --max-exposures {config.max_exposures}")
    try:
        exposures, problems = list_exposures(nights, bands)
        if not exposures:
            of_bands = f" of band {', '.join(bands)}" if bands else ""
            raise Failure(f"there is no exposure{of_bands} in {', '.join(map(str, nights))}")
        claim_template_folder(out)
        with status_line(lambda: _progress(out, len(exposures)), quiet or as_json), local_engine(()) as run:
            run(TemplateBuilding(exposures, str(out), config, problems))
        built = read_index(out)
        failures = [json.loads(line) for line in (out / FAILURES).read_text(encoding="utf-8").splitlines()]
    except TemplateFolderError as error:
        raise BadUsage(str(error)) from error
    except (ManifestError, RuntimeError, OSError) as error:
        raise Failure(str(error)) from error
    facts = {
        "folder": str(out),
        "exposures": len(exposures),
        "templates": len(built),
        "failures": len(failures),
        "seconds": round(time.monotonic() - started, 1),
    }
    if as_json:
        click.echo(json.dumps(facts))
    if not quiet:
        click.echo("\n".join(_told(out, built, failures)), err=as_json)
    if not built:
        raise Failure(f"no template could be built of {len(exposures)} exposures: see {out / FAILURES}")


@templates.command()
@click.argument("night", type=_NIGHT)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_JSON
@_QUIET
def attach(night: Path, folder: Path, as_json: bool, quiet: bool) -> None:
    """Give each detector of NIGHT its template of FOLDER.

    Writes the templates' paths into NIGHT/visits.jsonl: for each detector, of the templates of its instrument and band,
    the one that covers most of it. Detectors without one keep what they had, and are listed. So are exposures that are
    part of their own template: what is new in them is subtracted in part from itself.
    """
    from runners.template_folder import TemplateFolderError, attach_templates

    try:
        done = attach_templates(night, folder)
    except TemplateFolderError as error:
        raise BadUsage(str(error)) from error
    except ManifestError as error:
        raise Failure(str(error)) from error
    if as_json:
        click.echo(json.dumps(done._asdict()))
    if not quiet:
        lines = [
            f"{night}: {done.attached} of {done.detectors} detectors have a template of {folder}",
            *(f"  none for {reason}" for reason in done.kept),
            *(f"  {name} is part of its own template" for name in done.own),
        ]
        click.echo("\n".join(lines), err=as_json)


def _told(out: Path, built: list[dict[str, Any]], failures: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{out}: {len(built)} templates"
    for record in built:
        seeing = "" if record["fwhm_arcsec"] is None else f", seeing {record['fwhm_arcsec']:.2f} arcsec"
        depth = "" if record["depth_5sigma_mag"] is None else f", 5 sigma at {record['depth_5sigma_mag']:.2f} mag"
        yield f"  {record['template']}: {record['n_exposures']} exposures{seeing}{depth}, {record['filled']:.0%} filled"
        for reason in record["left_out"]:
            yield f"    without {reason}"
    for failure in failures:
        yield f"  failed: {failure['lost']}: {failure['error']}: {failure['reason']}"


def _progress(out: Path, n_exposures: int) -> str:
    n_built = sum(1 for _ in out.glob("[!.]*.fits"))
    return f"{n_exposures} exposures, {n_built} templates" if n_built else f"measuring {n_exposures} exposures"

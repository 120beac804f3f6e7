"""A folder of templates: what it is built from, whose it is, and how a night gets its templates from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from astropy.wcs import WCS

from pipelines.template_building import FAILURES, INDEX
from runners.output_folder import fingerprint
from schemas.elements import FailureRecord
from schemas.exposures import ExposureError, read_grid
from schemas.manifests import ManifestError, Visit, manifest_lines, manifest_path, parse_visit, read_manifest
from transforms.failures import write_bytes
from transforms.template_building import STAGE
from transforms.templates import ListedExposure, overlap, sky_lattice

_MARKER = ".nightstream-templates"
_LEAST_COVERED = 0.1  # of the science image; `produce` refuses less


class TemplateFolderError(ValueError):
    """A folder that cannot be written or is none of templates; the message says why."""


def list_exposures(
    nights: Iterable[Path], bands: Sequence[str] = ()
) -> tuple[list[ListedExposure], list[FailureRecord]]:
    """All detectors of all visits of some bands (all when none is named), each file once, and what cannot be used.

    Raises
    ------
    ManifestError : a night has no manifest
    """
    found: dict[Path, ListedExposure] = {}
    problems: list[FailureRecord] = []
    for night in nights:
        manifest = read_manifest(night)
        problems += [
            FailureRecord(one.visit, one.detector, STAGE, one.error, f"{night}: {one.reason}", one.lost)
            for one in manifest.problems
        ]
        for visit in manifest.visits:
            if bands and visit.band not in bands:
                continue
            for images in visit.detectors:
                path = Path(images.science).resolve()
                found.setdefault(
                    path,
                    ListedExposure(
                        midpoint_mjd_tai=visit.midpoint_mjd_tai,
                        visit=visit.visit,
                        detector=images.detector,
                        instrument=visit.instrument,
                        band=visit.band,
                        path=str(path),
                        fingerprint=fingerprint(path),
                    ),
                )
    return sorted(found.values()), problems


def claim_template_folder(folder: Path) -> None:
    """Make the folder, or take over one of templates; until the new index is written it has none.

    Raises
    ------
    TemplateFolderError : it holds something else, or cannot be written
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise TemplateFolderError(f"{folder} is a file, not a folder")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARKER).is_file():
            raise TemplateFolderError(f"{folder} is not empty and no folder of templates: choose an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).touch()
        for name in (INDEX, FAILURES):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise TemplateFolderError(f"{folder} cannot be written: {error}") from error


def read_index(folder: Path) -> list[dict[str, Any]]:
    """What the folder's templates are. TemplateFolderError where it has no index, or a broken one."""
    path = folder / INDEX
    if not path.is_file():
        raise TemplateFolderError(f"no {INDEX} in {folder}: is it a folder of `nightstream templates build`?")
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for record in records:
            _ = ((folder / record["template"]).resolve(), record["instrument"], record["band"], record["n_exposures"])
            _ = [(used["visit"], used["detector"]) for used in record["exposures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TemplateFolderError(f"{path} is broken: {type(error).__name__}: {error}") from error
    return records


class Attachment(NamedTuple):
    """What became of a night's detectors.

    Attributes
    ----------
    detectors : all that its manifest lists
    attached : those that have a template of the folder now
    kept : why the others have none; they keep what they had
    own : exposures that are part of their own template
    """

    detectors: int
    attached: int
    kept: tuple[str, ...]
    own: tuple[str, ...]


def attach_templates(night: Path, folder: Path) -> Attachment:
    """Write into a night's manifest which template of a folder each detector has.

    Of the templates of its instrument and band each takes the one that covers most of it, then the one of most
    exposures. Lines that cannot be used stay as they are.

    Raises
    ------
    ManifestError, TemplateFolderError : the night or the folder cannot be used
    """
    templates = _usable_templates(folder)
    path = manifest_path(night)
    counts, kept, own, lines = [0, 0], [], [], []
    for line in manifest_lines(night):
        try:
            record = json.loads(line)
            visit = parse_visit(record, path.parent)
        except (ValueError, RecursionError):
            lines.append(line)
            continue
        for images in record["detectors"]:
            name = f"visit {visit.visit} detector {images['detector']}"
            counts[0] += 1
            try:
                best = _best_template(visit, path.parent / images["science"], templates)
            except (ExposureError, _NoneCoversError) as error:
                kept.append(f"{name}: {error}")
                continue
            counts[1] += 1
            images["template"] = _path_from(path.parent, best.path)
            if (visit.visit, images["detector"]) in best.sources:
                own.append(name)
        lines.append(json.dumps(record))
    try:
        write_bytes(path, "\n".join(lines).encode())
    except OSError as error:
        raise ManifestError(f"{path} cannot be written: {error}") from error
    return Attachment(counts[0], counts[1], tuple(kept), tuple(own))


class _NoneCoversError(ValueError):
    """No template for an image."""


@dataclass(frozen=True, eq=False)
class _Template:
    path: Path
    instrument: str
    band: str
    n_exposures: int
    sources: frozenset[tuple[int, int]]
    wcs: WCS
    shape: tuple[int, int]


def _usable_templates(folder: Path) -> list[_Template]:
    templates = []
    for record in read_index(folder):
        path = (folder / record["template"]).resolve()
        try:
            wcs, shape = read_grid(path)
        except ExposureError as error:
            raise TemplateFolderError(f"{folder}: {error}; build the templates again") from error
        sources = frozenset((used["visit"], used["detector"]) for used in record["exposures"])
        templates.append(
            _Template(path, record["instrument"], record["band"], record["n_exposures"], sources, wcs, shape)
        )
    return templates


def _best_template(visit: Visit, science: Path, templates: Iterable[_Template]) -> _Template:
    alike = [one for one in templates if (one.instrument, one.band) == (visit.instrument, visit.band)]
    if not alike:
        raise _NoneCoversError(f"no template of {visit.instrument}, band {visit.band}")
    sky = sky_lattice(*read_grid(science))
    covered = [(overlap(sky, one.wcs, one.shape), one.n_exposures, one.path.name) for one in alike]
    best = max(range(len(alike)), key=lambda number: covered[number])
    if covered[best][0] < _LEAST_COVERED:
        raise _NoneCoversError(f"the best of {len(alike)} templates covers {covered[best][0]:.0%} of it")
    return alike[best]


def _path_from(night: Path, path: Path) -> str:
    """Relative to the night where it lies inside."""
    inside = night.resolve()
    return str(path.relative_to(inside)) if path.is_relative_to(inside) else str(path)

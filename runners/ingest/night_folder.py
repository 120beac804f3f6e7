"""Writing a night folder: numbering of visits, time scales, and the list of what could not be ingested."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import erfa

from schemas.manifests import (
    FIRST_DAY_OBS,
    FIRST_MIDPOINT_MJD,
    LAST_DAY_OBS,
    LAST_MIDPOINT_MJD,
    MAX_SEQ_NUM,
    Visit,
    day_obs_of,
    write_manifest,
)

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, how many there are
_MJD_EPOCH = datetime(1858, 11, 17, tzinfo=UTC)
_MJD_ZERO_JD = 2400000.5


class IngestError(ValueError):
    """A source or an output folder that cannot be used as a whole; the message says why."""


class RefusedInput(ValueError):  # noqa: N818 - one input's reason, listed and never the end of the run
    """One input that cannot be ingested; the message says why."""


class Refusal(NamedTuple):
    """An input that was left out."""

    source: str
    reason: str


@dataclass(frozen=True)
class IngestedNight:
    """What one night folder holds.

    Attributes
    ----------
    folder : the night folder
    instrument : its one instrument
    visits, detectors, templates : how many were written; `detectors` counts the science images
    refused : inputs that were left out, with reasons
    notes : what was assumed, built or estimated
    """

    folder: Path
    instrument: str
    visits: int
    detectors: int
    templates: int
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...] = ()


def tai_of_utc_mjd(mjd_utc: float) -> float:
    """MJD in TAI of an MJD in UTC, by the leap seconds that come with ERFA.

    Raises
    ------
    RefusedInput : not a time between 1960 and 2100
    """
    if not 36934.0 <= mjd_utc < 88069.0:
        raise RefusedInput(f"MJD {mjd_utc} is not between 1960 and 2100")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", erfa.ErfaWarning)  # beyond the table the last step holds
        tai_jd1, tai_jd2 = erfa.utctai(_MJD_ZERO_JD, mjd_utc)
    return float(tai_jd1 - _MJD_ZERO_JD + tai_jd2)


def mjd_of_iso(text: str) -> float:
    """MJD of an ISO 8601 date and time, in the scale the text is in; an offset or Z is taken into account."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise RefusedInput(f"{text!r} is no ISO date and time") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _MJD_EPOCH) / timedelta(days=1)


def checked_midpoint(mjd_tai: float) -> float:
    """A visit's midpoint; RefusedInput when the ids have no bits for its night."""
    known = FIRST_MIDPOINT_MJD <= mjd_tai <= LAST_MIDPOINT_MJD
    if not known or not FIRST_DAY_OBS <= day_obs_of(mjd_tai) <= LAST_DAY_OBS:
        raise RefusedInput(f"midpoint MJD {mjd_tai} (TAI) is not in a night from {FIRST_DAY_OBS} to {LAST_DAY_OBS}")
    return mjd_tai


def number_visits(visits: Sequence[Visit]) -> list[Visit]:
    """Visits in time order, `seq_num` the rank within `day_obs`, and `visit` = day_obs and 5 digits of it."""
    ranks: dict[int, int] = {}
    numbered = []
    for visit in sorted(visits, key=lambda one: (one.midpoint_mjd_tai, one.detectors[0].science)):
        day_obs = day_obs_of(visit.midpoint_mjd_tai)
        rank = ranks[day_obs] = ranks.get(day_obs, 0) + 1
        if rank > MAX_SEQ_NUM:
            raise IngestError(f"more than {MAX_SEQ_NUM} visits on {day_obs}")
        numbered.append(replace(visit, visit=visit_number(day_obs, rank), day_obs=day_obs, seq_num=rank))
    return numbered


def visit_number(day_obs: int, seq_num: int) -> int:
    return day_obs * 100_000 + seq_num


def files_below(folder: Path, *, without: Path) -> list[Path]:
    """All files in a folder and below, in order of their paths; linked folders are followed, each folder once.

    Links that lead nowhere are listed like files, so that they can be refused by name; the folder `without`, where
    the night is written, is left out. IngestError: not a folder, or that very folder.
    """
    if not folder.is_dir():
        raise IngestError(f"{folder} is not a folder")
    left_out = os.path.realpath(without)
    if os.path.realpath(folder) == left_out:
        raise IngestError(f"{folder} is to be read and written: give a new folder to write")
    found: list[Path] = []
    seen: set[str] = set()
    for place, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or real == left_out:
            names.clear()
            continue
        seen.add(real)
        names.sort()
        found += [Path(place, name) for name in files]
    return sorted(found)


def claim_folder(out: Path) -> None:
    """Make the folder, or take over what an ingest left there; one that holds anything else is refused.

    Until the new manifest is written a folder taken over has none: it is not complete.
    """
    try:
        if out.exists() and not out.is_dir():
            raise IngestError(f"{out} is a file, not a folder")
        out.mkdir(parents=True, exist_ok=True)
        strange = [item.name for item in out.iterdir() if item.name not in _OWN_NAMES and not _is_ingested(item)]
        if strange:
            raise IngestError(f"{out} is not empty (it holds {', '.join(sorted(strange)[:3])}): give a new folder")
        if (out / "visits.jsonl").exists() and not _is_ingested(out):
            raise IngestError(f"{out} holds a night that was not made by ingest: give a new folder")
        (out / "visits.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise IngestError(f"{out} cannot be written: {error}") from error


_OWN_NAMES = {"science", "templates", "ingest.json", ".visits.jsonl", "visits.jsonl"}


def _is_ingested(folder: Path) -> bool:
    return (folder / "ingest.json").is_file()


def finish_folder(night: IngestedNight, visits: Sequence[Visit]) -> IngestedNight:
    """Write the summary and, last of all, the manifest: a folder that has one is complete."""
    facts = {
        "instrument": night.instrument,
        "visits": night.visits,
        "detectors": night.detectors,
        "templates": night.templates,
        "refused": [refusal._asdict() for refusal in night.refused],
        "notes": list(night.notes),
    }
    try:
        (night.folder / "ingest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        write_manifest(night.folder, list(visits))
    except OSError as error:
        raise IngestError(f"{night.folder} cannot be written: {error}") from error
    return night


def watched(items: Sequence[str], what: str, progress: Progress | None) -> Iterator[str]:
    """The items one by one, with progress told after each."""
    for done, item in enumerate(items):
        if progress is not None:
            progress(what, done, len(items))
        yield item
    if progress is not None:
        progress(what, len(items), len(items))

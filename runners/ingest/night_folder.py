"""Writing a night folder: numbering of visits, time scales, and the list of what could not be ingested."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import erfa

from schemas.manifests import MAX_SEQ_NUM, Visit, write_manifest

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
    RefusedInput : not a time since 1960
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", erfa.ErfaWarning)  # beyond the table the last step holds
        try:
            tai_jd1, tai_jd2 = erfa.utctai(_MJD_ZERO_JD, mjd_utc)
        except erfa.ErfaError as error:
            raise RefusedInput(f"MJD {mjd_utc} is no time in UTC: {error}") from error
    if not 36934.0 <= mjd_utc < 88069.0:  # 1960 to 2100
        raise RefusedInput(f"MJD {mjd_utc} is not between 1960 and 2100")
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


def day_obs_of(mjd_tai: float) -> int:
    """Calendar date YYYYMMDD of a time minus 12 hours, so that one night has one date (TAI for UTC: 37 s apart)."""
    day = _MJD_EPOCH + timedelta(days=mjd_tai - 0.5)
    return day.year * 10000 + day.month * 100 + day.day


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


def claim_folder(out: Path) -> None:
    """Make the folder; one that holds anything but what an unfinished ingest left is refused."""
    if out.exists() and not out.is_dir():
        raise IngestError(f"{out} is a file, not a folder")
    if out.is_dir() and (strange := sorted({item.name for item in out.iterdir()} - _OWN_NAMES)):
        raise IngestError(f"{out} is not empty (it holds {', '.join(strange[:3])}): give a new folder")
    out.mkdir(parents=True, exist_ok=True)


_OWN_NAMES = {"science", "templates", "ingest.json", ".visits.jsonl", "visits.jsonl"}


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
    (night.folder / "ingest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_manifest(night.folder, list(visits))
    return night


def watched(items: Sequence[str], what: str, progress: Progress | None) -> Iterator[str]:
    """The items one by one, with progress told after each."""
    for done, item in enumerate(items):
        if progress is not None:
            progress(what, done, len(items))
        yield item
    if progress is not None:
        progress(what, len(items), len(items))

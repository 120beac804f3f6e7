"""The visit manifest: what a telescope announces about each visit it has read out.

`visits.jsonl` in a night folder holds one visit per line; `read_manifest` turns it into visits
and typed problems, one per line that could not be used, so that one bad line never hides the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

VISITS_TOPIC = "visits"  # where visits are announced, unless asked otherwise
BANDS = ("u", "g", "r", "i", "z", "y")
MAX_VISIT = 2**63 - 1
MAX_DETECTOR = 255
MAX_SEQ_NUM = 32767
FIRST_DAY_OBS, LAST_DAY_OBS = 20100101, 20541231  # what the ids have bits for
FIRST_MIDPOINT_MJD, LAST_MIDPOINT_MJD = 55_196.0, 71_635.0  # those days, and one beyond at either end
SURVEY_MJD_RANGE = (10_000.0, 100_000.0)  # 1886 to 2132: what tables and archives of other surveys may speak of
MAX_EXPOSURE_TIME_S = 86_400.0
MAX_READOUT_DELAY_D = 1.0
_MJD_EPOCH = date(1858, 11, 17)
_HALF_DAY = 0.5


@dataclass(frozen=True)
class DetectorImages:
    """Where one detector's images lie; `template` is None when the field has none."""

    detector: int
    science: str
    template: str | None


@dataclass(frozen=True)
class Visit:
    """One visit as the manifest announces it. Angles in degrees, times in MJD TAI.

    `observatory`: where the telescope stands, as `schemas.observatories.observatory_of` takes it.
    """

    visit: int
    day_obs: int
    seq_num: int
    instrument: str
    band: str
    midpoint_mjd_tai: float
    exposure_time_s: float
    readout_end_mjd_tai: float
    boresight_ra_deg: float
    boresight_dec_deg: float
    rotation_deg: float
    observation_reason: str | None
    target_name: str | None
    detectors: tuple[DetectorImages, ...]
    observatory: str | None = None

    @property
    def event_time_s(self) -> float:
        """Event time of the flow: seconds since MJD 40587 (TAI), floored to the millisecond."""
        return event_time_s(self.midpoint_mjd_tai)


def visit_without_images(
    visit: int,
    midpoint_mjd_tai: float,
    band: str,
    detectors: Iterable[int],
    *,
    source: str,
    exposure_time_s: float = 0.0,
    readout_end_mjd_tai: float | None = None,
) -> Visit:
    """A visit known by its sources or packets only; `source` stands where the instrument would.

    Without a readout end the midpoint stands in; the telescope's pointing is not known.
    """
    return Visit(
        visit=visit,
        day_obs=day_obs_of(midpoint_mjd_tai),
        seq_num=0,
        instrument=source,
        band=band,
        midpoint_mjd_tai=midpoint_mjd_tai,
        exposure_time_s=exposure_time_s,
        readout_end_mjd_tai=midpoint_mjd_tai if readout_end_mjd_tai is None else readout_end_mjd_tai,
        boresight_ra_deg=0.0,
        boresight_dec_deg=0.0,
        rotation_deg=0.0,
        observation_reason=None,
        target_name=None,
        detectors=tuple(DetectorImages(detector, "", None) for detector in sorted(detectors)),
    )


def day_obs_of(mjd: float) -> int:
    """YYYYMMDD of the observing day: the calendar date twelve hours earlier."""
    day = _MJD_EPOCH + timedelta(days=math.floor(mjd - _HALF_DAY))
    return day.year * 10000 + day.month * 100 + day.day


@dataclass(frozen=True)
class ManifestProblem:
    """A line of the manifest, or something in it, that cannot be used, why, and what is lost by it."""

    line: int
    visit: int | None
    detector: int | None
    error: str
    reason: str
    lost: str = "the visit as announced there"


@dataclass(frozen=True)
class Manifest:
    """Visits in order of (midpoint, visit) and the problems met on the way."""

    visits: tuple[Visit, ...]
    problems: tuple[ManifestProblem, ...] = field(default=())


class ManifestError(ValueError):
    """The manifest as a whole cannot be read; the message says why."""


def event_time_s(midpoint_mjd_tai: float) -> float:
    """Seconds since MJD 40587 in TAI, floored to the millisecond (Beam timers keep no more)."""
    return math.floor((midpoint_mjd_tai - 40587.0) * 86_400_000.0) / 1000.0


def read_manifest(night: Path) -> Manifest:
    """Read `night/visits.jsonl`.

    Parameters
    ----------
    night : Path
        The night folder (or the manifest file itself).

    Returns
    -------
    Manifest
        Visits sorted by (midpoint, visit), so the order of lines has no effect. Paths are
        absolute. Of several lines for one visit the first in file order is kept if they are equal;
        if they differ, all but the first are problems.

    Raises
    ------
    ManifestError
        No manifest there, it is not text, or it holds two instruments.
    """
    path = manifest_path(night)
    lines = manifest_lines(night)
    visits: dict[int, Visit] = {}
    exposures: dict[tuple[int, int], int] = {}
    problems: list[ManifestProblem] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of too many digits, endless nesting
            problems.append(ManifestProblem(number, None, None, "BrokenLine", f"line {number} is not JSON: {error}"))
            continue
        try:
            visit = parse_visit(record, path.parent)
        except ValueError as error:
            reason = f"line {number}: {error}"
            problems.append(ManifestProblem(number, _usable_visit_id(record), None, "InvalidVisit", reason))
            continue
        first = visits.get(visit.visit)
        if first is not None:
            detail = "the same" if first == visit else "different"
            reason = f"line {number}: visit {visit.visit} was announced before with {detail} content; the first stands"
            problems.append(ManifestProblem(number, visit.visit, None, "DuplicateVisit", reason))
            continue
        exposure = (visit.day_obs, visit.seq_num)
        if exposure in exposures:
            reason = (
                f"line {number}: day_obs {visit.day_obs} seq_num {visit.seq_num} already belongs to "
                f"visit {exposures[exposure]}; source ids would clash"
            )
            problems.append(ManifestProblem(number, visit.visit, None, "DuplicateExposure", reason))
            continue
        exposures[exposure] = visit.visit
        visits[visit.visit] = visit
    instruments = sorted({visit.instrument for visit in visits.values()})
    if len(instruments) > 1:
        raise ManifestError(f"{path} mixes instruments {', '.join(instruments)}: one night folder holds one")
    ordered = tuple(sorted(visits.values(), key=lambda visit: (visit.midpoint_mjd_tai, visit.visit)))
    return Manifest(ordered, tuple(problems))


def manifest_path(night: Path) -> Path:
    """The manifest of a night folder; a file stands for itself."""
    return night if night.is_file() else night / "visits.jsonl"


def night_folder(night: Path) -> Path:
    """The folder that paths in a manifest, and what lies beside it, start from."""
    return manifest_path(night).parent


def manifest_lines(night: Path) -> list[str]:
    """The lines of a manifest, unchecked. ManifestError if there is none or it is not text."""
    path = manifest_path(night)
    if not path.is_file():
        raise ManifestError(f"no visits.jsonl in {night}: is it a night folder?")
    try:
        # Not splitlines(): a text in JSON may hold U+2028 and its like.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error


def write_manifest(night: Path, visits: list[Visit]) -> Path:
    """Write `night/visits.jsonl`, paths relative to the night folder where they lie inside it."""
    lines = []
    for visit in visits:
        record = asdict(visit)
        for images in record["detectors"]:
            for name in ("science", "template"):
                if images[name] is not None:
                    images[name] = _relative_to(images[name], night)
        lines.append(json.dumps(record))
    path = night / "visits.jsonl"
    partial = night / ".visits.jsonl"
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    partial.rename(path)
    return path


def parse_visit(record: Any, folder: Path) -> Visit:
    """Check one manifest record; relative paths are taken from `folder`. ValueError names the key."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    band = _text(record, "band")
    if band not in BANDS:
        raise ValueError(f"unknown band {band!r}, expected one of {', '.join(BANDS)}")
    midpoint = _number(record, "midpoint_mjd_tai")
    if not FIRST_MIDPOINT_MJD <= midpoint <= LAST_MIDPOINT_MJD:
        raise ValueError(f"midpoint_mjd_tai {midpoint} is outside [{FIRST_MIDPOINT_MJD:.0f}, {LAST_MIDPOINT_MJD:.0f}]")
    exposure_time_s = _number(record, "exposure_time_s")
    if not 0 < exposure_time_s <= MAX_EXPOSURE_TIME_S:
        raise ValueError(f"exposure_time_s must be in (0, {MAX_EXPOSURE_TIME_S:.0f}], got {exposure_time_s}")
    readout_end = _number(record, "readout_end_mjd_tai")
    if not midpoint <= readout_end <= midpoint + MAX_READOUT_DELAY_D:
        raise ValueError(
            f"readout_end_mjd_tai {readout_end} must lie within a day after midpoint_mjd_tai {midpoint}, not before it"
        )
    declination = _number(record, "boresight_dec_deg")
    if not -90 <= declination <= 90:
        raise ValueError(f"boresight_dec_deg {declination} is outside [-90, 90]")
    return Visit(
        visit=_integer(record, "visit", 1, MAX_VISIT),
        day_obs=_day_obs(record),
        seq_num=_integer(record, "seq_num", 0, MAX_SEQ_NUM),
        instrument=_text(record, "instrument"),
        band=band,
        midpoint_mjd_tai=midpoint,
        exposure_time_s=exposure_time_s,
        readout_end_mjd_tai=readout_end,
        boresight_ra_deg=_number(record, "boresight_ra_deg") % 360.0,
        boresight_dec_deg=declination,
        rotation_deg=_number(record, "rotation_deg"),
        observation_reason=_optional_text(record, "observation_reason"),
        target_name=_optional_text(record, "target_name"),
        detectors=_detectors(record, folder),
        observatory=_optional_text(record, "observatory"),
    )


class LoggedMessage(NamedTuple):
    """A message of a log, its offset, and the UNIX time that its producer gave it, None if it gave none."""

    offset: int
    content: bytes
    written_at: float | None = None


@dataclass(frozen=True)
class AnnouncedDetector:
    """One detector of a visit, announced by itself.

    Attributes
    ----------
    visit : the visit; of its detectors only this one
    images : of the detector
    expected : all detectors of the visit
    facts : digest of what the announcements of one visit have in common
    """

    visit: Visit
    images: DetectorImages
    expected: tuple[int, ...]
    facts: str


def announcements(visit: Visit) -> list[bytes]:
    """A visit as messages, one per detector: JSON as in `visits.jsonl`, with the detector's fields besides."""
    record = asdict(visit)
    images = record.pop("detectors")
    record["expected_detectors"] = [one["detector"] for one in images]
    return [json.dumps({**record, **one}).encode() for one in images]


def parse_announcement(message: bytes) -> AnnouncedDetector:
    """Check one announcement; its paths must be absolute. ValueError says what is wrong."""
    try:
        record = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    own = {key: record.pop(key, None) for key in ("detector", "science", "template")}
    visit = parse_visit({**record, "detectors": [own]}, Path("/"))
    for name in ("science", "template"):
        if own[name] and not own[name].startswith("/"):
            raise ValueError(f"{name} must be an absolute path, got {_shortened(own[name])}")
    listed = record.get("expected_detectors")
    if not isinstance(listed, list):
        raise ValueError("expected_detectors must be a list")
    expected = tuple(
        sorted({_integer({"expected_detectors": one}, "expected_detectors", 0, MAX_DETECTOR) for one in listed})
    )
    (images,) = visit.detectors
    if images.detector not in expected:
        raise ValueError(f"detector {images.detector} is none of expected_detectors")
    facts = json.dumps([asdict(replace(visit, detectors=())), expected], sort_keys=True)
    return AnnouncedDetector(visit, images, expected, hashlib.sha256(facts.encode()).hexdigest()[:16])


def _detectors(record: dict[str, Any], folder: Path) -> tuple[DetectorImages, ...]:
    listed = record.get("detectors")
    if not isinstance(listed, list) or not listed:
        raise ValueError("detectors must be a non-empty list")
    found: dict[int, DetectorImages] = {}
    for item in listed:
        if not isinstance(item, dict):
            raise ValueError(f"detectors must hold objects, got {type(item).__name__}")
        detector = _integer(item, "detector", 0, MAX_DETECTOR)
        if detector in found:
            raise ValueError(f"detector {detector} is listed twice")
        template = _optional_text(item, "template")
        found[detector] = DetectorImages(
            detector=detector,
            science=str(folder / _text(item, "science")),
            template=None if template is None else str(folder / template),
        )
    return tuple(found[detector] for detector in sorted(found))


def _usable_visit_id(record: Any) -> int | None:
    """The visit that a rejected record speaks of, where it is one that anything can be filed under."""
    try:
        return _integer(record, "visit", 1, MAX_VISIT) if isinstance(record, dict) else None
    except ValueError:
        return None


def _day_obs(record: dict[str, Any]) -> int:
    day_obs = _integer(record, "day_obs", FIRST_DAY_OBS, LAST_DAY_OBS)
    try:
        date(day_obs // 10000, day_obs // 100 % 100, day_obs % 100)
    except ValueError as error:
        raise ValueError(f"day_obs {day_obs} is no date: {error}") from error
    return day_obs


def _require(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        raise ValueError(f"{key} is missing")
    return record[key]


def _text(record: dict[str, Any], key: str) -> str:
    value = _require(record, key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a non-empty text, got {value!r}")
    return _encodable(key, value)


def _optional_text(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text or null, got {value!r}")
    return _encodable(key, value)


def _encodable(key: str, value: str) -> str:
    """JSON can spell halves of characters, and zeros: neither a packet nor a file name can hold them."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} {value!r} is not valid Unicode") from error
    if "\0" in value:
        raise ValueError(f"{key} {value!r} holds a zero character")
    return value


def _number(record: dict[str, Any], key: str) -> float:
    value = _require(record, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be a finite number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{key} must be a finite number, got {_shortened(value)}")
    return number


def _integer(record: dict[str, Any], key: str, low: int, high: int) -> int:
    value = _require(record, key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{key} must be an integer in [{low}, {high}], got {_shortened(value)}")
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _relative_to(path: str, folder: Path) -> str:
    try:
        return str(Path(path).resolve().relative_to(folder.resolve()))
    except ValueError:
        return path

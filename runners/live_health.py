"""How far a live job is behind what was announced, and what is wrong with it, in the words of who must mend it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from runners.kafka import KafkaMessageLog, KafkaUnreachableError, TopicError
from schemas.manifests import event_time_s, parse_announcement

# What was announced so long ago should be through: alerts have a minute. Also a visit that waits for a detector.
DUE_S = 60.0
_NEVER_S = -1e15  # Flink's watermark before the first
_READ_S = 5.0
_TRIES = 5  # messages at the end of the topic that may be no announcements
# A checkpoint waits for the source to look up, and for a bundle: two minutes are not normal any more.
_CHECKPOINT_S, _CHECKPOINT_INTERVALS = 120.0, 3.0
_RECENT_S = 3600.0
_HELD_UP = 0.5


class AnnouncedVisit(NamedTuple):
    """A visit on a topic of announcements, and its event time."""

    visit: int
    event_time_s: float


class Announced(NamedTuple):
    """What a topic of announcements holds.

    Attributes
    ----------
    end : offset that its next message will have, or None where Kafka does not tell
    newest : the visit announced last
    due : offset behind the messages that were written more than `DUE_S` ago
    overdue : the visit announced last among these
    error : why Kafka does not tell
    """

    end: int | None
    newest: AnnouncedVisit | None = None
    due: int = 0
    overdue: AnnouncedVisit | None = None
    error: str | None = None


def announced_so_far(options: dict[str, Any]) -> Announced:
    """The end of the topic that a live job with these options reads."""
    log = KafkaMessageLog(options["bootstrap"], options["topic"], options["kafka_config"])
    try:
        end = log.end()
        young = log.first_since(time.time() - DUE_S)
    except (KafkaUnreachableError, TopicError, ValueError, OSError) as error:  # also a login that cannot be used
        return Announced(None, error=str(error))
    due = end if young is None else min(young, end)
    return Announced(end, _latest_before(log, end), due, _latest_before(log, due))


def _latest_before(log: KafkaMessageLog, end: int) -> AnnouncedVisit | None:
    for offset in range(end - 1, max(end - 1 - _TRIES, -1), -1):
        message = log.read(offset, _READ_S)
        if message is None:
            break
        try:
            visit = parse_announcement(message.content).visit
        except ValueError:
            continue
        return AnnouncedVisit(visit.visit, event_time_s(visit.midpoint_mjd_tai))
    return None


def source_lag(announced: Announced, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """`offset` of the message that the source reads next, `end` of the topic, `behind`: messages in between.

    `overdue`: those of them that were written more than `DUE_S` ago. None where it is not known: the source has told
    nothing since the job started or started again (it does so within seconds), or Kafka does not answer (`error`).
    """
    told = [stage["metrics"]["source_offset"] for stage in stages if "source_offset" in stage["metrics"]]
    offset = max(told, default=None)
    is_known = offset is not None and announced.end is not None
    return {
        "offset": offset,
        "end": announced.end,
        "behind": max(announced.end - offset, 0) if is_known else None,  # type: ignore[operator]
        "overdue": max(announced.due - offset, 0) if is_known else None,  # type: ignore[operator]
        "error": announced.error,
    }


def event_time_lag(announced: Announced, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The visit announced last, and how far the stage that is furthest behind stands short of it, in the night's clock.

    `has_begun`: whether event time has come to all stages since the job started or started again, which it does behind
    the first visit that is closed. `behind_s` is in seconds between midpoints, whatever clock time the work takes:
    with visits every 37 s, 74 are two visits; 0 when event time has passed the visit in all stages. `overdue_visit` is
    the last one that was announced more than `DUE_S` ago, if event time has not passed it in all stages.
    """
    marks = [(stage["watermark_ms"] / 1000.0, stage["name"]) for stage in stages if stage["watermark_ms"] is not None]
    mark, slowest = min(marks, default=(-math.inf, None))
    has_begun = mark > _NEVER_S
    behind = max(announced.newest.event_time_s - mark, 0.0) if has_begun and announced.newest is not None else None
    is_overdue = announced.overdue is not None and announced.overdue.event_time_s > mark
    return {
        "newest_visit": None if announced.newest is None else announced.newest.visit,
        "has_begun": has_begun,
        "behind_s": behind,
        "overdue_visit": announced.overdue.visit if announced.overdue is not None and is_overdue else None,
        "slowest": slowest if behind else None,
    }


def problems(told: dict[str, Any], checkpoint_interval_s: float) -> Iterator[str]:
    """What is wrong with a job, the worst first, from what `flink_operations.status` tells of it."""
    if told["state"] not in ("RUNNING", "CLOSED"):
        yield f"the job does not run: it is {told['state']}"
    if "stages" not in told:
        return
    failure, saved, source, event_time = (told[name] for name in ("last_failure", "checkpoint", "source", "event_time"))
    if failure is not None and failure["age_s"] < _RECENT_S:
        count = f"restarted {_times(told['restarts'])}, last failed" if told["restarts"] else "failed"
        yield f"{count} {failure['age_s']:.0f} s ago: {_short(failure['reason'])}"
    if told["state"] != "RUNNING":
        return
    if source["error"] is not None:
        yield f"Kafka does not tell what was announced: {source['error']}"
    if source["overdue"]:
        yield f"behind by {source['behind']} messages, {source['overdue']} of them announced over {DUE_S:.0f} s ago"
    if event_time["overdue_visit"] is not None:
        where = f"furthest behind: {_short(event_time['slowest'])}" if event_time["has_begun"] else "nothing is"
        yield f"visit {event_time['overdue_visit']}, announced over {DUE_S:.0f} s ago, is not through; {where}"
    age_s = told["uptime_s"] if saved is None else saved["age_s"]
    if age_s > max(_CHECKPOINT_S, _CHECKPOINT_INTERVALS * checkpoint_interval_s):
        yield f"no checkpoint for {age_s:.0f} s"
    elif saved is not None and saved["failing"]:
        yield "the latest checkpoint failed"
    for stage in told["stages"]:
        if stage["held_up"] is not None and stage["held_up"] > _HELD_UP:
            yield f"held up {stage['held_up']:.0%} of the time by those behind it: {_short(stage['name'])}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."

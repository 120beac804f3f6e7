"""How far a live job is behind what was announced, and what is wrong with it, in the words of who must mend it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from runners.kafka import KafkaMessageLog, KafkaUnreachableError, TopicError
from schemas.manifests import event_time_s, parse_announcement

_READ_S = 5.0
_TRIES = 5  # messages at the end of the topic that may be no announcements
# A checkpoint waits for the source to look up, and for a bundle: two minutes are not normal any more.
_CHECKPOINT_S, _CHECKPOINT_INTERVALS = 120.0, 3.0
_RECENT_S = 3600.0
_HELD_UP = 0.5


class Announced(NamedTuple):
    """What a topic of announcements holds.

    Attributes
    ----------
    end : offset that its next message will have, or None where Kafka does not tell
    visit, event_time_s : the visit announced last, and its event time; None where there is none
    error : why Kafka does not tell
    """

    end: int | None
    visit: int | None = None
    event_time_s: float | None = None
    error: str | None = None


def announced_so_far(options: dict[str, Any]) -> Announced:
    """The end of the topic that a live job with these options reads."""
    log = KafkaMessageLog(options["bootstrap"], options["topic"], options["kafka_config"])
    try:
        end = log.end()
    except (KafkaUnreachableError, TopicError, ValueError, OSError) as error:  # also a login that cannot be used
        return Announced(None, error=str(error))
    for offset in range(end - 1, max(end - 1 - _TRIES, -1), -1):
        message = log.read(offset, _READ_S)
        if message is None:
            break
        try:
            visit = parse_announcement(message.content).visit
        except ValueError:
            continue
        return Announced(end, visit.visit, event_time_s(visit.midpoint_mjd_tai))
    return Announced(end)


def source_lag(announced: Announced, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """`offset` of the message that the source reads next, `end` of the topic, `behind`: messages in between.

    None where it is not known: the source has told nothing since the job started or started again (it does so within
    seconds), or Kafka does not answer (`error`).
    """
    told = [stage["metrics"]["source_offset"] for stage in stages if "source_offset" in stage["metrics"]]
    offset = max(told, default=None)
    behind = None if offset is None or announced.end is None else max(announced.end - offset, 0)
    return {"offset": offset, "end": announced.end, "behind": behind, "error": announced.error}


def event_time_lag(announced: Announced, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The visit announced last, and how far the stage that is furthest behind stands short of it, in the night's clock.

    `has_begun`: whether event time has come to all stages since the job started or started again, which it does behind
    the first visit that is closed. `behind_s` is in seconds between midpoints, whatever clock time the work takes:
    with visits every 37 s, 74 are two visits; 0 when event time has passed the visit in all stages.
    """
    marks = [(stage["watermark_ms"] / 1000.0, stage["name"]) for stage in stages if stage["watermark_ms"] is not None]
    mark, slowest = min(marks, default=(None, None))
    has_begun = mark is not None and mark > -1e15
    behind = (
        max(announced.event_time_s - mark, 0.0)
        if has_begun and mark is not None and announced.event_time_s is not None
        else None
    )
    return {
        "newest_visit": announced.visit,
        "has_begun": has_begun,
        "behind_s": behind,
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
        yield f"restarted {_times(told['restarts'])}, last {failure['age_s']:.0f} s ago: {_short(failure['reason'])}"
    if told["state"] != "RUNNING":
        return
    if source["error"] is not None:
        yield f"Kafka does not tell what was announced: {source['error']}"
    if source["behind"]:
        yield f"behind by {source['behind']} messages"
    if event_time["newest_visit"] is not None and not event_time["has_begun"]:
        yield f"event time has not begun: visit {event_time['newest_visit']} and those before it are not through"
    elif event_time["behind_s"] is not None and event_time["behind_s"] >= 1.0:
        yield (
            f"event time is {event_time['behind_s']:.0f} s short of visit {event_time['newest_visit']}, "
            f"furthest behind: {_short(event_time['slowest'])}"
        )
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

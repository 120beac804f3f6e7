"""A live job on the Flink cluster, once the command that submitted it has returned: its state, savepoints and end.

What it was submitted with, and as which jobs of Flink it ran, stands in a file of its output folder: whoever has the
folder can go on with it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from runners.cluster.flink import ENDED, job_manager, overview, rest
from runners.cluster.processes import running_pid
from runners.cluster.settings import ClusterError, ClusterSettings, FlinkClusterSettings, load_cluster_settings
from runners.ledger import ledger_files, read_record
from runners.live_health import announced_so_far, event_time_lag, problems, source_lag

if TYPE_CHECKING:
    from runners.local import Dataflow
    from transforms.filters.definition import FilterProblem

RECORD = ".flink.json"
# Fixed at the first start, for ever: by it the keys are dealt out. The most slots that a job can grow to.
_KEY_GROUPS = 128
_SAVE_PATIENCE_S = 300.0
_LOOK_S = 0.2
_SLOTS_PATIENCE_S = 30.0  # a task manager holds the slot of a job that was lost for some time
LOST, CLOSED = "LOST", "CLOSED"
_FETCH_S = 0.7
# Flink's name of a metric of `transforms.metrics`, behind that of its operator.
_OURS = ".nightstream_"
_SHARES = ("backPressuredTimeMsPerSecond", "busyTimeMsPerSecond")


class LiveJobError(RuntimeError):
    """What is asked for cannot be done with this job; the message says why, and what can."""


@dataclass(frozen=True)
class FlinkRun:
    """One job of Flink: its id, what it was restored from, and the savepoints made of it."""

    job: str
    restored: str | None = None
    savepoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class LiveJob:
    """A live job: its output folder, the cluster's folder, what it was submitted with, and its runs, latest last.

    Attributes
    ----------
    out, cluster : folders
    options : of `nightstream flink submit`
    submitted_at : UNIX time
    runs : jobs of Flink, each but the first restored from one before
    closed : whether its books are closed; it cannot go on then
    """

    out: Path
    cluster: Path
    options: dict[str, Any]
    submitted_at: float
    runs: tuple[FlinkRun, ...] = ()
    closed: bool = False

    @property
    def latest(self) -> FlinkRun:
        return self.runs[-1]

    @property
    def settings(self) -> ClusterSettings:
        return load_cluster_settings(self.cluster)

    @property
    def flink(self) -> FlinkClusterSettings:
        return self.settings.flink

    def write(self) -> LiveJob:
        """Keep it in its output folder."""
        record = {
            "cluster": str(self.cluster),
            "options": self.options,
            "submitted_at": self.submitted_at,
            "runs": [asdict(run) for run in self.runs],
            "closed": self.closed,
        }
        partial = self.out / f"{RECORD}.part"
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.out / RECORD)
        return self


def read_live_job(out: Path) -> LiveJob:
    """The live job of an output folder; LiveJobError if there was none."""
    try:
        record = json.loads((out / RECORD).read_text("utf-8"))
    except FileNotFoundError as error:
        raise LiveJobError(f"{out} is no output folder of `nightstream flink submit`") from error
    runs = tuple(FlinkRun(run["job"], run["restored"], tuple(run["savepoints"])) for run in record["runs"])
    return LiveJob(
        out, Path(record["cluster"]), record["options"], record["submitted_at"], runs, closed=record["closed"]
    )


def start_live(job: LiveJob, dataflow: Dataflow, announce: Callable[[str], None], restored: str | None) -> LiveJob:
    """Submit the job, from a savepoint or checkpoint if `restored` names one; returns when all its tasks run.

    Parameters
    ----------
    job : LiveJob
        Its options name `parallelism` (0: one per slot) and `checkpoint_interval_s`.
    dataflow : Dataflow
    announce : told which line of versions runs
    restored : path of a savepoint or checkpoint

    Raises
    ------
    FlinkSetupError, ClusterError
        As `cluster_job`; before anything was submitted.
    LiveJobError
        Too few slots are free, or Flink did not restore what it was given.
    RuntimeError
        The job failed, or did not start.
    """
    from runners.flink import cluster_job, start_detached

    settings = job.flink
    wanted = job.options["parallelism"] or settings.slots
    interval_ms = round(1000 * job.options["checkpoint_interval_s"])
    arguments = (
        f"--parallelism={wanted}",
        f"--max_parallelism={_KEY_GROUPS}",
        f"--checkpointing_interval={interval_ms}",
        # While nothing is announced a checkpoint waits for the source; those that came due meanwhile are left out.
        f"--min_pause_between_checkpoints={interval_ms // 2}",
        # Otherwise what a bundle put out at a checkpoint is held back until something else comes, and the watermark is
        # not: what was held back would be late.
        "--finish_bundle_before_checkpointing",
        "--externalized_checkpoints_enabled",
        "--retain_externalized_checkpoints_on_cancellation",
        *([] if restored is None else [f"--savepoint_path={Path(restored).as_uri()}"]),
        *job.options["beam_options"],
    )
    submission = cluster_job(arguments, announce, job.out, job.cluster)
    deadline = time.monotonic() + _SLOTS_PATIENCE_S
    while (free := (overview(settings) or {}).get("slots-available", 0)) < wanted:
        if time.monotonic() > deadline:
            raise LiveJobError(f"the job needs {wanted} slots, {free} are free: {settings.rest_url}")
        time.sleep(_LOOK_S)
    number = start_detached(submission, dataflow)
    runs = (*job.runs, FlinkRun(number, restored))
    started = replace(job, runs=runs, closed=False).write()
    if restored is not None:
        known = checkpoints(started)["latest"]["restored"]
        if known is None or _path(known["external_path"]) != Path(restored):
            rest(settings, f"/jobs/{number}?mode=cancel", "PATCH")
            raise LiveJobError(f"Flink did not restore {restored}, but {known}: job {number} is cancelled")
    return started


def state_of(job: LiveJob) -> str:
    """Flink's word for the state of the job; LOST where its job manager does not know it, CLOSED at its very end."""
    if job.closed:
        return CLOSED
    settings = job.settings
    try:
        jobs = rest(settings.flink, "/jobs/overview")["jobs"]
    except ClusterError:
        if running_pid(settings, job_manager(settings.flink)) is None:
            return LOST
        raise
    return next((str(one["state"]) for one in jobs if one["jid"] == job.latest.job), LOST)


def checkpoints(job: LiveJob) -> dict[str, Any]:
    """What Flink says of the job's checkpoints."""
    return dict(rest(job.flink, f"/jobs/{job.latest.job}/checkpoints"))


def savepoint(job: LiveJob, *, cancel: bool = False) -> str:
    """Make a savepoint and return its path; with `cancel` the job ends with it.

    Raises
    ------
    LiveJobError
        The job does not run, or could not be saved.
    """
    state = state_of(job)
    if state != "RUNNING":
        raise LiveJobError(f"the job is {state}: only one that is RUNNING can be saved")
    place = f"/jobs/{job.latest.job}/savepoints"
    target = (job.cluster.absolute() / "flink" / "savepoints").as_uri()
    asked = rest(job.flink, place, "POST", {"target-directory": target, "cancel-job": cancel})
    deadline = time.monotonic() + _SAVE_PATIENCE_S
    while (told := rest(job.flink, f"{place}/{asked['request-id']}"))["status"]["id"] != "COMPLETED":
        if time.monotonic() > deadline:
            raise LiveJobError(f"no savepoint within {_SAVE_PATIENCE_S:g} s: {job.flink.rest_url}")
        time.sleep(_LOOK_S)
    if "location" not in told["operation"]:
        cause = str(told["operation"]["failure-cause"]["stack-trace"]).strip().splitlines()
        raise LiveJobError(f"no savepoint: {cause[-1].removeprefix('Caused by: ')}")
    made = str(_path(told["operation"]["location"]))
    latest = replace(job.latest, savepoints=(*job.latest.savepoints, made))
    replace(job, runs=(*job.runs[:-1], latest)).write()
    return made


def latest_saved(job: LiveJob) -> str:
    """The newest complete checkpoint or savepoint of the latest run that has one; LiveJobError if there is none.

    A run that was lost before its first one goes on from what it was restored from itself.
    """
    for run in reversed(job.runs):
        folder = job.cluster.absolute() / "flink" / "checkpoints" / run.job
        made = [*folder.glob("chk-*/_metadata"), *(Path(path) / "_metadata" for path in run.savepoints)]
        kept = [path for path in made if path.is_file()]
        if kept:
            return str(max(kept, key=lambda path: path.stat().st_mtime_ns).parent)
        if run.restored is not None:
            return run.restored
    raise LiveJobError("there is no checkpoint of this job: submit it again, from the beginning of the topic")


def cancel(job: LiveJob) -> None:
    """End the job at once; its checkpoints stay. LiveJobError if it does not run."""
    state = state_of(job)
    if state in (*ENDED, LOST, CLOSED):
        raise LiveJobError(f"the job is {state}")
    rest(job.flink, f"/jobs/{job.latest.job}?mode=cancel", "PATCH")
    await_end(job)


def await_end(job: LiveJob) -> None:
    """Return when the job has ended."""
    deadline = time.monotonic() + _SAVE_PATIENCE_S
    while state_of(job) not in (*ENDED, LOST, CLOSED):
        if time.monotonic() > deadline:
            raise LiveJobError(f"the job did not end within {_SAVE_PATIENCE_S:g} s: {job.flink.rest_url}")
        time.sleep(_LOOK_S)


def close(job: LiveJob, filter_problems: tuple[FilterProblem, ...]) -> None:
    """Write what can only be written when the job is over, and remove what it would need to go on.

    That is the store of the packets and pixels, and its own checkpoints; savepoints that were asked for stay, but can
    no longer be resumed.

    Raises
    ------
    LiveJobError
        It may still run.
    """
    from runners.output_folder import close_books, remove_scratch

    state = state_of(job)
    if state not in (*ENDED, LOST, CLOSED):
        raise LiveJobError(f"the job is {state}: cancel it first")
    close_books(job.out, filter_problems)
    remove_scratch(job.out)
    for run in job.runs:
        shutil.rmtree(job.cluster / "flink" / "checkpoints" / run.job, ignore_errors=True)
    replace(job, closed=True).write()


def status(job: LiveJob) -> dict[str, Any]:
    """How the job stands, as Flink and the ledger tell it; JSON types only.

    Keys: `out`, `job`, `state`, `ledger`, `problems`; of a job that Flink knows also `uptime_s`, `restarts`,
    `last_failure`, `checkpoint`, `restored`, `stages`, `source` and `event_time`.
    """
    told = _standing(job, state_of(job))
    return {**told, "problems": list(problems(told, job.options["checkpoint_interval_s"]))}


def _standing(job: LiveJob, state: str) -> dict[str, Any]:
    told = {"out": str(job.out), "job": job.latest.job, "state": state, "ledger": ledger_figures(job.out)}
    if state in (LOST, CLOSED):
        return told
    place = f"/jobs/{job.latest.job}"
    flink_job, saved = rest(job.flink, place), checkpoints(job)
    asked_at = time.monotonic()
    # Flink fetches the figures of its tasks anew when it is asked for them, and tells those it had before.
    rest(job.flink, f"{place}/vertices/{flink_job['vertices'][0]['id']}/subtasks/metrics")
    announced = announced_so_far(job.options)
    time.sleep(max(0.0, asked_at + _FETCH_S - time.monotonic()))
    stages = list(_stages(job, flink_job["vertices"]))
    restarts = rest(job.flink, f"{place}/metrics?get=numRestarts")
    return {
        **told,
        "last_failure": _last_failure(job, flink_job["now"]),
        "source": source_lag(announced, stages),
        "event_time": event_time_lag(announced, stages),
        "uptime_s": (flink_job["now"] - flink_job["start-time"]) / 1000.0,
        "restarts": int(restarts[0]["value"]) if restarts else 0,
        "checkpoint": _latest_checkpoint(saved, flink_job["now"]),
        "restored": _restored(saved),
        "stages": stages,
    }


def ledger_figures(out: Path) -> dict[str, Any]:
    """Visits, alerts and failures in the ledger so far, and how late alerts were (`transforms.latency`)."""
    from transforms.latency import night_latency

    records = [record for path in ledger_files(out) if (record := read_record(path)) is not None]
    return {
        "visits": len(records),
        "alerts": sum(record.get("alerts") or 0 for record in records),
        "failures": sum(record.get("failures") or 0 for record in records),
        "latency": night_latency(records),
    }


def _latest_checkpoint(saved: dict[str, Any], now_ms: int) -> dict[str, Any] | None:
    latest = saved["latest"]["completed"]
    if latest is None:
        return None
    failed = saved["latest"]["failed"]
    return {
        "number": latest["id"],
        "failing": failed is not None and failed["trigger_timestamp"] > latest["trigger_timestamp"],
        "age_s": (now_ms - latest["trigger_timestamp"]) / 1000.0,
        "seconds": latest["end_to_end_duration"] / 1000.0,
        "state_bytes": latest["state_size"],
        "path": str(_path(latest["external_path"])),
        "completed": saved["counts"]["completed"],
        "failed": saved["counts"]["failed"],
    }


def _last_failure(job: LiveJob, now_ms: int) -> dict[str, Any] | None:
    """Why the job was started again last, in one line, and how long ago."""
    told = rest(job.flink, f"/jobs/{job.latest.job}/exceptions?maxExceptions=1")["exceptionHistory"]["entries"]
    if not told:
        return None
    lines = [line.strip() for line in told[0]["stacktrace"].splitlines()]
    reasons = [line for line in lines if line and not line.startswith(("at ", "... "))]
    reason = reasons[-1].removeprefix("Caused by: ") if reasons else told[0]["exceptionName"]
    return {"age_s": (now_ms - told[0]["timestamp"]) / 1000.0, "reason": re.sub(r"^(\w+\.)+(?=\w+: )", "", reason)}


def _restored(saved: dict[str, Any]) -> str | None:
    latest = saved["latest"]["restored"]
    return None if latest is None else str(_path(latest["external_path"]))


def _stages(job: LiveJob, vertices: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each task of the job: how much of its time it is busy or held up by those behind it, watermark, our metrics."""
    for vertex in vertices:
        place = f"/jobs/{job.latest.job}/vertices/{vertex['id']}"
        known = [one["id"] for one in rest(job.flink, f"{place}/subtasks/metrics")]
        ours = {name: own[1] for name in known if len(own := name.split(_OURS)) == 2}
        figures = rest(job.flink, f"{place}/subtasks/metrics?get={quote(','.join((*_SHARES, *ours)))}")
        shares = {one["id"]: float(one["max"]) for one in figures if one["id"] in _SHARES}
        marks = [int(one["value"]) for one in rest(job.flink, f"{place}/watermarks")]
        # Not a number for a source, which is not measured.
        held, busy = (shares.get(name, math.nan) / 1000.0 for name in _SHARES)
        yield {
            "name": vertex["name"],
            "held_up": None if math.isnan(held) else held,
            "busy": None if math.isnan(busy) else busy,
            "watermark_ms": min(marks, default=None),
            "metrics": {ours[one["id"]]: round(one["sum"]) for one in figures if one["id"] in ours},
        }


def _path(uri: str) -> Path:
    return Path(uri.removeprefix("file:"))

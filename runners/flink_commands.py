"""The commands `nightstream flink submit | status | watch | savepoint | resume | cancel | close`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from runners.live_commands import announced_options
from runners.run_commands import (
    BEAM_OPTIONS,
    FLINK_CLUSTER,
    HISTORY,
    KAFKA_CONFIG,
    BadUsage,
    Failure,
    ManyValuesCommand,
    in_short,
    request_options,
    run_request,
    tell_result,
)

if TYPE_CHECKING:
    from runners.flink_operations import LiveJob
    from runners.local import Dataflow
    from runners.running import Entry

# Errors whose message is for a person, by name: to import them all takes as long as Beam does.
_MISUSES = {
    "runners.configuration.ConfigurationError",
    "runners.entries.HistoryError",
    "runners.kafka_login.KafkaLoginError",
    "runners.local.BeamOptionsError",
    "runners.output_folder.OutputFolderError",
}
_FAILURES = {
    "runners.cluster.settings.ClusterError",
    "runners.flink_operations.LiveJobError",
    "runners.flink_setup.FlinkSetupError",
    "runners.kafka.KafkaUnreachableError",
    "runners.kafka.TopicError",
    "schemas.manifests.ManifestError",
}
_OUT = click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
_PARALLELISM = click.option("--parallelism", type=click.IntRange(1, 128), help="Slots to use. [default: all]")
_AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@click.group()
def flink() -> None:
    """A live night as a job of its own on the Flink cluster that `nightstream cluster up` started.

    It is known by its output folder, and goes on until it is cancelled.
    """


@flink.command(cls=ManyValuesCommand)
@announced_options
@request_options
@click.option(
    "--kafka", default="none", show_default=True, metavar="none|HOST:PORT", help="Kafka for sinks of that kind."
)
@KAFKA_CONFIG
@_PARALLELISM
@click.option(
    "--checkpoint-interval",
    "checkpoint_interval_s",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="Seconds from one checkpoint to the next.",
)
@click.option(
    "--cluster",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the cluster. Default: .cluster of the checkout.",
)
@HISTORY
@BEAM_OPTIONS
def submit(**options: Any) -> None:
    """Run the whole chain on visits as they are announced, as a job that goes on without this command.

    Returns when all its tasks run, with Flink's id of the job on stdout. Into a folder that holds output of the same
    input it starts again from the beginning of the topic; `resume` goes on where it was. Options are those of
    `nightstream live`.

    Options of Apache Beam follow `--`.
    """
    from runners.cluster.settings import FOLDER
    from runners.flink_operations import LiveJob, start_live
    from runners.running import claimed_entry

    kept = {name: _plain(value) for name, value in options.items()}
    with _told():
        asked = _Asked(kept)
        entry = claimed_entry(asked.request, asked.given, asked.kafka)
        job = LiveJob(asked.request.out, Path(kept["cluster"] or FOLDER), kept, time.time())
        started = start_live(job, asked.dataflow(entry), _say, None)
        _note(started, "submitted")
    click.echo(started.latest.job)


@flink.command()
@_OUT
@_AS_JSON
def status(out: Path, as_json: bool) -> None:
    """How the job that writes to OUT stands: Flink's state of it, checkpoints, load, and what the ledger holds."""
    from runners.flink_operations import status as status_of

    with _live_job(out) as job:
        told = status_of(job)
    if as_json:
        click.echo(json.dumps(told))
        return
    for line in status_lines(told):
        click.echo(line)


@flink.command()
@_OUT
def savepoint(out: Path) -> None:
    """Save the state of the job that writes to OUT; it goes on. Prints the savepoint's path."""
    from runners.flink_operations import savepoint as save

    with _live_job(out) as job:
        saved = save(job)
        _note(job, f"saved to {saved}")
    click.echo(saved)


@flink.command()
@_OUT
@click.option("--savepoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Go on from this one.")
@click.option("--parallelism", type=click.IntRange(1, 128), help="Slots to use. [default: as before]")
def resume(out: Path, savepoint: Path | None, parallelism: int | None) -> None:
    """Go on with a job that ended or was lost, from its newest checkpoint or savepoint, by the code as it is now.

    Its settings are those that it was submitted with; files of settings are read anew.
    """
    from runners.cluster.flink import ENDED
    from runners.flink_operations import LOST, LiveJobError, latest_saved, start_live, state_of
    from runners.output_folder import renew_claim
    from runners.running import entered, run_digest

    with _live_job(out) as job:
        state = state_of(job)
        if state not in (*ENDED, LOST):
            raise LiveJobError(f"the job is {state}")
        restored = latest_saved(job) if savepoint is None else str(savepoint.absolute())
        asked = _Asked({**job.options, "parallelism": parallelism or job.options["parallelism"]})
        entry = entered(asked.request, asked.given, asked.kafka)
        renew_claim(job.out, asked.given.source, run_digest(asked.request, asked.given))
        started = start_live(replace(job, options=asked.options), asked.dataflow(entry), _say, restored)
        _note(started, f"resumed from {restored}")
    click.echo(started.latest.job)


@flink.command()
@_OUT
@click.option("--savepoint", "saving", is_flag=True, help="Save its state first, and print the savepoint's path.")
def cancel(out: Path, saving: bool) -> None:
    """End the job that writes to OUT. `resume` can go on with it, until `close`."""
    from runners.flink_operations import await_end
    from runners.flink_operations import cancel as end
    from runners.flink_operations import savepoint as save

    with _live_job(out) as job:
        if saving:
            saved = save(job, cancel=True)
            click.echo(saved)
            await_end(job)
            _note(job, f"cancelled, saved to {saved}")
        else:
            end(job)
            _note(job, "cancelled")


@flink.command()
@_OUT
@_AS_JSON
def close(out: Path, as_json: bool) -> None:
    """Close the books of a job that has ended: the ledger's list, the tables of objects, the report.

    What it would need to go on is removed: `resume` is no longer possible.
    """
    from runners.flink_operations import close as close_job

    with _live_job(out) as job:
        problems = _Asked(job.options).request.filter_problems
        close_job(job, problems)
        _note(job, "closed")
    tell_result(
        None, job.out, time.time() - job.submitted_at, {}, as_json=as_json, quiet=False, console=Console(stderr=True)
    )


@flink.command()
@_OUT
@click.option("--visits", "n_visits", type=click.IntRange(min=1), required=True, help="Stop when so many are done.")
@click.option(
    "--patience",
    "patience_s",
    type=click.FloatRange(min=0, min_open=True),
    default=math.inf,
    help="Seconds after which to stop when nothing is announced and nothing gets through; for ever by default.",
)
def watch(out: Path, n_visits: int, patience_s: float) -> None:
    """Show visits as the job that writes to OUT gets through with them, and how late their alerts are.

    Ends when --visits of them are in the ledger, with exit code 1 if the job ends before, or at the end of --patience.
    Ctrl-C ends the watching only.
    """
    from runners.watching import watch as watch_job

    with _live_job(out) as job:
        watch_job(job, n_visits, patience_s)


def status_lines(told: dict[str, Any]) -> Iterator[str]:
    """What `flink_operations.status` tells, for a person; what is wrong comes first."""
    from runners.progress import latency_text

    ledger, saved = told["ledger"], told.get("checkpoint")
    yield f"job {told['job']} {told['state']}{'' if told['problems'] else ', nothing wrong'}"
    for problem in told["problems"]:
        yield f"! {problem}"
    if "uptime_s" in told:
        yield f"  runs for {told['uptime_s']:.0f} s, was started again {told['restarts']} times"
        restored = told["restored"]
        if restored is not None:
            yield f"  restored from {restored}"
        yield (
            "  no checkpoint yet"
            if saved is None
            else (
                f"  checkpoint {saved['number']} {saved['age_s']:.0f} s ago, took {saved['seconds']:.1f} s, "
                f"{saved['state_bytes'] / 1e6:.2f} MB of state; {saved['failed']} of "
                f"{saved['completed'] + saved['failed']} failed"
            )
        )
    if told["state"] == "RUNNING":
        source, event_time = told["source"], told["event_time"]
        yield (
            f"  source at message {_known(source['offset'])} of {_known(source['end'])}; newest visit "
            f"{_known(event_time['newest_visit'])}, event time {_known(event_time['behind_s'], '.0f')} s short of it"
        )
        for stage in told["stages"]:
            name = stage["name"] if len(stage["name"]) <= 60 else stage["name"][:57] + "..."
            yield f"  {name:<60} busy {_share(stage['busy'])}, held up {_share(stage['held_up'])}"
    yield f"  ledger: {ledger['visits']} visits, {ledger['alerts']:,} alerts, {ledger['failures']} failures"
    if ledger["latency"] is not None:
        yield f"  {latency_text(ledger['latency'])}"


def _known(figure: float | None, form: str = "") -> str:
    return "unknown" if figure is None else format(figure, form)


def _share(part: float | None) -> str:
    return "   -" if part is None else f"{part:4.0%}"


class _Asked:
    """What a live job was asked for: the request and its input, from the options that were kept."""

    def __init__(self, options: dict[str, Any]) -> None:
        from runners.entries import AnnouncedVisits, stream_input
        from runners.running import reached_kafka

        self.options = options
        self.request = run_request(
            {**_paths(options), "runner": FLINK_CLUSTER, "quiet": False}, {}, Console(stderr=True)
        )
        announced = AnnouncedVisits(
            options["bootstrap"],
            options["topic"],
            _path(options["known_objects"]),
            options["visit_timeout_s"],
            stop_at_end=False,
        )
        self.given = stream_input(announced, self.request, tuple(Path(folder) for folder in options["history"]))

        self.kafka = reached_kafka(self.request)

    def dataflow(self, entry: Entry) -> Dataflow:
        from runners.running import delivery_of

        return entry.dataflow(delivery_of(self.request, entry, self.kafka))


def _note(job: LiveJob, what: str) -> None:
    """What was done to a job, for whoever looks into the logs of its cluster; done it is also where they are full."""
    from runners.logs import note_command

    try:
        note_command(job.settings.logs, what, job=job.latest.job, out=job.out)
    except OSError as error:
        _say(f"not noted in the cluster's logs: {error}")


def _plain(value: Any) -> Any:
    """An option as JSON can hold it, its paths as everybody finds them."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value.absolute()) if isinstance(value, Path) else value


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _paths(options: dict[str, Any]) -> dict[str, Any]:
    return {
        **options,
        **{name: _path(options[name]) for name in ("out", "config", "brokers", "filters", "kafka_config")},
    }


def _say(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def _told() -> Iterator[None]:
    """What went wrong as a message."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        raise _as_message(error) from error


def _as_message(error: Exception) -> click.ClickException:
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if kinds & _MISUSES:
        return BadUsage(str(error))
    return Failure(str(error) if kinds & _FAILURES else f"the job failed: {in_short(error)}")


@contextmanager
def _live_job(out: Path) -> Iterator[LiveJob]:
    """The live job of an output folder; what went wrong as a message."""
    from runners.flink_operations import read_live_job

    with _told():
        yield read_live_job(out.absolute())

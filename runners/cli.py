"""The command `nightstream`."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from runners.ingest.commands import ingest

PROGRAM = "nightstream"
EXIT_FAILED = 1
EXIT_USAGE = 2
DEFAULT_SEED = 20261122
_RUNNERS = ("local", "flink")
_PRESETS = ("tiny", "demo", "detector")
_FOLDER = click.Path(path_type=Path)
_EXISTING = click.Path(exists=True, path_type=Path)


class _Failure(click.ClickException):
    """The run as a whole failed."""

    exit_code = EXIT_FAILED


class _BadUsage(click.ClickException):
    """An argument, a configuration or a folder that cannot be used."""

    exit_code = EXIT_USAGE


class _ManyValuesCommand(click.Command):
    """Lets `--history A B C` stand for `--history A --history B --history C`."""

    many = "--history"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        taking = False
        for arg in args:
            if arg.startswith("-"):
                taking = arg == self.many
                if not taking:
                    spread.append(arg)
            elif taking:
                spread += [self.many, arg]
            else:
                spread.append(arg)
        return super().parse_args(ctx, spread)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version(PROGRAM), prog_name=PROGRAM)
def main() -> None:
    """From visits read out to alert packets in brokers' hands.

    \b
    A first look, without any data of your own:
      nightstream simulate --preset tiny --out night
      nightstream produce night --out result --kafka embedded
      nightstream listen result/archive/alerts --limit 1
    """
    # Libraries warn at import of what a person here can do nothing about; what matters comes as an exception.
    logging.basicConfig(level=logging.ERROR)


@main.command(cls=_ManyValuesCommand)
@click.argument("night", type=_EXISTING)
@click.option("--out", required=True, type=_FOLDER, help="Output folder; empty, or that of the same input.")
@click.option("--config", type=_EXISTING, help="YAML laid over the shipped alert_production.yaml.")
@click.option("--brokers", type=_EXISTING, help="YAML list of brokers instead of the shipped one.")
@click.option("--filters", type=_EXISTING, help="Folder of filter YAML files instead of the shipped examples.")
@click.option("--history", type=_EXISTING, multiple=True, help="Output folders of earlier nights. [OUT0 ...]")
@click.option(
    "--runner", type=click.Choice(["local", "flink"]), default="local", show_default=True, help="Where it runs."
)
@click.option(
    "--kafka",
    default="none",
    show_default=True,
    metavar="none|embedded|HOST:PORT",
    help="Kafka for sinks of that kind; embedded also starts one reader per broker.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
@click.argument("beam_options", nargs=-1, type=click.UNPROCESSED)
def produce(
    night: Path,
    out: Path,
    config: Path | None,
    brokers: Path | None,
    filters: Path | None,
    history: tuple[Path, ...],
    runner: str,
    kafka: str,
    as_json: bool,
    quiet: bool,
    beam_options: tuple[str, ...],
) -> None:
    """Run the whole chain on NIGHT, a folder with visits.jsonl.

    Subtracts, detects, associates, packages, filters, delivers and archives. What cannot be processed
    is listed under OUT/failures, the rest goes on: exit code 0. Exit code 1 means that the run as a
    whole failed (run it again into the same OUT: it gives the same bytes), 2 that an argument or a file
    of settings is wrong.

    Options of Apache Beam follow `--`.
    """
    from runners.configuration import (
        ConfigurationError,
        brokers_with_streams,
        check_broker_streams,
        load_brokers,
        load_checked_filters,
        load_production_config,
    )
    from runners.kafka import KafkaUnreachableError
    from runners.local import BeamOptionsError, HistoryError, OutputFolderError, ProduceRequest
    from runners.local import produce as run_produce
    from runners.progress import VisitProgress
    from schemas.manifests import ManifestError, night_folder

    console = Console(stderr=True)
    if kafka not in ("none", "embedded") and not _is_address(kafka):
        raise _BadUsage(f"--kafka {kafka!r}: expected none, embedded or HOST:PORT")
    try:
        checked, problems = load_checked_filters(filters)
        chosen = load_brokers(brokers)
        if brokers is not None and not problems:
            check_broker_streams(chosen, checked, str(brokers))
        # A filter that cannot run costs its own readers their stream, nobody else anything; nor must other
        # filters than the shipped ones keep the shipped brokers from theirs.
        served = brokers_with_streams(chosen, checked)
        request = ProduceRequest(
            night=night,
            out=out,
            config=load_production_config(config),
            brokers=served,
            filters=checked,
            filter_problems=problems,
            history=history,
            kafka=kafka,
            beam_options=beam_options,
        )
    except ConfigurationError as error:
        raise _BadUsage(str(error)) from error
    for problem in problems:
        console.print(f"filter left out: {problem.file}: {problem.key or 'file'}: {problem.reason}", markup=False)
    for broker in chosen:
        if broker not in served:
            console.print(f"broker left out: {broker.name}: there is no stream {broker.stream}", markup=False)
    unserved = [broker.name for broker in served if broker.sink == "kafka"]
    if kafka == "none" and unserved and not quiet:
        console.print(f"--kafka is none: nothing is sent to {', '.join(unserved)}", markup=False)
    try:
        engine = _engine(runner, beam_options, console)
        result = run_produce(request, lambda n_visits: VisitProgress(out, n_visits, quiet=quiet), engine)
    except (OutputFolderError, HistoryError, BeamOptionsError) as error:
        raise _BadUsage(str(error)) from error
    except (ManifestError, KafkaUnreachableError) as error:
        raise _Failure(str(error)) from error
    except _SetupNeededError as error:
        raise _Failure(str(error)) from error
    except (RuntimeError, OSError) as error:
        raise _Failure(f"the run failed: {_in_short(error)}; mend the cause and run the same command again") from error
    for name, receipt in result.receipts.items():
        if receipt.first_problem is not None:
            console.print(f"reader of {name}: {receipt.first_problem}", markup=False)
    received = {name: receipt.received for name, receipt in result.receipts.items()}
    _tell(night_folder(night), out, result.seconds, received, as_json=as_json, quiet=quiet, console=console)


class _SetupNeededError(Exception):
    """What the chosen runner needs is not there; the message says which command gets it."""


@contextlib.contextmanager
def _engine(runner: str, beam_options: tuple[str, ...], console: Console) -> Iterator[Any]:
    """What runs the dataflow."""
    if runner == "local":
        from runners.local import local_engine

        with local_engine(beam_options) as run:
            yield run
        return
    from runners.flink import flink_engine
    from runners.flink_setup import FlinkSetupError

    try:
        with flink_engine(beam_options, lambda text: console.print(text, markup=False)) as run:
            yield run
    except FlinkSetupError as error:
        raise _SetupNeededError(str(error)) from error


def _tell(
    night: Path,
    out: Path,
    seconds: float,
    received: dict[str, int],
    *,
    as_json: bool,
    quiet: bool,
    console: Console,
) -> None:
    from runners.report import write_report
    from runners.summary import UnreadableOutputError, json_summary, print_summary, recovered, summarise

    summary = summarise(out)
    try:
        write_report(out, night)
        if not quiet:
            where = console if as_json else Console()
            print_summary(
                where, summary, out=out, seconds=seconds, recovery=recovered(night, out), received=received or None
            )
    except (UnreadableOutputError, OSError) as error:  # the alerts are out: their report is not what a run is for
        console.print(f"the run is complete, its report is not: {error}", markup=False)
    if as_json:
        click.echo(json.dumps(json_summary(summary, seconds)))


@main.command()
@click.option("--preset", type=click.Choice(_PRESETS), default="tiny", show_default=True, help="How much sky.")
@click.option("--out", required=True, type=_FOLDER, help="Night folder to write.")
@click.option("--seed", default=DEFAULT_SEED, show_default=True, help="Everything random follows from it.")
@click.option("--nights", default=1, show_default=True, type=click.IntRange(1, 30), help="Nights of the same sky.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def simulate(preset: str, out: Path, seed: int, nights: int, as_json: bool, quiet: bool) -> None:
    """Simulate a night of images with everything that moves and varies in it, and the truth.

    \b
    tiny      4 visits, 2 detectors of 512 x 512 pixels, for a first try and for tests
    demo      12 visits, 2 detectors of 1024 x 1024 pixels, two bands
    detector  1 visit, 1 detector of 4096 x 4096 pixels, for performance work
    """
    from pipelines.night_simulation import NightSimulationError, simulate_night

    console = Console(stderr=True)
    try:
        with _image_progress(console, quiet) as progress:
            simulated = simulate_night(preset, out, seed, progress, nights=nights)
    except NightSimulationError as error:
        raise _BadUsage(str(error)) from error
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in simulated._asdict().items()}
    if as_json:
        click.echo(json.dumps(facts))
    elif not quiet:
        click.echo(
            f"{facts['visits']} visits, {facts['exposures']} exposures and {facts['templates']} templates in {out}; "
            f"{facts['injected']} injected appearances, {facts['detectable']} of them above S/N 5"
        )


@contextlib.contextmanager
def _image_progress(console: Console, quiet: bool) -> Iterator[Any]:
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("images", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show


@main.command()
@click.argument("path", required=False, type=_EXISTING)
@click.option("--bootstrap", metavar="HOST:PORT", help="Kafka broker to read from.")
@click.option("--topic", help="Topic to read.")
@click.option("--group", help="Consumer group; without one, from the start each time.")
@click.option("--idle-timeout", "idle_timeout_s", type=click.FloatRange(min=0), help="Stop after so many idle seconds.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many packets.")
@click.option("--no-cutouts", is_flag=True, help="Leave out the sizes of the cutouts.")
def listen(
    path: Path | None,
    bootstrap: str | None,
    topic: str | None,
    group: str | None,
    idle_timeout_s: float | None,
    limit: int | None,
    no_cutouts: bool,
) -> None:
    """Read alert packets as a broker would and print each as one JSON line.

    Reads PATH (an Avro container or a folder of them), or a topic. Ids are printed as text, as they
    exceed what JSON numbers hold; cutouts as their sizes.
    """
    from runners.kafka import KafkaUnreachableError
    from runners.listening import PacketFileError, TopicReadError, listen_path, listen_topic
    from schemas.avro.reading import decode_message, to_json
    from schemas.avro.wire import PacketFormatError

    if (path is None) == (bootstrap is None) or (bootstrap is None) != (topic is None):
        raise _BadUsage("give either PATH, or both --bootstrap and --topic")
    n_bad = 0
    try:
        if path is not None:
            packets: Iterator[dict[str, Any]] = listen_path(path)
        else:
            messages = listen_topic(str(bootstrap), str(topic), group=group, idle_timeout_s=idle_timeout_s, limit=limit)
            packets = _decoded(messages, decode_message)
        for count, packet in enumerate(packets, start=1):
            if packet:
                click.echo(to_json(packet, cutout_sizes=not no_cutouts))
            else:
                n_bad += 1
            if count == limit:
                break
    except (PacketFileError, PacketFormatError, TopicReadError, KafkaUnreachableError) as error:
        raise _Failure(str(error)) from error
    except BrokenPipeError:  # the reader of our output has gone: `nightstream listen ... | head`
        sys.stdout = None
    if n_bad:
        raise _Failure(f"{n_bad} messages could not be decoded")


def _decoded(messages: Iterator[bytes], decode: Any) -> Iterator[dict[str, Any]]:
    """Packets of messages; an empty one stands for a message that is none, after a line on stderr."""
    from schemas.avro.wire import PacketFormatError

    for message in messages:
        try:
            yield decode(message)
        except PacketFormatError as error:
            click.echo(f"message left out: {error}", err=True)
            yield {}


main.add_command(ingest)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536


def _in_short(error: BaseException) -> str:
    """What went wrong first, without the runner's frames."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else text[:500] + " ..."

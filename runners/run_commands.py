"""The commands that run the chain: `produce`, `associate` and `replay`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

if TYPE_CHECKING:
    from runners.local import Run
    from runners.running import RunInput, RunRequest

FLINK_CLUSTER = "flink-cluster"
_FOLDER = click.Path(path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)


class Failure(click.ClickException):
    """The run as a whole failed."""

    exit_code = 1


class BadUsage(click.ClickException):
    """An argument, a configuration or a folder that cannot be used."""

    exit_code = 2


class ManyValuesCommand(click.Command):
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


KAFKA_CONFIG = click.option(
    "--kafka-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Properties file with the login to Kafka; all workers must see it.",
)
HISTORY = click.option("--history", type=EXISTING, multiple=True, help="Output folders of earlier nights. [OUT0 ...]")


def request_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every run is asked for alike, wherever it runs, but for Kafka."""
    options = (
        click.option("--out", required=True, type=_FOLDER, help="Output folder; empty, or that of the same input."),
        click.option("--config", type=EXISTING, help="YAML laid over the shipped alert_production.yaml."),
        click.option("--brokers", type=EXISTING, help="YAML list of brokers instead of the shipped one."),
        click.option("--filters", type=EXISTING, help="Folder of filter YAML files instead of the shipped examples."),
    )
    return with_options(command, options)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that all entries share."""
    options = (
        click.option(
            "--runner",
            type=click.Choice(["local", "flink", FLINK_CLUSTER]),
            default="local",
            show_default=True,
            help="Where it runs: here, on an embedded Flink, or on that of `cluster up flink`.",
        ),
        click.option(
            "--kafka",
            default="none",
            show_default=True,
            metavar="none|embedded|HOST:PORT",
            help="Kafka for sinks of that kind; embedded also starts one reader per broker.",
        ),
        KAFKA_CONFIG,
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr."),
        click.option("--quiet", is_flag=True, help="No progress, no table."),
    )
    return request_options(with_options(command, options))


def with_options(
    command: Callable[..., None], options: Iterable[Callable[[Callable[..., None]], Callable[..., None]]]
) -> Callable[..., None]:
    """A command with more options, in the order given."""
    for option in reversed(tuple(options)):
        command = option(command)
    return command


BEAM_OPTIONS = click.argument("beam_options", nargs=-1, type=click.UNPROCESSED)


@click.command(cls=ManyValuesCommand)
@click.argument("night", type=EXISTING)
@run_options
@HISTORY
@BEAM_OPTIONS
def produce(night: Path, history: tuple[Path, ...], **options: Any) -> None:
    """Run the whole chain on NIGHT, a folder with visits.jsonl.

    Subtracts, detects, associates, packages, filters, delivers and archives. What cannot be processed
    is listed under OUT/failures, the rest goes on: exit code 0. Exit code 1 means that the run as a
    whole failed (run it again into the same OUT: it gives the same bytes), 2 that an argument or a file
    of settings is wrong.

    Options of Apache Beam follow `--`.
    """
    from runners.entries import night_input
    from schemas.manifests import night_folder

    night, *earlier = _placed(options, night, *history)
    run_command(options, lambda request: night_input(night, request, tuple(earlier)), night=night_folder(night))


@click.command(cls=ManyValuesCommand)
@click.argument("table", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@run_options
@HISTORY
@BEAM_OPTIONS
def associate(table: Path, history: tuple[Path, ...], **options: Any) -> None:
    """Run the chain from association on, on TABLE, a Parquet file of diaSources.

    Columns are named as in the alert packet; required are diaSourceId, visit, detector, band, midpointMjdTai,
    ra, dec, psfFlux, psfFluxErr and snr. Without pixels there is no forced photometry and there are no cutouts.
    Rows that cannot be used are listed under OUT/failures, the rest goes on. Exit codes as for `produce`.

    \b
    nightstream ingest ztf-detections ../shared/data/ztf_alerts --out ztf.parquet
    nightstream associate ztf.parquet --out result

    Options of Apache Beam follow `--`.
    """
    from runners.entries import table_input
    from schemas.manifests import ManifestError
    from schemas.source_tables import table_radius_arcsec

    try:
        radius_arcsec = table_radius_arcsec(table)
    except ManifestError as error:
        raise Failure(str(error)) from error
    asked = {} if radius_arcsec is None else {"association": {"radius_arcsec": radius_arcsec}}
    table, *earlier = _placed(options, table, *history)
    run_command(options, lambda request: table_input(table, request, tuple(earlier)), asked=asked)


@click.command()
@click.argument("packets", nargs=-1, required=True, type=EXISTING)
@run_options
def replay(packets: tuple[Path, ...], **options: Any) -> None:
    """Send archived alert packets through filters to brokers, their own bytes unchanged.

    PACKETS are files or folders: Avro containers, LSST wire messages, tars of such files, also behind gzip;
    of LSST or ZTF, not both. In folders, files named .avro, .tar, .tar.gz, .tgz and .avro.gz count. ZTF packets
    go to the topic ztf-alerts. Packets that cannot be used are listed under OUT/failures, the rest goes on.
    No archive is written. Exit codes as for `produce`.

    \b
    nightstream replay result/archive/alerts --out again --kafka embedded
    nightstream replay ../shared/data/ztf_alerts/packets --out ztf --filters my-filters
    """
    from runners.entries import packets_input

    quiet = options["quiet"]
    with _packet_count(quiet) as tell:
        placed = _placed(options, *packets)
        run_command({**options, "beam_options": ()}, lambda request: packets_input(placed, request, tell))


def _placed(options: dict[str, Any], *paths: Path) -> tuple[Path, ...]:
    """The paths as all workers find them: those of the cluster run in a folder of their own."""
    return tuple(path.absolute() for path in paths) if options["runner"] == FLINK_CLUSTER else paths


def run_command(
    options: dict[str, Any],
    open_input: Callable[[RunRequest], RunInput],
    *,
    night: Path | None = None,
    asked: dict[str, Any] | None = None,
) -> None:
    """What the three commands do: settings, run, summary.

    `asked` are settings that the input asks for: they lie between the shipped ones and those of --config.
    """
    from runners.configuration import ConfigurationError
    from runners.entries import HistoryError
    from runners.kafka import KafkaUnreachableError, TopicError
    from runners.kafka_login import KafkaLoginError
    from runners.local import BeamOptionsError
    from runners.output_folder import OutputFolderError
    from runners.progress import VisitProgress
    from runners.running import run_chain
    from schemas.manifests import ManifestError

    (out,) = _placed(options, options["out"])
    quiet = options["quiet"]
    console = Console(stderr=True)
    try:
        request = run_request({**options, "out": out}, asked or {}, console)
        given = open_input(request)
        engine = _engine(options["runner"], options["beam_options"], out, console)
        result = run_chain(request, given, lambda n_visits: VisitProgress(out, n_visits, quiet=quiet), engine)
    except (ConfigurationError, OutputFolderError, HistoryError, BeamOptionsError, KafkaLoginError) as error:
        raise BadUsage(str(error)) from error
    except (ManifestError, KafkaUnreachableError, TopicError, _SetupNeededError) as error:
        raise Failure(str(error)) from error
    except (RuntimeError, OSError) as error:
        raise Failure(f"the run failed: {in_short(error)}; mend the cause and run the same command again") from error
    for name, receipt in result.receipts.items():
        if receipt.first_problem is not None:
            console.print(f"reader of {name}: {receipt.first_problem}", markup=False)
    received = {name: receipt.received for name, receipt in result.receipts.items()}
    tell_result(night, out, result.seconds, received, as_json=options["as_json"], quiet=quiet, console=console)


def run_request(options: dict[str, Any], asked: dict[str, Any], console: Console) -> RunRequest:
    """The request, and a word on what of it cannot be served."""
    from runners.configuration import (
        brokers_with_streams,
        check_broker_streams,
        load_brokers,
        load_checked_filters,
        load_production_config,
    )
    from runners.running import RunRequest

    kafka, brokers = options["kafka"], options["brokers"]
    if kafka not in ("none", "embedded") and not _is_address(kafka):
        raise BadUsage(f"--kafka {kafka!r}: expected none, embedded or HOST:PORT")
    if kafka == "embedded" and options["runner"] == FLINK_CLUSTER:
        # It forgets what its readers have not read, unless those who write are in the same process and wait.
        raise BadUsage("--kafka embedded lives in this process, the workers of a cluster do not: give HOST:PORT")
    checked, problems = load_checked_filters(options["filters"])
    chosen = load_brokers(brokers)
    if brokers is not None and not problems:
        check_broker_streams(chosen, checked, str(brokers))
    # A filter that cannot run costs its own readers their stream, nobody else anything; nor must other
    # filters than the shipped ones keep the shipped brokers from theirs.
    served = brokers_with_streams(chosen, checked)
    config = load_production_config(options["config"], asked)
    for problem in problems:
        console.print(f"filter left out: {problem.file}: {problem.key or 'file'}: {problem.reason}", markup=False)
    for broker in chosen:
        if broker not in served:
            console.print(f"broker left out: {broker.name}: there is no stream {broker.stream}", markup=False)
    unserved = [broker.name for broker in served if broker.sink == "kafka"]
    if kafka == "none" and unserved and not options["quiet"]:
        console.print(f"--kafka is none: nothing is sent to {', '.join(unserved)}", markup=False)
    login = None if options["kafka_config"] is None else str(options["kafka_config"].absolute())
    return RunRequest(options["out"], config, served, checked, problems, kafka, login)


class _SetupNeededError(Exception):
    """What the chosen runner needs is not there; the message says which command gets it."""


@contextlib.contextmanager
def _engine(runner: str, beam_options: tuple[str, ...], out: Path, console: Console) -> Iterator[Run]:
    """What runs the dataflow."""
    if runner == "local":
        from runners.local import local_engine

        with local_engine(beam_options) as run:
            yield run
        return
    from runners.cluster.settings import ClusterError
    from runners.flink import flink_cluster_engine, flink_engine
    from runners.flink_setup import FlinkSetupError

    def announce(text: str) -> None:
        console.print(text, markup=False)

    on_cluster = runner == FLINK_CLUSTER
    try:
        engine = (
            flink_cluster_engine(beam_options, announce, out) if on_cluster else flink_engine(beam_options, announce)
        )
        with engine as run:
            yield run
    except (FlinkSetupError, ClusterError) as error:
        raise _SetupNeededError(str(error)) from error


@contextlib.contextmanager
def _packet_count(quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Tells on a terminal how many packets were found so far."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with console.status("looking for packets") as status:

        def tell(n_packets: int) -> None:
            if n_packets % 100 == 0:
                status.update(f"{n_packets:,} packets found")

        yield tell


def tell_result(
    night: Path | None,
    out: Path,
    seconds: float,
    received: dict[str, int],
    *,
    as_json: bool,
    quiet: bool,
    console: Console,
) -> None:
    from runners.report import write_report
    from runners.summary import json_summary, print_summary, recovered, summarise

    summary = summarise(out)
    try:
        write_report(out, night)
        if not quiet:
            where = console if as_json else Console()
            recovery = [] if night is None else recovered(night, out)
            print_summary(where, summary, out=out, seconds=seconds, recovery=recovery, received=received or None)
    except Exception as error:  # the alerts are out: their report is not what a run is for
        console.print(f"the run is complete, its report is not: {error or type(error).__name__}", markup=False)
    if as_json:
        click.echo(json.dumps(json_summary(summary, seconds)))


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536


def in_short(error: BaseException) -> str:
    """What went wrong first, without the runner's frames."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else text[:500] + " ..."

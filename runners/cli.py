"""The command `nightstream`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from runners.access.commands import kafka
from runners.cluster.commands import cluster
from runners.flink_commands import flink
from runners.ingest.commands import ingest
from runners.live_commands import announce, live
from runners.logs import log_for_people
from runners.run_commands import KAFKA_CONFIG, BadUsage, Failure, associate, produce, replay
from runners.schema_commands import schemas
from runners.template_commands import templates
from runners.training_commands import train_reliability

if TYPE_CHECKING:
    from runners.listening import KafkaRecord

PROGRAM = "nightstream"
DEFAULT_SEED = 20261122
_PRESETS = ("tiny", "live", "demo", "detector")
_FOLDER = click.Path(path_type=Path)
_EXISTING = click.Path(exists=True, path_type=Path)


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
    log_for_people()


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
    live      12 visits, 2 detectors of 512 x 512 pixels, to be announced one after the other
    demo      12 visits, 2 detectors of 1024 x 1024 pixels, two bands
    detector  1 visit, 1 detector of 4096 x 4096 pixels, for performance work
    """
    from pipelines.night_simulation import NightSimulationError, simulate_night

    console = Console(stderr=True)
    try:
        with _image_progress(console, quiet) as progress:
            simulated = simulate_night(preset, out, seed, progress, nights=nights)
    except NightSimulationError as error:
        raise BadUsage(str(error)) from error
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
@KAFKA_CONFIG
@click.option("--group", help="Consumer group; without one, from the start each time.")
@click.option("--idle-timeout", "idle_timeout_s", type=click.FloatRange(min=0), help="Stop after so many idle seconds.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many packets.")
@click.option("--no-cutouts", is_flag=True, help="Leave out the sizes of the cutouts.")
def listen(
    path: Path | None,
    bootstrap: str | None,
    topic: str | None,
    kafka_config: Path | None,
    group: str | None,
    idle_timeout_s: float | None,
    limit: int | None,
    no_cutouts: bool,
) -> None:
    """Read alert packets as a broker would and print each as one JSON line.

    Reads PATH (an Avro container or a folder of them), or a topic in any encoding. Ids are printed as
    text, as they exceed what JSON numbers hold; cutouts as their sizes.
    """
    from runners.kafka import KafkaUnreachableError
    from runners.kafka_login import KafkaLoginError
    from runners.listening import PacketFileError, TopicReadError, listen_path, listen_topic
    from schemas.avro.reading import to_json
    from schemas.avro.wire import PacketFormatError

    if (path is None) == (bootstrap is None) or (bootstrap is None) != (topic is None):
        raise BadUsage("give either PATH, or both --bootstrap and --topic")
    n_bad = 0
    try:
        if path is not None:
            packets: Iterator[dict[str, Any]] = listen_path(path)
        else:
            login = None if kafka_config is None else str(kafka_config)
            records = listen_topic(
                str(bootstrap), str(topic), group=group, idle_timeout_s=idle_timeout_s, limit=limit, login=login
            )
            packets = _decoded(records)
        for count, packet in enumerate(packets, start=1):
            if packet:
                click.echo(to_json(packet, cutout_sizes=not no_cutouts))
            else:
                n_bad += 1
            if count == limit:
                break
    except KafkaLoginError as error:
        raise BadUsage(str(error)) from error
    except (PacketFileError, PacketFormatError, TopicReadError, KafkaUnreachableError) as error:
        raise Failure(str(error)) from error
    except BrokenPipeError:  # the reader of our output has gone: `nightstream listen ... | head`
        sys.stdout = None
    if n_bad:
        raise Failure(f"{n_bad} messages could not be decoded")


def _decoded(records: Iterator[KafkaRecord]) -> Iterator[dict[str, Any]]:
    """Packets of a topic; an empty one stands for a message that is none, after a line on stderr."""
    from schemas.avro.messages import message_of_record
    from schemas.avro.reading import decode_message
    from schemas.avro.wire import PacketFormatError

    for record in records:
        try:
            yield decode_message(message_of_record(record.key, record.value))
        except PacketFormatError as error:
            click.echo(f"message left out: {error}", err=True)
            yield {}


_COMMANDS = (
    produce,
    associate,
    replay,
    announce,
    live,
    ingest,
    templates,
    train_reliability,
    schemas,
    cluster,
    flink,
    kafka,
)
for command in _COMMANDS:
    main.add_command(command)

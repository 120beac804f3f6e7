"""The commands of a night as it happens: `announce` and `live`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from runners.run_commands import (
    BEAM_OPTIONS,
    EXISTING,
    HISTORY,
    KAFKA_CONFIG,
    BadUsage,
    Failure,
    ManyValuesCommand,
    run_command,
    run_options,
    with_options,
)
from schemas.manifests import VISITS_TOPIC

_BOOTSTRAP = click.option("--bootstrap", required=True, metavar="HOST:PORT", help="The survey's Kafka broker.")
_TOPIC = click.option(
    "--topic", default=VISITS_TOPIC, show_default=True, help="Topic of announcements; its first partition."
)


@click.command()
@click.argument("night", type=EXISTING)
@_BOOTSTRAP
@_TOPIC
@KAFKA_CONFIG
@click.option("--cadence", "cadence_s", type=click.FloatRange(min=0), default=0.0, help="Seconds from visit to visit.")
@click.option("--quiet", is_flag=True, help="No progress.")
def announce(night: Path, bootstrap: str, topic: str, kafka_config: Path | None, cadence_s: float, quiet: bool) -> None:
    """Announce the visits of NIGHT on a topic, one message per detector, as a telescope would.

    Visits go in order of their midpoints, `--cadence` seconds apart. Paths in the messages are absolute: whoever
    works on the visits must see the same files.
    """
    from runners.kafka import DeliveryError, KafkaMessageLog, KafkaUnreachableError, check_kafka
    from runners.kafka_login import KafkaLoginError
    from schemas.manifests import ManifestError, announcements, read_manifest

    console = Console(stderr=True)
    try:
        manifest = read_manifest(night.resolve())
        login = None if kafka_config is None else str(kafka_config)
        check_kafka(bootstrap, login=login)
        log = KafkaMessageLog(bootstrap, topic, login)
        started = time.monotonic()
        for number, visit in enumerate(manifest.visits):
            time.sleep(max(started + number * cadence_s - time.monotonic(), 0.0))
            log.append(announcements(visit))
            if not quiet:
                console.print(f"visit {visit.visit}: {len(visit.detectors)} detectors announced", highlight=False)
    except KafkaLoginError as error:
        raise BadUsage(str(error)) from error
    except (ManifestError, KafkaUnreachableError, DeliveryError) as error:
        raise Failure(str(error)) from error
    for problem in manifest.problems:
        console.print(f"not announced: {problem.reason}", markup=False)


def announced_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where visits are announced, and what is known of them."""
    options = (
        _BOOTSTRAP,
        _TOPIC,
        click.option(
            "--visit-timeout",
            "visit_timeout_s",
            type=click.FloatRange(min=0, min_open=True),
            default=120.0,
            show_default=True,
            help="Seconds that a visit waits for its detectors, from its first one on.",
        ),
        click.option(
            "--known-objects", type=EXISTING, help="Folder with ephemerides.parquet, orbits.parquet or orbits.csv."
        ),
    )
    return with_options(command, options)


@click.command(cls=ManyValuesCommand)
@announced_options
@click.option("--stop-at-end", is_flag=True, help="Stop behind what the topic holds now, when its visits are closed.")
@run_options
@HISTORY
@BEAM_OPTIONS
def live(
    bootstrap: str,
    topic: str,
    visit_timeout_s: float,
    stop_at_end: bool,
    known_objects: Path | None,
    history: tuple[Path, ...],
    **options: Any,
) -> None:
    """Run the whole chain on visits as they are announced on a Kafka topic.

    The topic holds one JSON message per detector: the visit's fields as in visits.jsonl, with `detector`, `science`,
    `template` (absolute paths) and `expected_detectors`. A visit is closed when all of these were read, or after
    --visit-timeout with those that came; the others are listed under OUT/failures, and get their alerts
    when they come later. Alerts go to the Kafka that --kafka names. Exit codes as for `produce`.

    \b
    nightstream announce night --bootstrap localhost:9092
    nightstream live --bootstrap localhost:9092 --kafka localhost:9092 --out result --stop-at-end

    Options of Apache Beam follow `--`.
    """
    from runners.entries import AnnouncedVisits, stream_input

    announced = AnnouncedVisits(bootstrap, topic, known_objects, visit_timeout_s, stop_at_end)
    run_command(options, lambda request: stream_input(announced, request, history))

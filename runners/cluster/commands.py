"""The commands `nightstream cluster up | down | status`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runners.run_commands import Failure

if TYPE_CHECKING:
    from runners.cluster.processes import Service
    from runners.cluster.settings import ClusterSettings

_PARTS = click.argument("part", type=click.Choice(["kafka", "flink", "all"]), default="all")
_FOLDER = click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where its files lie, and a cluster.yaml with settings of your own. Default: .cluster of the checkout.",
)


@click.group()
def cluster() -> None:
    """A real Kafka broker and a Flink cluster on this machine, for live nights and for trials.

    All of it runs in the background, as what the shipped cluster.yaml says; nothing of it needs Docker.
    """


@cluster.command()
@_PARTS
@_FOLDER
def up(part: str, folder: Path | None) -> None:
    """Start what does not run yet, fetched first where it is missing; returns when it is ready."""
    with _cluster(folder) as settings:
        for name, start, describe in _parts(part):
            started = time.perf_counter()
            made = start(settings)
            took = f"ready after {time.perf_counter() - started:.1f} s" if made else "runs already"
            click.echo(f"{name} {took}")
            for line in describe(settings):
                click.echo(f"  {line}")
        click.echo(f"logs in {settings.logs}")


@cluster.command()
@_PARTS
@_FOLDER
def down(part: str, folder: Path | None) -> None:
    """End it, and what ended commands left behind. What Kafka holds, checkpoints and savepoints stay."""
    from runners.cluster.flink import flink_down
    from runners.cluster.kafka import kafka_service
    from runners.cluster.processes import stop

    with _cluster(folder) as settings:
        # The jobs go first: without Kafka they would only start again and again.
        if part in ("flink", "all"):
            click.echo(f"Flink: {flink_down(settings)} processes ended")
        if part in ("kafka", "all"):
            click.echo(f"Kafka: {stop(settings, kafka_service(settings.kafka))} processes ended")


@cluster.command()
@_FOLDER
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def status(folder: Path | None, as_json: bool) -> None:
    """What of it runs, where it listens, and how much memory it holds. Exit code 0 also if nothing runs."""
    from runners.cluster.flink import flink_services, overview
    from runners.cluster.kafka import kafka_service

    with _cluster(folder) as settings:
        services = [kafka_service(settings.kafka), *flink_services(settings.flink)]
        facts = {service.name: _facts(settings, service) for service in services}
        seen = overview(settings.flink) if facts["flink-job-manager"]["pid"] else None
    if as_json:
        click.echo(json.dumps({"services": facts, "flink": seen, "logs": str(settings.logs)}))
        return
    for name, one in facts.items():
        where = "  ".join(str(port) for port in one["ports"])
        state = "does not run" if one["pid"] is None else f"pid {one['pid']:<8} {one['memory_mb']:>5} MB  {where}"
        click.echo(f"{name:<22} {state}".rstrip())
    if seen:
        click.echo(
            f"Flink {seen['flink-version']}: {seen['slots-available']} of {seen['slots-total']} slots free, "
            f"{seen['jobs-running']} jobs run"
        )
    click.echo(f"logs in {settings.logs}")


def _facts(settings: ClusterSettings, service: Service) -> dict[str, Any]:
    from runners.cluster.processes import memory_mb, running_pid

    pid = running_pid(settings, service)
    return {"pid": pid, "ports": service.ports, "memory_mb": memory_mb(settings, service) if pid else 0}


def _parts(part: str) -> list[tuple[str, Callable[[ClusterSettings], bool], Callable[[ClusterSettings], list[str]]]]:
    from runners.cluster.flink import flink_up
    from runners.cluster.kafka import kafka_up

    parts = {"kafka": ("Kafka", kafka_up, _describe_kafka), "flink": ("Flink", flink_up, _describe_flink)}
    return [parts[name] for name in parts if part in (name, "all")]


def _describe_kafka(settings: ClusterSettings) -> list[str]:
    from runners.cluster.kafka import admin_properties

    kafka = settings.kafka
    return [
        f"Kafka {kafka.version}",
        f"for the job, no password: {kafka.bootstrap}",
        f"for broker teams, SCRAM-SHA-512: {kafka.secured_bootstrap}",
        f"the administrator's way in: {admin_properties(settings)}",
    ]


def _describe_flink(settings: ClusterSettings) -> list[str]:
    from runners.flink_setup import jar_versions, load_flink_settings

    flink, jar = settings.flink, load_flink_settings().jar
    return [
        f"Flink {flink.release}, job server {jar}: {jar_versions(jar)}",
        f"web UI and REST: {flink.rest_url}, {flink.slots} slots",
        f"jobs: {flink.job_endpoint}; Python workers: {flink.worker_pool}; Prometheus: {flink.prometheus_ports}",
        f"checkpoints and savepoints in {settings.folder / 'flink'}",
    ]


@contextmanager
def _cluster(folder: Path | None) -> Iterator[ClusterSettings]:
    """The settings, for one command at a time; what went wrong as a message."""
    from runners.cluster.processes import alone
    from runners.cluster.settings import FOLDER, ClusterError, load_cluster_settings
    from runners.flink_setup import FlinkSetupError

    try:
        settings = load_cluster_settings(folder or FOLDER)
        with alone(settings):
            yield settings
    except (ClusterError, FlinkSetupError) as error:
        raise Failure(str(error)) from error

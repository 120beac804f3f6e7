"""The command `nightstream schemas`."""

from __future__ import annotations

import click

from runners.run_commands import Failure


@click.group()
def schemas() -> None:
    """The schemas of alert packets."""


@schemas.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8081, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
def serve(host: str, port: int) -> None:
    """Serve a read-only schema registry, with pages to look at, until interrupted.

    Confluent's clients find every schema by its id there (1100 is version 11.0).
    """
    from runners.schema_registry import registry_server

    try:
        server, listening = registry_server(host, port)
    except OSError as error:
        raise Failure(f"cannot listen on {host}: {error.strerror or error}") from error
    name = f"[{host}]" if ":" in host else host
    click.echo(f"schema registry at http://{name}:{listening.getsockname()[1]}/", err=True)
    with listening:
        server.run(sockets=[listening])

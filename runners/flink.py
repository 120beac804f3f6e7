"""Runs the chain on an embedded Flink: one Java process beside this one, with job server and mini-cluster.

It is started for one run, on ports of its own, and ends with it. The Python stages run as threads of
this process (Beam's LOOPBACK), so `--kafka embedded` works as it does on the local runner.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import FlinkRunnerOptions
from apache_beam.portability.api import beam_job_api_pb2
from apache_beam.runners.portability.job_server import ExternalJobServer
from apache_beam.runners.portability.portable_runner import PortableRunner

from runners.flink_setup import FlinkSettings, FlinkSetupError, jar_versions, java_command, load_flink_settings
from runners.local import Dataflow, Run, beam_options, parsed_options, quiet_beam

_START_PATIENCE_S = 60.0
_STOP_PATIENCE_S = 15.0
_STARTED = re.compile(r"JobService started on (\S+:\d+)")
# Left alone, the mini-cluster's blob server would listen on all interfaces.
_FLINK_CONFIG = "jobmanager.bind-host: 127.0.0.1\ntaskmanager.bind-host: 127.0.0.1\nrest.bind-address: 127.0.0.1\n"
_JAVA_OPTIONS = (
    # Flink's serializers look into these by reflection.
    "--add-opens=java.base/java.util=ALL-UNNAMED",
    "--add-opens=java.base/java.lang=ALL-UNNAMED",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.org.apache.beam.runners.jobsubmission=info",
)
# Java lives as long as the standard input of this script stays open: it ends with us even when we are killed,
# and on Ctrl-C, which goes to every process of the terminal, not before us.
_END_WITH_PARENT = """
trap '' INT
exec 3<&0
"$@" </dev/null & java=$!
( cat <&3 >/dev/null; kill "$java" 2>/dev/null ) & watcher=$!
exec 3<&-
wait "$java"; code=$?
kill "$watcher" 2>/dev/null
exit "$code"
"""


@contextlib.contextmanager
def flink_engine(arguments: tuple[str, ...], announce: Callable[[str], None]) -> Iterator[Run]:
    """Start an embedded Flink for as long as the `with` block lasts.

    Parameters
    ----------
    arguments : options of Beam and of its Flink runner, over those of the shipped `flink.yaml`
    announce : told which line of versions runs

    Yields
    ------
    Run
        Runs the chain to the end of its input; RuntimeError when the job failed.

    Raises
    ------
    FlinkSetupError
        Java or the job server is missing, is of another Flink than asked for, or did not start.
    BeamOptionsError
        An option that neither Beam nor its Flink runner knows.
    """
    settings = load_flink_settings()
    parsed_options(arguments)  # by themselves, so that what is no option at all is seen
    chosen = parsed_options(_with_shipped(settings, arguments)).view_as(FlinkRunnerOptions)
    jar = Path(chosen.flink_job_server_jar)
    versions = jar_versions(jar)
    if versions.flink_version not in ("", chosen.flink_version):
        raise FlinkSetupError(
            f"{jar} is for Flink {versions.flink_version}, asked for is Flink {chosen.flink_version}: "
            "make or name one of that version"
        )
    java = java_command()
    with _job_server(java, jar, settings.heap_mb, chosen.flink_master) as server:
        given = (*_with_shipped(settings, arguments), f"--job_endpoint={server.endpoint}")
        options = beam_options(given, _java_options(server.endpoint))
        announce(f"{versions}, master {chosen.flink_master}, job server {jar}")

        def run(dataflow: Dataflow) -> None:
            flow = beam.Pipeline(runner=PortableRunner(), options=options)
            dataflow.build(flow, spread=True)
            with quiet_beam(), _quiet_job_messages():
                try:
                    flow.run().wait_until_finish()
                except Exception as error:  # also gRPC's own, when the job server is gone
                    raise RuntimeError(_reason(error, server)) from error

        yield run


def _with_shipped(settings: FlinkSettings, arguments: tuple[str, ...]) -> tuple[str, ...]:
    return (
        "--flink_master=[local]",
        f"--flink_version={settings.flink_version}",
        f"--flink_job_server_jar={settings.jar}",
        "--environment_type=LOOPBACK",
        "--streaming",
        f"--parallelism={settings.parallelism}",
        f"--max_bundle_time_mills={settings.max_bundle_time_ms}",
        f"--max_bundle_size={settings.max_bundle_size}",
        *arguments,
    )


def _java_options(endpoint: str) -> Callable[[argparse.ArgumentParser], None]:
    """Adds to a parser the options that the job server names: those of the Flink runner are known to Java only."""
    server = ExternalJobServer(endpoint, _START_PATIENCE_S).start()
    request = beam_job_api_pb2.DescribePipelineOptionsRequest()
    described = server.DescribePipelineOptions(request, timeout=_START_PATIENCE_S).options

    def add(parser: argparse.ArgumentParser) -> None:
        kinds = beam_job_api_pb2.PipelineOptionType
        for option in described:
            with contextlib.suppress(argparse.ArgumentError):  # one that Python's side knows as well
                if option.type == kinds.BOOLEAN:
                    parser.add_argument(f"--{option.name}", action="store_true")
                else:
                    parser.add_argument(f"--{option.name}", type=int if option.type == kinds.INTEGER else str)

    return add


@contextlib.contextmanager
def _quiet_job_messages() -> Iterator[None]:
    """Why a job failed comes back as an exception; Beam also writes it to the root logger itself."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    logging.root.addFilter(drop)
    try:
        yield
    finally:
        logging.root.removeFilter(drop)


@dataclass(frozen=True)
class _JobServer:
    endpoint: str
    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self) -> str:
        return " / ".join(self.log.read_text("utf-8", "replace").splitlines()[-3:]) or "no output"


def _reason(error: Exception, server: _JobServer) -> str:
    """What went wrong, without the frames of Python and Java around it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = server.process.wait(0.5)
        return f"the Flink job server ended with exit code {code}: {server.last_words()}"
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("at ")]
    return told[-1] if told else type(error).__name__


@contextlib.contextmanager
def _job_server(java: Path, jar: Path, heap_mb: int, master: str) -> Iterator[_JobServer]:
    """Beam's job server from when it answers to the end of the block."""
    with tempfile.TemporaryDirectory(prefix="nightstream-flink-") as name:
        folder = Path(name)
        (folder / "flink-conf.yaml").write_text(_FLINK_CONFIG, encoding="utf-8")
        log = folder / "job-server.log"
        command = [
            str(java),
            f"-Xmx{heap_mb}m",
            f"-Djava.io.tmpdir={folder}",
            *_JAVA_OPTIONS,
            "-jar",
            str(jar),
            "--job-host=localhost",
            "--job-port=0",
            "--artifact-port=0",
            "--expansion-port=-1",
            f"--flink-master={master}",
            f"--flink-conf-dir={folder}",
            f"--artifacts-dir={folder / 'artifacts'}",
        ]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _END_WITH_PARENT, "job-server", *command],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        server = _JobServer("", process, log)
        try:
            yield replace(server, endpoint=_endpoint(server))
        finally:
            _stop(process)


def _endpoint(server: _JobServer) -> str:
    deadline = time.monotonic() + _START_PATIENCE_S
    while True:
        if match := _STARTED.search(server.log.read_text("utf-8", "replace")):
            return match[1]
        code = server.process.poll()
        if code is not None or time.monotonic() > deadline:
            how = "did not start in time" if code is None else f"ended with exit code {code}"
            raise FlinkSetupError(f"the Flink job server {how}: {server.last_words()}")
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(_STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

"""Runs the chain on Flink: an embedded one, or the cluster that `nightstream cluster up` started.

The embedded one is one Java process beside this one, with job server and mini-cluster, started for one
run, on ports of its own, and ends with it. The Python stages run as threads of this process (Beam's
LOOPBACK), so `--kafka embedded` works as it does on the local runner. On the cluster they run in the
processes of its worker pool; files are shared by their absolute paths.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions
from apache_beam.portability.api import beam_job_api_pb2, beam_runner_api_pb2
from apache_beam.runners.portability.job_server import ExternalJobServer
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.runners.runner import PipelineResult, PipelineState

from runners.cluster.flink import ENDED, overview, rest
from runners.cluster.processes import is_listening
from runners.cluster.settings import FOLDER, HOST, FlinkClusterSettings, load_cluster_settings
from runners.flink_setup import (
    FlinkSettings,
    FlinkSetupError,
    jar_versions,
    java_command,
    job_server_command,
    load_flink_settings,
)
from runners.local import Dataflow, Run, beam_options, parsed_options, quiet_beam

_START_PATIENCE_S = 60.0
_STOP_PATIENCE_S = 15.0
_RUNNING_PATIENCE_S = 120.0
_LOOK_S = 0.2
# A job on the cluster that fails for good should say so in the end; one whose task manager was lost gets half a
# minute for another to come.
_RETRIES, _RETRY_DELAY_S = 10, 3
_STARTED = re.compile(r"JobService started on (\S+:\d+)")
# Left alone, the mini-cluster's blob server would listen on all interfaces.
_FLINK_CONFIG = "jobmanager.bind-host: 127.0.0.1\ntaskmanager.bind-host: 127.0.0.1\nrest.bind-address: 127.0.0.1\n"
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

        yield _submitting(options, lambda error: server.end() or _last_reason(error))


@contextlib.contextmanager
def flink_cluster_engine(
    arguments: tuple[str, ...], announce: Callable[[str], None], out: Path, folder: Path = FOLDER
) -> Iterator[Run]:
    """Run on the Flink cluster whose folder is given, one job for each `run`.

    The job takes no checkpoints: what fails starts again from the first visit, a few times, and writes the same
    bytes. With checkpoints on, Beam's sources stay for ever and so would the job; told to leave, they have Flink
    work off the night in one step at its end, during which it takes no checkpoint. Interrupted, it is cancelled.

    Parameters and exceptions are those of `cluster_job`.
    """
    retries = (f"--number_of_execution_retries={_RETRIES}", f"--execution_retry_delay={_RETRY_DELAY_S * 1000}")
    yield _submitting(cluster_job((*retries, *arguments), announce, out, folder).options, _last_reason)


class LabelledRunner(PortableRunner):
    """Submits pipelines whose transforms have their labels for ids."""

    def run_portable_pipeline(self, pipeline: beam_runner_api_pb2.Pipeline, options: PipelineOptions) -> PipelineResult:
        return super().run_portable_pipeline(labelled(pipeline), options)


def labelled(pipeline: beam_runner_api_pb2.Pipeline) -> beam_runner_api_pb2.Pipeline:
    """The pipeline with each transform's label for its id.

    The runner keeps timers under the id of their stage, and in Beam's own ids is the number of those before it: with
    one stage more, the timers of a savepoint would be nobody's.
    """
    old = pipeline.components.transforms
    labels = {number: transform.unique_name for number, transform in old.items()}
    named = beam_runner_api_pb2.Pipeline()
    named.CopyFrom(pipeline)
    named.root_transform_ids[:] = [labels[number] for number in pipeline.root_transform_ids]
    named.components.transforms.clear()
    for number, label in labels.items():
        transform = named.components.transforms[label]
        transform.CopyFrom(old[number])
        transform.subtransforms[:] = [labels[part] for part in old[number].subtransforms]
    return named


@dataclass(frozen=True)
class ClusterJob:
    """A job for the cluster: its name there, and the options that it is submitted with."""

    settings: FlinkClusterSettings
    name: str
    options: PipelineOptions


def cluster_job(
    arguments: tuple[str, ...], announce: Callable[[str], None], out: Path, folder: Path = FOLDER
) -> ClusterJob:
    """The job that is to write to an output folder, checked against the cluster whose folder is given.

    Parameters
    ----------
    arguments : options of Beam and of its Flink runner, over those of the shipped files
    announce : told which line of versions runs, and where to watch it
    out : the output folder; the job is named for it

    Raises
    ------
    FlinkSetupError
        The cluster is not up, or a job there still writes to this folder.
    ClusterError
        The cluster's settings cannot be used.
    BeamOptionsError
        An option that neither Beam nor its Flink runner knows.
    """
    job_settings, settings = load_flink_settings(), load_cluster_settings(folder).flink
    parsed_options(arguments)
    seen = overview(settings)
    if seen is None or not is_listening(settings.job_server_port):
        raise FlinkSetupError(
            f"no Flink cluster at {settings.rest_url} with a job server at {settings.job_endpoint}: run `make flink-up`"
        )
    name = f"nightstream-{out.name}-{hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:8]}"
    _check_not_running(settings, name, out)
    given = (*_on_cluster(job_settings, settings, name), *arguments)
    options = beam_options(given, _java_options(settings.job_endpoint))
    announce(
        f"{jar_versions(job_settings.jar)}, cluster of Flink {seen['flink-version']} with "
        f"{seen['slots-total']} slots at {settings.rest_url}"
    )
    return ClusterJob(settings, name, options)


def start_detached(job: ClusterJob, dataflow: Dataflow) -> str:
    """Submit a job that goes on without this process; returns Flink's id of it when all its tasks run.

    Raises
    ------
    RuntimeError
        It failed, or did not run in time; it is gone then, as after Ctrl-C.
    """
    flow = beam.Pipeline(runner=LabelledRunner(), options=job.options)
    dataflow.build(flow, spread=True)
    with quiet_beam(), _quiet_job_messages(), contextlib.ExitStack() as unless_it_runs:
        try:
            result = flow.run()
            unless_it_runs.callback(_cancel, result)
            deadline = time.monotonic() + _RUNNING_PATIENCE_S
            while (number := _running_job(job)) is None:
                if result.state in (PipelineState.FAILED, PipelineState.CANCELLED, PipelineState.DONE):
                    result.wait_until_finish()  # raises the reason
                    raise RuntimeError(f"the job ended at once, {result.state}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the job did not run within {_RUNNING_PATIENCE_S:g} s: {job.settings.rest_url}")
                time.sleep(_LOOK_S)
        except Exception as error:  # also gRPC's own, when the job server is gone
            raise RuntimeError(_last_reason(error)) from error
        unless_it_runs.pop_all()
    return number


def _cancel(result: PipelineResult) -> None:
    with contextlib.suppress(Exception):  # it has ended, or the job server has
        result.cancel()


def _running_job(job: ClusterJob) -> str | None:
    """Flink's id of the job, once all its tasks run."""
    for one in rest(job.settings, "/jobs/overview")["jobs"]:
        if one["name"] == job.name and one["state"] == "RUNNING":
            return str(one["jid"]) if one["tasks"]["running"] == one["tasks"]["total"] > 0 else None
    return None


def _submitting(options: PipelineOptions, reason: Callable[[Exception], str]) -> Run:
    """Runs dataflows as jobs, to their end."""

    def run(dataflow: Dataflow) -> None:
        flow = beam.Pipeline(runner=LabelledRunner(), options=options)
        dataflow.build(flow, spread=True)
        with quiet_beam(), _quiet_job_messages():
            try:
                job = flow.run()
                try:
                    job.wait_until_finish()
                except KeyboardInterrupt:
                    job.cancel()
                    raise
            except Exception as error:  # also gRPC's own, when the job server is gone
                raise RuntimeError(reason(error)) from error

    return run


def _check_not_running(settings: FlinkClusterSettings, name: str, out: Path) -> None:
    for job in rest(settings, "/jobs/overview")["jobs"]:
        if job["name"] == name and job["state"] not in ENDED:
            raise FlinkSetupError(
                f"job {job['jid']} still writes to {out}: wait for it, or cancel it at {settings.rest_url}"
            )


def _with_shipped(settings: FlinkSettings, arguments: tuple[str, ...]) -> tuple[str, ...]:
    return (
        "--flink_master=[local]",
        f"--flink_version={settings.flink_version}",
        f"--flink_job_server_jar={settings.jar}",
        "--environment_type=LOOPBACK",
        f"--parallelism={settings.parallelism}",
        *_streaming(settings),
        *arguments,
    )


def _on_cluster(job_settings: FlinkSettings, settings: FlinkClusterSettings, name: str) -> tuple[str, ...]:
    return (
        f"--job_name={name}",
        f"--job_endpoint={settings.job_endpoint}",
        f"--artifact_endpoint={HOST}:{settings.artifact_port}",
        "--environment_type=EXTERNAL",
        f"--environment_config={settings.worker_pool}",
        f"--parallelism={settings.slots}",
        *_streaming(job_settings),
    )


def _streaming(settings: FlinkSettings) -> tuple[str, ...]:
    return (
        "--streaming",
        f"--max_bundle_time_mills={settings.max_bundle_time_ms}",
        f"--max_bundle_size={settings.max_bundle_size}",
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

    def end(self) -> str:
        """How it ended, if it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(0.5)
            return f"the Flink job server ended with exit code {code}: {self.last_words()}"
        return ""

    def last_words(self) -> str:
        return " / ".join(self.log.read_text("utf-8", "replace").splitlines()[-3:]) or "no output"


def _last_reason(error: Exception) -> str:
    """What went wrong, without the frames of Python and Java around it."""
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
        command = job_server_command(java, jar, heap_mb, master, folder)
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

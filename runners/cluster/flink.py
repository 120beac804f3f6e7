"""Flink on this machine: a job manager, task managers of one slot, Beam's job server, a pool of Python workers.

Flink comes from the package index as plain files; nothing of it is ever imported. One task manager with one slot
per core, because Beam starts one Python process for each task manager, and two slots of one would share it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from runners.cluster.processes import Service, is_listening, running_pid, start, stop, wait_until
from runners.cluster.settings import HOST, ClusterError, ClusterSettings, FlinkClusterSettings
from runners.flink_setup import (
    CHECKOUT,
    FlinkSettings,
    java_or_wheel,
    job_server_command,
    load_flink_settings,
    set_up,
)

# The wheels hold files only, so they are those of one Python whatever runs here.
_WHEELS_OF_PYTHON = "3.11"
_PROMETHEUS_JAR = "flink-metrics-prometheus-{release}.jar"
_METASPACE_MB = 384  # each submission loads the job server's classes anew
_BLOB_SWEEP_S = 300
_REST_PATIENCE_S = 5.0
ENDED = ("FINISHED", "CANCELED", "FAILED")
# A library that uses several threads adds up in another order: the bytes would not repeat.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def job_manager(settings: FlinkClusterSettings) -> Service:
    return Service("flink-job-manager", (settings.rest_port, settings.rpc_port))


def task_managers(settings: FlinkClusterSettings) -> list[Service]:
    return [Service(f"flink-task-manager-{number}", ()) for number in range(1, settings.slots + 1)]


def job_server(settings: FlinkClusterSettings) -> Service:
    return Service("beam-job-server", (settings.job_server_port, settings.artifact_port))


def worker_pool(settings: FlinkClusterSettings) -> Service:
    return Service("python-worker-pool", (settings.worker_pool_port,))


def flink_services(settings: FlinkClusterSettings) -> list[Service]:
    """All processes of Flink, in the order in which they are started."""
    return [job_manager(settings), worker_pool(settings), job_server(settings), *task_managers(settings)]


def flink_up(cluster: ClusterSettings) -> bool:
    """Start what of Flink does not run; returns when all slots are there. False if all of it ran already.

    Raises
    ------
    ClusterError, FlinkSetupError
        Something cannot be fetched, a port is taken, or a process did not start.
    """
    settings, job_settings = cluster.flink, load_flink_settings()
    _check_releases(settings, job_settings)
    wanted = flink_services(settings)
    for service in _surplus(cluster):
        stop(cluster, service)
    missing = [service for service in wanted if running_pid(cluster, service) is None]
    ids = {service.name: f"{service.name}-{uuid.uuid4().hex[:8]}" for service in task_managers(settings)}
    if missing:
        java = java_or_wheel()
        set_up(job_settings.jar, job_settings.versions)
        home = _fetched(settings.release)
        folder = cluster.folder / "flink"
        if missing == wanted:
            shutil.rmtree(folder / "tmp", ignore_errors=True)  # of processes that were killed
        _write_configuration(cluster, home, folder)
        commands = _commands(cluster, java, home, job_settings, ids)
        # A task manager that finds no job manager looks again only ten seconds later.
        for service in (one for one in missing if one.name not in ids):
            start(cluster, service, *commands[service.name])
        wait_until(cluster, job_manager(settings), lambda: overview(settings) is not None)
        for service in (one for one in missing if one.name in ids):
            start(cluster, service, *commands[service.name])
    pool, server = worker_pool(settings), job_server(settings)
    wait_until(cluster, job_manager(settings), lambda: overview(settings) is not None)
    wait_until(cluster, pool, lambda: is_listening(settings.worker_pool_port))
    wait_until(cluster, server, lambda: is_listening(settings.job_server_port))
    for service in task_managers(settings):
        # Flink goes on counting one that was killed until it misses its heartbeat.
        identity = ids[service.name] if service in missing else service.name
        wait_until(cluster, service, partial(_is_registered, settings, identity))
    return bool(missing)


def flink_down(cluster: ClusterSettings) -> int:
    """End all processes of Flink, also of task managers that the settings no longer name; returns how many ran."""
    services = [*_surplus(cluster), *reversed(flink_services(cluster.flink))]
    return sum(stop(cluster, service) for service in services)


def _surplus(cluster: ClusterSettings) -> list[Service]:
    """Task managers of other settings that may still run."""
    wanted = {service.name for service in task_managers(cluster.flink)}
    started = {path.stem for path in (cluster.folder / "pids").glob("flink-task-manager-*.pid")}
    return [Service(name, ()) for name in sorted(started - wanted)]


def flink_configuration(settings: FlinkClusterSettings, folder: Path, prometheus: bool) -> dict[str, Any]:
    """The configuration of job manager and task managers, over what Flink ships."""
    values: dict[str, Any] = {
        "jobmanager.rpc.address": HOST,
        "jobmanager.bind-host": HOST,
        "jobmanager.rpc.port": settings.rpc_port,
        "jobmanager.memory.process.size": f"{settings.job_manager_mb}m",
        "jobmanager.memory.jvm-metaspace.size": f"{_METASPACE_MB}m",
        "taskmanager.host": HOST,
        "taskmanager.bind-host": HOST,
        "taskmanager.numberOfTaskSlots": 1,
        "taskmanager.memory.process.size": f"{settings.task_manager_mb}m",
        "taskmanager.memory.jvm-metaspace.size": f"{_METASPACE_MB}m",
        "rest.address": HOST,
        "rest.bind-address": HOST,
        "rest.port": settings.rest_port,
        "web.upload.dir": str(folder / "tmp"),
        "io.tmp.dirs": str(folder / "tmp"),
        "blob.service.cleanup.interval": _BLOB_SWEEP_S,
        "state.backend.type": "rocksdb",
        "state.backend.incremental": True,
        "state.backend.rocksdb.log.dir": str(folder / "tmp"),
        "state.backend.rocksdb.options-factory": "nightstream.BoundedManifests",  # in the job server's jar
        "state.checkpoints.dir": (folder / "checkpoints").as_uri(),
        "state.savepoints.dir": (folder / "savepoints").as_uri(),
        "state.checkpoints.num-retained": 2,
        "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
        # Whether tasks are chained depends on the parallelism, and by what is chained state finds its task again.
        "pipeline.operator-chaining.enabled": False,
        "restart-strategy.type": "fixed-delay",
        "restart-strategy.fixed-delay.attempts": settings.restart_attempts,
        "restart-strategy.fixed-delay.delay": f"{settings.restart_delay_s} s",
        "heartbeat.interval": 2000,
        "heartbeat.timeout": 10000,
        "metrics.fetcher.update-interval": 2000,
    }
    if prometheus:
        values |= {
            "metrics.reporter.prometheus.factory.class": "org.apache.flink.metrics.prometheus."
            "PrometheusReporterFactory",
            "metrics.reporter.prometheus.port": settings.prometheus_ports,
            # Names that are new after each restart would make new series of everything.
            "metrics.reporter.prometheus.scope.variables.excludes": "task_attempt_id;task_attempt_num",
        }
    return values


def overview(settings: FlinkClusterSettings) -> dict[str, Any] | None:
    """What Flink says of itself: slots, jobs, version; None if it does not answer."""
    try:
        return rest(settings, "/overview")
    except ClusterError:
        return None


def rest(settings: FlinkClusterSettings, path: str, method: str = "GET", body: Mapping[str, Any] | None = None) -> Any:
    """What Flink's REST interface answers; ClusterError if it does not."""
    request = urllib.request.Request(settings.rest_url + path, method=method)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=_REST_PATIENCE_S) as answer:
            return json.loads(answer.read() or b"null")
    except (OSError, ValueError) as error:
        said = error.read().decode("utf-8", "replace") if isinstance(error, urllib.error.HTTPError) else ""
        raise ClusterError(f"Flink at {settings.rest_url}{path}: {error} {said}".rstrip()) from error


def _is_registered(settings: FlinkClusterSettings, identity: str) -> bool:
    """Whether the job manager knows a task manager whose id begins so, and its slot."""
    try:
        known = rest(settings, "/taskmanagers")["taskmanagers"]
        return any(one["id"].startswith(identity) and one["slotsNumber"] for one in known)
    except ClusterError:
        return False


def _check_releases(settings: FlinkClusterSettings, job_settings: FlinkSettings) -> None:
    if not settings.release.startswith(f"{job_settings.flink_version}."):
        raise ClusterError(
            f"Flink {settings.release} cannot run jobs of a job server for Flink {job_settings.flink_version}: "
            "their minor versions must be the same"
        )


def _fetched(release: str) -> Path:
    """Flink's home folder, fetched where it is missing; it appears whole or not at all."""
    folder = CHECKOUT / ".cluster" / f"flink-{release}"
    home = folder / "pyflink"
    if home.is_dir():
        return home
    half = folder.with_name(f"{folder.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # The libraries of some releases come as source, with nothing in it to compile.
    wheels = [f"--python-version={_WHEELS_OF_PYTHON}", "--target", str(half)]
    packages = [f"apache-flink=={release}", f"apache-flink-libraries=={release}"]
    done = subprocess.run([*command, *wheels, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"Flink {release} could not be fetched: {done.stderr.strip()}")
    half.replace(folder)
    return home


def _write_configuration(cluster: ClusterSettings, home: Path, folder: Path) -> None:
    for name in ("conf", "tmp", "checkpoints", "savepoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    logging = resources.files("runners.config") / "flink" / "log4j-console.properties"
    (folder / "conf" / "log4j-console.properties").write_text(logging.read_text("utf-8"), encoding="utf-8")
    release = cluster.flink.release
    prometheus = any((home / "plugins").glob(f"*/{_PROMETHEUS_JAR.format(release=release)}"))
    values = flink_configuration(cluster.flink, folder, prometheus)
    values["env.java.opts.all"] = _java_options(home)
    # Written under its old name, as flat keys: the one form that both the scripts and the job server read.
    text = "".join(f"{key}: {value}\n" for key, value in values.items())
    (folder / "conf" / "flink-conf.yaml").write_text(text, encoding="utf-8")


def _java_options(home: Path) -> str:
    """What this release of Flink asks of Java 17, from the configuration that it ships."""
    shipped = yaml.safe_load((home / "conf" / "config.yaml").read_text("utf-8"))
    return str(shipped["env"]["java"]["opts"]["all"])


def _commands(
    cluster: ClusterSettings, java: Path, home: Path, job_settings: FlinkSettings, ids: Mapping[str, str]
) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command and environment of each service, by its name; `ids` are those of the task managers."""
    settings, folder = cluster.flink, cluster.folder / "flink"
    of_flink = {
        "JAVA_HOME": str(java.parent.parent),
        "FLINK_HOME": str(home),
        "FLINK_CONF_DIR": str(folder / "conf"),
        "FLINK_LOG_DIR": str(cluster.logs),
        "FLINK_PID_DIR": str(folder / "tmp"),
        "FLINK_IDENT_STRING": "nightstream",
    }
    search = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    of_python = {
        **_ONE_THREAD,
        "PYTHONPATH": search,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    server = job_server_command(
        java,
        job_settings.jar,
        settings.job_server_heap_mb,
        f"{HOST}:{settings.rest_port}",
        folder / "conf",
        settings.job_server_port,
        settings.artifact_port,
    )
    listed = cluster.folder / "pids" / "python-workers.json"
    pool = [sys.executable, "-m", "runners.cluster.worker_pool"]
    pool += [str(settings.worker_pool_port), str(cluster.logs), str(listed)]
    commands = {worker_pool(settings).name: (pool, of_python), job_server(settings).name: (server, {})}
    # The log's place is for the web UI to show it.
    name = job_manager(settings).name
    script = ["bash", str(home / "bin" / "jobmanager.sh"), "start-foreground"]
    commands[name] = ([*script, "-D", f"web.log.path={cluster.logs / name}.log"], of_flink)
    for name, identity in ids.items():
        script = ["bash", str(home / "bin" / "taskmanager.sh"), "start-foreground"]
        named = ["-D", f"taskmanager.resource-id={identity}"]
        commands[name] = ([*script, *named, "-D", f"taskmanager.log.path={cluster.logs / name}.log"], of_flink)
    return commands

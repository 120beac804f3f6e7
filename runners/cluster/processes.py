"""The processes of a cluster on this machine: started in the background, found again, awaited, ended.

Each process carries the cluster's folder and its own name in its environment, and its children inherit
them: so a later command finds all of them again, however the one that started them ended, and never
takes a process for its own whose number was merely used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runners.cluster.settings import HOST, ClusterError, ClusterSettings

START_PATIENCE_S = 90.0
STOP_PATIENCE_S = 30.0
_MARK = "NIGHTSTREAM_CLUSTER"
_LAST_LINES = 12
_PAUSE_S = 0.1


@dataclass(frozen=True)
class Service:
    """One process of the cluster: its name, and what listens once it is there.

    Attributes
    ----------
    name : that of its pid file and its log
    ports : those that must be free before it starts
    """

    name: str
    ports: tuple[int, ...]


@contextlib.contextmanager
def alone(cluster: ClusterSettings) -> Iterator[None]:
    """Waits until no other command starts or ends processes of this cluster."""
    cluster.folder.mkdir(parents=True, exist_ok=True)
    with (cluster.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def start(
    cluster: ClusterSettings, service: Service, command: list[str], environment: Mapping[str, str] | None = None
) -> int:
    """Start a process that outlives this one, and return its id. What an earlier one left is ended first.

    Its output goes to `logs/NAME.log`, that of the start before to `logs/NAME.log.before`.

    Raises
    ------
    ClusterError
        Another program listens on one of its ports, or it cannot be started.
    """
    stop(cluster, service)
    taken = [port for port in service.ports if is_listening(port)]
    if taken:
        raise ClusterError(
            f"{service.name}: another program listens on {HOST}:{taken[0]}; end it, or set another port in "
            f"{cluster.folder / 'cluster.yaml'}"
        )
    log = log_of(cluster, service)
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_name(f"{log.name}.before"))
    with log.open("ab") as stream:  # so that `runners.logs.bound_logs` can cut it off
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=cluster.folder,
                env={**os.environ, **(environment or {}), _MARK: _mark(cluster, service)},
                start_new_session=True,
            )
        except OSError as error:
            raise ClusterError(f"{service.name}: {error}") from error
    path = _pid_file(cluster, service)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{process.pid}\n", encoding="utf-8")
    return process.pid


def running_pid(cluster: ClusterSettings, service: Service) -> int | None:
    """The id of the service's own process; None if it does not run."""
    try:
        pid = int(_pid_file(cluster, service).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return pid if _mark_of(pid) == _mark(cluster, service) else None


def stop(cluster: ClusterSettings, service: Service) -> int:
    """End the service and all that it started, first politely; returns how many processes that were."""
    found = _processes(cluster, service)
    _signal(found, signal.SIGTERM)
    if not _gone(cluster, service, found):
        left = _processes(cluster, service)
        _signal(left, signal.SIGKILL)
        _gone(cluster, service, left)
    _pid_file(cluster, service).unlink(missing_ok=True)
    return len(found)


def memory_mb(cluster: ClusterSettings, service: Service) -> int:
    """Resident memory of the service and all that it started, in MiB."""
    pages = 0
    for pid in _processes(cluster, service):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages += int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def wait_until(
    cluster: ClusterSettings, service: Service, is_ready: Callable[[], bool], patience_s: float = START_PATIENCE_S
) -> None:
    """Return when `is_ready` says so; ClusterError with the end of the log if the process ends, or takes too long."""
    deadline = time.monotonic() + patience_s
    while not is_ready():
        if running_pid(cluster, service) is None:
            raise ClusterError(f"{service.name} ended while it started; {log_end(log_of(cluster, service))}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{service.name} was not ready within {patience_s:g} s; {log_end(log_of(cluster, service))}"
            )
        time.sleep(_PAUSE_S)


def log_of(cluster: ClusterSettings, service: Service) -> Path:
    return cluster.logs / f"{service.name}.log"


def log_end(log: Path) -> str:
    """The last lines of a log, for an error message."""
    try:
        lines = log.read_text("utf-8", "replace").splitlines()[-_LAST_LINES:]
    except OSError as error:
        return f"there is no log: {error}"
    return f"the end of {log}:\n" + "\n".join(f"  {line}" for line in lines or ["(empty)"])


def is_listening(port: int) -> bool:
    """Whether a program answers on this port of the loopback interface."""
    with socket.socket() as trial:
        trial.settimeout(1.0)
        return trial.connect_ex((HOST, port)) == 0


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)  # one that was stopped would not hear it


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"
        )
    except OSError:
        return False


def _gone(cluster: ClusterSettings, service: Service, ended: list[int]) -> bool:
    """Whether `ended` and all other processes of the service are gone, after some waiting.

    One that ends has no environment any more while it still holds its ports.
    """
    deadline = time.monotonic() + STOP_PATIENCE_S
    while _processes(cluster, service) or any(map(is_alive, ended)):
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_S)
    return True


def _pid_file(cluster: ClusterSettings, service: Service) -> Path:
    return cluster.folder / "pids" / f"{service.name}.pid"


def _mark(cluster: ClusterSettings, service: Service) -> str:
    return f"{cluster.folder}/{service.name}"


def _processes(cluster: ClusterSettings, service: Service) -> list[int]:
    """All processes of a service, those whose parent has gone among them."""
    mark = _mark(cluster, service)
    return [pid for pid in _pids() if _mark_of(pid) == mark]


def _pids() -> Iterator[int]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            yield int(entry.name)


def _mark_of(pid: int) -> str | None:
    """The mark in the environment of a living process."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")  # empty for a zombie
    except OSError:
        return None
    prefix = f"{_MARK}=".encode()
    return next((os.fsdecode(entry[len(prefix) :]) for entry in entries if entry.startswith(prefix)), None)

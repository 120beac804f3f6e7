"""The pool of Python workers: starts one process for each task manager that asks for one.

Beam has such a pool; this one is ours because that listens on all interfaces, starts whatever `python` comes
first on the PATH, and ends workers by an id that two task managers give out alike. Here a worker is
ended when the task manager that asked for it no longer listens.

`python -m runners.cluster.worker_pool PORT LOGS`. What it and the workers have to say goes to standard error, one
JSON object a line. It also keeps the files of the folder LOGS from growing without end.
"""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc

from runners.cluster.settings import HOST
from runners.logs import bound_logs, log_json

_LOOK_S, _BOUND_S = 1.0, 60.0
_LOG = logging.getLogger("runners.cluster.worker_pool")
_STOP_PATIENCE_S = 10.0
# What the stages need is loaded before the worker is asked for anything: the first visit does not wait for it.
_WORKER = (
    "import sys; from runners.logs import log_json; log_json(); import pipelines.alert_production; "
    "from apache_beam.runners.worker.sdk_worker import SdkHarness; "
    "SdkHarness(sys.argv[1], worker_id=sys.argv[2]).run()"
)


@dataclass(frozen=True)
class _Worker:
    control: str
    process: subprocess.Popen[bytes]


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """Beam's worker pool service."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def StartWorker(self, request: Any, context: Any) -> Any:  # noqa: N802 (Beam's name)
        control = request.control_endpoint.url
        command = [sys.executable, "-c", _WORKER, control, request.worker_id]
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        except OSError as error:
            _LOG.error("no worker for the task manager at %s: %s", control, error)
            return beam_fn_api_pb2.StartWorkerResponse(error=str(error))
        _LOG.info("worker %d started for the task manager at %s", process.pid, control)
        with self._lock:
            self._workers.append(_Worker(control, process))
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(self, request: Any, context: Any) -> Any:  # noqa: N802 (Beam's name)
        # Its id may be another's as well; `sweep` ends it as soon as nobody listens to it.
        return beam_fn_api_pb2.StopWorkerResponse()

    def sweep(self) -> None:
        """End workers whose task manager no longer listens, and forget those that ended."""
        with self._lock:
            workers = list(self._workers)
        gone = [one for one in workers if one.process.poll() is not None or not _listens(one.control)]
        for worker in gone:
            code = worker.process.poll()
            if code is None:
                _end(worker.process)
                _LOG.info("worker %d ended: its task manager is gone", worker.process.pid)
            else:
                _LOG.warning("worker %d ended by itself, %s", worker.process.pid, _how(code))
        with self._lock:
            self._workers = [one for one in self._workers if one not in gone]


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5.0):
            return True
    except TimeoutError:
        return True  # stopped for a while, not gone
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(port: int, logs: Path) -> None:
    """Serve until this process is ended."""
    log_json()
    pool = WorkerPool()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    server.add_insecure_port(f"{HOST}:{port}")
    server.start()
    bounded_at = time.monotonic()
    while True:
        time.sleep(_LOOK_S)
        pool.sweep()
        if time.monotonic() > bounded_at + _BOUND_S:
            bounded_at = time.monotonic()
            try:
                bound_logs(logs)
            except OSError as error:  # no room: there may be some later
                _LOG.error("the logs in %s are not bounded: %s", logs, error)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""The pool of Python workers: starts one process for each task manager that asks for one.

Beam has such a pool; this one is ours because that listens on all interfaces, starts whatever `python` comes
first on the PATH, and ends workers by an id that two task managers give out alike. Here a worker is
ended when the task manager that asked for it no longer listens. And a task manager waits for ever for a worker that
ends before it has come to it: as long as it listens, another one is started in its place, also by the next pool.

`python -m runners.cluster.worker_pool PORT LOGS LIST`. What it and the workers have to say goes to standard error, one
JSON object a line. It also keeps the files of the folder LOGS from growing without end. The file LIST says which
workers were asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
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
# One whose end its task manager has seen is not needed any more when the job starts again, some looks later.
_LOOKS_AT_ENDED = 2
_STARTS = 5
# What the stages need is loaded before the worker is asked for anything: the first visit does not wait for it.
_WORKER = (
    "import sys; from runners.logs import log_json; log_json(); import pipelines.alert_production; "
    "from apache_beam.runners.worker.sdk_worker import SdkHarness; "
    "SdkHarness(sys.argv[1], worker_id=sys.argv[2]).run()"
)


@dataclass
class _Worker:
    """A worker that was asked for: by whom, its process, how often that was started, and seen to have ended."""

    control: str
    worker_id: str
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    looks: int = 0

    def start(self) -> None:
        command = [sys.executable, "-c", _WORKER, self.control, self.worker_id]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.starts += 1
        self.looks = 0
        _LOG.info("worker %d started for the task manager at %s", self.process.pid, self.control)


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """Beam's worker pool service. What the pool before it was asked for stands in `list_file`."""

    def __init__(self, list_file: Path) -> None:
        self._list_file = list_file
        self._workers = [_Worker(*one) for one in _listed(list_file)]
        self._lock = threading.Lock()

    def StartWorker(self, request: Any, context: Any) -> Any:  # noqa: N802 (Beam's name)
        worker = _Worker(request.control_endpoint.url, request.worker_id)
        with self._lock:
            try:
                worker.start()
            except OSError as error:
                _LOG.error("no worker for the task manager at %s: %s", worker.control, error)
                return beam_fn_api_pb2.StartWorkerResponse(error=str(error))
            self._workers.append(worker)
            self._write_list()
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(self, request: Any, context: Any) -> Any:  # noqa: N802 (Beam's name)
        # Its id may be another's as well; `sweep` ends it as soon as nobody listens to it.
        return beam_fn_api_pb2.StopWorkerResponse()

    def sweep(self) -> None:
        """End workers whose task manager no longer listens; start those again that ended, where it does."""
        with self._lock:
            workers = list(self._workers)
        gone = [one for one in workers if not _is_wanted(one)]
        with self._lock:
            self._workers = [one for one in self._workers if one not in gone]
            if gone:
                self._write_list()

    def _write_list(self) -> None:
        partial = self._list_file.with_name(f".{self._list_file.name}")
        partial.write_text(json.dumps([(one.control, one.worker_id) for one in self._workers]), encoding="utf-8")
        os.replace(partial, self._list_file)


def _listed(list_file: Path) -> list[tuple[str, str]]:
    try:
        return [(control, worker_id) for control, worker_id in json.loads(list_file.read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        return []  # there was no pool before


def _is_wanted(worker: _Worker) -> bool:
    """Look after a worker: end it where nobody listens to it, start it again where somebody does; which it was."""
    process = worker.process
    code = None if process is None else process.poll()
    if code is not None and process is not None:
        worker.looks += 1
        if worker.looks == 1:
            _LOG.warning("worker %d ended by itself, %s", process.pid, _how(code))
    if not _listens(worker.control):
        if process is not None and code is None:
            _end(process)
            _LOG.info("worker %d ended: its task manager is gone", process.pid)
        return False
    if process is None or worker.looks == _LOOKS_AT_ENDED:
        if worker.starts == _STARTS:
            _LOG.error("no further worker for the task manager at %s: %d have ended", worker.control, _STARTS)
            return False
        try:
            worker.start()
        except OSError as error:  # the next look is another chance
            worker.process = None
            _LOG.error("no worker for the task manager at %s: %s", worker.control, error)
    return True


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):  # a real-time signal has no name
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


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


def main(port: int, logs: Path, list_file: Path) -> None:
    """Serve until this process is ended."""
    log_json()
    pool = WorkerPool(list_file)
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
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))

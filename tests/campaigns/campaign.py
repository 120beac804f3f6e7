"""What campaigns on a live job share: a cluster and folder of their own, a journal, commands, waiting."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from runners.cluster.flink import flink_down, flink_up
from runners.cluster.kafka import kafka_service, kafka_up
from runners.cluster.processes import alone, is_listening, stop
from runners.cluster.settings import ClusterError, ClusterSettings, load_cluster_settings

CHECKOUT = Path(__file__).resolve().parents[2]
LOOK_S = 0.2
PATIENCE_S = 300.0
UP_ATTEMPTS = 3
_COMMAND = "import sys; from runners.cli import main; sys.exit(main(sys.argv[1:]))"


class Journal:
    """What happened, one JSON object a line; read again by the same command."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def write(self, event: str, **facts: Any) -> dict[str, Any]:
        entry = {"event": event, "at": round(time.time(), 3), **facts}
        with self._lock, self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            self.entries.append(entry)
        told = ", ".join(f"{name} {value}" for name, value in facts.items())
        if event not in ("announced", "sample"):
            print(f"{time.strftime('%H:%M:%S')} {event}: {told}", flush=True)
        return entry

    def of(self, event: str) -> list[dict[str, Any]]:
        with self._lock:
            return [entry for entry in self.entries if entry["event"] == event]


class CampaignError(RuntimeError):
    """The flow did not come back, or a command failed for good; the message says which."""


class Campaign:
    """A live job in a folder of its own; the same folder again goes on there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.settings = _cluster_settings(folder / "cluster")
        self.journal = Journal(folder / "journal.jsonl")
        self.enough = threading.Event()
        self.broken: BaseException | None = None

    @property
    def bootstrap(self) -> str:
        return self.settings.kafka.bootstrap

    def announced(self, since: float = 0.0) -> list[int]:
        """Visits announced so far, or after a moment."""
        return [entry["visit"] for entry in self.journal.of("announced") if entry["at"] > since]

    def in_ledger(self, visits: list[int]) -> list[int]:
        """Those of them that are in the ledger."""
        return [visit for visit in visits if (self.out / "ledger" / f"{visit}.json").exists()]

    def submission(self, visit_timeout_s: float) -> list[str]:
        """The command that submits the job."""
        return [
            *("flink", "submit", "--bootstrap", self.bootstrap, "--kafka", self.bootstrap, "--out", str(self.out)),
            *("--cluster", str(self.settings.folder), "--checkpoint-interval", "2"),
            *("--visit-timeout", str(visit_timeout_s)),
        ]

    def cluster_up(self) -> None:
        """What `nightstream cluster up` does; a few times, as a process may end while its neighbour is started."""
        for attempt in count(1):
            try:
                with alone(self.settings):
                    kafka_up(self.settings)
                    flink_up(self.settings)
                return
            except ClusterError as error:
                self.journal.write("not up", attempt=attempt, reason=str(error))
                if attempt == UP_ATTEMPTS:
                    raise

    def cluster_down(self) -> None:
        """End all of it."""
        with alone(self.settings):
            flink_down(self.settings)
            stop(self.settings, kafka_service(self.settings.kafka))

    @property
    def log(self) -> Path:
        return self.folder / "commands.log"

    def nightstream(self, *arguments: str) -> str:
        """What a command of nightstream prints, or nothing if it fails; all of it is in `commands.log`."""
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%H:%M:%S')} nightstream {' '.join(arguments)}\n")
            log.flush()
            done = subprocess.run(
                [sys.executable, "-c", _COMMAND, *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                text=True,
                check=False,
            )
            log.write(done.stdout)
        return (done.stdout or "done") if done.returncode == 0 else ""

    def until(self, fact: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not fact():
            if self.broken is not None:
                raise CampaignError("announcing broke off") from self.broken
            if time.monotonic() > deadline:
                raise CampaignError(f"waited {PATIENCE_S:g} s in vain for {what}; logs: {self.settings.logs}")
            time.sleep(LOOK_S)


def _cluster_settings(folder: Path) -> ClusterSettings:
    """A cluster of two task managers, on ports that nobody uses when the campaign begins."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cluster.yaml"
    if not path.exists():
        port = next(
            first for first in range(31_000, 60_000, 20) if not any(map(is_listening, range(first, first + 20)))
        )
        flink = {"rest_port": port, "rpc_port": port + 1, "job_server_port": port + 3, "worker_pool_port": port + 4}
        flink |= {"prometheus_ports": f"{port + 10}-{port + 19}", "task_managers": 2}
        path.write_text(yaml.safe_dump({"kafka": {"port": port + 5, "heap_mb": 512}, "flink": flink}))
    return load_cluster_settings(folder)


def children(pid: int) -> list[int]:
    """The children of a process, whichever of its threads started them."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return sorted(found)

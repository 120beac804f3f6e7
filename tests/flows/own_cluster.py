"""Clusters of a test's own, on ports of their own, beside those of `make kafka-up` and `make flink-up`."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from runners.cluster.processes import is_listening, running_pid
from runners.cluster.settings import ClusterSettings, load_cluster_settings

PATIENCE_S = 180.0
_PORTS = 20


def own_cluster(folder: Path, *, task_managers: int = 0) -> ClusterSettings:
    """The settings of a cluster on free ports, written to its folder."""
    port = free_ports(_PORTS)
    ports = {"rest_port": port, "rpc_port": port + 1, "job_server_port": port + 3, "worker_pool_port": port + 4}
    flink = {**ports, "prometheus_ports": f"{port + 10}-{port + _PORTS - 1}", "task_managers": task_managers}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"kafka": {"port": port + 5}, "flink": flink}))
    return load_cluster_settings(folder)


def free_ports(count: int) -> int:
    """The first of so many ports on which nobody listens."""
    while True:
        first = random.SystemRandom().randrange(20_000, 30_000)
        if not any(is_listening(first + offset) for offset in range(count)):
            return first


def kill(cluster: ClusterSettings, service: Any) -> None:
    pid = running_pid(cluster, service)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: running_pid(cluster, service) is None)


def until(fact: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not fact():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.1)

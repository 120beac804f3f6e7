"""The settings of the cluster on this machine, and the places of its files."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from runners.flink_setup import CHECKOUT

HOST = "127.0.0.1"
OVERRIDES = "cluster.yaml"
FOLDER = CHECKOUT / ".cluster"
Port = Annotated[int, Field(ge=1024, le=65000)]


class ClusterError(RuntimeError):
    """Something of the cluster cannot be had, or did not start; the message says what and why."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class KafkaSettings:
    """The Kafka broker. `port` is the plain listener's, then come the controller's and the broker teams'."""

    version: str
    port: Port
    heap_mb: int = Field(ge=256)
    max_message_bytes: int = Field(ge=1024)
    partitions: int = Field(ge=1)

    @property
    def controller_port(self) -> int:
        return self.port + 1

    @property
    def secured_port(self) -> int:
        return self.port + 2

    @property
    def bootstrap(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def secured_bootstrap(self) -> str:
        return f"{HOST}:{self.secured_port}"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FlinkClusterSettings:
    """Flink, Beam's job server and the pool of Python workers."""

    release: str
    rest_port: Port
    rpc_port: Port
    job_server_port: Port
    worker_pool_port: Port
    prometheus_ports: Annotated[str, Field(pattern=r"^\d+-\d+$")]
    task_managers: int = Field(ge=0)
    job_manager_mb: int = Field(ge=768)
    task_manager_mb: int = Field(ge=1024)
    job_server_heap_mb: int = Field(ge=256)
    restart_attempts: int = Field(ge=0)
    restart_delay_s: int = Field(ge=0)

    @property
    def slots(self) -> int:
        """How many task managers there are, of one slot each."""
        return self.task_managers or len(os.sched_getaffinity(0))

    @property
    def rest_url(self) -> str:
        return f"http://{HOST}:{self.rest_port}"

    @property
    def job_endpoint(self) -> str:
        return f"{HOST}:{self.job_server_port}"

    @property
    def artifact_port(self) -> int:
        return self.job_server_port - 1

    @property
    def worker_pool(self) -> str:
        return f"{HOST}:{self.worker_pool_port}"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ClusterSettings:
    """The shipped `cluster.yaml` with that of the folder laid over it."""

    kafka: KafkaSettings
    flink: FlinkClusterSettings
    folder: Path

    @property
    def logs(self) -> Path:
        return self.folder / "logs"


def load_cluster_settings(folder: Path = FOLDER) -> ClusterSettings:
    """The settings of the cluster in `folder`; ClusterError names the file and the key that cannot be used."""
    values = yaml.safe_load((resources.files("runners.config") / OVERRIDES).read_text("utf-8"))
    path = folder / OVERRIDES
    if path.is_file():
        try:
            values = _laid_over(values, yaml.safe_load(path.read_text("utf-8")) or {})
        except (yaml.YAMLError, ValueError) as error:
            raise ClusterError(f"{path}: {error}") from error
    try:
        return TypeAdapter(ClusterSettings).validate_python({**values, "folder": folder.absolute()})
    except ValidationError as error:
        first = error.errors()[0]
        raise ClusterError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _laid_over(values: dict[str, Any], others: Any) -> dict[str, Any]:
    if not isinstance(others, dict):
        raise ValueError("expected blocks named kafka and flink")
    laid = dict(values)
    for block, given in others.items():
        if not isinstance(given, dict):
            raise ValueError(f"{block}: expected keys and values")
        laid[block] = {**values.get(block, {}), **given}
    return laid

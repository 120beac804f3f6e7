"""The same night on the local runner and on an embedded Flink; and what is said where Flink is not ready.

Needs the job server that `make flink-setup` assembles; without it the night is skipped, with that command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState
from click.testing import CliRunner

import transforms.ingestion
from pipelines.night_simulation import simulate_night
from runners.cli import main
from runners.cluster.settings import load_cluster_settings
from runners.configuration import load_brokers, load_checked_filters, load_production_config
from runners.entries import night_input
from runners.flink import ClusterJob, flink_engine, start_detached
from runners.flink_setup import FlinkSetupError, JobServerVersions, jar_versions, java_command, load_flink_settings
from runners.local import BeamOptionsError, Run, local_engine
from runners.running import RunRequest, run_chain

PATIENCE_S = 120.0
TIMINGS = {"latency", "latency_s", "seconds"}


@pytest.fixture(scope="module")
def ready() -> JobServerVersions:
    """Skips, with the reason, where Flink is not set up."""
    try:
        java_command()
        return jar_versions(load_flink_settings().jar)
    except FlinkSetupError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flink") / "night"
    simulate_night("tiny", folder, seed=20261122)
    return folder


def produce(night: Path, out: Path, engine: contextlib.AbstractContextManager[Run]) -> None:
    filters, problems = load_checked_filters(None)
    request = RunRequest(out, load_production_config(None), load_brokers(None), filters, problems)
    run_chain(request, night_input(night, request), no_progress, engine)


def no_progress(n_visits: int) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


@dataclass
class HeldSource:
    """Lets the source release its last visit only when a visit stands in the ledger.

    The source runs in this process under LOOPBACK, so what it reads can be replaced here.
    """

    ledger: Path
    at_release: list[str]

    def slices_of(self, real: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
        outer = self

        class Held(list[Any]):
            def __getitem__(self, index: Any) -> Any:
                if index == len(self) - 1:
                    outer.wait()
                return super().__getitem__(index)

        return lambda manifest: Held(real(manifest))

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.closed_visits() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.at_release[:] = self.closed_visits()

    def closed_visits(self) -> list[str]:
        return sorted(path.stem for path in self.ledger.glob("[0-9]*.json"))


@dataclass(frozen=True)
class TwoRuns:
    local: Path
    flink: Path
    announced: list[str]
    at_release: list[str]


@pytest.fixture(scope="module")
def runs(ready: JobServerVersions, night: Path) -> Iterator[TwoRuns]:
    local, flink = night.parent / "local", night.parent / "flink"
    produce(night, local, local_engine(()))
    held = HeldSource(flink / "ledger", [])
    announced: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms.ingestion, "slices_of", held.slices_of(transforms.ingestion.slices_of))
        transforms.ingestion._parsed.cache_clear()
        produce(night, flink, flink_engine((), announced.append))
    yield TwoRuns(local, flink, announced, held.at_release)


def digests(out: Path, folder: str) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((out / folder).rglob("*"))
        if path.is_file()
    }


def ledger(out: Path) -> list[dict[str, Any]]:
    lines = (out / "ledger" / "visits.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


@pytest.mark.parametrize("folder", ["archive", "brokers", "filters"])
def test_flink_writes_the_local_runners_files_byte_for_byte(runs: TwoRuns, folder: str) -> None:
    on_flink = digests(runs.flink, folder)
    assert on_flink == digests(runs.local, folder)
    assert len(on_flink) >= 3


def test_flink_delivers_more_than_fifty_alerts_and_the_same_accounts(runs: TwoRuns) -> None:
    on_flink = ledger(runs.flink)
    assert on_flink == ledger(runs.local)
    assert len(on_flink) == 4
    assert sum(visit["alerts"] for visit in on_flink) > 50


def test_visits_are_closed_while_the_source_still_runs(runs: TwoRuns, night: Path) -> None:
    visits = [str(json.loads(line)["visit"]) for line in (night / "visits.jsonl").read_text().splitlines()]
    # The last visit was read from the manifest only after the first stood in the ledger with its alerts.
    assert runs.at_release
    assert runs.at_release[0] == visits[0]
    assert visits[-1] not in runs.at_release


def test_the_line_of_versions_is_announced(runs: TwoRuns, ready: JobServerVersions) -> None:
    (line,) = runs.announced
    assert str(ready) in line
    assert "[local]" in line


def test_an_option_that_no_part_of_beam_knows_is_refused_before_anything_is_written(
    ready: JobServerVersions, night: Path, tmp_path: Path
) -> None:
    with pytest.raises(BeamOptionsError, match="unexpected paralelism"):
        produce(night, tmp_path / "out", flink_engine(("--paralelism=3",), lambda line: None))
    assert not (tmp_path / "out").exists()


def test_a_jar_of_another_flink_is_refused(ready: JobServerVersions) -> None:
    refused = pytest.raises(FlinkSetupError, match=r"is for Flink 1\.19, asked for is Flink 2\.2")
    with refused, flink_engine(("--flink_version=2.2",), lambda line: None):
        pass


def test_without_a_job_server_the_command_to_run_is_said(night: Path, tmp_path: Path) -> None:
    arguments = ["produce", str(night), "--out", str(tmp_path / "out"), "--runner", "flink", "--quiet"]
    told = CliRunner().invoke(main, [*arguments, "--", f"--flink_job_server_jar={tmp_path / 'none.jar'}"])
    assert told.exit_code == 1
    assert "make flink-setup" in told.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_jar_is_refused(tmp_path: Path) -> None:
    half = tmp_path / "half.jar"
    half.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(FlinkSetupError, match=r"half\.jar is not a usable jar"):
        jar_versions(half)


def test_without_java_what_was_found_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "bin" / "java"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_402\"' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("runners.flink_setup._JAVA_FOLDER", tmp_path / "no-wheel")
    with pytest.raises(FlinkSetupError, match=r"no Java 17 to 21 \(.*java is Java 8\).*make flink-setup"):
        java_command()


class _Nothing:
    """A dataflow without stages."""

    def build(self, flow: beam.Pipeline, *, spread: bool = False) -> None: ...


@pytest.mark.parametrize("broken_off", [True, False])
def test_a_job_goes_on_only_if_whoever_submitted_it_knows_that_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken_off: bool
) -> None:
    """After Ctrl-C nothing would name it, and it would hold its slots."""
    cancelled = []

    class Result:
        state = PipelineState.RUNNING

        def cancel(self) -> None:
            cancelled.append(self)

    def running_job(job: ClusterJob) -> str:
        if broken_off:
            raise KeyboardInterrupt
        return "1f"

    monkeypatch.setattr(beam.Pipeline, "run", lambda flow: Result())
    monkeypatch.setattr("runners.flink._running_job", running_job)
    job = ClusterJob(load_cluster_settings(tmp_path).flink, "job", PipelineOptions([]))
    if broken_off:
        with pytest.raises(KeyboardInterrupt):
            start_detached(job, _Nothing())
    else:
        assert start_detached(job, _Nothing()) == "1f"
    assert len(cancelled) == broken_off

"""One simulated sky of two nights for the whole session, and runs of the command over parts of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipelines.night_simulation import simulate_night
from runners.cli import main
from schemas.avro.container import read_container

FIRST_DAY, SECOND_DAY = 20261122, 20261123


@dataclass(frozen=True)
class Run:
    """How one call of `nightstream produce`, `associate` or `replay` ended."""

    out: Path
    exit_code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """The object that --json printed."""
        return json.loads(self.stdout)

    def packets(self, folder: str = "archive/alerts") -> list[dict[str, Any]]:
        """Every packet below a folder of the output."""
        return [packet for path in sorted((self.out / folder).rglob("*.avro")) for packet in read_container(path)]

    def failures(self) -> list[dict[str, Any]]:
        """Every failure record."""
        files = sorted((self.out / "failures").glob("*.jsonl"))
        return [json.loads(line) for path in files for line in path.read_text().splitlines()]

    def assert_refused(self, exit_code: int, *words: str) -> None:
        """It ended with this exit code and a message, no traceback, that holds these words; nothing on stdout."""
        assert self.exit_code == exit_code, self.stderr
        assert self.stdout == ""
        text = " ".join(self.stderr.split())
        assert not [word for word in words if word not in text], text
        assert "Traceback" not in text

    def files(self, *folders: str) -> dict[str, bytes]:
        """Contents of the files below folders of the output, by path."""
        paths = [path for folder in folders for path in sorted((self.out / folder).rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.out)): path.read_bytes() for path in paths}


@pytest.fixture(scope="session")
def two_nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A night folder with two nights of four visits of two detectors."""
    return simulate_night("tiny", tmp_path_factory.mktemp("sky") / "nights", seed=20261122, nights=2).folder


@pytest.fixture(scope="session")
def visits(two_nights: Path) -> list[dict[str, Any]]:
    """The manifest's records of both nights, in order."""
    return [json.loads(line) for line in (two_nights / "visits.jsonl").read_text().splitlines()]


def write_night(folder: Path, images: Path, records: Sequence[dict[str, Any] | str]) -> Path:
    """A night folder with these manifest lines, and the images and tables of another by link."""
    folder.mkdir(parents=True)
    for beside in images.iterdir():
        if beside.name != "visits.jsonl":
            (folder / beside.name).symlink_to(beside)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "visits.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def nights(two_nights: Path, visits: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The two nights as a folder each."""
    base = tmp_path_factory.mktemp("nights")
    days = {day: [visit for visit in visits if visit["day_obs"] == day] for day in (FIRST_DAY, SECOND_DAY)}
    return {day: write_night(base / str(day), two_nights, records) for day, records in days.items()}


def run_command(command: str, inputs: Path | Sequence[Path], out: Path, *options: str | Path) -> Run:
    """Run `nightstream COMMAND INPUTS --out OUT --json ...` in this process."""
    given = [inputs] if isinstance(inputs, Path) else inputs
    arguments = [command, *map(str, given), "--out", str(out), "--json", *map(str, options)]
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Run(out, result.exit_code, result.stdout, result.stderr)


def run_produce(night: Path, out: Path, *options: str | Path) -> Run:
    """Run `nightstream produce NIGHT ...`."""
    return run_command("produce", night, out, *options)


@pytest.fixture(scope="session")
def produce() -> Callable[..., Run]:
    """`run_produce`."""
    return run_produce


@pytest.fixture(scope="session")
def associate() -> Callable[..., Run]:
    """Runs `nightstream associate`: (table, out, *options) -> Run."""
    return partial(run_command, "associate")


@pytest.fixture(scope="session")
def replay() -> Callable[..., Run]:
    """Runs `nightstream replay`: (packets or a list of such, out, *options) -> Run."""
    return partial(run_command, "replay")


@pytest.fixture(scope="session")
def night_of() -> Callable[..., Path]:
    """`write_night`."""
    return write_night


@pytest.fixture(scope="session")
def first_run(nights: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The first night, every broker reading from the embedded Kafka."""
    run = run_produce(nights[FIRST_DAY], tmp_path_factory.mktemp("first") / "out", "--kafka", "embedded")
    assert run.exit_code == 0, run.stderr
    return run

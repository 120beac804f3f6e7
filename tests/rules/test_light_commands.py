"""Commands that only ask Flink, or tell it something, start at once: nothing of Beam or of numbers is imported."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from runners.flink_commands import _FAILURES, _MISUSES

HEAVY = ("apache_beam", "numpy", "pyarrow", "numba", "astropy")
PROGRAM = """
import sys
from runners.cli import main
try:
    main(sys.argv[1:])
finally:
    print("imported:", *[name for name in {heavy} if name in sys.modules])
"""


def _heavy_imports(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *arguments],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    *_, last = done.stdout.splitlines()
    assert last.startswith("imported:"), done.stderr
    return last.split()[1:]


@pytest.mark.parametrize("command", ["status", "savepoint", "cancel"])
def test_commands_for_a_job_import_nothing_heavy(command: str, tmp_path: Path) -> None:
    """Also not to say what is wrong: here that the folder is no job's."""
    assert _heavy_imports("flink", command, str(tmp_path)) == []


def test_help_and_what_status_is_made_of_import_nothing_heavy() -> None:
    assert _heavy_imports("flink", "status", "--help") == []
    program = f"import runners.flink_operations, sys; sys.exit(any(name in sys.modules for name in {HEAVY}))"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent.parent).returncode == 0


def test_the_errors_that_are_known_by_name_are_there() -> None:
    for name in _FAILURES | _MISUSES:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), Exception)

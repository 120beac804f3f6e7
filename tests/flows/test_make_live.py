"""`make live` leaves no job behind, at whichever moment it is broken off; its commands are stand-ins here."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
# Writes down what it is asked for. What is to be slow lasts until it is ended.
STAND_IN = """#!/bin/sh
echo "$1 $2" >> "$CALLS"
case "$1 $2" in
  "simulate --preset") mkdir -p "$5" && echo visit > "$5/visits.jsonl" ;;
  "flink submit") eval "out=\\${$#}"; mkdir -p "$out"; [ "$FAILS" = "$1 $2" ] || touch "$out/.flink.json" ;;
esac
[ "$SLOW" = "$1 $2" ] && exec sleep 60
[ "$FAILS" != "$1 $2" ]
"""
BEGIN = ["cluster up", "simulate --preset", "flink submit"]
END = ["flink cancel", "flink close"]


def _calls(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _make_live(folder: Path, slow: str = "", fails: str = "") -> tuple[int, list[str]]:
    """Exit code and calls of a run that is broken off in the command that is slow; announcing is beside the others."""
    stand_in, calls = folder / "bin" / "nightstream", folder / "calls"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    process = subprocess.Popen(
        ["make", "--old-file=setup", "live", f"BIN={stand_in.parent}", f"NIGHTS={folder / 'nights'}"],
        cwd=CHECKOUT,
        env={**os.environ, "CALLS": str(calls), "SLOW": slow, "FAILS": fails},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        if slow:
            deadline = time.monotonic() + 20.0
            while slow not in _calls(calls):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        code = process.wait(20.0)
    finally:
        process.kill()
    return code, [call for call in _calls(calls) if not call.startswith("announce")]


def test_a_night_that_is_through_is_cancelled_and_closed(tmp_path: Path) -> None:
    assert _make_live(tmp_path) == (0, [*BEGIN, "flink watch", *END])


@pytest.mark.parametrize(("fails", "calls"), [("flink submit", BEGIN), ("flink watch", [*BEGIN, "flink watch", *END])])
def test_what_fails_is_told_by_the_exit_code(tmp_path: Path, fails: str, calls: list[str]) -> None:
    code, called = _make_live(tmp_path, fails=fails)
    assert code != 0
    assert called == calls


@pytest.mark.parametrize("slow", [*BEGIN, "flink watch"])
def test_ctrl_c_ends_the_job_that_was_submitted(tmp_path: Path, slow: str) -> None:
    """Also where it comes when the job runs, and the command that submitted it has not returned."""
    code, calls = _make_live(tmp_path, slow=slow)
    assert code != 0
    begun = [*BEGIN, "flink watch"]
    assert calls == [*begun[: begun.index(slow) + 1], *(END if slow.startswith("flink") else [])]

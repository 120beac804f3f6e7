"""The crash campaign in its short form, `make cluster-test`; and its plan, which no cluster is needed for."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import crash_campaign
import pytest
from crash_campaign import STOP_S, STOPS_IN_A_ROUND, VICTIMS, planned_kills


def test_each_round_of_kills_has_every_victim_once_and_follows_from_the_seed() -> None:
    kills = list(islice(planned_kills(7), 20 * len(VICTIMS)))
    assert kills == list(islice(planned_kills(7), len(kills)))
    assert kills != list(islice(planned_kills(8), len(kills)))
    rounds = [kills[start : start + len(VICTIMS)] for start in range(0, len(kills), len(VICTIMS))]
    for one in rounds:
        assert sorted(kill.victim for kill in one) == sorted(VICTIMS)
        stops = [kill.stop_s for kill in one if kill.stop_s]
        assert len(stops) == STOPS_IN_A_ROUND
        assert all(STOP_S[0] <= seconds <= STOP_S[1] for seconds in stops)
    assert {kill.kind for kill in kills} == {f"{victim}, {how}" for victim in VICTIMS for how in ("killed", "stopped")}
    assert len({tuple(kill.victim for kill in one) for one in rounds}) > 10


@pytest.mark.cluster
def test_no_alert_is_lost_or_contradicted_by_six_kills(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, crash_campaign.__file__, "--kills", str(len(VICTIMS)), "--folder", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout

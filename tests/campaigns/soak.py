"""A live job for hours: memory, state, lag and latency while the same sky is visited again and again.

    python tests/campaigns/soak.py --folder nights/soak --minutes 120 --idle-minutes 60 --bursts 10000

Brings up a Kafka broker and a Flink cluster of its own, submits the live job, and announces one simulated night of a
small field over and over, each time some days of the sky later: a year, after which history leaves, passes in
`VISITS_A_YEAR` visits. Then, if asked for, nothing is announced for a while, and then a message that repeats what was
announced comes often enough for the source to make a turn of its own of each (a burst).

Every `SAMPLE_S` seconds the memory of all processes, the size and duration of the latest checkpoint and how far the
ledger is behind go to `journal.jsonl` in the folder, from which the tables at the end are made. Exit code 0: all visits
came into the ledger, and neither memory (Kafka's apart), state nor latency grew in the second half by more than
`GROWTH`; and a burst left at most `BURST_BYTES` in the checkpoints.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from campaign import Campaign, CampaignError, children

from pipelines.night_simulation import NightPreset, simulate_night
from runners.cluster.flink import job_manager, job_server, task_managers, worker_pool
from runners.cluster.kafka import kafka_service
from runners.cluster.processes import running_pid
from runners.cluster.settings import ClusterError
from runners.flink_operations import checkpoints, read_live_job
from runners.kafka import DeliveryError, KafkaMessageLog
from schemas.manifests import VISITS_TOPIC, Visit, announcements, read_manifest

SAMPLE_S = 10.0
GROWTH = 0.10
BURST_BYTES = 6144
BURST_S = 0.3  # the source reads for 0.2 s from the first message on
NIGHT = NightPreset(
    "soak",
    n_visits=6,
    n_detectors=2,
    size_pix=384,
    bands=("g", "r"),
    group_gap_min=3.0,
    appearance_window_h=0.3,
    stars_per_arcmin2=240.0,
    transients_per_arcmin2=5.0,
    variables_per_arcmin2=5.0,
    asteroids_per_arcmin2=0.0,
)
NIGHT_STEP_D = 6
VISITS_A_YEAR = 365 // NIGHT_STEP_D * NIGHT.n_visits
WINDOWS = 8
MIN_MINUTES = 3 * WINDOWS * SAMPLE_S / 60.0


def revisits(folder: Path, seed: int) -> Iterator[Visit]:
    """The night without end, each time `NIGHT_STEP_D` days later; the images stay the same."""
    night = simulate_night(NIGHT, folder, seed)
    visits = read_manifest(night.folder).visits
    for turn in count():
        days = turn * NIGHT_STEP_D
        for visit in visits:
            date = datetime.datetime.strptime(str(visit.day_obs), "%Y%m%d") + datetime.timedelta(days)
            day_obs = int(date.strftime("%Y%m%d"))
            yield replace(
                visit,
                visit=day_obs * 100_000 + visit.seq_num,
                day_obs=day_obs,
                midpoint_mjd_tai=visit.midpoint_mjd_tai + days,
                readout_end_mjd_tai=visit.readout_end_mjd_tai + days,
            )


class Soak(Campaign):
    """One soak in a folder of its own."""

    def run(self, seed: int, cadence_s: float, minutes: float, idle_minutes: float, bursts: int) -> bool:
        """All of it; whether nothing grew."""
        sampler = threading.Thread(target=self._sample, name="sampler", daemon=True)
        try:
            self.cluster_up()
            if not self.nightstream(*self.submission(visit_timeout_s=60.0)):
                raise CampaignError(f"the job was not submitted: {self.log}")
            sampler.start()
            log = KafkaMessageLog(self.bootstrap, VISITS_TOPIC)
            latest = self._announce(log, seed, cadence_s, minutes)
            self.until(lambda: len(self.in_ledger(self.announced())) == len(self.announced()), "all visits")
            self.journal.write("visits done")
            self.enough.wait(3 * SAMPLE_S)
            self.journal.write("idle", minutes=idle_minutes)
            self.enough.wait(60.0 * idle_minutes)
            self.journal.write("bursts", number=bursts)
            self._burst(log, latest, bursts)
            self.enough.wait(3 * SAMPLE_S)
            self.journal.write("end")
        finally:
            self.enough.set()
            if sampler.is_alive():
                sampler.join()
            self.cluster_down()
        return self._judge()

    def _announce(self, log: KafkaMessageLog, seed: int, cadence_s: float, minutes: float) -> Visit:
        began = time.monotonic()
        for number, visit in enumerate(revisits(self.folder / "night", seed)):
            _append(log, announcements(visit))
            self.journal.write("announced", visit=visit.visit)
            if self.broken is not None:
                raise CampaignError("sampling broke off") from self.broken
            if time.monotonic() - began > 60.0 * minutes:
                break
            time.sleep(max(began + (number + 1) * cadence_s - time.monotonic(), 0.0))
        return visit

    def _burst(self, log: KafkaMessageLog, visit: Visit, bursts: int) -> None:
        """Announce again what is known, one message at a time."""
        for _ in range(bursts):
            _append(log, announcements(visit)[:1])
            time.sleep(BURST_S)

    # --- sampling -----------------------------------------------------------------------------

    def _sample(self) -> None:
        try:
            self._sample_on()
        except BaseException as error:
            self.broken = error

    def _sample_on(self) -> None:
        while not self.enough.wait(SAMPLE_S):
            announced = self.announced()
            facts: dict[str, Any] = {"behind": len(announced) - len(self.in_ledger(announced)), "mb": self._memory()}
            try:
                saved = checkpoints(read_live_job(self.out))["latest"]["completed"]
            except (ClusterError, KeyError):
                saved = None
            if saved is not None:
                facts |= {"state_bytes": saved["state_size"], "checkpoint_s": saved["end_to_end_duration"] / 1000.0}
            self.journal.write("sample", **facts)

    def _memory(self) -> dict[str, float]:
        """Resident megabytes by process; the workers' together."""
        flink = self.settings.flink
        services = {
            "job manager": job_manager(flink),
            **{f"task manager {number}": one for number, one in enumerate(task_managers(flink))},
            "job server": job_server(flink),
            "Kafka": kafka_service(self.settings.kafka),
        }
        pids = {name: running_pid(self.settings, service) for name, service in services.items()}
        pool = running_pid(self.settings, worker_pool(flink))
        memory = {name: _resident_mb(pid) for name, pid in pids.items() if pid is not None}
        if pool is not None:
            memory["workers"] = sum(_resident_mb(pid) for pid in (pool, *children(pool)))
        return memory

    # --- the end ------------------------------------------------------------------------------

    def _judge(self) -> bool:
        """Print what was sampled; whether it stayed within bounds."""
        first, last = self.journal.of("announced")[0]["at"], self.journal.of("visits done")[-1]["at"]
        windows = [self._window(first, last, number) for number in range(WINDOWS)]
        names = list(windows[0])
        print(" ".join(f"{name:>15}" for name in names))
        for window in windows:
            print(" ".join(f"{window[name]:>15.1f}" for name in names))
        # The state grows for a year of the sky, and Java's heaps until their first large collection.
        early, late = windows[WINDOWS // 2 : WINDOWS * 5 // 8], windows[WINDOWS * 7 // 8 :]
        grown = {
            name: _mean(late, name) / _mean(early, name) - 1.0
            for name in names
            if name not in ("minutes", "visits", "behind", "Kafka")
        }
        print("growth in the second half: " + ", ".join(f"{name} {value:+.1%}" for name, value in grown.items()))
        per_burst = self._residue()
        return all(value <= GROWTH for value in grown.values()) and per_burst <= BURST_BYTES

    def _window(self, first: float, last: float, number: int) -> dict[str, float]:
        start, stop = (first + (last - first) * edge / WINDOWS for edge in (number, number + 1))
        samples = [one for one in self.journal.of("sample") if start <= one["at"] < stop]
        announced = {one["visit"]: one["at"] for one in self.journal.of("announced") if start <= one["at"] < stop}
        waited = sorted((self.out / "ledger" / f"{visit}.json").stat().st_mtime - at for visit, at in announced.items())
        names = sorted({name for one in samples for name in one["mb"]})
        return {
            "minutes": (stop - first) / 60.0,
            "visits": len(announced),
            "behind": max(one["behind"] for one in samples),
            "p50 s": statistics.median(waited),
            "p90 s": waited[len(waited) * 9 // 10],
            "state MB": _mean(samples, "state_bytes") / 1e6,
            "checkpoint s": _mean(samples, "checkpoint_s"),
            **{name: statistics.mean(one["mb"][name] for one in samples if name in one["mb"]) for name in names},
        }

    def _residue(self) -> float:
        """What a burst, and a minute without one, left in the checkpoints; bytes a burst."""
        idle, bursts, end = (self.journal.of(event)[-1] for event in ("idle", "bursts", "end"))
        sizes = [self._state_at(entry["at"]) for entry in (idle, bursts, end)]
        waited_min = (bursts["at"] - idle["at"]) / 60.0
        per_burst = (sizes[2] - sizes[1]) / bursts["number"] if bursts["number"] else 0.0
        print(f"state after the visits {sizes[0]:,} bytes; after {waited_min:.0f} minutes of nothing {sizes[1]:,}")
        print(f"after {bursts['number']} bursts {sizes[2]:,}: {per_burst:.1f} bytes a burst")
        return per_burst

    def _state_at(self, at: float) -> int:
        sizes = [one["state_bytes"] for one in self.journal.of("sample") if one["at"] <= at and "state_bytes" in one]
        return int(sizes[-1])


def _append(log: KafkaMessageLog, messages: list[bytes]) -> None:
    while True:
        try:
            return log.append(messages)
        except DeliveryError:
            time.sleep(1.0)  # and again: what came twice is read once


def _resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024.0 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def _mean(records: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(one[name] for one in records if name in one)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0, help="how long visits are announced")
    parser.add_argument("--idle-minutes", type=float, default=0.0, help="how long nothing is, after that")
    parser.add_argument("--bursts", type=int, default=0, help="how many single messages come, after that")
    parser.add_argument("--seed", type=int, default=20261122, help="the sky follows from it")
    parser.add_argument("--cadence", type=float, default=3.0, help="seconds from one visit to the next")
    parser.add_argument("--folder", type=Path, required=True, help="for everything; a new one")
    options = parser.parse_args(arguments)
    if options.minutes < MIN_MINUTES:
        parser.error(f"--minutes: at least {MIN_MINUTES:g}, for there to be something to compare")
    options.folder.mkdir(parents=True)
    soak = Soak(options.folder.resolve())
    good = soak.run(options.seed, options.cadence, options.minutes, options.idle_minutes, options.bursts)
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is ended then, too
    sys.exit(main())

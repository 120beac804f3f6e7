"""Kills parts of a live night at random moments, and proves that no alert was lost or contradicted.

    python tests/campaigns/crash_campaign.py --kills 6 --folder nights/crashes

Brings up a Kafka broker and a Flink cluster of its own, submits the live job, announces visits of simulated fields
one after the other, and meanwhile kills (SIGKILL) or stops for a while (SIGSTOP, SIGCONT) the task manager, the job
manager, the Python worker, their pool, the Kafka broker and the job server. What does not come back by itself is
brought back by the commands an operator has: `cluster up`, and `flink resume` where the job was lost. At the end the
topics are compared with a run of the same visits that nobody disturbed (`stream_checker`).

Victims come in rounds, each of which has all of them once; they, the moments and the signals follow from the seed. In
the folder, `journal.jsonl` says what happened when; the same command again goes on where it was. Exit code 0: nothing
lost, nothing contradicted, each visit in the ledger with all its detectors.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

from campaign import LOOK_S, PATIENCE_S, Campaign, CampaignError, children
from stream_checker import check_streams, report_lines

from pipelines.night_simulation import NightPreset, simulate_night
from runners.cluster.flink import ENDED, job_manager, job_server, task_managers, worker_pool
from runners.cluster.kafka import kafka_service
from runners.cluster.processes import is_alive, running_pid
from runners.cluster.settings import ClusterError
from runners.flink_operations import LOST, read_live_job, state_of
from runners.kafka import DeliveryError, KafkaMessageLog
from schemas.manifests import VISITS_TOPIC, DetectorImages, Visit, announcements, read_manifest, write_manifest

TASK_MANAGER, JOB_MANAGER, WORKER, POOL, KAFKA, JOB_SERVER = VICTIMS = (
    "task manager",
    "job manager",
    "Python worker",
    "worker pool",
    "Kafka broker",
    "job server",
)
STOP_S = (5.0, 30.0)
PAUSE_S = (1.0, 15.0)  # between one recovery and the next kill
STOPS_IN_A_ROUND = 2
HASTE = 0.2  # share of kills after which nobody waits for the recovery
VISITS_OF_A_FIELD, DETECTORS = 24, 2
GAPPY = 5  # the visit of each field that waits in vain for a further detector
VISIT_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Kill:
    """What is done to whom. `stop_s`: seconds until it may go on; 0 where it is killed."""

    number: int
    victim: str
    stop_s: float
    pause_s: float
    in_haste: bool

    @property
    def kind(self) -> str:
        return f"{self.victim}, {'stopped' if self.stop_s else 'killed'}"


def planned_kills(seed: int) -> Iterator[Kill]:
    """The kills of a campaign; the same seed gives the same ones."""
    for number in count():
        in_round = number % len(VICTIMS)
        of_round = random.Random(f"{seed}/{number // len(VICTIMS)}")
        victims = of_round.sample(VICTIMS, len(VICTIMS))
        stopped = of_round.sample(VICTIMS, STOPS_IN_A_ROUND)
        own = random.Random(f"{seed}//{number}")
        stop_s = own.uniform(*STOP_S)
        yield Kill(
            number=number,
            victim=victims[in_round],
            stop_s=stop_s if victims[in_round] in stopped else 0.0,
            pause_s=own.uniform(*PAUSE_S),
            in_haste=own.random() < HASTE,
        )


def simulated_visits(folder: Path, seed: int) -> Iterator[Visit]:
    """Visits without end: night after night of another field each, simulated when they are asked for.

    One of each field expects a detector without images, which is never announced: its closing is by time-out.
    """
    first = datetime.date(2026, 11, 22)
    for number in count():
        preset = NightPreset(
            "campaign",
            n_visits=VISITS_OF_A_FIELD,
            n_detectors=DETECTORS,
            size_pix=384,
            bands=("g", "r"),
            group_gap_min=3.0,
            day_obs=int((first + datetime.timedelta(number)).strftime("%Y%m%d")),
            start_mjd_tai=61367.1 + number,
            sky_epoch_mjd_tai=61367.1 + number,
            appearance_window_h=0.3,
            ra_deg=(150.1 + 2.0 * number) % 360.0,
            stars_per_arcmin2=240.0,
            transients_per_arcmin2=6.5,
            variables_per_arcmin2=5.0,
            asteroids_per_arcmin2=1.2,
        )
        field = simulate_night(preset, folder / f"field-{number}", seed + number)
        for place, visit in enumerate(read_manifest(field.folder).visits):
            missing = DetectorImages(len(visit.detectors), str(field.folder / "missing.fits"), None)
            yield replace(visit, detectors=(*visit.detectors, missing)) if place == GAPPY else visit


class CrashCampaign(Campaign):
    """One campaign in a folder of its own."""

    def __init__(self, folder: Path, seed: int, cadence_s: float) -> None:
        super().__init__(folder)
        self.seed = seed
        self.cadence_s = cadence_s
        self.truth = folder / "truth"

    def run(self, kills: int) -> bool:
        """All of it; whether nothing was lost or contradicted."""
        announcer = threading.Thread(target=self._announce, name="announcer")
        try:
            self.cluster_up()
            self._bring_back_job()
            announcer.start()
            try:
                self.until(lambda: self.in_ledger(self.announced()), "the first visit")
                for kill in planned_kills(self.seed):
                    if kill.number >= kills:
                        break
                    if kill.number >= len(self.journal.of("recovered")):
                        self._do(kill)
            finally:
                self.enough.set()
                announcer.join()
            self._settle()
            return self._judge()
        finally:
            self.enough.set()
            self.cluster_down()

    # --- announcing ---------------------------------------------------------------------------

    def _announce(self) -> None:
        """Announce a visit every `cadence_s` seconds, whatever happens meanwhile."""
        try:
            log = KafkaMessageLog(self.bootstrap, VISITS_TOPIC)
            done = len(self.journal.of("announced"))
            for number, visit in enumerate(simulated_visits(self.folder / "night", self.seed)):
                if number < done:
                    continue
                while not self.enough.is_set():
                    with contextlib.suppress(DeliveryError):  # again: what came twice is read once
                        log.append(announcements(visit)[:DETECTORS])
                        self.journal.write("announced", visit=visit.visit)
                        break
                    time.sleep(LOOK_S)
                if self.enough.wait(self.cadence_s):
                    return
        except BaseException as error:
            self.broken = error

    def _written(self, announced_since: float, since: float) -> list[float]:
        """When ledger records were written after a moment, of visits announced after another."""
        visits = self.in_ledger(self.announced(announced_since))
        times = [(self.out / "ledger" / f"{visit}.json").stat().st_mtime for visit in visits]
        return [at for at in times if at > since]

    # --- killing ------------------------------------------------------------------------------

    def _do(self, kill: Kill) -> None:
        pid = self._pid(kill)
        began = time.time()
        if kill.stop_s:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(kill.stop_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        else:
            os.kill(pid, signal.SIGKILL)
            self.until(lambda: not is_alive(pid), f"the end of {kill.victim}")
        self.journal.write(kill.kind, number=kill.number, pid=pid, stop_s=round(kill.stop_s, 1))
        self.cluster_up()
        # Without its job manager the job goes on for some seconds: that is no recovery.
        since = self._bring_back_job() or began
        if not kill.in_haste:
            self.until(lambda: self._written(began, since), f"a visit after: {kill.kind}")
        self.journal.write(
            "recovered",
            number=kill.number,
            kind=kill.kind,
            seconds=None if kill.in_haste else round(min(self._written(began, since)) - began, 1),
            open_visits=len(self.announced()) - len(self.in_ledger(self.announced())),
        )
        time.sleep(kill.pause_s)

    def _pid(self, kill: Kill) -> int:
        """The process to be killed, once there is one; task managers take turns."""
        flink = self.settings.flink
        services = {
            TASK_MANAGER: task_managers(flink)[kill.number % flink.slots],
            JOB_MANAGER: job_manager(flink),
            POOL: worker_pool(flink),
            KAFKA: kafka_service(self.settings.kafka),
            JOB_SERVER: job_server(flink),
        }
        found: list[int] = []

        def look() -> list[int]:
            if kill.victim == WORKER:
                pool = running_pid(self.settings, worker_pool(flink))
                found[:] = [] if pool is None else children(pool)
            else:
                pid = running_pid(self.settings, services[kill.victim])
                found[:] = [] if pid is None else [pid]
            return found

        self.until(look, f"a {kill.victim}")
        return found[0]

    def _bring_back_job(self) -> float | None:
        """Submit the job at first, and resume it where Flink does not know it any more or gave it up; when that was."""
        deadline = time.monotonic() + PATIENCE_S
        while (how := self._missing_command()) is not None:
            began = time.time()
            event, arguments = how
            if self.nightstream(*arguments):
                self.journal.write(event, job=read_live_job(self.out).latest.job)
                return began
            if time.monotonic() > deadline:
                raise CampaignError(f"the job was not {event} within {PATIENCE_S:g} s: {self.log}")
            self.cluster_up()
        return None

    def _missing_command(self) -> tuple[str, list[str]] | None:
        submit = self.submission(VISIT_TIMEOUT_S)
        if not (self.out / ".flink.json").exists():
            return "submitted", submit
        if self._state() not in (LOST, *ENDED):
            return None
        jobs = json.loads((self.out / ".flink.json").read_text())["runs"]
        checkpoints = self.settings.folder / "flink" / "checkpoints"
        if not any(list((checkpoints / run["job"]).glob("chk-*/_metadata")) for run in jobs):
            return "submitted anew", submit
        return "resumed", ["flink", "resume", str(self.out)]

    def _state(self) -> str:
        """Flink's word for the state of the job; asked again while Flink does not answer."""
        told: list[str] = []

        def ask() -> list[str]:
            with contextlib.suppress(ClusterError):
                told.append(state_of(read_live_job(self.out)))
            return told

        self.until(ask, "an answer of Flink")
        return told[0]

    # --- the end ------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait until the ledger has all that was announced, and end the job."""
        announced = self.announced()
        self.until(lambda: len(self.in_ledger(announced)) == len(announced), "all announced visits")
        if not self.nightstream("flink", "cancel", str(self.out)):
            raise CampaignError(f"the job could not be cancelled: {self.log}")

    def _judge(self) -> bool:
        """Make the truth, compare, print."""
        announced = self.announced()
        night = self.folder / "night"
        write_manifest(night, list(islice(simulated_visits(night, self.seed), len(announced))))
        shutil.rmtree(self.truth, ignore_errors=True)
        if not self.nightstream("produce", str(night), "--out", str(self.truth), "--quiet", "--json"):
            raise CampaignError(f"the truth could not be made: {self.log}")
        reports = check_streams(self.bootstrap, self.truth)
        different = _different(self.out, self.truth)
        print(*self._table(), "", *report_lines(reports), sep="\n")
        print(
            f"{len(announced)} visits announced; ledger records that differ from the undisturbed run: {len(different)}"
        )
        print(*different[:5], sep="\n")
        return not different and all(report.is_good for report in reports.values())

    def _table(self) -> Iterator[str]:
        """Kills by kind, and how long the recovery took."""
        yield f"{'':<24}{'kills':>8}{'recovery p50':>14}{'max':>8}   s"
        recovered = self.journal.of("recovered")
        kinds = sorted({entry["kind"] for entry in recovered})
        for kind, entries in [
            *((kind, [one for one in recovered if one["kind"] == kind]) for kind in kinds),
            ("all", recovered),
        ]:
            seconds = [entry["seconds"] for entry in entries if entry["seconds"] is not None]
            figures = f"{statistics.median(seconds):>14.1f}{max(seconds):>8.1f}" if seconds else ""
            yield f"{kind:<24}{len(entries):>8}{figures}"
        for event in ("submitted", "resumed", "submitted anew"):
            yield f"job {event}: {len(self.journal.of(event))}"


def _different(out: Path, truth: Path) -> list[str]:
    """Visits whose ledger record does not say what the undisturbed run's says, clocks and repeats apart."""
    wrong = []
    for path in sorted((truth / "ledger").glob("[0-9]*.json")):
        ours = out / "ledger" / path.name
        of_truth, of_us = (json.loads(one.read_text()) if one.exists() else None for one in (path, ours))
        for name in ("alerts", "alerts_digest", "detectors", "dia_sources", "failures"):
            if of_us is None or of_us[name] != of_truth[name]:
                wrong.append(f"{path.stem}: {name} {None if of_us is None else of_us[name]}, expected {of_truth[name]}")
                break
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="how many; rounds of 6 have each victim once")
    parser.add_argument("--seed", type=int, default=20261122, help="victims, moments, signals and sky follow from it")
    parser.add_argument("--cadence", type=float, default=4.0, help="seconds from one visit to the next")
    parser.add_argument("--folder", type=Path, required=True, help="for everything; the same again goes on there")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    campaign = CrashCampaign(options.folder.resolve(), options.seed, options.cadence)
    return 0 if campaign.run(options.kills) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is ended then, too
    sys.exit(main())

"""Kills parts of a live night at random moments, and proves that no alert was lost or contradicted.

    python tests/campaigns/crash_campaign.py --kills 6

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
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import yaml
from stream_checker import check_streams, report_lines

from pipelines.night_simulation import NightPreset, simulate_night
from runners.cluster.flink import ENDED, flink_down, flink_up, job_manager, job_server, task_managers, worker_pool
from runners.cluster.kafka import kafka_service, kafka_up
from runners.cluster.processes import alone, is_alive, is_listening, running_pid, stop
from runners.cluster.settings import ClusterError, ClusterSettings, load_cluster_settings
from runners.flink_operations import LOST, read_live_job, state_of
from runners.kafka import DeliveryError, KafkaMessageLog
from runners.live_commands import VISITS_TOPIC
from schemas.manifests import DetectorImages, Visit, announcements, read_manifest, write_manifest

CHECKOUT = Path(__file__).resolve().parents[2]
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
PATIENCE_S = 300.0
UP_ATTEMPTS = 3
LOOK_S = 0.2
VISITS_OF_A_FIELD, DETECTORS = 24, 2
GAPPY = 5  # the visit of each field that waits in vain for a further detector
VISIT_TIMEOUT_S = 15.0
_COMMAND = "import sys; from runners.cli import main; sys.exit(main(sys.argv[1:]))"


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
        if event != "announced":
            print(f"{time.strftime('%H:%M:%S')} {event}: {told}", flush=True)
        return entry

    def of(self, event: str) -> list[dict[str, Any]]:
        with self._lock:
            return [entry for entry in self.entries if entry["event"] == event]


class CampaignError(RuntimeError):
    """The flow did not come back, or a command failed for good; the message says which."""


class Campaign:
    """One campaign in a folder of its own."""

    def __init__(self, folder: Path, seed: int, cadence_s: float) -> None:
        self.folder = folder
        self.seed = seed
        self.cadence_s = cadence_s
        self.out = folder / "out"
        self.truth = folder / "truth"
        self.settings = _cluster_settings(folder / "cluster")
        self.journal = Journal(folder / "journal.jsonl")
        self._enough = threading.Event()
        self._broken: BaseException | None = None

    @property
    def bootstrap(self) -> str:
        return self.settings.kafka.bootstrap

    def run(self, kills: int) -> bool:
        """All of it; whether nothing was lost or contradicted."""
        announcer = threading.Thread(target=self._announce, name="announcer")
        try:
            self._cluster_up()
            self._bring_back_job()
            announcer.start()
            try:
                self._until(lambda: self._in_ledger(self._announced()), "the first visit")
                for kill in planned_kills(self.seed):
                    if kill.number >= kills:
                        break
                    if kill.number >= len(self.journal.of("recovered")):
                        self._do(kill)
            finally:
                self._enough.set()
                announcer.join()
            self._settle()
            return self._judge()
        finally:
            self._enough.set()
            with alone(self.settings):
                flink_down(self.settings)
                stop(self.settings, kafka_service(self.settings.kafka))

    # --- announcing ---------------------------------------------------------------------------

    def _announce(self) -> None:
        """Announce a visit every `cadence_s` seconds, whatever happens meanwhile."""
        try:
            log = KafkaMessageLog(self.bootstrap, VISITS_TOPIC)
            done = len(self.journal.of("announced"))
            for number, visit in enumerate(simulated_visits(self.folder / "night", self.seed)):
                if number < done:
                    continue
                while not self._enough.is_set():
                    with contextlib.suppress(DeliveryError):  # again: what came twice is read once
                        log.append(announcements(visit)[:DETECTORS])
                        self.journal.write("announced", visit=visit.visit)
                        break
                if self._enough.wait(self.cadence_s):
                    return
        except BaseException as error:
            self._broken = error

    def _announced(self, since: float = 0.0) -> list[int]:
        return [entry["visit"] for entry in self.journal.of("announced") if entry["at"] > since]

    def _in_ledger(self, visits: list[int]) -> list[int]:
        return [visit for visit in visits if (self.out / "ledger" / f"{visit}.json").exists()]

    def _written(self, announced_since: float, since: float) -> list[float]:
        """When ledger records were written after a moment, of visits announced after another."""
        visits = self._in_ledger(self._announced(announced_since))
        times = [(self.out / "ledger" / f"{visit}.json").stat().st_mtime for visit in visits]
        return [at for at in times if at > since]

    # --- killing ------------------------------------------------------------------------------

    def _do(self, kill: Kill) -> None:
        pid = self._pid(kill.victim)
        began = time.time()
        if kill.stop_s:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(kill.stop_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        else:
            os.kill(pid, signal.SIGKILL)
            self._until(lambda: not is_alive(pid), f"the end of {kill.victim}")
        self.journal.write(kill.kind, number=kill.number, pid=pid, stop_s=round(kill.stop_s, 1))
        self._cluster_up()
        # Without its job manager the job goes on for some seconds: that is no recovery.
        since = self._bring_back_job() or began
        if not kill.in_haste:
            self._until(lambda: self._written(began, since), f"a visit after: {kill.kind}")
        self.journal.write(
            "recovered",
            number=kill.number,
            kind=kill.kind,
            seconds=None if kill.in_haste else round(min(self._written(began, since)) - began, 1),
            open_visits=len(self._announced()) - len(self._in_ledger(self._announced())),
        )
        time.sleep(kill.pause_s)

    def _pid(self, victim: str) -> int:
        """The process to be killed, once there is one."""
        flink = self.settings.flink
        services = {
            TASK_MANAGER: task_managers(flink)[0],
            JOB_MANAGER: job_manager(flink),
            POOL: worker_pool(flink),
            KAFKA: kafka_service(self.settings.kafka),
            JOB_SERVER: job_server(flink),
        }
        found: list[int] = []

        def look() -> list[int]:
            if victim == WORKER:
                pool = running_pid(self.settings, worker_pool(flink))
                found[:] = [] if pool is None else _children(pool)
            else:
                pid = running_pid(self.settings, services[victim])
                found[:] = [] if pid is None else [pid]
            return found

        self._until(look, f"a {victim}")
        return found[0]

    def _bring_back_job(self) -> float | None:
        """Submit the job at first, and resume it where Flink does not know it any more or gave it up; when that was."""
        deadline = time.monotonic() + PATIENCE_S
        while (how := self._missing_command()) is not None:
            began = time.time()
            event, arguments = how
            if self._nightstream(*arguments):
                self.journal.write(event, job=read_live_job(self.out).latest.job)
                return began
            if time.monotonic() > deadline:
                raise CampaignError(f"the job was not {event} within {PATIENCE_S:g} s: {self._log}")
            self._cluster_up()
        return None

    def _missing_command(self) -> tuple[str, list[str]] | None:
        submit = ["flink", "submit", "--bootstrap", self.bootstrap, "--kafka", self.bootstrap, "--out", str(self.out)]
        submit += ["--cluster", str(self.settings.folder), "--checkpoint-interval", "2"]
        submit += ["--visit-timeout", str(VISIT_TIMEOUT_S)]
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

        self._until(ask, "an answer of Flink")
        return told[0]

    def _cluster_up(self) -> None:
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

    # --- the end ------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait until the ledger has all that was announced, and end the job."""
        announced = self._announced()
        self._until(lambda: len(self._in_ledger(announced)) == len(announced), "all announced visits")
        if not self._nightstream("flink", "cancel", str(self.out)):
            raise CampaignError(f"the job could not be cancelled: {self._log}")

    def _judge(self) -> bool:
        """Make the truth, compare, print."""
        announced = self._announced()
        night = self.folder / "night"
        write_manifest(night, list(islice(simulated_visits(night, self.seed), len(announced))))
        shutil.rmtree(self.truth, ignore_errors=True)
        if not self._nightstream("produce", str(night), "--out", str(self.truth), "--quiet", "--json"):
            raise CampaignError(f"the truth could not be made: {self._log}")
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

    # --- commands and waiting -----------------------------------------------------------------

    @property
    def _log(self) -> Path:
        return self.folder / "commands.log"

    def _nightstream(self, *arguments: str) -> str:
        """What a command of nightstream prints, or nothing if it fails; all of it is in `commands.log`."""
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._log.open("a", encoding="utf-8") as log:
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

    def _until(self, fact: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not fact():
            if self._broken is not None:
                raise CampaignError("announcing broke off") from self._broken
            if time.monotonic() > deadline:
                raise CampaignError(f"waited {PATIENCE_S:g} s in vain for {what}; logs: {self.settings.logs}")
            time.sleep(LOOK_S)


def _cluster_settings(folder: Path) -> ClusterSettings:
    """A cluster of one task manager, on ports that nobody uses when the campaign begins."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cluster.yaml"
    if not path.exists():
        port = next(
            first for first in range(31_000, 60_000, 20) if not any(map(is_listening, range(first, first + 20)))
        )
        flink = {"rest_port": port, "rpc_port": port + 1, "job_server_port": port + 3, "worker_pool_port": port + 4}
        flink |= {"prometheus_ports": f"{port + 10}-{port + 19}", "task_managers": 1}
        path.write_text(yaml.safe_dump({"kafka": {"port": port + 5, "heap_mb": 512}, "flink": flink}))
    return load_cluster_settings(folder)


def _children(pid: int) -> list[int]:
    """The children of a process, whichever of its threads started them."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return sorted(found)


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
    campaign = Campaign(options.folder.resolve(), options.seed, options.cadence)
    return 0 if campaign.run(options.kills) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is ended then, too
    sys.exit(main())

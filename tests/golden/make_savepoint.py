"""Make the savepoint of a release: of a live night stopped amid its third visit.

    PYTHONPATH=.:tests/flows python tests/golden/make_savepoint.py

runs a Kafka broker and a Flink cluster of its own for a minute and writes tests/golden/savepoint.tar.xz. To be done
once for a release, when it is published: `tests/flows/test_flink_operations_cluster.py` then shows that its successors
go on from it. The archive holds what Flink wrote, as it is (paths in it are no more than names), and `told.json`: the
diaSourceIds of the two visits that were done, and a digest of their packets. The sky is the simulator's: another
simulator wants another savepoint.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

from conftest import write_night
from own_cluster import own_cluster, until
from test_flink_operations_cluster import (
    SAVED_MESSAGES,
    SAVEPOINT,
    Trial,
    announced,
    detectors_done,
    digest_of_packets,
    packets_of,
)

from pipelines.night_simulation import simulate_night
from runners.cluster.flink import flink_down, flink_up
from runners.cluster.kafka import kafka_service, kafka_up
from runners.cluster.processes import stop
from runners.kafka import KafkaMessageLog


def main(folder: Path) -> None:
    both = simulate_night("tiny", folder / "nights", seed=20261122, nights=2).folder
    visits = [json.loads(line) for line in (both / "visits.jsonl").read_text().splitlines()]
    night = write_night(folder / "night", both, visits[:4])
    cluster = own_cluster(folder / "cluster", task_managers=1)
    try:
        kafka_up(cluster)
        flink_up(cluster)
        run = Trial(cluster, night, folder, "old")
        KafkaMessageLog(run.bootstrap, "old-visits").append(announced(night)[:SAVED_MESSAGES])
        run.submit("--visit-timeout", 600)
        run.await_visits(2)
        until(lambda: detectors_done(run.out) >= SAVED_MESSAGES)
        saved = Path(run.run("flink", "cancel", run.out, "--savepoint"))
    finally:
        flink_down(cluster)
        stop(cluster, kafka_service(cluster.kafka))
    packets = packets_of(run.out)
    told = {"dia_source_ids": sorted(packets), "digest": digest_of_packets(packets)}
    (folder / "told.json").write_text(json.dumps(told))
    with tarfile.open(SAVEPOINT, "w:xz", preset=9) as archive:
        archive.add(folder / "told.json", "told.json")
        archive.add(saved, "savepoint")
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    print(f"{SAVEPOINT}: {SAVEPOINT.stat().st_size} bytes, of {size}; {len(packets)} packets of two visits")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))

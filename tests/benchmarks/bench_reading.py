"""What reading costs: prefix and projected reads beside fastavro and LSST's package, and a replayed exposure.

    PYTHONPATH=. python tests/benchmarks/bench_reading.py [--packets 50] [--repeats 5]

Synthetic packets have 20 earlier detections, 20 forced points and three cutouts, 150 KB together; real ones are the
Kafka messages and container files of `../shared/data`, where they are there. CPU time, the best of the repeats.
"""

from __future__ import annotations

import argparse
import io
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
from lsst.alert.packet import SchemaRegistry

sys.path.insert(0, str(Path(__file__).parents[1] / "packets"))
from sample_alerts import random_batch, random_records
from test_adaptation import ALL_COLUMNS

from schemas.avro.adaptation import adapt_packet, adapted_table
from schemas.avro.batch_adaptation import adapt_packets
from schemas.avro.container import block_bytes, container_blocks, container_header
from schemas.avro.encoding import encode_packets
from schemas.avro.messages import Packet, packet_of, schema_of_container
from schemas.avro.projection import project, split_bodies
from schemas.avro.reading import decode_body
from schemas.avro.reading_programs import compiled
from schemas.avro.schema_versions import packet_schema

DATA = Path(__file__).parents[3] / "shared" / "data"
SEED = 20261122
PREFIX = (
    "diaSource.diaSourceId",
    "diaSource.visit",
    "diaSource.detector",
    "diaSource.band",
    "diaSource.midpointMjdTai",
)
HISTORY = ("midpointMjdTai", "psfFlux", "psfFluxErr", "band", "reliability")
FILTERS = frozenset(
    {"diaSource.snr", "diaSource.reliability", "diaObject.nDiaSources"} | {f"prvDiaSources.{name}" for name in HISTORY}
)


def synthetic(n: int) -> list[Packet]:
    rng = np.random.default_rng(SEED)
    batch = random_batch(n, rng, longest=0)
    rows = np.arange(n + 1) * 20
    sources = batch.dia_sources
    history, forced = random_records("diaSource", 20 * n, rng), random_records("diaForcedSource", 20 * n, rng)
    for some, key in ((sources, "diaSourceId"), (history, "diaSourceId"), (forced, "diaForcedSourceId")):
        some[key], some["visit"], some["detector"], some["band"] = 1 + np.arange(len(some)), 7, 3, b"r"
        some["midpointMjdTai"] = 61_000.0 + np.arange(len(some)) % 20
        some["ra"], some["dec"], some["diaObjectId"] = 10.0, -20.0, 5
    sources["exposureTime"] = 30.0
    batch.dia_objects["diaObjectId"], batch.dia_objects["nDiaSources"] = 5, 21
    stamps = tuple([rng.bytes(44_000) for _ in range(n)] for _ in range(3))
    yes, no = np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
    batch = replace(
        batch, dia_sources=sources, prv_dia_sources=history, prv_offsets=rows, prv_forced=forced, forced_offsets=rows,
        has_object=yes, has_ss=no, has_orbit=no, cutouts=stamps,
    )  # fmt: skip
    schema = packet_schema("11.0")
    return [Packet(schema, body) for body in encode_packets(schema, batch)]


def real() -> dict[str, list[Packet]]:
    """Kafka messages and Fink's files, by name; nothing where the data are not there."""
    found = {}
    for path in sorted((DATA / "rubin_alerts").rglob("*.avro")):
        content = path.read_bytes()
        if content[:3] != b"Obj":
            found[path.name] = [packet_of(content)]
            continue
        header = container_header(content)
        schema = schema_of_container(header.schema_text)
        packets = []
        for block in container_blocks(content, header):
            bodies = block_bytes(block, header.codec)
            ends, _ = split_bodies(schema, bodies, block.n_packets)
            packets += [Packet(schema, bodies[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        found[path.name] = packets
    return found


def records_only(schema: Any) -> Any:
    """A reader schema of diaSource, its history and diaObject: as much as stock readers are spared without effort."""
    fields = [one for one in schema.parsed["fields"] if one["name"] in ("diaSource", "prvDiaSources", "diaObject")]
    return fastavro.parse_schema({"type": "record", "name": schema.parsed["name"], "fields": fields})


def best(work: Callable[[], Any], repeats: int) -> float:
    """CPU seconds of the fastest of some runs, the first left out."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def measure(name: str, packets: list[Packet], repeats: int) -> None:
    schema = packets[0].schema
    bodies = [packet.body for packet in packets]
    n, kb = len(bodies), sum(map(len, bodies)) / len(bodies) / 1000
    us = 1e6 / n
    wanted = frozenset(compiled(schema, FILTERS, False).leaves) & FILTERS  # older versions lack some
    rows = [("fastavro, whole", best(lambda: [decode_body(schema, body) for body in bodies], repeats))]
    if schema.schema_id is not None:
        lsst = SchemaRegistry.all_schemas_from_filesystem().get_by_id(schema.schema_id)
        rows.append(("lsst.alert.packet, whole", best(lambda: [lsst.deserialize(body) for body in bodies], repeats)))
        reader = records_only(schema)
        stock = best(
            lambda: [fastavro.schemaless_reader(io.BytesIO(body), schema.parsed, reader) for body in bodies], repeats
        )
        rows.append(("fastavro, reader schema of 3 fields", stock))
    peer = rows[-1][1] if len(rows) == 1 else rows[1][1]
    rows += [
        ("prefix: ids, visit, band, midpoint", best(lambda: project(schema, bodies, PREFIX), repeats)),
        ("projected: source, object, 5 of history", best(lambda: project(schema, bodies, wanted), repeats)),
        ("the same, whole packet checked", best(lambda: project(schema, bodies, wanted, whole=True), repeats)),
        ("v11 columns of filters", best(lambda: adapt_packets(packets, FILTERS), repeats)),
        ("v11 columns, all 300", best(lambda: adapt_packets(packets, ALL_COLUMNS), repeats)),
    ]
    before = best(
        lambda: adapted_table([adapt_packet(decode_body(schema, b)).record for b in bodies], FILTERS), repeats
    )
    rows.append(("v11 columns of filters by way of dicts", before))
    print(f"\n{name}: {n} packets of {kb:.0f} KB")
    for what, seconds in rows:
        print(f"  {what:42s} {seconds * us:9.1f} us   {peer / seconds:7.1f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packets", type=int, default=50, help="synthetic packets in a batch")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"python {platform.python_version()}, numpy {np.__version__}, fastavro {fastavro.__version__}; seed {SEED}")
    print("x: times as fast as lsst.alert.packet, where that has no schema as fastavro")
    measure("synthetic, history of 20", synthetic(options.packets), options.repeats)
    for name, packets in real().items():
        measure(name, packets, options.repeats)


if __name__ == "__main__":
    main()

"""Packets beside their peers: encoding, cutouts, producing, reading.

    python tests/benchmarks/bench_packets.py [--only encode|cutouts|produce|package|read|history|real|digest]
        [--bootstrap HOST:PORT]

Times are CPU seconds of this process, all threads, best of several. Peers run in the same process on the same input:

  lsst      `lsst.alert.packet`'s Schema.serialize and deserialize (which is fastavro with dicts)
  astropy   `CCDData.write`, one stamp after the other, as LSST's packager calls it

A packet is LSST's of 150 KB unless a table says otherwise: 20 earlier detections, 50 forced points, three cutouts of 51
pixels with a PSF of 41, nothing null.

Tables
  encode    microseconds per packet, with and without cutouts, batches of 64 alerts
  cutouts   microseconds per alert of three stamps, a detector of 4,000 x 4,000 pixels with 200 sources at once
  produce   encode, then send with an idempotent producer and lz4, alerts per CPU second. The embedded Kafka runs in
            this process: what its broker does is in the figure. --bootstrap: a real one besides, topic `bench-packets`
  package   the stage PackageAlerts as it is: cutouts read, packets encoded, digested, kept, sent, thin columns; a
            batch of 10,000 alerts of 150 KB, and the most memory the process had by then
  read      microseconds per packet: whole, prefix, all but the histories, the last also of sized blocks
  history   microseconds and bytes per packet with the number of earlier points, two of three forced
  real      encode and prefix of packets of LSST's that lie beside the project, their histories and cutouts
  digest    microseconds per packet of the digests in hashlib
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import platform
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
from apache_beam.utils.timestamp import Timestamp
from astropy.nddata import CCDData, VarianceUncertainty
from astropy.wcs import WCS
from lsst.alert.packet import SchemaRegistry

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "packets"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))

from alert_batches import DETECTOR, VISIT, alert_batch
from sample_alerts import expected_packet

from runners.kafka import EmbeddedKafka, KafkaAlertSink, dia_source_id_header
from schemas.avro.adaptation import adapt_packet
from schemas.avro.encoding import AlertColumns, encode_packets
from schemas.avro.reading import packet_prefix
from schemas.avro.schema_versions import packet_schema
from schemas.avro.wire import wire_header
from schemas.claim_check import write_blobs
from schemas.cutouts import Content, CutImage, LocalTan, cut_out
from schemas.exposures import MASK_BITS
from schemas.records import LAYOUTS, empty_records
from transforms.delivery import Delivery
from transforms.distribution import BrokerConfig
from transforms.packaging import PackageAlerts, PackagingConfig, cutout_file

VERSION = "11.0"
SCHEMA = packet_schema(VERSION)
LSST = SchemaRegistry.all_schemas_from_filesystem().get_by_version(VERSION)
RUBIN_ALERTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "rubin_alerts"
BATCH = 64
REPEATS = 7
SIDE, PSF_SIDE, DETECTOR_SIDE, N_SOURCES = 51, 41, 4000, 200
PIXEL_DEG = 0.2 / 3600.0


def main() -> None:
    tables: dict[str, Callable[[argparse.Namespace], None]] = {
        "encode": encode,
        "cutouts": cutouts,
        "produce": produce,
        "package": package,
        "read": read,
        "history": history,
        "real": real,
        "digest": digest,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(tables))
    parser.add_argument("--bootstrap", help="HOST:PORT of a Kafka to produce to besides the embedded one")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, seed {options.seed}")
    for name, table in tables.items():
        if options.only in (None, name):
            print()
            table(options)


def timed(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Least CPU seconds of some calls."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds)


# --- what is measured on ----------------------------------------------------------------------------


def rows_of(record: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Records with nothing null: ids of 62 bits, times of 50, counts below 500, floats about 0."""
    rows = np.zeros(n, LAYOUTS[record])
    for name in rows.dtype.names:
        kind, width = rows.dtype[name].kind, rows.dtype[name].itemsize
        if kind == "f":
            rows[name] = rng.normal(size=n)
        elif kind == "S":
            rows[name] = b"i"
        elif width == 8:
            rows[name] = rng.integers(2**58, 2**62, n) if name.endswith("Id") else rng.integers(0, 2**50, n)
        else:
            rows[name] = rng.integers(0, 2 if width == 1 else 500, n)
    return rows


def batch_of(n: int, rng: np.random.Generator, n_prv: int, n_forced: int, stamps: Sequence[Any] | None) -> AlertColumns:
    """Alerts of objects; `stamps` are three files for each, None for none."""
    columns = [[row[k] for row in stamps] for k in range(3)] if stamps is not None else [[None] * n] * 3
    return AlertColumns(
        dia_sources=rows_of("diaSource", n, rng),
        observation_reason="science",
        target_name=None,
        prv_dia_sources=rows_of("diaSource", n * n_prv, rng),
        prv_offsets=np.arange(n + 1) * n_prv,
        prv_forced=rows_of("diaForcedSource", n * n_forced, rng),
        forced_offsets=np.arange(n + 1) * n_forced,
        dia_objects=rows_of("diaObject", n, rng),
        has_object=np.ones(n, dtype=bool),
        ss_sources=empty_records(LAYOUTS["ssSource"], n),
        has_ss=np.zeros(n, dtype=bool),
        mpc_orbits=empty_records(LAYOUTS["mpc_orbits"], n),
        has_orbit=np.zeros(n, dtype=bool),
        cutouts=tuple(columns),
    )


class Detector:
    """Noise, and sources whose stamps lie on it."""

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        shape = (DETECTOR_SIDE, DETECTOR_SIDE)
        self.image = rng.normal(0.0, 100.0, shape).astype(np.float32)
        self.variance = rng.uniform(5e3, 6e3, shape).astype(np.float32)
        self.mask = np.zeros(shape, dtype=np.int32)
        self.psfs = rng.random((1024, PSF_SIDE, PSF_SIDE)).astype(np.float32)
        self.x, self.y = rng.uniform(SIDE, DETECTOR_SIDE - SIDE, (2, n))
        self.psf_of = rng.integers(0, len(self.psfs), n)
        matrix = ((-PIXEL_DEG, 1e-7), (2e-7, PIXEL_DEG))
        self.tangents = [
            LocalTan(*(np.array([150.0, -30.0]) + rng.uniform(-0.1, 0.1, 2)).tolist(), x, y, matrix)
            for x, y in zip(self.x.tolist(), self.y.tolist(), strict=True)
        ]

    def cut_out(self, content: Content) -> list[tuple[memoryview, ...] | None]:
        """Three stamps of each source."""
        one = CutImage(self.image, self.variance, self.psfs, self.psf_of)
        sides = np.full(len(self.x), SIDE)
        return cut_out([one] * 3, self.mask, self.x, self.y, sides, self.tangents, 12.5, MASK_BITS, content).files

    def written_by_astropy(self, i: int) -> bytes:
        """One stamp of source `i` as LSST's packager makes it."""
        x_min, y_min = (int(np.floor(place[i] - SIDE / 2 + 1)) for place in (self.x, self.y))
        window = slice(y_min, y_min + SIDE), slice(x_min, x_min + SIDE)
        tangent = self.tangents[i]
        wcs = WCS(naxis=2)
        wcs.array_shape = (SIDE, SIDE)
        wcs.wcs.crpix = [tangent.x_pix - x_min + 1, tangent.y_pix - y_min + 1]
        wcs.wcs.crval = [tangent.ra_deg, tangent.dec_deg]
        wcs.wcs.cd = np.array(tangent.cd_deg_per_pix)
        ccd = CCDData(
            self.image[window],
            uncertainty=VarianceUncertainty(self.variance[window]),
            flags=self.mask[window],
            wcs=wcs,
            psf=self.psfs[self.psf_of[i]].astype(np.float64),
            meta={"cutMinX": x_min - 1, "cutMinY": y_min - 1},
            unit="nJy",
        )
        ccd.header["ROTPA"] = (12.5, "Pos angle in deg of focal plane +Y wrt North")
        stream = io.BytesIO()
        ccd.write(stream, format="fits")
        return stream.getvalue()


def lsst_like(rng: np.random.Generator, n: int = BATCH) -> AlertColumns:
    """Packets of 150 KB."""
    return batch_of(n, rng, 20, 50, [tuple(map(bytes, row or ())) for row in Detector(rng, n).cut_out("strict")])


# --- tables -----------------------------------------------------------------------------------------


def encode(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(options.seed)
    print("encode     cutouts     bytes   ours us    lsst us   ratio")
    for batch, name in ((lsst_like(rng), "yes"), (batch_of(BATCH, rng, 20, 50, None), "no")):
        ours, theirs, size = beside_lsst(batch)
        print(f"{name:>18s} {size:9.0f} {ours:9.1f} {theirs:10.0f} {theirs / ours:7.0f}")


def beside_lsst(batch: AlertColumns) -> tuple[float, float, float]:
    """Microseconds per packet of ours and LSST's, mean bytes; the packets must be the same."""
    bodies, few = encode_packets(SCHEMA, batch), range(min(len(batch), 16))
    dicts = [expected_packet(VERSION, batch, i) for i in few]
    if any(LSST.serialize(values) != bodies[i] for i, values in enumerate(dicts)):
        raise SystemExit("the packets differ from LSST's")
    ours = timed(lambda: encode_packets(SCHEMA, batch)) / len(batch)
    theirs = timed(lambda: [LSST.serialize(values) for values in dicts]) / len(dicts)
    return 1e6 * ours, 1e6 * theirs, float(np.mean([len(body) for body in bodies]))


def cutouts(options: argparse.Namespace) -> None:
    detector = Detector(np.random.default_rng(options.seed), N_SOURCES)
    strict = detector.cut_out("strict")
    few = range(20)
    if any(bytes((strict[i] or (b"",))[0]) != detector.written_by_astropy(i) for i in few):
        raise SystemExit("the strict cutouts differ from astropy's")
    theirs = 3 * timed(lambda: [detector.written_by_astropy(i) for i in few]) / len(few)
    print("cutouts    content      bytes   ours us  astropy us   ratio")
    for content in ("strict", "complete"):
        ours = timed(lambda content=content: detector.cut_out(content)) / N_SOURCES
        size = sum(map(len, (detector.cut_out(content)[0] or ())))
        print(f"{content:>18s} {size:10d} {1e6 * ours:9.1f} {1e6 * theirs:11.0f} {theirs / ours:7.0f}")


def produce(options: argparse.Namespace) -> None:
    batch = lsst_like(np.random.default_rng(options.seed))
    ids = batch.dia_sources["diaSourceId"].tolist()
    n_batches = 20
    header = wire_header(SCHEMA.schema_id)

    def send_all(sink: KafkaAlertSink) -> None:
        for _ in range(n_batches):
            for dia_source_id, message in zip(ids, encode_packets(SCHEMA, batch, prefix=header), strict=True):
                sink.send("bench-packets", b"%d" % dia_source_id, message, [dia_source_id_header(dia_source_id)])
        sink.flush()

    print("produce    Kafka       alerts / CPU s   MB / CPU s   alerts / s")
    with EmbeddedKafka() as kafka:
        for name, bootstrap in (("embedded", kafka.bootstrap), (options.bootstrap, options.bootstrap)):
            if bootstrap is None:
                continue
            sink = KafkaAlertSink(bootstrap)
            wall = time.perf_counter()
            cpu_s = timed(lambda sink=sink: send_all(sink), 3)
            rate = n_batches * BATCH / cpu_s
            per_wall_s = 4 * n_batches * BATCH / (time.perf_counter() - wall)
            mb = rate * len(encode_packets(SCHEMA, batch)[0]) / 1e6
            print(f"{name:>19s} {rate:17.0f} {mb:12.0f} {per_wall_s:12.0f}")
            sink.close()


def package(options: argparse.Namespace) -> None:
    n = 10_000
    batch = alert_batch(n, options.seed)
    ids = batch.dia_sources["diaSourceId"]
    stamps = tuple(np.random.default_rng(options.seed).bytes(46_080) for _ in range(3))
    print("package    Kafka       alerts / CPU s   alerts / s   peak MB")
    with tempfile.TemporaryDirectory() as folder, EmbeddedKafka() as kafka:
        cutout_folder = str(Path(folder) / "cutouts")
        write_blobs(cutout_file(cutout_folder, VISIT, DETECTOR), ids, [stamps] * n)
        for name, bootstrap in (("none", None), ("embedded", kafka.bootstrap), (options.bootstrap, options.bootstrap)):
            if name is None:
                continue
            delivery = Delivery(
                out=folder,
                store=str(Path(folder) / name),
                brokers=(BrokerConfig(name="one", topic="bench-package"),),
                filters=(),
                sink=None if bootstrap is None else KafkaAlertSink(bootstrap),
            )
            stage = PackageAlerts(PackagingConfig(), cutout_folder, delivery).package
            stage.setup()
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            stage.start_bundle()
            outputs = [*stage.process(batch, Timestamp(0)), *stage.finish_bundle()]
            assert len(outputs) == 1
            cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
            stage.teardown()
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{name:>19s} {n / cpu_s:17.0f} {n / wall_s:12.0f} {peak_mb:9.0f}")
            shutil.rmtree(delivery.store)


def read(options: argparse.Namespace) -> None:
    batch = lsst_like(np.random.default_rng(options.seed))
    narrow = copy.deepcopy(LSST.definition)
    wanted = ("diaSourceId", "diaSource", "diaObject")
    narrow["fields"] = [field for field in narrow["fields"] if field["name"] in wanted]
    print("read       blocks   whole us  no histories us  prefix us   prefix ratio")
    for name, sized in (("plain", False), ("sized", True)):
        bodies = encode_packets(SCHEMA, batch, sized_blocks=sized)
        whole = 1e6 * timed(lambda bodies=bodies: [LSST.deserialize(body) for body in bodies]) / BATCH
        part = 1e6 * timed(lambda bodies=bodies: [_projected(body, narrow) for body in bodies]) / BATCH
        prefix = 1e6 * timed(lambda bodies=bodies: [packet_prefix(body) for body in bodies]) / BATCH
        print(f"{name:>17s} {whole:10.0f} {part:16.0f} {prefix:10.1f} {whole / prefix:14.0f}")


def _projected(body: bytes, narrow: dict[str, Any]) -> Any:
    return fastavro.schemaless_reader(io.BytesIO(body), LSST.definition, narrow)


def history(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(options.seed)
    detector = Detector(rng, BATCH)
    stamps = [tuple(map(bytes, row or ())) for row in detector.cut_out("strict")]
    print("history     points     bytes   ours us    lsst us   ratio")
    for points in (0, 20, 100, 300, 1000):
        batch = batch_of(BATCH, rng, points // 3, points - points // 3, stamps)
        batch.dia_objects["nDiaSources"] = 1 + points // 3
        ours, theirs, size = beside_lsst(batch)
        print(f"{points:18d} {size:9.0f} {ours:9.1f} {theirs:10.0f} {theirs / ours:7.0f}")


def real(options: argparse.Namespace) -> None:
    print("real       file                                            alerts   points     bytes   ours us    lsst us")
    for path in sorted(RUBIN_ALERTS.glob("*.avro")):
        with path.open("rb") as stream:
            packets = [packet for packet in fastavro.reader(stream) if packet["diaObject"] is not None]
        batch = columns_of(packets)
        points = (len(batch.prv_dia_sources) + len(batch.prv_forced)) / len(batch)
        ours, theirs, size = beside_lsst(batch)
        print(f"{path.name:>57s} {len(batch):8d} {points:8.0f} {size:9.0f} {ours:9.1f} {theirs:10.0f}")


def columns_of(packets: list[dict[str, Any]]) -> AlertColumns:
    """Decoded packets of objects, of whatever version, as columns of today's."""
    adapted = [adapt_packet(packet).record for packet in packets]
    n = len(packets)
    prv, forced = ([one[name] for one in adapted] for name in ("prvDiaSources", "prvDiaForcedSources"))
    return AlertColumns(
        dia_sources=filled("diaSource", [one["diaSource"] for one in adapted]),
        observation_reason=None,
        target_name=None,
        prv_dia_sources=filled("diaSource", [row for rows in prv for row in rows]),
        prv_offsets=np.cumsum([0, *map(len, prv)]),
        prv_forced=filled("diaForcedSource", [row for rows in forced for row in rows]),
        forced_offsets=np.cumsum([0, *map(len, forced)]),
        dia_objects=filled("diaObject", [one["diaObject"] or {} for one in adapted]),
        has_object=np.ones(n, dtype=bool),
        ss_sources=empty_records(LAYOUTS["ssSource"], n),
        has_ss=np.zeros(n, dtype=bool),
        mpc_orbits=empty_records(LAYOUTS["mpc_orbits"], n),
        has_orbit=np.zeros(n, dtype=bool),
        cutouts=tuple(
            [packet[name] for packet in packets] for name in ("cutoutDifference", "cutoutScience", "cutoutTemplate")
        ),
    )


def filled(record: str, values: list[dict[str, Any]]) -> np.ndarray:
    """Dicts as records; times that are no numbers are left out."""
    rows = empty_records(LAYOUTS[record], len(values))
    for row, fields in zip(rows, values, strict=True):
        for name, value in fields.items():
            if name in rows.dtype.names and isinstance(value, (int, float, str)):
                row[name] = value
    return rows


def digest(options: argparse.Namespace) -> None:
    (body,) = encode_packets(SCHEMA, lsst_like(np.random.default_rng(options.seed), 1))
    print("digest     name           us per packet")
    for name in ("sha256", "sha1", "md5", "blake2b", "blake2s", "sha512", "sha3_256"):
        seconds = timed(lambda name=name: [hashlib.new(name, body).digest() for _ in range(50)]) / 50
        print(f"{name:>20s} {1e6 * seconds:18.0f}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of astropy about a WCS without CTYPE
    main()

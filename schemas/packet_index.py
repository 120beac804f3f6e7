"""Archived packets as visits: what `nightstream replay` reads, found once and listed in an index.

The index says of each packet where it lies, to the byte, and which visit it belongs to. Files are
containers (one packet or many, codec null or deflate), wire messages, tars of such files, and all these
behind gzip, which are unpacked first.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.avro.adaptation import PacketHead
from schemas.avro.batch_adaptation import adapt_packets
from schemas.avro.container import (
    ContainerBlock,
    ContainerHeader,
    block_bytes,
    check_codec,
    container_block,
    container_header,
)
from schemas.avro.messages import Packet, container_message, packet_of, schema_of_container
from schemas.avro.projection import split_bodies
from schemas.avro.schema_versions import SchemaVersionError
from schemas.avro.wire import PacketFormatError
from schemas.manifests import (
    SURVEY_MJD_RANGE,
    Manifest,
    ManifestError,
    ManifestProblem,
    Visit,
    visit_without_images,
)

_SUFFIXES = (".avro", ".tar", ".tar.gz", ".tgz", ".avro.gz")
_GZIP_MAGIC = b"\x1f\x8b"
_CONTAINER_MAGIC = b"Obj"
_WIRE_MAGIC = b"\0"
_PIECE_BYTES = 1 << 20
_BATCH, _BATCH_BYTES = 256, 1 << 25  # packets whose heads are read together
_WHOLE = -1  # the message is all of the extent
_PROBLEMS_KEY = b"problems"
_SURVEY_KEY = b"survey"
_COLUMNS = {
    "file": pa.string(),
    "start": pa.int64(),
    "length": pa.int64(),
    "block": pa.int64(),
    "body_start": pa.int64(),
    "body_length": pa.int64(),
    "diaSourceId": pa.int64(),
    "visit": pa.int64(),
    "detector": pa.int64(),
    "band": pa.string(),
    "midpointMjdTai": pa.float64(),
    "exposureTime": pa.float64(),
}


class PacketPlace(NamedTuple):
    """Where a packet lies: an extent of a file and, in a container of many, a block there and bytes of that."""

    file: str
    start: int
    length: int
    block: int
    body_start: int
    body_length: int


@dataclass(frozen=True)
class PacketIndex:
    """What an index says: whose packets they are, how many, in which visits, and what could not be used."""

    survey: str
    n_packets: int
    manifest: Manifest


def index_packets(
    sources: Sequence[Path], index: Path, spool: Path, tell: Callable[[int], None] | None = None
) -> PacketIndex:
    """Look through files, and folders of files, for packets and write the index.

    Parameters
    ----------
    sources : files; of folders all files below that are named as packets are
    index : Parquet file to write
    spool : folder for what must be unpacked; it has to stay as long as the index is used
    tell : told the number of packets found so far

    Of packets with one diaSourceId the first stands; others that differ from it are problems.

    Raises
    ------
    ManifestError
        No packet that can be used, or packets of two surveys.
    """
    rows: list[tuple[Any, ...]] = []
    problems: list[ManifestProblem] = []
    known: dict[int, bytes] = {}
    surveys: dict[str, str] = {}
    files = list(packet_files(sources))
    for found in _adapted(one for path in files for one in _packets_in_file(path, spool)):
        if isinstance(found, ManifestProblem):
            problems.append(found)
        else:
            head = found.head
            key = head.dia_source_id
            if key in known:
                if known[key] != found.digest:
                    reason = f"{found.name}: diaSourceId {key} came before with different content; the first stands"
                    problems.append(_problem("DuplicatePacket", reason, "the packet", head.visit, head.detector))
                continue
            known[key] = found.digest
            surveys.setdefault(head.survey, found.name)
            exposure = (head.visit, head.detector, head.band, head.midpoint_mjd_tai, head.exposure_time_s)
            rows.append((*found.place, key, *exposure))
            if tell is not None:
                tell(len(rows))
    where = ", ".join(str(source) for source in sources)
    if not rows:
        nothing = f"{len(files)} files hold none" if files else f"no file named {', '.join(_SUFFIXES)}"
        reasons = "; ".join(problem.reason for problem in problems[:3]) or nothing
        raise ManifestError(f"{where}: no packet to replay: {reasons}")
    if len(surveys) > 1:
        held = " and ".join(f"{survey} ({name})" for survey, name in sorted(surveys.items()))
        raise ManifestError(f"{where}: packets of {held}: replay one survey at a time")
    _write_index(index, rows, problems, next(iter(surveys)))
    return read_index(index)


def read_index(path: Path) -> PacketIndex:
    """Read what `index_packets` wrote."""
    table = pq.ParquetFile(path).read()
    metadata = table.schema.metadata
    problems = tuple(ManifestProblem(**problem) for problem in json.loads(metadata[_PROBLEMS_KEY]))
    survey = metadata[_SURVEY_KEY].decode()
    visits = _visits(table, survey)
    return PacketIndex(survey, len(table), Manifest(visits, problems))


def read_index_visits(path: Path) -> Manifest:
    """The visits of an index."""
    return read_index(path).manifest


class PacketReader:
    """Finds the packets of a detector of a visit by an index."""

    def __init__(self, index: Path) -> None:
        table = pq.ParquetFile(index).read()
        self.columns = {name: table[name].to_pylist() for name in PacketPlace._fields}
        self.ids = table["diaSourceId"].to_numpy()
        self.rows: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(table["visit"].to_pylist(), table["detector"].to_pylist(), strict=True)):
            self.rows.setdefault(key, []).append(row)

    def places(self, visit: int, detector: int) -> list[tuple[int, PacketPlace]]:
        """(diaSourceId, place) of the packets of one exposure, in order of id."""
        rows = sorted(self.rows.get((visit, detector), ()), key=lambda row: int(self.ids[row]))
        return [
            (int(self.ids[row]), PacketPlace(*(self.columns[name][row] for name in PacketPlace._fields)))
            for row in rows
        ]


def read_packet(place: PacketPlace) -> bytes:
    """The packet at a place, as a message: its own bytes, or a container of its own if it shared one.

    Raises
    ------
    PacketFormatError
        The file has changed.
    OSError
        It is gone.
    """
    version = _version(place.file)
    try:
        if place.block == _WHOLE:
            return bytes(_extent(place.file, version)[place.start : place.start + place.length])
        header, bodies = _block(place.file, place.start, place.length, place.block, version)
        body = bodies[place.body_start : place.body_start + place.body_length]
        return container_message(Packet(schema_of_container(header.schema_text), body))
    except ValueError as error:
        raise PacketFormatError(f"{place.file} has changed: {error}") from error


def _version(file: str) -> tuple[int, int]:
    """Tells a file from what it was before somebody wrote to it."""
    status = os.stat(file)
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4)
def _extent(file: str, version: tuple[int, int]) -> memoryview:
    with open(file, "rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


@lru_cache(maxsize=4)
def _block(file: str, start: int, length: int, offset: int, version: tuple[int, int]) -> tuple[ContainerHeader, bytes]:
    data = _extent(file, version)[start : start + length]
    header = container_header(data)
    block, _ = container_block(data, header, offset)
    return header, block_bytes(block, header.codec)


class _Lying(NamedTuple):
    name: str
    place: PacketPlace
    packet: Packet


class _Found(NamedTuple):
    name: str
    place: PacketPlace
    head: PacketHead
    digest: bytes


def packet_files(sources: Sequence[Path]) -> Iterator[Path]:
    """The files given, and of folders all below them that are named as packets are, in order of path.

    ManifestError for what is neither, such as a pipe: packets are read twice.
    """
    for source in sources:
        if source.is_file():
            yield source
            continue
        if not source.is_dir():
            raise ManifestError(f"{source} is neither a file nor a folder")
        below = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
        for path in sorted(path for path in below if path.name.endswith(_SUFFIXES)):
            if not any(part[0] in "._" for part in path.parts):
                yield source / path


def _packets_in_file(path: Path, spool: Path) -> Iterator[_Lying | ManifestProblem]:
    """Packets of one file, and in their places the problems of what cannot be read in it."""
    n_extents = 0
    problems: list[ManifestProblem] = []
    try:
        readable = _unpacked(path, spool, problems)
        yield from problems
        for name, start, length in _extents(readable, path.name):
            n_extents += 1
            try:
                yield from _packets_in_extent(name, str(readable), start, length)
            except (PacketFormatError, SchemaVersionError) as error:
                yield _problem("UnreadablePackets", f"{name}: {error}", "what is in it")
        if n_extents == 0:
            raise PacketFormatError("nothing in it")
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        lost = "the rest of the file" if n_extents else "what is in it"
        yield _problem("UnreadableFile", f"{path.name}: {error}", lost)


def _unpacked(path: Path, spool: Path, problems: list[ManifestProblem]) -> Path:
    """The file itself, or what is behind its gzip, as far as that goes, unpacked into the spool."""
    with path.open("rb") as stream:
        if stream.read(len(_GZIP_MAGIC)) != _GZIP_MAGIC:
            return path.resolve()
    spool.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    target = spool / f"{name}-{path.name.removesuffix('.gz')}"
    with gzip.open(path) as packed, target.open("wb") as unpacked:
        try:
            while piece := packed.read1(_PIECE_BYTES):  # read() loses what came before the break
                unpacked.write(piece)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            if unpacked.tell() == 0:
                raise PacketFormatError(f"broken gzip: {error}") from error
            problems.append(_problem("UnreadableFile", f"{path.name}: broken gzip: {error}", "the rest of the file"))
    return target.resolve()


def _extents(path: Path, name: str) -> Iterator[tuple[str, int, int]]:
    """Name, start and length of each stretch of a file that is a container or a wire message."""
    size = path.stat().st_size
    if size == 0:
        raise PacketFormatError("an empty file")
    with path.open("rb") as stream:
        head = stream.read(len(_CONTAINER_MAGIC))
    if head == _CONTAINER_MAGIC or not tarfile.is_tarfile(path):
        yield name, 0, size
        return
    with tarfile.open(path, "r:") as members:
        for member in members:
            if member.isfile() and member.size and not Path(member.name).name.startswith("."):
                yield f"{name}/{member.name}", member.offset_data, member.size
        end = members.offset  # where it stops, also without a word at a header that is broken or cut off
    with path.open("rb") as stream:
        stream.seek(end)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise PacketFormatError(f"the tar breaks off at byte {end}")


def _packets_in_extent(name: str, file: str, start: int, length: int) -> Iterator[_Lying | ManifestProblem]:
    data = _extent(file, _version(file))[start : start + length]
    whole = PacketPlace(file, start, length, _WHOLE, 0, length)
    if len(data) < length:
        yield _problem("UnreadablePackets", f"{name}: cut off", f"{length - len(data)} of {length} bytes")
    if bytes(data[: len(_CONTAINER_MAGIC)]) != _CONTAINER_MAGIC:
        if bytes(data[:1]) != _WIRE_MAGIC:
            raise PacketFormatError("neither an Avro container nor a wire message")
        packet = packet_of(bytes(data))
        _, error = split_bodies(packet.schema, packet.body, 1)
        if error is not None:
            raise error
        yield _Lying(name, whole, packet)
        return
    header = container_header(data)
    check_codec(header.codec)
    schema = schema_of_container(header.schema_text)
    for one in _blocks(name, data, header):
        if isinstance(one, ManifestProblem):
            yield one
            continue
        block, end = one
        ends: list[int] = []
        bodies = b""
        try:
            bodies = block_bytes(block, header.codec)
            ends, error = split_bodies(schema, bodies, block.n_packets)
        except PacketFormatError as broken:
            error = broken
        is_whole = block.n_packets == 1 and block.offset == header.end and end == len(data)
        for first, last in pairwise([0, *ends]):
            place = PacketPlace(file, start, length, block.offset, first, last - first)
            yield _Lying(name, whole if is_whole else place, Packet(schema, bodies[first:last]))
        if error is not None:
            lost = f"{block.n_packets - len(ends)} of {block.n_packets} packets of the block at byte {block.offset}"
            yield _problem("UnreadablePackets", f"{name}: {error}", lost)


def _blocks(
    name: str, data: memoryview, header: ContainerHeader
) -> Iterator[tuple[ContainerBlock, int] | ManifestProblem]:
    """The blocks of a container, and where each ends; behind a broken one it goes on at the next sync marker."""
    position = header.end
    while position < len(data):
        try:
            block, end = container_block(data, header, position)
        except PacketFormatError as error:
            found = _find(data, header.sync, position)
            end = len(data) if found < 0 else found + len(header.sync)
            yield _problem("UnreadablePackets", f"{name}: {error}", f"{end - position} bytes")
        else:
            yield block, end
        position = end


def _find(data: memoryview, sought: bytes, start: int) -> int:
    """Where the bytes are found from `start` on, -1 if nowhere; without a copy of a whole night."""
    for first in range(start, len(data), _PIECE_BYTES):
        found = bytes(data[first : first + _PIECE_BYTES + len(sought) - 1]).find(sought)
        if found >= 0:
            return first + found
    return -1


def _adapted(lying: Iterable[_Lying | ManifestProblem]) -> Iterator[_Found | ManifestProblem]:
    """What every packet must say, worked out for many at a time, and problems in their places."""
    batch: list[_Lying | ManifestProblem] = []
    n_bytes = 0
    for one in lying:
        batch.append(one)
        n_bytes += len(one.packet.body) if isinstance(one, _Lying) else 0
        if len(batch) == _BATCH or n_bytes >= _BATCH_BYTES:
            yield from _adapted_batch(batch)
            batch, n_bytes = [], 0
    yield from _adapted_batch(batch)


def _adapted_batch(batch: list[_Lying | ManifestProblem]) -> Iterator[_Found | ManifestProblem]:
    heads = iter(adapt_packets([one.packet for one in batch if isinstance(one, _Lying)], frozenset()).heads)
    for one in batch:
        if isinstance(one, ManifestProblem):
            yield one
            continue
        try:
            digest = hashlib.sha256(one.packet.body).digest()
            yield _Found(one.name, one.place, _usable(next(heads)), digest)
        except PacketFormatError as error:
            yield _problem("UnusablePacket", f"{one.name}: {error}", "the packet")


def _usable(head: PacketHead | PacketFormatError) -> PacketHead:
    if isinstance(head, PacketFormatError):
        raise head
    if not SURVEY_MJD_RANGE[0] <= head.midpoint_mjd_tai <= SURVEY_MJD_RANGE[1]:
        raise PacketFormatError(f"midpoint {head.midpoint_mjd_tai} is no MJD of any survey")
    if min(head.dia_source_id, head.visit) < 1:
        raise PacketFormatError(f"diaSourceId {head.dia_source_id}, visit {head.visit}: 0 is none")
    return head


def _problem(
    error: str, reason: str, lost: str, visit: int | None = None, detector: int | None = None
) -> ManifestProblem:
    return ManifestProblem(0, visit, detector, error, reason, lost)


def _write_index(index: Path, rows: list[tuple[Any, ...]], problems: list[ManifestProblem], survey: str) -> None:
    columns = {
        name: pa.array([row[place] for row in rows], kind) for place, (name, kind) in enumerate(_COLUMNS.items())
    }
    metadata = {
        _PROBLEMS_KEY: json.dumps([asdict(problem) for problem in problems]).encode(),
        _SURVEY_KEY: survey.encode(),
    }
    index.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, metadata=metadata), index)


def _visits(table: pa.Table, survey: str) -> tuple[Visit, ...]:
    """Visits of an index. Packets of one exposure may differ in how they round its time: the earliest counts."""
    columns = {name: table[name].to_numpy() for name in ("visit", "detector", "midpointMjdTai", "exposureTime")}
    bands = table["band"].to_pylist()
    order = np.lexsort((columns["midpointMjdTai"], columns["visit"]))
    visits = []
    for rows in np.split(order, np.flatnonzero(np.diff(columns["visit"][order])) + 1):
        first = int(rows[0])
        exposure_time = float(columns["exposureTime"][first])
        visits.append(
            visit_without_images(
                int(columns["visit"][first]),
                float(columns["midpointMjdTai"][first]),
                bands[first],
                np.unique(columns["detector"][rows]).tolist(),
                source=survey,
                exposure_time_s=exposure_time if np.isfinite(exposure_time) else 0.0,
            )
        )
    return tuple(sorted(visits, key=lambda visit: (visit.midpoint_mjd_tai, visit.visit)))

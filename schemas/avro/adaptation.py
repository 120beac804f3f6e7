"""Archived packets, of whatever survey and version, in the field names of the newest schema.

Filters see one table, whose columns are those of the newest LSST record. Here stands how a decoded packet
becomes a row of it. What a packet does not say is null: nothing is guessed.

LSST, versions 7.0 to 11.1, also as Fink passes them on: by name, with the renames of `RENAMED` and
`SS_SOURCE_9`.

- Histories are put in order of (midpoint, id): simulated packets of 7.1 and 7.4 came without order.
- An id of 0 means none, as LSST's database writes it.
- Fink fills records that are null with nulls: they count as null.
- `time_processed` and `validityStart` of 8.0 are UTC, as Avro defines its timestamps.
- 7.1 wrote places of forced photometry in radians: in version 7 a place that is not the alert's is null.
- The id is that of diaSource: LSST's sample packets have another number beside it.
- Versions before 7.0 have no visit, only ccdVisitId, packed by each camera's own rule: refused.
- Times must be MJD: the sample packets of 7.x carry Unix seconds there and are refused.

ZTF, versions 1.8 to 4.02, also as Fink passes them on:

- diaSourceId is candid; visit and detector are the exposure's number and the readout channel, as in
  `nightstream ingest ztf-detections`; diaObjectId is a number that gives objectId back.
- jd and jdstarthist, jdendhist are starts of exposures; midpoints assume 30 s where exptime is not said.
- xpos, ypos count from 1 (mindtoedge is 3072.5 - xpos at the right border), x and y from 0.
- rb and drb are no reliability; magap has an aperture of 8 or 14 pixels by version and is no apFlux; the
  object has no mean place in the packet: all these are null.
- nDiaSources is ndethist: it counts detections down to 3 sigma, of one field and readout channel.
- A known solar-system object within 5 arcsec is a match. In 7,100 detections of known asteroids nearly
  all have 0 or 1; by the 15 strays at 5 to 30 arcsec in 9,581 detections chance gives 0.4 below 5. As in
  an LSST packet, such an alert has neither diaObject nor histories.
- prvDiaSources are the detections among prv_candidates, not its upper limits; prvDiaForcedSources are the
  points of fp_hists with procstatus 0. They have no place: the packet does not say it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from reprlib import Repr
from typing import Any

import erfa
import numpy as np
import pyarrow as pa

from schemas import ztf
from schemas.avro.wire import PacketFormatError
from schemas.identifiers import dia_forced_source_id
from schemas.manifests import BANDS
from schemas.records import ZERO_IS_NULL
from schemas.tables import ALERT_COLUMNS, ALERT_ID, KEY_FIELDS, alert_fields, project_alerts_schema

LSST, ZTF = "lsst", "ztf"

# what pyarrow raises for a value that a column cannot hold
_MISFITS = (ValueError, TypeError, OverflowError, NotImplementedError)

_FINITE = (-sys.float_info.max, sys.float_info.max)
_MAX_LONG = 2**63 - 1
_MAX_INT = 2**31 - 1
MJD_RANGE = (10_000.0, 100_000.0)  # 1886 to 2132
MAX_EXPOSURE_S = 86_400.0

_MJD_0 = datetime(1858, 11, 17, tzinfo=UTC)
_JD_OF_MJD_0 = 2_400_000.5
_KM_PER_S = 149_597_870.7 / 86_400.0  # of 1 AU per day
ARCSEC_PER_DEG = 3600.0
MISPLACED_DEG = 0.1

_MAG_RANGE = (-10.0, 50.0)
_MIN_MAG_ERR = 1e-9
_DN_RANGE = (-1e12, 1e12)
_ZTF_SENTINELS = (-999.0, -99999.0)
_ZTF_NO_NAME = "null"
_ZTF_SS_RADIUS_ARCSEC = 5.0
_ZTF_FIRST_PIXEL = 1.0
_ZTF_NO_WARNING = "0"

_FIELDS = {record: frozenset(alert_fields(column)) for column, (record, _) in ALERT_COLUMNS.items()}

# record -> (older name, name now) where only the name changed, or a timestamp became an MJD
RENAMED = {
    "diaSource": (("is_negative", "isNegative"), ("time_processed", "timeProcessedMjdTai")),
    "diaForcedSource": (("time_processed", "timeProcessedMjdTai"),),
    "diaObject": (("validityStart", "validityStartMjdTai"),),
    "ssSource": (),
}
# ssSource of 8.0 and 9.0: older name, name now, unit of the older in units of now
SS_SOURCE_9 = (
    ("eclipticLambda", "eclLambda", 1.0),
    ("eclipticBeta", "eclBeta", 1.0),
    ("galacticL", "galLon", 1.0),
    ("galacticB", "galLat", 1.0),
    ("heliocentricDist", "helioRange", 1.0),
    ("topocentricDist", "topoRange", 1.0),
    ("predictedVMagnitude", "ephVmag", 1.0),
    ("residualDec", "ephOffsetDec", ARCSEC_PER_DEG),
    *((f"heliocentric{axis.upper()}", f"helio_{axis}", 1.0) for axis in "xyz"),
    *((f"topocentric{axis.upper()}", f"topo_{axis}", 1.0) for axis in "xyz"),
    *((f"heliocentricV{axis.upper()}", f"helio_v{axis}", _KM_PER_S) for axis in "xyz"),
    *((f"topocentricV{axis.upper()}", f"topo_v{axis}", _KM_PER_S) for axis in "xyz"),
)


@dataclass(frozen=True)
class PacketHead:
    """What every packet must say, in today's names.

    Attributes
    ----------
    survey : "lsst" or "ztf"
    dia_source_id, visit, detector : the alert's id and exposure
    band : one of u g r i z y
    midpoint_mjd_tai : middle of the exposure
    exposure_time_s : None where the packet doesn't say (LSST before 11.1)
    kafka_key : LSST: diaObjectId, else ssObjectId, else diaSourceId, as text; ZTF: objectId
    """

    survey: str
    dia_source_id: int
    visit: int
    detector: int
    band: str
    midpoint_mjd_tai: float
    exposure_time_s: float | None
    kafka_key: str


@dataclass(frozen=True)
class AdaptedPacket(PacketHead):
    """One packet in today's names.

    Attributes
    ----------
    record : the row of the table `alerts`: diaSource (dict), diaObject and ssSource (dict or None),
        prvDiaSources and prvDiaForcedSources (lists of dict); a field that is missing is null
    """

    record: dict[str, Any]


def adapt_packet(packet: Mapping[str, Any]) -> AdaptedPacket:
    """A decoded packet, LSST's or ZTF's, in the field names of the newest schema.

    Parameters
    ----------
    packet : nested dicts as Avro readers give them

    Raises
    ------
    PacketFormatError
        Neither survey's packet, or id, exposure, place, time or band are missing, of a wrong type or out
        of range; the message names the field and the value. Other fields are passed on as they are:
        `adapted_table` finds those of a wrong type.
    """
    if not isinstance(packet, Mapping):
        raise PacketFormatError(f"a packet is a record, got {type(packet).__name__}")
    if "diaSource" in packet:
        return _adapt_lsst(packet)
    if "candidate" in packet:
        return _adapt_ztf(packet)
    raise PacketFormatError(f"neither LSST's packet (diaSource) nor ZTF's (candidate): fields {_shown(list(packet))}")


def adapted_table(records: Sequence[dict[str, Any]], columns: frozenset[str]) -> pa.Table:
    """Rows of `AdaptedPacket.record` as the table that `project_alerts_schema(columns)` describes.

    Fields that are missing are null, fields that no column asks for are not looked at.

    Raises
    ------
    PacketFormatError
        A value that its column cannot hold; the message names alert, field and value.
    ValueError
        A column that the table does not have.
    """
    schema = project_alerts_schema(columns)
    arrays = []
    for column in schema:
        if column.name == ALERT_ID:
            arrays.append(pa.array([record["diaSource"][ALERT_ID] for record in records], type=column.type))
        else:
            arrays.append(_table_column(records, column))
    return pa.Table.from_arrays(arrays, schema=schema)


def _table_column(records: Sequence[dict[str, Any]], column: pa.Field) -> pa.Array:
    whole = [field.name for field in _fields_of(column) if pa.types.is_integer(field.type)]
    rows = [row for record in records for row in _rows_of(record, column)]
    # Arrow would cut the fraction off without a word.
    if any(isinstance(row.get(name), float) for row in rows for name in whole):
        raise PacketFormatError(_first_misfit(records, column))
    try:
        return pa.array([record[column.name] for record in records], type=column.type)
    except _MISFITS as error:
        raise PacketFormatError(_first_misfit(records, column) or f"{column.name}: {error}") from error


def _first_misfit(records: Sequence[dict[str, Any]], column: pa.Field) -> str | None:
    """Alert, field and value of the first value that its column cannot hold."""
    for record in records:
        for i, row in enumerate(_rows_of(record, column)):
            for field in _fields_of(column):
                if not _fits(row.get(field.name), field.type):
                    where = f"{column.name}[{i}]" if pa.types.is_list(column.type) else column.name
                    alert = record["diaSource"][ALERT_ID]
                    return f"alert {alert}: {where}.{field.name} is no {field.type}: {_shown(row[field.name])}"
    return None


def _fits(value: Any, arrow_type: pa.DataType) -> bool:
    if isinstance(value, float) and pa.types.is_integer(arrow_type):
        return False
    try:
        pa.array([value], type=arrow_type)
    except _MISFITS:
        return False
    return True


def _fields_of(column: pa.Field) -> list[pa.Field]:
    return list(column.type.value_type if pa.types.is_list(column.type) else column.type)


def _rows_of(record: dict[str, Any], column: pa.Field) -> list[dict[str, Any]]:
    rows = record[column.name]
    if isinstance(rows, list):
        return rows
    return [] if rows is None else [rows]


def _adapt_lsst(packet: Mapping[str, Any]) -> AdaptedPacket:
    values = _record(packet["diaSource"], "diaSource")
    source = _by_name(values, "diaSource")
    dia_source_id = _whole(source, "diaSource", "diaSourceId", _MAX_LONG)
    if "visit" not in source and "ccdVisitId" in values:
        raise PacketFormatError("diaSource has ccdVisitId but no visit: versions before 7.0 cannot be read")
    visit = _whole(source, "diaSource", "visit", _MAX_LONG)
    detector = _whole(source, "diaSource", "detector", _MAX_INT)
    ra = _number(source, "diaSource", "ra", 0.0, 360.0)
    dec = _number(source, "diaSource", "dec", -90.0, 90.0)
    midpoint = _number(source, "diaSource", "midpointMjdTai", *MJD_RANGE)
    band = _band(source.get("band"), "diaSource.band")
    exposure_time = _optional(source, "diaSource", "exposureTime", 0.0, MAX_EXPOSURE_S)

    dia_object = _lsst_object(packet, "diaObject")
    ss_source = _lsst_object(packet, "ssSource")
    if ss_source is not None:
        _rename_ss_source(_record(packet["ssSource"], "ssSource"), ss_source, dec)
        ss_source.setdefault("diaSourceId", dia_source_id)  # 9.0 left it null
    forced = _lsst_history(packet, "prvDiaForcedSources")
    if "alertId" in packet:
        for point in forced:
            _drop_other_place(point, ra, dec)
    return AdaptedPacket(
        survey=LSST,
        dia_source_id=dia_source_id,
        visit=visit,
        detector=detector,
        band=band,
        midpoint_mjd_tai=midpoint,
        exposure_time_s=exposure_time,
        kafka_key=str(_first_id(source, dia_object, ss_source) or dia_source_id),
        record={
            "diaSource": source,
            "diaObject": dia_object,
            "ssSource": ss_source,
            "prvDiaSources": _lsst_history(packet, "prvDiaSources"),
            "prvDiaForcedSources": forced,
        },
    )


def _by_name(values: Mapping[str, Any], record: str) -> dict[str, Any]:
    """The fields of a record that are known today and not null."""
    known = _FIELDS[record]
    fields = {name: value for name, value in values.items() if value is not None and name in known}
    for old, new in RENAMED[record]:
        value = values.get(old)
        if value is not None:
            fields.setdefault(new, _mjd_tai(value) if isinstance(value, datetime) else value)
    for name in ZERO_IS_NULL:
        if fields.get(name) == 0:
            del fields[name]
    return fields


def _lsst_object(packet: Mapping[str, Any], column: str) -> dict[str, Any] | None:
    """diaObject or ssSource; None where it is null or holds nothing but nulls."""
    if packet.get(column) is None:
        return None
    values = _record(packet[column], column)
    if all(value is None for value in values.values()):
        return None
    fields = _by_name(values, ALERT_COLUMNS[column][0])
    _whole(fields, column, KEY_FIELDS[column], _MAX_LONG)
    return fields


def _lsst_history(packet: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    record, key = ALERT_COLUMNS[column][0], KEY_FIELDS[column]
    history = []
    for where, values in _rows(packet, column):
        fields = _by_name(values, record)
        _whole(fields, where, key, _MAX_LONG)
        _number(fields, where, "midpointMjdTai", *_FINITE)
        history.append(fields)
    return sorted(history, key=lambda fields: (fields["midpointMjdTai"], fields[key]))


def _rename_ss_source(values: Mapping[str, Any], fields: dict[str, Any], dec_deg: float) -> None:
    # residualRa leaves out cos(dec): so do observed minus predicted places of real packets.
    on_the_sky = ("residualRa", "ephOffsetRa", ARCSEC_PER_DEG * math.cos(math.radians(dec_deg)))
    for old, new, unit in (*SS_SOURCE_9, on_the_sky):
        if values.get(old) is not None:
            fields.setdefault(new, unit * _number(values, "ssSource", old, *_FINITE))


def _drop_other_place(point: dict[str, Any], ra_deg: float, dec_deg: float) -> None:
    """Forget the place of a forced measurement unless it is within 0.1 degrees of the alert in both angles."""
    ra = _optional(point, "prvDiaForcedSources", "ra", *_FINITE)
    dec = _optional(point, "prvDiaForcedSources", "dec", *_FINITE)
    if ra is None or dec is None:
        return
    across = (ra - ra_deg + 180.0) % 360.0 - 180.0
    if abs(across) * math.cos(math.radians(dec_deg)) > MISPLACED_DEG or abs(dec - dec_deg) > MISPLACED_DEG:
        del point["ra"], point["dec"]


def _first_id(
    source: dict[str, Any], dia_object: dict[str, Any] | None, ss_source: dict[str, Any] | None
) -> int | None:
    for name, record in (("diaObjectId", dia_object), ("ssObjectId", ss_source)):
        for fields in (source, record or {}):
            if name in fields:
                return _whole(fields, "diaSource", name, _MAX_LONG)
    return None


def _mjd_tai(moment: datetime) -> float:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since = moment - _MJD_0
    return float(mjd_tai(since.days, since.seconds, since.microseconds))


def mjd_tai(days: Any, seconds: Any, microseconds: Any) -> Any:
    """MJD TAI from the time since MJD 0 UTC, scalars or arrays."""
    fraction = seconds / 86_400.0 + microseconds / 86_400e6
    _, tai_fraction, _ = erfa.ufunc.utctai(_JD_OF_MJD_0 + days, fraction)
    return days + tai_fraction


def _adapt_ztf(packet: Mapping[str, Any]) -> AdaptedPacket:
    candidate = _record(packet["candidate"], "candidate")
    object_id = packet.get("objectId")
    if not isinstance(object_id, str):
        raise PacketFormatError(f"objectId is no text: {_shown(object_id)}")
    dia_object_id = _worded("", object_id, ztf.object_number)
    if packet.get("candid") not in (None, candidate.get("candid")):
        raise PacketFormatError(
            f"candid {_shown(packet['candid'])} is not the candidate's, {_shown(candidate.get('candid'))}"
        )
    ss_source = _ztf_ss_source(candidate)
    found = [("candidate", candidate)]
    if ss_source is None:
        found += [(where, row) for where, row in _rows(packet, "prv_candidates") if _is_detection(where, row)]
    sources = _ztf_sources(found)
    source, history = sources[0], sources[1:]
    exposure_time = source["exposureTime"]
    forced: list[dict[str, Any]] = []
    dia_object = None
    if ss_source is None:
        for one in sources:
            one["diaObjectId"] = dia_object_id
        dia_object = _ztf_object(candidate, dia_object_id, exposure_time)
        forced = _ztf_forced(packet, dia_object_id)
    else:
        source["ssObjectId"] = ss_source["ssObjectId"]
    return AdaptedPacket(
        survey=ZTF,
        dia_source_id=source["diaSourceId"],
        visit=source["visit"],
        detector=source["detector"],
        band=source["band"],
        midpoint_mjd_tai=source["midpointMjdTai"],
        exposure_time_s=exposure_time,
        kafka_key=object_id,
        record={
            "diaSource": source,
            "diaObject": dia_object,
            "ssSource": ss_source,
            "prvDiaSources": sorted(history, key=lambda row: (row["midpointMjdTai"], row["diaSourceId"])),
            "prvDiaForcedSources": forced,
        },
    )


def _is_detection(where: str, row: Mapping[str, Any]) -> bool:
    return row.get("candid") is not None and _ztf_number(row, where, "magpsf", *_MAG_RANGE) is not None


def _ztf_sources(found: list[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Candidates as diaSources; `found` holds where in the packet each stands, and itself."""
    sources = [_ztf_source(row, where) for where, row in found]
    magnitude = np.array([_or_nan(_ztf_number(row, where, "magpsf", *_MAG_RANGE)) for where, row in found])
    error = np.array([_or_nan(_ztf_number(row, where, "sigmapsf", 0.0, 100.0)) for where, row in found])
    error[error < _MIN_MAG_ERR] = math.nan
    positive = np.array([not source["isNegative"] for source in sources])
    start = np.array([_number(row, where, "jd", *ztf.JD_RANGE) for where, row in found])
    exposure = np.array([source["exposureTime"] for source in sources])
    columns = {
        "midpointMjdTai": ztf.midpoint_mjd_tai(start, exposure),
        "snr": ztf.significance(error),
        "psfFlux": ztf.psf_flux_njy(magnitude, positive),
        "psfFluxErr": ztf.psf_flux_err_njy(magnitude, error),
    }
    for name, values in columns.items():
        for source, value in zip(sources, values.tolist(), strict=True):
            if not math.isnan(value):
                source[name] = value
    return sources


def _ztf_source(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What of a candidate needs no arithmetic on arrays."""
    source = {
        "diaSourceId": _whole(row, where, "candid", _MAX_LONG),
        "visit": ztf.visit_of_pid(_whole(row, where, "pid", _MAX_LONG)),
        "detector": _whole(row, where, "rcid", _MAX_INT),
        "band": _ztf_band(row, where),
        "ra": _number(row, where, "ra", 0.0, 360.0) % 360.0,
        "dec": _number(row, where, "dec", -90.0, 90.0),
        "isNegative": not _worded(f"{where}.", row.get("isdiffpos"), ztf.is_positive),
        "exposureTime": _ztf_exposure_s(row, where),
    }
    for name, ours in (("xpos", "x"), ("ypos", "y")):
        position = _ztf_number(row, where, name, -1e6, 1e6)
        if position is not None:
            source[ours] = position - _ZTF_FIRST_PIXEL
    return source


def _ztf_object(candidate: Mapping[str, Any], dia_object_id: int, exposure_s: float) -> dict[str, Any]:
    dia_object: dict[str, Any] = {"diaObjectId": dia_object_id}
    if candidate.get("ndethist") is not None:
        dia_object["nDiaSources"] = _whole(candidate, "candidate", "ndethist", _MAX_INT)
    for name, ours in (("jdstarthist", "firstDiaSourceMjdTai"), ("jdendhist", "lastDiaSourceMjdTai")):
        start = _ztf_number(candidate, "candidate", name, *ztf.JD_RANGE)
        if start is not None:
            dia_object[ours] = float(ztf.midpoint_mjd_tai(start, exposure_s))
    return dia_object


def _ztf_ss_source(candidate: Mapping[str, Any]) -> dict[str, Any] | None:
    name = candidate.get("ssnamenr")
    if name is not None and not isinstance(name, str):
        raise PacketFormatError(f"candidate.ssnamenr is no text: {_shown(name)}")
    distance = _ztf_number(candidate, "candidate", "ssdistnr", 0.0, 3600.0)
    if not name or name == _ZTF_NO_NAME or distance is None or distance > _ZTF_SS_RADIUS_ARCSEC:
        return None
    ss_source = {
        "diaSourceId": candidate.get("candid"),
        "ssObjectId": _worded("candidate.ssnamenr: ", name, ztf.ss_object_number),
        "designation": name,
        "ephOffset": distance,
    }
    magnitude = _ztf_number(candidate, "candidate", "ssmagnr", *_MAG_RANGE)
    if magnitude is not None:
        ss_source["ephVmag"] = magnitude
    return ss_source


def _ztf_forced(packet: Mapping[str, Any], dia_object_id: int) -> list[dict[str, Any]]:
    points = []
    for where, row in _rows(packet, "fp_hists"):
        if row.get("procstatus") != _ZTF_NO_WARNING:
            continue
        flux = _ztf_number(row, where, "forcediffimflux", *_DN_RANGE)
        error = _ztf_number(row, where, "forcediffimfluxunc", 0.0, _DN_RANGE[1])
        zero_point = _ztf_number(row, where, "magzpsci", *_MAG_RANGE)
        if flux is None or not error or zero_point is None:
            continue
        visit = ztf.visit_of_pid(_whole(row, where, "pid", _MAX_LONG))
        detector = _whole(row, where, "rcid", _MAX_INT)
        start = _number(row, where, "jd", *ztf.JD_RANGE)
        points.append(
            {
                "diaForcedSourceId": dia_forced_source_id(dia_object_id, visit, detector),
                "diaObjectId": dia_object_id,
                "visit": visit,
                "detector": detector,
                "psfFlux": flux * ztf.njy_per_dn(zero_point),
                "psfFluxErr": error * ztf.njy_per_dn(zero_point),
                "midpointMjdTai": float(ztf.midpoint_mjd_tai(start, _ztf_exposure_s(row, where))),
                "band": _ztf_band(row, where),
            }
        )
    return sorted(points, key=lambda point: (point["midpointMjdTai"], point["diaForcedSourceId"]))


def _ztf_band(row: Mapping[str, Any], where: str) -> str:
    fid = _whole(row, where, "fid", _MAX_INT)
    if fid not in ztf.BAND_OF_FID:
        raise PacketFormatError(f"{where}.fid {fid} is none of {', '.join(map(str, ztf.BAND_OF_FID))}")
    return ztf.BAND_OF_FID[fid]


def _ztf_exposure_s(row: Mapping[str, Any], where: str) -> float:
    exposure_s = _ztf_number(row, where, "exptime", 0.0, MAX_EXPOSURE_S)
    return ztf.EXPOSURE_S if exposure_s is None else exposure_s


def _ztf_number(row: Mapping[str, Any], where: str, name: str, low: float, high: float) -> float | None:
    """A number that may be missing, or one of the numbers that say so."""
    if row.get(name) in _ZTF_SENTINELS:
        return None
    return _optional(row, where, name, low, high)


def _rows(packet: Mapping[str, Any], column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a list with their place, none where it is null."""
    rows = packet.get(column)
    if rows is None:
        return
    if not isinstance(rows, list):
        raise PacketFormatError(f"{column} is no list: {_shown(rows)}")
    for i, row in enumerate(rows):
        where = f"{column}[{i}]"
        yield where, _record(row, where)


def _record(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise PacketFormatError(f"{where} is no record: {_shown(values)}")
    return values


def _whole(fields: Mapping[str, Any], where: str, name: str, high: int) -> int:
    value = fields.get(name)
    if value is None:
        raise PacketFormatError(f"{where} has no {name}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise PacketFormatError(f"{where}.{name} is no whole number: {_shown(value)}")
    if not 0 <= value <= high:
        raise PacketFormatError(f"{where}.{name} {_shown(value)} is outside [0, {high}]")
    return value


def _number(fields: Mapping[str, Any], where: str, name: str, low: float, high: float) -> float:
    value = _optional(fields, where, name, low, high)
    if value is None:
        raise PacketFormatError(f"{where} has no {name}")
    return value


def _optional(fields: Mapping[str, Any], where: str, name: str, low: float, high: float) -> float | None:
    """A finite number within [low, high], None where it is null or NaN."""
    value = fields.get(name)
    if value is None or value != value:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise PacketFormatError(f"{where}.{name} is no number: {_shown(value)}")
    if not low <= value <= high:
        raise PacketFormatError(f"{where}.{name} {_shown(value)} is outside [{low}, {high}]")
    return float(value)


def _band(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in BANDS:
        raise PacketFormatError(f"{where} {_shown(value)} is none of {', '.join(BANDS)}")
    return value


def _worded(where: str, value: Any, meaning: Callable[[Any], Any]) -> Any:
    try:
        return meaning(value)
    except ValueError as error:
        raise PacketFormatError(f"{where}{error}: {_shown(value)}") from error


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 60


def _shown(value: Any) -> str:
    """The value for a message, cut to a length."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        return type(value).__name__

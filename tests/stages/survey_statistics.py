"""Our statistics of a diaObject beside LSST's own, from the light curves in real packets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from survey_sources import read_alerts

from schemas.records import DIA_FORCED_SOURCE, DIA_OBJECT, DIA_SOURCE, arrow_schema, records_from_arrow, take_records
from transforms.sky_cells import BANDS, _by_object, _moved_to_means, _new_objects, _summarised


@dataclass(frozen=True)
class Summary:
    """An object of a packet, summed up by LSST and by us over the same light curve.

    Attributes
    ----------
    theirs : column to value, None where null
    ours : one DIA_OBJECT
    rows, forced : DIA_SOURCE and DIA_FORCED_SOURCE it was summed up from
    band : of the visit that the packet is of
    """

    theirs: dict[str, Any]
    ours: np.ndarray
    rows: np.ndarray
    forced: np.ndarray
    band: str

    def of_band(self, rows: np.ndarray, band: str) -> np.ndarray:
        return take_records(rows, rows["band"] == band.encode())

    def value(self, column: str) -> Any:
        """Ours, None where null."""
        found = self.ours[column][0].item()
        return None if isinstance(found, float) and math.isnan(found) else found

    def cancellation(self, column: str) -> float:
        """By how much a weighted mean magnifies the relative errors of its terms; 1 for other columns."""
        if not column.endswith(("psfFluxMean", "scienceFluxMean")):
            return 1.0
        name = column[2:].removesuffix("Mean")
        rows = self.of_band(self.rows, column[0])
        weighted = rows[name].astype(float) / rows[f"{name}Err"].astype(float) ** 2
        return float(np.nansum(np.abs(weighted)) / abs(np.nansum(weighted)))


def summaries(name: str) -> Iterator[Summary]:
    """Every object of a file of `rubin_alerts`; its founder is its first source where the packet does not hold it."""
    for alert in read_alerts(name):
        if not (alert["diaObject"] or {}).get("diaObjectId"):
            continue
        rows = _records([*(alert["prvDiaSources"] or ()), alert["diaSource"]], DIA_SOURCE)
        founder = take_records(rows, np.array([np.argmax(rows["diaSourceId"] == alert["diaObject"]["diaObjectId"])]))
        created = _new_objects(founder)
        created["diaObjectId"] = alert["diaObject"]["diaObjectId"]
        forced = _records(alert["prvDiaForcedSources"] or [], DIA_FORCED_SOURCE)
        processed = float(rows["timeProcessedMjdTai"][-1])
        of_object = [_by_object(history, created["diaObjectId"]) for history in (rows, forced)]
        moved = _moved_to_means(created, of_object[0])
        ours = _summarised(moved, *of_object, {"readout_end_mjd_tai": processed})
        yield Summary(alert["diaObject"], ours, rows, forced, alert["diaSource"]["band"])


def band_columns(kind: str) -> list[str]:
    """The columns of a kind of statistic, such as psfFluxMean, in all bands."""
    columns = [f"{chr(band)}_{kind}" for band in BANDS]
    assert set(columns) <= set(DIA_OBJECT.names or ())
    return columns


def _records(rows: list[dict[str, Any]], dtype: np.dtype) -> np.ndarray:
    schema = arrow_schema(dtype)
    present = [field for field in schema if rows and field.name in rows[0]]
    table = pa.table({field.name: pa.array([row[field.name] for row in rows], field.type) for field in present})
    return records_from_arrow(table, dtype)

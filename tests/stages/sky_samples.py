"""Hand-made visits, sources and known objects for the tests of sky space."""

from __future__ import annotations

from typing import Any

import hpgeom
import numpy as np

from schemas.elements import AlertBatch
from schemas.records import DIA_SOURCE, SS_SOURCE, concatenate_records, empty_records, take_records
from transforms.association import AssociationConfig
from transforms.sky_cells import CellKnowledge, CellOutcome, CellVisit, ForcedFluxes, cells_of, process_visit

ARCSEC = 1.0 / 3600.0
ORDER = 9
# The middle of a sky cell, so that nothing lies near a border unless a test moves it there.
CELL = int(cells_of(np.array([150.0]), np.array([2.0]), ORDER)[0])
RA, DEC = (float(angle) for angle in hpgeom.pixel_to_angle(1 << ORDER, CELL))
RULES = AssociationConfig().rules()
START = 61367.1


def context(number: int, midpoint_mjd_tai: float | None = None, band: str = "r") -> dict[str, Any]:
    """Visit `number`, by default so many hours after the first."""
    midpoint = START + number / 24.0 if midpoint_mjd_tai is None else midpoint_mjd_tai
    return {
        "visit": 2026112200000 + number,
        "day_obs": 20261122,
        "band": band,
        "midpoint_mjd_tai": midpoint,
        "readout_end_mjd_tai": midpoint + 2e-4,
        "rotation_deg": 0.0,
        "observation_reason": None,
        "target_name": None,
    }


def sources(
    told: dict[str, Any],
    east_arcsec: list[float],
    north_arcsec: list[float] | None = None,
    detector: int = 0,
    **columns: Any,
) -> np.ndarray:
    """Sources of one detector at offsets from (RA, DEC); ids grow with visit, detector and row."""
    n = len(east_arcsec)
    rows = empty_records(DIA_SOURCE, n)
    rows["diaSourceId"] = (told["visit"] % 1000) * 100_000 + detector * 1000 + 1 + np.arange(n)
    rows["visit"], rows["detector"], rows["band"] = told["visit"], detector, told["band"].encode()
    rows["midpointMjdTai"] = told["midpoint_mjd_tai"]
    rows["timeProcessedMjdTai"] = told["readout_end_mjd_tai"]
    rows["ra"] = RA + np.array(east_arcsec, dtype=float) * ARCSEC / np.cos(np.radians(DEC))
    rows["dec"] = DEC + np.array(north_arcsec if north_arcsec is not None else [0.0] * n) * ARCSEC
    rows["raErr"] = rows["decErr"] = 0.1 * ARCSEC
    rows["psfFlux"], rows["psfFluxErr"] = 1000.0 + 10.0 * np.arange(n), 20.0
    rows["scienceFlux"], rows["scienceFluxErr"] = 3000.0, 25.0
    rows["reliability"], rows["isDipole"], rows["trailLength"] = 0.9, 0, 0.1
    for name, values in columns.items():
        rows[name] = values
    return rows


def arrived(
    told: dict[str, Any], rows: np.ndarray, detectors: tuple[int, ...] = (0,), ss: np.ndarray | None = None
) -> CellVisit:
    return CellVisit(told, detectors, rows, empty_records(SS_SOURCE, 0) if ss is None else ss)


def no_images(detector: int, ra: np.ndarray, dec: np.ndarray) -> ForcedFluxes:
    """Forced photometry where the detector sees none of the objects."""
    return ForcedFluxes(np.zeros(len(ra), dtype=bool), *(np.full(len(ra), np.nan) for _ in range(4)))


def everywhere(detector: int, ra: np.ndarray, dec: np.ndarray) -> ForcedFluxes:
    """Forced photometry that sees everything; the flux tells the position that was asked for."""
    flux = (ra - RA) / ARCSEC * np.cos(np.radians(DEC))
    return ForcedFluxes(np.ones(len(ra), dtype=bool), flux, np.full(len(ra), 7.0), flux + 50.0, np.full(len(ra), 8.0))


class Cell:
    """One sky cell between visits, for tests that call the pure function."""

    def __init__(self, measure: Any = no_images, cell: int = CELL, order: int = ORDER, **rules: Any) -> None:
        self.measure, self.cell, self.order = measure, cell, order
        self.rules = AssociationConfig(**rules).rules() if rules else RULES
        self.known = CellKnowledge.nothing()

    def see(self, *visit: Any, **options: Any) -> CellOutcome:
        """Process `arrived(*visit, **options)` and remember what it left."""
        outcome = process_visit(self.cell, self.order, self.known, arrived(*visit, **options), self.rules, self.measure)
        self.known = CellKnowledge(
            outcome.objects,
            concatenate_records([self.known.sources, outcome.new_sources], DIA_SOURCE),
            concatenate_records([self.known.forced, outcome.new_forced], outcome.new_forced.dtype),
        )
        return outcome


def alerts_of(batches: list[AlertBatch]) -> dict[int, bytes]:
    """Every byte of each alert by diaSourceId; KeyError on an alert that was made twice."""
    found: dict[int, bytes] = {}
    for batch in batches:
        for i, row in enumerate(batch.dia_sources):
            parts = [
                row.tobytes(),
                batch.dia_objects[i].tobytes() if row["diaObjectId"] else b"",
                batch.ss_sources[i].tobytes() if row["ssObjectId"] else b"",
                batch.prv_dia_sources[batch.prv_offsets[i] : batch.prv_offsets[i + 1]].tobytes(),
                batch.prv_forced_sources[batch.forced_offsets[i] : batch.forced_offsets[i + 1]].tobytes(),
            ]
            if int(row["diaSourceId"]) in found:
                raise KeyError(f"alert {row['diaSourceId']} was made twice")
            found[int(row["diaSourceId"])] = b"|".join(parts)
    return found


def tables_of(batches: list[AlertBatch]) -> dict[str, list[bytes]]:
    """The archive's rows of all batches, each as its bytes, sorted."""
    names = ("object_states", "unassociated", "forced_sources", "dia_sources")
    return {name: sorted(row.tobytes() for batch in batches for row in getattr(batch, name)) for name in names}


def only(records: np.ndarray, **values: Any) -> np.ndarray:
    """The records with these values."""
    chosen = np.ones(len(records), dtype=bool)
    for name, value in values.items():
        chosen &= records[name] == value
    return take_records(records, chosen)

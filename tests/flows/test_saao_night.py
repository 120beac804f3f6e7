"""Seventeen real nights from frames to alerts: what must come out of SAAO's crowded field, and what must not.

The variable was measured beforehand, by other means, in a reference frame of its own (PROVENANCE.md of the data).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from scipy.stats import spearmanr

from runners.ingest.saao import PIXEL_SCALE_ARCSEC, ingest_saao
from schemas.exposures import read_exposure
from schemas.manifests import Visit, read_manifest

DATA = Path(__file__).parents[3] / "shared" / "data" / "saao_kb13475"
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data are not there: {DATA}"),
]
EVENT_REF_PIX = (287.0, 215.0)
NEAR_PIX = 3.0
RELIABLE = 0.5


@dataclass(frozen=True)
class Production:
    """What the whole set gave: visits by frame, and the columns of the tables."""

    visits: dict[str, Visit]
    summary: dict[str, Any]
    exit_code: int
    sources: dict[str, np.ndarray]
    objects: dict[str, np.ndarray]
    event_ra_dec: tuple[float, float]

    def distance_pix(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Of each row from the variable."""
        ra, dec = self.event_ra_dec
        d_ra = (columns["ra"] - ra) * np.cos(np.radians(dec))
        return np.hypot(d_ra, columns["dec"] - dec) * 3600.0 / PIXEL_SCALE_ARCSEC

    def reliable_at_event(self) -> np.ndarray:
        """Which rows of the sources are reliable detections of the variable."""
        return (self.distance_pix(self.sources) < NEAR_PIX) & (self.sources["reliability"] >= RELIABLE)


def rows_of(table: str) -> dict[str, dict[str, str]]:
    """Rows of a table of the data by frame, `AKB13475I0001`."""
    with (DATA / table).open() as lines:
        return {row["file"].removesuffix(".fits.fz"): row for row in csv.DictReader(lines)}


def event_position(visits: dict[str, Visit]) -> tuple[float, float]:
    """Where the variable is on the sky of the night folder: the table's affine, then the frame's WCS; median."""
    positions = []
    for frame, row in rows_of("frames.csv").items():
        affine = np.array(json.loads(row["affine_ref_to_frame"]))
        x, y = affine[:, 0] + affine[:, 1:] @ EVENT_REF_PIX
        wcs = read_exposure(visits[frame].detectors[0].science).wcs
        positions.append([float(value) for value in wcs.all_pix2world(x, y, 0)])
    ra, dec = np.median(positions, axis=0)
    return float(ra), float(dec)


def columns_of(folder: Path, *names: str) -> dict[str, np.ndarray]:
    table = ds.dataset(sorted(folder.rglob("*.parquet")), format="parquet").to_table(columns=list(names))
    return {name: table[name].to_numpy() for name in names}


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory, produce: Callable[..., Any]) -> Production:
    base = tmp_path_factory.mktemp("saao")
    night = ingest_saao(DATA / "frames", base / "night")
    run = produce(night.folder, base / "out")
    visits = {Path(visit.detectors[0].science).stem: visit for visit in read_manifest(night.folder).visits}
    archive = run.out / "archive"
    return Production(
        visits=visits,
        summary=run.summary,
        exit_code=run.exit_code,
        sources=columns_of(
            archive / "dia_sources", "visit", "diaObjectId", "ra", "dec", "psfFlux", "snr", "reliability"
        ),
        objects=columns_of(archive / "dia_objects", "diaObjectId", "ra", "dec"),
        event_ra_dec=event_position(visits),
    )


def test_all_frames_of_all_nights_are_produced_without_a_failure(production: Production) -> None:
    assert production.exit_code == 0
    assert set(production.visits) == set(rows_of("frames.csv"))
    assert production.summary["visits"] == len(production.visits)
    assert production.summary["failures"] == 0


def test_the_variable_is_one_dia_object(production: Production) -> None:
    at_event = production.distance_pix(production.objects) < NEAR_PIX
    assert len(np.unique(production.objects["diaObjectId"][at_event])) == 1
    detections = production.sources["diaObjectId"][production.reliable_at_event()]
    assert set(detections) == set(production.objects["diaObjectId"][at_event])


@pytest.mark.parametrize("night_of", ["day_obs", "night"])
def test_the_variable_is_detected_in_four_of_five_frames_of_the_two_densest_nights(
    production: Production, night_of: str
) -> None:
    """Nights as the manifest counts them (noon to noon), and as the table does (from 0 h UT)."""
    if night_of == "day_obs":
        nights = {frame: visit.day_obs for frame, visit in production.visits.items()}
    else:
        nights = {frame: int(row["night"]) for frame, row in rows_of("frames.csv").items()}
    densest = [night for night, _ in Counter(nights.values()).most_common(2)]
    frames = [frame for frame, night in nights.items() if night in densest]
    detected = set(production.sources["visit"][production.reliable_at_event()])
    missed = [frame for frame in frames if production.visits[frame].visit not in detected]
    assert len(frames) >= 20
    assert len(missed) <= 0.2 * len(frames), missed


def test_the_light_curve_follows_the_measured_one(production: Production) -> None:
    measured = rows_of("event_difference_flux.csv")
    fluxes = dict(
        zip(
            production.sources["visit"][production.reliable_at_event()],
            production.sources["psfFlux"][production.reliable_at_event()],
            strict=True,
        )
    )
    frames = [frame for frame in measured if production.visits[frame].visit in fluxes]
    assert len(frames) > 0.8 * len(measured)
    ours = [fluxes[production.visits[frame].visit] for frame in frames]
    theirs = [float(measured[frame]["diff_flux_adu"]) for frame in frames]
    assert spearmanr(ours, theirs).statistic >= 0.9


def test_fewer_than_ten_other_sources_a_frame_are_as_reliable(production: Production) -> None:
    others = (production.sources["reliability"] >= RELIABLE) & ~production.reliable_at_event()
    assert np.count_nonzero(others) / len(production.visits) < 10.0

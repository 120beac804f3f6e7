"""From calibrated exposures with a WCS to visits: which share a field, a visit, a template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runners.ingest.night_folder import Refusal, number_visits
from schemas.exposures import Exposure
from schemas.manifests import MAX_DETECTOR, DetectorImages, Visit

_SAME_VISIT_S = 0.5


@dataclass(frozen=True)
class ConvertedExposure:
    """Facts of an exposure that was written to a night folder.

    Attributes
    ----------
    source : what it was made from
    path : where it was written
    fwhm_pix : width of its PSF, NaN when unknown
    ra_deg, dec_deg, radius_deg : centre of the image on the sky, half of its shorter side
    """

    source: str
    path: Path
    instrument: str
    band: str
    detector: int
    midpoint_mjd_tai: float
    exposure_time_s: float
    target: str | None
    fwhm_pix: float
    ra_deg: float
    dec_deg: float
    radius_deg: float

    @property
    def seeing_deg(self) -> float:
        """What to sort by: the best first, the unknown last."""
        return self.fwhm_pix if math.isfinite(self.fwhm_pix) else math.inf


def sky_extent(exposure: Exposure) -> tuple[float, float, float]:
    """Centre of an exposure (ra, dec) and half of its shorter side, degrees."""
    ny, nx = exposure.image.shape
    x, y = (nx - 1) / 2.0, (ny - 1) / 2.0
    ra, dec = exposure.wcs.all_pix2world([x, nx - 1.0, x], [y, y, ny - 1.0], 0)
    sides = [separation_deg(ra[0], dec[0], ra[k], dec[k]) for k in (1, 2)]
    return float(ra[0]) % 360.0, float(dec[0]), min(sides)


def separation_deg(ra1: float, dec1: float, ra2: float, dec2: float) -> float:
    """Angle between two positions, by the haversine formula."""
    a1, d1, a2, d2 = np.radians([ra1, dec1, ra2, dec2])
    chord = math.sin((d2 - d1) / 2.0) ** 2 + math.cos(d1) * math.cos(d2) * math.sin((a2 - a1) / 2.0) ** 2
    return math.degrees(2.0 * math.asin(min(math.sqrt(chord), 1.0)))


def group_fields(exposures: Iterable[ConvertedExposure]) -> list[list[ConvertedExposure]]:
    """Exposures of one instrument and band that cover each other's centres; groups and members in time order."""
    groups: list[list[ConvertedExposure]] = []
    for one in sorted(exposures, key=lambda exposure: (exposure.midpoint_mjd_tai, exposure.source)):
        for group in groups:
            first = group[0]
            apart = separation_deg(first.ra_deg, first.dec_deg, one.ra_deg, one.dec_deg)
            if (first.instrument, first.band) == (one.instrument, one.band) and apart < first.radius_deg:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def visits_of(
    exposures: Sequence[ConvertedExposure], templates: dict[Path, Path | None], refused: list[Refusal]
) -> list[Visit]:
    """Visits in time order, numbered: exposures of one band with one midpoint are the detectors of one visit.

    Parameters
    ----------
    exposures : of one instrument
    templates : template of each science image, None where there is none
    refused : receives exposures whose detector the visit has already
    """
    ordered = sorted(exposures, key=lambda one: (one.midpoint_mjd_tai, one.band, one.detector, one.source))
    gathered: list[list[ConvertedExposure]] = []
    for one in ordered:
        group = next((group for group in gathered if _same_visit(group[0], one)), None)
        if group is None:
            gathered.append([one])
        elif one.detector in {other.detector for other in group}:
            first = next(other for other in group if other.detector == one.detector)
            refused.append(Refusal(one.source, f"same time, band and detector {one.detector} as {first.source}"))
        else:
            group.append(one)
    return number_visits([_visit(group, templates) for group in gathered])


def _same_visit(first: ConvertedExposure, one: ConvertedExposure) -> bool:
    apart_s = abs(first.midpoint_mjd_tai - one.midpoint_mjd_tai) * 86400.0
    return first.band == one.band and apart_s < _SAME_VISIT_S


def _visit(group: list[ConvertedExposure], templates: dict[Path, Path | None]) -> Visit:
    first = group[0]
    detectors = [
        DetectorImages(
            one.detector, str(one.path), None if (template := templates[one.path]) is None else str(template)
        )
        for one in group
    ]
    return Visit(
        visit=0,
        day_obs=0,
        seq_num=0,
        instrument=first.instrument,
        band=first.band,
        midpoint_mjd_tai=first.midpoint_mjd_tai,
        exposure_time_s=first.exposure_time_s,
        readout_end_mjd_tai=first.midpoint_mjd_tai + 0.5 * first.exposure_time_s / 86400.0,
        boresight_ra_deg=first.ra_deg,
        boresight_dec_deg=first.dec_deg,
        rotation_deg=0.0,
        observation_reason="science",
        target_name=first.target,
        detectors=tuple(detectors),
    )


def checked_detector(value: object) -> int:
    """A detector number; ValueError says what is allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"detector must be an integer, got {value!r}")
    try:
        number = int(value)
    except ValueError as error:
        raise ValueError(f"detector must be an integer, got {value!r}") from error
    if not 0 <= number <= MAX_DETECTOR or number != float(value):
        raise ValueError(f"detector must be an integer in [0, {MAX_DETECTOR}], got {value!r}")
    return number

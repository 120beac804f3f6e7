"""The night simulator: a night folder with pixels, ephemerides and the truth about everything in it.

    CreateExposures -> RenderExposures -> GatherTruth -> WriteTruth

Each element is one image to make: it is rendered and written where it is processed and only its few truth
rows travel on. The manifest is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions
from astropy.wcs import WCS

from schemas.exposures import Exposure, mask_bits, write_exposure
from schemas.manifests import BANDS, MAX_DETECTOR, MAX_SEQ_NUM, DetectorImages, Visit, read_manifest, write_manifest
from transforms.numerics.image_rendering import (
    INJECTION_DTYPE,
    SHARPEST_TEMPLATE_ARCSEC,
    RenderedExposure,
    draw_psf,
    render_science,
    render_template,
)
from transforms.numerics.sky_simulation import (
    PIXEL_SCALE_ARCSEC,
    Movers,
    Purpose,
    Sky,
    SkyConfig,
    TanProjection,
    draw_asteroids,
    draw_conditions,
    draw_sky,
    draw_trail,
    nominal_conditions,
    random_stream,
)

INSTRUMENT = "SimCam"
READOUT_S = 3.0
TEMPLATE_MARGIN_PIX = 40
TEMPLATE_ROTATION_DEG = 0.1
TEMPLATE_SHIFT_PIX = (2.37, -1.61)  # off the science grid by a fraction of a pixel
DETECTOR_GAP_PIX = 60
EPHEMERIS_STEP_D = 10.0 / 1440.0
EPHEMERIS_MARGIN_D = 1.0 / 24.0
DETECTABLE_SNR = 5.0
_STAMP_MARGIN_PIX = 80  # sky beyond the images whose light still reaches them

EPHEMERIS_SCHEMA = pa.schema(
    [
        pa.field("ssObjectId", pa.int64(), nullable=False),
        pa.field("designation", pa.string(), nullable=False),
        pa.field("mjd_tai", pa.float64(), nullable=False),
        pa.field("ra", pa.float64(), nullable=False, metadata={"unit": "deg"}),
        pa.field("dec", pa.float64(), nullable=False, metadata={"unit": "deg"}),
        pa.field("ra_rate_arcsec_per_h", pa.float64(), nullable=False, metadata={"note": "times cos(dec)"}),
        pa.field("dec_rate_arcsec_per_h", pa.float64(), nullable=False),
        pa.field("magnitude", pa.float64(), nullable=False, metadata={"unit": "AB mag in r"}),
    ]
)
TRUTH_SCHEMA = pa.schema(
    [
        pa.field("visit", pa.int64(), nullable=False),
        pa.field("detector", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("ra", pa.float64(), nullable=False),
        pa.field("dec", pa.float64(), nullable=False),
        pa.field("x", pa.float32(), nullable=False),
        pa.field("y", pa.float32(), nullable=False),
        pa.field("flux_njy", pa.float64(), nullable=False),
        pa.field("snr", pa.float64(), nullable=False),
        pa.field("object", pa.string(), nullable=False),
        pa.field("good_pixels", pa.bool_(), nullable=False),
    ]
)


class NightSimulationError(ValueError):
    """A night that cannot be simulated as asked; the message says why."""


@dataclass(frozen=True)
class NightPreset:
    """What a simulated night holds. Densities are per square arcminute.

    Visits come in groups of one per band, 39 s apart; groups start `group_gap_min` apart. The sky's clock
    (onset of transients, phase of variables) starts at `sky_epoch_mjd_tai`; transients appear within
    `appearance_window_h` of it, and asteroids are spread over the field in the middle of that window of each night.
    So two presets that differ in `n_visits` alone give the same images for the visits they share. The first visit
    of each night has the fast trail. Every `psf_missing_every`-th visit comes without a PSF.
    """

    name: str
    n_visits: int
    n_detectors: int
    size_pix: int
    bands: tuple[str, ...]
    group_gap_min: float = 15.0
    visit_gap_s: float = 39.0
    exposure_time_s: float = 30.0
    day_obs: int = 20261122
    first_seq_num: int = 1
    start_mjd_tai: float = 61367.1
    sky_epoch_mjd_tai: float = 61367.1
    appearance_window_h: float = 1.0
    ra_deg: float = 150.1
    dec_deg: float = 2.2
    dither_pix: float = 18.0
    rotation_deg: float = 0.3
    template_depth: int = 12
    psf_missing_every: int = 4
    stars_per_arcmin2: float = 122.0
    galaxies_per_arcmin2: float = 37.0
    transients_per_arcmin2: float = 2.5
    variables_per_arcmin2: float = 1.7
    asteroids_per_arcmin2: float = 0.6


PRESETS = {
    "tiny": NightPreset(
        "tiny",
        n_visits=4,
        n_detectors=2,
        size_pix=512,
        bands=("g", "r"),
        group_gap_min=20.0,
        appearance_window_h=0.3,
        transients_per_arcmin2=6.5,
        variables_per_arcmin2=5.0,
        asteroids_per_arcmin2=1.2,
    ),
    "live": NightPreset("live", n_visits=12, n_detectors=2, size_pix=512, bands=("g", "r")),
    "demo": NightPreset("demo", n_visits=12, n_detectors=2, size_pix=1024, bands=("g", "r")),
    "detector": NightPreset("detector", n_visits=1, n_detectors=1, size_pix=4096, bands=("r",), rotation_deg=0.2),
}


class SimulatedNight(NamedTuple):
    """What was written. `detectable`: injections of S/N >= 5 on good pixels."""

    folder: Path
    visits: int
    exposures: int
    templates: int
    injected: int
    detectable: int
    asteroids: int


def simulate_night(
    preset: str | NightPreset,
    out: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    nights: int = 1,
    options: PipelineOptions | None = None,
) -> SimulatedNight:
    """Simulate one or more nights of one field into a night folder.

    Parameters
    ----------
    preset : str or NightPreset
        "tiny", "live", "demo", "detector", or a preset of your own.
    out : Path
        The folder; new, empty, or begun by the same preset, seed and nights. A complete one is left as it is.
    seed : int
        Non-negative. The same preset, seed and nights give the same bytes.
    progress : callable, optional
        Called from a thread of its own with (images written, images in all) when the number changes.
    nights : int
        Night k lies k days later, with the same field, transients and variables and its own asteroids.
    options : PipelineOptions, optional
        Runner and its flags; Beam's in-process FnApiRunner by default.

    Returns
    -------
    SimulatedNight

    Raises
    ------
    NightSimulationError
        Unknown preset, values that make no night, or `out` holds something else.
    """
    plan = _plan(preset, seed, nights, out)
    if not _claim_folder(plan):
        with (
            _watched(plan, progress),
            beam.Pipeline(options=options or PipelineOptions([], runner="FnApiRunner")) as flow,
        ):
            simulate_exposures(flow, plan)
        _write_table(out / "ephemerides.parquet", _ephemerides(plan))
        write_manifest(out, [_visit(plan, item) for item in plan.visits])
    return _summary(plan)


def simulate_exposures(flow: beam.Pipeline, plan: _Plan) -> beam.PCollection[str]:
    """Render every image of the plan and write it and the truth; gives the path of the truth table."""
    return (
        flow
        | "CreateExposures" >> beam.Create(plan.exposures()).with_output_types(_ExposureKey)
        | "RenderExposures" >> beam.ParDo(_RenderExposureFn(plan))
        | "GatherTruth" >> beam.GroupByKey()
        | "WriteTruth" >> beam.ParDo(_WriteTruthFn(str(plan.out)))
    )


# --- the plan: which images, where, when -----------------------------------------------------------------------


class _ExposureKey(NamedTuple):
    """One image to make: `visit` is None for a template."""

    visit: int | None
    band: str
    detector: int


class _PlannedVisit(NamedTuple):
    visit: int
    day_obs: int
    seq_num: int
    band: str
    midpoint_mjd_tai: float
    has_trail: bool


@dataclass(frozen=True)
class _Plan:
    preset: NightPreset
    seed: int
    nights: int
    out: Path
    visits: tuple[_PlannedVisit, ...]

    def exposures(self) -> list[_ExposureKey]:
        """Templates of the bands in use first, then the science images."""
        detectors = range(self.preset.n_detectors)
        bands = dict.fromkeys(item.band for item in self.visits)
        templates = [_ExposureKey(None, band, detector) for band in bands for detector in detectors]
        return templates + [
            _ExposureKey(item.visit, item.band, detector) for item in self.visits for detector in detectors
        ]

    def science_path(self, visit: int, detector: int) -> Path:
        return self.out / "science" / f"{visit}_{detector:03d}.fits"

    def template_path(self, band: str, detector: int) -> Path:
        return self.out / "templates" / f"{band}_{detector:03d}.fits"

    def detector_x_pix(self, detector: int) -> float:
        """Where the middle of a detector lies on the focal plane, along its row of detectors."""
        return (detector - (self.preset.n_detectors - 1) / 2) * (self.preset.size_pix + DETECTOR_GAP_PIX)

    def sky_config(self) -> SkyConfig:
        preset = self.preset
        margin = 2 * (preset.dither_pix + _STAMP_MARGIN_PIX)
        row_pix = preset.n_detectors * (preset.size_pix + DETECTOR_GAP_PIX) - DETECTOR_GAP_PIX
        return SkyConfig(
            preset.ra_deg,
            preset.dec_deg,
            (row_pix + margin) * PIXEL_SCALE_ARCSEC,
            (preset.size_pix + margin) * PIXEL_SCALE_ARCSEC,
            preset.sky_epoch_mjd_tai,
            preset.appearance_window_h,
            preset.exposure_time_s,
            preset.stars_per_arcmin2,
            preset.galaxies_per_arcmin2,
            preset.transients_per_arcmin2,
            preset.variables_per_arcmin2,
            preset.asteroids_per_arcmin2,
        )


def _plan(preset: str | NightPreset, seed: int, nights: int, out: Path) -> _Plan:
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise NightSimulationError(f"unknown preset {preset!r}, expected one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    _check_preset(preset)
    if seed < 0 or nights < 1:
        raise NightSimulationError(f"need seed >= 0 and nights >= 1, got seed {seed}, nights {nights}")
    visits = [item for night in range(nights) for item in _plan_night(preset, night)]
    return _Plan(preset, seed, nights, Path(out), tuple(visits))


def _check_preset(preset: NightPreset) -> None:
    """Refuse a preset whose files would break the night folder's contract, naming the values."""
    if not preset.bands or any(band not in BANDS for band in preset.bands):
        raise NightSimulationError(f"bands {preset.bands} must be a choice of {', '.join(BANDS)}")
    last_seq_num = preset.first_seq_num + preset.n_visits - 1
    if preset.n_visits < 1 or preset.first_seq_num < 0 or last_seq_num > MAX_SEQ_NUM:
        raise NightSimulationError(
            f"{preset.n_visits} visits from seq_num {preset.first_seq_num} on: need one or more, in 0 to {MAX_SEQ_NUM}"
        )
    if not 1 <= preset.n_detectors <= MAX_DETECTOR + 1 or preset.size_pix < 128:
        raise NightSimulationError(
            f"need 1 to {MAX_DETECTOR + 1} detectors of 128 pixels or more, "
            f"got {preset.n_detectors} of {preset.size_pix}"
        )
    if preset.template_depth < 1 or preset.psf_missing_every < 1:
        raise NightSimulationError(
            f"template_depth {preset.template_depth} and psf_missing_every {preset.psf_missing_every} must be >= 1"
        )
    half_row_pix = preset.n_detectors * (preset.size_pix + DETECTOR_GAP_PIX) / 2
    shift_pix = np.deg2rad(abs(preset.rotation_deg) + TEMPLATE_ROTATION_DEG) * half_row_pix + max(TEMPLATE_SHIFT_PIX)
    if preset.dither_pix + shift_pix > TEMPLATE_MARGIN_PIX:
        raise NightSimulationError(
            f"dither_pix {preset.dither_pix} and rotation_deg {preset.rotation_deg} take science images off "
            f"their templates: together {preset.dither_pix + shift_pix:.1f} pixels of {TEMPLATE_MARGIN_PIX}"
        )


def _plan_night(preset: NightPreset, night: int) -> Iterator[_PlannedVisit]:
    day = datetime.strptime(str(preset.day_obs), "%Y%m%d") + timedelta(days=night)
    day_obs = int(day.strftime("%Y%m%d"))
    for index in range(preset.n_visits):
        group, place = divmod(index, len(preset.bands))
        offset_d = group * preset.group_gap_min / 1440.0 + place * preset.visit_gap_s / 86400.0
        seq_num = preset.first_seq_num + index
        yield _PlannedVisit(
            day_obs * 100000 + seq_num,
            day_obs,
            seq_num,
            preset.bands[place],
            preset.start_mjd_tai + night + offset_d,
            index == 0,
        )


def _pointing(plan: _Plan, visit: int) -> tuple[float, float, float]:
    """Boresight (ra, dec) and rotation in degrees: the field's centre, dithered."""
    stream = random_stream(plan.seed, Purpose.POINTING, visit)
    radius_deg = plan.preset.dither_pix * np.sqrt(stream.uniform()) * PIXEL_SCALE_ARCSEC / 3600.0
    angle = stream.uniform(0.0, 2 * np.pi)
    dec = plan.preset.dec_deg + radius_deg * np.sin(angle)
    ra = (plan.preset.ra_deg + radius_deg * np.cos(angle) / np.cos(np.deg2rad(dec))) % 360.0
    return ra, dec, plan.preset.rotation_deg * stream.uniform(-1.0, 1.0)


def _science_projection(plan: _Plan, visit: int, detector: int) -> TanProjection:
    centre = (plan.preset.size_pix - 1) / 2
    ra, dec, rotation = _pointing(plan, visit)
    return TanProjection(ra, dec, centre - plan.detector_x_pix(detector), centre, rotation)


def _template_projection(plan: _Plan, detector: int) -> TanProjection:
    centre = (plan.preset.size_pix - 1) / 2 + TEMPLATE_MARGIN_PIX
    x = centre - plan.detector_x_pix(detector) + TEMPLATE_SHIFT_PIX[0]
    y = centre + TEMPLATE_SHIFT_PIX[1]
    return TanProjection(plan.preset.ra_deg, plan.preset.dec_deg, x, y, TEMPLATE_ROTATION_DEG)


def _asteroids_of_nights(plan: _Plan) -> dict[int, Movers]:
    """The asteroids of each night by day_obs, spread over the field in the middle of its window."""
    config, preset = plan.sky_config(), plan.preset
    middle_mjd_tai = preset.start_mjd_tai + preset.appearance_window_h / 48.0
    days = sorted({item.day_obs for item in plan.visits})
    return {day: draw_asteroids(plan.seed, config, day, middle_mjd_tai + night) for night, day in enumerate(days)}


def _night_spans(plan: _Plan) -> dict[int, tuple[float, float]]:
    spans: dict[int, tuple[float, float]] = {}
    for item in plan.visits:
        first, last = spans.get(item.day_obs, (item.midpoint_mjd_tai, item.midpoint_mjd_tai))
        spans[item.day_obs] = (min(first, item.midpoint_mjd_tai), max(last, item.midpoint_mjd_tai))
    return spans


def _trail(plan: _Plan, item: _PlannedVisit) -> Movers:
    """The night's fast mover, within the inner part of one detector of its visit."""
    detector = item.seq_num % plan.preset.n_detectors
    centre = np.array([(plan.preset.size_pix - 1) / 2])
    ra, dec = _science_projection(plan, item.visit, detector).to_sky(centre, centre)
    within_arcsec = 0.35 * plan.preset.size_pix * PIXEL_SCALE_ARCSEC
    near_deg = (float(ra[0]), float(dec[0]))
    return draw_trail(plan.seed, plan.sky_config(), item.visit, item.midpoint_mjd_tai, near_deg, within_arcsec)


# --- one image -------------------------------------------------------------------------------------------------


@beam.typehints.with_output_types(tuple[None, bytes])
class _RenderExposureFn(beam.DoFn):
    """Renders and writes one image; yields (None, truth rows as bytes), nothing for a template."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan

    def setup(self) -> None:
        self._sky = draw_sky(self._plan.seed, self._plan.sky_config())
        self._asteroids = _asteroids_of_nights(self._plan)
        self._visits = {item.visit: item for item in self._plan.visits}

    def process(self, element: _ExposureKey) -> Iterable[tuple[None, bytes]]:
        if element.visit is None:
            _make_template(self._plan, self._sky, element.band, element.detector)
            return
        item = self._visits[element.visit]
        yield (
            None,
            _make_science(self._plan, self._sky, self._asteroids[item.day_obs], item, element.detector).tobytes(),
        )


def _make_science(plan: _Plan, sky: Sky, asteroids: Movers, item: _PlannedVisit, detector: int) -> np.ndarray:
    """Render and write one science image; returns its truth rows with visit and detector."""
    preset, seed, visit = plan.preset, plan.seed, item.visit
    projection = _science_projection(plan, visit, detector)
    conditions = draw_conditions(seed, visit, item.band, preset.exposure_time_s)
    rendered = render_science(
        sky,
        [asteroids, _trail(plan, item)] if item.has_trail else [asteroids],
        projection,
        draw_psf(seed, visit, detector, conditions.seeing_arcsec, (preset.size_pix, preset.size_pix)),
        conditions,
        item.midpoint_mjd_tai,
        noise=random_stream(seed, Purpose.SCIENCE_NOISE, visit, detector),
        cosmic_rays=random_stream(seed, Purpose.COSMIC_RAYS, visit, detector),
        bad_columns=random_stream(seed, Purpose.BAD_COLUMNS, detector),
    )
    header: dict[str, object] = {
        "INSTRUME": INSTRUMENT,
        "BAND": item.band,
        "EXPTIME": preset.exposure_time_s,
        "VISIT": visit,
        "DETECTOR": detector,
    }
    with_psf = item.seq_num % preset.psf_missing_every != 0
    write_exposure(plan.science_path(visit, detector), _exposure(rendered, projection, with_psf), header=header)
    return _with_visit(rendered.injections, visit, detector)


def _make_template(plan: _Plan, sky: Sky, band: str, detector: int) -> None:
    preset, seed = plan.preset, plan.seed
    key = (BANDS.index(band), detector)  # visit numbers are larger than any band index: streams never meet
    projection = _template_projection(plan, detector)
    size_pix = preset.size_pix + 2 * TEMPLATE_MARGIN_PIX
    rendered = render_template(
        sky,
        projection,
        draw_psf(seed, *key, SHARPEST_TEMPLATE_ARCSEC, (size_pix, size_pix)),
        nominal_conditions(band, preset.exposure_time_s, SHARPEST_TEMPLATE_ARCSEC, n_stacked=preset.template_depth),
        noise=random_stream(seed, Purpose.TEMPLATE_NOISE, *key),
    )
    header: dict[str, object] = {"INSTRUME": INSTRUMENT, "BAND": band, "DETECTOR": detector}
    write_exposure(plan.template_path(band, detector), _exposure(rendered, projection, True), header=header)


def _exposure(rendered: RenderedExposure, projection: TanProjection, with_psf: bool) -> Exposure:
    mask = np.zeros(rendered.image.shape, dtype=np.int32)
    for plane, pixels in (("BAD", rendered.bad), ("SAT", rendered.saturated), ("CR", rendered.cosmic_ray)):
        mask[pixels] |= np.int32(mask_bits(plane))
    return Exposure(rendered.image, rendered.variance, mask, _wcs(projection), rendered.psf if with_psf else None)


def _wcs(projection: TanProjection) -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.crval = [projection.ra_deg, projection.dec_deg]
    wcs.wcs.crpix = [projection.x_pix + 1.0, projection.y_pix + 1.0]
    wcs.wcs.cd = projection.cd_deg
    wcs.wcs.radesys = "ICRS"
    wcs.wcs.set()
    return wcs


# --- tables, manifest, folder ----------------------------------------------------------------------------------

_TRUTH_DTYPE = np.dtype([("visit", "i8"), ("detector", "i4"), *INJECTION_DTYPE.descr])


def _with_visit(injections: np.ndarray, visit: int, detector: int) -> np.ndarray:
    rows = np.zeros(injections.size, dtype=_TRUTH_DTYPE)
    rows["visit"], rows["detector"] = visit, detector
    for name in INJECTION_DTYPE.names or ():
        rows[name] = injections[name]
    return rows


@beam.typehints.with_output_types(str)
class _WriteTruthFn(beam.DoFn):
    """Writes the truth table, sorted by (visit, detector, kind, object), and yields its path."""

    def __init__(self, out: str) -> None:
        self._out = out

    def process(self, element: tuple[None, Iterable[bytes]]) -> Iterable[str]:
        rows = np.frombuffer(b"".join(element[1]), dtype=_TRUTH_DTYPE)
        rows = rows[np.lexsort((rows["object"], rows["kind"], rows["detector"], rows["visit"]))]
        columns = [pa.array(rows[field.name].tolist(), type=field.type) for field in TRUTH_SCHEMA]
        path = Path(self._out) / "truth" / "injected.parquet"
        _write_table(path, pa.Table.from_arrays(columns, schema=TRUTH_SCHEMA))
        yield str(path)


def _ephemerides(plan: _Plan) -> pa.Table:
    """Positions of every night's asteroids each 10 minutes from 1 h before its first to 1 h after its last visit."""
    records: list[dict[str, object]] = []
    spans = _night_spans(plan)
    for day_obs, asteroids in _asteroids_of_nights(plan).items():
        first, last = spans[day_obs][0] - EPHEMERIS_MARGIN_D, spans[day_obs][1] + EPHEMERIS_MARGIN_D
        steps = int(np.ceil((last - first) / EPHEMERIS_STEP_D))
        for mjd_tai in first + EPHEMERIS_STEP_D * np.arange(steps + 1):
            ra, dec = asteroids.sky_position(mjd_tai)
            ra_rate, dec_rate = asteroids.sky_rates(mjd_tai)
            for index, name in enumerate(asteroids.names):
                records.append(
                    {
                        "ssObjectId": int(asteroids.identifiers[index]),
                        "designation": name,
                        "mjd_tai": float(mjd_tai),
                        "ra": float(ra[index]),
                        "dec": float(dec[index]),
                        "ra_rate_arcsec_per_h": float(ra_rate[index]),
                        "dec_rate_arcsec_per_h": float(dec_rate[index]),
                        "magnitude": float(asteroids.magnitude_r[index]),
                    }
                )
    table = pa.Table.from_pylist(records, schema=EPHEMERIS_SCHEMA)
    return table.sort_by([("ssObjectId", "ascending"), ("mjd_tai", "ascending")])


def _visit(plan: _Plan, item: _PlannedVisit) -> Visit:
    ra, dec, rotation = _pointing(plan, item.visit)
    exposure_time_s = plan.preset.exposure_time_s
    detectors = tuple(
        DetectorImages(
            detector, str(plan.science_path(item.visit, detector)), str(plan.template_path(item.band, detector))
        )
        for detector in range(plan.preset.n_detectors)
    )
    return Visit(
        visit=item.visit,
        day_obs=item.day_obs,
        seq_num=item.seq_num,
        instrument=INSTRUMENT,
        band=item.band,
        midpoint_mjd_tai=item.midpoint_mjd_tai,
        exposure_time_s=exposure_time_s,
        readout_end_mjd_tai=item.midpoint_mjd_tai + (0.5 * exposure_time_s + READOUT_S) / 86400.0,
        boresight_ra_deg=ra,
        boresight_dec_deg=dec,
        rotation_deg=rotation,
        observation_reason="science",
        target_name=None,
        detectors=detectors,
    )


def _claim_folder(plan: _Plan) -> bool:
    """Mark the folder as this simulation's; True when it is already complete."""
    record = json.dumps({"preset": asdict(plan.preset), "seed": plan.seed, "nights": plan.nights}, indent=1) + "\n"
    marker = plan.out / "simulation.json"
    if plan.out.exists() and not plan.out.is_dir():
        raise NightSimulationError(f"{plan.out} is not a folder")
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != record:
            raise NightSimulationError(f"{plan.out} holds another simulation (see {marker}): choose an empty folder")
    elif plan.out.is_dir() and any(plan.out.iterdir()):
        raise NightSimulationError(f"{plan.out} is not empty and no simulation: choose an empty folder")
    plan.out.mkdir(parents=True, exist_ok=True)
    partial = plan.out / ".simulation.json"
    partial.write_text(record, encoding="utf-8")
    partial.rename(marker)
    return (plan.out / "visits.jsonl").is_file()


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("." + path.name)
    pq.write_table(table, partial)
    partial.rename(path)


def _summary(plan: _Plan) -> SimulatedNight:
    truth = pq.read_table(plan.out / "truth" / "injected.parquet", columns=["snr", "good_pixels"])
    detectable = (truth["snr"].to_numpy() >= DETECTABLE_SNR) & truth["good_pixels"].to_numpy()
    ephemerides = pq.read_table(plan.out / "ephemerides.parquet", columns=["ssObjectId"])
    visits = read_manifest(plan.out).visits
    images = [images for visit in visits for images in visit.detectors]
    return SimulatedNight(
        plan.out,
        len(visits),
        len(images),
        len({item.template for item in images}),
        truth.num_rows,
        int(detectable.sum()),
        len(set(ephemerides["ssObjectId"].to_pylist())),
    )


@contextmanager
def _watched(plan: _Plan, progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Report images as they appear in the folder: works with any runner, whose DoFns can't call back."""
    if progress is None:
        yield
        return
    total, finished = len(plan.exposures()), threading.Event()

    def watch() -> None:
        reported = -1
        while True:
            last_look = finished.wait(0.1)
            written = _images_written(plan.out)
            if written != reported:
                progress(written, total)
                reported = written
            if last_look:
                return

    watcher = threading.Thread(target=watch, name="night-simulation-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _images_written(out: Path) -> int:
    return sum(1 for folder in ("science", "templates") for _ in (out / folder).glob("[!.]*.fits"))

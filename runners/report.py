"""The report page of a run: one HTML file that works from a folder, without a network or a server."""

from __future__ import annotations

import base64
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import yaml
from astropy.io import fits
from bokeh.embed import components
from bokeh.models import ColumnDataSource, CustomJS, CustomJSTickFormatter, HoverTool, NoOverlap, Range1d
from bokeh.plotting import figure
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from runners.summary import (
    ClassRecovery,
    RunSummary,
    failure_reason,
    read_table,
    recovered,
    summarise,
    text,
)
from schemas.manifests import Manifest, ManifestError, read_manifest
from transforms.latency import FIGURES

DOUBTFUL_RELIABILITY = 0.5
N_CUTOUTS = 20
N_LIGHT_CURVES = 12
MAX_MAP_MARKS = 20_000
MAX_FAILURES_LISTED = 500
MAX_VISITS_LISTED = 300
MAX_PERIODS_LISTED = 60
MAX_TARGETS_NAMED = 6
MAX_DETAILED_MARKS = 150
_CUTOUTS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")
_BANDS = "ugrizy"
# Dark enough on white to be read, and told apart by shape as well as colour.
BAND_COLOURS = {"u": "#6a3d9a", "g": "#1b7f5c", "r": "#c2410c", "i": "#8a6400", "z": "#be185d", "y": "#374151"}
# Marks by band, drawn around the current point.
GLYPHS = {
    "g": "m0 -4.8l4.4 7.6h-8.8z",
    "r": "m-3.4 -3.4h6.8v6.8h-6.8z",
    "i": "m0 -5l4.4 5l-4.4 5l-4.4 -5z",
    "z": "m0 4.8l4.4 -7.6h-8.8z",
    "y": "m-1.5 -4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
}
ROUND_GLYPH = "m-3.9 0a3.9 3.9 0 1 0 7.8 0a3.9 3.9 0 1 0 -7.8 0z"
FLUX_UNITS = ((1e9, "Jy"), (1e6, "mJy"), (1e3, "\N{MICRO SIGN}Jy"), (1.0, "nJy"))
# A night ends where nothing was seen for so long; a zoomed panel shows it where it fills a tenth or less of the axis.
_NIGHT_GAP_D = 0.25
_MIN_ZOOMED_POINTS = 5
_MAX_ZOOMED_PART = 0.1
_MJD_EPOCH = datetime(1858, 11, 17)
_SOURCE_COLUMNS = [
    "diaSourceId",
    "visit",
    "detector",
    "diaObjectId",
    "ssObjectId",
    "midpointMjdTai",
    "ra",
    "dec",
    "psfFlux",
    "psfFluxErr",
    "snr",
    "band",
    "reliability",
]
_FORCED_COLUMNS = ["diaObjectId", "visit", "midpointMjdTai", "psfFlux", "psfFluxErr", "band"]


# --- what the page shows --------------------------------------------------------------------


@dataclass(frozen=True)
class Stamp:
    """A picture as a data URI, its size, and a scale bar that fits it: percent of the width and what they measure."""

    uri: str
    nx: int
    ny: int
    bar_percent: float
    bar_label: str


@dataclass(frozen=True)
class CutoutCard:
    """One new object at its brightest: three stamps (None where the packet has none)."""

    dia_object_id: str
    dia_source_id: str
    visit: str
    band: str
    snr: float
    reliability: float | None
    science: Stamp | None
    template: Stamp | None
    difference: Stamp | None

    @property
    def stamps(self) -> dict[str, Stamp | None]:
        return {"science": self.science, "template": self.template, "difference": self.difference}


@dataclass(frozen=True)
class Point:
    """One measured flux of an object, nJy."""

    mjd_tai: float
    flux_njy: float
    error_njy: float
    band: str
    forced: bool


@dataclass(frozen=True)
class Mark:
    """One point of a light curve in SVG pixels; `low` and `high` are the ends of its error bar."""

    x: float
    y: float
    low: float
    high: float
    band: str
    forced: bool
    label: str


@dataclass(frozen=True)
class Tick:
    """An axis tick in SVG pixels."""

    at: float
    label: str


@dataclass(frozen=True)
class TimeAxis:
    """Times `start` to `end` (MJD TAI) on an axis that counts `per_day` units a day from `zero`."""

    start: float
    end: float
    zero: float
    per_day: float
    label: str

    def value(self, mjd_tai: float) -> float:
        return (mjd_tai - self.zero) * self.per_day


@dataclass(frozen=True)
class Trace:
    """Many marks of one kind as one SVG path of dots and one of error bars."""

    band: str
    forced: bool
    dots: str
    bars: str


@dataclass(frozen=True)
class Panel:
    """A light curve within some time, laid out for SVG; many marks come as `traces`, few as `marks`."""

    marks: tuple[Mark, ...]
    traces: tuple[Trace, ...]
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    zero: float


@dataclass(frozen=True)
class LightCurve:
    """One object's difference flux against time: all of it, and the fullest night if it would be a column there."""

    dia_object_id: str
    n_detections: int
    n_forced: int
    is_new: bool
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class PlotArea:
    """The frame of a light curve, SVG pixels."""

    width: int = 350
    height: int = 210
    left: int = 56
    right: int = 328
    top: int = 24
    bottom: int = 172


@dataclass(frozen=True)
class SkyMap:
    """The map's script and element, and how many of its marks were left out."""

    script: Markup
    element: Markup
    library: Markup
    n_shown: int
    n_marks: int


def write_report(out: Path, night: Path | None) -> Path:
    """Write `OUT/report/index.html` and return its path.

    Parameters
    ----------
    out : Path
        Output folder. What is missing in it is missing on the page, which says so.
    night : Path or None
        Night folder, for the instrument's name and, in simulated nights, the truth.

    Raises
    ------
    UnreadableOutputError
        A file of the output folder is broken.
    """
    summary = summarise(out)
    sources = Sources.read(out)
    manifest = _manifest(night)
    cards = cutout_cards(out, sources)
    curves = light_curves(out, sources)
    page = _environment().get_template("report.html")
    html = page.render(
        title=_title(summary, manifest),
        entry=entry_of(summary, night),
        source=_source(out),
        given=input_facts(night, manifest),
        summary=summary,
        latency_stages=FIGURES,
        spans=_spans(summary),
        visits=[_visit_row(record, out) for record in visits_listed(summary)],
        periods=periods(summary) if len(summary.visits) > MAX_VISITS_LISTED else None,
        unassociated=_unassociated(summary, sources),
        why_no_alerts=_why_no_alerts(summary) if summary.alerts == 0 else [],
        notes=_notes(summary),
        sky_map=sky_map(sources),
        cutouts=cards,
        has_stamps=any(stamp for card in cards for stamp in card.stamps.values()),
        light_curves=curves,
        has_forced=any(curve.n_forced for curve in curves),
        has_traces=any(panel.traces for curve in curves for panel in curve.panels),
        max_detailed_marks=MAX_DETAILED_MARKS,
        area=PlotArea(),
        glyphs=GLYPHS,
        round_glyph=ROUND_GLYPH,
        band_colours={band: BAND_COLOURS[band] for band in sources.bands_present()},
        recovery=_recovery(night, out),
        failures=summary.failures[:MAX_FAILURES_LISTED],
        failure_groups=summary.grouped_failures(),
        places=[place for place in ("archive", "brokers", "filters", "ledger", "failures") if (out / place).is_dir()],
    )
    path = out / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(".index.html")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


@dataclass(frozen=True)
class Sources:
    """Selected diaSources of a run as arrays (n_sources,); ids are 0 where there is none."""

    dia_source_id: np.ndarray
    visit: np.ndarray
    dia_object_id: np.ndarray
    ss_object_id: np.ndarray
    midpoint_mjd_tai: np.ndarray
    ra_deg: np.ndarray
    dec_deg: np.ndarray
    flux_njy: np.ndarray
    flux_err_njy: np.ndarray
    snr: np.ndarray
    reliability: np.ndarray
    band: np.ndarray
    path_of_visit: Mapping[int, Path]
    designation: Mapping[int, str]

    @classmethod
    def read(cls, out: Path) -> Sources:
        """Read `OUT/archive/dia_sources`, in order of diaSourceId; empty when there is none."""
        table = read_table(out, "dia_sources", _SOURCE_COLUMNS).sort_by("diaSourceId")
        names = read_table(out, "ss_sources", ["diaSourceId", "designation"]).to_pylist()
        return cls(
            dia_source_id=_integers(table, "diaSourceId"),
            visit=_integers(table, "visit"),
            dia_object_id=_integers(table, "diaObjectId"),
            ss_object_id=_integers(table, "ssObjectId"),
            midpoint_mjd_tai=_floats(table, "midpointMjdTai"),
            ra_deg=_floats(table, "ra"),
            dec_deg=_floats(table, "dec"),
            flux_njy=_floats(table, "psfFlux"),
            flux_err_njy=_floats(table, "psfFluxErr"),
            snr=np.abs(np.nan_to_num(_floats(table, "snr"))),
            reliability=_floats(table, "reliability"),
            band=np.array([band or "" for band in table["band"].to_pylist()], dtype=object),
            path_of_visit={
                int(path.stem): path
                for path in sorted((out / "archive" / "alerts").glob("day_obs=*/*.avro"))
                if path.stem.isdigit()
            },
            designation={row["diaSourceId"]: row["designation"] for row in names if row["designation"]},
        )

    def rows_by_object(self) -> dict[int, np.ndarray]:
        """Rows of each diaObject in order of time; objects in order of id."""
        rows = np.flatnonzero(self.dia_object_id)
        rows = rows[np.lexsort((self.dia_source_id[rows], self.midpoint_mjd_tai[rows], self.dia_object_id[rows]))]
        ids, starts = np.unique(self.dia_object_id[rows], return_index=True)
        parts = np.split(rows, starts[1:]) if len(rows) else []
        return {int(key): part for key, part in zip(ids, parts, strict=True)}

    def new_objects(self) -> set[int]:
        """Objects made in this run: an object bears the id of its first source."""
        return set(map(int, np.intersect1d(self.dia_object_id, self.dia_source_id)))

    def bands_present(self) -> list[str]:
        present = set(self.band)
        return [band for band in _BANDS if band in present]


# --- cutouts --------------------------------------------------------------------------------


def cutout_cards(out: Path, sources: Sources) -> list[CutoutCard]:
    """Stamps of the new objects with the highest S/N, each at its best source; doubtful ones behind all others."""
    new = sources.new_objects()
    best = [int(rows[np.argmax(sources.snr[rows])]) for key, rows in sources.rows_by_object().items() if key in new]
    doubtful = sources.reliability < DOUBTFUL_RELIABILITY
    best.sort(key=lambda row: (doubtful[row], -sources.snr[row], sources.dia_source_id[row]))
    best = best[:N_CUTOUTS]
    stamps: dict[int, dict[str, bytes | None]] = {}
    for visit in sorted({int(sources.visit[row]) for row in best}):
        wanted = {int(sources.dia_source_id[row]) for row in best if sources.visit[row] == visit}
        if visit in sources.path_of_visit:
            stamps.update(_read_cutouts(sources.path_of_visit[visit], wanted))
    return [_card(sources, row, stamps.get(int(sources.dia_source_id[row]), {})) for row in best]


def _card(sources: Sources, row: int, stamps: Mapping[str, bytes | None]) -> CutoutCard:
    science, template, difference = (_fits_image(stamps.get(name)) for name in _CUTOUTS)
    limits = _common_limits([found.pixels for found in (science, template) if found is not None])
    reliability = float(sources.reliability[row])
    return CutoutCard(
        dia_object_id=str(sources.dia_object_id[row]),
        dia_source_id=str(sources.dia_source_id[row]),
        visit=str(sources.visit[row]),
        band=sources.band[row],
        snr=float(sources.snr[row]),
        reliability=reliability if math.isfinite(reliability) else None,
        science=None if science is None else _stamp(science, grey_stamp(science.pixels, *limits)),
        template=None if template is None else _stamp(template, grey_stamp(template.pixels, *limits)),
        difference=None if difference is None else _stamp(difference, signed_stamp(difference.pixels)),
    )


def _stamp(image: _Image, rgb: np.ndarray) -> Stamp:
    ny, nx = image.pixels.shape
    per_pixel = image.arcsec_per_pixel or 1.0
    # The longest round length that takes a third of the picture at most.
    room = nx * per_pixel / 3.0
    power = 10.0 ** math.floor(math.log10(room))
    length = max(factor * power for factor in (1.0, 2.0, 5.0) if factor * power <= room)
    unit = " pixels" if image.arcsec_per_pixel is None else "\N{DOUBLE PRIME}"
    return Stamp(_png_uri(rgb), nx, ny, round(100.0 * length / per_pixel / nx, 2), f"{length:g}{unit}")


def _read_cutouts(path: Path, wanted: set[int]) -> dict[int, dict[str, bytes | None]]:
    """Cutouts of some packets of a container; the rest of each packet is skipped over, not decoded."""
    found: dict[int, dict[str, bytes | None]] = {}
    with path.open("rb") as stream:
        schema: Any = fastavro.reader(stream).writer_schema
        fields = [field for field in schema["fields"] if field["name"] in ("diaSourceId", *_CUTOUTS)]
        if "diaSourceId" not in {field["name"] for field in fields}:
            return {}  # another survey's packets: their stamps have other names and forms
        stream.seek(0)
        for packet in fastavro.reader(stream, reader_schema={**schema, "fields": fields}):
            if not isinstance(packet, dict) or packet["diaSourceId"] not in wanted:
                continue
            found[packet["diaSourceId"]] = {name: packet.get(name) for name in _CUTOUTS}
            if len(found) == len(wanted):
                break
    return found


@dataclass(frozen=True)
class _Image:
    """Pixels of a stamp, (ny, nx) float64, and their size if the header tells it."""

    pixels: np.ndarray
    arcsec_per_pixel: float | None


def _fits_image(stamp: bytes | None) -> _Image | None:
    """The first two-dimensional image of FITS bytes; None if there is none to show."""
    if not stamp:
        return None
    with warnings.catch_warnings():
        # Only pixels are wanted here: what astropy thinks of the header is no news to a reader of the page.
        warnings.simplefilter("ignore")
        try:
            with fits.open(io.BytesIO(stamp), memmap=False) as hdus:
                for hdu in hdus:
                    if hdu.data is not None and hdu.data.ndim == 2 and hdu.data.size:
                        return _Image(np.asarray(hdu.data, dtype=np.float64), _pixel_arcsec(hdu.header))
        except (OSError, ValueError, TypeError):
            return None
    return None


def _pixel_arcsec(header: Any) -> float | None:
    """Side of a pixel from the CD matrix, degrees a pixel; None where there is none."""
    try:
        cd = [[float(header[f"CD{row}_{column}"]) for column in (1, 2)] for row in (1, 2)]
    except (KeyError, TypeError, ValueError):
        return None
    side = 3600.0 * math.sqrt(abs(cd[0][0] * cd[1][1] - cd[0][1] * cd[1][0]))
    return side if math.isfinite(side) and side > 0 else None


def _noise(image: np.ndarray) -> tuple[float, float]:
    """Median and robust sigma of the finite pixels; (0, 1) where there are none."""
    pixels = image[np.isfinite(image)]
    if pixels.size == 0:
        return 0.0, 1.0
    centre = float(np.median(pixels))
    sigma = 1.4826 * float(np.median(np.abs(pixels - centre)))
    return centre, sigma or float(np.std(pixels)) or 1.0


def _common_limits(images: Sequence[np.ndarray]) -> tuple[float, float]:
    """Noise and highest level above the sky that science and template are both drawn with."""
    if not images:
        return 1.0, 1.0
    noises = [_noise(image) for image in images]
    sigma = noises[0][1]
    tops = [
        float(np.nanpercentile(image, 99.7)) - centre
        for image, (centre, _) in zip(images, noises, strict=True)
        if np.isfinite(image).any()
    ]
    return sigma, max([*tops, 8.0 * sigma])


def grey_stamp(image: np.ndarray, sigma: float, top: float) -> np.ndarray:
    """An image as RGB bytes: sky light, sources dark, asinh stretch, missing pixels lilac.

    Parameters
    ----------
    image : (ny, nx) float64
        NaN where there is no data. Its median is taken as the sky.
    sigma, top : float
        Level where the stretch turns from linear to logarithmic is 2 `sigma`; `top` is black.

    Returns
    -------
    (ny, nx, 3) uint8
    """
    centre, _ = _noise(image)
    low = np.arcsinh(-0.5)  # the sky minus 1 sigma is white
    level = (np.arcsinh((image - centre) / (2.0 * sigma)) - low) / (np.arcsinh(top / (2.0 * sigma)) - low)
    grey = 255.0 - 240.0 * np.clip(np.nan_to_num(level), 0.0, 1.0)
    return _mark_missing(np.repeat(grey[..., None], 3, axis=2), image)


def signed_stamp(image: np.ndarray) -> np.ndarray:
    """A difference image as RGB bytes: zero white, brighter than the template red, fainter blue.

    The stretch is asinh, linear below 2 sigma, the same on both sides. (ny, nx) to (ny, nx, 3) uint8.
    """
    _, sigma = _noise(image)
    finite = np.abs(image[np.isfinite(image)])
    top = max(float(np.percentile(finite, 99.7)) if finite.size else 0.0, 5.0 * sigma)
    level = np.clip(np.nan_to_num(np.arcsinh(image / (2.0 * sigma)) / np.arcsinh(top / (2.0 * sigma))), -1.0, 1.0)
    ends = np.where((level > 0)[..., None], [160.0, 20.0, 20.0], [15.0, 60.0, 150.0])
    return _mark_missing(255.0 + np.abs(level)[..., None] * (ends - 255.0), image)


def _mark_missing(rgb: np.ndarray, image: np.ndarray) -> np.ndarray:
    rgb = np.where(np.isfinite(image)[..., None], rgb, [214.0, 206.0, 230.0])
    return np.rint(rgb).astype(np.uint8)


def _png_uri(rgb: np.ndarray) -> str:
    stream = io.BytesIO()
    # FITS rows go up, PNG rows go down.
    Image.fromarray(np.ascontiguousarray(rgb[::-1])).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


# --- light curves ---------------------------------------------------------------------------


def light_curves(out: Path, sources: Sources) -> list[LightCurve]:
    """The objects with most detections (ties: higher S/N, then id), laid out for SVG."""
    rows_of = sources.rows_by_object()
    order = sorted(rows_of, key=lambda key: (-len(rows_of[key]), -float(sources.snr[rows_of[key]].max()), key))
    chosen = order[:N_LIGHT_CURVES]
    new = sources.new_objects()
    wanted = ("diaObjectId", pa.array(chosen, pa.int64()))
    forced_of: dict[int, list[dict[str, Any]]] = {key: [] for key in chosen}
    for row in read_table(out, "dia_forced_sources", _FORCED_COLUMNS, wanted).to_pylist():
        forced_of[row["diaObjectId"]].append(row)
    return [_light_curve(sources, key, rows_of[key], forced_of[key], key in new) for key in chosen]


def _light_curve(
    sources: Sources, key: int, rows: np.ndarray, forced: list[dict[str, Any]], is_new: bool
) -> LightCurve:
    detected = {int(sources.visit[row]) for row in rows}
    values = [
        (
            float(sources.midpoint_mjd_tai[row]),
            float(sources.flux_njy[row]),
            float(sources.flux_err_njy[row]),
            str(sources.band[row]),
            False,
        )
        for row in rows
    ]
    values += [
        (row["midpointMjdTai"], row["psfFlux"], row["psfFluxErr"], row["band"] or "", True)
        for row in forced
        if row["visit"] not in detected and row["psfFlux"] is not None and row["psfFluxErr"] is not None
    ]
    points = [Point(*value) for value in sorted(values) if all(map(math.isfinite, value[:3]))]
    return LightCurve(
        dia_object_id=str(key),
        n_detections=len(rows),
        n_forced=sum(point.forced for point in points),
        is_new=is_new,
        panels=tuple(_panel(points, axis) for axis in _time_axes(sources, [point.mjd_tai for point in points])),
    )


def _time_axes(sources: Sources, times: Sequence[float]) -> list[TimeAxis]:
    """The axis for an object's points, and one for the night with most of them where the first would hide it.

    `times` are sorted. A run of up to two days has one axis for all its objects.
    """
    first, last = float(sources.midpoint_mjd_tai.min()), float(sources.midpoint_mjd_tai.max())
    if last - first < 2.0:
        return [_short_axis(first, last, "the first midpoint")]
    if not times:
        return [TimeAxis(first, last, 0.0, 1.0, "MJD (TAI)")]
    nights = np.split(np.array(times), 1 + np.flatnonzero(np.diff(times) > _NIGHT_GAP_D))
    fullest = max(nights, key=len)
    start, end = float(fullest[0]), float(fullest[-1])
    in_night = _short_axis(start, end, f"{tai_text(start)[:16]} TAI")
    if len(nights) == 1:
        return [in_night]
    axes = [TimeAxis(times[0], times[-1], 0.0, 1.0, "MJD (TAI)")]
    if len(fullest) >= _MIN_ZOOMED_POINTS and end - start < _MAX_ZOOMED_PART * (times[-1] - times[0]):
        axes.append(in_night)
    return axes


def _short_axis(start: float, end: float, since: str) -> TimeAxis:
    per_day, unit = (1440.0, "minutes") if end - start < 2.0 / 24.0 else (24.0, "hours")
    return TimeAxis(start, end, start, per_day, f"{unit} since {since}")


def _panel(points: Sequence[Point], axis: TimeAxis) -> Panel:
    area = PlotArea()
    inside = [point for point in points if axis.start <= point.mjd_tai <= axis.end]
    x_low, x_high = _padded(axis.value(axis.start), axis.value(axis.end))
    # Both panels of an object have the same fluxes at the same height.
    ends = [point.flux_njy + sign * point.error_njy for point in points for sign in (-1, 1)]
    y_low, y_high = _padded(min([0.0, *ends]), max([0.0, *ends]))
    top = max(-y_low, y_high)
    scale, unit = next((entry for entry in FLUX_UNITS if top >= entry[0]), FLUX_UNITS[-1])

    def x_pix(value: float) -> float:
        return round(area.left + (value - x_low) / (x_high - x_low) * (area.right - area.left), 1)

    def y_pix(value: float) -> float:
        return round(area.bottom - (value - y_low) / (y_high - y_low) * (area.bottom - area.top), 1)

    marks = tuple(
        Mark(
            x=x_pix(axis.value(point.mjd_tai)),
            y=y_pix(point.flux_njy),
            low=y_pix(point.flux_njy - point.error_njy),
            high=y_pix(point.flux_njy + point.error_njy),
            band=point.band,
            forced=point.forced,
            label=f"{point.band} {_flux_text(point, scale)} {unit}, {tai_text(point.mjd_tai)} TAI"
            + (", forced" if point.forced else ""),
        )
        for point in inside
    )
    many = len(marks) > MAX_DETAILED_MARKS
    return Panel(
        marks=() if many else marks,
        traces=_traces(marks) if many else (),
        x_label=axis.label,
        y_label=unit,
        x_ticks=tuple(Tick(x_pix(at), label) for at, label in _nice_ticks(x_low, x_high, thousands="")),
        y_ticks=tuple(Tick(y_pix(at * scale), label) for at, label in _nice_ticks(y_low / scale, y_high / scale)),
        zero=y_pix(0.0),
    )


def _flux_text(point: Point, scale: float) -> str:
    """Flux and error in units of `scale`, to the third digit of the error."""
    error = point.error_njy / scale
    decimals = max(0, 2 - math.floor(math.log10(error))) if error > 0 else 2
    return f"{point.flux_njy / scale:,.{decimals}f} ± {error:,.{decimals}f}"


def _traces(marks: Sequence[Mark]) -> tuple[Trace, ...]:
    """Marks by band and kind, each place on the picture drawn once."""
    groups: dict[tuple[str, bool], list[Mark]] = {}
    for mark in marks:
        groups.setdefault((mark.band, mark.forced), []).append(mark)
    return tuple(
        Trace(
            band,
            forced,
            dots="".join(dict.fromkeys(f"M{mark.x:g} {mark.y:g}h0" for mark in members)),
            bars="".join(dict.fromkeys(f"M{mark.x:g} {mark.low:g}V{mark.high:g}" for mark in members)),
        )
        for (band, forced), members in sorted(groups.items())
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    """An interval with 6 percent of room on both sides; never empty."""
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _nice_ticks(low: float, high: float, n_about: int = 5, thousands: str = ",") -> Iterator[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], with labels."""
    raw = (high - low) / n_about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    for multiple in range(math.ceil(low / step), math.floor(high / step) + 1):
        label = f"{multiple * step:{thousands}.{decimals}f}"
        # Longer ones would not fit beside the frame.
        label = label if len(label) <= 8 else f"{multiple * step:.3g}"
        yield multiple * step, label.replace("-", "\N{MINUS SIGN}")


# --- sky map --------------------------------------------------------------------------------


def sky_map(sources: Sources) -> SkyMap | None:
    """Objects and solar-system detections on the sky; None when there is nothing to show."""
    groups = _map_marks(sources)
    n_marks = sum(len(marks["ra"]) for marks in groups.values())
    if n_marks == 0:
        return None
    centre = _centre_ra(np.concatenate([marks["ra"] for marks in groups.values()]))
    n_shown = 0
    data = {}
    for name, marks in groups.items():
        # The brightest stay when there are too many for a browser, each group by its share.
        keep = math.ceil(len(marks["ra"]) * min(1.0, MAX_MAP_MARKS / n_marks))
        order = np.argsort(-marks["snr"], kind="stable")[:keep]
        n_shown += len(order)
        data[name] = {key: values[order] for key, values in marks.items()}
        data[name]["x"] = centre + (data[name]["ra"] - centre + 180.0) % 360.0 - 180.0
    plot = _map_figure(data)
    for name, marker, colour, size in (
        ("new object", "circle", "#b45309", 7),
        ("object known before", "square", "#1d4ed8", 7),
        ("solar-system object", "triangle", "#047857", 9),
    ):
        if len(data[name]["x"]):
            plot.scatter(
                "x",
                "dec",
                source=ColumnDataSource(_hover_columns(data[name])),
                marker=marker,
                size=size,
                fill_color=colour,
                fill_alpha=0.35,
                line_color=colour,
                line_width=1.2,
                legend_label=f"{name} ({len(data[name]['x']):,})",
            )
    plot.add_layout(plot.legend[0], "above")
    plot.legend[0].update(
        orientation="horizontal",
        location="left",
        label_text_font_size="13px",
        spacing=18,
        click_policy="hide",
        border_line_color=None,
        padding=4,
    )
    script, element = components(plot)
    library = Resources(mode="inline", components=["bokeh"]).render_js()
    return SkyMap(Markup(script), Markup(element), Markup(library), n_shown, n_marks)


def _map_marks(sources: Sources) -> dict[str, dict[str, np.ndarray]]:
    """Columns of the three kinds of marks: an object once, a solar-system object at each detection."""
    new = sources.new_objects()
    objects = [
        (key, rows[int(np.argmax(sources.snr[rows]))], len(rows)) for key, rows in sources.rows_by_object().items()
    ]
    solar_system = [(int(sources.ss_object_id[row]), row, 1) for row in np.flatnonzero(sources.ss_object_id)]
    chosen = {
        "new object": [entry for entry in objects if entry[0] in new],
        "object known before": [entry for entry in objects if entry[0] not in new],
        "solar-system object": solar_system,
    }
    return {name: _mark_columns(sources, entries) for name, entries in chosen.items()}


def _mark_columns(sources: Sources, entries: Sequence[tuple[int, Any, int]]) -> dict[str, np.ndarray]:
    rows = np.array([row for _, row, _ in entries], dtype=np.int64)
    return {
        "id": np.array([str(key) for key, _, _ in entries], dtype=object),
        "n": np.array([n for _, _, n in entries], dtype=np.int64),
        "ra": sources.ra_deg[rows],
        "dec": sources.dec_deg[rows],
        "snr": sources.snr[rows],
        "band": sources.band[rows],
        "visit": np.array([str(visit) for visit in sources.visit[rows]], dtype=object),
        "name": np.array([sources.designation.get(int(key), "") for key in sources.dia_source_id[rows]], dtype=object),
    }


def _hover_columns(marks: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    return {
        "x": marks["x"].tolist(),
        "dec": marks["dec"].tolist(),
        "id": [f"{key} {name}".strip() for key, name in zip(marks["id"], marks["name"], strict=True)],
        "place": [f"{ra:.5f}, {dec:+.5f}" for ra, dec in zip(marks["ra"], marks["dec"], strict=True)],
        "n": marks["n"].tolist(),
        "best": [
            f"S/N {snr:.1f} in {band or 'no band'}, visit {visit}"
            for snr, band, visit in zip(marks["snr"], marks["band"], marks["visit"], strict=True)
        ],
    }


# Shows all marks in a frame of any shape, a degree on the sky equally long both ways.
_EQUAL_DEGREES = """
const {x_range, y_range, inner_width, inner_height} = plot
if (inner_width > 0 && inner_height > 0) {
    const per_pixel = Math.max(half_width / inner_width, half_height / inner_height) * 2
    const dx = per_pixel * inner_width / 2 / squeeze
    const dy = per_pixel * inner_height / 2
    x_range.setv({start: x + dx, end: x - dx, reset_start: x + dx, reset_end: x - dx})
    y_range.setv({start: y - dy, end: y + dy, reset_start: y - dy, reset_end: y + dy})
}
"""


def _map_figure(data: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
    """An empty map, east to the left, one degree on the sky equally long both ways."""
    x = np.concatenate([marks["x"] for marks in data.values()])
    dec = np.concatenate([marks["dec"] for marks in data.values()])
    centre_x, centre_dec = (x.min() + x.max()) / 2, (dec.min() + dec.max()) / 2
    squeeze = max(math.cos(math.radians(centre_dec)), 0.05)
    half_width = max(1.05 * (x.max() - x.min()) / 2 * squeeze, 30.0 / 3600.0)
    half_height = max(1.05 * (dec.max() - dec.min()) / 2, 30.0 / 3600.0)
    plot = figure(
        sizing_mode="stretch_both",
        x_range=Range1d(centre_x + half_width / squeeze, centre_x - half_width / squeeze),
        y_range=Range1d(centre_dec - half_height, centre_dec + half_height),
        x_axis_label="right ascension (deg, ICRS)",
        y_axis_label="declination (deg, ICRS)",
        tools="pan,wheel_zoom,box_zoom,reset,save",
        active_scroll=None,
        output_backend="canvas",
    )
    plot.add_tools(
        HoverTool(tooltips=[("id", "@id"), ("ra, dec (deg)", "@place"), ("detections", "@n"), ("best", "@best")])
    )
    plot.xaxis.formatter = CustomJSTickFormatter(
        code="const ra = ((tick % 360) + 360) % 360; return String(Math.round(ra * 1e5) / 1e5)"
    )
    # Around the poles the frame goes on where the sky does not.
    plot.yaxis.formatter = CustomJSTickFormatter(
        code="return Math.abs(tick) > 90 ? '' : String(Math.round(tick * 1e5) / 1e5).replace('-', '\u2212')"
    )
    plot.xaxis.major_label_policy = NoOverlap(min_distance=12)
    plot.toolbar.logo = None
    home = {"x": centre_x, "y": centre_dec, "half_width": half_width, "half_height": half_height, "squeeze": squeeze}
    fit = CustomJS(args={"plot": plot, **home}, code=_EQUAL_DEGREES)
    for side in ("inner_width", "inner_height"):
        plot.js_on_change(side, fit)
    plot.grid.grid_line_color = "#e5e7eb"
    plot.outline_line_color = "#9ca3af"
    for axis in plot.axis:
        axis.update(
            axis_label_text_font_style="normal", axis_label_text_font_size="14px", major_label_text_font_size="13px"
        )
    return plot


def _centre_ra(ra_deg: np.ndarray) -> float:
    """Mean direction on the circle, degrees in [0, 360)."""
    angles = np.radians(ra_deg)
    return float(np.degrees(np.arctan2(np.sin(angles).sum(), np.cos(angles).sum())) % 360.0)


# --- texts and rows -------------------------------------------------------------------------


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("runners", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda n: "–" if n is None else f"{n:,}"
    environment.filters["fixed"] = lambda value, digits=1: "–" if value is None else f"{value:,.{digits}f}"
    environment.filters["seconds"] = lambda value: "–" if value is None else f"{value:,.{1 if value >= 1 else 2}f}"
    environment.filters["reason"] = failure_reason
    environment.filters["field"] = text
    return environment


def _title(summary: RunSummary, manifest: Manifest | None) -> dict[str, Any]:
    days = sorted({day for record in summary.visits if (day := record.get("day_obs"))})
    return {
        "nights": [_dashed(day) for day in days],
        "instrument": manifest.visits[0].instrument if manifest is not None and manifest.visits else None,
        "announced": len(manifest.visits) if manifest is not None else None,
    }


def _dashed(day_obs: int) -> str:
    """YYYYMMDD (or only YYYYMM, YYYY) with dashes."""
    digits = str(day_obs)
    return "-".join(part for part in (digits[:4], digits[4:6], digits[6:]) if part)


def entry_of(summary: RunSummary, night: Path | None) -> str | None:
    """Which command made the output: produce, associate or replay; None where the ledger does not tell."""
    if night is not None or "subtraction" in summary.seconds_per_stage:
        return "produce"
    if "replaying" in summary.seconds_per_stage:
        return "replay"
    return "associate" if "association" in summary.seconds_per_stage else None


def _source(out: Path) -> str | None:
    """The name of the input, as the output folder keeps it."""
    try:
        name = json.loads((out / ".nightstream.json").read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing depends on it but a line of the page
    return str(name)


@dataclass(frozen=True)
class InputFacts:
    """What the night says of itself: targets with visits, how it was made, and what in it is only nominal."""

    targets: tuple[tuple[str, int], ...]
    n_targets: int
    ingest_notes: tuple[str, ...]
    n_refused: int

    @property
    def nominal(self) -> tuple[str, ...]:
        names = [name for name, _ in self.targets]
        return tuple(line for line in (*names, *self.ingest_notes) if "nominal" in line.lower())


def input_facts(night: Path | None, manifest: Manifest | None) -> InputFacts:
    """Targets of the manifest, most visited first, and the notes of `ingest.json`."""
    counts: dict[str, int] = {}
    for visit in manifest.visits if manifest is not None else ():
        if visit.target_name:
            counts[visit.target_name] = counts.get(visit.target_name, 0) + 1
    targets = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ingest = _ingest_record(night)
    notes, refused = ingest.get("notes"), ingest.get("refused")
    return InputFacts(
        targets=tuple(targets[:MAX_TARGETS_NAMED]),
        n_targets=len(targets),
        ingest_notes=tuple(map(str, notes)) if isinstance(notes, list) else (),
        n_refused=len(refused) if isinstance(refused, list) else 0,
    )


def _ingest_record(night: Path | None) -> dict[str, Any]:
    """What an ingest wrote beside the night; {} where there is none, or none that can be read."""
    if night is None:
        return {}
    try:
        record = json.loads((night / "ingest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _manifest(night: Path | None) -> Manifest | None:
    if night is None:
        return None
    try:
        return read_manifest(night)
    except ManifestError:
        return None  # the run itself reports it; here only a name is missing


def _spans(summary: RunSummary) -> dict[str, Any]:
    """First and last midpoint, and visits per band."""
    midpoints = [record["midpoint_mjd_tai"] for record in summary.visits if record.get("midpoint_mjd_tai")]
    bands = [record.get("band") for record in summary.visits]
    return {
        "first": tai_text(min(midpoints)) if midpoints else None,
        "last": tai_text(max(midpoints)) if midpoints else None,
        "bands": [(band, bands.count(band)) for band in _BANDS if band in bands],
    }


def tai_text(mjd_tai: float) -> str:
    """An MJD as a date and time in TAI, to the second."""
    return (_MJD_EPOCH + timedelta(seconds=round(mjd_tai * 86400.0))).strftime("%Y-%m-%d %H:%M:%S")


def visits_listed(summary: RunSummary) -> list[dict[str, Any]]:
    """Ledger records for the table: all, or the most telling (failures, then most alerts), in order of midpoint."""

    def dull(index: int) -> tuple[int, int, int]:
        record = summary.visits[index]
        return -int(record.get("failures") or 0), -int(record.get("alerts") or 0), index

    chosen = sorted(range(len(summary.visits)), key=dull)[:MAX_VISITS_LISTED]
    return [summary.visits[index] for index in sorted(chosen)]


def periods(summary: RunSummary) -> tuple[str, list[dict[str, Any]]]:
    """Totals by night, month or year, whichever first makes a table of readable length, and its word."""
    days = {int(record.get("day_obs") or 0) for record in summary.visits}
    lengths = {"night": 1, "month": 100, "year": 10_000}
    fitting = (word for word, n in lengths.items() if len({day // n for day in days}) <= MAX_PERIODS_LISTED)
    word = next(fitting, "year")
    rows: dict[int, dict[str, Any]] = {}
    for record in summary.visits:
        row = rows.setdefault(
            int(record.get("day_obs") or 0) // lengths[word],
            {"visits": 0, "selected": 0, "new": 0, "alerts": 0, "failures": 0},
        )
        row["visits"] += 1
        row["selected"] += (record.get("dia_sources") or {}).get("selected") or 0
        row["new"] += (record.get("objects") or {}).get("new") or 0
        row["alerts"] += record.get("alerts") or 0
        row["failures"] += record.get("failures") or 0
    return word, [{"period": _dashed(key) if key else "–", **rows[key]} for key in sorted(rows)]


def _visit_row(record: dict[str, Any], out: Path) -> dict[str, Any]:
    detectors, sources, objects = (record.get(key) or {} for key in ("detectors", "dia_sources", "objects"))
    midpoint = record.get("midpoint_mjd_tai")
    container = Path("archive") / "alerts" / f"day_obs={record.get('day_obs')}" / f"{record.get('visit')}.avro"
    return {
        "visit": str(record.get("visit")),
        "container": f"../{container.as_posix()}" if (out / container).is_file() else None,
        "time": tai_text(midpoint) if midpoint else "–",
        "band": record.get("band") or "–",
        "processed": detectors.get("processed"),
        "expected": detectors.get("expected"),
        "detected": sources.get("detected"),
        "selected": sources.get("selected"),
        "ss_matches": record.get("ss_matches"),
        "new": objects.get("new"),
        "updated": objects.get("updated"),
        "alerts": record.get("alerts"),
        "failures": record.get("failures"),
        "latency_s": record.get("latency_s"),
    }


def _notes(summary: RunSummary) -> list[tuple[str, int]]:
    """What had to be estimated, with the number of visits that say so."""
    counts: dict[str, int] = {}
    for record in summary.visits:
        for note in record.get("notes") or []:
            counts[str(note)] = counts.get(str(note), 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _unassociated(summary: RunSummary, sources: Sources) -> list[str]:
    """Sentences on selected sources that led to no object and so to no alert; none where there are none."""
    if summary.sources_without_object == 0:
        return []
    limit = _shipped_min_reliability()
    alone = (sources.dia_object_id == 0) & (sources.ss_object_id == 0)
    low = int(np.sum(alone & (sources.reliability < limit)))
    sentences = [
        f"{summary.sources_without_object:,} of {summary.dia_sources_selected:,} selected diaSources have no object, "
        "and so no alert: they matched no known object and could not found one.",
        "A new object takes a source without a quality flag at its centre and with a reliability of at least "
        f"association.new_object_min_reliability ({limit:g} unless the run was configured otherwise).",
    ]
    if alone.any():
        sentences.append(f"{low:,} of them have a reliability below {limit:g}. All are in the table dia_sources.")
    return sentences


def _shipped_min_reliability() -> float:
    """The shipped setting, from its file: the code that takes it would bring all of Beam along."""
    shipped = yaml.safe_load((files("runners") / "config" / "alert_production.yaml").read_text(encoding="utf-8"))
    return float(shipped["association"]["new_object_min_reliability"])


def _why_no_alerts(summary: RunSummary) -> list[str]:
    """Sentences that lead from the input to the lack of alerts."""
    if not summary.visits:
        reasons = ["The ledger holds no visit: none was processed to its end."]
    else:
        reasons = [
            f"{summary.detectors_processed:,} of {summary.detectors_expected:,} detectors were processed, "
            f"{summary.detectors_failed:,} failed.",
            f"{summary.dia_sources_detected:,} diaSources were detected, {summary.dia_sources_selected:,} qualified"
            + (
                f", {summary.sources_without_object:,} of them found no object."
                if summary.sources_without_object
                else "."
            ),
        ]
        reasons += [f"{n:,} did not qualify: {reason}." for reason, n in summary.rejected.items()]
    reasons += [
        f"{n:,} failures in {stage or 'an unnamed stage'}: {reason}" for stage, reason, n in summary.grouped_failures()
    ]
    return reasons


def _recovery(night: Path | None, out: Path) -> list[ClassRecovery]:
    return [] if night is None else recovered(night, out)


def _integers(table: pa.Table, name: str) -> np.ndarray:
    """A column as int64, nulls as 0: ids beyond 2^53 must not pass through floats."""
    return table[name].cast(pa.int64()).fill_null(0).to_numpy().astype(np.int64)


def _floats(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, nulls as NaN."""
    return table[name].cast(pa.float64()).fill_null(math.nan).to_numpy().astype(np.float64)

"""The report page of a small made-up run: what is on it, and that it needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from PIL import Image

from runners.report import (
    MAX_DETAILED_MARKS,
    MAX_VISITS_LISTED,
    PlotArea,
    Sources,
    cutout_cards,
    grey_stamp,
    light_curves,
    periods,
    signed_stamp,
    sky_map,
    tai_text,
    visits_listed,
    write_report,
)
from runners.summary import summarise
from schemas.avro.schema_versions import packet_schema
from transforms.latency import FIGURES

DAY_OBS = 20261122
FIRST_MJD = 61367.1
# Ids of real size: beyond 2^53, where JavaScript numbers and floats lose the last digits.
ID_BASE = 6_700_000_000_000_000_001
SIDE = 30


def stamp(seed: int, flux: float, *, sky: float = 0.0, missing_rows: int = 0) -> bytes:
    """A cutout with a Gaussian source in the middle, as FITS bytes."""
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    image = np.random.default_rng(seed).normal(sky, 10.0, (SIDE, SIDE))
    image += flux / (2 * np.pi * 4.0) * np.exp(-(rows**2 + columns**2) / 8.0)
    image[:missing_rows] = np.nan
    stream = io.BytesIO()
    fits.HDUList(
        [fits.PrimaryHDU(image.astype(np.float32)), fits.ImageHDU(np.full_like(image, 100.0), name="UNCERT")]
    ).writeto(stream)
    return stream.getvalue()


def packet(row: dict[str, Any], with_cutouts: bool) -> dict[str, Any]:
    source = {
        **row,
        "x": 100.0,
        "y": 100.0,
        "psfNdata": 0,
        "trailNdata": 0,
        "dipoleNdata": 0,
        "timeProcessedMjdTai": row["midpointMjdTai"],
        "bboxSize": SIDE,
    }
    flux = row["psfFlux"]
    seed = row["diaSourceId"] % 2**32
    cutouts = {
        "cutoutScience": stamp(seed, flux + 2000.0, sky=500.0),
        "cutoutTemplate": stamp(seed + 1, 2000.0),
        "cutoutDifference": stamp(seed + 2, flux, missing_rows=4 if seed % 5 == 0 else 0),
    }
    return {"diaSourceId": row["diaSourceId"], "diaSource": source, **(cutouts if with_cutouts else {})}


@dataclass
class MadeUpRun:
    """An output folder with objects that are seen in every visit, and asteroids."""

    out: Path
    n_objects: int = 30
    n_visits: int = 6
    n_asteroids: int = 5
    ra_deg: float = 150.1
    with_cutouts: bool = True
    sources: list[dict[str, Any]] = field(default_factory=list)

    def write(self) -> MadeUpRun:
        rng = np.random.default_rng(3)
        flux = np.sort(rng.lognormal(8.5, 1.0, self.n_objects))[::-1]
        ra = (self.ra_deg + rng.uniform(-0.1, 0.1, self.n_objects)) % 360.0
        dec = 2.2 + rng.uniform(-0.1, 0.1, self.n_objects)
        forced: list[dict[str, Any]] = []
        for number in range(self.n_visits):
            visit = DAY_OBS * 100_000 + number + 1
            band = "gri"[number % 3]
            mjd = FIRST_MJD + 0.02 * number
            rows = []
            for key in range(self.n_objects):
                # A fainter object is seen in fewer visits; one in four fades below the template.
                value = flux[key] * np.sin(np.pi * (number + 1) / (self.n_visits + 1)) * (-1 if key % 4 == 3 else 1)
                error = 150.0
                if abs(value) > 5 * error:
                    rows.append(self._source(visit, number, key, band, mjd, ra[key], dec[key], value, error))
                forced.append(
                    {
                        "diaForcedSourceId": len(forced),
                        "diaObjectId": ID_BASE + key,
                        "visit": visit,
                        "midpointMjdTai": mjd,
                        "psfFlux": value,
                        "psfFluxErr": error,
                        "band": band,
                    }
                )
            for asteroid in range(self.n_asteroids):
                row = self._source(
                    visit,
                    number,
                    900 + asteroid,
                    band,
                    mjd,
                    self.ra_deg + 0.01 * number,
                    2.15 + 0.02 * asteroid,
                    9e3,
                    150,
                )
                rows.append({**row, "diaObjectId": None, "ssObjectId": ID_BASE + 5_000_000 + asteroid})
            self.sources += rows
            self._write_visit(visit, number, band, mjd, rows)
        self._write_tables(forced)
        return self

    def _source(
        self, visit: int, number: int, key: int, band: str, mjd: float, ra: float, dec: float, flux: float, error: float
    ) -> dict[str, Any]:
        known = [row for row in self.sources if row["diaObjectId"] == ID_BASE + key]
        return {
            # The first source of an object bears its id.
            "diaSourceId": ID_BASE + key + (1_000_000 * number if known or key >= 900 else 0),
            "visit": visit,
            "detector": 0,
            "diaObjectId": ID_BASE + key,
            "ssObjectId": None,
            "midpointMjdTai": mjd,
            "ra": float(ra),
            "dec": float(dec),
            "psfFlux": float(flux),
            "psfFluxErr": float(error),
            "snr": float(abs(flux) / error),
            "band": band,
            "reliability": 0.25 + 0.7 * (key % 10) / 10 if key != 3 else None,
        }

    def _write_visit(self, visit: int, number: int, band: str, mjd: float, rows: list[dict[str, Any]]) -> None:
        container = self.out / "archive" / "alerts" / f"day_obs={DAY_OBS}" / f"{visit}.avro"
        container.parent.mkdir(parents=True, exist_ok=True)
        rows = sorted(rows, key=lambda row: row["diaSourceId"])
        with container.open("wb") as stream:
            fastavro.writer(stream, packet_schema("11.0").parsed, (packet(row, self.with_cutouts) for row in rows))
        failed = 1 if number == 2 else 0
        record = {
            "visit": visit,
            "day_obs": DAY_OBS,
            "band": band,
            "midpoint_mjd_tai": mjd,
            "detectors": {"expected": 2, "processed": 2 - failed, "failed": failed},
            "dia_sources": {
                "detected": len(rows) + 9,
                "selected": len(rows),
                "rejected": {"reliability below 0.1": 6, "pixelFlags_saturated": 3},
            },
            "ss_matches": self.n_asteroids,
            "objects": {"new": len(rows) if number == 0 else 1, "updated": 0 if number == 0 else len(rows) - 1},
            "alerts": len(rows),
            "streams": {"lsst-alerts-v11": {"sent": len(rows)}},
            "delivered": {"antares": len(rows), "lasair": len(rows)},
            "filters": {"demo.bright-new": {"seen": len(rows), "passed": 4, "capped": 2, "error": None}},
            "forced_sources": self.n_objects,
            "failures": failed,
            "latency_s": 2.0 + 0.3 * number,
            "latency": {
                "alerts": len(rows),
                **{name: dict.fromkeys(("mean", "p50", "p99", "max"), 7.5) for name in FIGURES},
            },
            "seconds": {"subtraction": 2.1, "detection": 0.7, "association": 0.2, "packaging": 0.4},
            "notes": ["the gain was estimated"],
        }
        write_text(self.out / "ledger" / f"{visit}.json", json.dumps(record))
        if failed:
            failure = {
                "visit": visit,
                "detector": 1,
                "stage": "ingestion",
                "error": "ExposureError",
                "reason": "HDU <IMAGE> has no WCS & no pixels",
                "lost": "the detector",
            }
            write_text(self.out / "failures" / f"{visit}.jsonl", json.dumps(failure) + "\n")

    def _write_tables(self, forced: list[dict[str, Any]]) -> None:
        night = f"day_obs={DAY_OBS}"
        for name, rows in (("dia_sources", self.sources), ("dia_forced_sources", forced)):
            path = self.out / "archive" / name / night / "all.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)


def write_text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


class _Page(HTMLParser):
    """Attributes by tag, the tags left open, and the texts outside scripts."""

    VOID = frozenset({"meta", "link", "img", "br", "line", "path", "rect", "circle"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return MadeUpRun(tmp_path_factory.mktemp("out")).write()


@pytest.fixture(scope="module")
def html(run: MadeUpRun) -> str:
    return write_report(run.out, None).read_text(encoding="utf-8")


def test_page_is_whole_and_asks_the_network_for_nothing(html: str) -> None:
    page = _Page(html)
    assert page.open == []
    fetched = [
        value
        for tag, attributes in page.attributes
        for name, value in attributes.items()
        if name in ("src", "href", "srcset") and tag != "a"
    ]
    assert fetched and all(value is not None and value.startswith("data:") for value in fetched)
    links = [attributes["href"] for tag, attributes in page.attributes if tag == "a"]
    assert all(link is not None and link.startswith(("#", "../")) for link in links)
    assert "@import" not in html and "url(http" not in html


def test_links_of_the_page_lead_somewhere(run: MadeUpRun, html: str) -> None:
    page = _Page(html)
    links = [attributes["href"] or "" for tag, attributes in page.attributes if tag == "a"]
    anchors = {attributes.get("id") for _, attributes in page.attributes}
    assert all(link[1:] in anchors for link in links if link.startswith("#"))
    files = [run.out / "report" / link for link in links if not link.startswith("#")]
    assert len([path for path in files if path.suffix == ".avro"]) == run.n_visits
    assert all(path.exists() for path in files)


def test_numbers_of_the_ledger_stand_on_the_page(run: MadeUpRun, html: str) -> None:
    text = _Page(html).text
    assert f"{len(run.sources)} alerts from 6 visits" in text
    assert "the gain was estimated (6 visits)" in text
    for expected in (
        "2026-11-22",
        "11 of 12",
        "antares",
        "demo.bright-new",
        "reliability below 0.1",
        "lsst-alerts-v11",
        f"How late {len(run.sources)} alerts were",
        "overhead7.57.57.57.5",
    ):
        assert expected in text


def test_text_from_outside_is_escaped(html: str) -> None:
    assert "HDU &lt;IMAGE&gt; has no WCS &amp; no pixels" in html
    assert "<IMAGE>" not in html


def test_ids_beyond_2_53_stand_unrounded_on_page_and_map(run: MadeUpRun, html: str) -> None:
    seen = {str(row["diaObjectId"]) for row in run.sources if row["diaObjectId"]}
    assert len(seen) > 20
    assert all(f'"{key}"' in html for key in seen)
    # As text only: a bare number would be rounded by JavaScript.
    assert not re.search(rf"[:,\[]{ID_BASE}[,\]}}]", html)


def test_cutouts_are_of_the_brightest_new_objects_doubtful_ones_last(run: MadeUpRun) -> None:
    cards = cutout_cards(run.out, Sources.read(run.out))
    best: dict[int, dict[str, Any]] = {}
    for row in run.sources:
        if row["diaObjectId"] and row["snr"] > best.get(row["diaObjectId"], {"snr": 0.0})["snr"]:
            best[row["diaObjectId"]] = row
    doubtful = {key: row["reliability"] is not None and row["reliability"] < 0.5 for key, row in best.items()}
    assert any(doubtful.values())
    expected = sorted(best, key=lambda key: (doubtful[key], -best[key]["snr"]))[:20]
    assert [card.dia_object_id for card in cards] == [str(key) for key in expected]
    for card in cards:
        for stamp_shown in card.stamps.values():
            assert stamp_shown is not None
            image = Image.open(io.BytesIO(base64.b64decode(stamp_shown.uri.partition(",")[2])))
            assert image.size == (stamp_shown.nx, stamp_shown.ny) == (SIDE, SIDE)
    assert [card.reliability for card in cards].count(None) == 1


def test_object_of_an_earlier_night_is_not_new(run: MadeUpRun, tmp_path: Path) -> None:
    known = MadeUpRun(tmp_path, n_objects=2, n_visits=1, n_asteroids=0).write()
    table = pa.Table.from_pylist([{**row, "diaSourceId": row["diaSourceId"] + 7_000_000} for row in known.sources])
    pq.write_table(table, tmp_path / "archive" / "dia_sources" / f"day_obs={DAY_OBS}" / "all.parquet")
    assert cutout_cards(tmp_path, Sources.read(tmp_path)) == []


def test_broken_or_missing_cutouts_cost_only_their_picture(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path, n_objects=3, n_visits=1, n_asteroids=0, with_cutouts=False).write()
    cards = cutout_cards(run.out, Sources.read(run.out))
    assert [card.science for card in cards] == [None] * len(run.sources)
    html = write_report(run.out, None).read_text(encoding="utf-8")
    assert "Their packets hold no cutouts." in html
    assert "cutout of diaObject" not in html
    assert all(card.dia_object_id in _Page(html).text for card in cards)


def test_light_curves_show_every_detection_and_forced_points_elsewhere(run: MadeUpRun) -> None:
    curves = light_curves(run.out, Sources.read(run.out))
    assert len(curves) == 12
    assert [curve.n_detections for curve in curves] == sorted((curve.n_detections for curve in curves), reverse=True)
    for curve in curves:
        detections = [row for row in run.sources if row["diaObjectId"] == int(curve.dia_object_id)]
        assert curve.n_detections == len(detections)
        (panel,) = curve.panels
        assert curve.n_detections + curve.n_forced == len(panel.marks) == run.n_visits
        # SVG counts downwards: the brighter, the smaller y.
        by_x = sorted(panel.marks, key=lambda mark: mark.x)
        heights = np.array([mark.y for mark in by_x if not mark.forced])
        brightest_first = np.argsort([-row["psfFlux"] for row in detections])
        assert np.all(np.diff(heights[brightest_first]) >= 0)
        assert all(mark.high < mark.y < mark.low for mark in panel.marks)


def test_map_of_a_field_across_ra_zero_is_not_torn_apart(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path, n_objects=20, n_visits=1, n_asteroids=0, ra_deg=0.02, with_cutouts=False).write()
    shown = sky_map(Sources.read(run.out))
    assert shown is not None and shown.n_shown == len(run.sources)
    ra = [row["ra"] for row in run.sources]
    assert max(ra) > 359.0 and min(ra) < 1.0
    start, end = (
        float(value) for value in re.findall(r'"Range1d".*?"start":([-\d.]+),"end":([-\d.]+)', shown.script)[0]
    )
    # Objects span up to 0.2 deg, with 5 percent of room.
    assert 0.1 < start - end < 0.2 * 1.05 + 1e-6


def test_run_without_alerts_says_why(tmp_path: Path) -> None:
    record = {
        "visit": 1,
        "day_obs": DAY_OBS,
        "detectors": {"expected": 1, "processed": 0, "failed": 1},
        "alerts": 0,
        "midpoint_mjd_tai": None,
        "band": None,
    }
    write_text(tmp_path / "ledger" / "1.json", json.dumps(record))
    failure = {
        "visit": 1,
        "detector": 0,
        "stage": "ingestion",
        "error": "MissingFile",
        "reason": "no such file",
        "lost": "all",
    }
    write_text(tmp_path / "failures" / "1.jsonl", json.dumps(failure))
    text = _Page(write_report(tmp_path, None).read_text(encoding="utf-8")).text
    assert "There are no alerts" in text
    assert "0 of 1 detectors were processed, 1 failed." in text
    assert "1 failures in ingestion: MissingFile: no such file" in text


def test_empty_folder_gives_a_page_that_says_so(tmp_path: Path) -> None:
    text = _Page(write_report(tmp_path, None).read_text(encoding="utf-8")).text
    assert "The ledger holds no visit: none was processed to its end." in text


def test_fainter_than_the_template_is_blue_and_brighter_is_red() -> None:
    image = np.random.default_rng(5).normal(0.0, 1.0, (SIDE, SIDE))
    image[10, 10], image[20, 20], image[0, 0] = 100.0, -100.0, np.nan
    red, _, blue = np.moveaxis(signed_stamp(image).astype(int), 2, 0)
    assert red[10, 10] > blue[10, 10] + 100
    assert blue[20, 20] > red[20, 20] + 100
    assert signed_stamp(image)[0, 0].tolist() == [214, 206, 230]
    assert signed_stamp(-image)[10, 10].tolist() == signed_stamp(image)[20, 20].tolist()


def test_grey_stamp_darkens_with_flux_and_survives_an_empty_image() -> None:
    image = np.zeros((3, 3))
    image[1] = [0.0, 10.0, 1000.0]
    grey = grey_stamp(image, sigma=1.0, top=1000.0)[1, :, 0]
    assert grey[0] > grey[1] > grey[2] == 15
    assert grey_stamp(np.full((3, 3), np.nan), 1.0, 1.0).shape == (3, 3, 3)


def test_mjd_reads_as_date_and_time() -> None:
    assert tai_text(51544.5) == "2000-01-01 12:00:00"  # J2000.0 by definition


def page_text(out: Path, night: Path | None = None) -> str:
    """The texts of a fresh page, white space made single."""
    return " ".join(_Page(write_report(out, night).read_text(encoding="utf-8")).text.split())


def write_sources(out: Path, rows: list[dict[str, Any]]) -> None:
    path = out / "archive" / "dia_sources" / f"day_obs={DAY_OBS}" / "all.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def detections(times: list[float], flux_njy: float = 1e3, **changes: Any) -> list[dict[str, Any]]:
    """One object detected at some times, once a visit."""
    return [
        {
            "diaSourceId": ID_BASE + number,
            "visit": number + 1,
            "detector": 0,
            "diaObjectId": ID_BASE,
            "ssObjectId": None,
            "midpointMjdTai": mjd,
            "ra": 10.0,
            "dec": -20.0,
            "psfFlux": flux_njy,
            "psfFluxErr": 0.1 * flux_njy,
            "snr": 10.0,
            "band": "r",
            "reliability": None,
            **changes,
        }
        for number, mjd in enumerate(times)
    ]


def ledger(out: Path, visit: int, **changes: Any) -> None:
    record = {"visit": visit, "day_obs": DAY_OBS, "midpoint_mjd_tai": FIRST_MJD + visit * 1e-3, "alerts": 1, **changes}
    write_text(out / "ledger" / f"{visit}.json", json.dumps(record))


@pytest.mark.parametrize(
    ("flux_njy", "unit"), [(3e2, "nJy"), (3e4, "µJy"), (-3e6, "mJy"), (3e9, "Jy"), (-3e12, "Jy"), (3e15, "Jy")]
)
def test_flux_labels_are_in_a_unit_that_keeps_them_beside_the_frame(tmp_path: Path, flux_njy: float, unit: str) -> None:
    rows = detections([FIRST_MJD, FIRST_MJD + 0.1], flux_njy, psfFluxErr=1.0)
    write_sources(tmp_path, rows)
    (curve,) = light_curves(tmp_path, Sources.read(tmp_path))
    (panel,) = curve.panels
    assert panel.y_label == unit
    # A digit is at most 0.64 em wide in the fonts of the page, drawn at 11.5 pixels, 6 pixels off the frame.
    room = (PlotArea().left - 6) / (0.64 * 11.5)
    assert len(panel.y_ticks) >= 3
    assert all(len(tick.label.replace(",", "").replace(".", "")) <= room for tick in panel.y_ticks)
    assert all(f" {unit}, " in mark.label for mark in panel.marks)


def test_full_night_among_others_gets_a_panel_where_its_visits_stand_apart(tmp_path: Path) -> None:
    night = [FIRST_MJD + 20 + 0.01 * number for number in range(21)]
    write_sources(tmp_path, detections([FIRST_MJD, FIRST_MJD + 3, *night, FIRST_MJD + 44]))
    (curve,) = light_curves(tmp_path, Sources.read(tmp_path))
    whole, zoomed = curve.panels
    assert (len(whole.marks), len(zoomed.marks)) == (24, 21)
    frame = PlotArea().right - PlotArea().left
    places = sorted(mark.x for mark in zoomed.marks)
    # 20 equal steps over the frame less 6 percent of the span at either end; places are rounded to 0.1.
    assert min(np.diff(places)) > frame / 1.12 / 20 - 0.11
    assert whole.x_label == "MJD (TAI)"
    assert zoomed.x_label == f"hours since {tai_text(night[0])[:16]} TAI"


def test_object_of_one_night_in_a_long_run_has_the_axis_of_that_night(tmp_path: Path) -> None:
    other = detections([FIRST_MJD], diaObjectId=ID_BASE + 500, diaSourceId=ID_BASE + 500, visit=500)
    times = [FIRST_MJD + 900, FIRST_MJD + 900.1]
    write_sources(tmp_path, [*other, *detections(times)])
    curve = light_curves(tmp_path, Sources.read(tmp_path))[0]
    (panel,) = curve.panels
    assert len(panel.marks) == 2
    assert panel.x_label.startswith("hours since")


def test_many_points_are_drawn_as_paths_with_every_place_once(tmp_path: Path) -> None:
    times = [FIRST_MJD + 0.5 * number for number in range(MAX_DETAILED_MARKS + 1)]
    write_sources(tmp_path, detections([*times, times[-1]]))
    (curve,) = light_curves(tmp_path, Sources.read(tmp_path))
    panel = curve.panels[0]
    assert panel.marks == ()
    (trace,) = panel.traces
    assert trace.dots.count("h0") == len(times)
    assert f"With more than {MAX_DETAILED_MARKS} points in a panel all are dots" in page_text(tmp_path)


def test_scale_bar_is_in_arcsec_where_the_stamp_has_a_wcs_and_in_pixels_where_not(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path, n_objects=1, n_visits=1, n_asteroids=0).write()
    (card,) = cutout_cards(run.out, Sources.read(run.out))
    assert card.science is not None
    # A third of 30 pixels.
    assert (card.science.bar_label, card.science.bar_percent) == ("10 pixels", pytest.approx(100 / 3, abs=0.01))
    (container,) = (run.out / "archive" / "alerts").glob("*/*.avro")
    with container.open("rb") as stream:
        packets: list[Any] = list(fastavro.reader(stream))
    hdus = fits.open(io.BytesIO(packets[0]["cutoutScience"]))
    scale_deg = 0.3 / 3600.0
    hdus[0].header.update({"CD1_1": 0.0, "CD1_2": scale_deg, "CD2_1": scale_deg, "CD2_2": 0.0})
    stream_out = io.BytesIO()
    hdus.writeto(stream_out)
    packets[0]["cutoutScience"] = stream_out.getvalue()
    with container.open("wb") as stream:
        fastavro.writer(stream, packet_schema("11.0").parsed, packets)
    (card,) = cutout_cards(run.out, Sources.read(run.out))
    assert card.science is not None
    # 9 arcsec wide: 2 is the longest of 1, 2, 5 within a third.
    assert (card.science.bar_label, card.science.bar_percent) == ("2″", pytest.approx(100 * 2 / 9, abs=0.01))


def test_nominal_values_and_the_target_of_the_night_stand_on_the_page(tmp_path: Path) -> None:
    night, out = tmp_path / "night", tmp_path / "out"
    visit = {
        "visit": 1,
        "day_obs": DAY_OBS,
        "seq_num": 1,
        "instrument": "STE3 CCD",
        "band": "i",
        "midpoint_mjd_tai": FIRST_MJD,
        "exposure_time_s": 300.0,
        "readout_end_mjd_tai": FIRST_MJD + 0.002,
        "boresight_ra_deg": 273.9,
        "boresight_dec_deg": -25.3,
        "rotation_deg": 0.0,
        "observation_reason": "science",
        "target_name": "KB13475 (nominal WCS)",
        "detectors": [{"detector": 0, "science": "a.fits", "template": "b.fits"}],
    }
    write_text(night / "visits.jsonl", json.dumps(visit))
    write_text(night / "ingest.json", json.dumps({"notes": ["nominal zero point: 25.0"], "refused": [{}, {}]}))
    ledger(out, 1)
    text = page_text(out, night)
    assert "Target: KB13475 (nominal WCS) (1 visit)." in text
    assert "Nominal values." in text and "nominal zero point: 25.0" in text
    assert "2 inputs were refused at ingest" in text
    write_text(night / "ingest.json", "[]")
    write_text(night / "visits.jsonl", json.dumps({**visit, "target_name": "KB13475"}))
    text = page_text(out, night)
    assert "Target: KB13475 (1 visit)." in text and "Nominal values." not in text


def test_sources_without_an_object_are_explained(tmp_path: Path) -> None:
    rows = detections([FIRST_MJD], reliability=0.9)
    rows += detections([FIRST_MJD] * 3, diaObjectId=None, reliability=0.05)
    rows += detections([FIRST_MJD], diaObjectId=None, reliability=0.95)
    rows += detections([FIRST_MJD], diaObjectId=None, ssObjectId=7, reliability=0.01)
    write_sources(tmp_path, rows)
    ledger(tmp_path, 1, dia_sources={"detected": 6, "selected": 6}, alerts=2, sources_without_object=4)
    text = page_text(tmp_path)
    assert "4 of 6 selected diaSources have no object, and so no alert" in text
    assert "association.new_object_min_reliability (0.1 unless the run was configured otherwise)" in text
    assert "3 of them have a reliability below 0.1." in text
    ledger(tmp_path, 1, dia_sources={"detected": 6, "selected": 6}, alerts=6, sources_without_object=0)
    assert "have no object" not in page_text(tmp_path)


def test_broker_without_kafka_is_skipped_and_said_so(tmp_path: Path) -> None:
    ledger(tmp_path, 1, delivered={"fink": 0, "mirror": 1}, streams={}, filters={})
    text = page_text(tmp_path)
    assert "finkskipped: no Kafka mirror1" in text  # cells of one row, rows
    assert "The run had no Kafka (--kafka none)" in text


def test_page_says_which_command_it_reports_on(tmp_path: Path) -> None:
    for name, seconds, expected in (
        ("images", {"subtraction": 1.0, "association": 1.0}, "Visits with images, through the whole chain."),
        ("catalogue", {"association": 1.0, "packaging": 1.0}, "A table of diaSources, entered at association"),
        ("packets", {"replaying": 1.0}, "1 replayed packet from 1 visit"),
    ):
        ledger(tmp_path / name, 1, seconds=seconds)
        write_text(tmp_path / name / ".nightstream.json", json.dumps({"input": "0", "source": f"{name}.x"}))
        text = page_text(tmp_path / name)
        assert expected in text
        assert f"Input: {name}.x" in text
    assert "no map, cutouts or light curves" in text
    assert "new diaObjects" not in text


def test_thousands_of_visits_are_summed_and_the_telling_ones_listed(tmp_path: Path) -> None:
    n_visits = MAX_VISITS_LISTED + 40
    for visit in range(1, n_visits + 1):
        day = 20180100 + 10_000 * (visit % 8) + 100 * (visit % 5) + 1 + visit % 28
        failures = 1 if visit == 7 else 0
        ledger(tmp_path, visit, day_obs=day, alerts=0 if visit <= 40 else 2, failures=failures)
    summary = summarise(tmp_path)
    listed = [record["visit"] for record in visits_listed(summary)]
    # The one with a failure, and of those without alerts none but it: 300 have alerts, so the last of them gives way.
    assert listed == [7, *range(41, n_visits)]
    word, rows = periods(summary)
    assert word == "month" and len(rows) == 40
    assert sum(row["visits"] for row in rows) == n_visits
    assert sum(row["alerts"] for row in rows) == summary.alerts
    text = page_text(tmp_path)
    assert f"Of {n_visits} visits the table shows {MAX_VISITS_LISTED}" in text
    assert "All visits by month" in text


def test_sentences_of_the_footer_stand_apart(html: str) -> None:
    text = " ".join(_Page(html).text.split())
    assert "failures/. Written by nightstream." in text

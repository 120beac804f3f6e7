"""The night simulator writes a night folder that keeps its contract, the same bytes each time."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.night_simulation import (
    EPHEMERIS_SCHEMA,
    PRESETS,
    TRUTH_SCHEMA,
    NightPreset,
    NightSimulationError,
    SimulatedNight,
    simulate_night,
)
from schemas.exposures import mask_bits, read_exposure
from schemas.manifests import read_manifest

SMALL = NightPreset(
    "small",
    n_visits=2,
    n_detectors=2,
    size_pix=256,
    bands=("r", "i"),
    appearance_window_h=0.1,
    asteroids_per_arcmin2=4.0,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimulatedNight:
    return simulate_night("tiny", tmp_path_factory.mktemp("tiny") / "night", seed=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimulatedNight:
    return simulate_night(SMALL, tmp_path_factory.mktemp("small") / "night", seed=3)


def _columns(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def _truth(night: SimulatedNight) -> dict[str, np.ndarray]:
    return _columns(night.folder / "truth" / "injected.parquet")


def _digests(folder: Path, suffixes: tuple[str, ...] = (".fits", ".parquet", ".jsonl", ".json")) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in suffixes)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_manifest_reads_without_problems_and_every_image_is_there(tiny: SimulatedNight) -> None:
    manifest = read_manifest(tiny.folder)
    assert manifest.problems == ()
    assert [visit.visit for visit in manifest.visits] == [2026112200001 + index for index in range(4)]
    assert [visit.band for visit in manifest.visits] == ["g", "r", "g", "r"]
    assert tiny.visits == 4 and tiny.exposures == 8 and tiny.templates == 4
    for visit in manifest.visits:
        assert visit.day_obs == 20261122 and visit.readout_end_mjd_tai > visit.midpoint_mjd_tai
        for images in visit.detectors:
            assert Path(images.science).is_file() and Path(images.template or "").is_file()
    gap_s = (manifest.visits[1].midpoint_mjd_tai - manifest.visits[0].midpoint_mjd_tai) * 86400
    assert gap_s == pytest.approx(39.0, abs=1e-5)  # an MJD of 6e4 holds 7e-12 d
    assert not [path for path in tiny.folder.rglob(".*")]


def test_every_detector_of_the_tiny_night_has_many_detectable_sources(tiny: SimulatedNight) -> None:
    truth = _truth(tiny)
    detectable = (truth["snr"] >= 5) & truth["good_pixels"]
    assert tiny.detectable == detectable.sum() > 100
    for visit in np.unique(truth["visit"]):
        for detector in (0, 1):
            assert (detectable & (truth["visit"] == visit) & (truth["detector"] == detector)).sum() >= 10
    assert set(truth["kind"]) == {"transient", "variable", "asteroid", "trail"}
    assert (truth["kind"] == "trail").sum() == 1
    change = truth["flux_njy"][truth["kind"] == "variable"]
    assert (change < 0).any() and (change > 0).any()


def test_tables_have_the_agreed_columns_and_order(tiny: SimulatedNight) -> None:
    assert pq.read_schema(tiny.folder / "truth" / "injected.parquet").equals(TRUTH_SCHEMA)
    assert pq.read_schema(tiny.folder / "ephemerides.parquet").equals(EPHEMERIS_SCHEMA)
    truth = _truth(tiny)
    keys = list(zip(truth["visit"], truth["detector"], truth["kind"], truth["object"], strict=True))
    assert keys == sorted(set(keys))


def test_truth_positions_agree_with_the_wcs_in_the_file(tiny: SimulatedNight) -> None:
    truth = _truth(tiny)
    for visit in read_manifest(tiny.folder).visits:
        for images in visit.detectors:
            chosen = (truth["visit"] == visit.visit) & (truth["detector"] == images.detector)
            x, y = read_exposure(images.science).wcs.all_world2pix(truth["ra"][chosen], truth["dec"][chosen], 0)
            # x is float32 (3e-5 at 512), header cards keep 1e-12 deg = 2e-8 pixels.
            assert np.abs(x - truth["x"][chosen]).max() < 1e-4
            assert np.abs(y - truth["y"][chosen]).max() < 1e-4


def test_good_pixels_are_clear_of_the_mask_in_the_file(tiny: SimulatedNight) -> None:
    truth = _truth(tiny)
    unusable = mask_bits("BAD", "SAT", "CR", "NO_DATA")
    for visit in read_manifest(tiny.folder).visits:
        for images in visit.detectors:
            mask = read_exposure(images.science).mask & unusable
            chosen = (truth["visit"] == visit.visit) & (truth["detector"] == images.detector) & truth["good_pixels"]
            for x, y in zip(np.rint(truth["x"][chosen]), np.rint(truth["y"][chosen]), strict=True):
                assert not mask[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].any()


def test_asteroids_are_where_the_interpolated_ephemerides_say(tiny: SimulatedNight) -> None:
    truth, rows = _truth(tiny), _columns(tiny.folder / "ephemerides.parquet")
    visits = read_manifest(tiny.folder).visits
    midpoints = {visit.visit: visit.midpoint_mjd_tai for visit in visits}
    asteroids = np.flatnonzero(truth["kind"] == "asteroid")
    assert asteroids.size >= 4
    for index in asteroids:
        own = rows["designation"] == truth["object"][index]
        mjd = midpoints[int(truth["visit"][index])]
        ra, dec = (np.interp(mjd, rows["mjd_tai"][own], rows[name][own]) for name in ("ra", "dec"))
        east = (ra - truth["ra"][index]) * np.cos(np.deg2rad(dec)) * 3600
        # Over 10 minutes a great circle leaves the chord by (10 arcsec)^2 tan(dec) / 8 / 206265: 1e-5 arcsec.
        assert np.hypot(east, (dec - truth["dec"][index]) * 3600) < 1e-3
    assert rows["mjd_tai"].min() <= visits[0].midpoint_mjd_tai - 1 / 24 + 1e-9
    assert rows["mjd_tai"].max() >= visits[-1].midpoint_mjd_tai + 1 / 24 - 1e-9
    assert "trail" not in {name.split("-")[0] for name in rows["designation"]}


def test_ephemeris_rates_are_those_of_the_positions(tiny: SimulatedNight) -> None:
    rows = _columns(tiny.folder / "ephemerides.parquet")
    own = rows["ssObjectId"] == rows["ssObjectId"][0]
    hours = (rows["mjd_tai"][own] - rows["mjd_tai"][own][0]) * 24
    # The declination changes by less than 3 arcmin, cos(dec) with it by 1e-4: 0.006 arcsec/h of 60.
    east = np.gradient((rows["ra"][own] - rows["ra"][own][0]) * 3600, hours) * np.cos(np.deg2rad(rows["dec"][own]))
    np.testing.assert_allclose(east, rows["ra_rate_arcsec_per_h"][own], atol=0.01)
    np.testing.assert_allclose(
        np.gradient(rows["dec"][own] * 3600, hours), rows["dec_rate_arcsec_per_h"][own], atol=0.01
    )


def test_science_images_lie_inside_their_templates(tiny: SimulatedNight) -> None:
    for visit in read_manifest(tiny.folder).visits:
        for images in visit.detectors:
            science, template = read_exposure(images.science), read_exposure(images.template or "")
            ny, nx = science.image.shape
            corners = np.array([[0, 0], [nx - 1, 0], [0, ny - 1], [nx - 1, ny - 1]], dtype=float)
            x, y = template.wcs.all_world2pix(*science.wcs.all_pix2world(*corners.T, 0), 0)
            assert template.image.shape == (ny + 80, nx + 80)
            assert min(x.min(), y.min()) > 5 and max(x.max(), y.max()) < nx + 80 - 6


def test_every_fourth_visit_has_no_psf_and_nothing_else_is_missing(tiny: SimulatedNight) -> None:
    for visit in read_manifest(tiny.folder).visits:
        exposure = read_exposure(visit.detectors[0].science)
        assert (exposure.psf is None) == (visit.seq_num % 4 == 0)
        assert exposure.notes == ()
        assert np.isfinite(exposure.image).all() and (exposure.variance > 0).all()


def test_sources_are_bright_in_the_science_image_where_the_truth_says(tiny: SimulatedNight) -> None:
    truth = _truth(tiny)
    visit = read_manifest(tiny.folder).visits[0]
    exposure = read_exposure(visit.detectors[0].science)
    chosen = (truth["visit"] == visit.visit) & (truth["detector"] == 0) & truth["good_pixels"] & (truth["snr"] > 15)
    chosen &= np.isin(truth["kind"], ["transient", "asteroid"])
    assert chosen.sum() >= 3
    sky = np.median(exposure.image)
    for x, y in zip(np.rint(truth["x"][chosen]).astype(int), np.rint(truth["y"][chosen]).astype(int), strict=True):
        box = (slice(y - 2, y + 3), slice(x - 2, x + 3))
        # 25 pixels hold over half of the light: S/N > 15 in all is > 6 there.
        assert (exposure.image[box] - sky).sum() > 5 * np.sqrt(exposure.variance[box].sum())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(small: SimulatedNight, tmp_path: Path) -> None:
    simulate_night(SMALL, tmp_path / "again", seed=3)
    simulate_night(SMALL, tmp_path / "other", seed=4)
    first, other = _digests(small.folder), _digests(tmp_path / "other")
    assert _digests(tmp_path / "again") == first
    assert len(first) == 4 + 4 + 4  # science, templates, two tables, manifest, simulation.json
    assert all(first[name] != other[name] for name in first)
    fits = [name for name in first if name.endswith(".fits")]
    assert len({first[name] for name in fits}) == len(fits)


def test_an_image_depends_on_its_own_visit_and_detector_only(small: SimulatedNight, tmp_path: Path) -> None:
    longer = replace(SMALL, n_visits=3)
    simulate_night(longer, tmp_path / "longer", seed=3)
    first, second = _digests(small.folder, (".fits",)), _digests(tmp_path / "longer", (".fits",))
    assert set(first) < set(second)
    assert all(second[name] == digest for name, digest in first.items())


def test_a_second_night_sees_the_same_sky_with_its_own_asteroids(small: SimulatedNight, tmp_path: Path) -> None:
    both = simulate_night(replace(SMALL, day_obs=20261231), tmp_path / "both", seed=3, nights=2)
    visits = read_manifest(both.folder).visits
    assert [visit.day_obs for visit in visits] == [20261231, 20261231, 20270101, 20270101]
    assert [visit.seq_num for visit in visits] == [1, 2, 1, 2]
    assert visits[2].midpoint_mjd_tai - visits[0].midpoint_mjd_tai == pytest.approx(1.0, abs=1e-9)
    truth = _truth(both)
    night = truth["visit"] // 100000
    seen = {
        (kind, day): set(truth["object"][(truth["kind"] == kind) & (night == day)])
        for kind in ("transient", "variable", "asteroid")
        for day in (20261231, 20270101)
    }
    for kind in ("transient", "variable"):
        # Dithers of 18 pixels on 256 take some of them off the detectors.
        common = seen[kind, 20261231] & seen[kind, 20270101]
        assert len(common) >= 0.5 * len(seen[kind, 20261231]) > 0
    assert not seen["asteroid", 20261231] & seen["asteroid", 20270101]
    assert seen["asteroid", 20261231] and seen["asteroid", 20270101]
    still = truth["kind"] != "asteroid"
    places = set(zip(truth["object"][still], truth["ra"][still], truth["dec"][still], strict=True))
    assert len(places) == len(set(truth["object"][still]))


def test_a_complete_folder_is_left_as_it_is_and_an_interrupted_one_is_finished(tmp_path: Path) -> None:
    preset = replace(SMALL, n_visits=1, n_detectors=1)
    made = simulate_night(preset, tmp_path / "night", seed=3)
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*.fits")}
    assert simulate_night(preset, tmp_path / "night", seed=3) == made
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*.fits")} == before
    digests = _digests(made.folder)
    for name in ("visits.jsonl", "truth/injected.parquet", "science/2026112200001_000.fits"):
        (made.folder / name).unlink()
    assert simulate_night(preset, tmp_path / "night", seed=3) == made
    assert _digests(made.folder) == digests


def test_a_folder_that_holds_something_else_is_refused(small: SimulatedNight, tmp_path: Path) -> None:
    before = _digests(small.folder)
    for preset, seed in ((SMALL, 4), (replace(SMALL, n_visits=1), 3), ("tiny", 3)):
        with pytest.raises(NightSimulationError, match="holds another simulation"):
            simulate_night(preset, small.folder, seed=seed)
    with pytest.raises(NightSimulationError, match="holds another simulation"):
        simulate_night(SMALL, small.folder, seed=3, nights=2)
    assert _digests(small.folder) == before
    (tmp_path / "letter.txt").write_text("not a night")
    with pytest.raises(NightSimulationError, match="not empty"):
        simulate_night(SMALL, tmp_path, seed=3)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(NightSimulationError, match="not a folder"):
        simulate_night(SMALL, tmp_path / "letter.txt", seed=3)


@pytest.mark.parametrize(
    ("preset", "seed", "message"),
    [
        ("huge", 1, "unknown preset 'huge'.*tiny"),
        (SMALL, -1, "got seed -1"),
        (replace(SMALL, bands=("r", "w")), 1, "must be a choice of u"),
        (replace(SMALL, bands=()), 1, "must be a choice of u"),
        (replace(SMALL, n_visits=0), 1, "0 visits"),
        (replace(SMALL, first_seq_num=32767), 1, "32767"),
        (replace(SMALL, size_pix=64), 1, "got 2 of 64"),
        (replace(SMALL, dither_pix=60.0), 1, "dither_pix 60.0"),
        (replace(SMALL, psf_missing_every=0), 1, "psf_missing_every 0"),
    ],
)
def test_what_makes_no_night_is_refused_before_anything_is_written(
    preset: str | NightPreset, seed: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(NightSimulationError, match=message):
        simulate_night(preset, tmp_path / "night", seed=seed)
    assert not (tmp_path / "night").exists()


def test_progress_counts_up_to_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    preset = replace(SMALL, n_visits=1)
    simulate_night(preset, tmp_path / "night", seed=3, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (4, 4)  # one template and one visit, two detectors each
    assert calls == sorted(set(calls))


def test_presets_say_what_they_promise() -> None:
    assert {name: (p.n_visits, p.n_detectors, p.size_pix) for name, p in PRESETS.items()} == {
        "tiny": (4, 2, 512),
        "live": (12, 2, 512),
        "demo": (12, 2, 1024),
        "detector": (1, 1, 4096),
    }
    assert all(preset.name == name for name, preset in PRESETS.items())

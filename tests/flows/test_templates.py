"""Templates built from one simulated night serve another: what is new there becomes alerts, what is bad is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from click.testing import CliRunner
from conftest import FIRST_DAY, SECOND_DAY, Run, write_night

from pipelines.night_simulation import PRESETS, simulate_night
from runners.cli import main
from schemas.exposures import mask_bits, read_exposure
from schemas.manifests import read_manifest
from transforms.numerics.psf_modelling import psf_fwhm_pix

PRESET = replace(
    PRESETS["tiny"],
    name="templates",
    n_visits=5,
    n_detectors=1,
    bands=("r",),
    group_gap_min=4.0,
    size_pix=384,
    asteroids_per_arcmin2=10.0,
)
NEAR_DEG = 1.0 / 3600.0
ALL = ("--max-fwhm", "5")  # of the five exposures none is too poor


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two nights of five visits of one detector; their own templates are taken from them."""
    base = tmp_path_factory.mktemp("templates")
    both = simulate_night(PRESET, base / "both", seed=7, nights=2).folder
    records = [json.loads(line) for line in (both / "visits.jsonl").read_text().splitlines()]
    for record in records:
        for images in record["detectors"]:
            images["template"] = None
    return {
        day: write_night(base / str(day), both, [one for one in records if one["day_obs"] == day])
        for day in (FIRST_DAY, SECOND_DAY)
    }


def command(*arguments: str | Path) -> Any:
    """Run `nightstream templates ARGUMENTS` in this process."""
    result = CliRunner().invoke(main, ["templates", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def built(nights: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Templates of the first night."""
    out = tmp_path_factory.mktemp("built") / "templates"
    result = command("build", nights[FIRST_DAY], "--out", out, "--json", *ALL)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["exposures"], facts["templates"], facts["failures"]) == (5, 1, 0)
    return out


def index(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "templates.jsonl").read_text().splitlines()]


def failures(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def copied(night: Path, folder: Path) -> Path:
    """A night with images of its own, to break some of them."""
    folder.mkdir()
    shutil.copy(night / "visits.jsonl", folder)
    (folder / "science").mkdir()
    for visit in read_manifest(night).visits:
        for images in visit.detectors:
            shutil.copy(images.science, folder / "science")
    return folder


def science(folder: Path) -> list[Path]:
    return sorted((folder / "science").iterdir())


def test_template_is_deeper_than_its_exposures_by_their_weights(built: Path) -> None:
    (record,) = index(built)
    template = read_exposure(built / record["template"])
    good = template.mask == 0
    weights = np.array([used["weight"] for used in record["exposures"]])
    assert weights.sum() == pytest.approx(1.0, abs=1e-4)
    single = [float(np.median(read_exposure(used["science"]).variance)) for used in record["exposures"]]
    # medians of maps that hold photon noise too: 5 %; at the edges there are fewer exposures
    inner = template.variance[100:-100, 100:-100][good[100:-100, 100:-100]]
    assert np.median(inner) == pytest.approx(float(np.sum(weights**2 * single)), rel=0.05)
    assert 0.5 < template.interpolated < 1.5
    assert template.psf is not None
    seeing = [used["fwhm_arcsec"] for used in record["exposures"]]
    assert min(seeing) < record["fwhm_arcsec"] < max(seeing)
    assert psf_fwhm_pix(template.psf) == pytest.approx(record["fwhm_arcsec"] / 0.2, rel=0.01)
    header = fits.getheader(built / record["template"], "IMAGE")
    assert header["NEXP"] == len(weights)
    assert [header[f"VIS{n:03d}"] for n in range(1, header["NEXP"] + 1)] == [
        used["visit"] for used in record["exposures"]
    ]


def test_template_has_no_holes_where_stars_are_saturated_and_covers_dithers(built: Path) -> None:
    (record,) = index(built)
    template = read_exposure(built / record["template"])
    saturated = (template.mask & mask_bits("SAT")) != 0
    assert np.isfinite(template.image[saturated]).all()
    assert min(template.image.shape) > PRESET.size_pix  # a margin
    assert np.isfinite(template.image[30:-30, 30:-30]).mean() > 0.99


@pytest.fixture(scope="module")
def second(nights: dict[int, Path], built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second night with the templates of the first."""
    night = tmp_path_factory.mktemp("second") / "night"
    shutil.copytree(nights[SECOND_DAY], night, symlinks=True)
    result = command("attach", night, built, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"detectors": 5, "attached": 5, "kept": [], "own": []}
    return night


def test_what_is_new_in_another_night_becomes_alerts(second: Path, produce: Callable[..., Run], tmp_path: Path) -> None:
    run = produce(second, tmp_path / "out")
    assert run.exit_code == 0, run.stderr
    assert run.failures() == []
    truth = pq.read_table(second / "truth" / "injected.parquet").to_pylist()
    visits = {visit.visit for visit in read_manifest(second).visits}
    # asteroids: nothing of them is in the template, whenever it was made
    sought = [
        row
        for row in truth
        if row["visit"] in visits and row["kind"] == "asteroid" and row["snr"] > 12 and row["good_pixels"]
    ]
    assert len(sought) >= 8
    alerts = np.array(
        [[one["diaSource"]["visit"], one["diaSource"]["ra"], one["diaSource"]["dec"]] for one in run.packets()]
    )

    def is_found(row: dict[str, Any]) -> bool:
        own = alerts[alerts[:, 0] == row["visit"]]
        return bool(np.any(np.hypot(own[:, 1] - row["ra"], own[:, 2] - row["dec"]) < NEAR_DEG))

    assert np.mean([is_found(row) for row in sought]) > 0.85


def test_noise_of_differences_is_what_their_variance_says(second: Path) -> None:
    from schemas.elements import DetectorVisit
    from transforms.subtraction import SubtractionConfig, subtract_detector

    ratios = []
    for visit in read_manifest(second).visits[:3]:
        made = subtract_detector(DetectorVisit(visit, visit.detectors[0]), SubtractionConfig(), 0.0)
        empty = (made.mask == 0) & (made.matched_template < 2 * np.sqrt(made.science_variance))
        pull = (made.difference / np.sqrt(made.difference_variance))[empty]
        ratios.append(1.4826 * np.median(np.abs(pull - np.median(pull))))
    # 0.7 % is the scatter of one of 1e5 pixels and its kernel's errors
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.02)


def test_the_same_exposures_give_the_same_bytes_and_are_not_stacked_twice(
    nights: dict[int, Path], built: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    assert command("build", nights[FIRST_DAY], "--out", again, "--quiet", *ALL).exit_code == 0
    (record,) = index(built)
    for name in (record["template"], "templates.jsonl", "failures.jsonl"):
        assert (again / name).read_bytes() == (built / name).read_bytes()
    image = again / record["template"]
    first = image.stat().st_mtime_ns
    assert command("build", nights[FIRST_DAY], "--out", again, "--quiet", *ALL).exit_code == 0
    assert image.stat().st_mtime_ns == first
    assert index(again) == index(built)
    assert command("build", nights[FIRST_DAY], "--out", again, "--max-exposures", "3", "--quiet").exit_code == 0
    assert image.stat().st_mtime_ns != first
    assert index(again)[0]["n_exposures"] == 3


def _nan_image(path: Path) -> None:
    with fits.open(path, mode="update") as hdus:
        hdus["IMAGE"].data[:] = np.nan


def _no_wcs(path: Path) -> None:
    with fits.open(path, mode="update") as hdus:
        for card in ("CTYPE1", "CTYPE2"):
            del hdus["IMAGE"].header[card]


def _elsewhere(path: Path) -> None:
    with fits.open(path, mode="update") as hdus:
        hdus["IMAGE"].header["CRVAL1"] += 1.0


def _shifted(path: Path) -> None:
    with fits.open(path, mode="update") as hdus:
        hdus["IMAGE"].header["CRPIX1"] += 40.0


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_nan_image, "ExposureError", "no finite pixel"),
        (_no_wcs, "ExposureError", "no celestial WCS"),
        (_cut, "ExposureError", "broken FITS file"),
        (Path.unlink, "ExposureError", "no such file"),
        (_elsewhere, "NoTemplateBuiltError", "1 exposures, 3 are needed"),
    ],
)
def test_a_bad_exposure_is_a_failure_record_and_the_rest_is_built(
    nights: dict[int, Path], tmp_path: Path, damage: Callable[[Path], None], error: str, words: str
) -> None:
    night = copied(nights[FIRST_DAY], tmp_path / "night")
    damage(science(night)[1])
    result = command("build", night, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    (failure,) = failures(tmp_path / "out")
    assert failure["error"] == error
    assert words in failure["reason"]
    assert words in result.stdout
    assert failure["visit"] == int(science(nights[FIRST_DAY])[1].name.split("_")[0])
    (record,) = index(tmp_path / "out")
    assert failure["visit"] not in [used["visit"] for used in record["exposures"]]


def test_wrong_positions_and_wrong_zero_points_are_found_by_the_stars(
    nights: dict[int, Path], built: Path, tmp_path: Path
) -> None:
    night = copied(nights[FIRST_DAY], tmp_path / "night")
    sharpest, *_, bright, moved = [used["visit"] for used in index(built)[0]["exposures"]]
    _shifted(night / "science" / f"{moved}_000.fits")
    with fits.open(night / "science" / f"{bright}_000.fits", mode="update") as hdus:
        hdus["IMAGE"].data *= 1.5
        hdus["VARIANCE"].data *= 1.5**2
    assert command("build", night, "--out", tmp_path / "out", *ALL).exit_code == 0
    (record,) = index(tmp_path / "out")
    assert record["grid_visit"] == sharpest
    assert [reason for reason in record["left_out"] if f"visit {moved}" in reason and "WCS" in reason]
    ratios = {used["visit"]: used["flux_ratio"] for used in record["exposures"]}
    # apertures in other seeing are wrong by 2 to 3 %
    assert ratios.pop(bright) == pytest.approx(1.5, rel=0.05)
    assert set(ratios.values()) == {1.0}


def test_the_grid_can_be_asked_for(nights: dict[int, Path], tmp_path: Path) -> None:
    visit = read_manifest(nights[FIRST_DAY]).visits[2].visit
    assert command("build", nights[FIRST_DAY], "--out", tmp_path / "out", "--grid", visit).exit_code == 0
    assert index(tmp_path / "out")[0]["grid_visit"] == visit


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (("--band", "z"), 1, "there is no exposure of band z"),
        (("--max-fwhm", "0.1"), 1, "no template could be built of 5 exposures"),
        (("--min-exposures", "6"), 1, "no template could be built of 5 exposures"),
        (("--grid", "99"), 1, "no template could be built of 5 exposures"),
        (("--min-exposures", "5", "--max-exposures", "4"), 2, "is above --max-exposures"),
        (("--max-fwhm", "0"), 2, "--max-fwhm"),
    ],
)
def test_a_build_that_makes_nothing_says_why(
    nights: dict[int, Path], tmp_path: Path, options: tuple[str, ...], exit_code: int, words: str
) -> None:
    result = command("build", nights[FIRST_DAY], "--out", tmp_path / "out", *options)
    assert result.exit_code == exit_code
    assert words in " ".join(result.stderr.split())
    if words.startswith("no template"):
        assert {one["error"] for one in failures(tmp_path / "out")} == {"NoTemplateBuiltError"}


def test_folders_that_are_no_folders_of_templates_are_refused(nights: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    result = command("build", nights[FIRST_DAY], "--out", tmp_path / "mine")
    assert (result.exit_code, "choose an empty folder" in result.stderr) == (2, True)
    result = command("attach", nights[FIRST_DAY], tmp_path / "mine")
    assert (result.exit_code, "no templates.jsonl" in result.stderr) == (2, True)
    result = command("build", tmp_path / "mine", "--out", tmp_path / "out")
    assert (result.exit_code, "no visits.jsonl" in result.stderr) == (1, True)


def test_attaching_keeps_lines_and_templates_that_it_cannot_better(built: Path, second: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (second / "visits.jsonl").read_text().splitlines()]
    elsewhere, other_band, gone = records[0], {**records[1], "band": "g"}, records[2]
    away = tmp_path / "elsewhere.fits"
    shutil.copy(second / elsewhere["detectors"][0]["science"], away)
    _elsewhere(away)
    elsewhere["detectors"][0] |= {"science": str(away), "template": "mine.fits"}
    gone["detectors"][0]["science"] = "science/gone.fits"
    night = write_night(tmp_path / "night", second, [elsewhere, "{broken", other_band, gone, records[3]])
    result = command("attach", night, built)
    assert result.exit_code == 0
    for words in ("1 of 4 detectors", "covers 0% of it", "no template of SimCam, band g", "no such file"):
        assert words in result.stdout
    lines = (night / "visits.jsonl").read_text().splitlines()
    assert lines[1] == "{broken"
    assert json.loads(lines[0])["detectors"][0]["template"] == "mine.fits"
    assert json.loads(lines[4])["detectors"][0]["template"] == str((built / index(built)[0]["template"]).resolve())


def test_a_visit_in_its_own_template_is_pointed_out(nights: dict[int, Path], built: Path, tmp_path: Path) -> None:
    night = tmp_path / "night"
    shutil.copytree(nights[FIRST_DAY], night, symlinks=True)
    facts = json.loads(command("attach", night, built, "--json", "--quiet").stdout)
    assert facts["attached"] == 5
    assert len(facts["own"]) == index(built)[0]["n_exposures"]

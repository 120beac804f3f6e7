"""Labelled detections of real nights, for the reliability: their own artefacts, and sources injected into their pixels.

An exposure is subtracted and searched twice by the very code that produces alerts: as it is, and with sources injected
into the pixels of science image and template. Injected ones are real. What is found without them is bogus, unless it
is seen again at its place in another visit, of either sign: real variables are, and so are stars that always subtract
badly; those are ambiguous. Three kinds of pair:

- ``as_is``: science image against its template;
- ``swapped``: roles exchanged;
- ``same_night``: against another exposure of the same night, band and field.

What is real and seen once (an asteroid, a flare) is called bogus by mistake.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from scipy.spatial import cKDTree
from threadpoolctl import threadpool_limits

from schemas.elements import FailureRecord
from schemas.exposures import Exposure, ExposureError, mask_bits, read_exposure, read_grid
from schemas.manifests import DetectorImages, ManifestError, Visit, read_manifest
from transforms.detection import DetectionConfig, SearchedSources, search
from transforms.failures import FAILED
from transforms.numerics.background import subtract_background
from transforms.numerics.pair_simulation import TRUTH_DTYPE
from transforms.numerics.psf_modelling import (
    DetectedSources,
    PsfEstimationError,
    PsfModel,
    constant_psf,
    detect_sources,
    fit_psf_model,
)
from transforms.numerics.sky_simulation import Purpose, far_apart, random_stream
from transforms.numerics.source_injection import (
    add_source,
    local_variance,
    unit_of_snr,
    unit_source,
    variance_per_light,
    with_light,
)
from transforms.numerics.warping import wcs_coordinate_grid
from transforms.reliability_training import AMBIGUOUS, LABELLED_DTYPE, LabelledSources, label
from transforms.subtraction import SubtractionConfig, subtract_exposures

LEAST_VISITS = 3  # of a place, or nothing can be said of what repeats there
_PARTS = ("train", "test", "train", "calibrate", "train")  # of five nights in a row
_SAME_PLACE_FWHM, _LEAST_SAME_PLACE_PIX = 0.5, 1.5
_CLASS_SHARES = {"transient": 0.3, "in_host": 0.15, "variable": 0.2, "trail": 0.1, "vanished": 0.25}
_SPACING_FWHM, _MOST_INJECTED = 14.0, 400  # one source in a square of this side
_APART_FWHM, _LEAST_APART_PIX = 4.0, 24.0
_SNR_RANGE = (4.0, 200.0)
_TRAIL_FWHM = (1.5, 10.0)
_LEAST_STAR_SNR, _MOST_CHANGE = 20.0, 0.5  # of a star that varies, and by how much of its flux
_STAR_SIZES, _LEAST_HOST_SIZE = (0.8, 1.2), 1.35  # half-light radii over that of the PSF
_HOST_SPREAD = 0.7  # of transients around a host, in its half-light radii
_EDGE_FWHM, _CLEAR_PIX = 3.0, 3
_UNUSABLE = ("BAD", "SAT", "CR", "NO_DATA")
_BACKGROUND_BOX_PIX = 128


class TrainingNightError(ValueError):
    """A night folder that cannot be trained on; the message names it and says why."""


@dataclass(frozen=True)
class TrainingExposure:
    """One detector of one visit of a night folder, to be searched as one of `KINDS`; `part` is that of its night."""

    night: str
    visit: Visit
    detector: int
    science: str
    template: str
    kind: str
    part: str
    digest: int

    @property
    def title(self) -> str:
        """What it is, wherever its files lie."""
        return f"night_{self.night}_{self.visit.visit}_{self.detector}_{self.kind}"

    @property
    def name(self) -> str:
        return f"{self.title}_{self.digest:08x}"


class TrainingNights(NamedTuple):
    """What there is to search, in order of folder, time and detector, and what cannot be."""

    exposures: tuple[TrainingExposure, ...]
    problems: tuple[FailureRecord, ...]


class LabelExposures(beam.PTransform):
    """Subtract, search and label exposures of real nights.

    Input: TrainingExposure. Output `good`: (TrainingExposure, LabelledSources); `failed`: FailureRecord of those that
    could not be searched. What repeats is not known yet: see `without_repeated`. Order: as it comes; the same exposure
    gives the same bytes. No state.
    """

    def expand(self, exposures: beam.PCollection) -> Any:
        return exposures | "LabelExposure" >> beam.ParDo(_LabelExposureFn()).with_outputs(FAILED, main="good")


class _LabelExposureFn(beam.DoFn):
    def setup(self) -> None:
        threadpool_limits(1)

    def process(self, exposure: TrainingExposure) -> Iterator[Any]:
        try:
            yield exposure, label_exposure(exposure)
        except Exception as error:  # whatever one detector's pixels do must not stop the others
            yield beam.pvalue.TaggedOutput(FAILED, _problem(exposure.visit.visit, exposure.detector, error))


def _problem(visit: int | None, detector: int | None, error: Exception) -> FailureRecord:
    return FailureRecord(visit, detector, "training", type(error).__name__, str(error), lost="its part in the training")


# --- which exposures -------------------------------------------------------------------------------------------------


class _Listed(NamedTuple):
    visit: Visit
    images: DetectorImages
    field: int


def training_nights(folders: Sequence[Path]) -> TrainingNights:
    """Exposures of night folders, whole nights of an instrument in one part of the data each.

    Raises
    ------
    TrainingNightError
        A folder is no night folder, two have one name, or one has nothing that could be labelled.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise TrainingNightError(f"night folders must have names of their own, got {', '.join(names)}")
    problems: list[FailureRecord] = []
    listed = {name: _listed(folder, problems) for name, folder in zip(names, folders, strict=True)}
    nights = sorted({_night_of(one.visit) for group in listed.values() for one in group})
    parts = {night: _PARTS[number % len(_PARTS)] for number, night in enumerate(nights)}
    exposures = []
    for name, group in listed.items():
        of_folder = list(_exposures_of(name, group, parts))
        if not of_folder:
            raise TrainingNightError(
                f"{name}: of {len(group)} exposures no field is in {LEAST_VISITS} visits and none twice in a night: "
                "what is bogus cannot be told"
            )
        exposures += of_folder
    return TrainingNights(tuple(exposures), tuple(problems))


def _night_of(visit: Visit) -> tuple[str, int]:
    return visit.instrument, visit.day_obs


def _listed(folder: Path, problems: list[FailureRecord]) -> list[_Listed]:
    """Exposures that have a template and a readable header, each with the number of its field."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        raise TrainingNightError(str(error)) from error
    problems += [
        FailureRecord(one.visit, one.detector, "training", one.error, one.reason, one.lost) for one in manifest.problems
    ]
    listed: list[_Listed] = []
    fields: list[tuple[int, Any, tuple[int, int]]] = []  # detector, WCS and shape of the first of each
    n_detectors = 0
    for visit in manifest.visits:
        for images in visit.detectors:
            n_detectors += 1
            if images.template is None:
                continue
            try:
                wcs, shape = read_grid(images.science)
                read_grid(images.template)
            except ExposureError as error:
                problems.append(_problem(visit.visit, images.detector, error))
                continue
            centre = wcs.all_pix2world((shape[1] - 1) / 2.0, (shape[0] - 1) / 2.0, 0)
            known = (
                number
                for number, (detector, first_wcs, first_shape) in enumerate(fields)
                if detector == images.detector and _is_on(first_wcs, first_shape, centre)
            )
            field = next(known, len(fields))
            if field == len(fields):
                fields.append((images.detector, wcs, shape))
            listed.append(_Listed(visit, images, field))
    if not listed:
        raise TrainingNightError(
            f"{folder}: of {n_detectors} detectors none has a template and a readable image"
            + (f" ({problems[-1].reason})" if problems else ": 'nightstream templates attach' gives it one")
        )
    return listed


def _is_on(wcs: Any, shape: tuple[int, int], sky: Any) -> bool:
    try:
        x, y = wcs.all_world2pix(*sky, 0)
    except ValueError:  # a distortion without an inverse: far off
        return False
    return bool(0 <= x <= shape[1] - 1 and 0 <= y <= shape[0] - 1)


def _exposures_of(
    name: str, listed: Sequence[_Listed], parts: dict[tuple[str, int], str]
) -> Iterator[TrainingExposure]:
    visits_of: dict[int, set[int]] = {}
    for one in listed:
        visits_of.setdefault(one.field, set()).add(one.visit.visit)
    for number, one in enumerate(listed):
        pairs = {}
        if len(visits_of[one.field]) >= LEAST_VISITS:
            pairs["as_is"] = one.images.science, str(one.images.template)
            pairs["swapped"] = str(one.images.template), one.images.science
        following = (
            other.images.science
            for other in listed[number + 1 :]
            if other.field == one.field and _night_of(other.visit) == _night_of(one.visit)
            and other.visit.band == one.visit.band
        )  # fmt: skip
        partner = next(following, None)
        if partner is not None:
            pairs["same_night"] = one.images.science, partner
        for kind, (science, template) in pairs.items():
            yield TrainingExposure(
                night=name,
                visit=one.visit,
                detector=one.images.detector,
                science=science,
                template=template,
                kind=kind,
                part=parts[_night_of(one.visit)],
                digest=_digest(science, template),
            )


def _digest(*paths: str) -> int:
    """Of the names and times of files: what has changed is searched anew."""
    return zlib.crc32("|".join(f"{path} {Path(path).stat().st_mtime_ns}" for path in paths).encode())


# --- one exposure ----------------------------------------------------------------------------------------------------


def label_exposure(wanted: TrainingExposure) -> LabelledSources:
    """Detections of an exposure as it is, class bogus, and of what was injected into it, with their classes.

    Raises
    ------
    ValueError
        The exposure cannot be read, injected into or subtracted; the message says why.
    """
    first, second = read_exposure(wanted.science), read_exposure(wanted.template)
    clean = _searched(wanted, first, second)
    rows = np.zeros(np.count_nonzero(clean.kept), dtype=LABELLED_DTYPE)
    records = clean.records[clean.kept]
    rows["true_snr"], rows["good_pixels"] = np.nan, True
    for name in ("snr", "x", "y", "ra", "dec"):
        rows[name] = records[name]
    injected = inject(first, second, zlib.crc32(wanted.title.encode()))
    scale_deg = np.sqrt(np.abs(np.linalg.det(first.wcs.pixel_scale_matrix)))
    rows["near_deg"] = scale_deg * max(_LEAST_SAME_PLACE_PIX, _SAME_PLACE_FWHM * injected.fwhm_pix)
    with_fakes = _searched(wanted, injected.first, injected.second)
    records = with_fakes.records[with_fakes.kept]
    found = label(
        records["x"], records["y"], records["snr"], np.sign(records["psfFlux"]), injected.truth, injected.fwhm_pix
    )
    real = found["class_index"] > 0
    return LabelledSources(
        np.concatenate([rows, found[real]]),
        np.concatenate([clean.features[clean.kept], with_fakes.features[with_fakes.kept][real]]),
    )


def _searched(wanted: TrainingExposure, first: Exposure, second: Exposure) -> SearchedSources:
    grid = wcs_coordinate_grid(first.wcs, second.wcs, first.image.shape)
    exposure = subtract_exposures(wanted.visit, wanted.detector, first, second, grid, SubtractionConfig())
    return search(exposure, DetectionConfig())


class InjectedPair(NamedTuple):
    """Two images of one field with sources injected, the truth as of a simulated pair, and the wider FWHM in pixels."""

    first: Exposure
    second: Exposure
    truth: np.ndarray
    fwhm_pix: float


def inject(first: Exposure, second: Exposure, seed: int) -> InjectedPair:
    """Inject what appears into the first image and what vanishes into the second.

    Transients anywhere and around extended sources, changes of stars of either sign, trails, and points that vanish;
    S/N even in log S/N from 4 to 200, of stars up to half of their flux. Each has the PSF that its image has there
    (measured on its stars; where these are too few, the one it came with) and brings its photon noise.

    Raises
    ------
    PsfEstimationError, BackgroundError : the images do not allow it
    """
    stream = random_stream(seed, Purpose.INJECTIONS)
    bad = [(one.mask & mask_bits(*_UNUSABLE)) != 0 for one in (first, second)]
    sky = [
        subtract_background(one.image, mask, _BACKGROUND_BOX_PIX).image
        for one, mask in zip((first, second), bad, strict=True)
    ]
    sources = detect_sources(*_finite(sky[0], first.variance, bad[0]))
    psfs = [
        _psf_of(one, *_finite(image, one.variance, mask))
        for one, image, mask in zip((first, second), sky, bad, strict=True)
    ]
    fwhm_pix = max(psf.fwhm_pix for psf in psfs)
    wanted = _places(stream, first, sources, psfs[0], fwhm_pix)
    second_x, second_y = _mapped(first, second, wanted["x"], wanted["y"])
    usable = _is_clear(bad[0], wanted["x"], wanted["y"], _EDGE_FWHM * fwhm_pix)
    usable &= _is_clear(bad[1], second_x, second_y, _EDGE_FWHM * fwhm_pix)
    wanted, second_x, second_y = wanted[usable], second_x[usable], second_y[usable]
    kept = far_apart(wanted["x"], wanted["y"], max(_LEAST_APART_PIX, _APART_FWHM * fwhm_pix))
    truth, second_x, second_y = wanted[kept].copy(), second_x[kept], second_y[kept]
    per_light = [
        variance_per_light(image, one.variance, ~mask)
        for one, image, mask in zip((first, second), sky, bad, strict=True)
    ]
    light = [np.zeros(image.shape) for image in sky]
    for row, x, y in zip(truth, second_x, second_y, strict=True):
        image, at = (0, (row["x"], row["y"])) if row["snr"] > 0.0 else (1, (x, y))
        noise = local_variance(first.variance, row["x"], row["y"]) + local_variance(second.variance, x, y)
        source = unit_source(psfs[image], *at, row["dx"], row["dy"])
        unit = unit_of_snr(unit_source(psfs[0], row["x"], row["y"], row["dx"], row["dy"]), noise)
        snr = row["snr"]
        if row["kind"] == "variable":
            snr = np.sign(snr) * min(abs(snr), _MOST_CHANGE * row["flux"] / unit)
        size = abs(snr) * unit
        add_source(light[image], source, size)
        row["flux"], row["snr"] = np.sign(snr) * size, size / np.sqrt(unit**2 + per_light[image] * size)
    filled = [
        Exposure(
            *with_light(one.image, one.variance, added, ratio, stream),
            mask=one.mask,
            wcs=one.wcs,
            psf=one.psf,
            notes=one.notes,
            interpolated=one.interpolated,
        )
        for one, added, ratio in zip((first, second), light, per_light, strict=True)
    ]
    return InjectedPair(filled[0], filled[1], truth, fwhm_pix)


def _finite(image: np.ndarray, variance: np.ndarray, bad: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.where(bad, np.float32(0.0), image), np.where(bad, np.float32(1.0), variance), bad


def _psf_of(exposure: Exposure, image: np.ndarray, variance: np.ndarray, bad: np.ndarray) -> PsfModel:
    try:
        return fit_psf_model(image, variance, bad)
    except PsfEstimationError:
        if exposure.psf is None:
            raise
        return constant_psf(exposure.psf, (image.shape[0], image.shape[1]))


def _places(
    stream: np.random.Generator, first: Exposure, sources: DetectedSources, psf: PsfModel, fwhm_pix: float
) -> np.ndarray:
    """Rows of the truth that are wished for, in random order; `snr` has the sign, a variable's `flux` is the star's."""
    ny, nx = first.image.shape
    n_wanted = min(round(ny * nx / (_SPACING_FWHM * fwhm_pix) ** 2), _MOST_INJECTED)
    kinds = stream.choice(list(_CLASS_SHARES), size=n_wanted, p=list(_CLASS_SHARES.values()))
    rows = np.zeros(n_wanted, dtype=TRUTH_DTYPE)
    rows["kind"], rows["good_pixels"] = kinds, True
    rows["x"], rows["y"] = stream.uniform(0.0, nx - 1.0, n_wanted), stream.uniform(0.0, ny - 1.0, n_wanted)
    rows["snr"] = _log_uniform(stream, _SNR_RANGE, n_wanted)
    rows["snr"][kinds == "vanished"] *= -1.0
    size = sources.half_light_radius_pix / _half_light_radius(psf.at_centre())
    good = sources.clean & (sources.snr > _LEAST_STAR_SNR)
    stars = np.flatnonzero(good & (size > _STAR_SIZES[0]) & (size < _STAR_SIZES[1]))
    hosts = np.flatnonzero(good & (size > _LEAST_HOST_SIZE))
    is_trail, varies, is_hosted = (np.flatnonzero(kinds == kind) for kind in ("trail", "variable", "in_host"))
    angle = stream.uniform(0.0, np.pi, is_trail.size)
    length = fwhm_pix * _log_uniform(stream, _TRAIL_FWHM, is_trail.size)
    rows["dx"][is_trail], rows["dy"][is_trail] = length * np.cos(angle), length * np.sin(angle)
    rows["kind"][is_hosted] = "transient"
    if hosts.size:
        chosen = stream.choice(hosts, is_hosted.size)
        spread = _HOST_SPREAD * sources.half_light_radius_pix[chosen]
        rows["x"][is_hosted] = sources.x[chosen] + spread * stream.standard_normal(chosen.size)
        rows["y"][is_hosted] = sources.y[chosen] + spread * stream.standard_normal(chosen.size)
        rows["in_host"][is_hosted] = True
    if stars.size:
        chosen = stream.choice(stars, varies.size)
        rows["x"][varies], rows["y"][varies] = sources.x[chosen], sources.y[chosen]
        rows["flux"][varies] = sources.flux[chosen]
        rows["snr"][varies] *= stream.choice([-1.0, 1.0], varies.size)
    else:
        rows["kind"][varies] = "transient"
    return rows


def _log_uniform(stream: np.random.Generator, interval: tuple[float, float], n: int) -> np.ndarray:
    return np.exp(stream.uniform(math.log(interval[0]), math.log(interval[1]), n))


def _half_light_radius(psf: np.ndarray) -> float:
    half = psf.shape[0] // 2
    radius = np.hypot(*np.mgrid[-half : half + 1, -half : half + 1]).ravel()
    order = np.argsort(radius, kind="stable")
    inside = np.cumsum(psf.ravel()[order])
    return float(radius[order][np.searchsorted(inside, 0.5 * inside[-1])])


def _mapped(first: Exposure, second: Exposure, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ra, dec = first.wcs.all_pix2world(x, y, 0)
    second_x, second_y = second.wcs.all_world2pix(ra, dec, 0)
    return np.asarray(second_x), np.asarray(second_y)


def _is_clear(bad: np.ndarray, x: np.ndarray, y: np.ndarray, edge_pix: float) -> np.ndarray:
    """Which places lie off the edge and have no bad pixel nearby."""
    ny, nx = bad.shape
    inside = (x > edge_pix) & (y > edge_pix) & (x < nx - 1 - edge_pix) & (y < ny - 1 - edge_pix)
    clear = inside.copy()
    for index in np.flatnonzero(inside):
        row, column = round(y[index]), round(x[index])
        near = np.s_[row - _CLEAR_PIX : row + _CLEAR_PIX + 1, column - _CLEAR_PIX : column + _CLEAR_PIX + 1]
        clear[index] = not bad[near].any()
    return clear


# --- what repeats ----------------------------------------------------------------------------------------------------


def without_repeated(
    found: Iterable[tuple[TrainingExposure, np.ndarray]],
) -> Iterator[tuple[TrainingExposure, np.ndarray]]:
    """Rows of exposures, what repeats being ambiguous.

    What was found without injection repeats if another visit of the same night folder, against its template, shows
    something at its place, of either sign. Pairs of the same night are no exception: most of what they show with a
    high score is at the places of stars that vary within hours.
    """
    found = list(found)
    for night in dict.fromkeys(exposure.night for exposure, _ in found):
        group = [(exposure, rows) for exposure, rows in found if exposure.night == night]
        seen = [(rows[_is_found(rows)], exposure) for exposure, rows in group if exposure.kind == "as_is"]
        visits = np.repeat([exposure.visit.visit for _, exposure in seen], [len(rows) for rows, _ in seen])
        tree = cKDTree(np.concatenate([_directions(rows) for rows, _ in seen])) if visits.size else None
        for exposure, rows in group:
            if tree is not None:
                rows = rows.copy()
                for index in np.flatnonzero(_is_found(rows)):
                    near = tree.query_ball_point(
                        _directions(rows[index : index + 1])[0], np.deg2rad(rows["near_deg"][index])
                    )
                    if np.any(visits[near] != exposure.visit.visit):
                        rows["class_index"][index] = AMBIGUOUS
            yield exposure, rows


def _is_found(rows: np.ndarray) -> np.ndarray:
    """Which rows were found without anything injected."""
    return np.isfinite(rows["ra"])


def _directions(rows: np.ndarray) -> np.ndarray:
    ra, dec = np.radians(rows["ra"]), np.radians(rows["dec"])
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)

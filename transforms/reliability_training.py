"""Labelled detections for the reliability: simulated pairs subtracted, searched and compared with their truth.

A pair is subtracted and searched by the very code that produces alerts, from raw counts on. What is injected is in the
counts before anything looks at them. Three kinds of pair show three kinds of what is not real:

- ``as_is``: science image against stacked template, what a night brings;
- ``swapped``: roles exchanged, so that each appearance is a disappearance, trails and movers included;
- ``same_night``: against a template of two exposures, shallow and of nearly the same seeing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from astropy.wcs import WCS
from threadpoolctl import threadpool_limits

from schemas.elements import FailureRecord
from schemas.exposures import Exposure, mask_bits
from schemas.manifests import DetectorImages, Visit
from transforms.detection import DetectionConfig, search
from transforms.failures import FAILED
from transforms.numerics.pair_simulation import REGIMES, PairImage, Regime, SimulatedPair, simulate_pair
from transforms.numerics.sky_simulation import Purpose, random_stream
from transforms.numerics.warping import CoordinateGrid, coordinate_grid
from transforms.subtraction import SubtractionConfig, subtract_exposures

KINDS = ("as_is", "swapped", "same_night")
# Beside the regimes that differencing is judged by, seeing that is wide in pixels, as small telescopes have it.
TRAINING_REGIMES = MappingProxyType(
    {**REGIMES, "wide": replace(REGIMES["lsst"], fwhm_science_pix=8.0, fwhm_template_pix=7.0, stars=400.0)}
)
CLASSES = ("bogus", "transient", "in_host", "variable", "mover", "trail", "negative")
AMBIGUOUS = -1
LABELLED_DTYPE = np.dtype(
    [
        ("class_index", "i2"),  # of CLASSES; AMBIGUOUS for what can't be labelled
        ("snr", "f4"),  # |S| at the peak
        ("true_snr", "f4"),  # NaN for bogus
        ("good_pixels", "?"),  # of the truth; true for bogus
        ("x", "f4"),
        ("y", "f4"),
        ("ra", "f8"),  # degrees; NaN for what is on no real sky
        ("dec", "f8"),
        ("near_deg", "f8"),  # nearer than this, two visits have found the same
    ]
)

_MATCH_FWHM, _LEAST_MATCH_PIX = 0.8, 2.0
_DOUBT_FWHM, _LEAST_DOUBT_PIX = 3.0, 8.0  # nearer than this to a change, nothing is surely bogus
_SNR_PART = (0.3, 2.0)  # measured over true S/N of a point source: else something else was found near it
_TRAIL_SNR_PART = (0.1, 2.0)  # a PSF sees part of a trail
_TROUBLE_RATE = 0.5
_NODE_STEP_PIX = 32
_MJD = 61367.0


@dataclass(frozen=True)
class TrainingPair:
    """One pair to simulate and search; `part` of the data: train, calibrate or test.

    Plain pairs have the densities of their regime, 20 vanished sources beside them. `varied` ones have more of the rare
    classes, up to S/N 300; seeing within 15 % of the regime's, up to three times its stars and galaxies; and each with
    probability one half an astrometric error up to 20 times the regime's, PSF ripples up to 4 times, a mask that does
    not know of cosmic rays; each with a quarter one without bad columns, one without saturation.
    """

    regime: str
    seed: int
    kind: str
    size_pix: int
    varied: bool
    part: str

    @property
    def name(self) -> str:
        return f"{self.regime}_{self.seed}_{self.kind}_{self.size_pix}{'_varied' if self.varied else ''}"


class LabelledSources(NamedTuple):
    """Detections of one pair: LABELLED_DTYPE rows and their features, (n, n_features) float32."""

    rows: np.ndarray
    features: np.ndarray


class LabelPairs(beam.PTransform):
    """Simulate, subtract, search and label pairs.

    Input: TrainingPair. Output `good`: (TrainingPair, LabelledSources); `failed`: FailureRecord of pairs that could not
    be searched. Order: as it comes; the same pair gives the same bytes. No state.
    """

    def expand(self, pairs: beam.PCollection) -> Any:
        return pairs | "LabelPair" >> beam.ParDo(_LabelPairFn()).with_outputs(FAILED, main="good")


class _LabelPairFn(beam.DoFn):
    def setup(self) -> None:
        threadpool_limits(1)

    def process(self, pair: TrainingPair) -> Iterator[Any]:
        try:
            yield pair, label_pair(pair)
        except ValueError as error:  # a pair that cannot be subtracted must not stop the others
            record = FailureRecord(pair.seed, 0, "training", type(error).__name__, str(error), lost=f"pair {pair.name}")
            yield beam.pvalue.TaggedOutput(FAILED, record)


def label_pair(wanted: TrainingPair) -> LabelledSources:
    """Detections of one pair with labels and features.

    Raises
    ------
    ValueError
        The pair cannot be simulated or subtracted; the message says why.
    """
    pair = simulate_pair(wanted.seed, _regime(wanted), wanted.size_pix)
    swapped = wanted.kind == "swapped"
    first, second = (pair.template, pair.science) if swapped else (pair.science, pair.template)
    x, y = coordinate_grid(pair.science.image.shape, _NODE_STEP_PIX)
    grid = CoordinateGrid(*second.mapping.to_pixels(*first.mapping.to_plane(x, y)), _NODE_STEP_PIX)
    visit, known, config = _visit(wanted.seed), _known_planes(wanted), SubtractionConfig()
    exposure = subtract_exposures(visit, 0, _as_exposure(first, known), _as_exposure(second, known), grid, config)
    searched = search(exposure, DetectionConfig())
    records = searched.records[searched.kept]
    truth = _swapped(pair) if swapped else pair.truth
    fwhm_pix = max(pair.regime.fwhm_science_pix, pair.regime.fwhm_template_pix)
    rows = label(records["x"], records["y"], records["snr"], _signs(searched)[searched.kept], truth, fwhm_pix)
    return LabelledSources(rows, searched.features[searched.kept])


def label(
    x: np.ndarray, y: np.ndarray, snr: np.ndarray, sign: np.ndarray, truth: np.ndarray, fwhm_pix: float
) -> np.ndarray:
    """What each detection is, by the truth.

    Real is what lies within 0.8 FWHM of a change (for a trail, of its line), has its sign, and a S/N of 0.3 to
    2 times its own. What lies within 3 FWHM of a change and is not real is ambiguous, as is everything at a star that
    moved. The rest is bogus.

    Parameters
    ----------
    x, y, snr, sign : (n,) of the detections, pixels; snr > 0
    truth : rows as `SimulatedPair.truth`
    fwhm_pix : the wider of the two images

    Returns
    -------
    (n,) LABELLED_DTYPE
    """
    rows = np.zeros(x.size, dtype=LABELLED_DTYPE)
    rows["snr"], rows["x"], rows["y"] = snr, x, y
    for name in ("true_snr", "ra", "dec", "near_deg"):
        rows[name] = np.nan
    rows["good_pixels"] = True
    match_pix = max(_LEAST_MATCH_PIX, _MATCH_FWHM * fwhm_pix)
    doubt_pix = max(_LEAST_DOUBT_PIX, _DOUBT_FWHM * fwhm_pix)
    for source in truth:
        distance = _distance(source, x, y)
        is_trail = source["kind"] == "trail"
        least, most = _TRAIL_SNR_PART if is_trail else _SNR_PART
        is_it = (distance < match_pix) & (sign == np.sign(source["flux"])) & (source["kind"] != "proper_motion")
        is_it &= (snr > least * source["snr"]) & (snr < most * source["snr"])
        candidates = np.flatnonzero(is_it)
        if candidates.size and not is_trail:  # pieces of a trail are all real
            candidates = candidates[[np.argmin(distance[candidates])]]
        doubtful = (distance < doubt_pix) & (rows["class_index"] == 0)
        rows["class_index"][doubtful] = AMBIGUOUS
        if candidates.size:
            rows["class_index"][candidates] = CLASSES.index(_class_of(source))
        rows["true_snr"][candidates] = source["snr"]
        rows["good_pixels"][candidates] = source["good_pixels"]
    return rows


def _class_of(source: np.void) -> str:
    if source["kind"] == "variable":
        return "variable"
    if source["flux"] < 0.0:
        return "negative"
    if source["in_host"]:
        return "in_host"
    return str(source["kind"]) if source["kind"] in CLASSES else "transient"


def _distance(source: np.void, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to a point source, to the line of a trail, or to the path of a star that moved."""
    start, stop = {"trail": (-0.5, 0.5), "proper_motion": (-1.0, 0.0)}.get(str(source["kind"]), (0.0, 0.0))
    length2 = max(source["dx"] ** 2 + source["dy"] ** 2, 1e-12)
    off_x, off_y = x - source["x"], y - source["y"]
    along = np.clip((off_x * source["dx"] + off_y * source["dy"]) / length2, start, stop)
    return np.asarray(np.hypot(off_x - along * source["dx"], off_y - along * source["dy"]))


def _regime(wanted: TrainingPair) -> Regime:
    """The regime as it is, but for what is missing in it, or varied around it: see `TrainingPair`."""
    regime = TRAINING_REGIMES[wanted.regime]
    stream = _stream(wanted, 0)
    if wanted.varied:
        seeing_science, seeing_template = np.exp(stream.uniform(-0.15, 0.15, 2))
        jitter, ripple = 10.0 ** (stream.uniform(0.0, 1.3, 2) * (stream.uniform(size=2) < _TROUBLE_RATE))
        crowding, clustering = 10.0 ** stream.uniform(0.0, 0.5, 2)
        regime = replace(
            regime,
            fwhm_science_pix=regime.fwhm_science_pix * float(seeing_science),
            fwhm_template_pix=regime.fwhm_template_pix * float(seeing_template),
            jitter_pix=regime.jitter_pix * float(jitter),
            psf_ripple=regime.psf_ripple * float(np.sqrt(ripple)),
            shape_ripple=regime.shape_ripple * float(np.sqrt(ripple)),
            stars=regime.stars * float(crowding),
            galaxies=regime.galaxies * float(clustering),
            transients=50.0,
            variables=40.0,
            movers=15.0,
            trails=20.0,
            vanished=30.0,
            most_snr=300.0,
        )
    else:
        regime = replace(regime, vanished=20.0)
    if wanted.kind == "as_is":
        return regime
    # Roles exchanged, the template's seeing must not be much poorer than the science image's.
    least, most, n_stacked = (0.0, 0.25, regime.n_stacked) if wanted.kind == "swapped" else (-0.1, 0.1, 2)
    fwhm_pix = regime.fwhm_science_pix * float(np.exp(stream.uniform(least, most)))
    return replace(regime, n_stacked=n_stacked, fwhm_template_pix=fwhm_pix)


def _known_planes(wanted: TrainingPair) -> list[str]:
    """Which defects the science image's mask knows of: files without a mask are allowed."""
    planes = ["BAD", "SAT", "CR"]
    lost = _stream(wanted, 1).uniform(size=len(planes)) < _TROUBLE_RATE * np.array([0.5, 0.5, 1.0])
    return [plane for plane, is_lost in zip(planes, lost, strict=True) if not (wanted.varied and is_lost)]


def _stream(wanted: TrainingPair, number: int) -> np.random.Generator:
    return random_stream(wanted.seed, Purpose.TRAINING, zlib.crc32(wanted.name.encode()), number)


def _swapped(pair: SimulatedPair) -> np.ndarray:
    """The truth where the template is the science image: in its pixels, with signs exchanged."""
    truth = pair.truth.copy()
    u, v = pair.science.mapping.to_plane(truth["x"], truth["y"])
    truth["x"], truth["y"] = pair.template.mapping.to_pixels(u, v)
    truth["flux"] *= -1.0
    return truth


def _signs(searched: Any) -> np.ndarray:
    return np.asarray(np.sign(searched.records["psfFlux"]))


def _as_exposure(image: PairImage, known_planes: list[str]) -> Exposure:
    planes = {"BAD": image.bad, "SAT": image.saturated, "CR": image.cosmic_ray}
    mask = np.zeros(image.image.shape, dtype=np.int32)
    for plane in known_planes:
        mask[planes[plane]] |= np.int32(mask_bits(plane))
    return Exposure(image.image, image.variance, mask, _nominal_wcs(image.image.shape), psf=None)


def _nominal_wcs(shape: tuple[int, ...]) -> WCS:
    """Somewhere on the sky: records have positions, which no feature looks at."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [0.0, 0.0], [shape[1] / 2.0, shape[0] / 2.0]
    wcs.wcs.cd = np.diag([-0.2, 0.2]) / 3600.0
    return wcs


def _visit(seed: int) -> Visit:
    return Visit(
        visit=seed + 1,
        day_obs=20261122,
        seq_num=1,
        instrument="SimCam",
        band="r",
        midpoint_mjd_tai=_MJD,
        exposure_time_s=30.0,
        readout_end_mjd_tai=_MJD,
        boresight_ra_deg=0.0,
        boresight_dec_deg=0.0,
        rotation_deg=0.0,
        observation_reason=None,
        target_name=None,
        detectors=(DetectorImages(0, "", None),),
    )

"""SAAO 1.0 m frames (flat-fielded, no WCS, no zero point, no mask) into a night folder.

Frames are registered by their stars to the best of them. That frame gets a nominal TAN WCS from the pointing in its
header; the others get the same WCS composed with their affine transformation, which a CD matrix and CRPIX express
exactly. So positions agree between frames to the accuracy of the registration, and with the sky to that of the
pointing. Zero points are relative to the same frame, measured on the stars, on a nominal scale. PSFs are measured on
the stars that stand alone in the template, the same in all frames: in one frame of a crowded field blends look like
stars.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from runners.ingest.night_folder import (
    IngestedNight,
    IngestError,
    Progress,
    Refusal,
    RefusedInput,
    claim_folder,
    finish_folder,
    number_visits,
    tai_of_utc_mjd,
    watched,
)
from schemas.exposures import AB_ZERO_POINT_NJY, Exposure, mask_bits, write_exposure
from schemas.manifests import DetectorImages, Visit
from transforms.numerics.background import subtract_background
from transforms.numerics.image_stacking import ExposureToStack, StackingError, affine_grid, find_hits, stack_on_grid
from transforms.numerics.psf_modelling import DetectedSources, PsfEstimationError, estimate_psf
from transforms.numerics.registration import Registration, RegistrationError, StarList, find_stars, register

OBSERVATORY = "K94"  # Sutherland
PIXEL_SCALE_ARCSEC = 0.31
NOMINAL_ZERO_POINT = 25.0  # of 1 adu in the whole exposure of the first of the template's frames
BANDS_OF_FILTERS = {58: "i"}  # cards give a number per pair of filters: 58 is Cousins I
SATURATION_ADU = 60_000.0  # frames are clipped near 65,300 after the flat field
TEMPLATE_FRAMES = 10
_SKY_LIMIT = 1.5  # of the median sky: brighter frames are not for the template
_BACKGROUND_BOX_PIX = 128
_MIN_TEMPLATE_FRAMES = 3
_EDGE_PIX = 4
_SATURATION_GROWTH_PIX = 2
_BLEED_SIGMA = 4.0
_BLEED_OFFSET_PIX = 6
_BLEED_GAP_PIX = 5
_HOT_PART = 0.3  # of the frames in which a pixel is a hit before it is taken as hot
_LEAST_SIDE_PIX = 128
_ALONE_FWHM = 3.0  # no star of a tenth of the flux or more within this distance
_ALONE_FLUX_RATIO = 0.1
_NEAR_BAD_PIX = 5
_NOMINAL_CARDS = {
    "WCSNOM": (True, "nominal: pointing, scale and angle assumed"),
    "ZPNOM": (True, "nominal: relative to the template only"),
}


@dataclass(frozen=True, eq=False)
class _Frame:
    """One frame as it comes, in adu."""

    name: str
    pixels: NDArray[np.float32]
    gain: float
    read_noise_e: float
    ra_deg: float
    dec_deg: float
    band: str
    instrument: str
    target: str
    start_mjd_utc: float
    exposure_time_s: float
    saturated: NDArray[np.bool_]

    @property
    def variance(self) -> NDArray[np.float32]:
        electrons = np.maximum(self.pixels, 0.0) * self.gain
        return np.asarray((electrons + self.read_noise_e**2) / self.gain**2, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class _RegisteredFrame:
    frame: _Frame
    stars: StarList
    registration: Registration  # from the pixels of the common frame to those of this one
    hits: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Template:
    """What the written template tells: how many frames are in it, and which of its stars stand alone."""

    n_stacked: int
    x: NDArray[np.float64]  # of these stars, pixels of the common frame
    y: NDArray[np.float64]
    flux: NDArray[np.float64]  # adu of the common frame


def ingest_saao(source: Path, out: Path, progress: Progress | None = None) -> IngestedNight:
    """Ingest a folder of SAAO frames (searched for .fits, .fits.fz and .fits.gz below it).

    Parameters
    ----------
    source : Path
        Folder of frames of one field in one band.
    out : Path
        Night folder to write.
    progress : callable, optional
        Called with (what, done, all).

    Returns
    -------
    IngestedNight
        Frames that cannot be read or registered are in `refused`.

    Raises
    ------
    IngestError
        No frames there, too few for a template, or `out` holds something else.
    """
    paths = _frame_paths(source)
    claim_folder(out)
    refused: list[Refusal] = []
    frames = _read_frames(paths, refused, progress)
    registered = _register_frames(frames, refused, progress)
    hot = _hot_pixels([one.hits for one in registered])
    template_path = out / "templates" / f"{registered[0].frame.band}_000.fits"
    template = _write_template(registered, hot, template_path)
    visits, n_without_psf = [], 0
    names = [one.frame.name for one in registered]
    for name, one in zip(watched(names, "writing", progress), registered, strict=False):
        path = out / "science" / f"{_stem(name)}.fits"
        exposure, zero_point = _science_exposure(one, registered[0], hot, template)
        n_without_psf += exposure.psf is None
        write_exposure(path, exposure, header=_cards(one.frame, zero_point))
        visits.append(_visit(one.frame, exposure, path, template_path))
    numbered = number_visits(visits)
    notes = (
        f"registered to {registered[0].frame.name}",
        f"template: clipped mean of {template.n_stacked} frames, the sharpest with a sky below {_SKY_LIMIT} medians",
        f"nominal WCS: pointing of the header, {PIXEL_SCALE_ARCSEC} arcsec a pixel, north up, east left",
        f"nominal zero point: {NOMINAL_ZERO_POINT} for 1 adu of {registered[0].frame.name}",
        f"PSF: measured on stars that stand alone in the template; {n_without_psf} frames have too few of them",
    )
    night = IngestedNight(
        folder=out,
        instrument=registered[0].frame.instrument,
        visits=len(numbered),
        detectors=len(numbered),
        templates=1,
        refused=tuple(sorted(refused)),
        notes=notes,
    )
    return finish_folder(night, numbered)


def _frame_paths(source: Path) -> list[Path]:
    if not source.is_dir():
        raise IngestError(f"{source} is not a folder of frames")
    endings = (".fits", ".fits.fz", ".fits.gz", ".fit", ".fts")
    paths = sorted(path for path in source.rglob("*") if path.name.lower().endswith(endings) and path.is_file())
    if not paths:
        raise IngestError(f"no FITS files in {source}")
    return paths


def _stem(name: str) -> str:
    return name.split(".fit", maxsplit=1)[0]


def _read_frames(paths: list[Path], refused: list[Refusal], progress: Progress | None) -> list[_Frame]:
    by_name: dict[str, Path] = {}
    for path in paths:
        if path.name in by_name or _stem(path.name) in {_stem(name) for name in by_name}:
            refused.append(Refusal(str(path), f"another file of the name {_stem(path.name)} was ingested"))
        else:
            by_name[path.name] = path
    frames: list[_Frame] = []
    for name in watched(list(by_name), "reading", progress):
        try:
            frames.append(_read_frame(by_name[name]))
        except RefusedInput as error:
            refused.append(Refusal(name, str(error)))
    if not frames:
        raise IngestError(f"none of {len(paths)} frames can be read; {refused[0].source}: {refused[0].reason}")
    first = frames[0]
    alike = []
    for frame in frames:
        if (frame.band, frame.instrument, frame.pixels.shape) == (first.band, first.instrument, first.pixels.shape):
            alike.append(frame)
        else:
            found = f"{frame.instrument}, band {frame.band}, shape {frame.pixels.shape}"
            wanted = f"{first.instrument}, band {first.band}, shape {first.pixels.shape}"
            refused.append(Refusal(frame.name, f"{found}; the first frame is of {wanted}"))
    return alike


def _read_frame(path: Path) -> _Frame:
    try:
        with fits.open(path, memmap=False) as hdus:
            image = next((hdu for hdu in hdus if hdu.is_image and hdu.header.get("NAXIS", 0) == 2), None)
            if image is None:
                raise RefusedInput("no two-dimensional image in the file")
            pixels, header = np.array(image.data, dtype=np.float32), image.header
    except RefusedInput:
        raise
    except Exception as error:  # astropy raises many kinds on broken bytes
        raise RefusedInput(f"broken FITS file: {type(error).__name__}: {error}") from error
    if min(pixels.shape) < _LEAST_SIDE_PIX:
        raise RefusedInput(f"shape {pixels.shape}: at least {_LEAST_SIDE_PIX} x {_LEAST_SIDE_PIX} pixels are needed")
    if not np.isfinite(pixels).any() or np.nanmin(pixels) == np.nanmax(pixels):
        raise RefusedInput("all pixels have the same value, or none is finite")
    filters = header.get("FILTERS")
    if filters not in BANDS_OF_FILTERS:
        raise RefusedInput(f"FILTERS is {filters!r}, known are {sorted(BANDS_OF_FILTERS)}")
    exposure_time_s = _card(header, "EXPTIME")
    if exposure_time_s <= 0:
        raise RefusedInput(f"EXPTIME must be positive, got {exposure_time_s}")
    gain = _card(header, "GAIN")
    if gain <= 0:
        raise RefusedInput(f"GAIN must be positive, got {gain}")
    read_noise_e = _card(header, "RDNOISE")
    start_mjd_utc = _card(header, "MJD-OBS")
    tai_of_utc_mjd(start_mjd_utc)
    dec_deg = _card(header, "DEC_OBS")
    if not -90 <= dec_deg <= 90:
        raise RefusedInput(f"DEC_OBS {dec_deg} is outside [-90, 90]")
    saturated = _saturated_pixels(pixels, gain, read_noise_e)
    return _Frame(
        name=path.name,
        pixels=pixels,
        gain=gain,
        read_noise_e=read_noise_e,
        ra_deg=_card(header, "RA_OBS") % 360.0,
        dec_deg=dec_deg,
        band=BANDS_OF_FILTERS[filters],
        instrument=str(header.get("INSTRUME", "")).strip() or "unknown",
        target=str(header.get("OBJECT", "")).strip() or "unknown",
        start_mjd_utc=start_mjd_utc,
        exposure_time_s=exposure_time_s,
        saturated=saturated,
    )


def _card(header: fits.Header, name: str) -> float:
    value = header.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise RefusedInput(f"card {name} must be a finite number, got {value!r}")
    return float(value)


def _saturated_pixels(pixels: NDArray[np.float32], gain: float, read_noise_e: float) -> NDArray[np.bool_]:
    """Saturated cores, grown by 2 pixels, and the charge that bleeds from them along rows."""
    cores = pixels >= SATURATION_ADU
    growth = _SATURATION_GROWTH_PIX
    saturated = ndimage.binary_dilation(cores, np.ones((3, 3), dtype=bool), iterations=growth)
    if not cores.any():
        return np.asarray(cores)
    # a bleeding row is brighter than the rows on both sides of it
    padded = np.pad(pixels, ((_BLEED_OFFSET_PIX, _BLEED_OFFSET_PIX), (0, 0)), mode="edge")
    above, below = padded[: -2 * _BLEED_OFFSET_PIX], padded[2 * _BLEED_OFFSET_PIX :]
    excess = ndimage.uniform_filter1d(pixels - np.maximum(above, below), _BLEED_GAP_PIX, axis=1)
    sky_electrons = max(float(np.nanmedian(pixels)) * gain, 0.0)
    noise = np.sqrt((sky_electrons + read_noise_e**2) / _BLEED_GAP_PIX) / gain
    bleeds = excess > _BLEED_SIGMA * noise
    for row, column in np.argwhere(saturated & ndimage.maximum_filter(cores, (3, 2 * growth + 1))):
        for step in (-1, 1):
            x = column + step
            while 0 <= x < pixels.shape[1] and not saturated[row, x] and bleeds[row, x]:
                saturated[row, x] = True
                x += step
    return np.asarray(saturated)


def _register_frames(frames: list[_Frame], refused: list[Refusal], progress: Progress | None) -> list[_RegisteredFrame]:
    """Registered frames in order of fitness for the template, the one that all are registered to first."""
    by_name = {frame.name: frame for frame in frames}
    stars: dict[str, StarList] = {}
    for name in watched(list(by_name), "finding stars", progress):
        try:
            stars[name] = find_stars(by_name[name].pixels, by_name[name].saturated)
        except RegistrationError as error:
            refused.append(Refusal(name, str(error)))
    if len(stars) < _MIN_TEMPLATE_FRAMES:
        raise IngestError(f"stars are found in {len(stars)} frames, {_MIN_TEMPLATE_FRAMES} are needed for a template")
    median_sky = float(np.median([one.sky for one in stars.values()]))
    ordered = sorted(stars, key=lambda name: (stars[name].sky > _SKY_LIMIT * median_sky, stars[name].fwhm_pix, name))
    registered = []
    for name in watched(ordered, "registering", progress):
        try:
            registration = register(stars[ordered[0]], stars[name])
        except RegistrationError as error:
            refused.append(Refusal(name, f"not registered to {ordered[0]}: {error}"))
            continue
        frame = by_name[name]
        sky = subtract_background(frame.pixels, frame.saturated, _BACKGROUND_BOX_PIX)
        registered.append(
            _RegisteredFrame(frame, stars[name], registration, find_hits(sky.image, frame.variance, frame.saturated))
        )
    if len(registered) < _MIN_TEMPLATE_FRAMES:
        raise IngestError(f"{len(registered)} frames are registered, {_MIN_TEMPLATE_FRAMES} are needed for a template")
    return registered


def _hot_pixels(hits: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Pixels that are hit again and again stand on the detector, not on the sky."""
    part = np.mean(hits, axis=0)
    return np.asarray((part > _HOT_PART) & (len(hits) >= 5))


def _write_template(registered: list[_RegisteredFrame], hot: NDArray[np.bool_], path: Path) -> _Template:
    """Clipped mean of the best frames on the union of their pixels."""
    chosen = registered[:TEMPLATE_FRAMES]
    ny, nx = chosen[0].frame.pixels.shape
    corners = np.array([[0, 0], [nx - 1, 0], [0, ny - 1], [nx - 1, ny - 1]], dtype=np.float64)
    inside = np.concatenate([_to_common(one.registration.affine, corners) for one in chosen])
    first = np.floor(inside.min(axis=0)).astype(int)
    shape = tuple(int(side) for side in (np.ceil(inside.max(axis=0)).astype(int) - first + 1)[::-1])
    exposures = (
        ExposureToStack(
            image=one.frame.pixels,
            variance=one.frame.variance,
            saturated=one.frame.saturated,
            bad=one.hits | hot,
            grid=affine_grid(one.registration.affine, (shape[0], shape[1]), (first[0], first[1])),
            flux_ratio=one.registration.flux_ratio,
            fwhm_pix=one.stars.fwhm_pix,
        )
        for one in chosen
    )
    try:
        stack = stack_on_grid(
            exposures,
            (shape[0], shape[1]),
            min_exposures=min(_MIN_TEMPLATE_FRAMES, len(chosen)),
            background_box_pix=_BACKGROUND_BOX_PIX,
        )
    except StackingError as error:
        raise IngestError(f"no template: {error}") from error
    mask = np.where(np.isfinite(stack.image), 0, mask_bits("NO_DATA")).astype(np.int32)
    mask[stack.saturated] |= mask_bits("SAT")
    scale = np.float32(10.0 ** (0.4 * (AB_ZERO_POINT_NJY - NOMINAL_ZERO_POINT)))
    to_template = np.array([[1.0, 0.0, -first[0]], [0.0, 1.0, -first[1]]])
    stars = _stars_alone(stack.image, mask != 0)
    template = _Template(len(chosen), stars.x + first[0], stars.y + first[1], stars.flux)
    psf = _psf(stack.image, stack.variance, mask != 0, template, to_template, stars)
    exposure = Exposure(
        image=stack.image * scale,
        variance=stack.variance * scale**2,
        mask=mask,
        wcs=_nominal_wcs(registered[0], to_template),
        psf=psf,
        interpolated=stack.interpolated,
    )
    write_exposure(path, exposure, header=_NOMINAL_CARDS | {"NFRAMES": len(chosen)})
    return template


def _stars_alone(image: NDArray[np.floating], bad: NDArray[np.bool_]) -> StarList:
    """The stars of the template without another star near them that is not much fainter."""
    try:
        stars = find_stars(image, bad)
    except RegistrationError as error:
        raise IngestError(f"no stars in the template: {error}") from error
    positions = np.column_stack((stars.x, stars.y))
    near = cKDTree(positions).query_ball_point(positions, _ALONE_FWHM * stars.fwhm_pix)
    brightest_other = np.array([max((stars.flux[j] for j in js if j != i), default=0.0) for i, js in enumerate(near)])
    alone = brightest_other < _ALONE_FLUX_RATIO * stars.flux
    return replace(stars, x=stars.x[alone], y=stars.y[alone], flux=stars.flux[alone])


def _psf(
    image: NDArray[np.floating],
    variance: NDArray[np.floating],
    bad: NDArray[np.bool_],
    template: _Template,
    affine: NDArray[np.float64],
    stars: StarList,
    flux_ratio: float = 1.0,
) -> NDArray[np.float64] | None:
    """PSF of an image without sky from the template's stars, brought there by an affine; None if too few are on it."""
    x, y = affine[:, :2] @ np.stack((template.x, template.y)) + affine[:, 2:]
    ny, nx = bad.shape
    column, row = np.rint(x).astype(np.intp), np.rint(y).astype(np.intp)
    inside = (column >= 0) & (row >= 0) & (column < nx) & (row < ny)
    near_bad = ndimage.maximum_filter(bad, _NEAR_BAD_PIX)
    clean = inside & ~near_bad[np.clip(row, 0, ny - 1), np.clip(column, 0, nx - 1)]
    noise = stars.sky_rms * np.sqrt(np.pi) * stars.fwhm_pix
    sources = DetectedSources(
        x=x,
        y=y,
        flux=template.flux,
        snr=template.flux * flux_ratio / noise,
        half_light_radius_pix=np.full(len(x), 0.5 * stars.fwhm_pix),
        ellipticity=np.zeros(len(x)),
        clean=clean,
    )
    try:
        return estimate_psf(np.where(bad, 0.0, image), variance, bad, sources).psf
    except PsfEstimationError:
        return None


def _to_common(affine: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (n, 2) of a frame's pixels in the pixels of the common frame."""
    return np.asarray((points - affine[:, 2]) @ np.linalg.inv(affine[:, :2]).T)


def _nominal_wcs(common: _RegisteredFrame, affine: NDArray[np.float64]) -> WCS:
    """TAN of the common frame composed with an affine transformation from its pixels to those of an image."""
    ny, nx = common.frame.pixels.shape
    centre = np.array([(nx - 1) / 2.0, (ny - 1) / 2.0])
    scale = PIXEL_SCALE_ARCSEC / 3600.0
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.crval = [common.frame.ra_deg, common.frame.dec_deg]
    wcs.wcs.crpix = affine[:, :2] @ centre + affine[:, 2] + 1.0
    wcs.wcs.cd = np.diag([-scale, scale]) @ np.linalg.inv(affine[:, :2])
    wcs.wcs.set()
    return wcs


def _science_exposure(
    one: _RegisteredFrame, common: _RegisteredFrame, hot: NDArray[np.bool_], template: _Template
) -> tuple[Exposure, float]:
    frame, registration = one.frame, one.registration
    zero_point = NOMINAL_ZERO_POINT + 2.5 * float(np.log10(registration.flux_ratio))
    scale = np.float32(10.0 ** (0.4 * (AB_ZERO_POINT_NJY - zero_point)))
    mask = np.zeros(frame.pixels.shape, dtype=np.int32)
    mask[frame.saturated] |= mask_bits("SAT")
    mask[one.hits] |= mask_bits("CR")
    mask[hot] |= mask_bits("BAD")
    edge = np.ones(frame.pixels.shape, dtype=bool)
    edge[_EDGE_PIX:-_EDGE_PIX, _EDGE_PIX:-_EDGE_PIX] = False
    mask[edge] |= mask_bits("EDGE")
    wcs = _nominal_wcs(common, registration.affine)
    bad = frame.saturated | one.hits | hot
    sky = subtract_background(frame.pixels, bad, _BACKGROUND_BOX_PIX)
    psf = _psf(sky.image, frame.variance, bad, template, registration.affine, one.stars, registration.flux_ratio)
    exposure = Exposure(
        image=frame.pixels * scale,
        variance=frame.variance * scale**2,
        mask=mask,
        wcs=wcs,
        psf=psf,
    )
    return exposure, zero_point


def _cards(frame: _Frame, zero_point: float) -> dict[str, object]:
    return _NOMINAL_CARDS | {
        "MAGZERO": (zero_point, "nominal AB mag of 1 adu"),
        "GAIN_ADU": (frame.gain, "e-/adu of the frame"),
        "FRAME": (frame.name, "as it came"),
    }


def _visit(frame: _Frame, exposure: Exposure, science: Path, template: Path) -> Visit:
    start = tai_of_utc_mjd(frame.start_mjd_utc)
    ny, nx = frame.pixels.shape
    ra, dec = exposure.wcs.all_pix2world((nx - 1) / 2.0, (ny - 1) / 2.0, 0)
    return Visit(
        visit=0,
        day_obs=0,
        seq_num=0,
        instrument=frame.instrument,
        band=frame.band,
        midpoint_mjd_tai=start + 0.5 * frame.exposure_time_s / 86400.0,
        exposure_time_s=frame.exposure_time_s,
        readout_end_mjd_tai=start + frame.exposure_time_s / 86400.0,
        boresight_ra_deg=float(ra) % 360.0,
        boresight_dec_deg=float(dec),
        rotation_deg=0.0,
        observation_reason="science",
        target_name=f"{frame.target} (nominal WCS, nominal zero point)",
        detectors=(DetectorImages(0, str(science), str(template)),),
        observatory=OBSERVATORY,
    )

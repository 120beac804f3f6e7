"""What is left of the sources and what the noise is, on planes whose answer is known; and attacks on `subtract`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.signal import fftconvolve
from simulated_pair import Stars, expose, moffat_stamp, render, simulate_pair

from transforms.numerics.background import BackgroundError
from transforms.numerics.differencing import ImagePlanes, LowCoverageError, UnusableImageError, subtract
from transforms.numerics.kernel_matching import KernelMatchingError, TooFewKernelStarsError
from transforms.numerics.psf_modelling import PsfEstimationError
from transforms.numerics.subtraction_quality import (
    WORST_RESIDUAL,
    WORST_TYPICAL_RESIDUAL,
    BadSubtractionError,
    SubtractionQuality,
    measure_quality,
    require_a_subtraction,
)

SHAPE = (400, 400)
REFUSALS = (
    BackgroundError,
    BadSubtractionError,
    KernelMatchingError,
    LowCoverageError,
    PsfEstimationError,
    UnusableImageError,
)


# the measure ----------------------------------------------------------------------------------------------------------


def grid_of_stars(flux: float, side: int = 320) -> np.ndarray:
    """One star in the middle of each cell of 32 pixels, without noise."""
    places = np.arange(16.0, side, 32.0)
    x, y = (axis.ravel() for axis in np.meshgrid(places, places))
    return render((side, side), Stars(x, y, np.full(len(x), flux)), 4.0)


def quality_of(left: np.ndarray, science: np.ndarray, template: np.ndarray, noise: float = 1.0) -> SubtractionQuality:
    """With unit variance stated, and this noise."""
    random = np.random.default_rng(4)
    difference = (left + random.normal(0.0, noise, left.shape)).astype(np.float32)
    none = np.zeros(left.shape, dtype=bool)
    return measure_quality(difference, np.ones(left.shape, np.float32), science, template, none)


@pytest.mark.parametrize("left", [0.05, 0.3, 1.0])
def test_a_part_left_of_every_star_is_the_residual_fraction(left: float) -> None:
    stars = grid_of_stars(1e5)
    quality = quality_of(left * stars, stars, stars)
    assert quality.n_sources == 100
    # of 49 pixels' noise sqrt(2 * 49) is left in a sum of squares, beside 1e10 sum(psf^2) left^2 > 5e5
    assert quality.residual_fraction == pytest.approx(left, rel=1e-2)
    assert quality.typical_residual == pytest.approx(left, rel=1e-2)
    assert quality_of(-2.0 * stars, stars, stars).residual_fraction == 1.0  # worse than nothing is not worse than 1


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.5])
def test_noise_alone_is_no_residual_whatever_the_variances_say(noise: float) -> None:
    stars = grid_of_stars(3e3)
    quality = quality_of(np.zeros_like(stars), stars, stars, noise)
    # a MAD's error is 1.17 / sqrt(n) of it
    assert quality.noise_ratio == pytest.approx(noise, rel=5 * 1.17 / np.sqrt((320 / 5) ** 2))
    # E sqrt(max(N, 0)) is 0.41 sqrt(sigma); here sigma is sqrt(2 * 49) noise^2, and the mean is of 100
    light = np.sum(stars**2) / 100
    assert quality.residual_fraction == pytest.approx(0.41 * np.sqrt(np.sqrt(98) * noise**2 / light), rel=5 * 0.13)


def test_sources_that_one_image_lacks_count_whichever_it_is() -> None:
    stars = grid_of_stars(1e5)
    half = stars.copy()
    half[:160] = 0.0
    for science, template in ((stars, half), (half, stars)):
        quality = quality_of(science - template, science, template)
        # the light of half of them: their wings reach no other cell's middle
        assert quality.residual_fraction == pytest.approx(0.5, abs=0.01)


def test_a_satellite_is_one_of_many_voices() -> None:
    stars = grid_of_stars(1e5)
    trail = np.zeros_like(stars)
    trail[150:154] = 1e4
    quality = quality_of(trail, stars + trail, stars)
    assert quality.n_sources == 100
    assert quality.residual_fraction == pytest.approx(0.1, abs=0.02)  # the cells of one of ten rows
    assert quality.typical_residual < 0.01
    require_a_subtraction(quality)


def test_unusable_pixels_have_no_say() -> None:
    stars = grid_of_stars(1e5)
    unusable = np.zeros(stars.shape, dtype=bool)
    unusable[:160] = True
    difference = np.where(unusable, np.float32(np.nan), np.float32(0.0))
    variance = np.where(unusable, np.float32(np.inf), np.float32(1.0))
    quality = measure_quality(difference, variance, np.where(unusable, np.nan, stars), stars, unusable)
    assert (quality.n_sources, quality.residual_fraction, quality.noise_ratio) == (50, 0.0, 0.0)
    nothing = measure_quality(difference, variance, stars, stars, np.ones(stars.shape, dtype=bool))
    assert nothing.n_sources == 0
    assert np.isnan(nothing.residual_fraction)
    assert np.isnan(nothing.noise_ratio)


def test_a_blank_field_has_no_residual_to_complain_of() -> None:
    blank = np.zeros((320, 320))
    quality = quality_of(blank, blank, blank)
    assert quality.n_sources == 0
    require_a_subtraction(quality)


@pytest.mark.parametrize(
    ("quality", "figures"),
    [
        (SubtractionQuality(0.41, 0.1, 40, 1.0), "of the light of 40 sources 41% is left in the difference on average"),
        (SubtractionQuality(0.21, 0.21, 40, 1.0), "21% in the median, 40% and 20% are allowed"),
        (
            SubtractionQuality(0.01, 0.01, 40, 3.1),
            r"scatters by 3\.10 times what the variances say, 3 times is allowed",
        ),
        (SubtractionQuality(0.01, 0.01, 40, float("nan")), "scatters by nan times"),
    ],
)
def test_a_refusal_has_its_figures(quality: SubtractionQuality, figures: str) -> None:
    with pytest.raises(BadSubtractionError, match=figures):
        require_a_subtraction(quality)
    require_a_subtraction(SubtractionQuality(WORST_RESIDUAL, WORST_TYPICAL_RESIDUAL, 40, 3.0))


# few stars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_psf", [False, True])
@pytest.mark.parametrize(
    ("side", "n_stars", "error", "reason"),
    [
        (60, 3, UnusableImageError, r"of shape \(60, 60\) is smaller than 64 pixels"),
        (
            100,
            3,
            (PsfEstimationError, TooFewKernelStarsError),
            r"too few stars for a PSF: 3 sources|kernel stars offered",
        ),
        (
            200,
            3,
            (PsfEstimationError, TooFewKernelStarsError),
            r"too few stars for a PSF: 3 sources|3 of 3 kernel stars",
        ),
        (
            200,
            0,
            (PsfEstimationError, TooFewKernelStarsError),
            r"too few stars for a PSF: 0 sources|0 of 0 kernel stars",
        ),
        (400, 9, TooFewKernelStarsError, "9 of 9 kernel stars offered, 10 are needed"),
    ],
)
def test_a_cutout_of_few_stars_is_refused_with_the_reason(
    side: int, n_stars: int, error: type[Exception], reason: str, has_psf: bool
) -> None:
    random = np.random.default_rng(3)
    places = np.array([(x, y) for y in (0.25, 0.5, 0.75) for x in (0.3, 0.5, 0.7)][:n_stars] or np.empty((0, 2)))
    stars = Stars(*(side * places).T, np.full(n_stars, 4e4))
    pair = []
    for fwhm, sky_variance in ((4.75, 400.0), (3.75, 40.0)):
        image = expose(random, render((side, side), stars, fwhm), 400.0, sky_variance)
        psf = moffat_stamp(12, fwhm) if has_psf else None
        pair.append(ImagePlanes(image.image, image.variance, image.bad, psf))
    with pytest.raises(error, match=reason):
        subtract(*pair)


# attacks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """A pair spoilt in one way, from the seed's stars."""

    science: ImagePlanes
    template: ImagePlanes
    stars: Stars
    random: np.random.Generator


def template_pixels(attack: Attack, image: np.ndarray) -> Attack:
    return replace(attack, template=replace(attack.template, image=image.astype(np.float32)))


def science_light(attack: Attack, light: np.ndarray, more: np.ndarray | float = 0.0) -> Attack:
    image = expose(attack.random, light, 400.0, 400.0)
    planes = replace(attack.science, image=(image.image + more).astype(np.float32), variance=image.variance)
    return replace(attack, science=planes)


def true_light(attack: Attack, fwhm_pix: float = 4.75, kept: np.ndarray | None = None) -> np.ndarray:
    kept = np.ones(len(attack.stars.x), dtype=bool) if kept is None else kept
    return render(SHAPE, Stars(attack.stars.x[kept], attack.stars.y[kept], attack.stars.flux[kept]), fwhm_pix)


def another_field(attack: Attack) -> Attack:
    _, template, _ = simulate_pair(1000 + int(attack.random.integers(1000)), SHAPE)
    return template_pixels(attack, template.image)


def shifted_by(pixels: int) -> Callable[[Attack], Attack]:
    return lambda attack: template_pixels(attack, np.roll(attack.template.image, pixels, axis=1))


def scaled_by(factor: float, scale_variance: bool = False) -> Callable[[Attack], Attack]:
    def spoil(attack: Attack) -> Attack:
        spoilt = template_pixels(attack, factor * attack.template.image.astype(float))
        if not scale_variance:
            return spoilt
        variance = (factor**2 * attack.template.variance.astype(float)).astype(np.float32)
        return replace(spoilt, template=replace(spoilt.template, variance=variance))

    return spoil


def flipped(attack: Attack) -> Attack:
    return template_pixels(attack, attack.template.image[:, ::-1])


def noise_alone(attack: Attack) -> Attack:
    return template_pixels(attack, attack.random.normal(300.0, 6.0, SHAPE))


def without_stars(part: float, of_science: bool) -> Callable[[Attack], Attack]:
    def spoil(attack: Attack) -> Attack:
        kept = attack.random.random(len(attack.stars.x)) >= part
        if of_science:
            return science_light(attack, true_light(attack, kept=kept))
        light = true_light(attack, 3.75, kept)
        return template_pixels(attack, 300.0 + light + attack.random.normal(size=SHAPE) * np.sqrt(40.0 + light / 10.0))

    return spoil


def trailed(length_pix: int) -> Callable[[Attack], Attack]:
    line = np.zeros((61, 61))
    line[30, 30 - length_pix // 2 : 30 - length_pix // 2 + length_pix] = 1.0 / length_pix
    return lambda attack: science_light(attack, fftconvolve(true_light(attack), line, "same"))


def out_of_focus(radius_pix: float) -> Callable[[Attack], Attack]:
    rows, columns = np.mgrid[-20:21, -20:21]
    distance = np.hypot(rows, columns)
    ring = (distance < radius_pix) & (distance > 0.5 * radius_pix)
    return lambda attack: science_light(attack, fftconvolve(true_light(attack), ring / ring.sum(), "same"))


def clouded(loss: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Attack], Attack]:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] / SHAPE[0]
    return lambda attack: science_light(attack, true_light(attack) * (1.0 - loss(x, y)))


def fringed(amplitude: float, n_waves: float) -> Callable[[Attack], Attack]:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] / SHAPE[0]
    fringes = amplitude * np.sin(2 * np.pi * n_waves * (x + 0.3 * y))
    return lambda attack: science_light(attack, true_light(attack), fringes)


def with_gradient(attack: Attack) -> Attack:
    x = np.arange(SHAPE[1]) / SHAPE[1]
    return science_light(attack, true_light(attack), 1e4 * np.broadcast_to(x, SHAPE))


def same_pixels(attack: Attack) -> Attack:
    return replace(attack, template=attack.science)


RIGHT, WRONG = {"right"}, {"refused"}
ATTACKS: dict[str, tuple[Callable[[Attack], Attack], set[str]]] = {
    "nothing": (lambda attack: attack, RIGHT),
    "another field": (another_field, WRONG),
    "shifted by 3 pixels": (shifted_by(3), RIGHT),
    "shifted by 10 pixels": (shifted_by(10), WRONG),
    "flipped": (flipped, WRONG),
    "template of zeros": (scaled_by(0.0), WRONG),
    "negative template": (scaled_by(-1.0), WRONG),
    "template of noise": (noise_alone, WRONG),
    "template in units of 1e-5": (scaled_by(1e-5, scale_variance=True), RIGHT),
    "template in units of 1e5": (scaled_by(1e5, scale_variance=True), RIGHT),
    "template in units of 1e-5, its variance not": (scaled_by(1e-5), {"flagged", "refused"}),
    "template in units of 1e5, its variance not": (scaled_by(1e5), {"right", "refused"}),
    "the same pixels twice": (same_pixels, {"flagged"}),
    "template without a tenth of the stars": (without_stars(0.1, False), {"right", "flagged"}),
    "template without half of the stars": (without_stars(0.5, False), WRONG),
    "science image without half of the stars": (without_stars(0.5, True), WRONG),
    "trailed by 8 pixels": (trailed(8), RIGHT),
    "trailed by 30 pixels": (trailed(30), {"flagged", "refused"}),
    "slightly out of focus": (out_of_focus(5.0), {"right", "refused"}),
    "far out of focus": (out_of_focus(15.0), WRONG),
    "cloud, 40 % across": (clouded(lambda x, y: 0.4 * x), WRONG),
    "cloud, 40 % in waves": (clouded(lambda x, y: 0.2 + 0.2 * np.sin(4 * np.pi * x + 3 * np.pi * y)), {"flagged"}),
    "strong fringes": (fringed(100.0, 30), WRONG),
    "weak fringes": (fringed(30.0, 60), {"flagged"}),
    "steep gradient": (with_gradient, {"flagged", "refused"}),
}


@pytest.mark.parametrize("has_psf", [False, True], ids=["psf measured", "psf given"])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_spoilt_pair_is_refused_with_a_type_flagged_or_right(name: str, has_psf: bool) -> None:
    spoil, allowed = ATTACKS[name]
    science, template, stars = simulate_pair(101, SHAPE, gradient=0.0)
    psfs = (moffat_stamp(12, 4.75), moffat_stamp(12, 3.75)) if has_psf else (None, None)
    attack = spoil(
        Attack(
            ImagePlanes(science.image, science.variance, science.bad, psfs[0]),
            ImagePlanes(template.image, template.variance, template.bad, psfs[1]),
            stars,
            np.random.default_rng(5),
        )
    )
    try:
        result = subtract(attack.science, attack.template)
    except ValueError as error:
        assert type(error) in REFUSALS or isinstance(error, KernelMatchingError), repr(error)
        assert any(character.isdigit() for character in str(error)), error
        assert "refused" in allowed, error
        return
    quality = result.quality
    flagged = result.kernel.is_poor or quality.residual_fraction > 0.2 or quality.typical_residual > 0.1
    flagged |= not 0.8 < quality.noise_ratio < 1.25
    assert ("flagged" if flagged else "right") in allowed, (quality, result.kernel.validation_chi2)

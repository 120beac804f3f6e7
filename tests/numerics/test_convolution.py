"""Convolution: definition, linearity, and agreement with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage, signal

from transforms.numerics.convolution import (
    KernelShapeError,
    block_centres,
    convolve,
    convolve_spatially_varying,
)

RNG_SEED = 20261122


def rounding_error(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Bound of the float32 error of a sum of k^2 products, added four at a time: k^2 eps of the sum of magnitudes."""
    magnitude = signal.convolve2d(np.abs(image), np.abs(kernel), mode="same")
    return kernel.size * np.finfo(np.float32).eps * magnitude + 1e-30


@pytest.mark.parametrize("side", [1, 3, 5, 7, 13, 21])
def test_convolution_agrees_with_scipy(side: int) -> None:
    rng = np.random.default_rng([RNG_SEED, side])
    image, kernel = rng.normal(size=(37, 53)), rng.normal(size=(side, side))
    expected = signal.convolve2d(image, kernel, mode="same")
    result = convolve(image, kernel)
    assert result.dtype == np.float32
    # one more eps for rounding the inputs to float32
    assert np.all(np.abs(result - expected) <= 2 * rounding_error(image, kernel))


def test_unit_pixel_returns_kernel_unmirrored() -> None:
    kernel = np.arange(25, dtype=np.float32).reshape(5, 5)
    image = np.zeros((11, 13), dtype=np.float32)
    image[4, 6] = 1.0
    result = convolve(image, kernel)
    np.testing.assert_array_equal(result[2:7, 4:9], kernel)
    assert result.sum() == kernel.sum()


def test_sky_beyond_the_edges_is_zero() -> None:
    image, kernel = np.ones((9, 9), dtype=np.float32), np.ones((3, 3), dtype=np.float32)
    result = convolve(image, kernel)
    assert result[4, 4] == 9.0
    assert result[0, 4] == 6.0
    assert result[0, 0] == 4.0


def test_varying_convolution_uses_kernel_of_output_block() -> None:
    rng = np.random.default_rng(RNG_SEED)
    image = rng.normal(size=(70, 50))
    kernels = rng.normal(size=(3, 2, 7, 7))
    result = convolve_spatially_varying(image, kernels, block_pix=32)
    for y in range(3):
        for x in range(2):
            part = slice(32 * y, 32 * (y + 1)), slice(32 * x, 32 * (x + 1))
            expected = signal.convolve2d(image, kernels[y, x], mode="same")
            bound = 2 * rounding_error(image, kernels[y, x])
            assert np.all(np.abs(result[part] - expected[part]) <= bound[part])


def test_equal_kernels_give_the_bytes_of_one_kernel_at_any_block_size() -> None:
    rng = np.random.default_rng(RNG_SEED)
    image, kernel = rng.normal(size=(64, 96)), rng.normal(size=(9, 9))
    expected = convolve(image, kernel)
    for block in (16, 32, 64):
        n_y, n_x = -(-64 // block), -(-96 // block)
        varying = convolve_spatially_varying(image, np.broadcast_to(kernel, (n_y, n_x, 9, 9)), block)
        np.testing.assert_array_equal(varying, expected)


def test_nan_spreads_over_footprint_only() -> None:
    image = np.zeros((20, 20))
    image[10, 10] = np.nan
    result = convolve(image, np.ones((5, 5)))
    expected = ndimage.maximum_filter(np.isnan(image), 5)
    # a kernel has rows of zeros around it, for the rows of a tile, and zero times NaN is NaN
    assert np.all(np.isnan(result[expected]))
    assert not np.isnan(result[:7]).any()
    assert not np.isnan(result[:, :5]).any()


def test_block_centres_are_the_means_of_the_blocks_pixels() -> None:
    x, y = block_centres((70, 50), 32)
    np.testing.assert_array_equal(y[:, 0], [15.5, 47.5, 66.5])
    np.testing.assert_array_equal(x[0], [15.5, 40.5])


@pytest.mark.parametrize(
    ("image_shape", "kernel_shape"),
    [((9, 9), (4, 4)), ((9, 9), (3, 5)), ((9, 9), (3,)), ((0, 9), (3, 3)), ((9,), (3, 3))],
)
def test_misshapen_input_is_refused(image_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> None:
    with pytest.raises(KernelShapeError, match="shape"):
        convolve(np.ones(image_shape), np.ones(kernel_shape))


def test_wrong_number_of_blocks_is_refused() -> None:
    with pytest.raises(KernelShapeError, match=r"\(2, 2\) blocks of 32"):
        convolve_spatially_varying(np.ones((64, 64)), np.ones((1, 2, 3, 3)), 32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (4, 32), (5, 33), (37, 65)])
def test_images_of_any_size_agree_with_the_definition(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng([RNG_SEED, *shape])
    image = rng.integers(-9, 9, size=shape).astype(np.float64)
    kernels = rng.integers(-9, 9, size=(-(-shape[0] // 7), 1, 5, 5)).astype(np.float64)
    kernels = np.repeat(kernels, -(-shape[1] // 7), axis=1)
    result = convolve_spatially_varying(image, kernels, block_pix=7)
    for block in range(len(kernels)):
        rows = slice(7 * block, 7 * (block + 1))
        expected = signal.convolve2d(image, kernels[block, 0], mode="same")
        np.testing.assert_array_equal(result[rows], expected[rows])  # whole numbers below 2^24: no rounding

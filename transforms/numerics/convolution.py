"""Direct convolution of an image with one kernel, or with a kernel per block of output pixels.

Kernels are small (13 to 31 pixels), so the direct sum beats Fourier methods. The inner loop runs over
contiguous output pixels and takes four kernel columns at a time, which the compiler turns into vector
multiply-adds.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_TAPS = 4  # kernel columns per pass over a row; must match the unrolled sum in `_correlate_blocks`
_FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}  # NaN and infinity keep their meaning


class KernelShapeError(ValueError):
    """A kernel, or a set of kernels, whose shape does not fit the image or is not square and odd."""


def convolve(image: NDArray[np.floating], kernel: NDArray[np.floating]) -> NDArray[np.float32]:
    """Convolve an image with one kernel, taking the sky beyond the edges as zero.

    ``out[y, x] = sum_ji kernel[j, i] image[y - (j - h), x - (i - h)]`` with ``h = (k - 1) / 2``: a true
    convolution, so an image of one unit pixel returns the kernel, not its mirror image.

    Parameters
    ----------
    image : (ny, nx) floating, finite; a NaN spreads over the kernel's footprint
    kernel : (k, k) floating, k odd

    Returns
    -------
    (ny, nx) float32

    Raises
    ------
    KernelShapeError : the kernel is not square with an odd side, or the image is not two-dimensional

    Notes
    -----
    Products are summed in float32: the rounding error is about ``sqrt(k^2) * 6e-8`` of
    ``sum |kernel| |image|``. Cost O(ny nx k^2); 17 to 23 GMAC/s on one AVX-512 core.
    """
    kernel = np.asarray(kernel)
    if kernel.ndim != 2:
        raise KernelShapeError(f"'kernel' must be two-dimensional, got shape {kernel.shape}")
    image = np.asarray(image)
    block = max(*image.shape, 1) if image.ndim == 2 else 1
    return convolve_spatially_varying(image, kernel[np.newaxis, np.newaxis], block)


def convolve_spatially_varying(
    image: NDArray[np.floating], kernels: NDArray[np.floating], block_pix: int = 64
) -> NDArray[np.float32]:
    """Convolve an image with a kernel that changes from block to block of output pixels.

    Output pixel ``(y, x)`` uses ``kernels[y // block_pix, x // block_pix]`` on the whole input around it, as in
    `convolve`. Evaluate the kernels at `block_centres`.

    Parameters
    ----------
    image : (ny, nx) floating, finite; a NaN spreads over the kernel's footprint
    kernels : (ceil(ny / block_pix), ceil(nx / block_pix), k, k) floating, k odd
    block_pix : side of a block, >= 1; larger is faster, smaller follows the kernel more closely

    Returns
    -------
    (ny, nx) float32

    Raises
    ------
    KernelShapeError : shapes that do not fit each other, or an even or non-square kernel

    Notes
    -----
    Accuracy and cost as in `convolve`. The step between neighbouring kernels is the kernel's gradient times
    `block_pix`.
    """
    image, kernels = np.asarray(image), np.asarray(kernels)
    if image.ndim != 2 or image.size == 0:
        raise KernelShapeError(f"'image' must be two-dimensional and not empty, got shape {image.shape}")
    if kernels.ndim != 4 or kernels.shape[2] != kernels.shape[3] or kernels.shape[2] % 2 == 0:
        raise KernelShapeError(f"kernels must be square with an odd side, got shape {kernels.shape[-2:]}")
    n_blocks = tuple(-(-side // block_pix) for side in image.shape)
    if kernels.shape[:2] != n_blocks:
        raise KernelShapeError(
            f"an image of shape {image.shape} has {n_blocks} blocks of {block_pix} pixels, got kernels for "
            f"{kernels.shape[:2]}"
        )
    ny, nx = image.shape
    k = kernels.shape[2]
    columns = -(-k // _TAPS) * _TAPS
    flipped = np.zeros((*n_blocks, k, columns), dtype=np.float32)
    flipped[..., :k] = kernels[..., ::-1, ::-1]
    padded = np.zeros((ny + k - 1, nx + columns + _TAPS), dtype=np.float32)
    half = k // 2
    padded[half : half + ny, half : half + nx] = image
    out = np.zeros((ny, nx), dtype=np.float32)
    _correlate_blocks(padded, flipped, block_pix, out)
    return out


def block_centres(shape: tuple[int, int], block_pix: int = 64) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixel coordinates of the centres of the blocks of `convolve_spatially_varying`.

    Parameters
    ----------
    shape : (ny, nx) of the image
    block_pix : side of a block, >= 1

    Returns
    -------
    x, y : (n_blocks_y, n_blocks_x) float64, 0-based; blocks cut by the edge have the centre of what is left
    """
    centres = []
    for side in shape:
        start = np.arange(0, side, block_pix, dtype=np.float64)
        centres.append(0.5 * (start + np.minimum(start + block_pix, side) - 1.0))
    x, y = np.meshgrid(centres[1], centres[0])
    return x, y


@njit(cache=True, fastmath=_FAST_MATH)
def _correlate_blocks(
    padded: NDArray[np.float32], kernels: NDArray[np.float32], block_pix: int, out: NDArray[np.float32]
) -> None:
    ny, nx = out.shape
    side, columns = kernels.shape[2:]
    for block_y in range(kernels.shape[0]):
        for block_x in range(kernels.shape[1]):
            kernel = kernels[block_y, block_x]
            start = block_x * block_pix
            stop = min(start + block_pix, nx)
            for y in range(block_y * block_pix, min((block_y + 1) * block_pix, ny)):
                total = out[y, start:stop]
                for j in range(side):
                    for i in range(0, columns, 4):
                        k0, k1, k2, k3 = kernel[j, i], kernel[j, i + 1], kernel[j, i + 2], kernel[j, i + 3]
                        row = padded[y + j, start + i : stop + i + 3]
                        for x in range(stop - start):
                            total[x] += k0 * row[x] + k1 * row[x + 1] + k2 * row[x + 2] + k3 * row[x + 3]

"""Direct convolution of an image with one kernel, or with a kernel per block of output pixels.

Kernels are small (13 to 31 pixels), so the direct sum beats Fourier methods. Tiles of 4 x 32 output pixels are summed
in registers, one fused multiply-add per pixel and kernel element, in the same order whatever the width of the
processor's vectors: the bytes do not depend on it.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

_TILE_ROWS = 4
_TILE_COLUMNS = 32
_BAND_ROWS = 32  # are copied between rims of zeros at a time: they stay in the cache
# Accumulators that fit the registers: 4 x 2 of 16 lanes (AVX-512) or 4 x 4 of 8 (AVX2; others split them).
_LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8


class KernelShapeError(ValueError):
    """A kernel, or a set of kernels, whose shape does not fit the image or is not square and odd."""


def convolve(image: NDArray[np.floating], kernel: NDArray[np.floating]) -> NDArray[np.float32]:
    """Convolve an image with one kernel, taking the sky beyond the edges as zero.

    ``out[y, x] = sum_ji kernel[j, i] image[y - (j - h), x - (i - h)]`` with ``h = (k - 1) / 2``: a true
    convolution, so an image of one unit pixel returns the kernel, not its mirror image.

    Parameters
    ----------
    image : (ny, nx) floating, finite; a NaN spreads over the kernel's footprint and up to 3 rows beyond
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
    ``sum |kernel| |image|``. Cost O(ny nx k^2); 68 GMAC/s on one AVX-512 core, 45 with AVX2.
    """
    kernel = np.asarray(kernel)
    if kernel.ndim != 2:
        raise KernelShapeError(f"'kernel' must be two-dimensional, got shape {kernel.shape}")
    image = np.asarray(image)
    block = max(*image.shape, 1) if image.ndim == 2 else 1
    return convolve_spatially_varying(image, kernel[np.newaxis, np.newaxis], block)


def convolve_spatially_varying(
    image: NDArray[np.floating],
    kernels: NDArray[np.floating],
    block_pix: int = 64,
    left_out: NDArray[np.bool_] | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Convolve an image with a kernel that changes from block to block of output pixels.

    Output pixel ``(y, x)`` uses ``kernels[y // block_pix, x // block_pix]`` on the whole input around it, as in
    `convolve`. Evaluate the kernels at `block_centres`.

    Parameters
    ----------
    image : (ny, nx) floating, finite; a NaN spreads over the kernel's footprint and up to 3 rows beyond
    kernels : (ceil(ny / block_pix), ceil(nx / block_pix), k, k) floating, k odd
    block_pix : side of a block, >= 1; larger is faster, smaller follows the kernel more closely
    left_out : (ny, nx) bool, pixels that count as zero whatever they hold; None for none
    out : (ny, nx) C-contiguous float32 to write to, not the image itself; None for a new one

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
    if left_out is not None and left_out.shape != image.shape:
        raise KernelShapeError(f"'left_out' of shape {left_out.shape} for an image of shape {image.shape}")
    k, above = kernels.shape[2], _TILE_ROWS - 1
    # Rows of zeros above and below, so that one loop over input rows serves all rows of a tile.
    flipped = np.zeros((*n_blocks, k + 2 * above, k), dtype=np.float32)
    flipped[..., above : above + k, :] = kernels[..., ::-1, ::-1]
    if out is None:
        out = np.empty(image.shape, dtype=np.float32)
    none = np.zeros((0, 0), dtype=np.bool_)
    _correlate_blocks(image, none if left_out is None else left_out, flipped, block_pix, out)
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


@intrinsic
def _correlate_tile(
    typing_context: Any, source: Any, source_stride: Any, kernel: Any, n_rows: Any, n_taps: Any, out: Any, stride: Any
) -> Any:
    """out[r, x] = sum over j, i of kernel[j + 3 - r, i] source[j, x + i] for r < 4, x < 32.

    Arrays are addresses of float32, strides count floats; `n_rows` counts the input rows, `n_taps` the columns of the
    kernel.
    """
    vector = ir.VectorType(ir.FloatType(), _LANES)
    index = ir.IntType(64)
    n_vectors = _TILE_COLUMNS // _LANES

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_stride, kernel, n_rows, n_taps, out, out_stride = arguments
        fused = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{_LANES}f32"
        )
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
        undefined = ir.Constant(vector, ir.Undefined)

        def at(base: Any, offset: Any, kind: Any) -> Any:
            pointer = builder.gep(builder.inttoptr(base, ir.FloatType().as_pointer()), [offset])
            return builder.bitcast(pointer, kind.as_pointer())

        def constant(value: int) -> Any:
            return ir.Constant(index, value)

        zero = ir.Constant(vector, [0.0] * _LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(n_vectors)] for _ in range(_TILE_ROWS)]
        with cgutils.for_range(builder, n_rows) as rows:
            row_start = builder.mul(rows.index, source_stride)
            with cgutils.for_range(builder, n_taps) as taps:
                pixels = []
                for place in range(n_vectors):
                    offset = builder.add(builder.add(row_start, taps.index), constant(place * _LANES))
                    pixels.append(builder.load(at(source, offset, vector), align=4))
                for row in range(_TILE_ROWS):
                    kernel_row = builder.add(rows.index, constant(_TILE_ROWS - 1 - row))
                    offset = builder.add(builder.mul(kernel_row, n_taps), taps.index)
                    weight = builder.load(at(kernel, offset, ir.FloatType()))
                    weights = builder.insert_element(undefined, weight, ir.Constant(ir.IntType(32), 0))
                    weights = builder.shuffle_vector(weights, undefined, everywhere)
                    for total, values in zip(sums[row], pixels, strict=True):
                        builder.store(builder.call(fused, [weights, values, builder.load(total)]), total)
        for row in range(_TILE_ROWS):
            for place in range(n_vectors):
                offset = builder.add(builder.mul(constant(row), out_stride), constant(place * _LANES))
                builder.store(builder.load(sums[row][place]), at(out, offset, vector), align=4)
        return context.get_dummy_value()

    return types.void(source, source_stride, kernel, n_rows, n_taps, out, stride), generate


@njit(cache=True)
def convolve_stamp(pixels: NDArray[np.float32], kernel: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Convolve the inside of a stamp, in numba code: as `convolve`, for stamps too small to be images.

    Parameters
    ----------
    pixels : (n + k - 1, m + k - 1) C-contiguous
    kernel : (k + 6, k) C-contiguous, mirrored along both axes, with three rows of zeros above and below
    out : (n, m) C-contiguous, to be filled; n a multiple of 4, m one of 32
    """
    taps = kernel.shape[1]
    for y in range(0, out.shape[0], _TILE_ROWS):
        for x in range(0, out.shape[1], _TILE_COLUMNS):
            _correlate_tile(
                pixels.ctypes.data + 4 * (y * pixels.shape[1] + x),
                pixels.shape[1],
                kernel.ctypes.data,
                taps + _TILE_ROWS - 1,
                taps,
                out.ctypes.data + 4 * (y * out.shape[1] + x),
                out.shape[1],
            )


@njit(cache=True)
def _correlate_blocks(
    image: NDArray[np.floating],
    left_out: NDArray[np.bool_],
    kernels: NDArray[np.float32],
    block_pix: int,
    out: NDArray[np.float32],
) -> None:
    """Tiles that reach beyond their block are overwritten by those of the next; a band has room beyond the last."""
    ny, nx = image.shape
    rows, taps = kernels.shape[2] - _TILE_ROWS + 1, kernels.shape[3]
    half = taps // 2
    padded = np.zeros((_BAND_ROWS + rows, nx + taps + _TILE_COLUMNS), dtype=np.float32)
    band = np.empty((_BAND_ROWS + _TILE_ROWS - 1, nx + _TILE_COLUMNS - 1), dtype=np.float32)
    for block_y in range(kernels.shape[0]):
        last_y = min((block_y + 1) * block_pix, ny)
        for top in range(block_y * block_pix, last_y, _BAND_ROWS):
            height = min(_BAND_ROWS, last_y - top)
            _copy_band(image, left_out, top - half, half, padded)
            for block_x in range(kernels.shape[1]):
                kernel = kernels[block_y, block_x]
                for y in range(0, height, _TILE_ROWS):
                    for x in range(block_x * block_pix, min((block_x + 1) * block_pix, nx), _TILE_COLUMNS):
                        _correlate_tile(
                            padded.ctypes.data + 4 * (y * padded.shape[1] + x),
                            padded.shape[1],
                            kernel.ctypes.data,
                            rows,
                            taps,
                            band.ctypes.data + 4 * (y * band.shape[1] + x),
                            band.shape[1],
                        )
            out[top : top + height] = band[:height, :nx]


@njit(cache=True)
def _copy_band(
    image: NDArray[np.floating], left_out: NDArray[np.bool_], top: int, left: int, padded: NDArray[np.float32]
) -> None:
    """Rows of the image from `top` on, with `left` zeros before them, and zeros where there are none."""
    ny, nx = image.shape
    for row in range(padded.shape[0]):
        y = top + row
        if y < 0 or y >= ny:
            padded[row] = 0.0
        elif left_out.size == 0:
            padded[row, left : left + nx] = image[y]
        else:
            for x in range(nx):
                padded[row, left + x] = np.float32(0.0) if left_out[y, x] else np.float32(image[y, x])

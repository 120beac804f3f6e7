"""What the fits of dipoles and trails share: PSF images prepared in a stack, and small damped least-squares steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from transforms.numerics.detection import gaussian_variances
from transforms.numerics.forced_photometry import spline_coefficients

SHIFT_MAX_PIX = 6.0  # how far `evaluate_psf` may move a PSF off the centre of its stamp
FIT_REACH_SIGMA = 3.5  # pixels this far from the model's skeleton, plus one, are fitted: 99.8 % of a Gaussian's flux
SETTLED = 1e-2  # of chi-square to be gained by the last step: a tenth of the standard error
DAMPING_FREE = 0.1  # beyond this damping, what a step gains does not tell how far the minimum is
_STAMP_SIGMA = 5.0
_STAMP_HALF_WIDTH_MIN_PIX = 8
_PIVOT_MIN = 1e-10  # of the diagonal: below it two parameters do the same to float64 and a little noise


class SplineStack(NamedTuple):
    """PSF images of one size prepared for evaluation between pixels; a constant PSF is a stack of one.

    Attributes
    ----------
    coefficients : (m, w, w) float64, as of `spline_coefficients`
    sigma_pix : (m,) of the Gaussian with the same sum(P^2)
    half_width : stamps have 2 half_width + 1 pixels a side and reach 5 sigma, as far as the images do
    """

    coefficients: NDArray[np.float64]
    sigma_pix: NDArray[np.float64]
    half_width: int


def spline_stack(images: NDArray[np.floating]) -> SplineStack:
    """Prepare a stack of m > 0 PSF images (m, k, k), k odd, each summing to 1."""
    sigma = np.sqrt(gaussian_variances(images))
    reach = max(_STAMP_HALF_WIDTH_MIN_PIX, math.ceil(_STAMP_SIGMA * float(sigma.max())))
    return SplineStack(spline_coefficients(images), sigma, min(images.shape[1] // 2, reach))


@njit(cache=True)
def factorise(matrix: NDArray[np.float64], damping: float, factor: NDArray[np.float64]) -> bool:
    """Cholesky factor of a symmetric matrix whose diagonal is raised by the part `damping`; False if it is singular."""
    n = matrix.shape[0]
    for j in range(n):
        for i in range(j, n):
            value = matrix[i, j]
            if i == j:
                value += damping * matrix[i, i]
            for k in range(j):
                value -= factor[i, k] * factor[j, k]
            if i == j:
                if not (value > _PIVOT_MIN * matrix[i, i] and value < np.inf):
                    return False
                factor[j, j] = math.sqrt(value)
            else:
                factor[i, j] = value / factor[j, j]
    return True


@njit(cache=True)
def solve_factored(factor: NDArray[np.float64], vector: NDArray[np.float64], solution: NDArray[np.float64]) -> None:
    """Solve (L L^T) solution = vector for the factor L of `factorise`."""
    n = factor.shape[0]
    for i in range(n):
        value = vector[i]
        for k in range(i):
            value -= factor[i, k] * solution[k]
        solution[i] = value / factor[i, i]
    for i in range(n - 1, -1, -1):
        value = solution[i]
        for k in range(i + 1, n):
            value -= factor[k, i] * solution[k]
        solution[i] = value / factor[i, i]


@njit(cache=True)
def invert_factored(factor: NDArray[np.float64], inverse: NDArray[np.float64]) -> None:
    """Inverse of L L^T for the factor L of `factorise`."""
    n = factor.shape[0]
    unit = np.zeros(n)
    for j in range(n):
        unit[:] = 0.0
        unit[j] = 1.0
        solve_factored(factor, unit, inverse[j])

"""A difference has the same bytes whatever the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_PROGRAM = """
import hashlib
import numpy as np
from simulated_pair import simulate_pair
from transforms.numerics.differencing import ImagePlanes, subtract
from transforms.numerics.warping import CoordinateGrid, coordinate_grid, warp_exposure

science, template, _ = simulate_pair(1)
x, y = coordinate_grid(science.image.shape)
grid = CoordinateGrid(x + 0.3, y - 0.2, 32)
warped = warp_exposure(template.image, template.variance, template.bad.astype(np.int32), grid, science.image.shape)
result = subtract(
    ImagePlanes(science.image, science.variance, science.bad),
    ImagePlanes(warped.image, warped.white_variance, warped.no_data | (warped.mask != 0), interpolated=True),
)
for plane in (result.difference, result.variance, result.invalid, result.matched_template, result.decorrelation):
    print(hashlib.sha256(plane.tobytes()).hexdigest())
"""


def _digests(n_threads: int) -> list[str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(n_threads))}
    environment["PYTHONPATH"] = os.pathsep.join([str(_HERE.parents[1]), str(_HERE)])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bytes_do_not_depend_on_the_number_of_threads() -> None:
    one = _digests(1)
    assert len(set(one)) == 5
    assert _digests(2) == one

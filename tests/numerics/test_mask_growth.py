"""Growing masks: the definition, at edges too."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from transforms.numerics.mask_growth import grown


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("radius", [0, 1, 3, 50])
def test_growth_is_the_maximum_over_a_square(radius: int, outside: bool) -> None:
    bad = np.random.default_rng(radius).random((37, 61)) < 0.01
    expected = ndimage.maximum_filter(bad, size=2 * radius + 1, mode="constant", cval=int(outside))
    np.testing.assert_array_equal(grown(bad, radius, outside=outside), expected)

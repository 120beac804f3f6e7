"""Orbits for tests: elements of a state by the textbook's vectors, and random elements of every kind."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GM_SUN = 0.01720209895**2
OBLIQUITY = np.radians(84381.448 / 3600.0)


class Elements(NamedTuple):
    """Cometary elements, angles in degrees."""

    perihelion_au: NDArray[np.float64]
    eccentricity: NDArray[np.float64]
    inclination_deg: NDArray[np.float64]
    node_deg: NDArray[np.float64]
    argument_deg: NDArray[np.float64]
    perihelion_mjd: NDArray[np.float64]
    epoch_mjd: NDArray[np.float64]


def random_elements(rng: np.random.Generator, eccentricity: NDArray[np.float64], epoch: float = 60000.0) -> Elements:
    """Elements with these eccentricities, perihelia at 0.2 to 5 au within three years of the epoch."""
    n = len(eccentricity)
    return Elements(
        rng.uniform(0.2, 5.0, n),
        eccentricity,
        np.degrees(np.arccos(rng.uniform(-0.999, 0.999, n))),
        rng.uniform(0.0, 360.0, n),
        rng.uniform(0.0, 360.0, n),
        epoch + rng.uniform(-1000.0, 1000.0, n),
        np.full(n, epoch),
    )


def elements_of_states(
    mjd: NDArray[np.float64], position: NDArray[np.float64], velocity: NDArray[np.float64]
) -> Elements:
    """Osculating elements by angular momentum, eccentricity vector and Kepler's or Barker's equation.

    Nothing of it is shared with the code under test, which goes the other way by universal variables.
    """
    cosine, sine = np.cos(OBLIQUITY), np.sin(OBLIQUITY)
    to_ecliptic = np.array([[1.0, 0.0, 0.0], [0.0, cosine, sine], [0.0, -sine, cosine]])
    x, v = position @ to_ecliptic.T, velocity @ to_ecliptic.T
    r = np.linalg.norm(x, axis=1)
    momentum = np.cross(x, v)
    h = np.linalg.norm(momentum, axis=1)
    laplace = np.cross(v, momentum) / GM_SUN - x / r[:, None]
    e = np.linalg.norm(laplace, axis=1)
    q = h**2 / GM_SUN / (1.0 + e)
    pole = momentum / h[:, None]
    inclination = np.arctan2(np.hypot(pole[:, 0], pole[:, 1]), pole[:, 2])
    node = np.arctan2(pole[:, 0], -pole[:, 1])
    to_node = np.stack([np.cos(node), np.sin(node), np.zeros(len(e))], axis=1)
    beside = np.cross(pole, to_node)
    argument = np.arctan2((laplace * beside).sum(1), (laplace * to_node).sum(1))
    anomaly = np.arctan2((x * v).sum(1) * h / GM_SUN, h**2 / GM_SUN - r)  # e r sin f and e r cos f
    half = np.tan(0.5 * anomaly)
    with np.errstate(invalid="ignore", divide="ignore"):
        ellipse = 2.0 * np.arctan(np.sqrt((1.0 - e) / (1.0 + e)) * half)
        hyperbola = 2.0 * np.arctanh(np.sqrt((e - 1.0) / (1.0 + e)) * half)
        mean = np.where(e < 1.0, ellipse - e * np.sin(ellipse), e * np.sinh(hyperbola) - hyperbola)
        since = np.where(
            e == 1.0,
            np.sqrt(2.0 * q**3 / GM_SUN) * (half + half**3 / 3.0),
            mean * np.sqrt((q / abs(1.0 - e)) ** 3 / GM_SUN),
        )
    return Elements(
        q, e, np.degrees(inclination), np.degrees(node) % 360.0, np.degrees(argument) % 360.0, mjd - since, mjd
    )

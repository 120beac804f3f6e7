"""Where telescopes stand: the Minor Planet Center's codes of surveys, and any place of one's own."""

from __future__ import annotations

from typing import NamedTuple


class Observatory(NamedTuple):
    """A place on the Earth, as the Minor Planet Center gives it.

    Attributes
    ----------
    longitude_deg : degrees east
    rho_cos_phi, rho_sin_phi : distance from the Earth's axis and from the plane of its equator, in Earth radii
    """

    longitude_deg: float
    rho_cos_phi: float
    rho_sin_phi: float


# From the list of observatory codes, https://www.minorplanetcenter.net/iau/lists/ObsCodes.html
OBSERVATORIES = {
    "500": Observatory(0.0, 0.0, 0.0),  # the geocentre
    "695": Observatory(248.40533, 0.849504, 0.526425),  # Kitt Peak
    "703": Observatory(249.26736, 0.845311, 0.533211),  # Catalina Sky Survey
    "F51": Observatory(203.74409, 0.936241, 0.351543),  # Pan-STARRS 1, Haleakala
    "F52": Observatory(203.74409, 0.936239, 0.351545),  # Pan-STARRS 2, Haleakala
    "G96": Observatory(249.21128, 0.845107, 0.533611),  # Mt. Lemmon Survey
    "I41": Observatory(243.14022, 0.836322, 0.546875),  # Zwicky Transient Facility, Palomar
    "K94": Observatory(20.81097, 0.845561, -0.532606),  # Sutherland
    "L66": Observatory(20.81122, 0.845577, -0.532615),  # MeerLICHT, Sutherland
    "M22": Observatory(20.81059, 0.845564, -0.532612),  # ATLAS South Africa, Sutherland
    "M28": Observatory(20.81064, 0.845568, -0.532607),  # Lesedi, Sutherland
    "T05": Observatory(203.74299, 0.936236, 0.351547),  # ATLAS, Haleakala
    "T08": Observatory(204.42395, 0.94329, 0.332467),  # ATLAS, Mauna Loa
    "V00": Observatory(248.39981, 0.849456, 0.526492),  # Bok, Kitt Peak
    "W68": Observatory(289.23502, 0.862845, -0.504269),  # ATLAS Chile, Rio Hurtado
    "W84": Observatory(289.19358, 0.865572, -0.499793),  # Cerro Tololo, DECam
    "X05": Observatory(289.25058, 0.864981, -0.500958),  # Simonyi Survey Telescope, Rubin Observatory
}


def observatory_of(text: str) -> Observatory:
    """The place of a code, or of three numbers: longitude and parallax constants. ValueError if it is neither."""
    if text in OBSERVATORIES:
        return OBSERVATORIES[text]
    try:
        place = Observatory(*(float(number) for number in text.split()))
    except (TypeError, ValueError):
        place = None
    if place is None or not (-180.0 <= place[0] <= 360.0 and 0.0 <= place[1] <= 1.1 and abs(place[2]) <= 1.1):
        raise ValueError(
            f"expected one of {', '.join(OBSERVATORIES)}, or 'LONGITUDE RHO_COS_PHI RHO_SIN_PHI' "
            f"in degrees east and Earth radii, got {text!r}"
        )
    return place

"""What the numbers and letters of ZTF's packets and tables mean in our units; scalars or arrays alike."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import erfa
import numpy as np

from schemas.exposures import AB_ZERO_POINT_NJY

BAND_OF_FID = {1: "g", 2: "r", 3: "i"}
OBJECT_RADIUS_ARCSEC = 1.5  # the gate of ZTF's own objectId
EXPOSURE_S = 30.0  # of the public surveys, where a packet does not say
MAG_ERR_TO_RELATIVE = np.log(10.0) / 2.5

JD_RANGE = (2_410_000.5, 2_500_000.5)  # 1886 to 2132: what lies outside is no time

# pid = exposure number | rcid, two digits | two digits of processing
_PID_PER_EXPOSURE = 10_000
_JD_OF_MJD_0 = 2_400_000.5
_SECONDS_PER_DAY = 86_400.0

_OBJECT_NAME = re.compile("ZTF([0-9]{2})([a-z]{7})")
_LETTERS = 7
_NAMES_PER_YEAR = 26**_LETTERS
_LETTER_A = ord("a")


def visit_of_pid(pid: Any) -> Any:
    """The number of the exposure, the same for all its readout channels."""
    return pid // _PID_PER_EXPOSURE


def midpoint_mjd_tai(start_jd_utc: Any, exposure_s: Any) -> Any:
    """MJD TAI of the middle of an exposure from the JD UTC of its start, which is what ZTF calls jd.

    The JD must lie within `JD_RANGE`.
    """
    whole = np.rint(start_jd_utc)
    # The bare ufunc: its wrapper warns of years beyond the table of leap seconds, and so would every packet.
    tai_whole, tai_fraction, _ = erfa.ufunc.utctai(whole, start_jd_utc - whole)
    return (tai_whole - _JD_OF_MJD_0) + tai_fraction + 0.5 * exposure_s / _SECONDS_PER_DAY


def psf_flux_njy(magnitude: Any, is_positive: Any) -> Any:
    """Flux on the difference image from magpsf, negative where isdiffpos is false."""
    return np.where(is_positive, 1.0, -1.0) * _absolute_flux_njy(magnitude)


def psf_flux_err_njy(magnitude: Any, magnitude_err: Any) -> Any:
    """Standard error of `psf_flux_njy`: |flux| * err * ln(10) / 2.5."""
    return _absolute_flux_njy(magnitude) * magnitude_err * MAG_ERR_TO_RELATIVE


def significance(magnitude_err: Any) -> Any:
    """Flux over its error, from the error of the magnitude."""
    return 1.0 / (magnitude_err * MAG_ERR_TO_RELATIVE)


def njy_per_dn(zero_point_mag: Any) -> Any:
    """Flux of one DN at a zero point (magzpsci)."""
    return _absolute_flux_njy(zero_point_mag)


def is_positive(isdiffpos: object) -> bool:
    """isdiffpos in any of its spellings: t, 1 or true; f, 0 or false. ValueError for anything else."""
    if isdiffpos in ("t", "1", 1):
        return True
    if isdiffpos in ("f", "0", 0):
        return False
    raise ValueError("isdiffpos is none of t, f, 1, 0")


def object_number(name: str) -> int:
    """The diaObjectId of an objectId: year * 26^7 + the seven letters as a number of base 26.

    Raises
    ------
    ValueError
        Not of the form ZTF18abcdefg.
    """
    parts = _OBJECT_NAME.fullmatch(name)
    if parts is None:
        raise ValueError("objectId is not ZTF, two digits of the year, seven small letters")
    number = int(parts[1])
    for letter in parts[2]:
        number = 26 * number + ord(letter) - _LETTER_A
    return number


def object_name(number: int) -> str:
    """The objectId of a diaObjectId made by `object_number`; ValueError if there is none."""
    year, rest = divmod(number, _NAMES_PER_YEAR)
    if not 0 <= year < 100:
        raise ValueError(f"diaObjectId {number} is not of a ZTF object")
    letters = ""
    for _ in range(_LETTERS):
        rest, letter = divmod(rest, 26)
        letters = chr(_LETTER_A + letter) + letters
    return f"ZTF{year:02d}{letters}"


def ss_object_number(name: str) -> int:
    """A 63-bit ssObjectId from ssnamenr, a hash: names (numbers, designations, comets) are of any length."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") & (2**63 - 1)


def _absolute_flux_njy(magnitude: Any) -> Any:
    return 10.0 ** (0.4 * (AB_ZERO_POINT_NJY - magnitude))

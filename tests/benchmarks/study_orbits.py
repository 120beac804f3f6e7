"""How right orbits are with time from their epoch, and how known objects are matched in fields full of them.

Against JPL's Horizons, sorcha's ephemerides and detections of ZTF, in the precursor data beside the project; and
through `associate_ss_objects` on simulated fields. Prints tables; no data, no table.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import erfa
import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.observatories import OBSERVATORIES
from transforms.numerics.orbit_propagation import (
    AU_KM,
    DAY_S,
    LIGHT_AU_PER_D,
    OBLIQUITY_J2000_RAD,
    Orbits,
    observer_at,
    orbits_from_elements,
    perihelion_of_mean_anomaly,
    predict_positions,
    propagate_perturbed,
    propagate_two_body,
    tdb_of_tai,
)
from transforms.numerics.solar_system_matching import ephemeris_offsets

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("numerics", "stages")]
from known_object_fields import FieldScores, FieldSpec, field_scores  # noqa: E402
from orbit_samples import elements_of_states  # noqa: E402

DATA = Path(__file__).parents[3] / "shared" / "data"
FloatArray = NDArray[np.float64]
BINS = (0.0, 10.0, 50.0, 100.0, 200.0, 400.0, 600.0, 900.0, 2000.0, 5000.0, 20000.0)
OUMUAMUA = "1I/'Oumuamua (A/2017 U1)"  # JPL's orbit of it has outgassing
LEAP_SECOND_MJD = 57754.0  # its Julian date in UTC, by which Horizons was asked, is a second off
ZTF_HALF_EXPOSURE_D = 15.0 / 86400.0  # jd is the start of 30 s


class Places(NamedTuple):
    """Seen places and the orbits that are to predict them, one row each."""

    orbits: Orbits
    mjd_tai: FloatArray
    site: list[str]
    ra: FloatArray
    dec: FloatArray

    @property
    def days(self) -> FloatArray:
        return np.abs(self.mjd_tai - self.orbits.mjd_tdb)


def errors_arcsec(places: Places, propagate: Callable[[Orbits, float], Orbits]) -> FloatArray:
    """Distance of each place from the predicted one. Rows of one time and site are predicted together."""
    groups = defaultdict(list)
    for row, (mjd, site) in enumerate(zip(places.mjd_tai, places.site, strict=True)):
        groups[mjd, site].append(row)
    errors = np.empty(len(places.ra))
    for (mjd, site), found in groups.items():
        rows = np.array(found)
        observer = observer_at(mjd, *OBSERVATORIES[site])
        chosen = Orbits(*(column[rows] for column in places.orbits))
        seen = predict_positions(propagate(chosen, tdb_of_tai(mjd)), observer)
        still = np.zeros(len(rows))
        offsets = ephemeris_offsets(places.ra[rows], places.dec[rows], seen.ra_deg, seen.dec_deg, still, still)
        errors[rows] = offsets.offset
    return errors


def print_errors(title: str, places: Places) -> None:
    """Errors by days from the epoch; perturbed, and two-body beside it."""
    print(f"\n### {title}\n")
    print('| days from epoch | places | median | 95 % | max | within 1" | two-body median | 95 % | max |')
    print("|---|---|---|---|---|---|---|---|---|")
    perturbed, alone = errors_arcsec(places, propagate_perturbed), errors_arcsec(places, propagate_two_body)
    rows = list(pairwise(BINS))
    for first, last in [(0.0, 50.0), *rows]:
        inside = (places.days >= first) & (places.days < last)
        if inside.any():
            name = f"**{first:.0f} - {last:.0f}**" if (first, last) == (0.0, 50.0) else f"{first:.0f} - {last:.0f}"
            cells = [_three(perturbed[inside]), f"{np.mean(perturbed[inside] < 1.0):.4f}", _three(alone[inside])]
            print(f"| {name} | {inside.sum()} | {' | '.join(cells)} |")


def _three(errors: FloatArray) -> str:
    return " | ".join(f"{value:.4g}" for value in (*np.percentile(errors, [50, 95]), errors.max()))


# --- data ------------------------------------------------------------------------------------------------------


def tai_of_utc(mjd_utc: FloatArray) -> FloatArray:
    whole, fraction = erfa.utctai(2400000.5, mjd_utc)
    tai: FloatArray = (whole - 2400000.5) + fraction
    return tai


def rows_of(orbits: Orbits, rows: Iterable[int]) -> Orbits:
    chosen = np.fromiter(rows, dtype=np.int64)
    return Orbits(*(column[chosen] for column in orbits))


class Horizons(NamedTuple):
    states: Orbits
    name: list[str]
    site: list[str]
    mjd_tai: FloatArray
    ra: FloatArray
    dec: FloatArray

    def places(self, orbits: Orbits, rows: list[int]) -> Places:
        chosen = np.array(rows)
        return Places(orbits, self.mjd_tai[chosen], [self.site[row] for row in rows], self.ra[chosen], self.dec[chosen])


def read_horizons(folder: Path) -> Horizons:
    table = pyarrow.csv.read_csv(folder / "adam_core_horizons_ephemeris.csv")
    states = pq.read_table(folder / "adam_core_sample_orbits_state_vectors.parquet")["coordinates"].combine_chunks()
    moment = states.field("time")
    mjd = moment.field("days").to_numpy() + moment.field("nanos").to_numpy() / 86400e9
    vectors = [
        to_equator(np.stack([states.field(name).to_numpy() for name in names], axis=1))
        for names in (("x", "y", "z"), ("vx", "vy", "vz"))
    ]
    names, sites = (table[name].to_pylist() for name in ("targetname", "observatory_code"))
    ra, dec = table["RA"].to_numpy(), table["DEC"].to_numpy()
    return Horizons(Orbits(mjd, *vectors), names, sites, mjd - 32.184 / 86400.0, ra, dec)


def to_equator(ecliptic: FloatArray) -> FloatArray:
    cosine, sine = np.cos(OBLIQUITY_J2000_RAD), np.sin(OBLIQUITY_J2000_RAD)
    x, y, z = ecliptic.T
    return np.stack([x, cosine * y - sine * z, sine * y + cosine * z], axis=1)


def horizons_pairs(told: Horizons, every: int) -> tuple[list[int], list[int]]:
    """Rows of states, and of places of the same object; each `every`-th state with all of its places."""
    rows = defaultdict(list)
    for row, name in enumerate(told.name):
        if name != OUMUAMUA and told.states.mjd_tdb[row] != LEAP_SECOND_MJD:
            rows[name].append(row)
    pairs = [(start, end) for own in rows.values() for start in own[::every] for end in own]
    return [start for start, _ in pairs], [end for _, end in pairs]


def from_elements(states: Orbits) -> Orbits:
    """The same orbits by way of osculating elements."""
    return orbits_from_elements(*elements_of_states(*states))


def as_mpcorb_prints(states: Orbits) -> Orbits:
    """By way of elements with the digits of MPCORB: 1e-5 degrees, e and a to 1e-7."""
    q, e, inclination, node, argument, passage, epoch = elements_of_states(*states)
    semi_major = q / (1.0 - e)
    anomaly = np.degrees(0.01720209895 / semi_major**1.5) * (epoch - passage) % 360.0
    angles = [np.round(column, 5) for column in (inclination, node, argument, anomaly)]
    e, semi_major = np.round(e, 7), np.round(semi_major, 7)
    perihelion = perihelion_of_mean_anomaly(semi_major, e, angles[3], epoch)
    return orbits_from_elements(perihelion[0], e, *angles[:3], perihelion[1], epoch)


def sorcha_places(folder: Path) -> Places:
    """From every fourth row of an object, which gives its state when the light left, to all of its rows."""
    table = pyarrow.csv.read_csv(folder / "sorcha_sorcha_ephemeris.csv")
    distance = table["Range_LTC_km"].to_numpy() / AU_KM
    position, velocity = (
        np.stack([table[f"Obj_Sun_{name}{axis}_{unit}"].to_numpy() for axis in "xyz"], axis=1) / AU_KM
        for name, unit in (("", "LTC_km"), ("v", "LTC_km_s"))
    )
    mjd_tdb = table["fieldJD_TDB"].to_numpy() - 2400000.5 - distance / LIGHT_AU_PER_D
    states = Orbits(mjd_tdb, position, velocity * DAY_S)
    rows = defaultdict(list)
    for row, name in enumerate(table["ObjID"].to_pylist()):
        rows[name].append(row)
    pairs = [(start, end) for own in rows.values() for start in own[::4] for end in own]
    ends = np.array([end for _, end in pairs])
    place = (table[name].to_numpy()[ends] for name in ("fieldMJD_TAI", "RA_deg", "Dec_deg"))
    mjd, ra, dec = place
    return Places(rows_of(states, (start for start, _ in pairs)), mjd, ["X05"] * len(ends), ra, dec)


class Catalogue(NamedTuple):
    """Orbits by the number of the asteroid."""

    orbits: Orbits
    row_of: dict[str, int]


def read_sbdb(folder: Path) -> Catalogue:
    table = pq.read_table(folder / "jpl_sbdb_asteroids_epoch59800.parquet")
    columns = {
        name: np.asarray(table[name].to_numpy(), float) for name in ("a", "e", "i", "om", "w", "ma", "epoch_mjd")
    }
    good = np.isfinite(np.stack(list(columns.values()))).all(axis=0) & (columns["a"] > 0.0)
    a, e, i, node, argument, anomaly, epoch = (column[good] for column in columns.values())
    perihelion = perihelion_of_mean_anomaly(a, e, anomaly, epoch)
    orbits = orbits_from_elements(perihelion[0], e, i, node, argument, perihelion[1], epoch)
    numbers = np.array(table["number"].to_pylist(), dtype=object)[good]
    return Catalogue(orbits, {number: row for row, number in enumerate(numbers) if number})


def read_mpcorb(folder: Path) -> Catalogue:
    """The excerpt, whose epoch is K205V: 2020 May 31."""
    rows, row_of = [], {}
    for line in (folder / "MPCORB.excerpt.DAT").read_text().splitlines():
        if line[20:25] == "K205V":
            row_of[str(int(line[:5]))] = len(rows)
            spans = ((26, 35), (37, 46), (48, 57), (59, 68), (70, 79), (92, 103))
            rows.append([float(line[first:last]) for first, last in spans])
    anomaly, argument, node, inclination, e, a = np.array(rows).T
    epoch = np.full(len(rows), 59000.0)
    perihelion = perihelion_of_mean_anomaly(a, e, anomaly, epoch)
    return Catalogue(orbits_from_elements(perihelion[0], e, inclination, node, argument, perihelion[1], epoch), row_of)


def horizons_places(told: Horizons, catalogue: Catalogue) -> Places:
    numbers = [name.split()[0] for name in told.name]
    rows = [row for row, number in enumerate(numbers) if number in catalogue.row_of]
    return told.places(rows_of(catalogue.orbits, (catalogue.row_of[numbers[row]] for row in rows)), rows)


def ztf_places(folder: Path, catalogue: Catalogue) -> Places:
    table = pq.read_table(folder / "ztf_sso_detections.parquet")
    names = table["ssnamenr"].to_pylist()
    rows = [row for row, name in enumerate(names) if name in catalogue.row_of]
    mjd = tai_of_utc(table["jd"].to_numpy()[rows] - 2400000.5 + ZTF_HALF_EXPOSURE_D)
    orbits = rows_of(catalogue.orbits, (catalogue.row_of[names[row]] for row in rows))
    print(
        f"\nZTF: {len(rows)} of {len(names)} detections are of "
        f"{len({names[row] for row in rows})} asteroids with elements"
    )
    return Places(orbits, mjd, ["I41"] * len(rows), table["ra"].to_numpy()[rows], table["dec"].to_numpy()[rows])


# --- tables ----------------------------------------------------------------------------------------------------


def orbit_tables() -> None:
    folder = DATA / "solar_system_orbits"
    told = read_horizons(folder)
    starts, ends = horizons_pairs(told, every=9)
    states = rows_of(told.states, starts)
    print_errors("Horizons, from its state vectors (27 objects)", told.places(states, ends))
    print_errors("Horizons, from osculating elements of those states", told.places(from_elements(states), ends))
    print_errors("Horizons, from those elements with MPCORB's digits", told.places(as_mpcorb_prints(states), ends))
    print_errors("sorcha (ASSIST), from states in its rows (8 objects)", sorcha_places(folder))
    sbdb, mpcorb = read_sbdb(folder), read_mpcorb(folder)
    print_errors("Horizons, from JPL SBDB elements (12 objects)", horizons_places(told, sbdb))
    print_errors("Horizons, from MPCORB (Pallas)", horizons_places(told, mpcorb))
    print_errors("ZTF detections, from JPL SBDB elements", ztf_places(DATA / "ztf_solar_system", sbdb))


def field_tables(seeds: int, first_seed: int) -> None:
    print("\n### Known objects in a field, through associate_ss_objects (radius 1 arcsec)\n")
    print(
        '| field | seed | known | sources | matched | wrong | missed: beyond 1" | taken by another | wrong: no object |'
    )
    print("|---|---|---|---|---|---|---|---|---|")
    specs = {
        "3.5 deg, 21 x 9 detectors, 10,000 others": FieldSpec(),
        "3.5 deg, 50,000 others": FieldSpec(others=50_000),
        "3.5 deg, orbits twice as far off": FieldSpec(orbit_error_arcsec=0.124),
        "3.5 deg, orbits five times as far off": FieldSpec(orbit_error_arcsec=0.31),
        "3.5 deg, 20,000 known, 10,000 faint": FieldSpec(known=20_000, undetected=10_000),
    }
    for name, spec in specs.items():
        scores = [field_scores(spec, seed) for seed in range(first_seed, first_seed + seeds)]
        for seed, one in enumerate(scores, first_seed):
            print(_field_row(name, str(seed), [one]))
        print(_field_row(f"**{name}**", "all", scores))


def _field_row(name: str, seed: str, scores: list[FieldScores]) -> str:
    known, sources, matches, outside, taken, others = (
        sum(getattr(one, column) for one in scores)
        for column in ("known", "sources", "matches", "missed_outside", "missed_taken", "wrong_others")
    )
    wrong = sum(round(one.wrong * one.matches) for one in scores)
    cells = (known, sources, f"{1 - (outside + taken) / known:.5f}", f"{wrong / matches:.5f}", outside, taken, others)
    return f"| {name} | {seed} | {' | '.join(map(str, cells))} | {np.mean([one.cpu_ms for one in scores]):.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1, help="the first")
    parser.add_argument("--only", choices=["orbits", "fields"])
    given = parser.parse_args()
    if given.only != "fields":
        if DATA.is_dir():
            orbit_tables()
        else:
            print(f"no {DATA}: no comparison with real ephemerides")
    if given.only != "orbits":
        field_tables(given.seeds, given.seed)


if __name__ == "__main__":
    main()

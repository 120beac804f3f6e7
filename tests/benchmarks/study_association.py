"""How right association and the statistics of diaObjects are: against what surveys have published.

    python tests/benchmarks/study_association.py [--only association|statistics]

Sets: public ZTF, ELAsTiCC (simulated, every object at one place; `scattered` as a telescope would have seen it), and
LSST's own packets (HSC images of COSMOS, LSSTCam, the rehearsals OR4 and OR5), alerts and their histories together.

Tables
  association   through the stage, cell by cell, at the survey's own gate: detections of objects whose true object the
                survey tells; `right`: it lies in the object that holds most of its true object, and most of that are of
                it; `alone`: and no other true object is in there. `clear` are the detections of true objects within
                whose gate no other object of the survey lies and no visit has a second source, and `right` of those.
                `unfit`: without an object when the rules of today decide who may found one (flags and reliability of
                the packets), and `right` of the clear others
  wrong         why those that are not right are not, a line for each true object: the first reason that holds
  statistics    columns of diaObject in the band of the visit against LSST's packet, summed up over the light curve in
                the packet: where both have a value, how many are the same bits, the largest relative difference, and
                that of means over what cancellation magnifies; where only one has. An object's errors are those of its
                founder, of its first source where the packet does not hold that
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))

from survey_sources import Comparison, Survey, compare, elasticc, lsst, ztf
from survey_statistics import Summary, summaries

from schemas.records import DIA_OBJECT

LSST_SETS = (
    "hsc",
    "lsstcam_20250905",
    "lsstcam_20251231",
    "lsstcam_20260222",
    "lsstcam_20260305",
    "sim_or4",
    "sim_or5",
)
LONG_HISTORIES = "lsstcam_20260305"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("association", "statistics"))
    parser.add_argument("--seed", type=int, default=1, help="of the scatter of ELAsTiCC")
    options = parser.parse_args()
    print(f"python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, seed {options.seed}")
    if options.only in (None, "association"):
        with tempfile.TemporaryDirectory() as folder:
            association(Path(folder), options.seed)
    if options.only in (None, "statistics"):
        statistics("long histories", [LONG_HISTORIES])
        statistics("all packets of LSST", list(LSST_SETS))


def association(folder: Path, seed: int) -> None:
    surveys: dict[str, Callable[[], Survey]] = {
        "ztf": lambda: ztf(folder),
        "elasticc": lambda: elasticc(folder),
        "elasticc scattered": lambda: elasticc(folder, seed),
    }
    surveys |= {name: lambda name=name: lsst(name, folder, judged=False) for name in LSST_SETS}
    print("\nassociation          gate  detections  objects    right %  alone %   clear  right %   unfit  right %")
    wrong = {}
    for name, make in surveys.items():
        survey = make()
        found = compare(survey)
        today = compare(lsst(name, folder, judged=True)) if name in LSST_SETS else found
        tied = today.clear & (today.sources["diaObjectId"] != 0)
        print(
            f"{name:20s} {survey.radius_arcsec:4.1f} {len(found.sources):11d} {len(set(survey.truth.values())):8d} "
            f"{100 * found.right.mean():10.3f} {100 * found.alone.mean():8.3f} {found.clear.sum():7d} "
            f"{100 * found.right[found.clear].mean():8.3f} {np.count_nonzero(today.sources['diaObjectId'] == 0):7d} "
            f"{100 * today.right[tied].mean():8.3f}"
        )
        wrong[name] = (survey, found)
    print("\nwrong                true object          wrong  of  reason")
    for name, (survey, found) in wrong.items():
        explain(name, survey, found)


def explain(name: str, survey: Survey, found: Comparison) -> None:
    counts = Counter((survey.truth[one], reason) for one, reason in found.reasons.items())
    members = Counter(survey.truth[one] for one in found.sources["diaSourceId"].tolist())
    for (true_object, reason), count in sorted(counts.items(), key=str):
        print(f"{name:20s} {true_object!s:20s} {count:5d} {members[true_object]:3d}  {reason}")


def statistics(title: str, sets: list[str]) -> None:
    found = [one for name in sets for one in summaries(name)]
    print(f"\nstatistics, {title}: {len(found)} objects, {sum(len(one.rows) for one in found)} detections")
    print("column                    both  same bits  largest  uncancelled  ours only  theirs only  neither")
    for column in DIA_OBJECT.names or ():
        if column[1] != "_" or column.startswith("g_"):
            line(column, found)
    other = [one.value(f"{band}_psfFluxMean") is not None for one in found for band in "ugrizy" if band != one.band]
    theirs = [one.theirs.get(f"{band}_psfFluxMean") for one in found for band in "ugrizy" if band != one.band]
    print(f"psfFluxMean of other bands: ours {sum(other)}, theirs {sum(one is not None for one in theirs)}")


def line(column: str, found: list[Summary]) -> None:
    """A column, or of those that each band has the one of the visit's band."""
    both, same, ours_only, theirs_only = 0, 0, 0, 0
    largest, uncancelled = 0.0, 0.0
    for one in found:
        name = f"{one.band}{column[1:]}" if column[1] == "_" else column
        ours, theirs = one.value(name), one.theirs.get(name)
        if ours is None or theirs is None:
            ours_only, theirs_only = ours_only + (ours is not None), theirs_only + (theirs is not None)
            continue
        both, same = both + 1, same + (ours == theirs)
        difference = abs(ours - theirs) / max(abs(theirs), 1e-300)
        largest = max(largest, difference)
        uncancelled = max(uncancelled, difference / one.cancellation(name))
    label = f"b{column[1:]}" if column[1] == "_" else column
    neither = len(found) - both - ours_only - theirs_only
    print(
        f"{label:24s} {both:5d} {same:10d} {largest:8.1e} {uncancelled:12.1e} {ours_only:10d} {theirs_only:12d} "
        f"{neither:8d}"
    )


if __name__ == "__main__":
    main()

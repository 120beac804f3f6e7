"""LoadSources: the rows of a DIA-source table where detector space would have measured pixels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import apache_beam as beam
import numpy as np

from schemas.elements import CatalogueSources, DetectorVisit, StageElement, VisitPart
from schemas.records import take_records
from schemas.source_tables import read_source_table
from transforms.cutouts import detector_account
from transforms.failures import FAILED, StageFn

STAGE = "catalogue"
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


class CatalogueResult(NamedTuple):
    """`good`: CatalogueSources; `failed`: FailureRecord."""

    good: beam.PCollection
    failed: beam.PCollection


class LoadSources(beam.PTransform):
    """Give each announced detector the rows that the table holds for it.

    Input: DetectorVisit. Output `good`: CatalogueSources, rows in order of diaSourceId, and after each the
    VisitPart that says it was processed; `failed`: nothing today, as rows that cannot be used were
    problems of the manifest. The table is loaded once per worker. No state.
    """

    def __init__(self, table: str) -> None:
        super().__init__()
        self.table = table

    def expand(self, detectors: beam.PCollection) -> CatalogueResult:
        outputs = detectors | "LoadRows" >> beam.ParDo(_LoadRowsFn(self.table)).with_output_types(
            StageElement
        ).with_outputs(FAILED, main="good")
        return CatalogueResult(outputs.good, outputs[FAILED])


class _LoadRowsFn(StageFn):
    def __init__(self, table: str) -> None:
        self.table = table

    def setup(self) -> None:
        records = read_source_table(Path(self.table)).records
        order = np.lexsort((records["diaSourceId"], records["detector"], records["visit"]))
        self.records = take_records(records, order)
        self.visits = np.ascontiguousarray(self.records["visit"])

    def work(self, element: DetectorVisit) -> Iterator[Any]:
        started_at = time.time()
        first, last = (int(np.searchsorted(self.visits, element.visit.visit, side)) for side in _SIDES)
        rows = take_records(self.records, slice(first, last))
        rows = take_records(rows, rows["detector"] == element.detector)
        yield CatalogueSources(element.visit, element.detector, rows)
        n_moving = int(np.count_nonzero(rows["ssObjectId"]))
        account = detector_account(element.detector, len(rows), len(rows), started_at, ss_matches=n_moving)
        yield VisitPart(element.visit.visit, element.visit.midpoint_mjd_tai, account)

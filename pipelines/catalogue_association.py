"""Catalogue association: a table of diaSources enters where detector space would have measured them."""

from __future__ import annotations

from dataclasses import dataclass

import apache_beam as beam

from transforms.association import AssociateDiaSources, AssociationConfig
from transforms.catalogue import LoadSources
from transforms.delivery import DeliverAlerts, Delivery, collect_failures
from transforms.ingestion import ReadVisits, VisitList
from transforms.packaging import PackageAlerts, PackagingConfig


@dataclass(frozen=True)
class CatalogueAssociation:
    """The dataflow, and where it reads and writes.

    Attributes
    ----------
    visits : the visits that a DIA-source table speaks of
    delivery : who gets what
    history : output folders of earlier nights
    """

    visits: VisitList
    delivery: Delivery
    association: AssociationConfig
    packaging: PackagingConfig
    history: tuple[str, ...] = ()

    def build(self, flow: beam.Pipeline, *, spread: bool = False) -> None:
        """Add the chain from sky space on to a pipeline. There are no pixels: no forced photometry, no cutouts.

        `spread`: detectors go to all workers, by one Reshuffle behind the source.
        """
        visits = flow | "ReadVisits" >> ReadVisits(self.visits, self.history, spread=spread)
        loaded = visits.good | "LoadSources" >> LoadSources(self.visits.path)
        associated = loaded.good | "AssociateDiaSources" >> AssociateDiaSources(self.association, image_store=None)
        packaged = associated.good | "PackageAlerts" >> PackageAlerts(self.packaging, None, self.delivery)
        undelivered = packaged.good | "DeliverAlerts" >> DeliverAlerts(self.delivery)
        stages = (visits, loaded, associated, packaged)
        collect_failures([*(stage.failed for stage in stages), undelivered], self.delivery)

"""Alert production: from visits read out to alert packets in brokers' hands. Read this file first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import apache_beam as beam

from schemas.claim_check import ImageStore
from transforms.association import AssociateDiaSources, AssociationConfig
from transforms.cutouts import CutoutConfig, EncodeCutouts
from transforms.delivery import DeliverAlerts, Delivery, collect_failures
from transforms.detection import DetectDiaSources, DetectionConfig
from transforms.ingestion import VisitList
from transforms.packaging import PackageAlerts, PackagingConfig
from transforms.quarantine import QuarantineConfig, QuarantineDetectors
from transforms.solar_system import AssociateSsObjects, SolarSystemConfig
from transforms.subtraction import SubtractionConfig, SubtractTemplates
from transforms.visit_stream import VisitStream, read_visits


@dataclass(frozen=True)
class AlertProductionConfig:
    """One block per stage, as in `alert_production.yaml`."""

    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    subtraction: SubtractionConfig = field(default_factory=SubtractionConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    solar_system: SolarSystemConfig = field(default_factory=SolarSystemConfig)
    cutouts: CutoutConfig = field(default_factory=CutoutConfig)
    association: AssociationConfig = field(default_factory=AssociationConfig)
    packaging: PackagingConfig = field(default_factory=PackagingConfig)


@dataclass(frozen=True)
class AlertProduction:
    """The dataflow, and where it reads and writes.

    Attributes
    ----------
    visits : the visits of a night folder, or the topic on which they are announced as they are taken
    delivery : who gets what
    ephemerides : Parquet file of known objects' places, or None
    history : output folders of earlier nights
    elements : file of known objects' orbits, or None
    """

    visits: VisitList | VisitStream
    delivery: Delivery
    config: AlertProductionConfig
    ephemerides: str | None = None
    history: tuple[str, ...] = ()
    elements: str | None = None

    def build(self, flow: beam.Pipeline, *, spread: bool = False) -> None:
        """Add the whole chain to a pipeline.

        `spread`: detectors go to all workers, by one Reshuffle behind the source.
        """
        config, store = self.config, Path(self.delivery.store)
        images, cutouts = ImageStore(str(store / "images")), str(store / "cutouts")

        # Detector space: one element per detector of a visit; pixels stay on their worker.
        visits = flow | "ReadVisits" >> read_visits(self.visits, self.history, spread=spread)
        subtract = SubtractTemplates(config.subtraction, images)
        detect = DetectDiaSources(config.detection)
        name = AssociateSsObjects(config.solar_system, self.ephemerides, self.elements)
        stamp = EncodeCutouts(config.cutouts, cutouts)
        detector_space = (subtract.stage, detect.stage, name.stage, stamp.stage)
        quarantine = QuarantineDetectors(
            config.quarantine, detector_space, self.delivery.attempts_folder, self.delivery.quarantine_folder
        )
        admitted = visits.good | "QuarantineDetectors" >> quarantine
        subtracted = admitted.good | "SubtractTemplates" >> subtract
        detected = subtracted.good | "DetectDiaSources" >> detect
        named = detected.good | "AssociateSsObjects" >> name
        stamped = named.good | "EncodeCutouts" >> stamp

        # Sky space: keyed by sky cell, in event time; the only stage that remembers.
        associated = stamped.good | "AssociateDiaSources" >> AssociateDiaSources(config.association, images)
        package = PackageAlerts(config.packaging, cutouts, self.delivery, self.elements)
        packaged = associated.good | "PackageAlerts" >> package

        # Visit space: keyed by visit; thin columns and locations of finished packets.
        live = isinstance(self.visits, VisitStream)
        deliver = DeliverAlerts(self.delivery, keeps=live and not spread, sweeps=live)
        undelivered = packaged.good | "DeliverAlerts" >> deliver
        stages = (visits, admitted, subtracted, detected, named, stamped, associated, packaged)
        collect_failures([*(stage.failed for stage in stages), undelivered], self.delivery)

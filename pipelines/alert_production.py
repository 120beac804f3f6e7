"""Alert production: from visits read out to alert packets in brokers' hands. Read this file first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import apache_beam as beam

from schemas.claim_check import ImageStore
from transforms.accounting import AccountVisits
from transforms.archiving import ArchiveAlerts
from transforms.association import AssociateDiaSources, AssociationConfig
from transforms.cutouts import EncodeCutouts
from transforms.detection import DetectDiaSources, DetectionConfig
from transforms.distribution import AlertSink, BrokerConfig, DistributeAlerts, full_streams
from transforms.failures import CollectFailures
from transforms.filtering import FilterAlerts, GatherVisits
from transforms.filters.checking import CheckedFilter
from transforms.ingestion import ReadVisits
from transforms.packaging import PackageAlerts, PackagingConfig
from transforms.solar_system import AssociateSsObjects, SolarSystemConfig
from transforms.subtraction import SubtractionConfig, SubtractTemplates


@dataclass(frozen=True)
class AlertProductionConfig:
    """One block per stage, as in `alert_production.yaml`."""

    subtraction: SubtractionConfig = field(default_factory=SubtractionConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    solar_system: SolarSystemConfig = field(default_factory=SolarSystemConfig)
    association: AssociationConfig = field(default_factory=AssociationConfig)
    packaging: PackagingConfig = field(default_factory=PackagingConfig)


@dataclass(frozen=True)
class AlertProduction:
    """The dataflow, and where it reads and writes.

    Attributes
    ----------
    night : night folder
    out : output folder
    store : folder of the claim-check stores, shared by all workers
    ephemerides : Parquet file, or None
    history : output folders of earlier nights
    brokers, filters : who gets what
    sink : where Kafka streams go; None leaves them out
    spread : spread detectors over workers, one Reshuffle behind the source; for runners with several
    """

    night: str
    out: str
    store: str
    config: AlertProductionConfig
    brokers: tuple[BrokerConfig, ...]
    filters: tuple[CheckedFilter, ...]
    ephemerides: str | None = None
    history: tuple[str, ...] = ()
    sink: AlertSink | None = None
    spread: bool = False

    def build(self, flow: beam.Pipeline) -> None:
        """Add the whole chain to a pipeline."""
        config, store, out = self.config, Path(self.store), Path(self.out)
        images, cutouts, packets = ImageStore(str(store / "images")), str(store / "cutouts"), str(store / "packets")
        columns = frozenset({"diaSource.diaSourceId"}).union(*(one.columns for one in self.filters))
        streams = full_streams(self.brokers)
        deadline_s = config.packaging.delivery_deadline_s

        # Detector space: one element per detector of a visit; pixels stay on their worker.
        visits = flow | "ReadVisits" >> ReadVisits(self.night, self.history, spread=self.spread)
        subtracted = visits.good | "SubtractTemplates" >> SubtractTemplates(config.subtraction, images)
        detected = subtracted.good | "DetectDiaSources" >> DetectDiaSources(config.detection)
        named = detected.good | "AssociateSsObjects" >> AssociateSsObjects(config.solar_system, self.ephemerides)
        stamped = named.good | "EncodeCutouts" >> EncodeCutouts(cutouts)

        # Sky space: keyed by sky cell, in event time; the only stage that remembers.
        associated = stamped.good | "AssociateDiaSources" >> AssociateDiaSources(config.association, images)
        packaged = associated.good | "PackageAlerts" >> PackageAlerts(
            config.packaging,
            cutout_folder=cutouts,
            packet_folder=packets,
            streams=streams,
            sink=self.sink,
            filter_columns=columns,
        )

        # Visit space: keyed by visit; thin columns and locations of finished packets.
        gathered = packaged.good | "GatherVisits" >> GatherVisits(columns)
        filtered = gathered | "FilterAlerts" >> FilterAlerts(self.filters)
        distributed = filtered.good | "DistributeAlerts" >> DistributeAlerts(
            self.brokers,
            schema_version=config.packaging.schema_version,
            packet_folder=packets,
            broker_folder=str(out / "brokers"),
            filter_folder=str(out / "filters"),
            sink=self.sink,
            delivery_deadline_s=deadline_s,
        )
        archived = distributed.good | "ArchiveAlerts" >> ArchiveAlerts(
            str(out / "archive"), schema_version=config.packaging.schema_version, packet_folder=packets
        )
        archived.good | "AccountVisits" >> AccountVisits(
            str(out / "ledger"), streams=streams, sink=self.sink, delivery_deadline_s=deadline_s
        )
        failures = (
            visits.failed,
            subtracted.failed,
            detected.failed,
            named.failed,
            stamped.failed,
            associated.failed,
            packaged.failed,
            filtered.failed,
            distributed.failed,
            archived.failed,
        ) | "JoinFailures" >> beam.Flatten()
        failures | "CollectFailures" >> CollectFailures(str(out / "failures"))

"""DeliverAlerts: visit space as a whole, the part that every entry into the chain ends with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import apache_beam as beam

from schemas.avro.messages import JSON_THIN
from transforms.accounting import AccountVisits
from transforms.alert_columns import JSON_COLUMNS
from transforms.archiving import ArchiveAlerts
from transforms.distribution import BrokerConfig, DistributeAlerts, KafkaStream, full_streams
from transforms.failures import CollectFailures
from transforms.filtering import FilterAlerts, GatherVisits
from transforms.filters.checking import CheckedFilter
from transforms.sending import AlertSink

ATTEMPTS = ".attempts"


@dataclass(frozen=True)
class Delivery:
    """Who gets what, and where everything is written.

    Attributes
    ----------
    out : output folder
    store : folder of the claim-check stores, shared by all workers
    brokers, filters : who gets what
    sink : where Kafka streams go; None leaves them out
    deadline_s : how long one flush to Kafka may take
    """

    out: str
    store: str
    brokers: tuple[BrokerConfig, ...]
    filters: tuple[CheckedFilter, ...]
    sink: AlertSink | None = None
    deadline_s: float = 120.0

    @property
    def packet_folder(self) -> str:
        return str(Path(self.store) / "packets")

    @property
    def attempts_folder(self) -> str:
        """Outlives the stores: the same command again is to know at which detectors it broke off."""
        return str(Path(self.out) / ATTEMPTS)

    @property
    def quarantine_folder(self) -> str:
        return str(Path(self.out) / "ledger" / "quarantine")

    @cached_property
    def streams(self) -> tuple[KafkaStream, ...]:
        """The full streams that are sent where packets are made."""
        return full_streams(self.brokers)

    @cached_property
    def filter_columns(self) -> frozenset[str]:
        """The columns that the installed filters need, and those of alerts in JSON where a broker gets them."""
        in_json = JSON_COLUMNS if any(broker.encoding == JSON_THIN for broker in self.brokers) else frozenset()
        return frozenset({"diaSource.diaSourceId"}).union(in_json, *(one.columns for one in self.filters))


class DeliverAlerts(beam.PTransform):
    """Gather visits, run the filters on them, serve the brokers, archive, and write the ledger.

    Input: (visit, bytes) parts, their packets in the packet store and sent on the full streams. Output:
    FailureRecord of its stages. Keyed by visit; thin columns and locations of finished packets. Without
    `archive` nothing is archived: what is replayed is in an archive. `keeps`: see `GatherVisits`. `sweeps`: the stores
    are rid of old visits, for a job without an end.
    """

    def __init__(self, delivery: Delivery, *, archive: bool = True, keeps: bool = False, sweeps: bool = False) -> None:
        super().__init__()
        self.delivery = delivery
        self.archive = archive
        self.keeps = keeps
        self.sweeps = sweeps

    def expand(self, parts: beam.PCollection) -> beam.PCollection:
        to, out = self.delivery, Path(self.delivery.out)
        gathered = parts | "GatherVisits" >> GatherVisits(to.filter_columns, keeps=self.keeps)
        filtered = gathered | "FilterAlerts" >> FilterAlerts(to.filters)
        done = distributed = filtered.good | "DistributeAlerts" >> DistributeAlerts(
            to.brokers,
            packet_folder=to.packet_folder,
            broker_folder=str(out / "brokers"),
            filter_folder=str(out / "filters"),
            sink=to.sink,
            delivery_deadline_s=to.deadline_s,
        )
        failed = [filtered.failed, distributed.failed]
        if self.archive:
            done = distributed.good | "ArchiveAlerts" >> ArchiveAlerts(
                str(out / "archive"), packet_folder=to.packet_folder
            )
            failed.append(done.failed)
        done.good | "AccountVisits" >> AccountVisits(
            str(out / "ledger"),
            streams=to.streams,
            sink=to.sink,
            delivery_deadline_s=to.deadline_s,
            store=to.store if self.sweeps else None,
        )
        return tuple(failed) | "JoinFailures" >> beam.Flatten()


def collect_failures(failures: Iterable[beam.PCollection], delivery: Delivery) -> None:
    """Write down what failed in any stage."""
    joined = tuple(failures) | "JoinFailures" >> beam.Flatten()
    joined | "CollectFailures" >> CollectFailures(
        str(Path(delivery.out) / "failures"), sink=delivery.sink, delivery_deadline_s=delivery.deadline_s
    )

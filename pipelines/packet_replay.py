"""Packet replay: finished packets enter where they would have been made, and keep their bytes."""

from __future__ import annotations

from dataclasses import dataclass

import apache_beam as beam

from transforms.delivery import DeliverAlerts, Delivery, collect_failures
from transforms.ingestion import ReadVisits, VisitList
from transforms.replaying import LoadPackets


@dataclass(frozen=True)
class PacketReplay:
    """The dataflow, and where it reads and writes.

    Attributes
    ----------
    visits : the visits that an index of packets speaks of
    delivery : who gets what
    """

    visits: VisitList
    delivery: Delivery

    def build(self, flow: beam.Pipeline, *, spread: bool = False) -> None:
        """Add the chain from finished packets on to a pipeline. They are in an archive: none is written.

        `spread`: detectors go to all workers, by one Reshuffle behind the source.
        """
        visits = flow | "ReadVisits" >> ReadVisits(self.visits, spread=spread)
        loaded = visits.good | "LoadPackets" >> LoadPackets(self.visits.path, self.delivery)
        undelivered = loaded.good | "DeliverAlerts" >> DeliverAlerts(self.delivery, archive=False)
        collect_failures([visits.failed, loaded.failed, undelivered], self.delivery)

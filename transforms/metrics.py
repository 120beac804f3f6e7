"""What the stages count while they run, for Flink's web page, `nightstream flink status` and Prometheus.

Beam metrics of the namespace `nightstream`: counters and gauges, as those two are numbers everywhere. They are told
when a bundle has gone through, begin at 0 when a job starts or starts again, and count work, so what is done twice
counts twice; the ledger has the figures of the night. Once for an exposure, batch or visit, never for each alert. A
name belongs to one step: of steps that Flink runs as one task and that count under one name, only one would be told.
"""

from __future__ import annotations

from apache_beam.metrics import Metrics

NAMESPACE = "nightstream"

# The source of announced visits.
ANNOUNCEMENTS_READ = Metrics.counter(NAMESPACE, "announcements_read")
SOURCE_OFFSET = Metrics.gauge(NAMESPACE, "source_offset")  # of the message to be read next
VISITS_OPEN = Metrics.gauge(NAMESPACE, "visits_open")  # announced in part
VISITS_CLOSED = Metrics.counter(NAMESPACE, "visits_closed")
VISITS_TIMED_OUT = Metrics.counter(NAMESPACE, "visits_timed_out")  # of those closed
# Detector space.
DETECTORS_SUBTRACTED = Metrics.counter(NAMESPACE, "detectors_subtracted")
DIA_SOURCES = Metrics.counter(NAMESPACE, "dia_sources")  # selected, on their way to association
# Sky space.
ALERTS_PACKAGED = Metrics.counter(NAMESPACE, "alerts_packaged")
PACKETS_ACKNOWLEDGED = Metrics.counter(NAMESPACE, "packets_acknowledged")  # by Kafka, over all full streams
BYTES_ACKNOWLEDGED = Metrics.counter(NAMESPACE, "bytes_acknowledged")
# Visit space.
FILTER_PASSES = Metrics.counter(NAMESPACE, "filter_passes")  # alerts, over all filters
FILTERED_PACKETS_ACKNOWLEDGED = Metrics.counter(NAMESPACE, "filtered_packets_acknowledged")
FILTERED_BYTES_ACKNOWLEDGED = Metrics.counter(NAMESPACE, "filtered_bytes_acknowledged")
VISITS_ACCOUNTED = Metrics.counter(NAMESPACE, "visits_accounted")  # ledger records written
FAILURES = Metrics.counter(NAMESPACE, "failures")  # failure records written

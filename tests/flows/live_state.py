"""What the state of a live job hangs on, as text; `tests/golden/live_state.txt` is what it was at the last change.

    PYTHONPATH=. python tests/flows/live_state.py

writes the file anew. Before that read "Upgrades" in docs/operations.md: most changes of it end the lives of savepoints.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.utils.timestamp import Timestamp

from pipelines.alert_production import AlertProduction, AlertProductionConfig
from runners import flink_operations
from runners.cluster.flink import flink_configuration
from runners.cluster.settings import load_cluster_settings
from runners.configuration import load_brokers, load_checked_filters
from runners.flink import labelled
from runners.flink_setup import load_flink_settings
from runners.kafka import KafkaMessageLog
from schemas.elements import CatalogueSources, FailureRecord, VisitPart
from schemas.framing import unpack
from schemas.manifests import DetectorImages, Visit, announcements, parse_announcement
from schemas.records import DIA_FORCED_SOURCE, DIA_OBJECT, DIA_SOURCE, SS_SOURCE, empty_records
from transforms import cell_state
from transforms.alert_columns import thin_schema
from transforms.association import sky_messages
from transforms.cutouts import detector_account
from transforms.delivery import Delivery
from transforms.failures import failure_line, failure_part
from transforms.ingestion import WatermarkBySource, announcement_part
from transforms.packaging import alerts_part
from transforms.visit_stream import StreamPosition, VisitStream, _OpenVisit

GOLDEN = Path(__file__).parents[1] / "golden" / "live_state.txt"
STAGES, POSITION = "stages", "position of the source"
RESUMED = (
    "A release with this change goes on from savepoints: stages, or fields with defaults, were added, nothing else."
)
NOT_RESUMED = (
    "Savepoints are resumed with this change only if the old form is still read, which a test has to show. Otherwise "
    'undo it, or write in CHANGELOG.md "cannot be resumed from savepoints of" and the releases.'
)
ADVICE = "Then write the file anew: PYTHONPATH=. python tests/flows/live_state.py"


def live_graph() -> beam_runner_api_pb2.Pipeline:
    """The dataflow of a live job as it is submitted to a cluster."""
    filters, _ = load_checked_filters(None)
    delivery = Delivery("/out", "/out/.store", load_brokers(None), filters)
    visits = VisitStream(KafkaMessageLog("localhost:9092", "visits"), "/out/ledger/closings")
    flow = beam.Pipeline(options=PipelineOptions([]))
    AlertProduction(visits, delivery, AlertProductionConfig()).build(flow, spread=True)
    return labelled(flow.to_runner_api())


def fingerprint(graph: beam_runner_api_pb2.Pipeline | None = None) -> str:
    """What state hangs on, in sections: a line `[name]`, then sorted lines."""
    graph = live_graph() if graph is None else graph
    sections: dict[str, Callable[[], Iterator[str]]] = {
        "versions": _versions,
        STAGES: lambda: _stages(graph),
        "state of stages": lambda: _states(graph),
        POSITION: _position,
        "messages that wait, and parts of visits": _messages,
        "records": _records,
    }
    return "\n".join(f"[{name}]\n" + "".join(f"{line}\n" for line in lines()) for name, lines in sections.items())


def verdict(was: str, is_now: str) -> str:
    """What to do about a difference; empty if there is none."""
    if was == is_now:
        return ""
    lost = set(_lines(was)) - set(_lines(is_now))
    added = set(_lines(is_now)) - set(_lines(was))
    harmless = all(section == STAGES or (section == POSITION and " = " in line) for section, line in added)
    told = RESUMED if harmless and not lost else NOT_RESUMED
    shown = difflib.unified_diff(was.splitlines(), is_now.splitlines(), "before", "now", n=0, lineterm="")
    return "\n".join([*shown, told, ADVICE])


def _lines(text: str) -> Iterator[tuple[str, str]]:
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            yield section, line


def _versions() -> Iterator[str]:
    """What writes the savepoint itself."""
    settings = load_flink_settings()
    shown = flink_configuration(load_cluster_settings(Path("/nowhere")).flink, Path("/nowhere"), prometheus=False)
    yield f"Flink {settings.flink_version}, Beam's runner {settings.runner_version}"
    yield f"Beam {'.'.join(beam.__version__.split('.')[:2])} for Python"
    for handler in sorted((resources.files("runners.config") / "flink" / "org").rglob("*.java")):
        yield f"{handler.name}: {hashlib.sha256(handler.read_bytes()).hexdigest()[:16]}"
    yield f"{flink_operations._KEY_GROUPS} key groups"
    yield from (f"{key}: {shown[key]}" for key in ("state.backend.type", "pipeline.operator-chaining.enabled"))


def _leaves(graph: beam_runner_api_pb2.Pipeline) -> Iterator[tuple[str, Any]]:
    for label, transform in sorted(graph.components.transforms.items()):
        if transform.spec.urn and not transform.subtransforms:
            yield label, transform


def _stages(graph: beam_runner_api_pb2.Pipeline) -> Iterator[str]:
    """Flink knows a stage by the label of what feeds it, its timers by its own."""
    yield from (label for label, _ in _leaves(graph))


def _states(graph: beam_runner_api_pb2.Pipeline) -> Iterator[str]:
    parts = graph.components

    def coder(number: str) -> str:
        one = parts.coders[number]
        inner = ", ".join(coder(part) for part in one.component_coder_ids)
        name = one.spec.urn.removeprefix("beam:coder:").removesuffix(":v1")
        if name == "pickled_python":
            name = type(beam.coders.Coder.from_runner_api(one, None)).__name__
        return f"{name}({inner})" if inner else name

    for label, transform in _leaves(graph):
        if transform.spec.urn != "beam:transform:pardo:v1":
            continue
        payload = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
        if not (payload.state_specs or payload.timer_family_specs or payload.restriction_coder_id):
            continue
        (source,) = transform.inputs.values()
        yield f"{label} <- {parts.pcollections[source].unique_name}: {coder(parts.pcollections[source].coder_id)}"
        if payload.restriction_coder_id:
            yield f"{label}: restriction {coder(payload.restriction_coder_id)}"
        for name, state in sorted(payload.state_specs.items()):
            yield f"{label}: {name} {state.WhichOneof('spec')} of {coder(_element_coder(state))}"
        for name, timer in sorted(payload.timer_family_specs.items()):
            domain = beam_runner_api_pb2.TimeDomain.Enum.Name(timer.time_domain)
            yield f"{label}: {name} {domain} {coder(timer.timer_family_coder_id)}"


def _element_coder(state: Any) -> str:
    spec = getattr(state, state.WhichOneof("spec"))
    return str(spec.element_coder_id if hasattr(spec, "element_coder_id") else spec.coder_id)


def _position() -> Iterator[str]:
    for kind in (StreamPosition, _OpenVisit):
        for field in sorted(fields(kind), key=lambda one: one.name):
            default = "" if field.default is MISSING else f" = {field.default}"
            yield f"{kind.__name__.lstrip('_')}.{field.name}: {field.type}{default}"
    watermark = type(WatermarkBySource().create_watermark_estimator(Timestamp(1)).get_estimator_state())
    yield f"watermark: {watermark.__module__}.{watermark.__qualname__} by {WatermarkBySource().estimator_state_coder()}"
    (announced,) = announcements(_sample_visit())
    yield f"facts: {parse_announcement(announced).facts}"


def _sample_visit() -> Visit:
    return Visit(
        visit=2026112200001,
        day_obs=20261122,
        seq_num=1,
        instrument="SimCam",
        band="r",
        midpoint_mjd_tai=61367.0,
        exposure_time_s=30.0,
        readout_end_mjd_tai=61367.001,
        boresight_ra_deg=150.0,
        boresight_dec_deg=2.0,
        rotation_deg=0.0,
        observation_reason="science",
        target_name="field",
        detectors=(DetectorImages(3, "/night/science.fits", "/night/template.fits"),),
    )


def _messages() -> Iterator[str]:
    """Headers of what lies in bags until its time has come, with as many buffers as follow."""
    visit = _sample_visit()
    one = empty_records(DIA_SOURCE, 1)
    one["ra"], one["dec"], one["diaSourceId"] = 150.0, 2.0, 1
    record = FailureRecord(visit.visit, 3, "stage", "Error", "reason", "lost")
    tables = tuple(empty_records(dtype, 0) for dtype in (DIA_SOURCE, DIA_OBJECT, DIA_FORCED_SOURCE, SS_SOURCE))
    config = AlertProductionConfig().association
    sky = [
        ("sources", next(sky_messages(CatalogueSources(visit, 3, one), config))[1]),
        ("part", next(sky_messages(VisitPart(visit.visit, visit.midpoint_mjd_tai, b"part"), config))[1]),
    ]
    parts = [
        ("announced", announcement_part(visit, [3])),
        ("processed", detector_account(3, 2, 1, 0.5, rejected={"reason": 1}, seconds={"stage": 0.5}, notes=("note",))),
        ("failed", failure_part(record)),
        (
            "alerts",
            alerts_part([7, 0], thin_schema(()).empty_table(), tables, counts={}, seconds={}, shipped={"trimmed": {}}),
        ),
    ]
    cells = [
        ("index", cell_state.index_bytes(cell_state.read_index(None))),
        ("history", cell_state.history_block(tables[0], tables[2])),
    ]
    for name, message in (*sky, *parts, *cells):
        header, buffers = unpack(message)
        yield f"{name}: {json.dumps(_shape(header), sort_keys=True)} and {len(buffers)} buffers"
    yield f"failure lines: {', '.join(sorted(json.loads(failure_line(record))))}"


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shape(one) for name, one in value.items()}
    return [_shape(value[0])] if isinstance(value, list) and value else type(value).__name__


def _records() -> Iterator[str]:
    layouts: dict[str, np.dtype] = {
        "DIA_FORCED_SOURCE": DIA_FORCED_SOURCE,
        "DIA_OBJECT": DIA_OBJECT,
        "DIA_SOURCE": DIA_SOURCE,
        "SEEN": cell_state.SEEN,
        "SS_SOURCE": SS_SOURCE,
    }
    yield f"version {cell_state.STATE_VERSION}"
    for name, dtype in layouts.items():
        digest = hashlib.sha256(json.dumps(dtype.descr).encode()).hexdigest()[:16]
        yield f"{name}: {len(dtype.names or ())} fields, {dtype.itemsize} bytes, {digest}"


if __name__ == "__main__":
    GOLDEN.write_text(fingerprint(), encoding="utf-8")

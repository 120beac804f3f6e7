"""Beam's in-process runner, and the options of Beam."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import Protocol
from unittest import mock

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner, worker_handlers
from apache_beam.runners.worker import bundle_processor, statecache


class Dataflow(Protocol):
    """One of the pipelines."""

    def build(self, flow: beam.Pipeline, *, spread: bool = False) -> None: ...


Run = Callable[[Dataflow], None]


class BeamOptionsError(ValueError):
    """Options behind `--` that Apache Beam does not know."""


def parsed_options(arguments: tuple[str, ...]) -> PipelineOptions:
    """The options behind `--`, unknown ones among them; BeamOptionsError for what is no option or a bad value."""
    if arguments and not arguments[0].startswith("-"):
        raise BeamOptionsError(f"unexpected {arguments[0]}: only options of Apache Beam follow `--`")
    with _argparse_raising():
        options = PipelineOptions(list(arguments))
        options.get_all_options()
    return options


def beam_options(
    arguments: tuple[str, ...], add_known: Callable[[argparse.ArgumentParser], None] | None = None
) -> PipelineOptions:
    """The options behind `--`; BeamOptionsError names those that neither Beam nor `add_known` knows."""
    options = parsed_options(arguments)
    with _argparse_raising():
        known = set(options.get_all_options(add_extra_args_fn=add_known))
        unknown = set(options.get_all_options(add_extra_args_fn=add_known, retain_unknown_options=True)) - known
    if options.view_as(DirectOptions).direct_running_mode == "multi_threading":
        raise BeamOptionsError("direct_running_mode=multi_threading loses elements of stateful stages in this Beam")
    if unknown:
        raise BeamOptionsError(f"unexpected {', '.join(sorted(unknown))}: only options of Apache Beam follow `--`")
    return options


@contextlib.contextmanager
def _argparse_raising() -> Iterator[None]:
    """Argparse ends the program at a bad value; here that is a BeamOptionsError."""
    with quiet_beam(), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except SystemExit as error:
            raise BeamOptionsError(f"Apache Beam: {said.getvalue().rpartition('error: ')[2].strip()}") from error


@contextlib.contextmanager
def local_engine(arguments: tuple[str, ...]) -> Iterator[Run]:
    """Beam's in-process runner, with the options behind `--`."""
    options = beam_options(arguments)

    def run(dataflow: Dataflow) -> None:
        with quiet_beam(), _lightened_runner():
            flow = beam.Pipeline(runner=FnApiRunner(), options=options)
            dataflow.build(flow)
            try:
                flow.run().wait_until_finish()
            except RuntimeError:
                raise
            except Exception as error:  # Beam passes on whatever a worker raised
                raise RuntimeError(f"{type(error).__name__}: {error}") from error

    yield run


@contextlib.contextmanager
def _lightened_runner() -> Iterator[None]:
    """Takes loads off Beam's in-process runner that small visits feel.

    It gives each bundle a new cache token, so that its state cache is never hit; weighing what is put there takes a
    fifth of the time. Without room nothing stays in it, whatever it weighs. And the metrics of each bundle, which
    nobody reads here, are kept in protocol buffers that never give memory back: 0.2 MB a visit.
    """
    with (
        mock.patch.object(worker_handlers, "STATE_CACHE_SIZE_MB", 0),
        mock.patch.object(statecache, "get_deep_size", lambda *objects: 8),
        mock.patch.object(bundle_processor.BundleProcessor, "monitoring_infos", lambda self: []),
    ):
        yield


@contextlib.contextmanager
def quiet_beam() -> Iterator[None]:
    """Beam says a lot that is not for a person; errors still come through as exceptions."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

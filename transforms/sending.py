"""What a sink has to promise, and what the stages that send have in common."""

from __future__ import annotations

from typing import Protocol

import apache_beam as beam

Headers = list[tuple[str, bytes]]


class AlertSink(Protocol):
    """Where messages go. Picklable; opened once per worker.

    `send` may return before delivery; `flush` returns only when everything sent was acknowledged and
    raises otherwise. It says how many messages that were since it returned last, and of how many bytes.
    """

    def open(self) -> None: ...

    def send(self, topic: str, key: bytes | None, value: bytes, headers: Headers) -> None: ...

    def flush(self, deadline_s: float) -> tuple[int, int]: ...

    def close(self) -> None: ...


class SendingFn(beam.DoFn):
    """A DoFn whose sink is open from its setup to its teardown; without one nothing is sent."""

    def __init__(self, sink: AlertSink | None, deadline_s: float) -> None:
        self.sink = sink
        self.deadline_s = deadline_s

    def setup(self) -> None:
        if self.sink is not None:
            self.sink.open()

    def teardown(self) -> None:
        if self.sink is not None:
            self.sink.close()

    def flush(self) -> tuple[int, int]:
        """Wait until everything sent was acknowledged: messages and bytes; raises what the sink raises."""
        return (0, 0) if self.sink is None else self.sink.flush(self.deadline_s)

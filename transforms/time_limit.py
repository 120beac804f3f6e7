"""A limit to the time that work may take; beyond it the whole process ends, as no thread can be ended alone."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

# faulthandler's own thread needs no Python: it ends the process also where compiled code holds the interpreter.
_GRACE_S = 5.0


class _Deadlines:
    """The deadlines of all threads of the process; faulthandler knows one, so it gets the next."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the end of a forgotten block may come in the midst of another
        self._of: dict[object, float] = {}

    def add(self, one: object, limit_s: float) -> None:
        with self._lock:
            self._of[one] = time.monotonic() + limit_s
            self._tell_faulthandler()

    def remove(self, one: object) -> None:
        with self._lock:
            del self._of[one]
            self._tell_faulthandler()

    def _tell_faulthandler(self) -> None:
        if not self._of:
            faulthandler.cancel_dump_traceback_later()
            return
        left_s = max(min(list(self._of.values())) - time.monotonic(), 0.0)
        faulthandler.dump_traceback_later(left_s + _GRACE_S, exit=True, file=2)


_deadlines = _Deadlines()


@contextlib.contextmanager
def process_ends_after(limit_s: float, what: str) -> Iterator[None]:
    """End this process with exit code 1 if the block takes longer, and say so on standard error.

    Parameters
    ----------
    limit_s : wall-clock seconds
    what : what then took too long, and what comes of it, for the message
    """
    timer = threading.Timer(limit_s, _end, (f"{what}\n",))
    timer.daemon = True
    timer.start()
    _deadlines.add(timer, limit_s)
    try:
        yield
    finally:
        _deadlines.remove(timer)
        timer.cancel()


def _end(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
    os._exit(1)

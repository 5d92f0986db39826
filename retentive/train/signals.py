"""SIGTERM, SIGUSR1 and Ctrl-C: a run finishes the step under way, saves, and stops.

A handler may run between any two instructions of Python, even while a checkpoint is written. So it only sets a flag,
and the loop checks the flag where it can stop.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = [x for x in signal.Signals if x.name in ("SIGTERM", "SIGINT", "SIGUSR1")]
"""Signals that ask a run to stop; batch systems send SIGUSR1 before a job's time is over. Windows has no SIGUSR1."""


class Interrupted(Exception):
    """A stop signal arrived; a checkpoint was saved."""

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number
        """Signal number, for the exit code."""


class Stop:
    """Flag that a stop signal sets."""

    signal = 0
    """Number of the first signal that arrived, 0 before."""


@contextlib.contextmanager
def stop_signals(*, insistent: bool = True) -> Iterator[Stop]:
    """Record stop signals in this block, instead of ending the process.

    Outside the main thread it records nothing, because Python allows only the main thread to set handlers.

    Args:
        insistent: a SIGINT after the first signal raises KeyboardInterrupt at once.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if insistent and stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number

    # Restore the handlers afterwards: the caller may be a notebook, pytest or another program.
    before = {s: signal.signal(s, handle) for s in SIGNALS}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)

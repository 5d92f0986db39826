"""SIGTERM, SIGUSR1 and Ctrl-C: a run finishes the step under way, saves, and stops.

A handler may run between any two instructions of Python, also while a checkpoint is written: so it only takes a note,
and the loop looks at that where it can stop.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = [x for x in signal.Signals if x.name in ("SIGTERM", "SIGINT", "SIGUSR1")]
"""Those that ask to stop; batch systems send SIGUSR1 before a job's time is over, and Windows has none."""


class Interrupted(Exception):
    """One of them arrived; a checkpoint was saved."""

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number
        """The number of the signal, which exit codes are made of."""


class Stop:
    """Whether a signal has asked to stop."""

    signal = 0
    """The number of the first signal that came, 0 before."""


@contextlib.contextmanager
def stop_signals(*, insistent: bool = True) -> Iterator[Stop]:
    """Takes a note of these signals in this block, instead of ending the process.

    In another thread than the main one nothing is noted: Python lets that one alone set handlers.

    Args:
        insistent: a SIGINT after the first signal raises KeyboardInterrupt at once, for who will not wait.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if insistent and stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number

    # Whoever had a handler gets it back: a notebook, pytest, or a program that trains in between.
    before = {s: signal.signal(s, handle) for s in SIGNALS}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)

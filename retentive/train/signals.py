"""SIGTERM and Ctrl-C: a run ends the step that it is at, saves, and stops."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; a checkpoint was saved."""

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number
        """Of the signal."""


class Stop:
    """Whether to stop."""

    signal = 0
    """The number of the first signal that came, 0 before."""


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Notes SIGTERM and SIGINT; a second SIGINT interrupts at once. Only the main thread can listen."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)

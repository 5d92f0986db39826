"""Thread settings that leave room for other processes: how long threads spin, and how many a step should use.

Between two parallel regions OpenMP's threads spin for milliseconds, as if no other program were running. Next to a busy
process this stalls a program: a region ends with its last thread, and that thread waits for a core on which another
thread spins. docs/threads.md has the measurements.

| next to one busy process, on two cores | decoding speed of a 130 M model |
|---|---|
| OpenMP's default | one third |
| a longer spin | one tenth |
| a bounded spin, one core left to the other process | more than half |

This module does not import torch: `bound_spinning` must run before torch is loaded.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SPIN = "3000"
"""Iterations of GNU OpenMP's waiting loop, some microseconds. With fewer, threads are asleep when the next region
begins on an idle machine. With more, they hold the core that another process waits for."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables by which users choose how OpenMP threads wait."""
WORK_PER_THREAD = 10_000_000
"""Multiply-adds of one step that pay for a thread. Below twice as many, a second thread costs more than it gains."""


def bounded_spin() -> dict[str, str]:
    """Returns environment variables that bound the spinning of a process; empty if the user has set their own."""
    return {} if any(name in os.environ for name in WAITING) else {"GOMP_SPINCOUNT": SPIN}


def bound_spinning() -> bool:
    """Bounds the spinning of this process's threads. Returns True if it did.

    Works with GNU OpenMP, which torch's wheels for Linux bring. The library reads the variable when it is loaded, so
    nothing changes after torch is imported. Variables set by the user win. Child processes inherit the setting.
    """
    spin = {} if "torch" in sys.modules else bounded_spin()
    os.environ.update(spin)
    return bool(spin)


@contextlib.contextmanager
def threads_for(multiply_adds: int) -> Iterator[int]:
    """Sets and yields the number of threads that `multiply_adds` of work pay for, and restores the old number after.

    At least one, at most the current number. A token of a small model is finished before a second thread has started.
    Cores of neighbours seen a moment ago are left to them: one thread is then faster than two that wait for each other.
    """
    import torch

    before = torch.get_num_threads()
    threads = max(1, min(before - _neighbours.cores(), multiply_adds // WORK_PER_THREAD))
    if threads != before:
        torch.set_num_threads(threads)
    began, preempted = time.monotonic(), preemptions()
    try:
        yield threads
    finally:
        if threads != before:
            torch.set_num_threads(before)
        if threads > 1:
            _neighbours.look(preemptions() - preempted, time.monotonic() - began)


def preemptions() -> int:
    """Returns how often the system has preempted this process; 0 if it does not report it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


class Neighbours:
    """Estimate of how many cores other processes need.

    A thread that spins beside a busy process is preempted over a thousand times a second; on a quiet machine, thirty.
    """

    CROWDED = 300.0
    """Preemptions a second that indicate a neighbour."""
    AT_LEAST = 5
    """Minimum number of preemptions, since a few already exceed the rate in very short work."""
    SECONDS = 1.0
    """Time after which all cores are tried again."""

    def __init__(self) -> None:
        self._cores, self._until = 0, 0.0

    def cores(self) -> int:
        return self._cores if time.monotonic() < self._until else 0

    def look(self, preempted: int, seconds: float) -> None:
        """Updates the estimate from the preemptions of work that several threads did."""
        if preempted > max(self.CROWDED * seconds, self.AT_LEAST):
            self._cores, self._until = self.cores() + 1, time.monotonic() + self.SECONDS


_neighbours = Neighbours()

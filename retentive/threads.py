"""Threads that leave room for other processes: how long they spin while they wait, and how many a step should use.

Between two parallel regions OpenMP's threads spin, for milliseconds at a time, as if no other program were running.
Beside another busy process that stalls a program: a region ends when its last thread does, and that one waits for a
core which another thread is spinning on. With the default, decoding with a model of 130 M parameters falls to a third
of its speed beside one busy process on one of two cores, and with a longer spin to a tenth. A bounded spin, and a core
left to whoever is met there, keep more than half of it (docs/threads.md has the figures).

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
begins on an idle machine; with more, they hold the core that another process is waiting for."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables by which users choose how threads wait."""
WORK_PER_THREAD = 10_000_000
"""Multiply-adds of one step that are worth a thread: below twice that a second one gains less than it costs."""


def bounded_spin() -> dict[str, str]:
    """Environment variables of a process whose threads spin a bounded time; none where the user has set them."""
    return {} if any(name in os.environ for name in WAITING) else {"GOMP_SPINCOUNT": SPIN}


def bound_spinning() -> bool:
    """Bounds the spinning of this process's threads; returns whether it did.

    Works with GNU OpenMP, which torch's own wheels for Linux bring. That library reads the variable when it is loaded,
    so nothing is changed once torch is imported; nor where the user has set it. Child processes inherit it.
    """
    spin = {} if "torch" in sys.modules else bounded_spin()
    os.environ.update(spin)
    return bool(spin)


@contextlib.contextmanager
def threads_for(multiply_adds: int) -> Iterator[int]:
    """As many threads as the work is worth, at least one and at most as many as there were; those are back afterwards.

    A token of a small model is over before a second thread has begun, and alone a thread waits for nobody. Where
    neighbours were met a moment ago their cores are left to them: one thread is then faster than two that wait for
    each other.
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
    """How often the system has taken a core away from this process; 0 where it does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


class Neighbours:
    """How many cores other processes seem to need.

    A thread that spins beside a neighbour is preempted over a thousand times a second, on a quiet machine thirty times.
    """

    CROWDED = 300.0
    """Preemptions a second that tell of a neighbour."""
    AT_LEAST = 5
    """Of them, for work so short that a few would be as many."""
    SECONDS = 1.0
    """After so long all cores are tried again."""

    def __init__(self) -> None:
        self._cores, self._until = 0, 0.0

    def cores(self) -> int:
        return self._cores if time.monotonic() < self._until else 0

    def look(self, preempted: int, seconds: float) -> None:
        """Take note of work that several threads did."""
        if preempted > max(self.CROWDED * seconds, self.AT_LEAST):
            self._cores, self._until = self.cores() + 1, time.monotonic() + self.SECONDS


_neighbours = Neighbours()

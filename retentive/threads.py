"""Threads that leave room for a neighbour: how long they wait by spinning, and how many a piece of work is worth.

Between two parallel regions the threads of OpenMP wait by spinning, for milliseconds at a time, as if the machine were
theirs. Beside another busy process that is how a program stops: a region ends when its last thread does, and that one
waits for a core which another is spinning on. With the default, decoding with a model of 130 M parameters falls to a
third of its speed beside one busy process on one of two cores, and with a longer spin to a tenth; a bounded spin keeps
half of it and costs nothing while the machine is quiet (docs/threads.md has the figures).

Imports no torch: `bound_spinning` must come before it.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

SPIN = "1500"
"""Iterations of GNU OpenMP's waiting loop, some microseconds. Fewer, and threads are asleep when the next region of a
quiet machine begins; more, and they hold the core that a neighbour's time slice should end on."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WORTH = 10_000_000
"""Multiply-adds of one step that are worth a thread: below twice that a second one gains less than it costs."""


def bounded_spin() -> dict[str, str]:
    """What the environment of a process needs for a bounded spin; nothing where the user has said how threads wait."""
    return {} if any(name in os.environ for name in WAITING) else {"GOMP_SPINCOUNT": SPIN}


def bound_spinning() -> bool:
    """Whether threads will wait in a bounded spin from now on, by GNU OpenMP, which torch's own wheels for Linux have.

    The environment variable is read when the library is loaded, so nothing changes once torch is imported; nor where
    the user has said how threads wait. Processes that this one starts inherit it.
    """
    spin = {} if "torch" in sys.modules else bounded_spin()
    os.environ.update(spin)
    return bool(spin)


@contextlib.contextmanager
def threads_for(multiply_adds: int) -> Iterator[int]:
    """As many threads as the work is worth, at least one and at most as many as there were; those are back afterwards.

    A token of a small model is over before a second thread has begun, and alone a thread waits for nobody.
    """
    import torch

    before = torch.get_num_threads()
    threads = max(1, min(before, multiply_adds // WORTH))
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        if threads != before:
            torch.set_num_threads(before)

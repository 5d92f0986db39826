"""Threads that leave room for other processes: how long they spin while they wait, and how many a step should use.

Between two parallel regions OpenMP's threads spin, for milliseconds at a time, as if no other program were running.
Beside another busy process that stalls a program: a region ends when its last thread does, and that one waits for a
core which another thread is spinning on. With the default, decoding with a model of 130 M parameters falls to a third
of its speed beside one busy process on one of two cores, and with a longer spin to a tenth; a bounded spin keeps half
of it and costs nothing on an idle machine (docs/threads.md has the figures).

This module does not import torch: `bound_spinning` must run before torch is loaded.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

SPIN = "2000"
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
    """Runs the block with as many threads as the work is worth, at most as many as there were; yields their number.

    A token of a small model is over before a second thread has begun, and one thread alone waits for no other.
    """
    import torch  # see the module: it must be possible to import this one first

    before = torch.get_num_threads()
    threads = max(1, min(before, multiply_adds // WORK_PER_THREAD))
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        if threads != before:
            torch.set_num_threads(before)

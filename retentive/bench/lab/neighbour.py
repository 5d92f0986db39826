"""A neighbour on the machine: one other process that is busy all the time, and what speed it leaves to us.

Threads that wait by spinning, as those of OpenMP do by default, lose far more than the share of a core that such a
process takes: the thread that it holds up is waited for by all others. What is measured is this process as it is, with
its threads and OMP_ variables.
"""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from retentive import machine
from retentive.bench.lab.clock import median_ratio, turns
from retentive.tables import counted, duration

LONG_ENOUGH = 0.5
"""Seconds of a timed repetition, at least: many times as long as a scheduler lets a process run."""
SETTLE = 1.2
"""Seconds after which nobody makes room any more for a neighbour who has gone (`retentive.threads.Neighbours`)."""
BUSY = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    sum(range(100_000))
"""
"""A plain loop that ends by itself when its parent process has died."""


@contextmanager
def neighbour() -> Iterator[subprocess.Popen]:
    """One process more, busy from the beginning of the block to its end."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # an empty line: it is running now, and not still starting
            yield process
        finally:
            process.kill()


def speed_kept(run: Callable[[], Any], device: torch.device, *, repeats: int) -> dict[str, Any]:
    """Seconds of `run` alone and beside a neighbour, interleaved, and the share of its speed that it keeps (`kept`)."""
    run()  # warms up
    # warm, so that `times` is reckoned from what a repetition will take
    once = machine.clock(device, run)
    times = max(math.ceil(LONG_ENOUGH / max(once, 1e-9)), 1)

    def timed() -> float:
        return machine.clock(device, lambda: [run() for _ in range(times)]) / times

    def quiet() -> float:
        # else this would be the speed of threads that still leave cores to the last neighbour
        time.sleep(SETTLE)
        return timed()

    def beside() -> float:
        with neighbour():
            return timed()

    found = list(turns({"quiet": quiet, "beside": beside}, repeats))
    return {
        "quiet_seconds": statistics.median(turn["quiet"] for turn in found),
        "beside_seconds": statistics.median(turn["beside"] for turn in found),
        "kept": median_ratio(found, "quiet", "beside"),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def note(found: dict[str, Any], of: str) -> str:
    """A line of a table: what is kept, and of what."""
    return (
        f"- Beside one other busy process, {of} keeps {found['kept']:.0%} of its speed: "
        f"{duration(found['beside_seconds'])} instead of {duration(found['quiet_seconds'])} "
        f"({counted(found['threads'], 'thread')})."
    )

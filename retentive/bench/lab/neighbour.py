"""Speed beside a busy neighbour: one other process that computes all the time.

Threads that wait by spinning, the default of OpenMP, lose far more than the neighbour's share of a core, since all wait
for the thread that it delays. The measurement takes this process as it is, with its threads and OMP_ variables.
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
"""Minimum seconds of a timed repetition: many time slices of a scheduler."""
SETTLE = 1.2
"""Seconds after which threads stop making room for a neighbour that has ended (`retentive.threads.Neighbours`)."""
BUSY = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    sum(range(100_000))
"""
"""Plain loop that ends by itself when its parent process has died."""


@contextmanager
def neighbour() -> Iterator[subprocess.Popen]:
    """Keeps one more process busy from the start of the block to its end."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # an empty line: the process runs now
            yield process
        finally:
            process.kill()


def speed_kept(run: Callable[[], Any], device: torch.device, *, repeats: int) -> dict[str, Any]:
    """Returns the seconds of `run` alone and beside a neighbour, interleaved, and the fraction of speed `kept`."""
    run()  # warms up
    # warm, so that `times` follows from the time of a repetition
    once = machine.clock(device, run)
    times = max(math.ceil(LONG_ENOUGH / max(once, 1e-9)), 1)

    def timed() -> float:
        return machine.clock(device, lambda: [run() for _ in range(times)]) / times

    def quiet() -> float:
        # otherwise threads would still leave cores to the last neighbour
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
    """Returns a line for a table: the fraction of speed kept, and of which code."""
    return (
        f"- Beside one other busy process, {of} keeps {found['kept']:.0%} of its speed: "
        f"{duration(found['beside_seconds'])} instead of {duration(found['quiet_seconds'])} "
        f"({counted(found['threads'], 'thread')})."
    )

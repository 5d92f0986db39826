"""Interleaved runs: what is compared is timed in turns, so that whatever slows the machine slows all alike."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from retentive.machine import clock


def mean(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The machine's rates around a group of measurements."""
    return {name: (before[name] + after[name]) / 2 for name in before}


def interleaved(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int, patience: float
) -> dict[str, list[float]]:
    """Seconds of each run's repetitions, all runs once after the other.

    A first turn, which allocates, does not count, unless it takes longer than `patience` seconds: then it is the only
    one, since what it allocates is little beside what it computes.
    """
    first = {name: clock(device, run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if first[name] <= patience:
                times[name].append(clock(device, run))
    return {name: taken or [first[name]] for name, taken in times.items()}

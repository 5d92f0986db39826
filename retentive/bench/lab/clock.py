"""Interleaved runs: compared code is timed in turns, so that a slow spell of the machine slows all alike."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from retentive import machine

T = TypeVar("T")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns minimum, median and maximum of the values."""
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def best(times: Sequence[float]) -> dict[str, Any]:
    """Returns the best and the median of the seconds and their number, named as in results."""
    # the best counts between rivals, since other work of the machine only adds time
    return {"seconds": min(times), "median_seconds": statistics.median(times), "repeats": len(times)}


def median_ratio(found: Sequence[Mapping[str, float]], above: str, below: str) -> float:
    """Returns the median over the turns of one run's number divided by another's.

    Not the ratio of medians: the two numbers of a turn are close in time, and a slow spell that meets both cancels.
    """
    return statistics.median(turn[above] / turn[below] for turn in found)


def turns(runs: Mapping[str, Callable[[], T]], repeats: int) -> Iterator[dict[str, T]]:
    """Yields the results of all runs, one dictionary per turn. In a turn all run once, one after the other.

    A first turn warms up (allocates, compiles, fills caches) and is left out.
    """
    for turn in range(repeats + 1):  # all runs in each turn, not all turns of one run: the machine's speed drifts
        found = {name: run() for name, run in runs.items()}
        if turn:
            yield found


def interleaved(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int, patience: float
) -> dict[str, list[float]]:
    """Returns the seconds of each run's repetitions. In every turn all run once, one after the other.

    The first turn allocates and does not count. A run that takes longer than `patience` seconds in it is not repeated,
    and that time is its result, since allocation is little beside its computation.
    """
    # all before the first repetition, since this turn decides which are repeated
    first = {name: machine.clock(device, run) for name, run in runs.items()}
    quick = {name: partial(machine.clock, device, run) for name, run in runs.items() if first[name] <= patience}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, seconds in quick.items():
            times[name].append(seconds())
    return {name: taken or [first[name]] for name, taken in times.items()}


def beside_products(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, dtype: torch.dtype, *, repeats: int, patience: float
) -> tuple[dict[str, list[float]], float]:
    """Returns what `interleaved` does, and the best rate of a large matrix product in FLOP/s.

    The rate is measured in every turn. Two cores of a cloud machine may be two threads of one core, and a second later
    not, so a rate from one moment cannot be compared with a run in another.
    """
    rates: list[float] = []
    all_runs = {**runs, "": lambda: rates.append(machine.gemm_rate(device, dtype))}
    times = interleaved(all_runs, device, repeats=repeats, patience=patience)
    return {name: times[name] for name in runs}, max(rates)


class Timed(NamedTuple):
    """Time of a run, and the speed of the machine's memory around it."""

    seconds: float
    rate: float
    """Rate of reading in bytes/s, mean of before and after."""


def beside_reading(
    runs: Mapping[str, Callable[[], Any]], numbers: torch.Tensor, *, repeats: int
) -> tuple[dict[str, list[Timed]], list[float]]:
    """Returns (each run's repetitions in turns, with the rate of reading `numbers` around them; all the rates).

    The rate of a shared machine changes from second to second, so it is measured between any two runs.
    """
    # n runs have n + 1 rates between and around them
    rates = [machine.read_rate(numbers)]

    def timed(run: Callable[[], Any]) -> Timed:
        seconds = machine.clock(numbers.device, run)
        rates.append(machine.read_rate(numbers))
        return Timed(seconds, statistics.mean(rates[-2:]))  # the last two rates: right before and right after the run

    found = list(turns({name: partial(timed, run) for name, run in runs.items()}, repeats))
    return {name: [turn[name] for turn in found] for name in runs}, rates

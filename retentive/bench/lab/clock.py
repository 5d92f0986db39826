"""Interleaved runs: what is compared is timed in turns, so that whatever slows the machine slows all alike."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from retentive import machine

T = TypeVar("T")


def spread(values: Sequence[float]) -> dict[str, float]:
    """The least, the median and the most of them."""
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def best(times: Sequence[float]) -> dict[str, Any]:
    """The best and the median of the seconds, and how many there are, as results name them."""
    # the best is what counts between rivals: what else a machine does only ever adds to a time
    return {"seconds": min(times), "median_seconds": statistics.median(times), "repeats": len(times)}


def median_ratio(found: Sequence[Mapping[str, float]], above: str, below: str) -> float:
    """The median over the turns of one run's number divided by another's.

    Not the ratio of medians: the two numbers of a turn are neighbours in time, and a slow spell of the machine that
    meets both drops out.
    """
    return statistics.median(turn[above] / turn[below] for turn in found)


def turns(runs: Mapping[str, Callable[[], T]], repeats: int) -> Iterator[dict[str, T]]:
    """What each run returned, a dictionary a turn; in a turn all run once, one after the other.

    A first turn warms up (allocates, compiles, fills caches) and is not among them.
    """
    for turn in range(repeats + 1):  # in each one all runs, and not all turns of one run: the machine's speed drifts
        found = {name: run() for name, run in runs.items()}
        if turn:
            yield found


def interleaved(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int, patience: float
) -> dict[str, list[float]]:
    """Seconds of each run's repetitions; in every turn all runs go once, one after the other.

    The first turn allocates and does not count. But a run that takes longer than `patience` seconds in it is not
    repeated: that time is its result, since allocating is little beside what it computes.
    """
    # one after the other and all before the first repetition: it decides which of them are repeated
    first = {name: machine.clock(device, run) for name, run in runs.items()}
    quick = {name: partial(machine.clock, device, run) for name, run in runs.items() if first[name] <= patience}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, seconds in quick.items():
            times[name].append(seconds())
    return {name: taken or [first[name]] for name, taken in times.items()}


class Timed(NamedTuple):
    """A run, and how fast this machine's memory was around it."""

    seconds: float
    rate: float
    """Bytes/s of reading, the mean of before and after."""


def beside_reading(
    runs: Mapping[str, Callable[[], Any]], numbers: torch.Tensor, *, repeats: int
) -> tuple[dict[str, list[Timed]], list[float]]:
    """(each run's repetitions in turns, with the rate of reading `numbers` around them, all the rates).

    The rate of a shared machine changes from one second to the next, so it is measured between any two runs.
    """
    # n runs have n + 1 rates between and around them
    rates = [machine.read_rate(numbers)]

    def timed(run: Callable[[], Any]) -> Timed:
        seconds = machine.clock(numbers.device, run)
        rates.append(machine.read_rate(numbers))
        return Timed(seconds, statistics.mean(rates[-2:]))  # the last two: right before the run and right after it

    found = list(turns({name: partial(timed, run) for name, run in runs.items()}, repeats))
    return {name: [turn[name] for turn in found] for name in runs}, rates

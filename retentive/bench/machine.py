"""How fast this machine is at the two things that every kernel is made of, and how time is taken on it."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from retentive.train.log import peak_flops

READ = 1 << 29
"""Bytes that are read for the bandwidth: more than any cache holds."""


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product in `dtype`, bytes/s of reading and of copying, measured now."""
    return {"gemm": gemm(device, dtype), **bandwidth(device)}


def gemm(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    return peak_flops(device, dtype, size=8192 if device.type == "cuda" else 2048, repeats=6)


def bandwidth(device: torch.device, size: int = READ) -> dict[str, float]:
    """Bytes/s of summing rows (the fastest reader that torch has) and of copying (read and write counted)."""
    x = numbers(device, size)
    y = torch.empty_like(x)
    copy = min(clock(device, lambda: y.copy_(x)) for _ in range(10))
    return {"read": reading(x, 30), "copy": 2 * x.nbytes / copy}


def numbers(device: torch.device, size: int = READ) -> torch.Tensor:
    """`size` bytes to read, in rows."""
    return torch.ones(size // 4 // 4096, 4096, device=device)


def reading(x: torch.Tensor, repeats: int = 3) -> float:
    """Bytes/s of summing the rows of `numbers`."""
    return x.nbytes / min(clock(x.device, lambda: x.sum(-1)) for _ in range(repeats))


def free_memory(device: torch.device) -> int:
    """Bytes that can be had now: of the GPU, or of the system, as far as it tells (else no bound).

    What this process has freed and kept is given back first.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    info = Path("/proc/meminfo")
    if not info.is_file():
        return 1 << 62
    lines = info.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def mean(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The machine's rates around a group of measurements."""
    return {name: (before[name] + after[name]) / 2 for name in before}


def clock(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds that `run` takes, waiting for the GPU by its own events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turns(
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

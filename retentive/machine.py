"""This machine: its devices and their names, the memory that is free and held, its rates of multiplying and reading."""

import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retentive import __version__

STATUS = Path("/proc/self/status")
READ = 1 << 29
"""Bytes that are read for the bandwidth: more than any cache holds."""


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: a name that is none, or of a device that is not here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        here = {"cpu": lambda: True, "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        available = here[device.type]()
    except (RuntimeError, KeyError):  # KeyError: torch knows more, of which some compute nothing (meta)
        raise ValueError(f"unknown device {name!r}, expected auto, cpu, cuda or mps") from None
    if not available:
        raise ValueError(f"device {name!r} is not here: torch finds no such GPU on this machine")
    return device


def describe() -> dict[str, str | int]:
    """Processor, cores, GPU, versions: what every results file carries."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "retentive": __version__,
    }


@functools.cache
def cpu_name() -> str:
    """The processor's own name with its family and model, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines())
    found: dict[str, str] = {}
    for key, _, value in lines:
        found.setdefault(key.strip(), value.strip())  # the first core speaks for all
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


# memory


def keep_freed_memory() -> None:
    """Lets glibc use the memory of freed tensors again; where there is another C library, nothing.

    By default large blocks go back to the system at once, and getting them anew, page by page, costs a training step on
    a CPU a tenth of its time (docs/LOG.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def give_back_freed_memory() -> None:
    """Hands to the system what this process has freed and glibc keeps; with another C library, nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def release_workers() -> None:
    """Ends the OpenMP workers of the calling thread, which come back when it computes again.

    Each thread that computes has workers of its own. Where there are more of them than cores, GNU's OpenMP lets them
    sleep between two operations in place of spinning, and a small model's step takes twice as long (docs/LOG.md).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another runtime, or none
        ctypes.CDLL(None).omp_pause_resource_all(1)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had now: of the GPU, or of the system, as far as it tells (else no bound).

    What this process has freed and kept is given back first.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    give_back_freed_memory()
    info = Path("/proc/meminfo")
    if not info.is_file():
        return 1 << 62
    lines = info.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def held_memory(key: str = "VmRSS") -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM its high-water mark, VmData what was asked for.

    Without /proc the high-water mark, whatever the key.
    """
    if STATUS.exists():
        line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far, or since `reset_peak_memory`: of the GPU by torch, or by this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else held_memory("VmHWM")


def reset_peak_memory(device: torch.device) -> int:
    """Bytes held now, from which on the high-water mark rises again (where there is no /proc: the mark so far)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory(device)


def take_no_more_than_is_free() -> None:
    """From now on an allocation beyond nine tenths of what is free fails, instead of the machine with it."""
    if STATUS.exists():
        free = free_memory(torch.device("cpu"))
        resource.setrlimit(resource.RLIMIT_DATA, (held_memory("VmData") + free * 9 // 10,) * 2)


# rates


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


def gemm_rate(device: torch.device, dtype: torch.dtype, *, size: int = 0, repeats: int = 6) -> float:
    """FLOP/s of a large matrix product in `dtype`, measured now: of `size` rows and columns, by default large ones."""
    n = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(clock(device, lambda: (a @ b).sum().item()) for _ in range(repeats))


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product in `dtype`, bytes/s of reading and of copying, measured now."""
    return {"gemm": gemm_rate(device, dtype), **bandwidth(device)}


def bandwidth(device: torch.device, size: int = READ) -> dict[str, float]:
    """Bytes/s of summing rows (the fastest reader that torch has) and of copying (read and write counted)."""
    x = numbers(device, size)
    y = torch.empty_like(x)
    copy = min(clock(device, lambda: y.copy_(x)) for _ in range(10))
    return {"read": read_rate(x, 30), "copy": 2 * x.nbytes / copy}


def numbers(device: torch.device, size: int = READ) -> torch.Tensor:
    """`size` bytes to read, in rows."""
    return torch.ones(size // 4 // 4096, 4096, device=device)


def read_rate(x: torch.Tensor, repeats: int = 3) -> float:
    """Bytes/s of summing the rows of `numbers`."""
    return x.nbytes / min(clock(x.device, lambda: x.sum(-1)) for _ in range(repeats))

"""This machine: its devices and their names, how much memory is free and in use, how fast it multiplies and reads."""

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
"""What Linux says of this process."""
MEMORY = Path("/proc/meminfo")
"""What Linux says of the memory of the system."""
READ = 1 << 29
"""Bytes that are read to measure the bandwidth of memory: more than any cache holds."""
UNBOUNDED = 1 << 62
"""Bytes that are free, where the system does not say."""


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: no name of a device, or that of one which this machine does not have.
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
    """Processor, cores, GPU, versions: what every file of results records about the machine."""
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
    """The processor's name with its family and model; less where the system does not say."""
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
    """Has glibc keep the memory of freed tensors for the next ones; with another C library it does nothing.

    By default large blocks go back to the system at once, and faulting them in again, page by page, costs a training
    step on a CPU a tenth of its time (docs/LOG.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which free() would unmap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def give_back_freed_memory() -> None:
    """Returns to the system what this process has freed and glibc keeps; with another C library it does nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def release_workers() -> None:
    """Ends the OpenMP workers of the calling thread; they are made again when it computes again.

    Each thread that computes has a pool of workers of its own. With more of them than cores, GNU's OpenMP has them
    sleep between two operations instead of spinning, and a step of a small model takes twice as long (docs/LOG.md).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another runtime, or none
        ctypes.CDLL(None).omp_pause_resource_all(1)  # 1 is omp_pause_soft: thread-private data stay


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now: on the GPU, or in the system's memory (UNBOUNDED where it does not say).

    What this process has freed but not returned is returned first.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    give_back_freed_memory()
    free = _bytes_in(MEMORY, "MemAvailable")
    return UNBOUNDED if free is None else free


def held_memory(key: str = "VmRSS") -> int:
    """Bytes that this process holds: resident now (VmRSS), the most so far (VmHWM), or reserved (VmData).

    Where the system does not say, the most so far, whatever the key.
    """
    held = _bytes_in(STATUS, key)
    if held is not None:
        return held
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _bytes_in(file: Path, key: str) -> int | None:
    """The number of a line such as `VmRSS:  1234 kB`, in bytes; None without the file (no Linux) or the line."""
    if not file.is_file():
        return None
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None  # sandboxes such as gVisor leave lines out


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far, or since `reset_peak_memory`: of the GPU by torch, or by this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else held_memory("VmHWM")


def reset_peak_memory(device: torch.device) -> int:
    """Bytes held now, to which the high-water mark is set back (where that is not possible: the mark so far)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if STATUS.is_file():
        with contextlib.suppress(OSError):  # a container may forbid it
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: VmHWM becomes VmRSS
    return peak_memory(device)


def take_no_more_than_is_free() -> None:
    """From now on an allocation beyond nine tenths of what is free fails, instead of the whole machine."""
    if STATUS.is_file():
        free = free_memory(torch.device("cpu"))
        resource.setrlimit(resource.RLIMIT_DATA, (held_memory("VmData") + free * 9 // 10,) * 2)


# rates


def clock(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds that `run` takes; on a CUDA GPU by its own events, so that launching kernels does not count."""
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
    """FLOP/s of a matrix product in `dtype`, measured now, the best of `repeats`.

    Args:
        size: rows and columns; 0 for as many as saturate the device.
    """
    n = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    # item() waits for devices that `clock` knows no events of; n^3 multiply-adds are two FLOPs each
    return 2 * n**3 / min(clock(device, lambda: (a @ b).sum().item()) for _ in range(repeats))


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product in `dtype`, bytes/s of reading and of copying, measured now."""
    return {"gemm": gemm_rate(device, dtype), **bandwidth(device)}


def bandwidth(device: torch.device, size: int = READ) -> dict[str, float]:
    """Bytes/s of reading (by summing rows, which torch does fastest) and of copying (read and written both count)."""
    x = numbers(device, size)
    y = torch.empty_like(x)
    copy = min(clock(device, lambda: y.copy_(x)) for _ in range(10))
    return {"read": read_rate(x, 30), "copy": 2 * x.nbytes / copy}


def numbers(device: torch.device, size: int = READ) -> torch.Tensor:
    """A tensor of `size` bytes to read: rows of 4096 float32."""
    return torch.ones(size // 4 // 4096, 4096, device=device)


def read_rate(x: torch.Tensor, repeats: int = 3) -> float:
    """Bytes/s of summing the rows of `numbers`."""
    return x.nbytes / min(clock(x.device, lambda: x.sum(-1)) for _ in range(repeats))

"""Facts about this machine: devices and their names, free and used memory, matrix-product and memory rates."""

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
"""Linux's file of facts about this process."""
MEMORY = Path("/proc/meminfo")
"""Linux's file of facts about the system's memory."""
READ = 1 << 29
"""Bytes read to measure memory bandwidth: more than any cache holds."""
UNBOUNDED = 1 << 62
"""Free bytes assumed if the system reports none."""


def pick_device(name: str) -> torch.device:
    """Returns the torch device called `name`; "auto" is a GPU if one is available.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        here = {"cpu": lambda: True, "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        available = here[device.type]()
    except (RuntimeError, KeyError):  # KeyError: torch has further device types; some, as meta, compute nothing
        raise ValueError(f"unknown device {name!r}, expected auto, cpu, cuda or mps") from None
    if not available:
        raise ValueError(f"device {name!r} is not here: torch finds no such GPU on this machine")
    return device


def describe() -> dict[str, str | int]:
    """Returns processor, cores, GPU and versions. Every results file records them."""
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
    """Returns the processor's name with its family and model, or less if the system reports less."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines())
    found: dict[str, str] = {}
    for key, _, value in lines:
        found.setdefault(key.strip(), value.strip())  # values of the first core; the others repeat them
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


# memory


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next tensors. Does nothing with another C library.

    By default glibc returns large blocks to the system at once. Faulting them in again, page by page, costs a training
    step on a CPU a tenth of its time (docs/LOG.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which free() would unmap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def give_back_freed_memory() -> None:
    """Returns freed memory that glibc keeps to the system. Does nothing with another C library."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def release_workers() -> None:
    """Ends the OpenMP workers of the calling thread. OpenMP starts them again at the thread's next computation.

    Each computing thread has its own pool of workers. If all pools together exceed the cores, GNU OpenMP puts workers
    to sleep between two operations instead of spinning, and a step of a small model takes twice as long (docs/LOG.md).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another runtime, or none
        ctypes.CDLL(None).omp_pause_resource_all(1)  # 1 is omp_pause_soft: keeps thread-private data


def free_memory(device: torch.device) -> int:
    """Returns the bytes that can be allocated now, on the GPU or in system memory.

    UNBOUNDED if the system reports none. Memory this process has freed but kept is returned to the system first.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    give_back_freed_memory()
    free = _bytes_in(MEMORY, "MemAvailable")
    return UNBOUNDED if free is None else free


def held_memory(key: str = "VmRSS") -> int:
    """Returns the bytes this process holds: resident (VmRSS), peak resident (VmHWM) or reserved (VmData).

    On systems without these values it returns the peak, whatever the key.
    """
    held = _bytes_in(STATUS, key)
    if held is not None:
        return held
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _bytes_in(file: Path, key: str) -> int | None:
    """Returns the bytes in a line such as `VmRSS:  1234 kB`; None if the file (no Linux) or the line is missing."""
    if not file.is_file():
        return None
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None  # sandboxes such as gVisor omit lines


def peak_memory(device: torch.device) -> int:
    """Returns the peak of bytes held since start or `reset_peak_memory`: by torch on a GPU, else by this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else held_memory("VmHWM")


def reset_peak_memory(device: torch.device) -> int:
    """Resets the peak to the bytes held now and returns them; returns the old peak if it cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if STATUS.is_file():
        with contextlib.suppress(OSError):  # a container may forbid it
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5 sets VmHWM to VmRSS
    return peak_memory(device)


def take_no_more_than_is_free() -> None:
    """Limits further allocations to nine tenths of the free memory, so that this process fails and not the machine."""
    if STATUS.is_file():
        free = free_memory(torch.device("cpu"))
        resource.setrlimit(resource.RLIMIT_DATA, (held_memory("VmData") + free * 9 // 10,) * 2)


# rates


def clock(device: torch.device, run: Callable[[], Any]) -> float:
    """Returns the seconds `run` takes. On CUDA GPUs it times with events, which excludes launching kernels."""
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
    """Measures the FLOP/s of a square matrix product in `dtype`; returns the best of `repeats`.

    Args:
        size: rows and columns; 0 picks a size that saturates the device.
    """
    n = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    # item() waits for devices without events in `clock`; n^3 multiply-adds are two FLOPs each
    return 2 * n**3 / min(clock(device, lambda: (a @ b).sum().item()) for _ in range(repeats))


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measures the FLOP/s of a large matrix product in `dtype`, and the bytes/s of reading and of copying."""
    return {"gemm": gemm_rate(device, dtype), **bandwidth(device)}


def bandwidth(device: torch.device, size: int = READ) -> dict[str, float]:
    """Measures the bytes/s of reading (row sums, torch's fastest way) and of copying (read and written bytes count)."""
    x = numbers(device, size)
    y = torch.empty_like(x)
    copy = min(clock(device, lambda: y.copy_(x)) for _ in range(10))
    return {"read": read_rate(x, 30), "copy": 2 * x.nbytes / copy}


def numbers(device: torch.device, size: int = READ) -> torch.Tensor:
    """Returns a tensor of `size` bytes to read: rows of 4096 float32."""
    return torch.ones(size // 4 // 4096, 4096, device=device)


def read_rate(x: torch.Tensor, repeats: int = 3) -> float:
    """Measures the bytes/s of summing the rows of `numbers`."""
    return x.nbytes / min(clock(x.device, lambda: x.sum(-1)) for _ in range(repeats))

"""Compiles every entry of the tile table for its GPUs, on a machine without a GPU, and reports what each one needs.

    python tests/ops/triton/compile_report.py                 # JSON: a list of the fields of Report
    python tests/ops/triton/compile_report.py --markdown      # the same as a table

The operators are called normally, with a driver that only knows the GPU's name, and launches that end when the kernel
is compiled. Triton compiles to PTX; its ptxas reports the registers and the bytes spilled. This must run without
TRITON_INTERPRET, so the tests run it in a separate process. It measures no speed.
"""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

# set explicitly, since Triton 3.10 changes the default and 3.9 warns about it
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

LIMITS = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}  # shared memory per program, bytes
TENSOR_CORES = r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma"
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
RING = 16


@dataclass
class Report:
    arch: int
    kind: str
    state: str
    kernel: str
    tile: str
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    limit: int
    tensor_core: int  # instructions in the PTX


class NamedGpu:
    """The part of a driver that compiling needs."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def calls(kind: str, arch: int) -> None:
    """Runs training steps on the largest state, and with all costly options on a small one; short chunks; decoding."""
    from retentive.ops import triton as room
    from retentive.ops.triton.tiles import TABLE

    chunk, cu = TABLE[arch, kind].chunk, torch.tensor([0, 1, 40])

    def train(H, K, V, C, *, learned=False, packed=False, backward=True):
        q, v = (torch.zeros(1, 40, H, n, dtype=DTYPES[kind]) for n in (K, V))
        log_decay = torch.zeros(1, 40, H) if learned else torch.zeros(H)
        state = torch.zeros(2 if packed else 1, H, K, V)
        arguments = (q, q, v, log_decay, state, cu if packed else None, 0.3, C)
        room.triton_retention(*arguments)
        if backward:
            room.triton_retention_backward(v, state, *arguments)

    train(8, 256, 512, chunk)
    train(8, 256, 512, chunk, learned=True, packed=True)
    train(1, 64, 128, chunk, learned=True)
    train(8, 256, 512, 16, backward=False)
    train(8, 256, 512, 32, learned=True, backward=False)
    if kind == "tf32":
        return  # the decode step multiplies exactly anyway
    for K, V in ((64, 128), (256, 512)):
        q, v = (torch.zeros(1, 8, n, dtype=DTYPES[kind]) for n in (K, V))
        rings = [torch.zeros(1, 8, RING, n, dtype=q.dtype) for n in (K, V)]
        counts = torch.zeros(2, 1, dtype=torch.int64)
        state, ring_decay = torch.zeros(1, 8, K, V), torch.zeros(1, 8, RING)
        room.decode_step(q, q, v, torch.zeros(8), 0.3, state, *rings, ring_decay, *counts)


def label(name: str, arguments: dict[str, Any]) -> tuple[str, str, str]:
    """Returns the state's sides, the kernel's purpose, and its tile."""
    words = {"BACKWARD": "backward", "TRANSPOSED": "transposed", "PER_TOKEN": "per token"}
    words = [word for name, word in words.items() if arguments.get(name)]
    if arguments.get("cu") is not None:
        words.append("packed")
    sides = [arguments[n] for n in ("KV" if "K" in arguments else "IO") if n in arguments]
    if arguments.get("TRANSPOSED"):
        sides.reverse()
    tile = [arguments[n] for n in ("BK", "BV", "BI", "BO") if n in arguments]
    chunk = f"chunk {arguments['C']}, " if "C" in arguments else ""
    shape = chunk + "x".join(map(str, tile)) + f", {arguments['num_warps']} warps"
    return "x".join(map(str, sides)), ", ".join([name, *words]), shape


def assembled(ptx: str, arch: int) -> tuple[int, int]:
    """Returns registers, and bytes spilled."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(*[arch][: len(inspect.signature(get_ptxas).parameters)])  # up to Triton 3.5 one for all GPUs
    gpu = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas.path, "-v", f"--gpu-name={gpu}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", log)[1]), int(re.search(r"(\d+) bytes spill stores", log)[1])


def reports_of(row: tuple[int, str]) -> list[Report]:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from retentive.ops.triton import tiles

    arch, kind = row
    found: dict[tuple[str, str, str], Report] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        key = label(self.__name__, arguments)
        if key not in found and self.__name__ != "count":
            registers, spills = assembled(binary.asm["ptx"], arch)
            tensor_core = len(re.findall(TENSOR_CORES, binary.asm["ptx"]))
            shared = binary.metadata.shared
            found[key] = Report(arch, kind, *key, registers, spills, shared, LIMITS[arch], tensor_core)
        return binary

    driver.set_active(NamedGpu(arch))
    JITFunction.run = compile_only
    tiles.WITHOUT_GPU = arch
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        calls(kind, arch)
    finally:
        JITFunction.run = run
    return list(found.values())


def everything() -> list[Report]:
    from retentive.ops.triton.tiles import TABLE

    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return [one for row in pool.map(reports_of, TABLE) for one in row]


def key() -> str:
    """Describes what a report depends on: the kernels, the calls here, and the version of Triton."""
    import triton

    from retentive.ops import triton as room
    from retentive.ops.compiler import short_hash

    sources = [*sorted(Path(room.__file__).parent.glob("*.py")), Path(__file__)]
    return short_hash(f"triton {triton.__version__}".encode() + b"".join(file.read_bytes() for file in sources))


def markdown(reports: list[Report]) -> str:
    names = [field.name for field in fields(Report)]
    lines = [names, ["---"] * len(names), *([str(value) for value in asdict(one).values()] for one in reports)]
    return f"Sources and version: {key()}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a table and not JSON")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("compile_report.py compiles: unset TRITON_INTERPRET")
    found = everything()
    print(markdown(found) if arguments.markdown else json.dumps([asdict(one) for one in found]))

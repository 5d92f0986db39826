"""`python -m benchmarks gpu`: every bench that needs a GPU, one after the other; `make gpu` is the same.

Each runs in a process of its own, for a limited time, and writes a result and a picture into `results/`. Results that
exist are kept, so that the command goes on where it was stopped. With --dry each runs in small on the CPU, retention in
Triton's interpreter, and no result is kept: that shows that every one of them starts.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retentive import machine
from retentive.bench.lab.options import Say, silent
from retentive.options import known
from retentive.tables import duration, markdown

PICTURE = None


class Step(NamedTuple):
    """One bench: its module and options, the same in small for a CPU, and the minutes that it may take."""

    command: str
    small: str
    minutes: float


TINY = "--device cpu --size 1m --vocab-size 64 --repeats 1"
BIG = "--device cuda --size 130m --vocab-size 32000"
STEPS = {
    "retention": Step(
        "benchmarks retention --device cuda --shapes small medium 1.3B --dtypes bf16 --rivals auto",
        "benchmarks retention --device cpu --shapes small --lengths 32 --rivals none --repeats 1",
        12,
    ),
    "train-130m": Step(
        f"retentive bench train {BIG} --lengths 2048 8192 --tokens 32768 --models retnet hybrid transformer llama",
        f"retentive bench train {TINY} --lengths 32 --tokens 32 --models retnet transformer",
        9,
    ),
    "decode-130m": Step(
        f"retentive bench decode {BIG} --contexts 512 8192 --batches 1 8 64 --models retnet hybrid transformer grouped",
        f"retentive bench decode {TINY} --contexts 32 --batches 1 --steps 2 --models retnet transformer",
        8,
    ),
    "prefill-130m": Step(
        f"retentive bench prefill {BIG} --lengths 2048 8192 32768 --models retnet transformer grouped",
        f"retentive bench prefill {TINY} --lengths 32 --models retnet transformer",
        6,
    ),
}
"""All steps: together at most 35 minutes."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """All benches that need a GPU: the operator, training, decoding, prompts."""

    steps: tuple[str, ...] = tuple(STEPS)
    """Names of the benches to run."""
    out: Path = Path("results")
    """Folder of the results; those that exist are kept."""
    dry: bool = False
    """Run each in small on the CPU, in Triton's interpreter, and keep no result."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Rows of all steps: their time, and the reason why one failed.

    Raises:
        ValueError: an unknown step, or no NVIDIA GPU.
    """
    known(options.steps, STEPS, "step")
    if not options.dry and not torch.cuda.is_available():
        raise ValueError("no NVIDIA GPU is here: with --dry every step runs in small on the CPU")
    with tempfile.TemporaryDirectory() as spare:
        folder = Path(spare) if options.dry else options.out
        rows = list(run(options.steps, folder, options.dry, say))
    return {"what": "gpu", "hardware": machine.describe(), "dry": options.dry, "rows": rows}


def run(names: Iterable[str], folder: Path, dry: bool, say: Say) -> Iterable[dict[str, Any]]:
    """Yields a row of each step, run or kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        step, file = STEPS[name], folder / f"{name}_{tag()}.json"
        if file.exists():
            say(f"{name}: kept {file}")
            yield {"step": name, "file": file.name, "seconds": 0.0, "error": None}
            continue
        asked = ["benchmarks.lab.interpreter", *step.small.split()] if dry else step.command.split()
        command, began = [sys.executable, "-m", *asked, "--json", str(file)], time.perf_counter()
        say(f"{name}: {' '.join(asked)}")
        error = failure(command, 60 * step.minutes)
        seconds = time.perf_counter() - began
        say(f"{name}: {error or 'done'} after {duration(seconds)}")
        yield {"step": name, "file": file.name, "seconds": seconds, "error": error}


def failure(command: list[str], limit: float) -> str | None:
    """Runs a command for at most `limit` seconds; returns why it failed, by the last line that it said, or None."""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {duration(limit)}, its limit"
    return None if done.returncode == 0 else (done.stderr.strip() or "no reason given").splitlines()[-1]


def tag() -> str:
    """Name of the GPU, or cpu, and the month, as in the names of results."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{re.sub('[^a-z0-9]+', '-', gpu.lower().removeprefix('nvidia '))}_{date.today():%Y%m}"


def table(result: dict[str, Any]) -> str:
    """A row for each step."""
    lines = [[row["step"], row["file"], duration(row["seconds"]), row["error"] or "done"] for row in result["rows"]]
    failed = sum(row["error"] is not None for row in result["rows"])
    return markdown(["step", "file", "time", ""], lines) + (f"\n\n{failed} of {len(lines)} failed." if failed else "")

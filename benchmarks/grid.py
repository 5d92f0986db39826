"""Bidirectional retention over grids of patches of several sizes, beside attention among all patches.

Measures the forward pass of one layer of an image encoder in float32. The correctness gate: the operator must equal the
quadratic form in float64. `exponent` is the growth of time from one grid to the next: 1 is linear in the number of
patches, 2 quadratic.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retentive import machine
from retentive.bench.lab import clock
from retentive.bench.lab.options import Say, silent
from retentive.bench.lab.plot import grid, legend, panel
from retentive.layers import BidirectionalRetention
from retentive.layers.config import RetentionConfig
from retentive.ops import reference
from retentive.ops.bidirectional import bidirectional
from retentive.options import at_least_one
from retentive.tables import duration, markdown

NAMES = {"retention": "retention, both directions", "attention": "attention (torch's MultiheadAttention)"}
TOLERANCE = 1e-12
"""Largest difference from the quadratic form in float64, of outputs of about 1."""
PICTURE = "A layer over a grid of patches (width {dim}, {heads} heads)"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Bidirectional retention over grids of patches, beside attention: seconds of a layer by number of patches."""

    sides: tuple[int, ...] = (16, 32, 64, 128)
    """Patches along a side of the grids."""
    dim: int = 128
    """Width of the layers."""
    heads: int = 2
    """Heads of the layers."""
    repeats: int = 5
    """Repetitions timed of each, interleaved; the best counts."""
    patience: float = 20.0
    """Seconds after which a layer is not repeated."""


@torch.inference_mode()
def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per grid: seconds of each layer, and their growth.

    Raises:
        ValueError: numbers below 1, or a width not divisible by the heads.
        ArithmeticError: the gate failed; nothing was timed.
    """
    at_least_one(options, "sides", "dim", "heads", "repeats")
    worst = check()
    torch.manual_seed(0)
    config = RetentionConfig(dim=options.dim, heads=options.heads, head_norm=True)
    retention = BidirectionalRetention(config).eval()
    attention = nn.MultiheadAttention(options.dim, options.heads, batch_first=True).eval()
    rows: list[dict[str, Any]] = []
    for side in sorted(set(options.sides)):
        x = torch.randn(1, side, side, options.dim)
        flat = x.flatten(1, 2)
        runs = {
            "retention": partial(retention, x),
            "attention": partial(attention, flat, flat, flat, need_weights=False),
        }
        how: dict[str, Any] = {"repeats": options.repeats, "patience": options.patience}
        timed = clock.interleaved(runs, torch.device("cpu"), **how)
        row: dict[str, Any] = {"side": side, "patches": side**2}
        row["models"] = {name: clock.best(times) for name, times in timed.items()}
        for name, found in row["models"].items() if rows else ():
            before = rows[-1]
            growth = found["seconds"] / before["models"][name]["seconds"]
            found["exponent"] = math.log(growth) / math.log(row["patches"] / before["patches"])
        rows.append(row)
        told = ", ".join(f"{name} {duration(found['seconds'])}" for name, found in row["models"].items())
        say(f"{side} x {side}: {told}")
    return {
        "what": "a layer over a grid of patches, forward",
        "hardware": machine.describe(),
        "dim": options.dim,
        "heads": options.heads,
        "off_by": worst,
        "rows": rows,
    }


def check() -> float:
    """Largest difference between the operator and the quadratic form.

    Raises:
        ArithmeticError: the difference is above the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, 2, n, generator=generator, dtype=torch.float64) for n in (16, 16, 24))
    gaps = -torch.rand(2, 150, 2, generator=generator, dtype=torch.float64) / 8
    want = reference.bidirectional(q, k, v, gaps, scale=0.25)
    worst = float((bidirectional(q, k, v, gaps, scale=0.25) - want).abs().max() / want.abs().max())
    if not worst <= TOLERANCE:
        raise ArithmeticError(f"retention in both directions is off by {worst:.1e}, above {TOLERANCE}: not timed")
    return worst


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in result["rows"]:
        cells = [f"{row['side']} x {row['side']}", f"{row['patches']:,}"]
        for name in NAMES:
            found = row["models"][name]
            cells += [duration(found["seconds"]), f"{found['exponent']:.2f}" if "exponent" in found else "–"]
        lines.append(cells)
    heads = [head for name in NAMES.values() for head in (name, "exponent")]
    return markdown(["grid", "patches", *heads], lines)


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG: milliseconds of a layer against patches."""
    figure, axes = grid(title, 1, 1, size=(6, 4.2))
    points = [(row["patches"], row["models"]) for row in result["rows"]]
    panel(axes[0, 0], points, NAMES, "seconds", "ms", "patches", unit=1e-3)
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")

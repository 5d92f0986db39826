"""Report of a training run: its curve, held-out bits per byte beside two baselines, and its text samples."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from retentive import machine
from retentive.bench.lab.options import Say, silent
from retentive.bench.lab.plot import grid
from retentive.data.packed import Packed
from retentive.evals.heldout import YARDSTICKS, yardsticks
from retentive.tables import markdown
from retentive.train.log import read_metrics

PICTURE = "Training run {run}"


@dataclass(frozen=True)
class Options:
    """A training run: its curve, and held-out bits per byte beside order-0 entropy and xz -9."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    data: Path
    """Packed data that the run was trained on."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Same as `report`, for the run of the options, with its name as `run`."""
    return {"run": str(options.run), **report(options.run, Packed(options.data))}


def report(run: Path, data: Packed) -> dict[str, Any]:
    """Summary of the run's metrics, with the baselines on the same text and the hardware.

    Points are [tokens of training, value]; the training loss is thinned to about 200 means.

    Raises:
        ValueError: the run has not reached its last evaluation.
    """
    records = read_metrics(run)
    steps = [r for r in records if "loss" in r]
    final = [[r["bytes"], r["final_bits_per_byte"]] for r in records if "final_bits_per_byte" in r]
    if not steps or not final:
        raise ValueError(f"the run at {run} has no last evaluation yet: let it end (retentive train … --resume)")
    try:
        options = json.loads((run / "train.json").read_text(encoding="utf-8"))
        command = options["command"]
        tokens_per_step = command["batch"] * command["length"] * options["train"]["accumulate"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{run / 'train.json'} does not say how the run was made: it is damaged") from None
    every = max(len(steps) // 200, 1)  # steps per mean
    return {
        "what": "training run",
        "hardware": machine.describe(),
        "options": options,
        "tokens": len(steps) * tokens_per_step,
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steps),
        "train_loss": [
            [r["step"] * tokens_per_step, statistics.mean(x["loss"] for x in steps[max(0, i - every + 1) : i + 1])]
            for i, r in enumerate(steps)
            if (i + 1) % every == 0
        ],
        "held_out": [[r["step"] * tokens_per_step, r["bits_per_byte"]] for r in records if "bits_per_byte" in r],
        "final": final[-1],
        "yardsticks": yardsticks(data),
        "samples": {str(r["step"]): r["sample"] for r in records if "sample" in r},
    }


def bits_per_byte(result: dict[str, Any]) -> dict[str, float]:
    """Held-out bits per byte of the baselines and of the model, by name."""
    return {name: result["yardsticks"][name] for name in YARDSTICKS} | {"this model": result["final"][1]}


def table(result: dict[str, Any]) -> str:
    """Table of the held-out bits per byte of the baselines and of the model."""
    return markdown(["", "bits per byte"], [[name, f"{value:.3f}"] for name, value in bits_per_byte(result).items()])


def plot(result: dict[str, Any], path: Path, *, title: str) -> None:
    """The curve as a PNG: training loss left, held-out bits per byte with the baselines right."""
    figure, ((left, right),) = grid(title, 1, 2)
    for axis, points, label in (
        (left, result["train_loss"], "training loss (nats per token)"),
        (right, result["held_out"], "held-out bits per byte"),
    ):
        x, y = zip(*points, strict=True)
        axis.plot([t / 1e6 for t in x], y, color="C0", marker="o" if axis is right else "", label="this model")
        axis.set_xlabel("tokens (millions)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    for name, colour in zip(YARDSTICKS, ("C1", "C2"), strict=True):
        right.axhline(result["yardsticks"][name], color=colour, linestyle="--", label=name)
    right.legend()
    figure.savefig(path, dpi=120, format="png")

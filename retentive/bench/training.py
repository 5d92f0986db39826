"""`retentive bench train`: tokens/s and memory of a training step by length, of a RetNet and its Transformer twins.

A step is forward, loss, backward and optimiser, over the same tokens in the same precision. The models are interleaved.
The correctness gate: the forms of the timed RetNet must agree. Memory is the peak of a separate process during a step,
including weights and optimiser, above its memory before the model was made (on a GPU: memory of the allocator).
With `profile` the time of a step is divided among its parts (`lab/parts.py`).

    python -m retentive.bench.training '{"name": "retnet", …}'     one line of JSON: the memory of one model
"""

import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from retentive import machine
from retentive.bench.lab import clock, models, neighbour
from retentive.bench.lab.options import OnDevice, Say, Sized, silent
from retentive.bench.lab.parts import OTHER, PARTS, parts
from retentive.bench.lab.plot import grid, legend, panel, tokens
from retentive.models import LanguageModel, ModelConfig, cost
from retentive.ops.cross_entropy import cross_entropy
from retentive.options import at_least_one, known
from retentive.tables import duration, markdown
from retentive.train.config import TrainConfig
from retentive.train.optim import adamw
from retentive.train.prepare import wrap_blocks

MODELS = ("retnet", "transformer", "grouped", "hybrid", "llama")
PICTURE = "A training step ({size})"


@dataclass(frozen=True)
class Step:
    """Description of a training step, except the model's name. Steps of one bench differ only in length."""

    config: ModelConfig
    length: int
    tokens: int
    """Tokens per step: as many rows of `length` as they fill, at least one."""
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    checkpoint_activations: bool = False
    device: str = "cpu"

    @property
    def batch(self) -> int:
        return max(self.tokens // self.length, 1)


class Trainer:
    """Model with its optimiser and a batch."""

    def __init__(self, name: str, step: Step):
        device = torch.device(step.device)
        self.model: LanguageModel = models.make(name, models.config_of(name, step.config), device).train()
        self.optimizer = adamw(self.model, TrainConfig(lr=1e-3))
        wrap_blocks(self.model, TrainConfig(checkpoint_activations=step.checkpoint_activations))
        generator = torch.Generator().manual_seed(0)
        # one token more than a row, since the targets are the row shifted by one
        self.ids = torch.randint(step.config.vocab_size, (step.batch, step.length + 1), generator=generator).to(device)
        self.precision = step.precision

    def run(self, length: int | None = None) -> None:
        """Makes one whole step, on the first `length` tokens of each row if given."""
        ids, targets = self.ids[:, :-1][:, :length], self.ids[:, 1:][:, :length]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            x, _ = self.model.hidden(ids)
            # fused as in training: the logits of all tokens would need more memory than the rest
            loss = cross_entropy(x, self.model.head.weight, targets) / targets.numel()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True, kw_only=True)
class Options(OnDevice, Sized):
    """Training step: tokens/s and memory by length, of a RetNet and its Transformer twins."""

    lengths: tuple[int, ...] = (2048, 8192)
    """Sequence lengths."""
    models: tuple[str, ...] = MODELS[:2]
    """Models: retnet (needed), transformer, grouped (the twin with grouped heads), hybrid, llama (of transformers)."""
    tokens: int = 8192
    """Tokens per step, at least one row."""
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass, to save memory."""
    repeats: int = 5
    """Timed steps of each model, interleaved; the best counts."""
    patience: float = 60
    """Seconds: a model whose step takes longer is timed only once."""
    profile: bool = False
    """Also divide each step's time among its parts: matrix products, retention, attention, norms and others."""
    neighbour: bool = False
    """Also time the RetNet, at the first length, beside one other busy process."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Returns a row per length: tokens/s, fraction of the GEMM rate, and memory of each model.

    Raises:
        ValueError: a size, model, device or precision is unknown, or a number is below 1.
        ArithmeticError: the correctness gate failed; nothing was timed.
    """
    config, device = options.config, options.torch_device
    known([options.precision], models.PRECISIONS, "precision")
    at_least_one(options, "lengths", "tokens", "repeats")
    names = models.chosen(options.models, MODELS, device, say)
    how = (options.tokens, options.precision, options.checkpoint_activations, str(device))
    steps = [Step(config, length, *how) for length in options.lengths]
    rows = []
    for step in steps:
        row: dict[str, Any] = {"length": step.length, "batch": step.batch}
        # times first, in this process; then memory, in separate processes without others beside them
        row |= interleaved(names, step, options.repeats, options.patience, options.profile)
        gc.collect()
        machine.free_memory(device)  # gives back memory that the next processes need
        for name in names:
            row[name] |= memory(name, step)
        rows.append(row)
        told = ", ".join(f"{name} {duration(row[name]['seconds'])}" for name in names)
        say(f"{step.batch} x {step.length:,} tokens: {told}")
    result = {
        "size": options.size,
        "vocab_size": options.vocab_size,
        "what": "training step",
        "precision": options.precision,
        "checkpoint_activations": options.checkpoint_activations,
        "device": str(device),
        "hardware": machine.describe(),
        "models": names,
        "rows": rows,
    }
    if options.neighbour:
        kept = neighbour.speed_kept(Trainer("retnet", steps[0]).run, device, repeats=options.repeats)
        result["neighbour"] = {"length": steps[0].length, "batch": steps[0].batch, **kept}
    return result


def interleaved(
    names: Sequence[str], step: Step, repeats: int, patience: float, profile: bool
) -> dict[str, dict[str, Any]]:
    """Returns the best and median seconds per step, tokens/s, the fraction of the GEMM rate and parts of each model."""
    device = torch.device(step.device)
    # all in memory at once, since their steps are interleaved
    trainers = {name: Trainer(name, step) for name in names}
    retnet = trainers["retnet"].model
    # 1024 tokens are many chunks, and the recurrent form is slow
    models.check_forms(retnet.eval(), min(step.length, 1024))
    retnet.train()
    runs, dtype = {name: trainer.run for name, trainer in trainers.items()}, models.PRECISIONS[step.precision]
    timed, gemm = clock.beside_products(runs, device, dtype, repeats=repeats, patience=patience)
    results = {}
    for name, times in timed.items():
        model = trainers[name].model
        rate = step.batch * step.length / min(times)
        results[name] = {
            **clock.best(times),
            "tokens_per_second": rate,
            "parameters": cost.parameters(model.config),
            "fraction_of_gemm_rate": rate * cost.training_flops_per_token(model.config, step.length) / gemm,
        }
        if profile:
            results[name]["parts"] = parts(runs[name], device, gemm)
    return results


def memory(name: str, step: Step) -> dict[str, Any]:
    """Returns {"peak_bytes": …} of a step in a separate process; {} if that failed, for example out of memory."""
    task = {"name": name, **vars(step), "config": step.config.written()}
    command = [sys.executable, "-m", "retentive.bench.training", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    # the last line, since libraries may print before it
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def table(result: dict[str, Any]) -> str:
    """Returns the result as a Markdown table; ratios above 1 mean that RetNet trains faster."""
    names = _names(result)
    heads = ["length", "rows", *(f"{models.NAMES[name]}: tokens/s" for name in names)]
    heads += [f"RetNet / {models.NAMES[name]}" for name in names[1:]] + [
        f"{models.NAMES[name]}: memory" for name in names
    ]
    heads += [f"{models.NAMES[name]}: of the GEMM rate" for name in names]
    lines = []
    for row in result["rows"]:
        rates = {name: row[name]["tokens_per_second"] for name in names}
        cells = [f"{row['length']:,}", str(row["batch"]), *(f"{rate:,.0f}" for rate in rates.values())]
        cells += [f"{rates['retnet'] / rates[name]:.2f}x" for name in names[1:]]
        cells += [decimal(row[name]["peak_bytes"]) if "peak_bytes" in row[name] else "–" for name in names]
        lines.append([*cells, *(f"{row[name]['fraction_of_gemm_rate']:.0%}" for name in names)])
    tables = [markdown(heads, lines), *_parts_table(result)]
    if "neighbour" in result:
        beside = result["neighbour"]
        of = f"a training step of RetNet ({beside['batch']} x {beside['length']:,} tokens)"
        tables.append(neighbour.note(beside, of))
    return "\n\n".join(tables)


def _profiled(result: dict[str, Any]) -> list[tuple[int, str, dict[str, Any]]]:
    """Returns (length, model, parts) of all steps that were profiled."""
    names = _names(result)
    return [(row["length"], n, row[n]["parts"]) for row in result["rows"] for n in names if "parts" in row[n]]


def _parts_table(result: dict[str, Any]) -> list[str]:
    """Returns a table of the parts of each step; none without a profile."""
    found = _profiled(result)
    heads = ["length", "model", *_shared(found), "matrix products: of the GEMM rate", "written by the others"]
    lines = []
    for length, name, part in found:
        shares = (f"{part['shares'].get(kind, 0):.0%}" for kind in _shared(found))
        lines.append([f"{length:,}", models.NAMES[name], *shares])
        lines[-1] += [f"{part['of_the_gemm_rate']:.0%}", decimal(part["written"])]
    return [markdown(heads, lines)] if found else []


def _shared(found: list[tuple[int, str, dict[str, Any]]]) -> list[str]:
    """Returns the parts that any step has."""
    return [kind for kind in (*PARTS, OTHER) if any(kind in part["shares"] for *_, part in found)]


def _names(result: dict[str, Any]) -> list[str]:
    """Models of the result; files of version 0.1.0 hold two and do not name them."""
    return result.get("models", ["retnet", "transformer"])


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """Writes a PNG: tokens/s and memory against length, or the parts of each step if they were measured."""
    found = _profiled(result)
    if found:
        _plot_parts(found, path, title=title)
        return
    figure, axes = grid(title, 1, 2)
    points = [(row["length"], row) for row in result["rows"]]
    names = {name: models.NAMES[name] for name in _names(result)}
    for axis, key, label, unit in (
        (axes[0, 0], "tokens_per_second", "tokens/s", 1),
        (axes[0, 1], "peak_bytes", "memory of a step (GB)", 1e9),
    ):
        panel(axis, points, names, key, label, "length (tokens)", unit=unit, looks=models.LOOKS)
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")


def _plot_parts(found: list[tuple[int, str, dict[str, Any]]], path: str | Path, *, title: str) -> None:
    """Writes a PNG: a bar for each step, divided by parts."""
    figure, axes = grid(title, 1, 1, size=(9, 1 + 0.55 * len(found)))
    axis, left = axes[0, 0], [0.0] * len(found)
    for n, kind in enumerate(_shared(found)):
        widths = [100 * part["shares"].get(kind, 0) for *_, part in found]
        axis.barh(range(len(found)), widths, left=left, color=f"C{n % 10}", hatch="//" if n > 9 else None, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(found)), [f"{models.NAMES[name]}, {tokens(length)}" for length, name, _ in found])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("time of a step (%)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def main(argument: str) -> None:
    """Prints the memory of one model's step."""
    task = json.loads(argument)
    device = torch.device(task["device"])
    before = machine.reset_peak_memory(device)  # before the model is made, since weights count
    config = ModelConfig.read(task.pop("config"))
    trainer = Trainer(task.pop("name"), Step(config=config, **task))
    trainer.run(length=1)  # makes the optimiser's moments, which the measured step then has from the start
    trainer.run()
    print(json.dumps({"peak_bytes": machine.peak_memory(device) - before}))


if __name__ == "__main__":
    main(sys.argv[1])

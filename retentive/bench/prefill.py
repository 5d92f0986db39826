"""`retentive bench prefill`: reading a prompt, tokens/s against its length, RetNet beside its twin.

One sequence is read at once, without gradients, up to the hidden state of its last token and the state or cache after
it. The models take turns; before that each must decode the logits that it gives when it reads a text at once.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retentive import machine
from retentive.bench.lab import clock, models
from retentive.bench.lab.plot import dress, grid, tokens
from retentive.bench.lab.tables import at_least_one, duration, known, markdown
from retentive.models import Model, RetNetConfig, cost

LENGTHS = (512, 2048, 8192, 32768)
MODELS = ("retnet", "transformer", "grouped")


@torch.inference_mode()
def measure(
    config: RetNetConfig,
    *,
    lengths: Sequence[int] = LENGTHS,
    models: Sequence[str] = MODELS,
    precision: str = "bf16",
    repeats: int = 3,
    patience: float = 60,
    device: torch.device | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """A row per length: of every model seconds, tokens/s, and the fraction of its FLOPs at the GEMM rate.

    Raises:
        ValueError: an unknown name or precision, a number below 1.
        ArithmeticError: a gate is red; nothing was timed.
    """
    device = device or torch.device("cpu")
    known([precision], models.PRECISIONS, "precision")
    at_least_one("lengths", lengths)
    at_least_one("repeats", [repeats])
    known(models, MODELS, "model")
    dtype = models.PRECISIONS[precision]
    contestants: dict[str, Model] = {name: models.make(name, config, device, dtype) for name in models.chosen(models)}
    for model in contestants.values():
        models.check_decoding(model)
    rows = []
    for length in sorted(set(lengths)):
        row: dict[str, Any] = {
            "length": length,
            "models": interleaved(contestants, length, repeats, patience, device, dtype),
        }
        rows.append(row)
        told = ", ".join(f"{name} {duration(r['seconds'])}" for name, r in row["models"].items())
        say(f"{length:,} tokens: {told}")
    return {
        "what": "reading a prompt",
        "hardware": machine.describe(),
        "device": str(device),
        "precision": precision,
        "parameters": {name: cost.parameters(model.config) for name, model in contestants.items()},
        "rows": rows,
    }


def interleaved(
    contestants: dict[str, Model],
    length: int,
    repeats: int,
    patience: float,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, dict[str, Any]]:
    """Of every model the best and the median of its repetitions, in tokens/s and of the GEMM rate."""
    gemm = machine.gemm_rate(device, dtype)
    vocab = next(iter(contestants.values())).config.vocab_size
    ids = torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    runs = {name: partial(model.hidden, ids) for name, model in contestants.items()}
    results = {}
    for name, times in clock.interleaved(runs, device, repeats=repeats, patience=patience).items():
        config = contestants[name].config
        # a prompt's tokens have half of it before them on average; its logits are not asked for
        flops = cost.flops_per_token(config, (length + 1) // 2) - 2 * config.vocab_size * config.dim
        results[name] = {
            "seconds": min(times),
            "median_seconds": statistics.median(times),
            "repeats": len(times),
            "tokens_per_second": length / min(times),
            "fraction": flops * length / min(times) / gemm,
        }
    return results


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    names = list(result["parameters"])
    heads = ["tokens", *(f"{models.NAMES[n]}: tokens/s" for n in names), *(f"of {models.NAMES[n]}" for n in names[1:])]
    heads += [f"{models.NAMES[n]}: of the GEMM rate" for n in names]
    lines = []
    for row in result["rows"]:
        rates = {name: row["models"][name]["tokens_per_second"] for name in names}
        cells = [f"{row['length']:,}", *(f"{rates[name]:,.0f}" for name in names)]
        cells += [f"{rates['retnet'] / rates[name]:.2f}x" for name in names[1:]]
        lines.append([*cells, *(f"{row['models'][name]['fraction']:.0%}" for name in names)])
    return markdown(heads, lines)


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG: tokens/s against length.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`).
    """
    figure, ((axis,),) = grid(title, 1, 1, size=(6, 4.2))
    lengths = [row["length"] for row in result["rows"]]
    for n, name in enumerate(result["parameters"]):
        rates = [row["models"][name]["tokens_per_second"] for row in result["rows"]]
        axis.plot(lengths, rates, color=f"C{n}", marker="osv"[n], label=models.NAMES[name])
    dress(axis, lengths, [tokens(n) for n in lengths], "tokens/s")
    axis.set_xlabel("tokens of the prompt")
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=120, format="png")

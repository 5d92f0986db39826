"""`retentive bench prefill`: tokens/s of reading a prompt against its length, RetNet beside its twin.

Reads one sequence at once, without gradients, up to the hidden state of its last token and the state or cache after it.
The models are interleaved. The correctness gate: each must decode, token by token, the logits of a text read at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retentive import machine
from retentive.bench.lab import clock, llamacpp, models
from retentive.bench.lab.options import OnDevice, Say, Sized, silent
from retentive.bench.lab.plot import grid, legend, panel
from retentive.models import cost
from retentive.options import at_least_one, known
from retentive.tables import duration, markdown

MODELS = ("retnet", "transformer", "grouped", *models.NATIVE, *models.LLAMACPP)
PICTURE = "Reading a prompt ({size})"


@dataclass(frozen=True, kw_only=True)
class Options(OnDevice, Sized):
    """Prefill: tokens/s of reading a prompt by its length, of a RetNet and its Transformer twins."""

    lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    """Prompt lengths in tokens."""
    models: tuple[str, ...] = MODELS
    """Models: retnet, transformer, grouped (the twin with grouped heads). In C, with -bf16,
    -int8 or -int4: native, native-twin (the grouped twin), native-hybrid. Of llama.cpp, if
    installed, the grouped twin: llamacpp-f16, llamacpp-q8_0, llamacpp-q4_0."""
    precision: str = "bf16"
    """Precision of weights and caches, bf16 or fp32; the state is always float32."""
    repeats: int = 3
    """Timed repetitions of each model, interleaved; the best counts."""
    patience: float = 60
    """Seconds: a model that takes longer reads the prompt only once."""


@torch.inference_mode()
def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Returns a row per length: seconds, tokens/s and the fraction of the GEMM rate of every model.

    Raises:
        ValueError: a name or precision is unknown, or a number is below 1.
        ArithmeticError: a correctness gate failed; nothing was timed.
    """
    device = options.torch_device
    known([options.precision], models.PRECISIONS, "precision")
    at_least_one(options, "lengths", "repeats")
    dtype = models.PRECISIONS[options.precision]
    rivals: dict[str, Any] = {}
    for name in models.chosen(options.models, MODELS, device, say):
        config: Any = models.config_of(name, options.config)
        if name in models.LLAMACPP:
            rivals[name] = llamacpp.Model(config, name.removeprefix("llamacpp-").upper())
        else:
            rivals[name] = models.make(name, config, device, dtype)
            models.check_decoding(rivals[name])
    rows = []
    # sorted and unique, as tables and curves need them
    for length in sorted(set(options.lengths)):
        found = interleaved(rivals, length, dtype, device, options)
        rows.append({"length": length, "models": found})
        told = ", ".join(f"{name} {duration(r['seconds'])}" for name, r in found.items())
        say(f"{length:,} tokens: {told}")
    return {
        "size": options.size,
        "vocab_size": options.vocab_size,
        "what": "reading a prompt",
        "hardware": machine.describe(),
        "device": str(device),
        "precision": options.precision,
        "parameters": {name: cost.parameters(model.config) for name, model in rivals.items()},
        "rows": rows,
    }


def interleaved(
    rivals: dict[str, Any], length: int, dtype: torch.dtype, device: torch.device, options: Options
) -> dict[str, dict[str, Any]]:
    """Returns the best and the median repetition of every model, in tokens/s and as a fraction of the GEMM rate."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(options.vocab_size, (1, length), generator=generator).to(device)
    # hidden states without logits: only the last token of a prompt needs them
    runs = {name: reading(model, ids) for name, model in rivals.items()}
    timed, gemm = clock.beside_products(runs, device, dtype, repeats=options.repeats, patience=options.patience)
    results = {}
    for name, times in timed.items():
        config = rivals[name].config
        # on average half of the prompt precedes a token; the output matrix (2 V D FLOPs) is not applied
        flops = cost.mean_flops_per_token(config, length) - 2 * config.vocab_size * config.dim
        results[name] = {
            **clock.best(times),
            "tokens_per_second": length / min(times),
            "fraction": flops * length / min(times) / gemm,
        }
    return results


def reading(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Returns a call that reads the prompt from its start; llama.cpp's also computes the logits of its last token."""
    if not isinstance(model, llamacpp.Model):
        return partial(model.hidden, ids)
    session = llamacpp.Session(model, tokens=ids.shape[1])

    def read() -> None:
        session.forget()
        session.read(ids.shape[1])

    return read


def table(result: dict[str, Any]) -> str:
    """Returns the rows as a Markdown table."""
    names = list(result["parameters"])
    heads = [
        "tokens",
        *(f"{models.NAMES[n]}: tokens/s" for n in names),
        *(f"RetNet / {models.NAMES[n]}" for n in names[1:]),
    ]
    heads += [f"{models.NAMES[n]}: of the GEMM rate" for n in names]
    lines = []
    for row in result["rows"]:
        rates = {name: row["models"][name]["tokens_per_second"] for name in names}
        cells = [f"{row['length']:,}", *(f"{rates[name]:,.0f}" for name in names)]
        cells += [f"{rates['retnet'] / rates[name]:.2f}x" for name in names[1:]]
        lines.append([*cells, *(f"{row['models'][name]['fraction']:.0%}" for name in names)])
    return markdown(heads, lines)


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """Writes a PNG: tokens/s against length."""
    figure, axes = grid(title, 1, 1, size=(6, 4.2))
    points = [(row["length"], row["models"]) for row in result["rows"]]
    names = models.shown(list(result["parameters"]), points[-1][1], result)
    panel(axes[0, 0], points, names, "tokens_per_second", "tokens/s", "tokens of the prompt", looks=models.LOOKS)
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")

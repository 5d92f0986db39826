"""Largest activations of a trained model: outputs of its layers, block by block, and its states.

Without a norm of each head's output, activations are unbounded. This benchmark shows how far they are from the range of
float16 and float8, and whether all are finite.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

import retentive
from retentive import machine
from retentive.bench.lab.options import Say, silent
from retentive.data.packed import Packed
from retentive.machine import pick_device
from retentive.models import LanguageModel
from retentive.options import at_least_one
from retentive.tables import markdown

PICTURE = None
OF_LAYERS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}
"""Sublayers by name in a block, and the names of their outputs. (The input of `out_proj` is called o.)"""
PARTS = ("q", "k", "v", "o", "out", "ffn", "x")


@dataclass(frozen=True)
class Options:
    """The largest magnitudes of a model's activations on held-out text, block by block."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory or model folder."""
    data: Path
    """Packed data with held-out text."""
    tokens: int = 4096
    """Tokens of held-out text to read, in rows of --length."""
    length: int = 512
    """Tokens of a row."""
    precision: str = "bf16"
    """fp32, or bf16 as in training (matrix products under autocast)."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """The largest |number| of each part of each block, over all tokens and features.

    Raises:
        ValueError: no held-out text, a number below 1, or an unknown precision.
    """
    at_least_one(options, "tokens", "length")
    if options.precision not in ("fp32", "bf16"):
        raise ValueError(f"unknown precision {options.precision!r}, expected fp32 or bf16")
    data, device = Packed(options.data), pick_device("auto")
    tokens = min(options.tokens, data.meta.splits["valid"].tokens)
    rows = data.held_out(length=options.length, tokens=tokens)
    model, _ = retentive.load(options.run, device=device)
    say(f"{tokens} tokens of held-out text in rows of {options.length}")
    largest, state = activations(model.eval(), (row.ids.to(device) for row in rows), options.precision)
    return {
        "what": "activations",
        "hardware": machine.describe(),
        "device": device.type,
        "run": options.run.name,
        "precision": options.precision,
        "tokens": tokens,
        "blocks": largest,
        "state": state,
    }


@torch.no_grad()
def activations(
    model: LanguageModel, rows: Iterable[Tensor], precision: str
) -> tuple[list[dict[str, float]], float | None]:
    """(for each block, part -> largest magnitude; largest magnitude in the states after a row, None without states).

    A magnitude is NaN if any number is. The parts are those of PARTS that a block has; x is the residual stream after
    it.
    """
    found: list[dict[str, float]] = [{} for _ in model.blocks]
    hooks, states = [], []

    def note(block: int, part: str, x: Tensor) -> None:
        found[block][part] = float(torch.tensor([found[block].get(part, 0.0), float(x.abs().max())]).max())  # NaN stays

    def watch(module: nn.Module, block: int, part: str) -> None:
        def hook(_, given, out) -> None:
            note(block, part, out[0] if isinstance(out, tuple) else out)
            if part == "out":
                note(block, "o", given[0])

        hooks.append(module.register_forward_hook(hook))

    for n, block in enumerate(model.blocks):
        watch(block, n, "x")
        if isinstance(block.ffn, nn.Module):
            watch(block.ffn, n, "ffn")
        for name, module in block.named_modules():
            if (last := name.rpartition(".")[2]) in OF_LAYERS:
                watch(module, n, OF_LAYERS[last])
    try:
        for ids in rows:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bf16"):
                _, state = model.hidden(ids)
            retained = [m for m in state.settled().memories if m.kind == "retention"]
            states += [m.value.abs().max() for m in retained]
    finally:
        for hook in hooks:
            hook.remove()
    return found, float(torch.stack(states).max()) if states else None


def table(result: dict[str, Any]) -> str:
    """A row for each block."""
    rows = [
        [str(n), *(f"{block[part]:.3g}" if part in block else "–" for part in PARTS)]
        for n, block in enumerate(result["blocks"])
    ]
    most = max(block["x"] for block in result["blocks"])
    note = f"Largest magnitudes over {result['tokens']:,} tokens in {result['precision']}; of x: {most:.3g}"
    if result["state"] is not None:
        note += f", in the states: {result['state']:.3g}"
    return markdown(["block", *PARTS], rows) + f"\n\n{note} (float16 ends at 65,504)."

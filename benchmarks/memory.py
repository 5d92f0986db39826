"""`python -m benchmarks memory`: bytes of state and cache and time per token against context, in the README's picture.

Both models read the same tokens up to each context, then decode; the state's and the cache's own tensors are counted.
`retentive bench decode` fills states instead, measures more models, and compares them with the machine's limit.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retentive import machine
from retentive.bench.lab.options import Say, Sized, silent
from retentive.bench.lab.plot import grid, legend, panel
from retentive.models import LanguageModel, build, twin
from retentive.options import at_least_one
from retentive.tables import markdown

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384)
PICTURE = "Memory and time per token ({size})"


@dataclass(frozen=True, kw_only=True)
class Options(Sized):
    """Memory and time per token against context: a RetNet's state beside its twin's KV cache."""

    contexts: tuple[int, ...] = CONTEXTS
    """Context lengths."""
    batch: int = 1
    """Sequences decoded together."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Same as `of_models`, for a RetNet and its twin with random weights."""
    at_least_one(options, "contexts", "batch")
    models = {"RetNet": build(options.config).eval(), "Transformer twin": build(twin(options.config)).eval()}
    result = of_models(models, contexts=options.contexts, batch=options.batch, say=say)
    return {"size": options.size, "vocab_size": options.vocab_size, **result, "batch": options.batch}


@torch.inference_mode()
def of_models(
    models: Mapping[str, LanguageModel],
    *,
    contexts: Sequence[int] = CONTEXTS,
    batch: int = 1,
    steps: int = 16,
    say: Say = silent,
) -> dict[str, Any]:
    """A row per context: bytes of memory and median milliseconds of a decoding step, for each of the two models.

    At every context one model is measured right after the other, so that a slow spell of the machine affects both.
    """
    vocab = next(iter(models.values())).config.vocab_size
    # the same tokens for both; `steps` more than the longest context are decoded after it
    ids = torch.randint(vocab, (batch, max(contexts) + steps), generator=torch.Generator().manual_seed(0))
    states: dict[str, Any] = dict.fromkeys(models)
    read, rows = 0, []
    for context in sorted(contexts):
        row: dict[str, Any] = {"context": context}
        for name, model in models.items():
            # continues from the state at the last context, so that no token is read twice; in parts, which bounds the
            # memory of attention and activations
            for part in ids[:, read:context].split(2048, 1):
                _, states[name] = model.hidden(part, states[name])
            # a clone, since the cache is written in place; the first two steps warm up
            times = _decode(model, states[name].clone(), ids[:, context : context + steps])
            row[name] = {"bytes": states[name].nbytes, "ms_per_token": 1e3 * statistics.median(times[2:])}
        read = context
        rows.append(row)
        say(f"context {context:,}: " + ", ".join(f"{name} {row[name]['ms_per_token']:.2f} ms" for name in models))
    return {"what": "memory and time per token against context", "hardware": machine.describe(), "rows": rows}


def _decode(model: LanguageModel, state: Any, ids: torch.Tensor) -> list[float]:
    """Seconds of each step over `ids` `[B,T]`."""

    def step(token: torch.Tensor) -> None:
        nonlocal state
        x, state = model.hidden(token, state)
        model.head(x)

    return [machine.clock(ids.device, partial(step, token)) for token in ids.split(1, 1)]


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table; a ratio of n means that the first model needs 1/n of the second."""
    a, b = _names(result)
    heads = ["context", f"{a}: memory", f"{b}: memory", "ratio", f"{a}: ms/token", f"{b}: ms/token", "ratio"]
    lines = []
    for row in result["rows"]:
        (m1, t1), (m2, t2) = ((row[n]["bytes"] / 1e6, row[n]["ms_per_token"]) for n in (a, b))
        cells = [f"{row['context']:,}", f"{m1:.2f} MB", f"{m2:.2f} MB", f"{m2 / m1:.2f}"]
        lines.append([*cells, f"{t1:.2f}", f"{t2:.2f}", f"{t2 / t1:.2f}"])
    return markdown(heads, lines)


def _names(result: dict[str, Any]) -> list[str]:
    """The names of the two models."""
    return [name for name in result["rows"][0] if name != "context"]


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG: memory left, time right."""
    points = [(row["context"], row) for row in result["rows"]]
    names = {name: name for name in _names(result)}
    figure, axes = grid(title, 1, 2)
    memory, speed = axes[0]
    panel(memory, points, names, "bytes", "memory of one sequence (MB)", "context (tokens)", unit=1e6)
    panel(speed, points, names, "ms_per_token", "time per token (ms)", "context (tokens)")
    if len(points) > 1:
        # `memory` stays logarithmic: on a linear axis the state would lie at the bottom
        speed.set_yscale("linear")
        speed.set_ylim(bottom=0)
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")

"""What remembering costs: bytes held and time per token against context, RetNet beside its Transformer twin.

Both read the same tokens up to each context for real, then decode; the state's and the cache's own tensors are counted.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retentive import machine
from retentive.bench.lab.plot import panels
from retentive.models import Model

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384)


@torch.inference_mode()
def measure(
    models: Mapping[str, Model], *, contexts: Sequence[int] = CONTEXTS, batch: int = 1, steps: int = 16, seed: int = 0
) -> list[dict[str, Any]]:
    """A row per context: for each model the bytes of its memory and the median milliseconds of a decoding step.

    The models take turns at every context, so that both see the machine in the same mood.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = next(iter(models.values())).config.vocab_size
    ids = torch.randint(vocab, (batch, max(contexts) + steps), generator=generator)
    states: dict[str, Any] = dict.fromkeys(models)
    read, rows = 0, []
    for context in sorted(contexts):
        row: dict[str, Any] = {"context": context}
        for name, model in models.items():
            for part in ids[:, read:context].split(2048, 1):
                _, states[name] = model.hidden(part, states[name])
            used = states[name].nbytes
            state, times = states[name].clone(), []
            for t in range(context, context + steps):
                began = time.perf_counter()
                x, state = model.hidden(ids[:, t : t + 1], state)
                model.head(x)
                times.append((time.perf_counter() - began) * 1e3)
            row[name] = {"bytes": used, "ms_per_token": statistics.median(times[2:])}
        read = context
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; a ratio above 1 says how much less the first model needs."""
    a, b = [name for name in rows[0] if name != "context"]
    lines = [
        f"| context | {a}: memory | {b}: memory | ratio | {a}: ms/token | {b}: ms/token | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        (m1, t1), (m2, t2) = ((row[n]["bytes"] / 1e6, row[n]["ms_per_token"]) for n in (a, b))
        lines.append(
            f"| {row['context']:,} | {m1:.2f} MB | {m2:.2f} MB | {m2 / m1:.2f} | {t1:.2f} | {t2:.2f} | {t2 / t1:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: str | Path, *, title: str) -> None:
    """The picture of `rows` as a PNG: memory left, time right.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`).
    """
    contexts = [row["context"] for row in rows]
    figure, axes = panels(title)
    curves = [("bytes", 1e6, "memory of one sequence (MB)"), ("ms_per_token", 1, "time per token (ms)")]
    for axis, (key, unit, label) in zip(axes, curves, strict=True):
        for name, colour, marker in zip([n for n in rows[0] if n != "context"], ("C0", "C1"), "os", strict=True):
            values = [row[name][key] / unit for row in rows]
            axis.plot(contexts, values, color=colour, marker=marker, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts])
        if key == "bytes":
            axis.set_yscale("log")  # on a linear axis the state is a line on the floor
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlabel("context (tokens)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with the hardware they were measured on, for a JSON file."""
    return {"what": "memory and time per token against context", "hardware": machine.describe(), "rows": rows}

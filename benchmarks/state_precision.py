"""`python -m benchmarks state-precision`: retention states of 16 and 8 bits while decoding.

A state is a fading sum over all tokens, and a rounding stays in it as long as a token does. Here the states of all
retention layers are rounded after every token, as if each step wrote them, or after every few, as rings do
(`ops/ring.py`). Keys and values of attention keep their dtype.

    bf16         16 bits
    int8         8 bits, and a scale for each head
    int8 rows    8 bits, and a scale for each of a head's K rows

Every model reads long held-out texts. A second kind of model, of `python -m benchmarks recall`, answers from pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.filesize import decimal
from torch import Tensor

from benchmarks.recall import PAIRS, accuracy
from retentive import machine
from retentive.bench.lab.options import Say, silent
from retentive.bench.lab.plot import GREY, grid
from retentive.checkpoint import ModelFolder
from retentive.data.packed import Packed
from retentive.evals.heldout import Pairs, Tokens, recalled
from retentive.models import LanguageModel, State
from retentive.models.memory import RetentionMemory
from retentive.options import at_least_one
from retentive.tables import counted, markdown

PICTURE = "Precision of states"
PIECE = 1024
"""Tokens read at a time without rounding."""


def _int8(x: Tensor, *dims: int) -> Tensor:
    """Round to 255 levels, from the largest number over `dims`."""
    scale = (x.abs().amax(dims, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale).round() * scale


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda x: x.bfloat16().to(x.dtype),
    "int8": lambda x: _int8(x, -2, -1),
    "int8 rows": lambda x: _int8(x, -1),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """States of 16 and 8 bits beside float32: held-out loss after long texts, and associative recall."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN")]
    """Run directories or model folders, all with the tokenizer of the data."""
    data: Path
    """Packed data with held-out text."""
    recall: tuple[Path, ...] = ()
    """Models that `python -m benchmarks recall` trained."""
    texts: int = 4
    """Texts to read."""
    length: int = 32768
    """Tokens of each text."""
    every: tuple[int, ...] = (1, 8)
    """Tokens between two roundings."""
    pairs: tuple[int, ...] = PAIRS
    """Pairs in a row of the recall."""


class Rounded:
    """A model whose retention states are rounded after every `every` tokens; None: never."""

    def __init__(self, model: LanguageModel, rounding: Callable[[Tensor], Tensor] | None, every: int = PIECE):
        self.model, self.rounding, self.every = model, rounding, every
        self.device, self.head = model.device, model.head

    def hidden(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As of the model, for ids `[B,T]`."""
        parts = []
        for piece in ids.split(self.every, 1):
            x, state = self.model.hidden(piece, state)
            parts.append(x)
            if self.rounding is not None:
                memories = [
                    RetentionMemory(self.rounding(m.tensor())) if isinstance(m, RetentionMemory) else m
                    for m in state.memories
                ]
                state = State(memories, state.position)
        assert state is not None
        return torch.cat(parts, 1), state


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per model, rounding and number of tokens between roundings; the first row of a model has none.

    Raises:
        ValueError: a number below 1, no held-out text of that length, or a model with another tokenizer.
    """
    at_least_one(options, "texts", "length", "every", "pairs")
    data = Packed(options.data)
    ids = texts(data, options.texts, options.length)
    folders = [ModelFolder.open(name) for name in options.models]
    for name, folder in zip(options.models, folders, strict=True):
        if folder.tokenizer is None or folder.tokenizer.sha256 != data.tokenizer.sha256:
            raise ValueError(f"{options.data} has another tokenizer than {name}: pack it with {name}'s")
    answers = [(path, ModelFolder.open(path).model(dtype="float32").eval()) for path in options.recall]
    pairs, nbytes = Pairs(data), len(data.tokenizer.decode(ids[:, 1:].flatten().tolist()).encode())
    rows: list[dict[str, Any]] = []

    def each(name: str, model: LanguageModel, score: Callable[[Any], dict[str, Any]], kind: str) -> None:
        plans = [(None, None, PIECE), *((n, f, every) for every in options.every for n, f in ROUNDINGS.items())]
        for rounding, f, every in plans:
            row = {"kind": kind, "model": name, "rounding": rounding or "float32", "every": every if rounding else None}
            row |= {"bytes": state_bytes(model, rounding), **score(Rounded(model, f, every))}
            rows.append(row)
            say(", ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, list)))

    for folder in folders:
        model = folder.model(dtype="float32").eval()
        each(folder.short_name, model, lambda rounded: losses(rounded, ids, pairs, nbytes), "text")
    for path, model in answers:
        each(path.name, model, lambda r: {"accuracy": {str(n): accuracy(r, n)[0] for n in options.pairs}}, "recall")
    return {
        "what": "precision of states",
        "hardware": machine.describe(),
        "texts": options.texts,
        "length": options.length,
        "rows": rows,
    }


def texts(data: Packed, count: int, length: int) -> Tensor:
    """Ids `[count,length]`: the first windows of held-out text that lie in one document each."""
    windows = (window for window in data.held_out(length=length) if window.ids.shape[1] == length)
    found = [window.ids[0] for window in windows if window.cu_seqlens is not None and len(window.cu_seqlens) == 2]
    if len(found) < count:
        have = counted(len(found), "text")
        raise ValueError(f"the held-out text has {have} of {length:,} tokens: lower `texts` or `length`")
    return torch.stack(found[:count])


def state_bytes(model: LanguageModel, rounding: str | None) -> int:
    """Bytes of one sequence's retention states, scales of four bytes included."""
    total = 0
    for block in model.config.blocks:
        if block.mixer.kind == "retention":
            H, K, V = block.mixer.head_shape
            scales = {"int8": H, "int8 rows": H * K}.get(rounding or "", 0)
            total += H * K * V * {None: 4, "bf16": 2}.get(rounding, 1) + 4 * scales
    return total


@torch.no_grad()
def losses(model: Rounded, ids: Tensor, pairs: Pairs, nbytes: int) -> dict[str, Any]:
    """Bits per byte, nats of recalled tokens, and nats by position (powers of two)."""
    state, nats = None, []
    for piece, after in zip(ids[:, :-1].split(PIECE, 1), ids[:, 1:].split(PIECE, 1), strict=True):
        x, state = model.hidden(piece, state)
        nats.append(F.cross_entropy(model.head(x).float().mT, after, reduction="none").double())
    loss = torch.cat(nats, 1)
    B, T = loss.shape
    context, position = np.repeat(np.arange(B), T), np.tile(np.arange(1, T + 1), B)
    columns = (ids[:, 1:].flatten().numpy(), ids[:, :-1].flatten().numpy(), context, position)
    tokens = Tokens(loss.flatten().numpy(), *columns)
    told = tokens.losses[recalled(tokens, pairs)]
    begins = [2**n for n in range(int(math.log2(T)) + 1)]
    return {
        "bits_per_byte": float(loss.sum()) / math.log(2) / nbytes,
        "recalled": float(told.mean()) if len(told) else None,
        "by_position": [[begin, float(loss[:, begin - 1 : 2 * begin - 1].mean())] for begin in begins],
    }


def table(result: dict[str, Any]) -> str:
    """Two tables: long texts, and recall."""
    heads = ["model", "state", "rounded after", "bytes", "bits per byte", "", "nats of recalled tokens", ""]
    lines, base = [], dict[str, Any]()
    for row in (row for row in result["rows"] if row["kind"] == "text"):
        base = row if row["every"] is None else base
        cells = [cell for key in ("bits_per_byte", "recalled") for cell in _beside(row[key], base[key], row is base)]
        lines.append([*_named(row), *cells])
    found = f"{result['texts']} texts of {result['length']:,} tokens\n\n{markdown(heads, lines)}"
    answers = [row for row in result["rows"] if row["kind"] == "recall"]
    if not answers:
        return found
    pairs = list(answers[0]["accuracy"])
    lines = [[*_named(row), *(f"{row['accuracy'][n]:.1%}" for n in pairs)] for row in answers]
    heads = ["model", "state", "rounded after", "bytes", *(f"{n} pairs" for n in pairs)]
    return f"{found}\n\n{markdown(heads, lines)}"


def _beside(value: float | None, base: float | None, alone: bool) -> list[str]:
    """Cells of a value, and of its distance from the model's own."""
    if value is None or base is None:
        return ["–", ""]
    return [f"{value:.4f}", "" if alone else f"{value - base:+.4f}"]


def _named(row: dict[str, Any]) -> list[str]:
    every = {None: "", 1: "every token"}.get(row["every"], f"{row['every']} tokens")
    return [row["model"], row["rounding"], every, decimal(row["bytes"])]


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG: loss above float32's by position in the text, a panel a model."""
    rows = [row for row in result["rows"] if row["kind"] == "text"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = grid(title, 1, len(models), size=(5.5, 4))
    for axis, model in zip(axes[0], models, strict=True):
        base, *others = [row for row in rows if row["model"] == model]
        for n, row in enumerate(others):
            style = {"color": f"C{list(ROUNDINGS).index(row['rounding'])}", "marker": "osv^"[n // len(ROUNDINGS)]}
            above = [[at, x - y] for (at, x), (_, y) in zip(row["by_position"], base["by_position"], strict=True)]
            axis.plot(*zip(*above, strict=True), **style, label=", ".join(_named(row)[1:3]))
        axis.axhline(0, **GREY)
        axis.set_xscale("log", base=2)
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.set_title(model)
        axis.set_xlabel("position in the text (tokens)")
        axis.set_ylabel("nats a token above float32")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    figure.savefig(path, dpi=120, format="png")

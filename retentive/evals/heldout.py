"""Held-out text token by token: bits per byte, loss by position in the context, and how well a model recalls.

A token is *recalled* where the pair of it and the token before stands earlier in the same context, and is rare in the
training text: it can be known from the context alone. This is the associative-recall slice of Arora et al. (Zoology,
arXiv 2312.04927), where most of the gap between attention and models with a state of constant size lies.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from retentive.data.loader import Batch, first_tokens, held_out, held_out_bytes
from retentive.data.tokenizer import Tokenizer
from retentive.models import Model

ROWS = 8
"""Windows that go through the model at once."""
RARE = 1e-6
"""A pair is rare if it makes up no more of the training text."""
MOST = 100_000_000
"""Tokens of training text, from its beginning, whose pairs are counted."""
STRETCH = 1024
"""Tokens whose logits exist at a time."""


class Tokens(NamedTuple):
    """Every predicted token of the held-out text, in order."""

    losses: np.ndarray
    """Nats, float64 `[n]`."""
    ids: np.ndarray
    """int64 `[n]`."""
    before: np.ndarray
    """The token before each."""
    context: np.ndarray
    """Which context each lies in; contexts end with the window and with the document."""
    position: np.ndarray
    """Tokens of its context before each, from 1."""


@torch.no_grad()
def read(model: Model, data: str | Path, *, length: int, tokens: int | None = None) -> Tokens:
    """The losses of the first `tokens` held-out tokens (all by default) in windows of `length`."""
    training, device = model.training, model.device
    model.eval()
    parts: list[tuple[np.ndarray, ...]] = []
    contexts = 0
    for batch in _in_rows(held_out(data, length=length, tokens=tokens)):
        assert batch.cu_seqlens is not None
        x, _ = model.hidden(batch.ids.to(device), cu_seqlens=batch.cu_seqlens.to(device))
        losses = [
            F.cross_entropy(model.head(y).float(), target.to(device), reduction="none").double().cpu()
            for y, target in zip(x[0].split(STRETCH), batch.targets[0].split(STRETCH), strict=True)
        ]
        counts = batch.cu_seqlens.diff()
        context = torch.arange(len(counts)).repeat_interleave(counts) + contexts
        position = torch.cat([torch.arange(1, int(n) + 1) for n in counts])
        columns = (torch.cat(losses), batch.targets[0], batch.ids[0], context, position)
        parts.append(tuple(x.numpy() for x in columns))
        contexts += len(counts)
    model.train(training)
    return Tokens(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _in_rows(windows: Iterator[Batch]) -> Iterator[Batch]:
    """Several windows in one row."""
    held: list[Batch] = []
    for window in windows:
        held.append(window)
        if len(held) == ROWS:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(windows: list[Batch]) -> Batch:
    counts = [w.cu_seqlens.diff() for w in windows if w.cu_seqlens is not None]
    cu_seqlens = F.pad(torch.cat(counts).cumsum(0, dtype=torch.int32), (1, 0))
    ids, targets = (torch.cat([getattr(w, name) for w in windows], 1) for name in ("ids", "targets"))
    return Batch(ids, targets, cu_seqlens, None)


class Pairs:
    """How often each pair of neighbouring tokens stands in the training text."""

    def __init__(self, data: str | Path, vocab_size: int):
        ids = first_tokens(data, "train", MOST)
        self._vocab_size = vocab_size
        self._codes, self._counts = np.unique(self.codes(ids[:-1], ids[1:]), return_counts=True)
        self.most = max(1, int(RARE * len(ids)))
        """A pair that stands there more often is not rare."""

    def codes(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """A number for each pair."""
        return before * self._vocab_size + ids

    def rare(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """bool `[n]`"""
        codes = self.codes(before, ids)
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[at] == codes, self._counts[at], 0) <= self.most


def recalled(tokens: Tokens, pairs: Pairs) -> np.ndarray:
    """bool `[n]`: the pair stands earlier in the same context, and is rare in the training text."""
    codes = np.stack([tokens.context, pairs.codes(tokens.before, tokens.ids)], 1)
    _, first = np.unique(codes, axis=0, return_index=True)
    seen = np.ones(len(codes), bool)
    seen[first] = False
    return seen & pairs.rare(tokens.before, tokens.ids)


def report(model: Model, data: str | Path, tokenizer: Tokenizer, pairs: Pairs, *, length: int) -> dict[str, Any]:
    """Bits per byte, nats per token of those that are recalled and of the others, nats per token by position."""
    tokens = read(model, data, length=length)
    nbytes, recall = held_out_bytes(data, tokenizer), recalled(tokens, pairs)
    spans = [2**n for n in range(int(math.log2(length)) + 1)]
    by_position = []
    for begin in spans:
        inside = (tokens.position >= begin) & (tokens.position < 2 * begin)
        if inside.any():
            by_position.append([begin, float(tokens.losses[inside].mean())])
    return {
        "bits_per_byte": float(tokens.losses.sum()) / math.log(2) / nbytes,
        "loss": float(tokens.losses.mean()),
        "held_out_tokens": len(tokens.losses),
        "held_out_bytes": nbytes,
        "recalled": _mean(tokens.losses[recall]),
        "others": _mean(tokens.losses[~recall]),
        "by_position": by_position,
    }


def _mean(losses: np.ndarray) -> dict[str, Any]:
    return {"tokens": len(losses), "loss": float(losses.mean()) if len(losses) else None}

"""Held-out text token by token: bits per byte, loss by position in the context, and how well a model recalls.

A token is *recalled* where the pair of it and the token before stands earlier in the same context, and is rare in the
training text: it can be known from the context alone. This is the associative-recall slice of Arora et al. (Zoology,
arXiv 2312.04927), where most of the gap between attention and models with a state of constant size lies.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retentive.data.loader import Batch
from retentive.data.packed import Packed
from retentive.models import Model
from retentive.models.carry import states_in, states_out

TOGETHER = 8192
"""Tokens that go through the model at once: as many windows as they hold, one at least."""
RARE = 1e-6
"""A pair is rare if it makes up no more of the training text."""
MOST = 100_000_000
"""Tokens of training text, from its beginning, whose pairs are counted."""
CHUNK = 1024
"""Tokens whose logits exist at a time."""


class HeldOut(NamedTuple):
    """What the held-out text costs a model."""

    loss: float
    """Nats per predicted token."""
    bits_per_byte: float
    """All bits over all bytes of the text: comparable between tokenizers, and with a compressor."""
    tokens: int
    """How many were predicted."""
    bytes: int
    """Of their text."""


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


def held_out_loss(
    model: Model, data: Packed, *, length: int, tokens: int | None = None, carry: bool = False
) -> HeldOut:
    """The loss on the first `tokens` held-out tokens (all by default); arguments as for `token_losses`."""
    return _summed(token_losses(model, data, length=length, tokens=tokens, carry=carry), data.held_out_bytes(tokens))


def _summed(tokens: Tokens, nbytes: int) -> HeldOut:
    total, count = float(tokens.losses.sum()), len(tokens.losses)
    return HeldOut(total / max(count, 1), total / math.log(2) / max(nbytes, 1), count, nbytes)


@torch.no_grad()
def token_losses(model: Model, data: Packed, *, length: int, tokens: int | None = None, carry: bool = False) -> Tokens:
    """The losses of the first `tokens` held-out tokens (all by default) in windows of `length`.

    A window knows nothing of the one before it unless `carry` hands the state on (which needs one of constant size),
    and no document of the one before. All tokens but the very first are predicted.
    """
    training, device = model.training, model.device
    model.eval()
    parts: list[tuple[np.ndarray, ...]] = []
    contexts, before, state = 0, 0, None
    windows = data.held_out(length=length, tokens=tokens)
    for batch in windows if carry else _several(windows, TOGETHER // length):
        assert batch.cu_seqlens is not None
        counts = batch.cu_seqlens.diff()
        # A window that begins with an end of text goes on from no document.
        goes_on = int(carry and state is not None and int(batch.ids[0, 0]) != data.meta.eos_id)
        if carry:
            first, continues = torch.tensor([0], device=device), torch.tensor([bool(goes_on)], device=device)
            state = states_in(model, state, first, continues, len(counts))
        x, state = model.hidden(batch.ids.to(device), state, cu_seqlens=batch.cu_seqlens.to(device))
        context = torch.arange(len(counts)).repeat_interleave(counts) + contexts - goes_on
        position = torch.cat([torch.arange(1, int(n) + 1) for n in counts])
        position[: int(counts[0])] += before * goes_on
        columns = (_losses(model, x[0], batch.targets[0]), batch.targets[0], batch.ids[0], context, position)
        parts.append(tuple(column.numpy() for column in columns))
        contexts, before = int(context[-1]) + 1, int(position[-1])
        state = states_out(state, torch.tensor([len(counts) - 1])) if carry else None
    model.train(training)
    return Tokens(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _losses(model: Model, x: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, float64 `[T]` on the CPU; the logits are made a chunk at a time."""
    losses = []
    for y, target in zip(x.split(CHUNK), targets.to(x.device).split(CHUNK), strict=True):
        logits = model.head(y)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, target, reduction="none").double().cpu())
    return torch.cat(losses)


def _several(windows: Iterator[Batch], count: int) -> Iterator[Batch]:
    """`count` windows in a row, one at least, each a sequence of its own still."""
    held: list[Batch] = []
    for window in windows:
        held.append(window)
        if len(held) >= count:
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

    def __init__(self, data: Packed):
        ids = data.first_tokens("train", MOST)
        self._vocab_size = data.meta.vocab_size
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


def report(model: Model, data: Packed, pairs: Pairs, *, length: int) -> dict[str, Any]:
    """Bits per byte, nats per token of those that are recalled and of the others, nats per token by position."""
    tokens = token_losses(model, data, length=length)
    found, recall = _summed(tokens, data.held_out_bytes()), recalled(tokens, pairs)
    begins = [2**n for n in range(int(math.log2(length)) + 1)]
    by_position = []
    for begin in begins:
        inside = (tokens.position >= begin) & (tokens.position < 2 * begin)
        if inside.any():
            by_position.append([begin, float(tokens.losses[inside].mean())])
    return {
        "bits_per_byte": found.bits_per_byte,
        "loss": found.loss,
        "held_out_tokens": found.tokens,
        "held_out_bytes": found.bytes,
        "recalled": _mean(tokens.losses[recall]),
        "others": _mean(tokens.losses[~recall]),
        "by_position": by_position,
    }


def _mean(losses: np.ndarray) -> dict[str, Any]:
    return {"tokens": len(losses), "loss": float(losses.mean()) if len(losses) else None}

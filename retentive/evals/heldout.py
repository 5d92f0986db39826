"""Held-out loss token by token: bits per byte, loss by position in the context, and recall.

A token is *recalled* if it and the token before it, as a pair, occur earlier in the same context and are rare in the
training text, so that only the context can have told it. This is the associative-recall slice of Arora et al. (Zoology,
arXiv 2312.04927), which holds most of the gap between attention and models with a state of constant size.
"""

import lzma
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retentive.data.loader import Batch
from retentive.data.mixture import Mixture
from retentive.data.packed import Packed
from retentive.evals.likelihood import in_eval_mode
from retentive.models import LanguageModel
from retentive.models.carry import states_in, states_out
from retentive.models.encoders import embedded
from retentive.ops.cross_entropy import IGNORE

TOGETHER = 8192
"""Tokens that go through the model at once: as many whole windows as fit, at least one."""
RARE = 1e-6
"""A pair is rare if it makes up no more than this share of the pairs in the training text."""
MOST = 100_000_000
"""Maximum training tokens, from the start, whose pairs are counted."""
CHUNK = 1024
"""Number of tokens whose logits are in memory at a time."""
YARDSTICKS = ("order-0 entropy", "xz -9")
"""Baselines in bits per byte without a model: entropy of the bytes' frequencies, and xz at its strongest."""


class HeldOut(NamedTuple):
    """A model's held-out loss."""

    loss: float
    """Nats per predicted token."""
    bits_per_byte: float
    """All bits over all bytes of the text: comparable across tokenizers, and with compressors."""
    tokens: int
    """Number of predicted tokens."""
    bytes: int
    """UTF-8 bytes of their text."""
    parts: dict[str, Any] | None = None
    """For a mixture: the HeldOut of each part, by name."""

    def exhausted(self, asked: int) -> bool:
        """True if the text has fewer than `asked` tokens; n tokens give n - 1 predictions."""
        if self.parts:
            return all(part.exhausted(share_of_each(asked, len(self.parts))) for part in self.parts.values())
        return self.tokens < asked - 1


class Tokens(NamedTuple):
    """All predicted tokens of the held-out text, in order; one array `[n]` per property."""

    losses: np.ndarray
    """Losses in nats, float64."""
    ids: np.ndarray
    """Predicted token ids, int64."""
    before: np.ndarray
    """Token before each, int64."""
    context: np.ndarray
    """Number of each token's context; a context ends with its window or document."""
    position: np.ndarray
    """Number of tokens before each within its context; at least 1."""


def held_out_loss(
    model: LanguageModel, data: Packed, *, length: int, tokens: int | None = None, carry: bool = False
) -> HeldOut:
    """Returns the mean loss on the first `tokens` held-out tokens (default: all); arguments as for `token_losses`."""
    return summed(token_losses(model, data, length=length, tokens=tokens, carry=carry), data.held_out_bytes(tokens))


def mixture_loss(model: LanguageModel, data: Mixture, *, length: int, tokens: int, carry: bool = False) -> HeldOut:
    """Returns the held-out loss weighted as the training mixture, and each part's; arguments as for `held_out_loss`.

    All parts with held-out text are read equally far, and weighted by their shares.
    """
    found = data.held_out_parts(length)
    each = share_of_each(tokens, len(found))
    parts = {name: held_out_loss(model, part, length=length, tokens=each, carry=carry) for name, part in found.items()}
    share = {name: data.shares[name] / sum(data.shares[name] for name in found) for name in found}
    loss = sum(share[name] * part.loss for name, part in parts.items())
    size = sum(share[name] * part.bytes / max(part.tokens, 1) for name, part in parts.items())  # bytes per token
    count, nbytes = sum(part.tokens for part in parts.values()), sum(part.bytes for part in parts.values())
    return HeldOut(loss, loss / math.log(2) / max(size, 1e-9), count, nbytes, parts)


def share_of_each(tokens: int, parts: int) -> int:
    """Returns the tokens to read from each part of a mixture, for a total of `tokens`."""
    return max(tokens // parts, 2)


def summed(tokens: Tokens, nbytes: int) -> HeldOut:
    """Returns the mean loss of these tokens, whose text has `nbytes` bytes."""
    total, count = float(tokens.losses.sum()), len(tokens.losses)  # count is 0 for a held-out text of one token
    return HeldOut(total / max(count, 1), total / math.log(2) / max(nbytes, 1), count, nbytes)


@torch.no_grad()
def token_losses(
    model: LanguageModel, data: Packed, *, length: int, tokens: int | None = None, carry: bool = False
) -> Tokens:
    """Returns the losses of the first `tokens` held-out tokens (default: all) in windows of `length`.

    Each window starts with a blank state, or with `carry` continues the state of the one before (which needs a state of
    constant size). A new document always starts with a blank state. All tokens but the very first are predicted. Of
    conversations, which are read whole, only the answers are.
    """
    with in_eval_mode(model):
        return _token_losses(model, data, length, tokens, carry)


def _token_losses(model: LanguageModel, data: Packed, length: int, tokens: int | None, carry: bool) -> Tokens:
    device = model.device
    parts: list[tuple[np.ndarray, ...]] = []
    # number of contexts so far, tokens of the last one, and the state passed on by `carry`
    contexts, before, state = 0, 0, None
    windows, carry = data.held_out(length=length, tokens=tokens), carry and not data.meta.chats
    for batch in windows if carry else _several(windows):
        assert batch.cu_seqlens is not None
        counts = batch.cu_seqlens.diff()  # tokens of each document (or part of one) in the batch
        # a window that starts with an end-of-text token starts a document, and does not continue the state
        goes_on = int(carry and state is not None and int(batch.ids[0, 0]) != data.meta.eos_id)
        if carry:
            first, continues = torch.tensor([0], device=device), torch.tensor([bool(goes_on)], device=device)
            state = states_in(model, state, first, continues, len(counts))
        there = batch.to(device)
        embeds = embedded(model, there.ids, there.rows)
        x, state = model.hidden(there.ids, state, embeds=embeds, cu_seqlens=there.cu_seqlens)
        # a first part that continues the last context has its number, and later positions
        context = torch.arange(len(counts)).repeat_interleave(counts) + contexts - goes_on
        position = torch.cat([torch.arange(1, int(n) + 1) for n in counts])
        position[: int(counts[0])] += before * goes_on
        wanted = batch.targets[0] != IGNORE
        columns = (batch.targets[0], batch.ids[0], context, position)
        losses = _losses(model, x[0, wanted.to(device)], batch.targets[0, wanted])
        parts.append((losses.numpy(), *(column[wanted].numpy() for column in columns)))
        contexts, before = int(context[-1]) + 1, int(position[-1])
        state = states_out(state, torch.tensor([len(counts) - 1])) if carry else None  # of the last document
    return Tokens(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _losses(model: LanguageModel, x: Tensor, targets: Tensor) -> Tensor:
    """Returns the nats of each target, float64 `[T]` on the CPU, from hidden states x `[T,D]`; one chunk at a time."""
    losses = []
    for y, target in zip(x.split(CHUNK), targets.to(x.device).split(CHUNK), strict=True):
        logits = model.head(y)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 is too coarse for the softmax
        losses.append(F.cross_entropy(logits, target, reduction="none").double().cpu())
    return torch.cat(losses)


def _several(windows: Iterator[Batch]) -> Iterator[Batch]:
    """Packs windows into rows of at most TOGETHER tokens (or one window); each stays a sequence of its own."""
    held: list[Batch] = []
    for window in windows:
        if held and sum(w.ids.numel() for w in (*held, window)) > TOGETHER:
            yield _joined(held)
            held = []
        held.append(window)
    if held:
        yield _joined(held)


def _joined(windows: list[Batch]) -> Batch:
    counts = [w.cu_seqlens.diff() for w in windows if w.cu_seqlens is not None]
    cu_seqlens = F.pad(torch.cat(counts).cumsum(0, dtype=torch.int32), (1, 0))
    ids, targets = (torch.cat([getattr(w, name) for w in windows], 1) for name in ("ids", "targets"))
    rows = [w.rows for w in windows if w.rows is not None]
    joined = {kind: torch.cat([each[kind] for each in rows]) for kind in rows[0]} if rows else None
    return Batch(ids, targets, cu_seqlens, None, joined)


class Pairs:
    """Counts of each pair of neighbouring tokens (bigram) in the training text."""

    def __init__(self, data: Packed):
        ids = data.first_tokens("train", MOST)
        self._vocab_size = data.meta.vocab_size
        self._codes, self._counts = np.unique(self.codes(ids[:-1], ids[1:]), return_counts=True)
        self.most = max(1, int(RARE * len(ids)))
        """Maximum count of a rare pair."""

    def codes(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Returns one number per pair: int64 sorts and compares faster than two columns."""
        return before * self._vocab_size + ids

    def rare(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Returns True for each pair that is rare in the training text, bool `[n]`."""
        codes = self.codes(before, ids)
        # binary search; a code beyond the last is clipped to it, and then compares unequal
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[at] == codes, self._counts[at], 0) <= self.most


def recalled(tokens: Tokens, pairs: Pairs) -> np.ndarray:
    """Returns True for each recalled token, bool `[n]`: its pair is in its context before, and rare in training."""
    codes = np.stack([tokens.context, pairs.codes(tokens.before, tokens.ids)], 1)
    # every occurrence of a (context, pair) but the first was seen before
    _, first = np.unique(codes, axis=0, return_index=True)
    seen = np.ones(len(codes), bool)
    seen[first] = False
    return seen & pairs.rare(tokens.before, tokens.ids)


def report(model: LanguageModel, data: Packed, pairs: Pairs, *, length: int) -> dict[str, Any]:
    """Returns the held-out loss in bits per byte and nats per token, of recalled and other tokens, and by position.

    Positions are grouped by powers of two.
    """
    tokens = token_losses(model, data, length=length)
    found, recall = summed(tokens, data.held_out_bytes()), recalled(tokens, pairs)
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
    """Returns the number and mean loss of some tokens; the mean of none is None."""
    return {"tokens": len(losses), "loss": float(losses.mean()) if len(losses) else None}


def yardsticks(data: Packed) -> dict[str, float]:
    """Computes `YARDSTICKS` of the held-out text in bits per byte, and its length as "bytes"."""
    raw = "".join(data.tokenizer.decode(b.ids[0].tolist()) for b in data.held_out(length=1 << 20)).encode()
    counts = Counter(raw)
    entropy = -sum(n / len(raw) * math.log2(n / len(raw)) for n in counts.values())
    return {"order-0 entropy": entropy, "xz -9": 8 * len(lzma.compress(raw, preset=9)) / len(raw), "bytes": len(raw)}

"""Held-out loss, in bits per byte: comparable between tokenizers, and with a compressor."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retentive.data.loader import Lanes, held_out, held_out_bytes
from retentive.data.tokenizer import Tokenizer
from retentive.models import Model
from retentive.ops.cross_entropy import cross_entropy
from retentive.train.lanes import lanes_in, lanes_out


class HeldOut(NamedTuple):
    loss: float
    """Nats per predicted token."""
    bits_per_byte: float
    """All bits over all bytes of the text."""
    tokens: int
    bytes: int


def evaluate(
    model: Model,
    data: str | Path,
    tokenizer: Tokenizer,
    *,
    length: int,
    tokens: int | None = None,
    carry: bool = False,
) -> HeldOut:
    """The loss on the first `tokens` held-out tokens (all by default), in windows of `length`.

    A window knows nothing of the one before it unless `carry` hands the state on (which needs one of constant size),
    and no document of the one before. All tokens but the very first are predicted.
    """
    device = model.device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    carried: Any = None
    with torch.no_grad():
        for batch in held_out(data, length=length, tokens=tokens):
            ids, targets, cu_seqlens = batch.ids.to(device), batch.targets.to(device), batch.cu_seqlens.to(device)
            N = len(cu_seqlens) - 1
            state: Any = None
            if carry:
                goes_on = carried is not None and int(ids[0, 0]) != tokenizer.eos_id
                lanes = Lanes(torch.tensor([0]), torch.tensor([N - 1]), torch.tensor([goes_on]))
                state = lanes_in(model, carried, lanes, N)
            x, state = model.hidden(ids, state, cu_seqlens=cu_seqlens)
            if carry:
                carried = lanes_out(state, lanes)
            total += float(cross_entropy(x, model.head.weight, targets))
            count += targets.numel()
    model.train(training)
    size = held_out_bytes(data, tokenizer, tokens)
    return HeldOut(total / max(count, 1), total / math.log(2) / max(size, 1), count, size)

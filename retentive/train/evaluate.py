"""Held-out loss, in bits per byte: comparable between tokenizers, and with a compressor."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from retentive.data.loader import held_out, held_out_bytes
from retentive.data.tokenizer import Tokenizer
from retentive.train.loss import IGNORE, cross_entropy


class HeldOut(NamedTuple):
    loss: float
    """Nats per predicted token."""
    bits_per_byte: float
    """All bits over all bytes of the text."""
    tokens: int
    bytes: int


def evaluate(
    model: nn.Module, data: str | Path, tokenizer: Tokenizer, *, length: int, tokens: int | None = None
) -> HeldOut:
    """The loss on the first `tokens` held-out tokens (all by default), in windows of `length`.

    A window knows nothing of the one before it, and no document of the one before. A document's first token is never
    predicted but counts with its bytes, so the figure is a little too good by about one token a document.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in held_out(data, length=length, tokens=tokens):
            cu = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
            x, _ = model.hidden(batch.ids.to(device), cu_seqlens=cu)
            total += float(cross_entropy(x, model.head.weight, batch.targets.to(device)))
            count += int((batch.targets != IGNORE).sum())
    model.train(training)
    size = held_out_bytes(data, tokenizer, tokens)
    return HeldOut(total / max(count, 1), total / math.log(2) / max(size, 1), count, size)

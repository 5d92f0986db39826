"""Embeddings of texts: hidden states after the last norm, one vector a text.

embed(model, tokenizer, ["a cat", "a dog"])                    the mean of the tokens' states
embed(model, tokenizer, ["a cat", "a dog"], pooling="last")    the last token's, which has read the whole text
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from retentive.data.tokenizer import Tokenizer
from retentive.infer.sample import NOT_FINITE
from retentive.models import LanguageModel
from retentive.options import check_type, option

Pooling = Literal["mean", "last"]
BUDGET = 8192
"""Maximum tokens of a batch, padding included."""
CHUNK = 4096
"""Tokens of one text read at once."""


@torch.no_grad()
def embed(model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], *, pooling: Pooling = "mean") -> Tensor:
    """Returns vectors of length 1, float32 `[N,D]`. Each text follows an end-of-text token, which is not counted.

    Args:
        pooling: "mean" of all tokens' hidden states, or the "last" one.

    Raises:
        ValueError: no texts, an empty text, or an unknown pooling.
        ArithmeticError: the model's output is not finite.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"{option('pooling', pooling)}: expected one of {', '.join(get_args(Pooling))}")
    if isinstance(texts, str) or not texts:
        raise ValueError("`texts` must be a list of texts, one or more")
    for text in texts:
        check_type("a text", text, str)
        if not text:
            raise ValueError("a text to embed is empty")
    ids = [[tokenizer.eos_id, *each] for each in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    found = torch.empty(len(ids), model.config.dim)
    while order:
        count = 1
        while count < len(order) and (count + 1) * len(ids[order[count]]) <= BUDGET:
            count += 1
        batch, order = order[:count], order[count:]
        found[batch] = _pooled(model, [ids[n] for n in batch], pooling)
    if not bool(found.isfinite().all()):
        raise ArithmeticError(NOT_FINITE)
    return torch.nn.functional.normalize(found, dim=-1)


def _pooled(model: LanguageModel, rows: list[list[int]], pooling: Pooling) -> Tensor:
    """Returns `[B,D]` of rows that are padded on the right, in chunks."""
    longest = max(map(len, rows))
    counts = torch.tensor([len(row) for row in rows])
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    total, state = torch.zeros(len(rows), model.config.dim), None
    for begin in range(0, longest, CHUNK):
        part = padded[:, begin : begin + CHUNK].to(model.device)
        real = (counts - begin).clamp(0, part.shape[1])
        lengths = torch.stack((torch.zeros_like(real), real), 1).to(model.device)
        x, state = model.hidden(part, state, lengths=lengths)
        at = begin + torch.arange(part.shape[1])
        counted = (at > 0) & (at < counts[:, None]) if pooling == "mean" else at == counts[:, None] - 1
        total += torch.where(counted[..., None], x.float().cpu(), 0.0).sum(1)
    return total / (counts - 1)[:, None] if pooling == "mean" else total

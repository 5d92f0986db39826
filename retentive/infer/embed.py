"""Embeddings of texts: hidden states after the last norm, one vector a text.

embed(model, tokenizer, ["a cat", "a dog"])                    the mean of the tokens' states
embed(model, tokenizer, ["a cat", "a dog"], pooling="last")    the last token's, which has read the whole text
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from retentive.data.tokenizer import Tokenizer
from retentive.infer.sample import NOT_FINITE
from retentive.models import LanguageModel
from retentive.options import check_type, option

Pooling = Literal["mean", "last"]
CHUNK = 4096
"""Tokens read at once: of several texts, packed, or of a part of a longer one."""


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
    return embed_ids(model, [[tokenizer.eos_id, *each] for each in tokenizer.encode_batch(list(texts))], pooling)


@torch.no_grad()
def embed_ids(model: LanguageModel, texts: Sequence[list[int]], pooling: Pooling) -> Tensor:
    """As `embed`, of texts as ids, each after an end-of-text token."""
    vectors = torch.stack([vector for group in _groups(texts) for vector in _pooled(model, group, pooling)])
    if not bool(vectors.isfinite().all()):
        raise ArithmeticError(NOT_FINITE)
    return torch.nn.functional.normalize(vectors, dim=-1)


def _groups(texts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Yields consecutive texts that are read in one call; a text longer than that is a group by itself."""
    group: list[list[int]] = []
    for ids in texts:
        if group and sum(map(len, group)) + len(ids) > CHUNK:
            yield group
            group = []
        group.append(ids)
    yield group


def _pooled(model: LanguageModel, texts: list[list[int]], pooling: Pooling) -> Iterator[Tensor]:
    """Yields a vector `[D]` for each text of a group."""
    if len(texts) > 1:
        borders = [0, *accumulate(map(len, texts))]
        packed = torch.tensor([[id for ids in texts for id in ids]], device=model.device)
        x, _ = model.hidden(packed, cu_seqlens=torch.tensor(borders, device=model.device))
        for a, b in pairwise(borders):
            yield (x[0, a + 1 : b].float().mean(0) if pooling == "mean" else x[0, b - 1].float()).cpu()
        return
    [ids], total, state = texts, torch.zeros(model.config.dim), None
    for begin in range(0, len(ids), CHUNK):
        x, state = model.hidden(torch.tensor([ids[begin : begin + CHUNK]], device=model.device), state)
        total += x[0, int(not begin) :].float().sum(0).cpu()  # without the end of text before it
    yield total / (len(ids) - 1) if pooling == "mean" else x[0, -1].float().cpu()

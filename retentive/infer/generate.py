"""Generation, one sequence at a time: the prompt in chunks, then token by token, from a state that does not grow.

This is the plain loop; whatever is faster must give the same tokens.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from retentive.data.tokenizer import Tokenizer
from retentive.infer.sample import Sampler, SamplingParams
from retentive.models.state import State


class Token(NamedTuple):
    id: int
    logprob: float
    """Natural log of its probability under the model, before temperature and filters."""


@torch.inference_mode()
def prefill(model: nn.Module, ids: Tensor, state: State | None = None, *, stretch: int = 4096) -> tuple[Tensor, State]:
    """(logits `[1, vocab]` after the last of `ids` `[1,T]`, state), reading `stretch` tokens at a time.

    Only the last token's logits are computed, and memory does not grow with the prompt beyond the stretch (and, for the
    Transformer, its cache).
    """
    for part in ids.split(stretch, 1):
        x, state = model.hidden(part, state)
    return model.head(x[:, -1]), state


def generate(
    model: nn.Module,
    ids: Sequence[int] | Tensor,
    params: SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    stop_ids: Sequence[int] = (),
    state: State | None = None,
) -> Iterator[Token]:
    """Tokens after `ids`, as they come, until one of `stop_ids` (which is not given out) or `max_tokens`.

    Args:
        ids: the prompt, at least one token.
        params: how to pick; the defaults sample from the model's own distribution.
        state: what the model has read before the prompt; used up.

    Raises:
        ValueError: an empty prompt, or ids outside the vocabulary.
    """
    device = model.embed.weight.device
    vocab = model.config.vocab_size
    prompt = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    if prompt.numel() == 0:
        raise ValueError("generation needs at least one token to begin from, got an empty prompt")
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab:
        raise ValueError(f"token ids must be in [0, {vocab}), got {int(prompt.min())} to {int(prompt.max())}")
    return _tokens(model, prompt.to(device), params or SamplingParams(), max_tokens, frozenset(stop_ids), state)


def _tokens(model, prompt, params, max_tokens, stop_ids, state) -> Iterator[Token]:
    sampler = Sampler(params, prompt, model.config.vocab_size)
    logits, state = prefill(model, prompt, state)
    made = 0
    while max_tokens is None or made < max_tokens:
        token, logprob = sampler(logits[0])
        if token in stop_ids:
            return
        yield Token(token, logprob)
        made += 1
        if made != max_tokens:
            logits, state = prefill(model, torch.tensor([[token]], device=prompt.device), state)


def stream_text(tokens: Iterator[Token], tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of `tokens` in whole characters, up to the first of the `stop` strings, which is left out.

    Text that could be the beginning of a stop string is held back until it is known not to be.
    """
    if any(not s for s in stop):
        raise ValueError("a stop string must not be empty")
    decoder, held = tokenizer.stream(), ""
    for token in tokens:
        held += decoder.push(token.id)
        cut = min((held.find(s) for s in stop if s in held), default=-1)
        if cut >= 0:
            yield held[:cut]
            return
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    held += decoder.flush()
    cut = min((held.find(s) for s in stop if s in held), default=len(held))
    if held[:cut]:
        yield held[:cut]

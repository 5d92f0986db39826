"""Generation of one sequence: prefill of the prompt in chunks, then decoding token by token.

This is the plain loop and the reference: the engine and speculative decoding must give the same tokens. It handles ids
only; `text.py` handles text.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retentive.data.media import Rows
from retentive.infer.placeholders import Placeholders, embeddings
from retentive.infer.sample import Sampler, SamplingParams
from retentive.models import LanguageModel, cost
from retentive.models.encoders import encoders_of, inserted
from retentive.models.state import State
from retentive.threads import threads_for


class Token(NamedTuple):
    id: int
    logprob: float
    """Natural log of the token's probability under the model, before temperature and filters."""
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest tokens and their log probabilities, if requested."""


def step_threads(model: LanguageModel, tokens: int, state: Any) -> AbstractContextManager:
    """Context with as many threads as reading `tokens` tokens after `state` is worth."""
    if model.own_threads:
        return nullcontext()
    # reading a position on a GPU would wait for the GPU
    context = 0 if state is None or model.device.type != "cpu" else int(state.position.max())
    return threads_for(cost.multiply_adds(model.config, tokens, context))


@torch.no_grad()
def prefill(
    model: LanguageModel, ids: Tensor, state: Any = None, *, rows: Rows | None = None, chunk: int = 4096
) -> tuple[Tensor, Any]:
    """Read `ids` `[1,T]`, `chunk` tokens at a time; returns (logits `[1, vocab]` after the last, state).

    Activations take the memory of one chunk (and one picture) at any prompt length. A Transformer's cache grows with
    the prompt.

    Args:
        rows: rows of pictures and sound, per kind for all its placeholders among the ids.

    Raises:
        ValueError: the model keeps no state (another library's), or rows do not fit (`Placeholders`).
    """
    if not model.keeps_state:
        raise ValueError(f"{model.config.kind} has no state here: it can be trained and scored, not decoded")
    placeholders, encoders = placeholders_of(model, ids, rows), encoders_of(model)
    for begin in range(0, ids.shape[1], chunk):
        part = ids[:, begin : begin + chunk]
        with step_threads(model, part.numel(), state):
            span = (placeholders, begin, begin + part.shape[1])
            encoded = embeddings([span], lambda kind, rows: encoders[kind](rows.to(model.device)))
            embeds = inserted(model, part, encoded) if encoded else None
            x, state = model.hidden(part, state, embeds=embeds)
            logits = model.head(x[:, -1])  # after the last token only: all logits would be [T, vocab]
    return logits, state


def placeholders_of(model: LanguageModel, ids: Sequence[int] | Tensor, rows: Rows | None) -> Placeholders | None:
    """Placeholders of pictures and sound among the ids of a prompt; None without rows."""
    configs = {kind: encoder.config for kind, encoder in encoders_of(model).items()}
    return Placeholders(torch.as_tensor(ids).flatten().tolist(), rows, configs) if rows else None


def generate(
    model: LanguageModel,
    ids: Sequence[int] | Tensor,
    params: SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    rows: Rows | None = None,
    stop_ids: Sequence[int] = (),
    first_ids: Sequence[int] | None = None,
    state: State | None = None,
) -> Iterator[Token]:
    """Generate tokens after `ids` until one of `stop_ids` (which is not returned) or `max_tokens`.

    Args:
        ids: the prompt, at least one token.
        params: sampling parameters; the defaults sample from the model's own distribution.
        rows: rows of pictures and sound, per kind for all its placeholders among `ids`.
        first_ids: tokens allowed as the first one; all if not given.
        state: state before the prompt; consumed.

    Raises:
        ValueError: the prompt is empty, has ids outside the vocabulary, or rows that do not fit. Raised at the call,
            not at the first token.
        TypeError: the ids are no integers.
        ArithmeticError: the model's logits are not finite.
    """
    # the loop is a separate generator, which would not raise before its first `next`
    prompt, params = checked(model, ids, rows), params or SamplingParams()
    return _tokens(model, prompt, rows, params, max_tokens, frozenset(stop_ids), first_ids, state)


def checked(model: LanguageModel, ids: Sequence[int] | Tensor, rows: Rows | None = None) -> Tensor:
    """Check a prompt and return it as int64 `[1,T]` on the model's device.

    Raises:
        TypeError: the ids are no integers.
        ValueError: as `check_prompt` and `Placeholders`.
    """
    given = torch.as_tensor(ids)
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise TypeError(f"token ids must be integers, got {str(given.dtype).removeprefix('torch.')}")
    prompt = given.long().reshape(1, -1)
    check_prompt(prompt[0].tolist(), model.config.vocab_size, placeholders_of(model, prompt, rows))
    return prompt.to(model.device)


def check_prompt(ids: Sequence[int], vocab: int, placeholders: Placeholders | None = None) -> None:
    """Raise ValueError for an empty prompt, or ids outside the vocabulary that are no placeholders."""
    if not ids:
        raise ValueError("generation needs at least one token to begin from, got an empty prompt")
    text = ids if placeholders is None else [id for id in ids if id not in placeholders.tokens] or [0]
    if min(text) < 0 or max(text) >= vocab:
        bad = next(id for id in text if not 0 <= id < vocab)
        raise ValueError(f"token ids must be from 0 to {vocab - 1}, got {bad}")


def _tokens(model, prompt, rows, params, max_tokens, stop_ids, first_ids, state) -> Iterator[Token]:
    """Loop of `generate`."""
    sampler = Sampler(params, prompt, model.config.vocab_size, stop_ids)
    logits, state = prefill(model, prompt, state, rows=rows)
    made = 0
    while max_tokens is None or made < max_tokens:
        token, logprob = sampler(logits[0], first_ids if made == 0 else None)
        if token in stop_ids:
            return
        yield Token(token, logprob)
        made += 1
        if made != max_tokens:  # the last token need not be read
            logits, state = prefill(model, torch.tensor([[token]], device=prompt.device), state)

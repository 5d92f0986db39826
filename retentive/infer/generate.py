"""Generation, one sequence at a time: the prompt in chunks, then token by token, from a state that does not grow.

This is the plain loop; whatever is faster must give the same tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retentive.data.tokenizer import Tokenizer
from retentive.infer.sample import Sampler, SamplingParams
from retentive.models import Model
from retentive.models.state import State


class Token(NamedTuple):
    id: int
    logprob: float
    """Natural log of its probability under the model, before temperature and filters."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log probabilities, where they were asked for."""


@torch.no_grad()
def prefill(model: Model, ids: Tensor, state: Any = None, *, chunk: int = 4096) -> tuple[Tensor, Any]:
    """(logits `[1, vocab]` after the last of `ids` `[1,T]`, state), reading `chunk` tokens at a time.

    Only the last token's logits are computed, and memory does not grow with the prompt beyond the chunk (and, for the
    Transformer, its cache).

    Raises:
        ValueError: a model that keeps no state (another library's).
    """
    for part in ids.split(chunk, 1):
        x, state = model.hidden(part, state)
        if state is None:
            raise ValueError(f"{model.config.kind} has no state here: it can be trained and scored, not decoded")
    return model.head(x[:, -1]), state


def generate(
    model: Model,
    ids: Sequence[int] | Tensor,
    params: SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    stop_ids: Sequence[int] = (),
    first_ids: Sequence[int] | None = None,
    state: State | None = None,
) -> Iterator[Token]:
    """Tokens after `ids`, as they come, until one of `stop_ids` (which is not given out) or `max_tokens`.

    Args:
        ids: the prompt, at least one token.
        params: how to pick; the defaults sample from the model's own distribution.
        first_ids: what the first token must be one of; anything if not given.
        state: what the model has read before the prompt; used up.

    Raises:
        ValueError: an empty prompt, or ids outside the vocabulary.
    """
    prompt, params = checked(model, ids), params or SamplingParams()
    return _tokens(model, prompt, params, max_tokens, frozenset(stop_ids), first_ids, state)


def checked(model: Model, ids: Sequence[int] | Tensor) -> Tensor:
    """The prompt, `[1,T]` on the model's device.

    Raises:
        ValueError: an empty prompt, or ids outside the vocabulary.
    """
    vocab = model.config.vocab_size
    prompt = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    if prompt.numel() == 0:
        raise ValueError("generation needs at least one token to begin from, got an empty prompt")
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab:
        raise ValueError(f"token ids must be in [0, {vocab}), got {int(prompt.min())} to {int(prompt.max())}")
    return prompt.to(model.device)


def _tokens(model, prompt, params, max_tokens, stop_ids, first_ids, state) -> Iterator[Token]:
    sampler = Sampler(params, prompt, model.config.vocab_size)
    logits, state = prefill(model, prompt, state)
    made = 0
    while max_tokens is None or made < max_tokens:
        token, logprob = sampler(logits[0], first_ids if made == 0 else None)
        if token in stop_ids:
            return
        yield Token(token, logprob)
        made += 1
        if made != max_tokens:
            logits, state = prefill(model, torch.tensor([[token]], device=prompt.device), state)


class Text:
    """The text of ids that are pushed one by one, in whole characters, up to the first of the `stop` strings.

    Text that could be the beginning of a stop string is held back until it is known not to be. `stopped` says that one
    was met: it and what follows are left out. None is looked for in the first `skip` characters.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip: int = 0):
        if any(not s for s in stop):
            raise ValueError("a stop string must not be empty")
        self.decoder, self.stop, self.skip = tokenizer.stream(), tuple(stop), skip
        self.held, self.stopped = "", False

    def push(self, id: int) -> str:
        """What is known to belong to the text now, often empty."""
        return self._release(self.decoder.push(id))

    def flush(self) -> str:
        """What is left at the end."""
        piece = self._release(self.decoder.flush())
        piece, self.held = piece + self.held, ""
        return piece

    def _release(self, piece: str) -> str:
        skipped, piece = piece[: self.skip], piece[self.skip :]
        self.skip -= len(skipped)
        held = self.held + piece
        cut = min((held.find(s) for s in self.stop if s in held), default=-1)
        if cut >= 0:
            self.held, self.stopped = "", True
            return skipped + held[:cut]
        keep = max((n for s in self.stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        self.held = held[len(held) - keep :]
        return skipped + held[: len(held) - keep]


def stream_text(
    tokens: Iterator[Token], tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip: int = 0
) -> Iterator[str]:
    """The text of `tokens`, in pieces, up to the first of the `stop` strings: see Text."""
    text = Text(tokenizer, stop, skip=skip)
    for token in tokens:
        if piece := text.push(token.id):
            yield piece
        if text.stopped:
            return
    if piece := text.flush():
        yield piece


def write_on(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams | None = None,
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    state: State | None = None,
    pending: Sequence[int] = (),
    how: Callable[..., Iterator[Token]] = generate,
) -> Iterator[str]:
    """The prompt and what the model makes of it, in pieces, until its document ends or `max_tokens` or `stop` is met.

    The document begins after an end-of-text token, as documents did in training; with a `state` (used up) the prompt
    goes on from what that has read and from `pending`, ids that were picked but not read. The prompt's last token is
    taken back and chosen anew among those that begin with its text: "def " ends in a token for the space, but the model
    has learnt the space as part of the next word's token. `how` is `generate` or what is called as it is.
    """
    begin = [tokenizer.eos_id] if state is None else pending
    ids = [*begin, *tokenizer.encode(prompt)]
    tail = tokenizer.decode(ids[-1:]) if len(ids) > 1 else ""
    first_ids = None
    if tail and "\ufffd" not in tail and prompt.endswith(tail):
        texts = ((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
        first_ids = [i for i, text in texts if text.startswith(tail)]
    if first_ids is None or len(first_ids) < 2:
        first_ids, tail = None, ""
    else:
        ids, prompt, max_tokens = ids[:-1], prompt[: len(prompt) - len(tail)], max_tokens + 1
    yield prompt
    stop_ids = [tokenizer.eos_id]
    tokens = how(model, ids, params, max_tokens=max_tokens, stop_ids=stop_ids, first_ids=first_ids, state=state)
    yield from stream_text(tokens, tokenizer, stop=stop, skip=len(tail))

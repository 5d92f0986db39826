"""What goes into the engine and comes out of it: a `Stream` for the caller, a `Request` and a `Prompt` for the engine.

All three are found by identity (eq=False): two equal prompts are two requests, and comparing long ones token by token,
as a dataclass would, costs time at every `remove`.
"""

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from retentive.infer.generate import Token
from retentive.infer.placeholders import Placeholders
from retentive.infer.sample import Sampler
from retentive.models.state import State


class Full(Exception):
    """The queue has no room: try again later."""


class Constraint(Protocol):
    """Which tokens may come next, as for JSON or a regular expression. One object a stream; its errors end that one."""

    eos_id: int
    """The token that ends the text; allowed where the text may end."""

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may come: the stream then stops, as if the end had been picked."""

    def mask(self) -> Tensor:
        """Bool `[vocab]`, the tokens allowed now; a shorter mask allows none beyond its end."""

    def accept(self, token: int) -> None:
        """Take note of the token that was picked."""


def allowed(constraint: Constraint, vocab: int) -> Tensor:
    """The constraint's mask, bool `[vocab]`.

    Raises:
        ValueError: a mask that is longer, or allows nothing.
    """
    mask = constraint.mask()
    if mask.dtype != torch.bool or mask.ndim != 1 or len(mask) > vocab or not bool(mask.any()):
        raise ValueError(f"a constraint must allow some of {vocab} tokens, got {mask.dtype} {list(mask.shape)}")
    # a model may have more rows of logits than its tokenizer has tokens: those are never allowed
    return torch.nn.functional.pad(mask, (0, vocab - len(mask)))


@dataclass(frozen=True)
class Returns:
    """What a request wants beside its tokens; all of it costs something."""

    top: int = 0
    """How many of the likeliest tokens come with each token."""
    prompt: bool = False
    """Log probabilities of the prompt too; no cached state is used then, which would not have them."""
    state: bool = False
    """The state at the end is left in the stream, so that another request can go on from there."""


@dataclass(eq=False)
class Stream:
    """The tokens of one request, as they come: iterate over it. `reason` says at the end why there are no more."""

    ids: list[int]
    """The prompt."""
    cached: int = 0
    """Tokens of the prompt that a cached state had read."""
    reason: str | None = None
    """ "stop" (an id of stop_ids, not given out), "length", "cancelled" or "error"; None while it runs."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """Of prompt tokens 1, 2, …, given those before; where asked for (`Returns`)."""
    prompt_tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """The likeliest tokens at each of those positions, where both were asked for."""
    state: State | None = None
    """The state at the end, where asked for: it has read all tokens but `pending`."""
    pending: list[int] = field(default_factory=list)
    """The last token, which has been picked but not read."""
    prompt_state: State | None = None
    """State before the prompt's last token, for a prompt with pictures or sound whose last state is asked for: they
    cannot be read again from their ids where an answer is cut short."""
    cancelled: bool = False
    """Set by any thread, read by the engine's before each step."""
    deliver: Callable[[Token | Exception | None], object] | None = None
    """Called from the engine's thread with each token, an exception, or None at the end; iterate over it otherwise."""
    inbox: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[Token]:
        while (item := self.inbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        """No more tokens: its slot is free at the engine's next step."""
        self.cancelled = True


@dataclass(eq=False)
class Request:
    """What the engine knows of a stream: it waits with its prompt, then decodes in a row of the pool."""

    stream: Stream
    sampler: Sampler
    max_tokens: int | None
    stop_ids: frozenset[int]
    constraint: Constraint | None
    returns: Returns
    key: Sequence[int] | None
    """Key of the prompt in the prefix cache: its ids, with hashes of pictures and sound. None without a cache, and for
    a prompt that began from a state: what that has read is not in the ids, so nobody can look its prefixes up."""
    made: list[int] = field(default_factory=list)
    """Tokens picked so far, one of `stop_ids` at the end included."""


@dataclass(eq=False)
class Prompt:
    """A prompt on its way into one state, and the requests that will go on from there (n > 1 share it)."""

    ids: list[int]
    requests: list[Request]
    state: Any  # State | None: after the first `read` ids
    placeholders: Placeholders | None = None
    """Pictures and sound among the ids; None for text alone."""
    read: int = 0

    @property
    def key(self) -> Sequence[int] | None:
        """Key in the prefix cache, the same for all its requests."""
        return self.requests[0].key

    @property
    def scored(self) -> bool:
        """Whether its own log probabilities are wanted."""
        return self.requests[0].returns.prompt

    @property
    def left(self) -> int:
        """Tokens still to read: all but the last, whose decoding gives the first token of the completion."""
        return len(self.ids) - 1 - self.read

    def until_kept(self, every: int) -> int:
        """Tokens until the next state for the cache: at multiples of `every`, after the last picture or sound, at the
        end. Other prompts are likely to begin with these."""
        ends = [self.read + every - self.read % every, len(self.ids) - 1]
        if self.placeholders is not None and self.placeholders.end > self.read:
            ends.append(self.placeholders.end)
        return min(ends) - self.read

"""Requests of the engine: a `Stream` for the caller, a `Request` and a `Prompt` inside the engine.

All three compare by identity (eq=False). Two equal prompts are two requests, and comparing long prompts token by token
would cost time at every `remove`.
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
    """Error for a full queue: try again later."""


class Constraint(Protocol):
    """Constraint on the next token, such as JSON or a regular expression. One object a stream; an error ends it."""

    eos_id: int
    """The token that ends the text; allowed where the text may end."""

    @property
    def complete(self) -> bool:
        """True if only the end may follow: the stream then stops, as if the end had been picked."""

    def mask(self) -> Tensor:
        """Mask of the tokens allowed now, bool `[vocab]`; a shorter mask allows none beyond its end."""

    def accept(self, token: int) -> None:
        """Advance by the token that was picked."""


def allowed(constraint: Constraint, vocab: int) -> Tensor:
    """The constraint's mask, padded to bool `[vocab]`.

    Raises:
        ValueError: the mask is longer, or allows nothing.
    """
    mask = constraint.mask()
    if mask.dtype != torch.bool or mask.ndim != 1 or len(mask) > vocab or not bool(mask.any()):
        raise ValueError(f"a constraint must allow some of {vocab} tokens, got {mask.dtype} {list(mask.shape)}")
    # a model may have more logits than its tokenizer has tokens: the surplus is never allowed
    return torch.nn.functional.pad(mask, (0, vocab - len(mask)))


@dataclass(frozen=True)
class Returns:
    """Results of a request beside its tokens; each costs time or memory."""

    top: int = 0
    """Number of likeliest tokens to return with each token."""
    prompt: bool = False
    """Return log probabilities of the prompt too. No cached state is used then: it does not have them."""
    state: bool = False
    """Leave the final state in the stream, so that another request can continue from it."""


@dataclass(eq=False)
class Stream:
    """Iterator over the tokens of one request, as they are made. Afterwards `reason` says why it ended."""

    ids: list[int]
    """The prompt."""
    cached: int = 0
    """Number of prompt tokens that a cached state had read already."""
    reason: str | None = None
    """Reason of the end: "stop" (a token of stop_ids, not returned), "length", "cancelled" or "error"; None before."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """Log probabilities of prompt tokens 1, 2, …, each given those before, if requested (`Returns`)."""
    prompt_tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """Likeliest tokens at each of those positions, if both were requested."""
    state: State | None = None
    """Final state, if requested: it has read all tokens but `pending`."""
    pending: list[int] = field(default_factory=list)
    """The last token, picked but not yet read."""
    prompt_state: State | None = None
    """State before the prompt's last token, for a prompt with pictures or sound if the final state is requested. If
    the answer is cut short, these cannot be read again from their ids."""
    cancelled: bool = False
    """True after `cancel`. Any thread may set it; the engine's thread reads it before each step."""
    deliver: Callable[[Token | Exception | None], object] | None = None
    """Callback from the engine's thread with each token, an exception, or None at the end. Replaces iterating."""
    inbox: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[Token]:
        while (item := self.inbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        """Stop the request: its slot is free at the engine's next step."""
        self.cancelled = True


@dataclass(eq=False)
class Request:
    """A stream inside the engine: it waits with its prompt, then decodes in a row of the pool."""

    stream: Stream
    sampler: Sampler
    max_tokens: int | None
    stop_ids: frozenset[int]
    constraint: Constraint | None
    returns: Returns
    key: Sequence[int] | None
    """Key of the prompt in the prefix cache: its ids, with hashes of pictures and sound. None without a cache, and for
    a prompt that began from a given state, whose tokens are not among the ids."""
    made: list[int] = field(default_factory=list)
    """Tokens picked so far, including a final one of `stop_ids`."""


@dataclass(eq=False)
class Prompt:
    """A prompt that is being read into one state, and the requests that continue from it (n > 1 share it)."""

    ids: list[int]
    requests: list[Request]
    state: Any  # State | None: after the first `read` ids
    placeholders: Placeholders | None = None
    """Pictures and sound among the ids; None for text alone."""
    read: int = 0

    @property
    def key(self) -> Sequence[int] | None:
        """Key in the prefix cache, the same for all requests of the prompt."""
        return self.requests[0].key

    @property
    def scored(self) -> bool:
        """True if log probabilities of the prompt are requested."""
        return self.requests[0].returns.prompt

    @property
    def left(self) -> int:
        """Tokens still to prefill: all but the last, whose decoding gives the first token of the completion."""
        return len(self.ids) - 1 - self.read

    def until_kept(self, every: int) -> int:
        """Tokens until the next state for the cache.

        States are kept at multiples of `every`, after the last picture or sound, and at the end, where other prompts
        are likely to share a prefix.
        """
        ends = [self.read + every - self.read % every, len(self.ids) - 1]
        if self.placeholders is not None and self.placeholders.end > self.read:
            ends.append(self.placeholders.end)
        return min(ends) - self.read

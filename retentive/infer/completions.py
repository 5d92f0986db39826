"""Texts after many prompts at once: texts or chats, several answers each, with log probabilities.

    complete(model, tokenizer, ["Once", "Twice"], max_tokens=50)
    complete(model, tokenizer, [[{"role": "user", "content": "Who?"}]], template=template, n=3, max_tokens=50)

All are decoded by one engine. An answer depends on its own prompt and seed only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retentive.data.templates import ChatTemplate, Message
from retentive.data.tokenizer import Tokenizer
from retentive.infer.batch import SLOTS
from retentive.infer.engine import Engine
from retentive.infer.generate import Token
from retentive.infer.memory import Memory
from retentive.infer.requests import Stream
from retentive.infer.sample import SamplingParams
from retentive.infer.text import Text, heal
from retentive.models import LanguageModel
from retentive.options import option

Asked = str | Sequence[Message]
"""A text to continue, or the messages of a chat."""


class Completion(NamedTuple):
    """Answer to a prompt."""

    text: str
    ids: list[int]
    """Tokens of the text, as they were sampled."""
    logprobs: list[float]
    """Natural log of each token's probability under the model, before temperature and filters."""
    reason: str
    """Reason of the end: "stop" (end of text, or a stop string) or "length"."""

    def __str__(self) -> str:
        return self.text


@dataclass
class First:
    """Constraint on the first token alone."""

    ids: Sequence[int]
    vocab: int
    eos_id: int
    begun: bool = False
    complete = False

    def mask(self) -> Tensor:
        mask = torch.full((self.vocab,), self.begun)
        mask[list(self.ids)] = True
        return mask

    def accept(self, token: int) -> None:
        self.begun = True


class _Prompt(NamedTuple):
    ids: list[int]
    stop_ids: list[int]
    stop: tuple[str, ...]
    healed: str = ""
    """Text of the prompt's last token, which is sampled again (`text.heal`)."""
    first: Callable[[], First] | None = None


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Asked],
    params: SamplingParams | None = None,
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    n: int = 1,
    template: ChatTemplate | None = None,
    memory: Memory | None = None,
) -> list[list[Completion]]:
    """Returns n answers to each prompt.

    Args:
        params: the same for all; the seeds of a prompt's answers are seed, seed + 1, …
        template: chat template, for prompts that are messages.
        memory: memory that all prompts continue; it is not changed.

    Raises:
        ValueError: n is below 1, an empty chat, or messages that the template refuses.
        ArithmeticError: the model's logits are not finite.
    """
    if n < 1:
        raise ValueError(f"{option('n', n)}: must be at least 1")
    encoded = [_encode(tokenizer, prompt, stop, template, memory) for prompt in prompts]
    engine = Engine(model, slots=max(min(SLOTS, n * len(prompts)), n), waiting=max(len(prompts), 1))
    state = None if memory is None or not memory.tokens else memory.state
    submitted = [
        engine.submit(
            # the healed token is sampled again: one token more
            each.ids, params, max_tokens=max_tokens + bool(each.healed), stop_ids=each.stop_ids, n=n,
            constraint=each.first, state=state,
        )
        for each in encoded
    ]  # fmt: skip
    found: list[list[Completion]] = [[] for _ in prompts]
    watched = [
        (stream, Text(tokenizer, each.stop, skip=len(each.healed)), each, place)
        for place, (streams, each) in enumerate(zip(submitted, encoded, strict=True))
        for stream in streams
    ]
    made: list[list[Token]] = [[] for _ in watched]
    working = True
    while working:
        working = engine.step()
        for (stream, text, _, _), tokens in zip(watched, made, strict=True):
            _take(stream, text, tokens)
    for (stream, text, each, place), tokens in zip(watched, made, strict=True):
        reason = "stop" if text.stopped or stream.reason == "stop" else "length"
        whole = "".join(text.pieces)[len(each.healed) :]
        found[place].append(Completion(whole, [t.id for t in tokens], [t.logprob for t in tokens], reason))
    return found


def _take(stream: Stream, text: Text, tokens: list[Token]) -> None:
    """Moves what a stream has made into the text and its tokens; cancels it after a stop string."""
    while not stream.inbox.empty() and not text.stopped:
        token = stream.inbox.get()
        if isinstance(token, Exception):
            raise token
        if token is None:
            text.flush()
            return
        tokens.append(token)
        text.push(token.id)
        if text.stopped:
            stream.cancel()


def is_chat(prompt: Any) -> bool:
    """True for messages of one chat."""
    texts = isinstance(prompt, str) or not isinstance(prompt, Sequence)
    return not texts and bool(prompt) and isinstance(prompt[0], Mapping)


def _encode(
    tokenizer: Tokenizer, prompt: Asked, stop: Sequence[str], template: ChatTemplate | None, memory: Memory | None
) -> _Prompt:
    begun = memory is not None and bool(memory.tokens or memory.pending)
    before = list(memory.pending) if memory is not None else []
    if is_chat(prompt):
        assert template is not None
        if lacking := [m for m in prompt if not {"role", "content"} <= set(m)]:
            raise ValueError(f"a message needs a role and a content, got {lacking[0]}")
        ids = [*before, *template.next(prompt)] if begun else template.first(prompt)  # type: ignore[arg-type]
        return _Prompt(ids, sorted(template.stop_ids), (*template.stop, *stop))
    if not isinstance(prompt, str):
        raise ValueError("a prompt is a text, or messages such as [{'role': 'user', 'content': 'Who?'}]")
    ids = [*(before if begun else [tokenizer.eos_id]), *tokenizer.encode(prompt)]
    healed, first = heal(tokenizer, prompt, ids)
    if first is None:
        return _Prompt(ids, [tokenizer.eos_id], tuple(stop))
    only = partial(First, first, tokenizer.vocab_size, tokenizer.eos_id)
    return _Prompt(ids[:-1], [tokenizer.eos_id], tuple(stop), healed, only)

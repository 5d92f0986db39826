"""A choice of a completion while it grows: the engine's tokens go in, text and log probabilities come out."""

from dataclasses import dataclass, field
from typing import NamedTuple

from retentive.data.media import Rows
from retentive.data.tokenizer import Tokenizer
from retentive.infer.generate import Token
from retentive.infer.requests import Stream
from retentive.infer.text import Text


@dataclass
class Prompt:
    """A prompt as ids, which one choice continues, or n of them."""

    ids: list[int]
    sent: int = 0
    """How many of the ids, at the end, the client sent; those before are a session's or the end-of-text token."""
    text: str | None = None
    """The text of those, if it is to be echoed."""
    rows: Rows = field(default_factory=dict)
    """Rows of the pictures and sound among the ids."""


class TokenLogprob(NamedTuple):
    """A token, its log probability, and the offset in characters of its text in the choice's text."""

    id: int
    logprob: float | None
    """None for the very first token, which nothing predicts."""
    top: tuple[tuple[int, float], ...]
    offset: int


class Delta(NamedTuple):
    """What was added to a choice since the last delta."""

    choice: int
    text: str
    logprobs: list[TokenLogprob]
    finish: str | None
    """OpenAI's finish_reason: "stop" or "length"; None while it goes on."""


@dataclass
class Choice:
    """One continuation of one prompt."""

    index: int
    prompt: Prompt
    stream: Stream
    tokenizer: Tokenizer
    text: Text
    max_tokens: int
    """0 asks for an echo alone: the engine still makes one token, which is thrown away."""
    logprobs: bool
    trims: bool = False
    """Until its first word: white space before it, as templates put it before an answer, is not given out."""
    finish: str | None = None
    first_at: float | None = None
    """When the first token came, in the event loop's time (seconds)."""
    last_at: float = 0
    new_text: str = ""
    """Text that `delta` has not given out yet."""
    new_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """The tokens generated, those of a stop string included."""
        return self.text.ids

    @property
    def echoed(self) -> int:
        """Characters of the prompt that stand before the answer."""
        return len(self.prompt.text or "")

    def echo(self) -> None:
        """Add the prompt to what `delta` gives out; a long one with log probabilities is work for a thread."""
        if self.prompt.text is None:
            return
        self.new_text = self.prompt.text
        if not self.logprobs:
            return
        decoder, offset, stream = self.tokenizer.stream(), 0, self.stream
        first = len(self.prompt.ids) - self.prompt.sent
        for n, id in enumerate(self.prompt.ids[first:], first):
            # the stream's lists begin with the prompt's second token
            logprob = stream.prompt_logprobs[n - 1] if n else None
            top = stream.prompt_tops[n - 1] if n and stream.prompt_tops else ()
            self.new_logprobs.append(TokenLogprob(id, logprob, top, offset))
            offset += len(decoder.push(id))

    def push(self, token: Token | None, now: float) -> None:
        """Take in a token; None says that there are no more."""
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        if token is None:
            self.new_text += self.text.flush()
            self.finish = "length" if self.stream.reason == "length" and not self.text.stopped else "stop"
        elif self.max_tokens:
            offset = self.echoed + self.text.decoded  # before the push: where this token's text begins
            self.new_text += self.text.push(token.id)
            if self.logprobs:
                self.new_logprobs.append(TokenLogprob(token.id, token.logprob, token.top, offset))
            if self.text.stopped:
                self.finish = "stop"
                self.stream.cancel()

    def delta(self) -> Delta | None:
        """What has come since the last call; None if nothing, so that no empty event is sent."""
        if self.trims:
            self.new_text = self.new_text.lstrip()
            self.trims = not self.new_text
        if not self.new_text and self.finish is None:
            return None
        end, ready = self.echoed + self.text.given, self.new_logprobs
        # tokens whose text is held back, or cut off by a stop string, must not show in the log probabilities either
        if self.text.stopped or self.finish is None:
            ready = [each for each in ready if each.offset < end]
        delta = Delta(self.index, self.new_text, ready, self.finish)
        self.new_text, self.new_logprobs = "", self.new_logprobs[len(ready) :]
        return delta

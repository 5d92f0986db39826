"""A choice of a completion while it grows: tokens of the engine in, pieces of text and their log probabilities out."""

from dataclasses import dataclass, field
from typing import NamedTuple

from retentive.data.tokenizer import Tokenizer
from retentive.infer.generate import Token
from retentive.infer.requests import Stream
from retentive.infer.text import Text


@dataclass
class Prompt:
    """What the model is to read for one continuation, or for n."""

    ids: list[int]
    sent: int = 0
    """So many at the end are what the client sent."""
    text: str | None = None
    """Those as text, where they are to be echoed."""


class TokenLogprob(NamedTuple):
    """A token with its log probability, and where in the choice's text its own begins."""

    id: int
    logprob: float | None
    """None of the first token of all: nothing stood before it."""
    top: tuple[tuple[int, float], ...]
    offset: int


class Delta(NamedTuple):
    """What a choice has grown by."""

    choice: int
    text: str
    logprobs: list[TokenLogprob]
    finish: str | None
    """Why it has ended, in OpenAI's words: "stop" or "length"; None while it goes on."""


@dataclass
class Choice:
    """One continuation of one prompt."""

    index: int
    prompt: Prompt
    stream: Stream
    tokenizer: Tokenizer
    text: Text
    max_tokens: int
    """0 for nothing but an echo: the engine makes a token all the same, which nobody is shown."""
    logprobs: bool
    finish: str | None = None
    first_at: float | None = None
    """When the first token came."""
    last_at: float = 0
    new_text: str = ""
    """What `delta` has not given out yet."""
    new_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """The tokens made, those of a stop string as well."""
        return self.text.ids

    @property
    def echoed(self) -> int:
        """Characters of the prompt that stand before the answer."""
        return len(self.prompt.text or "")

    def echo(self) -> None:
        """Give out the prompt, once it is read; of a long one with log probabilities this takes a while."""
        if self.prompt.text is None:
            return
        self.new_text = self.prompt.text
        if not self.logprobs:
            return
        decoder, offset, stream = self.tokenizer.stream(), 0, self.stream
        first = len(self.prompt.ids) - self.prompt.sent
        for n, id in enumerate(self.prompt.ids[first:], first):
            # the stream has those of the prompt's second token and on
            logprob = stream.prompt_logprobs[n - 1] if n else None
            top = stream.prompt_tops[n - 1] if n and stream.prompt_tops else ()
            self.new_logprobs.append(TokenLogprob(id, logprob, top, offset))
            offset += len(decoder.push(id))

    def push(self, token: Token | None, now: float) -> None:
        """Take in a token, or (None) that there are no more."""
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        if token is None:
            self.new_text += self.text.flush()
            self.finish = "length" if self.stream.reason == "length" and not self.text.stopped else "stop"
        elif self.max_tokens:
            offset = self.echoed + self.text.decoded
            self.new_text += self.text.push(token.id)
            if self.logprobs:
                self.new_logprobs.append(TokenLogprob(token.id, token.logprob, token.top, offset))
            if self.text.stopped:
                self.finish = "stop"
                self.stream.cancel()

    def delta(self) -> Delta | None:
        """What there is to give out, once."""
        if not self.new_text and self.finish is None:
            return None
        end, ready = self.echoed + self.text.given, self.new_logprobs
        if self.text.stopped or self.finish is None:  # not of text that is held back, or cut off
            ready = [each for each in ready if each.offset < end]
        delta = Delta(self.index, self.new_text, ready, self.finish)
        self.new_text, self.new_logprobs = "", self.new_logprobs[len(ready) :]
        return delta

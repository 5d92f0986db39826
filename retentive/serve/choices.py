"""Choice of a completion while it grows: the engine's tokens in, text and log probabilities out."""

from dataclasses import dataclass, field
from typing import NamedTuple

from retentive.data.media import Rows
from retentive.data.tokenizer import Tokenizer
from retentive.data.tools import Call, Notation
from retentive.infer.generate import Token
from retentive.infer.requests import Stream
from retentive.infer.text import Text


@dataclass
class Prompt:
    """Prompt as ids, continued by one choice or by n."""

    ids: list[int]
    sent: int = 0
    """Number of ids at the end that the client sent; a session's ids or the end-of-text token precede them."""
    text: str | None = None
    """Text of the ids that the client sent, if it is echoed."""
    rows: Rows = field(default_factory=dict)
    """Rows of the pictures and sound among the ids."""


class TokenLogprob(NamedTuple):
    """Token with its log probability and the character offset of its text within the choice."""

    id: int
    logprob: float | None
    """Log probability; None for the very first token, which nothing predicts."""
    top: tuple[tuple[int, float], ...]
    offset: int


class Delta(NamedTuple):
    """Addition to a choice since the last delta."""

    choice: int
    text: str
    logprobs: list[TokenLogprob]
    finish: str | None
    """OpenAI's finish_reason: "stop", "length" or "tool_calls"; None while the choice continues."""
    calls: tuple[Call, ...] = ()
    """Tool calls, all together when the choice ends."""


@dataclass
class Choice:
    """Continuation of a prompt."""

    index: int
    prompt: Prompt
    stream: Stream
    tokenizer: Tokenizer
    text: Text
    max_tokens: int
    """Maximum tokens; 0 asks for an echo only, and the engine's one token is dropped."""
    logprobs: bool
    trims: bool = False
    """True until the first word: drops the white space that templates put before an answer."""
    notation: Notation | None = None
    """Notation of tool calls, if the model may call any."""
    finish: str | None = None
    first_at: float | None = None
    """Time of the first token, in seconds of the event loop."""
    last_at: float = 0
    new_text: str = ""
    """Text that `delta` has not returned yet."""
    new_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """Generated tokens, including those of a stop string."""
        return self.text.ids

    @property
    def echoed(self) -> int:
        """Characters of the prompt before the answer."""
        return len(self.prompt.text or "")

    def echo(self) -> None:
        """Adds the prompt to the output of `delta`. Use a thread for a long one with log probabilities."""
        if self.prompt.text is None:
            return
        self.new_text = self.prompt.text
        if not self.logprobs:
            return
        decoder, offset, stream = self.tokenizer.stream(), 0, self.stream
        first = len(self.prompt.ids) - self.prompt.sent
        for n, id in enumerate(self.prompt.ids[first:], first):
            # the stream's lists start with the prompt's second token
            logprob = stream.prompt_logprobs[n - 1] if n else None
            top = stream.prompt_tops[n - 1] if n and stream.prompt_tops else ()
            self.new_logprobs.append(TokenLogprob(id, logprob, top, offset))
            offset += len(decoder.push(id))

    def push(self, token: Token | None, now: float) -> None:
        """Adds a token; None ends the choice."""
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        if token is None:
            self.new_text += self.text.flush()
            self.finish = "length" if self.stream.reason == "length" and not self.text.stopped else "stop"
        elif self.max_tokens:
            offset = self.echoed + self.text.decoded  # before the push: the start of this token's text
            self.new_text += self.text.push(token.id)
            if self.logprobs:
                self.new_logprobs.append(TokenLogprob(token.id, token.logprob, token.top, offset))
            if self.text.stopped:
                self.finish = "stop"
                self.stream.cancel()

    def delta(self) -> Delta | None:
        """Returns the addition since the last call; None if there is none, so that no empty event is sent."""
        if self.trims:
            self.new_text = self.new_text.lstrip()
            self.trims = not self.new_text
        text, held, calls = self._called()
        if not text and self.finish is None:
            return None
        end, ready = self.echoed + self.text.given, self.new_logprobs
        # log probabilities leave out tokens whose text is held back or cut off by a stop string
        if self.text.stopped or self.finish is None:
            ready = [each for each in ready if each.offset < end]
        finish = "tool_calls" if calls else self.finish
        self.new_text, self.new_logprobs = held, self.new_logprobs[len(ready) :]
        return Delta(self.index, text, ready, finish, calls)

    def _called(self) -> tuple[str, str, tuple[Call, ...]]:
        """Splits the new text: (text to give out, text held back since it may belong to a call, calls at the end)."""
        if self.notation is None:
            return self.new_text, "", ()
        if self.finish is None:
            certain = self.notation.certain(self.new_text)
            return self.new_text[:certain], self.new_text[certain:], ()
        try:
            text, calls = self.notation.split(self.new_text)
        except ValueError:  # max_tokens cut a call off: the client gets its text
            return self.new_text, "", ()
        return text, "", tuple(calls)

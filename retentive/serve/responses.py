"""Responses: JSON of OpenAI's completions and chat completions, whole or as chunks in server-sent events."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from retentive.data.tokenizer import Tokenizer
from retentive.serve.choices import Delta, TokenLogprob

UNLIKELY = -9999.0
"""OpenAI's value for minus infinity, which is not JSON."""


def to_json(value: dict[str, Any]) -> bytes:
    """Returns compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def event(value: dict[str, Any]) -> bytes:
    """Returns a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Responses(ABC):
    """Response to one request: whole, or in chunks that share its id.

    Args:
        logprobs: give the log probability of each token.
        usage: end a stream with a chunk of `usage` (OpenAI's include_usage), which is null in all others.
    """

    # OpenAI's `object` of whole responses and of chunks, and the prefix of its ids
    whole_name, chunk_name, prefix = "", "", ""

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool, usage: bool = False):
        self.model, self.tokenizer, self.logprobs, self.usage = model, tokenizer, logprobs, usage
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._texts: dict[int, str] = {}

    def whole(self, deltas: Sequence[Sequence[Delta]], **more: Any) -> bytes:
        """Returns the whole response from the deltas of each choice; `more` are further fields."""
        choices = []
        for n, parts in enumerate(deltas):
            logprobs = [each for part in parts for each in part.logprobs]
            choices.append(self._choice(Delta(n, "".join(part.text for part in parts), logprobs, parts[-1].finish)))
        return to_json({**self._head(self.whole_name), "choices": choices, **more})

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """Returns an event for each delta."""
        return b"".join(self._chunk([self._chunk_choice(delta)]) for delta in deltas)

    def opening(self, n: int) -> bytes:
        """Returns the event before any text for n choices; empty for plain completions."""
        return b""

    def closing(self, **more: Any) -> bytes:
        """Returns the last events: `usage` if requested, and OpenAI's end mark."""
        return (
            event({**self._head(self.chunk_name), "choices": [], **more}) if self.usage else b""
        ) + b"data: [DONE]\n\n"

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return event({**self._head(self.chunk_name), "choices": choices, **({"usage": None} if self.usage else {})})

    @abstractmethod
    def _choice(self, delta: Delta) -> dict[str, Any]:
        """Returns the JSON of a choice in a whole response."""

    @abstractmethod
    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        """Returns the JSON of a choice in a chunk."""

    def _text(self, id: int) -> str:
        """Returns the text of one token, cached, since few tokens repeat often."""
        if id not in self._texts:
            self._texts[id] = self.tokenizer.decode([id])
        return self._texts[id]


class CompletionResponses(Responses):
    whole_name = chunk_name = "text_completion"
    prefix = "cmpl"

    def _choice(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.logprobs) if self.logprobs else None
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    _chunk_choice = _choice

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [self._text(t.id) for t in tokens],
            "token_logprobs": [None if t.logprob is None else max(t.logprob, UNLIKELY) for t in tokens],
            "top_logprobs": [None if t.logprob is None else self._likeliest(t) for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def _likeliest(self, token: TokenLogprob) -> dict[str, float]:
        """Returns the likeliest tokens and the token itself by text; of two with one text, the likelier."""
        found: dict[str, float] = {}
        for id, logprob in (*token.top, (token.id, token.logprob or 0.0)):
            found.setdefault(self._text(id), max(logprob, UNLIKELY))
        return found


class ChatResponses(Responses):
    whole_name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, n: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(n)])

    def _choice(self, delta: Delta) -> dict[str, Any]:
        return self._with(delta, {"message": {"role": "assistant", "content": delta.text, "refusal": None}})

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        return self._with(delta, {"delta": {"content": delta.text} if delta.text else {}})

    def _with(self, delta: Delta, said: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self.logprobs:
            logprobs = {"content": [self._logprob(token) for token in delta.logprobs], "refusal": None}
        return {"index": delta.choice, **said, "logprobs": logprobs, "finish_reason": delta.finish}

    def _logprob(self, token: TokenLogprob) -> dict[str, Any]:
        top = [self._one(id, logprob) for id, logprob in token.top]
        return {**self._one(token.id, token.logprob or 0.0), "top_logprobs": top}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._text(id)
        # a token that is part of a character decodes to U+FFFD, and its bytes are unknown here
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, UNLIKELY), "bytes": whole}

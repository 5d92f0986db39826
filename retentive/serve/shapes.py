"""What clients get: the JSON of OpenAI's completions and chat completions, whole or in chunks."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from retentive.data.tokenizer import Tokenizer
from retentive.serve.reply import Entry, Piece

UNLIKELY = -9999.0
"""What OpenAI writes for minus infinity, which JSON has not."""


class Shape(ABC):
    """The form of one answer. `name` and `prefix` are OpenAI's words for it."""

    name, chunk_name, prefix = "", "", ""

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool):
        self.model, self.tokenizer, self.logprobs = model, tokenizer, logprobs
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": self.chunk_name, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    def whole(self, pieces: Sequence[list[Piece]], **more: Any) -> dict[str, Any]:
        """The answer whose choices are these pieces, joined."""
        choices = [
            self._choice(
                Piece(n, "".join(p.text for p in parts), [e for p in parts for e in p.entries], parts[-1].finish)
            )
            for n, parts in enumerate(pieces)
        ]
        return {**self.chunk(choices), "object": self.name, **more}

    def opening(self, n: int) -> list[dict[str, Any]]:
        """Choices of a first chunk, before there is any text."""
        return []

    @abstractmethod
    def piece(self, piece: Piece) -> dict[str, Any]:
        """A choice of a chunk."""

    @abstractmethod
    def _choice(self, piece: Piece) -> dict[str, Any]:
        """A choice of a whole answer."""

    def _token(self, id: int) -> str:
        return self.tokenizer.decode([id])


class CompletionShape(Shape):
    name = chunk_name = "text_completion"
    prefix = "cmpl"

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.entries) if self.logprobs else None
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {
            "tokens": [self._token(e.id) for e in entries],
            "token_logprobs": [None if e.logprob is None else max(e.logprob, UNLIKELY) for e in entries],
            "top_logprobs": [None if e.logprob is None else self._likeliest(e) for e in entries],
            "text_offset": [e.offset for e in entries],
        }

    def _likeliest(self, entry: Entry) -> dict[str, float]:
        """By text, the likelier of two that look alike; the token itself is always there."""
        found: dict[str, float] = {}
        for id, logprob in (*entry.top, (entry.id, entry.logprob or 0.0)):
            found.setdefault(self._token(id), max(logprob, UNLIKELY))
        return found


class ChatShape(Shape):
    name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, n: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(n)]

    def piece(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return self._dressed(piece, {"delta": delta})

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return self._dressed(piece, {"message": {"role": "assistant", "content": piece.text, "refusal": None}})

    def _dressed(self, piece: Piece, said: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self.logprobs:
            logprobs = {"content": [self._logprob(e) for e in piece.entries], "refusal": None}
        return {"index": piece.choice, **said, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprob(self, entry: Entry) -> dict[str, Any]:
        top = [self._one(id, logprob) for id, logprob in entry.top]
        return {**self._one(entry.id, entry.logprob or 0.0), "top_logprobs": top}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._token(id)
        whole = None if "\ufffd" in text else list(text.encode())  # of part of a character the bytes are not known
        return {"token": text, "logprob": max(logprob, UNLIKELY), "bytes": whole}

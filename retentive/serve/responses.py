"""Responses: JSON of OpenAI's completions and chat completions, whole or as chunks in server-sent events."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from retentive.data.tokenizer import Tokenizer
from retentive.data.tools import Call
from retentive.serve.choices import Delta, TokenLogprob

UNLIKELY = -9999.0
"""OpenAI's value for minus infinity, which is not JSON."""


def to_json(value: dict[str, Any]) -> bytes:
    """Returns compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def event(value: dict[str, Any]) -> bytes:
    """Returns a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def call_id() -> str:
    """Returns a new id of a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _call(call: Call) -> dict[str, Any]:
    return {"id": call_id(), "type": "function", "function": call._asdict()}


class Responses(ABC):
    """Response to one request: whole, or in chunks that share its id.

    Args:
        logprobs: give the log probability of each token.
        usage: end a stream with a chunk of `usage` (OpenAI's include_usage), which is null in all others.
        echoed: fields of the request that the response repeats, where its API does so.
    """

    # OpenAI's `object` of whole responses and of chunks, and the prefix of its ids
    whole_name, chunk_name, prefix = "", "", ""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        usage: bool = False,
        echoed: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.model, self.tokenizer, self.logprobs, self.usage, self.echoed = model, tokenizer, logprobs, usage, echoed
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._texts: dict[int, str] = {}

    def whole(self, deltas: Sequence[Sequence[Delta]], **more: Any) -> bytes:
        """Returns the whole response from the deltas of each choice; `more` are further fields."""
        choices = []
        for n, parts in enumerate(deltas):
            logprobs = [each for part in parts for each in part.logprobs]
            text, last = "".join(part.text for part in parts), parts[-1]
            choices.append(self._choice(Delta(n, text, logprobs, last.finish, last.calls)))
        return to_json({**self._head(self.whole_name), "choices": choices, **more})

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """Returns an event for each delta."""
        return b"".join(self._chunk([self._chunk_choice(delta)]) for delta in deltas)

    def opening(self, n: int) -> bytes:
        """Returns the event before any text for n choices; empty for plain completions."""
        return b""

    def failed(self, body: dict[str, Any]) -> bytes:
        """Returns the last event of a stream that failed: the body of the error."""
        return event(body)

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
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.calls:
            message |= {"content": delta.text or None, "tool_calls": [_call(call) for call in delta.calls]}
        return self._with(delta, {"message": message})

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """Returns events of each delta. The reason of the end has one of its own: clients look for whole calls then."""
        apart = list[Delta]()
        for delta in deltas:
            if delta.finish and (delta.text or delta.calls or delta.logprobs):
                apart += [delta._replace(finish=None), Delta(delta.choice, "", [], delta.finish)]
            else:
                apart.append(delta)
        return super().chunks(apart)

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        said: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.calls:
            said["tool_calls"] = [{"index": n, **_call(call)} for n, call in enumerate(delta.calls)]
        return self._with(delta, {"delta": said})

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


class ItemResponses(Responses):
    """Responses of /v1/responses: a message of one text, tool calls, and events with names."""

    whole_name, prefix = "response", "resp"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.item_id, self.text, self.finish, self.events = f"msg-{uuid.uuid4().hex}", "", "", 0
        self.calls: list[dict[str, Any]] = []
        self.opened = False
        """True after the event that begins the message. An answer of calls alone has no message."""

    def whole(self, deltas: Sequence[Sequence[Delta]], **more: Any) -> bytes:
        for delta in deltas[0]:
            self._take(delta)
        return to_json(self._response(self._status, self._output(), **more))

    def opening(self, n: int) -> bytes:
        response = self._response("in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        for delta in deltas:
            self._take(delta)
        texts = [delta.text for delta in deltas if delta.text]
        opened = self._opening() if texts else b""
        return opened + b"".join(self._part_event("output_text.delta", delta=text, logprobs=[]) for text in texts)

    def closing(self, **more: Any) -> bytes:
        events = b"" if self.calls else self._opening()
        if self.opened:
            events += (
                self._part_event("output_text.done", text=self.text, logprobs=[])
                + self._part_event("content_part.done", part=self._part(self.text))
                + self._event("response.output_item.done", output_index=0, item=self._item(self._status))
            )
        for index, call in enumerate(self.calls, int(self.opened)):
            began, where = {**call, "status": "in_progress", "arguments": ""}, {"output_index": index}
            named, name = {**where, "item_id": call["id"]}, "response.function_call_arguments"
            events += (
                self._event("response.output_item.added", **where, item=began)
                + self._event(f"{name}.delta", **named, delta=call["arguments"])
                + self._event(f"{name}.done", **named, name=call["name"], arguments=call["arguments"])
                + self._event("response.output_item.done", **where, item=call)
            )
        response = self._response(self._status, self._output(), **more)
        return events + self._event(f"response.{self._status}", response=response)

    def _opening(self) -> bytes:
        """Returns the events that begin the message; nothing if it has begun."""
        if self.opened:
            return b""
        self.opened = True
        return self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])) + (
            self._part_event("content_part.added", part=self._part(""))
        )

    def _output(self) -> list[dict[str, Any]]:
        message = [] if self.calls and not self.text else [self._item(self._status)]
        return [*message, *self.calls]

    def failed(self, body: dict[str, Any]) -> bytes:
        error = body["error"]
        return self._event("error", **{name: error[name] for name in ("message", "param", "code")})

    def _take(self, delta: Delta) -> None:
        self.text, self.finish = self.text + delta.text, delta.finish or self.finish
        for call in delta.calls:
            known = {"id": f"fc-{uuid.uuid4().hex}", "type": "function_call", "status": "completed"}
            self.calls.append({**known, "call_id": call_id(), **call._asdict()})

    @property
    def _status(self) -> str:
        return "incomplete" if self.finish == "length" else "completed"

    def _event(self, kind: str, /, **content: Any) -> bytes:
        self.events += 1
        said = to_json({"type": kind, "sequence_number": self.events - 1, **content})
        return b"event: " + kind.encode() + b"\ndata: " + said + b"\n\n"

    def _part_event(self, name: str, **content: Any) -> bytes:
        return self._event(f"response.{name}", item_id=self.item_id, output_index=0, content_index=0, **content)

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, status: str, content: list[Any] | None = None) -> dict[str, Any]:
        content = [self._part(self.text)] if content is None else content
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, status: str, output: list[Any], usage: dict[str, Any] | None = None, **more: Any) -> Any:
        counts = usage and {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id, "object": self.whole_name, "created_at": self.created, "model": self.model,
            "status": status, "error": None, "incomplete_details": details, "output": output, "usage": counts,
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], **self.echoed, "metadata": {}, **more,
        }  # fmt: skip

    def _choice(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError  # it has no choices

    _chunk_choice = _choice

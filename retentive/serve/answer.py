"""From a request to its answer: what the model is to read, the reply to it, and its form, whole or as events.

A session is lent to the answer from before its prompt is encoded until its last byte but the closing ones: whoever has
got the end of an answer may go on with the session at once.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from retentive.infer.requests import Constraint
from retentive.serve.errors import Refused
from retentive.serve.reply import Gone, Piece, Reply, Work
from retentive.serve.service import Service
from retentive.serve.sessions import Session
from retentive.serve.shapes import ChatShape, CompletionShape, Shape
from retentive.serve.wire import ChatRequest, CompletionRequest

LONG = 20_000
"""Characters from which a prompt is encoded in a thread, so that others' tokens go on flowing."""
SHORT_ANSWER = 16
"""Tokens of a completion whose request does not say, as OpenAI has it."""

log = logging.getLogger("retentive.serve")


class Answer:
    """One request being answered: `begin`, then `whole` or `events`; `end` in any case.

    Args:
        leaves: comes back when the client has left.
    """

    def __init__(
        self,
        service: Service,
        owner: str,
        request: ChatRequest | CompletionRequest,
        leaves: Callable[[], Awaitable[None]],
    ):
        self.service, self.owner, self.request, self.leaves = service, owner, request, leaves
        self.held = ExitStack()
        self.shape: Shape = (ChatShape if isinstance(request, ChatRequest) else CompletionShape)(
            service.name, service.tokenizer, logprobs=request.logprob_count is not None
        )

    async def begin(self) -> None:
        """Submit it to the engine.

        Raises:
            Refused: anything that is wrong with it, or no room.
        """
        request, service, session = self.request, self.service, None
        service.check_model(request.model)
        service.check_open()
        request.refuse_what_is_not_served()
        try:
            self.held.enter_context(self._counted())
            if request.session is not None:
                session = self.held.enter_context(service.sessions.lent(self.owner, request.session, new=True))
            constraint = await self._constraint()
            works = await self._works(session)
            stop_ids, stop = frozenset({service.tokenizer.eos_id}), list(request.stop or ())
            if isinstance(request, ChatRequest):
                stop_ids, stop = service.template.stop_ids, [*stop, *service.template.stop]
            self.reply = Reply(
                service, request, works, max_tokens=self._max_tokens(), stop_ids=stop_ids, stop=stop,
                echo=isinstance(request, CompletionRequest) and bool(request.echo),
                constraint=constraint, session=session,
            )  # fmt: skip
        except BaseException:
            self.held.close()
            raise
        self.held.callback(self.reply.close)
        self.reply.watch(self.leaves())

    def end(self) -> None:
        self.held.close()

    async def whole(self) -> dict[str, Any]:
        """The answer as one object.

        Raises:
            Refused: time is out, or the model failed.
            Gone: the client has left.
        """
        parts: list[list[Piece]] = [[] for _ in self.reply.choices]
        with self._told():
            async for pieces in self.reply.pieces():
                for piece in pieces:
                    parts[piece.choice].append(piece)
            await self.reply.commit()
        self.reply.measure()
        return self.shape.whole(parts, usage=self.reply.usage(), **self._session())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer in server-sent events. An error that comes too late for a status is an event."""
        try:
            with self._told():
                if opening := self.shape.opening(len(self.reply.choices)):
                    yield _event(self.shape.chunk(opening))
                async for pieces in self.reply.pieces():
                    yield b"".join(_event(self.shape.chunk([self.shape.piece(piece)])) for piece in pieces)
                await self.reply.commit()
        except Refused as error:
            yield _event(error.body)
            return
        except Gone:
            return
        self.reply.measure()
        last = self.shape.chunk([], usage=self.reply.usage(), **self._session())
        self.end()  # the client may go on with its session
        asked = self.request.stream_options
        yield (_event(last) if asked is not None and asked.include_usage else b"") + b"data: [DONE]\n\n"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Failures in words for the client."""
        try:
            yield
        except TimeoutError:
            message = f"the answer took more than this server's {self.service.options.timeout:g} s"
            raise Refused(504, message, code="timeout", headers={"x-should-retry": "false"}) from None
        except (Refused, Gone, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            log.error("a request failed", exc_info=error)
            raise Refused(500, f"the model failed on this request: {error}", code="model_failed") from None

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.service.at_hand += 1
        try:
            yield
        finally:
            self.service.at_hand -= 1

    # what the model is to read, and to make

    async def _works(self, session: Session | None) -> list[Work]:
        """The request's prompts as ids.

        Raises:
            Refused: messages that the template refuses, or more prompts than the queue is long.
        """
        request, most = self.request, self.service.options.queue
        if isinstance(request, ChatRequest):
            size, encode = sum(len(m.content) for m in request.messages), self._chat
        elif len(request.prompt) > most:
            raise Refused(400, f"{len(request.prompt)} prompts in a request; {most} may wait here", param="prompt")
        else:
            size, encode = sum(map(len, request.prompt)), self._prompts
        return await asyncio.to_thread(encode, session) if size > LONG else encode(session)

    def _chat(self, session: Session | None) -> list[Work]:
        assert isinstance(self.request, ChatRequest)
        template, messages = self.service.template, self.request.chat
        try:
            if session is None or not session.tokens:
                return [Work(template.first(messages))]
            return [Work([*session.pending, *template.next(messages)])]
        except ValueError as error:
            raise Refused(400, str(error), param="messages", code="template_refuses") from None

    def _prompts(self, session: Session | None) -> list[Work]:
        """A text begins as documents do, after an end-of-text token; ids are taken as they are."""
        assert isinstance(self.request, CompletionRequest)
        tokenizer, works = self.service.tokenizer, []
        begun = session is not None and session.tokens > 0
        for prompt in self.request.prompt:
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            before = session.pending if session else []
            if isinstance(prompt, str) and not begun:
                before = [tokenizer.eos_id]
            works.append(Work([*before, *ids], len(ids), prompt if isinstance(prompt, str) else ""))
            if self.request.echo and not isinstance(prompt, str):
                works[-1].text = tokenizer.decode(ids)
        return works

    def _max_tokens(self) -> int:
        request, most = self.request, self.service.options.max_tokens
        asked, default = request.max_tokens, SHORT_ANSWER
        if isinstance(request, ChatRequest):
            asked, default = request.max_completion_tokens or request.max_tokens, most
        if asked is not None and asked > most:
            raise Refused(400, f"max_tokens is at most {most} on this server, got {asked}", param="max_tokens")
        return min(default, most) if asked is None else asked

    async def _constraint(self) -> Callable[[], Constraint] | None:
        """What response_format allows; compiled in a thread."""
        form = self.request.response_format
        if form is None or form.type == "text":
            return None
        schema: dict[str, Any] = {"type": "object"}
        if form.type == "json_schema":
            if form.json_schema is None:
                raise Refused(400, "json_schema is missing", param="response_format.json_schema")
            schema = form.json_schema.json_schema
        try:
            from retentive.infer.structured import json_schema

            return await asyncio.to_thread(json_schema, schema, self.service.tokenizer)
        except (ImportError, ValueError) as error:
            raise Refused(400, str(error), param="response_format") from None

    def _session(self) -> dict[str, Any]:
        session = self.reply.session
        if session is None:
            return {}
        return {"session": {"name": self.request.session, "tokens": session.tokens, "bytes": session.nbytes}}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

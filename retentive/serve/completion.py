"""Completion of a request: submits it to the engine, grows its choices, updates its session, and builds the response.

    completion = Completion(service, request, owner)
    await completion.begin(client_leaves)           submits the request, or raises Refused
    await completion.whole() / completion.events()  returns the response
    completion.close()                              always: cancels running streams and returns the session

All choices of all prompts of a request share one mailbox. Everything in it goes out together. A session is checked out
from before its prompt is encoded until just before the last bytes, so that a client with the end of an answer may use
the session again at once.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from retentive.data.tools import PLAIN, Notation
from retentive.infer import structured
from retentive.infer.conversation import Conversation
from retentive.infer.generate import check_prompt
from retentive.infer.requests import Constraint, Full, Returns
from retentive.infer.text import Text
from retentive.sampling import SamplingParams
from retentive.serve.async_engine import Mailbox
from retentive.serve.choices import Choice, Delta, Prompt
from retentive.serve.errors import Refused, try_later
from retentive.serve.items import ResponseRequest
from retentive.serve.messages import Tool
from retentive.serve.requests import ChatRequest, CompletionRequest
from retentive.serve.responses import ChatResponses, CompletionResponses, ItemResponses, Responses
from retentive.serve.service import Service

LONG = 20_000
"""Characters of a prompt, or log probabilities of a response, above which a thread does the work."""
MOST_ECHOED = 1 << 18
"""Maximum log probabilities of echoed prompts in one response, which is held in memory as a whole."""

RESPONSES: dict[type, type[Responses]] = {
    CompletionRequest: CompletionResponses,
    ChatRequest: ChatResponses,
    ResponseRequest: ItemResponses,
}
log = logging.getLogger("retentive.serve")
T = TypeVar("T")


class ClientLeft(Exception):
    """The client has closed the connection, so nobody reads the response."""


class Completion:
    """Completion of one request. The module says the order of calls.

    Args:
        owner: owner of the sessions that it may use.
        request_id: id in the log.
    """

    def __init__(self, service: Service, request: ChatRequest | CompletionRequest, owner: str, request_id: str = ""):
        self.service, self.request, self.owner, self.request_id = service, request, owner, request_id
        self.began = time.perf_counter()
        self.n, self.top = request.n or 1, request.logprob_count
        self.params = request.sampling(service.sampling or SamplingParams())
        self.max_tokens = request.length(service.options.max_tokens)
        self.conversation: Conversation = service.new_conversation()
        self.mailbox = Mailbox()
        self.prompts: list[Prompt] = []
        self.choices: list[Choice] = []
        # undone in reverse by `close`: streams, timers, the session's checkout, the count of requests in flight
        self.exits = ExitStack()
        usage = request.stream_options is not None and request.stream_options.include_usage
        kind = RESPONSES[type(request)]
        self.responses = kind(
            service.name, service.tokenizer, logprobs=self.top is not None, usage=usage, echoed=request.echoed
        )
        self.notation: Notation | None = None

    async def begin(self, client_leaves: Callable[[], Awaitable[None]]) -> None:
        """Checks the request and submits it to the engine.

        Args:
            client_leaves: returns when the client has left.

        Raises:
            Refused: the request is invalid, there is no room, or the time is over.
            ClientLeft: the client left while its pictures and sound were opened.
        """
        request, service = self.request, self.service
        request.refuse_what_is_not_served()
        request.check_size(service.options)
        try:
            self.exits.enter_context(service.admit())
            if request.session is not None:  # before encoding, since the prompt depends on the session
                checkout = service.sessions.checkout(self.owner, request.session, new=True)
                self.conversation = self.exits.enter_context(checkout)
            self._check_fields()
            self._find_notation()
            self.constraint = await self._constraint()
            self._watch(client_leaves)
            encode = partial(request.prompts, self.conversation, service.options, service.open_media)
            if request.media:
                with self._failures():
                    self.prompts = await self._unless_over(service.opening.submit(encode))
            else:
                self.prompts = await _in_thread(request.characters > LONG, encode)
            self._check_prompts()
            self.stop_ids, self.stop = request.stops(self.conversation)
            self.exits.callback(self._cancel)  # before the first submit: the queue may be full at the second
            for prompt in self.prompts:
                self._submit(prompt)
        except BaseException:  # a cancelled task must return its slots and session too
            self.close()
            raise

    def close(self) -> None:
        """Cancels running streams and returns slots and session. A second call does nothing."""
        self.exits.close()

    async def whole(self) -> bytes:
        """Returns the response as one JSON object, when all choices have ended.

        Raises:
            Refused: the time is over, or the model failed.
            ClientLeft: the client has left.
        """
        parts: list[list[Delta]] = [[] for _ in self.choices]
        with self._failures():
            async for deltas in self._deltas():
                for delta in deltas:
                    parts[delta.choice].append(delta)
            await self._remember()
        self._measure()
        body = await _in_thread(
            sum(len(delta.logprobs) for part in parts for delta in part) > LONG,
            partial(self.responses.whole, parts, usage=self._usage(), **self._session()),
        )
        self._keep()
        return body

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yields the response as server-sent events. Errors after the first one are events: the status is sent."""
        try:
            with self._failures():
                if opening := self.responses.opening(len(self.choices)):
                    yield opening
                async for deltas in self._deltas():
                    large = sum(len(delta.logprobs) for delta in deltas) > LONG
                    yield await _in_thread(large, partial(self.responses.chunks, deltas))
                await self._remember()
        except Refused as error:
            yield self.responses.failed(error.body)
            return
        except ClientLeft:
            return
        self._measure()
        self._keep()
        closing = self.responses.closing(usage=self._usage(), **self._session())
        self.close()  # before the last bytes, after which the client may use its session again
        yield closing

    # checking and submitting

    def _check_fields(self) -> None:
        """Raises Refused for values that the engine would refuse; names the field."""
        engine, vocab = self.service.engine, self.service.model.config.vocab_size
        if self.n > engine.slots:
            raise Refused(400, f"n must be from 1 to {engine.slots}, this server's slots, got {self.n}", param="n")
        if outside := [id for id in self.params.bias if not 0 <= id < vocab]:
            raise Refused(400, f"tokens must be in [0, {vocab}), got {outside[0]}", param="logit_bias")
        most = self.service.options.queue  # each prompt takes one place
        if not isinstance(self.request, CompletionRequest):
            return
        if len(self.request.prompt) > most:
            message = f"{len(self.request.prompt)} prompts in a request; {most} may wait here"
            raise Refused(400, message, param="prompt")
        for prompt in self.request.prompt:
            if not isinstance(prompt, str):
                self._check_ids(prompt)  # before an echo decodes them

    def _check_prompts(self) -> None:
        """Raises Refused for prompts that are empty, too long, or hold ids outside the vocabulary."""
        options, param = self.service.options, self.request.prompt_field
        for prompt in self.prompts:
            if not prompt.ids:
                raise Refused(400, "the prompt is empty", param=param)
            if len(prompt.ids) > options.max_prompt:
                message = f"the prompt has {len(prompt.ids)} tokens, this server takes {options.max_prompt}"
                raise Refused(400, message, param=param, code="context_length_exceeded")
            if not prompt.rows:  # else `submit` does, which knows the placeholders
                self._check_ids(prompt.ids)
        echoed = sum(prompt.sent for prompt in self.prompts if prompt.text is not None)
        if self.top is not None and (asked := echoed * self.n * (1 + self.top)) > MOST_ECHOED:
            message = f"an echo has at most {MOST_ECHOED} log probabilities, this one would have {asked}"
            raise Refused(400, message, param="logprobs")

    def _check_ids(self, ids: list[int]) -> None:
        try:
            check_prompt(ids, self.service.model.config.vocab_size)
        except ValueError as error:
            raise Refused(400, str(error), param=self.request.prompt_field) from None

    def _find_notation(self) -> None:
        """Finds the notation of the calls that may come; a template that shows no tools has a plain one."""
        if self.request.offered_tools:
            template = self.conversation.template
            self.notation = template.notation if template.shows_tools else PLAIN

    async def _constraint(self) -> Callable[[], Constraint] | None:
        """Returns a function that makes constraints for response_format or tools; None for any text.

        Raises:
            Refused: a schema cannot be used.
        """
        schema = self._schema()
        if self.notation is not None:
            return await self._compiled("tools", self._calls_of, self.request.offered_tools, self.notation, schema)
        if schema is None:
            return None
        return await self._compiled("response_format", structured.json_schema, schema, self.service.tokenizer)

    def _schema(self) -> dict[str, Any] | None:
        """Returns the JSON schema of response_format; None for any text."""
        form = self.request.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return {"type": "object"}
        if form.json_schema is None:
            raise Refused(400, "json_schema is missing", param="response_format.json_schema")
        return form.json_schema.json_schema

    def _calls_of(
        self, tools: Sequence[Tool], notation: Notation, answer: dict[str, Any] | None
    ) -> Callable[[], Constraint]:
        return structured.tool_calls(
            {tool.function.name: tool.schema_of_arguments for tool in tools},
            notation,
            self.service.tokenizer,
            required=self.request.must_call,
            several=self.request.several_calls,
            answer=answer,
            ends=self.request.stops(self.conversation)[0],
        )

    async def _compiled(self, param: str, compiled: Callable[..., T], *args: Any) -> T:
        """Returns `compiled(*args)` from a thread, since a large schema takes seconds; refuses what it refuses."""
        try:
            return await asyncio.to_thread(compiled, *args)
        except (ImportError, ValueError) as error:
            raise Refused(400, str(error), param=param) from None

    def _submit(self, prompt: Prompt) -> None:
        """Submits a prompt and adds its n choices; raises Refused if the queue is full."""
        engine, first, echo = self.service.engine, len(self.choices), prompt.text is not None
        try:
            streams = self.conversation.submit(
                prompt.ids,
                self.params,
                rows=prompt.rows,
                max_tokens=max(self.max_tokens, 1),  # the engine makes at least one; see Choice.max_tokens
                stop_ids=sorted(self.stop_ids),
                n=self.n,
                constraint=self.constraint,
                returns=Returns(
                    top=min(self.top or 0, self.service.model.config.vocab_size),  # a small vocabulary may have fewer
                    prompt=echo and self.top is not None,
                    state=self.request.session is not None,
                ),
                deliver=engine.into(self.mailbox, first, self.n),
            )
        except Full as error:
            raise try_later(str(error), status=503 if engine.closing else 429) from None
        except ValueError as error:
            raise Refused(400, str(error), param=self.request.prompt_field if prompt.rows else None) from None
        tokenizer = self.service.tokenizer
        for index, stream in enumerate(streams, first):
            text = Text(tokenizer, self.stop)
            logprobs, trims = self.top is not None, isinstance(self.request, ChatRequest)
            choice = Choice(index, prompt, stream, tokenizer, text, self.max_tokens, logprobs, trims, self.notation)
            self.choices.append(choice)

    def _watch(self, client_leaves: Callable[[], Awaitable[None]]) -> None:
        """Puts into the mailbox, as items, that the client has left and that the time is over."""
        loop = asyncio.get_running_loop()

        async def wait() -> None:
            await client_leaves()
            self.mailbox.put(0, ClientLeft())

        end = self.began + self.service.options.timeout
        self.exits.callback(loop.create_task(wait()).cancel)
        self.exits.callback(loop.call_at(end, self.mailbox.put, 0, TimeoutError()).cancel)

    async def _unless_over(self, work: Future[T]) -> T:
        """Returns the result of `work`, or raises what `_watch` puts into the mailbox first, and cancels the work."""
        result: asyncio.Future[Any] = asyncio.wrap_future(work)
        over: asyncio.Future[Any] = asyncio.ensure_future(self.mailbox.take())
        try:
            await asyncio.wait({result, over}, return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                [(_, why), *_] = over.result()
                assert isinstance(why, Exception)
                raise why
            return result.result()
        finally:
            result.cancel()
            over.cancel()

    def _cancel(self) -> None:
        for choice in self.choices:
            choice.stream.cancel()

    # while it runs

    async def _deltas(self) -> AsyncIterator[list[Delta]]:
        """Yields a delta for each choice that has grown since the last time, until all have ended.

        Raises:
            ClientLeft, TimeoutError: from `_watch`.
            Refused: the server is stopping.
            Exception: from the engine.
        """
        left = len(self.choices)
        while left:
            items, grown = await self.mailbox.take(), dict[int, Choice]()
            now = time.perf_counter()
            for index, item in items:
                if isinstance(item, Exception):
                    raise item
                choice = self.choices[index]
                if choice.finish is not None:
                    continue  # tokens after a stop string, made before the stream was cancelled
                if item is None and choice.stream.reason == "cancelled":
                    raise try_later("the server is stopping", status=503)
                if choice.first_at is None:  # the first token: the prompt has been read
                    await _in_thread(choice.prompt.sent > LONG, choice.echo)
                choice.push(item, now)
                grown[index] = choice
                left -= choice.finish is not None
            if deltas := [delta for choice in grown.values() if (delta := choice.delta())]:
                yield deltas

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns errors into Refused for the client; the log gets the traceback."""
        try:
            yield
        except TimeoutError:
            message = f"the answer took more than this server's {self.service.options.timeout:g} s"
            raise Refused(504, message, code="timeout", headers={"x-should-retry": "false"}) from None
        except (Refused, ClientLeft, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            if isinstance(error, ValueError) and self.constraint is not None:
                # a grammar that is too large fails only when the text comes to the large part of it
                param = "response_format" if self.notation is None else "tools"
                raise Refused(400, str(error), param=param, code="schema_refused") from None
            log.error("request %s failed", self.request_id, exc_info=error)
            raise Refused(500, f"the model failed on this request: {error}", code="model_failed") from None

    # when it has ended

    async def _remember(self) -> None:
        """Takes the end of the stream into the session, which until here was as it was before the request."""
        if self.request.session is None:
            return
        [choice] = self.choices
        if choice.text.stopped:  # the stream's state has read beyond the stop string: keep the ids up to it instead
            self.conversation.cut(choice.stream, choice.text.kept_ids())
            await self._catch_up()
            return
        # max_tokens 0: the one token that was made belongs to nobody; and a stop token is the template's to write
        made = choice.stream.pending if self.max_tokens else []
        self.conversation.remember(choice.stream, [id for id in made if id not in self.stop_ids])

    async def _catch_up(self) -> None:
        """Reads the pending ids now, so that the next request is fast; if the queue is full, that one reads them."""
        mailbox, conversation, engine = Mailbox(), self.conversation, self.service.engine
        try:
            deliver = engine.into(mailbox, 0, 1)
            [stream] = conversation.submit(
                conversation.memory.pending, max_tokens=1, returns=Returns(state=True), deliver=deliver
            )
        except Full:
            return
        try:
            while stream.reason is None:
                await mailbox.take()
        finally:
            stream.cancel()
        if stream.state is not None:
            conversation.remember(stream, [])

    def _usage(self) -> dict[str, Any]:
        """Tokens of prompts and completions, as OpenAI counts them."""
        read = sum(len(prompt.ids) for prompt in self.prompts)
        made = sum(len(choice.ids) for choice in self.choices)
        cached = sum(choice.stream.cached for choice in self.choices[:: self.n])  # n choices share one prompt
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _session(self) -> dict[str, Any]:
        """The response's field about the session, if there is one."""
        if self.request.session is None:
            return {}
        return {"session": described(self.request.session, self.conversation)}

    def _keep(self) -> None:
        """Keeps the response for later requests, where its API refers to earlier ones."""
        if isinstance(self.request, ResponseRequest) and isinstance(self.responses, ItemResponses):
            self.request.keep(self.service.kept, self.owner, self.responses)

    def _measure(self) -> None:
        """Observes latencies in the metrics."""
        now, metrics = time.perf_counter(), self.service.metrics
        metrics.seconds.observe(now - self.began)
        for choice in self.choices:
            if choice.first_at is not None:
                metrics.first.observe(choice.first_at - self.began)
                if len(choice.ids) > 1:  # of the tokens after the first
                    metrics.token.observe((choice.last_at - choice.first_at) / (len(choice.ids) - 1))


def described(name: str, conversation: Conversation) -> dict[str, Any]:
    """The JSON of a session in responses."""
    return {"name": name, "tokens": conversation.memory.tokens, "bytes": conversation.nbytes}


async def _in_thread(large: bool, work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread if `large`: on the event loop it would hold up everybody's tokens."""
    return await asyncio.to_thread(work) if large else work()

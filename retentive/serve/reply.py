"""The answer to one request while it grows: tokens from the engine become pieces of text, until each choice has ended.

    reply = Reply(service, request, works, session)     submits, or is refused
    async for pieces in reply.pieces()                  what has come since the last time, a piece for each choice
    await reply.commit()                                the session has read it all
    reply.close()                                       in any case: whatever still runs gives its slot back

All choices of all prompts of a request share one mailbox, and what has come by the time it is opened goes out together.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from retentive.data.tokenizer import Tokenizer
from retentive.infer.generate import Text, Token
from retentive.infer.requests import Constraint, Full, Returns, Stream
from retentive.models.state import State
from retentive.serve.bridge import Item, Mailbox
from retentive.serve.errors import Refused, wait
from retentive.serve.service import Service
from retentive.serve.sessions import Session
from retentive.serve.wire import Generation


class Gone(Exception):
    """The client has left."""


class Entry(NamedTuple):
    """A token with its log probability, and where its text begins."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


class Piece(NamedTuple):
    """What a choice has grown by."""

    choice: int
    text: str
    entries: list[Entry]
    finish: str | None


@dataclass
class Work:
    """A prompt of a request."""

    ids: list[int]
    """What the model is to read."""
    shown: int = 0
    """So many at the end are what the client sent, for an echo."""
    text: str = ""
    """The same as text."""


@dataclass
class Choice:
    """One continuation of one prompt."""

    index: int
    work: Work
    stream: Stream
    tokenizer: Tokenizer
    text: Text
    max_tokens: int
    logprobs: bool
    echo: str | None
    ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Characters of text after each of the ids, as far as they were whole."""
    said: list[str] = field(default_factory=list)
    """What was given out, in pieces."""
    given: int = 0
    """Its characters."""
    finish: str | None = None
    new_text: str = ""
    new_entries: list[Entry] = field(default_factory=list)
    first_at: float | None = None
    last_at: float = 0

    def feed(self, item: Token | None, now: float) -> None:
        """Take in a token, or that there are no more."""
        if self.first_at is None:
            self.first_at = now
            self._echo()
        self.last_at = now
        if item is None:
            self._give(self.text.flush())
            self.finish = "length" if self.stream.reason == "length" and not self.text.stopped else "stop"
        elif self.max_tokens:
            self._take(item)

    def _take(self, token: Token) -> None:
        start = self.lengths[-1] if self.lengths else 0
        piece = self.text.push(token.id)
        self.ids.append(token.id)
        self.lengths.append(self.given + len(piece) + len(self.text.held))
        if self.logprobs:
            self.new_entries.append(Entry(token.id, token.logprob, token.top, len(self.echo or "") + start))
        self._give(piece)
        if self.text.stopped:
            self.finish = "stop"
            self.stream.cancel()

    def _give(self, piece: str) -> None:
        self.new_text += piece
        self.said.append(piece)
        self.given += len(piece)

    def _echo(self) -> None:
        if self.echo is None:
            return
        self.new_text = self.echo
        if self.logprobs:
            decoder, offset, first = self.tokenizer.stream(), 0, len(self.work.ids) - self.work.shown
            for n, id in enumerate(self.work.ids[first:], first):
                logprob = self.stream.prompt_logprobs[n - 1] if n else None
                top = self.stream.prompt_tops[n - 1] if n and self.stream.prompt_tops else ()
                self.new_entries.append(Entry(id, logprob, top, offset))
                offset += len(decoder.push(id))

    def news(self) -> Piece | None:
        """What there is to give out, once."""
        if not self.new_text and self.finish is None:
            return None
        end, entries = len(self.echo or "") + self.given, self.new_entries
        if self.text.stopped or self.finish is None:  # tokens of text that is held back, or cut off
            entries = [e for e in entries if e.offset < end]
        piece = Piece(self.index, self.new_text, entries, self.finish)
        self.new_text, self.new_entries = "", self.new_entries[len(entries) :]
        return piece

    def kept(self) -> list[int]:
        """The ids of what was given out, where a stop string cut off the rest: the model's own as far as they fit."""
        whole = max((n for n in self.lengths if n <= self.given), default=0)
        own = self.ids[: self.lengths.index(whole) + 1] if whole else []
        rest = "".join(self.said)[whole:]
        return own + (self.tokenizer.encode(rest) if rest else [])


class Reply:
    """See the module.

    Args:
        session: what was read before; None for nothing that is to be kept.

    Raises:
        Refused: a prompt that is empty or too long, ids that are none, no room.
    """

    def __init__(
        self,
        service: Service,
        request: Generation,
        works: Sequence[Work],
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        stop: Sequence[str],
        echo: bool = False,
        constraint: Callable[[], Constraint] | None = None,
        session: Session | None = None,
    ):
        self.service, self.works, self.session, self.stop_ids = service, works, session, stop_ids
        self.mailbox = Mailbox()
        self.choices: list[Choice] = []
        self.began = asyncio.get_running_loop().time()
        self.params, self.n = request.sampling(), request.n or 1
        self.watching: asyncio.Task[None] | None = None
        self.clock: asyncio.TimerHandle | None = None
        try:
            for work in works:
                self._check(work)
                streams = self._submit(work, max_tokens, request.logprob_count, echo, constraint)
                for stream in streams:
                    self.choices.append(
                        Choice(
                            len(self.choices),
                            work,
                            stream,
                            service.tokenizer,
                            Text(service.tokenizer, stop),
                            max_tokens,
                            logprobs=request.logprob_count is not None,
                            echo=work.text if echo else None,
                        )
                    )
        except BaseException:
            self.close()
            raise

    def _check(self, work: Work) -> None:
        most = self.service.options.max_prompt
        if not work.ids:
            raise Refused(400, "the prompt is empty", param="prompt")
        if len(work.ids) > most:
            message = f"the prompt has {len(work.ids)} tokens, this server takes {most}"
            raise Refused(400, message, code="context_length_exceeded")

    def _submit(
        self, work: Work, max_tokens: int, top: int | None, echo: bool, constraint: Callable[[], Constraint] | None
    ) -> list[Stream]:
        engine, session = self.service.engine, self.session
        try:
            return engine.submit(
                work.ids,
                self.params,
                max_tokens=max(max_tokens, 1),
                stop_ids=sorted(self.stop_ids),
                n=self.n,
                constraint=constraint,
                state=None if session is None else session.state,
                returns=Returns(
                    top=min(top or 0, self.service.model.config.vocab_size),
                    prompt=echo and top is not None,
                    state=session is not None,
                ),
                deliver=engine.into(self.mailbox, len(self.choices), self.n),
            )
        except Full as error:
            raise wait(str(error), status=503 if engine.closing else 429) from None
        except ValueError as error:
            raise Refused(400, str(error)) from None

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Lists of pieces until every choice has ended; the time-out, a client that left and errors are raised."""
        left = len(self.choices)
        while left:
            items, touched = await self.mailbox.take(), dict[int, Choice]()
            now = asyncio.get_running_loop().time()
            for index, item in items:
                choice = self._feed(index, item, now)
                if choice is not None:
                    touched[index] = choice
                    left -= choice.finish is not None
            if pieces := [piece for choice in touched.values() if (piece := choice.news())]:
                yield pieces

    def _feed(self, index: int, item: Item, now: float) -> Choice | None:
        if isinstance(item, Exception):
            raise item
        choice = self.choices[index]
        if choice.finish is not None:
            return None  # what came after a stop string
        if item is None and choice.stream.reason == "cancelled":
            raise wait("the server is stopping", status=503)
        choice.feed(item, now)
        return choice

    async def commit(self) -> None:
        """Now the session has read it all."""
        session = self.session
        if session is None:
            return
        (choice,) = self.choices
        stream, made = choice.stream, choice.ids
        state, pending = stream.state, stream.pending
        if choice.text.stopped:
            made = choice.kept()
            state, pending = await self._read([*choice.work.ids, *made], session)
        elif choice.max_tokens == 0 or (stream.reason == "stop" and self.stop_ids.issuperset(pending)):
            pending = []
        session.tokens += len(choice.work.ids) + len(made) - len(pending)
        session.state, session.pending = state, pending

    async def _read(self, ids: list[int], session: Session) -> tuple[State | None, list[int]]:
        """The state after `ids`; where there is no room to read them now, as it was, and they are pending."""
        mailbox = Mailbox()
        deliver = self.service.engine.into(mailbox, 0, 1)
        try:
            (stream,) = self.service.engine.submit(
                ids, max_tokens=1, state=session.state, returns=Returns(state=True), deliver=deliver
            )
        except Full:
            return session.state, ids
        try:
            while stream.reason is None:
                await mailbox.take()
        finally:
            stream.cancel()
        return (session.state, ids) if stream.state is None else (stream.state, [])

    def watch(self, leaves: Awaitable[None]) -> None:
        """From now on `pieces` raises Gone when the client `leaves`, and TimeoutError when time is out."""
        loop = asyncio.get_running_loop()

        async def wait_for_it() -> None:
            await leaves
            self.mailbox.put(0, Gone())

        self.watching = loop.create_task(wait_for_it())
        at = self.began + self.service.options.timeout
        self.clock = loop.call_at(at, self.mailbox.put, 0, TimeoutError())

    def close(self) -> None:
        """Whatever still runs gives its slot back."""
        for choice in self.choices:
            choice.stream.cancel()
        if self.watching is not None:
            self.watching.cancel()
        if self.clock is not None:
            self.clock.cancel()

    def usage(self) -> dict[str, Any]:
        """Tokens read and made, as OpenAI counts them."""
        read = sum(len(work.ids) for work in self.works)
        made = sum(len(choice.ids) for choice in self.choices)
        cached = sum(choice.stream.cached for choice in self.choices[:: self.n])
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def measure(self) -> None:
        """Tell the metrics how long it took."""
        now, metrics = asyncio.get_running_loop().time(), self.service.metrics
        metrics.seconds.observe(now - self.began)
        for choice in self.choices:
            if choice.first_at is not None:
                metrics.first.observe(choice.first_at - self.began)
                if len(choice.ids) > 1:
                    metrics.token.observe((choice.last_at - choice.first_at) / (len(choice.ids) - 1))

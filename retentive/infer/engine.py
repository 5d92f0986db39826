"""Continuous batching over slots of state: requests join and leave at every step, each in a slot of constant size.

    submit(ids, params) -> Stream of Token          from any thread
    step()                                          one piece of prompts read, one token for every running request
    start(), close()                                a thread that steps while there is work

The running requests are the first rows of one pool of states, decoded in place as one batch; who leaves is replaced by
the last row, so that joining or leaving copies one sequence's state and no more. Prompts are read in pieces between the
steps, several short ones packed into one call. A request's tokens depend on its own logits and generator alone.

RetNet and the Transformer twin alike: the engine asks of a state no more than `for_decoding`, `reserve`, `view`, `put`,
`cat` and `select`.
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from retentive.infer.cache import PrefixCache
from retentive.infer.generate import Token
from retentive.infer.sample import Sampler, SamplingParams, pick
from retentive.models import Model
from retentive.models.state import State


class Full(Exception):
    """The queue has no room: try again later."""


class Constraint(Protocol):
    """What may come next, as for JSON or a regular expression; one object per request."""

    def mask(self) -> Tensor:
        """Bool `[vocab]`: the tokens allowed now."""

    def accept(self, token: int) -> None:
        """The token that was picked."""


@dataclass
class Stream:
    """The tokens of one request, as they come: iterate over it. `reason` says at the end why there are no more."""

    ids: list[int]
    """The prompt."""
    cached: int = 0
    """Tokens of the prompt that a cached state had read."""
    reason: str | None = None
    """ "stop" (an id of stop_ids, not given out), "length", "cancelled" or "error"; None while it runs."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """Of prompt tokens 1, 2, …, given those before; where asked for."""
    prompt_tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """The likeliest tokens in the place of each of those, where asked for both."""
    state: State | None = None
    """What the model remembers at the end, where asked for: of all tokens but `pending`."""
    pending: list[int] = field(default_factory=list)
    """The last token, which has been picked but not read."""
    cancelled: bool = False
    deliver: Callable[[Token | Exception | None], object] | None = None
    """Called from the engine's thread with each token, an exception, or None at the end; iterate over it otherwise."""
    inbox: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[Token]:
        while (item := self.inbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        """No more tokens: its slot is free at the engine's next step."""
        self.cancelled = True


@dataclass
class Request:
    """One row to be: what the engine knows of a stream."""

    stream: Stream
    sampler: Sampler
    max_tokens: int | None
    stop_ids: frozenset[int]
    top: int
    constraint: Constraint | None
    keep_state: bool
    cacheable: bool
    """Not where it began from a state: what that has read is not in the ids, so its prefixes are nobody else's."""
    made: list[int] = field(default_factory=list)


@dataclass
class Prompt:
    """A prompt on its way into one state, and the requests that will go on from there (n > 1 share it)."""

    ids: list[int]
    requests: list[Request]
    state: Any  # State | None
    score: bool
    read: int = 0

    def worth_keeping(self, stretch: int) -> bool:
        """Whether others may begin with what has been read."""
        return self.read % stretch == 0 or self.read == len(self.ids)


class Engine:
    """A model that many share. All arguments but the model bound something.

    Args:
        slots: requests at once; each takes the memory of one state.
        piece: prompt tokens read between two steps.
        waiting: requests in the queue; more raise Full.
        cache: states of prompts read before, None for none.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 16,
        piece: int = 512,
        waiting: int = 256,
        cache: PrefixCache | None = None,
    ):
        if min(slots, piece, waiting) < 1:
            raise ValueError(f"slots, piece and waiting must be at least 1, got {slots}, {piece}, {waiting}")
        self.model, self.slots, self.piece, self.most_waiting, self.cache = model.eval(), slots, piece, waiting, cache
        self.queue: deque[Prompt] = deque()
        self.reading: list[Prompt] = []
        self.running: list[Request] = []
        self.pool: Any = None  # a State of `slots` sequences, the running ones first
        self.wake = threading.Condition()
        self.thread: threading.Thread | None = None
        self.closing = False
        self.counts = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "tokens": 0, "steps": 0}

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        max_tokens: int | None = None,
        stop_ids: Sequence[int] = (),
        n: int = 1,
        top: int = 0,
        score: bool = False,
        constraint: Callable[[], Constraint] | None = None,
        state: State | None = None,
        keep_state: bool = False,
        deliver: Sequence[Callable[[Token | Exception | None], object]] = (),
    ) -> list[Stream]:
        """`n` streams of tokens after `ids`, from seeds params.seed, params.seed + 1, …; the prompt is read once.

        Args:
            max_tokens: None for no end but a stop.
            top: so many likeliest tokens come with each token.
            score: log probabilities of the prompt too (and no cached state, which would not have them).
            constraint: makes what says which tokens may come, one for each stream.
            state: of one sequence, what the model has read before `ids`; it is left as it is.
            keep_state: leave the state of each stream in it at its end.
            deliver: a callback for each stream, in place of iterating.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, n not in 1 … slots, max_tokens below 1.
            Full: the queue is full.
        """
        ids, vocab, params = list(ids), self.model.config.vocab_size, params or SamplingParams()
        if not ids:
            raise ValueError("generation needs at least one token to begin from, got an empty prompt")
        if min(ids) < 0 or max(ids) >= vocab:
            raise ValueError(f"token ids must be in [0, {vocab}), got {min(ids)} to {max(ids)}")
        if not 1 <= n <= self.slots:
            raise ValueError(f"n must be from 1 to the engine's {self.slots} slots, got {n}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        streams, requests = [], []
        for i, callback in zip(range(n), itertools.chain(deliver, itertools.repeat(None))):  # noqa: B905 (endless)
            own = params if params.seed is None else replace(params, seed=params.seed + i)
            stream = Stream(ids, deliver=callback)
            streams.append(stream)
            sampler = Sampler(own, torch.tensor(ids), vocab)
            made = constraint() if constraint else None
            stops = frozenset(stop_ids)
            requests.append(Request(stream, sampler, max_tokens, stops, top, made, keep_state, state is None))
        with self.wake:
            if self.closing:
                raise Full("the engine is closing")
            if len(self.queue) >= self.most_waiting:
                raise Full(f"{len(self.queue)} requests are waiting already")
            self.queue.append(Prompt(ids, requests, state, score))
            self.counts["requests"] += n
            self.wake.notify()
        return streams

    # one step

    @property
    def taken(self) -> int:
        """Slots in use."""
        return len(self.running) + sum(len(p.requests) for p in self.reading)

    @torch.inference_mode()
    def step(self) -> bool:
        """Lets requests in and out, reads a piece of their prompts, decodes a token each; False if nothing was left."""
        self._drop_cancelled()
        self._admit()
        if not self.reading and not self.running:
            return False
        try:
            self._read()
            self._decode()
        except Exception as error:  # of the model, such as no memory: those concerned hear of it, others may go on
            for request in [*self.running, *(r for p in self.reading for r in p.requests)]:
                self._end(request, "error", error)
            self.running, self.reading, self.pool = [], [], None
        self.counts["steps"] += 1
        return True

    def _drop_cancelled(self) -> None:
        with self.wake:
            waiting = list(self.queue)
        for prompt in [*waiting, *self.reading]:
            for request in [r for r in prompt.requests if r.stream.cancelled]:
                prompt.requests.remove(request)
                self._end(request, "cancelled")
        with self.wake:
            self.queue = deque(p for p in self.queue if p.requests)
        self.reading = [p for p in self.reading if p.requests]
        for row in reversed(range(len(self.running))):
            if self.running[row].stream.cancelled:
                self._leave(row, "cancelled")

    def _admit(self) -> None:
        """First come, first served: who needs more slots than are free holds back those behind."""
        while True:
            with self.wake:
                if not self.queue or self.taken + len(self.queue[0].requests) > self.slots:
                    return
                prompt = self.queue.popleft()
                self.reading.append(prompt)
            if prompt.state is not None:
                prompt.state = prompt.state.clone()
            elif self.cache is not None and not prompt.score:
                prompt.read, prompt.state = self.cache.longest(prompt.ids)
            for request in prompt.requests:
                request.stream.cached = prompt.read
            self.counts["cached_tokens"] += prompt.read

    def _read(self) -> None:
        """One piece of the prompts, in order of arrival, as one packed call."""
        parts: list[tuple[Prompt, list[int]]] = []
        budget = self.piece
        for prompt in self.reading:
            take = min(budget, len(prompt.ids) - prompt.read)
            if self.cache is not None:  # stop where a state is worth keeping
                take = min(take, self.cache.stretch - prompt.read % self.cache.stretch)
            if take == 0:
                break
            parts.append((prompt, prompt.ids[prompt.read : prompt.read + take]))
            budget -= take
        if not parts:
            return
        ids = torch.tensor([[i for _, part in parts for i in part]], device=self._device)
        states: list[Any] = [self.model.init_state(1) if p.state is None else p.state for p, _ in parts]
        ends = list(itertools.accumulate(len(part) for _, part in parts))
        if len(parts) == 1:
            x, state = self.model.hidden(ids, states[0])
        else:
            cu = torch.tensor([0, *ends], device=self._device)
            x, state = self.model.hidden(ids, type(states[0]).cat(states), cu_seqlens=cu)
        self.counts["prompt_tokens"] += ends[-1]
        for n, ((prompt, part), end) in enumerate(zip(parts, ends, strict=True)):
            prompt.state = state if len(parts) == 1 else state.select(torch.tensor([n]))
            prompt.read += len(part)
            if prompt.score:
                self._score(prompt, part, x[0, end - len(part) : end])
            whole = prompt.read == len(prompt.ids)
            if self.cache is not None and prompt.requests[0].cacheable and prompt.worth_keeping(self.cache.stretch):
                self.cache.store(prompt.ids[: prompt.read], prompt.state)
            if whole:
                self.reading.remove(prompt)
                self._join(prompt, self.model.head(x[:, end - 1]))

    def _score(self, prompt: Prompt, part: list[int], x: Tensor) -> None:
        """Log probabilities of the tokens after those of the piece, the prompt's next one included."""
        following = prompt.ids[prompt.read - len(part) + 1 : prompt.read + 1]
        logprobs = self.model.head(x[: len(following)]).float().log_softmax(-1)
        found = logprobs.gather(1, torch.tensor(following, device=x.device)[:, None]).squeeze(1).tolist()
        for request in prompt.requests:
            request.stream.prompt_logprobs += found
            if request.top:
                top = logprobs.topk(request.top)
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                request.stream.prompt_tops += [tuple(zip(*pair, strict=True)) for pair in pairs]

    def _join(self, prompt: Prompt, logits: Tensor) -> None:
        """The prompt is read: its requests take rows of the pool and pick their first tokens."""
        first = len(self.running)
        if self.pool is None:
            self.pool = self.model.init_state(self.slots).for_decoding(self.model.embed.weight.dtype)
        self.pool = self.pool.reserve(int(prompt.state.position.max()) + 1)
        for request in prompt.requests:
            self.pool.put(len(self.running), prompt.state)
            self.running.append(request)
        rows = range(first, len(self.running))
        self._pick(logits.expand(len(rows), -1), list(rows))

    def _decode(self) -> None:
        n = len(self.running)
        if n == 0:
            return
        self.pool = self.pool.reserve(int(self.pool.position[:n].max()) + 1)
        ids = torch.tensor([[r.made[-1]] for r in self.running], device=self._device)
        x, state = self.model.hidden(ids, self.pool.view(n))
        self.pool.position[:n] = state.position
        self._pick(self.model.head(x[:, -1]), list(range(n)))

    def _pick(self, logits: Tensor, rows: list[int]) -> None:
        """A token for each of these rows; who has come to its end leaves."""
        requests = [self.running[row] for row in rows]
        masks = [r.constraint.mask() if r.constraint else None for r in requests]
        tokens, logprobs = pick(logits, [r.sampler for r in requests], masks)
        for row, request, token, logprob in reversed(list(zip(rows, requests, tokens, logprobs, strict=True))):
            request.made.append(token)
            if token in request.stop_ids:
                self._leave(row, "stop")
                continue
            if request.constraint:
                request.constraint.accept(token)
            top = logprob.topk(request.top) if request.top else None
            likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
            self._deliver(request.stream, Token(token, float(logprob[token]), likeliest))
            self.counts["tokens"] += 1
            if request.max_tokens is not None and len(request.made) == request.max_tokens:
                self._leave(row, "length")

    # endings

    def _leave(self, row: int, reason: str) -> None:
        """The request at `row` ends; the last one takes its place."""
        request, last = self.running[row], len(self.running) - 1
        cacheable = self.cache is not None and request.cacheable
        if reason != "cancelled" and (request.keep_state or cacheable):
            state = self.pool.select(torch.tensor([row]))
            if self.cache is not None and cacheable:
                self.cache.store([*request.stream.ids, *request.made[:-1]], state)
            if request.keep_state:
                request.stream.state, request.stream.pending = state, request.made[-1:]
        if row != last:
            self.pool.put(row, self.pool, last)
            self.running[row] = self.running[last]
        self.running.pop()
        self._end(request, reason)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        request.stream.reason = reason
        if error is not None:
            self._deliver(request.stream, error)
        self._deliver(request.stream, None)

    def _deliver(self, stream: Stream, item: Token | Exception | None) -> None:
        (stream.deliver or stream.inbox.put)(item)

    @property
    def _device(self) -> torch.device:
        return self.model.embed.weight.device

    # a thread of its own

    def start(self) -> "Engine":
        """Steps in a thread while there is work, until `close`."""
        self.thread = threading.Thread(target=self._run, name="retentive-engine", daemon=True)
        self.thread.start()
        return self

    def _run(self) -> None:
        while True:
            if self.step():
                continue
            with self.wake:
                if self.closing and not self.queue:
                    return
                if not self.queue:
                    self.wake.wait()

    def close(self, *, drain: bool = True) -> None:
        """No new requests; those at hand are finished, or cancelled if not `drain`; then the thread ends."""
        with self.wake:
            self.closing = True
            if not drain:
                for request in [*self.running, *(r for p in (*self.queue, *self.reading) for r in p.requests)]:
                    request.stream.cancel()
            self.wake.notify()
        if self.thread is not None:
            self.thread.join()
        elif not drain:
            self.step()

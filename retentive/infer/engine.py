"""Continuous batching over slots of state: requests join and leave at every step, each in a slot of constant size.

    submit(ids, params) -> Stream of Token          from any thread
    step()                                          one piece of prompts read, one token for every running request
    start(), close()                                a thread that steps while there is work

The running requests are the first rows of one pool of states, decoded in place as one batch; who leaves is replaced by
the last row, so that joining or leaving copies one sequence's state and no more. Prompts are read in pieces between the
steps, several packed into one call, all but their last token: that is decoded with the others' and gives the first of
the reply. A request's tokens depend on its own logits and generator alone, and its errors are its own: a constraint
that fails or a listener that is gone ends one stream.

RetNet and the Transformer twin alike: the engine asks of a state no more than `for_decoding`, `reserve`, `view`, `put`,
`cat` and `select`.
"""

import contextlib
import ctypes
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retentive.infer.cache import PrefixCache
from retentive.infer.generate import Token, check_prompt
from retentive.infer.requests import Constraint, Full, Prompt, Request, Stream
from retentive.infer.sample import Sampler, SamplingParams, pick
from retentive.models import Model
from retentive.models.state import HybridState, KVCache, State
from retentive.ops import Ring


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
        self.view: tuple[Any, int, Any] = (None, 0, None)  # a pool, n, its first n sequences
        self.wake = threading.Condition()
        self.thread: threading.Thread | None = None
        self.closing = self.abandoned = False
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
            ValueError: an empty prompt, ids outside the vocabulary, n not in 1 … slots, max_tokens below 1, top not in
                0 … vocab, a state that is not of one sequence of this model.
            Full: the queue is full.
        """
        ids, vocab, params = list(ids), self.model.config.vocab_size, params or SamplingParams()
        check_prompt(ids, vocab)
        if not 1 <= n <= self.slots:
            raise ValueError(f"n must be from 1 to the engine's {self.slots} slots, got {n}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        if not 0 <= top <= vocab:
            raise ValueError(f"top must be from 0 to the {vocab} tokens of the vocabulary, got {top}")
        if state is not None and form(state) != form(self.model.init_state(1)):
            raise ValueError(f"the state is not that of one sequence of this model: {form(state)}")
        streams, requests = [], []
        for i, callback in zip(range(n), itertools.chain(deliver, itertools.repeat(None))):  # noqa: B905 (endless)
            own = params if params.seed is None else replace(params, seed=params.seed + i)
            stream = Stream(ids, deliver=callback)
            streams.append(stream)
            sampler = Sampler(own, torch.tensor(ids), vocab)
            made = constraint() if constraint else None
            stops = frozenset(stop_ids) | ({made.eos_id} if made else set())
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
        self._read()
        self._decode()
        self.counts["steps"] += 1
        return True

    def _drop_cancelled(self) -> None:
        def gone(request: Request) -> bool:
            return request.stream.cancelled or self.abandoned

        with self.wake:
            waiting = list(self.queue)
        for prompt in [*waiting, *self.reading]:
            for request in [r for r in prompt.requests if gone(r)]:
                prompt.requests.remove(request)
                self._end(request, "cancelled")
        with self.wake:
            self.queue = deque(p for p in self.queue if p.requests)
        self.reading = [p for p in self.reading if p.requests]
        for row in reversed(range(len(self.running))):
            if gone(self.running[row]):
                self._leave(row, "cancelled")

    def _admit(self) -> None:
        """First come, first served: who needs more slots than are free holds back those behind."""
        while True:
            with self.wake:
                if not self.queue or self.taken + len(self.queue[0].requests) > self.slots:
                    return
                prompt = self.queue.popleft()
                self.reading.append(prompt)
            try:
                if prompt.state is not None:
                    prompt.state = prompt.state.clone().to(self._device)
                elif self.cache is not None and not prompt.score:
                    prompt.read, state = self.cache.longest(prompt.ids)
                    prompt.state = None if state is None else state.to(self._device)
            except Exception as error:  # no memory
                self._give_up([prompt], error)
            for request in prompt.requests:
                request.stream.cached = prompt.read
            self.counts["cached_tokens"] += prompt.read

    def _read(self) -> None:
        """One piece of the prompts, as one packed call; those that are read then join the batch."""
        parts = self._pieces()
        if parts:
            try:
                self._read_pieces(parts)
            except Exception as error:  # of the model, such as no memory
                self._give_up([prompt for prompt, _ in parts], error)
        for prompt in [p for p in self.reading if not p.left]:
            self._join(prompt)

    def _pieces(self) -> list[tuple[Prompt, list[int]]]:
        """What is read next: equal shares, and what short prompts leave of theirs for the longer ones."""
        prompts = sorted((p for p in self.reading if p.left), key=lambda p: p.left)
        budget, parts = max(self.piece, len(prompts)), []
        for n, prompt in enumerate(prompts):
            take = min(prompt.left, budget // (len(prompts) - n))
            if self.cache is not None:  # stop where a state is worth keeping
                take = min(take, self.cache.stretch - prompt.read % self.cache.stretch)
            parts.append((prompt, prompt.ids[prompt.read : prompt.read + take]))
            budget -= take
        return parts

    def _read_pieces(self, parts: list[tuple[Prompt, list[int]]]) -> None:
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
            if self.cache is not None and prompt.requests[0].cacheable and prompt.worth_keeping(self.cache.stretch):
                self.cache.store(prompt.ids[: prompt.read], prompt.state)

    def _score(self, prompt: Prompt, part: list[int], x: Tensor) -> None:
        """Log probabilities of the tokens after those of the piece."""
        following = prompt.ids[prompt.read - len(part) + 1 : prompt.read + 1]
        logprobs = self.model.head(x).float().log_softmax(-1)
        found = logprobs.gather(1, torch.tensor(following, device=x.device)[:, None]).squeeze(1).tolist()
        for request in prompt.requests:
            request.stream.prompt_logprobs += found
            if request.top:
                top = logprobs[: len(following)].topk(request.top)
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                request.stream.prompt_tops += [tuple(zip(*pair, strict=True)) for pair in pairs]

    def _join(self, prompt: Prompt) -> None:
        """The prompt is read: its requests take rows of the pool."""
        try:
            state = self.model.init_state(1) if prompt.state is None else prompt.state
            if self.pool is None:
                self.pool = self.model.init_state(self.slots).for_decoding(self.model.embed.weight.dtype)
            self.pool = self.pool.reserve(int(state.position) + 1)
            for row in range(len(self.running), len(self.running) + len(prompt.requests)):
                self.pool.put(row, state)
        except Exception as error:  # no memory
            self._give_up([prompt], error)
            return
        self.counts["prompt_tokens"] += 1
        self.reading.remove(prompt)
        self.running += prompt.requests

    def _decode(self) -> None:
        n = len(self.running)
        if n == 0:
            return
        try:
            self.pool = self.pool.reserve(int(self.pool.position[:n].max()) + 1)
            ids = [[r.made[-1] if r.made else r.stream.ids[-1]] for r in self.running]
            if self.view[0] is not self.pool or self.view[1] != n:
                self.view = (self.pool, n, self.pool.view(n))
            x, state = self.model.hidden(torch.tensor(ids, device=self._device), self.view[2])
            self.pool.position[:n] = state.position
            logits = self.model.head(x[:, -1]).float().cpu()
        except Exception as error:  # of the model, such as no memory: the pool may be half written
            for request in self.running:
                self._end(request, "error", error)
            self.running, self.pool, self.view = [], None, (None, 0, None)
            return
        self._pick(logits)

    def _pick(self, logits: Tensor) -> None:
        """A token for each row; who has come to its end leaves."""
        failed: dict[int, Exception] = {}
        masks: list[Tensor | None] = [None] * len(self.running)
        for row, (request, fit) in enumerate(zip(self.running, logits.amax(-1).isfinite().tolist(), strict=True)):
            try:
                if not fit:
                    logits[row] = 0
                    raise ArithmeticError("the model's logits are not finite")
                if request.constraint:
                    masks[row] = allowed(request.constraint, logits.shape[1])
            except Exception as error:
                failed[row] = error
        tokens, logprobs = pick(logits, [r.sampler for r in self.running], masks)
        chosen = logprobs.gather(1, torch.tensor(tokens)[:, None]).squeeze(1).tolist()
        for row in reversed(range(len(self.running))):
            try:
                if row in failed:
                    raise failed[row]
                self._take(row, tokens[row], chosen[row], logprobs)
            except Exception as error:  # of its constraint
                self._leave(row, "error", error)

    def _take(self, row: int, token: int, logprob: float, logprobs: Tensor) -> None:
        request = self.running[row]
        request.made.append(token)
        if token in request.stop_ids:
            self._leave(row, "stop")
            return
        if request.constraint:
            request.constraint.accept(token)
        top = logprobs[row].topk(request.top) if request.top else None
        likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
        self._deliver(request.stream, Token(token, logprob, likeliest))
        self.counts["tokens"] += 1
        if request.constraint and request.constraint.complete:
            self._leave(row, "stop")
        elif request.max_tokens is not None and len(request.made) == request.max_tokens:
            self._leave(row, "length")

    # endings

    def _leave(self, row: int, reason: str, error: Exception | None = None) -> None:
        """The request at `row` ends; the last one takes its place."""
        request, last = self.running[row], len(self.running) - 1
        cacheable = self.cache is not None and request.cacheable and reason != "cancelled"
        if error is None and (request.keep_state or cacheable):
            try:
                self._keep(row, request, cacheable)
            except Exception as no_memory:
                reason, error = "error", no_memory
        if row != last:
            self.pool.put(row, self.pool, last)
            self.running[row] = self.running[last]
        self.running.pop()
        self._end(request, reason, error)

    def _keep(self, row: int, request: Request, cacheable: bool) -> None:
        """The state of all tokens but the last, in the cache and in the stream."""
        state = self.model.init_state(1).reserve(int(self.pool.position[row]))
        state.put(0, self.pool, row)
        if self.cache is not None and cacheable:
            self.cache.store([*request.stream.ids, *request.made[:-1]], state)
        if request.keep_state:
            with torch.inference_mode(False):  # what is made in that mode cannot be written in place after it
                request.stream.state, request.stream.pending = state.clone(), request.made[-1:]

    def _give_up(self, prompts: list[Prompt], error: Exception) -> None:
        """Prompts that could not be read."""
        for prompt in prompts:
            self.reading.remove(prompt)
            for request in prompt.requests:
                self._end(request, "error", error)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        request.stream.reason = reason
        if error is not None:
            self._deliver(request.stream, error)
        self._deliver(request.stream, None)

    def _deliver(self, stream: Stream, item: Token | Exception | None) -> None:
        try:
            (stream.deliver or stream.inbox.put)(item)
        except Exception:  # whoever listened is gone
            stream.cancel()

    @property
    def _device(self) -> torch.device:
        return self.model.embed.weight.device

    # a thread of its own

    def start(self) -> "Engine":
        """Steps in a thread while there is work, until `close`."""
        release_workers()
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
            self.closing, self.abandoned = True, self.abandoned or not drain
            self.wake.notify()
        if self.thread is not None:
            self.thread.join()
        while self.step():  # where there is no thread
            continue


def release_workers() -> None:
    """Ends the OpenMP workers of the calling thread, which come back when it computes again.

    Each thread that computes has workers of its own. Where there are more of them than cores, GNU's OpenMP lets them
    sleep between two operations in place of spinning, and a small model's step takes twice as long (docs/LOG.md).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another runtime, or none
        ctypes.CDLL(None).omp_pause_resource_all(1)


def form(state: State) -> list[tuple[int, ...]]:
    """The shapes of a state's tensors, whatever number of tokens it holds."""
    if isinstance(state, HybridState):
        return [*form(state.retention), *form(state.cache)]
    if isinstance(state, KVCache):
        return [(x.shape[0], *x.shape[2:]) for x in (*state.keys, *state.values)]
    return [tuple((x.state if isinstance(x, Ring) else x).shape) for x in state.layers]


def allowed(constraint: Constraint, vocab: int) -> Tensor:
    """The constraint's mask, as long as the vocabulary.

    Raises:
        ValueError: a mask that is longer, or allows nothing.
    """
    mask = constraint.mask()
    if mask.dtype != torch.bool or mask.ndim != 1 or len(mask) > vocab or not bool(mask.any()):
        raise ValueError(f"a constraint must allow some of {vocab} tokens, got {mask.dtype} {list(mask.shape)}")
    return torch.nn.functional.pad(mask, (0, vocab - len(mask)))

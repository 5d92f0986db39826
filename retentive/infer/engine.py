"""Continuous batching over slots of state: requests join and leave at every step, each in one slot.

    submit(ids, params) -> Streams of Token         from any thread; `rows` gives pictures and sound among the ids
    step()                                          one prefill chunk, then one token for every running request
    start(), close()                                a thread that steps while there is work

Running requests are the first rows of one pool of states, decoded in place as one batch. The last row replaces a row
that is done, so joining or leaving copies one sequence's state only. Prompts are read between the steps (chunked
prefill), several packed into one call. Their last token is not prefilled: it is decoded with the batch and gives the
first token of the completion. Pictures and sound are encoded with the chunk that holds them, for all prompts in one
call. A request's tokens depend on its own logits and generator only. A failing constraint or callback ends one stream.

The engine handles token ids and states, not text. A `Decoder` does the computing. Of a state the engine uses only
`position`, `reserve`, `put` and `clone`.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retentive import machine
from retentive.data.media import Rows
from retentive.infer.cache import PrefixCache
from retentive.infer.decoder import Decoder, TorchDecoder
from retentive.infer.generate import Token, check_prompt
from retentive.infer.placeholders import Placeholders, embeddings
from retentive.infer.requests import Constraint, Full, Prompt, Request, Returns, Stream, allowed
from retentive.infer.sample import NOT_FINITE, Sampler, SamplingParams, pick, top_logprobs
from retentive.infer.schedule import shared
from retentive.models import LanguageModel
from retentive.models.state import State
from retentive.options import option
from retentive.threads import threads_for

OPERATIONS = 4
"""Operations per logit to sample a token: decides how many threads sampling is worth."""


class Engine:
    """Decodes many requests at once on one model.

    Args:
        model: a model of this package, or any other `Decoder`.
        slots: maximum running requests; each takes the memory of one state.
        prefill_chunk: maximum prompt tokens read between two steps, and rows encoded (or one picture, if larger). A
            larger chunk shortens the time to first token, a smaller one the latency between tokens of other requests.
        waiting: maximum requests in the queue; more raise Full.
        cache: prefix cache of prompts read before; None for none.
        state_dtype: dtype of the states of retention while decoding; None: float32. bfloat16 moves half of the bytes,
            int8 a quarter, which counts with many streams (results/state-precision has what they lose).
    """

    def __init__(
        self,
        model: LanguageModel | Decoder,
        *,
        slots: int = 16,
        prefill_chunk: int = 512,
        waiting: int = 256,
        cache: PrefixCache | None = None,
        state_dtype: torch.dtype | None = None,
    ):
        if min(slots, prefill_chunk, waiting) < 1:
            bounds = f"{slots}, {prefill_chunk}, {waiting}"
            raise ValueError(f"slots, prefill_chunk and waiting must be at least 1, got {bounds}")
        self.model: Any = model
        self.decoder: Decoder = TorchDecoder(model, state_dtype) if isinstance(model, torch.nn.Module) else model
        self.slots, self.prefill_chunk, self.most_waiting, self.cache = slots, prefill_chunk, waiting, cache
        # A request goes from `queue` to `reading` to `running`. Any thread may touch `queue`, under `wake`. The others
        # belong to the stepping thread and need no lock.
        self.queue: deque[Prompt] = deque()
        self.reading: list[Prompt] = []
        self.running: list[Request] = []
        self.pool: Any = None  # a State of `slots` sequences, made with the first request; row i belongs to running[i]
        self.wake = threading.Condition()
        self.thread: threading.Thread | None = None
        self.closing = self.abandoned = False
        self.counts = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "tokens": 0, "steps": 0}

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        rows: Rows | None = None,
        max_tokens: int | None = None,
        stop_ids: Sequence[int] = (),
        n: int = 1,
        constraint: Callable[[], Constraint] | None = None,
        state: State | None = None,
        returns: Returns = Returns(),  # noqa: B008 (frozen)
        deliver: Sequence[Callable[[Token | Exception | None], object]] = (),
    ) -> list[Stream]:
        """Queue a prompt, which is read once, for `n` streams of tokens with seeds params.seed, params.seed + 1, …

        Args:
            rows: rows of pictures and sound, per kind for all its placeholders among `ids`. Text must follow them.
            max_tokens: maximum tokens of a stream; None for no limit.
            stop_ids: tokens that end a stream; they are not returned.
            constraint: makes the constraint of one stream; called for each stream, since each has its own progress.
            state: state of one sequence before `ids`; it is copied, never written to.
            returns: results beside the tokens.
            deliver: a callback for each stream, instead of iterating; called from the stepping thread.

        Raises:
            ValueError: the prompt is empty, or has ids outside the vocabulary; n is not in 1 … slots, max_tokens below
                1, or returns.top not in 0 … vocab; the state is not of one sequence of this model. Or rows do not fit
                (`Placeholders`), no text follows them, or log probabilities of their prompt are requested.
            Full: the queue is full.
        """
        ids, vocab, params = list(ids), self.decoder.vocab_size, params or SamplingParams()
        placeholders = self._placeholders(ids, rows, returns)
        self._check(n, max_tokens, returns, state)
        key = None
        if self.cache is not None and state is None:
            key = ids if placeholders is None else placeholders.keys(ids)
        # all checks of a request are made here, in the caller's thread, before it is queued
        requests = []
        for i, callback in zip(range(n), itertools.chain(deliver, itertools.repeat(None))):  # noqa: B905 (endless)
            own = params if params.seed is None else replace(params, seed=params.seed + i)
            made = constraint() if constraint else None
            stops = frozenset(stop_ids) | ({made.eos_id} if made else set())
            sampler = Sampler(own, torch.tensor(ids), vocab, stops)
            stream = Stream(ids, deliver=callback)
            requests.append(Request(stream, sampler, max_tokens, stops, made, returns, key))
        with self.wake:  # reads `closing` under the lock too: nothing may be queued after the last step
            if self.closing:
                raise Full("the engine is closing")
            if len(self.queue) >= self.most_waiting:
                raise Full(f"too many requests are waiting already ({len(self.queue)})")
            self.queue.append(Prompt(ids, requests, state, placeholders))
            self.counts["requests"] += n
            self.wake.notify()
        return [request.stream for request in requests]

    def _placeholders(self, ids: list[int], rows: Rows | None, returns: Returns) -> Placeholders | None:
        """The placeholders of a prompt with rows; raises ValueError for ids or rows that do not fit."""
        placeholders = Placeholders(ids, rows, self.decoder.encoders) if rows else None
        check_prompt(ids, self.decoder.vocab_size, placeholders)
        if placeholders is not None and returns.prompt:
            raise ValueError("a prompt's own log probabilities are of text alone: leave out pictures and sound")
        if placeholders is not None and placeholders.end == len(ids):
            raise ValueError("the prompt ends with a picture or sound: put text after it")
        return placeholders

    def _check(self, n: int, max_tokens: int | None, returns: Returns, state: State | None) -> None:
        """Raise ValueError for arguments of `submit` that are out of range."""
        vocab = self.decoder.vocab_size
        if not 1 <= n <= self.slots:
            raise ValueError(f"n must be from 1 to {self.slots}, the engine's slots, got {n}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"{option('max_tokens', max_tokens)}: must be at least 1")
        if not 0 <= returns.top <= vocab:
            raise ValueError(f"top must be from 0 to the {vocab} tokens of the vocabulary, got {returns.top}")
        if state is not None and state.shapes != self.decoder.init_state().shapes:
            raise ValueError(f"the state is not that of one sequence of this model: {state.shapes}")

    # one step

    @property
    def taken(self) -> int:
        """Slots in use, including those that prompts still being read will need."""
        return len(self.running) + sum(len(p.requests) for p in self.reading)

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit and drop requests, prefill a chunk, decode a token each; returns False if there was nothing to do."""
        self._drop_cancelled()
        self._admit()
        if not self.reading and not self.running:
            return False
        self._prefill()
        self._decode()
        self.counts["steps"] += 1
        return True

    def _drop_cancelled(self) -> None:
        """End cancelled requests: queued, being read, or running."""

        def cancelled(request: Request) -> bool:
            return request.stream.cancelled or self.abandoned

        with self.wake:
            waiting = list(self.queue)
        # not under the lock: `_end` calls callbacks, which may submit and would deadlock
        for prompt in [*waiting, *self.reading]:
            for request in [r for r in prompt.requests if cancelled(r)]:
                prompt.requests.remove(request)
                self._end(request, "cancelled")
        with self.wake:  # filters the queue instead of replacing it: other threads may have submitted meanwhile
            self.queue = deque(p for p in self.queue if p.requests)
        self.reading = [p for p in self.reading if p.requests]
        for row in reversed(range(len(self.running))):  # from the end, because the last row moves into a gap
            if cancelled(self.running[row]):
                self._leave(row, "cancelled")

    def _admit(self) -> None:
        """Admit prompts, first come, first served: one that needs many slots holds back later ones, or would starve."""
        while True:
            with self.wake:
                if not self.queue or self.taken + len(self.queue[0].requests) > self.slots:
                    return
                prompt = self.queue.popleft()
                self.reading.append(prompt)
            try:
                if prompt.state is not None:
                    # a copy: several requests may continue from one state, and reading consumes it
                    prompt.state = self.decoder.adopt(prompt.state.clone())
                elif self.cache is not None and prompt.key is not None and not prompt.scored:
                    # a scored prompt needs log probabilities of all its tokens, which a cached state lacks
                    prompt.read, state = self.cache.longest(prompt.key)
                    prompt.state = None if state is None else self.decoder.adopt(state)
            except Exception as error:  # such as out of memory on the device
                self._fail([prompt], error)
            for request in prompt.requests:
                request.stream.cached = prompt.read
            self.counts["cached_tokens"] += prompt.read

    def _prefill(self) -> None:
        """Read one chunk of the prompts in one packed call; prompts that are read join the batch."""
        parts = shared(self.reading, self.prefill_chunk, self.cache.every if self.cache else None)
        # Scored prompts need logits after every token. They get a call of their own, so that the output matrix is not
        # applied to the others.
        for scored in (False, True):
            if group := [(prompt, part) for prompt, part in parts if prompt.scored == scored]:
                try:
                    self._read(group, scored)
                except Exception as error:  # of the model, such as out of memory: other prompts continue
                    self._fail([prompt for prompt, _ in group], error)
        for prompt in [p for p in self.reading if not p.left]:
            self._join(prompt)

    def _read(self, parts: list[tuple[Prompt, list[int]]], scored: bool) -> None:
        """Read these parts packed into one call, keep their states, and cache those that others may continue from."""
        ids = torch.tensor([i for _, part in parts for i in part])
        ends = list(itertools.accumulate(len(part) for _, part in parts))
        cu_seqlens = torch.tensor([0, *ends])
        states = [self.decoder.init_state() if prompt.state is None else prompt.state for prompt, _ in parts]
        if scored:
            logits, states = self.decoder.score(ids, cu_seqlens, states)
            logprobs = logits.log_softmax(-1).split([len(part) for _, part in parts])
        else:
            spans = [(prompt.placeholders, prompt.read, prompt.read + len(part)) for prompt, part in parts]
            encoded = embeddings(spans, self.decoder.encode)
            states, logprobs = self.decoder.read(ids, cu_seqlens, states, encoded), ()
        self.counts["prompt_tokens"] += ends[-1]
        for (prompt, part), state in zip(parts, states, strict=True):
            kept = self.cache is not None and prompt.until_kept(self.cache.every) == len(part)
            prompt.state = state
            prompt.read += len(part)
            if self.cache is not None and prompt.key is not None and kept:
                self.cache.store(prompt.key[: prompt.read], prompt.state)
        for (prompt, _), of_prompt in zip(parts, logprobs, strict=False):
            self._score(prompt, of_prompt)

    def _score(self, prompt: Prompt, logprobs: Tensor) -> None:
        """Record log probabilities of the prompt's next tokens, from those `[T, vocab]` after the T tokens read."""
        following = prompt.ids[prompt.read - len(logprobs) + 1 : prompt.read + 1]
        found = logprobs.gather(1, torch.tensor(following)[:, None]).squeeze(1).tolist()
        for request in prompt.requests:
            request.stream.prompt_logprobs += found
            if request.returns.top:
                request.stream.prompt_tops += top_logprobs(logprobs, request.returns.top)

    def _join(self, prompt: Prompt) -> None:
        """Start the requests of a read prompt: each takes the next row of the pool, with a copy of its state."""
        try:
            state = self.decoder.init_state() if prompt.state is None else prompt.state
            if self.pool is None:
                self.pool = self.decoder.pool(self.slots)
            self.pool = self.pool.reserve(int(state.position) + 1)  # room in KV caches; a RetNet needs none
            for row, request in enumerate(prompt.requests, len(self.running)):
                self.pool.put(row, state)
                if prompt.placeholders is not None and request.returns.state:
                    request.stream.prompt_state = _writable(state)
        except Exception as error:  # such as out of memory; rows beyond `running` may be half written: they are unused
            self._fail([prompt], error)
            return
        self.counts["prompt_tokens"] += 1  # the last token, which is decoded, not prefilled
        self.reading.remove(prompt)
        self.running += prompt.requests

    def _decode(self) -> None:
        """Decode one token for each running request, in one call."""
        n = len(self.running)
        if n == 0:
            return
        try:
            self.pool = self.pool.reserve(int(self.pool.position[:n].max()) + 1)
            ids = [r.made[-1] if r.made else r.stream.ids[-1] for r in self.running]
            logits = self.decoder.decode(torch.tensor(ids), self.pool)
            # more torch threads would keep spinning when the model's own threads want the cores
            with threads_for(OPERATIONS * logits.numel()):
                tokens, norms, failed = self._pick(logits)
        except Exception as error:  # of the model: the pool, written in place, may be inconsistent, so all requests end
            for request in self.running:
                self._end(request, "error", error)
            self.running, self.pool = [], None
            return
        chosen = (logits.gather(1, torch.tensor(tokens)[:, None]) - norms).squeeze(1).tolist()
        for row in reversed(range(n)):  # from the end, because the last row replaces one that leaves
            try:
                if row in failed:
                    raise failed[row]
                self._take(row, tokens[row], chosen[row], logits[row], norms[row])
            except Exception as error:  # of its constraint
                self._leave(row, "error", error)

    def _pick(self, logits: Tensor) -> tuple[list[int], Tensor, dict[int, Exception]]:
        """Pick a token for each row; returns (tokens, norms as by `pick`, errors by row).

        Errors wait until all tokens are picked: a row that left now would shift the other rows against their logits.
        """
        failed: dict[int, Exception] = {}
        masks: list[Tensor | None] = [None] * len(self.running)
        for row, (request, finite) in enumerate(zip(self.running, logits.amax(-1).isfinite().tolist(), strict=True)):
            try:
                if not finite:
                    logits[row] = 0  # `pick` needs finite numbers; its token for this row is discarded
                    raise ArithmeticError(NOT_FINITE)
                if request.constraint:
                    masks[row] = allowed(request.constraint, logits.shape[1])
            except Exception as error:
                failed[row] = error
        return *pick(logits, [r.sampler for r in self.running], masks), failed

    def _take(self, row: int, token: int, logprob: float, logits: Tensor, norm: Tensor) -> None:
        """Deliver the token, picked from logits `[vocab]`, to the request at `row`, which leaves after its last."""
        request = self.running[row]
        request.made.append(token)
        if token in request.stop_ids:
            self._leave(row, "stop")
            return
        if request.constraint:
            request.constraint.accept(token)
        count = request.returns.top
        top = top_logprobs((logits - norm)[None], count)[0] if count else ()
        self._deliver(request.stream, Token(token, logprob, top))
        self.counts["tokens"] += 1
        if request.constraint and request.constraint.complete:
            self._leave(row, "stop")
        elif request.max_tokens is not None and len(request.made) == request.max_tokens:
            self._leave(row, "length")

    # endings

    def _leave(self, row: int, reason: str, error: Exception | None = None) -> None:
        """End the request at `row`; the last row moves there, so that running requests stay the pool's first rows."""
        request, last = self.running[row], len(self.running) - 1
        cacheable = request.key is not None and reason != "cancelled"
        if error is None and (request.returns.state or cacheable):
            try:
                self._keep(row, request, cacheable)  # before the last row is copied over it
            except Exception as no_memory:
                reason, error = "error", no_memory
        if row != last:
            self.pool.put(row, self.pool, last)
            self.running[row] = self.running[last]
        self.running.pop()
        self._end(request, reason, error)

    def _keep(self, row: int, request: Request, cacheable: bool) -> None:
        """Put the state at `row` into the cache and the stream; it has read all tokens but the last."""
        state: Any = self.decoder.init_state().reserve(int(self.pool.position[row]))
        state.put(0, self.pool, row)
        if self.cache is not None and request.key is not None and cacheable:
            self.cache.store([*request.key, *request.made[:-1]], state)
        if request.returns.state:
            request.stream.state, request.stream.pending = _writable(state), request.made[-1:]

    def _fail(self, prompts: list[Prompt], error: Exception) -> None:
        """End all requests of prompts that could not be read."""
        for prompt in prompts:
            self.reading.remove(prompt)
            for request in prompt.requests:
                self._end(request, "error", error)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        request.stream.reason = reason  # before None is delivered, so that the reader of the end finds the reason
        if error is not None:
            self._deliver(request.stream, error)
        self._deliver(request.stream, None)

    def _deliver(self, stream: Stream, item: Token | Exception | None) -> None:
        try:
            (stream.deliver or stream.inbox.put)(item)
        except Exception:  # of the callback, such as a closed event loop: nothing receives the tokens any more
            stream.cancel()

    # a thread of its own

    def start(self) -> "Engine":
        """Start a thread that steps while there is work, until `close`."""
        machine.release_workers()  # the new thread gets its own OpenMP workers: twice as many would compete for cores
        self.thread = threading.Thread(target=self._run, name="retentive-engine", daemon=True)
        self.thread.start()
        return self

    def _run(self) -> None:
        """Step while there is work, and sleep until `submit` or `close` wakes the thread."""
        while True:
            if self.step():
                continue
            with self.wake:  # check again under the lock: a request queued since `step` would never wake this thread
                if self.closing and not self.queue:
                    return
                if not self.queue:
                    self.wake.wait()

    def close(self, *, drain: bool = True) -> None:
        """Refuse new requests, finish those in flight (or cancel them if not `drain`), and end the thread."""
        with self.wake:
            self.closing, self.abandoned = True, self.abandoned or not drain
            self.wake.notify()
        if self.thread is not None:
            self.thread.join()
        while self.step():  # without a thread, the remaining requests are finished here
            continue


def _writable(state: State) -> State:
    """Copy a state so that the caller may write to it: a copy made in inference mode would have inference tensors."""
    with torch.inference_mode(False):
        return state.clone()

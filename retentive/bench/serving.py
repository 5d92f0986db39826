"""`retentive bench serving`: engine against bare batched step, many streams against one, cache hit against miss.

The correctness gate: as many streams as slots, joining one by one, give the tokens that each gives alone. Interleaved:

    one       one stream through the engine
    engine    as many streams as slots through the engine
    bare      the same rows decoded by a loop of model and `pick`, without requests, queue and deliveries

    miss, hit     from `submit` to the first token, for a new prompt and for a repeated one
    waits         between two tokens of a stream, while a new prompt is read beside the others

Then one very long stream, with the bytes of its state and of the process at its start and its end. With --server, the
same streams go through the HTTP server (`http.py`), interleaved with the engine.
"""

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rich.filesize import decimal

from retentive import machine
from retentive.bench import http
from retentive.bench.lab import models
from retentive.bench.lab.clock import median_ratio, spread, turns
from retentive.bench.lab.options import Say, Sized, silent
from retentive.bench.lab.server import server
from retentive.infer import SamplingParams
from retentive.infer.cache import PrefixCache
from retentive.infer.decoder import STATES
from retentive.infer.engine import Engine
from retentive.infer.generate import step_threads
from retentive.infer.sample import Sampler, pick
from retentive.models import LanguageModel, cost
from retentive.options import at_least_one, known
from retentive.tables import duration, markdown

EARLY = 100
"""Tokens after which the memory of a stream is first measured."""
MODELS = ("retnet", *models.NATIVE)
PICTURE = None


@dataclass(frozen=True, kw_only=True)
class Options(Sized):
    """Serving: the engine's overhead, many streams against one, prefix-cache hits against misses, one long stream."""

    streams: int = 16
    """Simultaneous streams."""
    tokens: int = 256
    """Tokens of each stream per repetition."""
    prompt: int = 4000
    """Tokens of the prompt for the time to the first token."""
    long: int = 100_000
    """Tokens of the long stream; 0 skips it."""
    repeats: int = 5
    """Timed repetitions of each run, interleaved; the median counts."""
    server: bool = False
    """Also send the same streams through the HTTP server."""
    precision: str = "fp32"
    """Precision of the weights of retnet, bf16 or fp32."""
    state_precision: str = "fp32"
    """Precision of retention states of the models in C: fp32, bf16 or int8."""
    models: tuple[str, ...] = MODELS
    """Models, each with its own engine: retnet (needed). In C, with -bf16, -int8 or -int4: native, native-twin (its
    Transformer twin), native-hybrid. With activations of 8 bits beside weights of 8 or 4: native-w8a8, native-w4a8."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Returns tokens/s of the three (and of the server), seconds of a miss and a hit, and bytes of a long stream.

    Raises:
        ArithmeticError: the correctness gate failed.
        ValueError: a precision or model is unknown.
    """
    known([options.precision], models.PRECISIONS, "precision")
    models.check_states(options.state_precision, options.models)
    cpu, dtype = torch.device("cpu"), models.PRECISIONS[options.precision]
    names = models.chosen(options.models, MODELS, cpu, say)
    model, *others = (models.make(name, models.config_of(name, options.config), cpu, dtype) for name in names)
    of_others = dict(zip(names[1:], others, strict=True))
    return {"size": options.size, "precision": options.precision, **of_model(model, options, say, of_others)}


def of_model(
    model: LanguageModel, options: Options, say: Say = silent, others: Mapping[str, LanguageModel] | None = None
) -> dict[str, Any]:
    """As `measure` for this model, and the streams of other models through an engine."""
    streams, tokens, repeats = options.streams, options.tokens, options.repeats
    at_least_one(options, "streams", "tokens", "prompt", "repeats")
    # A batch that mixed up its rows would be as fast as a correct one. (In bf16, sums in torch depend on the batch by
    # more than the likeliest tokens differ, so the same code is checked in float32.)
    if model.dtype == torch.float32:
        gate(model, streams)
    runs = {
        "one": partial(through_engine, model, 1, streams, tokens),
        "engine": partial(through_engine, model, streams, streams, tokens),
        "bare": partial(bare, model, streams, tokens),
    }
    of_states = dict.fromkeys(others or {}, STATES[options.state_precision])
    for name, other in (others or {}).items():
        gate(other, streams, of_states[name])
        runs[name] = partial(through_engine, other, streams, streams, tokens, of_states[name])
    found = in_turns(runs, repeats, say)
    waits = {
        name: between_tokens(each, streams, tokens, options.prompt, of_states.get(name))
        for name, each in {"engine": model, **(others or {})}.items()
    }
    misses, hits = first_tokens(model, options.prompt, repeats)
    say(f"first token of {options.prompt} tokens: miss {duration(min(misses))}, hit {duration(min(hits))}")
    result: dict[str, Any] = {
        "what": "serving: the engine",
        "hardware": machine.describe(),
        "parameters": cost.parameters(model.config),
        "streams": streams,
        "tokens": tokens,
        "prompt": options.prompt,
        "state_precision": options.state_precision,
        "tokens_per_second": {name: spread([turn[name] for turn in found]) for name in runs},
        "streams_over_one": median_ratio(found, "engine", "one"),
        "engine_over_bare": median_ratio(found, "engine", "bare"),
        "native_over_engine": {name: median_ratio(found, name, "engine") for name in others or {}},
        "between_tokens": waits,
        "first_token": {"miss": spread(misses), "hit": spread(hits)},
        "miss_over_hit": statistics.median(misses) / statistics.median(hits),
    }
    if options.long:
        result["long_stream"] = long_stream(model, streams, options.long)
    if options.server:
        result["server"] = beside_server(model, runs["engine"], options, say)
    return result


def beside_server(model: LanguageModel, engine: Callable[[], float], options: Options, say: Say) -> dict[str, Any]:
    """Returns tokens/s of the streams through the engine and through `retentive serve`, interleaved, and their ratio.

    Raises:
        ArithmeticError: a stream's text is not the text of the model alone.
    """
    streams, tokens = options.streams, options.tokens
    tokenizer = http.library_tokenizer(model.config.vocab_size)
    asked = http.requests(model, tokenizer, prompts(model, streams, 2), tokens)
    # The engine beside it decodes by torch, too. No prefix cache, so that repetitions do not gain from prompts read
    # before.
    with server(model, tokenizer, "--slots", str(streams), "--cache", "0", "--engine", "torch") as (_, port):
        runs = {"engine": engine, "server": lambda: streams * tokens / http.through_server(port, asked)}
        found = in_turns(runs, options.repeats, say)
    return {
        "tokens_per_second": {name: spread([turn[name] for turn in found]) for name in runs},
        "server_over_engine": median_ratio(found, "server", "engine"),
    }


def in_turns(runs: Mapping[str, Callable[[], float]], repeats: int, say: Say) -> list[dict[str, float]]:
    """Returns tokens/s of each run by name, one dictionary per turn."""
    found = []
    for turn in turns(runs, repeats):
        found.append(turn)
        say(", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in turn.items()))
    return found


def prompts(model: LanguageModel, count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count, length), generator=generator).tolist()


def gate(model: LanguageModel, streams: int, state_dtype: torch.dtype | None = None) -> None:
    """Raises ArithmeticError unless streams that join one by one give the tokens that each gives alone."""
    # stepped from here and not by its thread, so that streams always join in the same order
    engine, made = Engine(model, slots=streams, state_dtype=state_dtype), []
    for n, ids in enumerate(prompts(model, streams, 9)):
        made += engine.submit(ids, SamplingParams(seed=n), max_tokens=24)
        engine.step()  # the next stream joins a batch that already decodes
    while engine.step():
        continue
    for n, (ids, stream) in enumerate(zip(prompts(model, streams, 9), made, strict=True)):
        alone = Engine(model, slots=1, state_dtype=state_dtype)
        want = alone.submit(ids, SamplingParams(seed=n), max_tokens=24)[0]
        while alone.step():
            continue
        if [t.id for t in stream] != [t.id for t in want]:
            raise ArithmeticError(f"stream {n} of {streams} gave other tokens than alone: not timed")


def through_engine(
    model: LanguageModel, streams: int, slots: int, tokens: int, state_dtype: torch.dtype | None = None
) -> float:
    """Returns tokens/s of `streams` simultaneous requests, delivered to callbacks from the engine's own thread."""
    engine, heard = Engine(model, slots=slots, state_dtype=state_dtype), [0] * streams

    def listener(n: int) -> Callable[[Any], object]:
        def hear(item: Any) -> None:
            heard[n] += item is not None  # None ends a stream

        return hear

    for n, ids in enumerate(prompts(model, streams, 2)):
        engine.submit(ids, SamplingParams(seed=n), max_tokens=tokens, deliver=[listener(n)])
    # all are queued before the thread starts; close() returns when the last has ended
    began = time.perf_counter()
    engine.start().close()
    seconds = time.perf_counter() - began
    if heard != [tokens] * streams:
        raise ArithmeticError(f"streams of {tokens} tokens gave {heard}")
    return streams * tokens / seconds


def between_tokens(
    model: LanguageModel, streams: int, tokens: int, prompt: int, state_dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Returns p50, p95 and the longest of the seconds between two tokens of a stream; midway a new prompt joins."""
    engine, heard = Engine(model, slots=streams + 1, state_dtype=state_dtype), [list[float]() for _ in range(streams)]
    ended, late = threading.Semaphore(0), prompts(model, 1, prompt, seed=1)[0]

    def listener(n: int) -> Callable[[Any], object]:
        def hear(item: Any) -> None:
            if item is None:
                ended.release()
                return
            heard[n].append(time.perf_counter())
            if n == 0 and len(heard[0]) == max(tokens // 2, 1):
                engine.submit(late, SamplingParams(seed=0), max_tokens=1, deliver=[lambda item: None])

        return hear

    for n, ids in enumerate(prompts(model, streams, 2)):
        engine.submit(ids, SamplingParams(seed=n), max_tokens=tokens, deliver=[listener(n)])
    engine.start()
    for _ in range(streams):
        ended.acquire()
    engine.close()
    gaps = sorted(b - a for times in heard for a, b in pairwise(times)) or [0.0]
    return {name: gaps[int(share * (len(gaps) - 1))] for name, share in (("p50", 0.5), ("p95", 0.95), ("most", 1.0))}


@torch.inference_mode()
def bare(model: LanguageModel, rows: int, tokens: int) -> float:
    """Returns tokens/s of the batched step with sampling: the bound for an engine without costs of its own."""
    begin = prompts(model, rows, 2)
    samplers = [
        Sampler(SamplingParams(seed=n), torch.tensor(ids), model.config.vocab_size) for n, ids in enumerate(begin)
    ]
    # as in the engine, so that the difference is only the engine's own work
    state: Any = model.init_state(rows).for_decoding(model.dtype)
    last = torch.tensor([ids[-1:] for ids in begin], device=model.device)
    began = time.perf_counter()
    for _ in range(tokens):
        with step_threads(model, rows, state):
            x, state = model.hidden(last, state)
            logits = model.head(x[:, -1])
        picked, _ = pick(logits, samplers)
        last = torch.tensor(picked, device=last.device)[:, None]
    return rows * tokens / (time.perf_counter() - began)


def first_tokens(model: LanguageModel, length: int, repeats: int) -> tuple[list[float], list[float]]:
    """Returns the seconds to the first token of new prompts and of repeated ones: (misses, hits)."""
    # a cache of 1 GB holds every prompt of the bench, so that no hit becomes a miss
    engine = Engine(model, cache=PrefixCache(1 << 30)).start()

    def once(ids: list[int]) -> float:
        began = time.perf_counter()
        (stream,) = engine.submit(ids, SamplingParams(seed=0), max_tokens=1)
        list(stream)  # waits for its only token
        return time.perf_counter() - began

    misses, hits = [], []
    # a miss, then its hit, so that both meet the same speed of the machine
    for ids in prompts(model, repeats + 1, length, seed=1):
        misses.append(once(ids))
        hits.append(once(ids))
    engine.close()
    return misses[1:], hits[1:]  # the first prompt warmed up


def long_stream(model: LanguageModel, slots: int, tokens: int) -> dict[str, Any]:
    """Returns the bytes of a stream's state and of the process, after EARLY tokens and after the last, and tokens/s."""
    engine, seen, count = Engine(model, slots=slots), [], 0

    def hear(item: Any) -> None:
        nonlocal count
        count += item is not None
        if item is not None and count in (EARLY, tokens):
            # the only stream is in the first slot
            seen.append({"tokens": count, "state": engine.pool.view(1).nbytes, "process": machine.held_memory()})

    engine.submit([1, 2], SamplingParams(seed=0), max_tokens=tokens, deliver=[hear])
    began = time.perf_counter()
    engine.start().close()
    return {"at": seen, "tokens_per_second": tokens / (time.perf_counter() - began)}


def table(result: dict[str, Any]) -> str:
    """Returns the result as Markdown tables."""
    rates = {name: rate["median"] for name, rate in result["tokens_per_second"].items()}
    streams = result["streams"]
    lines = [
        ["one stream", f"{rates['one']:,.0f}", ""],
        [f"{streams} streams", f"{rates['engine']:,.0f}", f"{result['streams_over_one']:.2f} times one stream"],
        [f"bare step, {streams} rows", f"{rates['bare']:,.0f}", f"engine {result['engine_over_bare']:.3f} times it"],
    ]
    for name, times in result.get("native_over_engine", {}).items():
        of = f"{times:.2f} times the engine with torch"
        lines.append([f"{streams} streams, {models.label(name, result)}", f"{rates[name]:,.0f}", of])
    if "server" in result:
        through = result["server"]["tokens_per_second"]["server"]["median"]
        beside = f"{result['server']['server_over_engine']:.3f} times the engine"
        lines.append([f"{streams} streams by HTTP", f"{through:,.0f}", beside])
    parts = [markdown(["", "tokens/s", "beside"], lines)]
    names = {"engine": "torch"} | {name: models.label(name, result) for name in result.get("native_over_engine", {})}
    gaps = [
        [names[name], *(duration(of[share]) for share in ("p50", "p95", "most"))]
        for name, of in result.get("between_tokens", {}).items()
    ]
    beside = f"between two tokens of {streams} streams, beside a prompt of {result['prompt']:,}"
    parts.append(markdown([beside, "p50", "p95", "longest"], gaps))
    first = result["first_token"]
    waits = [[name, duration(first[name]["median"])] for name in ("miss", "hit")]
    waits[1][1] += f" ({result['miss_over_hit']:.0f} times sooner)"
    parts.append(markdown([f"first token after {result['prompt']} tokens", "seconds"], waits))
    if "long_stream" in result:
        rows = [
            [f"{at['tokens']:,}", decimal(at["state"]), decimal(at["process"])] for at in result["long_stream"]["at"]
        ]
        parts.append(markdown(["tokens of a stream", "its state", "the process"], rows))
    return "\n\n".join(filter(None, parts))

"""The engine beside the bare batched step, many streams beside one, a prompt read before beside a new one.

First the gate: as many streams as slots, joining one by one, give the tokens that each gives alone. Then, taking turns:

    one       one stream through the engine
    engine    as many streams as slots through the engine
    bare      the same rows decoded by a loop of model and `pick`, no requests, no queue, no deliveries

    miss, hit     from `submit` to the first token, for a prompt never seen and for one seen before

and last, one stream for very many tokens: the bytes of its state and of the process at the beginning and at the end.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from retentive import machine
from retentive.bench.lab.tables import at_least_one, duration, markdown, size
from retentive.infer import SamplingParams, generate
from retentive.infer.cache import PrefixCache
from retentive.infer.engine import Engine
from retentive.infer.sample import Sampler, pick
from retentive.models import Model

EARLY = 100
"""Tokens after which a stream's memory is looked at first."""


def measure(
    model: Model,
    *,
    streams: int = 16,
    tokens: int = 256,
    prompt: int = 4000,
    long: int = 100_000,
    repeats: int = 5,
    server: Callable[[Model, int, int], dict[str, Any]] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Tokens/s of the three, seconds of a miss and a hit, bytes of a long stream.

    Args:
        streams: at once, and slots.
        tokens: of each stream, a repetition.
        prompt: tokens of the prompt whose first answer is timed.
        long: tokens of the long stream; 0 leaves it out.
        server: measures the same streams through a server, by (model, streams, tokens); left out if not given.

    Raises:
        ArithmeticError: the gate is red.
    """
    at_least_one("streams, tokens, prompt and repeats", [streams, tokens, prompt, repeats])
    gate(model, streams)
    rates: dict[str, list[float]] = {"one": [], "engine": [], "bare": []}
    for n in range(repeats + 1):
        rates["one"].append(through_engine(model, 1, streams, tokens))
        rates["engine"].append(through_engine(model, streams, streams, tokens))
        rates["bare"].append(bare(model, streams, tokens))
        if n:
            say(", ".join(f"{name} {taken[-1]:,.0f} tokens/s" for name, taken in rates.items()))
    misses, hits = first_tokens(model, prompt, repeats)
    say(f"first token of {prompt} tokens: miss {duration(min(misses))}, hit {duration(min(hits))}")
    result: dict[str, Any] = {
        "what": "serving: the engine",
        "hardware": machine.describe(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "streams": streams,
        "tokens": tokens,
        "prompt": prompt,
        "tokens_per_second": {name: summary(taken[1:]) for name, taken in rates.items()},
        "streams_over_one": paired(rates["engine"], rates["one"]),
        "engine_over_bare": paired(rates["engine"], rates["bare"]),
        "first_token": {"miss": summary(misses), "hit": summary(hits)},
        "miss_over_hit": statistics.median(misses) / statistics.median(hits),
    }
    if long:
        result["long_stream"] = long_stream(model, streams, long)
    if server is not None:
        result["server"] = server(model, streams, tokens)
    return result


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def paired(above: Sequence[float], below: Sequence[float]) -> float:
    """The median ratio of neighbours in time, the first of which warmed up."""
    return statistics.median(a / b for a, b in zip(above[1:], below[1:], strict=True))


def prompts(model: Model, count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (count, length), generator=generator).tolist()


def gate(model: Model, streams: int) -> None:
    """Raises ArithmeticError unless streams that join one by one give the tokens that `generate` gives."""
    engine, made = Engine(model, slots=streams), []
    for n, ids in enumerate(prompts(model, streams, 9)):
        made += engine.submit(ids, SamplingParams(seed=n), max_tokens=24)
        engine.step()
    while engine.step():
        continue
    for n, (ids, stream) in enumerate(zip(prompts(model, streams, 9), made, strict=True)):
        want = [t.id for t in generate(model, ids, SamplingParams(seed=n), max_tokens=24)]
        if [t.id for t in stream] != want:
            raise ArithmeticError(f"stream {n} of {streams} gave other tokens than alone: not timed")


def through_engine(model: Model, streams: int, slots: int, tokens: int) -> float:
    """Tokens/s of `streams` requests at once, delivered to callbacks, from the engine's own thread."""
    engine, heard = Engine(model, slots=slots), [0] * streams

    def listener(n: int) -> Callable[[Any], object]:
        def hear(item: Any) -> None:
            heard[n] += item is not None

        return hear

    for n, ids in enumerate(prompts(model, streams, 2)):
        engine.submit(ids, SamplingParams(seed=n), max_tokens=tokens, deliver=[listener(n)])
    began = time.perf_counter()
    engine.start().close()
    seconds = time.perf_counter() - began
    if heard != [tokens] * streams:
        raise ArithmeticError(f"streams of {tokens} tokens gave {heard}")
    return streams * tokens / seconds


@torch.inference_mode()
def bare(model: Model, rows: int, tokens: int) -> float:
    """Tokens/s of the batched step and `pick` alone."""
    begin = prompts(model, rows, 2)
    samplers = [
        Sampler(SamplingParams(seed=n), torch.tensor(ids), model.config.vocab_size) for n, ids in enumerate(begin)
    ]
    state: Any = model.init_state(rows).for_decoding(model.dtype)
    last = torch.tensor([ids[-1:] for ids in begin], device=model.device)
    began = time.perf_counter()
    for _ in range(tokens):
        x, state = model.hidden(last, state)
        picked, _ = pick(model.head(x[:, -1]), samplers)
        last = torch.tensor(picked, device=last.device)[:, None]
    return rows * tokens / (time.perf_counter() - began)


def first_tokens(model: Model, length: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds to the first token of prompts never seen, and of the same ones seen before."""
    engine = Engine(model, cache=PrefixCache(1 << 30)).start()

    def once(ids: list[int]) -> float:
        began = time.perf_counter()
        (stream,) = engine.submit(ids, SamplingParams(seed=0), max_tokens=1)
        list(stream)
        return time.perf_counter() - began

    misses, hits = [], []
    for ids in prompts(model, repeats + 1, length, seed=1):
        misses.append(once(ids))
        hits.append(once(ids))
    engine.close()
    return misses[1:], hits[1:]


def long_stream(model: Model, slots: int, tokens: int) -> dict[str, Any]:
    """Bytes of one stream's state and of the process after the first tokens and after the last."""
    engine, seen, count = Engine(model, slots=slots), [], 0

    def hear(item: Any) -> None:
        nonlocal count
        count += item is not None
        if item is not None and count in (EARLY, tokens):
            seen.append({"tokens": count, "state": engine.pool.view(1).nbytes, "process": resident()})

    engine.submit([1, 2], SamplingParams(seed=0), max_tokens=tokens, deliver=[hear])
    began = time.perf_counter()
    engine.start().close()
    return {"at": seen, "tokens_per_second": tokens / (time.perf_counter() - began)}


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    line = next(x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def table(result: dict[str, Any]) -> str:
    """The numbers as Markdown tables."""
    rates = {name: rate["median"] for name, rate in result["tokens_per_second"].items()}
    streams = result["streams"]
    lines = [
        ["one stream", f"{rates['one']:,.0f}", ""],
        [f"{streams} streams", f"{rates['engine']:,.0f}", f"{result['streams_over_one']:.2f} times one stream"],
        [f"bare step, {streams} rows", f"{rates['bare']:,.0f}", f"engine {result['engine_over_bare']:.3f} of it"],
    ]
    if "server" in result:
        through = result["server"]["tokens_per_second"]["server"]["median"]
        beside = f"{result['server']['server_over_engine']:.3f} of the engine"
        lines.append([f"{streams} streams by HTTP", f"{through:,.0f}", beside])
    parts = [markdown(["", "tokens/s", ""], lines)]
    first = result["first_token"]
    waits = [[name, duration(first[name]["median"])] for name in ("miss", "hit")]
    waits[1][1] += f" ({result['miss_over_hit']:.0f} times sooner)"
    parts.append(markdown([f"first token after {result['prompt']} tokens", "seconds"], waits))
    if "long_stream" in result:
        rows = [[f"{at['tokens']:,}", size(at["state"]), size(at["process"])] for at in result["long_stream"]["at"]]
        parts.append(markdown(["tokens of a stream", "its state", "the process"], rows))
    return "\n\n".join(parts)

"""Servers with many slots, ours and llama.cpp's: streams over HTTP, each after a long prompt of its own.

    native-int8, native-w8a8, …   `retentive serve` with a RetNet in C, states of 8 bits
    llamacpp-q8_0, …              `llama-server` with the Transformer twin of its size, if --llama-server names it

All streams begin at once. Servers take turns, each alone on the machine, with as many slots as streams. Temperature 1,
without top-k or top-p. The bench fails if a stream gives fewer tokens than it was asked for. `bench serving --server`
compares the texts of our server with those of the model alone.
"""

import json
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch

from retentive import machine
from retentive.bench import http
from retentive.bench.lab import llamacpp, models
from retentive.bench.lab.clock import turns
from retentive.bench.lab.options import Say, Sized, silent
from retentive.bench.lab.server import server
from retentive.bench.serving import prompts
from retentive.data.tokenizer import Tokenizer
from retentive.models import LanguageModel, build, cost
from retentive.options import at_least_one, known
from retentive.tables import duration, markdown

OURS = {
    "native-int8": ("--weights", "int8"),
    "native-w8a8": ("--weights", "int8", "--activations", "int8"),
    "native-w4a8": ("--weights", "int4", "--activations", "int8"),
}
"""Options of `retentive serve` for each of our models."""
PATIENCE = 300.0
"""Seconds until a server that does not answer has failed to start."""
PICTURE = None

Server: TypeAlias = Callable[[], AbstractContextManager[int]]
"""Starts a server and gives its port; kills it at the end of the block."""


@dataclass(frozen=True, kw_only=True)
class Options(Sized):
    """Servers with many slots, ours and llama.cpp's: tokens/s, and the time between two tokens of a stream."""

    streams: int = 16
    """Simultaneous streams."""
    prompt: int = 2048
    """Tokens of each stream's prompt."""
    tokens: int = 256
    """Tokens that each stream generates."""
    repeats: int = 2
    """Timed repetitions of each server, in turns; the median counts."""
    models: tuple[str, ...] = (*OURS, "llamacpp-q8_0", "llamacpp-q4_0")
    """Models, each with its own server."""
    llama_server: Path | None = None
    """Program `llama-server` of llama.cpp; without it, only ours are measured."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Returns a row per server.

    Raises:
        ArithmeticError: a stream gave fewer tokens than it was asked for.
        OSError: a server did not start.
        ValueError: a model is unknown, or the program llama-server is not there.
    """
    known(options.models, (*OURS, *models.LLAMACPP), "model")
    at_least_one(options, "streams", "prompt", "tokens", "repeats")
    program = options.llama_server
    if program is not None and not program.is_file():
        raise ValueError(f"--llama-server {program}: no such program; build it from the sources of llama.cpp")
    names = []
    for name in options.models:
        reason = models.missing(name, torch.device("cpu"))
        if name in models.LLAMACPP and not program:
            reason = reason or "--llama-server names no program"
        if reason:
            say(f"without {name}: {reason}")
        else:
            names.append(name)
    tokenizer = http.library_tokenizer(options.vocab_size)
    torch.manual_seed(0)
    model = build(options.config).bfloat16().eval()
    texts = prompts(model, options.streams, options.prompt)
    with tempfile.TemporaryDirectory(prefix="retentive-slots-") as folder:
        runs: dict[str, Callable[[], dict[str, float]]] = {}
        for name in names:
            if name in OURS:
                starting: Server = partial(of_ours, model, tokenizer, name, options.streams)
            else:
                made = Path(folder, name)
                made.mkdir()
                form = name.removeprefix("llamacpp-").upper()
                twin: Any = models.config_of(name, options.config)
                file = llamacpp.written(twin, form, made, tokenizer)
                starting = partial(of_llamacpp, str(program), file, options)
            runs[name] = partial(timed, starting, texts, options.tokens, tokenizer.eos_id)
        found = []
        for turn in turns(runs, options.repeats):
            found.append(turn)
            say(", ".join(f"{name} {each['tokens_per_second']:,.0f} tokens/s" for name, each in turn.items()))
    return {
        "size": options.size,
        "what": "servers with many slots",
        "hardware": machine.describe(),
        "parameters": cost.parameters(model.config),
        "streams": options.streams,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "rows": [{"model": name, **median_of([turn[name] for turn in found])} for name in names],
    }


@contextmanager
def of_ours(model: LanguageModel, tokenizer: Tokenizer, name: str, slots: int) -> Iterator[int]:
    """Yields the port of our server with this model."""
    how = ("--engine", "native", *OURS[name], "--state-precision", "int8", "--slots", str(slots), "--cache", "0")
    with server(model, tokenizer, *how) as (_, port):
        yield port


@contextmanager
def of_llamacpp(program: str, file: Path, options: Options) -> Iterator[int]:
    """Yields the port of llama.cpp's server with this model, and room for prompt and answer in each slot."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    room, threads = options.streams * (options.prompt + options.tokens + 16), torch.get_num_threads()
    command = [program, "--model", str(file), "--host", "127.0.0.1", "--port", str(port), "--no-webui"]
    command += ["--parallel", str(options.streams), "--ctx-size", str(room), "--cache-ram", "0"]
    command += ["--threads", str(threads), "--threads-batch", str(threads)]
    log = file.with_suffix(".log")
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            until = time.monotonic() + PATIENCE
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > until:
                    raise OSError(f"llama-server did not start: {(log.read_text().splitlines() or [''])[-1]}")
                time.sleep(0.1)
            yield port
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:  # URLError, too
        return False


def timed(starting: Server, texts: Sequence[list[int]], tokens: int, end: int) -> dict[str, float]:
    """Returns tokens/s and times of all streams through a server that is started for it.

    Args:
        texts: prompt of each stream, as tokens.
        end: token that ends a text; none is drawn.
    """
    asked = [request(ids, tokens, n, end) for n, ids in enumerate(texts)]
    with starting() as port:
        http.answers(port, [request([1, 2], 2, 0, end)])  # warm
        return times([arrivals(answer, tokens) for answer in http.answers(port, asked)], tokens)


def request(ids: list[int], tokens: int, seed: int, end: int) -> bytes:
    """Returns the request of a stream that does not end early, in fields that both servers accept."""
    body: dict[str, Any] = {"prompt": ids, "max_tokens": tokens, "seed": seed, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "temperature": 1.0}
    # OpenAI's field and llama.cpp's own, which forbids all tokens that end a text
    body |= {"logit_bias": {str(end): -100}, "ignore_eos": True}
    # as ours, all tokens, each by its probability; nothing is kept of a prompt for the next
    return http.request({**body, "samplers": ["temperature"], "cache_prompt": False})


def arrivals(answer: Sequence[tuple[float, bytes]], tokens: int) -> list[float]:
    """Returns the second at which each piece of a response's text came.

    A piece is a token, but for tokens that end within a character: those come with the next.

    Raises:
        ArithmeticError: the response has another number of tokens than `tokens`.
    """
    rest, at, usage = b"", [], None
    for second, part in answer:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                at += [second] * any(choice["text"] for choice in event.get("choices", []))
    if not usage or usage["completion_tokens"] != tokens:
        told = b"".join(part for _, part in answer)[-200:]
        raise ArithmeticError(f"a stream of {tokens} tokens counted {usage}: not timed; it ended with {told!r}")
    return at


def times(streams: Sequence[Sequence[float]], tokens: int) -> dict[str, float]:
    """Returns the results of one repetition.

    Args:
        streams: when each piece of each stream came.
        tokens: tokens of a stream.

    Returns:
        tokens_per_second: generated tokens of all streams, in the time of prompts and answers.
        first: median of seconds to a stream's first token.
        decoding: tokens/s while all streams decode: since the last has begun, until the first ends. 0 if never.
        p50, p95, most: seconds between two pieces of a stream in that time.
    """
    begun, ended = max(at[0] for at in streams), min(at[-1] for at in streams)
    gaps = sorted(b - a for at in streams for a, b in pairwise(at) if begun <= a and b <= ended) or [0.0]
    inside = sum(tokens / len(at) for at in streams for second in at if begun < second <= ended)
    return {
        "tokens_per_second": len(streams) * tokens / max(at[-1] for at in streams),
        "first": statistics.median(at[0] for at in streams),
        "decoding": inside / (ended - begun) if ended > begun else 0.0,
        **{name: gaps[int(share * (len(gaps) - 1))] for name, share in (("p50", 0.5), ("p95", 0.95), ("most", 1.0))},
    }


def median_of(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the median of each number."""
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def table(result: dict[str, Any]) -> str:
    """Returns the rows as a Markdown table."""
    heads = [
        "",
        "generated tokens/s, with the time for prompts",
        "first token",
        "tokens/s while all decode",
        "p50",
        "p95",
        "longest",
    ]
    lines = [
        [
            models.NAMES[row["model"]],
            f"{row['tokens_per_second']:,.0f}",
            duration(row["first"]),
            f"{row['decoding']:,.0f}",
            *(duration(row[share]) for share in ("p50", "p95", "most")),
        ]
        for row in result["rows"]
    ]
    return markdown(heads, lines)

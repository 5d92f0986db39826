"""The streams of `serving` once more, through the HTTP server: its process, its events, a client that only reads.

The server runs as `retentive serve` does, in a process of its own; the client is this one, whose thread reads what the
sockets have and looks at it when the time is taken. Every stream's text must be the one that `generate` gives alone, so
that nothing is gained by losing something. The engine is timed in turns with the server.
"""

import json
import selectors
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

from retentive.bench.serving import paired, prompts, summary, through_engine
from retentive.checkpoint import save_model
from retentive.data.tokenizer import Tokenizer, train_bpe
from retentive.infer import SamplingParams, generate
from retentive.models import Model

PATH = "/v1/completions"


def measure(
    model: Model, streams: int, tokens: int, *, repeats: int = 5, say: Callable[[str], object] = lambda line: None
) -> dict[str, Any]:
    """Tokens/s of so many streams through the server and through the engine, and their ratio.

    Raises:
        ArithmeticError: a stream's text is not what the model writes alone.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    tokenizer = train_bpe(islice(texts, 150), model.config.vocab_size)
    asked = requests(model, tokenizer, streams, tokens)
    rates: dict[str, list[float]] = {"engine": [], "server": []}
    with server(model, tokenizer, streams) as port:
        for n in range(repeats + 1):
            rates["engine"].append(through_engine(model, streams, streams, tokens))
            rates["server"].append(streams * tokens / through_server(port, asked))
            if n:
                say(", ".join(f"{name} {taken[-1]:,.0f} tokens/s" for name, taken in rates.items()))
    return {
        "tokens_per_second": {name: summary(taken[1:]) for name, taken in rates.items()},
        "server_over_engine": paired(rates["server"], rates["engine"]),
    }


def requests(model: Model, tokenizer: Tokenizer, streams: int, tokens: int) -> list[tuple[bytes, str]]:
    """(HTTP request, text it must be answered with) of each stream; with seeds that lead to no end of text."""
    made = []
    for ids, first in zip(prompts(model, streams, 2), count(0, 1000), strict=False):
        for seed in count(first):
            written = [t.id for t in generate(model, ids, SamplingParams(seed=seed), max_tokens=tokens)]
            if tokenizer.eos_id not in written:
                break
        body = json.dumps({"prompt": ids, "max_tokens": tokens, "seed": seed, "stream": True}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        made.append((request, tokenizer.decode(written)))
    return made


@contextmanager
def server(model: Model, tokenizer: Tokenizer, slots: int) -> Iterator[int]:
    """The port of `retentive serve` with this model."""
    with tempfile.TemporaryDirectory(prefix="retentive-bench-") as folder:
        save_model(folder, model, tokenizer)
        command = [sys.executable, "-m", "retentive", "serve", folder, "--port", "0", "--slots", str(slots)]
        with subprocess.Popen([*command, "--cache", "0"], stderr=subprocess.PIPE, text=True) as process:
            try:
                line = process.stderr.readline() if process.stderr else ""
                if "serving" not in line:
                    raise OSError(f"the server did not start: {line.strip()}")
                yield int(line.rsplit(":", 1)[1])
            finally:
                process.kill()


def through_server(port: int, asked: list[tuple[bytes, str]]) -> float:
    """Seconds from the first request to the last byte of the answers."""
    selector, answers = selectors.DefaultSelector(), [bytearray() for _ in asked]
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in asked]
    for connection, answer in zip(sockets, answers, strict=True):
        selector.register(connection, selectors.EVENT_READ, answer)
    began = time.perf_counter()
    for connection, (request, _) in zip(sockets, asked, strict=True):
        connection.sendall(request)
    while selector.get_map():
        for key, _ in selector.select():
            part = key.fileobj.recv(1 << 16)
            key.data.extend(part)
            if not part:
                selector.unregister(key.fileobj)
    seconds = time.perf_counter() - began
    for n, (connection, answer, (_, want)) in enumerate(zip(sockets, answers, asked, strict=True)):
        connection.close()
        if (got := text_of(bytes(answer))) != want:
            raise ArithmeticError(f"stream {n} through the server gave another text than alone: {got[:80]!r}")
    selector.close()
    return seconds


def text_of(answer: bytes) -> str:
    """The text in a response's events, or what it says in their place."""
    events = [line[6:] for line in answer.splitlines() if line.startswith(b"data: {")]
    if not events or b"data: [DONE]" not in answer:
        return answer[:300].decode(errors="replace")
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)

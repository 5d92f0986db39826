"""Client of `bench serving --server`: many streamed completions over HTTP at once, by plain sockets.

The client is this process. Its one thread only collects bytes while the clock runs and parses them afterwards, to keep
its own time small. Every stream's text must equal the text of `generate` alone, since a server that lost tokens would
look fast.
"""

import json
import selectors
import socket
import sysconfig
import time
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path

from retentive.data.tokenizer import Tokenizer, train_bpe
from retentive.infer import SamplingParams, generate
from retentive.models import LanguageModel

PATH = "/v1/completions"


def library_tokenizer(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer trained on text that every machine has, the source of Python's standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return train_bpe((file.read_text(encoding="utf-8", errors="replace") for file in islice(files, 150)), vocab_size)


def requests(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[list[int]], tokens: int
) -> list[tuple[bytes, str]]:
    """Returns (HTTP request, expected text) of each stream."""
    made = []
    # a thousand seeds per stream, so that no two streams share one
    for ids, first in zip(prompts, count(0, 1000), strict=False):
        for seed in count(first):  # the first seed whose text does not end early
            written = [t.id for t in generate(model, ids, SamplingParams(seed=seed), max_tokens=tokens)]
            if tokenizer.eos_id not in written:
                break
        body = json.dumps({"prompt": ids, "max_tokens": tokens, "seed": seed, "stream": True}).encode()
        # "close": the end of the connection is then the end of the response, and nothing is parsed while the clock runs
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        made.append((request, tokenizer.decode(written)))
    return made


def through_server(port: int, asked: list[tuple[bytes, str]]) -> float:
    """Returns the seconds from the first request to the last byte of the responses.

    Raises:
        ArithmeticError: a stream's text is not the expected one.
    """
    selector, answers = selectors.DefaultSelector(), [bytearray() for _ in asked]
    # connected before the clock starts, since only the streams are compared with the engine
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
            if not part:  # the server has closed the connection: the response is complete
                selector.unregister(key.fileobj)
    seconds = time.perf_counter() - began
    for n, (connection, answer, (_, want)) in enumerate(zip(sockets, answers, asked, strict=True)):
        connection.close()
        if (got := text_of(bytes(answer))) != want:
            raise ArithmeticError(f"stream {n} through the server gave another text than alone: {got[:120]!r}")
    selector.close()
    return seconds


def text_of(answer: bytes) -> str:
    """Returns the text in a response's events; of an incomplete stream the status and the last bytes."""
    events = [line[6:] for line in answer.splitlines() if line.startswith(b"data: {")]
    if not events or b"data: [DONE]" not in answer:
        status, _, rest = answer.decode(errors="replace").partition("\r\n")
        return f"{status} {rest[-200:]}"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)

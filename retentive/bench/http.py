"""Client of benches of servers: many streamed completions over HTTP at once, by plain sockets.

The client is this process. Its one thread only collects bytes while the clock runs and parses them afterwards, to keep
its own time small.

    answers(port, [request(body), …])    what came, and when, of each
    through_server(port, asked)          seconds of all. Every stream's text must equal the text of `generate` alone,
                                         since a server that lost tokens would look fast
"""

import json
import selectors
import socket
import sysconfig
import time
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from retentive.data.tokenizer import Tokenizer, train_bpe
from retentive.infer import SamplingParams, generate
from retentive.models import LanguageModel

PATH = "/v1/completions"


def library_tokenizer(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer trained on text that every machine has, the source of Python's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in library.rglob("*.py") if "site-packages" not in file.parts)
    # so many that they have 32,000 different words and parts of words
    return train_bpe((file.read_text(encoding="utf-8", errors="replace") for file in islice(files, 1000)), vocab_size)


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
        body = {"prompt": ids, "max_tokens": tokens, "seed": seed, "stream": True}
        made.append((request(body), tokenizer.decode(written)))
    return made


def request(body: dict[str, Any]) -> bytes:
    """Returns the HTTP request of a completion."""
    content = json.dumps(body).encode()
    # "close": the end of the connection is then the end of the response, and nothing is parsed while the clock runs
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def through_server(port: int, asked: list[tuple[bytes, str]]) -> float:
    """Returns the seconds from the first request to the last byte of the responses.

    Raises:
        ArithmeticError: a stream's text is not the expected one.
    """
    found = answers(port, [sent for sent, _ in asked])
    for n, (answer, (_, want)) in enumerate(zip(found, asked, strict=True)):
        if (got := text_of(b"".join(part for _, part in answer))) != want:
            raise ArithmeticError(f"stream {n} through the server gave another text than alone: {got[:120]!r}")
    return max(answer[-1][0] for answer in found)


def answers(port: int, sent: Sequence[bytes]) -> list[list[tuple[float, bytes]]]:
    """Sends all requests at once, and returns the parts of each response: (seconds since the first request, bytes).

    The last part is empty: the server has closed the connection.
    """
    selector, found = selectors.DefaultSelector(), [list[tuple[float, bytes]]() for _ in sent]
    # connected before the clock starts, since only the streams are timed
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in sent]
    for connection, answer in zip(sockets, found, strict=True):
        selector.register(connection, selectors.EVENT_READ, answer)
    began = time.perf_counter()
    for connection, each in zip(sockets, sent, strict=True):
        connection.sendall(each)
    while selector.get_map():
        for key, _ in selector.select():
            part = key.fileobj.recv(1 << 16)
            key.data.append((time.perf_counter() - began, part))
            if not part:
                selector.unregister(key.fileobj)
                key.fileobj.close()
    selector.close()
    return found


def text_of(answer: bytes) -> str:
    """Returns the text in a response's events; of an incomplete stream the status and the last bytes."""
    events = [line[6:] for line in answer.splitlines() if line.startswith(b"data: {")]
    if not events or b"data: [DONE]" not in answer:
        status, _, rest = answer.decode(errors="replace").partition("\r\n")
        return f"{status} {rest[-200:]}"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)

"""Clients of the soak: their requests, the expected responses, and the misuse that a server must survive.

Every complete response is compared with the text of `generate` for that request without a server. That reveals a token
that is lost, doubled or meant for another client.
"""

import http.client
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams, generate
from retentive.infer.generate import Token
from retentive.infer.sample import Sampler
from retentive.infer.text import stream_text
from retentive.models import LanguageModel

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE = 120.0
"""Seconds without an answer until a request has failed, and until the server counts as gone."""
BAD: list[tuple[str, bytes, int]] = [
    (TEXT, b"{", 400),
    (TEXT, b'{"prompt": 5}', 400),
    (TEXT, b'{"prompt": "a", "max_tokens": "many"}', 400),
    (TEXT, b'{"prompt": "\xff"}', 400),
    (TEXT, b'{"prompt": "a", "model": "another"}', 404),
    (TEXT, b'{"prompt": "' + b"a" * 5000 + b'"}', 400),
    (TEXT, b'{"prompt": "' + b"a" * 400_000 + b'"}', 413),
    (CHAT, b'{"messages": [{"role": "nobody", "content": "a"}]}', 400),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "session": "../a"}', 400),
    ("/v1/states/..%2fa/restore", b'{"session": "a"}', 404),
    ("/v1/states", b'{"session": "nothing-of-this-name", "name": "a"}', 404),
]
"""Invalid requests: (path, body, expected status)."""


@dataclass
class Asked:
    """A request, and the expected text of each choice of its response."""

    path: str
    body: dict[str, Any]
    texts: list[str]


@dataclass
class Tally:
    """Thread-safe counts and errors of all clients."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Wrong responses, a line each."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:  # += reads, adds and writes: between two of these another thread's count would be lost
            self.counts[what] += number

    def check(self, what: str, got: Any, wanted: Any) -> None:
        """Count a checked response, and record both values if they differ."""
        self.count(f"{what} checked")
        if got != wanted:
            self.wrong.append(f"{what}: got {str(got)[:200]!r}, expected {str(wanted)[:200]!r}")

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Record an exception raised in the block as wrong, and suppress it."""
        try:
            yield
        # any exception, such as a broken connection, half an event, unexpected JSON: other clients must continue
        except Exception as error:
            self.wrong.append(f"{what}: {type(error).__name__} {error}")


# requests and their expected responses


def write(model: LanguageModel, prompt: str, params: SamplingParams, max_tokens: int, stop: list[str]) -> str | None:
    """The model's text after the prompt without a server; None if rounding could choose another token.

    A server may read a row in any batch, and rounding differs with the order of sums. So a text that depends on the
    last bits of a logit cannot test it.
    """
    tokenizer = ByteTokenizer()  # the server begins a text with end-of-text too, as in training
    ids, read = [tokenizer.eos_id, *tokenizer.encode(prompt)], list[int]()

    def heard() -> Iterator[Token]:
        # by `generate`, which has no batches, slots or queues, so that their errors show
        for token in generate(model, ids, params, max_tokens=max_tokens, stop_ids=[tokenizer.eos_id]):
            read.append(token.id)
            yield token
        if len(read) < max_tokens:
            read.append(tokenizer.eos_id)

    text = "".join(stream_text(heard(), tokenizer, stop=stop))
    return text if decided(model, ids, read, params) else None


@torch.no_grad()
def decided(model: LanguageModel, prompt: list[int], tokens: list[int], params: SamplingParams) -> bool:
    """True if the sampler picks these tokens after the prompt from slightly changed logits, too.

    The change is 1e-4, about ten times the rounding error of the logits of the soak's model, in four random draws.
    """
    ids = torch.tensor([[*prompt, *tokens]])
    logits = model(ids)[0][0, len(prompt) - 1 : -1]
    for seed in range(4):
        sampler = Sampler(params, ids[:, : len(prompt)], model.config.vocab_size)
        off = torch.empty_like(logits).normal_(0, 1e-4, generator=torch.Generator().manual_seed(seed))
        if any(sampler(row)[0] != token for row, token in zip(logits + off, tokens, strict=True)):
            return False
    return True


def long_requests(model: LanguageModel, count: int, tokens: int) -> list[Asked]:
    """Greedy requests of `tokens` tokens without an earlier end, so long that they still run when SIGTERM arrives."""
    greedy, made = SamplingParams(temperature=0, bias={ByteTokenizer.eos_id: -100}), list[Asked]()
    drawn = {"max_tokens": tokens, "temperature": 0, "logit_bias": {str(ByteTokenizer.eos_id): -100}}
    numbers = itertools.count()
    while len(made) < count:
        prompt = f"Long {next(numbers)}"
        text = write(model, prompt, greedy, tokens, [])
        if text is not None:
            made.append(Asked(TEXT, {"prompt": prompt, **drawn}, [text]))
    return made


def requests(model: LanguageModel, count: int, seed: int) -> list[Asked]:
    """Requests of all lengths, greedy and sampled, with and without stop strings, for one choice or three."""
    rng, made = random.Random(seed), list[Asked]()
    numbers = itertools.count()
    while len(made) < count:
        n = next(numbers)
        prompt = "".join(chr(rng.randrange(97, 123)) for _ in range(rng.choice([1, 8, 40, 300, 900])))
        # few long ones: slots must become free all the time, so that requests join running batches
        length, choices = rng.choice([1, 10, 40, 120]), rng.choice([1, 1, 1, 3])
        drawn: dict[str, Any] = {"temperature": rng.choice([0.0, 0.7, 1.0]), "top_p": rng.choice([1.0, 0.9]), "seed": n}
        stop = [chr(rng.randrange(97, 123))] if rng.random() < 0.3 else []
        body = {"prompt": prompt, "max_tokens": length, "n": choices, "stop": stop, **drawn}
        # each choice has its own seed, counted from the request's
        params = [SamplingParams(**{**drawn, "seed": n + i}) for i in range(choices)]
        texts = [text for p in params if (text := write(model, prompt, p, length, stop)) is not None]
        if len(texts) == choices:
            made.append(Asked(TEXT, body, texts))
    return made


def conversations(model: LanguageModel, count: int, seed: int) -> list[list[Asked]]:
    """Chats of three turns; each request holds only the new message, since the session remembers the others."""
    rng, made = random.Random(seed), list[list[Asked]]()
    while len(made) < count:
        said, turns = "", []
        for turn in range(3):
            content = "".join(chr(rng.randrange(97, 123)) for _ in range(rng.choice([3, 30, 200])))
            # the whole transcript by the chat template, which the session's state must have read
            said += f"{'' if turn == 0 else chr(10)}User: {content}\nAssistant:"
            stop = [chr(rng.randrange(97, 123))] if rng.random() < 0.5 else []
            text = write(model, said, SamplingParams(temperature=0), 30, [*stop, "\nUser:"])
            if text is None:
                break
            body = {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 30,
                "temperature": 0,
                "stop": stop,
            }
            turns.append(Asked(CHAT, body, [text]))
            said += text
        else:
            made.append(turns)
    return made


# HTTP


def send(port: int, method: str, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
    """Send a request; returns the response with its body unread. Closing it closes the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()
    except BaseException:
        connection.close()  # there is no response to close
        raise


def ask(
    port: int, asked: Asked, *, slow: float = 0, leave_after: int | None = None, **more: Any
) -> tuple[int, list[str]]:
    """Send a completion request; returns (status, texts of the choices). Streams if `stream` is among `more`.

    A stream that starts but does not end properly gets an artificial status: 0 if this client hung up, 598 if the last
    chunk (of `include_usage`) is missing, 599 for an error in the stream.

    Args:
        slow: seconds between two reads of a stream.
        leave_after: events after which the client hangs up.
    """
    body = json.dumps({**asked.body, **more}).encode()
    with closing(send(port, "POST", asked.path, body)) as response:
        if response.status != 200 or not more.get("stream"):
            raw = json.loads(response.read())
            return response.status, [text_of(choice) for choice in raw.get("choices", [])]
        texts, ended = [""] * len(asked.texts), False
        for n, event in enumerate(events(response)):
            if n == leave_after:
                return 0, texts
            if "error" in event:
                return 599, texts
            for choice in event["choices"]:
                texts[choice["index"]] += text_of(choice)
            ended = event.get("choices") == []
            time.sleep(slow)
        return (200 if ended else 598), texts


def text_of(choice: dict[str, Any]) -> str:
    """Text of a choice: of a completion, of a chat, or of a chunk of either."""
    return choice.get("text") or choice.get("delta", choice.get("message", {})).get("content") or ""


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the server-sent events of a response, without the final [DONE]."""
    while line := response.readline():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


# clients


class Clients:
    """Threads that send random requests to the server, each with its own seed; a flood is `flood` requests at once."""

    def __init__(self, port: int, single: list[Asked], chats: list[list[Asked]], tally: Tally, *, flood: int):
        self.port, self.single, self.chats, self.tally, self.flood = port, single, chats, tally, flood
        self.over = threading.Event()
        """Event that makes every client finish its request and begin no other."""

    def run(self, threads: int) -> None:
        """Run the clients; returns when all have ended, after `over`."""
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(self._client, n) for n in range(threads)]:
                done.result()

    def _client(self, number: int) -> None:
        rng = random.Random(number)
        # actions of a client, and their relative frequency
        doings: dict[Callable[[random.Random], None], int] = {
            self._whole: 30,
            self._stream: 30,
            self._abort: 15,
            self._bad: 10,
            self._chat: 10,
            self._slow: 4,
            self._flood: 1,
        }
        while not self.over.is_set():
            (doing,) = rng.choices(list(doings), list(doings.values()))
            with self.tally.noting(doing.__name__[1:]):
                doing(rng)
                continue
            # after a failure, pause: a server that is gone would refuse thousands of requests a second
            self.over.wait(1)

    def _reply(self, what: str, asked: Asked, **how: Any) -> int:
        """Send a request, check the response and return its status; 429 (queue full) is valid too, after a pause."""
        status, texts = ask(self.port, asked, **how)
        self.tally.count(f"status {status}")
        if status == 429:
            time.sleep(0.2)
        else:
            self.tally.check(what, (status, texts), (200, asked.texts))
        return status

    def _whole(self, rng: random.Random) -> None:
        self._reply("whole", rng.choice(self.single))

    def _stream(self, rng: random.Random) -> None:
        self._reply("stream", rng.choice(self.single), stream=True, stream_options={"include_usage": True})

    def _slow(self, rng: random.Random) -> None:
        self._reply("slow", rng.choice(self.single), slow=0.05, stream=True, stream_options={"include_usage": True})

    def _abort(self, rng: random.Random) -> None:
        asked = rng.choice(self.single)  # with more tokens, so that it still runs when the client leaves
        ask(self.port, asked, leave_after=rng.randrange(4), stream=True, max_tokens=2000, stop=[])
        self.tally.count("aborted")

    def _bad(self, rng: random.Random) -> None:
        path, body, wanted = rng.choice(BAD)
        with closing(send(self.port, "POST", path, body)) as response:
            response.read()
        self.tally.check("bad", (path, body[:60], response.status), (path, body[:60], wanted))

    def _flood(self, rng: random.Random) -> None:
        """Send more requests at once than slots and queue have room for, each over its own connection."""
        many = [rng.choice(self.single) for _ in range(self.flood)]
        with ThreadPoolExecutor(len(many)) as pool:
            statuses = list(pool.map(lambda asked: self._reply("flood", asked), many))
        self.tally.count("floods")
        self.tally.count("refused in floods", sum(s == 429 for s in statuses))

    def _chat(self, rng: random.Random) -> None:
        """Run three turns of a session; half of the sessions are saved, deleted and restored before the last turn."""
        name = f"s{rng.randrange(10**12)}"
        for turn, asked in enumerate(rng.choice(self.chats)):
            end = time.monotonic() + PATIENCE
            while self._reply("session", asked, session=name) == 429:
                if time.monotonic() > end:  # without a bound, a stuck queue would hold this client for ever
                    raise TimeoutError(f"the queue was full for {PATIENCE:.0f} s")
            if turn == 1 and rng.random() < 0.5:
                self._call("POST", "/v1/states", {"session": name, "name": name})
                self._call("DELETE", f"/v1/sessions/{name}")
                self._call("POST", f"/v1/states/{name}/restore", {"session": name})
                self._call("DELETE", f"/v1/states/{name}")
                self.tally.count("saved and restored")
        self._call("DELETE", f"/v1/sessions/{name}")

    def _call(self, method: str, path: str, body: dict | None = None) -> None:
        with closing(send(self.port, method, path, None if body is None else json.dumps(body).encode())) as response:
            response.read()
        self.tally.check("states", response.status, 200)

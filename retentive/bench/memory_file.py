"""What asking a memory costs after little and after much was read: the file, and the time of a whole question.

A question is what `retentive memory ask` does once the model is loaded: read the file, check it against the model, read
the prompt, write the reply. The memories take turns, so that all see the machine in the same mood.
"""

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from retentive import machine
from retentive.bench.lab.tables import at_least_one, duration, markdown, size
from retentive.infer import SamplingParams, generate
from retentive.infer.memory import blank, load_memory, save
from retentive.infer.reading import ingest
from retentive.models import Model

LENGTHS = (1_000, 1_000_000)
PROMPT, REPLY = 16, 32
"""Tokens of a question."""


def measure(
    model: Model,
    *,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 15,
    say: Callable[[str], None] = lambda line: None,
    seed: int = 0,
) -> dict[str, Any]:
    """A row per length: bytes, and median milliseconds of a question, with the ratio of the last one to the first."""
    at_least_one("lengths", lengths)
    at_least_one("repeats", (repeats,))
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    prompt = torch.randint(vocab, (PROMPT,), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.safetensors" for n in lengths]
        rows: list[dict[str, Any]] = []
        for n, file in zip(lengths, files, strict=True):
            began = time.perf_counter()
            pieces = (
                torch.randint(vocab, (min(4096, n - at),), generator=generator).tolist() for at in range(0, n, 4096)
            )
            memory = deque(ingest(model, pieces, blank(model)), maxlen=1).pop()
            memory.sources = [{"name": "random", "tokens": n, "sha256": 64 * "0"}]
            save(memory, file)
            seconds = time.perf_counter() - began
            say(f"read {n:,} tokens in {duration(seconds)}")
            held = {"file_bytes": file.stat().st_size, "state_bytes": memory.nbytes}
            rows.append({"tokens": n, **held, "tokens_per_second": n / seconds})
        times: list[list[float]] = [[] for _ in files]
        for turn in range(repeats + 2):
            order = range(len(files)) if turn % 2 else reversed(range(len(files)))
            for n in order:
                times[n].append(ask(model, files[n], prompt))
    for row, taken in zip(rows, times, strict=True):
        row["milliseconds"] = [round(t * 1e3, 3) for t in taken[2:]]
        row["median"] = statistics.median(row["milliseconds"])
    return {
        "what": f"a question to a memory: {PROMPT} tokens, a reply of {REPLY}, the file read and checked each time",
        "hardware": machine.describe(),
        "rows": rows,
        "time_ratio": rows[-1]["median"] / rows[0]["median"],
        "file_ratio": rows[-1]["file_bytes"] / rows[0]["file_bytes"],
    }


def ask(model: Model, file: Path, prompt: torch.Tensor) -> float:
    """Seconds of one question."""
    began = time.perf_counter()
    memory = load_memory(file, model)
    for _ in generate(model, prompt, SamplingParams(temperature=0), max_tokens=REPLY, state=memory.state):
        pass
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        [
            f"{row['tokens']:,}",
            size(row["file_bytes"]),
            duration(row["median"] / 1e3),
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in result["rows"]
    ]
    return markdown(["tokens read", "file", "a question", "read at (tokens/s)"], lines)

"""Cost of a question to a memory file that has read few or many tokens: file size and time of the whole question.

A question is the work of `retentive memory ask` after the model is loaded: read the file, check it against the model,
read the prompt, write the reply. Questions to the memories are interleaved.
"""

import statistics
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from retentive import machine
from retentive.bench.lab.clock import turns
from retentive.bench.lab.options import Say, Sized, silent
from retentive.infer import SamplingParams, generate
from retentive.infer.memory import blank, load_memory, save
from retentive.infer.reading import ingest
from retentive.models import LanguageModel, build
from retentive.options import at_least_one
from retentive.tables import duration, markdown

PROMPT, REPLY = 16, 32
"""Tokens of a question's prompt and reply."""
PICTURE = None


@dataclass(frozen=True, kw_only=True)
class Options(Sized):
    """A question to memories that have read few and many tokens: time and bytes."""

    lengths: tuple[int, ...] = (1_000, 1_000_000)
    """Tokens that each memory has read."""
    repeats: int = 15
    """Questions timed per memory, interleaved; the median counts."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per length: bytes, and median milliseconds of a question, with the ratio of the last one to the first."""
    at_least_one(options, "lengths", "repeats")
    torch.manual_seed(0)
    model = build(options.config).eval()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(options.vocab_size, (PROMPT,), generator=generator)
    with tempfile.TemporaryDirectory() as folder:  # names are numbered: the same length may be given twice
        files = {f"{n} {tokens}": Path(folder) / f"{n}.safetensors" for n, tokens in enumerate(options.lengths)}
        rows = [write(model, n, file, say) for n, file in zip(options.lengths, files.values(), strict=True)]
        asks = {name: partial(ask, model, file, prompt) for name, file in files.items()}
        found = list(turns(asks, options.repeats))
    for row, name in zip(rows, files, strict=True):
        row["milliseconds"] = [round(turn[name] * 1e3, 3) for turn in found]
        row["median"] = statistics.median(row["milliseconds"])
    return {
        "what": f"a question to a memory: {PROMPT} tokens, a reply of {REPLY}, the file read and checked each time",
        "size": options.size,
        "hardware": machine.describe(),
        "rows": rows,
        "time_ratio": rows[-1]["median"] / rows[0]["median"],
        "file_ratio": rows[-1]["file_bytes"] / rows[0]["file_bytes"],
    }


def write(model: LanguageModel, tokens: int, file: Path, say: Say) -> dict[str, Any]:
    """Write a memory file that has read `tokens` random tokens; returns its row."""
    generator, began = torch.Generator().manual_seed(tokens), time.perf_counter()
    # drawn part by part, so that a million tokens are never held at once
    parts = (
        torch.randint(model.config.vocab_size, (min(4096, tokens - at),), generator=generator).tolist()
        for at in range(0, tokens, 4096)
    )
    # a memory comes after every chunk; a deque of one keeps the last
    memory = deque(ingest(model, parts, blank(model)), maxlen=1).pop()
    # the source that `retentive memory write` would record: part of the file, and of its timed reading
    memory.sources = [{"name": "random", "tokens": tokens, "sha256": 64 * "0"}]
    save(memory, file)
    seconds = time.perf_counter() - began
    say(f"read {tokens:,} tokens in {duration(seconds)}")
    held = {"file_bytes": file.stat().st_size, "state_bytes": memory.nbytes}
    return {"tokens": tokens, **held, "tokens_per_second": tokens / seconds}


def ask(model: LanguageModel, file: Path, prompt: torch.Tensor) -> float:
    """Seconds of one question."""
    began = time.perf_counter()
    memory = load_memory(file, model)
    for _ in generate(model, prompt, SamplingParams(temperature=0), max_tokens=REPLY, state=memory.state):
        pass
    return time.perf_counter() - began


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in result["rows"]:
        asked = [decimal(row["file_bytes"]), duration(row["median"] / 1e3)]
        lines.append([f"{row['tokens']:,}", *asked, f"{row['tokens_per_second']:,.0f}"])
    return markdown(["tokens read", "file", "a question", "read at (tokens/s)"], lines)

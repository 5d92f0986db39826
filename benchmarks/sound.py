"""Long sound: time and memory of reading it into a state, and of questions about it.

The sound is noise in a WAV file, read part by part as `retentive memory write` does. A question is answered from a copy
of the state, as `retentive memory ask` does, but without a memory file.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal

from retentive import machine
from retentive.bench.lab.clock import median_ratio, turns
from retentive.bench.lab.options import Say, Sized, silent
from retentive.data.templates import TURNS, ChatTemplate
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams
from retentive.infer.media import answer_to, asked, remember
from retentive.models import LanguageModel, build
from retentive.models.encoders import AudioConfig, with_encoders
from retentive.native import with_engine
from retentive.options import at_least_one
from retentive.tables import duration, markdown

QUESTION = "What was said?"
PICTURE = None


@dataclass(frozen=True, kw_only=True)
class Options(Sized):
    """Long sound: seconds and memory to read it into a state, and ten questions about it beside one."""

    size: str = "1m"
    """Size of the RetNet, with random weights and bytes as tokens."""
    minutes: tuple[float, ...] = (1, 10, 30)
    """Minutes of sound; the questions are about the longest."""
    rate: int = 8000
    """Sample rate in Hz."""
    mels: int = 20
    """Mel bands of the encoder."""
    questions: tuple[int, ...] = (1, 10)
    """Numbers of questions; the ratios are to the first."""
    reply: int = 32
    """Tokens of an answer."""
    repeats: int = 3
    """Repetitions timed of each, interleaved; the median counts."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per length, and one per number of questions, reading included.

    Raises:
        ValueError: numbers are too small.
        ImportError: soundfile or soxr (extra `multimodal`) is not installed.
    """
    at_least_one(options, "questions", "reply", "repeats", "rate", "mels")
    if not options.minutes or not min(options.minutes) > 0:
        raise ValueError(f"minutes must be above 0, got {options.minutes}")
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    config = AudioConfig(token=tokenizer.vocab_size + 1, rate=options.rate, mels=options.mels)
    model = with_encoders(build(Sized(size=options.size, vocab_size=tokenizer.vocab_size).config), {"audio": config})
    model, template = with_engine(model.eval()), ChatTemplate(TURNS, tokenizer, {}, own=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = [write(Path(folder) / f"{n}.wav", 60 * m, options.rate) for n, m in enumerate(sorted(options.minutes))]
        remember(model, template, files[:1])  # warm-up: loads and compiles code
        for minutes, file in zip(sorted(options.minutes), files, strict=True):
            before = machine.reset_peak_memory(model.device)
            began = time.perf_counter()
            memory = remember(model, template, [file])
            seconds = time.perf_counter() - began
            peak, faster = machine.peak_memory(model.device) - before, 60 * minutes / seconds
            row = {"minutes": minutes, "tokens": memory.tokens, "seconds": seconds, "times_real_time": faster}
            rows.append(row | {"peak_bytes": peak, "state_bytes": memory.nbytes, "sound_bytes": file.stat().st_size})
            say(f"{minutes:g} minutes in {duration(seconds)}, {faster:,.0f} times real time")
        ways = {str(n): partial(questions, model, template, files[-1], n, options.reply) for n in options.questions}
        timed = {name: partial(machine.clock, model.device, way) for name, way in ways.items()}
        found = list(turns(timed, options.repeats))
    first = str(options.questions[0])
    about = [
        {
            "questions": count,
            "seconds": statistics.median(turn[str(count)] for turn in found),
            "ratio": median_ratio(found, str(count), first),
        }
        for count in options.questions
    ]
    return {
        "what": f"sound read into a state, and questions about {max(options.minutes):g} minutes of it",
        "size": options.size,
        "hardware": machine.describe(),
        "rows": rows,
        "questions": about,
    }


def write(file: Path, seconds: float, rate: int) -> Path:
    """Write a WAV file of noise."""
    import soundfile  # extra `multimodal`

    random, left = np.random.default_rng(0), round(seconds * rate)
    with soundfile.SoundFile(str(file), "w", rate, 1) as out:
        while left:
            part = min(left, 60 * rate)
            out.write(0.1 * random.standard_normal(part))
            left -= part
    return file


def questions(model: LanguageModel, template: ChatTemplate, file: Path, count: int, reply: int) -> None:
    """Read the sound once, and ask `count` questions of copies of its state."""
    memory = remember(model, template, [file])
    ids = asked(model, template, memory, QUESTION)
    for _ in range(count):
        for _ in answer_to(model, template, ids, memory.state.clone(), SamplingParams(temperature=0), max_tokens=reply):
            pass


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown tables."""
    heads = ["sound", "tokens", "read in", "times real time", "memory while it is read", "the state"]
    lines = [
        [
            f"{row['minutes']:g} min", f"{row['tokens']:,}", duration(row["seconds"]),
            f"{row['times_real_time']:,.0f}", decimal(row["peak_bytes"]), decimal(row["state_bytes"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    asks = [[str(row["questions"]), duration(row["seconds"]), f"{row['ratio']:.2f}"] for row in result["questions"]]
    return "\n\n".join([markdown(heads, lines), markdown(["questions", "read and answered in", "to the first"], asks)])

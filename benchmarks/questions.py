"""Cost of ten questions about one long text beside one question: the text is read once, its state copied for each.

A RetNet's state is as large after ten thousand tokens as after ten. A Transformer's cache, also copied, holds all
tokens. Models and numbers of questions are timed in turns.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from rich.filesize import decimal

from retentive import machine
from retentive.bench.lab.clock import median_ratio, turns
from retentive.bench.lab.models import NAMES, NATIVE, check_decoding, chosen, config_of, make
from retentive.bench.lab.options import Say, Sized, silent
from retentive.infer.batch import SHARED, generate_batch
from retentive.models import cost
from retentive.options import at_least_one
from retentive.tables import duration, markdown

PROMPT = 24
"""Tokens of a question."""
MODELS = ("retnet", "transformer", "grouped", *NATIVE)
PICTURE = None


@dataclass(frozen=True, kw_only=True)
class Options(Sized):
    """Questions about one long text, each answered from a copy of the state that has read it: time and bytes."""

    models: tuple[str, ...] = ("retnet", "native-bf16", "transformer")
    """Models, as of `retentive bench decode`, but llama and llamacpp."""
    tokens: int = 10_000
    """Tokens of the text."""
    questions: tuple[int, ...] = (1, 10)
    """Numbers of questions; the ratios are to the first."""
    reply: int = 64
    """Tokens of an answer."""
    repeats: int = 5
    """Timed repetitions of each, interleaved; the median counts."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per model and number of questions: seconds from the first token read to the last written, and bytes.

    Raises:
        ValueError: an unknown model, or numbers that are too small.
        ArithmeticError: a model's decoding gives different logits than its prefill.
    """
    at_least_one(options, "questions", "reply", "repeats")
    if options.tokens < SHARED:
        raise ValueError(f"a text of {options.tokens} tokens is shorter than {SHARED}, from which on it is read once")
    cpu = torch.device("cpu")
    models = {
        name: make(name, config_of(name, options.config), cpu) for name in chosen(options.models, MODELS, cpu, say)
    }
    for model in models.values():
        check_decoding(model)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(options.vocab_size, (options.tokens,), generator=generator).tolist()
    asked = torch.randint(options.vocab_size, (max(options.questions), PROMPT), generator=generator).tolist()
    asked = [[n, *question[1:]] for n, question in enumerate(asked)]  # with different first tokens
    ways = {}
    for name, count in product(models, options.questions):
        prompts = [text + question for question in asked[:count]]
        answer = partial(generate_batch, models[name], prompts, max_tokens=options.reply)
        ways[f"{name} {count}"] = partial(machine.clock, cpu, answer)
    found = []
    for turn in turns(ways, options.repeats):
        found.append(turn)
        say(f"turn {len(found)} of {options.repeats}")
    rows = []
    for name, count in product(models, options.questions):
        way, first = f"{name} {count}", f"{name} {options.questions[0]}"
        seconds, ratio = statistics.median(turn[way] for turn in found), median_ratio(found, way, first)
        state = cost.memory_bytes(models[name].config, options.tokens)
        rows.append({"model": name, "questions": count, "seconds": seconds, "ratio": ratio, "state_bytes": state})
    return {
        "what": f"answers of {options.reply} tokens to questions about a text of {options.tokens:,}, read once",
        "size": options.size,
        "hardware": machine.describe(),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        [
            NAMES[row["model"]], str(row["questions"]), duration(row["seconds"]), f"{row['ratio']:.2f}",
            decimal(row["state_bytes"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return markdown(["", "questions", "read and answered in", "to the first", "a state"], lines)

"""`python -m benchmarks students`: a Transformer, windows of it, and the students made from it, side by side.

    loss      nats a token on held-out text, in contexts of several lengths
    recall    a four-digit number is told, other text follows, and the number is asked for: share of numbers repeated
    facts     simple questions: share of replies that contain the answer
    ended     chats: share of replies that the model ended itself

All models read the same text and questions. Numbers are recalled greedily. Intervals of 95 %.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from retentive import machine
from retentive.bench.lab.options import Say, silent, words
from retentive.bench.lab.plot import GREY, grid
from retentive.checkpoint import ModelFolder
from retentive.data.chats import Conversation
from retentive.data.mixture import Mixture, open_packed
from retentive.data.packed import Packed
from retentive.data.tokenizer import Tokenizer
from retentive.evals.generation_tasks import generate_answers
from retentive.evals.heldout import held_out_loss, share_of_each
from retentive.evals.stats import share
from retentive.infer.batch import generate_batch
from retentive.models import LanguageModel, cost
from retentive.native import with_engine
from retentive.options import at_least_one
from retentive.sampling import SamplingParams
from retentive.tables import markdown

PICTURE = "Students of a Transformer"
QUESTIONS = Path(__file__).with_name("students.json")
"""The facts, with the answers that count as right, and the chats."""
Data = Packed | Mixture
DISTANCES = (300, 1000)
"""Least and most tokens between the number and the question."""
BEFORE, FILLER = 100, 1200
"""Tokens of text before the number, and of the whole text that it is put into."""
OWNERS = (
    "the bank",
    "the library",
    "the old mill",
    "the school",
    "the harbour",
    "the bakery",
    "the station",
    "the king",
)
DIGITS = 4
"""Digits of a number."""
SHOWN = 5
"""Replies of each kind that the result keeps."""
CONTEXT = 8192
"""Tokens after which the size of a state is given."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A Transformer, windows of it and students of it: held-out loss, recall, facts and chats."""

    models: tuple[str, ...]
    """Models, the teacher first: FOLDER, or FOLDER@256+4 for a window of 256 tokens and 4 sinks."""
    data: tuple[Path, ...]
    """Packed folders with held-out text."""
    dtype: str = "bfloat16"
    """Dtype of the weights."""
    lengths: tuple[int, ...] = (512, 2048, 8192)
    """Contexts of the losses in tokens."""
    tokens: int = 32768
    """Held-out tokens of a loss, in all folders together."""
    recalls: int = 200
    """Numbers to recall; 0 for none."""
    chats: int = 200
    """Chats, from the beginning of the list; 0 for neither chats nor facts."""
    max_tokens: int = 600
    """Tokens of a reply."""
    temperature: float = 0.0
    """Temperature of replies, a seed for each question; 0: the likeliest tokens."""
    top_p: float = 1.0
    """Top-p of replies."""
    repetition_penalty: float = 1.0
    """Repetition penalty of replies."""


def measure(options: Options, say: Say = silent, seed: int = 0) -> dict[str, Any]:
    """A row for each model.

    Raises:
        ValueError, OSError: a wrong model, folder or number.
    """
    names = words(options.models)
    at_least_one(options, "tokens", "max_tokens")
    opened = [(name, opened_as(name)) for name in names]  # all at once: a wrong name fails before hours
    data, asked, rows = open_packed(options.data, ()), json.loads(QUESTIONS.read_text(encoding="utf-8")), []
    for name, folder in opened:
        began = time.perf_counter()
        model = with_engine(folder.model(dtype=options.dtype))
        row: dict[str, Any] = {"model": folder.short_name + name[len(name.partition("@")[0]) :]}
        row |= {"parameters": cost.parameters(model.config), "state_bytes": state_bytes(model, CONTEXT)}
        row["loss"] = [
            {"length": length, "kind": kind, "value": part.loss}
            for length in options.lengths
            for kind, part in losses(model, data, length, options.tokens).items()
        ]
        say(f"{row['model']}: " + ", ".join(f"{x['kind']} {x['length']} {x['value']:.4f}" for x in row["loss"]))
        if options.recalls:
            row["recall"] = recall(model, folder.tokenizer_for_text(), data, options.recalls, seed)
            say(f"{row['model']}: recalls {row['recall']['value']:.1%}")
        if options.chats:
            row |= replies(model, folder, asked, options)
            say(f"{row['model']}: facts {row['facts']['value']:.1%}, ended {row['ended']['value']:.1%}")
        rows.append({**row, "seconds": time.perf_counter() - began})
    return {"what": "students beside their teacher", "hardware": machine.describe(), "rows": rows}


def opened_as(name: str) -> ModelFolder:
    """The folder of FOLDER or FOLDER@WINDOW+SINKS; raises ValueError for other numbers, and as `ModelFolder`."""
    path, _, limits = name.partition("@")
    window, _, sinks = limits.partition("+")
    if limits and not (window.isdigit() and sinks.isdigit()):
        raise ValueError(f"{name}: expected FOLDER@WINDOW+SINKS, such as {path}@256+4")
    return ModelFolder.open(path).windowed(int(window) if limits else None, int(sinks) if limits else None)


@torch.no_grad()
def state_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes of the state of one conversation after so many tokens, as the caches grow for them."""
    state = model.init_state(1)
    return sum(memory.reserve(tokens).nbytes for memory in state.memories)


def losses(model: LanguageModel, data: Data, length: int, tokens: int) -> dict[str, Any]:
    """Held-out loss of each kind of text in contexts of `length`."""
    parts = data.held_out_parts(length) if isinstance(data, Mixture) else {data.path.name: data}
    each = share_of_each(tokens, len(parts))
    return {name: held_out_loss(model, part, length=length, tokens=each) for name, part in parts.items()}


def recall(model: LanguageModel, tokenizer: Tokenizer, data: Data, count: int, seed: int) -> dict[str, Any]:
    """Share of four-digit numbers that the model repeats, with the distances of those that it does not."""
    prompts, numbers, apart = zip(*recalls(tokenizer, data, count, seed), strict=True)
    found = generate_batch(model, list(prompts), max_tokens=DIGITS + 2)  # a space may be a token
    right = [tokenizer.decode(ids).strip().startswith(number) for ids, number in zip(found, numbers, strict=True)]
    return share("recall", right) | {"missed": [n for n, ok in zip(apart, right, strict=True) if not ok]}


def recalls(tokenizer: Tokenizer, data: Data, count: int, seed: int) -> list[tuple[list[int], str, int]]:
    """(prompt, number, tokens between the two mentions) `count` times; the text around them is the held-out text."""
    rng, made = random.Random(seed), list[tuple[list[int], str, int]]()
    parts = data.held_out_parts(FILLER).values() if isinstance(data, Mixture) else [data]
    pieces = (batch.ids[0].tolist() for part in parts for batch in part.held_out(length=FILLER))
    texts = [ids for ids in pieces if len(ids) == FILLER]
    if not texts:
        raise ValueError(f"the held-out text has no {FILLER:,} tokens to hide numbers in: give more, or `recalls` 0")
    for _ in range(count):
        number, distance = f"{rng.randrange(10**DIGITS):0{DIGITS}}", rng.randint(*DISTANCES)
        of = rng.choice(OWNERS)
        lines = (f"\nThe secret code of {of} is {number}.\n", f"\nThe secret code of {of} is")
        told, asked = map(tokenizer.encode, lines)
        text = rng.choice(texts)
        before = text[:BEFORE]
        made.append(([*before, *told, *text[len(before) : len(before) + distance], *asked], number, distance))
    return made


def replies(model: LanguageModel, folder: ModelFolder, asked: dict[str, Any], options: Options) -> dict[str, Any]:
    """Shares of facts that were answered, and of chats that the model ended, with a few replies to read."""
    template = folder.template(folder.tokenizer_for_text())
    sampling = SamplingParams(options.temperature, top_p=options.top_p, repetition_penalty=options.repetition_penalty)

    def answered(questions: Sequence[str]) -> list[Any]:
        chats = [
            Conversation(q, [{"role": "user", "content": q}, {"role": "assistant", "content": ""}]) for q in questions
        ]
        return generate_answers(model, template, chats, max_tokens=options.max_tokens, sampling=sampling)

    facts = answered([question for question, _ in asked["facts"]])
    right = [
        any(a.lower() in x.answer.lower() for a in good) for x, (_, good) in zip(facts, asked["facts"], strict=True)
    ]
    chats = answered(asked["chats"][: options.chats])
    shown = [{"question": x.question, "answer": x.answer} for x in [*facts[:SHOWN], *chats[:SHOWN]]]
    return {"facts": share("facts", right), "ended": share("ended", [x.ended for x in chats]), "replies": shown}


def table(result: dict[str, Any]) -> str:
    """A row for each model: bytes of its state, losses beside the teacher's, shares with their intervals."""
    rows = result["rows"]
    columns = [(x["kind"], x["length"]) for x in rows[0]["loss"]]
    there = [what for what in ("recall", "facts", "ended") if what in rows[0]]
    lines = []
    for row in rows:
        own = {(x["kind"], x["length"]): x["value"] for x in row["loss"]}
        shares = [
            f"{100 * row[what]['value']:.0f} ({low:.0f} to {high:.0f})"
            for what in there
            for low, high in [[100 * x for x in row[what]["interval"]]]
        ]
        lines.append([row["model"], decimal(row["state_bytes"]), *(f"{own[c]:.3f}" for c in columns), *shares])
    heads = ["model", f"state at {CONTEXT:,} tokens", *(f"{kind}, {length:,}" for kind, length in columns)]
    return markdown([*heads, *(f"{what}, %" for what in there)], lines)


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG: how much more loss than the teacher each model has, by the length of the context."""
    teacher, *others = result["rows"]
    lengths = list(dict.fromkeys(x["length"] for x in teacher["loss"]))
    figure, axes = grid(title, 1, 1, size=(7, 5))
    axis = axes[0, 0]
    for n, row in enumerate(others):
        more = [_mean(row, length) - _mean(teacher, length) for length in lengths]
        label = f"{row['model']}, {decimal(row['state_bytes'])}"
        axis.plot(lengths, more, f"C{n}", marker="os^vDPX*"[n % 8], label=label)
    axis.axhline(0, **GREY, label=f"{teacher['model']}, {decimal(teacher['state_bytes'])} at {CONTEXT:,} tokens")
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel("loss above the teacher's (nats a token)")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize="small")  # below, off the curves
    figure.savefig(path, dpi=120, format="png")


def _mean(row: dict[str, Any], length: int) -> float:
    """Mean loss over the kinds of text."""
    values = [x["value"] for x in row["loss"] if x["length"] == length]
    return sum(values) / len(values)

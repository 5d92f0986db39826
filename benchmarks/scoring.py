"""Scoring of choices: reading the shared context once and copying its state, beside reading every row whole.

Both ways use the same batches and are interleaved. The correctness gate: their log-likelihoods agree.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from retentive import machine
from retentive.bench.lab.clock import median_ratio, turns
from retentive.bench.lab.options import Say, silent
from retentive.checkpoint import ModelFolder
from retentive.data.tokenizer import Tokenizer
from retentive.evals.likelihood import Request, common_prefix, encode, score
from retentive.evals.read import find, known, parse
from retentive.evals.tasks import TASKS
from retentive.models import LanguageModel, cost
from retentive.options import at_least_one
from retentive.tables import duration, markdown

TOLERANCE = 1e-4
"""Tolerance of a log-likelihood, relative (absolute below 1): float32 sums in another order."""
PICTURE = None


@dataclass(frozen=True)
class Options:
    """Scoring of choices from one state per question, beside reading every row whole."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory or model folder."""
    data: Path
    """Folder of the task's file."""
    task: str = "hellaswag"
    """A task of `retentive eval` with choices."""
    shots: tuple[int, ...] = (0, 4)
    """Answered examples before each question."""
    limit: int = 100
    """Number of questions."""
    repeats: int = 5
    """Repetitions timed of each, interleaved; the median counts."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per number of shots: median seconds of either way, their ratio, and the ratio of the tokens they read.

    Raises:
        ArithmeticError: the two ways do not agree.
    """
    at_least_one(options, "repeats")
    folder = ModelFolder.open(options.run)
    model, tokenizer = folder.model(), folder.tokenizer_for_text()
    asked = {f"{options.task}, {n} shots": questions(options, tokenizer, n) for n in options.shots}
    rows = []
    for name, groups in asked.items():
        # both use the same batching code and differ in sharing only
        ways = {way: partial(logprobs, model, groups, way == "once") for way in ("once", "whole")}
        row = {"what": name, "questions": len(groups), **compared(name, ways, options.repeats)}
        rows.append(row | {"token_ratio": token_ratio(groups)})
        say(f"{name}: {row['ratio']:.2f} times as fast")
    return {
        "what": "scoring choices from one state a question",
        "hardware": machine.describe(),
        "rows": rows,
        "model": model.config.name,
        "parameters": cost.parameters(model.config),
    }


def questions(options: Options, tokenizer: Tokenizer, shots: int) -> list[list[Request]]:
    """Requests of each question."""
    (name,) = known([options.task])
    if TASKS[name].kind != "choice":
        raise ValueError(f"task {name} has no choices: choose one that has")
    items = parse(TASKS[name], find(name, options.data), limit=options.limit, shots=shots)
    pairs = [zip(item.content.prompts, item.content.continuations, strict=True) for item in items]
    return [[encode(tokenizer, *pair) for pair in of_one] for of_one in pairs]


def logprobs(model: LanguageModel, groups: list[list[Request]], share: bool) -> list[float]:
    """Log-likelihoods of all choices; `share` scores from one state per question."""
    return [s.logprob for scores in score(model, groups, share=share) for s in scores]


def token_ratio(groups: list[list[Request]]) -> float:
    """Ratio of the tokens read without sharing to those with sharing; padding does not count."""
    # - 1: the last token of a continuation is predicted, never read
    whole = sum(len(r.context) + len(r.continuation) - 1 for group in groups for r in group)
    saved = sum(common_prefix(group) * (len(group) - 1) for group in groups)
    return whole / (whole - saved)


def compared(name: str, ways: Mapping[str, Callable[[], list[float]]], repeats: int) -> dict[str, Any]:
    """Medians of both ways' seconds ("once" and "whole") and of their ratio, with the difference of their results.

    Raises:
        ArithmeticError: the difference exceeds the tolerance; nothing was timed.
    """
    # relative to the log-likelihood, but absolute near 0, where any rounding would be relatively large
    gaps = [abs(a - b) / max(1, abs(b)) for a, b in zip(ways["once"](), ways["whole"](), strict=True)]
    if not all(gap <= TOLERANCE for gap in gaps):  # `not all` fails for a NaN too, which max() could skip
        raise ArithmeticError(f"{name}: log-likelihoods differ by {max(gaps):.1e} of them, more than {TOLERANCE:.0e}")
    cpu = torch.device("cpu")
    found = list(turns({key: partial(machine.clock, cpu, way) for key, way in ways.items()}, repeats))
    return {
        **{f"{way}_seconds": statistics.median(turn[way] for turn in found) for way in ways},
        "ratio": median_ratio(found, "whole", "once"),
        "largest_difference": max(gaps),
    }


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    heads = ["", "questions", "context once", "every row whole", "times as fast", "times fewer tokens"]
    lines = []
    for row in result["rows"]:
        seconds = [duration(row[key]) for key in ("once_seconds", "whole_seconds")]
        ratios = [f"{row[key]:.2f}" for key in ("ratio", "token_ratio")]
        lines.append([row["what"], str(row["questions"]), *seconds, *ratios])
    return markdown(heads, lines)

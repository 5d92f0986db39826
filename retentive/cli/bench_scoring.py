"""`retentive bench scoring`: questions of a task, and the two ways of scoring them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from retentive.bench import scoring
from retentive.checkpoint import load_with_tokenizer
from retentive.data.tokenizer import Tokenizer
from retentive.evals.likelihood import Request, encode, score, shared
from retentive.evals.read import find, known, parse
from retentive.evals.tasks import TASKS
from retentive.models import Model


@dataclass(frozen=True)
class ScoringBench:
    """Scoring the choices of questions from one state each, beside reading every row whole."""

    run: tyro.conf.Positional[str]
    """Run directory or model folder."""
    data: Path
    """Folder of the task's file."""
    task: str = "hellaswag"
    """A task of `retentive eval` with choices."""
    shots: tuple[int, ...] = (0, 4)
    """Answered examples before each question."""
    limit: int = 100
    """Questions."""
    repeats: int = 5
    """Repetitions timed of each, in turns; the median counts."""
    json: Path | None = None
    """File for the result."""


def score_both_ways(command: ScoringBench, say: Callable[[str], object]) -> dict[str, Any]:
    """The result of the bench."""
    model, tokenizer = load_with_tokenizer(command.run)
    asked = {f"{command.task}, {n} shots": questions(command, tokenizer, n) for n in command.shots}
    contests = {name: contest(model, groups) for name, groups in asked.items()}
    parameters = sum(p.numel() for p in model.parameters())
    measured = scoring.measure(contests, repeats=command.repeats, say=say)
    return {**measured, "model": type(model).__name__, "parameters": parameters}


def questions(command: ScoringBench, tokenizer: Tokenizer, shots: int) -> list[list[Request]]:
    """The requests of each question."""
    (name,) = known([command.task])
    if TASKS[name].kind != "choice":
        raise ValueError(f"task {name} has no choices: choose one that has")
    items = parse(TASKS[name], find(name, command.data), limit=command.limit, shots=shots)
    pairs = [zip(item.content.prompts, item.content.continuations, strict=True) for item in items]
    return [[encode(tokenizer, *pair) for pair in of_one] for of_one in pairs]


def contest(model: Model, groups: list[list[Request]]) -> scoring.Contest:
    """Both ways of scoring them."""

    def way(share: bool) -> Callable[[], list[float]]:
        return lambda: [s.logprob for scores in score(model, groups, share=share) for s in scores]

    whole = sum(len(r.context) + len(r.continuation) - 1 for group in groups for r in group)
    saved = sum(shared(group) * (len(group) - 1) for group in groups)
    return scoring.Contest(len(groups), way(True), way(False), whole - saved, whole)

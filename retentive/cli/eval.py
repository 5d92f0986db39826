"""`retentive eval`: a model's scores on the tasks of the field, from local files or through lm-eval."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from retentive import machine
from retentive.cli.loading import Loading
from retentive.cli.parsing import parse
from retentive.cli.progress import Lines
from retentive.evals.contexts import LAST
from retentive.evals.generation_tasks import KINDS, kind_of
from retentive.evals.likelihood import Progress
from retentive.evals.run import evaluate
from retentive.evals.tasks import PROMPTS
from retentive.files import check_places, write_json, write_text
from retentive.models import cost


@dataclass(frozen=True, kw_only=True)
class EvalCommand(Loading):
    """Score a model on tasks: a question's context is read once, and each choice goes on from a copy of its state."""

    tasks: str
    """Names with commas between them; a wrong one lists all."""
    data: Path | None = None
    """Folder of the tasks' files, NAME.jsonl each."""
    shots: int = 0
    """Answered examples before each question, drawn from its file."""
    limit: int | None = None
    """Questions of each task, from the beginning of its file."""
    max_length: int | None = None
    """Tokens that a question may take; any number if not given. Where an answer is written, a longer question loses its
    beginning."""
    window: int | None = None
    """Tokens of a window for the windowed perplexity of texts, 2048 if not given; --lm-eval then reads them uncut."""
    contexts: tuple[int, ...] = ()
    """Lengths of context in tokens: the last tokens of windows of each length are predicted. For texts and passkey."""
    last: int = LAST
    """Tokens of each of those windows that are predicted."""
    max_tokens: int = 256
    """Tokens of an answer, in tasks in which models write (TASK, or TASK:NAME for NAME.jsonl)."""
    beams: int = 1
    """Hypotheses of beam search for these answers; 1 for none."""
    temperature: float = 0.0
    """Of these answers; 0 takes the likeliest token, else each is drawn with a seed of its own."""
    lm_eval: bool = False
    """Run lm-eval's own tasks by their names, from the files in --data where they are there, else from the hub."""
    json: Path | None = None
    """File for the result."""
    examples: Path | None = None
    """JSONL file for what came out of each question."""


def main(argv: list[str]) -> None:
    command = parse(EvalCommand, "retentive eval", argv)
    run(command, shlex.join(["retentive", "eval", *argv]))


def run(command: EvalCommand, typed: str) -> None:
    """Print the table of scores, and write the files that were asked for."""
    check_places(command.json, command.examples)
    model, tokenizer = command.load()
    names = (
        "shots",
        "limit",
        "max_length",
        "window",
        "contexts",
        "last",
        "lm_eval",
        "max_tokens",
        "beams",
        "temperature",
    )
    options = {name: getattr(command, name) for name in names}
    if any(kind_of(name.strip()) in KINDS for name in command.tasks.split(",")):
        options["template"] = command.template_for(tokenizer)
    with shown() as progress:
        found = evaluate(model, command.tasks, command.data, tokenizer=tokenizer, **options, progress=progress)
    print(found)
    if command.json:
        scorer = f"lm-eval {version('lm-eval')}" if command.lm_eval else f"retentive, prompts of lm-eval {PROMPTS}"
        described = {
            "what": "texts by length of context" if command.contexts else "tasks",
            "scorer": scorer,
            "model": model.config.name,
            "parameters": cost.parameters(model.config),
            "device": command.device,
            "dtype": str(model.dtype),
        }
        write_json(command.json, {"command": typed, **described, "hardware": machine.describe(), "results": found.rows})
    if command.examples:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found.records)
        write_text(command.examples, lines)


@contextmanager
def shown() -> Iterator[Progress]:
    """A function that shows progress: a bar for each task if stderr is a terminal, else a line now and then."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        ids: dict[str, Any] = {}  # of the bars, by task
        lines = Lines()

        def progress(name: str, total: int, done: int) -> None:
            if name not in ids:
                ids[name] = bars.add_task(name, total=total)
            bars.update(ids[name], completed=done)
            if not console.is_terminal:
                lines(f"{name}: {done:,} of {total:,}")

        yield progress

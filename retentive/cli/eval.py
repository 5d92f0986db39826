"""`retentive eval`: score a model on standard tasks, from local files or through lm-eval."""

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
    """Score a model on tasks. The context of a question is read once; each choice starts from a copy of its state."""

    tasks: str
    """Names of tasks, separated by commas, such as piqa,lambada_openai. An unknown name prints the list."""
    data: Path | None = None
    """Folder with a file TASK.jsonl for each task."""
    shots: int = 0
    """Answered examples before each question, drawn from its file."""
    limit: int | None = None
    """Questions per task, from the start of its file. Default: all."""
    max_length: int | None = None
    """Maximum tokens of a question; unlimited by default. In tasks that generate answers, a longer question loses its
    start."""
    text_window: int | None = None
    """Tokens per window for the perplexity of texts, 2048 by default. Without it, --lm-eval reads whole texts."""
    contexts: tuple[int, ...] = ()
    """Context lengths in tokens, for texts and passkey: only the last tokens of each window are scored."""
    last: int = LAST
    """Tokens scored at the end of each window of --contexts."""
    max_tokens: int = 256
    """Maximum tokens of a generated answer."""
    beams: int = 1
    """Beam search hypotheses for generated answers; 1 for greedy decoding or sampling."""
    temperature: float = 0.0
    """Sampling temperature of generated answers; 0 picks the likeliest token."""
    lm_eval: bool = False
    """Run lm-eval's own tasks of these names, on the files in --data if given, else from the hub."""
    json: Path | None = None
    """File for the result."""
    examples: Path | None = None
    """JSONL file for the record of each question."""


def main(argv: list[str]) -> None:
    command = parse(EvalCommand, "retentive eval", argv)
    run(command, shlex.join(["retentive", "eval", *argv]))


def run(command: EvalCommand, typed: str) -> None:
    """Print the table of scores, and write the requested files."""
    check_places(command.json, command.examples)
    model, tokenizer = command.load()
    names = (
        "shots",
        "limit",
        "max_length",
        "text_window",
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
    """Yield a function that shows progress: a bar for each task on a terminal, else a line now and then."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        ids: dict[str, Any] = {}  # bars by task
        lines = Lines()

        def progress(name: str, total: int, done: int) -> None:
            if name not in ids:
                ids[name] = bars.add_task(name, total=total)
            bars.update(ids[name], completed=done)
            if not console.is_terminal:
                lines(f"{name}: {done:,} of {total:,}")

        yield progress

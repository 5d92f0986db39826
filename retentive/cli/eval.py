"""`retentive eval`: a model's answers to the tasks of the field, from local files or through lm-eval."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import retentive
from retentive.bench import hardware
from retentive.checkpoint import write_json
from retentive.checkpoint.io import write_together
from retentive.data.tokenizer import Tokenizer, load_tokenizer
from retentive.evals.run import WINDOW, Say, evaluate, table
from retentive.evals.tasks import PROMPTS
from retentive.models import Model


@dataclass(frozen=True)
class EvalCommand:
    """Score a model on tasks: a question's context is read once, and each choice goes on from a copy of its state."""

    run: tyro.conf.Positional[str]
    """Run directory or model folder (ours, torchscale's or fla's), or owner/name on the hub."""
    tasks: str
    """Names with commas between them; a wrong one lists all."""
    data: Path | None = None
    """Folder of the tasks' files, NAME.jsonl each."""
    shots: int = 0
    """Answered examples before each question, drawn from its file."""
    limit: int | None = None
    """Questions of each task, from the beginning of its file."""
    max_length: int | None = None
    """Tokens that a question may take; any number if not given."""
    window: int | None = None
    """Tokens that texts are read in for the windowed perplexity, 2048 if not given; --lm-eval then reads them uncut."""
    lm_eval: bool = False
    """Run lm-eval's own tasks by their names, from the files in --data where they are there, else from the hub."""
    tokenizer: str | None = None
    """A tokenizer (bytes, or a tokenizer.json) for models that come without one."""
    device: str = "cpu"
    """cpu, cuda, mps, or auto."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights; the state is float32 in any case."""
    json: Path | None = None
    """File for the result."""
    examples: Path | None = None
    """JSONL file for what came out of each question."""


def main(argv: list[str]) -> None:
    command = tyro.cli(EvalCommand, prog="retentive eval", args=argv)
    run(command, shlex.join(["retentive", "eval", *argv]))


def run(command: EvalCommand, typed: str) -> None:
    """Print the table, and keep what was asked for."""
    names = [name.strip() for name in command.tasks.split(",") if name.strip()]
    model, tokenizer = load(command)
    if command.lm_eval:
        from retentive.evals.harness import run_tasks

        if command.max_length is not None:
            raise ValueError("--max-length is for our own scorer: leave it out with --lm-eval")
        how: dict[str, Any] = {"shots": command.shots, "limit": command.limit, "window": command.window}
        rows, records = run_tasks(model, tokenizer, names, command.data, **how)
    else:
        if command.data is None:
            raise ValueError(f"--data is needed: the folder of {', '.join(names) or 'the tasks'} (NAME.jsonl each)")
        with progress() as say:
            rows, records = evaluate(
                model,
                tokenizer,
                names,
                command.data,
                shots=command.shots,
                limit=command.limit,
                max_length=command.max_length,
                window=WINDOW if command.window is None else command.window,
                say=say,
            )
    print(table(rows))
    if command.json:
        scorer = f"lm-eval {version('lm-eval')}" if command.lm_eval else f"retentive, prompts of lm-eval {PROMPTS}"
        described = {"scorer": scorer, "device": command.device, "dtype": str(model.head.weight.dtype)}
        command.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(command.json, {"command": typed, **described, "hardware": hardware.describe(), "results": rows})
    if command.examples:
        command.examples.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_together({command.examples: lambda path: path.write_text(lines, encoding="utf-8")})


def load(command: EvalCommand) -> tuple[Model, Tokenizer]:
    """The model and the tokenizer that belongs to it."""
    dtype = None if command.dtype == "stored" else getattr(torch, command.dtype)
    model, tokenizer = retentive.load(command.run, device=command.device, dtype=dtype)
    if command.tokenizer:
        tokenizer = load_tokenizer(command.tokenizer)
    if tokenizer is None:
        raise ValueError(f"{command.run} has no tokenizer.json: name one with --tokenizer (bytes, or a file)")
    if tokenizer.vocab_size > model.config.vocab_size:
        have, need = tokenizer.vocab_size, model.config.vocab_size
        raise ValueError(f"the tokenizer has {have} tokens, the model {need}: they do not belong together")
    return model, tokenizer


@contextmanager
def progress() -> Iterator[Say]:
    """A bar for each task on stderr, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        ids: dict[str, Any] = {}

        def say(name: str, total: int, done: int) -> None:
            if name not in ids:
                ids[name] = bars.add_task(name, total=total)
            bars.update(ids[name], completed=done)

        yield say

"""Reads files of tasks: JSONL (or CSV with a header), one question per row; or a folder of .txt files, one text each.

Errors name the file and the line.
"""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from retentive.evals.tasks import PASSKEY, TASKS, Question, Task

REPLIES = "translation, summarisation, answers, transcription, dialogue, naming"
"""Names of the tasks in generation_tasks.py, for messages."""
SEED = 1234
"""lm-eval's seed, to draw the same examples."""


class Item(NamedTuple):
    line: int
    """Line in its file, counted from 1; in a folder the number of the file."""
    content: Any
    """A Question; a string for tasks of kind text."""


def known(names: list[str]) -> list[str]:
    """Returns the names after checking them.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    expected = f"expected some of {', '.join(TASKS)}, {PASSKEY} with `contexts`, or, by themselves, {REPLIES}"
    for name in names:
        if name == PASSKEY:
            raise ValueError(f"`contexts` is needed: the lengths at which {PASSKEY} is asked")
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}, {expected}")
    if not names:
        raise ValueError(f"`tasks` is empty: {expected}")
    return names


def find(name: str, folder: Path) -> Path:
    """Returns the first existing file (or folder) of those a task may have.

    Raises:
        FileNotFoundError: none exists.
    """
    paths = [folder / path for path in TASKS[name].files or (f"{name}.jsonl",)]
    for path in paths:
        if path.is_file() or (TASKS[name].kind == "text" and any(path.glob("*.txt"))):
            return path
    raise FileNotFoundError(f"task {name} needs {' or '.join(map(str, paths))}: no such file")


def parse(task: Task, file: Path, *, limit: int | None = None, shots: int = 0) -> list[Item]:
    """Returns the first `limit` questions or texts of a file, each after `shots` answered examples.

    Examples are drawn from the whole file except the question itself, by one generator for all questions in order.
    They equal lm-eval's where it draws from the split it scores.

    Raises:
        ValueError: a line is unusable, there is none, or there are too few rows for the examples.
    """
    items: list[Item] = []
    for line, row in _rows(file):
        # with examples all rows are needed, since examples are drawn from the whole file
        if limit is not None and shots == 0 and len(items) == limit:
            break
        try:
            items.append(Item(line, task.build(row)))
        except ValueError as error:
            raise ValueError(f"{where(file, line)}: {error}") from None
    if not items:
        raise ValueError(f"{file} is empty: expected a JSON object a line")
    if shots == 0:
        return items
    if task.kind == "text":
        raise ValueError(f"{file}: holds texts, and examples are for questions; set `shots=0`")
    if len(items) <= shots:
        raise ValueError(f"{file}: {len(items)} questions are too few for {shots} examples before each; lower `shots`")
    draw = random.Random(SEED)
    return [_after(item, items, draw, shots) for item in items[:limit]]


def _after(item: Item, items: list[Item], draw: random.Random, shots: int) -> Item:
    """Returns the question with `shots` examples before it."""
    # lm-eval draws one more than needed, and drops the question itself if drawn
    drawn = [other.content for other in draw.sample(items, shots + 1) if other.content != item.content]
    if len(drawn) < shots:  # the question is in the file twice, and both were drawn
        drawn = [i.content for i in draw.sample([i for i in items if i.content != item.content], shots)]
    examples = "".join(other.shot + "\n\n" for other in drawn[:shots])
    question: Question = item.content
    prompts = tuple(examples + prompt for prompt in question.prompts)
    return Item(
        item.line, Question(prompts, question.continuations, question.gold, question.choices, examples + question.shot)
    )


def where(file: Path, line: int) -> str:
    """Returns file and line of a row, for error messages."""
    return str(sorted(file.glob("*.txt"))[line - 1]) if file.is_dir() else f"{file} line {line}"


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, row) of each line that is not blank; for a folder (number, text) of each file in order."""
    if file.is_dir():
        for n, one in enumerate(sorted(file.glob("*.txt")), 1):
            try:
                yield n, {"text": one.read_text(encoding="utf-8-sig")}
            except UnicodeDecodeError as error:
                raise ValueError(f"{one} is not UTF-8 text ({error.reason} at {error.start})") from None
        return
    with open(file, encoding="utf-8-sig", newline="") as lines:  # the csv module requires newline=""
        try:
            if file.suffix == ".csv":
                reader = csv.DictReader(lines)
                for row in reader:
                    yield reader.line_num, row
                return
            for n, line in enumerate(lines, 1):
                if line.strip():
                    yield n, _object(line, where(file, n))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error.reason} at {error.start})") from None
        except csv.Error as error:
            raise ValueError(f"{file} line {reader.line_num}: {error}; is a quotation mark missing?") from None


def _object(line: str, at: str) -> dict[str, Any]:
    """Parses the JSON object in a line; raises ValueError naming `at` if it is none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{at} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{at}: expected a JSON object, got {type(row).__name__}")
    return row

"""Reading files of tasks: JSONL (or CSV with a header), a row a question; or a folder of .txt files, a text each.

Errors name the file and the line.
"""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from retentive.evals.tasks import PASSKEY, TASKS, Question, Task

REPLIES = "translation, summarisation, answers, dialogue"
"""What replies.py scores."""
SEED = 1234
"""lm-eval's seed, for drawing the same examples."""


class Item(NamedTuple):
    line: int
    """Line in its file, from 1; in a folder, the number of the file."""
    content: Any
    """A Question; for tasks of kind text, a string."""


def known(names: list[str]) -> list[str]:
    """The names, checked.

    Raises:
        ValueError: one is not a task's, or there is none.
    """
    expected = f"expected some of {', '.join(TASKS)}, {PASSKEY} with --contexts, or, by themselves, {REPLIES}"
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}, {expected}" if name != PASSKEY else f"{PASSKEY} needs --contexts")
    if not names:
        raise ValueError(f"no task given, {expected}")
    return names


def find(name: str, folder: Path) -> Path:
    """The file (or folder) of a task: the first of those it may have that exists.

    Raises:
        FileNotFoundError: none of them does.
    """
    paths = [folder / path for path in TASKS[name].files or (f"{name}.jsonl",)]
    for path in paths:
        if path.is_file() or (TASKS[name].kind == "text" and any(path.glob("*.txt"))):
            return path
    raise FileNotFoundError(f"task {name} needs {' or '.join(map(str, paths))}: no such file")


def parse(task: Task, file: Path, *, limit: int | None = None, shots: int = 0) -> list[Item]:
    """The first `limit` questions or texts of a file, each after `shots` answered examples.

    The examples are drawn from the whole file, never the question itself, with one generator for all questions in
    order: the same ones as lm-eval's, where it draws them from the split that it scores.

    Raises:
        ValueError: a line that cannot be used, or none; fewer rows than the examples need.
    """
    items: list[Item] = []
    for line, row in _rows(file):
        # with examples all rows are needed: they are drawn from the whole file
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
        raise ValueError(f"{file} holds texts: examples (--shots) are for questions")
    if len(items) <= shots:
        raise ValueError(f"{file} has {len(items)} questions, too few for {shots} examples before each: lower --shots")
    draw = random.Random(SEED)
    return [_after(item, items, draw, shots) for item in items[:limit]]


def _after(item: Item, items: list[Item], draw: random.Random, shots: int) -> Item:
    """The question with `shots` examples before it."""
    # lm-eval draws one more than it needs, and drops the question itself if it is among them
    drawn = [other.content for other in draw.sample(items, shots + 1) if other.content != item.content]
    if len(drawn) < shots:  # the file has the same question twice, and both were drawn
        drawn = [i.content for i in draw.sample([i for i in items if i.content != item.content], shots)]
    examples = "".join(other.shot + "\n\n" for other in drawn[:shots])
    question: Question = item.content
    prompts = tuple(examples + prompt for prompt in question.prompts)
    return Item(
        item.line, Question(prompts, question.continuations, question.gold, question.choices, examples + question.shot)
    )


def where(file: Path, line: int) -> str:
    """The file and line of a row, for error messages."""
    return str(sorted(file.glob("*.txt"))[line - 1]) if file.is_dir() else f"{file} line {line}"


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of each line that is not blank; of a folder (number, text) of each file in order."""
    if file.is_dir():
        for n, one in enumerate(sorted(file.glob("*.txt")), 1):
            try:
                yield n, {"text": one.read_text(encoding="utf-8-sig")}
            except UnicodeDecodeError as error:
                raise ValueError(f"{one} is not UTF-8 text ({error.reason} at {error.start})") from None
        return
    with open(file, encoding="utf-8-sig", newline="") as lines:  # newline="" is what the csv module asks for
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
    """The JSON object in a line; raises ValueError, with `at` for where, if it is none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{at} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{at}: expected a JSON object, got {type(row).__name__}")
    return row

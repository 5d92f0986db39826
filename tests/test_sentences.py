"""Lint of docstrings: each opens with its subject or verb, on a first line that fits a tooltip.

Checked are the docstrings of modules, classes and functions, and the strings below attributes and constants.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFUSED = ("What", "Of", "That", "Whether", "Who", "Whoever", "Where", "Those")
"""Opening words that make a reader decode the sentence: start with the noun, the verb or "True if" instead."""
LONGEST = 120
"""Maximum characters of a first line."""
ROOMS = (
    "benchmarks",
    "examples",
    "recipes",
    "retentive/__init__.py",
    "retentive/bench",
    "retentive/checkpoint",
    "retentive/cli",
    "retentive/compare",
    "retentive/data",
    "retentive/evals",
    "retentive/export",
    "retentive/files.py",
    "retentive/infer",
    "retentive/layers",
    "retentive/machine.py",
    "retentive/models",
    "retentive/multimodal",
    "retentive/native",
    "retentive/ops",
    "retentive/options.py",
    "retentive/page",
    "retentive/report",
    "retentive/sampling.py",
    "retentive/serve",
    "retentive/threads.py",
    "retentive/train",
    "tests/*.py",
    "tests/bench",
    "tests/benchmarks",
    "tests/checkpoint",
    "tests/cli",
    "tests/compare",
    "tests/data",
    "tests/evals",
    "tests/examples",
    "tests/export",
    "tests/infer",
    "tests/layers",
    "tests/models",
    "tests/multimodal",
    "tests/native",
    "tests/ops",
    "tests/report",
    "tests/serve",
    "tests/train",
)
"""Files and folders whose sentences are checked. The aim: retentive, benchmarks, recipes, examples, docs and tests."""
EXCEPTIONS: dict[str, str] = {}
"""Docstrings that may open with such a word, as "file: first line", each with the reason; at most ten."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of each docstring in Python source, those of attributes included."""
    for node in ast.walk(ast.parse(source)):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def complaints(source: str) -> Iterator[tuple[int, str, str]]:
    """Yields (line, first line, complaint) of each docstring that breaks a rule."""
    for number, text in docstrings(source):
        first = text.lstrip().partition("\n")[0].strip()
        if first.split(" ")[0].rstrip(",:;") in REFUSED:
            yield number, first, f"opens with {first.split(' ')[0]!r}: name the subject or the verb first"
        if len(first) > LONGEST:
            yield number, first, f"has a first line of {len(first)} characters: use at most {LONGEST}"


def python_files(room: str) -> list[Path]:
    """Returns the Python files of a folder or pattern, or the one file."""
    path = ROOT / room
    return sorted(path.rglob("*.py")) if path.is_dir() else sorted(ROOT.glob(room))


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_open_with_their_subject(room):
    files = python_files(room)
    assert files, f"{room} holds no Python file: take it out of ROOMS"
    found = [
        f"{path.relative_to(ROOT)}:{number} {complaint}"
        for path in files
        for number, first, complaint in complaints(path.read_text(encoding="utf-8"))
        if f"{path.relative_to(ROOT).as_posix()}: {first}" not in EXCEPTIONS
    ]
    assert not found, "\n".join(found)


def test_exceptions_are_few_and_needed():
    assert len(EXCEPTIONS) <= 10 and all(EXCEPTIONS.values())
    for entry in EXCEPTIONS:
        path, _, wanted = entry.partition(": ")
        source = (ROOT / path).read_text(encoding="utf-8")
        assert any(first == wanted for _, first, _ in complaints(source)), f"{entry}: no longer needed, delete it"


def test_the_lint_finds_what_it_refuses():
    source = '''"""What it is for."""
X = 1
"""Of the model."""
class A:
    y: int
    """Whether it runs."""
    def f(self):
        """Wherever you look."""
        async def g():
            """Where it is,
            and what it is."""
        text = "What is no docstring."
        if X:
            "That too."
    def h(self):
        """%s"""
''' % ("a" * 121)  # fmt: skip
    found = [(number, complaint.split(":")[0]) for number, _, complaint in complaints(source)]
    opened = [(1, "'What'"), (3, "'Of'"), (6, "'Whether'"), (10, "'Where'"), (14, "'That'")]
    long = [(16, "has a first line of 121 characters")]
    assert sorted(found) == [(n, f"opens with {word}") for n, word in opened] + long

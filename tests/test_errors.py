"""Errors and remarks of the library name options as Python has them: `data`, not --data.

The command line turns them into flags (`cli.errors`, tests/cli/test_errors.py).
"""

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import retentive
from retentive.bench import BENCHES
from retentive.cli import VERBS
from retentive.cli.errors import OPTION

PACKAGE = Path(retentive.__file__).parent
FLAG = re.compile(r"(?:^|[\s(`'])--[a-z{]")
"""A flag in a string; "{" where it begins with an interpolated name."""
ROOMS = sorted(
    path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
)
ROOMS.remove("cli")  # the room of flags
EXCEPTIONS = {
    "checkpoint/pypi.py": "the command line of pip",
    "bench/lab/server.py": "the command line of a server that is started",
    "bench/serving.py": "the same command line",
    "export/native.py": "a README that names the flags of CMake",
}
"""Files whose strings may name flags, and why."""
OTHERS = {"image", "audio", "json", "texts", "labels", "pooling", "n", "objective", "callbacks"}
"""Options beside the fields of commands: interpolated kinds of media, --json, which each verb has for itself, and those
of calls that no verb makes."""


def spelt(node: ast.AST) -> str:
    """A string, {} for what is interpolated; "" for any other node."""
    if isinstance(node, ast.JoinedStr):
        return "".join(spelt(part) or "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of each string that is not a docstring, f-strings as a whole."""
    apart = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    apart |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) not in apart and (text := spelt(node)):
            yield node.lineno, text  # type: ignore[attr-defined]


def options_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of each option that a string has in backticks, or that is given to `option`."""
    for line, text in texts(tree):
        yield from ((line, name) for name, _ in OPTION.findall(text))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "option" and (name := spelt(node.args[0])):
            yield node.lineno, name


def trees(room: str) -> list[tuple[str, ast.Module]]:
    """Each Python file of a room by its path in the package, parsed."""
    place = PACKAGE / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return [(str(file.relative_to(PACKAGE)), ast.parse(file.read_text(encoding="utf-8"))) for file in files]


def fields_of(kind: type) -> Iterator[str]:
    """Yields the names of a dataclass's fields, with those of dataclasses within it."""
    hints: dict[str, Any] = get_type_hints(kind)
    for f in fields(kind):
        yield f.name
        for inner in (hints[f.name], *get_args(hints[f.name])):
            if isinstance(inner, type) and is_dataclass(inner):
                yield from fields_of(inner)


def flags() -> set[str]:
    """Returns the names of all fields that a verb takes."""
    modules = [*(module for module, _ in VERBS.values()), *BENCHES.values()]
    commands = [vars(importlib.import_module(module)).values() for module in modules]
    return {name for all_ in commands for kind in all_ if isinstance(kind, type) and is_dataclass(kind)
            for name in fields_of(kind)}  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_no_string_outside_cli_names_a_flag(room):
    found = [
        f"{file}:{line} {text!r}"
        for file, tree in trees(room)
        if file not in EXCEPTIONS
        for line, text in texts(tree)
        if FLAG.search(text)
    ]
    assert found == []


def test_exceptions_are_needed():
    assert all(any(FLAG.search(text) for _, text in texts(trees(file)[0][1])) for file in EXCEPTIONS)


def test_every_option_in_backticks_is_one_that_a_verb_takes():
    known = flags() | OTHERS
    named = [
        (f"{file}:{line}", name)
        for room in ROOMS
        for file, tree in trees(room)
        if file not in EXCEPTIONS
        for line, name in options_in(tree)
    ]
    assert len(named) > 80
    assert [(place, name) for place, name in named if name not in known] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise ValueError("--data is needed")', True),
        ('raise ValueError(f"{name}: add --resume")', True),
        ('raise ValueError(f"--{name} is 0")', True),
        ('hint = "; pack it again (--overwrite)"', True),
        ('log.warning("%s: `--resume` goes on", run)', True),
        ('def f():\n    """As --data."""', False),
        ('class A:\n    x: int\n    """As --data."""', False),
        ('flags = "-Wl,--strip-all"', False),
        ('raise ValueError("`data` is needed -- give it")', False),
    ],
)
def test_the_check_sees_a_flag(source, found):
    assert any(FLAG.search(text) for _, text in texts(ast.parse(source))) == found


def test_the_check_sees_options():
    tree = ast.parse("x = f\"`data` of {y}, {option('mode', m)}, `retentive data`: `set={z}`\"")
    assert sorted(name for _, name in options_in(tree)) == ["data", "mode", "set"]

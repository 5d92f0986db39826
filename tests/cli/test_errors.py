"""Errors of the library as the command line says them: options in backticks become flags, all else stays."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

import retentive
from retentive.cli.errors import OPTION, flags
from retentive.options import option
from retentive.train import Parallel, SftRun, TrainConfig, TrainRun

PACKAGE = Path(retentive.__file__).parent
ROOMS = ("train",)
"""Rooms whose errors name fields."""
FIELDS = {f.name for kind in (TrainRun, SftRun, TrainConfig, Parallel) for f in fields(kind)} | {"nproc"}
"""What the command line has a flag for, in these rooms."""


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("`batch` is 0", "--batch is 0"),
        ("`eval_every` and `resume=True`, or `resume=False`", "--eval-every and --resume, or --no-resume"),
        (f"{option('mode', 'carry')}: no", "--mode carry: no"),
        (f"{option('set', {'dim': 64, 'decay': 'paper'})}: no", "--set dim=64 decay=paper: no"),
        (f"{option('data', (Path('a'), Path('b')))}: no", "--data a b: no"),
        (f"{option('init', Path('a/b'))}, {option('steps', 3)}", "--init a/b, --steps 3"),
        ("`nproc=N`", "--nproc N"),
        ("run `wandb login`, or `retentive data`: `x.y`", "run `wandb login`, or `retentive data`: `x.y`"),
    ],
)
def test_options_become_flags(text, typed):
    assert flags(text) == typed


def test_what_a_verb_takes_by_its_place_is_named_as_its_help_does():
    assert flags("`init` and `out`", "sft") == "RUN and --out"


def messages(room: str) -> list[tuple[str, str]]:
    """(FILE:LINE, text) of every string in a `raise`, or that is given to an exception."""
    found = []
    for file in sorted((PACKAGE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if named and node.func.id.endswith(("Error", "Interrupted")):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                found += [(f"{file.relative_to(PACKAGE)}:{node.lineno}", text) for text in texts]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_errors_of_the_library_name_fields_and_no_flags(room):
    said = messages(room)
    assert len(said) > 20
    assert [(at, text) for at, text in said if " --" in f" {text}"] == []
    named = [(at, name) for at, text in said for name, _ in OPTION.findall(text)]
    assert named and [(at, name) for at, name in named if name not in FIELDS] == []

"""`retentive train`: train a model on packed data, in a run directory that holds all it takes to resume."""

import json
import runpy
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from retentive.models import HybridConfig
from retentive.train import Interrupted, TrainConfig, TrainRun
from retentive.train.run import as_typed

RECIPE = "--recipe FILE.py takes the options that the file's function recipe() returns; further flags change them."
OPTIONS = {f.name for f in (*fields(TrainRun), *fields(TrainConfig))}
"""Every option of a run, by its field's name."""
DEFAULTS = {f.name: f.default for f in fields(HybridConfig) if f.name != "vocab_size"}  # the data's
"""Every field that --set may name, and a value of its type."""

Recipe = TypeVar("Recipe")


def main(argv: list[str]) -> None:
    """`retentive train ARGV`."""
    recipe, argv = read_recipe(argv, TrainRun)
    run = tyro.cli(
        TrainRun,
        prog="retentive train",
        args=argv,
        description=f"{TrainRun.__doc__}\n\n{RECIPE}",
        default=tyro.MISSING_NONPROP if recipe is None else recipe,
        registry=CHANGES,
    )
    # When a run is resumed, flags that were typed win over its record, and defaults do not; a recipe has typed all.
    typed = {a.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for a in argv if a[:2] == "--"}
    if "set" in typed:  # FIELD=VALUE strings so far; a recipe's own `set` has values already
        run = replace(run, set=read_changes(list(run.set)))
    try:
        run.run(overrides=typed if recipe is None else OPTIONS)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        if stop.number == signal.SIGINT:
            sys.exit(130)  # so that `train && next` does not go on


def read_recipe(argv: list[str], kind: type[Recipe]) -> tuple[Recipe | None, list[str]]:
    """What the function of --recipe FILE.py returns, and the arguments without it.

    Raises:
        ValueError: the file is no recipe, or has an error, named with its line.
    """
    # --recipe is taken out before tyro sees it: the recipe is tyro's default
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--recipe=") else [a])]
    if "--recipe" not in argv:
        return None, argv
    at = argv.index("--recipe")
    if at + 1 == len(argv):
        raise ValueError(f"--recipe needs a file: a Python file whose function recipe() returns a {kind.__name__}")
    path = Path(argv[at + 1])
    if not path.is_file():
        raise FileNotFoundError(
            f"no recipe at {path}: give a path to one (those of this project lie in a clone of it, in recipes/)"
        )
    try:
        recipe = runpy.run_path(str(path)).get("recipe")
        made = recipe() if callable(recipe) else None
    except Exception as error:  # a recipe is any Python
        raise ValueError(f"{line_of(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise ValueError(f"{path} is no recipe: expected a function recipe() that returns a {kind.__name__}")
    return made, argv[:at] + argv[at + 2 :]


def line_of(error: Exception, path: Path) -> str:
    """FILE:LINE in the recipe that an error comes from: the innermost frame that is in the recipe's folder."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    files = {str(file) for file in path.parent.glob("*.py")}  # recipes may run others beside them
    inside = [f"{f.filename}:{f.lineno}" for f in frames if f.filename in files]
    return inside[-1] if inside else str(path)


def read_changes(items: Sequence[str]) -> dict[str, Any]:
    """The fields of a model's config and their values, from FIELD=VALUE strings.

    Raises:
        ValueError: an unknown field, or a value that is not of its type.
    """
    changes = {}
    for item in items:
        name, equals, text = item.partition("=")
        if name not in DEFAULTS or not equals:
            raise ValueError(f"--set {item}: expected FIELD=VALUE, FIELD one of {', '.join(DEFAULTS)}")
        changes[name] = read_value(item, text, type(DEFAULTS[name]))
    return changes


def read_value(item: str, text: str, kind: type) -> Any:
    """The value of --set FIELD=text for a field whose default is of this kind; a list of numbers may be a decay."""
    if kind is str and not text.startswith("["):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(f"--set {item}: {text!r} is no number, true or false") from None
    fits = {str: type(value) is list, bool: type(value) is bool, int: type(value) is int}
    if not fits.get(kind, type(value) in (int, float)):
        wanted = {str: "numbers", bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise ValueError(f"--set {item}: expected {wanted}, got {text}")
    return tuple(value) if kind is str else value


CHANGES = ConstructorRegistry()
"""tyro's rule for the one option that is a mapping, --set."""


@CHANGES.primitive_rule
def mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """--set FIELD=VALUE FIELD=VALUE …"""
    if info.type is not Mapping[str, Any] and info.type_origin is not Mapping:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="FIELD=VALUE",
        instance_from_str=dict.fromkeys,  # read afterwards: an error is then one line, and not the parser's box
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: as_typed(value).split(" "),
    )

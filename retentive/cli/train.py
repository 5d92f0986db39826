"""`retentive train`: train a model on packed data, in a run directory that holds all it takes to resume."""

import json
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from retentive.models import FIELDS as MODEL_FIELDS
from retentive.models.encoders import CONFIGS as ENCODERS
from retentive.train import Interrupted, Parallel, TrainConfig, TrainRun
from retentive.train.processes import Elsewhere
from retentive.train.resume import as_typed

RECIPE = "--recipe FILE.py takes the options that the file's function recipe() returns; further flags change them."
NPROC = "--nproc N starts N processes on this machine that train together, as torchrun --nproc-per-node N does."
OPTIONS = {f.name for kind in (TrainRun, TrainConfig, Parallel) for f in fields(kind)}
"""Every option of a run, by its field's name."""
FIELDS: dict[str, Any] = dict(MODEL_FIELDS)
FIELDS |= {f"{name}.{f.name}": f.type for name, kind in ENCODERS.items() for f in fields(kind)}
"""Every field that --set may name, and its type."""
del FIELDS["vocab_size"]  # the data's

Recipe = TypeVar("Recipe")


def main(argv: list[str]) -> None:
    """`retentive train ARGV`."""
    processes, argv = read_processes(argv)
    given = argv
    recipe, argv = read_recipe(argv, TrainRun)
    run = tyro.cli(
        TrainRun,
        prog="retentive train",
        args=argv,
        description=f"{TrainRun.__doc__}\n\n{RECIPE} {NPROC}",
        default=tyro.MISSING_NONPROP if recipe is None else recipe,
        registry=CHANGES,
    )
    # When a run is resumed, flags that were typed win over its record, and defaults do not; a recipe has typed all.
    typed = typed_options(argv)
    if "set" in typed:  # FIELD=VALUE strings so far; a recipe's own `set` has values already
        run = replace(run, set=read_changes(list(run.set)))
    chosen = typed if recipe is None else OPTIONS
    if run.init:  # a recipe has not typed the size that it leaves at its default
        chosen = chosen - {"size", "model"} | typed
    if processes:  # which read the same arguments; what is wrong with them has been said once by now
        from retentive.train.launch import launch  # takes long to import

        launch(processes, ["train", *given])
        return
    with interruptible():
        run.run(overrides=chosen)


@contextmanager
def interruptible() -> Iterator[None]:
    """A run in this block that a signal ends says so in a line, and the process ends as signals have it.

    One that ends because another process has failed, which the first one says, ends silently.
    """
    try:
        yield
    except Elsewhere:
        sys.exit(2)
    except Interrupted as stop:
        if str(stop):  # only the first of several processes says it
            print(stop, file=sys.stderr)
        if stop.number == signal.SIGINT:
            sys.exit(130)  # so that `train && next` does not go on


def read_processes(argv: list[str]) -> tuple[int, list[str]]:
    """The number of --nproc N, 0 without, and the arguments without it.

    Raises:
        ValueError: no number.
    """
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--nproc=") else [a])]
    if "--nproc" not in argv:
        return 0, argv
    at = argv.index("--nproc")
    number = argv[at + 1] if at + 1 < len(argv) else "nothing"
    if not number.isdecimal() or not int(number):
        raise ValueError(f"--nproc needs a number of processes, at least 1, got {number}")
    return int(number), argv[:at] + argv[at + 2 :]


def typed_options(argv: list[str]) -> set[str]:
    """The names of the options that were typed, as fields have them."""
    return {a.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for a in argv if a[:2] == "--"}


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
        if name not in FIELDS or not equals:
            raise ValueError(f"--set {item}: expected FIELD=VALUE, FIELD one of {', '.join(FIELDS)}")
        changes[name] = read_value(item, text, FIELDS[name])
    return changes


WANTED: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}


def read_value(item: str, text: str, kind: Any) -> Any:
    """The value of --set FIELD=text for a field of this type; what is no text is written as in JSON."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if str in kinds and not text.startswith("["):  # a list of numbers may be a decay
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if type(value) in kinds or (value is None and NoneType in kinds):
        return value
    if float in kinds and type(value) is int:
        return value
    if type(value) is list and any(get_origin(k) is tuple for k in kinds):
        return tuple(value)
    raise ValueError(f"--set {item}: expected {WANTED.get(kinds[0], 'numbers as in [1, 2]')}, got {text}")


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

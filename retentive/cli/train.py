"""`retentive train`: train a model on packed data. The run directory holds everything needed to resume."""

import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tyro

from retentive.cli.data import shown
from retentive.cli.errors import flags, one_line
from retentive.cli.parsing import parse, typed_options
from retentive.cli.progress import say
from retentive.models import FIELDS as MODEL_FIELDS
from retentive.models.encoders import CONFIGS as ENCODERS
from retentive.options import known
from retentive.train import Interrupted, Parallel, TrainConfig, TrainRun
from retentive.train.checkpoints import folders
from retentive.train.parallel import RankFailed
from retentive.train.parallel.rendezvous import several

RECIPE = "With --recipe FILE.py, options come from the function recipe() in the file; further flags override them."
OPTIONS = {f.name for kind in (TrainRun, TrainConfig, Parallel) for f in fields(kind)}
"""Names of all options of a run."""
FIELDS: dict[str, Any] = dict(MODEL_FIELDS)
FIELDS |= {f"{name}.{f.name}": f.type for name, kind in ENCODERS.items() for f in fields(kind)}
"""Fields that --set may name, with their types."""
del FIELDS["vocab_size"]  # given by the data

Recipe = TypeVar("Recipe")


@dataclass(frozen=True)
class TrainCommand:
    """Train a RetNet (or its Transformer twin) on text, or on data that `retentive data` has packed.
    `retentive train my.txt` trains the run runs/my."""

    run: Annotated[TrainRun, tyro.conf.arg(name="")]
    nproc: int = 1
    """Number of processes that train together on this machine, as torchrun --nproc-per-node."""


def main(argv: list[str]) -> None:
    """`retentive train ARGV`."""
    recipe, argv = read_recipe(argv, TrainRun)
    argv = with_options(argv)
    command = parse(
        TrainCommand,
        "retentive train",
        argv,
        description=f"{TrainCommand.__doc__}\n\n{RECIPE}",
        default=tyro.MISSING_NONPROP if recipe is None else TrainCommand(recipe),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    run = command.run
    # On resume, typed flags override the run's record, defaults do not; a recipe counts as typed.
    typed = typed_options(argv)
    if "set" in typed:  # FIELD=VALUE strings; a recipe's `set` has values
        run = replace(run, set=read_changes(list(run.set)))
    chosen = typed if recipe is None else OPTIONS
    if run.init:  # the size does not count as typed if a recipe leaves its default
        chosen = chosen - {"size", "model"} | typed
    if command.nproc < 1:
        raise ValueError(f"--nproc must be at least 1, got {command.nproc}")
    if command.nproc == 1:
        carry_out(run, chosen, shown=partial(shown, sys.stderr))
        return
    from retentive.train.parallel.launch import launch

    with stoppable(run.out):
        launch(partial(_rank, run, chosen), command.nproc)


def with_options(argv: list[str]) -> list[str]:
    """Return the arguments with --data before leading words, and then --out runs/NAME if there is none."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if not words:
        return argv
    rest = argv[len(words) :]
    if "data" in typed_options(rest):
        raise ValueError(f"--data: {words[0]} is named already; leave out one")
    out = [] if "out" in typed_options(rest) else ["--out", f"runs/{Path(words[0]).stem or 'mine'}"]
    return ["--data", *words, *out, *rest]


def _rank(run: TrainRun, chosen: Collection[str]) -> None:
    """Train as one of several processes."""
    with one_line("train"):
        carry_out(run, chosen)


def carry_out(run: TrainRun, chosen: Collection[str], *, then: str = "generate", **how: Any) -> None:
    """Train the run, and end the process if it was stopped or another rank has failed.

    Args:
        then: verb to name at the end.
    """
    with stoppable(run.out):
        run.run(overrides=chosen, **how)
        if not several():  # each rank of torchrun would say so
            say(f"{run.out}: saved; next: retentive {then} {run.out}")


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """Print what is saved if a signal ends the run in this block, and exit as shells expect after a signal.

    Exits silently if another rank has failed, which that rank reports.
    """
    try:
        yield
    except RankFailed:
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step, or a second one while the run is saving
        if os.environ.get("RANK", "0") == "0":
            print(file=sys.stderr)  # after the terminal's ^C
            kept = folders(out)
            saved = f"{kept[-1].name} is saved; go on with --resume" if kept else "nothing was saved yet"
            print(f"stopped: {saved}", file=sys.stderr)
        sys.exit(130)
    except Interrupted as stop:
        if str(stop):  # only the first of several ranks says it
            print(flags(str(stop)), file=sys.stderr)
        if stop.number == signal.SIGINT:
            sys.exit(130)  # so that `train && next` does not go on


def read_recipe(argv: list[str], kind: type[Recipe]) -> tuple[Recipe | None, list[str]]:
    """Return the result of the function of --recipe FILE.py, and the other arguments.

    Raises:
        ValueError: the file is not a recipe, or has an error; names its line.
    """
    # --recipe is removed before parsing, since the recipe gives the defaults
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
        said = error.msg if isinstance(error, SyntaxError) else error  # without its place
        raise ValueError(f"{line_of(error, path)}: {type(error).__name__}: {said}") from error
    if not isinstance(made, kind):
        raise ValueError(f"{path} is no recipe: expected a function recipe() that returns a {kind.__name__}")
    return made, argv[:at] + argv[at + 2 :]


def line_of(error: Exception, path: Path) -> str:
    """Return FILE:LINE of an error in a recipe: the innermost frame in the recipe's folder."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    files = {str(file) for file in path.parent.glob("*.py")}  # recipes may import others beside them
    inside = [f"{f.filename}:{f.lineno}" for f in frames if f.filename in files]
    return inside[-1] if inside else str(path)


def read_changes(items: Sequence[str], beside: Sequence[str] = (), *, of: str = "") -> dict[str, Any]:
    """Return fields of a model's config with their values, from FIELD=VALUE strings.

    Args:
        beside: other names that the option takes, so that a message can suggest them.
        of: what was typed before them, for messages.

    Raises:
        ValueError: a field is unknown or given twice, or a value has the wrong type.
    """
    changes = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set {of}{item}: expected FIELD=VALUE, such as dropout=0.1")
        try:
            known([name], (*beside, *FIELDS), "field")
        except ValueError as error:
            raise ValueError(f"--set {of}{item}: {error}") from None
        if name in changes:
            raise ValueError(f"--set {of}{item}: {name} is given twice")
        changes[name] = read_value(of + item, text, FIELDS[name])
    return changes


WANTED: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}


def read_value(item: str, text: str, kind: Any) -> Any:
    """Return the value of --set FIELD=text for a field of this type; all but text is JSON."""
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
    wanted = WANTED.get(kinds[0], "numbers as in [1, 2]") + (", or null" if NoneType in kinds else "")
    raise ValueError(f"--set {item}: expected {wanted}, got {text or 'nothing'}")

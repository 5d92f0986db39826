"""`retentive compare`: train several models on the same tokens, in the same order, with the same budget."""

import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from retentive.bench.run import draw
from retentive.cli.errors import flags
from retentive.cli.parsing import parse
from retentive.cli.progress import Lines
from retentive.cli.train import RECIPE, read_changes, read_recipe
from retentive.compare import Comparison, plot, table, title_of
from retentive.files import check_places, write_json
from retentive.tables import counted
from retentive.train import Interrupted


@dataclass(frozen=True)
class CompareCommand:
    """Train variants of a model on the same tokens in the same order, and compare them."""

    comparison: Annotated[Comparison, tyro.conf.arg(name="")]
    json: Path | None = None
    """File for the result; a picture is written beside it."""


def main(argv: list[str]) -> None:
    """`retentive compare ARGV`."""
    default, rest = read_recipe(argv, Comparison)
    command = parse(
        CompareCommand,
        "retentive compare",
        rest,
        description=f"{CompareCommand.__doc__}\n\n{RECIPE} You can interrupt it at any time; the same command resumes.",
        default=tyro.MISSING_NONPROP if default is None else CompareCommand(default),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    comparison, console = command.comparison, Console(stderr=True)
    if None in comparison.set.values():  # NAME:FIELD=VALUE strings; a recipe's `set` has values
        comparison = replace(comparison, set=read_variants(list(comparison.set)))
    if command.json:
        check_places(command.json, command.json.with_suffix(".png"))
    stopped: Interrupted | None = None
    with console.status("") as status:
        lines = Lines()

        def progress(line: str) -> None:
            status.update(flags(line))
            if not console.is_terminal:
                lines(line)

        def say(line: str) -> None:
            console.print(flags(line), highlight=False, markup=False, soft_wrap=True)

        try:
            result = comparison.run(say, progress)
        except Interrupted as error:  # show what is done so far
            stopped, result = error, comparison.result()
    whole = show(result, command, shlex.join(["retentive", "compare", *argv]))
    if stopped:
        print(f"{stopped} (the same command goes on)", file=sys.stderr)
        if stopped.number == signal.SIGINT:  # so that `compare && next` does not go on
            sys.exit(130)
    elif not whole:  # another process is still at some of the runs
        sys.exit(1)


def read_variants(items: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the variants that NAME:FIELD=VALUE,FIELD=VALUE strings define; model=NAME names the model to change.

    Raises:
        ValueError: a name is missing or given twice, a field is unknown, or a value has the wrong type.
    """
    variants = {}
    for item in items:
        name, colon, text = item.partition(":")
        if not re.fullmatch(r"[A-Za-z0-9.-]+", name) or not colon or not text:  # becomes part of a folder's name
            raise ValueError(f"--set {item}: expected NAME:FIELD=VALUE,FIELD=VALUE, NAME of letters, digits, . and -")
        if name in variants:
            raise ValueError(f"--set {item}: {name} is defined twice; choose another name")
        parts = re.split(r",(?![^\[]*\])", text)  # not at commas within a list of numbers
        model = [part.removeprefix("model=") for part in parts if part.startswith("model=")]
        changes = [part for part in parts if not part.startswith("model=")]
        fields = read_changes(changes, beside=("model",), of=f"{name}:")
        variants[name] = ({"model": model[0]} if model else {}) | fields
    return variants


def show(result: dict, command: CompareCommand, typed: str) -> bool:
    """Print the table of results, and write them with a picture if a file is given; True if all runs are done."""
    done = len(result["runs"]) + len(result["failed"])
    if done < result["planned"]:
        print(f"{done} of {counted(result['planned'], 'run')} done", file=sys.stderr)
    if result["rows"]:
        print(table(result))
    if result["rows"] and command.json:
        write_json(command.json, {"command": typed, **result})
        draw(command.json, plot, result, title_of(result))
    return done == result["planned"]

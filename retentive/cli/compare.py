"""`retentive compare`: several models on the same tokens, in the same order, with the same budget."""

import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from retentive.cli.progress import Lines
from retentive.cli.train import RECIPE, read_recipe
from retentive.files import check_place, write_json, write_together
from retentive.studies.compare import Comparison, plot, table
from retentive.train import Interrupted


@dataclass(frozen=True)
class CompareCommand:
    """Train variants of a model on the same tokens in the same order, and say how they compare."""

    comparison: Annotated[Comparison, tyro.conf.arg(name="")]
    json: Path | None = None
    """File for the result; a picture is put beside it."""


def main(argv: list[str]) -> None:
    """`retentive compare ARGV`."""
    default, rest = read_recipe(argv, Comparison)
    command = tyro.cli(
        CompareCommand,
        prog="retentive compare",
        args=rest,
        description=f"{CompareCommand.__doc__}\n\n{RECIPE} Interrupt it at any time: the same command goes on.",
        default=tyro.MISSING_NONPROP if default is None else CompareCommand(default),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    comparison, console = command.comparison, Console(stderr=True)
    if command.json:
        check_place(command.json)
    stopped: Interrupted | None = None
    with console.status("") as status:
        lines = Lines()

        def progress(line: str) -> None:
            status.update(line)
            if not console.is_terminal:
                lines(line)

        def say(line: str) -> None:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        try:
            result = comparison.run(say, progress)
        except Interrupted as error:  # show what is done so far
            stopped, result = error, comparison.result()
    show(result, command, shlex.join(["retentive", "compare", *argv]))
    if stopped:
        print(f"{stopped} (the same command goes on)", file=sys.stderr)
        if stopped.number == signal.SIGINT:  # so that `compare && next` does not go on
            sys.exit(130)


def show(result: dict, command: CompareCommand, typed: str) -> None:
    """Print the table of results, and write them with a picture if a file is given."""
    done = len(result["runs"]) + len(result["failed"])
    if done < result["planned"]:
        print(f"{done} of {result['planned']} runs are done", file=sys.stderr)
    if not result["rows"]:
        return
    print(table(result))
    if command.json:
        write_json(command.json, {"command": typed, **result})
        title = f"{result['rows'][0]['tokens'] / 1e6:.1f} M tokens a run, {result['hardware']['cpu']}"
        write_together({command.json.with_suffix(".png"): lambda path: plot(result, path, title=title)})

"""`retentive linearize`: turn a Transformer into a RetNet, in stages that can be stopped and resumed."""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro

from retentive.cli.data import shown
from retentive.cli.parsing import parse, typed_options
from retentive.cli.train import RECIPE, read_recipe, stoppable
from retentive.linearization import LinearizeRun


@dataclass(frozen=True)
class LinearizeCommand:
    """Turn a Transformer into a RetNet: a student with a state of constant size learns its predictions."""

    run: Annotated[LinearizeRun, tyro.conf.arg(name="")]


def main(argv: list[str]) -> None:
    """`retentive linearize ARGV`."""
    recipe, argv = read_recipe(argv, LinearizeRun)
    command = parse(
        LinearizeCommand,
        "retentive linearize",
        argv,
        description=f"{LinearizeCommand.__doc__}\n\n{RECIPE}",
        default=tyro.MISSING_NONPROP if recipe is None else LinearizeCommand(recipe),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    with stoppable(command.run.out):
        command.run.run(overrides=typed_options(argv), shown=partial(shown, sys.stderr))

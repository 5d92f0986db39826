"""`retentive sft`: teach a model to answer, by conversations; the template that they are spelt by goes with it."""

import sys
from functools import partial

import tyro

from retentive.cli.data import shown
from retentive.cli.progress import say
from retentive.cli.train import CHANGES, interruptible, typed_options
from retentive.train.sft import SftRun


def main(argv: list[str]) -> None:
    """`retentive sft ARGV`."""
    run = tyro.cli(SftRun, prog="retentive sft", args=argv, registry=CHANGES)
    with interruptible():
        run.run(overrides=typed_options(argv), shown=partial(shown, sys.stderr), say=say)

"""`retentive linearize`: turn a Transformer into a RetNet, in stages that can be stopped and resumed."""

import sys
from functools import partial

import tyro

from retentive.cli.data import shown
from retentive.cli.parsing import parse, typed_options
from retentive.cli.train import stoppable
from retentive.linearization import LinearizeRun


def main(argv: list[str]) -> None:
    """`retentive linearize ARGV`."""
    run = parse(LinearizeRun, "retentive linearize", argv, config=(tyro.conf.OmitArgPrefixes,))
    with stoppable(run.out):
        run.run(overrides=typed_options(argv), shown=partial(shown, sys.stderr))

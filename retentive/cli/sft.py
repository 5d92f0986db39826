"""`retentive sft`: fine-tune a model on conversations; their chat template is saved with it."""

import sys
from dataclasses import replace
from functools import partial

from retentive.cli.data import shown
from retentive.cli.parsing import parse, typed_options
from retentive.cli.progress import say
from retentive.cli.train import carry_out, read_changes
from retentive.train.sft import SftRun


def main(argv: list[str]) -> None:
    """`retentive sft ARGV`."""
    run = parse(SftRun, "retentive sft", argv)
    typed = typed_options(argv)
    if "set" in typed:
        run = replace(run, set=read_changes(list(run.set)))
    carry_out(run, typed, then="chat", shown=partial(shown, sys.stderr), say=say)

"""Effect of single changes to the paper's RetNet, to ours and to the Transformer twin: one size, eight seeds.

    retentive compare --recipe recipes/compare_changes.py        (after recipes/compare_sizes.py, on the same data)

2 M tokens of novels per run, 168 runs. This takes hours; the command prints an estimate first.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison

PAPER = ("retnet-paper", "no-head-norm", "gated", "fast-decay", "fixed", "qk-norm")
OURS = ("retnet-no-qk-norm", "retnet-no-gate", "retnet-sigmoid", "retnet-no-rotation", "retnet-head-norm")
OURS += ("retnet-fixed", "retnet-qk-bias", "retnet-decay-bias", "retnet-scale-4", "retnet-small-heads")
TWIN = ("transformer", "transformer-qk-norm", "transformer-forget", "transformer-qk-norm-forget")


def recipe() -> Comparison:
    sizes = runpy.run_path(str(Path(__file__).with_name("compare_sizes.py")))["recipe"]()
    train = replace(sizes.train, steps=250)
    variants = ("retnet", *PAPER, *OURS, *TWIN)
    out = Path("runs/compare-changes")
    one = replace(sizes, sizes=("1m",), seeds=tuple(range(8)), lrs=(8e-3,), tune=False)
    return replace(one, out=out, variants=variants, train=train)

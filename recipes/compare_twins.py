"""Our RetNet, the paper's, one with fixed decays and a hybrid, beside Transformer twins, at 1m.

    retentive compare --recipe recipes/compare_twins.py        (on the data of recipes/compare_sizes.py)

4.1 M tokens per run, three seeds, each at the best of three learning rates.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison

VARIANTS = ("retnet", "retnet-paper", "fixed", "hybrid-window")
VARIANTS += ("transformer", "transformer-qk-norm", "transformer-qk-norm-forget")


def recipe() -> Comparison:
    sizes = runpy.run_path(str(Path(__file__).with_name("compare_sizes.py")))["recipe"]()
    out, lrs = Path("runs/compare-twins"), (4e-3, 8e-3, 1.6e-2)
    return replace(sizes, out=out, variants=VARIANTS, sizes=("1m",), seeds=(0, 1, 2), lrs=lrs)

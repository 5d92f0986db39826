"""Does the lead last with five times as many tokens? One run each of 20.5 M tokens at 5m, 1.5 epochs.

retentive compare --recipe recipes/compare_long.py        (on the data of recipes/compare_sizes.py)
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison


def recipe() -> Comparison:
    sizes = runpy.run_path(str(Path(__file__).with_name("compare_sizes.py")))["recipe"]()
    one = replace(sizes, sizes=("5m",), seeds=(0,), lrs=(4e-3,), train=replace(sizes.train, steps=2500, eval_every=250))
    return replace(one, out=Path("runs/compare-long"), variants=("retnet", "retnet-paper", "transformer-qk-norm"))

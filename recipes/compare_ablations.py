"""Ablations of retention, and other decays: one size, two seeds, 2 M tokens of novels.

retentive compare --recipe recipes/compare_ablations.py        (after recipes/compare_sizes.py, on the same data)
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison

VARIANTS = ("retnet-paper", "no-gate", "no-head-norm", "no-decay", "one-decay", "small-heads", "paper-decay")
VARIANTS += ("no-score-norm", "short-head", "gated", "hybrid-whole", "transformer")


def recipe() -> Comparison:
    sizes = runpy.run_path(str(Path(__file__).with_name("compare_sizes.py")))["recipe"]
    train = replace(sizes().train, steps=250)
    command = replace(sizes(), out=Path("runs/compare-ablations"), variants=VARIANTS, train=train)
    return replace(command, sizes=("1m",), lrs=(8e-3,), tune=False)

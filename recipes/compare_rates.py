"""Best learning rate of RetNet and its twin: five values each, one size, one seed, a third of an epoch of novels.

    retentive data NOVELS/train --valid NOVELS/valid --out data/novels
    retentive compare --recipe recipes/compare_rates.py

A comparison at one learning rate may favour one of them. On novels both do best at the same
(results/compare-rates_*.json).
"""

from pathlib import Path

from retentive.compare import Comparison
from retentive.train import TrainConfig


def recipe() -> Comparison:
    return Comparison(
        data=Path("data/novels"),
        out=Path("runs/compare-rates"),
        variants=("retnet-paper", "transformer"),
        sizes=("1m",),
        seeds=(0,),
        lrs=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        jobs=2,
        train=TrainConfig(steps=500, precision="bf16", eval_every=100, eval_tokens=32768, save_every=100, keep=1),
    )

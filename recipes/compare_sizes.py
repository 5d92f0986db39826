"""RetNets and Transformer twins in three sizes on novels: two seeds, each at the better of two learning rates.

    retentive data NOVELS/train --valid NOVELS/valid --out data/novels
    retentive compare --recipe recipes/compare_sizes.py

Every run sees 4.1 M tokens, a third of an epoch of 76 books. With the result of recipes/compare_twins.py as --earlier
the smallest size is already done.
"""

from pathlib import Path

from retentive.compare import Comparison
from retentive.train import TrainConfig


def recipe() -> Comparison:
    return Comparison(
        data=Path("data/novels"),
        out=Path("runs/compare-sizes"),
        variants=("retnet", "retnet-paper", "transformer", "transformer-qk-norm"),
        sizes=("1m", "2m", "5m"),
        seeds=(0, 1),
        lrs=(4e-3, 8e-3),
        tune=True,
        jobs=2,
        train=TrainConfig(steps=500, precision="bf16", eval_every=100, eval_tokens=32768, save_every=100, keep=1),
    )

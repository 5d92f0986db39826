"""A first model on your own text, in a few minutes on a laptop.

retentive data MY_TEXTS --out data/mine
retentive train --recipe recipes/quickstart.py
retentive generate runs/mine --prompt "Once"
"""

from pathlib import Path

from retentive.train import TrainConfig, TrainRun


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/mine"),
        out=Path("runs/mine"),
        size="1m",
        train=TrainConfig(steps=500, lr=3e-3, warmup=50, eval_every=100, save_every=100, sample_every=100),
    )

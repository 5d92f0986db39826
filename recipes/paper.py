"""The paper's 1.3B model and training budget (arXiv 2307.08621, section 3.1), for a cluster.

25,000 steps of 4 M tokens, 2048 long, AdamW (0.9, 0.98), weight decay 0.05, warm-up 375, linear decay, clip 2.0. On one
machine the 2048 rows of a step come as 512 accumulated batches of 4.
"""

from pathlib import Path

from retentive.train import TrainConfig, TrainRun


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/pile"),
        out=Path("runs/paper-1.3b"),
        size="paper-1.3b",
        mode="packed",
        batch=4,
        length=2048,
        train=TrainConfig(
            steps=25_000,
            lr=6e-4,
            schedule="linear",
            final_lr=0.0,
            warmup=375,
            weight_decay=0.05,
            beta2=0.98,
            clip=2.0,
            accumulate=512,
            checkpoint_activations=True,
        ),
    )

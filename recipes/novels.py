"""A small RetNet on whole novels, about half an hour on two cores; every row continues where it stopped.

    retentive data NOVELS/train --valid NOVELS/valid --out data/novels      (one text file a book)
    retentive train --recipe recipes/novels.py

The state passes from step to step (truncated back-propagation through time), so the model trains on books instead of
windows. Results on 76 novels of the ELTeC corpus, 4 held out: results/novels_*.md.
"""

from pathlib import Path

from retentive.train import TrainConfig, TrainRun


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/novels"),
        out=Path("runs/novels"),
        size="5m",
        mode="carry",
        batch=8,
        length=1024,
        train=TrainConfig(
            steps=2000,
            lr=3e-3,
            final_lr=0.05,
            warmup=100,
            eval_every=200,
            save_every=100,
            sample_every=400,
            sample_prompt="The old house",
        ),
    )

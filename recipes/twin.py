"""The Transformer twin of recipes/novels.py: the same tokens, number of parameters and steps.

Compare held-out bits per byte in windows of equal length. A Transformer has no state of constant size to carry, so it
reads windows. `retentive train --recipe recipes/novels.py --mode reset` trains a RetNet on windows too.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.train import TrainRun


def recipe() -> TrainRun:
    novels = runpy.run_path(str(Path(__file__).with_name("novels.py")))["recipe"]
    return replace(novels(), model="transformer", mode="reset", out=Path("runs/novels-transformer"))

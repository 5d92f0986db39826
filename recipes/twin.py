"""The Transformer twin of recipes/novels.py: same tokens in the same number, same parameters, same budget of steps.

Compare the runs' held-out bits per byte in windows of the same length. (A Transformer has no state of constant size to
carry, so it reads windows; `retentive train --recipe recipes/novels.py --mode reset` is the RetNet that does so too.)
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.train import TrainRun


def recipe() -> TrainRun:
    novels = runpy.run_path(str(Path(__file__).with_name("novels.py")))["recipe"]
    return replace(novels(), model="transformer", mode="reset", out=Path("runs/novels-transformer"))

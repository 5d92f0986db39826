"""Training: one loop for any model of this package, its optimiser, loss, log and checkpoints."""

from retentive.train.config import TrainConfig
from retentive.train.loop import train

__all__ = ["TrainConfig", "train"]

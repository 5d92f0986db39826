"""Training: one loop for any model, any batches and any objective; and runs, which are that loop with all it needs.

retentive.train("data/mine", "runs/mine", size="5m", steps=1000)       a whole run, in one call
retentive.sft("runs/mine", "chats.jsonl", "runs/talks", epochs=2)      fine-tuning on conversations, in one call
TrainRun(data=…, out=…, train=TrainConfig(steps=1000)).run()           a run as a value (`run`), or SftRun (`sft`)
train(model, batches, objective, config, out)                          the loop alone, for parts of your own (`loop`)
launch(TrainRun(…).run, nproc=8)                                       a run by several processes (`parallel.launch`)
"""

import sys
from types import ModuleType
from typing import Any

from retentive.train.config import TrainConfig
from retentive.train.hooks import Hooks
from retentive.train.loop import train
from retentive.train.objective import language_modelling
from retentive.train.parallel import Parallel
from retentive.train.run import TrainRun
from retentive.train.sft import SftRun
from retentive.train.signals import Interrupted

__all__ = ["Hooks", "Interrupted", "Parallel", "SftRun", "TrainConfig", "TrainRun", "language_modelling", "train"]


class _Callable(ModuleType):
    """A module that can be called. Importing this package replaces the function `retentive.train` by the package, as
    Python sets a subpackage on its parent; so the package must do what the function does."""

    def __call__(self, data: Any, out: Any, **options: Any) -> Any:
        return TrainRun.of(data, out, **options).run(overrides=options)


sys.modules[__name__].__class__ = _Callable

"""Training: one loop for any model, any batches and any objective; and runs, which are that loop with all it needs.

retentive.train("data/mine", "runs/mine", size="5m", steps=1000)       a whole run, in one call
retentive.sft("runs/mine", "chats.jsonl", "runs/talks", epochs=2)      fine-tuning on conversations, in one call
TrainRun(data=…, out=…, train=TrainConfig(steps=1000)).run()           a run as a value (`run`), or SftRun (`sft`)
train(model, batches, objective, config, out)                          the loop alone, for parts of your own (`loop`)
launch(TrainRun(…).run, nproc=8)                                       a run by several processes (`parallel.launch`)
"""

from retentive.train.config import TrainConfig
from retentive.train.hooks import Hooks
from retentive.train.loop import train
from retentive.train.objective import language_modelling
from retentive.train.parallel import Parallel
from retentive.train.run import TrainRun
from retentive.train.sft import SftRun
from retentive.train.signals import Interrupted

__all__ = ["Hooks", "Interrupted", "Parallel", "SftRun", "TrainConfig", "TrainRun", "language_modelling", "train"]

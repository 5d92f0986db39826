"""Evaluation: tasks in local files, scored by log-likelihood from states that are read once and cloned."""

from retentive.evals.likelihood import Request, Score, encode, score
from retentive.evals.run import Evaluation, evaluate
from retentive.evals.tasks import TASKS, Question, Task

__all__ = ["TASKS", "Evaluation", "Question", "Request", "Score", "Task", "encode", "evaluate", "score"]

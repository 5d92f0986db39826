"""Evaluation: tasks in local files, scored by log-likelihood. What prompts share is read once, and its state copied."""

from retentive.evals.likelihood import Request, Score, encode, score
from retentive.evals.run import Evaluation, evaluate
from retentive.evals.tasks import TASKS, Question, Task

__all__ = ["TASKS", "Evaluation", "Question", "Request", "Score", "Task", "encode", "evaluate", "score"]

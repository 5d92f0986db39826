"""Likelihood tasks: questions scored by log-likelihood, to metrics with confidence intervals and a record per question.

    acc          the likeliest choice is the right one (kind word: greedy decoding gives the word)
    acc_norm     the likeliest choice per character,  acc_bytes  per UTF-8 byte
    perplexity   exp of minus the mean log-likelihood of the words
    bits_per_byte, byte_perplexity, word_perplexity      of texts: all bits over all bytes or words

Texts are read twice: whole, with the state passed on from the first token to the last, and in windows of `window`
tokens that see one token of the window before. The last window is filled up with earlier tokens, as in lm-eval.
"""

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from retentive.data.tokenizer import Tokenizer
from retentive.evals.likelihood import Progress, Request, Score, encode, score
from retentive.evals.read import Item, find, known, parse, where
from retentive.evals.stats import mean_interval, ratio_interval, wilson
from retentive.evals.tasks import TASKS, Task
from retentive.models import LanguageModel
from retentive.options import option

WINDOW = 2048
"""Default tokens per window."""


def score_likelihood_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    names: list[str],
    folder: Path,
    *,
    shots: int = 0,
    limit: int | None = None,
    max_length: int | None = None,
    text_window: int = WINDOW,
    progress: Progress = lambda *_: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores likelihood tasks; returns (a row for each task and metric, a record for each question).

    Args:
        names: names in TASKS.
        folder: folder of their files.
        shots: answered examples before each question.
        limit: questions of each task, from the start of its file.
        max_length: maximum tokens of a question; unlimited by default.
        text_window: tokens per window, for texts read in windows.
        progress: called with each task, its number of questions and how many are done.

    Raises:
        FileNotFoundError: a task has no file.
        ValueError: an unknown task, an unusable line, or a question that is too long. Raised before any is scored.
        ArithmeticError: the model's logits are not finite.
    """
    for what, value, least in (("shots", shots, 0), ("limit", limit, 1), ("max_length", max_length, 2)):
        if value is not None and value < least:
            raise ValueError(f"{option(what, value)}: must be at least {least}")
    if text_window < 2:
        raise ValueError(f"{option('text_window', text_window)}: must be at least 2")
    files = {name: find(name, folder) for name in known(names)}
    asked = {name: parse(TASKS[name], file, limit=limit, shots=shots) for name, file in files.items()}
    # parse and encode all files before scoring, so that errors come at once and not after an hour
    groups = {
        name: list(_requests(TASKS[name], items, tokenizer, files[name], text_window, max_length))
        for name, items in asked.items()
    }
    rows, records = [], []
    for name, items in asked.items():
        progress(name, len(groups[name]), 0)
        found = score(model, groups[name], progress=partial(progress, name, len(groups[name])))
        new = list(_records(TASKS[name], items, iter(found), text_window))
        rows += [{"task": name, "shots": shots, "n": len(new), **row} for row in summary(TASKS[name], new)]
        records += [{"task": name, **record} for record in new]
    return rows, records


def windows(ids: Sequence[int], first: int, length: int) -> list[Request]:
    """Returns requests that together predict every id once, each within `length` tokens; `first` precedes all."""
    ids = [first, *ids]
    ends = [*range(length, len(ids) - 1, length), len(ids) - 1]
    cuts = []
    for before, end in pairwise([0, *ends]):
        # the last window would be short, so it starts earlier to have `length` tokens too
        context = ids[max(0, end - length) : before + 1]
        cuts.append(Request(context, ids[before + 1 : end + 1]))
    return cuts


def _requests(
    task: Task, items: list[Item], tokenizer: Tokenizer, file: Path, window: int, max_length: int | None
) -> Iterator[list[Request]]:
    """Yields a group of requests per question; for each text one of the whole text, then one per window."""
    for line, content in items:
        if task.kind == "text":
            ids = tokenizer.encode(content)
            yield [Request([tokenizer.eos_id], ids)]
            yield from ([cut] for cut in windows(ids, tokenizer.eos_id, window))
            continue
        try:
            group = [encode(tokenizer, *pair) for pair in zip(content.prompts, content.continuations, strict=True)]
        except ValueError as error:
            raise ValueError(f"{where(file, line)}: {error}") from None
        longest = max(len(r.context) + len(r.continuation) for r in group)
        if max_length is not None and longest > max_length:
            raise ValueError(
                f"{where(file, line)}: its question has {longest} tokens; raise {option('max_length', max_length)}"
            )
        yield group


def _records(task: Task, items: list[Item], found: Iterator[list[Score]], window: int) -> Iterator[dict[str, Any]]:
    """Yields a record for each question or text; `found` has the scores in the order of `_requests`."""
    for line, content in items:
        scores = next(found)
        if task.kind == "text":
            (uncut,) = scores
            cuts = [next(found)[0].logprob for _ in range(0, uncut.tokens, window)]
            # words as lm-eval counts them: white space at either end counts as one more
            sizes = {"bytes": len(content.encode()), "words": len(re.split(r"\s+", content))}
            sums = {"logprob": uncut.logprob, "windowed_logprob": sum(cuts)}
            yield {"line": line, **sums, "tokens": uncut.tokens, **sizes}
            continue
        logprobs = [s.logprob for s in scores]
        record = {"line": line, "gold": content.gold, "logprobs": logprobs}
        if task.kind == "word":
            yield {**record, "acc": scores[0].greedy}
            continue
        lengths = {  # divisors of the log-likelihoods, by metric
            "acc": [1] * len(logprobs),
            "acc_norm": [len(c) for c in content.choices],
            "acc_bytes": [len(c.encode()) for c in content.choices],
        }
        for metric in task.metrics:
            by = [logprob / n for logprob, n in zip(logprobs, lengths[metric], strict=True)]
            record[metric] = by.index(max(by)) == content.gold
        yield record


def summary(task: Task, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each metric: its name, value and 95 % interval (None if there are too few questions)."""
    rows = []
    for metric in task.metrics:
        if task.kind == "text":
            for field, suffix in (("logprob", ""), ("windowed_logprob", "_windowed")):
                rows.append({"metric": metric + suffix, **_of_texts(metric, records, field)})
        elif metric == "perplexity":
            losses = [-record["logprobs"][0] for record in records]
            value, interval = math.exp(sum(losses) / len(losses)), mean_interval(losses)
            rows.append({"metric": metric, "value": value, "interval": interval and [math.exp(x) for x in interval]})
        else:
            right = sum(record[metric] for record in records)
            rows.append({"metric": metric, "value": right / len(records), "interval": wilson(right, len(records))})
    return rows


def _of_texts(metric: str, records: list[dict[str, Any]], field: str) -> dict[str, Any]:
    """Returns value and interval of a metric over texts, from the sums in `field`: all nats over all bytes or words."""
    losses = [-record[field] for record in records]
    units = [record["words" if metric == "word_perplexity" else "bytes"] for record in records]
    finish = (lambda x: x / math.log(2)) if metric == "bits_per_byte" else math.exp
    interval = ratio_interval(losses, units)
    return {"value": finish(sum(losses) / sum(units)), "interval": interval and [finish(x) for x in interval]}

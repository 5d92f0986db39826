"""Questions asked, answers counted: from a model and files to numbers with their confidence, and one record a question.

    acc          the likeliest choice is the right one (word: greedy decoding gives the word)
    acc_norm     the likeliest by character,  acc_bytes  by byte of UTF-8
    perplexity   exp of minus the mean log-likelihood of the words
    bits_per_byte, byte_perplexity, word_perplexity      of texts: all bits over all bytes or words

Texts are read twice: uncut, the state handed on from the first token to the last, and in windows of `window` tokens
that know one token of what was before, the last one filled up with context, as lm-eval does.
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
from retentive.models import Model

WINDOW = 2048


def score_tasks(
    model: Model,
    tokenizer: Tokenizer,
    names: list[str],
    folder: Path,
    *,
    shots: int = 0,
    limit: int | None = None,
    max_length: int | None = None,
    window: int = WINDOW,
    progress: Progress = lambda *_: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row of each task and metric, a record of each question).

    Args:
        names: of TASKS.
        folder: where their files lie.
        shots: answered examples before each question.
        limit: questions of each task, from the beginning of its file.
        max_length: tokens that a question may take; any number if not given.
        window: tokens that a windowed reading of a text sees at once.
        progress: is told how far it is.

    Raises:
        FileNotFoundError: a task without a file.
        ValueError: an unknown task, a line that cannot be used, a question that is too long; before any is asked.
        ArithmeticError: the model's logits are not finite.
    """
    for what, value, least in (("shots", shots, 0), ("limit", limit, 1), ("max_length", max_length, 2)):
        if value is not None and value < least:
            raise ValueError(f"{what} must be at least {least}, got {value}")
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    files = {name: find(name, folder) for name in known(names)}
    asked = {name: parse(TASKS[name], file, limit=limit, shots=shots) for name, file in files.items()}
    groups = {
        name: list(_requests(TASKS[name], items, tokenizer, files[name], window, max_length))
        for name, items in asked.items()
    }
    rows, records = [], []
    for name, items in asked.items():
        progress(name, len(groups[name]), 0)
        found = score(model, groups[name], progress=partial(progress, name, len(groups[name])))
        new = list(_records(TASKS[name], items, iter(found), window))
        rows += [{"task": name, "shots": shots, "n": len(new), **row} for row in summary(TASKS[name], new)]
        records += [{"task": name, **record} for record in new]
    return rows, records


def windows(ids: Sequence[int], first: int, length: int) -> list[Request]:
    """The ids in turn, each predicted once from at most `length` tokens; `first` stands before the first."""
    ids = [first, *ids]
    ends = [*range(length, len(ids) - 1, length), len(ids) - 1]
    cuts = []
    for before, end in pairwise([0, *ends]):
        context = ids[max(0, end - length) : before + 1]
        cuts.append(Request(context, ids[before + 1 : end + 1]))
    return cuts


def _requests(
    task: Task, items: list[Item], tokenizer: Tokenizer, file: Path, window: int, max_length: int | None
) -> Iterator[list[Request]]:
    """A group for each question; for each text one of all, and one for each of its windows."""
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
                f"{where(file, line)}: the question takes {longest} tokens, more than the {max_length} allowed"
            )
        yield group


def _records(task: Task, items: list[Item], found: Iterator[list[Score]], window: int) -> Iterator[dict[str, Any]]:
    """What came out of each question or text; `found` in the order of `_requests`."""
    for line, content in items:
        scores = next(found)
        if task.kind == "text":
            (uncut,) = scores
            cuts = [next(found)[0].logprob for _ in range(0, uncut.tokens, window)]
            sizes = {"bytes": len(content.encode()), "words": len(re.split(r"\s+", content))}
            sums = {"logprob": uncut.logprob, "windowed_logprob": sum(cuts)}
            yield {"line": line, **sums, "tokens": uncut.tokens, **sizes}
            continue
        logprobs = [s.logprob for s in scores]
        record = {"line": line, "gold": content.gold, "logprobs": logprobs}
        if task.kind == "word":
            yield {**record, "acc": scores[0].greedy}
            continue
        lengths = {
            "acc": [1] * len(logprobs),
            "acc_norm": [len(c) for c in content.choices],
            "acc_bytes": [len(c.encode()) for c in content.choices],
        }
        for metric in task.metrics:
            by = [logprob / n for logprob, n in zip(logprobs, lengths[metric], strict=True)]
            record[metric] = by.index(max(by)) == content.gold
        yield record


def summary(task: Task, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each metric: its name, value and 95 % interval (None where there is too little to say)."""
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
    losses = [-record[field] for record in records]
    units = [record["words" if metric == "word_perplexity" else "bytes"] for record in records]
    finish = (lambda x: x / math.log(2)) if metric == "bits_per_byte" else math.exp
    interval = ratio_interval(losses, units)
    return {"value": finish(sum(losses) / sum(units)), "interval": interval and [finish(x) for x in interval]}

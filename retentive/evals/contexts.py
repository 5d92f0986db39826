"""Benefit of longer contexts: loss on texts, and recall of a hidden number (passkey), by context length.

Texts: the last `last` tokens of each window are predicted. Windows of all lengths end at the same positions, so they
predict the same tokens and differ only in the context before them (protocol of the paper's 2024 version, table 6, with
`last` 128). Windows begin in the middle of a document, as in training.

passkey: a number is hidden in filler text and asked for at its end (Mohtashami and Jaggi, arXiv 2305.16300). `acc`: it
is likelier than nine other numbers. `written`: greedy decoding writes it, which is harder.
"""

import math
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from retentive.data.tokenizer import Tokenizer
from retentive.evals.likelihood import Progress, Request, Score, encode, score
from retentive.evals.read import find, parse
from retentive.evals.stats import ratio_interval, wilson
from retentive.evals.tasks import PASSKEY, TASKS
from retentive.models import LanguageModel
from retentive.options import option

LAST = 128
"""Default number of predicted tokens per window."""
WINDOWS = 8
"""Maximum number of positions per document where windows end."""
KEYS = 20
"""Numbers hidden at each length, from the start of the text to its end."""
OTHERS = 9
"""Wrong numbers beside the right one: guessing has an accuracy of one in ten."""


def score_contexts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    names: Sequence[str],
    folder: Path | None,
    contexts: Sequence[int],
    *,
    last: int = LAST,
    limit: int | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores tasks at several context lengths; returns (rows by task, length and metric, records by window or key).

    Args:
        names: tasks of kind text in TASKS, or "passkey".
        folder: folder of the texts; passkey needs none.
        contexts: window lengths in tokens, predicted tokens included.
        last: predicted tokens of each window.
        limit: documents of each task, from the start of its file.
        progress: called with each task, its number of windows or questions and how many are done.

    Raises:
        FileNotFoundError: a task has no file.
        ValueError: an unknown task, a length that leaves no context, or only documents shorter than the longest length.
        ArithmeticError: the model's logits are not finite.
    """
    check(names, contexts, last)
    contexts = sorted(set(contexts))
    asked = {
        name: _hidden_numbers(tokenizer, contexts)
        if name == PASSKEY
        else list(_windows(name, tokenizer, folder, contexts, last, limit))
        for name in names
    }
    rows, records = [], []
    for name, about in asked.items():
        progress(name, len(about), 0)
        found = score(model, [group for _, group in about], progress=partial(progress, name, len(about)))
        new = [_record(name, what, scores) for (what, _), scores in zip(about, found, strict=True)]
        rows += [{"task": name, "shots": 0, **row} for row in _rows(name, new, contexts)]
        records += [{"task": name, **record} for record in new]
    return rows, records


def check(names: Sequence[str], contexts: Sequence[int], last: int) -> None:
    """Raises ValueError for tasks without contexts to vary, and for contexts that are too short."""
    texts = [name for name, task in TASKS.items() if task.kind == "text"]
    for name in names:
        if name not in (*texts, PASSKEY):
            raise ValueError(f"task {name!r} has no contexts to vary, expected some of {', '.join((*texts, PASSKEY))}")
    if last < 1:
        raise ValueError(f"{option('last', last)}: must be at least 1")
    if min(contexts) <= last and set(names) != {PASSKEY}:
        raise ValueError(f"`contexts`: {min(contexts)} tokens leave none before the {last} that are predicted (`last`)")
    if not names:
        raise ValueError(f"`tasks` is empty: expected some of {', '.join((*texts, PASSKEY))}")


def _windows(
    name: str, tokenizer: Tokenizer, folder: Path | None, contexts: Sequence[int], last: int, limit: int | None
) -> Iterator[tuple[dict[str, Any], list[Request]]]:
    """Yields (about, request) for windows of every length, at up to WINDOWS positions of each long enough document."""
    if folder is None:
        raise ValueError(f"`data` is needed: the folder of the texts of {name}")
    if limit is not None and limit < 1:
        raise ValueError(f"{option('limit', limit)}: must be at least 1")
    file, longest, found = find(name, folder), max(contexts), 0
    for line, text in parse(TASKS[name], file, limit=limit):
        ids = tokenizer.encode(text)
        spare = len(ids) - longest  # range within which the end of the longest window can move
        ends = min(WINDOWS, spare // last + 1)  # at least `last` apart, so that no token is predicted twice
        for n in range(ends):
            end = len(ids) - n * (spare // max(1, ends - 1))
            nbytes = _bytes(tokenizer, ids, end - last, end)
            for context in contexts:
                about = {"line": line, "end": end, "context": context, "tokens": last, "bytes": nbytes}
                yield about, [Request(ids[end - context : end - last], ids[end - last : end])]
        found += max(0, ends)
    if not found:
        raise ValueError(f"{file}: no document has the {longest} tokens of the longest context")


def _bytes(tokenizer: Tokenizer, ids: Sequence[int], start: int, end: int) -> int:
    """Returns the UTF-8 bytes of ids[start:end]; a character of several tokens counts where it ends."""
    begin = max(0, start - 8)  # no character has more bytes than this
    # drop the replacement character of an incomplete one
    until_start, until_end = (tokenizer.decode(ids[begin:stop]).rstrip("\ufffd") for stop in (start, end))
    return len(until_end.encode()) - len(until_start.encode())


BEGIN = "There is important information hidden in a lot of dull text. Find it and remember it.\n"
DULL = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HIDDEN = " The pass key is {key}. Remember it. {key} is the pass key."
ASK = "\nWhat is the pass key? The pass key is"


def _hidden_numbers(tokenizer: Tokenizer, contexts: Sequence[int]) -> list[tuple[dict[str, Any], list[Request]]]:
    """Returns (about, requests) of KEYS questions per length; the first of the OTHERS + 1 choices is right."""
    draw, asked = random.Random(0), []
    # tokens of everything but the filler, with room for the number; and tokens of one repetition of the filler
    fixed = len(tokenizer.encode(BEGIN + HIDDEN.format(key=10**5 - 1) + ASK)) + 8
    dull = len(tokenizer.encode(DULL * 8)) / 8
    for context in contexts:
        count = int((context - fixed) / dull)
        if count < 1:
            raise ValueError(f"`contexts`: passkey needs at least {fixed + math.ceil(dull)} tokens, got {context}")
        for n in range(KEYS):
            keys = draw.sample(range(10**4, 10**5), OTHERS + 1)
            before = round(count * n / (KEYS - 1))  # from the very start to the very end
            text = BEGIN + DULL * before + HIDDEN.format(key=keys[0]) + DULL * (count - before) + ASK
            about = {"context": context, "depth": n / (KEYS - 1), "key": keys[0]}
            asked.append((about, [encode(tokenizer, text, f" {key}") for key in keys]))
    return asked


def _record(name: str, about: dict[str, Any], scores: list[Score]) -> dict[str, Any]:
    """Returns the record of a window or question: its description and scores."""
    if name != PASSKEY:
        return {**about, "logprob": scores[0].logprob}
    logprobs = [s.logprob for s in scores]
    return {**about, "logprobs": logprobs, "acc": logprobs.index(max(logprobs)) == 0, "written": scores[0].greedy}


def _rows(name: str, records: list[dict[str, Any]], contexts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields a row for each length and metric."""
    for context in contexts:
        mine = [r for r in records if r["context"] == context]
        of = {"context": context, "n": len(mine)}
        if name == PASSKEY:
            for metric in ("acc", "written"):
                right = sum(r[metric] for r in mine)
                yield {**of, "metric": metric, "value": right / len(mine), "interval": wilson(right, len(mine))}
            continue
        for metric, unit, finish in (("perplexity", "tokens", math.exp), ("bits_per_byte", "bytes", _bits)):
            # sum over each document's windows first, since the bootstrap draws documents
            by_document: dict[int, list[float]] = {}
            for r in mine:
                sums = by_document.setdefault(r["line"], [0.0, 0.0])
                sums[0] -= r["logprob"]
                sums[1] += r[unit]
            losses, units = zip(*by_document.values(), strict=True)
            interval = ratio_interval(losses, units)
            low_high = interval and [finish(x) for x in interval]
            yield {**of, "metric": metric, "value": finish(sum(losses) / sum(units)), "interval": low_high}


def _bits(nats: float) -> float:
    return nats / math.log(2)

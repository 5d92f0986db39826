"""What a longer context is worth: texts and a hidden number, at one length of context after the other.

Texts: the last `last` tokens of a window are predicted, from windows of every length that end at the same places: all
lengths predict the same tokens, and only what stands before differs (the protocol of the paper's 2024 version, table 6,
where `last` is 128). Windows begin in the middle of a document, as training's do.

passkey: a number stands somewhere in dull text, and is asked for at its end (Mohtashami and Jaggi, arXiv 2305.16300).
It must be likelier than nine others of its kind; to write it out takes more.
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
from retentive.models import Model

LAST = 128
WINDOWS = 8
"""Places in each document where windows end."""
KEYS = 20
"""Numbers hidden at each length, from the beginning of the text to its end."""
OTHERS = 9


def score_contexts(
    model: Model,
    tokenizer: Tokenizer,
    names: Sequence[str],
    folder: Path | None,
    contexts: Sequence[int],
    *,
    last: int = LAST,
    limit: int | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row of each task, length and metric, a record of each window or question).

    Args:
        names: of TASKS those of kind text; "passkey".
        folder: where the texts lie; passkey needs none.
        contexts: tokens of a window, those that are predicted among them.
        last: tokens of each window that are predicted.
        limit: documents of each task, from the beginning of its file.
        progress: is told how far it is.

    Raises:
        FileNotFoundError: a task without a file.
        ValueError: an unknown task, a length that leaves no context, documents that are all shorter than the longest.
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
    """Raises ValueError for names and lengths that this cannot measure."""
    texts = [name for name, task in TASKS.items() if task.kind == "text"]
    for name in names:
        if name not in (*texts, PASSKEY):
            raise ValueError(f"task {name!r} has no contexts to vary, expected some of {', '.join((*texts, PASSKEY))}")
    if last < 1:
        raise ValueError(f"the tokens predicted of each window must be at least 1, got {last}")
    if min(contexts) <= last and set(names) != {PASSKEY}:
        raise ValueError(f"a context of {min(contexts)} tokens leaves none before the last {last} that are predicted")
    if not names:
        raise ValueError(f"no task given, expected some of {', '.join((*texts, PASSKEY))}")


def _windows(
    name: str, tokenizer: Tokenizer, folder: Path | None, contexts: Sequence[int], last: int, limit: int | None
) -> Iterator[tuple[dict[str, Any], list[Request]]]:
    """Of each document that is long enough for all lengths, at each of its places, a window of every length."""
    if folder is None:
        raise ValueError(f"task {name} needs --data: the folder of its texts")
    if limit is not None and limit < 1:
        raise ValueError(f"the documents of a task must be at least 1, got {limit}")
    file, longest, found = find(name, folder), max(contexts), 0
    for line, text in parse(TASKS[name], file, limit=limit):
        ids = tokenizer.encode(text)
        spare = len(ids) - longest
        places = min(WINDOWS, spare // last + 1)
        for n in range(places):
            end = len(ids) - n * (spare // max(1, places - 1))
            nbytes = _bytes(tokenizer, ids, end - last, end)
            for context in contexts:
                about = {"line": line, "end": end, "context": context, "tokens": last, "bytes": nbytes}
                yield about, [Request(ids[end - context : end - last], ids[end - last : end])]
        found += max(0, places)
    if not found:
        raise ValueError(f"{file}: no document has the {longest} tokens of the longest context")


def _bytes(tokenizer: Tokenizer, ids: Sequence[int], start: int, end: int) -> int:
    """Of UTF-8 that ids[start:end] stand for; a character of several tokens counts where it ends."""
    begin = max(0, start - 8)  # no character has more bytes than that
    until_start, until_end = (tokenizer.decode(ids[begin:stop]).rstrip("\ufffd") for stop in (start, end))
    return len(until_end.encode()) - len(until_start.encode())


BEGIN = "There is important information hidden in a lot of dull text. Find it and remember it.\n"
DULL = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HIDDEN = " The pass key is {key}. Remember it. {key} is the pass key."
ASK = "\nWhat is the pass key? The pass key is"


def _hidden_numbers(tokenizer: Tokenizer, contexts: Sequence[int]) -> list[tuple[dict[str, Any], list[Request]]]:
    """Questions, a group of OTHERS + 1 choices each; the first is right."""
    draw, asked = random.Random(0), []
    fixed = len(tokenizer.encode(BEGIN + HIDDEN.format(key=10**5 - 1) + ASK)) + 8
    dull = len(tokenizer.encode(DULL * 8)) / 8
    for context in contexts:
        count = int((context - fixed) / dull)
        if count < 1:
            raise ValueError(f"a pass key needs a context of {fixed + math.ceil(dull)} tokens at least, got {context}")
        for n in range(KEYS):
            keys = draw.sample(range(10**4, 10**5), OTHERS + 1)
            before = round(count * n / (KEYS - 1))
            text = BEGIN + DULL * before + HIDDEN.format(key=keys[0]) + DULL * (count - before) + ASK
            about = {"context": context, "depth": n / (KEYS - 1), "key": keys[0]}
            asked.append((about, [encode(tokenizer, text, f" {key}") for key in keys]))
    return asked


def _record(name: str, about: dict[str, Any], scores: list[Score]) -> dict[str, Any]:
    if name != PASSKEY:
        return {**about, "logprob": scores[0].logprob}
    logprobs = [s.logprob for s in scores]
    return {**about, "logprobs": logprobs, "acc": logprobs.index(max(logprobs)) == 0, "written": scores[0].greedy}


def _rows(name: str, records: list[dict[str, Any]], contexts: Sequence[int]) -> Iterator[dict[str, Any]]:
    for context in contexts:
        mine = [r for r in records if r["context"] == context]
        of = {"context": context, "n": len(mine)}
        if name == PASSKEY:
            for metric in ("acc", "written"):
                right = sum(r[metric] for r in mine)
                yield {**of, "metric": metric, "value": right / len(mine), "interval": wilson(right, len(mine))}
            continue
        for metric, unit, finish in (("perplexity", "tokens", math.exp), ("bits_per_byte", "bytes", _bits)):
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

"""Naming task: scores every name as the answer to each question by its likelihood.

    first, first10     share of questions whose right name is the likeliest of all names, or among the ten likeliest
    found, found10     the reverse: share of names whose own question ranks first, or among the first ten, of all
                       questions, by p(name | question) among all names

The names are the lines of names.txt beside the task's file; without it, the different answers in the file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from retentive.data.chats import Conversation
from retentive.data.media import rows_of
from retentive.data.templates import ChatTemplate
from retentive.evals.likelihood import Request, in_eval_mode, score_from
from retentive.evals.stats import share
from retentive.infer.media import read
from retentive.models import LanguageModel

NAMES = "names.txt"
TEN = 10


def names_of(conversations: Sequence[Conversation], folder: Path) -> list[str]:
    """Returns the names to choose from, each once.

    Raises:
        ValueError: there are fewer than two names, or an answer is not among them.
    """
    own = [each.messages[-1]["content"] for each in conversations]
    file = folder / NAMES
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else own
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(names) < 2:
        raise ValueError(f"{file if file.is_file() else folder}: {len(names)} names, of which none can be chosen")
    if unknown := [each for each in conversations if each.messages[-1]["content"] not in names]:
        raise ValueError(f"{unknown[0].name}: {unknown[0].messages[-1]['content']!r} is no line of {file}")
    return names


def score_names(
    model: LanguageModel,
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    names: Sequence[str],
    *,
    done: Callable[[int], object] = lambda n: None,
) -> torch.Tensor:
    """Returns log p(name | question) among the names, float64 `[questions, names]`.

    Raises:
        ValueError: the template ends no answer with a token.
        ArithmeticError: the model's logits are not finite.
    """
    spelt = template.taught([[_said("user", "?"), _said("assistant", name)] for name in names])
    answers = [[id for id, taught in zip(*each, strict=True) if taught] for each in spelt]
    order = sorted(range(len(names)), key=lambda n: len(answers[n]))  # batches get rows of similar length
    found = torch.empty(len(conversations), len(names), dtype=torch.float64)
    with in_eval_mode(model):
        for n, each in enumerate(conversations):
            ids = template.first(each.messages[:-1])
            state = read(model, ids[:-1], rows_of(each.messages))
            scores = score_from(model, state, [Request(ids[-1:], answers[m]) for m in order])
            found[n, order] = torch.tensor([score.logprob for score in scores], dtype=torch.float64)
            done(n + 1)
    return found.log_softmax(1)


def naming(
    model: LanguageModel,
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    folder: Path,
    *,
    done: Callable[[int], object] = lambda n: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns (a row for each metric; a record for each question: its name, that name's rank, the ten likeliest).

    Raises:
        ValueError, ArithmeticError: as `names_of` and `score_names`.
    """
    names = names_of(conversations, folder)
    right = torch.tensor([names.index(each.messages[-1]["content"]) for each in conversations])
    p = score_names(model, template, conversations, names, done=done)
    own = p.gather(1, right[:, None])
    ranks = (1 + (p > own).sum(1)).tolist()
    asked = sorted(set(right.tolist()))
    # the best score among a name's own questions, against those of all other questions
    best = torch.stack([p[right == name, name].max() for name in asked])
    places = [1 + int((p[right != name, name] > top).sum()) for name, top in zip(asked, best, strict=True)]
    rows = [
        share(f"{metric}{'' if most == 1 else most}", [rank <= most for rank in found])
        for metric, found in (("first", ranks), ("found", places))
        for most in (1, TEN)
    ]
    for row in rows:
        row["names"] = len(names)
    likeliest = p.topk(min(TEN, len(names)), 1).indices.tolist()
    records = [
        {"name": each.name, "reference": names[int(mine)], "rank": rank, "likeliest": [names[m] for m in first]}
        for each, mine, rank, first in zip(conversations, right, ranks, likeliest, strict=True)
    ]
    return rows, records


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}

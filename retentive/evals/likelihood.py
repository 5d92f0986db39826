"""Log-likelihoods of continuations. The common prefix of a question's prompts is read once, and its state is copied.

    log p(continuation | prompt) = sum over its tokens of log p(token | document so far)

Rows of a batch are packed, or (for attention) padded on the right; both are exact. Only positions that predict a
continuation go through the output matrix. A prompt follows an end-of-text token, as documents do in training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retentive.data.tokenizer import Tokenizer
from retentive.infer.sample import NOT_FINITE
from retentive.models import LanguageModel

BUDGET = 8192
"""Maximum tokens of a batch, padding included."""
CHUNK = 4096
"""Tokens of a row read at once; a longer row passes its state on from chunk to chunk."""
STATES = 1 << 30
"""Maximum bytes for the states of a batch's rows."""
HEAD = 256
"""Number of positions whose logits are in memory at a time."""

Progress = Callable[[str, int, int], None]
"""Called with a task's name, its number of questions, and the number done."""


class Request(NamedTuple):
    """A continuation to score after a context, as token ids; each needs at least one."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    logprob: float
    """Natural log of the continuation's probability."""
    greedy: bool
    """True if each token is the likeliest, so that greedy decoding would write it."""
    tokens: int
    """Number of tokens in the continuation."""


def encode(tokenizer: Tokenizer, prompt: str, continuation: str) -> Request:
    """Returns the ids of both, split as in lm-eval: spaces at the prompt's end belong to the continuation.

    Raises:
        ValueError: the continuation has no token of its own.
    """
    stripped = prompt.rstrip()
    before = tokenizer.encode(stripped)
    # encoded together, since a token may span the border; the prompt's token count marks where the continuation begins
    after = tokenizer.encode(prompt + continuation)[len(before) :]
    if not after:
        raise ValueError(f"the continuation {continuation!r:.60} has no token of its own after {prompt[-30:]!r}")
    return Request([tokenizer.eos_id, *before], after)


@torch.no_grad()
def score(
    model: LanguageModel,
    groups: Sequence[Sequence[Request]],
    *,
    share: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Score]]:
    """Scores each group's requests; the common prefix of a group's contexts is read once.

    Args:
        share: False reads every row completely: the same numbers, slower.
        progress: called with the number of finished groups.

    Raises:
        ArithmeticError: the model's logits are not finite.
    """
    done, share = 0, share and model.keeps_state
    scores: list[list[Score]] = [[] for _ in groups]
    with in_eval_mode(model):
        for batch in _batches(model, groups, share):
            for n, found in zip(batch, _score(model, [groups[n] for n in batch], share), strict=True):
                scores[n] = found
            done += len(batch)
            progress(done)
    return scores


@torch.no_grad()
def score_from(model: LanguageModel, state: Any, requests: Sequence[Request]) -> list[Score]:
    """Scores requests that all continue from `state`, which does not change.

    Raises:
        ArithmeticError: the model's logits are not finite.
    """
    scores: list[Score] = []
    with in_eval_mode(model):
        begin = 0
        while begin < len(requests):
            count = most = 0
            for request in requests[begin : begin + max(1, STATES // max(1, state.nbytes))]:
                most = max(most, len(request.context) + len(request.continuation))
                if count and most * (count + 1) > BUDGET:
                    break
                count += 1
            part = list(requests[begin : begin + count])
            scores += _continue(model, part, state.select(torch.zeros(count, dtype=torch.int64)))
            begin += count
    return scores


@contextmanager
def in_eval_mode(model: LanguageModel) -> Iterator[None]:
    """Switches dropout and the like off during the block, and restores the model's mode, also after an error."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def common_prefix(group: Sequence[Request]) -> int:
    """Returns the length of the contexts' common prefix, without the shortest's last token, which predicts."""
    if len(group) == 1:
        return 0
    contexts = [request.context for request in group]
    most = min(map(len, contexts)) - 1
    # a prefix shared by the lexicographically first and last is shared by all between them
    first, last = min(contexts), max(contexts)
    return next((n for n in range(most) if first[n] != last[n]), most)


def _batches(model: LanguageModel, groups: Sequence[Sequence[Request]], share: bool) -> Iterator[list[int]]:
    """Yields batches of groups' indices, by similar length, longest first, so that lack of memory shows early."""
    most_rows = BUDGET if not model.keeps_state else max(1, STATES // max(1, model.init_state(1).nbytes))
    lengths = [[len(r.context) + len(r.continuation) for r in group] for group in groups]
    prefixes = [common_prefix(group) if share else 0 for group in groups]
    rests = [max(of_one) - prefix for of_one, prefix in zip(lengths, prefixes, strict=True)]  # of each longest row
    batch: list[int] = []

    def too_large(more: list[int]) -> bool:
        rows = sum(len(lengths[n]) for n in more)
        if packs(model, max(max(lengths[n]) for n in more)):  # prefixes once, and the rests
            tokens = sum(prefixes[n] + sum(lengths[n]) - len(lengths[n]) * prefixes[n] for n in more)
        else:  # padded: every row is as long as the longest, in both passes (prefixes, rests)
            tokens = max(max(rests[n] for n in more) * rows, max(prefixes[n] for n in more) * len(more))
        return tokens > BUDGET or rows > most_rows

    for n in sorted(range(len(groups)), key=lambda n: (max(lengths[n]), rests[n]), reverse=True):
        if batch and too_large([*batch, n]):
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def packs(model: LanguageModel, longest: int) -> bool:
    """True if a batch is packed into one row instead of padded: no attention, and no row needs chunks.

    Lengths of questions differ so much that padding doubles the computation.
    """
    return model.keeps_state and not model.config.attends and longest <= CHUNK


def _score(model: LanguageModel, groups: list[Sequence[Request]], share: bool) -> list[list[Score]]:
    """Scores one batch of groups."""
    counts = [common_prefix(group) if share else 0 for group in groups]
    state: Any = None
    if any(counts):  # a group without a common prefix gets an empty row, hence a blank state
        prefixes = [group[0].context[:count] for group, count in zip(groups, counts, strict=True)]
        *_, (_, _, _, state) = _read(model, prefixes, None)
        # one copy of its group's state per row
        parents = [n for n, group in enumerate(groups) for _ in group]
        state = state.select(torch.tensor(parents))
    rows = [(r, count) for group, count in zip(groups, counts, strict=True) for r in group]
    found = iter(_continue(model, [Request(r.context[count:], r.continuation) for r, count in rows], state))
    return [[next(found) for _ in group] for group in groups]


def _continue(model: LanguageModel, rows: list[Request], state: Any) -> list[Score]:
    """Scores the rows, continuing from the state, which is consumed."""
    sums = torch.zeros(len(rows), dtype=torch.float64)  # thousands of terms would lose digits in float32
    wrong = torch.zeros(len(rows), dtype=torch.int64)
    # token to predict at each position; -1 outside of continuations
    targets = _padded([[-1] * (len(r.context) - 1) + r.continuation for r in rows], -1)
    for begin, end, x, _ in _read(model, [r.context + r.continuation[:-1] for r in rows], state):
        wanted = targets[:, begin:end].to(x.device)
        row, _ = where = (wanted >= 0).nonzero(as_tuple=True)
        for y, target, of in zip(x[where].split(HEAD), wanted[where].split(HEAD), row.split(HEAD), strict=True):
            logits = model.head(y)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            logprob = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
            sums.index_add_(0, of.cpu(), logprob.double().cpu())
            wrong.index_add_(0, of.cpu(), (logits.argmax(-1) != target).long().cpu())
    if bool(sums.isnan().any()):  # a NaN would pass for an answer, since its argmax is token 0
        raise ArithmeticError(NOT_FINITE)
    return [
        Score(total, missed == 0, len(r.continuation))
        for r, total, missed in zip(rows, sums.tolist(), wrong.tolist(), strict=True)
    ]


def _read(model: LanguageModel, rows: list[list[int]], state: Any) -> Iterator[tuple[int, int, Tensor, Any]]:
    """Yields (begin, end, hidden `[B,T,D]` of the rows' tokens from begin to end, state after them) per chunk."""
    device = model.device
    lengths = [len(row) for row in rows]
    if packs(model, max(lengths)) and min(lengths):  # an empty row cannot be packed
        ids = torch.tensor([id for row in rows for id in row], device=device)[None]
        borders = torch.tensor([0, *accumulate(lengths)], device=device)
        x, state = model.hidden(ids, state, cu_seqlens=borders)
        yield 0, max(lengths), torch.nn.utils.rnn.pad_sequence(x[0].split(lengths), True), state
        return
    counts, ids = torch.tensor(lengths), _padded(rows, 0)
    chunk = CHUNK if model.keeps_state else ids.shape[1]
    for begin in range(0, ids.shape[1], chunk):
        part = ids[:, begin : begin + chunk]
        valid = (counts - begin).clamp(0, part.shape[1])
        # rows that end within this chunk are padded; `lengths` excludes padding from their states
        even = bool((valid == part.shape[1]).all())
        x, state = model.hidden(part.to(device), state, lengths=None if even else valid)
        yield begin, begin + part.shape[1], x, state


def _padded(rows: list[list[int]], value: int) -> Tensor:
    """Returns int64 `[B,T]`, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], True, value)

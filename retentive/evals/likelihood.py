"""Log-likelihoods of continuations: what a question's prompts share is read once, and its state is copied.

    log p(continuation | prompt) = sum over its tokens of log p(token | document so far)

Rows of one batch are packed, or (for attention) padded on the right; both are exact. Only the positions that predict a
continuation go through the output matrix. A prompt comes after an end-of-text token, as documents do in training.
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
"""Tokens of a batch at most, padding included."""
CHUNK = 4096
"""Tokens of a row that are read at once; a longer row hands its state on from chunk to chunk."""
STATES = 1 << 30
"""Bytes that the states of a batch's rows may take."""
HEAD = 256
"""Positions whose logits are in memory at a time."""

Progress = Callable[[str, int, int], None]
"""Called with a task's name, its number of questions, and how many are done."""


class Request(NamedTuple):
    """A continuation to score after a context, as token ids; both must have one at least."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    logprob: float
    """Natural log of the continuation's probability."""
    greedy: bool
    """Whether each of its tokens is the likeliest: greedy decoding would write it."""
    tokens: int
    """Of the continuation."""


def encode(tokenizer: Tokenizer, prompt: str, continuation: str) -> Request:
    """The ids of both, divided as lm-eval does: spaces at the prompt's end belong to the continuation.

    Raises:
        ValueError: a continuation without a token of its own.
    """
    stripped = prompt.rstrip()
    before = tokenizer.encode(stripped)
    # encoded together, since a token may span the border: its count of tokens says where the continuation begins
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
    """The scores of each group's requests; the common prefix of a group's contexts is read once for all of them.

    Args:
        share: False reads every row whole: the same numbers, slower.
        progress: called with the number of groups that are done.

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
    """The scores of requests that all go on from what `state` has read; it stays as it is.

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
    """Dropout and the like are off within the block; then the model is as it was, after an error too."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def common_prefix(group: Sequence[Request]) -> int:
    """Tokens that all contexts begin with, without the last of the shortest, which predicts the continuation."""
    if len(group) == 1:
        return 0
    contexts = [request.context for request in group]
    most = min(map(len, contexts)) - 1
    # in lexicographic order: what the first and the last have in common, all between them have too
    first, last = min(contexts), max(contexts)
    return next((n for n in range(most) if first[n] != last[n]), most)


def _batches(model: LanguageModel, groups: Sequence[Sequence[Request]], share: bool) -> Iterator[list[int]]:
    """Groups' indices in batches of about one length, the longest first: what does not fit in memory fails at once."""
    most_rows = BUDGET if not model.keeps_state else max(1, STATES // max(1, model.init_state(1).nbytes))
    lengths = [[len(r.context) + len(r.continuation) for r in group] for group in groups]
    prefixes = [common_prefix(group) if share else 0 for group in groups]
    rests = [max(of_one) - prefix for of_one, prefix in zip(lengths, prefixes, strict=True)]  # of the longest row
    batch: list[int] = []

    def too_large(more: list[int]) -> bool:
        rows = sum(len(lengths[n]) for n in more)
        if packs(model, max(max(lengths[n]) for n in more)):  # common prefixes once, and what comes after them
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
    """Whether a batch is packed into one row instead of padded: if there is no attention, and no row needs chunks.

    Lengths differ so much from question to question that padding doubles what is computed.
    """
    return model.keeps_state and not model.config.attends and longest <= CHUNK


def _score(model: LanguageModel, groups: list[Sequence[Request]], share: bool) -> list[list[Score]]:
    """The scores of one batch's groups."""
    counts = [common_prefix(group) if share else 0 for group in groups]
    state: Any = None
    if any(counts):  # a group without a common prefix gets an empty row, and from it a blank state
        prefixes = [group[0].context[:count] for group, count in zip(groups, counts, strict=True)]
        *_, (_, _, _, state) = _read(model, prefixes, None)
        # a copy of its group's state for every row
        parents = [n for n, group in enumerate(groups) for _ in group]
        state = state.select(torch.tensor(parents))
    rows = [(r, count) for group, count in zip(groups, counts, strict=True) for r in group]
    found = iter(_continue(model, [Request(r.context[count:], r.continuation) for r, count in rows], state))
    return [[next(found) for _ in group] for group in groups]


def _continue(model: LanguageModel, rows: list[Request], state: Any) -> list[Score]:
    """The scores of the rows, read on from the state, which is used up."""
    sums = torch.zeros(len(rows), dtype=torch.float64)  # thousands of terms: in float32 they would lose digits
    wrong = torch.zeros(len(rows), dtype=torch.int64)
    # the token that each position is to predict, the one after it; -1 where it belongs to no continuation
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
    if bool(sums.isnan().any()):  # else a NaN would look like an answer: its argmax is token 0
        raise ArithmeticError(NOT_FINITE)
    return [
        Score(total, missed == 0, len(r.continuation))
        for r, total, missed in zip(rows, sums.tolist(), wrong.tolist(), strict=True)
    ]


def _read(model: LanguageModel, rows: list[list[int]], state: Any) -> Iterator[tuple[int, int, Tensor, Any]]:
    """(begin, end, hidden `[B,T,D]` of the rows' tokens from begin to end, state after them), a chunk at a time."""
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
        # rows that end within this chunk are padded; `lengths` keeps padding out of their states
        even = bool((valid == part.shape[1]).all())
        x, state = model.hidden(part.to(device), state, lengths=None if even else valid)
        yield begin, begin + part.shape[1], x, state


def _padded(rows: list[list[int]], value: int) -> Tensor:
    """int64 `[B,T]`, padding on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], True, value)

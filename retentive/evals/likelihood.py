"""Log-likelihoods of continuations: what a question's prompts share is read once, and its state is cloned.

    log p(continuation | prompt) = sum over its tokens of log p(token | document so far)

Rows of one batch are packed, or (for attention) padded on the right, which are both exact, and only the positions that
predict a continuation go through the output matrix. A prompt begins after an end-of-text token, as documents do in
training.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retentive.data.tokenizer import Tokenizer
from retentive.infer.sample import NOT_FINITE
from retentive.models import Hybrid, Model, RetNet

BUDGET = 8192
"""Tokens of a batch, padding included."""
CHUNK = 4096
"""Tokens of a row that are read at once; longer ones hand their state on."""
STATES = 1 << 30
"""Bytes of states that a batch's rows may take."""
HEAD = 256
"""Positions that go through the output matrix at once."""

Progress = Callable[[str, int, int], None]
"""Is told of a task, how much there is of it and how much is done."""


class Request(NamedTuple):
    """Token ids; both must have one at least."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    logprob: float
    """Natural log of the continuation's probability."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""
    tokens: int


def encode(tokenizer: Tokenizer, prompt: str, continuation: str) -> Request:
    """The ids of both, as lm-eval divides them: spaces at the prompt's end belong to the continuation.

    Raises:
        ValueError: a continuation without a token of its own.
    """
    stripped = prompt.rstrip()
    before = tokenizer.encode(stripped)
    after = tokenizer.encode(prompt + continuation)[len(before) :]
    if not after:
        raise ValueError(f"the continuation {continuation!r:.60} has no token of its own after {prompt[-30:]!r}")
    return Request([tokenizer.eos_id, *before], after)


@torch.no_grad()
def score(
    model: Model,
    groups: Sequence[Sequence[Request]],
    *,
    share: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Score]]:
    """The scores of each group's requests; the beginning that a group's contexts share is read once for all of them.

    Args:
        share: False reads every row whole: the same numbers, later.
        progress: is told how many groups are done.

    Raises:
        ArithmeticError: the model's logits are not finite.
    """
    training, done = model.training, 0
    share = share and model.keeps_state
    model.eval()
    scores: list[list[Score]] = [[] for _ in groups]
    try:
        for batch in _batches(model, groups, share):
            for n, found in zip(batch, _score(model, [groups[n] for n in batch], share), strict=True):
                scores[n] = found
            done += len(batch)
            progress(done)
    finally:
        model.train(training)
    return scores


def common_prefix(group: Sequence[Request]) -> int:
    """Tokens with which all contexts begin, short of the shortest by one: the last predicts the continuation."""
    if len(group) == 1:
        return 0
    contexts = [request.context for request in group]
    most = min(map(len, contexts)) - 1
    first, last = min(contexts), max(contexts)  # what the first and the last in order have in common, all have
    return next((n for n in range(most) if first[n] != last[n]), most)


def _batches(model: Model, groups: Sequence[Sequence[Request]], share: bool) -> Iterator[list[int]]:
    """Groups of about one length, the longest first, so that what does not fit in memory shows at once."""
    room = BUDGET if not model.keeps_state else max(1, STATES // max(1, model.init_state(1).nbytes))
    lengths = [[len(r.context) + len(r.continuation) for r in group] for group in groups]
    prefixes = [common_prefix(group) if share else 0 for group in groups]
    rests = [max(of_one) - prefix for of_one, prefix in zip(lengths, prefixes, strict=True)]  # of the longest row
    batch: list[int] = []

    def too_large(more: list[int]) -> bool:
        rows = sum(len(lengths[n]) for n in more)
        if packs(model, max(max(lengths[n]) for n in more)):  # each token once
            tokens = sum(prefixes[n] + sum(lengths[n]) - len(lengths[n]) * prefixes[n] for n in more)
        else:  # as many for every row as the longest has
            tokens = max(max(rests[n] for n in more) * rows, max(prefixes[n] for n in more) * len(more))
        return tokens > BUDGET or rows > room

    for n in sorted(range(len(groups)), key=lambda n: (max(lengths[n]), rests[n]), reverse=True):
        if batch and too_large([*batch, n]):
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def packs(model: Model, longest: int) -> bool:
    """Whether rows go through the model one after the other in one row, without padding: where attention does not mind.

    Choices of one question are as unlike in length as their questions are: padding doubles what is computed.
    """
    return isinstance(model, RetNet) and not isinstance(model, Hybrid) and longest <= CHUNK


def _score(model: Model, groups: list[Sequence[Request]], share: bool) -> list[list[Score]]:
    """Of one batch."""
    counts = [common_prefix(group) if share else 0 for group in groups]
    state: Any = None
    if any(counts):  # a group without a common prefix has an empty row, whose state is blank
        prefixes = [group[0].context[:count] for group, count in zip(groups, counts, strict=True)]
        *_, (_, _, _, state) = _read(model, prefixes, None)
        parents = [n for n, group in enumerate(groups) for _ in group]
        state = state.select(torch.tensor(parents))
    rows = [(r, count) for group, count in zip(groups, counts, strict=True) for r in group]
    found = iter(_continue(model, [Request(r.context[count:], r.continuation) for r, count in rows], state))
    return [[next(found) for _ in group] for group in groups]


def _continue(model: Model, rows: list[Request], state: Any) -> list[Score]:
    """Scores of the rows from the state, which is used up."""
    sums = torch.zeros(len(rows), dtype=torch.float64)  # thousands of terms: in float32 they would lose digits
    wrong = torch.zeros(len(rows), dtype=torch.int64)
    # where a row's continuation is predicted, and by which position: one before its token
    targets = _padded([[-1] * (len(r.context) - 1) + r.continuation for r in rows], -1)
    for begin, end, x, _ in _read(model, [r.context + r.continuation[:-1] for r in rows], state):
        wanted = targets[:, begin:end].to(x.device)
        row, _ = where = (wanted >= 0).nonzero(as_tuple=True)
        for y, target, n in zip(x[where].split(HEAD), wanted[where].split(HEAD), row.split(HEAD), strict=True):
            logits = model.head(y)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            logprob = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
            sums.index_add_(0, n.cpu(), logprob.double().cpu())
            wrong.index_add_(0, n.cpu(), (logits.argmax(-1) != target).long().cpu())
    if bool(sums.isnan().any()):  # argmax over NaN is token 0: it would look like an answer
        raise ArithmeticError(NOT_FINITE)
    return [
        Score(total, missed == 0, len(r.continuation))
        for r, total, missed in zip(rows, sums.tolist(), wrong.tolist(), strict=True)
    ]


def _read(model: Model, rows: list[list[int]], state: Any) -> Iterator[tuple[int, int, Tensor, Any]]:
    """(begin, end, what the model makes of the rows' tokens between them): hidden `[B,T,D]` and the state after."""
    device = model.device
    lengths = [len(row) for row in rows]
    if packs(model, max(lengths)) and min(lengths):
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
        even = bool((valid == part.shape[1]).all())
        x, state = model.hidden(part.to(device), state, lengths=None if even else valid)
        yield begin, begin + part.shape[1], x, state


def _padded(rows: list[list[int]], value: int) -> Tensor:
    """int64 `[B,T]`, padding on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], True, value)

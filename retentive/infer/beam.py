"""Beam search: finds the likeliest continuations by keeping the best few at each step.

    score = log p(tokens, stop) / length ^ length_penalty           length: tokens, including the stop

A beam that ends in a stop is finished: it is set aside with its score, and the search goes on with one beam less
(Sutskever et al., arXiv 1409.3215). One beam is greedy decoding. As many beams as there are continuations find the
likeliest of all.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from retentive import machine
from retentive.data.media import Rows
from retentive.infer.generate import Token, checked, prefill, step_threads
from retentive.infer.sample import SamplingParams, check_finite
from retentive.models import LanguageModel
from retentive.models.state import State
from retentive.options import option


@torch.no_grad()
def beam_search(
    model: LanguageModel,
    ids: Sequence[int] | Tensor,
    *,
    beams: int,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    rows: Rows | None = None,
    first_ids: Sequence[int] | None = None,
    length_penalty: float = 1.0,
    state: State | None = None,
) -> list[tuple[list[int], float]]:
    """Returns (tokens, score) of up to `beams` continuations of `ids`, best first, without stops.

    Args:
        beams: number of continuations kept.
        max_tokens: maximum tokens of each.
        rows: rows of pictures and sound among `ids`, as for `generate`.
        first_ids: allowed first tokens; any by default.
        length_penalty: 0 compares log probabilities, 1 their mean; higher values prefer long continuations.
        state: the model's state before the prompt; consumed.

    Raises:
        ValueError: the prompt is empty, ids are outside the vocabulary, beams or max_tokens is below 1, or the states
            exceed the memory.
        ArithmeticError: the model's logits are not finite.
    """
    prompt = checked(model, ids, rows)
    if min(beams, max_tokens) < 1:
        raise ValueError(f"`beams` and `max_tokens` must be at least 1, got {beams} and {max_tokens}")
    logits, state = prefill(model, prompt, state, rows=rows)
    needed, free = beams * state.nbytes, machine.free_memory(model.device)
    if needed > free:
        raise ValueError(
            f"{option('beams', beams)}: the states take {needed / 1e9:,.1f} of {free / 1e9:,.1f} GB free; take fewer"
        )
    live: list[list[int]] = [[]]  # tokens of unfinished beams; row i of the state belongs to live[i]
    sums = torch.zeros(1, dtype=torch.float64)  # log probabilities of these beams
    done: list[tuple[list[int], float]] = []
    stops = frozenset(stop_ids)
    for length in itertools.count(1):
        check_finite(logits)
        totals = sums[:, None] + logits.double().log_softmax(-1).cpu()
        if length == 1 and first_ids is not None:
            totals = torch.full_like(totals, -torch.inf).index_copy_(1, torch.tensor(first_ids), totals[:, first_ids])
        best, parents, tokens = _best(totals, beams - len(done))
        ended = [token in stops for token in tokens]
        done += [
            (live[parent], float(total) / length**length_penalty)
            for total, parent, end in zip(best, parents, ended, strict=True)
            if end
        ]
        kept = [n for n, end in enumerate(ended) if not end]
        live = [[*live[parents[n]], tokens[n]] for n in kept]
        if not kept or length == max_tokens:
            break
        sums, moved = best[kept], torch.tensor([parents[n] for n in kept])
        logits, state = _step(model, [beam[-1] for beam in live], _reordered(state, moved))
    # beams still live have reached max_tokens
    done += [(beam, float(best[n]) / max_tokens**length_penalty) for n, beam in zip(kept, live, strict=True)]
    return sorted(done, key=lambda pair: -pair[1])


def likeliest(
    model: LanguageModel, ids: Sequence[int] | Tensor, params: SamplingParams | None = None, *, beams: int, **how: Any
) -> Iterator[Token]:
    """Yields the tokens of the best continuation as `generate` does, but with NaN as log probabilities.

    `params` only completes the signature that `write_on` calls: nothing is sampled.
    """
    tokens, _ = beam_search(model, ids, beams=beams, **how)[0]
    yield from (Token(token, math.nan) for token in tokens)


def _best(totals: Tensor, count: int) -> tuple[Tensor, list[int], list[int]]:
    """Returns the `count` highest of `totals` `[n, vocab]`, with row and token of each, without impossible ones."""
    best, where = totals.flatten().topk(min(count, totals.numel()))
    where = where[best > -torch.inf]
    return best[: len(where)], (where // totals.shape[1]).tolist(), (where % totals.shape[1]).tolist()


def _reordered(state: Any, parents: Tensor) -> Any:
    """Returns the state with row i from beam i's parent; the state itself if no row moves, to avoid a copy."""
    same = torch.equal(parents, torch.arange(len(state.position)))
    return state if same else state.select(parents)


def _step(model: LanguageModel, tokens: list[int], state: Any) -> tuple[Tensor, Any]:
    """Decodes one more token of each of n beams; returns (logits `[n, vocab]`, state)."""
    with step_threads(model, len(tokens), state):
        x, state = model.hidden(torch.tensor(tokens, device=model.device)[:, None], state)
        return model.head(x[:, -1]), state

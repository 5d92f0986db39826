"""Tokens that attention sees from before a call, for calls that gradients pass through: nothing is written in place.

A cache that is written in place serves decoding. In training a backward pass still reads what was there, so a call
takes its past out of the cache, and returns another cache. Sequences are spans of one row of packed tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retentive.layers.positions import Positions
from retentive.layers.slots import positions_in, slot_of

Layer = tuple[Tensor, ...]
"""(keys, values), each `[N,S,kv_heads,K]`; with a forget gate also the log gates `[N,S,H]`, float32 or wider."""


class Span(NamedTuple):
    """A sequence's tokens among all tokens of a call, laid end to end."""

    begin: int
    end: int
    start: int
    """Number of its tokens before the call."""


def spans_of(positions: Positions, starts: Sequence[int], T: int) -> list[Span]:
    """Returns the span of each sequence: packed, or a row of T tokens with or without padding."""
    if positions.cu_seqlens is not None:
        cu = positions.cu_seqlens.tolist()
        return [Span(*each) for each in zip(cu[:-1], cu[1:], starts, strict=True)]
    counts = (positions.end - torch.tensor(starts, device=positions.end.device)).tolist()
    first = [0] * len(counts) if positions.valid is None else positions.valid.int().argmax(1).tolist()
    return [Span(n * T + at, n * T + at + counts[n], starts[n]) for n, at in enumerate(first)]


def seen_before(start: int, window: int, sinks: int) -> Tensor:
    """Returns the positions before `start` that a token there can see, in order: all, or the sinks and the window's."""
    first = max(start - window + 1, 0) if window else 0
    return torch.cat((torch.arange(min(sinks, first)), torch.arange(first, start)))


def tokens_before(cache: Layer, spans: Sequence[Span], window: int, sinks: int) -> dict[int, Layer]:
    """Returns the tokens `[1,P,…]` before each span that has some that can be seen, in order.

    Args:
        cache: the token at position p is in slot p, with a window in that of `slots.py`.
    """
    found = {}
    for n, span in enumerate(spans):
        at = seen_before(span.start, window, sinks).to(cache[0].device)
        if len(at) and span.end > span.begin:
            at = slot_of(at, cache[0].shape[1], sinks) if window else at
            found[n] = tuple(x[n].index_select(0, at)[None] for x in cache)
    return found


def cache_after(cache: Layer, new: Layer, spans: Sequence[Span], most: int, sinks: int) -> Layer:
    """Returns the cache after the call, with as many slots as its longest sequence needs; free slots hold zeros.

    Args:
        new: the tokens of the call `[1,T,…]`.
        most: slots of the sinks and the window; 0 without a window.
    """
    (N, old), device = cache[0].shape[:2], cache[0].device
    begin, end, start = (torch.tensor(column, device=device)[:, None] for column in zip(*spans, strict=True))
    last = start + end - begin - 1
    longest = max(span.start + span.end - span.begin for span in spans)
    slots = min(longest, most) if most else longest
    # position of each slot's token
    at = positions_in(slots, sinks, last + 1) if most else torch.arange(slots, device=device).expand(N, -1)
    held = slot_of(at.clamp(min=0), old, sinks) if most else at % max(old, 1)
    row = torch.arange(N, device=device)[:, None]
    source = torch.where(at >= start, N * old + begin + at - start, row * old + held)
    zeros = N * old + new[0].shape[1]
    source = torch.where((at < 0) | (at > last), zeros, source).flatten()
    tokens = (
        torch.cat((x.flatten(0, 1), y[0].to(x.dtype), x.new_zeros(1, *x.shape[2:])))
        for x, y in zip(cache, new, strict=True)
    )
    return tuple(x.index_select(0, source).unflatten(0, (N, slots)) for x in tokens)

"""Context parallelism: the tokens of a batch, divided over the ranks of the axis `cp`.

The rows of a batch are laid end to end and cut into equal parts, to within a token. What crosses a border are the
position of the sequence that is cut, and in every layer its state (`ops.pieces`), as if each part were a batch that
carries on from the one before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retentive.data.loader import Batch, Carry
from retentive.layers import MultiScaleRetention
from retentive.models import LanguageModel, State
from retentive.ops import across
from retentive.ops.pieces import Gather, gather_over
from retentive.train.objective import Objective
from retentive.train.parallel.mesh import Axis


def context_parallel(model: LanguageModel, axis: Axis) -> LanguageModel:
    """The model whose layers of retention hand on their states from rank to rank, changed in place.

    Raises:
        ValueError: a model that attends.
    """
    if model.config.attends:
        raise ValueError(
            f"`cp={axis.size}` hands on states of retention, a {model.config.name} attends as well: leave it out"
        )
    assert axis.group is not None
    gather = gather_over(axis.group)
    for layer in model.blocks.modules():
        if isinstance(layer, MultiScaleRetention):
            # around the layer and not the model: a block that is recomputed in the backward pass exchanges again
            layer.forward = partial(_across, layer.forward, gather, axis.rank)  # type: ignore[method-assign]
    return model


def _across(forward: Callable, gather: Gather, rank: int, x, state, positions, phases) -> Any:
    """A layer's forward pass, of one part: what does not begin at position 0 goes on from the part before."""
    with across(gather, rank, None if positions.start is None else positions.start > 0):
        return forward(x, state, positions, phases)


@contextmanager
def whole_sequences(model: LanguageModel) -> Iterator[None]:
    """In this block every rank reads whole sequences, the same ones, and hands on nothing."""
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, MultiScaleRetention)]
    handing_on = [layer.__dict__.pop("forward") for layer in layers]  # the class's own is behind it
    try:
        yield
    finally:
        for layer, forward in zip(layers, handing_on, strict=True):
            layer.forward = forward  # type: ignore[method-assign]


def on_part(objective: Objective, axis: Axis) -> Objective:
    """The objective on this rank's part of each batch."""

    def of_part(model: LanguageModel, batch: Batch, state: Any) -> tuple[Tensor, int, Any]:
        part, start = part_of(batch, axis.rank, axis.size)
        before = model.init_state(1)
        # blank states, which the layers fill; the position is known at once
        before = State(before.memories, before.position + start)
        total, count, _ = objective(model, part, before)
        return total, count, None

    return of_part


def part_of(batch: Batch, rank: int, size: int) -> tuple[Batch, int]:
    """(part `rank` of `size` of a batch's tokens, as one row; how many tokens its first sequence has had before them).

    Targets were shifted before, so that the last token of a part has its own.

    Raises:
        ValueError: a batch with fewer tokens than parts, one that carries states on, or with pictures or sound.
    """
    if batch.carry is not None or batch.rows:
        raise ValueError(f"`cp={size}` divides texts that begin in their batch: no mode carry, no pictures or sound")
    length, device = batch.ids.numel(), batch.ids.device
    if length < size:
        raise ValueError(f"a batch of {length} tokens cannot be divided over `cp={size}` ranks")
    starts = torch.arange(0, length, batch.ids.shape[1], device=device)
    if batch.cu_seqlens is not None:
        starts = batch.cu_seqlens[:-1]
    begin, end = rank * length // size, (rank + 1) * length // size
    inner = starts[(starts > begin) & (starts < end)]
    before = begin - int(starts[starts <= begin][-1])
    ends = torch.tensor([begin, end], device=device, dtype=torch.int32)
    cu_seqlens = torch.cat((ends[:1], inner.to(torch.int32), ends[1:])) - begin
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    carry = Carry(zero, zero + len(inner), torch.tensor([before > 0], device=device))
    ids, targets = (x.flatten()[None, begin:end] for x in (batch.ids, batch.targets))
    return Batch(ids, targets, cu_seqlens, carry), before

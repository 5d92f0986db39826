"""Context parallelism: divides the tokens of a batch over the ranks of the axis `cp`.

The rows of a batch are laid end to end and cut into equal parts, to within a token. Two things cross a border: the
position of the sequence that is cut, and its state in every layer (`ops.pieces`). So each part is like a batch that
carries on from the part before.
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
    """Make the model's retention layers, in place, hand on their states from rank to rank.

    Raises:
        ValueError: the model has attention.
    """
    if model.config.attends:
        raise ValueError(
            f"`cp={axis.size}` hands on states of retention, a {model.config.name} attends as well: leave it out"
        )
    assert axis.group is not None
    gather = gather_over(axis.group)
    for layer in model.blocks.modules():
        if isinstance(layer, MultiScaleRetention):
            # wraps the layer, not the model, so that a block recomputed in the backward pass exchanges again
            layer.forward = partial(_across, layer.forward, gather, axis.rank)  # type: ignore[method-assign]
    return model


def _across(forward: Callable, gather: Gather, rank: int, x, state, positions, phases) -> Any:
    """Forward pass of a layer on one part: a sequence begun in the part before continues from its state."""
    with across(gather, rank, None if positions.start is None else positions.start > 0):
        return forward(x, state, positions, phases)


@contextmanager
def whole_sequences(model: LanguageModel) -> Iterator[None]:
    """Let every rank read the same whole sequences in this block, and hand on nothing."""
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, MultiScaleRetention)]
    handing_on = [layer.__dict__.pop("forward") for layer in layers]  # uncovers the class's own method
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
        # blank states, which the layers fill; the position is known already
        before = State(before.memories, before.position + start)
        total, count, _ = objective(model, part, before)
        return total, count, None

    return of_part


def part_of(batch: Batch, rank: int, size: int) -> tuple[Batch, int]:
    """Returns (part `rank` of `size` of a batch's tokens, as one row; tokens of its first sequence before the part).

    Targets are already shifted, so the last token of a part has its target.

    Raises:
        ValueError: the batch has fewer tokens than parts, carries states on, or has pictures or sound.
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

"""Context parallelism: divides the tokens of a batch over the ranks of the axis `cp`.

The rows of a batch are laid end to end and cut into equal parts, to within a token. The position of the sequence that
is cut crosses a border. So does, in every layer, the past that its mixer needs:

    retention   its state, of the same size whatever the length (`ops.pieces`)
    attention   keys and values of the sequence's tokens before this part, of a window those that can be seen
    convolution the few tokens before this part

Layers exchange through the `ContextParallel` in their attribute `context`, which is None in a model of one rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from retentive.data.loader import Batch, Carry
from retentive.layers import Attention, Convolution, MultiScaleRetention, Positions
from retentive.layers.past import Layer, Span, seen_before
from retentive.models import LanguageModel, State
from retentive.ops import across, retention
from retentive.ops.pieces import gather_over
from retentive.train.objective import Objective
from retentive.train.parallel.mesh import Axis


class ContextParallel:
    """Exchange of a model's layers with the ranks that have the other parts of a batch."""

    def __init__(self, axis: Axis):
        assert axis.group is not None
        self.axis, self.group, self.gather = axis, axis.group, gather_over(axis.group)
        self.lengths: list[int] = []
        """Tokens of each part of the batch."""
        self.longest = 0
        """Maximum tokens that a sequence has before a border."""

    def part_of(self, batch: Batch) -> tuple[Batch, int]:
        """Take this rank's part of a batch, as `part_of`; the layers' next calls must be on it."""
        borders = borders_of(batch, self.axis.size)
        self.lengths = [b - a for a, b in pairwise(borders)]
        self.longest = max(tokens_before(batch, border) for border in borders[:-1])
        return part_of(batch, self.axis.rank, self.axis.size)

    def retention(self, positions: Positions) -> Callable[..., tuple[Tensor, Any]]:
        """`ops.retention` for this part: a sequence that begins in an earlier part continues from its state."""

        def of_part(*args: Any, **how: Any) -> tuple[Tensor, Any]:
            with across(self.gather, self.axis.rank, None if positions.start is None else positions.start > 0):
                return retention(*args, **how)

        return of_part

    def attend(self, layer: Attention, q: Tensor, new: Layer, spans: list[Span]) -> Tensor:
        """Attends within packed sequences `[1,T,…]`, of which other ranks have the tokens before the first."""
        new, past = self.before(new, spans[0].start, layer.window, layer.sinks)
        return layer.within(q, new, spans, {} if past is None else {0: past})

    def rows(self, layer: Convolution, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """(x `[1,T,D]`, the tokens before each of its N sequences `[N,n-1,D]`); other ranks have those of the first."""
        start = 0 if positions.start is None else int(positions.start[0])
        (x,), past = self.before((x,), start, layer.reach + 1, 0)
        rows = x.new_zeros(len(positions.end), layer.reach, x.shape[-1])
        if past is not None:
            first = F.pad(past[0], (0, 0, layer.reach - past[0].shape[1], 0))
            rows = torch.cat((first, rows[1:]))
        return x, rows

    def before(self, new: Layer, start: int, window: int, sinks: int) -> tuple[Layer, Layer | None]:
        """(keys and values of this part; those of earlier tokens that its first sequence sees, None without any).

        Args:
            new: `[1,T,…]` each.
            start: tokens of the first sequence before this part.
        """
        # sinks may be anywhere before, so they are gathered with all that follows them
        most = min(self.longest, window - 1) if window and not sinks else self.longest
        if not most:  # on no rank
            return new, None
        own = len(new)
        given = _Gathered.apply(self.group, most, *new)
        if not (wanted := min(start, most)):
            return given[:own], None
        # a part that is shorter than `most` tokens was padded in front
        held = [most - min(length, most) for length in self.lengths[: self.axis.rank]]
        parts = (torch.cat([x[rank, pad:] for rank, pad in enumerate(held)])[-wanted:] for x in given[own:])
        seen = seen_before(start, window, sinks).to(new[0].device) - (start - wanted)
        return given[:own], tuple(x.index_select(0, seen)[None] for x in parts)


class _Gathered(torch.autograd.Function):
    """(the tensors `[1,T,…]` themselves, the last tokens `[C,most,…]` that each of the C ranks has of them).

    The gradient of a token is the sum of those of the ranks that have seen it. Gradients pass through the tensors
    themselves on every rank, so that all take part in the exchange, also those that no token before is seen by.
    """

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, most: int, *new: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.most = group, most
        gathered = []
        for x in new:
            last = x[0, -most:]
            sent = torch.cat((x.new_zeros(most - len(last), *x.shape[2:]), last)).contiguous()
            found = x.new_empty(group.size(), *sent.shape)
            dist.all_gather(list(found), sent, group=group)
            gathered.append(found)
        return (*(x.view_as(x) for x in new), *gathered)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        own = len(grads) // 2
        summed = []
        for grad, of_all in zip(grads[:own], grads[own:], strict=True):
            of_all = of_all.contiguous()
            dist.all_reduce(of_all, group=ctx.group)
            count = min(ctx.most, grad.shape[1])
            grad = grad.clone()
            grad[0, -count:] += of_all[ctx.group.rank(), ctx.most - count :]
            summed.append(grad)
        return None, None, *summed


def context_parallel(model: LanguageModel, axis: Axis) -> LanguageModel:
    """Let the model's layers, in place, exchange their past across the borders between ranks."""
    context = ContextParallel(axis)
    for layer in mixers(model):
        layer.context = context
    return model


def mixers(model: LanguageModel) -> list[Any]:
    """The layers that mix tokens."""
    kinds = MultiScaleRetention | Attention | Convolution
    return [layer for layer in model.blocks.modules() if isinstance(layer, kinds)]


@contextmanager
def whole_sequences(model: LanguageModel) -> Iterator[None]:
    """Let every rank read the same whole sequences in this block, and exchange nothing."""
    layers = mixers(model)
    context = layers[0].context
    for layer in layers:
        layer.context = None
    try:
        yield
    finally:
        for layer in layers:
            layer.context = context


def on_part(model: LanguageModel, objective: Objective) -> Objective:
    """The objective on this rank's part of each batch."""
    context: ContextParallel = mixers(model)[0].context

    def of_part(model: LanguageModel, batch: Batch, state: Any) -> tuple[Tensor, int, Any]:
        part, start = context.part_of(batch)
        before = model.init_state(1)
        # blank states, which the layers fill; the position is known already
        before = State(before.memories, before.position + start)
        total, count, _ = objective(model, part, before)
        return total, count, None

    return of_part


def borders_of(batch: Batch, size: int) -> list[int]:
    """Index of the first token of each part of a batch, with its rows laid end to end, and the end of the last part.

    Raises:
        ValueError: the batch has fewer tokens than parts, carries states on, or has pictures or sound.
    """
    if batch.carry is not None or batch.rows:
        raise ValueError(f"`cp={size}` divides texts that begin in their batch: no mode carry, no pictures or sound")
    length = batch.ids.numel()
    if length < size:
        raise ValueError(f"a batch of {length} tokens cannot be divided over `cp={size}` ranks")
    return [rank * length // size for rank in range(size + 1)]


def tokens_before(batch: Batch, border: int) -> int:
    """Number of tokens that the sequence at a border has before it."""
    starts = starts_of(batch)
    return border - int(starts[starts <= border][-1])


def starts_of(batch: Batch) -> Tensor:
    """Index of the first token of each sequence of a batch."""
    if batch.cu_seqlens is not None:
        return batch.cu_seqlens[:-1]
    return torch.arange(0, batch.ids.numel(), batch.ids.shape[1], device=batch.ids.device)


def part_of(batch: Batch, rank: int, size: int) -> tuple[Batch, int]:
    """Returns (part `rank` of `size` of a batch's tokens, as one row; tokens of its first sequence before the part).

    Targets are already shifted, so the last token of a part has its target. Errors as `borders_of`.
    """
    begin, end = borders_of(batch, size)[rank : rank + 2]
    starts, device = starts_of(batch), batch.ids.device
    inner = starts[(starts > begin) & (starts < end)]
    before = tokens_before(batch, begin)
    ends = torch.tensor([begin, end], device=device, dtype=torch.int32)
    cu_seqlens = torch.cat((ends[:1], inner.to(torch.int32), ends[1:])) - begin
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    carry = Carry(zero, zero + len(inner), torch.tensor([before > 0], device=device))
    ids, targets = (x.flatten()[None, begin:end] for x in (batch.ids, batch.targets))
    return Batch(ids, targets, cu_seqlens, carry), before

"""Short causal convolution: each feature of a token, mixed with the same feature of the few tokens before it.

    out_t = sum_i weight[n - 1 - i] * x_{t-i}       i = 0 … n - 1; a weight for each tap and feature

Retention and attention then find in a token what its neighbours say. The state is the last n - 1 tokens.

Source: the depthwise convolutions of H3 (arXiv 2212.14052) and Mamba (arXiv 2312.00752). As a layer of its own, before
mixers and feed-forward layers: Canon layers (Allen-Zhu, 2025, ssrn.com/abstract=5240330).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.layers.config import ConvolutionConfig
from retentive.layers.mixer import Mixer
from retentive.layers.norm import RMSNorm
from retentive.layers.positions import Positions
from retentive.ops.rows import convolve


class Phases(NamedTuple):
    """Places of packed or padded sequences in the B x T tokens, computed once for all layers."""

    since_BT: Tensor
    """int32: tokens before each in its sequence."""
    count_N1: Tensor
    """Tokens of each sequence."""
    end_N1: Tensor
    """Place after the last token of each."""
    first: Tensor
    """`[N,n-1]`, places of the first tokens of each, which the state reaches."""


class Convolution(Mixer):
    """`(x [B,T,D], rows [N,S,D])` -> `(out [B,T,D], rows)`; rows are the last S >= n - 1 tokens of x, newest last.

    Rows are float32 or wider. Without gradients, given rows are written in place.
    """

    kind = ConvolutionConfig.kind

    def __init__(self, config: ConvolutionConfig):
        super().__init__()
        self.config, self.reach = config, config.taps - 1
        self.weight = nn.Parameter(torch.empty(config.taps, config.dim))  # last: of the token itself
        self.context: Any = None  # has the tokens before this rank's part (`train.parallel.context`)

    def phases(self, positions: Positions, dtype: torch.dtype) -> Phases | None:
        """Computes where the sequences lie; None if each row is one without padding."""
        device = positions.end.device
        if positions.cu_seqlens is not None:
            cu = positions.cu_seqlens.to(device, torch.int64)
            count, end, T = cu.diff(), cu[1:], positions.of_token.shape[-1]
            since = (torch.arange(T, device=device) - cu[:-1].repeat_interleave(count, output_size=T))[None]
        elif positions.valid is not None:
            valid = positions.valid.long()
            count, at = valid.sum(1), torch.arange(len(valid), device=device)
            end, since = valid.argmax(1) + count + at * valid.shape[1], (valid.cumsum(1) - 1).clamp(min=0)
        else:
            return None
        first = (end - count)[:, None] + torch.arange(self.reach, device=device)
        return Phases(since.to(torch.int32), count[:, None], end[:, None], first)

    def forward(
        self, x: Tensor, rows: Tensor | None, positions: Positions, phases: Phases | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (out `[B,T,D]`, the last tokens after x; None if packed in training without any before)."""
        given, N = rows, len(positions.end)
        if self.context is not None:
            x, rows = self.context.rows(self, x, positions)
        if rows is None:
            out = convolve(x, self.weight, None if phases is None else phases.since_BT)
            rows = x.new_zeros(N, self.reach, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
        else:
            past = rows[:, rows.shape[1] - self.reach :].to(x.dtype)
            out = self._after(past, x) if phases is None else self._of_sequences(past, x, phases)
        if given is None and phases is not None and torch.is_grad_enabled():
            return out, None
        after = last_rows(rows, x, phases)
        if given is None or torch.is_grad_enabled():
            return out, after
        return out, given.copy_(after)

    def branch(
        self, x: Tensor, norm: RMSNorm, memory: Any, positions: Positions, phases: Phases | None, *, drops: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Adds the output to x in one pass over memory, unless a state, another rank or dropout comes between."""
        apart = phases is not None and not torch.is_grad_enabled()  # the state needs tokens from the middle of x
        if drops or memory is not None or self.context is not None or apart:
            return super().branch(x, norm, memory, positions, phases, drops=drops)
        out = norm.add_convolved(x, self.weight, None if phases is None else phases.since_BT)
        if phases is not None:
            return out, None, None
        last = norm(x[:, max(x.shape[1] - self.reach, 0) :])
        rows = last.new_zeros(len(last), self.reach, x.shape[-1], dtype=torch.promote_types(last.dtype, torch.float32))
        return out, None, last_rows(rows, last, None)

    def _after(self, past: Tensor, x: Tensor) -> Tensor:
        """Returns the outputs of x `[N,T,D]`, whose sequences begin with `past` `[N,n-1,D]`."""
        return convolve(torch.cat((past, x), 1), self.weight)[:, self.reach :]

    def _of_sequences(self, past: Tensor, x: Tensor, phases: Phases) -> Tensor:
        """Returns the outputs of packed or padded sequences: the first few of each are computed with its past."""
        (B, T, D), N = x.shape, len(past)
        out = F.pad(convolve(x, self.weight, phases.since_BT).flatten(0, 1), (0, 0, 0, 1))
        first = self._after(past, x.flatten(0, 1)[phases.first.clamp(max=B * T - 1)])
        there = phases.first < phases.end_N1  # others are written to one more token, which is left out
        at = torch.where(there, phases.first, B * T).flatten()
        return out.index_copy(0, at, first.reshape(N * self.reach, D))[:-1].view(B, T, D)

    def reset_parameters(self) -> None:
        """Sets the weights to 0: with its residual, a new layer changes nothing."""
        nn.init.zeros_(self.weight)


def last_rows(rows: Tensor, x: Tensor, phases: Phases | None) -> Tensor:
    """Returns the last S tokens of each sequence after x, in the dtype of `rows` `[N,S,D]`, those before x."""
    (N, S), T = rows.shape[:2], x.shape[1]
    if phases is None:
        return torch.cat((rows[:, T:], x[:, max(T - S, 0) :].to(rows.dtype)), 1)
    back = torch.arange(S - 1, -1, -1, device=x.device)  # tokens after this one
    new = x.flatten(0, 1)[(phases.end_N1 - 1 - back).clamp(min=0)].to(rows.dtype)
    old = rows.gather(1, (S - 1 - back + phases.count_N1).clamp(max=S - 1)[..., None].expand(N, S, x.shape[-1]))
    return torch.where((back < phases.count_N1)[..., None], new, old)

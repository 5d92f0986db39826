"""Ring buffer for decoding in place: the last tokens wait in a ring, so the state is seldom written.

    o  = scale * ( exp(G) q S  +  sum_j exp(G - G_j) (q k_j) v_j )      G_j = log decay from the state to token j
    S' = exp(G_F) S + sum_{j<=F} exp(G_F - G_j) k_j v_j^T               when the ring is full: its older half, F tokens

A decode step is bound by memory: it reads K x V numbers for two operations each. The plain recurrence also writes as
many. Here they are written once in F steps, at the cost of a few rows of k and v. Tokens in the ring can be rolled
back, always at least the last F (once that many have come), as speculative decoding needs.

Token t is in slot t mod R, with R = 2 F. Tokens before `folded` are in the state, the others in the ring.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from retentive.ops.blocked import FORGOTTEN
from retentive.ops.decay import check_values


def slots(K: int, V: int) -> int:
    """Returns the number of slots R that moves the fewest bytes. A fold writes K V numbers, a step reads 3/4 R rows."""
    # F minimises K V / F + 3/2 F (K + V), the numbers moved per step; then the nearest power of two
    ideal = (K * V / (1.5 * (K + V))) ** 0.5
    return 2 * max(2 ** round(math.log2(ideal)), 2)


SCALE = 4
"""Bytes behind a row of a state of int8: its scale, float32."""
NARROW = (torch.bfloat16, torch.int8)
"""Dtypes of states that are rounded at every fold."""


def stored_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Returns the shape in which a state of `shape`, `[…,K,V]`, is stored in `dtype`."""
    return (*shape[:-1], shape[-1] + SCALE * (dtype == torch.int8))


def narrowed(state: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a state `[…,K,V]` in `dtype`. With int8 it is `[…,K,V+4]`: each row has a scale of its own behind it."""
    if dtype != torch.int8:
        return state.to(dtype)
    scale = state.float().abs().amax(-1, keepdim=True) / 127
    integers = (state / scale).nan_to_num(0, 0, 0).round()  # a row of zeros; what is not finite is so by its scale
    return torch.cat([integers.to(torch.int8), scale.contiguous().view(torch.int8)], -1)


def widened(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the state `[…,K,V]` in `dtype` that `narrowed` stored."""
    if stored.dtype != torch.int8:
        return stored.to(dtype)
    return stored[..., :-SCALE].to(dtype) * stored[..., -SCALE:].contiguous().view(torch.float32).to(dtype)


@dataclass(frozen=True, eq=False)  # frozen: compiled code keeps pointers to the tensors, which are updated in place
class Ring:
    """The state of B sequences during decoding: a state tensor, and the tokens that are not yet folded into it."""

    state: Tensor
    """`[B,H,K,V]`, the state of the tokens before `folded`: float32 or float64; or bfloat16, half of the bytes;
    or int8, `[B,H,K,V+4]` (see `narrowed`)."""
    k: Tensor
    """`[B,H,R,K]`, in the dtype of the inputs."""
    v: Tensor
    """`[B,H,R,V]`."""
    log_decay: Tensor
    """`[B,H,R]`, float32 or float64."""
    written: Tensor
    """int64 `[B]`: tokens since the ring was opened."""
    folded: Tensor
    """int64 `[B]`: number of these tokens that are in the state."""
    plan: Any = field(default=None, init=False, repr=False)
    """A `cpu.Plan` after the first step on a CPU. It holds the addresses of these tensors, so copies get none."""

    def __post_init__(self):
        # not made contiguous here: the caller would keep tensors that are no longer updated
        for name, x in self.tensors().items():
            if isinstance(x, Tensor) and not x.is_contiguous():  # (torch.export puts other objects in their place)
                raise ValueError(f"the tensors of a ring must be contiguous, got {name} with strides {x.stride()}")

    def __reduce__(self):  # copies and pickles leave the plan out, since it points to the original's tensors
        return Ring, tuple(self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name, without `plan`. The first dimension of all is B."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of the state and of the tokens."""
        return self.state.dtype, self.k.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the state, `[B,H,K,V]`."""
        return torch.Size((*self.k.shape[:2], self.k.shape[-1], self.v.shape[-1]))

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the arithmetic, and of the log decays."""
        return self.log_decay.dtype

    @staticmethod
    def open(
        state: Tensor, dtype: torch.dtype, size: int | None = None, state_dtype: torch.dtype | None = None
    ) -> "Ring":
        """Opens an empty ring for k and v of `dtype` over `state` `[B,H,K,V]`, which is updated in place from now on.

        Args:
            state_dtype: dtype of the state from now on, rounded at every fold; by default its own. Another one makes a
                copy.
            size: number of slots, even; by default the one that moves the fewest bytes.

        Raises:
            ValueError: an odd number of slots.
        """
        B, H, K, V = state.shape
        R = slots(K, V) if size is None else size
        if R < 2 or R % 2:
            raise ValueError(f"a ring needs an even number of slots, got {R}")
        if not torch.compiler.is_compiling() and (torch.is_inference_mode_enabled() or state.is_inference()):
            with torch.inference_mode(False):  # inference tensors cannot be updated in place outside that mode
                return Ring.open(state.clone() if state.is_inference() else state, dtype, R, state_dtype)
        zeros = torch.zeros(2, B, dtype=torch.int64, device=state.device)
        # left uninitialised: slots without a token, NaN included, are masked wherever they are read
        k, v = (torch.empty(B, H, R, n, dtype=dtype, device=state.device) for n in (K, V))
        decay = state.new_empty(B, H, R, dtype=torch.promote_types(state.dtype, torch.float32))
        return Ring(narrowed(state, state_dtype or state.dtype).contiguous(), k, v, decay, zeros[0], zeros[1])

    @staticmethod
    def over(state: "Tensor | Ring | None", k: Tensor, v: Tensor) -> "Ring":
        """Returns `state` as a ring for tokens like k `[B,T,H,K]`, v `[B,T,H,V]`: itself, or a new one if need be."""
        if isinstance(state, Ring):
            if state.k.dtype == k.dtype:
                return state
            state = state.to_state()
        if state is None:
            B, _, H, K = k.shape
            state = v.new_zeros(B, H, K, v.shape[-1], dtype=torch.promote_types(v.dtype, torch.float32))
        return Ring.open(state, k.dtype)

    def takes(self, q: Tensor) -> bool:
        """True if tokens q `[B,T,H,K]` can be decoded into the ring: no more than its slots, in its dtype."""
        return q.ndim == 4 and 0 < q.shape[1] <= self.k.shape[2] and q.dtype == self.k.dtype

    def map(self, f: Callable[[Tensor], Tensor]) -> "Ring":
        """Returns a ring of `f` of every tensor.

        Raises:
            ValueError: `f` returned a tensor that is not contiguous.
        """
        return Ring(*map(f, self.tensors().values()))

    def put(self, row: int, other: "Ring | Tensor", source: int = 0) -> None:
        """Overwrites the sequence at `row` in place with sequence `source` of another ring or state."""
        if isinstance(other, Ring) and other.k.shape[1:] == self.k.shape[1:] and other.dtypes == self.dtypes:
            for mine, theirs in zip(self.tensors().values(), other.tensors().values(), strict=True):
                mine[row] = theirs[source]
            return
        # other slots or dtype: fold all its tokens into a state, and start the row with an empty ring
        whole = other.map(lambda x: x[source : source + 1]).to_state()[0] if isinstance(other, Ring) else other[source]
        self.state[row], self.written[row], self.folded[row] = narrowed(whole, self.state.dtype), 0, 0

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors().values())

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the ring's tokens, oldest first: k `[B,H,R,K]` and v, zero after the last one; G_j `[B,H,R]`."""
        R = self.k.shape[2]
        # slots from the oldest token on; empty slots are masked, since multiplying by 0 keeps a NaN
        age_BR = torch.arange(R, device=self.k.device)
        slot_BHR = ((self.folded[:, None] + age_BR) % R)[:, None].expand(self.log_decay.shape)
        free_BHR = (age_BR >= (self.written - self.folded)[:, None])[:, None].expand(slot_BHR.shape)
        k, v = (
            x.gather(2, slot_BHR[..., None].expand(x.shape)).masked_fill(free_BHR[..., None], 0).to(self.wide)
            for x in (self.k, self.v)
        )
        return k, v, self.log_decay.gather(2, slot_BHR).masked_fill(free_BHR, 0).cumsum(-1)

    def to_state(self) -> Tensor:
        """Returns the state after all tokens, `[B,H,K,V]`. The ring does not change."""
        return self._fold(widened(self.state, self.wide), self.written - self.folded)

    def _fold(self, state: Tensor, tokens: Tensor) -> Tensor:
        """Returns `state` after each sequence's `tokens` `[B]` oldest tokens. Later tokens have no effect, even NaN."""
        k_BHRK, v_BHRV, since_BHR = self.held()
        last_B11 = (tokens - 1)[:, None, None]
        later_BHR = torch.arange(k_BHRK.shape[2], device=k_BHRK.device) > last_B11
        # gather accepts no index -1: a row that folds no token gets log decay 0 in the next line
        whole_BH1 = since_BHR.gather(2, last_B11.clamp(min=0).expand(*since_BHR.shape[:2], 1))
        whole_BH1 = torch.where(last_B11 < 0, 0, whole_BH1)
        weight_BHR = (whole_BH1 - since_BHR).masked_fill(later_BHR, -torch.inf).exp()
        k_BHRK, v_BHRV = (x.masked_fill(later_BHR[..., None], 0) for x in (k_BHRK, v_BHRV))
        return whole_BH1.exp()[..., None] * state + (k_BHRK * weight_BHR[..., None]).mT @ v_BHRV

    def rollback(self, tokens: int | Tensor) -> None:
        """Takes back the last `tokens` tokens (an integer, or `[B]`).

        Raises:
            ValueError: the ring holds fewer, or the number is negative.
        """
        held = self.written - self.folded
        tokens = torch.as_tensor(tokens, device=held.device)
        if bool(((tokens < 0) | (tokens > held)).any()):
            raise ValueError(f"the ring holds {held.tolist()} tokens, cannot take back {tokens.tolist()} of them")
        self.written.sub_(tokens)  # the tokens stay in their slots until new ones overwrite them


pytree.register_dataclass(Ring, serialized_type_name="retentive.Ring")


def decode_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, ring: Ring) -> Tensor:
    """Puts one token into the ring and returns its `o` `[B,H,V]`. Arguments as for `retention_step`.

    This version uses torch's operations, for devices without compiled code (see `backends.decode_step`).
    """
    check_values(log_decay)
    R, rows = ring.k.shape[2], torch.arange(len(q), device=q.device)
    slot = ring.written % R
    ring.k[rows, :, slot], ring.v[rows, :, slot] = k, v
    ring.log_decay[rows, :, slot] = log_decay.clamp(min=FORGOTTEN).expand(q.shape[:2])
    ring.written.add_(1)
    state, q_BH1K = widened(ring.state, ring.wide), q[:, :, None].to(ring.wide) * scale
    k_BHRK, v_BHRV, since_BHR = ring.held()
    whole_BH1 = since_BHR[..., -1:]  # empty slots count as log decay 0, so the last sum covers all tokens
    score_BH1R = (q_BH1K @ k_BHRK.mT) * (whole_BH1 - since_BHR).exp()[:, :, None]
    o = whole_BH1.exp()[..., None] * (q_BH1K @ state) + score_BH1R @ v_BHRV
    # after o, which needs the old state; a full ring folds at once, so that the next token finds a free slot
    full = (ring.written - ring.folded == R).nonzero().squeeze(1)
    if len(full):
        ripe = ring.map(lambda x: x[full])  # a copy of the full rows, folded and written back
        folded = ripe._fold(widened(ripe.state, ring.wide), torch.full_like(full, R // 2))
        ring.state[full] = narrowed(folded, ring.state.dtype)
        ring.folded[full] += R // 2
    return o.squeeze(2).to(v.dtype)

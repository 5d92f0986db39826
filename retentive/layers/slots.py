"""Slots of a cache of attention with a window: the first ones keep the sinks, the others are a ring.

Of S slots, the token at position p < sinks is in slot p, and any other in slot sinks + (p - sinks) mod (S - sinks).
"""

import torch
from torch import Tensor


def slot_of(position: Tensor, S: int, sinks: int) -> Tensor:
    """Returns the slot of each position."""
    ring = sinks + (position - sinks) % max(S - sinks, 1)
    return torch.where(position < sinks, position, ring) if sinks else ring


def positions_in(S: int, sinks: int, end_N1: Tensor) -> Tensor:
    """Returns the position that each slot holds after `end` tokens of N sequences, `[N,S]`; below 0: none."""
    last_N1, slot = end_N1 - 1, torch.arange(S, device=end_N1.device)
    at_NS = last_N1 - (last_N1 - slot) % max(S - sinks, 1)
    if not sinks:
        return at_NS
    at_NS = torch.where(slot < sinks, slot.expand_as(at_NS), torch.where(at_NS < sinks, -1, at_NS))
    return torch.where(at_NS > last_N1, -1, at_NS)

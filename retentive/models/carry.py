"""States that pass from a batch of training to the next: each row goes on from where it stopped (truncated
back-propagation through time).

Written in the protocol that all kinds of state have, so typed Any.
"""

from typing import Any

import torch
from torch import Tensor


def states_in(model: Any, carried: Any, first: Tensor, continues: Tensor, sequences: int) -> Any:
    """The states that a batch's N sequences begin with: carried ones where a row goes on, and fresh ones.

    Args:
        carried: what `states_out` gave for the batch before; None before the first.
        first: int64 `[B]`, which of the sequences is each row's first.
        continues: bool `[B]`, whether that one goes on from its row of the batch before.
        sequences: N.
    """
    fresh: Any = model.init_state(1)
    if carried is None:
        return fresh.select(torch.zeros(sequences, dtype=torch.int64))
    B = len(first)
    source = torch.full((sequences,), B, device=first.device)  # row B of what follows is the fresh one
    source[first] = torch.where(continues, torch.arange(B, device=source.device), B)
    return type(fresh).cat([carried.to(source.device), fresh]).select(source)


def states_out(state: Any, last: Tensor) -> Any:
    """The states to go on from, of the sequences `last`, one a row; cut off from the graph of this batch."""
    return state.detach().select(last)

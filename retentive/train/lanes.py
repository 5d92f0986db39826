"""States of carry mode: each lane of a batch goes on from where the step before left it.

Written in the protocol that both kinds of state have, so typed Any.
"""

from typing import Any

import torch

from retentive.data.loader import Lanes
from retentive.models import Model


def lanes_in(model: Model, carried: Any, lanes: Lanes, sequences: int) -> Any:
    """The states that a batch's N sequences begin with: those of lanes that go on, and fresh ones.

    Args:
        carried: what `lanes_out` gave for the batch before; None before the first.
        sequences: N.
    """
    fresh: Any = model.init_state(1)
    if carried is None:
        return fresh.select(torch.zeros(sequences, dtype=torch.int64))
    B = len(lanes.first)
    source = torch.full((sequences,), B, device=lanes.first.device)  # row B of what follows is the fresh one
    source[lanes.first] = torch.where(lanes.continues, torch.arange(B, device=source.device), B)
    return type(fresh).cat([carried.to(source.device), fresh]).select(source)


def lanes_out(state: Any, lanes: Lanes) -> Any:
    """The states to go on from, one a lane, cut off from the graph of this batch."""
    return state.detach().select(lanes.last)

"""Truncated back-propagation through time: states that pass from one batch to the next, row by row."""

import torch
from torch import Tensor

from retentive.models.model import LanguageModel
from retentive.models.state import State


def states_in(model: LanguageModel, carried: State | None, first: Tensor, continues: Tensor, sequences: int) -> State:
    """The states that a batch's N sequences begin with: the carried one where a row goes on, else a fresh one.

    Args:
        carried: what `states_out` returned for the batch before; None before the first.
        first: int64 `[B]`, which of the N sequences is the first of each row.
        continues: bool `[B]`, whether that sequence goes on from the same row of the batch before.
        sequences: N.
    """
    fresh = model.init_state(1)
    if carried is None:
        return fresh.select(torch.zeros(sequences, dtype=torch.int64))
    B = len(first)
    source = torch.full((sequences,), B, device=first.device)  # row B, after the B carried ones, is the fresh one
    source[first] = torch.where(continues, torch.arange(B, device=source.device), B)
    return State.cat([carried.to(source.device), fresh]).select(source)


def states_out(state: State, last: Tensor) -> State:
    """The states of the sequences `last`, one a row, for the next batch; no gradient flows back through them."""
    return state.detach().select(last)

"""Truncated back-propagation through time: states that pass from one batch to the next, row by row."""

import torch
from torch import Tensor

from retentive.models.model import LanguageModel
from retentive.models.state import State


def states_in(model: LanguageModel, carried: State | None, first: Tensor, continues: Tensor, sequences: int) -> State:
    """Returns the states that a batch's N sequences start with: the carried one if a row continues, else a blank one.

    Args:
        carried: result of `states_out` for the batch before; None before the first.
        first: int64 `[B]`, index among the N sequences of each row's first one.
        continues: bool `[B]`, True if that sequence continues the same row of the batch before.
        sequences: N.
    """
    fresh = model.init_state(1)
    if carried is None:
        return fresh.select(torch.zeros(sequences, dtype=torch.int64))
    B = len(first)
    source = torch.full((sequences,), B, device=first.device)  # row B, after the B carried ones, is the blank one
    source[first] = torch.where(continues, torch.arange(B, device=source.device), B)
    return State.cat([carried.to(source.device), fresh]).select(source)


def states_out(state: State, last: Tensor) -> State:
    """Returns the states of the sequences `last`, one per row, for the next batch, without gradients."""
    return state.detach().select(last)

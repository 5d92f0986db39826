"""Prefill of a long prompt by several processes: each reads a piece, and they hand on states (`ops.pieces`).

    round 1:  [process 0][process 1] … [process P-1]  round 2:  [process 0] …
               chunk      chunk          chunk -> the state after all of them, sent to every process

Activations take the memory of one chunk, as in `generate.prefill`. The data exchanged in a round do not depend on its
length.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retentive.infer.generate import prefill
from retentive.models import LanguageModel, RetentionMemory, State
from retentive.ops import across
from retentive.ops.pieces import gather_over


@torch.no_grad()
def prefill_in_pieces(
    model: LanguageModel, ids: Tensor, group: dist.ProcessGroup, state: Any = None, *, chunk: int = 4096
) -> tuple[Tensor, State]:
    """Same as `prefill` on all processes: returns (logits `[1, vocab]` after the last of `ids` `[1,T]`, state).

    All processes of the group call this at the same time, with the same arguments. Each reads 1 / P of the tokens.

    Raises:
        ValueError: the model has attention, whose cache would have to be handed on; ids are empty or of another shape.
    """
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"ids must be [1,T] with at least one token, got {list(ids.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if model.config.attends:
        raise ValueError(f"pieces hand on states of retention, a {model.config.name} attends as well: use prefill")
    size, rank = group.size(), group.rank()
    state = model.init_state(1) if state is None else state.settled()
    goes_on = torch.tensor([rank > 0], device=model.device)
    for part in ids.split(size * chunk, 1):
        length = part.shape[1]
        if length < size:  # fewer tokens than processes
            logits, state = prefill(model, part, state)
            continue
        begin, end = rank * length // size, (rank + 1) * length // size
        before = state if rank == 0 else model.init_state(1)
        before = State(before.memories, state.position + begin)
        with across(gather_over(group), rank, goes_on):
            x, after = model.hidden(part[:, begin:end], before)
        logits = model.head(x[:, -1])
        tensors = [x.contiguous() for x in (*after.settled().tensors(), logits)]
        for x in tensors:
            dist.broadcast(x, group=group, group_src=size - 1)
        *layers, position, logits = tensors
        state = State([RetentionMemory(x) for x in layers], position)
    return logits, state

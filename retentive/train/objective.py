"""What training minimises: a function of the model and a batch, which is all that the loop knows of the loss.

    objective(model, batch, state) -> (sum of losses, number of losses, state)

The sum is a scalar with a graph; the loop divides it by the number. The state is what the next batch of the same rows
goes on from: None before the first batch, and for objectives that carry nothing.
"""

from typing import Any, Protocol

from torch import Tensor

from retentive.models.carry import states_in, states_out
from retentive.models.encoders import embedded
from retentive.ops.cross_entropy import IGNORE, cross_entropy


class Objective(Protocol):
    """Any function of this shape; `model` is one of the package's, `batch` what the run's batches give."""

    def __call__(self, model: Any, batch: Any, state: Any) -> tuple[Tensor, int, Any]: ...


def language_modelling(model: Any, batch: Any, state: Any) -> tuple[Tensor, int, Any]:
    """The sum of the next tokens' losses in nats, and their number; targets that are IGNORE do not count.

    Args:
        batch: as of `retentive.data.loader`. Its `carry` (mode "carry") says which rows go on from `state`; without,
            every sequence begins afresh.
    """
    carry, before = batch.carry, None
    if carry is not None:
        before = states_in(model, state, carry.first, carry.continues, len(batch.cu_seqlens) - 1)
    embeds = embedded(model, batch.ids, batch.rows)
    x, after = model.hidden(batch.ids, before, embeds=embeds, cu_seqlens=batch.cu_seqlens)
    total = cross_entropy(x, model.head.weight, batch.targets)
    count = int((batch.targets != IGNORE).sum())
    return total, count, None if carry is None else states_out(after, carry.last)

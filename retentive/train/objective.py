"""Training objective: a function of the model and a batch. The loop knows nothing else of the loss.

    objective(model, batch, state) -> (sum of losses, number of losses, state)

The sum is a scalar with a graph; the loop divides it by the number. The next batch of the same rows continues from the
state. It is None before the first batch, and for objectives that carry none.
"""

from typing import Any, Protocol

from torch import Tensor

from retentive.layers.quantized import matrix
from retentive.models.carry import states_in, states_out
from retentive.models.encoders import embedded
from retentive.ops.cross_entropy import IGNORE, cross_entropy


class Objective(Protocol):
    """Type of an objective; `model` is one of the package's models, `batch` an item of the run's batches."""

    def __call__(self, model: Any, batch: Any, state: Any) -> tuple[Tensor, int, Any]: ...


def language_modelling(model: Any, batch: Any, state: Any) -> tuple[Tensor, int, Any]:
    """Language modelling: the summed next-token loss in nats, and its number of targets without IGNORE.

    Args:
        batch: a batch of `retentive.data.loader`. Its `carry` (mode "carry") says which rows continue from `state`.
            Without it every sequence begins with an empty state.
    """
    carry, before = batch.carry, None
    if carry is not None:
        before = states_in(model, state, carry.first, carry.continues, len(batch.cu_seqlens) - 1)
    embeds = embedded(model, batch.ids, batch.rows)
    x, after = model.hidden(batch.ids, before, embeds=embeds, cu_seqlens=batch.cu_seqlens)
    total = cross_entropy(x, matrix(model.head), batch.targets)
    count = int((batch.targets != IGNORE).sum())
    return total, count, None if carry is None else states_out(after, carry.last)

"""What training lowers: an objective is a function of the model and a batch, and the loop knows no other.

    objective(model, batch, state) -> (sum of losses, how many they are, state)

The sum is a scalar with a graph, so that batches of different counts can be weighed alike. The state is what the next
batch of the same rows goes on from: None before the first, and for objectives that carry nothing.
"""

from typing import Any, Protocol

from torch import Tensor

from retentive.models.carry import states_in, states_out
from retentive.ops.cross_entropy import IGNORE, cross_entropy


class Objective(Protocol):
    """Any function of this shape; `model` is one of the package's, `batch` what the run's batches give."""

    def __call__(self, model: Any, batch: Any, state: Any) -> tuple[Tensor, int, Any]: ...


def language_modelling(model: Any, batch: Any, state: Any) -> tuple[Tensor, int, Any]:
    """The losses of the next tokens, in nats; targets that are IGNORE do not count.

    Args:
        batch: ids, targets and cu_seqlens as of `retentive.data.loader.Batch`; where it says which states carry over
            (mode "carry"), those do.
    """
    carry, first = batch.carry, None
    if carry is not None:
        first = states_in(model, state, carry.first, carry.continues, len(batch.cu_seqlens) - 1)
    x, after = model.hidden(batch.ids, first, cu_seqlens=batch.cu_seqlens)
    total = cross_entropy(x, model.head.weight, batch.targets)
    count = int((batch.targets != IGNORE).sum())
    return total, count, None if carry is None else states_out(after, carry.last)

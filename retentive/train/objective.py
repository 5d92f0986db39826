"""Training objective: a function of the model and a batch. The loop knows nothing else of the loss.

    objective(model, batch, state) -> (sum of losses, number of losses, state)

The sum is a scalar with a graph; the loop divides it by the number. The next batch of the same rows continues from the
state. It is None before the first batch, and for objectives that carry none.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from retentive.layers.quantized import matrix
from retentive.models.carry import states_in, states_out
from retentive.models.encoders import embedded
from retentive.ops.cross_entropy import IGNORE, cross_entropy


class Objective(Protocol):
    """Type of an objective; `model` is one of the package's models, `batch` an item of the run's batches."""

    def __call__(self, model: Any, batch: Any, state: Any) -> tuple[Tensor, int, Any]: ...


def check_calls(objective: Any, callbacks: Any) -> None:
    """Raises TypeError if an objective or callbacks of the user cannot be called; before anything is written."""
    if objective is not None and not callable(objective):
        raise TypeError(f"`objective` must be a function of model, batch and state, got {objective!r}")
    if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
        raise TypeError(f"`callbacks` must be a list of functions, got {callbacks!r}")
    for callback in callbacks:
        if isinstance(callback, type) or not callable(callback):
            raise TypeError(f"a callback must be a function of the training and the metrics, got {callback!r}")


def checked(made: Any) -> tuple[Tensor, int, Any]:
    """Returns what an objective has returned; raises TypeError or ValueError if it is no summed loss with its count."""
    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], Tensor) or made[0].ndim:
        got = f"a {len(made)}-tuple" if isinstance(made, tuple) else type(made).__name__
        raise TypeError(f"an objective must return (sum of the losses, a tensor; their number; state), got {got}")
    if not made[0].requires_grad:
        raise ValueError("the objective's loss has no gradient: compute it from the model without detach or no_grad")
    return made


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

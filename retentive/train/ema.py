"""Exponential moving average of the weights (EMA): often better than the last weights, like a lower learning rate.

    mean after step t = sum over s <= t of decay^(t-s) w_s / sum over s <= t of decay^(t-s)

that is, mean += (w_t - mean) (1 - decay) / (1 - decay^t). The average begins with the weights after the first step, not
with the random initial ones: the bias correction that Adam uses for its moments (arXiv 1412.6980).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Moving average of a model's trained parameters, in their own dtype: one more copy of them.

    It is computed element by element, so it is sharded as the weights are.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._of = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._of.items()}
        """Average by parameter name; before the first step, the weights themselves."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step `step`, counted from 1, to the average."""
        share = (1 - self.decay) / (1 - self.decay**step)
        for name, p in self._of.items():
            self.mean[name].lerp_(p, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights in this block, and its own, bit for bit, afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self._of.items():
            own = p.clone()  # a copy of one parameter at a time
            p.copy_(self.mean[name])
            self.mean[name].copy_(own)

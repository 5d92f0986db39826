"""The average of the weights over training, which is often better than the last ones, and as good as a lower rate.

    mean after step t = sum over s <= t of decay^(t-s) w_s / sum over s <= t of decay^(t-s)

that is, mean += (w_t - mean) (1 - decay) / (1 - decay^t): begun with the first step's weights and not with the random
ones before it, as Adam corrects its moments (arXiv 1412.6980).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The average of what is trained of a model, in the parameters' own dtype: one copy more of them.

    It depends on the weights alone, element by element: where they are sharded, so is it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._of = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._of.items()}
        """By the parameters' names; the weights themselves before the first step."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights that step `step`, counted from 1, has ended with."""
        share = (1 - self.decay) / (1 - self.decay**step)
        for name, p in self._of.items():
            self.mean[name].lerp_(p, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights in this block, and its own again afterwards, bit by bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self._of.items():
            own = p.clone()  # of one parameter at a time
            p.copy_(self.mean[name])
            self.mean[name].copy_(own)

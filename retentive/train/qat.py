"""Quantisation-aware training (QAT): steps with weights as `retentive quantize` will round them.

    forward and backward   rounded(w)
    update                 w -= lr dL/d rounded(w)        the straight-through estimator (arXiv 1308.3432)

Weights stay floats, in which small steps add up until an integer changes. The run's model is these floats. Quantised
without calibration text, it computes what was trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from retentive.checkpoint.quantize import BITS, GROUPS, check_quantizable, matrices, rounded
from retentive.models import LanguageModel


class Rounding:
    """Gives a model its rounded matrices for a while.

    Raises:
        ValueError: the model cannot be quantised.
    """

    def __init__(self, model: LanguageModel, to: str):
        """
        Args:
            to: int8 or int4, with the default group of `quantize`.
        """
        check_quantizable(model)
        self.bits, self.group = BITS[to], GROUPS[BITS[to]]
        self._weights = {id(layer.weight): layer.weight for _, layer in matrices(model)}  # tied ones once
        self._frozen: dict[int, Tensor] = {}  # rounded once: those that are not trained, from the first step on

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Rounds the weights in this block; afterwards the model has its own, bit for bit."""
        own = {key: w.data for key, w in self._weights.items()}
        try:
            for key, w in self._weights.items():
                w.data = self._frozen[key] if key in self._frozen else self._rounded(key, w)
            yield
        finally:
            for key, w in self._weights.items():
                w.data = own[key]

    def _rounded(self, key: int, w: Tensor) -> Tensor:
        x = rounded(w.data, self.bits, self.group).floats(self.group).to(w.dtype)
        if not w.requires_grad:
            self._frozen[key] = x = w.data if torch.equal(x, w.data) else x
        return x

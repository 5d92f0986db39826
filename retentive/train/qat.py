"""Quantisation-aware training (QAT): steps with weights as `retentive quantize` will round them.

    forward and backward   rounded(w)
    update                 w -= lr dL/d rounded(w)        the straight-through estimator (arXiv 1308.3432)

Weights stay floats, in which small steps add up until an integer changes. The run's model is these floats. Quantised
without calibration text, it computes what was trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from retentive.checkpoint.quantize import BITS, GROUPS, check_quantizable, matrices, rounded
from retentive.layers.quantized import dequantized
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
        self._weights = {id(layer.weight): layer.weight for _, layer in matrices(model)}.values()  # tied ones once

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Rounds the weights in this block; afterwards the model has its own, bit for bit."""
        own = [w.data for w in self._weights]
        try:
            for w in self._weights:
                w.data = self._rounded(w.data)
            yield
        finally:
            for w, x in zip(self._weights, own, strict=True):
                w.data = x

    def _rounded(self, w: Tensor) -> Tensor:
        return dequantized(*rounded(w, self.bits, self.group), self.group).to(w.dtype)

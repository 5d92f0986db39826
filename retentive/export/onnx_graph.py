"""Nodes and weights of an ONNX graph, and the layers of every block: norms, matrices and activations.

With `standard`, all operators are ONNX's own, of opset 27. Without, some are onnxruntime's (com.microsoft). Integers
are written as stored, in blocks of a group, without further rounding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retentive.layers.quantized import Quantized

MICROSOFT = "com.microsoft"
WHOLE_NUMBERS = {8: 0x80, 4: 0x88}
"""Mask by bits that turns signed integers into the unsigned ones of onnxruntime, with zero in the middle."""


class Graph:
    """Nodes and weights of a graph, each with its own name."""

    def __init__(self, standard: bool):
        self.standard = standard
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.known: dict[Any, str] = {}

    def add(
        self, op: str, *inputs: str, outputs: int = 1, names: Sequence[str] = (), domain: str = "", **how: Any
    ) -> Any:
        """Adds a node and returns the name of its output, or of all outputs; uses `names` if given."""
        import onnx

        names = list(names) or [f"{op}.{len(self.nodes)}.{n}" for n in range(outputs)]
        self.nodes.append(onnx.helper.make_node(op, inputs, names, domain=domain, **how))
        return names[0] if len(names) == 1 else names

    def constant(self, value: Any, *, key: Any = None) -> str:
        """Returns the name of a constant, shared by equal values or keys."""
        import onnx

        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        key = key or (str(array.dtype), array.shape, array.tobytes())
        if key not in self.known:
            self.known[key] = f"weight.{len(self.weights)}"
            self.weights.append(onnx.numpy_helper.from_array(np.asarray(array, order="C"), self.known[key]))
        return self.known[key]

    def number(self, n: int) -> str:
        """Returns the name of an integer without axes."""
        return self.constant(np.int64(n))

    def numbers(self, *n: int) -> str:
        """Returns the name of a vector of integers."""
        return self.constant(np.array(n, np.int64))

    def norm(self, x: str, gain: Tensor | None, width: int, eps: float) -> str:
        """Adds an RMSNorm over the last axis."""
        weight = self.constant(torch.ones(width) if gain is None else gain.float())
        op = "RMSNormalization" if self.standard else "SimplifiedLayerNormalization"
        return self.add(op, x, weight, axis=-1, epsilon=eps, stash_type=1)

    def activation(self, name: str, x: str) -> str:
        if name == "gelu":
            return self.add("Gelu", x)
        if name == "sigmoid":
            return self.add("Sigmoid", x)
        if self.standard:  # not Swish, which opset 24 has: onnxruntime 1.32 does not
            return self.add("Mul", x, self.add("Sigmoid", x))
        return self.add("QuickGelu", x, domain=MICROSOFT, alpha=1.0)

    def reshape(self, x: str, *shape: int) -> str:
        """Adds a reshape; 0 keeps an axis."""
        return self.add("Reshape", x, self.numbers(*shape))

    def matmul(self, x: str, *layers: Any) -> str:
        """Adds linear layers of the same x and returns their outputs side by side, without biases."""
        first = layers[0]
        if not isinstance(first, Quantized):
            return self.add("MatMul", x, self.constant(torch.cat([layer.weight.float() for layer in layers]).T))
        y = self._integer_matmul(x, layers)
        if all(layer.minimum is None for layer in layers):
            return y
        shifts = self.constant(np.concatenate([shift(layer) for layer in layers]).T)
        sums = self.add("MatMul", x, self.constant(groups_of_columns(first)))
        return self.add("Add", y, self.add("MatMul", sums, shifts))

    def _integer_matmul(self, x: str, layers: Sequence[Any]) -> str:
        """Adds quantised layers, as if they had no minimums."""
        first = layers[0]
        q, scale = integers(layers)
        key = tuple(id(layer.weight) for layer in layers)  # tied matrices are one
        if self.standard:
            floats = self.dequantized(first, q, scale, key)
            return self.add("MatMul", x, self.add("Transpose", floats, perm=[1, 0]))
        rows = self.known.get(("rows", *key))
        if rows and first.columns % first.group == 0:  # of the tied embedding
            weight = self.reshape(rows, *q.shape)
        else:
            weight = self.constant(q, key=("q", *key))
        how: dict[str, Any] = {"K": first.columns, "N": len(q), "bits": first.bits, "block_size": first.group}
        scales = self.constant(scale, key=("scale", *key))
        # accuracy_level 4 rounds x to 8-bit integers; without it this is twice as slow
        return self.add("MatMulNBits", x, weight, scales, domain=MICROSOFT, accuracy_level=4, **how)

    def dequantized(self, layer: Quantized, q: np.ndarray, scale: np.ndarray, key: tuple[int, ...]) -> str:
        """Returns integers as floats `[N,K]`, by standard operators, which store all integers with 8 bits."""
        N, groups = scale.shape
        wide = q ^ 0x80 if layer.bits == 8 else np.stack((q & 15, q >> 4), -1).reshape(N, groups, -1) ^ 8
        signed = wide.astype(np.int8) if layer.bits == 8 else (wide.astype(np.int8) ^ 8) - 8
        named = self.constant(signed.reshape(N, -1), key=("int8", *key)), self.constant(scale, key=("scale", *key))
        floats = self.add("DequantizeLinear", *named, axis=1, block_size=layer.group)
        if layer.columns == groups * layer.group:
            return floats
        ends = map(self.numbers, (0, layer.columns, 1))
        return self.add("Slice", floats, *ends)


def integers(layers: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (uint8 `[N, groups, bytes of a group]`, scales float32 `[N, groups]`) of stacked layers."""
    bits, group = layers[0].bits, layers[0].group
    q = torch.cat([layer.weight.view(torch.uint8) for layer in layers]).cpu().numpy() ^ WHOLE_NUMBERS[bits]
    scale = torch.cat([layer.scale for layer in layers]).float().cpu().numpy()
    wanted = scale.shape[1] * group * bits // 8
    q = np.pad(q, ((0, 0), (0, wanted - q.shape[1])), constant_values=WHOLE_NUMBERS[bits])
    return q.reshape(len(q), scale.shape[1], -1), scale


def shift(layer: Any) -> np.ndarray:
    """Returns what is added to `scale * q` for weights with minimums, float32 `[N, groups]`; 0 for others."""
    found = torch.zeros(layer.scale.shape) if layer.minimum is None else layer.minimum.float() + 8 * layer.scale.float()
    return found.cpu().numpy()


def groups_of_columns(layer: Any) -> np.ndarray:
    """Returns float32 `[K, groups]`: 1 where a column is in a group. `x @` this sums x over each group."""
    of_column = np.arange(layer.columns) // layer.group
    return (of_column[:, None] == np.arange(layer.scale.shape[1])).astype(np.float32)

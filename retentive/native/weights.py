"""A model's weights as the library reads them: every matrix packed once, those of a sublayer that read the same input
one below the other."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retentive.models import RetNet, RetNetConfig
from retentive.native.library import KINDS, Layer, Matrix, Model, library

ROWS, LINE = 16, 64
"""Rows of a panel, bytes of its lines: c/weights.h."""
ACTIVATIONS = ("swish", "gelu", "sigmoid")
"""As c/model.h counts them."""


def refused(config: Any) -> str | None:
    """Why the library cannot run a model of this config; None if it can."""
    if type(config) is not RetNetConfig:
        return f"it runs RetNets, this is a {type(config).__name__.removesuffix('Config')}"
    return None


class Packed:
    """A model for the library (`struct Model`), with all memory that it points to."""

    def __init__(self, model: RetNet, kind: str):
        """
        Args:
            kind: of the weights: float32 or bfloat16.
        """
        self._keep: list[Any] = []
        self.kind, c = kind, model.config
        state = {name: x.detach() for name, x in model.state_dict().items()}
        layers = (Layer * c.layers)()
        for i, layer in enumerate(layers):
            self._layer(layer, c, {name.removeprefix(f"blocks.{i}."): x for name, x in state.items()})
        self.states = [(c.heads, c.key_dim // c.heads, c.value_dim // c.heads)] * c.layers
        """The shape of each layer's state, of one sequence."""
        fixed = [] if c.decay == "gated" else c.log_decay()
        self.struct = Model(
            D=c.dim, layers=c.layers, H=c.heads, kv=c.kv_heads, K=c.key_dim // c.heads, V=c.value_dim // c.heads,
            F=c.ffn_dim, vocab=c.vocab_size, rotary=("none", "interleaved", "half").index(c.rotary), gate=c.gate,
            gate_activation=ACTIVATIONS.index(c.gate_activation), activation=ACTIVATIONS.index(c.activation),
            ffn_gate=c.ffn_gate, gated=c.decay == "gated", row_norm=c.score_norm, normed_heads=c.head_norm,
            eps=c.norm_eps, decay_scale=c.decay_scale, embed_scale=c.dim**0.5 if c.embed_scale else 1.0,
            log_decay=self._kept((ctypes.c_double * len(fixed))(*fixed)), layer=self._kept(layers),
            embed=self._matrix([state["embed.weight"]]), head=self._matrix([state["head.weight"]]),
            embed_norm=self._vector(state.get("embed_norm.weight")), final_norm=self._vector(state.get("norm.weight")),
        )  # fmt: skip

    def _layer(self, layer: Layer, c: RetNetConfig, state: dict[str, Tensor]) -> None:
        def of(name: str) -> Tensor | None:
            return state.get(f"retention.{name}")

        read = [of(f"{name}_proj.weight") for name in ("q", "k", "v", "g", "decay")]
        layer.in_ = self._matrix([x for x in read if x is not None])
        layer.out = self._matrix([state["retention.out_proj.weight"]])
        gate, up = state["ffn.gate_proj.weight"], state.get("ffn.up_proj.weight")
        layer.up = self._matrix([gate] if up is None else _in_turn(gate, up))
        layer.down = self._matrix([state["ffn.down_proj.weight"]])
        layer.retention_norm = self._vector(state["retention_norm.weight"])
        layer.ffn_norm = self._vector(state["ffn_norm.weight"])
        for name in ("q_norm", "k_norm", "head_norm"):
            setattr(layer, name, self._vector(of(f"{name}.weight")))
        for name in ("q_bias", "k_bias"):
            setattr(layer, name, self._vector(of(name)))
        layer.decay_bias = self._vector(of("decay_proj.bias"))

    def _kept(self, memory: Any) -> int:
        """The address of something that lives as long as this does."""
        self._keep.append(memory)
        return ctypes.addressof(memory)

    def _vector(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        self._keep.append(x := x.float().contiguous().clone())
        return x.data_ptr()

    def _matrix(self, parts: Sequence[Tensor]) -> Matrix:
        """The parts one below the other, each beginning with a panel."""
        rows = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, -len(x) % ROWS)) for x in parts[:-1]] + [parts[-1]])
        rows = rows.to(getattr(torch, self.kind)).contiguous()
        matrix = Matrix(*rows.shape, KINDS.index(self.kind), 0)
        blob = torch.empty(library().packed_bytes(ctypes.byref(matrix)) + LINE, dtype=torch.uint8)
        at = blob.data_ptr() + -blob.data_ptr() % LINE
        library().pack(ctypes.byref(matrix), ctypes.c_void_p(rows.data_ptr()), None, ctypes.c_void_p(at))
        self._keep.append(blob)
        return matrix


def _in_turn(a: Tensor, b: Tensor) -> list[Tensor]:
    """Panels of both in turn."""
    return [panel for pair in zip(a.split(ROWS), b.split(ROWS), strict=True) for panel in pair]

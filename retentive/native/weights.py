"""A model's weights as the library reads them: every matrix packed once, those of a sublayer that read the same input
one below the other."""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retentive.layers.quantized import Quantized
from retentive.models import LanguageModel
from retentive.native.library import KINDS, Layer, Matrix, Model, library
from retentive.ops.rotary import frequencies

ROWS, LINE = 16, 64
"""Rows of a panel, bytes of its lines: c/weights.h."""
ACTIVATIONS = ("swish", "gelu", "sigmoid")
"""As c/model.h counts them."""


class Rows(NamedTuple):
    """Some rows of a matrix as they are stored, with their scales if they are integers."""

    kind: str
    columns: int
    group: int
    """Columns of a scale; 0 for floats."""
    stored: Tensor
    scales: Tensor | None = None

    @staticmethod
    def of(module: nn.Module) -> "Rows":
        """All rows of a linear layer or an embedding."""
        weight: Any = module.weight
        if isinstance(module, Quantized):
            return Rows(f"int{module.bits}", module.columns, module.group, weight.detach(), module.scale.detach())
        return Rows(str(weight.dtype).removeprefix("torch."), weight.shape[1], 0, weight.detach())

    @property
    def panels(self) -> int:
        return -(-len(self.stored) // ROWS)


class Packed:
    """A model for the library (`struct Model`), with all memory that it points to."""

    def __init__(self, model: LanguageModel):
        self._keep: list[Any] = []
        whole, c, ffn = model.config, model.config.all_retention("it"), model.config.blocks[0].ffn
        layers = (Layer * whole.layers)(*(self._layer(block) for block in model.blocks))
        self.state = H, K, V = c.head_shape
        """The shape of a layer's state, of one sequence."""
        fixed = [] if c.decay == "gated" else c.log_decay()
        turning = [] if c.rotary == "none" else frequencies(K, c.rotary, base=c.rotary_base).tolist()
        self.struct = Model(
            D=c.dim, layers=whole.layers, H=H, kv=c.kv_heads, K=K, V=V,
            F=ffn.width, vocab=whole.vocab_size, halves=c.rotary == "half", gate=c.gate,
            gate_activation=ACTIVATIONS.index(c.gate_activation), activation=ACTIVATIONS.index(ffn.activation),
            ffn_gate=ffn.gate, gated=c.decay == "gated", row_norm=c.score_norm, normed_heads=c.head_norm,
            eps=whole.norm_eps, decay_scale=c.decay_scale, embed_scale=c.dim**0.5 if whole.embed_scale else 1.0,
            frequency=self._kept((ctypes.c_double * len(turning))(*turning)) if turning else None,
            log_decay=self._kept((ctypes.c_double * len(fixed))(*fixed)),
            log_decay_f=self._kept((ctypes.c_float * len(fixed))(*fixed)), layer=self._kept(layers),
            embed=self._matrix([Rows.of(model.embed)]), head=self._matrix([Rows.of(model.head)]),
            embed_norm=self._gain(model.embed_norm), final_norm=self._gain(model.norm),
        )  # fmt: skip

    def _layer(self, block: Any) -> Layer:
        mixing, ffn = block.retention, block.ffn
        read = [mixing.q_proj, mixing.k_proj, mixing.v_proj, mixing.g_proj, mixing.decay_proj]
        ups = [Rows.of(proj) for proj in (ffn.gate_proj, ffn.up_proj) if proj is not None]
        return Layer(
            in_=self._matrix([Rows.of(proj) for proj in read if proj is not None]),
            out=self._matrix([Rows.of(mixing.out_proj)]), up=self._matrix(ups, in_turn=True),
            down=self._matrix([Rows.of(ffn.down_proj)]),
            retention_norm=self._gain(block.retention_norm), ffn_norm=self._gain(block.ffn_norm),
            q_norm=self._gain(mixing.q_norm), k_norm=self._gain(mixing.k_norm), q_bias=self._vector(mixing.q_bias),
            k_bias=self._vector(mixing.k_bias), head_norm=self._gain(mixing.head_norm),
            decay_bias=self._vector(mixing.decay_proj.bias) if mixing.decay_proj is not None else None,
        )  # fmt: skip

    def _kept(self, memory: Any) -> int:
        """The address of something that lives as long as this does."""
        self._keep.append(memory)
        return ctypes.addressof(memory)

    def _gain(self, norm: Any) -> int | None:
        """Of a norm that is there and has one."""
        return None if norm is None or isinstance(norm, nn.Identity) else self._vector(norm.weight)

    def _vector(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        self._keep.append(x := x.detach().float().contiguous().clone())
        return x.data_ptr()

    def _matrix(self, parts: Sequence[Rows], *, in_turn: bool = False) -> Matrix:
        """The parts one below the other, each in panels of its own; or panels of each in turn.

        Raises:
            MemoryError: no memory for it.
        """
        kind, columns, group, *_ = parts[0]
        panels = sum(part.panels for part in parts)
        # whole panels count as its rows, but for those of the last part, whose padding nobody asks for
        rows = (panels - parts[-1].panels) * ROWS + len(parts[-1].stored)
        matrix = Matrix(rows, columns, KINDS.index(kind), group)
        size = library().packed_bytes(ctypes.byref(matrix)) + LINE
        try:
            blob = torch.empty(size, dtype=torch.uint8)
        except RuntimeError:  # torch's allocator
            raise MemoryError(f"no memory for {size / 1e6:,.0f} MB of packed weights") from None
        library().place(ctypes.byref(matrix), ctypes.c_void_p(blob.data_ptr() + -blob.data_ptr() % LINE))
        first = 0
        for n, part in enumerate(parts):
            stored, scales = part.stored.contiguous(), None if part.scales is None else part.scales.contiguous()
            pointers = (stored.data_ptr(), None if scales is None else scales.data_ptr())
            where = (len(stored), n, len(parts)) if in_turn else (len(stored), first, 1)
            library().pack(ctypes.byref(matrix), *map(ctypes.c_int64, where), *map(ctypes.c_void_p, pointers))
            first += part.panels
        self._keep.append(blob)
        return matrix

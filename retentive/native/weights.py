"""A model's weights packed for the library, and packed again when the model's own weights change.

Matrices of a sublayer that read the same input are packed as one, one below the other.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retentive.layers.quantized import Quantized
from retentive.models import LanguageModel
from retentive.native.library import KINDS, Layer, Matrix, Model, Turn, library
from retentive.ops.rotary import frequencies, phases

ROWS, LINE = 16, 64
"""Rows of a panel and bytes of its lines, as in c/weights.h."""
BLOCK = 64 << 20
"""Bytes of memory for packed matrices, allocated at once: pages that are not touched take no room."""
POSIX: dict[str, int] = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
"""Private memory; by default Python's mmap shares it, and then pages stay small."""
ACTIVATIONS = ("swish", "gelu", "sigmoid")
"""Activations, numbered as in c/model.h."""
MIXERS = ("retention", "attention", "convolution")
"""Kinds of layers, numbered as in c/model.h."""
GATED = ("", "gated", "sigmoid")
"""Decays per token, numbered as `gated` in c/model.h."""


class Rows(NamedTuple):
    """Rows of a matrix as stored, with scales, and perhaps minimums, if they are integers."""

    kind: str
    columns: int
    group: int
    """Columns per scale; 0 for floats."""
    stored: Tensor
    scales: Tensor | None = None
    minimums: Tensor | None = None

    @staticmethod
    def of(module: nn.Module) -> "Rows":
        """All rows of a linear layer or an embedding."""
        weight: Any = module.weight
        if isinstance(module, Quantized):
            least = None if module.minimum is None else module.minimum.detach()
            kind = f"int{module.bits}"
            return Rows(kind, module.columns, module.group, weight.detach(), module.scale.detach(), least)
        return Rows(str(weight.dtype).removeprefix("torch."), weight.shape[1], 0, weight.detach())

    @property
    def panels(self) -> int:
        return -(-len(self.stored) // ROWS)

    @property
    def shape(self) -> str:
        """Text of everything but the numbers: kind, rows, columns, and columns per scale."""
        grouped = f" in groups of {self.group}" if self.group else ""
        grouped += " with minimums" if self.minimums is not None else ""
        return f"{self.kind} [{len(self.stored)}, {self.columns}]{grouped}"


class Watched:
    """Copies of parameters, renewed when a parameter has changed.

    It detects new storage of a parameter (`.data =`), and the in-place operations that torch counts, such as
    `load_state_dict` and an optimiser's step. It does not detect writing into `.data`.
    """

    def __init__(self) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []
        self._copies: list[tuple[range, Callable[[], None]]] = []
        self._addresses: list[int] = []
        self._versions: list[int] = []
        self._copied: list[Tensor] = []  # kept alive, so that no other storage gets the same address

    def add(self, copy: Callable[[], None], *modules: nn.Module) -> None:
        """Register `copy`, called at the next refresh, and after a change of the modules' parameters."""
        first = len(self._places)
        self._places += [(m._parameters, name) for m in modules for name, x in m._parameters.items() if x is not None]
        self._copies.append((range(first, len(self._places)), copy))
        self._addresses += [0] * (len(self._places) - first)  # of no tensor
        self._versions += [0] * (len(self._places) - first)

    def refresh(self) -> None:
        """Copy parameters that are new or have changed.

        Raises:
            ValueError: a parameter has another shape or dtype than before.
        """
        now: list[Any] = [parameters[name] for parameters, name in self._places]  # called for every token
        addresses, versions = list(map(Tensor.data_ptr, now)), _versions(now)
        if addresses == self._addresses and versions == self._versions:
            return
        for places, copy in self._copies:
            if any(addresses[i] != self._addresses[i] or versions[i] != self._versions[i] for i in places):
                copy()
        self._addresses, self._versions, self._copied = addresses, versions, [x.detach() for x in now]


def _versions(parameters: list[Any]) -> list[int]:
    """Version counters; 0 for parameters made in inference mode, which have none."""
    try:
        return list(map(attrgetter("_version"), parameters))
    except RuntimeError:
        return [0 if x.is_inference() else x._version for x in parameters]


def _turn_of(mixer: Any) -> tuple[Any, ...] | None:
    """All that a layer's turn depends on; None for a convolution, which has none."""
    c = mixer.config
    if c.kind == "convolution":
        return None
    decays = tuple(c.log_decay()) if c.kind == "retention" and c.score_norm else ()
    longer = 0.0 if c.kind == "retention" else c.position_scale
    return mixer.K, mixer.H, c.rotary, c.rotary_base, c.rotary_scaling, decays, longer


class Packed:
    """A model for the library (`struct Model`), with all memory that the struct points to."""

    def __init__(self, model: LanguageModel, narrow: bool = False):
        """
        Args:
            narrow: what is multiplied by matrices of integers becomes integers of 8 bits, not of 16.

        Raises:
            MemoryError: no memory for the packed weights.
        """
        self._keep: list[Any] = []
        self._narrow = narrow
        self._room = range(0)
        self.body, self.head = Watched(), Watched()
        c: Any = model.config
        turns, of_layer = self._turns([block.mixer for block in model.blocks])
        layers = (Layer * len(c.blocks))(*map(self._layer, model.blocks, c.blocks, of_layer))
        self.struct = Model(
            D=c.dim, layers=len(layers), vocab=c.vocab_size, turns=len(turns), eps=c.norm_eps,
            embed_scale=c.dim**0.5 if c.embed_scale else 1.0, turn=self._kept(turns), layer=self._kept(layers),
            embed_norm=self._vector(model.embed_norm), final_norm=self._vector(model.norm),
            embed=self._matrix([model.embed]), head=self._matrix([model.head], watched=self.head),
        )  # fmt: skip
        self.body.refresh()
        self.head.refresh()

    def _turns(self, mixers: Sequence[Any]) -> tuple[Any, list[int]]:
        """The different turns, and the address of each layer's; 0 for a convolution, which has none."""
        keys = list(map(_turn_of, mixers))
        unique, at = [key for key in dict.fromkeys(keys) if key], 0
        turns = (Turn * len(unique))()
        for turn, (K, H, rotary, base, scaling, decays, longer) in zip(turns, unique, strict=True):
            turning = frequencies(K, rotary, base=base, scaling=scaling).tolist() if rotary != "none" else []
            turn.K, turn.H, turn.halves, turn.row_norm, turn.at = K, H, rotary == "half", bool(decays), at
            turn.position_scale = longer
            turn.frequency, turn.log_decay, at = self._doubles(turning), self._doubles(decays), at + K + H
        size = ctypes.sizeof(Turn)
        return turns, [ctypes.addressof(turns) + unique.index(key) * size if key else 0 for key in keys]

    def _layer(self, block: Any, config: Any, turn: int) -> Layer:
        mixer, c = block.mixer, block.mixer.config
        kinds = {"retention": self._retention, "attention": self._attention, "convolution": self._convolution}
        return Layer(
            kind=MIXERS.index(c.kind), turn=turn, mixer_norm=self._vector(block.mixer_norm),
            **kinds[c.kind](mixer, c), **(self._feed_forward(block, config.ffn) if config.ffn else {}),
        )  # fmt: skip

    def _of_heads(self, mixer: Any, c: Any) -> dict[str, Any]:
        return dict(
            H=mixer.H, kv=mixer.kv_heads, K=mixer.K, eps=c.norm_eps,
            q_norm=self._vector(mixer.q_norm), k_norm=self._vector(mixer.k_norm), out=self._matrix([mixer.out_proj]),
        )  # fmt: skip

    def _retention(self, mixer: Any, c: Any) -> dict[str, Any]:
        fixed, decay = [] if c.per_token else c.log_decay(), mixer.decay_proj
        return self._of_heads(mixer, c) | dict(
            V=mixer.V, gate=c.gate, gate_activation=ACTIVATIONS.index(c.gate_activation),
            gated=GATED.index(c.decay) if c.per_token else 0,
            normed_heads=c.head_norm, joint=c.head_norm_joint, head_norm=self._vector(mixer.head_norm),
            decay_scale=c.decay_scale,
            log_decay=self._kept((ctypes.c_float * len(fixed))(*fixed)) if fixed else None,
            q_bias=self._vector(mixer, "q_bias"), k_bias=self._vector(mixer, "k_bias"),
            decay_bias=self._vector(decay, "bias"),
            in_=self._matrix([mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, decay]),
        )  # fmt: skip

    def _attention(self, mixer: Any, c: Any) -> dict[str, Any]:
        return self._of_heads(mixer, c) | dict(
            V=mixer.K, gate=c.output_gate, gate_activation=ACTIVATIONS.index("sigmoid"), gated=c.forget_gate,
            decay_scale=1.0, window=c.window or 0, sinks=c.sinks,
            decay_bias=self._vector(mixer.forget_proj, "bias"), far_turn=self._far_turn(c) if c.moving_sinks else None,
            in_bias=self._biases([mixer.q_proj, mixer.k_proj, mixer.v_proj]) if c.qkv_bias else None,
            in_=self._matrix([mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, mixer.forget_proj]),
        )  # fmt: skip

    def _convolution(self, mixer: Any, c: Any) -> dict[str, Any]:
        return dict(taps=c.taps, convolution=self._vector(mixer))

    def _far_turn(self, c: Any) -> int:
        """Address of cos and sin at the position from which moving sinks are seen in a long text."""
        last, how = torch.tensor(c.slots - 1), {"base": c.rotary_base, "scaling": c.rotary_scaling}
        numbers = torch.cat(phases(last, c.head_dim, c.rotary, **how)).tolist()
        return self._kept((ctypes.c_float * len(numbers))(*numbers))

    def _feed_forward(self, block: Any, c: Any) -> dict[str, Any]:
        return dict(
            F=c.width, activation=ACTIVATIONS.index(c.activation), ffn_gate=c.gate,
            ffn_norm=self._vector(block.ffn_norm), down=self._matrix([block.ffn.down_proj]),
            up=self._matrix([block.ffn.gate_proj, block.ffn.up_proj], in_turn=True),
        )  # fmt: skip

    def _kept(self, memory: Any) -> int:
        """Keep an object alive as long as this one, and return its address."""
        self._keep.append(memory)
        return ctypes.addressof(memory)

    def _doubles(self, numbers: Sequence[float]) -> int | None:
        return self._kept((ctypes.c_double * len(numbers))(*numbers)) if numbers else None

    def _lines(self, size: int) -> int:
        """Address of room for a matrix, in a block of many.

        Raises:
            MemoryError: no memory for another block.
        """
        size += -size % LINE
        if size > len(self._room):
            try:
                block = mmap.mmap(-1, max(size, BLOCK), **POSIX)
            except OSError:
                raise MemoryError(f"no memory for {size / 1e6:,.0f} MB of packed weights") from None
            if sys.platform == "linux":
                with suppress(OSError):  # a kernel without them
                    block.madvise(mmap.MADV_HUGEPAGE)  # a token reads the whole model, and faster so (docs/LOG.md)
            at = self._kept((ctypes.c_char * len(block)).from_buffer(block))
            self._room = range(at, at + len(block))
        place, self._room = self._room[0], self._room[size:]
        return place

    def _vector(self, module: Any, name: str = "weight") -> int | None:
        """Address of a module's parameter as float32; None if there is none."""
        if module is None or module._parameters.get(name) is None:
            return None
        parameter = module._parameters[name]
        x = self._floats(parameter.numel()).view(parameter.shape)
        self._watch(x, module, name)
        return x.data_ptr()

    def _biases(self, modules: Sequence[nn.Module]) -> int:
        """Address of the modules' biases as float32, each in panels of its own like the rows of the matrices."""
        rows = [Rows.of(module) for module in modules]
        x, at = self._floats(sum(part.panels for part in rows) * ROWS), 0
        for module, part in zip(modules, rows, strict=True):
            self._watch(x[at : at + len(part.stored)], module, "bias")
            at += part.panels * ROWS
        return x.data_ptr()

    def _floats(self, count: int) -> Tensor:
        with torch.inference_mode(False):  # a tensor made in that mode could not be written outside it
            x = torch.zeros(count)
        self._keep.append(x)
        return x

    def _watch(self, x: Tensor, module: Any, name: str) -> None:
        """Copies a module's parameter to x at the next refresh, and whenever it changes."""

        def copy() -> None:
            x.copy_(module._parameters[name].detach())

        self.body.add(copy, module)

    def _matrix(
        self, modules: Sequence[nn.Module | None], *, in_turn: bool = False, watched: Watched | None = None
    ) -> Matrix:
        """Pack the modules' matrices one below the other, each in its own panels; or panels of each in turn.

        Raises:
            MemoryError: no memory for the packed matrix.
        """
        there = [module for module in modules if module is not None]
        parts = [Rows.of(module) for module in there]
        kind, columns, group, *_ = parts[0]
        panels = sum(part.panels for part in parts)
        # rows of whole panels, except for the last part, whose padding is left out
        rows = (panels - parts[-1].panels) * ROWS + len(parts[-1].stored)
        least = any(part.minimums is not None for part in parts)
        matrix = Matrix(rows, columns, KINDS.index(kind), group, least, self._narrow)
        place = self._lines(library().packed_bytes(ctypes.byref(matrix)))
        library().place(ctypes.byref(matrix), ctypes.c_void_p(place))
        self._keep.append(matrix)
        first = 0
        for n, (module, part) in enumerate(zip(there, parts, strict=True)):
            where = (n, len(parts)) if in_turn else (first, 1)
            (watched or self.body).add(partial(_pack, matrix, module, part.shape, *where), module)
            first += part.panels
        return matrix


def _pack(matrix: Matrix, module: nn.Module, shape: str, first: int, step: int) -> None:
    """Pack a module's matrix into every `step`-th panel from `first` on."""
    part = Rows.of(module)
    if part.shape != shape:
        raise ValueError(f"the native engine has packed {shape}, the model has {part.shape} now: call with_engine anew")
    rows = [None if x is None else x.contiguous() for x in (part.stored, part.scales, part.minimums)]
    where = map(ctypes.c_int64, (len(part.stored), first, step))
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in rows]
    library().pack(ctypes.byref(matrix), *where, *pointers)

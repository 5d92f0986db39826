"""Models that decode, of this package and of others, and the cost of a step of each."""

import inspect
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retentive import machine
from retentive.bench.lab import llamacpp, models
from retentive.checkpoint.quantize import quantization_of
from retentive.infer.generate import step_threads
from retentive.infer.graphs import RecordedStep, recordable
from retentive.layers import RetentionConfig
from retentive.models import ModelConfig, cost
from retentive.ops.ring import slots, stored_shape

FOLDED = 64
"""More tokens than a ring has slots."""
TRIED = 4
"""Steps to find the faster setting of llama.cpp."""


class Rival:
    """Model that decodes, with its costs."""

    def __init__(
        self,
        name: str,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        state_dtype: torch.dtype | None = None,
    ):
        """
        Args:
            config: config of the model itself.
            dtype: dtype of weights and caches.
            state_dtype: dtype of the states of retention; None: float32.
        """
        self.name, self.config, self.device, self.dtype = name, config, device, dtype
        self.state_dtype = state_dtype
        self.model = self.made()
        self.ring_bytes = self.ring()

    def made(self) -> Any:
        """Returns the model."""
        return models.make(self.name, self.config, self.device, self.dtype)

    @property
    def bytes_per_weight(self) -> float:
        return self.dtype.itemsize

    def ring(self) -> int:
        """Returns the bytes that a sequence takes during decoding, beside its float32 state or its cache.

        They are negative if a state of fewer bits saves more than the ring takes.
        """
        state: Any = self.model.init_state(1)
        state = state.reserve(max(state.windows))  # a window's slots are the cache
        return state.for_decoding(self.dtype, state_dtype=self.state_dtype).nbytes - state.nbytes

    def check(self) -> None:
        """Correctness gate: raises ArithmeticError if decoding gives other logits than reading at once."""
        models.check_decoding(self.model, state_dtype=self.state_dtype)

    def fill(self, batch: int, context: int, room: int) -> Any:
        """Returns a state as after `context` tokens, with room for `room` more, so that no cache grows while timed."""
        state: Any = self.model.init_state(batch).reserve(context + room)
        for x in (x for x in state.tensors() if x.is_floating_point()):
            # written, since untouched pages are all one page of zeros, which the CPU's cache holds. One random slice is
            # broadcast, since random numbers for all would take minutes
            x[:] = torch.randn(x[:1, :1].shape, dtype=x.dtype, device=x.device)
        state.position.fill_(context)  # rotations and masks of the next token depend on it
        return state.for_decoding(self.dtype, state_dtype=self.state_dtype)  # with the ring, as the engine decodes

    def step(self, ids: Tensor, state: Any) -> Any:
        """Returns the state after one more token of each sequence; computes and drops its logits."""
        with step_threads(self.model, len(ids), state):  # as in all decoding
            x, state = self.model.hidden(ids, state)
            self.model.head(x)
        return state

    def remembers(self, batch: int, context: int) -> int:
        """Returns the bytes of state and ring, or of the cache, for `batch` sequences of `context` tokens."""
        memory = cost.memory_bytes(self.config, context, sequences=batch, bytes_per_value=self.dtype.itemsize)
        return memory + batch * self.ring_bytes

    def moves(self, batch: int, context: int) -> float:
        """Returns the bytes that a step must move at least: the weights once, and the state with ring or the cache."""
        weights = cost.matrix_parameters(self.config) * self.bytes_per_weight
        shapes = [m.head_shape for m in self.config.mixers if m.kind == RetentionConfig.kind]
        caches = cost.cache_bytes(self.config, context, sequences=batch, bytes_per_value=self.dtype.itemsize)
        state_dtype = self.state_dtype or torch.float32
        rings = sum(ring_bytes(batch, H, K, V, self.dtype.itemsize, state_dtype) for H, K, V in shapes)
        return weights + caches + rings


def ring_bytes(B: int, H: int, K: int, V: int, itemsize: int, state_dtype: torch.dtype = torch.float32) -> int:
    """Returns the average bytes that a step of one layer with a ring moves; `itemsize` is that of q, k and v."""
    fold = slots(K, V) // 2
    rows = (3 * fold + 1) / 2 + 2  # of K + V: those in the ring, the new one among them; q and o; k and v
    state = math.prod(stored_shape((K, V), state_dtype)) * state_dtype.itemsize
    return round(B * H * (state * (1 + 1 / fold) + rows * (K + V) * itemsize))


class Recorded(Rival):
    """Model of this package on a GPU; its step is a CUDA graph, as in the engine."""

    def check(self) -> None:
        """As of others, and repeated steps against computed ones, until each ring was folded."""
        super().check()
        recorded: Any = self.fill(2, 0, 0)
        state = recorded.view.clone()
        for token in range(2 * FOLDED):
            ids = torch.full((2, 1), token % self.model.config.vocab_size, device=self.device)
            x, state = self.model.hidden(ids, state)
            want = self.model.head(x[:, -1]).float()
            worst = float((recorded.run(ids[:, 0]) - want).abs().max())
            if not worst <= models.TOLERANCE * max(1.0, float(want.abs().max())):  # `not <=`, so that a NaN fails
                raise ArithmeticError(f"{self.name}: a recorded step is off by {worst:.1e}: not timed")

    def fill(self, batch: int, context: int, room: int) -> Any:
        state = super().fill(batch, context, room)
        # compiles and loads kernels, which a recording cannot
        super().step(torch.zeros(batch, 1, dtype=torch.int64, device=self.device), state.clone())
        return RecordedStep(self.model, state)

    def step(self, ids: Tensor, state: Any) -> Any:
        state.run(ids[:, 0])
        return state


class Llama(Rival):
    """Llama of the transformers library with its static cache, and weights of the same shapes."""

    def __init__(self, name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        super().__init__(name, models.config_of(name, config), device, dtype)
        self.config = models.config_of("transformer", config)  # the same sizes; the cost formulas have no Llama
        names = inspect.signature(self.model.backbone.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # renamed within version 5

    def ring(self) -> int:
        return 0

    def check(self) -> None:
        """Checks nothing: its own library tests its decoding."""

    def fill(self, batch: int, context: int, room: int) -> Any:
        from transformers import StaticCache

        backbone = self.model.backbone
        cache = StaticCache(config=backbone.config, max_cache_len=context + room)
        c = self.config.attention
        for layer in range(self.config.layers):
            keys = torch.randn(1, 1, 1, c.head_dim, dtype=self.dtype, device=self.device)
            keys = keys.expand(batch, c.heads, context, -1)
            cache.update(keys, keys, layer)  # copies, so expanded tensors may share memory
        return cache

    def step(self, ids: Tensor, state: Any) -> Any:
        x = self.model.backbone(ids, use_cache=True, **{self.cache_name: state}).last_hidden_state
        self.model.head(x)
        return state


class Native(Rival):
    """Model in C, with a ring and caches of bfloat16."""

    def __init__(self, name: str, config: Any, device: torch.device, state_dtype: torch.dtype | None):
        super().__init__(name, config, device, torch.bfloat16, state_dtype)

    @property
    def bytes_per_weight(self) -> float:
        how = quantization_of(self.model)
        return 2.0 if how is None else how.bits / 8 + 2 / how.group  # with a 16-bit scale per group


class LlamaCpp(Rival):
    """llama.cpp, with the faster setting of its flash attention at each context."""

    def __init__(self, name: str, config: Any, device: torch.device):
        super().__init__(name, config, device, torch.float16)  # of its cache

    def made(self) -> Any:
        return llamacpp.Model(self.config, self.name.removeprefix("llamacpp-").upper())

    @property
    def bytes_per_weight(self) -> float:
        return models.LLAMACPP[self.name] / 8

    def ring(self) -> int:
        return 0

    def check(self) -> None:
        """Checks nothing: its own library tests its decoding."""

    def fill(self, batch: int, context: int, room: int) -> Any:
        found = []
        for flash in (True, False):
            session = llamacpp.Session(self.model, tokens=context + room + TRIED, sequences=batch, flash=flash)
            session.read(context)
            session.step()
            found.append((machine.clock(self.device, partial(session.steps, TRIED - 1)), session))
        (_, faster), (_, slower) = sorted(found, key=lambda one: one[0])
        slower.close()
        return faster

    def step(self, ids: Tensor, state: Any) -> Any:
        state.step()
        return state


def make(
    name: str,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    full_heads: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Rival:
    """Returns the rival of that name.

    Args:
        config: config of the RetNet, whose twins the others are.
        dtype: dtype of weights and caches, for models of this package and of transformers.
        full_heads: give the twin in C and in llama.cpp a key head for every query head.
        state_dtype: dtype of the states of retention in C; None: float32.
    """
    if name == "llama":
        return Llama(name, config, device, dtype)
    own = models.config_of(name, config, full_heads=full_heads)
    if name in models.LLAMACPP:
        return LlamaCpp(name, own, device)
    if name in models.NATIVE:
        return Native(name, own, device, state_dtype)
    kind = Recorded if recordable(own, device) else Rival
    return kind(name, own, device, dtype)


class Decoding:
    """Decoding of a rival: its state for a batch and a context, and the steps after it."""

    def __init__(self, rival: Rival, batch: int, context: int, steps: int, room: int = 0):
        self.rival, self.steps = rival, steps
        self.state = rival.fill(batch, context, room)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=rival.device)  # any tokens: all take the same time

    def run(self) -> None:
        """Decodes `steps` more tokens of each sequence."""
        for _ in range(self.steps):
            self.state = self.rival.step(self.ids, self.state)  # the context grows into `room`

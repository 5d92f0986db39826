"""Configs of the layers: RetentionConfig, AttentionConfig, FeedForwardConfig, and the checks shared by all configs.

Every variant of a layer is a field: a new variant is one line here and one in the layer. A model's config is a list of
these (`models/config.py`). This file has no `from __future__ import annotations`: `check_fields` reads the field types.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from retentive.ops import decay as decays
from retentive.ops import rotary as rotaries

GATES = ("swish", "sigmoid")
"""Activations of the gate on the head outputs, see `ops.rows.ACTIVATIONS`."""
ACTIVATIONS = ("swish", "gelu")
"""Activations of the feed-forward layer."""
LIMITS = {"vocab_size": 2**24, "layers": 10_000}
LIMIT = 2**20
"""Limit of all other whole numbers. A larger value is a typing error, and building the model would take all memory."""
LONGEST = 64
"""Most taps of a convolution, which multiplies a token with each of them."""
KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    int | None: "a whole number or null",
}
"""Names of field types in messages."""


@dataclass(frozen=True)
class RetentionConfig:
    """Gated multi-scale retention. Defaults are this package's own; `docs/idea.md` lists differences from the paper."""

    kind: ClassVar[str] = "retention"
    """Name of this mixer in config.json and in the names of weights."""
    rotary_scaling: ClassVar[None] = None
    """Only attention has smaller angles for longer texts."""
    dim: int = 256
    """Model width D."""
    heads: int = 4
    """Retention heads H; the key head dim K = key_dim / heads must be even."""
    kv_heads: int = 0
    """Key and value heads, each shared by heads / kv_heads query heads; 0: one per query head."""
    key_dim: int = 0
    """Width of q and k over all heads; 0: dim."""
    value_dim: int = 0
    """Width of v, g and the head norm over all heads; 0: 5/3 dim, rounded up to 8 per head."""
    decay: str | tuple[float, ...] = "gated"
    """Decay of the heads: lm, paper, none; gated or sigmoid, computed from each token; or log(gamma) of each head."""
    decay_range: tuple[float, float] = decays.LM_RANGE
    """1 - gamma of the first and the last head, for decay lm and for the initial decay_bias."""
    decay_scale: float = 16.0
    """Divisor of the log sigmoid of a per-token decay (YOCO's temperature): a new head keeps 2^(-1/16)."""
    decay_bias: bool = False
    """Bias in the projection of a per-token decay, so that a new model has the decays of decay_range."""
    rotary: str = "interleaved"
    """Pairs and angles of the rotation: interleaved (torchscale), half (fla), or none."""
    rotary_base: float = 10000.0
    """Base of the rotation angles (rope theta)."""
    qk_norm: bool = True
    """RMSNorm with a gain over each head's q and k, before rotation."""
    qk_bias: bool = False
    """Bias for each feature of q and k, initially 1, after their norm and before rotation."""
    score_norm: bool = False
    """Divide row n of the decay mask by the root of its sum (the paper's second stabiliser); not for decay gated."""
    head_norm: bool = False
    """RMSNorm over each head's output (the paper's group norm)."""
    head_norm_affine: bool = False
    """Gain in the head norm, shared by the heads (fla)."""
    head_norm_joint: bool = False
    """Head norm over all heads together, with a gain of its own for each of their features (lightning attention)."""
    gate: bool = True
    """Gate on the head outputs."""
    gate_activation: str = "swish"
    """Activation of the gate: swish (the paper) or sigmoid."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""

    def __post_init__(self):
        fill = object.__setattr__  # the only way for a frozen dataclass to derive its defaults
        check_fields(self)
        positive(self, "dim", "heads")
        fill(self, "kv_heads", self.kv_heads or self.heads)
        fill(self, "key_dim", self.key_dim or self.dim)
        unit = 8 * self.heads
        fill(self, "value_dim", self.value_dim or unit * -(-self.dim * 5 // (3 * unit)))  # -(-a // b) rounds up
        positive(self, "kv_heads", "key_dim", "value_dim")  # given values may be negative
        for name in ("key_dim", "value_dim"):
            if getattr(self, name) % self.heads:
                raise ValueError(f"{name} {getattr(self, name)} is not divisible by heads {self.heads}: change either")
        if self.key_dim // self.heads % 2:
            raise ValueError(f"the key head dim must be even for the rotation, got {self.key_dim} / {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}: change either")
        if self.head_norm_joint and not self.head_norm:
            raise ValueError("head_norm_joint is of a head norm: set head_norm=True with it")
        check_rotation(self)
        one_of("gate_activation", self.gate_activation, GATES)
        check_norm_eps(self.norm_eps)
        self._check_decay()

    @property
    def head_shape(self) -> tuple[int, int, int]:
        """(H, K, V): shape of one sequence's state."""
        return self.heads, self.key_dim // self.heads, self.value_dim // self.heads

    @property
    def per_token(self) -> bool:
        """True if each token has decays of its own."""
        return self.decay in decays.PER_TOKEN

    def _check_decay(self) -> None:
        fill = object.__setattr__
        if not isinstance(self.decay, str):
            fill(self, "decay", numbers("decay", self.decay, "a name or a log decay for each head"))
        fill(
            self,
            "decay_range",
            numbers("decay_range", self.decay_range, "two numbers, 1 - gamma of the first head and of the last"),
        )
        if len(self.decay_range) != 2 or not all(0 < x < 1 for x in self.decay_range):  # NaN fails too
            raise ValueError(f"decay_range must be two numbers between 0 and 1, got {self.decay_range}")
        if not 0 < self.decay_scale < math.inf:
            raise ValueError(f"decay_scale must be above 0, got {self.decay_scale}")
        if self.decay == "sigmoid" and max(self.decay_range) >= -math.expm1(-decays.FASTEST):
            raise ValueError(f"decay='sigmoid' forgets at most 0.4547 a token, got decay_range={self.decay_range}")
        if self.per_token:
            if self.score_norm:
                raise ValueError(
                    f"score_norm needs decays that are known beforehand: set score_norm=False with decay={self.decay!r}"
                )
            return
        if self.decay_bias:
            raise ValueError(f"decay_bias is of a decay per token: set decay='gated' with it, got decay={self.decay!r}")
        if isinstance(self.decay, str):
            one_of("decay schedule", self.decay, (*decays.SCHEDULES, *decays.PER_TOKEN, f"{self.heads} numbers"))
        self.log_decay()  # raises if the number of decays is not heads

    def log_decay(self) -> list[float]:
        """Returns log(gamma) of each head, for decays that do not depend on the token."""
        return decays.values(self.decay, self.heads, self.decay_range)


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention: rotary positions, grouped heads, and known improvements."""

    kind: ClassVar[str] = "attention"
    """Name of this mixer in config.json and in the names of weights."""
    dim: int = 256
    """Model width D."""
    heads: int = 4
    """Attention heads H."""
    kv_heads: int = 0
    """Key and value heads (grouped-query attention); 0: one per query head."""
    head_dim: int = 0
    """Features K per head, an even number; 0: dim / heads."""
    rotary: str = "half"
    """Pairs and angles of the rotation: half (Llama), interleaved, or none."""
    rotary_base: float = 10000.0
    """Base of the rotation angles (rope theta)."""
    rotary_scaling: rotaries.Scaling | None = None
    """Smaller angles for texts longer than those of the first training (rope scaling); None (null): as they are."""
    qk_norm: bool = False
    """RMSNorm with a gain over each head's q and k, before rotation."""
    qkv_bias: bool = False
    """Biases in the projections of q, k and v (Qwen2), before QK-norm."""
    forget_gate: bool = False
    """Forget gate: log sigmoids of a projection of each token, summed from key to query, lower the score
    (arXiv 2503.02130). Needs one key head per query head."""
    window: int | None = None
    """Number of tokens that a token attends to, itself included, in a cache of constant size; None (null): all."""
    sinks: int = 0
    """Attention sinks: the first tokens of a text, seen by every token beside its window (arXiv 2309.17453)."""
    output_gate: bool = False
    """Sigmoid gate on the head outputs, computed from each token."""
    position_scale: float = 0.0
    """Multiply the scores of the token at position p by log(p + a) / log(a), for texts longer than those of the
    training. a is 362 in HypeNet; 0: scores stay as they are."""
    moving_sinks: bool = False
    """Let the sinks stand right before the window in a longer text, as the same paper does: their distance, in the
    rotation, then stays one that a model trained on shorter texts knows."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""

    def __post_init__(self):
        fill = object.__setattr__  # the only way for a frozen dataclass to derive its defaults
        check_fields(self)
        positive(self, "dim", "heads")
        fill(self, "kv_heads", self.kv_heads or self.heads)
        positive(self, "kv_heads")
        if (not self.head_dim and self.dim % self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"dim {self.dim} must divide by heads {self.heads}, and heads by kv_heads {self.kv_heads}: change one"
            )
        fill(self, "head_dim", self.head_dim or self.dim // self.heads)
        positive(self, "head_dim")
        if self.head_dim % 2:
            raise ValueError(f"the head dim must be even for the rotation, got {self.head_dim}: change dim or heads")
        check_rotation(self)
        if isinstance(self.rotary_scaling, dict):  # JSON
            fill(self, "rotary_scaling", rotaries.Scaling(**self.rotary_scaling))
        if not isinstance(self.rotary_scaling, rotaries.Scaling | None):
            raise ValueError(f"rotary_scaling must be its fields or null, got {self.rotary_scaling!r}")
        if self.window is not None and self.window < 1:
            without = "without one all earlier tokens are seen"
            raise ValueError(f"the window must be at least 1 token, got {self.window}; {without}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.sinks and self.window is None:
            raise ValueError(
                f"sinks {self.sinks} without a window, where all tokens are seen: set window, or sinks to 0"
            )
        if self.position_scale and not 1 < self.position_scale < math.inf:
            raise ValueError(f"position_scale must be above 1, or 0 for none, got {self.position_scale}")
        if self.moving_sinks and not self.sinks:
            raise ValueError("moving_sinks without sinks: set sinks, or moving_sinks to False")
        if self.sinks and self.forget_gate:
            raise ValueError(
                f"sinks {self.sinks} with a forget gate: a sink needs the gates of all later tokens, and a window "
                "keeps only those of its own tokens; set sinks to 0, or do without the gate"
            )
        if self.forget_gate and self.kv_heads != self.heads:
            raise ValueError(
                f"forget_gate needs keys of its own for every head: set kv_heads to {self.heads}, got {self.kv_heads}"
            )
        check_norm_eps(self.norm_eps)

    @property
    def slots(self) -> int:
        """Tokens that a cache keeps at most: the sinks and the window; 0 without a window, for all tokens."""
        return self.sinks + self.window if self.window else 0

    def seen(self, context: int) -> int:
        """Returns the number of tokens that the last of `context` tokens attends to, itself included."""
        return min(context, self.slots or context)


@dataclass(frozen=True)
class ConvolutionConfig:
    """Short causal convolution of each feature over the last tokens."""

    kind: ClassVar[str] = "convolution"
    """Name of this mixer in config.json and in the names of weights."""
    dim: int = 256
    """Model width D."""
    taps: int = 4
    """Tokens that are mixed, the newest included."""

    def __post_init__(self):
        check_fields(self)
        positive(self, "dim")
        if not 2 <= self.taps <= LONGEST:
            raise ValueError(f"a convolution has from 2 to {LONGEST} taps (tokens that it mixes), got {self.taps}")


@dataclass(frozen=True)
class FeedForwardConfig:
    """Feed-forward layer: SwiGLU, or without the gate the paper's plain one with two matrices."""

    width: int = 448
    """Width F between the matrices."""
    activation: str = "swish"
    """Activation: swish or gelu."""
    gate: bool = True
    """Gated, with three matrices."""

    def __post_init__(self):
        check_fields(self)
        positive(self, "width")
        one_of("activation", self.activation, ACTIVATIONS)

    def parameters(self, dim: int) -> int:
        """Returns the number of parameters at model width `dim`."""
        return (3 if self.gate else 2) * dim * self.width


def check_fields(config) -> None:
    """Raises ValueError if a field has a wrong type, or a whole number beyond any model's.

    A config may come from a JSON file with arbitrary content.
    """
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        if kind not in KINDS:
            continue  # decays have several types and their own check
        allowed = (int, float) if kind is float else kind
        # bool is a subclass of int, so True would pass for 1
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):  # type: ignore[arg-type]
            raise ValueError(f"{field.name} must be {KINDS[kind]}, got {value!r}")
        most = LIMITS.get(field.name, LIMIT)
        if isinstance(value, int) and value > most:
            raise ValueError(f"{field.name} must be at most {most:,}, got {value:,}")


def positive(config, *names: str) -> None:
    """Raises ValueError if a field is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def one_of(name: str, value: str, allowed) -> None:
    """Raises ValueError if a value is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(allowed)}")


def numbers(name: str, value: Any, wanted: str) -> tuple[float, ...]:
    """Returns the value as a tuple of numbers, since JSON's lists are not hashable."""
    try:
        return tuple(float(x) for x in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {wanted}, got {value!r}") from None


def check_rotation(config) -> None:
    """Raises ValueError for an unknown rotation, or a base that gives no angles."""
    one_of("rotary", config.rotary, rotaries.VARIANTS)
    if not 1 < config.rotary_base < math.inf:
        raise ValueError(f"rotary_base must be above 1, got {config.rotary_base}")


def check_norm_eps(eps: float) -> None:
    """Raises ValueError for an invalid epsilon."""
    if not 0 <= eps <= 1:
        raise ValueError(f"norm_eps must be in [0, 1], got {eps}")

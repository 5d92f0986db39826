"""What a model is made of: RetNetConfig, TransformerConfig, HybridConfig, the named sizes, and the twin of a RetNet.

Every variant of the architecture that published weights use is a field here: torchscale's and fla's models are this
one with other values. No `from __future__ import annotations` in this file: `check_fields` reads the fields' types.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from retentive.layers.ffn import ACTIVATIONS
from retentive.ops import decay as decays
from retentive.ops import rotary as rotaries

LIMITS = {"vocab_size": 2**24, "layers": 10_000}
LIMIT = 2**20
"""Of every other whole number. What is larger is a typing error, and building it would take all memory."""
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
"""What messages call the types of fields."""


@dataclass(frozen=True)
class RetNetConfig:
    """A Retentive Network. Defaults: torchscale's current architecture with the paper's language-model decay."""

    vocab_size: int = 257
    """Rows of the embedding."""
    dim: int = 256
    """Model width D."""
    layers: int = 6
    """Blocks of retention and feed-forward."""
    heads: int = 4
    """Retention heads H; the key head dim K = key_dim / heads must be even."""
    kv_heads: int = 0
    """Heads of k and v, each shared by heads / kv_heads query heads; 0: every head has its own."""
    key_dim: int = 0
    """Width of q and k over all heads; 0: dim."""
    value_dim: int = 0
    """Width of v, g and the head norm over all heads; 0: 5/3 dim, rounded up to 8 a head."""
    ffn_dim: int = 0
    """Width of the feed-forward layer; 0: value_dim."""
    activation: str = "swish"
    """Activation of the feed-forward layer: swish or gelu."""
    ffn_gate: bool = True
    """A gated feed-forward layer of three matrices; if not, the paper's first one, of two."""
    decay: str | tuple[float, ...] = "lm"
    """Decay of the heads: lm, paper, none, gated (computed from each token), or log(gamma) of each head."""
    rotary: str = "interleaved"
    """Pairs and angles of the rotation: interleaved (torchscale) or half (fla)."""
    score_norm: bool = True
    """Divide row n of the decay mask by the root of its sum (the paper's second stabiliser)."""
    head_norm: bool = True
    """RMSNorm over each head's output (the paper's group norm)."""
    head_norm_affine: bool = False
    """A gain, shared by the heads, in the head norm (fla)."""
    gate: bool = True
    """Swish gate on the head outputs."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""
    embed_scale: bool = False
    """Multiply embeddings by sqrt(dim) (torchscale's fairseq models)."""
    embed_norm: bool = False
    """RMSNorm right after the embedding."""
    final_norm: bool = True
    """RMSNorm before the output matrix."""
    tie_embeddings: bool = False
    """Use the embedding as the output matrix."""
    dropout: float = 0.0
    """Dropout of embeddings and of each sublayer's output while training."""

    def __post_init__(self):
        fill = object.__setattr__  # a frozen dataclass allows no other way to derive its own defaults
        check_fields(self)
        _positive(self, "vocab_size", "dim", "layers", "heads")
        fill(self, "kv_heads", self.kv_heads or self.heads)
        fill(self, "key_dim", self.key_dim or self.dim)
        unit = 8 * self.heads
        fill(self, "value_dim", self.value_dim or unit * -(-self.dim * 5 // (3 * unit)))  # -(-a // b) rounds up
        fill(self, "ffn_dim", self.ffn_dim or self.value_dim)
        _positive(self, "kv_heads", "key_dim", "value_dim", "ffn_dim")  # again: the user may have given negative ones
        for name in ("key_dim", "value_dim"):
            if getattr(self, name) % self.heads:
                raise ValueError(f"{name} {getattr(self, name)} is not divisible by heads {self.heads}: change either")
        if self.key_dim // self.heads % 2:
            raise ValueError(f"the key head dim must be even for the rotation, got {self.key_dim} / {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}: change either")
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("rotary", self.rotary, rotaries.VARIANTS)
        if not isinstance(self.decay, str):
            try:
                fill(self, "decay", tuple(float(x) for x in self.decay))  # JSON has lists, which are not hashable
            except (TypeError, ValueError):
                raise ValueError(f"decay must be a name or a log decay for each head, got {self.decay!r}") from None
        if self.decay != "gated":
            if isinstance(self.decay, str):
                _one_of("decay schedule", self.decay, (*decays.SCHEDULES, "gated", f"{self.heads} numbers"))
            decays.values(self.decay, self.heads)  # raises for decays of other heads
        elif self.score_norm:
            raise ValueError(
                "score_norm needs decays that are known beforehand: set score_norm=False with decay='gated'"
            )
        _check_ranges(self)


@dataclass(frozen=True)
class HybridConfig(RetNetConfig):
    """A RetNet of which some blocks are those of its twin: attention, with as many parameters."""

    attention_every: int = 4
    """One block in so many attends, the last of them; 4: three blocks of retention, then one of attention."""

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.attention_every <= self.layers:
            raise ValueError(
                f"attention_every must be from 2 to layers, {self.layers}, for blocks of both kinds to be there, "
                f"got {self.attention_every}"
            )

    def attends(self, block: int) -> bool:
        """Whether the block of this index, from 0, is one of attention."""
        return (block + 1) % self.attention_every == 0


@dataclass(frozen=True)
class TransformerConfig:
    """The twin: a modern Transformer (rotary positions, RMSNorm, SwiGLU, grouped heads where wanted)."""

    vocab_size: int = 257
    """Rows of the embedding."""
    dim: int = 256
    """Model width D."""
    layers: int = 6
    """Blocks of attention and feed-forward."""
    heads: int = 4
    """Attention heads; the head dim dim / heads must be even."""
    kv_heads: int = 0
    """Heads of k and v (grouped-query attention); 0: every head has its own."""
    ffn_dim: int = 0
    """Width of the feed-forward layer; 0: 8/3 dim, rounded up to 8."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""
    tie_embeddings: bool = False
    """Use the embedding as the output matrix."""
    dropout: float = 0.0
    """Dropout of embeddings and of each sublayer's output while training."""

    def __post_init__(self):
        fill = object.__setattr__
        check_fields(self)
        _positive(self, "vocab_size", "dim", "layers", "heads")
        fill(self, "kv_heads", self.kv_heads or self.heads)
        fill(self, "ffn_dim", self.ffn_dim or 8 * -(-self.dim // 3))
        _positive(self, "kv_heads", "ffn_dim")
        if self.dim % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"dim {self.dim} must divide by heads {self.heads}, and heads by kv_heads {self.kv_heads}: change one"
            )
        if self.dim // self.heads % 2:
            raise ValueError(f"the head dim must be even for the rotation, got {self.dim} / {self.heads} heads")
        _check_ranges(self)


OwnConfig = RetNetConfig | TransformerConfig
"""The config of an architecture written here (a hybrid's is a RetNetConfig); `models.Config` has the peers' too."""


def check_fields(config) -> None:
    """Raises ValueError where a field holds another type than its own, or a whole number beyond any model's.

    A config may come from a JSON file, which may hold anything.
    """
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        if kind not in KINDS:
            continue  # decay has several types, and a check of its own
        allowed = (int, float) if kind is float else kind
        # bool is a subclass of int: True would pass for the number 1
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):  # type: ignore[arg-type]
            raise ValueError(f"{field.name} must be {KINDS[kind]}, got {value!r}")
        most = LIMITS.get(field.name, LIMIT)
        if kind is int and value > most:
            raise ValueError(f"{field.name} must be at most {most:,}, got {value:,}")


def _positive(config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def _one_of(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(allowed)}")


def _check_ranges(config: OwnConfig) -> None:
    if not 0 <= config.norm_eps <= 1:
        raise ValueError(f"norm_eps must be in [0, 1], got {config.norm_eps}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {config.dropout}")


def twin(config: RetNetConfig, *, kv_heads: int = 0) -> TransformerConfig:
    """The Transformer of the same width, depth, heads and parameters as a RetNet.

    Attention has 4 D^2 where retention has 2 D key_dim + 3 D value_dim; the feed-forward layer takes the difference:
    with both widths 5/3 D, the twin's is 8/3 D, the width that Llama uses.

    Args:
        kv_heads: heads of keys and values, shared by groups of query heads (grouped-query attention, arXiv 2305.13245);
            0: every head has its own.
    """
    shared = config.kv_heads / config.heads
    # All in units of D parameters: what one block of the RetNet has, less what the twin's attention takes.
    retention = (1 + shared) * config.key_dim + (shared + (2 if config.gate else 1)) * config.value_dim
    feed_forward = (3 if config.ffn_gate else 2) * config.ffn_dim
    attention = 2 * config.dim * (1 + (kv_heads or config.heads) / config.heads)
    return TransformerConfig(
        vocab_size=config.vocab_size,
        dim=config.dim,
        layers=config.layers,
        heads=config.heads,
        kv_heads=kv_heads,
        ffn_dim=round((feed_forward + retention - attention) / 3),  # SwiGLU has three matrices
        norm_eps=config.norm_eps,
        tie_embeddings=config.tie_embeddings,
        dropout=config.dropout,
    )


def of_one_kind(config: OwnConfig) -> list[Any]:
    """The configs whose blocks are all alike: this one; of a hybrid a RetNet's and a Transformer's, in this order.

    The two have the hybrid's blocks between them, so that costs and states of a hybrid are sums over both.
    """
    if not isinstance(config, HybridConfig):
        return [config]
    attending = sum(map(config.attends, range(config.layers)))
    same = {f.name: getattr(config, f.name) for f in fields(RetNetConfig)}
    return [RetNetConfig(**same | {"layers": config.layers - attending}), replace(twin(config), layers=attending)]


def _small(dim: int, layers: int, heads: int) -> dict:
    """Tied embeddings: untied, they would be most of a small model's parameters."""
    return dict(dim=dim, layers=layers, heads=heads, tie_embeddings=True)


def _paper(dim: int, layers: int, heads: int) -> dict:
    """arXiv 2307.08621v4: key head dim 256, value and (plain) feed-forward width 2 D, 12 D^2 parameters a block."""
    plain = dict(ffn_dim=2 * dim, ffn_gate=False, activation="gelu")
    return dict(dim=dim, layers=layers, heads=heads, value_dim=2 * dim, dropout=0.1, **plain)


def _torchscale(dim: int, layers: int, heads: int, ffn: int) -> dict:
    """The architectures that torchscale registers with fairseq."""
    return dict(dim=dim, layers=layers, heads=heads, value_dim=ffn, ffn_dim=ffn, decay="paper", embed_scale=True)


def _fla(dim: int, layers: int, heads: int, ffn: int, *, tie: bool = False) -> dict:
    """The configs behind fla-hub's checkpoints."""
    return dict(
        dim=dim,
        layers=layers,
        heads=heads,
        value_dim=2 * dim,
        ffn_dim=ffn,
        decay="paper",
        rotary="half",
        score_norm=False,
        head_norm_affine=True,
        tie_embeddings=tie,
    )


PRESETS: dict[str, dict] = {
    # our own series for small machines, named by the parameters of the blocks
    "1m": _small(128, 5, 2),
    "2m": _small(192, 5, 3),
    "5m": _small(256, 6, 4),
    "10m": _small(320, 8, 5),
    "25m": _small(512, 8, 8),
    "60m": _small(640, 12, 10),
    "130m": _small(896, 13, 7),
    "350m": _small(1280, 18, 10),
    "paper-1.3b": _paper(2048, 24, 8),
    "paper-2.7b": _paper(2560, 32, 10),
    "paper-6.7b": _paper(4096, 32, 16),
    "torchscale-base": _torchscale(512, 6, 2, 864),
    "torchscale-medium": _torchscale(1024, 16, 4, 1728),
    "torchscale-xl": _torchscale(2048, 24, 8, 3456),
    "torchscale-3b": _torchscale(2560, 32, 10, 4280),
    "torchscale-7b": _torchscale(4096, 32, 16, 6912),
    "torchscale-13b": _torchscale(5120, 40, 20, 8560),
    "torchscale-65b": _torchscale(8192, 64, 32, 13824),
    "fla-340m": _fla(1024, 24, 4, 1536, tie=True),
    "fla-1.3b": _fla(2048, 24, 8, 2816),
    "fla-2.7b": _fla(2560, 32, 10, 3584),
}


def preset(size: str, *, vocab_size: int, kind: type[RetNetConfig] = RetNetConfig, **changes) -> RetNetConfig:
    """The config of a RetNet of a named size (or of a hybrid, by `kind`), fields changed as given.

    Raises:
        ValueError: an unknown size (the known ones are named) or an unknown field.
    """
    if size not in PRESETS:
        raise ValueError(f"unknown size {size!r}, expected one of {', '.join(PRESETS)}")
    unknown = set(changes) - set(kind.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    return kind(vocab_size=vocab_size, **{**PRESETS[size], **changes})

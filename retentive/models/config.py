"""What a model is made of: RetNetConfig, TransformerConfig, HybridConfig, the named sizes, and the twin of a RetNet.

Every variant of the architecture is a field here or in the layer's config; those that have a name, the paper's RetNet,
torchscale's and fla's, are values of these fields. No `from __future__ import annotations` in this file: `check_fields`
reads the fields' types.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from retentive.layers.config import AttentionConfig, RetentionConfig, one_of, positive
from retentive.layers.ffn import ACTIVATIONS
from retentive.ops import decay as decays


@dataclass(frozen=True)
class RetNetConfig(RetentionConfig):
    """A Retentive Network: the layer's fields, and these."""

    vocab_size: int = 257
    """Rows of the embedding."""
    layers: int = 6
    """Blocks of retention and feed-forward."""
    ffn_dim: int = 0
    """Width of the feed-forward layer; 0: value_dim."""
    activation: str = "swish"
    """Activation of the feed-forward layer: swish or gelu."""
    ffn_gate: bool = True
    """A gated feed-forward layer of three matrices; if not, the paper's first one, of two."""
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
        super().__post_init__()
        positive(self, "vocab_size", "layers")
        object.__setattr__(self, "ffn_dim", self.ffn_dim or self.value_dim)
        positive(self, "ffn_dim")
        one_of("activation", self.activation, ACTIVATIONS)
        _check_dropout(self.dropout)


@dataclass(frozen=True)
class HybridConfig(RetNetConfig):
    """A RetNet of which some blocks are those of its twin: attention, with as many parameters."""

    attention_every: int = 0
    """One block in so many attends, the last of them; 4: three blocks of retention, then one of attention. 0: 4, or all
    blocks where there are fewer."""
    attention_window: int | None = None
    """Tokens that a token attends to in these blocks, itself included; None (null): all before it. With a window the
    state of the whole model has a constant size."""
    attention_rotary: str = "half"
    """Rotation in these blocks: half, interleaved, or none, which leaves order to retention."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "attention_every", self.attention_every or min(4, self.layers))
        if not 2 <= self.attention_every <= self.layers:
            raise ValueError(
                f"attention_every must be from 2 to layers, {self.layers}, for blocks of both kinds to be there, "
                f"got {self.attention_every}"
            )

        self.attention()  # raises for a window or rotation that is none

    def attention(self) -> "TransformerConfig":
        """The config of the blocks that attend, as wide as the twin's, with QK-norm if the others have it."""
        window, rotary = self.attention_window, self.attention_rotary
        return replace(twin(self), attention_window=window, rotary=rotary, qk_norm=self.qk_norm)

    def attends(self, block: int) -> bool:
        """Whether the block of this index, from 0, is one of attention."""
        return (block + 1) % self.attention_every == 0


@dataclass(frozen=True)
class TransformerConfig(AttentionConfig):
    """The twin: a modern Transformer (rotary positions, RMSNorm, SwiGLU, grouped heads where wanted)."""

    vocab_size: int = 257
    """Rows of the embedding."""
    layers: int = 6
    """Blocks of attention and feed-forward."""
    ffn_dim: int = 0
    """Width of the feed-forward layer; 0: 8/3 dim, rounded up to 8."""
    tie_embeddings: bool = False
    """Use the embedding as the output matrix."""
    dropout: float = 0.0
    """Dropout of embeddings and of each sublayer's output while training."""

    def __post_init__(self):
        super().__post_init__()
        positive(self, "vocab_size", "layers")
        object.__setattr__(self, "ffn_dim", self.ffn_dim or 8 * -(-self.dim // 3))
        positive(self, "ffn_dim")
        _check_dropout(self.dropout)


OwnConfig = RetNetConfig | TransformerConfig
"""The config of an architecture written here (a hybrid's is a RetNetConfig); `models.Config` has the peers' too."""


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


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
    retention += config.heads if config.decay == "gated" else 0
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
    return [RetNetConfig(**same | {"layers": config.layers - attending}), replace(config.attention(), layers=attending)]


PLAIN: dict[str, Any] = dict(qk_norm=False, qk_bias=False, decay_bias=False, gate_activation="swish", head_norm=True)
"""What no published RetNet has, but for the norm of each head's output, which all have."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "retnet": {},
    # the paper's language models, in the parts that its authors published later: RMSNorm, a gated feed-forward layer
    "retnet-paper": PLAIN | dict(decay="lm", decay_range=decays.LM_RANGE, rotary="interleaved", score_norm=True),
    "torchscale": PLAIN | dict(decay="paper", rotary="interleaved", score_norm=True, embed_scale=True),
    "fla": PLAIN | dict(decay="paper", rotary="half", score_norm=False, head_norm_affine=True),
}
"""The RetNets that have a name, by the fields that the name stands for. `retnet`, this package's own, is the fields'
defaults and stands for nothing else: any of them may be changed."""


class Size(NamedTuple):
    """A named size: shapes, and the architecture that they were published with."""

    shape: dict[str, Any]
    architecture: str = "retnet"


def _small(dim: int, layers: int, heads: int) -> Size:
    """Tied embeddings: untied, they would be most of a small model's parameters."""
    return Size(dict(dim=dim, layers=layers, heads=heads, tie_embeddings=True))


def _paper(dim: int, layers: int, heads: int) -> Size:
    """arXiv 2307.08621v4: key head dim 256, value and (plain) feed-forward width 2 D, 12 D^2 parameters a block."""
    plain = dict(ffn_dim=2 * dim, ffn_gate=False, activation="gelu")
    return Size(dict(dim=dim, layers=layers, heads=heads, value_dim=2 * dim, dropout=0.1, **plain), "retnet-paper")


def _torchscale(dim: int, layers: int, heads: int, ffn: int) -> Size:
    """The architectures that torchscale registers with fairseq."""
    return Size(dict(dim=dim, layers=layers, heads=heads, value_dim=ffn, ffn_dim=ffn), "torchscale")


def _fla(dim: int, layers: int, heads: int, ffn: int, *, tie: bool = False) -> Size:
    """The configs behind fla-hub's checkpoints."""
    shape = dict(dim=dim, layers=layers, heads=heads, value_dim=2 * dim, ffn_dim=ffn, tie_embeddings=tie)
    return Size(shape, "fla")


PRESETS: dict[str, Size] = {
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


def preset(
    size: str,
    *,
    vocab_size: int,
    architecture: str = "retnet",
    kind: type[RetNetConfig] = RetNetConfig,
    **changes: Any,
) -> RetNetConfig:
    """The config of a RetNet of a named size (or of a hybrid, by `kind`), fields changed as given.

    Args:
        architecture: a name of ARCHITECTURES; "retnet" is that of the size where it was published with another.

    Raises:
        ValueError: an unknown size or architecture (the known ones are named), an unknown field, or one that
            contradicts the architecture's name.
    """
    if size not in PRESETS:
        raise ValueError(f"unknown size {size!r}, expected one of {', '.join(PRESETS)}")
    one_of("architecture", architecture, ARCHITECTURES)
    shape, published = PRESETS[size]
    if architecture != "retnet" and published not in ("retnet", architecture):
        raise ValueError(f"size {size} is of the architecture {published}, got {architecture}: name a size of our own")
    unknown = set(changes) - set(kind.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    name = published if architecture == "retnet" else architecture
    meant = ARCHITECTURES[name]
    other = {field: value for field, value in changes.items() if field in meant and value != meant[field]}
    if other:
        stands = ", ".join(f"{field}={meant[field]!r} (got {value!r})" for field, value in other.items())
        raise ValueError(f"{name} stands for {stands}: leave it out, or change a RetNet without that name")
    return kind(**{"vocab_size": vocab_size, **shape, **meant, **changes})

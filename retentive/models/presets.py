"""Configs by name: `retnet`, its twin `transformer`, `hybrid`, the architectures of papers and projects, named sizes.

    retnet("5m", vocab_size=257, decay="lm")          any field of the layers and of the model may be changed
    transformer("5m", vocab_size=257)                 the Transformer with as many parameters
    hybrid("5m", vocab_size=257, attention_every=4, attention_window=512)

All are functions that return a ModelConfig: a variant is data, not a class.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from retentive.layers.config import LIMIT, AttentionConfig, FeedForwardConfig, RetentionConfig, one_of
from retentive.models.config import BlockConfig, ModelConfig, check_layers
from retentive.ops import decay as decays

DEFAULTS: dict[str, Any] = dict(dim=256, layers=6, heads=4, vocab_size=257)
"""Shape of a RetNet without a size."""
SHARED = {f.name: f.type for f in fields(ModelConfig) if f.name != "blocks"} | {"layers": int}
"""Fields of a whole model, and their types."""
FEED_FORWARD = {"ffn_dim": ("width", int), "activation": ("activation", str), "ffn_gate": ("gate", bool)}
"""Fields of the feed-forward layer: their names there, and their types."""
RETENTION = {f.name: f.type for f in fields(RetentionConfig) if f.name not in ("dim", "norm_eps")}
"""Fields of retention, and their types."""
ATTENTION = {
    "kv_heads": ("kv_heads", int),
    "head_dim": ("head_dim", int),
    "rotary": ("rotary", str),
    "rotary_base": ("rotary_base", float),
    "qk_norm": ("qk_norm", bool),
    "qkv_bias": ("qkv_bias", bool),
    "forget_gate": ("forget_gate", bool),
    "output_gate": ("output_gate", bool),
    "position_scale": ("position_scale", float),
    "attention_window": ("window", int | None),
    "attention_sinks": ("sinks", int),
}
"""Fields of the twin's attention: their names there, and their types."""
HYBRID: dict[str, Any] = {
    "attention": tuple[int, ...],
    "attention_every": int | None,
    "attention_window": int | None,
    "attention_sinks": int,
    "attention_rotary": str,
    "attention_forget": bool,
}
"""Fields of `hybrid` in addition to those of a RetNet."""
CONVOLUTION: dict[str, Any] = {"convolution": int}
"""Taps of the short convolutions before each mixer and each feed-forward layer of any named model; 0: none."""
FIELDS: dict[str, Any] = {
    **SHARED,
    **CONVOLUTION,
    **RETENTION,
    **{name: kind for name, (_, kind) in (FEED_FORWARD | ATTENTION).items()},
    **HYBRID,
}
"""Every field that a named model takes, and its type."""


PLAIN: dict[str, Any] = dict(qk_norm=False, qk_bias=False, decay_bias=False, gate_activation="swish", head_norm=True)
"""Values of published RetNets: none of our own options, and a norm of each head's output."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "retnet": {},
    # the paper's language models with parts that its authors published later: RMSNorm, a gated feed-forward layer
    "retnet-paper": PLAIN | dict(decay="lm", decay_range=decays.LM_RANGE, rotary="interleaved", score_norm=True),
    "torchscale": PLAIN | dict(decay="paper", rotary="interleaved", score_norm=True, embed_scale=True),
    "fla": PLAIN | dict(decay="paper", rotary="half", score_norm=False, head_norm_affine=True),
    # what llama.cpp can run as well (`checkpoint/rwkv.py`), with the shape of PORTABLE
    "retnet-portable": dict(
        decay="sigmoid",
        decay_bias=True,
        decay_range=(0.4, 0.02),  # heads that begin as the paper's cost 0.03 bits per byte
        rotary="none",
        qk_norm=False,
        qk_bias=False,
        score_norm=False,
        head_norm=False,
        gate=True,
        gate_activation="sigmoid",
        embed_norm=False,
        final_norm=True,
    ),
}
"""Named RetNets, with the fields that each name fixes. `retnet`, this package's own, has the fields' defaults and fixes
none: any of them may be changed."""
PORTABLE = 64
"""Features of a head of `retnet-portable`, for queries, keys and values."""


class Size(NamedTuple):
    """A named size: shapes, and the architecture they were published with."""

    shape: dict[str, Any]
    architecture: str = "retnet"


def _small(dim: int, layers: int, heads: int) -> Size:
    """Returns a size with tied embeddings: untied, they would be most of a small model's parameters."""
    return Size(dict(dim=dim, layers=layers, heads=heads, tie_embeddings=True))


def _paper(dim: int, layers: int, heads: int) -> Size:
    """Size of arXiv 2307.08621v4: key head dim 256, value and (plain) feed-forward width 2 D, 12 D^2 per block."""
    plain = dict(ffn_dim=2 * dim, ffn_gate=False, activation="gelu")
    return Size(dict(dim=dim, layers=layers, heads=heads, value_dim=2 * dim, dropout=0.1, **plain), "retnet-paper")


def _torchscale(dim: int, layers: int, heads: int, ffn: int) -> Size:
    """Size of an architecture that torchscale registers with fairseq."""
    return Size(dict(dim=dim, layers=layers, heads=heads, value_dim=ffn, ffn_dim=ffn), "torchscale")


def _fla(dim: int, layers: int, heads: int, ffn: int, *, tie: bool = False) -> Size:
    """Size of a config of fla-hub's checkpoints."""
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


def retnet(
    size: str | None = None, *, architecture: str = "retnet", convolution: int = 0, **changes: Any
) -> ModelConfig:
    """Config of a RetNet: every block is gated multi-scale retention.

    Args:
        size: a name of PRESETS; None: the shape of DEFAULTS.
        architecture: a name of ARCHITECTURES; "retnet" means the size's own if it was published with another.
        convolution: taps of a short convolution before each mixer and each feed-forward layer; 0: none.
        changes: fields that differ from the size's: those of RetentionConfig and ModelConfig, `layers`, and `ffn_dim`
            (0: value_dim), `activation`, `ffn_gate` of the feed-forward layers.

    Raises:
        ValueError: an unknown size or architecture (known ones are listed), an unknown field, a field that
            contradicts the architecture's name, or an invalid value.
    """
    one_of("architecture", architecture, ARCHITECTURES)
    shape, published = Size(DEFAULTS) if size is None else _size(size)
    if architecture != "retnet" and published not in ("retnet", architecture):
        raise ValueError(f"size {size} is of the architecture {published}, got {architecture}: name a size of our own")
    _check_fields("RetNet", changes)
    name = published if architecture == "retnet" else architecture
    meant = ARCHITECTURES[name]
    if name == "retnet-portable":
        meant = meant | _portable_heads({**DEFAULTS, **shape, **changes}["dim"])
        shape = shape | {"ffn_dim": _portable_ffn(meant["key_dim"], {**DEFAULTS, **shape}["heads"])}
    other = {field: value for field, value in changes.items() if field in meant and value != meant[field]}
    if other:
        stands = ", ".join(f"{field}={meant[field]!r} (got {value!r})" for field, value in other.items())
        raise ValueError(f"{name} stands for {stands}: leave it out, or change a RetNet without that name")
    return _retnet(**{**DEFAULTS, **shape, **meant, **changes}).with_convolutions(convolution)


def _check_fields(what: str, changes: Mapping[str, Any], own: Collection[str] = ()) -> None:
    """Raises ValueError for a change that is no field of a RetNet and none of `own`, which it lists."""
    unknown = sorted(set(changes) - {*SHARED, *RETENTION, *FEED_FORWARD, *own})
    if unknown:
        more = f": beside a RetNet's, it has {', '.join(own)}" if own else ""
        if not more and not set(unknown) - {*HYBRID, *CONVOLUTION}:
            more = ", but a hybrid has"
        raise ValueError(f"a {what} has no field {', '.join(unknown)}{more}")


def _portable_heads(dim: int) -> dict[str, int]:
    """Heads of `retnet-portable`, which its name fixes."""
    if dim < 1 or dim % PORTABLE:
        raise ValueError(f"retnet-portable has heads of {PORTABLE}, of which dim {dim} is no multiple: change dim")
    return {"heads": dim // PORTABLE, "key_dim": dim, "value_dim": dim}


def _portable_ffn(dim: int, heads: int) -> int:
    """Feed-forward width of `retnet-portable`: about the parameters of our own RetNet of this width with these heads,
    whose values are wider than keys; a multiple of 32, for blocks of integers."""
    own = RetentionConfig(dim, heads if dim % heads == 0 and dim // heads % 2 == 0 else dim // PORTABLE)
    return 32 * round((2 * own.value_dim - dim) / 32)


def _size(name: str) -> Size:
    if name not in PRESETS:
        raise ValueError(f"unknown size {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _retnet(*, layers: int, ffn_dim: int = 0, **flat: Any) -> ModelConfig:
    check_layers(layers)
    model = {name: value for name, value in flat.items() if name in SHARED}
    common = {name: value for name, value in model.items() if name in ("dim", "norm_eps")}
    mixer = RetentionConfig(**common, **{name: value for name, value in flat.items() if name in RETENTION})
    _check_width(ffn_dim)
    own = {FEED_FORWARD[name][0]: value for name, value in flat.items() if name in FEED_FORWARD}
    ffn = FeedForwardConfig(ffn_dim or mixer.value_dim, **own)
    return ModelConfig(**model, blocks=(BlockConfig(mixer, ffn),) * layers)


def _check_width(width: Any) -> None:
    """Raises ValueError for an invalid width, which FeedForwardConfig would report under another name."""
    if type(width) is not int:
        raise ValueError(f"ffn_dim must be a whole number, got {width!r}")
    if not 0 <= width <= LIMIT:
        raise ValueError(f"ffn_dim must be {'at least 1' if width < 0 else f'at most {LIMIT:,}'}, got {width:,}")


def flat(config: ModelConfig, who: str) -> dict[str, Any]:
    """Returns all fields with which `retnet` makes this config.

    Raises:
        ValueError: it is no RetNet with equal blocks. The message starts with `who`, which needs one.
    """
    mixer, ffn = config.all_retention(who), config.blocks[0].ffn
    fields_of_ffn = {name: getattr(ffn, own) for name, (own, _) in FEED_FORWARD.items()}
    return {name: getattr(mixer, name) for name in RETENTION} | fields_of_ffn | _shared(config)


def _shared(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SHARED}


def twin(config: ModelConfig, *, kv_heads: int = 0) -> ModelConfig:
    """Config of the Transformer with a RetNet's width, depth, heads and parameters; a Transformer is returned as is.

    Attention has 4 D^2 parameters, retention 2 D key_dim + 3 D value_dim. The feed-forward layer takes the difference:
    if both widths are 5/3 D, the twin's is 8/3 D, Llama's width.

    Args:
        config: a RetNet, or a hybrid, whose retention blocks count.
        kv_heads: key and value heads, shared by groups of query heads (grouped-query attention, arXiv 2305.13245);
            0: one per query head.
    """
    block = next((b for b in config.without_convolutions().blocks if isinstance(b.mixer, RetentionConfig)), None)
    if block is None:
        return config
    config = config.without_convolutions()
    attends = _twin_block(block, config.norm_eps, kv_heads)
    # model fields that only RetNets use are dropped, so that the twin is one baseline for all of them
    return replace(config, blocks=(attends,) * config.layers, embed_scale=False, embed_norm=False, final_norm=True)


def _twin_block(block: BlockConfig, norm_eps: float, kv_heads: int = 0) -> BlockConfig:
    """Config of a block of attention and SwiGLU with as many parameters as a retention block."""
    c = block.mixer
    assert isinstance(c, RetentionConfig)
    shared = c.kv_heads / c.heads
    # In units of D parameters: the RetNet block's parameters, minus those of the twin's attention.
    retention = (1 + shared) * c.key_dim + (shared + (2 if c.gate else 1)) * c.value_dim
    retention += c.heads if c.per_token else 0
    feed_forward = (3 if block.ffn.gate else 2) * block.ffn.width if block.ffn else 0
    attention = 2 * c.dim * (1 + (kv_heads or c.heads) / c.heads)
    mixer = AttentionConfig(dim=c.dim, heads=c.heads, kv_heads=kv_heads, norm_eps=norm_eps)
    width = round((feed_forward + retention - attention) / 3)  # SwiGLU has three matrices
    return BlockConfig(mixer, FeedForwardConfig(width))


def transformer(size: str | None = None, *, convolution: int = 0, **changes: Any) -> ModelConfig:
    """Config of a RetNet's twin, a modern Transformer: rotary positions, RMSNorm, SwiGLU.

    Args:
        size: a name of PRESETS; None: the shape of DEFAULTS.
        convolution: as for `retnet`.
        changes: fields of the twin (ATTENTION, and `ffn_dim`), and of the RetNet whose width and size it has.

    Raises:
        ValueError: as `retnet`.
    """
    _check_fields("transformer", changes, ATTENTION)
    own = {name: value for name, value in changes.items() if name in ATTENTION or name == "ffn_dim"}
    base = twin(retnet(size, **{name: value for name, value in changes.items() if name not in own}))
    width = own.pop("ffn_dim", 0)
    _check_width(width)
    block = base.blocks[0]
    known = {f.name: getattr(block.mixer, f.name) for f in fields(AttentionConfig) if f.name != "kv_heads"}
    mixer = AttentionConfig(**known | {ATTENTION[name][0]: value for name, value in own.items()})
    assert block.ffn is not None
    ffn = replace(block.ffn, width=width or block.ffn.width)
    return replace(base, blocks=(BlockConfig(mixer, ffn),) * base.layers).with_convolutions(convolution)


def hybrid(size: str | None = None, **changes: Any) -> ModelConfig:
    """Config of this package's hybrid: `mixed` of a RetNet with narrow heads.

    Args:
        size: a name of PRESETS; None: the shape of DEFAULTS.
        changes: fields of `mixed`, and of the RetNet. Without `heads`, it has twice as many as the size's, of the
            same total width.

    Raises:
        ValueError: as `retnet` and `mixed`.
    """
    _check_fields("hybrid", changes, (*HYBRID, *CONVOLUTION))
    own = {name: changes.pop(name) for name in (*HYBRID, *CONVOLUTION) if name in changes}
    base = retnet(size, **changes)
    return mixed(base if "heads" in changes else narrow_heads(base), **own)


def narrow_heads(config: ModelConfig) -> ModelConfig:
    """Returns the RetNet with twice as many heads, half as wide; itself if their width would be odd."""
    c = config.all_retention("a hybrid")
    if c.key_dim % (4 * c.heads) or c.value_dim % (2 * c.heads):
        return config
    mixer = replace(c, heads=2 * c.heads, kv_heads=2 * c.kv_heads)
    return replace(config, blocks=(replace(config.blocks[0], mixer=mixer),) * config.layers)


def mixed(
    config: ModelConfig,
    *,
    attention: Sequence[int] | None = None,
    attention_every: int | None = None,
    attention_window: int | None = 256,
    attention_sinks: int = 0,
    attention_rotary: str = "half",
    attention_forget: bool = True,
    convolution: int = 4,
) -> ModelConfig:
    """Config of a RetNet with some attention blocks from its twin, with as many parameters, and short convolutions.

    By default every second block attends to a window, so memory has constant size; docs/which.md compares it with
    others. With `attention_window=None` memory grows, by the share of these blocks.
    Source: the hybrids of Mamba-2 (arXiv 2405.21060, section 9.2.3) and Griffin (arXiv 2402.19427), which have one
    attention block, in Griffin with a window, for several recurrent ones.

    Args:
        config: the RetNet; its blocks are equal, and attention blocks have QK-norm if they have it.
        attention: indices of the attention blocks, from 0; None: every second.
        attention_every: instead of indices, the last of every so many blocks. 4: three blocks of retention, then
            one of attention.
        attention_window: number of tokens that a token attends to in these blocks, itself included; None: all.
        attention_sinks: first tokens of a text, to which they attend beside the window; not beside a forget gate.
        attention_rotary: rotation in these blocks: half, interleaved, or none, which leaves order to retention.
        attention_forget: a forget gate in these blocks (`AttentionConfig.forget_gate`).
        convolution: as for `retnet`.

    Raises:
        ValueError: an index does not exist, all blocks would be of one kind, or an invalid value.
    """
    layers, block = config.layers, config.blocks[0]
    if attention is not None and attention_every is not None:
        raise ValueError(f"attention names the blocks, attention_every={attention_every} counts them: give one")
    every = 2 if attention_every is None else attention_every
    if attention is None and not 2 <= every <= layers:
        raise ValueError(
            f"attention_every must be from 2 to layers, {layers}, for blocks of both kinds to be there, got {every}"
        )
    places = set(range(every - 1, layers, every) if attention is None else attention)
    unknown = places - set(range(layers))
    if unknown:
        others = f"those that are no convolutions are 0 to {layers - 1}"
        raise ValueError(f"attention names block {min(unknown)}, but {others}")
    if not 0 < len(places) < layers:
        named, other = ("every block", "a Transformer") if places else ("no block", "a RetNet")
        some = f"one or more of 0 to {layers - 1}, but not all"
        raise ValueError(f"attention names {named}: name {some}, or take {other}")
    mixer = config.all_retention("a hybrid")
    attends = _twin_block(block, config.norm_eps)
    own = dict(window=attention_window, sinks=attention_sinks, rotary=attention_rotary, forget_gate=attention_forget)
    attends = replace(attends, mixer=replace(attends.mixer, qk_norm=mixer.qk_norm, **own))  # type: ignore[arg-type]
    blocks = tuple(attends if i in places else block for i in range(layers))
    return replace(config, blocks=blocks).with_convolutions(convolution)

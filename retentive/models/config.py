"""ModelConfig: a list of blocks, each a mixer (retention, attention or a convolution) and mostly a feed-forward layer.

    ModelConfig(vocab_size=257, dim=256, blocks=(BlockConfig(RetentionConfig(256, 4), FeedForwardConfig(448)),) * 6)

The functions in `presets.py` return such configs: RetNet, its twin, hybrids, and named architectures. This file has no
`from __future__ import annotations`: `check_fields` reads the field types.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from typing import Any, ClassVar, cast

from retentive.layers.config import (
    LIMITS,
    AttentionConfig,
    ConvolutionConfig,
    FeedForwardConfig,
    RetentionConfig,
    check_fields,
    check_norm_eps,
    positive,
)
from retentive.options import option
from retentive.tables import counted

Mixer = RetentionConfig | AttentionConfig | ConvolutionConfig
"""Config of a layer that mixes tokens."""
MIXERS: dict[str, type[Mixer]] = {mixer.kind: mixer for mixer in (RetentionConfig, AttentionConfig, ConvolutionConfig)}
"""Mixers by name in config.json."""
LATER = ("qkv_bias", "rotary_scaling", "moving_sinks", "head_norm_joint", "output_gate", "position_scale")
"""Fields of mixers newer than version 0.5.0. They are written only if set, so that the files and fingerprints of all
other models stay as they were."""


@dataclass(frozen=True)
class BlockConfig:
    """x + mixer(norm(x)), then x + ffn(norm(x)) if there is a feed-forward layer."""

    mixer: Mixer
    """Retention, attention or a convolution."""
    ffn: FeedForwardConfig | None
    """Feed-forward layer; None (null): the next block's mixer follows at once."""


@dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding, blocks, output matrix."""

    keeps_state: ClassVar[bool] = True
    """True: it can decode (False for a peer's config)."""
    library: ClassVar[str] = ""
    """Package that implements it; empty for this one."""
    vocab_size: int
    """Rows of the embedding."""
    dim: int
    """Model width D, the same in every block."""
    blocks: tuple[BlockConfig, ...]
    """Blocks, first to last."""
    norm_eps: float = 1e-6
    """Epsilon of the norms between the layers."""
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
        check_fields(self)
        object.__setattr__(self, "blocks", tuple(self.blocks))  # JSON has lists
        positive(self, "vocab_size", "dim")
        check_layers(len(self.blocks))
        check_norm_eps(self.norm_eps)
        if not 0 <= self.dropout < 1:  # NaN fails too
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for i, block in enumerate(self.blocks):
            if block.mixer.dim != self.dim:
                raise ValueError(f"block {i} has dim {block.mixer.dim}, the model has {self.dim}: make them the same")

    def __hash__(self):  # called at every token, where hashing the whole list of blocks would be slow
        return hash((self.vocab_size, self.dim, len(self.blocks)))

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each block's mixer: "retention", "attention" or "convolution"."""
        return tuple(block.mixer.kind for block in self.blocks)

    @property
    def retains(self) -> bool:
        """True if a block uses retention."""
        return RetentionConfig.kind in self.kinds

    @property
    def attends(self) -> bool:
        """True if a block uses attention."""
        return AttentionConfig.kind in self.kinds

    @property
    def windows(self) -> tuple[int, ...]:
        """Maximum number of tokens in each block's cache; 0 for unlimited, and for mixers without a cache."""
        return tuple(m.slots if isinstance(m, AttentionConfig) else 0 for m in self.mixers)

    @property
    def sinks(self) -> tuple[int, ...]:
        """Number of attention sinks among the tokens of each block's cache."""
        return tuple(m.sinks if isinstance(m, AttentionConfig) else 0 for m in self.mixers)

    @property
    def constant_state(self) -> bool:
        """True if the state stops growing: no block attends to all tokens."""
        return all(m.window for m in self.mixers if isinstance(m, AttentionConfig))

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Mixer of each block."""
        return tuple(block.mixer for block in self.blocks)

    @property
    def retention(self) -> RetentionConfig | None:
        """Config of the first retention block; None without one."""
        return next((m for m in self.mixers if isinstance(m, RetentionConfig)), None)

    @property
    def attention(self) -> AttentionConfig | None:
        """Config of the first attention block; None without one."""
        return next((m for m in self.mixers if isinstance(m, AttentionConfig)), None)

    @property
    def convolution(self) -> ConvolutionConfig | None:
        """Config of the first convolution; None without one."""
        return next((m for m in self.mixers if isinstance(m, ConvolutionConfig)), None)

    @property
    def name(self) -> str:
        """Family of the architecture, for display: RetNet, Transformer or Hybrid."""
        return "Hybrid" if self.retains and self.attends else "RetNet" if self.retains else "Transformer"

    def all_retention(self, who: str) -> RetentionConfig:
        """Returns the retention that all blocks share, for code that runs nothing else.

        Raises:
            ValueError: a block uses attention, or blocks differ. The message starts with `who`.
        """
        block = self.all_alike(who)
        if not isinstance(block.mixer, RetentionConfig):
            raise ValueError(f"{who} takes models of retention only, this is a {self.name}")
        return block.mixer

    def all_alike(self, who: str) -> BlockConfig:
        """Returns the block that all blocks equal; raises as `all_retention`, and if it has no feed-forward layer."""
        odd = next((i for i, block in enumerate(self.blocks) if block != self.blocks[0]), None)
        if odd is None:
            if self.blocks[0].ffn is None:
                raise ValueError(f"{who} takes models whose blocks have feed-forward layers, these have none")
            return self.blocks[0]
        if len(set(self.kinds)) > 1:
            kinds = " and ".join(sorted(set(self.kinds)))
            raise ValueError(f"{who} takes models whose blocks are of one kind, this {self.name} has {kinds}")
        raise ValueError(f"{who} takes models whose blocks are all alike, block {odd} differs from block 0")

    def with_ffn(self, more: int) -> "ModelConfig":
        """Returns the config with all feed-forward layers `more` wider (narrower if negative)."""
        wider = (replace(b, ffn=b.ffn and replace(b.ffn, width=b.ffn.width + more)) for b in self.blocks)
        return replace(self, blocks=tuple(wider))

    def with_convolutions(self, taps: int) -> "ModelConfig":
        """Returns the config with a convolution before each mixer and each feed-forward layer; 0 taps: itself."""
        if not taps:
            return self
        mixing, blocks = ConvolutionConfig(self.dim, taps), list[BlockConfig]()
        for block in self.blocks:
            blocks += [BlockConfig(mixing, None), replace(block, ffn=None)]
            if block.ffn:
                blocks.append(BlockConfig(mixing, block.ffn))
        return replace(self, blocks=tuple(blocks))

    def without_convolutions(self) -> "ModelConfig":
        """Returns the config without them: the mixer before each has its feed-forward layer."""
        blocks = list[BlockConfig]()
        for block in self.blocks:
            if not isinstance(block.mixer, ConvolutionConfig):
                blocks.append(block)
            elif block.ffn:
                blocks[-1] = replace(blocks[-1], ffn=block.ffn)
        return replace(self, blocks=tuple(blocks))

    def with_window(self, window: int | Sequence[int] | None, sinks: int | None = None) -> "ModelConfig":
        """Returns the config with a window in all attention layers that have none or a larger one.

        The weights fit as they are: the same layers see the last tokens only, and the state stops growing.

        Args:
            window: number of tokens that a token attends to, itself included: one for all layers, or one for each
                attention layer; None: returns the config itself.
            sinks: first tokens of a text that it attends to as well; None: as many as each layer had.

        Raises:
            ValueError: no layer attends, every window is smaller already, `sinks` without a window or beside a forget
                gate, a number is invalid, or there are more or fewer windows than attention layers.
        """
        if window is None:
            if sinks is not None:
                raise ValueError(f"{option('sinks', sinks)}: without a window all tokens are seen; give `window` too")
            return self
        if not self.attends:
            raise ValueError(f"{option('window', window)}: a {self.name} has no attention to limit; leave it out")
        attend = [isinstance(mixer, AttentionConfig) for mixer in self.mixers]
        windows = list(window) if isinstance(window, Sequence) else [window] * sum(attend)
        if len(windows) != sum(attend):
            count = counted(sum(attend), "attention layer")
            raise ValueError(f"{option('window', window)}: the model has {count}; give one number, or one for each")
        each = iter(windows)
        blocks = tuple(
            _windowed(block, next(each), sinks) if attends else block
            for block, attends in zip(self.blocks, attend, strict=True)
        )
        if all(new is old for new, old in zip(blocks, self.blocks, strict=True)):
            most = max(m.window or 0 for m in self.mixers if isinstance(m, AttentionConfig))
            raise ValueError(f"{option('window', window)}: the model has a window of {most}; give at most that")
        return replace(self, blocks=blocks)

    def written(self) -> dict[str, Any]:
        """Returns the config as JSON; equal neighbouring blocks are written once."""
        raw = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "blocks"}
        blocks = []
        for block, equal in groupby(self.blocks):
            mixer = {name: value for name, value in asdict(block.mixer).items() if value or name not in LATER}
            mixer = {"kind": block.mixer.kind, **mixer}
            blocks.append({"repeat": len(list(equal)), "mixer": mixer, "ffn": block.ffn and asdict(block.ffn)})
        return raw | {"blocks": blocks}

    @staticmethod
    def read(raw: Mapping[str, Any]) -> "ModelConfig":
        """Returns the config that `written` describes.

        Raises:
            TypeError, KeyError: fields are unknown or missing.
            ValueError: values are invalid.
        """
        blocks: list[BlockConfig] = []
        for one in raw["blocks"]:
            mixer, ffn, repeat = dict(one["mixer"]), one["ffn"], one.get("repeat", 1)
            check_layers(repeat)
            kind = mixer.pop("kind")
            if kind not in list(MIXERS):  # a list, since JSON values may not be hashable
                raise ValueError(f"unknown kind of block {kind!r}, expected one of {', '.join(MIXERS)}")
            blocks += [BlockConfig(MIXERS[kind](**mixer), None if ffn is None else FeedForwardConfig(**ffn))] * repeat
            check_layers(len(blocks))
        return ModelConfig(**{**raw, "blocks": tuple(blocks)})


def _windowed(block: BlockConfig, window: int, sinks: int | None) -> BlockConfig:
    """Returns the block of attention with the window; itself if it has a smaller one."""
    mixer = cast(AttentionConfig, block.mixer)
    sinks = mixer.sinks if sinks is None else sinks
    # a layer that was trained with sinks keeps their distances; others know none beyond the texts of their training
    moving = bool(sinks) and (mixer.moving_sinks or not mixer.sinks)
    limited = replace(mixer, window=window, sinks=sinks, moving_sinks=moving)
    return replace(block, mixer=limited) if mixer.window is None or window <= mixer.window else block


def check_layers(layers: Any) -> None:
    """Raises ValueError for an invalid number of blocks, or one beyond any model's."""
    if type(layers) is not int:
        raise ValueError(f"layers must be a whole number, got {layers!r}")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if layers > LIMITS["layers"]:
        raise ValueError(f"layers must be at most {LIMITS['layers']:,}, got {layers:,}")

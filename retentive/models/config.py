"""ModelConfig: a model is a list of blocks, a block is a mixer (retention or attention) and a feed-forward layer.

    ModelConfig(vocab_size=257, dim=256, blocks=(BlockConfig(RetentionConfig(256, 4), FeedForwardConfig(448)),) * 6)

`presets.py` has functions that return such a config: RetNet, its twin, hybrids, and the architectures that have a name.
No `from __future__ import annotations` in this file: `check_fields` reads the fields' types.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from typing import Any, ClassVar

from retentive.layers.config import (
    LIMITS,
    AttentionConfig,
    FeedForwardConfig,
    RetentionConfig,
    check_fields,
    check_norm_eps,
    positive,
)

Mixer = RetentionConfig | AttentionConfig
"""Config of a layer that mixes tokens."""
MIXERS: dict[str, type[Mixer]] = {RetentionConfig.kind: RetentionConfig, AttentionConfig.kind: AttentionConfig}
"""Mixers by the names that config.json gives them."""


@dataclass(frozen=True)
class BlockConfig:
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    mixer: Mixer
    """Retention or attention."""
    ffn: FeedForwardConfig
    """Feed-forward layer."""


@dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding, blocks, output matrix."""

    keeps_state: ClassVar[bool] = True
    """True: it can decode (a peer's config says False)."""
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

    def __hash__(self):  # asked for at every token: the whole list of blocks would take longer than the answer
        return hash((self.vocab_size, self.dim, len(self.blocks)))

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each block's mixer: "retention" or "attention"."""
        return tuple(block.mixer.kind for block in self.blocks)

    @property
    def retains(self) -> bool:
        """True if a block is of retention."""
        return RetentionConfig.kind in self.kinds

    @property
    def attends(self) -> bool:
        """True if a block is of attention."""
        return AttentionConfig.kind in self.kinds

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens that each block's cache keeps at most; 0 for all of them, and for retention, which has no cache."""
        return tuple(m.window or 0 if isinstance(m, AttentionConfig) else 0 for m in self.mixers)

    @property
    def constant_state(self) -> bool:
        """True if the state stops growing: every block retains, or attends within a window."""
        return all(isinstance(m, RetentionConfig) or m.window for m in self.mixers)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Mixer of each block."""
        return tuple(block.mixer for block in self.blocks)

    @property
    def retention(self) -> RetentionConfig | None:
        """Config of the first block of retention; None without one."""
        return next((m for m in self.mixers if isinstance(m, RetentionConfig)), None)

    @property
    def attention(self) -> AttentionConfig | None:
        """Config of the first block of attention; None without one."""
        return next((m for m in self.mixers if isinstance(m, AttentionConfig)), None)

    @property
    def name(self) -> str:
        """Family of the architecture, for people: RetNet, Transformer or Hybrid."""
        return "Hybrid" if self.retains and self.attends else "RetNet" if self.retains else "Transformer"

    def all_retention(self, who: str) -> RetentionConfig:
        """The retention that all blocks share, for a room that runs nothing else.

        Raises:
            ValueError: blocks that attend, or that differ; `who` begins the line.
        """
        block = self.all_alike(who)
        if not isinstance(block.mixer, RetentionConfig):
            raise ValueError(f"{who} takes models of retention only, this is a {self.name}")
        return block.mixer

    def all_alike(self, who: str) -> BlockConfig:
        """The block that all blocks are equal to; errors as `all_retention`."""
        odd = next((i for i, block in enumerate(self.blocks) if block != self.blocks[0]), None)
        if odd is None:
            return self.blocks[0]
        if len(set(self.kinds)) > 1:
            raise ValueError(f"{who} takes models whose blocks are of one kind, this is a {self.name}")
        raise ValueError(f"{who} takes models whose blocks are all alike, block {odd} differs from block 0")

    def with_ffn(self, more: int) -> "ModelConfig":
        """The config with the feed-forward layers of all blocks `more` wider (a negative number: narrower)."""
        wider = (replace(block, ffn=replace(block.ffn, width=block.ffn.width + more)) for block in self.blocks)
        return replace(self, blocks=tuple(wider))

    def written(self) -> dict[str, Any]:
        """The config as JSON has it; equal neighbours among the blocks are written once."""
        raw = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "blocks"}
        blocks = []
        for block, equal in groupby(self.blocks):
            mixer = {"kind": block.mixer.kind, **asdict(block.mixer)}
            blocks.append({"repeat": len(list(equal)), "mixer": mixer, "ffn": asdict(block.ffn)})
        return raw | {"blocks": blocks}

    @staticmethod
    def read(raw: Mapping[str, Any]) -> "ModelConfig":
        """The config that `written` describes.

        Raises:
            TypeError, KeyError: fields that are unknown or missing.
            ValueError: values that are none.
        """
        blocks: list[BlockConfig] = []
        for one in raw["blocks"]:
            mixer, ffn, repeat = dict(one["mixer"]), one["ffn"], one.get("repeat", 1)
            check_layers(repeat)
            kind = mixer.pop("kind")
            if kind not in list(MIXERS):  # a list: JSON may hold what has no hash
                raise ValueError(f"unknown kind of block {kind!r}, expected one of {', '.join(MIXERS)}")
            blocks += [BlockConfig(MIXERS[kind](**mixer), FeedForwardConfig(**ffn))] * repeat
            check_layers(len(blocks))
        return ModelConfig(**{**raw, "blocks": tuple(blocks)})


def check_layers(layers: Any) -> None:
    """Raises ValueError for a number of blocks that is none, or beyond any model's."""
    if type(layers) is not int:
        raise ValueError(f"layers must be a whole number, got {layers!r}")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if layers > LIMITS["layers"]:
        raise ValueError(f"layers must be at most {LIMITS['layers']:,}, got {layers:,}")

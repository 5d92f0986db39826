"""Students of a Transformer: the same layers with retention in place of attention, or beside a window of it.

    window=192, sinks=4    attention in a window and to the first tokens, then retention, which reads all tokens
    window=(64, 400, …)    the same with a window for each layer
    window=None            retention alone

Layers named in `attention` keep the teacher's attention as it is. Feed-forward layers, norms and embeddings are the
teacher's. A student with a window begins as its teacher in that window: what retention adds is 0 at first. Windows
with sinks: arXiv 2309.17453; both kinds of mixers in one layer: Samba (arXiv 2406.07522), Hymba (arXiv 2411.13676).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retentive.layers.config import AttentionConfig, RetentionConfig
from retentive.models.config import BlockConfig, ModelConfig
from retentive.models.model import LanguageModel
from retentive.ops import decay as decays
from retentive.tables import counted

HALF_LIVES = (32.0, 1024.0)
"""Tokens after which the first and the last head of new retention have forgotten half; others lie between."""


def student(
    teacher: ModelConfig,
    *,
    window: int | Sequence[int] | None = 192,
    sinks: int = 4,
    attention: Collection[int] = (),
    **changes: Any,
) -> ModelConfig:
    """Config of a Transformer's student.

    Args:
        window: tokens that attention sees beside retention, in every layer or in each; None: no attention.
        sinks: first tokens that it always sees.
        attention: numbers of the layers that keep the teacher's attention.
        changes: fields of RetentionConfig.

    Raises:
        ValueError: the teacher has blocks of retention, no such layer, or another number of layers than windows.
    """
    if teacher.retains:
        raise ValueError(f"a student needs a teacher of attention alone, this is a {teacher.name}")
    if wrong := [i for i in attention if not 0 <= i < teacher.layers]:
        raise ValueError(f"attention in layer {wrong[0]}: the teacher has layers 0 to {teacher.layers - 1}")
    windows = [window] * teacher.layers if window is None or isinstance(window, int) else window
    if len(windows) != teacher.layers:
        raise ValueError(f"{counted(len(windows), 'window')} for a teacher of {counted(teacher.layers, 'layer')}")
    blocks: list[BlockConfig] = []
    for i, (block, own) in enumerate(zip(teacher.blocks, windows, strict=True)):
        if i in attention:
            blocks.append(block)
            continue
        if own is not None:
            beside: Any = block.mixer
            blocks.append(BlockConfig(replace(beside, window=own, sinks=sinks, moving_sinks=sinks > 0), None))
        blocks.append(BlockConfig(retention_for(block.mixer, alone=own is None, **changes), block.ffn))
    return replace(teacher, blocks=tuple(blocks))


def retention_for(attention: Any, *, alone: bool, **changes: Any) -> RetentionConfig:
    """Retention with a head for each of the keys of attention, or, `alone`, for each of its queries."""
    c: AttentionConfig = attention
    heads = c.heads if alone else c.kv_heads
    own: dict[str, Any] = dict(
        dim=c.dim, heads=heads, kv_heads=c.kv_heads, key_dim=heads * c.head_dim, value_dim=heads * c.head_dim,
        rotary=c.rotary if alone else "none", rotary_base=c.rotary_base, decay="gated", decay_bias=True,
        head_norm=True, head_norm_affine=True, norm_eps=c.norm_eps,
    )  # fmt: skip
    return RetentionConfig(**own | changes)


@torch.no_grad()
def take_over(model: LanguageModel, teacher: LanguageModel) -> None:
    """Give a student the weights of its teacher, and new retention a beginning made of those of attention.

    Raises:
        ValueError: the model is no student of this teacher.
    """
    own, theirs, at = model.state_dict(), teacher.state_dict(), 0
    if sum(block.ffn is not None for block in model.blocks) != len(teacher.blocks):
        raise ValueError("the model is no student of this teacher: their numbers of layers differ")
    for name in (name for name in own if not name.startswith("blocks.")):
        own[name].copy_(theirs[name])
    for i, block in enumerate(model.blocks):
        source = teacher.blocks[at]
        for name in (name for name in own if name.startswith(f"blocks.{i}.")):
            known = theirs.get(name.replace(f"blocks.{i}.", f"blocks.{at}."))
            if known is not None and known.shape == own[name].shape:
                own[name].copy_(known)
        if block.kind == RetentionConfig.kind:
            alone = i == 0 or model.blocks[i - 1].ffn is not None
            _begin(block, source, alone=alone)
        at += block.ffn is not None


def _begin(block: Any, source: Any, *, alone: bool) -> None:
    """New retention: projections of attention's, decays from HALF_LIVES; adds nothing at first if not `alone`."""
    new, old = block.mixer, source.mixer
    block.mixer_norm.weight.copy_(source.mixer_norm.weight)
    for name in ("k_proj", "v_proj"):
        mine, theirs = getattr(new, name).weight, getattr(old, name).weight
        if mine.shape == theirs.shape:
            mine.copy_(theirs)
    new.q_proj.weight.copy_(_mean_of_groups(old.q_proj.weight, new.H, old.H, old.K))
    if new.decay_proj is not None and new.decay_proj.bias is not None:
        new.decay_proj.weight.zero_()
        log_decay = -math.log(2) / half_lives(new.H)
        new.decay_proj.bias.copy_(decays.bias_for(new.config.decay, log_decay, new.config.decay_scale))
    if alone:
        new.out_proj.weight.copy_(old.out_proj.weight)
    else:
        new.out_proj.weight.zero_()


def _mean_of_groups(weight: Tensor, heads: int, of: int, K: int) -> Tensor:
    """Query projection of `heads` heads, each the mean of its group of the teacher's."""
    return weight.view(heads, of // heads, K, -1).mean(1).flatten(0, 1)


def half_lives(heads: int) -> Tensor:
    """Half-life of each head in tokens, float64 `[H]`: spread evenly in the logarithm over HALF_LIVES."""
    first, last = (math.log(x) for x in HALF_LIVES)
    return torch.linspace(first, last, heads, dtype=torch.float64).exp()

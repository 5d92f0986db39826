"""The variants of a comparison: a RetNet with some fields changed, its Transformer twin, and other people's models.

All variants of a size have the same number of parameters (Mamba's nearly): what a variant takes away, its feed-forward
layer gets, as the twin's does. A new variant is one line of the table.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from retentive.models import Config, RetNetConfig, cost, matching
from retentive.ops import decay


class Variant(NamedTuple):
    model: str
    """As `retentive train --model` takes it."""
    changes: Callable[[RetNetConfig], dict[str, Any]]
    """Of the RetNet's config; the feed-forward width is then fitted to the parameters."""
    about: str
    """What it is, for people."""


def same(config: RetNetConfig) -> dict[str, Any]:
    """No change."""
    return {}


def short_head(heads: int) -> tuple[float, ...]:
    """log(gamma) of each head: as usual, but that the first forgets at once, and so sees the token before."""
    return (-1.0, *decay.values("lm", heads)[1:])


VARIANTS = {
    "retnet": Variant("retnet", same, "RetNet, decays of the paper's language models"),
    "transformer": Variant("transformer", same, "Transformer twin: rotary positions, SwiGLU, RMSNorm, SDPA"),
    "no-gate": Variant("retnet", lambda c: dict(gate=False), "without the swish gate"),
    "no-head-norm": Variant("retnet", lambda c: dict(head_norm=False), "without the norm of each head's output"),
    "no-decay": Variant("retnet", lambda c: dict(decay="none"), "without decay: linear attention"),
    "one-decay": Variant(
        "retnet", lambda c: dict(decay=(math.log(127 / 128),) * c.heads), "one decay for all heads, 127/128"
    ),
    "small-heads": Variant(
        "retnet",
        lambda c: dict(heads=4 * c.heads, kv_heads=0, value_dim=c.value_dim),
        "four times as many heads, a quarter as wide",
    ),
    "paper-decay": Variant("retnet", lambda c: dict(decay="paper"), "decays of the paper's equation 8"),
    "no-score-norm": Variant("retnet", lambda c: dict(score_norm=False), "without the norm of the decay mask's rows"),
    "short-head": Variant(
        "retnet",
        lambda c: dict(decay=short_head(c.heads)),
        "the first head forgets at once and sees the token before",
    ),
    "gated": Variant(
        "retnet", lambda c: dict(decay="gated", score_norm=False), "a decay for each token: gated retention"
    ),
    "hybrid": Variant("hybrid", same, "one block of four attends"),
    "llama": Variant("llama", same, "Llama of the transformers library"),
    "mamba": Variant("mamba", same, "Mamba of the transformers library"),
    "mamba2": Variant("mamba2", same, "Mamba-2 of the transformers library"),
    "rwkv": Variant("rwkv", same, "RWKV-4 of the transformers library"),
}


def changes(variant: str, config: RetNetConfig) -> dict[str, Any]:
    """What `--set` must change of a size's config for the variant, its feed-forward layer fitted to the parameters."""
    changed = VARIANTS[variant].changes(config)
    if not changed:
        return {}
    bare = replace(config, **changed)
    spare = cost.block_parameters(config) - cost.block_parameters(bare)
    unit = config.layers * config.dim * (3 if config.ffn_gate else 2)
    return changed | {"ffn_dim": config.ffn_dim + round(spare / unit)} if round(spare / unit) else changed


def config_of(variant: str, config: RetNetConfig) -> Config:
    """The config of a variant of a RetNet."""
    return matching(VARIANTS[variant].model, replace(config, **changes(variant, config)))

"""The variants of a comparison: a RetNet with some fields changed, its Transformer twin, and other people's models.

All variants of a size have the same number of parameters (Mamba nearly): the feed-forward layer gets what a variant
takes away, as in the twin. A new variant is one line of the table.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from retentive.models import Config, RetNetConfig, cost, matching
from retentive.ops import decay


class Variant(NamedTuple):
    """A model that can be compared."""

    model: str
    """Its name for `retentive train --model`."""
    changes: Callable[[RetNetConfig], dict[str, Any]]
    """What differs in the RetNet's config; the feed-forward width is then fitted to the number of parameters."""
    about: str
    """What it is, for people."""


def none(config: RetNetConfig) -> dict[str, Any]:
    """No change."""
    return {}


def short_head(heads: int) -> tuple[float, ...]:
    """log(gamma) of each head: the language models', except that the first keeps 1/e of its state from token to token.

    It sees little more than the last two tokens, which is how a model finds out what stood before the present one.
    """
    return (-1.0, *decay.values("lm", heads)[1:])


VARIANTS = {
    "retnet": Variant("retnet", none, "RetNet, decays of the paper's language models"),
    "transformer": Variant("transformer", none, "Transformer twin: rotary positions, SwiGLU, RMSNorm, SDPA"),
    "no-gate": Variant("retnet", lambda c: dict(gate=False), "without the swish gate"),
    "no-head-norm": Variant("retnet", lambda c: dict(head_norm=False), "without the norm of each head's output"),
    "no-decay": Variant("retnet", lambda c: dict(decay="none"), "without decay: linear attention"),
    "one-decay": Variant(
        "retnet", lambda c: dict(decay=(math.log(127 / 128),) * c.heads), "one decay for all heads, 127/128"
    ),
    "small-heads": Variant(
        "retnet",
        lambda c: dict(heads=4 * c.heads, kv_heads=0, value_dim=c.value_dim),  # kv_heads=0: as many as there are now
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
    "hybrid": Variant("hybrid", none, "one block of four attends"),
    "llama": Variant("llama", none, "Llama of the transformers library"),
    "mamba": Variant("mamba", none, "Mamba of the transformers library"),
    "mamba2": Variant("mamba2", none, "Mamba-2 of the transformers library"),
    "rwkv": Variant("rwkv", none, "RWKV-4 of the transformers library"),
}


def changes(variant: str, config: RetNetConfig) -> dict[str, Any]:
    """The fields of a size's config that differ for the variant (`--set`), with a width that keeps the parameters."""
    changed = VARIANTS[variant].changes(config)
    if not changed:
        return {}
    spare = cost.block_parameters(config) - cost.block_parameters(replace(config, **changed))
    per_width = config.layers * config.dim * (3 if config.ffn_gate else 2)  # parameters of one more feed-forward unit
    wider = round(spare / per_width)
    return changed | {"ffn_dim": config.ffn_dim + wider} if wider else changed


def config_of(variant: str, config: RetNetConfig) -> Config:
    """The config of a variant, as wide and deep as this RetNet."""
    return matching(VARIANTS[variant].model, replace(config, **changes(variant, config)))

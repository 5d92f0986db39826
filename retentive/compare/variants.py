"""Variants of a comparison: models by name, with some fields of their configs changed.

All variants of a size have the same number of parameters (peers nearly): the width of the feed-forward layer makes up
for the change, as in the twin. A new variant is one line of the table, or `--set NAME:FIELD=VALUE,…` on the command
line.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from retentive.layers import RetentionConfig
from retentive.models import ARCHITECTURES, Config, config_of, cost, retnet
from retentive.models.presets import PORTABLE
from retentive.ops import decay

Changes = Callable[[RetentionConfig], dict[str, Any]]
"""Function from the retention config of the size's RetNet to the changed fields."""


class Variant(NamedTuple):
    """Model that can be compared."""

    model: str
    """Name for `retentive train --model`."""
    changes: Changes
    """Changes to the config of that name."""
    about: str
    """Description for people."""
    optimizer: str = ""
    """Optimiser, if not the comparison's."""


def none(config: RetentionConfig) -> dict[str, Any]:
    """Returns no changes."""
    return {}


def always(**fields: Any) -> Changes:
    """Returns the same fields for every size."""
    return lambda config: fields


def paper(changes: Changes = none, **fields: Any) -> Changes:
    """Returns the paper's RetNet with changed fields, which make it another architecture."""
    return lambda config: ARCHITECTURES["retnet-paper"] | changes(config) | fields


def short_head(heads: int) -> tuple[float, ...]:
    """Returns log(gamma) of each head as for language models, except that the first keeps 1/e of its state per token.

    The first head sees little more than the last two tokens, which tells the model what stood before the current one.
    """
    return (-1.0, *decay.values("lm", heads)[1:])


def small_heads(config: RetentionConfig) -> dict[str, Any]:
    """Returns four times as many heads of the same total width."""
    return dict(heads=4 * config.heads, kv_heads=0, value_dim=config.value_dim)


def older(**fields: Any) -> Changes:
    """Returns hybrids with nothing but attention in one block of four, with as many heads as the RetNet."""
    return lambda c: dict(attention_every=4, attention_forget=False, convolution=0, heads=c.heads) | fields


def portable(**fields: Any) -> Changes:
    """Returns `retnet-portable` with changed fields, which make it another architecture."""

    def changes(config: RetentionConfig) -> dict[str, Any]:
        heads = dict(heads=config.dim // PORTABLE, kv_heads=0, key_dim=config.dim, value_dim=config.dim)
        return ARCHITECTURES["retnet-portable"] | heads | fields

    return changes


VARIANTS = {
    "retnet": Variant("retnet", none, "this package's RetNet"),
    "retnet-paper": Variant("retnet-paper", none, "the paper's RetNet, decays of its language models"),
    "torchscale": Variant("torchscale", none, "torchscale's RetNet"),
    "fla": Variant("fla", none, "fla's RetNet"),
    "transformer": Variant("transformer", none, "Transformer twin: rotary positions, SwiGLU, RMSNorm, SDPA"),
    "transformer-qk-norm": Variant("transformer", always(qk_norm=True), "twin with QK-norm"),
    "transformer-forget": Variant("transformer", always(forget_gate=True), "twin with a forget gate"),
    "transformer-qk-norm-forget": Variant(
        "transformer", always(qk_norm=True, forget_gate=True), "twin with QK-norm and a forget gate"
    ),
    # the paper's RetNet with one part changed
    "no-gate": Variant("retnet", paper(gate=False), "without the swish gate"),
    "no-head-norm": Variant("retnet", paper(head_norm=False), "without the norm of each head's output"),
    "no-decay": Variant("retnet", paper(decay="none"), "without decay: linear attention"),
    "one-decay": Variant(
        "retnet", paper(lambda c: dict(decay=(math.log(127 / 128),) * c.heads)), "one decay for all heads, 127/128"
    ),
    "small-heads": Variant("retnet", paper(small_heads), "four times as many heads, a quarter as wide"),
    "paper-decay": Variant("retnet", paper(decay="paper"), "decays of the paper's equation 8"),
    "no-score-norm": Variant("retnet", paper(score_norm=False), "without the norm of the decay mask's rows"),
    "short-head": Variant(
        "retnet",
        paper(lambda c: dict(decay=short_head(c.heads))),
        "the first head forgets at once and sees the token before",
    ),
    "gated": Variant("retnet", paper(decay="gated", score_norm=False), "a decay for each token: gated retention"),
    "qk-norm": Variant("retnet", paper(qk_norm=True), "RMSNorm of q and k"),
    "fast-decay": Variant("retnet", paper(decay_range=(1 / 4, 1 / 64)), "decays from 3/4 to 63/64"),
    "fixed": Variant(
        "retnet",
        paper(head_norm=False, decay_range=(1 / 4, 1 / 64)),
        "without the norm of each head's output, decays from 3/4 to 63/64",
    ),
    # this package's RetNet with one part changed
    "retnet-no-qk-norm": Variant("retnet", always(qk_norm=False), "without QK-norm"),
    "retnet-head-norm": Variant("retnet", always(head_norm=True), "with a norm of each head's output"),
    "retnet-fixed": Variant("retnet", always(decay="lm", decay_range=(1 / 4, 1 / 64)), "fixed decays, 3/4 to 63/64"),
    "retnet-no-gate": Variant("retnet", always(gate=False), "without the swish gate"),
    "retnet-sigmoid": Variant("retnet", always(gate_activation="sigmoid"), "a sigmoid gate"),
    "retnet-no-rotation": Variant("retnet", always(rotary="none"), "without rotation"),
    "retnet-qk-bias": Variant("retnet", always(qk_bias=True), "with biases of q and k"),
    "retnet-decay-bias": Variant("retnet", always(decay_bias=True), "decays per token that begin as the paper's"),
    "retnet-scale-4": Variant("retnet", always(decay_scale=4.0), "log sigmoid / 4"),
    "retnet-scale-8": Variant("retnet", always(decay_scale=8.0), "log sigmoid / 8"),
    "retnet-small-heads": Variant("retnet", small_heads, "four times as many heads, a quarter as wide"),
    # `retnet-portable` with one part changed
    "retnet-portable": Variant("retnet-portable", none, "the RetNet that llama.cpp can run"),
    "portable-slow": Variant("retnet", portable(decay_range=decay.LM_RANGE), "decays that begin as the paper's"),
    "portable-gated": Variant("retnet", portable(decay="gated", decay_bias=False), "the default's decay"),
    "portable-swish": Variant("retnet", portable(gate_activation="swish"), "a swish gate"),
    "portable-rotation": Variant("retnet", portable(rotary="interleaved"), "with rotation"),
    "portable-qk-norm": Variant("retnet", portable(qk_norm=True), "with QK-norm"),
    "retnet-convolution": Variant("retnet", always(convolution=4), "with short convolutions"),
    "hybrid": Variant("hybrid", none, "this package's hybrid: every second block attends to 256 tokens"),
    "hybrid-no-convolution": Variant("hybrid", always(convolution=0), "without convolutions"),
    "hybrid-no-forget": Variant("hybrid", always(attention_forget=False), "without forget gates"),
    "hybrid-no-rotation": Variant("hybrid", always(attention_rotary="none"), "without rotation in the windows"),
    "hybrid-retention-no-rotation": Variant("hybrid", always(rotary="none"), "without rotation in retention"),
    "hybrid-third": Variant("hybrid", always(attention_every=3), "every third block attends"),
    "hybrid-fourth": Variant("hybrid", always(attention_every=4), "every fourth block attends"),
    "hybrid-64": Variant("hybrid", always(attention_window=64), "windows of 64 tokens"),
    "hybrid-128": Variant("hybrid", always(attention_window=128), "windows of 128 tokens"),
    "hybrid-512": Variant("hybrid", always(attention_window=512), "windows of 512 tokens"),
    "hybrid-small-heads": Variant("hybrid", small_heads, "four times as many heads as the RetNet of the size"),
    "hybrid-wide-heads": Variant("hybrid", lambda c: dict(heads=c.heads), "as many heads as the RetNet of the size"),
    # older hybrids: one block of four, and nothing else
    "hybrid-whole": Variant("hybrid", older(attention_window=None), "one block of four attends"),
    "hybrid-window": Variant("hybrid", older(), "one block of four attends to 256 tokens"),
    "hybrid-window-bare": Variant("hybrid", older(attention_rotary="none"), "the same without rotation in that block"),
    "transformer-convolution": Variant("transformer", always(convolution=4), "twin with short convolutions"),
    "transformer-narrow": Variant(
        "transformer",
        lambda c: dict(heads=4 * c.heads, qk_norm=True, forget_gate=True),
        "twin with QK-norm, a forget gate, and four times as many heads",
    ),
    "transformer-qk-norm-forget-convolution": Variant(
        "transformer", always(qk_norm=True, forget_gate=True, convolution=4), "twin with all three"
    ),
    "llama": Variant("llama", none, "Llama of the transformers library"),
    "mamba": Variant("mamba", none, "Mamba of the transformers library"),
    "mamba2": Variant("mamba2", none, "Mamba-2 of the transformers library"),
    "rwkv": Variant("rwkv", none, "RWKV-4 of the transformers library"),
}


def own_variant(fields: Mapping[str, Any]) -> Variant:
    """Returns the variant of these fields; the field `model` names the model to change.

    Raises:
        ValueError: the feed-forward width is among them.
    """
    if "ffn_dim" in fields:
        raise ValueError("ffn_dim: set by the comparison for equal parameters; change other fields")
    changed = {name: value for name, value in fields.items() if name != "model"}
    about = ", ".join(f"{name}={value}" for name, value in fields.items())
    return Variant(fields.get("model", "retnet"), always(**changed), about)


def changes(variant: Variant, size: str, **shape: Any) -> dict[str, Any]:
    """Returns the fields of the variant that differ from its model's config (`retentive train --set`).

    They include the feed-forward width that gives it as many parameters as the size's RetNet.

    Args:
        shape: fields that differ from the size's in all variants.
    """
    base = retnet(size, vocab_size=2, **shape)  # no change depends on the vocabulary
    changed = shape | variant.changes(base.all_retention("a comparison"))
    config: Any = config_of(variant.model, size, vocab_size=2, **changed)
    if config.library:
        return changed
    spare = cost.spare_width(config, cost.block_parameters(base))
    # of a hybrid, `ffn_dim` is the width beside retention: its other blocks follow from that
    blocks = config.without_convolutions().blocks
    block = next((b for b in blocks if b.mixer.kind == "retention"), blocks[0])
    return changed | ({"ffn_dim": block.ffn.width + spare} if spare else {})


def config_of_variant(variant: Variant, size: str, *, vocab_size: int, **shape: Any) -> Config:
    """Returns the config of a variant in a named size; arguments as for `changes`."""
    return config_of(variant.model, size, vocab_size=vocab_size, **changes(variant, size, **shape))

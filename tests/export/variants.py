"""Models of every field that an export must know, small, and with logits that differ by much."""

import torch

from retentive.models import ModelConfig, build, retnet, transformer
from retentive.ops.rotary import Scaling
from tests.configs import changed, hybrid, stacked

TINY = {"vocab_size": 257, "dim": 64, "layers": 2, "heads": 2}
VARIANTS = {
    "default": {},
    "tied": {"tie_embeddings": True},
    "fixed": {"decay": "lm", "score_norm": True, "head_norm": True, "qk_norm": False},
    "none": {"decay": "none", "score_norm": True, "rotary": "none", "gate": False},
    "numbers": {"decay": (-0.1, -0.7), "rotary": "half", "gate_activation": "sigmoid", "ffn_gate": False},
    "shared heads": {"heads": 4, "kv_heads": 2, "qk_bias": True, "decay_bias": True, "activation": "gelu"},
    "decay of RWKV-7": {"decay": "sigmoid", "decay_bias": True, "rotary": "none", "gate_activation": "sigmoid"},
    "shifted": {"qk_norm": False, "qk_bias": True, "head_norm": True, "head_norm_affine": True},
    "embedded": {"embed_scale": True, "embed_norm": True, "final_norm": False},
    "convolution": {"convolution": 4},
    "paper, slow heads": {"decay": "paper", "heads": 8, "score_norm": True, "value_dim": 128},
}

ATTENDING: dict[str, ModelConfig] = {
    "twin": transformer(**TINY),
    "grouped heads": transformer(**TINY | {"heads": 4}, kv_heads=2, qk_norm=True, rotary="interleaved"),
    "wide heads": transformer(**TINY, head_dim=48, rotary="none", tie_embeddings=True),
    "forget gate": transformer(**TINY, forget_gate=True),
    "biases": transformer(**TINY | {"heads": 4}, kv_heads=2, qkv_bias=True),
    "biases, forget gate": transformer(**TINY, qkv_bias=True, forget_gate=True),
    "window": transformer(**TINY, attention_window=8),
    "forget gate, window": transformer(**TINY, forget_gate=True, attention_window=8, rotary_base=500.0),
    "a window of one": transformer(**TINY, attention_window=1),
    "slower angles": changed(transformer(**TINY), rotary_scaling=Scaling(8.0, 1.0, 4.0, 16)),
    "hybrid": hybrid(**TINY, attention=(1,)),
    "hybrid, window": hybrid(**TINY | {"layers": 4}, attention=(0, 3), attention_window=16, attention_rotary="none"),
    "hybrid, window, forget gate": hybrid(**TINY, attention=(1,), attention_window=9, attention_forget=True),
    "twin, convolution": transformer(**TINY, convolution=3),
    "hybrid, window, convolution": hybrid(
        **TINY, attention=(1,), attention_window=9, attention_forget=True, convolution=4, ffn_gate=False
    ),
    "stacked": stacked(hybrid(**TINY | {"layers": 4}, attention=(0, 2))),
}
"""Configs with blocks of attention."""


def peaked(**changes):
    """A RetNet with weights so large that its logits differ by much."""
    return peaked_model(retnet(**{**TINY, **changes}))


def peaked_model(config: ModelConfig):
    """A model of this config with such weights."""
    torch.manual_seed(0)
    model = build(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=p.shape[-1] ** -0.5 if p.ndim == 2 else 0.2)
    return model

"""RetNets of every field that an export must know, small, and with logits that differ by much."""

import torch

from retentive.models import build, retnet

TINY = {"vocab_size": 257, "dim": 64, "layers": 2, "heads": 2}
VARIANTS = {
    "default": {},
    "tied": {"tie_embeddings": True},
    "fixed": {"decay": "lm", "score_norm": True, "head_norm": True, "qk_norm": False},
    "none": {"decay": "none", "score_norm": True, "rotary": "none", "gate": False},
    "numbers": {"decay": (-0.1, -0.7), "rotary": "half", "gate_activation": "sigmoid", "ffn_gate": False},
    "shared heads": {"heads": 4, "kv_heads": 2, "qk_bias": True, "decay_bias": True, "activation": "gelu"},
    "shifted": {"qk_norm": False, "qk_bias": True, "head_norm": True, "head_norm_affine": True},
    "embedded": {"embed_scale": True, "embed_norm": True, "final_norm": False},
    "paper, slow heads": {"decay": "paper", "heads": 8, "score_norm": True, "value_dim": 128},
}


def peaked(**changes):
    """A model with weights so large that its logits differ by much."""
    torch.manual_seed(0)
    model = build(retnet(**{**TINY, **changes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=p.shape[-1] ** -0.5 if p.ndim == 2 else 0.2)
    return model

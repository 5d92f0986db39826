"""Models on disk: our own folders, and those of torchscale and flash-linear-attention in both directions."""

from retentive.checkpoint.io import (
    load,
    load_config,
    load_with_tokenizer,
    read_tensors,
    save_model,
)

__all__ = ["load", "load_config", "load_with_tokenizer", "read_tensors", "save_model"]

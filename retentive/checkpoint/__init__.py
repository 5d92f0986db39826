"""Models on disk: our own folders, and those of torchscale and flash-linear-attention (fla) in both directions.

io          `load` and `save_model`: any layout in, the one that is asked for out
torchscale, fla    that project's config fields and tensor names, each with the same five functions
quantize    matrices of integers; adapter: low-rank changes of a model, trained and saved alone
keys        renaming tensors by a table, and the checks that both share
"""

from retentive.checkpoint.io import (
    load,
    load_config,
    load_with_tokenizer,
    read_tensors,
    save_model,
)

__all__ = ["load", "load_config", "load_with_tokenizer", "read_tensors", "save_model"]

"""Models on disk: our own folders, and those of torchscale, flash-linear-attention (fla) and Llama in both directions.

folder      `ModelFolder`, the only reader of config.json, and `load`
find        local, shipped and hub models
save        `save_model`, in any layout
weights     tensors between files and models
torchscale, fla, llama    that layout's config fields and tensor names, each with the same five functions
quantize    matrices of integers
adapter     low-rank changes of a model, trained and saved alone
keys        renames tensors by a table, and checks shared by them
"""

from retentive.checkpoint.folder import ModelFolder, load
from retentive.checkpoint.save import save_model

__all__ = ["ModelFolder", "load", "save_model"]

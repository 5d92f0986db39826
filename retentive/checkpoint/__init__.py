"""Models on disk: our own folders, and those of torchscale and flash-linear-attention (fla) in both directions.

folder      `ModelFolder`, the one reader of config.json, and `load`; find: local, shipped and hub models
save        `save_model`: the layout that is asked for
weights     tensors between files and models
torchscale, fla    that project's config fields and tensor names, each with the same five functions
quantize    matrices of integers; adapter: low-rank changes of a model, trained and saved alone
keys        renaming tensors by a table, and the checks that both share
"""

from retentive.checkpoint.folder import ModelFolder, load
from retentive.checkpoint.save import save_model

__all__ = ["ModelFolder", "load", "save_model"]

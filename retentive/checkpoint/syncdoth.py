"""Layout of syncdoth/RetNet, a port of torchscale's RetNet to transformers: torchscale's tensors with a prefix.

Its output matrix is `lm_head`, and its config may ask for the decays of the paper's language models.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from retentive.checkpoint import torchscale
from retentive.checkpoint.keys import refuse
from retentive.models import ModelConfig

OUTPUT = "output_projection.weight"
"""Name of the output matrix in torchscale."""


def recognises(config: dict) -> bool:
    """True if a config.json is from this project."""
    return config.get("model_type") == "retnet" and torchscale.recognises(config)


def read_config(config: dict) -> ModelConfig:
    """Returns our config from the fields of its RetNetConfig; raises as torchscale's."""
    refuse(config, "syncdoth", use_glu=True, deepnorm=False, drop_path_rate=0.0)
    tied = {"share_decoder_input_output_embed": config.get("tie_word_embeddings", False)}
    found = torchscale.read_config({"vocab_size": 50257, "decoder_retention_heads": 3, **config, **tied})
    return _with_decay(found, "lm") if config.get("use_lm_decay") else found


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of its config.json for one of our configs; raises as torchscale's."""
    retention = config.retention
    slow = retention is not None and retention.decay == "lm"
    fields = torchscale.write_config(_with_decay(config, "paper") if slow else config)
    tied = fields.pop("share_decoder_input_output_embed")
    return {"model_type": "retnet", "use_glu": True, "use_lm_decay": slow, "tie_word_embeddings": tied, **fields}


def _with_decay(config: ModelConfig, decay: str) -> ModelConfig:
    """Returns the config with this schedule in every block."""
    changed: dict[str, Any] = {"decay": decay}
    blocks = tuple(replace(block, mixer=replace(block.mixer, **changed)) for block in config.blocks)
    return replace(config, blocks=blocks)


def read_tensors(tensors: dict[str, Tensor], config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors by our names."""
    names = {name: OUTPUT if name == "lm_head.weight" else name.removeprefix("model.") for name in tensors}
    return torchscale.read_tensors({names[name]: x for name, x in tensors.items()}, config, raw)


def write_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Returns the tensors by its names."""
    found = torchscale.write_tensors(tensors, config)
    return {("lm_head.weight" if name == OUTPUT else f"model.{name}"): x for name, x in found.items()}

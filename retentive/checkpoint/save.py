"""Writes model folders: `save_model`, in our layout or another project's, atomically."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from retentive.checkpoint.adapter import adapter_of
from retentive.checkpoint.folder import FOREIGN, FORMAT
from retentive.checkpoint.quantize import quantization_of
from retentive.checkpoint.weights import checksum
from retentive.data.templates import TEMPLATE
from retentive.data.tokenizer import Tokenizer
from retentive.files import save_tensors, write_text, write_together
from retentive.models import LanguageModel
from retentive.models.encoders import configs_of


def save_model(
    folder: str | Path,
    model: LanguageModel,
    tokenizer: Tokenizer | None = None,
    *,
    template: str | None = None,
    layout: str = "retentive",
) -> None:
    """Writes a model folder, replacing files of the same names.

    Args:
        template: source of the model's chat template, if it has one.
        layout: "retentive", "torchscale", "syncdoth", "fla" or "llama".

    Raises:
        ValueError: the other project cannot express the architecture (the message names all fields that differ).
        OSError: the folder cannot be written; its old content remains.
    """
    folder, config = Path(folder), model.config
    tensors = {name: x.detach().cpu().contiguous() for name, x in saved(model)}
    if layout == "retentive":
        raw = _described(model)
    else:
        if quantization_of(model):
            raise ValueError(f"{layout} cannot hold quantised weights: convert the model that this was quantised from")
        if configs_of(model):
            raise ValueError(f"{layout} has no models with encoders of pictures or sound")
        if config.library:
            raise ValueError(f"{layout} has RetNets only, this is a model of {config.library}")
        raw = FOREIGN[layout].write_config(config)
        tensors = FOREIGN[layout].write_tensors(tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    described = json.dumps(raw, indent=2) + "\n"
    about = {"crc32": checksum(tensors)}  # without it a flipped bit would go unnoticed
    write_together(
        {
            folder / "model.safetensors": lambda partial: save_tensors(partial, tensors, about),
            folder / "config.json": lambda partial: partial.write_text(described, encoding="utf-8"),
        }
    )
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of older weights, which `load` would prefer
    save_words(folder, tokenizer, template)


def save_all_but_weights(
    folder: Path, model: LanguageModel, tokenizer: Tokenizer | None = None, *, template: str | None = None
) -> None:
    """Writes the files of `save_model` beside model.safetensors, which a sharded checkpoint writes in parts."""
    write_text(folder / "config.json", json.dumps(_described(model), indent=2) + "\n")
    save_words(folder, tokenizer, template)


def saved(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters to save, by name: all, or only those of an adapter."""
    adapter = adapter_of(model)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad or not adapter]


def _described(model: LanguageModel) -> dict[str, Any]:
    """Returns the content of the model's config.json."""
    raw: dict[str, Any] = {"format": FORMAT, "config": model.config.written()}
    if model.config.library:
        raw["kind"] = "peer"
    if adapter := adapter_of(model):  # its tensors alone are in the folder, even if the model's are integers
        raw["adapter"] = asdict(adapter)
    elif how := quantization_of(model):
        raw["quantization"] = asdict(how)
    if encoders := configs_of(model):
        raw["encoders"] = encoders
    return raw


def save_words(folder: Path, tokenizer: Tokenizer | None, template: str | None = None) -> None:
    """Writes a folder's files of text: the tokenizer and the source of the chat template, those that there are."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder)
    if template is not None:
        write_text(folder / TEMPLATE, template)

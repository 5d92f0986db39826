"""Writes folders that mlx-lm loads: weights and words as transformers has them, and classes for mlx.

config.json, model.safetensors, mlx_model.py                the model and its classes
tokenizer.json, tokenizer_config.json, chat_template.jinja  its words
generation_config.json, README.md                           how it writes, and the model card
"""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retentive.checkpoint import ModelFolder
from retentive.data.tokenizer import Tokenizer
from retentive.files import write_json, write_text
from retentive.hf.folder import card, compared, write_folder
from retentive.models import LanguageModel

CLASSES = Path(__file__).with_name("mlx_model.py")
CARD = Path(__file__).with_name("card_mlx.md")
"""Model card with gaps in braces."""


def unfit(config: Any) -> list[str]:
    """Returns all that these classes lack for a model; empty if they have everything."""
    return ["attention sinks"] if any(config.sinks) else []


def to_mlx(source: str | Path | ModelFolder, out: Path, *, tokenizer: str | Tokenizer | None = None) -> float | None:
    """Writes a model for mlx-lm, in a new folder, as a whole or not at all.

    Integer weights are written as the floats that they stand for; `mlx_lm.convert` quantises for mlx.

    Args:
        tokenizer: tokenizer for a model without one.

    Returns:
        The largest difference of the logits from the model's, relative to their size; None without mlx-lm.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the model is a peer, reads pictures or sound, or has parts that the classes lack; or mlx computes
            other logits.
    """
    folder = ModelFolder.open(source)
    if not folder.config.library and (reasons := unfit(folder.config)):
        raise ValueError(f"the classes for mlx have no {' and no '.join(reasons)}, which {folder.name} needs")

    def finish(path: Path, folder: ModelFolder, model: LanguageModel, config: dict[str, Any]) -> float | None:
        write_json(path / "config.json", {**config, "model_file": CLASSES.name})
        shutil.copyfile(CLASSES, path / CLASSES.name)
        write_text(path / "README.md", card(CARD, folder, model))
        return difference(path, model, config) if find_spec("mlx_lm") else None

    return write_folder(folder, out, finish, tokenizer=tokenizer)


def difference(path: Path, model: LanguageModel, config: dict[str, Any]) -> float:
    """Returns the largest difference of mlx's logits from the model's; arguments and errors as `compared`."""
    import mlx.core as mx

    from retentive.hf.mlx_model import Model, ModelArgs

    def logits(ids: torch.Tensor) -> torch.Tensor:
        theirs = Model(ModelArgs.from_dict(config))
        weights = mx.load(str(path / "model.safetensors"))
        theirs.load_weights([(name, x.astype(mx.float32)) for name, x in weights.items()])
        return torch.from_numpy(np.array(theirs(mx.array(ids.numpy()))))

    with mx.stream(mx.cpu):
        return compared("mlx", logits, model)

